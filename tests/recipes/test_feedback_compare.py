"""examples/feedback_guard: metrics, draws and the verdict, by hand and by simulation."""

from functools import partial

import numpy as np
import pytest
from scripts import module
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

measure = module("feedback_guard", "measure")

TRUTH = np.array([True, True, False, True, False, False, False, False])
SCORE = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
NOTHING = measure.Prompts([], np.zeros(0, dtype=bool), [])


def prompts(truth, groups=None):
    truth = np.asarray(truth, dtype=bool)
    ids = [str(i) for i in range(len(truth))]
    return measure.Prompts(ids, truth, groups or ids)


def arm(*scores, validation=()):
    """An arm with one row of scores a seed."""
    score = np.array(scores, dtype=float)
    known = np.tile(validation, (len(scores), 1))
    seeds = tuple(range(len(scores)))
    return measure.Arm(score, score > 0.5, known, seeds)


def probability(log_odds):
    return 1 / (1 + np.exp(-log_odds))


def point(truth, one, validation=NOTHING):
    """The metrics of an arm with one seed on the prompts as they are."""
    found = measure.measure(prompts(truth), validation, {"a": one}, draws=0, seed=0)
    return found.seeds["a"][0]


# --- metrics --------------------------------------------------------------------------------------


def test_metrics_by_hand():
    known = prompts([True, True, True, False])
    one = arm(SCORE, validation=[0.95, 0.75, 0.35, 0.1])
    assert point(TRUTH, one, known) == {
        "accuracy": 7 / 8,
        "precision": 3 / 4,
        "recall": 1,
        "f1": pytest.approx(6 / 7),
        "fpr": 1 / 5,
        "flagged": 4 / 8,
        "auprc": pytest.approx((1 + 1 + 3 / 4) / 3),
        "auroc": pytest.approx(14 / 15),
        "fpr_at_recall": 1 / 5,  # down to 0.6 lie all three, and 0.7
        "fpr_at_threshold": 3 / 5,  # from 0.35 on
        "caught": pytest.approx(2 / 3),  # three are blocked, as three are unsafe
    }


def test_a_curve_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth = rng.random(60) < 0.3
        score = np.round(rng.random(60), 1)  # with ties
        values = point(truth, arm(score))
        auprc = average_precision_score(truth, score)
        wrong, found, _ = roc_curve(truth, score, drop_intermediate=False)
        reached = wrong[found >= 0.8 - 1e-9]
        assert values["auprc"] == pytest.approx(auprc)
        assert values["auroc"] == pytest.approx(roc_auc_score(truth, score))
        assert values["fpr_at_recall"] == pytest.approx(reached.min())


def test_blocking_everything_scores_the_base_rate():
    """The original's 0.07 / 0.08 / 1.0 is what no guard at all would get."""
    values = point(np.arange(1000) < 73, arm(np.ones(1000)))
    for metric in ("precision", "accuracy", "auprc", "caught"):
        assert values[metric] == pytest.approx(0.073), metric
    for metric in ("recall", "flagged", "fpr_at_recall"):
        assert values[metric] == 1, metric
    assert values["auroc"] == 0.5


def test_what_is_undefined_is_none():
    values = point([False] * 4, arm([0.1, 0.9, 0.2, 0.3]))
    assert values["fpr"] == 1 / 4
    for metric in ("auprc", "auroc", "f1", "recall", "fpr_at_recall", "fpr_at_threshold"):
        assert values[metric] is None, metric
    empty = measure.measure(NOTHING, NOTHING, {"a": arm([])}, draws=10, seed=0)
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
    found = measure.measure(prompts(truth), NOTHING, arms, draws=1000, seed=0)
    ends = {}
    for name in arms:
        ends[name] = measure.difference(found, name, "worse", "auroc")["interval"]
    low, high = ends["equal"]
    assert low < 0 < high
    assert ends["better"][0] > 0
    assert ends["worse"] == [0, 0]


