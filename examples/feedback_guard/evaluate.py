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
HEADINGS = {
    "auroc": "AUROC ↑",
    "auprc": "AUPRC ↑",
    "fpr_at_recall": "FPR at the recall ↓",
    "caught": "caught at equal block rate ↑",
    "fpr_at_threshold": "FPR at validation's threshold ↓",
    "precision": "precision ↑",
    "recall": "recall ↑",
    "f1": "F1 ↑",
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
    def query(self) -> str:
        """How it is asked: guard, or the original's chatml and meta."""
        if self.folder is None:
            return "chatml" if self.arm == "A0-legacy" else "guard"
        return arm_named(self.arm).query

    @property
    def parser(self) -> str:
        """How an answer in words is read."""
        if self.folder is None:
            return "strict" if self.arm == "A0-legacy" else "correct"
        return arm_named(self.arm).parser


@dataclass(frozen=True)
class Answer:
    """What a guard says of a prompt; without a verdict it is unsafe, with `error`."""

    score: float
    decided: bool
    error: str | None = None
    reason: str = ""


Answers = Mapping[str, Answer]  # by a prompt's id


def main() -> None:
    evaluate(config_from_argv(__doc__))


def evaluate(config: Config) -> dict[str, Any]:
    """Score what is trained, measure, write; the results.

    Raises:
        UserError: nothing was processed or trained yet, or with other settings, or the truth of a
            task is not known.
    """
    settings = config.evaluation
    check_output_folder(settings.results_dir)
    rows = {split: read_rows(config, split) for split in ("validation", "test")}
    tasks, texts = read_tasks(config, rows)
    guards, missing = find_guards(config)
    folder = Path(settings.results_dir) / "scores"
    answers: dict[str, Answers] = {}
    for one in tqdm(guards, desc="guards", unit="guard"):
        answers[one.name] = score(one, texts, config, folder)
    arms: dict[str, list[str]] = {ALWAYS: [ALWAYS], "A0": ["A0"], "A1": ["A1"]}
    for one in guards:
        if one.arm != "A0":
            arms.setdefault(one.arm, []).append(one.name)
    validation = tasks.pop("validation")
    cut = best_cut(answers["A0"], validation)
    answers |= controls(answers["A0"], cut)
    arrays, measured = {}, {}
    for name, prompts in tasks.items():
        arrays[name] = {
            arm: as_arrays(names, answers, prompts, validation) for arm, names in arms.items()
        }
        measured[name] = measure.measure(
            prompts, validation, arrays[name], settings.draws, config.seed, settings.target_recall
        )
    best = improved_arm(config, arms)
    folders = [one.folder for one in guards if one.arm == best]
    judge = judge_facts(rows["test"], config)
    shift = measure.score_shift(arrays["T1"][best], arrays["T1"]["A0"])
    reasons = measure.reasons_against(tasks, measured, shift, judge)
    results = {
        "improved": best,
        "improved_model_path": str(folders[0] if len(folders) == 1 else folders[0].parent),
        "verdict": measure.verdict(measured, best, reasons),
        "tasks": {name: task_results(tasks[name], measured[name]) for name in tasks},
        "differences": differences(measured, best),
        "responses": judge,
        "missing": missing,
        "questions": {arm: QUESTIONS.get(arm) or arm_named(arm).question for arm in arms},
        "t2_label": settings.t2_label,
        "target_recall": settings.target_recall,
        "draws": settings.draws,
        "run": manifest([config.as_dict()]),
    }
    write(config, results, rows, texts, arms, answers)
    path = Path(settings.results_dir) / "results.html"
    write_page(path, results, tasks, texts, arms, answers, {"A1": cut})
    keys = [read_card(one.folder).fingerprint for one in guards if one.folder]
    write_stage(Path(settings.results_dir) / "stage.json", config, "evaluate", *keys)
    return results


# --- what is asked --------------------------------------------------------------------------------


def read_rows(config: Config, split: str) -> list[Row]:
    """The processed rows of a split's sample.

    Raises:
        UserError: process has not got so far.
    """
    known = {row["id"]: row for row in read_processed(config, split)}
    wanted = [row["id"] for row in sample(config, split)]
    absent = sum(row_id not in known for row_id in wanted)
    if absent:
        hint = "run process with this config first"
        raise UserError(f"{split}: {absent} of {len(wanted)} prompts are not processed; {hint}")
    return [known[row_id] for row_id in wanted]


def read_tasks(
    config: Config, rows: Mapping[str, Sequence[Row]]
) -> tuple[dict[str, Prompts], dict[str, str]]:
    """The prompts of each task by its name, those of validation as "validation"; and all texts by
    their id.

    Raises:
        UserError: T2 has no labels of the kind that the config names, or a spec cannot be read.
    """
    settings = config.evaluation
    texts = {f"{split}/{row['id']}": row["query"] for split, some in rows.items() for row in some}
    humans = {
        f"{split}/{row['id']}": bool(row["human_unsafe"])
        for split, some in rows.items()
        for row in some
    }
    outcomes = outcomes_of(rows["test"], settings.t2_label)
    if not outcomes and any(passed(row) and row["responses"] for row in rows["test"]):
        raise UserError(
            f"evaluation.t2_label {settings.t2_label}: no response of the test split has such a "
            "label; name another one of human, judge, guard (judge needs evaluation.judge when "
            "prompts are processed)"
        )
    truths = {
        "validation": {key: unsafe for key, unsafe in humans.items() if key.startswith("v")},
        "T1": {key: unsafe for key, unsafe in humans.items() if key.startswith("t")},
        "T2": {f"test/{row_id}": unsafe for row_id, unsafe in outcomes.items()},
    }
    marked = [row for row in rows["test"] if row.get("kind") == "hard_benign"]
    harmless = [row for row in marked if not row["human_unsafe"]]
    seen = {text_key(text) for text in seen_texts(config)}
    if settings.hard_benign:
        found = foreign(settings.hard_benign, seen, harmless=True)
        texts |= {key: text for key, (text, _) in found.items()}
        truths["T3"] = dict.fromkeys(found, False)
    elif harmless:
        truths["T3"] = {f"test/{row['id']}": False for row in harmless}
    for spec in settings.extra:
        found = foreign(spec, seen)
        texts |= {key: text for key, (text, _) in found.items()}
        truths[spec] = {key: unsafe for key, (_, unsafe) in found.items()}
    tasks = {}
    for name, truth in truths.items():
        groups = near_copies([texts[key] for key in truth])  # prompts that are drawn together
        tasks[name] = Prompts(list(truth), np.array(list(truth.values()), dtype=bool), groups)
    return tasks, texts


def outcomes_of(rows: Sequence[Row], label: str) -> dict[str, bool]:
    """By id: of prompts that the default guard passes, whether at least half of the responses are
    unsafe.
    """
    shares = {row["id"]: q(row, label) for row in rows if passed(row)}
    return {row_id: share >= 0.5 for row_id, share in shares.items() if share is not None}


def foreign(
    spec: str, seen: Collection[str], harmless: bool = False
) -> dict[str, tuple[str, bool]]:
    """Text and truth of the prompts of a data spec or of a benchmark (`name@file`), by an id.

    Args:
        seen: `text_key` of prompts that would be no test; they are left out, and counted.
        harmless: all are taken for safe, but for rows that are labelled otherwise.

    Raises:
        UserError: nothing is left.
    """
    if spec.partition("@")[0] in benchmark_names("prompt_unsafe"):
        rows = [row | {"prompt_unsafe": row["label"]} for row in load_benchmark(spec).rows]
    else:
        rows = list(data.load_conversations(spec))
    found = {}
    known = 0
    for number, row in enumerate(rows):
        unsafe = row["prompt_unsafe"]
        if unsafe if harmless else unsafe is None:
            continue
        text = last_turns(row["messages"])[0]
        if text_key(text) in seen:
            known += 1
        else:
            found[f"{spec}#{number}"] = text, bool(unsafe)
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
    guards, missing = [], []
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
    legacy = any(one.query == "chatml" for one in guards)
    return [Judged("A0"), *([Judged("A0-legacy")] if legacy else []), *guards], missing


def trained_guard(folder: Path, config: Config) -> Judged:
    """The arm and seed that a folder holds.

    Raises:
        UserError: it holds no arm, or one that was trained with other settings than the config's.
    """
    card = read_card(folder)
    if not isinstance(card, ArmOrigin) or card.arm is None or card.seed is None:
        raise UserError(f"{card_path(folder)}, fields arm and seed: do not say which arm it is")
    check_stage(folder / "stage.json", config, "train", asdict(arm_named(card.arm)), card.seed)
    return Judged(card.arm, card.seed, folder)


def improved_arm(config: Config, arms: Collection[str]) -> str:
    """The arm that the verdict is about: A8, else the last one that was trained."""
    if "A8" in arms:
        return "A8"
    trained = [name for name in config.training.arms if name in arms] or list(arms)[3:]
    built_up = [name for name in trained if not name.startswith(("A2", "C"))]
    return (built_up or trained)[-1]


# --- what they say --------------------------------------------------------------------------------


def score(one: Judged, texts: Mapping[str, str], config: Config, folder: Path) -> Answers:
    """One guard on all prompts. It is loaded only if there is a prompt that it has not judged yet.

    What is kept counts for one prompt, one guard (its weights) and one way of asking alone. A
    verdict that a server failed to give is asked for again.
    """
    served = one.folder is None and config.llama_guard.engine == "server"
    identity = identity_of(one, config)
    key_of = {text: digest([identity, text]) for text in dict.fromkeys(texts.values())}
    text_of = {key: text for text, key in key_of.items()}
    loaded: list[GenerativeGuard] = []

    def make(_: int, keys: list[str]) -> Iterator[Row]:
        if not loaded:
            loaded.append(load(one, config))
        said = ask(one, loaded[0], [text_of[key] for key in keys], config)
        for key, told in zip(keys, said, strict=True):
            yield {"key": key, **told}

    again = failed if served else None
    with KeptRows(folder / f"{one.name}.jsonl") as kept:
        rows = kept.fill(
            list(text_of), make, size=CHUNK, together=not served, again=again, title=one.name
        )
    loaded.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    said = {row_key: answer_of(row, one) for row_key, row in zip(text_of, rows, strict=True)}
    return {prompt_id: said[key_of[text]] for prompt_id, text in texts.items()}


def load(one: Judged, config: Config) -> GenerativeGuard:
    """A guard, on the base that it was trained on. A server knows the default guard alone."""
    section = config.llama_guard
    options: dict[str, Any] = {"progress": False}
    path = section.default_model_path
    if one.folder is None:
        options |= section.engine_options()
    else:
        path = section.base_model_path
        if section.load_in_4bit:
            options["load_in_4bit"] = True
        if not is_probe(one):
            options["adapter"] = str(one.folder)
            # vLLM does not quantize as training does
            vllm = section.engine == "vllm" and not section.load_in_4bit
            options["engine"] = "vllm" if vllm else "transformers"
    return load_llama_guard(path, section.use_official_template, **options)


def is_probe(one: Judged) -> bool:
    """Whether a probe on the default guard's state gives the score, instead of an adapter."""
    return one.folder is not None and (one.folder / "probe.json").is_file()


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
    one: Judged, loaded: GenerativeGuard, texts: Sequence[str], config: Config
) -> list[dict[str, Any]]:
    """What is kept of each prompt: score, decision and error, or the text that the guard wrote."""
    conversations = [pair(text) for text in texts]
    if is_probe(one):
        scores = probe_scores(loaded, one.folder, conversations)
        return [{"score": p, "decided": p > 0.5, "error": None} for p in scores]
    if one.query == "guard":
        return [
            {"score": v.prompt_unsafe, "decided": v.decided.get("prompt_unsafe"), "error": v.error}
            for v in loaded.judge(conversations)
        ]
    new_tokens = config.llama_guard.legacy_new_tokens
    prompts = query_ids(loaded, one.query, texts)
    room = loaded.max_length - new_tokens
    short = [ids for ids in prompts if len(ids) <= room]
    written = iter(loaded.written(short, new_tokens))
    told = []
    for ids in prompts:
        if len(ids) > room:
            told.append({"text": "", "error": f"{len(ids)} tokens, more than {room}"})
        else:
            said = next(written)
            told.append({"text": said.text, "error": said.error})
    return told


