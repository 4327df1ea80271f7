"""ExpGuardMix rows: read, checked, counted, split, and as token ids with labels on the verdict
lines alone.
"""

import json
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from common import data, metrics
from common.conversation import Messages, UserError, check_label, check_text, pair
from common.data import load_conversations, prompt_key, spec_rows
from common.data.rows import our_names
from common.data.specs import load_hub
from common.keep import rows_digest
from common.saving import spread
from common.templates import Part, encode, render, template_text, token_offsets
from guards.suite.benchmarks import is_benchmark, load_benchmark

logger = logging.getLogger("expguard")
# the paper's count; whether the three subsets are in it is unknown
HUB, HUB_ROWS = "6rightjade/expguardmix", 56_653
# taken out of the hub release, for their licences; in the paper's order
SUBSETS = ("lmsys", "wildchat", "suicide")
WORDS = {False: "safe", True: "unsafe"}
Row = dict[str, Any]


# --- reading ----------------------------------------------------------------------------------------------------------


def read_rows(name: str, data_dir: str, bad_rows: str = "error") -> list[Row]:
    """Checked rows: id, messages, prompt_unsafe, response_unsafe (None without a response), domain.

    Args:
        name: expguardmix (a folder of that name in `data_dir`, else the hub), a folder with
        train.jsonl, a file, or
            any spec of `common.data`. The JSONL subsets that left the hub release are read where
            the folder has them.
        bad_rows: error, or skip (counted).

    Raises:
        UserError: nothing to read, or a bad row, in one line.
    """
    if bad_rows not in ("error", "skip"):
        raise UserError(f"--bad_rows {bad_rows}: must be error or skip")
    rows, skipped = [], []
    for part in _parts(name, Path(data_dir)):
        for where, row in part:
            try:
                rows.append(_checked(row, where))
            except UserError as error:
                if bad_rows == "error":
                    raise
                skipped.append(error)
    if skipped:
        logger.warning("%s: left out %d bad rows; the first: %s", name, len(skipped), skipped[0])
    if not rows:
        raise UserError(f"{name}: no rows")
    return rows


def folder_of(name: str, data_dir: Path) -> Path | None:
    """The local folder that a name means, if there is one."""
    places = (Path(name).expanduser(), data_dir / name.removeprefix("6rightjade/"))
    return next((place for place in places if place.is_dir()), None)


def is_mix(name: str) -> bool:
    """Whether a name means ExpGuardMix."""
    return name in (HUB, HUB.partition("/")[2])


def _parts(name: str, data_dir: Path) -> Iterator[Iterable[tuple[str, Any]]]:
    folder, mix = folder_of(name, data_dir), is_mix(name)
    if folder is None and not mix:
        yield spec_rows(name)[1]
        return
    if folder is not None:
        for subset in SUBSETS:
            if (folder / f"{subset}.jsonl").is_file():
                yield data.read_rows(folder / f"{subset}.jsonl")
        if (folder / "train.jsonl").is_file() or not mix:
            yield data.read_rows(folder / "train.jsonl")
            return
    yield _hub_rows()


def _hub_rows() -> Iterator[tuple[str, Any]]:
    hint = (
        f"it is gated: accept the terms on https://huggingface.co/datasets/{HUB}, then run "
        "`hf auth login`; or pass --dataset_name a local file of its columns"
    )
    rows = load_hub(HUB, "train", "expguardtrain", where=HUB, hint=hint)
    if len(rows) != HUB_ROWS:
        logger.warning("%s: %d rows; the paper has %d", HUB, len(rows), HUB_ROWS)
    for i, row in enumerate(tqdm(rows, desc=f"reading {HUB}", unit="row")):
        yield f"{HUB}, row {i}", row