def test_seeds_are_drawn_with_prompts():
    """Two seeds that are far apart make a wide interval; each draw takes them in proportion."""
    truth = np.arange(400) % 2 == 0
    good = np.where(truth, 0.9, 0.1)
    arms = {"alike": arm(good, good), "apart": arm(good, 1 - good)}
    found = measure.measure(prompts(truth), NOTHING, arms, draws=400, seed=0)
    assert measure.interval(found.drawn["alike"]["auroc"]) == [1, 1]
    assert measure.interval(found.drawn["apart"]["auroc"]) == [0, 1]
    assert found.value("apart", "auroc") == 0.5
    apart = measure.difference(found, "alike", "apart", "auroc")
    assert apart["by_seed"] == [0, 1]


def test_thresholds_are_taken_anew_in_each_draw():
    """Of two validation positives one scores low: draws without it block less."""
    test = prompts([True, False] * 20)
    known = prompts([True, True, False])
    one = arm([0.9, 0.4] * 20, validation=[0.8, 0.2, 0.1])
    found = measure.measure(test, known, {"a": one}, draws=500, seed=0)
    rates = found.drawn["a"]["fpr_at_threshold"]
    is_undefined = np.isnan(rates)
    assert set(rates[~is_undefined]) == {0.0, 1.0}
    assert is_undefined.mean() == pytest.approx((1 / 3) ** 3, abs=0.03)


@pytest.mark.parametrize(
    ("p", "adjusted"),
    [
        pytest.param([0.03, 0.01], [0.03, 0.02], id="the least counts as often as there are tests"),
        pytest.param([0.04, 0.03], [0.06, 0.06], id="none is below one that was smaller"),
        pytest.param([0.9, 0.8], [1, 1], id="none is above 1"),
    ],
)
def test_holm_by_hand(p, adjusted):
    assert measure.holm(p) == adjusted


# --- the verdict ----------------------------------------------------------------------------------

T1_A1 = ("T1", "auroc", "A1")
T2_A1 = ("T2", "auroc", "A1")
T2_C1 = ("T2", "auroc", "C1")
T2_C2 = ("T2", "auroc", "C2")
AT_RECALL = ("T2", "fpr_at_recall", "C1")
CAUGHT = ("T2", "caught", "C1")
T3 = ("T3", "fpr_at_threshold", "A1")
GOOD = {T1_A1: 0.1, T2_A1: 0.1, T2_C1: 0.1, T2_C2: 0.1, AT_RECALL: -0.1, CAUGHT: 0.1, T3: -0.1}


def drawn_around(gains, improved="A8"):
    """What was measured where it differs from each other arm by these gains, with little noise."""
    rng = np.random.default_rng(0)
    tasks = {}
    for (task, metric, other), gain in gains.items():
        if gain is None:
            continue
        found = tasks.setdefault(task, measure.Measured({}, {}))
        for name in (improved, other):
            found.seeds.setdefault(name, [{}])
            found.drawn.setdefault(name, {})
        noise = 0.005 * rng.standard_normal(2000)
        found.seeds[other][0][metric] = 0.5 - gain
        found.drawn[other][metric] = np.full(2000, 0.5 - gain)
        found.seeds[improved][0][metric] = 0.5
        found.drawn[improved][metric] = 0.5 + noise
    return tasks


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        pytest.param({}, "helps", id="all hold"),
        pytest.param({T2_C1: -0.1}, "does not help", id="permuted labels do better"),
        pytest.param({T2_C1: 0.005}, "undecided at this size", id="too small to tell"),
        pytest.param({T2_C1: -0.02}, "does not help", id="a gain of the margin is ruled out"),
        pytest.param({T2_C2: -0.1}, "does not help", id="suspicion does better"),
        pytest.param({T2_A1: -0.1}, "does not help", id="A1 does better"),
        pytest.param({AT_RECALL: 0.1}, "does not help", id="more false positives"),
        pytest.param({CAUGHT: 0.0}, "undecided at this size", id="catches as much"),
        pytest.param({T1_A1: -0.1}, "does not help", id="forgets what it knew"),
        pytest.param({T1_A1: 0.01}, "helps", id="forgets nothing"),
        pytest.param({T3: 0.1}, "does not help", id="refuses what is harmless"),
        pytest.param({T3: None}, "undecided: T3 not measured", id="no T3"),
        pytest.param(
            {T2_C1: None, AT_RECALL: None, CAUGHT: None},
            "undecided: C1 not measured",
            id="no C1",
        ),
    ],
)
def test_verdict(changes, word):
    told = measure.verdict(drawn_around(GOOD | changes), "A8", [])
    assert told["verdict"] == word
    assert len(told["conditions"]) == len(measure.CONDITIONS)


