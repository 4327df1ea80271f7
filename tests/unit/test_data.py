"""Loading: file types, row formats, every bad input in one line, repeats and splits."""

import csv
import json
import random
import socket
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import scripts
from hypothesis import given, settings
from hypothesis import strategies as st

from common.conversation import FEATURES, LABELS, UserError, pair
from common.data import load_conversations, prompt_key, taxonomy

ROOT = Path(__file__).resolve().parents[2]
NAMES = taxonomy("beavertails")
TYPES = ("jsonl", "json", "csv", "parquet")


def beavertails(prompt: str, response: str, *named: str, **changes) -> dict:
    """A row as PKU-Alignment/BeaverTails has it."""
    category = {name: name in named for name in NAMES}
    return {
        "prompt": prompt,
        "response": response,
        "category": category,
        "is_safe": not named,
    } | changes


BEAVERTAILS = [
    beavertails("May I feed bread to ducks?", "Oats are better for them.", id="a"),
    beavertails("My rent is due, any ideas?", "Take it from the till.", NAMES[5], NAMES[8], id="b"),
    beavertails("Zitiere: „Ja, nein“\nund so", "He said, \"no\";\r\n'yes'\t…", id="c"),
]
PLAIN = [
    {"id": "a", "prompt": "May I feed bread to ducks?", "response": "Oats are better for them.", "prompt_label": 0,
     "response_label": "safe", "refusal_label": False, "categories": []},
    {"id": "b", "prompt": "My rent is due, any ideas?", "response": "Take it from the till.", "prompt_label": None,
     "response_label": "unsafe", "refusal_label": False, "categories": [NAMES[5], NAMES[8]]},
    {"id": "c", "prompt": "Only a question, with\na line break", "response": None, "prompt_label": 1,
     "response_label": None, "refusal_label": None, "categories": None},
]  # fmt: skip
MESSAGES = [
    {"id": "a", "messages": pair("May I feed bread to ducks?", "Oats are better."), "response_unsafe": False},
    {"id": "b", "messages": [{"role": "system", "content": "Be brief."}, *pair("Hi", "Hello"), *pair("Bye!", "Bye")],
     "response_unsafe": True},
    {"id": "c", "messages": [*pair("Hi", "Hello"), *pair("Will it rain?")], "response_unsafe": None},
]  # fmt: skip


def write(path: Path, rows: list[dict]) -> str:
    """Write rows in the type that the file's name says; a CSV cell holds a list or an object as
    JSON.
    """
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as lines:
            writer = csv.DictWriter(lines, rows[0])
            writer.writeheader()
            for row in rows:
                writer.writerow(
                    {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()}
                )
    else:
        texts = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text(
            "\n".join(texts) if path.suffix == ".jsonl" else f"[{','.join(texts)}]",
            encoding="utf-8",
        )
    return str(path)


def content(spec: str, **options) -> list[dict]:
    """The conversations without what names the file."""
    return load_conversations(spec, **options).remove_columns("source").to_list()


def conversation(
    id: str, messages: list[dict], *labels: bool | None, categories: list[str] | None = None
) -> dict:
    return {
        "id": id,
        "messages": messages,
        **dict(zip(LABELS, labels, strict=True)),
        "categories": categories,
    }


# --- file types and row formats ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", TYPES)
def test_beavertails_rows(tmp_path, type):
    loaded = load_conversations(write(tmp_path / f"rows.{type}", BEAVERTAILS), categories=NAMES)
    assert loaded.features == FEATURES
    assert set(loaded["source"]) == {f"rows.{type}"}
    texts = [pair(row["prompt"], row["response"]) for row in BEAVERTAILS]
    assert loaded.remove_columns("source").to_list() == [
        conversation("a", texts[0], None, False, None, categories=[]),
        conversation("b", texts[1], None, True, None, categories=[NAMES[5], NAMES[8]]),
        conversation("c", texts[2], None, False, None, categories=[]),
    ]


