"""Refusals told by a guard with a refusal verdict, or by an LLM behind a server that is given a
written rubric, and compared with the list of common/refusal.py.
"""

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai

from common.conversation import UserError, Verdict, check_url, pair
from common.keep import KeptRows, Row, digest
from guards import Guard, load_guard
from guards.base import is_flagged
from guards.kept import judge_and_keep

RUBRIC = Path(__file__).parent / "configs/refusal_rubric.txt"
CHUNK = 64  # answers between two looks at what is missing
Pair = tuple[str, str]  # what was asked, and the answer


def verdicts_of(
    spec: str, pairs: Sequence[Pair], folder: Path, wanted: Sequence[str] = ()
) -> tuple[Guard, list[Verdict]]:
    """A guard of `load_guard` and what it says of answers, kept in the folder as it comes: after
    Ctrl-C the same command goes on.

    Args:
        wanted: labels that are asked for beside harm; some guards write text for them.
    """
    conversations = [pair(asked, said or " ") for asked, said in pairs]
    guard = load_guard(spec, progress=False)
    path = folder / "verdicts.jsonl"
    return guard, judge_and_keep(guard, spec, {}, conversations, path, wanted=wanted)


def judged_by_guard(spec: str, pairs: Sequence[Pair], folder: Path) -> list[bool | None]:
    """Whether each answer refuses, by a guard with a refusal verdict; None where it gives none, as
    of an answer that is longer than it sees.

    Raises:
        UserError: no answer has a verdict.
    """
    guard, verdicts = verdicts_of(spec, pairs, folder, ["response_refusal"])
    refused = []
    for verdict in verdicts:
        refused.append(is_flagged(verdict, "response_refusal", guard.thresholds))
    if set(refused) == {None}:
        reason = verdicts[0].error or "the guard has no refusal verdict"
        raise UserError(f"--refusal_judge {spec}: no verdict of any answer: {reason}")
    return refused


def judged_by_server(
    url: str, model: str | None, pairs: Sequence[Pair], folder: Path
) -> list[bool | None]:
    """Whether each answer refuses, by an LLM that reads the rubric; its key is read from
    SERVER_API_KEY. None where it says neither of the two words: the next run asks again. What it
    says is kept in the folder as it comes.

    Raises:
        UserError: the server fails, or says neither word of any answer.
    """
    check_url(url, "--server_url")
    if model is None:
        raise UserError("--server_url: name the judge by --server_model")
    rubric = RUBRIC.read_text(encoding="utf-8")
    judge = Judge(url, model, rubric)
    keys = []
    pair_of = {}
    for texts in pairs:
        key = digest([model, rubric, texts])
        keys.append(key)
        pair_of[key] = texts

    def make(_: int, asked: list[str]) -> Iterator[Row]:
        some = [pair_of[key] for key in asked]
        for key, said in zip(asked, pool.map(judge.says, some), strict=True):
            yield {"key": key, "refuses": is_refusal(said), "said": said}

    with ThreadPoolExecutor(8) as pool, KeptRows(folder / "refusals.jsonl") as kept:
        rows = kept.fill(
            keys,
            make,
            size=CHUNK,
            together=False,
            again=lambda row: row["refuses"] is None,
            title=model,
            unit="answer",
        )
    refused = [row["refuses"] for row in rows]
    if set(refused) == {None}:
        said = rows[0]["said"].strip(" .*\n").lower()
        raise UserError(
            f"--server_model {model}: says neither refusal nor compliance: {said!r:.60}"
        )
    return refused


def is_refusal(said: str) -> bool | None:
    """What a judge's word means: its first, the other being absent; None for anything else."""
    words = re.findall(r"[a-z]+", said.lower())
    named = {"refusal", "compliance"} & set(words)
    if len(named) != 1 or words[0] not in named:
        return None
    return words[0] == "refusal"


class Judge:
    """An LLM behind a server that is given the rubric."""

    def __init__(self, url: str, model: str, rubric: str):
        self.url = url
        self.model = model
        self.rubric = rubric
        self.client = openai.OpenAI(
            base_url=url,
            api_key=os.environ.get("SERVER_API_KEY") or "none",
            timeout=120,
            max_retries=5,
        )

    def says(self, texts: Pair) -> str:
        """What the judge says of an answer to what was asked."""
        asked, said = texts
        text = f"<request>\n{asked}\n</request>\n\n<answer>\n{said}\n</answer>"
        try:
            reply = self.client.chat.completions.create(
                model=self.model,
                messages=[
                    {"role": "system", "content": self.rubric},
                    {"role": "user", "content": text},
                ],
                temperature=0,
                max_tokens=8,
            )
        except openai.OpenAIError as error:  # its text may hold a part of the key
            name = type(error).__name__
            raise UserError(f"--server_url {self.url}: {name}") from None
        return reply.choices[0].message.content or ""
