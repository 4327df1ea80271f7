"""The rows that a guard is trained on and those that it is validated on."""

import json
import logging
from typing import Any

from datasets import Dataset

from common.conversation import UserError
from common.data import load_conversations
from common.data.repeats import deduplicate, grouped_split, overlap

logger = logging.getLogger(__name__)


def load_training_rows(
    train: str,
    validation: str | None,
    held_out_share: float | None,
    seed: int,
    *,
    one_row_a_pair: bool = False,
    max_train_rows: int | None = None,
    **checks: Any,
) -> tuple[Dataset, Dataset | None, dict[str, int]]:
    """Load the rows to train on, and those to validate on where there shall be any.

    Args:
        train: a data spec.
        validation: a data spec; None holds out prompts of the training rows.
        held_out_share: how many of them; None holds out nothing.
        one_row_a_pair: repeated pairs become one row, with its labels by majority vote.
        max_train_rows: read only the first so many training rows.
        checks: of `load_conversations`.

    Returns:
        Training rows, validation rows or None, and what both share (`overlap`; {} without any).

    Raises:
        UserError: a spec or a row is wrong, or a label that is required is positive in no row that
            was held out.
    """

    def load(spec: str, max_rows: int | None = None) -> Dataset:
        rows = load_conversations(spec, max_rows=max_rows, **checks)
        if one_row_a_pair:
            rows, repeats = deduplicate(rows)
            logger.info("%s: %s", spec, json.dumps(repeats))
        return rows

    rows, held_out = load(train, max_train_rows), None
    if validation is not None:
        held_out = load(validation)
    elif held_out_share is not None:
        rows, held_out = grouped_split(rows, held_out_share, seed)
        for label in checks.get("require", ()):
            if not any(held_out[label]):
                said = "no unsafe row was held out; take a larger share"
                raise UserError(f"--eval_split_ratio {held_out_share}: {said}")
    if held_out is None:
        return rows, None, {}
    shared = overlap(rows, held_out)
    if shared["prompt_in_train"]:
        said = "Validation shares prompts with training (%s): its scores flatter the guard."
        logger.warning(said, shared)
    return rows, held_out, shared
