"""`load_conversations(spec)`: any data set as rows of messages and labels (see `common.conversation.FEATURES`).

A spec is a name from sources.yaml, a hub id or a local file:

    PKU-Alignment/BeaverTails:330k_train      hub id, `@revision` optional, split required
    beavertails-sample:test                   bundled sample
    rows.jsonl | rows.json | rows.csv | rows.parquet

A row has one of three formats, told by its columns:

    BeaverTails   {"prompt", "response", "category": {name: bool, …}, "is_safe": bool}
    plain         {"prompt", "response"?, "prompt_label"?, "response_label"?, "refusal_label"?, "categories"?, "id"?}
    messages      {"messages": [{"role", "content"}, …], and the same labels}

and the columns of ToxicChat and of OpenAI's moderation set are known (`columns` in sources.yaml).

Labels are read by key, never by position. Every row is checked once, here; what is wrong is said in one line that names
the file, the row and the field.
"""

import csv
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from sklearn.model_selection import GroupShuffleSplit
from tqdm.auto import tqdm

from common.conversation import FEATURES, LABELS, UserError, check_label, check_messages, check_text, last_turns, pair
from common.data.tables import plain_row, sources, taxonomy

logger = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]
FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")
EXAMPLE_ROW = '{"prompt": "…", "response": "…", "response_label": "unsafe"}'
LABEL_COLUMNS = {  # ours: as users write it
    "prompt_unsafe": ("prompt_unsafe", "prompt_label"),
    "response_unsafe": ("response_unsafe", "response_label"),
    "response_refusal": ("response_refusal", "refusal_label"),
}


def load_conversations(
    spec: str,
    *,
    categories: Sequence[str] | None = None,
    require: Sequence[str] = (),
    bad_rows: str = "error",
    max_rows: int | None = None,
) -> Dataset:
    """Load and check a data set.

    Args:
        spec: see the module's docstring.
        categories: the names that a row's categories may have; None allows any (BeaverTails rows are always checked
            against their own fourteen).
        require: labels (of `LABELS`, or "categories") that every row must know, and of which at least one row must be
            positive.
        bad_rows: "error" stops at the first bad row, "skip" counts and leaves out bad rows (never a missing column).
        max_rows: read only the first so many good rows.

    Returns:
        A Dataset with the columns of `FEATURES`.

    Raises:
        UserError: bad spec, file, row or label, in one line.
    """
    if bad_rows not in ("error", "skip"):
        raise UserError(f"{spec}: bad_rows {bad_rows}: must be error or skip")
    if max_rows is not None and max_rows < 1:
        raise UserError(f"{spec}: max_rows {max_rows}: must be at least 1")
    name, rows = _raw_rows(spec)
    out, skipped = [], []
    for where, row in rows:
        if isinstance(row, Mapping):
            row = plain_row(row, where)
            _check_columns(row, where)
        try:
            out.append(_conversation(row, where, categories, require) | {"source": name})
        except UserError as error:
            if bad_rows != "skip":
                raise
            skipped.append(error)
        if len(out) == max_rows:
            break
    if skipped:
        counts = len(skipped), len(skipped) + len(out)
        logger.warning("%s: left out %d bad rows of %d; the first: %s", spec, *counts, skipped[0])
    if not out:
        raise UserError(f"{spec}: no rows; expected lines such as {EXAMPLE_ROW}")
    for label in require:
        if not any(row[label] for row in out):
            raise UserError(f"{spec}, field {label}: no positive row among {len(out)}; nothing to learn or measure")
    return Dataset.from_list(out, features=FEATURES)


def _conversation(row: Any, where: str, categories: Sequence[str] | None, require: Sequence[str]) -> dict:
    """One checked row in the columns of `FEATURES`, without `source`."""
    if isinstance(row, UserError):
        raise row
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected an object such as {EXAMPLE_ROW}, found {row!r:.60}")
    labels: dict[str, Any] = dict.fromkeys(LABELS)
    if "messages" in row:
        messages = check_messages(row["messages"], where)
    else:
        response, told = row.get("response"), (*LABEL_COLUMNS["response_unsafe"], *LABEL_COLUMNS["response_refusal"])
        if f"{response}".strip() == "" and all(row.get(column) in (None, "") for column in ("category", *told)):
            response = None  # a prompt alone, as the older ExpGuardMix files have it
        messages = pair(
            check_text(row["prompt"], "prompt", where),
            None if response is None else check_text(response, "response", where),
        )
    if "category" in row:
        named = _beavertails_categories(row, where)
        labels["response_unsafe"] = bool(named)
    else:
        for label, columns in LABEL_COLUMNS.items():
            column = next((c for c in columns if c in row), None)
            labels[label] = None if column is None else check_label(row[column], column, where)
        named = _category_list(row.get("categories"), where)
    for name in named or ():
        if categories is not None and name not in categories:
            raise UserError(f"{where}, field categories: unknown category {name!r}; known: {' | '.join(categories)}")
    answered = messages[-1]["role"] == "assistant"
    if not answered and labels["response_unsafe"] is not None:
        raise UserError(f"{where}, field response: missing, although the row has a response label")
    if answered and named is not None:
        if labels["response_unsafe"] is None and categories is not None:
            labels["response_unsafe"] = bool(named)
        if named and labels["response_unsafe"] is False:
            raise UserError(f"{where}, field categories: {named} on a response that is labelled safe")
    for label in require:
        if (named if label == "categories" else labels[label]) is None:
            raise UserError(f"{where}, field {label}: missing; every row needs it here")
    # Without an id: file or data set with line or row, but no folder, so that a data fingerprint is the same anywhere.
    row_id = Path(where).name if row.get("id") is None else check_text(str(row["id"]), "id", where)
    return {"id": row_id, "messages": messages, **labels, "categories": named}


