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

from common import report
from common.conversation import LABELS, UserError
from common.data.files import read_yaml
from common.keep import Row
from guards.base import DECIDED_BY

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
    content = read_yaml(Path(__file__).with_name("published.yaml"))
    content["numbers"] = []
    for block in content.pop("blocks"):
        columns = block.pop("columns")
        is_recall = block["metric"] == "recall_at_05"
        if is_recall:
            block["metric"] = "f1_at_05"
        for guard, values in block.pop("guards").items():
            for column, value in zip(columns, values, strict=True):
                what = "average" if column in content["averages"] else "benchmark"
                if value is None:
                    continue
                if is_recall:  # without a harmless row, precision is 1
                    value = 200 * value / (100 + value)
                number = {"guard": guard, what: column, "value": float(value)}
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
    measured = [cell for cell in cells if cell["status"] == "measured"]
    with_value = [cell for cell in measured if cell.get(metric) is not None]
    for cell in with_value[1:]:
        check_alike(with_value[0], cell, keys, METRICS[metric])


def check_alike(
    first: Row,
    second: Row,
    keys: Sequence[str],
    metric: str,
) -> None:
    """Refuse two cells whose conventions differ in one of these keys."""
    for key in keys:
        a = first["convention"][key]
        b = second["convention"][key]
        if a != b:
            raise UserError(
                f"{second['benchmark']}, {metric}: {first['guard']} and {second['guard']} are "
                f"scored differently ({key}: {a} | {b}) and cannot stand in one column; score "
                "both alike, or leave one out"
            )


