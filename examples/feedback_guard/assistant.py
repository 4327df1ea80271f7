"""Responses of the assistant to prompts: several a prompt, each with its seed, in its own chat template."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from config import Config
from records import Loaded, Row, digest, identity, kept_lines
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer

from common.bundled import resolve_model
from common.conversation import UserError, pair
from common.fit import config_positions
from common.generation import (
    Decoding,
    Engine,
    load_causal_lm,
    refuse_long,
    server_engine,
    start_vllm,
    transformers_engine,
)
from common.refusal import classify
from common.run import device, json_lines
from common.templates import encode, render_chat

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

    A batch has a seed of its own and is kept whole, so that a killed run draws the same again.
    """
    llama = config.llama
    tokenizer, window = assistant_tokenizer(llama.model_path)
    ids = encode(tokenizer, [render_chat(tokenizer, pair(text)) for text in prompts], add_special_tokens=False)
    room = window - llama.max_tokens
    order = sorted({tuple(one) for one in ids if len(one) <= room}, key=lambda one: (-len(one), one))
    size = 64 if llama.engine == "server" else 512
    if llama.engine == "transformers":
        size = llama.batch_size or (24 if device().type == "cpu" else 64)
    salt = [identity(llama.model_path), llama.engine, llama.temperature, llama.top_p, llama.max_tokens, config.seed]
    key = lambda number, one: digest([salt, number, list(one)])  # noqa: E731
    kept, engines = kept_lines(path), Loaded(lambda: assistant(config, tokenizer, size))
    chunks = [(n, order[start : start + size]) for n, start in enumerate(range(0, len(order), size))]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file, tqdm(total=len(order) * llama.samples, unit="response") as bar:
        for number in range(llama.samples):
            for n, chunk in chunks:
                seed = config.seed + number + llama.samples * n
                if any(key(number, one) not in kept for one in chunk):
                    guard.free()  # not both in memory
                    texts = dict(engines.get()(seed)([list(one) for one in chunk]))
                    fresh = {key(number, one): texts[i].strip() for i, one in enumerate(chunk)}
                    lines = [{"key": k, "text": text, "seed": seed} for k, text in fresh.items() if k not in kept]
                    file.write(json_lines(lines))
                    file.flush()
                    kept |= {line["key"]: line for line in lines}
                bar.update(len(chunk))
    engines.free()
    long = {"text": "", "seed": None, "error": f"the prompt is longer than the {room} tokens that the assistant has"}
    return [
        [kept[key(number, one)] if len(one) <= room else long for number in range(llama.samples)]
        for one in map(tuple, ids)
    ]


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


def assistant(config: Config, tokenizer: Any, size: int) -> Callable[[int], Engine]:
    """The loaded assistant: an engine for each seed."""
    llama = config.llama
    options = {"max_new_tokens": llama.max_tokens, "temperature": llama.temperature, "top_p": llama.top_p}
    if llama.engine == "server":
        name = llama.server_model or llama.model_path
        return lambda seed: server_engine(llama.server_url, name, Decoding(**options, seed=seed))
    if llama.engine == "vllm":
        llm, _ = start_vllm(llama.model_path)
        return lambda seed: _vllm_engine(llm, Decoding(**options, seed=seed))
    model = load_causal_lm(llama.model_path)
    return lambda seed: transformers_engine(model, tokenizer, Decoding(**options, seed=seed), size)


def _vllm_engine(llm: Any, decoding: Decoding) -> Engine:
    """A loaded vLLM with another seed; `common.generation.vllm_engine` would load it again for each."""
    from vllm import SamplingParams

    options = {"temperature": decoding.temperature, "top_p": decoding.top_p if decoding.temperature else 1.0}
    params = SamplingParams(max_tokens=decoding.max_new_tokens, seed=decoding.seed, detokenize=False, **options)
    window = llm.llm_engine.model_config.max_model_len

    def run(prompts: Sequence[list[int]]) -> Iterator[tuple[int, str]]:
        refuse_long(prompts, window - decoding.max_new_tokens)
        for i, output in enumerate(llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)):
            yield i, llm.get_tokenizer().decode(output.outputs[0].token_ids, skip_special_tokens=True)

    return run
