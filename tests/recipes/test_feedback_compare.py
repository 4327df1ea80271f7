"""examples/feedback_guard: metrics, draws and the verdict, by hand and by simulation."""

import numpy as np
import pytest
from scripts import module
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

measure = module("feedback_guard", "measure")

TRUTH = np.array([True, True, False, True, False, False, False, False])
SCORE = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
NOTHING = measure.Prompts([], np.zeros(0, dtype=bool), [])


def prompts(truth, groups=None):
    ids = [str(i) for i in range(len(truth))]
    return measure.Prompts(ids, np.asarray(truth, dtype=bool), groups or ids)


def arm(*scores, validation=()):
    """An arm with one row of scores a seed."""
    score = np.array(scores, dtype=float)
    known = np.array([validation] * len(scores), dtype=float).reshape(len(scores), -1)
    return measure.Arm(score, score > 0.5, known, tuple(range(len(scores))))


def point(truth, one, validation=NOTHING, recall=0.8):
    """The metrics of an arm with one seed on the prompts as they are."""
    found = measure.measure(prompts(truth), validation, {"a": one}, 0, 0, recall)
    return found.seeds["a"][0]


# --- metrics --------------------------------------------------------------------------------------


def test_metrics_by_hand():
    known = prompts([True, True, True, False])
    values = point(TRUTH, arm(SCORE, validation=[0.95, 0.75, 0.35, 0.1]), known)
    assert values["accuracy"] == 7 / 8
    assert values["precision"] == 3 / 4
    assert values["recall"] == 1
    assert values["f1"] == pytest.approx(6 / 7)
    assert values["fpr"] == 1 / 5
    assert values["flagged"] == 4 / 8
    assert values["auprc"] == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert values["auroc"] == pytest.approx(14 / 15)
    assert values["fpr_at_recall"] == 1 / 5  # down to 0.6 lie all three, and 0.7
    assert values["fpr_at_threshold"] == 3 / 5  # from 0.35 on
    assert values["caught"] == pytest.approx(2 / 3)  # three are blocked, as three are unsafe


def test_a_curve_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth = rng.random(60) < 0.3
        score = np.round(rng.random(60), 1)  # with ties
        values = point(truth, arm(score))
        assert values["auprc"] == pytest.approx(average_precision_score(truth, score))
        assert values["auroc"] == pytest.approx(roc_auc_score(truth, score))
        wrong, found, _ = roc_curve(truth, score, drop_intermediate=False)
        assert values["fpr_at_recall"] == pytest.approx(wrong[found >= 0.8 - 1e-9].min())


def test_blocking_everything_scores_the_base_rate():
    """The original's 0.07 / 0.08 / 1.0 is what no guard at all would get."""
    truth = np.arange(1000) < 73
    values = point(truth, arm(np.ones(1000)))
    for metric in ("precision", "accuracy", "auprc", "caught"):
        assert values[metric] == pytest.approx(0.073), metric
    assert values["recall"] == values["flagged"] == values["fpr_at_recall"] == 1
    assert values["auroc"] == 0.5


def test_what_is_undefined_is_none():
    values = point(np.zeros(4, dtype=bool), arm([0.1, 0.9, 0.2, 0.3]))
    assert values["fpr"] == 1 / 4
    for metric in ("auprc", "auroc", "f1", "recall", "fpr_at_recall", "fpr_at_threshold"):
        assert values[metric] is None, metric
    empty = measure.measure(NOTHING, NOTHING, {"a": arm([])}, 10, 0)
    assert measure.difference(empty, "a", "a", "auroc") is None


# --- draws ----------------------------------------------------------------------------------------


