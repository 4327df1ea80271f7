"""Ask guard and assistant: which prompts pass the guard although their responses do not?

# the quickstart: bundled model, sample and recorded responses, CPU
python process.py

# the original's data, models and values
python process.py --config research_config.json

First it looks whether models and data are there, and makes the guards of the section `prepare`.
Then it writes the splits, and for the sampled prompts of train, validation and test
store_dir/processed/{train,validation,test}.jsonl, a line a prompt: {id, query, human_unsafe, kind,
input_unsafe, input_decided, input_error, shadow, responses: [{text, seed, recorded, unsafe,
decided, categories, error, refusal, judge_unsafe, human_unsafe}], legacy, timestamp};
store_dir/blocked_inputs.jsonl, the prompts that passed and whose responses did not; and
store_dir/process_stats.json. What was asked is kept under processed/parts as it comes: a killed run
goes on, and gives what an uninterrupted one gives.
"""

import json
import logging
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from assistant import assistant_tokenizer, respond
from config import FOLDER, SPLITS, Config, config_from_argv
from formats import check_guard, check_model, load_llama_guard
from legacy import chatml_parts, reason_of
from loaded import Loaded
from records import (
    Row,
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

from common.conversation import Messages, UserError, Verdict, pair
from common.data import load_conversations
from common.engines import Completion
from common.keep import KeptRows, digest, failed
from common.run import check_output_folder, json_lines, run_cli, write_json, write_text
from common.templates import encode
from guards import Guard, load_guard
from guards.generative import GenerativeGuard
from guards.identity import guard_identity, is_served
from guards.suite.benchmarks import benchmark_names, load_benchmark

logger = logging.getLogger("feedback_guard")
CHUNK = 256  # conversations that are judged, and kept, at a time


def main() -> None:
    config = config_from_argv(__doc__)
    if config.prepare is not None:
        preflight(config)
        prepare_first()
    print(json.dumps(process(config), indent=2))


def prepare_first() -> None:
    """Make the small guards of the section `prepare`, where they are not there yet.

    Raises:
        UserError: train.py prepare failed, as where a folder holds a guard made otherwise; it has said
        why.
    """
    if subprocess.run(
        [sys.executable, str(FOLDER / "train.py"), "prepare", *sys.argv[1:]]
    ).returncode:
        raise UserError("train.py prepare failed, see above; nothing was processed")


def process(config: Config) -> dict[str, Any]:
    """Make the splits and process their prompts; the statistics are those of process_split.

    Raises:
        UserError: bad data or models, or a folder that holds what other settings gave.
    """
    check_output_folder(config.dataset.store_dir)
    preflight(config)
    with_legacy = "legacy" in [arm_named(name).collection for name in config.training.arms]
    make_splits(config)
    rows = {split: sample(config, split) for split in SPLITS}
    forget_other(config)
    parts = processed_path(config, "parts").with_suffix("")

    guard, who = Loaded(lambda: default_guard(config)), default_identity(config)
    everything = [row for split in rows.values() for row in split]
    prompts, again = (
        [pair(row["input"]) for row in everything],
        config.llama_guard.engine == "server",
    )
    said = judged(guard, who, prompts, "prompt_unsafe", parts / "inputs.jsonl", again)
    records = [_record(row, verdict, config) for row, verdict in zip(everything, said, strict=True)]
    asked = [
        (row, record)
        for row, record in zip(everything, records, strict=True)
        if passed(record) | record["shadow"]
    ]
    respond(config, asked, guard, parts / "answers.jsonl")
    judge_responses(config, asked, guard, who, parts)
    if with_legacy:
        ids = {row["id"] for row in rows[config.experiment.process_split]}
        add_legacy(
            config,
            [record for record in records if record["id"] in ids],
            guard,
            who,
            parts / "legacy.jsonl",
        )
    guard.free()
    done = {record["id"]: record for record in records}
    for split, of in rows.items():
        write_text(processed_path(config, split), json_lines(done[row["id"]] for row in of))
    stats = collect(config, [done[row["id"]] for row in rows[config.experiment.process_split]])
    write_stage(process_stage(config), config, "process")
    return stats


def forget_other(config: Config) -> None:
    """Say so where other settings, data or models gave what is there: it is made anew."""
    if process_stage(config).is_file():
        try:
            check_stage(process_stage(config), config, "process")
        except UserError as other:
            logger.warning("%s: it is made anew", str(other).partition(";")[0])
            process_stage(config).unlink()


# --- before any work --------------------------------------------------------------------------------------------------


def preflight(config: Config) -> None:
    """Refuse a config whose arms, models or data would stop the work later.

    Raises:
        UserError: names the field, and what to do.
    """
    for name in config.training.arms:
        arm_named(name)
    guard, evaluation, prepared = config.llama_guard, config.evaluation, set()
    for key, part in config.prepared().items():
        prepared.add(Path(part.output_dir))
        check_model(f"prepare.{key}.base_model", part.base_model)
        check_specs(f"prepare.{key}.data", part.data)
    models = {
        "default_model_path": guard.default_model_path,
        "base_model_path": guard.base_model_path,
    }
    models = {f"llama_guard.{key}": name for key, name in models.items()} | {
        "evaluation.judge": evaluation.judge
    }
    for field, name in models.items():
        if name and Path(name) not in prepared:
            check_guard(field, name, local=guard.engine != "server" or "default" not in field)
    if not config.llama.use_recorded:
        assistant_tokenizer(config.llama.model_path)
    check_specs("evaluation.hard_benign", filter(None, [evaluation.hard_benign]))
    check_specs("evaluation.extra", evaluation.extra)
    check_data(config)


def check_specs(field: str, specs: Iterable[str]) -> None:
    """Refuse data that cannot be opened."""
    for spec in specs:
        try:
            if spec.partition("@")[0] in benchmark_names("prompt_unsafe"):
                load_benchmark(spec, max_rows=1)
            else:
                load_conversations(spec, max_rows=1)
        except UserError as error:
            raise UserError(f"field {field}: {error}") from None


def check_data(config: Config) -> None:
    """Refuse prompts of one class, and recorded responses or human labels of responses that are not
    there.
    """
    parts = split_up(config)
    path, needed = config.dataset.path, []
    if config.llama.use_recorded:
        hint = "set llama.use_recorded=false to generate"
        needed += [
            (split, "model_output", f"recorded response; {hint}") for split in ("train", "test")
        ]
    if config.evaluation.t2_label == "human":
        needed.append(
            (
                "test",
                "output_unsafe",
                "human label of its response; set evaluation.t2_label=guard, or judge",
            )
        )
    for split in ("train", "test"):
        labels = {row["label"] for row in parts[split]}
        if len(labels) == 1:
            raise UserError(
                f"{path}: all {len(parts[split])} prompts of {split} are {labels.pop()}, nothing can be learned or "
                "measured; name data with safe and unsafe prompts in dataset.path"
            )
    for split, key, what in needed:
        if parts[split] and all(row[key] is None for row in parts[split]):
            raise UserError(f"{path}: no prompt of {split} has a {what}")


# --- the guard --------------------------------------------------------------------------------------------------------


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
    served: bool = False,
    categories: bool = False,
) -> list[Row]:
    """Verdicts {unsafe, decided, categories, error, time}, kept as they come.

    What is kept is not asked for again, but for the errors of a server.

    Args:
        who: what the verdicts depend on.
        served: a server judges.
        categories: let the guard name the categories of what is unsafe, where it can.
    """
    keys = [digest([who, label, messages]) for messages in conversations]
    asked = dict(zip(keys, conversations, strict=True))

    def judge(_: int, some: list[str]) -> list[Row]:
        model: Guard = guard.get()
        model.with_categories = categories
        verdicts = model.judge([asked[key] for key in some])
        rows = zip(some, verdicts, strict=True)
        return [{"key": key} | _verdict(verdict, label) for key, verdict in rows]

    again = failed if served else None
    with KeptRows(path) as kept:
        return kept.fill(keys, judge, size=CHUNK, together=not served, again=again)


