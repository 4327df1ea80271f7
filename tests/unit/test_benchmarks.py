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
from hypothesis import given, settings
from hypothesis import strategies as st
from miniatures import ITEMS, MINIATURES, UNSAFE_PROMPTS, expected, write

from common.conversation import FEATURES, LABELS, UserError, pair
from common.data import deduplicate
from guards import zoo
from guards.suite.benchmarks import benchmark_names, benchmarks, load_benchmark

ROOT = Path(__file__).resolve().parents[2]
CORE = {
    "expguardtest_prompt", "expguardtest_response", "toxicchat", "toxicchat_full", "openai_moderation", "xstest_prompt",
    "harmbench_prompt", "harmbench_response", "aegis1_prompt", "aegis2_prompt", "aegis2_response", "simplesafetytests",
    "wildguardtest_prompt", "wildguardtest_response", "wildguardtest_refusal", "xstest_response_harm",
    "xstest_response_refusal", "beavertails", "beavertails_330k", "saferlhf",
}  # fmt: skip


AEGIS2 = benchmarks()["aegis2_prompt"]


def rows_of(name: str, folder: Path, rows: list, file: str = "rows.jsonl"):
    """Own rows, loaded as benchmark `name`."""
    path = folder / file
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_benchmark(f"{name}@{path}")


# --- the entries ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", benchmark_names())
def test_miniature(name, tmp_path):
    made = MINIATURES[name]
    loaded = load_benchmark(f"{name}@{write(name, tmp_path)}")
    assert [row["label"] for row in loaded.rows] == expected(name)
    assert loaded.rows[0]["groups"] == made.groups
    assert sum(loaded.facts["left_out"].values()) == made.left_out
    assert loaded.facts["found"] == {"size": len(made.labels), "positives": sum(made.labels)}
    assert loaded.label == benchmarks()[name]["label"] and loaded.name == name
    last = "user" if loaded.label == "prompt_unsafe" else "assistant"
    for row in loaded.rows:
        assert row["messages"][-1]["role"] == last
        assert (
            row["id"]
            == hashlib.sha256(json.dumps([loaded.label, row["messages"]]).encode()).hexdigest()
        )
    texts = [row["messages"][-1]["content"] for row in loaded.rows]
    assert len(set(texts)) >= min(2, len(texts)) and all(text == text.strip() for text in texts)


def test_every_core_benchmark_is_known():
    assert CORE <= set(benchmark_names()) == set(MINIATURES)
    by_label = [benchmark_names(label) for label in LABELS]
    assert sorted(name for names in by_label for name in names) == sorted(
        benchmark_names()
    ) and all(by_label)


@pytest.mark.parametrize("name", benchmark_names())
def test_entry_is_whole(name):
    """Licence, gate, label, a pinned source, and counts or null."""
    entry = benchmarks()[name]
    assert (
        entry["licence"]
        and entry["gate"] in ("none", "auto", "manual")
        and entry["label"] in LABELS
    )
    size, positives = entry["size"], entry["positives"]
    assert size is None or (isinstance(size, int) and size > 0)
    assert positives is None or (isinstance(positives, int) and positives <= (size or positives))
    if "hub" in entry:
        assert re.fullmatch(r"[0-9a-f]{40}|main|v0", entry["revision"]) and entry["split"]
    else:
        urls = entry["url"].values() if isinstance(entry["url"], dict) else [entry["url"]]
        pinned = r"https://raw\.githubusercontent\.com/[^/]+/[^/]+/[0-9a-f]{40}/|http://parl\.ai/.*_v[0-9.]+\.tar\.gz#"
        assert all(re.match(pinned, url) for url in urls)
    assert set(entry.get("contaminated_by", ())) <= set(zoo())
    if entry["gold"] == {"always": True}:
        assert size == positives


# --- messages, groups, marks, facts -----------------------------------------------------------------------------------


