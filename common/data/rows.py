"""What a row of a data file says: its columns, its conversation, its labels and its categories, all
checked here.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from common.conversation import (
    LABELS,
    UNSAFE_LABELS,
    Message,
    UserError,
    check_label,
    check_messages,
    check_text,
    judged_label,
    pair,
)
from common.data.files import parse_json
from common.data.tables import columns_of, plain_row, sources, taxonomy

EXAMPLE_ROW = '{"prompt": "…", "response": "…", "response_label": "unsafe"}'
LABEL_COLUMNS = {  # our name: what users write
    "prompt_unsafe": "prompt_label",
    "response_unsafe": "response_label",
    "response_refusal": "refusal_label",
}
LABEL_NAMES = {*LABEL_COLUMNS, *LABEL_COLUMNS.values()}
OWN_COLUMNS = {"id", "prompt", "response", "messages", "label", "language"}
OWN_COLUMNS |= {"categories", "category", "is_safe"}


# --- columns ----------------------------------------------------------------------------------


def plain_columns(row: Mapping, where: str) -> Mapping[str, Any]:
    """A row with the columns of the plain, the messages or the BeaverTails format.

    Raises:
        UserError: a column is there twice, or is missing. That is a fault of the file, and no row
            to be skipped.
    """
    row = plain_row(our_names(row, where), where)
    if "messages" not in row and "prompt" not in row:
        columns = ", ".join(row)
        raise UserError(
            f"{where}, field prompt: missing (columns: {columns}); "
            f"expected a row like {EXAMPLE_ROW}"
        )
    if "category" in row and "categories" in row:
        raise UserError(f"{where}, field categories: a column category is there, too; keep one")
    if "category" in row and "is_safe" not in row and _is_names(row["category"]):
        row = {("categories" if name == "category" else name): row[name] for name in row}
    if "category" in row or "is_safe" in row:
        for column in ("category", "is_safe", "response"):
            if column not in row:
                raise UserError(f"{where}, field {column}: missing; BeaverTails rows have it")
    return row


def _is_names(value: Any) -> bool:
    """Whether a cell `category` holds names, and not BeaverTails' object of booleans."""
    return not isinstance(value, Mapping) and not str(value).lstrip().startswith("{")


def our_names(row: Mapping, where: str) -> dict[str, Any]:
    """Columns that we know under our names, however a header writes them ("Prompt", " response",
    "Response Label").

    Raises:
        UserError: two columns have the same of these names.
    """
    known = _known_columns()
    out: dict[str, Any] = {}
    for column, value in row.items():
        name = column.strip().lower().replace(" ", "_")
        if name not in known:
            name = column
        if name in out:
            raise UserError(
                f"{where}, field {name}: the column is there twice, also as {column!r}; keep one"
            )
        out[name] = value
    return out


@cache
def _known_columns() -> set[str]:
    known = OWN_COLUMNS | LABEL_NAMES
    for data_set in sources()["columns"].values():
        known |= columns_of(data_set)
    return known


# --- the conversation and its labels ----------------------------------------------------------


def conversation_row(
    row: Any,
    where: str,
    categories: Sequence[str] | None = None,
    require: Sequence[str] = (),
) -> dict[str, Any]:
    """One checked row in the columns of `FEATURES`, without `source`.

    Args:
        row: with plain columns (`plain_columns`).
        where: file and place, which an error begins with.
        categories: the names that its categories may have; None allows any.
        require: labels, or "categories", that it must know. Categories tell the label of the turn
            that they speak of, where that is required or their names are given.

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
        labels = dict.fromkeys(LABELS)
        labels["response_unsafe"] = bool(named)
    else:
        named = _category_names(row.get("categories"), where)
        labels = _labels(row, answered, where)
    judged = judged_label(messages)
    if categories is not None and named is not None:
        _check_known(named, categories, f"{where}, field categories")
    told_by_them = categories is not None or judged in require
    if told_by_them and named is not None and labels[judged] is None:
        labels[judged] = bool(named)
    about_response = (labels["response_unsafe"], labels["response_refusal"])
    if not answered and about_response != (None, None):
        raise UserError(
            f"{where}, field response: missing or empty text, although the row labels a response"
        )
    unsafe = labels[judged]
    if None not in (unsafe, named) and unsafe != bool(named):
        turn = "unsafe" if unsafe else "safe"
        raise UserError(f"{where}, field categories: {named} on a turn that is labelled {turn}")
    id = row.get("id")
    if id is None:
        id = Path(where).name  # without its folder: a data fingerprint is the same anywhere
    found = {"id": check_text(id_text(id), "id", where), "messages": messages}
    found.update(labels, categories=named, language=_language(row, where))
    for name in require:
        if found[name] is None:
            raise UserError(f"{where}, field {name}: missing; every row needs it here")
    return found


def id_text(value: Any) -> str:
    """The id of a row as text. Numbers are decimal in a column with a gap: 1.0 is 1."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)