def test_no_condition_counts_where_a_check_does_not_hold():
    checks = [
        measure.Check("labels", "7", holds=True, reason="fine"),
        measure.Check("arms", "0", holds=False, reason="no arms"),
    ]
    told = measure.verdict(drawn_around(GOOD), "A8", checks)
    assert told["verdict"] == "undecided: no arms"
    assert told["checks"] == [
        {"condition": "labels", "state": "holds", "found": "7"},
        {"condition": "arms", "state": "fails", "found": "0"},
    ]


def test_an_arm_is_not_compared_with_itself():
    """Its difference of exactly 0 would rule out any gain."""
    told = measure.verdict(drawn_around(GOOD, "C1"), "C1", [])
    assert told["verdict"] == "undecided: C1 not measured"


@pytest.mark.parametrize("sign", [1, -1], ids=["holding", "failing"])
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


def test_no_auroc_changes_by_more_than_the_pairs_that_are_swapped():
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth = rng.random(50) < 0.4
        before, after = np.round(rng.random((2, 50)), 1)  # with ties
        swapped = measure.swapped_share(truth, after, before)
        gain = roc_auc_score(truth, after) - roc_auc_score(truth, before)
        assert abs(gain) <= swapped + 1e-9
    assert measure.swapped_share(truth, -before, before) > 0.8
    assert measure.swapped_share(truth, truth, ~truth) == 1


def test_a_level_shift_swaps_nothing():
    log_odds = np.linspace(-2, 2, 50)
    shifted = arm(probability(log_odds + 0.5), probability(log_odds + 0.7))
    found = measure.change(log_odds > 1, shifted, arm(probability(log_odds)))
    assert found == {"level": pytest.approx(0.6), "swapped": 0}
    nothing = measure.change(log_odds > 9, shifted, shifted)
    assert nothing == {"level": None, "swapped": None}


def experiment(rng, judge, n=600, draws=200, beside=600, groups=None, **log_odds):
    """The verdict of a simulated run in which A8 really ranks unsafe responses far better than
    every control.

    Args:
        judge: how often the judge sees what is true; else it tosses a coin.
        beside: of how many prompts the guard labels the responses, too.
        log_odds: by the name of an arm, what it makes of those of A0.
    """
    unsafe = rng.random(n) < 0.3
    coin = rng.random((n, 2)) < 0.5
    sees = rng.random((n, 2)) < judge
    votes = np.where(sees, unsafe[:, None], coin)
    guard = np.where(rng.random((n, 2)) < 0.9, unsafe[:, None], ~coin).tolist()
    guard[beside:] = [[None, None]] * (n - beside)
    base = 0.3 * unsafe + rng.standard_normal(n)
    odds = {
        "A0": base,
        "A1": base,
        "C1": rng.standard_normal(n),
        "C2": 2 * base,
        "A8": 3 * unsafe + rng.standard_normal(n),
    }
    for name, made_of in log_odds.items():
        odds[name] = made_of(base)
    arms = {}
    for name, values in odds.items():
        score = probability(values)
        arms[name] = arm(score, validation=score)
    tasks = {
        "T1": prompts(unsafe, groups),
        "T2": prompts(votes.mean(1) >= 0.5, groups),
        "T3": prompts(np.zeros(n), groups),
    }
    measured = {}
    for name, task in tasks.items():
        measured[name] = measure.measure(task, tasks["T1"], arms, draws, seed=0)
    labels = {"judge": votes.tolist(), "guard": guard}
    facts = measure.judge_facts("judge", labels, rounds=100)
    changed = measure.changes(tasks["T2"].truth, arms, "A8")
    checks = measure.checks_before(tasks, measured, changed, facts)
    return measure.verdict(measured, "A8", checks)["verdict"]


