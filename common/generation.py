"""Answers to many prompts, batched, by transformers, vLLM or a server; `common.keep.generate` keeps them as they come.

Prompts are token ids, so that every engine sees the same prompt, and no text can become a control token on the way.
"""

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from common.bundled import resolve_model
from common.conversation import UserError, check_url
from common.fast_decoding import cache_for, pack_linear, prefilled, without_collector
from common.fit import check_ids, padding_id, positions
from common.run import device, inference_dtype

logger = logging.getLogger(__name__)
Engine = Callable[[Sequence[list[int]]], Iterator[tuple[int, str]]]  # yields (index of the prompt, answer) as they come


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded. Temperature 0 is deterministic: greedy, or beam search with num_beams above 1."""

    max_new_tokens: int = 256
    num_beams: int = 1
    temperature: float = 0.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if min(self.max_new_tokens, self.num_beams) < 1 or min(self.temperature, self.top_k) < 0:
            raise UserError("expected --max_new_tokens, --num_beams of 1 or more, --temperature, --top_k of 0 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p {self.top_p}: expected above 0, at most 1")


def transformers_engine(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    decoding: Decoding,
    batch_size: int | None = None,
    skip_special_tokens: bool = True,
) -> Engine:
    """Left-padded batches of prompts of similar length; new tokens alone are decoded.

    Args:
        batch_size: prompts at a time; None takes 24, fastest on a CPU, or on a GPU 64 beams.
    """
    size = batch_size or (24 if device().type == "cpu" else max(1, 64 // decoding.num_beams))
    options = {"max_new_tokens": decoding.max_new_tokens, "num_beams": decoding.num_beams}
    drawn = {"temperature": decoding.temperature, "top_k": decoding.top_k, "top_p": decoding.top_p}
    drawn = drawn if decoding.temperature else dict.fromkeys(drawn)  # a model's own generation_config.json may set them
    options |= drawn | {"do_sample": decoding.temperature > 0}
    pad = padding_id(tokenizer, model)
    window = positions(model) or float("inf")

    def run(prompts: Sequence[list[int]]) -> Iterator[tuple[int, str]]:
        refuse_long(prompts, window - decoding.max_new_tokens)
        check_ids(prompts, tokenizer, model)
        torch.manual_seed(decoding.seed)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for batch in (order[i : i + size] for i in range(0, len(order), size)):
            width = len(prompts[batch[0]])
            texts = [prompts[i] for i in batch]
            with torch.inference_mode(), without_collector():
                cache, shared = prefilled(model, texts) if decoding.num_beams == 1 else (cache_for(model), 0)
                # Padding stands behind what is shared.
                ids = [row[:shared] + [pad] * (width - len(row)) + row[shared:] for row in texts]
                mask = [[1] * shared + [0] * (width - len(row)) + [1] * (len(row) - shared) for row in texts]
                out = model.generate(
                    torch.tensor(ids, device=model.device),
                    attention_mask=torch.tensor(mask, device=model.device),
                    past_key_values=cache,
                    pad_token_id=pad,
                    **options,
                )
            texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=skip_special_tokens)
            yield from zip(batch, texts, strict=True)

    return run


def load_causal_lm(
    name: str,
    adapter: str | None = None,
    *,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal LM on the accelerator, its LoRA adapter merged (so that it costs nothing), ready to generate.

    Raises:
        UserError: model or adapter cannot be loaded, or do not fit each other.
    """
    from peft import PeftModel

    options: dict[str, Any] = {"dtype": inference_dtype(), "trust_remote_code": trust_remote_code}
    quantized = load_in_8bit or load_in_4bit
    if quantized:
        kind = {"load_in_8bit": True}
        if load_in_4bit:
            kind = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
                    "bnb_4bit_compute_dtype": inference_dtype()}  # fmt: skip
        options |= {"quantization_config": BitsAndBytesConfig(**kind), "device_map": {"": device()}}
    what = name
    try:
        model = AutoModelForCausalLM.from_pretrained(resolve_model(name), **options)
        if adapter:
            what = adapter
            model = PeftModel.from_pretrained(model, adapter)
            model = model if quantized else model.merge_and_unload()
    except UserError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        raise UserError(f"{what}: cannot be loaded: {str(error).strip().splitlines()[0]:.200}") from None
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("sdpa_grouped")
    if not quantized:
        pack_linear(model.to(device()))
    return model.eval()


def vllm_engine(name: str, decoding: Decoding, adapter: str | None = None, trust_remote_code: bool = False) -> Engine:
    """vLLM in this process, the adapter through vLLM's own LoRA support; chunks, so that a kill loses little.

    Raises:
        UserError: vLLM is not installed or cannot load the model, or beams are asked for.
    """
    if decoding.num_beams > 1:
        raise UserError("--num_beams: beam search needs --engine transformers")
    llm, request = start_vllm(name, adapter, trust_remote_code, decoding.seed)
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=decoding.temperature,
        top_p=decoding.top_p if decoding.temperature else 1.0,
        top_k=decoding.top_k if decoding.temperature else 0,
        max_tokens=decoding.max_new_tokens,
        seed=decoding.seed if decoding.temperature else None,
        detokenize=False,  # its own decoding drops what is left of a character at the end
    )
    tokenizer, window = llm.get_tokenizer(), llm.llm_engine.model_config.max_model_len

    def run(prompts: Sequence[list[int]]) -> Iterator[tuple[int, str]]:
        refuse_long(prompts, window - decoding.max_new_tokens)
        for start in range(0, len(prompts), 512):
            chunk = [{"prompt_token_ids": ids} for ids in prompts[start : start + 512]]
            for i, output in enumerate(llm.generate(chunk, params, lora_request=request)):
                yield start + i, tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True)

    return run


