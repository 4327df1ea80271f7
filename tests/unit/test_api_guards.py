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

import pytest
from checks import user_error

from common.conversation import pair
from guards.api import ApiGuard

KEY = "key-Zx81qLm0vK77-sT5wPd3rY9aB2"
KEYS = {
    "openai-moderation": "OPENAI_API_KEY",
    "perspective": "PERSPECTIVE_API_KEY",
    "azure-content-safety": "AZURE_CONTENT_SAFETY_KEY",
}
SIX = ["IDENTITY_ATTACK", "INSULT", "SEVERE_TOXICITY", "SEXUALLY_EXPLICIT", "THREAT", "TOXICITY"]
CATEGORIES = """
harassment harassment/threatening hate hate/threatening illicit illicit/violent self-harm
self-harm/instructions self-harm/intent sexual sexual/minors violence violence/graphic
"""
THIRTEEN = CATEGORIES.split()
LIMITS = {"perspective": ("utf-8", 20480), "azure-content-safety": ("utf-16-le", 20000)}  # in bytes
every_service = pytest.mark.parametrize("service", KEYS)


def score(text: str) -> float:
    """What the server thinks of a text: "rude 0.7" is 0.7, anything else 0.0."""
    return float((re.findall(r"rude (\d\.\d+)", text) or ["0.0"])[-1])


def answer(service: str, text: str) -> dict:
    """A right answer of `service`; one category has the score, the others less."""
    value = score(text)
    if service == "openai-moderation":
        result = {
            "flagged": value > 0.3,
            "categories": dict.fromkeys(THIRTEEN, value > 0.3),
            "category_scores": dict.fromkeys(THIRTEEN, value / 10) | {"harassment": value},
        }
        return {"id": "modr-1", "model": "omni-moderation-2024-09-26", "results": [result]}
    if service == "perspective":
        attributes = {}
        for name in SIX:
            probability = value if name == "INSULT" else value / 10
            summary = {"value": probability, "type": "PROBABILITY"}
            attributes[name] = {"summaryScore": summary}
        return {"attributeScores": attributes, "languages": ["en"], "detectedLanguages": ["en"]}
    found = [{"category": "Hate", "severity": 2 * int(value * 3.99)}]
    found += [{"category": name, "severity": 0} for name in ("SelfHarm", "Sexual", "Violence")]
    return {"blocklistsMatch": [], "categoriesAnalysis": found}


