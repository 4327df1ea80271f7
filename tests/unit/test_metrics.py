"""Metrics against scikit-learn and brute force; what is undefined is None."""

import os
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import scripts
from hypothesis import strategies as st
from sklearn import metrics as sk

from common import guard_metrics, metrics

UNIT = st.floats(0, 1)
TRUTH_AND_SCORE = st.tuples(st.booleans(), UNIT | st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
BOTH_CLASSES = st.lists(TRUTH_AND_SCORE, max_size=60).filter(
    lambda rows: {truth for truth, _ in rows} == {True, False}
)


def given(*strategies):
    """Fewer examples: scikit-learn is slow on small input. No deadline: machines differ."""
    few = hypothesis.settings(max_examples=30, deadline=None)
    return lambda test: few(hypothesis.given(*strategies)(test))


def columns(rows) -> tuple[np.ndarray, np.ndarray]:
    truth, score = zip(*rows, strict=True)
    return np.array(truth), np.array(score)


def best_recall(y: np.ndarray, p: np.ndarray, fpr: float) -> float:
    """The highest recall of all thresholds that flag at most this share of the safe rows."""
    flagged = [p > threshold for threshold in (-1.0, *p, 1.0)]
    return max(hit[y].mean() for hit in flagged if hit[~y].mean() <= fpr)


@given(BOTH_CLASSES, UNIT)
def test_binary_equals_sklearn(rows, threshold):
    y, p = columns(rows)
    flagged = p > threshold
    found = metrics.binary(y, p, threshold)
    assert {type(value) for value in found.values()} <= {int, float, type(None)}
    del found["ece"]
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
        "recall_at_fpr01": best_recall(y, p, 0.01),
        "recall_at_fpr05": best_recall(y, p, 0.05),
        "brier": sk.brier_score_loss(y, p),
    }
    assert found == pytest.approx(expected)


def test_threshold_is_strict():
    assert metrics.binary([True, False], [0.5, 0.5], 0.5)["recall"] == 0.0
    assert metrics.binary([True, False], [0.5, 0.5], 0.49)["recall"] == 1.0


OF_UNSAFE = {"always_unsafe_f1", "recall", "f1", "auprc"}
OF_BOTH = {"auroc", "recall_at_fpr01", "recall_at_fpr05"}
OF_ANY = {"precision", "fpr", "base_rate", "accuracy", "ece", "brier"}


@pytest.mark.parametrize(
    ("truth", "score", "undefined"),
    [
        ([False, False], [0.9, 0.1], OF_UNSAFE | OF_BOTH),
        ([True, True], [0.9, 0.1], OF_BOTH | {"fpr"}),
        ([True, False], [0.2, 0.1], {"precision"}),
        ([], [], OF_UNSAFE | OF_BOTH | OF_ANY),
    ],
    ids=["all safe", "all unsafe", "nothing flagged", "empty"],
)
def test_undefined_is_none(truth, score, undefined, recwarn):
    found = metrics.binary(truth, score)
    assert {name for name, value in found.items() if value is None} == undefined
    assert not recwarn.list


def test_ece_by_hand():
    # Bin [0.2, 0.3): mean score 0.25, no positive. Bin [0.9, 1]: mean score 0.95, half positive.
    error = metrics.expected_calibration_error([0, 0, 1, 0], [0.2, 0.3 - 1e-9, 0.9, 1.0])
    assert error == pytest.approx((0.25 + 0.45) / 2)


@pytest.mark.parametrize(
    ("known", "supports"),
    [
        (None, {}),
        (["something else"], {}),
        (["one text"], {"all rows": 2, "without 1 near-copies": 1}),
        (["one text", "another"], {"all rows, each a near-copy": 2}),
    ],
)
def test_scores_without_near_copies_of_what_is_known(known, supports):
    """Where nothing else is left, the table says so."""
    texts = ["one text", "Another!"]
    found = metrics.by_parts(["en"] * 2, texts, known, [True, False], [0.9, 0.1], 0.5)
    found = found["near_copies"]
    assert {name: one["support"] for name, one in found.items()} == supports


def test_multilabel_is_flagged_and_each_category_where_it_is_known():
    truth = np.array([[1, 0], [0, 0], [1, 1], [-100, -100]])
    score = np.array([[0.9, 0.2], [0.1, 0.7], [0.3, 0.4], [0.3, 0.8]])
    assert metrics.multilabel(truth, score, ["a", "b, c"], 0.6) == {
        "flagged": metrics.binary([1, 0, 1, 1], [0.9, 0.7, 0.4, 0.8], 0.6),
        "a": metrics.binary([1, 0, 1], [0.9, 0.1, 0.3], 0.6),
        "b, c": metrics.binary([0, 0, 1], [0.2, 0.7, 0.4], 0.6),
    }


