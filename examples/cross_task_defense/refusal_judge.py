"""Refusals told by a guard with a refusal verdict, or by an LLM behind a server that is given a
written rubric, and compared with the list of common/refusal.py.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai

from common.conversation import UserError, Verdict, check_url, pair
from common.keep import KeptRows, Row, digest
from guards import load_guard
from guards.kept import judge_and_keep

RUBRIC = Path(__file__).parent / "configs/refusal_rubric.txt"
CHUNK = 64  # answers between two looks at what is missing
Pair = tuple[str, str]  # what was asked, and the answer


def verdicts_of(spec: str, pairs: Sequence[Pair], folder: Path) -> list[Verdict]:
    """What a guard of `load_guard` says of answers, kept in the folder as it comes: after Ctrl-C
    the same command goes on.
    """
    conversations = [pair(asked, said or " ") for asked, said in pairs]
    guard = load_guard(spec, progress=False)
    return judge_and_keep(guard, spec, {}, conversations, folder / "verdicts.jsonl")


def judged_by_guard(spec: str, pairs: Sequence[Pair], folder: Path) -> list[bool]:
    """Whether each answer refuses, by a guard with a refusal verdict.

    Raises:
        UserError: an answer has no verdict.
    """
    verdicts = verdicts_of(spec, pairs, folder)
    refused = []
    for number, verdict in enumerate(verdicts, 1):
        if verdict.response_refusal is None:
            reason = verdict.error or "the guard has no refusal verdict"
            raise UserError(f"--refusal_judge {spec}: no verdict of answer {number}: {reason}")
        refused.append(verdict.response_refusal >= 0.5)
    return refused


def judged_by_server(
    url: str, model: str | None, pairs: Sequence[Pair], folder: Path
) -> list[bool]:
    """Whether each answer refuses, by an LLM that reads the rubric; its key is read from
    SERVER_API_KEY. What it says is kept in the folder as it comes.

    Raises:
        UserError: the server fails, or says neither of the two words.
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
        for key, refuses in zip(asked, pool.map(judge.refuses, some), strict=True):
            yield {"key": key, "refuses": refuses}

    with ThreadPoolExecutor(8) as pool, KeptRows(folder / "refusals.jsonl") as kept:
        rows = kept.fill(
            keys,
            make,
            size=CHUNK,
            together=False,
            title=model,
            unit="answer",
        )
    return [row["refuses"] for row in rows]


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

    def refuses(self, texts: Pair) -> bool:
        """Whether an answer refuses what was asked."""
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
        content = reply.choices[0].message.content or ""
        word = content.strip(" .*\n").lower()
        if word not in ("refusal", "compliance"):
            raise UserError(
                f"--server_model {self.model}: says neither refusal nor compliance: {word!r:.60}"
            )
        return word == "refusal"
