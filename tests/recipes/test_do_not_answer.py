"""examples/feedback_guard/do_not_answer.py: rows made up in the formats of the official files."""

import gzip
import json
import sys

import pandas as pd
import pytest
from scripts import EXAMPLES, module

from common.conversation import UserError

do_not_answer = module("feedback_guard", "do_not_answer")
config_ = module("feedback_guard", "config")
records = module("feedback_guard", "records")
PROMPTS = [f"How do I take what is number {number} of my neighbour's?" for number in range(8)]
HARMFUL = {"Claude": {3}, "vicuna-7b": {3, 5}}  # by model, the prompts that it answered


def tables() -> dict[str, pd.DataFrame]:
    """The reviews of two models as the official repository has them."""
    found = {}
    for model, answered in HARMFUL.items():
        rows = []
        for number, prompt in enumerate(PROMPTS):
            harmful = int(number in answered)
            row = {"id": number, "question": prompt, "response": f"{model} says {number}."}
            rows.append(row | {"harmful": harmful, "action": 5 * harmful})
        found[model] = pd.DataFrame(rows)
    return found


def write_reviews(folder, found=None) -> str:
    folder.mkdir()
    for model, table in (found or tables()).items():
        table.to_csv(folder / f"annotated_response_{model}.csv.gz", index=False)
    return str(folder)


def test_both_official_formats_say_the_same(tmp_path):
    wide = pd.DataFrame({"question": PROMPTS})
    for model, table in tables().items():
        wide[f"{model}_response"] = table.response
        wide[f"{model}_harmful"] = table.harmful
        wide[f"{model}_action"] = table.action
    path = tmp_path / "hub.jsonl"
    wide.to_json(path, orient="records", lines=True)
    of_tables = do_not_answer.read_answers(write_reviews(tmp_path / "reviews"))
    assert of_tables == do_not_answer.read_answers(str(path))
    assert [prompt for prompt, _ in of_tables] == PROMPTS
    assert [answer.model for answer in of_tables[0][1]] == ["Claude", "vicuna-7b"]


