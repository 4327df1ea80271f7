"""Repeated pairs, prompt-grouped splits, and what two splits share."""

import datasets
import pytest

from common.conversation import FEATURES, LABELS, UserError, pair
from common.data import deduplicate, grouped_split, overlap, prompt_key, taxonomy

A, B, C = taxonomy("beavertails")[:3]


def answered(prompt: str, response: str = "Hello", unsafe=False, categories=None) -> dict:
    """A row that labels its response."""
    row = {"id": prompt, "messages": pair(prompt, response), "source": "test", "language": None}
    labels = dict.fromkeys(LABELS) | {"response_unsafe": unsafe, "categories": categories}
    return row | labels


def dataset(*rows: dict) -> datasets.Dataset:
    return datasets.Dataset.from_list(list(rows), features=FEATURES)


SAFE = (False, [])
VOTES = {  # what it shows: annotations of one pair, the label and the categories, conflicting
    "agreed": ([(True, [A, B]), (True, [B, A])], (True, [A, B]), 0),
    "majority": ([(True, [A]), SAFE, SAFE], SAFE, 1),
    "a tie is safe, as in GuardBench": ([(True, [A]), SAFE], SAFE, 1),
    "categories by majority": ([(True, [A, B]), (True, [A]), SAFE], (True, [A]), 1),
    "no majority, the most often named": ([(True, [A]), (True, [B]), SAFE], (True, [A, B]), 1),
    "one named most often": ([(True, [A])] * 2 + [(True, [B]), (True, [C])], (True, [A]), 1),
    "nothing known": ([(None, None)] * 2, (None, None), 0),
    "whoever does not know does not vote": ([(True, None), (True, [A])], (True, [A]), 1),
    "unsafe of an unknown kind": ([(True, None)] * 2 + [SAFE], (True, None), 1),
}


@pytest.mark.parametrize(("votes", "expected", "conflicting"), VOTES.values(), ids=VOTES)
def test_deduplicate_votes(votes, expected, conflicting):
    rows = [answered("Hi", unsafe=unsafe, categories=named) for unsafe, named in votes]
    unique, report = deduplicate(dataset(*rows))
    (row,) = unique
    assert (row["response_unsafe"], row["categories"]) == expected
    assert report == {"rows": len(votes), "unique": 1, "conflicting": conflicting}


def test_deduplicate_keeps_order_and_other_answers():
    rows = dataset(answered("One"), answered("Two"), answered("One"), answered("One", "Another"))
    unique, report = deduplicate(rows)
    texts = [pair("One", "Hello"), pair("Two", "Hello"), pair("One", "Another")]
    assert list(unique["messages"]) == texts
    assert report == {"rows": 4, "unique": 3, "conflicting": 0}


@pytest.mark.parametrize(
    ("prompts", "ratio", "held_out"), [(2, 0.01, 1), (2, 0.99, 1), (10, 0.3, 3), (57, 0.2, 11)]
)
def test_grouped_split(prompts, ratio, held_out):
    """No prompt on both sides, no row lost, and never an empty side."""
    spellings = ("Prompt {}", "  prompt  {}", "PROMPT {}")
    texts = [text.format(number) for number in range(prompts) for text in spellings]
    rows = dataset(*map(answered, texts))
    train, test = grouped_split(rows, ratio, 0)
    assert sorted([*train["id"], *test["id"]]) == sorted(texts)
    assert not set(map(prompt_key, train)) & set(map(prompt_key, test))
    assert len(set(map(prompt_key, test))) == held_out
    assert grouped_split(rows, ratio, 0)[1].to_list() == test.to_list()


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5, float("nan")])
def test_grouped_split_refuses_a_bad_ratio(ratio):
    with pytest.raises(UserError, match="eval_split_ratio"):
        grouped_split(dataset(answered("Hi"), answered("Bye")), ratio, 0)


def test_grouped_split_needs_two_prompts():
    with pytest.raises(UserError):
        grouped_split(dataset(answered("Hi"), answered("hi")), 0.5, 0)


def test_overlap_counts_prompts_and_pairs():
    test = dataset(answered("hi "), answered("HI", "Another answer"), answered("Bye"))
    found = overlap(dataset(answered("Hi")), test)
    assert found == {"rows": 3, "prompt_in_train": 2, "pair_in_train": 1}
