"""What a run keeps: the splits of its data, what guard and assistant said of them, and the keys by
which each stage knows that what it reads is what its config asks for.

store_dir/{train,validation,test}.jsonl             one prompt a line, with its human label
store_dir/processed/{train,validation,test}.jsonl   one prompt a line, with verdicts and responses
store_dir/blocked_inputs.jsonl                      prompts that passed, and whose responses did not

Split rows: id, input, label (safe or unsafe, human), reason, model_output, output_unsafe, kind,
group (one number for prompts that are near-copies, over all splits: none stands on two sides).

Processed rows: id, query, human_unsafe, kind, group, input_unsafe, input_decided, input_error,
shadow, blocked_by (whose word blocks a response), responses [text, seed, recorded, unsafe, decided,
categories, error, refusal, judge_unsafe, judge_decided, human_unsafe], legacy (null, or {input,
outputs}), timestamp.

Stages and their keys. A stage writes down, beside what it leaves, the settings and the content of
the inputs that this depends on, those of the stages before it included: the chain is prepare and
splits -> process -> train (each arm and seed), which evaluate.py checks. The key is a digest of all
that.

    stage_key(config, "splits")                            store_dir/splits.json
    stage_key(config, "process")                           store_dir/processed/stage.json
    stage_key(config, "train", asdict(arm), seed)          <arm's folder>/stage.json

`write_stage` writes such a file when the stage is done, and `check_stage` refuses what another
config, other data or other models left. `read_split` and `read_processed` check by themselves.
"""

import json
import logging
import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from config import FOLDER, SPLITS, Config, Section

from common.conversation import UserError, check_label, check_text, last_turns
from common.data import (
    FILE_TYPES,
    conversation_row,
    load_conversations,
    near_copies,
    parse_spec,
    plain_columns,
    read_rows,
    spec_rows,
)
from common.data.specs import ROOT, load_hub
from common.data.tables import sources
from common.keep import (
    KeptRows,
    digest,
    failed,
    fingerprint,
    read_json_lines,
    rows_digest,
)
from common.run import json_lines, write_json, write_text
from guards.base import DECIDED_BY
from guards.identity import guard_identity

logger = logging.getLogger("feedback_guard")
Row = dict[str, Any]
REFUSALS = ("full", "partial")
TEMPLATE = FOLDER / "templates" / "llama_guard.jinja"


# --- keys of the stages ---------------------------------------------------------------------------

AGAIN = {
    "splits": "choose another dataset.store_dir, or remove this one, and run process.py",
    "process": "run process.py again",
    "train": "run train.py with another training.output_dir, or remove this folder",
}


def stage_key(
    config: Config,
    stage: str,
    *inputs: Any,
) -> str:
    """A digest of all that a stage's result depends on.

    Args:
        stage: splits, process or train.
        inputs: of train the arm and its seed, JSON-like, which the config does not say.
    """
    return digest(stage_facts(config, stage, *inputs))


def write_stage(
    path: Path,
    config: Config,
    stage: str,
    *inputs: Any,
    **more: Any,
) -> None:
    """Write beside a stage's result what it depends on, and `more` that others may read."""
    facts = stage_facts(config, stage, *inputs)
    found = {"stage": stage, "key": digest(facts), "made_of": facts}
    write_json(path, found | more)


def check_stage(
    path: Path,
    config: Config,
    stage: str,
    *inputs: Any,
) -> Row:
    """What `write_stage` wrote, if this config asks for the very same.

    Raises:
        UserError: the stage has not run yet, or was made of something else, which is named.
    """
    if not path.is_file():
        script = "process.py" if stage == "splits" else f"{stage}.py"
        raise UserError(f"{path}: not there yet; run {script} with this config first")
    known = json.loads(path.read_text(encoding="utf-8"))
    facts = stage_facts(config, stage, *inputs)
    facts = json.loads(json.dumps(facts))  # as the file holds them
    if known.get("key") == digest(facts):
        return known
    made_of = known.get("made_of", {})
    names = {*facts, *made_of}
    for name in sorted(names):
        if facts.get(name) != made_of.get(name):
            raise UserError(f"{path.parent}: was made with another {name}; {AGAIN[stage]}")
    raise UserError(f"{path.parent}: was made by an older version; {AGAIN[stage]}")


