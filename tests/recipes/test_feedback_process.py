"""examples/feedback_guard: what process.py asks and keeps. Tiny random models."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import completions
import families
import feedback_rows
import pytest
from checks import (
    cases,
    flip_a_bit,
    kill_when_written,
    read_json,
    read_rows,
    user_error,
    write_rows,
)
from completions import completion
from feedback_rows import config_writer, prompts, write
from scripts import EXAMPLES, error_line, launch, module
from transformers import AutoConfig

from common.conversation import Verdict, pair
from common.engines import load_engine
from common.fit import config_positions
from guards import load_guard
from guards.card import GenerativeCard, write_card

# fixtures
serve = completions.serve
models = feedback_rows.models

RECIPE = EXAMPLES / "feedback_guard"
config_ = module("feedback_guard", "config")
records = module("feedback_guard", "records")
process = module("feedback_guard", "process")
train = module("feedback_guard", "train")
evaluate = module("feedback_guard", "evaluate")
formats = module("feedback_guard", "guard")
RECORDED = "llama.use_recorded=true"
Rows = dict[str, list[dict]]  # by split


@pytest.fixture
def write_config(tmp_path, models):
    return config_writer(tmp_path, models)


def run(path: Path, *overrides: str) -> tuple[dict, Rows]:
    """What process.py leaves: statistics, and rows by split."""
    config = config_.load_config(path, overrides)
    stats = process.process(config)
    rows = {}
    for split in config_.SPLITS:
        rows[split] = records.read_processed(config, split)
    return stats, rows


@dataclass
class Done:
    """A run that no test changes: its config file, what it left, and where."""

    path: Path
    stats: dict
    rows: Rows
    folder: Path


def done(folder: Path, models: dict[str, Path], **changes) -> Done:
    path = config_writer(folder, models)(**changes)
    return Done(path, *run(path), folder / "run")


@pytest.fixture(scope="module")
def answered(tmp_path_factory, models) -> Done:
    """The assistant has written the responses."""
    return done(tmp_path_factory.mktemp("answered"), models)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, models) -> Done:
    """The responses are those of the data, so that no assistant is needed."""
    own = {"use_recorded": True, "model_path": "nowhere"}
    return done(tmp_path_factory.mktemp("recorded"), models, llama=own)


def sizes(rows: Rows) -> list[int]:
    """How many rows train, validation and test have."""
    return [len(rows[split]) for split in config_.SPLITS]


def everything(rows: Rows) -> list[dict]:
    """The rows of all splits."""
    return rows["train"] + rows["validation"] + rows["test"]


def responses(rows: list[dict]) -> list[dict]:
    found = []
    for row in rows:
        found += row["responses"]
    return found


def column(rows: list[dict], name: str) -> list:
    return [row[name] for row in rows]


def content(folder: Path) -> dict[str, list[str]]:
    """The files of a store folder without times, and without the order that a kill may change."""
    found = {}
    no_times = {"timestamp": "", "time": ""}
    for path in folder.rglob("*.jsonl"):
        rows = [json.dumps(row | no_times) for row in read_rows(path)]
        if "parts" in path.parts:
            rows.sort()
        name = str(path.relative_to(folder))
        found[name] = rows
    return found


# --- processing -----------------------------------------------------------------------------------


def test_what_is_let_in_is_answered_and_judged(answered):
    rows = answered.rows
    assert sizes(rows) == [51, 9, 20]
    asked = [row for row in everything(rows) if records.passed(row) or row["shadow"]]
    assert 0 < len(asked) < 80
    for row in everything(rows):
        assert len(row["responses"]) == (2 if row in asked else 0)
    said = responses(asked)
    for response in said:
        is_judged = response["text"] != "" and response["error"] is None
        assert (response["unsafe"] is not None) == is_judged
        assert (response["decided"] is not None) == is_judged
        assert response["refusal"] in ("full", "partial", "compliance", "empty", "degenerate")
        assert not response["recorded"]
        assert response["human_unsafe"] is None
    assert set(column(said, "judge_unsafe")) != {None}
    assert len(set(column(said, "text"))) > len(asked)


def test_statistics_and_blocked_inputs_are_the_originals(recorded):
    stats = recorded.stats
    learned = recorded.rows["train"]
    passed = [row for row in learned if records.passed(row)]
    feedback = [row for row in learned if records.feedback(row)]
    share = 100 * len(feedback) / 51
    assert stats["total"] == 51
    assert stats["input_blocked"] == 51 - len(passed)
    assert stats["explored"] == sum(column(learned, "shadow")) > 0
    assert stats["output_blocked"] == len(feedback) > 0
    assert stats["output_blocked_percent"] == pytest.approx(share)
    assert read_json(recorded.folder / "process_stats.json") == stats
    blocked = read_rows(recorded.folder / "blocked_inputs.jsonl")
    assert column(blocked, "id") == column(feedback, "id")
    originals = {"timestamp", "query", "input_safe", "output_safe", "reason"}
    for row in blocked:
        assert row.keys() == originals | {"id", "q", "responses"}
        assert (row["input_safe"], row["output_safe"]) == (True, False)
        assert row["q"] >= 0.5


def test_the_guard_sees_the_prompt_with_each_response(recorded, models):
    row = next(row for row in recorded.rows["test"] if row["responses"])
    (response,) = row["responses"]
    guard = load_guard(str(models["guard"]))
    alone, both = guard.judge([pair(row["query"]), pair(row["query"], response["text"])])
    assert alone.prompt_unsafe == pytest.approx(row["input_unsafe"], abs=1e-5)
    assert both.response_unsafe == pytest.approx(response["unsafe"], abs=1e-5)
    assert both.decided["response_unsafe"] == response["decided"]


def answers_of(rows: Rows) -> dict[str, list[str]]:
    """The texts of the responses by prompt."""
    found = {}
    for row in everything(rows):
        if row["responses"]:
            found[row["query"]] = column(row["responses"], "text")
    return found


def test_answers_do_not_depend_on_how_many_prompts_there_are(answered, write_config, tmp_path):
    """Nor does the truth that they give: each prompt has a seed of its own."""
    last = prompts(20, 60)[13:]
    few = write(tmp_path / "few", train=prompts(25, 10), test=last[::-1])
    own = {"path": str(few), "store_dir": str(tmp_path / "small")}
    _, few_rows = run(write_config("small", dataset=own))
    here = answers_of(few_rows)
    assert len(here) > 10
    assert here.items() <= answers_of(answered.rows).items()


def test_a_server_is_given_a_seed_a_response(write_config, serve):
    server = serve(lambda body: completion("Use two locks."))
    there = behind(server, "llama")
    run(write_config("all"), *there)
    everywhere = asked_of(server)
    seeds = {seed for _, seed in everywhere}
    assert len(seeds) == len(server.bodies) > 20
    server.bodies.clear()
    run(write_config("few"), "experiment.process_sample_size=9", *there)
    assert asked_of(server) < everywhere


def asked_of(server) -> set[tuple]:
    """The prompts and seeds that a server was given."""
    return {(tuple(body["prompt"]), body["seed"]) for body in server.bodies}


def behind(server, section: str) -> list[str]:
    """The changes that put a model of the config behind a server."""
    return [f"{section}.engine=server", f"{section}.server_url={server.url}"]


SMALL = {"experiment": {"process_sample_size": 12}, "evaluation": {"max_eval_samples": 4}}


def test_sampling_sizes_are_honoured_and_others_are_made_anew(write_config, caplog):
    path = write_config(**SMALL)
    _, rows = run(path, RECORDED)
    assert sizes(rows) == [12, 4, 4]
    more, _ = run(path, RECORDED, "experiment.process_sample_size=20")
    assert more["total"] == 20
    named = "experiment.process_sample_size"
    assert f"was made with another {named}: it is made anew" in caplog.text


def test_recorded_responses(recorded):
    known = {row["conv_id"]: row for row in prompts(80)}
    assert responses(everything(recorded.rows))
    for row in everything(recorded.rows):
        for response in row["responses"]:
            assert response["recorded"]
            assert response["seed"] is None
            assert response["text"] == known[row["id"]]["model_output"]
            assert response["human_unsafe"] == known[row["id"]]["output_unsafe"]


def test_people_block_responses(write_config, tmp_path):
    """Their labels are what is learned, and the guard is not asked of responses."""
    data = prompts(80)
    for number, row in enumerate(data):
        row["output_unsafe"] = number % 2 == 0
    learned = data[:60]
    path = write(tmp_path / "labelled", train=learned, test=data[60:])
    config = write_config(
        dataset={"path": str(path)},
        llama={"use_recorded": True},
        evaluation={"t2_label": "human"},
        experiment={"blocked_by": "human"},
    )
    stats, rows = run(config)
    let_in = [row for row in rows["train"] if records.passed(row)]
    unsafe = [row["conv_id"] for row in learned if row["output_unsafe"]]
    blocked = [row_id for row_id in column(let_in, "id") if row_id in unsafe]
    feedback = [row for row in rows["train"] if records.feedback(row)]
    assert column(feedback, "id") == blocked
    assert 0 < stats["output_blocked"] == len(blocked) < len(let_in)
    decisions = column(responses(everything(rows)), "decided")
    assert set(decisions) == {None}


def test_a_prompt_without_a_recorded_response_is_an_error_row(write_config, tmp_path):
    rows = prompts(60)
    for number, row in enumerate(rows[::2]):
        row["model_output"] = None if number % 2 else "  "
    data = write(tmp_path / "some", train=rows, test=prompts(20, 60))
    path = write_config(dataset={"path": str(data)})
    stats, found = run(path, RECORDED)
    said = responses(found["train"])
    empty = [response for response in said if not response["text"]]
    assert 0 < len(empty) < len(said)
    assert stats["errors"] >= len(empty)
    for response in empty:
        assert (response["refusal"], response["unsafe"]) == ("empty", None)
        assert response["error"] == "empty response: nothing to judge"


def test_a_prompt_that_leaves_no_room_is_an_error_row(write_config, models, serve):
    """A server is not asked in vain: it would refuse each response to it, in every run."""
    server = serve(lambda body: refuse())
    window = config_positions(AutoConfig.from_pretrained(models["assistant"]))
    changes = [f"llama.max_tokens={window - 8}", *behind(server, "llama")]
    _, rows = run(write_config(), *changes)
    said = responses(rows["train"])
    assert said
    assert all("longer than the 8 tokens" in response["error"] for response in said)
    assert server.bodies == []


def test_a_response_that_vllm_lacks_is_written_alone(write_config, tmp_path, monkeypatch):
    """Each has a seed of its own. Another engine stands for vLLM's here."""
    config = config_.load_config(write_config(), ["llama.engine=vllm"])
    tokenizer, _ = process.assistant_tokenizer(config.llama.model_path)
    engine = load_engine("transformers", config.llama.model_path, tokenizer=tokenizer)
    monkeypatch.setattr(process, "load_engine", lambda **_: engine)
    complete = engine.complete
    counts = []

    def counted(ids, decoding):
        counts.append(len(ids))
        return complete(ids, decoding)

    monkeypatch.setattr(engine, "complete", counted)
    path = tmp_path / "answers.jsonl"
    nobody = process.Loaded(lambda: None)
    for _ in range(2):
        answers = process.generated(config, ["a b", "c d", "e f"], path, nobody)
        assert [len(said) for said in answers.values()] == [2, 2, 2]
        kept = path.read_text().splitlines(keepends=True)
        path.write_text("".join(kept[:-1]))
    assert counts == [6, 1]


