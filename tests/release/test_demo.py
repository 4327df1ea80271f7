"""examples/lora_guard on the bundled model: the quickstart, and demo.py in a real browser on the
guard it leaves.
"""

import csv
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checks import read_json
from moderation_server import free_port
from pages import page_at
from playwright.sync_api import expect
from scripts import BIN, EXAMPLES, module

from common.conversation import pair

pytestmark = pytest.mark.slow
RECIPE = EXAMPLES / "lora_guard"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
PROMPT = "How do I <b>pick</b> a pocket? </div><script>document.title='x'</script>"
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
    folder = tmp_path_factory.mktemp("quickstart")
    command = [BIN / "torchrun", "--standalone", "--nproc_per_node=1", "train.py"]
    command += ["--config", "configs/quickstart.yaml", "--output-folder", folder]
    done = subprocess.run(command, cwd=RECIPE, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


def test_quickstart_learns(quickstart):
    (row,) = csv.DictReader((quickstart / "metrics.csv").open())
    # 0.93 where it was measured; the base rate is 0.48
    assert float(row["test/binarized_auprc"]) >= 0.91
    assert read_json(quickstart / "run.json")["peak_memory_gib"]["host"] <= 6


# --- the page -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def said(quickstart):
    """The reply that the page should show."""
    chat = module("lora_guard", "riding").GuardedChat(quickstart / "best", device="cpu")
    options = {"max_new_tokens": 96, "guard_every": 8, "progress": False}
    (reply,) = chat.reply([pair(PROMPT)], **options)
    assert len(reply.trace) > 2, "the reply is too short to be watched"
    return reply


@pytest.fixture(scope="module")
def page(quickstart, browser, tmp_path_factory):
    """The demo, which these tests use one after the other."""
    path = tmp_path_factory.mktemp("demo") / "log"
    port = free_port()
    command = [sys.executable, "demo.py", quickstart / "best", "--device-id", "-1"]
    command += ["--max-new-tokens", "96", "--port", str(port)]
    with path.open("w") as log:
        server = subprocess.Popen(command, cwd=RECIPE, env=ENVIRONMENT, stdout=log, stderr=log)
    try:
        for _ in range(1200):
            if "Running on" in path.read_text():
                break
            assert server.poll() is None, path.read_text()
            time.sleep(0.5)
        with page_at(browser, f"http://127.0.0.1:{port}", OBSERVER, may_fail=True) as page:
            page.set_default_timeout(120_000)
            yield page
    finally:
        server.kill()
        server.wait()


def ask(page, text: str) -> None:
    box = page.get_by_placeholder("Ask something")
    box.fill(text)
    box.press("Enter")


def meter(place) -> float:
    return float(place.locator("meter").get_attribute("value"))


def test_a_reply_is_watched(page, said):
    """Type, watch the meter move, read the verdict."""
    ask(page, PROMPT)
    harm = page.locator(".harm")
    expect(harm).to_contain_text(re.compile(r"\((un)?safe\)"), timeout=120_000)
    live = [text for text in page.evaluate("shown") if re.search(r"\d tokens …", text)]
    assert live, "the meter did not move while the reply was written"
    assert f"harm {said.response_unsafe:.2f}" in harm.inner_text()
    assert meter(harm) == pytest.approx(said.response_unsafe, abs=1e-3)
    for name, text in (("user", PROMPT), ("bot", said.text)):
        shown = page.get_by_test_id(name).first.inner_text()
        assert shown.split() == text.split()
    assert page.title() == "LoRA-Guard"  # what was typed stayed text
    category = max(said.categories, key=said.categories.get)
    label = category.replace("_", " ").replace(",", ", ")
    bar = page.get_by_test_id(f"{label}-confidence-set")
    assert meter(bar) == pytest.approx(said.categories[category], abs=1e-3)


def test_a_reply_is_stopped(page):
    page.get_by_label("number input for Stop a reply above").fill("0")
    page.keyboard.press("Tab")
    ask(page, "And what is the capital of France?")
    stopped = re.compile(r"unsafe, stopped after [78] tokens")
    expect(page.locator(".harm").nth(1)).to_contain_text(stopped, timeout=60_000)


def test_nothing_typed(page):
    ask(page, "  ")
    expect(page.get_by_text("Type something first.")).to_be_visible(timeout=10_000)


def test_a_new_conversation_ends_the_one_before(page):
    """Also while a reply is written."""
    meters = page.locator(".harm")
    page.get_by_role("button", name="New conversation").click()
    expect(meters).to_have_count(0)
    ask(page, "Tell me a long story.")
    expect(meters).to_have_count(1, timeout=60_000)
    page.get_by_role("button", name="New conversation").click()
    expect(meters).to_have_count(0)
    page.wait_for_timeout(3000)
    expect(meters).to_have_count(0)
