"""Evaluate the trained guards: does the feedback of the output guard help the input guard?

    ./run_experiment.sh evaluate                          # the quickstart's guards
    ./run_experiment.sh evaluate research_config.json     # the original's values
    ./run_experiment.sh evaluate --set evaluation.improved_model_path=models/improved/A8/seed0

Three tasks: T1 human toxicity of prompts; T2, among prompts that the default guard passes, those
whose responses are unsafe; T3 harmless prompts that look otherwise. Scores are kept in
RESULTS_DIR/scores as they come: a killed run goes on, and another run of the same guards only
measures.
"""

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import measure
import numpy as np
import pandas as pd
from config import Config, config_from_argv
from guard import (
    Loaded,
    legacy_reason,
    load_llama_guard,
    parsed_unsafe,
    template,
    verdict_row,
    written_as_asked,
)
from measure import Measured, Prompts
from records import (
    Row,
    check_stage,
    kept_rows,
    outcome,
    passed,
    read_processed,
    say_own_truth,
    seen_texts,
    text_key,
    word_on,
)
from tqdm.auto import tqdm
from train import Arm, arm_folder, arm_named, probe_scores

from common import data, metrics, report
from common.conversation import UserError, last_turns, pair
from common.data.repeats import near_copies
from common.keep import fingerprint
from common.results_page import PageTable, page_row, write_results_page
from common.run import check_output_folder, manifest, run_cli, write_json
from guards.card import ArmOrigin, card_path, has_card, read_card
from guards.generative import GenerativeGuard
from guards.identity import guard_identity
from guards.suite.benchmarks import benchmark_names, load_benchmark

logger = logging.getLogger("feedback_guard")
CHUNK = 64  # prompts between two writes
ALWAYS = "always unsafe"
UNTRAINED = {
    ALWAYS: Arm(ALWAYS, "what does a guard score that blocks everything?"),
    "A0": Arm("A0", "the default guard, its own verdict"),
    "A0-legacy": Arm(
        "A0-legacy",
        "the default guard, asked and read as the original does",
        query="chatml",
        parser="strict",
    ),
    "A1": Arm("A1", "is it merely a threshold? (A0 with the threshold of validation)"),
}
TASKS = {
    "T1": "T1: human toxicity of prompts",
    "T2": "T2: unsafe responses to prompts that the default guard passes",
    "T3": "T3: harmless prompts that look otherwise",
}
HEADINGS = report.COLUMNS | {
    "fpr_at_recall": "FPR at the recall ↓",
    "caught": "caught at equal block rate ↑",
    "fpr_at_threshold": "FPR at validation's threshold ↓",
    "fpr": "FPR, own verdict ↓",
    "flagged": "called unsafe",
}
SHOWN = {
    "T1": ("auroc", "auprc", "fpr_at_recall", "precision", "recall", "f1", "flagged"),
    "T2": ("auroc", "auprc", "fpr_at_recall", "caught"),
    "T3": ("fpr_at_threshold", "fpr"),
}
COMPARED = (
    ("T2", "auroc"),
    ("T2", "fpr_at_recall"),
    ("T2", "caught"),
    ("T1", "auroc"),
    ("T3", "fpr_at_threshold"),
)
ORIGINAL = ("accuracy", "precision", "recall", "f1")
WORDS = {True: "unsafe", False: "safe"}


@dataclass(frozen=True)
class Judged:
    """A guard that is evaluated: the default one (`folder` None), or an arm with one seed."""

    arm: str
    seed: int | None = None
    folder: Path | None = None

    @property
    def name(self) -> str:
        return self.arm if self.seed is None else f"{self.arm}-seed{self.seed}"

    @property
    def about(self) -> Arm:
        """How it is asked, and how an answer in words is read."""
        return about(self.arm)


def about(arm: str) -> Arm:
    """What is known of an arm, trained or not."""
    return UNTRAINED.get(arm) or arm_named(arm)


