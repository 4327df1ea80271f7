"""What is saved, read or served equals what was trained, for every family of models: in memory, `load_guard`, stock.

Each recipe trains a tiny random model for a step or two in this process. The scores of the model in memory, taken
before anything is written, are compared with those of its folder: read by `load_guard`, and by stock libraries.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bases import BASES
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification
from scripts import EXAMPLES, module
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from common.data import load_conversations, taxonomy
from common.templates import render
from guards import load_guard
from guards.card import ClassifierCard, read_card

LABELS = taxonomy("beavertails")
TRAIN, VALIDATION = "beavertails-sample:train", "beavertails-sample:validation"


@pytest.fixture(scope="module")
def rows() -> list[list[dict[str, str]]]:
    """A few conversations that were not trained on, of different lengths."""
    return load_conversations(VALIDATION, max_rows=10)["messages"]


def texts_of(folder: Path, rows) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return ["".join(part.text for part in render("beavertails", messages, tokenizer)) for messages in rows]


# --- moderation: a classifier, full or LoRA ---------------------------------------------------------------------------

WAYS = {"full": [], "lora": ["--use_peft", "--lora_r", "4"]}


@pytest.fixture(scope="module", params=[f"{family}-{way}" for family in BASES for way in WAYS])
def moderation(request, tmp_path_factory, rows):
    """A guard's folder, and the scores of the model in memory: (folder, way, array of (rows, 14))."""
    family, way = request.param.split("-")
    train = module("moderation", "train")
    folder = tmp_path_factory.mktemp(request.param)
    base = BASES[family](folder / "base")
    words = [
        "train.py", "--model_name_or_path", base, "--output_dir", folder / "guard", "--max_length", 512,
        "--train_data_name_or_path", TRAIN, "--max_train_rows", 16, "--eval_data_name_or_path", VALIDATION,
        "--num_train_epochs", 1, "--per_device_train_batch_size", 8, "--learning_rate", 1e-2,
        "--save_strategy", "no", "--eval_strategy", "no", "--disable_tqdm", "true", *WAYS[way],
    ]  # fmt: skip
    seen = {}
    save = train.save_guard

    def watched(trainer, model_args, *others):
        """The recipe's own saving, after a look at the model that it saves."""
        unlabelled = [{"messages": messages, "categories": []} for messages in rows]
        encoded = train.tokenize_rows(Dataset.from_list(unlabelled), trainer.processing_class, 512)["input_ids"]
        seen["scores"] = probabilities(trainer.model, encoded)
        save(trainer, model_args, *others)

    patch = pytest.MonkeyPatch()
    patch.setattr(sys, "argv", [str(word) for word in words])
    patch.setattr(train, "save_guard", watched)
    try:
        train.main()
    finally:
        patch.undo()
    return folder / "guard", way, seen["scores"]


@torch.inference_mode()
def probabilities(model, sequences) -> np.ndarray:
    """Sigmoids of shape (rows, labels), one text at a time, without padding."""
    model.eval()
    return np.array([model(input_ids=torch.tensor([ids])).logits[0].sigmoid().tolist() for ids in sequences])


def test_moderation_says_what_was_trained(moderation, rows):
    """`load_guard`, the stock pipeline on the rendered text, and messages through the chat template."""
    folder, _, expected = moderation
    assert np.ptp(expected, axis=0).max() > 0.01, "the rows cannot be told apart: nothing would be seen here"
    judged = [[v.categories[name] for name in LABELS] for v in load_guard(str(folder), progress=False).judge(rows)]
    np.testing.assert_allclose(judged, expected, atol=2e-5)

    options = {"top_k": None, "function_to_apply": "sigmoid", "dtype": torch.float32}
    pipe = pipeline("text-classification", str(folder), **options)
    stock = [{one["label"]: one["score"] for one in row} for row in pipe(texts_of(folder, rows), batch_size=4)]
    np.testing.assert_allclose([[row[name] for name in LABELS] for row in stock], expected, atol=2e-5)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    served = [tokenizer.apply_chat_template(messages, return_dict=False) for messages in rows]
    np.testing.assert_allclose(probabilities(model, served), expected, atol=2e-5)


def test_moderation_adapter_is_the_guard(moderation, rows):
    """Stock PEFT puts the adapter on the base, whose checkpoint lacks a pooler and a head, as its card says."""
    folder, way, expected = moderation
    if way == "full":
        assert not (folder / "adapter").exists()
        return
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder / "adapter", num_labels=14)
    card = (folder / "adapter/README.md").read_text()
    assert "model.config.pad_token_id = tokenizer.pad_token_id" in card and str(folder.parent) not in card
    model.config.pad_token_id = tokenizer.pad_token_id
    encoded = tokenizer(texts_of(folder, rows))["input_ids"]
    np.testing.assert_allclose(probabilities(model, encoded), expected, atol=2e-5)


def test_moderation_card_says_what_it_is(moderation):
    folder, _, _ = moderation
    card = read_card(folder, ClassifierCard)
    assert card.probe is not None and set(card.probe.scores) == {*LABELS, "response_unsafe"}
    run = json.loads((folder / "run.json").read_text())
    assert run["validation"]["flagged"]["support"] > 10
    assert not (folder / ".partial").exists()
    assert {oct(path.stat().st_mode & 0o777) for path in folder.iterdir() if path.is_file()} == {"0o644"}


def test_there_are_recipes():
    assert {"moderation", "lora_guard", "expguard"} <= {folder.name for folder in EXAMPLES.iterdir()}
