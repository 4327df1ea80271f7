"""examples/feedback_guard: arms, training and the head start, on tiny random guards."""

import json
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace as Namespace

import feedback_guards as shared
import pytest
import torch
from feedback_guards import (
    BAD,
    CONVERSATIONS,
    GOOD,
    arms,
    blocked_inputs,
    config_,
    difference,
    formats,
    legacy,
    prepare,
    probe,
    processed,
    read,
    records,
    response,
    shared_base,
    train,
    weights,
)
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from scripts import module
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.conversation import UserError, pair
from common.data import prompt_key
from common.keep import digest
from guards import load_guard

base, guard, plain, stored = shared.base, shared.guard, shared.plain, shared.settings  # fixtures
process = module("feedback_guard", "process")


def asked_as_the_original(lines):
    """Its checks on processed lines: they collect nothing."""
    return [line | {"legacy": {"input": "UNSAFE [O3]", "outputs": []}} for line in lines]


@pytest.fixture
def settings(stored, tmp_path):
    """`settings(**training)`: a config with its processed rows on disk, and what process.py knows
    them by.
    """
    store = tmp_path / "store" / "processed"
    (store / "train.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in asked_as_the_original(processed()))
    )
    return stored


def test_the_config_knows_the_arms():
    assert set(config_.DEFAULT_ARMS) < set(arms.all_arms())
    with pytest.raises(UserError, match="'A9' is none of A2, A2-parser"):
        arms.arm("A9")


@pytest.fixture
def rows_of(settings):
    config, lines = settings(), processed()

    def make(name, seed=0, lines=lines):
        return arms.build_rows(arms.arm(name), lines, blocked_inputs(lines), seed, config)

    return make


GUARD_ARMS = ["A3", "A4", "A5", "A6", "A7", "A8", "C1", "C2", "C3", "C4"]


@pytest.mark.parametrize("name", [*GUARD_ARMS, "A2-labels"])
def test_no_prompt_is_in_both_classes(rows_of, name):
    lines = processed()
    lines += [
        line | {"id": line["id"] + "x", "query": f"  {line['query'].upper()} "}
        for line in lines[2:40:3]
    ]
    for line in lines[-4:]:
        line["responses"] = [response(not r["decided"]) for r in line["responses"]]
    for seed in range(3):
        classes = {}
        for row in rows_of(name, seed, lines):
            classes.setdefault(prompt_key({"messages": row.messages}), set()).add(row.target >= 0.5)
        assert classes and all(len(of) == 1 for of in classes.values())


def test_arms_differ_in_what_they_say(rows_of):
    """12 feedback prompts of 60; six each of the kinds 0 (blocked), 1 (explored, harmless), 6
    (refused).
    """
    made = {name: rows_of(name) for name in GUARD_ARMS}
    count = {name: Counter(row.source for row in rows) for name, rows in made.items()}
    assert count["A3"] == {"feedback": 12} and count["A4"] == {"feedback": 12, "safe": 12}
    assert count["A5"] == count["A7"] == {"feedback": 12, "safe": 12, "replay": 12}
    assert count["A6"] == {
        "feedback": 12,
        "hard_benign": 12,
        "explored": 6,
        "safe": 12,
        "replay": 2,
    }
    assert count["A8"] == count["A6"] | {"replay": count["A8"]["replay"]} == count["C4"]
    # as often as the guard blocks
    assert sum(row.target for row in made["A5"] if row.source == "replay") == 2
    assert count["C3"]["human"] == 12 and "feedback" not in count["C3"]
    safe = {name: [r.id for r in made[name] if r.source == "safe"] for name in made}
    assert safe["A4"] == safe["A5"] == safe["A7"]
    assert {r.target for r in made["A4"]} == {0.0, 1.0}
    assert {r.target for r in made["A8"] if r.source == "feedback"} == {0.5, 0.75}
    assert {r.target for r in made["A8"] if r.source == "safe"} == {0.0, 0.25}
    assert all(
        r.kl == (r.source == "safe" or (r.source == "replay" and r.target < 0.5))
        for r in made["A7"]
    )
    assert not any(r.kl for r in made["A6"])
    truth = {r.id for r in made["A8"] if r.target >= 0.5 and r.source == "feedback"}
    for name in ("C1", "C2", "C3"):
        bad = {r.id for r in made[name] if r.source in ("feedback", "human")}
        assert len(bad) == 12 and (bad == truth) is (name == "C3"), name
    assert not any(r.source == "explored" for name in ("C1", "C2") for r in made[name])
    assert rows_of("A8") == made["A8"] != rows_of("A8", 1)


