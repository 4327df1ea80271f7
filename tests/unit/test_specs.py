"""What a spec means: names, configurations, revisions, splits, slices, and the home folder."""

import sys

import datasets
import pytest
import yaml
from scripts import module

from common.conversation import UserError
from common.data import load_conversations, parse_spec
from common.data.specs import Spec
from common.metrics import is_test
from common.run import parse_args
from guards import load_guard
from guards.suite.benchmarks import load_benchmark
from guards.suite.evaluate import EvaluationArguments


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("user/name:train", Spec("user/name", (), "train")),
        ("user/name:train[:500]", Spec("user/name", (), "train[:500]")),
        ("user/name:train[:10%]+test[5:]", Spec("user/name", (), "train[:10%]+test[5:]")),
        ("user/name@config:train[:500]", Spec("user/name", ("config",), "train[:500]")),
        ("user/name@config@v1.0:a.b-c", Spec("user/name", ("config", "v1.0"), "a.b-c")),
        ("user/name", Spec("user/name")),
        ("a:b.csv", Spec("a:b.csv", is_file=True)),
        ("some@where/rows.JSONL", Spec("some@where/rows.JSONL", is_file=True)),
        ("rows.csv[:5]", Spec("rows.csv", (), "[:5]", is_file=True)),
    ],
)
def test_a_spec_is_taken_apart_once(text, spec):
    assert parse_spec(text) == spec and str(spec) == text


@pytest.mark.parametrize("text", ["", ":train", "user/name@:train", "user/name@a@b@c:train"])
def test_what_is_no_spec(text):
    with pytest.raises(UserError):
        parse_spec(text)


