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
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from side_by_side import (
    SEED,
    TOLERANCE,
    batches_of,
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
from common.conversation import Messages, last_turns, pair
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
    add(
        "--every",
        type=int,
        nargs="+",
        default=[8, 16, 64],
        help=about,
    )
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
    recipe = train.GuardArguments(hf_model_id=args.model, output_folder="unused", **depth)
    outputs = ["unsafe", *data.taxonomy("beavertails")]
    model, tokenizer = train.load_model(recipe, outputs)
    model = train.add_adapters(model, recipe)
    for name, parameter in model.named_parameters():
        # zero at the start: a guard that has learned something is the honest case
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    sample = data.load_conversations("beavertails-sample:train", require=["categories"])
    results: dict[str, Any] = {}
    if not args.skip_training:
        found = training(model, tokenizer, sample, train, args)
        results["training"] = found
        lines = []
        for way, values in found["ways"].items():
            *speeds, _ = values.values()
            lines.append([way, *speeds])
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
        found = moderating(chat, sample, size, args)
        results[f"batch {size}"] = found
        lines = []
        for name, values in found["ways"].items():
            lines.append([name, *values])
        header = [f"batch {size}", "s, best", "s, median", "of generation alone"]
        print(report.table(lines, header))
        best = f"{found['best']:.2f}x of generation alone with k = {found['best_k']}"
        floor = f"floor {found['floor']:.2f}x, reference {found['reference']:.2f}x"
        target = f"target {TARGETS[size]:.2f}x"
        print(f"batch {size}: {best} ({target}, {floor}), outputs {said(found)}\n")
    write_results(args, results)
    equal = [result["equal"] for result in results.values()]
    sys.exit(not all(equal))


def said(result: dict[str, Any]) -> str:
    word = "equal" if result["equal"] else "DIFFERENT"
    return f"{word} (by {result['difference']:.1e})"


def training(model, tokenizer, sample, train, args) -> dict[str, Any]:
    """The same rows and optimizer steps both ways, each time from the same weights."""
    model.to(device()).train()
    ids, labels = labelled_rows(tokenizer, sample, args.rows)
    lengths = [len(row) for row in ids]
    loss_of = train.guard_loss(labels, unsafe_head=True)
    longest = max(lengths)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    initial = {name: p.detach().clone() for name, p in trained.items()}
    grouped = grouped_batches(lengths, args.steps)
    drawn = list(chain(*grouped))
    rng = random.Random(SEED)
    shuffled = rng.sample(drawn, len(drawn))
    mixed = batches_of(shuffled, BATCH)
    dynamic = DataCollatorWithPadding(tokenizer)
    fixed = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=longest)

    def backward(indices, collate: Callable) -> torch.Tensor:
        rows = [{"input_ids": ids[i], "labels": labels[i]} for i in indices]
        batch = collate(rows).to(device())
        truth = batch.pop("labels")
        output = model(**batch)
        loss = loss_of(output, truth)
        loss.backward()
        return loss.detach()

    def run(batches, collate: Callable) -> list[float]:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(initial[name])
        optimizer = torch.optim.AdamW(trained.values(), lr=3e-4)
        kind = device().type
        for indices in batches:
            with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
                backward(indices, collate)
            optimizer.step()
            optimizer.zero_grad()
        first, *_ = trained.values()
        return first[0].tolist()

    def loss_and_norm(collate: Callable) -> torch.Tensor:
        loss = backward(mixed[0], collate)
        gradients = [parameter.grad for parameter in trained.values()]
        norm = torch.nn.utils.get_total_norm(gradients)
        model.zero_grad()
        return torch.stack([loss, norm])

    equal = equality(loss_and_norm(dynamic), loss_and_norm(fixed))
    ways = {
        "ours: similar lengths, padded to the batch's longest": partial(run, grouped, dynamic),
        f"reference: random order, padded to the longest of all ({longest})": partial(
            run, mixed, fixed
        ),
    }
    count = len(grouped) * BATCH
    result, _ = compare(model, ways, count, args.rounds)
    return result | equal


