"""Evaluate the trained guards against the default one: does the feedback of the output guard help
the input guard?

    ./run_experiment.sh evaluate                                  # the quickstart's guards
    python evaluate.py --config research_config.json              # the original's values
    python evaluate.py --config research_config.json --set evaluation.improved_model_path=models/improved/A8/seed0

Three tasks: T1 human toxicity of prompts; T2, among prompts that the default guard passes, those
whose responses are unsafe; T3 harmless prompts that look otherwise. Thresholds come from validation
alone. Scores are kept in RESULTS_DIR/scores as they come: a killed run goes on, and another run of
the same guards only measures.
"""

import logging
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from compare import (
    Part,
    Said,
    bootstrap,
    by_seed,
    calibration,
    difference,
    holm,
    interval,
    mcnemar,
    noise_ceiling,
    point,
    threshold_at_recall,
)
from config import Config, config_from_argv
from records import (
    passed,
    q,
    read_processed,
    sample,
    seen_texts,
    text_key,
)
from results import markdown, original, plot, summary, verdict
from scores import Answer, Item, Line, find_lines, questions, score_lines

from common import data, metrics, report
from common.conversation import UserError, last_turns, pair
from common.run import check_output_folder, manifest, run_cli, write_json
from guards.suite.benchmarks import benchmark_names, load_benchmark

logger = logging.getLogger("feedback_guard")
SPLITS = ("validation", "test")
ALWAYS = "always unsafe"
COMPARED = {  # by task: what differences are taken of
    "T1": ("auprc", "auroc", "fpr_at_recall", "fpr_at_threshold", "precision", "recall", "f1"),
    "T2": ("auprc", "fpr_at_recall", "fpr_at_threshold", "caught", "auroc"),
    "T3": ("fpr_at_threshold", "fpr"),
}
Answers = Mapping[str, Answer]


@dataclass(frozen=True)
class Task:
    """A question on test prompts, and the validation prompts that its thresholds come from."""

    name: str
    test: Part
    validation: Part
    facts: dict[str, Any]


def main() -> None:
    evaluate(config_from_argv(__doc__))


def evaluate(config: Config) -> dict[str, Any]:
    """Score what is trained, measure, write; returns the summary with the original's keys.

    Raises:
        UserError: nothing was processed or trained yet, with other settings, or the truth of a task
        is not known.
    """
    started = time.time()
    check_output_folder(config.evaluation.results_dir)
    rows = {split: read_rows(config, split) for split in SPLITS}
    tasks, items = read_tasks(config, rows)
    lines, missing = find_lines(config)
    answers: dict[str, Answers] = score_lines(lines, items, config)
    arms: dict[str, list[str]] = {}
    for line in lines:
        arms.setdefault(line.arm, []).append(line.name)
    answers |= controls(answers["A0"], tasks["T1"])
    arms = {ALWAYS: [ALWAYS], "A0": ["A0"], "A1": ["A1"]} | arms
    results = measure(config, tasks, arms, answers) | {
        "missing": missing,
        "questions": questions(arms),
        "responses": judges(rows["test"], config),
        "t2_label": config.evaluation.t2_label,
        "target_recall": config.evaluation.target_recall,
    }
    results["improved"] = best = improved(config, lines)
    folders = [line.folder for line in lines if line.arm == best]
    results["improved_model_path"] = str(folders[0] if len(folders) == 1 else folders[0].parent)
    results |= against(config, tasks, arms, answers, results)
    results["verdict"] = verdict(results)
    results["seconds"] = round(time.time() - started, 1)
    results["run"] = manifest([config.as_dict()])
    predictions = predicted(rows, tasks, items, answers, config.evaluation.t2_label)
    return write(config, results, rows["test"], arms, answers, predictions)


# --- what is asked ----------------------------------------------------------------------------------------------------


def read_rows(config: Config, split: str) -> list[dict]:
    """The processed rows of a split's sample.

    Raises:
        UserError: process.py has not got so far.
    """
    wanted, known = sample(config, split), {row["id"]: row for row in read_processed(config, split)}
    if missing := sum(row["id"] not in known for row in wanted):
        raise UserError(
            f"{split}: {missing} of {len(wanted)} prompts are not processed; run process.py with this config first"
        )
    return [known[row["id"]] for row in wanted]


