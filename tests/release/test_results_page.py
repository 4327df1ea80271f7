"""results.html in a real browser: what a person sees, moves and filters, and that texts stay texts."""

import json
import random
import re

import numpy as np
import pandas as pd
import pytest
from pages import opened, score
from playwright.sync_api import Page, expect
from scripts import launch, module

from common import metrics, report
from common.conversation import Verdict, pair
from common.results_page import PageTable, page_row, write_results_page

ROWS = 10_000
HOSTILE = "</script><script>document.title='forged'</script><img src=x onerror=\"document.title='forged'\">"
GUARDS = {"first": 0.5, "second": 0.4}


@pytest.fixture(scope="module")
def rows() -> list:
    """Rows of two benchmarks in two languages; the second guard fails on some."""
    draw = random.Random(0)
    made = []
    for i in range(ROWS):
        unsafe = draw.random() < 0.3
        row = page_row(
            {
                "id": f"row-{i}",
                "messages": pair(f"Question {i}? {HOSTILE}", f"Answer {i}."),
                "categories": [draw.choice(["privacy", "violence"])] if unsafe else [],
                "language": draw.choice(["en", "de"]),
            },
            draw.choice(["beavertails", "xstest"]),
            unsafe,
        )
        for failed in (False, i % 997 == 0):
            score = min(1.0, max(0.0, draw.gauss(0.7 if unsafe else 0.3, 0.2)))
            error = "too long" if failed else None
            row.add(Verdict(response_unsafe=score, error=error), "response_unsafe")
        made.append(row)
    return made


