"""What the benches share: ways that take turns on the same rows, and texts of real lengths."""

import importlib
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from common.conversation import Messages, last_turns, pair
from common.data import read_rows

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE, SEED = 1e-4, 42


def compare(
    model, ways: dict[str, Callable], rows: int, rounds: int
) -> tuple[dict[str, Any], list]:
    """Run the ways in turn (ours first, the paper's last): what was measured, and what each way
    returned.
    """
    masks: list[torch.Tensor] = []  # tokens are counted where they are processed
    hook = model.register_forward_pre_hook(
        lambda _, a, kw: masks.append(kw["attention_mask"]), with_kwargs=True
    )
    seconds, share, returned = {name: [] for name in ways}, {}, {}
    for turn in range(rounds):
        for name, way in ways.items():
            masks.clear()
            start = time.perf_counter()
            # ends with its result on the CPU, so that an accelerator has finished
            returned[name] = way()
            seconds[name].append(time.perf_counter() - start)
            share[name] = sum(mask.sum().item() for mask in masks) / sum(
                mask.numel() for mask in masks
            )
            print(
                f"round {turn + 1}, {name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True
            )
    hook.remove()
    keys = ("rows_per_s_best", "rows_per_s_median", "useful_token_share", "ratio", "seconds")
    paper = statistics.median(seconds[name])
    for name, s in seconds.items():
        median = statistics.median(s)
        seconds[name] = dict(
            zip(keys, (rows / min(s), rows / median, share[name], paper / median, s), strict=True)
        )
    return {"ways": seconds, "ratio": seconds[next(iter(ways))]["ratio"]}, list(returned.values())


def recipe_modules(recipe: str, *names: str) -> list[ModuleType]:
    """Modules of a recipe. Its folder holds an evaluate.py and stays on sys.path only for their
    import.
    """
    folder = str(ROOT / "examples" / recipe)
    sys.path.insert(0, folder)
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(folder)


def equality(a: torch.Tensor, b: torch.Tensor) -> dict[str, Any]:
    difference = ((a - b).abs() / b.abs().clamp(min=1)).max().item()
    return {"difference": difference, "equal": difference <= TOLERANCE}


def real_data(*parts: str) -> Path | None:
    """A file or folder of real data in the folder that GUARDRAIL_RECIPES_DATA names, if it is
    there.
    """
    folder = os.environ.get("GUARDRAIL_RECIPES_DATA")
    path = Path(folder, *parts) if folder else None
    return path if path and path.exists() else None


def real_length_pairs(train, count: int) -> dict[str, list[Messages]]:
    """Pairs by the name of their source: sample sentences strung to real lengths, and XSTest where
    it is at hand.
    """
    rng, normal = random.Random(SEED), statistics.NormalDist(math.log(60), 0.6)
    questions, answers = zip(*(last_turns(row["messages"]) for row in train), strict=True)
    words = " ".join(rng.sample(answers, len(answers))).split()
    # Log-normal: median 60 words; one answer in 270 reaches 300, and there the tail is cut off.
    lengths = [min(300, round(math.exp(normal.inv_cdf((i + 0.5) / count)))) for i in range(count)]
    starts = [rng.randrange(len(words) - 300) for _ in lengths]
    built = [
        " ".join(words[i : i + n]) for i, n in zip(starts, rng.sample(lengths, count), strict=True)
    ]
    pairs = {"log-normal lengths": [pair(rng.choice(questions), answer) for answer in built]}
    # XSTest's answers were cut off at 256 tokens when they were generated: many are as long as the
    # longest.
    folder = real_data("xstest")
    files = sorted(folder.glob("completions_*.csv")) if folder else []
    rows = [row for file in files for _, row in read_rows(file)]
    rows = [
        pair(row["prompt"], row["completion"]) for row in rows if (row["completion"] or "").strip()
    ]
    return pairs | ({"XSTest answers": rng.sample(rows, min(count, len(rows)))} if rows else {})
