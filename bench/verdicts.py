"""Speed of verdicts against the original way: same model, prompts and machine, alternated in one
run.

    cd bench && python verdicts.py

A guard with a policy of about 500 tokens judges prompts of real lengths: XSTest's where
GUARDRAIL_RECIPES_DATA names a folder with xstest/ in it, else those of the bundled sample.
Original: one prompt at a time, generate, parse the text.
Then: one forward pass a prompt; what is shared run once, and the rest in batches
(`GenerativeGuard.judge`). The original is timed for a guard that ends its answer after 12 tokens,
and for one that writes 50. Outputs are compared; the exit code is 1 if a verdict differs or a
probability differs by more than 1e-4. The bound is the ratio of tokens that each way runs.
"""

import random
import statistics
import sys

import torch
from side_by_side import (
    SEED,
    TOLERANCE,
    bench_parser,
    medians,
    real_data,
    take_turns,
    write_results,
)
from transformers import set_seed

from common import data, report
from common.bundled import resolve_model
from common.conversation import last_turns, pair
from common.prefix import shared_prefix
from common.run import run_cli
from guards.generative import GenerativeGuard

TARGETS = {"forward": 1.5, "shared prefix": 6.0, "share of the bound": 0.40}
RULE = (
    "S{number}: {name}. Text of this kind gives advice, instructions, encouragement or praise for "
    "it, or takes part; text that only reports, explains, warns or asks for help is not of this "
    "kind."
)
POLICY = """Check if the user's message is unsafe according to this policy.

{rules}

The message: {{{{ prompt }}}}

Answer with one word, safe or unsafe."""
WORDS = ("safe", "unsafe")
Said = tuple[str, float | None]  # the word, and the probability of unsafe where a way has one


def main() -> None:
    parser = bench_parser(__doc__, "verdicts", rounds=2)
    parser.add_argument("--prompts", type=int, default=32)
    args = parser.parse_args()
    set_seed(SEED)
    path = resolve_model(args.model)
    guard = GenerativeGuard(path, guard_entry(), progress=False)
    talks = [pair(text) for text in real_prompts(args.prompts)]
    ids = guard.prompt_ids(talks)

    def one_by_one() -> list[Said]:
        said = []
        for talk in talks:
            said += judged(guard, [talk])
        return said

    ways = {
        "shared prefix": lambda: judged(guard, talks),
        "forward": one_by_one,
        "original, 12 tokens": lambda: original(guard, ids, 12),
        "original, 50 tokens": lambda: original(guard, ids, 50),
    }
    ways["shared prefix"]()  # a process's first passes take memory and start threads
    seconds, found = take_turns(ways, args.rounds)
    median = medians(seconds)
    reference = found["original, 50 tokens"]
    checks = [same(said, reference) for said in found.values()]
    equal = all(checks)

    rows = []
    for name in ways:
        speed = len(ids) / median[name]
        over_12 = median["original, 12 tokens"] / median[name]
        over_50 = median["original, 50 tokens"] / median[name]
        rows.append([name, speed, over_12, over_50])
    header = ["", "verdicts/s", "x original, 12 tokens", "x original, 50 tokens"]
    print(report.table(rows, header))
    shared = shared_prefix(ids)
    tokens = sum(len(row) for row in ids)
    own = tokens - shared * len(ids)
    bound = tokens / (shared + own)
    over_forward = median["forward"] / median["shared prefix"]
    verdicts = sum(word in WORDS for word, _ in reference)
    print(
        f"{len(ids)} prompts of {statistics.mean(map(len, ids)):.0f} tokens, {shared} of them "
        f"shared; shared prefix over forward {over_forward:.2f}x, bound {bound:.2f}x, reached "
        f"{over_forward / bound:.0%}; equal: {equal}; verdicts {verdicts} of {len(ids)}"
    )
    results = {
        "seconds": seconds,
        "bound": bound,
        "over_forward": over_forward,
        "equal": equal,
        "targets": TARGETS,
    }
    write_results(args, results)
    sys.exit(not equal)


def guard_entry() -> dict:
    """A guard as zoo.yaml describes one, with nine rules of about 50 tokens."""
    rules = []
    for number, name in enumerate(data.taxonomy("beavertails")[:9], 1):
        plain = name.replace("_", " ").replace(",", ", ")
        rules.append(RULE.format(number=number, name=plain))
    policy = POLICY.format(rules="\n".join(rules))
    question = {
        "label": "last",
        "prefix": "The message is",
        "words": {" safe": False, " unsafe": True},
    }
    return {
        "messages": [{"role": "user", "content": policy}],
        "questions": [question],
    }


def real_prompts(count: int) -> list[str]:
    file = real_data("xstest", "xstest_prompts.csv")
    if file:
        texts = [row["prompt"] for _, row in data.read_rows(file)]
    else:
        rows = data.load_conversations("beavertails-sample:train")
        turns = [last_turns(row["messages"]) for row in rows]
        texts = [question for question, _ in turns]
    # Real users write more than XSTest's one line: some prompts are strung to three.
    rng = random.Random(SEED)
    prompts = []
    for _ in range(count):
        size = rng.choice((1, 2, 6))
        some = rng.sample(texts, size)
        prompts.append(" ".join(some))
    return prompts


def same(said: list[Said], reference: list[Said]) -> bool:
    """Equal words, and equal probabilities where both ways have one."""
    for (word, probability), (other_word, other) in zip(said, reference, strict=True):
        if word != other_word:
            return False
        if probability is None or other is None:
            continue
        if abs(probability - other) > TOLERANCE:
            return False
    return True


# --- The ways -----------------------------------------------------------------------------------


def judged(guard: GenerativeGuard, talks) -> list[Said]:
    said = []
    for verdict in guard.judge(talks):
        word = verdict.native.get("prompt_unsafe", "other")
        said.append((word, verdict.prompt_unsafe))
    return said


@torch.inference_mode()
def original(
    guard: GenerativeGuard,
    ids: list[list[int]],
    tokens: int,
) -> list[Said]:
    """One prompt at a time: generate, decode, parse the first word."""
    model = guard.model.model
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    said = []
    for row in ids:
        prompt = torch.tensor([row], device=model.device)
        mask = torch.ones_like(prompt)
        written = model.generate(
            prompt,
            attention_mask=mask,
            do_sample=False,
            pad_token_id=0,
            **length,
        )
        answer = written[0, len(row) :]
        text = guard.tokenizer.decode(answer, skip_special_tokens=True)
        said.append((first_word(text), None))
    return said


def first_word(text: str) -> str:
    """safe or unsafe, or "other" where a text begins with neither."""
    words = text.split()
    word = words[0].strip(".,!\"'").lower() if words else ""
    return word if word in WORDS else "other"


if __name__ == "__main__":
    run_cli(main)