def answer_of(kept: Mapping[str, Any], one: Judged) -> Answer:
    """What a kept row means. A verdict in words has no probability: its score is 1 or 0."""
    if "text" in kept:
        unsafe, is_verdict = parsed_unsafe(kept["text"], one.parser)
        error = kept["error"] or (None if is_verdict else "no verdict")
        reason = legacy_reason(kept["text"]) if unsafe else ""
        return Answer(float(unsafe), unsafe, error, reason)
    if kept["error"] is not None or kept["score"] is None:
        return Answer(1.0, True, kept["error"] or "no verdict", "no verdict")
    decided = kept["decided"]
    if decided is None:
        decided = kept["score"] > 0.5
    return Answer(kept["score"], decided, None, "Classified as unsafe" if decided else "")


def best_cut(default: Answers, validation: Prompts) -> float:
    """The threshold of A1: that of A0's best F1 on validation."""
    if validation.positives and validation.negatives:
        scores = [default[key].score for key in validation.ids]
        return metrics.fit_threshold(validation.truth, scores, "validation")["value"]
    logger.warning("validation has one class only: A1 keeps the threshold 0.5")
    return 0.5


def controls(default: Answers, cut: float) -> dict[str, Answers]:
    """Guards that need no training: A1, A0's score above another threshold; and the one that blocks
    all.
    """
    return {
        "A1": {key: Answer(said.score, said.score > cut) for key, said in default.items()},
        ALWAYS: {key: Answer(1.0, True) for key in default},
    }


