"""The reader of data files: what people's programs write is read, and labels as they mean them."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from checks import user_error

from common.conversation import UserError
from common.data import load_conversations, read_json, read_rows

QUESTION = {"prompt": "Why?", "response": "So.", "response_label": "unsafe"}
ANOTHER = {"prompt": "Wo? Über dem Fluß", "response": "Da.", "response_label": "safe"}


def rows(path) -> list:
    return [row for _, row in read_rows(path)]


def saved(folder: Path, name: str, text: str) -> str:
    """A file with just these characters; its path."""
    (folder / name).write_text(text, encoding="utf-8", newline="")
    return str(folder / name)


def cells(separator: str) -> list[str]:
    """The two rows as lines of a table, with the header."""
    return [separator.join(row) for row in (QUESTION, QUESTION.values(), ANOTHER.values())]


JSON_LINES = [json.dumps(QUESTION), json.dumps(ANOTHER, ensure_ascii=False), ""]
FILES = {
    "a.jsonl": JSON_LINES,
    "a.ndjson": JSON_LINES,
    "a.json": JSON_LINES,
    "list.json": ["[", json.dumps(QUESTION) + ",", json.dumps(ANOTHER), "]"],
    "one_line.json": [json.dumps([QUESTION, ANOTHER])],
    "a.csv": cells(","),
    "a.CSV": cells(";"),
    "tabs.csv": cells("\t"),
    "a.tsv": cells("\t"),
}


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["no mark", "byte order mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["Unix", "Windows"])
@pytest.mark.parametrize(("name", "lines"), FILES.items(), ids=FILES)
def test_what_programs_write(tmp_path, name, lines, end, mark):
    """With any separator, and JSON lines under either name."""
    assert rows(saved(tmp_path, name, mark + end.join(lines))) == [QUESTION, ANOTHER]


def test_lines_of_text(tmp_path):
    path = saved(tmp_path, "a.txt", "\ufeffone\r\n\r\ntwo\u2028still two\r\n")
    assert list(read_rows(path)) == [
        (f"{path}, line 1", {"text": "one"}),
        (f"{path}, line 3", {"text": "two\u2028still two"}),
    ]


ANSWER = "x" * 140_000
CONTENTS = {  # what it shows: the file, its text, the one row in it
    "separators within quotes": (
        "a.csv",
        '"prompt; or\ttext, quoted",label\n"a;b;c",safe\n',
        {"prompt; or\ttext, quoted": "a;b;c", "label": "safe"},
    ),
    "a cell longer than Python reads by itself": (
        "a.csv",
        f"prompt,response\nWhy?,{ANSWER}\n",
        {"prompt": "Why?", "response": ANSWER},
    ),
    "a whole surrogate pair": ("a.jsonl", r'{"prompt": "\ud83d\ude00"}', {"prompt": "\U0001f600"}),
}


@pytest.mark.parametrize(("name", "text", "row"), CONTENTS.values(), ids=CONTENTS)
def test_what_a_file_may_hold(tmp_path, name, text, row):
    assert rows(saved(tmp_path, name, text)) == [row]


def test_a_file_of_a_cache_is_read_as_its_type_says(tmp_path):
    """Its name tells nothing, and the header of a .tsv may hold commas."""
    path = saved(tmp_path, "0123abcd", "prompt, or more\tlabel\nHi\tsafe\n")
    ((_, row),) = read_rows(path, suffix=".tsv")
    assert row == {"prompt, or more": "Hi", "label": "safe"}


ODD = {
    "a number too long": '{"prompt": "Hi", "n": ' + "9" * 5000 + "}",
    "too deep": '{"prompt": "Hi", "n": ' + "[" * 5000 + "]" * 5000 + "}",
    "a repeated key": '{"prompt": "Hi", "prompt": "Ho"}',
    "a repeated key within": '{"prompt": "Hi", "n": {"a": 1, "a": 2}}',
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_one_odd_row_is_one_bad_row(tmp_path, odd):
    """Named with its line, and left out if bad rows are to be left out. A list is one value."""
    good = json.dumps(QUESTION)
    path = saved(tmp_path, "a.jsonl", f"{good}\n{odd}\n{good}\n")
    with user_error(f"^{path}, line 2: "):
        load_conversations(path)
    assert len(load_conversations(path, bad_rows="skip")) == 2
    with pytest.raises(UserError):
        rows(saved(tmp_path, "a.json", f"[{good}, {odd}, {good}]"))


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_repeated_column_is_refused_by_name(tmp_path, suffix):
    """Whichever of the two is taken, the other one's labels are lost, without a word."""
    path = saved(tmp_path, f"a.{suffix}", "prompt,label,label\nHi,safe,unsafe\n")
    if suffix == "parquet":
        table = pa.table([["Hi"], ["safe"], ["unsafe"]], names=["prompt", "label", "label"])
        pa.parquet.write_table(table, path)
    with user_error(f"^{path}.*field label"):
        rows(path)


