"""The reader of data files: what people's programs write is read, and what cannot be read is one
line.
"""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from common.conversation import UserError
from common.data import load_conversations, read_json, read_rows

QUESTION = {"prompt": "Why?", "response": "So.", "response_label": "unsafe"}
ANOTHER = {"prompt": "Wo? Über dem Fluß", "response": "Da.", "response_label": "safe"}


def rows(path) -> list:
    return [row for _, row in read_rows(path)]


def refusal(path) -> str:
    """The one line with which a file is refused as a whole."""
    with pytest.raises(UserError) as caught:
        rows(path)
    return str(caught.value)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("a.jsonl", [json.dumps(QUESTION), json.dumps(ANOTHER, ensure_ascii=False), ""]),
        ("a.ndjson", [json.dumps(QUESTION), json.dumps(ANOTHER)]),
        ("a.json", [json.dumps(QUESTION), json.dumps(ANOTHER), ""]),
        ("list.json", ["[", json.dumps(QUESTION) + ",", json.dumps(ANOTHER), "]"]),
        ("one_line.json", [json.dumps([QUESTION, ANOTHER])]),
        ("a.csv", [",".join(row) for row in (QUESTION, QUESTION.values(), ANOTHER.values())]),
        ("a.CSV", [";".join(row) for row in (QUESTION, QUESTION.values(), ANOTHER.values())]),
        ("tabs.csv", ["\t".join(row) for row in (QUESTION, QUESTION.values(), ANOTHER.values())]),
        ("a.tsv", ["\t".join(row) for row in (QUESTION, QUESTION.values(), ANOTHER.values())]),
    ],
)
def test_what_programs_write(tmp_path, name, lines, end, mark):
    """With the marks of Windows' programs and without, with any separator, JSON lines under either
    name.
    """
    path = tmp_path / name
    path.write_text(mark + end.join(lines), encoding="utf-8", newline="")
    assert rows(path) == [QUESTION, ANOTHER]


def test_lines_of_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\ufeffone\r\n\r\ntwo\u2028still two\r\n", encoding="utf-8", newline="")
    assert list(read_rows(path)) == [
        (f"{path}, line 1", {"text": "one"}),
        (f"{path}, line 3", {"text": "two\u2028still two"}),
    ]


def test_a_separator_within_quotes_separates_nothing(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('"prompt; or\ttext, quoted",label\n"a;b;c",safe\n')
    assert rows(path) == [{"prompt; or\ttext, quoted": "a;b;c", "label": "safe"}]
    path.write_text("prompt;response\na;b;c\n")
    (error,) = rows(path)
    assert (
        "line 2, field response: more cells follow; quote cells that contain the separator"
        in str(error)
    )


def test_a_file_of_a_cache_is_read_as_its_type_says(tmp_path):
    """Its name tells nothing, and the header of a .tsv may hold commas."""
    path = tmp_path / "0123abcd"
    path.write_text("prompt, or more, or less\tlabel\nHi\tsafe\n")
    ((_, row),) = read_rows(path, suffix=".tsv")
    assert row == {"prompt, or more, or less": "Hi", "label": "safe"}


def test_a_cell_longer_than_python_reads_by_itself(tmp_path):
    path, answer = tmp_path / "a.csv", "x" * 140_000
    path.write_text(f"prompt,response\nWhy?,{answer}\n")
    assert rows(path) == [{"prompt": "Why?", "response": answer}]


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ('{"prompt": "Hi", "n": ' + "9" * 5000 + "}", "Exceeds the limit (4300 digits)"),
        ('{"prompt": "Hi", "n": ' + "[" * 5000 + "]" * 5000 + "}", "maximum recursion depth"),
        ('{"prompt": "Hi", "prompt": "Ho"}', "the key 'prompt' is repeated"),
        ('{"prompt": "Hi", "n": {"a": 1, "a": 2}}', "the key 'a' is repeated"),
    ],
)
def test_one_odd_row_is_one_bad_row(tmp_path, odd, said):
    """Named with its line, and left out if bad rows are to be left out. A list is one value, which
    is refused.
    """
    good = json.dumps(QUESTION)
    path = tmp_path / "a.jsonl"
    path.write_text(f"{good}\n{odd}\n{good}\n")
    with pytest.raises(UserError) as caught:
        load_conversations(str(path))
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert said in str(caught.value)
    assert len(load_conversations(str(path), bad_rows="skip")) == 2
    whole = tmp_path / "a.json"
    whole.write_text(f"[{good}, {odd}, {good}]")
    assert said in refusal(whole)


