"""guards/suite/evaluate.py: from rows to tables, in runs that are killed, fail, or go on."""

import json
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import scripts
import torch
from safetensors.torch import load_file, save_file
from scripts import EXAMPLES, launch

from common.conversation import UserError, Verdict
from common.data import taxonomy
from guards import Guard
from guards.card import ClassifierCard, write_card
from guards.suite import evaluate, judge
from guards.suite.benchmarks import Benchmark

LABEL = {"user": "prompt_unsafe", "assistant": "response_unsafe"}


class KeywordGuard(Guard):
    """Knows three words; "maybe" is a weak suspicion that it calls safe unless it has no words of
    its own.
    """

    name, judges, sees = "keyword", ("prompt_unsafe", "response_unsafe"), "last turn"

    def __init__(self, words=True, seconds=0.0, thresholds=None, error="no word of mine"):
        self.words, self.seconds, self.thresholds, self.asked = words, seconds, thresholds or {}, []
        self.error, self.labels = error, set()

    def judge_valid(self, conversations):
        time.sleep(self.seconds)
        self.asked += conversations
        self.labels.update(self.wanted)
        return [self._one(messages[-1]) for messages in conversations]

    def _one(self, turn):
        if "broken" in turn["content"]:
            return Verdict(error=self.error)
        score = next(
            (s for word, s in {"bad": 0.9, "maybe": 0.6}.items() if word in turn["content"]), 0.125
        )
        decided = {LABEL[turn["role"]]: score > 0.8} if self.words else {}
        return Verdict(**{LABEL[turn["role"]]: score}, decided=decided)


class Deaf(KeywordGuard):
    """Judges prompts alone, and none of them."""

    judges = ("prompt_unsafe",)

    def _one(self, turn):
        return Verdict(error="cannot hear")


def candidate(name="keyword", identity="1", known=None, served=False, **options):
    """A guard for `evaluate.evaluate`; `load.made` counts how often it was loaded."""

    def load():
        load.made.append(KeywordGuard(**options))
        return load.made[-1]

    load.made = []
    return judge.Candidate(name, name, identity, load, known, served=served)


def item(prompt, unsafe, response=None, domain="law"):
    """A row in ExpGuard's own columns."""
    word = {True: "unsafe", False: "safe"}[unsafe]
    row = {
        "prompt": prompt,
        "response": response,
        "prompt_label": word,
        "domain": domain,
        "scenario": "s",
    }
    return row | {
        "response_label": word if response else None,
        "prompt_category": "c",
        "response_category": "c",
    }


@pytest.fixture
def file(tmp_path):
    """12 rows: bad words are unsafe, but for one of each kind; one cannot be judged. Half of them
    are answered.
    """
    texts = ["bad cat", "bad dog", "bad cow", "bad hen", "maybe fox", "broken owl"]
    rows = [
        item(text, text != "bad hen", f"{text}, yes", "law" if i < 3 else "finance")
        for i, text in enumerate(texts)
    ]
    rows += [
        item(f"nice {text}", i == 0, domain="law")
        for i, text in enumerate(["cat", "dog", "cow", "hen", "fox", "owl"])
    ]
    rows = [r | {"prompt": r["prompt"].replace("nice bad", "nice")} for r in rows]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def arguments(tmp_path, file):
    """Arguments of a run on the prompts and responses of `file`; published numbers and intervals
    are left out.
    """

    def make(**changes):
        names = ("expguardtest_prompt", "expguardtest_response")
        given = {
            "benchmarks": [f"{name}@{file}" for name in names],
            "output_dir": str(tmp_path / "out"),
        }
        return evaluate.EvaluationArguments(**(given | {"bootstrap_rounds": 0} | changes))

    return make


def cells(results, name="keyword"):
    return {c["benchmark"]: c for c in results["cells"] if c["guard"] == name}


