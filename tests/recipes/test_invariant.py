"""What is saved, read or served equals what was trained, for every family of models: in memory,
`load_guard`, stock.

Each recipe trains a tiny random model for a step or two in this process. The scores of the model in
memory, taken before anything is written, are compared with those of its folder: read by
`load_guard`, and by stock libraries.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bases import BASES, DECODERS
from conftest import tiny_config
from expguard_rows import authored, prompt_tokenizer, write_rows
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from scripts import module
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    Trainer,
    pipeline,
)

from common.conversation import UserError, last_turns, parts_of
from common.data import load_conversations, taxonomy
from common.templates import encode, render
from guards import load_guard
from guards.card import ClassifierCard, LoraCard, read_card

LABELS = taxonomy("beavertails")
TRAIN, VALIDATION = "beavertails-sample:train", "beavertails-sample:validation"


@pytest.fixture(scope="module")
def rows() -> list[list[dict[str, str]]]:
    """A few conversations that were not trained on, of different lengths."""
    return load_conversations(VALIDATION, max_rows=10)["messages"]


def texts_of(folder: Path, rows) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = read_card(folder).template
    return [
        "".join(part.text for part in render(template, messages, tokenizer)) for messages in rows
    ]


# --- moderation: a classifier, full or LoRA ---------------------------------------------------------------------------

WAYS = {"full": [], "lora": ["--use_peft", "--lora_r", "4"]}
OWN_WAYS = {
    "own": WAYS["lora"],
    "one": [],
    "prompt": ["--judge", "prompt"],
    "response": ["--judge", "response"],
}
OUTPUTS = {"own": ["unsafe", "Fraud"], "one": ["unsafe"], "prompt": ["unsafe"]}
RUNS = [f"{family}-{way}" for family in BASES for way in WAYS]
RUNS += [f"qwen2-{way}" for way in OWN_WAYS]


def own_rows(way: str, path: Path) -> Path:
    """Training rows that are nobody's but the user's."""
    lines = []
    for number, row in enumerate(load_conversations(TRAIN, max_rows=16)):
        prompt, response = last_turns(row["messages"])
        unsafe = row["response_unsafe"]
        line = {"prompt": prompt, "response": response, "response_label": unsafe}
        if way == "prompt":
            line = {"prompt": prompt, "label": unsafe}
        elif way == "response":
            line["categories"] = row["categories"]
        elif way == "own" and unsafe and number % 2:
            line["categories"] = ["Fraud"]
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module", params=RUNS)
def moderation(request, tmp_path_factory, rows):
    """A guard's folder, and the scores of the model in memory, an array of (rows, labels):
    (folder, way, array).
    """
    family, way = request.param.split("-")
    train = module("moderation", "train")
    folder = tmp_path_factory.mktemp(request.param)
    base = BASES[family](folder / "base")
    data, validation = TRAIN, VALIDATION
    if way in OWN_WAYS:
        data = validation = own_rows(way, folder / "rows.jsonl")
    words = [
        "train.py", "--model_name_or_path", base, "--output_dir", folder / "guard", "--max_length", 512,
        "--train_data_name_or_path", data, "--max_train_rows", 16, "--eval_data_name_or_path", validation,
        "--num_train_epochs", 1, "--per_device_train_batch_size", 8, "--learning_rate", 1e-2,
        "--save_strategy", "no", "--eval_strategy", "no", "--disable_tqdm", "true",
        *(WAYS | OWN_WAYS)[way],
    ]  # fmt: skip
    seen = {}
    save = train.save_guard

    def watched(trainer, model_args, data_args, task, **others):
        """The recipe's own saving, after a look at the model that it saves."""
        tokenizer = trainer.processing_class
        judged = [parts_of(messages)[task.judge] for messages in rows]
        texts = [render(task.template, messages, tokenizer) for messages in judged]
        seen["scores"] = probabilities(trainer.model, encode(tokenizer, texts))
        seen["rows"] = judged
        save(trainer, model_args, data_args, task, **others)

    patch = pytest.MonkeyPatch()
    patch.setattr(sys, "argv", [str(word) for word in words])
    patch.setattr(train, "save_guard", watched)
    try:
        train.main()
    finally:
        patch.undo()
    return folder / "guard", way, seen["rows"], seen["scores"]


