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
from bases import BASES, DECODERS, ENCODERS
from checks import read_json, user_error, write_rows
from conftest import tiny_config
from expguard_rows import authored, prompt_tokenizer
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

from common.conversation import last_turns, parts_of
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
    """Conversations as a guard's prompt template renders them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = read_card(folder).template
    texts = []
    for messages in rows:
        parts = render(template, messages, tokenizer)
        texts.append("".join(part.text for part in parts))
    return texts


@torch.inference_mode()
def probabilities(model, sequences, bias=0.0) -> np.ndarray:
    """Sigmoids of shape (rows, labels), one text at a time, without padding."""
    model.eval()
    found = []
    for ids in sequences:
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        found.append((logits + torch.tensor(bias)).sigmoid().tolist())
    return np.array(found)


def close(found, expected) -> None:
    np.testing.assert_allclose(found, expected, atol=2e-5)


def judged(folder: Path, rows) -> list:
    return load_guard(str(folder), progress=False).judge(rows)


def run(train, words: list, owner, saving: str, look) -> None:
    """A recipe's train.py in this process; `look` sees what it hands to `owner.saving`."""
    save = getattr(owner, saving)

    def watched(*args, **options):
        look(*args)
        return save(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, words)])
        patch.setattr(owner, saving, watched)
        train.main()


# --- moderation: a classifier, full or LoRA ---------------------------------------------------------------------------

WAYS = {"full": [], "lora": ["--use_peft", "--lora_r", "4"]}
OWN_WAYS = {
    "own": WAYS["lora"],
    "one": [],
    "prompt": ["--judge", "prompt"],
    "response": ["--judge", "response"],
}
OUTPUTS = {"own": ["unsafe", "Fraud"], "one": ["unsafe"], "prompt": ["unsafe"]}
# Adapters are merged in every family in test_saving.py; these differ in what a checkpoint lacks.
WITH_ADAPTERS = [*ENCODERS, "gpt2", "qwen2"]
RUNS = [f"{family}-full" for family in BASES]
RUNS += [f"{family}-lora" for family in WITH_ADAPTERS]
RUNS += [f"qwen2-{way}" for way in OWN_WAYS]


def own_rows(way: str, path: Path) -> Path:
    """Training rows that are nobody's but the user's."""
    rows = []
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
        rows.append(line)
    return write_rows(path, rows)


