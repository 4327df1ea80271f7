"""Metrics against scikit-learn and brute force; what is undefined is None."""

import os
import sys
import time
from functools import partial
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import scripts
from hypothesis import strategies as st
from sklearn import metrics as sk

from common import guard_metrics, metrics


def given(*strategies):
    """Fewer examples, because scikit-learn is slow on small input, and no deadline, because
    machines differ.
    """
    return lambda test: hypothesis.settings(max_examples=30, deadline=None)(
        hypothesis.given(*strategies)(test)
    )


UNIT = st.floats(0, 1)
ROWS = st.lists(
    st.tuples(st.booleans(), st.one_of(UNIT, st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))),
    max_size=60,
)
BOTH = ROWS.filter(lambda rows: {y for y, _ in rows} == {True, False})


def columns(rows) -> tuple[np.ndarray, np.ndarray]:
    return np.array([y for y, _ in rows], dtype=bool), np.array([p for _, p in rows], dtype=float)


def rates(y: np.ndarray, p: np.ndarray, threshold: float) -> tuple[float, float, float]:
    """F1, recall and false-positive rate of `p > threshold`, for truths with both classes."""
    hit = p > threshold
    return sk.f1_score(y, hit, zero_division=0), hit[y].mean(), hit[~y].mean()


def every_threshold(p: np.ndarray) -> list[float]:
    """One threshold for each set of rows that `p > threshold` with a threshold in [0, 1] can flag."""
    return [0.0, *p] + ([np.nextafter(p.min(), 0)] if p.min() > 0 else [])


@given(BOTH, UNIT)
def test_binary_equals_sklearn(rows, threshold):
    y, p = columns(rows)
    flagged = p > threshold
    recalls = {}
    for share in (0.01, 0.05):
        at_levels = map(partial(rates, y, p), [-1.0, *p, 1.0])
        recalls[share] = max(recall for _, recall, fpr in at_levels if fpr <= share)
    expected = {
        "support": len(y),
        "positives": y.sum(),
        "base_rate": y.mean(),
        "always_unsafe_f1": sk.f1_score(y, np.ones_like(y)),
        "threshold": threshold,
        "accuracy": sk.accuracy_score(y, flagged),
        "precision": sk.precision_score(y, flagged) if flagged.any() else None,
        "recall": sk.recall_score(y, flagged),
        "f1": sk.f1_score(y, flagged, zero_division=0),
        "fpr": 1 - sk.recall_score(~y, ~flagged),
        "auprc": sk.average_precision_score(y, p),
        "auroc": sk.roc_auc_score(y, p),
        "recall_at_fpr01": recalls[0.01],
        "recall_at_fpr05": recalls[0.05],
        "brier": sk.brier_score_loss(y, p),
    }
    found = metrics.binary(y, p, threshold)
    assert all(value is None or type(value) in (int, float) for value in found.values())
    del found["ece"]
    assert found == pytest.approx(expected)


def test_threshold_is_strict():
    assert metrics.binary([True, False], [0.5, 0.5], 0.5)["recall"] == 0.0
    assert metrics.binary([True, False], [0.5, 0.5], 0.49)["recall"] == 1.0


OF_UNSAFE = {"always_unsafe_f1", "recall", "f1", "auprc"}
OF_BOTH = {"auroc", "recall_at_fpr01", "recall_at_fpr05"}


@pytest.mark.parametrize(
    ("truth", "score", "undefined"),
    [
        ([False, False], [0.9, 0.1], OF_UNSAFE | OF_BOTH),
        ([True, True], [0.9, 0.1], OF_BOTH | {"fpr"}),
        ([True, False], [0.2, 0.1], {"precision"}),
        (
            [],
            [],
            OF_UNSAFE | OF_BOTH | {"precision", "fpr", "base_rate", "accuracy", "ece", "brier"},
        ),
    ],
    ids=["all safe", "all unsafe", "nothing flagged", "empty"],
)
def test_undefined_is_none(truth, score, undefined, recwarn):
    found = metrics.binary(truth, score)
    assert {k for k, v in found.items() if v is None} == undefined
    assert not any(v != v for v in found.values())
    assert not recwarn.list


@given(BOTH, st.sampled_from([0.0, 0.05, 0.2, 0.5, 1.0]))
def test_recall_at_fpr_by_brute_force(rows, target):
    y, p = columns(rows)
    recalls = [recall for _, recall, fpr in map(partial(rates, y, p), [-1.0, *p]) if fpr <= target]
    assert metrics.recall_at_fpr(y, p, target) == pytest.approx(max(recalls))


