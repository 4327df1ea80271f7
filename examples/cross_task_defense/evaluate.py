"""Block rates on harmful documents, false refusals on harmless ones, and what training on one task
does to the others.

# after the quickstart: the trained model against the untrained one
python evaluate.py --answers output/answers/smollm2-135m-instruct,output/answers/output/quickstart \
    --output_dir output/evaluation

# the paper's 13-substring scorer; for a paper: refusals told by a guard, or by an LLM with a rubric
python evaluate.py --answers … --scorer substring --output_dir output/evaluation-substring
python evaluate.py --answers … --refusal_judge wildguard --output_dir output/evaluation-wildguard
python evaluate.py --answers … --server_url http://127.0.0.1:8000/v1 --server_model judge \
    --output_dir output/evaluation-llm

# harm, judged by a guard as well
python evaluate.py --answers … --guard ../moderation/output/quickstart --output_dir output/evaluation

Reads folders that generate_answers.py wrote; the first is what the others are compared with.
"""

import difflib
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from flags import run
from prompts import TASKS, split_document
from refusal_judge import judged_by_guard, judged_by_server, verdicts_of
from scipy.stats import binomtest

from common import report
from common.conversation import UserError
from common.metrics import agreement, bootstrap
from common.refusal import classify, substring_refusal
from common.results_page import PageGuard, PageRow, PageTable, shortened, write_results_page
from common.run import check_output_folder, manifest

