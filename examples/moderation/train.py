"""Fine-tune a QA-moderation guard: 14 harm categories over question+answer pairs (BeaverTails,
arXiv 2307.04657).

# the quickstart: bundled model, bundled sample data, CPU, minutes
torchrun train.py

# one GPU, LoRA on any decoder
launch/lora_1gpu.sh --model_name_or_path Qwen/Qwen2.5-1.5B

# the paper's run: 8 GPUs, full fine-tune of LLaMA-7B, FSDP2
torchrun --nproc_per_node=8 train.py --config configs/paper.yaml
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_utils import PredictionOutput
from trl import ModelConfig

from common import data, metrics, report, templates
from common.bundled import resolve_model
from common.conversation import UserError
from common.data.specs import about_data
from common.fit import check_length, fit_classifier, fresh_modules, modules_to_save, pooling
from common.head_start import fit_head
from common.keep import fingerprint, rows_digest
from common.model_card import Measured, write_model_card
from common.run import is_main_process, manifest, parse_args, run_cli, usable_attention, write_json
from common.saving import (
    free_memory,
    full_state_dict,
    merged_model,
    predictions,
    refuse_to_overwrite,
    save_adapter,
    save_model,
    spread,
    whole_folder,
)
from common.templates.chat import chat_template_of
from common.training import (
    LengthGroupedTrainer,
    RecipeTrainingArguments,
    checkpoint_to_resume,
    refuse_diverged_scores,
    start_over,
    useful_token_share,
    with_adapters,
)
from guards import add_probe
from guards.card import ClassifierCard, local_sha256

logger = logging.getLogger("moderation")
CATEGORIES = data.taxonomy("beavertails")  # label index = position; rows are read by key
TEMPLATE = "beavertails"


@dataclass
class ModelArguments:
    model_name_or_path: str = field(
        metadata={"help": "Hub id, folder, or smollm2-135m-instruct (bundled)."}
    )
    max_length: int = field(
        default=512, metadata={"help": "Longer pairs are cut at the end of the answer; EOS stays."}
    )
    num_hidden_layers: int | None = field(
        default=None, metadata={"help": "Keep only the first so many layers of the base."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa | flash_attention_2 | eager"}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with the model."}
    )
    use_peft: bool = field(
        default=False,
        metadata={"help": "LoRA; the head is trained and saved, the guard folder is merged."},
    )
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "all-linear | one pattern with .* | names"},
    )


@dataclass
class DataArguments:
    train_data_name_or_path: str = field(
        metadata={"help": "Data spec, e.g. PKU-Alignment/BeaverTails:330k_train or rows.jsonl."}
    )
    eval_data_name_or_path: str | None = field(
        default=None, metadata={"help": "Data spec of the validation rows."}
    )
    eval_split_ratio: float | None = field(
        default=None,
        metadata={"help": "Without eval data: share of the train prompts to hold out."},
    )
    deduplicate: bool = field(
        default=False, metadata={"help": "One row a pair, labels by majority vote."}
    )
    bad_rows: str = field(default="error", metadata={"help": "error | skip (counted and reported)"})
    max_train_rows: int | None = None
    positive_weight: float = field(
        default=1.0, metadata={"help": "Weight of positive labels in the loss; the paper has 1."}
    )
    flagged_loss: float = field(
        default=0.0,
        metadata={"help": "Weight of an extra loss on 'any category'; the paper has 0."},
    )
    head_fit_rows: int = field(
        default=0,
        metadata={
            "help": "Fit the head on the frozen base with so many rows first; the paper has 0."
        },
    )


def main() -> None:
    model_args, data_args, args = parse_args(
        [ModelArguments, DataArguments, RecipeTrainingArguments],
        Path(__file__).parent / "configs/quickstart.yaml",
    )
    checkpoint = checkpoint_to_resume(args)
    if checkpoint is None:
        refuse_to_overwrite(args.output_dir, args.overwrite_output_dir)
    if data_args.head_fit_rows < 0:
        raise UserError(f"--head_fit_rows {data_args.head_fit_rows}: must be 0 (off) or more")
    if data_args.head_fit_rows and (args.fsdp or args.deepspeed):
        raise UserError(
            "--head_fit_rows needs the whole model in every process; leave out --fsdp and --deepspeed"
        )
    set_seed(args.seed)

    train_rows, eval_rows, data_report = load_rows(data_args, args.seed)
    select_best_on_validation(args, data_args)
    model, tokenizer, fresh = load_model(model_args)
    train_set, truncated = encode_rows(train_rows, tokenizer, model_args.max_length)
    eval_set = encode_rows(eval_rows, tokenizer, model_args.max_length)[0] if eval_rows else None
    lengths = [len(ids) for ids in train_set["input_ids"]]
    data_report |= {
        "truncated": truncated,
        "useful_token_share": round(
            useful_token_share(lengths, args.train_batch_size, args.seed), 3
        ),
    }
    logger.info("Data: %s", json.dumps(data_report))

    loss = multilabel_loss(data_args.positive_weight, data_args.flagged_loss)
    if data_args.head_fit_rows and checkpoint is None:
        every = -(-len(train_set) // data_args.head_fit_rows)
        fit_head(model, tokenizer, train_set.shard(every, 0, contiguous=False), loss, args.device)
    if model_args.use_peft:
        model = add_adapters(model, model_args, fresh)
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
    compared = spread(eval_rows or train_rows)
    save_guard(trainer, model_args, data_args, compared, validation, data_report, result.metrics)


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
    facts = {
        "train_rows": len(train),
        "train_unsafe": sum(train["response_unsafe"]),
        "train_sha256": rows_digest(train),
    }
    if held_out is not None:
        facts["validation"] = data.overlap(train, held_out)
        if facts["validation"]["prompt_in_train"]:
            logger.warning(
                "Validation shares prompts with training (%s): its scores flatter the guard.",
                facts["validation"],
            )
    return train, held_out, facts


def select_best_on_validation(args: RecipeTrainingArguments, data_args: DataArguments) -> None:
    """Keep the checkpoint with the best flagged AUPRC, where there is a validation set that may be
    selected on.
    """
    spec = data_args.eval_data_name_or_path
    if spec is None and data_args.eval_split_ratio is None:
        args.eval_strategy = "no"  # the original evaluated without data, and failed after training
    elif spec is not None and metrics.is_test(spec):
        logger.info(
            "%s is a test split: no checkpoint is selected and no threshold fitted on it (the last one is kept).",
            spec,
        )
    elif args.save_strategy != args.eval_strategy or (
        args.save_strategy == "steps" and args.save_steps % args.eval_steps
    ):
        logger.info(
            "Checkpoints are not saved where they are evaluated: the last one is kept, not the best."
        )
    elif args.eval_strategy != "no":
        args.load_best_model_at_end, args.metric_for_best_model, args.greater_is_better = (
            True,
            "eval_flagged/auprc",
            True,
        )


def load_model(args: ModelArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """The base with a fresh head of 14 labels, its tokenizer, and the names of its fresh modules.

    It is in float32; the trainer casts to bf16 on the fly.
    """
    source = {
        "pretrained_model_name_or_path": resolve_model(args.model_name_or_path),
        "trust_remote_code": args.trust_remote_code,
    }
    depth = {} if args.num_hidden_layers is None else {"num_hidden_layers": args.num_hidden_layers}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            **source,
            output_loading_info=True,
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
    # so that a decoder's score is read at the last attended token: EOS
    fit_classifier(tokenizer, model)
    check_length(model, args.max_length)
    model.config.use_cache = False
    return model, tokenizer, fresh_modules(model, loading["missing_keys"])


def run_settings(model_args: ModelArguments, data_args: DataArguments) -> dict:
    """What makes another run, beside the rows and what the trainer knows."""
    return {
        "content of the base model": fingerprint(model_args.model_name_or_path)[:16],
        "num_hidden_layers": model_args.num_hidden_layers,
        "positive_weight": data_args.positive_weight,
        "flagged_loss": data_args.flagged_loss,
        "head_fit_rows": data_args.head_fit_rows,
    }


def add_adapters(model: PreTrainedModel, args: ModelArguments, fresh: list[str]) -> PeftModel:
    """LoRA in the base; the head, and other modules that the checkpoint lacks, are trained whole."""
    asked = ModelConfig(
        use_peft=True,
        lora_task_type="SEQ_CLS",  # without it PEFT would not save the head
        lora_r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        lora_target_modules=args.lora_target_modules,
        lora_modules_to_save=modules_to_save(fresh),
    )
    return with_adapters(model, asked, "--lora_target_modules")


def encode_rows(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Dataset, int]:
    """`tokenize_rows`, sorted by length (the trainer shuffles), and how many rows were cut."""
    encoded = tokenize_rows(rows, tokenizer, max_length)
    truncated = sum(length > max_length for length in encoded["length"])
    if truncated:
        logger.warning(
            "Cut %d of %d rows to %d tokens (the end of the answer; EOS kept).",
            truncated,
            len(rows),
            max_length,
        )
    return encoded.sort("length").remove_columns("length"), truncated


def tokenize_rows(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Token ids and multi-hot float labels of each row, and its `length` before it was cut."""
    control = templates.control_ids(tokenizer)

    def encode(batch: dict[str, list]) -> dict[str, list]:
        ids = templates.encode(
            tokenizer, [templates.render(TEMPLATE, m, tokenizer) for m in batch["messages"]]
        )
        return {
            "input_ids": [templates.cut(sequence, max_length, control) for sequence in ids],
            "labels": [
                [float(name in named) for name in CATEGORIES] for named in batch["categories"]
            ],
            "length": [len(sequence) for sequence in ids],
        }

    # Kept in memory: a cache file per run would fill the disk of everyone who tries a few things.
    return rows.map(
        encode,
        batched=True,
        remove_columns=rows.column_names,
        keep_in_memory=True,
        desc="tokenizing",
    )


