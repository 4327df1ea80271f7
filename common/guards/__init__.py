"""`load_guard(spec)`: a guard from a folder that a recipe wrote, a name of zoo.yaml, or a hub id.

Every guard has `judge(list of messages lists) -> list[Verdict]`, batched, in order, with a progress bar, and never
takes a failure for "safe".
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from common.conversation import Messages, UserError, Verdict
from common.data import taxonomy

CARD = {"kind": str, "template": str, "labels": list, "max_length": int, "thresholds": dict}  # of guard.json


class Guard(ABC):
    """What judges conversations. `name` says which; `thresholds` are the ones that its training fitted."""

    name: str
    thresholds: dict[str, dict[str, Any]]

    @abstractmethod
    def judge(self, conversations: Sequence[Messages]) -> list[Verdict]:
        """One verdict a conversation, in order."""

    def moderate(self, conversations: Sequence[Messages], **_: Any) -> list[float]:
        """GuardBench's callback: the unsafe probability of each conversation's last turn."""
        verdicts = self.judge(conversations)
        return [
            v.score("response_unsafe" if m[-1]["role"] == "assistant" else "prompt_unsafe")
            for v, m in zip(verdicts, conversations, strict=True)
        ]


@cache
def zoo() -> dict[str, dict]:
    """The known guards of zoo.yaml."""
    return yaml.safe_load(Path(__file__).with_name("zoo.yaml").read_text(encoding="utf-8"))


def load_guard(spec: str, **options: Any) -> Guard:
    """Load a guard.

    Args:
        spec: a folder with guard.json, a name or hub id of zoo.yaml, or any folder or hub id with `template=`.
        options: `max_length`, `batch_tokens`, `long_inputs`, `template`, `labels`, … of the guard's class.

    Raises:
        UserError: unknown guard, or a checkpoint that does not fit its description.
    """
    from common.guards.classifier import ClassifierGuard
    from common.guards.lora import LoraGuard

    card = Path(spec) / "guard.json"
    if card.is_file():
        known, model = _read_card(card), spec
    else:
        known = next((entry for name, entry in zoo().items() if spec in (name, entry["model"])), {})
        model = known.get("model", spec)
    described = {k: known[k] for k in CARD if k in known and k != "kind"}
    if isinstance(described.get("labels"), str):
        described["labels"] = taxonomy(described["labels"])
    kinds, kind = {"classifier": ClassifierGuard, "lora_guard": LoraGuard}, known.get("kind", "classifier")
    if kind not in kinds:
        raise UserError(f"{spec}: guard.json says kind {kind!r}; known kinds: {', '.join(kinds)}")
    return kinds[kind](model, **(described | {k: v for k, v in options.items() if v is not None}))


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
            raise UserError(
                f'{path}, field thresholds.{name}: expected {{"value": number, …}}, found {threshold!r:.60}'
            )
    return known
