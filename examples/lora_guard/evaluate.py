"""Evaluate LoRA guards, and whatever `load_guard` knows beside them, on the same labelled rows.

    # head-only against LoRA against a full fine-tune, on the split that nothing was chosen on
    python evaluate.py --guards output/run/best output/head-only/best ../moderation/output/beavertails-7b \
        --eval_data PKU-Alignment/BeaverTails:30k_test --output_dir output/evaluation

    # prompts alone (a guard that was trained with --guard-inputs prompt)
    python evaluate.py --guards output/run/best --eval_data prompts.jsonl --judge prompt --output_dir output/prompts

Thresholds are the guards' own, fitted on their validation data. Without arguments it evaluates what
`torchrun train.py` without arguments has left.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from inputs import token_ids
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from common import data, metrics, report
from common.conversation import Messages, UserError, Verdict, last_turns, pair
from common.labels import LABEL_OF, UNSAFE
from common.results_page import write_evaluation_page
from common.run import check_output_folder, manifest, parse_args, run_cli
from common.uncertain import ExportArguments, Scored, scored, write_uncertain
from guards import Guard, load_guard
from guards.base import decides_above
from guards.card import LoraCard, has_card, read_card
from guards.kept import judge_and_keep
from guards.lora import LoraGuard

# parameters of an 8B guard that runs beside the chat model (Llama-Guard-3-8B)
SEPARATE_GUARD = 8.03e9


@dataclass
class EvaluationArguments(ExportArguments):
    guards: list[str] = HfArg(
        help="Adapter folders, other guard folders, hub ids; the first is detailed."
    )
    eval_data: str = HfArg(help="Data spec with labels.")
    output_dir: str = HfArg(
        help="Folder for results.json, results.md, pictures and predictions.jsonl."
    )
    judge: str | None = HfArg(
        default=None,
        help="response (with its question, if any) | prompt; default: what the first guard was "
        "trained on.",
    )
    train_data: list[str] = HfArg(
        default_factory=list,
        help="Data specs of the rows that the first guard was trained on: it is also measured "
        "without near-copies of these.",
    )
    prefix_tokens: list[int] = HfArg(
        default_factory=lambda: [16, 32, 64, 128],
        help="Detection after so many tokens of the reply.",
    )
    long_inputs: str = HfArg(default="windows", help="windows | error | truncate")
    bad_rows: str = HfArg(default="error", help="error | skip (counted and reported)")
    trust_remote_code: bool = HfArg(default=False, help="Run code that comes with the model.")
    seed: int = 42


def main() -> None:
    default = Path(__file__).parent / "configs/quickstart_evaluate.yaml"
    (args,) = parse_args([EvaluationArguments], default)
    check_arguments(args)
    label = f"{args.judge}_unsafe"
    rows = data.load_conversations(
        args.eval_data, require=(label,), need_positive=False, bad_rows=args.bad_rows
    )
    conversations = list(rows["messages"])
    truth = np.array(rows[label])
    if args.judge == "prompt":
        conversations = [pair(last_turns(messages)[0]) for messages in conversations]
    texts = judged_texts(rows, args.judge)
    known = training_texts(args)
    names = guard_names(args.guards)
    guards = {}  # all of them before the long runs
    options = {"long_inputs": args.long_inputs, "trust_remote_code": args.trust_remote_code}
    for name, spec in names.items():
        guards[name] = load_guard(spec, progress=False, **options)
    groups = [data.prompt_key(row) for row in rows]
    verdicts = {}
    scores = {}
    flagged = {}
    costs = {}
    for name, guard in guards.items():
        said = judged(guard, conversations, names[name], options, args.output_dir)
        verdicts[name] = said
        scores[name] = np.array([verdict.score(label) for verdict in said])
        above = decides_above(guard.thresholds, label)
        flagged[name] = measured(truth, scores[name], above, groups, args.seed)
        flagged[name]["errors"] = sum(verdict.error is not None for verdict in said)
        if isinstance(guard, LoraGuard):
            costs[name] = overhead(guard, names[name])
    name, guard = next(iter(guards.items()))  # the first one is detailed
    threshold = flagged[name]["threshold"]
    categories = by_category(rows, args.judge, verdicts[name], guard, threshold)
    prefixes = []
    if args.judge == "response":
        prefixes = detection_by_prefix(guard, conversations, truth, args.prefix_tokens, threshold)
    results = {
        "dataset": args.eval_data,
        "judged": args.judge,
        "guards": names,
        "flagged": flagged,
        "categories": categories,
        **metrics.by_parts(rows["language"], texts, known, truth, scores[name], threshold),
        "overhead": costs,
        "prefixes": prefixes,
        "run": manifest([args]),
    }
    markdown = results_markdown(results)
    folder = Path(args.output_dir)
    draw_curves(folder / "precision-recall.png", truth, scores, results)
    report.write_results(folder, results, markdown, kept_rows(rows, label, verdicts))
    print(markdown)
    title = f"Unsafe {args.judge}s of {args.eval_data}"
    write_evaluation_page(folder / "results.html", title, rows, label, verdicts, results)
    near = scored_rows(rows, label, verdicts, flagged)
    write_uncertain(folder, near, args.export_uncertain)


def judged_texts(rows: Dataset, judge: str) -> list[str]:
    """What of rows is compared with training rows: their prompts, or the answers with these."""
    text_of = data.prompt_key if judge == "prompt" else data.judged_text
    return [text_of(row) for row in rows]


def training_texts(args: EvaluationArguments) -> list[str] | None:
    """The same of the rows of --train_data; None without them."""
    if not args.train_data:
        return None
    texts = []
    for spec in args.train_data:
        rows = data.load_conversations(spec, bad_rows=args.bad_rows)
        texts += judged_texts(rows, args.judge)
    return texts


def check_arguments(args: EvaluationArguments) -> None:
    """Settle what is judged. Raises UserError for what the parser lets pass."""
    if args.judge is None:
        args.judge = trained_on(args.guards[0])
    if args.judge not in ("prompt", "response"):
        raise UserError(f"--judge {args.judge}: expected prompt or response")
    if any(n < 1 for n in args.prefix_tokens):
        raise UserError(f"--prefix_tokens {args.prefix_tokens}: must be at least 1")
    check_output_folder(args.output_dir)
    args.check_export(args.output_dir)


def trained_on(spec: str) -> str:
    """What a guard judges by its guard.json: prompts, where it was trained on nothing else."""
    card = read_card(spec) if has_card(spec) else None
    inputs = card.inputs if isinstance(card, LoraCard) else [getattr(card, "input", None)]
    return "prompt" if inputs == ["prompt"] else "response"


def draw_curves(
    path: Path,
    truth: np.ndarray,
    scores: dict[str, np.ndarray],
    results: dict[str, Any],
) -> None:
    """The picture of precision and recall, all guards in one."""
    curves = {name: (truth, score) for name, score in scores.items()}
    title = f"Unsafe {results['judged']}s of {results['dataset']} (n={len(truth)})"
    report.plot_precision_recall(curves, path, title)


def scored_rows(
    rows: Dataset, label: str, verdicts: dict[str, list[Verdict]], flagged: dict[str, dict]
) -> list[Scored]:
    """The rows with what each guard says of them, at its own threshold."""
    at = {name: found["threshold"] for name, found in flagged.items()}
    found = []
    for i, row in enumerate(rows):
        said = {name: each[i] for name, each in verdicts.items()}
        found.append(scored(row, label, said, at))
    return found


def kept_rows(
    rows: Dataset, label: str, verdicts: dict[str, list[Verdict]]
) -> list[dict[str, Any]]:
    """predictions.jsonl: what is true of each row, and what each guard says of it."""
    kept = []
    for i, row in enumerate(rows):
        line = {
            "id": row["id"],
            "language": row["language"],
            f"true_{label}": row[label],
            "true_categories": row["categories"],
        }
        for name, said in verdicts.items():
            verdict = said[i]
            score = float(verdict.score(label))
            line[name] = {**vars(verdict), "score": score}
        kept.append(line)
    return kept


def judged(
    guard: Guard,
    conversations: list[Messages],
    spec: str,
    options: dict[str, Any],
    output_dir: str,
) -> list[Verdict]:
    """What a guard says of conversations; of answers alone, where it was trained on nothing else.
    It is kept in `runs` as it comes: after Ctrl-C the same command goes on.
    """
    answered = [messages for messages in conversations if messages[-1]["role"] == "assistant"]
    if isinstance(guard, LoraGuard) and answered and "pair" not in guard.inputs:
        conversations = [pair(None, last_turns(messages)[1]) for messages in conversations]
    path = Path(output_dir) / "runs/verdicts.jsonl"
    verdicts = judge_and_keep(guard, spec, options, conversations, path)
    if all(verdict.error for verdict in verdicts):
        raise UserError(f"{spec}: not one row could be judged: {verdicts[0].error}")
    return verdicts


def measured(
    truth: np.ndarray, scores: np.ndarray, above: float, groups: list[str], seed: int
) -> dict[str, Any]:
    """Every metric at a threshold; the interval draws rows of one prompt together."""
    found = metrics.binary(truth, scores, above)
    return found | metrics.intervals(truth, scores, above, groups, seed)


def guard_names(specs: list[str]) -> dict[str, str]:
    """A short name for each guard: the folder's, or run/folder where that is not enough."""
    names = [Path(spec).name for spec in specs]
    if len(set(names)) < len(names) or "best" in names:
        names = []
        for spec in specs:
            names.append("/".join(Path(spec).parts[-2:]))
    if len(set(names)) < len(names):
        raise UserError(f"--guards {' '.join(specs)}: name each guard once")
    return dict(zip(names, specs, strict=True))


