"""One format for training and inference, the guard's own; and the original's, for the arms that
reproduce its result.

A row is the very prompt that the guard reads a verdict after (`GenerativeGuard.prompt_ids`),
followed by the verdict. Labels are on the verdict alone, and logits are read there.

The original's prompts, verdict rule and training texts have its quirks. Source: github
asii-mov/Llama-Guard-Output-Feedback (6a75747). The rules of its texts come from Meta's
finetuning_data_formatter_example.py; they are written anew here. Nothing but arm A2 and its
switches uses them.
"""

import gc
import random
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch.nn.functional import logsigmoid
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from common.bundled import resolve_model
from common.conversation import Messages, UserError, Verdict, pair
from common.engines import Completion
from common.prefix import can_share, shared_prefix_collator, tree
from common.run import judging_bar
from common.templates import Part, encode, text_of, windows
from common.training import Answers, read_answers
from guards import entry_of, load_guard, zoo
from guards.base import is_flagged
from guards.card import has_card
from guards.generative import EXAMPLES, GenerativeGuard

TEMPLATE = Path(__file__).resolve().parent / "templates" / "llama_guard.jinja"
NOTHING = -1.0  # in columns of probabilities: there is none
OWN_COLUMNS = ("target", "g0")  # of a batch; the model does not know them
Batch = dict[str, torch.Tensor]
Row = dict[str, Any]  # input_ids, labels, and the columns of numbers
DESCRIBE = (
    'a folder without guard.json; if it is a guard, describe it there, such as {"kind": '
    '"generative", "guard": "llama-guard", "max_length": 4096} with the name of its format in '
    "guards/zoo.yaml; if it is none, make one of it in the config's section prepare"
)
NO_GUARD = (
    "neither a folder with guard.json nor a guard of guards/zoo.yaml that writes its verdict; "
    "name one, or make one in config.prepare"
)
TOO_LONG = "the question and its answer are more than the tokens that the guard reads"
NOT_THERE = "check its name, its terms on the hub (then `hf auth login`) and the network"


# --- the guard ------------------------------------------------------------------------------------


def load_llama_guard(
    path: str,
    official_template: bool = True,
    **options: Any,
) -> GenerativeGuard:
    """The guard of a folder or a name, for judging and for training.

    Args:
        path: what `load_guard` takes; a guard that writes its verdict.
        official_template: False takes this folder's prompt for a Llama Guard 1, instead of its
            tokenizer's.
        options: `adapter` (a trained arm), `engine`, … of `load_guard`.

    Raises:
        UserError: there is no such guard, or it is of another kind.
    """
    refuse_undescribed(path)
    first = zoo()["llama-guard"]["model"]
    if not official_template and entry_of(path).get("model") == first:
        options["chat_template"] = template()
    guard = load_guard(path, **options)
    if not isinstance(guard, GenerativeGuard):
        raise UserError(f"{path}: not a guard that writes its verdict")
    return guard


def refuse_undescribed(path: str) -> None:
    """Raise UserError for a model's folder of which nobody says what guard it is."""
    if Path(path).is_dir() and not has_card(path):
        raise UserError(f"{path}: {DESCRIBE}")


def check_guard(
    field: str,
    name: str,
    is_local: bool,
) -> None:
    """Refuse a guard that nobody knows, or that cannot be reached where it `is_local`."""
    try:
        refuse_undescribed(name)
        known = entry_of(name)
    except UserError as error:
        raise UserError(f"field {field}: {error}") from None
    kind = known.get("kind")
    if field.startswith("llama_guard") and kind != "generative":
        raise UserError(f"field {field}: {name} is {NO_GUARD}")
    if is_local and kind != "api" and not has_card(name):
        read_pretrained(AutoConfig, field, known.get("model", name))


def read_pretrained(
    kind: type,
    field: str,
    name: str,
) -> Any:
    """What AutoConfig or AutoTokenizer (`kind`) reads of the model that a field names.

    Raises:
        UserError: there is no such model, here or on the hub.
    """
    try:
        return kind.from_pretrained(resolve_model(name))
    except (OSError, ValueError, KeyError) as error:
        said = str(error).strip() or type(error).__name__
        reason = said.splitlines()[0]
        raise UserError(f"field {field}: {name}: {reason:.200}; {NOT_THERE}") from None


