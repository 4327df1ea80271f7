"""The base model, its tokenizer with the ExpGuard prompt for chat template, LoRA adapters, and the
trainer that reads verdicts.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from arguments import DataArguments, ExpGuardConfig, ModelArguments
from peft import PeftModel, prepare_model_for_kbit_training
from rows import Encoder, chat_template, policy_of
from torch.utils.data import SequentialSampler
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from common.bundled import resolve_model
from common.conversation import UserError
from common.engines import quantization_config
from common.prefix import shared_prefix_collator
from common.run import inference_dtype, loading_model
from common.saving import merged_model, save_adapter, save_model
from common.training import AnswerTrainer, read_answers, with_adapters

# --- Loading ------------------------------------------------------------------------------------


def source(model_args: ModelArguments, args: ExpGuardConfig) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": resolve_model(model_args.model_name_or_path),
        "trust_remote_code": args.trust_remote_code,
        "cache_dir": model_args.cache_dir,
        "local_files_only": model_args.local_files_only,
    }


def load_encoder(
    model_args: ModelArguments, data_args: DataArguments, args: ExpGuardConfig
) -> Encoder:
    """The encoder of rows, with the base's tokenizer, whose chat template becomes the ExpGuard
    prompt.
    """
    tokenizer = load_tokenizer(model_args, args)
    policy = policy_of(data_args.categories, tokenizer)
    tokenizer.chat_template = chat_template(policy)
    return Encoder(tokenizer, args.max_length, policy)


def load_tokenizer(model_args: ModelArguments, args: ExpGuardConfig) -> PreTrainedTokenizerBase:
    """The base's tokenizer as it is."""
    with loading_model(model_args.model_name_or_path, flag="--model_name_or_path"):
        config = AutoConfig.from_pretrained(**source(model_args, args))
        tokenizer = AutoTokenizer.from_pretrained(**source(model_args, args))
    family = re.match("[a-z]*", (model_args.model_type or "").lower())[0]
    if not config.model_type.startswith(family):
        raise UserError(
            f"--model_type {model_args.model_type}: {model_args.model_name_or_path} "
            f"is a {config.model_type}"
        )
    return tokenizer


def load_model(model_args: ModelArguments, args: ExpGuardConfig) -> PreTrainedModel:
    """The base: float32 where it is trained (the trainer casts on the fly), bf16 or quantized under
    LoRA.

    Under FSDP it is float32 in any case: a base in bf16 has not been tried there.
    """
    dtype = torch.float32
    quantization = None
    if model_args.use_peft_lora and not args.fsdp:
        dtype = inference_dtype()
        quantization = quantization_config(
            model_args.use_8bit_quantization, model_args.use_4bit_quantization
        )
    with loading_model(model_args.model_name_or_path, flag="--model_name_or_path"):
        model = AutoModelForCausalLM.from_pretrained(
            **source(model_args, args),
            attn_implementation=model_args.attn_implementation,
            dtype=dtype,
            quantization_config=quantization,
        )
    if quantization is not None:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=args.gradient_checkpointing
        )
    return model


def add_adapters(model: PreTrainedModel, args: ModelArguments) -> PeftModel:
    """LoRA over the frozen model, in float32."""
    asked = ModelConfig(
        use_peft=True,
        lora_r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        lora_target_modules=args.lora_target_modules,
    )
    return with_adapters(model, asked, "--lora_target_modules")


# --- Verdicts -----------------------------------------------------------------------------------


def read_verdicts(
    model: torch.nn.Module, batch: Mapping[str, torch.Tensor], words: tuple[int, int]
) -> torch.Tensor:
    """P(unsafe) of both lines of each sequence, of shape (sequences, 2); nan where there is no
    second.

    Args:
        batch: sequences of `Encoder.verdict_set`, padded or as a tree (`common.prefix`).
        words: the tokens at which safe and unsafe part.
    """
    outputs, labels, _ = read_answers(model, batch)
    row, column = (labels != -100).nonzero(as_tuple=True)
    logits = outputs.logits[row, column].float()
    owner = batch.get("owner", row)  # the sequence of each verdict
    # how many verdicts of its sequence are before it
    line = (owner[:, None] == owner).tril(-1).sum(1)
    safe, unsafe = words
    scores = torch.full((int(owner.max()) + 1, 2), torch.nan, device=logits.device)
    scores[owner, line] = (logits[:, unsafe] - logits[:, safe]).sigmoid()
    return scores


@torch.inference_mode()
def verdict_scores(
    model: PreTrainedModel, sequences: Iterable[dict[str, list[int]]], words: tuple[int, int]
) -> list[dict[str, float]]:
    """`read_verdicts` of one sequence after the other, as `named_scores`."""
    scores = []
    for row in sequences:
        names = ("input_ids", "labels")
        batch = {name: torch.tensor([row[name]], device=model.device) for name in names}
        scores.append(named_scores(read_verdicts(model, batch, words)[0].tolist()))
    return scores


def named_scores(verdicts: Iterable[float]) -> dict[str, float]:
    """The verdicts of a sequence by their lines; nan is none."""
    first, second = verdicts
    if math.isnan(second):
        return {"first verdict": first}
    return {"first verdict": first, "second verdict": second}


class GuardTrainer(AnswerTrainer):
    """A trainer that also validates where a verdict is read and nowhere else.

    `words` are the token ids of safe and unsafe.
    """

    words = (0, 0)

    def set_initial_training_values(self, args, dataloader):
        """The schedule is that of all epochs, the loop that of the first `--stop_after_epoch`."""
        epochs, *rest = super().set_initial_training_values(args, dataloader)
        return min(epochs, args.stop_after_epoch or epochs), *rest

    def get_eval_dataloader(self, eval_dataset=None):
        """Packing and padding-free are for training: here a sequence is a row, or rows share what
        they begin with.
        """
        training = self.data_collator
        if training is not shared_prefix_collator:
            self.data_collator = DataCollatorForLanguageModeling(training.pad_token_id)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training

    # predict() is for the saver, which compares what is read here
    get_test_dataloader = get_eval_dataloader

    def _get_eval_sampler(self, eval_dataset):
        """In order, because a sequence finds its row by its place; the stock one groups lengths."""
        return SequentialSampler(eval_dataset)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Verdicts are read in place of logits, which would be kept of the whole vocabulary."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            scores = read_verdicts(model, inputs, self.words)
        return None, scores, scores


# --- Saving -------------------------------------------------------------------------------------


def write_weights(trainer: GuardTrainer, state_dict: dict[str, torch.Tensor], folder: Path) -> None:
    """A stock model folder with its tokenizer; after LoRA the merged model, and the PEFT adapter in
    adapter/.
    """
    tokenizer = trainer.processing_class
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, PeftModel):
        save_adapter(model, state_dict, tokenizer, folder / "adapter")
        model = merged_model(model, state_dict)
        state_dict = model.state_dict()
    model.config.use_cache = True
    save_model(model, state_dict, tokenizer, folder)
