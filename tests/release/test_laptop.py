"""The laptop config of examples/moderation on a tenth of real rows, and the files that
bench/real_data.py makes of them.

Where GUARDRAIL_RECIPES_DATA names a folder with the sets that bench/real_data.py reads.
"""

import json
import sys
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import pytest
from checks import read_json
from scripts import EXAMPLES, launch, real_data, run

from common.data.repeats import near_copies_between

pytestmark = pytest.mark.slow
BENCH = EXAMPLES.parent / "bench"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The real rows, split."""
    real_data("beavertails_30k_test_dev70")
    folder = tmp_path_factory.mktemp("real")
    done = run([sys.executable, "real_data.py", "--output", str(folder)], BENCH)
    assert done.returncode == 0, done.stderr
    return folder


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def prompts(paths: Iterable[Path]) -> list[str]:
    return [row["prompt"] for path in paths for row in rows(path)]


def check_apart(some: list[str], others: list[str]) -> None:
    """No prompt stands on both sides, nor one that is nearly the same."""
    assert some and others
    copies, _ = near_copies_between(some, others)
    shared = [prompt for prompt, is_copy in zip(some, copies, strict=True) if is_copy]
    assert not shared, shared[:3]


KINDS = [("beavertails", "saferlhf"), ("toxicchat", "other_prompts"), ("domain",)]
PARTS = ("train", "validation", "test")


@pytest.mark.parametrize("sets", KINDS)
@pytest.mark.parametrize(("part", "other"), combinations(PARTS, 2))
def test_no_prompt_is_on_both_sides_of_a_split(files, sets, part, other):
    check_apart(
        prompts(files / f"{name}_{part}.jsonl" for name in sets),
        prompts(files / f"{name}_{other}.jsonl" for name in sets),
    )


def test_what_is_only_judged_was_never_trained_on(files):
    judged = [path for path in files.iterdir() if path.stem.rpartition("_")[2] not in PARTS]
    assert len(judged) == 8
    check_apart(prompts(files.glob("*_train.jsonl")), prompts(judged))


def test_a_tenth_of_the_laptop_config_learns(files, tmp_path):
    """Of 441 pairs; the figures of all 4,410 (4,212 without repeats) are in the ledger."""
    guard = tmp_path / "guard"
    flags = ["--config", "configs/laptop.yaml", "--eval_split_ratio", "null"]
    flags += ["--train_data_name_or_path", files / "saferlhf_train.jsonl[:304]"]
    flags += [files / "beavertails_train.jsonl[:137]"]
    flags += ["--eval_data_name_or_path", files / "beavertails_validation.jsonl"]
    launch("moderation", "train.py", *flags, "--output_dir", guard)
    flags = ["--eval_dataset", files / "beavertails_test.jsonl", "--model_path", guard]
    launch("moderation", "evaluate.py", *flags, "--output_dir", tmp_path / "evaluation")
    results = read_json(tmp_path / "evaluation/results.json")
    found = results["flagged"]["guard"]
    assert found["auroc_interval"][0] > 0.6, found  # chance is 0.5
