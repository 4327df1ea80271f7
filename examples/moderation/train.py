"""Fine-tune a moderation guard: the harm categories of the rows over questions and answers, as
BeaverTails does with 14 (arXiv 2307.04657).

# the quickstart: bundled model, bundled sample data, CPU, minutes
torchrun train.py

# one GPU, LoRA on any decoder
launch/lora_1gpu.sh --model_name_or_path Qwen/Qwen2.5-1.5B

# your own rows with their own categories; --judge prompt for rows without answers
torchrun train.py --config configs/quickstart.yaml --output_dir output/mine \
    --train_data_name_or_path rows.csv --eval_data_name_or_path validation.csv \
    --overwrite_output_dir false

# the paper's run: 8 GPUs, full fine-tune of LLaMA-7B, FSDP2
torchrun --nproc_per_node=8 train.py --config configs/paper.yaml
"""

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from arguments import DataArguments, ModelArguments, check_arguments
from datasets import Dataset
from guard_folder import compute_metrics, run_settings, save_guard
from peft import PeftModel
from rows import describe, encode_rows, load_rows
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from trl import ModelConfig

from common.bundled import resolve_model
from common.data import spread
from common.data.splits import augment
from common.fit import (
    check_depth,
    check_length,
    fit_classifier,
    fresh_modules,
    modules_to_save,
)
from common.head_start import fit_head
from common.hub import push_finished
from common.labels import flagged, masked_bce
from common.run import loading_model, parse_args, run_cli, usable_attention
from common.saving import COMPARED_ROWS, predictions, refuse_to_overwrite
from common.training import (
    LengthGroupedTrainer,
    RecipeTrainingArguments,
    checkpoint_to_resume,
    start_over,
    with_adapters,
)

logger = logging.getLogger("moderation")
QUICKSTART = Path(__file__).parent / "configs/quickstart.yaml"


