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
VERDICTS = [
    Verdict(prompt_unsafe=0.9, decided={"prompt_unsafe": True}),
    Verdict(prompt_unsafe=0.7, decided={"prompt_unsafe": False}),
    Verdict(prompt_unsafe=0.2, decided={"prompt_unsafe": False}),
    Verdict(prompt_unsafe=0.6, decided={"prompt_unsafe": True}),
    Verdict(prompt_unsafe=0.1, decided={"prompt_unsafe": False}),
    Verdict(error="no answer"),
]


def score(rows=ROWS, verdicts=VERDICTS, **changes):
    options = {"parse_errors": "wrong", "threshold": None, "seed": 0, "rounds": 0} | changes
    return scoring.score_cell(scoring.judged(rows, verdicts, "prompt_unsafe"), **options)


@pytest.mark.parametrize(
    ("parse_errors", "by_hand"),
    [  # of a, b, c, f unsafe and d, e safe; own decisions: a and d
        (
            "wrong",
            {
                "rows": 6,
                "f1": 2 / 6,
                "recall": 1 / 4,
                "fpr": 1 / 2,
                "f1_at_05": 4 / 7,
                "auroc": 5 / 8,
            },
        ),
        (
            "unsafe",
            {
                "rows": 6,
                "f1": 4 / 7,
                "recall": 2 / 4,
                "fpr": 1 / 2,
                "f1_at_05": 6 / 8,
                "auroc": 7 / 8,
            },
        ),
        (
            "excluded",
            {
                "rows": 5,
                "f1": 2 / 5,
                "recall": 1 / 3,
                "fpr": 1 / 2,
                "f1_at_05": 4 / 6,
                "auroc": 5 / 6,
            },
        ),
    ],
)
def test_scores_by_hand(parse_errors, by_hand):
    cell = score(parse_errors=parse_errors)
    assert {name: cell[name] for name in by_hand} == pytest.approx(by_hand)
    assert (cell["asked"], cell["errors"], cell["error_rate"], cell["decision"]) == (
        6,
        1,
        1 / 6,
        "own word",
    )
    assert cell["by_parse_errors"][parse_errors].items() <= cell.items()
    assert len({part["f1"] for part in cell["by_parse_errors"].values()}) == 3


def test_an_error_on_a_safe_row_counts_too():
    verdicts = [
        *VERDICTS[:4],
        Verdict(error="no answer"),
        Verdict(prompt_unsafe=0.8, decided={"prompt_unsafe": True}),
    ]
    assert [
        score(verdicts=verdicts, parse_errors=rule)["fpr"] for rule in scoring.PARSE_ERRORS
    ] == [1.0, 1.0, 1.0]
    assert score(verdicts=verdicts)["recall"] == 2 / 4  # a and f


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


def test_no_opinion_on_a_prompt_counts_as_safe():
    """Neither an error nor the word of another label makes it unsafe."""
    verdicts = [*VERDICTS[:5], Verdict(response_unsafe=0.9, native={"prompt_unsafe": "n/a"})]
    found, with_error = score(verdicts=verdicts), score()
    assert (found["errors"], found["f1"]) == (1, with_error["f1"])  # f is unsafe: wrong both ways
    rows = [*ROWS[:5], row("f", False)]
    assert score(rows, verdicts)["fpr"] == 1 / 3 and score(rows)["fpr"] == 2 / 3


def test_without_a_word_the_score_decides():
    verdicts = [replace(v, decided={}) for v in VERDICTS]
    cell = score(verdicts=verdicts)
    assert cell["f1"] == cell["f1_at_05"] != score()["f1"]
    assert cell["decision"] == "score > 0.5"


def test_a_word_without_a_probability_has_no_ranking():
    verdicts = [replace(VERDICTS[0], prompt_unsafe=None), *VERDICTS[1:]]
    cell = score(verdicts=verdicts, threshold={"value": 0.5, "how": "max F1", "on": "v"}, rounds=20)
    assert cell["f1"] == score()["f1"] and cell["errors"] == 1
    assert all(
        cell[name] is None
        for name in ("f1_at_05", "f1_at_validation", "auprc", "auroc", "recall_at_fpr01")
    )
    assert set(cell["intervals"]) == {"f1", "recall"}