Facts = Mapping[str, Any]
Splits = Mapping[str, Sequence[Row]]  # the processed rows of validation and test
Texts = Mapping[str, str]  # by a prompt's id
# A row a prompt, by its id: score, decided, error and reason. Without a verdict it is unsafe.
Answers = pd.DataFrame
AllAnswers = Mapping[str, Answers]  # by the name of who gave them
Arms = Mapping[str, Sequence[str]]  # names of who answered, one a seed, by the arm


def main() -> None:
    evaluate(config_from_argv(__doc__))


def evaluate(config: Config) -> Row:
    """Score what is trained, measure, write; the results.

    Raises:
        UserError: nothing was processed or trained yet, or with other settings, or the truth of a
            task is not known.
    """
    settings = config.evaluation
    folder = Path(settings.results_dir)
    check_output_folder(folder)
    rows = {split: read_processed(config, split) for split in ("validation", "test")}
    tasks, texts = read_tasks(config, rows)
    guards, missing = find_guards(config)
    answers: dict[str, Answers] = {}
    for one in tqdm(guards, desc="guards", unit="guard"):
        answers[one.name] = score(one, texts, config, folder / "scores")
    validation = tasks.pop("validation")
    cut = best_cut(answers["A0"], validation)
    answers |= controls(answers["A0"], cut)
    arms = {ALWAYS: [ALWAYS], "A0": [], "A1": ["A1"]}
    for one in guards:
        arms.setdefault(one.arm, []).append(one.name)
    best = improved_arm(config, arms)
    judge = judge_facts(rows["test"], config)

    said = {}
    measured = {}
    for name, prompts in tasks.items():
        said[name] = as_arrays(arms, answers, prompts, validation)
        drawn = settings.draws, config.seed, settings.target_recall
        measured[name] = measure.measure(prompts, validation, said[name], *drawn)
    changes = measure.changes(tasks["T2"].truth, said["T2"], best)
    checks = measure.checks_before(tasks, measured, changes, judge)
    path, *others = [one.folder for one in guards if one.arm == best]
    results = {
        "improved": best,
        "improved_model_path": str(path.parent if others else path),
        "verdict": measure.verdict(measured, best, checks),
        "changes": changes,
        "tasks": task_results(tasks, measured),
        "differences": differences(measured, best),
        "responses": judge,
        "missing": missing,
        "questions": {arm: about(arm).question for arm in arms},
        "t2_label": settings.t2_label,
        "warning": say_own_truth(config),
        "target_recall": settings.target_recall,
        "draws": settings.draws,
        "run": manifest([config.as_dict()]),
    }
    results["summary"] = original_summary(results)
    write_original(config, results, tasks["T1"], texts, arms, answers)
    plot(results, folder / "differences.png")
    text = markdown(results)
    lines = predictions(config, rows, texts, answers)
    report.write_results(folder, results, text, lines)
    print(text)
    write_page(folder / "results.html", results, tasks, texts, arms, answers, cut)
    return results


# --- what is asked --------------------------------------------------------------------------------


def read_tasks(
    config: Config,
    rows: Splits,
) -> tuple[dict[str, Prompts], dict[str, str]]:
    """The prompts of each task by its name, those of validation as "validation"; and all texts by
    their id.
    """
    settings = config.evaluation
    texts = {}
    truths = {name: {} for name in ("validation", "T1", "T2", "T3")}
    for split, task in (("validation", "validation"), ("test", "T1")):
        for row in rows[split]:
            key = prompt_id(split, row)
            texts[key] = row["query"]
            truths[task][key] = bool(row["human_unsafe"])
    answered = False
    for row in rows["test"]:
        key = prompt_id("test", row)
        answered = answered or (passed(row) and row["responses"])
        unsafe = outcome(row, settings.t2_label)
        if unsafe is not None:
            truths["T2"][key] = unsafe
        if row.get("kind") == "hard_benign" and not row["human_unsafe"]:
            truths["T3"][key] = False
    if answered and not truths["T2"]:
        raise UserError(
            f"evaluation.t2_label {settings.t2_label}: no response of the test split has such a "
            "label; name another one of human, judge, guard (judge needs evaluation.judge when "
            "prompts are processed)"
        )
    specs = {spec: spec for spec in settings.extra}
    if settings.hard_benign:
        specs = {"T3": settings.hard_benign} | specs
    elif not truths["T3"]:
        del truths["T3"]
    seen = {text_key(text) for text in seen_texts(config)} if specs else set()
    for name, spec in specs.items():
        truths[name] = {}
        for key, text, unsafe in foreign(spec, seen, harmless=name == "T3"):
            texts[key] = text
            truths[name][key] = unsafe
    tasks = {}
    for name, truth in truths.items():
        groups = near_copies([texts[key] for key in truth])  # prompts that are drawn together
        is_unsafe = np.array(list(truth.values()), dtype=bool)
        tasks[name] = Prompts(list(truth), is_unsafe, groups)
    return tasks, texts