def test_controls_never_see_what_their_labels_hide(rows_of):
    """C2 is the same whatever the responses say, as long as their number is; C1 replays what its
    labels allow.
    """
    lines = processed()
    unsafe = [line["id"] for line in lines if records.feedback(line)]
    others = [line for line in lines if records.passed(line) and not records.feedback(line)]
    made = [(row.id, row.target) for row in rows_of("C2", 0, lines)]
    for line, other in zip([line for line in lines if line["id"] in unsafe], others, strict=False):
        line["responses"], other["responses"] = other["responses"], line["responses"]
    assert unsafe != [line["id"] for line in lines if records.feedback(line)]
    assert [(row.id, row.target) for row in rows_of("C2", 0, lines)] == made
    replayed = {
        row.id for seed in range(9) for row in rows_of("C1", seed) if row.source == "replay"
    }
    assert replayed & set(unsafe)


def test_refused_prompts_are_no_safe_examples(rows_of):
    # of harmless ones only refused are left
    lines = [line for line in processed() if line["id"][-1] not in "45789"]
    assert {row.source for row in rows_of("A5", 0, lines)} == {"feedback", "replay"}
    assert not any(row.id.endswith("6") for row in rows_of("A8", 0, lines))


def test_without_feedback_there_is_nothing_to_train(rows_of):
    with pytest.raises(
        UserError, match="none of 12 prompts passed the guard and had its responses blocked"
    ):
        rows_of("A8", 0, [line for line in processed() if line["id"][-1] in "06"])


# ------------------------------------------------------------------------------------------------ training


def fitted(guard, rows, folder, weight=0.0, **changes):
    """P(unsafe) of rows after training on them."""
    encoder, config = formats.Encoder(guard, 600), changes.pop("config")
    model = guard.model.model
    prompts = [row["input_ids"][: row["labels"].count(-100)] for row in rows]
    job = train.Job(arms.arm("A4"), 0, [], folder, "x")
    args = train.training_arguments(job, config)
    adapted = train.add_adapters(model, config)
    train.fitted(adapted, args, rows, encoder, weight)
    found = formats.verdict_probabilities(model, prompts, encoder.tokens)
    adapted.unload()
    model.__dict__.pop("forward", None)
    return found


@pytest.mark.slow
def test_soft_targets_move_the_probability_to_q(guard, settings, tmp_path):
    config = settings(max_steps=120, batch_size=6, lora_dropout=0.0, save_steps=1000)
    encoder = formats.Encoder(guard, 600)
    targets = [0.75, 0.25, 1.0, 0.0, 0.5, 0.9]
    rows, _ = encoder.rows(
        [pair(text * 3) for text in ("rice ", "box ", "cook ", "his ", "How ", "Take ")], targets
    )
    for row in rows:
        row["g0"] = formats.NOTHING
    before = formats.verdict_probabilities(
        guard.model.model,
        [row["input_ids"][: row["labels"].count(-100)] for row in rows],
        encoder.tokens,
    )
    after = fitted(guard, rows, tmp_path / "arm", config=config)
    assert max(abs(p - q) for p, q in zip(before, targets, strict=True)) > 0.3
    assert max(abs(p - q) for p, q in zip(after, targets, strict=True)) < 0.1


@pytest.mark.slow
def test_kl_holds_safe_traffic_near_the_guard(settings, guard):
    """Mean |P - P before| over the safe rows of A5, with and without the penalty."""
    drift = {}
    for weight, name in ((None, "A5"), (0.3, "A7"), (10.0, "A7")):
        config = settings(
            arms=[name],
            max_steps=40,
            kl_weight=weight or 0.3,
            output_dir=f"{settings().training.output_dir}{weight}",
        )
        (folder,) = train.train(config)
        rows = [
            json.loads(line)
            for line in (folder / "training_examples.jsonl").read_text().splitlines()
        ]
        safe = [
            row["messages"]
            for row in rows
            if row["source"] in ("safe", "replay") and row["target"] == 0
        ]
        encoder = formats.Encoder(guard, 600)
        before = formats.verdict_probabilities(
            guard.model.model, guard.prompt_ids(safe), encoder.tokens
        )
        trained = load_guard(
            config.llama_guard.base_model_path, adapter=str(folder), progress=False
        )
        after = formats.verdict_probabilities(
            trained.model.model, guard.prompt_ids(safe), encoder.tokens
        )
        drift[weight] = sum(abs(a - b) for a, b in zip(after, before, strict=True)) / len(safe)
    assert drift[10.0] < 0.5 * drift[None] and drift[10.0] < drift[0.3] <= drift[None] * 1.05, drift