def test_a_run_from_rows_to_tables(arguments, tmp_path):
    args = arguments(bootstrap_rounds=50, compare="keyword,plain")
    evaluate.evaluate(args, [candidate(known="expguard"), candidate("plain", words=False)])
    results = json.loads((tmp_path / "out/results.json").read_text())
    own, plain = cells(results), cells(results, "plain")
    prompts, responses = own["expguardtest_prompt"], own["expguardtest_response"]
    # prompts: 6 of 12 unsafe; found: cat, dog, cow; wrong: hen; missed: maybe fox, nice cat; broken
    # owl has no verdict
    assert (prompts["rows"], prompts["positives"], prompts["f1"]) == (12, 6, 6 / 10)
    assert (responses["rows"], responses["positives"], responses["f1"]) == (6, 5, 6 / 9)
    assert (plain["expguardtest_prompt"]["f1"], plain["expguardtest_prompt"]["decision"]) == (
        8 / 11,
        "score > 0.5",
    )
    assert prompts["errors"] == 1 and set(prompts["groups"]["domain"]) == {"law", "finance"}
    compared = {c["benchmark"]: c for c in results["comparison"]}["expguardtest_prompt"]
    assert (
        compared["f1"]["difference"] == pytest.approx(6 / 10 - 8 / 11)
        and compared["auroc"]["difference"] == 0
    )
    text = (tmp_path / "out/results.md").read_text()
    assert "| keyword | 0.600 | 0.667 |" in text and "| plain † | 0.727 |" in text
    assert "law" not in text and "finance" not in text  # sub-groups stand in results.json alone
    assert "Published numbers are left out" in text and "an error as wrong" in text
    assert "| sees of a conversation |" in text and "| last turn |" in text
    rows = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").open()]
    assert len(rows) == 18 and rows[0]["guards"]["plain"]["prompt_unsafe"] == 0.9
    assert rows[5]["guards"]["keyword"]["error"] == "no word of mine"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *(
            "precision-recall",
            "predictions.jsonl",
            "results.csv",
            "results.html",
            "results.json",
            "results.md",
            "results.tex",
            "runs",
        )
    ]
    assert len(list((tmp_path / "out/precision-recall").iterdir())) == 2


def test_a_guard_that_fails_does_not_stop_the_others(arguments, tmp_path):
    def crash():
        raise RuntimeError("the card\nis full")

    broken, deaf = (
        judge.Candidate("broken", "broken", "2", crash),
        judge.Candidate("deaf", "deaf", "3", Deaf),
    )
    results = evaluate.evaluate(arguments(), [broken, deaf, candidate()])
    assert {c["status"] for c in cells(results).values()} == {"measured"}
    assert {c["reason"] for c in cells(results, "broken").values()} == {
        "RuntimeError: the card is full"
    }
    assert [c["status"] for c in cells(results, "deaf").values()] == ["failed", "not supported"]
    text = (tmp_path / "out/results.md").read_text()
    assert "| broken | expguardtest_prompt | RuntimeError: the card is full |" in text
    assert "| deaf | failed | not supported |" in text


def asked_of(made: judge.Candidate) -> list[str]:
    """The last turns that a guard was asked, each time that it was loaded."""
    return [messages[-1]["content"] for guard in made.load.made for messages in guard.asked]


def test_kept_verdicts(arguments, tmp_path):
    """Judged anew: everything of another guard or of one that changed; a half-written line is
    dropped.
    """
    first = candidate()
    before = evaluate.evaluate(arguments(), [first])
    kept = tmp_path / "out/runs/keyword/expguardtest_prompt.jsonl"
    assert len(first.load.made) == 1 and len(kept.read_text().splitlines()) == 12
    with kept.open("a") as file:
        file.write('{"id": "half')
    again = candidate()
    after = evaluate.evaluate(arguments(), [again])
    assert after["cells"] == before["cells"] and not again.load.made
    assert len(kept.read_text().splitlines()) == 12
    changed = candidate(identity="2")
    evaluate.evaluate(arguments(), [changed])
    assert len(asked_of(changed)) == 18 and len(kept.read_text().splitlines()) == 24
    kept.write_text("no json\n")
    with pytest.raises(UserError, match=r"expguardtest_prompt\.jsonl, line 1.* remove the file"):
        evaluate.evaluate(arguments(), [candidate()])


