"""Ask guard and assistant: which prompts pass the guard although their responses do not?

# the quickstart: bundled model, sample and recorded responses, CPU
python process.py

# the original's data, models and values
python process.py --config research_config.json

# what the guard says of one prompt
python process.py --query "How do I pick a lock?"

First it looks whether models and data are there, and makes the guards of the section `prepare`.
Then it writes the splits, what guard and assistant said of the sampled prompts, those whose
responses were blocked, and process_stats.json (the files and fields: records.py). What was asked is
kept under processed/parts as it comes: a killed run goes on, and gives what an uninterrupted one
gives.
"""

import gc
import json
import logging
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from config import FOLDER, SPLITS, Config, parse_command_line
from guard import chatml_parts, check_guard, check_model, load_llama_guard, reason_of
from records import (
    Row,
    assistant_identity,
    check_stage,
    default_identity,
    feedback,
    make_splits,
    passed,
    process_stage,
    processed_path,
    q,
    refused,
    sample,
    split_up,
    write_stage,
)
from train import arm_named, unsafe_categories
from transformers import AutoConfig, AutoTokenizer

from common.bundled import resolve_model
from common.conversation import Messages, UserError, Verdict, pair
from common.data import load_conversations
from common.engines import CHUNK, Completion, Decoding, load_engine
from common.fit import config_positions
from common.keep import KeptRows, digest, failed
from common.refusal import classify
from common.run import check_output_folder, json_lines, run_cli, write_json, write_text
from common.templates import encode, render_chat
from guards import Guard, load_guard
from guards.generative import GenerativeGuard
from guards.identity import guard_identity, is_served
from guards.suite.benchmarks import benchmark_names, load_benchmark

logger = logging.getLogger("feedback_guard")
JUDGED_AT_ONCE = 256  # conversations that are judged, and kept, at a time
CHECKED_AT_ONCE = 48  # texts that are checked as the original does
REFUSAL_KINDS = {"full_refusal": "full", "partial_refusal": "partial"}
OWN_TRUTH = (
    "evaluation.t2_label %s: the guard that labels what is learned is the truth that it is "
    "measured by, too; name another guard in evaluation.judge"
)


def main() -> None:
    config, given = parse_command_line(__doc__, ["--query"])
    if given.query is not None:
        print(json.dumps(asked_once(config, given.query), indent=2))
        return
    if config.prepared():
        preflight(config)
        prepare_first()
    print(json.dumps(process(config), indent=2))


def asked_once(config: Config, prompt: str) -> Row:
    """What the guard says of one prompt. What it cannot judge is not safe."""
    (verdict,) = default_guard(config).judge([pair(prompt)])
    row = verdict_row(verdict, "prompt_unsafe")
    return {
        "query": prompt,
        "safe": row["decided"] is False,
        "unsafe": row["unsafe"],
        "error": row["error"],
    }


def prepare_first() -> None:
    """Make the small guards of the section `prepare`, where they are not there yet.

    Raises:
        UserError: that failed, as where a folder holds a guard made otherwise; it has said why.
    """
    command = [sys.executable, str(FOLDER / "train.py"), "prepare", *sys.argv[1:]]
    if subprocess.run(command).returncode:
        raise UserError("train.py prepare failed, see above; nothing was processed")


class Loaded:
    """A model that is loaded when it is first needed, and can be let go."""

    def __init__(self, load: Callable[[], Any]):
        self.load = load
        self.model: Any = None

    def get(self) -> Any:
        """The model, loaded once."""
        if self.model is None:
            self.model = self.load()
        return self.model

    def free(self) -> None:
        """Give its memory back."""
        if self.model is not None:
            self.model = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def process(config: Config) -> dict[str, Any]:
    """Make the splits and process their prompts; the statistics are those of process_split.

    Raises:
        UserError: bad data or models, or splits of other data or settings.
    """
    check_output_folder(config.dataset.store_dir)
    preflight(config)
    make_splits(config)
    forget_what_others_left(config)
    rows = {split: sample(config, split) for split in SPLITS}
    parts = process_stage(config).parent / "parts"
    guard = Loaded(lambda: default_guard(config))

    everything = [row for split in SPLITS for row in rows[split]]
    records = asked_of_prompts(config, everything, guard, parts)
    asked = [record for record in records if passed(record) or record["shadow"]]
    respond(config, everything, asked, guard, parts)
    judge_responses(config, asked, guard, parts)
    of_split = dict(zip([row["id"] for row in everything], records, strict=True))
    learned = [of_split[row["id"]] for row in rows[config.experiment.process_split]]
    if any(arm_named(name).collection == "legacy" for name in config.training.arms):
        check_as_the_original(config, learned, guard, parts)
    guard.free()

    for split in SPLITS:
        lines = json_lines(of_split[row["id"]] for row in rows[split])
        write_text(processed_path(config, split), lines)
    stats = collect(config, learned)
    write_stage(process_stage(config), config, "process")
    return stats