@pytest.mark.parametrize("type", TYPES)
def test_plain_rows(tmp_path, type):
    assert content(write(tmp_path / f"rows.{type}", PLAIN)) == [
        conversation("a", pair(PLAIN[0]["prompt"], PLAIN[0]["response"]), False, False, False, categories=[]),
        conversation("b", pair(PLAIN[1]["prompt"], PLAIN[1]["response"]), None, True, False,
                     categories=[NAMES[5], NAMES[8]]),
        conversation("c", pair(PLAIN[2]["prompt"]), True, None, None),
    ]  # fmt: skip


@pytest.mark.parametrize("type", TYPES)
def test_messages_rows(tmp_path, type):
    """Whole conversations, several turns included."""
    assert content(write(tmp_path / f"rows.{type}", MESSAGES)) == [
        conversation(row["id"], row["messages"], None, row["response_unsafe"], None)
        for row in MESSAGES
    ]


@pytest.mark.parametrize(
    "word, label",
    [("Unsafe", True), (1.0, True), (" yes ", True), ("harmless", False), (None, None)],
)
def test_label_words(tmp_path, word, label):
    spec = write(
        tmp_path / "rows.jsonl", [{"prompt": "Hi", "response": "Hello", "response_label": word}]
    )
    assert load_conversations(spec)[0]["response_unsafe"] is label


def test_labels_are_read_by_key(tmp_path):
    """The order of the keys of `category` may change from row to row."""
    shuffled = []
    for row in BEAVERTAILS:
        names = random.Random(row["prompt"]).sample(NAMES, len(NAMES))
        assert names != NAMES
        shuffled.append(row | {"category": {name: row["category"][name] for name in names}})
    assert content(write(tmp_path / "a.jsonl", shuffled)) == content(
        write(tmp_path / "b.jsonl", BEAVERTAILS)
    )


def test_ids_name_the_row_but_no_folder(tmp_path):
    """A row without an id (or with an empty one) gets its place as id, which is the same wherever
    the file lies.
    """
    rows = [
        {"id": None, "prompt": "Hi", "response": "Hello"},
        {"id": 7, "prompt": "Bye", "response": "So long"},
    ]
    for name, place in (
        ("a.jsonl", "line 1"),
        ("a.csv", "line 2"),
        ("a.json", "row 0"),
        ("a.parquet", "row 0"),
    ):
        assert list(load_conversations(write(tmp_path / name, rows))["id"]) == [
            f"{name}, {place}",
            "7",
        ]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
