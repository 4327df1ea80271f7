"""The moderation server's parts: what a verdict means to a client, and the queue before the guard."""

import asyncio
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
from checks import user_error
from pydantic import ValidationError

from common.conversation import Verdict, pair
from guards.base import Guard
from guards.serve import wire
from guards.serve.answers import NoVerdict, Reader, read_attributes
from guards.serve.batching import BatchingQueue, QueueFull
from guards.suite.score import judged


class Plain(Guard):
    """A guard that only says what it is."""

    name = "plain"

    def __init__(self, thresholds=None, judges=("prompt_unsafe", "response_unsafe"), labels=()):
        self.thresholds = thresholds or {}
        self.judges = judges
        self.labels = labels


def above(value: float) -> dict:
    return {"value": value, "how": "said"}


# --- what a verdict means -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("thresholds", "decided", "flagged"),
    [
        ({}, {}, True),  # above 0.5
        ({}, {"prompt_unsafe": False}, False),  # by the guard's own word
        ({"flagged": above(0.7)}, {"prompt_unsafe": True}, False),
        ({"flagged": above(0.1)}, {"prompt_unsafe": False}, True),
        ({"flagged": above(0.7), "prompt_unsafe": above(0.1)}, {}, True),
        ({"flagged": above(0.1), "response_unsafe": above(0.9)}, {}, True),
        ({"flagged": above(0.6)}, {}, False),  # not above it
    ],
)
def test_what_is_flagged_here_and_in_the_suite(thresholds, decided, flagged):
    asked = pair("x")
    verdict = Verdict(prompt_unsafe=0.6, decided=decided)
    answer = Reader(Plain(thresholds)).answer(asked, verdict)
    assert answer.flagged is flagged
    assert answer.categories == {"unsafe": flagged}
    row = {"messages": asked, "label": True, "groups": {}}
    said = judged([row], [verdict], "prompt_unsafe", thresholds=thresholds)
    assert said.decided.tolist() == [flagged]


def test_categories_have_their_own_thresholds_and_safe_is_none():
    guard = Plain({"flagged": above(0.5), "fraud": above(0.1)})
    said = {"fraud": 0.2, "theft": 0.4, "Not harmful": 0.9}
    answer = Reader(guard).answer(pair("x", "y"), Verdict(response_unsafe=0.4, categories=said))
    assert answer.categories == {"fraud": True, "theft": False, "unsafe": False}
    assert answer.scores == {"fraud": 0.2, "theft": 0.4, "unsafe": 0.4}


@pytest.mark.parametrize("verdict", [Verdict(error="too long"), Verdict(response_unsafe=0.1)])
def test_no_verdict_is_never_safe(verdict):
    with pytest.raises(NoVerdict):
        Reader(Plain()).answer(pair("x"), verdict)


def test_how_a_text_alone_is_judged():
    prompts = Reader(Plain())
    answers = Reader(Plain(judges=("response_unsafe",)))
    asked = Reader(Plain(), text_is="response")
    assert prompts.conversation("x") == pair("x")
    assert answers.conversation("x") == asked.conversation("x") == pair("", "x")
    with user_error("--text_is prompt: the guard judges response_unsafe"):
        Reader(Plain(judges=("response_unsafe",)), text_is="prompt")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("- a\n", "expected lines such as TOXICITY: unsafe"),
        ("INSULT: []\n", "field INSULT: names no category"),
        ("INSULT: rude\n", "'rude' is no category of the guard; it has: unsafe; fraud"),
        ("INSULT: safe\n", "'safe' is no category"),
    ],
)
def test_wrong_attributes_are_named(tmp_path, text, hint):
    path = tmp_path / "attributes.yaml"
    path.write_text(text)
    with user_error(f"{path}.*{hint}"):
        read_attributes(path, Plain(labels=["fraud", "safe"]))


# --- the queue ------------------------------------------------------------------------------------


def talks(*sizes: int) -> list:
    """Conversations of about so many tokens."""
    return [pair("x" * 4 * (size - 1)) for size in sizes]


def said(conversations: list) -> list[Verdict]:
    return [Verdict(prompt_unsafe=len(one[0]["content"]) / 1e6) for one in conversations]


def run(judge, scenario, budget: int = 10, most: int = 100):
    """`scenario(queue)` while the queue runs."""

    async def main():
        queue = BatchingQueue(judge, budget, most)
        worker = asyncio.create_task(queue.run())
        try:
            return await scenario(queue)
        finally:
            worker.cancel()

    return asyncio.run(main())


