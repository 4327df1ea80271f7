"""Ask guard and assistant: which prompts pass the guard although their responses do not?

# the quickstart: bundled model, sample and recorded responses, CPU
python process.py

# the original's data, models and values
python process.py --config research_config.json

# what the guard says of one prompt, once the first command has made it
python process.py --query "How do I pick a lock?"

First it looks whether models and data are there, and makes the guards of the section `prepare`.
Then it writes the splits, what guard and assistant said of the sampled prompts, those whose
responses were blocked, and process_stats.json (the files and fields: records.py). What was asked is
kept under processed/parts as it comes: a killed run goes on, and gives what an uninterrupted one
gives.
"""

import json
import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from config import SPLITS, Config, parse_command_line
from guard import (
    TOO_LONG,
    Loaded,
    check_guard,
    give_memory_back,
    load_llama_guard,
    read_pretrained,
    reason_of,
    verdict_row,
    written_as_asked,
)
from records import (
    Row,
    assistant_identity,
    check_stage,
    default_identity,
    feedback,
    kept_rows,
    make_splits,
    outcome,
    passed,
    process_stage,
    processed_path,
    q,
    sample,
    say_own_truth,
    split_up,
    write_stage,
)
from train import arm_named, doubtful, prepare, unsafe_categories
from transformers import AutoConfig, AutoTokenizer

from common.conversation import Messages, UserError, pair
from common.data import load_conversations
from common.engines import CHUNK, Decoding, load_engine
from common.fit import config_positions
from common.keep import digest, failed
from common.refusal import classify
from common.run import check_output_folder, json_lines, run_cli, write_json, write_text
from common.templates import encode, render_chat
from guards import load_guard
from guards.base import DECIDED_BY
from guards.generative import GenerativeGuard
from guards.identity import guard_identity, is_served
from guards.suite.benchmarks import benchmark_names, load_benchmark

logger = logging.getLogger("feedback_guard")
JUDGED_AT_ONCE = 256  # conversations that are judged, and kept, at a time
CHECKED_AT_ONCE = 48  # texts that are checked as the original does
REFUSAL_KINDS = {"full_refusal": "full", "partial_refusal": "partial"}
EMPTY = "empty response: nothing to judge"
# what recorded rows must have, and what to do where none has it
RECORDED = "recorded response; set llama.use_recorded=false to generate"
BLOCKED = "human label of its response; set experiment.blocked_by=guard, or judge"
LABELLED = "human label of its response; set evaluation.t2_label=guard, or judge"


def main() -> None:
    config, given = parse_command_line(__doc__, ["--query"])
    if given.query is not None:
        print(json.dumps(asked_once(config, given.query), indent=2))
        return
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


def process(config: Config) -> dict[str, Any]:
    """Make the splits and process their prompts; the statistics are those of process_split.

    Raises:
        UserError: bad data or models, or splits of other data or settings.
    """
    check_output_folder(config.dataset.store_dir)
    parts_of_data = preflight(config)
    prepare(config)
    give_memory_back()
    make_splits(config, parts_of_data)
    forget_what_others_left(config)
    rows = {split: sample(config, split) for split in SPLITS}
    everything = [row for split in SPLITS for row in rows[split]]
    parts = process_stage(config).parent / "parts"
    guard = Loaded(lambda: default_guard(config))

    records = asked_of_prompts(config, everything, guard, parts)
    asked = [record for record in records if passed(record) or record["shadow"]]
    respond(config, everything, asked, guard, parts)
    judge_responses(config, asked, guard, parts)
    record_of = {record["id"]: record for record in records}
    learned = [record_of[row["id"]] for row in rows[config.experiment.process_split]]
    if any(arm_named(name).collection == "legacy" for name in config.training.arms):
        check_as_the_original(config, learned, guard, parts)
    guard.free()

    for split in SPLITS:
        lines = json_lines(record_of[row["id"]] for row in rows[split])
        write_text(processed_path(config, split), lines)
    stats = collect(config, learned)
    write_stage(process_stage(config), config, "process")
    return stats


def forget_what_others_left(config: Config) -> None:
    """Take the mark away from what other settings, data or models gave: it is made anew."""
    mark = process_stage(config)
    try:
        if mark.is_file():
            check_stage(mark, config, "process")
    except UserError as error:
        what = str(error).partition(";")[0]
        logger.warning("%s: it is made anew", what)
        mark.unlink()


# --- before any work ------------------------------------------------------------------------------


