"""LoRA instruction tuning that teaches a model to refuse harmful documents (Cross-Task Defense,
arXiv 2405.15202).

# the quickstart: bundled model and sample, CPU, minutes
torchrun train.py

# the paper's command
python train.py --base_model meta-llama/Llama-2-7b-hf \
    --data_path data/training/saferpaca_Instructions_100_10_summarize.json --output_dir
    output/llama2-summarize-10 \
    --num_epochs 3 --cutoff_len 1024 --val_set_size 0 --prompt_template_name llama2

Data: build_data.py. The answers: generate_answers.py.
"""

import json
import logging
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from flags import run
from peft import PeftModel, prepare_model_for_kbit_training
from prompts import encode_prompts, load_template, read_rows, split_document
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from trl import ModelConfig, SFTConfig, SFTTrainer

from common import report
from common.bundled import resolve_model
from common.conversation import UserError
from common.engines import quantization_config
from common.fit import check_ids, check_length, fit_causal_lm
from common.keep import fingerprint
from common.model_card import write_model_card
from common.run import inference_dtype, is_main_process, manifest, usable_attention, write_json
from common.saving import full_state_dict, refuse_to_overwrite, save_adapter, whole_folder
from common.templates import Part, encode, token_offsets
from common.training import (
    AnswerTrainer,
    RecipeTrainingArguments,
    checkpoint_to_resume,
    start_over,
    with_adapters,
)

logger = logging.getLogger("cross_task_defense")


@dataclass
class DefenceConfig(RecipeTrainingArguments, SFTConfig):
    """TRL's arguments with what this collection adds to transformers' (CPU, dead flags)."""


