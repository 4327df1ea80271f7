"""The rows that a guard is trained on and those that it is validated on."""

import json
import logging
from collections.abc import Sequence
from typing import Any

from datasets import Dataset, concatenate_datasets

from common.conversation import UserError
from common.data import load_conversations
from common.data.repeats import (
    deduplicate,
    grouped_split,
    judged_text,
    near_copies_between,
    overlap,
)
from common.data.specs import in_one_name
from common.labels import judged_rows
from common.obfuscation import obfuscated

logger = logging.getLogger(__name__)


def load_training_rows(
    train: str | Sequence[str],
    validation: str | None,
    held_out_share: float | None,
    seed: int,
    *,
    judge: str = "pair",
    one_row_a_pair: bool = False,
    max_train_rows: int | None = None,
    **checks: Any,
) -> tuple[Dataset, Dataset | None, dict[str, int]]:
    """Load the rows to train on, and those to validate on where there shall be any.

    Args:
        train: a data spec, or several: a conversation that more than one of them holds has the
            labels of the last, so that rows which were labelled again replace the old ones.
        validation: a data spec; None holds out prompts of the training rows.
        held_out_share: how many of them; None holds out nothing.
        judge: pair, prompt or response: what the guard sees of a row, and so what is looked at
            for repeats, corrections and leaks (`judged_rows`).
        one_row_a_pair: repeated pairs become one row, with its labels by majority vote, and
            training rows that are near-copies of validation rows are left out.
        max_train_rows: read only the first so many training rows of each spec.
        checks: of `load_conversations`.

    Returns:
        Training rows, validation rows or None, and what both share (`overlap`; {} without any).

    Raises:
        UserError: a spec or a row is wrong, or a label that is required is positive in no row that
            was held out, or in none that is left to train on.
    """

    def load(spec: str, max_rows: int | None = None, **more: Any) -> Dataset:
        rows = load_conversations(spec, max_rows=max_rows, **checks, **more)
        rows = judged_rows(rows, judge)
        if one_row_a_pair:
            rows, repeats = deduplicate(rows)
            logger.info("%s: %s", spec, json.dumps(repeats))
        return rows

    specs = [train] if isinstance(train, str) else train
    first, *later = specs
    rows = load(first, max_train_rows)
    held_out = None
    for spec in later:  # rows that were labelled again may all be safe
        rows = corrected(rows, load(spec, max_train_rows, need_positive=False), spec)
    if validation is not None:
        held_out = load(validation)
    elif held_out_share is not None:
        rows, held_out = _split(rows, held_out_share, seed, checks.get("require", ()))
    left_out = 0
    if one_row_a_pair and held_out is not None:
        rows, left_out = _without_copies(rows, held_out)
    for label in checks.get("require", ()):
        _check_left(rows[label], in_one_name(specs))
    if held_out is None:
        return rows, None, {}
    return rows, held_out, _shared(rows, held_out, left_out)


def _split(
    rows: Dataset, share: float, seed: int, require: Sequence[str]
) -> tuple[Dataset, Dataset]:
    """Training rows and those that are held out, of which one at least is unsafe."""
    rows, held_out = grouped_split(rows, share, seed)
    for label in require:
        if not any(held_out[label]):
            said = "no unsafe row was held out; take a larger share"
            raise UserError(f"--eval_split_ratio {share}: {said}")
    return rows, held_out


def _check_left(unsafe: Sequence[bool], name: str) -> None:
    """Refuse training rows that are all safe; those that are all unsafe are worth a warning."""
    if not any(unsafe):
        raise UserError(f"{name}: no unsafe row is left to train on")
    if all(unsafe):
        logger.warning("%s: no safe row; the guard can only learn to flag everything.", name)


def _shared(rows: Dataset, held_out: Dataset, left_out: int) -> dict[str, int]:
    """What training and validation share, with a warning where it flatters the guard."""
    shared = overlap(rows, held_out)
    if left_out:
        shared["left_out_of_train"] = left_out
    if shared["prompt_in_train"]:
        said = "Validation shares prompts with training (%s): its scores flatter the guard."
        logger.warning(said, shared)
    return shared


def _without_copies(rows: Dataset, held_out: Dataset) -> tuple[Dataset, int]:
    """The training rows that are no near-copies of validation rows, and how many were.

    Raises:
        UserError: none is left.
    """
    texts = [judged_text(row) for row in held_out]
    are_copies, _ = near_copies_between(map(judged_text, rows), texts)
    kept = [number for number, is_copy in enumerate(are_copies) if not is_copy]
    if not kept:
        raise UserError("--deduplicate: every training row is a near-copy of a validation row")
    left_out = len(rows) - len(kept)
    if left_out:
        logger.info("%d training rows are near-copies of validation rows: left out.", left_out)
    return rows.select(kept), left_out


def augment(
    rows: Dataset, names: Sequence[str], seed: int
) -> tuple[Dataset, dict[str, dict[str, int]]]:
    """Training rows with an obfuscated copy of each, safe or unsafe, for every name.

    Safe rows are copied too: a guard that saw unsafe ones alone would learn that whatever is
    obfuscated is unsafe.

    Args:
        names: of `common.obfuscation.OBFUSCATIONS`.

    Returns:
        The rows and then their copies, whose ids end with the name; and by name how many were
        added {"rows", "unsafe"}, which is {} without names.
    """
    parts = [rows]
    added = {}
    for name in names:

        def copy(row: dict[str, Any], name: str = name) -> dict[str, Any]:
            messages = obfuscated(row["messages"], name, seed)
            return {"id": f"{row['id']}+{name}", "messages": messages}

        parts.append(rows.map(copy, keep_in_memory=True, desc=name))
        unsafe = 0
        for prompt, response in zip(rows["prompt_unsafe"], rows["response_unsafe"], strict=True):
            unsafe += bool(prompt or response)
        added[name] = {"rows": len(rows), "unsafe": unsafe}
    if added:
        logger.info("Obfuscated copies of training rows: %s", json.dumps(added))
    return concatenate_datasets(parts), added


def corrected(rows: Dataset, later: Dataset, spec: str) -> Dataset:
    """The rows of two data sets as one; of a conversation that both hold, those of the later."""
    known = {json.dumps(messages) for messages in later["messages"]}
    kept = []
    for number, messages in enumerate(rows["messages"]):
        if json.dumps(messages) not in known:
            kept.append(number)
    replaced = len(rows) - len(kept)
    if replaced:
        said = "%s: its labels replace those of %d rows of the data before it."
        logger.info(said, spec, replaced)
    return concatenate_datasets([rows.select(kept), later])
