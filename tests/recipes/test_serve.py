"""`python -m guards.serve` as a real process, asked by the real clients."""

import asyncio
import json
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import completions
import httpx2
import openai
import pytest
import schemathesis
import scripts
from checks import cases
from conftest import tiny_config
from expguard_rows import prompt_tokenizer
from hypothesis import HealthCheck, Phase, given, settings
from moderation_server import ROOT, RUN, Running, moderation_server
from schemathesis.checks import CHECKS, load_all_checks

from common.conversation import pair
from common.data import taxonomy
from guards import Guard, load_guard
from guards.card import ClassifierCard, GenerativeCard, Threshold, write_card

pytestmark = pytest.mark.slow
serve = completions.serve
KEY = "a-very-secret-key"
ENTRANCE = {"Authorization": f"Bearer {KEY}"}
WORDS = "How do I keep my bicycle from being stolen in the mountains of France"
TEXTS = [" ".join(WORDS.split()[: 1 + n % 14]) + f" {n}?" for n in range(200)]
LABELS = taxonomy("beavertails")
CLOSE = 1e-5
ANALYZE = "/v1alpha1/comments:analyze"
# The one category that OpenAI has, too: its client knows it by its own spelling alone.
OURS, OPENAIS = "self_harm", "self-harm"


def judge(guard: Guard, texts: list[str]) -> list:
    """What `judge` says of texts alone: this guard reads them as answers."""
    return guard.judge([pair("", text) for text in texts])


@pytest.fixture(scope="module")
def folder(tiny_classifier, tmp_path_factory) -> Path:
    """A tiny guard whose threshold lies in the midst of its scores."""
    folder = tiny_classifier(tmp_path_factory.mktemp("guard"))
    card = ClassifierCard(template="beavertails", labels=LABELS, max_length=128)
    write_card(folder, card)
    verdicts = judge(load_guard(str(folder), progress=False), TEXTS)
    scores = sorted(verdict.response_unsafe for verdict in verdicts)
    card.thresholds = {"flagged": Threshold(value=scores[100], how="the middle")}
    card.category_thresholds = {LABELS[0]: Threshold(value=0.0, how="everything")}
    write_card(folder, card)
    return folder


@pytest.fixture(scope="module")
def guard(folder) -> Guard:
    """The same in this process."""
    return load_guard(str(folder), progress=False)


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """A server that asks for a key and knows two of Perspective's attributes."""
    scratch = tmp_path_factory.mktemp("server")
    attributes = scratch / "attributes.yaml"
    attributes.write_text(f'INSULT: "{LABELS[3]}"\nTHREAT: [self_harm, "{LABELS[-1]}"]\n')
    flags = ["--attributes", attributes, "--max_body_bytes", 20_000]
    env = {"GUARD_API_KEY": KEY}
    with moderation_server(folder, scratch / "log", *flags, env=env) as running:
        yield running


@pytest.fixture(scope="module")
def open_server(folder, tmp_path_factory):
    """One without a key that lets four texts wait and judges one at a time."""
    flags = ["--max_waiting", 4, "--batch_tokens", 1]
    log = tmp_path_factory.mktemp("open") / "log"
    with moderation_server(folder, log, *flags) as running:
        yield running


def client(running: Running, **options) -> openai.OpenAI:
    options = {"api_key": KEY, "max_retries": 0, **options}
    return openai.OpenAI(base_url=f"{running.url}/v1", **options)


def by_our_names(said) -> dict:
    found = said.to_dict()
    found[OURS] = found.pop(OPENAIS)
    return found


