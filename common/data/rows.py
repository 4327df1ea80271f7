"""What a row of a data file says: its columns, its conversation, its labels and its categories, all
checked here.
"""

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.conversation import (
    LABELS,
    Message,
    UserError,
    check_label,
    check_messages,
    check_text,
    pair,
)
from common.data.files import parse_json
from common.data.tables import known_columns, plain_row, taxonomy

EXAMPLE_ROW = '{"prompt": "…", "response": "…", "response_label": "unsafe"}'
LABEL_COLUMNS = {  # ours: as users write it
    "prompt_unsafe": ("prompt_unsafe", "prompt_label"),
    "response_unsafe": ("response_unsafe", "response_label"),
    "response_refusal": ("response_refusal", "refusal_label"),
}
OWN_COLUMNS = {"id", "prompt", "response", "messages", "label", "categories", "category", "is_safe"}
OWN_COLUMNS |= {column for columns in LABEL_COLUMNS.values() for column in columns}


# --- columns ----------------------------------------------------------------------------------------------------------


def plain_columns(row: Mapping, where: str) -> Mapping[str, Any]:
    """A row with the columns of the plain, the messages or the BeaverTails format.

    Raises:
        UserError: a column is there twice, or is missing. That is a fault of the file, and no row
            to be skipped.
    """
    row = plain_row(our_names(row, where), where)
    check_columns(row, where)
    return row


def our_names(row: Mapping, where: str) -> dict[str, Any]:
    """Columns that we know under our names, however a header writes them ("Prompt", " response",
    "Response Label").

    Raises:
        UserError: two columns have the same of these names.
    """
    known = OWN_COLUMNS | known_columns()
    out: dict[str, Any] = {}
    for column, value in row.items():
        name = column
        if column not in known:
            plain = str(column).strip().lower().replace(" ", "_")
            name = plain if plain in known else column
        if name in out:
            raise UserError(
                f"{where}, field {name}: the column is there twice, also as {column!r}; keep one"
            )
        out[name] = value
    return out


def check_columns(row: Mapping, where: str) -> None:
    """Raise UserError where a row lacks a column of its format."""
    if "messages" not in row and "prompt" not in row:
        columns = ", ".join(map(str, row))
        raise UserError(
            f"{where}, field prompt: missing (columns: {columns}); expected a row like {EXAMPLE_ROW}"
        )
    if ("category" in row) != ("is_safe" in row):
        absent = "is_safe" if "category" in row else "category"
        raise UserError(f"{where}, field {absent}: missing; BeaverTails rows have both")
    if "category" in row and "response" not in row:
        raise UserError(
            f"{where}, field response: missing; BeaverTails rows are question+answer pairs"
        )


# --- the conversation and its labels ----------------------------------------------------------------------------------


def conversation_row(
    row: Any, where: str, categories: Sequence[str] | None = None, require: Sequence[str] = ()
) -> dict[str, Any]:
    """One checked row in the columns of `FEATURES`, without `source`.

    Args:
        row: with plain columns (`plain_columns`).
        where: file and place, which an error begins with.
        categories: the names that its categories may have; None allows any.
        require: labels, or "categories", that it must know.

    Raises:
        UserError: it cannot be read, or its labels contradict each other.
    """
    if isinstance(row, UserError):
        raise row
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected an object such as {EXAMPLE_ROW}, found {row!r:.60}")
    messages = _messages(row, where)
    answered = messages[-1]["role"] == "assistant"
    if "category" in row:
        named = _beavertails_categories(row, where)
        labels = dict.fromkeys(LABELS) | {"response_unsafe": bool(named)}
    else:
        named = category_names(row.get("categories"), where)
        labels = _labels(row, answered, where)
    for name in named or ():
        if categories is not None and name not in categories:
            known = " | ".join(categories)
            raise UserError(f"{where}, field categories: unknown category {name!r}; known: {known}")
    if not answered and labels["response_unsafe"] is not None:
        raise UserError(f"{where}, field response: missing, although the row has a response label")
    if (
        answered
        and labels["response_unsafe"] is None
        and named is not None
        and categories is not None
    ):
        labels["response_unsafe"] = bool(named)
    _check_together(labels["response_unsafe" if answered else "prompt_unsafe"], named, where)
    for label in require:
        if (named if label == "categories" else labels[label]) is None:
            raise UserError(f"{where}, field {label}: missing; every row needs it here")
    return {"id": _row_id(row, where), "messages": messages, **labels, "categories": named}


