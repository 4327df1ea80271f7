"""A guard as ONNX: the same verdicts, of any family, or nothing is written."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from bases import BASES
from checks import read_json, user_error
from scripts import EXAMPLES
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from common.conversation import pair, parts_of
from common.data import load_conversations, taxonomy
from common.fit import fit_classifier
from guards import add_probe, export, load_guard
from guards.card import ClassifierCard, Threshold, read_card, write_card

pytestmark = pytest.mark.slow
CATEGORIES = taxonomy("beavertails")
FAMILIES = ("bert", "roberta", "modernbert", "deberta", "llama", "qwen3", "gemma3", "gpt2")


def make_guard(family, folder, threshold=0.5):
    """A folder as examples/moderation leaves it, with a head that is drawn at random."""
    base = BASES[family](folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(
        base,
        id2label=dict(enumerate(CATEGORIES)),
        label2id={name: i for i, name in enumerate(CATEGORIES)},
        problem_type="multi_label_classification",
    )
    fit_classifier(tokenizer, model)
    guard = folder / "guard"
    model.save_pretrained(guard)
    tokenizer.save_pretrained(guard)
    card = ClassifierCard(
        template="beavertails",
        labels=CATEGORIES,
        max_length=256,
        thresholds={"flagged": Threshold(value=threshold, how="default")},
    )
    add_probe(guard, card)
    return str(guard)


@pytest.fixture(scope="module")
def rows():
    return load_conversations("beavertails-sample:validation", max_rows=20)["messages"]


@pytest.fixture(scope="module")
def guard_folder(tmp_path_factory):
    return make_guard("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def exported(guard_folder, rows):
    export.export(guard_folder, f"{guard_folder}-onnx", rows)
    return f"{guard_folder}-onnx"


def scores(guard, rows):
    return np.array([list(verdict.categories.values()) for verdict in guard.judge(rows)])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_what_torch_says(family, rows, tmp_path):
    """Alone and in batches, short texts and long ones."""
    folder = make_guard(family, tmp_path)
    export.export(folder, str(tmp_path / "onnx"), rows)
    guard = load_guard(folder, progress=False)
    expected = scores(guard, rows)
    assert np.ptp(expected, axis=0).max() > 0.01, "nothing would be seen here"
    for budget in (1, 4096):
        found = load_guard(str(tmp_path / "onnx"), progress=False, batch_tokens=budget)
        np.testing.assert_allclose(scores(found, rows), expected, atol=2e-5)
    assert found.max_length == guard.max_length
    assert found.thresholds == guard.thresholds


@pytest.mark.parametrize("judge", ["prompt", "response"])
def test_a_guard_of_prompts_or_responses_is_compared_on_those(judge, rows, tmp_path):
    """The rows are pairs, of which a guard of prompts judges none as they are."""
    folder = make_guard("llama", tmp_path)
    change = {"template": f"beavertails_{judge}", "input": judge, "probe": None, "sees": None}
    add_probe(folder, read_card(folder).model_copy(update=change))
    export.export(folder, str(tmp_path / "onnx"), rows)
    assert read_card(tmp_path / "onnx").input == judge
    judged = [parts_of(messages)[judge] for messages in rows]
    expected = scores(load_guard(folder, progress=False), judged)
    found = scores(load_guard(str(tmp_path / "onnx"), progress=False), judged)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_the_folder_is_a_guard_and_names_no_place(exported, guard_folder, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    card = read_card(exported, ClassifierCard)
    assert card.labels == read_card(guard_folder, ClassifierCard).labels
    for path in folder.glob("llama*/guard-onnx/*"):
        assert str(folder).encode() not in path.read_bytes() or path.name == "run.json"
    page = (folder / exported / "README.md").read_text()
    assert "| flagged | 0.5 | 20 | 0 |" in page
    run = read_json(folder / exported / "run.json")
    assert run["parity"][0]["flipped"] == 0


def test_long_texts_have_windows_as_with_torch(exported, guard_folder):
    long = pair("Tell me a story.", "They walked along the river and came to a bridge. " * 60)
    said = [load_guard(one, progress=False).judge([long])[0] for one in (guard_folder, exported)]
    assert said[1].response_unsafe == pytest.approx(said[0].response_unsafe, abs=2e-5)


@pytest.fixture(scope="module")
def int8(guard_folder, rows):
    export.export(guard_folder, f"{guard_folder}-int8", rows, int8=True)
    return f"{guard_folder}-int8"


def test_weights_in_8_bits_are_noted_and_near(int8, guard_folder, rows):
    guard = load_guard(int8, progress=False)
    assert guard.dtype == "int8"
    assert read_card(int8).probe.dtype == "int8"
    expected = scores(load_guard(guard_folder, progress=False), rows)
    found = scores(guard, rows)
    np.testing.assert_allclose(found, expected, atol=0.15)
    assert np.abs(found - expected).max() > 1e-5, "these are the weights of torch"


@pytest.fixture
def on_the_edge(int8, guard_folder, rows, tmp_path, monkeypatch):
    """The guard with a threshold at which products of 8 bits flip a verdict of 20, and those of
    float32 none.
    """
    with monkeypatch.context() as patched:
        patched.setattr(export, "PRODUCTS", {"float32": export.PRODUCTS["float32"]})
        export.export(guard_folder, str(tmp_path / "float32"), rows, int8=True)
    folders = (guard_folder, tmp_path / "float32", int8)
    of_torch, of_float32, of_int8 = (
        np.array(load_guard(str(folder), progress=False).moderate(rows)) for folder in folders
    )
    between = [(of_int8 + of_torch) / 2, (of_int8 + of_float32) / 2]
    for value in np.concatenate(between):
        flags = of_torch > value
        if (flags == (of_float32 > value)).all() and (flags != (of_int8 > value)).any():
            break
    else:
        pytest.fail(
            "at no threshold do products of 8 bits flip a verdict and those of float32 none"
        )
    folder = tmp_path / "guard"
    shutil.copytree(guard_folder, folder)
    threshold = Threshold(value=float(value), how="default")
    write_card(folder, read_card(folder).model_copy(update={"thresholds": {"flagged": threshold}}))
    return str(folder)


def test_a_verdict_that_flips_leaves_nothing_behind(on_the_edge, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "PRODUCTS", {"8 bits": 4})
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with user_error("of the verdicts flip, more than 1%; nothing is written"):
        export.export(on_the_edge, str(tmp_path / "out"), rows, int8=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_where_8_bits_flip_verdicts_products_are_in_float32(on_the_edge, rows, tmp_path):
    export.export(on_the_edge, str(tmp_path / "out"), rows, int8=True)
    run = read_json(tmp_path / "out/run.json")
    assert run["arguments"]["products"] == "float32"
    assert run["parity"][0]["flipped"] == 0
    assert load_guard(str(tmp_path / "out"), progress=False).dtype == "int8"


def cli(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["export", *map(str, words)])
    export.main()


def test_what_is_refused_before_any_work(guard, guard_folder, tmp_path, monkeypatch):
    """Adapters on a chat model, the guard's own folder, a folder that holds another guard."""
    with user_error("expected 'classifier', found 'lora_guard'"):
        cli(monkeypatch, guard, "--onnx", "--output_dir", tmp_path / "out")
    with user_error(r"holds guard\.json of an earlier run; pass --overwrite"):
        cli(monkeypatch, guard_folder, "--onnx", "--output_dir", guard_folder)
    with user_error("is the guard itself; name another folder"):
        cli(monkeypatch, guard_folder, "--onnx", "--output_dir", guard_folder, "--overwrite")
    with user_error("--max_rows 0: must be at least 1"):
        cli(monkeypatch, guard_folder, "--onnx", "--max_rows", 0, "--data", "no/such.jsonl")
    assert read_card(guard_folder, ClassifierCard)


