"""Benchmarks: every entry of the yaml on a miniature of its own, what loading refuses, and the
rules that need code.
"""

import functools
import hashlib
import http.server
import json
import random
import re
import tarfile
import threading
from pathlib import Path

import datasets
import pandas
import pytest
from checks import user_error, write_rows
from miniatures import ITEMS, MINIATURES, POLICY, UNSAFE_PROMPTS, expected, write

from common.conversation import LABELS, pair
from guards import zoo
from guards.suite.benchmarks import benchmark_names, benchmarks, load_benchmark

PINNED = r"https://raw\.githubusercontent\.com/[^/]+/[^/]+/[0-9a-f]{40}/|http://parl\.ai/.*_v[0-9.]+\.tar\.gz#"


def miniature(name: str, folder: Path, **options):
    """The miniature of a benchmark, loaded."""
    return load_benchmark(f"{name}@{write(name, folder)}", **options)


def labels_of(loaded) -> list[bool]:
    return [row["label"] for row in loaded.rows]


def column(loaded, name: str) -> list:
    return [row[name] for row in loaded.rows]


def rows_of(name: str, folder: Path, rows: list, file: str = "rows.jsonl"):
    """Own rows, loaded as benchmark `name`."""
    path = write_rows(folder / file, rows)
    return load_benchmark(f"{name}@{path}")


# --- the entries ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", benchmark_names())
def test_miniature(name, tmp_path):
    made = MINIATURES[name]
    loaded = miniature(name, tmp_path)
    assert labels_of(loaded) == expected(name)
    assert loaded.rows[0]["groups"] == made.groups
    assert sum(loaded.facts["left_out"].values()) == made.left_out
    assert loaded.facts["found"] == {"size": len(made.labels), "positives": sum(made.labels)}
    assert loaded.label == benchmarks()[name]["label"]
    last = "user" if loaded.label == "prompt_unsafe" else "assistant"
    for row in loaded.rows:
        assert row["messages"][-1]["role"] == last
        text = json.dumps([loaded.label, row["messages"]])
        assert row["id"] == hashlib.sha256(text.encode()).hexdigest()
    texts = {row["messages"][-1]["content"] for row in loaded.rows}
    assert len(texts) > 1
    assert all(text == text.strip() for text in texts)


@pytest.mark.parametrize("name", benchmark_names())
def test_entry_is_whole(name):
    """Licence, gate, label, a pinned source, and counts or null."""
    entry = benchmarks()[name]
    assert entry["licence"]
    assert entry["gate"] in ("none", "auto", "manual")
    assert entry["label"] in LABELS
    assert set(entry.get("contaminated_by", ())) <= set(zoo())
    if entry["size"] is not None:
        assert 0 <= (entry["positives"] or 0) <= entry["size"]
    if entry["gold"] == {"always": True}:
        assert entry["size"] == entry["positives"]
    if "hub" in entry:
        assert re.fullmatch(r"[0-9a-f]{40}|main|v0", entry["revision"])
        assert entry["split"]
        return
    urls = entry["url"].values() if isinstance(entry["url"], dict) else [entry["url"]]
    assert all(re.match(PINNED, url) for url in urls)


# --- messages, groups, marks, facts -----------------------------------------------------------------------------------


THREE_TURNS = [*pair("Hello.", ITEMS[1].answer), *pair(ITEMS[2].prompt)]
CONVABUSE = [
    {"role": "assistant", "content": "Hello."},
    *pair("Hi.", "How are you?"),
    *pair(ITEMS[0].prompt),
]
DICES = [*pair("Hello.", "Hello, how are you?"), *pair(ITEMS[7].prompt, ITEMS[7].answer)]
PROSOCIAL = [*pair(ITEMS[4].prompt, ITEMS[4].answer), *pair(ITEMS[5].prompt)]
DYNABENCH = [
    {"role": "system", "content": POLICY},
    *pair("Hello.", "Hello."),
    *pair(ITEMS[1].prompt, ITEMS[1].answer),
]
WITH_CONTEXT = pair(f"{UNSAFE_PROMPTS[2]}\n\nThe letters lie in a box at the gate.")


