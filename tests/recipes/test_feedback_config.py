"""examples/feedback_guard: configs, what is looked at before any work, and splits."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import families
import feedback_rows
import pytest
from checks import read_json, user_error
from feedback_rows import config_writer, prompts, write
from scripts import EXAMPLES, module

from common.data import near_copies

models = feedback_rows.models  # a fixture
RECIPE = EXAMPLES / "feedback_guard"
config_ = module("feedback_guard", "config")
records = module("feedback_guard", "records")
process = module("feedback_guard", "process")
ORIGINAL = json.loads("""{
  "seed": 42, "mode": "process",
  "dataset": {"path": "lmsys/toxic-chat", "config": "toxicchat0124", "store_dir": "./data/dataset",
    "split_ratios": {"train": 0.7, "test": 0.15, "validation": 0.15}},
  "llama_guard": {"default_model_path": "meta-llama/LlamaGuard-7b",
    "base_model_path": "meta-llama/LlamaGuard-7b", "use_official_template": true},
  "llama": {"model_path": "mistralai/Mistral-7B-Instruct-v0.3", "temperature": 0.7, "top_p": 0.9,
    "max_tokens": 1024},
  "training": {"output_dir": "./models/improved", "batch_size": 4, "learning_rate": 1e-5,
    "gradient_accumulation_steps": 4, "epochs": 3, "logging_steps": 10, "save_steps": 100,
    "save_total_limit": 3, "weight_decay": 0.01, "warmup_steps": 100},
  "evaluation": {"improved_model_path": "", "results_dir": "./results/evaluation",
    "max_eval_samples": 1000},
  "experiment": {"process_split": "train", "process_sample_size": 5000,
    "results_dir": "./results/experiment"}
}""")


@pytest.fixture
def write_config(tmp_path):
    return config_writer(tmp_path, dict.fromkeys(("guard", "judge", "assistant"), Path("nowhere")))


# --- configs --------------------------------------------------------------------------------------


def holds(ours: dict, theirs: dict) -> bool:
    """Whether every value of `theirs` is there in `ours`."""
    for key, value in theirs.items():
        if isinstance(value, dict):
            if not holds(ours[key], value):
                return False
        elif ours[key] != value:
            return False
    return True


def test_every_key_of_the_original_is_there_with_its_value(tmp_path):
    own = tmp_path / "research_config.json"
    own.write_text(json.dumps(ORIGINAL))
    assert config_.load_config(own) == config_.Config()
    assert holds(config_.Config().as_dict(), ORIGINAL)
    assert holds(config_.load_config(RECIPE / "research_config.json").as_dict(), ORIGINAL)


@pytest.mark.parametrize("name", ["quickstart", "study", "study_assistant", "do_not_answer"])
def test_shipped_configs_load(name):
    config = config_.load_config(RECIPE / "configs" / f"{name}.json")
    assert config.llama_guard.default_model_path == config.prepared()["guard"].output_dir
    assert len(config.training.seeds_of("A8")) == (1 if name == "quickstart" else 3)
    assert config.training.seeds_of("A4") == (0,)


def test_the_default_arms_leave_the_originals_single_switches_out():
    assert "A2" in config_.DEFAULT_ARMS
    assert not any(arm.startswith("A2-") for arm in config_.DEFAULT_ARMS)


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("training.arms=A8,C1", ("A8", "C1")),
        ("training.arms=C1", ("C1",)),
        ("training.seeds=[1, 2]", (1, 2)),
        ("training.seeds=1,2", (1, 2)),
        ("training.seeds=3", (3,)),
        ("training.learning_rate=1", 1.0),
        ("llama.use_recorded=true", True),
        ("evaluation.max_eval_samples=null", None),
        ("evaluation.judge=", ""),
        ("training.headline.arms=C1", ("C1",)),
        ("prepare.judge=null", None),
        ("dataset.path=a=b", "a=b"),
    ],
)
def test_values_can_be_set_from_the_command_line(change, value):
    changes = ["training.headline=null", "evaluation.t2_label=guard", change]
    found = config_.load_config(RECIPE / "configs" / "study.json", changes)
    for name in change.partition("=")[0].split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("training.learning_rat=1", "field training.learning_rat: unknown key"),
        ("trainin.epochs=1", "field trainin: unknown key"),
        ("training.epochs", "expected section.key=value"),
        ("training.batch_size=true", "training.batch_size: Input should be a valid integer"),
        ("training.batch_size=0", "training.batch_size: Input should be greater than 0, found 0"),
        ("training.learning_rate=NaN", "training.learning_rate: Input should be"),
        ("llama.temperature=Infinity", "llama.temperature: Input should be a finite number"),
        ("llama.temperature=[1,2]", "llama.temperature: Input should be a valid number"),
        ("training.arms=A4,A4", "training.arms: each value may stand once"),
        ("training.arms=[]", "training.arms: Value should have at least 1 item"),
        ("training.seeds=-1", "training.seeds.0: Input should be greater than or equal to 0"),
        ("training.headline.arms=A7", "training: headline.arms names an arm that is not among"),
        ("training.lora_dropout=1", "training.lora_dropout: Input should be less than 1"),
        ("llama.use_recorded=yes", "llama.use_recorded: Input should be a valid boolean"),
        ("llama.engine=vlm", "llama.engine: Input should be 'transformers', 'vllm' or 'server'"),
        ("llama.engine=server", "llama: engine server needs server_url"),
        ("llama.temperature=0", "llama: temperature 0 gives one response; set samples to 1"),
        ("dataset.split_ratios.train=0.9", "train, test and validation must add up to 1"),
        ("experiment.process_split=test", "process_split: Input should be 'train', found 'test'"),
        ("evaluation.t2_label=judge", "evaluation: t2_label judge needs a guard that judges"),
        ("evaluation.t2_label=human", "t2_label human needs llama.use_recorded=true"),
        ("experiment.blocked_by=human", "blocked_by human needs llama.use_recorded=true"),
        ("experiment.blocked_by=judge", "blocked_by judge needs a guard that judges: set judge"),
        ("prepare.guard.max_steps=5", "prepare.guard.base_model: Field required"),
        ("seed.x=1", "field seed: Input should be a valid integer"),
    ],
)
def test_bad_values_are_said_in_one_line(change, said, write_config):
    path = write_config(evaluation={"judge": ""}, training={"arms": ["A4", "A8"]})
    with user_error(re.escape(said)):
        config_.load_config(path, [change])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "bad.json, column 2: malformed JSON"),
        ("[]", "bad.json: Input should be"),
        ('{"sed": 1}', "bad.json, field sed: unknown key"),
        ('{"llama": {"max_token": 1}}', "field llama.max_token: unknown key"),
        ('{"llama": 3}', "field llama: Input should be"),
    ],
)
def test_bad_files_are_said_in_one_line(text, said, tmp_path):
    (tmp_path / "bad.json").write_text(text)
    with user_error(re.escape(said)):
        config_.load_config(tmp_path / "bad.json", ["seed=1"])


def test_the_command_line(monkeypatch, caplog):
    caplog.set_level("INFO")
    words = ["process.py", "--set", "seed=3", "training.arms=A4", "--set", "llama.samples=1"]
    monkeypatch.setattr(sys, "argv", words)
    config = config_.config_from_argv()
    assert config.seed == 3
    assert config.training.arms == ("A4",)
    assert config.llama.samples == 1
    assert "quickstart.json" in caplog.text
    assert "--config research_config.json" in caplog.text


def test_flags_are_not_shortened(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["process.py", "--confi", "x"])
    with user_error("--confi"):
        config_.config_from_argv()


# --- before any work ------------------------------------------------------------------------------


@pytest.fixture
def whole_config(tmp_path, models):
    return config_writer(tmp_path, models)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("llama_guard.default_model_path=nowhere/guard", "default_model_path: nowhere/guard is"),
        ("llama_guard.base_model_path={assistant}", "a folder without guard.json"),
        ("llama_guard.base_model_path=llama-guard-3-1b", "Llama-Guard-3-1B: .*hf auth login"),
        ("evaluation.judge=nowhere/judge", "evaluation.judge: nowhere/judge: "),
        ("llama.model_path=nowhere/chat", "field llama.model_path: nowhere/chat: "),
        ("evaluation.hard_benign=nowhere.jsonl", "hard_benign: nowhere.jsonl: no such file"),
        ("evaluation.extra=harmbench", "evaluation.extra: harmbench"),
        (
            'prepare={"judge": {"base_model": "nowhere/x", "data": [], "output_dir": "j"}}',
            "prepare.judge.base_model",
        ),
        ("training.arms=A4,A9", "A9"),
    ],
)
def test_what_would_stop_later_stops_before_anything(change, said, whole_config, models, tmp_path):
    change = change.replace("{assistant}", str(models["assistant"]))
    with user_error(said):
        process.process(config_.load_config(whole_config(), [change]))
    assert not (tmp_path / "run").exists()


def test_what_is_not_needed_here_need_not_be_here(whole_config, tmp_path):
    """A guard that prepare will make, and one that a server has."""
    families.save(tmp_path / "small", "llama2", ("safe", "unsafe"), 3)
    small = {
        "base_model": str(tmp_path / "small"),
        "data": [str(tmp_path / "rows/train.jsonl")],
        "output_dir": "made",
    }
    made = {"default_model_path": "made", "base_model_path": "made"}
    path = whole_config(prepare={"guard": small}, llama_guard=made)
    process.preflight(config_.load_config(path))
    server = {"engine": "server", "server_url": "http://x/v1", "default_model_path": "llama-guard"}
    assistant = {"use_recorded": True, "model_path": "nowhere"}
    process.preflight(config_.load_config(whole_config(llama_guard=server, llama=assistant)))


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        ({"toxicity": 0}, {}, "all 51 prompts of train are safe, nothing can be learned"),
        ({}, {"toxicity": 1}, "all 20 prompts of test are unsafe"),
        ({"model_output": None}, {}, "no prompt of train has a recorded response"),
        ({}, {"output_unsafe": None}, "no prompt of test has a human label of its response"),
    ],
)
def test_data_that_cannot_tell_stop_before_anything(train, test, said, whole_config, tmp_path):
    learned = [row | train for row in prompts(60)]
    tested = [row | test for row in prompts(20, 60)]
    data = write(tmp_path / "odd", train=learned, test=tested)
    path = whole_config(dataset={"path": str(data), "store_dir": str(tmp_path / "run")})
    changes = ["llama.use_recorded=true", "evaluation.t2_label=human"]
    with user_error(said):
        process.process(config_.load_config(path, changes))
    assert not (tmp_path / "run").exists()


# --- splits ---------------------------------------------------------------------------------------


def splits_of(path: Path, *overrides: str) -> dict[str, list[dict]]:
    config = config_.load_config(path, overrides)
    records.make_splits(config)
    return {split: records.read_split(config, split) for split in config_.SPLITS}


def test_official_splits_stay_and_validation_is_a_stratified_share_of_train(write_config):
    parts = splits_of(write_config())
    assert [len(parts[split]) for split in config_.SPLITS] == [51, 9, 20]
    assert [row["id"] for row in parts["test"]] == [f"r{i}" for i in range(60, 80)]
    assert Counter(row["label"] for row in parts["validation"]) == {"safe": 7, "unsafe": 2}
    (source,) = prompts(1, 60)
    first = parts["test"][0]
    assert first["label"] == "unsafe"
    assert first["input"] == source["user_input"]
    assert first["model_output"] == source["model_output"]
    assert first["output_unsafe"] == source["output_unsafe"]


def test_resplit_takes_all_by_ratios(write_config):
    ratios = {"train": 0.5, "test": 0.25, "validation": 0.25}
    changes = ["dataset.resplit=true", f"dataset.split_ratios={json.dumps(ratios)}"]
    parts = splits_of(write_config(), *changes)
    assert [len(parts[split]) for split in config_.SPLITS] == [40, 20, 20]
    for split, unsafe in zip(config_.SPLITS, [8, 4, 4], strict=True):
        labels = [row["label"] for row in parts[split]]
        assert labels.count("unsafe") == unsafe


TEMPLATE = " ".join(f"word{i}" for i in range(60)) + " {}"


def test_near_copies_are_one_group():
    texts = [TEMPLATE.format("rice"), "Why?", TEMPLATE.format("bread"), "why", "Who is it?", ""]
    assert near_copies([*texts, TEMPLATE.upper()]) == [0, 1, 0, 1, 2, 3, 0]
    assert near_copies([]) == []


def test_near_copies_stand_on_one_side(tmp_path, write_config):
    """Uses of one template, which differ by a word, are in one split, and out of what tests it."""
    rows = prompts(40)
    for i in range(10, 16):
        rows[i]["user_input"] = TEMPLATE.format(i)
    shouted = rows[3] | {"conv_id": "shouted", "user_input": rows[3]["user_input"].upper() + "!!"}
    in_test = rows[10] | {"conv_id": "tested", "user_input": TEMPLATE.format("tested")}
    data = write(tmp_path / "twice", train=[*rows, shouted], test=[*prompts(10, 40), in_test])
    known = write(tmp_path / "guard", rows=[rows[39]]) / "rows.jsonl"
    own = {"path": str(data), "store_dir": str(tmp_path / "s"), "guard_path": str(known)}
    parts = splits_of(write_config(dataset=own))
    train, validation, test = ({row["group"] for row in parts[split]} for split in config_.SPLITS)
    assert not train & validation
    assert not (train | validation) & test
    left_out = read_json(tmp_path / "s/splits.json")["left_out"]
    assert left_out == {"seen by the guard in its training": 1, "also in test": 6}


def test_rows_of_other_formats(tmp_path, write_config):
    rows = []
    for i in range(10):
        label = ("safe", "unsafe")[i % 2]
        rows.append({"prompt": f"May I {i}?", "prompt_label": label, "response": "Yes."})
        rows.append({"input": f"Why {i}?", "label": "safe", "model_output": None})
        messages = [{"role": "user", "content": f"Who {i}?"}]
        rows.append({"messages": messages, "prompt_unsafe": True})
    data = write(tmp_path / "mixed", rows=rows) / "rows.jsonl"
    parts = splits_of(write_config(dataset={"path": str(data), "store_dir": str(tmp_path / "s")}))
    made = [row for part in parts.values() for row in part]
    found = Counter((row["input"].split()[0], row["label"], row["model_output"]) for row in made)
    assert found == {
        ("May", "safe", "Yes."): 5,
        ("May", "unsafe", "Yes."): 5,
        ("Why", "safe", None): 10,
        ("Who", "unsafe", None): 10,
    }
    assert len({row["id"] for row in made}) == 30


def test_rows_without_a_prompt_are_left_out(tmp_path, write_config, caplog):
    rows = prompts(20)
    rows[3]["user_input"] = None
    rows[7]["user_input"] = " \n"
    data = write(tmp_path / "some", rows=rows) / "rows.jsonl"
    own = {"path": str(data), "store_dir": str(tmp_path / "s")}
    parts = splits_of(write_config(dataset=own))
    assert sum(map(len, parts.values())) == 18
    assert "left out 2 rows without a prompt" in caplog.text


NO_TEXT = "rows.jsonl, line 1, field user_input: expected text"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"user_input": 5, "toxicity": 0}, NO_TEXT),
        *[({"user_input": value, "toxicity": 0}, NO_TEXT) for value in (0, False, [], {})],
        ({"user_input": "a", "toxicity": None}, "line 1: says not whether the prompt is unsafe"),
        ({"user_input": "a", "toxicity": 3}, "field toxicity: unknown label 3"),
        ({"user_input": "a", "toxicity": 0, "kind": 1}, "field kind: expected text"),
        ({"text": "a"}, "field prompt: missing"),
    ],
)
def test_bad_rows_are_said_in_one_line(row, said, tmp_path, write_config):
    data = write(tmp_path / "bad", rows=[row]) / "rows.jsonl"
    with user_error(re.escape(said)):
        splits_of(write_config(dataset={"path": str(data), "store_dir": str(tmp_path / "s")}))
    assert not (tmp_path / "s/train.jsonl").exists()


@pytest.mark.parametrize("change", ["seed=1", "dataset.resplit=true"])
def test_splits_of_other_settings_are_not_taken(change, write_config):
    path = write_config()
    before = splits_of(path)
    assert splits_of(path) == before
    name = change.partition("=")[0]
    with user_error(rf"was made with another {name}; .*run process\.py"):
        splits_of(path, change)


def test_splits_of_other_data_are_not_taken(write_config, tmp_path):
    """One flipped label is enough; a file that is touched alone is the same."""
    path = write_config()
    file = tmp_path / "rows" / "train.jsonl"
    before = splits_of(path)
    file.touch()
    assert splits_of(path) == before
    file.write_text(file.read_text().replace('"toxicity": 0', '"toxicity": 1', 1))
    with user_error(r"was made with another dataset\.path; .*run process\.py"):
        splits_of(path)


def test_files_of_the_users_are_not_overwritten(write_config, tmp_path):
    path = write_config(dataset={"store_dir": str(tmp_path / "rows")})
    before = (tmp_path / "rows" / "train.jsonl").read_bytes()
    with user_error(r"train\.jsonl: not written by process\.py"):
        splits_of(path)
    assert (tmp_path / "rows" / "train.jsonl").read_bytes() == before


def test_what_is_not_there_yet_names_the_command(write_config):
    config = config_.load_config(write_config())
    for read in (records.read_split, records.read_processed):
        with user_error(r"not there yet; run process\.py"):
            read(config, "train")
