"""examples/feedback_guard: arms, training and the small guards, on tiny random models."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import feedback_guards as shared
import pytest
import torch
from feedback_guards import (
    BAD,
    CONVERSATIONS,
    GOOD,
    blocked_inputs,
    config_,
    difference,
    formats,
    processed,
    read,
    records,
    response,
    train,
    weights,
)
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.conversation import UserError, pair
from common.data import prompt_key
from guards import load_guard

base, guard, plain, stored = shared.base, shared.guard, shared.plain, shared.settings  # fixtures
GUARD_ARMS = ["A3", "A4", "A5", "A6", "A7", "A8", "C1", "C2", "C3", "C4"]


@pytest.fixture
def settings(stored, tmp_path):
    """`settings(**training)`: a config with its processed rows on disk; the original's checks
    collected nothing there.
    """
    rows = [row | {"legacy": {"input": "UNSAFE [O3]", "outputs": []}} for row in processed()]
    write_rows(tmp_path / "store/processed/train.jsonl", rows)
    return stored


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def examples_of(folder):
    return [json.loads(line) for line in (folder / "training_examples.jsonl").open()]


# --- rows -----------------------------------------------------------------------------------------


@pytest.fixture
def rows_of(settings):
    config = settings()
    lines = processed()

    def make(name, seed=0, lines=lines):
        return train.build_rows(train.arm_named(name), lines, blocked_inputs(lines), seed, config)

    return make


def test_the_config_knows_the_arms():
    assert set(config_.DEFAULT_ARMS) <= set(train.all_arms())
    with pytest.raises(UserError, match="'A9' is none of A2, A2-parser"):
        train.arm_named("A9")


@pytest.mark.parametrize("name", [*GUARD_ARMS, "A2-labels"])
def test_no_prompt_is_in_both_classes(rows_of, name):
    lines = processed()
    for line in lines[2:40:3]:
        lines.append(line | {"id": line["id"] + "x", "query": f"  {line['query'].upper()} "})
    for line in lines[-4:]:
        line["responses"] = [response(not one["decided"]) for one in line["responses"]]
    for seed in range(3):
        classes = {}
        for row in rows_of(name, seed, lines):
            key = prompt_key({"messages": row.messages})
            classes.setdefault(key, set()).add(row.target >= 0.5)
        assert classes
        assert all(len(of) == 1 for of in classes.values())


def test_arms_differ_in_what_they_say(rows_of):
    """12 feedback prompts of 60; six each of the kinds 0 (blocked), 1 (explored, harmless), 6
    (refused).
    """
    made = {name: rows_of(name) for name in GUARD_ARMS}
    count = {name: Counter(row.source for row in rows) for name, rows in made.items()}
    assert count["A3"] == {"feedback": 12}
    assert count["A4"] == {"feedback": 12, "safe": 12}
    assert count["A5"] == count["A7"] == {"feedback": 12, "safe": 12, "replay": 12}
    hard = {"feedback": 12, "hard_benign": 12, "explored": 6, "safe": 12, "replay": 2}
    assert count["A6"] == hard
    assert count["A8"] == count["C4"] == hard | {"replay": count["A8"]["replay"]}
    assert count["C3"]["human"] == 12
    assert "feedback" not in count["C3"]
    # as often as the guard blocks
    assert sum(row.target for row in made["A5"] if row.source == "replay") == 2
    targets = {source: {r.target for r in made["A8"] if r.source == source} for source in hard}
    assert targets["feedback"] == {0.5, 0.75}
    assert targets["safe"] == {0.0, 0.25}
    for row in made["A7"]:
        assert row.kl == (row.source in ("safe", "replay") and row.target < 0.5)
    assert not any(row.kl for row in made["A6"])
    for name in ("C1", "C2"):
        assert not any(row.source == "explored" for row in made[name])
        unsafe = {row.id for row in made[name] if row.source == "feedback"}
        assert len(unsafe) == 12
        assert unsafe != {row.id for row in made["A8"] if row.source == "feedback"}
    assert rows_of("A8") == made["A8"] != rows_of("A8", 1)


def test_controls_never_see_what_their_labels_hide(rows_of):
    """C2 is the same whatever the responses say, as long as their number is; C1 replays what its
    labels allow.
    """
    lines = processed()
    unsafe = [line for line in lines if records.feedback(line)]
    others = [line for line in lines if records.passed(line) and not records.feedback(line)]
    ids = {line["id"] for line in unsafe}
    made = [(row.id, row.target) for row in rows_of("C2", 0, lines)]
    for line, other in zip(unsafe, others, strict=False):
        line["responses"], other["responses"] = other["responses"], line["responses"]
    assert ids != {line["id"] for line in lines if records.feedback(line)}
    assert [(row.id, row.target) for row in rows_of("C2", 0, lines)] == made
    c1 = [row for seed in range(9) for row in rows_of("C1", seed)]
    assert ids & {row.id for row in c1 if row.source == "replay"}


def test_refused_prompts_are_no_safe_examples(rows_of):
    # of harmless ones only refused are left
    lines = [line for line in processed() if line["id"][-1] not in "45789"]
    assert {row.source for row in rows_of("A5", 0, lines)} == {"feedback", "replay"}
    assert not any(row.id.endswith("6") for row in rows_of("A8", 0, lines))


def test_without_feedback_there_is_nothing_to_train(rows_of):
    lines = [line for line in processed() if line["id"][-1] in "06"]
    with pytest.raises(UserError, match="none of 12 prompts passed the guard and had its resp"):
        rows_of("A8", 0, lines)


# --- training -------------------------------------------------------------------------------------


def test_arms_get_the_same_number_of_steps(settings):
    """By epochs over the rows of A8, however few rows an arm has."""
    config = settings(arms=["A3", "A8", "C4"], max_steps=-1, epochs=1.0, batch_size=16)
    folders = train.train(config)
    steps = [read(folder / "run.json").get("steps") for folder in folders]
    rows = len(examples_of(folders[1]))
    assert len(examples_of(folders[0])) < rows
    assert steps == [-(-rows // 16), -(-rows // 16), None]


@pytest.mark.slow
def test_soft_targets_move_the_probability_to_q(guard, settings, tmp_path):
    config = settings(max_steps=120, batch_size=6, lora_dropout=0.0, save_steps=1000)
    encoder = formats.Encoder(train.load_base(config), 600)
    model = encoder.guard.model.model
    targets = [0.75, 0.25, 1.0, 0.0, 0.5, 0.9]
    texts = [text * 3 for text in ("rice ", "box ", "cook ", "his ", "How ", "Take ")]
    rows, _ = encoder.rows([pair(text) for text in texts], targets)
    prompts = [row["input_ids"][: row["labels"].count(-100)] for row in rows]
    before = formats.verdict_probabilities(model, prompts, encoder.tokens)
    args = train.arm_arguments(train.arm_named("A4"), 0, 120, config)
    train.fit(train.add_adapters(model, config), args, rows, encoder, {})
    after = formats.verdict_probabilities(model, prompts, encoder.tokens)
    assert max(abs(p - q) for p, q in zip(before, targets, strict=True)) > 0.3
    assert max(abs(p - q) for p, q in zip(after, targets, strict=True)) < 0.1


@pytest.mark.slow
def test_kl_holds_safe_traffic_near_the_guard(settings, guard):
    """Mean |P - P before| over the safe rows of A5, and of A7 with a large penalty."""
    drift = {}
    for name in ("A5", "A7"):
        config = settings(arms=[name], max_steps=40, kl_weight=10.0)
        (folder,) = train.train(config)
        rows = [row for row in examples_of(folder) if row["target"] == 0]
        prompts = guard.prompt_ids([row["messages"] for row in rows])
        trained = load_guard(
            config.llama_guard.base_model_path, adapter=str(folder), progress=False
        )
        tokens = formats.Encoder(guard, 600).tokens
        models = guard.model.model, trained.model.model
        before, after = (formats.verdict_probabilities(m, prompts, tokens) for m in models)
        drift[name] = sum(abs(a - b) for a, b in zip(after, before, strict=True)) / len(rows)
    assert drift["A7"] < 0.5 * drift["A5"], drift


@pytest.mark.slow
def test_every_arm_trains_and_loads(settings, base):
    """A second run does nothing; an adapter is the same whichever arms were trained before it."""
    names = ["A2", "A2-parser", "A2-format", "A3", "A8", "C4"]
    values = {"max_steps": 2, "lora_last_layers": 1, "max_length": 900}
    config = settings(arms=names, seeds=[0, 1], **values)
    folders = train.train(config)
    assert len(folders) == 12
    assert len(set(folders)) == 8  # A2-parser and A2-format borrow the weights of A2
    assert not list(Path(config.training.output_dir).rglob("checkpoint-*"))
    stamps = [(folder / "guard.json").stat().st_mtime_ns for folder in folders]
    assert train.train(config) == folders
    assert stamps == [(folder / "guard.json").stat().st_mtime_ns for folder in folders]
    a8 = train.arm_folder(config, "A8", 0)
    assert {name.split("layers.")[1][0] for name in weights(a8)} == {"2"}
    (alone,) = train.train(settings(output_dir=f"{a8}x", arms=["A8"], **values))
    assert difference(weights(alone), weights(a8)) == 0
    assert difference(weights(a8), weights(train.arm_folder(config, "A8", 1))) > 0
    card, run = read(a8 / "guard.json"), read(a8 / "run.json")
    told = card["kind"], card["guard"], card["arm"], card["seed"]
    assert told == ("generative", "llama-guard", "A8", 0)
    assert run["sources"]["feedback"] == 12
    assert run["rows"] == len(examples_of(a8))
    assert "whole method" in (a8 / "README.md").read_text()

    stock = AutoPeftModelForCausalLM.from_pretrained(a8).eval()
    tokenizer = AutoTokenizer.from_pretrained(a8)
    trained = load_guard(str(base), adapter=str(a8), progress=False)
    (ids,) = trained.prompt_ids([CONVERSATIONS[0]])
    text = tokenizer.apply_chat_template(CONVERSATIONS[0], tokenize=False)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    tokens = formats.Encoder(trained, 600).tokens
    with torch.no_grad():
        logits = stock(torch.tensor([ids])).logits[0, -1]
    (p,) = formats.verdict_probabilities(trained.model.model, [ids], tokens)
    assert p == pytest.approx(formats.log_odds(logits, tokens).sigmoid().item(), abs=1e-4)

    with pytest.raises(UserError, match=r"another training\.learning_rate; run train"):
        train.train(settings(arms=["A8"], **values, learning_rate=1e-3))


def test_a_probe_on_the_frozen_guard_tells_what_it_was_fitted_to(settings, guard):
    (folder,) = train.train(settings(arms=["C4"]))
    rows = examples_of(folder)
    scores = train.probe_scores(guard, folder, [row["messages"] for row in rows])
    unsafe = [p for p, row in zip(scores, rows, strict=True) if row["target"] >= 0.5]
    safe = [p for p, row in zip(scores, rows, strict=True) if row["target"] < 0.5]
    assert sum(unsafe) / len(unsafe) > 0.15 + sum(safe) / len(safe)
    assert read(folder / "guard.json")["kind"] == "probe"


class Killed(KeyboardInterrupt):
    """Stands for a kill."""


def kill_after(monkeypatch, steps):
    """Steps of a training, which is killed after so many."""
    step = train.ArmTrainer.training_step
    done = []

    def counted(self, *args, **kwargs):
        if len(done) == steps:
            raise Killed
        done.append(self.state.global_step)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(train.ArmTrainer, "training_step", counted)
    return done


@pytest.mark.slow
def test_killed_and_resumed_is_uninterrupted(settings, monkeypatch):
    """Of two arms the second is killed after its second checkpoint; what it had is not done again."""
    options = {"arms": ["A4", "A8"], "max_steps": 6, "save_steps": 2, "lora_last_layers": 2}
    whole = train.train(settings(**options))
    config = settings(**options, output_dir=f"{settings().training.output_dir}-again")
    with monkeypatch.context() as patched:
        kill_after(patched, 11)
        with pytest.raises(KeyboardInterrupt):
            train.train(config)
    a4, a8 = (train.arm_folder(config, name, 0) for name in ("A4", "A8"))
    assert (a4 / "guard.json").is_file()
    assert not (a8 / "guard.json").exists()
    assert (a8 / "checkpoint-4/trainer_state.json").is_file()
    done = kill_after(monkeypatch, 100)
    again = train.train(config)
    assert done == [4, 5]
    for one, other in zip(whole, again, strict=True):
        assert difference(weights(one), weights(other)) == 0
        assert read(one / "guard.json") == read(other / "guard.json")
        assert losses(one) == losses(other)


def losses(folder):
    return [entry["loss"] for entry in read(folder / "run.json")["log"] if "loss" in entry]


def test_checkpoints_of_other_settings_are_not_resumed(settings, monkeypatch):
    """Nor are they removed unasked, which would cost somebody the hours that are in them."""
    options = {"max_steps": 4, "save_steps": 1}
    with monkeypatch.context() as patched:
        kill_after(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            train.train(settings(**options))
    with pytest.raises(UserError, match="is of another run"):
        train.train(settings(**options, lora_r=4))
    folder = train.arm_folder(settings(), "A4", 0)
    assert (folder / "checkpoint-2/trainer_state.json").is_file()


def test_what_a_user_put_into_an_arms_folder_stays(settings):
    config = settings(max_steps=2, save_steps=1)
    folder = train.arm_folder(config, "A4", 0)
    (folder / "checkpoint-merged").mkdir(parents=True)
    (folder / "checkpoint-merged/model.safetensors").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    assert train.train(config) == [folder]
    assert (folder / "checkpoint-merged/model.safetensors").read_text() == "mine"
    assert (folder / "notes.txt").read_text() == "mine"
    assert not list(folder.glob("checkpoint-[0-9]*"))


# --- the small guards -----------------------------------------------------------------------------


def labelled(path: Path, count: int = 80) -> Path:
    rows = []
    for i in range(count):
        bad = i % 3 == 0
        row = {"prompt": (BAD if bad else GOOD).format(i), "prompt_label": ("safe", "unsafe")[bad]}
        if i % 2:
            row["response"] = f"{'The letters' if bad else 'rice'} {i}"
            row["response_label"] = row["prompt_label"]
        rows.append(row)
    return write_rows(path, rows)


@pytest.fixture
def section(plain, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "train", train)

    def make(**changes):
        values = {
            "base_model": str(plain),
            "data": (str(labelled(tmp_path / "guard.jsonl")),),
            "max_steps": 40,
            "output_dir": str(tmp_path / "small"),
            "learning_rate": 5e-3,
        }
        return config_.PrepareGuard(**(values | changes))

    return make


@pytest.mark.slow
def test_a_prepared_guard_is_one_that_stock_libraries_load(section, tmp_path):
    train.prepare(config_.Config(prepare=config_.Prepare(guard=section())))
    folder = tmp_path / "small"
    card, run = read(folder / "guard.json"), read(folder / "run.json")
    assert (card["kind"], card["guard"]) == ("generative", "llama-guard")
    assert card["thresholds"]["prompt_unsafe"]["on"].startswith("0.15 of ")
    found = losses(folder)
    assert found[-1] < 0.3 * found[0]
    assert run["validation"]["prompt_unsafe"]["support"] > 0
    guard = load_guard(str(folder), progress=False)
    fresh = [pair(GOOD.format(777)), pair(BAD.format(778)), pair(BAD.format(779), "The letters 7")]
    verdicts = guard.judge(fresh)
    assert [v.error for v in verdicts] == [None] * 3
    assert verdicts[0].prompt_unsafe < 0.5 < verdicts[1].prompt_unsafe
    assert verdicts[2].response_unsafe > 0.5
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(fresh[1], return_tensors="pt", return_dict=True)
    written = model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(written).strip() == "unsafe<|endoftext|>"
    stamp = (folder / "guard.json").stat().st_mtime_ns
    train.make_guard(section())
    assert (folder / "guard.json").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="holds another guard"):
        train.make_guard(section(seed=1))


@pytest.mark.slow
def test_a_killed_preparation_goes_on(section, tmp_path, monkeypatch):
    train.make_guard(section(max_steps=24, output_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patched:
        kill_after(patched, 22)
        with pytest.raises(KeyboardInterrupt):
            train.make_guard(section(max_steps=24))
    assert (tmp_path / "small/checkpoint-20").is_dir()
    assert not (tmp_path / "small/guard.json").exists()
    train.make_guard(section(max_steps=24))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "small"))
    assert difference(one, other) == 0


def test_a_guard_of_a_replaced_base_is_another_one(section, plain, tmp_path):
    base = Path(shutil.copytree(plain, tmp_path / "base"))
    train.make_guard(section(base_model=str(base), max_steps=1))
    path = base / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="holds another guard"):
        train.make_guard(section(base_model=str(base), max_steps=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ("toxicchat:test",)}, "toxicchat:test is a test set"),
        ({"base_model": "nowhere/nothing"}, "field base_model: nowhere/nothing"),
    ],
)
def test_what_a_preparation_refuses(section, changes, message):
    with pytest.raises(UserError, match=message):
        train.make_guard(section(**changes))
