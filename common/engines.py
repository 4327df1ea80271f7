"""Causal language models behind one interface: transformers, vLLM in this process, or a server.

Every engine writes on after prompts (`complete`) and reads what comes next (`next_token`). It gives
an error a prompt: one that fails takes nothing from the others. Prompts are token ids, so that
every engine sees the same prompt, and no text can become a control token on the way.
"""

import copy
import inspect
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from common.bundled import resolve_model
from common.conversation import UserError, check_option, check_url, one_line
from common.fit import check_ids, padding_id, positions
from common.prefix import can_share, shared_prefix
from common.run import BROKEN, device, in_threads, inference_dtype, loading_model

Prompts = Sequence[list[int]]  # token ids

CHUNK = 512  # prompts that vLLM is given at a time, so that a kill loses little
BATCH_TOKENS = 1 << 15  # tokens that transformers reads in one pass, with padding
RETRIES = 5  # tries of the openai client after the first
PATIENCE = 8  # requests that fail one after another before a server is not asked any more
BUSY = (408, 409, 429)  # HTTP statuses that may pass
FINAL = {  # HTTP statuses that every other request would get, too
    401: "the server refused the key",
    403: "the server refused the key",
    404: "the server knows no such model or URL",
}


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
    # one a prompt, in place of `seed`; transformers, which draws a batch at once, does not know them
    seeds: tuple[int, ...] = ()

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


@dataclass(frozen=True)
class NextToken:
    """What comes after a prompt: natural log-probabilities of the candidates in their order, and
    the id of the most likely token. With an `error` there is neither.
    """

    logprobs: list[float] = field(default_factory=list)
    top: int | None = None
    error: str | None = None


class EngineStopped(UserError):
    """An engine that is not asked any more; what it did answer has been handed out before."""


# --- engines --------------------------------------------------------------------------------------


class Engine(ABC):
    """A causal language model behind any engine.

    `window` is how many tokens it sees at most, None where that is not known.
    """

    window: int | None = None
    has_beams = False

    def complete(
        self, prompts: Prompts, decoding: Decoding, skip_special_tokens: bool = True
    ) -> Iterator[tuple[int, Completion]]:
        """What is written after each prompt: (index of the prompt, completion), as they come.

        Args:
            skip_special_tokens: leave special tokens out of the text.

        Raises:
            UserError: `decoding` asks for beams that the engine lacks, or for more than it sees.
            EngineStopped: after what was answered, where the rest is not asked any more.
        """
        check_beams(self, decoding.num_beams)
        new_tokens = decoding.max_new_tokens
        if self.window is not None and new_tokens >= self.window:
            what = f"the model has room for {self.window} tokens, prompt included"
            raise UserError(f"--max_new_tokens {new_tokens}: {what}")

        def ask(fitting):
            seeds = tuple(decoding.seeds[i] for i in fitting if decoding.seeds)
            some = [prompts[i] for i in fitting]
            return self._complete(some, replace(decoding, seeds=seeds), skip_special_tokens)

        return self._ask_what_fits(prompts, new_tokens, Completion, ask)

    def completions(
        self, prompts: Prompts, decoding: Decoding, skip_special_tokens: bool = True
    ) -> list[Completion]:
        """`complete` in the order of the prompts; what is not asked any more is an error, too."""
        answers = self.complete(prompts, decoding, skip_special_tokens)
        return _in_order(answers, len(prompts), Completion)

    def next_token(
        self, prompts: Prompts, candidates: Sequence[int], bar: Mapping[str, Any] | None = None
    ) -> list[NextToken]:
        """What comes after each prompt, in the order of the prompts.

        Args:
            candidates: ids of the tokens whose log-probabilities are wanted.
            bar: how tqdm shows it (`common.run.judging_bar`); None: not at all.
        """

        def ask(fitting):
            return self._next_token([prompts[i] for i in fitting], list(candidates))

        answers = self._ask_what_fits(prompts, 1, NextToken, ask)
        shown = tqdm(answers, total=len(prompts), **(bar or {"disable": True}))
        return _in_order(shown, len(prompts), NextToken)

    def _ask_what_fits(self, prompts, new_tokens, kind, ask):
        fitting = []
        for i, ids in enumerate(prompts):
            refusal = self._refusal(ids, new_tokens)
            if refusal is None:
                fitting.append(i)
            else:
                yield i, kind(error=refusal)
        if fitting:
            for number, answer in ask(fitting):
                yield fitting[number], answer

    def _refusal(self, ids, new_tokens) -> str | None:
        """Why a prompt cannot be run. One that is too long is not cut: it would lose the task,
        which stands last.
        """
        if self.window is not None and len(ids) > self.window - new_tokens:
            room = self.window - new_tokens
            return f"the prompt has {len(ids)} tokens; the model has room for {room}"
        return None

    @abstractmethod
    def _complete(self, prompts, decoding, skip_special_tokens):
        """`complete` for prompts that fit, at least one."""

    @abstractmethod
    def _next_token(self, prompts, candidates):
        """(index of the prompt, next token), as they come, for prompts that fit, at least one."""


