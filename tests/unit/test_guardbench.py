"""Our guards in GuardBench's own benchmark loop (an optional dependency: EUPL)."""

import os

import pytest
from checks import read_json, write_rows

from common import metrics
from common.conversation import Verdict, pair
from guards import Guard, load_guard

guardbench = pytest.importorskip("guardbench")
evaluation = pytest.importorskip("guardbench.evaluate")


class KeywordGuard(Guard):
    """Suspects what is bad; what is broken it cannot judge."""

    name, thresholds, judges = "keyword", {}, ("prompt_unsafe", "response_unsafe")

    def judge_valid(self, conversations):
        return [self._one(messages[-1]) for messages in conversations]

    def _one(self, turn):
        if "broken" in turn["content"]:
            return Verdict(error="no word of mine")
        label = "response_unsafe" if turn["role"] == "assistant" else "prompt_unsafe"
        return Verdict(**{label: 0.9 if "bad" in turn["content"] else 0.2})


LATER = [*pair("bad dog", "no"), *pair("nice dog")]
OPENED = [{"role": "assistant", "content": "hello"}, *pair("bad hen")]
ROWS = [  # a conversation, whether it is unsafe, what the guard says
    (pair("bad cat"), True, 0.9),
    (pair("what?", "bad answer"), True, 0.9),
    (pair("nice owl"), True, 0.2),
    (OPENED, True, 0.9),
    (pair("broken fox"), True, 1.0),
    (pair("nice cat"), False, 0.2),
    (pair("bad question?", "nice answer"), False, 0.2),
    (LATER, False, 0.2),
    (pair("bad idea"), False, 0.9),
    (pair("broken hare"), False, 1.0),
]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(guard, rows, batch_size)`: predictions by id of GuardBench's loop on a data set of its
    custom kind.
    """
    monkeypatch.setitem(os.environ, "GUARDBENCH_BASE_PATH", str(tmp_path / "cache"))

    def go(guard, conversations, labels, batch_size):
        rows = []
        for i, (messages, label) in enumerate(zip(conversations, labels, strict=True)):
            rows.append({"id": f"mine/{i}", "label": label, "conversation": messages})
        file = tmp_path / "rows.jsonl"
        write_rows(file, rows)
        guardbench.CustomDataset("my_rows").load_data(file)
        out = tmp_path / "results"
        settings = {"batch_size": batch_size, "datasets": ["my_rows"], "anything": "ignored"}
        guardbench.benchmark(guard.moderate, guard.name, str(out), **settings)
        return read_json(out / "my_rows" / f"{guard.name}.json")

    return go


def test_its_loop_and_its_scores(run):
    """A row without a verdict is unsafe there, too; F1 and AUPRC are ours."""
    talks, labels, said = zip(*ROWS, strict=True)
    found = run(KeywordGuard(), talks, labels, 3)
    assert found == {f"mine/{i}": score for i, score in enumerate(said)}
    truth = {f"mine/{i}": label for i, label in enumerate(labels)}
    theirs = evaluation.evaluate(truth, found)
    ours = metrics.binary(labels, said)
    assert theirs["f1"] == pytest.approx(8 / 11)
    for name in ("f1", "auprc", "fpr", "recall"):
        assert theirs[name] == pytest.approx(ours[name])


def test_a_trained_guard(run, tiny_classifier, tmp_path):
    guard = load_guard(str(tiny_classifier(tmp_path / "guard")))
    talks = [pair("what?", "bad answer"), pair("bad question?", "nice answer")] * 3
    found = run(guard, talks, [True, False] * 3, 4)
    verdicts = [verdict.response_unsafe for verdict in guard.judge(talks)]
    assert list(found.values()) == pytest.approx(verdicts, abs=1e-5)