@pytest.mark.slow
def test_every_arm_trains_and_loads(settings, guard, base):
    """One run; a second does nothing; an adapter is the same whichever arms were trained before it."""
    names = ["A2", "A2-parser", "A2-format", "A2-mask", "A3", "A8", "C4"]
    config = settings(arms=names, seeds=[0, 1], max_steps=2, lora_last_layers=1, max_length=900)
    before = {name: tensor.clone() for name, tensor in guard.model.model.state_dict().items()}
    folders = train.train(config)
    assert len(folders) == 14 and len(set(folders)) == 10
    assert not list(Path(config.training.output_dir).rglob("checkpoint-*"))
    assert not list(Path(config.training.output_dir).rglob("unfinished.json"))
    stamp = {folder: (folder / "guard.json").stat().st_mtime_ns for folder in folders}
    assert train.train(config) == folders
    assert stamp == {folder: (folder / "guard.json").stat().st_mtime_ns for folder in folders}
    assert difference(before, guard.model.model.state_dict()) == 0
    a8 = arms.arm_folder(config, "A8", 0)
    assert arms.arm_folder(config, "A2-format", 1) == arms.arm_folder(config, "A2", 1)
    assert {name.split("layers.")[1].split(".")[0] for name in weights(a8)} == {"2"} and len(
        weights(a8)
    ) == 14
    alone = replace(
        config,
        training=replace(config.training, arms=("A8",), seeds=(0,), output_dir=str(a8) + "x"),
    )
    # frozen layers: in other batches
    assert difference(weights(train.train(alone)[0]), weights(a8)) < 1e-5
    assert difference(weights(a8), weights(arms.arm_folder(config, "A8", 1))) > 0
    card, run = read(a8 / "guard.json"), read(a8 / "run.json")
    assert (card["kind"], card["guard"], card["arm"], card["seed"]) == (
        "generative",
        "llama-guard",
        "A8",
        0,
    )
    assert run["sources"]["feedback"] == 12 and run["rows"] == len(
        (a8 / "training_examples.jsonl").open().readlines()
    )
    assert read(arms.arm_folder(config, "A2", 0) / "run.json")["legacy_collection"] == "empty"
    assert "whole method" in (a8 / "README.md").read_text()

    stock, tokenizer = (
        AutoPeftModelForCausalLM.from_pretrained(a8).eval(),
        AutoTokenizer.from_pretrained(a8),
    )
    trained = load_guard(str(base), adapter=str(a8), progress=False)
    (ids,) = trained.prompt_ids([CONVERSATIONS[0]])
    text = tokenizer.apply_chat_template(CONVERSATIONS[0], tokenize=False)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    tokens = formats.Encoder(trained, 600).tokens
    with torch.no_grad():
        logits = stock(torch.tensor([ids])).logits[0, -1]
    (p,) = formats.verdict_probabilities(trained.model.model, [ids], tokens)
    assert p == pytest.approx(formats.log_odds(logits, tokens).sigmoid().item(), abs=1e-4)
    (verdict,) = trained.judge([CONVERSATIONS[0]])
    assert verdict.error or verdict.prompt_unsafe == pytest.approx(p, abs=1e-4)

    with pytest.raises(UserError, match="trained on other rows or with other settings; remove it"):
        train.train(replace(config, training=replace(config.training, learning_rate=1e-3)))


