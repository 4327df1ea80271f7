"""What results.md says beside the tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from common import report
from guards.suite.score import COMPARED, MARKS, PARSE_ERRORS
from guards.suite.tables import METRICS


def failures(results: Mapping[str, Any]) -> str:
    """What could not be measured, and why; nothing where all went well."""
    rows = [
        [c["guard"], c["benchmark"], c["reason"]]
        for c in results["cells"]
        if c["status"] == "failed"
    ]
    rows += [["–", name, reason] for name, reason in results["unread_benchmarks"].items()]
    return "## Failed\n\n" + report.table(rows, ["guard", "benchmark", "why"]) if rows else ""


def details(results: Mapping[str, Any]) -> str:
    """Guards, benchmarks, intervals, thresholds, parse errors, sub-groups, marked rows and paired
    differences.
    """
    measured = [c for c in results["cells"] if c["status"] == "measured"]
    facts = (
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
    known = [[name, *(b.get(fact) for fact in facts)] for name, b in results["benchmarks"].items()]
    guards = [
        [name, g["spec"], g["zoo"], g.get("sees"), ", ".join(g["knows"])]
        for name, g in results["guards"].items()
    ]
    heads = [
        "",
        "loaded from",
        "in the zoo",
        "sees of a conversation",
        "trained on their training part (in distribution)",
    ]
    sections = {"Guards": (guards, heads)}
    sections["Benchmarks"] = (known, ["", *(fact.replace("_", " ") for fact in facts)])
    scores = ("f1", "f1_at_05", "f1_at_validation", "auprc", "auroc", "recall")
    sections["95 % intervals (bootstrap over prompts)"] = (
        [
            [
                c["guard"],
                c["benchmark"],
                *(_with_interval(c[s], c["intervals"].get(s)) for s in scores),
            ]
            for c in measured
        ],
        ["guard", "benchmark", *(METRICS[s][0] for s in scores)],
    )
    sections["Thresholds"] = (
        [
            [c["guard"], c["benchmark"], *map(c["threshold"].get, ("value", "how", "on"))]
            for c in measured
            if c["threshold"]
        ],
        ["guard", "benchmark", "flags above", "chosen by", "on"],
    )
    sections["F1 by the rule for rows without a verdict"] = (
        [
            [
                c["guard"],
                c["benchmark"],
                c["errors"],
                *(c["by_parse_errors"][rule]["f1"] for rule in PARSE_ERRORS),
            ]
            for c in measured
            if c["errors"]
        ],
        ["guard", "benchmark", "without a verdict", *PARSE_ERRORS],
    )
    sections |= _parts(measured)
    sections["Paired differences, first minus second"] = (
        [
            [
                c["a"],
                c["b"],
                c["benchmark"],
                c["rows"],
                *(_with_interval(*_difference(c.get(m))) for m in COMPARED),
            ]
            for c in results["comparison"]
        ],
        ["first", "second", "benchmark", "rows", *(METRICS[m][0] for m in COMPARED)],
    )
    return "\n".join(
        f"## {title}\n\n{report.table(*table)}" for title, table in sections.items() if table[0]
    )


def _parts(measured: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[list], list[str]]]:
    """Scores of sub-groups, and with and without marked rows."""
    sections = {}
    sections["Sub-groups"] = (
        [
            [
                c["guard"],
                c["benchmark"],
                f"{name} = {value}",
                *(p[k] for k in ("rows", "positives", "f1", "recall", "fpr")),
            ]
            for c in measured
            for name, values in c["groups"].items()
            for value, p in values.items()
        ],
        ["guard", "benchmark", "sub-group", "rows", "unsafe", "F1 ↑", "recall ↑", "FPR ↓"],
    )
    sections["With and without marked rows"] = (
        [
            [
                c["guard"],
                c["benchmark"],
                name,
                *(p[k] for k in ("rows", "positives", "f1", "auprc")),
            ]
            for c in measured
            if c["without"]
            for name, p in [
                ("all rows", c),
                *((f"without {n}", p) for n, p in c["without"].items()),
            ]
        ],
        ["guard", "benchmark", "rows that count", "rows", "unsafe", "F1 ↑", "AUPRC ↑"],
    )
    return sections


def _difference(found: Mapping[str, Any] | None) -> tuple[float | None, list[float] | None]:
    return (None, None) if found is None else (found["difference"], found["interval"])


def _with_interval(value: float | None, interval: list[float] | None) -> str:
    return report.number(value) + (f" {report.number(interval)}" if interval else "")