def by_category(
    rows: Dataset, judge: str, verdicts: list[Verdict], guard: Guard, threshold: float
) -> dict[str, dict]:
    """Scores of each of the guard's own categories over the rows whose categories are known; a
    failed verdict counts as unsafe. Nothing where the rows name none of them.

    One without a threshold of its own has the paper's 0.5 beside an unsafe head; without one it
    shares the threshold of the maximum.
    """
    outputs = getattr(guard, "labels", ())
    threshold = 0.5 if UNSAFE in outputs else threshold
    labels = [name for name in outputs if name != UNSAFE]
    named = []
    for row in rows:
        names = row["categories"]
        if judge == "prompt" and row["messages"][-1]["role"] == "assistant":
            names = None  # they speak of the answer
        elif row[LABEL_OF[judge]] is False:
            names = []  # what is safe has none, said or not
        named.append(names)
    said = [verdict.categories for verdict in verdicts]
    return metrics.by_category(labels, named, said, guard.thresholds, threshold)


def overhead(guard: LoraGuard, folder: str) -> dict[str, Any]:
    """What a LoRA guard adds to the chat model that is there anyway (the paper's claim: 100 to 1000
    times less).
    """
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    added = len(read_card(folder, LoraCard).head_bias or [])
    for key, tensor in tensors.items():
        # `--head-only` keeps adapters at zero for the sake of the format; they add nothing.
        adapted = ".lora_" in key
        if not adapted or tensors[key.replace(".lora_A", ".lora_B")].any():
            added += tensor.numel()
    base = guard.model.get_base_model() if hasattr(guard.model, "get_base_model") else guard.model
    read = 0
    for name, parameter in base.named_parameters():
        if "lora_" not in name and "score" not in name:
            read += parameter.numel()
    return {
        "added_parameters": added,
        "share_of_guard_base": added / read,
        "separate_8b_guard_is": SEPARATE_GUARD / added,
    }


