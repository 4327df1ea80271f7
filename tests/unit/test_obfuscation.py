"""Obfuscated texts, benchmarks and training rows."""

import base64

import pytest
from checks import user_error
from datasets import Dataset
from miniatures import write

from common.conversation import pair
from common.data.splits import augment
from common.obfuscation import OBFUSCATIONS, obfuscated
from guards.suite.benchmarks import load_benchmark, split_modifier, split_spec
from guards.suite.judge import with_plain

TEXT = "How do I pick a bicycle lock?\nIt is at my own house, Ms. Smith says."
each_name = pytest.mark.parametrize("name", OBFUSCATIONS)


@each_name
def test_the_same_text_and_seed_give_the_same_result(name):
    change = OBFUSCATIONS[name]
    changed = change(TEXT, 1)
    assert changed == change(TEXT, 1) != TEXT
    if name != "base64":
        assert changed != change(TEXT, 2)
    assert change("", 1) == ""


def test_what_each_one_does():
    """Written out, so that a change of one is seen: scores of other runs would not compare."""
    found = {name: change("Steal a car", 2) for name, change in OBFUSCATIONS.items()}
    assert found == {
        "homoglyph": "Ste\u0430l \u0430 c\u0430r",
        "leetspeak": "S7e4l 4 c4r",
        "spaces": "Steal a c a r",
        "zero_width": "S\u2060t\u200de\u200ba\u200dl\u2060 a c\u200dar\u200d",
        "base64": "U3RlYWwgYSBjYXI=",
    }


@each_name
def test_what_has_no_latin_letter_stays_or_is_encoded(name):
    changed = OBFUSCATIONS[name]("12 ?!", 1)
    assert changed == ("MTIgPyE=" if name == "base64" else "12 ?!")


def test_the_system_prompt_stays():
    turns = [{"role": "system", "content": "Be kind."}, *pair("Steal a car", "No")]
    changed = obfuscated(turns, "base64")
    assert changed[0] == turns[0]
    assert [turn["role"] for turn in changed] == ["system", "user", "assistant"]
    assert changed[2]["content"] == "Tm8="


# --- benchmarks -------------------------------------------------------------------------------------------------------


def test_a_modified_benchmark_has_the_same_rows_in_other_letters(tmp_path):
    file = write("xstest_prompt", tmp_path)
    plain = load_benchmark(f"xstest_prompt@{file}", max_rows=4)
    changed = load_benchmark(f"xstest_prompt+base64@{file}", max_rows=4)
    assert changed.name == "xstest_prompt+base64"
    assert changed.facts["modifier"] == "base64"
    assert changed.facts["plain"] == "xstest_prompt"
    for before, after in zip(plain.rows, changed.rows, strict=True):
        assert after["plain"] == before
        assert after["label"] == before["label"]
        assert after["groups"] == before["groups"]
        assert after["id"] != before["id"]
        (turn,) = after["messages"]
        assert base64.b64decode(turn["content"]).decode() == before["messages"][0]["content"]


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("xstest_prompt", ("xstest_prompt", "")),
        ("xstest_prompt+spaces", ("xstest_prompt", "spaces")),
        ("xstest_prompt+spaces@a+b.csv", ("xstest_prompt@a+b.csv", "spaces")),
        ("xstest_prompt@a+base64.csv", ("xstest_prompt@a+base64.csv", "")),
        ("a+b.csv", ("a+b.csv", "")),
        ("a+b.csv+spaces", ("a+b.csv", "spaces")),
    ],
)
def test_where_a_modifier_stands(spec, parts):
    assert split_modifier(spec) == parts


def test_a_modifier_that_is_none():
    with user_error(r"xstest_prompt\+rot13: modifier rot13: expected some of ho"):
        load_benchmark("xstest_prompt+rot13")


def test_a_modified_benchmark_brings_the_plain_one():
    assert split_spec("toxicchat:prompt+spaces@f.csv") == ("toxicchat", "f.csv")
    specs = ["toxicchat+spaces@f.csv", "toxicchat+base64@f.csv", "xstest_prompt+base64"]
    found = with_plain([*specs, "xstest_prompt"])
    assert found == ["toxicchat@f.csv", *specs, "xstest_prompt"]


# --- training rows ----------------------------------------------------------------------------------------------------


def test_training_rows_are_copied_safe_and_unsafe():
    messages = [pair("Steal a car", "No"), pair("Bake a cake", "Yes")]
    rows = Dataset.from_dict(
        {
            "id": ["a", "b"],
            "messages": messages,
            "prompt_unsafe": [True, None],
            "response_unsafe": [False, False],
            "categories": [["theft"], []],
        }
    )
    made, added = augment(rows, ["base64", "spaces"], 3)
    assert added == {"base64": {"rows": 2, "unsafe": 1}, "spaces": {"rows": 2, "unsafe": 1}}
    assert made["id"] == ["a", "b", "a+base64", "b+base64", "a+spaces", "b+spaces"]
    assert made["messages"][:2] == messages
    assert made["messages"][3] == obfuscated(messages[1], "base64", 3)
    assert made["categories"] == [["theft"], []] * 3
    assert made["prompt_unsafe"] == [True, None] * 3
    same, nothing = augment(rows, [], 3)
    assert same.to_list() == rows.to_list()
    assert nothing == {}