def _beavertails_categories(row: Mapping, where: str) -> list[str]:
    """The names that are true in BeaverTails' `category` struct, checked against its keys and against `is_safe`."""
    category = row["category"]
    if isinstance(category, str):  # a CSV cell
        try:
            category = json.loads(category)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}, field category: not JSON ({error.msg})") from None
    if not isinstance(category, Mapping):
        raise UserError(f"{where}, field category: expected an object of 14 booleans, found {category!r:.60}")
    names = taxonomy("beavertails")
    if unknown := set(category) - set(names):
        raise UserError(f"{where}, field category: unknown category {sorted(unknown)[0]!r}; known: {' | '.join(names)}")
    if missing := [name for name in names if name not in category]:
        raise UserError(f"{where}, field category: key {missing[0]!r} is missing")
    values = {name: check_label(category[name], f"category[{name}]", where) for name in names}
    if None in values.values():
        raise UserError(
            f"{where}, field category: {next(n for n in names if values[n] is None)!r} is null; expected true or false"
        )
    named = [name for name in names if values[name]]
    is_safe = check_label(row["is_safe"], "is_safe", where)
    if is_safe is None or is_safe == bool(named):
        raise UserError(f"{where}, field is_safe: {row['is_safe']!r} contradicts the categories {named}")
    return named


def _category_list(value: Any, where: str) -> list[str] | None:
    """`categories` as a list of names; a CSV cell holds it as JSON, because names contain commas."""
    if value is None or value == "" or value != value:
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise UserError(f"{where}, field categories: expected a JSON list of names, found {value!r:.60}") from None
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"{where}, field categories: expected a list of names, found {value!r:.60}")
    return [check_text(name, "categories", where) for name in value]


def _check_columns(row: Mapping, where: str) -> None:
    if "messages" not in row and "prompt" not in row:
        raise UserError(
            f"{where}, field prompt: missing (columns: {', '.join(map(str, row))}); expected a row like {EXAMPLE_ROW}"
        )
    if ("category" in row) != ("is_safe" in row):
        raise UserError(
            f"{where}, field {'is_safe' if 'category' in row else 'category'}: missing; BeaverTails rows have both"
        )
    if "category" in row and "response" not in row:
        raise UserError(f"{where}, field response: missing; BeaverTails rows are question+answer pairs")


# --- where rows come from ---------------------------------------------------------------------------------------------


def _raw_rows(spec: str) -> tuple[str, Iterator[tuple[str, Any]]]:
    """The data set's name and its rows as they stand, each with a text that says where it stands.

    A row that cannot even be read is a UserError in its place, so that it can be left out.
    """
    name, _, split = spec.rpartition(":") if ":" in spec else (spec, "", "")
    known = sources()["sources"].get(name)
    if known is not None:
        if split not in known["splits"]:
            raise UserError(
                f"{spec}: {name} has no split {split!r}; it has {', '.join(name + ':' + s for s in known['splits'])}"
            )
        if "path" in known:
            return name, _file_rows(ROOT / known["path"].format(split=split))
        return name, _hub_rows(known["hub"], split)
    if Path(spec).is_file() or Path(spec).suffix in FILE_TYPES:
        return Path(spec).name, _file_rows(Path(spec))
    if not split:
        raise UserError(
            f"{spec}: no such file, and a hub id or a folder needs a split (user/name:split); "
            f"known names: {', '.join(sources()['sources'])}"
        )
    return name, _hub_rows(name, split)


