"""The routes of the moderation server."""

import asyncio
import json
import logging
import re
import uuid
from collections.abc import (
    AsyncIterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from fastapi import (
    APIRouter,
    FastAPI,
    Request,
    Response,
    Security,
)
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from fastapi.security import APIKeyQuery, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from common.conversation import (
    Message,
    UserError,
    Verdict,
)
from guards.api import CATEGORIES
from guards.base import threshold_of
from guards.serve import wire
from guards.serve.answers import (
    Answer,
    NoVerdict,
    Reader,
)
from guards.serve.batching import BatchingQueue, QueueFull
from guards.serve.front import (
    ClientLeft,
    Front,
    Limits,
    Meters,
    log_fault,
    refusal,
)

logger = logging.getLogger("guards.serve")
Said = TypeVar("Said")
PAGE = Path(__file__).with_name("page.html")
# The page asks this server alone, and runs nothing that came from elsewhere.
PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; frame-ancestors 'none'"
)
ABOUT = 'A guard as a moderation server. Errors are never answered as "not flagged".'
# OpenAI's spellings, by the names that its Python client gives them: "self-harm" is self_harm.
SPELLINGS = {re.sub("[/-]", "_", name): name for name in CATEGORIES}
LOOK = 1.0  # seconds between two looks whether a client still waits
FAULTS = {
    400: "a wrong request",
    401: "the key is missing or wrong",
    408: "the body came too slowly",
    413: "the body is too long, or holds more texts than may wait",
    429: "too many texts wait; Retry-After says when to come again",
    500: "the server failed",
    503: "the guard has no verdict",
}


class Server:
    """One guard and its queue, behind the routes of `make_app`."""

    def __init__(
        self,
        reader: Reader,
        queue: BatchingQueue,
        meters: Meters,
        log_texts: bool,
    ):
        self.reader = reader
        self.queue = queue
        self.meters = meters
        self.log_texts = log_texts
        meters.waiting.set_function(lambda: len(queue.waiting))

    async def answers(
        self,
        request: Request,
        conversations: Sequence[list[Message]],
    ) -> list[Answer]:
        """What the guard says of each conversation.

        Raises:
            HTTPException: the queue is full, or one of them has no verdict.
            ClientLeft: nobody waits any more.
        """
        if len(conversations) > self.queue.most:
            message = f"{len(conversations)} texts, more than {self.queue.most} (--max_waiting)"
            raise HTTPException(413, message)
        verdicts = await self._verdicts(request, conversations)
        answers = []
        faults = []
        for place, messages in enumerate(conversations):
            try:
                answers.append(self.reader.answer(messages, verdicts[place]))
            except NoVerdict as fault:
                faults.append(f"text {place}: {fault}")
        if self.log_texts:
            self._log(conversations, answers, faults)
        if faults:
            self.meters.errors.inc(len(faults))
            logger.warning("no verdict on %d of %d texts", len(faults), len(conversations))
            raise HTTPException(503, f"the guard has no verdict on {faults[0]}")
        self.meters.flagged.inc(sum(answer.flagged for answer in answers))
        return answers

    async def _verdicts(
        self,
        request: Request,
        conversations: Sequence[list[Message]],
    ) -> list[Verdict]:
        task = asyncio.ensure_future(self.queue.judge(conversations))
        try:
            while not task.done():
                await asyncio.wait([task], timeout=LOOK)
                if not task.done() and await request.is_disconnected():
                    raise ClientLeft
            return task.result()
        except QueueFull as full:
            pause = {"Retry-After": str(full.seconds)}
            raise HTTPException(429, f"too many texts wait; {full}", pause) from None
        except UserError as error:  # such as a server that serves another guard
            self.meters.errors.inc(len(conversations))
            logger.error("the guard cannot judge: %s", error)
            raise HTTPException(503, "the guard cannot judge; the server's log says why") from None
        except (ClientLeft, asyncio.CancelledError):
            raise
        except Exception as error:
            self.meters.errors.inc(len(conversations))
            log_fault(error)
            raise HTTPException(503, f"the guard failed ({type(error).__name__})") from None
        finally:
            task.cancel()

    def _log(
        self,
        conversations: Sequence[list[Message]],
        answers: Sequence[Answer],
        faults: Sequence[str],
    ) -> None:
        said = [asdict(answer) for answer in answers]
        row = {
            "texts": list(conversations),
            "answers": said,
            "faults": list(faults),
        }
        logger.info("%s", json.dumps(row, ensure_ascii=False))


def make_app(
    reader: Reader,
    limits: Limits,
    budget: int,
    most: int,
    log_texts: bool,
) -> FastAPI:
    """The server for the guard of a `Reader`.

    Args:
        budget, most: of `BatchingQueue`.
        log_texts: write every text with its answer into the log.
    """
    meters = Meters()

    def judge(conversations: list[list[Message]]) -> list[Verdict]:
        meters.batches.observe(len(conversations))
        return reader.guard.judge(conversations)

    queue = BatchingQueue(judge, budget, most)
    server = Server(reader, queue, meters, log_texts)

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(queue.run())
        yield
        worker.cancel()

    app = FastAPI(
        title=f"Guard {reader.guard.name}",
        description=ABOUT,
        version="1",
        lifespan=running,
    )
    add_moderations(app, server, with_key=limits.key is not None)
    add_perspective(app, server, with_key=limits.key is not None)
    add_about(app, server)
    routes = {"/docs", "/openapi.json", *(route.path for route in app.routes)}
    app.add_middleware(
        Front,
        limits=limits,
        meters=meters,
        routes=routes,
    )
    app.add_exception_handler(HTTPException, lambda _, error: refusal(error))
    app.add_exception_handler(UserError, lambda _, error: refusal(HTTPException(400, f"{error}")))
    app.add_exception_handler(RequestValidationError, _wrong_request)
    return app


