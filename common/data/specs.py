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
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, ReadInstruction
from tqdm.auto import tqdm

from common.conversation import UserError
from common.data.files import FILE_TYPES, Rows, read_rows
from common.data.tables import sources

ROOT = Path(__file__).resolve().parents[2]
PART = r"[\w.\-]+(?:\[[^\[\]]*\])?"  # a split, or a slice of it
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
        return [re.sub(r"\[.*", "", part) for part in self.split.split("+") if part]

    def __str__(self) -> str:
        separator = "" if self.is_file or not self.split else ":"
        return "@".join([self.name, *self.marks]) + separator + self.split


def parse_spec(text: str) -> Spec:
    """Take a spec apart; whether its data is there is seen when it is read.

    Raises:
        UserError: nothing before the split, or more than two `@`.
    """
    text = os.path.expanduser(text)
    whole, bracket = re.fullmatch(r"(.*?)(\[[^\[\]]*\])?", text, re.DOTALL).groups()
    for path, part in ((text, ""), (whole, bracket or "")):
        if Path(path).is_file() or Path(path).suffix.lower() in FILE_TYPES:
            return Spec(path, split=part, is_file=True)
    found = SPEC.fullmatch(text)
    if found is None:
        raise UserError(
            f"{text!r}: no data set; expected a file, or a name with its split (user/name:train)"
        )
    name, marks = _marks(found["name"])
    split = found["split"] or ""
    if len(marks) > 2 or not all([name, *marks]):
        raise UserError(
            f"{text}: expected user/name, @configuration or @revision or both, and :split"
        )
    return Spec(name, tuple(marks), split)


def about_data(text: str) -> dict[str, str]:
    """What is known of the data that a spec means, without reading it.

    Args:
        text: a spec, or "0.1 of" a spec.

    Returns:
        `name`, without folders of the user's, and where they are known `hub` (its id), `licence`
        and `language`.
    """
    share = re.fullmatch(r"([\d.]+) of (.+)", text)
    if share:
        known = about_data(share[2])
        return known | {"name": f"{share[1]} of {known['name']}"}
    try:
        spec = parse_spec(text)
    except UserError:
        return {"name": text}
    if spec.is_file or Path(spec.name).exists():
        here = Spec(Path(spec.name).name, spec.marks, spec.split, spec.is_file)
        return {"name": str(here)}
    known = sources()["sources"].get(spec.name, {"hub": spec.name})
    facts = {key: known[key] for key in ("hub", "licence", "language") if key in known}
    return {"name": str(spec), **facts}


def _marks(text: str) -> tuple[str, list[str]]:
    """The name before the first `@`, and what stands behind each; a folder may have `@` in its own
    path.
    """
    parts = text.split("@")
    for count in range(len(parts), 1, -1):
        folder = "@".join(parts[:count])
        if Path(folder).is_dir():
            return folder, parts[count:]
    return parts[0], parts[1:]


def spec_rows(text: str) -> tuple[str, Rows]:
    """The name of a data set, and its rows as they stand, each with a text that says where it
    stands.

    A row that cannot be read is a `UserError` in its place.

    Raises:
        UserError: no such data set, configuration or split. Files and the hub raise theirs when the
            rows are read.
    """
    spec = parse_spec(text)
    if spec.is_file:
        path = Path(spec.name)
        return path.name, _sliced(_conversation_file(path), spec, "file")
    known = sources()["sources"].get(spec.name)
    if known is not None:
        return spec.name, _known_rows(spec, known, text)
    if not spec.split:
        names = ", ".join(sources()["sources"])
        raise UserError(
            f"{text}: no such file, and a hub id or a folder needs a split (user/name:split); known names: {names}"
        )
    return "@".join([spec.name, *spec.marks]), hub_rows(spec)


def _conversation_file(path: Path) -> Rows:
    if path.suffix.lower() not in FILE_TYPES:
        raise UserError(f"{path}: unknown file type; expected {', '.join(FILE_TYPES)}")
    return read_rows(path)


