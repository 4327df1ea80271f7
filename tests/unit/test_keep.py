"""What identifies a model or a file, and rows that survive a kill at any byte."""

import contextlib
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from checks import user_error
from hypothesis import given, settings
from hypothesis import strategies as st

from common import keep
from common.bundled import NAME
from common.conversation import UserError
from common.engines import Completion
from common.keep import KeptRows, digest, fingerprint, generate, read_json_lines, rows_digest

MIB = 1 << 20


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """A cache folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("GUARDRAIL_RECIPES_CACHE", str(folder))
    return folder


@pytest.fixture
def model(tmp_path) -> Path:
    """A folder with 4 MiB of weights, and what else a model has."""
    folder = tmp_path / "model"
    (folder / keep.TEMPLATES).mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"\1" * 4 * MIB)
    for name in ("config.json", "tokenizer.json", "guard.json", "merges.txt"):
        (folder / name).write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / keep.TEMPLATES / "tools.jinja").write_text("{{ tools }}")
    return folder


# --- fingerprints ---------------------------------------------------------------------------------


def test_one_other_byte_of_the_weights_is_another_model(model):
    """In the middle, with the same size and time: as after `cp -p`, or out of an archive."""
    before = fingerprint(model)
    path = model / "model.safetensors"
    stat = path.stat()
    with path.open("r+b") as weights:
        weights.seek(2 * MIB)
        weights.write(b"\0")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fingerprint(model) != before


def test_time_and_place_make_no_other_model(model, tmp_path):
    before = fingerprint(model)
    for path in model.rglob("*"):
        path.touch()
    linked = tmp_path / "linked"
    linked.symlink_to(model)
    copied = shutil.copytree(model, tmp_path / "copy")
    for folder in (model, linked, str(copied)):
        assert fingerprint(folder) == before


LEFT_BESIDE = """
README.md run.json results.json eval_results.json predictions.json evaluation.json predictions.jsonl trainer_state.json
training_args.bin optimizer.pt rng_state_0.pth train.log checkpoint-5/model.safetensors
runs/events .cache/huggingface/config.json
"""
MADE_OF = """
config.json tokenizer.json guard.json merges.txt chat_template.jinja probe.json
adapter_model.safetensors modeling_own.py additional_chat_templates/tools.jinja
"""


@pytest.mark.parametrize("name", LEFT_BESIDE.split())
def test_what_runs_leave_beside_a_model_does_not_count(model, name):
    before = fingerprint(model)
    path = model / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", MADE_OF.split())
def test_what_a_model_is_made_of_counts(model, name):
    """Changed, or there at all."""
    before = fingerprint(model)
    (model / name).write_text('{"other": 1}')
    assert fingerprint(model) != before


def test_a_file_counts_under_its_name(model):
    before = fingerprint(model)
    (model / "merges.txt").rename(model / "vocab.txt")
    assert fingerprint(model) != before


@pytest.mark.parametrize("name", ["train.jsonl", "dataset_info.json", "part/test.csv"])
def test_data_count_by_content(tmp_path, name):
    """Each file by itself, and every file of a folder."""
    path = tmp_path / "data" / name
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    before = fingerprint(path), fingerprint(tmp_path / "data")
    assert fingerprint(shutil.copy(path, tmp_path / "other")) == before[0]
    path.write_text("[]")
    assert fingerprint(path) != before[0]
    assert fingerprint(tmp_path / "data") != before[1]


def test_the_bundled_model_by_name(model, cache):
    shutil.copytree(model, cache / NAME)
    assert fingerprint(NAME) == fingerprint(model)


def cached(cache: Path, name: str, commit: str, file: str = "config.json") -> None:
    """A hub id in a cache of the hub, whose branch is at a commit."""
    repository = cache / f"models--{name.replace('/', '--')}"
    for path in (f"snapshots/{commit}/{file}", "refs/main"):
        (repository / path).parent.mkdir(parents=True, exist_ok=True)
    (repository / "snapshots" / commit / file).write_text("{}")
    (repository / "refs/main").write_text(commit)
    assert commit in str(huggingface_hub.try_to_load_from_cache(name, file))


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
def test_a_hub_id_is_its_cached_commit(hub_cache, file):
    """Its name alone where nothing is cached."""
    found = {fingerprint(f"org/{file}-of-nothing")}
    for commit in ("a" * 40, "b" * 40):
        name = f"org/{commit[0]}-{file}"
        cached(hub_cache, name, commit, file)
        found.add(fingerprint(name))
    assert len(found) == 3


def test_a_hub_id_is_one_commit_through_a_run(hub_cache):
    """Also where the hub, or another process, moves the branch meanwhile."""
    cached(hub_cache, "org/moving", "a" * 40)
    before = fingerprint("org/moving")
    cached(hub_cache, "org/moving", "b" * 40)
    assert fingerprint("org/moving") == before != fingerprint("org/of-nothing")


def test_what_cannot_be_read_says_so():
    with user_error("/proc/self/mem"):
        fingerprint("/proc/self/mem")


def test_rows_count_by_content_and_order():
    rows = [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    turned = [{"b": "x", "a": 1}, {"b": "y", "a": 2}]
    assert rows_digest(rows) == rows_digest(iter(turned))
    assert rows_digest(rows) != rows_digest(rows[::-1])
    assert digest(rows[0]) == digest(turned[0])


# --- rows that survive a kill ---------------------------------------------------------------------

TEXTS = ("a", "two\nlines", "Straße", "\u2028", "e")
ROWS = [{"key": f"k{i}", "text": text} for i, text in enumerate(TEXTS)]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "kept.jsonl"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A file for tests that hypothesis runs many times."""
    return tmp_path_factory.mktemp("kept") / "rows.jsonl"