def test_near_copies_are_drawn_together():
    groups = [str(i // 2) for i in range(40)]
    weights = measure.draw_weights(groups, 50, np.random.default_rng(0))
    assert (weights.sum(0) == 40).all()
    assert (weights[::2] == weights[1::2]).all()


def test_a_better_guard_is_told_from_an_equal_one():
    """All see the same draws: the interval of a clear gain excludes 0, that of no gain covers it."""
    rng = np.random.default_rng(0)
    truth = rng.random(200) < 0.3
    noise = rng.random(200)
    arms = {
        "worse": arm(noise),
        "better": arm(0.4 * truth + 0.6 * noise),
        "equal": arm(noise + 1e-2 * rng.random(200)),
    }
    found = measure.measure(prompts(truth), NOTHING, arms, 1000, 0)
    assert measure.difference(found, "better", "worse", "auroc")["interval"][0] > 0
    low, high = measure.difference(found, "equal", "worse", "auroc")["interval"]
    assert low < 0 < high
    assert measure.difference(found, "worse", "worse", "auroc")["interval"] == [0, 0]


def test_seeds_are_drawn_with_prompts():
    """Two seeds that are far apart make a wide interval; each draw takes them in proportion."""
    truth = np.arange(400) % 2 == 0
    good = np.where(truth, 0.9, 0.1)
    alike = arm(good, good)
    apart = arm(good, 1 - good)
    found = measure.measure(prompts(truth), NOTHING, {"alike": alike, "apart": apart}, 400, 0)
    assert measure.interval(found.drawn["alike"]["auroc"]) == [1, 1]
    assert measure.interval(found.drawn["apart"]["auroc"]) == [0, 1]
    assert found.value("apart", "auroc") == 0.5
    assert measure.difference(found, "alike", "apart", "auroc")["by_seed"] == [0, 1]


def test_thresholds_are_taken_anew_in_each_draw():
    """Of two validation positives one scores low: draws without it block less."""
    truth = [True, False] * 20
    known = prompts([True, True, False])
    one = arm(np.tile([0.9, 0.4], 20), validation=[0.8, 0.2, 0.1])
    drawn = measure.measure(prompts(truth), known, {"a": one}, 500, 0).drawn["a"]
    rates = drawn["fpr_at_threshold"]
    assert set(rates[~np.isnan(rates)]) == {0.0, 1.0}
    assert np.isnan(rates).mean() == pytest.approx((1 / 3) ** 3, abs=0.03)


def test_holm_by_hand():
    assert measure.holm({"a": 0.03, "b": 0.01}) == {"b": 0.02, "a": 0.03}
    assert measure.holm({"a": 0.04, "b": 0.03}) == {"b": 0.06, "a": 0.06}
    assert measure.holm({"a": 0.9, "b": 0.8})["a"] == 1


# --- the verdict ----------------------------------------------------------------------------------


def drawn_around(gains):
    """What was measured where A8 differs from each other arm by these gains, with little noise."""
    rng = np.random.default_rng(0)
    tasks = {}
    for (task, metric, other), gain in gains.items():
        found = tasks.setdefault(task, measure.Measured())
        for name, value in (("A8", 0.5), (other, 0.5 - gain)):
            found.seeds.setdefault(name, [{}])[0][metric] = value
            noise = 0.005 * rng.standard_normal(2000) if name == "A8" else np.zeros(2000)
            found.drawn.setdefault(name, {})[metric] = value + noise
    return tasks


# each other arm has its own metrics: what A8 has there is one and the same
GOOD = {(c.task, c.metric, c.other): c.sign * 0.1 for c in measure.CONDITIONS}
T2_C1 = ("T2", "auroc", "C1")
WITHOUT_C1 = {key: None for key in GOOD if key[2] == "C1"}
T3 = ("T3", "fpr_at_threshold", "A1")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, "helps"),
        ({T2_C1: -0.1}, "does not help"),  # permuted labels do better
        ({T2_C1: 0.005}, "undecided at this size"),
        ({T2_C1: -0.02}, "does not help"),  # rules out a gain of 0.01
        (WITHOUT_C1, "undecided: C1 not measured"),
        ({("T2", "auroc", "C2"): -0.1}, "does not help"),
        ({("T2", "auroc", "A1"): -0.1}, "does not help"),
        ({("T2", "fpr_at_recall", "C1"): 0.1}, "does not help"),
        ({("T2", "caught", "C1"): 0.0}, "undecided at this size"),
        ({("T1", "auroc", "A1"): -0.1}, "does not help"),  # forgets what it knew
        ({("T1", "auroc", "A1"): 0.01}, "helps"),
        ({T3: 0.1}, "does not help"),  # refuses what is harmless
        ({T3: None}, "undecided: T3 not measured"),
    ],
)
def test_verdict(changes, word):
    gains = {key: gain for key, gain in (GOOD | changes).items() if gain is not None}
    told = measure.verdict(drawn_around(gains), "A8", [])
    assert told["verdict"] == word
    assert len(told["conditions"]) == len(measure.CONDITIONS)
    stopped = measure.verdict(drawn_around(gains), "A8", ["no labels"])
    assert stopped["verdict"] == "undecided: no labels"


