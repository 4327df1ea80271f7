"""What a run leaves: a stock classifier with its tokenizer, guard.json, run.json and a model card."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import DataArguments, ModelArguments
from rows import Task
from transformers import EvalPrediction
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import PredictionOutput

from common import metrics, report
from common.conversation import pair, parts_of
from common.data.specs import about_data, in_one_name, specs_of_name
from common.data.tables import taxonomy
from common.fit import pooling
from common.keep import fingerprint
from common.labels import UNSAFE, flagged
from common.model_card import Measured, write_model_card
from common.run import is_main_process, manifest, write_json
from common.saving import (
    free_memory,
    full_state_dict,
    merged_model,
    save_adapter,
    save_model,
    whole_folder,
)
from common.templates import render
from common.templates.chat import chat_template_of
from common.training import (
    LengthGroupedTrainer,
    refuse_diverged_scores,
)
from guards import add_probe
from guards.card import ClassifierCard, Threshold, local_sha256

logger = logging.getLogger("moderation")
ENOUGH = 10  # unsafe validation rows of a category, to fit a threshold for it


def run_settings(model_args: ModelArguments, data_args: DataArguments, task: Task) -> dict:
    """What makes another run, beside the rows and what the trainer knows."""
    return {
        "content of the base model": fingerprint(model_args.model_name_or_path)[:16],
        "num_hidden_layers": model_args.num_hidden_layers,
        "positive_weight": data_args.positive_weight,
        "flagged_loss": data_args.flagged_loss,
        "head_fit_rows": data_args.head_fit_rows,
        "judge": task.judge,
        "labels": list(task.labels),
    }


def save_guard(
    trainer: LengthGroupedTrainer,
    model_args: ModelArguments,
    data_args: DataArguments,
    task: Task,
    *,
    validation: PredictionOutput | None,
    facts: dict[str, Any],
    train_metrics: dict[str, float],
    compared: Sequence[Mapping[str, Any]],
    outputs: np.ndarray,
) -> None:
    """Save the guard, whole or not at all. Every process calls it; one of them writes.

    Args:
        validation: what the model says of the validation rows, if there are any.
        facts: what is to know about the training rows.
        compared: a few conversations, of which the folder has to say what the model in memory
            says: `outputs`, its logits [rows, labels].
    """
    state_dict = full_state_dict(trainer)
    free_memory(trainer)
    if not is_main_process():
        return
    trained = []
    for row, scores in zip(compared, sigmoid(outputs).tolist(), strict=True):
        trained.append((row["messages"], dict(zip(task.labels, scores, strict=True))))
    scores = {}
    if validation is not None:
        scores = scores_by_label(validation, list(task.labels))
    card = describe_guard(trainer, model_args, data_args, task, validation, facts)
    args = trainer.args
    with whole_folder(args.output_dir) as folder:
        write_weights(trainer, state_dict, model_args, task, folder)
        arguments = [model_args, data_args, args]
        found = {"data": facts, "train": train_metrics, "validation": scores}
        run = manifest(arguments, seed=args.seed, **found)
        write_json(folder / "run.json", run | {"log": trainer.state.log_history})
        write_readme(folder, card, scores, trainer.processing_class)
        if model_args.use_peft:
            write_adapter_readme(folder / "adapter", card)
        unset_hf_deepspeed_config()  # the guard is loaded by this process alone
        options = {"trust_remote_code": model_args.trust_remote_code, "long_inputs": "truncate"}
        add_probe(folder, card, trained, **options)
    said = "Saved the guard to %s; it says there what the model in memory says"
    logger.info(said, args.output_dir)


def describe_guard(
    trainer: LengthGroupedTrainer,
    model_args: ModelArguments,
    data_args: DataArguments,
    task: Task,
    validation: PredictionOutput | None,
    facts: dict[str, Any],
) -> ClassifierCard:
    """guard.json, without a probe."""
    names = list(task.labels)
    described = {name: said for name, said in task.labels.items() if said}
    thresholds = fit_thresholds(validation, data_args, names)
    return ClassifierCard(
        template=task.template,
        labels=names,
        descriptions=described or None,
        input=task.judge,
        max_length=model_args.max_length,
        pooling=pooling(trainer.accelerator.unwrap_model(trainer.model)),
        thresholds={"flagged": thresholds.pop("flagged")},
        category_thresholds=thresholds,
        base_model=model_args.model_name_or_path,
        base_sha256=local_sha256(model_args.model_name_or_path),
        num_hidden_layers=model_args.num_hidden_layers,
        data={
            "train_data": in_one_name(data_args.train_data_name_or_path),
            "validation_data": data_args.validation_name(),
            **facts,
        },
    )


def write_weights(
    trainer: LengthGroupedTrainer,
    state_dict: dict[str, torch.Tensor],
    model_args: ModelArguments,
    task: Task,
    folder: Path,
) -> None:
    """The model with its tokenizer; after LoRA the merged model, and the adapter in adapter/."""
    tokenizer = trainer.processing_class
    tokenizer.model_max_length = model_args.max_length
    # the base's own renders a chat
    tokenizer.chat_template = chat_template_of(task.template, tokenizer, task.judge)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if model_args.use_peft:
        save_adapter(model, state_dict, tokenizer, folder / "adapter")
        model = merged_model(model, state_dict)
        state_dict = model.state_dict()
    save_model(model, state_dict, tokenizer, folder)


# --- scores and threshold -------------------------------------------------------------------------


def sigmoid(logits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(logits).float().sigmoid()


def scores_by_label(
    prediction: EvalPrediction | PredictionOutput, names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Every metric of "flagged" (any output) and of each output."""
    probabilities = sigmoid(prediction.predictions).numpy()
    return metrics.multilabel(prediction.label_ids, probabilities, names)