@torch.inference_mode()
def probabilities(model, sequences) -> np.ndarray:
    """Sigmoids of shape (rows, labels), one text at a time, without padding."""
    model.eval()
    return np.array(
        [model(input_ids=torch.tensor([ids])).logits[0].sigmoid().tolist() for ids in sequences]
    )


def test_moderation_says_what_was_trained(moderation):
    """`load_guard`, the stock pipeline on the rendered text, and messages through the chat
    template.
    """
    folder, way, rows, expected = moderation
    assert np.ptp(expected, axis=0).max() > 0.01, (
        "the rows cannot be told apart: nothing would be seen here"
    )
    guard = load_guard(str(folder), progress=False)
    verdicts = guard.judge(rows)
    judged = [[verdict.categories[name] for name in guard.labels] for verdict in verdicts]
    np.testing.assert_allclose(judged, expected, atol=2e-5)
    # GuardBench calls `moderate`
    label = "prompt_unsafe" if way == "prompt" else "response_unsafe"
    assert guard.judges == (label,)
    assert guard.moderate(rows) == [getattr(verdict, label) for verdict in verdicts]
    np.testing.assert_allclose(guard.moderate(rows), expected.max(1), atol=2e-5)

    options = {"top_k": None, "function_to_apply": "sigmoid", "dtype": torch.float32}
    pipe = pipeline("text-classification", str(folder), **options)
    stock = [
        {one["label"]: one["score"] for one in row}
        for row in pipe(texts_of(folder, rows), batch_size=4)
    ]
    stock = [[row[name] for name in guard.labels] for row in stock]
    np.testing.assert_allclose(stock, expected, atol=2e-5)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    served = [tokenizer.apply_chat_template(messages, return_dict=False) for messages in rows]
    np.testing.assert_allclose(probabilities(model, served), expected, atol=2e-5)


