"""Guards that are web services: OpenAI Moderation, Perspective, Azure AI Content Safety.

They read one text, not a conversation: the last turn's, a user's as a prompt and an assistant's as
a response.
"""

import logging
import os
import random
import re
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import accumulate, count
from typing import Any

import httpx2  # what the openai client and huggingface_hub speak HTTP with
from tqdm.auto import tqdm

from common.conversation import Message, Messages, UserError, Verdict, check_url
from common.run import is_main_process
from guards.base import LAST_TURN, LONG_INPUTS, Guard

logger = logging.getLogger(__name__)
MODEL = "omni-moderation-2024-09-26"
CATEGORIES = {
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
}
CATEGORIES |= {"self-harm", "self-harm/instructions", "self-harm/intent", "sexual", "sexual/minors"}
CATEGORIES |= {"violence", "violence/graphic"}
ATTRIBUTES = (
    "TOXICITY",
    "SEVERE_TOXICITY",
    "INSULT",
    "THREAT",
    "IDENTITY_ATTACK",
    "SEXUALLY_EXPLICIT",
)
HARMS, SEVERITIES = ("Hate", "SelfHarm", "Sexual", "Violence"), (0, 2, 4, 6)
ERROR_CODE = re.compile(r'"(?:code|type|status|reason|errorType)"\s*:\s*"([A-Za-z_]{1,60})"')
# a wrong key that comes as 400, an empty account that comes as 429
NO_KEY = {"API_KEY_INVALID", "insufficient_quota"}
# scores in [0, 1], the decision, the service's word for it
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
    return {"text": text, "categories": HARMS, "outputType": "FourSeverityLevels"}


def _read_azure(said: Any, threshold: int) -> Reading:
    found = {entry["category"]: entry["severity"] for entry in said["categoriesAnalysis"]}
    if any(type(found[name]) is not int or found[name] not in SEVERITIES for name in HARMS):
        raise _Failure("a severity in the answer is none of 0, 2, 4, 6")
    worst = max(found[name] for name in HARMS)
    return {name: found[name] / 6 for name in HARMS}, worst >= threshold, f"severity {worst}"


@dataclass(frozen=True)
class _Service:
    key: str  # the environment variable that holds it
    # the base URL; None: each customer has their own, in AZURE_CONTENT_SAFETY_ENDPOINT
    url: str | None
    read: Callable[[Any, int], Reading]
    path: str = ""
    header: str = ""  # carries the key; in a URL it would stand in logs
    body: Callable[[str], dict[str, Any]] = dict
    limit: float = float("inf")  # of a text, in `unit`
    unit: str = "characters"


# fmt: off
SERVICES = {
    "openai-moderation": _Service("OPENAI_API_KEY", "https://api.openai.com/v1", _read_openai),
    "perspective": _Service(
        "PERSPECTIVE_API_KEY", "https://commentanalyzer.googleapis.com", _read_perspective,
        "/v1alpha1/comments:analyze", "X-Goog-Api-Key", _perspective, 20480, "bytes",
    ),
    "azure-content-safety": _Service(
        "AZURE_CONTENT_SAFETY_KEY", None, _read_azure,
        "/contentsafety/text:analyze?api-version=2024-09-01", "Ocp-Apim-Subscription-Key", _azure, 10000,
    ),
}
# fmt: on


