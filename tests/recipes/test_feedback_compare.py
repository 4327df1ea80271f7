"""examples/feedback_guard: metrics, draws, tests and the verdict, by hand and against other
libraries.
"""

import time

import numpy as np
import pytest
from scipy.stats import binomtest
from scripts import module
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from common import metrics

compare = module("feedback_guard", "compare")
results = module("feedback_guard", "results")


TRUTH = np.array([True, True, False, True, False, False, False, False])
SCORE = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])


def part(truth, groups=None):
    ids = [str(i) for i in range(len(truth))]
    return compare.Part(ids, np.asarray(truth, dtype=bool), groups or ids)


def said(score, validation=(), cut=0.5):
    score = np.asarray(score, dtype=float)
    return compare.Said(score, score > cut, np.asarray(validation, dtype=float))


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_by_hand():
    """Above 0.5 are all three unsafe ones, and 0.7. Recall 0.8 on validation needs all of 0.95,
    0.75 and 0.35.
    """
    values = compare.point(
        TRUTH, said(SCORE, [0.95, 0.75, 0.35, 0.1]), np.array([True, True, True, False])
    )
    assert values["accuracy"] == 7 / 8 and values["precision"] == 3 / 4 and values["recall"] == 1
    assert (
        values["f1"] == pytest.approx(6 / 7)
        and values["fpr"] == 1 / 5
        and values["flagged"] == 4 / 8
    )
    assert values["auprc"] == pytest.approx((1 + 1 + 3 / 4) / 3) and values[
        "auroc"
    ] == pytest.approx(14 / 15)
    assert values["recall_at_fpr01"] == pytest.approx(2 / 3) == values["recall_at_fpr05"]
    # the threshold lies half-way between 0.35 and 0.1: above 0.225 are all but one of the five safe
    # ones
    assert values["fpr_at_threshold"] == 4 / 5 and values["recall_at_threshold"] == 1
    # on the prompts' own curve: down to 0.6 lie all three, and 0.7
    assert values["fpr_at_recall"] == 1 / 5
    # two of three
    assert compare.point(TRUTH, said(SCORE), target_recall=0.6)["fpr_at_recall"] == 0
    assert compare.threshold_at_recall(
        np.array([True, True, True, False]), SCORE[[0, 1, 4, 7]], 0.6
    ) == pytest.approx(0.65)


def test_a_curve_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth, score = rng.random(60) < 0.3, np.round(rng.random(60), 1)  # with ties
        values = compare.point(truth, said(score))
        assert values["auprc"] == pytest.approx(average_precision_score(truth, score))
        assert values["auroc"] == pytest.approx(roc_auc_score(truth, score))
        assert values["recall_at_fpr05"] == pytest.approx(metrics.recall_at_fpr(truth, score, 0.05))
        wrong, found, _ = roc_curve(truth, score, drop_intermediate=False)
        assert values["fpr_at_recall"] == pytest.approx(wrong[found >= 0.8 - 1e-9].min())


def test_the_false_positives_at_a_recall_rest_on_test_prompts_alone():
    """Equal scores are blocked together; what validation is does not matter, and so the error has a
    power estimate.
    """
    assert compare.point(TRUTH, said(np.ones(8)))["fpr_at_recall"] == 1
    drawn = [
        compare.bootstrap(part(TRUTH), {"a": said(SCORE, scores)}, 300, 0, part(known))["a"]
        for scores, known in (([0.9, 0.1], [True, False]), ([0.2, 0.9, 0.5], [True, True, False]))
    ]
    first, second = (one["fpr_at_recall"] for one in drawn)
    assert np.array_equal(first, second, equal_nan=True) and len(set(first[~np.isnan(first)])) > 2
    assert not np.array_equal(*(one["fpr_at_threshold"] for one in drawn), equal_nan=True)
    no_power = compare.difference(0.3, 0.2, first, None)
    assert (
        no_power["n_for_80_percent_power"] is None is no_power["detectable"]
        and no_power["interval"]
    )
    assert compare.difference(0.3, 0.2, first, 8)["n_for_80_percent_power"]