def _faults(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route, for its description."""
    described = {}
    for status in statuses:
        described[status] = {"model": wire.ErrorAnswer, "description": FAULTS[status]}
    return described


def add_moderations(app: FastAPI, server: Server, with_key: bool) -> None:
    """OpenAI's route."""
    key = [Security(HTTPBearer(auto_error=False))] if with_key else []

    @app.post(
        "/v1/moderations",
        responses=_faults(*FAULTS),
        dependencies=key,
    )
    async def moderations(
        asked: wire.ModerationRequest,
        request: Request,
    ) -> wire.ModerationAnswer:
        conversations = _conversations(asked, server.reader)
        results = []
        for answer in await server.answers(request, conversations):
            scores = _in_both_spellings(answer.scores)
            result = wire.Result(
                flagged=answer.flagged,
                categories=_in_both_spellings(answer.categories),
                category_scores=scores,
                category_applied_input_types={name: ["text"] for name in scores},
            )
            results.append(result)
        return wire.ModerationAnswer(
            id=f"modr-{uuid.uuid4().hex}",
            model=server.reader.guard.name,
            results=results,
        )


def _in_both_spellings(of: Mapping[str, Said]) -> dict[str, Said]:
    """What is said of categories, of self_harm as "self-harm", too: OpenAI's client drops the first."""
    said = dict(of)
    for name in of:
        said[SPELLINGS.get(name, name)] = of[name]
    return said


def _conversations(asked: wire.ModerationRequest, reader: Reader) -> list[list[Message]]:
    """What shall be judged: one conversation, or one of each text.

    Raises:
        HTTPException: there is nothing to judge, or twice.
        UserError: this guard cannot judge it.
    """
    if asked.messages is not None and asked.input:
        raise HTTPException(400, "input and messages: give one of the two")
    if asked.messages is not None:
        turns = [turn.model_dump() for turn in asked.messages]
        return [reader.fitting(turns)]
    if asked.input is None or asked.input == []:
        raise HTTPException(
            400, "input: a text, a list of texts, or text parts (or messages) is missing"
        )
    if isinstance(asked.input, str):
        texts = [asked.input]
    elif isinstance(asked.input[0], str):
        texts = asked.input
    else:
        parts = [part.text for part in asked.input]
        texts = ["\n".join(parts)]
    return [reader.conversation(text) for text in texts]


def add_perspective(app: FastAPI, server: Server, with_key: bool) -> None:
    """Perspective's route."""
    reader = server.reader
    key = [Security(APIKeyQuery(name="key", auto_error=False))] if with_key else []
    router = APIRouter(strict_content_type=False)  # its clients often send JSON without saying so

    @router.post(
        "/v1alpha1/comments:analyze",
        responses=_faults(*FAULTS),
        response_model_exclude_none=True,
        dependencies=key,
    )
    async def analyze(
        asked: wire.AnalyzeRequest,
        request: Request,
    ) -> wire.AnalyzeAnswer:
        text = asked.comment.text
        if not text.strip():
            raise HTTPException(400, "Comment must be non-empty.")
        for name in asked.requestedAttributes:
            if name not in reader.attributes:
                known = ", ".join(reader.attributes)
                raise HTTPException(400, f"Unknown requested attribute: {name:.60}; known: {known}")
        conversation = reader.conversation(text)
        (answer,) = await server.answers(request, [conversation])
        scores = {}
        for name, parameters in asked.requestedAttributes.items():
            score = wire.Score(value=reader.attribute(name, answer))
            least = parameters.scoreThreshold
            if least is not None and score.value < least:
                continue
            scores[name] = wire.AttributeScores(summaryScore=score)
            if asked.spanAnnotations:  # the guard judges the whole
                whole = wire.SpanScore(
                    begin=0,
                    end=len(text),
                    score=score,
                )
                scores[name].spanScores = [whole]
        return wire.AnalyzeAnswer(
            attributeScores=scores,
            languages=asked.languages,
            clientToken=asked.clientToken,
        )

    app.include_router(router)


def add_about(app: FastAPI, server: Server) -> None:
    """The page, and what a machine asks about the server."""
    reader = server.reader
    page = PAGE.read_text(encoding="utf-8")
    thresholds = {}
    for label in reader.guard.judges:
        found = threshold_of(reader.guard.thresholds, label)
        thresholds[label] = found and found["value"]

    @app.get("/", include_in_schema=False)
    def front_page() -> HTMLResponse:
        headers = {"Content-Security-Policy": PAGE_POLICY}
        return HTMLResponse(page, headers=headers)

    @app.get("/healthz")
    async def healthz() -> wire.Health:
        return wire.Health(
            guard=reader.guard.name,
            judges=list(reader.guard.judges),
            text_is=reader.text_is,
            thresholds=thresholds,
            waiting=len(server.queue.waiting),
        )

    @app.get("/metrics", include_in_schema=False)
    def metrics() -> Response:
        text = generate_latest(server.meters.registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)


async def _wrong_request(_: Request, error: RequestValidationError) -> Response:
    """What is wrong with a body, by field; its content is not repeated."""
    faults = []
    for fault in error.errors()[:3]:
        parts = [str(part) for part in fault["loc"] if part != "body"]
        place = ".".join(parts)
        faults.append(f"{place or 'body'}: {fault['msg']}")
    return refusal(HTTPException(400, "; ".join(faults)))
