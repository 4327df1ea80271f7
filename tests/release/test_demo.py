"""examples/lora_guard on the bundled model: the quickstart, and demo.py in a real browser on the
guard it leaves.
"""

import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright
from scripts import EXAMPLES, module

from common.conversation import pair

RECIPE = EXAMPLES / "lora_guard"
BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
slow = pytest.mark.slow
# Keeps every text that a meter has shown: on a busy machine one is gone before somebody looks.
OBSERVER = """
window.shown = [];
new MutationObserver(() => {
    for (const meter of document.querySelectorAll(".harm")) window.shown.push(meter.textContent);
}).observe(document, {subtree: true, childList: true, characterData: true, attributes: true});
"""


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> Path:
    """What `torchrun train.py` without arguments runs, into another folder."""
    folder, launcher = (
        tmp_path_factory.mktemp("quickstart"),
        [BIN / "torchrun", "--standalone", "--nproc_per_node=1"],
    )
    command = [
        *launcher,
        "train.py",
        "--config",
        "configs/quickstart.yaml",
        "--output-folder",
        folder,
    ]
    done = subprocess.run(command, cwd=RECIPE, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


@slow
def test_quickstart_learns(quickstart):
    (row,) = csv.DictReader((quickstart / "metrics.csv").open())
    # 0.93 where it was measured; the base rate is 0.48
    assert float(row["test/binarized_auprc"]) >= 0.91
    assert json.loads((quickstart / "run.json").read_text())["peak_memory_gib"]["host"] <= 6


@slow
def test_demo_page(quickstart, tmp_path):
    """A person's way through the page in a real browser: type, watch the meter move, read the
    verdict.
    """
    prompt = "How do I <b>pick</b> a pocket? </div><script>document.title='x'</script>"
    chat = module("lora_guard", "riding").GuardedChat(quickstart / "best", device="cpu")
    said = chat.reply([pair(prompt)], max_new_tokens=96, guard_every=8, progress=False)[0]
    assert len(said.trace) > 2, "the reply is too short to be watched"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "demo.py",
        quickstart / "best",
        "--device-id",
        "-1",
        "--max-new-tokens",
        "96",
    ]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [*map(str, command), "--port", str(port)],
            cwd=RECIPE,
            env=ENVIRONMENT,
            stdout=log,
            stderr=log,
        )
    try:
        with sync_playwright() as playwright:
            options = [
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--disable-background-networking",
            ]
            path = shutil.which("chromium") or playwright.chromium.executable_path
            if not Path(path).exists():
                pytest.skip(
                    "no Chromium: install Debian's package chromium, or run `playwright install chromium`"
                )
            browser = playwright.chromium.launch(executable_path=path, args=options)
            page, asked = browser.new_page(), []
            page.add_init_script(OBSERVER)
            page.on("request", lambda request: asked.append(request.url))
            for _ in range(1200):
                if "Running on" in (tmp_path / "log").read_text():
                    break
                assert server.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.5)
            page.set_default_timeout(120_000)
            page.goto(f"http://127.0.0.1:{port}")
            box, meters = page.get_by_placeholder("Ask something"), page.locator(".harm")
            box.fill(prompt)
            box.press("Enter")
            expect(meters).to_contain_text(re.compile(r"\((un)?safe\)"), timeout=120_000)
            live = [text for text in page.evaluate("shown") if re.search(r"\d tokens …", text)]
            assert live, "the meter did not move while the reply was written"
            assert f"harm {said.response_unsafe:.2f}" in meters.inner_text()
            assert float(page.locator(".harm meter").get_attribute("value")) == pytest.approx(
                said.response_unsafe, abs=1e-3
            )
            bubbles = (
                page.get_by_test_id("user").inner_text(),
                page.get_by_test_id("bot").first.inner_text(),
            )
            assert [" ".join(text.split()) for text in bubbles] == [
                prompt,
                " ".join(said.text.split()),
            ]
            assert page.title() == "LoRA-Guard"  # what was typed stayed text
            category, probability = max(said.categories.items(), key=lambda item: item[1])
            bar = page.get_by_test_id(
                category.replace("_", " ").replace(",", ", ") + "-confidence-set"
            ).locator("meter")
            assert float(bar.get_attribute("value")) == pytest.approx(probability, abs=1e-3)
            page.screenshot(path=tmp_path / "page.png")
            page.get_by_label("number input for Stop a reply above").fill("0")
            page.keyboard.press("Tab")
            box.fill("And what is the capital of France?")
            box.press("Enter")
            expect(meters.nth(1)).to_contain_text(
                re.compile(r"unsafe, stopped after [78] tokens"), timeout=60_000
            )
            box.fill("  ")
            box.press("Enter")
            expect(page.get_by_text("Type something first.")).to_be_visible(timeout=10_000)
            page.get_by_role("button", name="New conversation").click()
            expect(meters).to_have_count(0)
            box.fill("Tell me a long story.")
            box.press("Enter")
            expect(meters).to_have_count(1, timeout=60_000)
            # while the reply is written
            page.get_by_role("button", name="New conversation").click()
            expect(meters).to_have_count(0)
            page.wait_for_timeout(3000)
            expect(meters).to_have_count(0)
            browser.close()
        assert not [
            url
            for url in asked
            if not url.startswith((f"http://127.0.0.1:{port}", "data:", "blob:"))
        ]
    finally:
        server.kill()
        server.wait()