FILE = re.compile(rf"test_({'|'.join(TASKS)}|summrize)(_useful|_plain|_cnn)?\.json")
QUESTIONS = re.compile(r"([IQ]-\w+)\.json")  # the short questions of Safety-Tuned LLaMAs
KINDS = {None: "malicious", "_useful": "useful", "_plain": "plain", "_cnn": "plain"}
TRAINING_SET = re.compile(r"saferpaca_Instructions_\d+_(\d+)_([a-z]+)")
SPELLING = {"summrize": "summarize"}  # of files of the paper
CJK = re.compile(r"[\u4e00-\u9fff]")
WORD = re.compile(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+")  # of Chinese, a character
Row = dict[str, Any]


def evaluate(
    *,
    answers: list[str],
    output_dir: str,
    scorer: str = "detector",
    refusal_judge: str | None = None,
    server_url: str | None = None,
    server_model: str | None = None,
    guard: str | None = None,
) -> None:
    """Compare models by their answers.

    Args:
        answers: folders of generate_answers.py, one a model, with files
        test_<task>[_useful|_plain|_cnn].json and those of short questions (I-*.json, Q-*.json).
        output_dir: gets results.json, results.md, results.html, predictions.jsonl and the pictures.
        scorer: detector (the list of common/refusal.py), or substring (the 13 substrings of the
        paper's authors).
        refusal_judge: a guard with a refusal verdict, such as wildguard, in the scorer's place.
        server_url: of a server whose LLM, server_model, tells refusals by a rubric instead.
        guard: a guard of load_guard that judges prompts with their answers, too.
    """
    if scorer not in ("detector", "substring"):
        raise UserError(f"--scorer {scorer}: expected detector or substring")
    if refusal_judge and server_url:
        raise UserError("--refusal_judge, --server_url: give one of them")
    check_output_folder(output_dir)
    models = {}
    predictions = []
    for name, folder in names(answers).items():
        models[name], rows = read_answers(Path(folder))
        predictions += [{**row, "model": name} for row in rows]

    # --- Who refuses ----------------------------------------------------------------------------
    pairs = [(row["instruction"], row["output"]) for row in predictions]
    listed = [classify(said, asked) for asked, said in pairs]
    by_list = [verdict.is_refusal for verdict in listed]
    runs = Path(output_dir) / "runs"
    refused = by_list
    if refusal_judge:
        scorer = refusal_judge
        refused = judged_by_guard(refusal_judge, pairs, runs)
    elif server_url:
        scorer = f"{server_model}, by a rubric"
        refused = judged_by_server(server_url, server_model, pairs, runs)
    elif scorer == "substring":
        refused = [substring_refusal(said) for _, said in pairs]
    for row, verdict, value in zip(predictions, listed, refused, strict=True):
        row |= {"class": verdict.kind, "refused": value}
    if guard:
        for row, verdict in zip(predictions, verdicts_of(guard, pairs, runs), strict=True):
            row["guard_unsafe"] = verdict.score("response_unsafe")

    # --- Results --------------------------------------------------------------------------------
    results = compared(predictions, models)
    results["scorer"] = scorer
    by_other = scorer != "detector"
    results["agreement_with_the_list"] = agreement(refused, by_list) if by_other else None
    results["run"] = manifest([{"answers": answers, "scorer": scorer, "guard": guard}])
    write(Path(output_dir), results, predictions)


def write(folder: Path, results: Row, predictions: list[Row]) -> None:
    """All files of output_dir; results.md is printed, too."""
    markdown = results_markdown(results)
    plot_heat_map(results, folder / "cross-task.png")
    plot_trade_off(results, folder / "trade-off.png")
    report.write_results(folder, results, markdown, predictions)
    print(markdown)
    write_page(folder / "results.html", results, predictions)


def compared(predictions: list[dict], models: dict[str, dict]) -> dict[str, Any]:
    """The rates of every model, of what was asked about documents and of short questions."""
    documents = [row for row in predictions if row["kind"] != "question"]
    questions = [row for row in predictions if row["kind"] == "question"]
    cells = by_cell(documents)
    summaries = {}
    for name, about in models.items():
        summaries[name] = summary(cells, name, about["train_task"])
    return {
        "models": models,
        "cells": cells,
        "summary": summaries,
        "trainings": trainings(documents, models),
        "paired": paired(documents, next(iter(models))),
        "questions": by_cell(questions),
    }


def names(folders: list[str]) -> dict[str, str]:
    """A short name for each folder: as much of its path as tells it from the others."""
    for depth in range(1, 8):
        found = {"/".join(Path(folder).parts[-depth:]): folder for folder in folders}
        if len(found) == len(folders):
            return found
    raise UserError(f"--answers {','.join(folders)}: name each folder once")


# --- Reading ------------------------------------------------------------------------------------


def read_answers(folder: Path) -> tuple[Row, list[Row]]:
    """(what the model is, its rows) of a folder: task, kind, item, document, instruction, output."""
    rows = []
    first = None
    for path in sorted([*folder.glob("test_*.json"), *folder.glob("[IQ]-*.json")]):
        parameters, of_file = read_file(path)
        first = first or parameters
        every = {*parameters, *first}
        differ = [name for name in sorted(every) if parameters.get(name) != first.get(name)]
        if differ:
            raise UserError(
                f"{path}: answers of another model than the files before it "
                f"({', '.join(differ)} differ)"
            )
        rows += of_file
    if not rows:
        raise UserError(f"--answers {folder}: holds no test_<task>.json")
    about = {"train_task": None, "n_defence": None, **first}
    trained_on = about.get("trained_on") or about.get("lora_weights") or ""
    trained = TRAINING_SET.search(trained_on)
    if trained:
        about["n_defence"] = int(trained[1])
        about["train_task"] = SPELLING.get(trained[2], trained[2])
    about["benign_refusals"] = "benign-refusals" in trained_on
    about["shuffled_refusals"] = "shuffled-refusals" in trained_on
    return about, rows


def read_file(path: Path) -> tuple[Row, list[Row]]:
    """Parameters and rows of a file of answers."""
    known = FILE.fullmatch(path.name)
    question = QUESTIONS.fullmatch(path.name)
    if known is None and question is None:
        raise UserError(
            f"{path}: expected test_<task>[_useful|_plain|_cnn].json with one of {', '.join(TASKS)}"
        )
    task = question[1] if question else SPELLING.get(known[1], known[1])
    kind = "question" if question else KINDS[known[2]]
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        pairs = list(zip(content["instructions"], content["outputs"], strict=True))
        parameters = dict(content["parameters"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no answers of generate_answers.py ({error!r:.80})") from None
    missing = [item for item, (_, output) in enumerate(pairs, 1) if output is None]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} items have no output (item {missing[0]}, …); "
            "run generate_answers.py again for them"
        )
    rows = []
    for item, (instruction, output) in enumerate(pairs):
        row = {"task": task, "kind": kind, "item": item}
        row |= {"document": split_document(instruction)[0]}
        rows.append(row | {"instruction": instruction, "output": output})
    return parameters, rows


# --- Rates --------------------------------------------------------------------------------------


def by_cell(predictions: list[Row]) -> list[Row]:
    """Rates of each model x task x kind of document, with 95 % Wilson intervals."""
    groups = defaultdict(list)
    for row in predictions:
        groups[row["model"], row["task"], row["kind"]].append(row)
    return [
        {"model": model, "task": task, "kind": kind, **cell_of(rows, task)}
        for (model, task, kind), rows in groups.items()
    ]


def cell_of(rows: list[Row], task: str) -> Row:
    """What the answers of a cell are like."""
    count = len(rows)
    refused = sum(row["refused"] for row in rows)
    degenerate = [row for row in rows if row["class"] == "degenerate"]
    processed = [row for row in rows if not row["refused"] and row["class"] != "degenerate"]
    interval = binomtest(refused, count).proportion_ci(method="wilson")
    cell = {
        "rows": count,
        "refused": refused,
        "rate": refused / count,
        "interval": [float(interval.low), float(interval.high)],
        "degenerate": len(degenerate) / count,
        "processed": len(processed) / count,
        "words": mean(len(WORD.findall(row["output"])) for row in processed),
    }
    if task == "translate":
        cell["chinese"] = mean(is_chinese(row["output"]) for row in processed)
    if task == "case":
        cell["copied"] = mean(copied(row["document"], row["output"]) for row in processed)
    if "guard_unsafe" in rows[0]:
        cell["guard_unsafe"] = mean(row["guard_unsafe"] for row in rows)
    return cell


def mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return float(np.mean(values)) if values else None


def is_chinese(text: str) -> bool:
    return len(CJK.findall(text)) > len(text) / 3


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


def summary(cells: list[Row], model: str, train_task: str | None) -> dict[str, float | None]:
    """A model in six numbers. Transfer: block rate over the tasks that it was not trained on."""
    own = [cell for cell in cells if cell["model"] == model]
    blocked = {cell["task"]: cell["rate"] for cell in own if cell["kind"] == "malicious"}
    others = [rate for task, rate in blocked.items() if task != train_task]
    harmless = [cell for cell in own if cell["kind"] != "malicious"]
    return {
        "block_rate": mean(blocked.values()),
        "transfer": mean(others) if train_task in TASKS else None,
        "false_refusals_useful": mean(cell["rate"] for cell in own if cell["kind"] == "useful"),
        "false_refusals_plain": mean(cell["rate"] for cell in own if cell["kind"] == "plain"),
        "harmless_processed": mean(cell["processed"] for cell in harmless),
        "degenerate": mean(cell["degenerate"] for cell in own),
    }


def trainings(predictions: list[Row], models: dict[str, Row]) -> list[Row]:
    """Rates with bootstrap intervals of each training set, over all seeds that it was trained with.

    Documents are drawn, with their answers of all tasks and seeds.
    """
    groups = defaultdict(list)
    for name, about in models.items():
        groups[about.get("trained_on") or name].append(name)
    found = []
    for members in groups.values():
        about = models[members[0]]
        task = about["train_task"]
        own = [row for row in predictions if row["model"] in members]
        malicious = [row for row in own if row["kind"] == "malicious"]
        same = [row for row in malicious if row["task"] == task]
        training = {name: about[name] for name in WHAT_IS_TRAINED}
        training |= {"models": members, "block_rate": with_interval(malicious)}
        training["trained_task"] = with_interval(same)
        others = [row for row in malicious if row["task"] != task]
        training["transfer"] = with_interval(others if task in TASKS else [])
        for kind in ("useful", "plain"):
            training[kind] = with_interval([row for row in own if row["kind"] == kind])
        found.append(training)
    return found


def with_interval(rows: list[Row]) -> list[float] | None:
    """Rate of refusals, and the bounds of its 95 % interval."""
    if not rows:
        return None
    refused = np.array([row["refused"] for row in rows], dtype=float)
    items = [row["item"] for row in rows]
    interval = bootstrap(lambda drawn: float(refused[drawn].mean()), len(rows), items)
    return [float(refused.mean()), *interval]


def paired(predictions: list[Row], baseline: str) -> list[Row]:
    """Exact McNemar tests of each model against the first, a task and a kind of document at a time.

    The tasks share their documents: over all tasks the items would not be independent.
    """
    refused = {}
    for row in predictions:
        item = (row["task"], row["kind"], row["item"], row["instruction"])
        refused[row["model"], item] = row["refused"]
    pairs = defaultdict(list)
    for (model, item), value in refused.items():
        if model != baseline and (baseline, item) in refused:
            task, kind = item[:2]
            pairs[model, task, kind].append((value, refused[baseline, item]))
    found = []
    for (model, task, kind), both in pairs.items():
        more = both.count((True, False))
        less = both.count((False, True))
        p = binomtest(more, more + less).pvalue if more + less else 1.0
        test = {"model": model, "task": task, "kind": kind, "items": len(both)}
        found.append(test | {"only_this_refuses": more, "only_first_refuses": less, "p": float(p)})
    return found


# --- What is shown ------------------------------------------------------------------------------

SUMMARY = "model|trained on|N|block rate ↑|transfer ↑|false refusals, useful ↓|plain ↓"
SUMMARY += "|harmless processed ↑|degenerate ↓"
WHAT_IS_TRAINED = ("train_task", "n_defence", "benign_refusals", "shuffled_refusals")
TRAININGS = "trained on|N|refusals on benign|shuffled|runs|block rate|trained task|transfer"
TRAININGS += "|useful refused|plain refused"
CELLS = "model|task|documents|rows|refused|95 % interval|words of others|in Chinese|copied"
CELLS += "|degenerate|guard: unsafe"
CELL_KEYS = "model|task|kind|rows|rate|interval|words|chinese|copied|degenerate|guard_unsafe"
PAIRED = "model|task|documents|items|only it refuses|only the first|p (McNemar, exact)"
QUESTIONS_TABLE = "model|questions|rows|refused|95 % interval|degenerate"
QUESTION_KEYS = "model|task|rows|rate|interval|degenerate"


def results_markdown(results: Row) -> str:
    """results.md: the models, every cell, the paired tests."""
    lines = [f"# Refusals ({results['scorer']})", ""]
    known = results["agreement_with_the_list"]
    if known:
        kappa = report.number(known["kappa"])
        interval = report.number(known["kappa_interval"])
        share = report.number(known["agreement"])
        lines += [f"Agreement with the list of phrases: {share}, kappa {kappa} {interval}.", ""]
    lines.append(report.table(summary_rows(results), SUMMARY.split("|")))
    lines += ["Means over the tasks; transfer: over the tasks that were not trained.", ""]
    rows = []
    for one in results["trainings"]:
        rows.append(list((one | {"models": len(one["models"])}).values()))
    title = "Over all seeds: rate and 95 % bootstrap interval over documents"
    cells = [[cell.get(key) for key in CELL_KEYS.split("|")] for cell in results["cells"]]
    questions = [[cell[key] for key in QUESTION_KEYS.split("|")] for cell in results["questions"]]
    tests = [list(test.values()) for test in results["paired"]]
    tables = [
        (title, rows, TRAININGS),
        ("Cells", cells, CELLS),
        ("Short questions", questions, QUESTIONS_TABLE),
        ("Against the first model, same items", tests, PAIRED),
    ]
    for heading, rows, header in tables:
        if rows:
            lines += [f"## {heading}", "", report.table(rows, header.split("|"))]
    return "\n".join(lines)


def summary_rows(results: Row) -> list[list]:
    """The models, one a row, in the columns of SUMMARY."""
    rows = []
    for name, values in results["summary"].items():
        about = results["models"][name]
        rows.append([name, about["train_task"], about["n_defence"], *values.values()])
    return rows


def write_page(path: Path, results: Row, predictions: list[Row]) -> None:
    """results.html: every item with the answers of all models, side by side.

    On the page a malicious document is what is unsafe, and a refusal is what flags it: so a false
    positive is a harmless document that was refused, a false negative a malicious one that was not.
    Nobody says of a short question whether it is to be refused.
    """
    models = list(results["models"])
    answers: dict[tuple, dict[str, Row]] = defaultdict(dict)
    for row in predictions:
        key = (row["task"], row["kind"], row["item"], row["instruction"])
        answers[key][row["model"]] = row
    rows = []
    for (task, kind, item, instruction), said in answers.items():
        outputs = [f"{model}: {shortened(row['output'])}" for model, row in said.items()]
        truth = None if kind == "question" else kind == "malicious"
        row = PageRow(
            f"{task}, {kind}, item {item}",
            task,
            shortened(instruction),
            "\n\n".join(outputs),
            truth,
        )
        for model in models:
            row.add_score(said[model]["refused"] if model in said else None)
        rows.append(row)
    cells = [[report.number(value) for value in row] for row in summary_rows(results)]
    write_results_page(
        path,
        title=f"Refusals ({results['scorer']})",
        note="Unsafe: a malicious document. Flagged: the model refused it (1), or did not (0).",
        tables=[PageTable("Models", SUMMARY.split("|"), cells)],
        guards=[PageGuard(model) for model in models],
        rows=rows,
    )


def plot_heat_map(results: Row, path: Path) -> None:
    """Refusal rates, one row a model: malicious documents by task, then harmless ones."""
    models = list(results["models"])
    kinds = ("malicious", "useful", "plain")
    height = 1.8 + 0.45 * len(models)
    figure, axes = plt.subplots(
        1, 3, figsize=(13, height), sharey=True, squeeze=False, layout="constrained"
    )
    rates = pd.DataFrame(results["cells"]).pivot_table("rate", ["kind", "model"], "task")
    for ax, kind in zip(axes[0], kinds, strict=True):
        order = pd.MultiIndex.from_product([[kind], models])
        values = rates.reindex(index=order, columns=list(TASKS)).to_numpy()
        ax.imshow(values, cmap="Greys", vmin=0, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            if not np.isnan(value):
                color = "white" if value > 0.55 else "black"
                ax.text(j, i, f"{value:.2f}", ha="center", va="center", color=color)
        for i, model in enumerate(models):  # the trained task is framed
            trained = results["models"][model]["train_task"]
            for j, task in enumerate(TASKS):
                if trained in (task, "mix"):
                    ax.add_patch(plt.Rectangle((j - 0.47, i - 0.46), 0.94, 0.92, fill=False, lw=2))
        ax.set_title(f"{kind}: refused")
        ax.set_xticks(range(len(TASKS)), TASKS, rotation=30, ha="right")
        ax.set_yticks(range(len(models)), models)
    report.save_figure(figure, path)


def plot_trade_off(results: Row, path: Path) -> None:
    """Safety against usefulness, one line a trained task through its N."""
    figure, ax = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
    lines = defaultdict(list)
    for name, values in results["summary"].items():
        about = results["models"][name]
        point = (about["n_defence"] or 0, values["block_rate"], values["harmless_processed"])
        if None not in point:
            lines[about["train_task"] or name].append(point)
    for (task, points), marker in zip(lines.items(), cycle("osD^vP*X")):
        numbers, blocked, processed = zip(*sorted(points), strict=True)
        ax.plot(blocked, processed, marker=marker, color="black", lw=0.8, label=task)
        for n, x, y in zip(numbers, blocked, processed, strict=True):
            ax.annotate(f"{n}", (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8)
    ax.set_title("Safety and usefulness (numbers: N)")
    ax.set_xlabel("Block rate on malicious documents (all tasks)")
    ax.set_ylabel("Harmless documents processed")
    ax.set_xlim(-0.03, 1.05)
    ax.set_ylim(-0.03, 1.05)
    ax.grid(alpha=0.3)
    if lines:
        ax.legend()
    report.save_figure(figure, path)


if __name__ == "__main__":
    run(evaluate)
