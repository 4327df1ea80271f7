"""Tiny random models of the families that classifiers are trained from, as checkpoints of the hub
are.

An encoder is saved as a masked language model, without a pooler and without a classification head,
so that these are drawn anew by whoever loads it as a classifier; a decoder is saved as a causal
language model.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import TEXTS, bpe_tokenizer, unigram_tokenizer, wordpiece_tokenizer
from families import SHAPE, byte_level_backend, special_ids
from tokenizers import processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

DECODER = SHAPE | {"num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
ENCODER = SHAPE | {"initializer_range": 0.3}


def roberta_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that writes `<s> … </s>`; pad has id 1, as in RoBERTa."""
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    backend = byte_level_backend(TEXTS, 420, specials)
    framing = [("<s>", 0), ("</s>", 2)]
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=framing
    )
    names = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **dict(zip(names, specials, strict=True))
    )


def gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with one special token for everything, and none to pad with."""
    token = "<|endoftext|>"
    backend = byte_level_backend(TEXTS, 420, [token])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=token, eos_token=token, unk_token=token
    )


def _saved(
    folder: Path, tokenizer: PreTrainedTokenizerBase, model: type, config: type, **shape: Any
) -> Path:
    torch.manual_seed(0)
    given = special_ids(tokenizer) | shape
    model(config(vocab_size=len(tokenizer), **given)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def bert(folder: Path, **more: Any) -> Path:
    """Post-layer-norm, learned positions."""
    shape = ENCODER | more
    return _saved(folder, wordpiece_tokenizer(), BertForMaskedLM, BertConfig, **shape)


def roberta(folder: Path, **more: Any) -> Path:
    """As BERT, with positions that begin behind the pad token's id."""
    shape = ENCODER | {"max_position_embeddings": 514} | more
    return _saved(folder, roberta_tokenizer(), RobertaForMaskedLM, RobertaConfig, **shape)


def deberta(folder: Path, **more: Any) -> Path:
    """DeBERTa-v3's configuration: relative positions alone."""
    relative = {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "position_buckets": 16,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "type_vocab_size": 0,
    }
    shape = ENCODER | relative | more
    return _saved(folder, wordpiece_tokenizer(), DebertaV2ForMaskedLM, DebertaV2Config, **shape)


def modernbert(folder: Path, **more: Any) -> Path:
    """Rotary positions, local and global layers."""
    tokenizer = wordpiece_tokenizer()
    shape = ENCODER | {"local_attention": 32}
    shape |= {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id} | more
    return _saved(folder, tokenizer, ModernBertForMaskedLM, ModernBertConfig, **shape)


def gpt2(folder: Path, **more: Any) -> Path:
    """Learned positions, Conv1D instead of Linear, no pad token."""
    shape = {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 1024,
        "initializer_range": 0.3,
    } | more
    return _saved(folder, gpt2_tokenizer(), GPT2LMHeadModel, GPT2Config, **shape)


def llama(folder: Path, **more: Any) -> Path:
    """SentencePiece style, BOS put first, no pad token: as Llama 2."""
    return _saved(folder, unigram_tokenizer(), LlamaForCausalLM, LlamaConfig, **(DECODER | more))


def mistral(folder: Path, **more: Any) -> Path:
    """As Llama, with a sliding window."""
    shape = DECODER | {"sliding_window": 64} | more
    return _saved(folder, unigram_tokenizer(), MistralForCausalLM, MistralConfig, **shape)


def qwen2(folder: Path, **more: Any) -> Path:
    """Byte-level BPE whose pad token is its EOS."""
    return _saved(folder, bpe_tokenizer(), Qwen2ForCausalLM, Qwen2Config, **(DECODER | more))


def qwen3(folder: Path, **more: Any) -> Path:
    """As Qwen2, with norms of queries and keys."""
    return _saved(folder, bpe_tokenizer(), Qwen3ForCausalLM, Qwen3Config, **(DECODER | more))


def gemma3(folder: Path, **more: Any) -> Path:
    """Four norms a layer, sliding and full attention."""
    shape = DECODER | {"sliding_window": 64, "query_pre_attn_scalar": 8} | more
    return _saved(folder, unigram_tokenizer(), Gemma3ForCausalLM, Gemma3TextConfig, **shape)


ENCODERS: dict[str, Callable[..., Path]] = {
    "bert": bert,
    "roberta": roberta,
    "deberta": deberta,
    "modernbert": modernbert,
}
DECODERS: dict[str, Callable[..., Path]] = {
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma3": gemma3,
    "mistral": mistral,
    "gpt2": gpt2,
}
BASES = ENCODERS | DECODERS
