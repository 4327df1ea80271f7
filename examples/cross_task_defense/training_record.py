"""What an adapter was trained with: training.json beside it, which is pushed with it. (run.json is
not, because it names files of this machine.)
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prompts import load_template

from common.conversation import UserError
from common.engines import adapter_file
from common.keep import digest

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Arguments by which runs of one training differ, or that change nothing of what is learned.
OF_A_RUN = re.compile(
    r"seed|base_model|data_path|output_dir|prompt_template_name|overwrite_output_dir"
    r"|resume_from_checkpoint|report_to|push_to_hub|(wandb|hub)_.*|trust_remote_code|deepspeed"
)


@dataclass(frozen=True)
class Record:
    """Of a training; `settings` are alike in runs that differ by seed, base or rows alone."""

    prompt_template_name: str
    prompt_template_text: dict[str, str] | None
    trained_on: str | None
    train_sha256: str | None
    settings: dict[str, Any]


def record_of(run: Mapping[str, Any]) -> Record:
    """The record of a run, of which `common.run.manifest` says what it was."""
    given = run["arguments"]
    name = given["prompt_template_name"]
    template = run["prompt_template_text"] if "prompt_template_text" in run else load_template(name)
    settings = {}
    for argument, value in given.items():
        if not OF_A_RUN.fullmatch(argument):
            settings[argument] = value
    return Record(
        Path(name).name,
        template,
        trained_on=Path(given["data_path"]).stem,
        train_sha256=rows_of(run.get("data", {})),
        settings=settings,
    )


def rows_of(data: Mapping[str, Any]) -> str | None:
    """What tells the rows of a training from others: their hash, or how many tokens an earlier
    version has counted in them. None where neither is known.
    """
    counts = [data.get(name) for name in ("rows", "tokens", "answer_tokens")]
    counted = None if None in counts else digest(counts)
    return data.get("train_sha256", counted)


def trained_with(lora_weights: str) -> Record | None:
    """The record of an adapter, a folder or one of the hub; None where nothing is known, as of an
    adapter of others.

    A checkpoint has that of the finished run around it. checkpoint-0 was trained on nothing.

    Raises:
        UserError: no such adapter.
    """
    adapter_file(lora_weights, "adapter_config.json")
    found = record_in(lora_weights)
    folder = Path(lora_weights).absolute()
    checkpoint = CHECKPOINT.fullmatch(folder.name)
    if found is None and folder.is_dir() and checkpoint:
        found = record_in(str(folder.parent))
        if found is not None:
            settings = found.settings | {"checkpoint": folder.name}
            trained_on = found.trained_on if int(checkpoint[1]) else None
            found = replace(found, settings=settings, trained_on=trained_on)
    return found


def record_in(lora_weights: str) -> Record | None:
    """The record that lies in a folder or a repository; run.json is that of an earlier version."""
    for name in ("training.json", "run.json"):
        try:
            path = adapter_file(lora_weights, name)
            found = json.loads(path.read_text(encoding="utf-8"))
            return record_of(found) if name == "run.json" else Record(**found)
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # not there, or somebody else's
    return None
