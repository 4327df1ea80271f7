"""examples/feedback_guard: configs, what is looked at before any work, and splits."""

import json
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace as Namespace

import families
import pytest
from feedback_rows import config_writer, prompts, save_models, write
from scripts import EXAMPLES, module

from common.conversation import UserError

RECIPE = EXAMPLES / "feedback_guard"
config_ = module("feedback_guard", "config")
records = module("feedback_guard", "records")
process, full = module("feedback_guard", "process"), module("feedback_guard", "full")
ORIGINAL = {  # of the original's research_config.json
    "seed": 42,
    "mode": "process",
    "dataset": {
        "path": "lmsys/toxic-chat",
        "config": "toxicchat0124",
        "split_ratios": {"train": 0.7, "test": 0.15, "validation": 0.15},
        "store_dir": "./data/dataset",
    },
    "llama_guard": {
        "default_model_path": "meta-llama/LlamaGuard-7b",
        "base_model_path": "meta-llama/LlamaGuard-7b",
        "use_official_template": True,
    },
    "llama": {
        "model_path": "mistralai/Mistral-7B-Instruct-v0.3",
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 1024,
    },
    "training": {
        "output_dir": "./models/improved",
        "batch_size": 4,
        "gradient_accumulation_steps": 4,
        "learning_rate": 1e-5,
        "epochs": 3,
        "logging_steps": 10,
        "save_steps": 100,
        "save_total_limit": 3,
        "weight_decay": 0.01,
        "warmup_steps": 100,
    },
    "evaluation": {
        "improved_model_path": "",
        "results_dir": "./results/evaluation",
        "max_eval_samples": 1000,
    },
    "experiment": {
        "process_split": "train",
        "process_sample_size": 5000,
        "results_dir": "./results/experiment",
    },
}


@pytest.fixture
def write_config(tmp_path):
    return config_writer(tmp_path, dict.fromkeys(("guard", "judge", "assistant"), Path("nowhere")))


# ------------------------------------------------------------------------------------------------------------ configs


def test_every_key_of_the_original_is_there_with_its_value():
    config = config_.load_config(RECIPE / "research_config.json")
    values = config.as_dict()

    def holds(ours, theirs) -> None:
        for key, value in theirs.items():
            if isinstance(value, dict):
                holds(ours[key], value)
            else:
                assert ours[key] == value, key

    holds(values, ORIGINAL)
    holds(config_.Config().as_dict(), ORIGINAL)  # what a file leaves out
    file = json.loads((RECIPE / "research_config.json").read_text())
    assert {k: set(v) for k, v in file.items() if isinstance(v, dict)} == {
        k: set(v) for k, v in values.items() if isinstance(v, dict)
    }


def test_the_originals_own_file_is_a_config(tmp_path):
    path = tmp_path / "research_config.json"
    path.write_text(json.dumps(ORIGINAL))
    assert config_.load_config(path) == config_.Config()


@pytest.mark.parametrize("name", ["quickstart", "study", "study_assistant"])
def test_shipped_configs_load(name):
    config = config_.load_config(RECIPE / "configs" / f"{name}.json")
    where = [config.dataset.store_dir, config.training.output_dir, config.evaluation.results_dir]
    assert all(
        path.startswith(f"output/{name}/") for path in [*where, config.experiment.results_dir]
    )
    assert config.llama_guard.default_model_path == config.prepare.guard.output_dir
    assert len(config.training.seeds_of("A8")) == (1 if name == "quickstart" else 3)
    assert config.training.seeds_of("A4") == (0,)


