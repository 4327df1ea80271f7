"""What a run leaves: one adapter folder an epoch, the best one, its metrics and its model card.

Also the guard head, which a stock classifier does not have in this form.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from arguments import GuardArguments
from datasets import Dataset
from inputs import token_ids
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
)

from common import metrics, report, templates
from common.conversation import Messages, UserError, judged_label, pair, parts_of
from common.data import taxonomy
from common.data.specs import about_data, in_one_name
from common.labels import UNSAFE
from common.model_card import Measured, write_model_card
from common.run import is_main_process, manifest, write_json, write_text
from common.saving import predictions, whole_folder
from common.training import (
    LengthGroupedTrainer,
    RecipeTrainingArguments,
    refuse_diverged_scores,
)
from guards import add_probe
from guards.card import LoraCard, Threshold, has_card, local_sha256

logger = logging.getLogger("lora_guard")
HEAD = "base_model.model.score.weight"
BIAS = "base_model.model.score.bias"
WEIGHTS = "adapter_model.safetensors"
PAPER_METRICS = ("accuracy", "precision", "recall", "f1", "fpr", "auprc")
ENOUGH = 10  # unsafe validation rows of a category, to fit a threshold for it
COST = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


# --- the head -------------------------------------------------------------------------------------


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
    old = model.score
    head = GuardHead(
        old.in_features,
        labels,
        bias=bias,
        device=old.weight.device,
    )
    torch.nn.init.xavier_uniform_(head.weight)
    if bias:
        torch.nn.init.zeros_(head.bias)
    model.score = head


def split_logits(logits: torch.Tensor, unsafe_head: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The unsafe logit [rows] and those of the categories [rows, categories]."""
    if not unsafe_head:
        return logits.amax(-1), logits
    return logits[:, 0], logits[:, 1:]


# --- an adapter folder ----------------------------------------------------------------------------


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


