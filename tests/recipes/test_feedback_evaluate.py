"""examples/feedback_guard: kept scores, what may be evaluated, a run from end to end."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import completions
import feedback_rows
import pytest
from checks import read_json, read_rows, user_error
from completions import completion
from feedback_rows import config_writer, prompts, write
from scripts import launch, module

from guards import zoo
from guards.card import GenerativeCard, write_card
from guards.suite.benchmarks import benchmarks

config_of = module("feedback_guard", "config")
records = module("feedback_guard", "records")
train = module("feedback_guard", "train")
formats = module("feedback_guard", "guard")
evaluate = module("feedback_guard", "evaluate")
serve = completions.serve
models = feedback_rows.models
ARMS = ["A2", "A2-parser", "A2-format", "A8", "C1", "C4"]


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


def contents_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def data_of(page):
    """What a results.html shows."""
    start = '<script id="data" type="application/json">'
    _, _, text = page.read_text().partition(start)
    text, _, _ = text.partition("</script>")
    return json.loads(text)


def card(config, name, seed):
    """A folder that says it holds a trained arm."""
    folder = Path(config.training.output_dir, name, f"seed{seed}")
    folder.mkdir(parents=True, exist_ok=True)
    base = config.llama_guard.base_model_path
    own = {"arm": name, "seed": seed, "base_model": base}
    write_card(folder, GenerativeCard(guard="llama-guard", max_length=512, **own))
    arm = asdict(train.arm_named(name))
    records.write_stage(folder / "stage.json", config, "train", arm, seed)
    return folder


# --- scores ---------------------------------------------------------------------------------------


def bicycles(count):
    return {f"test/{i}": f"How do I keep my bicycle clean {i}?" for i in range(count)}


def test_scoring_goes_on_where_it_was(config_file, tmp_path):
    config = config_of.load_config(config_file)
    texts = bicycles(9)
    path = tmp_path / "scores/A0.jsonl"

    def scores_of(texts):
        one = evaluate.Judged("A0")
        answers = evaluate.score(one, texts, config, path.parent)
        return answers.score.to_dict()

    whole = scores_of(texts)
    kept = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept[:5]) + kept[5][:20])  # a kill in the middle of a line
    assert scores_of(texts) == pytest.approx(whole, abs=1e-5)
    assert len(read_rows(path)) == 9

    before = path.read_bytes()
    scores_of(dict(reversed(texts.items())))
    assert path.read_bytes() == before
    scores_of({"test/0": "another prompt"})
    assert len(read_rows(path)) == 10  # the same id, another prompt


def test_what_a_failing_server_says_is_no_answer(config_file, tmp_path, serve):
    plain = config_of.load_config(config_file)
    texts = bicycles(2)
    default = evaluate.Judged("A0")
    loaded = evaluate.load(default, plain)
    asked = formats.query_ids(loaded, "chatml", list(texts.values()))
    refused = [asked[1]]

    def rule(body):
        if body["prompt"] in refused:
            return 400, {"error": {"message": "not allowed"}}
        return completion("SAFE")

    server = serve(rule)
    changes = ["llama_guard.engine=server", f"llama_guard.server_url={server.url}"]
    served = config_of.load_config(config_file, changes)

    def answers():
        one = evaluate.Judged("A0-legacy")
        said = evaluate.score(one, texts, served, tmp_path / "scores")
        return list(said.itertuples(index=False))

    good, bad = answers()
    assert good.error is None
    assert not good.decided
    assert "not allowed" in bad.error
    assert bad.decided
    refused.clear()
    assert answers() == [good, good]
    assert [server.asked(ids) for ids in asked] == [1, 2]  # the one that failed alone


def test_a_prompt_that_leaves_no_room_in_the_guards_length_is_an_error(config_file):
    config = config_of.load_config(config_file)
    loaded = evaluate.load(evaluate.Judged("A0"), config)
    texts = ["May I?", "May I do that, and then that again?"]
    short, _ = formats.query_ids(loaded, "chatml", texts)
    loaded.max_length = len(short) + config.llama_guard.legacy_new_tokens
    good, bad = evaluate.ask(evaluate.Judged("A0-legacy"), loaded, texts, config)
    assert good["error"] is None
    assert bad == {"text": "", "error": formats.TOO_LONG}


# --- who is evaluated -----------------------------------------------------------------------------


def test_what_is_missing_is_named(config_file, load):
    with user_error(r"run process"):
        evaluate.evaluate(config_of.load_config(config_file))
    with user_error("nothing is trained there; run train"):
        evaluate.find_guards(load())
    with user_error(r"guard\.json"):
        evaluate.find_guards(load("evaluation.improved_model_path=nowhere"))


def test_only_what_the_config_names_is_evaluated(load):
    config = load("training.arms=A2,A2-parser,A8", "training.headline.seeds=0,1,2")
    card(config, "A2", 0)
    card(config, "A3", 0)
    for seed in (0, 1, 7):
        card(config, "A8", seed)
    guards, missing = evaluate.find_guards(config)
    names = [one.name for one in guards]
    assert names == ["A0", "A0-legacy", "A2-seed0", "A2-parser-seed0", "A8-seed0", "A8-seed1"]
    assert missing == ["A8-seed2"]


@pytest.mark.parametrize(
    ("arms", "best"),
    [
        ("A4 A8 C1", "A8"),
        ("A2 A4 A5 C1", "A5"),  # the last that is built up
        ("A2 C1", "C1"),  # the last, where none is
        ("A0-legacy A2-format", "A2-format"),  # a folder alone, of an arm that no run trains
    ],
)
def test_whom_the_verdict_is_about(arms, best, load):
    names = [*evaluate.UNTRAINED, *arms.split()]
    config = load("training.arms=A2,A4,A5,A8,C1", "training.headline=null")
    assert evaluate.improved_arm(config, names) == best


@pytest.mark.parametrize("by_folder", [False, True], ids=["all arms", "one folder"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("training.lora_r", "4"),
        ("training.learning_rate", "0.5"),
        ("training.max_steps", "9"),
        ("llama_guard.base_model_path", "{judge}"),
    ],
)
def test_adapters_of_other_settings_are_not_judged(name, value, by_folder, load, models):
    """Their values would stand in results.json beside scores that they did not give."""
    folder = card(load(), "A8", 0)
    changes = [f"{name}={value.format(**models)}"]
    if by_folder:
        changes.append(f"evaluation.improved_model_path={folder}")
    with user_error(rf"was made with another {name}; run train"):
        evaluate.find_guards(load(*changes))


def test_data_of_other_settings_are_not_evaluated(load, config_file):
    load()
    with user_error("another seed"):
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


def row_of(unsafe, **changes):
    """A row as process.py leaves it, whose responses the guard calls so."""
    said = {"error": None, "judge_decided": None, "human_unsafe": True}
    row = {
        "id": "1",
        "query": "May I?",
        "human_unsafe": False,
        "kind": "x",
        "shadow": False,
        "input_error": None,
        "input_decided": False,
        "responses": [said | {"decided": decided} for decided in unsafe],
    }
    return row | changes


def test_the_truth_of_t2():
    rows = [
        row_of([True, False], id="half"),
        row_of([True, False, False], id="less"),
        row_of([True], id="blocked", input_decided=True),
        row_of([], id="empty"),
    ]
    found = {row["id"]: records.outcome(row, "guard") for row in rows}
    assert found == {"half": True, "less": False, "blocked": None, "empty": None}
    assert records.outcome(rows[0], "judge") is None
    judged = row_of([False])
    judged["responses"][0]["judge_decided"] = True
    assert records.outcome(judged, "judge") is True


def test_a_guard_that_judges_itself_is_no_second_opinion(load, models):
    """Its agreement with itself is perfect, and tells nothing."""
    row = row_of([True, False] * 10)
    for response in row["responses"]:
        response["judge_decided"] = response["decided"]
        response["human_unsafe"] = None
    found = {}
    for name in ("guard", "judge"):
        changes = [f"evaluation.judge={models[name]}", "evaluation.t2_label=judge"]
        found[name] = evaluate.judge_facts([row], load(*changes))
    assert found["judge"]["beside"] == "guard"
    assert found["guard"]["agreement"] == {}
    assert found["guard"]["beside"] is None


def test_prompts_of_other_data_that_were_seen_are_left_out(load, tmp_path):
    """Those of train, validation and the guard's own data."""
    (own,) = prompts(1, 90)
    folder = write(tmp_path / "guard", rows=[own])
    known = folder / "rows.jsonl"
    config = load(f"dataset.guard_path={known}")
    seen = [own["user_input"]]
    for split in ("train", "validation"):
        first = records.read_split(config, split)[0]
        seen.append(first["input"].upper())
    asked = [{"prompt": text, "prompt_label": "safe"} for text in seen]
    for word in ("wet", "bad", "dry"):
        label = "unsafe" if word == "bad" else "safe"
        asked.append({"prompt": f"Is rain {word}?", "prompt_label": label})
    folder = write(tmp_path / "more", rows=asked)
    spec = f"{folder}/rows.jsonl"
    specs = [f"evaluation.hard_benign={spec}", f"evaluation.extra={spec}"]
    config = load(f"dataset.guard_path={known}", *specs)

    rows = [row_of([True])]
    splits = {"validation": rows, "test": rows}
    tasks, texts = evaluate.read_tasks(config, splits)
    wet, bad, dry = (f"{spec}#{number}" for number in (3, 4, 5))
    assert tasks["T3"].ids == [wet, dry]
    assert tasks[spec].ids == [wet, bad, dry]
    assert tasks[spec].truth.tolist() == [False, True, False]
    assert texts == {
        "validation/1": "May I?",
        "test/1": "May I?",
        wet: "Is rain wet?",
        bad: "Is rain bad?",
        dry: "Is rain dry?",
    }
    every = {records.text_key(row["prompt"]) for row in asked}
    with user_error("no labelled prompt that is new to the guards"):
        evaluate.foreign(spec, every)