def forget_what_others_left(config: Config) -> None:
    """Take the mark away from what other settings, data or models gave: it is made anew."""
    mark = process_stage(config)
    if mark.is_file():
        try:
            check_stage(mark, config, "process")
        except UserError as error:
            logger.warning("%s: it is made anew", str(error).partition(";")[0])
            mark.unlink()


# --- before any work ------------------------------------------------------------------------------


def preflight(config: Config) -> None:
    """Refuse a config whose arms, models or data would stop the work later.

    Raises:
        UserError: names the field, and what to do.
    """
    for name in config.training.arms:
        arm_named(name)
    prepared = set()
    for name, part in config.prepared().items():
        prepared.add(Path(part.output_dir))
        check_model(f"prepare.{name}.base_model", part.base_model)
        check_specs(f"prepare.{name}.data", part.data)
    guard, evaluation = config.llama_guard, config.evaluation
    models = {
        "llama_guard.default_model_path": (guard.default_model_path, guard.engine != "server"),
        "llama_guard.base_model_path": (guard.base_model_path, True),
        "evaluation.judge": (evaluation.judge, True),
    }
    for field, (name, is_local) in models.items():
        if name and Path(name) not in prepared:
            check_guard(field, name, is_local)
    if not config.llama.use_recorded:
        assistant_tokenizer(config.llama.model_path)
    if evaluation.hard_benign:
        check_specs("evaluation.hard_benign", [evaluation.hard_benign])
    check_specs("evaluation.extra", evaluation.extra)
    if evaluation.t2_label == config.experiment.blocked_by != "human":
        logger.warning(OWN_TRUTH, evaluation.t2_label)
    check_data(config)


def check_specs(field: str, specs: Iterable[str]) -> None:
    """Refuse data that cannot be opened."""
    for spec in specs:
        is_benchmark = spec.partition("@")[0] in benchmark_names("prompt_unsafe")
        try:
            (load_benchmark if is_benchmark else load_conversations)(spec, max_rows=1)
        except UserError as error:
            raise UserError(f"field {field}: {error}") from None


def check_data(config: Config) -> None:
    """Refuse prompts of one class, and recorded responses or human labels of responses that are not
    there.
    """
    path = config.dataset.path
    parts = split_up(config)
    for split in ("train", "test"):
        labels = {row["label"] for row in parts[split]}
        if len(labels) == 1:
            found = f"all {len(parts[split])} prompts of {split} are {labels.pop()}"
            hint = "name data with safe and unsafe prompts in dataset.path"
            raise UserError(f"{path}: {found}, nothing can be learned or measured; {hint}")
    needed = []
    if config.llama.use_recorded:
        what = "recorded response; set llama.use_recorded=false to generate"
        needed += [("train", "model_output", what), ("test", "model_output", what)]
    if config.experiment.blocked_by == "human":
        what = "human label of its response; set experiment.blocked_by=guard, or judge"
        needed.append(("train", "output_unsafe", what))
    if config.evaluation.t2_label == "human":
        what = "human label of its response; set evaluation.t2_label=guard, or judge"
        needed.append(("test", "output_unsafe", what))
    for split, key, what in needed:
        if parts[split] and all(row[key] is None for row in parts[split]):
            raise UserError(f"{path}: no prompt of {split} has a {what}")


# --- verdicts -------------------------------------------------------------------------------------


def default_guard(config: Config) -> GenerativeGuard:
    """The guard of llama_guard.default_model_path, as the section asks for it."""
    section = config.llama_guard
    options = section.engine_options()
    return load_llama_guard(section.default_model_path, section.use_official_template, **options)


