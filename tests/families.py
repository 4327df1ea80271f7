"""Tiny guards of every family: tokenizers with the families' special tokens and chat templates,
random models.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

SHAPE = {  # of every tiny model, in these tests
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
WORDS = ["safe", "unsafe", "Safe", "Unsafe", "Controversial", "yes", "no", "Yes", "No", "n/a"]
WORDS += ["0", "1", "harmful", "unharmful", "Task", "policy", "assessment"]
TEXTS = [
    *(f"{word} {word}: {word}\n{word}" for word in WORDS for _ in range(20)),
    "Check if there is unsafe content in the conversation. How do I keep my bicycle from being stolen? Use two locks.",
    "Human user: AI assistant: Harmful request: Response refusal: Harmful response: Safety Assessment: User Agent",
    'BEGIN CONVERSATION END CONVERSATION {"User Safety": "", "Response Safety": ""} <score> [RESULT]:',
]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """What a model's configuration has to know of its tokenizer."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(tokenizer, name) for name in names}


def byte_level_backend(
    texts: Sequence[str], vocab_size: int, specials: Sequence[str] = ()
) -> Tokenizer:
    """BPE over bytes, as GPT-2's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def sentencepiece(
    learned: Sequence[tuple[str, float]],
    normalizer: normalizers.Normalizer,
    bos: str = "<s>",
    eos: str = "</s>",
) -> PreTrainedTokenizerFast:
    """SentencePiece style: Unigram with EOS among its pieces, dummy prefix, byte fallback, BOS put
    first; no pad.
    """
    single_bytes = [(f"<0x{i:02X}>", -20.0) for i in range(256)]
    pieces = [("<unk>", 0.0), (bos, 0.0), (eos, 0.0), *single_bytes, *learned]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    blanks = decoders.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), blanks])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token=bos, eos_token=eos
    )


def add_specials(tokenizer: PreTrainedTokenizerFast, specials: Sequence[str]) -> None:
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in specials])


def byte_level(specials: Sequence[str], **roles: str) -> PreTrainedTokenizerFast:
    """As of Llama 3, Qwen, Granite and gpt-oss."""
    backend = byte_level_backend(TEXTS, 480)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **roles)
    add_specials(tokenizer, specials)
    return tokenizer


def pieces(
    specials: Sequence[str], bos: str, eos: str, known: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """As of Llama 2, Mistral and Gemma. A word that is in `known` is one token; most others are as
    many as they have letters.
    """
    learned = [(f"▁{word}", -6.0) for word in WORDS]
    learned += [(word, -7.0) for word in WORDS]
    learned.append(("▁", -4.0))
    learned += [(f"▁{word}", -6.0) for word in sorted(set(known) - set(WORDS))]
    letters = sorted(set("".join(TEXTS)) - set(" \n"))
    learned += [(letter, -5.0) for letter in letters if letter not in dict(learned)]
    tokenizer = sentencepiece(learned, normalizers.Sequence([]), bos, eos)
    add_specials(tokenizer, specials)
    return tokenizer


TURNS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n\n{% endfor %}"
TASK = (
    "Task: Check if there is unsafe content in '{{ messages[-1]['role'] }}' messages. policy policy policy\n\n"
    + TURNS
)
# They begin as the families' own do: Llama Guard's brings no BOS, and its successors' spell it.
TEMPLATES = {
    "llama2": "[INST] " + TASK + "assessment [/INST]",
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
    + TASK
    + "assessment<|eot_id|><|start_header_id|>assistant<|end_header_id|>",
    "llama3_parts": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nTask: policy policy policy\n\n"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'][0]['text'] | trim }}\n\n{% endfor %}"
    "<|eot_id|><|start_header_id|>assistant<|end_header_id|>",
    "llama3_chat": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": "{{ bos_token }}Task: policy policy policy\n<start_of_turn>\n"
    + TURNS
    + "<end_of_turn>\n\n{{ guideline }}\n",
    "gemma3": "{{ bos_token }}<start_of_turn>user\n{% if not enable_thinking %}"
    + TASK
    + "{{ request_categories }}{% endif %}"
    "<end_of_turn>\n<start_of_turn>model\n",
    "qwen2": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "mistral_chat": "[INST] " + TASK + "assessment [/INST]",
    "xguard": "<|im_start|>user\n{% if policy %}{{ policy | trim }}\n{% endif %}Input Text: "
    "{% if messages | length == 1 %}{{ messages[0].content | trim }}{% else %}[User Query] "
    "{{ messages[0].content | trim }}\n\n[LLM Response] {{ messages[1].content | trim }}{% endif %}"
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "qwen3_chat": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}",
    "gemma3_chat": "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}<start_of_turn>model\n",
    "qwen3": "<|im_start|>user\n"
    + TASK
    + "assessment<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "granite": "<|start_of_role|>user<|end_of_role|>" + TASK + "assessment<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>",
    "gpt-oss": "{% for m in messages %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}<|end|>{% endfor %}"
    "<|start|>assistant",
}
LLAMA3 = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
GRANITE = ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>")
HARMONY = ("<|startoftext|>", "<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>")
HARMONY += ("<|endoftext|>",)


def tokenizer(family: str, known: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer with a family's special tokens and chat template; `known` is for `pieces`."""
    if family in ("llama2", "mistral", "mistral_chat"):
        made = pieces([], "<s>", "</s>", known)
    elif family.startswith("gemma"):
        made = pieces(["<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>", known)
    elif family.startswith("llama3"):
        made = byte_level(LLAMA3, bos_token=LLAMA3[0], eos_token=LLAMA3[1])
        if family == "llama3_raw":  # read without a chat template: its tokenizer puts BOS first
            made.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{LLAMA3[0]} $A", special_tokens=[(LLAMA3[0], made.bos_token_id)]
            )
    elif family.startswith("qwen"):
        made = byte_level(QWEN, eos_token=QWEN[2], pad_token=QWEN[0])
        made.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    elif family == "xguard":  # each of its risks is one token
        made = byte_level(QWEN, eos_token=QWEN[2], pad_token=QWEN[0])
        made.add_tokens([AddedToken(word, normalized=False) for word in known])
    elif family == "granite":
        made = byte_level(GRANITE, bos_token=GRANITE[0], eos_token=GRANITE[0])
    else:
        made = byte_level(HARMONY, bos_token=HARMONY[0], eos_token=HARMONY[1])
    made.chat_template = TEMPLATES.get(family)
    return made


