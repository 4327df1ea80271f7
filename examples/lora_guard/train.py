"""Train LoRA adapters and a guard head on a frozen chat model (LoRA-Guard, arXiv 2407.02987).

# the quickstart: bundled chat model, bundled sample data, CPU, minutes
torchrun train.py

# the paper's command
accelerate launch --multi-gpu --mixed-precision=bf16 train.py meta-llama/Llama-3.2-1B-Instruct \
    output/llama-3.2-1b --epochs 3 --per-device-batch-size 2 --learning-rate 3e-4

# the paper's ablation: the head alone
python train.py meta-llama/Llama-3.2-1B-Instruct output/head-only --head-only
"""

import json
import logging
from functools import partial
from pathlib import Path

import numpy as np
import torch
from adapter import RunFolder, paper_metrics, replace_head, split_logits
from arguments import GuardArguments, check_arguments, name_positionals, training_arguments
from datasets import Dataset
from inputs import encode_rows, head_labels, judged_inputs, settled_labels
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from trl import ModelConfig

from common.bundled import resolve_model
from common.data import load_conversations, spread
from common.data.specs import in_one_name
from common.data.splits import augment, load_training_rows
from common.fit import check_depth, check_length, fit_classifier
from common.head_start import fit_head
from common.hub import push_finished
from common.keep import fingerprint, rows_digest
from common.labels import asked_categories, judged_rows, masked_bce
from common.run import inference_dtype, loading_model, parse_args, run_cli, usable_attention
from common.saving import COMPARED_ROWS, refuse_to_overwrite
from common.training import (
    LengthGroupedTrainer,
    checkpoint_to_resume,
    start_over,
    useful_token_share,
    with_adapters,
)

logger = logging.getLogger("lora_guard")
QUICKSTART = Path(__file__).parent / "configs/quickstart.yaml"


