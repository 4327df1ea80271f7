"""What every guard is: something that judges conversations."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from transformers import CONFIG_MAPPING, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from common.conversation import (
    Message,
    Messages,
    UserError,
    Verdict,
    check_messages,
    judged_label,
    pair,
)
from common.templates import Part, text_of

Read = TypeVar("Read")
LONG_INPUTS = ("windows", "error", "truncate")

# What a guard sees of a conversation.
LAST_TURN = "last turn"
LAST_TURNS = "last turns"  # the last question, and its answer
WHOLE_CONVERSATION = "whole conversation"
UNKNOWN = "not known"
SEES = (LAST_TURN, LAST_TURNS, WHOLE_CONVERSATION)
TALK = [
    *pair("A first question?", "A first answer."),
    *pair("A last question?", "A last answer."),
]


def threshold_of(thresholds: Mapping[str, Mapping], label: str) -> Mapping[str, Any] | None:
    """The threshold of a guard for a label of `LABELS`: its own, or else, of harm, that of
    `flagged`; None where there is none.

    Args:
        thresholds: of a guard.json, {"value", "how", "on"} by name.
    """
    found = thresholds.get(label)
    if found is None and label != "response_refusal":
        found = thresholds.get("flagged")
    return found


def decides_above(thresholds: Mapping[str, Mapping], label: str) -> float:
    """Above which score a label counts as said: the guard's threshold, or else 0.5."""
    found = threshold_of(thresholds, label)
    return 0.5 if found is None else found["value"]


# what `is_flagged` decides by: results that were decided by another rule say so, or say nothing
DECIDED_BY = "the threshold of its guard.json, or else its own word, or else score > 0.5"


def is_flagged(
    verdict: Verdict,
    label: str,
    thresholds: Mapping[str, Mapping],
) -> bool | None:
    """Whether a verdict says `label`; None where the guard failed, or has no opinion.

    The threshold in guard.json decides: it is the operating point that the user chose. Without one
    the guard's own word does, and without a word a score above 0.5.
    """
    if verdict.error is not None:
        return None
    score = getattr(verdict, label)
    word = verdict.decided.get(label)
    has_threshold = threshold_of(thresholds, label) is not None
    if score is None or (word is not None and not has_threshold):
        return word
    return score > decides_above(thresholds, label)


FOREIGN = (
    "pass --trust_remote_code where its folder brings the code, else compare it by its predictions "
    "(--guards name=predictions:scores.jsonl)"
)


def refuse_foreign(model: str, known: Mapping[str, str], trust_remote_code: bool) -> None:
    """Refuse a folder with a model that no class of transformers is for.

    Args:
        known: of an auto class, its classes by the type of model.

    Raises:
        UserError: it says what to do with such a model.
    """
    path = Path(model) / "config.json"
    if trust_remote_code or not path.is_file():
        return
    kind = None
    with suppress(ValueError, AttributeError):  # a broken one is for the loader
        kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    is_users = kind in CONFIG_MAPPING and kind not in CONFIG_MAPPING_NAMES  # who has registered it
    if kind is not None and kind not in known and not is_users:
        raise UserError(f"{model}: transformers has no class for model_type {kind} here; {FOREIGN}")


def number_format(model: PreTrainedModel) -> str:
    """What a model computes in: float32, float16, bfloat16, or 4bit where its weights are
    quantized.
    """
    if getattr(model, "is_quantized", False):
        return "4bit"
    return str(model.dtype).removeprefix("torch.")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse a tokenizer without a vocabulary: transformers makes one where tokenizer.json is
    missing.

    Raises:
        UserError: it knows nothing of a plain text, so that every text would get the same score.
    """
    ids = tokenizer("How do I cook rice?", add_special_tokens=False)["input_ids"]
    if not set(ids) - {tokenizer.unk_token_id}:
        raise UserError(
            f"{where}: its tokenizer knows no words; tokenizer.json is missing there, or empty"
        )


class Guard:
    """What judges conversations. `name` says which; `thresholds` are the ones that its training
    fitted.

    The last turn is judged: a user's as a prompt, an assistant's as a response. Where a guard's
    format says more in the same pass (the prompt of an answered conversation, whether the answer is
    a refusal), its verdict holds that too.

    A kind of guard implements `judge_valid`, and finds in `wanted` what `judge` was asked for. (One
    that overrides `judge` sees conversations as they come.)
    """

    name: str
    thresholds: dict[str, dict[str, Any]]
    judges: Sequence[str] = ("response_unsafe",)  # of LABELS: what it can be asked
    sees: str = (
        UNKNOWN  # or of SEES: what it sees of a conversation; turns before that do not count
    )
    wanted: Collection[str] = ()  # see `judge`
    dtype: str = "float32"  # the number format that it computes in, see `number_format`

    def judge(
        self, conversations: Sequence[Messages], wanted: Collection[str] = ()
    ) -> list[Verdict]:
        """One verdict a conversation, in order. What is no conversation gets an error verdict, and
        disturbs no other.

        Args:
            wanted: labels that are asked for beside that of the last turn. A guard that would have
                to generate text for one of the others leaves it None.

        Raises:
            UserError: `conversations` is no list at all.
        """
        if isinstance(conversations, str | Mapping):
            raise UserError(f"judge() takes a list of conversations, not {conversations!r:.60}")
        verdicts, valid = each(
            conversations,
            lambda one: check_messages(one, "conversation", allow_empty=True),
        )
        self.wanted = wanted
        said = self.judge_valid(list(valid.values()))
        for place, verdict in zip(valid, said, strict=True):
            verdicts[place] = verdict
        return verdicts

    def judge_valid(self, conversations: Sequence[list[Message]]) -> list[Verdict]:
        """One verdict a conversation, in order, of conversations that `check_messages` has read."""
        raise NotImplementedError(f"{type(self).__name__} implements neither judge_valid nor judge")

    def moderate(
        self,
        conversations: Sequence[Messages],
        **_: Any,
    ) -> list[float]:
        """GuardBench's callback: the unsafe probability of each last turn, 1.0 where the guard says
        none ("n/a").
        """
        verdicts = self.judge(conversations)
        judged = zip(conversations, verdicts, strict=True)
        return [self._moderated(messages, verdict) for messages, verdict in judged]

    def _moderated(self, messages: Messages, verdict: Verdict) -> float:
        if verdict.error is not None:
            return verdict.score()
        label = judged_label(messages)
        if getattr(verdict, label) is None and label in self.judges:
            return 1.0
        return verdict.score(label)


def each(
    conversations: Sequence[Any], read: Callable[[Any], Read]
) -> tuple[list[Verdict], dict[int, Read]]:
    """What `read` makes of each conversation, by its place, and a verdict for each: an error where
    `read` raises UserError, and empty where it does not.
    """
    verdicts, found = [], {}
    for place, conversation in enumerate(conversations):
        verdicts.append(Verdict())
        try:
            found[place] = read(conversation)
        except UserError as error:
            verdicts[place].error = str(error)
    return verdicts, found


def seen_of(prompt_of: Callable[[Messages], Sequence[Part]]) -> str:
    """What a guard sees of a conversation, one of SEES or UNKNOWN: found in the prompt that it writes of one.

    Args:
        prompt_of: the whole prompt of a conversation, in pieces; UserError where it has none.
    """
    for messages in (TALK, TALK[:3]):  # not every guard judges answers
        try:
            prompt = text_of(prompt_of(messages))
        except UserError:
            continue
        seen = [message["content"] in prompt for message in messages]
        if all(seen):
            return WHOLE_CONVERSATION
        return LAST_TURNS if seen[-2] else LAST_TURN
    return UNKNOWN
