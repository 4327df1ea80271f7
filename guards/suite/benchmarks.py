"""`load_benchmark(spec)`: a guard evaluation set as conversations with a gold label.

A spec is a name of benchmarks.yaml, or `name@path`: a local copy in the benchmark's own columns
(any type that `common.data.files` reads), or a folder with its files, laid out as on the hub or
named as in its url.

What data can say stands in benchmarks.yaml; the functions of prepare.py are the rest.
"""

import ast
import difflib
import hashlib
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import unquote

import datasets
import yaml

from common.conversation import Messages, UserError, check_messages, check_text
from common.data.files import Rows, read_rows
from common.data.specs import first_line, load_hub
from guards.suite.prepare import PREPARE, among, cell, plain, vote

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Benchmark:
    """A name, what its rows are judged for (one of `conversation.LABELS`), the rows, and what is
    known of them.

    A row: {"id": hash of label and messages, "messages", "label": bool, "groups": {name: value},
    "index": row in the source, "duplicate": the same messages with the same gold label came before,
    "conflict": the same messages carry the other gold label too}. `facts`: see `load_benchmark`.
    """

    name: str
    label: str
    rows: list[dict[str, Any]]
    facts: dict[str, Any]


@cache
def benchmarks() -> dict[str, dict[str, Any]]:
    """The entries of benchmarks.yaml by name."""
    return yaml.safe_load(Path(__file__).with_name("benchmarks.yaml").read_text(encoding="utf-8"))


def benchmark_names(label: str | None = None) -> list[str]:
    """All names, or those whose rows are judged for `label`, in the order of the file."""
    return [name for name, entry in benchmarks().items() if label in (None, entry["label"])]


def is_benchmark(spec: str) -> bool:
    """Whether a spec is a name of benchmarks.yaml, alone or with a local copy; else it is a data
    spec.
    """
    return spec.partition("@")[0] in benchmarks()