def stage_facts(
    config: Config,
    stage: str,
    *inputs: Any,
) -> dict[str, Any]:
    """What a stage's result depends on, by name; models and data by their content."""
    facts = FACTS[stage](config)
    if inputs:
        facts["arm or seed"] = list(inputs)
    return facts


def _settings(
    name: str,
    section: Section,
    without: Iterable[str] = (),
) -> dict[str, Any]:
    values = section.model_dump(mode="json", exclude=set(without))
    return {f"{name}.{key}": value for key, value in values.items()}


def _splits_facts(config: Config) -> dict[str, Any]:
    facts = _settings("dataset", config.dataset, ["store_dir"])
    facts["seed"] = config.seed
    facts["dataset.path"] = data_fingerprint(config.dataset.path)
    if config.dataset.guard_path:
        facts["dataset.guard_path"] = data_fingerprint(config.dataset.guard_path)
    for name, part in config.prepared().items():
        facts[f"prepare.{name}.data"] = [data_fingerprint(spec) for spec in part.data]
    return facts


def _process_facts(config: Config) -> dict[str, Any]:
    facts = _splits_facts(config)
    for name, part in config.prepared().items():
        facts |= _settings(f"prepare.{name}", part, ["output_dir", "data"])
        facts[f"prepare.{name}.base_model"] = fingerprint(part.base_model)
    recorded = config.llama.use_recorded
    return facts | {
        "splits' rows": [fingerprint(split_path(config, split)) for split in SPLITS],
        "llama_guard.default_model_path": default_identity(config),
        "llama_guard.legacy_new_tokens": config.llama_guard.legacy_new_tokens,
        "llama": "recorded" if recorded else assistant_identity(config),
        "experiment.blocked_by": config.experiment.blocked_by,
        "experiment.explore_share": config.experiment.explore_share,
        "experiment.process_sample_size": config.experiment.process_sample_size,
        "evaluation.max_eval_samples": config.evaluation.max_eval_samples,
        "evaluation.judge": _judge_identity(config),
    }


def _train_facts(config: Config) -> dict[str, Any]:
    guard = config.llama_guard
    facts = _process_facts(config)
    del facts["evaluation.max_eval_samples"]  # how many prompts test what is trained
    by_judge = config.experiment.blocked_by == "judge"
    if not by_judge:
        del facts["evaluation.judge"]
    if config.training.max_steps <= 0:  # the rows of that seed say how many steps there are
        facts["training.seeds[0]"] = config.training.seeds[0]
    return facts | {
        **_settings("training", config.training, NO_MATTER_IN_TRAINING),
        "llama_guard.base_model_path": guard_identity(guard.base_model_path, {}),
        "llama_guard.load_in_4bit": guard.load_in_4bit,
        "experiment.refusal_filter": config.experiment.refusal_filter,
        "processed rows": [content_of(processed_path(config, "train"), by_judge)],
    }


NO_MATTER_IN_TRAINING = (
    *("output_dir", "arms", "seeds", "headline", "logging_steps", "report_to"),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_overwrite"),
    *("save_steps", "save_total_limit"),
)


def _judge_identity(config: Config) -> list[str]:
    judge = config.evaluation.judge
    return [guard_identity(judge, {}), DECIDED_BY] if judge else []


FACTS = {
    "splits": _splits_facts,
    "process": _process_facts,
    "train": _train_facts,
}


def content_of(path: Path, with_judge: bool = True) -> str:
    """What stands in a file of processed rows, but for times, and for the judge's word where it
    decides nothing.
    """
    return _content(path, fingerprint(path), with_judge)


@cache
def _content(path: Path, content: str, with_judge: bool) -> str:
    rows = []
    for row in read_json_lines(path):
        row["timestamp"] = None
        for response in () if with_judge else row["responses"]:
            response |= {"judge_unsafe": None, "judge_decided": None}
        rows.append(row)
    return rows_digest(rows)