def test_values_can_be_set_from_the_command_line():
    changes = [
        "training.arms=A4,C1",
        "training.seeds=[1, 2]",
        "training.learning_rate=1e-4",
        "llama.use_recorded=true",
    ]
    changes += [
        "evaluation.max_eval_samples=null",
        "prepare.judge=null",
        "training.headline.arms=C1",
        "seed=7",
    ]
    changes += [
        "dataset.split_ratios.train=0.6",
        "dataset.path=123",
        "dataset.split_ratios.test=0.25",
    ]
    config = config_.load_config(RECIPE / "configs" / "study.json", changes)
    assert (
        config.training.arms == ("A4", "C1")
        and config.training.seeds == (1, 2)
        and config.seed == 7
    )
    assert (
        config.training.learning_rate == 1e-4
        and config.llama.use_recorded
        and config.dataset.path == "123"
    )
    assert config.evaluation.max_eval_samples is None and config.prepare.judge is None
    assert config.training.seeds_of("C1") == (0, 1, 2) and config.training.seeds_of("A4") == (1, 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("training.learning_rat=1", "learning_rat is an unknown key; the nearest known one is training.learning_rate"),
        ("trainin.epochs=1", "trainin is an unknown key; the nearest known one is training"),
        ("training.epochs", "expected section.key=value"),
        ("training.batch_size=1.5", "training.batch_size: expected int, found 1.5"),
        ("training.batch_size=true", "training.batch_size: expected int, found True"),
        ("training.batch_size=0", "training.batch_size: expected above 0, found 0"),
        ("training.learning_rate=NaN", "training.learning_rate: expected above 0"),
        ("training.arms=A4,A4", "training.arms: expected one or more, each once"),
        ("training.arms=[]", "training.arms: expected one or more"),
        ("training.seeds=a", "training.seeds: expected int, found 'a'"),
        ("training.headline.arms=A7", "A7 is not among training.arms"),
        ("llama.use_recorded=yes", "llama.use_recorded: expected bool"),
        ("llama.engine=vlm", "llama.engine: 'vlm' is none of transformers, vllm, server"),
        ("llama.engine=server", "llama.server_url: the engine server needs it"),
        ("llama.top_p=0", "llama.top_p: expected above 0 to 1"),
        ("llama.temperature=0", "temperature 0 gives one response; set samples to 1"),
        ("dataset.split_ratios.train=0.9", "split_ratios: train, test and validation must add up to 1"),
        ("experiment.process_split=dev", "process_split: expected train, found 'dev'"),
        ("experiment.process_split=test", "expected train, found 'test'; thresholds come from validation and results"),
        ("experiment.process_split=validation", "process_split: expected train, found 'validation'"),
        ("training.seeds=-1", "training.seeds: expected 0 or more, found -1"),
        ("training.headline.seeds=0,-2", "training.headline.seeds: expected 0 or more, found -2"),
        ("training.lora_dropout=1", "training.lora_dropout: expected below 1, found 1.0"),
        ("experiment.explore_share=2", "explore_share: expected 0 to 1"),
        ("evaluation.t2_label=judge", "evaluation.judge: t2_label judge needs a guard that judges"),
        ("evaluation.t2_label=human", "human labels are of recorded responses; set llama.use_recorded=true"),
        ("mode=run", "mode: 'run' is none of process, train, evaluate, full"),
        ("seed=-1", "seed: expected 0 or more"),
        ("prepare.guard.max_steps=0.5", "prepare.guard.base_model: missing"),
    ],
)  # fmt: skip
def test_bad_values_are_said_in_one_line(change, said, write_config):
    path = write_config(
        evaluation={"judge": ""}, training={"arms": ["A4", "A8"], "headline": {"arms": ["A8"]}}
    )
    with pytest.raises(UserError) as error:
        config_.load_config(path, [change])
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ("{", "bad.json, column 2: malformed JSON"),
        ("[]", "expected an object, found []"),
        ('{"sed": 1}', "field sed: unknown key; the nearest known one is seed"),
        (
            '{"llama": {"max_token": 1}}',
            "field llama.max_token: unknown key; the nearest known one is llama.max_tokens",
        ),
        ('{"llama": 3}', "field llama: expected an object, found 3"),
        ('{"training": {"arms": "A4"}}', "field training.arms: expected a list, found 'A4'"),
    ],
)
def test_bad_files_are_said_in_one_line(values, said, tmp_path):
    (tmp_path / "bad.json").write_text(values)
    with pytest.raises(UserError) as error:
        config_.load_config(tmp_path / "bad.json")
    assert said in str(error.value)