def moderation_words(base: Path, folder: Path, data, *more) -> list:
    return [
        "--model_name_or_path", base, "--output_dir", folder, "--max_length", 512,
        "--train_data_name_or_path", data, "--max_train_rows", 16,
        "--per_device_train_batch_size", 8, "--learning_rate", 1e-2,
        "--save_strategy", "no", "--disable_tqdm", "true", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module", params=RUNS)
def moderation(request, tmp_path_factory, rows):
    """Folder, how it was trained, rows, and the scores (rows, labels) of the model in memory."""
    family, way = request.param.split("-")
    train = module("moderation", "train")
    folder = tmp_path_factory.mktemp(request.param)
    base = BASES[family](folder / "base")
    data = TRAIN
    validation = VALIDATION
    if way in OWN_WAYS:
        data = validation = own_rows(way, folder / "rows.jsonl")
    flags = ["--eval_data_name_or_path", validation, "--eval_strategy", "no"]
    flags += ["--num_train_epochs", 1, *(WAYS | OWN_WAYS)[way]]
    seen = {}

    def look(trainer, model_args, data_args, task, *_):
        tokenizer = trainer.processing_class
        seen["rows"] = [parts_of(messages)[task.judge] for messages in rows]
        texts = [render(task.template, messages, tokenizer) for messages in seen["rows"]]
        seen["scores"] = probabilities(trainer.model, encode(tokenizer, texts))

    words = moderation_words(base, folder / "guard", data, *flags)
    run(train, words, train, "save_guard", look)
    return folder / "guard", way, seen["rows"], seen["scores"]


def test_moderation_says_what_was_trained(moderation):
    """`load_guard`, the stock pipeline on rendered text, and messages by the chat template."""
    folder, way, rows, expected = moderation
    assert np.ptp(expected, axis=0).max() > 0.01, "all rows alike: a wrong guard passes"
    guard = load_guard(str(folder), progress=False)
    verdicts = guard.judge(rows)
    close([[verdict.categories[name] for name in guard.labels] for verdict in verdicts], expected)
    # GuardBench calls `moderate`
    label = "prompt_unsafe" if way == "prompt" else "response_unsafe"
    assert guard.judges == (label,)
    assert guard.moderate(rows) == [getattr(verdict, label) for verdict in verdicts]
    close(guard.moderate(rows), expected.max(1))

    options = {"top_k": None, "function_to_apply": "sigmoid", "dtype": torch.float32}
    pipe = pipeline("text-classification", str(folder), **options)
    stock = []
    for said in pipe(texts_of(folder, rows), batch_size=4):
        scores = {one["label"]: one["score"] for one in said}
        stock.append([scores[name] for name in guard.labels])
    close(stock, expected)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    served = [tokenizer.apply_chat_template(messages, return_dict=False) for messages in rows]
    close(probabilities(model, served), expected)


def test_moderation_adapter_is_the_guard(moderation):
    """Stock PEFT puts it on a base whose checkpoint lacks a pooler and a head."""
    folder, way, rows, expected = moderation
    adapter = folder / "adapter"
    if way not in ("lora", "own"):
        assert not adapter.exists()
        return
    card = (adapter / "README.md").read_text()
    assert "model.config.pad_token_id = tokenizer.pad_token_id" in card
    assert str(folder.parent) not in card
    count = expected.shape[1]
    model = AutoPeftModelForSequenceClassification.from_pretrained(adapter, num_labels=count)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model.config.pad_token_id = tokenizer.pad_token_id
    encoded = tokenizer(texts_of(folder, rows))["input_ids"]
    close(probabilities(model, encoded), expected)


def test_moderation_card_says_what_it_is(moderation):
    """A category without a training row is no output: 16 rows do not have all fourteen."""
    folder, way, _, _ = moderation
    card = read_card(folder, ClassifierCard)
    named = set().union(*load_conversations(TRAIN, max_rows=16)["categories"])
    expected = OUTPUTS.get(way, [name for name in LABELS if name in named])
    assert 1 <= len(expected) < 14
    assert card.labels == expected
    assert list(card.data["train_positive"]) == expected
    label = "prompt_unsafe" if way == "prompt" else "response_unsafe"
    assert set(card.probe.scores) == {*expected, label}
    assert read_json(folder / "run.json")["validation"]["flagged"]["support"] > 10
    text = (folder / "README.md").read_text()
    assert ("harm categories (BeaverTails" in text) == (way not in OUTPUTS)
    assert f"{len(LABELS)} harm categories" not in text
    assert not (folder / ".partial").exists()
    files = [path for path in folder.iterdir() if path.is_file()]
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o644"}


def test_a_finished_guard_is_replaced_by_a_whole_one_or_not_at_all(rows, tmp_path, monkeypatch):
    """Not without the flag, and never by weights that are not the trained ones."""
    train = module("moderation", "train")
    saver = module("moderation", "guard_folder")
    folder = tmp_path / "guard"
    words = moderation_words(BASES["qwen2"](tmp_path / "base"), folder, TRAIN, "--max_steps", 1)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    train.main()
    (folder / "notes.txt").write_text("mine")
    expected = judged(folder, rows)
    holds = r"holds guard\.json of an earlier run; pass --overwrite_output_dir true"
    with user_error(holds):
        train.main()

    monkeypatch.setattr(sys, "argv", [*sys.argv, "--overwrite_output_dir", "true"])
    save = saver.save_model

    def other_weights(model, state_dict, *others):
        save(model, {name: tensor * 0.9 for name, tensor in state_dict.items()}, *others)

    with monkeypatch.context() as patch, user_error("what was saved is not what was trained"):
        patch.setattr(saver, "save_model", other_weights)
        train.main()
    assert judged(folder, rows) == expected
    assert not (folder / ".partial").exists()

    (folder / ".partial").mkdir()  # a kill while the files change places
    (folder / "guard.json").unlink()
    with user_error("not finished: the saving of a guard was interrupted here"):
        load_guard(str(folder))
    train.main()
    assert not any(verdict.error for verdict in judged(folder, rows))
    assert (folder / "notes.txt").read_text() == "mine"


# --- the other recipes ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
def test_lora_guard_says_what_was_trained(family, rows, tmp_path):
    """`load_guard`, and stock PEFT on rendered text with the head's bias, as the card has it."""
    train, inputs, adapter = (module("lora_guard", name) for name in ("train", "inputs", "adapter"))
    seen = {}

    def look(_, trainer, *__) -> None:
        encoded = inputs.token_ids(rows, trainer.processing_class, 512)
        seen["scores"] = probabilities(trainer.model, encoded)

    modules = ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"]
    words = [BASES[family](tmp_path / "base"), tmp_path / "out", "--target-modules", *modules]
    words += ["--train-data", TRAIN, "--max-train-rows", 16, "--eval-data", VALIDATION]
    words += ["--per-device-batch-size", 8, "--learning-rate", 1e-2]
    run(train, words, adapter.RunFolder, "finish", look)
    folder = tmp_path / "out/best"
    expected = seen["scores"]
    assert np.ptp(expected, axis=0).max() > 0.01
    card = read_card(folder, LoraCard)
    unsafe, *labels = card.labels
    assert unsafe == "unsafe"
    assert set(labels) < set(LABELS)  # of 16 rows not every one has a row
    verdicts = judged(folder, rows)
    close([verdict.response_unsafe for verdict in verdicts], expected[:, 0])
    named = [[verdict.categories[name] for name in labels] for verdict in verdicts]
    close(named, expected[:, 1:])

    count = len(card.labels)
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=count)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.config.pad_token_id = tokenizer.pad_token_id
    encoded = tokenizer(texts_of(folder, rows))["input_ids"]
    close(probabilities(model, encoded, card.head_bias), expected)
    text = (folder / "README.md").read_text()
    assert "chat template is the chat model's own" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("flags", [[], ["--use_peft_lora", "--lora_r", 4]], ids=["full", "lora"])