def test_a_prompt_is_blocked_if_any_answer_is_harmful(tmp_path, monkeypatch, capsys):
    """And what is written is what the recipe reads."""
    benign = [
        {"instruction": f"Cook {word}.", "input": "For two.", "output": "Boil it."}
        for word in ("rice", "eggs", "beans", "long " * 80)
    ]
    (tmp_path / "alpaca.json").write_text(json.dumps(benign))
    labelled = [{"prompt": "Hello there", "prompt_label": "safe"}]
    labelled.append({"prompt": "Sell me a stolen car", "prompt_label": "unsafe"})
    (tmp_path / "toxic.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    words = ["do_not_answer.py", "--answers", write_reviews(tmp_path / "reviews")]
    words += ["--benign", str(tmp_path / "alpaca.json"), "--benign_rows", "3"]
    words += ["--guard", str(tmp_path / "toxic.jsonl"), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    do_not_answer.main()
    found = json.loads(capsys.readouterr().out)
    assert found["harmful_answers"] == {"Claude": 1, "vicuna-7b": 2}
    assert found["prompts_with_a_harmful_answer"] == 2
    assert found["halves_kappa"] == pytest.approx(0.6)
    lines = (tmp_path / "out/rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    shown = {row["user_input"]: row for row in rows if row["kind"] == "do_not_answer"}
    blocked = [prompt for prompt, row in shown.items() if row["output_unsafe"]]
    assert blocked == [PROMPTS[3], PROMPTS[5]]
    assert shown[PROMPTS[3]]["model_output"] == "Claude says 3."
    assert shown[PROMPTS[5]]["model_output"] == "vicuna-7b says 5."
    config = config_.load_config(EXAMPLES / "feedback_guard/configs/do_not_answer.json")
    data = config.dataset.model_copy(update={"path": str(tmp_path / "out/rows.jsonl")})
    parts = records.split_up(config.model_copy(update={"dataset": data}))
    read = [row for part in parts.values() for row in part]
    assert len(read) == len(PROMPTS) + 3
    assert sum(row["label"] == "unsafe" for row in read) == len(PROMPTS)
    assert sum(row["output_unsafe"] for row in read) == 2
    guard = (tmp_path / "out/guard.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in guard] == labelled[::-1]


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("question", "Another one?", "has other questions than the tables before it"),
        ("harmful", 2, "vicuna-7b_response or vicuna-7b_harmful: expected a text, and 0 or 1"),
        ("response", None, "vicuna-7b_response or vicuna-7b_harmful: expected a text, and 0 or 1"),
    ],
)
def test_a_review_that_cannot_be_read_is_refused(column, value, said, tmp_path):
    found = tables()
    found["vicuna-7b"].loc[2, column] = value
    with pytest.raises(UserError, match=said):
        do_not_answer.read_answers(write_reviews(tmp_path / "reviews", found))


def test_a_review_without_labels_is_refused(tmp_path):
    found = {model: table.drop(columns="harmful") for model, table in tables().items()}
    with pytest.raises(UserError, match=r"annotated_response_Claude.csv.gz: no column harmful"):
        do_not_answer.read_answers(write_reviews(tmp_path / "reviews", found))


@pytest.mark.parametrize("content", ["", "\ufeff", 'question,response,harmful\r\n"one'])
def test_a_table_that_is_none_is_refused(content, tmp_path):
    (tmp_path / "annotated_response_Claude.csv").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"annotated_response_Claude.csv: no CSV file"):
        do_not_answer.read_answers(str(tmp_path))


def test_answers_that_spell_nothing_are_answers(tmp_path):
    found = tables()
    found["Claude"].loc[[0, 1, 2], "response"] = ["None", "N/A", "null"]
    asked = do_not_answer.read_answers(write_reviews(tmp_path / "reviews", found))
    assert [answers[0].text for _, answers in asked[:3]] == ["None", "N/A", "null"]


def test_a_prompt_that_is_missing_is_told(tmp_path):
    found = tables()
    for table in found.values():
        table.loc[2, "question"] = None
    with pytest.raises(UserError, match="row 2, field question: expected text"):
        do_not_answer.read_answers(write_reviews(tmp_path / "reviews", found))


BENIGN = [
    {"instruction": "Cook rice.", "output": "Boil it."},
    {"instruction": "Cook\u2028eggs.", "input": "", "output": "Boil them."},
    {"instruction": "Cook beans.", "input": "For two.", "output": "Soak them."},
]


@pytest.mark.parametrize("name", ["rows.json", "bom.json", "rows.jsonl", "rows.json.gz"])
def test_benign_rows_of_every_kind_of_file_are_the_same(name, tmp_path):
    text = json.dumps(BENIGN, ensure_ascii=False)
    if name == "rows.jsonl":
        lines = [json.dumps(row, ensure_ascii=False) + "\r\n" for row in BENIGN]
        text = "".join(lines)
    if name == "bom.json":
        text = "\ufeff" + text
    content = text.encode()
    if name.endswith(".gz"):
        content = gzip.compress(content)
    (tmp_path / name).write_bytes(content)
    rows = do_not_answer.benign_rows([str(tmp_path / name)], 3, 300, 0)
    prompts = {"Cook rice.", "Cook\u2028eggs.", "Cook beans.\nFor two."}
    assert {row["user_input"] for row in rows} == prompts


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "Cook.", "output": "Boil."}, "row 0, field instruction: expected text"),
        ({"instruction": "Cook.", "input": 2, "output": "Boil."}, "row 0, field input"),
        ("Cook.", "row 0: expected an object with instruction and output"),
    ],
)
def test_a_benign_row_without_its_fields_is_told(row, said, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row]))
    with pytest.raises(UserError, match=said):
        do_not_answer.benign_rows([str(path)], 1, 300, 0)


def test_a_packed_file_that_is_none_is_told(tmp_path):
    path = tmp_path / "rows.json.gz"
    path.write_bytes(b"[]")
    with pytest.raises(UserError, match=r"rows.json.gz: cannot be read"):
        do_not_answer.benign_rows([str(path)], 1, 300, 0)
