"""sources.yaml: taxonomies, data sets by name, and the columns of other data sets."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from common.conversation import check_label


@cache
def sources() -> dict[str, dict]:
    """The content of sources.yaml: `taxonomies`, `sources` and `columns`."""
    return yaml.safe_load(Path(__file__).with_name("sources.yaml").read_text(encoding="utf-8"))


def taxonomy(name: str) -> list[str]:
    """The category names of a taxonomy, in the order that fixes label indices."""
    return list(sources()["taxonomies"][name])


@cache
def known_columns() -> frozenset[str]:
    """Every column of the data sets that `plain_row` knows."""
    known: set[str] = set()
    for columns in sources()["columns"].values():
        known |= {columns["prompt"], *columns["unsafe_if_any"], *columns["beside"]}
    return frozenset(known)


def plain_row(row: Mapping, where: str) -> Mapping[str, Any]:
    """A row of a data set with columns of its own (ToxicChat, OpenAI's moderation set) in the plain
    format.

    The prompt is unsafe if any of the named flags is 1. A flag that is absent or null is unknown;
    so is the label where all of them are. A response is taken along where the row labels it. Rows
    of no known kind come back as they are.
    """
    for columns in sources()["columns"].values():
        known = {columns["prompt"], *columns["unsafe_if_any"], *columns["beside"]}
        named = [name for name in columns["unsafe_if_any"] if name in row]
        if columns["prompt"] in row and named and set(row) <= known:
            return _plain(row, columns, named, where)
    return row


def _plain(
    row: Mapping, columns: Mapping[str, Any], named: list[str], where: str
) -> dict[str, Any]:
    flags = [check_label(row[name], name, where) for name in named]
    known = [flag for flag in flags if flag is not None]
    found = {"prompt": row[columns["prompt"]], "prompt_label": any(known) if known else None}
    if row.get(columns.get("response_unsafe")) is not None:
        found["response"] = row.get(columns["response"])
        found["response_label"] = row[columns["response_unsafe"]]
    if columns.get("id") in row:
        found["id"] = row[columns["id"]]
    return found