def prompt_id(
    split: str,
    row: Row,
) -> str:
    """How the results call a prompt of the data set."""
    return f"{split}/{row['id']}"


def foreign(
    spec: str,
    seen: Collection[str],
    harmless: bool = False,
) -> list[tuple[str, str, bool]]:
    """Id, text and truth of the prompts of a data spec or of a benchmark (`name@file`).

    Args:
        seen: `text_key` of prompts that would be no test; they are left out, and counted.
        harmless: all are taken for safe, but for rows that are labelled otherwise.
    """
    if spec.partition("@")[0] in benchmark_names("prompt_unsafe"):
        rows = load_benchmark(spec).rows
        label = "label"
    else:
        rows = data.load_conversations(spec)
        label = "prompt_unsafe"
    found = []
    known = 0
    for number, row in enumerate(rows):
        unsafe = row[label]
        is_left_out = unsafe if harmless else unsafe is None
        if is_left_out:
            continue
        text, _ = last_turns(row["messages"])
        if text_key(text) in seen:
            known += 1
        else:
            found.append((f"{spec}#{number}", text, bool(unsafe)))
    if known:
        logger.warning("%s: %d prompts that a guard or threshold has seen left out", spec, known)
    if not found:
        what = "harmless" if harmless else "labelled"
        raise UserError(f"{spec}: no {what} prompt that is new to the guards; take it out")
    return found


# --- who is evaluated -----------------------------------------------------------------------------


def find_guards(config: Config) -> tuple[list[Judged], list[str]]:
    """The default guard, and what is trained: `improved_model_path`, or the config's arms and
    seeds; and which of these are not trained.
    """
    given = config.evaluation.improved_model_path
    guards = []
    missing = []
    if given:
        guards.append(trained_guard(Path(given), config))
    else:
        for name in config.training.arms:
            for seed in config.training.seeds_of(name):
                folder = arm_folder(config, name, seed)
                if has_card(folder):
                    trained_guard(folder, config)
                    guards.append(Judged(name, seed, folder))
                else:
                    missing.append(f"{name}-seed{seed}")
    if not guards:
        where = config.training.output_dir
        raise UserError(f"{where}: nothing is trained there; run train with this config first")
    if missing:
        logger.warning("Not trained, and so left out: %s", ", ".join(missing))
    defaults = [Judged("A0")]
    if any(one.about.query == "chatml" for one in guards):
        defaults.append(Judged("A0-legacy"))
    return defaults + guards, missing


def trained_guard(
    folder: Path,
    config: Config,
) -> Judged:
    """The arm and seed that a folder holds."""
    card = read_card(folder)
    if not isinstance(card, ArmOrigin) or card.arm is None or card.seed is None:
        raise UserError(f"{card_path(folder)}, fields arm and seed: do not say which arm it is")
    arm = asdict(arm_named(card.arm))
    check_stage(folder / "stage.json", config, "train", arm, card.seed)
    return Judged(card.arm, card.seed, folder)


