"""The flags of train.py, and TRL's arguments that follow from them."""

import os
from dataclasses import dataclass

import torch
from trl import SFTConfig

from common.conversation import UserError, one_line
from common.run import inference_dtype, usable_attention
from common.training import RecipeTrainingArguments


@dataclass(kw_only=True)
class TrainArguments:
    """Train LoRA adapters on instruction rows.

    Args:
        base_model: hub id, folder, or smollm2-135m-instruct (bundled).
        data_path: a file in Alpaca's format, such as build_data.py writes, or a hub id.
        output_dir: the adapter; checkpoint-0 in it is the untrained one.
        batch_size: rows of an optimizer step over all processes; accumulation follows from it.
        micro_batch_size: rows of a forward pass, of one process.
        cutoff_len: tokens of a row. A longer row loses the end of its document, never instruction
            or refusal.
        val_set_size: rows held out; the adapter with the lowest loss on them is kept.
        lora_target_modules: all-linear, one pattern with .* in it, or names; default: q_proj and
            v_proj.
        train_on_inputs: loss on the prompt, too, as the paper's code has it; without, the paper's
            conditional loss.
        first_token_weight: how often an answer's first token, which decides between refusal and
            compliance, counts in the loss. With 1, the paper's, it is one of about thirty.
        add_eos_token: end each answer with EOS (the paper's code does, whatever the flag says).
        group_by_length: batches of like length; the paper's code has False, and pads. With flash
            attention (attn_implementation) rows are laid end to end and nothing is padded either
            way.
        packing: fill sequences of cutoff_len with several rows; micro_batch_size then counts
            sequences.
        resume_from_checkpoint: latest, or a checkpoint folder.
        prompt_template_name: alpaca, llama2, llama2-legacy, a JSON file, or chat (the tokenizer's
            own).
        load_in_8bit: base in 8 bits (bitsandbytes), as the paper's; load_in_4bit: in 4.
        warmup_steps: steps, or below 1 a share of them.
        save_steps: a checkpoint at every so many steps.
        deepspeed: a DeepSpeed config, such as ../../launch/zero3.json.
        report_to: none, tensorboard, wandb or trackio; wandb_project means wandb.
        push_to_hub: push the finished adapter once; hub_model_id: the output folder's name if it
            is not given; hub_private_repo: False shows it to everyone; hub_overwrite: True pushes into
            a repository that holds other work, too.
    """

    base_model: str
    data_path: str = "yahma/alpaca-cleaned"
    output_dir: str = "output/lora-alpaca"
    batch_size: int = 128
    micro_batch_size: int = 4
    num_epochs: float = 3
    learning_rate: float = 3e-4
    cutoff_len: int = 1024
    val_set_size: int = 0
    lora_r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_target_modules: list[str] | None = None
    train_on_inputs: bool = False
    first_token_weight: float = 1.0
    add_eos_token: bool = True
    group_by_length: bool = True
    packing: bool = False
    wandb_project: str | None = None
    wandb_run_name: str | None = None
    wandb_watch: str | None = None
    wandb_log_model: str | None = None
    resume_from_checkpoint: str | None = None
    overwrite_output_dir: bool = False
    prompt_template_name: str = "alpaca"
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 10
    save_steps: int = 25
    gradient_checkpointing: bool = False
    deepspeed: str | None = None
    report_to: str = "none"
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool = True
    hub_overwrite: bool = False
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    seed: int = 42

    def __post_init__(self):
        if self.lora_target_modules is None:
            self.lora_target_modules = ["q_proj", "v_proj"]


@dataclass
class DefenceConfig(RecipeTrainingArguments, SFTConfig):
    """TRL's arguments with what this collection adds to transformers' (CPU, dead flags)."""


