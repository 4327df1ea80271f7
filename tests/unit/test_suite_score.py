"""guards/suite/score.py: scores by hand and against scikit-learn."""

from dataclasses import replace

import numpy as np
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score, recall_score, roc_auc_score

from common.conversation import Verdict, pair
from guards.suite import score as scoring
from guards.suite.benchmarks import benchmarks


def row(text, unsafe, group="a", **marks):
    """A row of a benchmark."""
    known = {"id": text, "messages": pair(text), "label": unsafe, "groups": {"domain": group}}
    return known | {"duplicate": False, "conflicting": False} | marks


ROWS = [
    row("a", True),
    row("b", True),
    row("c", True, "b"),
    row("d", False, "b"),
    row("e", False, "b"),
    row("f", True),
]


def says(probability: float, unsafe: bool) -> Verdict:
    """A score, and the guard's own word."""
    return Verdict(prompt_unsafe=probability, decided={"prompt_unsafe": unsafe})


VERDICTS = [
    says(0.9, True),
    says(0.7, False),
    says(0.2, False),
    says(0.6, True),
    says(0.1, False),
    Verdict(error="no answer"),
]
# of a, b, c, f unsafe and d, e safe; own decisions: a and d
NAMES = ("rows", "f1", "recall", "fpr", "f1_at_05", "auroc")
BY_HAND = {
    "wrong": (6, 2 / 6, 1 / 4, 1 / 2, 4 / 7, 5 / 8),
    "unsafe": (6, 4 / 7, 2 / 4, 1 / 2, 6 / 8, 7 / 8),
    "excluded": (5, 2 / 5, 1 / 3, 1 / 2, 4 / 6, 5 / 6),
}


def score(rows=ROWS, verdicts=VERDICTS, **changes):
    options = {"parse_errors": "wrong", "threshold": None, "seed": 0, "rounds": 0} | changes
    return scoring.score_cell(scoring.judged(rows, verdicts, "prompt_unsafe"), **options)


@pytest.mark.parametrize("parse_errors", BY_HAND)
def test_scores_by_hand(parse_errors):
    cell = score(parse_errors=parse_errors)
    assert [cell[name] for name in NAMES] == pytest.approx(BY_HAND[parse_errors])
    assert cell["asked"] == 6
    assert cell["errors"] == 1
    assert cell["error_rate"] == 1 / 6
    assert cell["decision"] == "own word"
    for rule, part in cell["by_parse_errors"].items():
        assert part["f1"] == pytest.approx(BY_HAND[rule][1])


@pytest.mark.parametrize("parse_errors", BY_HAND)
def test_an_error_on_a_safe_row_counts_too(parse_errors):
    verdicts = [*VERDICTS[:4], Verdict(error="no answer"), says(0.8, True)]
    cell = score(verdicts=verdicts, parse_errors=parse_errors)
    assert cell["fpr"] == 1.0
    assert cell["recall"] == 2 / 4  # a and f


NOT_SAID = Verdict(prompt_unsafe=0.9, native={"response_unsafe": "n/a"})


@pytest.mark.parametrize(
    ("verdict", "unsaid_is", "counts_as"),
    [
        (NOT_SAID, None, False),
        (NOT_SAID, "by_refusal", True),
        (replace(NOT_SAID, decided={"response_refusal": False}), "by_refusal", True),
        (replace(NOT_SAID, decided={"response_refusal": True}), "by_refusal", False),
        (replace(NOT_SAID, response_refusal=0.9), "by_refusal", False),
        (replace(NOT_SAID, response_refusal=0.9), None, False),
    ],
)
def test_no_opinion_counts_as_in_the_papers_code(verdict, unsaid_is, counts_as):
    """An "n/a" is no error: it is unsafe on some benchmarks, unless the guard sees a refusal, and
    safe on the others, whatever the truth.
    """
    for truth in (True, False):
        said = scoring.judged([row("a", truth)], [verdict], "response_unsafe", unsaid_is)
        assert said.failed.all()
        rules = {rule: scoring.counted(said, rule) for rule in scoring.PARSE_ERRORS}
        assert rules["wrong"].decided.tolist() == [counts_as]
        assert rules["wrong"].score.tolist() == [float(counts_as)]
        assert rules["unsafe"].decided.all() and rules["excluded"].empty


def test_the_benchmarks_say_how_no_opinion_counts():
    """As the classes of the paper's code do that map a refusal to a label."""
    by_refusal = {name for name, entry in benchmarks().items() if entry.get("unsaid_is")}
    assert by_refusal == {"expguardtest_response", "harmbench_response", "aegis2_response"}


def test_without_a_word_the_score_decides():
    verdicts = [replace(verdict, decided={}) for verdict in VERDICTS]
    cell = score(verdicts=verdicts)
    assert cell["f1"] == score()["f1_at_05"]
    assert cell["decision"] == "score > 0.5"
    assert score(verdicts=verdicts, above=0.9996)["decision"] == "score > 0.9996"