def main() -> None:
    # --- 1. Arguments: flags, or a YAML file; nothing is loaded before they are checked -----------
    model_args, data_args, args = parse_args(
        [ModelArguments, DataArguments, RecipeTrainingArguments], QUICKSTART
    )
    checkpoint = checkpoint_to_resume(args)
    if checkpoint is None:
        refuse_to_overwrite(args.output_dir, args.overwrite_output_dir)
    check_arguments(data_args, args)
    set_seed(args.seed)

    # --- 2. Data: labelled conversations, checked row by row --------------------------------------
    # `shared` counts what validation has in common with training; `task` is what is judged, and the
    # outputs of the head
    train_rows, eval_rows, shared, task = load_rows(data_args, args.seed)
    train_rows, added = augment(train_rows, data_args.augment, args.seed)

    # --- 3. Model: a stock classifier with a fresh head, and the rows as its token ids ------------
    # `fresh` are the modules that the checkpoint lacks; `facts` go to guard.json and run.json
    model, tokenizer, fresh = load_model(model_args, list(task.labels))
    encode = partial(encode_rows, task=task, tokenizer=tokenizer, max_length=model_args.max_length)
    train_set = encode(train_rows).sort("length")  # the trainer shuffles
    eval_set = encode(eval_rows).sort("length") if eval_rows else None
    facts = describe(train_rows, train_set, task, model_args.max_length, args, shared)
    if added:
        facts["augmented"] = added
    logger.info("Data: %s", json.dumps(facts))
    loss = multilabel_loss(data_args.positive_weight, data_args.flagged_loss)
    if data_args.head_fit_rows and checkpoint is None:
        every = -(-len(train_set) // data_args.head_fit_rows)  # of so many rows one, rounded up
        fit_head(model, tokenizer, train_set.shard(every, 0, contiguous=False), loss, args.device)
    if model_args.use_peft:
        model = add_adapters(model, model_args, fresh)

    # --- 4. Trainer: transformers' own, with batches of similar length ----------------------------
    trainer = LengthGroupedTrainer(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_loss_func=loss,
        compute_metrics=partial(compute_metrics, names=list(task.labels)),
        settings=run_settings(model_args, data_args, task),  # a resumed run must have the same
    )
    if checkpoint is None:
        start_over(args)  # checkpoints of an earlier run go
    result = trainer.train(resume_from_checkpoint=checkpoint)

    # --- 5. Save: a folder that stock libraries load, compared with the model in memory -----------
    # on `validation` thresholds are fitted; of the few rows `compared` the folder, loaded again,
    # must say what the model in memory says: `outputs`
    validation = trainer.predict(eval_set, metric_key_prefix="eval") if eval_set else None
    compared = spread(eval_rows or train_rows, COMPARED_ROWS)
    outputs = predictions(trainer, encode(Dataset.from_list(compared)))
    found = {"validation": validation, "facts": facts, "train_metrics": result.metrics}
    save_guard(trainer, model_args, data_args, task, **found, compared=compared, outputs=outputs)
    push_finished(args)  # with --push_to_hub


# --- the model ------------------------------------------------------------------------------------


def load_model(
    args: ModelArguments, labels: list[str]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """The base with a fresh head of these labels, its tokenizer, and the names of its fresh modules.

    It is in float32; the trainer casts to bf16 on the fly.
    """
    base = resolve_model(args.model_name_or_path)
    code = {"trust_remote_code": args.trust_remote_code}
    depth = {} if args.num_hidden_layers is None else {"num_hidden_layers": args.num_hidden_layers}
    with loading_model(args.model_name_or_path, flag="--model_name_or_path"):
        config = AutoConfig.from_pretrained(base, **code)
        check_depth(config, args.num_hidden_layers, "--num_hidden_layers")
        tokenizer = AutoTokenizer.from_pretrained(base, **code)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            base,
            output_loading_info=True,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={name: i for i, name in enumerate(labels)},
            problem_type="multi_label_classification",
            attn_implementation=usable_attention(args.attn_implementation),
            dtype=torch.float32,
            **depth,
            **code,
        )
    fit_classifier(tokenizer, model)  # a decoder's score is read at the last attended token, EOS
    check_length(model, args.max_length)
    model.config.use_cache = False
    return model, tokenizer, fresh_modules(model, loading["missing_keys"])


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


# --- the loss -------------------------------------------------------------------------------------


def multilabel_loss(positive_weight: float, flagged_loss: float) -> Callable[..., torch.Tensor]:
    """Mean binary cross-entropy over the known labels of the rows: the paper's loss, when both
    arguments are at their defaults and every row knows its categories.

    The sum over a micro-batch is divided by the label count of the WHOLE step (all processes, all
    accumulation steps), so that one batch of 8 and eight of 1 give the same gradient.
    `flagged_loss` adds the same loss on "any output", whose logit is the log-sum-exp (a smooth
    maximum, as the maximum decides at inference) of all outputs for a safe row, and of the named
    ones for an unsafe row: over all of them, one category would learn to speak for the rest.
    """
    bce = torch.nn.functional.binary_cross_entropy_with_logits

    def loss(
        outputs: SequenceClassifierOutputWithPast,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        logits = outputs.logits.float()
        wanted = labels.float()
        count = num_items_in_batch
        if count is None:
            count = (wanted >= 0).sum().clamp(min=1)
        weight = torch.full_like(logits[0], positive_weight)
        total = masked_bce(logits, wanted, weight) / count
        if flagged_loss:
            highest = wanted.amax(-1, keepdim=True)
            lowest = torch.finfo(logits.dtype).min
            any_output = logits.masked_fill(wanted < highest, lowest).logsumexp(-1)
            of_rows = bce(any_output, flagged(wanted).float(), reduction="sum")
            total = total + flagged_loss * of_rows * labels.shape[-1] / count
        return total

    return loss


if __name__ == "__main__":
    run_cli(main)