LASTING = [
    "9000 tokens, more than --max_length 4096",
    "the prompt has 5000 tokens; the model has room for 4095",
    "azure-content-safety: the text has 10001 characters, more than 10000; see long_inputs",
    "perspective: empty text",
    "it writes ' the' where ' yes' or ' no' was expected",
    "no Refusal: in what it wrote: 'Safety: Safe'",
    "Error code: 400 - {'message': 'the prompt is too long'}",
    "openai-moderation: HTTP 400 invalid_request",
]
PASSING = [
    "Connection error.",
    "Request timed out.",
    "Error code: 503 - overloaded",
    "openai-moderation: HTTP 429, 6 times",
    "perspective: HTTP 400 API_KEY_INVALID: check PERSPECTIVE_API_KEY",
    "not asked: http://127.0.0.1:1/v1: it fails; 3 of 9 prompts were not asked",
]


@pytest.mark.parametrize("error", LASTING + PASSING)
def test_errors_that_may_go_away_are_asked_again(arguments, error):
    """Those of a server or of the way to it; what a model says of a text it says each time."""
    evaluate.evaluate(arguments(), [candidate(served=True, error=error)])
    again = candidate(served=True, error=error)
    evaluate.evaluate(arguments(), [again])
    assert asked_of(again) == (["broken owl", "broken owl, yes"] if error in PASSING else [])


def test_kept_verdicts_of_more_or_fewer_guards(arguments):
    """What is not asked for this time is there the next time."""
    names, responses = ["a", "b"], arguments().benchmarks[1:]
    whole = evaluate.evaluate(arguments(), [candidate(name) for name in names])
    evaluate.evaluate(arguments(benchmarks=responses), [candidate("a")])
    evaluate.evaluate(arguments(benchmarks=responses, overwrite=True), [candidate("a")])
    three = [candidate(name) for name in ("b", "c", "a")]
    results = evaluate.evaluate(arguments(), three)
    assert [len(asked_of(guard)) for guard in three] == [0, 18, 0]
    assert all(cells(results, name) == cells(whole, name) for name in names)


def test_a_guard_is_asked_for_what_is_scored(arguments):
    """So that none generates text for a verdict that nobody reads."""
    guard = candidate()
    evaluate.evaluate(arguments(task_type="response"), [guard])
    assert guard.load.made[0].labels == {"response_unsafe"}


def test_a_finished_guard_is_not_loaded_again(arguments, file):
    file.write_text(
        "".join(line for line in file.read_text().splitlines(True) if "broken" not in line)
    )
    before = evaluate.evaluate(
        arguments(), [candidate(thresholds={"flagged": {"value": 0.5, "how": "max F1", "on": "v"}})]
    )
    again = candidate()
    assert (
        evaluate.evaluate(arguments(), [again])["cells"] == before["cells"] and not again.load.made
    )


def test_kept_verdicts_count_for_weights_by_content(arguments, tmp_path, tiny_classifier):
    """A guard that was touched or moved is the same; one with other weights of the same date is
    not.
    """
    benchmarks = arguments().benchmarks[1:]
    folder = tiny_classifier(tmp_path / "guard")
    kept = tmp_path / "out/runs/guard/expguardtest_response.jsonl"

    def verdicts(guard: Path) -> list[dict]:
        known = judge.candidates([f"beaver-dam-7b={guard}"], {})
        evaluate.evaluate(arguments(benchmarks=benchmarks), [replace(known[0], name="guard")])
        return [json.loads(line)["verdict"] for line in kept.open()]

    first = verdicts(folder)
    assert len(first) == 6
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    assert verdicts(folder) == first
    assert verdicts(shutil.copytree(folder, tmp_path / "copy")) == first

    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    for name in sorted(tensors)[4:8]:
        tensors[name] = torch.zeros_like(tensors[name])
    size = weights.stat().st_size
    save_file(tensors, weights, metadata={"format": "pt"})
    os.utime(weights, (1, 1))
    assert weights.stat().st_size == size
    anew = verdicts(folder)
    assert anew[:6] == first and len(anew) == 12 and anew[6:] != first


