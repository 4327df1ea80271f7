"""Causal language models behind one interface: transformers, vLLM in this process, or a server.

Every engine writes on after prompts (`complete`) and reads what comes next (`next_token`). It gives
an error a prompt: one that fails takes nothing from the others. Prompts are token ids, so that
every engine sees the same prompt, and no text can become a control token on the way.
"""

import inspect
import json
import logging
import math
import os
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from common.bundled import resolve_model
from common.conversation import UserError, check_url
from common.fit import check_ids, padding_id, positions
from common.prefix import shared_prefix
from common.run import device, inference_dtype, is_main_process

logger = logging.getLogger(__name__)

CHUNK = 512  # prompts that vLLM is given at a time, so that a kill loses little
TOP = 20  # tokens that a server names of its own accord; most allow no more
RETRIES = 5  # tries of the openai client after the first: BUSY, 5xx, time-outs, broken connections
BUSY = (408, 409, 429)  # HTTP statuses that may pass
PATIENCE = 8  # requests that fail one after another before the rest is not asked any more
NOTICE = 30.0  # seconds without any answer before a line says so
BOUND = 0.01  # of the most likely token: what the words that a server leaves out may weigh at most
ROUNDING = 1e-7  # of probabilities that are told in float32


# --- what is asked, and what comes back -----------------------------------------------------------


@dataclass(frozen=True)
class Decoding:
    """How completions are decoded.

    Temperature 0 is deterministic: greedy, or beam search with `num_beams` above 1.
    """

    max_new_tokens: int = 256
    num_beams: int = 1
    temperature: float = 0.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if min(self.max_new_tokens, self.num_beams) < 1:
            raise UserError("expected --max_new_tokens and --num_beams of 1 or more")
        if min(self.temperature, self.top_k) < 0:
            raise UserError("expected --temperature and --top_k of 0 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p {self.top_p}: expected above 0, at most 1")


@dataclass(frozen=True)
class Completion:
    """What was written after a prompt; with an `error` there is no text."""

    text: str = ""
    error: str | None = None


class EngineStopped(UserError):
    """An engine that is not asked any more; what it did answer has been handed out before."""


@dataclass(frozen=True)
class NextToken:
    """What comes after a prompt: natural log-probabilities of the candidates in their order, and
    the id of the most likely token. With an `error` there is neither.
    """

    logprobs: list[float] = field(default_factory=list)
    top: int | None = None
    error: str | None = None


# --- engines --------------------------------------------------------------------------------------