@pytest.mark.slow
def test_arms_on_one_base_say_what_each_says_when_loaded_alone(settings, base):
    config = settings(arms=["A4", "A8"], lora_last_layers=1, max_length=900)
    texts = [GOOD.format(1), BAD.format(2), *(c[0]["content"] for c in CONVERSATIONS)]
    together = shared_base.SharedBase(config, [Namespace(text=text) for text in texts])
    found = []
    for folder in train.train(config):
        line = Namespace(folder=folder, probe=False, query="guard")
        assert together.serves(line) and not together.serves(Namespace(folder=None))
        found += together.said(line, texts)
        together.let_go()
        alone = load_guard(str(base), adapter=str(folder), progress=False).judge(
            [pair(text) for text in texts]
        )
        for told, verdict in zip(found[-len(texts) :], alone, strict=True):
            assert told["score"] == pytest.approx(verdict.prompt_unsafe, abs=1e-4)
            assert (
                told["decided"] == verdict.decided.get("prompt_unsafe")
                and told["error"] == verdict.error
            )
    assert [one["score"] for one in found[: len(texts)]] != [
        one["score"] for one in found[len(texts) :]
    ]


def test_a_probe_on_the_frozen_guard_tells_what_it_was_fitted_to(settings, guard):
    (folder,) = train.train(settings(arms=["C4"]))
    rows = [
        json.loads(line) for line in (folder / "training_examples.jsonl").read_text().splitlines()
    ]
    scores = probe.probe_scores(guard, folder, [row["messages"] for row in rows])
    high, low = (
        [s for s, row in zip(scores, rows, strict=True) if (row["target"] >= 0.5) is side]
        for side in (True, False)
    )
    assert sum(high) / len(high) > 0.15 + sum(low) / len(low) and all(0 <= s <= 1 for s in scores)
    assert read(folder / "guard.json")["kind"] == "probe"
    with pytest.raises(UserError, match="no probe"):
        probe.probe_scores(guard, folder.parent, [CONVERSATIONS[0]])


@pytest.mark.slow
def test_killed_and_resumed_is_uninterrupted(settings, monkeypatch):
    """Of two arms the second is killed after its second checkpoint; what it had is not done again."""
    options = {"arms": ["A4", "A8"], "max_steps": 6, "save_steps": 2, "lora_last_layers": 2}
    whole = train.train(settings(**options))
    steps, step = [], train.ArmTrainer.training_step

    def killed(self, *args, **kwargs):
        if len(steps) == 11:
            raise KeyboardInterrupt
        steps.append(self.state.global_step)
        return step(self, *args, **kwargs)

    config = settings(**options, output_dir=settings().training.output_dir + "-again")
    monkeypatch.setattr(train.ArmTrainer, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train.train(config)
    a4, a8 = (arms.arm_folder(config, name, 0) for name in ("A4", "A8"))
    assert (a4 / "guard.json").is_file() and not (a8 / "guard.json").exists()
    assert (a8 / "checkpoint-4/trainer_state.json").is_file()
    monkeypatch.setattr(
        train.ArmTrainer,
        "training_step",
        lambda self, *a, **k: steps.append(0) or step(self, *a, **k),
    )
    again = train.train(config)
    assert len(steps) == 11 + 2
    for one, other in zip(whole, again, strict=True):
        assert difference(weights(one), weights(other)) == 0 and read(one / "guard.json") == read(
            other / "guard.json"
        )
        losses = [
            [e["loss"] for e in read(f / "run.json")["log"] if "loss" in e] for f in (one, other)
        ]
        assert losses[0] == losses[1]


def test_checkpoints_of_other_settings_are_not_resumed(settings):
    """Nor are they removed unasked, which would cost somebody the hours that are in them."""
    config = settings(
        max_steps=4, save_steps=2, output_dir=settings().training.output_dir + "-kept"
    )
    (folder,) = train.train(config)
    shutil.move(folder / "guard.json", folder / "unfinished.json")
    (folder / "unfinished.json").write_text('{"fingerprint": "of another run"}')
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2/trainer_state.json").write_text("{}")
    with pytest.raises(
        UserError,
        match="holds checkpoint-2 of other rows or settings; remove it, or choose another",
    ):
        train.train(config)
    assert (folder / "checkpoint-2/trainer_state.json").is_file()


def test_what_a_user_put_into_an_arms_folder_stays(settings):
    config = settings(
        max_steps=2, save_steps=1, output_dir=settings().training.output_dir + "-mine"
    )
    folder = arms.arm_folder(config, config.training.arms[0], 0)
    (folder / "checkpoint-merged").mkdir(parents=True)
    (folder / "checkpoint-merged/model.safetensors").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    assert train.train(config) == [folder]
    assert (folder / "checkpoint-merged/model.safetensors").read_text() == "mine"
    assert (folder / "notes.txt").read_text() == "mine" and not list(
        folder.glob("checkpoint-[0-9]*")
    )


# ------------------------------------------------------------------------------------------------ head start


def labelled(path: Path, count: int = 80) -> Path:
    rows = []
    for i in range(count):
        bad = i % 3 == 0
        row = {"prompt": (BAD if bad else GOOD).format(i), "prompt_label": ("safe", "unsafe")[bad]}
        if i % 2:
            row |= {
                "response": f"{'The letters' if bad else 'rice'} {i}",
                "response_label": row["prompt_label"],
            }
        rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def head_start(plain, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "train", train)

    def make(**changes):
        values = {
            "base_model": str(plain),
            "data": (str(labelled(tmp_path / "guard.jsonl")),),
            "max_steps": 40,
        }
        values |= {"output_dir": str(tmp_path / "small"), "batch_size": 8, "learning_rate": 5e-3}
        return config_.PrepareGuard(**(values | changes))

    return make


@pytest.mark.slow
def test_a_head_start_leaves_a_guard_that_stock_libraries_load(head_start, tmp_path):
    prepare.prepare(config_.Config(prepare=config_.Prepare(guard=head_start())))
    folder = tmp_path / "small"
    card, run = read(folder / "guard.json"), read(folder / "run.json")
    assert (card["kind"], card["guard"]) == ("generative", "llama-guard") and not list(
        folder.glob("checkpoint-*")
    )
    assert card["thresholds"]["prompt_unsafe"]["on"].startswith("0.15 of ")
    losses = [entry["loss"] for entry in run["log"] if "loss" in entry]
    assert losses[-1] < 0.3 * losses[0]
    guard = load_guard(str(folder), progress=False)
    assert guard.thresholds == card["thresholds"]
    fresh = [
        pair(GOOD.format(777)),
        pair(BAD.format(778)),
        pair(BAD.format(779), "The letters 779"),
    ]
    verdicts = guard.judge(fresh)
    assert [v.error for v in verdicts] == [None] * 3
    assert (
        verdicts[0].prompt_unsafe < 0.5 < verdicts[1].prompt_unsafe
        and verdicts[2].response_unsafe > 0.5
    )
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    inputs = tokenizer.apply_chat_template(fresh[1], return_tensors="pt", return_dict=True)
    said = tokenizer.decode(
        model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
    )
    assert said.strip() == "unsafe<|endoftext|>" and legacy.parse_verdict(said) is True
    stamp = (folder / "guard.json").stat().st_mtime_ns
    prepare.make_guard(head_start())
    assert (folder / "guard.json").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="holds another guard"):
        prepare.make_guard(head_start(seed=1))


