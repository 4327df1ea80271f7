"""`load_guard(spec)`: a guard from a folder that a recipe wrote, a name of zoo.yaml, or a hub id.

Every guard has `judge(list of messages lists) -> list[Verdict]`, batched, in order, with a progress bar, and never
takes a failure for "safe".
"""

import json
from pathlib import Path
from typing import Any

from common import templates
from common.conversation import UserError
from common.data import taxonomy
from common.run import expand_home
from guards.base import LONG_INPUTS, Guard
from guards.known import zoo

__all__ = ["LONG_INPUTS", "Guard", "load_guard", "zoo"]

templates.FOLDERS.append(Path(__file__).parent / "prompts")

CARD = {"kind": str, "template": str, "labels": list, "max_length": int, "thresholds": dict}  # of guard.json


def load_guard(spec: str, **options: Any) -> Guard:
    """Load a guard.

    Args:
        spec: a folder with guard.json, a name or hub id of zoo.yaml, or any folder or hub id with `template=`.
        options: `max_length`, `batch_tokens`, `long_inputs`, `template`, `labels`, … of the guard's class.

    Raises:
        UserError: unknown guard, or a checkpoint that does not fit its description.
    """
    from guards.api import ApiGuard
    from guards.classifier import ClassifierGuard
    from guards.generative import GenerativeGuard
    from guards.lora import LoraGuard

    spec = expand_home(spec)
    options = {name: expand_home(value) for name, value in options.items()}
    known, model = _describe(spec)
    described = {k: known[k] for k in CARD if k in known and k != "kind"}
    if isinstance(described.get("labels"), str):
        described["labels"] = taxonomy(described["labels"])
    kinds = {"classifier": ClassifierGuard, "lora_guard": LoraGuard, "generative": GenerativeGuard, "api": ApiGuard}
    kind = known.get("kind", "classifier")
    if kind not in kinds:
        raise UserError(f"{spec}: guard.json says kind {kind!r}; known kinds: {', '.join(kinds)}")
    if kind == "generative":
        described = {k: described[k] for k in ("max_length", "thresholds") if k in described} | {"entry": known}
    elif kind == "api":
        described, model = {}, known["service"]
    elif "unsafe_labels" in known:
        described["unsafe_labels"] = known["unsafe_labels"]
    options = {k: v for k, v in options.items() if v is not None}
    if "engine" in options and kind != "generative" and options.pop("engine") != "transformers":
        raise UserError(f"{spec}: --engine is for guards that generate")
    try:
        guard = kinds[kind](options.pop("model", model), **(described | options))
    except TypeError as error:  # an option of another kind of guard
        raise UserError(f"{spec}: {str(error).split('__init__() ')[-1]}") from None
    guard.name = guard.name if model == spec else spec
    return guard


def _describe(spec: str) -> tuple[dict[str, Any], str]:
    """What is known of a guard, and its model: from a folder's guard.json, or zoo.yaml."""
    card = Path(spec) / "guard.json"
    if not card.is_file():
        ids = {name: entry.get("adapter") or entry.get("model") for name, entry in zoo().items()}
        known = next((entry for name, entry in zoo().items() if spec in (name, ids[name])), {})
        return known, known.get("model", spec)
    known = _read_card(card)
    if known.get("kind") == "generative":
        like = known.get("guard")
        if zoo().get(like, {}).get("kind") != "generative":
            raise UserError(f"{card}, field guard: {like!r} is no generative guard of zoo.yaml")
        known = zoo()[like] | {k: v for k, v in known.items() if k in CARD}
        known.pop("adapter", None)
    return known, spec


def _read_card(path: Path) -> dict[str, Any]:
    """The content of a guard.json, checked."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: malformed JSON ({error})") from None
    if not isinstance(known, dict):
        raise UserError(f"{path}: expected an object, found {known!r:.60}")
    for field, kind in CARD.items():
        if field in known and not isinstance(known[field], kind):
            raise UserError(f"{path}, field {field}: expected {kind.__name__}, found {known[field]!r:.60}")
    for name, threshold in known.get("thresholds", {}).items():
        if not isinstance(threshold, dict) or not isinstance(threshold.get("value"), (int, float)):
            raise UserError(f'{path}, field thresholds.{name}: expected {{"value": number, …}}, not {threshold!r:.60}')
    return known
