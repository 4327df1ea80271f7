"""examples/feedback_guard: kept scores, what may be evaluated, a run from end to end."""

import json
import re
from pathlib import Path

import completions
import numpy as np
import pytest
from completions import completion
from feedback_rows import config_writer, prompts, save_models, write
from scripts import launch, module

from common.conversation import UserError
from guards import zoo
from guards.card import GenerativeCard, write_card
from guards.suite.benchmarks import benchmarks

compare = module("feedback_guard", "compare")
results = module("feedback_guard", "results")
config_of = module("feedback_guard", "config")
scores = module("feedback_guard", "scores")
records = module("feedback_guard", "records")
shared_base = module("feedback_guard", "shared_base")
evaluate = module("feedback_guard", "evaluate")
serve = completions.serve


# --- a run ------------------------------------------------------------------------------------------------------------

ARMS = ["A2", "A2-parser", "A2-format", "A8", "C1", "C4"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def config_file(models, tmp_path):
    """Recorded responses, two training steps, few draws."""
    return config_writer(tmp_path, models)(
        "run",
        llama={"use_recorded": True},
        llama_guard={"legacy_new_tokens": 3},
        training={
            **{
                "arms": ARMS,
                "seeds": [0],
                "headline": {"arms": ["A8"], "seeds": [0, 1]},
                "max_steps": 2,
            },
            **{
                "batch_size": 4,
                "gradient_accumulation_steps": 1,
                "output_dir": str(tmp_path / "models"),
            },
        },
        evaluation={
            "judge": "",
            "t2_label": "human",
            "draws": 200,
            "results_dir": str(tmp_path / "results"),
        },
        experiment={"results_dir": str(tmp_path / "experiment")},
    )


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scoring_goes_on_where_it_was(config_file, tmp_path):
    config = config_of.load_config(config_file)
    items = [
        scores.Item(f"test/{i}", "test", f"How do I keep my bicycle clean {i}?") for i in range(9)
    ]
    line, path = scores.Line("A0"), tmp_path / "scores" / "A0.jsonl"
    whole = scores.score(line, items, config, tmp_path / "scores")
    kept = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept[:5]) + kept[5][:20])  # a kill in the middle of a line
    again = scores.score(line, items, config, tmp_path / "scores")
    assert list(again) == list(whole) and len(lines_of(path)) == 9
    assert [a.score for a in again.values()] == pytest.approx(
        [a.score for a in whole.values()], abs=1e-5
    )
    before = path.read_bytes()
    scores.score(line, items[::-1], config, tmp_path / "scores")
    assert path.read_bytes() == before
    changed = [scores.Item(item.id, item.split, item.text + "!") for item in items[:1]]
    scores.score(line, changed, config, tmp_path / "scores")
    assert len(lines_of(path)) == 10  # the same id, another prompt


def test_what_is_missing_is_named(config_file):
    config = config_of.load_config(config_file)
    with pytest.raises(UserError, match=r"run process\.py"):
        evaluate.evaluate(config)
    with pytest.raises(UserError, match=r"nothing is trained there; run train\.py"):
        scores.find_lines(config)
    with pytest.raises(UserError, match=r"has no guard\.json"):
        scores.find_lines(
            config_of.load_config(config_file, ["evaluation.improved_model_path=nowhere"])
        )


def card(config, name, seed, arm=None):
    """A folder that says it holds a trained arm."""
    folder = Path(config.training.output_dir) / name / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    base = config.llama_guard.base_model_path
    origin = {"arm": arm or name, "seed": seed, "base_model": base}
    write_card(folder, GenerativeCard(guard="llama-guard", max_length=512, **origin))
    return folder