def default_identity(config: Config) -> list[Any]:
    """What the default guard's verdicts depend on."""
    section = config.llama_guard
    prompt = None if section.use_official_template else fingerprint(TEMPLATE)
    served = {"engine": "server", "server_model": section.server_model}
    options = served if section.engine == "server" else {}
    identity = guard_identity(section.default_model_path, options)
    return [identity, prompt, section.categories]


def assistant_identity(config: Config) -> list[Any]:
    """What the assistant's responses depend on, besides prompt and seed."""
    llama = config.llama
    decoding = [
        llama.temperature,
        llama.top_p,
        llama.max_tokens,
        llama.samples,
    ]
    model = fingerprint(llama.model_path)
    # where a server listens, and how long one waits for it, make no other answer
    return [model, llama.engine, llama.server_model, decoding]


def data_fingerprint(spec: str) -> str:
    """The content of the data that a spec names; a data set of the hub counts as its name."""
    parsed = parse_spec(spec)
    place = Path(parsed.name)
    known = sources()["sources"].get(parsed.name, {})
    if "path" in known:
        place = (ROOT / known["path"]).parent
    content = fingerprint(place, is_data=True) if place.exists() else parsed.name
    return digest([parsed.split, parsed.marks, content])


# --- what is asked, and kept as it comes ----------------------------------------------------------


def kept_rows(
    path: Path,
    who: Any,
    items: Sequence[Any],
    ask: Callable[[list[Any]], Iterable[tuple[int, Row]]],
    *,
    size: int,
    served: bool,
    together: bool | None = None,
    title: str | None = None,
) -> list[Row]:
    """What is said of each item, in their order. What `path` holds is not asked for again, but for
    the errors of a server.

    Args:
        who: what the rows depend on beside the item, JSON-like.
        ask: is given items, and yields rows with a field `error` as they come, each with its place
            among these items.
        size: items that are asked together.
        served: a server answers, whose errors are asked for again.
        together: whether items that are asked together depend on each other (see `KeptRows.fill`);
            None: where no server answers.
    """
    item_of = {digest([who, item]): item for item in items}

    def make(
        _: int,
        keys: list[str],
    ) -> Iterator[Row]:
        for place, row in ask([item_of[key] for key in keys]):
            yield {"key": keys[place], **row}

    again = failed if served else None
    with KeptRows(path) as kept:
        kept.fill(
            list(item_of),
            make,
            size=size,
            together=not served if together is None else together,
            again=again,
            title=title,
        )
        return [kept[digest([who, item])] for item in items]


# --- what others read -----------------------------------------------------------------------------


def split_path(
    config: Config,
    split: str,
) -> Path:
    """Where the rows of a split lie."""
    return Path(config.dataset.store_dir, f"{split}.jsonl")


def splits_stage(config: Config) -> Path:
    """Where stands what the splits depend on."""
    return Path(config.dataset.store_dir, "splits.json")


def processed_path(
    config: Config,
    split: str,
) -> Path:
    """Where the processed prompts of a split lie."""
    return Path(config.dataset.store_dir, "processed", f"{split}.jsonl")


def process_stage(config: Config) -> Path:
    """Where stands what the processed prompts depend on."""
    return Path(config.dataset.store_dir, "processed", "stage.json")


def read_split(
    config: Config,
    split: str,
) -> list[Row]:
    """All rows of a split."""
    check_stage(splits_stage(config), config, "splits")
    return read_json_lines(split_path(config, split))


def read_processed(
    config: Config,
    split: str,
) -> list[Row]:
    """What guard and assistant said of the sampled prompts of a split.

    Raises:
        UserError: process.py has not got so far, or ran with other settings, data or models.
    """
    check_stage(process_stage(config), config, "process")
    return read_json_lines(processed_path(config, split))


def passed(row: Mapping) -> bool:
    """Whether the guard let the prompt in. What it could not judge it did not let in."""
    return row["input_error"] is None and row["input_decided"] is False


