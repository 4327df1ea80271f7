"""guards/suite/evaluate.py: from rows to tables, in runs that are killed, fail, or go on."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from checks import kill_when_written, read_json, read_rows, user_error, write_rows

from common.conversation import Verdict
from common.data import load_conversations, taxonomy
from guards import Guard
from guards.card import ClassifierCard, write_card
from guards.suite import evaluate, judge
from guards.suite.benchmarks import Benchmark

LABEL = {"user": "prompt_unsafe", "assistant": "response_unsafe"}
SCORES = {"bad": 0.9, "maybe": 0.6}
NO_WORD = "no word of mine"
PROMPTS = "expguardtest_prompt"
RESPONSES = "expguardtest_response"


class KeywordGuard(Guard):
    """Knows three words; "maybe" is a weak suspicion that it calls safe unless it has no words of
    its own. `errors` are what it says of texts that begin with "broken"; after `stop`
    conversations comes Ctrl-C.
    """

    name, judges, sees = "keyword", ("prompt_unsafe", "response_unsafe"), "last turn"

    def __init__(self, words=True, stop=None, thresholds=None, errors=None):
        self.words = words
        self.stop = stop
        self.thresholds = thresholds or {}
        self.errors = errors or {}
        self.asked = []
        self.labels = set()

    def judge_valid(self, conversations):
        if self.stop is not None and len(self.asked) >= self.stop:
            raise KeyboardInterrupt
        self.asked += conversations
        self.labels.update(self.wanted)
        return [self._one(messages[-1]) for messages in conversations]

    def _one(self, turn):
        text = turn["content"]
        word = text.split()[0]
        if word == "broken":
            return Verdict(error=self.errors.get(text, NO_WORD))
        label = LABEL[turn["role"]]
        score = SCORES.get(word, 0.125)
        decided = {label: score > 0.8} if self.words else {}
        return Verdict(**{label: score}, decided=decided)


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


def asked_of(made: judge.Candidate) -> list[str]:
    """The last turns that a guard was asked, each time that it was loaded."""
    return [messages[-1]["content"] for guard in made.load.made for messages in guard.asked]


def item(prompt, unsafe, response=None, domain="law"):
    """A row in ExpGuard's own columns."""
    word = "unsafe" if unsafe else "safe"
    return {
        "prompt": prompt,
        "response": response,
        "prompt_label": word,
        "response_label": word if response else None,
        "prompt_category": "c",
        "response_category": "c",
        "domain": domain,
        "scenario": "s",
    }


@pytest.fixture
def file(tmp_path):
    """12 rows: bad words are unsafe, but for one of each kind; one cannot be judged. Half of them
    are answered.
    """
    rows = [item(text, True, f"{text}, yes") for text in ("bad cat", "bad dog", "bad cow")]
    rows.append(item("bad hen", False, "bad hen, yes", "finance"))
    rows += [item(t, True, f"{t}, yes", "finance") for t in ("maybe fox", "broken owl")]
    rows.append(item("nice cat", True))
    rows += [item(f"nice {animal}", False) for animal in ("dog", "cow", "hen", "fox", "owl")]
    return write_rows(tmp_path / "rows.jsonl", rows)


@pytest.fixture
def arguments(tmp_path, file):
    """Arguments of a run on the prompts and responses of `file`; published numbers and intervals
    are left out.
    """

    def make(**changes):
        given = {
            "benchmarks": [f"{PROMPTS}@{file}", f"{RESPONSES}@{file}"],
            "output_dir": str(tmp_path / "out"),
            "bootstrap_rounds": 0,
        }
        return evaluate.EvaluationArguments(**(given | changes))

    return make


@pytest.fixture
def run(arguments):
    """`run(*guards, **changes)`: the results of guards with these arguments."""
    return lambda *guards, **changes: evaluate.evaluate(arguments(**changes), list(guards))


def cells(results, name="keyword"):
    return {cell["benchmark"]: cell for cell in results["cells"] if cell["guard"] == name}


def table(folder: Path) -> str:
    return (folder / "out/results.md").read_text()


# --- tables ---------------------------------------------------------------------------------------


