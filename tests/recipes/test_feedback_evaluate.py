"""examples/feedback_guard: kept scores, what may be evaluated, a run from end to end."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import completions
import pytest
from completions import completion
from feedback_rows import config_writer, prompts, save_models, write
from scripts import launch, module

from common.conversation import UserError
from guards import zoo
from guards.card import GenerativeCard, write_card
from guards.suite.benchmarks import benchmarks

config_of = module("feedback_guard", "config")
records = module("feedback_guard", "records")
train = module("feedback_guard", "train")
evaluate = module("feedback_guard", "evaluate")
serve = completions.serve
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
            "arms": ARMS,
            "seeds": [0],
            "headline": {"arms": ["A8"], "seeds": [0, 1]},
            "max_steps": 2,
            "batch_size": 4,
            "gradient_accumulation_steps": 1,
            "output_dir": str(tmp_path / "models"),
        },
        evaluation={
            "judge": "",
            "t2_label": "human",
            "draws": 200,
            "results_dir": str(tmp_path / "results"),
        },
        experiment={"results_dir": str(tmp_path / "experiment")},
    )


@pytest.fixture
def load(config_file):
    """`load("key=value", …)`: the config with changed values, its splits and prompts processed."""

    def make(*changes):
        config = config_of.load_config(config_file, changes)
        records.make_splits(config)
        for split in config_of.SPLITS:
            path = records.processed_path(config, split)
            path.parent.mkdir(exist_ok=True)
            path.touch()
        records.write_stage(records.process_stage(config), config, "process")
        return config

    return make


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def data_of(page):
    """What a results.html shows."""
    text = page.read_text().partition('<script id="data" type="application/json">')[2]
    return json.loads(text.partition("</script>")[0])


def card(config, name, seed, arm=None):
    """A folder that says it holds a trained arm."""
    folder = Path(config.training.output_dir) / name / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    base = config.llama_guard.base_model_path
    origin = {"arm": arm or name, "seed": seed, "base_model": base}
    write_card(folder, GenerativeCard(guard="llama-guard", max_length=512, **origin))
    about = asdict(train.arm_named(arm or name)), seed
    records.write_stage(folder / "stage.json", config, "train", *about)
    return folder


# --- scores ---------------------------------------------------------------------------------------


def test_scoring_goes_on_where_it_was(config_file, tmp_path):
    config = config_of.load_config(config_file)
    texts = {f"test/{i}": f"How do I keep my bicycle clean {i}?" for i in range(9)}
    one, path = evaluate.Judged("A0"), tmp_path / "scores/A0.jsonl"
    whole = evaluate.score(one, texts, config, path.parent)
    kept = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept[:5]) + kept[5][:20])  # a kill in the middle of a line
    again = evaluate.score(one, texts, config, path.parent)
    assert list(again) == list(whole)
    assert len(lines_of(path)) == 9
    expected = [answer.score for answer in whole.values()]
    assert [answer.score for answer in again.values()] == pytest.approx(expected, abs=1e-5)
    before = path.read_bytes()
    evaluate.score(one, dict(reversed(texts.items())), config, path.parent)
    assert path.read_bytes() == before
    evaluate.score(one, {"test/0": "another prompt"}, config, path.parent)
    assert len(lines_of(path)) == 10  # the same id, another prompt


def test_what_a_failing_server_says_is_no_answer(config_file, tmp_path, serve):
    refused = {"bad": True}
    plain = config_of.load_config(config_file)
    texts = {f"test/{i}": f"How do I keep my bicycle clean {i}?" for i in range(2)}
    loaded = evaluate.load(evaluate.Judged("A0"), plain)
    asked = evaluate.query_ids(loaded, "chatml", list(texts.values()))

    def rule(body):
        if refused["bad"] and body["prompt"] == asked[1]:
            return 400, {"error": {"message": "not allowed"}}
        return completion("SAFE")

    server = serve(rule)
    there = ["llama_guard.engine=server", f"llama_guard.server_url={server.url}"]
    served = config_of.load_config(config_file, there)
    one, folder = evaluate.Judged("A0-legacy"), tmp_path / "scores"
    first = list(evaluate.score(one, texts, served, folder).values())
    assert [answer.decided for answer in first] == [False, True]
    assert first[0].error is None
    assert "not allowed" in first[1].error
    refused["bad"] = False
    again = evaluate.score(one, texts, served, folder)  # the one that failed alone
    assert [(answer.decided, answer.error) for answer in again.values()] == [(False, None)] * 2
    assert [server.asked(prompt) for prompt in asked] == [1, 2]


# --- who is evaluated -----------------------------------------------------------------------------


def test_what_is_missing_is_named(config_file, load):
    with pytest.raises(UserError, match=r"run process"):
        evaluate.evaluate(config_of.load_config(config_file))
    with pytest.raises(UserError, match="nothing is trained there; run train"):
        evaluate.find_guards(load())
    with pytest.raises(UserError, match=r"guard\.json"):
        evaluate.find_guards(load("evaluation.improved_model_path=nowhere"))


def test_only_what_the_config_names_is_evaluated(load):
    config = load("training.arms=A2,A2-parser,A8", "training.headline.seeds=0,1,2")
    for name, seed in (("A2", 0), ("A8", 0), ("A8", 1), ("A8", 7), ("A3", 0)):
        card(config, name, seed)
    guards, missing = evaluate.find_guards(config)
    names = ["A0", "A0-legacy", "A2-seed0", "A2-parser-seed0", "A8-seed0", "A8-seed1"]
    assert [one.name for one in guards] == names
    assert missing == ["A8-seed2"]


@pytest.mark.parametrize(
    "change", ["training.lora_r=4", "training.learning_rate=0.5", "training.max_steps=9", "base"]
)
def test_adapters_of_other_settings_are_not_judged(load, models, change):
    """Their values would stand in results.json beside scores that they did not give."""
    card(load(), "A8", 0)
    changes = [f"llama_guard.base_model_path={models['judge']}"] if change == "base" else [change]
    name = "base_model_path" if change == "base" else change.partition("=")[0]
    for more in ((), (f"evaluation.improved_model_path={load().training.output_dir}/A8/seed0",)):
        with pytest.raises(UserError, match=rf"was made with another .*{name}; run train"):
            evaluate.find_guards(load(*changes, *more))


def test_data_of_other_settings_are_not_evaluated(load, config_file):
    load()
    with pytest.raises(UserError, match="another seed"):
        evaluate.evaluate(config_of.load_config(config_file, ["seed=1"]))


def test_the_originals_config_has_another_family_for_the_truth():
    """The guard must not label the rows to train on and be the truth as well."""
    config = config_of.load_config(Path(evaluate.__file__).with_name("research_config.json"))
    settings = config.evaluation
    judge = zoo()[settings.judge]
    assert settings.t2_label == "judge"
    assert judge["kind"] == "generative"
    assert "llama" not in judge["model"].lower()
    assert benchmarks()[settings.hard_benign]["hub"] == "Paul/XSTest"
    assert not {"A2-rate", "A2-labels"} & set(config.training.arms)


# --- tasks ----------------------------------------------------------------------------------------


def row_of(unsafe, judge=None, human=None, decided=False, row_id="1", query="May I?"):
    responses = [
        {"decided": u, "error": None, "judge_unsafe": judge, "human_unsafe": human} for u in unsafe
    ]
    known = {"input_error": None, "input_decided": decided, "responses": responses}
    return {"id": row_id, "query": query, "human_unsafe": False, "shadow": False} | known


def test_the_truth_of_t2():
    rows = [
        row_of([True, False], row_id="half"),
        row_of([True, False, False], row_id="less"),
        row_of([True], decided=True, row_id="blocked"),
        row_of([], row_id="empty"),
    ]
    assert evaluate.outcomes_of(rows, "guard") == {"half": True, "less": False}
    assert evaluate.outcomes_of(rows, "human") == {}
    assert evaluate.outcomes_of([row_of([False], judge=0.9)], "judge") == {"1": True}


def test_prompts_of_other_data_that_were_seen_are_left_out(load, tmp_path):
    """Those of train, validation and the guard's own data."""
    known = write(tmp_path / "guard", rows=prompts(1, 90)) / "rows.jsonl"
    config = load(f"dataset.guard_path={known}")
    seen = [records.read_split(config, s)[0]["input"].upper() for s in ("train", "validation")]
    seen.append(prompts(1, 90)[0]["user_input"])
    fresh = ["Is rain wet?", "Is rain bad?", "Is rain dry?"]
    asked = [
        {"prompt": text, "prompt_label": "unsafe" if text.endswith("bad?") else "safe"}
        for text in [*seen[:2], *fresh, seen[2]]
    ]
    spec = str(write(tmp_path / "more", rows=asked) / "rows.jsonl")
    specs = [f"evaluation.hard_benign={spec}", f"evaluation.extra={spec}"]
    config = load(f"dataset.guard_path={known}", *specs)
    rows = {split: [row_of([True], human=True) | {"kind": "x"}] for split in ("validation", "test")}
    tasks, texts = evaluate.read_tasks(config, rows)
    assert tasks["T3"].ids == [f"{spec}#2", f"{spec}#4"]
    assert dict(zip(tasks[spec].ids, tasks[spec].truth.tolist(), strict=True)) == {
        f"{spec}#2": False,
        f"{spec}#3": True,
        f"{spec}#4": False,
    }
    assert list(texts.values()) == ["May I?", "May I?", fresh[0], fresh[2], fresh[1]]
    with pytest.raises(UserError, match="no labelled prompt that is new to the guards"):
        evaluate.foreign(spec, {records.text_key(text) for text in [*seen, *fresh]})