def check_equal(result, verdict, guard: Guard) -> None:
    """An answer of the server says what `judge` says."""
    threshold = guard.thresholds["flagged"]["value"]
    scores = by_our_names(result.category_scores)
    assert scores.pop("unsafe") == pytest.approx(verdict.response_unsafe, abs=CLOSE)
    assert result.category_scores.self_harm == scores[OURS]
    assert scores == pytest.approx(verdict.categories, abs=CLOSE)
    assert result.flagged == (verdict.response_unsafe > threshold)
    categories = by_our_names(result.categories)
    assert categories.pop("unsafe") == result.flagged
    assert categories.pop(LABELS[0]) is True  # by the threshold of its own
    assert categories == {name: scores[name] > threshold for name in LABELS[1:]}
    applied = by_our_names(result.category_applied_input_types)
    assert applied == {key: ["text"] for key in [*LABELS, "unsafe"]}


# --- OpenAI's client ------------------------------------------------------------------------------


def test_a_text_a_list_and_text_parts(server, guard, folder):
    moderations = client(server).moderations
    first, second = TEXTS[5], TEXTS[11]
    said = moderations.create(input=first, model="omni-moderation-latest")
    assert said.id.startswith("modr-")
    assert said.model == folder.name
    listed = moderations.create(input=[first, second])
    joined = moderations.create(input=[{"type": "text", "text": text} for text in (first, second)])
    results = [*said.results, *listed.results, *joined.results]
    verdicts = judge(guard, [first, first, second, f"{first}\n{second}"])
    for result, verdict in zip(results, verdicts, strict=True):
        check_equal(result, verdict, guard)


def test_messages_are_one_conversation(server, guard):
    talk = [{"role": "system", "content": "Be kind."}, *pair(TEXTS[7], TEXTS[13])]
    said = client(server).moderations.create(input=[], extra_body={"messages": talk})
    (verdict,) = guard.judge([talk])
    (result,) = said.results
    check_equal(result, verdict, guard)


def test_two_hundred_at_once_are_each_as_judged(server, guard):
    """Requests are judged together, and each gets its own answer."""

    async def ask_all() -> list:
        options = {"base_url": f"{server.url}/v1", "api_key": KEY, "max_retries": 10}
        async with openai.AsyncOpenAI(**options) as asynchronous:
            create = asynchronous.moderations.create
            return await asyncio.gather(*[create(input=text) for text in TEXTS])

    before = server.metrics()
    results = [answer.results[0] for answer in asyncio.run(ask_all())]
    after = server.metrics()
    for result, verdict in zip(results, judge(guard, TEXTS), strict=True):
        check_equal(result, verdict, guard)
    batches = after["guard_batch_texts_count"] - before["guard_batch_texts_count"]
    assert batches < 100, "requests that came together were judged one by one"
    flagged = sum(result.flagged for result in results)
    assert flagged > 50
    assert after["guard_flagged_total"] - before["guard_flagged_total"] == flagged


# --- Perspective's clients ------------------------------------------------------------------------


def test_attributes_of_perspective(server, guard):
    """The key is in the address, as its clients put it."""
    (verdict,) = judge(guard, [TEXTS[3]])
    expected = {
        "TOXICITY": verdict.response_unsafe,
        "INSULT": verdict.categories[LABELS[3]],
        "THREAT": max(verdict.categories["self_harm"], verdict.categories[LABELS[-1]]),
    }
    body = {
        "comment": {"text": TEXTS[3], "type": "PLAIN_TEXT"},
        "requestedAttributes": {key: {} for key in expected},
        "languages": ["en"],
        "doNotStore": True,
        "clientToken": "comment-1",
        "spanAnnotations": True,
    }
    said = server.post(ANALYZE, body, params={"key": KEY}).json()
    assert said["languages"] == ["en"]
    assert said["clientToken"] == "comment-1"
    for name, score in expected.items():
        found = said["attributeScores"][name]
        assert found["summaryScore"]["value"] == pytest.approx(score, abs=CLOSE)
        (span,) = found["spanScores"]
        assert (span["begin"], span["end"]) == (0, len(TEXTS[3]))
    body["requestedAttributes"] = {"TOXICITY": {"scoreThreshold": 1.0}}
    below = server.post(ANALYZE, body, params={"key": KEY}).json()
    assert below["attributeScores"] == {}


