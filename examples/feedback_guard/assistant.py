"""Responses of the assistant to prompts: several a prompt, each with its seed, in its own chat template."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from config import Config, engine_options
from records import Loaded, Row, digest, identity
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer

from common.bundled import resolve_model
from common.conversation import UserError, pair
from common.engines import Decoding, Engine, load_engine, prompts_at_once
from common.fit import config_positions
from common.keep import KeptRows
from common.refusal import classify
from common.templates import encode, render_chat

logger = logging.getLogger("feedback_guard")
Ids = tuple[int, ...]  # a prompt's tokens
KINDS = {"full_refusal": "full", "partial_refusal": "partial"}


def respond(config: Config, asked: Sequence[tuple[Row, Row]], guard: Loaded, path: Path) -> None:
    """Fill in the responses of records, recorded or generated."""
    if config.llama.use_recorded:
        for row, record in asked:
            text = row["model_output"]  # of a row without one: an error row
            said = {"text": text.strip() if isinstance(text, str) else "", "seed": None, "human": row["output_unsafe"]}
            record["responses"] = [_response(said, record["query"], True)]
        return
    answers = generated(config, [row["input"] for row, _ in asked], path, guard)
    for (_, record), each in zip(asked, answers, strict=True):
        record["responses"] = [_response(answer, record["query"], False) for answer in each]


def _response(answer: Row, prompt: str, recorded: bool) -> Row:
    text = answer["text"]
    kind = classify(text, prompt).kind if text else "empty"
    error = answer.get("error") or (None if text else "empty response: nothing to judge")
    return {
        **{"text": text, "seed": answer["seed"], "recorded": recorded, "unsafe": None, "decided": None},
        **{"categories": None, "error": error, "refusal": KINDS.get(kind, kind)},
        **{"judge_unsafe": None, "human_unsafe": answer.get("human")},
    }


def generated(config: Config, prompts: Sequence[str], path: Path, guard: Loaded) -> list[list[Row]]:
    """`samples` responses {text, seed, error} to each prompt, in the assistant's own chat template.

    What failed is not kept: the next run asks for it again.

    Raises:
        UserError: a server refuses the key, or fails time after time; what it answered is kept.
    """
    llama = config.llama
    tokenizer, window = assistant_tokenizer(llama.model_path)
    chats = [render_chat(tokenizer, pair(text)) for text in prompts]
    ids = [tuple(one) for one in encode(tokenizer, chats, add_special_tokens=False)]
    room = window - llama.max_tokens
    fitting = sorted({one for one in ids if len(one) <= room}, key=lambda one: (-len(one), one))
    with KeptRows(path) as kept:
        failed = _generate_missing(config, tokenizer, fitting, kept, guard)
        said = {**kept, **failed}
    long = f"the prompt is longer than the {room} tokens that the assistant has"
    key = _key_of(config)
    out = []
    for one in ids:
        if len(one) > room:
            out.append([{"text": "", "seed": None, "error": long}] * llama.samples)
        else:
            out.append([said[key(number, one)] for number in range(llama.samples)])
    return out


def _key_of(config: Config) -> Callable[[int, Ids], str]:
    """What the key of a response is, by its number and its prompt."""
    llama = config.llama
    salt = [identity(llama.model_path), llama.engine, llama.temperature, llama.top_p]
    salt += [llama.max_tokens, config.seed]
    return lambda number, ids: digest([salt, number, list(ids)])


def _generate_missing(
    config: Config, tokenizer: Any, prompts: Sequence[Ids], kept: KeptRows, guard: Loaded
) -> dict[str, Row]:
    """Generate and keep the responses that are missing; those that failed, by their key.

    Args:
        prompts: token ids, the longest first.
        guard: is let go first, because not both models fit into memory.
    """
    llama = config.llama
    size = _together(config)
    chunks = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    decoding = Decoding(llama.max_tokens, temperature=llama.temperature, top_p=llama.top_p)
    engine = Loaded(lambda: assistant(config, tokenizer, size))
    key, failed = _key_of(config), {}
    total = len(prompts) * llama.samples
    with tqdm(total=total, unit="response") as bar:
        for number, (n, chunk) in product(range(llama.samples), enumerate(chunks)):
            seed = config.seed + number + llama.samples * n
            missing = [ids for ids in chunk if key(number, ids) not in kept]
            bar.update(len(chunk) - len(missing))
            if not missing:
                continue
            # Of transformers a batch is drawn together: drawn again, it must be whole to be the same.
            asked = chunk if llama.engine == "transformers" else missing
            guard.free()
            written = engine.get().complete(list(map(list, asked)), replace(decoding, seed=seed))
            for i, completion in written:
                known = key(number, asked[i])
                if known in kept:
                    continue
                row = {"key": known, "text": completion.text.strip(), "seed": seed}
                if completion.error is None:
                    kept.append(row)
                else:
                    failed[known] = row | {"error": completion.error}
                bar.update()
    engine.free()
    if failed:
        first = next(iter(failed.values()))["error"]
        what = f"{len(failed)} of {total} responses failed ({first})"
        logger.warning("%s; run process.py again for them", what)
    return failed


def _together(config: Config) -> int:
    """How many prompts are asked together. Samples depend on it, so that it is the same for a killed run."""
    llama = config.llama
    if llama.engine == "transformers":
        return prompts_at_once(llama.batch_size)
    return 64 if llama.engine == "server" else 512


def assistant_tokenizer(name: str) -> tuple[Any, int]:
    """The assistant's tokenizer, and how many tokens it sees. Raises UserError where there is none that can chat."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(name))
        known = AutoConfig.from_pretrained(resolve_model(name))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"llama.model_path {name}: {str(error).strip().splitlines()[0]:.200}") from None
    if not tokenizer.chat_template:
        raise UserError(f"llama.model_path {name}: has no chat template; choose an instruction-tuned model")
    return tokenizer, config_positions(known) or 1 << 30


def assistant(config: Config, tokenizer: Any, size: int) -> Engine:
    """The loaded assistant.

    Args:
        size: prompts that transformers completes at a time.
    """
    llama = config.llama
    options = engine_options(llama)
    if llama.engine == "transformers":
        options["batch_size"] = size
    return load_engine(model=llama.model_path, tokenizer=tokenizer, **options)