class Engine(ABC):
    """A causal language model behind any engine.

    `window` is how many tokens it sees at most, None where that is not known.
    """

    window: int | None = None
    has_beams = False

    def complete(
        self,
        prompts: Sequence[list[int]],
        decoding: Decoding,
        skip_special_tokens: bool = True,
    ) -> Iterator[tuple[int, Completion]]:
        """What is written after each prompt: (index of the prompt, completion), as they come.

        Args:
            prompts: token ids.
            skip_special_tokens: leave special tokens out of the text.

        Raises:
            UserError: `decoding` asks for beams that the engine lacks, or for more than it sees.
            EngineStopped: after what was answered, where the rest is not asked any more.
        """
        if decoding.num_beams > 1 and not self.has_beams:
            raise UserError("--num_beams: beam search needs --engine transformers")
        room = self._room(decoding.max_new_tokens)
        if room < 1:
            flag = f"--max_new_tokens {decoding.max_new_tokens}"
            raise UserError(f"{flag}: the model has room for {self.window} tokens, prompt included")
        return self._complete_what_fits(prompts, decoding, skip_special_tokens, room)

    def _complete_what_fits(
        self,
        prompts: Sequence[list[int]],
        decoding: Decoding,
        skip_special_tokens: bool,
        room: float,
    ) -> Iterator[tuple[int, Completion]]:
        fitting = []
        for i, ids in enumerate(prompts):
            if refusal := self._refusal(ids, room):
                yield i, Completion(error=refusal)
            else:
                fitting.append(i)
        asked = [prompts[i] for i in fitting]
        if asked:
            for number, completion in self._complete(asked, decoding, skip_special_tokens):
                yield fitting[number], completion

    def completions(
        self,
        prompts: Sequence[list[int]],
        decoding: Decoding,
        skip_special_tokens: bool = True,
    ) -> list[Completion]:
        """`complete` in the order of the prompts; what is not asked any more is an error, too."""
        found: dict[int, Completion] = {}
        left = Completion(error="not answered")
        try:
            for i, completion in self.complete(prompts, decoding, skip_special_tokens):
                found[i] = completion
        except EngineStopped as stopped:
            left = Completion(error=f"not asked: {stopped}")
        return [found.get(i, left) for i in range(len(prompts))]

    def next_token(
        self, prompts: Sequence[list[int]], candidates: Sequence[int]
    ) -> list[NextToken]:
        """What comes after each prompt, in the order of the prompts.

        Args:
            prompts: token ids.
            candidates: ids of the tokens whose log-probabilities are wanted.
        """
        room = self._room(1)
        refusals = [self._refusal(ids, room) for ids in prompts]
        asked = [ids for ids, refusal in zip(prompts, refusals, strict=True) if refusal is None]
        read = iter(self._next_token(asked, candidates) if asked else ())
        out = []
        for refusal in refusals:
            out.append(next(read) if refusal is None else NextToken(error=refusal))
        return out

    def _room(self, new_tokens: int) -> float:
        return math.inf if self.window is None else self.window - new_tokens

    def _refusal(self, ids: Sequence[int], room: float) -> str | None:
        """Why a prompt cannot be run, if so. One that is too long is not cut: it would lose the
        task, which stands last.
        """
        if len(ids) > room:
            return f"the prompt has {len(ids)} tokens; the model has room for {room:.0f}"
        return None

    @abstractmethod
    def _complete(
        self, prompts: Sequence[list[int]], decoding: Decoding, skip_special_tokens: bool
    ) -> Iterator[tuple[int, Completion]]:
        """`complete` for prompts that fit, at least one."""

    @abstractmethod
    def _next_token(
        self, prompts: Sequence[list[int]], candidates: Sequence[int]
    ) -> list[NextToken]:
        """`next_token` for prompts that fit, at least one."""