@cases(
    "comment, names, hint",
    {
        "attribute": ({"text": "x"}, ["FLIRTATION"], "INSULT, THREAT"),
        "no text": ({"text": " "}, ["TOXICITY"], "non-empty"),
        "no attribute": ({"text": "x"}, [], "requestedAttributes"),
        "type": ({"text": "x", "type": "HTML"}, ["TOXICITY"], "comment.type"),
    },
)
def test_what_perspective_refuses(server, comment, names, hint):
    body = {"comment": comment, "requestedAttributes": {name: {} for name in names}}
    answer = server.post(ANALYZE, body, headers={"X-Goog-Api-Key": KEY})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["status"] == "INVALID_ARGUMENT"
    assert hint in error["message"]


# --- what is refused ------------------------------------------------------------------------------


def turns(role: str, **more) -> dict:
    return {"messages": [{"role": role, "content": "x", **more}]}


IMAGE = [{"type": "image_url", "image_url": {"url": "x"}}]


@cases(
    "body, hint",
    {
        "nothing": ({}, "input"),
        "no text": ({"input": []}, "input"),
        "a number": ({"input": 3}, "input"),
        "an image": ({"input": IMAGE}, "should be 'text'"),
        "two inputs": ({"input": "x", **turns("user")}, "one of the two"),
        "no message": ({"messages": []}, "non-empty list"),
        "role": (turns("tool"), "role"),
        "a system turn": (turns("system"), "ends with a system turn"),
        "not judged by this guard": (turns("user"), "ends with a turn of the user"),
        "tool calls": (turns("assistant", tool_calls=[{"id": "1"}]), "tool_calls"),
    },
)
def test_a_wrong_request_says_what_is_wrong(server, body, hint):
    answer = server.moderate(body, headers=ENTRANCE)
    assert answer.status_code == 400
    assert hint in answer.json()["error"]["message"]


def test_json_that_is_not_called_so(server):
    """As clients of Perspective often send it."""
    asked = {"comment": {"text": "x"}, "requestedAttributes": {"TOXICITY": {}}}
    body = json.dumps(asked).encode()
    answer = httpx2.post(f"{server.url}{ANALYZE}", content=body, params={"key": KEY})
    assert "Content-Type" not in answer.request.headers
    assert answer.status_code == 200


def test_a_lone_surrogate_is_a_wrong_request(server):
    headers = {**ENTRANCE, "Content-Type": "application/json"}
    body = b'{"input": "\\ud800"}'
    answer = httpx2.post(f"{server.url}/v1/moderations", content=body, headers=headers)
    assert answer.status_code == 400


def test_the_key(server, guard):
    with pytest.raises(openai.AuthenticationError):
        client(server, api_key="another").moderations.create(input="x")
    assert server.moderate({"input": "x"}).status_code == 401
    assert server.moderate({"input": "x"}, headers={"X-Goog-Api-Key": KEY}).status_code == 200
    small = {"Authorization": f"bearer {KEY}"}
    assert server.moderate({"input": "x"}, headers=small).status_code == 200
    for wrong in (f"{KEY}x", "", "schlüssel"):
        assert server.moderate({"input": "x"}, params={"key": wrong}).status_code == 401
    healthy = httpx2.get(f"{server.url}/healthz").json()
    assert healthy["status"] == "ok"
    assert healthy["thresholds"]["response_unsafe"] == guard.thresholds["flagged"]["value"]


def test_a_body_over_the_limit(server):
    """The client reads the answer, although it wrote more than the server wanted."""
    with pytest.raises(openai.APIStatusError) as error:
        client(server).moderations.create(input="x" * 5_000_000)
    assert error.value.status_code == 413
    assert "--max_body_bytes" in str(error.value)


