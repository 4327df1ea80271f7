"""Loading: file types, row formats, hub layouts, and every bad input in one line."""

import json
import socket
from pathlib import Path

import pandas
import pyarrow as pa
import pyarrow.parquet
import pytest
from checks import user_error, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from common.conversation import FEATURES, LABELS, pair
from common.data import load_conversations, taxonomy

NAMES = taxonomy("beavertails")
TYPES = ("jsonl", "json", "csv", "parquet")


def beavertails(id: str, prompt: str, response: str, *named: str) -> dict:
    """A row as PKU-Alignment/BeaverTails has it."""
    return {
        "id": id,
        "prompt": prompt,
        "response": response,
        "category": {name: name in named for name in NAMES},
        "is_safe": not named,
    }


SAFE = beavertails("a", "May I feed bread to ducks?", "Oats are better for them.")
UNSAFE = beavertails("b", "My rent is due, any ideas?", "Take the till.", NAMES[5], NAMES[8])
QUOTED = beavertails("c", "Zitiere: „Ja, nein“\nund so", "He said, \"no\";\r\n'yes'\t…")
QA = {"prompt": "Hi", "response": "Hello"}


def write(path: Path, rows: list[dict]) -> str:
    """Write rows as the file's type; a CSV cell holds a list or an object as JSON."""
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        write_rows(path, rows)
    else:
        cells = [{name: cell(value) for name, value in row.items()} for row in rows]
        table = pandas.DataFrame(cells, dtype=object)
        table.to_csv(path, index=False, lineterminator="\r\n")  # a lone "\r" is quoted then
    return str(path)


def cell(value):
    return json.dumps(value) if isinstance(value, list | dict) else value


