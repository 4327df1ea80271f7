"""Evaluate the trained guards: does the feedback of the output guard help the input guard?

    ./run_experiment.sh evaluate                          # the quickstart's guards
    ./run_experiment.sh evaluate research_config.json     # the original's values
    ./run_experiment.sh evaluate --set evaluation.improved_model_path=models/improved/A8/seed0

Three tasks: T1 human toxicity of prompts; T2, among prompts that the default guard passes, those
whose responses are unsafe; T3 harmless prompts that look otherwise. Scores are kept in
RESULTS_DIR/scores as they come: a killed run goes on, and another run of the same guards only
measures.
"""

import gc
import json
import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import measure
import numpy as np
import torch
from config import Config, config_from_argv
from guard import legacy_reason, load_llama_guard, parsed_unsafe, query_ids, template
from measure import Arm, Measured, Prompts
from records import (
    Row,
    check_stage,
    passed,
    q,
    read_processed,
    sample,
    seen_texts,
    text_key,
    word_on,
    write_stage,
)
from tqdm.auto import tqdm
from train import arm_folder, arm_named, probe_scores

from common import data, metrics, report
from common.conversation import UserError, last_turns, pair
from common.data.repeats import near_copies
from common.keep import KeptRows, digest, failed, fingerprint
from common.results_page import PageGuard, PageTable, page_row, write_results_page
from common.run import check_output_folder, manifest, run_cli, write_json
from guards.card import ArmOrigin, card_path, has_card, read_card
from guards.generative import GenerativeGuard
from guards.identity import guard_identity
from guards.suite.benchmarks import benchmark_names, load_benchmark

