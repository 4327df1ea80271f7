"""What the outputs of a guard mean: its categories, settled from flags and training rows, and the
targets and the loss that leave out what a row does not say.

The outputs are independent of each other, and the highest decides whether a text is flagged. A row
that is safe has none of the categories. A row that is unsafe and does not say of which category is
unknown in all of them; so that it still teaches something there is an output `unsafe` then, which
every row knows. Where no row names a category, it is the only output.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers.hf_argparser import HfArg

from common.conversation import (
    LABEL_OF,
    LABELS,
    UserError,
    check_label,
    check_option,
    check_text,
    parts_of,
)
from common.data.files import read_yaml
from common.data.tables import taxonomy

logger = logging.getLogger(__name__)
UNSAFE = "unsafe"  # the output that says nothing of categories
UNKNOWN = -100.0  # the target that nobody knows; transformers' Trainer does not count it
FROM_DATA = "from-data"
# Names that mean something else in a verdict or in guard.json.
TAKEN = (UNSAFE, "flagged", *LABELS)

Named = Sequence[Sequence[str] | None]  # the categories of each row; None: unknown


@dataclass(kw_only=True)
class LabelArguments:
    """What a guard judges and which categories it knows, as flags of a command."""

    categories: list[str] | None = HfArg(
        default=None,
        help="Names, or one YAML file (name: description), or from-data; default: "
        "BeaverTails' 14 where the rows name no others, else from-data.",
    )
    judge: str = HfArg(
        default="pair", help="What is judged: pair (question and answer) | prompt | response."
    )

    def check_labels(self) -> None:
        """Raise UserError where the flags mean nothing."""
        check_option("--judge", self.judge, LABEL_OF)
        asked_categories(self.categories)


# --- which outputs there are ----------------------------------------------------------------------


def asked_categories(given: str | Sequence[str] | None) -> dict[str, str] | None:
    """The categories that `--categories` names, with their descriptions ("" without one); None
    where the rows shall name them.

    Raises:
        UserError: a name cannot be a category, or is there twice; the file is no list of names.
    """
    if isinstance(given, str):  # as a config file may have it
        given = [given]
    if given is None or list(given) == [FROM_DATA]:
        return None
    where = "--categories"
    described = dict.fromkeys(given, "")
    if len(described) < len(given):
        raise UserError(f"{where}: a name is there twice: {' '.join(given)}")
    if len(given) == 1 and Path(given[0]).suffix in (".yaml", ".yml"):
        where = given[0]
        described = _described(where)
    if not described:
        raise UserError(f"{where}: no names; expected names, a YAML file or {FROM_DATA}")
    for name in described:
        _check_category(name, where)
    return described


def _described(path: str) -> dict[str, str]:
    """The categories of a YAML file: names with descriptions, or a list of names."""
    content = read_yaml(path)
    if isinstance(content, list):
        content = dict.fromkeys(content)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: expected lines such as `fraud: deceives to get money`")
    found = {}
    for name, description in content.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: {name!r} is no text; put the name in quotes")
        if description is None:
            description = ""
        found[name] = check_text(description, name, path, allow_empty=True).strip()
    return found


def _check_category(name: str, where: str) -> None:
    """Refuse a name that means that a text is safe, or that nothing is known, or that is taken."""
    meaning = True
    with suppress(UserError):  # as it should be: it is no word for a label
        meaning = check_label(name, "name", where)
    if meaning is not True or name.lower() in TAKEN:
        raise UserError(
            f"{where}: {name!r} cannot be a category, it has another meaning; rename it"
        )


def settle_labels(
    categories: Sequence[str] | None, unsafe: Sequence[bool], named: Named
) -> dict[str, str]:
    """What the outputs of a guard mean, in their order, with descriptions ("" without one).

    A category that no training row has gets no output: it would say anything of any text.

    Args:
        categories: what `--categories` was given.
        unsafe: of each training row whether it is unsafe; one at least must be.
        named: the categories of each of these rows.

    Raises:
        UserError: a name cannot be a category.
    """
    rows_of = Counter()
    for is_unsafe, names in zip(unsafe, named, strict=True):
        if is_unsafe:
            rows_of.update(names or ())
    described = asked_categories(categories)
    if described is None:
        described = dict.fromkeys(_ordered(rows_of), "")
    for name in rows_of:
        _check_category(name, "the categories of the training rows")
        _warn_of_commas(name, rows_of.keys() | described.keys())
    labels = {}
    for name, description in described.items():
        if rows_of[name]:
            labels[name] = description
    without = [name for name in described if name not in labels]
    if without:
        logger.warning("No training row, and so no output, for: %s", ", ".join(without))
    unnamed = 0
    for is_unsafe, names in zip(unsafe, named, strict=True):
        unnamed += is_unsafe and labels.keys().isdisjoint(names or ())
    if not unnamed:
        return labels
    said = "%d unsafe rows name no category: the output %r learns from them"
    logger.info(said, unnamed, UNSAFE)
    return {UNSAFE: "", **labels}


def _warn_of_commas(name: str, known: Set[str]) -> None:
    """Names with commas between them are one name, which is seldom meant."""
    parts = {part.strip() for part in name.split(",")}
    if len(parts) > 1 and parts & known:
        logger.warning("%r is one category; several have semicolons between them.", name)


def _ordered(found: Mapping[str, int]) -> list[str]:
    """The categories in an order that rows do not change: BeaverTails' own where there are no
    others, else by name.
    """
    known = taxonomy("beavertails")
    if found and set(found) <= set(known):
        return known
    return sorted(found)


# --- what the rows say ----------------------------------------------------------------------------


def judged_rows(rows: Dataset, judge: str) -> Dataset:
    """The rows as a guard sees them that judges pairs, prompts alone or responses alone.

    Of an answered prompt the categories are unknown: they speak of the answer. A row without that
    part is left out.

    Args:
        rows: of `load_conversations`.
    """
    if judge == "pair":
        return rows

    def has_part(row: Mapping) -> bool:
        return judge in parts_of(row["messages"])

    fitting = rows.filter(has_part, keep_in_memory=True)
    if len(fitting) < len(rows):
        logger.warning("%d of %d rows have no %s.", len(rows) - len(fitting), len(rows), judge)

    def part(row: Mapping) -> dict:
        parts = parts_of(row["messages"])
        categories = row["categories"]
        if judge == "prompt" and "response" in parts:
            categories = None
        return {"messages": parts[judge], "categories": categories}

    return fitting.map(part, features=rows.features, keep_in_memory=True)


def targets(labels: Sequence[str], unsafe: Sequence[bool], named: Named) -> list[list[float]]:
    """What each output should be for each row, of shape [rows, labels]: 1, 0, or UNKNOWN.

    Args:
        labels: of `settle_labels`.
        unsafe: of each row whether it is unsafe.
        named: the categories of each row.
    """
    wanted = []
    for is_unsafe, names in zip(unsafe, named, strict=True):
        known = set(labels).intersection(names or ())
        row = []
        for label in labels:
            value = float(label in known)
            if label == UNSAFE:
                value = float(is_unsafe)
            elif not is_unsafe:
                value = 0.0
            elif not known:
                value = UNKNOWN
            row.append(value)
        wanted.append(row)
    return wanted


def flagged(wanted):
    """Which rows are unsafe, by their `targets` as an array or a tensor [rows, labels]: those of a
    safe row are all known, and 0.
    """
    return (wanted != 0).any(-1)


# --- the loss -------------------------------------------------------------------------------------


def masked_bce(
    logits: torch.Tensor, wanted: torch.Tensor, positive_weight: torch.Tensor
) -> torch.Tensor:
    """Sum of the binary cross-entropy over what is known; the rest has no gradient.

    Args:
        logits, wanted: [rows, labels]; a target below 0, or NaN, is unknown.
        positive_weight: [labels].
    """
    known = wanted >= 0
    return binary_cross_entropy_with_logits(
        logits,
        wanted.where(known, 0.0),
        weight=known.to(logits.dtype),
        pos_weight=positive_weight,
        reduction="sum",
    )