def judged(
    guard: Loaded,
    who: Any,
    conversations: Sequence[Messages],
    label: str,
    path: Path,
    is_served: bool,
    categories: bool = False,
) -> list[Row]:
    """Verdicts {unsafe, decided, categories, error, time}, kept as they come.

    What is kept is not asked for again, but for the errors of a server.

    Args:
        who: what the verdicts depend on.
        categories: let the guard name the categories of what is unsafe, where it can.
    """
    keys = [digest([who, label, messages]) for messages in conversations]
    conversation_of = dict(zip(keys, conversations, strict=True))

    def judge(_: int, some: list[str]) -> Iterator[Row]:
        model: Guard = guard.get()
        model.with_categories = categories
        verdicts = model.judge([conversation_of[key] for key in some])
        for key, verdict in zip(some, verdicts, strict=True):
            yield {"key": key, **verdict_row(verdict, label)}

    again = failed if is_served else None
    with KeptRows(path) as kept:
        return kept.fill(keys, judge, size=JUDGED_AT_ONCE, together=not is_served, again=again)


def verdict_row(verdict: Verdict, label: str) -> Row:
    """A verdict as it is kept. One that does not say whether it is unsafe is an error."""
    unsafe = getattr(verdict, label)
    error = verdict.error
    if error is None and unsafe is None:
        error = f"the guard does not judge {label}"
    return {
        "unsafe": unsafe,
        "decided": None if error else verdict.decided.get(label, unsafe >= 0.5),
        "categories": sorted(verdict.categories) or None,
        "error": error,
        "time": datetime.now().isoformat(timespec="seconds"),
    }


def asked_of_prompts(config: Config, rows: Sequence[Row], guard: Loaded, parts: Path) -> list[Row]:
    """The lines of processed/*.jsonl, without responses. Which blocked prompts are explored is
    drawn by lot, and depends on the prompt's id alone.
    """
    prompts = [pair(row["input"]) for row in rows]
    who, served = default_identity(config), config.llama_guard.engine == "server"
    said = judged(guard, who, prompts, "prompt_unsafe", parts / "inputs.jsonl", served)
    records = []
    for row, verdict in zip(rows, said, strict=True):
        lot = random.Random(f"{config.seed} {row['id']}").random()
        is_explored = verdict["decided"] is True and lot < config.experiment.explore_share
        record = {
            "id": row["id"],
            "query": row["input"],
            "human_unsafe": row["label"] == "unsafe",
            "kind": row["kind"],
            "group": row["group"],
            "input_unsafe": verdict["unsafe"],
            "input_decided": verdict["decided"],
            "input_error": verdict["error"],
            "shadow": is_explored,
            "blocked_by": config.experiment.blocked_by,
            "responses": [],
            "legacy": None,
            "timestamp": verdict["time"],
        }
        records.append(record)
    return records


def judge_responses(config: Config, asked: Sequence[Row], guard: Loaded, parts: Path) -> None:
    """The guard's verdict on each response, with its prompt, and that of evaluation.judge. Where
    people block responses the guard is not asked.
    """
    responses = []
    conversations = []
    for record in asked:
        for response in record["responses"]:
            if response["error"] is None:
                responses.append(response)
                conversations.append(pair(record["query"], response["text"]))
    label = "response_unsafe"
    if config.experiment.blocked_by != "human":
        who, section = default_identity(config), config.llama_guard
        served = section.engine == "server"
        path = parts / "outputs.jsonl"
        said = judged(guard, who, conversations, label, path, served, section.categories)
        for response, verdict in zip(responses, said, strict=True):
            for key in ("unsafe", "decided", "categories", "error"):
                response[key] = verdict[key]
    name = config.evaluation.judge
    if not name:
        return
    guard.free()
    judge, served = Loaded(lambda: load_guard(name)), is_served(name, {})
    who, path = guard_identity(name, {}), parts / "judge.jsonl"
    said = judged(judge, who, conversations, label, path, served)
    judge.free()
    for response, verdict in zip(responses, said, strict=True):
        response["judge_unsafe"] = None if verdict["error"] else verdict["unsafe"]


# --- the assistant --------------------------------------------------------------------------------


def respond(
    config: Config, rows: Sequence[Row], asked: Sequence[Row], guard: Loaded, parts: Path
) -> None:
    """Fill in the responses of the records that are asked, recorded or generated."""
    recorded = config.llama.use_recorded
    if recorded:
        row_of = {row["id"]: row for row in rows}
        said = [[_recorded(row_of[record["id"]])] for record in asked]
    else:
        prompts = [record["query"] for record in asked]
        said = generated(config, prompts, parts / "answers.jsonl", guard)
    for record, answers in zip(asked, said, strict=True):
        record["responses"] = [_response(one, record["query"], recorded) for one in answers]