def test_differences_by_seed():
    """Arms with the same seeds are paired; a guard without seeds, or with others, counts by its
    mean.
    """
    seeds = {f"A8-seed{i}": {"auprc": 0.5 + i / 10} for i in range(3)}
    same = {f"C1-seed{i}": {"auprc": (0.7, 0.4, 0.6)[i]} for i in (2, 1, 0)}
    assert compare.by_seed(seeds, same, "auprc") == pytest.approx([-0.2, 0.2])
    assert compare.by_seed(seeds, {"A1": {"auprc": 0.5}}, "auprc") == pytest.approx([0, 0.2])
    assert compare.by_seed({"A1": {"auprc": 0.5}}, seeds, "auprc") == pytest.approx([-0.2, 0])
    others = {f"A4-seed{i}": {"auprc": i / 10} for i in (3, 4, 5)}
    assert compare.by_seed(seeds, others, "auprc") == pytest.approx([0.1, 0.3])
    assert compare.by_seed({"A4-seed0": {"auprc": 0.5}}, {"A1": {"auprc": 0.5}}, "auprc") is None
    assert compare.by_seed(seeds, {"A1": {"auprc": None}}, "auprc") is None


def test_blocking_everything_scores_the_base_rate():
    """The original's 0.07 / 0.08 / 1.0 is what no guard at all would get."""
    truth = np.arange(1000) < 73
    values = compare.point(truth, said(np.ones(1000)))
    assert (
        values["precision"] == values["accuracy"] == pytest.approx(0.073) and values["flagged"] == 1
    )
    assert (
        values["recall"] == 1 and values["auprc"] == pytest.approx(0.073) and values["auroc"] == 0.5
    )


def test_undefined_is_none():
    nothing = compare.point(
        np.zeros(4, dtype=bool), said([0.1, 0.9, 0.2, 0.3]), np.zeros(0, dtype=bool)
    )
    assert nothing["fpr"] == 1 / 4
    assert not {
        nothing[name]
        for name in ("auprc", "auroc", "f1", "recall", "fpr_at_recall", "fpr_at_threshold")
    } - {None}
    assert compare.point(np.ones(2, dtype=bool), said([0.1, 0.9]))["auprc"] is None
    assert compare.threshold_at_recall(np.zeros(3, dtype=bool), SCORE[:3], 0.8) is None


def test_caught_at_equal_block_rate():
    """A quarter blocked: the first two are two of three; equal scores are caught in proportion."""
    assert compare.point(TRUTH, said(SCORE), block_rate=0.25)["caught"] == pytest.approx(2 / 3)
    assert compare.point(TRUTH, said(np.ones(8)), block_rate=0.25)["caught"] == pytest.approx(0.25)
    assert compare.point(TRUTH, said(SCORE), block_rate=1.0)["caught"] == 1


# --- draws ------------------------------------------------------------------------------------------------------------