def prompts_at_once(batch_size: int | None = None, num_beams: int = 1) -> int:
    """How many prompts transformers completes at a time: 24, fastest on a CPU; on a GPU 64 beams.

    Args:
        batch_size: what the user asked for, if anything.
    """
    if batch_size is not None:
        return batch_size
    return 24 if device().type == "cpu" else max(1, 64 // num_beams)


class TransformersEngine(Engine):
    """transformers in this process.

    Completions are stock `generate` over left-padded batches of prompts of similar length. A next
    token costs one forward pass: what all prompts begin with is run once, and the rest of many
    prompts is one row without padding.
    """

    has_beams = True

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        adapter: str | None = None,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        share_prefix: bool = True,
        trust_remote_code: bool = False,
        name: str = "",
        progress: bool = True,
    ):
        """Load the model, its adapter merged.

        Args:
            model: folder, hub id or the name of the bundled model.
            adapter: a LoRA adapter, folder or hub id.
            load_in_8bit: 8 bits a weight (bitsandbytes).
            load_in_4bit: NF4 with double quantization (bitsandbytes).
            batch_size: prompts that are completed at a time; None leaves it to `prompts_at_once`.
            batch_tokens: tokens of a row when next tokens are read; None chooses for the device.
            share_prefix: False runs the shared beginning anew for every prompt.
            name: what the progress bar calls it.

        Raises:
            UserError: model or adapter cannot be loaded, or do not fit each other.
        """
        self.model = load_causal_lm(
            model,
            adapter,
            load_in_8bit=load_in_8bit,
            load_in_4bit=load_in_4bit,
            trust_remote_code=trust_remote_code,
        )
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        # Attention over a row is dense, and its mask hides the other texts: on a CPU long rows cost
        # more than they save.
        self.batch_tokens = batch_tokens or (384 if device().type == "cpu" else 8192)
        self.share_prefix = share_prefix
        self.bar = _bar(name, progress)
        config = self.model.config.get_text_config()
        self.window = positions(self.model)
        self.sliding_windows = _sliding_windows(config)
        # Masks of our own need a model of transformers itself, and attention in every layer.
        attends = set(self.sliding_windows) <= {"full_attention", "sliding_attention"}
        self.packs = (
            attends and "logits_to_keep" in inspect.signature(self.model.forward).parameters
        )

    def _refusal(self, ids, room):
        try:
            check_ids([ids], self.tokenizer, self.model)
        except UserError as error:  # the model has no embedding for a token
            return str(error)
        return super()._refusal(ids, room)

    def _complete(self, prompts, decoding, skip_special_tokens):
        size = prompts_at_once(self.batch_size, decoding.num_beams)
        if decoding.temperature:
            torch.manual_seed(decoding.seed)
        # The longest first: if memory does not suffice, that shows at once.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            written = self._generate([prompts[i] for i in batch], decoding)
            texts = self.tokenizer.batch_decode(written, skip_special_tokens=skip_special_tokens)
            for i, text in zip(batch, texts, strict=True):
                yield i, Completion(text)

    @torch.inference_mode()
    def _generate(self, prompts: Sequence[list[int]], decoding: Decoding) -> torch.Tensor:
        """New tokens, of shape (prompts, new tokens)."""
        pad = padding_id(self.tokenizer, self.model)
        width = max(map(len, prompts))
        ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        drawn = {
            "temperature": decoding.temperature,
            "top_k": decoding.top_k,
            "top_p": decoding.top_p,
        }
        if not decoding.temperature:  # a model's own generation_config.json may set them
            drawn = dict.fromkeys(drawn)
        written = self.model.generate(
            torch.tensor(ids, device=self.model.device),
            attention_mask=torch.tensor(mask, device=self.model.device),
            max_new_tokens=decoding.max_new_tokens,
            num_beams=decoding.num_beams,
            do_sample=decoding.temperature > 0,
            pad_token_id=pad,
            **drawn,
        )
        return written[:, width:]

    @torch.inference_mode()
    def _next_token(self, prompts, candidates):
        out = [NextToken()] * len(prompts)
        # The longest first: if memory does not suffice, that shows at once.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        shared = shared_prefix(prompts) if self.share_prefix and self.packs else 0
        cache = DynamicCache() if shared else None
        if shared:
            beginning = self._row(prompts[0][:shared])
            self.model(input_ids=beginning, past_key_values=cache, logits_to_keep=1)
        with tqdm(total=len(prompts), **self.bar) as bar:
            while order:
                pack = self._pack(order, prompts, shared)
                texts = [prompts[i][shared:] for i in pack]
                logprobs = self._logits(texts, shared, cache).float().log_softmax(-1)
                wanted = logprobs[:, list(candidates)].tolist()
                tops = logprobs.argmax(-1).tolist()
                for i, values, top in zip(pack, wanted, tops, strict=True):
                    out[i] = NextToken(values, top)
                bar.update(len(pack))
        return out

    def _row(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(ids)], device=self.model.device)

    def _pack(self, order: list[int], prompts: Sequence[list[int]], shared: int) -> list[int]:
        """Take the next prompts for one row off `order`: at least one, and together at most
        `batch_tokens` new tokens.
        """
        room = self.batch_tokens if self.packs else 0
        pack: list[int] = []
        while order:
            new_tokens = len(prompts[order[0]]) - shared
            if pack and new_tokens > room:
                break
            room -= new_tokens
            pack.append(order.pop(0))
        return pack

    def _logits(
        self, texts: Sequence[list[int]], shared: int, cache: DynamicCache | None
    ) -> torch.Tensor:
        """Logits after each text, of shape (texts, vocabulary)."""
        if not self.packs:
            return self.model(input_ids=self._row(texts[0])).logits[:, -1]
        lengths = torch.tensor([len(text) for text in texts])
        places = torch.cat([torch.arange(shared, shared + n) for n in lengths])
        masks = {
            kind: self._mask(lengths, places, shared, window)
            for kind, window in self.sliding_windows.items()
        }
        logits = self.model(
            input_ids=self._row([token for text in texts for token in text]),
            position_ids=places[None].to(self.model.device),
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=(lengths.cumsum(0) - 1).to(self.model.device),
        ).logits[0]
        if cache is not None:
            cache.crop(-len(places))
        return logits

    def _mask(
        self, lengths: torch.Tensor, places: torch.Tensor, shared: int, window: int | None
    ) -> torch.Tensor:
        """Additive mask of shape (1, 1, new tokens, shared + new tokens): each text sees the shared
        part and itself.
        """
        text = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        of = torch.cat([torch.full((shared,), -1), text])
        at = torch.cat([torch.arange(shared), places])
        seen = (of[None] == -1) | (of[None] == text[:, None])
        distance = places[:, None] - at[None]
        seen &= distance >= 0
        if window:
            seen &= distance < window
        mask = torch.zeros(seen.shape, dtype=self.model.dtype)
        mask.masked_fill_(~seen, torch.finfo(mask.dtype).min)
        return mask[None, None].to(self.model.device)