@pytest.mark.parametrize("share", [0, 1])
def test_the_explored_share(share, write_config):
    stats, rows = run(write_config(), f"experiment.explore_share={share}", RECORDED)
    blocked = [row for row in everything(rows) if row["input_decided"]]
    assert blocked
    for row in blocked:
        assert row["shadow"] == bool(row["responses"]) == bool(share)
        assert not records.feedback(row)
    assert stats["over_blocked"] <= stats["explored"]


def test_the_guard_that_is_asked_is_made_first(write_config, models, tmp_path, monkeypatch):
    # a checkpoint holds the arguments, pickled by that name
    monkeypatch.setitem(sys.modules, "train", train)
    data = write(tmp_path / "own", rows=prompts(20, 200))
    made = str(tmp_path / "made")
    guard = {
        "base_model": str(models["guard"]),
        "data": [str(data / "rows.jsonl")],
        "output_dir": made,
        "max_steps": 1,
    }
    own = {"default_model_path": made, "base_model_path": made}
    path = write_config(prepare={"guard": guard}, llama_guard=own, **SMALL)
    stats, _ = run(path, RECORDED)
    assert stats["total"] == 12
    assert load_guard(made).judges == ("prompt_unsafe", "response_unsafe")


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
    for row in rows["train"]:
        assert row["input_error"]
        assert row["responses"] == []
    assert (tmp_path / "run/blocked_inputs.jsonl").read_text() == ""


