"""sources.yaml: taxonomies, data sets by name, and the columns of other data sets."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from common.conversation import check_label
from common.data.files import read_yaml


@cache
def sources() -> dict[str, dict]:
    """The content of sources.yaml: `taxonomies`, `sources` and `columns`."""
    return read_yaml(Path(__file__).with_name("sources.yaml"))


def taxonomy(name: str) -> list[str]:
    """The category names of a taxonomy, in the order that fixes label indices."""
    return list(sources()["taxonomies"][name])


def columns_of(data_set: Mapping) -> set[str]:
    """Every column of a data set of `columns` in sources.yaml."""
    return {
        *data_set["names"].values(),
        *data_set["unsafe_if_any"],
        *data_set["not_read"],
    }


def plain_row(row: Mapping, where: str) -> Mapping[str, Any]:
    """A row of a data set with columns of its own (ToxicChat, OpenAI's moderation set) in the plain
    format. Other rows come back unchanged.

    The prompt is unsafe if any of the named flags is 1. A flag that is absent or null is unknown;
    so is the label if all of them are. A response is kept only if the row labels it.
    """
    for data_set in sources()["columns"].values():
        names = data_set["names"]
        flags = row.keys() & set(data_set["unsafe_if_any"])
        if flags and names["prompt"] in row and row.keys() <= columns_of(data_set):
            break
    else:
        return row
    plain = {}
    for name, theirs in names.items():
        plain[name] = row.get(theirs)
    if plain.get("response_label") is None:
        plain["response"] = None
    labels = {check_label(row[flag], flag, where) for flag in flags}
    labels.discard(None)
    plain["prompt_label"] = None
    if labels:
        plain["prompt_label"] = any(labels)
    return plain