def _known_rows(spec: Spec, known: Mapping[str, Any], text: str) -> Rows:
    """Rows of a name of sources.yaml; that a split does not exist is told without the network."""
    for split in spec.splits or [""]:
        if split not in known["splits"]:
            there = ", ".join(f"{spec.name}:{name}" for name in known["splits"])
            raise UserError(f"{text}: {spec.name} has no split {split!r}; it has {there}")
    if "path" not in known:
        return hub_rows(Spec(known["hub"], spec.marks, spec.split))
    if spec.marks:
        raise UserError(
            f"{text}: {spec.name} lies in this repository and has no configuration or revision"
        )
    parts = []
    for part, split in zip(spec.split.split("+"), spec.splits, strict=True):
        rows = read_rows(ROOT / known["path"].format(split=split))
        parts.append(_sliced(rows, Spec(spec.name, split=part), split))
    return chain.from_iterable(parts)


def _sliced(rows: Rows, spec: Spec, split: str) -> Rows:
    """The rows that a slice of one split means; all of them where it has none."""
    if "[" not in spec.split:
        yield from rows
        return
    instruction = spec.split if spec.split.startswith(split) else split + spec.split
    every = list(rows)
    try:
        (span,) = ReadInstruction.from_spec(instruction).to_absolute({split: len(every)})
    except (ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{spec}: no slice such as [:500] or [10%:20%] ({reason:.120})") from None
    yield from every[span.from_ : span.to]


# --- the hub ----------------------------------------------------------------------------------------------------------

HINT = "check name, split and network, or pass a local file"


def hub_rows(spec: Spec) -> Rows:
    """Rows of a hub data set, or of a local folder in a hub data set's layout.

    Raises:
        UserError: see `load_hub`.
    """
    rows = _load_spec(spec)
    hidden = len(rows) < 10_000
    for number, row in enumerate(tqdm(rows, desc=f"reading {spec}", unit="row", disable=hidden)):
        yield f"{spec}, row {number}", row


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
        where: what an error begins with, instead of the data set's name and split.
        hint: what the user may do where it cannot be read.

    Raises:
        UserError: it cannot be read. Where a configuration is missing or unknown, this lists those
            that there are.
    """
    where = where or (f"{name}:{split}" if split else name)
    try:
        return datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # the hub's errors share no base class, and each is a page long
        known = configurations(name, revision)
        if len(known) > 1 and config not in known:
            what = (
                "has several configurations"
                if config is None
                else f"has no configuration {config!r}"
            )
            choices = " ".join(f"{name}@{one}:{split or ''}".rstrip(":") for one in known)
            raise UserError(f"{where}: {name} {what}; name one: {choices}") from None
        if "gated" in str(error).lower() and hint == HINT:
            hint = f"visit its page on the hub, accept the terms, then run `hf auth login`: {name}"
        raise UserError(f"{where}: {first_line(error)} ({hint})") from None


def configurations(name: str, revision: str | None = None) -> list[str]:
    """The names of a data set's configurations; none where they cannot be had, which loading it
    will explain.
    """
    try:
        return datasets.get_dataset_config_names(name, revision=revision)
    except Exception:  # see `load_hub`
        return []


def _load_spec(spec: Spec) -> Dataset:
    """One mark is a configuration if there is one of its name, else a revision; a folder has no
    revisions.
    """
    where = str(spec)
    if not spec.marks:
        return load_hub(spec.name, spec.split, where=where)
    config, *revision = spec.marks
    if revision:
        return load_hub(spec.name, spec.split, config, *revision, where=where)
    if Path(spec.name).is_dir() or config in configurations(spec.name):
        return load_hub(spec.name, spec.split, config, where=where)
    try:
        return load_hub(spec.name, spec.split, revision=config, where=where)
    except UserError as error:
        try:  # offline, a configuration that was loaded before is there, but no list of them
            return load_hub(spec.name, spec.split, config, where=where)
        except UserError:
            raise error from None


def first_line(error: Exception) -> str:
    """What an error of a library says, in one line."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
