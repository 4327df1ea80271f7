"""guards/api.py against a local server that speaks the three services' protocols, and fails when
told to.
"""

import json
import logging
import re
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import pytest

from common.conversation import UserError, pair
from guards import api
from guards.api import ApiGuard

KEY = "key-Zx81qLm0vK77-sT5wPd3rY9aB2"
KEYS = {"openai-moderation": "OPENAI_API_KEY", "perspective": "PERSPECTIVE_API_KEY"}
KEYS |= {"azure-content-safety": "AZURE_CONTENT_SAFETY_KEY"}
SIX = ["IDENTITY_ATTACK", "INSULT", "SEVERE_TOXICITY", "SEXUALLY_EXPLICIT", "THREAT", "TOXICITY"]
THIRTEEN = [
    *(
        "harassment",
        "harassment/threatening",
        "hate",
        "hate/threatening",
        "illicit",
        "illicit/violent",
        "self-harm",
    ),
    *(
        "self-harm/instructions",
        "self-harm/intent",
        "sexual",
        "sexual/minors",
        "violence",
        "violence/graphic",
    ),
]
LIMITS = {"perspective": ("utf-8", 20480), "azure-content-safety": ("utf-16-le", 20000)}  # in bytes
every_service = pytest.mark.parametrize("service", KEYS)


def score(text: str) -> float:
    """What the server thinks of a text: "rude 0.7" is 0.7, anything else 0.0."""
    return float((re.findall(r"rude (\d\.\d+)", text) or ["0.0"])[-1])


def answer(service: str, text: str) -> dict:
    """A right answer of `service`; one category has the score, the others less."""
    value = score(text)
    if service == "openai-moderation":
        scores = dict.fromkeys(THIRTEEN, value / 10) | {"harassment": value}
        result = {
            "flagged": value > 0.3,
            "categories": dict.fromkeys(THIRTEEN, value > 0.3),
            "category_scores": scores,
        }
        return {"id": "modr-1", "model": "omni-moderation-2024-09-26", "results": [result]}
    if service == "perspective":
        scores = dict.fromkeys(SIX, value / 10) | {"INSULT": value}
        attributes = {
            name: {"summaryScore": {"value": v, "type": "PROBABILITY"}}
            for name, v in scores.items()
        }
        return {"attributeScores": attributes, "languages": ["en"], "detectedLanguages": ["en"]}
    found = {"Hate": 2 * int(value * 3.99), "SelfHarm": 0, "Sexual": 0, "Violence": 0}
    return {
        "blocklistsMatch": [],
        "categoriesAnalysis": [{"category": c, "severity": s} for c, s in found.items()],
    }


QUOTES = f"Incorrect API key provided: {KEY[:8]}***{KEY[-4:]}, that is {KEY}."
REFUSALS = {  # how each service refuses a key; none should be quoted
    "openai-moderation": (401, {"error": {"message": QUOTES, "code": "invalid_api_key"}}),
    "perspective": (
        400,
        {"error": {"code": 400, "message": QUOTES, "details": [{"reason": "API_KEY_INVALID"}]}},
    ),
    "azure-content-safety": (401, {"error": {"code": "401", "message": QUOTES}}),
}


