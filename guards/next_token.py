"""The next token after many prompts: by transformers (shared prefix, packed), vLLM or a server."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedTokenizerBase

from common.conversation import UserError
from common.fast_decoding import shared_prefix
from common.fit import check_ids, positions
from common.generation import Decoding, load_causal_lm, server_client, start_vllm, transformers_engine
from common.run import device, is_main_process

NextToken = tuple[list[float], int | str]  # log-probabilities of the candidates; the most likely token, or an error


class Model(ABC):
    """A causal LM behind any engine. `window`: the tokens that it sees at most, where that is known."""

    window: int | None = None

    @abstractmethod
    def next_token(self, prompts: Sequence[list[int]], candidates: Sequence[int]) -> list[NextToken]:
        """What follows each prompt (token ids)."""

    @abstractmethod
    def complete(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
        """What is written greedily after each prompt, special tokens included."""


def load_model(engine: str, model: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Model:
    """A model by the name of its engine; options that are None are left out.

    Raises:
        UserError: unknown engine, or the engine cannot load it.
    """
    kinds = {"transformers": LocalModel, "vllm": VllmModel, "server": ServerModel}
    if engine not in kinds:
        raise UserError(f"--engine {engine}: expected one of {', '.join(kinds)}")
    known = inspect.signature(kinds[engine]).parameters
    given = {name: value for name, value in options.items() if value is not None}
    if wrong := set(given) - set(known) - {"name", "progress", "trust_remote_code", "adapter"}:
        raise UserError(f"--engine {engine}: takes no {', '.join(sorted(wrong))}")
    if engine == "server" and "server_url" not in given:
        raise UserError("--engine server: name its --server_url, such as http://127.0.0.1:8000/v1")
    if engine == "server" and "adapter" in given and "server_model" not in given:  # it would judge with the base alone
        raise UserError(f"--engine server: server_model must say by what name the server knows {given['adapter']}")
    return kinds[engine](model, tokenizer, **{k: v for k, v in given.items() if k in known})


class LocalModel(Model):
    """transformers. What all prompts begin with is run once; the rest of many prompts is one row without padding."""

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        adapter: str | None = None,
        batch_tokens: int | None = None,
        share_prefix: bool = True,
        load_in_4bit: bool = False,
        name: str = "",
        progress: bool = True,
        trust_remote_code: bool = False,
    ):
        """Load it.

        Args:
            batch_tokens: tokens of a row; None chooses for the device.
            share_prefix: False runs the shared beginning anew for every prompt.
            load_in_4bit: NF4 with double quantization (bitsandbytes).
        """
        self.model = load_causal_lm(model, adapter, load_in_4bit=load_in_4bit, trust_remote_code=trust_remote_code)
        self.tokenizer, self.share_prefix = tokenizer, share_prefix
        # Attention over a row is dense, its mask hides the other texts: on a CPU long rows cost more than they save.
        self.batch_tokens = batch_tokens or (384 if device().type == "cpu" else 8192)
        self.bar = {"desc": f"judging with {name}", "unit": "text", "disable": not (progress and is_main_process())}
        config = self.model.config.get_text_config()
        self.window, window = positions(self.model), getattr(config, "sliding_window", None)
        sliding = "sliding_attention" if window else "full_attention"
        self.layers = {kind: window if kind.startswith("sliding") else None
                       for kind in set(getattr(config, "layer_types", None) or [sliding])}  # fmt: skip
        # Masks of our own need a model of transformers itself with attention over earlier tokens in every layer.
        known = set(self.layers) <= {"full_attention", "sliding_attention"}
        self.packs = known and "logits_to_keep" in inspect.signature(self.model.forward).parameters

    @torch.inference_mode()
    def next_token(self, prompts: Sequence[list[int]], candidates: Sequence[int]) -> list[NextToken]:
        check_ids(prompts, self.tokenizer, self.model)
        out: list[NextToken] = [([], "")] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # the largest first: no late out-of-memory
        shared = shared_prefix(prompts) if self.share_prefix and self.packs else 0
        cache = DynamicCache() if shared else None
        if shared:
            self.model(input_ids=self._row(prompts[0][:shared]), past_key_values=cache, logits_to_keep=1)
        with tqdm(total=len(prompts), **self.bar) as bar:
            while order:
                pack = self._pack(order, prompts, shared)
                logits = self._logits([prompts[i][shared:] for i in pack], shared, cache)
                logprobs = logits.float().log_softmax(-1)
                rows = zip(pack, logprobs[:, list(candidates)].tolist(), logprobs.argmax(-1).tolist(), strict=True)
                for i, of, top in rows:
                    out[i] = (of, top)
                bar.update(len(pack))
        return out

    def _row(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(ids)], device=self.model.device)

    def _pack(self, order: list[int], prompts: Sequence[list[int]], shared: int) -> list[int]:
        """Take the next prompts for one row off `order`: at least one, together at most `batch_tokens` new tokens."""
        size, room = 0, self.batch_tokens if self.packs else 0
        while size < len(order) and (not size or room >= len(prompts[order[size]]) - shared):
            room -= len(prompts[order[size]]) - shared
            size += 1
        pack, order[:] = order[:size], order[size:]
        return pack

    def _logits(self, texts: Sequence[list[int]], shared: int, cache: DynamicCache | None) -> torch.Tensor:
        """Logits after each text, of shape (texts, vocabulary)."""
        if not self.packs:
            return self.model(input_ids=self._row(texts[0])).logits[:, -1]
        lengths = torch.tensor([len(text) for text in texts])
        positions = torch.cat([torch.arange(shared, shared + n) for n in lengths])
        masks = {kind: self._mask(lengths, positions, shared, window) for kind, window in self.layers.items()}
        logits = self.model(
            input_ids=self._row([token for text in texts for token in text]),
            position_ids=positions[None].to(self.model.device),
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=(lengths.cumsum(0) - 1).to(self.model.device),
        ).logits[0]
        if cache is not None:
            cache.crop(-len(positions))
        return logits

    def _mask(self, lengths: torch.Tensor, positions: torch.Tensor, shared: int, window: int | None) -> torch.Tensor:
        """Additive mask of shape (1, 1, new tokens, shared + new tokens): each text sees the shared part and itself."""
        text = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        before = torch.arange(shared)
        of = torch.cat([torch.full((shared,), -1), text])
        at = torch.cat([before, positions])
        seen = (of[None] == -1) | (of[None] == text[:, None])
        distance = positions[:, None] - at[None]
        seen &= distance >= 0
        if window:
            seen &= distance < window
        mask = torch.zeros(seen.shape, dtype=self.model.dtype)
        return mask.masked_fill_(~seen, torch.finfo(mask.dtype).min)[None, None].to(self.model.device)

    def complete(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
        engine = transformers_engine(self.model, self.tokenizer, Decoding(max_new_tokens), skip_special_tokens=False)
        answers = dict(engine(prompts)) if prompts else {}
        return [answers[i] for i in range(len(prompts))]


class VllmModel(Model):
    """vLLM in this process, with its own prefix caching and LoRA support."""

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        adapter: str | None = None,
        progress: bool = True,
        trust_remote_code: bool = False,
    ):
        self.llm, self.request = start_vllm(model, adapter, trust_remote_code)
        self.window = self.llm.llm_engine.model_config.max_model_len
        self.tokenizer, self.progress = tokenizer, progress and is_main_process()

    def _generate(self, prompts: Sequence[list[int]], **params: Any):
        from vllm import SamplingParams

        asked = [{"prompt_token_ids": ids} for ids in prompts]
        sampling = SamplingParams(temperature=0.0, detokenize=False, **params)
        return self.llm.generate(asked, sampling, lora_request=self.request, use_tqdm=self.progress)

    def next_token(self, prompts: Sequence[list[int]], candidates: Sequence[int]) -> list[NextToken]:
        out = []
        for output in self._generate(prompts, max_tokens=1, logprob_token_ids=list(candidates)):
            (logprobs,) = output.outputs[0].logprobs
            out.append(([logprobs[i].logprob for i in candidates], output.outputs[0].token_ids[0]))
        return out

    def complete(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
        outputs = self._generate(prompts, max_tokens=max_new_tokens) if prompts else []
        return [self.tokenizer.decode(output.outputs[0].token_ids) for output in outputs]


class ServerModel(Model):
    """An OpenAI-compatible server that takes token ids for prompts and names tokens by id, such as `vllm serve`.

    It tells the 20 most likely tokens; a candidate that is not among them counts as impossible. A prompt that it
    refuses gets an error; after any other failure that stays, the rest is not asked any more.
    """

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        server_url: str,
        server_model: str | None = None,
        concurrency: int = 16,
        name: str = "",
        progress: bool = True,
    ):
        self.client, self.model, self.tokenizer = server_client(server_url), server_model or model, tokenizer
        self.concurrency = concurrency
        self.bar = {"desc": f"judging with {name}", "unit": "text", "disable": not (progress and is_main_process())}

    def _ask(self, prompts: Sequence[list[int]], **options: Any) -> list[Any]:
        """The first choice of each answer, or the text of an error."""
        import openai

        failed: list[str] = []

        def ask(ids: list[int]) -> Any:
            if failed:
                return f"not asked, because the server failed before: {failed[0]}"
            more = {"return_tokens_as_token_ids": True, "skip_special_tokens": False}
            try:
                said = self.client.completions.create(
                    model=self.model, prompt=ids, temperature=0.0, extra_body=more, **options
                )
                if getattr(said, "choices", None):  # a proxy's page comes back as text
                    return said.choices[0]
                failed.append(f"no completion in its answer: {said!r:.80}")
            except openai.BadRequestError as error:
                return self._without_key(error)
            except openai.OpenAIError as error:
                failed.append(self._without_key(error))
            return failed[-1]

        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(tqdm(pool.map(ask, prompts), total=len(prompts), **self.bar))

    def _without_key(self, error: Exception) -> str:
        return " ".join(str(error).replace(self.client.api_key, "…").split())[:150] or type(error).__name__

    def next_token(self, prompts: Sequence[list[int]], candidates: Sequence[int]) -> list[NextToken]:
        out: list[NextToken] = []
        for choice in self._ask(prompts, max_tokens=1, logprobs=20):
            try:
                (top,) = choice.logprobs.top_logprobs
                of = {int(token.removeprefix("token_id:")): value for token, value in top.items()}
                written = int(choice.logprobs.tokens[0].removeprefix("token_id:"))
                out.append(([of.get(i, float("-inf")) for i in candidates], written))
            except (AttributeError, TypeError, ValueError, IndexError):
                out.append(([], choice if isinstance(choice, str) else "the server names no tokens by id"))
        return out

    def complete(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
        return [
            choice if isinstance(choice, str) else choice.text
            for choice in self._ask(prompts, max_tokens=max_new_tokens)
        ]