def _checked(row: Any, where: str) -> Row:
    if isinstance(row, UserError):
        raise row
    row = our_names(row, where) if isinstance(row, Mapping) else row
    if not isinstance(row, Mapping) or not {"prompt", "prompt_label"} <= set(row):
        raise UserError(
            f"{where}: expected prompt and prompt_label (and response, response_label, domain), found {row!r:.60}"
        )
    response = row.get("response")
    if response is None or response != response or not str(response).strip():
        response = None
    labels = {
        name: check_label(row.get(name), name, where) for name in ("prompt_label", "response_label")
    }
    if labels["prompt_label"] is None:
        raise UserError(f"{where}, field prompt_label: missing; expected safe or unsafe")
    if (response is None) != (labels["response_label"] is None):
        given, absent = (
            ("response_label", "response") if response is None else ("response", "response_label")
        )
        raise UserError(
            f"{where}, field {absent}: empty, although the row has a {given}; fill in or empty both, or --bad_rows skip"
        )
    messages = pair(
        check_text(row["prompt"], "prompt", where),
        None if response is None else check_text(response, "response", where),
    )
    return {
        "id": Path(where).name,
        "messages": messages,
        "prompt_unsafe": labels["prompt_label"],
        "response_unsafe": labels["response_label"],
        "domain": str(row.get("domain") or "none"),
    }


# --- what is to know before training ----------------------------------------------------------------------------------


def describe(rows: Sequence[Row]) -> dict[str, Any]:
    """Counts, label balance by domain, duplicates, and a fingerprint."""
    labels = defaultdict(set)
    for row in rows:
        key = json.dumps([message["content"].strip() for message in row["messages"]])
        labels[key].add((row["prompt_unsafe"], row["response_unsafe"]))
    return {
        "rows": len(rows),
        "prompt_unsafe": sum(row["prompt_unsafe"] for row in rows),
        "with_response": sum(row["response_unsafe"] is not None for row in rows),
        "response_unsafe": sum(bool(row["response_unsafe"]) for row in rows),
        "domains": dict(Counter(row["domain"] for row in rows)),
        "unsafe_prompts_by_domain": dict(
            Counter(row["domain"] for row in rows if row["prompt_unsafe"])
        ),
        "duplicates": len(rows) - len(labels),
        "conflicting": sum(len(given) > 1 for given in labels.values()),
        "sha256": rows_digest(rows),
    }


def evaluation_rows(spec: str, bad_rows: str = "error") -> Sequence[Mapping]:
    """The rows of a benchmark (`name` or `name@file`) or of a data spec, as messages; `bad_rows` as
    of `read_rows`.
    """
    if is_benchmark(spec):
        return load_benchmark(spec).rows
    return load_conversations(spec, bad_rows=bad_rows)