def test_only_what_the_config_names_is_evaluated(config_file, caplog):
    config = config_of.load_config(
        config_file, ["training.arms=A2,A2-parser,A8", "training.headline.seeds=0,1"]
    )
    for name, seed in (("A2", 0), ("A8", 0), ("A8", 1), ("A8", 7), ("A3", 0)):
        card(config, name, seed)
    lines, missing = scores.find_lines(config)
    assert [line.name for line in lines] == [
        "A0",
        "A0-legacy",
        "A2-seed0",
        "A2-parser-seed0",
        "A8-seed0",
        "A8-seed1",
    ]
    assert (
        missing == []
        and "A3/seed0" in caplog.text
        and "A8/seed7" in caplog.text
        and "left out" in caplog.text
    )
    card(config, "A8", 1, arm="A4")
    with pytest.raises(UserError, match="says that it is A4-seed1; remove the folder"):
        scores.find_lines(config)


def test_data_of_other_settings_are_not_evaluated(config_file):
    config = config_of.load_config(config_file)
    records.make_splits(config)
    path = records.processed_path(config, "settings").with_suffix(".json")
    path.parent.mkdir()
    path.write_text('{"seed": 7}')
    with pytest.raises(UserError, match="was made with another seed"):
        evaluate.evaluate(config)
    assert path.read_text() == '{"seed": 7}'
    with pytest.raises(UserError, match="splits of other data, seed or ratios"):
        evaluate.evaluate(config_of.load_config(config_file, ["seed=1"]))


def test_arms_on_a_quantized_base_are_scored_on_it(config_file, monkeypatch):
    asked = []

    def load(path, official, **options):
        asked.append(options)
        return type(
            "Guard", (), {"model": type("M", (), {"model": type("L", (), {"config": Config})})}
        )

    Config = type("C", (), {"_attn_implementation": "eager"})
    monkeypatch.setattr(scores, "load_llama_guard", load)
    config = config_of.load_config(
        config_file, ["llama_guard.load_in_4bit=true", "llama_guard.engine=vllm"]
    )
    folder, probe = card(config, "A8", 0), card(config, "C4", 0)
    (probe / "probe.json").write_text("{}")
    lines = [scores.Line("A0"), scores.Line("A8", 0, folder), scores.Line("C4", 0, probe)]
    for line in lines:
        scores.load(line, config)
    assert "load_in_4bit" not in asked[0] and asked[1]["load_in_4bit"] and asked[2]["load_in_4bit"]
    # vLLM does not quantize so
    assert [one.get("engine") for one in asked] == ["vllm", "transformers", None]
    plain = config_of.load_config(config_file)
    same = [scores._identity(line, config) == scores._identity(line, plain) for line in lines]
    assert same == [True, False, False]


def test_what_a_failing_server_says_is_no_answer(config_file, tmp_path, serve):
    config = config_of.load_config(config_file)
    refused = {"bad": True}

    def rule(body):
        if refused["bad"] and body["prompt"] == prompts[1]:
            return 400, {"error": {"message": "not allowed"}}
        return completion("SAFE")

    server = serve(rule)
    there = ["llama_guard.engine=server", f"llama_guard.server_url={server.url}"]
    served = config_of.load_config(config_file, there)
    line = scores.Line("A0-legacy", query="chatml", parser="strict")
    texts = [f"How do I keep my bicycle clean {i}?" for i in range(2)]
    items = [scores.Item(f"test/{i}", "test", text) for i, text in enumerate(texts)]
    prompts = scores.query_ids(scores.load(scores.Line("A0"), config), "chatml", texts)
    first = list(scores.score(line, items, served, tmp_path / "scores").values())
    assert [answer.decided for answer in first] == [False, True]
    assert first[0].error is None and "not allowed" in first[1].error
    assert [row["text"] for row in lines_of(tmp_path / "scores" / "A0-legacy.jsonl")] == ["SAFE"]
    refused["bad"] = False
    again = scores.score(line, items, served, tmp_path / "scores")  # the one that failed alone
    assert [(a.decided, a.error) for a in again.values()] == [(False, None)] * 2
    assert [server.asked(prompt) for prompt in prompts] == [1, 2]


