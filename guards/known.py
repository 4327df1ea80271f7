"""The guards that are known by name: zoo.yaml."""

from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from common.conversation import UserError
from common.data.files import read_yaml

SYSTEM = "system"  # a policy that stands in each conversation, as its system prompt
ALIASES = {  # the names of the ExpGuard paper's evaluation code, which its commands print
    "ExpGuard": "expguard",
    "LlamaGuardUserRequest": "llama-guard",
    "LlamaGuardModelResponse": "llama-guard",
    "LlamaGuard2": "llama-guard-2-8b",
    "LlamaGuard3": "llama-guard-3-8b",
    "WildGuard": "wildguard",
    "ShieldGemma": "shieldgemma-9b",
    "AegisLlamaGuardPermissive": "aegis-guard-permissive",
    "AegisLlamaGuardDefensive": "aegis-guard-defensive",
    "MDJudgeResponseHarmClassifier": "md-judge-v0.1",
    "BeaverDam": "beaver-dam-7b",
    "HarmbenchClassifier": "harmbench-llama-2-13b",
    "HarmbenchValidationClassifier": "harmbench-mistral-7b-val",
    "Detoxify": "detoxify",
    "OpenAIModeration": "openai-moderation",
    "PerspectiveAPI": "perspective",
    "Azure": "azure-content-safety",
}


@cache
def zoo() -> dict[str, dict[str, Any]]:
    """The known guards of zoo.yaml."""
    return read_yaml(Path(__file__).with_name("zoo.yaml"))


def zoo_name(spec: str) -> str | None:
    """The name in zoo.yaml of a guard that is given by this name, by its name in the ExpGuard
    paper's code, or by its hub id; None where it has none.
    """
    if spec in ALIASES:
        return ALIASES[spec]
    for name, entry in zoo().items():
        hub_id = entry.get("adapter") or entry.get("model")
        if spec in (name, hub_id):
            return name
    return None


def near_names(name: str) -> list[str]:
    """Known names that somebody may have meant, the most like first."""
    known = {known.lower(): known for known in (*ALIASES, *zoo())}
    return [known[one] for one in get_close_matches(name.lower(), known, 5)]


def policy_text(given: str) -> str:
    """The policy that a user gives a guard: the text of a file, the text itself, or SYSTEM.

    Raises:
        UserError: no such file, or it is empty.
    """
    text = given
    path = Path(given)
    if "\n" not in given and path.suffix in (".md", ".txt"):
        if not path.is_file():
            raise UserError(f"policy={given}: no such file")
        text = path.read_text(encoding="utf-8-sig")  # editors of Windows mark it at its beginning
    if not text.strip():
        raise UserError(f"policy={given}: empty; expected rules, one a line")
    return text.strip()
