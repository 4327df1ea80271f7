"""What stands before every route: limits of a request, the key, the counts and the log."""

import asyncio
import hmac
import logging
import time
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
)
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import (
    ASGIApp,
    Message,
    Receive,
    Scope,
    Send,
)

from guards.serve.wire import error_body

logger = logging.getLogger("guards.serve")
BODY_SECONDS = 30.0  # in which a request's body must be there
NEEDS_KEY = "/v1"  # how the routes begin that judge texts
CLIENT_LEFT = 499  # nginx' word in counts and logs for a client that did not wait


def refusal(error: HTTPException) -> JSONResponse:
    """The answer to a request that is refused."""
    status = error.status_code
    return JSONResponse(error_body(status, str(error.detail)), status, error.headers)


class ClientLeft(Exception):
    """Nobody waits for the answer."""


@dataclass
class Limits:
    """What a request may be. `key`: what it must carry; None lets everybody in."""

    max_body_bytes: int
    key: str | None = None


class Meters:
    """What `/metrics` tells. No label holds what a client wrote."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        self.requests = Counter(
            "guard_requests", "Requests by route and status", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "guard_request_seconds", "Seconds of a request", ["route"], registry=registry
        )
        self.batches = Histogram(
            "guard_batch_texts",
            "Texts judged together",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=registry,
        )
        self.flagged = Counter("guard_flagged", "Texts that were flagged", registry=registry)
        self.errors = Counter("guard_errors", "Texts without a verdict", registry=registry)
        self.waiting = Gauge("guard_waiting", "Texts that wait for the guard", registry=registry)


class Front:
    """An ASGI middleware: no text and no key gets into a log from here.

    uvicorn's own log of requests is off, because a key can stand in the address.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        meters: Meters,
        routes: set[str],
    ):
        self.app = app
        self.limits = limits
        self.meters = meters
        self.routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status = CLIENT_LEFT

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._answer(scope, receive, watched)
        except ClientLeft:
            pass
        except HTTPException as refused:
            await refusal(refused)(scope, receive, watched)
        except Exception as error:
            log_fault(error)
            if status == CLIENT_LEFT:  # nothing was said yet
                fault = HTTPException(500, "the server failed on this request")
                await refusal(fault)(scope, receive, watched)
        finally:
            self._count(scope, status, time.perf_counter() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_body(receive, self.limits.max_body_bytes)
        if scope["path"].startswith(NEEDS_KEY) and not self._is_let_in(scope):
            message = "the key is missing or wrong: Authorization: Bearer …"
            raise HTTPException(401, message, {"WWW-Authenticate": "Bearer"})
        await self.app(scope, replaying(body, receive), send)

    def _is_let_in(self, scope: Scope) -> bool:
        """Whether a request carries the key as OpenAI's clients do, or as Google's."""
        if self.limits.key is None:
            return True
        headers = dict(scope["headers"])
        query = parse_qs(scope["query_string"].decode("latin-1"))
        given = [headers.get(b"x-goog-api-key", b"")]
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer":
            given.append(token.strip())
        given += [one.encode() for one in query.get("key", [])]
        key = self.limits.key.encode()
        # All are compared, and each in constant time.
        matches = [hmac.compare_digest(one, key) for one in given]
        return any(matches)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope["path"] if scope["path"] in self.routes else "other"
        self.meters.requests.labels(route, status).inc()
        self.meters.seconds.labels(route).observe(seconds)
        if scope["method"] == "POST":
            logger.info("POST %s %d %.0f ms", route, status, seconds * 1000)


async def read_body(receive: Receive, most: int) -> bytes:
    """The whole body of a request. What is over the limit is read and dropped, because a client
    that still writes would not read the answer.

    Raises:
        HTTPException: it is too long, or comes too slowly.
        ClientLeft: it does not come at all.
    """
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft
                piece = message.get("body", b"")
                size += len(piece)
                if size <= most:
                    pieces.append(piece)
                more = message.get("more_body", False)
    except TimeoutError:
        close = {"Connection": "close"}
        raise HTTPException(408, f"no whole body in {BODY_SECONDS:.0f} s", close) from None
    if size > most:
        raise HTTPException(413, f"the body has {size} bytes, more than {most} (--max_body_bytes)")
    return b"".join(pieces)


def replaying(body: bytes, receive: Receive) -> Callable[[], Awaitable[Message]]:
    """`receive` for the routes: the body that was read, and then what else comes."""
    first: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay


def log_fault(error: Exception) -> None:
    """Where something failed. What the error says may quote a text, so that is left out."""
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s\n%s", type(error).__name__, where)