def preflight(config: Config) -> dict[str, list[Row]]:
    """Refuse a config whose arms, models or data would stop the work later; the data, split up."""
    for name in config.training.arms:
        arm_named(name)
    prepared = config.prepared()
    for name, section in prepared.items():
        read_pretrained(AutoConfig, f"prepare.{name}.base_model", section.base_model)
        check_specs(f"prepare.{name}.data", section.data)
    made = {Path(section.output_dir) for section in prepared.values()}
    guard = config.llama_guard
    evaluation = config.evaluation
    models = {
        "llama_guard.default_model_path": (guard.default_model_path, guard.engine != "server"),
        "llama_guard.base_model_path": (guard.base_model_path, True),
        "evaluation.judge": (evaluation.judge, True),
    }
    for field, (name, is_local) in models.items():
        if name and Path(name) not in made:
            check_guard(field, name, is_local)
    if not config.llama.use_recorded:
        assistant_tokenizer(config.llama.model_path)
    if evaluation.hard_benign:
        check_specs("evaluation.hard_benign", [evaluation.hard_benign])
    check_specs("evaluation.extra", evaluation.extra)
    say_own_truth(config)
    parts = split_up(config)
    check_data(config, parts)
    return parts


def check_specs(
    field: str,
    specs: Iterable[str],
) -> None:
    """Refuse data that cannot be opened."""
    for spec in specs:
        name = spec.partition("@")[0]
        is_benchmark = name in benchmark_names("prompt_unsafe")
        load = load_benchmark if is_benchmark else load_conversations
        try:
            load(spec, max_rows=1)
        except UserError as error:
            raise UserError(f"field {field}: {error}") from None


def check_data(config: Config, parts: Mapping[str, Sequence[Row]]) -> None:
    """Refuse prompts of one class, and recorded responses or human labels of responses that are not
    there.
    """
    path = config.dataset.path
    for split in ("train", "test"):
        labels = {row["label"] for row in parts[split]}
        if len(labels) == 1:
            found = f"all {len(parts[split])} prompts of {split} are {labels.pop()}"
            hint = "name data with safe and unsafe prompts in dataset.path"
            raise UserError(f"{path}: {found}, nothing can be learned or measured; {hint}")
    recorded = config.llama.use_recorded
    people_block = config.experiment.blocked_by == "human"
    people_judge = config.evaluation.t2_label == "human"
    needed = [
        (recorded, "train", "model_output", RECORDED),
        (recorded, "test", "model_output", RECORDED),
        (people_block, "train", "output_unsafe", BLOCKED),
        (people_judge, "test", "output_unsafe", LABELLED),
    ]
    for is_needed, split, column, what in needed:
        values = [row[column] for row in parts[split]]
        if is_needed and values and all(value is None for value in values):
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
    served: bool,
    categories: bool = False,
    by_threshold: bool = False,
) -> list[Row]:
    """Verdicts {unsafe, decided, categories, error, time}, kept as they come.

    Args:
        who: what the verdicts depend on.
        categories: let the guard name the categories of what is unsafe, where it can.
        by_threshold: the guard decides as everywhere else: by the threshold of its guard.json, or
            else its word. Without it one half decides, because the experiment fits its own.
    """

    def judge(some: list[Messages]) -> Iterator[tuple[int, Row]]:
        model = guard.get()
        model.with_categories = categories
        verdicts = model.judge(some)
        thresholds = model.thresholds if by_threshold else None
        yield from enumerate(verdict_row(one, label, thresholds) for one in verdicts)

    size = JUDGED_AT_ONCE
    return kept_rows(path, [who, label], conversations, judge, size=size, served=served)


def asked_of_prompts(config: Config, rows: Sequence[Row], guard: Loaded, parts: Path) -> list[Row]:
    """The lines of processed/*.jsonl, without responses. Which blocked prompts are explored is
    drawn by lot, and depends on the prompt's id alone.
    """
    prompts = [pair(row["input"]) for row in rows]
    who = default_identity(config)
    served = config.llama_guard.engine == "server"
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