def test_a_run_from_rows_to_tables(run, tmp_path):
    plain = candidate("plain", words=False)
    run(candidate(known="expguard"), plain, bootstrap_rounds=50, compare="keyword,plain")
    out = tmp_path / "out"
    results = read_json(out / "results.json")
    # prompts: 6 of 12 unsafe; found: cat, dog, cow; wrong: hen; missed: maybe fox, nice cat; broken
    # owl has no verdict
    prompts = cells(results)[PROMPTS]
    assert prompts["rows"] == 12
    assert prompts["positives"] == 6
    assert prompts["f1"] == 6 / 10
    assert prompts["errors"] == 1
    assert set(prompts["groups"]["domain"]) == {"law", "finance"}
    responses = cells(results)[RESPONSES]
    assert responses["rows"] == 6
    assert responses["f1"] == 6 / 9
    without_words = cells(results, "plain")[PROMPTS]
    assert without_words["f1"] == 8 / 11
    assert without_words["decision"] == "score > 0.5"
    (compared,) = [one for one in results["comparison"] if one["benchmark"] == PROMPTS]
    assert compared["f1"]["difference"] == pytest.approx(6 / 10 - 8 / 11)
    assert compared["auroc"]["difference"] == 0
    text = table(tmp_path)
    assert "| keyword | 0.600 | 0.667 |" in text
    assert "| plain † | 0.727 |" in text
    assert "| last turn |" in text
    assert "Published numbers are left out" in text
    assert "expguard, published" not in text
    rows = read_rows(out / "predictions.jsonl")
    assert len(rows) == 18
    assert rows[0]["guards"]["plain"]["prompt_unsafe"] == 0.9
    assert rows[5]["guards"]["keyword"]["error"] == NO_WORD
    written = {path.name for path in out.iterdir()}
    assert written >= {"results.csv", "results.html", "results.tex", "runs"}
    assert len(list((out / "precision-recall").iterdir())) == 2


def test_what_a_guard_loses_on_a_modified_benchmark(run, tmp_path, file):
    """It knows words alone, so it finds nothing in base64; the plain benchmark is judged as well."""
    guard = replace(candidate(known="expguard"), released=True)
    modified = f"{PROMPTS}+base64"
    specs = [f"{modified}@{file}"]
    results = run(guard, benchmarks=specs, bootstrap_rounds=50, train_data=[str(file)])
    assert list(cells(results)) == [PROMPTS, modified]
    (drop,) = results["drops"]
    assert drop["guard"] == "keyword"
    assert drop["rows"] == 12
    assert drop["recall"]["a"] == 3 / 6
    assert drop["recall"]["difference"] == 3 / 6
    low, high = drop["recall"]["interval"]
    assert 0 < low < 3 / 6 < high
    assert drop["fpr"]["difference"] == pytest.approx(1 / 6)
    # what is known of the plain rows is known of these
    benchmarks = results["benchmarks"]
    assert benchmarks[modified]["contaminated"] == 12
    assert not benchmarks[modified]["complete"]
    assert results["guards"]["keyword"]["knows"] == list(benchmarks)
    text = table(tmp_path)
    assert "Paired drop, plain benchmark minus modified one" in text
    assert "mean of 2" not in text


def test_a_guard_that_fails_does_not_stop_the_others(run, tmp_path):
    def crash():
        raise RuntimeError("the card\nis full")

    broken = judge.Candidate("broken", "broken", "2", crash)
    deaf = judge.Candidate("deaf", "deaf", "3", Deaf)
    results = run(broken, deaf, candidate())
    assert {cell["status"] for cell in cells(results).values()} == {"measured"}
    reasons = {cell["reason"] for cell in cells(results, "broken").values()}
    assert reasons == {"RuntimeError: the card is full"}
    text = table(tmp_path)
    assert "| broken | expguardtest_prompt | RuntimeError: the card is full |" in text
    assert "| deaf | failed | not supported |" in text


def test_results_of_another_run_join_the_table(run, tmp_path):
    run(candidate())
    joined = {
        "add_results": [str(tmp_path / "out/results.json")],
        "output_dir": str(tmp_path / "joined/out"),
    }
    results = run(candidate("plain", words=False), **joined)
    assert set(results["guards"]) == {"keyword", "plain"}
    text = table(tmp_path / "joined")
    assert "| plain † | 0.727 |" in text
    assert "| keyword | 0.600 |" in text
    assert "Decided by" not in text
    old = json.loads((tmp_path / "out/results.json").read_text())
    del old["guards"]["keyword"]["decided_by"]  # as files before that rule was written down
    (tmp_path / "out/results.json").write_text(json.dumps(old))
    run(candidate("plain", words=False), **joined)
    assert "does not say: keyword; all others by the threshold" in table(tmp_path / "joined")
    late = candidate("late")
    with user_error(r"scored differently \(parse_errors"):
        run(late, **joined, parse_errors="excluded")
    with user_error(r"scored differently \(rows"):
        run(late, **joined, max_rows=3)
    assert not late.load.made  # known before any work


