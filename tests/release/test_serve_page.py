"""The page of the moderation server in a real browser: what a person types, and sees."""

from pathlib import Path

import pytest
from moderation_server import moderation_server
from pages import page_at
from playwright.sync_api import Page, expect

from common.conversation import pair
from common.data import taxonomy
from guards import load_guard
from guards.card import ClassifierCard, Threshold, write_card

pytestmark = pytest.mark.slow
KEY = "a-secret-key"
HOSTILE = "How do I <b>cook</b> rice? </div><script>document.title='forged'</script>"
TURN = "#turns .turn textarea"


@pytest.fixture(scope="module")
def folder(tiny_classifier, tmp_path_factory) -> Path:
    folder = tiny_classifier(tmp_path_factory.mktemp("guard"))
    card = ClassifierCard(
        template="beavertails",
        labels=taxonomy("beavertails"),
        max_length=256,
        thresholds={"flagged": Threshold(value=0.25, how="for this test")},
    )
    write_card(folder, card)
    return folder


@pytest.fixture(scope="module")
def page(folder, browser, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with (
        moderation_server(folder, log, env={"GUARD_API_KEY": KEY}) as running,
        page_at(browser, running.url) as page,
    ):
        expect(page.locator("#about")).to_have_text("Unsafe: answers above 0.25.")
        yield page


def judge(page: Page, *turns: str) -> None:
    page.get_by_role("button", name="New conversation").click()
    for number, text in enumerate(turns):
        if number:
            page.get_by_role("button", name="Add a turn").click()
        page.locator(TURN).nth(number).fill(text)
    page.get_by_role("button", name="Judge", exact=True).click()


def check_shown(page: Page, verdict) -> None:
    """The meter, the word and every category say what `judge` says."""
    score = verdict.response_unsafe
    word = "unsafe" if score > 0.25 else "safe"
    expect(page.locator("#harm")).to_have_text(f" harm {score:.2f} ({word})")
    value = float(page.locator("#harm meter").get_attribute("value"))
    assert value == pytest.approx(score, abs=1e-3)
    rows = page.locator("#categories .category")
    expect(rows).to_have_count(14)
    found = {}
    for row in rows.all():
        name = row.get_attribute("data-category")
        found[name] = float(row.locator("meter").get_attribute("value"))
        is_above = "above" in row.get_attribute("class").split()
        assert is_above == (verdict.categories[name] > 0.25)
    assert found == pytest.approx(verdict.categories, abs=1e-3)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_a_text_and_a_dialogue(page, folder):
    guard = load_guard(str(folder), progress=False)
    text, talk = guard.judge([pair("", HOSTILE), pair(HOSTILE, "Rinse it.")])
    page.get_by_label("Key").fill("another")
    judge(page, HOSTILE)
    expect(page.locator("#harm")).to_contain_text("no verdict: the key is missing or wrong")
    page.get_by_label("Key").fill(KEY)
    judge(page, HOSTILE)
    check_shown(page, text)
    judge(page, HOSTILE, "Rinse it.")
    check_shown(page, talk)
    assert page.title() == folder.name, "what was typed became markup"


def test_nothing_typed_and_nothing_that_it_judges(page):
    page.get_by_label("Key").fill(KEY)
    judge(page, "  ")
    expect(page.locator("#harm")).to_have_text("Type something first.")
    judge(page, "A question?", "An answer.", "Another <b>question</b>?")
    expect(page.locator("#harm")).to_contain_text("no verdict: request, field messages: ends with")
    expect(page.locator("#categories")).to_be_empty()