# --- measuring ------------------------------------------------------------------------------------


def as_arrays(
    names: Sequence[str], answers: Mapping[str, Answers], test: Prompts, validation: Prompts
) -> Arm:
    """An arm's answers as arrays, a row a seed."""

    def table(prompts: Prompts, field: str) -> np.ndarray:
        rows = [[getattr(answers[name][key], field) for key in prompts.ids] for name in names]
        return np.array(rows)

    return Arm(
        table(test, "score").astype(float),
        table(test, "decided").astype(bool),
        table(validation, "score").astype(float),
        tuple(name.rpartition("-seed")[2] for name in names) if len(names) > 1 else ("",),
    )


def judge_facts(rows: Sequence[Row], config: Config) -> dict[str, Any]:
    """How far guard, judge and people agree on the responses that T2's truth is made of."""
    votes: dict[str, list[list]] = {"human": [], "judge": [], "guard": []}
    for row in rows:
        if not passed(row):
            continue
        for said in votes.values():
            said.append([])
        for response in row["responses"]:
            votes["human"][-1].append(response["human_unsafe"])
            p = response["judge_unsafe"]
            votes["judge"][-1].append(None if p is None else p >= 0.5)
            decided = response["decided"] if response["error"] is None else None
            votes["guard"][-1].append(decided)
    rounds = min(config.evaluation.draws, 1000)
    return measure.judge_facts(config.evaluation.t2_label, votes, rounds)


