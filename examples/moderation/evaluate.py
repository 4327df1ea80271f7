"""Evaluate a moderation guard: the paper's flagged-proportion report, or the full metric table
on labelled rows.

    # the paper's evaluation: answers of several models, judged by the guard, by GPT-4 and by people
    python evaluate.py --eval_dataset evaluation.json --model_path output/beavertails-7b --max_length 512 \
        --output_dir output/evaluation

    # any labelled data; baselines are fitted on the rows that trained the guard
    python evaluate.py --eval_dataset beavertails-sample:test --baselines beavertails-sample:train \
        --model_path output/quickstart --output_dir output/quickstart/evaluation

Without arguments it evaluates what `torchrun train.py` without arguments has left.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from flagged_proportion import (
    answered_pairs,
    read_evaluation_file,
    report_flagged_proportion,
)
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, set_seed
from transformers.hf_argparser import HfArg

from common import data, metrics, report
from common.bundled import resolve_model
from common.conversation import Messages, UserError, Verdict, last_turns
from common.data.specs import in_one_name
from common.data.splits import load_training_rows
from common.fit import fit_classifier
from common.labels import LABEL_OF, UNSAFE, judged_rows
from common.results_page import write_evaluation_page
from common.run import (
    check_output_folder,
    inference_dtype,
    loading_model,
    manifest,
    parse_args,
    run_cli,
)
from common.uncertain import ExportArguments, scored, write_uncertain
from guards import Guard, entry_of, load_guard
from guards.base import threshold_of
from guards.card import ClassifierCard, LoraCard, has_card, read_card
from guards.kept import judge_and_keep

logger = logging.getLogger("moderation")


@dataclass
class EvaluationArguments(ExportArguments):
    eval_dataset: str = HfArg(
        help="evaluation.json of the paper's format, or a data spec with labels."
    )
    model_path: str = HfArg(help="Guard folder, hub id, or a name of the guard zoo.")
    output_dir: str = HfArg(
        help="Folder for results.json, results.md, the picture and predictions.jsonl."
    )
    max_length: int | None = HfArg(
        default=None, help="Tokens a pass; default: what the guard was trained with."
    )
    long_inputs: str = HfArg(
        default="windows", help="windows | error | truncate (the paper truncates)"
    )
    threshold: float | None = HfArg(
        default=None, help="Default: 0.5 (the paper's) for evaluation.json, else the guard's own."
    )
    baselines: list[str] = HfArg(
        default_factory=list,
        help="Data specs to fit TF-IDF + logistic regression on, together as train.py reads "
        "several; also judges with an untrained head.",
    )
    judge: str | None = HfArg(
        default=None,
        help="What of the rows is judged: pair | prompt | response; default: what the guard was "
        "trained on, else pair.",
    )
    bad_rows: str = HfArg(default="error", help="error | skip (counted and reported)")
    trust_remote_code: bool = HfArg(default=False, help="Run code that comes with the model.")
    seed: int = 42


def main() -> None:
    (args,) = parse_args(
        [EvaluationArguments], Path(__file__).parent / "configs/quickstart_evaluate.yaml"
    )
    if args.threshold is not None and not 0 <= args.threshold < 1:
        raise UserError(
            f"--threshold {args.threshold}: must lie in [0, 1); a pair is flagged ABOVE it"
        )
    if args.judge not in (None, *LABEL_OF):
        raise UserError(f"--judge {args.judge}: expected one of {', '.join(LABEL_OF)}")
    check_output_folder(args.output_dir)
    args.check_export(args.output_dir)
    answers = read_evaluation_file(Path(args.eval_dataset))
    if answers is None:
        return report_metrics(args)
    if (Path(args.output_dir) / "evaluation.json").resolve() == Path(args.eval_dataset).resolve():
        raise UserError(
            f"--output_dir {args.output_dir}: its evaluation.json is the input; name another folder"
        )
    if args.export_uncertain:
        said = "has no labels that could be mended; name a data spec"
        raise UserError(f"--export_uncertain: --eval_dataset {args.eval_dataset} {said}")
    guard = load_guard(args.model_path, progress=False, **options(args))
    if "response_unsafe" not in guard.judges:
        said = "judges prompts, and this file is about answers"
        raise UserError(f"--eval_dataset {args.eval_dataset}: {args.model_path} {said}")
    # the paper's evaluate.py passes 0.5
    threshold = 0.5 if args.threshold is None else args.threshold
    folder = Path(args.output_dir)
    verdicts = judged(guard, answered_pairs(answers), args)
    report_flagged_proportion(answers, guard, verdicts, threshold, folder, manifest([args]))


def options(args: EvaluationArguments) -> dict[str, Any]:
    """Options of `load_guard`."""
    return {
        "max_length": args.max_length,
        "long_inputs": args.long_inputs,
        "trust_remote_code": args.trust_remote_code,
    }


def what_is_judged(args: EvaluationArguments) -> str:
    """A pair, a prompt or a response: what was asked for, or what the guard was trained on."""
    if args.judge is not None:
        return args.judge
    if not has_card(args.model_path):
        known = entry_of(args.model_path).get("judges")
        return "prompt" if known == ["prompt_unsafe"] else "pair"
    card = read_card(args.model_path)
    inputs = card.inputs if isinstance(card, LoraCard) else [getattr(card, "input", None)]
    if "pair" in inputs:
        return "pair"
    return inputs[0] or "pair"


def loaded(args: EvaluationArguments, judge: str) -> Guard:
    """The guard. Raises UserError where that is nothing which it judges."""
    guard = load_guard(args.model_path, progress=False, **options(args))
    if LABEL_OF[judge] not in guard.judges:
        known = ", ".join(guard.judges)
        raise UserError(f"--judge {judge}: {args.model_path} judges {known}")
    return guard


def asked_thresholds(
    args: EvaluationArguments, guard: Guard, label: str
) -> dict[str, dict[str, Any]]:
    """The guard's own thresholds, of which `flagged` is that of the label, or --threshold alone."""
    if args.threshold is not None:
        return {"flagged": {"value": args.threshold, "how": "--threshold"}}
    own = threshold_of(guard.thresholds, label)
    return guard.thresholds | {"flagged": own or {"value": 0.5, "how": "default"}}