def _in_order(answers, count, kind) -> list[Any]:
    found = {}
    left = None
    try:
        for i, answer in answers:
            found[i] = answer
    except EngineStopped as stopped:
        left = kind(error=f"not asked: {stopped}")
    return [found.get(i, left) for i in range(count)]


# --- transformers ---------------------------------------------------------------------------------


def prompts_at_once(batch_size: int | None = None, num_beams: int = 1) -> int:
    """How many prompts transformers completes at a time: 24, fastest on a CPU; on a GPU 64 beams.

    Args:
        batch_size: what the user asked for, if anything.
    """
    if batch_size is not None:
        return batch_size
    if device().type == "cpu":
        return 24
    return max(1, 64 // num_beams)


class TransformersEngine(Engine):
    """transformers in this process: stock `generate` over left-padded batches of similar length.

    A next token costs one forward pass, and what all prompts begin with is run once.
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
        trust_remote_code: bool = False,
    ):
        """Load the model, its adapter merged.

        Args:
            model: folder, hub id or the name of the bundled model.
            adapter: a LoRA adapter, folder or hub id.
            load_in_8bit: 8 bits a weight (bitsandbytes).
            load_in_4bit: NF4 with double quantization (bitsandbytes).
            batch_size: prompts in a batch; None leaves it to `prompts_at_once`.

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
        self.window = positions(self.model)

    def _refusal(self, ids, new_tokens):
        try:
            check_ids([ids], self.tokenizer, self.model)
        except UserError as error:  # the model has no embedding for a token
            return str(error)
        return super()._refusal(ids, new_tokens)

    def _complete(self, prompts, decoding, skip_special_tokens):
        if decoding.temperature:
            torch.manual_seed(decoding.seed)
        size = prompts_at_once(self.batch_size, decoding.num_beams)
        for batch in batches(prompts, size):
            asked = [prompts[i] for i in batch]
            width = max(map(len, asked))
            written = self._generate(asked, decoding).sequences[:, width:]
            texts = self.tokenizer.batch_decode(written, skip_special_tokens=skip_special_tokens)
            for i, text in zip(batch, texts, strict=True):
                yield i, Completion(text)

    def _next_token(self, prompts, candidates):
        shared = 0
        cache = None
        if can_share(self.model.config, max(map(len, prompts))):
            shared = shared_prefix(prompts)
        if shared:
            cache = self._cache_of(prompts[0][:shared])
        for batch in batches(prompts, prompts_at_once(self.batch_size), shared=shared):
            asked = [prompts[i] for i in batch]
            (logits,) = self._generate(asked, Decoding(1), shared, cache).logits
            logprobs = logits.float().log_softmax(-1)
            wanted = logprobs[:, candidates].tolist()
            tops = logprobs.argmax(-1).tolist()
            for i, values, top in zip(batch, wanted, tops, strict=True):
                yield i, NextToken(values, top)

    @torch.inference_mode()
    def _cache_of(self, ids):
        beginning = torch.tensor([ids], device=self.model.device)
        return self.model(beginning, past_key_values=DynamicCache()).past_key_values

    @torch.inference_mode()
    def _generate(self, prompts, decoding, shared=0, cache=None):
        """What `generate` says of a batch: the sequences, and the logits of a single new token.

        Args:
            cache: the keys and values of the first `shared` tokens, which are those of all prompts.
        """
        pad = padding_id(self.tokenizer, self.model)
        width = max(map(len, prompts))
        ids = []
        mask = []
        for prompt in prompts:
            gap = width - len(prompt)
            ids.append(prompt[:shared] + [pad] * gap + prompt[shared:])
            own = len(prompt) - shared
            mask.append([1] * shared + [0] * gap + [1] * own)
        if cache is not None:
            cache = copy.deepcopy(cache)
            cache.batch_repeat_interleave(len(prompts))
        draws = decoding.temperature > 0
        return self.model.generate(
            torch.tensor(ids, device=self.model.device),
            attention_mask=torch.tensor(mask, device=self.model.device),
            past_key_values=cache,
            max_new_tokens=decoding.max_new_tokens,
            num_beams=decoding.num_beams,
            do_sample=draws,
            # a model's own generation_config.json may set these
            temperature=decoding.temperature if draws else None,
            top_k=decoding.top_k if draws else None,
            top_p=decoding.top_p if draws else None,
            pad_token_id=pad,
            return_dict_in_generate=True,
            output_logits=decoding.max_new_tokens == 1,
        )


def batches(
    prompts: Prompts, size: int, budget: int = BATCH_TOKENS, shared: int = 0
) -> Iterator[list[int]]:
    """Indices of prompts of similar length, `size` at most, which have `budget` tokens with padding.

    The longest come first: if memory does not suffice, that shows at once.

    Args:
        shared: tokens that all of them begin with, and that do not count.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    while order:
        width = len(prompts[order[0]]) - shared
        count = max(1, min(size, budget // width))
        yield order[:count]
        order = order[count:]


# --- vLLM -----------------------------------------------------------------------------------------


class VllmEngine(Engine):
    """vLLM in this process, with its own prefix caching, batching and LoRA support."""

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        adapter: str | None = None,
        trust_remote_code: bool = False,
    ):
        """Load the model.

        Raises:
            UserError: vLLM is not installed, cannot load the model, or the adapter does not fit it.
        """
        self.tokenizer = tokenizer
        os.environ.setdefault(
            "VLLM_NO_USAGE_STATS", "1"
        )  # else it reports each start to its makers
        try:
            from vllm import LLM
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            hint = "see the extra [vllm] in pyproject.toml"
            raise UserError(f"--engine vllm: vLLM is missing ({error}); {hint}") from None
        options: dict[str, Any] = {"dtype": dtype_name(), "trust_remote_code": trust_remote_code}
        self.request = None
        if adapter:
            check_adapter(model, adapter, trust_remote_code)
            folder = adapter_file(adapter, "adapter_config.json").parent
            self.request = LoRARequest("adapter", 1, str(folder))
            rank = PeftConfig.from_pretrained(adapter).r
            options["enable_lora"] = True
            # vLLM knows powers of 2 from 8 on
            options["max_lora_rank"] = max(8, 1 << (rank - 1).bit_length())
        if device().type == "cpu":
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
            options["enforce_eager"] = True  # compiling takes minutes there, and gains little
        with loading_model(model, flag="--engine vllm"):  # such as too little memory
            self.llm = LLM(resolve_model(model), **options)
        self.window = self.llm.llm_engine.model_config.max_model_len

    def _generate(self, prompts, seeds=(), **params) -> Iterator[tuple[int, Any]]:
        """(index of the prompt, output). Its ids are decoded here, because vLLM drops what is left
        of a character at the end.
        """
        from vllm import SamplingParams

        own = [{"seed": seed} for seed in seeds] or [{}] * len(prompts)
        every = [SamplingParams(detokenize=False, **params | one) for one in own]
        for start in range(0, len(prompts), CHUNK):
            asked = [{"prompt_token_ids": ids} for ids in prompts[start : start + CHUNK]]
            sampling = every[start : start + CHUNK]
            answers = self.llm.generate(asked, sampling, lora_request=self.request, use_tqdm=False)
            for i, answer in enumerate(answers, start):
                yield i, answer.outputs[0]

    def _complete(self, prompts, decoding, skip_special_tokens):
        params = {"max_tokens": decoding.max_new_tokens, "temperature": decoding.temperature}
        if decoding.temperature:
            params |= {"top_p": decoding.top_p, "top_k": decoding.top_k, "seed": decoding.seed}
        for i, output in self._generate(prompts, decoding.seeds, **params):
            ids = output.token_ids
            text = self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
            yield i, Completion(text)

    def _next_token(self, prompts, candidates):
        params = {"temperature": 0.0, "max_tokens": 1, "logprob_token_ids": candidates}
        for i, output in self._generate(prompts, **params):
            (logprobs,) = output.logprobs
            values = [logprobs[candidate].logprob for candidate in candidates]
            yield i, NextToken(values, output.token_ids[0])


# --- a server -------------------------------------------------------------------------------------


class ServerEngine(Engine):
    """An OpenAI-compatible server that takes token ids for prompts, such as `vllm serve`.

    The key, where one is needed, comes from SERVER_API_KEY. The openai client tries again on 408,
    409, 429, 5xx, time-outs and broken connections. What fails for good is an error of that prompt.
    A server that refuses the key or does not know the model, and one that fails time after time, is
    not asked any more (`EngineStopped`).

    Next tokens need a server that tells the probabilities of the very candidates
    (`logprob_token_ids`), as vLLM does.
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
        keeps_asking: bool = False,
    ):
        """Make the client; nothing is asked yet.

        Args:
            server_url: such as http://127.0.0.1:8000/v1.
            server_model: the name that the server knows the model or its adapter by.
            server_timeout: seconds of silence that end a request.
            concurrency: requests at a time.
            keeps_asking: each call asks anew, whatever failed for good in the one before. For what
                runs for ever, while the server behind it may be mended.

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
        self.concurrency = concurrency
        self.keeps_asking = keeps_asking
        self.stopped: str | None = None  # why the server is not asked any more
        self.failures = 0  # one after another
        self.lock = threading.Lock()
        self.client = openai.OpenAI(
            base_url=self.url,
            api_key=os.environ.get("SERVER_API_KEY") or "none",  # OPENAI_API_KEY is OpenAI's
            max_retries=RETRIES,
            timeout=server_timeout,
        )

    def _complete(self, prompts, decoding, skip_special_tokens):
        more: dict[str, Any] = {"skip_special_tokens": skip_special_tokens}
        options = {
            "max_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature,
            "top_p": 1.0,
            "seed": decoding.seed,
            "extra_body": more,
        }
        if decoding.temperature:
            options["top_p"] = decoding.top_p
            if decoding.top_k:
                more["top_k"] = decoding.top_k
        for i, choice, error in self._ask(prompts, options, decoding.seeds):
            yield i, Completion(error=error) if error else Completion(choice.text)

    def _next_token(self, prompts, candidates):
        more: dict[str, Any] = {"return_tokens_as_token_ids": True}
        if candidates:
            more["logprob_token_ids"] = candidates
        options = {
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": 20,
            "extra_body": more,
        }
        for i, choice, error in self._ask(prompts, options):
            yield i, NextToken(error=error) if error else _next_token_of(choice, candidates)

    def _ask(self, prompts, options, seeds=()) -> Iterator[tuple[int, Any, str | None]]:
        """(index of the prompt, first choice of the answer, error), as they come.

        Raises:
            EngineStopped: after what was answered, where the rest was not asked.
        """
        self.failures = 0
        if self.keeps_asking:
            self.stopped = None
        answered = 0
        jobs = []
        for i, ids in enumerate(prompts):
            own = {"seed": seeds[i]} if seeds else {}
            jobs.append({"prompt": ids, **options, **own})
        for i, (choice, error) in in_threads(self._answer, jobs, self.concurrency):
            if choice or error:
                answered += 1
                yield i, choice, error
        if self.stopped:
            what = f"{len(prompts) - answered} of {len(prompts)} prompts were not asked"
            raise EngineStopped(f"{self.url}: {self.stopped}; {what}, run it again for them")

    def _answer(self, asked):
        """The first choice of the server's answer, or an error; neither where it is not asked."""
        if self.stopped:
            return None, None
        try:
            said = self.client.completions.create(model=self.model, **asked)
            choice = said.choices[0]
            if not isinstance(choice.text, str):
                raise TypeError("it is no text")
        except (AttributeError, TypeError, LookupError):  # such as a proxy's page, with HTTP 200
            why = f"no completion in its answer: {said!r:.80}"
            self._count_failure(why, 500)
            return None, why
        except Exception as error:  # of the client, whose errors share no base class
            why = _without_key(error)
            self._count_failure(why, getattr(error, "status_code", 500))
            return None, why
        self.failures = 0
        return choice, None

    def _count_failure(self, why, status) -> None:
        with self.lock:
            if status in FINAL:
                self.stopped = f"{FINAL[status]}: {why}"
            elif status >= 500 or status in BUSY:
                self.failures += 1
            else:  # a working server refused this one prompt
                self.failures = 0
            patience = max(PATIENCE, self.concurrency)
            if self.failures >= patience and not self.stopped:
                count = f"{patience} requests failed one after another"
                self.stopped = f"{count}, the last: {why}"


