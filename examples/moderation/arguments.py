"""The flags of train.py, beside those of transformers' TrainingArguments."""

import logging
from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from common import metrics
from common.conversation import UserError
from common.data.specs import in_one_name
from common.labels import LabelArguments
from common.obfuscation import check_obfuscations
from common.training import RecipeTrainingArguments

logger = logging.getLogger("moderation")


@dataclass
class ModelArguments:
    model_name_or_path: str = HfArg(
        help="Hub id, folder, or smollm2-135m-instruct or all-minilm-l6-v2 (bundled)."
    )
    max_length: int = HfArg(
        default=512, help="Longer pairs are cut at the end of the answer; EOS stays."
    )
    num_hidden_layers: int | None = HfArg(
        default=None, help="Keep only the first so many layers of the base."
    )
    attn_implementation: str | None = HfArg(default=None, help="sdpa | flash_attention_2 | eager")
    trust_remote_code: bool = HfArg(default=False, help="Run code that comes with the model.")
    use_peft: bool = HfArg(
        default=False, help="LoRA; the head is trained and saved, the guard folder is merged."
    )
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: list[str] = HfArg(
        default_factory=lambda: ["all-linear"], help="all-linear | one pattern with .* | names"
    )


@dataclass(kw_only=True)
class DataArguments(LabelArguments, metrics.OperatingPoint):
    train_data_name_or_path: list[str] = HfArg(
        help="Data spec, e.g. PKU-Alignment/BeaverTails:330k_train or rows.jsonl; of several the "
        "later ones replace the labels of the same conversations in those before."
    )
    eval_data_name_or_path: str | None = HfArg(
        default=None, help="Data spec of the validation rows."
    )
    eval_split_ratio: float | None = HfArg(
        default=None, help="Without eval data: share of the train prompts to hold out."
    )
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
    positive_weight: float = HfArg(
        default=1.0, help="Weight of positive labels in the loss; the paper has 1."
    )
    flagged_loss: float = HfArg(
        default=0.0, help="Weight of an extra loss on 'any category'; the paper has 0."
    )
    head_fit_rows: int = HfArg(
        default=0, help="Fit the head on the frozen base with so many rows first; the paper has 0."
    )

    def validation_name(self) -> str | None:
        """What the validation rows are, in words; None where there are none."""
        if self.eval_data_name_or_path is not None:
            return self.eval_data_name_or_path
        if self.eval_split_ratio is not None:
            return f"{self.eval_split_ratio} of {in_one_name(self.train_data_name_or_path)}"
        return None


def check_arguments(data_args: DataArguments, args: RecipeTrainingArguments) -> None:
    """Settle how a checkpoint is chosen: the one with the best flagged AUPRC, where there are
    validation rows that it may be chosen on.

    Raises:
        UserError: two arguments do not go together.
    """
    data_args.check_labels()
    data_args.check_operating_point()
    check_obfuscations(data_args.augment, "--augment")
    if data_args.head_fit_rows < 0:
        raise UserError(f"--head_fit_rows {data_args.head_fit_rows}: must be 0 (off) or more")
    if data_args.head_fit_rows and (args.fsdp or args.deepspeed):
        said = "needs the whole model in every process; leave out --fsdp and --deepspeed"
        raise UserError(f"--head_fit_rows {said}")
    validation = data_args.validation_name()
    if validation is None:
        args.eval_strategy = "no"  # the original evaluated without data, and failed after training
    if args.eval_strategy == "no":
        return
    saved_elsewhere = args.save_strategy != args.eval_strategy or (
        args.save_strategy == "steps" and args.save_steps % args.eval_steps
    )
    if metrics.is_test(validation):
        said = "%s is a test split: no checkpoint is selected and no threshold fitted on it."
        logger.info(said, validation)
    elif saved_elsewhere:
        logger.info("Checkpoints are not saved where they are evaluated: the last one is kept.")
    else:
        args.load_best_model_at_end = True
        args.metric_for_best_model = "eval_flagged/auprc"
        args.greater_is_better = True
