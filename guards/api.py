"""Guards that are web services: OpenAI Moderation, Perspective, Azure AI Content Safety.

They read one text, not a conversation: the last turn's, a user's as a prompt and an assistant's as
a response.
"""

import logging
import math
import os
import random
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx2  # what the openai client and huggingface_hub speak HTTP with
from tqdm.auto import tqdm

from common.conversation import (
    Message,
    Messages,
    UserError,
    Verdict,
    check_option,
    check_url,
    judged_label,
)
from common.run import in_threads, judging_bar
from guards.base import LAST_TURN, Guard

logger = logging.getLogger(__name__)
# fmt: off
CATEGORIES = {
    "harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent",
    "self-harm", "self-harm/instructions", "self-harm/intent", "sexual", "sexual/minors",
    "violence", "violence/graphic",
}
ATTRIBUTES = (
    "TOXICITY", "SEVERE_TOXICITY", "INSULT", "THREAT", "IDENTITY_ATTACK", "SEXUALLY_EXPLICIT",
)
# fmt: on
HARMS = ("Hate", "SelfHarm", "Sexual", "Violence")
SEVERITIES = (0, 2, 4, 6)
ERROR_CODE = re.compile(r'"(?:code|type|status|reason|errorType)"\s*:\s*"([A-Za-z_]{1,60})"')
# A wrong key that comes as 400, an empty account that comes as 429.
BUSY = (408, 409, 429)  # HTTP statuses that may pass, as those from 500 on
NO_KEY = {"API_KEY_INVALID", "insufficient_quota"}
# Scores in [0, 1], the decision, and the service's word for it.
Reading = tuple[dict[str, float], bool, str | None]


class _Failure(Exception):
    """One text could not be judged; the message goes into its verdict, so it holds neither key nor
    URL.
    """


def _read_openai(said: Any, _: int) -> Reading:
    (result,) = said["results"]
    scores, flagged = result["category_scores"], result["flagged"]
    if type(flagged) is not bool or not scores.keys() >= CATEGORIES:
        raise _Failure("the answer lacks a category or the decision")
    return scores, flagged, "flagged" if flagged else "not flagged"


def _perspective(text: str) -> dict[str, Any]:
    """In English, as the ExpGuard suite asks: left to detect the language, the service refuses odd
    and short texts.
    """
    attributes = {name: {} for name in ATTRIBUTES}
    return {
        "comment": {"text": text},
        "languages": ["en"],
        "requestedAttributes": attributes,
        "doNotStore": True,
    }


def _read_perspective(said: Any, _: int) -> Reading:
    scores = {name: said["attributeScores"][name]["summaryScore"]["value"] for name in ATTRIBUTES}
    return scores, any(score >= 0.5 for score in scores.values()), None


def _azure(text: str) -> dict[str, Any]:
    return {
        "text": text,
        "categories": HARMS,
        "outputType": "FourSeverityLevels",
    }


def _read_azure(said: Any, threshold: int) -> Reading:
    found = {entry["category"]: entry["severity"] for entry in said["categoriesAnalysis"]}
    severities = [found[name] for name in HARMS]
    known = [type(one) is int and one in SEVERITIES for one in severities]
    if not all(known):
        raise _Failure("a severity in the answer is none of 0, 2, 4, 6")
    worst = max(found[name] for name in HARMS)
    return (
        {name: found[name] / 6 for name in HARMS},
        worst >= threshold,
        f"severity {worst}",
    )


@dataclass(frozen=True)
class Service:
    """How a service is asked, and how its answer is read."""

    key: str  # the environment variable that holds it
    url: str | None  # the base; None: each customer has another, in AZURE_CONTENT_SAFETY_ENDPOINT
    path: str
    header: str  # carries the key; in a URL it would stand in logs
    body: Callable[[str], dict[str, Any]]
    read: Callable[[Any, int], Reading]
    limit: float = math.inf  # bytes of a text in `encoding`
    encoding: str = "utf-8"


