"""What a guard's verdict means to a client: flagged or not, the categories, Perspective's scores."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.conversation import (
    Message,
    UserError,
    Verdict,
    check_messages,
    judged_label,
    pair,
    with_question,
)
from common.data.files import read_yaml
from common.labels import UNSAFE
from guards.base import (
    Guard,
    decides_above,
    is_flagged,
)
from guards.classifier import means_safe

TEXT_IS = ("prompt", "response")
TOXICITY = "TOXICITY"  # of Perspective: by default the score that decides
# An attribute of Perspective's: the categories of which the highest counts.
Attributes = Mapping[str, list[str]]


class NoVerdict(Exception):
    """The guard could not judge. The message may quote the text."""


@dataclass(frozen=True)
class Answer:
    """What is said of one conversation. `unsafe` stands among the categories: it is the decision."""

    flagged: bool
    scores: dict[str, float]
    categories: dict[str, bool]


class Reader:
    """How the verdicts of one guard are read.

    What is flagged `guards.base.is_flagged` says. A category is flagged above a threshold of its
    own, or else that of the text.

    Args:
        text_is: whether a text alone is a prompt or a response; None: a prompt, unless the guard
            judges responses alone.
        attributes: see `read_attributes`.
    """

    def __init__(
        self,
        guard: Guard,
        text_is: str | None = None,
        attributes: Attributes | None = None,
    ):
        self.guard = guard
        self.attributes = {TOXICITY: [UNSAFE]}
        self.attributes.update(attributes or {})
        judges_prompts = "prompt_unsafe" in guard.judges
        self.text_is = text_is or ("prompt" if judges_prompts else "response")
        if f"{self.text_is}_unsafe" not in guard.judges:
            known = ", ".join(guard.judges)
            raise UserError(f"--text_is {text_is}: the guard judges {known}")
        self.needs_question = "response" not in getattr(guard, "inputs", ())

    def conversation(self, text: str) -> list[Message]:
        """A text alone, as the guard judges it."""
        turns = pair(text) if self.text_is == "prompt" else pair(None, text)
        return self.fitting(turns)

    def fitting(self, messages: list[dict[str, Any]]) -> list[Message]:
        """A conversation as the guard reads it. For a guard of pairs, an answer alone answers an
        empty question.

        Raises:
            UserError: it is none, or ends with a turn that the guard does not judge.
        """
        turns = check_messages(messages, "request", allow_empty=True)
        if judged_label(turns) not in self.guard.judges:
            known = ", ".join(self.guard.judges)
            what = f"ends with a turn of the {turns[-1]['role']}, and the guard judges {known}"
            raise UserError(f"request, field messages: {what}")
        return with_question(turns) if self.needs_question else turns

    def answer(
        self,
        messages: list[Message],
        verdict: Verdict,
    ) -> Answer:
        """Read the verdict on a conversation.

        Raises:
            NoVerdict: there is none: an error, or no opinion. That is never "not flagged".
        """
        label = judged_label(messages)
        score = getattr(verdict, label)
        if verdict.error is not None:
            raise NoVerdict(verdict.error)
        if score is None:
            raise NoVerdict(f"the guard says nothing of {label}")
        thresholds = self.guard.thresholds
        flagged = is_flagged(verdict, label, thresholds)
        limit = decides_above(thresholds, label)
        scores = {}
        categories = {}
        for name, probability in verdict.categories.items():
            if means_safe(name):
                continue
            own = thresholds.get(name)
            above = own["value"] if own else limit
            scores[name] = probability
            categories[name] = probability > above
        scores[UNSAFE] = score
        categories[UNSAFE] = flagged
        return Answer(flagged, scores, categories)

    def attribute(self, name: str, answer: Answer) -> float:
        """Perspective's score of an attribute that `attributes` names."""
        categories = self.attributes[name]
        return max(answer.scores[category] for category in categories)


def read_attributes(path: str | Path, guard: Guard) -> dict[str, list[str]]:
    """The YAML file that says which of Perspective's attributes is which category of the guard:

        TOXICITY: unsafe
        THREAT: ["violence,aiding_and_abetting,incitement", "terrorism,organized_crime"]

    Raises:
        UserError: it is no such file, or names a category that the guard does not have.
    """
    found = read_yaml(path)
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path}: expected lines such as TOXICITY: {UNSAFE}")
    labels = getattr(guard, "labels", None)
    if labels is None:  # of a guard that generates
        labels = getattr(guard, "variants", {})
    known = [UNSAFE]
    for name in labels:
        if name in ("", UNSAFE) or means_safe(name):
            continue
        known.append(name)
    attributes = {}
    for attribute, names in found.items():
        listed = names if isinstance(names, list) else [names]
        if not listed:
            raise UserError(f"{path}, field {attribute}: names no category")
        for name in listed:
            if name not in known:
                what = f"{name!r} is no category of the guard; it has: {'; '.join(known)}"
                raise UserError(f"{path}, field {attribute}: {what}")
        attributes[str(attribute)] = listed
    return attributes