def test_rows_to_label_again_of_all_benchmarks(run, tmp_path):
    """The near ones by each guard's own threshold, and those on which two guards disagree."""
    fitted = {"flagged": {"value": 0.7, "how": "max F1", "on": "validation"}}
    strict = candidate("strict", "2", words=False, thresholds=fitted)
    run(candidate(words=False), strict, export_uncertain=2)
    path = tmp_path / "out/uncertain.jsonl"
    prompt, response = read_rows(path)
    for row in (prompt, response):  # 0.6 is above 0.5, and not above 0.7
        assert row["why"] == "near the threshold"
        assert row["prompt"] == "maybe fox"
        assert row["scores"] == {"keyword": 0.6, "strict": 0.6}
    assert prompt["prompt_label"] is True
    assert response["response_label"] is True
    assert load_conversations(str(path))["response_unsafe"].count(True) == 1


class Anew(KeywordGuard):
    """A guard of somebody's that overrides `judge`, and knows of nothing else."""

    def judge(self, conversations):
        return [self._one(messages[-1]) for messages in conversations]


def test_a_guard_that_overrides_judge_alone_works(run):
    """In the suite it says what one with `judge_valid` says, and GuardBench's call works too."""
    expected = run(candidate())
    anew = replace(candidate(identity="2"), load=Anew)
    assert cells(run(anew, overwrite=True)) == cells(expected)
    assert Anew().moderate([[{"role": "user", "content": "bad cat"}]]) == [0.9]


# --- verdicts that are kept -----------------------------------------------------------------------


def test_kept_verdicts(run, tmp_path):
    """Judged anew: everything of a guard that changed; a half-written line is dropped."""
    before = run(candidate())
    kept = tmp_path / "out/runs/keyword/expguardtest_prompt.jsonl"
    whole = kept.read_text()
    kept.write_text(whole + '{"id": "half')
    again = candidate()
    assert run(again)["cells"] == before["cells"]
    assert not again.load.made
    assert kept.read_text() == whole
    changed = candidate(identity="2")
    run(changed)
    assert len(asked_of(changed)) == 18
    assert kept.read_text().startswith(whole)
    kept.write_text("no json\n")
    with user_error(r"expguardtest_prompt\.jsonl, line 1.* remove the file"):
        run(candidate())


def test_kept_verdicts_of_more_or_fewer_guards(run, arguments):
    """What is not asked for this time is there the next time."""
    whole = run(candidate("a"), candidate("b"))
    run(candidate("a"), benchmarks=arguments().benchmarks[1:], overwrite=True)
    three = [candidate(name) for name in ("b", "c", "a")]
    results = run(*three)
    assert [len(asked_of(guard)) for guard in three] == [0, 18, 0]
    assert cells(results, "a") == cells(whole, "a")
    assert cells(results, "b") == cells(whole, "b")


LASTING = [
    "9000 tokens, more than --max_length 4096",
    "it writes ' the' where ' yes' or ' no' was expected",
    "no Refusal: in what it wrote: 'Safety: Safe'",
    "Error code: 400 - {'message': 'the prompt is too long'}",
    "perspective: empty text",
]
PASSING = [
    "Connection error.",
    "Request timed out.",
    "Error code: 503 - overloaded",
    "openai-moderation: HTTP 429, 6 times",
    "perspective: HTTP 400 API_KEY_INVALID: check PERSPECTIVE_API_KEY",
    "not asked: http://127.0.0.1:1/v1: it fails; 3 of 9 prompts were not asked",
]


def test_errors_that_may_go_away_are_asked_again(run, file):
    """Those of a server or of the way to it; what a model says of a text it says each time."""
    errors = {f"broken {error}": error for error in LASTING + PASSING}
    write_rows(file, [item(text, True) for text in errors] + [item("nice", False)])
    specs = [f"{PROMPTS}@{file}"]
    run(candidate(served=True, errors=errors), benchmarks=specs)
    again = candidate(served=True, errors=errors)
    run(again, benchmarks=specs)
    assert [errors[text] for text in asked_of(again)] == PASSING