@given(cut=st.integers(min_value=0))
@settings(max_examples=200, deadline=None)
def test_rows_cut_at_any_byte_go_on_to_the_same_file(place, cut):
    """Whole lines are kept, half a line is not, and what is missing comes behind them."""
    place.unlink(missing_ok=True)
    with KeptRows(place) as kept:
        for row in ROWS:
            kept.append(row)
    whole = place.read_bytes()
    cut %= len(whole) + 1
    place.write_bytes(whole[:cut])
    with KeptRows(place) as kept:
        assert len(kept) == whole[:cut].count(b"\n")
        missing = kept.missing([row["key"] for row in ROWS])
        for row in ROWS:
            if row["key"] in missing:
                kept.append(row)
    assert place.read_bytes() == whole
    assert read_json_lines(place) == ROWS


@given(cut=st.integers(min_value=0), salt=st.sampled_from([None, "other model"]))
@settings(max_examples=100, deadline=None)
def test_answers_cut_at_any_byte_go_on_to_the_same_answers(place, cut, salt):
    """Only what is missing is asked, each prompt once; with another salt, everything."""
    prompts = [[1, 2], [3], [1, 2], [4, 5, 6]]
    asked = []

    def engine(_, some):
        for i in reversed(range(len(some))):
            asked.append(some[i])
            yield i, Completion(f"answer to {some[i]} é")

    place.unlink(missing_ok=True)
    answers = generate(engine, prompts, place)
    assert answers == [Completion(f"answer to {ids} é") for ids in prompts]
    assert len(asked) == 3
    whole = place.read_bytes()
    cut %= len(whole) + 1
    place.write_bytes(whole[:cut])
    asked.clear()
    assert generate(engine, prompts, place, salt) == answers
    assert len(asked) == 3 - (whole[:cut].count(b"\n") if salt is None else 0)


def test_an_error_is_no_answer_and_is_asked_for_again(path):
    def some_fail(_, some):
        for i, ids in enumerate(some):
            yield i, Completion(error="refused") if ids == [2] else Completion(f"{ids}")

    first = generate(some_fail, [[1], [2], [3], [2]], path)
    assert [one.error for one in first] == [None, "refused", None, "refused"]
    left = []

    def works(_, some):
        left.extend(some)
        return [(i, Completion("now")) for i in range(len(some))]

    assert generate(works, [[1], [2]], path) == [Completion("[1]"), Completion("now")]
    assert left == [[2]]


