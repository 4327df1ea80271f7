"""examples/lora_guard on labels of one's own: which outputs there are, what is learned of each row."""

import csv
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scripts
from checks import read_json, read_rows, user_error, write_rows
from scripts import module
from transformers import AutoTokenizer

from common.data import load_conversations
from guards import load_guard

launch = partial(scripts.launch, "lora_guard")
inputs = module("lora_guard", "inputs")
slow = pytest.mark.slow


def write(path: Path, count: int, *, answers: bool = True, named: bool = True) -> Path:
    """Rows of three kinds in turn: fraud, spam (every second one without its category), safe."""
    label = "response_label" if answers else "prompt_label"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["prompt", "response", label, "categories", "language"])
        for number in range(count):
            kind = ("fraud", "spam", "")[number % 3]
            words = {"fraud": "sell rings", "spam": "write to all", "": "cook rice"}[kind]
            told = kind if named and not (kind == "spam" and number % 2) else ""
            answer = f"To {words}, do it {number} times." if answers else ""
            unsafe = "unsafe" if kind else "safe"
            language = ("en", "de")[number % 2]
            rows.writerow([f"How do I {words} {number}?", answer, unsafe, told, language])
    return path


def arguments(**changes) -> SimpleNamespace:
    given = {"categories": None, "guard_inputs": ["pair"], "no_unsafe_head": False}
    return SimpleNamespace(**(given | {"max_length": 64} | changes))


def learned(rows, tiny_base, **changes):
    """The labels, and the targets of each row in the order of its length."""
    args = arguments(**changes)
    labels = inputs.settled_labels(rows, args)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    encoded, counts = inputs.encode_rows(rows, "rows", labels, tokenizer, args)
    return labels, np.array(encoded["labels"]), counts


def test_outputs_are_those_of_the_rows(tmp_path, tiny_base):
    """An unsafe row without categories is unknown in each; a safe one has none of them."""
    rows = load_conversations(str(write(tmp_path / "rows.csv", 12)))
    labels, wanted, counts = learned(rows, tiny_base)
    assert list(labels) == ["unsafe", "fraud", "spam"]
    found = sorted(map(str, wanted.tolist()))
    kinds = {"[0.0, 0.0, 0.0]": 4, "[1.0, 1.0, 0.0]": 4, "[1.0, 0.0, 1.0]": 2, "[1.0, nan, nan]": 2}
    assert {kind: found.count(kind) for kind in kinds} == kinds
    assert counts["pair"] == {"rows": 12, "unsafe": 8}


def test_safe_or_unsafe_alone_is_one_output(tmp_path, tiny_base):
    rows = load_conversations(str(write(tmp_path / "rows.csv", 12, named=False)))
    labels, wanted, _ = learned(rows, tiny_base)
    assert list(labels) == ["unsafe"]
    assert wanted.sum() == 8
    with user_error("--no-unsafe-head: no row names a category"):
        learned(rows, tiny_base, no_unsafe_head=True)


def test_categories_of_an_answered_prompt_speak_of_the_answer(tmp_path, tiny_base):
    row = {"prompt": "How?", "response": "So.", "categories": ["fraud"]}
    row |= {"prompt_label": True, "response_label": True}
    rows = load_conversations(str(write_rows(tmp_path / "rows.jsonl", [row])))
    labels, wanted, _ = learned(rows, tiny_base, guard_inputs=["prompt", "response"])
    assert list(labels) == ["unsafe", "fraud"]
    assert sorted(map(str, wanted.tolist())) == ["[1.0, 1.0]", "[1.0, nan]"]


def test_categories_tell_a_label_that_is_not_there(tmp_path, tiny_base):
    """Of the answer where there is one; where they are unknown, too, nothing is learned."""
    rows = []
    for number, named in enumerate((["fraud"], [], None)):
        rows.append({"prompt": f"How {number}?", "response": "So.", "categories": named})
        rows.append({"prompt": f"Why {number}?", "categories": named})
    loaded = load_conversations(str(write_rows(tmp_path / "rows.jsonl", rows)))
    for kind in ("pair", "prompt"):
        labels, wanted, counts = learned(loaded, tiny_base, guard_inputs=[kind])
        assert list(labels) == ["unsafe", "fraud"]
        assert sorted(wanted.tolist()) == [[0.0, 0.0], [1.0, 1.0]]
        assert counts[kind] == {"rows": 2, "unsafe": 1}