def check(args: TrainArguments) -> None:
    """Say what is wrong with the arguments, before any work."""
    if args.load_in_8bit and args.load_in_4bit:
        raise UserError("--load_in_8bit, --load_in_4bit: give one of them")
    counts = (args.cutoff_len, args.lora_r, args.save_steps)
    share = 0 <= args.lora_dropout < 1
    if args.num_epochs <= 0 or min(counts) < 1 or not share or args.val_set_size < 0:
        raise UserError(
            "expected --num_epochs above 0, --cutoff_len, --lora_r and --save_steps of 1 or more, "
            "--lora_dropout in [0, 1), --val_set_size of 0 or more"
        )
    hidden = args.train_on_inputs and args.first_token_weight != 1
    if args.first_token_weight <= 0 or hidden:
        raise UserError(
            "--first_token_weight: expected above 0; with --train_on_inputs, which hides where "
            "answers begin, 1"
        )
    args.attn_implementation = usable_attention(args.attn_implementation)


def accumulation(args: TrainArguments) -> int:
    """Batches of a process that are accumulated for one step.

    Raises:
        UserError: the rows of a step are no multiple of those of a pass.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    rows = args.micro_batch_size * processes
    if rows < 1 or args.batch_size < 1 or args.batch_size % rows:
        raise UserError(
            f"--batch_size {args.batch_size}: no multiple of "
            f"--micro_batch_size {args.micro_batch_size} x {processes} processes"
        )
    return args.batch_size // rows


def training_arguments(args: TrainArguments, accumulated: int) -> DefenceConfig:
    """TRL's arguments. Rows laid end to end pay off where attention knows their bounds, which is
    flash attention.
    """
    use_wandb(args)
    if not torch.accelerator.is_available():
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # on a CPU bf16 is emulated
    validated = bool(args.val_set_size)
    try:
        return DefenceConfig(
            output_dir=args.output_dir,
            overwrite_output_dir=args.overwrite_output_dir,
            resume_from_checkpoint=args.resume_from_checkpoint,
            num_train_epochs=args.num_epochs,
            per_device_train_batch_size=args.micro_batch_size,
            per_device_eval_batch_size=args.micro_batch_size,
            gradient_accumulation_steps=accumulated,
            learning_rate=args.learning_rate,
            lr_scheduler_type=args.lr_scheduler_type,
            warmup_steps=args.warmup_steps,
            train_sampling_strategy="group_by_length" if args.group_by_length else "random",
            packing=args.packing,
            padding_free="flash" in (args.attn_implementation or ""),
            max_length=args.cutoff_len if args.packing else None,  # encode_rows has seen to it
            bf16=inference_dtype() == torch.bfloat16,
            gradient_checkpointing=args.gradient_checkpointing,
            deepspeed=args.deepspeed,
            eval_strategy="steps" if validated else "no",
            eval_steps=args.save_steps if validated else None,
            save_strategy="steps",
            save_steps=args.save_steps,
            load_best_model_at_end=validated,
            logging_steps=10,
            include_num_input_tokens_seen="all",
            report_to="wandb" if args.wandb_project else args.report_to,
            push_to_hub=args.push_to_hub,
            hub_model_id=args.hub_model_id,
            hub_private_repo=args.hub_private_repo,
            hub_overwrite=args.hub_overwrite,
            run_name=args.wandb_run_name,
            ddp_find_unused_parameters=False,
            seed=args.seed,
        )
    except (ValueError, TypeError, ImportError) as error:  # such as an unknown schedule
        raise UserError(one_line(error)) from None


def use_wandb(args: TrainArguments) -> None:
    """Hand the flags of Weights & Biases on, which it reads from the environment."""
    if not args.wandb_project:
        if args.wandb_run_name or args.wandb_watch or args.wandb_log_model:
            raise UserError(
                "--wandb_run_name, --wandb_watch, --wandb_log_model: need --wandb_project"
            )
        return
    names = {
        "WANDB_PROJECT": args.wandb_project,
        "WANDB_WATCH": args.wandb_watch,
        "WANDB_LOG_MODEL": args.wandb_log_model,
    }
    for name, value in names.items():
        if value:
            os.environ[name] = value
