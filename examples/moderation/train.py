"""Fine-tune a QA-moderation guard: 14 harm categories over question+answer pairs (BeaverTails, arXiv 2307.04657).

# the quickstart: bundled model, bundled sample data, CPU, minutes
torchrun train.py

# one GPU, LoRA on any decoder
launch/lora_1gpu.sh --model_name_or_path Qwen/Qwen2.5-1.5B

# the paper's run: 8 GPUs, full fine-tune of LLaMA-7B, FSDP2
torchrun --nproc_per_node=8 train.py --config configs/paper.yaml
"""

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from common import data, metrics, report, templates
from common.bundled import resolve_model
from common.conversation import UserError
from common.fit import check_length, fit_classifier
from common.head_start import fit_head
from common.keep import fingerprint
from common.run import is_main_process, manifest, parse_args, run_cli, usable_attention, write_json
from common.training import (
    LengthGroupedTrainer,
    RecipeTrainingArguments,
    checkpoint_to_resume,
    full_state_dict,
    refuse_diverged_scores,
    save_full,
    start_over,
    useful_token_share,
)
from guards import add_probe
from guards.card import CARD_FILE, ClassifierCard, local_sha256

logger = logging.getLogger("moderation")
CATEGORIES = data.taxonomy("beavertails")  # label index = position; rows are read by key


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "Hub id, folder, or smollm2-135m-instruct (bundled)."})
    max_length: int = field(default=512, metadata={"help": "Longer pairs are cut at the end of the answer; EOS stays."})
    num_hidden_layers: int | None = field(
        default=None, metadata={"help": "Keep only the first so many layers of the base."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa | flash_attention_2 | eager"})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    use_peft: bool = field(
        default=False, metadata={"help": "LoRA; the head is trained and saved, the guard folder is merged."}
    )
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "all-linear | one pattern with .* | names"}
    )


@dataclass
class DataArguments:
    train_data_name_or_path: str = field(
        metadata={"help": "Data spec, e.g. PKU-Alignment/BeaverTails:330k_train or rows.jsonl."}
    )
    eval_data_name_or_path: str | None = field(default=None, metadata={"help": "Data spec of the validation rows."})
    eval_split_ratio: float | None = field(
        default=None, metadata={"help": "Without eval data: share of the train prompts to hold out."}
    )
    deduplicate: bool = field(default=False, metadata={"help": "One row a pair, labels by majority vote."})
    bad_rows: str = field(default="error", metadata={"help": "error | skip (counted and reported)"})
    max_train_rows: int | None = None
    positive_weight: float = field(
        default=1.0, metadata={"help": "Weight of positive labels in the loss; the paper has 1."}
    )
    flagged_loss: float = field(
        default=0.0, metadata={"help": "Weight of an extra loss on 'any category'; the paper has 0."}
    )
    head_fit_rows: int = field(
        default=0, metadata={"help": "Fit the head on the frozen base with so many rows first; the paper has 0."}
    )


