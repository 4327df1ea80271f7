"""`load_benchmark(spec)`: a guard evaluation set as conversations with a gold label.

A spec is a name of benchmarks.yaml, or `name@path`: a local copy in the benchmark's own columns
(any type that `common.data.files` reads), or a folder with its files, laid out as on the hub or
named as in its url.

`name+homoglyph`, or any other name of common/obfuscation.py, alone or before the @: the same rows,
obfuscated, whose labels stay.

What data can say stands in benchmarks.yaml; the functions of prepare.py are the rest.
"""

import ast
import difflib
import hashlib
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from pathlib import Path
from statistics import fmean
from urllib.parse import unquote

import datasets

from common.conversation import Messages, UserError, check_messages, one_line
from common.data import spread
from common.data.files import Rows, read_rows, read_yaml
from common.data.specs import load_hub
from common.keep import Row
from common.obfuscation import OBFUSCATIONS, check_obfuscations, obfuscated
from guards.suite.prepare import (
    PREPARE,
    SourceRow,
    among,
    as_list,
    plain,
)

logger = logging.getLogger(__name__)
HERE = Path(__file__).parent
OBFUSCATION_SEED = 0  # one for all, so that scores of two runs compare


@dataclass(frozen=True)
class Benchmark:
    """A name, what its rows are judged for (one of `conversation.LABELS`), the rows, and what is
    known of them.

    A row: {"id": hash of label and messages, "messages", "label": bool, "groups": {name: value},
    "index": row in the source, "duplicate": the same messages with the same gold label came before,
    "conflicting": the same messages carry the other gold label too}. `facts`: see `load_benchmark`.
    """

    name: str
    label: str
    rows: list[Row]
    facts: Row


@cache
def benchmarks() -> dict[str, Row]:
    """The entries of benchmarks.yaml by name."""
    return read_yaml(HERE / "benchmarks.yaml")


@cache
def paper() -> dict[str, Row]:
    """What paper.yaml says of ExpGuard's evaluation code."""
    return read_yaml(HERE / "paper.yaml")


def benchmark_names(label: str | None = None) -> list[str]:
    """All names, or those whose rows are judged for `label`, in the order of the file."""
    names = list(benchmarks())
    if label is None:
        return names
    return [name for name in names if benchmarks()[name]["label"] == label]


def split_modifier(spec: str) -> tuple[str, str]:
    """A spec without its modifier, and the modifier ("" for none).

    Raises:
        UserError: what stands after the + of a benchmark is no obfuscation.
    """
    name, at, local = spec.partition("@")
    plain, plus, modifier = name.rpartition("+")
    if not plus:
        return spec, ""
    if modifier not in OBFUSCATIONS and plain not in benchmarks():
        return spec, ""  # a + in the name of a file
    check_obfuscations([modifier], f"--benchmarks {spec}: modifier")
    return f"{plain}{at}{local}", modifier


def split_spec(spec: str) -> tuple[str, str]:
    """The name of a benchmark, by our word for it and without a modifier, and its local copy ("" for
    none).
    """
    spec, _ = split_modifier(spec)
    name, _, local = spec.partition("@")
    return paper()["benchmarks"].get(name, name), os.path.expanduser(local)


def is_benchmark(spec: str) -> bool:
    """Whether a spec is a name of benchmarks.yaml, alone or with a local copy; else it is a data
    spec.
    """
    return split_spec(spec)[0] in benchmarks()


def load_benchmark(spec: str, max_rows: int | None = None) -> Benchmark:
    """Load and check a benchmark, and obfuscate it where its spec has a modifier. See `load_plain`.

    The facts of a modified one have `modifier` and `plain`, the name of the benchmark itself. Each
    of its rows has `plain`, the row that it was; ids and texts alone are others.
    """
    plain_spec, modifier = split_modifier(spec)
    plain = load_plain(plain_spec, max_rows)
    return modified(plain, modifier) if modifier else plain


def modified(plain: Benchmark, modifier: str) -> Benchmark:
    """The rows of a benchmark, obfuscated, which it names with a + and the modifier."""
    name = f"{plain.name}+{modifier}"
    rows = []
    for row in plain.rows:
        messages = obfuscated(row["messages"], modifier, OBFUSCATION_SEED)
        key = row_id(plain.label, messages)
        other = {"id": key, "messages": messages, "plain": row}
        if "own_id" in row:
            other["own_id"] = f"{row['own_id']}+{modifier}"
        rows.append(row | other)
    unchanged = sum(row["id"] == row["plain"]["id"] for row in rows)
    if unchanged:
        logger.warning("%s: %d of %d rows hold nothing to change", name, unchanged, len(rows))
    facts = {**plain.facts, "modifier": modifier, "plain": plain.name}
    return replace(plain, name=name, rows=rows, facts=facts)