def _without_key(error) -> str:
    """What an error says, in one line and without the key."""
    text = one_line(error, 1000)
    key = os.environ.get("SERVER_API_KEY")
    if key:
        text = text.replace(key, "…")
    if isinstance(error, ValueError):  # of the client, which could not read a proxy's page
        text = f"its answer is broken JSON ({text})"
    return text[:150]


def _next_token_of(choice, candidates) -> NextToken:
    """The next token as a server tells it, with tokens as vLLM calls them: token_id:42."""
    known = {}
    try:
        (named,) = choice.logprobs.top_logprobs
        for name, logprob in named.items():
            known[int(name.removeprefix("token_id:"))] = float(logprob)
        top = int(choice.logprobs.tokens[0].removeprefix("token_id:"))
    except (AttributeError, TypeError, ValueError, LookupError):
        return NextToken(error="the server names no tokens by id")
    missing = [i for i in candidates if i not in known]
    if missing:
        what = f"{len(missing)} of the {len(candidates)} tokens that were asked for"
        hint = "use one that takes logprob_token_ids"
        return NextToken(error=f"the server leaves out {what}; {hint}")
    return NextToken([known[i] for i in candidates], top)


# --- an engine by its name ------------------------------------------------------------------------

ENGINES = {"transformers": TransformersEngine, "vllm": VllmEngine, "server": ServerEngine}
LEFT_TO_A_SERVER = {"adapter", "trust_remote_code"}  # options that its operator has taken care of


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
    used = {}
    for name in options_of(engine):
        if options.get(name) is not None:
            used[name] = options[name]
    return ENGINES[engine](model, tokenizer, **used)


