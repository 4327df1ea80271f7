"""A guard that is known by its predictions alone: `--guards somebody=predictions:scores.jsonl`.

A row of the file (any type that `common.data.files` reads) says what the guard said of one row:

    {"id": "r17", "score": 0.93, "verdict": "unsafe"}
    {"text_sha256": "9f86d0…", "label": "response_unsafe", "score": 0.07}

`id` is the row's own id in the labelled data, or the id in the suite's predictions.jsonl;
`text_sha256` is `text_hash` of the conversation. `score` is the probability of unsafe (or of a
refusal) in [0, 1], `verdict` the guard's own word for it (safe, unsafe, yes, no, …): either may be
missing. An obfuscated row (`rows.jsonl+homoglyph`) has the id `r17+homoglyph`. `label` is one of
`conversation.LABELS`, and needed where several are judged. A row with `error`, or without score and
verdict, has no verdict, and so has what is not in the file.
"""

import hashlib
import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.conversation import (
    LABELS,
    UNKNOWN_WORDS,
    Messages,
    UserError,
    Verdict,
    check_label,
)
from common.data import id_text, read_rows
from common.keep import Row
from guards import Guard
from guards.suite.benchmarks import Benchmark

logger = logging.getLogger("suite")
EXAMPLE = '{"id": "…", "score": 0.93, "verdict": "unsafe"}'
NAMES = ("id", "text_sha256")  # of them, each row has one at least


def text_hash(messages: Messages) -> str:
    """The SHA-256 of the turns, lower-cased, with single spaces, a line each. So a prompt's hash is
    that of its text alone.
    """
    turns = [" ".join(turn["content"].lower().split()) for turn in messages]
    return hashlib.sha256("\n".join(turns).encode("utf-8", "replace")).hexdigest()


@dataclass(frozen=True)
class Prediction:
    """What a row of the file says."""

    score: float | None
    decided: bool | None
    error: str | None

    def verdict(self, label: str) -> Verdict:
        """The same as a verdict on a label."""
        verdict = Verdict(error=self.error)
        setattr(verdict, label, self.score)
        if self.decided is not None:
            verdict.decided[label] = self.decided
        return verdict


class PredictedGuard(Guard):
    """The predictions of a file, as a guard that judges the rows of benchmarks."""

    judges = LABELS

    def __init__(self, name: str, path: str):
        """Read the file.

        Raises:
            UserError: a row that is no prediction, or two that contradict each other.
        """
        self.name = name
        self.file = Path(path).name
        self.thresholds = {}
        self.said: dict[tuple[str, str], Prediction] = {}  # by label ("" for any) and name
        for where, row in read_rows(path):
            self._add(row, where)
        labels = {label for label, _ in self.said}
        self.is_labelled = "" not in labels
        if self.is_labelled:
            self.judges = tuple(label for label in LABELS if label in labels)

    def _add(self, row: Any, where: str) -> None:
        if isinstance(row, UserError):
            raise row
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: expected an object such as {EXAMPLE}, found {row!r:.60}")
        names = [id_text(row[column]) for column in NAMES if row.get(column) not in (None, "")]
        if not names:
            columns = ", ".join(map(str, row))
            what = f"missing (columns: {columns}); expected a row like {EXAMPLE}"
            raise UserError(f"{where}, field id: {what}")
        label = row.get("label") or ""
        if label and label not in LABELS:
            known = ", ".join(LABELS)
            raise UserError(f"{where}, field label: {label!r:.40} is none of {known}")
        said = _prediction(row, where)
        for name in names:
            if self.said.setdefault((label, name), said) != said:
                raise UserError(f"{where}: another row says something else of {name}; keep one")

    def judge_rows(self, rows: Sequence[Row], label: str) -> list[Verdict]:
        """The verdicts on rows of a benchmark; an error where the file has none."""
        nothing = Prediction(None, None, f"no prediction of this row in {self.file}")
        found = [self._find(row, label) for row in rows]
        missing = found.count(None)
        if missing:
            logger.warning("%s: no prediction of %d of %d rows", self.file, missing, len(rows))
        return [(said or nothing).verdict(label) for said in found]

    def _find(self, row: Row, label: str) -> Prediction | None:
        for name in (row["id"], row.get("own_id"), text_hash(row["messages"])):
            for of_label in (label, ""):
                if (of_label, name) in self.said:
                    return self.said[of_label, name]
        return None

    def check_names(self, benchmarks: Sequence[Benchmark]) -> None:
        """Refuse predictions that could be of one row or of another.

        Raises:
            UserError: labels are not told apart, or an id is that of two rows.
        """
        labels = sorted({benchmark.label for benchmark in benchmarks})
        if not self.is_labelled and len(labels) > 1:
            known = " and ".join(labels)
            raise UserError(
                f"--guards {self.name}: {self.file} needs a field label, because {known} are judged "
                "here; or choose by --task_type"
            )
        rows_of = defaultdict(set)
        for benchmark in benchmarks:
            for row in benchmark.rows:
                rows_of[benchmark.label, row.get("own_id")].add(row["id"])
        for (label, name), rows in rows_of.items():
            is_used = (label, name) in self.said or ("", name) in self.said
            if is_used and len(rows) > 1:
                raise UserError(
                    f"--guards {self.name}: {self.file} has a prediction of {name}, the id of "
                    f"{len(rows)} rows here; use text_sha256, or give each row an id of its own"
                )


def _prediction(row: Mapping, where: str) -> Prediction:
    score = _score(row.get("score"), where)
    decided = check_label(row.get("verdict"), "verdict", where)
    error = row.get("error") or None
    if error is None and score is None and decided is None:
        error = "neither score nor verdict"
    return Prediction(score, decided, error and str(error))


def _score(value: Any, where: str) -> float | None:
    if value is None or str(value).strip().lower() in UNKNOWN_WORDS:
        return None
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if isinstance(value, bool) or not 0 <= score <= 1:
        raise UserError(f"{where}, field score: {value!r:.40} is no probability in [0, 1]")
    return score
