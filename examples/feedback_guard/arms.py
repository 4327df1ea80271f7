"""The arms of the experiment (arms.yaml): the rows that each trains on, made of what process.py
kept.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import legacy
import yaml
from config import Config
from legacy import Text
from records import feedback, passed, q, refused, text_key

from common.conversation import Message, UserError, pair

HARD = 0.1  # s_in from which a harmless prompt is a hard one
# prompts alike in s_in and length, among which C1 permutes what is known of their responses
BLOCK = 8
FEEDBACK = ("outputs", "permuted", "suspicious", "human")


@dataclass(frozen=True)
class Arm:
    """What arms.yaml says of an arm. `texts` arms train on the original's texts, the others on rows
    of the guard.
    """

    name: str
    question: str
    # how it is asked: guard, or the original's chatml and meta, whose answers are parsed
    query: str = "guard"
    parser: str = "correct"  # of such answers: strict (the original's rule) or correct
    weights_of: str | None = None  # it needs no training: the weights of that arm, asked otherwise
    probe: bool = False  # no fine-tuning: a logistic probe on the frozen guard
    learning_rate: float | None = None  # None: the config's
    warmup_steps: float | None = None  # None: the config's
    # texts
    texts: bool = False
    # who found the blocked prompts: legacy (the original's checks) or correct
    collection: str = "correct"
    loss: str = "verdict"  # all or answer, of texts; verdict otherwise
    augment: bool = False
    # rows
    feedback: str = "outputs"  # which prompts are the unsafe ones: see `_seen`
    safe: bool = False
    replay: float = 0.0  # rows of the guard's own decisions for each feedback row
    hard_benign: bool = False
    explored: bool = False
    kl: bool = False
    soft: bool = False

    @property
    def trains(self) -> bool:
        """Whether it has weights of its own."""
        return self.weights_of is None


@dataclass(frozen=True)
class Row:
    """One row to train on. Rows with `text` are the original's; for them alone the text is what is
    trained.
    """

    id: str
    messages: list[Message]
    target: float  # probability of unsafe
    source: str  # feedback | safe | replay | hard_benign | explored | human
    categories: list[str] | None = None
    kl: bool = False
    text: Text | None = field(default=None, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """The row as a line of training_examples.jsonl."""
        known = {
            "id": self.id,
            "messages": self.messages,
            "target": self.target,
            "source": self.source,
        }
        known |= {"categories": self.categories, "kl": self.kl}
        return known | (
            {"text": "".join(p.text for p in self.text.parts) + self.text.answer}
            if self.text
            else {}
        )


@cache
def all_arms() -> dict[str, Arm]:
    """The arms of arms.yaml by name, in its order."""
    described = yaml.safe_load(Path(__file__).with_name("arms.yaml").read_text(encoding="utf-8"))
    return {name: Arm(name=name, **values) for name, values in described.items()}


def arm(name: str) -> Arm:
    """An arm by its name. Raises UserError when there is none."""
    if name not in all_arms():
        raise UserError(f"training.arms: {name!r} is none of {', '.join(all_arms())}")
    return all_arms()[name]


def arm_folder(config: Config, name: str, seed: int) -> Path:
    """Where the weights of an arm lie, or those that it borrows."""
    return Path(config.training.output_dir) / (arm(name).weights_of or name) / f"seed{seed}"


def build_rows(
    arm: Arm, processed: Sequence[Mapping], blocked: Sequence[Mapping], seed: int, config: Config
) -> list[Row]:
    """The rows of an arm; no prompt is in both classes, but where the original's own contradictions
    are the point.

    Arms of one seed draw the same safe and replayed prompts, as far as they go.

    Args:
        processed: lines of processed/<process_split>.jsonl.
        blocked: lines of blocked_inputs.jsonl.

    Raises:
        UserError: no prompt passed whose responses were blocked, or process.py ran without an arm
        such as this.
    """
    if not any(map(feedback, processed)):
        raise UserError(
            f"{config.dataset.store_dir}: none of {len(processed)} prompts passed the guard and had its responses "
            "blocked: there is nothing to learn from; process more prompts, or another assistant's responses"
        )
    if arm.collection == "legacy" and any(row["legacy"] is None for row in processed):
        raise UserError(
            f"{config.dataset.store_dir}: the guard was not asked there as the original asks it; run process.py again, "
            f"with {arm.name} in training.arms"
        )
    if arm.texts:
        return _texts(arm, processed, blocked, seed)[0]
    return _one_class(_rows(arm, processed, seed, config))


# --- the original's texts ---------------------------------------------------------------------------------------------


def legacy_facts(
    arm: Arm, processed: Sequence[Mapping], blocked: Sequence[Mapping], seed: int
) -> dict[str, Any]:
    """What run.json says of an arm of texts: its collection, and reasons at which the original
    would have crashed.
    """
    return _texts(arm, processed, blocked, seed)[1]


def _texts(
    arm: Arm, processed: Sequence[Mapping], blocked: Sequence[Mapping], seed: int
) -> tuple[list[Row], dict[str, Any]]:
    facts: dict[str, Any] = {}
    found = {row["id"]: row["reason"] for row in blocked}
    if arm.collection == "legacy":
        collected = _legacy_blocked(processed)
        facts["legacy_collection"] = len(collected) or "empty"
        if collected:  # else the original would have nothing to train on
            facts["also_in_correct_collection"] = len(set(collected) & set(found))
            found = collected
    prompts = {row["id"]: row["query"] for row in processed}
    bad = [legacy.example(i, prompts[i], reason) for i, reason in found.items() if i in prompts]
    if not bad:
        raise UserError(
            "blocked_inputs.jsonl: holds no prompt of the processed ones; run process.py again"
        )
    harmless = [row for row in processed if row["human_unsafe"] is False]
    if arm.collection == "correct":
        known = {text_key(one.prompt) for one in bad}
        harmless = [
            r for r in processed if passed(r) and q(r) == 0 and text_key(r["query"]) not in known
        ]
    good = harmless[: min(len(bad), len(processed) // 2)]  # the first ones, as they come
    examples = [*bad, *(legacy.example(row["id"], row["query"], None) for row in good)]
    facts |= {"blocked": len(bad), "safe": len(good)}
    facts["reasons_that_crash_the_original"] = sum(legacy.stops_original(one.reason) for one in bad)
    facts["prompts_in_both_lists"] = len({one.id for one in bad} & {row["id"] for row in good})
    texts = legacy.training_texts(examples, seed, augment=arm.augment, shuffle=arm.augment)
    source = {one.id: "feedback" for one in bad}
    rows = [
        Row(
            text.id,
            pair(prompts[text.id]),
            float(text.unsafe),
            source.get(text.id, "safe"),
            text=text,
        )
        for text in texts
    ]
    return rows, facts | {"texts": len(rows), "unsafe_texts": sum(text.unsafe for text in texts)}


def _legacy_blocked(processed: Sequence[Mapping]) -> dict[str, str]:
    """What the original would have collected, by its own checks: id and reason. It asks for one
    response a prompt.
    """
    out = {}
    for row in processed:
        said = row["legacy"]
        if said and said["outputs"] and legacy.legacy_safe(said["input"]):
            output = said["outputs"][0]
            if not legacy.legacy_safe(output):
                out[row["id"]] = legacy.legacy_reason(output)
    return out


# --- rows of the guard ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """A prompt that passed, and what its responses say of it: q, and whether harmless ones mean
    that it is harmless.

    `categories`: those of its unsafe responses, None where the guard named none.
    """

    id: str
    query: str
    score: float  # s_in
    q: float
    refused: bool
    source: str = "feedback"
    categories: list[str] | None = None


def _rows(arm: Arm, processed: Sequence[Mapping], seed: int, config: Config) -> list[Row]:
    seen = _seen(arm, processed, seed, config)
    bad = [one for one in seen if one.q >= 0.5]
    count, taken = len(bad), {text_key(one.query) for one in bad}

    def free(query: str) -> bool:
        """Whether a prompt is still in no class; from now on it is."""
        key = text_key(query)
        new = key not in taken
        taken.add(key)
        return new

    rows = [_row(one, one.q if arm.soft else 1.0, one.source) for one in bad]
    harmless = [one for one in seen if one.q == 0 and not one.refused]
    if arm.hard_benign:
        hard = sorted(
            (one for one in harmless if one.score >= HARD), key=lambda one: (-one.score, one.id)
        )
        rows += [
            _row(one, 0.0, "hard_benign")
            for one in islice((o for o in hard if free(o.query)), count)
        ]
    if arm.explored:
        rows += [
            Row(row["id"], pair(row["query"]), 0.0, "explored")
            for row in processed
            if row["shadow"] and q(row) == 0 and not _refused(row, config) and free(row["query"])
        ]
    if arm.safe:
        pool = (
            [one for one in seen if one.q < 0.5 and not (one.q == 0 and one.refused)]
            if arm.soft
            else harmless
        )
        wanted = round(config.training.safe_ratio * count)
        some = islice((one for one in _shuffled(pool, seed, "safe") if free(one.query)), wanted)
        rows += [_row(one, one.q if arm.soft else 0.0, "safe", arm.kl) for one in some]
    if arm.replay:
        rows += _replayed(
            arm,
            processed,
            seen,
            round(arm.replay * count),
            {text_key(m) for m in _prompts(rows)},
            seed,
        )
    return rows


def _prompts(rows: Sequence[Row]) -> list[str]:
    return [row.messages[0]["content"] for row in rows]


def _row(one: Seen, target: float, source: str, kl: bool = False) -> Row:
    return Row(
        one.id,
        pair(one.query),
        float(target),
        source,
        one.categories if target >= 0.5 else None,
        kl=kl,
    )


def _refused(row: Mapping, config: Config) -> bool:
    return config.experiment.refusal_filter and refused(row)


def _seen(arm: Arm, processed: Sequence[Mapping], seed: int, config: Config) -> list[Seen]:
    """The prompts that passed, and for the controls something else in the place of what their
    responses say.

    outputs: their responses. permuted: those of a prompt alike in s_in and length (C1). suspicious:
    as many prompts as have unsafe responses, those of the highest s_in, are the unsafe ones (C2).
    human: as many prompts that people call unsafe are, those that the guard passed first (C3).
    """
    rows = [row for row in processed if passed(row) and not row["shadow"] and q(row) is not None]
    seen = [
        Seen(
            r["id"],
            r["query"],
            r["input_unsafe"] or 0.0,
            q(r),
            _refused(r, config),
            "feedback",
            unsafe_categories(r),
        )
        for r in rows
    ]
    count = sum(one.q >= 0.5 for one in seen)
    if arm.feedback == "permuted":
        return _permuted(seen, seed)
    if arm.feedback == "suspicious":
        first = {one.id for one in sorted(seen, key=lambda one: (-one.score, one.id))[:count]}
        return [
            replace(one, q=float(one.id in first), refused=False, categories=None) for one in seen
        ]
    if arm.feedback == "human":
        bad = _shuffled([row for row in processed if row["human_unsafe"]], seed, "human")
        bad = sorted(bad, key=lambda row: not passed(row))[:count]
        human = [
            Seen(r["id"], r["query"], r["input_unsafe"] or 0.0, 1.0, False, "human") for r in bad
        ]
        harmless = {row["id"] for row in rows if row["human_unsafe"] is False}
        return human + [
            replace(one, q=0.0, refused=False, categories=None)
            for one in seen
            if one.id in harmless
        ]
    return seen


def unsafe_categories(row: Mapping) -> list[str] | None:
    """The categories that the guard named of a prompt's unsafe responses; None where it named none."""
    return (
        sorted(
            {name for r in row["responses"] if r["decided"] for name in r.get("categories") or ()}
        )
        or None
    )


