"""Thresholds for an operating point, intervals, and what is said of them in words."""

import numpy as np
import pytest
from checks import user_error

from common import metrics, report
from common.data import load_conversations


@pytest.fixture
def rows() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    truth = draw.random(500) < 0.3
    score = np.clip(draw.normal(0.35 + 0.3 * truth, 0.2), 0, 1)
    return truth, score


@pytest.mark.parametrize("target", [0.01, 0.05, 0.5])
def test_the_lowest_threshold_that_keeps_to_the_false_positives(rows, target):
    truth, score = rows
    point = metrics.OperatingPoint(target_fpr=target)
    fitted = metrics.fit_threshold(truth, score, "validation", point)
    at = metrics.binary(truth, score, fitted["value"])
    assert at["fpr"] <= target
    assert at["recall"] == metrics.recall_at_fpr(truth, score, target)
    assert fitted["how"] == f"at most {target:g} false positives, n=500"


@pytest.mark.parametrize("target", [0.5, 0.9, 0.99])
def test_the_highest_threshold_that_reaches_the_recall(rows, target):
    truth, score = rows
    point = metrics.OperatingPoint(target_recall=target)
    value = metrics.fit_threshold(truth, score, "validation", point)["value"]
    at = metrics.binary(truth, score, value)
    assert at["recall"] >= target
    above = min(level for level in score if level > value)
    assert metrics.binary(truth, score, above)["recall"] < target


def test_a_threshold_never_lets_all_pass():
    """A score of 1 that is safe: even then what failed, which counts as 1, is flagged."""
    point = metrics.OperatingPoint(target_fpr=0.01)
    assert metrics.fit_threshold([0, 1], [1.0, 0.5], "validation", point)["value"] < 1.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"target_fpr": 1.0}, "--target_fpr 1.0"),
        ({"target_recall": 0.0}, "--target_recall 0.0"),
        ({"target_fpr": 0.1, "target_recall": 0.9}, "give one of them"),
    ],
    ids=["everything", "nothing", "both"],
)
def test_a_point_that_cannot_be_is_refused(flags, message):
    with user_error(message):
        metrics.OperatingPoint(**flags).check_operating_point()


def test_benign_traffic_alone_has_false_positives_with_an_interval(tmp_path):
    path = tmp_path / "benign.jsonl"
    row = '{"prompt": "Rice?", "response": "Boil it.", "response_label": false}\n'
    path.write_text(row * 20)
    with user_error("no positive row"):
        load_conversations(str(path), require=("response_unsafe",))
    loaded = load_conversations(str(path), require=("response_unsafe",), need_positive=False)
    truth = loaded["response_unsafe"]
    score = [0.9] * 4 + [0.1] * 16
    found = metrics.intervals(truth, score, 0.5)
    low, high = found["fpr_interval"]
    assert low < metrics.binary(truth, score)["fpr"] == 0.2 < high
    assert found["auroc_interval"] is None
    report.plot_precision_recall({"guard": (truth, score)}, tmp_path / "none.png", "benign")
    assert not (tmp_path / "none.png").exists()


def test_what_intervals_say_is_said_in_words():
    scores = {
        "guard": {"auroc_interval": [0.45, 0.55]},
        "words": {"auroc_interval": [0.7, 0.8], "guard_gain_interval": [-0.1, 0.1]},
        "coin": {"auroc_interval": [0.3, 0.4], "guard_gain_interval": [0.1, 0.2]},
    }
    assert report.findings(scores) == [
        "guard cannot be told from chance here: its AUROC is in [0.450, 0.550].",
        "guard is not better than words here: its AUPRC is [-0.100, 0.100] above.",
        "coin is worse than chance here: its AUROC is in [0.300, 0.400].",
    ]
