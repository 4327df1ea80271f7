"""What a run keeps: the splits of its data, and what guard and assistant said of them.

store_dir/{train,validation,test}.jsonl             one prompt a line, with its human label
store_dir/processed/{train,validation,test}.jsonl   one prompt a line, with verdicts and responses
                                                    (process.py)
store_dir/blocked_inputs.jsonl                      prompts that passed, and whose responses did not
"""

import gc
import json
import logging
import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from config import SPLITS, Config

from common.conversation import UserError, check_label, check_text, last_turns
from common.data import (
    FILE_TYPES,
    conversation_row,
    load_conversations,
    parse_spec,
    plain_columns,
    read_rows,
    spec_rows,
)
from common.data.specs import ROOT, load_hub
from common.data.tables import sources
from common.keep import digest, fingerprint, read_json_lines
from common.run import json_lines, write_json, write_text

logger = logging.getLogger("feedback_guard")
Row = dict[str, Any]
REFUSALS = ("full", "partial")


# --- what others read -------------------------------------------------------------------------------------------------


def read_split(config: Config, split: str) -> list[Row]:
    """All rows of a split: id, input, label (safe or unsafe, human), reason, model_output,
    output_unsafe, kind.

    Raises:
        UserError: process.py has not made the splits yet.
    """
    return _read(Path(config.dataset.store_dir) / f"{split}.jsonl")


def read_processed(config: Config, split: str) -> list[Row]:
    """What guard and assistant said of the sampled prompts of a split; the fields are those that
    process.py lists.

    Raises:
        UserError: process.py has not got so far.
    """
    return _read(processed_path(config, split))


def processed_path(config: Config, split: str) -> Path:
    """Where the processed prompts of a split lie."""
    return Path(config.dataset.store_dir) / "processed" / f"{split}.jsonl"


def _read(path: Path) -> list[Row]:
    if not path.is_file():
        raise UserError(f"{path}: not there yet; run process.py with this config first")
    return read_json_lines(path)


def passed(row: Mapping) -> bool:
    """Whether the guard let the prompt in. What it could not judge it did not let in."""
    return row["input_error"] is None and row["input_decided"] is False


def q(row: Mapping, label: str = "guard") -> float | None:
    """The share of the responses that are unsafe; None where none was judged.

    Args:
        label: whose word it is: guard (its decision), judge (a probability of at least one half) or
        human.
    """
    of: dict[str, Callable[[Mapping], bool | None]] = {
        "guard": lambda r: None if r["error"] is not None else r["decided"],
        "judge": lambda r: None if r["judge_unsafe"] is None else r["judge_unsafe"] >= 0.5,
        "human": lambda r: r["human_unsafe"],
    }
    said = [value for response in row["responses"] if (value := of[label](response)) is not None]
    return sum(said) / len(said) if said else None


def feedback(row: Mapping) -> bool:
    """The event that the loop learns from: the prompt passed, and at least half of its responses
    did not.
    """
    return passed(row) and not row["shadow"] and (q(row) or 0.0) >= 0.5


def refused(row: Mapping) -> bool:
    """Whether any response refuses: then harmless responses do not say that the prompt is harmless."""
    return any(response["refusal"] in REFUSALS for response in row["responses"])


class Loaded:
    """A model that is loaded when it is first needed, and can be let go."""

    def __init__(self, load: Callable[[], Any]):
        self.load, self.model = load, None

    def get(self) -> Any:
        """The model, loaded once."""
        self.model = self.load() if self.model is None else self.model
        return self.model

    def free(self) -> None:
        """Give its memory back."""
        if self.model is None:
            return
        self.model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# --- the splits -------------------------------------------------------------------------------------------------------


def sample(config: Config, split: str) -> list[Row]:
    """The rows of a split that the run looks at: process_sample_size of process_split, else
    max_eval_samples.
    """
    rows, experiment = read_split(config, split), config.experiment
    size = (
        experiment.process_sample_size
        if split == experiment.process_split
        else config.evaluation.max_eval_samples
    )
    if size is None or size >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(config.seed).sample(range(len(rows)), size))]