def load_plain(spec: str, max_rows: int | None = None) -> Benchmark:
    """Load and check a benchmark without a modifier.

    Args:
        spec: see the module's docstring.
        max_rows: keep so many rows, evenly spaced, because some sets are sorted by label; counts
            are then not checked.

    Returns:
        The benchmark. Its facts: its entry in benchmarks.yaml; `page`, where a gate opens; `file`,
        the local copy's name; `expected` (None: not confirmed) and `found` {"size", "positives"};
        `mismatch`, how they differ, or None; `left_out` {reason: rows}; `recall_only`: all rows are
        positive by rule; `contaminated_by`, names of guards.

    Raises:
        UserError: unknown name, no such file, closed gate, a column that is missing, an unknown
            label, an empty text, no rows.
    """
    name, local = split_spec(spec)
    entry = benchmarks().get(name)
    if entry is None:
        known = list(benchmarks())
        near = difflib.get_close_matches(name.lower(), known, 5, 0.5)
        raise UserError(
            f"{spec}: no benchmark {name!r}; near it: {', '.join(near or known)}; rows of your own "
            "are a file (rows.jsonl) or user/name:split"
        )
    if "@" in spec and not local:
        raise UserError(f"{spec}: no file after the @; expected {name}@FILE")
    rows, left_out = _labelled_rows(entry, _source_rows(name, entry, local))
    if not rows:
        why = f"; left out: {left_out}" if left_out else ""
        raise UserError(f"{spec}: no rows{why}")
    if max_rows is not None:
        rows = spread(rows, max_rows)
    mark_repeats(rows)
    positives = sum(row["label"] for row in rows)
    found = {"size": len(rows), "positives": positives}
    mismatch = _mismatch(entry, found, left_out) if max_rows is None else None
    if mismatch:
        logger.warning("%s: %s", spec, mismatch)
    facts = {
        "contaminated_by": [],
        **entry,
        "page": _page(entry),
        "file": Path(local).name if local else None,
        "left_out": left_out,
        "recall_only": entry["gold"] == {"always": True},
        "expected": {key: entry[key] for key in found} if entry["size"] else None,
        "found": found,
        "mismatch": mismatch,
    }
    return Benchmark(name, entry["label"], rows, facts)


def _page(entry: Row) -> str | None:
    return f"https://huggingface.co/datasets/{entry['hub']}" if "hub" in entry else None


def mark_repeats(rows: Sequence[dict]) -> None:
    """Set `duplicate` and `conflicting` on every row."""
    labels_of = defaultdict(set)
    for row in rows:
        labels = labels_of[row["id"]]
        row["duplicate"] = row["label"] in labels
        labels.add(row["label"])
    for row in rows:
        row["conflicting"] = len(labels_of[row["id"]]) == 2


def _mismatch(entry: Row, found: Row, left_out: Row) -> str | None:
    """How the counts differ from the known ones, and what was left out; None if they agree or
    nothing is known.
    """
    expected = {key: entry[key] for key in found if entry[key] is not None}
    reasons = [f"{column} is {word}" for column, word in entry.get("drop", {}).items()]
    # Papers count the dropped rows, of which each may be positive or not.
    dropped = sum(left_out.get(reason, 0) for reason in reasons)
    lacking = {key: value - found[key] for key, value in expected.items()}
    size_fits = lacking.get("size", dropped) == dropped
    if size_fits and 0 <= lacking.get("positives", 0) <= dropped:
        return None
    theirs = ", ".join(f"{key} {value}" for key, value in expected.items())
    ours = ", ".join(f"{key} {found[key]}" for key in expected)
    lost = "".join(f"; {rows} rows left out: {why}" for why, rows in left_out.items())
    return f"expected {theirs} but found {ours}{lost}"


# --- a row ----------------------------------------------------------------------------------------


def _labelled_rows(
    entry: Row,
    source: Iterator[SourceRow],
) -> tuple[list[Row], dict[str, int]]:
    """The rows that a benchmark counts, with their gold labels, and how many it does not, by
    reason. Annotations of one item are one row.
    """
    if "prepare" in entry:
        source = PREPARE[entry["prepare"]](source)
    left_out: Counter[str] = Counter()
    items = defaultdict(list)
    for row in source:
        reason = _why_left_out(row, entry)
        if reason:
            left_out[reason] += 1
            continue
        item = len(items)
        if "majority_of" in entry:
            item = tuple(row.cell(column) for column in entry["majority_of"])
        items[item].append((_share(row, entry["gold"]), row))
    rows = []
    for annotations in items.values():
        row = annotations[0][1]
        messages = _messages(row, entry)
        groups = {}
        for name, rule in entry.get("groups", {}).items():
            value = _group(row, rule)
            if value is not None:
                groups[name] = value
        rows.append(
            {
                "id": row_id(entry["label"], messages),
                "messages": messages,
                "label": fmean(share for share, _ in annotations) > 0.5,
                "groups": groups,
                "index": row.index,
            }
        )
    return rows, dict(left_out)


def _why_left_out(row: SourceRow, entry: Row) -> str | None:
    """Why the benchmark does not count this row, if so."""
    for column, wanted in entry.get("keep", {}).items():
        value = row.cells.get(column)
        if plain(value) is None or (wanted != "present" and not among(value, wanted)):
            return f"{column} is not {wanted}"
    for column, word in entry.get("drop", {}).items():
        if row.cells.get(column) == word:
            return f"{column} is {word}"
    return None


