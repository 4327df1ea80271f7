"""Answers of a model, with or without an adapter, to the prompts of evaluation files.

# after the quickstart: all fifteen evaluation files with one loaded model
python generate_answers.py --base_model smollm2-135m-instruct --lora_weights output/quickstart \
    --prompt_template_path chat --input_path
    ../../data/sample/cross_task_defense/evaluation_stripped \
    --output_path output/answers --num_beams 1 --max_new_tokens 48

# the paper's command
python generate_answers.py --prompt_template_path configs/llama2.json --input_path data/evaluation/test_summarize.json \
    --output_path output/answers --lora_weights output/llama2-summarize-10 --load_8bit

# vLLM in this process; a server, which must not add decoding defaults of the model's own
#   vllm serve … --generation-config vllm --enable-lora --lora-modules defence=output/quickstart
python generate_answers.py … --engine vllm --num_beams 1
python generate_answers.py … --engine server --server_url http://127.0.0.1:8000/v1 --server_model defence --num_beams 1

Writes <output_path>/<lora_weights>/<name of the input file>. What was interrupted goes on where it
stopped. A prompt that fails has null for its output and says why under `errors`; the exit code is
then 1, and the same command asks for these prompts again.
"""

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from flags import run
from prompts import encode_prompts, load_template
from transformers import AutoConfig, AutoTokenizer

from common.bundled import resolve_model
from common.conversation import UserError
from common.data import read_json
from common.engines import (
    CHUNK,
    Completion,
    Decoding,
    Engine,
    adapter_file,
    check_engine,
    load_engine,
    prompts_at_once,
)
from common.keep import digest, fingerprint, generate
from common.run import check_output_folder, manifest, write_json

logger = logging.getLogger("cross_task_defense")


def generate_answers(
    *,
    input_path: str,
    output_path: str,
    base_model: str | None = None,
    lora_weights: str | None = None,
    prompt_template_path: str = "alpaca",
    load_8bit: bool = False,
    max_new_tokens: int = 256,
    num_beams: int = 4,
    temperature: float = 0.0,
    top_k: int = 40,
    top_p: float = 0.75,
    engine: str = "transformers",
    server_url: str = "http://127.0.0.1:8000/v1",
    server_model: str | None = None,
    server_timeout: float = 120.0,
    batch_size: int | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    seed: int = 42,
) -> None:
    """Answer every prompt of the input files.

    Args:
        input_path: files {"instructions": […], "inputs": […]}, comma-separated, or a folder of
        them.
        base_model: hub id, folder, or smollm2-135m-instruct; default: what the adapter names.
        lora_weights: an adapter folder, or a hub id; without it the base model answers.
        prompt_template_path: alpaca, llama2, llama2-legacy, a JSON file, or chat (the tokenizer's
        own).
        load_8bit: base in 8 bits (bitsandbytes).
        temperature: 0 decodes deterministically, and top_k and top_p are not used; above 0 they
        are.
        engine: transformers, vllm or server.
        server_url: of an OpenAI-compatible server; its key is read from SERVER_API_KEY.
        server_model: the name that the server knows the model or its adapter by; default:
        base_model.
        server_timeout: seconds of silence that end a request to the server; it is tried again.
        batch_size: prompts at a time (transformers).
        overwrite: answer again although the output is there with other settings.
    """
    options: dict[str, Any] = {"adapter": lora_weights, "trust_remote_code": trust_remote_code}
    options["load_in_8bit"] = load_8bit or None
    if engine == "transformers":
        options["batch_size"] = batch_size
    if engine == "server":
        options |= {"server_url": server_url, "server_model": server_model}
        options["server_timeout"] = server_timeout
    check_engine(engine, options, num_beams)
    decoding = Decoding(max_new_tokens, num_beams, temperature, top_k, top_p, seed)
    check_output_folder(output_path)
    base_model = base_model or adapter_base(lora_weights)
    template = load_template(prompt_template_path)
    files = [(path, *read_prompts(path)) for path in input_files(input_path)]
    parameters = {
        "model": base_model,
        "revision": model_revision(base_model, trust_remote_code),
        "model_sha256": fingerprint(base_model),
        "prompt_template": prompt_template_path,
        "prompt_template_text": template,
        "lora_weights": lora_weights,
        "load_8bit": load_8bit,
        "engine": engine,
        "decoding": asdict(decoding),
    }
    if lora_weights:
        weights = adapter_file(lora_weights, "adapter_model.safetensors")
        parameters["adapter_sha256"] = fingerprint(lora_weights)
        parameters["trained_on"] = trained_on(weights.with_name("run.json"))
    if engine == "server":
        parameters |= {"server_url": server_url.rpartition("@")[2], "server_model": server_model}
    parts = [
        part for part in Path(lora_weights or base_model).parts if part not in ("/", ".", "..")
    ]
    folder = Path(output_path).joinpath(*parts)
    size = {"transformers": prompts_at_once(batch_size, num_beams), "vllm": CHUNK}.get(engine)
    salt = [parameters, size]
    job = digest([salt, [path.name for path, *_ in files]])[:12]
    files = [
        file
        for file in files
        if not finished(folder / file[0].name, parameters, file[1:], overwrite)
    ]
    if not files:
        logger.info("All answers are there already.")
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_model(base_model), trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"--base_model {base_model}: {str(error).strip().splitlines()[0]:.200}"
        ) from None
    prompts = [encode_prompts(template, tokenizer, rows(*content)) for _, *content in files]

    @cache
    def loaded() -> Engine:
        return load_engine(engine, base_model, tokenizer, **options)

    def ask(batch: int, missing: Sequence[list[int]]) -> Iterator[tuple[int, Completion]]:
        # What transformers draws depends on all that it has drawn with a seed before, so that each
        # batch has its own.
        own = seed + batch if engine == "transformers" else seed
        return loaded().complete(missing, replace(decoding, seed=own))

    # All files are one list: short ones fill the batches of each other.
    partial = folder / f"{job}.partial.jsonl"
    every = [ids for file in prompts for ids in file]
    answers = iter(generate(ask, every, partial, salt, size=size))
    failed = 0
    for path, instructions, inputs in files:
        said = [next(answers) for _ in instructions]
        failed += write_answers(folder / path.name, instructions, inputs, said, parameters)
    logger.info("Wrote %d files to %s", len(files), folder)
    if failed:
        total = sum(map(len, prompts))
        sys.exit(f"error: {failed} of {total} prompts have no answer; run it again to ask for them")
    partial.unlink(missing_ok=True)


