"""Train LoRA adapters and a guard head on a frozen chat model (LoRA-Guard, arXiv 2407.02987).

# the quickstart: bundled chat model, bundled sample data, CPU, minutes
torchrun train.py

# the paper's command
accelerate launch --multi-gpu --mixed-precision=bf16 train.py meta-llama/Llama-3.2-1B-Instruct output/llama-3.2-1b \
    --epochs 3 --per-device-batch-size 2 --learning-rate 3e-4

# the paper's ablation: the head alone
python train.py meta-llama/Llama-3.2-1B-Instruct output/head-only --head-only
"""

import json
import logging
import os
import shutil
import sys
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from adapter import CATEGORIES, guard_card, replace_head, save_adapter, with_threshold, write_csv
from datasets import Dataset
from inputs import encode_rows, judged_inputs, unlabelled_rows
from objective import PAPER_METRICS, columns, epoch_metrics, guard_loss, paper_metrics, split_logits
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from trl import ModelConfig

from common import data, metrics, report
from common.bundled import resolve_model
from common.conversation import Messages, UserError
from common.data.specs import about_data
from common.fit import check_length, fit_classifier
from common.head_start import fit_head
from common.keep import fingerprint, rows_digest
from common.model_card import Measured, write_model_card
from common.run import (
    inference_dtype,
    is_main_process,
    manifest,
    parse_args,
    run_cli,
    usable_attention,
    write_json,
)
from common.saving import predictions, refuse_to_overwrite, spread
from common.training import (
    LengthGroupedTrainer,
    RecipeTrainingArguments,
    checkpoint_to_resume,
    start_over,
    useful_token_share,
    with_adapters,
)
from guards.card import INPUTS, LoraCard, has_card
from guards.lora import input_kind

logger = logging.getLogger("lora_guard")


@dataclass
class GuardArguments:
    hf_model_id: str = field(
        metadata={"help": "Chat model: hub id, folder, or smollm2-135m-instruct (bundled)."}
    )
    output_folder: str = field(
        metadata={"help": "Adapter folders, metrics and checkpoints of the run."}
    )
    epochs: int = 1
    per_device_batch_size: int = 2
    learning_rate: float = 3e-4
    eval_batch_size: int = 50
    seed: int = 0
    gradient_accumulation_steps: int = 1
    lora_r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    no_unsafe_head: bool = field(
        default=False, metadata={"help": "14 outputs; unsafe is their maximum (paper's v1)."}
    )
    no_clf_head_bias: bool = False
    head_only: bool = field(
        default=False, metadata={"help": "Train the head alone (the paper's ablation)."}
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names, or one pattern with .*; default: PEFT's for the model (q and v)."
        },
    )
    guard_layers: int | None = field(
        default=None,
        metadata={
            "help": "The guard reads the base after so many layers; default: all (the paper)."
        },
    )
    guard_inputs: list[str] = field(
        default_factory=lambda: ["pair"],
        metadata={"help": "What is trained, and then served: pair prompt response"},
    )
    train_data: str = field(
        default="PKU-Alignment/BeaverTails:30k_train", metadata={"help": "Data spec."}
    )
    eval_data: str | None = field(
        default=None, metadata={"help": "Data spec of the validation rows."}
    )
    eval_split_ratio: float | None = field(
        default=None,
        metadata={"help": "Without eval data: share of the train prompts to hold out."},
    )
    test_data: str | None = field(
        default=None, metadata={"help": "Data spec, judged once, with the best epoch."}
    )
    deduplicate: bool = field(
        default=False, metadata={"help": "One row a pair, labels by majority vote."}
    )
    bad_rows: str = field(default="error", metadata={"help": "error | skip (counted and reported)"})
    max_train_rows: int | None = None
    max_length: int = 512
    head_fit_rows: int = field(
        default=0,
        metadata={
            "help": "Fit the head on the frozen base with so many rows first; the paper has 0."
        },
    )
    lr_scheduler_type: str = field(
        default="constant", metadata={"help": "The reference's rate is constant."}
    )
    warmup_steps: float = 0.0
    max_grad_norm: float = field(
        default=0.0, metadata={"help": "0: no clipping, as in the reference."}
    )
    logging_steps: int = 10
    attn_implementation: str | None = None
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with the model."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "latest, or a checkpoint folder"}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace an earlier run."})


