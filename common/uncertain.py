"""uncertain.jsonl: the judged rows that are worth a second look.

They are those nearest a guard's threshold, and those on which guards disagree. The file is plain
data: somebody mends its labels, and it goes back into training beside the rows that were there
before, whose labels it replaces.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.hf_argparser import HfArg

from common.conversation import UserError, Verdict, last_turns, log_odds, pair
from common.data.rows import LABEL_COLUMNS
from common.run import json_lines, write_text

logger = logging.getLogger(__name__)
FILE = "uncertain.jsonl"


@dataclass(kw_only=True)
class ExportArguments:
    """How much is written for relabelling, as a flag of a command."""

    export_uncertain: int = HfArg(
        default=0,
        help="Write so many rows nearest a threshold, and as many on which guards disagree, "
        "to OUTPUT_DIR/uncertain.jsonl, to be labelled again and trained on.",
    )

    def check_export(self, output_dir: str) -> None:
        """Raise UserError, before any work, where nothing can be exported."""
        if self.export_uncertain < 0:
            raise UserError(f"--export_uncertain {self.export_uncertain}: must be 0 (off) or more")
        path = Path(output_dir) / FILE
        if self.export_uncertain and path.exists():
            said = "is there, and may hold labels of yours; move it, or choose another --output_dir"
            raise UserError(f"--export_uncertain: {path} {said}")


@dataclass(frozen=True)
class Scored:
    """A row (`messages`, and what else is known of it) with the scores of guards for `label`.

    `thresholds` and `scores` are by guard; one that failed, or has no opinion, is in neither.
    """

    row: Mapping[str, Any]
    label: str
    scores: Mapping[str, float]
    thresholds: Mapping[str, float]

    def distances(self) -> dict[str, float]:
        """How far each guard is above its threshold, in log-odds: there 0.01 is as far from 0.02 as
        0.98 from 0.99.
        """
        found = {}
        for name, score in self.scores.items():
            found[name] = log_odds(score) - log_odds(self.thresholds[name])
        return found

    def disagreement(self) -> float:
        """How far guards lie apart of which some flag the row; 0 where all say the same."""
        far = self.distances()
        flagged = [name for name in far if self.scores[name] > self.thresholds[name]]
        if not 0 < len(flagged) < len(far):
            return 0.0
        return max(far.values()) - min(far.values())


def scored(
    row: Mapping[str, Any],
    label: str,
    verdicts: Mapping[str, Verdict],
    thresholds: Mapping[str, float],
) -> Scored:
    """What guards say of a row."""
    scores = {}
    own_thresholds = {}
    for name, verdict in verdicts.items():
        score = verdict.opinion(label)
        if score is None or math.isnan(score):
            continue
        scores[name] = score
        own_thresholds[name] = thresholds[name]
    return Scored(row, label, scores, own_thresholds)


def write_uncertain(folder: Path | str, rows: Sequence[Scored], count: int) -> None:
    """Write `count` rows nearest a threshold, and as many on which guards lie furthest apart.

    Nothing is written where `count` is 0.
    """
    if not count:
        return
    judged = [row for row in rows if row.scores]
    near = sorted(judged, key=_nearest)[:count]
    split = sorted(judged, key=Scored.disagreement, reverse=True)[:count]
    lines = [_line(row, "near the threshold") for row in near]
    for row in split:
        if row.disagreement() and row not in near:
            lines.append(_line(row, "guards disagree"))
    path = Path(folder) / FILE
    write_text(path, json_lines(lines))
    said = "%s: %d rows to label again; then train on the old rows and on these."
    logger.info(said, path, len(lines))


def _nearest(row: Scored) -> float:
    return min(abs(distance) for distance in row.distances().values())


def _line(row: Scored, why: str) -> dict[str, Any]:
    """A row as `load_conversations` reads it; what is asked again stands first."""
    messages = row.row["messages"]
    prompt, response = last_turns(messages)
    line: dict[str, Any] = {"id": str(row.row["id"])}
    if prompt is not None and messages == pair(prompt, response):
        line |= {"prompt": prompt, "response": response}
    else:
        line |= {"messages": messages}
    for label, column in LABEL_COLUMNS.items():
        if row.row.get(label) is not None:
            line[column] = row.row[label]
    line["categories"] = row.row.get("categories")
    if row.row.get("language") is not None:
        line["language"] = row.row["language"]
    scores = {name: round(score, 4) for name, score in row.scores.items()}
    return line | {"why": why, "scores": scores}