def write_answers(
    path: Path,
    instructions: list[str],
    inputs: list[str | None],
    said: Sequence[Completion],
    parameters: dict[str, Any],
) -> int:
    """Write a file of answers, and return how many of them failed."""
    run = manifest([parameters])
    content = {
        "parameters": parameters,
        "inputs": inputs or [None] * len(instructions),
        "instructions": instructions,
        "outputs": [one.text.strip() if one.error is None else None for one in said],
        "run": {key: run[key] for key in ("versions", "git", "hardware")},
    }
    errors = {str(i): one.error for i, one in enumerate(said, 1) if one.error is not None}
    for number, error in errors.items():
        logger.error("%s, item %s: %s", path.name, number, error)
    if errors:
        content["errors"] = errors
    write_json(path, content)
    return len(errors)


def adapter_base(lora_weights: str | None) -> str:
    """The base model that an adapter names."""
    if lora_weights is None:
        raise UserError("--base_model: is needed without --lora_weights")
    path = adapter_file(lora_weights, "adapter_config.json")
    try:
        return json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: names no base model ({error!r:.100})") from None


def model_revision(base_model: str, trust_remote_code: bool) -> str | None:
    """The commit of a model of the hub; None for a folder."""
    try:
        config = AutoConfig.from_pretrained(
            resolve_model(base_model), trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"--base_model {base_model}: {str(error).strip().splitlines()[0]:.200}"
        ) from None
    return getattr(config, "_commit_hash", None)


def trained_on(path: Path) -> str | None:
    """The name of an adapter's training set, from what train.py wrote beside it."""
    try:
        return Path(json.loads(path.read_text(encoding="utf-8"))["arguments"]["data_path"]).stem
    except (OSError, ValueError, KeyError, TypeError):
        return None


def input_files(spec: str) -> list[Path]:
    """Existing files; of a folder those that end with .json."""
    files: list[Path] = []
    for name in (word.strip() for word in spec.split(",")):
        path = Path(name)
        found = sorted(path.glob("*.json")) if path.is_dir() else [path] * path.is_file()
        if not found:
            raise UserError(f"--input_path {name}: no such file, or a folder without .json files")
        files += found
    if len({path.name for path in files}) < len(files):
        raise UserError("--input_path: two files of one name would overwrite each other's answers")
    return files


def read_prompts(path: Path) -> tuple[list[str], list[str | None]]:
    """instructions and inputs of an evaluation file; inputs may be empty."""
    content = read_json(path)
    if not isinstance(content, dict) or "instructions" not in content:
        raise UserError(
            f'{path}: expected {{"instructions": […], "inputs": […]}}, found {content!r:.80}'
        )
    instructions = content["instructions"]
    inputs = content.get("inputs") or []
    if not isinstance(instructions, list) or not instructions or not isinstance(inputs, list):
        raise UserError(
            f"{path}, field instructions: expected a list of texts, found {instructions!r:.60}"
        )
    if inputs and len(inputs) != len(instructions):
        raise UserError(
            f"{path}, field inputs: {len(inputs)} for {len(instructions)} instructions; expected 0 or as many"
        )
    for name, values, kinds in (
        ("instructions", instructions, str),
        ("inputs", inputs, str | None),
    ):
        for number, value in enumerate(values, 1):
            if not isinstance(value, kinds) or (kinds is str and not value.strip()):
                raise UserError(
                    f"{path}, field {name}, item {number}: expected text, found {value!r:.60}"
                )
    return instructions, inputs


def rows(instructions: list[str], inputs: list[str | None]) -> list[tuple[str, str | None]]:
    return list(zip(instructions, inputs or [None] * len(instructions), strict=True))


def finished(path: Path, parameters: dict[str, Any], prompts: tuple, overwrite: bool) -> bool:
    """Whether all answers are there, to these prompts with these parameters.

    Raises:
        UserError: others are there, and may not be overwritten.
    """
    if not path.is_file() or overwrite:
        return False
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        given = (there["instructions"], there["inputs"])
        known = {**there["parameters"]}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: holds something else than answers; pass --overwrite") from None
    hint = "pass --overwrite, or choose another --output_path"
    differing = {*known, *parameters} - {
        key for key in parameters if known.get(key) == parameters[key]
    }
    if differing:
        names = ", ".join(sorted(differing))
        raise UserError(f"{path}: holds answers with other parameters ({names} differ); {hint}")
    if given != (prompts[0], prompts[1] or [None] * len(prompts[0])):
        raise UserError(f"{path}: holds answers to other prompts; {hint}")
    return not there.get("errors")


if __name__ == "__main__":
    run(generate_answers)