def test_ece_by_hand():
    # Bin [0.2, 0.3): mean score 0.25, no positive. Bin [0.9, 1]: mean score 0.95, half positive.
    error = metrics.expected_calibration_error([0, 0, 1, 0], [0.2, 0.3 - 1e-9, 0.9, 1.0])
    assert error == pytest.approx((0.25 + 0.45) / 2)
    assert metrics.expected_calibration_error([0, 1], [0.0, 1.0]) == 0.0
    assert metrics.expected_calibration_error([], []) is None


def test_multilabel_is_flagged_and_each_category():
    truth = np.array([[1, 0], [0, 0], [1, 1]])
    score = np.array([[0.9, 0.2], [0.1, 0.7], [0.3, 0.4]])
    assert metrics.multilabel(truth, score, ["a", "b, c"], 0.6) == {
        "flagged": metrics.binary([1, 0, 1], [0.9, 0.7, 0.4], 0.6),
        "a": metrics.binary([1, 0, 1], [0.9, 0.1, 0.3], 0.6),
        "b, c": metrics.binary([0, 0, 1], [0.2, 0.7, 0.4], 0.6),
    }
    nothing = np.zeros((0, 2))
    assert metrics.multilabel(nothing, nothing, ["a", "b"])["flagged"]["f1"] is None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: metrics.binary([True], [0.1, 0.2]), "one length"),
        (lambda: metrics.binary([[True]], [[0.1]]), "one length"),
        (lambda: metrics.binary([True, False], [0.5, 1.01]), "probabilities"),
        (lambda: metrics.binary([True, False], [-0.1, 1]), "probabilities"),
        (lambda: metrics.binary([True, False], [float("nan"), 1]), "probabilities"),
        (lambda: metrics.binary([True, None], [0.1, 0.2]), "true or false"),
        (lambda: metrics.binary(["safe", "unsafe"], [0.1, 0.2]), "true or false"),
        (lambda: metrics.multilabel(np.zeros((3, 2)), np.zeros((3, 2)), ["a"]), "longer"),
        (lambda: metrics.multilabel(np.zeros((3, 2)), np.zeros((2, 2)), ["a", "b"]), "one length"),
        (lambda: metrics.multilabel([1, 0], [0.1, 0.2], ["a"]), "axis 1"),
        (lambda: metrics.agreement([True], [True, False]), "one length"),
        (lambda: metrics.bootstrap(len, 3, groups=["a"]), "each of 3 rows"),
        (lambda: metrics.fit_threshold([1, 0], [0.3], "validation"), "one length"),
        (lambda: metrics.fit_threshold([1, 0], [0.3, 2], "validation"), "probabilities"),
        (lambda: metrics.fit_threshold([1, 1], [0.3, 0.2], "validation"), "one class"),
        (lambda: metrics.fit_threshold([], [], "validation"), "one class"),
        (lambda: metrics.fit_threshold([1, 0], [0.3, 0.2], "data:330k_test"), "test split"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@given(BOTH)
def test_fitted_threshold_has_the_best_f1(rows):
    y, p = columns(rows)
    fitted = metrics.fit_threshold(y, p, "validation")
    f1, _, _ = rates(y, p, fitted.pop("value"))
    assert f1 == pytest.approx(max(rates(y, p, other)[0] for other in every_threshold(p)))
    assert fitted == {"how": f"max F1, n={len(y)}", "on": "validation"}


def test_fitted_threshold_lies_half_way():
    assert metrics.fit_threshold([0, 1], [0.25, 0.75], "v")["value"] == 0.5
    scores = [0.3, float(np.nextafter(0.3, 1))]
    threshold = metrics.fit_threshold([0, 1], scores, "v")["value"]
    assert metrics.binary([0, 1], scores, threshold)["f1"] == 1


def test_threshold_fits_many_rows():
    """A table of rows x thresholds would need 10 GB here."""
    p = np.random.default_rng(0).random(100_000)
    assert metrics.fit_threshold(p > 0.7, p, "validation")["value"] == pytest.approx(0.7, abs=1e-4)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("PKU-Alignment/BeaverTails:330k_test", True),
        ("toxicchat:test", True),
        ("some/folder/test.jsonl", True),
        ("Test-2024.parquet", True),
        ("0.1 of rows_test.csv", True),
        ("latest.jsonl", False),
        ("contest:train", False),
        ("user/test-bed:validation", False),
        ("allenai/wildguardmix:wildguardtest", True),
        ("xstest.csv", True),
        ("test/validation.jsonl", False),
        ("validation", False),
        ("PKU-Alignment/BeaverTails:30k_train", False),
    ],
)
def test_is_test(spec, expected):
    assert metrics.is_test(spec) is expected


