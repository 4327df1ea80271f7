"""The guards that are known by name: zoo.yaml."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml


@cache
def zoo() -> dict[str, dict[str, Any]]:
    """The known guards of zoo.yaml."""
    path = Path(__file__).with_name("zoo.yaml")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def zoo_name(spec: str) -> str | None:
    """The name in zoo.yaml of a guard that is given by this name, or by its hub id; None where it
    has none.
    """
    for name, entry in zoo().items():
        hub_id = entry.get("adapter") or entry.get("model")
        if spec in (name, hub_id):
            return name
    return None