def test_a_run_that_was_stopped_goes_on(run, tmp_path, file, monkeypatch):
    """To the predictions of a run that was left alone. A chunk that is cut is judged as a whole."""
    rows = [item(f"{'bad' if i % 3 else 'nice'} {i}", i % 2, f"answer {i}") for i in range(40)]
    write_rows(file, rows)
    run(candidate(), output_dir=str(tmp_path / "whole"))
    monkeypatch.setitem(evaluate.CHUNK, "transformers", 2)
    with pytest.raises(KeyboardInterrupt):
        run(candidate(stop=20))
    out = tmp_path / "out"
    assert not (out / "results.json").exists()
    kept = out / "runs/keyword/expguardtest_prompt.jsonl"
    kept.write_text(kept.read_text()[:-10])  # 19 lines, and half of another
    rest = candidate()
    run(rest)
    assert len(asked_of(rest)) == 80 - 18
    for name in ("predictions.jsonl", "results.csv"):
        assert (out / name).read_text() == (tmp_path / "whole" / name).read_text()


SLOW_RUN = """
import sys
import time

sys.path[:0] = {tests}
import test_suite_evaluate as tests


class Slow(tests.KeywordGuard):
    def judge_valid(self, conversations):
        time.sleep(0.3 * len(conversations))
        return super().judge_valid(conversations)


slow = tests.replace(tests.candidate(), load=Slow)
tests.evaluate.CHUNK.update(transformers=2)
args = tests.evaluate.EvaluationArguments(
    output_dir={out!r}, benchmarks={benchmarks!r}, bootstrap_rounds=0
)
tests.evaluate.evaluate(args, [slow])
"""


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on(run, arguments, tmp_path, file, monkeypatch):
    """A real process, killed between two writes: what it had written is there and whole lines."""
    rows = [item(f"{'bad' if i % 3 else 'nice'} {i}", i % 2, f"answer {i}") for i in range(40)]
    write_rows(file, rows)
    run(candidate(), output_dir=str(tmp_path / "whole"))
    out = tmp_path / "out"
    code = SLOW_RUN.format(
        tests=[str(folder) for folder in Path(__file__).parents[:2]],
        out=str(out),
        benchmarks=arguments().benchmarks,
    )
    kept = out / "runs/keyword/expguardtest_prompt.jsonl"
    kill_when_written(kept, ["-c", code], tmp_path)
    lines = kept.read_text().count("\n")
    assert 0 < lines < 40
    assert not (out / "results.json").exists()
    rest = candidate()
    monkeypatch.setitem(evaluate.CHUNK, "transformers", 2)
    run(rest)
    assert len(asked_of(rest)) == 80 - lines + lines % 2  # half a chunk is judged as a whole
    for name in ("predictions.jsonl", "results.csv"):
        assert (out / name).read_text() == (tmp_path / "whole" / name).read_text()


# --- thresholds -----------------------------------------------------------------------------------

OWN_THRESHOLD = {"flagged": {"value": 0.95, "how": "max F1, n=9", "on": "own"}}


def test_the_guards_own_threshold(run, tmp_path):
    """ "flagged" is a threshold of harm; the page has it, and not that of a category."""
    category = {"value": 0.2, "how": "max F1", "on": "some/rows:validation"}
    results = run(candidate(thresholds=OWN_THRESHOLD | {"fraud": category}))
    cell = cells(results)[PROMPTS]
    assert cell["threshold"]["value"] == 0.95
    assert cell["recall_at_validation"] == 0.0
    assert cell["convention"]["threshold"] == "guard.json: max F1"
    page = (tmp_path / "out/results.html").read_text()
    assert '{"name": "keyword", "threshold": 0.95}' in page


def test_a_threshold_decides_before_words(run, arguments, tmp_path):
    """0.6 is above a threshold of 0.55, and not of 0.7; the guard's word for it is safe."""
    unfitted = {"flagged": {"value": 0.7, "how": "chosen by hand"}}
    of_prompts = unfitted | {"prompt_unsafe": {"value": 0.55, "how": "max F1", "on": "own"}}
    guards = [
        candidate("worded", "1"),
        candidate("worded at 0.55", "2", thresholds=of_prompts),
        candidate("at 0.55", "3", words=False, thresholds=of_prompts),
        candidate("at 0.7", "4", words=False, thresholds=unfitted),
    ]
    results = run(*guards, benchmarks=arguments().benchmarks[:1], parse_errors="excluded")
    found = {}
    for cell in results["cells"]:
        fitted = cell["threshold"] is not None
        found[cell["guard"]] = (cell["decision"], cell["recall"], fitted)
    assert found == {
        "worded": ("own word", 3 / 5, False),
        "worded at 0.55": ("score > 0.55", 4 / 5, True),
        "at 0.55": ("score > 0.55", 4 / 5, True),
        "at 0.7": ("score > 0.7", 3 / 5, False),
    }
    text = table(tmp_path)
    assert "| at 0.7 † |" in text
    assert "| worded † |" not in text