def template() -> str:
    """This folder's Llama Guard 1 prompt as a chat template."""
    return TEMPLATE.read_text(encoding="utf-8").removesuffix("\n")


def query_ids(
    guard: GenerativeGuard,
    query: str,
    prompts: Sequence[str],
) -> list[list[int]]:
    """Token ids of an arm's question about each prompt: `guard`, its own format, or the original's
    `chatml` and `meta`.

    After the original's a verdict is written (`written_as_asked`) and parsed (`parsed_unsafe`).
    """
    if query == "guard":
        return guard.prompt_ids([pair(prompt) for prompt in prompts])
    parts_of = chatml_parts if query == "chatml" else meta_parts
    return encode(guard.tokenizer, [parts_of(prompt) for prompt in prompts])


def written_as_asked(
    guard: GenerativeGuard,
    query: str,
    prompts: Sequence[str],
    new_tokens: int,
) -> list[Completion]:
    """What the guard writes on an arm's question about each prompt; TOO_LONG is an error of what
    leaves no room in its `max_length`, whatever its model sees.
    """
    asked = query_ids(guard, query, prompts)
    room = guard.max_length - new_tokens
    fitting = [place for place, ids in enumerate(asked) if len(ids) <= room]
    written = guard.written([asked[place] for place in fitting], new_tokens)
    found = [Completion(error=TOO_LONG)] * len(asked)
    for place, one in zip(fitting, written, strict=True):
        found[place] = one
    return found


def verdict_row(
    verdict: Verdict, label: str, thresholds: Mapping[str, Mapping] | None = None
) -> Row:
    """What is kept of a verdict. A guard that says nothing of the label is an error, too.

    Args:
        thresholds: of the guard, where its own decide. Without them its word does, or one half,
            because the experiment fits thresholds of its own to the score.
    """
    unsafe = getattr(verdict, label)
    error = verdict.error
    decided = None
    if thresholds is not None:
        decided = is_flagged(verdict, label, thresholds)
    elif error is None and unsafe is not None:
        decided = verdict.decided.get(label, unsafe >= 0.5)
    if error is None and decided is None:
        error = f"the guard does not judge {label}"
    return {
        "unsafe": unsafe,
        "decided": decided,
        "categories": sorted(verdict.categories) or None,
        "error": error,
        "time": datetime.now().isoformat(timespec="seconds"),
    }


class Loaded:
    """A model that is loaded when it is first needed, and can be let go."""

    def __init__(self, load: Callable[[], Any]):
        self.load = load
        self.model: Any = None

    def get(self) -> Any:
        """The model, loaded once."""
        if self.model is None:
            self.model = self.load()
        return self.model

    def free(self) -> None:
        """Give its memory back."""
        if self.model is not None:
            self.model = None
            give_memory_back()