def test_turns_are_kept(tmp_path):
    """Several turns, a leading assistant turn, joined columns, and turns put together from other
    rows.
    """
    first = lambda name, n=0: load_benchmark(f"{name}@{write(name, tmp_path)}").rows[n]["messages"]  # noqa: E731
    assert [(m["role"], m["content"]) for m in first("convabuse")] == [
        ("assistant", "Hello."), ("user", "Hi."), ("assistant", "How are you?"), ("user", ITEMS[0].prompt),
    ]  # fmt: skip
    for name in ("dices_350", "dices_990"):
        greeting = pair("Hello.", "Hello, how are you?")
        assert first(name) == greeting + pair(ITEMS[7].prompt, ITEMS[7].answer)
    assert first("prosocial_dialog", 4) == pair(ITEMS[4].prompt, ITEMS[4].answer) + pair(
        ITEMS[5].prompt
    )
    assert first("harmbench_behaviors", 2) == pair(
        f"{UNSAFE_PROMPTS[2]}\n\nThe letters lie in a box at the gate."
    )
    assert first("safetext") == pair("If the pan is hot, touch it.")
    # but for a last question
    assert first("harmfulqa_conversations", 3) == pair(ITEMS[1].prompt, ITEMS[1].answer)
    three = [*pair("Hello.", ITEMS[1].answer), *pair(ITEMS[2].prompt)]
    assert first("bot_adversarial_dialogue_prompt", 2) == three
    assert first("bot_adversarial_dialogue_response", 2) == pair(ITEMS[2].prompt, ITEMS[2].answer)
    assert first("xstest_response_refusal", 2) == pair(ITEMS[2].prompt, ITEMS[2].answer)


def test_turns_stand_in_the_order_of_their_numbers(tmp_path):
    """Also where a file writes the numbers as text."""
    rows = [
        {"context": f"q{n}", "response": f"a{n}", "safety_label": "__casual__"} for n in range(12)
    ]
    rows = [row | {"dialogue_id": "0", "response_id": str(n)} for n, row in enumerate(rows)]
    last = rows_of("prosocial_dialog", tmp_path, rows[::-1]).rows[-1]["messages"]
    assert [message["content"] for message in last] == [
        text for n in range(12) for text in (f"q{n}", f"a{n}")
    ][:-1]


def test_sub_groups(tmp_path):
    """A null has no group; scores below the bar and values that are not listed have a name."""
    toxicchat = load_benchmark(f"toxicchat@{write('toxicchat', tmp_path)}").rows
    assert [row["groups"]["openai_moderation"] for row in toxicchat] == ["harassment"] + [
        "low_confidence"
    ] * 5
    assert [row["groups"]["prompt_type"] for row in toxicchat] == ["adversarial"] + ["vanilla"] * 5
    harmbench = load_benchmark(f"harmbench_response@{write('harmbench_response', tmp_path)}").rows
    assert [row["groups"]["prompt_type"] for row in harmbench] == ["vanilla"] + ["adversarial"] * 7
    row = {"prompt": "Hello.", "prompt_label": "safe", "domain": None}
    assert rows_of("expguardtest_prompt", tmp_path, [row]).rows[0]["groups"] == {}


def test_a_cell_of_text_is_never_run(tmp_path):
    trap = tmp_path / "trap"
    row = {"user_input": "Hello.", "human_annotation": True, "toxicity": 0, "jailbreaking": 0}
    row["openai_moderation"] = f"[('a', __import__('pathlib').Path({str(trap)!r}).write_text('x'))]"
    with pytest.raises(
        UserError, match="line 1, field openai_moderation: expected a list of names"
    ):
        rows_of("toxicchat", tmp_path, [row])
    assert not trap.exists()