def test_a_threshold_of_validation_rows(run, tmp_path):
    rows = [item(f"maybe {i}", True, f"maybe {i}") for i in range(3)]
    rows += [item(f"nice {i}", False, f"n {i}") for i in range(3)]
    rows.append(item("broken", False, "broken"))
    validation = str(write_rows(tmp_path / "validation.jsonl", rows))
    results = run(candidate(thresholds=OWN_THRESHOLD), validation=[validation])
    threshold = cells(results)[RESPONSES]["threshold"]
    assert threshold["value"] == pytest.approx(0.3625)
    assert threshold["how"] == "max F1, n=6"
    assert threshold["on"] == validation
    assert cells(results)[PROMPTS]["recall_at_validation"] == 4 / 6
    assert "F1 at the threshold of the validation data" in table(tmp_path)
    page = (tmp_path / "out/results.html").read_text()
    assert f'{{"name": "keyword", "threshold": {threshold["value"]}}}' in page


# --- rows that were trained on --------------------------------------------------------------------

LONG = "bad cat that sits on the mat and looks out of the window all day"


def test_near_copies_of_training_rows(run, tmp_path):
    """With and without rows that are nearly training rows, beside those whose prompt is one."""
    rows = [item(LONG, True), item(f"{LONG} long", True), item("nice dog", False)]
    path = write_rows(tmp_path / "near.jsonl", rows)
    trained = {"prompt": LONG.upper(), "prompt_label": "unsafe"}
    train = write_rows(tmp_path / "train.jsonl", [trained])
    results = run(candidate(), benchmarks=[f"{PROMPTS}@{path}"], train_data=[str(train)])
    without = cells(results)[PROMPTS]["without"]
    assert without["contaminated"]["rows"] == 2
    assert without["near_copy"]["rows"] == 1
    assert results["benchmarks"][PROMPTS]["near_copy"] == 2
    assert "| without near_copy | 1 |" in table(tmp_path)


def described(folder: Path, **facts) -> Path:
    """A classifier's folder with a guard.json."""
    labels = taxonomy("beavertails")
    given = {"template": "beavertails", "labels": labels, "max_length": 512} | facts
    write_card(folder, ClassifierCard(**given))
    return folder


def test_what_a_guards_card_says_that_it_was_trained_on(run, tmp_path, tiny_classifier):
    """Marked in its own tables, and not in those of the guard beside it."""
    rows = [item(f"{LONG} long", True, "yes"), item("nice dog", False, "no")]
    path = write_rows(tmp_path / "near.jsonl", rows)
    trained = {"prompt": LONG, "response": "yes", "response_label": "unsafe"}
    train = write_rows(tmp_path / "train.jsonl", [trained])
    folder = described(tiny_classifier(tmp_path / "run/best"), data={"train_data": str(train)})
    (own,) = judge.candidates([str(folder)], {})
    specs = [f"{RESPONSES}@{path}"]
    results = run(own, candidate(), benchmarks=specs)
    ours = cells(results, "run/best")[RESPONSES]
    assert ours["without"]["near_copy"]["rows"] == 1
    assert cells(results)[RESPONSES]["without"] == {}
    assert results["guards"]["run/best"]["train_data"] == "1 rows"
    assert results["guards"]["keyword"]["train_data"] == "not known"
    train.unlink()
    results = run(own, benchmarks=specs)
    assert results["guards"]["run/best"]["train_data"] == "not read"
    assert cells(results, "run/best")[RESPONSES]["without"] == {}


def test_what_a_guard_of_the_zoo_was_trained_on(tmp_path, tiny_classifier):
    """Its name says so; a folder's own does not."""
    folder = tiny_classifier(tmp_path)
    (zoo,) = judge.candidates([f"beaver-dam-7b={folder}"], {})
    (own,) = judge.candidates([f"mine={described(folder)}"], {})
    facts = {"contaminated_by": []}
    names = ("beavertails", "saferlhf")
    made = [Benchmark(name, "response_unsafe", [], facts) for name in names]
    assert evaluate.describe_guard(zoo, made)["knows"] == ["beavertails"]
    assert evaluate.describe_guard(own, made)["knows"] == []


