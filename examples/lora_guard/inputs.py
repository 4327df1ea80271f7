"""From labelled conversations to what LoRA-Guard trains on: pairs, prompts or responses, each with
its labels.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from arguments import GuardArguments
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from common import data, templates
from common.conversation import Messages, UserError, parts_of

logger = logging.getLogger("lora_guard")
CATEGORIES = data.taxonomy("beavertails")  # label index = position; rows are read by key
UNKNOWN = [np.nan] * len(CATEGORIES)


def encode_rows(
    rows: Dataset, spec: str, tokenizer: PreTrainedTokenizerBase, args: GuardArguments
) -> tuple[Dataset, dict[str, Any]]:
    """Token ids and labels of each trained input, sorted by length, and their counts.

    Args:
        spec: what the rows are called in a message.
    """
    kinds = labelled_inputs(rows, args.guard_inputs)
    counts: dict[str, Any] = {}
    for kind, found in kinds.items():
        unsafe = int(sum(label[0] for _, label in found))
        if not unsafe:
            said = "choose other --guard-inputs or other data"
            raise UserError(f"{spec}: no {kind} that is labelled unsafe; {said}")
        counts[kind] = {"rows": len(found), "unsafe": unsafe}
    inputs = [one for found in kinds.values() for one in found]
    ids = token_ids([messages for messages, _ in inputs], tokenizer)
    counts["truncated"] = sum(len(one) > args.max_length for one in ids)
    if counts["truncated"]:
        said = "Cut %d of %d inputs to %d tokens (the end)."
        logger.warning(
            said,
            counts["truncated"],
            len(ids),
            args.max_length,
        )
    control = templates.control_ids(tokenizer)
    cut = [templates.cut(one, args.max_length, control) for one in ids]
    order = np.argsort([len(one) for one in cut], kind="stable")
    labels = [label for _, label in inputs]
    return Dataset.from_dict({"input_ids": cut, "labels": labels}).select(order), counts


def labelled_inputs(
    rows: Dataset, kinds: Sequence[str]
) -> dict[str, list[tuple[Messages, list[float]]]]:
    """The inputs of each kind, with labels [unsafe, 14 categories], NaN where one is not known."""
    found: dict[str, list] = {kind: [] for kind in kinds}
    for row in rows:
        parts = parts_of(row["messages"])
        named = row["categories"]
        answered = "response" in parts
        categories = UNKNOWN
        if named is not None:
            categories = [float(category in named) for category in CATEGORIES]
        for kind in kinds:
            unsafe = row["prompt_unsafe" if kind == "prompt" else "response_unsafe"]
            if kind not in parts or unsafe is None:
                continue
            # where there is an answer, the categories speak of it as well
            known = UNKNOWN if kind == "prompt" and answered else categories
            labels = [float(unsafe), *known]
            found[kind].append((parts[kind], labels))
    return found


def judged_inputs(rows: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> list[Messages]:
    """What the guard judges of a few conversations: of each one the kinds that it is trained on."""
    inputs = []
    for row in rows:
        parts = parts_of(row["messages"])
        inputs += [parts[kind] for kind in kinds if kind in parts]
    return inputs


def token_ids(
    inputs: Sequence[Messages], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> list[list[int]]:
    """What the guard reads of each input; None cuts nothing."""
    parts = [templates.render("lora_guard", messages, tokenizer) for messages in inputs]
    ids = templates.encode(tokenizer, parts)
    if max_length is None:
        return ids
    control = templates.control_ids(tokenizer)
    return [templates.cut(one, max_length, control) for one in ids]