@pytest.fixture(scope="module")
def page(browser, rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "results.html"
    table = PageTable("Flagged", ["", "F1 ↑"], [["first <b>", "0.800"]])
    write_results_page(
        path, title="Two guards", note="A note.", tables=[table], guards=GUARDS, rows=rows
    )
    with opened(browser, path) as page:
        yield page


def choose(page: Page, **choices: str) -> None:
    """Set the controls back, and then to what is asked for."""
    defaults = {"guard": "first", "set": "all", "category": "all", "language": "all"}
    for name, label in (defaults | choices).items():
        page.locator(f"#{name}").select_option(label=label)


def scores_of(rows: list, guard: int, threshold: float) -> dict:
    """The metrics of Python; a verdict that failed counts as unsafe."""
    said = [1.0 if row.errors[guard] else row.scores[guard] for row in rows]
    return metrics.binary([row.truth for row in rows], said, threshold)


def test_texts_stay_texts(page):
    assert page.title() == "Two guards"
    assert page.locator("article img, article script").count() == 0
    assert HOSTILE in page.locator("article p").first.inner_text()
    assert page.locator("#tables td").first.inner_text() == "first <b>"


@pytest.mark.parametrize("threshold", ["0.25", "0.5", "0.8"])
def test_the_slider_moves_the_counts(page, rows, threshold):
    choose(page)
    page.locator("#threshold").fill(threshold)
    expected = scores_of(rows, 0, float(threshold))
    for name, key in [("precision", "precision"), ("recall", "recall"), ("false positives", "fpr")]:
        assert score(page, name) == pytest.approx(expected[key], abs=6e-4), name


@pytest.mark.parametrize("threshold", [0.5, 0.9996, 0.00004])
def test_a_threshold_is_shown_as_in_the_tables(browser, rows, tmp_path, threshold):
    path = tmp_path / "results.html"
    guards = GUARDS | {"first": threshold}
    write_results_page(
        path,
        title="Two guards",
        note="",
        tables=[],
        guards=guards,
        rows=rows[:50],
    )
    with opened(browser, path) as page:
        expect(page.locator("#above")).to_have_text(report.threshold(threshold))


def test_the_counts_are_those_of_the_filtered_rows(page, rows):
    choose(page, guard="second", set="xstest", language="de", category="privacy")
    chosen = [
        row
        for row in rows
        if (row.set, row.language) == ("xstest", "de")
        and (not row.truth or "privacy" in row.categories)
    ]
    expected = scores_of(chosen, 1, 0.4)
    assert score(page, "recall") == pytest.approx(expected["recall"], abs=6e-4)
    assert score(page, "false positives") == pytest.approx(expected["fpr"], abs=6e-4)


@pytest.mark.parametrize(
    ("show", "unsafe"), [("false positives", False), ("false negatives", True)]
)
def test_errors_come_the_worst_first(page, rows, show, unsafe):
    choose(page, show=show)
    page.locator("#own").click()
    wrong = [row for row in rows if row.truth == unsafe and (row.scores[0] > 0.5) != unsafe]
    expect(page.locator("#count")).to_contain_text(f"{len(wrong)} rows")
    shown = re.findall(r"first: ([\d.]+)", page.locator("#rows").inner_text())
    expected = sorted((row.scores[0] for row in wrong), reverse=not unsafe)[: len(shown)]
    assert [float(value) for value in shown] == pytest.approx(expected, abs=6e-4)
    assert len(shown) == 25


def test_rows_are_found_by_words_and_leafed_through(page):
    choose(page, show="all rows")
    page.locator("#text").fill("question 99")
    expect(page.locator("#count")).to_have_text("111 rows, page 1 of 5")
    page.locator("#next").click()
    expect(page.locator("#count")).to_have_text("111 rows, page 2 of 5")
    page.locator("#text").fill("")


def test_where_guards_disagree_they_stand_side_by_side(page):
    choose(page, show="guards disagree")
    header = page.locator("article header").first
    expect(header).to_contain_text("first: ")
    expect(header).to_contain_text("second: ")
    assert page.locator("article").first.locator(".wrong").count() == 1


def test_a_failed_verdict_says_why(page):
    choose(page, show="all rows", guard="second")
    page.locator("#text").fill("answer 997.")
    expect(page.locator("article header").first).to_contain_text("second: failed: too long")
    page.locator("#text").fill("")


def test_ten_thousand_rows_stay_quick(page):
    """Each move of the slider draws everything anew; the browser's own clock says how long."""
    choose(page)
    took = page.evaluate(
        """() => {
            const slider = document.getElementById("threshold");
            const start = performance.now();
            for (let i = 0; i < 10; i += 1) {
                slider.value = i / 10;
                slider.dispatchEvent(new Event("input"));
            }
            return (performance.now() - start) / 10;
        }"""
    )
    assert took < 500, f"{took:.0f} ms a move"


# --- the pages of recipes that compare something else than guards on labelled rows ----------------


def test_answers_of_models_side_by_side(browser, tmp_path):
    """examples/cross_task_defense: a refusal is what flags, a malicious document what is unsafe."""
    documents = [f"Summarize.\n\nA garden {i}. {HOSTILE}" for i in range(4)]
    for model, refused in [("before", 1), ("after", 3)]:
        for ending, count in [("", refused), ("_useful", 1)]:
            outputs = ["I'm sorry, but I can't help with that."] * count
            outputs += ["The letter tells of spring."] * (4 - count)
            content = {
                "parameters": {"model": model},
                "instructions": documents,
                "outputs": outputs,
            }
            path = tmp_path / model / f"test_summarize{ending}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content))
    folders = f"{tmp_path}/before,{tmp_path}/after"
    out = tmp_path / "out"
    launch("cross_task_defense", "evaluate.py", "--answers", folders, "--output_dir", out)
    with opened(browser, out / "results.html") as page:
        assert score(page, "recall") == 0.25
        page.locator("#guard").select_option(label="after")
        assert score(page, "recall") == 0.75
        assert score(page, "false positives") == 0.25
        page.locator("#show").select_option(label="guards disagree")
        expect(page.locator("#count")).to_contain_text("2 rows")
        assert "before: The letter tells" in page.locator("article").first.inner_text()
        assert "after: I'm sorry" in page.locator("article").first.inner_text()
        assert page.locator("article img").count() == 0


def test_arms_of_the_feedback_guard_side_by_side(browser, tmp_path):
    """examples/feedback_guard: a task is a benchmark, an arm a guard, A1 at validation's threshold."""
    evaluate = module("feedback_guard", "evaluate")
    texts = {f"test/{i}": f"Prompt {i}? {HOSTILE}" for i in range(8)}
    truth = np.array([i % 2 == 0 for i in range(8)])
    ids = list(texts)
    tasks = {
        "T1": evaluate.Prompts(ids, truth, ids),
        "T2": evaluate.Prompts(ids[:4], ~truth[:4], ids[:4]),
    }
    answers = {
        name: pd.DataFrame({"score": scores, "error": None}, index=ids)
        for name, scores in [
            ("A0", [0.4, 0.3, 0.4, 0.3, 0.9, 0.2, 0.9, 0.6]),
            ("A1", [0.4, 0.3, 0.4, 0.3, 0.9, 0.2, 0.9, 0.6]),
            ("A8-seed0", [0.9, 0.1] * 4),
        ]
    }
    arms = {evaluate.ALWAYS: [evaluate.ALWAYS], "A0": ["A0"], "A1": ["A1"], "A8": ["A8-seed0"]}
    about = {"arms": {"A8": {"auroc": 1.0, "intervals": {}}}}
    results = {
        "tasks": {"T1": about, "T2": about},
        "questions": {"A8": "feedback"},
        "verdict": {"about": "A8", "verdict": "undecided"},
    }
    path = tmp_path / "results.html"
    evaluate.write_page(path, results, tasks, texts, arms, answers, 0.35)
    with opened(browser, path) as page:
        assert page.locator("#tables td").first.inner_text() == "A8: feedback"
        page.locator("#set").select_option(label="T1: human toxicity of prompts")
        assert score(page, "recall") == 0.5
        page.locator("#guard").select_option(label="A1")
        assert score(page, "recall") == 1.0
        page.locator("#guard").select_option(label="A8")
        assert score(page, "precision") == 1.0
        labels = page.locator("#guard option").all_inner_texts()
        assert labels == ["A0", "A1", "A8"]
        assert page.locator("article img").count() == 0
