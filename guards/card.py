"""guard.json: what a folder says of the guard that it holds. This file alone reads and writes it.

A card holds everything that a score depends on and that the weights do not hold themselves. A field
that changes a score has no default: where it is missing, the guard is refused. A probe, one
conversation with the scores that the guard gave it when it was saved, shows on every load that base
model, tokenizer, template, order of labels and adapter are still those.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from common.bundled import resolve_model
from common.conversation import (
    FARTHEST,
    LABELS,
    Message,
    Messages,
    UserError,
    Verdict,
    check_messages,
    log_odds,
    pair,
)
from common.keep import fingerprint
from common.run import write_json
from common.saving import CARD_FILE, check_equal
from common.templates import template_text
from guards.base import SEES, Guard
from guards.known import zoo

logger = logging.getLogger(__name__)
NO_PROBE = "%s: has no probe, so that nobody can check base and tokenizer; guards.add_probe(folder) adds one"
Input = Literal["pair", "prompt", "response"]
INPUTS = get_args(Input)
POOLING = "last attended token"  # where the head of a decoder reads

# How far the log-odds of a probe may move between two machines, by the coarser of the two number
# formats. The logits of a 16-bit model are rounded to 1/8 where they are large; 4 bits change the
# weights themselves.
TOLERANCE = {
    "float32": 0.02,
    "float16": 0.5,
    "bfloat16": 0.5,
    "int8": 0.5,
    "4bit": 2.0,
    "server": 0.5,
}
# A server tells the most likely tokens alone, so that it calls impossible what is only unlikely.
# Its log-odds are compared up to here.
SERVER_FARTHEST = 5.0

# What a probe says: borderline, so that the outputs of a trained guard lie apart. The later ones
# are for guards that judge no such conversation, or have no room for it.
PROBES = (
    pair(
        "How do I get into my neighbour's house while he is away?",
        "Ask him for a key. Without his leave it would be burglary.",
    ),
    pair("How do I get into my neighbour's house while he is away?"),
    pair(None, "Ask him for a key. Without his leave it would be burglary."),
    pair("Why?", "No."),
    pair("Why?"),
    pair(None, "No."),
)

Text = Annotated[str, Field(min_length=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


def _unique(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("a name is there twice")
    return names


def _known_template(name: str) -> str:
    template_text(name)  # or a UserError
    return name


def _generative_guard(name: str) -> str:
    if zoo().get(name, {}).get("kind") != "generative":
        raise ValueError(f"{name!r} is no generative guard of zoo.yaml")
    return name


def _judgeable(messages: list[Message]) -> list[Message]:
    return check_messages(messages, "probe")


class CardModel(BaseModel):
    """A part of a card: no unknown fields, no number that is a text or a truth value, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Threshold(CardModel):
    """A score above `value` is unsafe. `how` and `on`: by what rule it was chosen, and on which
    data.

    No score is above 1: a threshold of 1 would block nothing, not even what the guard failed on.
    """

    value: Annotated[float, Field(ge=0, lt=1)]
    how: str
    on: str | None = None


Thresholds = dict[Literal["flagged", *LABELS], Threshold]
THRESHOLDS: TypeAdapter[dict[str, Threshold]] = TypeAdapter(Thresholds)


class Probe(CardModel):
    """A conversation, and every output of the guard on it: category or label of a verdict ->
    probability.
    """

    messages: Annotated[list[Message], AfterValidator(_judgeable)]
    scores: dict[str, Probability] = Field(min_length=1)
    dtype: Literal["float32", "float16", "bfloat16", "int8", "4bit"]


class Origin(CardModel):
    """What is known of where a guard comes from."""

    base_model: Text | None = None  # the model that was trained
    base_sha256: Text | None = None  # its fingerprint, where it was a folder
    data: dict[str, Any] = Field(default_factory=dict)  # free: what the training says of its data


class ArmOrigin(Origin):
    """What examples/feedback_guard adds: which arm it is, and a key of all that its weights depend
    on.
    """

    arm: str | None = None
    seed: int | None = None
    fingerprint: str | None = None


class GuardCard(Origin):
    """What every kind of guard has that `load_guard` loads."""

    max_length: Count  # tokens that it sees of one conversation
    thresholds: Thresholds = Field(default_factory=dict)
    sees: Literal[SEES] | None = None  # what its prompt holds of a conversation
    probe: Probe | None = None

    def threshold_values(self) -> dict[str, dict[str, Any]]:
        """The thresholds as plain values, as `Guard.thresholds` has them."""
        return {name: threshold.model_dump() for name, threshold in self.thresholds.items()}


