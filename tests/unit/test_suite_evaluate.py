"""guards/suite/evaluate.py: from rows to tables, in runs that are killed, fail, or go on."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import scripts

from common.conversation import UserError, Verdict
from common.data import load_conversations, taxonomy
from guards import Guard
from guards.card import ClassifierCard, write_card
from guards.suite import evaluate, judge
from guards.suite.benchmarks import Benchmark

LABEL = {"user": "prompt_unsafe", "assistant": "response_unsafe"}
SCORES = {"bad": 0.9, "maybe": 0.6}


class KeywordGuard(Guard):
    """Knows three words; "maybe" is a weak suspicion that it calls safe unless it has no words of
    its own.
    """

    name, judges, sees = "keyword", ("prompt_unsafe", "response_unsafe"), "last turn"

    def __init__(self, words=True, seconds=0.0, thresholds=None, error="no word of mine"):
        self.words = words
        self.seconds = seconds
        self.thresholds = thresholds or {}
        self.error = error
        self.asked = []
        self.labels = set()

    def judge_valid(self, conversations):
        time.sleep(self.seconds)
        self.asked += conversations
        self.labels.update(self.wanted)
        return [self._one(messages[-1]) for messages in conversations]

    def _one(self, turn):
        word = turn["content"].split()[0]
        if word == "broken":
            return Verdict(error=self.error)
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


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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
            "benchmarks": [f"expguardtest_prompt@{file}", f"expguardtest_response@{file}"],
            "output_dir": str(tmp_path / "out"),
            "bootstrap_rounds": 0,
        }
        return evaluate.EvaluationArguments(**(given | changes))

    return make


def cells(results, name="keyword"):
    return {c["benchmark"]: c for c in results["cells"] if c["guard"] == name}


def test_a_run_from_rows_to_tables(arguments, tmp_path):
    args = arguments(bootstrap_rounds=50, compare="keyword,plain")
    evaluate.evaluate(args, [candidate(known="expguard"), candidate("plain", words=False)])
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    # prompts: 6 of 12 unsafe; found: cat, dog, cow; wrong: hen; missed: maybe fox, nice cat; broken
    # owl has no verdict
    prompts = cells(results)["expguardtest_prompt"]
    assert prompts["rows"] == 12
    assert prompts["positives"] == 6
    assert prompts["f1"] == 6 / 10
    assert prompts["errors"] == 1
    assert set(prompts["groups"]["domain"]) == {"law", "finance"}
    responses = cells(results)["expguardtest_response"]
    assert responses["rows"] == 6
    assert responses["f1"] == 6 / 9
    plain = cells(results, "plain")["expguardtest_prompt"]
    assert plain["f1"] == 8 / 11
    assert plain["decision"] == "score > 0.5"
    compared = {c["benchmark"]: c for c in results["comparison"]}["expguardtest_prompt"]
    assert compared["f1"]["difference"] == pytest.approx(6 / 10 - 8 / 11)
    assert compared["auroc"]["difference"] == 0
    text = (out / "results.md").read_text()
    assert "| keyword | 0.600 | 0.667 |" in text
    assert "| plain † | 0.727 |" in text
    assert "| last turn |" in text
    assert "Published numbers are left out" in text
    rows = [json.loads(line) for line in (out / "predictions.jsonl").open()]
    assert len(rows) == 18
    assert rows[0]["guards"]["plain"]["prompt_unsafe"] == 0.9
    assert rows[5]["guards"]["keyword"]["error"] == "no word of mine"
    written = {path.name for path in out.iterdir()}
    assert written >= {"results.csv", "results.html", "results.tex", "runs"}
    assert len(list((out / "precision-recall").iterdir())) == 2


def test_what_a_guard_loses_on_a_modified_benchmark(arguments, tmp_path, file):
    """It knows words alone, so it finds nothing in base64; the plain benchmark is judged as well."""
    modified = f"expguardtest_prompt+base64@{file}"
    args = arguments(benchmarks=[modified], bootstrap_rounds=50, train_data=[str(file)])
    guard = replace(candidate(known="expguard"), released=True)
    results = evaluate.evaluate(args, [guard])
    assert [cell["benchmark"] for cell in results["cells"]] == [
        "expguardtest_prompt",
        "expguardtest_prompt+base64",
    ]
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
    assert benchmarks["expguardtest_prompt+base64"]["contaminated"] == 12
    assert not benchmarks["expguardtest_prompt+base64"]["complete"]
    assert results["guards"]["keyword"]["knows"] == list(benchmarks)
    text = (tmp_path / "out/results.md").read_text()
    assert "Paired drop, plain benchmark minus modified one" in text
    assert "mean of 2" not in text


def test_a_guard_that_fails_does_not_stop_the_others(arguments, tmp_path):
    def crash():
        raise RuntimeError("the card\nis full")

    broken = judge.Candidate("broken", "broken", "2", crash)
    deaf = judge.Candidate("deaf", "deaf", "3", Deaf)
    results = evaluate.evaluate(arguments(), [broken, deaf, candidate()])
    assert {c["status"] for c in cells(results).values()} == {"measured"}
    reasons = {c["reason"] for c in cells(results, "broken").values()}
    assert reasons == {"RuntimeError: the card is full"}
    text = (tmp_path / "out/results.md").read_text()
    assert "| broken | expguardtest_prompt | RuntimeError: the card is full |" in text
    assert "| deaf | failed | not supported |" in text


def asked_of(made: judge.Candidate) -> list[str]:
    """The last turns that a guard was asked, each time that it was loaded."""
    return [messages[-1]["content"] for guard in made.load.made for messages in guard.asked]


def test_kept_verdicts(arguments, tmp_path):
    """Judged anew: everything of a guard that changed; a half-written line is dropped."""
    before = evaluate.evaluate(arguments(), [candidate()])
    kept = tmp_path / "out/runs/keyword/expguardtest_prompt.jsonl"
    whole = kept.read_text()
    with kept.open("a") as file:
        file.write('{"id": "half')
    again = candidate()
    after = evaluate.evaluate(arguments(), [again])
    assert after["cells"] == before["cells"]
    assert not again.load.made
    assert kept.read_text() == whole
    changed = candidate(identity="2")
    evaluate.evaluate(arguments(), [changed])
    assert len(asked_of(changed)) == 18
    assert kept.read_text().startswith(whole)
    kept.write_text("no json\n")
    with pytest.raises(UserError, match=r"expguardtest_prompt\.jsonl, line 1.* remove the file"):
        evaluate.evaluate(arguments(), [candidate()])


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


@pytest.mark.parametrize("error", LASTING + PASSING)
def test_errors_that_may_go_away_are_asked_again(arguments, error):
    """Those of a server or of the way to it; what a model says of a text it says each time."""
    evaluate.evaluate(arguments(), [candidate(served=True, error=error)])
    again = candidate(served=True, error=error)
    evaluate.evaluate(arguments(), [again])
    assert asked_of(again) == (["broken owl", "broken owl, yes"] if error in PASSING else [])


def test_kept_verdicts_of_more_or_fewer_guards(arguments):
    """What is not asked for this time is there the next time."""
    whole = evaluate.evaluate(arguments(), [candidate("a"), candidate("b")])
    responses = arguments().benchmarks[1:]
    evaluate.evaluate(arguments(benchmarks=responses, overwrite=True), [candidate("a")])
    three = [candidate(name) for name in ("b", "c", "a")]
    results = evaluate.evaluate(arguments(), three)
    assert [len(asked_of(guard)) for guard in three] == [0, 18, 0]
    assert cells(results, "a") == cells(whole, "a")
    assert cells(results, "b") == cells(whole, "b")


def test_a_guard_is_asked_for_what_is_scored(arguments):
    """So that none generates text for a verdict that nobody reads."""
    guard = candidate()
    evaluate.evaluate(arguments(task_type="response"), [guard])
    assert guard.load.made[0].labels == {"response_unsafe"}


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
    rows = [item(f"{'bad' if i % 3 else 'nice'} {i}", i % 2, f"answer {i}") for i in range(40)]
    write_rows(file, rows)
    evaluate.evaluate(arguments(output_dir=str(tmp_path / "whole")), [candidate()])
    out = tmp_path / "out"
    code = SLOW_RUN.format(
        tests=[str(folder) for folder in Path(__file__).parents[:2]],
        out=str(out),
        benchmarks=arguments().benchmarks,
    )
    process = scripts.start([sys.executable, "-c", code])
    kept = out / "runs/keyword/expguardtest_prompt.jsonl"
    until = time.time() + 300
    while process.poll() is None and time.time() < until:
        if kept.is_file() and kept.stat().st_size:
            break
        time.sleep(0.02)
    process.kill()
    process.wait()
    lines = len(kept.read_text().splitlines())
    assert 0 < lines < 40
    assert not (out / "results.json").exists()
    rest = candidate()
    monkeypatch.setitem(evaluate.CHUNK, "transformers", 2)
    evaluate.evaluate(arguments(), [rest])
    assert len(asked_of(rest)) == 80 - lines + lines % 2
    for name in ("predictions.jsonl", "results.csv"):
        assert (out / name).read_text() == (tmp_path / "whole" / name).read_text()


OWN_THRESHOLD = {"flagged": {"value": 0.95, "how": "max F1, n=9", "on": "own"}}


def test_the_guards_own_threshold(arguments):
    """ "flagged" is a threshold of harm."""
    results = evaluate.evaluate(arguments(), [candidate(thresholds=OWN_THRESHOLD)])
    cell = cells(results)["expguardtest_prompt"]
    assert cell["threshold"]["value"] == 0.95
    assert cell["recall_at_validation"] == 0.0
    assert cell["convention"]["threshold"] == "guard.json: max F1"


def test_a_threshold_decides_before_words(arguments, tmp_path):
    """0.6 is above a threshold of 0.55, and not of 0.7; the guard's word for it is safe."""
    unfitted = {"flagged": {"value": 0.7, "how": "chosen by hand"}}
    of_prompts = unfitted | {"prompt_unsafe": {"value": 0.55, "how": "max F1", "on": "own"}}
    guards = [
        candidate("worded", "1"),
        candidate("worded at 0.55", "2", thresholds=of_prompts),
        candidate("at 0.55", "3", words=False, thresholds=of_prompts),
        candidate("at 0.7", "4", words=False, thresholds=unfitted),
    ]
    args = arguments(benchmarks=arguments().benchmarks[:1], parse_errors="excluded")
    results = evaluate.evaluate(args, guards)
    found = {}
    for guard in guards:
        cell = cells(results, guard.name)["expguardtest_prompt"]
        found[guard.name] = (cell["decision"], cell["recall"], cell["threshold"] is None)
    assert found == {
        "worded": ("own word", 3 / 5, True),
        "worded at 0.55": ("score > 0.55", 4 / 5, False),
        "at 0.55": ("score > 0.55", 4 / 5, False),
        "at 0.7": ("score > 0.7", 3 / 5, True),
    }
    text = (tmp_path / "out/results.md").read_text()
    assert "| at 0.7 † |" in text and "| worded † |" not in text


