"""What LoRA-Guard optimises and what it reports (section 4.3 of the paper; utils.py and metrics.py
of its code).
"""

import logging

import numpy as np
import torch
from adapter import CATEGORIES
from transformers import TrainerState

from common import metrics
from common.training import refuse_diverged_scores

logger = logging.getLogger("lora_guard")
PAPER_METRICS = ("accuracy", "precision", "recall", "f1", "fpr", "auprc")


def guard_loss(train_labels: np.ndarray, unsafe_head: bool):
    """Half the unsafe BCE, half the mean category BCE, with positive weights (the reference's
    utils.py, scaled right).

    A positive weighs n_negative / n_positive of the training rows, and 1 where a class is empty.
    The sum over a micro-batch is divided by the rows of the WHOLE step (all processes, all
    accumulation steps).

    Args:
        train_labels: [rows, 15], unsafe first, NaN where a category is unknown.
    """
    positive, negative = (train_labels == 1).sum(0), (train_labels == 0).sum(0)
    if empty := [name for name, n in zip(["unsafe", *CATEGORIES], positive, strict=True) if not n]:
        logger.warning("No positive training row for: %s", ", ".join(empty))
    weights = torch.tensor(
        np.where((positive > 0) & (negative > 0), negative / np.maximum(positive, 1), 1.0)
    )
    bce = torch.nn.functional.binary_cross_entropy_with_logits

    def loss(
        outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        unsafe, categories = split_logits(outputs.logits.float(), unsafe_head)
        labels, weight = labels.float(), weights.to(labels.device, torch.float32)
        count = labels.numel() if num_items_in_batch is None else num_items_in_batch
        total = bce(unsafe, labels[:, 0], pos_weight=weight[0], reduction="sum")
        known = labels[:, 1:].isfinite()
        each = bce(categories, labels[:, 1:].nan_to_num(), pos_weight=weight[1:], reduction="none")
        return (total + (each * known).sum() / len(CATEGORIES)) / 2 * labels.shape[1] / count

    return loss


def split_logits(logits: torch.Tensor, unsafe_head: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The unsafe logit [rows] and those of the categories [rows, 14]."""
    return (logits[:, 0], logits[:, 1:]) if unsafe_head else (logits.amax(-1), logits)


def paper_metrics(prediction, unsafe_head: bool, spec: str) -> dict[str, float]:
    """The reference's list for unsafe (`binarized_*`) and each category; undefined is left out. And
    the threshold.
    """
    refuse_diverged_scores(prediction.predictions)
    logits = split_logits(torch.from_numpy(prediction.predictions).float(), unsafe_head)
    unsafe, categories = (part.sigmoid().numpy() for part in logits)
    truth = prediction.label_ids
    found = {
        f"binarized_{k}": v
        for k, v in metrics.binary(truth[:, 0], unsafe).items()
        if k in PAPER_METRICS
    }
    for i, name in enumerate(CATEGORIES):
        known = np.isfinite(truth[:, i + 1])
        scores = metrics.binary(truth[known, i + 1], categories[known, i])
        # the progress bar leaves out what has a slash
        found |= {f"{name}/{k}": scores[k] for k in PAPER_METRICS}
    if not metrics.is_test(spec) and 0 < truth[:, 0].sum() < len(truth):
        found["threshold"] = metrics.fit_threshold(truth[:, 0], unsafe, spec)["value"]
    return {k: v for k, v in found.items() if v is not None}


def columns(scores: dict[str, float], prefix: str, split: str) -> dict[str, float]:
    """The Trainer's `<prefix>_…` under the reference's names: `val/binarized_auprc`,
    `val/f1_<category>`, …
    """
    cost = {
        f"{prefix}_{k}"
        for k in ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    }
    found = {k: v for k, v in scores.items() if k.startswith(f"{prefix}_") and k not in cost}
    names = {k: k.removeprefix(f"{prefix}_").rpartition("/") for k in found}
    return {
        f"{split}/{metric}{f'_{name}' if name else ''}": found[k]
        for k, (name, _, metric) in names.items()
    }


def epoch_metrics(state: TrainerState) -> list[dict[str, float]]:
    """One row an epoch, counted from 0, out of the history that a resumed run keeps."""
    scored = [entry for entry in state.log_history if "eval_loss" in entry]
    return [
        {"epoch": round(entry["epoch"]) - 1, **columns(entry, "eval", "val")} for entry in scored
    ]