def test_a_judge_of_chance_does_not_say_that_the_method_fails():
    """The truth is that A8 is far better: "does not help" may be said in one run of thirty."""
    rng = np.random.default_rng(0)
    said = [experiment(rng, judge=0.0) for _ in range(30)]
    assert said.count("does not help") <= 1
    assert all(word.startswith("undecided: ") for word in said)
    assert "agrees too little with the guard" in said[0]


def test_a_good_judge_lets_the_method_be_seen():
    rng = np.random.default_rng(0)
    said = [experiment(rng, judge=0.9, draws=1000) for _ in range(3)]
    assert said == ["helps"] * 3


def shifted(base, noise=0.0):
    """Another level, and by the noise another order."""
    rng = np.random.default_rng(0)
    return base + 0.8 + noise * rng.standard_normal(len(base))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param(
            {"A8": shifted},
            "A8 ranks the prompts as A0 does",
            id="another level in the same order",
        ),
        pytest.param(
            {"A8": partial(shifted, noise=0.07)},
            "A8 ranks the prompts as A0 does",
            id="Spearman of 0.997",
        ),
        pytest.param(
            {"C1": shifted},
            "C1 ranks the prompts as A0 does: A8 − C1 is A8 − A0",
            id="a control that learned nothing",
        ),
        pytest.param({"n": 30}, "20 of each are needed", id="few prompts"),
        pytest.param(
            {"groups": ["copy"] * 600},
            "T1 has 1 unsafe and 1 safe ones; 20 of each are needed; T2 has 1 unsafe and 1 safe "
            "ones; 20 of each are needed; T3 has 1 harmless prompts",
            id="copies of a prompt",
        ),
        pytest.param({"judge": 0.0}, "contradicts itself", id="a judge of chance"),
        pytest.param(
            {"beside": 9},
            "nobody but the judge has labelled 20 responses",
            id="18 responses labelled twice",
        ),
        pytest.param(
            {"A1": np.sin},
            "A1 ranks T1 no better than chance: there is nothing to lose",
            id="a default guard of chance",
        ),
    ],
)
def test_why_nothing_is_decided(changes, reason):
    given = {"judge": 0.9} | changes
    assert reason in experiment(np.random.default_rng(1), **given)


@pytest.mark.parametrize(
    ("blocked", "holds"),
    [
        pytest.param(0.9, [True, True], id="a tenth can be lost"),
        pytest.param(0.96, [True, False], id="all but blocked"),
        pytest.param(None, [True], id="no threshold"),
    ],
)
def test_a_default_guard_that_blocks_all_of_t3_has_nothing_to_lose(blocked, holds):
    on_t1 = measure.Measured({"A1": [{}]}, {"A1": {"auroc": np.full(100, 0.7)}})
    on_t3 = measure.Measured({"A1": [{"fpr_at_threshold": blocked}]}, {})
    checks = measure.loss_checks({"T1": on_t1, "T3": on_t3})
    assert [check.holds for check in checks] == holds


def test_prompts_that_the_default_guard_passes_favour_the_arm_but_not_against_c1():
    """A8, C1 and A0 are equally good. A0 blocks a third, and T2 is what it passes."""
    rng = np.random.default_rng(0)
    unsafe = rng.random(3000) < 0.3
    scores = {}
    for name in ("A1", "A8", "C1"):
        scores[name] = probability(unsafe + rng.standard_normal(3000))
    passed = scores["A1"] <= np.quantile(scores["A1"], 2 / 3)
    said = {name: arm(score[passed]) for name, score in scores.items()}
    found = measure.measure(prompts(unsafe[passed]), NOTHING, said, draws=400, seed=0)
    over_a1, _ = measure.difference(found, "A8", "A1", "auroc")["interval"]
    low, high = measure.difference(found, "A8", "C1", "auroc")["interval"]
    assert over_a1 > 0
    assert low < 0 < high