def test_the_page_has_the_guards_threshold_and_no_categorys(arguments, tmp_path):
    category = {"value": 0.2, "how": "max F1", "on": "some/rows:validation"}
    guard = candidate(thresholds=OWN_THRESHOLD | {"fraud": category})
    evaluate.evaluate(arguments(), [guard])
    page = (tmp_path / "out/results.html").read_text()
    assert '{"name": "keyword", "threshold": 0.95}' in page


def test_a_threshold_of_validation_rows(arguments, tmp_path):
    rows = [item(f"maybe {i}", True, f"maybe {i}") for i in range(3)]
    rows += [item(f"nice {i}", False, f"n {i}") for i in range(3)]
    rows.append(item("broken", False, "broken"))
    validation = str(write_rows(tmp_path / "validation.jsonl", rows))
    args = arguments(validation=[validation])
    results = evaluate.evaluate(args, [candidate(thresholds=OWN_THRESHOLD)])
    threshold = cells(results)["expguardtest_response"]["threshold"]
    assert threshold["value"] == pytest.approx(0.3625)
    assert threshold["how"] == "max F1, n=6"
    assert threshold["on"] == validation
    assert cells(results)["expguardtest_prompt"]["recall_at_validation"] == 4 / 6
    assert "F1 at the threshold of the validation data" in (tmp_path / "out/results.md").read_text()
    page = (tmp_path / "out/results.html").read_text()
    assert f'{{"name": "keyword", "threshold": {threshold["value"]}}}' in page


