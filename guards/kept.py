"""Verdicts that are kept as they come: Ctrl-C or a kill loses those alone that were being made."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.conversation import Messages, Verdict
from common.keep import KeptRows, Row, digest
from guards.base import Guard
from guards.identity import guard_identity, is_served

CHUNK = 64  # conversations between two writes
# What a server's guard says each time that it is asked: a text that is too long or refused, and an
# answer that cannot be read. (A refused key is none of these.)
LASTING = re.compile(
    r"(tokens|bytes|characters), more than|the model has room for|empty text"
    r"| was expected$|in what it wrote|is not a number"
    r"|in the answer|the answer lacks"
    r"|Error code: 4(00|13|22)|HTTP 4(00|13|22)(?!.*: check )"
)


def fill_verdicts(
    kept: KeptRows,
    keys: Sequence[str],
    judge: Callable[[list[str]], list[Verdict]],
    *,
    size: int = CHUNK,
    served: bool = False,
    title: str | None = None,
    beside: Callable[[str], Row] = lambda key: {},
) -> dict[str, Verdict]:
    """The verdicts on conversations by their keys; what `kept` lacks is judged, and kept.

    Args:
        judge: gives the verdicts of some of the keys, in their order.
        served: the guard runs elsewhere, so that a verdict does not depend on what else is asked,
            and an error of the network is asked again.
        title: what the progress bar calls the job.
        beside: what else is kept of a key.
    """

    def make(_: int, asked: list[str]):
        for key, verdict in zip(asked, judge(asked), strict=True):
            yield {kept.key: key, **beside(key), "verdict": asdict(verdict)}

    rows = kept.fill(
        keys,
        make,
        size=size,
        together=not served,
        again=_may_go_away if served else None,
        title=title,
    )
    verdicts = [Verdict(**row["verdict"]) for row in rows]
    return dict(zip(keys, verdicts, strict=True))


def judge_and_keep(
    guard: Guard,
    spec: str,
    options: Mapping[str, Any],
    conversations: Sequence[Messages],
    path: Path,
    variant: str = "",
    wanted: Sequence[str] = (),
) -> list[Verdict]:
    """One verdict a conversation, in order; those that `path` holds of this guard are not made
    again.

    Args:
        spec, options: what the guard was loaded by.
        variant: tells a guard from that which was loaded, such as one with another head.
        wanted: as `Guard.judge` takes it.
    """
    identity = guard_identity(spec, options)
    asked_for = [variant, *wanted] if wanted else variant
    keys = [digest([identity, asked_for, messages]) for messages in conversations]
    messages_of = dict(zip(keys, conversations, strict=True))
    longest_first = sorted(messages_of, key=lambda key: -len(str(messages_of[key])))
    with KeptRows(path) as kept:
        said = fill_verdicts(
            kept,
            longest_first,
            lambda asked: guard.judge([messages_of[key] for key in asked], wanted),
            served=is_served(spec, options),
            title=variant or f"judging with {guard.name}",
        )
    return [said[key] for key in keys]


def _may_go_away(row: Row) -> bool:
    """Whether a verdict is an error of the network or of a server, which is asked again."""
    error = row["verdict"]["error"]
    return error is not None and LASTING.search(error) is None