@pytest.mark.parametrize(("kind", "left"), [("prompt", 2), ("pair", 6)])
def test_repeats_and_leaks_are_those_of_what_is_judged(kind, left, tmp_path):
    """A prompt with three answers is one row for a guard of prompts, and three of pairs."""
    rows = []
    for prompt, label in (("How do I cook rice?", "safe"), ("May I take it?", "unsafe")):
        for number in range(3):
            row = {"prompt": prompt, "response": f"Answer {number}.", "response_label": label}
            rows.append(row | {"prompt_label": label, "categories": None})
    path = write_rows(tmp_path / "rows.jsonl", rows)
    train = module("lora_guard", "train")
    args = train.GuardArguments(
        hf_model_id="nowhere",
        output_folder="nowhere",
        train_data=[str(path)],
        guard_inputs=[kind],
        deduplicate=True,
    )
    found, _, _ = train.load_rows(args)
    assert len(found) == left


def command(model, folder: Path, data: Path, *more) -> list:
    return [
        "train.py", model, folder, "--epochs", 1, "--per-device-batch-size", 8, "--seed", 1,
        "--learning-rate", 1e-3, "--lora-r", 4, "--train-data", data, "--eval-data", data, *more,
    ]  # fmt: skip


def supports(scores: dict) -> dict[str, int]:
    return {name: one["support"] for name, one in scores.items()}


def evaluated(out: Path, guard: Path, data: Path, *more) -> dict:
    launch("evaluate.py", "--guards", guard, "--eval_data", data, "--output_dir", out, *more)
    return read_json(out / "results.json")


def test_training_rows_of_several_files_are_known(tmp_path):
    evaluate = module("lora_guard", "evaluate")
    files = [write(tmp_path / "one.csv", 3), write(tmp_path / "two.csv", 5)]
    args = evaluate.EvaluationArguments(
        guards=["guard"],
        eval_data="rows.csv",
        output_dir="out",
        judge="response",
        train_data=[str(file) for file in files],
    )
    texts = evaluate.training_texts(args)
    assert len(texts) == 3 + 5
    assert "do it 4 times" in texts[-1]
    args.train_data = []
    assert evaluate.training_texts(args) is None


@slow
def test_own_categories_from_train_to_results(tiny_base, tmp_path):
    """Card, verdicts and tables know the rows' categories and no others, and each language."""
    data = write(tmp_path / "rows.csv", 60)
    names = tmp_path / "mine.yaml"
    names.write_text("spam: sent to many\nfraud: deceives to get money\ntheft:\n")
    run = tmp_path / "run"
    launch(*command(tiny_base, run, data, "--categories", names))
    card = read_json(run / "best/guard.json")
    assert card["labels"] == ["unsafe", "spam", "fraud"]
    assert card["descriptions"] == {"spam": "sent to many", "fraud": "deceives to get money"}
    # ten unsafe rows of a category, and a threshold of its own
    assert set(card["category_thresholds"]) == {"fraud", "spam"}
    assert card["category_thresholds"]["fraud"]["on"] == str(data)
    readme = (run / "best/README.md").read_text()
    for words in ("num_labels=3", "deceives to get money"):
        assert words in readme
    for words in ("14", "privacy_violation"):
        assert words not in readme
    guard = load_guard(str(run / "best"))
    (verdict,) = guard.judge(load_conversations(str(data), max_rows=1)["messages"])
    assert set(verdict.categories) == {"fraud", "spam"}
    known = write(tmp_path / "known.csv", 6)
    prompts = write(tmp_path / "prompts.csv", 3, answers=False)
    results = evaluated(tmp_path / "out", run / "best", data, "--train_data", prompts, known)
    assert list(results["categories"]) == ["spam", "fraud"]
    assert results["categories"]["fraud"]["support"] == 50  # ten rows do not say
    assert results["categories"]["fraud"]["positives"] == 20
    for name, own in card["category_thresholds"].items():
        assert results["categories"][name]["threshold"] == pytest.approx(own["value"])
    assert supports(results["languages"]) == {"de": 30, "en": 30}
    assert supports(results["near_copies"]) == {"all rows": 60, "without 6 near-copies": 54}
    markdown = (tmp_path / "out/results.md").read_text()
    assert "## Languages" in markdown
    assert "near-copies of rows of --train_data" in markdown
    assert read_rows(tmp_path / "out/predictions.jsonl")[1]["language"] == "de"


@slow
def test_a_guard_of_prompts_is_evaluated_on_prompts(tiny_base, tmp_path):
    data = write(tmp_path / "rows.csv", 60, answers=False, named=False)
    run = tmp_path / "run"
    launch(*command(tiny_base, run, data, "--judge", "prompt"))
    card = read_json(run / "best/guard.json")
    assert card["inputs"] == ["prompt"]
    assert card["labels"] == ["unsafe"]
    assert 'tokenizer("user: <question>"' in (run / "best/README.md").read_text()
    results = evaluated(tmp_path / "out", run / "best", data)
    assert results["judged"] == "prompt"
    assert results["flagged"]["run/best"]["support"] == 60
    assert results["categories"] == {}
