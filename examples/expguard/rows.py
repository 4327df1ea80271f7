"""ExpGuardMix rows: read, checked, counted, split, and as token ids with labels on the verdict
lines alone.
"""

import json
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from arguments import DataArguments, ExpGuardConfig
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from common import data, metrics
from common.conversation import Messages, UserError, pair
from common.data import spread
from common.data.rows import our_names
from common.data.specs import load_hub
from common.keep import rows_digest
from common.labels import asked_categories
from common.saving import COMPARED_ROWS
from common.templates import Part, control_ids, encode, render, template_text, token_offsets
from guards.suite.benchmarks import is_benchmark, load_benchmark

logger = logging.getLogger("expguard")
HUB = "6rightjade/expguardmix"
GATED = (
    f"it is gated: accept the terms on https://huggingface.co/datasets/{HUB}, then run "
    "`hf auth login`; or pass --dataset_name a local file of its columns"
)
# taken out of the hub release, for their licences; in the paper's order
SUBSETS = ("lmsys", "wildchat", "suicide")
COLUMNS = ("prompt", "response", "prompt_label", "response_label")
WORDS = {False: "safe", True: "unsafe"}
Row = dict[str, Any]


# --- Reading ------------------------------------------------------------------------------------


def read_rows(name: str, data_dir: str, bad_rows: str = "error") -> list[Row]:
    """Checked rows: id, messages, prompt_unsafe, response_unsafe (None without a response), domain.

    Args:
        name: expguardmix (a folder of that name in `data_dir`, else the hub), a folder with
            train.jsonl, a file, or any spec of `common.data`. The JSONL subsets that left the hub
            release are read where the folder has them.
        bad_rows: error, or skip (counted).

    Raises:
        UserError: nothing to read, or a bad row, in one line.
    """
    if bad_rows not in ("error", "skip"):
        raise UserError(f"--bad_rows {bad_rows}: must be error or skip")
    rows = []
    skipped = []
    for where, row in rows_of(name, Path(data_dir)):
        try:
            rows.append(checked_row(row, where))
        except UserError as error:
            if bad_rows == "error":
                raise
            skipped.append(error)
    if skipped:
        logger.warning("%s: left out %d bad rows; the first: %s", name, len(skipped), skipped[0])
    if not rows:
        raise UserError(f"{name}: no rows")
    return rows


def rows_of(name: str, data_dir: Path) -> Iterator[tuple[str, Any]]:
    """Rows as they stand, each with a text that says where it stands."""
    folder = folder_of(name, data_dir)
    if folder is None and is_mix(name):
        yield from hub_rows()
        return
    if folder is None:
        _, rows = data.spec_rows(name)
        yield from rows
        return
    for subset in SUBSETS:
        path = folder / f"{subset}.jsonl"
        if path.is_file():
            yield from data.read_rows(path)
    train = folder / "train.jsonl"
    if is_mix(name) and not train.is_file():
        yield from hub_rows()
    else:
        yield from data.read_rows(train)


def folder_of(name: str, data_dir: Path) -> Path | None:
    """The local folder that a name means, if there is one."""
    given = Path(name).expanduser()
    of_mix = data_dir / name.removeprefix("6rightjade/")
    for place in (given, of_mix):
        if place.is_dir():
            return place
    return None


def is_mix(name: str) -> bool:
    """Whether a name means ExpGuardMix."""
    return name in (HUB, "expguardmix")


def hub_rows() -> Iterator[tuple[str, Any]]:
    rows = load_hub(HUB, "train", "expguardtrain", where=HUB, hint=GATED)
    bar = tqdm(rows, desc=f"reading {HUB}", unit="row")
    for number, row in enumerate(bar):
        yield f"{HUB}, row {number}", row


def checked_row(row: Any, where: str) -> Row:
    """A row with a label for its prompt, and one for its response if it has one."""
    domain = None
    if isinstance(row, Mapping):
        row = our_names(row, where)
        if "prompt" not in row or "prompt_label" not in row:
            raise UserError(
                f"{where}: expected prompt and prompt_label (and response, response_label, "
                f"domain), found {row!r:.60}"
            )
        domain = row.get("domain")
        row = {column: row.get(column) for column in COLUMNS}
    found = data.conversation_row(row, where)
    answered = len(found["messages"]) == 2
    if found["prompt_unsafe"] is None:
        raise UserError(f"{where}, field prompt_label: missing; expected safe or unsafe")
    if answered and found["response_unsafe"] is None:
        raise UserError(
            f"{where}, field response_label: empty, although the row has a response; "
            "fill in or empty both, or --bad_rows skip"
        )
    return {
        "id": found["id"],
        "messages": found["messages"],
        "prompt_unsafe": found["prompt_unsafe"],
        "response_unsafe": found["response_unsafe"],
        "domain": str(domain or "none"),
    }


