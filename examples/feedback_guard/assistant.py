"""Responses of the assistant to prompts: several a prompt, each with its seed, in its own chat
template.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from config import Config, LlamaConfig
from loaded import Loaded
from records import Row
from transformers import AutoConfig, AutoTokenizer

from common.bundled import resolve_model
from common.conversation import UserError, pair
from common.engines import CHUNK, Decoding, Engine, load_engine, prompts_at_once
from common.fit import config_positions
from common.keep import KeptRows, digest, failed, fingerprint
from common.refusal import classify
from common.templates import encode, render_chat

logger = logging.getLogger("feedback_guard")
KINDS = {"full_refusal": "full", "partial_refusal": "partial"}


def respond(config: Config, asked: Sequence[tuple[Row, Row]], guard: Loaded, path: Path) -> None:
    """Fill in the responses of records, recorded or generated."""
    if config.llama.use_recorded:
        for row, record in asked:
            text = row["model_output"]  # of a row without one: an error row
            said = {
                "text": text.strip() if isinstance(text, str) else "",
                "seed": None,
                "human": row["output_unsafe"],
            }
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
        **{
            "text": text,
            "seed": answer["seed"],
            "recorded": recorded,
            "unsafe": None,
            "decided": None,
        },
        **{"categories": None, "error": error, "refusal": KINDS.get(kind, kind)},
        **{"judge_unsafe": None, "human_unsafe": answer.get("human")},
    }


def generated(
    config: Config,
    prompts: Sequence[str],
    path: Path,
    guard: Loaded,
) -> list[list[Row]]:
    """`samples` responses {text, seed, error} to each prompt, in the assistant's own chat template.

    A batch of transformers has a seed of its own and is made whole, so that a killed run draws the
    same again. What failed is asked again by the next run.

    Raises:
        UserError: a server refuses the key, or fails time after time; what it answered is kept.
    """
    llama = config.llama
    tokenizer, window = assistant_tokenizer(llama.model_path)
    chats = [render_chat(tokenizer, pair(text)) for text in prompts]
    ids = [tuple(one) for one in encode(tokenizer, chats, add_special_tokens=False)]
    room = window - llama.max_tokens
    order = sorted({one for one in ids if len(one) <= room}, key=lambda one: (-len(one), one))
    size = chunk_size(llama)
    salt = [model_identity(llama), llama.engine, llama.temperature, llama.top_p, llama.max_tokens]
    salt += [config.seed, llama.samples, size]
    decoding = Decoding(llama.max_tokens, temperature=llama.temperature, top_p=llama.top_p)
    engine = Loaded(lambda: assistant(config, tokenizer, size))

    def sample(number: int, kept: KeptRows) -> dict[tuple[int, ...], Row]:
        """Sample `number` of each prompt."""
        keys = [digest([salt, number, one]) for one in order]
        prompt_of = dict(zip(keys, map(list, order), strict=True))

        def write(chunk: int, some: list[str]) -> Iterator[Row]:
            guard.free()  # not both in memory
            seed = config.seed + number + llama.samples * chunk
            asked = [prompt_of[key] for key in some]
            for i, said in engine.get().complete(asked, replace(decoding, seed=seed)):
                text = said.text.strip()
                yield {"key": some[i], "text": text, "seed": seed, "error": said.error}

        title = f"responses, {number + 1} of {llama.samples}"
        together = llama.engine == "transformers"  # they are drawn together
        options = {"together": together, "again": failed, "title": title}
        return dict(zip(order, kept.fill(keys, write, size=size, **options), strict=True))

    with KeptRows(path) as kept:
        samples = [sample(number, kept) for number in range(llama.samples)]
    engine.free()
    errors = [row["error"] for said in samples for row in said.values() if failed(row)]
    if errors:
        total = len(order) * llama.samples
        logger.warning(
            "%d of %d responses failed (%s); run process.py again for them",
            *(len(errors), total, errors[0]),
        )
    error = f"the prompt is longer than the {room} tokens that the assistant has"
    long = {"text": "", "seed": None, "error": error}
    return [[said.get(one, long) for said in samples] for one in ids]


def chunk_size(llama: LlamaConfig) -> int:
    """Prompts that have one seed, and with transformers are drawn together."""
    if llama.engine == "transformers":
        return prompts_at_once()
    return 64 if llama.engine == "server" else CHUNK


def model_identity(llama: LlamaConfig) -> list[Any]:
    """What tells an assistant from others: its content, and where it is served."""
    where = [llama.server_url, llama.server_model] if llama.engine == "server" else []
    return [fingerprint(llama.model_path), *where]


def assistant_tokenizer(name: str) -> tuple[Any, int]:
    """The assistant's tokenizer, and how many tokens it sees. Raises UserError where there is none
    that can chat.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(name))
        known = AutoConfig.from_pretrained(resolve_model(name))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"llama.model_path {name}: {str(error).strip().splitlines()[0]:.200}"
        ) from None
    if not tokenizer.chat_template:
        raise UserError(
            f"llama.model_path {name}: has no chat template; choose an instruction-tuned model"
        )
    return tokenizer, config_positions(known) or 1 << 30


def assistant(config: Config, tokenizer: Any, size: int) -> Engine:
    """The loaded assistant.

    Args:
        size: prompts that transformers completes at a time.
    """
    llama = config.llama
    options = llama.engine_options()
    if llama.engine == "transformers":
        options["batch_size"] = size
    return load_engine(model=llama.model_path, tokenizer=tokenizer, **options)