def test_one_model_at_a_time(config_file, tmp_path, monkeypatch):
    """The base that arms share is given back before a guard of another kind is loaded, and loaded
    again on demand.
    """
    config = config_of.load_config(config_file)
    items, base = [scores.Item("test/0", "test", "How?")], shared_base.SharedBase(config, [])
    held, verdict = [], {"score": 0.1, "decided": False, "error": None}

    def served(line):
        base.guard = base.guard or (object() if line.arm == "A8" else None)
        return line.arm == "A8"

    monkeypatch.setattr(base, "serves", served)
    monkeypatch.setattr(scores, "_raw", lambda line, guard, texts, config: [verdict])
    monkeypatch.setattr(base, "said", lambda line, texts: [verdict])
    monkeypatch.setattr(scores, "load", lambda line, config: held.append(base.guard) or object())
    for name in ("A8", "C4", "A8"):
        scores.score(
            scores.Line(name, 0, card(config, name, 0)),
            items,
            config,
            tmp_path / name / f"{len(held)}",
            base,
        )
    assert held == [None] and base.guard is not None


def test_the_originals_config_has_another_family_for_the_truth():
    """The guard must not label the rows to train on and be the truth as well."""
    config = config_of.load_config(Path(scores.__file__).with_name("research_config.json"))
    judge, settings = zoo()[config.evaluation.judge], config.evaluation
    assert (
        settings.t2_label == "judge"
        and judge["kind"] == "generative"
        and "llama" not in judge["model"].lower()
    )
    assert len(judge["questions"]) == 1 and judge["questions"][0]["label"] in (
        "last",
        "response_unsafe",
    )
    assert "variants" not in judge and "anchor" not in judge["questions"][0]
    assert benchmarks()[settings.hard_benign]["hub"] == "Paul/XSTest"


# --- data -------------------------------------------------------------------------------------------------------------


def test_a_folders_own_validation_split_shares_nothing_with_train(config_file, tmp_path):
    rows = prompts(30)
    twice = [
        row | {"conv_id": f"x{i}", "user_input": row["user_input"].upper() + "!"}
        for i, row in enumerate(rows[:3])
    ]
    data = write(
        tmp_path / "own", train=rows, validation=[*prompts(10, 30), *twice], test=prompts(10, 40)
    )
    config = config_of.load_config(
        config_file, [f"dataset.path={data}", f"dataset.store_dir={tmp_path / 'apart'}"]
    )
    records.make_splits(config)
    parts = {split: records.read_split(config, split) for split in config_of.SPLITS}
    assert {split: len(part) for split, part in parts.items()} == {
        "train": 27,
        "validation": 13,
        "test": 10,
    }
    keys = {
        split: {records.text_key(row["input"]) for row in part} for split, part in parts.items()
    }
    assert not keys["train"] & keys["validation"]
    left_out = json.loads((tmp_path / "apart" / "splits.json").read_text())["left_out"]
    assert left_out == {"also in validation": 3}