class Handler(BaseHTTPRequestHandler):
    protocol_version, wbufsize = "HTTP/1.1", -1

    def log_message(self, *_):
        pass

    def reply(self, status: int, body, length: int | None = None, **headers) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers |= {"Content-Type": "application/json", "Content-Length": length or len(data)}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(data)

    def read(self) -> tuple[str, str, str]:
        """Service, key and text of the request; an AssertionError when it is not what the service
        documents.
        """
        body, path = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.path
        assert self.headers["Content-Type"] == "application/json"
        if path == "/v1/moderations":
            assert set(body) == {"input", "model"} and body["model"] == self.server.model
            return (
                "openai-moderation",
                self.headers["Authorization"].removeprefix("Bearer "),
                body["input"],
            )
        if path == "/v1alpha1/comments:analyze":
            assert (
                sorted(body["requestedAttributes"]) == SIX
                and body["languages"] == ["en"]
                and body["doNotStore"]
            )
            return "perspective", self.headers["X-Goog-Api-Key"], body["comment"]["text"]
        assert path == "/contentsafety/text:analyze?api-version=2024-09-01", path
        assert body["outputType"] == "FourSeverityLevels" and len(body["categories"]) == 4
        return "azure-content-safety", self.headers["Ocp-Apim-Subscription-Key"], body["text"]

    def do_POST(self):
        try:
            service, key, text = self.read()
        except AssertionError as error:
            return self.reply(400, {"error": {"code": "WrongRequest", "message": str(error)}})
        server = self.server
        with server.lock:
            server.asked.append((text, time.monotonic()))
            server.busy += 1
            server.peak = max(server.peak, server.busy)
            step = server.plan[text].pop(0) if server.plan.get(text) else None
        time.sleep(server.delay)
        encoding, limit = LIMITS.get(service, ("utf-8", 10**9))
        if key != KEY or step == "refuse":
            self.reply(*REFUSALS[service])
        elif step:
            step(self)
        elif len(text.encode(encoding)) > limit:
            self.reply(400, {"error": {"code": "TextTooLong"}})
        else:
            self.reply(200, answer(service, text))
        with server.lock:
            server.busy -= 1


def status(code: int, body=b"", **headers) -> Callable[[Handler], None]:
    return lambda handler: handler.reply(code, body, **headers)


def slow(handler: Handler) -> None:
    time.sleep(1.0)
    handler.reply(200, {})


def hang_up(handler: Handler) -> None:
    handler.close_connection = True


def cut(handler: Handler) -> None:
    """A body that ends in the middle, with a beginning that looks harmless."""
    handler.reply(200, b'{"results": [{"flagged": false}]}', length=5000)
    hang_up(handler)