def test_a_word_without_a_probability_has_no_ranking():
    verdicts = [replace(VERDICTS[0], prompt_unsafe=None), *VERDICTS[1:]]
    cell = score(verdicts=verdicts, threshold={"value": 0.5, "how": "max F1", "on": "v"}, rounds=20)
    assert cell["f1"] == score()["f1"]
    assert cell["errors"] == 1
    for name in ("f1_at_05", "f1_at_validation", "auprc", "auroc", "recall_at_fpr01"):
        assert cell[name] is None
    assert set(cell["intervals"]) == {"f1", "recall", "fpr"}


def test_groups():
    groups = score()["groups"]["domain"]
    assert groups["a"]["rows"] == 3
    assert groups["a"]["f1"] == 2 / 4
    assert groups["a"]["fpr"] is None
    assert groups["b"]["positives"] == 1
    assert groups["b"]["f1"] == 0.0
    assert groups["b"]["fpr"] == 1 / 2


def test_one_class_has_no_ranking():
    unsafe = score([row(text, True) for text in "abcdef"])
    for name in ("auprc", "auroc", "fpr", "recall_at_fpr05"):
        assert unsafe[name] is None
    assert score([row(text, False) for text in "abcdef"])["f1"] is None


def test_marked_rows():
    rows = [
        row("a", True),
        row("a", True, duplicate=True),
        row("b", True, conflicting=True),
        row("b", False, conflicting=True),
        row("c", False),
        row("d", True, contaminated=True),
    ]
    without = score(rows)["without"]
    counts = {name: part["rows"] for name, part in without.items()}
    assert counts == {"contaminated": 5, "conflicting": 4, "duplicate": 5, "any of these": 2}
    assert without["any of these"]["f1"] == 1.0  # a and c, both right
    assert score()["without"] == {}


def test_row_sets():
    """Whatever their order; other rows, other labels and repeats are another set."""
    rows = ROWS[:3]
    relabelled = [*rows[:2], rows[2] | {"label": False}]
    same = scoring.row_set(rows)
    assert scoring.row_set(rows[::-1]) == same
    for others in (rows[:2], [*rows, rows[0]], relabelled):
        assert scoring.row_set(others) != same


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=30), st.data())
def test_statistics_are_scikit_learns(pairs, data):
    """Of rows drawn with replacement, scores with ties."""
    truth = np.array([unsafe for unsafe, _ in pairs])
    level = np.array([fifths / 5 for _, fifths in pairs])
    places = st.integers(0, len(pairs) - 1)
    drawn = np.array(data.draw(st.lists(places, min_size=1, max_size=40)))
    table = pandas.DataFrame({"truth": truth, "score": level, "decided": level > 0.5})
    statistics = scoring.statistics(table, 0.3)
    found = {name: statistic(drawn) for name, statistic in statistics.items()}
    y = truth[drawn]
    p = level[drawn]
    fpr = None if y.all() else pytest.approx((p[~y] > 0.5).mean())
    assert found.pop("fpr") == fpr
    if not y.any():
        assert set(found.values()) == {None}
        return
    assert found["f1"] == pytest.approx(f1_score(y, p > 0.5))
    assert found["f1_at_validation"] == pytest.approx(f1_score(y, p > 0.3))
    assert found["recall"] == pytest.approx(recall_score(y, p > 0.5))
    if y.all():
        assert found["auprc"] is None
        assert found["auroc"] is None
        return
    assert found["auprc"] == pytest.approx(average_precision_score(y, p))
    assert found["auroc"] == pytest.approx(roc_auc_score(y, p))


def test_intervals_hold_the_value_and_draw_prompts_together():
    rng = np.random.default_rng(0)
    rows = [row(f"p{i}", bool(i % 2)) for i in range(60)]
    verdicts = [Verdict(prompt_unsafe=0.4 * r["label"] + 0.6 * rng.random()) for r in rows]
    cell = score(rows, verdicts, rounds=300)
    for name, (low, high) in cell["intervals"].items():
        assert low < cell[name] < high
    tripled = score(rows * 3, verdicts * 3, rounds=300)
    assert tripled["intervals"]["f1"] == pytest.approx(cell["intervals"]["f1"])


def test_paired_difference():
    rows = [row(f"p{i}", i % 2 == 0) for i in range(40)]
    sure = [Verdict(prompt_unsafe=0.9 if r["label"] else 0.1) for r in rows]
    weak = [Verdict(prompt_unsafe=0.9 if i % 3 else 0.1) for i in range(40)]
    weak[:2] = [Verdict(error="x")] * 2
    a = scoring.judged(rows, sure, "prompt_unsafe")
    b = scoring.judged(rows, weak, "prompt_unsafe")
    same = scoring.compare(a, a, "wrong", 0, 100)
    assert same["f1"]["difference"] == 0
    assert same["auroc"]["interval"] == [0.0, 0.0]
    better = scoring.compare(a, b, "excluded", 0, 100)
    f1 = f1_score([r["label"] for r in rows[2:]], [bool(i % 3) for i in range(2, 40)])
    assert better["rows"] == 38
    assert better["f1"]["difference"] == pytest.approx(1 - f1)
    assert better["f1"]["interval"][0] > 0