def _permuted(seen: Sequence[Seen], seed: int) -> list[Seen]:
    """q, refusals and categories exchanged within blocks of prompts of like s_in (fifths of them)
    and like length.
    """
    order = sorted(seen, key=lambda one: (one.score, one.id))
    fifth = {one.id: i * 5 // len(order) for i, one in enumerate(order)}
    order = sorted(seen, key=lambda one: (fifth[one.id], len(one.query), one.id))
    rng, out = random.Random(f"{seed} permuted"), []
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        others = rng.sample(block, len(block))
        pairs = zip(block, others, strict=True)
        out += [replace(one, q=o.q, refused=o.refused, categories=o.categories) for one, o in pairs]
    return out


def _replayed(
    arm: Arm,
    processed: Sequence[Mapping],
    seen: Sequence[Seen],
    count: int,
    taken: set[str],
    seed: int,
) -> list[Row]:
    """The guard's own decisions on other prompts, in the proportion that traffic has, and at least
    one of each class.

    A prompt that passed and whose responses refuse, or are unsafe, is none of them: the decision
    may be wrong. What they say is what the arm was told (`seen`): a control must not learn here
    what its labels hide.
    """
    decided: dict[bool, list[Mapping]] = defaultdict(list)
    doubted = {one.id for one in seen if one.q > 0 or one.refused}
    for row in _shuffled(processed, seed, "replay"):
        doubtful = row["id"] in doubted
        wrong = arm.feedback == "outputs" and row["shadow"] and q(row) == 0
        if (
            row["input_error"] is None
            and not doubtful
            and not wrong
            and text_key(row["query"]) not in taken
        ):
            decided[row["input_decided"]].append(row)
    share = Counter(bool(row["input_decided"]) for row in processed)[True] / len(processed)
    unsafe = min(len(decided[True]), max(1, round(share * count)))
    chosen = decided[True][:unsafe] + decided[False][: max(0, count - unsafe)]
    return [
        Row(
            r["id"],
            pair(r["query"]),
            float(r["input_decided"]),
            "replay",
            kl=arm.kl and not r["input_decided"],
        )
        for r in chosen
    ]


def _shuffled(rows: Sequence[Any], seed: int, what: str) -> list[Any]:
    """In an order that depends on the seed and on what the rows are for, not on the arm."""
    return random.Random(f"{seed} {what}").sample(list(rows), len(rows))


def _one_class(rows: Sequence[Row]) -> list[Row]:
    """Each prompt once; rows that come first (feedback before all others) keep it."""
    kept: dict[str, Row] = {}
    for row in rows:
        kept.setdefault(text_key(row.messages[0]["content"]), row)
    return list(kept.values())