def test_what_came_before_the_engine_stopped_is_kept(path):
    def stops(_, some):
        yield 0, Completion("one")
        raise UserError("the server is gone")

    with user_error("the server is gone"):
        generate(stops, [[1], [2]], path)
    assert len(read_json_lines(path)) == 1


def batches(kept: KeptRows, keys: list[str], together: bool, asked: list, stop: int | None = None):
    """Fill with rows that know the batch that they were made in; after `stop` rows comes a kill."""

    def make(number, some):
        asked.extend(some)
        for key in some:
            if len(kept) == stop:
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
    with contextlib.suppress(KeyboardInterrupt), KeptRows(place) as kept:
        batches(kept, keys, together, [], stop)
    content = place.read_bytes()
    place.write_bytes(content[: len(content) - cut])
    made = []
    with KeptRows(place) as kept:
        before = dict(kept)
        assert batches(kept, keys, together, made) == whole
        assert before.items() <= dict(kept).items()
    missing = set(keys) - set(before)
    assert len(made) == len(set(made))
    assert set(made) >= missing if together else set(made) == missing
    assert len(read_json_lines(place)) == len(set(keys))


def test_errors_are_asked_again_and_alone(path):
    """The rest of their batch is there; an error that comes again is not written twice."""
    errors = dict.fromkeys("abcdef", "") | {"b": "busy", "e": "busy"}
    asked = []

    def make(number, some):
        asked.append((number, some))
        return [{"key": key, "error": errors[key]} for key in some]

    def fill():
        asked.clear()
        with KeptRows(path) as kept:
            return kept.fill("abcdef", make, size=3, again=lambda row: bool(row["error"]))

    fill()
    assert asked == [(0, ["a", "b", "c"]), (1, ["d", "e", "f"])]
    errors["e"] = ""
    rows = fill()
    assert asked == [(0, ["b"]), (1, ["e"])]
    assert [row["error"] for row in rows] == list(errors.values())
    assert len(read_json_lines(path)) == 7


BROKEN = {  # what is wrong: place, content
    "malformed JSON": ("line 2, column 9", b'{"key": "a"}\n{"key": \n{"key": "b"}\n'),
    "no object": ("line 2", b'{"key": "a"}\n["key"]\n'),
    "no key": ("key", b'{"id": "a"}\n'),
    "key of a wrong type": ("key", b'{"key": 3}\n'),
    "not UTF-8": ("line 1", b"\xff\xfe\n"),
}


@pytest.mark.parametrize(("where", "content"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named_and_left_as_it_is(path, where, content):
    path.write_bytes(content)
    for _ in range(2):  # it is not left locked
        with user_error(where) as caught:
            KeptRows(path)
        assert str(path) in str(caught.value)
    assert path.read_bytes() == content


def test_one_process_writes_at_a_time(path):
    with KeptRows(path), user_error(r"kept\.jsonl"):
        KeptRows(path)
    with KeptRows(path) as kept:
        assert len(kept) == 0


def test_what_is_appended_is_there_at_once(path):
    with KeptRows(path) as kept:
        kept.append(ROWS[0])
        assert read_json_lines(path) == ROWS[:1]


def test_the_last_row_of_a_key_counts(path):
    failed, judged = {"id": "a", "error": "busy"}, {"id": "a", "error": None}
    with KeptRows(path, key="id") as kept:
        kept.append(failed)
        kept.append(judged)
    with KeptRows(path, key="id") as kept:
        assert dict(kept) == {"a": judged}


def test_nan_is_refused_and_nothing_is_written(path):
    with KeptRows(path) as kept, pytest.raises(ValueError):
        kept.append({"key": "b", "score": float("nan")})
    assert not path.read_bytes()


def test_a_missing_file_of_rows_is_named(tmp_path):
    with user_error(r"none\.jsonl"):
        read_json_lines(tmp_path / "none.jsonl")