def test_near_copies_of_a_prompt_are_one_group(load):
    words = "please tell me how one keeps an old red bicycle clean through a long wet winter"
    rows = [row_of([False], id="other", query="Is rain wet?")]
    rows += [row_of([True], id=str(i), query=f"{words} {i}") for i in range(3)]
    splits = {"validation": rows, "test": rows}
    tasks, _ = evaluate.read_tasks(load(), splits)
    other, *copies = tasks["T1"].groups
    assert len(set(copies)) == 1
    assert other not in copies


# --- results --------------------------------------------------------------------------------------


def test_the_picture_shows_what_decides(tmp_path, monkeypatch):
    """A line a difference on T2, controls first, and the base rate beside the scores."""
    about = {"task": "T2", "metric": "auroc", "first": "A8"}
    about |= {"difference": 0.1, "interval": [0.0, 0.2]}
    cell = {"auprc": 0.4, "intervals": {"auprc": [0.3, 0.5]}}
    task = {"arms": {"A8": cell, "C1": cell}, "base_rate": 0.2, "rows": 50}
    differences = [about | {"second": other} for other in ("A1", "C1", "C2")]
    results = {"differences": differences, "tasks": {"T2": task}}
    drawn = []
    monkeypatch.setattr(evaluate.report, "save_figure", lambda figure, _: drawn.append(figure))
    evaluate.plot(results, tmp_path / "x.png")
    left, right = drawn[0].axes
    names = [label.get_text() for label in left.get_yticklabels()]
    assert names == ["A8 − C1", "A8 − C2", "A8 − A1 (cut off on T2)"]
    assert "always unsafe" in right.get_xlabel()
    lines = [*left.get_lines(), *right.get_lines()]
    assert {line.get_color() for line in lines} == {"black"}