def detection_by_prefix(
    guard: Guard,
    conversations: list[Messages],
    truth: np.ndarray,
    prefix_tokens: list[int],
    threshold: float,
) -> list[dict[str, Any]]:
    """Recall and false-positive rate when the guard has seen only the first n tokens of each reply.

    Pairs longer than `max_length` are read to that length.
    """
    if not isinstance(guard, LoraGuard) or "pair" not in guard.inputs:
        return []
    rows = [i for i, messages in enumerate(conversations) if None not in last_turns(messages)]
    lengths = [*prefix_tokens, guard.max_length]
    scores = prefix_scores(guard, [conversations[i] for i in rows], lengths)
    found = []
    counts = [*prefix_tokens, None]
    for count, column in zip(counts, scores.T, strict=True):
        values = metrics.binary(truth[rows], column, threshold)
        row = {
            "tokens": count,
            "recall": values["recall"],
            "fpr": values["fpr"],
            "auprc": values["auprc"],
        }
        found.append(row)
    return found


@torch.inference_mode()
def prefix_scores(
    guard: LoraGuard,
    pairs: list[Messages],
    lengths: Sequence[int],
) -> np.ndarray:
    """Unsafe probabilities [pairs, lengths] after so many tokens of each reply.

    One forward pass a pair: a decoder's score at a token is its score of the text that ends there.
    """
    tokenizer = guard.tokenizer
    asked = [pair(last_turns(messages)[0], "") for messages in pairs]
    whole = token_ids(pairs, tokenizer)
    empty = token_ids(asked, tokenizer)
    seen = []  # the stock model scores every token and pools afterwards
    hook = guard.head.register_forward_hook(
        lambda _, __, logits: seen.append(logits),
    )
    scores = np.zeros((len(pairs), len(lengths)))
    order = sorted(range(len(pairs)), key=lambda i: -len(whole[i]))
    with tqdm(
        total=len(order),
        desc="prefixes",
        unit="pair",
    ) as bar:
        while order:
            width = min(len(whole[order[0]]), guard.max_length)
            take = max(1, guard.batch_tokens // width)
            batch = order[:take]
            order = order[take:]
            ids = [whole[i][: guard.max_length] for i in batch]
            padded = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
            guard.model(**padded.to(guard.device))
            logits = seen.pop()
            unsafe = logits[..., 0] if guard.labels[0] == "unsafe" else logits.amax(-1)
            unsafe = unsafe.float().sigmoid()
            unsafe = unsafe.nan_to_num(1.0).cpu().numpy()
            for row, i in enumerate(batch):
                start = reply_start(whole[i], empty[i])
                end = len(ids[row])
                last = [min(start + n, end) - 1 for n in lengths]
                scores[i] = unsafe[row, last]
            bar.update(len(batch))
    hook.remove()
    return scores


def reply_start(whole: list[int], empty: list[int]) -> int:
    """Where a pair differs from the same without its reply; the space before a reply belongs to
    its first token.
    """
    shorter = min(len(whole), len(empty))
    for place in range(shorter):
        if whole[place] != empty[place]:
            return place
    return shorter


def results_markdown(results: dict[str, Any]) -> str:
    """results.md: the guards side by side, what they cost, when they notice, the first one's
    categories.
    """
    flagged = results["flagged"]
    name, first = next(iter(flagged.items()))
    rows = []
    for guard, scores in flagged.items():
        shown = ("auprc_interval", "auroc_interval", "fpr_interval", "threshold", "errors")
        rows.append([guard, *report.metric_cells(scores, shown)])
    failed = "failed (counted as unsafe)"
    lines = [
        f"# {results['dataset']}: {results['judged']}s",
        "",
        f"{first['support']} rows, {first['positives']} unsafe. A guess has AUPRC "
        f"{first['base_rate']:.3f}; flagging everything has F1 "
        f"{report.number(first['always_unsafe_f1'])}.",
        "",
        report.metric_table(flagged),
        report.table(rows, ["", "AUPRC ↑", "AUROC ↑", "FPR ↓", "threshold", failed]),
        "95 % intervals: 1,000 bootstrap draws of prompts.",
        "",
        *report.findings(flagged),
    ]
    if results["overhead"]:
        rows = []
        for guard, cost in results["overhead"].items():
            share = cost["share_of_guard_base"]
            times = cost["separate_8b_guard_is"]
            rows.append([guard, cost["added_parameters"], f"{share:.3%}", f"{times:,.0f}x"])
        header = ["", "added parameters", "share of the transformer it reads"]
        lines += [
            "## Cost",
            "",
            report.table(rows, [*header, "a separate 8B guard has"]),
        ]
    if results["prefixes"]:
        rows = []
        for found in results["prefixes"]:
            rows.append([found["tokens"] or "all", found["recall"], found["fpr"], found["auprc"]])
        header = ["reply tokens seen", "recall ↑", "FPR ↓", "AUPRC ↑"]
        lines += [f"## When {name} notices", "", report.table(rows, header)]
    lines += report.part_tables(results, "--train_data")
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
