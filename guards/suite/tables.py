"""The results table, guards × benchmarks: one a metric, as markdown, LaTeX and CSV, beside what
papers published.

A column holds cells that were scored alike, or none: what differs is a `UserError`, not a footnote.
Published numbers are rows of their own, marked with their source, and stand only beside a benchmark
that was judged whole.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from common import report
from common.conversation import UserError

# metric of a cell: heading with its direction, and what of a cell's `convention` must be equal
METRICS = {
    "f1": ("F1 at the guard's own decision ↑", ("rows", "parse_errors")),
    "f1_at_05": ("F1 at score > 0.5 ↑", ("rows", "parse_errors")),
    "f1_at_validation": (
        "F1 at the threshold of the validation data ↑",
        ("rows", "parse_errors", "threshold"),
    ),
    "auprc": ("AUPRC ↑", ("rows", "parse_errors")),
    "auroc": ("AUROC ↑", ("rows", "parse_errors")),
    "recall": ("Recall at the guard's own decision ↑", ("rows", "parse_errors")),
    "fpr": ("False-positive rate at the guard's own decision ↓", ("rows", "parse_errors")),
    "recall_at_fpr01": ("Recall at 1 % false positives ↑", ("rows", "parse_errors")),
    "recall_at_fpr05": ("Recall at 5 % false positives ↑", ("rows", "parse_errors")),
    "error_rate": ("Share of rows without a verdict ↓", ("rows",)),
}
OWN_DECISION = ("f1", "recall", "fpr")
# undefined without a harmless row
NEED_BOTH = ("auprc", "auroc", "fpr", "recall_at_fpr01", "recall_at_fpr05")
NOT_MEASURED, NO_WORD, NO_SAFE = "not measured", " †", "‡"
Value = float | str | None


@dataclass
class Grid:
    """A table of one metric. A row is its label, its source ("" is this run) and a value a column."""

    metric: str
    columns: list[str]
    rows: list[tuple[str, str, list[Value]]]
    notes: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        return METRICS[self.metric][0]


def published(path: Path | None = None) -> dict[str, Any]:
    """published.yaml, its rows spelled out.

    Returns:
        `sources` {key: text}, `averages` {name: benchmarks}, `elsewhere` (guards that load_guard
        does not know), and `numbers`: one dict a number with guard, benchmark (or `average`),
        metric, decision, parse_errors, value (%) and source (a key).
    """
    path = path or Path(__file__).with_name("published.yaml")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    numbers = []
    for block in content["blocks"]:
        scored = {key: block[key] for key in ("source", "metric", "decision", "parse_errors")}
        for guard, values in block["guards"].items():
            if len(values) != len(block["columns"]):
                raise UserError(
                    f"{path.name}: {block['source']}, {guard}: {len(values)} numbers, not a column each"
                )
            for column, value in zip(block["columns"], values, strict=True):
                what = "average" if column in content["averages"] else "benchmark"
                if value is not None:
                    numbers.append({"guard": guard, what: column, "value": float(value)} | scored)
    return {key: content[key] for key in ("sources", "averages", "elsewhere")} | {
        "numbers": numbers
    }


def check_column(cells: Iterable[Mapping[str, Any]], metric: str) -> None:
    """Refuse cells of one benchmark that were not scored alike.

    Raises:
        UserError: row set, parse-error rule or kind of threshold differ between two cells with a
        value.
    """
    first, keys = None, METRICS[metric][1]
    for cell in cells:
        if cell["status"] != "measured" or cell.get(metric) is None:
            continue
        first = first or cell
        for key in keys:
            a, b = first["convention"][key], cell["convention"][key]
            if a != b:
                raise UserError(
                    f"{cell['benchmark']}, {METRICS[metric][0]}: {first['guard']} and {cell['guard']} are scored "
                    f"differently ({key}: {a} | {b}) and cannot stand in one column; score both alike, or leave one out"
                )


def grid(
    results: Mapping[str, Any], metric: str, papers: Mapping[str, Any], show: str = "run"
) -> Grid | None:
    """The table of one metric; None where no guard has a value, but for F1, which says why.

    Args:
        results: `benchmarks` {name: {label, recall_only, complete, …}}, `guards` {name: {zoo, …}}
        and `cells`.
        papers: `published()`. show: published rows of the guards of this "run", of "all" guards, or
        "none".

    Raises:
        UserError: see `check_column`.
    """
    benchmarks, cells = (
        results["benchmarks"],
        {(c["guard"], c["benchmark"]): c for c in results["cells"]},
    )
    for name in benchmarks:
        check_column([c for (_, b), c in cells.items() if b == name], metric)
    sets = mean_sets(benchmarks, metric, papers["averages"])
    out = Grid(
        metric,
        [*benchmarks, *(f"mean of {len(members)}: {name}" for name, members in sets.items())],
        [],
    )
    for guard in results["guards"]:
        own = {name: _value(cells.get((guard, name)), metric) for name in benchmarks}
        worded = [
            c["decision"] == "own word"
            for (g, _), c in cells.items()
            if g == guard and c["status"] == "measured"
        ]
        mark = NO_WORD if worded and not all(worded) and metric in OWN_DECISION else ""
        out.rows.append(
            (guard + mark, "", [*own.values(), *(_mean(own, members) for members in sets.values())])
        )
    if metric != "f1" and not any(
        isinstance(value, float) for _, _, values in out.rows for value in values
    ):
        return None
    wanted = {known["zoo"] for known in results["guards"].values()}
    numbers = [n for n in papers["numbers"] if n["metric"] == metric]
    rows: dict[tuple, dict[str, float]] = {}
    for n in numbers if show != "none" else ():
        if show == "all" or n["guard"] in wanted:
            key = (n["guard"], n["source"], n["decision"], n["parse_errors"])
            rows.setdefault(key, {})[n.get("benchmark") or n["average"]] = n["value"] / 100
    whole = {name for name, known in benchmarks.items() if known["complete"]}
    for (guard, source, decision, _), known in rows.items():
        own = {name: known.get(name) if name in whole else None for name in benchmarks}
        means = [
            _published_mean(known, own, name, members, whole) for name, members in sets.items()
        ]
        if any(value is not None for value in (*own.values(), *means)):
            mode = "" if decision in ("native", "score > 0.5") else f" ({decision})"
            out.rows.append((f"{guard}{mode}, published", source, [*own.values(), *means]))
    out.notes = _notes(
        out, benchmarks, sets, papers, [n for n in numbers if n["guard"] in wanted], whole
    )
    return out


def mean_sets(
    benchmarks: Mapping[str, Any], metric: str, named: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """What means are taken over: the papers' sets that are all there, and all benchmarks of one
    label.
    """
    usable = [
        n for n, known in benchmarks.items() if not (metric in NEED_BOTH and known["recall_only"])
    ]
    sets = {name: list(members) for name, members in named.items() if set(members) <= set(usable)}
    for label in dict.fromkeys(known["label"] for known in benchmarks.values()):
        members = [name for name in usable if benchmarks[name]["label"] == label]
        if len(members) > 1 and set(members) not in map(set, sets.values()):
            sets[f"all {label}"] = members
    return sets


def _value(cell: Mapping[str, Any] | None, metric: str) -> Value:
    if cell is None:
        return NOT_MEASURED
    if cell["status"] != "measured":
        return cell["status"]
    unfitted = metric == "f1_at_validation" and cell["threshold"] is None
    return NOT_MEASURED if unfitted else None if cell[metric] is None else float(cell[metric])


def _mean(values: Mapping[str, Value], members: Sequence[str]) -> float | None:
    """The unweighted mean, only where every member has a number."""
    picked = [values[name] for name in members]
    return fmean(picked) if all(isinstance(value, float) for value in picked) else None


def _published_mean(
    known: Mapping, own: Mapping, name: str, members: Sequence[str], whole: set[str]
) -> float | None:
    """The mean that the paper prints, else that of its numbers."""
    return known[name] if name in known and set(members) <= whole else _mean(own, members)


def _notes(out: Grid, benchmarks, sets, papers, numbers, whole) -> list[str]:
    notes = [
        f"Mean, {name}: {', '.join(members)}; only of rows with all of them."
        for name, members in sets.items()
    ]
    if any(label.endswith(NO_WORD) for label, _, _ in out.rows):
        notes.append(
            f"{NO_WORD.strip()} has no word of its own, in whole or in part: there, score > 0.5 decides."
        )
    if out.metric.startswith("f1") and any(known["recall_only"] for known in benchmarks.values()):
        notes.append(
            f"{NO_SAFE} No harmless row: F1 is 2R/(1+R), so the recall R stands beside it."
        )
    for source in dict.fromkeys(source for _, source, _ in out.rows if source):
        (rule,) = {n["parse_errors"] for n in papers["numbers"] if n["source"] == source}
        notes.append(f"[{source}] {papers['sources'][source]}; rows without a verdict: {rule}.")
    left_out = {n["benchmark"] for n in numbers if n.get("benchmark") in set(benchmarks) - whole}
    if dropped := [
        f"{name} ({known['dropped']})" for name, known in benchmarks.items() if known.get("dropped")
    ]:
        notes.append(
            f"Rows that papers count and that are left out here, redacted as they are: {', '.join(dropped)}."
        )
    if left_out:
        names = ", ".join(name for name in benchmarks if name in left_out)
        notes.append(
            f"Published numbers are left out where the rows are not the whole known benchmark: {names}."
        )
    return notes


# --- formats ----------------------------------------------------------------------------------------------------------


def _texts(out: Grid, benchmarks: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells as text; F1 without a harmless row carries its recall."""
    bare = [
        out.metric.startswith("f1") and benchmarks.get(c, {}).get("recall_only", False)
        for c in out.columns
    ]
    lines = []
    for label, source, values in out.rows:
        texts = [
            f"{value:.3f} (R {value / (2 - value):.3f})"
            if alone and isinstance(value, float)
            else report.number(value)
            for value, alone in zip(values, bare, strict=True)
        ]
        lines.append([f"{label} [{source}]" if source else label, *texts])
    return [
        "",
        *(f"{c} {NO_SAFE}" if alone else c for c, alone in zip(out.columns, bare, strict=True)),
    ], lines