QUOTES = f"Incorrect API key provided: {KEY[:8]}***{KEY[-4:]}, that is {KEY}."
INVALID = {"code": 400, "message": QUOTES, "details": [{"reason": "API_KEY_INVALID"}]}
REFUSALS = {  # how each service refuses a key; none should be quoted
    "openai-moderation": (401, {"error": {"message": QUOTES, "code": "invalid_api_key"}}),
    "perspective": (400, {"error": INVALID}),
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
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        path = self.path
        assert self.headers["Content-Type"] == "application/json"
        if path == "/v1/moderations":
            assert set(body) == {"input", "model"}
            assert body["model"] == self.server.model
            key = self.headers["Authorization"].removeprefix("Bearer ")
            return "openai-moderation", key, body["input"]
        if path == "/v1alpha1/comments:analyze":
            assert sorted(body["requestedAttributes"]) == SIX
            assert body["languages"] == ["en"]
            assert body["doNotStore"]
            return "perspective", self.headers["X-Goog-Api-Key"], body["comment"]["text"]
        assert path == "/contentsafety/text:analyze?api-version=2024-09-01", path
        assert body["outputType"] == "FourSeverityLevels"
        assert len(body["categories"]) == 4
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


class Server(ThreadingHTTPServer):
    """`plan[text]` lists what goes wrong with the next requests for a text; `asked` holds (text,
    time) of them all.
    """

    model = "omni-moderation-2024-09-26"
    busy = peak = delay = 0

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.plan = {}
        self.asked = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        run = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        run.start()

    def handle_error(self, *_):
        """A client gave up."""


@pytest.fixture
def server(monkeypatch):
    server = Server()
    for name in KEYS.values():
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("AZURE_CONTENT_SAFETY_ENDPOINT", f"{server.url}/")  # as the portal shows it
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def load(server):
    """`load(service, **options)`: the guard, asking the local server."""
    urls = {"openai-moderation": f"{server.url}/v1", "perspective": server.url}

    def load(service: str, **options) -> ApiGuard:
        quick = {"backoff": 0.02, "timeout": 5.0, "progress": False}
        return ApiGuard(service, **({"base_url": urls.get(service)} | quick | options))

    return load


def asks(*texts: str) -> list:
    return [pair(text) for text in texts]


def check_failed(*verdicts) -> None:
    """An error verdict counts as unsafe and says nothing else."""
    for verdict in verdicts:
        assert verdict.error
        assert not verdict.categories
        assert not verdict.decided
        assert not verdict.native
        assert verdict.score("prompt_unsafe") == 1.0
        assert verdict.score("response_unsafe") == 1.0


RIGHT = {  # service: probability, category and word for "rude 0.75"
    "openai-moderation": (0.75, "harassment", "flagged"),
    "perspective": (0.75, "INSULT", None),
    "azure-content-safety": (4 / 6, "Hate", "severity 4"),
}


@every_service
def test_right_answers(load, service):
    """The last turn alone is judged: a user's as a prompt, an assistant's as a response."""
    probability, category, word = RIGHT[service]
    guard = load(service)
    rude = "so rude 0.75"
    talks = [pair(rude), pair("not so rude 0.1", rude), pair(rude, "How nice.")]
    asked, answered, mild = guard.judge(talks)
    assert asked.prompt_unsafe == pytest.approx(probability)
    assert asked.categories[category] == asked.prompt_unsafe
    assert asked.response_unsafe is None
    assert asked.decided == {"prompt_unsafe": True}
    assert asked.native.get("prompt_unsafe") == word
    assert answered.response_unsafe == asked.prompt_unsafe
    assert answered.prompt_unsafe is None
    assert answered.decided == {"response_unsafe": True}
    assert mild.response_unsafe == 0.0
    assert mild.decided == {"response_unsafe": False}
    assert guard.moderate(talks) == [asked.prompt_unsafe, asked.prompt_unsafe, 0.0]


@pytest.mark.parametrize(
    ("service", "options", "unsafe"),
    [  # how many of rude 0.9, 0.6, 0.49, 0.4 and 0.2
        ("openai-moderation", {}, 4),  # the server's own threshold
        ("perspective", {}, 2),
        ("azure-content-safety", {}, 2),
        ("azure-content-safety", {"threshold": 2}, 4),
        ("azure-content-safety", {"threshold": 6}, 1),
    ],
)
def test_decisions(load, service, options, unsafe):
    texts = ["rude 0.9", "rude 0.6", "rude 0.49", "rude 0.4", "rude 0.2"]
    verdicts = load(service, **options).judge(asks(*texts))
    decided = [verdict.decided["prompt_unsafe"] for verdict in verdicts]
    assert decided == [True] * unsafe + [False] * (5 - unsafe)


def test_another_model(load, server):
    server.model = "omni-moderation-latest"
    (right,) = load("openai-moderation", model=server.model).judge(asks("rude 0.9"))
    assert right.prompt_unsafe == 0.9
    check_failed(*load("openai-moderation").judge(asks("rude 0.9")))


@every_service
def test_order_and_concurrency(load, server, service):
    server.delay = 0.02
    texts = [f"{i}: rude 0.{i}" for i in range(10, 50)]
    server.plan = {text: [status(503)] for text in texts[::5]}  # come back late
    verdicts = load(service, concurrency=4).judge(asks(*texts))
    found = [verdict.prompt_unsafe for verdict in verdicts]
    assert found == sorted(found)
    assert found[0] < found[-1]
    assert server.peak == 4


FAULTS = {
    "429": status(429, {"error": {"type": "requests", "code": "rate_limit_exceeded"}}),
    "503": status(503),
    "500": status(500, b"<p>oops</p>"),
    "slow": slow,
    "cut": cut,
    "hang_up": hang_up,
}


@every_service
def test_passing_faults_are_retried_and_lasting_ones_are_errors(load, server, service):
    passing = [f"rude 0.9 {name}" for name in FAULTS]
    lasting = [f"lasting {name}" for name in FAULTS]
    for first, second, fault in zip(passing, lasting, FAULTS.values(), strict=True):
        server.plan |= {first: [fault] * 2, second: [fault] * 9}
    guard = load(service, timeout=0.4, max_retries=2)
    for verdict in guard.judge(asks(*passing)):
        assert verdict.error is None
        assert verdict.decided == {"prompt_unsafe": True}
    for verdict in guard.judge(asks(*lasting)):
        check_failed(verdict)
        assert "3 times" in verdict.error
    asked = Counter(text for text, _ in server.asked)
    assert asked == dict.fromkeys(passing + lasting, 3)


@every_service
def test_retry_after_is_waited_for(load, server, service):
    server.plan["later"] = [status(429, Retry_After=1)]
    (verdict,) = load(service).judge(asks("later"))
    (_, first), (_, second) = server.asked
    assert second - first >= 1.0
    assert verdict.prompt_unsafe == 0.0


def test_a_pause_is_bounded(load, server, monkeypatch):
    """Whatever a service asks for."""
    pauses = []
    wait = threading.Event.wait

    def skip_long_ones(event, timeout=None):
        if timeout is None or timeout < 20:
            return wait(event, timeout)
        pauses.append(timeout)
        return False

    monkeypatch.setattr(threading.Event, "wait", skip_long_ones)
    server.plan["later"] = [status(429, Retry_After=86_400)]
    (verdict,) = load("perspective").judge(asks("later"))
    assert pauses == [60]
    assert verdict.error is None


SCORE = {
    "openai-moderation": '"violence": 0.0',
    "perspective": '"value": 0.0',
    "azure-content-safety": '"severity": 0',
}


def spoiled(service: str, value) -> bytes:
    """A harmless answer with `value` for one score; `...` leaves the score out."""
    new = '"other": 0' if value is ... else f"{SCORE[service].split(':')[0]}: {json.dumps(value)}"
    return json.dumps(answer(service, "good")).replace(SCORE[service], new, 1).encode()


NO_SCORES = [..., None, "0", True, -2, 7, float("nan"), float("inf"), [], 10**400]
NO_ANSWERS = [b"", b"{", b"[]", b"{}", b"<html>safe</html>", b"\xff\xfe", b"[" * 100_000]


@every_service
def test_an_answer_without_its_scores_is_an_error(load, server, service):
    """And is not asked for again: 200 was the service's last word."""
    bodies = [spoiled(service, value) for value in NO_SCORES] + NO_ANSWERS
    if service == "openai-moderation":
        good = json.dumps(answer(service, "good"))
        bodies.append(good.replace('"flagged": false', '"flagged": null').encode())
    server.plan = {f"bad {i}": [status(200, body)] for i, body in enumerate(bodies)}
    *bad, good = load(service).judge(asks(*server.plan, "good"))
    check_failed(*bad)
    assert good.prompt_unsafe == 0.0
    assert len(server.asked) == len(bodies) + 1


@every_service
def test_items_that_cannot_be_asked_are_errors_of_their_own(load, server, service):
    refusal = {"error": {"code": "LANGUAGE_NOT_SUPPORTED", "message": "unwanted"}}
    server.plan["unwanted"] = [status(400, refusal)]
    server.plan["elsewhere"] = [status(302, Location="http://127.0.0.1:9/")]
    wrong = asks("unwanted", "elsewhere", " \n", "\ud800")
    first, *verdicts, last = load(service).judge([pair("rude 0.9"), *wrong, [], pair("good")])
    check_failed(*verdicts)
    assert verdicts[0].error == f"{service}: HTTP 400 LANGUAGE_NOT_SUPPORTED"
    assert sorted(text for text, _ in server.asked) == ["elsewhere", "good", "rude 0.9", "unwanted"]
    assert first.decided["prompt_unsafe"]
    assert last.prompt_unsafe == 0.0


@every_service
def test_a_refused_key_ends_asking_and_waiting_and_keeps_what_was_judged(load, server, service):
    server.plan = {"waits": [status(503, Retry_After=50)], "last": ["refuse"]}
    talks = asks("waits", "rude 0.9", "last", *["never"] * 30)
    begun = time.monotonic()
    waits, judged, *rest = load(service, concurrency=2).judge(talks)
    assert time.monotonic() - begun < 5
    assert judged.decided == {"prompt_unsafe": True}
    check_failed(waits, *rest)
    assert "never" not in dict(server.asked)
    for verdict in rest:
        assert KEYS[service] in verdict.error


def test_an_empty_account_ends_the_asking(load, server):
    server.plan["text 0"] = [status(429, {"error": {"code": "insufficient_quota"}})]
    verdicts = load("openai-moderation", concurrency=1).judge(asks("text 0", "text 1"))
    check_failed(*verdicts)
    assert len(server.asked) == 1
    assert "insufficient_quota" in verdicts[0].error


@every_service
def test_no_key_in_any_output(load, server, service, caplog, capfd):
    """Everything that libraries log at DEBUG, stdout and stderr, verdicts, the guard; the server
    quotes the key.
    """
    caplog.set_level(logging.DEBUG)
    quoting = {"error": {"code": KEY, "type": KEY, "message": f"sorry, {KEY}"}}
    server.plan = {name: [fault] * 9 for name, fault in FAULTS.items()}
    server.plan["quotes"] = [status(400, quoting)]
    server.plan["tired"] = [status(500, quoting)] * 9
    guard = load(service, timeout=0.4, max_retries=1, progress=True)
    verdicts = guard.judge(asks("good", *server.plan))
    server.plan["refused"] = ["refuse"]
    verdicts += guard.judge(asks("refused"))
    printed = capfd.readouterr()
    assert "send_request_headers" in caplog.text
    assert f"judging with {service}" in printed.err
    records = [str(vars(record)) for record in caplog.records]
    output = "\n".join([*records, *printed, f"{verdicts} {guard} {vars(guard)}"])
    for part in (KEY, KEY[:8], KEY[-4:]):
        assert part not in output


@pytest.mark.parametrize("value", [" ", None], ids=["blank", "not there"])
@pytest.mark.parametrize(
    ("service", "missing"),
    [*KEYS.items(), ("azure-content-safety", "AZURE_CONTENT_SAFETY_ENDPOINT")],
)
def test_a_missing_variable_is_named(server, monkeypatch, service, missing, value):
    monkeypatch.delenv(missing)
    if value is not None:
        monkeypatch.setenv(missing, value)
    with user_error(f"{missing} is not set"):
        ApiGuard(service)


@pytest.mark.parametrize("key", [f"{KEY}\n{KEY}", f"{KEY}é", f"\x00{KEY}"])
def test_a_key_that_no_header_takes_is_refused_and_not_shown(load, monkeypatch, key):
    monkeypatch.setattr("os.environ", {"OPENAI_API_KEY": key})
    with user_error("OPENAI_API_KEY") as error:
        load("openai-moderation")
    assert KEY not in "".join(traceback.format_exception(error.value))
    assert KEY not in repr(error.value.__context__)


WRONG = {  # what is wrong: the service, its options, what is said
    "no such service": ("openai", {}, "openai-moderation, perspective, azure-content-safety"),
    "threshold": ("perspective", {"threshold": 4}, "threshold is for Azure alone"),
    "threshold between": ("azure-content-safety", {"threshold": 3}, "2, 4 or 6"),
    "model": ("azure-content-safety", {"model": "x"}, "model is for openai-moderation"),
    "no address": ("perspective", {"base_url": "localhost"}, "base URL"),
    "a key in the address": ("perspective", {"base_url": "https://a/?key=x"}, "base URL"),
    "a password in the address": ("perspective", {"base_url": "https://u:p@a"}, "base URL"),
    "concurrency": ("perspective", {"concurrency": -1}, "concurrency"),
    "timeout": ("perspective", {"timeout": -1}, "timeout"),
    "max_retries": ("perspective", {"max_retries": -1}, "max_retries"),
    "backoff": ("perspective", {"backoff": -1}, "backoff"),
}


@pytest.mark.parametrize(("service", "options", "hint"), WRONG.values(), ids=WRONG)
def test_wrong_options(server, service, options, hint):
    with user_error(hint):
        ApiGuard(service, **options)


@pytest.mark.parametrize(
    ("service", "most"), [("perspective", "é" * 10_240), ("azure-content-safety", "😀" * 5_000)]
)
def test_a_text_over_the_services_limit_is_an_error(load, server, service, most):
    whole, over = load(service).judge(asks(most, most + "a"))
    assert whole.error is None
    check_failed(over)
    assert len(server.asked) == 1
