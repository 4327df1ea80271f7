"""What results.md says beside the tables. (Sub-groups stand in results.json alone.)"""

from collections import defaultdict

from common import report
from common.keep import Row
from guards.suite.score import COMPARED, MARKS, PARSE_ERRORS
from guards.suite.tables import METRICS

FACTS = ("label", "rows", "positives", "recall_only", *MARKS)
FACTS += ("file", "hub", "revision", "licence", "mismatch")
WITH_INTERVAL = ("f1", "f1_at_05", "f1_at_validation", "auprc", "auroc", "recall")
# The sections, in their order, each a row a line: {heading: value}.
Sections = dict[str, list[Row]]


def failures(results: Row) -> str:
    """What could not be measured, and why; nothing where all went well."""
    rows = []
    for cell in results["cells"]:
        if cell["status"] == "failed":
            rows.append(_names(cell) | {"why": cell["reason"]})
    for name, reason in results["unread_benchmarks"].items():
        rows.append({"guard": "–", "benchmark": name, "why": reason})
    return _text({"Failed": rows})


def details(results: Row) -> str:
    """Guards, benchmarks, intervals, thresholds, parse errors, marked rows and paired differences."""
    sections: Sections = defaultdict(list)
    for name, guard in results["guards"].items():
        sections["Guards"].append(
            {
                "": name,
                "loaded from": guard["spec"],
                "in the zoo": guard["zoo"],
                "sees of a conversation": guard.get("sees"),
                "trained on their training part (in distribution)": ", ".join(guard["knows"]),
            }
        )
    for name, facts in results["benchmarks"].items():
        known = {fact.replace("_", " "): facts.get(fact) for fact in FACTS}
        sections["Benchmarks"].append({"": name} | known)
    measured = [cell for cell in results["cells"] if cell["status"] == "measured"]
    for cell in measured:
        scores = {
            METRICS[name]: _with_interval(cell[name], cell["intervals"].get(name))
            for name in WITH_INTERVAL
        }
        sections["95 % intervals (bootstrap over prompts)"].append(_names(cell) | scores)
    for cell in measured:
        threshold = cell["threshold"]
        if threshold:
            chosen = {"flags above": threshold["value"], "chosen by": threshold["how"]}
            sections["Thresholds"].append(_names(cell) | chosen | {"on": threshold["on"]})
    for cell in measured:
        if cell["errors"]:
            scores = {rule: cell["by_parse_errors"][rule]["f1"] for rule in PARSE_ERRORS}
            row = _names(cell) | {"without a verdict": cell["errors"]} | scores
            sections["F1 by the rule for rows without a verdict"].append(row)
    for cell in measured:
        parts = {f"without {name}": part for name, part in cell["without"].items()}
        for name, part in ({"all rows": cell} | parts if parts else {}).items():
            row = _names(cell) | {
                "rows that count": name,
                "rows": part["rows"],
                "unsafe": part["positives"],
                "F1 ↑": part["f1"],
                "AUPRC ↑": part["auprc"],
            }
            sections["With and without marked rows"].append(row)
    for pair in results["comparison"]:
        row = {"first": pair["a"], "second": pair["b"]}
        row |= {"benchmark": pair["benchmark"], "rows": pair["rows"]}
        for name in COMPARED:
            found = pair.get(name, {})
            row[METRICS[name]] = _with_interval(found.get("difference"), found.get("interval"))
        sections["Paired differences, first minus second"].append(row)
    return _text(sections)


def _names(cell: Row) -> dict[str, str]:
    return {"guard": cell["guard"], "benchmark": cell["benchmark"]}


def _text(sections: Sections) -> str:
    """Each section that has rows, under its title."""
    texts = []
    for title, rows in sections.items():
        if rows:
            table = report.table([list(row.values()) for row in rows], list(rows[0]))
            texts.append(f"## {title}\n\n{table}")
    return "\n".join(texts)


def _with_interval(value: float | None, interval: list[float] | None) -> str:
    text = report.number(value)
    return f"{text} {report.number(interval)}" if interval else text