def compute_metrics(prediction: EvalPrediction, names: Sequence[str]) -> dict[str, float]:
    """`flagged/*` and `<category>/*`, as the original names them; what is undefined is left out."""
    refuse_diverged_scores(prediction.predictions)
    found = {}
    for name, values in scores_by_label(prediction, names).items():
        for metric, value in values.items():
            if value is not None:
                found[f"{name}/{metric}"] = value
    return found


def fit_thresholds(
    validation: PredictionOutput | None, data_args: DataArguments, names: Sequence[str]
) -> dict[str, Threshold]:
    """The thresholds for "flagged" and for the categories that have rows enough, fitted on
    validation rows; without any the paper's 0.5 for "flagged".
    """
    thresholds = {"flagged": Threshold(value=0.5, how="default")}
    name = data_args.validation_name()
    if validation is None or metrics.is_test(name):
        return thresholds
    unsafe = flagged(validation.label_ids)
    scores = sigmoid(validation.predictions).numpy()
    if 0 < unsafe.sum() < len(unsafe):
        fitted = metrics.fit_threshold(unsafe, scores.max(1), name, data_args)
        thresholds["flagged"] = Threshold(**fitted)
    for column, label in enumerate(names):
        known = validation.label_ids[:, column] >= 0
        truth = validation.label_ids[known, column] == 1
        if label != UNSAFE and ENOUGH <= truth.sum() < len(truth):
            fitted = metrics.fit_threshold(truth, scores[known, column], name, data_args)
            thresholds[label] = Threshold(**fitted)
    return thresholds


# --- model cards ----------------------------------------------------------------------------------


