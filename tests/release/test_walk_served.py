"""One guard's way to those who ask it: the quickstart's folder behind the moderation server, in
vLLM, and as ONNX. Everywhere it says what `judge` says.

What a user copies of docs/serving.md is run as it is printed there, with the address of this server.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import openai
import pytest
import scripts
from checks import read_json
from moderation_server import ROOT, moderation_server
from vllm_server import needs_vllm, post, vllm_server

from common.data import load_conversations, taxonomy
from guards import load_guard

pytestmark = pytest.mark.slow
DOCS = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
PRINTED = "http://127.0.0.1:8000"
KEY = "unused"  # as the printed lines have it
EXPORT = "import runpy; runpy.run_module('guards.export', run_name='__main__')"
LABELS = taxonomy("beavertails")
COMMENT = "What kind of name is that?"


def printed(language: str, words: str) -> str:
    """The one block of docs/serving.md in a language that has these words."""
    blocks = re.findall(rf"```{language}\n(.*?)```", DOCS, flags=re.DOTALL)
    (found,) = [block for block in blocks if words in block]
    return found


@pytest.fixture(scope="module")
def folder(moderation_quickstart) -> Path:
    return moderation_quickstart.folder


@pytest.fixture(scope="module")
def guard(folder):
    return load_guard(str(folder), progress=False)


@pytest.fixture(scope="module")
def rows():
    """Forty pairs that the guard has not seen."""
    whole = load_conversations("beavertails-sample:test")
    return whole.select(range(0, 280, 7))


@pytest.fixture(scope="module")
def expected(guard, rows):
    return guard.judge(rows["messages"])


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """The moderation server, with the attributes that the documentation prints."""
    scratch = tmp_path_factory.mktemp("server")
    attributes = scratch / "attributes.yaml"
    attributes.write_text(printed("yaml", "IDENTITY_ATTACK"), encoding="utf-8")
    flags = ["--attributes", attributes]
    with moderation_server(folder, scratch / "log", *flags, env={"GUARD_API_KEY": KEY}) as running:
        yield running


def above(guard, score: float) -> bool:
    return score > guard.thresholds["flagged"]["value"]


def test_openais_client_flags_and_passes(server, guard, rows, expected):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY)
    flagged = []
    for messages, verdict in zip(rows["messages"], expected, strict=True):
        talk = {"messages": messages}
        (result,) = client.moderations.create(input=[], extra_body=talk).results
        scores = result.category_scores.to_dict()
        assert scores["unsafe"] == pytest.approx(verdict.response_unsafe, abs=1e-4)
        assert result.flagged == above(guard, verdict.response_unsafe)
        flagged.append(result.flagged)
    assert {*flagged} == {True, False}
    right = [said == truth for said, truth in zip(flagged, rows["response_unsafe"], strict=True)]
    assert sum(right) >= 24  # of forty


def test_the_printed_python_lines(server, guard):
    said = {}
    exec(printed("python", "moderations.create").replace(PRINTED, server.url), said)
    texts = [[{"role": "user", "content": ""}, answer] for answer in answers_of_the_docs()]
    verdicts = guard.judge([*texts, said["talk"]])
    results = [*said["said"].results, said["result"]]
    for result, verdict in zip(results, verdicts, strict=True):
        scores = result.category_scores.to_dict()
        assert scores["unsafe"] == pytest.approx(verdict.response_unsafe, abs=1e-4)
        assert result.flagged == above(guard, verdict.response_unsafe)


def answers_of_the_docs() -> list[dict[str, str]]:
    """The two texts of the printed lines, which a guard of answers takes for answers."""
    texts = ["My dog barks at night.", "I read his letters."]
    return [{"role": "assistant", "content": text} for text in texts]


def test_perspectives_call_gets_its_scores(server, guard):
    """The printed curl, then the attributes of the printed file."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (verdict,) = guard.judge(
        [[{"role": "user", "content": ""}, {"role": "assistant", "content": COMMENT}]]
    )
    hate = "hate_speech,offensive_language"
    discrimination = "discrimination,stereotype,injustice"
    scores = verdict.categories
    wanted = {
        "TOXICITY": verdict.response_unsafe,
        "IDENTITY_ATTACK": max(scores[hate], scores[discrimination]),
        "THREAT": scores["violence,aiding_and_abetting,incitement"],
        "SEXUALLY_EXPLICIT": scores["sexually_explicit,adult_content"],
    }
    command = printed("bash", "comments:analyze").replace(PRINTED, server.url)
    attributes = ", ".join(f'"{name}": {{}}' for name in wanted)
    for line in (command, command.replace('"TOXICITY": {}', attributes)):
        shell = ["bash", "-c", f"GUARD_API_KEY={KEY}\n{line}"]
        done = subprocess.run(shell, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)["attributeScores"]
        for name, said in found.items():
            assert said["summaryScore"]["value"] == pytest.approx(wanted[name], abs=1e-4), name
    assert set(found) == set(wanted)


@needs_vllm
def test_vllm_says_the_same_numbers(folder, rows, expected, tmp_path):
    flags = ["--served-model-name", "guard", "--runner", "pooling"]
    with vllm_server(folder, tmp_path / "log", *flags) as address:
        for messages, verdict in zip(rows["messages"], expected, strict=True):
            asked = {"model": "guard", "messages": messages, "add_special_tokens": False}
            said = post(f"{address}/classify", asked)["data"][0]["probs"]
            wanted = [verdict.categories[name] for name in LABELS]
            assert said == pytest.approx(wanted, abs=1e-3)


def test_exported_to_8_bits_it_gives_the_same_verdicts(folder, guard, rows, expected):
    """Of a hundred verdicts one may flip at most, or nothing is written."""
    command = [sys.executable, "-c", EXPORT, folder, "--onnx", "--int8"]
    done = scripts.run(command, ROOT)
    exported = Path(f"{folder}-onnx-int8")
    if done.returncode == 2 and "of the verdicts flip, more than 1%" in done.stderr:
        assert not exported.exists()
        pytest.xfail("more than 1 % of this guard's verdicts flip in 8 bits: it is refused")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == f"Wrote {exported}"
    run = read_json(exported / "run.json")
    assert run["parity"][0]["rows"] == 200 and run["parity"][0]["flipped"] <= 2
    small = load_guard(str(exported), progress=False)
    assert small.dtype == "int8"
    flips = 0
    for verdict, ours in zip(small.judge(rows["messages"]), expected, strict=True):
        assert verdict.response_unsafe == pytest.approx(ours.response_unsafe, abs=0.2)
        flips += above(small, verdict.response_unsafe) != above(guard, ours.response_unsafe)
    assert flips <= 1