# --- What is to be known before training --------------------------------------------------------


def load_rows(
    data_args: DataArguments, args: ExpGuardConfig
) -> tuple[list[Row], list[Row] | None, str]:
    """Training rows, validation rows (None without --do_eval) and the name of these."""
    rows = []
    for name in data_args.dataset_name:
        rows += read_rows(name, data_args.data_dir, data_args.bad_rows)
    if not args.do_eval:
        return rows, None, ""
    given = data_args.val_data or validation_file(data_args)
    name = given
    if given is None:
        trained_on = " ".join(data_args.dataset_name)
        name = f"{data_args.val_split_ratio} of {trained_on}"
    if metrics.is_test(name):
        raise UserError(
            f"--do_eval: {name} is a test set; neither epoch nor threshold is chosen on one"
        )
    if given is None:
        train, held_out = stratified_split(rows, data_args.val_split_ratio, args.seed)
        return train, held_out, name
    validation = read_rows(given, data_args.data_dir, data_args.bad_rows)
    return rows, validation, name


def validation_file(data_args: DataArguments) -> str | None:
    """The val.jsonl of the first folder that has one."""
    data_dir = Path(data_args.data_dir)
    for name in data_args.dataset_name:
        folder = folder_of(name, data_dir)
        if folder is None:
            continue
        path = folder / "val.jsonl"
        if path.is_file():
            return str(path)
    return None


def facts_of(
    rows: list[Row], held_out: list[Row] | None, data_args: DataArguments
) -> dict[str, Any]:
    """What is to be known of the rows, and how many of the evaluation sets' rows they hold."""
    facts = {"train": describe(rows)}
    others = {}
    for spec in data_args.overlap_with:
        others[spec] = evaluation_rows(spec, data_args.bad_rows)
    if held_out is not None:
        facts["validation"] = describe(held_out)
        others["validation"] = held_out
    facts["overlap"] = {}
    for name, other in others.items():
        facts["overlap"][name] = data.overlap(rows, other)
    return facts


def describe(rows: Sequence[Row]) -> dict[str, Any]:
    """Counts, label balance by domain, duplicates, and a fingerprint."""
    labels = defaultdict(set)
    for row in rows:
        texts = [message["content"].strip() for message in row["messages"]]
        key = json.dumps(texts)
        label = (row["prompt_unsafe"], row["response_unsafe"])
        labels[key].add(label)
    conflicting = [given for given in labels.values() if len(given) > 1]
    domains = Counter(row["domain"] for row in rows)
    unsafe = [row for row in rows if row["prompt_unsafe"]]
    unsafe_domains = Counter(row["domain"] for row in unsafe)
    answered = [row for row in rows if row["response_unsafe"] is not None]
    return {
        "rows": len(rows),
        "prompt_unsafe": len(unsafe),
        "with_response": len(answered),
        "response_unsafe": sum(row["response_unsafe"] for row in answered),
        "domains": dict(domains),
        "unsafe_prompts_by_domain": dict(unsafe_domains),
        "duplicates": len(rows) - len(labels),
        "conflicting": len(conflicting),
        "sha256": rows_digest(rows),
    }


def evaluation_rows(spec: str, bad_rows: str = "error") -> Sequence[Mapping]:
    """The rows of a benchmark (`name` or `name@file`) or of a data spec, as messages.

    Args:
        bad_rows: as of `read_rows`.
    """
    if is_benchmark(spec):
        return load_benchmark(spec).rows
    return data.load_conversations(spec, bad_rows=bad_rows)


