"""results.html: what an evaluation found, as one page that needs no network and no build.

Tables, precision-recall and reliability, a threshold that can be moved, and the rows that the guards
got wrong, side by side. Texts are hostile: they are data in the page, and shown as text.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common import report
from common.conversation import Messages, Verdict, last_turns
from common.run import write_text

TEMPLATE = Path(__file__).with_suffix(".html")
LONGEST = 4000  # characters of a text that the page shows
DATA = "DATA</script>"  # where the template holds the data


@dataclass(frozen=True)
class PageTable:
    """A table, whose cells are texts."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class PageRow:
    """A judged conversation.

    `truth`: whether it is unsafe; None where nobody says so.
    `scores`, `errors`: of each guard its probability of unsafe (None: it has no opinion) and why it
        failed, if it did.
    """

    id: str
    set: str
    prompt: str | None
    response: str | None
    truth: bool | None
    categories: Sequence[str] = ()
    language: str | None = None
    scores: list[float | None] = field(default_factory=list)
    errors: list[str | None] = field(default_factory=list)

    def add(self, verdict: Verdict | float | None, label: str) -> None:
        """What the next guard says of `label` (of `common.conversation.LABELS`): its verdict, of a
        baseline the probability, None of one that was not asked.

        A guard that has words alone scores 1 or 0.
        """
        if not isinstance(verdict, Verdict):
            self.add_score(verdict)
            return
        self.add_score(verdict.opinion(label), verdict.error)

    def add_score(self, score: float | None, error: str | None = None) -> None:
        """The probability of unsafe that the next guard gives."""
        self.scores.append(None if error or score is None else float(score))
        self.errors.append(error)


def page_row(row: Mapping, data_set: str, truth: bool | None) -> PageRow:
    """A row for the page: `id`, `messages`, and where they are known `categories` and `language`."""
    messages: Messages = row["messages"]
    prompt, response = last_turns(messages)
    return PageRow(
        id=str(row["id"]),
        set=data_set,
        prompt=shortened(prompt),
        response=shortened(response),
        truth=truth,
        categories=row.get("categories") or [],
        language=row.get("language"),
    )


def scores_table(
    heading: str,
    scores: Mapping[str, Mapping[str, Any]],
    columns: Mapping[str, str] = report.COLUMNS,
) -> PageTable:
    """`common.metrics.binary` of several guards or categories, one row a name."""
    return PageTable(heading, ["", *columns.values()], report.metric_rows(scores, columns))


def write_evaluation_page(
    path: Path | str,
    title: str,
    rows: Sequence[Mapping],
    label: str,
    said: Mapping[str, Sequence[Verdict | float]],
    results: Mapping[str, Any],
) -> None:
    """The page of guards on labelled rows, each of them at its own threshold.

    Args:
        rows: of `load_conversations`; all of them know `label`.
        said: what each guard says of the rows, in their order: verdicts, or probabilities of a
            baseline.
        results: what results.json holds: `dataset`, and of `common.metrics.binary` by name
            `flagged` (the guards), `categories` (may be empty) and, if there are some, `languages`.
    """
    shown = []
    for i, row in enumerate(rows):
        one = page_row(row, results["dataset"], row[label])
        for verdicts in said.values():
            one.add(verdicts[i], label)
        shown.append(one)
    flagged = results["flagged"]
    tables = [scores_table("Flagged", flagged)]
    if results["categories"]:
        columns = report.CATEGORY_COLUMNS
        tables.append(scores_table("Categories", results["categories"], columns))
    if results.get("languages"):
        tables.append(scores_table("Languages", results["languages"]))
    write_results_page(
        path,
        title=title,
        note=f"{len(shown)} rows. Each guard begins at its own threshold.",
        tables=tables,
        guards={name: flagged[name]["threshold"] for name in said},
        rows=shown,
    )


def shortened(text: str | None) -> str | None:
    """A text as the page shows it: its beginning, where it is very long."""
    if text is None or len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]} … ({len(text)} characters in all)"


def write_results_page(
    path: Path | str,
    *,
    title: str,
    note: str,
    tables: Sequence[PageTable],
    guards: Mapping[str, float],
    rows: Sequence[PageRow],
) -> None:
    """Write the page, whole or not at all, and say where it lies: it is what a run writes last.

    Args:
        note: a sentence below the title.
        guards: in the order of the rows' scores, and above which each calls a row unsafe.
    """
    data = {
        "title": title,
        "note": note,
        "tables": [asdict(table) for table in tables],
        "guards": [{"name": name, "threshold": above} for name, above in guards.items()],
        "rows": [asdict(row) for row in rows],
    }
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    text = text.replace("<", "\\u003c")  # so no text can end the script element
    before, after = TEMPLATE.read_text(encoding="utf-8").split(DATA)
    write_text(Path(path), f"{before}{text}</script>{after}")
    report.say_where(path)
