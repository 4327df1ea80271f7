"""The flags of train.py: those of the paper's script, and ours."""

import os
import sys
from dataclasses import dataclass

import torch
from transformers.hf_argparser import HfArg

from common import metrics
from common.conversation import UserError
from common.data.specs import in_one_name
from common.labels import LabelArguments
from common.obfuscation import check_obfuscations
from common.run import inference_dtype
from common.training import RecipeTrainingArguments
from guards.card import INPUTS


@dataclass(kw_only=True)
class GuardArguments(LabelArguments, metrics.OperatingPoint):
    hf_model_id: str = HfArg(help="Chat model: hub id, folder, or smollm2-135m-instruct (bundled).")
    output_folder: str = HfArg(help="Adapter folders, metrics and checkpoints of the run.")
    epochs: int = 1
    per_device_batch_size: int = 2
    learning_rate: float = 3e-4
    eval_batch_size: int = 50
    seed: int = 0
    gradient_accumulation_steps: int = 1
    lora_r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    no_unsafe_head: bool = HfArg(
        default=False, help="Outputs of categories alone; unsafe is their maximum (paper's v1)."
    )
    no_clf_head_bias: bool = False
    head_only: bool = HfArg(default=False, help="Train the head alone (the paper's ablation).")
    target_modules: list[str] | None = HfArg(
        default=None, help="Names, or one pattern with .*; default: PEFT's for the model (q and v)."
    )
    guard_layers: int | None = HfArg(
        default=None,
        help="The guard reads the base after so many layers; default: all (the paper).",
    )
    guard_inputs: list[str] | None = HfArg(
        default=None,
        help="Several kinds that one guard is trained on, and then serves: pair prompt response; "
        "default: what --judge says.",
    )
    train_data: list[str] = HfArg(
        default_factory=lambda: ["PKU-Alignment/BeaverTails:30k_train"],
        help="Data spec; of several the later ones replace the labels of the same conversations in "
        "those before.",
    )
    eval_data: str | None = HfArg(default=None, help="Data spec of the validation rows.")
    eval_split_ratio: float | None = HfArg(
        default=None, help="Without eval data: share of the train prompts to hold out."
    )
    test_data: str | None = HfArg(default=None, help="Data spec, judged once, with the best epoch.")
    deduplicate: bool = HfArg(
        default=False,
        help="One row a pair, labels by majority vote; near-copies of validation rows are no "
        "training rows.",
    )
    bad_rows: str = HfArg(default="error", help="error | skip (counted and reported)")
    max_train_rows: int | None = None
    augment: list[str] = HfArg(
        default_factory=list,
        help="Add obfuscated copies of the training rows: homoglyph leetspeak spaces zero_width "
        "base64",
    )
    max_length: int = 512
    head_fit_rows: int = HfArg(
        default=0, help="Fit the head on the frozen base with so many rows first; the paper has 0."
    )
    lr_scheduler_type: str = HfArg(default="constant", help="The reference's rate is constant.")
    warmup_steps: float = 0.0
    max_grad_norm: float = HfArg(default=0.0, help="0: no clipping, as in the reference.")
    logging_steps: int = 10
    attn_implementation: str | None = None
    trust_remote_code: bool = HfArg(default=False, help="Run code that comes with the model.")
    resume_from_checkpoint: str | None = HfArg(default=None, help="latest, or a checkpoint folder")
    overwrite_output_dir: bool = HfArg(default=False, help="Replace an earlier run.")
    report_to: str = HfArg(default="none", help="none | tensorboard | wandb | trackio")
    push_to_hub: bool = HfArg(default=False, help="Push the best epoch's folder once, at the end.")
    hub_model_id: str | None = HfArg(default=None, help="Default: the output folder's name.")
    hub_private_repo: bool = HfArg(default=True, help="Private; false: everyone sees it.")
    hub_overwrite: bool = HfArg(
        default=False, help="Push into a repository that holds what no recipe has pushed."
    )

    def validation_name(self) -> str | None:
        """What the validation rows are, in words; None where there are none."""
        if self.eval_data is not None:
            return self.eval_data
        if self.eval_split_ratio is not None:
            return f"{self.eval_split_ratio} of {in_one_name(self.train_data)}"
        return None


def name_positionals() -> None:
    """The paper's two positional arguments, hf_model_id and output_folder, as flags."""
    words = []
    for word in sys.argv[1:]:
        if word.startswith("-"):
            break
        words.append(word)
    if len(words) not in (0, 2):
        wanted = "expected two positional arguments, hf_model_id and output_folder"
        raise UserError(f"{wanted}; found {words}")
    if words:
        model, folder = words
        sys.argv[1:3] = ["--hf_model_id", model, "--output_folder", folder]


def check_arguments(args: GuardArguments) -> None:
    """Settle what the guard is trained on. Raises UserError for what the parser lets pass."""
    args.check_labels()
    if args.guard_inputs is None:
        args.guard_inputs = [args.judge]
    if set(args.guard_inputs) - set(INPUTS) or not args.guard_inputs:
        given = " ".join(args.guard_inputs)
        known = ", ".join(INPUTS)
        raise UserError(f"--guard-inputs {given}: expected some of {known}")
    if args.judge != "pair" and args.guard_inputs != [args.judge]:
        raise UserError(f"--judge {args.judge} and --guard-inputs: give one of them")
    if args.eval_data is not None and args.eval_split_ratio is not None:
        raise UserError("--eval-data and --eval-split-ratio: give one of them")
    args.check_operating_point()
    check_obfuscations(args.augment, "--augment")
    if args.epochs < 1:
        raise UserError(f"--epochs {args.epochs}: must be 1 or more")
    if not 0 <= args.lora_dropout < 1:
        raise UserError(f"--lora-dropout {args.lora_dropout}: must lie in [0, 1)")
    if args.head_fit_rows < 0:
        raise UserError(f"--head-fit-rows {args.head_fit_rows}: must be 0 (off) or more")


def training_arguments(args: GuardArguments) -> RecipeTrainingArguments:
    """The Trainer's arguments. `accelerate launch --mixed-precision` is heard where there is a GPU."""
    validation = args.validation_name()
    selects = validation is not None and not metrics.is_test(args.eval_data or "")
    if not torch.accelerator.is_available():
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # on a CPU bf16 is emulated
    try:
        return RecipeTrainingArguments(
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
            eval_strategy="no" if validation is None else "epoch",
            save_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=selects,
            metric_for_best_model="binarized_auprc" if selects else None,
            greater_is_better=True if selects else None,
            logging_nan_inf_filter=False,  # a loss that is no number must be seen
            ddp_find_unused_parameters=False,
            logging_steps=args.logging_steps,
            report_to=args.report_to,
            push_to_hub=args.push_to_hub,
            hub_model_id=args.hub_model_id,
            hub_private_repo=args.hub_private_repo,
            hub_overwrite=args.hub_overwrite,
            seed=args.seed,
        )
    except (ValueError, TypeError) as error:  # such as an unknown schedule
        raise UserError(str(error)) from None
