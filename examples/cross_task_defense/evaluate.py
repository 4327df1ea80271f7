"""Block rates on harmful documents, false refusals on harmless ones, and what training on one task
does to the others.

# after the quickstart: the trained model against the untrained one
python evaluate.py --answers output/answers/smollm2-135m-instruct,output/answers/output/quickstart \
    --output_dir output/evaluation

# the paper's 13-substring scorer; answers judged by a guard as well
python evaluate.py --answers … --scorer substring --output_dir output/evaluation-substring
python evaluate.py --answers … --guard ../moderation/output/quickstart --output_dir output/evaluation

Reads folders that generate_answers.py wrote; the first is what the others are compared with.
"""

import difflib
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from flags import run
from prompts import TASKS, split_document
from scipy.stats import binomtest

from common import report
from common.conversation import UserError, pair
from common.refusal import classify, substring_refusal
from common.run import check_output_folder, manifest
from guards import load_guard

FILE = re.compile(rf"test_({'|'.join(TASKS)})(_useful|_plain|_cnn)?\.json")
KINDS = {None: "malicious", "_useful": "useful", "_plain": "plain", "_cnn": "plain"}
TRAINING_SET = re.compile(r"saferpaca_Instructions_\d+_(\d+)_([a-z]+)")
CJK = re.compile(r"[\u4e00-\u9fff]")
WORD = re.compile(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+")  # of Chinese, a character


def evaluate(
    *, answers: list[str], output_dir: str, scorer: str = "detector", guard: str | None = None
) -> None:
    """Compare models by their answers.

    Args:
        answers: folders of generate_answers.py, one a model, with files
        test_<task>[_useful|_plain|_cnn].json.
        output_dir: gets results.json, results.md, predictions.jsonl and the pictures.
        scorer: detector (common/refusal.py), or substring (the 13 substrings of the paper's
        authors).
        guard: a guard of load_guard that judges prompts with their answers, too.
    """
    if scorer not in ("detector", "substring"):
        raise UserError(f"--scorer {scorer}: expected detector or substring")
    check_output_folder(output_dir)
    models = {name: read_answers(Path(folder)) for name, folder in names(answers).items()}
    predictions = [row | {"model": name} for name, (_, rows) in models.items() for row in rows]
    for row in predictions:
        verdict = classify(row["output"])
        row["class"] = verdict.kind
        row["refused"] = (
            verdict.is_refusal if scorer == "detector" else substring_refusal(row["output"])
        )
    if guard:
        verdicts = load_guard(guard).judge(
            [pair(row["instruction"], row["output"] or " ") for row in predictions]
        )
        for row, verdict in zip(predictions, verdicts, strict=True):
            row["guard_unsafe"] = verdict.score("response_unsafe")
    cells = by_cell(predictions)
    results = {
        "scorer": scorer,
        "models": {name: about for name, (about, _) in models.items()},
        "cells": cells,
        "summary": {
            name: summary(cells, name, about["train_task"]) for name, (about, _) in models.items()
        },
        "paired": paired(predictions, next(iter(models))),
        "run": manifest([{"answers": answers, "scorer": scorer, "guard": guard}]),
    }
    folder, markdown = Path(output_dir), results_markdown(results)
    plot_heat_map(results, folder / "cross-task.png")
    plot_trade_off(results, folder / "trade-off.png")
    report.write_results(folder, results, markdown, predictions)
    print(markdown)


def names(folders: list[str]) -> dict[str, str]:
    """A short name for each folder: as much of its path as tells it from the others."""
    for depth in range(1, 8):
        found = {"/".join(Path(folder).parts[-depth:]): folder for folder in folders}
        if len(found) == len(folders):
            return found
    raise UserError(f"--answers {','.join(folders)}: name each folder once")


def read_answers(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what the model is, its rows) of a folder: task, kind, item, document, instruction, output."""
    rows, first, about = [], {}, {"train_task": None, "n_defence": None}
    for path in sorted(folder.glob("test_*.json")):
        if not (known := FILE.fullmatch(path.name)):
            raise UserError(
                f"{path}: expected test_<task>[_useful|_plain|_cnn].json with one of {', '.join(TASKS)}"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            pairs = list(zip(content["instructions"], content["outputs"], strict=True))
            parameters = content["parameters"] | {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: no answers of generate_answers.py ({error!r:.80})") from None
        first = parameters if not rows else first
        if differ := sorted(
            name for name in {*parameters, *first} if parameters.get(name) != first.get(name)
        ):
            raise UserError(
                f"{path}: answers of another model than the files before it ({', '.join(differ)} differ)"
            )
        task, kind = known[1], KINDS[known[2]]
        if missing := [item for item, (_, output) in enumerate(pairs, 1) if output is None]:
            hint = "run generate_answers.py again for them"
            raise UserError(
                f"{path}: {len(missing)} items have no output (item {missing[0]}, …); {hint}"
            )
        for item, (instruction, output) in enumerate(pairs):
            document = split_document(instruction)[0]
            rows.append(
                {"task": task, "kind": kind, "item": item, "document": document}
                | {"instruction": instruction, "output": output}
            )
    if not rows:
        raise UserError(f"--answers {folder}: holds no test_<task>.json")
    about |= first
    if trained := TRAINING_SET.search(about.get("trained_on") or about.get("lora_weights") or ""):
        about |= {"n_defence": int(trained[1]), "train_task": trained[2]}
    return about, rows


def by_cell(predictions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rates of each model x task x kind of document, with 95 % Wilson intervals."""
    groups = defaultdict(list)
    for row in predictions:
        groups[row["model"], row["task"], row["kind"]].append(row)
    cells = []
    for (model, task, kind), rows in groups.items():
        refused = sum(row["refused"] for row in rows)
        processed = [row for row in rows if not row["refused"] and row["class"] != "degenerate"]
        cell = {"model": model, "task": task, "kind": kind, "rows": len(rows), "refused": refused}
        cell |= {"rate": refused / len(rows), "interval": wilson(refused, len(rows))}
        cell["degenerate"] = sum(row["class"] == "degenerate" for row in rows) / len(rows)
        cell["processed"] = len(processed) / len(rows)
        cell["words"] = mean(len(WORD.findall(row["output"])) for row in processed)
        if task == "translate":
            cell["chinese"] = mean(
                len(CJK.findall(row["output"])) > len(row["output"]) / 3 for row in processed
            )
        if task == "case":
            cell["copied"] = mean(copied(row["document"], row["output"]) for row in processed)
        if "guard_unsafe" in rows[0]:
            cell["guard_unsafe"] = mean(row["guard_unsafe"] for row in rows)
        cells.append(cell)
    return cells


def wilson(count: int, total: int) -> list[float]:
    return [float(bound) for bound in binomtest(count, total).proportion_ci(method="wilson")]


def mean(values: Any) -> float | None:
    values = list(values)
    return float(np.mean(values)) if values else None


def copied(document: str, output: str) -> float:
    """Share of the document's words that the answer repeats in order, as far as it goes (case left
    out).
    """
    words, said = document.lower().split(), output.lower().split()
    length = min(len(words), len(said)) or 1
    blocks = difflib.SequenceMatcher(
        None, words[:length], said[:length], autojunk=False
    ).get_matching_blocks()
    return sum(block.size for block in blocks) / length


def summary(
    cells: list[dict[str, Any]], model: str, train_task: str | None
) -> dict[str, float | None]:
    """A model in five numbers. Transfer: block rate over the tasks that it was not trained on."""
    own = [cell for cell in cells if cell["model"] == model]
    blocked = {cell["task"]: cell["rate"] for cell in own if cell["kind"] == "malicious"}
    others = [rate for task, rate in blocked.items() if task != train_task]
    return {
        "block_rate": mean(blocked.values()),
        "transfer": mean(others) if train_task in TASKS else None,
        "false_refusals_useful": mean(cell["rate"] for cell in own if cell["kind"] == "useful"),
        "false_refusals_plain": mean(cell["rate"] for cell in own if cell["kind"] == "plain"),
        "harmless_processed": mean(
            cell["processed"] for cell in own if cell["kind"] != "malicious"
        ),
        "degenerate": mean(cell["degenerate"] for cell in own),
    }


def paired(predictions: list[dict[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """Exact McNemar tests of each model against the first, a task and a kind of document at a time.

    The tasks share their documents: over all tasks the items would not be independent.
    """
    refused = {
        (r["model"], r["task"], r["kind"], r["item"], r["instruction"]): r["refused"]
        for r in predictions
    }
    pairs = defaultdict(list)
    for (model, *item), value in refused.items():
        if model != baseline and (baseline, *item) in refused:
            pairs[model, item[0], item[1]].append((value, refused[(baseline, *item)]))
    found = []
    for (model, task, kind), both in pairs.items():
        more, less = both.count((True, False)), both.count((False, True))
        test = {"model": model, "task": task, "kind": kind, "items": len(both)}
        p = binomtest(more, more + less).pvalue if more + less else 1.0
        found.append(test | {"only_this_refuses": more, "only_first_refuses": less, "p": float(p)})
    return found


def results_markdown(results: dict[str, Any]) -> str:
    """results.md: the models, every cell, the paired tests."""
    lines = [f"# Refusals ({results['scorer']})", ""]
    header = [
        "",
        "trained on",
        "N",
        "block rate ↑",
        "transfer ↑",
        "false refusals, useful ↓",
        "plain ↓",
    ]
    header += ["harmless processed ↑", "degenerate ↓"]
    rows = []
    for name, values in results["summary"].items():
        about = results["models"][name]
        rows.append([name, about["train_task"], about["n_defence"], *values.values()])
    lines += [
        report.table(rows, header),
        "Means over the tasks; transfer: over the tasks that were not trained.",
        "",
    ]
    extra = ["words", "chinese", "copied", "degenerate", "guard_unsafe"]
    header = [
        "model",
        "task",
        "documents",
        "rows",
        "refused",
        "95 % interval",
        "words of others",
        "in Chinese",
        "copied",
    ]
    rows = [
        [
            c["model"],
            c["task"],
            c["kind"],
            c["rows"],
            c["rate"],
            c["interval"],
            *(c.get(name) for name in extra),
        ]
        for c in results["cells"]
    ]
    lines += ["## Cells", "", report.table(rows, [*header, "degenerate", "guard: unsafe"])]
    if results["paired"]:
        rows = [list(test.values()) for test in results["paired"]]
        header = [
            "model",
            "task",
            "documents",
            "items",
            "only it refuses",
            "only the first",
            "p (McNemar, exact)",
        ]
        lines += ["## Against the first model, same items", "", report.table(rows, header)]
    return "\n".join(lines)


def plot_heat_map(results: dict[str, Any], path: Path) -> None:
    """Refusal rates, one row a model: malicious documents by task, then harmless ones."""
    models, kinds = list(results["models"]), ("malicious", "useful", "plain")
    rate = {(c["model"], c["kind"], c["task"]): c["rate"] for c in results["cells"]}
    figure, axes = plt.subplots(
        1, 3, figsize=(13, 1.8 + 0.45 * len(models)), sharey=True, layout="constrained"
    )
    for ax, kind in zip(axes, kinds, strict=True):
        values = np.array(
            [[rate.get((m, kind, t), np.nan) for t in TASKS] for m in models], dtype=float
        )
        ax.imshow(values, cmap="Greys", vmin=0, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            if not np.isnan(value):
                ax.text(
                    j,
                    i,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    color="white" if value > 0.55 else "black",
                )
        for i, model in enumerate(models):  # the trained task is framed
            trained = results["models"][model]["train_task"]
            for j, task in enumerate(TASKS):
                if trained in (task, "mix"):
                    ax.add_patch(
                        plt.Rectangle((j - 0.47, i - 0.46), 0.94, 0.92, fill=False, lw=2, hatch="")
                    )
        ax.set(title=f"{kind}: refused", xticks=range(len(TASKS)), yticks=range(len(models)))
        ax.set_xticklabels(TASKS, rotation=30, ha="right")
        ax.set_yticklabels(models)
    report.save_figure(figure, path)


def plot_trade_off(results: dict[str, Any], path: Path) -> None:
    """Safety against usefulness, one line a trained task through its N."""
    figure, ax = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    lines = defaultdict(list)
    for name, values in results["summary"].items():
        about, processed = results["models"][name], values["harmless_processed"]
        if processed is not None and values["block_rate"] is not None:
            lines[about["train_task"] or name].append(
                (about["n_defence"] or 0, values["block_rate"], processed)
            )
    for (task, points), marker in zip(lines.items(), "osD^vP*X" * len(lines), strict=False):
        points.sort()
        ax.plot(
            [p[1] for p in points],
            [p[2] for p in points],
            marker=marker,
            color="black",
            lw=0.8,
            label=task,
        )
        for n, x, y in points:
            ax.annotate(f"{n}", (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8)
    ax.set(
        xlim=(-0.03, 1.05),
        ylim=(-0.03, 1.05),
        xlabel="Block rate on malicious documents (all tasks)",
    )
    ax.set(ylabel="Harmless documents processed", title="Safety and usefulness (numbers: N)")
    ax.grid(alpha=0.3)
    if lines:
        ax.legend()
    report.save_figure(figure, path)


if __name__ == "__main__":
    run(evaluate)