QUESTION = "How do I pick a lock?"


@pytest.fixture
def ask(write_config, monkeypatch, capsys):
    """`ask(guard)`: what `--query` prints."""

    def asked(guard: str) -> dict:
        path = write_config(llama_guard={"default_model_path": guard})
        words = ["process.py", "--config", str(path), "--query", QUESTION]
        monkeypatch.setattr(sys, "argv", words)
        process.main()
        return json.loads(capsys.readouterr().out)

    return asked


def test_one_query(ask, models):
    guard = str(models["guard"])
    said = ask(guard)
    verdict = load_guard(guard).judge([pair(QUESTION)])[0]
    assert said["query"] == QUESTION
    assert said["error"] is None
    assert said["safe"] is (verdict.prompt_unsafe < 0.5)


def test_a_query_that_the_guard_cannot_judge_is_not_safe(ask, mute):
    said = ask(mute)
    assert said["safe"] is False
    assert said["error"]


@pytest.mark.parametrize(("label", "is_warned"), [("guard", True), ("judge", False)])
def test_a_guard_that_is_its_own_truth_is_warned_of(label, is_warned, write_config, caplog):
    config = config_.load_config(write_config(), [f"evaluation.t2_label={label}", RECORDED])
    process.preflight(config)
    assert (records.say_own_truth(config) is not None) == is_warned  # what the results say, too
    assert ("is the truth that it is measured by, too" in caplog.text) == is_warned