def _sliding_windows(config: PreTrainedConfig) -> dict[str, int | None]:
    """The kinds of attention in a model's layers, and how far each looks back; None: to the start."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        kinds = ["sliding_attention" if window else "full_attention"]
    return {kind: window if kind.startswith("sliding") else None for kind in set(kinds)}


def _bar(name: str, progress: bool) -> dict[str, Any]:
    """Options of the progress bar over next tokens."""
    shown = progress and is_main_process()
    return {"desc": f"judging with {name}", "unit": "text", "disable": not shown}


class VllmEngine(Engine):
    """vLLM in this process, with its own prefix caching, batching and LoRA support."""

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        adapter: str | None = None,
        trust_remote_code: bool = False,
        progress: bool = True,
    ):
        """Load the model.

        Raises:
            UserError: vLLM is not installed, cannot load the model, or the adapter does not fit it.
        """
        self.tokenizer = tokenizer
        self.progress = progress and is_main_process()
        try:
            from vllm import LLM
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            hint = "see the extra [vllm] in pyproject.toml"
            raise UserError(f"--engine vllm: vLLM is missing ({error}); {hint}") from None
        options: dict[str, Any] = {
            "dtype": str(inference_dtype()).removeprefix("torch."),
            "trust_remote_code": trust_remote_code,
        }
        self.request = None
        if adapter:
            check_adapter(model, adapter, trust_remote_code=trust_remote_code)
            folder = adapter_file(adapter, "adapter_config.json").parent
            self.request = LoRARequest("adapter", 1, str(folder))
            options |= {"enable_lora": True, "max_lora_rank": _rank(adapter)}
        if device().type == "cpu":
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
            options["enforce_eager"] = True  # compiling takes minutes there, and gains little
        try:
            self.llm = LLM(resolve_model(model), **options)
        except (OSError, ValueError, RuntimeError) as error:  # such as too little memory
            raise UserError(
                f"--engine vllm: {model} cannot be loaded: {_line(error, 300)}"
            ) from None
        self.window = self.llm.llm_engine.model_config.max_model_len

    def _generate(self, prompts: Sequence[list[int]], progress: bool, **params: Any) -> list[Any]:
        """vLLM's outputs. Its own decoding drops what is left of a character at the end."""
        from vllm import SamplingParams

        asked = [{"prompt_token_ids": ids} for ids in prompts]
        sampling = SamplingParams(detokenize=False, **params)
        return self.llm.generate(asked, sampling, lora_request=self.request, use_tqdm=progress)

    def _complete(self, prompts, decoding, skip_special_tokens):
        draws = decoding.temperature > 0
        params = {
            "temperature": decoding.temperature,
            "top_p": decoding.top_p if draws else 1.0,
            "top_k": decoding.top_k if draws else 0,
            "seed": decoding.seed if draws else None,
            "max_tokens": decoding.max_new_tokens,
        }
        for start in range(0, len(prompts), CHUNK):
            outputs = self._generate(prompts[start : start + CHUNK], self.progress, **params)
            for i, output in enumerate(outputs, start):
                ids = output.outputs[0].token_ids
                text = self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
                yield i, Completion(text)

    def _next_token(self, prompts, candidates):
        wanted = list(candidates)
        outputs = self._generate(
            prompts, self.progress, temperature=0.0, max_tokens=1, logprob_token_ids=wanted
        )
        out = []
        for output in outputs:
            (said,) = output.outputs
            (logprobs,) = said.logprobs
            values = [logprobs[i].logprob for i in wanted]
            out.append(NextToken(values, said.token_ids[0]))
        return out


