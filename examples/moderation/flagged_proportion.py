"""The paper's report on evaluation.json: how many answers of each model are flagged, by three
judges.

evaluation.json is a list of rows {"prompt", "response", "model", "flagged": {"gpt4": bool, "human":
bool}}; true means unsafe. Any set of models is welcome, and a judge may be missing from a row, a
model or the whole file.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from common import metrics, report
from common.conversation import UserError, check_label, check_text, pair
from common.data import read_rows
from common.run import write_json
from common.templates import render
from guards import Guard

# keys of `flagged`, and what people read
JUDGES = {"moderation": "QA-moderation", "gpt4": "GPT-4", "human": "human"}


def read_evaluation_file(path: Path) -> list[dict] | None:
    """Rows of the paper's evaluation.json, checked; None when `path` is not such a file (then it is
    a data spec).

    A row has `prompt`, `response`, `model` and `flagged`, an object with the verdicts of any judges
    (true = unsafe).
    """
    if path.suffix.lower() != ".json" or not path.is_file():
        return None
    found = list(read_rows(path))
    if not any(isinstance(row, dict) and "model" in row for _, row in found):
        return None
    for where, row in found:
        if isinstance(row, UserError):
            raise row
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object, found {type(row).__name__}")
        for name in ("prompt", "response", "model"):
            check_text(row.get(name), name, where)
        flagged = row.setdefault("flagged", {})
        if not isinstance(flagged, dict):
            raise UserError(
                f'{where}, field flagged: expected an object such as {{"human": true}}, found {flagged!r:.60}'
            )
        for judge, value in flagged.items():
            flagged[judge] = check_label(value, f"flagged.{judge}", where)
    return [row for _, row in found]


def report_flagged_proportion(
    rows: list[dict], guard: Guard, threshold: float, folder: Path, extra: dict
) -> None:
    """Judge every answer and write what the paper's script writes: predictions.json,
    evaluation.json, the picture.

    Args:
        extra: what else belongs into results.json.
    """
    verdicts = guard.judge([pair(row["prompt"], row["response"]) for row in rows])
    judged = [
        row
        | {"flagged": row["flagged"] | {"moderation": v.error is not None or v.score() > threshold}}
        for row, v in zip(rows, verdicts, strict=True)
    ]

    names = dict.fromkeys([*JUDGES, *(judge for row in judged for judge in row["flagged"])])
    judges = [
        judge for judge in names if any(row["flagged"].get(judge) is not None for row in judged)
    ]
    models = {name: [] for name in dict.fromkeys(row["model"] for row in judged)}
    for row in judged:
        models[row["model"]].append(row)
    table = {
        name: judge_summary(part, judges)
        for name, part in (models | {"all models": judged}).items()
    }

    plot_flagged_proportion(
        {name: table[name] for name in models}, judges, folder / "flagged-proportion.png"
    )
    text = [
        "".join(part.text for part in render("beavertails", pair(row["prompt"], row["response"])))
        for row in rows
    ]
    predictions = [
        {
            "text": t,
            "flagged": row["flagged"]["moderation"],
            "categories": v.categories,
            "error": v.error,
        }
        for t, row, v in zip(text, judged, verdicts, strict=True)
    ]
    write_json(folder / "predictions.json", predictions)
    write_json(folder / "evaluation.json", judged)
    markdown = proportion_markdown(
        table, judges, threshold, sum(v.error is not None for v in verdicts)
    )
    results = {"guard": guard.name, "threshold": threshold, "models": table, **extra}
    rows_out = [
        {"model": row["model"], "judges": row["flagged"], **p}
        for row, p in zip(judged, predictions, strict=True)
    ]
    report.write_results(folder, results, markdown, rows_out)
    print(markdown)


def judge_summary(rows: Sequence[dict], judges: Sequence[str]) -> dict[str, Any]:
    """Share of flagged pairs by judge, and how far each two judges agree where both gave a verdict."""
    verdicts = {j: [row["flagged"].get(j) for row in rows] for j in judges}
    summary: dict[str, Any] = {"rows": len(rows)}
    for judge, values in verdicts.items():
        known = [v for v in values if v is not None]
        summary[f"flagged_proportion/{judge}"] = sum(known) / len(known) if known else None
    for i, a in enumerate(judges):
        for b in judges[i + 1 :]:
            both = [
                (x, y)
                for x, y in zip(verdicts[a], verdicts[b], strict=True)
                if x is not None and y is not None
            ]
            summary[f"agreement/{a}&{b}"] = metrics.agreement(
                [x for x, _ in both], [y for _, y in both]
            )
    return summary


def proportion_markdown(
    table: dict[str, dict], judges: Sequence[str], threshold: float, failed: int
) -> str:
    """results.md: flagged proportions, then agreement with Cohen's kappa and intervals."""
    shares = report.table(
        [
            [name, row["rows"], *(row[f"flagged_proportion/{j}"] for j in judges)]
            for name, row in table.items()
        ],
        ["model", "rows", *(f"flagged by {JUDGES.get(j, j)} ↓" for j in judges)],
    )
    columns = ("n", "agreement", "agreement_interval", "kappa", "kappa_interval")
    agreements = [
        [name, key.removeprefix("agreement/").replace("&", " / "), *(value[c] for c in columns)]
        for name, row in table.items()
        for key, value in row.items()
        if key.startswith("agreement/")
    ]
    headings = [
        "model",
        "judges",
        "n",
        "agreement ↑",
        "95 % interval",
        "Cohen's kappa ↑",
        "95 % interval",
    ]
    return (
        "# Flagged proportion\n\nThe share of answers that each judge flags as unsafe. QA-moderation flags above "
        f"{threshold:g}; verdicts that failed: {failed} (flagged).\n\n{shares}\n"
        f"## Agreement of judges\n\n{report.table(agreements, headings)}"
    )