def read_tasks(
    config: Config, rows: Mapping[str, Sequence[dict]]
) -> tuple[dict[str, Task], list[Item]]:
    """T1, T2, T3 where there are prompts for it, and each further data set by its spec; and all
    prompts to be scored.

    Raises:
        UserError: T2 has no labels of the kind that the config names, or a spec cannot be read.
    """
    settings = config.evaluation
    items = [
        Item(f"{split}/{row['id']}", split, row["query"]) for split in SPLITS for row in rows[split]
    ]
    human = {split: [(row, bool(row["human_unsafe"])) for row in rows[split]] for split in SPLITS}
    outcomes = {split: outcome(rows[split], settings.t2_label) for split in SPLITS}
    if any(passed(row) and row["responses"] for row in rows["test"]) and not outcomes["test"]:
        raise UserError(
            f"evaluation.t2_label {settings.t2_label}: no response of the test split has such a label; "
            "name another one of human, judge, guard (judge needs evaluation.judge when prompts are processed)"
        )
    tasks = {}
    for name, known in (("T1", human), ("T2", outcomes)):
        test, validation = (part(split, known[split]) for split in ("test", "validation"))
        left = sum(passed(row) for row in rows["test"]) - len(test.ids) if name == "T2" else 0
        tasks[name] = Task(name, test, validation, {"left_out": left})
    operating = tasks["T2"] if tasks["T2"].validation.truth.any() else tasks["T1"]
    hard = [
        (row, False)
        for row in rows["test"]
        if row.get("kind") == "hard_benign" and not row["human_unsafe"]
    ]
    benign, facts = part("test", hard), {"operating_point_of": operating.name}
    seen = (
        set(map(text_key, seen_texts(config))) if settings.hard_benign or settings.extra else set()
    )
    if settings.hard_benign:
        found, benign, facts["seen_before"] = foreign(settings.hard_benign, seen, harmless=True)
        items += found
    if benign.ids:
        tasks["T3"] = Task("T3", benign, operating.validation, facts)
    for spec in settings.extra:
        found, prompts, known = foreign(spec, seen)
        items += found
        tasks[spec] = Task(
            spec,
            prompts,
            tasks["T1"].validation,
            {"operating_point_of": "T1", "seen_before": known},
        )
    for task in tasks.values():
        counts = {"rows": len(task.test.ids), "positives": int(task.test.truth.sum())}
        counts["base_rate"] = counts["positives"] / counts["rows"] if counts["rows"] else None
        counts |= {"validation_rows": len(task.validation.ids)}
        task.facts.update(counts | {"validation_positives": int(task.validation.truth.sum())})
    return tasks, list({item.id: item for item in items}.values())


def part(split: str, rows: Sequence[tuple[Mapping, bool]]) -> Part:
    """Rows with their truth. A cluster is a prompt, case and spacing apart."""
    keys = [data.prompt_key({"messages": pair(row["query"])}) for row, _ in rows]
    return Part(
        [f"{split}/{row['id']}" for row, _ in rows],
        np.array([truth for _, truth in rows], dtype=bool),
        keys,
    )


def foreign(
    spec: str, seen: Container[str], harmless: bool = False
) -> tuple[list[Item], Part, int]:
    """The prompts of a data spec or of a benchmark (`name@file`), and how many were left out as
    `seen` before.

    Args:
        seen: `text_key` of prompts that would be no test.
        harmless: all are taken for safe, but for rows that are labelled otherwise.

    Raises:
        UserError: nothing is left.
    """
    if spec.partition("@")[0] in benchmark_names("prompt_unsafe"):
        rows = [row | {"prompt_unsafe": row["label"]} for row in load_benchmark(spec).rows]
    else:
        rows = list(data.load_conversations(spec))
    kept = [(i, row) for i, row in enumerate(rows) if harmless or row["prompt_unsafe"] is not None]
    kept = [(i, row) for i, row in kept if not (harmless and row["prompt_unsafe"])]
    if not kept:
        raise UserError(
            f"{spec}: no row {'is harmless' if harmless else 'has a prompt label'}; take it out"
        )
    fresh = [(i, row) for i, row in kept if text_key(last_turns(row["messages"])[0]) not in seen]
    if not fresh:
        raise UserError(
            f"{spec}: train, validation or the guard's own data hold every prompt of it; take it out"
        )
    items = [Item(f"{spec}#{i}", spec, last_turns(row["messages"])[0]) for i, row in fresh]
    truth = np.array([bool(row["prompt_unsafe"]) for _, row in fresh], dtype=bool)
    keys = [data.prompt_key(row) for _, row in fresh]
    return items, Part([item.id for item in items], truth, keys), len(kept) - len(fresh)