def test_the_command_line(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(
        sys,
        "argv",
        ["full.py", "train", "--set", "seed=3", "training.arms=A4", "--set", "llama.samples=1"],
    )
    config = config_.config_from_argv(stages=config_.STAGES)
    assert (config.mode, config.seed, config.training.arms, config.llama.samples) == (
        "train",
        3,
        ("A4",),
        1,
    )
    assert "quickstart.json" in caplog.text and "--config research_config.json" in caplog.text
    monkeypatch.setattr(sys, "argv", ["full.py", "--config", str(RECIPE / "research_config.json")])
    assert config_.config_from_argv(stages=config_.STAGES).mode == "process"
    monkeypatch.setattr(sys, "argv", ["process.py", "--confi", "x"])
    with pytest.raises(UserError, match="--confi"):
        config_.config_from_argv()


# ---------------------------------------------------------------------------------------------------- before any work


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def whole_config(tmp_path, models):
    return config_writer(tmp_path, models)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "llama_guard.default_model_path=nowhere/guard",
            r"llama_guard\.default_model_path: nowhere/guard is neither",
        ),
        (
            "llama_guard.base_model_path={assistant}",
            r"llama_guard\.base_model_path: .* nor a guard of",
        ),
        (
            "llama_guard.base_model_path=llama-guard-3-1b",
            r"meta-llama/Llama-Guard-3-1B: .*hf auth login",
        ),
        ("evaluation.judge=nowhere/judge", r"evaluation\.judge: nowhere/judge: "),
        ("llama.model_path=nowhere/chat", r"llama\.model_path nowhere/chat: "),
        (
            "evaluation.hard_benign=nowhere.jsonl",
            r"evaluation\.hard_benign: nowhere\.jsonl: no such file",
        ),
        ("evaluation.extra=harmbench", r"evaluation\.extra: harmbench"),
        (
            'prepare={"judge": {"base_model": "nowhere/x", "data": [], "output_dir": "j"}}',
            r"prepare\.judge\.base_model",
        ),
        ("training.arms=A4,A9", "A9"),
    ],
)
def test_a_config_that_would_stop_later_stops_before_anything(
    change, said, whole_config, models, tmp_path
):
    for name, folder in models.items():
        change = change.replace(f"{{{name}}}", str(folder))
    with pytest.raises(UserError, match=said) as error:
        process.process(config_.load_config(whole_config(), [change]))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_what_is_not_needed_here_need_not_be_here(whole_config, tmp_path):
    """A guard that prepare will make, one that a server has, an assistant whose responses are
    recorded.
    """
    small = {
        "base_model": str(tmp_path / "small"),
        "data": [str(tmp_path / "rows" / "train.jsonl")],
    }
    asked = "prepare=" + json.dumps({"guard": small | {"output_dir": "made"}})
    path = whole_config(
        llama_guard={"default_model_path": "made", "base_model_path": "made"},
        evaluation={"judge": ""},
    )
    served = [
        "llama_guard.engine=server",
        "llama_guard.server_url=http://x/v1",
        "llama.use_recorded=true",
    ]
    with pytest.raises(UserError, match=r"prepare\.guard\.base_model"):
        process.preflight(config_.load_config(path, [asked]))
    families.save(tmp_path / "small", "llama2", ("safe", "unsafe"), 3)
    process.preflight(config_.load_config(path, [asked]))
    path = whole_config(
        llama_guard={"default_model_path": "llama-guard"}, llama={"model_path": "nowhere"}
    )
    process.preflight(config_.load_config(path, served))
    with pytest.raises(UserError, match=r"field llama_guard\.default_model_path"):
        process.preflight(config_.load_config(path, served[2:]))


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        (
            {"toxicity": 0},
            {},
            "all 51 prompts of train are safe, nothing can be learned or measured; name data with",
        ),
        ({}, {"toxicity": 1}, "all 20 prompts of test are unsafe"),
        (
            {"model_output": None},
            {},
            r"no prompt of train has a recorded response; set llama\.use_recorded=false",
        ),
        (
            {},
            {"output_unsafe": None},
            r"no prompt of test has a human label of its response; set evaluation\.t2_label",
        ),
    ],
)
def test_data_that_cannot_tell_stop_before_anything(train, test, said, whole_config, tmp_path):
    rows = {
        "train": [row | train for row in prompts(60)],
        "test": [row | test for row in prompts(20, 60)],
    }
    path = whole_config(
        dataset={"path": str(write(tmp_path / "odd", **rows)), "store_dir": str(tmp_path / "run")}
    )
    with pytest.raises(UserError, match=said):
        process.process(
            config_.load_config(path, ["llama.use_recorded=true", "evaluation.t2_label=human"])
        )
    assert not (tmp_path / "run").exists()