class ServerEngine(Engine):
    """An OpenAI-compatible server that takes token ids for prompts, such as `vllm serve`.

    The key, where one is needed, comes from SERVER_API_KEY. The openai client tries again on 408,
    409, 429, 5xx, time-outs and broken connections. What fails for good is an error of that prompt.
    A server that refuses the key or does not know the model, and one that fails time after time, is
    not asked any more (`EngineStopped`).

    vLLM tells the probabilities of the very candidates (`logprob_token_ids`). A server that does
    not know this tells its 20 most likely tokens; a candidate that is not among them counts with
    the most that it can have, and is an error where that could change the verdict.
    """

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        server_url: str,
        server_model: str | None = None,
        server_timeout: float = 120.0,
        concurrency: int = 16,
        name: str = "",
        progress: bool = True,
    ):
        """Make the client; nothing is asked yet.

        Args:
            server_url: such as http://127.0.0.1:8000/v1.
            server_model: the name that the server knows the model or its adapter by.
            server_timeout: seconds of silence that end a request.
            concurrency: requests at a time.

        Raises:
            UserError: the client is not installed, an option is out of range, or the URL holds a
                user or a key.
        """
        try:
            import openai
        except ImportError:
            raise UserError("--engine server: pip install openai") from None
        if min(server_timeout, concurrency) <= 0:
            raise UserError("--engine server: server_timeout and concurrency must be above 0")
        self.url = check_url(server_url, "--server_url")
        self.model = server_model or model
        self.timeout = server_timeout
        self.concurrency = concurrency
        self.bar = _bar(name, progress)
        self.refused: str | None = None  # why the server is not asked any more
        self.client = openai.OpenAI(
            base_url=self.url,
            api_key=os.environ.get("SERVER_API_KEY") or "none",  # OPENAI_API_KEY is OpenAI's
            max_retries=RETRIES,
            timeout=server_timeout,
        )

    def _complete(self, prompts, decoding, skip_special_tokens):
        draws = decoding.temperature > 0
        more: dict[str, Any] = {"skip_special_tokens": skip_special_tokens}
        if draws and decoding.top_k:
            more["top_k"] = decoding.top_k
        answers = self._ask(
            prompts,
            max_tokens=decoding.max_new_tokens,
            temperature=decoding.temperature,
            top_p=decoding.top_p if draws else 1.0,
            seed=decoding.seed,
            extra_body=more,
        )
        for i, answer in answers:
            failed = isinstance(answer, _Failure)
            yield i, Completion(error=str(answer)) if failed else Completion(answer.text)

    def _next_token(self, prompts, candidates):
        wanted = list(candidates)
        more: dict[str, Any] = {"return_tokens_as_token_ids": True}
        if wanted:
            more["logprob_token_ids"] = wanted
        answers = self._ask(prompts, max_tokens=1, temperature=0.0, logprobs=TOP, extra_body=more)
        found: dict[int, NextToken] = {}
        bounded, why = 0, ""
        try:
            for i, answer in tqdm(answers, total=len(prompts), **self.bar):
                try:
                    found[i], missing = _read(answer, wanted)
                    bounded += missing > 0
                except _Failure as failure:
                    found[i] = NextToken(error=str(failure))
        except EngineStopped as stopped:
            why = f"not asked: {stopped}"
        if bounded:
            logger.warning(
                "%s: of %d of %d prompts it told its most likely tokens alone; a word that is not "
                "among them counts with the most that it can have (vLLM tells all words)",
                *(self.url, bounded, len(prompts)),
            )
        return [found.get(i, NextToken(error=why)) for i in range(len(prompts))]

    def _ask(self, prompts: Sequence[list[int]], **options: Any) -> Iterator[tuple[int, Any]]:
        """(index of the prompt, the first choice of the answer or a _Failure), as they come.

        Raises:
            EngineStopped: after what was answered, where the rest was not asked.
        """
        answers: Queue[tuple[int, Any]] = Queue()
        asking = _Asking(patience=max(PATIENCE, self.concurrency))
        pool = ThreadPoolExecutor(self.concurrency)

        def ask(i: int) -> None:
            answers.put((i, self._answer(prompts[i], asking, options)))

        left = 0
        try:
            for i in range(len(prompts)):
                pool.submit(ask, i)
            for _ in prompts:
                i, answer = self._wait(answers)
                if answer is None:
                    left += 1
                else:
                    yield i, answer
            if left or self.refused:
                ended = self.refused or asking.ended
                count = f"{left} of {len(prompts)} prompts were not asked"
                raise EngineStopped(f"{self.url}: {ended}; {count}, run it again for them")
        finally:  # also when the caller was interrupted
            asking.end("the run was stopped")
            pool.shutdown(cancel_futures=True)

    def _wait(self, answers: "Queue[tuple[int, Any]]") -> tuple[int, Any]:
        """The next answer; a line each time that none has come for a while."""
        notice = min(NOTICE, self.timeout / 2)
        waited = 0.0
        while True:
            try:
                return answers.get(timeout=notice)
            except Empty:
                waited += notice
                logger.warning(
                    "%s: no answer for %g s. A request that stays silent for %g s "
                    "(--server_timeout) is tried again, %d times in all.",
                    *(self.url, waited, self.timeout, RETRIES + 1),
                )

    def _answer(self, ids: list[int], asking: "_Asking", options: Mapping[str, Any]) -> Any:
        """The first choice of the server's answer, or a _Failure; None: it is not asked any more.

        It never raises, because somebody waits for each answer.
        """
        import openai

        if self.refused or asking.ended:
            return None
        try:
            said = self.client.completions.create(model=self.model, prompt=ids, **options)
            choice = _first_choice(said)
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            self.refused = f"the server refused the key: {self._told(error)}"
            return _Failure(self.refused)
        except openai.NotFoundError as error:
            self.refused = f"the server knows no such model or URL: {self._told(error)}"
            return _Failure(self.refused)
        except Exception as error:
            failure = _Failure(self._told(error))
            status = getattr(error, "status_code", 500)
            if status < 500 and status not in BUSY:  # a working server refuses this one prompt
                asking.works()
            else:
                asking.fails(failure)
            return failure
        asking.works()
        return choice

    def _told(self, error: Exception) -> str:
        """What an error says, in one line and without the key."""
        text = str(error)
        if key := os.environ.get("SERVER_API_KEY"):
            text = text.replace(key, "…")
        if isinstance(error, json.JSONDecodeError):
            text = f"its answer is broken JSON ({text})"
        return " ".join(text.split())[:150] or type(error).__name__


