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

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from side_by_side import ROOT, SEED, TOLERANCE, recipe_modules
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from common import report
from common.bundled import resolve_model
from common.conversation import last_turns, pair
from common.prefix import shared_prefix_collator
from common.run import device, manifest, run_cli, write_json
from common.training import answers_loss, read_answers

TARGET = 9.0  # of the better way, at a quarter of the lengths


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="smollm2-135m-instruct", help="bundled name, hub id or folder"
    )
    parser.add_argument(
        "--maximum", type=int, default=1024, help="of 4096: lengths are scaled with it"
    )
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--micro_batch", type=int, default=4)
    parser.add_argument("--output", type=Path, default=ROOT / "output/bench/expguard.json")
    args = parser.parse_args()
    set_seed(SEED)
    (rows_module,) = recipe_modules("expguard", "rows")
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(args.model))
    encoder = rows_module.Encoder(tokenizer, 4096)
    rows = rows_module.read_rows(str(ROOT / "data/sample/expguard/train.jsonl"), "")
    encoded, _ = encoder.training_set(strung(rows, args.rows))
    rows = [scaled(row, args.maximum / 4096) for row in encoded]
    model = (
        AutoModelForCausalLM.from_pretrained(resolve_model(args.model), dtype=torch.float32)
        .to(device())
        .train()
    )
    verdicts = sum(label != -100 for row in rows for label in row["labels"])
    by_length = sorted(rows, key=lambda row: -len(row["input_ids"]))

    def ours(batches, collate):
        for batch in batches:
            answers = read_answers(model, on_device(collate(batch)))
            answers_loss(answers, verdicts).backward()

    def original():
        for batch in chunks(rows, args.micro_batch):
            inputs = on_device(padded(batch, tokenizer.pad_token_id, args.maximum))
            labels = inputs.pop("labels")[:, 1:]
            logits = model(**inputs, use_cache=False).logits[:, :-1]
            (
                cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
                / verdicts
            ).backward()

    def like_length(batch):
        return padded(batch, tokenizer.pad_token_id, max(len(row["input_ids"]) for row in batch))

    ways = {
        "like length, verdict logits": lambda: ours(
            chunks(by_length, args.micro_batch), like_length
        ),
        "laid out as a tree, verdict logits": lambda: ours(
            chunks(by_length, args.micro_batch), shared_prefix_collator
        ),
        f"original: padded to {args.maximum}": original,
    }
    seconds, gradients = {}, {}
    ours(chunks(by_length, args.micro_batch)[-1:], like_length)  # gradients get their memory
    for name, way in ways.items():
        model.zero_grad()
        start = time.perf_counter()
        way()
        gradients[name] = [parameter.grad.clone() for parameter in model.parameters()]
        seconds[name] = time.perf_counter() - start
        print(f"{name}: {seconds[name]:.1f} s", file=sys.stderr, flush=True)
    reference = gradients[name]
    size = max(g.abs().max().item() for g in reference)
    differences = {
        way: max((a - b).abs().max().item() for a, b in zip(of, reference, strict=True)) / size
        for way, of in gradients.items()
    }
    table = [
        [way, len(rows) / s, seconds[name] / s, differences[way]] for way, s in seconds.items()
    ]
    print(report.table(table, ["", "rows/s", "ratio", "gradient difference"]))
    print(
        f"{len(rows)} rows of {statistics.mean(len(row['input_ids']) for row in rows):.0f} tokens"
    )
    results = {"seconds": seconds, "differences": differences, "target": TARGET}
    write_json(args.output, manifest([vars(args)], seed=SEED, results=results))
    sys.exit(max(differences.values()) > TOLERANCE)


def strung(rows: list[dict], count: int) -> list[dict]:
    """Rows of the sample with 2 to 16 messages of its rows for one; every second has a response."""
    rng, out = random.Random(SEED), []
    answered = [row for row in rows if row["response_unsafe"] is not None]
    for i in range(count):
        row = rng.choice(answered)
        turns = zip(
            *(last_turns(r["messages"]) for r in rng.sample(answered, rng.randint(2, 16))),
            strict=True,
        )
        prompt, response = (" ".join(texts) for texts in turns)
        kept = row if i % 2 else row | {"response_unsafe": None}
        out.append(kept | {"messages": pair(prompt, response if i % 2 else None)})
    return out


def scaled(row: dict, share: float) -> dict:
    """The last part of a row."""
    keep = max(
        round(len(row["input_ids"]) * share), sum(label != -100 for label in row["labels"]) + 1
    )
    return {name: row[name][-keep:] for name in ("input_ids", "labels")}


def chunks(rows: list[dict], size: int) -> list[list[dict]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def padded(batch: list[dict], pad: int, width: int) -> dict[str, torch.Tensor]:
    def fill(name, value):
        return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in batch])

    mask = torch.tensor(
        [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in batch]
    )
    return {
        "input_ids": fill("input_ids", pad),
        "labels": fill("labels", -100),
        "attention_mask": mask,
    }


def on_device(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device()) for name, tensor in batch.items()}


if __name__ == "__main__":
    run_cli(main)
