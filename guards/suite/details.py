"""What results.md says beside the tables. (Of sub-groups, the language; the others
stand in results.json alone.)
"""

from collections.abc import Mapping, Sequence
from typing import Any

from common import report
from common.keep import Row
from guards.suite.score import COMPARED, MARKS, PARSE_ERRORS
from guards.suite.tables import METRICS

# The columns of each section, {heading: where its value is in a row}; a slash leads into a mapping.
NAMES = {"guard": "guard", "benchmark": "benchmark"}
FAILED = NAMES | {"why": "reason"}
GUARDS = {
    "": "name",
    "loaded from": "spec",
    "in the zoo": "zoo",
    "sees of a conversation": "sees",
    "training rows that are marked": "train_data",
    "trained on their training part (in distribution)": "knows",
}
FACTS = ("label", "rows", "positives", *MARKS, "file", "hub", "revision", "licence", "mismatch")
BENCHMARKS = {"": "name"} | {fact: fact for fact in FACTS}
SCORES = ("f1", "f1_at_05", "f1_at_validation", "auprc", "auroc", "recall")
INTERVALS = NAMES | {METRICS[score]: f"intervals/{score}" for score in SCORES}
RULES = NAMES | {"without a verdict": "errors"}
RULES |= {rule: f"by_parse_errors/{rule}/f1" for rule in PARSE_ERRORS}
PARTS = NAMES | {
    "rows that count": "part",
    "rows": "rows",
    "unsafe": "positives",
    "F1 ↑": "f1",
    "AUPRC ↑": "auprc",
}
LANGUAGES = NAMES | {"language": "part"} | {name: PARTS[name] for name in ("rows", "unsafe")}
LANGUAGES |= {METRICS[score]: score for score in ("f1", "auroc", "fpr")}
DIFFERENCES = {"first": "a", "second": "b", "benchmark": "benchmark", "rows": "rows"}
DROPS = {"guard": "guard", "benchmark": "benchmark", "rows": "rows"}
for score in COMPARED:
    for columns in (DIFFERENCES, DROPS):
        columns[METRICS[score]] = f"{score}/difference"
        columns[f"{METRICS[score]}, 95 %"] = f"{score}/interval"


def failures(results: Row) -> str:
    """What could not be measured, and why; nothing where all went well."""
    rows = [cell for cell in results["cells"] if cell["status"] == "failed"]
    for name, reason in results["unread_benchmarks"].items():
        rows.append({"guard": "–", "benchmark": name, "reason": reason})
    return _section("Failed", rows, FAILED)


def details(results: Row) -> str:
    """Guards, benchmarks, intervals, parse errors, marked rows and paired differences."""
    guards = []
    for name, guard in results["guards"].items():
        knows = ", ".join(guard["knows"])
        guards.append(guard | {"name": name, "knows": knows})
    benchmarks = [facts | {"name": name} for name, facts in results["benchmarks"].items()]
    measured = [cell for cell in results["cells"] if cell["status"] == "measured"]
    with_errors = [cell for cell in measured if cell["errors"]]
    parts = []
    for cell in measured:
        if cell["without"]:
            parts.append(cell | {"part": "all rows"})
        for name, part in cell["without"].items():
            parts.append(cell | part | {"part": f"without {name}"})
    languages = []
    for cell in measured:
        for name, part in cell["groups"].get("language", {}).items():
            languages.append(cell | part | {"part": name})
    sections = [
        _section("Guards", guards, GUARDS),
        _section("Benchmarks", benchmarks, BENCHMARKS),
        _section("95 % intervals (bootstrap over prompts)", measured, INTERVALS),
        _section("By language", languages, LANGUAGES),
        _section("F1 by the rule for rows without a verdict", with_errors, RULES),
        _section("With and without marked rows", parts, PARTS),
        _section("Paired differences, first minus second", results["comparison"], DIFFERENCES),
        _section("Paired drop, plain benchmark minus modified one", results["drops"], DROPS),
    ]
    return "\n".join(section for section in sections if section)


def _section(
    title: str,
    rows: Sequence[Row],
    columns: Mapping[str, str],
) -> str:
    """A table under its title; nothing where it has no rows."""
    if not rows:
        return ""
    lines = []
    for row in rows:
        lines.append([_value(row, place) for place in columns.values()])
    return f"## {title}\n\n{report.table(lines, list(columns))}"


def _value(row: Any, place: str) -> Any:
    for key in place.split("/"):
        row = row.get(key) if row else None
    return row
