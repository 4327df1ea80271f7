"""Ask guard and assistant: which prompts pass the guard although their responses do not?

# the quickstart: bundled model, sample and recorded responses, CPU
python process.py

# the original's data, models and values
python process.py --config research_config.json

Writes the splits, then for the sampled prompts of process_split, validation and test
store_dir/processed/{train,validation,test}.jsonl, a line a prompt: {id, query, human_unsafe, kind, input_unsafe,
input_decided, input_error, shadow, responses: [{text, seed, recorded, unsafe, decided, categories, error, refusal,
judge_unsafe, human_unsafe}], legacy, timestamp}; store_dir/blocked_inputs.jsonl, the prompts that passed and whose
responses did not; and store_dir/process_stats.json. What was asked is kept under processed/parts as it comes: a killed
run goes on, and gives what an uninterrupted one gives.
"""

import json
import logging
import random
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from arms import arm
from assistant import generated
from config import FOLDER, SPLITS, Config, config_from_argv
from formats import load_llama_guard
from legacy import chatml_parts
from records import (
    Loaded,
    Row,
    digest,
    feedback,
    identity,
    kept_lines,
    make_splits,
    passed,
    processed_path,
    q,
    refused,
    sample,
)
from tqdm.auto import tqdm

from common.conversation import Messages, UserError, Verdict, pair
from common.guards import Guard, load_guard
from common.guards.generative import GenerativeGuard
from common.refusal import classify
from common.runtime import json_lines, run_cli, write_json, write_text
from common.templates import encode

logger = logging.getLogger("feedback_guard")
CHUNK = 256  # conversations that are judged, and kept, at a time
KINDS = {"full_refusal": "full", "partial_refusal": "partial"}


def main() -> None:
    config = config_from_argv(__doc__)
    prepare_first(config)
    print(json.dumps(process(config), indent=2))


def prepare_first(config: Config) -> None:
    """Make the small guards of the section `prepare`, where they are not there yet.

    Raises:
        UserError: prepare.py failed; it has said why.
    """
    parts = [part for part in (config.prepare.guard, config.prepare.judge) if part] if config.prepare else []
    if all((Path(part.output_dir) / "guard.json").is_file() for part in parts):
        return
    if subprocess.run([sys.executable, str(FOLDER / "prepare.py"), *sys.argv[1:]]).returncode:
        raise UserError("prepare.py failed, see above; nothing was processed")


def process(config: Config) -> dict[str, Any]:
    """Make the splits and process their prompts; the statistics are those of process_split.

    Raises:
        UserError: bad data or models, or a folder that holds what other settings gave.
    """
    with_legacy = "legacy" in [arm(name).collection for name in config.training.arms]
    make_splits(config)
    asked_of = (config.experiment.process_split, "validation", "test")
    rows = {split: sample(config, split) for split in SPLITS if split in asked_of}
    parts = processed_path(config, "parts").with_suffix("")
    check_settings(config, parts.parent / "settings.json")

    guard, who = Loaded(lambda: default_guard(config)), guard_identity(config)
    everything = [row for split in rows.values() for row in split]
    prompts, again = [pair(row["input"]) for row in everything], config.llama_guard.engine == "server"
    said = judged(guard, who, prompts, "prompt_unsafe", parts / "inputs.jsonl", again)
    records = [_record(row, verdict, config) for row, verdict in zip(everything, said, strict=True)]
    asked = [
        (row, record) for row, record in zip(everything, records, strict=True) if passed(record) | record["shadow"]
    ]
    respond(config, asked, guard, parts / "answers.jsonl")
    judge_responses(config, asked, guard, who, parts)
    if with_legacy:
        ids = {row["id"] for row in rows[config.experiment.process_split]}
        add_legacy(config, [record for record in records if record["id"] in ids], guard, who, parts / "legacy.jsonl")
    guard.free()
    done = {record["id"]: record for record in records}
    for split, of in rows.items():
        write_text(processed_path(config, split), json_lines(done[row["id"]] for row in of))
    return collect(config, [done[row["id"]] for row in rows[config.experiment.process_split]])