def _verdict(verdict: Verdict, label: str) -> Row:
    unsafe, error = getattr(verdict, label), verdict.error
    if error is None and unsafe is None:
        error = f"the guard does not judge {label}"
    decided = None if error else verdict.decided.get(label, unsafe >= 0.5)
    categories = sorted(verdict.categories) or None
    now = datetime.now().isoformat(timespec="seconds")
    return {
        "unsafe": unsafe,
        "decided": decided,
        "categories": categories,
        "error": error,
        "time": now,
    }


def _record(row: Row, verdict: Row, config: Config) -> Row:
    """A line of processed/*.jsonl, without responses. Blocked prompts are explored by lot, the same
    at any time.
    """
    lot = random.Random(f"{config.seed} {row['id']}").random()
    return {
        "id": row["id"],
        "query": row["input"],
        "human_unsafe": row["label"] == "unsafe",
        "kind": row["kind"],
        "group": row["group"],
        "input_unsafe": verdict["unsafe"],
        "input_decided": verdict["decided"],
        "input_error": verdict["error"],
        "shadow": verdict["decided"] is True and lot < config.experiment.explore_share,
        "responses": [],
        "legacy": None,
        "timestamp": verdict["time"],
    }


# --- verdicts on responses --------------------------------------------------------------------------------------------


