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
from completions import completion
from feedback_rows import config_writer, prompts, save_models, write
from scripts import EXAMPLES, launch, module

from common.conversation import UserError, pair
from guards import load_guard
from guards.card import GenerativeCard, write_card

serve = completions.serve
RECIPE = EXAMPLES / "feedback_guard"
config_ = module("feedback_guard", "config")
records = module("feedback_guard", "records")
process = module("feedback_guard", "process")
RECORDED = "llama.use_recorded=true"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def write_config(tmp_path, models):
    return config_writer(tmp_path, models)


def run(path: Path, *overrides: str) -> tuple[dict, dict[str, list[dict]]]:
    """What process.py leaves: statistics, and rows by split."""
    config = config_.load_config(path, overrides)
    stats = process.process(config)
    return stats, {split: records.read_processed(config, split) for split in config_.SPLITS}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def everything(rows: dict[str, list[dict]]) -> list[dict]:
    return [row for split in config_.SPLITS for row in rows[split]]


def responses(rows: list[dict]) -> list[dict]:
    return [response for row in rows for response in row["responses"]]


def content(folder: Path) -> dict[str, list]:
    """The files of a store folder without times; those under parts, whose order a kill may change,
    sorted.
    """
    out = {}
    for path in folder.rglob("*.jsonl"):
        rows = [json.dumps(row | {"timestamp": "", "time": ""}) for row in lines(path)]
        out[str(path.relative_to(folder))] = sorted(rows) if "parts" in path.parts else rows
    return out


# --- processing -----------------------------------------------------------------------------------


def test_what_is_let_in_is_answered_and_judged(write_config, tmp_path):
    stats, rows = run(write_config())
    assert [len(rows[split]) for split in config_.SPLITS] == [51, 9, 20]
    asked = [row for row in everything(rows) if records.passed(row) or row["shadow"]]
    assert 0 < len(asked) < 80
    assert all(row["responses"] == [] for row in everything(rows) if row not in asked)
    for row in asked:
        assert len(row["responses"]) == 2
        for response in row["responses"]:
            judged = response["text"] != "" and response["error"] is None
            assert (response["unsafe"] is not None) == judged == (response["decided"] is not None)
            assert response["refusal"] in ("full", "partial", "compliance", "empty", "degenerate")
            assert not response["recorded"] and response["human_unsafe"] is None
    assert len({response["text"] for response in responses(asked)}) > len(asked)
    assert any(response["judge_unsafe"] is not None for response in responses(asked))
    assert stats == json.loads((tmp_path / "run" / "process_stats.json").read_text())
    assert stats["total"] == 51
    assert stats["input_blocked"] == sum(not records.passed(row) for row in rows["train"])
    assert stats["explored"] == sum(row["shadow"] for row in rows["train"]) > 0


def test_blocked_inputs_have_the_originals_keys(write_config, tmp_path):
    stats, rows = run(write_config(), RECORDED)
    blocked = lines(tmp_path / "run" / "blocked_inputs.jsonl")
    assert [row["id"] for row in blocked] == [r["id"] for r in rows["train"] if records.feedback(r)]
    keys = {"timestamp", "query", "input_safe", "output_safe", "reason"}
    for row in blocked:
        assert row.keys() == keys | {"id", "q", "responses"}
        assert (row["input_safe"], row["output_safe"]) == (True, False) and row["q"] >= 0.5
    assert stats["output_blocked"] == len(blocked) > 0
    assert stats["output_blocked_percent"] == pytest.approx(100 * len(blocked) / 51)


def test_the_guard_sees_the_prompt_with_each_response(write_config, models):
    _, rows = run(write_config(), RECORDED)
    row = next(row for row in rows["test"] if row["responses"])
    (response,) = row["responses"]
    conversations = [pair(row["query"]), pair(row["query"], response["text"])]
    alone, answered = load_guard(str(models["guard"])).judge(conversations)
    assert alone.prompt_unsafe == pytest.approx(row["input_unsafe"], abs=1e-5)
    assert answered.response_unsafe == pytest.approx(response["unsafe"], abs=1e-5)
    assert answered.decided["response_unsafe"] == response["decided"]


def answers_of(rows: list[dict]) -> dict[str, list[str]]:
    return {row["query"]: [r["text"] for r in row["responses"]] for row in rows if row["responses"]}


