"""Speed of the moderation recipe against the paper's way: same model, data and machine, alternated
in one run.

    cd bench && python moderation.py        # about 20 minutes on two CPU cores, 5 with --num_hidden_layers 6

Training steps (forward, backward, AdamW) on rows of the bundled sample. Ours: batches of similar
length, each padded to its longest row. Paper's: batches in random order, padded to 512. Between
them: random order, padded to the longest row. Judging, from messages to probabilities. Ours:
`ClassifierGuard.judge`, length-sorted batches under a budget of tokens. Paper's `predict()`: all
inputs tokenized in one call, padded to the longest of all, then batches of 16. Outputs are
compared, and the exit code is 1 if they differ. Ratios are of median rows/s.
"""

import random
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import chain, compress
from typing import Any

import torch
from side_by_side import (
    SEED,
    batches_of,
    bench_parser,
    compare,
    equality,
    real_length_pairs,
    recipe_modules,
    write_results,
)
from transformers import DataCollatorWithPadding, set_seed

from common import data, report, templates
from common.conversation import Messages
from common.run import device, run_cli
from common.training import EpochLengthGroupedSampler
from guards.classifier import ClassifierGuard

MAX_LENGTH = 512
BATCH = 8
JUDGE_BATCH = 16  # JUDGE_BATCH is the paper's
TARGETS = {"training": 2, "judging": 3}


def main() -> None:
    parser = bench_parser(__doc__, "moderation", rounds=2)
    add = parser.add_argument
    add("--num_hidden_layers", type=int, help="keep only the first so many layers")
    add("--rows", type=int, default=32, help=f"training rows a round, in batches of {BATCH}")
    add("--pairs", type=int, default=256, help="pairs judged a round")
    args = parser.parse_args()
    if args.rounds < 2 or args.pairs < 1 or args.rows < BATCH:
        wanted = f"--rounds of 2 or more, --pairs of 1 or more, --rows of {BATCH} or more"
        parser.error(f"expected {wanted}")
    set_seed(SEED)
    recipe, rows = recipe_modules("moderation", "train", "rows")
    model_args = recipe.ModelArguments(args.model, num_hidden_layers=args.num_hidden_layers)
    labels = data.taxonomy("beavertails")
    task = rows.Task("pair", dict.fromkeys(labels, ""))
    model, tokenizer, _ = recipe.load_model(model_args, labels)
    train = data.load_conversations(
        "beavertails-sample:train",
        categories=labels,
        require=["categories"],
    )
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        guard = ClassifierGuard(folder, max_length=MAX_LENGTH, progress=False)
    judged = real_length_pairs(train, args.pairs)
    for name, pairs in judged.items():
        results[f"judging, {name}"] = judging(guard, pairs, args.rounds)
    del guard
    encoded = rows.encode_rows(train, task, tokenizer, MAX_LENGTH)
    encoded = encoded.sort("length")
    encoded = encoded.select_columns(["input_ids", "labels"])
    loss = recipe.multilabel_loss(1.0, 0.0)
    results["training, sample rows"] = training(model, tokenizer, encoded, loss, args)

    lines = []
    for name, result in results.items():
        for way, values in result["ways"].items():
            *speeds, _ = values.values()
            lines.append([name, way, *speeds])
    header = ["", "way", "rows/s, best", "rows/s, median", "useful tokens", "ratio"]
    print(report.table(lines, header))
    for name, result in results.items():
        kind, _, _ = name.partition(",")
        target = f"{result['ratio']:.2f}x (target {TARGETS[kind]}x)"
        equal = "equal" if result["equal"] else "DIFFERENT"
        print(f"{name}: {target}, outputs {equal} (by {result['difference']:.1e})")
    write_results(args, results)
    equal = [result["equal"] for result in results.values()]
    sys.exit(not all(equal))