def train(
    *,
    base_model: str,
    data_path: str,
    output_dir: str = "output/lora-alpaca",
    batch_size: int = 128,
    micro_batch_size: int = 4,
    num_epochs: float = 3,
    learning_rate: float = 3e-4,
    cutoff_len: int = 1024,
    val_set_size: int = 0,
    lora_r: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.05,
    lora_target_modules: list[str] = ["q_proj", "v_proj"],  # noqa: B006 (never changed; fire shows it)
    train_on_inputs: bool = False,
    first_token_weight: float = 1.0,
    add_eos_token: bool = True,
    group_by_length: bool = True,
    packing: bool = False,
    wandb_project: str | None = None,
    wandb_run_name: str | None = None,
    wandb_watch: str | None = None,
    wandb_log_model: str | None = None,
    resume_from_checkpoint: str | None = None,
    overwrite_output_dir: bool = False,
    prompt_template_name: str = "alpaca",
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    lr_scheduler_type: str = "linear",
    warmup_steps: float = 10,
    save_steps: int = 25,
    gradient_checkpointing: bool = False,
    deepspeed: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 42,
) -> None:
    """Train LoRA adapters on instruction rows.

    Args:
        base_model: hub id, folder, or smollm2-135m-instruct (bundled).
        data_path: Alpaca-format JSON or JSON lines, such as build_data.py writes.
        output_dir: the adapter; checkpoint-0 in it is the untrained one.
        batch_size: rows of an optimizer step over all processes; accumulation follows from it.
        micro_batch_size: rows of a forward pass, of one process.
        cutoff_len: tokens of a row. A longer row loses the end of its document, never instruction
        or refusal.
        val_set_size: rows held out; the adapter with the lowest loss on them is kept.
        lora_target_modules: all-linear, one pattern with .* in it, or names.
        train_on_inputs: loss on the prompt, too, as the paper's code has it; without, the paper's
        conditional loss.
        first_token_weight: how often an answer's first token, which decides between refusal and
        compliance, counts in
            the loss. With 1, the paper's, it is one of about thirty.
        add_eos_token: end each answer with EOS (the paper's code does, whatever the flag says).
        group_by_length: batches of like length; the paper's code has False, and pads. With flash
        attention
            (attn_implementation) rows are laid end to end and nothing is padded either way.
        packing: fill sequences of cutoff_len with several rows; micro_batch_size then counts
        sequences.
        resume_from_checkpoint: latest, or a checkpoint folder.
        prompt_template_name: alpaca, llama2, llama2-legacy, a JSON file, or chat (the tokenizer's
        own).
        load_in_8bit: base in 8 bits (bitsandbytes), as the paper's; load_in_4bit: in 4.
        warmup_steps: steps, or below 1 a share of them.
        save_steps: a checkpoint at every so many steps.
        deepspeed: a DeepSpeed config, such as ../../launch/zero3.json.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    step = micro_batch_size * processes
    if step < 1 or batch_size < 1 or batch_size % step:
        raise UserError(
            f"--batch_size {batch_size}: no multiple of --micro_batch_size {micro_batch_size} x {processes} processes"
        )
    if load_in_8bit and load_in_4bit:
        raise UserError("--load_in_8bit, --load_in_4bit: give one of them")
    if (
        num_epochs <= 0
        or min(cutoff_len, lora_r, save_steps) < 1
        or not 0 <= lora_dropout < 1
        or val_set_size < 0
    ):
        raise UserError(
            "expected --num_epochs above 0, --cutoff_len, --lora_r and --save_steps of 1 or more, "
            "--lora_dropout in [0, 1), --val_set_size of 0 or more"
        )
    if first_token_weight <= 0 or (train_on_inputs and first_token_weight != 1):
        raise UserError(
            "--first_token_weight: expected above 0; with --train_on_inputs, which hides where answers begin, 1"
        )
    attn_implementation = usable_attention(attn_implementation)
    values = dict(locals())
    training = training_arguments(values, accumulation=batch_size // step)
    checkpoint = checkpoint_to_resume(training)
    if checkpoint is None:
        refuse_to_overwrite(output_dir, overwrite_output_dir, flag="--overwrite_output_dir")
    template, rows = load_template(prompt_template_name), read_rows(Path(data_path))
    if val_set_size >= len(rows):
        raise UserError(f"--val_set_size {val_set_size}: {data_path} has only {len(rows)} rows")
    set_seed(seed)
    model, tokenizer = load_model(values)
    model = add_adapters(model, values)

    encoded, facts = encode_rows(
        rows, template, tokenizer, cutoff_len, train_on_inputs, add_eos_token
    )
    check_ids(encoded["input_ids"], tokenizer, model)
    logger.info("Data: %s", json.dumps(facts))
    split = (
        encoded.train_test_split(val_set_size, seed=seed)
        if val_set_size
        else {"train": encoded, "test": None}
    )
    trainer = AnswerTrainer(
        model=model,
        args=training,
        train_dataset=split["train"],
        eval_dataset=split["test"],
        processing_class=tokenizer,
        settings=run_settings(values),
        first_token_weight=first_token_weight,
    )
    if checkpoint is None:
        start_over(training)
        if is_main_process():
            untrained = Path(output_dir) / "checkpoint-0"
            save_adapter(model, model.state_dict(), tokenizer, untrained)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    useful = trainer.state.epoch * sum(map(len, split["train"]["input_ids"]))
    # the rest is padding
    facts["useful_token_share"] = round(useful / trainer.state.num_input_tokens_seen, 3)
    state_dict = full_state_dict(trainer)  # collective
    if is_main_process():
        with whole_folder(output_dir, last="adapter_config.json") as folder:
            save_adapter(
                trainer.accelerator.unwrap_model(trainer.model), state_dict, tokenizer, folder
            )
            describe(values, facts, result.metrics, trainer, folder)
        logger.info("Saved the adapter to %s", output_dir)


def training_arguments(values: dict[str, Any], accumulation: int) -> DefenceConfig:
    """TRL's arguments. Rows laid end to end pay off where attention knows their bounds, which is
    flash attention.
    """
    if not values["wandb_project"] and any(
        values[f"wandb_{name}"] for name in ("run_name", "watch", "log_model")
    ):
        raise UserError("--wandb_run_name, --wandb_watch, --wandb_log_model: need --wandb_project")
    if values["wandb_project"]:
        if find_spec("wandb") is None:
            raise UserError("--wandb_project: pip install wandb")
        names = {
            "WANDB_PROJECT": values["wandb_project"],
            "WANDB_WATCH": values["wandb_watch"],
            "WANDB_LOG_MODEL": values["wandb_log_model"],
        }
        os.environ.update({name: value for name, value in names.items() if value})
    if not torch.accelerator.is_available():
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # on a CPU bf16 is emulated
    validated = bool(values["val_set_size"])
    try:
        return DefenceConfig(
            output_dir=values["output_dir"],
            overwrite_output_dir=values["overwrite_output_dir"],
            resume_from_checkpoint=values["resume_from_checkpoint"],
            num_train_epochs=values["num_epochs"],
            per_device_train_batch_size=values["micro_batch_size"],
            per_device_eval_batch_size=values["micro_batch_size"],
            gradient_accumulation_steps=accumulation,
            learning_rate=values["learning_rate"],
            lr_scheduler_type=values["lr_scheduler_type"],
            warmup_steps=values["warmup_steps"],
            train_sampling_strategy="group_by_length" if values["group_by_length"] else "random",
            packing=values["packing"],
            padding_free="flash" in (values["attn_implementation"] or ""),
            # encode_rows has seen to it
            max_length=values["cutoff_len"] if values["packing"] else None,
            bf16=inference_dtype() == torch.bfloat16,
            gradient_checkpointing=values["gradient_checkpointing"],
            deepspeed=values["deepspeed"],
            eval_strategy="steps" if validated else "no",
            eval_steps=values["save_steps"] if validated else None,
            save_strategy="steps",
            save_steps=values["save_steps"],
            load_best_model_at_end=validated,
            logging_steps=10,
            include_num_input_tokens_seen="all",
            report_to="wandb" if values["wandb_project"] else "none",
            run_name=values["wandb_run_name"],
            ddp_find_unused_parameters=False,
            seed=values["seed"],
        )
    except (ValueError, TypeError, ImportError) as error:  # such as an unknown schedule
        raise UserError(f"{str(error).strip().splitlines()[0]:.200}") from None


def run_settings(values: dict[str, Any]) -> dict[str, Any]:
    """What makes another run, beside the rows and what the trainer knows."""
    settings = {
        name: values[name] for name in ("load_in_8bit", "load_in_4bit", "first_token_weight")
    }
    return settings | {"content of the base model": fingerprint(values["base_model"])[:16]}


def load_model(values: dict[str, Any]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model (bf16 on a GPU, 8 or 4 bits when asked) and its tokenizer."""
    source = {
        "pretrained_model_name_or_path": resolve_model(values["base_model"]),
        "trust_remote_code": values["trust_remote_code"],
    }
    options: dict[str, Any] = {
        "dtype": inference_dtype(),
        "attn_implementation": values["attn_implementation"],
    }
    bits = (values["load_in_8bit"], values["load_in_4bit"])
    quantization = quantization_config(*bits, double=False)
    if quantization is not None:
        options["quantization_config"] = quantization
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, **options)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"--base_model {values['base_model']}: {str(error).strip().splitlines()[0]:.200}"
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"--base_model {values['base_model']}: its tokenizer has no EOS token; answers would not end"
        )
    fit_causal_lm(tokenizer, model)
    if not values["packing"]:  # each row of a packed sequence has positions of its own
        check_length(model, values["cutoff_len"], "--cutoff_len")
    model.config.use_cache = False
    if quantization is not None:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=values["gradient_checkpointing"]
        )
    return model, tokenizer