def test_a_graph_that_is_broken_is_refused(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "cut")
    graph = tmp_path / "cut/model.onnx"
    graph.write_bytes(graph.read_bytes()[:2000])
    with user_error(r"model\.onnx: cannot be read"):
        load_guard(str(tmp_path / "cut"))
    with user_error("is exported; name the folder that was trained"):
        export.export(exported, str(tmp_path / "again"), [])


LOAD = """
import sys
from guards import load_guard
load_guard(sys.argv[1], progress=False).judge([[{"role": "user", "content": "Hi"}]])
"""


def test_nothing_is_noted_for_its_maker(exported, tmp_path):
    """onnxruntime keeps an id of the machine in the home folder, and what it sends."""
    environment = os.environ | {"HOME": str(tmp_path)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    subprocess.run([sys.executable, "-c", LOAD, exported], env=environment, check=True)
    assert not [path for path in tmp_path.rglob("*") if "onnxruntime" in path.name]


def test_the_bench_serves_it_beside_torch(guard_folder, exported, tmp_path):
    """Few requests: that all three ways are measured, and say the same."""
    file = tmp_path / "results.json"
    flags = ["--requests", "4", "--rounds", "1", "--memory_requests", "4", "--output", str(file)]
    command = [sys.executable, "serve.py", "--model", guard_folder, "--onnx", exported, *flags]
    done = subprocess.run(command, cwd=EXAMPLES.parent / "bench", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = read_json(file)["results"]
    for found in results["clients"].values():
        for way in ("batched", "one at a time", "ONNX, batched"):
            assert found[way]["requests_per_s"] > 0
            assert found[way]["difference"] < 1e-3
    command[command.index(exported)] = guard_folder
    done = subprocess.run(command, cwd=EXAMPLES.parent / "bench", capture_output=True, text=True)
    assert done.returncode == 2
    assert "no exported guard there" in done.stderr.splitlines()[-1]
