"""What a run leaves for people: markdown tables, pictures, the model card. Numbers come from
`common.metrics`.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from sklearn.metrics import precision_recall_curve

from common.run import atomic_path, json_lines, json_text, write_text

COLUMNS = {  # metric: heading with its direction
    "support": "rows",
    "positives": "unsafe",
    "auprc": "AUPRC ↑",
    "base_rate": "base rate",
    "auroc": "AUROC ↑",
    "f1": "F1 ↑",
    "precision": "precision ↑",
    "recall": "recall ↑",
    "fpr": "FPR ↓",
    "recall_at_fpr01": "recall at FPR 1 % ↑",
    "recall_at_fpr05": "recall at FPR 5 % ↑",
    "ece": "ECE ↓",
    "brier": "Brier ↓",
}
CATEGORY_COLUMNS = COLUMNS | {"threshold": "threshold"}  # a category may have its own
logger = logging.getLogger(__name__)
LINE_STYLES = (
    "solid",
    "dashed",
    "dashdot",
    (0, (1, 1)),
    (0, (5, 1)),
)


def number(value: Any) -> str:
    """A cell: three decimals, integers as they are, "–" for what is undefined, intervals in
    brackets, text escaped.
    """
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, list):
        return f"[{', '.join(map(number, value))}]"
    words = str(value).split()
    return " ".join(words).replace("|", r"\|")


def threshold(value: float | None) -> str:
    """A threshold in three decimals, or in more near 0 and 1, where the third would be a lie: 0.9996
    is never shown as 1.
    """
    if value is None:
        return number(None)
    decimals = 3
    distance = min(value, 1 - value)
    if 0 < distance < 0.1:
        decimals = 2 - math.floor(math.log10(distance))
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").removesuffix(".")


def metric_cells(values: Mapping[str, Any], columns: Iterable[str]) -> list[str]:
    """The cells of a row of metrics."""
    cells = []
    for column in columns:
        shown = threshold if column == "threshold" else number
        cells.append(shown(values.get(column)))
    return cells


def metric_rows(
    metrics: Mapping[str, Mapping[str, Any]], columns: Iterable[str]
) -> list[list[str]]:
    """The cells of several rows of metrics, each after its name."""
    return [[name, *metric_cells(values, columns)] for name, values in metrics.items()]


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header)]
    lines += [map(number, row) for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def metric_table(
    metrics: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str] = COLUMNS
) -> str:
    """`common.metrics.multilabel` or a dict of named `binary` results as a markdown table, one row
    a name.
    """
    return table(metric_rows(metrics, columns), ["", *columns.values()])


def part_tables(results: Mapping[str, Any], known: str) -> list[str]:
    """The lines of results.md for parts of the rows: categories, languages, and without near-copies.

    Args:
        results: what results.json holds, of which a part may be empty: `categories`, `languages`
            and `near_copies`, each of `common.metrics`.
        known: the flag that named the rows of which near-copies were looked for.
    """
    parts = {
        "categories": "Categories",
        "languages": "Languages",
        "near_copies": f"With and without near-copies of rows of {known}",
    }
    lines = []
    for part, heading in parts.items():
        if results[part]:
            columns = CATEGORY_COLUMNS if part == "categories" else COLUMNS
            lines += ["", f"## {heading}", "", metric_table(results[part], columns)]
    return lines


def findings(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """In words what intervals say of guards: whether one can be told from chance, and from what it
    must beat.

    Args:
        scores: of `common.metrics.binary` with `auroc_interval`; of a baseline also
            `guard_gain_interval`, by how much the first guard's AUPRC is above its own.
    """
    said = []
    first = next(iter(scores))
    for name, values in scores.items():
        interval = values.get("auroc_interval")
        if interval is not None and interval[0] <= 0.5:
            what = "is worse than chance" if interval[1] < 0.5 else "cannot be told from chance"
            said.append(f"{name} {what} here: its AUROC is in {number(interval)}.")
        gain = values.get("guard_gain_interval")
        if gain is not None and gain[0] <= 0:
            said.append(
                f"{first} is not better than {name} here: its AUPRC is {number(gain)} above."
            )
    return said


def write_results(
    folder: Path,
    results: Mapping[str, Any],
    markdown: str,
    predictions: Sequence[Mapping[str, Any]],
    more: Mapping[str, str] | None = None,
) -> None:
    """results.json, results.md and predictions.jsonl (one row an item, so that any metric can be
    recomputed).

    Args:
        more: the texts of other files, by name.
    """
    texts = {  # all are made before the first is written: what is no JSON leaves nothing behind
        "predictions.jsonl": json_lines(predictions),
        "results.md": markdown,
        "results.json": json_text(results),
        **(more or {}),
    }
    for name, text in texts.items():
        write_text(Path(folder) / name, text)


def say_where(path: Path) -> None:
    """Say at the end of a run where its results lie, and which file to open first."""
    path = Path(path)
    logger.info("Results are in %s; open %s first.", path.parent, path.name)


def plot_precision_recall(
    curves: Mapping[str, tuple[Sequence[bool], Sequence[float]]],
    path: Path,
    title: str,
) -> None:
    """Precision-recall curves of guards on the same rows, readable in black and white; the base
    rate is dotted. Without an unsafe row there is no recall, and no picture.
    """
    if not all(any(truth) for truth, _ in curves.values()):
        return
    figure, axes = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    for number, (name, (truth, score)) in enumerate(curves.items()):
        precision, recall, _ = precision_recall_curve(truth, score)
        style = LINE_STYLES[number % len(LINE_STYLES)]
        axes.step(recall, precision, where="post", linestyle=style, label=name)
    base = sum(truth) / len(truth)
    axes.axhline(base, color="grey", linestyle=":", label=f"base rate {base:.2f}")
    axes.set_title(title)
    axes.set_xlabel("Recall of what is unsafe")
    axes.set_ylabel("Precision")
    axes.set_xlim(0, 1.01)
    axes.set_ylim(0, 1.03)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    save_figure(figure, path)


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all, and free it."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)