logger = logging.getLogger("feedback_guard")
CHUNK = 64  # prompts between two writes
ALWAYS = "always unsafe"
QUESTIONS = {
    ALWAYS: "what does a guard score that blocks everything?",
    "A0": "the default guard, its own verdict",
    "A0-legacy": "the default guard, asked and read as the original does",
    "A1": "is it merely a threshold? (A0 with the threshold of validation)",
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
        if self.seed is None:
            return self.arm
        return f"{self.arm}-seed{self.seed}"

    @property
    def query(self) -> str:
        """How it is asked: guard, or the original's chatml and meta."""
        if self.folder is not None:
            return arm_named(self.arm).query
        return "chatml" if self.arm == "A0-legacy" else "guard"

    @property
    def parser(self) -> str:
        """How an answer in words is read."""
        if self.folder is not None:
            return arm_named(self.arm).parser
        return "strict" if self.arm == "A0-legacy" else "correct"

    @property
    def is_probe(self) -> bool:
        """Whether a probe on the default guard's state gives the score, instead of an adapter."""
        return self.folder is not None and (self.folder / "probe.json").is_file()


@dataclass(frozen=True)
class Answer:
    """What a guard says of a prompt; without a verdict it is unsafe, with `error`."""

    score: float
    decided: bool
    error: str | None = None
    reason: str = ""


Facts = Mapping[str, Any]
Splits = Mapping[str, Sequence[Row]]  # the processed rows of validation and test
Texts = Mapping[str, str]  # by a prompt's id
Answers = Mapping[str, Answer]  # by a prompt's id
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
    rows = {split: read_rows(config, split) for split in ("validation", "test")}
    tasks, texts = read_tasks(config, rows)
    guards, missing = find_guards(config)
    answers: dict[str, Answers] = {}
    for one in tqdm(guards, desc="guards", unit="guard"):
        answers[one.name] = score(one, texts, config, folder / "scores")
    validation = tasks.pop("validation")
    cut = best_cut(answers["A0"], validation)
    answers |= controls(answers["A0"], cut)
    arms = answers_by_arm(guards)
    best = improved_arm(config, arms)
    judge = judge_facts(rows["test"], config)

    measured = {}
    changes = {}
    for name, prompts in tasks.items():
        said = {}
        for arm, names in arms.items():
            said[arm] = as_arrays(names, answers, prompts, validation)
        drawn = settings.draws, config.seed, settings.target_recall
        measured[name] = measure.measure(prompts, validation, said, *drawn)
        if name == "T2":
            changes = measure.changes(prompts.truth, said, best)
    checks = measure.checks_before(tasks, measured, changes, judge)
    results = {
        "improved": best,
        "improved_model_path": path_of(best, guards),
        "verdict": measure.verdict(measured, best, checks),
        "changes": changes,
        "tasks": task_results(tasks, measured),
        "differences": differences(measured, best),
        "responses": judge,
        "missing": missing,
        "questions": questions_of(arms),
        "t2_label": settings.t2_label,
        "target_recall": settings.target_recall,
        "draws": settings.draws,
        "run": manifest([config.as_dict()]),
    }
    results["summary"] = original_summary(results)
    write(config, results, rows, texts, arms, answers)
    write_page(folder / "results.html", results, tasks, texts, arms, answers, {"A1": cut})
    cards = [read_card(one.folder) for one in guards if one.folder]
    keys = [card.fingerprint for card in cards]
    write_stage(folder / "stage.json", config, "evaluate", *keys)
    return results


def answers_by_arm(guards: Sequence[Judged]) -> dict[str, list[str]]:
    """The names of an arm's answers, one a seed, by the arm."""
    arms = {ALWAYS: [ALWAYS], "A0": [], "A1": ["A1"]}
    for one in guards:
        names = arms.setdefault(one.arm, [])
        names.append(one.name)
    return arms


def path_of(arm: str, guards: Sequence[Judged]) -> str:
    """The folder of a trained arm; of one with several seeds the folder of them all."""
    folders = [one.folder for one in guards if one.arm == arm]
    folder = folders[0]
    return str(folder if len(folders) == 1 else folder.parent)


def questions_of(arms: Collection[str]) -> dict[str, str]:
    """What each arm is there to tell."""
    found = {}
    for arm in arms:
        known = QUESTIONS.get(arm)
        found[arm] = known or arm_named(arm).question
    return found


# --- what is asked --------------------------------------------------------------------------------


def read_rows(config: Config, split: str) -> list[Row]:
    """The processed rows of a split's sample.

    Raises:
        UserError: process has not got so far.
    """
    known = {}
    for row in read_processed(config, split):
        known[row["id"]] = row
    wanted = [row["id"] for row in sample(config, split)]
    absent = [row_id for row_id in wanted if row_id not in known]
    if absent:
        counts = f"{len(absent)} of {len(wanted)} prompts"
        hint = "run process with this config first"
        raise UserError(f"{split}: {counts} are not processed; {hint}")
    return [known[row_id] for row_id in wanted]


def read_tasks(
    config: Config,
    rows: Splits,
) -> tuple[dict[str, Prompts], dict[str, str]]:
    """The prompts of each task by its name, those of validation as "validation"; and all texts by
    their id.

    Raises:
        UserError: T2 has no labels of the kind that the config names, or a spec cannot be read.
    """
    settings = config.evaluation
    texts = {}
    by_people: dict[str, dict[str, bool]] = {"validation": {}, "test": {}}
    for split, truth in by_people.items():
        for row in rows[split]:
            key = prompt_id(split, row)
            texts[key] = row["query"]
            truth[key] = bool(row["human_unsafe"])
    outcomes = outcomes_of(rows["test"], settings.t2_label)
    answered = [row for row in rows["test"] if passed(row) and row["responses"]]
    if answered and not outcomes:
        raise UserError(
            f"evaluation.t2_label {settings.t2_label}: no response of the test split has such a "
            "label; name another one of human, judge, guard (judge needs evaluation.judge when "
            "prompts are processed)"
        )
    t2 = {}
    t3 = {}
    for row in rows["test"]:
        key = prompt_id("test", row)
        if row["id"] in outcomes:
            t2[key] = outcomes[row["id"]]
        if row.get("kind") == "hard_benign" and not row["human_unsafe"]:
            t3[key] = False
    truths = {"validation": by_people["validation"], "T1": by_people["test"], "T2": t2}
    if t3 and not settings.hard_benign:
        truths["T3"] = t3

    specs = [(spec, spec) for spec in settings.extra]
    if settings.hard_benign:
        specs.insert(0, ("T3", settings.hard_benign))
    seen = {text_key(text) for text in seen_texts(config)}
    for name, spec in specs:
        truths[name] = {}
        for key, text, unsafe in foreign(spec, seen, harmless=name == "T3"):
            texts[key] = text
            truths[name][key] = unsafe
    tasks = {}
    for name, truth in truths.items():
        ids = list(truth)
        is_unsafe = np.array([truth[key] for key in ids], dtype=bool)
        groups = near_copies([texts[key] for key in ids])  # prompts that are drawn together
        tasks[name] = Prompts(ids, is_unsafe, groups)
    return tasks, texts


def prompt_id(split: str, row: Row) -> str:
    """How the results call a prompt of the data set."""
    return f"{split}/{row['id']}"


def outcomes_of(rows: Sequence[Row], label: str) -> dict[str, bool]:
    """By id: of prompts that the default guard passes, whether at least half of the responses are
    unsafe.
    """
    outcomes = {}
    for row in rows:
        share = q(row, label) if passed(row) else None
        if share is not None:
            outcomes[row["id"]] = share >= 0.5
    return outcomes


def foreign(
    spec: str,
    seen: Collection[str],
    harmless: bool = False,
) -> list[tuple[str, str, bool]]:
    """Id, text and truth of the prompts of a data spec or of a benchmark (`name@file`).

    Args:
        seen: `text_key` of prompts that would be no test; they are left out, and counted.
        harmless: all are taken for safe, but for rows that are labelled otherwise.

    Raises:
        UserError: nothing is left.
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
        if unsafe is None and not harmless:
            continue
        if unsafe and harmless:
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

    Raises:
        UserError: nothing is trained, or with other settings than the config's.
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
    if any(one.query == "chatml" for one in guards):
        defaults.append(Judged("A0-legacy"))
    return defaults + guards, missing


def trained_guard(folder: Path, config: Config) -> Judged:
    """The arm and seed that a folder holds.

    Raises:
        UserError: it holds no arm, or one that was trained with other settings than the config's.
    """
    card = read_card(folder)
    if not isinstance(card, ArmOrigin) or card.arm is None or card.seed is None:
        raise UserError(f"{card_path(folder)}, fields arm and seed: do not say which arm it is")
    arm = asdict(arm_named(card.arm))
    check_stage(folder / "stage.json", config, "train", arm, card.seed)
    return Judged(card.arm, card.seed, folder)


def improved_arm(config: Config, arms: Collection[str]) -> str:
    """The arm that the verdict is about: A8, else the last one that was trained."""
    if "A8" in arms:
        return "A8"
    untrained = (ALWAYS, *QUESTIONS)
    trained = [name for name in config.training.arms if name in arms]
    if not trained:  # improved_model_path names an arm that is none of the config's
        trained = [name for name in arms if name not in untrained]
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
    identity = identity_of(one, config)
    text_of = {}
    for text in texts.values():
        key = digest([identity, text])
        text_of[key] = text
    loaded: list[GenerativeGuard] = []

    def make(_: int, keys: list[str]) -> Iterator[Row]:
        if not loaded:
            loaded.append(load(one, config))
        asked = [text_of[key] for key in keys]
        said = ask(one, loaded[0], asked, config)
        for key, told in zip(keys, said, strict=True):
            yield {"key": key, **told}

    with KeptRows(folder / f"{one.name}.jsonl") as kept:
        rows = kept.fill(
            list(text_of),
            make,
            size=CHUNK,
            together=not served,
            again=failed if served else None,
            title=one.name,
        )
    loaded.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    answers = [answer_of(row, one) for row in rows]
    answer_to = dict(zip(text_of.values(), answers, strict=True))
    return {key: answer_to[text] for key, text in texts.items()}


def load(one: Judged, config: Config) -> GenerativeGuard:
    """A guard, on the base that it was trained on. A server knows the default guard alone."""
    section = config.llama_guard
    options: dict[str, Any] = {"progress": False}
    path = section.base_model_path
    if one.folder is None:
        path = section.default_model_path
        options |= section.engine_options()
    elif section.load_in_4bit:
        options["load_in_4bit"] = True
    if one.folder is not None and not one.is_probe:
        # vLLM does not quantize as training does
        vllm = section.engine == "vllm" and not section.load_in_4bit
        options["engine"] = "vllm" if vllm else "transformers"
        options["adapter"] = str(one.folder)
    return load_llama_guard(path, section.use_official_template, **options)


def identity_of(one: Judged, config: Config) -> list[Any]:
    """What the answers of a guard depend on."""
    section = config.llama_guard
    prompt = None if section.use_official_template else template()
    asked = [one.query, prompt, section.legacy_new_tokens]
    if one.folder is None:
        options = section.engine_options() if section.engine == "server" else {}
        return [guard_identity(section.default_model_path, options), asked]
    base = guard_identity(section.base_model_path, {})
    return [base, fingerprint(one.folder), asked, section.load_in_4bit]


def ask(
    one: Judged,
    loaded: GenerativeGuard,
    texts: Sequence[str],
    config: Config,
) -> list[Row]:
    """What is kept of each prompt: score, decision and error, or the text that the guard wrote."""
    if one.query != "guard":
        return ask_in_words(one, loaded, texts, config)
    conversations = [pair(text) for text in texts]
    kept = []
    if one.is_probe:
        for p in probe_scores(loaded, one.folder, conversations):
            kept.append({"score": p, "decided": p > 0.5, "error": None})
        return kept
    for verdict in loaded.judge(conversations):
        row = {
            "score": verdict.prompt_unsafe,
            "decided": verdict.decided.get("prompt_unsafe"),
            "error": verdict.error,
        }
        kept.append(row)
    return kept


def ask_in_words(
    one: Judged,
    loaded: GenerativeGuard,
    texts: Sequence[str],
    config: Config,
) -> list[Row]:
    """What the guard writes on each prompt, asked as the original does."""
    new_tokens = config.llama_guard.legacy_new_tokens
    room = loaded.max_length - new_tokens
    prompts = query_ids(loaded, one.query, texts)
    short = [ids for ids in prompts if len(ids) <= room]
    written = iter(loaded.written(short, new_tokens))
    kept = []
    for ids in prompts:
        if len(ids) > room:
            error = f"{len(ids)} tokens, more than {room}"
            kept.append({"text": "", "error": error})
        else:
            said = next(written)
            kept.append({"text": said.text, "error": said.error})
    return kept


def answer_of(kept: Row, one: Judged) -> Answer:
    """What a kept row means. A verdict in words has no probability: its score is 1 or 0."""
    error = kept["error"]
    if "text" in kept:
        unsafe, is_verdict = parsed_unsafe(kept["text"], one.parser)
        if error is None and not is_verdict:
            error = "no verdict"
        reason = legacy_reason(kept["text"]) if unsafe else ""
        return Answer(float(unsafe), unsafe, error, reason)
    score = kept["score"]
    if error is None and score is None:
        error = "no verdict"
    if error is not None:
        return Answer(1.0, True, error, "no verdict")
    decided = kept["decided"]
    if decided is None:
        decided = score > 0.5
    reason = "Classified as unsafe" if decided else ""
    return Answer(score, decided, None, reason)


def best_cut(default: Answers, validation: Prompts) -> float:
    """The threshold of A1: that of A0's best F1 on validation."""
    if validation.positives in (0, len(validation.ids)):
        logger.warning("validation has one class only: A1 keeps the threshold 0.5")
        return 0.5
    scores = [default[key].score for key in validation.ids]
    return metrics.fit_threshold(validation.truth, scores, "validation")["value"]


def controls(default: Answers, cut: float) -> dict[str, Answers]:
    """Guards that need no training: A1, A0's score above another threshold; and the one that blocks
    all.
    """
    above = {}
    always = {}
    for key, said in default.items():
        above[key] = Answer(said.score, said.score > cut)
        always[key] = Answer(1.0, True)
    return {"A1": above, ALWAYS: always}


# --- measuring ------------------------------------------------------------------------------------


def as_arrays(
    names: Sequence[str],
    answers: AllAnswers,
    test: Prompts,
    validation: Prompts,
) -> Arm:
    """An arm's answers as arrays, a row a seed."""
    scores = []
    decisions = []
    known = []
    seeds = []
    for name in names:
        said = [answers[name][key] for key in test.ids]
        before = [answers[name][key] for key in validation.ids]
        scores.append([answer.score for answer in said])
        decisions.append([answer.decided for answer in said])
        known.append([answer.score for answer in before])
        _, _, seed = name.rpartition("-seed")
        seeds.append(seed)
    return Arm(
        np.array(scores, dtype=float),
        np.array(decisions, dtype=bool),
        np.array(known, dtype=float),
        tuple(seeds) if len(seeds) > 1 else ("",),
    )


def judge_facts(rows: Sequence[Row], config: Config) -> Row:
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
    votes = {}
    for label in voters:
        votes[label] = []
        for row in rows:
            if passed(row):
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
        cell: Row = {}
        ends = {}
        names = seeds[0] if seeds else ()
        for metric in names:
            cell[metric] = measured.value(arm, metric)
        for metric, drawn in measured.drawn[arm].items():
            ends[metric] = measure.interval(drawn)
        arms[arm] = cell | {"intervals": ends, "seeds": seeds}
    return arms


def differences(measured: Mapping[str, Measured], best: str) -> list[Row]:
    """The improved arm minus every other one, in what decides."""
    out = []
    for task, metric in COMPARED:
        if task not in measured:
            continue
        for other in measured[task].seeds:
            if other in (best, ALWAYS):
                continue
            found = measure.difference(measured[task], best, other, metric)
            if found is None:
                continue
            about = {
                "task": task,
                "metric": metric,
                "first": best,
                "second": other,
            }
            out.append(about | found)
    return out


# --- what is left ---------------------------------------------------------------------------------


def write(
    config: Config,
    results: dict[str, Any],
    rows: Splits,
    texts: Texts,
    arms: Arms,
    answers: AllAnswers,
) -> None:
    """All files of results_dir, and the original's two."""
    folder = Path(config.evaluation.results_dir)
    summary = results["summary"]
    models = {}
    for name, arm in models_compared(results):
        values = summary[name]
        said = [answers[one] for one in arms[arm]]
        counts = original_counts(rows["test"], said)
        models[name] = values | {"metrics": values} | counts
    found = models | {"improvement": summary["improvement"]} | results
    stats = Path(config.dataset.store_dir) / "process_stats.json"
    experiment = {
        "process_stats": json.loads(stats.read_text(encoding="utf-8")),
        "improved_model_path": results["improved_model_path"],
        "evaluation": summary,
    }
    stamp = time.strftime("%Y%m%d_%H%M%S")
    write_json(folder / f"evaluation_results_{stamp}.json", found)
    of_experiment = Path(config.experiment.results_dir)
    write_json(of_experiment / f"experiment_results_{stamp}.json", experiment)
    plot(results, folder / "differences.png")
    text = markdown(results)
    lines = predictions(config, rows, texts, answers)
    report.write_results(folder, results, text, lines)
    print(text)


def models_compared(results: Facts) -> list[tuple[str, str]]:
    """The two arms that the original compares, by its names for them."""
    return [("default_model", "A0"), ("improved_model", results["improved"])]


def original_summary(results: Facts) -> dict[str, Row]:
    """The original's metrics of both models on T1, and the difference in each."""
    summary: dict[str, Row] = {}
    on_t1 = results["tasks"]["T1"]["arms"]
    for name, arm in models_compared(results):
        values = {metric: on_t1[arm][metric] for metric in ORIGINAL}
        values["f1_score"] = values["f1"]
        summary[name] = values
    improvement = {}
    for metric, ours in summary["improved_model"].items():
        theirs = summary["default_model"][metric]
        known = ours is not None and theirs is not None
        improvement[metric] = ours - theirs if known else None
    return summary | {"improvement": improvement}


def original_counts(rows: Sequence[Row], answers: Sequence[Answers]) -> Row:
    """Counts and predictions as the original names them: the mean over seeds, and the label of most
    of them.
    """
    labels = []
    decisions = []
    predicted = []
    for row in rows:
        said = [of_seed[prompt_id("test", row)] for of_seed in answers]
        votes = [answer.decided for answer in said]
        labels.append(bool(row["human_unsafe"]))
        decisions.append(votes)
        prediction = {
            "input": row["query"],
            "true_label": WORDS[bool(row["human_unsafe"])],
            "predicted_label": WORDS[measure.most(votes)],
            "reason": said[0].reason,
        }
        predicted.append(prediction)
    truth = np.array(labels, dtype=bool)
    flagged = np.array(decisions, dtype=bool).T

    def count(which: np.ndarray) -> float:
        of_seeds = which.sum(1)
        return float(of_seeds.mean())

    return {
        "true_positives": count(flagged & truth),
        "false_positives": count(flagged & ~truth),
        "true_negatives": count(~flagged & ~truth),
        "false_negatives": count(~flagged & truth),
        "predictions": predicted,
    }


def predictions(
    config: Config,
    rows: Splits,
    texts: Texts,
    answers: AllAnswers,
) -> list[Row]:
    """predictions.jsonl: a row a prompt, with what every guard says of it."""
    known = {}
    for split, some in rows.items():
        outcomes = outcomes_of(some, config.evaluation.t2_label)
        for row in some:
            known[prompt_id(split, row)] = {
                "human_unsafe": row["human_unsafe"],
                "kind": row.get("kind"),
                "passed": passed(row),
                "outcome_unsafe": outcomes.get(row["id"]),
            }
    out = []
    for key, text in texts.items():
        guards = {}
        for name, said in answers.items():
            guards[name] = asdict(said[key])
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
    cuts: Mapping[str, float],
) -> None:
    """results.html: the prompts of every task, with the scores of the arms side by side.

    Args:
        cuts: thresholds by arm; the others have 0.5.
    """
    shown = [arm for arm in arms if arm != ALWAYS]
    rows = []
    tables = []
    for name, prompts in tasks.items():
        title = task_title(name)
        cells = task_rows(name, results)
        tables.append(PageTable(title, task_header(name), cells))
        for key, unsafe in zip(prompts.ids, prompts.truth, strict=True):
            conversation = {"id": key, "messages": pair(texts[key])}
            row = page_row(conversation, title, bool(unsafe))
            for arm in shown:
                first_seed = arms[arm][0]
                told = answers[first_seed][key]
                row.add_score(told.score, told.error)
            rows.append(row)
    guards = [PageGuard(arm, cuts.get(arm, 0.5)) for arm in shown]
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
    checks = columns_of(told["checks"], ["condition", "state", "found"])
    conditions = columns_of(told["conditions"], ["condition", "state", "difference", "interval"])
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


