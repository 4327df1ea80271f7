"""Guards on other engines: vLLM in process, and servers that fail. (A real server:
test_generation_engines.)
"""

import json
import logging
import math
import subprocess
import sys
from importlib.util import find_spec

import completions
import families
import pytest
from checks import read_json, user_error
from completions import completion, token

from common.conversation import pair
from common.templates import Part
from guards.generative import GenerativeGuard

serve = completions.serve
WORDS = {" safe": False, " unsafe": True}
ENTRY = {
    "messages": ["conversation"],
    "max_length": 512,
    "questions": [
        {"label": "prompt_unsafe", "prefix": "User:", "words": WORDS},
        {"label": "response_unsafe", "when": "response", "prefix": "\nAgent:", "words": WORDS},
    ],
}
TALKS = [pair("How do I keep a bicycle? " * n) for n in (1, 3, 9)] + [
    pair("Why?", f"Because {n}.") for n in range(5)
]
SCRIPT = """
import json, sys
from guards.generative import GenerativeGuard
from dataclasses import asdict
if __name__ == "__main__":
    entry, talks = json.load(open(sys.argv[2]))
    guard = GenerativeGuard(sys.argv[1], entry, engine="vllm", progress=False)
    verdicts = guard.judge(talks)
    written = [one.text for one in guard.written([[5, 6, 7]], 4)]
    json.dump([[asdict(v) for v in verdicts], written], open(sys.argv[3], "w"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny guard whose heads are as wide as vLLM's kernels want them."""
    wide = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
    wide |= {"max_position_embeddings": 512}
    return families.save(
        tmp_path_factory.mktemp("wide"), "qwen2", ["safe", "unsafe"], seed=1, **wide
    )


def guard(folder, entry=ENTRY, **options) -> GenerativeGuard:
    return GenerativeGuard(str(folder), entry, progress=False, **options)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (extra [vllm])")