def test_a_whole_surrogate_pair_is_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "\\ud83d\\ude00"}\n')
    assert rows(tmp_path / "a.jsonl") == [{"prompt": "\U0001f600"}]


def test_a_repeated_column_is_refused_by_name(tmp_path):
    """Whichever of the two is taken, the other one's labels are lost, without a word."""
    (tmp_path / "a.csv").write_text("prompt,label,label\nHi,safe,unsafe\n")
    assert "field label: the column is repeated" in refusal(tmp_path / "a.csv")
    table = pa.table([["Hi"], ["safe"], ["unsafe"]], names=["prompt", "label", "label"])
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    assert "field label: the column is repeated" in refusal(tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text("Prompt,prompt\nHi,Ho\n")
    with pytest.raises(
        UserError, match="field prompt: the column is there twice, also as 'prompt'"
    ):
        load_conversations(str(tmp_path / "b.csv"), bad_rows="skip")


def test_a_file_of_one_value(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('\ufeff{"instructions": ["Say it."], "inputs": []}', encoding="utf-8")
    assert read_json(path) == {"instructions": ["Say it."], "inputs": []}
    for content, said in (
        ('{"a": 1, "a": 2}', "'a' is repeated"),
        ("", "empty"),
        ("{", "malformed JSON"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=said):
            read_json(path)


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text(json.dumps(QUESTION))
    assert rows("~/a.jsonl") == [QUESTION]
    assert (
        load_conversations("~/a.jsonl").to_list()
        == load_conversations(str(tmp_path / "a.jsonl")).to_list()
    )


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "label"),
    [
        (
            [
                "unsafe",
                "Harmful",
                "toxic",
                "flagged",
                "yes",
                "Y",
                "TRUE",
                "t",
                "1",
                "1.0",
                1,
                1.0,
                True,
            ],
            True,
        ),
        (
            [
                "safe",
                "benign",
                "non-toxic",
                "nontoxic",
                "not_toxic",
                "harmless",
                "No",
                "n",
                "F",
                "0.0",
                0,
                0.0,
                False,
            ],
            False,
        ),
        (["", " ", "NaN", "null", None, float("nan")], None),
    ],
)
def test_a_label_is_the_same_in_every_type_of_file(tmp_path, words, label):
    for word in words:
        row = {"prompt": "Why?", "response": "So.", "response_label": word}
        (tmp_path / "a.jsonl").write_text(json.dumps(row))
        cell = "" if word is None else word
        (tmp_path / "a.csv").write_text(f"prompt,response,response_label\nWhy?,So.,{cell}\n")
        pa.parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
        for name in ("a.jsonl", "a.csv", "a.parquet"):
            (found,) = load_conversations(str(tmp_path / name))["response_unsafe"]
            assert found is label, (word, name)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ('["a", "b, c"]', ["a", "b, c"]),
        ("a; b, c", ["a", "b, c"]),
        ("a;", ["a"]),
        ("a", ["a"]),
        ("", None),
        (" ", None),
    ],
)
def test_categories_of_a_cell(tmp_path, written, expected):
    cell = written.replace('"', '""')
    (tmp_path / "a.csv").write_text(f'prompt,response,categories\nWhy?,So.,"{cell}"\n')
    assert load_conversations(str(tmp_path / "a.csv"))["categories"][0] == expected


def test_columns_are_known_however_they_are_capitalised(tmp_path):
    (tmp_path / "a.csv").write_text(
        "ID, Prompt,RESPONSE,Response Label,Categories\n7,Why?,So.,unsafe,a; b\n"
    )
    (row,) = load_conversations(str(tmp_path / "a.csv"))
    assert (row["id"], row["response_unsafe"], row["categories"]) == ("7", True, ["a", "b"])
    assert [turn["content"] for turn in row["messages"]] == ["Why?", "So."]


def test_two_names_of_one_label(tmp_path):
    """What is known counts; which name stands there empty does not."""
    path = tmp_path / "a.jsonl"
    path.write_text(
        json.dumps(
            {"prompt": "Hi", "response": "Ho", "response_label": "unsafe", "response_unsafe": None}
        )
    )
    assert load_conversations(str(path))["response_unsafe"][0] is True


def test_a_label_of_a_prompt(tmp_path):
    """`label` is the prompt's where there is nothing else that it could mean, and beside our own
    names it is none.
    """
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "Hi", "label": "unsafe"}))
    assert load_conversations(str(path))["prompt_unsafe"][0] is True
    path.write_text(json.dumps(QUESTION | {"label": "homonyms"}))
    assert load_conversations(str(path))["response_unsafe"][0] is True