def check_settings(config: Config, path: Path) -> None:
    """Refuse a folder that was filled with other models or settings: what was trained on it would no longer fit it."""
    llama = config.llama
    settings = {"llama_guard": guard_identity(config), "llama.use_recorded": llama.use_recorded, "seed": config.seed}
    settings["experiment.explore_share"] = config.experiment.explore_share
    if not llama.use_recorded:
        settings["llama.model_path"] = identity(llama.model_path)
        keys = ("temperature", "top_p", "max_tokens", "samples")
        settings |= {f"llama.{key}": getattr(llama, key) for key in keys}
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else settings
    changed = [key for key in {**settings, **known} if settings.get(key) != known.get(key)]
    if changed:
        raise UserError(
            f"{path.parent}: was made with another {changed[0]}; remove it, or choose another dataset.store_dir"
        )
    write_json(path, settings)


# --- the guard --------------------------------------------------------------------------------------------------------


def default_guard(config: Config) -> GenerativeGuard:
    """The guard of llama_guard.default_model_path, as the section asks for it."""
    section = config.llama_guard
    options = {"engine": section.engine, "server_url": section.server_url, "server_model": section.server_model}
    options |= {"categories": section.categories or None}
    return load_llama_guard(section.default_model_path, section.use_official_template, **options)


def guard_identity(config: Config) -> list[Any]:
    """What the default guard's verdicts depend on."""
    section = config.llama_guard
    return [*identity(section.default_model_path), section.use_official_template, section.categories]


def judged(
    guard: Loaded, who: Any, conversations: Sequence[Messages], label: str, path: Path, again: bool = False
) -> list[Row]:
    """Verdicts {unsafe, decided, categories, error, time}; each chunk is kept before the next is judged.

    What is kept is not asked for again. A chunk that a kill cut is judged as it was, so that nothing differs by a
    rounding error.

    Args:
        who: what the verdicts depend on.
        again: ask for errors again, as of a server.
    """
    keys = [digest([who, label, messages]) for messages in conversations]
    asked, kept = dict(zip(keys, conversations, strict=True)), kept_lines(path)
    old = {key for key in asked if key in kept and not (again and kept[key]["error"] is not None)}
    order = list(asked)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for part in (order[i : i + CHUNK] for i in range(0, len(order), CHUNK)):
            part = [key for key in part if key not in old] if again else part
            if not set(part) - old:
                continue
            model: Guard = guard.get()
            verdicts = model.judge([asked[key] for key in part])
            fresh = {key: {"key": key} | _verdict(verdict, label) for key, verdict in zip(part, verdicts, strict=True)}
            fresh = {key: line for key, line in fresh.items() if key not in old}
            file.write(json_lines(fresh.values()))
            file.flush()
            kept |= fresh
    return [kept[key] for key in keys]


def _verdict(verdict: Verdict, label: str) -> Row:
    unsafe, error = getattr(verdict, label), verdict.error
    if error is None and unsafe is None:
        error = f"the guard does not judge {label}"
    decided = None if error else verdict.decided.get(label, unsafe >= 0.5)
    categories = sorted(verdict.categories) or None
    now = datetime.now().isoformat(timespec="seconds")
    return {"unsafe": unsafe, "decided": decided, "categories": categories, "error": error, "time": now}


def _record(row: Row, verdict: Row, config: Config) -> Row:
    """A line of processed/*.jsonl, without responses. Blocked prompts are explored by lot, the same at any time."""
    lot = random.Random(f"{config.seed} {row['id']}").random()
    return {
        "id": row["id"],
        "query": row["input"],
        "human_unsafe": row["label"] == "unsafe",
        "kind": row["kind"],
        "input_unsafe": verdict["unsafe"],
        "input_decided": verdict["decided"],
        "input_error": verdict["error"],
        "shadow": verdict["decided"] is True and lot < config.experiment.explore_share,
        "responses": [],
        "legacy": None,
        "timestamp": verdict["time"],
    }


# --- the assistant ----------------------------------------------------------------------------------------------------


def respond(config: Config, asked: Sequence[tuple[Row, Row]], guard: Loaded, path: Path) -> None:
    """Fill in the responses of records, recorded or generated."""
    if config.llama.use_recorded:
        for row, record in asked:
            if row["model_output"] is None:
                raise UserError(f"row {row['id']}: has no recorded response; set llama.use_recorded=false to generate")
            said = {"text": row["model_output"].strip(), "seed": None, "human": row["output_unsafe"]}
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


# --- verdicts on responses --------------------------------------------------------------------------------------------


