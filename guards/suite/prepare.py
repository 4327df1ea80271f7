"""How cells of a benchmark's source are read, and what benchmarks.yaml cannot say: functions that
bring rows of a source into shape.
"""

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from common.conversation import UserError, check_text


@dataclass(frozen=True)
class SourceRow:
    """A row as it stands in the source, its number there, and how an error names its place."""

    cells: Mapping[str, Any]
    index: int
    where: str

    def wrong(self, column: str, what: str) -> UserError:
        """An error in a column of this row."""
        return UserError(f"{self.where}, field {column}: {what}")

    def cell(self, column: str) -> Any:
        """A cell that must be there."""
        if column not in self.cells:
            raise self.wrong(
                column,
                f"missing (columns: {', '.join(map(str, self.cells))})",
            )
        return self.cells[column]

    def text(self, column: str) -> str:
        """A cell that must be a text that is not empty."""
        return check_text(self.cell(column), column, self.where)

    def number(self, column: str) -> float:
        """A cell that must be a number, which a file may write as text."""
        value = self.cell(column)
        try:
            return float(value)
        except (TypeError, ValueError):
            raise self.wrong(column, "expected a number") from None

    def vote(self, column: str, rule: Mapping[str, Any]) -> float:
        """What one cell says: 1 positive, 0 negative, 0.5 not sure."""
        value = self.cells.get(column)
        if plain(value) is None:
            if "absent" in rule:
                return float(rule["absent"] == "is")
            self.cell(column)
            raise self.wrong(
                column,
                "no label (null or empty), which must not count as negative",
            )
        if among(value, rule["not"]):
            return 0.0
        if rule["is"] == "any" or among(value, rule["is"]):
            return 1.0
        if "half" in rule and among(value, rule["half"]):
            return 0.5
        words = [str(rule[key]) for key in ("is", "not", "half") if key in rule]
        known = ", ".join(words)
        raise self.wrong(column, f"unknown label {value!r:.60}; known: {known}")

    def with_cells(self, **cells: Any) -> "SourceRow":
        """The same row with more cells."""
        return replace(self, cells={**self.cells, **cells})


Rows = Iterable[SourceRow]


def plain(value: Any) -> str | None:
    """A cell as one text, however a file or the hub writes it (True, "true", 1, "1.0"); None if
    null, NaN or empty.
    """
    if value is None or value != value:
        return None
    text = str(value).strip().lower().removesuffix(".0")
    return {"true": "1", "false": "0", "": None}.get(text, text)


def among(value: Any, wanted: Any) -> bool:
    """Whether a cell has the value, or one of the values, that benchmarks.yaml names."""
    return plain(value) in map(plain, as_list(wanted))


def as_list(value: Any) -> list[Any]:
    """What benchmarks.yaml may write as one value or as several."""
    return value if isinstance(value, list) else [value]


def message(is_user: bool, content: str) -> dict[str, str]:
    """A turn of the user's, or of the assistant's."""
    return {
        "role": "user" if is_user else "assistant",
        "content": content,
    }


def _saferlhf(rows: Rows) -> Iterator[SourceRow]:
    """1,000 safe and 1,000 unsafe answers to the same prompts, drawn as allenai/safety-eval draws
    them.

    Rows of which one answer is safe fill a safe and an unsafe list; the same indices are taken from
    both.
    """
    answers: dict[bool, list[SourceRow]] = {True: [], False: []}
    for row in rows:
        pair = []
        for i in (0, 1):
            is_safe = row.vote(f"is_response_{i}_safe", {"is": True, "not": False}) == 1
            response = row.cell(f"response_{i}")
            pair.append(row.with_cells(response=response, is_safe=is_safe))
        if pair[0].cells["is_safe"] != pair[1].cells["is_safe"]:
            for answer in pair:
                answers[answer.cells["is_safe"]].append(answer)
    count = len(answers[True])
    drawn = random.Random(42).sample(range(count), min(1000, count))
    for is_safe in (True, False):
        for i in drawn:
            yield answers[is_safe][i]


def _convabuse(rows: Rows) -> Iterator[SourceRow]:
    """`abusive`: the share of a row's annotators (of up to eight) who gave it a level below 0 on
    the scale 1 … -3.
    """
    for row in rows:
        votes = []
        for annotator in range(1, 9):
            given = []
            for level in range(-3, 2):
                column = f"Annotator{annotator}_is_abuse.{level}"
                if among(row.cells.get(column), 1):
                    given.append(level)
            if given:
                votes.append(min(given) < 0)
        if not votes:
            what = "missing; none of eight annotators gave a level"
            raise row.wrong("Annotator1_is_abuse.1", what)
        yield row.with_cells(abusive=fmean(votes))


