"""The rules that the bundled sample data keep, so that neither half of a pair, nor a repeat, gives
the label away.
"""

import json
import re
import sys
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import pytest
import scripts
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.pipeline import make_pipeline

from common.data import taxonomy

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "data/sample/beavertails"
NAMES = taxonomy("beavertails")
SPLITS = {
    name: [
        json.loads(line)
        for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    for name in ("train", "validation", "test")
}
ROWS = [row for rows in SPLITS.values() for row in rows]
EVALUATION = json.loads((FOLDER / "evaluation.json").read_text(encoding="utf-8"))
pytestmark = pytest.mark.sample_data
split = pytest.mark.parametrize("split", SPLITS)
field = pytest.mark.parametrize("field", ["prompt", "response"])


def texts(rows: list[dict], field: str) -> list[str]:
    """Each text once, case and spacing apart."""
    return sorted({" ".join(row[field].lower().split()) for row in rows})


def nearest(one: list[str], other: list[str]) -> float:
    """The highest TF-IDF cosine (character 3- to 5-grams) between two lists of texts."""
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5)).fit(one + other)
    return (vectorizer.transform(one) @ vectorizer.transform(other).T).max()


def unsafe(rows: list[dict]) -> list[bool]:
    return [not row["is_safe"] for row in rows]


def test_size_and_columns():
    assert len(ROWS) >= 600
    for row in ROWS:
        assert list(row) == ["prompt", "response", "category", "is_safe"]
        assert list(row["category"]) == NAMES
        assert all(type(value) is bool for value in [*row["category"].values(), row["is_safe"]])


@split
def test_every_category_is_in_every_split(split):
    assert [name for name in NAMES if not any(row["category"][name] for row in SPLITS[split])] == []


@split
def test_unsafe_share(split):
    assert 0.4 <= sum(unsafe(SPLITS[split])) / len(SPLITS[split]) <= 0.6


def test_many_prompts_have_a_safe_and_an_unsafe_answer():
    answers = defaultdict(set)
    for row in ROWS:
        answers[row["prompt"]].add(row["is_safe"])
    assert sum(len(labels) == 2 for labels in answers.values()) >= 100


@pytest.mark.parametrize("one, other", combinations(SPLITS, 2))
@field
def test_nothing_leaks_between_splits(one, other, field):
    """No prompt is shared and nothing is nearly the same."""
    ours, theirs = texts(SPLITS[one], field), texts(SPLITS[other], field)
    assert field == "response" or not set(ours) & set(theirs)
    assert nearest(ours, theirs) < 0.8


@split
def test_evaluation_prompts_are_new(split):
    assert nearest(texts(SPLITS[split], "prompt"), texts(EVALUATION, "prompt")) < 0.8


def baseline(field: str) -> float:
    """AUPRC on test of the recipe's baseline (TF-IDF + logistic regression) that sees one half of
    the pair only.
    """
    train, test = ([row[field] for row in SPLITS[name]] for name in ("train", "test"))
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(C=10, max_iter=1000),
    )
    scores = model.fit(train, unsafe(SPLITS["train"])).predict_proba(test)[:, 1]
    return average_precision_score(unsafe(SPLITS["test"]), scores)


def test_the_question_alone_does_not_decide():
    base_rate = sum(unsafe(SPLITS["test"])) / len(SPLITS["test"])
    assert abs(baseline("prompt") - base_rate) <= 0.08


def test_the_answer_alone_does_not_decide():
    """Its words say much (as in real data, where refusals are safe) but do not settle it."""
    assert baseline("response") <= 0.92


def test_answers_repeat_only_where_the_label_flips():
    labels = defaultdict(list)
    for row in ROWS:
        labels[" ".join(row["response"].lower().split())].append(row["is_safe"])
    repeated = {answer: found for answer, found in labels.items() if len(found) > 1}
    assert repeated  # the same words, safe after one question and unsafe after another
    assert [answer for answer, found in repeated.items() if sorted(found) != [False, True]] == []


def share_of_answers(condition) -> float:
    return sum(condition(len(row["response"].split())) for row in ROWS) / len(ROWS)


def test_long_answers():
    assert share_of_answers(lambda words: words > 30) >= 0.05


def test_short_answers():
    assert share_of_answers(lambda words: words < 10) >= 0.08


@field
def test_no_templated_openings(field):
    found = texts(ROWS, field)
    openings = Counter(" ".join(re.findall(r"[\w']+", text)[:4]) for text in found)
    opening, count = openings.most_common(1)[0]
    assert count / len(found) < 0.03, opening


def test_evaluation_file():
    """The paper's format: the same questions answered by several models, with two judges who
    sometimes differ.
    """
    assert len(EVALUATION) >= 100
    for row in EVALUATION:
        assert list(row) == ["prompt", "response", "model", "flagged"]
        assert all(row[name].strip() for name in ("prompt", "response", "model"))
        assert list(row["flagged"]) == ["gpt4", "human"]
        assert all(type(flag) is bool for flag in row["flagged"].values())
    models = {row["model"] for row in EVALUATION}
    # no real model is spoken for
    assert len(models) >= 3 and all(model.startswith("sample-") for model in models)
    prompts = texts(EVALUATION, "prompt")
    assert {(model, prompt) for model in models for prompt in prompts} == {
        (row["model"], " ".join(row["prompt"].lower().split())) for row in EVALUATION
    }
    for model in models:
        assert (
            0
            < sum(row["flagged"]["human"] for row in EVALUATION if row["model"] == model)
            < len(prompts)
        ), model
    assert (
        0
        < sum(row["flagged"]["gpt4"] != row["flagged"]["human"] for row in EVALUATION)
        < len(EVALUATION) / 4
    )


def test_card_counts_are_what_its_command_prints():
    card = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    command, printed = re.search(
        r"```python\n(.*?)```.*?```text\n(.*?)```", card, re.DOTALL
    ).groups()
    done = scripts.run([sys.executable, "-c", command], ROOT)
    assert done.stdout == printed
