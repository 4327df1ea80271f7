"""The one reading of a conversation: what is read, what is refused, and what a guard sees of it."""

import math

import pytest
from checks import user_error

from common.conversation import FARTHEST, UserError, check_messages, judged_turns, log_odds, pair
from common.templates import Part
from guards.base import LAST_TURN, LAST_TURNS, UNKNOWN, WHOLE_CONVERSATION, seen_of


def said(*turns: str) -> list[dict[str, str]]:
    """Turns written as `role: content`."""
    return [dict(zip(("role", "content"), turn.split(": "), strict=True)) for turn in turns]


def test_log_odds_of_a_rounded_probability():
    expected = {-1e-7: -FARTHEST, 0: -FARTHEST, 0.5: 0, 1: FARTHEST, 1.0000002: FARTHEST}
    assert {share: log_odds(share) for share in expected} == expected
    assert log_odds(0.9, 2) == 2
    assert math.isnan(log_odds(math.nan))


def test_data_and_judge_read_alike_but_for_empty_texts():
    empty = pair("Why?", "")
    assert check_messages(empty, "x", allow_empty=True) == empty
    with user_error(r"^x, field messages\[1\].content"):
        check_messages(empty, "x")


def test_turns_of_one_role_are_one_turn():
    """And what was given is not changed."""
    turns = ("system: a", "developer: b", "user: c", "user: d", "assistant: e")
    written = said(*turns)
    read = check_messages(written, "x")
    assert read == said("system: a\n\nb", "user: c\n\nd", "assistant: e")
    assert written == said(*turns)


def test_questions_and_answers_of_a_conversation():
    turns = said("system: s", "assistant: hi", "user: a", "system: t", "user: b", "assistant: c")
    assert judged_turns(turns) == said("user: a\n\nb", "assistant: c")
    assert judged_turns(pair(None, "hi")) == []


def parts(messages):
    return [Part(message["content"], True) for message in messages]


def prompts_only(messages):
    if messages[-1]["role"] == "assistant":
        raise UserError("judges prompts alone")
    return parts(messages)


def no_prompt(messages):
    raise UserError("has no prompt")


@pytest.mark.parametrize(
    ("render", "seen"),
    [
        (parts, WHOLE_CONVERSATION),
        (prompts_only, WHOLE_CONVERSATION),
        (lambda messages: parts(messages[-2:]), LAST_TURNS),
        (lambda messages: parts(messages[-1:]), LAST_TURN),
        (no_prompt, UNKNOWN),
    ],
    ids=["all turns", "all turns of prompts", "last turns", "last turn", "no prompt"],
)
def test_what_a_guard_sees_is_what_its_prompt_holds(render, seen):
    assert seen_of(render) == seen