SLOW_RUN = """
import sys
sys.path[:0] = {tests}
import test_suite_evaluate as tests
tests.evaluate.CHUNK.update(transformers=2)
args = tests.evaluate.EvaluationArguments(output_dir={out!r}, benchmarks={benchmarks!r}, bootstrap_rounds=0)
tests.evaluate.evaluate(args, [tests.candidate(seconds=0.3)])
"""


@pytest.mark.slow
def test_kill_and_resume(arguments, tmp_path, file, monkeypatch):
    """A real process, killed between two writes; predictions are those of a run that was left
    alone.

    A chunk that the kill cut is judged as a whole, as it was before.
    """
    file.write_text(
        "".join(
            json.dumps(item(f"{'bad' if i % 3 else 'nice'} {i}", bool(i % 2), f"answer {i}")) + "\n"
            for i in range(40)
        )
    )
    whole = evaluate.evaluate(arguments(output_dir=str(tmp_path / "whole")), [candidate()])
    code = SLOW_RUN.format(
        tests=[str(folder) for folder in Path(__file__).parents[:2]],
        out=str(tmp_path / "out"),
        benchmarks=arguments().benchmarks,
    )
    process = scripts.start([sys.executable, "-c", code])
    kept = tmp_path / "out/runs/keyword/expguardtest_prompt.jsonl"
    started = time.time()
    while (
        process.poll() is None
        and time.time() - started < 300
        and not (kept.is_file() and kept.stat().st_size)
    ):
        time.sleep(0.02)
    process.kill()
    process.wait()
    lines = len(kept.read_text().splitlines())
    assert 0 < lines < 40 and not (tmp_path / "out/results.json").exists()
    rest = candidate()
    monkeypatch.setitem(evaluate.CHUNK, "transformers", 2)
    results = evaluate.evaluate(arguments(), [rest])
    assert len(rest.load.made[0].asked) == 80 - lines + lines % 2
    assert results["cells"] == whole["cells"]
    assert (tmp_path / "out/predictions.jsonl").read_text() == (
        tmp_path / "whole/predictions.jsonl"
    ).read_text()
    assert len(kept.read_text().splitlines()) == 40


def test_thresholds(arguments, tmp_path, file):
    """Fitted on validation rows, or the guard's own; "flagged" is a threshold of harm."""
    validation = tmp_path / "validation.jsonl"
    rows = [item(f"maybe {i}", True, f"maybe {i}") for i in range(3)] + [
        item(f"nice {i}", False, f"n {i}") for i in range(3)
    ]
    validation.write_text(
        "".join(json.dumps(r) + "\n" for r in [*rows, item("broken", False, "broken")])
    )
    own = {"flagged": {"value": 0.95, "how": "max F1, n=9", "on": "own"}}
    without = cells(evaluate.evaluate(arguments(), [candidate(thresholds=own)]))[
        "expguardtest_prompt"
    ]
    assert (without["threshold"]["value"], without["recall_at_validation"]) == (0.95, 0.0)
    assert without["convention"]["threshold"] == "guard.json: max F1"
    fitted = evaluate.evaluate(arguments(validation=[str(validation)]), [candidate(thresholds=own)])
    cell = cells(fitted)["expguardtest_response"]
    assert cell["threshold"] == {
        "value": pytest.approx(0.3625),
        "how": "max F1, n=6",
        "on": str(validation),
    }
    assert cells(fitted)["expguardtest_prompt"]["recall_at_validation"] == 4 / 6
    assert "F1 at the threshold of the validation data" in (tmp_path / "out/results.md").read_text()


