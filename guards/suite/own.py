"""Rows of the user's own as benchmarks, under their own name.

    --benchmarks rows.jsonl                     a file that `common.data.load_conversations` reads
    --benchmarks rows.csv[:500] mine=data.csv   a slice; another name
    --benchmarks user/name:test                 a data set of the hub

A file whose rows label prompts and responses is two benchmarks, `rows_prompt` and `rows_response`:
each row is judged for every label that it has.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from common import data
from common.conversation import Messages, UserError
from common.data import parse_spec
from common.data.specs import Spec
from common.data.tables import sources
from common.keep import Row
from guards.suite.benchmarks import (
    Benchmark,
    benchmarks,
    is_benchmark,
    mark_repeats,
    row_id,
)

TASKS = {
    "prompt": "prompt_unsafe",
    "response": "response_unsafe",
    "refusal": "response_refusal",
}


def own_spec(text: str) -> Spec | None:
    """The rows that a spec of --benchmarks means; None for a benchmark of ours, and for what looks
    like a misspelt one.
    """
    if is_benchmark(text):
        return None
    try:
        spec = parse_spec(_name_and_rows(text)[1])
    except UserError:
        return None
    if spec.is_file:
        # a file, or what somebody meant as name@file of a benchmark
        there = Path(spec.name).is_file() or "@" not in spec.name
        return spec if there else None
    is_known = spec.name in sources()["sources"] or "/" in spec.name
    return spec if is_known and spec.split else None


def own_benchmarks(text: str, max_rows: int | None = None) -> list[Benchmark]:
    """The rows of a spec (see `own_spec`) as benchmarks, one for each label that they have.

    Args:
        max_rows: keep so many rows of each, evenly spaced.

    Raises:
        UserError: a row that cannot be read, rows without any label, a name of another benchmark.
    """
    name, rows_spec = _name_and_rows(text)
    spec = parse_spec(rows_spec)
    rows = list(data.load_conversations(rows_spec, beside=["domain"]))
    tasks = {}
    for task, label in TASKS.items():
        if any(row[label] is not None for row in rows):
            tasks[task] = label
    if not tasks:
        raise UserError(
            f"{text}: no row has a label; name the column prompt_label, response_label or "
            "refusal_label"
        )
    name = name or _name_of(spec)
    found = []
    for task, label in tasks.items():
        full_name = f"{name}_{task}" if len(tasks) > 1 else name
        _check_name(full_name, text)
        judged = own_rows(rows, label)
        if max_rows is not None:
            judged = data.spread(judged, max_rows)
        mark_repeats(judged)
        facts = _facts(spec, judged, len(rows) - len(judged) if max_rows is None else 0)
        found.append(Benchmark(full_name, label, judged, facts))
    return found


def own_rows(rows: Sequence[Mapping], label: str) -> list[Row]:
    """Those rows of `load_conversations` that have a label, as rows of a benchmark.

    A prompt is judged with the turns before it and without its answer, and a response with all that
    came before. `own_id` is the id that the user's file gives the row.
    """
    found = []
    for index, row in enumerate(rows):
        if row[label] is None:
            continue
        messages = _judged_turns(row["messages"], label)
        if not messages:
            what = "no user turn, although the row labels a prompt"
            raise UserError(f"{row['source']}, row {row['id']}, field messages: {what}")
        found.append(
            {
                "id": row_id(label, messages),
                "own_id": row["id"],
                "messages": messages,
                "label": row[label],
                "groups": _groups(row),
                "index": index,
            }
        )
    return found


def _judged_turns(messages: Messages, label: str) -> list[dict[str, str]]:
    turns = [dict(turn) for turn in messages]
    while label == "prompt_unsafe" and turns and turns[-1]["role"] != "user":
        turns.pop()
    return turns


def _groups(row: Mapping) -> dict[str, str]:
    """The sub-groups of a row: its language, its domain, and its categories together."""
    groups = {}
    for name in ("language", "domain"):
        value = row.get(name)
        if isinstance(value, str) and value.strip():  # an empty cell of a table is NaN
            groups[name] = value.strip()
    if row["categories"]:
        groups["categories"] = "; ".join(row["categories"])
    return groups


def _facts(spec: Spec, rows: Sequence[Row], unlabelled: int) -> Row:
    """What is known of own rows, as `load_benchmark` says it; nobody published numbers of them."""
    left_out = {"without this label": unlabelled} if unlabelled else {}
    positives = sum(row["label"] for row in rows)
    return {
        "own": True,
        "contaminated_by": [],
        "page": None,
        "file": Path(spec.name).name + spec.split if spec.is_file else None,
        "hub": None if spec.is_file else str(spec),
        "left_out": left_out,
        "recall_only": False,
        "expected": None,
        "found": {"size": len(rows), "positives": positives},
        "mismatch": None,
    }


# --- names ----------------------------------------------------------------------------------------


def _name_and_rows(text: str) -> tuple[str, str]:
    """The name that own rows are given ("" without name=), and their spec."""
    name, equals, rows = text.partition("=")
    if not equals or "/" in name or Path(text).is_file():
        return "", text
    return name, rows


def _name_of(spec: Spec) -> str:
    """A name that can be one of a file: `rows` of rows.jsonl, `name-test` of user/name:test."""
    path = Path(spec.name)
    name = path.stem if spec.is_file else "-".join([path.name, *spec.marks])
    full = f"{name}-{spec.split}" if spec.split else name
    return re.sub(r"[^\w.]+", "-", full).strip("-")


def _check_name(name: str, text: str) -> None:
    """Own rows must not stand in the column of a benchmark of ours."""
    if not re.fullmatch(r"[\w. -]+", name):
        raise UserError(f"--benchmarks {text}: {name!r} is no name; take letters, digits and -")
    if name in benchmarks():
        raise UserError(
            f"--benchmarks {text}: {name} is the name of a benchmark. If these are its rows in its "
            f"columns, write {name}@FILE; else give them a name: mine=FILE"
        )