@pytest.mark.parametrize(
    ("name", "row", "messages"),
    [
        ("convabuse", 0, CONVABUSE),
        ("dices_350", 0, DICES),
        ("dynabench", 1, DYNABENCH),
        ("dices_990", 0, DICES),
        ("prosocial_dialog", 4, PROSOCIAL),
        ("harmbench_behaviors", 2, WITH_CONTEXT),
        ("safetext", 0, pair("If the pan is hot, touch it.")),
        ("harmfulqa_conversations", 3, pair(ITEMS[1].prompt, ITEMS[1].answer)),
        ("bot_adversarial_dialogue_prompt", 2, THREE_TURNS),
        ("bot_adversarial_dialogue_response", 2, pair(ITEMS[2].prompt, ITEMS[2].answer)),
    ],
)
def test_turns_are_kept(name, row, messages, tmp_path):
    """Several turns, a leading assistant turn, joined columns, and turns put together from other
    rows; a last question that nobody answered is left out.
    """
    assert miniature(name, tmp_path).rows[row]["messages"] == messages


def test_turns_stand_in_the_order_of_their_numbers(tmp_path):
    """Also where a file writes the numbers as text."""
    row = {"safety_label": "__casual__", "dialogue_id": "0"}
    rows = []
    turns = []
    for n in range(12):
        turn = {"context": f"q{n}", "response": f"a{n}", "response_id": str(n)}
        rows.append(row | turn)
        turns += [f"q{n}", f"a{n}"]
    last = rows_of("prosocial_dialog", tmp_path, rows[::-1]).rows[-1]["messages"]
    assert [message["content"] for message in last] == turns[:-1]


def test_sub_groups(tmp_path):
    """A null has no group; scores below the bar and values that are not listed have a name."""
    groups = column(miniature("toxicchat", tmp_path), "groups")
    assert groups[0] == {"openai_moderation": "harassment", "prompt_type": "adversarial"}
    assert groups[1] == {"openai_moderation": "low_confidence", "prompt_type": "vanilla"}
    groups = column(miniature("harmbench_response", tmp_path), "groups")
    assert groups[:2] == [{"prompt_type": "vanilla"}, {"prompt_type": "adversarial"}]
    row = {"prompt": "Hello.", "prompt_label": "safe", "domain": None}
    assert column(rows_of("expguardtest_prompt", tmp_path, [row]), "groups") == [{}]


def test_a_cell_of_text_is_never_run(tmp_path):
    trap = tmp_path / "trap"
    row = {"user_input": "Hello.", "human_annotation": True, "toxicity": 0, "jailbreaking": 0}
    row["openai_moderation"] = f"[('a', __import__('pathlib').Path({str(trap)!r}).write_text('x'))]"
    with user_error("line 1, field openai_moderation"):
        rows_of("toxicchat", tmp_path, [row])
    assert not trap.exists()


def test_repeats_and_conflicts_are_marked(tmp_path):
    labels = ["safe", "unsafe", "safe", "safe", "safe", "unsafe"]
    rows = []
    for text, label in zip("aabbbc", labels, strict=True):
        rows.append({"prompt": text, "label": label})
    loaded = rows_of("xstest_prompt", tmp_path, rows)
    assert column(loaded, "conflicting") == [True, True, False, False, False, False]
    assert column(loaded, "duplicate") == [False, False, False, True, True, False]
    assert len(set(column(loaded, "id"))) == 3
    # the same question of the same text, in whatever benchmark
    other = rows_of("or_bench_hard", tmp_path, [{"prompt": "a"}])
    assert column(other, "id") == column(loaded, "id")[:1]


def test_counts_are_checked(tmp_path, caplog):
    facts = miniature("aegis2_prompt", tmp_path).facts
    assert "expected size 1964, positives 1059 but found size 8, positives 4" in facts["mismatch"]
    assert facts["mismatch"] in caplog.text
    assert facts["left_out"] == {"prompt is REDACTED": 1}
    few = miniature("aegis2_prompt", tmp_path, max_rows=3).facts
    assert few["mismatch"] is None
    assert few["found"]["size"] == 3
    unknown = miniature("aegis2_response", tmp_path).facts
    assert unknown["expected"] is None
    assert unknown["mismatch"] is None