def test_a_head_start_of_a_replaced_base_is_another_guard(head_start, plain, tmp_path, monkeypatch):
    """A base that was touched or copied is the same; the training itself is not what is asked here."""
    base = Path(shutil.copytree(plain, tmp_path / "base"))

    class Trains(Exception):
        pass

    def trains(base_model, folder):
        raise Trains

    made_of = []

    def noted(*values):
        made_of.append(digest(*values))
        return made_of[-1]

    monkeypatch.setattr(prepare, "load_encoder", trains)
    monkeypatch.setattr(prepare.keep, "digest", noted)

    def make(folder):
        with pytest.raises(Trains):
            prepare.make_guard(head_start(base_model=str(folder)))

    make(plain)
    for path in base.iterdir():
        path.touch()
    make(base)
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    make(base)
    assert made_of[0] == made_of[1] != made_of[2]


@pytest.mark.slow
def test_a_killed_head_start_goes_on(head_start, tmp_path, monkeypatch):
    options = {"max_steps": 24}
    prepare.make_guard(head_start(**options, output_dir=str(tmp_path / "whole")))
    step = train.ArmTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == 22:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(train.ArmTrainer, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare.make_guard(head_start(**options))
    assert (tmp_path / "small/checkpoint-20").is_dir() and not (
        tmp_path / "small/guard.json"
    ).exists()
    monkeypatch.setattr(train.ArmTrainer, "training_step", step)
    prepare.make_guard(head_start(**options))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "small"))
    assert difference(one, other) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ("toxicchat:test",)}, "toxicchat:test is a test set"),
        ({"base_model": "nowhere/nothing"}, "field base_model: nowhere/nothing"),
    ],
)
def test_what_a_head_start_refuses(head_start, changes, message):
    with pytest.raises(UserError, match=message):
        prepare.make_guard(head_start(**changes))