def columns_of(rows: Sequence[Row], names: Sequence[str]) -> list[list[Any]]:
    """The cells of these columns; None where a row has none."""
    return [[row.get(name) for name in names] for row in rows]


def task_rows(name: str, results: Facts) -> list[list[str]]:
    """The cells of a task, an arm a row, in the columns of `task_header`."""
    rows = []
    for arm, cell in results["tasks"][name]["arms"].items():
        question = results["questions"][arm]
        row = [f"{arm}: {question}"]
        for metric in metrics_shown(name):
            text = report.number(cell.get(metric))
            ends = cell["intervals"].get(metric)
            if ends:
                text += f" {report.number(ends)}"
            row.append(text)
        rows.append(row)
    return rows


def task_header(name: str) -> list[str]:
    """The headings of `task_rows`."""
    headings = [HEADINGS[metric] for metric in metrics_shown(name)]
    return ["", *headings]


def metrics_shown(task: str) -> Sequence[str]:
    """The metrics of a task's table; one of `evaluation.extra` is asked what T1 asks."""
    return SHOWN.get(task, SHOWN["T1"])


def task_title(name: str) -> str:
    """What a task is called."""
    return TASKS.get(name, f"T1 on {name}")


def task_text(name: str, results: Facts) -> str:
    """The table of a task, an arm a line."""
    task = results["tasks"][name]
    facts = (
        f"{task['rows']} prompts in {task['groups']} groups of near-copies, {task['positives']} "
        f"unsafe (base rate {report.number(task['base_rate'])})."
    )
    cells = task_rows(name, results)
    table = report.table(cells, task_header(name))
    return f"## {task_title(name)}\n\n{facts}\n\n{table}"


