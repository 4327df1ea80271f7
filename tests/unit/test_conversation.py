"""The one reading of a conversation: what is read, what is refused, and what a guard sees of it."""

import pytest

from common.conversation import UserError, check_messages, judged_turns, pair
from common.templates import Part
from guards.base import LAST_TURN, LAST_TURNS, UNKNOWN, WHOLE_CONVERSATION, seen_of


def said(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def test_data_and_judge_read_alike_but_for_empty_texts():
    empty = pair("Why?", "")
    assert check_messages(empty, "x", allow_empty=True) == empty
    with pytest.raises(UserError, match=r"^x, field messages\[1\].content: empty text"):
        check_messages(empty, "x")


def test_turns_of_one_role_are_one_turn():
    written = said(
        ("system", "a"), ("developer", "b"), ("user", "c"), ("user", "d"), ("assistant", "e")
    )
    assert check_messages(written, "x") == said(
        ("system", "a\n\nb"), ("user", "c\n\nd"), ("assistant", "e")
    )


def test_what_was_given_is_not_changed():
    written = said(("user", "a"), ("user", "b"))
    check_messages(written, "x")
    assert written == said(("user", "a"), ("user", "b"))


def test_questions_and_answers_of_a_conversation():
    written = said(
        ("system", "s"),
        ("assistant", "hi"),
        ("user", "a"),
        ("system", "t"),
        ("user", "b"),
        ("assistant", "c"),
    )
    assert judged_turns(written) == said(("user", "a\n\nb"), ("assistant", "c"))
    assert judged_turns(pair(None, "hi")) == []


def test_what_a_prompt_holds():
    def whole(messages):
        return [Part(message["content"], True) for message in messages]

    def answers_only(messages):
        return whole(messages[-1:])

    def prompts_only(messages):
        if messages[-1]["role"] == "assistant":
            raise UserError("judges prompts alone")
        return whole(messages)

    def none(messages):
        raise UserError("has no prompt")

    seen = [
        seen_of(one) for one in (whole, lambda m: whole(m[-2:]), answers_only, prompts_only, none)
    ]
    assert seen == [WHOLE_CONVERSATION, LAST_TURNS, LAST_TURN, WHOLE_CONVERSATION, UNKNOWN]