def test_moderation_adapter_is_the_guard(moderation):
    """Stock PEFT puts the adapter on the base, whose checkpoint lacks a pooler and a head, as its
    card says.
    """
    folder, way, rows, expected = moderation
    if way not in ("lora", "own"):
        assert not (folder / "adapter").exists()
        return
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    model = AutoPeftModelForSequenceClassification.from_pretrained(
        folder / "adapter", num_labels=expected.shape[1]
    )
    card = (folder / "adapter/README.md").read_text()
    assert (
        "model.config.pad_token_id = tokenizer.pad_token_id" in card
        and str(folder.parent) not in card
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    encoded = tokenizer(texts_of(folder, rows))["input_ids"]
    np.testing.assert_allclose(probabilities(model, encoded), expected, atol=2e-5)


def test_moderation_card_says_what_it_is(moderation):
    """A category without a training row is no output: 16 rows do not have all fourteen."""
    folder, way, _, _ = moderation
    card = read_card(folder, ClassifierCard)
    named = set()
    for names in load_conversations(TRAIN, max_rows=16)["categories"]:
        named.update(names)
    expected = OUTPUTS.get(way, [name for name in LABELS if name in named])
    assert 1 <= len(expected) < 14
    assert card.labels == expected == list(card.data["train_positive"])
    judged = "prompt_unsafe" if way == "prompt" else "response_unsafe"
    assert card.probe is not None and set(card.probe.scores) == {*expected, judged}
    run = json.loads((folder / "run.json").read_text())
    assert run["validation"]["flagged"]["support"] > 10
    text = (folder / "README.md").read_text()
    assert ("harm categories (BeaverTails" in text) == (way not in OUTPUTS)
    assert f"{len(LABELS)} harm categories" not in text
    assert not (folder / ".partial").exists()
    assert {oct(path.stat().st_mode & 0o777) for path in folder.iterdir() if path.is_file()} == {
        "0o644"
    }


def test_a_finished_guard_is_replaced_by_a_whole_one_or_not_at_all(rows, tmp_path, monkeypatch):
    """Without the flag nothing is trained; with it, weights that are not the trained ones are not
    moved in.
    """
    train, folder = module("moderation", "train"), tmp_path / "guard"
    words = [
        "train.py", "--model_name_or_path", BASES["qwen2"](tmp_path / "base"), "--output_dir", folder,
        "--train_data_name_or_path", TRAIN, "--max_train_rows", 16, "--per_device_train_batch_size", 8,
        "--max_steps", 1, "--save_strategy", "no", "--disable_tqdm", "true",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    train.main()
    (folder / "notes.txt").write_text("mine")
    expected = [
        verdict.categories for verdict in load_guard(str(folder), progress=False).judge(rows)
    ]
    with pytest.raises(
        UserError, match=r"holds guard\.json of an earlier run; pass --overwrite_output_dir true"
    ):
        train.main()

    folder_ = module("moderation", "guard_folder")
    save = folder_.save_model

    def other_weights(model, state_dict, *others):
        save(model, {name: tensor * 0.9 for name, tensor in state_dict.items()}, *others)

    monkeypatch.setattr(sys, "argv", [*sys.argv, "--overwrite_output_dir", "true"])
    monkeypatch.setattr(folder_, "save_model", other_weights)
    with pytest.raises(UserError, match="what was saved is not what was trained"):
        train.main()
    assert [
        verdict.categories for verdict in load_guard(str(folder), progress=False).judge(rows)
    ] == expected
    assert not (folder / ".partial").exists()

    (folder / ".partial").mkdir()  # a kill while the files change places
    (folder / "guard.json").unlink()
    with pytest.raises(UserError, match="not finished: the saving of a guard was interrupted here"):
        load_guard(str(folder))
    monkeypatch.setattr(folder_, "save_model", save)
    train.main()
    assert [verdict.error for verdict in load_guard(str(folder), progress=False).judge(rows)] == [
        None
    ] * len(rows)
    assert (folder / "notes.txt").read_text() == "mine" and not (folder / ".partial").exists()


# --- the other recipes ------------------------------------------------------------------------------------------------


def run(train, monkeypatch, words: list, owner, saving: str, look) -> None:
    """A recipe's train.py in this process, with a look at the trainer before `owner.saving` is
    called.
    """
    save = getattr(owner, saving)

    def watched(*args):
        (trainer,) = [one for one in args if isinstance(one, Trainer)]
        look(trainer)
        return save(*args)

    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    monkeypatch.setattr(owner, saving, watched)
    train.main()


@pytest.mark.parametrize("family", DECODERS)
def test_lora_guard_says_what_was_trained(family, rows, tmp_path, monkeypatch):
    """`load_guard`, and stock PEFT on the rendered text with the head's bias, as the model card has
    it.
    """
    train, inputs, adapter = (module("lora_guard", name) for name in ("train", "inputs", "adapter"))
    seen = {}

    def look(trainer) -> None:
        encoded = inputs.token_ids(rows, trainer.processing_class, 512)
        seen["scores"] = probabilities(trainer.model, encoded)

    modules = ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"]
    words = [
        BASES[family](tmp_path / "base"), tmp_path / "out", "--train-data", TRAIN, "--eval-data", VALIDATION,
        "--max-train-rows", 16, "--per-device-batch-size", 8, "--learning-rate", 1e-2, "--target-modules", *modules,
    ]  # fmt: skip
    run(train, monkeypatch, words, adapter.RunFolder, "finish", look)
    folder, expected = tmp_path / "out/best", seen["scores"]
    assert np.ptp(expected, axis=0).max() > 0.01
    verdicts = load_guard(str(folder), progress=False).judge(rows)
    card = read_card(folder, LoraCard)
    unsafe, *labels = card.labels
    assert unsafe == "unsafe" and set(labels) < set(LABELS)  # of 16 rows not every one has a row
    judged = [
        [verdict.response_unsafe, *(verdict.categories[name] for name in labels)]
        for verdict in verdicts
    ]
    np.testing.assert_allclose(judged, expected, atol=2e-5)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    count = len(card.labels)
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=count).eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    bias = torch.tensor(card.head_bias)
    texts = ["".join(part.text for part in render("lora_guard", messages)) for messages in rows]
    with torch.inference_mode():
        stock = [
            (model(**tokenizer(text, return_tensors="pt")).logits[0] + bias).sigmoid().tolist()
            for text in texts
        ]
    np.testing.assert_allclose(stock, expected, atol=2e-5)
    card = (folder / "README.md").read_text()
    assert "chat template is the chat model's own" in card and str(tmp_path) not in card


@pytest.mark.parametrize("flags", [[], ["--use_peft_lora", "--lora_r", 4]], ids=["full", "lora"])
def test_expguard_says_what_was_trained(flags, tmp_path, monkeypatch):
    """The stock model, and the stock adapter, give the verdicts of the model in memory."""
    train, rows_, model_ = (module("expguard", name) for name in ("train", "rows", "model"))
    monkeypatch.setitem(sys.modules, "arguments", module("expguard", "arguments"))
    base, data = tmp_path / "base", write_rows(tmp_path / "rows.jsonl", authored(24))
    tokenizer = prompt_tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    encoder = rows_.Encoder(tokenizer, 400)
    sequences = encoder.compared(rows_.read_rows(str(data), ""))
    seen = {}

    def look(trainer) -> None:
        seen["scores"] = model_.verdict_scores(trainer.model.eval(), sequences, encoder.words)

    words = [
        "--model_name_or_path", base, "--dataset_name", data, "--output_dir", tmp_path / "out", "--max_seq_len", 400,
        "--learning_rate", 3e-3, "--max_steps", 4, "--disable_checkpointing", "--disable_tqdm", "true", *flags,
    ]  # fmt: skip
    run(train, monkeypatch, words, train, "save_guard", look)
    stock = [AutoModelForCausalLM.from_pretrained(tmp_path / "out")]
    if flags:
        stock.append(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out/adapter"))
    for model in stock:
        said = model_.verdict_scores(model.eval(), sequences, encoder.words)
        for expected, verdicts in zip(seen["scores"], said, strict=True):
            assert verdicts == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("family", [name for name in DECODERS if name != "gpt2"])
def test_cross_task_defense_says_what_was_trained(family, tmp_path, monkeypatch):
    """The adapter on the base, as stock PEFT loads it, gives the logits of the model in memory."""
    train = module("cross_task_defense", "train")
    # a checkpoint holds the arguments, pickled by that name
    monkeypatch.setitem(sys.modules, "arguments", module("cross_task_defense", "arguments"))
    ids, seen = torch.arange(40, 70)[None], {}
    data = tmp_path / "rows.json"
    answers = [("Name a colour.", "Blue."), ("Say hello to them.", "Hello!")]
    data.write_text(
        json.dumps([{"instruction": one, "input": "", "output": other} for one, other in answers])
    )
    save = train.full_state_dict

    def watched(trainer):
        with torch.inference_mode():
            seen["logits"] = trainer.model.eval()(ids).logits
        return save(trainer)

    monkeypatch.setattr(train, "full_state_dict", watched)
    train.train(
        base_model=str(BASES[family](tmp_path / "base")), data_path=str(data), output_dir=str(tmp_path / "out"),
        batch_size=2, micro_batch_size=2, num_epochs=3, learning_rate=1e-2, cutoff_len=256, warmup_steps=0,
    )  # fmt: skip
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    untrained = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, seen["logits"], atol=1e-5, rtol=0)
        assert not torch.allclose(untrained(ids).logits, seen["logits"], atol=1e-4)
    for folder in ("out", "out/checkpoint-0"):
        card = tmp_path / folder / "README.md"
        assert not card.exists() or str(tmp_path) not in card.read_text()
    shutil.rmtree(tmp_path / "out/checkpoint-3")
    with pytest.raises(UserError, match=r"holds adapter_config\.json of an earlier run"):
        train.train(
            base_model="nowhere",
            data_path=str(data),
            output_dir=str(tmp_path / "out"),
            batch_size=4,
        )
