"""Rules of the bundled sample data: no half of a pair, and no repeat, gives the label away."""

import re
import sys
from collections import Counter, defaultdict
from itertools import combinations, product
from pathlib import Path

import pytest
import scripts
from checks import read_json, read_rows
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.pipeline import make_pipeline

from common.data import taxonomy

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "data/sample/beavertails"
NAMES = taxonomy("beavertails")


SPLITS = {split: read_rows(FOLDER / f"{split}.jsonl") for split in ("train", "validation", "test")}
ROWS = [row for rows in SPLITS.values() for row in rows]
EVALUATION = read_json(FOLDER / "evaluation.json")
MODELS = sorted({row["model"] for row in EVALUATION})
pytestmark = pytest.mark.sample_data
each_split = pytest.mark.parametrize("split", SPLITS)
each_field = pytest.mark.parametrize("field", ["prompt", "response"])


def plain(text: str) -> str:
    """A text, case and spacing apart."""
    return " ".join(text.lower().split())


def texts(rows: list[dict], field: str) -> list[str]:
    """Each text once."""
    return sorted({plain(row[field]) for row in rows})


def nearest(one: list[str], other: list[str]) -> float:
    """The highest TF-IDF cosine (character 3- to 5-grams) between two lists of texts."""
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5)).fit(one + other)
    return (vectorizer.transform(one) @ vectorizer.transform(other).T).max()


def unsafe(split: str) -> list[bool]:
    return [not row["is_safe"] for row in SPLITS[split]]


def test_size_and_columns():
    assert len(ROWS) >= 600
    for row in ROWS:
        assert list(row) == ["prompt", "response", "category", "is_safe"]
        assert list(row["category"]) == NAMES
        assert {type(value) for value in (*row["category"].values(), row["is_safe"])} == {bool}


@each_split
def test_every_category_and_both_classes_are_in_every_split(split):
    for name in NAMES:
        assert any(row["category"][name] for row in SPLITS[split]), name
    assert 0.4 <= sum(unsafe(split)) / len(SPLITS[split]) <= 0.6


def test_many_prompts_have_a_safe_and_an_unsafe_answer():
    answers = Counter(prompt for prompt, _ in {(row["prompt"], row["is_safe"]) for row in ROWS})
    assert list(answers.values()).count(2) >= 100


@pytest.mark.parametrize(("one", "other"), combinations(SPLITS, 2))
@each_field
def test_nothing_leaks_between_splits(one, other, field):
    """Nothing is nearly the same."""
    assert nearest(texts(SPLITS[one], field), texts(SPLITS[other], field)) < 0.8


@each_split
def test_evaluation_prompts_are_new(split):
    assert nearest(texts(SPLITS[split], "prompt"), texts(EVALUATION, "prompt")) < 0.8


def baseline(field: str) -> float:
    """AUPRC of the recipe's baseline (TF-IDF, logistic regression) that sees half of the pair."""
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(C=10, max_iter=1000),
    )
    model.fit([row[field] for row in SPLITS["train"]], unsafe("train"))
    scores = model.predict_proba([row[field] for row in SPLITS["test"]])[:, 1]
    return average_precision_score(unsafe("test"), scores)


def test_neither_question_nor_answer_decides_alone():
    """An answer's words say much, as in real data, where refusals are safe."""
    base_rate = sum(unsafe("test")) / len(SPLITS["test"])
    assert abs(baseline("prompt") - base_rate) <= 0.08
    assert baseline("response") <= 0.92


def test_answers_repeat_only_where_the_label_flips():
    labels = defaultdict(list)
    for row in ROWS:
        labels[plain(row["response"])].append(row["is_safe"])
    repeated = [found for found in labels.values() if len(found) > 1]
    assert repeated
    for found in repeated:
        assert sorted(found) == [False, True]


def test_long_and_short_answers():
    words = [len(row["response"].split()) for row in ROWS]
    assert sum(count > 30 for count in words) >= 0.05 * len(words)
    assert sum(count < 10 for count in words) >= 0.08 * len(words)


@each_field
def test_no_templated_openings(field):
    found = texts(ROWS, field)
    openings = Counter(" ".join(re.findall(r"[\w']+", text)[:4]) for text in found)
    ((opening, count),) = openings.most_common(1)
    assert count < 0.03 * len(found), opening


def test_evaluation_rows():
    """The paper's format, with two judges; no real model is spoken for."""
    assert len(EVALUATION) >= 100
    for row in EVALUATION:
        assert list(row) == ["prompt", "response", "model", "flagged"]
        assert row["response"].strip()
        assert row["model"].startswith("sample-")
        assert list(row["flagged"]) == ["gpt4", "human"]
        assert {type(flag) for flag in row["flagged"].values()} == {bool}


def test_evaluation_has_an_answer_of_every_model_to_every_question():
    assert len(MODELS) >= 3
    found = {(row["model"], plain(row["prompt"])) for row in EVALUATION}
    assert found == set(product(MODELS, texts(EVALUATION, "prompt")))


def test_labels_of_the_evaluation():
    """No model is all safe or all unsafe, and the judges differ sometimes."""
    for model in MODELS:
        flagged = {row["flagged"]["human"] for row in EVALUATION if row["model"] == model}
        assert flagged == {True, False}, model
    differ = sum(row["flagged"]["gpt4"] != row["flagged"]["human"] for row in EVALUATION)
    assert 0 < differ < len(EVALUATION) / 4


def test_card_counts_are_what_its_command_prints():
    card = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    blocks = re.search(r"```python\n(.*?)```.*?```text\n(.*?)```", card, re.DOTALL)
    command, printed = blocks.groups()
    assert scripts.run([sys.executable, "-c", command], ROOT).stdout == printed