def test_contaminated_rows(arguments, tmp_path):
    train = write_rows(tmp_path / "train.jsonl", [{"prompt": "BAD  cat", "prompt_label": "unsafe"}])
    results = evaluate.evaluate(arguments(train_data=[str(train)]), [candidate()])
    assert cells(results)["expguardtest_prompt"]["without"]["contaminated"]["rows"] == 11


def test_near_copies_of_training_rows(arguments, tmp_path):
    """With and without rows that are nearly training rows, beside those whose prompt is one."""
    text = "bad cat that sits on the mat and looks out of the window all day"
    rows = [item(text, True), item(f"{text} long", True), item("nice dog", False)]
    path = write_rows(tmp_path / "near.jsonl", rows)
    train = write_rows(
        tmp_path / "train.jsonl", [{"prompt": text.upper(), "prompt_label": "unsafe"}]
    )
    args = arguments(benchmarks=[f"expguardtest_prompt@{path}"], train_data=[str(train)])
    results = evaluate.evaluate(args, [candidate()])
    without = cells(results)["expguardtest_prompt"]["without"]
    assert without["contaminated"]["rows"] == 2
    assert without["near_copy"]["rows"] == 1
    assert results["benchmarks"]["expguardtest_prompt"]["near_copy"] == 2
    assert "| without near_copy | 1 |" in (tmp_path / "out/results.md").read_text()