def _messages(row: Mapping, where: str) -> list[Message]:
    if "messages" in row:
        return check_messages(_structure(row["messages"], "messages", where), where)
    response = row.get("response")
    if _is_blank(response) and not _says_of_response(row):
        response = None  # a prompt alone, as the older ExpGuardMix files have it
    prompt = check_text(row["prompt"], "prompt", where)
    return pair(prompt, None if response is None else check_text(response, "response", where))


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _says_of_response(row: Mapping) -> bool:
    """Whether a row labels its response."""
    columns = ("category", *LABEL_COLUMNS["response_unsafe"], *LABEL_COLUMNS["response_refusal"])
    return any(row.get(column) not in (None, "") for column in columns)


def _labels(row: Mapping, answered: bool, where: str) -> dict[str, bool | None]:
    """Labels by our names. A column `label` alone is the prompt's where there is nothing else that
    it could mean.
    """
    labels = {label: _label(row, columns, where) for label, columns in LABEL_COLUMNS.items()}
    told = any(column in row for columns in LABEL_COLUMNS.values() for column in columns)
    if told or row.get("label") in (None, ""):
        return labels
    if answered:
        raise UserError(
            f"{where}, field label: says not whether prompt or response is meant; rename it to "
            "prompt_label or response_label"
        )
    return labels | {"prompt_unsafe": check_label(row["label"], "label", where)}


def _label(row: Mapping, columns: Sequence[str], where: str) -> bool | None:
    """A label that may stand in several columns, of which those that are filled must agree."""
    found = {}
    for column in columns:
        value = check_label(row.get(column), column, where)
        if value is not None:
            found[column] = value
    if len(set(found.values())) > 1:
        one, other = found
        raise UserError(
            f"{where}, field {one}: contradicts {other}, which means the same; keep one"
        )
    return next(iter(found.values()), None)


def _check_together(unsafe: bool | None, named: list[str] | None, where: str) -> None:
    """Label and categories of the turn that is judged must agree: whichever a guard trains on, it
    is the same.
    """
    if named and unsafe is False:
        raise UserError(f"{where}, field categories: {named} on a turn that is labelled safe")
    if named == [] and unsafe is True:
        raise UserError(
            f"{where}, field categories: [] on a turn that is labelled unsafe; name one, or leave "
            "the field empty if they are not known"
        )


def _row_id(row: Mapping, where: str) -> str:
    """A row's own id, else file or data set with its place, but no folder: a data fingerprint is
    the same anywhere.
    """
    return Path(where).name if row.get("id") is None else check_text(str(row["id"]), "id", where)


# --- categories -------------------------------------------------------------------------------------------------------


def category_names(value: Any, where: str) -> list[str] | None:
    """`categories` as a list of names, or None where they are unknown.

    A text is a JSON list, or names with semicolons between them; commas stand in names.

    Raises:
        UserError: it is neither.
    """
    if value is None or value != value or _is_blank(value):
        return None
    if isinstance(value, str) and not value.lstrip().startswith(("[", "{")):
        value = [name.strip() for name in value.split(";") if name.strip()]
    value = _structure(value, "categories", where)
    if not isinstance(value, Sequence):
        raise UserError(f"{where}, field categories: expected a list of names, found {value!r:.60}")
    return [check_text(name, "categories", where) for name in value]


def _beavertails_categories(row: Mapping, where: str) -> list[str]:
    """The names that are true in BeaverTails' `category` struct, checked against its keys and
    against `is_safe`.
    """
    category = _structure(row["category"], "category", where)
    if not isinstance(category, Mapping):
        raise UserError(
            f"{where}, field category: expected an object of 14 booleans, found {category!r:.60}"
        )
    names = taxonomy("beavertails")
    known = " | ".join(names)
    unknown = sorted(set(category) - set(names))
    if unknown:
        raise UserError(f"{where}, field category: unknown category {unknown[0]!r}; known: {known}")
    values = {}
    for name in names:
        if name not in category:
            raise UserError(f"{where}, field category: key {name!r} is missing")
        values[name] = check_label(category[name], f"category[{name}]", where)
        if values[name] is None:
            raise UserError(f"{where}, field category: {name!r} is null; expected true or false")
    named = [name for name in names if values[name]]
    is_safe = check_label(row["is_safe"], "is_safe", where)
    if is_safe is None or is_safe == bool(named):
        raise UserError(
            f"{where}, field is_safe: {row['is_safe']!r} contradicts the categories {named}"
        )
    return named


def _structure(value: Any, name: str, where: str) -> Any:
    """A list or an object; in a CSV cell it is JSON, or what Python writes (pandas does so)."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value, "its text")
    except UserError as error:
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise UserError(f"{where}, field {name}: not JSON: {error}") from None
