"""What results.md says beside the tables. (Sub-groups stand in results.json alone.)"""

from collections.abc import Mapping, Sequence
from typing import Any

from common import report
from common.keep import Row
from guards.suite.score import COMPARED, MARKS, PARSE_ERRORS
from guards.suite.tables import METRICS

# The columns of each section, {heading: where its value stands in a row}; a slash leads into a
# mapping, and of two places both values are shown.
NAMES = {"guard": "guard", "benchmark": "benchmark"}
FAILED = NAMES | {"why": "reason"}
GUARDS = {
    "": "name",
    "loaded from": "spec",
    "in the zoo": "zoo",
    "sees of a conversation": "sees",
    "trained on their training part (in distribution)": "knows",
}
FACTS = ("label", "rows", "positives", "recall_only", *MARKS)
FACTS += ("file", "hub", "revision", "licence", "mismatch")
BENCHMARKS = {"": "name"} | {fact.replace("_", " "): fact for fact in FACTS}
SCORES = (
    "f1",
    "f1_at_05",
    "f1_at_validation",
    "auprc",
    "auroc",
    "recall",
)
INTERVALS = NAMES | {METRICS[score]: f"{score} intervals/{score}" for score in SCORES}
THRESHOLDS = NAMES | {
    "flags above": "threshold/value",
    "chosen by": "threshold/how",
    "on": "threshold/on",
}
RULES = {"without a verdict": "errors"}
RULES = NAMES | RULES | {rule: f"by_parse_errors/{rule}/f1" for rule in PARSE_ERRORS}
PARTS = NAMES | {
    "rows that count": "part",
    "rows": "rows",
    "unsafe": "positives",
    "F1 ↑": "f1",
    "AUPRC ↑": "auprc",
}
DIFFERENCES = {
    "first": "a",
    "second": "b",
    "benchmark": "benchmark",
    "rows": "rows",
}
DIFFERENCES |= {METRICS[score]: f"{score}/difference {score}/interval" for score in COMPARED}


def failures(results: Row) -> str:
    """What could not be measured, and why; nothing where all went well."""
    rows = [cell for cell in results["cells"] if cell["status"] == "failed"]
    for name, reason in results["unread_benchmarks"].items():
        rows.append({"guard": "–", "benchmark": name, "reason": reason})
    return _section("Failed", rows, FAILED)


def details(results: Row) -> str:
    """Guards, benchmarks, intervals, thresholds, parse errors, marked rows and paired differences."""
    guards = []
    for name, guard in results["guards"].items():
        guards.append(guard | {"name": name, "knows": ", ".join(guard["knows"])})
    benchmarks = [facts | {"name": name} for name, facts in results["benchmarks"].items()]
    measured = [cell for cell in results["cells"] if cell["status"] == "measured"]
    fitted = [cell for cell in measured if cell["threshold"]]
    with_errors = [cell for cell in measured if cell["errors"]]
    parts = []
    for cell in measured:
        if cell["without"]:
            parts.append(cell | {"part": "all rows"})
        for name, part in cell["without"].items():
            parts.append(cell | part | {"part": f"without {name}"})
    sections = [
        _section("Guards", guards, GUARDS),
        _section("Benchmarks", benchmarks, BENCHMARKS),
        _section(
            "95 % intervals (bootstrap over prompts)",
            measured,
            INTERVALS,
        ),
        _section("Thresholds", fitted, THRESHOLDS),
        _section(
            "F1 by the rule for rows without a verdict",
            with_errors,
            RULES,
        ),
        _section("With and without marked rows", parts, PARTS),
        _section(
            "Paired differences, first minus second",
            results["comparison"],
            DIFFERENCES,
        ),
    ]
    return "\n".join(section for section in sections if section)


def _section(title: str, rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """A table under its title; nothing where it has no rows."""
    lines = [[_value(row, places) for places in columns.values()] for row in rows]
    return f"## {title}\n\n{report.table(lines, list(columns))}" if lines else ""


def _value(row: Row, places: str) -> Any:
    values = []
    for place in places.split():
        value: Any = row
        for key in place.split("/"):
            value = value.get(key) if value else None
        values.append(value)
    first, *others = values
    if not any(others):
        return first
    return " ".join(map(report.number, values))
