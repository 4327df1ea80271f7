"""examples/feedback_guard: arms, training and the small guards, on tiny random models."""

import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import feedback_guards as shared
import pytest
import torch
from checks import (
    cases,
    difference,
    flip_a_bit,
    logged,
    read_json,
    read_rows,
    user_error,
    weights,
    write_rows,
)
from feedback_guards import (
    BAD,
    CONVERSATIONS,
    GOOD,
    blocked_inputs,
    config_,
    formats,
    processed,
    records,
    response,
    train,
)
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.conversation import pair
from guards import load_guard

# fixtures
base = shared.base
guard = shared.guard
plain = shared.plain
rows_of = shared.rows_of
settings = shared.settings
ROWS_OF_ARMS = {
    "A3": "12 feedback",
    "A4": "12 feedback, 12 safe",
    "A5": "12 feedback, 12 safe, 12 replay",
    "A6": "12 feedback, 12 hard_benign, 6 explored, 12 safe, 2 replay",
    "A7": "12 feedback, 12 safe, 12 replay",
    "A8": "12 feedback, 12 hard_benign, 6 explored, 12 safe, 5 replay",
    "C1": "12 feedback, 12 hard_benign, 12 safe, 6 replay",
    "C2": "12 feedback, 12 hard_benign, 12 safe, 12 replay",
    "C3": "12 human, 12 hard_benign, 6 explored, 12 safe, 12 replay",
    "C4": "12 feedback, 12 hard_benign, 6 explored, 12 safe, 5 replay",
}


def examples_of(folder: Path) -> list[dict]:
    return read_rows(folder / "training_examples.jsonl")


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def gaps(some, others) -> list[float]:
    return [abs(one - other) for one, other in zip(some, others, strict=True)]


def stamps(folders: list[Path]) -> list[int]:
    """When the cards of guards were written."""
    return [(folder / "guard.json").stat().st_mtime_ns for folder in folders]


def of_source(rows, source: str) -> list:
    return [row for row in rows if row.source == source]


# --- rows -----------------------------------------------------------------------------------------


def test_the_config_knows_the_arms():
    assert set(config_.DEFAULT_ARMS) <= set(train.all_arms())


@pytest.mark.parametrize("name", [*ROWS_OF_ARMS, "A2-labels"])
def test_no_prompt_is_in_both_classes(rows_of, name):
    lines = processed()
    for line in lines[2:40:3]:
        again = {"id": line["id"] + "x", "query": f"  {line['query'].upper()} "}
        lines.append(line | again)
    for line in lines[-4:]:
        decided = [one["decided"] for one in line["responses"]]
        line["responses"] = [response(not unsafe) for unsafe in decided]
    for seed in range(3):
        sides = {True: set(), False: set()}
        for row in rows_of(name, seed, lines):
            is_unsafe = row.target >= 0.5
            sides[is_unsafe].add(records.text_key(row.prompt))
        assert sides[True]
        assert not sides[True] & sides[False]


@pytest.mark.parametrize("name", ROWS_OF_ARMS)
def test_what_an_arms_rows_are(rows_of, name):
    counts = Counter(row.source for row in rows_of(name))
    found = [f"{count} {source}" for source, count in counts.items()]
    assert ", ".join(found) == ROWS_OF_ARMS[name]


def test_replay_blocks_as_often_as_the_guard(rows_of):
    assert sum(row.target for row in of_source(rows_of("A5"), "replay")) == 2


def test_soft_labels_are_the_share_of_unsafe_responses(rows_of):
    rows = rows_of("A8")
    assert {row.target for row in of_source(rows, "feedback")} == {0.5, 0.75}
    assert {row.target for row in of_source(rows, "safe")} == {0.0, 0.25}


def test_only_safe_traffic_is_held_near_the_guard(rows_of):
    for row in rows_of("A7"):
        assert row.kl == (row.source in ("safe", "replay") and row.target < 0.5)
    assert not any(row.kl for row in rows_of("A6"))


@pytest.mark.parametrize("name", ["C1", "C2"])
def test_controls_learn_from_other_prompts_than_the_method(rows_of, name):
    ids = {}
    for arm in (name, "A8"):
        ids[arm] = {row.id for row in of_source(rows_of(arm), "feedback")}
    assert ids[name] != ids["A8"]


def test_a_seed_draws_the_rows(rows_of):
    assert rows_of("A8") == rows_of("A8")
    assert rows_of("A8") != rows_of("A8", 1)