def main() -> None:
    # hf_model_id output_folder
    positional = list(takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    if len(positional) not in (0, 2):
        raise UserError(
            f"expected two positional arguments, hf_model_id and output_folder; found {positional}"
        )
    if positional:
        sys.argv[1:3] = ["--hf_model_id", positional[0], "--output_folder", positional[1]]
    (args,) = parse_args([GuardArguments], Path(__file__).parent / "configs/quickstart.yaml")
    if set(args.guard_inputs) - set(INPUTS) or not args.guard_inputs:
        raise UserError(
            f"--guard-inputs {' '.join(args.guard_inputs)}: expected some of {', '.join(INPUTS)}"
        )
    training = training_arguments(args)
    checkpoint = checkpoint_to_resume(training)
    if checkpoint is None:
        names = ("best", "config.json", "epoch-0")
        refuse_to_overwrite(
            args.output_folder, args.overwrite_output_dir, names, "--overwrite-output-dir"
        )
    set_seed(args.seed)

    train_rows, eval_rows = load_rows(args)
    model, tokenizer = load_model(args)
    eval_name = args.eval_data or f"{args.eval_split_ratio} of {args.train_data}"

    def encoded(rows: Dataset, spec: str) -> tuple[Dataset, dict]:
        return encode_rows(rows, tokenizer, args.guard_inputs, args.max_length, spec)

    train_set, facts = encoded(train_rows, args.train_data)
    eval_set = encoded(eval_rows, eval_name)[0] if eval_rows else None
    test_set = encoded(load(args, args.test_data), args.test_data)[0] if args.test_data else None
    lengths = [len(ids) for ids in train_set["input_ids"]]
    facts["train_sha256"] = rows_digest(train_rows)
    facts["useful_token_share"] = round(
        useful_token_share(lengths, args.per_device_batch_size, args.seed), 3
    )
    logger.info("Data: %s", json.dumps(facts))

    loss = guard_loss(np.array(train_set["labels"]), unsafe_head=not args.no_unsafe_head)
    if args.head_fit_rows and checkpoint is None:
        every = -(-len(train_set) // args.head_fit_rows)
        fit_head(
            model, tokenizer, train_set.shard(every, 0, contiguous=False), loss, training.device
        )
    model = add_adapters(model, args)
    card = guard_card(
        args.hf_model_id,
        unsafe_head=not args.no_unsafe_head,
        inputs=args.guard_inputs,
        max_length=args.max_length,
        num_hidden_layers=args.guard_layers,
        data={"train": args.train_data, "validation": eval_name if eval_set else None, **facts},
    )
    trainer = LengthGroupedTrainer(
        model=model,
        args=training,
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_loss_func=loss,
        compute_metrics=lambda prediction: paper_metrics(
            prediction, not args.no_unsafe_head, eval_name
        ),
        callbacks=[EveryEpoch(card, tokenizer, eval_name, args.trust_remote_code)],
        settings=run_settings(args),
    )
    if checkpoint is None:
        start_over(training)
    describe_run(args, model, training, afresh=checkpoint is None)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    compared = judged_inputs(spread(eval_rows or train_rows), args.guard_inputs)
    finish(trainer, args, card, compared, test_set, eval_name, result.metrics)


def training_arguments(args: GuardArguments) -> RecipeTrainingArguments:
    """The Trainer's arguments. `accelerate launch --mixed-precision` is heard where there is a GPU."""
    if args.eval_data is not None and args.eval_split_ratio is not None:
        raise UserError("--eval-data and --eval-split-ratio: give one of them")
    if args.epochs < 1 or not 0 <= args.lora_dropout < 1 or args.head_fit_rows < 0:
        raise UserError(
            "expected --epochs of at least 1, --lora-dropout in [0, 1), --head-fit-rows of 0 (off) or more"
        )
    validated = args.eval_data is not None or args.eval_split_ratio is not None
    selects = validated and not metrics.is_test(args.eval_data or "")
    if not torch.accelerator.is_available():
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # on a CPU bf16 is emulated
    values = dict(
        output_dir=args.output_folder,
        overwrite_output_dir=args.overwrite_output_dir,
        resume_from_checkpoint=args.resume_from_checkpoint,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.per_device_batch_size,
        per_device_eval_batch_size=args.eval_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        weight_decay=0.01,  # torch's AdamW default, which the reference keeps
        lr_scheduler_type=args.lr_scheduler_type,
        warmup_steps=args.warmup_steps,
        max_grad_norm=args.max_grad_norm,
        bf16=inference_dtype() == torch.bfloat16,
        eval_strategy="epoch" if validated else "no",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=selects,
        metric_for_best_model="binarized_auprc" if selects else None,
        greater_is_better=True if selects else None,
        logging_nan_inf_filter=False,  # a loss that is no number must be seen
        ddp_find_unused_parameters=False,
        logging_steps=args.logging_steps,
        seed=args.seed,
    )
    try:
        return RecipeTrainingArguments(**values)
    except (ValueError, TypeError) as error:  # such as an unknown schedule
        raise UserError(str(error)) from None


def run_settings(args: GuardArguments) -> dict:
    """What makes another run, beside the rows and what the trainer knows."""
    named = ("guard_layers", "no_unsafe_head", "no_clf_head_bias", "head_only", "head_fit_rows")
    settings = {name: getattr(args, name) for name in named}
    return settings | {"content of the base model": fingerprint(args.hf_model_id)[:16]}


def load(args: GuardArguments, spec: str, max_rows: int | None = None) -> Dataset:
    rows = data.load_conversations(
        spec, categories=CATEGORIES, bad_rows=args.bad_rows, max_rows=max_rows
    )
    if not args.deduplicate:
        return rows
    rows, repeats = data.deduplicate(rows)
    logger.info("%s: %s", spec, json.dumps(repeats))
    return rows


def load_rows(args: GuardArguments) -> tuple[Dataset, Dataset | None]:
    train = load(args, args.train_data, args.max_train_rows)
    if args.eval_data is None:
        return (
            (train, None)
            if args.eval_split_ratio is None
            else data.grouped_split(train, args.eval_split_ratio, args.seed)
        )
    held_out = load(args, args.eval_data)
    shared = data.overlap(train, held_out)
    if shared["prompt_in_train"]:
        logger.warning(
            "Validation shares prompts with training (%s): its scores flatter the guard.", shared
        )
    return train, held_out


def load_model(args: GuardArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The chat model's transformer (bf16 on a GPU) under a float32 head of 15 labels, or 14 without
    the unsafe one.
    """
    source = {
        "pretrained_model_name_or_path": resolve_model(args.hf_model_id),
        "trust_remote_code": args.trust_remote_code,
    }
    depth = {} if args.guard_layers is None else {"num_hidden_layers": args.guard_layers}
    names = ["unsafe"] * (not args.no_unsafe_head) + CATEGORIES
    try:
        layers = AutoConfig.from_pretrained(**source).get_text_config().num_hidden_layers
        if not 1 <= (args.guard_layers or layers) <= layers:
            raise UserError(f"--guard-layers {args.guard_layers}: the base has {layers}")
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForSequenceClassification.from_pretrained(
            **source,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
            attn_implementation=usable_attention(args.attn_implementation),
            dtype=inference_dtype(),
            **depth,
        )
    except UserError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"hf_model_id {args.hf_model_id}: {str(error).strip().splitlines()[0]}"
        ) from None
    fit_classifier(tokenizer, model)
    check_length(model, args.max_length, "--max-length")
    replace_head(model, len(names), bias=not args.no_clf_head_bias)
    model.config.use_cache = False
    return model, tokenizer


def add_adapters(model: PreTrainedModel, args: GuardArguments) -> PeftModel:
    """LoRA over the frozen model, in float32. `--head-only` keeps adapters of rank 1 at zero: one
    folder format.
    """
    asked = ModelConfig(
        use_peft=True,
        lora_task_type="SEQ_CLS",  # without it PEFT would not save the head
        lora_r=1 if args.head_only else args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        lora_target_modules=args.target_modules,
    )
    model = with_adapters(model, asked, "--target-modules")
    if args.head_only:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(False)
    return model


def epoch_folders(folder: Path) -> list[Path]:
    """The adapter folders of an earlier run: `epoch-<number>` with its card, and nothing of the
    user's.
    """
    found = [path for path in folder.glob("epoch-*") if has_card(path)]
    return [path for path in found if path.name.removeprefix("epoch-").isdigit()]


class EveryEpoch(TrainerCallback):
    """After each epoch: its adapter folder, metrics.csv and train_losses.csv, from the history that
    a resume keeps.
    """

    def __init__(
        self, card: LoraCard, tokenizer: PreTrainedTokenizerBase, eval_name: str, trust: bool
    ):
        self.card, self.tokenizer, self.eval_name = card, tokenizer, eval_name
        self.trust = trust  # code that comes with the base

    def on_train_begin(self, args, state, control, **kwargs):
        """A run that was killed between a checkpoint and its adapter folder gets that folder when
        it is resumed.
        """
        if state.global_step and not has_card(
            Path(args.output_dir) / f"epoch-{round(state.epoch) - 1}"
        ):
            self.on_save(args, state, control, **kwargs)

    def on_save(self, args, state, control, model=None, **kwargs):
        if not is_main_process():
            return
        epoch, rows = round(state.epoch) - 1, epoch_metrics(state)
        card = with_threshold(self.card, rows[-1] if rows else {}, self.eval_name)
        save_adapter(
            model, self.tokenizer, Path(args.output_dir) / f"epoch-{epoch}", card, self.trust
        )
        write_csv(Path(args.output_dir) / "metrics.csv", rows, "epoch")
        losses = [
            {"global_step": e["step"], "train/loss": e["loss"]}
            for e in state.log_history
            if "loss" in e
        ]
        write_csv(Path(args.output_dir) / "train_losses.csv", losses, "global_step")


def describe_run(
    args: GuardArguments, model: PeftModel, training: RecipeTrainingArguments, afresh: bool
) -> None:
    """config.json and parameter_counts.json, as the reference writes them (numbers as numbers); old
    ones go first.
    """
    folder = Path(args.output_folder)
    if not is_main_process() or (not afresh and (folder / "config.json").is_file()):
        return
    for old in [*epoch_folders(folder), folder / "best"] if afresh else []:
        shutil.rmtree(old, ignore_errors=True)
    for name in ("metrics.csv", "train_losses.csv", "run.json") if afresh else ():
        (folder / name).unlink(missing_ok=True)
    effective = args.per_device_batch_size * args.gradient_accumulation_steps * training.world_size
    write_json(
        folder / "config.json",
        {
            **vars(args),
            "effective_batch_size": effective,
            "num_processes": training.world_size,
            "best_epoch": None,
        },
    )
    trainable, total = model.get_nb_trainable_parameters()
    write_json(
        folder / "parameter_counts.json",
        {"n_total_parameters": total, "n_trainable_parameters": trainable},
    )


def finish(
    trainer: LengthGroupedTrainer,
    args: GuardArguments,
    card: LoraCard,
    compared: list[Messages],
    test_set: Dataset | None,
    eval_name: str,
    train_metrics: dict[str, float],
) -> None:
    """Write the best epoch's guard to `best`, judge the test rows with it, write run.json and the
    model card.

    Args:
        compared: what the folder has to say the same of as the model in memory.
    """
    folder, rows = Path(args.output_folder), epoch_metrics(trainer.state)
    test = trainer.predict(test_set, metric_key_prefix="test").metrics if test_set else {}
    test.pop("test_threshold", None)  # thresholds come from validation
    trained = trained_outputs(trainer, compared, args)  # collective
    if not is_main_process():
        return
    kept = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    steps = max(1, trainer.state.max_steps // args.epochs)
    best = round(int(kept.rpartition("-")[2]) / steps) - 1 if kept else args.epochs - 1
    scores = next((row for row in rows if row["epoch"] == best), {})
    found = columns(test, "test", "test")
    save_adapter(
        trainer.accelerator.unwrap_model(trainer.model),  # the best epoch's weights, or the last's
        trainer.processing_class,
        folder / "best",
        with_threshold(card, scores, eval_name),
        args.trust_remote_code,
        trained,
        lambda partial: write_readme(partial, args, eval_name, scores, found),
    )
    write_csv(
        folder / "metrics.csv",
        [row | (found if row["epoch"] == best else {}) for row in rows],
        "epoch",
    )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", config | {"best_epoch": best})
    run = manifest(
        [args, trainer.args], seed=args.seed, train=train_metrics, best_epoch=best, test=test
    )
    write_json(folder / "run.json", run | {"log": trainer.state.log_history})
    saved = folder / "best"
    logger.info(
        "Best epoch: %d. Saved the guard to %s; it says there what the model in memory says",
        best,
        saved,
    )


def trained_outputs(
    trainer: LengthGroupedTrainer, inputs: list[Messages], args: GuardArguments
) -> list[tuple[Messages, dict[str, float]]]:
    """Each input with the outputs of the model in memory, as a verdict names them. Collective."""
    encoded = unlabelled_rows(inputs, trainer.processing_class, args.max_length)
    logits = torch.from_numpy(predictions(trainer, encoded)).float()
    unsafe, categories = (
        part.sigmoid().tolist() for part in split_logits(logits, not args.no_unsafe_head)
    )
    trained = []
    for messages, probability, named in zip(inputs, unsafe, categories, strict=True):
        label = "prompt_unsafe" if input_kind(messages) == "prompt" else "response_unsafe"
        trained.append(
            (messages, {label: probability, **dict(zip(CATEGORIES, named, strict=True))})
        )
    return trained


def write_readme(
    folder: Path,
    args: GuardArguments,
    eval_name: str,
    validation: dict[str, float],
    test: dict[str, float],
) -> None:
    """README.md, the model card."""
    lines, measured = [], None
    for spec, values, split in ((eval_name, validation, "val"), (args.test_data, test, "test")):
        if not values:
            continue
        scores = {metric: values.get(f"{split}/binarized_{metric}") for metric in PAPER_METRICS}
        lines.append([about_data(spec)["name"], *scores.values()])
        measured = Measured(spec, {"unsafe": scores})  # the test rows', where there are some
    depth = f", num_hidden_layers={args.guard_layers}" if args.guard_layers else ""
    write_model_card(
        folder,
        title="LoRA-Guard adapter",
        base_model=args.hf_model_id,
        train_data=[args.train_data],
        intro=CARD_INTRO.format(data=about_data(args.train_data)["name"]),
        usage=CARD_USAGE.format(labels=15 - args.no_unsafe_head, depth=depth),
        measured=measured,
        sections={
            "Measured (unsafe, threshold 0.5)": report.table(lines, ["", *PAPER_METRICS])
            if lines
            else "Nothing.",
            "Chat template": CARD_CHAT,
        },
        adapter=True,
    )


CARD_INTRO = """LoRA adapters and a linear head that turn a chat model into its own guard (arXiv 2407.02987): without
them it chats as before, with them it judges. Trained on {data} by `examples/lora_guard/train.py`. The licences of
the base model and the data apply."""
CARD_CHAT = """The tokenizer's chat template is the chat model's own, for the chat that the guard rides along with.
It does not render what the guard reads, which is the text above; `guards.load_guard` writes that."""
CARD_USAGE = """import json, torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

model = AutoPeftModelForSequenceClassification.from_pretrained("best", num_labels={labels}{depth})
tokenizer = AutoTokenizer.from_pretrained("best")
model.config.pad_token_id = tokenizer.pad_token_id  # the base's own may be the token that texts end with
bias = json.load(open("best/guard.json"))["head_bias"] or 0.0  # a stock head has no bias
inputs = tokenizer("user: <question>\\n\\nagent: <answer>", return_tensors="pt")
print((model(**inputs).logits + torch.tensor(bias)).sigmoid())"""


if __name__ == "__main__":
    run_cli(main)