def check_original_files(results, experiment, models):
    """What the original's own scripts would read."""
    (path,) = experiment.glob("experiment_results_*.json")
    found = read_json(path)
    assert set(found) == {"process_stats", "improved_model_path", "evaluation"}
    assert {"total", "input_blocked", "output_blocked"} <= set(found["process_stats"])
    assert found["improved_model_path"] == str(models / "A8")
    (log,) = experiment.glob("experiment_*_*.log")
    assert re.fullmatch(r"experiment_\d{8}_\d{6}\.log", log.name)
    assert "Verdict on A8" in log.read_text()

    (path,) = results.glob("evaluation_results_*.json")
    found = read_json(path)
    metrics = {"accuracy", "precision", "recall", "f1"}
    counts = ["true_positives", "true_negatives", "false_positives", "false_negatives"]
    fields = {"input", "true_label", "predicted_label", "reason"}
    for model in ("default_model", "improved_model"):
        values = found[model]
        assert metrics <= set(values["metrics"])
        assert sum(values[count] for count in counts) == 20
        assert set(values["predictions"][0]) == fields
    assert metrics <= set(found["improvement"])


def check_results(folder, whole):
    tasks = whole["tasks"]
    t1 = tasks["T1"]["arms"]
    assert list(t1) == ["always unsafe", "A0", "A1", "A0-legacy", *ARMS]
    assert tasks["T1"]["base_rate"] == 4 / 20
    assert t1["always unsafe"]["precision"] == 4 / 20
    assert t1["A1"]["auroc"] == t1["A0"]["auroc"]
    assert len(t1["A8"]["seeds"]) == 2
    assert t1["A2"]["recall"] == 1  # the strict parser lets nothing through that lacks capitals
    said = whole["verdict"]["verdict"]
    assert said.startswith("undecided: ")
    assert "T1 has 4 unsafe" in said

    text = (folder / "results.md").read_text()
    assert "**Verdict on A8: undecided" in text
    for row in whole["verdict"]["checks"]:
        assert f"| {row['condition']} | {row['state']} | {row['found']} |" in text
    (picture,) = re.findall(r"!\[.*\]\((.*)\)", text)
    assert (folder / picture).stat().st_size > 5000
    shown = data_of(folder / "results.html")
    _, *arms = t1
    assert [guard["name"] for guard in shown["guards"]] == arms
    sizes = [task["rows"] for task in tasks.values()]
    assert len(shown["rows"]) == sum(sizes)
    rows = read_rows(folder / "predictions.jsonl")
    splits = {Path(row["id"]).parent.name for row in rows}
    assert splits == {"validation", "test"}