def test_prepare_is_asked_whenever_the_config_has_it(whole_config, monkeypatch, tmp_path):
    """It alone knows whether what is there is what the config asks for; a typo stops before it."""
    small = {"base_model": "nowhere/x", "data": [], "output_dir": str(tmp_path / "small")}
    path, called = whole_config(prepare={"guard": small}), []
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "guard.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["process.py", "--config", str(path)])
    monkeypatch.setattr(
        process.subprocess, "run", lambda command: called.append(command) or Namespace(returncode=2)
    )
    with pytest.raises(UserError, match=r"prepare\.guard\.base_model: nowhere/x"):
        process.main()
    assert called == []
    monkeypatch.setattr(process, "preflight", lambda config: None)
    with pytest.raises(UserError, match=r"prepare\.py failed"):
        process.main()
    assert called[0][1].endswith("prepare.py") and called[0][2:] == ["--config", str(path)]


def test_the_manifest_says_whose_seconds_it_holds(tmp_path):
    config = config_.Config()
    for name, section in (("evaluation", config.evaluation), ("experiment", config.experiment)):
        config = replace(config, **{name: replace(section, results_dir=str(tmp_path / name))})
    config = replace(config, dataset=replace(config.dataset, store_dir=str(tmp_path)))
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "results.json").write_text(
        '{"improved_model_path": "x", "summary": {}, "verdict": {}}'
    )
    for name in ("results.md", "precision_recall.png"):
        (tmp_path / "evaluation" / name).write_text(name)
    (tmp_path / "process_stats.json").write_text("{}")
    full.finish(config, {"process": 1.0, "train": 2.0, "evaluate": 3.0}, time.time() - 6)
    made = json.loads((tmp_path / "experiment" / "manifest.json").read_text())
    assert {"process": 1.0, "train": 2.0, "evaluate": 3.0}.items() < made[
        "seconds_of_this_run"
    ].items()
    assert made["seconds_of_this_run"]["total"] == pytest.approx(6, abs=1) and "stages" not in made
    assert (tmp_path / "experiment" / "precision_recall.png").read_text() == "precision_recall.png"


# ------------------------------------------------------------------------------------------------------------- splits


def splits_of(path: Path, *overrides: str) -> dict[str, list[dict]]:
    config = config_.load_config(path, overrides)
    records.make_splits(config)
    return {split: records.read_split(config, split) for split in config_.SPLITS}


def test_official_splits_stay_and_validation_is_a_stratified_share_of_train(write_config):
    parts = splits_of(write_config())
    assert {split: len(rows) for split, rows in parts.items()} == {
        "train": 51,
        "validation": 9,
        "test": 20,
    }
    assert [row["id"] for row in parts["test"]] == [f"r{i}" for i in range(60, 80)]
    assert Counter(row["label"] for row in parts["validation"]) == {"safe": 7, "unsafe": 2}
    first = parts["test"][0]
    assert first == {
        **{
            "id": "r60",
            "input": prompts(1, 60)[0]["user_input"],
            "label": "unsafe",
            "reason": "[]",
        },
        **{
            "model_output": prompts(1, 60)[0]["model_output"],
            "output_unsafe": True,
            "kind": "plain",
        },
    }