def jsonl(*rows: dict | str) -> bytes:
    """Lines of JSON; a text is a line as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return "\n".join(lines).encode()


def content(spec: str) -> list[dict]:
    """The conversations without what names the file."""
    return load_conversations(spec).remove_columns("source").to_list()


def conversation(id: str, messages: list[dict], categories=None, **labels) -> dict:
    row = {"id": id, "messages": messages, "categories": categories, "language": None}
    return row | dict.fromkeys(LABELS) | labels


def failure(spec: str, **options) -> str:
    """The message with which loading stops: always one line."""
    with user_error() as caught:
        load_conversations(spec, **options)
    return str(caught.value)


# --- file types and row formats -------------------------------------------------------------------


@pytest.mark.parametrize("type", TYPES)
def test_beavertails_rows(tmp_path, type):
    """Labels are read by key: the order of the keys may change from row to row."""
    shuffled = UNSAFE | {"category": dict(reversed(UNSAFE["category"].items()))}
    rows = [SAFE, shuffled, QUOTED]
    loaded = load_conversations(write(tmp_path / f"rows.{type}", rows), categories=NAMES)
    assert loaded.features == FEATURES
    assert set(loaded["source"]) == {f"rows.{type}"}
    assert list(loaded["id"]) == ["a", "b", "c"]
    assert list(loaded["messages"]) == [pair(row["prompt"], row["response"]) for row in rows]
    assert list(loaded["response_unsafe"]) == [False, True, False]
    assert list(loaded["categories"]) == [[], [NAMES[5], NAMES[8]], []]


@pytest.mark.parametrize("type", TYPES)
def test_whole_conversations(tmp_path, type):
    long = [{"role": "system", "content": "Be brief."}, *pair("Hi", "Hello"), *pair("Bye!", "Bye")]
    rows = [
        {"id": "a", "messages": long, "response_unsafe": True},
        {"id": "b", "messages": [*pair("Hi", "Hello"), *pair("Rain?")], "response_unsafe": None},
    ]
    expected = [conversation(**row) for row in rows]
    assert content(write(tmp_path / f"rows.{type}", rows)) == expected


@pytest.mark.parametrize(
    ("name", "place"),
    [("a.jsonl", "line 1"), ("a.csv", "line 2"), ("a.json", "row 0"), ("a.parquet", "row 0")],
)
def test_ids_name_the_row_but_no_folder(tmp_path, name, place):
    """A row without an id gets its place as id, the same wherever the file lies."""
    spec = write(tmp_path / name, [{"id": None} | QA, {"id": 7} | QA])
    assert list(load_conversations(spec)["id"]) == [f"{name}, {place}", "7"]


@pytest.mark.parametrize("type", TYPES)
def test_categories_and_languages_are_as_the_data_name_them(tmp_path, type):
    """An empty cell is unknown, not none; a column `category` may hold names."""
    rows = [
        QA | {"response_label": 1, "category": "Fraud; Spam, bulk", "language": "de"},
        QA | {"response_label": 1, "category": None, "language": None},
        QA | {"response_label": 0, "category": None, "language": " en "},
    ]
    loaded = load_conversations(write(tmp_path / f"rows.{type}", rows))
    assert list(loaded["categories"]) == [["Fraud", "Spam, bulk"], None, None]
    assert list(loaded["language"]) == ["de", None, "en"]


@pytest.mark.parametrize("type", TYPES)
def test_what_pandas_leaves_unknown_is_unknown(tmp_path, type):
    """NaN, in a CSV the word; a response may be that word. White space is no part of a name."""
    unknown = "nan" if type == "csv" else float("nan")
    path = tmp_path / f"rows.{type}"
    rows = [{"prompt": "0/0?", "response": "NaN", "categories": unknown, "language": unknown}]
    (row,) = load_conversations(write(path, rows))
    assert (row["categories"], row["language"]) == (None, None)
    assert row["messages"] == pair("0/0?", "NaN")
    (row,) = load_conversations(write(path, [QA | {"categories": ["fraud ", " spam"]}]))
    assert row["categories"] == ["fraud", "spam"]


def test_categories_in_two_columns_are_refused(tmp_path):
    for name, row in {"names": QA | {"category": "Fraud"}, "BeaverTails": UNSAFE}.items():
        spec = write(tmp_path / f"{name}.jsonl", [row | {"categories": ["Spam"]}])
        said = f"{spec}, line 1, field categories: a column category is there, too; keep one"
        assert failure(spec) == said
        assert failure(spec, bad_rows="skip") == said


def test_categories_tell_a_label_that_is_required(tmp_path):
    rows = [{"prompt": "Hi", "categories": ["Fraud"]}, {"prompt": "Ho", "categories": []}]
    spec = write(tmp_path / "rows.jsonl", rows)
    assert list(load_conversations(spec)["prompt_unsafe"]) == [None, None]
    required = load_conversations(spec, require=["prompt_unsafe"])
    assert list(required["prompt_unsafe"]) == [True, False]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
LABEL = st.none() | st.booleans()
ROW = st.fixed_dictionaries(
    {
        "id": TEXT,
        "prompt": TEXT,
        "response": TEXT,
        "prompt_unsafe": LABEL,
        "response_unsafe": st.none(),
        "response_refusal": LABEL,
        "categories": st.none() | st.lists(st.sampled_from(NAMES), unique=True),
    }
)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=4))
def test_random_rows_survive_any_file_type(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    expected = []
    for row in rows:
        texts = {"messages": pair(row["prompt"], row["response"])}
        kept = {name: row[name] for name in row if name not in QA}
        expected.append(conversation(**kept | texts))
    for type in TYPES:
        assert content(write(folder / f"rows.{type}", rows)) == expected, type


# --- hub data sets --------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["", ":train"])
def test_dead_split_is_told_without_the_network(monkeypatch, split):
    calls = []
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, lambda *a: calls.append(a))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: calls.append(a))
    error = failure(f"PKU-Alignment/BeaverTails{split}")
    assert not calls
    for real in ("330k_train", "330k_test", "30k_train", "30k_test"):
        assert f"PKU-Alignment/BeaverTails:{real}" in error


# --- bad input ------------------------------------------------------------------------------------

OTHER_CATEGORY = SAFE["category"] | {"litter": False}
NO_CATEGORY = SAFE["category"] | {NAMES[6]: None}
BAD_BEAVERTAILS = {  # what is wrong: field, changes of a good row
    "number for a text": ("prompt", {"prompt": 5}),
    "null for a text": ("prompt", {"prompt": None}),
    "empty prompt": ("prompt", {"prompt": " \n"}),
    "empty response": ("response", {"response": ""}),
    "lone surrogate": ("response", {"response": "Hi \ud83d"}),
    "list for a struct": ("category", {"category": NAMES}),
    "unknown category": ("category", {"category": OTHER_CATEGORY}),
    "null category": ("category", {"category": NO_CATEGORY}),
    "unsafe without category": ("is_safe", {"is_safe": False}),
    "safe with category": ("is_safe", {"category": UNSAFE["category"]}),
    "is_safe null": ("is_safe", {"is_safe": None}),
    "no response": ("response", {"response": ...}),
    "no category": ("category", {"category": ...}),
    "no is_safe": ("is_safe", {"is_safe": ...}),
}
BAD_ROWS = {  # what is wrong: field, row
    "no prompt": ("prompt", '{"question": "Hi", "response": "Hello"}'),
    "list for a text": ("response", '{"prompt": "Hi", "response": ["a"]}'),
    "surrogate in an id": ("id", r'{"prompt": "Hi", "id": "\ud83d"}'),
    "label of whom": ("label", '{"prompt": "Hi", "response": "Ho", "label": "safe"}'),
    "unknown label": ("label", '{"prompt": "Hi", "label": "homonym"}'),
    "two names, two labels": (
        "response_unsafe",
        '{"prompt": "Hi", "response": "Ho", "response_label": 1, "response_unsafe": 0}',
    ),
    "label of no response": ("response", '{"prompt": "Hi", "response_label": 1}'),
    "object for a list": ("categories", '{"prompt": "Hi", "categories": "{\\"theft\\": 1}"}'),
    "number in a list": ("categories", '{"prompt": "Hi", "categories": [1]}'),
    "surrogate in a list": ("categories", r'{"prompt": "Hi", "categories": ["\ud83d"]}'),
    "unknown category": (
        "categories",
        '{"prompt": "Hi", "categories": ["litter"]}',
    ),
    "unsafe with no category": (
        "categories",
        '{"prompt": "Hi", "prompt_label": 1, "categories": []}',
    ),
    "safe with a category": (
        "categories",
        '{"prompt": "Hi", "response": "Ho", "response_label": 0, "categories": ["theft"]}',
    ),
    "no message": ("messages", '{"messages": []}'),
    "message that is no object": ("messages[0]", '{"messages": ["Hi"]}'),
    "unknown role": ("messages[0].role", '{"messages": [{"role": "bot", "content": "Ho"}]}'),
    "empty turn": ("messages[0].content", '{"messages": [{"role": "user", "content": ""}]}'),
    "system turn last": (
        "messages",
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "system", "content": "Ho"}]}',
    ),
}
QA_HEADER = b"prompt,response\n"
STRUCT = b"prompt,response,category,is_safe\na,b,c,1\n"
FAR_DOWN = b"prompt\n" + b"Hi\n" * 9000 + b"caf\xe9\n"
BROKEN_PARQUET = b"PAR1" + bytes(40) + b"PAR1"
BAD_FILES = {  # what is wrong: file name, place, content
    "unknown type": ("rows.doc", "", b"Hi"),
    "empty": ("rows.csv", "", b""),
    "blank": ("rows.jsonl", "", b"\n \n"),
    "header only": ("rows.csv", "", QA_HEADER),
    "empty list": ("rows.json", "", b"[]"),
    "cut line": ("rows.jsonl", ", line 1, column 18", b'{"prompt": "Hi", "resp\n'),
    "no JSON": ("rows.json", ", line 3, column 11", b'[\n{"prompt": "Hi"},\n{"prompt" "Hi"}]'),
    "no list": ("rows.json", "", b'"Hi"'),
    "row that is no object": ("rows.jsonl", ", line 2", b'{"prompt": "Hi"}\n[1, 2]'),
    "not UTF-8": ("rows.jsonl", ", line 2", b'{"prompt": "Hi"}\n{"prompt": "caf\xe9"}\n'),
    "not UTF-8, far down": ("rows.csv", ", line 9002", FAR_DOWN),
    "UTF-16": ("rows.csv", ", line 1", "prompt\nHi".encode("utf-16")),
    "CSV as Parquet": ("rows.parquet", "", QA_HEADER),
    "broken Parquet": ("rows.parquet", "", BROKEN_PARQUET),
    "long CSV row": ("rows.csv", ", line 3, field response", QA_HEADER + b"Hi,Ho\nHi,Hi,Hi\n"),
    "short CSV row": ("rows.csv", ", line 3, field response", QA_HEADER + b"Hi,Ho\nHi\n"),
    "unclosed quote": ("rows.csv", ", line 2", QA_HEADER + b'Hi,"Hello\nHi,Hello\n'),
    "column with a line break": ("rows.csv", ", line 3, field prompt", b'"odd\nname"\nHi\n'),
    "empty CSV cell": ("rows.csv", ", line 2, field prompt", QA_HEADER + b",Hello\n"),
    "CSV struct": ("rows.csv", ", line 2, field category, column 1", STRUCT),
    "CSV messages": ("rows.csv", ", line 2, field messages, column 1", b"messages\nHi\n"),
    "row of a list": ("rows.json", ", row 1, field prompt", b'[{"prompt": "Hi"}, {"prompt": 1}]'),
}


@pytest.mark.parametrize(("field", "changes"), BAD_BEAVERTAILS.values(), ids=BAD_BEAVERTAILS)
def test_a_bad_beavertails_row_is_named(tmp_path, field, changes):
    """Also one that lacks a column."""
    row = SAFE | changes
    left = {name: value for name, value in row.items() if value is not ...}
    spec = write(tmp_path / "rows.jsonl", [SAFE, left])
    assert failure(spec).startswith(f"{spec}, line 2, field {field}")


@pytest.mark.parametrize(("field", "row"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named(tmp_path, field, row):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(jsonl(SAFE, row))
    assert failure(str(path), categories=NAMES).startswith(f"{path}, line 2, field {field}: ")


@pytest.mark.parametrize(("name", "place", "data"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_named(tmp_path, name, place, data):
    path = tmp_path / name
    path.write_bytes(data)
    assert failure(str(path)).startswith(f"{path}{place}: ")


def test_a_bad_parquet_row_is_named(tmp_path):
    row = QA | {"response_label": "safe"}
    spec = write(tmp_path / "rows.parquet", [row, row | {"response": " "}])
    assert failure(spec).startswith(f"{spec}, row 1, field response: ")


def test_a_required_label_is_there_in_every_row(tmp_path):
    """The line is that of the file: a cell above holds a line break."""
    path = tmp_path / "rows.csv"
    path.write_text('prompt,response,response_label\n"Two\nlines",Ho,1\nHi,Ho,\n')
    message = failure(str(path), require=("response_unsafe",))
    assert f"{path}, line 4" in message
    assert "field response_unsafe" in message


UNKNOWN = {
    "beaverstails": "PKU-Alignment/BeaverTails",
    "no/such/folder": "PKU-Alignment/BeaverTails",
    "no/such/rows.jsonl": "no such file",
    "beavertails-sample:dev": "beavertails-sample:validation",
}


@pytest.mark.parametrize(("spec", "known"), UNKNOWN.items())
def test_an_unknown_name_lists_the_known_ones(spec, known):
    message = failure(spec)
    assert message.startswith(f"{spec}: ")
    assert known in message


@pytest.mark.parametrize("options", [{"bad_rows": "ignore"}, {"max_rows": 0}], ids=str)
def test_a_bad_option_is_named(tmp_path, options):
    spec = write(tmp_path / "rows.jsonl", [QA])
    assert next(iter(options)) in failure(spec, **options)


def test_bad_rows_are_skipped_and_reported(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(jsonl(SAFE, SAFE | {"prompt": ""}, "[1]", '{"prompt": "cut', UNSAFE))
    assert list(load_conversations(str(path), bad_rows="skip")["id"]) == ["a", "b"]
    assert "left out 3 bad rows of 5" in caplog.text
    assert f"{path}, line 2, field prompt" in caplog.text


def test_ragged_csv_rows_are_skipped(tmp_path, caplog):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,response\nHi,Hello\nHi\nHi,Hello,you\nBye,So long\n")
    found = load_conversations(str(path), bad_rows="skip")["messages"]
    assert list(found) == [pair("Hi", "Hello"), pair("Bye", "So long")]
    assert "left out 2 bad rows of 4" in caplog.text


LOST = {  # what is lost: the good row, the bad one, what is said of it
    "all that is unsafe": (
        QA | {"response_label": 0},
        {"prompt": "Hi", "response": 5, "response_label": 1},
        "every row that is unsafe (response_unsafe)",
    ),
    "all that is safe": (
        UNSAFE,
        SAFE | {"prompt": ""},
        "every row that is safe (response_unsafe)",
    ),
    "a category": (
        QA | {"response_label": 1, "categories": ["Spam"]},
        {"prompt": "", "response": "Ho", "response_label": 1, "categories": ["Spam", "Fraud"]},
        "every row of category 'Fraud'",
    ),
    "a category of BeaverTails": (
        SAFE,
        UNSAFE | {"response": ""},
        f"every row of category '{NAMES[5]}'",
    ),
}


@pytest.mark.parametrize(("good", "bad", "said"), LOST.values(), ids=LOST)
def test_a_class_is_never_skipped(tmp_path, good, bad, said):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(jsonl(good, bad))
    message = failure(str(path), bad_rows="skip")
    assert message.startswith(f"{path}: bad_rows skip would leave out {said}; mend them: ")
    assert f"{path}, line 2" in message
    path.write_bytes(jsonl(good, bad, bad | {"prompt": "Hi", "response": "Ho"}))
    assert len(load_conversations(str(path), bad_rows="skip")) == 2


def test_labels_that_are_not_asked_for_may_be_lost(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = QA | {"response_label": 1, "prompt_label": 0}
    path.write_bytes(jsonl(good, good | {"prompt": "", "prompt_label": 1}))
    assert len(load_conversations(str(path), require=["response_unsafe"], bad_rows="skip")) == 1


def test_a_missing_column_is_never_skipped(tmp_path):
    spec = write(tmp_path / "rows.jsonl", [{"question": "Hi"}])
    assert "field prompt" in failure(spec, bad_rows="skip")


def test_max_rows_reads_no_further(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(jsonl(SAFE, UNSAFE, "{cut"))
    assert list(load_conversations(str(path), max_rows=2)["id"]) == ["a", "b"]
    assert "line 3" in failure(str(path), max_rows=3)
