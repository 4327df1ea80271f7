"""Evaluate LoRA guards, and whatever `load_guard` knows beside them, on the same labelled rows.

    # head-only against LoRA against a full fine-tune, on the split that nothing was chosen on
    python evaluate.py --guards output/run/best output/head-only/best ../moderation/output/beavertails-7b \
        --eval_data PKU-Alignment/BeaverTails:30k_test --output_dir output/evaluation

    # prompts alone (a guard that was trained with --guard-inputs prompt)
    python evaluate.py --guards output/run/best --eval_data prompts.jsonl --judge prompt --output_dir output/prompts

Thresholds are the guards' own, fitted on their validation data. Without arguments it evaluates what
`torchrun train.py` without arguments has left.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors import safe_open
from tqdm.auto import tqdm

from common import data, metrics, report
from common.conversation import Messages, UserError, last_turns, pair
from common.run import check_output_folder, manifest, parse_args, run_cli
from common.templates import encode, render
from guards import Guard, load_guard
from guards.card import LoraCard, read_card
from guards.lora import LoraGuard

logger = logging.getLogger("lora_guard")
# parameters of an 8B guard that runs beside the chat model (Llama-Guard-3-8B)
SEPARATE_GUARD = 8.03e9


@dataclass
class EvaluationArguments:
    guards: list[str] = field(
        metadata={"help": "Adapter folders, other guard folders, hub ids; the first is detailed."}
    )
    eval_data: str = field(metadata={"help": "Data spec with labels."})
    output_dir: str = field(
        metadata={"help": "Folder for results.json, results.md, pictures and predictions.jsonl."}
    )
    judge: str = field(
        default="response", metadata={"help": "response (with its question, if any) | prompt"}
    )
    prefix_tokens: list[int] = field(
        default_factory=lambda: [16, 32, 64, 128],
        metadata={"help": "Detection after so many tokens of the reply."},
    )
    long_inputs: str = field(default="windows", metadata={"help": "windows | error | truncate"})
    bad_rows: str = field(default="error", metadata={"help": "error | skip (counted and reported)"})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with the model."}
    )
    seed: int = 42


def main() -> None:
    (args,) = parse_args(
        [EvaluationArguments], Path(__file__).parent / "configs/quickstart_evaluate.yaml"
    )
    if args.judge not in ("prompt", "response"):
        raise UserError(f"--judge {args.judge}: expected prompt or response")
    if any(n < 1 for n in args.prefix_tokens):
        raise UserError(f"--prefix_tokens {args.prefix_tokens}: must be at least 1")
    check_output_folder(args.output_dir)
    label = f"{args.judge}_unsafe"
    rows = data.load_conversations(args.eval_data, require=(label,), bad_rows=args.bad_rows)
    conversations = rows["messages"]
    if args.judge == "prompt":
        conversations = [pair(last_turns(messages)[0]) for messages in conversations]
    truth, names = np.array(rows[label]), guard_names(args.guards)
    options = {"long_inputs": args.long_inputs, "trust_remote_code": args.trust_remote_code}
    guards = {name: load_guard(spec, **options) for name, spec in names.items()}  # before long runs

    flagged, scores, categories, verdicts = {}, {}, {}, {}
    for name, guard in guards.items():
        alone = (
            isinstance(guard, LoraGuard) and args.judge == "response" and "pair" not in guard.inputs
        )
        verdicts[name] = guard.judge(
            [pair(None, last_turns(m)[1]) for m in conversations] if alone else conversations
        )
        if all(verdict.error for verdict in verdicts[name]):
            raise UserError(
                f"{names[name]}: not one row could be judged: {verdicts[name][0].error}"
            )
        scores[name] = np.array([v.score(label) for v in verdicts[name]])
        threshold = guard.thresholds.get("flagged", {"value": 0.5})["value"]
        flagged[name] = metrics.binary(truth, scores[name], threshold)
        flagged[name]["errors"] = sum(v.error is not None for v in verdicts[name])
        flagged[name]["auprc_interval"] = metrics.bootstrap(
            lambda drawn, s=scores[name]: metrics.auprc(truth[drawn], s[drawn]),
            len(truth),
            [data.prompt_key(row) for row in rows],
            seed=args.seed,
        )
    first = next(iter(guards))
    if args.judge == "response" and set(data.taxonomy("beavertails")) <= set(guards[first].labels):
        categories = by_category(
            rows, verdicts[first], guards[first].labels, flagged[first]["threshold"]
        )
    results = {
        "dataset": args.eval_data,
        "judged": args.judge,
        "guards": names,
        "flagged": flagged,
        "categories": categories,
        "overhead": {
            name: o for name, guard in guards.items() if (o := overhead(guard, names[name]))
        },
        "prefixes": detection_by_prefix(
            guards[first], conversations, truth, args, flagged[first]["threshold"]
        ),
        "run": manifest([args]),
    }
    predictions = [
        {"id": row["id"], f"true_{label}": row[label], "true_categories": row["categories"]}
        | {name: {**vars(verdicts[name][i]), "score": float(scores[name][i])} for name in guards}
        for i, row in enumerate(rows)
    ]
    markdown, folder = results_markdown(results), Path(args.output_dir)
    report.plot_precision_recall(
        {name: (truth, score) for name, score in scores.items()},
        folder / "precision-recall.png",
        f"Unsafe {args.judge}s of {args.eval_data} (n={len(truth)})",
    )
    report.write_results(folder, results, markdown, predictions)
    print(markdown)


def guard_names(specs: list[str]) -> dict[str, str]:
    """A short name for each guard: the folder's, or run/folder where that is not enough."""
    names = [Path(spec).name for spec in specs]
    if len(set(names)) < len(names) or set(names) & {"best"}:
        names = ["/".join(Path(spec).parts[-2:]) for spec in specs]
    if len(set(names)) < len(names):
        raise UserError(f"--guards {' '.join(specs)}: name each guard once")
    return dict(zip(names, specs, strict=True))