def judge_responses(
    config: Config,
    asked: Sequence[Row],
    guard: Loaded,
    parts: Path,
) -> None:
    """The guard's verdict on each response, with its prompt, and that of evaluation.judge. Where
    people block responses the guard is not asked.
    """
    label = "response_unsafe"
    section = config.llama_guard
    responses = []
    conversations = []
    for record in asked:
        for response in record["responses"]:
            if response["error"] is None:
                responses.append(response)
                conversations.append(pair(record["query"], response["text"]))
    if config.experiment.blocked_by != "human":
        who = default_identity(config)
        served = section.engine == "server"
        path = parts / "outputs.jsonl"
        said = judged(guard, who, conversations, label, path, served, section.categories)
        for response, verdict in zip(responses, said, strict=True):
            for key in ("unsafe", "decided", "categories", "error"):
                response[key] = verdict[key]
    name = config.evaluation.judge
    if name:
        guard.free()
        judge = Loaded(lambda: load_guard(name))
        who = [guard_identity(name, {}), DECIDED_BY]
        served = is_served(name, {})
        path = parts / "judge.jsonl"
        said = judged(judge, who, conversations, label, path, served, by_threshold=True)
        judge.free()
        for response, verdict in zip(responses, said, strict=True):
            if verdict["error"] is None:
                response["judge_unsafe"] = verdict["unsafe"]
                response["judge_decided"] = verdict["decided"]


# --- the assistant --------------------------------------------------------------------------------


def respond(
    config: Config,
    rows: Sequence[Row],
    asked: Sequence[Row],
    guard: Loaded,
    parts: Path,
) -> None:
    """Fill in the responses of the records that are asked, recorded or generated."""
    if config.llama.use_recorded:
        row_of = {row["id"]: row for row in rows}
        for record in asked:
            row = row_of[record["id"]]
            text = (row["model_output"] or "").strip()
            said = response_of(record["query"], text, recorded=True)
            record["responses"].append(said | {"human_unsafe": row["output_unsafe"]})
        return
    prompts = list(dict.fromkeys(record["query"] for record in asked))
    answers = generated(config, prompts, parts / "answers.jsonl", guard)
    for record in asked:
        for answer in answers[record["query"]]:
            said = answer["text"], answer["seed"], answer["error"]
            record["responses"].append(response_of(record["query"], *said))


def response_of(
    prompt: str,
    text: str,
    seed: int | None = None,
    error: str | None = None,
    recorded: bool = False,
) -> Row:
    """A response as it stands in processed/*.jsonl, before anybody has judged it."""
    kind = classify(text, prompt).kind if text else "empty"
    return {
        "text": text,
        "seed": seed,
        "recorded": recorded,
        "unsafe": None,
        "decided": None,
        "categories": None,
        "error": error or (None if text else EMPTY),
        "refusal": REFUSAL_KINDS.get(kind, kind),
        "judge_unsafe": None,
        "judge_decided": None,
        "human_unsafe": None,
    }


def generated(
    config: Config,
    prompts: Sequence[str],
    path: Path,
    guard: Loaded,
) -> dict[str, list[Row]]:
    """`samples` responses {text, seed, error} to each of different prompts, in the assistant's own
    chat template.

    They depend on the prompt alone: vLLM and servers take a seed a response; transformers draws the
    responses to one prompt together, with the seed of the first. One without room is not asked.
    """
    llama = config.llama
    tokenizer, window = assistant_tokenizer(llama.model_path)
    room = window - llama.max_tokens
    ids_of = chat_ids(tokenizer, prompts)
    fitting = [prompt for prompt in prompts if len(ids_of[prompt]) <= room]
    options = llama.engine_options()
    engine = Loaded(lambda: load_engine(model=llama.model_path, tokenizer=tokenizer, **options))

    def write(asked: list[list]) -> Iterator[tuple[int, Row]]:
        guard.free()  # not both in memory
        # of each response its own, whatever other prompts there are
        seeds = tuple(int(digest([config.seed, *one])[:8], 16) for one in asked)
        decoding = Decoding(
            llama.max_tokens,
            temperature=llama.temperature,
            top_p=llama.top_p,
            seed=seeds[0],
            seeds=seeds,
        )
        ids = [ids_of[prompt] for prompt, _ in asked]
        for place, said in engine.get().complete(ids, decoding):
            row = {"text": said.text.strip(), "seed": seeds[place]}
            yield place, row | {"error": said.error}

    one_prompt = llama.engine == "transformers"
    wanted = [[prompt, number] for prompt in fitting for number in range(llama.samples)]
    rows = kept_rows(
        path,
        [assistant_identity(config), config.seed],
        wanted,
        write,
        size=llama.samples if one_prompt else CHUNK,
        served=llama.engine == "server",
        together=one_prompt,
        title="responses",
    )
    engine.free()
    say_failures(rows, "responses")
    error = f"the prompt is longer than the {room} tokens that the assistant has"
    too_long = {"text": "", "seed": None, "error": error}
    found = dict.fromkeys(prompts, [too_long] * llama.samples)
    found |= {prompt: [] for prompt in fitting}
    for (prompt, _), row in zip(wanted, rows, strict=True):
        found[prompt].append(row)
    return found