def test_repeats_and_conflicts_are_marked(tmp_path):
    rows = [
        {"prompt": text, "label": label}
        for text, label in zip("aabbbc", "su" + "sss" + "u", strict=True)
    ]
    rows = [row | {"label": {"s": "safe", "u": "unsafe"}[row["label"]]} for row in rows]
    loaded = rows_of("xstest_prompt", tmp_path, rows)
    assert [row["conflicting"] for row in loaded.rows] == [True, True, False, False, False, False]
    assert [row["duplicate"] for row in loaded.rows] == [False, False, False, True, True, False]
    assert len({row["id"] for row in loaded.rows}) == 3
    other = rows_of("or_bench_hard", tmp_path, [{"prompt": "a"}]).rows[0]
    # the same question of the same text, in whatever benchmark
    assert other["id"] == loaded.rows[0]["id"]
    assert (
        rows_of("dynahate", tmp_path, [{"text": "a", "label": "hate", "split": "test"}]).rows[0][
            "id"
        ]
        == other["id"]
    )


def test_counts_are_checked(tmp_path, caplog, monkeypatch):
    path = write("aegis2_prompt", tmp_path)
    loaded = load_benchmark(f"aegis2_prompt@{path}")
    said = "expected size 1964, positives 1059 but found size 8, positives 4; 1 rows left out: prompt is REDACTED"
    assert loaded.facts["mismatch"] == said and said in caplog.text
    assert loaded.facts["left_out"] == {"prompt is REDACTED": 1}
    for size, positives, fits in (
        (9, 4, True),
        (9, 5, True),
        (9, 6, False),
        (9, 3, False),
        (8, 4, False),
    ):
        monkeypatch.setitem(
            benchmarks(), "aegis2_prompt", AEGIS2 | {"size": size, "positives": positives}
        )
        # the known ones count it
        assert (load_benchmark(f"aegis2_prompt@{path}").facts["mismatch"] is None) == fits
    caplog.clear()
    few = load_benchmark(f"aegis2_prompt@{path}", max_rows=3)
    assert few.facts["mismatch"] is None and not caplog.text and few.facts["found"]["size"] == 3
    unknown = load_benchmark(f"aegis2_response@{write('aegis2_response', tmp_path)}").facts
    assert unknown["expected"] is None and unknown["mismatch"] is None


def test_facts(tmp_path):
    facts = load_benchmark(f"wildguardtest_prompt@{write('wildguardtest_prompt', tmp_path)}").facts
    assert (
        facts["page"] == "https://huggingface.co/datasets/allenai/wildguardmix"
        and facts["gate"] == "auto"
    )
    assert (
        facts["licence"] == "ODC-BY"
        and facts["contaminated_by"] == ["wildguard"]
        and not facts["recall_only"]
    )
    assert facts["file"] == "wildguard_test.parquet" and str(tmp_path) not in json.dumps(facts)
    assert load_benchmark(f"harmfulq@{write('harmfulq', tmp_path)}").facts["recall_only"]


def test_an_answer_without_a_label_is_left_out(tmp_path):
    """It is neither safe nor unsafe."""
    row = {"prompt": "Hello.", "response": "Hi.", "response_label": "safe"}
    rows = [row, row | {"response": "Hey.", "response_label": None}]
    loaded = rows_of("aegis2_response", tmp_path, rows)
    assert [row["label"] for row in loaded.rows] == [False]
    assert loaded.facts["left_out"] == {"response_label is not present": 1}


def test_few_rows_are_spread(tmp_path):
    """Sets are sorted by label: the first rows alone would all be safe."""
    path = write("saferlhf", tmp_path)
    few = load_benchmark(f"saferlhf@{path}", max_rows=4)
    assert [row["label"] for row in few.rows] == [False, False, True, True]
    assert len(load_benchmark(f"saferlhf@{path}", max_rows=99).rows) == 10
    with pytest.raises(UserError, match="max_rows 0: must be at least 1"):
        load_benchmark(f"saferlhf@{path}", max_rows=0)


