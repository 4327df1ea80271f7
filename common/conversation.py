"""The record that everything speaks: chat messages with labels, and what a guard says of them."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Features, List, Value

Message = dict[str, str]
Messages = Sequence[Message]

ROLES = ("system", "user", "assistant")
OTHER_ROLES = {"developer": "system"}  # of OpenAI's format
# type: its field
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
FARTHEST = 12.0  # log-odds are compared up to here: beyond it, float32 probabilities hold no digits
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
        # what is quoted from a file may hold line breaks
        super().__init__(" ".join(message.splitlines()))


@dataclass
class Verdict:
    """What a guard says of one conversation: probabilities in [0, 1], or None where the guard has
    no opinion.

    `error` is set when the guard could not judge; such a verdict is never "safe" (see `score`).
    `native` holds the guard's own word for a label ("Controversial"), `decided` what that word
    means to it; the two are there where the guard has words, and need not agree with a probability
    above 0.5.
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
            UserError: the guard has no opinion on `label` (that is a wrong question, not a
                verdict).
        """
        if self.error is not None:
            return 1.0
        value = getattr(self, label)
        if value is None:
            raise UserError(
                f"this guard does not judge {label}; it judges {[n for n in LABELS if getattr(self, n) is not None]}"
            )
        return value


def log_odds(probability: float, farthest: float = FARTHEST) -> float:
    """log(p / (1 - p)), at most `farthest` from 0: by so much two guards' probabilities differ."""
    if not 0 < probability < 1:
        return math.copysign(farthest, probability - 0.5)
    odds = math.log(probability) - math.log1p(-probability)
    return max(-farthest, min(farthest, odds))


def last_turns(messages: Messages) -> tuple[str | None, str | None]:
    """The last user turn and, if it was answered, the answer: what guards judge."""
    last = messages[-1] if messages else None
    response = last["content"] if last and last["role"] == "assistant" else None
    prompt = next((m["content"] for m in reversed(messages) if m["role"] == "user"), None)
    return prompt, response


def pair(prompt: str | None, response: str | None = None) -> list[Message]:
    """One question, one question with its answer, or an answer alone, as messages."""
    turns = {"user": prompt, "assistant": response}
    return [
        {"role": role, "content": content} for role, content in turns.items() if content is not None
    ]


def check_messages(value: Any, where: str, *, allow_empty: bool = False) -> list[Message]:
    """`value` as messages: the one reading of a conversation, for data that is loaded and for what
    a guard is asked.

    Read as OpenAI's format has it: a content may be a list of text parts, which are joined by a
    line break, and "developer" is another word for "system". Turns of one role in a row are one
    turn, joined by a blank line, because guards judge the last turn.

    Args:
        where: what an error begins with.
        allow_empty: a content may be without text. In data it may not.

    Raises:
        UserError: it is no conversation, or holds what a guard of text does not see (images, tool
            calls, tools' results, other roles). Names the field.
    """
    if isinstance(value, Mapping):
        raise UserError(
            f"{where}, field messages: expected a list of messages, found one: {value!r:.60}"
        )
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise UserError(
            f"{where}, field messages: expected a non-empty list of messages, found {value!r:.60}"
        )
    turns: list[Message] = []
    for index, message in enumerate(value):
        turn = _turn(message, f"messages[{index}]", where, allow_empty)
        if turns and turns[-1]["role"] == turn["role"]:
            turns[-1]["content"] += "\n\n" + turn["content"]
        else:
            turns.append(turn)
    if turns[-1]["role"] == "system":
        raise UserError(
            f"{where}, field messages: ends with a system turn; a guard judges the last user or assistant turn"
        )
    return turns


def _turn(message: Any, name: str, where: str, allow_empty: bool) -> Message:
    """One message, with its role by our name and its content as one text."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise UserError(
            f'{where}, field {name}: expected {{"role": …, "content": …}}, not {message!r:.60}'
        )
    role = message["role"]
    role = OTHER_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        known = ", ".join((*ROLES, *OTHER_ROLES))
        raise UserError(f"{where}, field {name}.role: {role!r} is none of {known}")
    for key in ("tool_calls", "function_call"):
        if message.get(key):
            raise UserError(
                f"{where}, field {name}.{key}: a call of a tool is no text that a guard could judge"
            )
    content = _joined_parts(message["content"], f"{name}.content", where)
    return {
        "role": role,
        "content": check_text(content, f"{name}.content", where, allow_empty=allow_empty),
    }


def _joined_parts(content: Any, name: str, where: str) -> Any:
    """The text of a list of OpenAI's content parts; any other content as it is."""
    if not isinstance(content, list | tuple) or not content:
        return content
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in TEXT_PARTS:
            raise UserError(
                f"{where}, field {name}[{index}]: expected a text part, not {part!r:.60}; guards judge text alone"
            )
        field = f"{name}[{index}].{TEXT_PARTS[kind]}"
        texts.append(check_text(part.get(TEXT_PARTS[kind]), field, where, allow_empty=True))
    return "\n".join(texts)


def judged_turns(messages: Messages) -> list[Message]:
    """Questions and answers in turn, as a guard's prompt quotes a whole conversation.

    System turns are no part of it, and neither is a greeting before the first question.
    """
    turns: list[Message] = []
    for message in messages:
        if message["role"] == "system" or (not turns and message["role"] == "assistant"):
            continue
        if turns and turns[-1]["role"] == message["role"]:
            joined = turns[-1]["content"] + "\n\n" + message["content"]
            turns[-1] = {**turns[-1], "content": joined}
        else:
            turns.append(message)
    return turns


def check_text(value: Any, name: str, where: str, *, allow_empty: bool = False) -> str:
    """`value` as it is, or a UserError when it is no text or, unless that is allowed, only white
    space.
    """
    if not isinstance(value, str):
        raise UserError(
            f"{where}, field {name}: expected text, found {type(value).__name__} {value!r:.60}"
        )
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(
            f"{where}, field {name}: holds a lone surrogate, which no tokenizer can read; re-encode the file as UTF-8"
        )
    if not allow_empty and not value.strip():
        raise UserError(
            f"{where}, field {name}: empty text; fill it in or drop the row (--bad_rows skip, in scripts that have it)"
        )
    return value


def check_url(url: str, name: str) -> str:
    """`url` as it is, or a UserError when it is none, or holds a password or a key, which would
    stand in logs.
    """
    if not re.fullmatch(r"https?://[^\s@?#]+", f"{url}"):
        raise UserError(f"{name}: expected http(s)://host…, without user, query or fragment")
    return url


UNSAFE_WORDS = (
    "1",
    "true",
    "t",
    "yes",
    "y",
    "unsafe",
    "not safe",
    "harmful",
    "toxic",
    "malicious",
    "flagged",
)
SAFE_WORDS = (
    "0",
    "false",
    "f",
    "no",
    "n",
    "safe",
    "not unsafe",
    "unharmful",
    "harmless",
    "not harmful",
    "non harmful",
)
SAFE_WORDS += ("nontoxic", "non toxic", "not toxic", "benign", "unflagged", "not flagged")
LABEL_WORDS = dict.fromkeys((*UNSAFE_WORDS, "refusal"), True) | dict.fromkeys(
    (*SAFE_WORDS, "compliance"), False
)


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