def test_what_a_guards_card_says_that_it_was_trained_on(arguments, tmp_path, tiny_classifier):
    """Marked in its own tables, and not in those of the guard beside it."""
    text = "bad cat that sits on the mat and looks out of the window all day"
    rows = [item(f"{text} long", True, "yes"), item("nice dog", False, "no")]
    path = write_rows(tmp_path / "near.jsonl", rows)
    trained = {"prompt": text, "response": "yes", "response_label": "unsafe"}
    train = write_rows(tmp_path / "train.jsonl", [trained])
    folder = tiny_classifier(tmp_path / "run" / "best")
    labels = taxonomy("beavertails")
    card = ClassifierCard(
        template="beavertails", labels=labels, max_length=512, data={"train_data": str(train)}
    )
    write_card(folder, card)
    (own,) = judge.candidates([str(folder)], {})
    args = arguments(benchmarks=[f"expguardtest_response@{path}"])
    results = evaluate.evaluate(args, [own, candidate()])
    ours = cells(results, "run/best")["expguardtest_response"]
    assert ours["without"]["near_copy"]["rows"] == 1
    assert cells(results)["expguardtest_response"]["without"] == {}
    assert results["guards"]["run/best"]["train_data"] == "1 rows"
    assert results["guards"]["keyword"]["train_data"] == "not known"
    train.unlink()
    results = evaluate.evaluate(args, [own])
    assert results["guards"]["run/best"]["train_data"] == "not read"
    assert cells(results, "run/best")["expguardtest_response"]["without"] == {}