def test_contaminated_rows(arguments, tmp_path):
    train = tmp_path / "train.jsonl"
    train.write_text(json.dumps({"prompt": "BAD  cat", "prompt_label": "unsafe"}) + "\n")
    cell = cells(evaluate.evaluate(arguments(train_data=[str(train)]), [candidate()]))[
        "expguardtest_prompt"
    ]
    assert cell["without"]["contaminated"]["rows"] == 11


def test_results_of_another_run_join_the_table(arguments, tmp_path):
    evaluate.evaluate(arguments(), [candidate()])
    other = str(tmp_path / "out/results.json")
    joined = arguments(add_results=[other], output_dir=str(tmp_path / "joined"))
    results = evaluate.evaluate(joined, [candidate("plain", words=False)])
    assert set(results["guards"]) == {"keyword", "plain"} and len(results["cells"]) == 4
    text = (tmp_path / "joined/results.md").read_text()
    assert "| plain † | 0.727 |" in text and "| keyword | 0.600 |" in text
    late = candidate("late")
    for change, message in {
        "parse_errors": ("excluded", "parse_errors"),
        "max_rows": (3, "rows"),
    }.items():
        with pytest.raises(UserError, match=rf"scored differently \({message[1]}"):
            evaluate.evaluate(replace(joined, **{change: message[0]}), [late])
    with pytest.raises(UserError, match="holds keyword too"):
        evaluate.evaluate(joined, [candidate()])
    assert not late.load.made  # known before any work


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"task_type": "both sides"},
            "--task_type both sides: expected one of prompt, response, refusal, both",
        ),
        ({"task_type": "refusal"}, "--task_type refusal: none is left"),
        ({"parse_errors": "safe"}, "--parse_errors safe: expected one of wrong, unsafe, excluded"),
        ({"engine": "server"}, "--engine server: needs --server_url"),
        ({"max_rows": 0}, "--max_rows 0"),
        ({"compare": "keyword"}, "--compare keyword: expected a,b"),
        ({"compare": "keyword,nobody"}, "--compare keyword,nobody"),
        ({"benchmarks": ["xstest"]}, "no benchmark 'xstest'; near it: .*xstest_prompt"),
        ({"benchmarks": ["xstest_prompt@no.csv"]}, "no.csv"),
        ({"validation": ["toxicchat"]}, "--validation toxicchat: is test data"),
        ({"validation": ["some/rows:test"]}, "--validation some/rows:test: is test data"),
        ({"add_results": ["no.json"]}, "--add_results no.json: no results.json"),
        ({"published": "some"}, "--published some"),
    ],
)
def test_a_mistake_is_named_before_any_work(arguments, tmp_path, change, message):
    guard = candidate()
    with pytest.raises(UserError, match=message):
        evaluate.evaluate(arguments(**change), [guard])
    assert not guard.load.made and not (tmp_path / "out").exists()


def test_validation_rows_are_no_benchmark_and_have_both_classes(arguments, tmp_path, file):
    with pytest.raises(UserError, match="is test data"):
        evaluate.evaluate(arguments(validation=[str(file)]), [candidate()])
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps(item("bad", True, "bad")) + "\n")
    with pytest.raises(UserError, match="have one class"):
        evaluate.evaluate(arguments(validation=[str(one)]), [candidate()])


def test_the_same_guard_or_benchmark_twice(arguments):
    with pytest.raises(UserError, match="--guards: keyword stands there twice"):
        evaluate.evaluate(arguments(), [candidate(), candidate()])
    with pytest.raises(UserError, match="expguardtest_prompt stands there twice"):
        evaluate.evaluate(arguments(benchmarks=arguments().benchmarks[:1] * 2), [candidate()])
    with pytest.raises(UserError, match="at least one guard"):
        evaluate.evaluate(arguments(), [])


# --- the command line -------------------------------------------------------------------------------------------------