def by_category(
    rows: Dataset, verdicts: list, labels: list[str], threshold: float
) -> dict[str, dict]:
    """Scores of each category over the rows whose categories are known; a failed verdict counts as
    unsafe.

    A head of their own has the paper's 0.5; without an unsafe head the categories share the
    threshold of their maximum.
    """
    threshold = 0.5 if "unsafe" in labels else threshold
    known = [i for i, named in enumerate(rows["categories"]) if named is not None]
    if not known or {n for i in known for n in rows[i]["categories"]} - set(
        data.taxonomy("beavertails")
    ):
        return {}
    named = [rows[i]["categories"] for i in known]
    return {
        name: metrics.binary(
            [name in n for n in named],
            [verdicts[i].categories.get(name, 1.0) for i in known],
            threshold,
        )
        for name in data.taxonomy("beavertails")
    }


def overhead(guard: Guard, folder: str) -> dict[str, Any] | None:
    """What a LoRA guard adds to the chat model that is there anyway (the paper's claim: 100 to 1000
    times less).
    """
    if not isinstance(guard, LoraGuard):
        return None
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    # `--head-only` keeps adapters at zero for the sake of the format; they add nothing.
    idle = {
        key.split(".lora_")[0]
        for key, tensor in tensors.items()
        if ".lora_B" in key and not tensor.any()
    }
    added = sum(
        t.numel()
        for key, t in tensors.items()
        if ".lora_" not in key or key.split(".lora_")[0] not in idle
    )
    added += len(read_card(folder, LoraCard).head_bias or [])
    base = guard.model.get_base_model() if hasattr(guard.model, "get_base_model") else guard.model
    share = added / sum(
        p.numel()
        for name, p in base.named_parameters()
        if "lora_" not in name and "score" not in name
    )
    return {
        "added_parameters": added,
        "share_of_guard_base": share,
        "separate_8b_guard_is": SEPARATE_GUARD / added,
    }