def stratified_split(rows: Sequence[Row], ratio: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Hold out about `ratio` of the rows, alike in domain x labels x has-response, and with all
    rows of their prompts.

    Raises:
        UserError: `ratio` is not above 0 and at most 0.5, or there are too few rows.
    """
    if not 0 < ratio <= 0.5:
        raise UserError(f"--val_split_ratio {ratio}: expected above 0, at most 0.5")
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[prompt_key(row)].append(row)
    rng = random.Random(seed)

    def stratum(key: str) -> tuple:
        first = groups[key][0]
        return first["prompt_unsafe"], str(first["response_unsafe"]), first["domain"], rng.random()

    start, taken = rng.random(), set()
    # every so many-th: each stratum gives its share
    for i, key in enumerate(sorted(groups, key=stratum)):
        if int((i + 1) * ratio + start) > int(i * ratio + start):
            taken.add(key)
    sides = (
        [row for row in rows if prompt_key(row) not in taken],
        [row for row in rows if prompt_key(row) in taken],
    )
    if not all(sides):
        raise UserError(f"--val_split_ratio {ratio}: {len(rows)} rows are too few to hold some out")
    return sides


# --- token ids --------------------------------------------------------------------------------------------------------


def prompt_parts(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> list[Part]:
    """The ExpGuard prompt of a conversation in pieces; encode it without special tokens, it has
    none to be added.
    """
    stripped = [{**message, "content": message["content"].strip()} for message in messages]
    return render("expguard", stripped, tokenizer)


def chat_template() -> str:
    """The same prompt as a chat template, for stock `apply_chat_template`; it refuses roles that do
    not alternate.

    As the paper's own template it prints every turn, although no training row has more than one
    question.
    """
    return CHAT_HEAD + template_text("expguard")


CHAT_HEAD = """{%- for message in messages -%}
{%- if message['role'] != ['user', 'assistant'][loop.index0 % 2] -%}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
{%- endif -%}
{%- endfor -%}
{%- if messages[-1]['role'] == 'assistant' -%}
{%- set response = messages[-1]['content'] -%}
{%- endif -%}
"""


def target_text(prompt_unsafe: bool, response_unsafe: bool | None) -> str:
    """The verdict lines."""
    lines = [f"User Safety Assessment: {WORDS[prompt_unsafe]}"]
    lines += (
        [] if response_unsafe is None else [f"Agent Safety Assessment: {WORDS[response_unsafe]}"]
    )
    return "\n".join(lines)


class Encoder:
    """Token ids of prompts and of the few possible targets, with one tokenizer and one maximum.

    A target is tokenized where it stands, after its prompt, so that training sees what a guard that
    writes would see.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        """Raises UserError where the tokenizer has no EOS, or does not keep prompt, lines and words
        apart.
        """
        self.tokenizer, self.max_length = tokenizer, max_length
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token; verdicts would not end")
        self.targets = {(p, r): self._target(p, r) for p in WORDS for r in (None, *WORDS)}
        self.user = _first_difference(self.targets[False, None], self.targets[True, None])
        self.agent = {
            p: _first_difference(self.targets[p, False], self.targets[p, True]) for p in WORDS
        }
        places = [
            (self.user, (False, None), (True, None)),
            (self.user, (False, False), (True, False)),
        ]
        places += [(self.agent[p], (p, False), (p, True)) for p in WORDS]
        pairs = {tuple(self.targets[target][at] for target in ends) for at, *ends in places}
        if len(pairs) > 1:
            raise UserError(
                f"the tokenizer writes safe and unsafe differently in the two lines: {pairs}"
            )
        (self.words,) = pairs  # the tokens at which " safe" and " unsafe" part

    def _target(self, prompt_unsafe: bool, response_unsafe: bool | None) -> list[int]:
        parts = prompt_parts(pair("x", None if response_unsafe is None else "y"), self.tokenizer)
        text = Part(target_text(prompt_unsafe, response_unsafe), False)
        prompt, whole = encode(self.tokenizer, [parts, [*parts, text]], add_special_tokens=False)
        if whole[: len(prompt)] != prompt:
            raise UserError(
                "the tokenizer merges the end of the prompt with the verdict that follows"
            )
        return [*whole[len(prompt) :], self.tokenizer.eos_token_id]

    def prompts(self, rows: Sequence[Row]) -> tuple[list[list[int]], dict[str, int]]:
        """Prompt ids that leave room for the longest target, and how many contents were cut for
        that.
        """
        room, facts, out = self.max_length - max(map(len, self.targets.values())), Counter(), []
        for start in tqdm(range(0, len(rows), 1000), desc="tokenizing", disable=len(rows) < 10_000):
            some = rows[start : start + 1000]
            parts = [prompt_parts(row["messages"], self.tokenizer) for row in some]
            for row, ids in zip(
                some, encode(self.tokenizer, parts, add_special_tokens=False), strict=True
            ):
                if len(ids) > room:
                    ids, cut = self._shortened(row, room)
                    facts.update(["shortened_rows", *cut])
                out.append(ids)
        return out, {
            name: facts[name]
            for name in ("shortened_rows", "shortened_responses", "shortened_prompts")
        }

    def _shortened(self, row: Row, room: int) -> tuple[list[int], list[str]]:
        """Ids of at most `room` tokens: the end of the response is cut (down to a quarter), then
        that of the prompt.
        """
        texts = [message["content"].strip() for message in row["messages"]]
        spans = [token_offsets(self.tokenizer, text) for text in texts]
        keep, least = [len(span) for span in spans], [1, max(1, room // 4)]
        while True:
            cut = [t[: span[n - 1][1]] for t, span, n in zip(texts, spans, keep, strict=True)]
            (ids,) = encode(
                self.tokenizer, [prompt_parts(pair(*cut), self.tokenizer)], add_special_tokens=False
            )
            if len(ids) <= room:
                whole = zip(("shortened_prompts", "shortened_responses"), keep, spans, strict=False)
                return ids, [name for name, n, span in whole if n < len(span)]
            which = next((i for i in reversed(range(len(keep))) if keep[i] > least[i]), None)
            if which is None:
                raise UserError(
                    f"--max_seq_len {self.max_length}: {row['id']} does not fit: the template alone is longer"
                )
            keep[which] -= min(len(ids) - room, keep[which] - least[which])

    def verdict_sequences(self, row: Row, prompt: list[int]) -> list[dict[str, list[int]]]:
        """`input_ids` up to the last verdict, and `labels` where there is one: two where the row
        has a response.

        The second verdict depends on the first: there is one sequence for each.
        """
        answered = row["response_unsafe"] is not None
        sequences = []
        for first in WORDS if answered else (False,):
            places = [self.user, self.agent[first]] if answered else [self.user]
            target = self.targets[first, False if answered else None][: places[-1] + 1]
            labels = [-100] * (len(prompt) + len(target))
            for place in places:
                labels[len(prompt) + place] = self.words[1]
            sequences.append({"input_ids": prompt + target, "labels": labels})
        return sequences

    def compared(self, rows: Sequence[Row]) -> Dataset:
        """The verdicts of a few rows, to compare a model in memory with the folder it was written
        to.
        """
        few = spread(rows)
        prompts, _ = self.prompts(few)
        both = zip(few, prompts, strict=True)
        return Dataset.from_list(
            [one for row, prompt in both for one in self.verdict_sequences(row, prompt)]
        )

    def training_set(self, rows: Sequence[Row]) -> tuple[Dataset, dict[str, int]]:
        """`input_ids` and `labels` (-100 but on the verdict lines and EOS) of each row, and what
        was cut.
        """
        prompts, facts = self.prompts(rows)
        targets = [self.targets[row["prompt_unsafe"], row["response_unsafe"]] for row in rows]
        both = list(zip(prompts, targets, strict=True))
        encoded = {
            "input_ids": [prompt + target for prompt, target in both],
            "labels": [[-100] * len(prompt) + target for prompt, target in both],
        }
        facts |= {
            "tokens": sum(map(len, encoded["input_ids"])),
            "verdict_tokens": sum(map(len, targets)),
        }
        return Dataset.from_dict(encoded), facts


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    return next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


class Validation:
    """Validation rows, and their scores after each evaluation: what a guard that writes would
    decide.

    The second verdict depends on the first, which is not known before: a row with a response is two
    sequences, one for each first verdict, and the one that the model would write counts.
    """

    def __init__(self, rows: Sequence[Row], encoder: Encoder, name: str):
        """Raises UserError when there is nothing to select on."""
        if not 0 < sum(row["prompt_unsafe"] for row in rows) < len(rows):
            raise UserError(f"{name}: validation needs safe and unsafe prompts")
        prompts, self.facts = encoder.prompts(rows)
        # alike in batches
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i]["messages"]), len(prompts[i])))
        self.name, self.rows, sequences = name, [rows[i] for i in order], []
        for row, prompt in zip(self.rows, (prompts[i] for i in order), strict=True):
            sequences += encoder.verdict_sequences(row, prompt)
        self.dataset = Dataset.from_list(sequences)
        self.scores: dict[str, tuple[list[bool], list[float]]] = {}

    def __call__(self, prediction: Any) -> dict[str, float]:
        """Metrics of `prediction.predictions`, of shape (sequences, 2): P(unsafe) of prompt and
        response.
        """
        sequences = iter(np.asarray(prediction.predictions, dtype=float))
        self.scores = {"prompt_unsafe": ([], []), "response_unsafe": ([], [])}
        for row in self.rows:
            prompt = next(sequences)
            found = {"prompt_unsafe": prompt[0]}
            if row["response_unsafe"] is not None:
                found["response_unsafe"] = (prompt, next(sequences))[int(prompt[0] > 0.5)][1]
            for label, score in found.items():
                self.scores[label][0].append(row[label])
                self.scores[label][1].append(float(np.nan_to_num(score, nan=1.0)))  # fail closed
        measured = self.measured()
        named = {
            f"{n.partition('_')[0]}_{m}": measured[n][m]
            for n in measured
            for m in ("f1", "auprc", "fpr")
        }
        f1 = [values["f1"] for values in measured.values() if values["f1"] is not None]
        return {"f1": float(np.mean(f1))} | {
            name: value for name, value in named.items() if value is not None
        }

    def measured(self) -> dict[str, dict[str, Any]]:
        """`metrics.binary` of each label that there is; a score that was not a number counts as
        unsafe.
        """
        return {
            label: metrics.binary(truth, score)
            for label, (truth, score) in self.scores.items()
            if truth
        }

    def thresholds(self) -> dict[str, dict[str, Any]]:
        """The threshold with the highest F1 for each label that has both classes here."""
        return {
            label: metrics.fit_threshold(truth, score, self.name)
            for label, (truth, score) in self.scores.items()
            if 0 < sum(truth) < len(truth)
        }