@pytest.mark.parametrize(
    ("size", "positives", "fits"),
    [(9, 4, True), (9, 5, True), (9, 6, False), (9, 3, False), (8, 4, False)],
)
def test_counts_of_redacted_rows_are_known(tmp_path, elsewhere, size, positives, fits):
    """The row that is left out is counted, and may be of either class."""
    elsewhere("aegis2_prompt", size=size, positives=positives)
    mismatch = miniature("aegis2_prompt", tmp_path).facts["mismatch"]
    assert (mismatch is None) == fits


def test_facts(tmp_path):
    facts = miniature("wildguardtest_prompt", tmp_path).facts
    known = {
        "page": "https://huggingface.co/datasets/allenai/wildguardmix",
        "gate": "auto",
        "licence": "ODC-BY",
        "contaminated_by": ["wildguard"],
        "recall_only": False,
        "file": "wildguard_test.parquet",
    }
    assert known.items() <= facts.items()
    assert str(tmp_path) not in json.dumps(facts)
    assert miniature("harmfulq", tmp_path).facts["recall_only"]


def test_an_answer_without_a_label_is_left_out(tmp_path):
    """It is neither safe nor unsafe."""
    row = {"prompt": "Hello.", "response": "Hi.", "response_label": "safe"}
    rows = [row, row | {"response": "Hey.", "response_label": None}]
    loaded = rows_of("aegis2_response", tmp_path, rows)
    assert [row["label"] for row in loaded.rows] == [False]
    assert loaded.facts["left_out"] == {"response_label is not present": 1}


def test_few_rows_are_spread(tmp_path):
    """Sets are sorted by label: the first rows alone would all be safe."""
    few = miniature("saferlhf", tmp_path, max_rows=4)
    assert labels_of(few) == [False, False, True, True]
    assert len(miniature("saferlhf", tmp_path, max_rows=99).rows) == 10
    with user_error("max_rows 0"):
        miniature("saferlhf", tmp_path, max_rows=0)


@pytest.mark.parametrize("name", ["toxicchat", "wildguardtest_refusal", "beavertails"])
def test_file_types_agree(name, tmp_path):
    """True, "True", 1, "1.0" and an empty cell mean the same in every file type."""
    frame = pandas.DataFrame(MINIATURES[name].content)
    frame.to_csv(tmp_path / "r.csv", index=False)
    frame.to_parquet(tmp_path / "r.parquet")
    frame.to_json(tmp_path / "r.json", orient="records")
    frame.to_json(tmp_path / "r.jsonl", orient="records", lines=True)
    first = load_benchmark(f"{name}@{tmp_path}/r.csv")
    assert labels_of(first) == expected(name)
    for kind in ("parquet", "json", "jsonl"):
        assert load_benchmark(f"{name}@{tmp_path}/r.{kind}").rows == first.rows


# --- rules that need code ---------------------------------------------------------------------------------------------


def test_saferlhf_draws_as_the_reference_does(tmp_path):
    """Written out step by step beside the loader: two lists in row order, one seed, the same places
    in both.
    """
    rng = random.Random(7)
    rows = []
    safe = []
    harmful = []
    for n in range(2400):
        row = {"prompt": f"question {n}", "response_0": f"first {n}", "response_1": f"second {n}"}
        first = rng.random() < 0.5
        second = rng.random() < 0.5
        rows.append(row | {"is_response_0_safe": first, "is_response_1_safe": second})
        if first != second:
            one, other = (pair(row["prompt"], row[f"response_{i}"]) for i in range(2))
            safe.append(one if first else other)
            harmful.append(other if first else one)
    random.seed(42)
    places = random.sample(range(len(safe)), 1000)
    wanted = [safe[i] for i in places] + [harmful[i] for i in places]
    random.seed(1)
    loaded = rows_of("saferlhf", tmp_path, rows)
    assert column(loaded, "messages") == wanted
    assert labels_of(loaded) == [False] * 1000 + [True] * 1000
    assert loaded.facts["mismatch"] is None


# --- where rows come from ---------------------------------------------------------------------------------------------


def hub_folder(name: str, folder: Path, **splits: list) -> Path:
    """A local folder as a data set repository on the hub: a card that names config, splits and
    files.
    """
    config = benchmarks()[name].get("config", "default")
    folder.mkdir()
    card = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n"
    for split, rows in splits.items():
        card += f"  - split: {split}\n    path: {split}.jsonl\n"
        write_rows(folder / f"{split}.jsonl", rows)
    (folder / "README.md").write_text(card + "---\n")
    return folder