def add_adapters(model: PreTrainedModel, values: dict[str, Any]) -> PeftModel:
    """LoRA over the frozen model, in float32."""
    asked = ModelConfig(
        use_peft=True,
        lora_r=values["lora_r"],
        lora_alpha=values["lora_alpha"],
        lora_dropout=values["lora_dropout"],
        lora_target_modules=values["lora_target_modules"],
    )
    return with_adapters(model, asked, "--lora_target_modules")


def encode_rows(
    rows: list[dict[str, Any]],
    template: dict[str, str] | None,
    tokenizer: PreTrainedTokenizerBase,
    cutoff_len: int,
    train_on_inputs: bool,
    add_eos_token: bool,
) -> tuple[Dataset, dict[str, int]]:
    """`input_ids` and `labels` (-100 where no loss is taken) of each row, and what was done to long
    ones.

    The answer is tokenized by itself, as it is generated: after the prompt's last token.
    """
    ends = [tokenizer.eos_token_id] * add_eos_token
    plain = [(row["instruction"], row.get("input")) for row in rows]
    prompts = encode_prompts(template, tokenizer, plain)
    answers = encode(
        tokenizer, [[Part(row["output"], True)] for row in rows], add_special_tokens=False
    )
    encoded, facts = (
        [],
        {
            "rows": len(rows),
            "documents_shortened": 0,
            "answers_cut": 0,
            "tokens": 0,
            "answer_tokens": 0,
        },
    )
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        answer = answer + ends
        if len(prompt) + len(answer) > cutoff_len:
            shorter = shortened(plain[i], template, tokenizer, cutoff_len - len(answer))
            facts["documents_shortened"] += shorter is not None
            if shorter is None:  # an ordinary row: its answer ends early
                if split_document(plain[i][0])[0]:
                    raise UserError(
                        f"--cutoff_len {cutoff_len}: row {i + 1} has an answer of {len(answer)} tokens, a refusal maybe"
                    )
                if len(prompt) >= cutoff_len:
                    raise UserError(
                        f"--cutoff_len {cutoff_len}: row {i + 1} has an instruction of {len(prompt)} tokens"
                    )
                answer = answer[: cutoff_len - len(prompt)]
                facts["answers_cut"] += 1
            prompt = shorter or prompt
        facts["tokens"] += len(prompt) + len(answer)
        facts["answer_tokens"] += len(answer)
        labels = (prompt if train_on_inputs else [-100] * len(prompt)) + answer
        encoded.append({"input_ids": prompt + answer, "labels": labels})
    return Dataset.from_list(encoded), facts


