"""From data specs to what a moderation guard is trained on: rows, what its outputs mean, token ids
and targets.
"""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from arguments import DataArguments
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from common import templates
from common.data.splits import load_training_rows
from common.keep import rows_digest
from common.labels import LABEL_OF, asked_categories, settle_labels, targets
from common.training import RecipeTrainingArguments, useful_token_share

logger = logging.getLogger("moderation")
TEMPLATES = {  # the text that is trained: common/templates/beavertails.jinja and so on
    "pair": "beavertails",
    "prompt": "beavertails_prompt",
    "response": "beavertails_response",
}


@dataclass(frozen=True)
class Task:
    """What a guard judges (pair, prompt or response), and what its outputs mean: names with
    descriptions, in their order.
    """

    judge: str
    labels: dict[str, str]

    @property
    def template(self) -> str:
        return TEMPLATES[self.judge]


def load_rows(args: DataArguments, seed: int) -> tuple[Dataset, Dataset | None, dict, Task]:
    """Rows to train on, rows to validate on, how many of these share what is trained on, and what
    the guard shall judge.
    """
    asked = asked_categories(args.categories)
    label = LABEL_OF[args.judge]
    train, validation, shared = load_training_rows(
        args.train_data_name_or_path,
        args.eval_data_name_or_path,
        args.eval_split_ratio,
        seed,
        judge=args.judge,
        one_row_a_pair=args.deduplicate,
        max_train_rows=args.max_train_rows,
        categories=None if asked is None else list(asked),
        require=(label,),
        bad_rows=args.bad_rows,
    )
    labels = settle_labels(args.categories, train[label], train["categories"])
    if validation is not None:
        named = {name for names in validation["categories"] for name in names or ()}
        lacking = sorted(named - set(labels))
        if lacking:
            said = "Validation rows of %s count as unsafe alone: the guard has no such output."
            logger.warning(said, ", ".join(lacking))
    return train, validation, shared, Task(args.judge, labels)


def encode_rows(
    rows: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Dataset:
    """Token ids and targets of each row (see `common.labels.targets`), and its `length` before it
    was cut.
    """
    control = templates.control_ids(tokenizer)

    def encode(batch: dict[str, list]) -> dict[str, list]:
        texts = [templates.render(task.template, one, tokenizer) for one in batch["messages"]]
        ids = templates.encode(tokenizer, texts)
        unsafe = batch[LABEL_OF[task.judge]]
        return {
            "input_ids": [templates.cut(one, max_length, control) for one in ids],
            "labels": targets(list(task.labels), unsafe, batch["categories"]),
            "length": [len(one) for one in ids],
        }

    # in memory: a cache file per run would fill the disk of everyone who tries a few things
    options = {"batched": True, "keep_in_memory": True, "desc": "tokenizing"}
    encoded = rows.map(encode, remove_columns=rows.column_names, **options)
    longer = sum(length > max_length for length in encoded["length"])
    if longer:
        said = "Cut %d of %d rows to %d tokens (the end of the text; EOS kept)."
        logger.warning(said, longer, len(rows), max_length)
    return encoded


def describe(
    rows: Dataset,
    encoded: Dataset,
    task: Task,
    max_length: int,
    args: RecipeTrainingArguments,
    shared: dict[str, int],
) -> dict[str, Any]:
    """What guard.json and run.json say of the training rows."""
    lengths = [len(ids) for ids in encoded["input_ids"]]
    share = useful_token_share(lengths, args.train_batch_size, args.seed)
    counts = (np.array(encoded["labels"]) == 1).sum(0)
    positive = dict(zip(task.labels, counts.tolist(), strict=True))
    facts = {
        "train_rows": len(rows),
        "train_unsafe": sum(rows[LABEL_OF[task.judge]]),
        "train_positive": positive,
        "train_sha256": rows_digest(rows),
        "truncated": sum(length > max_length for length in encoded["length"]),
        "useful_token_share": round(share, 3),
    }
    return facts | {"validation": shared} if shared else facts