def make_splits(config: Config) -> None:
    """Write the splits, unless they are there already.

    Official train and test splits stay as they are, and a share of train becomes the validation
    split, with as many unsafe prompts in proportion. Prompts that differ in case, spacing or
    punctuation alone never stand on both sides: one that is also in test leaves train and
    validation, one that is also in validation leaves train.

    Raises:
        UserError: bad data, an empty split, or a folder that holds splits made otherwise.
    """
    store = Path(config.dataset.store_dir)
    check_splits(config)
    made = _made(config)
    if (store / "splits.json").is_file() and all(
        (store / f"{split}.jsonl").is_file() for split in SPLITS
    ):
        return
    parts, dropped = _split_up(config), Counter()

    def drop(split: str, keys: set[str], why: str) -> None:
        rows = parts[split]
        parts[split] = [row for row in rows if text_key(row["input"]) not in keys]
        dropped[why] += len(rows) - len(parts[split])

    seen = _guard_keys(config)
    for split in SPLITS:
        drop(split, seen, "seen by the guard in its training")
    for split in ("train", "validation"):
        drop(split, {text_key(row["input"]) for row in parts["test"]}, "also in test")
    drop("train", {text_key(row["input"]) for row in parts["validation"]}, "also in validation")
    for split in SPLITS:
        if not parts[split]:
            raise UserError(
                f"{config.dataset.path}: no rows are left for {split}; see dataset.split_ratios"
            )
        write_text(store / f"{split}.jsonl", json_lines(parts[split]))
    counts = {split: Counter(row["label"] for row in rows) for split, rows in parts.items()}
    logger.info("Splits: %s; left out: %s", json.dumps(counts), dict(+dropped) or "nothing")
    write_json(store / "splits.json", made | {"counts": counts, "left_out": dict(+dropped)})


def check_splits(config: Config) -> None:
    """Raise UserError where the splits in the folder are of other data, seed or ratios."""
    store = Path(config.dataset.store_dir)
    if (store / "splits.json").is_file():
        known = json.loads((store / "splits.json").read_text(encoding="utf-8"))
        if any(known.get(key) != value for key, value in _made(config).items()):
            raise UserError(
                f"{store}: holds splits of other data, seed or ratios; choose another dataset.store_dir"
            )


def _made(config: Config) -> dict[str, Any]:
    """What splits are made of: settings, and the content of the data."""
    values = config.as_dict()
    guard_data = [
        spec for part in (values["prepare"] or {}).values() if part for spec in part["data"]
    ]
    specs = [config.dataset.path, config.dataset.guard_path, *guard_data]
    return {
        "dataset": values["dataset"] | {"store_dir": None},
        "seed": config.seed,
        "guard_data": guard_data,
        "content": [data_fingerprint(spec) for spec in specs if spec],
    }


def data_fingerprint(spec: str) -> str:
    """The content of the data that a spec names; a data set of the hub counts as its name.

    Raises:
        UserError: no spec, or a file cannot be read.
    """
    parsed = parse_spec(spec)
    known = sources()["sources"].get(parsed.name, {})
    if "path" in known:
        files = [ROOT / known["path"].format(split=split) for split in known["splits"]]
        return digest([str(parsed), [fingerprint(file) for file in files]])
    if parsed.is_file or Path(parsed.name).is_dir():
        return digest([parsed.split, fingerprint(parsed.name)])
    return digest(str(parsed))


def seen_keys(config: Config) -> set[str]:
    """`text_key` of the prompts that guards and thresholds have seen: train, validation, and the
    head start's data.
    """
    rows = [row for split in ("train", "validation") for row in read_split(config, split)]
    return {text_key(row["input"]) for row in rows} | _guard_keys(config)


def _guard_keys(config: Config) -> set[str]:
    specs = (*_made(config)["guard_data"], *filter(None, [config.dataset.guard_path]))
    return {key for spec in specs for key in _keys(spec)}


def text_key(text: str) -> str:
    """A prompt without case, spacing, punctuation and forms of characters: equal for
    near-duplicates.
    """
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", plain)) or plain.strip()


def _keys(spec: str) -> Iterator[str]:
    return (
        text_key(last_turns(row["messages"])[0] or "")
        for row in load_conversations(spec, bad_rows="skip")
    )


def _split_up(config: Config) -> dict[str, list[Row]]:
    ratios, found = config.dataset.split_ratios, _source(config)
    ids = Counter()
    for row in (row for rows in found.values() for row in rows):
        ids[row["id"]] += 1
        row["id"] += f"-{ids[row['id']]}" * (ids[row["id"]] > 1)
    if config.dataset.resplit or not {"train", "test"} <= set(found):
        rows = [row for split in SPLITS for row in found.get(split, ())]
        return dict(
            zip(
                SPLITS,
                _portions(rows, [getattr(ratios, s) for s in SPLITS], config.seed),
                strict=True,
            )
        )
    if "validation" not in found:
        shares = [1 - ratios.validation, ratios.validation]
        found["train"], found["validation"] = _portions(found["train"], shares, config.seed)
    return found