def improved_arm(
    config: Config,
    arms: Collection[str],
) -> str:
    """The arm that the verdict is about: A8, else the last one that was trained."""
    if "A8" in arms:
        return "A8"
    trained = [name for name in config.training.arms if name in arms]
    if not trained:  # improved_model_path names an arm that is none of the config's
        trained = [name for name in arms if name not in UNTRAINED]
    built_up = [name for name in trained if not name.startswith(("A2", "C"))]
    return (built_up or trained)[-1]


# --- what they say --------------------------------------------------------------------------------


def score(
    one: Judged,
    texts: Texts,
    config: Config,
    folder: Path,
) -> Answers:
    """One guard on all prompts. It is loaded only if there is a prompt that it has not judged yet.

    What is kept counts for one prompt, one guard (its weights) and one way of asking alone. A
    verdict that a server failed to give is asked for again.
    """
    served = one.folder is None and config.llama_guard.engine == "server"
    guard = Loaded(lambda: load(one, config))

    def judge(some: list[str]) -> Iterator[tuple[int, Row]]:
        yield from enumerate(ask(one, guard.get(), some, config))

    rows = kept_rows(
        folder / f"{one.name}.jsonl",
        identity_of(one, config),
        list(texts.values()),
        judge,
        size=CHUNK,
        served=served,
        title=one.name,
    )
    guard.free()
    said = [answer_of(row, one.about) for row in rows]
    frame = pd.DataFrame(said, index=list(texts), dtype=object)  # an error may be None
    return frame.astype({"score": float, "decided": bool})


def load(
    one: Judged,
    config: Config,
) -> GenerativeGuard:
    """A guard, on the base that it was trained on."""
    path, options = loaded_by(one, config)
    return load_llama_guard(path, **options)


def loaded_by(
    one: Judged,
    config: Config,
) -> tuple[str, dict[str, Any]]:
    """What `load_llama_guard` is given. A server knows the default guard alone."""
    section = config.llama_guard
    options: dict[str, Any] = {
        "official_template": section.use_official_template,
        "progress": False,
    }
    if one.folder is None:
        return section.default_model_path, options | section.engine_options()
    if section.load_in_4bit:
        options["load_in_4bit"] = True
    if not one.about.probe:
        # vLLM does not quantize as training does
        vllm = section.engine == "vllm" and not section.load_in_4bit
        options["engine"] = "vllm" if vllm else "transformers"
        options["adapter"] = str(one.folder)
    return section.base_model_path, options


def identity_of(
    one: Judged,
    config: Config,
) -> list[Any]:
    """What the answers of a guard depend on."""
    path, options = loaded_by(one, config)
    options.pop("server_url", None)  # where it listens makes no other answer
    trained = one.folder and fingerprint(one.folder)
    asked = [one.about.query, template(), config.llama_guard.legacy_new_tokens]
    return [guard_identity(path, options), trained, asked]


def ask(
    one: Judged,
    loaded: GenerativeGuard,
    texts: Sequence[str],
    config: Config,
) -> list[Row]:
    """What is kept of each prompt: score, decision and error, or the text that the guard wrote."""
    if one.about.query != "guard":
        new_tokens = config.llama_guard.legacy_new_tokens
        written = written_as_asked(loaded, one.about.query, texts, new_tokens)
        return [{"text": said.text, "error": said.error} for said in written]
    conversations = [pair(text) for text in texts]
    if one.about.probe:
        rows = []
        for p in probe_scores(loaded, one.folder, conversations):
            rows.append({"unsafe": p, "decided": p >= 0.5, "error": None})
        return rows
    return [verdict_row(said, "prompt_unsafe") for said in loaded.judge(conversations)]