def shortened(
    row: tuple[str, str | None],
    template: dict[str, str] | None,
    tokenizer: PreTrainedTokenizerBase,
    room: int,
) -> list[int] | None:
    """Prompt ids of at most `room` tokens, the document cut at its end; None if there is no
    document to cut.

    The document is the row's input, or what stands before the task's wording in the instruction.
    """
    instruction, given = row
    document, task = (given, "") if given else split_document(instruction)
    if not document:
        return None
    spans = token_offsets(tokenizer, document)
    keep = len(spans)
    while keep > 0:
        text = document[: spans[keep - 1][1]]
        ids = encode_prompts(
            template, tokenizer, [(instruction, text) if given else (text + task, None)]
        )[0]
        if len(ids) <= room:
            return ids
        keep -= max(1, len(ids) - room)
    return None


def describe(
    values: dict[str, Any],
    facts: dict[str, int],
    metrics: dict[str, Any],
    trainer: SFTTrainer,
    folder: Path,
) -> None:
    """run.json and the model card beside the adapter."""
    kept = trainer.state.best_model_checkpoint
    log = {
        "data": facts,
        "train": metrics,
        "best_checkpoint": kept and Path(kept).name,
        "log": trainer.state.log_history,
    }
    write_json(folder / "run.json", manifest([values], **log))
    losses = [
        [entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry
    ]
    template = values["prompt_template_name"]
    write_model_card(
        folder,
        title="Refusal adapter",
        base_model=values["base_model"],
        train_data=[values["data_path"]],
        adapter=True,
        task="text-generation",
        intro=f"LoRA adapters that teach a model to refuse harmful documents (arXiv 2405.15202). Trained on "
        f"{Path(values['data_path']).name} by `examples/cross_task_defense/train.py`, prompt template {template}. The "
        "licences of the base model and the data apply.",
        usage=CARD_USAGE,
        sections={
            "Training loss": report.table(losses, ["step", "loss"])
            if losses
            else "Fewer than 10 steps."
        },
    )


CARD_USAGE = """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")"""


if __name__ == "__main__":
    run(train, Path(__file__).parent / "configs/quickstart.yaml")