def start_vllm(name: str, adapter: str | None = None, trust_remote_code: bool = False, seed: int = 0) -> tuple:
    """vLLM's LLM in this process, and its request for the adapter (None without one).

    Raises:
        UserError: vLLM is not installed, or cannot load the model.
    """
    try:
        from vllm import LLM
        from vllm.lora.request import LoRARequest
    except ImportError as error:
        raise UserError(f"--engine vllm: vLLM is missing ({error}); see the extra [vllm] in pyproject.toml") from None
    options = {"dtype": str(inference_dtype()).removeprefix("torch."), "trust_remote_code": trust_remote_code}
    if adapter:
        options |= {"enable_lora": True, "max_lora_rank": _rank(adapter)}
    if device().type == "cpu":
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
        options["enforce_eager"] = True  # compiling takes minutes there, and gains little
    try:
        llm = LLM(resolve_model(name), seed=seed, **options)
    except (OSError, ValueError, RuntimeError) as error:  # such as too little room for the KV cache
        raise UserError(f"--engine vllm: {name} cannot be loaded: {str(error).strip().splitlines()[0]:.300}") from None
    folder = str(adapter_file(adapter, "adapter_config.json").parent) if adapter else None
    return llm, LoRARequest("adapter", 1, folder) if folder else None


def adapter_file(adapter: str, name: str) -> Path:
    """A file of an adapter: a folder, or a repository of the hub.

    Raises:
        UserError: there is none.
    """
    try:
        return Path(cached_file(adapter, name)).resolve()
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"--lora_weights {adapter}: no {name} there ({str(error).strip().splitlines()[0]:.150})"
        ) from None


def _rank(adapter: str) -> int:
    """The smallest rank that vLLM knows and that holds the adapter's."""
    try:
        rank = json.loads(adapter_file(adapter, "adapter_config.json").read_text(encoding="utf-8"))["r"]
        return next(known for known in (8, 16, 32, 64, 128, 256, 320, 512) if known >= rank)
    except (ValueError, KeyError, StopIteration) as error:
        raise UserError(f"{adapter}: no LoRA adapter that vLLM can serve ({error!r:.80})") from None


def server_engine(url: str, model: str, decoding: Decoding, concurrency: int = 16) -> Engine:
    """An OpenAI-compatible server that takes token ids for prompts, such as `vllm serve`.

    The key, where one is needed, comes from SERVER_API_KEY. The client tries again on 429, 5xx and broken connections.
    After a first prompt that failed for good, none is asked any more; what was answered is kept.

    Args:
        url: such as http://127.0.0.1:8000/v1.
        model: the name that the server knows it by.
    """
    if decoding.num_beams > 1:
        raise UserError("--num_beams: beam search needs --engine transformers")
    client = server_client(url)
    import openai

    more = {"top_k": decoding.top_k} if decoding.temperature and decoding.top_k else {}

    stopped = threading.Event()

    def ask(ids: list[int]) -> str | None:
        if stopped.is_set():
            return None
        options = {"temperature": decoding.temperature, "max_tokens": decoding.max_new_tokens, "seed": decoding.seed}
        top_p = decoding.top_p if decoding.temperature else 1.0
        said = client.completions.create(model=model, prompt=ids, top_p=top_p, extra_body=more, **options)
        choices = getattr(said, "choices", None)  # a proxy's page comes back as text
        if not choices or not isinstance(choices[0].text, str):
            raise openai.OpenAIError(f"no completion in its answer: {said!r:.80}")
        return choices[0].text

    def run(prompts: Sequence[list[int]]) -> Iterator[tuple[int, str]]:
        failed: list[str] = []
        with ThreadPoolExecutor(concurrency) as pool:
            asked = {pool.submit(ask, ids): i for i, ids in enumerate(prompts)}
            try:
                for answer in as_completed(asked):
                    try:
                        if (text := answer.result()) is not None:
                            yield asked[answer], text
                    except openai.OpenAIError as error:
                        failed.append(str(error).replace(client.api_key, "…"))
                        stopped.set()
            finally:
                stopped.set()  # also when the caller was interrupted
        if failed:
            raise UserError(f"{url}: {failed[0]:.150} (prompts that failed: {len(failed)}); run it again for the rest")

    return run


def server_client(url: str):
    """The official client of an OpenAI-compatible server, which tries again on 429, 5xx and broken connections.

    The key comes from SERVER_API_KEY: OPENAI_API_KEY is for OpenAI alone.

    Raises:
        UserError: the client is not installed, or the URL holds a user.
    """
    try:
        import openai
    except ImportError:
        raise UserError("--engine server: pip install openai") from None
    key = os.environ.get("SERVER_API_KEY") or "none"
    return openai.OpenAI(base_url=check_url(url, "--server_url"), api_key=key, max_retries=5, timeout=600.0)


def refuse_long(prompts: Sequence[list[int]], room: float) -> None:
    """A prompt that does not fit with its answer is refused: cut off, it would lose the task, which stands last."""
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    if len(prompts[longest]) > room:
        raise UserError(f"prompt {longest + 1} has {len(prompts[longest])} tokens; the model has room for {room:.0f}")