def task_results(prompts: Prompts, measured: Measured) -> dict[str, Any]:
    """What results.json holds of a task: its size, and every metric of every arm."""
    arms = {}
    for arm, seeds in measured.seeds.items():
        names = seeds[0] if seeds else {}
        drawn = measured.drawn[arm]
        arms[arm] = {metric: measured.value(arm, metric) for metric in names}
        ends = {metric: measure.interval(values) for metric, values in drawn.items()}
        arms[arm] |= {"intervals": ends, "seeds": seeds}
    rows = len(prompts.ids)
    return {
        "rows": rows,
        "positives": prompts.positives,
        "groups": len(set(prompts.groups)),
        "base_rate": prompts.positives / rows if rows else None,
        "arms": arms,
    }


def differences(measured: Mapping[str, Measured], best: str) -> list[dict[str, Any]]:
    """The improved arm minus every other one, in what decides."""
    out = []
    for name, metric in COMPARED:
        for other in measured[name].seeds if name in measured else ():
            if other not in (best, ALWAYS):
                found = measure.difference(measured[name], best, other, metric)
                if found:
                    about = {"task": name, "metric": metric, "first": best, "second": other}
                    out.append(about | found)
    return out


# --- what is left ---------------------------------------------------------------------------------


def write(
    config: Config,
    results: dict[str, Any],
    rows: Mapping[str, Sequence[Row]],
    texts: Mapping[str, str],
    arms: Mapping[str, Sequence[str]],
    answers: Mapping[str, Answers],
) -> None:
    """All files of results_dir, and the original's two."""
    folder = Path(config.evaluation.results_dir)
    results["summary"] = {}
    models = {}
    for name, arm in (("default_model", "A0"), ("improved_model", results["improved"])):
        cell = results["tasks"]["T1"]["arms"][arm]
        values = {metric: cell[metric] for metric in ORIGINAL} | {"f1_score": cell["f1"]}
        results["summary"][name] = values
        said = [answers[one] for one in arms[arm]]
        models[name] = values | {"metrics": values} | original_counts(rows["test"], said)
    results["summary"]["improvement"] = improvement(results["summary"])
    found = models | {"improvement": results["summary"]["improvement"]} | results
    stamp = time.strftime("%Y%m%d_%H%M%S")
    write_json(folder / f"evaluation_results_{stamp}.json", found)
    stats = Path(config.dataset.store_dir) / "process_stats.json"
    experiment = {
        "process_stats": json.loads(stats.read_text(encoding="utf-8")),
        "improved_model_path": results["improved_model_path"],
        "evaluation": results["summary"],
    }
    write_json(Path(config.experiment.results_dir) / f"experiment_results_{stamp}.json", experiment)
    plot(results, folder / "differences.png")
    text = markdown(results)
    report.write_results(folder, results, text, predictions(config, rows, texts, answers))
    print(text)