@pytest.fixture
def server(monkeypatch):
    """`plan[text]` lists what goes wrong with the next requests for a text; `asked` holds (text,
    time) of them all.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # a client that gave up
    server.lock, server.plan, server.asked, server.busy, server.peak, server.delay = (
        threading.Lock(),
        {},
        [],
        0,
        0,
        0,
    )
    server.model, server.url = (
        "omni-moderation-2024-09-26",
        f"http://127.0.0.1:{server.server_address[1]}",
    )
    for name in KEYS.values():
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("AZURE_CONTENT_SAFETY_ENDPOINT", f"{server.url}/")  # as the portal shows it
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    ).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def load(server):
    """`load(service, **options)`: the guard, asking the local server."""

    def load(service: str, **options) -> ApiGuard:
        base = {"openai-moderation": f"{server.url}/v1", "perspective": server.url}.get(service)
        return ApiGuard(
            service,
            **({"base_url": base, "backoff": 0.02, "timeout": 5.0, "progress": False} | options),
        )

    return load


def asks(*texts: str) -> list:
    return list(map(pair, texts))


def failed(verdict) -> bool:
    """An error verdict counts as unsafe and says nothing else."""
    empty = not (verdict.categories or verdict.decided or verdict.native)
    return (
        bool(verdict.error)
        and empty
        and verdict.score("prompt_unsafe") == verdict.score("response_unsafe") == 1.0
    )


FOUND = [
    ("openai-moderation", 0.75, "harassment", "flagged"),
    ("perspective", 0.75, "INSULT", None),
]
FOUND += [("azure-content-safety", 4 / 6, "Hate", "severity 4")]


@pytest.mark.parametrize(("service", "probability", "category", "word"), FOUND)
def test_right_answers(load, service, probability, category, word):
    """The last turn alone is judged: a user's as a prompt, an assistant's as a response."""
    guard = load(service)
    turns = [
        pair("so rude 0.75"),
        pair("not so rude 0.1", "so rude 0.75"),
        pair("so rude 0.75", "How nice."),
    ]
    asked, answered, mild = guard.judge(turns)
    assert (
        asked.prompt_unsafe
        == answered.response_unsafe
        == asked.categories[category]
        == pytest.approx(probability)
    )
    assert (asked.response_unsafe, answered.prompt_unsafe, mild.prompt_unsafe) == (None, None, None)
    assert asked.decided == {"prompt_unsafe": True} and answered.decided == {
        "response_unsafe": True
    }
    assert (
        mild.response_unsafe == 0.0
        and mild.decided == {"response_unsafe": False}
        and mild.error is None
    )
    assert asked.native.get("prompt_unsafe") == word and guard.judges == (
        "prompt_unsafe",
        "response_unsafe",
    )
    assert guard.moderate([pair("so rude 0.75", "Nice."), pair("rude 0.75")]) == [
        0.0,
        pytest.approx(probability),
    ]


DECISIONS = [  # of rude 0.2, 0.4, 0.49, 0.6 and 0.9
    ("openai-moderation", {}, [False, True, True, True, True]),  # the server's own threshold
    ("perspective", {}, [False, False, False, True, True]),
    ("azure-content-safety", {}, [False, False, False, True, True]),
    ("azure-content-safety", {"threshold": 2}, [False, True, True, True, True]),
    ("azure-content-safety", {"threshold": 6}, [False, False, False, False, True]),
]


@pytest.mark.parametrize(("service", "options", "decided"), DECISIONS)
def test_decisions(load, service, options, decided):
    verdicts = load(service, **options).judge(
        asks("rude 0.2", "rude 0.4", "rude 0.49", "rude 0.6", "rude 0.9")
    )
    assert [v.decided["prompt_unsafe"] for v in verdicts] == decided


def test_another_model(load, server):
    server.model = "omni-moderation-latest"
    assert (
        load("openai-moderation", model=server.model).judge(asks("rude 0.9"))[0].prompt_unsafe
        == 0.9
    )
    assert failed(load("openai-moderation").judge(asks("rude 0.9"))[0])


@every_service
def test_order_and_concurrency(load, server, service):
    server.delay, guard = 0.02, load(service, concurrency=4)
    texts = [f"{i}: rude 0.{i}" for i in range(10, 50)]
    server.plan = {text: [status(503)] for text in texts[::5]}  # come back late
    found = [verdict.prompt_unsafe for verdict in guard.judge(asks(*texts))]
    assert found[::13] == [guard.judge(asks(text))[0].prompt_unsafe for text in texts[::13]]
    assert found == sorted(found) and len(set(found)) > 1 and server.peak == 4


FAULTS = {
    "429": status(429, {"error": {"type": "requests", "code": "rate_limit_exceeded"}}),
    "503": status(503),
}
FAULTS |= {"500": status(500, b"<p>oops</p>"), "slow": slow, "cut": cut, "hang_up": hang_up}


@every_service
def test_passing_faults_are_retried_and_lasting_ones_are_errors(load, server, service):
    """And Retry-After is waited for."""
    server.plan = {f"rude 0.9 {name}": [fault] * 2 for name, fault in FAULTS.items()}
    server.plan |= {f"lasting {name}": [fault] * 9 for name, fault in FAULTS.items()}
    texts = ["later", *server.plan, "good"]
    server.plan["later"] = [status(429, Retry_After=1)]
    verdicts = dict(
        zip(texts, load(service, timeout=0.4, max_retries=2).judge(asks(*texts)), strict=True)
    )
    asked = Counter(text for text, _ in server.asked)
    for name in FAULTS:
        passing, lasting = f"rude 0.9 {name}", f"lasting {name}"
        assert (
            verdicts[passing].decided == {"prompt_unsafe": True} and verdicts[passing].error is None
        ), name
        assert failed(verdicts[lasting]) and "3 times" in verdicts[lasting].error, name
        assert asked[passing] == asked[lasting] == 3, name
    first, second = (when for text, when in server.asked if text == "later")
    assert (
        second - first >= 1.0
        and verdicts["later"].prompt_unsafe == verdicts["good"].prompt_unsafe == 0.0
    )


def test_pauses_are_bounded():
    for asked, least, most in (
        ("7", 7, 7),
        ("86400", 60, 60),
        *((word, 3, 4) for word in ("soon", "-5", "nan", "")),
    ):
        assert (
            least <= api._pause(httpx2.Response(429, headers={"Retry-After": asked}), 4.0) <= most
        )
    assert 3 <= api._pause(None, 4.0) <= 4 and api._pause(None, 1e9) == 60


SCORE = {
    "openai-moderation": '"violence": 0.0',
    "perspective": '"value": 0.0',
    "azure-content-safety": '"severity": 0',
}


def spoiled(service: str, value) -> bytes:
    """A harmless answer with `value` for one score; `...` leaves the score out."""
    new = '"other": 0' if value is ... else f"{SCORE[service].split(':')[0]}: {json.dumps(value)}"
    return json.dumps(answer(service, "good")).replace(SCORE[service], new, 1).encode()


NO_SCORES = [..., None, "0", True, False, -2, 1.5, 7, float("nan"), float("inf"), [], 10**400]
NO_ANSWERS = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"{}",
    b"<html>safe</html>",
    b'"safe"',
    b"\xff\xfe",
    b"[" * 100_000,
]


@every_service
def test_an_answer_without_its_scores_is_an_error(load, server, service):
    """And is not asked for again: 200 was the service's last word."""
    bodies = [*(spoiled(service, value) for value in NO_SCORES), *NO_ANSWERS]
    if service == "openai-moderation":
        good = json.dumps(answer(service, "good"))
        bodies += [
            good.replace('"flagged": false', f'"flagged": {word}').encode()
            for word in ("null", "0", '"false"')
        ]
    server.plan = {f"bad {i}": [status(200, body)] for i, body in enumerate(bodies)}
    *bad, good = load(service).judge(asks(*server.plan, "good"))
    assert [body for body, verdict in zip(bodies, bad, strict=True) if not failed(verdict)] == []
    assert good.prompt_unsafe == 0.0 and len(server.asked) == len(bodies) + 1


