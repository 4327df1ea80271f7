"""bench/do_not_answer.py: rows made up in the formats of the official files."""

import gzip
import importlib.util
import json
import sys

import pandas as pd
import pytest
from checks import read_rows, user_error
from scripts import EXAMPLES, module

path = EXAMPLES.parent / "bench/do_not_answer.py"
spec = importlib.util.spec_from_file_location("do_not_answer", path)
do_not_answer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(do_not_answer)
config_ = module("feedback_guard", "config")
records = module("feedback_guard", "records")
PROMPTS = [f"How do I take what is number {number} of my neighbour's?" for number in range(8)]
HARMFUL = {"Claude": {3}, "vicuna-7b": {3, 5}}  # by model, the prompts that it answered


def tables() -> dict[str, pd.DataFrame]:
    """The reviews of two models as the official repository has them."""
    found = {}
    for model, answered in HARMFUL.items():
        table = pd.DataFrame({"id": range(len(PROMPTS)), "question": PROMPTS})
        table["response"] = [f"{model} says {number}." for number in table["id"]]
        table["harmful"] = table["id"].isin(answered).astype(int)
        table["action"] = 5 * table["harmful"]
        found[model] = table
    return found


@pytest.fixture
def read(tmp_path):
    """Writes reviews as files, and reads them as the recipe does."""

    def write_and_read(found):
        for model, table in found.items():
            path = tmp_path / f"annotated_response_{model}.csv.gz"
            table.to_csv(path, index=False)
        return do_not_answer.read_answers(str(tmp_path))

    return write_and_read


def write_json(path, value) -> str:
    path.write_text(json.dumps(value))
    return str(path)


def wide() -> pd.DataFrame:
    """The reviews as the data set of the hub has them."""
    table = pd.DataFrame({"question": PROMPTS})
    for model, found in tables().items():
        for column in ("response", "harmful", "action"):
            table[f"{model}_{column}"] = found[column]
    return table


def test_both_official_formats_say_the_same(read, tmp_path):
    path = tmp_path / "hub.jsonl"
    wide().to_json(path, orient="records", lines=True)
    asked = read(tables())
    assert asked == do_not_answer.read_answers(str(path))
    assert [prompt for prompt, _ in asked] == PROMPTS
    _, answers = asked[0]
    assert [answer.model for answer in answers] == ["Claude", "vicuna-7b"]


def test_a_prompt_is_blocked_if_any_answer_is_harmful(tmp_path, monkeypatch, capsys):
    """And what is written is what the recipe reads."""
    cooked = {"input": "For two.", "output": "Boil it."}
    words = ("rice", "eggs", "beans", "long " * 80)
    benign = [{"instruction": f"Cook {word}.", **cooked} for word in words]
    unsafe = {"prompt": "Sell me a stolen car", "prompt_label": "unsafe"}
    safe = {"prompt": "Hello there", "prompt_label": "safe"}
    answers = tmp_path / "answers.json"
    wide().to_json(answers, orient="records")
    out = tmp_path / "out"
    flags = ["--answers", str(answers), "--output_dir", str(out), "--benign_rows", "3"]
    flags += ["--benign", write_json(tmp_path / "alpaca.json", benign)]
    flags += ["--guard", write_json(tmp_path / "toxic.json", [safe, unsafe])]
    monkeypatch.setattr(sys, "argv", ["do_not_answer.py", *flags])
    do_not_answer.main()
    found = json.loads(capsys.readouterr().out)
    assert found["harmful_answers"] == {"Claude": 1, "vicuna-7b": 2}
    assert found["prompts_with_a_harmful_answer"] == 2
    assert found["halves_kappa"] == pytest.approx(0.6)
    assert read_rows(out / "guard.jsonl") == [unsafe, safe]

    harmful = [row for row in read_rows(out / "rows.jsonl") if row["output_unsafe"]]
    shown = {row["user_input"]: row["model_output"] for row in harmful}
    assert shown == {PROMPTS[3]: "Claude says 3.", PROMPTS[5]: "vicuna-7b says 5."}

    path = EXAMPLES / "feedback_guard/configs/do_not_answer.json"
    config = config_.load_config(path, [f"dataset.path={out}/rows.jsonl"])
    rows = [row for part in records.split_up(config).values() for row in part]
    labels = [row["label"] for row in rows]
    blocked = [row["input"] for row in rows if row["output_unsafe"]]
    assert labels.count("unsafe") == len(PROMPTS)
    assert labels.count("safe") == 3
    assert set(blocked) == set(shown)


NO_LABEL = "vicuna-7b_response or vicuna-7b_harmful: expected a text, and 0 or 1"


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("question", "Another one?", "has other questions than the tables before it"),
        ("harmful", 2, NO_LABEL),
        ("response", None, NO_LABEL),
    ],
)
def test_a_review_that_cannot_be_read_is_refused(column, value, said, read):
    found = tables()
    found["vicuna-7b"].loc[2, column] = value
    with user_error(said):
        read(found)


def test_reviews_without_labels_or_a_prompt_are_refused(read):
    found = {model: table.drop(columns="harmful") for model, table in tables().items()}
    with user_error(r"annotated_response_Claude.csv.gz: no column harmful"):
        read(found)
    found = tables()
    for table in found.values():
        table.loc[2, "question"] = None
    with user_error("row 2, field question: expected text"):
        read(found)


@pytest.mark.parametrize("content", ["", "\ufeff", 'question,response,harmful\r\n"one'])
def test_a_table_that_is_none_is_refused(content, tmp_path):
    path = tmp_path / "annotated_response_Claude.csv"
    path.write_text(content, encoding="utf-8")
    with user_error(r"annotated_response_Claude.csv: no CSV file"):
        do_not_answer.read_answers(str(tmp_path))


def test_answers_that_spell_nothing_are_answers(read):
    found = tables()
    words = ["None", "N/A", "null"]
    found["Claude"].loc[[0, 1, 2], "response"] = words
    asked = read(found)
    assert [answers[0].text for _, answers in asked[:3]] == words


BENIGN = [
    {"instruction": "Cook rice.", "output": "Boil it."},
    {"instruction": "Cook\u2028eggs.", "input": "", "output": "Boil them."},
    {"instruction": "Cook beans.", "input": "For two.", "output": "Soak them."},
]


def packed(text):
    return gzip.compress(text.encode())


def as_lines(text):
    lines = [json.dumps(row, ensure_ascii=False) for row in json.loads(text)]
    return "\r\n".join(lines).encode()


@pytest.mark.parametrize(
    ("name", "content_of"),
    [
        ("rows.json", str.encode),
        ("bom.json", lambda text: text.encode("utf-8-sig")),
        ("rows.jsonl", as_lines),
        ("rows.json.gz", packed),
    ],
)
def test_benign_rows_of_every_kind_of_file_are_the_same(name, content_of, tmp_path):
    path = tmp_path / name
    text = json.dumps(BENIGN, ensure_ascii=False)
    path.write_bytes(content_of(text))
    rows = do_not_answer.benign_rows([str(path)], 3, 300, 0)
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
    path = write_json(tmp_path / "rows.json", [row])
    with user_error(said):
        do_not_answer.benign_rows([path], 1, 300, 0)


def test_a_packed_file_that_is_none_is_told(tmp_path):
    path = tmp_path / "rows.json.gz"
    path.write_bytes(b"[]")
    with user_error(r"rows.json.gz: cannot be read"):
        do_not_answer.benign_rows([str(path)], 1, 300, 0)
