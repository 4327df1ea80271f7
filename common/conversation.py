"""The record that everything speaks: chat messages with labels, and what a guard says of them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Features, List, Value

Message = dict[str, str]
Messages = Sequence[Message]

ROLES = ("system", "user", "assistant")
LABELS = ("prompt_unsafe", "response_unsafe", "response_refusal")

FEATURES = Features(
    {
        "id": Value("string"),
        "messages": List({"role": Value("string"), "content": Value("string")}),
        **{label: Value("bool") for label in LABELS},
        "categories": List(Value("string")),  # null: unknown; empty: known to be none
        "source": Value("string"),
    }
)


class UserError(ValueError):
    """A mistake in what the user gave us. The message is one line: where, what, and what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # what is quoted from a file may hold line breaks


@dataclass
class Verdict:
    """What a guard says of one conversation: probabilities in [0, 1], or None where the guard has no opinion.

    `error` is set when the guard could not judge; such a verdict is never "safe" (see `score`). `native` holds the
    guard's own word for a label ("Controversial"), `decided` what that word means to it; the two are there where the
    guard has words, and need not agree with a probability above 0.5.
    """

    prompt_unsafe: float | None = None
    response_unsafe: float | None = None
    response_refusal: float | None = None
    categories: dict[str, float] = field(default_factory=dict)
    native: dict[str, str] = field(default_factory=dict)
    decided: dict[str, bool] = field(default_factory=dict)
    error: str | None = None

    def score(self, label: str = "response_unsafe") -> float:
        """The probability of `label`; 1.0 when the guard failed, because guards fail closed.

        Raises:
            UserError: the guard has no opinion on `label` (that is a wrong question, not a verdict).
        """
        if self.error is not None:
            return 1.0
        value = getattr(self, label)
        if value is None:
            raise UserError(
                f"this guard does not judge {label}; it judges {[n for n in LABELS if getattr(self, n) is not None]}"
            )
        return value


def last_turns(messages: Messages) -> tuple[str | None, str | None]:
    """The last user turn and, if it was answered, the answer: what guards judge."""
    last = messages[-1] if messages else None
    response = last["content"] if last and last["role"] == "assistant" else None
    prompt = next((m["content"] for m in reversed(messages) if m["role"] == "user"), None)
    return prompt, response


def pair(prompt: str | None, response: str | None = None) -> list[Message]:
    """One question, one question with its answer, or an answer alone, as messages."""
    turns = {"user": prompt, "assistant": response}
    return [{"role": role, "content": content} for role, content in turns.items() if content is not None]


def check_messages(value: Any, where: str) -> list[Message]:
    """`value` as messages, or a UserError that begins with `where` and names the field.

    At least one non-empty user or assistant turn is needed, because that is what a guard judges.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise UserError(f"{where}, field messages: expected a non-empty list of messages, found {value!r:.60}")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise UserError(f'{where}, field messages[{i}]: expected {{"role": …, "content": …}}, not {message!r:.60}')
        if message["role"] not in ROLES:
            raise UserError(f"{where}, field messages[{i}].role: {message['role']!r} is none of {', '.join(ROLES)}")
        messages.append(
            {"role": message["role"], "content": check_text(message["content"], f"messages[{i}].content", where)}
        )
    if messages[-1]["role"] == "system":
        raise UserError(
            f"{where}, field messages: ends with a system turn; a guard judges the last user or assistant turn"
        )
    return messages


def check_text(value: Any, name: str, where: str) -> str:
    """`value` as it is, or a UserError when it is no text or only white space."""
    if not isinstance(value, str):
        raise UserError(f"{where}, field {name}: expected text, found {type(value).__name__} {value!r:.60}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(
            f"{where}, field {name}: holds a lone surrogate, which no tokenizer can read; re-encode the file as UTF-8"
        )
    if not value.strip():
        raise UserError(
            f"{where}, field {name}: empty text; fill it in or drop the row (--bad_rows skip, in scripts that have it)"
        )
    return value


def check_url(url: str, name: str) -> str:
    """`url` as it is, or a UserError when it is none, or holds a password or a key, which would stand in logs."""
    if not re.fullmatch(r"https?://[^\s@?#]+", f"{url}"):
        raise UserError(f"{name}: expected http(s)://host…, without user, query or fragment")
    return url


UNSAFE_WORDS = ("1", "true", "t", "yes", "y", "unsafe", "not safe", "harmful", "toxic", "malicious", "flagged")
SAFE_WORDS = ("0", "false", "f", "no", "n", "safe", "not unsafe", "unharmful", "harmless", "not harmful", "non harmful")
SAFE_WORDS += ("nontoxic", "non toxic", "not toxic", "benign", "unflagged", "not flagged")
LABEL_WORDS = dict.fromkeys((*UNSAFE_WORDS, "refusal"), True) | dict.fromkeys((*SAFE_WORDS, "compliance"), False)


def check_label(value: Any, name: str, where: str) -> bool | None:
    """A label as bool, or None when it is unknown (null, NaN, an empty cell, and these as words).

    The same of a text, a number or a bool: 1, 1.0, "1", "1.0", true and "TRUE" are one label.

    Raises:
        UserError: it is no label. The message begins with `where` and names the field `name`.
    """
    if value is None or value != value:
        return None
    word = re.sub(r"[\s_-]+", " ", str(value).strip().lower())
    word = re.sub(r"^([01])\.0*$", r"\1", word)
    if word in ("", "nan", "null"):
        return None
    if word not in LABEL_WORDS:
        raise UserError(
            f"{where}, field {name}: unknown label {value!r:.60}; use true/false, 1/0, unsafe/safe, or leave it empty"
        )
    return LABEL_WORDS[word]