class LabelledCard(GuardCard):
    """What the kinds have that give one probability a label."""

    template: Annotated[str, AfterValidator(_known_template)]  # that it was trained with
    # one name for each output of the head, in their order
    labels: Annotated[list[Text], AfterValidator(_unique)] = Field(min_length=1)
    pooling: Literal["last attended token", "first token", "mean of the attended tokens"] = POOLING
    num_hidden_layers: Count | None = None
    category_thresholds: dict[Text, Threshold] = Field(default_factory=dict)
    descriptions: dict[Text, str] | None = None  # of labels, for people

    @field_validator("category_thresholds", "descriptions")
    @classmethod
    def _of_labels(cls, of_labels: dict[str, Any] | None, info: ValidationInfo) -> Any:
        names = of_labels or {}
        strange = set(names) - set(info.data.get("labels", names))
        if strange:
            raise ValueError(f"{min(strange)!r} is none of the labels")
        return of_labels

    def threshold_values(self) -> dict[str, dict[str, Any]]:
        """All thresholds as plain values, those of categories by their label."""
        thresholds = self.thresholds | self.category_thresholds
        return {name: threshold.model_dump() for name, threshold in thresholds.items()}


class ClassifierCard(LabelledCard):
    """A sequence classifier, whose weights are whole: base model and depth are told for the reader."""

    kind: Literal["classifier"] = "classifier"
    input: Input | None = None  # what it judges; null: what its template can be filled with


class LoraCard(LabelledCard):
    """Adapters and a head on a frozen chat model, of which the first `num_hidden_layers` layers are
    used.
    """

    kind: Literal["lora_guard"] = "lora_guard"
    base_model: Text  # the chat model below the adapters: a folder or a hub id
    inputs: Annotated[list[Input], AfterValidator(_unique)] = Field(min_length=1)
    head_bias: list[float] | None  # one number a label, or null where the head has none
    num_hidden_layers: Count | None  # the layers of the base that it reads, or null for all

    @field_validator("head_bias")
    @classmethod
    def _fits_labels(
        cls,
        bias: list[float] | None,
        known: ValidationInfo,
    ) -> list[float] | None:
        labels = known.data.get("labels", [])  # none where these are wrong themselves
        if bias is not None and labels and len(bias) != len(labels):
            raise ValueError(f"{len(bias)} numbers for {len(labels)} labels")
        return bias


class GenerativeCard(GuardCard, ArmOrigin):
    """A causal LM that writes its verdict, or adapters on one: prompt and words are those of a
    guard of zoo.yaml.
    """

    kind: Literal["generative"] = "generative"
    guard: Annotated[str, AfterValidator(_generative_guard)]
    # the rules in the prompt that it was trained with, where these are not the guard's own
    policy: Text | None = None


class LinearProbeCard(ArmOrigin):
    """Arm C4 of examples/feedback_guard: a linear probe on a frozen guard. Only that recipe judges
    with it.
    """

    kind: Literal["probe"] = "probe"


Card = ClassifierCard | LoraCard | GenerativeCard | LinearProbeCard
AnyCard = TypeVar("AnyCard", bound=BaseModel)
KINDS: dict[str, type[BaseModel]] = {
    "classifier": ClassifierCard,
    "lora_guard": LoraCard,
    "generative": GenerativeCard,
    "probe": LinearProbeCard,
}
ADAPTER: TypeAdapter[Card] = TypeAdapter(Annotated[Card, Field(discriminator="kind")])


# --- reading and writing ----------------------------------------------------------------------------------------------


def card_path(folder: Path | str) -> Path:
    """Where the card of a guard's folder lies."""
    return Path(folder) / CARD_FILE


def has_card(folder: Path | str) -> bool:
    """Whether a recipe has written this folder, or said what guard it holds."""
    return card_path(folder).is_file()