@every_service
def test_items_that_cannot_be_asked_are_errors_of_their_own(load, server, service):
    server.plan = {
        "unwanted": [
            status(400, {"error": {"code": "LANGUAGE_NOT_SUPPORTED", "message": "unwanted"}})
        ]
    }
    server.plan["elsewhere"] = [status(302, Location="http://127.0.0.1:9/")]
    system = [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]
    conversations = [
        pair("rude 0.9"),
        pair(" \n"),
        pair("unwanted"),
        [],
        system,
        pair("\ud800"),
        pair("elsewhere"),
    ]
    verdicts = load(service).judge([*conversations, pair("good")])
    assert [bool(v.error) for v in verdicts] == [False, *[True] * 6, False] and all(
        map(failed, verdicts[1:-1])
    )
    assert verdicts[2].error == f"{service}: HTTP 400 LANGUAGE_NOT_SUPPORTED"
    assert sorted(text for text, _ in server.asked) == ["elsewhere", "good", "rude 0.9", "unwanted"]
    assert verdicts[0].decided["prompt_unsafe"] and verdicts[-1].prompt_unsafe == 0.0
    assert load(service).judge([]) == []


@every_service
def test_a_refused_key_ends_the_asking(load, server, service, monkeypatch):
    monkeypatch.setenv(KEYS[service], "key-wrong")
    verdicts = load(service, concurrency=2).judge(asks(*(f"text {i}" for i in range(30))))
    assert len(server.asked) <= 2 and len(verdicts) == 30
    assert all(map(failed, verdicts)) and all(KEYS[service] in v.error for v in verdicts)


@every_service
def test_a_refused_key_ends_waiting_and_keeps_what_was_judged(load, server, service):
    server.plan = {"waits": [status(503, Retry_After=50)], "last": ["refuse"]}
    begun = time.monotonic()
    verdicts = load(service, concurrency=2).judge(
        asks("waits", "rude 0.9", "last", "never", "never")
    )
    assert time.monotonic() - begun < 5 and verdicts[1].decided == {"prompt_unsafe": True}
    assert all(map(failed, (verdicts[0], *verdicts[2:]))) and "never" not in dict(server.asked)