def test_answers_do_not_depend_on_how_many_prompts_there_are(write_config, tmp_path):
    """Nor does the truth that they give: each prompt has a seed of its own."""
    _, all_rows = run(write_config("all"))
    few = write(tmp_path / "few", train=prompts(25, 10), test=prompts(20, 60)[::-1][:7])
    own = {"path": str(few), "store_dir": str(tmp_path / "small")}
    _, few_rows = run(write_config("small", dataset=own))
    everywhere = answers_of(everything(all_rows))
    here = answers_of(everything(few_rows))
    assert len(here) > 10
    assert here == {prompt: everywhere[prompt] for prompt in here}


def test_a_server_is_given_a_seed_a_response(write_config, tmp_path, serve):
    server = serve(lambda body: completion("Use two locks."))
    there = ["llama.engine=server", f"llama.server_url={server.url}"]
    run(write_config("all"), *there)
    everywhere = {(tuple(body["prompt"]), body["seed"]) for body in server.bodies}
    assert len({seed for _, seed in everywhere}) == len(server.bodies) > 20
    server.bodies.clear()
    run(write_config("few"), "experiment.process_sample_size=9", *there)
    assert {(tuple(body["prompt"]), body["seed"]) for body in server.bodies} < everywhere


def test_sampling_sizes_are_honoured(write_config):
    path = write_config(experiment={"process_sample_size": 12}, evaluation={"max_eval_samples": 4})
    _, rows = run(path, RECORDED)
    assert [len(rows[split]) for split in config_.SPLITS] == [12, 4, 4]
    more, _ = run(path, RECORDED, "experiment.process_sample_size=20")
    assert more["total"] == 20


def test_recorded_responses(write_config):
    _, rows = run(write_config(), RECORDED, "llama.model_path=nowhere")
    known = {row["conv_id"]: row for row in prompts(80)}
    asked = [row for row in everything(rows) if row["responses"]]
    assert asked
    for row in asked:
        (response,) = row["responses"]
        assert response["recorded"] and response["seed"] is None
        assert response["text"] == known[row["id"]]["model_output"]
        assert records.q(row, "human") == float(known[row["id"]]["output_unsafe"])


def test_people_block_responses(write_config, tmp_path):
    """Their labels are what is learned, and the guard is not asked of responses."""
    data = prompts(80)
    for number, row in enumerate(data):
        row["output_unsafe"] = number % 2 == 0
    path = write(tmp_path / "labelled", train=data[:60], test=data[60:])
    config = write_config(
        dataset={"path": str(path)},
        llama={"use_recorded": True},
        evaluation={"t2_label": "human"},
        experiment={"blocked_by": "human"},
    )
    stats, rows = run(config)
    let_in = [row for row in rows["train"] if records.passed(row)]
    learned = [row["id"] for row in let_in if records.feedback(row)]
    unsafe = {row["conv_id"] for row in data if row["output_unsafe"]}
    assert learned == [row["id"] for row in let_in if row["id"] in unsafe]
    assert 0 < stats["output_blocked"] == len(learned) < len(let_in)
    assert all(response["decided"] is None for response in responses(everything(rows)))


@pytest.mark.parametrize("text", [None, "  "])
def test_a_prompt_without_a_recorded_response_is_an_error_row(text, write_config, tmp_path):
    rows = prompts(60)
    for row in rows[::2]:
        row["model_output"] = text
    data = write(tmp_path / "some", train=rows, test=prompts(20, 60))
    stats, found = run(write_config(dataset={"path": str(data)}), RECORDED)
    empty = [r for r in responses(found["train"]) if not r["text"]]
    assert 0 < len(empty) < len(responses(found["train"]))
    assert stats["errors"] >= len(empty)
    for response in empty:
        assert (response["refusal"], response["unsafe"]) == ("empty", None)
        assert response["error"] == "empty response: nothing to judge"


def test_a_prompt_that_leaves_no_room_is_an_error_row(write_config, models):
    _, window = process.assistant_tokenizer(str(models["assistant"]))
    _, rows = run(write_config(), f"llama.max_tokens={window - 8}")
    said = responses(rows["train"])
    assert said and all("longer than the 8 tokens" in response["error"] for response in said)


@pytest.mark.parametrize(("share", "least", "most"), [(0, 0, 0), (0.5, 0.2, 0.8), (1, 1, 1)])
def test_the_explored_share(share, least, most, write_config):
    stats, rows = run(write_config(), f"experiment.explore_share={share}", RECORDED)
    blocked = [row for row in everything(rows) if row["input_decided"]]
    explored = [row for row in blocked if row["shadow"]]
    assert least <= len(explored) / len(blocked) <= most
    for row in explored:
        assert row["responses"] and not records.feedback(row)
    assert stats["over_blocked"] <= stats["explored"]