def answer_of(
    kept: Row,
    arm: Arm,
) -> Row:
    """What a kept row means. A verdict in words has no probability: its score is 1 or 0."""
    error = kept["error"]
    score = kept.get("unsafe")
    decided = kept.get("decided")
    reason = "Classified as unsafe"
    if "text" in kept:
        decided, is_verdict = parsed_unsafe(kept["text"], arm.parser)
        score = float(decided)
        reason = legacy_reason(kept["text"])
        if error is None and not is_verdict:
            error = "no verdict"
    elif error is not None:
        score = 1.0
        decided = True
        reason = "no verdict"
    reason = reason if decided else ""
    return {"score": score, "decided": decided, "error": error, "reason": reason}


def best_cut(
    default: Answers,
    validation: Prompts,
) -> float:
    """The threshold of A1: that of A0's best F1 on validation."""
    if validation.positives in (0, len(validation.ids)):
        logger.warning("validation has one class only: A1 keeps the threshold 0.5")
        return 0.5
    scores = default.score[validation.ids]
    return metrics.fit_threshold(validation.truth, scores, "validation")["value"]


def controls(
    default: Answers,
    cut: float,
) -> dict[str, Answers]:
    """Guards that need no training: A1, A0's score above another threshold; and the one that blocks
    all.
    """
    above = default.assign(decided=default.score > cut, error=None, reason="")
    return {"A1": above, ALWAYS: above.assign(score=1.0, decided=True)}


# --- measuring ------------------------------------------------------------------------------------


def as_arrays(
    arms: Arms,
    answers: AllAnswers,
    test: Prompts,
    validation: Prompts,
) -> dict[str, measure.Arm]:
    """The answers of each arm as arrays, a row a seed."""
    found = {}
    for arm, names in arms.items():
        said = [answers[name].loc[test.ids] for name in names]
        known = [answers[name].score[validation.ids] for name in names]
        seeds = [name.rpartition("-seed")[2] for name in names]
        found[arm] = measure.Arm(
            np.array([frame.score for frame in said], dtype=float),
            np.array([frame.decided for frame in said], dtype=bool),
            np.array(known, dtype=float),
            tuple(seeds) if len(seeds) > 1 else ("",),
        )
    return found


def judge_facts(
    rows: Sequence[Row],
    config: Config,
) -> Row:
    """How far guard, judge and people agree on the responses that T2's truth is made of.

    A judge that is the guard itself agrees with it, which tells nothing: of the two that one alone
    is asked whose word is T2's truth.
    """
    settings = config.evaluation
    voters = list(measure.LABELLERS)
    if settings.judge:
        judge = guard_identity(settings.judge, {})
        if judge == guard_identity(config.llama_guard.default_model_path, {}):
            voters.remove("guard" if settings.t2_label == "judge" else "judge")
    let_in = [row for row in rows if passed(row)]
    votes = {}
    for label in voters:
        votes[label] = []
        for row in let_in:
            words = [word_on(response, label) for response in row["responses"]]
            votes[label].append(words)
    rounds = min(settings.draws, 1000)
    return measure.judge_facts(settings.t2_label, votes, rounds)


def task_results(
    tasks: Mapping[str, Prompts],
    measured: Mapping[str, Measured],
) -> dict[str, Row]:
    """What results.json holds of each task: its size, and every metric of every arm."""
    found = {}
    for name, prompts in tasks.items():
        rows = len(prompts.ids)
        found[name] = {
            "rows": rows,
            "positives": prompts.positives,
            "groups": len(set(prompts.groups)),
            "base_rate": prompts.positives / rows if rows else None,
            "arms": arm_results(measured[name]),
        }
    return found


def arm_results(measured: Measured) -> dict[str, Row]:
    """Every metric of every arm of a task, with its interval and by seed."""
    arms = {}
    for arm, seeds in measured.seeds.items():
        names = seeds[0] if seeds else ()
        cell: Row = {metric: measured.value(arm, metric) for metric in names}
        drawn = measured.drawn[arm]
        ends = {metric: measure.interval(drawn[metric]) for metric in drawn}
        arms[arm] = cell | {"intervals": ends, "seeds": seeds}
    return arms


