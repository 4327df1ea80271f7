"""What a spec means: names, configurations, revisions, splits, slices, and the home folder."""

import sys

import datasets
import pytest
from checks import user_error
from scripts import module

from common.data import load_conversations, parse_spec
from common.data.specs import Spec
from common.run import parse_args
from guards import load_guard
from guards.suite.benchmarks import load_benchmark
from guards.suite.evaluate import EvaluationArguments


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("user/name", Spec("user/name")),
        ("user/name:train[:10%]+test[5:]", Spec("user/name", (), "train[:10%]+test[5:]")),
        ("user/name@config:train[:500]", Spec("user/name", ("config",), "train[:500]")),
        ("user/name@config@v1.0:a.b-c", Spec("user/name", ("config", "v1.0"), "a.b-c")),
        ("a:b.csv", Spec("a:b.csv", is_file=True)),
        ("some@where/rows.JSONL", Spec("some@where/rows.JSONL", is_file=True)),
        ("rows.csv[:5]", Spec("rows.csv", (), "[:5]", is_file=True)),
    ],
)
def test_a_spec_is_taken_apart_once(text, spec):
    assert parse_spec(text) == spec
    assert str(spec) == text


@pytest.mark.parametrize("text", ["", ":train", "user/name@:train", "user/name@a@b@c:train"])
def test_what_is_no_spec(text):
    with user_error():
        parse_spec(text)


@pytest.fixture
def hub_folder(tmp_path, monkeypatch) -> str:
    """The layout of a hub data set with two configurations, none of them the default."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.csv").write_text("prompt\na0\na1\na2\na3\n")
    (folder / "b.csv").write_text("prompt\nb0\nb1\n")
    (folder / "README.md").write_text("""---
configs:
- {config_name: guardtrain, data_files: [{split: train, path: a.csv}]}
- {config_name: guardtest, data_files: [{split: test, path: b.csv}]}
---
""")
    return str(folder)


def prompts(spec: str) -> list[str]:
    return [messages[0]["content"] for messages in load_conversations(spec)["messages"]]


def test_a_configuration_and_a_slice(hub_folder):
    """An id names the configuration, and no folder."""
    assert prompts(f"{hub_folder}@guardtest:test") == ["b0", "b1"]
    assert prompts(f"{hub_folder}@guardtrain:train[1:3]") == ["a1", "a2"]
    rows = load_conversations(f"{hub_folder}@guardtest:test")
    assert rows["id"][0] == "set@guardtest:test, row 0"


@pytest.mark.parametrize("mark", ["", "@guard"])
def test_a_missing_configuration_lists_those_that_there_are(hub_folder, mark):
    with user_error(f"^{hub_folder}{mark}:test: .*set@guardtrain:test .*set@guardtest:test"):
        load_conversations(f"{hub_folder}{mark}:test")


def test_a_missing_split_lists_those_that_there_are(hub_folder):
    with user_error(f"^{hub_folder}@guardtest:train: .*'test'"):
        load_conversations(f"{hub_folder}@guardtest:train")


@pytest.mark.parametrize(
    ("mark", "configuration", "revision"),
    [("@clean", "clean", None), ("@v1.0", None, "v1.0"), ("@clean@v1.0", "clean", "v1.0")],
)
def test_a_mark_is_a_revision_where_no_configuration_has_its_name(
    monkeypatch, mark, configuration, revision
):
    """The hub's part is asked with these words; there is no hub here."""
    asked = []

    def load_dataset(*names, **words):
        asked.append((names, words))
        return []

    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda *a, **k: ["clean", "full"])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with user_error("no rows"):
        load_conversations(f"user/name{mark}:train[:5]")
    words = {"split": "train[:5]", "revision": revision}
    assert asked == [(("user/name", configuration), words)]


def test_slices_of_the_sample():
    every = prompts("beavertails-sample:test")
    first = prompts("beavertails-sample:validation")[:1]
    assert prompts("beavertails-sample:test[-2:]") == every[-2:]
    assert prompts("beavertails-sample:test[:2]+validation[:1]") == every[:2] + first


def test_slices_of_a_file(tmp_path):
    (tmp_path / "a.csv").write_text("prompt\na\nb\nc\nd\n")
    assert prompts(f"{tmp_path}/a.csv[25%:75%]") == ["b", "c"]
    with user_error(r"a\.csv"):
        prompts(f"{tmp_path}/a.csv[a:b]")


# --- configs and the home folder ------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_config_with_the_marks_of_windows_and_a_home_folder(home, monkeypatch):
    text = "\ufeffoutput_dir: ~/out\r\nbenchmarks: [xstest_prompt, ~/rows.csv]\r\n"
    (home / "c.yaml").write_text(text, encoding="utf-8", newline="")
    monkeypatch.setattr(sys, "argv", ["x", "--config=~/c.yaml", "--guards=~/guard"])
    (args,) = parse_args([EvaluationArguments])
    assert args.output_dir == f"{home}/out"
    assert args.guards == [f"{home}/guard"]
    assert args.benchmarks == ["xstest_prompt", f"{home}/rows.csv"]


def test_fire_flags_know_the_home_folder_and_refuse_a_repeated_key(home):
    flags = module("cross_task_defense", "flags")

    def function(*, path: str, names: list[str] = []) -> None:  # noqa: B006
        pass

    (home / "c.yaml").write_text("path: ~/in\n")
    found = flags.parse(function, ["--config=~/c.yaml", "--names=~/a,b"])
    assert found == {"path": f"{home}/in", "names": [f"{home}/a", "b"]}
    (home / "c.yaml").write_text("path: a\npath: b\n")
    with user_error("path"):
        flags.parse(function, ["--config=~/c.yaml"])


def test_json_configs_know_the_home_folder_and_refuse_a_repeated_key(home):
    """Also with the byte order mark of Windows."""
    config = module("feedback_guard", "config")
    text = (config.FOLDER / "configs/quickstart.json").read_text(encoding="utf-8")
    path = home / "c.json"
    path.write_text("\ufeff" + text, encoding="utf-8")
    found = config.load_config(path, ["dataset.store_dir=~/store"])
    assert found.dataset.store_dir == f"{home}/store"
    path.write_text('{"seed": 1, "seed": 2}')
    with user_error("'seed'"):
        config.load_config(path)


def test_the_home_folder_in_names_of_guards_and_benchmarks(home):
    (home / "x.csv").write_text("prompt,label,type\nMay I?,safe,a\n")
    assert len(load_benchmark("xstest_prompt@~/x.csv").rows) == 1
    with user_error(f"{home}/guard"):
        load_guard("~/guard")