def test_batches_hold_a_budget_of_tokens_and_the_oldest_first():
    batches = []

    def judge(conversations):
        batches.append([1 + len(one[0]["content"]) // 4 for one in conversations])
        return said(conversations)

    async def scenario(queue):
        asked = [queue.judge(talks(size)) for size in (4, 4, 4, 30, 1, 1, 9)]
        return await asyncio.gather(*asked)

    found = run(judge, scenario)
    assert batches == [[4, 4], [4], [30], [1, 1], [9]]
    sizes = [round(verdicts[0].prompt_unsafe * 1e6 / 4) + 1 for verdicts in found]
    assert sizes == [4, 4, 4, 30, 1, 1, 9]


def test_a_full_queue_refuses_at_once_and_whole():
    async def scenario(queue):
        with pytest.raises(QueueFull) as full:
            await queue.judge(talks(1, 1, 1, 1))
        assert full.value.seconds >= 1 and not queue.waiting
        return await queue.judge(talks(1, 2, 3))

    assert len(run(said, scenario, most=3)) == 3


def test_who_leaves_is_judged_no_more():
    judged = []

    def judge(conversations):
        judged.extend(conversations)
        return said(conversations)

    async def scenario(queue):
        stays = asyncio.create_task(queue.judge(talks(9)))
        leaves = asyncio.create_task(queue.judge(talks(8, 8)))
        await asyncio.sleep(0)
        leaves.cancel()
        await stays
        await queue.judge(talks(7))

    run(judge, scenario)
    assert judged == talks(9, 7)


def test_what_the_guard_raises_is_told_and_the_next_batch_is_judged():
    calls = []

    def judge(conversations):
        calls.append(conversations)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return said(conversations)

    async def scenario(queue):
        with pytest.raises(RuntimeError):
            await queue.judge(talks(1, 1))
        return await queue.judge(talks(1))

    assert len(run(judge, scenario)) == 1


def test_what_a_request_that_failed_still_asks_is_judged_no_more():
    judged = []

    def judge(conversations):
        judged.extend(conversations)
        if len(judged) == 1:
            raise RuntimeError("out of memory")
        return said(conversations)

    async def scenario(queue):
        with pytest.raises(RuntimeError):
            await queue.judge(talks(9, 8, 7))
        assert not queue.waiting
        await queue.judge(talks(6))

    run(judge, scenario)
    assert talks(7)[0] not in judged


def test_a_guard_that_says_too_little_ends_nothing():
    """Who is left without a verdict is told of a fault, and the next batch is judged."""
    counts = iter([1, 1])

    async def scenario(queue):
        with pytest.raises(ValueError):
            await queue.judge(talks(1, 1))
        return await queue.judge(talks(1))

    assert len(run(lambda some: said(some[: next(counts)]), scenario)) == 1


@pytest.mark.parametrize("field", ["clientToken", "languages"])
def test_half_a_character_is_a_wrong_request(field):
    """JSON can spell half a surrogate pair; an answer that repeats it could not be written."""
    value = "\ud800" if field == "clientToken" else ["\ud800"]
    request = {"comment": {"text": "a"}, "requestedAttributes": {"TOXICITY": {}}, field: value}
    with pytest.raises(ValidationError, match="half a character"):
        wire.AnalyzeRequest.model_validate(request)
    wire.error_body(400, "Unknown requested attribute: \ud800")["error"]["message"].encode()


def test_a_guard_that_fails_wholly_is_counted():
    """The number of texts without a verdict, which alarms are set on."""
    pytest.importorskip("uvicorn", reason="the server is not installed (extra [serve])")
    with listening() as port:  # this guard has no judge
        address = f"http://127.0.0.1:{port}"
        asked = urllib.request.Request(
            f"{address}/v1/moderations",
            b'{"input": ["a", "b"]}',
            {"Content-Type": "application/json"},
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(asked)
        assert refused.value.code == 503
        told = urllib.request.urlopen(f"{address}/metrics").read().decode()
        assert "guard_errors_total 2.0" in told


# --- a slow client --------------------------------------------------------------------------------


@contextmanager
def listening():
    """The port of the server, in this process."""
    import uvicorn

    from guards.serve.app import make_app
    from guards.serve.front import Limits

    app = make_app(Reader(Plain()), Limits(1000), budget=10, most=10, log_texts=False)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    (listener,) = server.servers
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def test_half_a_body_is_answered_and_hung_up_on(monkeypatch):
    """408 after the time that a body has, while others are served."""
    pytest.importorskip("uvicorn", reason="the server is not installed (extra [serve])")
    monkeypatch.setattr("guards.serve.front.BODY_SECONDS", 0.5)
    half = (
        b"POST /v1/moderations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b'Content-Length: 100\r\n\r\n{"input": "How do'
    )
    with listening() as port, socket.create_connection(("127.0.0.1", port), timeout=30) as slow:
        start = time.monotonic()
        slow.sendall(half)
        assert urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz").status == 200
        with slow.makefile("rb") as answer:
            said = answer.read()  # to its end: the server closes
        assert 0.4 < time.monotonic() - start < 10
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408")
    assert b"connection: close" in head.lower()
    assert b'"timeout_error"' in body and b"How do" not in body