def response(**values) -> dict:
    made = {
        "text": "",
        "seed": None,
        "recorded": False,
        "unsafe": None,
        "decided": True,
        "error": None,
        "judge_unsafe": None,
        "judge_decided": None,
        "human_unsafe": None,
        "refusal": "compliance",
    }
    return made | values


UNSAFE = response()
SAFE = response(decided=False)
NO_WORD = response(decided=None, error="no word")


@cases(
    "said, share, counts",
    {
        "half is unsafe": ([UNSAFE, SAFE], 0.5, True),
        "less than half is unsafe": ([SAFE, SAFE, SAFE, UNSAFE], 0.25, False),
        "an error counts for nothing": ([NO_WORD, UNSAFE], 1.0, True),
        "errors alone": ([NO_WORD], None, False),
        "no response": ([], None, False),
    },
)
def test_feedback_is_what_passed_and_whose_responses_did_not(said, share, counts):
    row = {"input_error": None, "input_decided": False, "shadow": False, "responses": said}
    assert records.q(row) == share
    assert records.feedback(row) is counts
    assert not records.feedback(row | {"input_decided": True})
    assert not records.feedback(row | {"input_error": "no word", "input_decided": None})
    assert not records.feedback(row | {"shadow": True})


def test_the_share_of_unsafe_responses_by_judge_and_people():
    other = response(judge_decided=False, human_unsafe=True)
    row = {"responses": [response(judge_decided=True), other]}
    assert records.q(row, "judge") == 0.5
    assert records.q(row, "human") == 1.0


