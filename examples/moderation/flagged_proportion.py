"""The paper's report on evaluation.json: how many answers of each model are flagged, by three
judges.

evaluation.json is a list of rows {"prompt", "response", "model", "flagged": {"gpt4": bool, "human":
bool}}; true means unsafe. Any set of models is welcome, and a judge may be missing from a row, a
model or the whole file.
"""

from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from common import metrics, report
from common.conversation import Messages, UserError, Verdict, check_label, check_text, pair
from common.data import read_rows
from common.run import write_json
from common.templates import render
from guards import Guard

# keys of `flagged`, and what people read
JUDGES = {"moderation": "QA-moderation", "gpt4": "GPT-4", "human": "human"}
LINES = ("-.*", "--^", ":s", "-o")  # of agreements in the picture


def read_evaluation_file(path: Path) -> list[dict] | None:
    """Rows of the paper's evaluation.json, checked; None when `path` is not such a file (then it is
    a data spec).
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
            said = f'expected an object such as {{"human": true}}, found {flagged!r:.60}'
            raise UserError(f"{where}, field flagged: {said}")
        for judge, value in flagged.items():
            flagged[judge] = check_label(value, f"flagged.{judge}", where)
    return [row for _, row in found]


def answered_pairs(rows: list[dict]) -> list[Messages]:
    """The questions with their answers, which the guard judges."""
    return [pair(row["prompt"], row["response"]) for row in rows]


def report_flagged_proportion(
    rows: list[dict],
    guard: Guard,
    verdicts: list[Verdict],
    threshold: float,
    folder: Path,
    run: dict[str, Any],
) -> None:
    """Write what the paper's script writes of its verdicts: predictions.json, evaluation.json, the
    picture.

    Args:
        verdicts: what the guard says of the `answered_pairs` of the rows.
        run: the manifest, for results.json.
    """
    pairs = answered_pairs(rows)
    template = getattr(guard, "template", "beavertails")
    judged = []
    predictions = []
    kept = []
    for row, messages, verdict in zip(rows, pairs, verdicts, strict=True):
        flagged = verdict.score() > threshold  # a verdict that failed has 1.0
        judges = row["flagged"] | {"moderation": flagged}
        judged.append(row | {"flagged": judges})
        prediction = {
            "text": "".join(part.text for part in render(template, messages)),
            "flagged": flagged,
            "categories": verdict.categories,
            "error": verdict.error,
        }
        predictions.append(prediction)
        kept.append({"model": row["model"], "judges": judges, **prediction})
    models = pd.Series([row["model"] for row in rows])
    given = pd.DataFrame([row["flagged"] for row in judged], dtype=object)
    judges = [*JUDGES, *sorted(set(given) - set(JUDGES))]
    given = given.reindex(columns=judges).dropna(axis="columns", how="all")
    table = {name: summary(given[models == name]) for name in models.unique()}
    plot_flagged_proportion(table, folder / "flagged-proportion.png")
    table["all models"] = summary(given)

    write_json(folder / "predictions.json", predictions)
    write_json(folder / "evaluation.json", judged)
    failed = sum(verdict.error is not None for verdict in verdicts)
    markdown = proportion_markdown(table, threshold, failed)
    results = {"guard": guard.name, "threshold": threshold, "models": table, "run": run}
    report.write_results(folder, results, markdown, kept)
    print(markdown)
    report.say_where(folder / "results.md")


def summary(given: pd.DataFrame) -> dict[str, Any]:
    """Share of flagged pairs by judge, and how far each two judges agree where both gave a verdict.

    Args:
        given: a row a pair, a column a judge.
    """
    found: dict[str, Any] = {"rows": len(given)}
    for judge in given:
        known = given[judge].dropna().astype(float)
        found[f"flagged_proportion/{judge}"] = float(known.mean()) if len(known) else None
    for one, other in combinations(given, 2):
        both = given[[one, other]].dropna().astype(bool)
        found[f"agreement/{one}&{other}"] = metrics.agreement(both[one], both[other])
    return found


def columns_of(table: dict[str, dict], kind: str) -> dict[str, str]:
    """The keys of one kind ("flagged_proportion", "agreement"), and what people read."""
    keys = [key for key in next(iter(table.values())) if key.startswith(f"{kind}/")]
    headings = {}
    for key in keys:
        judges = key.removeprefix(f"{kind}/").split("&")
        headings[key] = " / ".join(JUDGES.get(judge, judge) for judge in judges)
    return headings


def proportion_markdown(table: dict[str, dict], threshold: float, failed: int) -> str:
    """results.md: flagged proportions, then agreement with Cohen's kappa and intervals."""
    shares = columns_of(table, "flagged_proportion")
    agreements = columns_of(table, "agreement")
    lines = [[name, row["rows"], *(row[key] for key in shares)] for name, row in table.items()]
    flagged = [f"flagged by {judge} ↓" for judge in shares.values()]
    columns = ("n", "agreement", "agreement_interval", "kappa", "kappa_interval")
    both = []
    for name, row in table.items():
        for key, judges in agreements.items():
            both.append([name, judges, *(row[key][column] for column in columns)])
    headings = ["model", "judges", "n", "agreement ↑", "95 % interval"]
    headings += ["Cohen's kappa ↑", "95 % interval"]
    return (
        "# Flagged proportion\n\nThe share of answers that each judge flags as unsafe. "
        f"QA-moderation flags above {report.threshold(threshold)}; "
        f"verdicts that failed: {failed} (flagged).\n\n"
        f"{report.table(lines, ['model', 'rows', *flagged])}\n"
        f"## Agreement of judges\n\n{report.table(both, headings)}"
    )


def plot_flagged_proportion(table: dict[str, dict], path: Path) -> None:
    """Bars: share of answers flagged as unsafe, by model and judge. Lines: agreement of each two
    judges.

    The paper's picture of this name shows the share of SAFE pairs; this one shows what the name
    says.
    """
    shares = columns_of(table, "flagged_proportion")
    agreements = columns_of(table, "agreement")
    size = (max(8, 1.9 * len(table) + 2), 6)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    frame = pd.DataFrame(table).T
    bars = frame[list(shares)].astype(float).rename(columns=shares)
    bars.plot.bar(ax=axes, cmap="Greys", edgecolor="black", width=0.8, rot=0, legend=False)
    for container in axes.containers:
        axes.bar_label(container, fmt="{:.0%}", fontsize=8)
    twin = axes.twinx()
    for style, (key, judges) in zip(LINES, agreements.items(), strict=False):
        values = [float("nan") if row is None else row["agreement"] for row in frame[key]]
        twin.plot(range(len(table)), values, style, label=f"agreement {judges}")
    axes.set(
        title="Answers flagged as unsafe, by answering model and judge",
        xlabel="Answering model",
        ylabel="Flagged answers (bars)",
        ylim=(0, 1.15),
    )
    twin.set(ylabel="Agreement of two judges (lines)", ylim=(0, 1.15))
    for side in (axes, twin):
        side.yaxis.set_major_formatter("{x:.0%}")
    figure.legend(loc="outside lower center", ncols=3)
    report.save_figure(figure, path)