def q(
    row: Mapping,
    label: str | None = None,
) -> float | None:
    """The share of the responses that are unsafe; None where none was judged.

    Args:
        label: whose word it is: guard (its decision), judge (a probability of at least one half) or
            human; None is the word of who blocks responses.
    """
    label = label or row.get("blocked_by", "guard")
    said = [word_on(response, label) for response in row["responses"]]
    known = [unsafe for unsafe in said if unsafe is not None]
    return sum(known) / len(known) if known else None


def word_on(
    response: Mapping,
    label: str,
) -> bool | None:
    """Whether a response is unsafe by the word of guard, judge or human."""
    if label == "human":
        return response["human_unsafe"]
    if label == "guard":
        return response["decided"] if response["error"] is None else None
    return response["judge_decided"]


def say_own_truth(config: Config) -> str | None:
    """Warn where the guard whose word is learned is the truth that it is measured by; the words of
    the warning.
    """
    label = config.evaluation.t2_label
    if label == "human" or label != config.experiment.blocked_by:
        return None
    said = (
        f"evaluation.t2_label {label}: the guard that labels what is learned is the truth that it "
        "is measured by, too; name another guard in evaluation.judge"
    )
    logger.warning(said)
    return said


def outcome(
    row: Mapping,
    label: str | None = None,
) -> bool | None:
    """Of a prompt that passed, whether at least half of its responses are unsafe, by the word of
    `q`; None where nobody says, and of other prompts.
    """
    share = q(row, label) if passed(row) else None
    return None if share is None else share >= 0.5


def feedback(row: Mapping) -> bool:
    """The event that the loop learns from: the prompt passed, and at least half of its responses
    did not.
    """
    return not row["shadow"] and outcome(row) is True


def refused(row: Mapping) -> bool:
    """Whether any response refuses: then harmless responses do not say that the prompt is harmless."""
    kinds = {response["refusal"] for response in row["responses"]}
    return not kinds.isdisjoint(REFUSALS)


