"""Speed of the LoRA-Guard recipe against the reference's way: same model, data and machine,
alternated in one run.

    cd bench && python lora_guard.py        # about 15 minutes on two CPU cores

Training steps (forward, backward, AdamW on adapters and head) on pairs of real lengths. Ours:
batches of like length, each padded to its longest row. Reference: batches in random order, every
row padded to the longest of all. Moderating while 64 tokens are generated, at batch 1 and 8. Ours:
`GuardedChat.reply`, the guard at every k tokens (k = 64: once, at the end).
Reference: one prompt at a time, `generate`, then a guard pass over the prompt and one over the
reply. Beside them the generation alone (`generate`, batched), which is the unit of the ratios, and
the floor: generation alone and one batched guard pass over the finished texts, a guard that reads
each token once and at the speed of a block. The targets are for the best k. Outputs are compared,
and the exit code is 1 if they differ.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from side_by_side import (
    SEED,
    TOLERANCE,
    bench_parser,
    compare,
    equality,
    medians,
    real_length_pairs,
    recipe_modules,
    take_turns,
    write_results,
)
from transformers import DataCollatorWithPadding, set_seed

from common import data, report, templates
from common.conversation import last_turns, pair
from common.run import device, run_cli
from common.training import EpochLengthGroupedSampler

NEW_TOKENS = 64
BATCH = 8
# training: times the reference's speed; batches of 1 and 8: of generation alone, by the best k
TARGETS = {"training": 4.0, 1: 1.15, 8: 1.25}


def parse() -> argparse.Namespace:
    parser = bench_parser(__doc__, "lora_guard", rounds=3)
    add = parser.add_argument
    about = "the guard reads the base after so many layers; default: all"
    add("--guard_layers", type=int, help=about)
    about = "training texts; the reference pads to their longest"
    add("--rows", type=int, default=256, help=about)
    add("--steps", type=int, default=3, help=f"training steps a round, of {BATCH} rows")
    about = "the k of 'guard at every k tokens'"
    add("--every", type=int, nargs="+", default=[8, 16, 64], help=about)
    add("--skip_training", action="store_true", help="moderating alone")
    args = parser.parse_args()
    if args.rounds < 2 or args.steps < 1 or args.rows < BATCH * args.steps:
        wanted = f"--rounds of 2 or more, --steps of 1 or more, --rows of {BATCH} x steps or more"
        parser.error(f"expected {wanted}")
    return args


def main() -> None:
    args = parse()
    set_seed(SEED)
    train, adapter, riding = recipe_modules("lora_guard", "train", "adapter", "riding")
    depth = {"guard_layers": args.guard_layers, "lora_dropout": 0.0}
    recipe = train.GuardArguments(args.model, "unused", **depth)
    model, tokenizer = train.load_model(recipe)
    model = train.add_adapters(model, recipe)
    for name, parameter in model.named_parameters():
        # zero at the start: a guard that has learned something is the honest case
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    sample = data.load_conversations("beavertails-sample:train", require=["categories"])
    results: dict[str, Any] = {}
    if not args.skip_training:
        results["training"] = found = training(model, tokenizer, sample, train, args)
        lines = [[way, *list(values.values())[:-1]] for way, values in found["ways"].items()]
        header = ["training", "rows/s, best", "rows/s, median", "useful tokens", "ratio"]
        print(report.table(lines, header))
        target = f"{found['ratio']:.2f}x (target {TARGETS['training']}x)"
        print(f"training: {target}, outputs {said(found)}\n")
    with tempfile.TemporaryDirectory() as folder:
        card = adapter.guard_card(
            args.model,
            unsafe_head=True,
            inputs=["pair"],
            max_length=512,
            num_hidden_layers=args.guard_layers,
        )
        adapter.save_adapter(model, tokenizer, Path(folder) / "guard", card)
        del model
        chat = riding.GuardedChat(Path(folder) / "guard")
    chat.eos = set()  # every reply has 64 tokens, in every way
    chat.model.generation_config.eos_token_id = None
    for size in (1, 8):
        results[f"batch {size}"] = found = moderating(chat, sample, size, args)
        lines = [[name, *values] for name, values in found["ways"].items()]
        header = [f"batch {size}", "s, best", "s, median", "of generation alone"]
        print(report.table(lines, header))
        best = f"{found['best']:.2f}x of generation alone with k = {found['best_k']}"
        floor = f"floor {found['floor']:.2f}x, reference {found['reference']:.2f}x"
        target = f"target {TARGETS[size]:.2f}x"
        print(f"batch {size}: {best} ({target}, {floor}), outputs {said(found)}\n")
    write_results(args, results)
    sys.exit(0 if all(result["equal"] for result in results.values()) else 1)


def said(result: dict[str, Any]) -> str:
    return f"{'equal' if result['equal'] else 'DIFFERENT'} (by {result['difference']:.1e})"


def training(model, tokenizer, sample: Dataset, train: ModuleType, args) -> dict[str, Any]:
    """The same rows and optimizer steps both ways, each time from the same weights."""
    model.to(device()).train()
    pairs = real_length_pairs(sample, args.rows)["log-normal lengths"]
    ids = templates.encode(tokenizer, [templates.render("lora_guard", m, tokenizer) for m in pairs])
    labels = (np.random.default_rng(SEED).random((len(ids), 15)) < 0.3).astype(float)
    loss_of = train.guard_loss(labels, unsafe_head=True)
    longest = max(map(len, ids))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    initial = {name: p.detach().clone() for name, p in trained.items()}

    def batches_of(order: list[int]) -> list[list[int]]:
        return [order[i : i + BATCH] for i in range(0, len(order) - BATCH + 1, BATCH)]

    # Batches that stand evenly in the order of length, so that a few of them have the lengths of
    # all.
    grouped = batches_of(list(EpochLengthGroupedSampler(BATCH, [len(i) for i in ids], SEED)))
    grouped.sort(key=lambda batch: len(ids[batch[0]]))
    grouped = [grouped[(2 * i + 1) * len(grouped) // (2 * args.steps)] for i in range(args.steps)]
    mixed = batches_of(random.Random(SEED).sample(list(chain(*grouped)), len(grouped) * BATCH))
    dynamic = DataCollatorWithPadding(tokenizer)
    fixed = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=longest)

    def backward(indices: list[int], collate: Callable) -> torch.Tensor:
        batch = collate([{"input_ids": ids[i], "labels": labels[i]} for i in indices]).to(device())
        truth = batch.pop("labels")
        loss = loss_of(model(**batch), truth)
        loss.backward()
        return loss.detach()

    def run(batches: list[list[int]], collate: Callable) -> list[float]:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(initial[name])
        optimizer = torch.optim.AdamW(trained.values(), lr=3e-4)
        for indices in batches:
            with torch.autocast(device().type, torch.bfloat16, enabled=device().type == "cuda"):
                backward(indices, collate)
            optimizer.step()
            optimizer.zero_grad()
        return next(iter(trained.values()))[0].tolist()

    def loss_and_norm(collate: Callable) -> torch.Tensor:
        loss = backward(mixed[0], collate)
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained.values()])
        model.zero_grad()
        return torch.stack([loss, norm])

    equal = equality(loss_and_norm(dynamic), loss_and_norm(fixed))
    ways = {
        "ours: similar lengths, padded to the batch's longest": lambda: run(grouped, dynamic),
        f"reference: random order, padded to the longest of all ({longest})": lambda: run(
            mixed, fixed
        ),
    }
    return compare(model, ways, len(grouped) * BATCH, args.rounds)[0] | equal


def moderating(chat, sample: Dataset, size: int, args) -> dict[str, Any]:
    """Seconds of each way to generate 64 tokens for `size` prompts, and how they compare with
    generation alone.
    """
    rows = random.Random(SEED).sample(range(len(sample)), size)
    prompts = [pair(last_turns(sample[i]["messages"])[0]) for i in rows]
    ids = [chat.chat_ids(messages) for messages in prompts]

    def generate(batch: list[list[int]]) -> list[list[int]]:
        texts = {"input_ids": batch}
        padded = chat.tokenizer.pad(texts, padding_side="left", return_tensors="pt")
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        written = chat.model.generate(**padded.to(chat.device), **options)
        return written[:, padded["input_ids"].shape[1] :].tolist()

    def reference() -> list[list[int]]:
        replies = []
        for messages, row in zip(prompts, ids, strict=True):
            replies += generate([row])
            spoken = chat.tokenizer.decode(replies[-1], skip_special_tokens=True)
            for judged in (messages, pair(None, spoken)):
                chat.judge_texts([judged])
        return replies

    def floor() -> list[list[int]]:
        replies = generate(ids)
        spoken = chat.tokenizer.batch_decode(replies, skip_special_tokens=True)
        asked = [messages[0]["content"] for messages in prompts]
        chat.judge_texts([pair(*texts) for texts in zip(asked, spoken, strict=True)])
        return replies

    def riding(every: int) -> list[list[int]]:
        replies = chat.reply(prompts, max_new_tokens=NEW_TOKENS, guard_every=every, progress=False)
        scores[every] = [reply.response_unsafe for reply in replies]
        return [reply.token_ids for reply in replies]

    scores: dict[int, list[float]] = {}
    ways = {
        "generation alone": lambda: generate(ids),
        "floor": floor,
        "reference, one at a time": reference,
    }
    ways |= {f"ours, k = {k}": lambda k=k: riding(k) for k in args.every}
    seconds, replies = take_turns(ways, args.rounds, f"batch {size}, ")
    median = medians(seconds)
    alone = median["generation alone"]
    ours = {k: median[f"ours, k = {k}"] / alone for k in args.every}
    spread = [max(column) - min(column) for column in zip(*scores.values(), strict=True)]
    same = all(found == replies["generation alone"] for found in replies.values())
    return {
        "ways": {name: (min(s), median[name], median[name] / alone) for name, s in seconds.items()},
        "best": min(ours.values()),
        "best_k": min(ours, key=ours.get),
        "floor": median["floor"] / alone,
        "reference": median["reference, one at a time"] / alone,
        "difference": max(spread),  # of the guard's last score between the values of k
        "equal": same and max(spread) <= TOLERANCE,
    }


if __name__ == "__main__":
    run_cli(main)