def test_threshold_and_groups():
    cell = score(threshold={"value": 0.15, "how": "max F1", "on": "v"})
    assert (cell["f1_at_validation"], cell["recall_at_validation"], cell["fpr_at_validation"]) == (
        6 / 8,
        3 / 4,
        1 / 2,
    )
    groups = cell["groups"]["domain"]
    assert [(groups[g]["rows"], groups[g]["positives"]) for g in "ab"] == [(3, 3), (3, 1)]
    assert [(groups[g]["f1"], groups[g]["fpr"]) for g in "ab"] == [(2 / 4, None), (0.0, 1 / 2)]


def test_one_class_has_no_ranking():
    assert {
        score([row(k, True) for k in "abcdef"])[name]
        for name in ("auprc", "auroc", "fpr", "recall_at_fpr05")
    } == {None}
    assert score([row(k, False) for k in "abcdef"])["f1"] is None


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
    rows = ROWS[:3]
    assert scoring.row_set(rows) == scoring.row_set(rows[::-1])
    others = [rows[:2], [*rows, rows[0]], [*rows[:2], rows[2] | {"label": False}]]
    assert len({scoring.row_set(r) for r in (rows, *others)}) == 4


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=30), st.data())
def test_statistics_are_scikit_learns(pairs, data):
    """Of rows drawn with replacement, scores with ties."""
    truth, level = np.array([p[0] for p in pairs]), np.array([p[1] / 5 for p in pairs])
    drawn = np.array(data.draw(st.lists(st.integers(0, len(pairs) - 1), min_size=1, max_size=40)))
    table = pandas.DataFrame({"truth": truth, "score": level, "decided": level > 0.5})
    statistics = scoring.statistics(table, 0.3)
    y, p = truth[drawn], level[drawn]
    if not y.any():
        assert {statistic(drawn) for statistic in statistics.values()} == {None}
        return
    assert statistics["f1"](drawn) == pytest.approx(f1_score(y, p > 0.5))
    assert statistics["f1_at_validation"](drawn) == pytest.approx(f1_score(y, p > 0.3))
    assert statistics["recall"](drawn) == pytest.approx(recall_score(y, p > 0.5))
    if y.all():
        assert statistics["auprc"](drawn) is None and statistics["auroc"](drawn) is None
        return
    assert statistics["auprc"](drawn) == pytest.approx(average_precision_score(y, p))
    assert statistics["auroc"](drawn) == pytest.approx(roc_auc_score(y, p))


def test_intervals_hold_the_value_and_draw_prompts_together():
    rng = np.random.default_rng(0)
    rows = [row(f"p{i}", bool(i % 2)) for i in range(60)]
    verdicts = [
        Verdict(prompt_unsafe=float(np.clip(0.4 * r["label"] + 0.6 * rng.random(), 0, 1)))
        for r in rows
    ]
    cell = score(rows, verdicts, rounds=300)
    for name, (low, high) in cell["intervals"].items():
        assert low < cell[name] < high
    tripled = score(rows * 3, verdicts * 3, rounds=300)
    assert tripled["intervals"]["f1"] == pytest.approx(cell["intervals"]["f1"])


def test_paired_difference():
    rows = [row(f"p{i}", i % 2 == 0) for i in range(40)]
    sure = [Verdict(prompt_unsafe=0.9 if r["label"] else 0.1) for r in rows]
    weak = [
        Verdict(error="x") if i < 2 else Verdict(prompt_unsafe=0.9 if i % 3 else 0.1)
        for i in range(40)
    ]
    a, b = (scoring.judged(rows, verdicts, "prompt_unsafe") for verdicts in (sure, weak))
    same, better = (
        scoring.compare(a, a, "wrong", 0, 100),
        scoring.compare(a, b, "excluded", 0, 100),
    )
    assert same["f1"]["difference"] == 0 and same["auroc"]["interval"] == [0.0, 0.0]
    f1 = f1_score([r["label"] for r in rows[2:]], [bool(i % 3) for i in range(2, 40)])
    assert better["rows"] == 38 and better["f1"]["difference"] == pytest.approx(1 - f1)
    assert better["f1"]["interval"][0] > 0 and better["auprc"]["interval"][0] > 0
