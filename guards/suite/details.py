"""What results.md says beside the tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from common import report
from guards.suite.score import COMPARED, MARKS, PARSE_ERRORS
from guards.suite.tables import METRICS

GUARDS = {
    "spec": "loaded from",
    "zoo": "in the zoo",
    "sees": "sees of a conversation",
    "knows": "trained on their training part (in distribution)",
}
BENCHMARKS = (
    "label",
    "rows",
    "positives",
    "recall_only",
    *MARKS,
    "file",
    "hub",
    "revision",
    "licence",
    "mismatch",
)
WITH_INTERVAL = ("f1", "f1_at_05", "f1_at_validation", "auprc", "auroc", "recall")
THRESHOLD = {"value": "flags above", "how": "chosen by", "on": "on"}
PART = {"rows": "rows", "positives": "unsafe", "f1": "F1 ↑", "auprc": "AUPRC ↑"}


def failures(results: Mapping[str, Any]) -> str:
    """What could not be measured, and why; nothing where all went well."""
    rows = []
    for cell in results["cells"]:
        if cell["status"] == "failed":
            rows.append([cell["guard"], cell["benchmark"], cell["reason"]])
    for name, reason in results["unread_benchmarks"].items():
        rows.append(["–", name, reason])
    return section("Failed", ["guard", "benchmark", "why"], rows)


def details(results: Mapping[str, Any]) -> str:
    """Guards, benchmarks, intervals, thresholds, parse errors, marked rows and paired differences.

    (Sub-groups stand in results.json.)
    """
    guards = []
    for name, guard in results["guards"].items():
        known = guard | {"knows": ", ".join(guard["knows"])}
        guards.append([name, *map(known.get, GUARDS)])
    benchmarks = []
    for name, facts in results["benchmarks"].items():
        benchmarks.append([name, *map(facts.get, BENCHMARKS)])
    intervals, thresholds, errors, marked, differences = [], [], [], [], []
    for cell in results["cells"]:
        if cell["status"] != "measured":
            continue
        names = [cell["guard"], cell["benchmark"]]
        scores = [_with_interval(cell[s], cell["intervals"].get(s)) for s in WITH_INTERVAL]
        intervals.append(names + scores)
        if cell["threshold"]:
            thresholds.append([*names, *map(cell["threshold"].get, THRESHOLD)])
        if cell["errors"]:
            by_rule = [cell["by_parse_errors"][rule]["f1"] for rule in PARSE_ERRORS]
            errors.append([*names, cell["errors"], *by_rule])
        if cell["without"]:
            marked.append([*names, "all rows", *map(cell.get, PART)])
        for mark, part in cell["without"].items():
            marked.append([*names, f"without {mark}", *map(part.get, PART)])
    for one in results["comparison"]:
        scores = [one.get(s, {"difference": None, "interval": None}) for s in COMPARED]
        texts = [_with_interval(score["difference"], score["interval"]) for score in scores]
        differences.append([one["a"], one["b"], one["benchmark"], one["rows"], *texts])
    both = ["guard", "benchmark"]
    sections = [
        section("Guards", ["", *GUARDS.values()], guards),
        section("Benchmarks", ["", *(fact.replace("_", " ") for fact in BENCHMARKS)], benchmarks),
        section(
            "95 % intervals (bootstrap over prompts)",
            both + [METRICS[s] for s in WITH_INTERVAL],
            intervals,
        ),
        section("Thresholds", both + list(THRESHOLD.values()), thresholds),
        section(
            "F1 by the rule for rows without a verdict",
            [*both, "without a verdict", *PARSE_ERRORS],
            errors,
        ),
        section("With and without marked rows", [*both, "rows that count", *PART.values()], marked),
        section(
            "Paired differences, first minus second",
            ["first", "second", "benchmark", "rows", *(METRICS[s] for s in COMPARED)],
            differences,
        ),
    ]
    return "\n".join(text for text in sections if text)


def section(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table under its title; nothing where it has no rows."""
    return f"## {title}\n\n{report.table(rows, header)}" if rows else ""


def _with_interval(value: float | None, interval: list[float] | None) -> str:
    text = report.number(value)
    return f"{text} {report.number(interval)}" if interval else text