@cases(
    "score, decided, unsafe",
    {
        "one half": (0.5, {}, True),
        "less than half": (0.49, {}, False),
        "its own word": (0.5, {"response_unsafe": False}, False),
    },
)
def test_one_half_is_unsafe_of_the_guard(score, decided, unsafe):
    verdict = Verdict(response_unsafe=score, decided=decided)
    said = response(decided=formats.verdict_row(verdict, "response_unsafe")["decided"])
    assert records.word_on(said, "guard") is unsafe


@cases(
    "score, word, threshold, unsafe",
    {
        "above its threshold": (0.3, None, 0.2, True),
        "below its threshold": (0.6, None, 0.7, False),
        "threshold before word": (0.3, False, 0.2, True),
        "a word without a score": (None, True, None, True),
        "no threshold, no word": (0.6, None, None, True),
    },
)
def test_a_judge_decides_as_it_does_everywhere_else(score, word, threshold, unsafe):
    decided = {} if word is None else {"response_unsafe": word}
    thresholds = {} if threshold is None else {"flagged": {"value": threshold}}
    verdict = Verdict(response_unsafe=score, decided=decided)
    row = formats.verdict_row(verdict, "response_unsafe", thresholds)
    assert row["error"] is None
    assert records.word_on(response(judge_decided=row["decided"]), "judge") is unsafe


def test_a_judge_that_says_nothing_is_an_error():
    row = formats.verdict_row(Verdict(prompt_unsafe=0.5), "response_unsafe", {})
    assert row["error"] == "the guard does not judge response_unsafe"


def test_one_refusal_refuses_a_prompt():
    for refusal in ("compliance", "partial", "full"):
        row = {"responses": [response(), response(refusal=refusal)]}
        assert records.refused(row) is (refusal != "compliance")


LEGACY = {"training": {"arms": ["A2"]}, "llama_guard": {"legacy_new_tokens": 3}}


def test_the_originals_checks_are_kept_for_its_arm(write_config):
    path = write_config(**SMALL, **LEGACY)
    _, rows = run(path, RECORDED)
    said = set()
    for row in rows["train"]:
        legacy = row["legacy"]
        assert len(legacy["outputs"]) == len(row["responses"])
        said.add(legacy["input"])
    assert said != {""}
    assert column(rows["test"], "legacy") == [None] * 4


def test_reasons_hold_what_the_guard_named():
    named = response(categories=["Self-Harm", "Own Rule", "Criminal Planning"])
    row = {"id": "r", "query": "x", "timestamp": "", "responses": [named]}
    reason = process.blocked_row(row)["reason"]
    assert reason == "O3: Criminal Planning, O6: Self-Harm, Own Rule"


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
def test_who_reads_refuses_what_another_config_left(change, named, recorded, models):
    change = change.format(judge=models["judge"])
    config = config_.load_config(recorded.path, [change])
    said = rf"another {named}; run process\.py again"
    with user_error(said):
        records.read_processed(config, "test")


def test_who_reads_refuses_splits_that_were_changed(write_config, tmp_path):
    path = write_config()
    run(path, RECORDED)
    file = tmp_path / "run/train.jsonl"
    file.write_text(file.read_text().replace('"label": "safe"', '"label": "unsafe"', 1))
    with user_error(r"another splits' rows; run process\.py again"):
        records.read_processed(config_.load_config(path, [RECORDED]), "train")


