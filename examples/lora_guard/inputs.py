"""From labelled conversations to what LoRA-Guard trains on: pairs, prompts or responses, each with
its labels.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from adapter import CATEGORIES
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from common import templates
from common.conversation import Messages, UserError, last_turns, pair

logger = logging.getLogger("lora_guard")


def encode_rows(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    guard_inputs: Sequence[str],
    max_length: int,
    spec: str,
) -> tuple[Dataset, dict]:
    """Token ids and labels [unsafe, 14 categories] (NaN: unknown), one row for each trained input
    of a conversation.

    Returns:
        The rows, sorted by length, and their counts.
    """
    control = templates.control_ids(tokenizer)
    kinds: dict[str, list] = {kind: [] for kind in guard_inputs}
    for row in rows:
        prompt, response = last_turns(row["messages"])
        named = row["categories"]
        categories = (
            [np.nan] * len(CATEGORIES) if named is None else [float(c in named) for c in CATEGORIES]
        )
        if response is not None and row["response_unsafe"] is not None:
            label = [float(row["response_unsafe"]), *categories]
            if "pair" in kinds and prompt is not None:
                kinds["pair"].append((pair(prompt, response), label))
            if "response" in kinds:
                kinds["response"].append((pair(None, response), label))
        if "prompt" in kinds and prompt is not None and row["prompt_unsafe"] is not None:
            known = response is None  # else the categories speak of the answer as well
            kinds["prompt"].append(
                (
                    pair(prompt),
                    [
                        float(row["prompt_unsafe"]),
                        *(categories if known else [np.nan] * len(CATEGORIES)),
                    ],
                )
            )
    for kind, found in kinds.items():
        if not any(label[0] for _, label in found):
            raise UserError(
                f"{spec}: no {kind} that is labelled unsafe; choose other --guard-inputs or other data"
            )
    inputs = [item for found in kinds.values() for item in found]
    ids = templates.encode(
        tokenizer, [templates.render("lora_guard", m, tokenizer) for m, _ in inputs]
    )
    truncated = sum(len(sequence) > max_length for sequence in ids)
    if truncated:
        logger.warning(
            "Cut %d of %d inputs to %d tokens (the end).", truncated, len(ids), max_length
        )
    encoded = Dataset.from_dict(
        {
            "input_ids": [templates.cut(sequence, max_length, control) for sequence in ids],
            "labels": [label for _, label in inputs],
        }
    )
    order = np.argsort([len(sequence) for sequence in encoded["input_ids"]], kind="stable")
    counts = {
        kind: {"rows": len(found), "unsafe": int(sum(y[0] for _, y in found))}
        for kind, found in kinds.items()
    }
    return encoded.select(order), {**counts, "truncated": truncated}


def judged_inputs(rows: Sequence[Mapping[str, Any]], guard_inputs: Sequence[str]) -> list[Messages]:
    """What the guard judges of a few conversations: of each one the kinds that it is trained on."""
    inputs = []
    for row in rows:
        prompt, response = last_turns(row["messages"])
        found = {"pair": (prompt, response), "prompt": (prompt, None), "response": (None, response)}
        for kind in guard_inputs:
            wanted = {"pair": (prompt, response), "prompt": (prompt,), "response": (response,)}[
                kind
            ]
            if None not in wanted:
                inputs.append(pair(*found[kind]))
    return inputs


def unlabelled_rows(
    inputs: Sequence[Messages], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    """Token ids of inputs in their order, with labels that mean nothing."""
    control = templates.control_ids(tokenizer)
    parts = [templates.render("lora_guard", messages, tokenizer) for messages in inputs]
    ids = [templates.cut(one, max_length, control) for one in templates.encode(tokenizer, parts)]
    nothing = [[0.0] * (1 + len(CATEGORIES))] * len(ids)
    return Dataset.from_dict({"input_ids": ids, "labels": nothing})