@pytest.fixture
def two_configurations(tmp_path, monkeypatch) -> str:
    """A folder in the layout of a hub data set with two configurations, none of them the
    default.
    """
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "here" / "set"
    folder.mkdir(parents=True)
    files = {"guardtrain": ("train", 6), "guardtest": ("test", 2)}
    described = []
    for name, (split, count) in files.items():
        lines = [
            f'{{"prompt": "{name} {i}", "response": "a", "response_label": {i % 2}}}\n'
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(lines))
        data_files = [{"split": split, "path": f"{name}.jsonl"}]
        described.append({"config_name": name, "data_files": data_files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': described})}---\n")
    return str(folder)


def prompts(spec: str) -> list[str]:
    return [messages[0]["content"] for messages in load_conversations(spec)["messages"]]


def test_a_configuration_and_a_slice(two_configurations):
    assert prompts(f"{two_configurations}@guardtest:test") == ["guardtest 0", "guardtest 1"]
    assert prompts(f"{two_configurations}@guardtrain:train[1:3]") == [
        "guardtrain 1",
        "guardtrain 2",
    ]
    assert (
        load_conversations(f"{two_configurations}@guardtest:test")["id"][0]
        == "set@guardtest:test, row 0"
    )


@pytest.mark.parametrize("mark", ["", "@guard"])
def test_a_missing_configuration_lists_those_that_there_are(two_configurations, mark):
    with pytest.raises(UserError) as caught:
        load_conversations(f"{two_configurations}{mark}:test")
    message = str(caught.value)
    assert (
        message.startswith(f"{two_configurations}{mark}:test: ") and len(message.splitlines()) == 1
    )
    assert "set@guardtrain:test" in message and "set@guardtest:test" in message


def test_a_mark_is_a_revision_where_no_configuration_has_its_name(monkeypatch):
    """The hub's part is asked with these words; there is no hub here."""
    asked = []
    monkeypatch.setattr(
        datasets, "get_dataset_config_names", lambda name, revision=None: ["clean", "full"]
    )
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *names, **words: asked.append((names, words)) or []
    )
    for mark in ("@clean", "@v1.0", "@clean@v1.0"):
        with pytest.raises(UserError, match="no rows"):
            load_conversations(f"user/name{mark}:train[:5]")
    words = {"split": "train[:5]"}
    assert asked == [
        (("user/name", "clean"), words | {"revision": None}),
        (("user/name", None), words | {"revision": "v1.0"}),
        (("user/name", "clean"), words | {"revision": "v1.0"}),
    ]


def test_slices_of_what_lies_here(tmp_path):
    """As `datasets` slices: from a file, from the sample, from several splits of it."""
    every = prompts("beavertails-sample:test")
    assert prompts("beavertails-sample:test[:3]") == every[:3]
    assert prompts("beavertails-sample:test[-2:]") == every[-2:]
    assert (
        prompts("beavertails-sample:test[:2]+validation[:1]")
        == every[:2] + prompts("beavertails-sample:validation")[:1]
    )
    (tmp_path / "a.csv").write_text("prompt\na\nb\nc\nd\n")
    assert prompts(f"{tmp_path}/a.csv[25%:75%]") == ["b", "c"]
    with pytest.raises(UserError, match="no slice such as"):
        prompts(f"{tmp_path}/a.csv[a:b]")


@pytest.mark.parametrize(
    "spec", ["x:test[:500]", "x:validation+test[:5]", "x@guardtest:train", "test.csv[:5]"]
)
def test_a_slice_of_a_test_split_is_one(spec):
    """No threshold may be fitted on it."""
    assert is_test(spec) and not is_test(spec.replace("test", "dev"))


# --- configs ----------------------------------------------------------------------------------------------------------


def test_a_repeated_key_of_a_config_is_refused_by_name(tmp_path, monkeypatch):
    """Whichever of the two values is taken, the user may have meant the other."""
    path = tmp_path / "c.yaml"
    path.write_text("\ufeffseed: 1\r\nguards: [a]\r\nseed: 2\r\n", encoding="utf-8", newline="")
    monkeypatch.setattr(sys, "argv", ["x", "--config", str(path)])
    with pytest.raises(
        UserError, match=r"--config .*/c\.yaml: not YAML: the key 'seed' is repeated; keep one"
    ):
        parse_args([EvaluationArguments])
    with pytest.raises(UserError, match="the key 'seed' is repeated"):
        module("cross_task_defense", "flags").parse(lambda *, seed: None, [f"--config={path}"])
    path.write_text(
        "\ufeffseed: 1\r\nguards: [a]\r\noutput_dir: o\r\n", encoding="utf-8", newline=""
    )
    assert parse_args([EvaluationArguments])[0].seed == 1


def test_json_configs_are_read_as_data_is(tmp_path):
    """With a byte order mark, and no key twice."""
    config = module("feedback_guard", "config")
    text = (config.FOLDER / "configs/quickstart.json").read_text(encoding="utf-8")
    path = tmp_path / "c.json"
    path.write_text("\ufeff" + text, encoding="utf-8")
    assert config.load_config(path) == config.load_config(config.FOLDER / "configs/quickstart.json")
    path.write_text('{"seed": 1, "seed": 2}')
    with pytest.raises(UserError, match="the key 'seed' is repeated"):
        config.load_config(path)


# --- the home folder --------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_home_folder_in_flags_and_yaml(home, monkeypatch):
    (home / "c.yaml").write_text("output_dir: ~/out\nbenchmarks: [xstest_prompt, ~/rows.csv]\n")
    monkeypatch.setattr(
        sys, "argv", ["x", "--config=~/c.yaml", "--guards=~/guard", "--compare", "a,b"]
    )
    (args,) = parse_args([EvaluationArguments])
    assert (args.output_dir, args.guards, args.benchmarks) == (
        f"{home}/out",
        [f"{home}/guard"],
        ["xstest_prompt", f"{home}/rows.csv"],
    )


def test_the_home_folder_in_fire_flags(home):
    flags = module("cross_task_defense", "flags")

    def function(*, path: str, names: list[str] = []) -> None:  # noqa: B006
        pass

    (home / "c.yaml").write_text("path: ~/in\n")
    found = flags.parse(function, ["--config=~/c.yaml", "--names=~/a,b"])
    assert found == {"path": f"{home}/in", "names": [f"{home}/a", "b"]}


def test_the_home_folder_in_a_config_of_the_feedback_guard(home):
    config = module("feedback_guard", "config")
    path = config.FOLDER / "configs/quickstart.json"
    assert (
        config.load_config(path, ["dataset.store_dir=~/store"]).dataset.store_dir == f"{home}/store"
    )


def test_the_home_folder_in_names_of_guards_and_benchmarks(home):
    (home / "x.csv").write_text("prompt,label,type\nMay I?,safe,a\n")
    assert len(load_benchmark("xstest_prompt@~/x.csv").rows) == 1
    with pytest.raises(UserError, match=f"{home}/guard"):
        load_guard("~/guard")
