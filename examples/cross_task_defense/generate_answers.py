"""Answers of a model, with or without an adapter, to the prompts of evaluation files.

# after `torchrun train.py`: all fifteen evaluation files with one loaded model
python generate_answers.py --base_model smollm2-135m-instruct --lora_weights output/quickstart \
    --input_path ../../data/sample/cross_task_defense/evaluation_stripped \
    --prompt_template_path chat --output_path output/answers --num_beams 1 --max_new_tokens 48
# and of the untrained model, which evaluate.py compares it with
python generate_answers.py --base_model smollm2-135m-instruct \
    --input_path ../../data/sample/cross_task_defense/evaluation_stripped \
    --prompt_template_path chat --output_path output/answers --num_beams 1 --max_new_tokens 48

# the paper's command, and the same for its base
python generate_answers.py --prompt_template_path configs/llama2.json \
    --input_path data/evaluation/test_summarize.json \
    --output_path output/answers --lora_weights output/llama2-summarize-10 --load_8bit
python generate_answers.py --prompt_template_path configs/llama2.json \
    --input_path data/evaluation/test_summarize.json \
    --output_path output/answers --base_model meta-llama/Llama-2-7b-hf --load_8bit

# vLLM in this process; a server, which must not add decoding defaults of the model's own
#   vllm serve … --generation-config vllm --enable-lora --lora-modules defence=output/quickstart
python generate_answers.py … --engine vllm --num_beams 1
python generate_answers.py … --engine server --server_url http://127.0.0.1:8000/v1 \
    --server_model defence --num_beams 1

Writes <output_path>/<lora_weights>/<name of the input file>. What was interrupted goes on where it
stopped. A prompt that fails has null for its output and says why under `errors`; the exit code is
then 1, and the same command asks for these prompts again.
"""

import functools
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flags import run
from prompts import encode_prompts, load_template, shortened
from training_record import trained_with
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

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
from common.keep import digest, fingerprint, generate, read_json_lines
from common.run import check_output_folder, loading_model, manifest, write_json

logger = logging.getLogger("cross_task_defense")
# parameters that name what others hold: weights, the text of a template
NAMES = {"model", "revision", "lora_weights", "prompt_template", "server_url"}
NAMES |= {"trained_on", "training"}  # of an adapter, whose weights count
SEEDS_OF_A_DRAW = 100_000  # more than there are batches


@dataclass(kw_only=True)
class AnswerArguments:
    """Answer every prompt of the input files.

    Args:
        input_path: files {"instructions": […], "inputs": […]}, comma-separated, or a folder of
            them.
        base_model: hub id, folder, or smollm2-135m-instruct; default: what the adapter names.
        lora_weights: an adapter folder, or a hub id; without it the base model answers.
        prompt_template_path: alpaca, llama2, llama2-legacy, a JSON file, or chat (the tokenizer's
            own); default: what the adapter was trained with. Where nothing says it (the adapter of
            others), and without one: alpaca.
        cutoff_len: tokens of prompt and answer together. A longer prompt loses the end of its
            document, as in training, never the task.
        auth_token: of the hub, for gated models.
        load_8bit: base in 8 bits (bitsandbytes).
        temperature: 0 decodes deterministically, without top_k and top_p; above 0, a prompt that is
            there several times is drawn anew each time.
        engine: transformers, vllm or server.
        server_url: of an OpenAI-compatible server; its key is read from SERVER_API_KEY.
        server_model: the name that the server knows the model or its adapter by; default:
            base_model.
        server_timeout: seconds of silence that end a request to the server; it is tried again.
        batch_size: prompts at a time (transformers).
        overwrite: answer again although the output is there with other settings.
    """

    input_path: str
    output_path: str
    base_model: str | None = None
    lora_weights: str | None = None
    prompt_template_path: str | None = None
    cutoff_len: int | None = None
    auth_token: str | None = None
    load_8bit: bool = False
    max_new_tokens: int = 256
    num_beams: int = 4
    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.75
    engine: str = "transformers"
    server_url: str = "http://127.0.0.1:8000/v1"
    server_model: str | None = None
    server_timeout: float = 120.0
    batch_size: int | None = None
    overwrite: bool = False
    trust_remote_code: bool = False
    seed: int = 42