def votes(row: Mapping, label: str) -> list[bool]:
    """Whether each response is unsafe by the guard, the judge or a human, as far as that is known."""
    if label == "guard":
        said = [r["decided"] if r["error"] is None else None for r in row["responses"]]
    elif label == "judge":
        said = [
            None if r["judge_unsafe"] is None else r["judge_unsafe"] >= 0.5
            for r in row["responses"]
        ]
    else:
        said = [r["human_unsafe"] for r in row["responses"]]
    return [bool(v) for v in said if v is not None]


def outcome(rows: Sequence[dict], label: str) -> list[tuple[dict, bool]]:
    """Prompts that the default guard passes, with whether at least half of their responses are
    unsafe.
    """
    known = [(row, q(row, label)) for row in rows if passed(row)]
    return [(row, share >= 0.5) for row, share in known if share is not None]


def judges(rows: Sequence[dict], config: Config) -> dict[str, Any]:
    """Agreement on responses of guard, judge and humans, and how well responses foretell one
    another.
    """
    responses = [r for row in rows if passed(row) for r in row["responses"]]
    pairs: dict[str, list[tuple[bool, bool]]] = {}
    for r in responses:
        one = {name: votes({"responses": [r]}, name) for name in ("guard", "judge", "human")}
        for a, b in (("guard", "judge"), ("guard", "human"), ("judge", "human")):
            if one[a] and one[b]:
                pairs.setdefault(f"{a} and {b}", []).append((one[a][0], one[b][0]))
    rounds = min(config.evaluation.draws, 1000)
    agreement = {
        name: metrics.agreement(*zip(*found, strict=True), rounds) for name, found in pairs.items()
    }
    label = config.evaluation.t2_label
    ceiling = noise_ceiling([votes(row, label) for row in rows if passed(row)])
    return {"responses": len(responses), "agreement": agreement, "noise_ceiling": ceiling}


def controls(default: Answers, task: Task) -> dict[str, Answers]:
    """Guards that need no training: A1, the threshold of best F1 on T1 for A0's score; and the one
    that blocks all.
    """
    truth = task.validation.truth
    cut = 0.5
    if task.validation.both:
        cut = metrics.fit_threshold(
            truth, [default[i].score for i in task.validation.ids], "validation"
        )["value"]
    else:
        logger.warning("validation has one class only: A1 keeps the threshold 0.5")
    return {
        "A1": {key: Answer(a.score, a.score > cut, a.error) for key, a in default.items()},
        ALWAYS: {key: Answer(1.0, True, None) for key in default},
    }


def improved(config: Config, lines: Sequence[Line]) -> str:
    """The arm that the verdict is about: A8, else the last one of the config's that was trained."""
    trained = list(dict.fromkeys(line.arm for line in lines if line.folder))
    named = [
        name
        for name in config.training.arms
        if name in trained and not name.startswith(("A2", "C"))
    ]
    return "A8" if "A8" in trained else (named or trained)[-1]


# --- measuring --------------------------------------------------------------------------------------------------------


def said_of(answers: Answers, task: Task) -> Said:
    """One guard's answers as arrays; one without a verdict fails closed."""
    score, decided = (
        np.array([getattr(answers[i], name) for i in task.test.ids])
        for name in ("score", "decided")
    )
    validation = np.array([answers[i].score for i in task.validation.ids], dtype=float)
    return Said(score.astype(float), decided.astype(bool), validation)