def load_benchmark(spec: str, max_rows: int | None = None) -> Benchmark:
    """Load and check a benchmark.

    Args:
        spec: see the module's docstring.
        max_rows: keep so many rows, evenly spaced, because some sets are sorted by label; counts
        are then not checked.

    Returns:
        The benchmark. Its facts: the entry's hub or url, config, split, revision, licence, gate and
        notes; `page`, where a gate opens; `file`, the local copy's name; `expected` (None: not
        confirmed) and `found` {"size", "positives"}; `mismatch`, how they differ, or None;
        `left_out` {reason: rows}; `dropped`: so many of these are `expected`; `duplicates` and
        `conflicts`, rows so marked; `recall_only`: all rows are positive by rule;
        `contaminated_by`, names of guards.

    Raises:
        UserError: unknown name, no such file, closed gate, a column that is missing, an unknown
        label, an empty text,
            no rows.
    """
    name, at, local = spec.partition("@")
    local = os.path.expanduser(local)
    entry = benchmarks().get(name)
    if entry is None:
        near = difflib.get_close_matches(name.lower(), benchmarks(), 5, 0.5) or list(benchmarks())
        raise UserError(f"{spec}: no benchmark {name!r}; near it: {', '.join(near)}")
    if at and not local:
        raise UserError(f"{spec}: no file after the @; expected {name}@FILE")
    if max_rows is not None and max_rows < 1:
        raise UserError(f"{spec}: max_rows {max_rows}: must be at least 1")
    source = _source_rows(name, entry, local)
    left_out: Counter[str] = Counter()
    items = defaultdict(list)  # annotations by item
    for index, where, row in PREPARE[entry["prepare"]](source) if "prepare" in entry else source:
        if reason := _left_out(row, entry):
            left_out[reason] += 1
            continue
        item = tuple(cell(row, column, where) for column in entry.get("majority_of", ())) or len(
            items
        )
        items[item].append((_share(row, entry["gold"], where), index, where, row))
    rows = [
        _row(entry, fmean(share for share, *_ in item) > 0.5, *item[0][1:])
        for item in items.values()
    ]
    if not rows:
        raise UserError(f"{spec}: no rows{f'; left out: {dict(left_out)}' if left_out else ''}")
    if max_rows is not None and max_rows < len(rows):
        rows = [rows[i * len(rows) // max_rows] for i in range(max_rows)]
    copied = ("hub", "url", "config", "split", "revision", "licence", "gate", "notes")
    facts = {key: entry.get(key) for key in copied} | {
        "page": _page(entry),
        "file": Path(local).name if local else None,
        "left_out": dict(left_out),
        **_mark_repeats(rows),
        "recall_only": entry["gold"] == {"always": True},
        "contaminated_by": list(entry.get("contaminated_by", ())),
        "expected": {key: entry[key] for key in ("size", "positives")} if entry["size"] else None,
        "found": {"size": len(rows), "positives": sum(row["label"] for row in rows)},
    }
    facts["dropped"] = sum(
        left_out[f"{column} is {word}"] for column, word in entry.get("drop", {}).items()
    )
    facts["mismatch"] = _mismatch(facts) if max_rows is None else None
    if facts["mismatch"]:
        logger.warning("%s: %s", spec, facts["mismatch"])
    return Benchmark(name, entry["label"], rows, facts)


def _page(entry: Mapping) -> str | None:
    return f"https://huggingface.co/datasets/{entry['hub']}" if "hub" in entry else None


def _mark_repeats(rows: list[dict]) -> dict[str, int]:
    """Set `duplicate` and `conflict` on every row, and count them."""
    golds, seen = defaultdict(set), set()
    for row in rows:
        golds[row["id"]].add(row["label"])
    for row in rows:
        row["duplicate"], row["conflict"] = (
            (row["id"], row["label"]) in seen,
            len(golds[row["id"]]) > 1,
        )
        seen.add((row["id"], row["label"]))
    return {f"{mark}s": sum(row[mark] for row in rows) for mark in ("duplicate", "conflict")}


def _mismatch(facts: Mapping[str, Any]) -> str | None:
    """How the counts differ from the known ones, and what was left out; None if they agree or
    nothing is known.
    """
    known = {key: value for key, value in (facts["expected"] or {}).items() if value is not None}
    lacking = {key: value - facts["found"][key] for key, value in known.items()}
    if (
        lacking.get("size", facts["dropped"])
        == facts["dropped"]
        >= lacking.get("positives", 0)
        >= 0
    ):
        return None
    counts = (", ".join(f"{key} {part[key]}" for key in known) for part in (known, facts["found"]))
    left_out = "".join(f"; {rows} rows left out: {why}" for why, rows in facts["left_out"].items())
    return f"expected {' but found '.join(counts)}{left_out}"


# --- a row ------------------------------------------------------------------------------------------------------------


def _left_out(row: Mapping, entry: Mapping) -> str | None:
    """Why the benchmark does not count this row, if so."""
    for column, wanted in entry.get("keep", {}).items():
        if plain(row.get(column)) is None or (
            wanted != "present" and not among(row[column], wanted)
        ):
            return f"{column} is not {wanted}"
    return next(
        (f"{c} is {word}" for c, word in entry.get("drop", {}).items() if row.get(c) == word), None
    )


def _share(row: Mapping, rule: Mapping, where: str) -> float:
    """How far this row says that its label is true: 0 or 1, or 0.5 where an annotator was not sure."""
    if "always" in rule:
        return float(rule["always"])
    if "sum_of" in rule:
        try:
            return float(
                sum(float(cell(row, column, where)) for column in rule["sum_of"]) > rule["above"]
            )
        except (TypeError, ValueError):
            raise UserError(
                f"{where}, field {' or '.join(rule['sum_of'])}: expected a number"
            ) from None
    if "column" in rule:
        return vote(cell(row, rule["column"], where), rule["column"], rule, where)
    if "absent" not in rule or not any(column in row for column in rule["columns"]):
        row = {column: cell(row, column, where) for column in rule["columns"]}
    return float(
        sum(vote(row.get(column), column, rule, where) for column in rule["columns"])
        >= rule["at_least"]
    )


def _row(entry: Mapping, gold: bool, index: int, where: str, row: Mapping) -> dict[str, Any]:
    if entry["messages"] is None:  # then `prepare` has written them
        messages = check_messages(row["messages"], where)
    else:
        parts = entry["messages"] if isinstance(entry["messages"], list) else [entry["messages"]]
        turns = [turn for part in parts for turn in part.items()]
        messages = [
            {"role": role, "content": _text(row, columns, entry, where)} for role, columns in turns
        ]
    key = row_id(entry["label"], messages)
    groups = {name: _group(row, rule, where) for name, rule in entry.get("groups", {}).items()}
    groups = {name: value for name, value in groups.items() if value is not None}
    return {"id": key, "messages": messages, "label": gold, "groups": groups, "index": index}


def row_id(label: str, messages: Messages) -> str:
    """What names a row: its label and its conversation, wherever it stands."""
    text = json.dumps([label, messages])
    return hashlib.sha256(text.encode()).hexdigest()


def _text(row: Mapping, columns: str | list[str], entry: Mapping, where: str) -> str:
    """One column, or the columns that are not empty (the first must not be)."""
    columns = [columns] if isinstance(columns, str) else columns
    filled = [
        column
        for column in columns
        if column == columns[0] or plain(cell(row, column, where)) is not None
    ]
    return entry.get("join", "").join(
        check_text(cell(row, column, where), column, where) for column in filled
    )


def _group(row: Mapping, rule: str | Mapping, where: str) -> str | None:
    """The sub-group of a row; None where it has none, or the copy lacks the column."""
    rule = {"column": rule} if isinstance(rule, str) else rule
    value = row.get(rule["column"])
    if plain(value) is None:
        return None
    if "top_above" not in rule:
        names = {plain(key): name for key, name in rule.get("values", {}).items()}
        return names.get(plain(value), rule.get("other", str(value)))
    try:  # text that looks like Python, from a file: a literal, never code
        name, score = max(
            ast.literal_eval(value) if isinstance(value, str) else value,
            key=lambda scored: scored[1],
        )
        return str(name) if score >= rule["top_above"] else "low_confidence"
    except (ValueError, SyntaxError, TypeError, LookupError):
        raise UserError(
            f"{where}, field {rule['column']}: expected a list of names with scores"
        ) from None


# --- where rows come from ---------------------------------------------------------------------------------------------


def _source_rows(name: str, entry: Mapping, local: str) -> Iterator[tuple[int, str, Mapping]]:
    """The rows as they stand; those of several splits say which in a column `split`."""
    if local.endswith(".tar.gz") and Path(local).is_file():  # an archive, named as in the url
        local = str(Path(local).absolute().parent)
    if local and not Path(local).is_dir():
        parts = {None: read_rows(local, nested=True)}
    elif "hub" in entry:
        splits = entry["split"] if isinstance(entry["split"], list) else [entry["split"]]
        parts = {split: _hub_rows(name, entry, local, split) for split in splits}
    else:
        urls = entry["url"] if isinstance(entry["url"], dict) else {None: entry["url"]}
        parts = {split: _url_rows(name, url, local) for split, url in urls.items()}
    numbers = count()
    for split, rows in parts.items():
        for where, row in rows:
            if isinstance(row, UserError):
                raise row
            if not isinstance(row, Mapping):
                raise UserError(
                    f"{where}: expected an object with the columns of {name}, found {row!r:.60}"
                )
            yield next(numbers), where, row if len(parts) == 1 else {**row, "split": split}


def _hub_rows(name: str, entry: Mapping, local: str, split: str) -> Rows:
    """Rows of a hub data set, or of a local folder in its layout."""
    hub = local or entry["hub"]
    revision = None if local else entry["revision"]
    hint = f"pass a local copy: {name}@FILE"
    if not local and entry["gate"] != "none":
        hint = f"visit {_page(entry)}, accept the terms, then run `hf auth login`, or {hint}"
    rows = load_hub(
        hub, split, entry.get("config"), revision, where=f"{name}, {hub}:{split}", hint=hint
    )
    for index, row in enumerate(rows):
        yield f"{hub}:{split}, row {index}", row


def _url_rows(name: str, url: str, local: str) -> Rows:
    """Rows of a file of the web (after #: in an archive), from the `datasets` cache or, named
    alike, from `local`.
    """
    url, _, member = url.partition("#")
    manager = datasets.DownloadManager(
        download_config=datasets.DownloadConfig(use_etag=False, force_extract=True)
    )
    try:
        path = Path(local, unquote(Path(url).name)) if local else manager.download(url)
        path = Path(manager.extract(str(path)), member) if member else path
    except Exception as error:  # the network's and an archive's errors share no base class
        hint = f"check the network, or pass a local copy: {name}@FILE"
        raise UserError(f"{name}, {url}: {first_line(error)} ({hint})") from None
    suffix = Path(member or url).suffix  # a file of the cache has none of its own
    yield from read_rows(path, suffix=suffix, nested=True)