def main() -> None:
    model_args, data_args, args = parse_args(
        [ModelArguments, DataArguments, RecipeTrainingArguments], Path(__file__).parent / "configs/quickstart.yaml"
    )
    checkpoint = checkpoint_to_resume(args)
    if data_args.head_fit_rows < 0:
        raise UserError(f"--head_fit_rows {data_args.head_fit_rows}: must be 0 (off) or more")
    if data_args.head_fit_rows and (args.fsdp or args.deepspeed):
        raise UserError("--head_fit_rows needs the whole model in every process; leave out --fsdp and --deepspeed")
    set_seed(args.seed)

    train_rows, eval_rows, data_report = load_rows(data_args, args.seed)
    select_best_on_validation(args, data_args)
    model, tokenizer = load_model(model_args)
    train_set, truncated = encode_rows(train_rows, tokenizer, model_args.max_length)
    eval_set = encode_rows(eval_rows, tokenizer, model_args.max_length)[0] if eval_rows else None
    lengths = [len(ids) for ids in train_set["input_ids"]]
    data_report |= {
        "truncated": truncated,
        "useful_token_share": round(useful_token_share(lengths, args.train_batch_size, args.seed), 3),
    }
    logger.info("Data: %s", json.dumps(data_report))

    loss = multilabel_loss(data_args.positive_weight, data_args.flagged_loss)
    if data_args.head_fit_rows and checkpoint is None:
        every = -(-len(train_set) // data_args.head_fit_rows)
        fit_head(model, tokenizer, train_set.shard(every, 0, contiguous=False), loss, args.device)
    if model_args.use_peft:
        model = get_peft_model(model, lora_config(model_args))
    trainer = LengthGroupedTrainer(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_loss_func=loss,
        compute_metrics=compute_metrics,
        settings=run_settings(model_args, data_args),
    )
    if checkpoint is None:
        start_over(args)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    validation = trainer.predict(eval_set, metric_key_prefix="eval") if eval_set else None
    save_weights(trainer, tokenizer, model_args)
    describe_guard(trainer, model_args, data_args, validation, data_report, result.metrics)


def load_rows(args: DataArguments, seed: int) -> tuple[Dataset, Dataset | None, dict]:
    """Training and validation rows, and what is to know about them (counts, repeats, leaks)."""

    def load(spec: str, max_rows: int | None = None) -> Dataset:
        require = ("response_unsafe", "categories")
        rows = data.load_conversations(
            spec, categories=CATEGORIES, require=require, bad_rows=args.bad_rows, max_rows=max_rows
        )
        if not args.deduplicate:
            return rows
        rows, repeats = data.deduplicate(rows)
        logger.info("%s: %s", spec, json.dumps(repeats))
        return rows

    train, held_out = load(args.train_data_name_or_path, args.max_train_rows), None
    if args.eval_data_name_or_path is not None:
        held_out = load(args.eval_data_name_or_path)
    elif args.eval_split_ratio is not None:
        train, held_out = data.grouped_split(train, args.eval_split_ratio, seed)
        if not any(held_out["response_unsafe"]):
            raise UserError(
                f"--eval_split_ratio {args.eval_split_ratio}: no unsafe row was held out; take a larger share"
            )
    fingerprint = hashlib.sha256("".join(json.dumps(row, sort_keys=True) for row in train).encode()).hexdigest()
    facts = {"train_rows": len(train), "train_unsafe": sum(train["response_unsafe"]), "train_sha256": fingerprint[:16]}
    if held_out is not None:
        facts["validation"] = data.overlap(train, held_out)
        if facts["validation"]["prompt_in_train"]:
            logger.warning(
                "Validation shares prompts with training (%s): its scores flatter the guard.", facts["validation"]
            )
    return train, held_out, facts


def select_best_on_validation(args: RecipeTrainingArguments, data_args: DataArguments) -> None:
    """Keep the checkpoint with the best flagged AUPRC, where there is a validation set that may be selected on."""
    spec = data_args.eval_data_name_or_path
    if spec is None and data_args.eval_split_ratio is None:
        args.eval_strategy = "no"  # the original evaluated without data, and failed after training
    elif spec is not None and metrics.is_test(spec):
        logger.info(
            "%s is a test split: no checkpoint is selected and no threshold fitted on it (the last one is kept).", spec
        )
    elif args.save_strategy != args.eval_strategy or (
        args.save_strategy == "steps" and args.save_steps % args.eval_steps
    ):
        logger.info("Checkpoints are not saved where they are evaluated: the last one is kept, not the best.")
    elif args.eval_strategy != "no":
        args.load_best_model_at_end, args.metric_for_best_model, args.greater_is_better = (
            True,
            "eval_flagged/auprc",
            True,
        )


def load_model(args: ModelArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base with a fresh head of 14 labels, in float32 (the trainer casts to bf16 on the fly), and its tokenizer."""
    source = {
        "pretrained_model_name_or_path": resolve_model(args.model_name_or_path),
        "trust_remote_code": args.trust_remote_code,
    }
    depth = {} if args.num_hidden_layers is None else {"num_hidden_layers": args.num_hidden_layers}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForSequenceClassification.from_pretrained(
            **source,
            num_labels=len(CATEGORIES),
            id2label=dict(enumerate(CATEGORIES)),
            label2id={name: i for i, name in enumerate(CATEGORIES)},
            problem_type="multi_label_classification",
            attn_implementation=usable_attention(args.attn_implementation),
            dtype=torch.float32,
            **depth,
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"--model_name_or_path {args.model_name_or_path}: {str(error).strip().splitlines()[0]}"
        ) from None
    fit_classifier(tokenizer, model)  # so that a decoder's score is read at the last attended token: EOS
    check_length(model, args.max_length)
    model.config.use_cache = False
    return model, tokenizer


def run_settings(model_args: ModelArguments, data_args: DataArguments) -> dict:
    """What makes another run, beside the rows and what the trainer knows."""
    return {
        "content of the base model": fingerprint(model_args.model_name_or_path)[:16],
        "num_hidden_layers": model_args.num_hidden_layers,
        "positive_weight": data_args.positive_weight,
        "flagged_loss": data_args.flagged_loss,
        "head_fit_rows": data_args.head_fit_rows,
    }


def lora_config(args: ModelArguments) -> LoraConfig:
    modules = args.lora_target_modules
    pattern = len(modules) == 1 and (modules[0] == "all-linear" or "*" in modules[0])
    return LoraConfig(
        task_type="SEQ_CLS",  # without it PEFT would not save the head
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=modules[0] if pattern else modules,
    )


def encode_rows(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[Dataset, int]:
    """Token ids and multi-hot float labels, sorted by length (the trainer shuffles), and how many rows were cut."""
    control = templates.control_ids(tokenizer)

    def encode(batch: dict[str, list]) -> dict[str, list]:
        ids = templates.encode(tokenizer, [templates.render("beavertails", m, tokenizer) for m in batch["messages"]])
        return {
            "input_ids": [templates.cut(sequence, max_length, control) for sequence in ids],
            "labels": [[float(name in named) for name in CATEGORIES] for named in batch["categories"]],
            "length": [len(sequence) for sequence in ids],
        }

    # Kept in memory: a cache file per run would fill the disk of everyone who tries a few things.
    encoded = rows.map(encode, batched=True, remove_columns=rows.column_names, keep_in_memory=True, desc="tokenizing")
    truncated = sum(length > max_length for length in encoded["length"])
    if truncated:
        logger.warning(
            "Cut %d of %d rows to %d tokens (the end of the answer; EOS kept).", truncated, len(rows), max_length
        )
    return encoded.sort("length").remove_columns("length"), truncated


def multilabel_loss(positive_weight: float, flagged_loss: float):
    """Mean binary cross-entropy over rows x 14 categories: the paper's loss, when both arguments are at their defaults.

    The sum over a micro-batch is divided by the label count of the WHOLE step (all processes, all accumulation steps),
    so that one batch of 8 and eight of 1 give the same gradient. `flagged_loss` adds the same loss on "any category",
    whose logit is the log-sum-exp (a smooth maximum, as the maximum decides at inference) of all fourteen for a safe
    row, and of the named ones for an unsafe row: over all of them, one category would learn to speak for the rest.
    """

    def loss(outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
        logits, count = outputs.logits.float(), labels.numel() if num_items_in_batch is None else num_items_in_batch
        bce = torch.nn.functional.binary_cross_entropy_with_logits
        weight = torch.full_like(logits[0], positive_weight)
        total = bce(logits, labels.float(), pos_weight=weight, reduction="sum") / count
        if flagged_loss:
            unsafe = labels.amax(-1, keepdim=True)
            counted = logits.masked_fill(labels < unsafe, torch.finfo(logits.dtype).min).logsumexp(-1)
            any_category = bce(counted, unsafe[:, 0].float(), reduction="sum")
            total = total + flagged_loss * any_category * labels.shape[-1] / count
        return total

    return loss


def compute_metrics(prediction) -> dict[str, float]:
    """`flagged/*` and `<category>/*`, as the original names them; what is undefined is left out."""
    refuse_diverged_scores(prediction.predictions)
    results = metrics.multilabel(prediction.label_ids > 0.5, sigmoid(prediction.predictions), CATEGORIES)
    return {f"{name}/{metric}": v for name, values in results.items() for metric, v in values.items() if v is not None}


def save_weights(trainer: LengthGroupedTrainer, tokenizer: PreTrainedTokenizerBase, args: ModelArguments) -> None:
    """A stock model folder with its tokenizer; after LoRA the merged model, and the PEFT adapter under adapter/."""
    folder, state_dict = Path(trainer.args.output_dir), full_state_dict(trainer)  # collective
    if not is_main_process():
        return
    # What describes an earlier guard goes first: it must never stand beside weights that it does not describe.
    for name in (CARD_FILE, "run.json", "README.md"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if args.use_peft:
        model.save_pretrained(folder / "adapter", state_dict=state_dict)
        tokenizer.save_pretrained(folder / "adapter")  # from its size PEFT knows that embeddings were added
        unset_hf_deepspeed_config()  # the merge is done by this process alone, on whole weights
        model = PeftModel.from_pretrained(load_model(args)[0], folder / "adapter").merge_and_unload()
        state_dict = model.state_dict()
    save_full(model, state_dict, folder)
    tokenizer.model_max_length = args.max_length
    tokenizer.save_pretrained(folder)


def describe_guard(trainer, model_args, data_args, validation, data_report, train_metrics) -> None:
    """guard.json (what load_guard needs), run.json (what was run), README.md (the model card). Rank 0 only."""
    if not is_main_process():
        return
    folder, spec = Path(trainer.args.output_dir), data_args.eval_data_name_or_path
    spec = spec or f"{data_args.eval_split_ratio} of {data_args.train_data_name_or_path}"
    threshold, scores = {"value": 0.5, "how": "default", "on": None}, {}
    if validation is not None:
        truth, probabilities = validation.label_ids > 0.5, sigmoid(validation.predictions)
        scores = metrics.multilabel(truth, probabilities, CATEGORIES)
        if not metrics.is_test(spec) and 0 < truth.any(1).sum() < len(truth):
            threshold = metrics.fit_threshold(truth.any(1), probabilities.max(1), spec)
    data = {"train": data_args.train_data_name_or_path, "validation": spec if scores else None, **data_report}
    card = ClassifierCard(
        template="beavertails",
        labels=CATEGORIES,
        max_length=model_args.max_length,
        thresholds={"flagged": threshold},
        base_model=model_args.model_name_or_path,
        base_sha256=local_sha256(model_args.model_name_or_path),
        num_hidden_layers=model_args.num_hidden_layers,
        data=data,
    )
    unset_hf_deepspeed_config()  # the guard is loaded by this process alone
    add_probe(folder, card, trust_remote_code=model_args.trust_remote_code)
    arguments = [model_args, data_args, trainer.args]
    run = manifest(arguments, seed=trainer.args.seed, data=data_report, train=train_metrics, validation=scores)
    write_json(folder / "run.json", run | {"log": trainer.state.log_history})
    report.model_card(
        folder,
        title="QA-moderation guard",
        base_model=model_args.model_name_or_path,
        intro=CARD_INTRO.format(data=data_args.train_data_name_or_path, rows=data_report["train_rows"]),
        usage=CARD_USAGE.format(folder=folder.name, eos=trainer.processing_class.eos_token or ""),
        sections={
            f"Measured on {spec}": report.metric_table(scores) if scores else "Nothing was measured.",
            "Threshold": f"Flagged if any probability is above {threshold['value']:.3f} ({threshold['how']}).",
            "Limits": "The scores hold for text like the training data: English, one question and one answer. A guard "
            "that was trained on sample data shows that the recipe runs, not that the guard is good.",
        },
    )
    logger.info("Saved the guard to %s", folder)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).float().sigmoid().numpy()


CARD_INTRO = """Judges a question together with its answer in 14 harm categories (BeaverTails, arXiv 2307.04657).
Trained on {data} ({rows} rows) by `examples/moderation/train.py`. The licences of the base model and the data apply."""
CARD_USAGE = """from transformers import pipeline

pipe = pipeline("text-classification", "{folder}", top_k=None, function_to_apply="sigmoid")
pipe("BEGINNING OF CONVERSATION: USER: <question> ASSISTANT:<answer>{eos}")"""


if __name__ == "__main__":
    run_cli(main)
