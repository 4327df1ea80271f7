"""Our guards in GuardBench's own benchmark loop (an optional dependency: EUPL)."""

import json
import os

import numpy as np
import pytest

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


def conversations():
    """Prompts, answers, several turns, and one that begins with the assistant, each with its label."""
    later = [*pair("bad dog", "no"), *pair("nice dog")]
    opened = [{"role": "assistant", "content": "hello"}, *pair("bad hen")]
    unsafe = [
        pair("bad cat"),
        pair("what?", "bad answer"),
        pair("nice owl"),
        opened,
        pair("broken fox"),
    ]
    safe = [
        pair("nice cat"),
        pair("bad question?", "nice answer"),
        later,
        pair("bad idea"),
        pair("broken hare"),
    ]
    return [(messages, True) for messages in unsafe] + [(messages, False) for messages in safe]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(guard, rows, batch_size)`: predictions by id of GuardBench's loop on a data set of its
    custom kind.
    """
    monkeypatch.setitem(os.environ, "GUARDBENCH_BASE_PATH", str(tmp_path / "cache"))

    def go(guard, rows, batch_size):
        lines = [
            {"id": f"mine/{i}", "label": label, "conversation": m}
            for i, (m, label) in enumerate(rows)
        ]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        guardbench.CustomDataset("my_rows").load_data(tmp_path / "rows.jsonl")
        folder = tmp_path / "results"
        guardbench.benchmark(
            guard.moderate, guard.name, str(folder), batch_size, ["my_rows"], anything="ignored"
        )
        return json.loads((folder / "my_rows" / f"{guard.name}.json").read_text())

    return go


def test_its_loop_and_its_scores(run):
    """A row without a verdict is unsafe there, too; F1 and AUPRC are ours."""
    rows = conversations()
    found = run(KeywordGuard(), rows, 3)
    assert list(found) == [f"mine/{i}" for i in range(10)]
    assert list(found.values()) == [0.9, 0.9, 0.2, 0.9, 1.0, 0.2, 0.2, 0.2, 0.9, 1.0]
    truth = {f"mine/{i}": label for i, (_, label) in enumerate(rows)}
    theirs, ours = (
        evaluation.evaluate(truth, found),
        metrics.binary(list(truth.values()), list(found.values())),
    )
    assert (theirs["f1"], theirs["fpr"]) == pytest.approx((8 / 11, 2 / 5))
    assert {name: theirs[name] for name in ("f1", "auprc", "fpr", "recall")} == pytest.approx(
        {name: ours[name] for name in ("f1", "auprc", "fpr", "recall")}
    )


def test_a_trained_guard(run, tiny_classifier, tmp_path):
    guard = load_guard(str(tiny_classifier(tmp_path / "guard")))
    rows = [
        (messages, label)
        for messages, label in conversations()
        if messages[-1]["role"] == "assistant"
    ]
    found = run(guard, rows * 3, 4)
    verdicts = guard.judge([messages for messages, _ in rows * 3])
    assert np.allclose(list(found.values()), [v.response_unsafe for v in verdicts], atol=1e-5)
    assert all(type(value) is float for value in guard.moderate([rows[0][0]]))