def _share(row: SourceRow, rule: Row) -> float:
    """How far this row says that its label is true: 0 or 1, or 0.5 where an annotator was not sure."""
    if "always" in rule:
        return float(rule["always"])
    if "sum_of" in rule:
        return float(sum(map(row.number, rule["sum_of"])) > rule["above"])
    if "column" in rule:
        return row.vote(rule["column"], rule)
    columns = rule["columns"]
    if not any(column in row.cells for column in columns):
        row.cell(columns[0])  # one may be absent, but not all
    votes = [row.vote(column, rule) for column in columns]
    return float(sum(votes) >= rule["at_least"])


def row_id(label: str, messages: Messages) -> str:
    """What names a row: its label and its conversation, wherever it stands."""
    text = json.dumps([label, messages])
    return hashlib.sha256(text.encode()).hexdigest()


def _messages(row: SourceRow, entry: Row) -> Messages:
    parts = entry["messages"]
    if parts is None:  # then `prepare` has written them
        return check_messages(row.cell("messages"), row.where)
    messages = []
    for part in as_list(parts):
        for role, columns in part.items():
            first, *others = as_list(columns)
            filled = [column for column in others if plain(row.cell(column)) is not None]
            texts = [row.text(column) for column in (first, *filled)]
            content = entry.get("join", "").join(texts)
            messages.append({"role": role, "content": content})
    return messages


def _group(row: SourceRow, rule: str | Row) -> str | None:
    """The sub-group of a row; None where it has none, or the copy lacks the column."""
    if isinstance(rule, str):
        rule = {"column": rule}
    value = row.cells.get(rule["column"])
    if plain(value) is None:
        return None
    if "top_above" not in rule:
        names = {plain(key): name for key, name in rule.get("values", {}).items()}
        return names.get(plain(value), rule.get("other", str(value)))
    try:
        # Text of a file that looks like Python is read as a literal, and never run.
        scored = ast.literal_eval(value) if isinstance(value, str) else value
        name, score = max(scored, key=lambda one: one[1])
        return str(name) if score >= rule["top_above"] else "low_confidence"
    except (ValueError, SyntaxError, TypeError, LookupError):
        raise row.wrong(rule["column"], "expected a list of names with scores") from None


# --- where rows come from -------------------------------------------------------------------------


def _source_rows(name: str, entry: Row, local: str) -> Iterator[SourceRow]:
    """The rows as they stand; those of several splits say which in a column `split`."""
    if local.endswith(".tar.gz") and Path(local).is_file():  # an archive, named as in the url
        local = str(Path(local).absolute().parent)
    if local and not Path(local).is_dir():
        parts = {None: read_rows(local, nested=True)}
    elif "hub" in entry:
        splits = as_list(entry["split"])
        parts = {split: _hub_rows(name, entry, local, split) for split in splits}
    else:
        urls = entry["url"]
        if not isinstance(urls, dict):
            urls = {None: urls}
        parts = {split: _url_rows(name, url, local) for split, url in urls.items()}
    numbers = count()
    for split, rows in parts.items():
        for where, row in rows:
            if isinstance(row, UserError):
                raise row
            if not isinstance(row, Mapping):
                what = f"expected an object with the columns of {name}, found {row!r:.60}"
                raise UserError(f"{where}: {what}")
            if len(parts) > 1:
                row = {**row, "split": split}
            yield SourceRow(row, next(numbers), where)


def _hub_rows(
    name: str,
    entry: Row,
    local: str,
    split: str,
) -> Rows:
    """Rows of a hub data set, or of a local folder in its layout."""
    hub = local or entry["hub"]
    revision = None if local else entry["revision"]
    hint = f"pass a local copy: {name}@FILE"
    if not local and entry["gate"] != "none":
        hint = f"visit {_page(entry)}, accept the terms, then run `hf auth login`, or {hint}"
    where = f"{name}, {hub}:{split}"
    rows = load_hub(
        hub,
        split,
        entry.get("config"),
        revision,
        where=where,
        hint=hint,
    )
    for index, row in enumerate(rows):
        yield f"{hub}:{split}, row {index}", row


def _url_rows(name: str, url: str, local: str) -> Rows:
    """Rows of a file of the web (after #: in an archive), from the `datasets` cache or, named
    alike, from `local`.
    """
    url, _, member = url.partition("#")
    config = datasets.DownloadConfig(use_etag=False, force_extract=True)
    manager = datasets.DownloadManager(download_config=config)
    try:
        place = Path(local, unquote(Path(url).name))
        path = place if local else manager.download(url)
        if member:
            path = Path(manager.extract(str(path)), member)
    except Exception as error:  # the network's and an archive's errors share no base class
        hint = f"check the network, or pass a local copy: {name}@FILE"
        raise UserError(f"{name}, {url}: {one_line(error)} ({hint})") from None
    suffix = Path(member or url).suffix  # a file of the cache has none of its own
    yield from read_rows(path, suffix=suffix, nested=True)