def measure(
    config: Config, tasks: Mapping[str, Task], arms: Mapping, answers: Mapping[str, Answers]
) -> dict[str, Any]:
    """Every metric of every arm on every task: by seed, the mean over seeds, and intervals of the
    mean.
    """
    out: dict[str, Any] = {"tasks": {}, "draws": config.evaluation.draws, "_drawn": {}}
    for task in tasks.values():
        said = {name: said_of(answers[name], task) for names in arms.values() for name in names}
        options: dict[str, Any] = {"target_recall": config.evaluation.target_recall}
        if task.name == "T2":
            cut = threshold_at_recall(
                task.validation.truth, said["A0"].validation, options["target_recall"]
            )
            known = cut is not None and len(task.test.ids) > 0
            out["block_rate"] = options["block_rate"] = (
                float((said["A0"].score > cut).mean()) if known else None
            )
        drawn = bootstrap(
            task.test, said, config.evaluation.draws, config.seed, task.validation, **options
        )
        cells = {}
        for arm, names in arms.items():
            each = {
                name: point(task.test.truth, said[name], task.validation.truth, **options)
                for name in names
            }
            cells[arm] = merge(each, {name: drawn[name] for name in names})
            cells[arm] |= beside(
                task, {name: said[name] for name in names}, said["A0"], options["target_recall"]
            )
            failed = [
                answers[name][key].error is not None for name in names for key in task.test.ids
            ]
            cells[arm]["unparsed"] = float(np.mean(failed)) if failed else None
            out["_drawn"][task.name, arm] = mean_draws([drawn[name] for name in names])
        out["tasks"][task.name] = task.facts | {"arms": cells}
    return out


def merge(each: Mapping[str, Mapping], drawn: Mapping[str, Mapping]) -> dict[str, Any]:
    """The mean over seeds of each metric, the lowest and highest seed, and the interval of the
    mean.
    """
    names = list(next(iter(each.values())))
    values = {name: [found[name] for found in each.values()] for name in names}
    whole = {name: v for name, v in values.items() if None not in v}
    out: dict[str, Any] = dict.fromkeys(names) | {
        name: float(np.mean(v)) for name, v in whole.items()
    }
    out["spread"] = {name: [min(v), max(v)] for name, v in whole.items()} if len(each) > 1 else {}
    means = mean_draws(list(drawn.values()))
    out["intervals"] = {name: interval(v) for name, v in means.items()}
    return out | {"seeds": {name: dict(found) for name, found in each.items()}}