def test_the_suspicion_control_does_not_see_what_responses_say(rows_of):
    """It is the same whichever prompts have unsafe responses, as long as their number is."""
    lines = processed()
    before = rows_of("C2", 0, lines)
    unsafe = [line for line in lines if records.feedback(line)]
    passed = [line for line in lines if records.passed(line)]
    safe = [line for line in passed if not records.feedback(line)]
    for line, other in zip(unsafe, safe, strict=False):
        line["responses"], other["responses"] = other["responses"], line["responses"]
    assert not any(records.feedback(line) for line in unsafe)
    assert rows_of("C2", 0, lines) == before


def test_the_permuted_control_replays_what_its_labels_allow(rows_of):
    unsafe = {row["id"] for row in blocked_inputs(processed())}
    replayed = set()
    for seed in range(9):
        replayed |= {row.id for row in of_source(rows_of("C1", seed), "replay")}
    assert unsafe & replayed


def test_refused_prompts_are_no_safe_examples(rows_of):
    lines = of_kinds("01236")  # of harmless ones only refused are left
    sources = {row.source for row in rows_of("A5", 0, lines)}
    assert sources == {"feedback", "replay"}
    kinds = {row.id[-1] for row in rows_of("A8", 0, lines)}
    assert "6" not in kinds


def of_kinds(kinds: str) -> list[dict]:
    """Processed lines whose id ends with one of these digits."""
    return [line for line in processed() if line["id"][-1] in kinds]


def test_without_feedback_there_is_nothing_to_train(rows_of):
    lines = of_kinds("06")
    with user_error("none of 12 prompts passed the guard and had its resp"):
        rows_of("A8", 0, lines)


# --- training -------------------------------------------------------------------------------------