def test_results_of_another_run_join_the_table(arguments, tmp_path):
    evaluate.evaluate(arguments(), [candidate()])
    other = str(tmp_path / "out/results.json")
    joined = arguments(add_results=[other], output_dir=str(tmp_path / "joined"))
    results = evaluate.evaluate(joined, [candidate("plain", words=False)])
    assert set(results["guards"]) == {"keyword", "plain"}
    text = (tmp_path / "joined/results.md").read_text()
    assert "| plain † | 0.727 |" in text
    assert "| keyword | 0.600 |" in text
    late = candidate("late")
    with pytest.raises(UserError, match=r"scored differently \(parse_errors"):
        evaluate.evaluate(replace(joined, parse_errors="excluded"), [late])
    with pytest.raises(UserError, match=r"scored differently \(rows"):
        evaluate.evaluate(replace(joined, max_rows=3), [late])
    assert not late.load.made  # known before any work


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"task_type": "both sides"}, "--task_type both sides: expected one of"),
        ({"task_type": "refusal"}, "--task_type refusal: none is left"),
        ({"parse_errors": "safe"}, "--parse_errors safe: expected one of"),
        ({"engine": "server"}, "--engine server: needs --server_url"),
        ({"max_rows": 0}, "--max_rows 0"),
        ({"compare": "keyword,nobody"}, "--compare keyword,nobody"),
        ({"benchmarks": ["xstest_prompt@no.csv"]}, "no.csv"),
        ({"validation": ["toxicchat"]}, "--validation toxicchat: is test data"),
        ({"validation": ["some/rows:test"]}, "--validation some/rows:test: is test data"),
        ({"add_results": ["no.json"]}, "--add_results no.json"),
        ({"published": "some"}, "--published some"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_is_named_before_any_work(arguments, tmp_path, change, place):
    guard = candidate()
    with pytest.raises(UserError, match=place):
        evaluate.evaluate(arguments(**change), [guard])
    assert not guard.load.made
    assert not (tmp_path / "out").exists()


def test_validation_rows_are_no_benchmark_and_have_both_classes(arguments, tmp_path, file):
    with pytest.raises(UserError, match="is test data"):
        evaluate.evaluate(arguments(validation=[str(file)]), [candidate()])
    sample = {"benchmarks": ["few=beavertails-sample:train[:9]"]}
    for rows in ("beavertails-sample:train", "beavertails-sample:validation+train[9:]"):
        with pytest.raises(UserError, match="is test data"):
            evaluate.evaluate(arguments(**sample, validation=[rows]), [candidate()])
    one = write_rows(tmp_path / "one.jsonl", [item("bad", True, "bad")])
    with pytest.raises(UserError, match="have one class"):
        evaluate.evaluate(arguments(validation=[str(one)]), [candidate()])


def test_the_same_guard_or_benchmark_twice(arguments):
    with pytest.raises(UserError, match="--guards: keyword stands there twice"):
        evaluate.evaluate(arguments(), [candidate(), candidate()])
    twice = arguments().benchmarks[:1] * 2
    with pytest.raises(UserError, match="expguardtest_prompt stands there twice"):
        evaluate.evaluate(arguments(benchmarks=twice), [candidate()])


# --- the command line -------------------------------------------------------------------------------------------------


def test_names_of_guards(tmp_path, tiny_classifier):
    folder = tiny_classifier(tmp_path / "run" / "best")
    card = {"template": "beavertails", "labels": taxonomy("beavertails")}
    write_card(folder, ClassifierCard(**card, max_length=512))
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
    assert found[4].load().max_length == 64
    identities = [guard.identity for guard in found]
    assert identities[2] == identities[3]  # the same guard by another name
    assert identities[2] != identities[4]
    write_card(folder, ClassifierCard(**card, max_length=99))
    assert judge.candidates([str(folder)], {})[0].identity != identities[2]


def test_what_a_guard_of_the_zoo_was_trained_on(tmp_path, tiny_classifier):
    """Its name says so; a folder's own does not."""
    folder = tiny_classifier(tmp_path)
    (zoo,) = judge.candidates([f"beaver-dam-7b={folder}"], {})
    labels = taxonomy("beavertails")
    write_card(folder, ClassifierCard(template="beavertails", labels=labels, max_length=512))
    (own,) = judge.candidates([f"mine={folder}"], {})
    facts = {"contaminated_by": []}
    names = ("beavertails", "saferlhf")
    made = [Benchmark(name, "response_unsafe", [], facts) for name in names]
    assert evaluate.describe_guard(zoo, made)["knows"] == ["beavertails"]
    assert evaluate.describe_guard(own, made)["knows"] == []


def test_exit_codes(monkeypatch, tmp_path, file, tiny_classifier, capsys):
    """0: all measured; 1: a guard failed, and the table says so."""

    def run(*guards):
        argv = ["evaluate.py", "--guards", *guards, "--task_type", "response"]
        argv += ["--benchmarks", f"expguardtest_response@{file}", f"expguardtest_prompt@{file}"]
        argv += ["--output_dir", str(tmp_path / "out"), "--bootstrap_rounds", "20"]
        monkeypatch.setattr(sys, "argv", argv)
        evaluate.main()
        return capsys.readouterr().out

    guard = f"beaver-dam-7b={tiny_classifier(tmp_path / 'guard')}"
    assert "| beaver-dam-7b † |" in run(guard)
    with pytest.raises(SystemExit) as stopped:
        run(guard, str(tmp_path / "nothing"))
    assert stopped.value.code == 1
    text = capsys.readouterr().out
    assert "expguardtest_prompt" not in text
    assert "| beaver-dam-7b † |" in text
    assert "no folder here, and no hub id that loads" in text


def test_rows_to_label_again_of_all_benchmarks(arguments, tmp_path):
    """The near ones by each guard's own threshold, and those on which two guards disagree."""
    fitted = {"flagged": {"value": 0.7, "how": "max F1", "on": "validation"}}
    guards = [candidate(words=False), candidate("strict", "2", words=False, thresholds=fitted)]
    evaluate.evaluate(arguments(export_uncertain=2), guards)
    text = (tmp_path / "out/uncertain.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["why"] for line in lines] == ["near the threshold"] * 2
    for line in lines:  # 0.6 is above 0.5, and not above 0.7
        assert line["prompt"] == "maybe fox"
        assert line["scores"] == {"keyword": 0.6, "strict": 0.6}
    assert [line["prompt_label"] for line in lines if "prompt_label" in line] == [True]
    assert [line["response_label"] for line in lines if "response_label" in line] == [True]
    assert load_conversations(str(tmp_path / "out/uncertain.jsonl"))["response_unsafe"].count(True)


class Anew(KeywordGuard):
    """A guard of somebody's that overrides `judge`, and knows of nothing else."""

    def judge(self, conversations):
        return [self._one(messages[-1]) for messages in conversations]


def test_a_guard_that_overrides_judge_alone_works(arguments):
    """In the suite it says what one with `judge_valid` says, and GuardBench's call works too."""
    expected = evaluate.evaluate(arguments(overwrite=True), [candidate()])
    anew = replace(candidate(identity="2"), load=Anew)
    results = evaluate.evaluate(arguments(overwrite=True), [anew])
    assert cells(results, "keyword") == cells(expected, "keyword")
    talk = [{"role": "user", "content": "bad cat"}]
    assert Anew().moderate([talk]) == [0.9]