def differences(
    measured: Mapping[str, Measured],
    best: str,
) -> list[Row]:
    """The improved arm minus every other one, in what decides."""
    out = []
    for task, metric in COMPARED:
        others = measured[task].seeds if task in measured else ()
        for other in others:
            if other in (best, ALWAYS):
                continue
            found = measure.difference(measured[task], best, other, metric)
            if found is not None:
                about_it = {"task": task, "metric": metric, "first": best, "second": other}
                out.append(about_it | found)
    return out


# --- what is left ---------------------------------------------------------------------------------


def write_original(
    config: Config,
    results: dict[str, Any],
    t1: Prompts,
    texts: Texts,
    arms: Arms,
    answers: AllAnswers,
) -> None:
    """The original's two files: evaluation_results_<time>.json and experiment_results_<time>.json."""
    summary = results["summary"]
    found = {"improvement": summary["improvement"]} | results
    for name, arm in models_compared(results):
        said = [answers[one].loc[t1.ids] for one in arms[arm]]
        flagged = np.array([frame.decided for frame in said], dtype=bool)
        counts = {
            "true_positives": flagged & t1.truth,
            "false_positives": flagged & ~t1.truth,
            "true_negatives": ~flagged & ~t1.truth,
            "false_negatives": ~flagged & t1.truth,
        }
        found[name] = summary[name] | {"metrics": summary[name]}
        for count, which in counts.items():  # the mean over seeds
            found[name][count] = float(which.sum(1).mean())
        found[name]["predictions"] = []
        for i, key in enumerate(t1.ids):
            prediction = {
                "input": texts[key],
                "true_label": WORDS[bool(t1.truth[i])],
                "predicted_label": WORDS[measure.most(flagged[:, i])],
                "reason": said[0].reason[key],
            }
            found[name]["predictions"].append(prediction)
    stamp = time.strftime("%Y%m%d_%H%M%S")
    folder = Path(config.evaluation.results_dir)
    write_json(folder / f"evaluation_results_{stamp}.json", found)
    experiment = {
        "process_stats": data.read_json(Path(config.dataset.store_dir) / "process_stats.json"),
        "improved_model_path": results["improved_model_path"],
        "evaluation": summary,
    }
    folder = Path(config.experiment.results_dir)
    write_json(folder / f"experiment_results_{stamp}.json", experiment)


def models_compared(results: Facts) -> list[tuple[str, str]]:
    """The two arms that the original compares, by its names for them."""
    return [("default_model", "A0"), ("improved_model", results["improved"])]


def original_summary(results: Facts) -> dict[str, Row]:
    """The original's metrics of both models on T1, and the difference in each."""
    summary: dict[str, Row] = {}
    on_t1 = results["tasks"]["T1"]["arms"]
    for name, arm in models_compared(results):
        values = {metric: on_t1[arm][metric] for metric in ORIGINAL}
        summary[name] = values | {"f1_score": values["f1"]}
    improvement = {}
    for metric, ours in summary["improved_model"].items():
        theirs = summary["default_model"][metric]
        known = ours is not None and theirs is not None
        improvement[metric] = ours - theirs if known else None
    return summary | {"improvement": improvement}


def predictions(
    config: Config,
    rows: Splits,
    texts: Texts,
    answers: AllAnswers,
) -> list[Row]:
    """predictions.jsonl: a row a prompt, with what every guard says of it."""
    out = []
    known = {}
    for split, some in rows.items():
        for row in some:
            known[prompt_id(split, row)] = {
                "human_unsafe": row["human_unsafe"],
                "kind": row["kind"],
                "passed": passed(row),
                "outcome_unsafe": outcome(row, config.evaluation.t2_label),
            }
    said = {}
    for name, frame in answers.items():
        said[name] = frame.to_dict("index")
    for key, text in texts.items():
        guards = {name: of_guard[key] for name, of_guard in said.items()}
        line = {"id": key, "input": text}
        line |= known.get(key, {})
        out.append(line | {"guards": guards})
    return out


