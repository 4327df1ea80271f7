"""The results table, guards × benchmarks: one for each metric, as markdown, LaTeX and CSV, beside
what papers published.

A column holds cells that were scored alike, or none: what differs is a `UserError`, not a footnote.
Published numbers are rows of their own, marked with their source, and stand only beside a benchmark
that was judged whole.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas
import yaml

from common import report
from common.conversation import UserError

# metric of a cell: heading with its direction
METRICS = {
    "f1": "F1 at the guard's own decision ↑",
    "f1_at_05": "F1 at score > 0.5 ↑",
    "f1_at_validation": "F1 at the threshold of the validation data ↑",
    "auprc": "AUPRC ↑",
    "auroc": "AUROC ↑",
    "recall": "Recall at the guard's own decision ↑",
    "fpr": "False-positive rate at the guard's own decision ↓",
    "recall_at_fpr01": "Recall at 1 % false positives ↑",
    "recall_at_fpr05": "Recall at 5 % false positives ↑",
    "error_rate": "Share of rows without a verdict ↓",
}
OWN_DECISION = ("f1", "recall", "fpr")
# undefined without a harmless row
NEED_BOTH = ("auprc", "auroc", "fpr", "recall_at_fpr01", "recall_at_fpr05")
NOT_MEASURED = "not measured"
NO_WORD = " †"
NO_SAFE = "‡"
# what LaTeX has no letter for in every font encoding
LATEX = {
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "†": r"$\dagger$",
    "‡": r"$\ddagger$",
    "–": "--",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}
Value = float | str | None  # of a cell: a number, why there is none, or None where it is undefined
GridRow = tuple[str, str, list[Value]]  # label, source ("" is this run), a value for each column


@dataclass
class Grid:
    """A table of one metric."""

    metric: str
    columns: list[str]
    rows: list[GridRow]
    notes: list[str]


def published(path: Path | None = None) -> dict[str, Any]:
    """published.yaml, its rows spelled out.

    Returns:
        `sources` {key: text}, `averages` {name: benchmarks}, `elsewhere` (guards that load_guard
        does not know), and `numbers`: one dict a number with guard, benchmark (or `average`),
        metric, decision, parse_errors, value (%) and source (a key).
    """
    path = path or Path(__file__).with_name("published.yaml")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["numbers"] = []
    for block in content.pop("blocks"):
        columns = block.pop("columns")
        for guard, values in block.pop("guards").items():
            if len(values) != len(columns):
                where = f"{path.name}: {block['source']}, {guard}"
                raise UserError(f"{where}: {len(values)} numbers, not a column each")
            for column, value in zip(columns, values, strict=True):
                what = "average" if column in content["averages"] else "benchmark"
                if value is not None:
                    number = {"guard": guard, what: column, "value": float(value)}
                    content["numbers"].append(number | block)
    return content


def check_column(cells: Iterable[Mapping[str, Any]], metric: str) -> None:
    """Refuse cells of one benchmark that were not scored alike.

    Raises:
        UserError: row set, parse-error rule or kind of threshold differ between two cells with a
        value.
    """
    keys = ["rows"]
    if metric != "error_rate":
        keys.append("parse_errors")
    if metric == "f1_at_validation":
        keys.append("threshold")
    measured = [cell for cell in cells if cell["status"] == "measured"]
    with_value = [cell for cell in measured if cell.get(metric) is not None]
    for cell in with_value[1:]:
        first = with_value[0]
        for key in keys:
            a, b = first["convention"][key], cell["convention"][key]
            if a != b:
                raise UserError(
                    f"{cell['benchmark']}, {METRICS[metric]}: {first['guard']} and "
                    f"{cell['guard']} are scored differently ({key}: {a} | {b}) and cannot stand "
                    "in one column; score both alike, or leave one out"
                )


def grid(
    results: Mapping[str, Any], metric: str, papers: Mapping[str, Any], show: str = "run"
) -> Grid | None:
    """The table of one metric; None where no guard has a value, but for F1, which says why.

    Args:
        results: `benchmarks` {name: {label, recall_only, complete, …}}, `guards` {name: {zoo, …}}
        and `cells`.
        papers: `published()`.
        show: published rows of the guards of this "run", of "all" guards, or "none".

    Raises:
        UserError: see `check_column`.
    """
    benchmarks = results["benchmarks"]
    for name in benchmarks:
        check_column([cell for cell in results["cells"] if cell["benchmark"] == name], metric)
    sets = mean_sets(benchmarks, metric, papers["averages"])
    rows = [own_row(results, guard, metric, sets) for guard in results["guards"]]
    numbers = [value for _, _, values in rows for value in values if isinstance(value, float)]
    if not numbers and metric != "f1":
        return None
    known = [number for number in papers["numbers"] if number["metric"] == metric]
    in_run = {guard["zoo"] for guard in results["guards"].values()}
    if show != "none":
        shown = [number for number in known if show == "all" or number["guard"] in in_run]
        rows += published_rows(shown, benchmarks, sets)
    columns = [*benchmarks]
    columns += [f"mean of {len(members)}: {name}" for name, members in sets.items()]
    out = Grid(metric, columns, rows, [])
    out.notes += notes_on_scores(out, benchmarks, sets)
    published_here = {n.get("benchmark") for n in known if n["guard"] in in_run}
    out.notes += notes_on_papers(out, benchmarks, papers, published_here)
    return out


def mean_sets(
    benchmarks: Mapping[str, Any], metric: str, named: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """What means are taken over: the papers' sets that are all there, and all benchmarks of one
    label.
    """
    labels: dict[str, list[str]] = {}
    for name, known in benchmarks.items():
        usable = labels.setdefault(known["label"], [])
        if not (metric in NEED_BOTH and known["recall_only"]):
            usable.append(name)
    usable = {name for names in labels.values() for name in names}
    sets = {name: list(members) for name, members in named.items() if usable.issuperset(members)}
    for label, members in labels.items():
        if len(members) > 1 and set(members) not in map(set, sets.values()):
            sets[f"all {label}"] = members
    return sets


def own_row(
    results: Mapping[str, Any], guard: str, metric: str, sets: Mapping[str, Sequence[str]]
) -> GridRow:
    """What this run measured of a guard."""
    cells = {cell["benchmark"]: cell for cell in results["cells"] if cell["guard"] == guard}
    values = {name: cell_value(cells.get(name), metric) for name in results["benchmarks"]}
    measured = [cell for cell in cells.values() if cell["status"] == "measured"]
    wordless = any(cell["decision"] != "own word" for cell in measured)
    mark = NO_WORD if wordless and metric in OWN_DECISION else ""
    means = [mean(values, members) for members in sets.values()]
    return guard + mark, "", [*values.values(), *means]


def cell_value(cell: Mapping[str, Any] | None, metric: str) -> Value:
    """The number of a cell, or why it has none."""
    if cell is None:
        return NOT_MEASURED
    if cell["status"] != "measured":
        return cell["status"]
    if metric == "f1_at_validation" and cell["threshold"] is None:
        return NOT_MEASURED
    return cell[metric]


def mean(values: Mapping[str, Value], members: Sequence[str]) -> float | None:
    """The unweighted mean, only where every member has a number."""
    picked = [values[name] for name in members]
    return fmean(picked) if all(isinstance(value, float) for value in picked) else None


def published_rows(
    numbers: Sequence[Mapping[str, Any]],
    benchmarks: Mapping[str, Any],
    sets: Mapping[str, Sequence[str]],
) -> list[GridRow]:
    """What papers say of guards on benchmarks that were judged whole."""
    found: dict[tuple, dict[str, float]] = {}
    for number in numbers:
        key = (number["guard"], number["source"], number["decision"], number["parse_errors"])
        column = number.get("benchmark") or number["average"]
        found.setdefault(key, {})[column] = number["value"] / 100
    whole = {name for name, known in benchmarks.items() if known["complete"]}
    rows = []
    for (guard, source, decision, _), known in found.items():
        own = {name: known.get(name) if name in whole else None for name in benchmarks}
        values = list(own.values())
        for name, members in sets.items():
            printed = known.get(name) if whole.issuperset(members) else None
            values.append(mean(own, members) if printed is None else printed)
        if any(value is not None for value in values):
            mode = "" if decision in ("native", "score > 0.5") else f" ({decision})"
            rows.append((f"{guard}{mode}, published", source, values))
    return rows


def notes_on_scores(
    out: Grid, benchmarks: Mapping[str, Any], sets: Mapping[str, Sequence[str]]
) -> list[str]:
    """What the numbers of this run mean."""
    notes = [
        f"Mean, {name}: {', '.join(members)}; only of rows with all of them."
        for name, members in sets.items()
    ]
    if any(label.endswith(NO_WORD) for label, _, _ in out.rows):
        notes.append(
            f"{NO_WORD.strip()} has no word of its own, in whole or in part: there, score > 0.5 "
            "decides."
        )
    if out.metric.startswith("f1") and any(known["recall_only"] for known in benchmarks.values()):
        notes.append(
            f"{NO_SAFE} No harmless row: F1 is 2R/(1+R), so the recall R stands beside it."
        )
    return notes


def notes_on_papers(
    out: Grid, benchmarks: Mapping[str, Any], papers: Mapping[str, Any], published_here: set[str]
) -> list[str]:
    """Where published numbers come from, and which are left out."""
    notes = []
    rules = {number["source"]: number["parse_errors"] for number in papers["numbers"]}
    for source in dict.fromkeys(source for _, source, _ in out.rows if source):
        text = papers["sources"][source]
        notes.append(f"[{source}] {text}; rows without a verdict: {rules[source]}.")
    redacted, incomplete = [], []
    for name, known in benchmarks.items():
        if known.get("dropped"):
            redacted.append(f"{name} ({known['dropped']})")
        if name in published_here and not known["complete"]:
            incomplete.append(name)
    if redacted:
        notes.append(
            "Rows that papers count and that are left out here, redacted as they are: "
            f"{', '.join(redacted)}."
        )
    if incomplete:
        notes.append(
            "Published numbers are left out where the rows are not the whole known benchmark: "
            f"{', '.join(incomplete)}."
        )
    return notes


# --- formats --------------------------------------------------------------------------------------


def as_text(out: Grid, benchmarks: Mapping[str, Any]) -> pandas.DataFrame:
    """A grid as people read it; F1 without a harmless row carries its recall."""
    labels = [f"{label} [{source}]" if source else label for label, source, _ in out.rows]
    table = {"": labels}
    for place, column in enumerate(out.columns):
        values = [values[place] for _, _, values in out.rows]
        texts = [report.number(value) for value in values]
        recall_only = benchmarks.get(column, {}).get("recall_only", False)
        if recall_only and out.metric.startswith("f1"):
            column += f" {NO_SAFE}"
            for row, value in enumerate(values):
                if isinstance(value, float):
                    texts[row] += f" (R {value / (2 - value):.3f})"
        table[column] = texts
    return pandas.DataFrame(table)


def markdown(out: Grid, benchmarks: Mapping[str, Any]) -> str:
    """A grid as a markdown section."""
    table = as_text(out, benchmarks)
    text = report.table(table.to_numpy().tolist(), list(table.columns))
    notes = "".join(f"- {note}\n" for note in out.notes)
    return f"## {METRICS[out.metric]}\n\n{text}\n{notes}"


def latex(out: Grid, benchmarks: Mapping[str, Any]) -> str:
    """A grid as a LaTeX table (package booktabs); notes stand in the caption."""
    caption = " ".join([f"{METRICS[out.metric]}.", *out.notes])
    for character in "&%$#_":
        caption = caption.replace(character, f"\\{character}")
    table = as_text(out, benchmarks)
    text = table.to_latex(
        index=False,
        escape=True,
        caption=caption,
        column_format="l" + "r" * len(out.columns),
    )
    return text.translate(str.maketrans(LATEX))


def csv_text(grids: Sequence[Grid]) -> str:
    """All grids as one CSV file: metric, guard, source (empty: this run), a column a benchmark and
    mean.
    """
    rows = []
    for out in grids:
        for label, source, values in out.rows:
            row = {"metric": out.metric, "guard": label.removesuffix(NO_WORD), "source": source}
            rows.append(row | dict(zip(out.columns, values, strict=True)))
    return pandas.DataFrame(rows).to_csv(index=False)
