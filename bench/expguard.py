"""Speed of ExpGuard's training against padding every row to the maximum: same model, rows and
gradients.

    cd bench && python expguard.py
    python expguard.py --maximum 4096 --rows 2 --micro_batch 1  # lengths as they are; 15 GiB of memory

Rows are the sample's messages, strung to a mean of about 670 tokens with the paper's prompt, half
of them with a response. The paper pads to 4096; by default lengths and maximum are a quarter of
that (the end of each row is kept, so that rows have no policy left to share). Original:
micro-batches padded to the maximum, logits and loss at every position. Ours: logits at verdicts
alone; batches of like length, or laid out as a tree, what rows share once and no padding
(`--share_prefix`). A way is forward and backward over all rows; the exit code is 1 if gradients
differ by more than 1e-4 of the largest.
"""

import random
import statistics
import sys

import torch
from side_by_side import (
    ROOT,
    SEED,
    TOLERANCE,
    bench_parser,
    medians,
    recipe_modules,
    take_turns,
    write_results,
)
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from common import report
from common.bundled import resolve_model
from common.conversation import last_turns, pair
from common.prefix import shared_prefix_collator
from common.run import device, run_cli
from common.training import answers_loss, read_answers

TARGET = 9.0  # of the better way, at a quarter of the lengths


def main() -> None:
    parser = bench_parser(__doc__, "expguard", rounds=1)
    parser.add_argument(
        "--maximum", type=int, default=1024, help="of 4096: lengths are scaled with it"
    )
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--micro_batch", type=int, default=4)
    args = parser.parse_args()
    set_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(args.model))
    rows = encoded_rows(tokenizer, args)
    path = resolve_model(args.model)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.to(device()).train()
    padded = DataCollatorForLanguageModeling(tokenizer.pad_token_id)
    original = f"original: padded to {args.maximum}"

    def like_length() -> list[torch.Tensor]:
        return ours(model, rows, args, padded)

    def as_tree() -> list[torch.Tensor]:
        return ours(model, rows, args, shared_prefix_collator)

    def papers() -> list[torch.Tensor]:
        return padded_to_maximum(model, rows, args, tokenizer.pad_token_id)

    ways = {
        "like length, verdict logits": like_length,
        "laid out as a tree, verdict logits": as_tree,
        original: papers,
    }
    ours(model, rows[-1:], args, padded)  # gradients get their memory
    seconds, gradients = take_turns(ways, args.rounds)
    median = medians(seconds)

    reference = gradients[original]
    largest = max(largest_of(gradient) for gradient in reference)
    differences = {}
    table = []
    for way, found in gradients.items():
        apart = []
        for a, b in zip(found, reference, strict=True):
            apart.append(largest_of(a - b))
        differences[way] = max(apart) / largest
        speed = len(rows) / median[way]
        ratio = median[original] / median[way]
        table.append([way, speed, ratio, differences[way]])
    header = ["", "rows/s", "ratio", "gradient difference"]
    print(report.table(table, header))
    lengths = [len(row["input_ids"]) for row in rows]
    mean = statistics.mean(lengths)
    print(f"{len(rows)} rows of {mean:.0f} tokens (target {TARGET}x)")
    results = {
        "seconds": seconds,
        "differences": differences,
        "target": TARGET,
    }
    write_results(args, results)
    sys.exit(max(differences.values()) > TOLERANCE)


# --- The rows -----------------------------------------------------------------------------------


def encoded_rows(tokenizer, args) -> list[dict]:
    """Rows as train.py encodes them, of which the last part is kept."""
    (recipe,) = recipe_modules("expguard", "rows")
    path = ROOT / "data/sample/expguard/train.jsonl"
    sample = recipe.read_rows(str(path), "")
    encoder = recipe.Encoder(tokenizer, 4096)
    long_rows = strung(sample, args.rows)
    encoded, _ = encoder.training_set(long_rows)
    rows = []
    for row in encoded:
        ids = row["input_ids"]
        labels = row["labels"]
        scaled = round(len(ids) * args.maximum / 4096)
        keep = max(scaled, verdicts([row]) + 1)
        kept = {
            "input_ids": ids[-keep:],
            "labels": labels[-keep:],
        }
        rows.append(kept)
    return rows


def strung(rows: list[dict], count: int) -> list[dict]:
    """Rows of the sample with 2 to 16 messages of its rows for one; every second has a response."""
    rng = random.Random(SEED)
    answered = [row for row in rows if row["response_unsafe"] is not None]
    long_rows = []
    for i in range(count):
        row = rng.choice(answered)
        length = rng.randint(2, 16)
        some = rng.sample(answered, length)
        turns = [last_turns(one["messages"]) for one in some]
        prompt = " ".join(question for question, _ in turns)
        response = " ".join(answer for _, answer in turns)
        long_row = dict(row)
        if i % 2:
            long_row["messages"] = pair(prompt, response)
        else:
            long_row["messages"] = pair(prompt)
            long_row["response_unsafe"] = None
        long_rows.append(long_row)
    return long_rows


def verdicts(rows: list[dict]) -> int:
    """How many tokens are learned."""
    count = 0
    for row in rows:
        for label in row["labels"]:
            if label != -100:
                count += 1
    return count


# --- The ways -----------------------------------------------------------------------------------


def ours(model, rows, args, collate) -> list[torch.Tensor]:
    """Gradients by the recipe's loss, in batches of like length."""
    by_length = sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True)
    model.zero_grad()
    for start in range(0, len(rows), args.micro_batch):
        some = by_length[start : start + args.micro_batch]
        batch = on_device(collate(some))
        answers = read_answers(model, batch)
        loss = answers_loss(answers, verdicts(rows))
        loss.backward()
    return gradients_of(model)


def padded_to_maximum(model, rows, args, pad: int) -> list[torch.Tensor]:
    """Gradients as the paper's code has them: every row as long as the maximum, all logits."""
    collate = DataCollatorForLanguageModeling(pad, pad_to_multiple_of=args.maximum)
    model.zero_grad()
    for start in range(0, len(rows), args.micro_batch):
        some = rows[start : start + args.micro_batch]
        batch = on_device(collate(some))
        labels = batch.pop("labels")
        labels = labels[:, 1:].flatten()
        output = model(**batch, use_cache=False)
        logits = output.logits[:, :-1]
        logits = logits.float().flatten(0, 1)
        loss = cross_entropy(logits, labels, reduction="sum")
        loss = loss / verdicts(rows)
        loss.backward()
    return gradients_of(model)


def on_device(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    moved = {}
    for name, tensor in batch.items():
        moved[name] = tensor.to(device())
    return moved


def largest_of(tensor: torch.Tensor) -> float:
    """The largest absolute value."""
    return tensor.abs().max().item()


def gradients_of(model) -> list[torch.Tensor]:
    gradients = []
    for parameter in model.parameters():
        gradients.append(parameter.grad.clone())
    return gradients


if __name__ == "__main__":
    run_cli(main)
