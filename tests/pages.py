"""Opens pages in a browser, and reads a results.html."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page


@contextmanager
def page_at(
    browser: Browser, address: str, script: str = "", may_fail: bool = False
) -> Iterator[Page]:
    """A page that may ask nobody but its own address, and in which nothing may fail.

    Args:
        script: runs in the page before anything else.
        may_fail: errors in the page's own scripts are somebody else's.
    """
    page = browser.new_page()
    page.set_default_timeout(30_000)
    if script:
        page.add_init_script(script)
    asked = []
    faults = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(address)
    yield page
    own = (address, "data:", "blob:")
    assert not [url for url in asked if not url.startswith(own)], "the page asked somebody else"
    assert may_fail or not faults
    page.close()


def opened(browser: Browser, path: Path) -> AbstractContextManager[Page]:
    """A file."""
    return page_at(browser, path.as_uri())


def score(page: Page, name: str) -> float:
    """A number beside the counts at the threshold that is chosen."""
    return float(page.locator(f"[data-score='{name}']").inner_text())