def test_resplit_takes_all_by_ratios(write_config):
    ratios = {"train": 0.5, "test": 0.25, "validation": 0.25}
    rows = splits_of(
        write_config(), "dataset.resplit=true", f"dataset.split_ratios={json.dumps(ratios)}"
    )
    assert {split: len(part) for split, part in rows.items()} == {
        "train": 40,
        "validation": 20,
        "test": 20,
    }
    assert {split: Counter(r["label"] for r in part)["unsafe"] for split, part in rows.items()} == {
        **{"train": 8, "validation": 4, "test": 4}
    }


def test_near_duplicates_stand_on_one_side(tmp_path, write_config):
    rows = prompts(40)
    again = [
        row | {"conv_id": f"x{i}", "user_input": f" {row['user_input'].upper()}!!"}
        for i, row in enumerate(rows)
    ]
    data = write(
        tmp_path / "twice", train=rows + again[:30], test=[*prompts(10, 40), *again[30:34]]
    )
    known = write(tmp_path / "guard", rows=[rows[39]]) / "rows.jsonl"
    parts = splits_of(
        write_config(
            dataset={"path": str(data), "store_dir": str(tmp_path / "s"), "guard_path": str(known)}
        )
    )
    keys = {
        split: {records.text_key(row["input"]) for row in part} for split, part in parts.items()
    }
    assert (
        len(parts["test"]) == 14
        and not keys["train"] & keys["test"]
        and not keys["validation"] & keys["train"]
    )
    # four also in test, one known to the guard
    assert len(parts["train"]) + len(parts["validation"]) == 70 - 4 - 1
    left_out = json.loads((tmp_path / "s" / "splits.json").read_text())["left_out"]
    assert left_out == {"seen by the guard in its training": 1, "also in test": 4}


def test_rows_of_other_formats(tmp_path, write_config):
    plain = [
        {"prompt": f"May I {i}?", "prompt_label": ("safe", "unsafe")[i % 2], "response": "Yes."}
        for i in range(10)
    ]
    own = [{"input": f"Why {i}?", "label": "safe", "model_output": None} for i in range(10)]
    chat = [
        {"messages": [{"role": "user", "content": f"Who {i}?"}], "prompt_unsafe": True}
        for i in range(10)
    ]
    data = write(tmp_path / "mixed", rows=[*plain, *own, *chat]) / "rows.jsonl"
    parts = splits_of(write_config(dataset={"path": str(data), "store_dir": str(tmp_path / "s")}))
    rows = [row for part in parts.values() for row in part]
    assert Counter(
        (row["input"].split()[0], row["label"], row["model_output"]) for row in rows
    ) == {
        **{("May", "safe", "Yes."): 5, ("May", "unsafe", "Yes."): 5},
        **{("Why", "safe", None): 10, ("Who", "unsafe", None): 10},
    }
    assert len({row["id"] for row in rows}) == 30


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"user_input": "a", "toxicity": None}, "line 1: says not whether the prompt is unsafe"),
        ({"user_input": "a", "toxicity": 3}, "field toxicity: unknown label 3"),
        ({"user_input": "a", "toxicity": 0, "kind": 1}, "field kind: expected text"),
        ({"text": "a"}, "field prompt: missing"),
        (
            {
                "messages": [
                    {"role": role, "content": "a"} for role in ("user", "assistant", "user")
                ],
                "prompt_unsafe": 1,
            },
            "expected one prompt",
        ),
    ],
)
def test_bad_rows_are_said_in_one_line(row, said, tmp_path, write_config):
    data = write(tmp_path / "bad", rows=[row]) / "rows.jsonl"
    with pytest.raises(UserError) as error:
        splits_of(write_config(dataset={"path": str(data), "store_dir": str(tmp_path / "s")}))
    assert said in str(error.value) and not (tmp_path / "s" / "train.jsonl").exists()


def test_splits_made_otherwise_are_not_taken(write_config):
    path = write_config()
    before = splits_of(path)
    assert splits_of(path) == before
    with pytest.raises(UserError, match="holds splits of other data, seed or ratios"):
        splits_of(path, "seed=1")


def test_what_is_not_there_yet_names_the_command(write_config):
    config = config_.load_config(write_config())
    for read in (records.read_split, records.read_processed):
        with pytest.raises(UserError, match=r"not there yet; run process\.py"):
            read(config, "train")