def improvement(models: Mapping[str, Mapping[str, float | None]]) -> dict[str, float | None]:
    """The original's difference of the improved model's metrics from the default one's."""
    out = {}
    for name, ours in models["improved_model"].items():
        theirs = models["default_model"][name]
        out[name] = None if None in (ours, theirs) else ours - theirs
    return out


def original_counts(rows: Sequence[Row], answers: Sequence[Answers]) -> dict[str, Any]:
    """Counts and predictions as the original names them: the mean over seeds, and the label of most
    of them.
    """
    keys = [f"test/{row['id']}" for row in rows]
    truth = np.array([bool(row["human_unsafe"]) for row in rows])
    hits = np.array([[said[key].decided for key in keys] for said in answers], dtype=bool)
    word = {True: "unsafe", False: "safe"}
    predicted = []
    for row, key, unsafe, share in zip(rows, keys, truth, hits.mean(0), strict=True):
        predicted.append(
            {
                "input": row["query"],
                "true_label": word[bool(unsafe)],
                "predicted_label": word[bool(share >= 0.5)],
                "reason": answers[0][key].reason,
            }
        )
    return {
        "true_positives": float((hits & truth).sum(1).mean()),
        "false_positives": float((hits & ~truth).sum(1).mean()),
        "true_negatives": float((~hits & ~truth).sum(1).mean()),
        "false_negatives": float((~hits & truth).sum(1).mean()),
        "predictions": predicted,
    }


