"""Speed of verdicts against the original way: same model, prompts and machine, alternated in one
run.

    cd bench && python guards.py

A guard with a policy of about 500 tokens judges prompts of real lengths: XSTest's where
GUARDRAIL_RECIPES_DATA names a folder with xstest/ in it, else those of the bundled sample.
Original: one prompt at a time, generate, parse the text.
Then: one forward pass a prompt; the same in padded batches; what is shared run once and the rest
packed (`GenerativeGuard.judge`). The original is timed for a guard that ends its answer after 12
tokens, and for one that writes 50. Outputs are compared; the exit code is 1 if a verdict differs or
a probability differs by more than 1e-4. The bound is the ratio of tokens that each way runs.
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from side_by_side import ROOT, SEED, TOLERANCE, real_data
from transformers import set_seed

from common import data, report
from common.bundled import resolve_model
from common.conversation import last_turns, pair
from common.prefix import shared_prefix
from common.run import manifest, run_cli, write_json
from common.templates import Part
from guards.generative import GenerativeGuard

TARGETS = {"forward": 4.0, "shared prefix, packed": 13.0, "share of the bound": 0.85}
RULES = "\n".join(
    f"S{i}: {name.replace('_', ' ').replace(',', ', ')}. Text of this kind gives advice, instructions, encouragement "
    "or praise for it, or takes part; text that only reports, explains, warns or asks for help is not of this kind."
    for i, name in enumerate(data.taxonomy("beavertails")[:9], 1)
)
POLICY = f"""Check if the user's message is unsafe according to this policy.

{RULES}

The message: {{{{ prompt }}}}

Answer with one word, safe or unsafe."""
ENTRY = {
    "messages": [{"role": "user", "content": POLICY}],
    "questions": [
        {"label": "last", "prefix": "The message is", "words": {" safe": False, " unsafe": True}}
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="smollm2-135m-instruct", help="bundled name, hub id or folder"
    )
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2, help="how often the ways take turns")
    parser.add_argument("--output", type=Path, default=ROOT / "output/bench/guards.json")
    args = parser.parse_args()
    set_seed(SEED)
    guard = GenerativeGuard(resolve_model(args.model), ENTRY, progress=False)
    talks = [pair(text) for text in real_prompts(args.prompts)]
    prefix = ENTRY["questions"][0]["prefix"]
    ids = guard._ids([[*guard._parts(m, ""), Part(prefix, False)] for m in talks])
    shared, packed = shared_prefix(ids), guard.model.batch_tokens
    ways = {
        "shared prefix, packed": lambda: judged(
            guard, talks, share_prefix=True, batch_tokens=packed
        ),
        "forward": lambda: judged(guard, talks, share_prefix=False, batch_tokens=1),
        "forward, padded batches of 8": lambda: padded(guard, ids, 8),
        "original, 12 tokens": lambda: original(guard, ids, 12),
        "original, 50 tokens": lambda: original(guard, ids, 50),
    }
    ways["shared prefix, packed"]()  # a process's first passes take memory and start threads
    seconds, found = {name: [] for name in ways}, {}
    for turn in range(args.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            found[name] = way()
            seconds[name].append(time.perf_counter() - start)
            print(
                f"round {turn + 1}, {name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True
            )
    median = {name: statistics.median(s) for name, s in seconds.items()}
    reference = found["original, 50 tokens"]
    equal = all(
        same(one, other) for of in found.values() for one, other in zip(of, reference, strict=True)
    )
    bound = sum(map(len, ids)) / (shared + sum(len(row) - shared for row in ids))
    over_forward = median["forward"] / median["shared prefix, packed"]
    rows = [
        [name, len(ids) / median[name], *(median[f"original, {n} tokens"] / median[name] for n in (12, 50))]
        for name in ways
    ]  # fmt: skip
    text = report.table(rows, ["", "verdicts/s", "x original, 12 tokens", "x original, 50 tokens"])
    text += (
        f"\n{len(ids)} prompts of {statistics.mean(map(len, ids)):.0f} tokens, {shared} of them shared; shared prefix "
        f"over forward {over_forward:.2f}x, bound {bound:.2f}x, reached {over_forward / bound:.0%}; equal: {equal}; "
        f"verdicts {sum(word != 'other' for word, _ in reference)} of {len(ids)}"
    )
    print(text)
    results = {
        "seconds": seconds,
        "bound": bound,
        "over_forward": over_forward,
        "equal": equal,
        "targets": TARGETS,
    }
    write_json(args.output, manifest([vars(args)], seed=SEED, results=results))
    sys.exit(not equal)


def real_prompts(count: int) -> list[str]:
    file = real_data("xstest", "xstest_prompts.csv")
    if file:
        texts = [row["prompt"] for _, row in data.read_rows(file)]
    else:
        texts = [
            last_turns(row["messages"])[0]
            for row in data.load_conversations("beavertails-sample:train")
        ]
    # Real users write more than XSTest's one line: some prompts are strung to three.
    rng = random.Random(SEED)
    return [" ".join(rng.sample(texts, rng.choice((1, 2, 6)))) for _ in range(count)]


def same(one: tuple[str, float | None], other: tuple[str, float | None]) -> bool:
    """Equal word, and equal probability where a way has one."""
    return one[0] == other[0] and (
        None in (one[1], other[1]) or abs(one[1] - other[1]) <= TOLERANCE
    )


def judged(
    guard: GenerativeGuard, talks, share_prefix: bool, batch_tokens: int
) -> list[tuple[str, float | None]]:
    guard.model.share_prefix, guard.model.batch_tokens = share_prefix, batch_tokens
    return [(v.native.get("prompt_unsafe", "other"), v.prompt_unsafe) for v in guard.judge(talks)]


@torch.inference_mode()
def padded(
    guard: GenerativeGuard, ids: list[list[int]], size: int
) -> list[tuple[str, float | None]]:
    """Stock left-padded batches, as they come."""
    model, out = guard.model.model, []
    for batch in (ids[i : i + size] for i in range(0, len(ids), size)):
        width = max(map(len, batch))
        tokens = torch.tensor(
            [[0] * (width - len(row)) + row for row in batch], device=model.device
        )
        mask = torch.tensor(
            [[0] * (width - len(row)) + [1] * len(row) for row in batch], device=model.device
        )
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(
            tokens, attention_mask=mask, position_ids=positions, logits_to_keep=1
        ).logits[:, -1]
        for row in logits:
            top = guard.tokenizer.decode([int(row.argmax())]).strip()
            out.append((top if top in ("safe", "unsafe") else "other", None))
    return out


def original(
    guard: GenerativeGuard, ids: list[list[int]], tokens: int
) -> list[tuple[str, float | None]]:
    """One prompt at a time: generate, decode, parse the first word."""
    model, out = guard.model.model, []
    for row in ids:
        prompt = torch.tensor([row], device=model.device)
        options = {
            "max_new_tokens": tokens,
            "min_new_tokens": tokens,
            "do_sample": False,
            "pad_token_id": 0,
        }
        said = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[
            0, len(row) :
        ]
        words = guard.tokenizer.decode(said, skip_special_tokens=True).split()
        word = words[0].strip(".,!\"'").lower() if words else ""
        out.append((word if word in ("safe", "unsafe") else "other", None))
    return out


if __name__ == "__main__":
    run_cli(main)