def options_of(engine: str) -> set[str]:
    """What an engine can be told beside model and tokenizer."""
    return set(inspect.signature(ENGINES[engine]).parameters)


def check_engine(engine: str, options: Mapping[str, Any], num_beams: int = 1) -> None:
    """Refuse what `load_engine` or `complete` would refuse, before anything is loaded.

    Raises:
        UserError: an unknown engine, an option that is another engine's, a server without URL, an
            adapter that the server is not told of, or beams that the engine lacks.
    """
    check_option("--engine", engine, ENGINES)
    given = {name for name, value in options.items() if value is not None}
    wrong = given - options_of(engine) - LEFT_TO_A_SERVER
    if wrong:
        raise UserError(f"--engine {engine}: takes no {', '.join(sorted(wrong))}")
    check_beams(ENGINES[engine], num_beams)
    if engine == "server" and "server_url" not in given:
        hint = "such as http://127.0.0.1:8000/v1"
        raise UserError(f"--engine server: name its --server_url, {hint}")
    if engine == "server" and "adapter" in given and "server_model" not in given:
        # Under the base's name the base alone would answer.
        what = f"by what name the server knows {options['adapter']}"
        raise UserError(f"--engine server: --server_model must say {what}")


def check_beams(engine: Engine | type[Engine], num_beams: int) -> None:
    """Refuse beams that an engine lacks."""
    if num_beams > 1 and not engine.has_beams:
        raise UserError("--num_beams: beam search needs --engine transformers")


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
    with loading_model(name):
        model = AutoModelForCausalLM.from_pretrained(resolve_model(name), **options)
    if adapter:
        model = apply_adapter(model, adapter, name)
    if quantization is not None:
        return model.eval()
    if adapter:
        model = model.merge_and_unload()
    return model.to(device()).eval()


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
        dtype=dtype_name(),
    )
    return get_quantization_config(asked)