def test_arms_get_the_same_number_of_steps(settings):
    """By epochs over the rows of A8, however few rows an arm has; a probe has none."""
    by_epochs = {"max_steps": -1, "epochs": 1.0, "batch_size": 16}
    config = settings(arms=["A3", "A8", "C4"], **by_epochs)
    a3, a8, c4 = train.train(config)
    rows = len(examples_of(a8))
    steps = -(-rows // 16)
    assert len(examples_of(a3)) < rows
    assert read_json(a3 / "run.json")["steps"] == steps
    assert read_json(a8 / "run.json")["steps"] == steps
    assert "steps" not in read_json(c4 / "run.json")


@pytest.mark.slow
def test_soft_targets_move_the_probability_to_q(settings):
    config = settings(max_steps=120, batch_size=6, lora_dropout=0.0, save_steps=1000)
    encoder = formats.Encoder(train.load_base(config), 600)
    targets = [0.75, 0.25, 1.0, 0.0, 0.5, 0.9]
    words = ("rice ", "box ", "cook ", "his ", "How ", "Take ")
    conversations = [pair(word * 3) for word in words]
    rows, _ = encoder.rows(conversations, targets, [None] * 6)
    prompts = [formats.prompt_of(row) for row in rows]
    before = formats.verdict_probabilities(encoder.guard, prompts, encoder.tokens)
    args = train.arm_arguments(train.arm_named("A4"), 0, 120, config)
    adapted = train.add_adapters(encoder.guard.model.model, config)
    train.fit(adapted, args, rows, encoder, {})
    adapted.eval()
    after = formats.verdict_probabilities(encoder.guard, prompts, encoder.tokens)
    assert max(gaps(before, targets)) > 0.3
    assert max(gaps(after, targets)) < 0.1


@pytest.mark.slow
def test_kl_holds_safe_traffic_near_the_guard(settings, guard, base):
    """Mean |P - P before| over the safe rows of A5, and of A7 with a large penalty."""
    drift = {}
    tokens = formats.Encoder(guard, 600).tokens
    for name in ("A5", "A7"):
        config = settings(arms=[name], max_steps=40, kl_weight=10.0)
        (folder,) = train.train(config)
        safe = [row for row in examples_of(folder) if row["target"] == 0]
        prompts = guard.prompt_ids([row["messages"] for row in safe])
        trained = load_guard(str(base), adapter=str(folder), progress=False)
        before = formats.verdict_probabilities(guard, prompts, tokens)
        after = formats.verdict_probabilities(trained, prompts, tokens)
        drift[name] = mean(gaps(before, after))
    assert drift["A7"] < 0.5 * drift["A5"], drift


SMALL = {"max_steps": 2, "lora_last_layers": 1, "max_length": 900}


@pytest.mark.slow
def test_every_arm_trains_once(settings):
    """A second run does nothing; an adapter is the same whichever arms were trained before it."""
    names = ["A2", "A2-parser", "A2-format", "A3", "A8", "C4"]
    config = settings(arms=names, seeds=[0, 1], **SMALL)
    folders = train.train(config)
    assert len(folders) == 12
    assert len(set(folders)) == 8  # A2-parser and A2-format borrow the weights of A2
    assert not list(Path(config.training.output_dir).rglob("checkpoint-*"))
    before = stamps(folders)
    assert train.train(config) == folders
    assert stamps(folders) == before

    a8 = train.arm_folder(config, "A8", 0)
    other_seed = train.arm_folder(config, "A8", 1)
    (alone,) = train.train(settings(output_dir=f"{a8}x", arms=["A8"], **SMALL))
    assert difference(weights(alone), weights(a8)) == 0
    assert difference(weights(a8), weights(other_seed)) > 0
    with user_error(r"another training\.learning_rate; run train"):
        train.train(settings(arms=["A8"], **SMALL, learning_rate=1e-3))


@pytest.mark.slow
def test_stock_libraries_load_an_arm(settings, base):
    (folder,) = train.train(settings(arms=["A8"], **SMALL))
    layers = {name.split("layers.")[1][0] for name in weights(folder)}
    assert layers == {"2"}
    card = read_json(folder / "guard.json")
    told = {"kind": "generative", "guard": "llama-guard", "arm": "A8", "seed": 0}
    assert told.items() <= card.items()
    run = read_json(folder / "run.json")
    assert run["sources"]["feedback"] == 12
    assert run["rows"] == len(examples_of(folder))
    assert "whole method" in (folder / "README.md").read_text()

    stock = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trained = load_guard(str(base), adapter=str(folder), progress=False)
    (ids,) = trained.prompt_ids([CONVERSATIONS[0]])
    text = tokenizer.apply_chat_template(CONVERSATIONS[0], tokenize=False)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    tokens = formats.Encoder(trained, 600).tokens
    with torch.no_grad():
        logits = stock(torch.tensor([ids])).logits[0, -1]
    (probability,) = formats.verdict_probabilities(trained, [ids], tokens)
    expected = formats.log_odds(logits, tokens).sigmoid().item()
    assert probability == pytest.approx(expected, abs=1e-4)


def test_a_probe_on_the_frozen_guard_tells_what_it_was_fitted_to(settings, guard):
    (folder,) = train.train(settings(arms=["C4"]))
    rows = examples_of(folder)
    conversations = [row["messages"] for row in rows]
    scores = train.probe_scores(guard, folder, conversations)
    sides = {True: [], False: []}
    for score, row in zip(scores, rows, strict=True):
        sides[row["target"] >= 0.5].append(score)
    assert mean(sides[True]) > 0.15 + mean(sides[False])
    assert read_json(folder / "guard.json")["kind"] == "probe"


def test_a_probe_of_an_earlier_version_is_refused(guard, tmp_path):
    old = {"mean": [0.0], "scale": [1.0], "weights": [1.0], "bias": 0.0}
    (tmp_path / "probe.json").write_text(json.dumps(old))
    with user_error("field mean: a probe of an earlier version; run train"):
        train.probe_scores(guard, tmp_path, [pair("Hello")])


class Killed(KeyboardInterrupt):
    """Stands for a kill."""


def kill_after(monkeypatch, steps: int) -> list[int]:
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
    a4 = train.arm_folder(config, "A4", 0)
    a8 = train.arm_folder(config, "A8", 0)
    assert (a4 / "guard.json").is_file()
    assert not (a8 / "guard.json").exists()
    assert (a8 / "checkpoint-4/trainer_state.json").is_file()
    done = kill_after(monkeypatch, 100)
    again = train.train(config)
    assert done == [4, 5]
    for one, other in zip(whole, again, strict=True):
        assert difference(weights(one), weights(other)) == 0
        assert read_json(one / "guard.json") == read_json(other / "guard.json")
        assert logged(one, "loss") == logged(other, "loss")


def test_checkpoints_of_other_settings_are_not_resumed(settings, monkeypatch):
    """Nor are they removed unasked, which would cost somebody the hours that are in them."""
    options = {"max_steps": 4, "save_steps": 1}
    with monkeypatch.context() as patched:
        kill_after(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            train.train(settings(**options))
    with user_error("is of another run"):
        train.train(settings(**options, lora_r=4))
    folder = train.arm_folder(settings(), "A4", 0)
    assert (folder / "checkpoint-2/trainer_state.json").is_file()


def test_what_a_user_put_into_an_arms_folder_stays(settings):
    config = settings(max_steps=2, save_steps=1)
    folder = train.arm_folder(config, "A4", 0)
    own = [folder / "checkpoint-merged/model.safetensors", folder / "notes.txt"]
    own[0].parent.mkdir(parents=True)
    for path in own:
        path.write_text("mine")
    assert train.train(config) == [folder]
    assert [path.read_text() for path in own] == ["mine", "mine"]
    assert not list(folder.glob("checkpoint-[0-9]*"))


# --- the small guards -----------------------------------------------------------------------------


def labelled(path: Path) -> Path:
    """80 prompts, a third of them bad, every second with a response that is as bad."""
    rows = []
    for i in range(80):
        bad = i % 3 == 0
        label = "unsafe" if bad else "safe"
        question = BAD if bad else GOOD
        row = {"prompt": question.format(i), "prompt_label": label}
        if i % 2:
            words = "The letters" if bad else "rice"
            row["response"] = f"{words} {i}"
            row["response_label"] = label
        rows.append(row)
    return write_rows(path, rows)


@pytest.fixture
def section(plain, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "train", train)
    data = str(labelled(tmp_path / "guard.jsonl"))

    def make(**changes):
        values = {
            "base_model": str(plain),
            "data": (data,),
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
    card = read_json(folder / "guard.json")
    assert (card["kind"], card["guard"]) == ("generative", "llama-guard")
    assert card["thresholds"]["prompt_unsafe"]["on"].startswith("0.15 of ")
    assert read_json(folder / "run.json")["validation"]["prompt_unsafe"]["support"] > 0
    first, *_, last = logged(folder, "loss").values()
    assert last < 0.3 * first

    good = pair(GOOD.format(777))
    bad = pair(BAD.format(778))
    answered = pair(BAD.format(779), "The letters 7")
    guard = load_guard(str(folder), progress=False)
    verdicts = guard.judge([good, bad, answered])
    assert [verdict.error for verdict in verdicts] == [None] * 3
    assert verdicts[0].prompt_unsafe < 0.5
    assert verdicts[1].prompt_unsafe > 0.5
    assert verdicts[2].response_unsafe > 0.5

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(bad, return_tensors="pt", return_dict=True)
    start = inputs["input_ids"].shape[1]
    written = model.generate(**inputs, max_new_tokens=6)[0, start:]
    assert tokenizer.decode(written).strip() == "unsafe<|endoftext|>"

    before = stamps([folder])
    train.make_guard(section())
    assert stamps([folder]) == before
    with user_error("holds another guard"):
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
    one = load_file(tmp_path / "whole/model.safetensors")
    other = load_file(tmp_path / "small/model.safetensors")
    assert difference(one, other) == 0


def test_a_guard_of_a_replaced_base_is_another_one(section, plain, tmp_path):
    base = Path(shutil.copytree(plain, tmp_path / "base"))
    train.make_guard(section(base_model=str(base), max_steps=1))
    flip_a_bit(base / "model.safetensors")
    with user_error("holds another guard"):
        train.make_guard(section(base_model=str(base), max_steps=1))


def test_a_preparation_says_how_many_texts_its_thresholds_saw_shortened(
    section, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(train, "SMALL_GUARD_LENGTH", 600)
    rows = []
    for i in range(20):
        label = "unsafe" if i % 2 else "safe"
        rows.append({"prompt": f"{i}" + " cook rice" * 300, "prompt_label": label})
    data = write_rows(tmp_path / "long.jsonl", rows)
    train.make_guard(section(data=(str(data),), max_steps=1))
    assert "3 of 3 texts that the thresholds are fitted on were shortened to 600" in caplog.text


@cases(
    "changes, message",
    {
        "a test set": ({"data": ("toxicchat:test",)}, "toxicchat:test is a test set"),
        "no such model": ({"base_model": "nowhere/nothing"}, "base_model: nowhere/nothing"),
    },
)
def test_what_a_preparation_refuses(section, changes, message):
    with user_error(message):
        train.make_guard(section(**changes))