def write_readme(folder: Path, card: ClassifierCard, scores: dict[str, Any], tokenizer) -> None:
    """README.md, the model card."""
    train_data = card.data["train_data"]
    validation = card.data["validation_data"]
    threshold = card.thresholds["flagged"]
    asked = parts_of(pair("<question>", "<answer>"))[card.input]
    text = "".join(part.text for part in render(card.template, asked, tokenizer))
    measured = None
    heading = "Measured"
    table = "Nothing was measured."
    if scores:
        measured = Measured(validation, {"flagged": scores["flagged"]})
        heading = f"Measured on {about_data(validation)['name']}"
        table = report.metric_table(scores)
    above = f"{report.threshold(threshold.value)} ({threshold.how})"
    write_model_card(
        folder,
        title=TITLES[card.input],
        base_model=card.base_model,
        train_data=specs_of_name(train_data),
        intro=INTRO.format(
            judged=JUDGED[card.input],
            outputs=outputs_in_words(card.labels),
            data=about_data(train_data)["name"],
            rows=card.data["train_rows"],
        ),
        usage=USAGE.format(text=json.dumps(text, ensure_ascii=False)),
        measured=measured,
        sections={
            "The text that it reads": f"{TEXT} {CHAT if tokenizer.chat_template else NO_CHAT}",
            "Outputs": outputs_table(card),
            heading: table,
            "Threshold": f"Flagged if any probability is above {above}.",
            "Limits": LIMITS,
        },
    )


def write_adapter_readme(folder: Path, card: ClassifierCard) -> None:
    """README.md of the adapter: how stock PEFT reads it."""
    depth = ""
    if card.num_hidden_layers is not None:
        depth = f", num_hidden_layers={card.num_hidden_layers}"
    write_model_card(
        folder,
        title=f"Adapter: {TITLES[card.input]}",
        base_model=card.base_model,
        train_data=specs_of_name(card.data["train_data"]),
        intro="The guard in the folder above as a PEFT adapter of its base.",
        usage=ADAPTER_USAGE.format(labels=len(card.labels), depth=depth),
        sections={"Padding": ADAPTER_PADDING},
        adapter=True,
    )


def outputs_in_words(labels: Sequence[str]) -> str:
    """How many categories there are, and of whom."""
    categories = [name for name in labels if name != UNSAFE]
    if not categories:
        return "as safe or unsafe"
    said = f"in {len(categories)} categories of its own"
    if set(categories) <= set(taxonomy("beavertails")):
        said = f"in {len(categories)} harm categories (BeaverTails, arXiv 2307.04657)"
    if UNSAFE in labels:
        said += " and as unsafe in general"
    return said


def outputs_table(card: ClassifierCard) -> str:
    """A row an output: its name, how many training rows have it, and its description."""
    described = card.descriptions or {}
    rows = []
    for name, count in card.data["train_positive"].items():
        rows.append([name, count, described.get(name, "")])
    return report.table(rows, ["output", "training rows", ""])


TITLES = {
    "pair": "QA-moderation guard",
    "prompt": "Moderation guard for prompts",
    "response": "Moderation guard for responses",
}
JUDGED = {
    "pair": "a question together with its answer",
    "prompt": "a question, without its answer,",
    "response": "an answer, without its question,",
}
INTRO = """Judges {judged} {outputs}.
Trained on {data} ({rows} rows) by `examples/moderation/train.py`. The licences of the base model and the data apply."""
USAGE = """from transformers import pipeline

pipe = pipeline("text-classification", ".", top_k=None, function_to_apply="sigmoid")
pipe({text})"""
ADAPTER_USAGE = """from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

model = AutoPeftModelForSequenceClassification.from_pretrained(".", num_labels={labels}{depth})
tokenizer = AutoTokenizer.from_pretrained(".")
model.config.pad_token_id = tokenizer.pad_token_id"""
ADAPTER_PADDING = """The last line is needed: a decoder's score is read before the first pad token, and the base's own
pad token may be the very token that every text ends with."""
TEXT = """The text above is what was trained. `guards.load_guard` writes it, and keeps control tokens out of
content."""
CHAT = """`tokenizer.apply_chat_template` renders it from messages, as vLLM's `/classify` does, with what the
tokenizer puts around a text: give it to the model without adding special tokens again."""
NO_CHAT = "It has no chat template: its tokenizer allows of none."
LIMITS = """The scores hold for text like the training data, in its languages. A guard that was
trained on sample data shows that the recipe runs, not that the guard is good."""
