"""Repeats and leaks: rows of one conversation, splits that share no prompt, and how far two sets
overlap.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from datasets import Dataset
from sklearn.model_selection import GroupShuffleSplit

from common.conversation import FEATURES, LABELS, UserError, last_turns


def prompt_key(row: Mapping) -> str:
    """The last user turn, case and spacing apart: groups rows, so that no prompt stands on both
    sides of a split.
    """
    prompt, _ = last_turns(row["messages"])
    words = (prompt or "").lower().split()
    return " ".join(words)


def deduplicate(rows: Dataset) -> tuple[Dataset, dict[str, int]]:
    """One row a conversation, labels by majority vote.

    BeaverTails-330k holds about 3.3 annotations a pair. A response is unsafe if more than half of
    its annotations say so (as GuardBench does: safe if the mean of is_safe is at least 0.5); a
    category holds if more than half name it, and an unsafe response keeps its most often named ones
    even below half.

    Returns:
        The rows (first occurrence, in order) and a report: rows, unique, conflicting.
    """
    groups = defaultdict(list)
    for row in rows:
        groups[json.dumps(row["messages"])].append(row)
    unique = []
    conflicting = 0
    for group in groups.values():
        first = dict(group[0])
        conflicting += any(_opinion(row) != _opinion(first) for row in group)
        for label in LABELS:
            votes = [row[label] for row in group if row[label] is not None]
            first[label] = sum(votes) * 2 > len(votes) if votes else None
        first["categories"] = _voted_categories(group, first["response_unsafe"])
        unique.append(first)
    counts = {"rows": len(rows), "unique": len(unique), "conflicting": conflicting}
    return Dataset.from_list(unique, features=FEATURES), counts


def _opinion(row: Mapping) -> list[Any]:
    """The labels and categories of a row, to be compared with those of its repeats."""
    categories = row["categories"]
    labels = [row[label] for label in LABELS]
    return [*labels, categories and sorted(categories)]


def _voted_categories(group: Sequence[Mapping], unsafe: bool | None) -> list[str] | None:
    """Whoever was outvoted has no say in the categories: a response that was voted safe has none,
    an unsafe one has some.
    """
    agreeing = [row["categories"] for row in group if row["response_unsafe"] == unsafe]
    known = [names for names in agreeing if names is not None]
    if not known:
        return None
    votes = Counter(chain.from_iterable(known))
    most = max(votes.values(), default=1)
    bar = min(len(group) / 2, most - 0.5)
    return sorted(name for name, count in votes.items() if count > bar)


def grouped_split(rows: Dataset, ratio: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split off about `ratio` of the prompts with all their rows. Raises UserError unless 0 < ratio
    < 1.
    """
    if not 0 < ratio < 1:
        raise UserError(f"--eval_split_ratio {ratio}: must lie strictly between 0 and 1")
    groups = [prompt_key(row) for row in rows]
    count = len(set(groups))
    if count < 2:
        raise UserError("--eval_split_ratio: fewer than two different prompts, nothing to split")
    size = round(ratio * count)
    size = min(max(1, size), count - 1)  # neither side may be empty
    splitter = GroupShuffleSplit(1, test_size=size, random_state=seed)
    train, held_out = next(splitter.split(groups, groups=groups))
    train, held_out = sorted(train), sorted(held_out)
    return rows.select(train), rows.select(held_out)


def overlap(train: Dataset, held_out: Dataset) -> dict[str, int]:
    """How many rows of `held_out` share their prompt, and their prompt and response, with a row of
    `train`.
    """
    seen = {_pair_key(row) for row in train}
    prompts = {prompt for prompt, _ in seen}
    keys = [_pair_key(row) for row in held_out]
    return {
        "rows": len(keys),
        "prompt_in_train": sum(prompt in prompts for prompt, _ in keys),
        "pair_in_train": sum(key in seen for key in keys),
    }


def _pair_key(row: Mapping) -> tuple[str, str | None]:
    _, response = last_turns(row["messages"])
    return prompt_key(row), response