def test_bootstrap_depends_on_the_seed_alone():
    p = np.random.default_rng(1).random(50)
    mean = lambda rows: float(p[rows].mean())  # noqa: E731
    low, high = metrics.bootstrap(mean, 50)
    assert low < p.mean() < high
    assert metrics.bootstrap(mean, 50) == [low, high]
    assert metrics.bootstrap(mean, 50, seed=1) != [low, high]
    # The normal approximation of the same interval.
    assert high - low == pytest.approx(2 * 1.96 * p.std() / 50**0.5, rel=0.1)


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=30))
def test_bootstrap_draws_whole_groups(groups):
    names = np.array(groups)
    draws = []
    metrics.bootstrap(lambda rows: draws.append(rows) or 0.0, len(groups), groups, rounds=20)
    assert len(draws) == 20
    for rows in draws:
        counts = np.bincount(rows, minlength=len(groups))
        drawn = 0
        for name in set(groups):
            (count,) = set(counts[names == name])
            drawn += count
        assert drawn == len(set(groups))


def test_bootstrap_without_groups_draws_every_row():
    draws = []
    metrics.bootstrap(lambda rows: draws.append(rows) or 0.0, 10, rounds=50)
    assert all(len(rows) == 10 for rows in draws)
    assert set(np.concatenate(draws)) == set(range(10))
    assert any(len(set(rows)) < 10 for rows in draws)


def test_bootstrap_interval_of_what_hardly_varies():
    assert metrics.bootstrap(lambda rows: 0.25, 7) == [0.25, 0.25]
    assert metrics.bootstrap(lambda rows: None, 7) is None
    assert metrics.bootstrap(lambda rows: 0.5, 0) is None
    seldom, often = np.arange(20) == 0, np.arange(20) < 3  # in 64 % and 96 % of all draws
    assert metrics.bootstrap(lambda rows: None if seldom[rows].any() else 1.0, 20) is None
    assert metrics.bootstrap(lambda rows: 1.0 if often[rows].any() else None, 20) == [1.0, 1.0]


def test_paired_difference_of_one_guard_is_nothing():
    rng = np.random.default_rng(0)
    y, p = rng.random(40) < 0.5, rng.random(40)
    other = p.copy()

    def gain(rows):
        return metrics.auprc(y[rows], p[rows]) - metrics.auprc(y[rows], other[rows])

    assert metrics.bootstrap(gain, 40, rounds=50) == [0.0, 0.0]


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_agreement_equals_sklearn(pairs):
    a, b = zip(*pairs, strict=True)
    found = metrics.agreement(a, b, rounds=1)
    assert found["n"] == len(a)
    assert found["agreement"] == pytest.approx(sk.accuracy_score(a, b))
    if len({*a, *b}) == 1:
        assert found["kappa"] is None
    else:
        assert found["kappa"] == pytest.approx(sk.cohen_kappa_score(a, b))


def test_agreement_intervals():
    a, b = [True, False] * 20, [True, False] * 15 + [False, True] * 5
    found = metrics.agreement(a, b)
    assert (found["agreement"], found["kappa"]) == (0.75, pytest.approx(0.5))
    for name in ("agreement", "kappa"):
        low, high = found[f"{name}_interval"]
        assert low < found[name] < high
    nobody = metrics.agreement([], [])
    assert nobody.pop("n") == 0 and set(nobody.values()) == {None}
    assert metrics.agreement([True] * 5, [True] * 5)["kappa_interval"] is None


def test_hugging_face_metric_equals_binary():
    truth, score = [1, 0, 1, 0], [0.9, 0.2, 0.4, 0.6]
    found = guard_metrics.GuardMetrics().compute(predictions=score, references=truth, threshold=0.3)
    assert found == metrics.binary(truth, score, 0.3)


@pytest.mark.slow
def test_hugging_face_metric_loads_from_its_file(tmp_path):
    code = (
        f"import evaluate; metric = evaluate.load({str(Path(guard_metrics.__file__))!r})\n"
        "print(metric.compute(predictions=[0.9, 0.2], references=[1, 0])['f1'])"
    )
    environment = os.environ | {
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "HF_EVALUATE_OFFLINE": "1",
    }
    run = scripts.run([sys.executable, "-c", code], tmp_path, environment)
    assert run.stdout.strip() == "1.0", run.stderr


@pytest.mark.slow
def test_bootstrap_takes_seconds():
    """A benchmark's test split in groups, and the area under a curve of a small one; measured as
    processor time.
    """
    rng, draws, began = np.random.default_rng(0), [], time.process_time()
    y, p, groups = rng.random(200) < 0.5, rng.random(200), np.arange(33_000) // 3
    metrics.bootstrap(lambda rows: draws.append(len(rows)) or 0.0, len(groups), groups)
    metrics.bootstrap(lambda rows: metrics.auprc(y[rows], p[rows]), len(y))
    assert draws == [33_000] * 1000
    assert time.process_time() - began < 15