def test_other_weights_are_another_model_and_a_touched_file_is_not(write_config, models, tmp_path):
    fields = {
        "guard": "llama_guard.default_model_path",
        "judge": "evaluation.judge",
        "assistant": "llama.model_path",
    }
    copies = {name: shutil.copytree(models[name], tmp_path / name) for name in fields}
    changes = [f"{field}={copies[name]}" for name, field in fields.items()]
    config = config_.load_config(write_config(**SMALL), changes)
    process.process(config)
    for copy in copies.values():
        weights = copy / "model.safetensors"
        weights.touch()
        records.read_processed(config, "train")
        flip_a_bit(weights)
        with user_error(r"was made with another .*run process\.py again"):
            records.read_processed(config, "train")
        flip_a_bit(weights)


@pytest.mark.parametrize("stage", ["splits", "process", "train"])
def test_each_stage_has_the_stages_before_it_in_its_key(stage, recorded):
    one = config_.load_config(recorded.path, ["seed=42"])
    other = config_.load_config(recorded.path, ["seed=1"])
    assert records.stage_key(one, stage) != records.stage_key(other, stage)


def test_an_arm_and_its_seed_are_in_its_key_and_where_it_lies_is_not(recorded):
    config = config_.load_config(recorded.path)
    one = records.stage_key(config, "train", "A4", 0)
    other_seed = records.stage_key(config, "train", "A4", 1)
    other_arm = records.stage_key(config, "train", "A8", 0)
    assert len({one, other_seed, other_arm}) == 3
    no_matter = ["training.output_dir=x", "training.save_steps=7", "training.arms=A4"]
    same = config_.load_config(recorded.path, [*no_matter])
    assert records.stage_key(config, "train") == records.stage_key(same, "train")


@pytest.mark.parametrize("change", ["evaluation.max_eval_samples=4", "evaluation.judge="])
def test_what_tests_an_arm_is_not_in_its_key(change, recorded):
    """Else more test prompts, or another judge of them, would make all that is trained unusable."""
    one = config_.load_config(recorded.path)
    other = config_.load_config(recorded.path, [change])
    assert records.stage_key(one, "process") != records.stage_key(other, "process")
    assert records.stage_key(one, "train") == records.stage_key(other, "train")
    blocks = "experiment.blocked_by=judge"
    one = config_.load_config(recorded.path, [blocks])
    other = config_.load_config(recorded.path, [blocks, f"evaluation.judge={one.llama.model_path}"])
    assert records.stage_key(one, "train") != records.stage_key(other, "train")


@cases(
    "steps, seeds, is_same",
    {
        "by epochs over the rows of another seed": (-1, "3,0", False),
        "by epochs, with more seeds": (-1, "0,3", True),
        "so many steps": (5, "3,0", True),
    },
)
def test_the_seed_that_steps_are_counted_by_is_in_the_key_of_an_arm(
    steps, seeds, is_same, recorded
):
    keys = set()
    for some in ("0", seeds):
        changes = [f"training.max_steps={steps}", f"training.seeds={some}"]
        config = config_.load_config(recorded.path, changes)
        keys.add(records.stage_key(config, "train", "A4", 0))
    assert (len(keys) == 1) == is_same


def test_the_judges_word_is_no_part_of_the_rows_that_arms_learn_from(tmp_path):
    path = tmp_path / "train.jsonl"
    keys = []
    for decided in (True, False):
        write_rows(path, [{"responses": [response(judge_decided=decided)], "timestamp": decided}])
        keys.append((records.content_of(path), records.content_of(path, with_judge=False)))
    assert keys[0][0] != keys[1][0]
    assert keys[0][1] == keys[1][1]


IDENTITIES = {
    "assistant": ("llama", lambda config: records.assistant_identity(config)),
    "guard": ("llama_guard", lambda config: records.default_identity(config)),
    "guard's scores": (
        "llama_guard",
        lambda config: evaluate.identity_of(evaluate.Judged("A0"), config),
    ),
}