def multilabel_loss(positive_weight: float, flagged_loss: float):
    """Mean binary cross-entropy over rows x 14 categories: the paper's loss, when both arguments
    are at their defaults.

    The sum over a micro-batch is divided by the label count of the WHOLE step (all processes, all
    accumulation steps), so that one batch of 8 and eight of 1 give the same gradient.
    `flagged_loss` adds the same loss on "any category", whose logit is the log-sum-exp (a smooth
    maximum, as the maximum decides at inference) of all fourteen for a safe row, and of the named
    ones for an unsafe row: over all of them, one category would learn to speak for the rest.
    """

    def loss(
        outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        logits, count = (
            outputs.logits.float(),
            labels.numel() if num_items_in_batch is None else num_items_in_batch,
        )
        bce = torch.nn.functional.binary_cross_entropy_with_logits
        weight = torch.full_like(logits[0], positive_weight)
        total = bce(logits, labels.float(), pos_weight=weight, reduction="sum") / count
        if flagged_loss:
            unsafe = labels.amax(-1, keepdim=True)
            counted = logits.masked_fill(labels < unsafe, torch.finfo(logits.dtype).min).logsumexp(
                -1
            )
            any_category = bce(counted, unsafe[:, 0].float(), reduction="sum")
            total = total + flagged_loss * any_category * labels.shape[-1] / count
        return total

    return loss


def compute_metrics(prediction) -> dict[str, float]:
    """`flagged/*` and `<category>/*`, as the original names them; what is undefined is left out."""
    refuse_diverged_scores(prediction.predictions)
    results = metrics.multilabel(
        prediction.label_ids > 0.5, sigmoid(prediction.predictions), CATEGORIES
    )
    return {
        f"{name}/{metric}": v
        for name, values in results.items()
        for metric, v in values.items()
        if v is not None
    }


# --- the guard's folder -----------------------------------------------------------------------------------------------


def save_guard(
    trainer: LengthGroupedTrainer,
    model_args: ModelArguments,
    data_args: DataArguments,
    rows: Sequence[dict[str, Any]],
    validation: PredictionOutput | None,
    facts: dict[str, Any],
    train_metrics: dict[str, float],
) -> None:
    """Save the guard, whole or not at all: weights, tokenizer, run.json, model card, and guard.json
    last.

    Args:
        rows: conversations on which the folder has to say what the model in memory says.
        facts: what is to know about the data.
    """
    args, tokenizer = trainer.args, trainer.processing_class
    encoded = tokenize_rows(Dataset.from_list(rows), tokenizer, model_args.max_length)
    probabilities = sigmoid(predictions(trainer, encoded))  # collective
    state_dict = full_state_dict(trainer)  # collective
    free_memory(trainer)
    if not is_main_process():
        return
    said = [dict(zip(CATEGORIES, row, strict=True)) for row in probabilities.tolist()]
    trained = [(row["messages"], scores) for row, scores in zip(rows, said, strict=True)]
    threshold, scores = measure(data_args, validation)
    card = ClassifierCard(
        template=TEMPLATE,
        labels=CATEGORIES,
        max_length=model_args.max_length,
        pooling=pooling(trainer.accelerator.unwrap_model(trainer.model)),
        thresholds={"flagged": threshold},
        base_model=model_args.model_name_or_path,
        base_sha256=local_sha256(model_args.model_name_or_path),
        num_hidden_layers=model_args.num_hidden_layers,
        data={
            "train_data": data_args.train_data_name_or_path,
            "validation_data": validation_spec(data_args) if scores else None,
            **facts,
        },
    )
    with whole_folder(args.output_dir) as folder:
        write_weights(trainer, state_dict, model_args, folder)
        arguments = [model_args, data_args, args]
        run = manifest(
            arguments, seed=args.seed, data=facts, train=train_metrics, validation=scores
        )
        write_json(folder / "run.json", run | {"log": trainer.state.log_history})
        write_readme(folder, card, scores, tokenizer)
        if model_args.use_peft:
            write_adapter_readme(folder / "adapter", card)
        unset_hf_deepspeed_config()  # the guard is loaded by this process alone
        options = {"trust_remote_code": model_args.trust_remote_code, "long_inputs": "truncate"}
        add_probe(folder, card, trained, **options)
    logger.info(
        "Saved the guard to %s; it says there what the model in memory says", args.output_dir
    )


def write_weights(
    trainer: LengthGroupedTrainer,
    state_dict: dict[str, torch.Tensor],
    model_args: ModelArguments,
    folder: Path,
) -> None:
    """A stock model folder with its tokenizer; after LoRA the merged model, and the PEFT adapter in
    adapter/.
    """
    tokenizer = trainer.processing_class
    tokenizer.model_max_length = model_args.max_length
    tokenizer.chat_template = chat_template_of(TEMPLATE, tokenizer)  # the base's own renders a chat
    model = trainer.accelerator.unwrap_model(trainer.model)
    if model_args.use_peft:
        save_adapter(model, state_dict, tokenizer, folder / "adapter")
        model = merged_model(model, state_dict)
        state_dict = model.state_dict()
    save_model(model, state_dict, tokenizer, folder)


def validation_spec(args: DataArguments) -> str:
    """What the validation rows are, in words."""
    return (
        args.eval_data_name_or_path or f"{args.eval_split_ratio} of {args.train_data_name_or_path}"
    )


def measure(
    args: DataArguments, validation: PredictionOutput | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The threshold for "flagged", fitted where there are validation rows for it, and the scores on
    them by label.
    """
    default = {"value": 0.5, "how": "default", "on": None}
    if validation is None:
        return default, {}
    truth, probabilities = validation.label_ids > 0.5, sigmoid(validation.predictions)
    scores = metrics.multilabel(truth, probabilities, CATEGORIES)
    flagged, spec = truth.any(1), validation_spec(args)
    if metrics.is_test(spec) or len(set(flagged.tolist())) < 2:
        return default, scores
    return metrics.fit_threshold(flagged, probabilities.max(1), spec), scores


def write_readme(
    folder: Path, card: ClassifierCard, scores: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    """README.md, the model card."""
    train_data, validation = card.data["train_data"], card.data["validation_data"]
    threshold = card.thresholds["flagged"]
    measured = None
    heading, table = "Measured", "Nothing was measured."
    if scores:
        measured = Measured(validation, {"flagged": scores["flagged"]})
        heading, table = (
            f"Measured on {about_data(validation)['name']}",
            report.metric_table(scores),
        )
    intro = CARD_INTRO.format(data=about_data(train_data)["name"], rows=card.data["train_rows"])
    chat = (
        CARD_CHAT
        if tokenizer.chat_template
        else "It has no chat template: its tokenizer allows of none."
    )
    write_model_card(
        folder,
        title="QA-moderation guard",
        base_model=card.base_model,
        train_data=[train_data],
        intro=intro,
        usage=CARD_USAGE.format(eos=tokenizer.eos_token or ""),
        measured=measured,
        sections={
            "The text that it reads": f"{CARD_TEXT} {chat}",
            heading: table,
            "Threshold": f"Flagged if any probability is above {threshold.value:.3f} ({threshold.how}).",
            "Limits": CARD_LIMITS,
        },
    )


def write_adapter_readme(folder: Path, card: ClassifierCard) -> None:
    """README.md of the adapter: how stock PEFT reads it."""
    depth = (
        "" if card.num_hidden_layers is None else f", num_hidden_layers={card.num_hidden_layers}"
    )
    write_model_card(
        folder,
        title="Adapter of a QA-moderation guard",
        base_model=card.base_model,
        train_data=[card.data["train_data"]],
        intro="The guard in the folder above as a PEFT adapter of its base.",
        usage=ADAPTER_USAGE.format(labels=len(CATEGORIES), depth=depth),
        sections={"Padding": ADAPTER_PADDING},
        adapter=True,
    )


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).float().sigmoid().numpy()


CARD_INTRO = """Judges a question together with its answer in 14 harm categories (BeaverTails, arXiv 2307.04657).
Trained on {data} ({rows} rows) by `examples/moderation/train.py`. The licences of the base model and the data apply."""
CARD_USAGE = """from transformers import pipeline

pipe = pipeline("text-classification", ".", top_k=None, function_to_apply="sigmoid")
pipe("BEGINNING OF CONVERSATION: USER: <question> ASSISTANT:<answer>{eos}")"""
ADAPTER_USAGE = """from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

model = AutoPeftModelForSequenceClassification.from_pretrained(".", num_labels={labels}{depth})
tokenizer = AutoTokenizer.from_pretrained(".")
model.config.pad_token_id = tokenizer.pad_token_id"""
ADAPTER_PADDING = """The last line is needed: a decoder's score is read before the first pad token, and the base's own
pad token may be the very token that every text ends with."""
CARD_TEXT = """The text above is what was trained. `guards.load_guard` writes it, and keeps control tokens out of
content."""
CARD_CHAT = """`tokenizer.apply_chat_template` renders it from messages, as vLLM's `/classify` does, with what the
tokenizer puts around a text: give it to the model without adding special tokens again."""
CARD_LIMITS = """The scores hold for text like the training data: English, one question and one answer. A guard that was
trained on sample data shows that the recipe runs, not that the guard is good."""


if __name__ == "__main__":
    run_cli(main)