@pytest.mark.parametrize("sign", [1, -1])
def test_failures_are_corrected_as_successes_are(sign):
    """One of seven differences lies on one side of its bound with p 0.02: that decides nothing."""
    tasks = drawn_around(dict.fromkeys(GOOD, 0.0))
    for task in tasks.values():
        for metric in task.drawn["A8"]:
            task.drawn["A8"][metric] = 0.5 + np.linspace(-1, 1, 2000)
    beyond = np.linspace(-0.01, 0.99, 2000)  # a hundredth of the draws lies on the other side
    tasks["T1"].drawn["A8"]["auroc"] = 0.5 - measure.MARGIN + sign * beyond
    told = measure.verdict(tasks, "A8", [])
    assert {row["state"] for row in told["conditions"]} == {"open"}
    assert told["verdict"] == "undecided at this size"


# --- whether anything can be decided --------------------------------------------------------------


def experiment(rng, n=600, judge=0.0, trained=True, draws=200, beside=True):
    """A simulated run in which A8 really ranks unsafe responses far better than every control.

    Args:
        judge: how often the judge sees what is true; else it tosses a coin.
    """
    unsafe = rng.random(n) < 0.3
    seen = rng.random((n, 2)) < judge
    votes = np.where(seen, unsafe[:, None], rng.random((n, 2)) < 0.5)
    guard = np.where(rng.random((n, 2)) < 0.9, unsafe[:, None], rng.random((n, 2)) < 0.5)
    truth = votes.mean(1) >= 0.5
    others = guard.tolist() if beside else [[None, None]] * n
    base = 1 / (1 + np.exp(-(0.3 * unsafe + rng.standard_normal(n))))
    better = 1 / (1 + np.exp(-(3.0 * unsafe + rng.standard_normal(n))))
    arms = {"A0": arm(base), "A1": arm(base), "C1": arm(rng.random(n)), "C2": arm(base**2)}
    arms["A8"] = arm(better) if trained else arm(base + 1e-4)
    tasks = {"T1": prompts(unsafe), "T2": prompts(truth), "T3": prompts(np.zeros(n))}
    measured = {}
    for name, task in tasks.items():
        known = {
            key: measure.Arm(one.score, one.decided, one.score, one.seeds)
            for key, one in arms.items()
        }
        measured[name] = measure.measure(task, tasks["T1"], known, draws, 0)
    facts = measure.judge_facts(
        "judge",
        {"judge": votes.tolist(), "guard": others, "human": [[None, None]] * n},
        100,
    )
    shift = measure.score_shift(arms["A8"], arms["A0"])
    reasons = measure.reasons_against(tasks, measured, shift, facts)
    return measure.verdict(measured, "A8", reasons)["verdict"]


def test_a_judge_of_chance_does_not_say_that_the_method_fails():
    """The truth is that A8 is far better: "does not help" may be said in one run of thirty."""
    rng = np.random.default_rng(0)
    said = [experiment(rng) for _ in range(30)]
    assert said.count("does not help") <= 1
    assert all(word.startswith("undecided: ") for word in said)
    assert "agrees too little with the guard" in said[0]


def test_a_good_judge_lets_the_method_be_seen():
    rng = np.random.default_rng(0)
    assert [experiment(rng, judge=0.9, draws=1000) for _ in range(3)] == ["helps"] * 3


def test_prompts_that_the_default_guard_passes_favour_the_arm_but_not_against_c1():
    """A8, C1 and A0 are equally good. A0 blocks a third, and T2 is what it passes."""
    rng = np.random.default_rng(0)
    unsafe = rng.random(3000) < 0.3
    default, ours, control = (
        1 / (1 + np.exp(-(unsafe + rng.standard_normal(3000)))) for _ in range(3)
    )
    passed = default <= np.quantile(default, 2 / 3)
    arms = {"A1": default, "A8": ours, "C1": control, "C2": default**2}
    said = {name: arm(score[passed]) for name, score in arms.items()}
    found = measure.measure(prompts(unsafe[passed]), NOTHING, said, 400, 0)
    assert measure.difference(found, "A8", "A1", "auroc")["interval"][0] > 0
    low, high = measure.difference(found, "A8", "C1", "auroc")["interval"]
    assert low < 0 < high
    assert measure.verdict({"T2": found}, "A8", [])["verdict"] != "helps"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"trained": False}, "it was not trained"),
        ({"n": 30}, "20 of each are needed"),
        ({"judge": 0.0}, "contradicts itself"),
        ({"beside": None}, "nobody but the judge has labelled"),
    ],
)
def test_why_nothing_is_decided(changes, reason):
    given = {"judge": 0.9} | changes
    assert reason in experiment(np.random.default_rng(1), **given)