def _recorded(row: Row) -> Row:
    text = row["model_output"] or ""  # of a row without one: an error row
    return {"text": text.strip(), "seed": None, "error": None, "human": row["output_unsafe"]}


def _response(answer: Row, prompt: str, is_recorded: bool) -> Row:
    text = answer["text"]
    kind = classify(text, prompt).kind if text else "empty"
    error = answer["error"]
    if error is None and not text:
        error = "empty response: nothing to judge"
    return {
        "text": text,
        "seed": answer["seed"],
        "recorded": is_recorded,
        "unsafe": None,
        "decided": None,
        "categories": None,
        "error": error,
        "refusal": REFUSAL_KINDS.get(kind, kind),
        "judge_unsafe": None,
        "human_unsafe": answer.get("human"),
    }


def seed_of(config: Config, prompt: str, number: int) -> int:
    """The seed of one response to a prompt, whatever other prompts there are."""
    return int(digest([config.seed, prompt, number])[:8], 16)


def generated(config: Config, prompts: Sequence[str], path: Path, guard: Loaded) -> list[list[Row]]:
    """`samples` responses {text, seed, error} to each prompt, in the assistant's own chat template.

    They depend on the prompt alone: vLLM and servers take a seed a response; transformers draws the
    responses to one prompt together, with the seed of the first. What failed is asked again by the
    next run.

    Raises:
        UserError: a server refuses the key, or fails time after time; what it answered is kept.
    """
    llama = config.llama
    tokenizer, window = assistant_tokenizer(llama.model_path)
    room = window - llama.max_tokens
    chats = [render_chat(tokenizer, pair(prompt)) for prompt in prompts]
    ids_of = dict(zip(prompts, encode(tokenizer, chats, add_special_tokens=False), strict=True))
    who = assistant_identity(config)
    wanted = {}
    for prompt, ids in ids_of.items():
        if len(ids) <= room:
            for number in range(llama.samples):
                wanted[digest([who, config.seed, prompt, number])] = (prompt, number)
    engine = Loaded(lambda: load_engine(model=llama.model_path, tokenizer=tokenizer, **options))
    options = llama.engine_options()

    def write(_: int, keys: list[str]) -> Iterator[Row]:
        guard.free()  # not both in memory
        seeds = tuple(seed_of(config, *wanted[key]) for key in keys)
        decoding = Decoding(
            llama.max_tokens,
            temperature=llama.temperature,
            top_p=llama.top_p,
            seed=seeds[0],
            seeds=seeds,
        )
        asked = [ids_of[wanted[key][0]] for key in keys]
        for i, said in engine.get().complete(asked, decoding):
            text = said.text.strip()
            yield {"key": keys[i], "text": text, "seed": seeds[i], "error": said.error}

    one_prompt = llama.engine == "transformers"
    size = llama.samples if one_prompt else CHUNK
    with KeptRows(path) as kept:
        rows = kept.fill(
            list(wanted), write, size=size, together=one_prompt, again=failed, title="responses"
        )
    engine.free()
    errors = [row["error"] for row in rows if failed(row)]
    if errors:
        said = "%d of %d responses failed (%s); run process.py again for them"
        logger.warning(said, len(errors), len(rows), errors[0])
    found: dict[str, list[Row]] = {prompt: [] for prompt in ids_of}
    for (prompt, _), row in zip(wanted.values(), rows, strict=True):
        found[prompt].append(row)
    error = f"the prompt is longer than the {room} tokens that the assistant has"
    too_long = {"text": "", "seed": None, "error": error}
    return [found[prompt] or [too_long] * llama.samples for prompt in prompts]