def labelled_rows(tokenizer, sample: Dataset, count: int) -> tuple[list, np.ndarray]:
    """Token ids of pairs of real lengths, and random labels."""
    pairs = real_length_pairs(sample, count)["log-normal lengths"]
    prompts = [templates.render("lora_guard", messages, tokenizer) for messages in pairs]
    ids = templates.encode(tokenizer, prompts)
    rng = np.random.default_rng(SEED)
    unsafe = rng.random((len(ids), 15)) < 0.3
    return ids, unsafe.astype(float)


def grouped_batches(lengths: list[int], steps: int) -> list[list[int]]:
    """Batches spread evenly over the order of length, so that a few have the lengths of all."""
    order = list(EpochLengthGroupedSampler(BATCH, lengths, SEED))
    epoch = batches_of(order, BATCH)
    epoch.sort(key=lambda batch: lengths[batch[0]])
    grouped = []
    for step in range(steps):
        place = (2 * step + 1) * len(epoch) // (2 * steps)
        grouped.append(epoch[place])
    return grouped


def sample_prompts(sample: Dataset, size: int) -> list[Messages]:
    rng = random.Random(SEED)
    rows = rng.sample(range(len(sample)), size)
    prompts = []
    for row in rows:
        question, _ = last_turns(sample[row]["messages"])
        prompts.append(pair(question))
    return prompts


def moderating(chat, sample, size: int, args) -> dict[str, Any]:
    """Seconds of each way to generate 64 tokens for `size` prompts, and how they compare with
    generation alone.
    """
    prompts = sample_prompts(sample, size)
    ids = [chat.chat_ids(messages) for messages in prompts]

    def generate(batch: list[list[int]]) -> list[list[int]]:
        texts = {"input_ids": batch}
        padded = chat.tokenizer.pad(texts, padding_side="left", return_tensors="pt")
        padded = padded.to(chat.device)
        written = chat.model.generate(
            **padded,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        _, width = padded["input_ids"].shape
        return written[:, width:].tolist()

    def reference() -> list[list[int]]:
        replies = []
        for messages, row in zip(prompts, ids, strict=True):
            replies += generate([row])
            spoken = chat.tokenizer.decode(replies[-1], skip_special_tokens=True)
            chat.judge_texts([messages])
            chat.judge_texts([pair(None, spoken)])
        return replies

    def floor() -> list[list[int]]:
        replies = generate(ids)
        spoken = chat.tokenizer.batch_decode(replies, skip_special_tokens=True)
        answered = []
        for messages, reply in zip(prompts, spoken, strict=True):
            answered.append(pair(messages[0]["content"], reply))
        chat.judge_texts(answered)
        return replies

    def riding(every: int) -> list[list[int]]:
        replies = chat.reply(
            prompts,
            max_new_tokens=NEW_TOKENS,
            guard_every=every,
            progress=False,
        )
        scores[every] = [reply.response_unsafe for reply in replies]
        return [reply.token_ids for reply in replies]

    scores: dict[int, list[float]] = {}
    ways = {
        "generation alone": lambda: generate(ids),
        "floor": floor,
        "reference, one at a time": reference,
    }
    for every in args.every:
        ways[f"ours, k = {every}"] = partial(riding, every)
    seconds, replies = take_turns(ways, args.rounds, f"batch {size}, ")
    alone = replies["generation alone"]
    same = all(found == alone for found in replies.values())
    return summary(seconds, scores, same)


def summary(
    seconds: dict[str, list[float]],
    scores: dict[int, list[float]],
    same: bool,
) -> dict[str, Any]:
    """How the ways compare with generation alone.

    Args:
        scores: of the guard, for each k.
        same: whether all ways wrote the same replies.
    """
    median = medians(seconds)
    alone = median["generation alone"]
    ours = {}
    for every in scores:
        ours[every] = median[f"ours, k = {every}"] / alone
    timed = {}
    for name, times in seconds.items():
        best = min(times)
        ratio = median[name] / alone
        timed[name] = (best, median[name], ratio)
    spread = []
    for said_by_k in zip(*scores.values(), strict=True):
        spread.append(max(said_by_k) - min(said_by_k))
    return {
        "ways": timed,
        "best": min(ours.values()),
        "best_k": min(ours, key=ours.get),
        "floor": median["floor"] / alone,
        "reference": median["reference, one at a time"] / alone,
        "difference": max(spread),  # of the guard's last score between the values of k
        "equal": same and max(spread) <= TOLERANCE,
    }


if __name__ == "__main__":
    run_cli(main)