def judged(
    guard: Guard, conversations: Sequence[Messages], args: EvaluationArguments, variant: str = ""
) -> list[Verdict]:
    """What the guard says, kept in `runs` as it comes: after Ctrl-C the same command goes on.

    Raises:
        UserError: not one row could be judged.
    """
    path = Path(args.output_dir) / "runs/verdicts.jsonl"
    said = judge_and_keep(guard, args.model_path, options(args), conversations, path, variant)
    if said and all(verdict.error for verdict in said):
        raise UserError(f"{args.model_path}: not one row could be judged: {said[0].error}")
    return said


def report_metrics(args: EvaluationArguments) -> None:
    """Judge labelled rows and write every metric, beside the baselines."""
    judge = what_is_judged(args)
    label = LABEL_OF[judge]
    require = {"require": (label,)}
    whole = data.load_conversations(
        args.eval_dataset, bad_rows=args.bad_rows, need_positive=False, **require
    )
    groups = [data.prompt_key(row) for row in whole]
    rows = judged_rows(whole, judge)
    fit_rows = known = None
    if args.baselines:
        fit_rows = rows_to_fit_on(args, judge)
        known = texts(fit_rows)
    guard = loaded(args, judge)
    thresholds = asked_thresholds(args, guard, label)
    threshold = thresholds["flagged"]
    # The baselines first: what is wrong with them shows before the guard's long run, not after it.
    baselines = {}
    if fit_rows is not None:
        baselines = baseline_scores(guard, args, fit_rows, rows, label)
    verdicts = judged(guard, rows["messages"], args)
    truth = np.array(rows[label])
    scores = {"guard": np.array([verdict.score(label) for verdict in verdicts])} | baselines
    results = {
        "dataset": args.eval_dataset,
        "guard": args.model_path,
        "judged": judge,
        "threshold": threshold,
        "errors": sum(verdict.error is not None for verdict in verdicts),
        "flagged": compare(truth, groups, scores, threshold["value"], args.seed),
        "flagged_at_0.5": metrics.binary(truth, scores["guard"], 0.5),
        "categories": by_category(rows, truth, verdicts, guard, thresholds),
        **metrics.by_parts(
            rows["language"], texts(rows), known, truth, scores["guard"], threshold["value"]
        ),
        "run": manifest([args]),
    }
    predictions = []
    for i, (row, verdict) in enumerate(zip(rows, verdicts, strict=True)):
        labels = {f"true_{name}": row[name] for name in (label, "categories")}
        said = {name: float(score[i]) for name, score in scores.items()}
        facts = {"id": row["id"], "language": row["language"]}
        predictions.append({**facts, **labels, **vars(verdict), **said})
    folder = Path(args.output_dir)
    markdown = metrics_markdown(results)
    curves = {name: (truth, score) for name, score in scores.items()}
    title = f"Unsafe {judge}s of {args.eval_dataset} (n={len(truth)})"
    report.plot_precision_recall(curves, folder / "precision-recall.png", title)
    report.write_results(folder, results, markdown, predictions)
    print(markdown)
    title = f"{args.model_path} on {args.eval_dataset}"
    said = {"guard": verdicts} | baselines
    write_evaluation_page(folder / "results.html", title, rows, label, said, results)
    near = []
    for row, verdict in zip(whole, verdicts, strict=True):
        at = {"guard": threshold["value"]}
        near.append(scored(row, label, {"guard": verdict}, at))
    write_uncertain(folder, near, args.export_uncertain)


def rows_to_fit_on(args: EvaluationArguments, judge: str) -> Dataset:
    """The rows of --baselines as train.py reads them."""
    rows, _, _ = load_training_rows(
        args.baselines,
        None,
        None,
        args.seed,
        judge=judge,
        bad_rows=args.bad_rows,
        require=(LABEL_OF[judge],),
    )
    return rows


