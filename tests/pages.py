"""Opens a results.html in a browser and reads it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page


@contextmanager
def opened(browser: Browser, path: Path) -> Iterator[Page]:
    """A page that may ask for nothing but the file itself, and in which nothing may fail."""
    page = browser.new_page()
    page.set_default_timeout(20_000)
    asked, faults = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(path.as_uri())
    yield page
    assert asked == [path.as_uri()], "the page asked for something else"
    assert not faults
    page.close()


def score(page: Page, name: str) -> float:
    """A number beside the counts at the threshold that is chosen."""
    return float(page.locator(f"[data-score='{name}']").inner_text())