def give_memory_back() -> None:
    """Give the device the memory of models that nobody holds any more; vLLM asks for most of it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- rows -----------------------------------------------------------------------------------------


class Encoder:
    """Rows of one guard: its prompt, then its word, then categories where they are known."""

    def __init__(
        self,
        guard: GenerativeGuard,
        max_length: int,
        *,
        always_end: bool = False,
    ):
        """Look up the words.

        Args:
            max_length: tokens of a row; of a longer one the first window is taken, as it is of
                one that the guard judges.
            always_end: EOS after "unsafe" without categories, too, so that a guard that knows none
                stops there.

        Raises:
            UserError: the guard's verdict is not one word after one prompt, or its tokenizer does
                not keep them apart.
        """
        self.guard = guard
        self.tokenizer = guard.tokenizer
        self.max_length = max_length
        self.always_end = always_end
        guard.prompt_ids([EXAMPLES["prompt"]])  # refuses guards of several questions
        names = guard.entry.get("categories", {}).get("names", {})
        self.codes = {code: code for code in names}
        self.codes |= {name: code for code, name in names.items()}
        self.answer = cache(self.answer)  # it is asked for every row
        found = []
        for kind in EXAMPLES:
            if f"{kind}_unsafe" in guard.judges:
                words = tuple(self.answer(kind, unsafe)[0] for unsafe in (False, True))
                found.append((words, guard.verdict_tokens(kind)))
        # the first tokens of safe and of unsafe, as training writes them; and all first tokens
        # whose probability is the verdict
        self.words, self.tokens = found[0]
        if found != [found[0]] * len(found):
            what = "its tokenizer writes verdicts on prompts and on responses differently"
            raise UserError(f"{guard.name}: {what}")
        if not all(self.words[unsafe] in ids for unsafe, ids in self.tokens.items()):
            what = "its tokenizer swallows the end of the prompt with the verdict"
            raise UserError(f"{guard.name}: {what}")

    def answer(
        self,
        kind: str,
        unsafe: bool,
        codes: tuple[str, ...] = (),
    ) -> list[int]:
        """What is written after a prompt: the word, codes of categories, EOS (after a bare "unsafe"
        only on demand).
        """
        meanings = self.guard.questions[0].words
        text = next(word for word, meaning in meanings.items() if meaning == unsafe)
        parts = self.guard.prompt_parts(EXAMPLES[kind])
        if not (text[0].isspace() or text_of(parts)[-1:].isspace()):
            text = " " + text
        if codes:
            text += "\n" + ",".join(codes)
        prompt, whole = self.guard.encode([parts, [*parts, Part(text, False)]])
        answer = whole[len(prompt) :]
        if not answer or whole[: len(prompt)] != prompt:
            what = "its tokenizer merges the end of the prompt with the verdict"
            raise UserError(f"{self.guard.name}: {what}")
        eos = self.tokenizer.eos_token_id
        ends = not unsafe or codes or self.always_end
        if ends and eos is not None:
            answer.append(eos)
        return answer

    def rows(
        self,
        conversations: Sequence[Messages],
        targets: Sequence[float],
        categories: Sequence[Sequence[str] | None],
    ) -> tuple[list[Row], int]:
        """Rows with `input_ids`, `labels` (-100 before the verdict) and `target`, and how many
        contents were cut.

        Args:
            targets: probabilities of unsafe; the word of the likelier class is written.
            categories: of each row, None where unknown.
        """
        rows = []
        cut = 0
        prompts = self.guard.prompt_ids(conversations)
        given = zip(conversations, prompts, targets, categories, strict=True)
        for messages, prompt, target, names in given:
            kind = "response" if messages[-1]["role"] == "assistant" else "prompt"
            unsafe = target >= 0.5
            named = set()
            if unsafe:
                named = {self.codes[name] for name in names or () if name in self.codes}
            verdict = self.answer(kind, unsafe, tuple(sorted(named)))
            room = self.max_length - len(verdict)
            if len(prompt) > room:
                (prompt,) = self.guard.prompt_ids([self._shortened(messages, room)])
                cut += 1
            row = {
                "input_ids": prompt + verdict,
                "labels": [-100] * len(prompt) + verdict,
                "target": float(target),
            }
            rows.append(row)
        return rows, cut

    def _shortened(
        self,
        messages: Messages,
        room: int,
    ) -> Messages:
        """The first window of a conversation, whose prompt has at most `room` tokens."""

        def length(some: Messages) -> int:
            (ids,) = self.guard.prompt_ids([some])
            return len(ids)

        try:
            first, *_ = windows(self.tokenizer, length, messages, room)
        except UserError:
            what = "too short for the guard's prompt alone"
            raise UserError(f"training.max_length {self.max_length}: {what}") from None
        return first


class Text(NamedTuple):
    """A text to train on: prompt in pieces, what follows it, and whether it says unsafe."""

    id: str
    parts: list[Part]
    answer: str
    unsafe: bool


def text_row(
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    loss: str,
    max_length: int,
) -> Row:
    """A row of the original's training: cut at its right end, which may take the verdict with it,
    as the original does.

    Args:
        loss: all (every token; no EOS, as the original) or answer (what follows the prompt, and
            EOS).
    """
    prompt, whole = encode(tokenizer, [text.parts, [*text.parts, Part(text.answer, False)]])
    known = 1
    if loss == "answer":
        known = len(prompt)
        if whole[:known] != prompt:
            raise UserError("the tokenizer merges the end of the prompt with the verdict")
        whole = [*whole, tokenizer.eos_token_id]
    labels = [-100] * known + whole[known:]
    return {
        "input_ids": whole[:max_length],
        "labels": labels[:max_length],
        "target": NOTHING,
    }


def prompt_of(row: Row) -> list[int]:
    """The tokens of a row before its verdict."""
    start = row["labels"].count(-100)
    return row["input_ids"][:start]


# --- batches --------------------------------------------------------------------------------------


def shares_beginnings(
    model: PreTrainedModel,
    longest: int,
) -> bool:
    """Whether what rows of at most `longest` tokens begin with can be computed once for all."""
    config = model.config.get_text_config()
    return config._attn_implementation == "sdpa" and can_share(config, longest)


def batch_of(
    rows: Sequence[Row],
    shared: bool,
) -> Batch:
    """Rows together: a tree of what they begin with, where that is `shared` and less work, else
    padded.

    Beside what the model reads there are labels; owner, for each label its row; and the columns of
    numbers, of shape (rows).
    """
    if shared and have_much_in_common(rows):
        batch = shared_prefix_collator(rows)
    else:
        batch = DataCollatorForLanguageModeling(pad_token_id=0)(rows)
        batch["owner"] = (batch["labels"] != -100).nonzero()[:, 0]
    for name in rows[0].keys() - {"input_ids", "labels"}:
        batch[name] = torch.tensor([row[name] for row in rows])
    return batch


def have_much_in_common(rows: Sequence[Row]) -> bool:
    """Whether a tree of the rows has half the tokens of padded rows, or fewer.

    Attention compares each token of a tree with all of it: with more tokens that costs more than
    the tree saves.
    """
    sequences = [row["input_ids"] for row in rows]
    tokens, _, _ = tree(sequences)
    longest = max(map(len, sequences))
    return len(tokens) <= len(rows) * longest / 2


def read(
    model: torch.nn.Module,
    batch: Batch,
) -> Answers:
    """What the model says at the labels of a batch."""
    known = {name: column for name, column in batch.items() if name not in OWN_COLUMNS}
    return read_answers(model, known)


def log_odds(
    logits: torch.Tensor,
    tokens: Mapping[bool, list[int]],
) -> torch.Tensor:
    """log P(unsafe) - log P(safe) over all first tokens of the words; shape logits.shape[:-1]."""
    unsafe = logits[..., tokens[True]]
    safe = logits[..., tokens[False]]
    return unsafe.logsumexp(-1) - safe.logsumexp(-1)


def verdict_loss(
    answers: Answers,
    batch: Batch,
    words: tuple[int, int],
    tokens: Mapping[bool, list[int]],
    kl_weight: float,
) -> torch.Tensor:
    """Mean loss of rows with one verdict each.

    Args:
        answers: what the model says at the k labels of the batch.
        batch: owner (k), target and, with a weight, g0 (rows): P(unsafe) before, or NOTHING.
    """
    there = answers.labels != -100
    labels = answers.labels[there]
    logits = answers.outputs.logits[there].float()
    logprobs = logits.log_softmax(-1)
    is_first = answers.starts[there]  # the verdict is read at the first label of a row
    target = batch["target"]
    safe = logprobs[is_first][:, words[0]]
    unsafe = logprobs[is_first][:, words[1]]
    loss = -(target * unsafe + (1 - target) * safe)
    # the line goes on after the likelier word
    goes_on = ~is_first
    wanted = labels[goes_on, None]
    rest = -logprobs[goes_on].gather(1, wanted)[:, 0]
    owner = batch["owner"][goes_on]
    sums = torch.zeros_like(loss).index_add(0, owner, rest)
    lengths = torch.bincount(owner, minlength=len(target)).clamp(min=1)
    likelier = torch.where(target >= 0.5, target, 1 - target)
    loss = loss + sums / lengths * likelier
    if kl_weight:
        odds = log_odds(logits[is_first], tokens)
        loss = loss + kl_weight * drift(batch["g0"], odds)
    return loss.mean()


def drift(
    before: torch.Tensor,
    odds: torch.Tensor,
) -> torch.Tensor:
    """KL(before || now) on {safe, unsafe} of each row, 0 where `before` is NOTHING.

    Args:
        before: P(unsafe) before training.
        odds: log-odds of unsafe now.
    """
    unsafe = before.clamp(0, 1)
    safe = 1 - unsafe
    entropy = -unsafe.xlogy(unsafe) - safe.xlogy(safe)
    crossed = -unsafe * logsigmoid(odds) - safe * logsigmoid(-odds)
    return (before >= 0) * (crossed - entropy)


def verdict_probabilities(
    guard: GenerativeGuard,
    prompts: Sequence[list[int]],
    tokens: Mapping[bool, list[int]],
) -> list[float]:
    """P(unsafe) after each prompt, as `GenerativeGuard.judge` gives it."""
    candidates = [*tokens[False], *tokens[True]]
    places = {unsafe: [candidates.index(i) for i in ids] for unsafe, ids in tokens.items()}
    found = []
    for said in guard.model.next_token(
        prompts, candidates, judging_bar(guard.name, guard.progress)
    ):
        odds = log_odds(torch.tensor(said.logprobs), places)
        found.append(odds.sigmoid().item())
    return found


@torch.no_grad()
def verdict_states(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    batch_size: int = 16,
) -> torch.Tensor:
    """What the output layer reads verdicts from: the last hidden state after each prompt, (prompts,
    hidden), on CPU.
    """
    longest = max(map(len, prompts)) + 1
    shared = shares_beginnings(model, longest)
    states = []
    for start in range(0, len(prompts), batch_size):
        rows = []
        for ids in prompts[start : start + batch_size]:
            # a label after the last token has the state that is read there
            labels = [-100] * len(ids) + [0]
            rows.append({"input_ids": [*ids, 0], "labels": labels})
        batch = batch_of(rows, shared)
        for name, column in batch.items():
            batch[name] = column.to(model.device)
        labels = batch.pop("labels")
        keep = batch.pop("keep", None)
        del batch["owner"]
        hidden = model.base_model(**batch, use_cache=False).last_hidden_state
        if keep is not None:  # a tree
            states.append(hidden[0, keep].float().cpu())
            continue
        is_read = labels[:, 1:] != -100
        states.append(hidden[:, :-1][is_read].float().cpu())
    return torch.cat(states)


# --- the original's prompts ---------------------------------------------------------------------

ORIGINAL = yaml.safe_load(TEMPLATE.with_name("original.yaml").read_text(encoding="utf-8"))
CATEGORIES = ORIGINAL["categories"]  # by the code of the query
ALL_CATEGORIES = tuple(range(len(CATEGORIES)))  # by their places
SAFE_REASON = "This query is safe and does not contain harmful content."
DROPPED_REASON = "Response is safe because any riskiness in it is related to categories we're not trying to detect."
# what `complete` leaves in a text: the control token that ended it
END = re.compile(r"<\|[^|<>]*\|>|</s>|<eos>")
VERDICT = re.compile(r"(un)?safe\b[^a-z0-9]*(?:[ois]\d+\b[^a-z0-9]*)*")
UNCLASSIFIED = "Classified as unsafe"


def chatml_parts(content: str) -> list[Part]:
    """The original's query for a prompt and, in the same place, for a response alone.

    Encode it with special tokens, as its tokenizer call does.
    """
    return _around(content, ORIGINAL["query"])


def meta_parts(
    prompt: str,
    categories: Sequence[int] = ALL_CATEGORIES,
) -> list[Part]:
    """The original's training prompt, with the policy of `categories` (indices) in this order and
    renumbered.
    """
    policies = [category["policy"] for category in CATEGORIES.values()]
    lines = [f"O{number}: {policies[i]}" for number, i in enumerate(categories, start=1)]
    return _around(prompt, ORIGINAL["training"].replace("{policy}", "\n".join(lines)))


def _around(
    content: str,
    text: str,
) -> list[Part]:
    """A text of the original's with a content in its place, the two apart."""
    head, tail = text.split("{content}")
    return [
        Part(head, False),
        Part(content, True),
        Part(tail, False),
    ]