def stratified_split(rows: Sequence[Row], ratio: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Hold out about `ratio` of the rows, alike in domain x labels x has-response, and with all
    rows of their prompts.

    Raises:
        UserError: `ratio` is not above 0 and at most 0.5, or there are too few rows.
    """
    if not 0 < ratio <= 0.5:
        raise UserError(f"--val_split_ratio {ratio}: expected above 0, at most 0.5")
    rng = random.Random(seed)
    start = rng.random()
    strata = {}
    for row in rows:
        key = data.prompt_key(row)
        if key not in strata:
            strata[key] = (
                row["prompt_unsafe"],
                str(row["response_unsafe"]),
                row["domain"],
                rng.random(),
            )
    held_out = set()
    # Every so many-th prompt in the order of strata: each gives its share.
    ordered = sorted(strata, key=strata.get)
    for i, key in enumerate(ordered):
        before = int(i * ratio + start)
        after = int((i + 1) * ratio + start)
        if after > before:
            held_out.add(key)
    kept = []
    validation = []
    for row in rows:
        if data.prompt_key(row) in held_out:
            validation.append(row)
        else:
            kept.append(row)
    if not kept or not validation:
        raise UserError(f"--val_split_ratio {ratio}: {len(rows)} rows are too few to hold some out")
    return kept, validation


# --- Prompt and target --------------------------------------------------------------------------

CHAT_HEAD = """{%- for message in messages -%}
{%- if message['role'] != ['user', 'assistant'][loop.index0 % 2] -%}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
{%- endif -%}
{%- endfor -%}
{%- if messages[-1]['role'] == 'assistant' -%}
{%- set response = messages[-1]['content'] -%}
{%- endif -%}
"""


def policy_of(categories: Sequence[str] | None, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The lines of the prompt that --categories makes, numbered as the paper's; None without it.

    Raises:
        UserError: a name cannot be a category, the rows shall name them, or a line spells a token
            that steers the model.
    """
    if categories is None:
        return None
    described = asked_categories(categories)
    if described is None:
        raise UserError(
            "--categories from-data: no row names any here; write names, or a YAML file"
        )
    lines = []
    for number, (name, description) in enumerate(described.items(), 1):
        line = f"S{number}: {name}"
        if description:
            line += f": {description}"
        lines.append(" ".join(line.split()))
    policy = "\n".join(lines)
    ids = tokenizer(policy, add_special_tokens=False)["input_ids"]
    if control_ids(tokenizer).intersection(ids):
        raise UserError("--categories: a name or description spells a control token of the model")
    return policy


def chat_template(policy: str | None = None) -> str:
    """The prompt as a chat template, for stock `apply_chat_template`; it refuses roles that do not
    alternate.

    As the paper's own template it prints every turn, although no training row has more than one
    question.

    Args:
        policy: of `policy_of`; None is the paper's.
    """
    rules = "" if policy is None else f"{{%- set policy = {policy!r} -%}}\n"
    return CHAT_HEAD + rules + template_text("expguard")


def prompt_parts(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, policy: str | None = None
) -> list[Part]:
    """The ExpGuard prompt of a conversation in pieces, to be encoded without special tokens."""
    stripped = []
    for message in messages:
        content = message["content"].strip()
        stripped.append(message | {"content": content})
    return render("expguard", stripped, tokenizer, policy)


def target_text(prompt_unsafe: bool, response_unsafe: bool | None) -> str:
    """The verdict lines."""
    first = f"User Safety Assessment: {WORDS[prompt_unsafe]}"
    if response_unsafe is None:
        return first
    return f"{first}\nAgent Safety Assessment: {WORDS[response_unsafe]}"


class Encoder:
    """Token ids of prompts and of the few possible targets, with one tokenizer and one maximum.

    A target is tokenized where it stands, after its prompt, so that training sees what a guard that
    writes would see.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, policy: str | None = None
    ):
        """Raises UserError where the tokenizer has no EOS, or does not keep prompt, lines and words
        apart.
        """
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token; verdicts would not end")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.policy = policy
        self.targets: dict[tuple[bool, bool | None], list[int]] = {}
        for prompt_unsafe in WORDS:
            for response_unsafe in (None, *WORDS):
                target = self._target(prompt_unsafe, response_unsafe)
                self.targets[prompt_unsafe, response_unsafe] = target
        lengths = [len(target) for target in self.targets.values()]
        self.room = max_length - max(lengths)
        self._find_words()

    def _target(self, prompt_unsafe: bool, response_unsafe: bool | None) -> list[int]:
        messages = pair("x", None if response_unsafe is None else "y")
        parts = prompt_parts(messages, self.tokenizer, self.policy)
        written = target_text(prompt_unsafe, response_unsafe)
        with_target = [*parts, Part(written, False)]
        prompt, whole = encode(self.tokenizer, [parts, with_target], add_special_tokens=False)
        if whole[: len(prompt)] != prompt:
            raise UserError(
                "the tokenizer merges the end of the prompt with the verdict that follows"
            )
        return [*whole[len(prompt) :], self.tokenizer.eos_token_id]

    def _find_words(self) -> None:
        """Find the places of the verdicts in a target: `user`, and `agent` by the first verdict.

        `words` are the tokens at which " safe" and " unsafe" part, the same at all places.
        """
        targets = self.targets
        self.user = first_difference(targets[False, None], targets[True, None])
        self.agent = {}
        pairs = set()
        for answer in (None, False):
            safe = targets[False, answer]
            unsafe = targets[True, answer]
            pairs.add((safe[self.user], unsafe[self.user]))
        for first in WORDS:
            safe = targets[first, False]
            unsafe = targets[first, True]
            place = first_difference(safe, unsafe)
            self.agent[first] = place
            pairs.add((safe[place], unsafe[place]))
        if len(pairs) > 1:
            raise UserError(
                f"the tokenizer writes safe and unsafe differently in the two lines: {pairs}"
            )
        (self.words,) = pairs

    def prompts(self, rows: Sequence[Row]) -> tuple[list[list[int]], dict[str, int]]:
        """Prompt ids that leave room for the longest target, and how many contents were cut for
        that.
        """
        cuts = Counter(shortened_rows=0, shortened_responses=0, shortened_prompts=0)
        prompts = []
        starts = range(0, len(rows), 1000)
        few = len(rows) < 10_000
        for start in tqdm(starts, desc="tokenizing", disable=few):
            some = rows[start : start + 1000]
            encoded = self._encode([row["messages"] for row in some])
            for row, ids in zip(some, encoded, strict=True):
                if len(ids) > self.room:
                    ids, cut = self._shortened(row)
                    cuts.update(["shortened_rows", *cut])
                prompts.append(ids)
        return prompts, dict(cuts)

    def _encode(self, conversations: Sequence[Messages]) -> list[list[int]]:
        parts = [prompt_parts(one, self.tokenizer, self.policy) for one in conversations]
        return encode(self.tokenizer, parts, add_special_tokens=False)

    def _shortened(self, row: Row) -> tuple[list[int], list[str]]:
        """Ids that fit, and what was cut: the end of the response, down to a quarter of the room,
        then that of the prompt.
        """
        texts = [message["content"].strip() for message in row["messages"]]
        spans = [token_offsets(self.tokenizer, text) for text in texts]
        keep = [len(span) for span in spans]
        least = [1, max(1, self.room // 4)]
        while True:
            contents = []
            for text, span, count in zip(texts, spans, keep, strict=True):
                _, end = span[count - 1]
                contents.append(text[:end])
            (ids,) = self._encode([pair(*contents)])
            excess = len(ids) - self.room
            if excess <= 0:
                break
            shrinkable = [i for i in range(len(keep)) if keep[i] > least[i]]
            if not shrinkable:
                raise UserError(
                    f"--max_seq_len {self.max_length}: {row['id']} does not fit: "
                    "the template alone is longer"
                )
            last = shrinkable[-1]
            keep[last] -= min(excess, keep[last] - least[last])
        cut = []
        names = ("shortened_prompts", "shortened_responses")
        for name, span, count in zip(names, spans, keep, strict=False):
            if count < len(span):
                cut.append(name)
        return ids, cut

    def training_set(self, rows: Sequence[Row]) -> tuple[Dataset, dict[str, int]]:
        """`input_ids` and `labels` (-100 but on the verdict lines and EOS) of each row, and what
        was cut.
        """
        prompts, facts = self.prompts(rows)
        encoded = []
        for row, prompt in zip(rows, prompts, strict=True):
            target = self.targets[row["prompt_unsafe"], row["response_unsafe"]]
            labels = [-100] * len(prompt) + target
            encoded.append({"input_ids": prompt + target, "labels": labels})
        prompt_tokens = sum(len(prompt) for prompt in prompts)
        facts["tokens"] = sum(len(one["input_ids"]) for one in encoded)
        facts["verdict_tokens"] = facts["tokens"] - prompt_tokens
        return Dataset.from_list(encoded), facts

    def verdict_set(self, rows: Sequence[Row], prompts: Sequence[list[int]]) -> Dataset:
        """The sequences in which the verdicts on rows are read, one or two a row.

        Each has `input_ids` up to its last verdict, and `labels` at its verdicts. The second
        verdict depends on the first, which is not known before: a row with a response has a
        sequence for each first verdict.
        """
        sequences = []
        for row, prompt in zip(rows, prompts, strict=True):
            if row["response_unsafe"] is None:
                target = self.targets[False, None]
                sequence = self._sequence(prompt, target, self.user)
                sequences.append(sequence)
                continue
            for first in WORDS:
                target = self.targets[first, False]
                sequence = self._sequence(prompt, target, self.user, self.agent[first])
                sequences.append(sequence)
        return Dataset.from_list(sequences)

    def _sequence(self, prompt: list[int], target: list[int], *places: int) -> dict[str, list[int]]:
        ids = prompt + target[: places[-1] + 1]
        labels = [-100] * len(ids)
        for place in places:
            labels[len(prompt) + place] = self.words[1]
        return {"input_ids": ids, "labels": labels}

    def compared(self, rows: Sequence[Row]) -> Dataset:
        """The verdicts of a few rows, to compare a model in memory with the folder it was written
        to.
        """
        few = spread(rows, COMPARED_ROWS)
        prompts, _ = self.prompts(few)
        return self.verdict_set(few, prompts)


def first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    place = 0
    while one[place] == other[place]:
        place += 1
    return place


# --- Validation ---------------------------------------------------------------------------------


class Validation:
    """Validation rows, and their scores after each evaluation: what a guard that writes would
    decide.
    """

    def __init__(self, rows: Sequence[Row], encoder: Encoder, name: str):
        """Raises UserError when there is nothing to select on."""
        unsafe = [row for row in rows if row["prompt_unsafe"]]
        if not 0 < len(unsafe) < len(rows):
            raise UserError(f"{name}: validation needs safe and unsafe prompts")
        self.name = name
        prompts, _ = encoder.prompts(rows)
        # what is alike in length is in one batch, and prompts alone come first
        lengths = [(len(row["messages"]), len(ids)) for row, ids in zip(rows, prompts, strict=True)]
        order = sorted(range(len(rows)), key=lengths.__getitem__)
        rows = [rows[i] for i in order]
        prompts = [prompts[i] for i in order]
        self.dataset = encoder.verdict_set(rows, prompts)
        self.truths = {"prompt_unsafe": [row["prompt_unsafe"] for row in rows]}
        responses = [row["response_unsafe"] for row in rows]
        self.alone = responses.count(None)
        if self.alone < len(rows):
            self.truths["response_unsafe"] = responses[self.alone :]
        self.scores: dict[str, list[float]] = {}

    def __call__(self, prediction: Any) -> dict[str, float]:
        """Metrics of `prediction.predictions`, of shape (sequences, 2): P(unsafe) of prompt and
        response.
        """
        scores = np.asarray(prediction.predictions, dtype=float)
        scores = np.nan_to_num(scores, nan=1.0)
        alone = scores[: self.alone]
        paired = scores[self.alone :].reshape(-1, 2, 2)
        # of the two sequences of a row that one counts whose first verdict would be written
        of_prompt = paired[:, 0, 0]
        written = (of_prompt > 0.5).astype(int)
        of_response = paired[range(len(paired)), written, 1]
        self.scores["prompt_unsafe"] = [*alone[:, 0].tolist(), *of_prompt.tolist()]
        self.scores["response_unsafe"] = of_response.tolist()
        values = {}
        for label, measured in self.measured().items():
            turn = label.removesuffix("_unsafe")
            for name in ("f1", "auprc", "fpr"):
                if measured[name] is not None:
                    values[f"{turn}_{name}"] = measured[name]
        f1 = [value for name, value in values.items() if name.endswith("_f1")]
        return {"f1": float(np.mean(f1)), **values}

    def measured(self) -> dict[str, dict[str, Any]]:
        """`metrics.binary` of each label; a score that was not a number counts as unsafe."""
        found = {}
        for label, truth in self.truths.items():
            found[label] = metrics.binary(truth, self.scores[label])
        return found

    def thresholds(self, point: metrics.OperatingPoint) -> dict[str, dict[str, Any]]:
        """The threshold of an operating point for each label that has both classes here."""
        found = {}
        for label, truth in self.truths.items():
            if 0 < sum(truth) < len(truth):
                found[label] = metrics.fit_threshold(truth, self.scores[label], self.name, point)
        return found
