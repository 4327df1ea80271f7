"""What results.md says beside the tables. (Sub-groups stand in results.json alone.)"""

from collections.abc import Sequence

from common import report
from common.keep import Row
from guards.suite.score import COMPARED, MARKS, PARSE_ERRORS
from guards.suite.tables import METRICS

FACTS = ("label", "rows", "positives", "recall_only", *MARKS)
FACTS += ("file", "hub", "revision", "licence", "mismatch")
WITH_INTERVAL = (
    "f1",
    "f1_at_05",
    "f1_at_validation",
    "auprc",
    "auroc",
    "recall",
)


def failures(results: Row) -> str:
    """What could not be measured, and why; nothing where all went well."""
    rows = []
    for cell in results["cells"]:
        if cell["status"] == "failed":
            rows.append(_names(cell) | {"why": cell["reason"]})
    for name, reason in results["unread_benchmarks"].items():
        rows.append({"guard": "–", "benchmark": name, "why": reason})
    return _section("Failed", rows)


def details(results: Row) -> str:
    """Guards, benchmarks, intervals, thresholds, parse errors, marked rows and paired differences."""
    measured = [cell for cell in results["cells"] if cell["status"] == "measured"]
    fitted = [cell for cell in measured if cell["threshold"]]
    with_errors = [cell for cell in measured if cell["errors"]]
    sections = [
        _section("Guards", [_guard(*item) for item in results["guards"].items()]),
        _section(
            "Benchmarks",
            [_benchmark(*item) for item in results["benchmarks"].items()],
        ),
        _section(
            "95 % intervals (bootstrap over prompts)",
            list(map(_intervals, measured)),
        ),
        _section("Thresholds", list(map(_threshold, fitted))),
        _section(
            "F1 by the rule for rows without a verdict",
            list(map(_rules, with_errors)),
        ),
        _section(
            "With and without marked rows",
            [row for cell in measured for row in _parts(cell)],
        ),
        _section(
            "Paired differences, first minus second",
            list(map(_difference, results["comparison"])),
        ),
    ]
    return "\n".join(text for text in sections if text)


def _section(title: str, rows: Sequence[Row]) -> str:
    """Rows {heading: value} as a table under its title; nothing where there is none."""
    if not rows:
        return ""
    table = report.table([list(row.values()) for row in rows], list(rows[0]))
    return f"## {title}\n\n{table}"


def _guard(name: str, guard: Row) -> Row:
    return {
        "": name,
        "loaded from": guard["spec"],
        "in the zoo": guard["zoo"],
        "sees of a conversation": guard.get("sees"),
        "trained on their training part (in distribution)": ", ".join(guard["knows"]),
    }


def _benchmark(name: str, facts: Row) -> Row:
    return {"": name} | {fact.replace("_", " "): facts.get(fact) for fact in FACTS}


def _names(cell: Row) -> Row:
    return {"guard": cell["guard"], "benchmark": cell["benchmark"]}


def _intervals(cell: Row) -> Row:
    row = _names(cell)
    for name in WITH_INTERVAL:
        row[METRICS[name]] = _with_interval(cell[name], cell["intervals"].get(name))
    return row


def _threshold(cell: Row) -> Row:
    chosen = cell["threshold"]
    return _names(cell) | {
        "flags above": chosen["value"],
        "chosen by": chosen["how"],
        "on": chosen["on"],
    }


def _rules(cell: Row) -> Row:
    scores = {rule: cell["by_parse_errors"][rule]["f1"] for rule in PARSE_ERRORS}
    return _names(cell) | {"without a verdict": cell["errors"]} | scores


def _parts(cell: Row) -> list[Row]:
    """All rows, and those without each mark; nothing where no row is marked."""
    parts = {f"without {name}": part for name, part in cell["without"].items()}
    if parts:
        parts = {"all rows": cell} | parts
    rows = []
    for name, part in parts.items():
        row = _names(cell) | {"rows that count": name}
        row |= {"rows": part["rows"], "unsafe": part["positives"]}
        rows.append(row | {"F1 ↑": part["f1"], "AUPRC ↑": part["auprc"]})
    return rows


def _difference(pair: Row) -> Row:
    row = {"first": pair["a"], "second": pair["b"]}
    row |= {"benchmark": pair["benchmark"], "rows": pair["rows"]}
    for name in COMPARED:
        found = pair.get(name, {})
        row[METRICS[name]] = _with_interval(found.get("difference"), found.get("interval"))
    return row


def _with_interval(value: float | None, interval: list[float] | None) -> str:
    text = report.number(value)
    return f"{text} {report.number(interval)}" if interval else text