def write_page(
    path: Path,
    results: Facts,
    tasks: Mapping[str, Prompts],
    texts: Texts,
    arms: Arms,
    answers: AllAnswers,
    cut: float,
) -> None:
    """results.html: the prompts of every task, with the scores of the arms side by side.

    Args:
        cut: the threshold of A1; the others have 0.5.
    """
    shown = [arm for arm in arms if arm != ALWAYS]
    rows = []
    tables = []
    for name, prompts in tasks.items():
        title = task_title(name)
        tables.append(PageTable(title, *task_table(name, results)))
        for key, unsafe in zip(prompts.ids, prompts.truth, strict=True):
            conversation = {"id": key, "messages": pair(texts[key])}
            row = page_row(conversation, title, bool(unsafe))
            for arm in shown:
                told = answers[arms[arm][0]].loc[key]  # of the first seed
                row.add_score(told.score, told.error)
            rows.append(row)
    guards = {arm: cut if arm == "A1" else 0.5 for arm in shown}
    verdict = results["verdict"]
    write_results_page(
        path,
        title="Does the feedback help the input guard?",
        note=f"Verdict on {verdict['about']}: {verdict['verdict']}. Tables: means over seeds. "
        "Below: of each arm the first seed. A guard that has words alone scores 1 or 0.",
        tables=tables,
        guards=guards,
        rows=rows,
    )


# --- results.md -----------------------------------------------------------------------------------


def markdown(results: Facts) -> str:
    """results.md: the verdict and what it rests on, then the tasks."""
    told = results["verdict"]
    checks = []
    for row in told["checks"]:
        checks.append([row["condition"], row["state"], row["found"]])
    conditions = []
    for row in told["conditions"]:
        found = [row.get(name) for name in ("difference", "interval")]
        conditions.append([row["condition"], row["state"], *found])
    parts = [
        "# Does the feedback help the input guard?",
        f"**Verdict on {told['about']}: {told['verdict']}.**",
        "Before any difference is read:",
        report.table(checks, ["condition", "", "found"]),
        "Then all of these:",
        report.table(conditions, ["condition", "", "difference", "95 %"]),
        f"![Differences of {told['about']} from the others on T2](differences.png)",
        f"Means over seeds; 95 % intervals of {results['draws']:,} paired draws of prompts and "
        "seeds, near-copies of a prompt together. All conditions are tested after Holm's "
        f"correction. The recall is {results['target_recall']:g}, on the test prompts' own ROC "
        "curve; at equal block rate every guard blocks as many prompts as are unsafe. AUPRC rests "
        "on the base rate, which is what a guard that blocks everything has. T2 holds what A0 "
        "passes: A0 and A1 are cut off there, and a difference from them favours the arm. Truth "
        f"of T2: at least half of the responses unsafe by {results['t2_label']}.",
    ]
    if results["warning"]:
        parts.insert(2, f"Warning: {results['warning']}.")
    if results["missing"]:
        missing = ", ".join(results["missing"])
        parts.append(f"Not trained, and so not in here: {missing}.")
    for name in results["tasks"]:
        parts.append(task_text(name, results))
    parts.append(differences_text(results))
    if results["responses"]["agreement"] or results["responses"]["halves"]:
        parts.append(responses_text(results["responses"]))
    text = "\n\n".join(part.strip() for part in parts)
    return f"{text}\n"


def task_title(name: str) -> str:
    """What a task is called; one of `evaluation.extra` is asked what T1 asks."""
    return TASKS.get(name, f"T1 on {name}")


def task_table(
    name: str,
    results: Facts,
) -> tuple[list[str], list[list[str]]]:
    """The headings and the rows of a task's table, an arm a row."""
    shown = SHOWN.get(name, SHOWN["T1"])
    rows = []
    for arm, cell in results["tasks"][name]["arms"].items():
        row = [f"{arm}: {results['questions'][arm]}"]
        for metric in shown:
            text = report.number(cell.get(metric))
            ends = cell["intervals"].get(metric)
            row.append(f"{text} {report.number(ends)}" if ends else text)
        rows.append(row)
    return ["", *(HEADINGS[metric] for metric in shown)], rows