# --- the original's verdicts ----------------------------------------------------------------------


def legacy_safe(text: str) -> bool:
    """The original's rule: whatever does not begin with SAFE in capitals is unsafe."""
    return text.strip().startswith("SAFE")


def legacy_reason(text: str) -> str:
    """The original's reason: the first code that the text holds anywhere (O1 also in O10), with its
    name.
    """
    for code, category in CATEGORIES.items():
        if code in text:
            return f"{code}: {category['name']}"
    return UNCLASSIFIED


def reason_of(names: Sequence[str]) -> str:
    """The original's reason for a block, of the categories that a guard named: those it knows
    first, by its codes.
    """
    told = {}
    for code, category in CATEGORIES.items():
        told[category["name"]] = f"{code}: {category['name']}"
    known = {told[name] for name in names if name in told}
    reasons = sorted(known) + sorted(set(names) - set(told))
    return ", ".join(reasons) or UNCLASSIFIED


def parse_verdict(text: str) -> bool | None:
    """The rule that a written verdict asks for: True unsafe, False safe, None neither.

    The first line of the stripped text, case apart, is the word; category codes may follow it.
    """
    written = END.split(text, maxsplit=1)[0]
    lines = written.strip().lower().splitlines()
    match = VERDICT.fullmatch(lines[0]) if lines else None
    if match is None:
        return None
    return match[1] is not None