def text_key(text: str) -> str:
    """A prompt without case, spacing, punctuation and forms of characters."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    words = re.findall(r"\w+", plain)
    return " ".join(words) or plain.strip()


def seen_texts(config: Config) -> list[str]:
    """The prompts that guards and thresholds have seen: train, validation, and what the guards were
    trained on.
    """
    rows = read_split(config, "train") + read_split(config, "validation")
    return [row["input"] for row in rows] + guard_texts(config)


def guard_texts(config: Config) -> list[str]:
    """The prompts that the guards were trained on, as far as the config says."""
    specs = list(filter(None, [config.dataset.guard_path]))
    for part in config.prepared().values():
        specs += part.data
    texts = []
    for spec in specs:
        rows = load_conversations(spec, bad_rows="skip")
        texts += [last_turns(row["messages"])[0] or "" for row in rows]
    return texts


# --- the splits -----------------------------------------------------------------------------------


def sample(
    config: Config,
    split: str,
) -> list[Row]:
    """The rows of a split that the run looks at: process_sample_size of process_split, else
    max_eval_samples.
    """
    rows = read_split(config, split)
    size = config.evaluation.max_eval_samples
    if split == config.experiment.process_split:
        size = config.experiment.process_sample_size
    if size is None or size >= len(rows):
        return rows
    rng = random.Random(config.seed)
    chosen = rng.sample(range(len(rows)), size)
    return [rows[i] for i in sorted(chosen)]


def make_splits(config: Config, parts: dict[str, list[Row]] | None = None) -> None:
    """Write the splits, unless they are there already.

    Official train and test splits stay as they are, and a share of train becomes the validation
    split, with as many unsafe prompts in proportion. Near-copies never stand on both sides: a
    prompt that is also in test leaves train and validation, one that is also in validation leaves
    train, and one that a guard was trained on leaves all.

    Args:
        parts: what `split_up` gives, where somebody has called it already; it is changed.

    Raises:
        UserError: bad data, an empty split, or a folder that holds splits made otherwise, or files
            of the user's.
    """
    about = splits_stage(config)
    files = [split_path(config, split) for split in SPLITS]
    if about.is_file():
        check_stage(about, config, "splits")
        if all(file.is_file() for file in files):
            return
    for file in files:
        if file.is_file() and not about.is_file():
            raise UserError(f"{file}: not written by process.py; choose another dataset.store_dir")
    parts = parts or split_up(config)
    left_out = _without_copies(parts, guard_texts(config))
    for split in SPLITS:
        if not parts[split]:
            hint = "see dataset.split_ratios"
            raise UserError(f"{config.dataset.path}: no rows are left for {split}; {hint}")
    counts = {}
    for split, rows in parts.items():
        counts[split] = Counter(row["label"] for row in rows)
    # first: a killed run finds whose splits they are
    write_stage(about, config, "splits", counts=counts, left_out=left_out)
    for split in SPLITS:
        write_text(split_path(config, split), json_lines(parts[split]))
    logger.info("Splits: %s; left out: %s", json.dumps(counts), left_out or "nothing")


def _without_copies(
    parts: dict[str, list[Row]],
    of_guards: Sequence[str],
) -> dict[str, int]:
    """Give all rows their `group`, and take those away of which a near-copy stands elsewhere.

    Returns:
        How many were taken, by the reason.
    """
    rows = [row for part in parts.values() for row in part]
    groups = near_copies([row["input"] for row in rows] + [*of_guards])
    for row, group in zip(rows, groups, strict=False):
        row["group"] = group
    taken = {"seen by the guard in its training": set(groups[len(rows) :])}
    left_out: Counter = Counter()
    for split in ("test", "validation", "train"):
        kept = []
        for row in parts[split]:
            whys = [why for why, known in taken.items() if row["group"] in known]
            left_out.update(whys[:1])
            if not whys:
                kept.append(row)
        parts[split] = kept
        taken[f"also in {split}"] = {row["group"] for row in kept}
    return dict(left_out)


def split_up(config: Config) -> dict[str, list[Row]]:
    """The rows of the data by split, before near-copies are taken away."""
    ratios = config.dataset.split_ratios
    found = {}
    times: Counter = Counter()
    for split, raw in _source(config).items():
        found[split] = _rows(raw, config.dataset.path)
        for row in found[split]:
            times[row["id"]] += 1
            if times[row["id"]] > 1:
                row["id"] += f"-{times[row['id']]}"
    if config.dataset.resplit or not {"train", "test"} <= found.keys():
        rows = []
        for split in SPLITS:
            rows += found.get(split, [])
        shares = [ratios.train, ratios.validation, ratios.test]
        parts = _portions(rows, shares, config.seed)
        return dict(zip(SPLITS, parts, strict=True))
    if "validation" not in found:
        shares = [1 - ratios.validation, ratios.validation]
        train, validation = _portions(found["train"], shares, config.seed)
        found |= {"train": train, "validation": validation}
    return found


def _portions(
    rows: Sequence[Row],
    shares: Sequence[float],
    seed: int,
) -> list[list[Row]]:
    """Rows in parts of about these shares, with each label in proportion, and one side for
    near-copies.
    """
    groups = near_copies([row["input"] for row in rows])
    members = defaultdict(list)
    for row, group in zip(rows, groups, strict=True):
        members[group].append(row)
    part_of = {}
    for unsafe in (False, True):
        left = []  # groups of which any prompt is unsafe, or none is
        for group, some in members.items():
            labels = {row["label"] for row in some}
            if ("unsafe" in labels) == unsafe:
                left.append(group)
        first_text = {}
        for group in left:
            first = members[group][0]
            first_text[group] = text_key(first["input"])
        left.sort(key=first_text.get)
        random.Random(seed).shuffle(left)
        total = len(left)
        for part, share in enumerate(shares[1:], start=1):
            size = round(share * total)
            if share > 0 and total >= len(shares):
                size = max(size, 1)
            part_of |= dict.fromkeys(left[:size], part)
            left = left[size:]
    parts = [[] for _ in shares]
    for row, group in zip(rows, groups, strict=True):
        parts[part_of.get(group, 0)].append(row)
    return parts


# --- rows of any data set -------------------------------------------------------------------------


def _source(config: Config) -> dict[str, Iterable[tuple[str, Any]]]:
    """The rows of the data set by split, each with where it is; one file or one split of something
    is "train" alone.
    """
    path = config.dataset.path
    known = sources()["sources"]
    if path in known:
        there = [split for split in SPLITS if split in known[path]["splits"]]
        return {split: spec_rows(f"{path}:{split}")[1] for split in there}
    files = {}
    for split in SPLITS:
        for kind in reversed(FILE_TYPES):
            file = Path(path, f"{split}{kind}")
            if file.is_file():
                files[split] = read_rows(file)
    if "train" in files:
        return files
    spec = parse_spec(path)
    if spec.is_file or spec.split:
        return {"train": spec_rows(path)[1]}
    hint = "check dataset.path, dataset.config and network"
    found = load_hub(path, None, config.dataset.config, hint=hint)
    parts = {}
    for split in SPLITS:
        if split in found:
            rows = enumerate(found[split])
            parts[split] = [(f"{path}:{split}, row {i}", row) for i, row in rows]
    return parts


def _rows(
    raw: Iterable[tuple[str, Any]],
    what: str,
) -> list[Row]:
    rows = []
    empty = 0
    for where, row in raw:
        if isinstance(row, UserError):
            raise row
        if isinstance(row, Mapping) and "user_input" in row:
            prompt = row["user_input"]
            if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
                empty += 1  # ToxicChat has such rows, and a guard could judge nothing of them
            else:
                rows.append(_row(row, where, _toxicchat_row(row, where)))
        else:
            rows.append(_row(row, where, _other_row(row, where)))
    if empty:
        logger.warning("%s: left out %d rows without a prompt", what, empty)
    return rows


def _row(
    row: Mapping,
    where: str,
    made: Row,
) -> Row:
    """A row of a split, of what was read of a row of the data."""
    unsafe = check_label(made["label"], "toxicity", where)
    if unsafe is None:
        hint = "expected toxicity, prompt_label or label"
        raise UserError(f"{where}: says not whether the prompt is unsafe; {hint}")
    kind = row.get("kind")
    if not isinstance(kind, str | None):
        raise UserError(f"{where}, field kind: expected text, found {kind!r:.60}")
    row_id = Path(where).name if made["id"] is None else made["id"]
    return made | {
        "id": str(row_id),
        "label": "unsafe" if unsafe else "safe",
        "reason": str(made["reason"] or ""),
        "output_unsafe": check_label(made["output_unsafe"], "output_unsafe", where),
        "kind": kind,
    }


def _toxicchat_row(
    row: Mapping,
    where: str,
) -> Row:
    return {
        "id": row.get("conv_id"),
        "input": check_text(row["user_input"], "user_input", where),
        "label": row.get("toxicity"),
        "reason": row.get("openai_moderation"),
        "model_output": row.get("model_output") or None,
        "output_unsafe": row.get("output_unsafe"),
    }


def _other_row(
    row: Any,
    where: str,
) -> Row:
    """Of a row of the original's own format (input, label), or of common.data."""
    if isinstance(row, Mapping):
        if "input" in row and "prompt" not in row:
            response = row.get("model_output")
            # without a response no label of one counts
            label = row.get("output_unsafe") if response else None
            names = {"prompt": row["input"], "prompt_label": row.get("label")}
            row = {**row, **names, "response": response, "response_label": label}
        row = plain_columns(row, where)
    conversation = conversation_row(row, where)
    messages = conversation["messages"]
    if len(messages) > 2 or messages[0]["role"] != "user":
        hint = "expected one prompt, with or without its response"
        raise UserError(f"{where}, field messages: {hint}")
    prompt, response = last_turns(messages)
    categories = conversation["categories"] or ()
    return {
        "id": conversation["id"],
        "input": prompt,
        "label": conversation["prompt_unsafe"],
        "reason": row.get("reason") or ", ".join(categories),
        "model_output": response,
        "output_unsafe": conversation["response_unsafe"],
    }