def training(model, tokenizer, rows, loss_of, args) -> dict[str, Any]:
    """The same rows and optimizer steps three ways, each time from the same weights."""
    model.to(device()).train()
    initial = {}
    for name, tensor in model.state_dict().items():
        initial[name] = tensor.clone()
    rng = random.Random(SEED)
    lengths = [len(ids) for ids in rows["input_ids"]]
    order = list(EpochLengthGroupedSampler(BATCH, lengths, SEED))
    epoch = batches_of(order, BATCH)
    count = min(args.rows // BATCH, len(epoch))
    grouped = rng.sample(epoch, count)
    drawn = list(chain(*grouped))
    shuffled = rng.sample(drawn, len(drawn))
    mixed = batches_of(shuffled, BATCH)
    dynamic = DataCollatorWithPadding(tokenizer)
    fixed = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=MAX_LENGTH)

    def backward(indices, collate: Callable) -> torch.Tensor:
        batch = collate([rows[i] for i in indices])
        batch = batch.to(device())
        labels = batch.pop("labels")
        output = model(**batch)
        loss = loss_of(output, labels)
        loss.backward()
        return loss.detach()

    def run(batches, collate: Callable) -> list[float]:
        model.load_state_dict(initial)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        kind = device().type
        for indices in batches:
            # as --bf16 does
            with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
                backward(indices, collate)
            optimizer.step()
            optimizer.zero_grad()
        first = next(model.parameters())
        return first[0].tolist()

    def loss_and_norm(collate: Callable) -> torch.Tensor:
        loss = backward(mixed[0], collate)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        model.zero_grad()
        return torch.stack([loss, norm])

    equal = equality(loss_and_norm(dynamic), loss_and_norm(fixed))
    ways = {
        "ours: similar lengths, padded to the batch's longest": partial(run, grouped, dynamic),
        "between: random order, padded to the batch's longest": partial(run, mixed, dynamic),
        f"paper's: random order, padded to {MAX_LENGTH}": partial(run, mixed, fixed),
    }
    count = len(grouped) * BATCH
    result, _ = compare(model, ways, count, args.rounds)
    return result | equal


def judging(
    guard: ClassifierGuard,
    pairs: list[Messages],
    rounds: int,
) -> dict[str, Any]:
    """From messages to probabilities, two ways with the same weights."""

    def render() -> list[list[templates.Part]]:
        prompts = []
        for messages in pairs:
            prompt = templates.render(guard.template, messages, guard.tokenizer)
            prompts.append(prompt)
        return prompts

    # Longer pairs are left out: the paper cuts them, the guard judges them in windows.
    ids = templates.encode(guard.tokenizer, render())
    fits = [len(row) <= MAX_LENGTH for row in ids]
    pairs = list(compress(pairs, fits))

    def ours() -> torch.Tensor:
        scores = []
        for verdict in guard.judge(pairs):
            row = [verdict.categories[name] for name in guard.labels]
            scores.append(row)
        return torch.tensor(scores)

    @torch.inference_mode()
    def paper() -> torch.Tensor:
        texts = [templates.text_of(parts) for parts in render()]
        batch = guard.tokenizer(texts, padding=True, return_tensors="pt")
        batch = batch.to(guard.device)
        ids = batch["input_ids"].split(JUDGE_BATCH)
        masks = batch["attention_mask"].split(JUDGE_BATCH)
        logits = []
        for some, mask in zip(ids, masks, strict=True):
            output = guard.model(input_ids=some, attention_mask=mask)
            logits.append(output.logits)
        scores = torch.cat(logits).float().sigmoid()
        return scores.cpu()

    ways = {
        "ours: judge()": ours,
        f"paper's: padded to the longest of all, batches of {JUDGE_BATCH}": paper,
    }
    count = len(pairs)
    result, scores = compare(guard.model, ways, count, rounds)
    # bf16 rounds differently at each padded width: compare in float32
    if guard.model.dtype != torch.float32:
        guard.model.float()
        scores = [ours(), paper()]
    return result | equality(*scores)


if __name__ == "__main__":
    run_cli(main)