def markdown(out: Grid, benchmarks: Mapping[str, Any]) -> str:
    """A grid as a markdown section."""
    header, lines = _texts(out, benchmarks)
    notes = "".join(f"- {note}\n" for note in out.notes)
    return f"## {out.title}\n\n{report.table(lines, header)}\n{notes}"


_LATEX = {"\\": r"\textbackslash{}"} | {c: f"\\{c}" for c in "&%$#_{}"}
_LATEX |= {
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}
_LATEX |= {
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "†": r"$\dagger$",
    "‡": r"$\ddagger$",
    "–": "--",
}


def latex(out: Grid, benchmarks: Mapping[str, Any]) -> str:
    """A grid as a LaTeX table (package booktabs); notes stand in the caption."""
    escape = lambda text: "".join(_LATEX.get(c, c) for c in text)  # noqa: E731
    header, lines = _texts(out, benchmarks)
    body = [" & ".join(map(escape, line)) + r" \\" for line in lines]
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{escape(' '.join([out.title + '.', *out.notes]))}}}",
            rf"\begin{{tabular}}{{l{'r' * len(out.columns)}}}",
            r"\toprule",
            " & ".join(map(escape, header)) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def csv_text(grids: Sequence[Grid]) -> str:
    """All grids as one CSV file: metric, guard, source (empty: this run), a column a benchmark and
    mean.
    """
    columns = list(dict.fromkeys(column for out in grids for column in out.columns))
    text = io.StringIO()
    writer = csv.DictWriter(
        text, ["metric", "guard", "source", *columns], restval="", lineterminator="\n"
    )
    writer.writeheader()
    for out in grids:
        for label, source, values in out.rows:
            known = {"metric": out.metric, "guard": label.removesuffix(NO_WORD), "source": source}
            writer.writerow(
                known
                | dict(zip(out.columns, ("" if v is None else v for v in values), strict=True))
            )
    return text.getvalue()
