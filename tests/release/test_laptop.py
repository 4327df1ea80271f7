"""The laptop config of examples/moderation on a tenth of real rows, and the files that
bench/real_data.py makes of them.

Where GUARDRAIL_RECIPES_DATA names a folder with the sets that bench/real_data.py reads.
"""

import json
import sys
from pathlib import Path

import pytest
from checks import read_json
from scripts import EXAMPLES, launch, real_data, run

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


def words(row: dict) -> str:
    return " ".join(row["prompt"].lower().split())


@pytest.mark.parametrize("sets", [("beavertails", "saferlhf"), ("toxicchat", "other_prompts")])
def test_no_prompt_is_on_both_sides_of_a_split(files, sets):
    prompts = {}
    for part in ("train", "validation", "test"):
        prompts[part] = {
            words(row) for name in sets for row in rows(files / f"{name}_{part}.jsonl")
        }
    assert all(prompts.values())
    assert not prompts["train"] & prompts["test"]
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["validation"] & prompts["test"]


def test_what_is_only_judged_was_never_trained_on(files):
    trained = {words(row) for path in files.glob("*_train.jsonl") for row in rows(path)}
    for name in ("diasafety", "do_not_answer", "wildguardtest", "xstest_prompts"):
        judged = rows(files / f"{name}.jsonl")
        assert judged
        assert not trained & {words(row) for row in judged}


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