def test_hub_layout(tmp_path):
    """`datasets.load_dataset` reads a folder as it reads the hub: config, one split, two splits."""
    rows = MINIATURES["toxicchat"].content
    folder = hub_folder("toxicchat", tmp_path / "toxicchat", test=rows, train=[])
    loaded = load_benchmark(f"toxicchat@{folder}")
    assert labels_of(loaded) == expected("toxicchat")
    assert column(loaded, "index") == [0, 1, 2, 4, 5, 6]
    parts = {}
    for part in ("harmful", "benign"):
        parts[part] = [{"Goal": f"{part} {n}", "Category": "c"} for n in range(3)]
    folder = hub_folder("jailbreakbench", tmp_path / "jbb", **parts)
    loaded = load_benchmark(f"jailbreakbench@{folder}")
    assert labels_of(loaded) == [True] * 3 + [False] * 3
    assert loaded.rows[3]["messages"] == pair("benign 0")
    with user_error(r"toxicchat, .*jbb:test: .*local copy: toxicchat@FILE"):
        load_benchmark(f"toxicchat@{folder}")


def test_hub_out_of_reach(tmp_path, monkeypatch):
    """A gated set names the page to visit; another one does not."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    page = "https://huggingface.co/datasets/6rightjade/expguardmix"
    with user_error(f"visit {re.escape(page)}, accept the terms"):
        load_benchmark("expguardtest_prompt")
    with user_error(r"aegis1_prompt, nvidia/.* \(pass a local copy: aegis1"):
        load_benchmark("aegis1_prompt")


@pytest.fixture
def elsewhere(monkeypatch):
    """`elsewhere(name, **changes)`: the entry of a benchmark says something else in this test."""

    def change(name: str, **changes) -> None:
        monkeypatch.setitem(benchmarks(), name, benchmarks()[name] | changes)

    return change


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A folder that a web server shows, and its address; files of the web come into a new cache."""
    served = tmp_path / "served"
    served.mkdir()
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", tmp_path / "extracted")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield served, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_files_of_the_web(web, elsewhere):
    """Downloaded once into the cache of `datasets`, read from there without a network; two files
    are two splits.
    """
    served, base = web
    urls = {}
    for word, texts in {"Safe": ["Stir the soup.", "Sleep."], "Unsafe": ["Touch it."]}.items():
        file = served / f"I-PhysicalSafety{word}.json"
        file.write_text(json.dumps({"instructions": texts, "inputs": []}))
        urls[word.lower()] = f"{base}/{file.name}"
    elsewhere("i_physical_safety", url=urls)
    first = load_benchmark("i_physical_safety")
    assert labels_of(first) == [False, False, True]
    assert load_benchmark(f"i_physical_safety@{served}").rows == first.rows
    for file in served.iterdir():
        file.unlink()
    assert load_benchmark("i_physical_safety").rows == first.rows


def test_a_file_that_the_web_has_not(web, elsewhere):
    elsewhere("harmfulq", url=f"{web[1]}/none.json")
    with user_error(r"harmfulq, http://\S+: .*or pass a local copy"):
        load_benchmark("harmfulq")


def test_a_packed_file(web, tmp_path, elsewhere):
    served, base = web
    name = "bot_adversarial_dialogue_response"
    file = write(name, tmp_path)
    packed = served / "dialogues_v0.2.tar.gz"

    def pack():
        with tarfile.open(packed, "w:gz") as archive:
            archive.add(file, "folder/test.txt")

    pack()
    elsewhere(name, url=f"{base}/{packed.name}#folder/test.txt")
    rows = load_benchmark(name).rows
    assert rows == load_benchmark(f"{name}@{file}").rows
    assert rows == load_benchmark(f"{name}@{served}").rows
    # one that was replaced is read anew
    file.write_text(file.read_text(encoding="utf-8").split("\n")[-1], encoding="utf-8")
    pack()
    (last,) = load_benchmark(f"{name}@{packed}").rows
    assert last["messages"] == rows[-1]["messages"]
