"""Rows, files and names that load_benchmark refuses, each in one line that says where and what."""

import pytest
from checks import user_error
from test_benchmarks import rows_of

from guards.suite.benchmarks import load_benchmark

XSTEST_ROW = {"prompt": "May I?", "label": "safe", "type": "homonyms"}
SAFERLHF_ROW = {"prompt": "q", "response_0": "a", "response_1": "b", "is_response_0_safe": True}
AEGIS_ROW = {"text": "q", "text_type": "user_message", "labels_0": "Safe", "labels_1": None}
TOXIGEN_ROW = {"text": "q", "toxicity_ai": "a", "toxicity_human": 1}
NOT_A_HUMANS = {"user_input": "q", "toxicity": 1}
NO_TURNS = {"blue_conversations": "text"}
SYSTEM_TURN = {"blue_conversations": {"0": [{"from": "system", "value": "a"}]}}
REFUSED = [
    ("xstest_prompt", XSTEST_ROW | {"label": "maybe"}, "line 1, field label: unknown label"),
    ("xstest_prompt", XSTEST_ROW | {"label": None}, "line 1, field label: no label"),
    ("xstest_prompt", {"prompt": "May I?"}, "line 1, field label: missing"),
    ("xstest_prompt", {"label": "safe"}, "line 1, field prompt: missing"),
    ("xstest_prompt", XSTEST_ROW | {"prompt": "  "}, "line 1, field prompt: empty text"),
    ("xstest_prompt", XSTEST_ROW | {"prompt": 3}, "line 1, field prompt: expected text"),
    ("xstest_prompt", [1, 2], "line 1: expected an object"),
    ("toxicchat", NOT_A_HUMANS, "no rows; left out: {'human_annotation is not True': 1}"),
    ("openai_moderation", {"prompt": "q", "s": 1}, "line 1, field S: missing"),
    ("openai_moderation", {"prompt": "q", "S": 2}, "line 1, field S: unknown label 2"),
    ("aegis1_prompt", AEGIS_ROW, "line 1, field labels_1: no label"),
    ("toxigen", TOXIGEN_ROW, "line 1, field toxicity_ai: expected a number"),
    ("saferlhf", SAFERLHF_ROW, "line 1, field is_response_1_safe: missing"),
    ("convabuse", {"user": "q"}, "none of eight annotators gave a level"),
    ("dices_350", {"context": "Hello.", "response": "a"}, "line 1, field context: expected turns"),
    ("prosocial_dialog", {"context": "q", "response": "a"}, "line 1, field .*_id: missing"),
    ("harmfulqa_conversations", {"blue_conversations": {}}, "field red_conversations: missing"),
    ("harmfulqa_conversations", NO_TURNS, "line 1, field blue_.*expected a list of turns"),
    ("harmfulqa_conversations", SYSTEM_TURN, r"\[0\], field from: unknown label 'system'"),
    ("bot_adversarial_dialogue_prompt", {"text": "text:q"}, "field speaker_to_eval: missing"),
]


@pytest.mark.parametrize(("name", "row", "said"), REFUSED)
def test_refused_rows(name, row, said, tmp_path):
    with user_error(rf"rows\.jsonl.*{said}"):
        rows_of(name, tmp_path, [row])


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("r.csv", None, r"r\.csv: no such file"),
        ("r.xlsx", b"x", r"r\.xlsx: unknown file type"),
        ("r.json", b'[\n{"prompt": }]', r"r\.json, line 2, column 12: malformed JSON"),
        ("r.txt", b"caf\xe9", r"r\.txt, line 1: not UTF-8"),
        ("r.json", b'{"instructions": 3}', r"r\.json, instructions: expected a list"),
        ("r.json", b"[3]", r"r\.json, row 0: expected an object"),
        ("r.txt", b"\n \n", r"r\.txt: no rows"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_files(file, content, said, tmp_path):
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with user_error(said):
        load_benchmark(f"harmfulq@{tmp_path / file}")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("xstest", "no benchmark 'xstest'; near it: .*xstest_prompt"),
        ("Beavertail@rows.csv", "near it: beavertails"),
        ("xstest_prompt@", "no file after the @"),
    ],
)
def test_refused_names(spec, said):
    with user_error(said):
        load_benchmark(spec)
