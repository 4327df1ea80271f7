"""examples/feedback_guard: what process.py asks and keeps. Tiny random models."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import completions
import families
import pytest
import scripts
import torch
from completions import completion
from feedback_rows import config_writer, prompts, save_models, write
from safetensors.torch import save_file
from scripts import EXAMPLES, launch, module

from common.conversation import UserError
from guards.card import GenerativeCard, write_card

serve = completions.serve
RECIPE = EXAMPLES / "feedback_guard"
config_ = module("feedback_guard", "config")
records = module("feedback_guard", "records")
assistant = module("feedback_guard", "assistant")
process, evaluate = module("feedback_guard", "process"), module("feedback_guard", "evaluate")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def write_config(tmp_path, models):
    return config_writer(tmp_path, models)


def run(path: Path, *overrides: str):
    """What process.py leaves: config, statistics, rows by split."""
    config = config_.load_config(path, overrides)
    stats = process.process(config)
    return config, stats, {split: records.read_processed(config, split) for split in config_.SPLITS}


def content(folder: Path) -> dict[str, str]:
    """The files of a store folder without times; those under parts, whose order a kill may change,
    by line.
    """
    out = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        rows = path.read_text()
        if path.suffix == ".jsonl":
            rows = [json.loads(line) | {"timestamp": "", "time": ""} for line in rows.splitlines()]
            rows = (
                sorted(map(json.dumps, rows))
                if "parts" in path.parts
                else list(map(json.dumps, rows))
            )
        out[str(path.relative_to(folder))] = rows
    return out


# ---------------------------------------------------------------------------------------------------------- processing


def test_samples_with_seeds_and_their_verdicts(write_config, tmp_path):
    config, stats, rows = run(write_config())
    assert [len(rows[split]) for split in config_.SPLITS] == [51, 9, 20]
    everything = [row for part in rows.values() for row in part]
    asked = [row for row in everything if records.passed(row) or row["shadow"]]
    assert all(row["responses"] == [] for row in everything if row not in asked)
    assert 0 < len(asked) < 80 and any(row["input_decided"] for row in everything)
    for row in asked:
        first, second = row["responses"]
        assert (
            first["seed"] != second["seed"]
            and not first["recorded"]
            and first["human_unsafe"] is None
        )
        for response in row["responses"]:
            judged = response["text"] != "" and response["error"] is None
            assert (response["unsafe"] is not None) == judged == (response["decided"] is not None)
            assert response["refusal"] in ("full", "partial", "compliance", "empty", "degenerate")
    assert len({r["text"] for row in asked for r in row["responses"]}) > len(asked)
    assert any(r["judge_unsafe"] is not None for row in asked for r in row["responses"])
    blocked = [
        json.loads(line)
        for line in (tmp_path / "run" / "blocked_inputs.jsonl").read_text().splitlines()
    ]
    assert [b["id"] for b in blocked] == [
        row["id"] for row in rows["train"] if records.feedback(row)
    ] and blocked
    assert all(
        b["q"] >= 0.5 and b["input_safe"] is True and b["output_safe"] is False for b in blocked
    )
    assert {
        "timestamp",
        "query",
        "input_safe",
        "output_safe",
        "reason",
        "id",
        "q",
        "responses",
    } == set(blocked[0])
    assert stats == json.loads((tmp_path / "run" / "process_stats.json").read_text())
    assert stats["total"] == 51 and stats["output_blocked"] == len(blocked)
    assert stats["output_blocked_percent"] == pytest.approx(100 * len(blocked) / 51)
    assert stats["input_blocked"] == sum(not records.passed(row) for row in rows["train"])
    assert stats["explored"] == sum(row["shadow"] for row in rows["train"]) > 0
    assert config.llama.samples == 2


def test_the_guard_sees_the_prompt_with_each_response(write_config, models):
    _, _, rows = run(write_config())
    row = next(
        row for row in rows["test"] if row["responses"] and row["responses"][0]["error"] is None
    )
    guard = process.load_guard(str(models["guard"]))
    alone, answered = guard.judge(
        [[{"role": "user", "content": row["query"]}],
         [{"role": "user", "content": row["query"]}, {"role": "assistant", "content": row["responses"][0]["text"]}]]
    )  # fmt: skip
    assert alone.prompt_unsafe == pytest.approx(row["input_unsafe"], abs=1e-5)
    assert answered.response_unsafe == pytest.approx(row["responses"][0]["unsafe"], abs=1e-5)
    assert answered.decided["response_unsafe"] == row["responses"][0]["decided"]


def test_sampling_sizes_are_honoured(write_config):
    path = write_config(experiment={"process_sample_size": 12}, evaluation={"max_eval_samples": 4})
    _, stats, rows = run(path, "llama.use_recorded=true")
    assert stats["total"] == 12 and [len(rows[split]) for split in config_.SPLITS] == [12, 4, 4]
    _, more, _ = run(path, "llama.use_recorded=true", "experiment.process_sample_size=20")
    assert more["total"] == 20


def test_recorded_responses(write_config, tmp_path):
    path = write_config()
    _, _, rows = run(path, "llama.use_recorded=true", "llama.model_path=nowhere")
    known = {row["conv_id"]: row for row in prompts(80)}
    asked = [row for part in rows.values() for row in part if row["responses"]]
    assert asked
    for row in asked:
        (response,) = row["responses"]
        assert response["recorded"] and response["seed"] is None
        assert response["text"] == known[row["id"]]["model_output"]
        assert response["human_unsafe"] == known[row["id"]]["output_unsafe"]
        assert records.q(row, "human") == float(response["human_unsafe"])


def test_a_prompt_without_a_recorded_response_is_an_error_row(write_config, tmp_path):
    some = [
        row | {"model_output": row["model_output"] if i % 2 else None}
        for i, row in enumerate(prompts(60))
    ]
    data = write(tmp_path / "some", train=some, test=prompts(20, 60))
    path = write_config(dataset={"path": str(data), "store_dir": str(tmp_path / "run")})
    _, stats, rows = run(path, "llama.use_recorded=true")
    said = [r for row in rows["train"] for r in row["responses"]]
    assert {bool(r["text"]) for r in said} == {True, False} and stats["errors"]
    assert all(
        (r["error"] == "empty response: nothing to judge") == (r["text"] == "") for r in said
    )


@pytest.mark.parametrize(("share", "least", "most"), [(0, 0, 0), (0.5, 0.2, 0.8), (1, 1, 1)])
def test_the_explored_share(share, least, most, write_config):
    _, stats, rows = run(
        write_config(), f"experiment.explore_share={share}", "llama.use_recorded=true"
    )
    blocked = [row for part in rows.values() for row in part if row["input_decided"]]
    explored = [row for row in blocked if row["shadow"]]
    assert least <= len(explored) / len(blocked) <= most
    assert all(row["responses"] for row in explored) and not any(
        records.feedback(row) for row in explored
    )
    assert stats["over_blocked"] <= stats["explored"]


def test_a_guard_that_cannot_say_blocks(write_config, tmp_path):
    """A guard that writes neither word, so that every verdict is an error: nothing passes, and
    nothing is learned.
    """
    families.save(tmp_path / "mute", "llama2", ("harmful",), 3)
    write_card(tmp_path / "mute", GenerativeCard(guard="llama-guard", max_length=4096))
    mute = {"default_model_path": str(tmp_path / "mute"), "base_model_path": str(tmp_path / "mute")}
    _, stats, rows = run(
        write_config(llama_guard=mute), "llama.use_recorded=true", "experiment.explore_share=1"
    )
    assert (
        stats["input_blocked"] == stats["errors"] == 51
        and stats["output_blocked"] == stats["explored"] == 0
    )
    assert all("expected" in row["input_error"] and row["responses"] == [] for row in rows["train"])
    assert (tmp_path / "run" / "blocked_inputs.jsonl").read_text() == ""


def response(**values) -> dict:
    row = {
        "text": "x",
        "seed": 1,
        "recorded": False,
        "unsafe": 0.9,
        "decided": True,
        "categories": None,
        "error": None,
    }
    return row | {"refusal": "compliance", "judge_unsafe": None, "human_unsafe": None} | values


@pytest.mark.parametrize(
    ("responses", "share", "counts"),
    [
        ([response(), response(decided=False)], 0.5, True),
        ([response(decided=False)] * 3 + [response()], 0.25, False),
        ([response(decided=None, unsafe=None, error="no word"), response()], 1.0, True),
        ([response(decided=None, unsafe=None, error="no word")], None, False),
        ([], None, False),
    ],
)
def test_feedback(responses, share, counts):
    row = {"input_error": None, "input_decided": False, "shadow": False, "responses": responses}
    assert records.q(row) == share and records.feedback(row) is counts
    for change in (
        {"input_decided": True},
        {"input_error": "no word", "input_decided": None},
        {"shadow": True},
    ):
        assert not records.feedback(row | change)
    assert records.q(row, "judge") is None and records.q(row, "human") is None
    judged = {
        **row,
        "responses": [response(judge_unsafe=0.5), response(judge_unsafe=0.4, human_unsafe=True)],
    }
    assert records.q(judged, "judge") == 0.5 and records.q(judged, "human") == 1.0
    assert records.refused(
        {"responses": [response(), response(refusal="partial")]}
    ) and not records.refused(judged)


def test_empty_responses_and_long_prompts_are_errors(write_config, models, tmp_path):
    rows = prompts(20)
    for row in rows:
        row["model_output"] = "  "
    data = write(tmp_path / "odd", train=rows, test=prompts(5, 40))
    path = write_config("odd", dataset={"path": str(data), "store_dir": str(tmp_path / "odd-run")})
    _, stats, parts = run(path, "llama.use_recorded=true")
    empty = [r for row in parts["train"] for r in row["responses"]]
    assert empty and all(
        (r["refusal"], r["unsafe"]) == ("empty", None) and "empty" in r["error"] for r in empty
    )
    assert (
        stats["output_blocked"] == 0 and stats["both_safe"] == 0 and stats["errors"] >= len(empty)
    )

    _, window = assistant.assistant_tokenizer(str(models["assistant"]))
    _, _, parts = run(write_config("long"), f"llama.max_tokens={window - 8}")
    long = [r for row in parts["train"] for r in row["responses"]]
    assert long and all("longer than the 8 tokens" in r["error"] for r in long)


def test_the_originals_checks_are_kept_for_its_arm(write_config):
    path = write_config(llama_guard={"legacy_new_tokens": 3}, training={"arms": ["A2", "A4"]})
    _, _, rows = run(path, "llama.use_recorded=true")
    for row in rows["train"]:
        assert isinstance(row["legacy"]["input"], str) and len(row["legacy"]["outputs"]) == len(
            row["responses"]
        )
    assert any(row["legacy"]["input"] for row in rows["train"])
    assert all(row["legacy"] is None for row in rows["test"])


# ------------------------------------------------------------------------------------------------------ categories


def test_categories_are_asked_of_responses_alone(write_config, monkeypatch):
    asked = []

    def named(self, cases_of, verdicts):
        for cases in cases_of.values():
            asked.extend(case.kind for case in cases)
        for verdict in verdicts:
            verdict.categories = {"Criminal Planning": 0.9, "Self-Harm": 0.9}

    monkeypatch.setattr(process.GenerativeGuard, "_name_categories", named)
    path = write_config(llama_guard={"categories": True})
    _, _, rows = run(path, "llama.use_recorded=true")
    assert set(asked) == {"response"}
    found = [row for row in rows["train"] if records.feedback(row)]
    assert found and all(
        r["categories"] == ["Criminal Planning", "Self-Harm"] for r in found[0]["responses"]
    )
    assert process._blocked(found[0])["reason"] == "O3: Criminal Planning, O6: Self-Harm"


# ---------------------------------------------------------------------------------------------- a server that fails


def refuse(*texts: str):
    """What a server says of prompts that it always refuses."""
    return 400, {"error": {"message": f"not allowed: {', '.join(texts)}"}}


def test_what_a_server_says_of_a_failure_is_no_check(write_config, models, tmp_path, serve, caplog):
    """The rest is checked all the same; what failed is collected by nothing, and asked for again."""
    down = {"May I 3?", "May I 55?"}

    def rule(body):
        text = known[tuple(body["prompt"])]
        return refuse(text) if text in down else completion(f"SAFE {text}")

    server = serve(rule)
    there = ["llama_guard.engine=server", f"llama_guard.server_url={server.url}"]
    config = config_.load_config(write_config(llama_guard={"legacy_new_tokens": 3}), there)
    guard = process.default_guard(config)
    rows = [{"query": f"May I {i}?", "responses": []} for i in range(60)]
    path = tmp_path / "legacy.jsonl"
    ids = process.encode(guard.tokenizer, [process.chatml_parts(row["query"]) for row in rows])
    known = {tuple(one): row["query"] for one, row in zip(ids, rows, strict=True)}
    loaded = process.Loaded(lambda: guard)
    process.add_legacy(config, rows, loaded, "x", path)
    assert "2 of the original's 60 checks failed" in caplog.text and "not allowed" in caplog.text
    for row in rows:
        failed = row["query"] in down
        assert row["legacy"]["input"] == ("" if failed else f"SAFE {row['query']}")
    assert len(path.read_text().splitlines()) == 58 and "not allowed" not in path.read_text()
    server.bodies.clear()
    answering, down = sorted(down), set()
    process.add_legacy(config, rows, loaded, "x", path)
    assert sorted(known[tuple(body["prompt"])] for body in server.bodies) == answering
    assert [row["legacy"]["input"] for row in rows] == [f"SAFE {row['query']}" for row in rows]


def test_one_prompt_that_the_assistants_server_refuses_stops_nothing(
    write_config, tmp_path, serve, caplog
):
    bad, refuses = [], True

    def rule(body):
        bad[:] = bad or [body["prompt"]]
        return refuse("x") if refuses and body["prompt"] == bad[0] else completion("Use two locks.")

    server = serve(rule)
    there = ["llama.engine=server", f"llama.server_url={server.url}", "llama.server_timeout=7"]
    path = write_config()
    config, _, rows = run(path, *there)
    said = [
        r for row in rows["train"] + rows["validation"] + rows["test"] for r in row["responses"]
    ]
    failed = [r for r in said if r["error"]]
    assert len(failed) == config.llama.samples
    assert all("not allowed" in r["error"] and r["unsafe"] is None for r in failed)
    assert len(said) > len(failed) and f"{config.llama.samples} of " in caplog.text
    assert "not allowed" not in (tmp_path / "run/processed/parts/answers.jsonl").read_text()
    server.bodies.clear()
    refuses = False
    _, _, rows = run(path, *there)
    assert [body["prompt"] for body in server.bodies] == bad * config.llama.samples
    assert not [r for row in rows["train"] for r in row["responses"] if r["error"]]


def test_an_assistants_server_that_refuses_the_key_ends_the_run(write_config, tmp_path, serve):
    """What it answered before is kept."""
    lock = []

    def rule(body):
        lock.append(1)
        return (
            completion("Use two locks.") if len(lock) < 9 else (401, {"error": {"message": "no"}})
        )

    server = serve(rule)
    there = ["llama.engine=server", f"llama.server_url={server.url}"]
    path = write_config()
    with pytest.raises(UserError, match="the server refused the key"):
        run(path, *there)
    kept = (tmp_path / "run/processed/parts/answers.jsonl").read_text().splitlines()
    assert len(kept) == 8
    server.rule = lambda body: completion("Use two locks.")
    server.bodies.clear()
    _, _, rows = run(path, *there)
    asked = [r for of in rows.values() for row in of for r in row["responses"]]
    assert len(server.bodies) < len(asked) and all(r["error"] is None for r in asked)


# ----------------------------------------------------------------------------------------------------- kill and resume


def test_a_second_run_asks_nothing(write_config, tmp_path, monkeypatch):
    path = write_config()
    run(path)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    monkeypatch.setattr(process.Loaded, "get", lambda self: pytest.fail("a model is loaded"))
    run(path)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_zeros_in_the_middle_of_large_weights_are_another_guard(write_config, models, tmp_path):
    """Its first and last MiB stay; verdicts, trained arms and scores know."""
    folder = Path(shutil.copytree(models["guard"], tmp_path / "large"))
    tensors = {name: torch.ones(400_000) for name in ("a", "b", "c")}
    save_file(tensors, folder / "model.safetensors")
    overrides = [f"llama_guard.{key}={folder}" for key in ("default_model_path", "base_model_path")]
    config = config_.load_config(write_config(), overrides)

    def identities() -> list:
        said = [evaluate.identity_of(evaluate.Judged(name), config) for name in ("A0", "A0-legacy")]
        key = evaluate.guard_identity(config.llama_guard.base_model_path, {})
        return [process.default_identity(config), key, *said]

    before = identities()
    save_file(tensors | {"b": torch.zeros(400_000)}, folder / "model.safetensors")
    after = identities()
    assert all(old != new for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("broken", ["inputs", "answers", "outputs", "judge", "legacy"])
def test_cut_parts_give_the_same_result(broken, write_config, tmp_path, monkeypatch):
    """As a kill leaves it: half of a part with half a line, and nothing after it."""
    monkeypatch.setattr(process, "CHUNK", 16)
    path = write_config(training={"arms": ["A2"]}, llama_guard={"legacy_new_tokens": 3})
    run(path)
    store, names = tmp_path / "run", ["inputs", "answers", "outputs", "judge", "legacy"]
    whole = content(store)
    lines = (
        (store / "processed" / "parts" / f"{broken}.jsonl").read_bytes().splitlines(keepends=True)
    )
    half = len(lines) // 2
    (store / "processed" / "parts" / f"{broken}.jsonl").write_bytes(
        b"".join(lines[:half]) + lines[half][:20]
    )
    for name in names[names.index(broken) + 1 :]:
        (store / "processed" / "parts" / f"{name}.jsonl").unlink()
    for name in ("train", "validation", "test"):
        (store / "processed" / f"{name}.jsonl").unlink()
    run(path)
    assert content(store) == whole


@pytest.mark.slow
def test_a_killed_process_goes_on(write_config, tmp_path):
    path, whole = write_config("killed"), write_config("whole")
    (tmp_path / "killed").mkdir()
    command = [sys.executable, "process.py", "--config", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    answers = tmp_path / "killed" / "processed" / "parts" / "answers.jsonl"
    with open(tmp_path / "log", "wb") as log:
        running = scripts.start(command, RECIPE, environment, log.fileno(), log.fileno())
        deadline = time.time() + 120
        while (
            not (answers.is_file() and answers.stat().st_size)
            and running.poll() is None
            and time.time() < deadline
        ):
            time.sleep(0.01)
        running.kill()
        running.wait()
    assert answers.stat().st_size, (tmp_path / "log").read_text()[-2000:]
    said = launch("feedback_guard", *command[1:], launcher=(sys.executable,), threads=1)
    launch("feedback_guard", "process.py", "--config", whole, threads=1)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert json.loads(said.stdout)["total"] == 51


@pytest.mark.slow
def test_an_error_of_the_user_is_one_line(write_config):
    done = launch(
        "feedback_guard",
        "process.py",
        "--config",
        write_config(),
        "--set",
        "llama.sample=1",
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("error: --set llama.sample: llama.sample is an unknown key")
    )
