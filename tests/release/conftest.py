"""What several release tests share: a browser, and the guard of examples/moderation's quickstart."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright
from scripts import BIN, launch


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        program = shutil.which("chromium") or playwright.chromium.executable_path
        if not Path(program).exists():
            pytest.skip(
                "no Chromium: install Debian's package chromium, or run `playwright install`"
            )
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass(frozen=True)
class Quickstart:
    """The guard's folder, with its evaluation in it, and how long both took."""

    folder: Path
    seconds: float


@pytest.fixture(scope="session")
def moderation_quickstart(tmp_path_factory) -> Quickstart:
    """What `make quickstart` runs; tests that take the guard do not change its folder."""
    folder = tmp_path_factory.mktemp("quickstart") / "guard"
    start = time.time()
    flags = ["--config", "configs/quickstart.yaml", "--output_dir", folder]
    launch("moderation", "train.py", *flags, launcher=(BIN / "torchrun", "--standalone"))
    flags = ["--config", "configs/quickstart_evaluate.yaml", "--model_path", folder]
    launch("moderation", "evaluate.py", *flags, "--output_dir", folder)
    return Quickstart(folder, time.time() - start)
