"""What the benches share: flags, ways that take turns on the same rows, texts of real lengths."""

import argparse
import importlib
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from common.conversation import Messages, last_turns, pair
from common.data import read_rows
from common.run import expand_home, manifest, write_json

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-4
SEED = 42


# --- The command line ---------------------------------------------------------------------------


def bench_parser(description: str, name: str, rounds: int) -> argparse.ArgumentParser:
    """A parser with the flags that all benches have; `~` is the home folder however it is given.

    Args:
        name: of the bench, and of the file of its results.
        rounds: how often the ways take turns, if the user does not say.
    """
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=kind)
    parser.add_argument(
        "--model",
        type=expand_home,
        default="smollm2-135m-instruct",
        help="bundled name, hub id or folder",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=rounds,
        help="how often the ways take turns",
    )
    parser.add_argument(
        "--output",
        type=home_path,
        default=ROOT / f"output/bench/{name}.json",
        help="the file of the results",
    )
    return parser


def home_path(text: str) -> Path:
    return Path(expand_home(text))


def write_results(args: argparse.Namespace, results: Mapping[str, Any]) -> None:
    """Write what was measured, with what it was measured on, to `--output`."""
    written = manifest([vars(args)], seed=SEED, results=results)
    write_json(args.output, written)


# --- Timing -------------------------------------------------------------------------------------


def take_turns(
    ways: Mapping[str, Callable[[], Any]],
    rounds: int,
    what: str = "",
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Run all ways, one after the other, `rounds` times, so that a slow minute slows all of them.

    A way ends with its result on the CPU, so that an accelerator has finished.

    Args:
        what: what the lines about progress begin with.

    Returns:
        The seconds of each way, a number a round, and what it returned in the last round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    returned = {}
    for turn in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            returned[name] = way()
            took = time.perf_counter() - start
            seconds[name].append(took)
            line = f"{what}round {turn + 1}, {name}: {took:.2f} s"
            print(line, file=sys.stderr, flush=True)
    return seconds, returned


def batches_of(order: list[int], size: int) -> list[list[int]]:
    """Whole batches of so many rows; what is left over is in none."""
    batches = []
    for start in range(0, len(order) - size + 1, size):
        batches.append(order[start : start + size])
    return batches


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    found = {}
    for name, rounds in seconds.items():
        found[name] = statistics.median(rounds)
    return found


def compare(
    model,
    ways: dict[str, Callable],
    rows: int,
    rounds: int,
) -> tuple[dict[str, Any], list]:
    """Run the ways in turn (ours first, the paper's last) and count the tokens that they process.

    Returns:
        Speed and share of useful tokens of each way, and what each way returned.
    """
    masks: list[torch.Tensor] = []
    share = {}

    def counted(name: str, way: Callable) -> Callable:
        def run() -> Any:
            masks.clear()
            result = way()
            useful = processed = 0
            for mask in masks:
                useful += mask.sum().item()
                processed += mask.numel()
            share[name] = useful / processed
            return result

        return run

    def keep_mask(module, args, kwargs) -> None:
        masks.append(kwargs["attention_mask"])

    hook = model.register_forward_pre_hook(keep_mask, with_kwargs=True)
    counting = {}
    for name, way in ways.items():
        counting[name] = counted(name, way)
    seconds, returned = take_turns(counting, rounds)
    hook.remove()
    median = medians(seconds)
    ours, *_, papers = ways
    found = {}
    for name in ways:
        found[name] = {
            "rows_per_s_best": rows / min(seconds[name]),
            "rows_per_s_median": rows / median[name],
            "useful_token_share": share[name],
            "ratio": median[papers] / median[name],
            "seconds": seconds[name],
        }
    result = {
        "ways": found,
        "ratio": found[ours]["ratio"],
    }
    return result, list(returned.values())


def equality(a: torch.Tensor, b: torch.Tensor) -> dict[str, Any]:
    """How far two results lie apart, relative to the second where that is above 1."""
    apart = (a - b).abs()
    size = b.abs().clamp(min=1)
    difference = (apart / size).max().item()
    return {"difference": difference, "equal": difference <= TOLERANCE}


# --- What is compared ---------------------------------------------------------------------------


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


def real_data(*parts: str) -> Path | None:
    """A file or folder of the real data that GUARDRAIL_RECIPES_DATA names, if it is there."""
    folder = os.environ.get("GUARDRAIL_RECIPES_DATA")
    if not folder:
        return None
    path = Path(folder, *parts)
    return path if path.exists() else None


def real_length_pairs(train, count: int) -> dict[str, list[Messages]]:
    """Pairs by the name of their source: sample sentences strung to real lengths, and XSTest where
    it is at hand.
    """
    rng = random.Random(SEED)
    turns = [last_turns(row["messages"]) for row in train]
    questions = [question for question, _ in turns]
    answers = [answer for _, answer in turns]
    shuffled = rng.sample(answers, len(answers))
    words = " ".join(shuffled).split()
    lengths = log_normal_lengths(count)
    starts = [rng.randrange(len(words) - 300) for _ in lengths]
    lengths = rng.sample(lengths, count)
    built = []
    for start, length in zip(starts, lengths, strict=True):
        answer = words[start : start + length]
        built.append(" ".join(answer))
    strung = []
    for answer in built:
        question = rng.choice(questions)
        strung.append(pair(question, answer))
    pairs = {"log-normal lengths": strung}
    real = xstest_pairs()
    if real:
        some = min(count, len(real))
        pairs["XSTest answers"] = rng.sample(real, some)
    return pairs


def log_normal_lengths(count: int) -> list[int]:
    """Median 60 words; one answer in 270 reaches 300, and there the tail is cut off."""
    normal = statistics.NormalDist(math.log(60), 0.6)
    lengths = []
    for number in range(count):
        share = (number + 0.5) / count
        words = math.exp(normal.inv_cdf(share))
        lengths.append(min(300, round(words)))
    return lengths


def xstest_pairs() -> list[Messages]:
    """XSTest's answers. They were cut off at 256 tokens when they were generated: many are as long
    as the longest.
    """
    folder = real_data("xstest")
    if folder is None:
        return []
    pairs = []
    for file in sorted(folder.glob("completions_*.csv")):
        for _, row in read_rows(file):
            answer = row["completion"] or ""
            if answer.strip():
                pairs.append(pair(row["prompt"], answer))
    return pairs