class _Failure(Exception):
    """One prompt has no answer; the message says why, and holds no key."""


class _Asking:
    """What the requests of one call know of each other: whether there is any use in asking on."""

    def __init__(self, patience: int):
        self.patience = patience
        self.ended: str | None = None
        self.failures = 0  # one after another
        self.lock = threading.Lock()

    def works(self) -> None:
        """A request was answered, be it by a refusal."""
        with self.lock:
            self.failures = 0

    def fails(self, failure: "_Failure") -> None:
        """A request failed for a reason that is no matter of its prompt, as far as can be seen."""
        with self.lock:
            self.failures += 1
            ends = self.failures >= self.patience
        if ends:
            self.end(f"{self.patience} requests failed one after another, the last: {failure}")

    def end(self, why: str) -> None:
        """Ask nothing more."""
        self.ended = self.ended or why


def _first_choice(said: Any) -> Any:
    """The first choice of a server's answer. A proxy's page comes back as text, with HTTP 200."""
    choices = getattr(said, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(getattr(choice, "text", None), str):
        raise _Failure(f"no completion in its answer: {said!r:.80}")
    return choice


def _read(choice: Any, candidates: Sequence[int]) -> tuple[NextToken, int]:
    """The next token as a server tells it, and how many candidates it left out.

    What it leaves out is less likely than all that it names, and no more likely than what they
    leave: that bound is taken. Impossible would be wrong, and would make ties.

    Raises:
        _Failure: there is no answer, it names no tokens by id, or the bound could be the verdict.
    """
    if isinstance(choice, _Failure):
        raise choice
    try:
        (named,) = choice.logprobs.top_logprobs
        known = {int(token.removeprefix("token_id:")): float(p) for token, p in named.items()}
        top = int(choice.logprobs.tokens[0].removeprefix("token_id:"))
    except (AttributeError, TypeError, ValueError, IndexError):
        raise _Failure("the server names no tokens by id") from None
    missing = [i for i in candidates if i not in known]
    if not missing:
        return NextToken([known[i] for i in candidates], top), 0
    if top not in known:
        raise _Failure("the server does not tell how likely the token is that it writes")
    rest = max(1.0 - sum(map(math.exp, known.values())), ROUNDING)
    bound = min(math.exp(min(known.values())), rest)
    if bound * len(missing) > BOUND * math.exp(known[top]):
        what = f"{len(missing)} of the {len(candidates)} tokens that were asked for"
        raise _Failure(f"the server leaves out {what}; use one that takes logprob_token_ids")
    floor = math.log(max(bound, 1e-30))
    return NextToken([known.get(i, floor) for i in candidates], top), len(missing)


ENGINES = {"transformers": TransformersEngine, "vllm": VllmEngine, "server": ServerEngine}
# an engine that has no use skips them
SHARED = {"adapter", "trust_remote_code", "name", "progress"}


def load_engine(
    engine: str, model: str, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> Engine:
    """A model by the name of its engine.

    Args:
        engine: transformers, vllm or server.
        model: folder, hub id or the name of the bundled model.
        options: of the engine's class; those that are None are left out.

    Raises:
        UserError: see `check_engine`; or the engine cannot load the model.
    """
    check_engine(engine, options)
    known = set(inspect.signature(ENGINES[engine]).parameters)
    used = {key: value for key, value in options.items() if value is not None and key in known}
    return ENGINES[engine](model, tokenizer, **used)


def check_engine(engine: str, options: Mapping[str, Any], num_beams: int = 1) -> None:
    """Refuse what `load_engine` or `complete` would refuse, before anything is loaded.

    Raises:
        UserError: an unknown engine, an option that is another engine's, a server without URL, an
            adapter that the server is not told of, or beams that the engine lacks.
    """
    if engine not in ENGINES:
        raise UserError(f"--engine {engine}: expected one of {', '.join(ENGINES)}")
    known = set(inspect.signature(ENGINES[engine]).parameters)
    given = {option for option, value in options.items() if value is not None}
    if wrong := given - known - SHARED:
        raise UserError(f"--engine {engine}: takes no {', '.join(sorted(wrong))}")
    if num_beams > 1 and not ENGINES[engine].has_beams:
        raise UserError("--num_beams: beam search needs --engine transformers")
    if engine == "server" and "server_url" not in given:
        hint = "such as http://127.0.0.1:8000/v1"
        raise UserError(f"--engine server: name its --server_url, {hint}")
    if engine == "server" and "adapter" in given and "server_model" not in given:
        # Under the base's name the base alone would answer.
        what = f"by what name the server knows {options['adapter']}"
        raise UserError(f"--engine server: --server_model must say {what}")


# --- loading --------------------------------------------------------------------------------------


def load_causal_lm(
    name: str,
    adapter: str | None = None,
    *,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal language model on the accelerator, ready to generate, as transformers loads it.

    Args:
        adapter: a LoRA adapter. It is merged, so that it costs nothing, but for a quantized model.

    Raises:
        UserError: model or adapter cannot be loaded, or do not fit each other.
    """
    options: dict[str, Any] = {"dtype": inference_dtype(), "trust_remote_code": trust_remote_code}
    quantization = quantization_config(load_in_8bit, load_in_4bit)
    if quantization is not None:
        options |= {"quantization_config": quantization, "device_map": {"": device()}}
    try:
        model = AutoModelForCausalLM.from_pretrained(resolve_model(name), **options)
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name}: cannot be loaded: {_line(error)}") from None
    if adapter:
        adapted = apply_adapter(model, adapter, name)
        model = adapted if quantization is not None else adapted.merge_and_unload()
    if quantization is None:
        model.to(device())
    return model.eval()


def quantization_config(
    load_in_8bit: bool, load_in_4bit: bool, double: bool = True
) -> BitsAndBytesConfig | None:
    """How a base is quantized by bitsandbytes: in 8 bits, in NF4, or None for not at all.

    Args:
        double: of NF4, quantize the quantization constants as well.

    Raises:
        UserError: both are asked for.
    """
    from trl import ModelConfig, get_quantization_config

    if load_in_8bit and load_in_4bit:
        raise UserError("a model is loaded in 8 bits or in 4 bits, not in both")
    asked = ModelConfig(
        load_in_8bit=load_in_8bit,
        load_in_4bit=load_in_4bit,
        use_bnb_nested_quant=double,
        dtype=str(inference_dtype()).removeprefix("torch."),
    )
    return get_quantization_config(asked)


# --- adapters -------------------------------------------------------------------------------------


def apply_adapter(
    model: PreTrainedModel, adapter: str, base: str, low_cpu_mem_usage: bool = False
) -> PeftModel:
    """A model with an adapter in it, which must have been made for this very architecture.

    PEFT ignores weights that the model has no place for, and leaves places without weights as they
    were drawn. So an adapter of another base would change a part of the model without a word.

    Args:
        adapter: a folder or a hub id.
        base: what the model is called in a message.
        low_cpu_mem_usage: put the weights in as they are, as a model on the meta device needs it.

    Raises:
        UserError: the adapter cannot be loaded, or its weights are not those that the model needs.
    """
    options = {"low_cpu_mem_usage": low_cpu_mem_usage}
    try:
        with warnings.catch_warnings():
            # an error below
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, adapter, **options)
        # Loaded once more, because only so it tells which weights found no place.
        result = adapted.load_adapter(adapter, "default", **options)
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"{adapter}: cannot be applied to {base}: {_line(error, 300)}") from None
    if result.unexpected_keys or result.missing_keys:
        adapted.unload()  # the model is again what it was
        counts = []
        for keys, what in (
            (result.unexpected_keys, "weights that the base has no place for"),
            (result.missing_keys, "places of the base without weights"),
        ):
            if keys:
                counts.append(f"{len(keys)} {what} ({sorted(keys)[0]}, …)")
        raise UserError(f"{adapter}: is no adapter of {base}: {' and '.join(counts)}")
    return adapted


def check_adapter(
    base: str,
    adapter: str,
    *,
    config: PreTrainedConfig | None = None,
    kind: Any = AutoModelForCausalLM,
    trust_remote_code: bool = False,
) -> None:
    """Refuse an adapter that is not the base's, before any weight of the base is loaded.

    Args:
        base: folder, hub id or the name of the bundled model.
        config: of the base, where it differs from the base's own (fewer layers, other labels).
        kind: the class that the adapter was trained with.

    Raises:
        UserError: see `apply_adapter`.
    """
    code = {"trust_remote_code": trust_remote_code}
    try:
        if config is None:
            config = AutoConfig.from_pretrained(resolve_model(base), **code)
        with torch.device("meta"):
            empty = kind.from_config(config, **code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{base}: cannot be loaded: {_line(error)}") from None
    apply_adapter(empty, adapter, base, low_cpu_mem_usage=True)


def adapter_file(adapter: str, name: str) -> Path:
    """A file of an adapter: a folder, or a repository of the hub.

    Raises:
        UserError: there is none.
    """
    try:
        return Path(cached_file(adapter, name)).resolve()
    except (OSError, ValueError, TypeError) as error:
        where = f"--lora_weights {adapter}"
        raise UserError(f"{where}: no {name} there ({_line(error, 150)})") from None


def _rank(adapter: str) -> int:
    """The smallest rank that vLLM knows and that holds the adapter's."""
    path = adapter_file(adapter, "adapter_config.json")
    try:
        rank = json.loads(path.read_text(encoding="utf-8"))["r"]
        return min(known for known in (8, 16, 32, 64, 128, 256, 320, 512) if known >= rank)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{adapter}: no LoRA adapter that vLLM can serve ({error!r:.80})") from None


def _line(error: Exception, length: int = 200) -> str:
    """The beginning of what an error says, in one line."""
    return " ".join(str(error).split())[:length] or type(error).__name__