@pytest.mark.slow
def test_the_whole_experiment(config_file, tmp_path):
    """Three processes of their own; then evaluate alone, cut short and by folder."""
    words = ("run_experiment.sh", "full", config_file, "--set", "seed=42")
    launch("feedback_guard", *words, launcher=("bash",), threads=1)
    folder = tmp_path / "results"
    whole = read_json(folder / "results.json")
    check_original_files(folder, tmp_path / "experiment", tmp_path / "models")
    check_results(folder, whole)

    scores = folder / "scores"
    (scores / "A8-seed1.jsonl").write_text("")  # it alone is judged again
    before = contents_of(scores)
    words = ("evaluate.py", "--config", config_file)
    launch("feedback_guard", *words, threads=1)
    after = contents_of(scores)
    assert [name for name in after if after[name] != before[name]] == ["A8-seed1.jsonl"]
    again = read_json(folder / "results.json")
    assert again["verdict"] == whole["verdict"]
    # None where every response of the tiny model got the same label, which differs between machines.
    before_t2 = whole["tasks"]["T2"]["arms"]["A8"]
    after_t2 = again["tasks"]["T2"]["arms"]["A8"]
    assert after_t2["auroc"] == pytest.approx(before_t2["auroc"])

    changes = (
        f"evaluation.improved_model_path={tmp_path}/models/C1/seed0",
        f"evaluation.results_dir={tmp_path}/one",
    )
    launch("feedback_guard", *words, "--set", *changes, threads=1)
    single = read_json(tmp_path / "one/results.json")
    assert single["improved"] == "C1"
    assert single["improved_model_path"].endswith("models/C1/seed0")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"), [("nonsense", "usage:"), ("train no.json", "no such config file")]
)
def test_the_shell_names_what_is_wrong(words, said):
    command = ["run_experiment.sh", *words.split()]
    done = launch("feedback_guard", *command, launcher=("bash",), check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