def dtype_name() -> str:
    """The number format of weights, as vLLM and TRL call it."""
    return str(inference_dtype()).removeprefix("torch.")


# --- adapters -------------------------------------------------------------------------------------


def apply_adapter(model: PreTrainedModel, adapter: str, base: str) -> PeftModel:
    """A model with an adapter in it, which must have been made for this very architecture.

    PEFT ignores weights that the model has no place for, and leaves places without weights as they
    were drawn. So an adapter of another base would change a part of the model without a word.

    Args:
        adapter: a folder or a hub id.
        base: what the model is called in a message.

    Raises:
        UserError: the adapter cannot be loaded, or its weights are not those that the model needs.
    """
    options = {"low_cpu_mem_usage": model.device.type == "meta"}
    try:
        config = PeftConfig.from_pretrained(adapter)
        config.inference_mode = True
        config.base_model_name_or_path = None  # PEFT would warn of every other name
        adapted = get_peft_model(model, config, **options)
        result = adapted.load_adapter(adapter, "default", **options)
    except (*BROKEN, TypeError) as error:
        raise UserError(f"{adapter}: cannot be applied to {base}: {one_line(error, 300)}") from None
    if result.unexpected_keys or result.missing_keys:
        adapted.unload()  # the model is again what it was
        surplus = f"{len(result.unexpected_keys)} weights that the base has no place for"
        lack = f"{len(result.missing_keys)} places of the base without weights"
        raise UserError(f"{adapter}: is no adapter of {base}: {surplus}, {lack}")
    return adapted


def check_adapter(base: str, adapter: str, trust_remote_code: bool = False) -> None:
    """Refuse an adapter that is not the base's, before any weight of the base is loaded.

    Args:
        base: folder, hub id or the name of the bundled model.

    Raises:
        UserError: see `apply_adapter`.
    """
    code = {"trust_remote_code": trust_remote_code}
    with loading_model(base):
        config = AutoConfig.from_pretrained(resolve_model(base), **code)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, **code)
    apply_adapter(empty, adapter, base)


def adapter_file(adapter: str, name: str) -> Path:
    """A file of an adapter: a folder, or a repository of the hub.

    Raises:
        UserError: there is none.
    """
    try:
        return Path(cached_file(adapter, name)).resolve()
    except (OSError, ValueError, TypeError) as error:
        where = f"--lora_weights {adapter}"
        raise UserError(f"{where}: no {name} there ({one_line(error, 150)})") from None