def plot_flagged_proportion(table: dict[str, dict], judges: Sequence[str], path: Path) -> None:
    """Bars: share of answers flagged as unsafe, by model and judge. Lines: agreement of each two
    judges.

    The paper's picture of this name shows the share of SAFE pairs; this one shows what the name
    says.
    """
    figure, axes = plt.subplots(figsize=(max(8, 1.9 * len(table) + 2), 6), layout="constrained")
    positions, width = np.arange(len(table)), 0.8 / len(judges)
    for i, judge in enumerate(judges):
        shares = [row[f"flagged_proportion/{judge}"] for row in table.values()]
        at = positions + (i - (len(judges) - 1) / 2) * width
        fill = {
            "color": plt.cm.Greys(0.25 + 0.5 * i / len(judges)),
            "hatch": ("", "//", "..", "xx")[i % 4],
        }
        axes.bar(
            at,
            [s or 0 for s in shares],
            width,
            label=JUDGES.get(judge, judge),
            edgecolor="black",
            **fill,
        )
        for x, share in zip(at, shares, strict=True):
            label, angle = ("no verdicts", 90) if share is None else (f"{share:.0%}", 0)
            axes.text(x, (share or 0) + 0.01, label, ha="center", fontsize=8, rotation=angle)
    axes.set(
        title="Answers flagged as unsafe, by answering model and judge",
        xlabel="Answering model",
        ylabel="Flagged answers (bars)",
        ylim=(0, 1.15),
    )
    axes.set_xticks(positions, list(table))
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_yticks(np.arange(0, 1.01, 0.1))
    twin = axes.twinx()
    styles = (("-.", "*"), ("--", "^"), (":", "s"), ("-", "o"))
    for i, key in enumerate(k for k in next(iter(table.values())) if k.startswith("agreement/")):
        a, b = (JUDGES.get(j, j) for j in key.removeprefix("agreement/").split("&"))
        line, marker = styles[i % 4]
        values = [row[key]["agreement"] if row[key]["n"] else np.nan for row in table.values()]
        twin.plot(
            positions, values, line, marker=marker, color=f"C{i}", label=f"agreement {a} / {b}"
        )
    twin.set(ylabel="Agreement of two judges (lines)", ylim=(0, 1.15))
    twin.yaxis.set_major_formatter("{x:.0%}")
    twin.set_yticks(np.arange(0, 1.01, 0.1))
    figure.legend(loc="outside lower center", ncols=3)
    report.save_figure(figure, path)
