"""Columns of other data sets, read as their papers define them."""

import pytest
from checks import user_error, write_rows

from common.conversation import pair
from common.data import load_conversations


@pytest.fixture
def load(tmp_path):
    """`load(row)`: the conversation of a row of JSON."""

    def read(row: dict) -> dict:
        (found,) = load_conversations(str(write_rows(tmp_path / "rows.jsonl", [row])))
        return found

    return read


@pytest.mark.parametrize("toxicity", [0, 1])
def test_toxicchat(load, toxicity):
    """The label is the prompt's; what a model answered and the automatic scores are left out."""
    found = load(
        {
            "conv_id": "c1",
            "user_input": "Hello?",
            "model_output": "Hi!",
            "human_annotation": True,
            "toxicity": toxicity,
            "jailbreaking": 0,
            "openai_moderation": "[]",
        }
    )
    assert found["id"] == "c1"
    assert found["messages"] == pair("Hello?")
    assert found["prompt_unsafe"] is bool(toxicity)
    assert found["response_unsafe"] is None


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"S": 0, "H": 0}, False),
        ({"S": 0, "V2": 1}, True),
        ({"SH": 1}, True),
        ({"S": None}, None),
        ({"S": False, "H": True}, True),
        ({"S": "0.0", "H": "1.0"}, True),
        ({"S": "false", "H": "TRUE"}, True),
    ],
    ids=str,
)
def test_openai_moderation(load, flags, expected):
    """Unsafe if any present key is 1; an absent or null key is unknown."""
    assert load({"prompt": "Some text."} | flags)["prompt_unsafe"] is expected


def test_a_flag_that_is_no_flag_is_refused(load):
    with user_error(r"rows.jsonl, line 1, field H"):
        load({"prompt": "Some text.", "S": 0, "H": 7})


def test_other_rows_are_left_alone(load):
    """A column that happens to be called S, among others that no known data set has."""
    row = {"prompt": "Some text.", "S": 1, "mine": 2, "prompt_label": "safe"}
    assert load(row)["prompt_unsafe"] is False