def guard_card(
    base: str,
    *,
    unsafe_head: bool,
    inputs: Sequence[str],
    max_length: int,
    num_hidden_layers: int | None = None,
    data: Mapping[str, Any] | None = None,
    categories: Mapping[str, str] | None = None,
) -> LoraCard:
    """The card of an adapter folder, before its head is trained: without a bias, and with the
    paper's threshold.

    Args:
        categories: with descriptions ("" without one); None: the paper's 14.
    """
    if categories is None:
        categories = dict.fromkeys(taxonomy("beavertails"), "")
    described = {name: said for name, said in categories.items() if said}
    return LoraCard(
        template="lora_guard",
        labels=[UNSAFE] * unsafe_head + list(categories),
        descriptions=described or None,
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


def with_threshold(
    card: LoraCard,
    scores: Mapping[str, float],
    eval_name: str,
    how: str,
) -> LoraCard:
    """The card with the thresholds that an epoch's validation rows gave, if they did."""
    value = scores.get("val/threshold")
    if value is None:
        return card
    of_categories = {}
    for label in card.labels:
        if f"val/threshold_{label}" in scores:
            found = scores[f"val/threshold_{label}"]
            of_categories[label] = Threshold(value=found, how=how, on=eval_name)
    flagged = Threshold(value=value, how=how, on=eval_name)
    thresholds = {"thresholds": {"flagged": flagged}, "category_thresholds": of_categories}
    return card.model_copy(update=thresholds)


# --- the metrics of the paper's code --------------------------------------------------------------


def paper_metrics(
    prediction: EvalPrediction, labels: Sequence[str], args: GuardArguments
) -> dict[str, float]:
    """The reference's metrics of unsafe (`binarized_*`) and of each category, and thresholds; what
    is undefined is left out.

    Args:
        labels: `unsafe` and the categories, in the order of the truths.
    """
    refuse_diverged_scores(prediction.predictions)
    logits = torch.from_numpy(prediction.predictions).float()
    parts = split_logits(logits, not args.no_unsafe_head)
    unsafe, categories = (part.sigmoid().numpy() for part in parts)
    truth = prediction.label_ids
    scores = metrics.binary(truth[:, 0], unsafe)
    found = {f"binarized_{name}": scores[name] for name in PAPER_METRICS}
    validation = args.validation_name() or ""
    fits = not metrics.is_test(validation)
    for i, category in enumerate(labels[1:]):
        known = np.isfinite(truth[:, i + 1])
        holds = truth[known, i + 1]
        said = categories[known, i]
        scores = metrics.binary(holds, said)
        # the progress bar leaves out what has a slash
        found |= {f"{category}/{name}": scores[name] for name in PAPER_METRICS}
        if fits and ENOUGH <= holds.sum() < len(holds):
            fitted = metrics.fit_threshold(holds, said, validation, args)
            found[f"{category}/threshold"] = fitted["value"]
    labelled = truth[:, 0]
    if fits and 0 < labelled.sum() < len(labelled):
        fitted = metrics.fit_threshold(labelled, unsafe, validation, args)
        found["threshold"] = fitted["value"]
    return {name: value for name, value in found.items() if value is not None}


def columns(
    scores: Mapping[str, float],
    prefix: str,
    split: str,
) -> dict[str, float]:
    """The Trainer's `<prefix>_…` under the reference's names: `val/binarized_auprc`,
    `val/f1_<category>`, …
    """
    found = {}
    for key, value in scores.items():
        name = key.removeprefix(f"{prefix}_")
        if name == key or name in COST:
            continue
        category, _, metric = name.rpartition("/")
        if category:
            metric = f"{metric}_{category}"
        found[f"{split}/{metric}"] = value
    return found


def epoch_metrics(state: TrainerState) -> list[dict[str, float]]:
    """One row an epoch, counted from 0, out of the history that a resumed run keeps."""
    rows = []
    for entry in state.log_history:
        if "eval_loss" in entry:
            row = {"epoch": round(entry["epoch"]) - 1}
            row |= columns(entry, "eval", "val")
            rows.append(row)
    return rows


def write_csv(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    index: str,
) -> None:
    """Rows as CSV, `index` first; what a row lacks is an empty cell."""
    table = pd.DataFrame(rows) if rows else pd.DataFrame(columns=[index])
    write_text(path, table.set_index(index).to_csv())


# --- the folder of a run --------------------------------------------------------------------------


class RunFolder(TrainerCallback):
    """config.json and parameter_counts.json; after each epoch its adapter folder, metrics.csv and
    train_losses.csv; at the end `best` and run.json. The names are the reference's.
    """

    def __init__(
        self,
        args: GuardArguments,
        tokenizer: PreTrainedTokenizerBase,
        labels: Mapping[str, str],
        facts: dict[str, Any],
    ):
        self.args = args
        self.tokenizer = tokenizer
        self.folder = Path(args.output_folder)
        self.validation = args.validation_name()
        self.card = guard_card(
            args.hf_model_id,
            unsafe_head=not args.no_unsafe_head,
            inputs=args.guard_inputs,
            max_length=args.max_length,
            num_hidden_layers=args.guard_layers,
            data={"train": in_one_name(args.train_data), "validation": self.validation, **facts},
            categories={name: said for name, said in labels.items() if name != UNSAFE},
        )

    def start(
        self,
        model: PeftModel,
        training: RecipeTrainingArguments,
        afresh: bool,
    ) -> None:
        """Describe the run; one that starts afresh removes what an earlier one left."""
        if not is_main_process():
            return
        if not afresh and (self.folder / "config.json").is_file():
            return
        if afresh:
            for old in [*epoch_folders(self.folder), self.folder / "best"]:
                shutil.rmtree(old, ignore_errors=True)
            for name in ("metrics.csv", "train_losses.csv", "run.json"):
                (self.folder / name).unlink(missing_ok=True)
        processes = training.world_size
        args = self.args
        steps = args.gradient_accumulation_steps
        config = {
            **vars(args),
            "effective_batch_size": args.per_device_batch_size * steps * processes,
            "num_processes": processes,
            "best_epoch": None,
        }
        write_json(self.folder / "config.json", config)
        trainable, total = model.get_nb_trainable_parameters()
        counts = {"n_total_parameters": total, "n_trainable_parameters": trainable}
        write_json(self.folder / "parameter_counts.json", counts)

    def on_train_begin(self, args, state, control, **kwargs):
        """A run that was killed between a checkpoint and its adapter folder gets that folder when
        it is resumed.
        """
        last = self.folder / f"epoch-{round(state.epoch or 0) - 1}"
        if state.global_step and not has_card(last):
            self.on_save(args, state, control, **kwargs)

    def on_save(self, args, state, control, model=None, **kwargs):
        """The Trainer has written a checkpoint, as it does after each epoch."""
        if not is_main_process():
            return
        epoch = round(state.epoch) - 1
        rows = epoch_metrics(state)
        latest = rows[-1] if rows else {}
        card = with_threshold(self.card, latest, self.validation, self.args.in_words())
        folder = self.folder / f"epoch-{epoch}"
        save_adapter(model, self.tokenizer, folder, card, self.args.trust_remote_code)
        write_csv(self.folder / "metrics.csv", rows, "epoch")
        losses = []
        for entry in state.log_history:
            if "loss" in entry:
                losses.append({"global_step": entry["step"], "train/loss": entry["loss"]})
        write_csv(self.folder / "train_losses.csv", losses, "global_step")

    def finish(
        self,
        trainer: LengthGroupedTrainer,
        test_set: Dataset | None,
        compared: list[Messages],
        train_metrics: dict[str, float],
    ) -> None:
        """Write the best epoch's guard, judge the test rows with it, write run.json and the model
        card. Every process calls it; one of them writes.

        Args:
            compared: what the folder has to say the same of as the model in memory.
        """
        test = trainer.predict(test_set, metric_key_prefix="test").metrics if test_set else {}
        for name in list(test):
            if name.endswith("threshold"):  # thresholds come from validation
                del test[name]
        encoded = token_ids(compared, self.tokenizer, self.args.max_length)
        outputs = predictions(trainer, Dataset.from_dict({"input_ids": encoded}))
        if not is_main_process():
            return
        state = trainer.state
        best = best_epoch(trainer)
        rows = epoch_metrics(state)
        tested = columns(test, "test", "test")
        validated = next((row for row in rows if row["epoch"] == best), {})
        save_adapter(
            trainer.accelerator.unwrap_model(trainer.model),  # of the best epoch, or the last
            self.tokenizer,
            self.folder / "best",
            with_threshold(self.card, validated, self.validation, self.args.in_words()),
            self.args.trust_remote_code,
            verdicts_of(compared, outputs, self.card.labels),
            lambda partial: write_readme(partial, self.card, self.args, validated, tested),
        )
        validated.update(tested)
        write_csv(self.folder / "metrics.csv", rows, "epoch")
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        write_json(self.folder / "config.json", config | {"best_epoch": best})
        run = manifest(
            [self.args, trainer.args],
            seed=self.args.seed,
            data=self.card.data,
            train=train_metrics,
            best_epoch=best,
            test=test,
        )
        run["log"] = state.log_history
        write_json(self.folder / "run.json", run)
        said = "Best epoch: %d. Saved the guard to %s; it says there what the model in memory says"
        logger.info(said, best, self.folder / "best")


def epoch_folders(folder: Path) -> list[Path]:
    """The adapter folders of an earlier run: `epoch-<number>` with its card, and nothing of the
    user's.
    """
    found = [path for path in folder.glob("epoch-*") if has_card(path)]
    return [path for path in found if path.name.removeprefix("epoch-").isdigit()]


def best_epoch(trainer: LengthGroupedTrainer) -> int:
    """The epoch whose weights the trainer holds at the end, counted from 0."""
    kept = trainer.state.best_model_checkpoint
    epochs = round(trainer.args.num_train_epochs)
    if kept is None or not trainer.args.load_best_model_at_end:
        return epochs - 1
    steps = max(1, trainer.state.max_steps // epochs)
    return round(int(kept.rpartition("-")[2]) / steps) - 1


def verdicts_of(
    inputs: Sequence[Messages], logits: np.ndarray, labels: Sequence[str]
) -> list[tuple[Messages, dict[str, float]]]:
    """Each input with the model's outputs, as a verdict names them."""
    verdicts = []
    probabilities = torch.from_numpy(logits).float().sigmoid().tolist()
    for messages, row in zip(inputs, probabilities, strict=True):
        categories = dict(zip(labels, row, strict=True))
        unsafe = categories.pop("unsafe", max(row))
        verdicts.append((messages, {judged_label(messages): unsafe, **categories}))
    return verdicts


# --- model cards ----------------------------------------------------------------------------------


def write_readme(
    folder: Path,
    card: LoraCard,
    args: GuardArguments,
    validation: dict[str, float],
    test: dict[str, float],
) -> None:
    """README.md, the model card."""
    lines = []
    measured = None
    splits = [
        (args.validation_name(), validation, "val"),
        (args.test_data, test, "test"),
    ]
    for spec, values, split in splits:
        if not values:
            continue
        scores = {}
        for name in PAPER_METRICS:
            scores[name] = values.get(f"{split}/binarized_{name}")
        lines.append([about_data(spec)["name"], *scores.values()])
        measured = Measured(spec, {"unsafe": scores})  # the test rows', where there are some
    depth = f", num_hidden_layers={args.guard_layers}" if args.guard_layers else ""
    table = report.table(lines, ["", *PAPER_METRICS]) if lines else "Nothing."
    described = card.descriptions or {}
    outputs = [[name, described.get(name, "")] for name in card.labels]
    asked = parts_of(pair("<question>", "<answer>"))[card.inputs[0]]
    text = "".join(part.text for part in templates.render(card.template, asked))
    write_model_card(
        folder,
        title="LoRA-Guard adapter",
        base_model=args.hf_model_id,
        train_data=args.train_data,
        intro=INTRO.format(data=about_data(in_one_name(args.train_data))["name"]),
        usage=USAGE.format(
            labels=len(card.labels), depth=depth, text=json.dumps(text, ensure_ascii=False)
        ),
        measured=measured,
        sections={
            "Outputs": report.table(outputs, ["output", ""]),
            "Measured (unsafe, threshold 0.5)": table,
            "Chat template": CHAT,
        },
        adapter=True,
    )


INTRO = """LoRA adapters and a linear head that turn a chat model into its own guard (arXiv 2407.02987): without
them it chats as before, with them it judges. Trained on {data} by `examples/lora_guard/train.py`. The licences of
the base model and the data apply."""
CHAT = """The tokenizer's chat template is the chat model's own, for the chat that the guard rides along with.
It does not render what the guard reads, which is the text above; `guards.load_guard` writes that."""
USAGE = """import json, torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

model = AutoPeftModelForSequenceClassification.from_pretrained("best", num_labels={labels}{depth})
tokenizer = AutoTokenizer.from_pretrained("best")
model.config.pad_token_id = tokenizer.pad_token_id  # the base's own may be the token that texts end with
bias = json.load(open("best/guard.json"))["head_bias"] or 0.0  # a stock head has no bias
inputs = tokenizer({text}, return_tensors="pt")
print((model(**inputs).logits + torch.tensor(bias)).sigmoid())"""