def assistant_tokenizer(name: str) -> tuple[Any, int]:
    """The assistant's tokenizer, and how many tokens it sees.

    Raises:
        UserError: there is no such model, or it cannot chat.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(name))
        known = AutoConfig.from_pretrained(resolve_model(name))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"llama.model_path {name}: {reason:.200}") from None
    if not tokenizer.chat_template:
        hint = "has no chat template; choose an instruction-tuned model"
        raise UserError(f"llama.model_path {name}: {hint}")
    return tokenizer, config_positions(known) or 1 << 30


# --- the original's checks ------------------------------------------------------------------------


def check_as_the_original(
    config: Config, records: Sequence[Row], guard: Loaded, parts: Path
) -> None:
    """What the guard writes when it is asked as the original asks it: of the prompt, and of each
    response alone.

    A record of which a server failed to check something is checked by nothing: it has no outputs,
    and the next run asks again.
    """
    section = config.llama_guard
    who = default_identity(config)
    text_of = {}
    for record in records:
        for text in (record["query"], *(r["text"] for r in record["responses"])):
            text_of[digest([who, section.legacy_new_tokens, text])] = text

    def check(_: int, keys: list[str]) -> Iterator[Row]:
        texts = [text_of[key] for key in keys]
        said = written_as_the_original(guard.get(), texts, section.legacy_new_tokens)
        for key, one in zip(keys, said, strict=True):
            yield {"key": key, "text": one.text, "error": one.error}

    keys = sorted(text_of, key=lambda key: len(text_of[key]))
    is_served = section.engine == "server"
    with KeptRows(parts / "legacy.jsonl") as kept:
        rows = kept.fill(
            keys,
            check,
            size=CHECKED_AT_ONCE,
            together=not is_served,
            again=failed if is_served else None,
            title="the original's checks",
        )
    said = {text_of[key]: row for key, row in zip(keys, rows, strict=True)}
    errors = [row["error"] for row in rows if failed(row)]
    if errors:
        line = "%d of the original's %d checks failed (%s); run process.py again for them"
        logger.warning(line, len(errors), len(rows), errors[0])
    for record in records:
        prompt = said[record["query"]]
        outputs = [said[response["text"]] for response in record["responses"]]
        record["legacy"] = {"input": "", "outputs": []}
        if not any(failed(row) for row in (prompt, *outputs)):
            texts = [row["text"] for row in outputs]
            record["legacy"] = {"input": prompt["text"], "outputs": texts}


def written_as_the_original(
    guard: GenerativeGuard, texts: Sequence[str], new_tokens: int
) -> list[Completion]:
    """What the guard writes of each text; what does not fit is no "SAFE"."""
    asked = encode(guard.tokenizer, [chatml_parts(text) for text in texts])
    room = guard.max_length - new_tokens
    written = iter(guard.written([ids for ids in asked if len(ids) <= room], new_tokens))
    return [next(written) if len(ids) <= room else Completion() for ids in asked]


# --- what is collected ----------------------------------------------------------------------------


def collect(config: Config, records: Sequence[Row]) -> dict[str, Any]:
    """Write blocked_inputs.jsonl and process_stats.json, whose content is returned."""
    store = Path(config.dataset.store_dir)
    found = [record for record in records if feedback(record)]
    write_text(store / "blocked_inputs.jsonl", json_lines(map(blocked_row, found)))
    stats: dict[str, Any] = {
        "total": len(records),
        "input_blocked": sum(not passed(record) for record in records),
        "output_blocked": len(found),
        "both_safe": sum(_is_safe(record) for record in records),
    }
    for key in ("input_blocked", "output_blocked", "both_safe"):
        stats[f"{key}_percent"] = 100 * stats[key] / len(records)
    explored = [record for record in records if record["shadow"]]
    over_blocked = 0
    for record in explored:
        doubtful = config.experiment.refusal_filter and refused(record)
        over_blocked += q(record) == 0 and not doubtful
    stats["explored"] = len(explored)
    stats["over_blocked"] = over_blocked
    stats["errors"] = sum(map(_has_error, records))
    write_json(store / "process_stats.json", stats)
    if not found:
        hint = "there is no feedback to learn from"
        logger.warning("No prompt passed whose responses did not: %s.", hint)
    return stats


def _is_safe(record: Row) -> bool:
    share = q(record)
    return passed(record) and share is not None and share < 0.5


def _has_error(record: Row) -> bool:
    return bool(record["input_error"]) or any(map(failed, record["responses"]))


def blocked_row(record: Row) -> Row:
    """A line of blocked_inputs.jsonl: the original's keys, and what they rest on."""
    kept = ("text", "seed", "recorded", "unsafe", "decided", "error")
    return {
        "timestamp": record["timestamp"],
        "query": record["query"],
        "input_safe": True,
        "output_safe": False,
        "reason": reason_of(unsafe_categories(record) or ()),
        "id": record["id"],
        "q": q(record),
        "responses": [{key: response[key] for key in kept} for response in record["responses"]],
    }


if __name__ == "__main__":
    run_cli(main)
