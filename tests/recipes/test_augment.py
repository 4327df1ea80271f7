"""--augment of the recipes that train classifiers: copies of the training rows alone, counted."""

import sys

import pytest
from bases import BASES
from checks import read_json, user_error
from scripts import module

TRAIN = "beavertails-sample:train"
FLAGS = {  # what the two recipes call the same
    "moderation": [
        "--model_name_or_path", "BASE", "--output_dir", "OUT", "--train_data_name_or_path", TRAIN,
        "--max_train_rows", 16, "--eval_split_ratio", 0.3, "--per_device_train_batch_size", 8,
        "--max_steps", 1, "--save_strategy", "no", "--eval_strategy", "no", "--disable_tqdm", "true",
    ],
    "lora_guard": [
        "BASE", "OUT", "--train-data", TRAIN, "--eval-data", "beavertails-sample:validation",
        "--max-train-rows", 16, "--per-device-batch-size", 8, "--target-modules", "q_proj",
    ],
}  # fmt: skip
each_recipe = pytest.mark.parametrize("recipe", FLAGS)


def train(recipe, monkeypatch, base, out, *more) -> None:
    given = {"BASE": base, "OUT": out}
    words = ["train.py", *FLAGS[recipe], *more]
    monkeypatch.setattr(sys, "argv", [str(given.get(word, word)) for word in words])
    module(recipe, "train").main()


@each_recipe
def test_copies_are_trained_on_and_counted(recipe, tmp_path, monkeypatch):
    base, out = BASES["qwen2"](tmp_path / "base"), tmp_path / "out"
    train(recipe, monkeypatch, base, out, "--augment", "leetspeak", "base64")
    run = read_json(out / "run.json")
    if recipe == "moderation":
        data = run["data"]
        total = data["train_rows"]
    else:
        data = read_json(out / "best/guard.json")["data"]
        total = data["pair"]["rows"]
        assert run["data"]["augmented"] == data["augmented"]
    counts = data["augmented"]["leetspeak"]
    assert data["augmented"]["base64"] == counts
    assert 0 < counts["unsafe"] < counts["rows"] <= 16
    assert total == 3 * counts["rows"]


@each_recipe
def test_an_unknown_name_is_refused_before_anything_is_loaded(recipe, tmp_path, monkeypatch):
    with user_error(r"^--augment rot13: expected some of homoglyph"):
        train(recipe, monkeypatch, tmp_path / "none", tmp_path / "out", "--augment", "rot13")