@pytest.mark.parametrize(
    "name",
    ["toxicchat", "wildguardtest_refusal", "openai_moderation", "beavertails", "aegis1_prompt"],
)
def test_file_types_agree(name, tmp_path):
    """True, "True", 1, "1.0" and an empty cell mean the same in every file type."""
    frame = pandas.DataFrame(MINIATURES[name].content)
    frame.to_csv(tmp_path / "r.csv", index=False)
    frame.to_parquet(tmp_path / "r.parquet")
    frame.to_json(tmp_path / "r.json", orient="records")
    frame.to_json(tmp_path / "r.jsonl", orient="records", lines=True)
    loaded = [
        load_benchmark(f"{name}@{tmp_path}/r.{kind}").rows
        for kind in ("csv", "parquet", "json", "jsonl")
    ]
    assert [row["label"] for row in loaded[0]] == expected(name)
    assert all(other == loaded[0] for other in loaded[1:])


def test_ways_to_write_true(tmp_path):
    rows = [
        {"user_input": "q", "human_annotation": yes, "toxicity": False}
        for yes in (True, 1, "TRUE", "1.0")
    ]
    assert [row["label"] for row in rows_of("toxicchat", tmp_path, rows).rows] == [False] * 4


# --- rules that need code ---------------------------------------------------------------------------------------------


def test_saferlhf_draws_as_the_reference_does(tmp_path):
    """Written out step by step beside the loader: two lists in row order, one seed, the same places
    in both.
    """
    rng = random.Random(7)
    rows = [
        {
            "prompt": f"question {n}", "response_0": f"first {n}", "response_1": f"second {n}",
            "is_response_0_safe": rng.random() < 0.5, "is_response_1_safe": rng.random() < 0.5,
        }
        for n in range(2400)
    ]  # fmt: skip
    safe, harmful = [], []
    for row in rows:
        if row["is_response_0_safe"] and not row["is_response_1_safe"]:
            safe.append((row["prompt"], row["response_0"]))
            harmful.append((row["prompt"], row["response_1"]))
        if row["is_response_1_safe"] and not row["is_response_0_safe"]:
            harmful.append((row["prompt"], row["response_0"]))
            safe.append((row["prompt"], row["response_1"]))
    assert len(safe) > 1000
    random.seed(42)
    places = random.sample(range(len(safe)), 1000)
    wanted = [(safe[i], False) for i in places] + [(harmful[i], True) for i in places]
    random.seed(1)
    loaded = rows_of("saferlhf", tmp_path, rows)
    assert [
        (tuple(m["content"] for m in row["messages"]), row["label"]) for row in loaded.rows
    ] == wanted
    assert loaded.facts["mismatch"] is None
    assert all(row["messages"][0]["content"] == f"question {row['index']}" for row in loaded.rows)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=12))
def test_majority_is_that_of_deduplicate(tmp_path_factory, annotations):
    folder = tmp_path_factory.mktemp("majority")
    rows = [
        {"prompt": f"q{i // 2}", "response": f"a{i % 2}", "is_safe": safe}
        for i, safe in annotations
    ]
    loaded = rows_of("beavertails_330k", folder, rows).rows
    plain = [
        dict.fromkeys(FEATURES)
        | {"messages": pair(r["prompt"], r["response"]), "response_unsafe": not r["is_safe"]}
        for r in rows
    ]
    unique, _ = deduplicate(datasets.Dataset.from_list(plain, features=FEATURES))
    assert [(r["messages"], r["label"]) for r in loaded] == [
        (r["messages"], r["response_unsafe"]) for r in unique
    ]


# --- where rows come from ---------------------------------------------------------------------------------------------