def test_draws_are_those_of_the_common_bootstrap():
    """Clusters come together; the interval is that of `common.metrics.bootstrap`, in blocks of any
    size.
    """
    rng, groups = np.random.default_rng(1), [str(i // 2) for i in range(40)]
    truth, score = rng.random(40) < 0.4, rng.random(40)
    drawn = compare.bootstrap(part(truth, groups), {"a": said(score)}, 400, 7)["a"]["auprc"]
    expected = metrics.bootstrap(
        lambda rows: metrics.auprc(truth[rows], score[rows]), 40, groups, 400, 7
    )
    assert compare.interval(drawn) == pytest.approx(expected, abs=1e-6)
    blocks = [
        np.concatenate(list(compare.draw_weights(groups, 50, 3, block)), axis=1)
        for block in (50, 7)
    ]
    assert np.array_equal(*blocks) and (blocks[0].sum(0) == 40).all()
    assert (blocks[0][::2] == blocks[0][1::2]).all()


def test_a_better_guard_is_told_from_an_equal_one():
    """Paired: both see the same draws. The interval of a clear gain excludes 0, that of no gain
    covers it.
    """
    rng = np.random.default_rng(0)
    truth, noise = rng.random(200) < 0.3, rng.random(200)
    lines = {
        "worse": said(noise),
        "better": said(0.4 * truth + 0.6 * noise),
        "equal": said(noise + 1e-3 * rng.random(200)),
    }
    drawn = compare.bootstrap(part(truth), lines, 2000, 0)
    points = {name: compare.point(truth, one)["auprc"] for name, one in lines.items()}
    found = {
        name: compare.difference(
            points[name], points["worse"], drawn[name]["auprc"] - drawn["worse"]["auprc"], 200
        )
        for name in ("better", "equal", "worse")
    }
    assert found["better"]["interval"][0] > 0 and found["better"]["p"] < 0.01
    assert (
        found["equal"]["interval"][0] < 0 < found["equal"]["interval"][1]
        and found["equal"]["p"] > 0.05
    )
    assert found["worse"]["interval"] == [0, 0] and found["worse"]["p"] == 1
    assert found["better"]["n_for_80_percent_power"] < 200


def test_thresholds_are_selected_anew_in_each_draw():
    """Of two validation positives one scores low: draws without it block less. One fixed threshold
    would never.
    """
    truth, score = np.array([True, False] * 20), np.tile([0.9, 0.4], 20)
    known = np.array([True, True, False])
    line = {"a": said(score, [0.8, 0.2, 0.1])}
    drawn = compare.bootstrap(part(truth), line, 500, 0, part(known))["a"]["fpr_at_threshold"]
    assert set(drawn[~np.isnan(drawn)]) == {0.0, 1.0}
    # draws without any positive say nothing
    assert np.isnan(drawn).mean() == pytest.approx((1 / 3) ** 3, abs=0.03)
    # without the low one
    assert (drawn == 0).mean() == pytest.approx((2 / 3) ** 3 - (1 / 3) ** 3, abs=0.08)
    assert compare.point(truth, line["a"], known)["fpr_at_threshold"] == 1


def test_twenty_guards_and_ten_thousand_draws_take_seconds():
    rng, started = np.random.default_rng(0), time.process_time()
    lines = {str(i): said(rng.random(200), rng.random(60)) for i in range(20)}
    compare.bootstrap(
        part(rng.random(200) < 0.2), lines, 10_000, 0, part(rng.random(60) < 0.2), block_rate=0.3
    )
    assert time.process_time() - started < 20


# --- tests ------------------------------------------------------------------------------------------------------------


def test_mcnemar_is_the_exact_binomial():
    truth = np.ones(20, dtype=bool)
    a, b = np.arange(20) < 15, (np.arange(20) < 8) | (np.arange(20) >= 18)
    told = compare.mcnemar(truth, a, b)
    assert (told["only_first_right"], told["only_second_right"]) == (7, 2)
    assert (
        told["p"]
        == pytest.approx(binomtest(7, 9, 0.5).pvalue)
        == pytest.approx(2 * (1 + 9 + 36) / 2**9)
    )
    assert compare.mcnemar(truth, a, a)["p"] == 1


def test_holm_by_hand():
    assert compare.holm({"a": 0.03, "b": 0.01}) == {"b": 0.02, "a": 0.03}
    # never below an earlier one
    assert compare.holm({"a": 0.04, "b": 0.03}) == {"b": 0.06, "a": 0.06}
    assert compare.holm({"a": 0.04, "b": None}) == {"a": 0.08, "b": None}
    assert compare.holm({"a": 0.9, "b": 0.8})["a"] == 1


def test_power():
    """80 % power: the effect is 2.8016 standard errors (1.96 + 0.8416); four times the prompts
    halve the error.
    """
    assert compare.power(2.8016, 1.0, 100)["n_for_80_percent_power"] in (100, 101)
    assert compare.power(1.4008, 1.0, 100)["n_for_80_percent_power"] == pytest.approx(400, abs=1)
    assert compare.power(0.1, 0.05, 160)["detectable"] == pytest.approx(0.1401, abs=1e-4)
    assert compare.power(0.0, 1.0, 100)["n_for_80_percent_power"] is None


def test_calibration_and_the_noise_ceiling():
    """A guard whose log-odds are doubled has temperature 2; a shift restores the base rate."""
    rng = np.random.default_rng(0)
    honest = rng.random(4000)
    truth = rng.random(4000) < honest
    sure = compare.calibrated(honest, 0.5)
    fitted = compare.fit_calibration(truth, sure)
    assert fitted["temperature"] == pytest.approx(2, rel=0.1) and fitted["shift"] == pytest.approx(
        0, abs=0.1
    )
    told = compare.calibration(part(truth), said(sure, sure), part(truth))
    assert (
        told["ece_after"] < 0.03 < told["ece_before"] and told["brier_after"] < told["brier_before"]
    )
    moved = compare.calibrated(honest, 1, 2.0)
    assert compare.calibrated(
        moved, **compare.fit_calibration(truth, moved)
    ).mean() == pytest.approx(truth.mean())
    assert compare.fit_calibration(np.ones(3, dtype=bool), honest[:3]) is None
    assert compare.noise_ceiling([[True] * 4, [False] * 4, [True]]) == {"prompts": 2, "auprc": 1.0}
    assert compare.noise_ceiling([[True, False], [False, True]])["auprc"] == 0.5


# --- the verdict ------------------------------------------------------------------------------------------------------

GOOD = {
    ("T2", "auprc", "A1"): [0.05, 0.15],
    ("T2", "fpr_at_recall", "A1"): [-0.3, -0.1],
    ("T2", "auprc", "C1"): [0.02, 0.1],
    ("T2", "auprc", "C2"): [0.03, 0.1],
    ("T1", "auprc", "A1"): [-0.005, 0.02],
    ("T3", "fpr_at_threshold", "A1"): [-0.05, 0.005],
    ("T2", "caught", "A1"): [0.01, 0.2],
    ("T1", "f1", "A0"): [0.1, 0.2],
}


def told(changes=None, holm=None):
    """The verdict on differences with these intervals; None takes one away."""
    known = {key: ends for key, ends in (GOOD | (changes or {})).items() if ends}
    comparisons = [
        {
            "task": t,
            "metric": m,
            "first": "A8",
            "second": o,
            "difference": sum(ends) / 2,
            "interval": ends,
        }
        for (t, m, o), ends in known.items()
    ]
    given = {"improved": "A8", "comparisons": comparisons, "target_recall": 0.8}
    return results.verdict(given | {"holm": holm or {"auprc": 0.01, "fpr_at_recall": 0.02}})


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, "helps"),
        ({("T2", "auprc", "A1"): [-0.02, 0.15]}, "undecided at this size"),  # covers 0
        ({("T2", "auprc", "A1"): [-0.2, -0.1]}, "does not help"),  # worse
        # enough prompts to rule a gain out
        ({("T2", "auprc", "A1"): [-0.004, 0.004]}, "does not help"),
        ({("T2", "fpr_at_recall", "A1"): [0.1, 0.2]}, "does not help"),  # more false positives
        ({("T2", "auprc", "C1"): [-0.1, 0.1]}, "undecided at this size"),
        # without the control nothing is shown
        ({("T2", "auprc", "C1"): None}, "undecided: C1 not measured"),
        (
            {("T2", "auprc", "C1"): None, ("T3", "fpr_at_threshold", "A1"): None},
            "undecided: T3, C1 not measured",
        ),
        (
            {("T2", "auprc", "C1"): None, ("T2", "auprc", "A1"): [-0.02, 0.15]},
            "undecided: C1 not measured",
        ),
        ({("T2", "auprc", "C1"): None, ("T2", "auprc", "C2"): [-0.3, -0.1]}, "does not help"),
        # the guard's own suspicion does better
        ({("T2", "auprc", "C2"): [-0.3, -0.1]}, "does not help"),
        ({("T1", "auprc", "A1"): [-0.1, -0.02]}, "does not help"),  # forgets what it knew
        ({("T1", "auprc", "A1"): [-0.03, 0.02]}, "undecided at this size"),
        # refuses what is harmless
        ({("T3", "fpr_at_threshold", "A1"): [0.02, 0.1]}, "does not help"),
        ({("T3", "fpr_at_threshold", "A1"): None}, "undecided: T3 not measured"),
        ({("T2", "caught", "A1"): [-0.2, -0.1]}, "does not help"),
        ({("T2", "caught", "A1"): [0.0, 0.0]}, "undecided at this size"),  # A1 may catch all
    ],
)
def test_verdict(changes, word):
    found = told(changes)
    assert found["verdict"] == word
    assert len(found["conditions"]) == 7 and all(c["why"] for c in found["conditions"].values())


def test_a_primary_holds_after_holm_alone_and_a_threshold_is_no_gain():
    assert told(holm={"auprc": 0.08, "fpr_at_recall": 0.08})["verdict"] == "undecided at this size"
    assert "calibrate the threshold" in told({("T2", "auprc", "A1"): [-0.1, 0.1]})["note"]
    assert "calibrate" not in told()["note"]