def test_near_copies_of_a_prompt_are_one_group(load):
    words = (
        "please tell me how one keeps an old red bicycle clean through a long wet winter in town"
    )
    rows = [row_of([True], human=True, row_id=str(i), query=f"{words} {i}") for i in range(3)]
    rows.append(row_of([False], row_id="other", query="Is rain wet?"))
    tasks, _ = evaluate.read_tasks(load(), {"validation": rows, "test": rows})
    assert len(set(tasks["T1"].groups[:3])) == 1
    assert len(set(tasks["T1"].groups)) == 2


# --- results --------------------------------------------------------------------------------------


def test_the_picture_shows_what_decides(tmp_path, monkeypatch):
    """A line a difference on T2, controls first, and the base rate beside the scores."""
    interval = {"difference": 0.1, "interval": [0.0, 0.2], "by_seed": None}
    about = {"task": "T2", "metric": "auroc", "first": "A8"}
    cell = {"auprc": 0.4, "intervals": {"auprc": [0.3, 0.5]}}
    results = {
        "differences": [about | {"second": other} | interval for other in ("A1", "C1", "C2")],
        "tasks": {"T2": {"arms": {"A8": cell, "C1": cell}, "base_rate": 0.2, "rows": 50}},
    }
    drawn = []
    monkeypatch.setattr(evaluate.report, "save_figure", lambda figure, path: drawn.append(figure))
    evaluate.plot(results, tmp_path / "x.png")
    left, right = drawn[0].axes
    names = [label.get_text() for label in left.get_yticklabels()]
    assert names == ["A8 − C1", "A8 − C2", "A8 − A1 (cut off on T2)"]
    assert "always unsafe" in right.get_xlabel()
    colours = {line.get_color() for axes in (left, right) for line in axes.get_lines()}
    assert colours == {"black"}


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
    assert {"total", "input_blocked", "output_blocked"} <= set(found["process_stats"])
    assert found["improved_model_path"] == str(tmp_path / "models" / "A8")
    (log,) = (tmp_path / "experiment").glob("experiment_*_*.log")
    assert re.fullmatch(r"experiment_\d{8}_\d{6}\.log", log.name)
    assert "Verdict on A8" in log.read_text()
    (path,) = folder.glob("evaluation_results_*.json")
    original = json.loads(path.read_text())
    whole = json.loads((folder / "results.json").read_text())
    for model in ("default_model", "improved_model"):
        assert set(original[model]["metrics"]) >= {"accuracy", "precision", "recall", "f1"}
        kinds = [f"{a}_{b}s" for a in ("true", "false") for b in ("positive", "negative")]
        assert sum(original[model][kind] for kind in kinds) == 20
        fields = {"input", "true_label", "predicted_label", "reason"}
        assert set(original[model]["predictions"][0]) == fields
    assert set(original["improvement"]) >= {"accuracy", "precision", "recall", "f1"}

    t1 = whole["tasks"]["T1"]["arms"]
    assert list(t1) == ["always unsafe", "A0", "A1", "A0-legacy", *ARMS]
    assert t1["always unsafe"]["precision"] == whole["tasks"]["T1"]["base_rate"] == 4 / 20
    assert t1["A1"]["auroc"] == t1["A0"]["auroc"]
    assert len(t1["A8"]["seeds"]) == 2
    assert t1["A2"]["recall"] == 1  # the strict parser lets nothing through that lacks capitals
    said = whole["verdict"]["verdict"]
    assert said.startswith("undecided: ")
    assert "T1 has 4 unsafe" in said
    text = (folder / "results.md").read_text()
    assert "**Verdict on A8: undecided" in text
    (picture,) = re.findall(r"!\[.*\]\((.*)\)", text)
    assert (folder / picture).stat().st_size > 5000
    shown = data_of(folder / "results.html")
    assert [guard["name"] for guard in shown["guards"]] == list(t1)[1:]
    assert len(shown["rows"]) == sum(task["rows"] for task in whole["tasks"].values())
    rows = lines_of(folder / "predictions.jsonl")
    assert {row["id"].partition("/")[0] for row in rows} == {"validation", "test"}

    (folder / "scores" / "A8-seed1.jsonl").write_text("")  # it alone is judged again
    before = {path: path.read_bytes() for path in (folder / "scores").iterdir()}
    launch("feedback_guard", "evaluate.py", "--config", config_file, threads=1)
    again = json.loads((folder / "results.json").read_text())
    assert {path.stem for path in before if path.read_bytes() != before[path]} == {"A8-seed1"}
    assert again["verdict"] == whole["verdict"]
    # None where every response of the tiny model got the same label, which differs between machines.
    before_t2, after_t2 = (found["tasks"]["T2"]["arms"]["A8"] for found in (whole, again))
    assert after_t2["auroc"] == pytest.approx(before_t2["auroc"])

    changes = (
        "--set",
        f"evaluation.improved_model_path={tmp_path}/models/C1/seed0",
        f"evaluation.results_dir={tmp_path}/one",
    )
    launch("feedback_guard", "evaluate.py", "--config", config_file, *changes, threads=1)
    single = json.loads((tmp_path / "one" / "results.json").read_text())
    assert single["improved"] == "C1"
    assert single["improved_model_path"].endswith("models/C1/seed0")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"), [(["nonsense"], "usage:"), (["train", "no.json"], "no such config file")]
)
def test_the_shell_names_what_is_wrong(words, said):
    done = launch("feedback_guard", "run_experiment.sh", *words, launcher=("bash",), check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