def predictions(
    config: Config,
    rows: Mapping[str, Sequence[Row]],
    texts: Mapping[str, str],
    answers: Mapping[str, Answers],
) -> list[Row]:
    """predictions.jsonl: a row a prompt, with what every guard says of it."""
    known = {}
    for split, some in rows.items():
        outcomes = outcomes_of(some, config.evaluation.t2_label)
        for row in some:
            known[f"{split}/{row['id']}"] = {
                "human_unsafe": row["human_unsafe"],
                "kind": row.get("kind"),
                "passed": passed(row),
                "outcome_unsafe": outcomes.get(row["id"]),
            }
    out = []
    for key, text in texts.items():
        said = {name: asdict(told[key]) for name, told in answers.items()}
        out.append({"id": key, "input": text, **known.get(key, {}), "guards": said})
    return out


def write_page(
    path: Path,
    results: Mapping[str, Any],
    tasks: Mapping[str, Prompts],
    texts: Mapping[str, str],
    arms: Mapping[str, Sequence[str]],
    answers: Mapping[str, Answers],
    cuts: Mapping[str, float],
) -> None:
    """results.html: the prompts of every task, with the scores of the arms side by side.

    Args:
        cuts: thresholds by arm; the others have 0.5.
    """
    shown = [arm for arm in arms if arm != ALWAYS]
    rows = []
    for name, prompts in tasks.items():
        for key, unsafe in zip(prompts.ids, prompts.truth, strict=True):
            row = page_row(
                {"id": key, "messages": pair(texts[key])}, task_title(name), bool(unsafe)
            )
            for arm in shown:
                told = answers[arms[arm][0]][key]
                row.add_score(told.score, told.error)
            rows.append(row)
    verdict = results["verdict"]
    write_results_page(
        path,
        title="Does the feedback help the input guard?",
        note=f"Verdict on {verdict['about']}: {verdict['verdict']}. Tables: means over seeds. "
        "Below: of each arm the first seed. A guard that has words alone scores 1 or 0.",
        tables=[
            PageTable(task_title(name), task_header(name), task_rows(name, results))
            for name in tasks
        ],
        guards=[PageGuard(arm, cuts.get(arm, 0.5)) for arm in shown],
        rows=rows,
    )


# --- results.md -----------------------------------------------------------------------------------