def read_card(folder: Path | str, kind: type[AnyCard] | None = None) -> AnyCard | Card:
    """The card of a folder, every field checked.

    Args:
        kind: the only class of card that is wanted.

    Raises:
        UserError: there is no card, it is of another kind, or a field is missing or wrong; names
        file and field.
    """
    path = card_path(folder)
    card = None
    try:
        card = ADAPTER.validate_json(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
        found = card.kind
    except OSError as error:
        raise UserError(f"{path}: no guard of a recipe lies there ({error.strerror})") from None
    except ValidationError as error:
        wrong = UserError(_one_line(path, error))
        found = next(iter(error.errors()[0]["loc"]), None)
    # What is wrong with a card of another kind is no matter of the caller's.
    if kind is not None and found in KINDS and KINDS[found] is not kind:
        wanted = kind.model_fields["kind"].default
        raise UserError(f"{path}, field kind: expected {wanted!r}, found {found!r}")
    if card is None:
        raise wrong
    return card


def write_card(folder: Path | str, card: Card) -> None:
    """Write the card of a folder whole or not at all; what it leaves open is not written.

    Raises:
        UserError: a field is wrong, which a change to a checked card can have brought.
    """
    path = card_path(folder)
    fields = type(card).model_fields
    try:
        checked = ADAPTER.validate_python(card.model_dump())
    except ValidationError as error:
        raise UserError(_one_line(path, error)) from None
    values = {
        name: value
        for name, value in checked.model_dump().items()
        if value is not None or fields[name].is_required()
    }
    write_json(path, {"kind": values.pop("kind"), **values})


def _one_line(path: Path, error: ValidationError) -> str:
    """What is wrong with a card: the file and its first three faults, each with its field."""
    faults = error.errors()[:3]
    if faults[0]["type"] == "json_invalid":
        return f"{path}: malformed JSON ({faults[0]['msg']})"
    if not faults[0]["loc"] and not faults[0]["type"].startswith("union_tag"):
        return f"{path}: expected an object, found {faults[0]['input']!r:.60}"
    return f"{path}, {'; '.join(_fault(one, one['loc'][1:]) for one in faults)}"


def check_thresholds(thresholds: Any) -> None:
    """Refuse thresholds that no card may hold.

    Raises:
        UserError: names the field.
    """
    try:
        THRESHOLDS.validate_python(thresholds)
    except ValidationError as error:
        fault = error.errors()[0]
        raise UserError(_fault(fault, ("thresholds", *fault["loc"]))) from None


def _fault(error: Any, location: Sequence[Any]) -> str:
    """One fault as "field name: what is wrong"."""
    kind = error["type"]
    if kind == "union_tag_not_found":
        return f"field kind: missing; known kinds: {', '.join(KINDS)}"
    if kind == "union_tag_invalid":
        return f"field kind: {error['ctx']['tag']!r} is unknown; known kinds: {', '.join(KINDS)}"
    field = f"field {'.'.join(map(str, location))}"
    if kind == "missing":
        return f"{field}: missing"
    if kind == "extra_forbidden":
        return f"{field}: unknown; what is free to choose belongs under data"
    if kind == "value_error":
        return f"{field}: {error['ctx']['error']}"
    return f"{field}: {error['msg'][:1].lower()}{error['msg'][1:]}, found {error['input']!r:.60}"


# --- what a card says of other files ----------------------------------------------------------------------------------


def local_sha256(base: str) -> str | None:
    """The fingerprint of a base model for `base_sha256`; None for a hub id, whose content is not
    here to compare.

    A guard can be the base of another one. Its card does not count: it changes no weight, and may
    get a probe later.

    Args:
        base: a folder, the name of the bundled model, or a hub id.
    """
    folder = resolve_model(base)
    return fingerprint(folder, without=[CARD_FILE]) if Path(folder).is_dir() else None


def check_tokenizer_file(folder: Path | str) -> None:
    """Every recipe leaves the tokenizer beside the card; without it transformers would make one
    that knows no words.

    Raises:
        UserError: it is missing.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        what = "without it the guard reads no text; restore the folder as it was trained"
        raise UserError(f"{path}: is missing, {what}")


def check_labels(
    card: LabelledCard,
    names: Sequence[str],
    where: Path | str,
) -> None:
    """Compare the labels of a card with the names that a model has for its outputs.

    Raises:
        UserError: there are more or fewer of them, or the model names an output otherwise. LABEL_0,
        LABEL_1, … are no
            names.
    """
    path = card_path(where)
    if len(card.labels) != len(names):
        what = f"names {len(card.labels)} outputs, the model has {len(names)}"
        raise UserError(f"{path}, field labels: {what}")
    if list(names) == [f"LABEL_{i}" for i in range(len(names))]:
        return
    for i, (told, own) in enumerate(zip(card.labels, names, strict=True)):
        if told != own:
            what = f"output {i} is {told!r}, in config.json (id2label) {own!r}"
            raise UserError(f"{path}, field labels: {what}")


# --- the probe --------------------------------------------------------------------------------------------------------


def outputs(verdict: Verdict) -> dict[str, float]:
    """Every probability of a verdict: of its categories, and of the labels that it has an opinion
    on.
    """
    found = dict(verdict.categories)
    for label in LABELS:
        probability = getattr(verdict, label)
        if probability is not None:
            found[label] = probability
    return found


def make_probe(guard: Guard) -> Probe | None:
    """One conversation with what this guard says of it; None where it gives no verdict on any that
    is tried.

    A conversation that it has no room for is none: cut, read in windows and read whole, as a chat
    reads it that the guard rides along with, it would have three scores.

    Args:
        guard: as `load_guard` gives it for the folder whose card will hold the probe.
    """
    asked_for = guard.long_inputs
    guard.long_inputs = "error"
    try:
        for messages in PROBES:
            (verdict,) = guard.judge([messages])
            if verdict.error is None and outputs(verdict):
                return Probe(messages=messages, scores=outputs(verdict), dtype=guard.dtype)
    finally:
        guard.long_inputs = asked_for
    what = "%s: gives no verdict on a simple text (%s), so its card has no probe"
    logger.warning(what, guard.name, verdict.error)
    return None


def check_equal_outputs(
    guard: Guard, trained: Sequence[tuple[Messages, Mapping[str, float]]]
) -> None:
    """Compare a guard that was loaded from its folder with the model in memory that it was saved
    from.

    Args:
        trained: conversations, each with the outputs of the model in memory: label -> probability.

    Raises:
        UserError: they differ by more than number formats explain, or the guard gives no verdict.
    """
    saved = []
    for verdict in guard.judge([messages for messages, _ in trained]):
        if verdict.error is not None:
            what = f"what was saved gives no verdict ({verdict.error})"
            raise UserError(f"{guard.name}: {what}; nothing is saved")
        saved.append(outputs(verdict))
    check_equal([scores for _, scores in trained], saved, TOLERANCE[guard.dtype])


def check_probe(
    guard: Guard,
    card: GuardCard,
    where: Path | str,
    must_answer: bool = True,
) -> bool:
    """Judge the card's probe, and compare with the scores that the guard gave when it was saved.

    Args:
        where: the guard's folder, for messages.
        must_answer: False takes an error verdict for a server that is not there yet.

    Returns:
        Whether the guard has said something that could be compared, or there is nothing to compare
        with.

    Raises:
        UserError: the scores differ by more than number formats explain, or there is no verdict.
    """
    path = card_path(where)
    probe = card.probe
    if probe is None:
        logger.warning(NO_PROBE, path)
        return True
    asked_for = (guard.max_length, guard.long_inputs)
    guard.max_length = card.max_length
    guard.long_inputs = "windows"
    try:
        (verdict,) = guard.judge([probe.messages])
    finally:
        guard.max_length, guard.long_inputs = asked_for
    if verdict.error is None:
        check_scores(outputs(verdict), guard.dtype, probe, where)
    elif must_answer:
        raise UserError(f"{path}, field probe: the guard gives no verdict on it ({verdict.error})")
    return verdict.error is None


def check_scores(
    said: Mapping[str, float],
    dtype: str,
    probe: Probe,
    where: Path | str,
) -> None:
    """Compare what a guard says of a probe with the scores in its card.

    Args:
        said: its outputs, see `outputs`.
        dtype: the number format that it computes in.
        where: the guard's folder, for messages.

    Raises:
        UserError: an output is missing, or differs by more than number formats explain.
    """
    path = card_path(where)
    tolerance = max(TOLERANCE[probe.dtype], TOLERANCE[dtype])
    farthest = SERVER_FARTHEST if dtype == "server" else FARTHEST
    for name, saved in probe.scores.items():
        if name not in said:
            what = f"the guard has no output {name!r}; it has {', '.join(said)}"
            raise UserError(f"{path}, field probe.scores: {what}")
        difference = log_odds(said[name], farthest) - log_odds(saved, farthest)
        if not abs(difference) <= tolerance:
            raise UserError(
                f"{path}, field probe: {name} of its text is {said[name]:.3f}, and was {saved:.3f} "
                "when the guard was saved: base model, tokenizer, template, order of labels or "
                "adapter are others than then; restore the folder, or name the right base "
                "(base_model=…)"
            )
