"""From labelled conversations to what LoRA-Guard trains on: pairs, prompts or responses, each with
its labels.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from arguments import GuardArguments
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from common import templates
from common.conversation import Messages, UserError, parts_of
from common.labels import LABEL_OF, UNKNOWN, UNSAFE, settle_labels, targets

logger = logging.getLogger("lora_guard")


@dataclass(frozen=True)
class Labelled:
    """What a guard judges, whether it is unsafe, and its categories (None: unknown)."""

    messages: Messages
    unsafe: bool
    categories: list[str] | None


def settled_labels(rows: Dataset, args: GuardArguments) -> dict[str, str]:
    """What is learned of each input, in order: `unsafe`, then the categories of the training rows,
    with their descriptions ("" without one).

    Raises:
        UserError: without its unsafe head the guard would have no output.
    """
    inputs = every_input(labelled_inputs(rows, args.guard_inputs))
    unsafe = [one.unsafe for one in inputs]
    named = [one.categories for one in inputs]
    labels = {UNSAFE: "", **settle_labels(args.categories, unsafe, named)}
    if args.no_unsafe_head and any(unsafe) and len(labels) == 1:
        raise UserError("--no-unsafe-head: no row names a category, so nothing is left to learn")
    return labels


def head_labels(labels: Sequence[str], args: GuardArguments) -> list[str]:
    """The outputs of the head: without an unsafe one the highest category says it."""
    return [name for name in labels if name != UNSAFE or not args.no_unsafe_head]


def encode_rows(
    rows: Dataset,
    spec: str,
    labels: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    args: GuardArguments,
) -> tuple[Dataset, dict[str, Any]]:
    """Token ids and labels of each trained input, sorted by length, and their counts.

    The labels are those of `settled_labels`: 1, 0, or NaN where nobody knows.

    Args:
        spec: what the rows are called in a message.
    """
    kinds = labelled_inputs(rows, args.guard_inputs)
    counts: dict[str, Any] = {}
    for kind, found in kinds.items():
        unsafe = sum(one.unsafe for one in found)
        if not unsafe:
            said = "choose other --guard-inputs or other data"
            raise UserError(f"{spec}: no {kind} that is labelled unsafe; {said}")
        counts[kind] = {"rows": len(found), "unsafe": unsafe}
    inputs = every_input(kinds)
    ids = token_ids([one.messages for one in inputs], tokenizer)
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
    unsafe = [one.unsafe for one in inputs]
    wanted = np.array(targets(list(labels), unsafe, [one.categories for one in inputs]))
    # NaN, because the step is divided by its labels, known or not
    wanted[wanted == UNKNOWN] = np.nan
    return Dataset.from_dict({"input_ids": cut, "labels": wanted.tolist()}).select(order), counts


def labelled_inputs(rows: Dataset, kinds: Sequence[str]) -> dict[str, list[Labelled]]:
    """The inputs of each kind that are labelled, or whose categories tell the label."""
    found: dict[str, list[Labelled]] = {kind: [] for kind in kinds}
    for row in rows:
        parts = parts_of(row["messages"])
        for kind in kinds:
            if kind not in parts:
                continue
            # where there is an answer, the categories speak of it
            of_answer = kind == "prompt" and "response" in parts
            named = None if of_answer else row["categories"]
            unsafe = row[LABEL_OF[kind]]
            if unsafe is None and named is not None:
                unsafe = bool(named)
            if unsafe is None:
                continue
            found[kind].append(Labelled(parts[kind], unsafe, named))
    return found


def every_input(kinds: Mapping[str, Sequence[Labelled]]) -> list[Labelled]:
    """The inputs of all kinds in one list."""
    return [one for found in kinds.values() for one in found]


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