@pytest.fixture
def mute(tmp_path) -> str:
    """A guard that writes neither word, so that every verdict is an error."""
    families.save(tmp_path / "mute", "llama2", ("harmful",), 3)
    write_card(tmp_path / "mute", GenerativeCard(guard="llama-guard", max_length=4096))
    return str(tmp_path / "mute")


def test_a_guard_that_cannot_say_blocks(write_config, mute, tmp_path):
    """Nothing passes, and nothing is learned."""
    path = write_config(llama_guard={"default_model_path": mute, "base_model_path": mute})
    stats, rows = run(path, RECORDED, "experiment.explore_share=1")
    assert stats["input_blocked"] == stats["errors"] == 51
    assert stats["output_blocked"] == stats["explored"] == 0
    assert all(row["input_error"] and row["responses"] == [] for row in rows["train"])
    assert (tmp_path / "run" / "blocked_inputs.jsonl").read_text() == ""


def test_one_query(write_config, mute, models, monkeypatch, capsys):
    """`--query TEXT`: what the guard says of it; what it cannot judge is not safe."""
    verdicts = {}
    for guard in (str(models["guard"]), mute):
        path = write_config(llama_guard={"default_model_path": guard})
        words = ["process.py", "--config", str(path), "--query", "How do I pick a lock?"]
        monkeypatch.setattr(sys, "argv", words)
        process.main()
        verdicts[guard] = json.loads(capsys.readouterr().out)
    said = verdicts[str(models["guard"])]
    assert said["query"] == "How do I pick a lock?" and said["error"] is None
    (verdict,) = load_guard(str(models["guard"])).judge([pair(said["query"])])
    assert said["safe"] is (verdict.prompt_unsafe < 0.5)
    assert verdicts[mute]["safe"] is False and verdicts[mute]["error"]


@pytest.mark.parametrize("label", ["guard", "judge"])
def test_a_guard_that_is_its_own_truth_is_warned_of(label, write_config, caplog):
    config = config_.load_config(write_config(), [f"evaluation.t2_label={label}", RECORDED])
    process.preflight(config)
    assert ("is the truth that it is measured by, too" in caplog.text) == (label == "guard")


def response(**values) -> dict:
    row = {"decided": True, "error": None, "judge_unsafe": None, "human_unsafe": None}
    return row | {"refusal": "compliance"} | values


NO_WORD = response(decided=None, error="no word")


@pytest.mark.parametrize(
    ("said", "share", "counts"),
    [
        ([response(), response(decided=False)], 0.5, True),
        ([response(decided=False)] * 3 + [response()], 0.25, False),
        ([NO_WORD, response()], 1.0, True),
        ([NO_WORD], None, False),
        ([], None, False),
    ],
)
def test_feedback_is_what_passed_and_whose_responses_did_not(said, share, counts):
    row = {"input_error": None, "input_decided": False, "shadow": False, "responses": said}
    assert records.q(row) == share and records.feedback(row) is counts
    assert not records.feedback(row | {"input_decided": True})
    assert not records.feedback(row | {"input_error": "no word", "input_decided": None})
    assert not records.feedback(row | {"shadow": True})


def test_the_share_of_unsafe_responses_by_judge_and_people():
    row = {"responses": [response(judge_unsafe=0.5), response(judge_unsafe=0.4, human_unsafe=True)]}
    assert records.q(row, "judge") == 0.5 and records.q(row, "human") == 1.0
    assert not records.refused(row)
    assert records.refused({"responses": [response(), response(refusal="partial")]})


def test_the_originals_checks_are_kept_for_its_arm(write_config):
    path = write_config(llama_guard={"legacy_new_tokens": 3}, training={"arms": ["A2", "A4"]})
    _, rows = run(path, RECORDED)
    for row in rows["train"]:
        assert len(row["legacy"]["outputs"]) == len(row["responses"])
    assert any(row["legacy"]["input"] for row in rows["train"])
    assert all(row["legacy"] is None for row in rows["test"])


def test_reasons_hold_what_the_guard_named():
    named = [response(categories=["Self-Harm", "Criminal Planning"])]
    row = {"id": "r", "query": "x", "timestamp": "", "responses": named}
    for key in ("text", "seed", "recorded", "unsafe"):
        named[0][key] = None
    assert process.blocked_row(row)["reason"] == "O3: Criminal Planning, O6: Self-Harm"


