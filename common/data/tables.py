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


def plain_row(row: Mapping, where: str) -> Mapping[str, Any]:
    """A row of a data set with columns of its own (ToxicChat, OpenAI's moderation set) in the plain format.

    The prompt is unsafe if any of the named flags is 1. A flag that is absent or null is unknown; so is the label where
    all of them are. A response is taken along where the row labels it. Rows of no known kind come back as they are.
    """
    for columns in sources()["columns"].values():
        known = {columns["prompt"], *columns["unsafe_if_any"], *columns["beside"]}
        named = [name for name in columns["unsafe_if_any"] if name in row]
        if columns["prompt"] in row and named and set(row) <= known:
            flags = [check_label(_number(row[name]), name, where) for name in named]
            label = True if True in flags else False if False in flags else None
            found = {"prompt": row[columns["prompt"]], "prompt_label": label}
            if row.get(columns.get("response_unsafe")) is not None:
                found |= {"response": row.get(columns["response"]), "response_label": row[columns["response_unsafe"]]}
            return found | ({"id": row[columns["id"]]} if columns.get("id") in row else {})
    return row


def _number(flag: Any) -> Any:
    """A cell such as "1.0", which spreadsheets write for 1, as a number."""
    return float(flag) if isinstance(flag, str) and flag.strip() in ("0.0", "1.0") else flag