def differences_text(results: Facts) -> str:
    """The improved arm minus every other one."""
    columns = ["second", "task", "metric", "difference", "interval", "by_seed"]
    named = []
    for row in results["differences"]:
        heading = HEADINGS[row["metric"]]
        named.append(row | {"metric": heading})
    header = ["minus", "task", "metric", "difference", "95 %", "lowest, highest seed"]
    table = report.table(columns_of(named, columns), header)
    return f"## {results['improved']} minus the others\n\n{table}"


def responses_text(judge: Facts) -> str:
    """How far those who label the responses agree, and whether one agrees with itself."""
    label = judge["label"]
    rows = []
    for other, said in judge["agreement"].items():
        rows.append({"about": f"{label} and {other}", **said})
    if judge["halves"]:
        about = f"{label}, two halves of a prompt's responses"
        rows.append({"about": about, **judge["halves"]})
    columns = ["about", "n", "agreement", "kappa", "kappa_interval"]
    header = ["", "pairs", "agreement", "kappa", "95 %"]
    table = report.table(columns_of(rows, columns), header)
    return f"## The labels of the responses\n\n{table}"


def plot(results: Facts, path: Path) -> None:
    """A forest: on T2 the improved arm's AUROC minus that of each other arm; and each arm's AUPRC
    beside the base rate, which is what always saying unsafe has.
    """
    task = results["tasks"]["T2"]
    controls = []  # what decides stands above
    others = []
    for row in results["differences"]:
        if (row["task"], row["metric"]) == COMPARED[0]:
            side = controls if row["second"].startswith("C") else others
            side.append(row)
    found = controls + others
    cells = {}
    for arm, cell in task["arms"].items():
        if cell.get("auprc") is not None:
            cells[arm] = cell
    height = 1.6 + 0.3 * max(len(found), len(cells))
    figure, axes_of = plt.subplots(1, 2, figsize=(9, height), layout="constrained")
    left, right = axes_of

    names = []
    for y, row in enumerate(found):
        draw_interval(left, y, row["difference"], row["interval"])
        cut_off = " (cut off on T2)" if row["second"] in ("A0", "A1") else ""
        names.append(f"{row['first']} − {row['second']}{cut_off}")
    left.set_yticks(range(len(found)), names)
    left.axvspan(-measure.MARGIN, measure.MARGIN, color="0.9")
    left.axvline(0, color="black", linewidth=1)
    left.set_title("T2: difference in AUROC")
    left.set_xlabel("right of 0: the improved arm is better\n(grey: too small to matter)")

    for y, cell in enumerate(cells.values()):
        ends = cell["intervals"].get("auprc")
        draw_interval(right, y, cell["auprc"], ends)
    right.set_yticks(range(len(cells)), cells)
    right.set_title(f"T2: AUPRC (n={task['rows']})")
    if task["base_rate"] is not None:
        right.axvline(task["base_rate"], color="black", linestyle=":")
        right.set_xlabel(f"dotted: base rate {task['base_rate']:.2f} = always unsafe")
    for axes in axes_of:
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
    report.save_figure(figure, path)


def draw_interval(
    axes: plt.Axes,
    y: int,
    value: float,
    ends: Sequence[float] | None,
) -> None:
    """A point with its interval, in black."""
    axes.plot(value, y, "o", color="black")
    if ends:
        axes.plot(ends, [y, y], "-", color="black", linewidth=1.5)


if __name__ == "__main__":
    run_cli(main)