def judge_responses(config: Config, asked: Sequence[tuple[Row, Row]], guard: Loaded, who: Any, parts: Path) -> None:
    """The guard's verdict on each response, with its prompt, and that of evaluation.judge."""
    open_ = [(record, r) for _, record in asked for r in record["responses"] if r["error"] is None]
    conversations = [pair(record["query"], response["text"]) for record, response in open_]
    again = config.llama_guard.engine == "server"
    said = judged(guard, who, conversations, "response_unsafe", parts / "outputs.jsonl", again)
    for (_, response), verdict in zip(open_, said, strict=True):
        response |= {key: verdict[key] for key in ("unsafe", "decided", "categories", "error")}
    if name := config.evaluation.judge:
        guard.free()
        judge = Loaded(lambda: load_guard(name))
        again = not Path(name).is_dir()  # a service may have failed
        said = judged(judge, identity(name), conversations, "response_unsafe", parts / "judge.jsonl", again)
        judge.free()
        for (_, response), verdict in zip(open_, said, strict=True):
            response["judge_unsafe"] = None if verdict["error"] else verdict["unsafe"]


def add_legacy(config: Config, records: Sequence[Row], guard: Loaded, who: Any, path: Path) -> None:
    """What the guard writes when it is asked as the original asks it: of the prompt, and of each response alone."""
    texts = [[record["query"], *(r["text"] for r in record["responses"])] for record in records]
    tokens = config.llama_guard.legacy_new_tokens
    keys = {text: digest([who, tokens, text]) for each in texts for text in each}
    kept = kept_lines(path)
    missing = sorted((text for text in keys if keys[text] not in kept), key=len)
    with path.open("a", encoding="utf-8") as file, tqdm(total=len(missing), desc="the original's checks") as bar:
        for part in (missing[i : i + 48] for i in range(0, len(missing), 48)):
            model: GenerativeGuard = guard.get()
            ids = encode(model.tokenizer, [chatml_parts(text) for text in part])
            fits = [len(one) + tokens <= model.max_length for one in ids]
            written = iter(model.model.complete([one for one, fit in zip(ids, fits, strict=True) if fit], tokens))
            lines = [  # what does not fit is no "SAFE"
                {"key": keys[text], "text": next(written) if fit else ""} for text, fit in zip(part, fits, strict=True)
            ]
            file.write(json_lines(lines))
            file.flush()
            kept |= {line["key"]: line for line in lines}
            bar.update(len(part))
    for record, each in zip(records, texts, strict=True):
        prompt, *responses = (kept[keys[text]]["text"] for text in each)
        record["legacy"] = {"input": prompt, "outputs": responses}


# --- what is collected ------------------------------------------------------------------------------------------------


def collect(config: Config, records: Sequence[Row]) -> dict[str, Any]:
    """Write blocked_inputs.jsonl and process_stats.json, whose content is returned."""
    store, found = Path(config.dataset.store_dir), [record for record in records if feedback(record)]
    write_text(store / "blocked_inputs.jsonl", json_lines(map(_blocked, found)))
    explored = [record for record in records if record["shadow"]]
    counts = {
        "total": len(records),
        "input_blocked": sum(not passed(record) for record in records),
        "output_blocked": len(found),
        "both_safe": sum(passed(record) and (q(record) or 0) < 0.5 and q(record) is not None for record in records),
    }
    stats = counts | {f"{key}_percent": 100 * value / len(records) for key, value in list(counts.items())[1:]}
    stats["explored"] = len(explored)
    refusals = [config.experiment.refusal_filter and refused(record) for record in explored]
    stats["over_blocked"] = sum(q(r) == 0 and not refusal for r, refusal in zip(explored, refusals, strict=True))
    errors = [[r["input_error"], *(response["error"] for response in r["responses"])] for r in records]
    stats["errors"] = sum(any(each) for each in errors)
    write_json(store / "process_stats.json", stats)
    if not found:
        logger.warning("No prompt passed whose responses did not: there is no feedback to learn from.")
    return stats


def _blocked(record: Row) -> Row:
    """A line of blocked_inputs.jsonl: the original's keys, and what they rest on."""
    unsafe = [response for response in record["responses"] if response["decided"]]
    named = sorted({name for response in unsafe for name in response["categories"] or ()})
    kept = ("text", "seed", "recorded", "unsafe", "decided", "error")
    return {
        "timestamp": record["timestamp"],
        "query": record["query"],
        "input_safe": True,
        "output_safe": False,
        "reason": ", ".join(named) or "Classified as unsafe",
        "id": record["id"],
        "q": q(record),
        "responses": [{key: response[key] for key in kept} for response in record["responses"]],
    }


if __name__ == "__main__":
    run_cli(main)
