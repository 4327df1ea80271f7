"""What goes over the wire: requests and answers as OpenAI's and Perspective's clients know them."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _writable(text: str) -> str:
    """Refuse half a surrogate pair: JSON can spell one, and no answer could repeat it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half a character") from None
    return text


Repeated = Annotated[str, AfterValidator(_writable)]  # a text that the answer repeats


class Request(BaseModel):
    """A part of a request: what is not known is ignored, what is known has its type."""

    model_config = ConfigDict(strict=True)


class TextPart(Request):
    """A content part of OpenAI's. Images are refused: the guard does not see them."""

    model_config = ConfigDict(extra="allow")
    type: Literal["text"]
    text: str


class Turn(Request):
    """A chat message. What else it holds, as a call of a tool, is refused later and by name."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]


class ModerationRequest(Request):
    """As OpenAI's, and one conversation in place of `input`, of which the last turn is judged."""

    input: str | list[str] | list[TextPart] | None = Field(
        default=None,
        description="A text, a list of texts, or the text parts of one text.",
    )
    messages: list[Turn] | None = Field(
        default=None,
        description="An extension: a conversation, such as a question and its answer.",
    )
    model: str | None = Field(default=None, description="Any: the server has one guard.")


class Result(BaseModel):
    """What is said of one text. `unsafe` among the categories is the decision itself."""

    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[Literal["text"]]]


class ModerationAnswer(BaseModel):
    id: str
    model: str
    results: list[Result]


class Comment(Request):
    text: str
    type: Literal["PLAIN_TEXT"] | None = None


class AttributeParameters(Request):
    scoreType: Literal["PROBABILITY"] | None = None
    scoreThreshold: float | None = None


class AnalyzeRequest(Request):
    """As Perspective's. `context`, `doNotStore` (nothing is stored) and the like are ignored."""

    comment: Comment
    requestedAttributes: dict[str, AttributeParameters] = Field(min_length=1)
    languages: list[Repeated] | None = None
    spanAnnotations: bool = False
    clientToken: Repeated | None = None


class Score(BaseModel):
    value: float
    type: Literal["PROBABILITY"] = "PROBABILITY"


class SpanScore(BaseModel):
    begin: int
    end: int
    score: Score


class AttributeScores(BaseModel):
    summaryScore: Score
    spanScores: list[SpanScore] | None = None


class AnalyzeAnswer(BaseModel):
    attributeScores: dict[str, AttributeScores]
    languages: list[str] | None = None
    clientToken: str | None = None


class Fault(BaseModel):
    message: str
    type: str
    code: int
    status: str
    param: str | None = None


class ErrorAnswer(BaseModel):
    """One body for both kinds of clients: OpenAI's read `message`, `type`; Google's `status`."""

    error: Fault


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    guard: str
    judges: list[str]
    text_is: str  # prompt or response: what a text alone is judged as
    # by the label; null: the guard's own word decides, or else a score above 0.5
    thresholds: dict[str, float | None]
    waiting: int


def error_body(status: int, message: str) -> dict[str, Any]:
    """The body of an answer that is an error. What UTF-8 cannot write of a quoted name is a `?`."""
    message = message.encode("utf-8", "replace").decode()
    kind, word = KINDS.get(status, ("invalid_request_error", "INVALID_ARGUMENT"))
    fault = Fault(message=message, type=kind, code=status, status=word)
    return ErrorAnswer(error=fault).model_dump()


# What OpenAI's and Google's errors are called, where it is not a wrong request.
KINDS = {
    401: ("authentication_error", "UNAUTHENTICATED"),
    404: ("invalid_request_error", "NOT_FOUND"),
    405: ("invalid_request_error", "UNIMPLEMENTED"),
    408: ("timeout_error", "DEADLINE_EXCEEDED"),
    429: ("rate_limit_error", "RESOURCE_EXHAUSTED"),
    500: ("server_error", "INTERNAL"),
    503: ("server_error", "UNAVAILABLE"),
}