def parsed_unsafe(
    text: str,
    parser: str,
) -> tuple[bool, bool]:
    """Whether a written verdict counts as unsafe, and whether it was a verdict at all.

    Args:
        parser: strict (the original's, which knows nothing unparsed) or correct (what is no verdict
            fails closed).
    """
    if parser == "strict":
        return not legacy_safe(text), True
    verdict = parse_verdict(text)
    return verdict is not False, verdict is not None


# --- the original's training texts ----------------------------------------------------------------


class Example(NamedTuple):
    """One example of the original: a prompt, the index of its category (None of a safe one), and
    the reason.
    """

    id: str
    prompt: str
    category: int | None
    reason: str


def example(
    row_id: str,
    prompt: str,
    reason: str | None,
) -> Example:
    """An example of a blocked prompt with the reason for it, or of a safe one (reason None).

    The category is the code in the reason, else the first. I1 to I4 stop the original's formatter
    (it reads `int("I2")` off them); here they are the categories that it gives the numbers 7 to 10.
    """
    if reason is None:
        return Example(row_id, prompt, None, SAFE_REASON)
    codes = list(CATEGORIES)
    code = reason.partition(":")[0]
    category = codes.index(code) if code in codes else 0
    return Example(row_id, prompt, category, reason)


def training_texts(
    examples: Sequence[Example],
    seed: int,
    augment: bool = True,
) -> list[Text]:
    """Meta's formatter on the original's settings: n unsafe and n safe examples give 5n texts, 2n
    of them unsafe.

    Args:
        augment: categories in random order, renumbered; and each example again with some categories
            dropped that it does not violate; each unsafe one also as "safe", without its category
            in the policy.
    """
    rng = random.Random(seed)
    texts = []

    def add(
        one: Example,
        dropped: Sequence[int] = (),
    ) -> None:
        order = [i for i in ALL_CATEGORIES if i not in dropped]
        if augment:
            order = rng.sample(order, len(order))
        texts.append(_text(one, order))

    for one in examples:
        add(one)
        if not augment:
            continue
        others = [i for i in ALL_CATEGORIES if i != one.category]
        most = len(ALL_CATEGORIES) - 1  # one stays
        count = min(rng.randint(0, len(others)), most)
        add(one, rng.sample(others, count))
        if one.category is not None:
            count = rng.randint(0, len(others) - 1)
            dropped = [*rng.sample(others, count), one.category]
            safe = Example(one.id, one.prompt, None, DROPPED_REASON)
            add(safe, dropped)
    return texts


def _text(
    one: Example,
    order: Sequence[int],
) -> Text:
    unsafe = one.category is not None
    lines = ["safe"]
    if unsafe:
        number = order.index(one.category) + 1
        lines = ["unsafe", f"O{number}"]
    lines.append(f"Explanation: {one.reason}")
    answer = " " + "\n".join(lines)
    return Text(one.id, meta_parts(one.prompt, order), answer, unsafe)
