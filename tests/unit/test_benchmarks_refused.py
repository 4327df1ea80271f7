"""Rows, files and names that load_benchmark refuses, each in one line that says where and what."""

import pytest
from test_benchmarks import rows_of

from common.conversation import UserError
from guards.suite.benchmarks import load_benchmark

XSTEST_ROW = {"prompt": "May I?", "label": "safe", "type": "homonyms"}
SAFERLHF_ROW = {"prompt": "q", "response_0": "a", "response_1": "b", "is_response_0_safe": True}
AEGIS_ROW = {
    "text": "q",
    "text_type": "user_message",
    "labels_0": "Safe",
    "labels_1": None,
    "labels_2": "Safe",
}
HARMBENCH_ROW = {"test_case": "q", "generation": "a", "human_0": 1, "human_1": 0}
REFUSED = [
    (
        "xstest_prompt",
        XSTEST_ROW | {"label": "maybe"},
        "line 1, field label: unknown label 'maybe'; known: unsafe, safe",
    ),
    ("xstest_prompt", XSTEST_ROW | {"label": None}, "line 1, field label: no label"),
    ("xstest_prompt", {"prompt": "May I?"}, r"line 1, field label: missing \(columns: prompt\)"),
    ("xstest_prompt", {"label": "safe"}, "line 1, field prompt: missing"),
    ("xstest_prompt", XSTEST_ROW | {"prompt": "  "}, "line 1, field prompt: empty text"),
    ("xstest_prompt", XSTEST_ROW | {"prompt": 3}, "line 1, field prompt: expected text, found int"),
    ("xstest_prompt", [1, 2], "line 1: expected an object with the columns of xstest_prompt"),
    (
        "expguardtest_response",
        {"prompt": "q", "response": "a", "response_label": ""},
        "response_label: no label",
    ),
    (
        "expguardtest_response",
        {"prompt": "q", "response": " "},
        "no rows; left out: {'response is not present': 1}",
    ),
    (
        "toxicchat",
        {"user_input": "q", "toxicity": 1},
        "no rows; left out: {'human_annotation is not True': 1}",
    ),
    ("openai_moderation", {"prompt": "q", "s": 1}, "line 1, field S: missing"),
    ("openai_moderation", {"prompt": "q", "S": 2}, "line 1, field S: unknown label 2; known: 1, 0"),
    ("harmbench_response", HARMBENCH_ROW, "field human_2: missing"),
    ("aegis1_prompt", AEGIS_ROW, "field labels_1: no label"),
    (
        "toxigen",
        {"text": "q", "toxicity_ai": "a", "toxicity_human": 1},
        "field toxicity_ai: expected a number",
    ),
    ("saferlhf", SAFERLHF_ROW, "line 1, field is_response_1_safe: missing"),
    (
        "saferlhf",
        SAFERLHF_ROW | {"is_response_1_safe": None},
        "line 1, field is_response_1_safe: no label",
    ),
    ("convabuse", {"user": "q"}, "none of eight annotators gave a level"),
    (
        "dices_350",
        {"context": "Hello.", "response": "a"},
        "line 1, field context: expected turns that begin with USER:",
    ),
    (
        "dices_350",
        {"context": "USER: Hi.", "response": None},
        "line 1, field response: expected text",
    ),
    ("prosocial_dialog", {"context": "q", "response": "a"}, "line 1, field .*_id: missing"),
    (
        "harmfulqa_conversations",
        {"blue_conversations": {}},
        "line 1, field red_conversations: missing",
    ),
    (
        "harmfulqa_conversations",
        {"blue_conversations": {"0": [{"from": "gpt"}]}},
        r"\[0\], field value: missing",
    ),
    (
        "harmfulqa_conversations",
        {"blue_conversations": "text"},
        "line 1, field blue_.*expected a list of turns",
    ),
    (
        "harmfulqa_conversations",
        {"blue_conversations": {"3": [None]}},
        r"blue_conversations\[3\]: expected a list",
    ),
    (
        "harmfulqa_conversations",
        {"blue_conversations": {"0": [{"from": "system", "value": "a"}]}},
        r"\[0\], field from: unknown label 'system'; known: human, gpt",
    ),
    (
        "bot_adversarial_dialogue_prompt",
        {"text": "text:Hello."},
        "line 1, field speaker_to_eval: missing",
    ),
    (
        "bot_adversarial_dialogue_prompt",
        {"text": "text:q\tspeaker_to_eval:x"},
        "unknown label 'x'; known: bot, human",
    ),
]


@pytest.mark.parametrize(("name", "row", "said"), REFUSED)
def test_refused_rows(name, row, said, tmp_path):
    with pytest.raises(UserError, match=said) as caught:
        rows_of(name, tmp_path, [row])
    assert "\n" not in str(caught.value) and "rows.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("r.csv", None, r"r\.csv: no such file"),
        ("r.xlsx", b"x", r"r\.xlsx: unknown file type; expected .*\.txt"),
        ("r.json", b"", r"r\.json: the file is empty"),
        ("r.json", b'[\n{"prompt": }]', r"r\.json, line 2, column 12: malformed JSON"),
        ("r.json", b'{"instructions": 3}', r"r\.json, instructions: expected a list, found 3"),
        (
            "r.json",
            b"[3]",
            r"r\.json, row 0: expected an object with the columns of harmfulq, found 3",
        ),
        ("r.jsonl", b'{"text": "a"}\n{"text"}', r"r\.jsonl, line 2, column 8: malformed JSON"),
        ("r.txt", b"caf\xe9", r"r\.txt, line 1: not UTF-8"),
        ("r.csv", b"text\n\xff\xfe", r"r\.csv, line 2: not UTF-8"),
        ("r.csv", b"text,more\na", r"r\.csv, line 2, field more: missing"),
        ("r.parquet", b"text", r"r\.parquet: not a Parquet file"),
        ("r.txt", b"\n \n", r"r\.txt: no rows"),
    ],
)
def test_refused_files(file, content, said, tmp_path):
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=said):
        load_benchmark(f"harmfulq@{tmp_path / file}")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("xstest", r"xstest: no benchmark 'xstest'; near it: .*xstest_prompt"),
        ("Beavertail@rows.csv", "near it: beavertails"),
        ("qqqq", "near it: expguardtest_prompt, .*prosocial_dialog"),
        ("xstest_prompt@", "no file after the @; expected xstest_prompt@FILE"),
    ],
)
def test_refused_names(spec, said):
    with pytest.raises(UserError, match=said):
        load_benchmark(spec)
