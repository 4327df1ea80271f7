"""Repeats and leaks: rows of one conversation, splits that share no prompt, and how far two sets
overlap.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping

from datasets import Dataset
from sklearn.model_selection import GroupShuffleSplit

from common.conversation import FEATURES, LABELS, UserError, last_turns


def prompt_key(row: Mapping) -> str:
    """The last user turn, case and spacing apart: groups rows, so that no prompt stands on both
    sides of a split.
    """
    return " ".join((last_turns(row["messages"])[0] or "").lower().split())


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
        groups[json.dumps([[m["role"], m["content"]] for m in row["messages"]])].append(row)
    out, conflicting = [], 0
    for group in groups.values():
        first = dict(group[0])
        given = [
            [*(row[k] for k in LABELS), row["categories"] and sorted(row["categories"])]
            for row in group
        ]
        conflicting += any(labels != given[0] for labels in given)
        for label in LABELS:
            votes = [row[label] for row in group if row[label] is not None]
            first[label] = sum(votes) * 2 > len(votes) if votes else None
        # Whoever outvoted has no say in the categories: a response voted safe has none, an unsafe
        # one has some.
        agreeing = [
            row["categories"] for row in group if row["response_unsafe"] == first["response_unsafe"]
        ]
        named = [names for names in agreeing if names is not None]
        votes = Counter(name for names in named for name in names)
        bar = min(len(group) / 2, max(votes.values(), default=1) - 0.5)
        first["categories"] = (
            sorted(name for name, count in votes.items() if count > bar) if named else None
        )
        out.append(first)
    counts = {"rows": len(rows), "unique": len(out), "conflicting": conflicting}
    return Dataset.from_list(out, features=FEATURES), counts


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
    size = min(max(1, round(ratio * count)), count - 1)  # neither side may be empty
    train, held_out = next(
        GroupShuffleSplit(1, test_size=size, random_state=seed).split(groups, groups=groups)
    )
    return rows.select(sorted(train)), rows.select(sorted(held_out))


def overlap(train: Dataset, held_out: Dataset) -> dict[str, int]:
    """How many rows of `held_out` share their prompt, and their prompt and response, with a row of
    `train`.
    """
    pair_key = lambda row: (prompt_key(row), last_turns(row["messages"])[1])  # noqa: E731
    prompts, pairs = {prompt_key(r) for r in train}, {pair_key(r) for r in train}
    return {
        "rows": len(held_out),
        "prompt_in_train": sum(prompt_key(r) in prompts for r in held_out),
        "pair_in_train": sum(pair_key(r) in pairs for r in held_out),
    }