CONFIGS = {
    "llama2": LlamaConfig,
    "llama3": LlamaConfig,
    "llama3_parts": LlamaConfig,
    "llama3_chat": LlamaConfig,
    "llama3_raw": LlamaConfig,
    "mistral": MistralConfig,
    "mistral_chat": MistralConfig,
    "gemma": Gemma2Config,
    "gemma3": Gemma3TextConfig,
    "qwen2": Qwen2Config,
    "gemma3_chat": Gemma3TextConfig,
    "qwen3": Qwen3Config,
    "qwen3_chat": Qwen3Config,
    "xguard": Qwen3Config,
    "granite": GraniteConfig,
    "gpt-oss": GptOssConfig,
}
GUARDS = {  # zoo name: family
    "expguard": "qwen2",
    "llama-guard": "llama2",
    "llama-guard-2-8b": "llama3",
    "llama-guard-3-8b": "llama3",
    "llama-guard-3-1b": "llama3_parts",
    "wildguard": "mistral",
    "shieldgemma-2b": "gemma",
    "aegis-guard-defensive": "llama2",
    "md-judge-v0.1": "mistral",
    "harmbench-llama-2-13b": "llama2",
    "granite-guardian-3.3-8b": "granite",
    "qwen3guard-gen-0.6b": "qwen3",
    "gpt-oss-safeguard-20b": "gpt-oss",
    "polyguard-qwen": "qwen2",
    "nemoguard-8b": "llama3_chat",
    "nemotron-3.5-content-safety": "gemma3",
    "nemotron-content-safety-reasoning-4b": "gemma3_chat",
    "guardreasoner-8b": "llama3_raw",
    "dynaguard-8b": "qwen3_chat",
    "yufeng-xguard-reason-0.6b": "xguard",
    "aprielguard-8b": "mistral_chat",
}


def model(
    family: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0, **changes
) -> PreTrainedModel:
    """A tiny random model of a family, wide enough in its weights that different texts give
    different verdicts.
    """
    shape = SHAPE | special_ids(tokenizer)
    shape |= {
        "head_dim": 8,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
    }
    if family == "gpt-oss":
        shape |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(seed)
    config = CONFIGS[family](**(shape | changes))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def save(
    folder: Path,
    family: str,
    words: Sequence[str] = WORDS,
    seed: int = 0,
    known: Sequence[str] = (),
    **changes,
) -> Path:
    """A tiny guard on disk. Its output layer knows the tokens of `words` alone, so that it mostly
    gives verdicts.
    """
    made = tokenizer(family, known)
    lm = model(family, made, seed, **changes)
    start = made("x:", add_special_tokens=False)["input_ids"]
    verdicts = set()
    for word in words:
        for form in (word, f" {word}"):
            ids = made(f"x:{form}", add_special_tokens=False)["input_ids"]
            if ids[: len(start)] == start:
                verdicts.add(ids[len(start)])
    head = lm.get_output_embeddings().weight.data
    head[[i for i in range(len(made)) if i not in verdicts]] = 0
    lm.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder
