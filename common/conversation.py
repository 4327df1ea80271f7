"""The record that everything speaks: chat messages with labels, and what a guard says of them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Features, List, Value
from scipy.special import logit

Message = dict[str, str]
Messages = Sequence[Message]

ROLES = ("system", "user", "assistant")
# The parts of a content in OpenAI's format that are text, and the field where it stands.
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
SURROGATE = re.compile("[\ud800-\udfff]")
LONE_SURROGATE = "holds a lone surrogate, which no tokenizer can read; re-encode the file as UTF-8"
FARTHEST = 12.0  # log-odds are compared up to here: beyond it, float32 probabilities hold no digits
LABELS = ("prompt_unsafe", "response_unsafe", "response_refusal")
UNSAFE_LABELS = ("prompt_unsafe", "response_unsafe")
LABEL_OF = {  # what is judged: the label that says whether it is unsafe
    "pair": "response_unsafe",
    "prompt": "prompt_unsafe",
    "response": "response_unsafe",
}

FEATURES = Features(
    {
        "id": Value("string"),
        "messages": List({"role": Value("string"), "content": Value("string")}),
        **{label: Value("bool") for label in LABELS},
        "categories": List(Value("string")),  # null: unknown; empty: known to be none
        "language": Value("string"),  # as the data name it, such as "en"; null: unknown
        "source": Value("string"),
    }
)


class UserError(ValueError):
    """A mistake in what the user gave us. The message is one line: where, what, and what to do."""

    def __init__(self, message: str):
        # what is quoted from a file may hold line breaks
        super().__init__(" ".join(message.splitlines()))


def one_line(error: BaseException, length: int = 200) -> str:
    """The beginning of what a library's error says, which may be a page; its type if it is silent."""
    return " ".join(str(error).split())[:length] or type(error).__name__


def check_option(flag: str, value: Any, known: Iterable[Any]) -> None:
    """Raise UserError for a value that an option does not have."""
    if value not in known:
        expected = ", ".join(str(one) for one in known if one is not None)
        raise UserError(f"{flag} {value}: expected one of {expected}")


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
            known = [name for name in LABELS if getattr(self, name) is not None]
            raise UserError(f"this guard does not judge {label}; it judges {known}")
        return value

    def opinion(self, label: str) -> float | None:
        """The probability of `label`; of a guard that has words alone 1 or 0. None where it failed,
        or says nothing of it.
        """
        if self.error is not None:
            return None
        if getattr(self, label) is None and label in self.decided:
            return float(self.decided[label])
        return getattr(self, label)


def log_odds(probability: float, farthest: float = FARTHEST) -> float:
    """log(p / (1 - p)), at most `farthest` from 0: by so much two guards' probabilities differ.

    A little above 1, as a sum may be rounded, is 1. What is no number stays none.
    """
    share = np.clip(probability, 0, 1)
    return float(np.clip(logit(share), -farthest, farthest))


def last_turns(messages: Messages) -> tuple[str | None, str | None]:
    """The last user turn and, if it was answered, the answer: what guards judge."""
    prompt = response = None
    for message in messages:
        if message["role"] == "user":
            prompt = message["content"]
            response = None
        elif message["role"] == "assistant":
            response = message["content"]
    return prompt, response


def judged_label(messages: Messages) -> str:
    """The label of the last turn: a user's is judged as a prompt, an assistant's as a response."""
    return "response_unsafe" if messages[-1]["role"] == "assistant" else "prompt_unsafe"


def pair(prompt: str | None, response: str | None = None) -> list[Message]:
    """One question, one question with its answer, or an answer alone, as messages."""
    turns = []
    if prompt is not None:
        turns.append({"role": "user", "content": prompt})
    if response is not None:
        turns.append({"role": "assistant", "content": response})
    return turns


def with_question(messages: Messages) -> list[Message]:
    """A conversation in which an answer alone answers an empty question."""
    turns = list(messages)
    roles = [turn["role"] for turn in turns]
    if "user" not in roles:
        turns.insert(roles.index("assistant"), {"role": "user", "content": ""})
    return turns


def parts_of(messages: Messages) -> dict[str, list[Message]]:
    """What a guard can judge of a conversation: its last `prompt`, the `response` to it alone, and
    both as a `pair`, of these what there is.
    """
    prompt, response = last_turns(messages)
    parts = {}
    if prompt is not None:
        parts["prompt"] = pair(prompt)
    if response is not None:
        parts["response"] = pair(None, response)
    if len(parts) == 2:
        parts["pair"] = pair(prompt, response)
    return parts


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
    place = f"{where}, field messages"
    if isinstance(value, Mapping):
        raise UserError(f"{place}: expected a list of messages, found one: {value!r:.60}")
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise UserError(f"{place}: expected a non-empty list of messages, found {value!r:.60}")
    turns = []
    for index, message in enumerate(value):
        turns.append(_turn(message, f"messages[{index}]", where, allow_empty))
    if turns[-1]["role"] == "system":
        raise UserError(
            f"{place}: ends with a system turn; a guard judges the last user or assistant turn"
        )
    return _joined(turns)


