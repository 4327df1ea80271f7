"""What a guard's verdicts depend on: kept verdicts count for the guard that gave them alone."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.conversation import UserError
from common.keep import digest, fingerprint
from common.templates import template_text
from guards.card import has_card, read_card
from guards.known import ALIASES, policy_text, zoo, zoo_name
from guards.lora import is_adapter

# What a guard is made of, in cards and options.
MODELS = ("model", "adapter", "base_model")
VERSION = 2  # is raised where the same guard gives other verdicts than before
PATIENCE = ("server_timeout", "keeps_asking")  # options that verdicts do not depend on


def described(spec: str) -> dict[str, Any]:
    """What a folder's card and zoo.yaml say of a guard; {} if nothing.

    A broken card counts as none: it says so when the guard is loaded.
    """
    card: dict[str, Any] = {}
    name = zoo_name(spec)
    if has_card(spec):
        with suppress(UserError):
            card = read_card(spec).model_dump(exclude_none=True)
        name = card.get("guard")
    return {**zoo().get(name, {}), **card}


def is_served(spec: str, options: Mapping[str, Any]) -> bool:
    """Whether a guard runs elsewhere: there it may fail now and answer later, without batches."""
    return described(spec).get("kind") == "api" or options.get("engine") == "server"


def guard_identity(spec: str, options: Mapping[str, Any]) -> str:
    """A key of what a guard's verdicts depend on: models by content, texts of its prompt, options.

    Args:
        spec, options: as for `load_guard`.
    """
    known = {**described(spec), **options}
    for name in PATIENCE:
        known.pop(name, None)
    if "policy" in options:
        known["policy"] = policy_text(options["policy"])
    if has_card(spec) and known.get("kind") != "lora_guard" and not is_adapter(spec):
        known.pop("base_model", None)  # what was trained is whole, and lies in the folder
    models = {}
    for key in MODELS:
        model = known.pop(key, None)
        if model and known.get("kind") == "api":  # a name of the service
            models[key] = str(model)
        elif model:
            models[key] = fingerprint(str(model))
    texts = []
    templates = [known.get("template", "beavertails")]  # a classifier's, where nothing is said
    for message in known.get("messages", ()):
        if "content_file" in message:
            templates.append(message["content_file"])
    for name in templates:
        with suppress(UserError):  # an unknown one says so when the guard is loaded
            texts.append(template_text(str(name)))
    spec = ALIASES.get(spec, spec)
    own = fingerprint(spec) if Path(spec).is_dir() or spec not in zoo() else spec
    return digest([VERSION, own, models, texts, known])
