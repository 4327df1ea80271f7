"""`load_guard(spec)`: a guard from a folder that a recipe wrote, a name of zoo.yaml, or a hub id.

Every guard has `judge(list of messages lists) -> list[Verdict]`, batched, in order, with a progress
bar, and never takes a failure for "safe".
"""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import templates
from common.conversation import Messages, UserError
from common.data import taxonomy
from common.run import expand_home
from common.saving import is_unfinished
from guards.api import ApiGuard
from guards.base import LONG_INPUTS, SEES, Guard
from guards.card import (
    Card,
    ClassifierCard,
    GenerativeCard,
    GuardCard,
    LoraCard,
    card_path,
    check_equal_outputs,
    check_probe,
    check_thresholds,
    check_tokenizer_file,
    has_card,
    make_probe,
    read_card,
    write_card,
)
from guards.classifier import ClassifierGuard
from guards.generative import GenerativeGuard
from guards.known import near_names, zoo, zoo_name
from guards.lora import LoraGuard, find_base, is_adapter

logger = logging.getLogger(__name__)
__all__ = ["LONG_INPUTS", "Guard", "add_probe", "entry_of", "load_guard", "zoo"]

templates.FOLDERS.append(Path(__file__).parent / "prompts")

# What zoo.yaml says of a classifier, which load_guard is not told.
OF_CLASSIFIERS = (
    "template",
    "labels",
    "max_length",
    "unsafe_labels",
    "problem_type",
    "judges",
    "tokenizer",
)
# Options that make another guard of a folder than its card describes, so that the card's probe says
# nothing of it.
OTHER_GUARD = (
    "chat_template",
    "judges",
    "labels",
    "mode",
    "policy",
    "problem_type",
    "template",
    "tokenizer",
    "unsafe_labels",
)


def load_guard(spec: str, **options: Any) -> Guard:
    """Load a guard.

    The probe in the guard.json of a folder is judged at once, or, where the engine is a server,
    which may not be up yet, before the first verdict.

    Args:
        spec: a folder with guard.json, a name or hub id of zoo.yaml, or any folder or hub id with
        `template=`.
        options: `max_length`, `batch_tokens`, `long_inputs`, `template`, `labels`, … of the guard's
        class.
            `base_model`: where the base of a folder with adapters lies, instead of the place that
            guard.json names.

    Raises:
        UserError: unknown guard, a checkpoint that does not fit its description, or other scores
        than when it was
            saved.
    """
    spec = expand_home(spec)
    given = {}
    for name, value in options.items():
        if value is not None:
            given[name] = expand_home(value)
    check_thresholds(given.get("thresholds", {}))
    if has_card(spec):
        guard = _loaded(spec, read_card(spec), given)
    elif is_unfinished(spec):
        raise UserError(
            f"{spec}: not finished: the saving of a guard was interrupted here; run its train.py again"
        )
    else:
        guard = _by_name(spec, given)
    _check(guard, spec, given)
    return guard


def entry_of(spec: str) -> dict[str, Any]:
    """What zoo.yaml knows of a guard, by its name or hub id, or by the `guard` of a folder's card;
    {} if nothing.

    Raises:
        UserError: the folder's guard.json is wrong.
    """
    if has_card(spec):
        card = read_card(spec)
        return zoo()[card.guard] if isinstance(card, GenerativeCard) else {}
    name = zoo_name(spec)
    return {} if name is None else zoo()[name]


def _by_name(spec: str, options: dict[str, Any]) -> Guard:
    """A guard of zoo.yaml, or any classifier without a card."""
    name = zoo_name(spec)
    entry = zoo().get(name, {})
    kind = entry.get("kind", "classifier")
    if kind == "api":
        options.pop("long_inputs", None)  # a text over the service's limit is an error
        return _made(spec, ApiGuard, entry["service"], options)
    model = options.pop("model", entry.get("model", spec))
    if kind == "generative":
        guard = _made(spec, GenerativeGuard, model, {"entry": entry, **options})
    else:
        known = {key: entry[key] for key in OF_CLASSIFIERS if key in entry}
        if isinstance(known.get("labels"), str):
            known["labels"] = taxonomy(known["labels"])
        try:
            guard = _made(spec, ClassifierGuard, model, known | options)
        except UserError as error:
            near = near_names(spec)
            if name is not None or model != spec or not near:
                raise
            raise UserError(f"{error}; did you mean {near[0]}?") from None
    if model != spec:
        guard.name = name or spec
    return guard