@dataclass(frozen=True)
class Questions:
    """A file of prompts."""

    path: Path
    instructions: list[str]
    inputs: list[str | None]


def generate_answers(**flags: Any) -> None:
    """Answer every prompt of the input files; the flags are the fields of `AnswerArguments`."""
    # --- 1. Arguments ---------------------------------------------------------------------------
    args = AnswerArguments(**flags)
    if args.auth_token:
        os.environ["HF_TOKEN"] = args.auth_token
    options = engine_options(args)
    check_engine(args.engine, options, args.num_beams)
    decoding = decoding_of(args)
    check_output_folder(args.output_path)
    args.base_model = args.base_model or adapter_base(args.lora_weights)
    template = choose_template(args)

    # --- 2. Prompts that have no answer yet -----------------------------------------------------
    files = [read_prompts(path) for path in input_files(args.input_path)]
    parameters = parameters_of(args, template, decoding)
    folder = answers_folder(args)
    done = []
    for file in files:
        done.append(finished(folder / file.path.name, parameters, file, args.overwrite))
    if all(done):
        logger.info("All answers are there already.")
        return
    tokenizer = load_part(AutoTokenizer, args)
    prompts = []  # of all files in one list: short ones fill the batches of each other
    is_open = []
    for file, is_done in zip(files, done, strict=True):
        prompts += prompt_ids(file, template, tokenizer, args)
        is_open += [not is_done] * len(file.instructions)

    # --- 3. Answers, each kept as it comes ------------------------------------------------------
    size = chunk_size(args)
    partial = folder / "answers.partial.jsonl"
    ask = asker(args, options, tokenizer, decoding)
    said: dict[int, Completion] = {}
    keys = set()
    for draw, numbers in enumerate(draws(prompts, args.temperature > 0)):
        salt = [identity(parameters), size, draw]
        for i in numbers:
            keys.add(digest([salt, prompts[i]]))  # as `generate` calls what it keeps
        numbers = [i for i in numbers if is_open[i]]
        asked = [prompts[i] for i in numbers]
        answers = generate(functools.partial(ask, draw), asked, partial, salt, size=size)
        said |= dict(zip(numbers, answers, strict=True))

    # --- 4. Files of answers --------------------------------------------------------------------
    failed = 0
    place = 0
    for file, is_done in zip(files, done, strict=True):
        numbers = range(place, place + len(file.instructions))
        place = numbers.stop
        if not is_done:
            own = [said[i] for i in numbers]
            failed += write_answers(folder / file.path.name, file, own, parameters)
    logger.info("Wrote %d files to %s", done.count(False), folder)
    if failed:
        lacking = f"{failed} of {len(said)} prompts have no answer"
        sys.exit(f"error: {lacking}; run it again to ask for them")
    if keys >= {row["key"] for row in read_json_lines(partial)}:
        partial.unlink()  # else it holds what an interrupted run was told of other files


def chunk_size(args: AnswerArguments) -> int | None:
    """Prompts that are asked together: what transformers draws depends on the size of its batches.
    None: a server takes them one by one.
    """
    sizes = {"transformers": prompts_at_once(args.batch_size, args.num_beams), "vllm": CHUNK}
    return sizes.get(args.engine)


def decoding_of(args: AnswerArguments) -> Decoding:
    """How answers are written."""
    return Decoding(
        args.max_new_tokens,
        args.num_beams,
        args.temperature,
        args.top_k,
        args.top_p,
        args.seed,
    )


def asker(
    args: AnswerArguments,
    options: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    decoding: Decoding,
) -> Callable[[int, int, Sequence[list[int]]], Iterator[tuple[int, Completion]]]:
    """A function that asks the engine, which is loaded when it is first needed."""

    @functools.cache
    def loaded() -> Engine:
        return load_engine(args.engine, args.base_model, tokenizer, **options)

    def ask(draw: int, batch: int, missing: Sequence[list[int]]):
        seed = args.seed + SEEDS_OF_A_DRAW * draw
        if args.engine == "transformers":
            # What it draws depends on all that it has drawn with a seed before, so that each batch
            # has its own.
            seed += batch
        return loaded().complete(missing, replace(decoding, seed=seed))

    return ask