def hub_folder(name: str, folder: Path, **splits: list) -> Path:
    """A local folder as a data set repository on the hub: a card that names config, splits and
    files.
    """
    entry = benchmarks()[name]
    folder.mkdir()
    files = "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in splits)
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {entry.get('config', 'default')}\n  data_files:\n{files}---\n"
    )
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_hub_layout(tmp_path):
    """`datasets.load_dataset` reads a folder as it reads the hub: config, one split, two splits."""
    folder = hub_folder(
        "toxicchat", tmp_path / "toxicchat", test=MINIATURES["toxicchat"].content, train=[]
    )
    loaded = load_benchmark(f"toxicchat@{folder}")
    assert [row["label"] for row in loaded.rows] == expected("toxicchat")
    assert [row["index"] for row in loaded.rows] == [0, 1, 2, 4, 5, 6]
    parts = {
        part: [{"Goal": f"{part} {n}", "Category": "c"} for n in range(3)]
        for part in ("harmful", "benign")
    }
    loaded = load_benchmark(
        f"jailbreakbench@{hub_folder('jailbreakbench', tmp_path / 'jbb', **parts)}"
    )
    assert [row["label"] for row in loaded.rows] == [True] * 3 + [False] * 3
    assert loaded.rows[3]["messages"] == pair("benign 0") and loaded.rows[5]["index"] == 5
    with pytest.raises(
        UserError, match=r"toxicchat, .*jbb:test: .*pass a local copy: toxicchat@FILE"
    ):
        load_benchmark(f"toxicchat@{tmp_path / 'jbb'}")


def test_hub_out_of_reach(tmp_path, monkeypatch):
    """A gated set names the page to visit; another one does not."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    page = "https://huggingface.co/datasets/6rightjade/expguardmix"
    with pytest.raises(UserError, match=f"visit {re.escape(page)}, accept the terms"):
        load_benchmark("expguardtest_prompt")
    with pytest.raises(
        UserError, match=r"aegis1_prompt, nvidia/.* \(pass a local copy: aegis1_prompt@FILE\)$"
    ):
        load_benchmark("aegis1_prompt")


def test_files_of_the_web(tmp_path, monkeypatch):
    """Downloaded once into the cache of `datasets`, read from there without a network; two files
    are two splits.
    """
    served = tmp_path / "served"
    served.mkdir()
    for word, texts in {"Safe": ["Stir the soup.", "Sleep."], "Unsafe": ["Touch the pan."]}.items():
        (served / f"I-PhysicalSafety{word}.json").write_text(
            json.dumps({"instructions": texts, "inputs": []})
        )
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", tmp_path / "extracted")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        urls = {word.lower(): f"{base}/I-PhysicalSafety{word}.json" for word in ("Safe", "Unsafe")}
        monkeypatch.setitem(
            benchmarks(), "i_physical_safety", benchmarks()["i_physical_safety"] | {"url": urls}
        )
        first = load_benchmark("i_physical_safety")
        name = "bot_adversarial_dialogue_response"
        with tarfile.open(served / "dialogues_v0.2.tar.gz", "w:gz") as archive:
            archive.add(line_file := write(name, tmp_path), "folder/test.txt")
        url = f"{base}/dialogues_v0.2.tar.gz#folder/test.txt"
        monkeypatch.setitem(benchmarks(), name, benchmarks()[name] | {"url": url})
        packed = load_benchmark(name).rows
        assert (
            packed
            == load_benchmark(f"{name}@{line_file}").rows
            == load_benchmark(f"{name}@{served}").rows
        )
        # one that was replaced is read anew
        with tarfile.open(served / "dialogues_v0.2.tar.gz", "w:gz") as archive:
            line_file.write_text(
                line_file.read_text(encoding="utf-8").split("\n")[-1], encoding="utf-8"
            )
            archive.add(line_file, "folder/test.txt")
        (last,) = load_benchmark(f"{name}@{served / 'dialogues_v0.2.tar.gz'}").rows
        assert last["messages"] == packed[-1]["messages"]
        monkeypatch.setitem(
            benchmarks(), "harmfulq", benchmarks()["harmfulq"] | {"url": f"{base}/none.json"}
        )
        with pytest.raises(
            UserError, match=r"harmfulq, http://\S+: .*\(check the network, or pass a local copy"
        ):
            load_benchmark("harmfulq")
        server.shutdown()
    assert [row["label"] for row in first.rows] == [False, False, True]
    assert load_benchmark("i_physical_safety").rows == first.rows
    assert load_benchmark(f"i_physical_safety@{served}").rows == first.rows