SERVICES = {
    "openai-moderation": Service(
        key="OPENAI_API_KEY",
        url="https://api.openai.com/v1",
        path="/moderations",
        header="Authorization",
        body=lambda text: {
            "input": text,
            "model": "omni-moderation-2024-09-26",
        },
        read=_read_openai,
    ),
    "perspective": Service(
        key="PERSPECTIVE_API_KEY",
        url="https://commentanalyzer.googleapis.com",
        path="/v1alpha1/comments:analyze",
        header="X-Goog-Api-Key",
        body=_perspective,
        read=_read_perspective,
        limit=20480,
    ),
    "azure-content-safety": Service(
        key="AZURE_CONTENT_SAFETY_KEY",
        url=None,
        path="/contentsafety/text:analyze?api-version=2024-09-01",
        header="Ocp-Apim-Subscription-Key",
        body=_azure,
        read=_read_azure,
        limit=20000,  # 10,000 units of UTF-16, so that none is too long however it is counted
        encoding="utf-16-le",
    ),
}


class ApiGuard(Guard):
    """OpenAI Moderation, Perspective or Azure AI Content Safety as a judge of the last turn's text.

    The probability is the highest of the service's scores, `decided` the service's own decision:
    `flagged` (OpenAI), any of six attributes at 0.5 (Perspective), the highest severity at
    `threshold` (Azure). Azure's severities 0, 2, 4, 6 are given as severity/6: a scale, and no
    calibrated probability. What fails is an error verdict, never "safe"; so is a text over the
    service's limit (Perspective 20,480 bytes, Azure 10,000 characters; OpenAI publishes none).
    Sources: the services' API references; attributes, language and thresholds as in ExpGuard's
    evaluation suite.

    Args:
        service: openai-moderation (OPENAI_API_KEY), perspective (PERSPECTIVE_API_KEY) or
            azure-content-safety (AZURE_CONTENT_SAFETY_KEY, AZURE_CONTENT_SAFETY_ENDPOINT).
        model: of OpenAI; None takes omni-moderation-2024-09-26.
        base_url: another server that speaks the service's protocol.
        threshold: of Azure, the lowest severity that counts as unsafe: 2, 4 or 6; None takes 4.
        concurrency: requests at a time.
        max_retries: tries after the first, on 408, 409, 429, 5xx, time-outs and broken
            connections.
        timeout: seconds of silence that end a try.
        backoff: seconds before the first retry, doubled each time; Retry-After goes before it.
            At most a minute.

    Raises:
        UserError: an unknown service or a wrong option, or the environment lacks a variable.
    """

    judges = ("prompt_unsafe", "response_unsafe")
    sees = LAST_TURN

    def __init__(
        self,
        service: str,
        *,
        model: str | None = None,
        base_url: str | None = None,
        threshold: int | None = None,
        concurrency: int = 8,
        max_retries: int = 5,
        timeout: float = 30.0,
        backoff: float = 0.5,
        progress: bool = True,
    ):
        """Check the options and find the key, in the environment alone; nothing is asked yet."""
        check_option("service", service, SERVICES)
        if threshold is not None and (
            service != "azure-content-safety" or threshold not in SEVERITIES[1:]
        ):
            raise UserError(f"{service}: threshold is for Azure alone: 2, 4 or 6")
        if model is not None and service != "openai-moderation":
            raise UserError(f"{service}: model is for openai-moderation alone")
        if min(concurrency, timeout) <= 0 or min(max_retries, backoff) < 0:
            what = "concurrency and timeout are above 0, max_retries and backoff 0 or more"
            raise UserError(f"{service}: {what}")
        self.name = service
        self.service = SERVICES[service]
        self.thresholds = {}
        self.threshold = threshold or 4
        self.concurrency = concurrency
        self.max_retries = max_retries
        self.backoff = backoff
        self.progress = progress
        self.model = {} if model is None else {"model": model}
        key = _variable(service, self.service.key)
        if self.service.header == "Authorization":
            key = f"Bearer {key}"
        base = base_url or self.service.url or _variable(service, "AZURE_CONTENT_SAFETY_ENDPOINT")
        self.url = check_url(base, f"{service}: its base URL").rstrip("/") + self.service.path
        # The client holds the key, and no attribute of ours does.
        self.client = httpx2.Client(
            headers={self.service.header: key},
            timeout=timeout,
            limits=httpx2.Limits(max_connections=concurrency),
        )

    def judge_valid(self, conversations: Sequence[list[Message]]) -> list[Verdict]:
        """One verdict a conversation, in order; a refused key ends the asking, and the rest are
        error verdicts.
        """
        stopped = threading.Event()
        judge = partial(self._judge_one, stopped=stopped)
        answers = in_threads(judge, conversations, self.concurrency)
        bar = judging_bar(self.name, self.progress)
        try:
            said = dict(tqdm(answers, total=len(conversations), **bar))
        finally:
            stopped.set()  # also when the caller was interrupted
        verdicts = [said[place] for place in range(len(conversations))]
        failed = [verdict.error for verdict in verdicts if verdict.error]
        if failed:
            what = "%d of %d texts were not judged; the first: %s"
            logger.warning(what, len(failed), len(verdicts), failed[0])
        return verdicts

    def _judge_one(self, messages: Messages, stopped: threading.Event) -> Verdict:
        """The verdict on a last turn. Whatever goes wrong is not "safe", and no matter of the
        others.
        """
        turn = messages[-1]
        label = judged_label(messages)
        try:
            answer = self._ask(turn["content"], stopped)
            scores, decided, word = self.service.read(answer, self.threshold)
            for score in scores.values():  # NaN and true are none
                if type(score) not in (int, float) or not 0 <= score <= 1:
                    raise _Failure("a score in the answer is no number from 0 to 1")
        except _Failure as error:
            return Verdict(error=f"{self.name}: {error}")
        except Exception as error:
            what = f"no text to be asked, or no usable answer ({type(error).__name__})"
            return Verdict(error=f"{self.name}: {what}")
        verdict = Verdict(decided={label: decided})
        verdict.categories = {name: float(score) for name, score in scores.items()}
        setattr(verdict, label, max(verdict.categories.values()))
        if word is not None:
            verdict.native[label] = word
        return verdict

    def _ask(self, text: str, stopped: threading.Event) -> Any:
        """The service's answer, parsed; a refused key sets `stopped`."""
        service = self.service
        if not text.strip():
            raise _Failure("empty text")
        length = len(text.encode(service.encoding))
        if length > service.limit:
            raise _Failure(f"the text has {length} bytes, more than {service.limit}")
        for attempt in range(self.max_retries + 1):
            if stopped.is_set():
                raise _Failure(f"not asked, because {service.key} was refused or the run stopped")
            response = None
            try:
                response = self.client.post(self.url, json=service.body(text) | self.model)
                if response.status_code == 200:
                    return response.json()
                problem = self._problem(response, stopped)
            except httpx2.TransportError as error:
                problem = type(error).__name__
            if attempt < self.max_retries:
                stopped.wait(_pause(response, self.backoff * 2**attempt))
        raise _Failure(f"{problem}, {self.max_retries + 1} times")

    def _problem(self, response: httpx2.Response, stopped: threading.Event) -> str:
        """What is wrong with an answer, where asking again may help.

        It holds error codes alone: an error's sentences may quote the text or a part of the key.

        Raises:
            _Failure: asking again does not help; where the key was refused, `stopped` is set.
        """
        status = response.status_code
        codes = set(ERROR_CODE.findall(response.text))
        problem = f"HTTP {status} {', '.join(sorted(codes))}".strip()
        if status in (401, 403) or codes & NO_KEY:
            stopped.set()
            raise _Failure(f"{problem}: check {self.service.key}")
        if status < 500 and status not in BUSY:
            raise _Failure(problem)
        return problem


def _variable(service: str, name: str) -> str:
    value = os.environ.get(name, "").strip()
    if not value:
        raise UserError(f"{service}: the environment variable {name} is not set")
    # the error of a request with it would quote it
    if not value.isascii() or not value.isprintable():
        raise UserError(
            f"{service}: {name} holds characters that do not belong there; copy it again"
        )
    return value


def _pause(response: httpx2.Response | None, otherwise: float) -> float:
    """Seconds until the next try: Retry-After in seconds, or `otherwise` less up to a quarter; at
    most a minute.
    """
    asked = response.headers.get("retry-after", "") if response is not None else ""
    # At random, so that the threads do not come back all at once.
    return min(
        float(asked) if asked.isdecimal() else otherwise * random.uniform(0.75, 1),
        60.0,
    )
