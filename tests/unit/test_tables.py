"""Columns of other data sets, read as their papers define them."""

import json

import pytest

from common.conversation import UserError
from common.data import load_conversations


def load(tmp_path, rows, **options):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_conversations(str(tmp_path / "rows.jsonl"), **options)


def test_toxicchat(tmp_path):
    """The label is the prompt's; what a model answered is left out, and so are the automatic
    scores.
    """
    row = {
        "conv_id": "c1",
        "user_input": "Hello?",
        "model_output": "Hi!",
        "human_annotation": True,
        "toxicity": 0,
    }
    rows = load(
        tmp_path,
        [
            row | {"jailbreaking": 0, "openai_moderation": "[]"},
            row | {"conv_id": "c2", "toxicity": 1},
        ],
    )
    assert rows["prompt_unsafe"] == [False, True] and rows["id"] == ["c1", "c2"]
    assert rows["messages"][0] == [{"role": "user", "content": "Hello?"}] and rows[
        "response_unsafe"
    ] == [None, None]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"S": 0, "H": 0}, False),
        ({"S": 0, "V2": 1}, True),
        ({"SH": 1}, True),
        ({"S": None}, None),
        ({"HR": 0}, False),
        ({"S": False, "H": True}, True),
        ({"S": "0.0", "H": "1.0"}, True),
        ({"S": "false", "H": "TRUE"}, True),
    ],
)
def test_openai_moderation(tmp_path, flags, expected):
    """Unsafe if any present key is 1; an absent or null key is unknown."""
    assert load(tmp_path, [{"prompt": "Some text.", **flags}])["prompt_unsafe"] == [expected]


def test_a_flag_that_is_no_flag_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"rows.jsonl, line 1, field H: unknown label 7"):
        load(tmp_path, [{"prompt": "Some text.", "S": 0, "H": 7}])


def test_other_rows_are_left_alone(tmp_path):
    """A column that happens to be called S, among others that no known data set has."""
    rows = load(tmp_path, [{"prompt": "Some text.", "S": 1, "mine": 2, "prompt_label": "safe"}])
    assert rows["prompt_unsafe"] == [False]