def chat_ids(
    tokenizer: Any,
    prompts: Sequence[str],
) -> dict[str, list[int]]:
    """What the assistant is given of each prompt, by the prompt."""
    chats = [render_chat(tokenizer, pair(prompt)) for prompt in prompts]
    encoded = encode(tokenizer, chats, add_special_tokens=False)
    return dict(zip(prompts, encoded, strict=True))


def say_failures(
    rows: Sequence[Row],
    what: str,
) -> None:
    """Warn of rows that are errors; those of a server the next run asks for again."""
    errors = [row["error"] for row in rows if failed(row)]
    if errors:
        line = "%d of %d %s failed (%s); run process.py again for those of a server"
        logger.warning(line, len(errors), len(rows), what, errors[0])


def assistant_tokenizer(name: str) -> tuple[Any, int]:
    """The assistant's tokenizer, and how many tokens it sees."""
    field = "llama.model_path"
    tokenizer = read_pretrained(AutoTokenizer, field, name)
    known = read_pretrained(AutoConfig, field, name)
    if not tokenizer.chat_template:
        hint = "has no chat template; choose an instruction-tuned model"
        raise UserError(f"field {field}: {name} {hint}")
    return tokenizer, config_positions(known) or 1 << 30


# --- the original's checks ------------------------------------------------------------------------


def check_as_the_original(
    config: Config,
    records: Sequence[Row],
    guard: Loaded,
    parts: Path,
) -> None:
    """What the guard writes when it is asked as the original asks it: of the prompt, and of each
    response alone.

    What is too long to be checked is no "SAFE". A record of which a server failed to check
    something is checked by nothing: it has no outputs.
    """
    section = config.llama_guard
    served = section.engine == "server"
    texts = []
    for record in records:
        texts.append(record["query"])
        texts += [response["text"] for response in record["responses"]]
    texts = sorted(dict.fromkeys(texts), key=len)

    def check(some: list[str]) -> Iterator[tuple[int, Row]]:
        said = written_as_asked(guard.get(), "chatml", some, section.legacy_new_tokens)
        for place, one in enumerate(said):
            error = None if one.error == TOO_LONG else one.error
            yield place, {"text": one.text, "error": error}

    rows = kept_rows(
        parts / "legacy.jsonl",
        [default_identity(config), section.legacy_new_tokens],
        texts,
        check,
        size=CHECKED_AT_ONCE,
        served=served,
        title="the original's checks",
    )
    say_failures(rows, "of the original's checks")
    said = dict(zip(texts, rows, strict=True))
    for record in records:
        prompt = said[record["query"]]
        outputs = [said[response["text"]] for response in record["responses"]]
        record["legacy"] = {"input": "", "outputs": []}
        if not any(failed(row) for row in (prompt, *outputs)):
            texts_of = [row["text"] for row in outputs]
            record["legacy"] = {"input": prompt["text"], "outputs": texts_of}


# --- what is collected ----------------------------------------------------------------------------


def collect(
    config: Config,
    records: Sequence[Row],
) -> dict[str, Any]:
    """Write blocked_inputs.jsonl and process_stats.json, whose content is returned."""
    store = Path(config.dataset.store_dir)
    found = [record for record in records if feedback(record)]
    write_text(store / "blocked_inputs.jsonl", json_lines(map(blocked_row, found)))
    explored = [record for record in records if record["shadow"]]
    over_blocked = [row for row in explored if q(row) == 0 and not doubtful(row, config)]
    stats: dict[str, Any] = {
        "total": len(records),
        "input_blocked": sum(not passed(record) for record in records),
        "output_blocked": len(found),
        "both_safe": sum(outcome(record) is False for record in records),
    }
    for key in ("input_blocked", "output_blocked", "both_safe"):
        stats[f"{key}_percent"] = 100 * stats[key] / len(records)
    stats["explored"] = len(explored)
    stats["over_blocked"] = len(over_blocked)
    stats["errors"] = sum(has_error(record) for record in records)
    write_json(store / "process_stats.json", stats)
    if not found:
        hint = "there is no feedback to learn from"
        logger.warning("No prompt passed whose responses did not: %s.", hint)
    return stats


def has_error(record: Row) -> bool:
    """Whether the prompt or a response could not be judged."""
    return record["input_error"] is not None or any(map(failed, record["responses"]))


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