def _messages(row: Mapping, where: str) -> list[Message]:
    if "messages" in row:
        return check_messages(_structure(row["messages"], "messages", where), where)
    prompt = check_text(row["prompt"], "prompt", where)
    response = row.get("response")
    if _is_blank(response):  # older ExpGuardMix files write an empty response to a prompt alone
        return pair(prompt)
    return pair(prompt, check_text(response, "response", where))


def _language(row: Mapping, where: str) -> str | None:
    language = row.get("language")
    if _is_unknown(language):
        return None
    return check_text(language, "language", where).strip()


def _is_blank(value: Any) -> bool:
    return value is None or not str(value).strip()


def _is_unknown(value: Any) -> bool:
    """Whether a cell says nothing, as pandas writes it, too: NaN. A response may be that word."""
    return _is_blank(value) or str(value).strip().lower() == "nan"


def _labels(row: Mapping, answered: bool, where: str) -> dict[str, bool | None]:
    """Labels by our names. A column `label` alone is the prompt's if nothing was answered."""
    labels = {}
    for ours, theirs in LABEL_COLUMNS.items():
        said = {check_label(row.get(name), name, where) for name in (ours, theirs)}
        said.discard(None)
        if len(said) > 1:
            raise UserError(
                f"{where}, field {ours}: contradicts {theirs}, which means the same; keep one"
            )
        labels[ours] = said.pop() if said else None
    if row.get("label") is None or not row.keys().isdisjoint(LABEL_NAMES):
        return labels
    if answered:
        raise UserError(
            f"{where}, field label: does not say whether it labels the prompt or the response; "
            "rename the column to prompt_label or response_label"
        )
    labels["prompt_unsafe"] = check_label(row["label"], "label", where)
    return labels


# --- categories -------------------------------------------------------------------------------


def _category_names(value: Any, where: str) -> list[str] | None:
    """`categories` as a list of names, or None if they are unknown.

    A text is a JSON list, or names with semicolons between them; commas are part of names.
    """
    if _is_unknown(value):
        return None
    if isinstance(value, str) and not value.lstrip().startswith(("[", "{")):
        value = [name for name in value.split(";") if name.strip()]
    names = _structure(value, "categories", where)
    if not isinstance(names, list):
        raise UserError(f"{where}, field categories: expected a list of names, found {names!r:.60}")
    return [check_text(name, "categories", where).strip() for name in names]


def _beavertails_categories(row: Mapping, where: str) -> list[str]:
    """The names that are true in BeaverTails' `category` struct, checked against its keys and
    against `is_safe`.
    """
    place = f"{where}, field category"
    category = _structure(row["category"], "category", where)
    if not isinstance(category, Mapping):
        raise UserError(f"{place}: expected an object of 14 booleans, found {category!r:.60}")
    names = taxonomy("beavertails")
    _check_known(category, names, place)
    named = []
    for name in names:
        holds = check_label(category.get(name), f"category[{name}]", where)
        if holds is None:
            raise UserError(f"{place}: {name!r} is missing or null; expected true or false")
        if holds:
            named.append(name)
    is_safe = row["is_safe"]
    if check_label(is_safe, "is_safe", where) != (not named):
        raise UserError(f"{where}, field is_safe: {is_safe!r} contradicts the categories {named}")
    return named


def _check_known(names: Iterable[str], known: Sequence[str], place: str) -> None:
    for name in names:
        if name not in known:
            choices = " | ".join(known)
            raise UserError(f"{place}: unknown category {name!r}; known: {choices}")


def _structure(value: Any, name: str, where: str) -> Any:
    """A list or an object, which is JSON in a CSV cell."""
    if isinstance(value, str):
        return parse_json(value, f"{where}, field {name}")
    return value


# --- what is lost with a row that is left out -------------------------------------------------


def classes_of(row: Mapping) -> set[tuple[str, Any]]:
    """What a row of `conversation_row` is: (label, true or false), and ("category", name)."""
    classes = {("category", name) for name in row["categories"] or ()}
    for label in UNSAFE_LABELS:
        if row[label] is not None:
            classes.add((label, row[label]))
    return classes


def claimed_classes(row: Any, where: str) -> set[tuple[str, Any]]:
    """What a row says it is although it cannot be used, as `classes_of`, as far as it can be read.

    Args:
        row: with plain columns (`plain_columns`).
    """
    if not isinstance(row, Mapping):
        return set()
    claims = dict.fromkeys(LABELS) | {"categories": None}
    answered = "messages" in row or not _is_blank(row.get("response"))
    with suppress(UserError):
        claims |= _labels(row, answered, where)
    with suppress(UserError):
        claims["categories"] = _category_names(row.get("categories"), where)
    if "category" in row:
        claims |= _beavertails_claims(row, where)
    return classes_of(claims)


def _beavertails_claims(row: Mapping, where: str) -> dict[str, Any]:
    claims = {}
    with suppress(UserError):
        is_safe = check_label(row["is_safe"], "is_safe", where)
        claims["response_unsafe"] = None if is_safe is None else not is_safe
    with suppress(UserError):
        category = _structure(row["category"], "category", where)
        if isinstance(category, Mapping):
            claims["categories"] = [name for name in category if category[name] is True]
    return claims