def _portions(rows: Sequence[Row], shares: Sequence[float], seed: int) -> list[list[Row]]:
    """Rows in parts of about these shares, with each label in proportion, and one side for
    near-duplicates.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[text_key(row["input"])].append(i)
    strata: dict[bool, list[str]] = defaultdict(list)
    for key, members in groups.items():
        strata[any(rows[i]["label"] == "unsafe" for i in members)].append(key)
    part_of = dict.fromkeys(range(len(rows)), 0)
    for unsafe in sorted(strata):
        keys = sorted(strata[unsafe])
        random.Random(seed).shuffle(keys)
        for part, share in list(enumerate(shares))[1:]:
            size = max(
                round(share * len(strata[unsafe])),
                int(share > 0 and len(strata[unsafe]) >= len(shares)),
            )
            taken, keys = keys[:size], keys[size:]
            part_of |= {i: part for key in taken for i in groups[key]}
    return [
        [row for i, row in enumerate(rows) if part_of[i] == part] for part in range(len(shares))
    ]


# --- rows of any data set ---------------------------------------------------------------------------------------------


def _source(config: Config) -> dict[str, list[Row]]:
    """The rows of the data set by split; one file or one split of something is "train" alone."""
    path, known = config.dataset.path, sources()["sources"]
    if path in known:
        return {
            s: _rows(spec_rows(f"{path}:{s}")[1], path)
            for s in SPLITS
            if s in known[path]["splits"]
        }
    if Path(path).is_dir():
        files = {
            s: f
            for s in SPLITS
            for kind in FILE_TYPES
            if (f := Path(path) / f"{s}{kind}").is_file()
        }
        if "train" in files:
            return {s: _rows(read_rows(file), path) for s, file in files.items()}
    spec = parse_spec(path)
    if spec.is_file or spec.split:
        return {"train": _rows(spec_rows(path)[1], path)}
    found = load_hub(
        path, None, config.dataset.config, hint="check dataset.path, dataset.config and network"
    )
    return {
        s: _rows(((f"{path}:{s}, row {i}", row) for i, row in enumerate(found[s])), path)
        for s in SPLITS
        if s in found
    }


def _rows(raw: Iterable[tuple[str, Any]], what: str) -> list[Row]:
    rows, empty = [], 0
    for where, row in raw:
        if (
            isinstance(row, Mapping)
            and "user_input" in row
            and not (row["user_input"] or "").strip()
        ):
            empty += 1  # nothing that a guard could judge
        else:
            rows.append(_row(row, where))
    if empty:
        logger.warning("%s: left out %d rows without a prompt", what, empty)
    return rows


def _row(row: Any, where: str) -> Row:
    """A row of ToxicChat, of the original's own format (input, label), or of common.data."""
    if isinstance(row, UserError):
        raise row
    if isinstance(row, Mapping) and "user_input" in row:
        text, unsafe = check_text(row["user_input"], "user_input", where), row.get("toxicity")
        response, response_unsafe = row.get("model_output") or None, row.get("output_unsafe")
        reason, row_id = row.get("openai_moderation"), row.get("conv_id")
    else:
        if isinstance(row, Mapping) and "input" in row and "prompt" not in row:
            row = {
                **row,
                "prompt": row["input"],
                "prompt_label": row.get("label"),
                "response": row.get("model_output"),
            }
            row |= {"response_label": row.get("output_unsafe") if row["response"] else None}
        if isinstance(row, Mapping):
            row = plain_columns(row, where)
        conversation = conversation_row(row, where)
        if len(conversation["messages"]) > 2 or conversation["messages"][0]["role"] != "user":
            raise UserError(
                f"{where}, field messages: expected one prompt, with or without its response"
            )
        text, response = last_turns(conversation["messages"])
        unsafe, response_unsafe = conversation["prompt_unsafe"], conversation["response_unsafe"]
        reason, row_id = (
            row.get("reason") or ", ".join(conversation["categories"] or ()),
            conversation["id"],
        )
    unsafe = check_label(unsafe, "toxicity", where)
    if unsafe is None:
        raise UserError(
            f"{where}: says not whether the prompt is unsafe; expected toxicity, prompt_label or label"
        )
    if not isinstance(kind := row.get("kind"), str | None):
        raise UserError(f"{where}, field kind: expected text, found {kind!r:.60}")
    return {
        "id": Path(where).name if row_id is None else str(row_id),
        "input": text,
        "label": "unsafe" if unsafe else "safe",
        "reason": str(reason or ""),
        "model_output": response,
        "output_unsafe": check_label(response_unsafe, "output_unsafe", where),
        "kind": kind,
    }