def markdown(results: Mapping[str, Any]) -> str:
    """results.md: the verdict and what it rests on, then the tasks."""
    told = results["verdict"]
    conditions = [
        [row["condition"], row["state"], row.get("difference"), row.get("interval")]
        for row in told["conditions"]
    ]
    parts = [
        "# Does the feedback help the input guard?",
        f"**Verdict on {told['about']}: {told['verdict']}.**",
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
        parts.append(f"Not trained, and so not in here: {', '.join(results['missing'])}.")
    parts += [task_text(name, results) for name in results["tasks"]]
    parts += [differences_text(results), responses_text(results["responses"])]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def task_rows(name: str, results: Mapping[str, Any]) -> list[list[str]]:
    """The cells of a task, an arm a row, in the columns of SHOWN."""
    task = results["tasks"][name]
    rows = []
    for arm, cell in task["arms"].items():
        row = [f"{arm}: {results['questions'][arm]}"]
        for metric in SHOWN.get(name, SHOWN["T1"]):
            ends = cell["intervals"].get(metric)
            row.append(
                report.number(cell.get(metric)) + (f" {report.number(ends)}" if ends else "")
            )
        rows.append(row)
    return rows


def task_header(name: str) -> list[str]:
    """The headings of `task_rows`."""
    return ["", *(HEADINGS[metric] for metric in SHOWN.get(name, SHOWN["T1"]))]


def task_title(name: str) -> str:
    """What a task is called; one of `evaluation.extra` is asked what T1 asks."""
    return TASKS.get(name, f"T1 on {name}")


def task_text(name: str, results: Mapping[str, Any]) -> str:
    """The table of a task, an arm a line."""
    task = results["tasks"][name]
    facts = (
        f"{task['rows']} prompts in {task['groups']} groups of near-copies, {task['positives']} "
        f"unsafe (base rate {report.number(task['base_rate'])})."
    )
    table = report.table(task_rows(name, results), task_header(name))
    return f"## {task_title(name)}\n\n{facts}\n\n{table}"


def differences_text(results: Mapping[str, Any]) -> str:
    """The improved arm minus every other one."""
    rows = [
        [
            row["second"],
            row["task"],
            HEADINGS[row["metric"]],
            row["difference"],
            row["interval"],
            row["by_seed"],
        ]
        for row in results["differences"]
    ]
    header = ["minus", "task", "metric", "difference", "95 %", "lowest, highest seed"]
    return f"## {results['improved']} minus the others\n\n{report.table(rows, header)}"


def responses_text(judge: Mapping[str, Any]) -> str:
    """How far those who label the responses agree, and whether one agrees with itself."""
    found = {f"{judge['label']} and {other}": said for other, said in judge["agreement"].items()}
    if judge["halves"]:
        found[f"{judge['label']}, two halves of a prompt's responses"] = judge["halves"]
    rows = [
        [name, said["n"], said["agreement"], said["kappa"], said["kappa_interval"]]
        for name, said in found.items()
    ]
    if not rows:
        return ""
    table = report.table(rows, ["", "pairs", "agreement", "kappa", "95 %"])
    return f"## The labels of the responses\n\n{table}"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """A forest: on T2 the improved arm's AUROC minus that of each other arm; and each arm's AUPRC
    beside the base rate, which is what always saying unsafe has.
    """
    task = results["tasks"]["T2"]
    found = [row for row in results["differences"] if (row["task"], row["metric"]) == COMPARED[0]]
    found.sort(key=lambda row: not row["second"].startswith("C"))  # what decides stands above
    arms = [arm for arm in task["arms"] if task["arms"][arm].get("auprc") is not None]
    height = 1.6 + 0.3 * max(len(found), len(arms))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, height), layout="constrained")
    for y, row in enumerate(found):
        draw_interval(left, y, row["difference"], row["interval"])
    names = [f"{row['first']} − {row['second']}" for row in found]
    cut_off = [f"{name} (cut off on T2)" if name[-2:] in ("A0", "A1") else name for name in names]
    left.set_yticks(range(len(found)), cut_off)
    left.axvspan(-measure.MARGIN, measure.MARGIN, color="0.9")
    left.axvline(0, color="black", linewidth=1)
    left.set(
        title="T2: difference in AUROC",
        xlabel="right of 0: the improved arm is better\n(grey: too small to matter)",
    )
    for y, arm in enumerate(arms):
        cell = task["arms"][arm]
        draw_interval(right, y, cell["auprc"], cell["intervals"].get("auprc"))
    right.set_yticks(range(len(arms)), arms)
    if task["base_rate"] is not None:
        right.axvline(task["base_rate"], color="black", linestyle=":")
        right.set_xlabel(f"dotted: base rate {task['base_rate']:.2f} = always unsafe")
    right.set(title=f"T2: AUPRC (n={task['rows']})")
    for axes in (left, right):
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
    report.save_figure(figure, path)


def draw_interval(axes: plt.Axes, y: int, value: float, ends: Sequence[float] | None) -> None:
    """A point with its interval, in black."""
    axes.plot(value, y, "o", color="black")
    if ends:
        axes.plot(ends, [y, y], "-", color="black", linewidth=1.5)


if __name__ == "__main__":
    run_cli(main)
