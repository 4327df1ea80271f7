"""The adapter folder: the head while it trains, and writing it."""

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common import data
from common.conversation import Messages, UserError
from common.run import atomic_path
from common.saving import whole_folder
from guards import add_probe
from guards.card import LoraCard, Threshold, local_sha256

CATEGORIES = data.taxonomy("beavertails")  # label index = position; rows are read by key
HEAD = "base_model.model.score.weight"
BIAS = "base_model.model.score.bias"
WEIGHTS = "adapter_model.safetensors"


class GuardHead(torch.nn.Linear):
    """A linear head that computes in float32 whatever surrounds it: bf16 logits tie, and ties spoil
    AUPRC.
    """

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.float())


def replace_head(model: PreTrainedModel, labels: int, bias: bool) -> None:
    """Put a GuardHead in place of a sequence classifier's `score` (Xavier-uniform, zero bias: the
    reference's).
    """
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise UserError(
            f"{type(model).__name__}: its classifier has no linear head `score`; use a decoder"
        )
    head = GuardHead(model.score.in_features, labels, bias=bias, device=model.score.weight.device)
    torch.nn.init.xavier_uniform_(head.weight)
    if bias:
        torch.nn.init.zeros_(head.bias)
    model.score = head


def save_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: LoraCard,
    trust_remote_code: bool = False,
    trained: Sequence[tuple[Messages, Mapping[str, float]]] = (),
    readme: Callable[[Path], None] | None = None,
) -> None:
    """Write an adapter folder whole or not at all: stock PEFT files, tokenizer, card. One process
    calls it.

    A stock classifier's head has no bias. Ours goes to guard.json (`head_bias`), so that
    `AutoPeftModelForSequenceClassification` finds exactly the keys that it knows. The tokenizer
    keeps the chat model's chat template, because that is what the chat rides on.

    Args:
        trained: conversations with what the model in memory says of them, which the folder has to
        say, too.
        readme: writes the model card into a folder.

    Raises:
        UserError: the folder cannot be written, or says something else; what was there is as it
        was.
    """
    with whole_folder(folder) as partial:
        model.save_pretrained(partial, save_embedding_layers=False)
        (partial / "README.md").unlink(missing_ok=True)  # PEFT's empty form
        tensors = load_file(partial / WEIGHTS)
        bias = tensors.pop(BIAS, None)
        save_file(tensors, partial / WEIGHTS, {"format": "pt"})
        tokenizer.save_pretrained(partial)
        if readme is not None:
            readme(partial)
        add_probe(
            partial,
            with_bias(card, bias),
            trained,
            trust_remote_code=trust_remote_code,
            long_inputs="truncate",
        )


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], index: str) -> None:
    """Rows as CSV, `index` first; what a row lacks, or is undefined, is an empty cell."""
    columns = [index, *dict.fromkeys(key for row in rows for key in row if key != index)]
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def guard_card(
    base: str,
    *,
    unsafe_head: bool,
    inputs: Sequence[str],
    max_length: int,
    num_hidden_layers: int | None = None,
    data: Mapping[str, Any] | None = None,
) -> LoraCard:
    """The card of an adapter folder, before its head is trained: without a bias, and with the
    paper's threshold.
    """
    return LoraCard(
        template="lora_guard",
        labels=["unsafe"] * unsafe_head + CATEGORIES,
        inputs=list(inputs),
        max_length=max_length,
        num_hidden_layers=num_hidden_layers,
        thresholds={"flagged": Threshold(value=0.5, how="default")},
        base_model=base,
        base_sha256=local_sha256(base),
        head_bias=None,
        data=dict(data or {}),
    )


def with_bias(card: LoraCard, bias: torch.Tensor | None) -> LoraCard:
    """The card with the head's bias, of shape (labels,), which a stock classifier has no place for."""
    values = None if bias is None else bias.float().tolist()
    return card.model_copy(update={"head_bias": values})


def with_threshold(card: LoraCard, scores: Mapping[str, float], eval_name: str) -> LoraCard:
    """The card with the threshold that an epoch's validation rows gave, if they did."""
    value = scores.get("val/threshold")
    if value is None:
        return card
    threshold = Threshold(value=value, how="max F1", on=eval_name)
    return card.model_copy(update={"thresholds": {"flagged": threshold}})