ZEROS = np.zeros((3, 2))
BAD = {  # what is wrong: the function, what it is given
    "lengths": (metrics.binary, [True], [0.1, 0.2]),
    "two axes": (metrics.binary, [[True]], [[0.1]]),
    "above 1": (metrics.binary, [True, False], [0.5, 1.01]),
    "below 0": (metrics.binary, [True, False], [-0.1, 1]),
    "NaN": (metrics.binary, [True, False], [float("nan"), 1]),
    "null truth": (metrics.binary, [True, None], [0.1, 0.2]),
    "words": (metrics.binary, ["safe", "unsafe"], [0.1, 0.2]),
    "names of columns": (metrics.multilabel, ZEROS, ZEROS, ["a"]),
    "rows of columns": (metrics.multilabel, ZEROS, ZEROS[:2], ["a", "b"]),
    "one axis": (metrics.multilabel, [1, 0], [0.1, 0.2], ["a"]),
    "lengths to fit": (metrics.fit_threshold, [1, 0], [0.3], "validation"),
    "above 1 to fit": (metrics.fit_threshold, [1, 0], [0.3, 2], "validation"),
    "one class to fit": (metrics.fit_threshold, [1, 1], [0.3, 0.2], "validation"),
    "no rows to fit": (metrics.fit_threshold, [], [], "validation"),
    "test rows to fit": (metrics.fit_threshold, [1, 0], [0.3, 0.2], "data:330k_test"),
    "lengths of two judges": (metrics.agreement, [True], [True, False]),
    "a group too few": (metrics.bootstrap, len, 3, ["a"]),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_measured_is_refused(case):
    measure, *given = BAD[case]
    with pytest.raises(ValueError):
        measure(*given)


@given(BOTH_CLASSES)
def test_fitted_threshold_has_the_best_f1(rows):
    y, p = columns(rows)
    fitted = metrics.fit_threshold(y, p, "validation")
    assert fitted["how"] == f"max F1, n={len(y)}"
    assert fitted["on"] == "validation"
    everyone = np.nextafter(p.min(), 0) if p.min() > 0 else 0.0
    others = [sk.f1_score(y, p > other, zero_division=0) for other in (0.0, everyone, *p)]
    assert sk.f1_score(y, p > fitted["value"]) == pytest.approx(max(others))


def test_fitted_threshold_lies_half_way():
    """Also of many rows, where a table of rows x thresholds would need 10 GB."""
    assert metrics.fit_threshold([0, 1], [0.25, 0.75], "v")["value"] == 0.5
    p = np.random.default_rng(0).random(100_000)
    fitted = metrics.fit_threshold(p > 0.7, p, "validation")
    assert fitted["value"] == pytest.approx(0.7, abs=1e-4)


def test_threshold_fits_many_rows():
    """A table of rows x thresholds would need 10 GB here."""
    p = np.random.default_rng(0).random(100_000)
    fitted = metrics.fit_threshold(p > 0.7, p, "validation")
    assert fitted["value"] == pytest.approx(0.7, abs=1e-4)


SPECS = """
test  PKU-Alignment/BeaverTails:330k_test | toxicchat:test | some/folder/test.jsonl
test  Test-2024.parquet | 0.1 of rows_test.csv | allenai/wildguardmix:wildguardtest
test  xstest.csv | x:test[:500] | x:validation+test[:5] | x@guardtest:train
train latest.jsonl | contest:train | user/test-bed:validation | test/validation.jsonl
train validation | PKU-Alignment/BeaverTails:30k_train | x:train[:500]
"""


@pytest.mark.parametrize("line", SPECS.strip().splitlines())
def test_what_is_a_test_split(line):
    kind, specs = line.split(maxsplit=1)
    for spec in specs.split(" | "):
        assert metrics.is_test(spec) == (kind == "test"), spec


def test_bootstrap_depends_on_the_seed_alone():
    p = np.random.default_rng(1).random(50)

    def mean(rows):
        return float(p[rows].mean())

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

    def note(rows):
        draws.append(rows)
        return 0.0

    metrics.bootstrap(note, len(groups), groups, rounds=20)
    assert len(draws) == 20
    for rows in draws:
        counts = np.bincount(rows, minlength=len(groups))
        drawn = 0
        for name in set(groups):
            (count,) = set(counts[names == name])
            drawn += count
        assert drawn == len(set(groups))


def test_intervals_of_unsafe_rows_alone():
    """Precision and recall are defined there; a ranking of both classes is not."""
    found = metrics.intervals([True] * 8, [0.9] * 4 + [0.1] * 4, 0.5)
    assert found["auprc_interval"] == [1.0, 1.0]
    assert found["auroc_interval"] is None and found["fpr_interval"] is None


def test_bootstrap_of_what_is_often_undefined():
    """Undefined in 64 % of all draws it has no interval; in 4 % it has."""
    assert metrics.bootstrap(lambda rows: None if rows.min() == 0 else 1.0, 20) is None
    assert metrics.bootstrap(lambda rows: 1.0 if rows.min() < 3 else None, 20) == [1.0, 1.0]
    assert metrics.bootstrap(lambda rows: 0.5, 0) is None


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_agreement_equals_sklearn(pairs):
    a, b = zip(*pairs, strict=True)
    found = metrics.agreement(a, b, rounds=1)
    kappa = sk.cohen_kappa_score(a, b) if len({*a, *b}) == 2 else None
    assert found["n"] == len(a)
    assert found["agreement"] == pytest.approx(sk.accuracy_score(a, b))
    assert found["kappa"] == pytest.approx(kappa)


def test_agreement_intervals():
    a, b = [True, False] * 20, [True, False] * 15 + [False, True] * 5
    found = metrics.agreement(a, b)
    for name in ("agreement", "kappa"):
        low, high = found[f"{name}_interval"]
        assert low < found[name] < high
    nobody = metrics.agreement([], [])
    assert nobody.pop("n") == 0
    assert set(nobody.values()) == {None}


@pytest.mark.slow
def test_hugging_face_metric_loads_from_its_file(tmp_path):
    code = (
        f"import evaluate; metric = evaluate.load({str(Path(guard_metrics.__file__))!r})\n"
        "print(metric.compute(predictions=[0.9, 0.2], references=[1, 0], threshold=0.1)['f1'])"
    )
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    run = scripts.run([sys.executable, "-c", code], tmp_path, os.environ | offline)
    f1 = metrics.binary([1, 0], [0.9, 0.2], 0.1)["f1"]
    assert run.stdout.strip() == str(f1), run.stderr
