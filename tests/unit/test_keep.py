"""common/keep.py: what identifies a model or a file, and rows that survive a kill at any byte."""

import contextlib
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from common import keep
from common.bundled import NAME
from common.conversation import UserError
from common.engines import Completion
from common.keep import KeptRows, digest, fingerprint, generate, read_json_lines, rows_digest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """A cache folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("GUARDRAIL_RECIPES_CACHE", str(folder))
    keep._commit.cache_clear()
    return folder


@pytest.fixture
def model(tmp_path) -> Path:
    """A folder with 272 tensors, 4 MiB in all, and what else a model has."""
    folder = tmp_path / "model"
    (folder / keep.TEMPLATES).mkdir(parents=True)
    torch.manual_seed(0)
    tensors = {f"layer.{i:03d}": torch.randn(4096) for i in range(272)}
    save_file(tensors, folder / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "guard.json", "merges.txt"):
        (folder / name).write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / keep.TEMPLATES / "tools.jinja").write_text("{{ tools }}")
    return folder


# --- fingerprints ---------------------------------------------------------------------------------


def test_zeros_in_the_middle_of_the_weights_are_another_model(model):
    """The first and the last MiB, the size and the names stay as they were."""
    before = fingerprint(model)
    path = model / "model.safetensors"
    old = path.read_bytes()
    tensors = load_file(path)
    for name in sorted(tensors)[100:170]:
        tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, path)
    new = path.read_bytes()
    mib = 1 << 20
    assert len(old) == len(new) > 2 * mib
    assert (old[:mib], old[-mib:]) == (new[:mib], new[-mib:])
    assert fingerprint(model) != before


def test_time_and_place_make_no_other_model(model, tmp_path):
    before = fingerprint(model)
    for path in model.rglob("*"):
        path.touch()
    assert fingerprint(model) == before
    assert fingerprint(str(shutil.copytree(model, tmp_path / "copy"))) == before
    linked = tmp_path / "linked"
    linked.symlink_to(model)
    assert fingerprint(linked) == before


@pytest.mark.parametrize(
    "name",
    [
        *("README.md", "run.json", "results.json", "eval_results.json", "predictions.jsonl"),
        *("trainer_state.json", "training_args.bin", "optimizer.pt", "rng_state_0.pth"),
        "train.log",
        *("checkpoint-5/model.safetensors", "runs/events", ".cache/huggingface/config.json"),
    ],
)
def test_what_runs_leave_beside_a_model_does_not_count(model, name):
    before = fingerprint(model)
    path = model / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "tokenizer.json", "guard.json", "merges.txt", "chat_template.jinja"),
        *("probe.json", "adapter_model.safetensors", "modeling_own.py"),
        f"{keep.TEMPLATES}/tools.jinja",
    ],
)
def test_what_a_model_is_made_of_counts(model, name):
    """Changed, or there at all."""
    before = fingerprint(model)
    (model / name).write_text('{"other": 1}')
    assert fingerprint(model) != before


def test_a_file_counts_under_its_name(model):
    before = fingerprint(model)
    (model / "merges.txt").rename(model / "vocab.txt")
    assert fingerprint(model) != before


def test_data_counts_by_content(tmp_path):
    """A file; and a folder without a model, all its files, whatever they are called."""
    folder = tmp_path / "data"
    (folder / "part").mkdir(parents=True)
    files = [folder / "train.jsonl", folder / "dataset_info.json", folder / "part" / "test.csv"]
    for path in files:
        path.write_text("{}")
    known = {fingerprint(folder)}
    for path in files:
        path.write_text("[]")
        known.add(fingerprint(folder))
    assert len(known) == 4
    before = fingerprint(files[0])
    files[0].touch()
    assert fingerprint(files[0]) == before == fingerprint(shutil.copy(files[0], tmp_path / "other"))


def test_other_weights_of_the_same_size_and_time_are_another_model(model):
    """As after `cp -p`, or out of archives whose files are all of one date."""
    before = fingerprint(model)
    path = model / "model.safetensors"
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[2_000_000] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert fingerprint(model) != before


def test_the_bundled_model_by_name(model, cache):
    shutil.copytree(model, cache / NAME)
    assert fingerprint(NAME) == fingerprint(model)


@pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
def test_a_hub_id_is_its_cached_commit(tmp_path, monkeypatch, file):
    """Its name alone where nothing is cached, as for any other name."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    found = [fingerprint("org/guard"), fingerprint("org/other"), fingerprint("no name: at all")]
    assert found[0] == fingerprint("org/guard")
    for commit in ("a" * 40, "b" * 40):
        repository = tmp_path / "models--org--guard"
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / file).write_text("{}")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        assert fingerprint("org/guard") == found[-1 if commit[0] == "b" else 0]  # one a run
        keep._commit.cache_clear()
        found.append(fingerprint("org/guard"))
    assert len(set(found)) == 5


