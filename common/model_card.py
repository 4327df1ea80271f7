"""The model card of what a recipe leaves: README.md as the hub reads it, through huggingface_hub's
own classes.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from common.bundled import hub_id, licence_of_model
from common.data.specs import about_data

METRICS = {  # ours: the hub's name, and how it is written
    "auprc": ("average_precision", "AUPRC"),
    "auroc": ("roc_auc", "AUROC"),
    "f1": ("f1", "F1"),
    "precision": ("precision", "precision"),
    "recall": ("recall", "recall"),
    "accuracy": ("accuracy", "accuracy"),
}


@dataclass(frozen=True)
class Measured:
    """Scores on rows that were not trained on: `values` holds metrics by name, for each label.

    `data` is the spec of the rows, or says in words which they are.
    """

    data: str
    values: Mapping[str, Mapping[str, Any]]


def write_model_card(
    folder: Path | str,
    *,
    title: str,
    base_model: str,
    train_data: Sequence[str],
    intro: str,
    usage: str,
    sections: Mapping[str, str],
    measured: Measured | None = None,
    task: str = "text-classification",
    adapter: bool = False,
) -> None:
    """Write README.md: front matter that the hub reads, what it is, how to use it, measured
    numbers.

    Args:
        base_model: as the user gave it; in the card it is a hub id, where one is known, and never a
        path.
        train_data: data specs. A licence is told where that of the base and all data is one.
        usage: Python code.
        adapter: whether the folder holds an adapter, and not a whole model.
    """
    data = [about_data(spec) for spec in train_data]
    languages = {one.get("language") for one in data}
    licences = {one.get("licence") for one in data}
    licences.add(licence_of_model(base_model))
    licence = only(licences) or "other"
    known = ModelCardData(
        language=only(languages),
        license=licence.lower().replace(" ", "-"),
        library_name="peft" if adapter else "transformers",
        tags=["guard", "moderation"],
        datasets=[one["hub"] for one in data if "hub" in one] or None,
        pipeline_tag=task,
    )
    if base := hub_id(base_model):
        known.base_model = base
        known.base_model_relation = "adapter" if adapter else "finetune"
    if results := eval_results(measured, task):
        known.metrics = sorted({result.metric_type for result in results})
        known.model_name = title
        known.eval_results = results
    body = f"# {title}\n\n{intro}\n\n```python\n{usage.strip()}\n```\n"
    for heading, text in sections.items():
        body += f"\n## {heading}\n\n{text.strip()}\n"
    ModelCard(f"---\n{known.to_yaml()}\n---\n\n{body}").save(Path(folder) / "README.md")


def eval_results(measured: Measured | None, task: str) -> list[EvalResult]:
    """The hub's form of what was measured; what is undefined is left out."""
    if measured is None:
        return []
    about = about_data(measured.data)
    results = []
    for label, values in measured.values.items():
        for name, (metric, written) in METRICS.items():
            if values.get(name) is not None:
                result = EvalResult(
                    task_type=task,
                    dataset_type=about.get("hub", "local"),
                    dataset_name=about["name"],
                    metric_type=metric,
                    metric_value=round(values[name], 4),
                    metric_name=f"{written} of {label}",
                )
                results.append(result)
    return results


def only(values: Set[str | None]) -> str | None:
    """What all of them are; None where they differ, or one is unknown."""
    if len(values) != 1:
        return None
    (value,) = values
    return value