# --- stale data -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("llama_guard.default_model_path={judge}", "llama_guard.default_model_path"),
        ("experiment.explore_share=0.9", "experiment.explore_share"),
        ("llama.use_recorded=false", "llama"),
        ("evaluation.judge=", "evaluation.judge"),
        ("evaluation.max_eval_samples=4", "evaluation.max_eval_samples"),
        ("experiment.process_sample_size=12", "experiment.process_sample_size"),
        ("llama_guard.categories=true", "llama_guard.default_model_path"),
    ],
)
def test_who_reads_refuses_what_another_config_left(change, named, write_config, models, caplog):
    """process.py itself makes it anew, and says so."""
    path = write_config()
    run(path, RECORDED)
    config = config_.load_config(path, [RECORDED, change.replace("{judge}", str(models["judge"]))])
    for read in (
        lambda: records.read_processed(config, "test"),
        lambda: records.read_blocked(config),
    ):
        with pytest.raises(UserError, match=rf"another {named}; run process\.py again"):
            read()
    if "sample" in change:
        process.process(config)
        assert f"was made with another {named}: it is made anew" in caplog.text
        records.read_processed(config, "test")


def test_who_reads_refuses_splits_that_were_changed(write_config, tmp_path):
    path = write_config()
    run(path, RECORDED)
    file = tmp_path / "run" / "train.jsonl"
    file.write_text(file.read_text().replace('"label": "safe"', '"label": "unsafe"', 1))
    with pytest.raises(UserError, match=r"another splits' rows; run process\.py again"):
        records.read_processed(config_.load_config(path, [RECORDED]), "train")