def main() -> None:
    # --- 1. Arguments: the paper's flags, or a YAML file ------------------------------------------
    name_positionals()
    (args,) = parse_args([GuardArguments], QUICKSTART)
    check_arguments(args)
    training = training_arguments(args)
    checkpoint = checkpoint_to_resume(training)
    if checkpoint is None:
        names = ("best", "config.json", "epoch-0")
        flag = "--overwrite-output-dir"
        refuse_to_overwrite(args.output_folder, args.overwrite_output_dir, names, flag)
    set_seed(args.seed)

    # --- 2. Data: labelled conversations, checked row by row --------------------------------------
    train_rows, eval_rows, test_rows = load_rows(args)
    labels = settled_labels(train_rows, args)
    train_rows, added = augment(train_rows, args.augment, args.seed)

    # --- 3. Model: the chat model's layers under a fresh head, and the rows as its token ids ------
    model, tokenizer = load_model(args, head_labels(labels, args))
    encode = partial(encode_rows, labels=labels, tokenizer=tokenizer, args=args)
    train_set, facts = encode(train_rows, in_one_name(args.train_data))
    eval_set = encode(eval_rows, args.validation_name())[0] if eval_rows else None
    test_set = encode(test_rows, args.test_data)[0] if test_rows else None
    lengths = [len(ids) for ids in train_set["input_ids"]]
    share = useful_token_share(lengths, args.per_device_batch_size, args.seed)
    facts |= {"train_sha256": rows_digest(train_rows), "useful_token_share": round(share, 3)}
    if added:
        facts["augmented"] = added
    logger.info("Data: %s", json.dumps(facts))
    loss = guard_loss(np.array(train_set["labels"]), unsafe_head=not args.no_unsafe_head)
    if args.head_fit_rows and checkpoint is None:
        every = -(-len(train_set) // args.head_fit_rows)
        some = train_set.shard(every, 0, contiguous=False)
        fit_head(model, tokenizer, some, loss, training.device)
    model = add_adapters(model, args)

    # --- 4. Trainer: transformers' own, with batches of similar length ----------------------------
    folder = RunFolder(args, tokenizer, labels, facts)
    trainer = LengthGroupedTrainer(
        model=model,
        args=training,
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_loss_func=loss,
        compute_metrics=partial(paper_metrics, labels=list(labels), args=args),
        callbacks=[folder],
        settings=run_settings(args) | {"labels": list(labels)},
    )
    if checkpoint is None:
        start_over(training)
    folder.start(model, training, afresh=checkpoint is None)
    result = trainer.train(resume_from_checkpoint=checkpoint)

    # --- 5. Save: the best epoch's adapter folder, compared with the model in memory --------------
    compared = judged_inputs(spread(eval_rows or train_rows, COMPARED_ROWS), args.guard_inputs)
    folder.finish(trainer, test_set, compared, result.metrics)
    push_finished(training, folder.folder / "best")


def load_rows(args: GuardArguments) -> tuple[Dataset, Dataset | None, Dataset | None]:
    """Rows to train on, to validate on and to test on."""
    asked = asked_categories(args.categories)
    checks = {"categories": None if asked is None else list(asked), "bad_rows": args.bad_rows}
    # a guard of several kinds sees whole conversations
    judge = args.guard_inputs[0] if len(args.guard_inputs) == 1 else "pair"
    train, validation, _ = load_training_rows(
        args.train_data,
        args.eval_data,
        args.eval_split_ratio,
        args.seed,
        judge=judge,
        one_row_a_pair=args.deduplicate,
        max_train_rows=args.max_train_rows,
        **checks,
    )
    test = None
    if args.test_data:
        test = judged_rows(load_conversations(args.test_data, **checks), judge)
    return train, validation, test


# --- the model ------------------------------------------------------------------------------------


def load_model(
    args: GuardArguments, names: list[str]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The chat model's transformer (bf16 on a GPU) under a float32 head with these outputs."""
    base = resolve_model(args.hf_model_id)
    code = {"trust_remote_code": args.trust_remote_code}
    depth = {} if args.guard_layers is None else {"num_hidden_layers": args.guard_layers}
    with loading_model(args.hf_model_id, flag="hf_model_id"):
        config = AutoConfig.from_pretrained(base, **code)
        check_depth(config, args.guard_layers, "--guard-layers")
        tokenizer = AutoTokenizer.from_pretrained(base, **code)
        model = AutoModelForSequenceClassification.from_pretrained(
            base,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
            attn_implementation=usable_attention(args.attn_implementation),
            dtype=inference_dtype(),
            **depth,
            **code,
        )
    fit_classifier(tokenizer, model)
    check_length(model, args.max_length, "--max-length")
    replace_head(model, len(names), bias=not args.no_clf_head_bias)
    model.config.use_cache = False
    return model, tokenizer


def add_adapters(model: PreTrainedModel, args: GuardArguments) -> PeftModel:
    """LoRA over the frozen model, in float32.

    `--head-only` keeps adapters of rank 1 at zero, so that there is one folder format.
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
    for name, parameter in model.named_parameters():
        if args.head_only and "lora_" in name:
            parameter.requires_grad_(False)
    return model


# --- the loss -------------------------------------------------------------------------------------


def guard_loss(train_labels: np.ndarray, unsafe_head: bool):
    """Half the unsafe BCE, half the mean category BCE, with positive weights (the reference's
    utils.py, scaled right).

    A positive weighs n_negative / n_positive of the training rows, and 1 where a class is empty.
    The sum over a micro-batch is divided by the rows of the WHOLE step (all processes, all
    accumulation steps).

    Args:
        train_labels: [rows, labels], unsafe first, NaN where a category is unknown.
    """
    positive = (train_labels == 1).sum(0)
    negative = (train_labels == 0).sum(0)
    both = (positive > 0) & (negative > 0)
    ratio = negative / np.maximum(positive, 1)
    weights = torch.tensor(np.where(both, ratio, 1.0))
    bce = torch.nn.functional.binary_cross_entropy_with_logits

    def loss(
        outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        unsafe, categories = split_logits(outputs.logits.float(), unsafe_head)
        labels = labels.float()
        weight = weights.to(labels.device, torch.float32)
        count = labels.numel() if num_items_in_batch is None else num_items_in_batch
        total = bce(
            unsafe,
            labels[:, 0],
            pos_weight=weight[0],
            reduction="sum",
        )
        named = labels[:, 1:]
        if named.shape[1]:
            of_categories = masked_bce(categories, named, weight[1:]) / named.shape[1]
            total = (total + of_categories) / 2
        return total * labels.shape[1] / count

    return loss


def run_settings(args: GuardArguments) -> dict:
    """What makes another run, beside the rows and what the trainer knows."""
    named = ("guard_layers", "no_unsafe_head", "no_clf_head_bias", "head_only", "head_fit_rows")
    settings = {name: getattr(args, name) for name in named}
    return settings | {"content of the base model": fingerprint(args.hf_model_id)[:16]}


if __name__ == "__main__":
    run_cli(main)
