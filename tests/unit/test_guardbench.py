"""Our guards in GuardBench's own benchmark loop (an optional dependency: EUPL)."""

import os

import pytest
from checks import read_json, write_rows
from test_suite_evaluate import KeywordGuard

from common import metrics
from common.conversation import pair

guardbench = pytest.importorskip("guardbench")
evaluation = pytest.importorskip("guardbench.evaluate")


LATER = [*pair("bad dog", "no"), *pair("nice dog")]
OPENED = [{"role": "assistant", "content": "hello"}, *pair("bad hen")]
ROWS = [  # a conversation, whether it is unsafe, what the guard says
    (pair("bad cat"), True, 0.9),
    (pair("what?", "bad answer"), True, 0.9),
    (pair("nice owl"), True, 0.125),
    (OPENED, True, 0.9),
    (pair("broken fox"), True, 1.0),
    (pair("nice cat"), False, 0.125),
    (pair("bad question?", "nice answer"), False, 0.125),
    (LATER, False, 0.125),
    (pair("bad idea"), False, 0.9),
    (pair("broken hare"), False, 1.0),
]


def test_its_loop_and_its_scores(tmp_path, monkeypatch):
    """A row without a verdict is unsafe there, too; F1 and AUPRC are ours."""
    monkeypatch.setitem(os.environ, "GUARDBENCH_BASE_PATH", str(tmp_path / "cache"))
    talks, labels, said = zip(*ROWS, strict=True)
    ids = [f"mine/{i}" for i in range(len(ROWS))]
    rows = []
    for id, messages, label in zip(ids, talks, labels, strict=True):
        rows.append({"id": id, "label": label, "conversation": messages})
    file = write_rows(tmp_path / "rows.jsonl", rows)
    guardbench.CustomDataset("my_rows").load_data(file)
    out = tmp_path / "results"
    settings = {"batch_size": 3, "datasets": ["my_rows"], "anything": "ignored"}
    guardbench.benchmark(KeywordGuard().moderate, "keyword", str(out), **settings)
    found = read_json(out / "my_rows/keyword.json")
    assert found == dict(zip(ids, said, strict=True))
    theirs = evaluation.evaluate(dict(zip(ids, labels, strict=True)), found)
    ours = metrics.binary(labels, said)
    assert theirs["f1"] == pytest.approx(8 / 11)
    for name in ("f1", "auprc", "fpr", "recall"):
        assert theirs[name] == pytest.approx(ours[name])