@pytest.mark.parametrize("name", ["guard", "judge", "assistant"])
def test_other_weights_are_another_model_and_a_touched_file_is_not(
    name, write_config, models, tmp_path, monkeypatch
):
    field = {"guard": "llama_guard.default_model_path", "judge": "evaluation.judge"}
    field = field.get(name, "llama.model_path")
    copy = Path(shutil.copytree(models[name], tmp_path / "copy"))
    path = write_config(experiment={"process_sample_size": 5}, evaluation={"max_eval_samples": 2})
    config = config_.load_config(path, [f"{field}={copy}"])
    process.process(config)
    weights = copy / "model.safetensors"
    weights.touch()
    records.read_processed(config, "train")
    changed = bytearray(weights.read_bytes())
    changed[len(changed) * 2 // 3] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(UserError, match=r"was made with another .*run process\.py again"):
        records.read_processed(config, "train")


def test_each_stage_has_the_stages_before_it_in_its_key(write_config):
    path = write_config()
    run(path, RECORDED)
    recorded, seeded = (
        config_.load_config(path, [RECORDED, change]) for change in ("seed=42", "seed=1")
    )
    for stage in ("splits", "process", "train", "evaluate"):
        assert records.stage_key(recorded, stage) != records.stage_key(seeded, stage)
    assert records.stage_key(recorded, "train", "A4", 0) != records.stage_key(
        recorded, "train", "A4", 1
    )
    kept = ["training.output_dir=x", "training.save_steps=7", "training.arms=A4"]
    same = config_.load_config(path, [RECORDED, *kept])
    assert records.stage_key(recorded, "train") == records.stage_key(same, "train")


# --- a server that fails --------------------------------------------------------------------------


def refuse():
    """What a server says of a prompt that it always refuses."""
    return 400, {"error": {"message": "not allowed"}}


def test_what_a_server_says_of_a_failure_is_no_check(write_config, tmp_path, serve, caplog):
    """The rest is checked all the same; what failed is collected by nothing, and asked for again."""
    down = {"May I 3?", "May I 55?"}

    def rule(body):
        text = known[tuple(body["prompt"])]
        return refuse() if text in down else completion(f"SAFE {text}")

    server = serve(rule)
    there = ["llama_guard.engine=server", f"llama_guard.server_url={server.url}"]
    config = config_.load_config(write_config(llama_guard={"legacy_new_tokens": 3}), there)
    guard = process.default_guard(config)
    rows = [{"query": f"May I {i}?", "responses": []} for i in range(60)]
    asked = [process.chatml_parts(row["query"]) for row in rows]
    ids = process.encode(guard.tokenizer, asked)
    known = {tuple(one): row["query"] for one, row in zip(ids, rows, strict=True)}
    loaded = process.Loaded(lambda: guard)
    process.check_as_the_original(config, rows, loaded, tmp_path)
    assert "2 of the original's 60 checks failed" in caplog.text and "not allowed" in caplog.text
    for row in rows:
        said = "" if row["query"] in down else f"SAFE {row['query']}"
        assert row["legacy"] == {"input": said, "outputs": []}
    server.bodies.clear()
    again, down = sorted(down), set()
    process.check_as_the_original(config, rows, loaded, tmp_path)
    assert sorted(known[tuple(body["prompt"])] for body in server.bodies) == again
    assert all(row["legacy"]["input"] == f"SAFE {row['query']}" for row in rows)


def test_one_prompt_that_the_assistants_server_refuses_stops_nothing(write_config, serve, caplog):
    bad, refuses = [], True

    def rule(body):
        bad[:] = bad or [body["prompt"]]
        return refuse() if refuses and body["prompt"] == bad[0] else completion("Use two locks.")

    server = serve(rule)
    there = ["llama.engine=server", f"llama.server_url={server.url}", "llama.server_timeout=7"]
    path = write_config()
    _, rows = run(path, *there)
    failed = [r for r in responses(everything(rows)) if "not allowed" in (r["error"] or "")]
    assert len(failed) == 2 < len(responses(everything(rows)))
    assert all(response["unsafe"] is None for response in failed)
    assert "2 of " in caplog.text
    server.bodies.clear()
    refuses = False
    _, rows = run(path, *there)
    assert [body["prompt"] for body in server.bodies] == bad * 2
    assert all(response["text"] for response in responses(everything(rows)))


def test_an_assistants_server_that_refuses_the_key_ends_the_run(write_config, serve):
    """What it answered before is kept."""
    answered = []

    def rule(body):
        answered.append(1)
        if len(answered) < 9:
            return completion("Use two locks.")
        return 401, {"error": {"message": "no"}}

    server = serve(rule)
    there = ["llama.engine=server", f"llama.server_url={server.url}"]
    path = write_config()
    with pytest.raises(UserError, match="the server refused the key"):
        run(path, *there)
    server.rule = lambda body: completion("Use two locks.")
    server.bodies.clear()
    _, rows = run(path, *there)
    said = responses(everything(rows))
    assert len(server.bodies) <= len(said) - 8 and all(r["text"] for r in said)


# --- kill and resume ------------------------------------------------------------------------------


def test_a_second_run_asks_nothing(write_config, tmp_path, monkeypatch):
    path = write_config()
    run(path)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    monkeypatch.setattr(process.Loaded, "get", lambda self: pytest.fail("a model is loaded"))
    run(path)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


PARTS = ["inputs", "answers", "outputs", "judge", "legacy"]


@pytest.mark.parametrize("broken", PARTS)
def test_cut_parts_give_the_same_result(broken, write_config, tmp_path, monkeypatch):
    """As a kill leaves it: half of a part with half a line, and nothing after it."""
    monkeypatch.setattr(process, "JUDGED_AT_ONCE", 16)
    path = write_config(training={"arms": ["A2"]}, llama_guard={"legacy_new_tokens": 3})
    run(path)
    whole = content(tmp_path / "run")
    processed = tmp_path / "run" / "processed"
    part = processed / "parts" / f"{broken}.jsonl"
    rows = part.read_bytes().splitlines(keepends=True)
    half = len(rows) // 2
    part.write_bytes(b"".join(rows[:half]) + rows[half][:20])
    for name in PARTS[PARTS.index(broken) + 1 :]:
        (processed / "parts" / f"{name}.jsonl").unlink()
    for split in config_.SPLITS:
        (processed / f"{split}.jsonl").unlink()
    (processed / "stage.json").unlink()
    run(path)
    assert content(tmp_path / "run") == whole


def test_splits_that_a_kill_cut_are_made_again(write_config, tmp_path):
    config = config_.load_config(write_config())
    records.make_splits(config)
    before = (tmp_path / "run" / "test.jsonl").read_bytes()
    (tmp_path / "run" / "test.jsonl").unlink()
    records.make_splits(config)
    assert (tmp_path / "run" / "test.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_killed_process_goes_on(write_config, tmp_path):
    path, whole = write_config("killed"), write_config("whole")
    (tmp_path / "killed").mkdir()
    command = [sys.executable, "process.py", "--config", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    answers = tmp_path / "killed" / "processed" / "parts" / "answers.jsonl"
    with open(tmp_path / "log", "wb") as log:
        running = scripts.start(command, RECIPE, environment, log.fileno(), log.fileno())
        end = time.time() + 120
        while running.poll() is None and time.time() < end:
            if answers.is_file() and answers.stat().st_size:
                break
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
    words = ["--config", write_config(), "--set", "llama.sample=1"]
    done = launch("feedback_guard", "process.py", *words, check=False)
    assert done.returncode == 2 and done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and last.endswith("field llama.sample: unknown key")