def _dices(rows: Rows) -> Iterator[SourceRow]:
    """`messages` from `context`, whose turns begin with USER: and LAMDA: (or A: and B:), and the
    last `response`.
    """
    for row in rows:
        start, *parts = re.split(r"(?m)^(USER|LAMDA|A|B): ?", row.text("context"))
        if start.strip() or not parts:
            what = "expected turns that begin with USER: or LAMDA: (A: or B:)"
            raise row.wrong("context", what)
        speakers = [*parts[::2], "B"]
        texts = [*parts[1::2], row.text("response")]
        messages = [
            message(speaker in ("USER", "A"), text.strip())
            for speaker, text in zip(speakers, texts, strict=True)
            if text.strip()
        ]
        yield row.with_cells(messages=messages)


def _prosocial(rows: Rows) -> Iterator[SourceRow]:
    """`messages`: a user turn (`context`) after all turns of its dialogue before it; `response`
    answers it.
    """
    dialogues = defaultdict(list)
    for row in rows:
        row.cell("response_id")
        dialogues[row.cell("dialogue_id")].append(row)
    for dialogue in dialogues.values():
        messages: list[dict[str, str]] = []
        for row in sorted(dialogue, key=lambda turn: turn.number("response_id")):
            messages.append(message(True, row.cell("context")))
            yield row.with_cells(messages=list(messages))
            messages.append(message(False, row.cell("response")))


def _harmfulqa(rows: Rows) -> Iterator[SourceRow]:
    """`messages` and `colour`: the red (harmful) and blue conversations of a question, up to their
    last answer.
    """
    for row in rows:
        for colour in ("blue", "red"):
            column = f"{colour}_conversations"
            talks = row.cell(column) or {}
            if not isinstance(talks, Mapping):
                talks = {"": talks}
            for number, turns in talks.items():
                messages = _talk(row, f"{column}[{number}]", turns)
                if messages:
                    yield row.with_cells(colour=colour, messages=messages)


def _talk(
    row: SourceRow,
    place: str,
    turns: Any,
) -> list[dict[str, str]]:
    """One conversation of HarmfulQA, up to its last answer."""
    messages = []
    for turn in as_list(turns or []):
        if not isinstance(turn, Mapping):
            raise row.wrong(
                place,
                f"expected a list of turns, found {turns!r:.60}",
            )
        read = SourceRow(turn, row.index, f"{row.where}, field {place}")
        is_user = read.vote("from", {"is": "human", "not": "gpt"}) == 1
        messages.append(message(is_user, read.cell("value")))
    while messages and messages[-1]["role"] == "user":
        messages.pop()
    return messages


def _bot_adversarial(rows: Rows) -> Iterator[SourceRow]:
    """`messages` and the fields of a line of ParlAI's, name:value between tabs; the last turn is
    the one judged.
    """
    for row in rows:
        cells = {}
        for field in str(row.cell("text")).split("\t"):
            name, _, value = field.partition(":")
            cells[name] = value
        line = replace(row, cells=cells)
        is_user = line.vote("speaker_to_eval", {"is": "bot", "not": "human"}) == 0
        messages = []
        for text in reversed(line.cell("text").split("\\n")):
            messages.insert(0, message(is_user, text))
            is_user = not is_user
        yield line.with_cells(messages=messages)


def _dynabench(rows: Rows) -> Iterator[SourceRow]:
    """`messages` from `policy`, which is the system prompt, and `transcript`, whose turns begin with
    User: or Agent:, up to the last of the agent's.
    """
    for row in rows:
        rules = as_list(row.cell("policy"))
        policy = "\n".join(str(rule) for rule in rules)
        messages = [{"role": "system", "content": check_text(policy, "policy", row.where)}]
        start, *parts = re.split(r"(?m)^[ \t]*'?(User|Agent)'?:", row.text("transcript"))
        if start.strip() or "Agent" not in parts[::2]:
            what = "expected turns that begin with User: or Agent:, one of the agent's"
            raise row.wrong("transcript", what)
        for speaker, text in zip(parts[::2], parts[1::2], strict=True):
            if text.strip():
                messages.append(message(speaker == "User", text.strip()))
        while messages[-1]["role"] == "user":
            messages.pop()
        yield row.with_cells(messages=messages)


PREPARE = {
    "saferlhf": _saferlhf,
    "convabuse": _convabuse,
    "dices": _dices,
    "prosocial": _prosocial,
    "harmfulqa": _harmfulqa,
    "bot_adversarial": _bot_adversarial,
    "dynabench": _dynabench,
}