@cases("section, identity", IDENTITIES)
@pytest.mark.parametrize("change", ["server_url=http://other:1/v1", "server_timeout=300"])
def test_where_a_server_listens_is_no_part_of_its_answers(section, identity, change, recorded):
    served = []
    for value in ("engine=server", "server_url=http://one:1/v1", "server_model=chat"):
        served.append(f"{section}.{value}")
    one = config_.load_config(recorded.path, served)
    other = config_.load_config(recorded.path, [*served, f"{section}.{change}"])
    assert identity(one) == identity(other)
    third = config_.load_config(recorded.path, [*served, f"{section}.server_model=another"])
    assert identity(one) != identity(third)


def test_a_config_beside_the_data_hides_no_changed_label(write_config, tmp_path):
    """With a file of a model's name in it, a folder's rows did not count."""
    rows = [{"user_input": f"Question {i}?", "toxicity": i % 2} for i in range(40)]
    for split in ("train", "test"):
        write_rows(tmp_path / "own" / f"{split}.jsonl", rows)
    (tmp_path / "own/research_config.json").write_text("{}")
    config = config_.load_config(write_config(), [f"dataset.path={tmp_path / 'own'}"])
    before = records.stage_key(config, "splits")
    rows[0]["toxicity"] = 1
    write_rows(tmp_path / "own/train.jsonl", rows)
    assert records.stage_key(config, "splits") != before


# --- a server that fails --------------------------------------------------------------------------


def refuse():
    """What a server says of a prompt that it always refuses."""
    return 400, {"error": {"message": "not allowed"}}


def test_what_a_server_says_of_a_failure_is_no_check(write_config, tmp_path, serve, caplog):
    """The rest is checked all the same; what failed is collected by nothing, and asked for again."""
    server = serve(lambda body: refuse() if body["prompt"] == bad else completion("SAFE"))
    config = config_.load_config(write_config(**LEGACY), behind(server, "llama_guard"))
    guard = process.default_guard(config)
    rows = [{"query": f"May I {i}?", "responses": []} for i in range(6)]
    (bad,) = formats.query_ids(guard, "chatml", [rows[3]["query"]])

    def said() -> list[str]:
        server.bodies.clear()
        process.check_as_the_original(config, rows, process.Loaded(lambda: guard), tmp_path)
        return [row["legacy"]["input"] for row in rows]

    assert said() == ["SAFE", "SAFE", "SAFE", "", "SAFE", "SAFE"]
    assert "1 of 6 of the original's checks failed" in caplog.text
    assert "not allowed" in caplog.text
    server.rule = lambda body: completion("SAFE")
    assert said() == ["SAFE"] * 6
    assert column(server.bodies, "prompt") == [bad]


def test_what_is_too_long_for_the_originals_checks_is_no_safe(write_config, tmp_path, serve):
    """The original calls unsafe what does not begin with SAFE, and so collects the prompt."""
    server = serve(lambda body: completion("SAFE"))
    config = config_.load_config(write_config(**LEGACY), behind(server, "llama_guard"))
    guard = process.default_guard(config)
    question = "May I?"
    (ids,) = formats.query_ids(guard, "chatml", [question])
    guard.max_length = len(ids) + config.llama_guard.legacy_new_tokens
    row = {"id": "r", "query": question, "responses": [response(text="No, never do that.")]}
    process.check_as_the_original(config, [row], process.Loaded(lambda: guard), tmp_path)
    assert row["legacy"] == {"input": "SAFE", "outputs": [""]}
    assert column(server.bodies, "prompt") == [ids]
    assert train.legacy_blocked([row]) == {"r": formats.UNCLASSIFIED}


