"""The base model, its tokenizer with the ExpGuard prompt for chat template, and LoRA adapters."""

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from arguments import ExpGuardConfig, ModelArguments
from peft import PeftModel, prepare_model_for_kbit_training
from rows import chat_template
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig

from common.bundled import resolve_model
from common.conversation import UserError
from common.engines import quantization_config
from common.run import inference_dtype
from common.training import with_adapters


def source(model_args: ModelArguments, args: ExpGuardConfig) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": resolve_model(model_args.model_name_or_path),
        "trust_remote_code": args.trust_remote_code,
        "cache_dir": model_args.cache_dir,
        "local_files_only": model_args.local_files_only,
    }


def load_tokenizer(model_args: ModelArguments, args: ExpGuardConfig) -> PreTrainedTokenizerBase:
    """The base's tokenizer, its chat template replaced by the ExpGuard prompt."""
    try:
        config = AutoConfig.from_pretrained(**source(model_args, args))
        tokenizer = AutoTokenizer.from_pretrained(**source(model_args, args))
    except (OSError, ValueError, KeyError) as error:
        raise _not_loaded(model_args, error) from None
    family = re.match("[a-z]*", (model_args.model_type or "").lower())[0]
    if not config.model_type.startswith(family):
        raise UserError(
            f"--model_type {model_args.model_type}: {model_args.model_name_or_path} is a {config.model_type}"
        )
    tokenizer.chat_template = chat_template()
    return tokenizer


def load_model(model_args: ModelArguments, args: ExpGuardConfig) -> PreTrainedModel:
    """The base: float32 where it is trained (the trainer casts on the fly), bf16 or quantized under
    LoRA.

    FSDP wants one dtype for frozen and trained weights, so there it is float32 in any case.
    """
    frozen = model_args.use_peft_lora and not args.fsdp
    options: dict[str, Any] = {"dtype": inference_dtype() if frozen else torch.float32}
    quantization = None
    if frozen:
        bits = (model_args.use_8bit_quantization, model_args.use_4bit_quantization)
        quantization = quantization_config(*bits)
    if quantization is not None:
        options["quantization_config"] = quantization
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **source(model_args, args),
            attn_implementation=model_args.attn_implementation,
            **options,
        )
    except (OSError, ValueError, ImportError) as error:
        raise _not_loaded(model_args, error) from None
    if quantization is not None:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=args.gradient_checkpointing
        )
    return model


def _not_loaded(model_args: ModelArguments, error: Exception) -> UserError:
    return UserError(
        f"--model_name_or_path {model_args.model_name_or_path}: {f'{error}'.strip().splitlines()[0]:.200}"
    )


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


@torch.inference_mode()
def verdict_scores(
    model: PreTrainedModel, sequences: Iterable[dict[str, list[int]]], words: tuple[int, int]
) -> list[dict[str, float]]:
    """P(unsafe) at each label of each sequence, by the names of `named_scores`.

    Args:
        sequences: of `Encoder.verdict_sequences`.
        words: the tokens at which safe and unsafe part.
    """
    safe, unsafe = words
    scores = []
    for row in sequences:
        places = [i for i, label in enumerate(row["labels"]) if label != -100]
        logits = (
            model(input_ids=torch.tensor([row["input_ids"]], device=model.device)).logits[0].float()
        )
        before = torch.tensor(places, device=logits.device) - 1
        probabilities = (logits[before, unsafe] - logits[before, safe]).sigmoid()
        scores.append(named_scores(probabilities.tolist()))
    return scores


def named_scores(verdicts: Iterable[float]) -> dict[str, float]:
    """The verdicts of a sequence by their lines; nan is none."""
    lines = zip(("first verdict", "second verdict"), verdicts, strict=False)
    return {line: verdict for line, verdict in lines if not math.isnan(verdict)}