def test_guards_are_compared_by_the_papers_names(run, tmp_path):
    run(candidate("expguard"), candidate("plain"), bootstrap_rounds=50, compare="ExpGuard,plain")
    (compared, *_) = read_json(tmp_path / "out/results.json")["comparison"]
    assert {compared["a"], compared["b"]} == {"expguard", "plain"}


# --- the command line -----------------------------------------------------------------------------

FEW = "few=beavertails-sample:train[:9]"
MISTAKES = {  # what is wrong: arguments, what is said
    "task": ({"task_type": "both sides"}, "--task_type both sides: expected one of"),
    "nothing of the task": ({"task_type": "refusal"}, "--task_type refusal: none is left"),
    "rule for errors": ({"parse_errors": "safe"}, "--parse_errors safe: expected one of"),
    "no address": ({"engine": "server"}, "--engine server: needs --server_url"),
    "no rows": ({"max_rows": 0}, "--max_rows 0"),
    "nobody to compare": ({"compare": "keyword,nobody"}, "--compare keyword,nobody"),
    "no such file": ({"benchmarks": ["xstest_prompt@no.csv"]}, "no.csv"),
    "a benchmark to fit on": (
        {"validation": ["toxicchat"]},
        "--validation toxicchat: is test data",
    ),
    "a test split to fit on": (
        {"validation": ["some/rows:test"]},
        "--validation some/rows:test: is test data",
    ),
    "the judged split to fit on": (
        {"benchmarks": [FEW], "validation": ["beavertails-sample:train"]},
        "is test data",
    ),
    "a part of the judged split": (
        {
            "benchmarks": [FEW],
            "validation": ["beavertails-sample:validation+train[9:]"],
        },
        "is test data",
    ),
    "the judged rows to fit on": ({"validation": ["{file}"]}, "is test data"),
    "one class to fit on": ({"validation": ["{one_class}"]}, "have one class"),
    "no results": ({"add_results": ["no.json"]}, r"--add_results no\.json: .*no such file"),
    "which numbers": ({"published": "some"}, "--published some"),
}


@pytest.mark.parametrize(("changes", "place"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_before_any_work(run, tmp_path, file, changes, place):
    one_class = write_rows(tmp_path / "one.jsonl", [item("bad", True, "bad")])
    given = dict(changes)
    if "validation" in given:
        given["validation"] = [
            spec.format(file=file, one_class=one_class) for spec in given["validation"]
        ]
    guard = candidate()
    with user_error(place):
        run(guard, **given)
    assert not guard.load.made
    assert not (tmp_path / "out").exists()


def test_the_same_guard_twice(run):
    with user_error("--guards: keyword stands there twice"):
        run(candidate(), candidate())


def test_names_of_guards(tmp_path, tiny_classifier):
    folder = described(tiny_classifier(tmp_path / "run/best"))
    names = {
        f"beaver-dam-7b={folder}": "beaver-dam-7b",
        "openai-moderation:model=m,timeout=3": "openai-moderation (model=m,timeout=3)",
        str(folder): "run/best",
        f"mine={folder}": "mine",
        f"{folder}:max_length=64": "run/best (max_length=64)",
        "PKU-Alignment/beaver-dam-7b": "beaver-dam-7b",
    }
    found = judge.candidates(list(names), {})
    assert [guard.name for guard in found] == list(names.values())
    _, _, plain, renamed, shorter, _ = found
    assert shorter.load().max_length == 64
    assert plain.identity == renamed.identity  # the same guard by another name
    assert plain.identity != shorter.identity
    described(folder, max_length=99)
    (changed,) = judge.candidates([str(folder)], {})
    assert changed.identity != plain.identity


def test_a_guard_that_is_not_there_is_in_the_table(
    monkeypatch, tmp_path, file, tiny_classifier, capsys
):
    """The exit code is 1, and what is no response is left out of `--task_type response`."""
    guard = f"beaver-dam-7b={tiny_classifier(tmp_path / 'guard')}"
    argv = ["evaluate.py", "--guards", guard, str(tmp_path / "nothing")]
    argv += ["--benchmarks", f"{RESPONSES}@{file}", f"{PROMPTS}@{file}"]
    argv += ["--task_type", "response", "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*argv, "--bootstrap_rounds", "20"])
    with pytest.raises(SystemExit) as stopped:
        evaluate.main()
    assert stopped.value.code == 1
    text = capsys.readouterr().out
    assert PROMPTS not in text
    assert "| beaver-dam-7b † |" in text
    assert "no folder here, and no hub id that loads" in text