def test_vllm_gives_the_same_verdicts(folder, tmp_path):
    expected = guard(folder)
    (tmp_path / "asked.json").write_text(json.dumps([ENTRY, TALKS]))
    (tmp_path / "run.py").write_text(SCRIPT)
    command = [sys.executable, "run.py", str(folder), "asked.json", "found.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found, written = read_json(tmp_path / "found.json")
    assert written == [one.text for one in expected.written([[5, 6, 7]], 4)]
    for mine, theirs in zip(expected.judge(TALKS), found, strict=True):
        for label in ("prompt_unsafe", "response_unsafe"):
            assert theirs[label] == pytest.approx(getattr(mine, label), abs=1e-4)
        for name in ("native", "decided", "error"):
            assert theirs[name] == getattr(mine, name)


def test_a_server_names_tokens_by_id(folder, serve, monkeypatch):
    """The rule of one verdict: mass of unsafe over both, of the very words, however unlikely."""
    monkeypatch.setenv("SERVER_API_KEY", "sk-very-secret")
    local = guard(folder)
    ids = local.verdict_tokens("prompt")
    safe, unsafe = ids[False][0], ids[True][0]

    def rule(body):
        assert {safe, unsafe} <= set(body["logprob_token_ids"])
        if len(body["prompt"]) % 2:
            return token({unsafe: -0.5, safe: -1.5})
        return token({safe: -0.1, unsafe: -40.0})

    server = serve(rule)
    options = {"engine": "server", "server_url": server.url, "server_model": "m"}
    verdicts = guard(folder, **options).judge(TALKS[:3])
    prompts = local.encode([[*local.parts(m), Part("User:", False)] for m in TALKS[:3]])
    for ids, verdict in zip(prompts, verdicts, strict=True):
        assert verdict.error is None
        odds = math.exp(1.0) if len(ids) % 2 else math.exp(-39.9)
        assert verdict.prompt_unsafe == pytest.approx(odds / (1 + odds), rel=1e-6)
    assert sorted(body["prompt"] for body in server.bodies) == sorted(prompts)
    assert server.keys == {"Bearer sk-very-secret"}
    assert "sk-very" not in repr(verdicts)


FAILURES = {  # what a server says, what the verdicts say of it, how often it is asked
    "a text": ((400, {"error": {"message": "too long for sk-very-secret"}}), "too long", 3),
    "the key": ((401, {"error": {"message": "wrong key sk-very-secret"}}), "wrong key", 1),
    "no tokens": (completion("safe"), "names no tokens by id", 3),
}


@pytest.mark.parametrize(("reply", "message", "asked"), FAILURES.values(), ids=FAILURES)
def test_a_server_that_fails(folder, serve, reply, message, asked, monkeypatch):
    """Every verdict is an error, none is safe, and no key is in it."""
    monkeypatch.setenv("SERVER_API_KEY", "sk-very-secret")
    server = serve(lambda _: reply)
    verdicts = guard(folder, engine="server", server_url=server.url, concurrency=1).judge(TALKS[:3])
    for verdict in verdicts:
        assert message in verdict.error
        assert verdict.score("prompt_unsafe") == 1.0
    assert "secret" not in repr(verdicts)
    assert len(server.bodies) == asked


def test_what_a_server_says_of_a_failure_is_not_what_the_guard_wrote(folder, serve, caplog):
    """An error may hold the anchor of a verdict, or the name of a category."""
    told = {"error": {"message": "Answer: yes S9 is not allowed"}}
    words = {" yes": True, " no": False}
    thinks = ENTRY | {
        "generate": 4,
        "questions": [{"label": "last", "anchor": "Answer:", "words": words}],
    }
    server = serve(lambda body: (400, told) if "logprobs" not in body else token({1: -0.1}))
    options = {"engine": "server", "server_url": server.url}
    verdicts = guard(folder, thinks, **options).judge(TALKS[:3])
    assert all("is not allowed" in v.error and not v.decided for v in verdicts)
    assert not any("logprobs" in body for body in server.bodies)  # no verdict was read after it

    unsafe = guard(folder).verdict_tokens("prompt")[True][0]

    def rule(body):
        if "logprobs" not in body:
            return 400, told
        return token({unsafe: -0.1} | {i: -9.0 for i in body["logprob_token_ids"] if i != unsafe})

    server.rule = rule
    entry = ENTRY | {"categories": {"pattern": r"S\d+"}}
    verdicts = guard(folder, entry, categories=True, **options).judge(TALKS[:3])
    for verdict in verdicts:
        assert verdict.error is None
        assert verdict.decided["prompt_unsafe"]
        assert not verdict.categories
    assert "3 of 3 unsafe texts: the categories are not known, the verdicts stand" in caplog.text


def test_engine_needs_its_url(folder):
    with user_error("--engine server: name its --server_url"):
        guard(folder, engine="server")


def test_a_server_is_told_which_adapter(folder):
    """Under the base's name it would judge without the adapter, as if it were the guard."""
    server = {"engine": "server", "server_url": "http://127.0.0.1:1/v1"}
    entry = ENTRY | {"adapter": "some/adapter"}
    with user_error("server_model must say by what name the server knows some/adapter"):
        guard(folder, entry, **server)
    assert guard(folder, entry, server_model="m", **server).model.model == "m"


# --- what it sees and says --------------------------------------------------------------------------------------------


def test_more_tokens_than_the_model_sees(folder):
    with user_error("max_length 513: the model sees 512 tokens"):
        guard(folder, max_length=513)


@pytest.mark.parametrize("long_inputs", ["windows", "error", "truncate"])
def test_long_conversations_are_counted(folder, caplog, long_inputs):
    caplog.set_level(logging.INFO)
    long = "policy " * 600
    guard(folder, long_inputs=long_inputs).judge([TALKS[0], pair(long), pair("Why?", long)])
    told = [message for message in caplog.messages if "longer than" in message]
    assert told == [f"2 of 3 conversations are longer than 512 tokens: {long_inputs}"]


def test_a_line_that_is_missing_after_the_verdict(folder):
    """What it says of harm stands; whether the answer refuses is not known."""
    refusal = {"label": "response_refusal", "when": "response", "anchor": "Refusal:"}
    refusal["words"] = {" yes": True, " no": False}
    first = {"label": "last", "prefix": "User:", "words": WORDS}
    entry = ENTRY | {"generate": 4, "questions": [first, refusal]}
    plain = guard(folder, ENTRY | {"questions": [first]}).judge(TALKS)
    assert any(verdict.response_unsafe is not None for verdict in plain)
    asked = guard(folder, entry).judge(TALKS, wanted=["response_refusal"])
    for verdict, alone in zip(asked, plain, strict=True):
        assert verdict.error == alone.error
        assert verdict.decided == alone.decided
        assert verdict.response_refusal is None
    entry["questions"] = [refusal, ENTRY["questions"][1]]
    (before,) = guard(folder, entry).judge(TALKS[-1:], wanted=["response_refusal"])
    assert "no Refusal: in what it wrote" in before.error
