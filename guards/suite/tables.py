"""The results table, guards × benchmarks: one for each metric, as markdown, LaTeX and CSV, beside
what papers published.

A column holds cells that were scored alike, or none: what differs is a `UserError`, not a footnote.
Published numbers are rows of their own, marked with their source, and stand only beside a benchmark
that was judged whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import pandas
import yaml

from common import report
from common.conversation import LABELS, UserError
from common.keep import Row

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
NEED_BOTH = (
    "auprc",
    "auroc",
    "fpr",
    "recall_at_fpr01",
    "recall_at_fpr05",
)
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
Sets = Mapping[str, Sequence[str]]
Value = float | str | None  # of a cell: a number, why there is none, or None where it is undefined
Rows = dict[tuple[str, str], dict[str, Value]]  # label and source ("" is this run): values


@dataclass
class Grid:
    """A table of one metric."""

    metric: str
    columns: list[str]
    rows: list[tuple[str, str, list[Value]]]  # label, source ("" is this run), a value each column
    notes: list[str]


def published() -> Row:
    """published.yaml, its rows spelled out.

    Returns:
        `sources` {key: text}, `averages` {name: benchmarks}, `elsewhere` (guards that load_guard
        does not know), and `numbers`: one dict a number with guard, benchmark (or `average`),
        metric, decision, parse_errors, value (%) and source (a key).
    """
    path = Path(__file__).with_name("published.yaml")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    content["numbers"] = []
    for block in content.pop("blocks"):
        columns = block.pop("columns")
        for guard, values in block.pop("guards").items():
            for column, value in zip(columns, values, strict=True):
                what = "average" if column in content["averages"] else "benchmark"
                if value is not None:
                    number = {
                        "guard": guard,
                        what: column,
                        "value": float(value),
                    }
                    content["numbers"].append(number | block)
    return content


def check_column(cells: Sequence[Row], metric: str) -> None:
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
    with_value = [c for c in cells if c["status"] == "measured" and c.get(metric) is not None]
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


def grid(results: Row, metric: str, papers: Row, show: str = "run") -> Grid | None:
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
        check_column(
            [cell for cell in results["cells"] if cell["benchmark"] == name],
            metric,
        )
    sets = mean_sets(benchmarks, metric, papers["averages"])
    rows = own_rows(results, metric)
    numbers = [v for values in rows.values() for v in values.values() if isinstance(v, float)]
    if not numbers and metric != "f1":
        return None
    in_run = {guard["zoo"] for guard in results["guards"].values()}
    known = [number for number in papers["numbers"] if number["metric"] == metric]
    of_run = [number for number in known if number["guard"] in in_run]
    if show != "none":
        rows |= published_rows(known if show == "all" else of_run, benchmarks, sets)
    columns = [
        *benchmarks,
        *(f"mean of {len(sets[name])}: {name}" for name in sets),
    ]
    out = Grid(metric, columns, [], [])
    for (label, source), values in rows.items():
        means = [values.get(name, mean(values, sets[name])) for name in sets]
        out.rows.append((label, source, [*map(values.get, benchmarks), *means]))
    out.notes = notes(out, benchmarks, sets, papers)
    left_out = {number.get("benchmark") for number in of_run}
    left_out = [b for b, facts in benchmarks.items() if b in left_out and not facts["complete"]]
    if left_out:
        out.notes.append(
            "Published numbers are left out where the rows are not the whole known benchmark: "
            f"{', '.join(left_out)}."
        )
    return out


def mean_sets(benchmarks: dict[str, Row], metric: str, named: Sets) -> Sets:
    """What means are taken over: the papers' sets that are all there, and all benchmarks of one
    label.
    """
    usable = list(benchmarks)
    if metric in NEED_BOTH:
        usable = [name for name in benchmarks if not benchmarks[name]["recall_only"]]
    sets = {name: members for name, members in named.items() if set(members) <= set(usable)}
    for label in LABELS:
        members = [name for name in usable if benchmarks[name]["label"] == label]
        if len(members) > 1 and sorted(members) not in map(sorted, sets.values()):
            sets[f"all {label}"] = members
    return sets


def own_rows(results: Row, metric: str) -> Rows:
    """What this run measured: a row for each guard."""
    rows: Rows = {}
    for guard in results["guards"]:
        values: dict[str, Value] = dict.fromkeys(results["benchmarks"], NOT_MEASURED)
        mark = ""
        for cell in results["cells"]:
            if cell["guard"] != guard or cell["benchmark"] not in values:
                continue
            if cell["status"] != "measured":
                values[cell["benchmark"]] = cell["status"]
                continue
            if metric != "f1_at_validation" or cell["threshold"] is not None:
                values[cell["benchmark"]] = cell[metric]
            if metric in OWN_DECISION and cell["decision"] != "own word":
                mark = NO_WORD
        rows[guard + mark, ""] = values
    return rows


def published_rows(numbers: Sequence[Row], benchmarks: dict[str, Row], sets: Sets) -> Rows:
    """What papers say of guards on benchmarks that were judged whole, and the means that they
    print of these.
    """
    usable = {name for name, facts in benchmarks.items() if facts["complete"]}
    usable |= {name for name, members in sets.items() if usable.issuperset(members)}
    rows: Rows = {}
    for number in numbers:
        column = number.get("benchmark") or number["average"]
        if column in usable:
            decision = number["decision"]
            mode = "" if decision in ("native", "score > 0.5") else f" ({decision})"
            key = (
                f"{number['guard']}{mode}, published",
                number["source"],
            )
            rows.setdefault(key, {})[column] = number["value"] / 100
    return rows


def mean(values: Mapping[str, Value], members: Sequence[str]) -> float | None:
    """The unweighted mean, only where every member has a number."""
    picked = [values.get(name) for name in members]
    return fmean(picked) if all(isinstance(value, float) for value in picked) else None


def notes(out: Grid, benchmarks: dict[str, Row], sets: Sets, papers: Row) -> list[str]:
    """What the numbers mean, and where published ones come from."""
    found = [f"Mean, {s}: {', '.join(sets[s])}; only of rows with all of them." for s in sets]
    if any(label.endswith(NO_WORD) for label, _, _ in out.rows):
        found.append(
            f"{NO_WORD.strip()} has no word of its own, in whole or in part: there, score > 0.5 "
            "decides."
        )
    if out.metric.startswith("f1") and any(facts["recall_only"] for facts in benchmarks.values()):
        found.append(
            f"{NO_SAFE} No harmless row: F1 is 2R/(1+R), so the recall R stands beside it."
        )
    rules = {number["source"]: number["parse_errors"] for number in papers["numbers"]}
    for source in dict.fromkeys(source for _, source, _ in out.rows if source):
        text = papers["sources"][source]
        found.append(f"[{source}] {text}; rows without a verdict: {rules[source]}.")
    redacted = [f"{b} ({f['dropped']})" for b, f in benchmarks.items() if f.get("dropped")]
    if redacted:
        found.append(
            "Rows that papers count and that are left out here, redacted as they are: "
            f"{', '.join(redacted)}."
        )
    return found


# --- formats --------------------------------------------------------------------------------------


def as_text(out: Grid, benchmarks: dict[str, Row]) -> pandas.DataFrame:
    """A grid as people read it; F1 without a harmless row carries its recall."""
    table = {"": [f"{label} [{source}]" if source else label for label, source, _ in out.rows]}
    for place, column in enumerate(out.columns):
        values = [values[place] for _, _, values in out.rows]
        texts = [report.number(value) for value in values]
        recall_only = benchmarks.get(column, {}).get("recall_only")
        if recall_only and out.metric.startswith("f1"):
            column += f" {NO_SAFE}"
            for row, value in enumerate(values):
                if isinstance(value, float):
                    texts[row] += f" (R {value / (2 - value):.3f})"
        table[column] = texts
    return pandas.DataFrame(table)


def markdown(out: Grid, benchmarks: dict[str, Row]) -> str:
    """A grid as a markdown section."""
    table = as_text(out, benchmarks)
    text = report.table(table.to_numpy().tolist(), list(table))
    listed = "".join(f"- {note}\n" for note in out.notes)
    return f"## {METRICS[out.metric]}\n\n{text}\n{listed}"


def latex(out: Grid, benchmarks: dict[str, Row]) -> str:
    """A grid as a LaTeX table (package booktabs); notes stand in the caption."""
    caption = " ".join([f"{METRICS[out.metric]}.", *out.notes])
    for character in "&%$#_":
        caption = caption.replace(character, f"\\{character}")
    columns = "l" + "r" * len(out.columns)
    table = as_text(out, benchmarks)
    text = table.to_latex(
        index=False,
        escape=True,
        caption=caption,
        column_format=columns,
    )
    return text.translate(str.maketrans(LATEX))


def csv_text(grids: Sequence[Grid]) -> str:
    """All grids as one CSV file: metric, guard, source (empty: this run), a column a benchmark and
    mean.
    """
    rows = []
    for out in grids:
        for label, source, values in out.rows:
            row = {
                "metric": out.metric,
                "guard": label.removesuffix(NO_WORD),
                "source": source,
            }
            rows.append(row | dict(zip(out.columns, values, strict=True)))
    return pandas.DataFrame(rows).to_csv(index=False)