@torch.inference_mode()
def detection_by_prefix(
    guard: Guard,
    conversations: list[Messages],
    truth: np.ndarray,
    args: EvaluationArguments,
    threshold: float,
) -> list[dict[str, Any]]:
    """Recall and false-positive rate when the guard has seen only the first n tokens of each reply.

    One forward pass a pair: a decoder's score at a token is its score of the text that ends there.
    Pairs longer than `max_length` are read to that length.
    """
    if not isinstance(guard, LoraGuard) or args.judge != "response" or "pair" not in guard.inputs:
        return []
    rows = [i for i, messages in enumerate(conversations) if None not in last_turns(messages)]
    texts = [render(guard.template, conversations[i], guard.tokenizer) for i in rows]
    opened = [
        render(guard.template, pair(last_turns(conversations[i])[0], ""), guard.tokenizer)
        for i in rows
    ]
    ids, starts = [], []
    for full, empty in zip(
        encode(guard.tokenizer, texts), encode(guard.tokenizer, opened), strict=True
    ):
        ids.append(full[: guard.max_length])
        # Where the two differ the reply begins; the space before it belongs to its first token.
        starts.append(
            next(
                (k for k, (a, b) in enumerate(zip(full, empty, strict=False)) if a != b), len(empty)
            )
        )
    lengths, seen = [*args.prefix_tokens, guard.max_length], []
    # The stock model scores every token and pools afterwards.
    hook = guard.head.register_forward_hook(lambda _, __, logits: seen.append(logits))
    scores, order = (
        np.zeros((len(rows), len(lengths))),
        sorted(range(len(rows)), key=lambda i: -len(ids[i])),
    )
    with tqdm(total=len(order), desc="prefixes", unit="pair") as bar:
        while order:
            take = max(1, guard.batch_tokens // len(ids[order[0]]))
            batch, order = order[:take], order[take:]
            padded = guard.tokenizer.pad(
                {"input_ids": [ids[i] for i in batch]}, return_tensors="pt"
            ).to(guard.device)
            guard.model(**padded)
            logits = seen.pop()
            unsafe = (
                (logits[..., 0] if guard.labels[0] == "unsafe" else logits.amax(-1))
                .float()
                .sigmoid()
                .cpu()
            )
            for row, i in enumerate(batch):
                last = [min(starts[i] + n, len(ids[i])) - 1 for n in lengths]
                scores[i] = np.nan_to_num(unsafe[row, last].numpy(), nan=1.0)
            bar.update(len(batch))
    hook.remove()
    found = []
    for column, n in enumerate(lengths):
        values = metrics.binary(truth[rows], scores[:, column], threshold)
        seen_tokens = n if column < len(args.prefix_tokens) else None
        found.append({"tokens": seen_tokens, **{k: values[k] for k in ("recall", "fpr", "auprc")}})
    return found


def results_markdown(results: dict[str, Any]) -> str:
    """results.md: the guards side by side, what they cost, when they notice, the first one's
    categories.
    """
    flagged = results["flagged"]
    first = next(iter(flagged.values()))
    lines = [
        f"# {results['dataset']}: {results['judged']}s",
        "",
        f"{first['support']} rows, {first['positives']} unsafe. A guess has AUPRC {first['base_rate']:.3f}; flagging "
        f"everything has F1 {report.number(first['always_unsafe_f1'])}.",
        "",
        report.metric_table(flagged),
        report.table(
            [
                [n, v["auprc"], v["auprc_interval"], v["threshold"], v["errors"]]
                for n, v in flagged.items()
            ],
            ["", "AUPRC ↑", "95 % interval", "threshold", "failed (counted as unsafe)"],
        ),
    ]
    if results["overhead"]:
        rows = [
            [
                n,
                o["added_parameters"],
                f"{o['share_of_guard_base']:.3%}",
                f"{o['separate_8b_guard_is']:,.0f}x",
            ]
            for n, o in results["overhead"].items()
        ]
        header = [
            "",
            "added parameters",
            "share of the transformer it reads",
            "a separate 8B guard has",
        ]
        lines += ["## Cost", "", report.table(rows, header)]
    if results["prefixes"]:
        rows = [
            [p["tokens"] or "all", p["recall"], p["fpr"], p["auprc"]] for p in results["prefixes"]
        ]
        name = next(iter(flagged))
        lines += [
            f"## When {name} notices",
            "",
            report.table(rows, ["reply tokens seen", "recall ↑", "FPR ↓", "AUPRC ↑"]),
        ]
    if results["categories"]:
        at = next(iter(results["categories"].values()))["threshold"]
        lines += [f"## Categories (above {at:.3f})", "", report.metric_table(results["categories"])]
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