def draws(prompts: list[list[int]], each: bool) -> list[list[int]]:
    """Indices of the prompts that are asked at a time. A repeated prompt is asked once, and with
    `each` as often as it is there, in a draw of its own every time.
    """
    if not each:
        return [list(range(len(prompts)))]
    seen: Counter = Counter()
    found: list[list[int]] = []
    for i, prompt in enumerate(prompts):
        draw = seen[tuple(prompt)]
        seen[tuple(prompt)] += 1
        if draw == len(found):
            found.append([])
        found[draw].append(i)
    return found


# --- What is asked, and of whom -----------------------------------------------------------------


def engine_options(args: AnswerArguments) -> dict[str, Any]:
    options: dict[str, Any] = {
        "adapter": args.lora_weights,
        "trust_remote_code": args.trust_remote_code,
        "load_in_8bit": args.load_8bit or None,
    }
    if args.engine == "transformers":
        options["batch_size"] = args.batch_size
    if args.engine == "server":
        for name in ("server_url", "server_model", "server_timeout"):
            options[name] = getattr(args, name)
    return options


def choose_template(args: AnswerArguments) -> dict[str, str] | None:
    """The template that is asked for, or else the one that the adapter was trained with.

    `args.prompt_template_path` is set to its name.
    """
    record = trained_with(args.lora_weights) if args.lora_weights else None
    asked = args.prompt_template_path
    if record is not None and asked in (None, record.prompt_template_name):
        args.prompt_template_path = record.prompt_template_name
        return record.prompt_template_text
    args.prompt_template_path = asked or "alpaca"
    template = load_template(args.prompt_template_path)
    said = None
    if record is None:
        if args.lora_weights and asked is None:
            said = "what it was trained with is not known (--prompt_template_path)"
    elif template != record.prompt_template_text:
        said = f"was trained with the prompt template {record.prompt_template_name}"
    if said:
        logger.warning(
            "%s: %s; it is asked with %s.", args.lora_weights, said, args.prompt_template_path
        )
    return template


def prompt_ids(
    file: Questions,
    template: dict[str, str] | None,
    tokenizer: PreTrainedTokenizerBase,
    args: AnswerArguments,
) -> list[list[int]]:
    """Token ids of a file's prompts; with `--cutoff_len` long documents are shortened."""
    asked = rows(file.instructions, file.inputs)
    prompts = encode_prompts(template, tokenizer, asked)
    if args.cutoff_len is None:
        return prompts
    room = args.cutoff_len - args.max_new_tokens
    for i, ids in enumerate(prompts):
        if len(ids) <= room:
            continue
        shorter = shortened(asked[i], template, tokenizer, room)
        if shorter is None:
            raise UserError(
                f"--cutoff_len {args.cutoff_len}: {file.path}, item {i + 1} has {len(ids)} tokens, "
                f"with {args.max_new_tokens} for its answer, and no document that could be "
                "shortened"
            )
        prompts[i] = shorter
    return prompts


def parameters_of(
    args: AnswerArguments, template: dict[str, str] | None, decoding: Decoding
) -> dict[str, Any]:
    """All that an answer depends on, beside its prompt."""
    parameters = {
        "model": args.base_model,
        "revision": model_revision(args),
        "model_sha256": fingerprint(args.base_model),
        "prompt_template": args.prompt_template_path,
        "prompt_template_text": template,
        "lora_weights": args.lora_weights,
        "load_8bit": args.load_8bit,
        "engine": args.engine,
        "decoding": json.loads(json.dumps(asdict(decoding))),  # as it is read again
    }
    if args.cutoff_len is not None:
        parameters["cutoff_len"] = args.cutoff_len
    if args.lora_weights:
        parameters["adapter_sha256"] = fingerprint(args.lora_weights)
        record = trained_with(args.lora_weights)
        parameters["trained_on"] = record and record.trained_on
        parameters["training"] = record and {
            "train_sha256": record.train_sha256,
            "settings": record.settings,
            "prompt_template_text": record.prompt_template_text,
        }
    if args.engine == "server":
        parameters["server_model"] = args.server_model
    return parameters


