"""What benchmarks.yaml cannot say: functions that bring rows of a source into shape, and how all
read a cell.
"""

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from statistics import fmean
from typing import Any

from common.conversation import UserError, check_text

SourceRow = tuple[int, str, Mapping]  # index in the source, where it stands, the row
Rows = Iterable[SourceRow]


def cell(row: Mapping, column: str, where: str) -> Any:
    if column not in row:
        raise UserError(f"{where}, field {column}: missing (columns: {', '.join(map(str, row))})")
    return row[column]


def plain(value: Any) -> str | None:
    """A cell as one text, however a file or the hub writes it (True, "true", 1, "1.0"); None if
    null, NaN or empty.
    """
    if value is None or value != value:
        return None
    text = str(value).strip().lower().removesuffix(".0")
    return {"true": "1", "false": "0", "": None}.get(text, text)


def among(value: Any, wanted: Any) -> bool:
    """Whether a cell has one of the values that benchmarks.yaml names."""
    return plain(value) in [
        plain(one) for one in (wanted if isinstance(wanted, list) else [wanted])
    ]


def vote(value: Any, column: str, rule: Mapping, where: str) -> float:
    """What one cell says: 1 positive, 0 negative, 0.5 not sure."""
    if plain(value) is None:
        if "absent" not in rule:
            raise UserError(
                f"{where}, field {column}: no label (null or empty), which must not count as negative"
            )
        return float(rule["absent"] == "is")
    if among(value, rule["not"]):
        return 0.0
    if rule["is"] == "any" or among(value, rule["is"]):
        return 1.0
    if "half" in rule and among(value, rule["half"]):
        return 0.5
    known = ", ".join(str(rule[key]) for key in ("is", "not", "half") if key in rule)
    raise UserError(f"{where}, field {column}: unknown label {value!r:.60}; known: {known}")


def _saferlhf(rows: Rows) -> Iterator[SourceRow]:
    """1,000 safe and 1,000 unsafe answers to the same prompts, drawn as allenai/safety-eval draws
    them.

    Rows of which one answer is safe fill a safe and an unsafe list; the same indices are taken from
    both.
    """
    lists: dict[bool, list] = {True: [], False: []}
    for index, where, row in rows:
        columns = [f"is_response_{i}_safe" for i in (0, 1)]
        safe = [
            vote(cell(row, name, where), name, {"is": True, "not": False}, where) == 1
            for name in columns
        ]
        if safe[0] != safe[1]:
            for i, flag in enumerate(safe):
                found = {
                    "prompt": cell(row, "prompt", where),
                    "response": cell(row, f"response_{i}", where),
                }
                lists[flag].append((index, where, found | {"is_safe": flag}))
    drawn = random.Random(42).sample(range(len(lists[True])), min(1000, len(lists[True])))
    yield from (lists[flag][i] for flag in (True, False) for i in drawn)


def _convabuse(rows: Rows) -> Iterator[SourceRow]:
    """`abusive`: the share of a row's annotators (of up to eight) who gave it a level below 0 on
    the scale 1 … -3.
    """
    for index, where, row in rows:
        given = [
            [n for n in range(-3, 2) if among(row.get(f"Annotator{i}_is_abuse.{n}"), 1)]
            for i in range(1, 9)
        ]
        if not any(given):
            raise UserError(
                f"{where}, field Annotator1_is_abuse.1: missing; none of eight annotators gave a level"
            )
        yield index, where, {**row, "abusive": fmean(min(levels) < 0 for levels in given if levels)}


def _dices(rows: Rows) -> Iterator[SourceRow]:
    """`messages` from `context`, whose turns begin with USER: and LAMDA: (or A: and B:), and the
    last `response`.
    """
    for index, where, row in rows:
        context = check_text(cell(row, "context", where), "context", where)
        start, *parts = re.split(r"(?m)^(USER|LAMDA|A|B): ?", context)
        if start.strip() or not parts:
            raise UserError(
                f"{where}, field context: expected turns that begin with USER: or LAMDA: (A: or B:)"
            )
        turns = [
            *zip(parts[::2], parts[1::2], strict=True),
            ("B", check_text(row.get("response"), "response", where)),
        ]
        said = [
            ("user" if who in ("USER", "A") else "assistant", text.strip()) for who, text in turns
        ]
        yield (
            index,
            where,
            {**row, "messages": [{"role": role, "content": text} for role, text in said if text]},
        )


def _prosocial(rows: Rows) -> Iterator[SourceRow]:
    """`messages`: a user turn (`context`) after all turns of its dialogue before it; `response`
    answers it.
    """
    dialogues = defaultdict(list)
    for index, where, row in rows:
        place = str(cell(row, "response_id", where)).zfill(9)  # a number, in CSV as text
        dialogues[cell(row, "dialogue_id", where)].append((place, index, where, row))
    for dialogue in dialogues.values():
        before: list[dict[str, str]] = []
        for _, index, where, row in sorted(dialogue, key=lambda turn: turn[:2]):
            asked = [*before, {"role": "user", "content": cell(row, "context", where)}]
            before = [*asked, {"role": "assistant", "content": cell(row, "response", where)}]
            yield index, where, {**row, "messages": asked}


def _harmfulqa(rows: Rows) -> Iterator[SourceRow]:
    """`messages` and `colour`: the red (harmful) and blue conversations of a question, up to their
    last answer.
    """
    for index, where, row in rows:
        for colour in ("blue", "red"):
            field = f"{colour}_conversations"
            talks = cell(row, field, where) or {}
            for number, turns in talks.items() if isinstance(talks, Mapping) else [("", talks)]:
                at = f"{where}, field {field}[{number}]"
                turns = [] if turns is None else turns
                if not isinstance(turns, list) or not all(
                    isinstance(turn, Mapping) for turn in turns
                ):
                    raise UserError(f"{at}: expected a list of turns, found {turns!r:.60}")
                asked = [
                    vote(cell(turn, "from", at), "from", {"is": "human", "not": "gpt"}, at)
                    for turn in turns
                ]
                while asked and asked[-1]:
                    asked.pop()
                said = zip(asked, (cell(turn, "value", at) for turn in turns), strict=False)
                messages = [
                    {"role": "user" if user else "assistant", "content": text}
                    for user, text in said
                ]
                if messages:
                    yield index, where, {**row, "colour": colour, "messages": messages}


def _bot_adversarial(rows: Rows) -> Iterator[SourceRow]:
    """`messages` and the fields of a line of ParlAI's, name:value between tabs; the last turn is
    the one judged.
    """
    for index, where, row in rows:
        fields = dict(
            field.partition(":")[::2] for field in str(cell(row, "text", where)).split("\t")
        )
        last = vote(
            cell(fields, "speaker_to_eval", where),
            "speaker_to_eval",
            {"is": "bot", "not": "human"},
            where,
        )
        turns = enumerate(cell(fields, "text", where).split("\\n")[::-1], int(last))
        messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in turns][
            ::-1
        ]
        yield index, where, {**fields, "messages": messages}


PREPARE = {"saferlhf": _saferlhf, "convabuse": _convabuse, "dices": _dices, "prosocial": _prosocial,
           "harmfulqa": _harmfulqa, "bot_adversarial": _bot_adversarial}  # fmt: skip