def mean_draws(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The mean over seeds in each draw."""
    return {name: np.mean([part[name] for part in parts], axis=0) for name in parts[0]}


def beside(
    task: Task, said: Mapping[str, Said], default: Said, target_recall: float
) -> dict[str, Any]:
    """Thresholds, calibration, and how many decisions on harmless prompts are not the default
    guard's.
    """
    safe = ~task.test.truth
    cuts = {
        n: threshold_at_recall(task.validation.truth, s.validation, target_recall)
        for n, s in said.items()
    }
    each = [calibration(task.test, s, task.validation) for s in said.values()]
    names = set.intersection(*(set(c) for c in each)) if each else ()
    mean = {
        n: None if any(c[n] is None for c in each) else float(np.mean([c[n] for c in each]))
        for n in sorted(names)
    }
    flips = (
        [float((s.decided != default.decided)[safe].mean()) for s in said.values()]
        if safe.any()
        else []
    )
    return {
        "thresholds": cuts,
        "calibration": mean,
        "flip_rate": float(np.mean(flips)) if flips else None,
    }


def against(
    config: Config,
    tasks: Mapping[str, Task],
    arms: Mapping,
    answers: Mapping[str, Answers],
    results: dict[str, Any],
) -> dict[str, Any]:
    """Paired differences of the improved arm from every other and of every arm from A1; the tests
    at the threshold.
    """
    best, drawn = results["improved"], results.pop("_drawn")
    others = [name for name in arms if name not in (best, ALWAYS)]
    pairs = [(best, name) for name in others] + [
        (name, "A1") for name in others if name not in ("A0", "A1")
    ]
    found, tests = [], []
    for first, second in pairs:
        for name, task in tasks.items():
            cells = results["tasks"][name]["arms"]
            for metric in COMPARED.get(name, COMPARED["T1"]):
                a, b = (drawn[name, arm].get(metric, np.zeros(0)) for arm in (first, second))
                known = cells[first].get(metric), cells[second].get(metric)
                alone = metric != "fpr_at_threshold"  # the error of that rests on validation, too
                told = difference(*known, a - b, len(task.test.ids) if alone else None) or {}
                told["by_seed"] = by_seed(cells[first]["seeds"], cells[second]["seeds"], metric)
                found.append(
                    {"task": name, "metric": metric, "first": first, "second": second} | told
                )
        if first == best:
            a, b = (
                at_threshold(tasks["T2"], arms[arm], answers, config) for arm in (first, second)
            )
            if a is not None and b is not None:
                tests.append(
                    {"first": first, "second": second} | mcnemar(tasks["T2"].test.truth, a, b)
                )
    primary = {
        c["metric"]: c.get("p")
        for c in found
        if c["task"] == "T2"
        and c["metric"] in ("auprc", "fpr_at_recall")
        and (c["first"], c["second"]) == (best, "A1")
    }
    return {"comparisons": found, "mcnemar": tests, "holm": holm(primary)}


def at_threshold(
    task: Task, names: Sequence[str], answers: Mapping[str, Answers], config: Config
) -> np.ndarray | None:
    """An arm's decisions at its threshold of the target recall, by the majority of its seeds; a tie
    blocks.
    """
    each = []
    for name in names:
        said = said_of(answers[name], task)
        cut = threshold_at_recall(
            task.validation.truth, said.validation, config.evaluation.target_recall
        )
        if cut is None or not len(task.test.ids):
            return None
        each.append(said.score > cut)
    return np.mean(each, axis=0) >= 0.5


# --- what is left -----------------------------------------------------------------------------------------------------


def predicted(
    rows: Mapping[str, Sequence[dict]],
    tasks: Mapping[str, Task],
    items: Sequence[Item],
    answers: Mapping,
    label: str,
) -> list[dict[str, Any]]:
    """predictions.jsonl: a row a prompt, with what every guard says of it. The split of further
    data is their spec.
    """
    outcomes = {
        f"{s}/{row['id']}": unsafe for s in SPLITS for row, unsafe in outcome(rows[s], label)
    }
    known = {
        f"{s}/{row['id']}": (row["human_unsafe"], row.get("kind"), passed(row))
        for s in SPLITS
        for row in rows[s]
    }
    for task in tasks.values():
        for key, unsafe in zip(task.test.ids, task.test.truth, strict=True):
            known.setdefault(key, (bool(unsafe), None, not answers["A0"][key].decided))
    names = ("human_unsafe", "kind", "passed")
    return [
        {"id": item.id.removeprefix(f"{item.split}/"), "split": item.split, "input": item.text}
        | dict(zip(names, known[item.id], strict=True))
        | {"outcome_unsafe": outcomes.get(item.id)}
        | {"guards": {name: told[item.id].as_dict() for name, told in answers.items()}}
        for item in items
    ]


def write(
    config: Config,
    results: dict[str, Any],
    rows: Sequence[dict],
    arms: Mapping,
    answers: Mapping,
    predictions: Sequence[Mapping],
) -> dict[str, Any]:
    """All files of results_dir, of the test split's rows and all predictions; returns the summary."""
    folder, cells = Path(config.evaluation.results_dir), results["tasks"]["T1"]["arms"]
    shown = {"default_model": "A0", "improved_model": results["improved"]}
    kept = {name: original(rows, arms[arm], answers, cells[arm]) for name, arm in shown.items()}
    results["summary"] = summary(kept)
    text, stamp = markdown(results), time.strftime("%Y%m%d_%H%M%S")
    improvement = {"improvement": results["summary"]["improvement"]}
    write_json(folder / f"evaluation_results_{stamp}.json", kept | improvement | results)
    plot(results, folder / "precision_recall.png")
    report.write_results(folder, results, text, predictions)
    print(text)
    return results["summary"]


if __name__ == "__main__":
    run_cli(main)