def identity(parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters without names: what is called otherwise and holds the same is the same."""
    return {name: value for name, value in parameters.items() if name not in NAMES}


def answers_folder(args: AnswerArguments) -> Path:
    """<output_path>/<adapter or base model>."""
    parts = Path(args.lora_weights or args.base_model).parts
    folder = Path(args.output_path)
    for part in parts:
        if part not in ("/", ".", ".."):
            folder /= part
    return folder


def adapter_base(lora_weights: str | None) -> str:
    """The base model that an adapter names."""
    if lora_weights is None:
        raise UserError("--base_model: is needed without --lora_weights")
    path = adapter_file(lora_weights, "adapter_config.json")
    try:
        return json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: names no base model ({error!r:.100})") from None


def model_revision(args: AnswerArguments) -> str | None:
    """The commit of a model of the hub; None for a folder."""
    return getattr(load_part(AutoConfig, args), "_commit_hash", None)


def load_part(kind: type, args: AnswerArguments) -> Any:
    """A part of the base model: its configuration, or its tokenizer."""
    with loading_model(args.base_model, flag="--base_model"):
        return kind.from_pretrained(
            resolve_model(args.base_model), trust_remote_code=args.trust_remote_code
        )


def input_files(spec: str) -> list[Path]:
    """Existing files; of a folder those that end with .json."""
    files: list[Path] = []
    for word in spec.split(","):
        name = word.strip()
        path = Path(name)
        found = sorted(path.glob("*.json"))  # of a folder
        if path.is_file():
            found = [path]
        if not found:
            raise UserError(f"--input_path {name}: no such file, or a folder without .json files")
        files += found
    if len({path.name for path in files}) < len(files):
        raise UserError("--input_path: two files of one name would overwrite each other's answers")
    return files


def read_prompts(path: Path) -> Questions:
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
            f"{path}, field inputs: {len(inputs)} for {len(instructions)} instructions; "
            "expected 0 or as many"
        )
    for number, text in enumerate(instructions, 1):
        if not isinstance(text, str) or not text.strip():
            raise not_text(path, "instructions", number, text)
    for number, text in enumerate(inputs, 1):
        if not isinstance(text, str | None):
            raise not_text(path, "inputs", number, text)
    return Questions(path, instructions, inputs)


def not_text(path: Path, name: str, number: int, value: Any) -> UserError:
    return UserError(f"{path}, field {name}, item {number}: expected text, found {value!r:.60}")


def rows(instructions: list[str], inputs: list[str | None]) -> list[tuple[str, str | None]]:
    return list(zip(instructions, inputs or [None] * len(instructions), strict=True))


# --- What is written ----------------------------------------------------------------------------


def finished(path: Path, parameters: dict[str, Any], asked: Questions, overwrite: bool) -> bool:
    """Whether all answers are there, to these prompts with these parameters.

    Raises:
        UserError: others are there, and may not be overwritten.
    """
    if not path.is_file() or overwrite:
        return False
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        given = rows(there["instructions"], there["inputs"])
        known = {**there["parameters"]}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: holds something else than answers; pass --overwrite") from None
    hint = "pass --overwrite, or choose another --output_path"
    asked_with = identity(parameters)
    differing = []
    for name in sorted({*identity(known), *asked_with}):
        if known.get(name, ...) != asked_with.get(name, ...):
            differing.append(name)
    if differing:
        raise UserError(
            f"{path}: holds answers with other parameters ({', '.join(differing)} differ); {hint}"
        )
    if given != rows(asked.instructions, asked.inputs):
        raise UserError(f"{path}: holds answers to other prompts; {hint}")
    return not there.get("errors")


def write_answers(
    path: Path, asked: Questions, said: Sequence[Completion], parameters: dict[str, Any]
) -> int:
    """Write a file of answers, and return how many of them failed."""
    run = manifest([parameters])
    outputs = []
    errors = {}
    for number, completion in enumerate(said, 1):
        if completion.error is None:
            outputs.append(completion.text.strip())
        else:
            outputs.append(None)
            errors[str(number)] = completion.error
            logger.error("%s, item %d: %s", path.name, number, completion.error)
    content = {
        "parameters": parameters,
        "inputs": asked.inputs or [None] * len(said),
        "instructions": asked.instructions,
        "outputs": outputs,
        "run": {key: run[key] for key in ("versions", "git", "hardware")},
    }
    if errors:
        content["errors"] = errors
    write_json(path, content)
    return len(errors)


if __name__ == "__main__":
    run(generate_answers, None, AnswerArguments)