def test_expguard_says_what_was_trained(flags, tmp_path, monkeypatch):
    """The stock model, and the stock adapter, give the verdicts of the model in memory."""
    train, rows_, model_ = (module("expguard", name) for name in ("train", "rows", "model"))
    # a checkpoint holds the arguments, pickled by that name
    monkeypatch.setitem(sys.modules, "arguments", module("expguard", "arguments"))
    data = write_rows(tmp_path / "rows.jsonl", authored(24))
    base = tmp_path / "base"
    tokenizer = prompt_tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    encoder = rows_.Encoder(tokenizer, 400)
    sequences = encoder.compared(rows_.read_rows(str(data), ""))

    def scores(model) -> list:
        return model_.verdict_scores(model.eval(), sequences, encoder.words)

    seen = []
    out = tmp_path / "out"
    words = ["--model_name_or_path", base, "--dataset_name", data, "--output_dir", out]
    words += ["--max_seq_len", 400, "--learning_rate", 3e-3, "--max_steps", 4]
    words += ["--disable_checkpointing", "--disable_tqdm", "true", *flags]
    run(train, words, train, "save_guard", lambda *args: seen.extend(scores(model_of(args))))
    stock = [AutoModelForCausalLM.from_pretrained(out)]
    if flags:
        stock.append(AutoPeftModelForCausalLM.from_pretrained(out / "adapter"))
    for model in stock:
        for expected, said in zip(seen, scores(model), strict=True):
            assert said == pytest.approx(expected, abs=2e-5)


def model_of(args: tuple):
    """The model of the trainer that is among the arguments."""
    (trainer,) = [one for one in args if isinstance(one, Trainer)]
    return trainer.model


@pytest.mark.parametrize("family", [name for name in DECODERS if name != "gpt2"])
def test_cross_task_defense_says_what_was_trained(family, tmp_path, monkeypatch):
    """The adapter on the base, as stock PEFT loads it, gives the logits of the model in memory."""
    train = module("cross_task_defense", "train")
    # a checkpoint holds the arguments, pickled by that name
    monkeypatch.setitem(sys.modules, "arguments", module("cross_task_defense", "arguments"))
    ids = torch.arange(40, 70)[None]
    data = tmp_path / "rows.json"
    answers = {"Name a colour.": "Blue.", "Say hello to them.": "Hello!"}
    rows = [{"instruction": one, "input": "", "output": other} for one, other in answers.items()]
    data.write_text(json.dumps(rows))
    save = train.full_state_dict

    @torch.inference_mode()
    def logits(model) -> torch.Tensor:
        return model.eval()(ids).logits

    seen = []

    def watched(trainer):
        seen.append(logits(trainer.model))
        return save(trainer)

    monkeypatch.setattr(train, "full_state_dict", watched)
    base = str(BASES[family](tmp_path / "base"))
    out = tmp_path / "out"
    given = {"data_path": str(data), "output_dir": str(out), "batch_size": 2}
    more = {"micro_batch_size": 2, "num_epochs": 3, "cutoff_len": 256}
    train.train(base_model=base, learning_rate=1e-2, warmup_steps=0, **given, **more)
    expected = seen[-1]
    trained = logits(AutoPeftModelForCausalLM.from_pretrained(out))
    torch.testing.assert_close(trained, expected, atol=1e-5, rtol=0)
    untrained = logits(AutoModelForCausalLM.from_pretrained(base))
    assert not torch.allclose(untrained, expected, atol=1e-4)
    for card in out.glob("README.md"):
        assert str(tmp_path) not in card.read_text()
    shutil.rmtree(out / "checkpoint-3")
    with user_error(r"holds adapter_config\.json of an earlier run"):
        train.train(base_model="nowhere", micro_batch_size=2, **given)