def add_probe(
    folder: Path | str,
    card: Card | None = None,
    trained: Sequence[tuple[Messages, Mapping[str, float]]] = (),
    **options: Any,
) -> Guard | None:
    """Write the card of a folder with a probe: one conversation, and what the guard there says of
    it.

    What trains a guard calls it last: from then on `load_guard` notices when the guard is another
    one. The guard is loaded anew, as others will load it; where there is no memory for that, its
    card has no probe.

    Args:
        card: what the folder holds; None takes the card that is there.
        trained: conversations, each with the outputs that the model in memory has for it: what was
        saved must be that.
        options: of `load_guard`.

    Returns:
        The guard; None where there was no memory for it.

    Raises:
        UserError: the folder is no guard that can be loaded, or another one than was trained.
    """
    card = card or read_card(folder)
    known: dict[str, Any] = {"probe": None}
    given = {name: value for name, value in options.items() if value is not None}
    guard = None
    try:
        guard = _loaded(str(folder), card, {"progress": False} | given)
        check_equal_outputs(guard, trained)
        known["probe"] = make_probe(guard)
        if guard.sees in SEES:
            known["sees"] = guard.sees
    except torch.OutOfMemoryError:
        logger.warning(
            "%s: too little memory to load the guard; guards.add_probe adds its probe later",
            folder,
        )
    write_card(folder, card.model_copy(update=known))
    return guard


def _loaded(
    folder: str,
    card: Card,
    options: dict[str, Any],
) -> Guard:
    """The guard of a folder with a card, which nobody has checked yet."""
    if isinstance(card, GenerativeCard):
        return _generative(folder, card, options)
    if isinstance(card, LoraCard):
        return _made(folder, LoraGuard, folder, {"card": card, **options})
    if isinstance(card, ClassifierCard):
        return _made(folder, ClassifierGuard, folder, {"card": card, **options})
    what = f"{card.kind!r} is an arm that its recipe alone judges with"
    raise UserError(f"{card_path(folder)}, field kind: {what}")


def _generative(
    folder: str,
    card: GenerativeCard,
    options: dict[str, Any],
) -> Guard:
    """A folder with a whole causal LM, or with adapters on one."""
    check_tokenizer_file(folder)
    known = {
        # Without an adapter, which is of the zoo's own model.
        "entry": {
            **zoo()[card.guard],
            "tokenizer": folder,
            "adapter": None,
        },
        "max_length": card.max_length,
        "thresholds": card.threshold_values(),
    }
    if card.policy is not None:
        known["entry"]["policy"] = card.policy
    model = folder
    if is_adapter(folder):
        known["adapter"] = folder
        trust = options.get("trust_remote_code", False)
        model = find_base(folder, card, options.pop("base_model", None), trust)
    guard = _made(folder, GenerativeGuard, model, known | options)
    guard.name = Path(folder).name
    return guard


def _made(
    spec: str,
    kind: type[Guard],
    model: str,
    options: dict[str, Any],
) -> Guard:
    options = dict(options)
    if kind is not GenerativeGuard and options.pop("engine", "transformers") != "transformers":
        raise UserError(f"{spec}: --engine is for guards that generate")
    try:
        return kind(model, **options)
    except TypeError as error:  # an option of another kind of guard
        raise UserError(f"{spec}: {str(error).split('__init__() ')[-1]}") from None


def _check(
    guard: Guard,
    spec: str,
    options: Mapping[str, Any],
) -> None:
    """Judge the probe of a guard's folder, or of the adapter that was put on it; a server is asked
    later.
    """
    adapter = options.get("adapter")
    folder = adapter or spec
    if not has_card(folder):
        return
    card = read_card(folder)
    if adapter is not None:
        trust = options.get("trust_remote_code", False)
        find_base(adapter, card, options.get("model", spec), trust)
    as_saved = {"mode": "strict", **card.model_dump(include={"template", "labels"})}
    chat_template = Path(folder) / "chat_template.jinja"
    if chat_template.is_file():
        as_saved["chat_template"] = chat_template.read_text(encoding="utf-8")
    asked = [name for name in OTHER_GUARD if name in options]
    changed = [name for name in asked if options[name] != as_saved.get(name)]
    if changed:
        logger.info("%s: its probe is not judged, because of %s", folder, ", ".join(changed))
    elif options.get("engine") == "server":
        _check_later(guard, card, folder)
    else:
        check_probe(guard, card, folder)


def _check_later(guard: Guard, card: GuardCard, folder: str) -> None:
    """Judge the probe before the first verdict: a server may not be up yet.

    Until it answers, its errors are verdicts. Then what it serves is the guard, or nothing is
    judged.
    """

    guard.pending_check = partial(check_probe, guard, card, folder, must_answer=False)