def grid(
    results: Row,
    metric: str,
    papers: Row,
    show: str = "run",
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
    rows = own_rows(results, metric)
    if metric != "f1" and not any(map(has_number, rows.values())):
        return None
    sets = mean_sets(benchmarks, metric, papers["averages"])
    in_run = {guard["zoo"] for guard in results["guards"].values()}
    for number in papers["numbers"] if show != "none" else ():
        if number["metric"] == metric and (show == "all" or number["guard"] in in_run):
            add_published(rows, number, benchmarks, sets)
    said = notes(rows, metric, benchmarks, sets, papers)
    if metric in OWN_DECISION:
        said += other_rules(results["guards"])
    out = Grid(metric, list(benchmarks), [], said)
    for name, members in sets.items():
        out.columns.append(f"mean of {len(members)}: {name}")
    for (label, source), values in rows.items():
        cells = [values.get(name) for name in benchmarks]
        for name, members in sets.items():
            cells.append(values.get(name, mean(values, members)))
        out.rows.append((label, source, cells))
    return out


def has_number(values: Mapping[str, Value]) -> bool:
    """Whether anything was measured in a row."""
    return any(isinstance(value, float) for value in values.values())


def mean_sets(
    benchmarks: dict[str, Row],
    metric: str,
    named: Sets,
) -> Sets:
    """What means are taken over: the papers' sets that are all there, and all benchmarks of one
    label that are not obfuscated.
    """
    usable = [name for name in benchmarks if not benchmarks[name].get("modifier")]
    if metric in NEED_BOTH:
        usable = [name for name in usable if not benchmarks[name]["recall_only"]]
    sets = {}
    for name, members in named.items():
        if set(members) <= set(usable):
            sets[name] = members
    known = [set(members) for members in sets.values()]
    for label in LABELS:
        members = [name for name in usable if benchmarks[name]["label"] == label]
        if len(members) > 1 and set(members) not in known:
            sets[f"all {label}"] = members
    return sets


def own_rows(results: Row, metric: str) -> Rows:
    """What this run measured: a row for each guard."""
    rows: Rows = {}
    for guard in results["guards"]:
        values: dict[str, Value] = dict.fromkeys(results["benchmarks"], NOT_MEASURED)
        mark = ""
        for cell in results["cells"]:
            name = cell["benchmark"]
            if cell["guard"] != guard or name not in values:
                continue
            if cell["status"] != "measured":
                values[name] = cell["status"]
            elif metric != "f1_at_validation" or cell["threshold"] is not None:
                values[name] = cell[metric]
            if metric in OWN_DECISION and cell.get("decision", "").startswith("score >"):
                mark = NO_WORD
        rows[guard + mark, ""] = values
    return rows


def add_published(
    rows: Rows,
    number: Row,
    benchmarks: dict[str, Row],
    sets: Sets,
) -> None:
    """Put what a paper says of a guard into a row of its own, if the benchmark, or each of a mean,
    was judged whole.
    """
    column = number.get("benchmark") or number["average"]
    members = sets.get(column, [column])
    if not all(name in benchmarks and benchmarks[name]["complete"] for name in members):
        return
    label = number["guard"]
    if number["decision"] not in ("native", "score > 0.5"):
        label += f" ({number['decision']})"
    values = rows.setdefault((f"{label}, published", number["source"]), {})
    values[column] = number["value"] / 100


def mean(values: Mapping[str, Value], members: Sequence[str]) -> float | None:
    """The unweighted mean, only where every member has a number."""
    picked = [values.get(name) for name in members]
    if not all(isinstance(value, float) for value in picked):
        return None
    return fmean(picked)


def notes(
    rows: Rows,
    metric: str,
    benchmarks: dict[str, Row],
    sets: Sets,
    papers: Row,
) -> list[str]:
    """What the numbers mean, and where published ones come from."""
    found = []
    for name, members in sets.items():
        found.append(f"Mean, {name}: {', '.join(members)}; only of rows with all of them.")
    if any(label.endswith(NO_WORD) for label, _ in rows):
        what = (
            "is not decided by the guard's own words: the threshold of its guard.json decides, or, "
            "where it has neither, score > 0.5"
        )
        found.append(f"{NO_WORD.strip()} {what}.")
    without_safe = any(facts["recall_only"] for facts in benchmarks.values())
    if without_safe and metric.startswith("f1"):
        what = "No harmless row: F1 is 2R/(1+R), so the recall R stands beside it"
        found.append(f"{NO_SAFE} {what}.")
    rules = {number["source"]: number["parse_errors"] for number in papers["numbers"]}
    for source in dict.fromkeys(source for _, source in rows if source):
        text = papers["sources"][source]
        found.append(f"[{source}] {text}; rows without a verdict: {rules[source]}.")
    partial = []
    for name, facts in benchmarks.items():
        if not facts["complete"] and not facts.get("own"):
            partial.append(name)
    if partial:
        what = "are left out where the rows are not the whole known benchmark"
        found.append(f"Published numbers {what}: {', '.join(partial)}.")
    return found


def other_rules(guards: Mapping[str, Row]) -> list[str]:
    """A note on guards of added results whose own decision followed another rule, if any did."""
    by_rule: dict[str | None, list[str]] = {}
    for name, facts in guards.items():
        by_rule.setdefault(facts.get("decided_by"), []).append(name)
    by_rule.pop(DECIDED_BY, None)
    found = []
    for rule, names in by_rule.items():
        theirs = f"by {rule}" if rule else "by a rule that their results.json does not say"
        hint = "judge them again to compare"
        found.append(f"Decided {theirs}: {', '.join(names)}; all others by {DECIDED_BY}; {hint}.")
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
    text = as_text(out, benchmarks).to_latex(
        index=False, escape=True, caption=caption, column_format=columns
    )
    return text.translate(str.maketrans(LATEX))


def csv_text(grids: Sequence[Grid]) -> str:
    """All grids as one CSV file: metric, guard, source (empty: this run), a column a benchmark and
    mean.
    """
    rows = []
    for out in grids:
        for label, source, values in out.rows:
            guard = label.removesuffix(NO_WORD)
            row = {"metric": out.metric, "guard": guard, "source": source}
            rows.append(row | dict(zip(out.columns, values, strict=True)))
    return pandas.DataFrame(rows).to_csv(index=False)