class ApiGuard(Guard):
    """OpenAI Moderation, Perspective or Azure AI Content Safety as a judge of the last turn's text.

    The probability is the highest of the service's scores, `decided` the service's own decision:
    `flagged` (OpenAI), any of six attributes at 0.5 (Perspective), the highest severity at
    `threshold` (Azure). Azure's severities 0, 2, 4, 6 are given as severity/6: a scale, and no
    calibrated probability. What fails is an error verdict, never "safe".
    Sources: the services' API references; attributes, language and thresholds as in ExpGuard's
    evaluation suite.
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
        long_inputs: str = "windows",
        progress: bool = True,
    ):
        """Check the options and find the key, in the environment alone; nothing is asked yet.

        Args:
            service: openai-moderation (OPENAI_API_KEY), perspective (PERSPECTIVE_API_KEY) or
            azure-content-safety
                (AZURE_CONTENT_SAFETY_KEY, AZURE_CONTENT_SAFETY_ENDPOINT).
            model: of OpenAI; None takes omni-moderation-2024-09-26.
            base_url: another server that speaks the service's protocol.
            threshold: of Azure, the lowest severity that counts as unsafe: 2, 4 or 6; None takes 4.
            concurrency: requests at a time.
            max_retries: tries after the first, on 408, 409, 429, 5xx, time-outs and broken
            connections.
            timeout: seconds of silence that end a try.
            backoff: seconds before the first retry, doubled each time; Retry-After goes before it.
            At most a minute.
            long_inputs: for texts over the service's limit (Perspective 20,480 bytes, Azure 10,000
            characters; OpenAI
                publishes none): "windows" judges overlapping pieces and takes the maximum, "error"
                gives an error verdict, "truncate" cuts the end off.

        Raises:
            UserError: an unknown service or a wrong option, or the environment lacks a variable.
        """
        _check(service, model, threshold, long_inputs)
        if min(concurrency, timeout) <= 0 or min(max_retries, backoff) < 0:
            raise UserError(
                f"{service}: concurrency and timeout are above 0, max_retries and backoff 0 or more"
            )
        self.name, self.service, self.threshold, self.thresholds = (
            service,
            SERVICES[service],
            threshold or 4,
            {},
        )
        self.concurrency, self.max_retries, self.backoff = concurrency, max_retries, backoff
        self.long_inputs, self.progress = long_inputs, progress
        key = _variable(service, self.service.key)
        url = base_url or self.service.url or _variable(service, "AZURE_CONTENT_SAFETY_ENDPOINT")
        http = httpx2.Client(timeout=timeout, limits=httpx2.Limits(max_connections=concurrency))
        self._send = self._connect(
            http, check_url(url, f"{service}: its base URL").rstrip("/"), key, model or MODEL
        )

    def _connect(
        self, http: httpx2.Client, url: str, key: str, model: str
    ) -> Callable[[str], httpx2.Response]:
        """What sends one text. The key lives in here, and in no attribute."""
        where, headers, body = (
            url + self.service.path,
            {self.service.header: key},
            self.service.body,
        )
        if self.name != "openai-moderation":
            return lambda text: http.post(where, headers=headers, json=body(text))
        try:
            import openai
        except ImportError:
            raise UserError("openai-moderation: pip install openai (the extra [api])") from None
        # Its own retries are off: their waits cannot be set, nor ended when the key turns out to be
        # refused.
        client = openai.OpenAI(
            api_key=key, base_url=url, max_retries=0, timeout=http.timeout, http_client=http
        )

        def send(text: str) -> httpx2.Response:
            try:
                return client.moderations.with_raw_response.create(
                    input=text, model=model
                ).http_response
            except openai.APIStatusError as error:
                return error.response
            except openai.APIConnectionError as error:
                raise httpx2.TransportError(type(error).__name__) from None

        return send

    def judge_valid(self, conversations: Sequence[list[Message]]) -> list[Verdict]:
        """One verdict a conversation, in order; a refused key ends the asking, and the rest are
        error verdicts.
        """
        stopped, long = threading.Event(), []
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                jobs = [
                    pool.submit(self._judge_one, messages, stopped, long)
                    for messages in conversations
                ]
                hidden = not (self.progress and is_main_process())
                for _ in tqdm(
                    as_completed(jobs),
                    f"judging with {self.name}",
                    len(jobs),
                    unit="text",
                    disable=hidden,
                ):
                    pass
            finally:
                stopped.set()  # also when the caller was interrupted
        verdicts = [job.result() for job in jobs]
        if long:
            limit = f"{self.service.limit} {self.service.unit}"
            logger.info(
                "%d of %d texts are longer than %s: %s",
                len(long),
                len(jobs),
                limit,
                self.long_inputs,
            )
        if failed := [verdict.error for verdict in verdicts if verdict.error]:
            logger.warning(
                "%d of %d texts were not judged; the first: %s", len(failed), len(jobs), failed[0]
            )
        return verdicts

    def _judge_one(self, messages: Messages, stopped: threading.Event, long: list) -> Verdict:
        try:
            label = {"user": "prompt_unsafe", "assistant": "response_unsafe"}[messages[-1]["role"]]
            pieces = self._pieces(messages[-1]["content"], long)
            readings = [
                self.service.read(self._ask(piece, stopped), self.threshold) for piece in pieces
            ]
            every = [score for scores, *_ in readings for score in scores.values()]
            # NaN and true are neither
            if not all(type(score) in (int, float) and 0 <= score <= 1 for score in every):
                raise _Failure("a score in the answer is no number from 0 to 1")
        except _Failure as error:
            return Verdict(error=f"{self.name}: {error}")
        except (
            Exception
        ) as error:  # whatever it is: it is not "safe", and no matter of the other items
            return Verdict(
                error=f"{self.name}: no text to be asked, or no usable answer ({type(error).__name__})"
            )
        worst, decided, word = max(
            readings, key=lambda reading: (reading[1], max(reading[0].values()))
        )
        categories = {
            name: float(max(scores.get(name, 0) for scores, *_ in readings)) for name in worst
        }
        native = {label: word} if word else {}
        return Verdict(
            categories=categories,
            native=native,
            decided={label: decided},
            **{label: float(max(every))},
        )

    def _pieces(self, text: str, long: list) -> list[str]:
        """`text` in what one request takes, as `long_inputs` says; windows overlap by a quarter."""
        limit, pieces, start = self.service.limit, [], 0
        if not text.strip():
            raise _Failure("empty text")
        # Characters beyond U+FFFF count twice, as in UTF-16: so no piece is too long however the
        # service counts.
        sizes = (
            len(c.encode()) if self.service.unit == "bytes" else 1 + (c > "\uffff") for c in text
        )
        ends = [0, *accumulate(sizes)]
        if ends[-1] <= limit:
            return [text]
        long.append(None)
        if self.long_inputs == "error":
            raise _Failure(
                f"the text has {ends[-1]} {self.service.unit}, more than {limit}; see long_inputs"
            )
        while start < len(text):
            stop = bisect_right(ends, ends[start] + limit) - 1
            pieces.append(text[start:stop])
            start = len(text) if stop == len(text) else bisect_left(ends, ends[stop] - limit // 4)
        return (
            pieces[:1]
            if self.long_inputs == "truncate"
            else [piece for piece in pieces if piece.strip()]
        )

    def _ask(self, text: str, stopped: threading.Event) -> Any:
        """The service's answer, parsed; a refused key sets `stopped`."""
        for attempt in count():
            if stopped.is_set():
                raise _Failure(
                    f"not asked, because {self.service.key} was refused or the run was stopped"
                )
            response, status, codes = None, 0, set()
            try:
                response = self._send(text)
                status = response.status_code
                # Error codes alone: an error's sentences may quote the text or a part of the key.
                codes = set() if status == 200 else set(ERROR_CODE.findall(response.text))
                problem = f"HTTP {status} {', '.join(sorted(codes))}".strip()
            except httpx2.TransportError as error:
                problem = type(error).__name__
            if status == 200:
                return response.json()
            if status in (401, 403) or codes & NO_KEY:
                stopped.set()
                raise _Failure(f"{problem}: check {self.service.key}")
            if 0 < status < 500 and status not in (408, 409, 429):
                raise _Failure(problem)
            if attempt == self.max_retries:
                raise _Failure(f"{problem}, {attempt + 1} times")
            stopped.wait(_pause(response, self.backoff * 2**attempt))


def _check(service: str, model: str | None, threshold: int | None, long_inputs: str) -> None:
    azure, openai = service == "azure-content-safety", service == "openai-moderation"
    for good, expected in (
        (service in SERVICES, f"expected one of the services {', '.join(SERVICES)}"),
        (
            long_inputs in LONG_INPUTS,
            f"long_inputs {long_inputs}: expected one of {', '.join(LONG_INPUTS)}",
        ),
        (
            threshold is None or (azure and threshold in SEVERITIES[1:]),
            "threshold is for Azure alone: 2, 4 or 6",
        ),
        (model is None or openai, "model is for openai-moderation alone"),
    ):
        if not good:
            raise UserError(f"{service}: {expected}")


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
    return min(float(asked) if asked.isdecimal() else otherwise * random.uniform(0.75, 1), 60.0)