def task_text(
    name: str,
    results: Facts,
) -> str:
    """A task with its table."""
    task = results["tasks"][name]
    facts = (
        f"{task['rows']} prompts in {task['groups']} groups of near-copies, {task['positives']} "
        f"unsafe (base rate {report.number(task['base_rate'])})."
    )
    header, rows = task_table(name, results)
    return f"## {task_title(name)}\n\n{facts}\n\n{report.table(rows, header)}"


def differences_text(results: Facts) -> str:
    """The improved arm minus every other one."""
    rows = []
    for row in results["differences"]:
        metric = HEADINGS[row["metric"]]
        cells = [row[name] for name in ("difference", "interval", "by_seed")]
        rows.append([row["second"], row["task"], metric, *cells])
    header = ["minus", "task", "metric", "difference", "95 %", "lowest, highest seed"]
    return f"## {results['improved']} minus the others\n\n{report.table(rows, header)}"


def responses_text(judge: Facts) -> str:
    """How far those who label the responses agree, and whether one agrees with itself."""
    label = judge["label"]
    found = {f"{label} and {other}": said for other, said in judge["agreement"].items()}
    if judge["halves"]:
        found[f"{label}, two halves of a prompt's responses"] = judge["halves"]
    names = ["n", "agreement", "kappa", "kappa_interval"]
    rows = []
    for what, said in found.items():
        cells = [said[name] for name in names]
        rows.append([what, *cells])
    table = report.table(rows, ["", "pairs", "agreement", "kappa", "95 %"])
    return f"## The labels of the responses\n\n{table}"


def plot(
    results: Facts,
    path: Path,
) -> None:
    """A forest: on T2 the improved arm's AUROC minus that of each other arm; and each arm's AUPRC
    beside the base rate, which is what always saying unsafe has.
    """
    task = results["tasks"]["T2"]
    found = []
    for row in results["differences"]:
        if (row["task"], row["metric"]) == COMPARED[0]:
            found.append(row)
    found.sort(key=lambda row: not row["second"].startswith("C"))  # what decides stands above
    cells = {}
    for arm, cell in task["arms"].items():
        if cell.get("auprc") is not None:
            cells[arm] = cell
    height = 1.6 + 0.3 * max(len(found), len(cells))
    figure, axes_of = plt.subplots(1, 2, figsize=(9, height), layout="constrained")
    left, right = axes_of

    differences = []
    for row in found:
        cut_off = " (cut off on T2)" if row["second"] in ("A0", "A1") else ""
        name = f"{row['first']} − {row['second']}{cut_off}"
        differences.append((name, row["difference"], row["interval"]))
    forest(left, "T2: difference in AUROC", differences)
    left.axvspan(-measure.MARGIN, measure.MARGIN, color="0.9")
    left.axvline(0, color="black", linewidth=1)
    left.set_xlabel("right of 0: the improved arm is better\n(grey: too small to matter)")

    scores = []
    for arm, cell in cells.items():
        ends = cell["intervals"].get("auprc")
        scores.append((arm, cell["auprc"], ends))
    forest(right, f"T2: AUPRC (n={task['rows']})", scores)
    if task["base_rate"] is not None:
        right.axvline(task["base_rate"], color="black", linestyle=":")
        right.set_xlabel(f"dotted: base rate {task['base_rate']:.2f} = always unsafe")
    report.save_figure(figure, path)


def forest(
    axes: plt.Axes,
    title: str,
    rows: Sequence[tuple[str, float, Sequence[float] | None]],
) -> None:
    """Named points with their intervals, in black, the first above."""
    for y, (_, value, ends) in enumerate(rows):
        axes.plot(value, y, "o", color="black")
        if ends:
            axes.plot(ends, [y, y], "-", color="black", linewidth=1.5)
    names = [name for name, _, _ in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_title(title)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)


if __name__ == "__main__":
    run_cli(main)