def test_one_prompt_that_the_assistants_server_refuses_stops_nothing(write_config, serve, caplog):
    bad = []

    def rule(body):
        if not bad:
            bad.append(body["prompt"])
        if body["prompt"] == bad[0]:
            return refuse()
        return completion("Use two locks.")

    server = serve(rule)
    there = [*behind(server, "llama"), "llama.server_timeout=7"]
    path = write_config()
    _, rows = run(path, *there)
    said = responses(everything(rows))
    failed = [response for response in said if "not allowed" in str(response["error"])]
    assert len(failed) == 2 < len(said)
    assert column(failed, "unsafe") == [None, None]
    assert f"2 of {len(said)} responses failed" in caplog.text
    server.bodies.clear()
    server.rule = lambda body: completion("Use two locks.")
    _, rows = run(path, *there)
    assert column(server.bodies, "prompt") == bad * 2
    assert all(column(responses(everything(rows)), "text"))


def test_an_assistants_server_that_refuses_the_key_ends_the_run(write_config, serve):
    """What it answered before is kept."""
    answered = []

    def rule(body):
        answered.append(1)
        if len(answered) < 9:
            return completion("Use two locks.")
        return 401, {"error": {"message": "no"}}

    server = serve(rule)
    there = behind(server, "llama")
    path = write_config()
    with user_error("the server refused the key"):
        run(path, *there)
    server.rule = lambda body: completion("Use two locks.")
    server.bodies.clear()
    _, rows = run(path, *there)
    said = responses(everything(rows))
    assert len(server.bodies) <= len(said) - 8
    assert all(column(said, "text"))


# --- kill and resume ------------------------------------------------------------------------------


def test_a_second_run_asks_nothing(answered, monkeypatch):
    before = files_of(answered.folder)

    def load(self):
        pytest.fail("a model is loaded")

    monkeypatch.setattr(process.Loaded, "get", load)
    run(answered.path)
    assert files_of(answered.folder) == before


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


PARTS = ["inputs", "answers", "outputs", "judge", "legacy"]


def test_cut_parts_give_the_same_result(write_config, tmp_path, monkeypatch):
    """As a kill leaves it: half of a part with half a line, and nothing after it."""
    monkeypatch.setattr(process, "JUDGED_AT_ONCE", 8)
    path = write_config(**SMALL, **LEGACY)
    run(path)
    whole = content(tmp_path / "run")
    processed = tmp_path / "run/processed"
    for place, broken in enumerate(PARTS):
        part = processed / f"parts/{broken}.jsonl"
        rows = part.read_bytes().splitlines(keepends=True)
        half = len(rows) // 2
        part.write_bytes(b"".join(rows[:half]) + rows[half][:20])
        for later in PARTS[place + 1 :]:
            (processed / f"parts/{later}.jsonl").unlink()
        for split in config_.SPLITS:
            (processed / f"{split}.jsonl").unlink()
        (processed / "stage.json").unlink()
        run(path)
        assert content(tmp_path / "run") == whole, broken


def test_splits_that_a_kill_cut_are_made_again(write_config, tmp_path):
    config = config_.load_config(write_config())
    records.make_splits(config)
    test = tmp_path / "run/test.jsonl"
    before = test.read_bytes()
    test.unlink()
    records.make_splits(config)
    assert test.read_bytes() == before


@pytest.mark.slow
def test_a_killed_process_goes_on(answered, write_config, tmp_path):
    path = write_config("killed")
    command = ["process.py", "--config", path]
    answers = tmp_path / "killed/processed/parts/answers.jsonl"
    kill_when_written(answers, command, RECIPE)
    said = launch("feedback_guard", *command, threads=1)
    assert content(tmp_path / "killed") == content(answered.folder)
    assert json.loads(said.stdout)["total"] == 51


@pytest.mark.slow
def test_an_error_of_the_user_is_one_line(write_config):
    words = ["--config", write_config(), "--set", "llama.sample=1"]
    done = launch("feedback_guard", "process.py", *words, check=False)
    assert done.stdout == ""
    assert error_line(done).endswith("field llama.sample: unknown key")