def judge_responses(
    config: Config, asked: Sequence[tuple[Row, Row]], guard: Loaded, who: Any, parts: Path
) -> None:
    """The guard's verdict on each response, with its prompt, and that of evaluation.judge."""
    open_ = [(record, r) for _, record in asked for r in record["responses"] if r["error"] is None]
    conversations = [pair(record["query"], response["text"]) for record, response in open_]
    again = config.llama_guard.engine == "server"
    named = config.llama_guard.categories
    said = judged(
        guard, who, conversations, "response_unsafe", parts / "outputs.jsonl", again, named
    )
    for (_, response), verdict in zip(open_, said, strict=True):
        response |= {key: verdict[key] for key in ("unsafe", "decided", "categories", "error")}
    if name := config.evaluation.judge:
        guard.free()
        judge, by, served = (
            Loaded(lambda: load_guard(name)),
            guard_identity(name, {}),
            is_served(name, {}),
        )
        said = judged(judge, by, conversations, "response_unsafe", parts / "judge.jsonl", served)
        judge.free()
        for (_, response), verdict in zip(open_, said, strict=True):
            response["judge_unsafe"] = None if verdict["error"] else verdict["unsafe"]


def add_legacy(config: Config, records: Sequence[Row], guard: Loaded, who: Any, path: Path) -> None:
    """What the guard writes when it is asked as the original asks it: of the prompt, and of each
    response alone.

    A record of which a server failed to check something is checked by nothing: it has no outputs,
    and the next run asks again.
    """
    texts = [[record["query"], *(r["text"] for r in record["responses"])] for record in records]
    tokens = config.llama_guard.legacy_new_tokens
    keys = {text: digest([who, tokens, text]) for each in texts for text in each}
    text_of = {key: text for text, key in keys.items()}
    served = config.llama_guard.engine == "server"

    def check(_: int, some: list[str]) -> Iterator[Row]:
        for text, said in _legacy_checks(guard.get(), [text_of[key] for key in some], tokens):
            yield {"key": keys[text], "text": said.text, "error": said.error}

    order = sorted(text_of, key=lambda key: len(text_of[key]))
    options = {"together": not served, "again": failed if served else None}
    with KeptRows(path) as kept:
        rows = kept.fill(order, check, size=48, title="the original's checks", **options)
    said = dict(zip(order, rows, strict=True))
    errors = [row["error"] for row in rows if row["error"] is not None]
    if errors:
        logger.warning(
            "llama_guard.server_url %s: %d of the original's %d checks failed (%s); run process.py again for them",
            *(config.llama_guard.server_url, len(errors), len(rows), errors[0]),
        )
    for record, each in zip(records, texts, strict=True):
        of_record = [said[keys[text]] for text in each]
        if any(row["error"] is not None for row in of_record):
            record["legacy"] = {"input": "", "outputs": []}
            continue
        prompt, *responses = (row["text"] for row in of_record)
        record["legacy"] = {"input": prompt, "outputs": responses}


def _legacy_checks(
    guard: GenerativeGuard, texts: Sequence[str], new_tokens: int
) -> Iterator[tuple[str, Completion]]:
    """Each text with what the guard writes of it; what does not fit is no "SAFE"."""
    asked = encode(guard.tokenizer, [chatml_parts(text) for text in texts])
    room = guard.max_length - new_tokens
    written = iter(guard.written([ids for ids in asked if len(ids) <= room], new_tokens))
    for text, ids in zip(texts, asked, strict=True):
        yield text, next(written) if len(ids) <= room else Completion()


# --- what is collected ------------------------------------------------------------------------------------------------


def collect(config: Config, records: Sequence[Row]) -> dict[str, Any]:
    """Write blocked_inputs.jsonl and process_stats.json, whose content is returned."""
    store, found = (
        Path(config.dataset.store_dir),
        [record for record in records if feedback(record)],
    )
    write_text(store / "blocked_inputs.jsonl", json_lines(map(_blocked, found)))
    explored = [record for record in records if record["shadow"]]
    counts = {
        "total": len(records),
        "input_blocked": sum(not passed(record) for record in records),
        "output_blocked": len(found),
        "both_safe": sum(
            passed(record) and (q(record) or 0) < 0.5 and q(record) is not None
            for record in records
        ),
    }
    stats = counts | {
        f"{key}_percent": 100 * value / len(records) for key, value in list(counts.items())[1:]
    }
    stats["explored"] = len(explored)
    refusals = [config.experiment.refusal_filter and refused(record) for record in explored]
    stats["over_blocked"] = sum(
        q(r) == 0 and not refusal for r, refusal in zip(explored, refusals, strict=True)
    )
    errors = [
        [r["input_error"], *(response["error"] for response in r["responses"])] for r in records
    ]
    stats["errors"] = sum(any(each) for each in errors)
    write_json(store / "process_stats.json", stats)
    if not found:
        logger.warning(
            "No prompt passed whose responses did not: there is no feedback to learn from."
        )
    return stats


def _blocked(record: Row) -> Row:
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