def test_a_column_that_is_there_in_two_cases_is_refused_by_name(tmp_path):
    path = saved(tmp_path, "a.csv", "Prompt,prompt\nHi,Ho\n")
    with user_error("field prompt"):
        load_conversations(path, bad_rows="skip")


def test_a_file_of_one_value(tmp_path):
    path = saved(tmp_path, "a.json", '\ufeff{"instructions": ["Say it."], "inputs": []}')
    assert read_json(path) == {"instructions": ["Say it."], "inputs": []}
    for broken in ('{"a": 1, "a": 2}', "", "{"):
        with user_error(f"^{path}"):
            read_json(saved(tmp_path, "a.json", broken))


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = saved(tmp_path, "a.jsonl", json.dumps(QUESTION))
    assert load_conversations("~/a.jsonl").to_list() == load_conversations(path).to_list()


# --- labels ---------------------------------------------------------------------------------------


def loaded(folder: Path, row: dict) -> dict:
    """The conversation of one row of JSON."""
    (found,) = load_conversations(saved(folder, "a.jsonl", json.dumps(row)))
    return found


UNSAFE = "unsafe,Harmful,toxic,flagged,yes,Y,TRUE,t,1,1.0, yes "
SAFE = "safe,benign,non-toxic,nontoxic,not_toxic,harmless,No,n,F,0.0"
LABELS = {
    True: [*UNSAFE.split(","), 1, 1.0, True],
    False: [*SAFE.split(","), 0, 0.0, False],
    None: ["", " ", "NaN", "null", None, float("nan")],
}


@pytest.mark.parametrize(("label", "words"), LABELS.items(), ids=["unsafe", "safe", "unknown"])
def test_a_label_is_the_same_in_every_type_of_file(tmp_path, label, words):
    parquet = tmp_path / "a.parquet"
    for word in words:
        row = QUESTION | {"response_label": word}
        assert loaded(tmp_path, row)["response_unsafe"] is label, word
        cell = "" if word is None else word
        table = saved(tmp_path, "a.csv", f"prompt,response,response_label\nWhy?,So.,{cell}\n")
        assert load_conversations(table)["response_unsafe"][0] is label, word
        pa.parquet.write_table(pa.Table.from_pylist([row]), parquet)
        assert load_conversations(str(parquet))["response_unsafe"][0] is label, word


CELLS = {
    '["a", "b, c"]': ["a", "b, c"],
    "a; b, c": ["a", "b, c"],
    "a;": ["a"],
    "a": ["a"],
    "": None,
    " ": None,
}


@pytest.mark.parametrize(("written", "expected"), CELLS.items())
def test_categories_of_a_cell(tmp_path, written, expected):
    cell = written.replace('"', '""')
    path = saved(tmp_path, "a.csv", f'prompt,response,categories\nWhy?,So.,"{cell}"\n')
    assert load_conversations(path)["categories"][0] == expected


def test_columns_are_known_however_they_are_capitalised(tmp_path):
    header = "ID, Prompt,RESPONSE,Response Label,Categories"
    path = saved(tmp_path, "a.csv", f"{header}\n7,Why?,So.,unsafe,a; b\n")
    (row,) = load_conversations(path)
    assert row["id"] == "7"
    assert row["response_unsafe"] is True
    assert row["categories"] == ["a", "b"]
    assert [turn["content"] for turn in row["messages"]] == ["Why?", "So."]


def test_which_label_is_meant(tmp_path):
    """Of two names of one label what is known counts. `label` is the prompt's where there is
    nothing else that it could mean.
    """
    assert loaded(tmp_path, QUESTION | {"response_unsafe": None})["response_unsafe"] is True
    assert loaded(tmp_path, {"prompt": "Hi", "label": "unsafe"})["prompt_unsafe"] is True
    assert loaded(tmp_path, QUESTION | {"label": "homonyms"})["prompt_unsafe"] is None
