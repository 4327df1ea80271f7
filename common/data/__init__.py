"""`load_conversations(spec)`: any data set as rows of messages and labels (see
`common.conversation.FEATURES`).

A spec is a name from sources.yaml, a hub id or a local file:

    PKU-Alignment/BeaverTails:330k_train            hub id, split required
    lmsys/toxic-chat@toxicchat0124:train[:500]      `@configuration` and a slice; an `@revision`
                                                    likewise, or both:
    user/name@configuration@revision:train
    beavertails-sample:test                         bundled sample
    rows.jsonl | .ndjson | .json | .csv | .tsv | .parquet, each with a slice: rows.csv[:500]

A row has one of three formats, told by its columns, however they are capitalised:

    BeaverTails   {"prompt", "response", "category": {name: bool, …}, "is_safe": bool}
    plain         {"prompt", "response"?, "prompt_label"?, "response_label"?, "refusal_label"?,
                  "categories"?, "language"?, "id"?}
    messages      {"messages": [{"role", "content"}, …], and the same labels}

and the columns of ToxicChat and of OpenAI's moderation set are known (`columns` in sources.yaml).
`{"prompt", "label"}` labels the prompt. Categories are a list of names, in CSV as JSON or as
"a; b"; the column may be called `category`. Where the cell is empty they are unknown, which is not
the same as none.

Labels are read by key, never by position, and alike from every type of file. Every row is checked
once, here; what is wrong is said in one line that names the file, the row and the field.

files.py opens files, specs.py says which data a spec means, rows.py reads a row, repeats.py finds
repeats and leaks.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, Value

from common.conversation import FEATURES, UNSAFE_LABELS, UserError, check_option
from common.data.files import FILE_TYPES, read_json, read_rows
from common.data.repeats import (
    deduplicate,
    grouped_split,
    judged_text,
    near_copies,
    near_copies_between,
    overlap,
    prompt_key,
)
from common.data.rows import (
    EXAMPLE_ROW,
    claimed_classes,
    classes_of,
    conversation_row,
    id_text,
    plain_columns,
)
from common.data.specs import parse_spec, spec_rows
from common.data.tables import taxonomy

__all__ = [
    "EXAMPLE_ROW",
    "FILE_TYPES",
    "conversation_row",
    "deduplicate",
    "grouped_split",
    "id_text",
    "judged_text",
    "load_conversations",
    "near_copies",
    "near_copies_between",
    "overlap",
    "parse_spec",
    "plain_columns",
    "prompt_key",
    "read_json",
    "read_rows",
    "spec_rows",
    "spread",
    "taxonomy",
]

logger = logging.getLogger(__name__)


def load_conversations(
    spec: str,
    *,
    categories: Sequence[str] | None = None,
    require: Sequence[str] = (),
    need_positive: bool = True,
    bad_rows: str = "error",
    max_rows: int | None = None,
    beside: Sequence[str] = (),
) -> Dataset:
    """Load and check a data set.

    Args:
        spec: see the module's docstring.
        categories: the names that a row's categories may have; None allows any (BeaverTails rows
            are always checked against their fourteen).
        require: labels (of `LABELS`, or "categories") that every row must know.
        need_positive: whether each of these needs a positive row. Without one nothing can be
            learned, but false positives on benign traffic can be measured.
        bad_rows: "error" stops at the first, "skip" leaves bad rows out (never all of a class).
        max_rows: read only the first so many good rows.
        beside: more columns of texts, kept as they are (null where a row has none).

    Returns:
        A Dataset with the columns of `FEATURES` and of `beside`.

    Raises:
        UserError: bad spec, file, row or label, in one line.
    """
    _check_options(spec, bad_rows, max_rows)
    name, rows = spec_rows(spec)
    good: list[dict[str, Any]] = []
    bad: list[UserError] = []
    lost: set[tuple[str, Any]] = set()
    for where, row in rows:
        texts: dict[str, str | None] = {}
        if isinstance(row, Mapping):
            texts = _texts_of(row, beside)
            row = plain_columns(row, where)
        try:
            checked = conversation_row(row, where, categories, require)
        except UserError as error:
            if bad_rows == "error":
                raise
            bad.append(error)
            lost |= claimed_classes(row, where)
            continue
        good.append(checked | {"source": name} | texts)
        if len(good) == max_rows:
            break
    if bad:
        _say_left_out(spec, bad, len(good))
        lost = lost.difference(*map(classes_of, good))
        _refuse_lost(lost, require, f"{spec}: bad_rows skip", bad[0])
    if not good:
        raise UserError(f"{spec}: no rows; expected lines such as {EXAMPLE_ROW}")
    if need_positive:
        _check_positive(good, require, spec)
    features = FEATURES | dict.fromkeys(beside, Value("string"))
    return Dataset.from_list(good, features=Features(features))


def _say_left_out(spec: str, bad: Sequence[UserError], good: int) -> None:
    said = "%s: left out %d bad rows of %d; the first: %s"
    logger.warning(said, spec, len(bad), len(bad) + good, bad[0])


def _texts_of(row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, str | None]:
    """The texts of these columns; null where a row has none there."""
    texts = {}
    for column in columns:
        value = row.get(column)
        texts[column] = value if isinstance(value, str) else None
    return texts


def spread(rows: Sequence[Any], count: int) -> list[Any]:
    """So many rows, evenly spaced over all, which may be sorted; all where there are fewer."""
    if count < 1:
        raise UserError(f"max_rows {count}: must be at least 1")
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def _check_options(spec: str, bad_rows: str, max_rows: int | None) -> None:
    check_option(f"{spec}: bad_rows", bad_rows, ("error", "skip"))
    if max_rows is not None and max_rows < 1:
        raise UserError(f"{spec}: max_rows {max_rows}: must be at least 1")


def _check_positive(rows: Sequence[Mapping], require: Sequence[str], spec: str) -> None:
    for label in require:
        if not any(row[label] for row in rows):
            raise UserError(
                f"{spec}, field {label}: no positive row among {len(rows)}; "
                "nothing to learn or measure"
            )


def _refuse_lost(
    lost: set[tuple[str, Any]], require: Sequence[str], place: str, first: UserError
) -> None:
    """Refuse to leave out every row of a class, of which a guard would learn, and nobody measure,
    nothing.

    Args:
        lost: classes of the rows that were left out, which no other row has.
        require: the labels that are asked for; without one among them both of unsafe count.
    """
    asked = [label for label in UNSAFE_LABELS if label in require] or UNSAFE_LABELS
    for label, value in sorted(lost, key=str):
        if label == "category":
            what = f"of category {value!r}"
        elif label in asked:
            what = f"that is {'unsafe' if value else 'safe'} ({label})"
        else:
            continue
        raise UserError(f"{place} would leave out every row {what}; mend them: {first}")