def test_an_empty_account_ends_the_asking(load, server):
    server.plan = {
        "text 0": [status(429, {"error": {"message": "…", "code": "insufficient_quota"}})]
    }
    verdicts = load("openai-moderation", concurrency=1).judge(asks("text 0", "text 1"))
    assert (
        all(map(failed, verdicts))
        and len(server.asked) == 1
        and "insufficient_quota" in verdicts[0].error
    )


@every_service
def test_no_key_in_any_output(load, server, service, caplog, capfd):
    """Everything that libraries log at DEBUG, stdout and stderr, verdicts, the guard; the server
    quotes the key.
    """
    caplog.set_level(logging.DEBUG)
    quoting = {"error": {"code": KEY, "type": KEY, "message": f"sorry, {KEY}"}}
    faults = FAULTS | {
        "bad": status(200, b"{"),
        "quotes": status(400, quoting),
        "tired": status(500, quoting),
    }
    server.plan = {name: [fault] * 9 for name, fault in faults.items()} | {"refused": ["refuse"]}
    guard = load(service, timeout=0.4, max_retries=1, progress=True)
    verdicts = guard.judge([*asks("good", *faults), pair("\ud800")]) + guard.judge(asks("refused"))
    printed = capfd.readouterr()
    assert (
        "HTTP Request: POST http://127.0.0.1" in caplog.text
        and "send_request_headers" in caplog.text
    )
    assert (
        f"judging with {service}" in printed.err
        and [v.error is None for v in verdicts].count(True) == 1
    )
    output = [
        caplog.text,
        *printed,
        *(f"{vars(r)}" for r in caplog.records),
        f"{verdicts} {guard} {vars(guard)}",
    ]
    assert not [text for text in output if any(part in text for part in (KEY, KEY[:8], KEY[-4:]))]


@pytest.mark.parametrize("missing", [*KEYS.values(), "AZURE_CONTENT_SAFETY_ENDPOINT"])
def test_a_missing_variable_is_named(server, monkeypatch, missing):
    service = next((s for s, name in KEYS.items() if name == missing), "azure-content-safety")
    for unset in (lambda: monkeypatch.setenv(missing, " "), lambda: monkeypatch.delenv(missing)):
        unset()
        with pytest.raises(UserError, match=f"{missing} is not set"):
            ApiGuard(service)


@pytest.mark.parametrize("key", [f"{KEY}\n{KEY}", f"{KEY}é", f"\x00{KEY}"])
def test_a_key_that_no_header_takes_is_refused_and_not_shown(load, monkeypatch, key):
    monkeypatch.setattr("os.environ", {"OPENAI_API_KEY": key})
    with pytest.raises(UserError, match="OPENAI_API_KEY") as error:
        load("openai-moderation")
    assert KEY not in "".join(traceback.format_exception(error.value)) + repr(
        error.value.__context__
    )


WRONG = [
    ("openai", {}, "openai-moderation, perspective, azure-content-safety"),
    ("perspective", {"threshold": 4}, "threshold is for Azure alone"),
    ("azure-content-safety", {"threshold": 3}, "2, 4 or 6"),
    ("azure-content-safety", {"model": "x"}, "model is for openai-moderation"),
    *(
        ("perspective", {name: -1}, name)
        for name in ("concurrency", "timeout", "max_retries", "backoff")
    ),
    *(
        ("perspective", {"base_url": url}, "base URL")
        for url in ("localhost", "https://a/?key=x", "https://u:p@a")
    ),
]


@pytest.mark.parametrize(("service", "options", "message"), WRONG)
def test_wrong_options(server, service, options, message):
    with pytest.raises(UserError, match=message):
        ApiGuard(service, **options)


@pytest.mark.parametrize(
    ("service", "most"), [("perspective", "é" * 10_240), ("azure-content-safety", "😀" * 5_000)]
)
def test_a_text_over_the_services_limit_is_an_error(load, server, service, most):
    whole, over = load(service).judge(asks(most, most + "a"))
    assert whole.error is None
    assert failed(over) and "bytes, more than" in over.error
    assert len(server.asked) == 1
