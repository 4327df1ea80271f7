"""Repeated pairs, prompt-grouped splits, and what two splits share."""

import datasets
import pytest

from common.conversation import FEATURES, LABELS, UserError, pair
from common.data import deduplicate, grouped_split, overlap, prompt_key, taxonomy

A, B, C = taxonomy("beavertails")[:3]


def answered(
    id: str,
    prompt: str,
    response: str = "Hello",
    unsafe: bool | None = False,
    categories: list[str] | None = None,
) -> dict:
    """A row that labels its response."""
    labels = dict.fromkeys(LABELS) | {"response_unsafe": unsafe}
    row = {"id": id, "messages": pair(prompt, response), "categories": categories, "source": "test"}
    return row | labels


def dataset(*rows: dict) -> datasets.Dataset:
    return datasets.Dataset.from_list(list(rows), features=FEATURES)


@pytest.mark.parametrize(
    "votes, label, categories, conflicting",
    [
        ([(True, [A]), (True, [A])], True, [A], 0),
        ([(True, [A, B]), (True, [B, A])], True, [A, B], 0),
        ([(True, [A]), (False, []), (False, [])], False, [], 1),
        ([(True, [A]), (False, [])], False, [], 1),  # a tie is safe, as in GuardBench
        ([(True, [A, B]), (True, [A]), (False, [])], True, [A], 1),
        # no majority: the most often named
        ([(True, [A]), (True, [B]), (False, [])], True, [A, B], 1),
        ([(True, [A]), (True, [A]), (True, [B]), (True, [C])], True, [A], 1),
        ([(None, None), (None, None)], None, None, 0),
        ([(True, None), (True, [A])], True, [A], 1),  # whoever does not know does not vote
        ([(True, None), (True, None), (False, [])], True, None, 1),
    ],
)
def test_deduplicate_votes(votes, label, categories, conflicting):
    """A vote is what one annotation says of the same pair: unsafe, categories."""
    rows = []
    for number, (unsafe, named) in enumerate(votes):
        rows.append(answered(f"{number}", "Hi", unsafe=unsafe, categories=named))
    unique, report = deduplicate(dataset(*rows))
    (row,) = unique
    assert (row["id"], row["response_unsafe"], row["categories"]) == ("0", label, categories)
    assert report == {"rows": len(votes), "unique": 1, "conflicting": conflicting}


def test_deduplicate_keeps_order_and_other_answers():
    rows = dataset(
        answered("one", "One", unsafe=True, categories=[A]),
        answered("two", "Two", categories=[]),
        answered("one again", "One", categories=[]),
        answered("other", "One", "Another answer", unsafe=True, categories=[B]),
    )
    unique, report = deduplicate(rows)
    assert list(unique["id"]) == ["one", "two", "other"]
    assert list(unique["response_unsafe"]) == [False, False, True]
    assert report == {"rows": 4, "unique": 3, "conflicting": 1}


@pytest.mark.parametrize("prompts, ratio", [(2, 0.01), (2, 0.6), (2, 0.99), (10, 0.3), (57, 0.2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_grouped_split(prompts, ratio, seed):
    """No prompt on both sides, no row lost, about the share that was asked for, never an empty
    side.
    """
    written = []
    for number in range(prompts):
        for prompt in (f"Prompt {number}", f"  prompt  {number}", f"PROMPT {number}"):
            written.append(answered(prompt, prompt))
    rows = dataset(*written)
    train, held_out = grouped_split(rows, ratio, seed)
    assert sorted([*train["id"], *held_out["id"]]) == sorted(rows["id"])
    train_prompts = {prompt_key(row) for row in train}
    held_out_prompts = {prompt_key(row) for row in held_out}
    assert not train_prompts & held_out_prompts
    assert len(held_out_prompts) == min(max(1, round(ratio * prompts)), prompts - 1)
    assert grouped_split(rows, ratio, seed)[1].to_list() == held_out.to_list()
    nothing = {"prompt_in_train": 0, "pair_in_train": 0}
    assert overlap(train, held_out) == {"rows": len(held_out)} | nothing


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5, float("nan")])
def test_grouped_split_refuses_a_bad_ratio(ratio):
    with pytest.raises(UserError, match="eval_split_ratio"):
        grouped_split(dataset(answered("a", "Hi"), answered("b", "Bye")), ratio, 0)


def test_grouped_split_needs_two_prompts():
    with pytest.raises(UserError, match="fewer than two"):
        grouped_split(dataset(answered("a", "Hi"), answered("b", "Hi")), 0.5, 0)


def test_overlap_counts_prompts_and_pairs():
    train = dataset(answered("train", "Hi"))
    held_out = dataset(
        answered("same pair", "hi "),
        answered("same prompt", "HI", "Another answer"),
        answered("neither", "Bye"),
    )
    assert overlap(train, held_out) == {"rows": 3, "prompt_in_train": 2, "pair_in_train": 1}