def _joined(turns: Messages) -> list[Message]:
    """Turns of one role in a row as one turn."""
    out: list[Message] = []
    for turn in turns:
        if out and out[-1]["role"] == turn["role"]:
            out[-1]["content"] += "\n\n" + turn["content"]
        else:
            out.append(dict(turn))
    return out


def _turn(message: Any, name: str, where: str, allow_empty: bool) -> Message:
    """One message, with its role by our name and its content as one text."""
    place = f"{where}, field {name}"
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise UserError(f'{place}: expected {{"role": …, "content": …}}, not {message!r:.60}')
    role = message["role"]
    if role == "developer":  # OpenAI's word
        role = "system"
    if role not in ROLES:
        known = ", ".join(ROLES)
        raise UserError(f"{place}.role: {role!r} is none of {known}, developer")
    for key in ("tool_calls", "function_call"):
        if message.get(key):
            raise UserError(f"{place}.{key}: a call of a tool is no text that a guard could judge")
    content = message["content"]
    if isinstance(content, list | tuple) and content:
        content = _joined_parts(content, f"{name}.content", where)
    text = check_text(content, f"{name}.content", where, allow_empty=allow_empty)
    return {"role": role, "content": text}


def _joined_parts(parts: Sequence[Any], name: str, where: str) -> str:
    """The text of a list of OpenAI's content parts."""
    texts = []
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in TEXT_PARTS:
            raise UserError(
                f"{where}, field {name}[{index}]: expected a text part, not {part!r:.60}; "
                "guards judge text alone"
            )
        key = TEXT_PARTS[kind]
        field_name = f"{name}[{index}].{key}"
        texts.append(check_text(part.get(key), field_name, where, allow_empty=True))
    return "\n".join(texts)


def judged_turns(messages: Messages) -> list[Message]:
    """Questions and answers in turn, as a guard's prompt quotes a whole conversation.

    System turns are no part of it, and neither is a greeting before the first question.
    """
    turns = [message for message in messages if message["role"] != "system"]
    while turns and turns[0]["role"] == "assistant":
        turns.pop(0)
    return _joined(turns)


def check_text(value: Any, name: str, where: str, *, allow_empty: bool = False) -> str:
    """`value` as it is, or a UserError when it is no text or, unless that is allowed, only white
    space.
    """
    place = f"{where}, field {name}"
    if not isinstance(value, str):
        raise UserError(f"{place}: expected text, found {type(value).__name__} {value!r:.60}")
    if SURROGATE.search(value):
        raise UserError(f"{place}: {LONE_SURROGATE}")
    if not allow_empty and not value.strip():
        raise UserError(
            f"{place}: empty text; fill it in or drop the row "
            "(--bad_rows skip, in scripts that have it)"
        )
    return value


def check_url(url: str, name: str) -> str:
    """`url` as it is, or a UserError when it is none, or holds a password or a key, which would
    stand in logs.
    """
    if not re.fullmatch(r"https?://[^\s@?#]+", f"{url}"):
        raise UserError(f"{name}: expected http(s)://host…, without user, query or fragment")
    return url


UNSAFE_WORDS = "1, true, t, yes, y, unsafe, not safe, harmful, toxic, malicious, flagged, refusal"
SAFE_WORDS = (
    "0, false, f, no, n, safe, not unsafe, unharmful, harmless, not harmful, non harmful, "
    "nontoxic, non toxic, not toxic, benign, unflagged, not flagged, compliance"
)
UNKNOWN_WORDS = ("", "nan", "null")


def check_label(value: Any, name: str, where: str) -> bool | None:
    """A label as bool, or None when it is unknown (null, NaN, an empty cell, and these as words).

    The same of a text, a number or a bool: 1, 1.0, "1", "1.0", true and "TRUE" are one label.

    Raises:
        UserError: it is no label. The message begins with `where` and names the field `name`.
    """
    word = f"{value}".strip().lower()
    word = re.sub(r"[\s_-]+", " ", word)
    word = re.sub(r"^([01])\.0*$", r"\1", word)
    if value is None or word in UNKNOWN_WORDS:
        return None
    if word in UNSAFE_WORDS.split(", "):
        return True
    if word in SAFE_WORDS.split(", "):
        return False
    raise UserError(
        f"{where}, field {name}: unknown label {value!r:.60}; "
        "use true/false, 1/0, unsafe/safe, or leave it empty"
    )