def test_specs(tmp_path, tiny_classifier):
    folder = tiny_classifier(tmp_path / "run" / "best")
    options = {"engine": "transformers", "long_inputs": "windows"}
    bare = judge.candidates(
        [f"beaver-dam-7b={folder}", "beaver-dam-7b", "openai-moderation:model=m,timeout=3"], options
    )
    assert [c.name for c in bare] == [
        "beaver-dam-7b",
        "beaver-dam-7b",
        "openai-moderation (model=m,timeout=3)",
    ]
    assert [c.zoo for c in bare] == ["beaver-dam-7b", "beaver-dam-7b", "openai-moderation"]
    assert bare[0].load().judges == ("response_unsafe",)
    card = {"template": "beavertails", "labels": taxonomy("beavertails")}
    write_card(folder, ClassifierCard(**card, max_length=512))
    specs = [
        str(folder),
        f"mine={folder}",
        f"{folder}:max_length=64",
        f"{folder}:max_length=65",
        "PKU-Alignment/beaver-dam-7b",
    ]
    described = judge.candidates(specs, options)
    assert [c.name for c in described] == [
        *(
            "run/best",
            "mine",
            "run/best (max_length=64)",
            "run/best (max_length=65)",
            "beaver-dam-7b",
        )
    ]
    assert described[2].load().max_length == 64
    facts = {"contaminated_by": []}
    made = [Benchmark(name, "response_unsafe", [], facts) for name in ("beavertails", "saferlhf")]
    knows = [evaluate.describe_guard(guard, made)["knows"] for guard in (bare[0], described[1])]
    assert knows == [["beavertails"], []]
    assert len({c.identity for c in described}) == 4  # `mine` is the same guard by another name
    write_card(folder, ClassifierCard(**card, max_length=99))
    assert judge.candidates([str(folder)], options)[0].identity != described[0].identity


@pytest.mark.parametrize("spec", ["wildguard=no/folder", "nobody={folder}"])
def test_a_name_needs_a_guard(spec, tmp_path):
    with pytest.raises(UserError, match=r"--guards .*: .*(is no folder|no name of the guard zoo)"):
        judge.candidates([spec.format(folder=tmp_path)], {})


def run_main(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, argv)])
    evaluate.main()


def test_exit_codes(monkeypatch, tmp_path, file, tiny_classifier, capsys):
    """0: all measured; 1: a guard failed, and the table says so."""
    guard, out = tiny_classifier(tmp_path / "guard"), tmp_path / "out"
    common = [
        "--benchmarks",
        f"expguardtest_prompt@{file}",
        f"expguardtest_response@{file}",
        "--task_type",
        "response",
    ]
    common += ["--output_dir", out, "--bootstrap_rounds", 20]
    run_main(monkeypatch, "--guards", f"beaver-dam-7b={guard}", *common)
    assert "| beaver-dam-7b † |" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, "--guards", f"beaver-dam-7b={guard}", tmp_path / "nothing", *common)
    assert stopped.value.code == 1
    text = capsys.readouterr().out
    assert "expguardtest_prompt" not in text
    assert (
        "| beaver-dam-7b † |" in text
        and "## Failed" in text
        and "no folder here, and no hub id that loads" in text
    )


@pytest.mark.slow
def test_the_papers_command(tmp_path, file, tiny_classifier):
    """Name, task, local model, then flags of evaluate.py; prompts are not for this guard."""
    guard, script = tiny_classifier(tmp_path / "guard"), "scripts/safety_eval.sh"
    flags = [
        "--benchmarks",
        *(f"expguardtest_{task}@{file}" for task in ("prompt", "response")),
        "--output_dir",
        tmp_path / "out",
    ]
    flags += ["--bootstrap_rounds", "0"]
    done = launch("expguard", script, "beaver-dam-7b", "both", guard, *flags, launcher=("bash",))
    assert "| beaver-dam-7b † | not supported | 0." in done.stdout
    for wrong in (
        ["beaver-dam-7b"],
        ["beaver-dam-7b", "answers"],
        ["beaver-dam-7b", "both", "no/folder"],
    ):
        done = launch("expguard", script, *wrong, launcher=("bash",), check=False)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert (EXAMPLES / "expguard" / script).stat().st_mode & 0o100