def test_what_cannot_be_read_says_so():
    with pytest.raises(UserError, match="mem: cannot be read"):
        fingerprint("/proc/self/mem")


def test_rows_count_by_content_and_order():
    rows = [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    turned = [{"b": "x", "a": 1}, {"b": "y", "a": 2}]
    assert rows_digest(rows) == rows_digest(iter(turned)) != rows_digest(rows[::-1])
    assert digest(rows[0]) == digest(turned[0]) != digest(rows[1])


# --- rows that survive a kill ---------------------------------------------------------------------

TEXTS = ("a", "two\nlines", "Straße", "\u2028", "e")
ROWS = [{"key": f"k{i}", "text": text} for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A file for tests that hypothesis runs many times."""
    return tmp_path_factory.mktemp("kept") / "rows.jsonl"


def filled(path: Path, rows: list[dict]) -> bytes:
    path.unlink(missing_ok=True)
    with KeptRows(path) as kept:
        kept.append(*rows)
    return path.read_bytes()


@given(cut=st.integers(min_value=0))
@settings(max_examples=200, deadline=None)
def test_rows_cut_at_any_byte_go_on_to_the_same_file(place, cut):
    """Whole lines are kept, half a line is not, and what is missing comes behind them."""
    whole = filled(place, ROWS)
    cut %= len(whole) + 1
    place.write_bytes(whole[:cut])
    keys = [row["key"] for row in ROWS]
    with KeptRows(place) as kept:
        assert len(kept) == whole[:cut].count(b"\n")
        missing = kept.missing(keys)
        kept.append(*(row for row in ROWS if row["key"] in missing))
        assert dict(kept) == {row["key"]: row for row in ROWS}
    assert place.read_bytes() == whole
    assert read_json_lines(place) == ROWS


@given(cut=st.integers(min_value=0), salt=st.sampled_from([None, "other model"]))
@settings(max_examples=100, deadline=None)
def test_answers_cut_at_any_byte_go_on_to_the_same_answers(place, cut, salt):
    """Only what is missing is asked, each prompt once; with another salt, everything."""
    prompts = [[1, 2], [3], [1, 2], [4, 5, 6]]
    asked = []

    def engine(_, some):
        asked.extend(some)
        for i in reversed(range(len(some))):
            yield i, Completion(f"answer to {some[i]} é")

    place.unlink(missing_ok=True)
    answers = generate(engine, prompts, place)
    assert answers == [Completion(f"answer to {ids} é") for ids in prompts]
    assert asked == [[4, 5, 6], [1, 2], [3]]
    whole = place.read_bytes()
    cut %= len(whole) + 1
    place.write_bytes(whole[:cut])
    asked.clear()
    assert generate(engine, prompts, place, salt) == answers
    assert len(asked) == 3 - (whole[:cut].count(b"\n") if salt is None else 0)


def test_an_error_is_no_answer_and_is_asked_for_again(place):
    """The others are kept, and so is what came before the engine stopped."""
    prompts = [[1], [2], [3], [2]]
    place.unlink(missing_ok=True)

    def some_fail(_, some):
        for i, ids in enumerate(some):
            yield i, Completion(error="refused") if ids == [2] else Completion(f"{ids}")

    first = generate(some_fail, prompts, place)
    assert [one.error for one in first] == [None, "refused", None, "refused"]
    assert [row["error"] for row in read_json_lines(place)] == [None, "refused", None]

    def stops(_, some):
        assert some == [[2], [9], [7]]
        yield 1, Completion("nine")
        raise UserError("the server is gone")

    with pytest.raises(UserError, match="the server is gone"):
        generate(stops, [[1], [2], [9], [7]], place)
    left = []

    def works(_, some):
        left.extend(some)
        return [(i, Completion("now")) for i in range(len(some))]

    texts = [one.text for one in generate(works, [[1], [2], [9], [7]], place)]
    assert texts == ["[1]", "now", "nine", "now"] and left == [[2], [7]]


def batches(kept: KeptRows, keys: list[str], together: bool, asked: list, stop: int | None = None):
    """Fill with rows that know the batch that they were made in; after `stop` rows comes a kill."""

    def make(number, some):
        asked.append(some)
        for key in some:
            if stop is not None and len(kept) == stop:
                raise KeyboardInterrupt
            batch = "".join(some) if together else ""
            yield {"key": key, "text": f"{number} {batch}"}

    return kept.fill(keys, make, size=3, together=together)


@given(
    keys=st.lists(st.sampled_from("abcdefghij"), min_size=1),
    stop=st.integers(0, 10),
    cut=st.integers(0, 10),
    together=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_a_killed_job_makes_the_rows_of_one_left_alone(place, keys, stop, cut, together):
    """Rows depend on their batch, so a batch that was cut is made whole; what is kept stays."""
    place.unlink(missing_ok=True)
    with KeptRows(place) as kept:
        whole = batches(kept, keys, together, [])
    place.unlink()
    stopped = contextlib.suppress(KeyboardInterrupt)
    with stopped, KeptRows(place) as kept:
        batches(kept, keys, together, [], stop)
    content = place.read_bytes()
    place.write_bytes(content[: len(content) - cut])
    with KeptRows(place) as kept:
        before = dict(kept)
        asked = []
        assert batches(kept, keys, together, asked) == whole
        assert before.items() <= dict(kept).items()
    made = [key for some in asked for key in some]
    missing = set(keys) - set(before)
    assert len(made) == len(set(made)) and missing <= set(made)
    if not together:
        assert set(made) == missing
    assert len(read_json_lines(place)) == len(set(keys))


def test_errors_are_asked_again_and_alone(tmp_path):
    """The rest of their batch is there; an error that comes again is not written twice."""
    words = {key: "" for key in "abcdef"} | {"b": "busy", "e": "busy"}
    asked = []

    def make(number, some):
        asked.append((number, some))
        return [{"key": key, "error": words[key]} for key in some]

    first = [(0, ["a", "b", "c"]), (1, ["d", "e", "f"])]
    second = [(0, ["b"]), (1, ["e"])]
    for expected in (first, second, second[:1]):
        with KeptRows(tmp_path / "kept.jsonl") as kept:
            rows = kept.fill("abcdef", make, size=3, again=lambda row: bool(row["error"]))
        assert asked == expected
        assert [row["error"] for row in rows] == list(words.values())
        asked.clear()
        words["e"] = ""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"key": "a"}\n{"key": \n{"key": "b"}\n', "line 2, column 9: malformed JSON"),
        ('{"key": "a"}\n["key"]\n', "line 2: expected an object"),
        ('{"id": "a"}\n', "a row has no field key"),
        ('{"key": 3}\n', "a row has no field key"),
        (b"\xff\xfe\n", "line 1: not UTF-8"),
    ],
)
def test_a_broken_file_is_named_and_left_as_it_is(tmp_path, content, said):
    path = tmp_path / "kept.jsonl"
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(content)
    for _ in range(2):  # it is not left open
        with pytest.raises(UserError, match=said) as caught:
            KeptRows(path)
        assert str(path) in str(caught.value)
    assert path.read_bytes() == content


def test_one_process_writes_at_a_time(tmp_path):
    path = tmp_path / "kept.jsonl"
    with KeptRows(path) as kept:
        kept.append(ROWS[0])
        with pytest.raises(UserError, match=r"kept\.jsonl: another run writes this file"):
            KeptRows(path)
        kept.append(ROWS[1])
    with KeptRows(path) as kept:
        assert len(kept) == 2


def test_what_is_appended_is_there_at_once(tmp_path):
    with KeptRows(tmp_path / "kept.jsonl") as kept:
        kept.append(ROWS[0])
        assert read_json_lines(kept.path) == ROWS[:1]


def test_the_last_row_of_a_key_counts(tmp_path):
    with KeptRows(tmp_path / "kept.jsonl", key="id") as kept:
        failed, judged = {"id": "a", "error": "busy"}, {"id": "a", "error": None}
        kept.append(failed)
        kept.append(failed)
        again = kept.missing(["a", "b", "b"], again=lambda row: row["error"] is not None)
        assert (again, kept.missing(["a", "b", "b"])) == (["a", "b"], ["b"])
        kept.append(judged)
    with KeptRows(tmp_path / "kept.jsonl", key="id") as kept:
        assert dict(kept) == {"a": judged}
    assert len(read_json_lines(kept.path)) == 2


def test_nan_is_refused_and_nothing_is_written(tmp_path):
    with KeptRows(tmp_path / "kept.jsonl") as kept:
        with pytest.raises(ValueError):
            kept.append(ROWS[0], {"key": "b", "score": float("nan")})
        assert not kept.path.read_bytes()


def test_a_missing_file_of_rows_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        read_json_lines(tmp_path / "none.jsonl")