def test_a_full_queue(open_server):
    """Who is refused is told when to come again, and nobody is told that his text is safe."""
    slow = {"input": " ".join(TEXTS)}
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(open_server.moderate, [slow] * 20))
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert 1 <= int(answer.headers["Retry-After"]) <= 60
    assert open_server.moderate({"input": ["x"] * 5}).status_code == 413
    patient = client(open_server, max_retries=8)
    assert patient.moderations.create(input="x").results


def test_an_error_of_the_guard_is_no_verdict(folder, tmp_path):
    """One text of two is too long: neither is said to be safe."""
    flags = ["--long_inputs", "error"]
    with moderation_server(folder, tmp_path / "log", *flags) as running:
        answer = running.moderate({"input": ["short", " ".join(TEXTS)]})
        assert answer.status_code == 503
        body = answer.json()
        assert "text 1" in body["error"]["message"]
        assert "--max_length" in body["error"]["message"]
        assert "results" not in body
        with pytest.raises(openai.InternalServerError):
            client(running).moderations.create(input=" ".join(TEXTS))
        assert running.metrics()["guard_errors_total"] == 2


def test_a_guard_on_a_server(serve, tmp_path):
    """A guard that generates, elsewhere: its verdicts while that answers, and 503 when not."""
    tokenizer = prompt_tokenizer()
    folder = tmp_path / "guard"
    tiny_config(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_card(folder, GenerativeCard(guard="expguard", max_length=400))
    broken = None

    def rule(body):
        if broken is not None:
            return broken
        unsafe, safe = sorted(body["logprob_token_ids"])[:2]
        return completions.token({unsafe: -0.1, safe: -3.0})

    options = {"engine": "server", "server_url": serve(rule).url, "server_model": "m"}
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    question = "How do I cook rice?"
    (verdict,) = load_guard(str(folder), progress=False, **options).judge([pair(question)])
    with moderation_server(folder, tmp_path / "log", *flags) as running:
        (said,) = running.moderate({"input": question}).json()["results"]
        assert said["category_scores"] == {"unsafe": pytest.approx(verdict.prompt_unsafe)}
        assert said["flagged"] == verdict.decided["prompt_unsafe"]
        for fault in (completions.HTML, (403, {"error": {"message": "no"}})):
            broken = fault
            assert running.moderate({"input": question}).status_code == 503
            broken = None  # mended: nobody has to start this server again
            assert running.moderate({"input": question}).status_code == 200


# --- malformed bodies -----------------------------------------------------------------------------


def test_whatever_is_sent_gets_an_answer_as_described(server):
    """Bodies after the OpenAPI description and against it: no answer is unknown to it."""
    names = ["not_a_server_error", "status_code_conformance", "content_type_conformance"]
    names += ["response_schema_conformance", "negative_data_rejection", "ignored_auth"]
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    # A body over the limit is refused, too.
    expected = ["400", "401", "413"]
    schema.config.checks.negative_data_rejection.expected_statuses = expected
    load_all_checks()
    checks = CHECKS.get_by_names(names)
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    limited = settings(
        max_examples=60,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    asked = 0
    for operation in schema.get_all_operations():
        if operation.ok().method != "post":
            continue
        for mode in modes:
            strategy = operation.ok().as_strategy(generation_mode=mode)

            @limited
            @given(strategy)
            def ask(case):
                nonlocal asked
                asked += 1
                case.call_and_validate(checks=checks, headers=ENTRANCE)

            ask()
    assert asked > 100


# --- what happens to a connection -----------------------------------------------------------------


def test_what_is_begun_is_finished(folder, tmp_path):
    """SIGTERM while a long text is judged: it gets its answer, and the server ends."""
    slow = {"input": [" ".join(TEXTS)] * 8}
    with moderation_server(folder, tmp_path / "log") as running, ThreadPoolExecutor() as pool:
        asked = pool.submit(running.moderate, slow)
        wait_until(lambda: running.metrics()["guard_batch_texts_count"] > 0)
        running.kill(signal.SIGTERM)
        answer = asked.result()
        assert answer.status_code == 200
        assert len(answer.json()["results"]) == 8
        wait_until(lambda: running.process.poll() is not None)
        with pytest.raises(httpx2.ConnectError):
            running.moderate({"input": "x"})


def test_clients_that_are_slow_or_leave(open_server):
    """Their texts leave the queue, and others are answered as ever."""
    slow = json.dumps({"input": [" ".join(TEXTS) * 3] * 4}).encode()
    head = b"POST /v1/moderations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    half = head + b"Content-Length: 100\r\n\r\n{"
    whole = head + f"Content-Length: {len(slow)}\r\n\r\n".encode() + slow
    address = ("127.0.0.1", open_server.port)
    halves = []
    for _ in range(20):  # these never send the rest
        halves.append(socket.create_connection(address))
        halves[-1].sendall(half)
    assert open_server.moderate({"input": "x"}).status_code == 200
    left = socket.create_connection(address)
    left.sendall(whole)
    wait_until(lambda: open_server.metrics()["guard_waiting"] > 0)
    left.close()
    wait_until(lambda: open_server.metrics()["guard_waiting"] == 0, 10)
    assert open_server.moderate({"input": "x"}).status_code == 200
    for one in halves:
        one.close()
    left_early = 'guard_requests_total{route="/v1/moderations",status="499"}'
    wait_until(lambda: open_server.metrics()[left_early] == 21)


def test_killed_and_started_again(folder, guard, tmp_path):
    """Who waits gets no answer, and one who asks again gets the right one."""
    (verdict,) = judge(guard, [TEXTS[0]])
    slow = {"input": [" ".join(TEXTS)] * 8}
    with moderation_server(folder, tmp_path / "log") as running, ThreadPoolExecutor() as pool:
        asked = pool.submit(running.moderate, slow)
        wait_until(lambda: running.metrics()["guard_batch_texts_count"] > 0)
        running.kill()
        with pytest.raises(httpx2.HTTPError):
            asked.result()
        with pytest.raises(openai.APIConnectionError):
            client(running).moderations.create(input=TEXTS[0])
    with moderation_server(folder, tmp_path / "log", port=running.port) as again:
        said = client(again).moderations.create(input=TEXTS[0])
        check_equal(said.results[0], verdict, guard)


def wait_until(holds, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- what is written ------------------------------------------------------------------------------


def test_no_text_and_no_key_in_the_log(server, folder, tmp_path):
    said = "zanzibar in the morning"
    server.moderate({"input": said}, headers=ENTRANCE)
    server.moderate({"input": {"zanzibar": 1}}, headers=ENTRANCE)
    server.post("/v1alpha1/zanzibar", {"input": said}, params={"key": KEY})
    log = server.log.read_text()
    assert "POST /v1/moderations 200" in log
    assert "zanzibar" not in log
    assert KEY not in log
    with moderation_server(folder, tmp_path / "log", "--log_texts") as talkative:
        talkative.moderate({"input": said})
        lines = talkative.log.read_text().splitlines()
        (line,) = [line for line in lines if "zanzibar" in line]
        row = json.loads(line)
        assert row["texts"] == [pair("", said)]
        assert row["answers"][0]["scores"]["unsafe"]


@pytest.mark.parametrize(
    ("flags", "key", "hint"),
    [
        ("--port 0", KEY, "--port 0: expected 1 to 65535"),
        ("--max_waiting 0", KEY, "--max_waiting 0: must be at least 1"),
        ("", " ", "GUARD_API_KEY is empty"),
        ("--engine server", KEY, "--engine is for guards that generate"),
        ("--attributes nowhere.yaml", KEY, "nowhere.yaml"),
    ],
)
def test_a_wrong_command_ends_in_one_line(folder, flags, key, hint):
    command = [sys.executable, "-c", RUN, folder, *flags.split()]
    done = scripts.run(command, ROOT, dict(scripts.ENVIRONMENT) | {"GUARD_API_KEY": key})
    assert hint in scripts.error_line(done)
