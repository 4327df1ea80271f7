"""The flags of train.py: those of the paper's script, of TrainingArguments and TRL, and ours."""

import logging
import os
from dataclasses import dataclass, fields
from importlib.util import find_spec

from transformers.hf_argparser import HfArg
from trl import SFTConfig

from common.conversation import UserError
from common.metrics import OperatingPoint
from common.run import usable_attention
from common.training import RecipeTrainingArguments

logger = logging.getLogger("expguard")


@dataclass
class ModelArguments:
    model_name_or_path: str = HfArg(
        default="Qwen/Qwen2.5-7B", help="Hub id, folder, or smollm2-135m-instruct (bundled)."
    )
    model_type: str | None = HfArg(
        default=None,
        help="Family of the model (qwen2.5-7b), checked; the prompt is the same for all.",
    )
    cache_dir: str | None = HfArg(default=None, help="Where models from the hub are kept.")
    local_files_only: bool = HfArg(default=False, help="Load models without asking the hub.")
    attn_implementation: str | None = HfArg(
        default=None,
        help="sdpa | eager | flash_attention_2 (rows then lie end to end, without padding)",
    )
    use_peft_lora: bool = HfArg(
        default=False, help="LoRA: the adapter, and the guard merged with it."
    )
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_target_modules: list[str] = HfArg(
        default_factory=lambda: ["all-linear"], help="all-linear | one pattern with .* | names"
    )
    use_4bit_quantization: bool = HfArg(
        default=False, help="Frozen base in 4 bits (nf4), for LoRA."
    )
    use_8bit_quantization: bool = HfArg(default=False, help="Frozen base in 8 bits, for LoRA.")


@dataclass(kw_only=True)
class DataArguments(OperatingPoint):
    dataset_name: list[str] = HfArg(
        default_factory=lambda: ["expguardmix"],
        help="expguardmix, folders with train.jsonl, files, data specs; several are put together.",
    )
    data_dir: str = HfArg(default="data", help="Where a folder expguardmix is looked for.")
    val_data: str | None = HfArg(
        default=None,
        help="With --do_eval: validation rows; default: val.jsonl of the folder, or a split.",
    )
    val_split_ratio: float = HfArg(
        default=0.05, help="Share that is held out when there is no other."
    )
    overlap_with: list[str] = HfArg(
        default_factory=list,
        help="Evaluation sets (benchmark, benchmark@file, data spec) to compare with.",
    )
    categories: list[str] | None = HfArg(
        default=None,
        help="Own categories in the prompt's policy: names, or one YAML file "
        "(name: description); default: the paper's 13.",
    )
    bad_rows: str = HfArg(default="error", help="error | skip (counted)")


PAPER_NAMES = {  # flags of the paper's script: what they are called in TrainingArguments
    "epochs": "num_train_epochs",
    "max_seq_len": "max_length",
    "use_gradient_checkpointing": "gradient_checkpointing",
    "num_workers": "dataloader_num_workers",
    "deterministic": "full_determinism",
}


@dataclass
class ExpGuardConfig(RecipeTrainingArguments, SFTConfig):
    """TRL's arguments with the paper's values for defaults and the names of the paper's script
    beside their own.
    """

    output_dir: str = "output/expguard"
    do_train: bool = HfArg(default=True, help="false: only judge the validation rows.")
    do_eval: bool = HfArg(default=False, help="Validate, select the epoch and fit thresholds.")
    do_test: bool = HfArg(
        default=False, help="Said to be evaluate.py's work; training sees no test rows."
    )
    stop_after_epoch: int | None = HfArg(
        default=None, help="Stop so early in a schedule of --epochs; the released model: 2 of 3."
    )
    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 2
    max_length: int | None = HfArg(
        default=4096,
        help="Tokens of a row. A longer one loses the end of its response, then prompt.",
    )
    share_prefix: bool = HfArg(
        default=False,
        help="Compute what rows of a batch begin with once: for short rows, with sdpa.",
    )
    learning_rate: float = 5e-6
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03
    logging_steps: float = 0.1
    save_strategy: str = "epoch"
    ddp_find_unused_parameters: bool | None = False
    include_num_input_tokens_seen: str = "all"
    wandb_mode: str = HfArg(default="disabled", help="disabled | online | offline")
    disable_checkpointing: bool = HfArg(default=False, help="The same as --save_strategy no.")
    epochs: float | None = HfArg(default=None, help="The same as --num_train_epochs.")
    max_seq_len: int | None = HfArg(default=None, help="The same as --max_length.")
    use_gradient_checkpointing: bool = HfArg(
        default=False, help="The same as --gradient_checkpointing."
    )
    num_workers: int | None = HfArg(default=None, help="The same as --dataloader_num_workers.")
    deterministic: bool = HfArg(default=False, help="The same as --full_determinism.")

    def __post_init__(self):
        for name, modern in PAPER_NAMES.items():
            value = getattr(self, name)
            if value is not None and value is not False:
                self._refuse_both(name, modern)
                setattr(self, modern, value)
        if self.disable_checkpointing:
            self.save_strategy = "no"
        if self.do_eval and self.do_train and self.save_strategy != "no":
            self.eval_strategy, self.eval_steps = self.save_strategy, self.save_steps
            self.load_best_model_at_end, self.metric_for_best_model, self.greater_is_better = (
                True,
                "f1",
                True,
            )
        self.eval_packing = False
        if self.wandb_mode != "disabled":
            os.environ["WANDB_MODE"], self.report_to = self.wandb_mode, "wandb"
        if self.max_length is None or self.max_length < 1 or (self.stop_after_epoch or 1) < 1:
            raise UserError("--max_seq_len, --stop_after_epoch: expected 1 or more")
        super().__post_init__()

    def _refuse_both(self, name: str, modern: str) -> None:
        """One of two names for a thing would win unseen, such as that of the config over a flag."""
        value, other = getattr(self, name), getattr(self, modern)
        default = next(f.default for f in fields(self) if f.name == modern)
        if other not in (default, value):
            raise UserError(
                f"--{name} {value}, --{modern} {other}: two names for one thing; give one of them"
            )


def check(model_args: ModelArguments, args: ExpGuardConfig) -> None:
    """What is wrong with the arguments, before any work."""
    quantized = model_args.use_4bit_quantization, model_args.use_8bit_quantization
    if all(quantized) or (any(quantized) and not model_args.use_peft_lora):
        raise UserError(
            "--use_4bit_quantization, --use_8bit_quantization: give one of them, with --use_peft_lora"
        )
    if any(quantized) and find_spec("bitsandbytes") is None:
        raise UserError(
            '--use_4bit_quantization, --use_8bit_quantization: pip install -e ".[quantization]"'
        )
    if any(quantized) and args.fsdp:
        raise UserError(
            '--use_4bit_quantization, --use_8bit_quantization: not split by FSDP; add --fsdp ""'
        )
    if not args.do_train and not args.do_eval:
        raise UserError("neither --do_train nor --do_eval: nothing to do")
    if args.do_test:
        logger.info("--do_test: test sets are judged by evaluate.py; training looks at none.")
    model_args.attn_implementation = usable_attention(model_args.attn_implementation)