def compare(
    truth: np.ndarray,
    groups: Sequence[str],
    scores: dict[str, np.ndarray],
    threshold: float,
    seed: int,
) -> dict[str, dict]:
    """Metrics of the guard and its baselines, with bootstrap intervals.

    Args:
        groups: the prompt of each row; rows of one prompt are drawn together.
    """
    comparison = {}
    for name, score in tqdm(scores.items(), desc="intervals", unit="guard", delay=1):
        at = threshold if name == "guard" else 0.5
        found = metrics.binary(truth, score, at)
        found |= metrics.intervals(truth, score, at, groups, seed)
        if name != "guard":

            def gain(drawn: np.ndarray, score: np.ndarray = score) -> float | None:
                theirs = metrics.auprc(truth[drawn], score[drawn])
                if theirs is None:
                    return None
                return metrics.auprc(truth[drawn], scores["guard"][drawn]) - theirs

            found["guard_gain_interval"] = metrics.bootstrap(gain, len(truth), groups, seed=seed)
        comparison[name] = found
    return comparison


def by_category(
    rows: Dataset,
    truth: np.ndarray,
    verdicts: Sequence[Verdict],
    guard: Guard,
    thresholds: dict[str, dict[str, Any]],
) -> dict[str, dict]:
    """Metrics of each category of the guard at its own threshold, else at that of flagged."""
    named = []
    for is_unsafe, names in zip(truth, rows["categories"], strict=True):
        named.append(names if is_unsafe else [])  # what is safe has none, said or not
    in_rows = {name for names in named for name in names or ()}
    labels = [label for label in getattr(guard, "labels", ()) if label != UNSAFE]
    lacking = sorted(in_rows - set(labels))
    if lacking and labels:
        logger.warning("No row for these categories, of which the guard has no output: %s", lacking)
    said = [verdict.categories for verdict in verdicts]
    default = thresholds["flagged"]["value"]
    return metrics.by_category(labels, named, said, thresholds, default)


def baseline_scores(
    guard: Guard, args: EvaluationArguments, fit_rows: Dataset, rows: Dataset, label: str
) -> dict[str, np.ndarray]:
    """What a guard must beat: words alone (TF-IDF and logistic regression), and its own base with
    an untrained head.
    """
    if all(fit_rows[label]):
        said = "holds no safe row; a classifier needs both kinds"
        raise UserError(f"--baselines {in_one_name(args.baselines)}: {said}")
    words = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(C=10, max_iter=1000),
    )
    words.fit(texts(fit_rows), fit_rows[label])
    scores = {"TF-IDF + logistic regression": words.predict_proba(texts(rows))[:, 1]}
    card = read_card(args.model_path) if has_card(args.model_path) else None
    if not isinstance(card, ClassifierCard) or card.base_model is None:
        return scores
    depth = {} if card.num_hidden_layers is None else {"num_hidden_layers": card.num_hidden_layers}
    set_seed(args.seed)
    trained = guard.model
    with loading_model(card.base_model, flag="--baselines: base model"):
        guard.model = AutoModelForSequenceClassification.from_pretrained(
            resolve_model(card.base_model),
            num_labels=len(guard.labels),
            dtype=inference_dtype(),
            trust_remote_code=args.trust_remote_code,
            **depth,
        )
    fit_classifier(guard.tokenizer, guard.model)
    guard.model.to(guard.device).eval()
    # another model than that of the guard's name, and other weights with each seed
    verdicts = judged(guard, rows["messages"], args, f"untrained head {args.seed}")
    guard.model = trained
    scores["untrained head"] = np.array([verdict.score(label) for verdict in verdicts])
    return scores


def texts(rows: Dataset) -> list[str]:
    """Question and answer of each row as one text."""
    turns = [last_turns(messages) for messages in rows["messages"]]
    return [" ".join(text for text in pair if text) for pair in turns]


def metrics_markdown(results: dict[str, Any]) -> str:
    """results.md: flagged beside the baselines, then each category and each language."""
    flagged = results["flagged"]
    threshold = results["threshold"]
    first = next(iter(flagged.values()))
    columns = ["auprc_interval", "auroc_interval", "fpr_interval", "guard_gain_interval"]
    intervals = [[name, *map(values.get, columns)] for name, values in flagged.items()]
    lines = [
        f"# {results['guard']} on {results['dataset']}",
        "",
        f"{first['support']} {results['judged']}s, {first['positives']} unsafe. A guess has AUPRC "
        f"{first['base_rate']:.3f}; flagging everything has F1 "
        f"{report.number(first['always_unsafe_f1'])}. The guard flags above "
        f"{report.threshold(threshold['value'])} ({threshold['how']}), the others above 0.5.",
        f"Verdicts that failed: {results['errors']} (counted as unsafe).",
        "",
        "## Flagged",
        "",
        report.metric_table(flagged),
        report.table(
            intervals, ["", "AUPRC ↑", "AUROC ↑", "FPR ↓", "AUPRC of the guard above this"]
        ),
        "95 % intervals: 1,000 paired bootstrap draws of prompts.",
        "",
        *report.findings(flagged),
    ]
    lines += report.part_tables(results, "--baselines")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_cli(main)
