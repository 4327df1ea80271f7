"""Which rows a spec means: the one place that takes a spec apart.

    rows.csv    rows.jsonl[:500]                        a file, or a slice of it
    beavertails-sample:test                             a name of sources.yaml with a split
    PKU-Alignment/BeaverTails:330k_train                a data set of the hub, or a folder in its
                                                        layout
    lmsys/toxic-chat@toxicchat0124:train[:500]          … of its configuration toxicchat0124
    user/name@main:train                                … at its revision main
    user/name@configuration@revision:train              … of both

What stands behind one `@` is the configuration of that name, if the data set has one; otherwise it
is a revision. Slices are those of `datasets`: `[:500]`, `[10%:20%]`, `[-100:]`, and
`train+validation[:10]` for several splits. `~` is the home folder.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, ReadInstruction
from tqdm.auto import tqdm

from common.conversation import UserError, one_line
from common.data.files import FILE_TYPES, Rows, read_rows
from common.data.tables import sources

ROOT = Path(__file__).resolve().parents[2]
SLICE = r"(?:\[[^\[\]]*\])?"
AND = " + "  # between the names of data sets that are read as one
PART = rf"[\w.\-]+{SLICE}"  # a split, or a slice of it
SPEC = re.compile(rf"(?P<name>[^:].*?)(?::(?P<split>{PART}(?:\+{PART})*))?")


@dataclass(frozen=True)
class Spec:
    """A spec in its parts.

    `name`: a file, a folder, a hub id or a name of sources.yaml. `marks`: what stands behind each
        `@`.
    `split`: with its slice; of a file the slice alone, empty for all of it.
    """

    name: str
    marks: tuple[str, ...] = ()
    split: str = ""
    is_file: bool = False

    @property
    def splits(self) -> list[str]:
        """The names of the splits, without slices."""
        names = []
        for part in filter(None, self.split.split("+")):
            name, _, _ = part.partition("[")
            names.append(name)
        return names

    def __str__(self) -> str:
        name = "@".join([self.name, *self.marks])
        if self.split and not self.is_file:
            name += ":"
        return name + self.split


def parse_spec(text: str) -> Spec:
    """Take a spec apart. Whether its data exists shows when it is read.

    Raises:
        UserError: nothing before the split, or more than two `@`.
    """
    text = os.path.expanduser(text)
    path, numbers = re.fullmatch(rf"(.*?)({SLICE})", text, re.DOTALL).groups()
    kind = Path(path).suffix.lower()
    if kind in FILE_TYPES or Path(path).is_file():
        return Spec(path, split=numbers, is_file=True)
    found = SPEC.fullmatch(text)
    parts = found["name"].split("@") if found else [""]
    if len(parts) > 3 or "" in parts:
        raise UserError(
            f"{text!r}: no data set; expected a file, or user/name, @configuration or @revision "
            "or both, and :split"
        )
    name, *marks = parts
    return Spec(name, tuple(marks), found["split"] or "")


def in_one_name(specs: Sequence[str]) -> str:
    """Several data specs as one text, such as a card has; of one it is that spec."""
    return AND.join(specs)


def specs_of_name(name: str) -> list[str]:
    """The data specs that `in_one_name` has joined."""
    return name.split(AND)


def is_here(text: str) -> bool:
    """Whether the data of a spec lie on this machine: a file, a folder, or a bundled sample."""
    spec = parse_spec(text)
    bundled = "path" in sources()["sources"].get(spec.name, {})
    return bundled or Path(spec.name).exists()


def about_data(text: str) -> dict[str, str]:
    """What is known of the data that a spec means, without reading it.

    Args:
        text: a spec, or "0.1 of" a spec, or several of them in one name.

    Returns:
        `name`, without folders of the user's, and where they are known `hub` (its id), `licence`
        and `language`.
    """
    share, text = re.fullmatch(r"([\d.]+ of )?(.*)", text, re.DOTALL).groups("")
    specs = specs_of_name(text)
    if len(specs) > 1:
        names = [about_data(spec)["name"] for spec in specs]
        return {"name": share + in_one_name(names)}
    try:
        spec = parse_spec(text)
    except UserError:
        return {"name": share + text}
    path = Path(spec.name)
    if spec.is_file or path.exists():
        spec = replace(spec, name=path.name)
        return {"name": f"{share}{spec}"}
    about = {"name": f"{share}{spec}"}
    data_sets = sources()["sources"]
    known = data_sets.get(spec.name, {"hub": spec.name})
    for fact in ("hub", "licence", "language"):
        if fact in known:
            about[fact] = known[fact]
    return about


def spec_rows(text: str) -> tuple[str, Rows]:
    """The name of a data set, and its rows unchanged, each with a text that says where it is.

    A row that cannot be read is a `UserError` in its place.

    Raises:
        UserError: no such data set, configuration or split. Files and the hub raise theirs when the
            rows are read.
    """
    spec = parse_spec(text)
    if spec.is_file:
        path = Path(spec.name)
        if path.suffix.lower() not in FILE_TYPES:
            raise UserError(f"{path}: unknown file type; expected {', '.join(FILE_TYPES)}")
        rows = read_rows(path)
        return path.name, _sliced(rows, spec.split, text)
    known = sources()["sources"]
    if spec.name in known:
        return spec.name, _known_rows(spec, known[spec.name], text)
    if not spec.split:
        raise UserError(
            f"{text}: no such file, and a hub id or a folder needs a split (user/name:split); "
            f"known names: {', '.join(known)}"
        )
    name = "@".join([spec.name, *spec.marks])
    return name, _hub_rows(spec)


def _known_rows(spec: Spec, known: Mapping[str, Any], text: str) -> Rows:
    """Rows of a name of sources.yaml. A wrong split is refused without asking the network."""
    unknown = set(spec.splits) - set(known["splits"])
    if unknown or not spec.split:
        there = ", ".join(f"{spec.name}:{name}" for name in known["splits"])
        raise UserError(f"{text}: {spec.name} has no split {spec.split!r}; it has {there}")
    if "path" not in known:
        return _hub_rows(replace(spec, name=known["hub"]))
    rows = []
    for part in spec.split.split("+"):
        split, _, _ = part.partition("[")
        path = ROOT / known["path"].format(split=split)
        every = read_rows(path)
        rows.append(_sliced(every, part, text))
    return chain.from_iterable(rows)


def _sliced(rows: Rows, part: str, text: str) -> Rows:
    """The rows that a slice of a split means; all of them where it has none."""
    _, bracket, numbers = part.partition("[")
    if not bracket:
        yield from rows
        return
    every = list(rows)
    try:
        instruction = ReadInstruction.from_spec(f"all[{numbers}")
        (span,) = instruction.to_absolute({"all": len(every)})
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"{text}: no slice such as [:500] or [10%:20%] ({one_line(error)})"
        ) from None
    yield from every[span.from_ : span.to]


# --- the hub ----------------------------------------------------------------------------------

HINT = "check name, split and network, or pass a local file"


def load_hub(
    name: str,
    split: str | None,
    config: str | None = None,
    revision: str | None = None,
    *,
    where: str | None = None,
    hint: str = HINT,
) -> Dataset | DatasetDict:
    """A data set of the hub, or a folder in its layout: one split of it, or for None all of them.

    Args:
        where: what an error begins with, instead of the data set's name.
        hint: what the user may do if it cannot be read.

    Raises:
        UserError: it cannot be read. If a configuration is missing or unknown, this lists those
            that exist.
    """
    try:
        return datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # the hub's errors share no base class, and each is a page long
        reason = one_line(error)
    known = _configurations(name)
    if len(known) > 1 and config not in known:
        suffix = f":{split}" if split else ""
        choices = [f"{name}@{one}{suffix}" for one in known]
        hint = f"name a configuration: {' '.join(choices)}"
    raise UserError(f"{where or name}: {reason} ({hint})")


def _configurations(name: str) -> list[str]:
    """The names of a data set's configurations, or none if they cannot be listed (offline)."""
    try:
        return datasets.get_dataset_config_names(name)
    except Exception:  # as in `load_hub`; loading explains it
        return []


def _hub_rows(spec: Spec) -> Rows:
    """Rows of a hub data set, or of a local folder in a hub data set's layout."""
    config = revision = None
    if len(spec.marks) == 2:
        config, revision = spec.marks
    elif spec.marks:
        (config,) = spec.marks
        known = _configurations(spec.name)
        if known and config not in known and not Path(spec.name).is_dir():
            config, revision = None, config
    rows = load_hub(spec.name, spec.split, config, revision, where=str(spec))
    bar = tqdm(rows, desc=f"reading {spec}", unit="row", delay=2)
    for number, row in enumerate(bar):
        yield f"{spec}, row {number}", row
