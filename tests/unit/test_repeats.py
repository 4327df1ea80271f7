"""Repeated pairs, prompt-grouped splits, and what two splits share."""

import datasets
import pytest

from common.conversation import FEATURES, LABELS, UserError, pair
from common.data import deduplicate, grouped_split, overlap, prompt_key, taxonomy


def conversation(
    id: str, messages: list[dict], *labels: bool | None, categories: list[str] | None = None
) -> dict:
    return {
        "id": id,
        "messages": messages,
        **dict(zip(LABELS, labels, strict=True)),
        "categories": categories,
    }


def dataset(*rows: dict) -> datasets.Dataset:
    return datasets.Dataset.from_list([row | {"source": "test"} for row in rows], features=FEATURES)


def answers(*votes: tuple[bool | None, list[str] | None], prompt: str = "Hi") -> list[dict]:
    """One pair with several opinions on it: unsafe, categories."""
    return [
        conversation(f"{prompt}{i}", pair(prompt, "Hello"), None, unsafe, None, categories=named)
        for i, (unsafe, named) in enumerate(votes)
    ]


A, B, C = taxonomy("beavertails")[:3]


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
    rows, report = deduplicate(dataset(*answers(*votes)))
    assert len(rows) == 1
    assert rows[0]["id"] == "Hi0"
    assert (rows[0]["response_unsafe"], rows[0]["categories"]) == (label, categories)
    assert report == {"rows": len(votes), "unique": 1, "conflicting": conflicting}


def test_deduplicate_keeps_order_and_other_answers():
    rows = dataset(
        *answers((True, [A]), prompt="One"),
        *answers((False, []), prompt="Two"),
        *answers((False, []), prompt="One"),
        conversation("other", pair("One", "Another answer"), None, True, None, categories=[B]),
    )
    unique, report = deduplicate(rows)
    assert list(unique["id"]) == ["One0", "Two0", "other"]
    assert list(unique["response_unsafe"]) == [False, False, True]
    assert report == {"rows": 4, "unique": 3, "conflicting": 1}


@pytest.mark.parametrize("prompts, ratio", [(2, 0.01), (2, 0.6), (2, 0.99), (10, 0.3), (57, 0.2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_grouped_split(prompts, ratio, seed):
    """No prompt on both sides, no row lost, about the share that was asked for, never an empty
    side.
    """
    rows = dataset(
        *(conversation(f"{i}-{j}", pair(p, f"Answer {j}"), None, False, None)
          for i in range(prompts) for j, p in enumerate((f"Prompt {i}", f"  prompt  {i}", f"PROMPT {i}")))
    )  # fmt: skip
    train, held_out = grouped_split(rows, ratio, seed)
    assert sorted([*train["id"], *held_out["id"]]) == sorted(rows["id"])
    sides = [{prompt_key(row) for row in side} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == min(max(1, round(ratio * prompts)), prompts - 1)
    assert grouped_split(rows, ratio, seed)[1].to_list() == held_out.to_list()
    assert overlap(train, held_out) == {
        "rows": len(held_out),
        "prompt_in_train": 0,
        "pair_in_train": 0,
    }


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5, float("nan")])
def test_grouped_split_refuses_a_bad_ratio(ratio):
    with pytest.raises(UserError, match="eval_split_ratio"):
        grouped_split(dataset(*answers((True, [A])), *answers((True, [A]), prompt="Bye")), ratio, 0)


def test_grouped_split_needs_two_prompts():
    with pytest.raises(UserError, match="fewer than two"):
        grouped_split(dataset(*answers((True, [A]), (True, [A]))), 0.5, 0)


def test_overlap_counts_prompts_and_pairs():
    train = dataset(*answers((True, [A])))
    held_out = dataset(
        conversation("same pair", pair("hi ", "Hello"), None, False, None),
        conversation("same prompt", pair("HI", "Another answer"), None, False, None),
        conversation("neither", pair("Bye", "Hello"), None, False, None),
    )
    assert overlap(train, held_out) == {"rows": 3, "prompt_in_train": 2, "pair_in_train": 1}