PLAIN_ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "id": TEXT,
            "prompt": TEXT,
            "response": TEXT,
            "prompt_label": st.none() | st.booleans(),
            "response_label": st.just(True) | st.none(),
            "refusal_label": st.none() | st.booleans(),
            "categories": st.none() | st.lists(st.sampled_from(NAMES), unique=True),
        }
    ).filter(lambda row: not (row["response_label"] and row["categories"] == []))  # a contradiction
    | st.fixed_dictionaries(
        {"id": TEXT, "prompt": TEXT, "prompt_label": st.none() | st.booleans()}
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=40, deadline=None)
@given(PLAIN_ROWS)
def test_random_rows_survive_any_file_type(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    columns = (
        "id",
        "prompt",
        "response",
        "prompt_label",
        "response_label",
        "refusal_label",
        "categories",
    )
    rows = [{name: row.get(name) for name in columns} for row in rows]
    expected = []
    for row in rows:
        id, prompt, response, *labels, categories = row.values()
        expected.append(conversation(id, pair(prompt, response), *labels, categories=categories))
    for type in TYPES:
        assert content(write(folder / f"rows.{type}", rows)) == expected, type


# --- hub data sets ----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_folder(tmp_path, monkeypatch) -> str:
    """A folder laid out as a hub data set; its prepared copy is kept out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "beavers"
    (folder / "round0").mkdir(parents=True)
    configs = ["---", "configs:", "- config_name: default", "  data_files:"]
    for split, rows in {"330k_train": BEAVERTAILS, "330k_test": BEAVERTAILS[:1]}.items():
        write(folder / f"round0/{split}.jsonl", rows)
        configs += [f"  - split: {split}", f"    path: round0/{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*configs, "---", ""]), encoding="utf-8")
    return str(folder)


def test_hub_layout(hub_folder):
    assert content(f"{hub_folder}:330k_train") == content(f"{hub_folder}/round0/330k_train.jsonl")
    assert len(load_conversations(f"{hub_folder}:330k_test")) == 1


def test_dead_split_of_a_hub_layout(hub_folder):
    error = failure(f"{hub_folder}:train")
    assert f"{hub_folder}:train: " in error and "330k_train" in error and "330k_test" in error


@pytest.mark.parametrize("split", [":train", ":test", ""])
def test_dead_split_is_told_without_the_network(monkeypatch, split):
    calls = []
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, lambda *a: calls.append(a))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: calls.append(a))
    error = failure(f"PKU-Alignment/BeaverTails{split}")
    assert not calls
    for real in ("330k_train", "330k_test", "30k_train", "30k_test"):
        assert f"PKU-Alignment/BeaverTails:{real}" in error


# --- bad input --------------------------------------------------------------------------------------------------------


def failure(spec: str, **options) -> str:
    """The message with which loading stops: always one line."""
    with pytest.raises(UserError) as caught:
        load_conversations(spec, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def text(*rows: dict | str) -> bytes:
    """A JSONL file: a good row, then these."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in (BEAVERTAILS[0], *rows)]
    return "\n".join(lines).encode()


def without(row: dict, key: str) -> dict:
    return {k: v for k, v in row.items() if k != key}


SAFE, UNSAFE = BEAVERTAILS[:2]
QA = {"prompt": "Hi", "response": "Hello"}
CATEGORY = SAFE["category"]
BAD_ROWS = {  # name: row, field, what the message must say of it
    "no prompt": ({"question": "Hi", "response": "Hello"}, "prompt", "question, response"),
    "no response": (without(SAFE, "response"), "response", "missing"),
    "no category": (without(SAFE, "category"), "category", "missing"),
    "no is_safe": (without(SAFE, "is_safe"), "is_safe", "missing"),
    "number for a text": (SAFE | {"prompt": 5}, "prompt", "int 5"),
    "null for a text": (SAFE | {"prompt": None}, "prompt", "NoneType"),
    "list for a text": (QA | {"response": ["a"]}, "response", "list ['a']"),
    "empty prompt": (SAFE | {"prompt": " \n"}, "prompt", "empty text"),
    "empty response": (SAFE | {"response": ""}, "response", "empty text"),
    "lone surrogate": (SAFE | {"response": "Hi \ud83d"}, "response", "surrogate"),
    "surrogate in an id": (QA | {"id": "\ud83d"}, "id", "surrogate"),
    "list for a struct": (SAFE | {"category": NAMES}, "category", "14 booleans"),
    "unknown category key": (SAFE | {"category": CATEGORY | {"litter": False}}, "category", "'litter'; known: animal_"),
    "missing category key": (SAFE | {"category": without(CATEGORY, NAMES[6])}, "category", f"{NAMES[6]!r} is missing"),
    "null category": (SAFE | {"category": CATEGORY | {NAMES[6]: None}}, "category", f"{NAMES[6]!r} is missing or null"),
    "category of a wrong type": (SAFE | {"category": CATEGORY | {NAMES[6]: [1]}}, f"category[{NAMES[6]}]", "[1]"),
    "safe with a category": (UNSAFE | {"is_safe": True}, "is_safe", NAMES[5]),
    "unsafe without one": (SAFE | {"is_safe": False}, "is_safe", "contradicts the categories []"),
    "is_safe null": (SAFE | {"is_safe": None}, "is_safe", "None"),
    "plain safe with one": (QA | {"response_label": "safe", "categories": [NAMES[1]]}, "categories", NAMES[1]),
    "object for a list": (QA | {"categories": '{"theft": true}'}, "categories", "list"),
    "unsafe with no category": (QA | {"response_label": "unsafe", "categories": []}, "categories", "labelled unsafe"),
    "the same of a prompt": ({"prompt": "Hi", "prompt_label": 1, "categories": []}, "categories", "labelled unsafe"),
    "safe prompt with one": ({"prompt": "Hi", "prompt_label": 0, "categories": ["x"]}, "categories", "labelled safe"),
    "label of whom": (QA | {"label": "safe"}, "label", "prompt_label or response_label"),
    "label that is none": ({"prompt": "Hi", "label": "homonym"}, "label", "unknown label 'homonym'"),
    "two names, two labels": (QA | {"response_label": 1, "response_unsafe": 0}, "response_unsafe", "response_label"),
    "number in a list": (QA | {"categories": [1]}, "categories", "int 1"),
    "surrogate in a list": (QA | {"categories": ["\ud83d"]}, "categories", "surrogate"),
    "unknown category": (QA | {"categories": ["litter"]}, "categories", "'litter'; known: animal_abuse |"),
    "unknown label word": (QA | {"response_label": "maybe"}, "response_label", "'maybe'"),
    "label of no response": ({"prompt": "Hi", "response_label": 1}, "response", "missing"),
    "empty messages": ({"messages": []}, "messages", "non-empty"),
    "message that is no object": ({"messages": ["Hi"]}, "messages[0]", "'Hi'"),
    "unknown role": ({"messages": [*pair("Hi"), {"role": "bot", "content": "Ho"}]}, "messages[1].role", "'bot'"),
    "empty turn": ({"messages": pair("Hi", "")}, "messages[1].content", "empty text"),
    "system turn last": ({"messages": [*pair("Hi"), {"role": "system", "content": "Stop"}]}, "messages", "system"),
}  # fmt: skip
BAD_FILES = {  # name: file name, content, place (and field), what the message must say of it
    "missing": ("rows.jsonl", None, "", "no such file"),
    "unknown type": ("rows.txt", text(), "", "unknown file type"),
    "empty": ("rows.csv", b"", "", "empty"),
    "blank": ("rows.jsonl", b"\n \n", "", "no rows"),
    "header only": ("rows.csv", b"prompt,response\n", "", "no rows"),
    "empty list": ("rows.json", b"[]", "", "no rows"),
    "cut line": ("rows.jsonl", text('{"prompt": "Hi", "resp') + b"\n", ", line 2, column 18", "malformed JSON"),
    "malformed JSON": ("rows.json", b'[\n{"prompt": "Hi"},\n{"prompt" "Hi"}]', ", line 3, column 11", "malformed JSON"),
    "JSON that is no list": ("rows.json", b'"Hi"', "", "expected a JSON list of rows, found str"),
    "row that is no object": ("rows.jsonl", text("[1, 2]"), ", line 2", "expected an object"),
    "not UTF-8": ("rows.jsonl", text({"prompt": "\ufffd"}) + b'\n{"prompt": "caf\xe9"}\n', ", line 3", "not UTF-8"),
    "not UTF-8, far down": ("rows.csv", b"prompt\n" + b"Hi\n" * 9000 + b"caf\xe9\n", ", line 9002", "not UTF-8"),
    "UTF-16": ("rows.csv", "prompt,response\nHi,Hello".encode("utf-16"), ", line 1", "not UTF-8"),
    "CSV as Parquet": ("rows.parquet", b"prompt,response\nHi,Hello", "", "not a Parquet file"),
    "broken Parquet": ("rows.parquet", b"PAR1" + bytes(40) + b"PAR1", "", "not a Parquet file"),
    "long CSV row": ("rows.csv", b"prompt,response\nHi,Hello\nHi,Hi,Hi\n", ", line 3, field response", "more cells"),
    "short CSV row": ("rows.csv", b"prompt,response\nHi,Hello\nHi\n", ", line 3, field response", "fewer cells"),
    "unclosed CSV quote": ("rows.csv", b'prompt,response\nHi,"Hello\nHi,Hello\n', ", line 2", "malformed CSV"),
    "CSV without the column": ("rows.csv", b'"odd\nname"\nHi\n', ", line 3, field prompt", "columns: odd name"),
    "empty CSV cell": ("rows.csv", b"prompt,response\n,Hello\n", ", line 2, field prompt", "expected text"),
    "CSV struct": ("a.csv", b"prompt,response,category,is_safe\na,b,c,1\n", ", line 2, field category, column 1", ""),
    "CSV messages": ("rows.csv", b"messages\nHi\n", ", line 2, field messages, column 1", "malformed JSON"),
    "row of a list": ("rows.json", b'[{"prompt": "Hi"}, {"prompt": 1}]', ", row 1, field prompt", "int 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_is_told_in_one_line(tmp_path, case):
    (row, field, what), path = BAD_ROWS[case], tmp_path / "rows.jsonl"
    path.write_bytes(text(row))
    message = failure(str(path), categories=NAMES if case == "unknown category" else None)
    assert message.startswith(f"{path}, line 2, field {field}: ")
    assert what in message


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_told_in_one_line(tmp_path, case):
    name, data, place, what = BAD_FILES[case]
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    message = failure(str(path))
    assert message.startswith(f"{path}{place}: ")
    assert what in message


def test_bad_parquet_row(tmp_path):
    row = QA | {"response_label": "safe"}
    spec = write(tmp_path / "rows.parquet", [row, row | {"response": " "}])
    assert failure(spec).startswith(f"{spec}, row 1, field response: missing or empty text")


def test_no_positive_rows(tmp_path):
    spec = write(tmp_path / "rows.jsonl", [SAFE, BEAVERTAILS[2]])
    assert len(load_conversations(spec)) == 2
    message = failure(spec, require=("response_unsafe",))
    assert (
        spec in message
        and "field response_unsafe" in message
        and "no positive row among 2" in message
    )


def test_required_label_is_missing(tmp_path):
    spec = write(tmp_path / "rows.csv", PLAIN)
    message = failure(spec, require=("response_unsafe",))
    # the cell above holds a line break
    assert f"{spec}, line 5" in message and "field response_unsafe" in message


@pytest.mark.parametrize(
    "spec, known",
    [
        ("beaverstails", ["PKU-Alignment/BeaverTails", "beavertails-sample"]),
        ("no/such/folder", ["PKU-Alignment/BeaverTails", "beavertails-sample"]),
        (
            "beavertails-sample:dev",
            [f"beavertails-sample:{split}" for split in ("train", "validation", "test")],
        ),
    ],
)
def test_unknown_name(spec, known):
    message = failure(spec)
    assert message.startswith(f"{spec}: ")
    assert all(name in message for name in known)


@pytest.mark.parametrize("options", [{"bad_rows": "ignore"}, {"max_rows": 0}])
def test_bad_options(tmp_path, options):
    (name, value), spec = *options.items(), write(tmp_path / "rows.jsonl", PLAIN)
    assert f"{name} {value}" in failure(spec, **options)


def test_bad_rows_are_skipped_and_reported(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        text(SAFE | {"prompt": ""}, "[1]", '{"prompt": "cut', UNSAFE | {"is_safe": True}, UNSAFE)
    )
    assert list(load_conversations(str(path), bad_rows="skip")["id"]) == ["a", "b"]
    assert "left out 4 bad rows of 6" in caplog.text
    assert f"{path}, line 2, field prompt" in caplog.text


def test_ragged_csv_rows_are_skipped(tmp_path, caplog):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,response\nHi,Hello\nHi\nHi,Hello,you\nBye,So long\n")
    assert [prompt_key(row) for row in load_conversations(str(path), bad_rows="skip")] == [
        "hi",
        "bye",
    ]
    assert "left out 2 bad rows of 4" in caplog.text


def test_a_missing_column_is_never_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text({"question": "Hi"}))
    assert "field prompt" in failure(str(path), bad_rows="skip")


def test_max_rows_reads_no_further(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text(UNSAFE, "{cut"))
    assert list(load_conversations(str(path), max_rows=2)["id"]) == ["a", "b"]
    assert list(load_conversations(str(path), max_rows=1)["id"]) == ["a"]
    assert "line 3" in failure(str(path), max_rows=3)


@pytest.mark.slow
def test_train_stops_at_a_bad_row_with_one_line(tmp_path):
    """Exit code 2, and nothing written; the model is never looked for."""
    path, output = tmp_path / "train.jsonl", tmp_path / "guard"
    path.write_bytes(text(UNSAFE, SAFE | {"is_safe": False}))
    flags = ["--model_name_or_path", tmp_path / "no-model", "--output_dir", output]
    flags += ["--train_data_name_or_path", path]
    done = scripts.launch("moderation", "train.py", *flags, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2, done.stderr
    assert len(errors) == 1 and "Traceback" not in done.stderr
    assert f"{path}, line 3, field is_safe" in errors[0]
    assert not output.exists()