def test_prompts_of_other_data_that_were_seen_are_left_out(config_file, tmp_path):
    """Those of train, validation and the head start; the others' predictions are kept, one row a
    prompt.
    """
    known = write(tmp_path / "guard", rows=prompts(1, 90)) / "rows.jsonl"
    config = config_of.load_config(config_file, [f"dataset.guard_path={known}"])
    records.make_splits(config)
    seen = [
        records.read_split(config, split)[0]["input"].upper() for split in ("train", "validation")
    ]
    seen.append(prompts(1, 90)[0]["user_input"])
    fresh = ["Is rain wet?", "Is rain bad?", "Is rain dry?"]
    asked = [
        {"prompt": text, "prompt_label": ("safe", "unsafe")[text.endswith("bad?")]}
        for text in [*seen[:2], *fresh, seen[2]]
    ]
    spec = str(write(tmp_path / "more", rows=asked) / "rows.jsonl")
    config = config_of.load_config(config_file, [
        *(f"dataset.guard_path={known}", f"evaluation.hard_benign={spec}", f"evaluation.extra={spec}"),
    ])  # fmt: skip
    row = {
        "id": "1",
        "query": "May I?",
        "human_unsafe": True,
        "input_error": None,
        "input_decided": False,
        "kind": "x",
    }
    row |= {
        "responses": [{"decided": True, "error": None, "judge_unsafe": None, "human_unsafe": True}],
        "shadow": False,
    }
    rows = {split: [row] for split in evaluate.SPLITS}
    tasks, items = evaluate.read_tasks(config, rows)
    assert tasks["T3"].facts["seen_before"] == tasks[spec].facts["seen_before"] == 3
    asked_once = [fresh[0], fresh[2], fresh[1]]  # though the first two are in both
    assert [item.text for item in items] == ["May I?", "May I?", *asked_once]
    assert tasks["T3"].test.ids == [f"{spec}#2", f"{spec}#4"]
    assert dict(zip(tasks[spec].test.ids, tasks[spec].test.truth, strict=True)) == {
        **{f"{spec}#2": False, f"{spec}#3": True, f"{spec}#4": False}
    }
    answers = {"A0": {item.id: scores.Answer(0.7, item.text == fresh[0], None) for item in items}}
    kept = evaluate.predicted(rows, tasks, items, answers, "human")
    assert [(r["id"], r["split"], r["human_unsafe"], r["passed"]) for r in kept] == [
        ("1", "validation", True, True),
        ("1", "test", True, True),
        (f"{spec}#2", spec, False, False),
        (f"{spec}#4", spec, False, True),
        (f"{spec}#3", spec, True, True),
    ]
    assert [r["outcome_unsafe"] for r in kept] == [True, True, None, None, None]
    assert all(r["guards"]["A0"]["score"] == 0.7 for r in kept)
    cell = {"intervals": {}}
    text = results._task("T3", tasks["T3"].facts | {"arms": {"A0": cell}})
    assert "3 that are in train, validation or the guard's own data left out" in text
    with pytest.raises(UserError, match="hold every prompt of it; take it out"):
        evaluate.foreign(spec, {records.text_key(text) for text in [*seen, *fresh]})


def test_the_truth_of_t2():
    def row(*unsafe, judge=None, decided=False):
        responses = [
            {"decided": u, "error": None, "judge_unsafe": judge, "human_unsafe": None}
            for u in unsafe
        ]
        known = {"id": "1", "input_error": None, "input_decided": decided, "responses": responses}
        return known | {"query": "x", "human_unsafe": False}

    rows = [row(True, False), row(True, False, False), row(True, decided=True), row()]
    assert [truth for _, truth in evaluate.outcome(rows, "guard")] == [
        True,
        False,
    ]  # half counts; blocked and empty: no
    assert evaluate.outcome(rows, "human") == [] == evaluate.outcome(rows, "judge")
    assert [truth for _, truth in evaluate.outcome([row(False, judge=0.9)], "judge")] == [True]


def test_a_task_without_prompts_is_no_number(config_file):
    """A guard that passes nothing leaves no T2, and one that was not asked leaves no draws."""
    config = config_of.load_config(config_file, ["evaluation.draws=20"])
    parts = {
        "T1": compare.Part(["0", "1"], np.array([True, False]), ["0", "1"]),
        "T2": compare.Part([], np.array([], dtype=bool), []),
    }
    tasks = {name: evaluate.Task(name, one, one, {}) for name, one in parts.items()}
    answers = {
        name: {str(i): scores.Answer(0.6 - i / 5, i == 0, None) for i in range(2)}
        for name in ("A0", "A8")
    }
    arms = {"A0": ["A0"], "A1": ["A0"], "A8": ["A8"]}
    measured = evaluate.measure(config, tasks, arms, answers) | {"improved": "A8"}
    cell = measured["tasks"]["T2"]["arms"]["A8"]
    assert cell.get("auprc") is None and cell["unparsed"] is None and measured["block_rate"] is None
    assert measured["tasks"]["T1"]["arms"]["A8"]["auprc"] == 1
    told = evaluate.against(config, tasks, arms, answers, measured)
    json.dumps(told, allow_nan=False)
    assert told["mcnemar"] == [] and told["holm"] == {"auprc": None, "fpr_at_recall": None}