def _hub_rows(name: str, split: str) -> Iterator[tuple[str, Any]]:
    """Rows of a hub data set, or of a local folder in a hub data set's layout."""
    path, _, revision = (name, "", "") if Path(name).is_dir() else name.partition("@")
    try:
        rows = datasets.load_dataset(path, split=split, revision=revision or None)
    except Exception as error:  # the hub's errors share no base class, and each is a page long
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        gated = "gated" in str(error).lower()
        hint = (
            f"visit its page on the hub, accept the terms, then run `hf auth login`: {path}"
            if gated
            else "check name, split and network, or pass a local file"
        )
        raise UserError(f"{name}:{split}: {reason} ({hint})") from None
    for i, row in enumerate(tqdm(rows, desc=f"reading {name}:{split}", unit="row", disable=len(rows) < 10_000)):
        yield f"{name}:{split}, row {i}", row


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a local file. CSV and JSONL rows are named by line, the others by index."""
    if path.suffix not in FILE_TYPES:
        raise UserError(f"{path}: unknown file type; expected {', '.join(FILE_TYPES)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    try:
        yield from _READERS[path.suffix](path)
    except UnicodeDecodeError as error:  # its position counts from the start of a block, not of the file
        with path.open("rb") as lines:
            number = next(n for n, line in enumerate(lines, 1) if line.decode(errors="ignore").encode() != line)
        raise UserError(f"{path}, line {number}: not UTF-8 ({error.reason}); re-encode the file") from None


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = _json(line.rstrip(), path, number)
                except UserError as error:
                    row = error
                yield f"{path}, line {number}", row


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    rows = _json(path.read_text(encoding="utf-8-sig"), path)
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a JSON list of rows, found {type(rows).__name__}; one a line is .jsonl")
    yield from ((f"{path}, row {i}", row) for i, row in enumerate(rows))


def _json(text: str, path: Path, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{path}, line {line}, column {error.colno}: malformed JSON ({error.msg})") from None


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                short = next((column for column, cell in row.items() if cell is None), None)
                if None in row:
                    last = reader.fieldnames[-1]
                    row = UserError(f"{where}, field {last}: more cells follow; quote cells that contain commas")
                elif short is not None:
                    row = UserError(f"{where}, field {short}: missing, fewer cells than the header has")
                else:
                    row = {column: cell or None for column, cell in row.items()}
                yield where, row
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num + 1}: malformed CSV ({error})") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None
    yield from ((f"{path}, row {i}", row) for i, row in enumerate(rows))


_READERS = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}


# --- repeats and leaks ------------------------------------------------------------------------------------------------


def prompt_key(row: Mapping) -> str:
    """The last user turn, case and spacing apart: groups rows, so that no prompt stands on both sides of a split."""
    return " ".join((last_turns(row["messages"])[0] or "").lower().split())


def deduplicate(rows: Dataset) -> tuple[Dataset, dict[str, int]]:
    """One row a conversation, labels by majority vote.

    BeaverTails-330k holds about 3.3 annotations a pair. A response is unsafe if more than half of its annotations say
    so (as GuardBench does: safe if the mean of is_safe is at least 0.5); a category holds if more than half name it,
    and an unsafe response keeps its most often named ones even below half.

    Returns:
        The rows (first occurrence, in order) and a report: rows, unique, conflicting.
    """
    groups = defaultdict(list)
    for row in rows:
        groups[json.dumps([[m["role"], m["content"]] for m in row["messages"]])].append(row)
    out, conflicting = [], 0
    for group in groups.values():
        first = dict(group[0])
        given = [[*(row[k] for k in LABELS), row["categories"] and sorted(row["categories"])] for row in group]
        conflicting += any(labels != given[0] for labels in given)
        for label in LABELS:
            votes = [row[label] for row in group if row[label] is not None]
            first[label] = sum(votes) * 2 > len(votes) if votes else None
        # Whoever outvoted has no say in the categories: a response voted safe has none, an unsafe one has some.
        agreeing = [row["categories"] for row in group if row["response_unsafe"] == first["response_unsafe"]]
        named = [names for names in agreeing if names is not None]
        votes = Counter(name for names in named for name in names)
        bar = min(len(group) / 2, max(votes.values(), default=1) - 0.5)
        first["categories"] = sorted(name for name, count in votes.items() if count > bar) if named else None
        out.append(first)
    counts = {"rows": len(rows), "unique": len(out), "conflicting": conflicting}
    return Dataset.from_list(out, features=FEATURES), counts


def grouped_split(rows: Dataset, ratio: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split off about `ratio` of the prompts with all their rows. Raises UserError unless 0 < ratio < 1."""
    if not 0 < ratio < 1:
        raise UserError(f"--eval_split_ratio {ratio}: must lie strictly between 0 and 1")
    groups = [prompt_key(row) for row in rows]
    count = len(set(groups))
    if count < 2:
        raise UserError("--eval_split_ratio: fewer than two different prompts, nothing to split")
    size = min(max(1, round(ratio * count)), count - 1)  # neither side may be empty
    train, held_out = next(GroupShuffleSplit(1, test_size=size, random_state=seed).split(groups, groups=groups))
    return rows.select(sorted(train)), rows.select(sorted(held_out))


def overlap(train: Dataset, held_out: Dataset) -> dict[str, int]:
    """How many rows of `held_out` share their prompt, and their prompt and response, with a row of `train`."""
    pair_key = lambda row: (prompt_key(row), last_turns(row["messages"])[1])  # noqa: E731
    prompts, pairs = {prompt_key(r) for r in train}, {pair_key(r) for r in train}
    return {
        "rows": len(held_out),
        "prompt_in_train": sum(prompt_key(r) in prompts for r in held_out),
        "pair_in_train": sum(pair_key(r) in pairs for r in held_out),
    }
