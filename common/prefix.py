"""Rows that begin alike, as one row: what they share is computed once, in training, too.

Two thirds of a usual ExpGuard row are the policy, the same in all of them. Laid out as a tree in
which each token sees the tokens on its own path to the root alone, a batch gives the same losses
and gradients as row by row.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig


def shared_prefix_collator(
    rows: Sequence[dict[str, Any]],
) -> dict[str, torch.Tensor]:
    """A batch of one row without padding, for sdpa attention.

    Args:
        rows: each with `input_ids` and `labels`, -100 where there is none.

    Returns:
        input_ids, position_ids of shape (1, n) and attention_mask (1, 1, n, n), bool, of n
        different tokens; for the k labels in the order of the rows: labels (1, 1 + k), whose first
        is none; keep (k), the token whose logits predict the label; owner (k), the index of its
        row.
    """
    sequences = [row["input_ids"] for row in rows]
    tokens, positions, paths = tree(sequences)
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    labels = [-100]
    keep = []
    owner = []
    for i, path in enumerate(paths):
        at = torch.tensor(path)
        square = torch.ones(len(path), len(path), dtype=torch.bool)
        rows_of_it = at[:, None]
        mask[rows_of_it, at] = square.tril()
        for place, label in enumerate(rows[i]["labels"]):
            if label == -100:
                continue
            before = path[place - 1]
            keep.append(before)
            labels.append(label)
            owner.append(i)
    return {
        "input_ids": torch.tensor([tokens]),
        "position_ids": torch.tensor([positions]),
        "attention_mask": mask[None, None],
        "labels": torch.tensor([labels]),
        # rows may be cut before their first label: then both are empty
        "keep": torch.tensor(keep, dtype=torch.long),
        "owner": torch.tensor(owner, dtype=torch.long),
    }


def tree(
    sequences: Sequence[list[int]],
) -> tuple[list[int], list[int], list[list[int]]]:
    """Sequences as a tree: its tokens, their positions, and for each sequence the places of its
    tokens in the tree.
    """
    tokens: list[int] = []
    positions: list[int] = []
    paths: list[list[int]] = [[] for _ in sequences]
    places: dict[tuple[int, int], int] = {}  # of a token, by the place before it and its id
    order = list(range(len(sequences)))
    order.sort(key=lambda i: sequences[i])
    for i in order:
        path = paths[i]
        before = -1
        for position, token in enumerate(sequences[i]):
            place = places.setdefault((before, token), len(tokens))
            if place == len(tokens):
                tokens.append(token)
                positions.append(position)
            path.append(place)
            before = place
    return tokens, positions, paths


def can_share(
    config: PreTrainedConfig,
    longest: int,
) -> bool:
    """Whether rows of at most `longest` tokens can share a beginning: every layer of the model
    attends, and to all of a row.
    """
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None) or math.inf
    kinds = getattr(config, "layer_types", None) or []
    attends = {"full_attention", "sliding_attention"}.issuperset(kinds)
    return attends and longest < window


def shared_prefix(
    prompts: Sequence[list[int]],
    worth: int = 16,
) -> int:
    """How many tokens all prompts begin with, leaving at least one of each.

    Args:
        worth: 0 is returned where they are fewer, which are not worth a pass of their own.
    """
    if len(prompts) < 2:
        return 0
    longest = min(map(len, prompts)) - 1
    first = min(prompts)
    last = max(prompts)  # no two prompts differ earlier than these
    length = 0
    while length < longest and first[length] == last[length]:
        length += 1
    return length if length >= worth else 0