@pytest.mark.slow
def test_the_whole_experiment(config_file, tmp_path):
    """process, train and evaluate as processes of their own; then evaluate alone, cut short and by
    folder.
    """
    script = ("run_experiment.sh", "full", config_file, "--set", "seed=42")
    launch("feedback_guard", *script, launcher=("bash",), threads=1)
    folder = tmp_path / "results"
    (path,) = (tmp_path / "experiment").glob("experiment_results_*.json")
    found = json.loads(path.read_text())
    assert set(found) == {"process_stats", "improved_model_path", "evaluation"}
    assert {"total", "input_blocked", "output_blocked", "both_safe"} <= set(found["process_stats"])
    assert found["improved_model_path"] == str(tmp_path / "models" / "A8")
    assert set(found["evaluation"]) == {"default_model", "improved_model", "improvement"}
    (path,) = folder.glob("evaluation_results_*.json")
    original, whole = (
        json.loads(path.read_text()),
        json.loads((folder / "results.json").read_text()),
    )
    for model in ("default_model", "improved_model"):
        assert set(original[model]["metrics"]) >= {"accuracy", "precision", "recall", "f1"}
        counts = [
            original[model][f"{a}_{b}s"]
            for a in ("true", "false")
            for b in ("positive", "negative")
        ]
        assert sum(counts) == len(original[model]["predictions"]) == 20
        assert set(original[model]["predictions"][0]) == {
            "input",
            "true_label",
            "predicted_label",
            "reason",
        }
    assert set(original["improvement"]) >= {"accuracy", "precision", "recall", "f1"}

    t1 = whole["tasks"]["T1"]["arms"]
    assert list(t1) == ["always unsafe", "A0", "A1", "A0-legacy", *ARMS]
    assert (
        t1["always unsafe"]["precision"]
        == pytest.approx(whole["tasks"]["T1"]["base_rate"])
        == 4 / 20
    )
    assert t1["A1"]["auprc"] == t1["A0"]["auprc"] and set(t1["A8"]["seeds"]) == {
        "A8-seed0",
        "A8-seed1",
    }
    assert whole["verdict"]["verdict"] in ("does not help", "undecided: C2 not measured")
    # of a guard that knows no capitals, the strict parser lets nothing through
    assert t1["A2"]["recall"] == 1
    text = (tmp_path / "experiment" / "results.md").read_text()
    assert "**Verdict on A8:" in text and "taken away one after another" in text
    assert (
        len(lines_of(folder / "predictions.jsonl"))
        == whole["tasks"]["T1"]["rows"] + whole["tasks"]["T1"]["validation_rows"]
    )
    (picture,) = re.findall(r"!\[.*\]\((.*)\)", text)
    assert (tmp_path / "experiment" / picture).stat().st_size > 5000
    kept = {path.stem: lines_of(path) for path in (folder / "scores").iterdir()}
    assert set(kept) == {
        "A0",
        "A0-legacy",
        "A2-seed0",
        "A2-format-seed0",
        "A8-seed0",
        "A8-seed1",
        "C1-seed0",
        "C4-seed0",
    }

    (folder / "scores" / "A8-seed1.jsonl").write_text("")  # it alone is judged again
    before = {path: path.read_bytes() for path in (folder / "scores").iterdir()}
    launch("feedback_guard", "evaluate.py", "--config", config_file, threads=1)
    again = json.loads((folder / "results.json").read_text())
    assert {path.stem for path in before if path.read_bytes() != before[path]} == {"A8-seed1"}
    assert again["tasks"]["T2"] == whole["tasks"]["T2"] and again["verdict"] == whole["verdict"]

    one = (
        "--set",
        f"evaluation.improved_model_path={tmp_path}/models/C1/seed0",
        f"evaluation.results_dir={tmp_path}/one",
    )
    launch("feedback_guard", "evaluate.py", "--config", config_file, *one, threads=1)
    single = json.loads((tmp_path / "one" / "results.json").read_text())
    assert single["improved"] == "C1" and single["improved_model_path"].endswith("models/C1/seed0")
    assert list(single["tasks"]["T1"]["arms"]) == ["always unsafe", "A0", "A1", "C1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"), [(["nonsense"], "usage:"), (["train", "no.json"], "no such config file")]
)
def test_the_shell_names_what_is_wrong(words, said):
    done = launch("feedback_guard", "run_experiment.sh", *words, launcher=("bash",), check=False)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
