"""One format for training and inference: the guard's own prompt, its verdict words, and rows of
both as token ids.

A row is the very prompt that the guard reads a verdict after (`GenerativeGuard.prompt_ids`),
followed by the verdict. Labels are on the verdict alone. `read` computes logits there and nowhere
else, and what the rows of a batch begin with (the policy, two thirds of a row) once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from legacy import query_parts
from torch.nn.functional import logsigmoid
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from common.bundled import resolve_model
from common.conversation import Message, Messages, UserError, pair
from common.prefix import shared_prefix_collator
from common.templates import Part, encode, token_offsets
from common.training import Answers, read_answers
from guards import entry_of, load_guard, zoo
from guards.card import has_card
from guards.generative import GenerativeGuard

TEMPLATE = Path(__file__).resolve().parent / "templates" / "llama_guard.jinja"
KINDS = {"prompt": pair("x"), "response": pair("x", "y")}
NOTHING = -1.0  # in columns of probabilities: there is none
Batch = dict[str, torch.Tensor]
Row = dict[str, Any]  # input_ids, labels, and further columns of numbers


# --- the guard --------------------------------------------------------------------------------------------------------


def load_llama_guard(path: str, official_template: bool = True, **options: Any) -> GenerativeGuard:
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


DESCRIBE = (
    'a folder without guard.json; if it is a guard, describe it there, such as {"kind": '
    '"generative", "guard": "llama-guard", "max_length": 4096} with the name of its format in '
    "guards/zoo.yaml; if it is none, make one of it in the config's section prepare"
)


def refuse_undescribed(path: str) -> None:
    """Raise UserError for a model's folder of which nobody says what guard it is."""
    if Path(path).is_dir() and not has_card(path):
        raise UserError(f"{path}: {DESCRIBE}")


def check_guard(field: str, name: str, local: bool) -> None:
    """Refuse a guard that nobody knows, or that cannot be reached where it is `local` (no
    server's).
    """
    try:
        refuse_undescribed(name)
        known = entry_of(name)
    except UserError as error:
        raise UserError(f"field {field}: {error}") from None
    if field.startswith("llama_guard") and known.get("kind") != "generative":
        raise UserError(
            f"field {field}: {name} is neither a folder with guard.json nor a guard of guards/zoo.yaml that "
            "writes its verdict; name one, or make one in config.prepare"
        )
    if local and known.get("kind") != "api" and not has_card(name):
        check_model(field, known.get("model", name))


def check_model(field: str, name: str) -> None:
    """Refuse a model whose config cannot be read, here or on the hub."""
    try:
        AutoConfig.from_pretrained(resolve_model(name))
    except (OSError, ValueError, KeyError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = "check its name, its terms on the hub (then `hf auth login`) and the network"
        raise UserError(f"field {field}: {name}: {said:.200}; {hint}") from None


def template() -> str:
    """This folder's Llama Guard 1 prompt as a chat template."""
    return TEMPLATE.read_text(encoding="utf-8").removesuffix("\n")


def query_ids(guard: GenerativeGuard, query: str, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of an arm's question about each prompt: `guard`, its own format, or the original's
    `chatml` and `meta`.

    After the original's a verdict is written (`guard.written`) and parsed (`legacy.parsed_unsafe`).
    """
    if query == "guard":
        return guard.prompt_ids([pair(prompt) for prompt in prompts])
    return encode(guard.tokenizer, [query_parts(query, prompt) for prompt in prompts])


# --- rows -------------------------------------------------------------------------------------------------------------


class Encoder:
    """Rows of one guard: its prompt, then its word, then categories where they are known."""

    def __init__(self, guard: GenerativeGuard, max_length: int, *, always_end: bool = False):
        """Look up the words.

        Args:
            max_length: tokens of a row; of a longer one the end of its content is cut, never the
            verdict.
            always_end: EOS after "unsafe" without categories, too, so that a guard that knows none
            stops there.

        Raises:
            UserError: the guard's verdict is not one word after one prompt, or its tokenizer does
            not keep them apart.
        """
        self.guard, self.tokenizer, self.max_length, self.always_end = (
            guard,
            guard.tokenizer,
            max_length,
            always_end,
        )
        names = guard.entry.get("categories", {}).get("names", {})
        self.codes = {name: code for code, name in names.items()} | {code: code for code in names}
        guard.prompt_ids([KINDS["prompt"]])  # refuses guards of several questions
        self._answers: dict[tuple, list[int]] = {}
        kinds = [kind for kind in KINDS if f"{kind}_unsafe" in guard.judges]
        first = {
            tuple(self.answer(kind, unsafe, ())[0] for unsafe in (False, True)) for kind in kinds
        }
        self.tokens = guard.verdict_tokens(kinds[0])  # whose probability is the verdict
        if len(first) > 1 or any(ids != self.tokens for ids in map(guard.verdict_tokens, kinds)):
            raise UserError(
                f"{guard.name}: its tokenizer writes verdicts on prompts and on responses differently"
            )
        # the first tokens of safe and of unsafe, as they are written in training
        (self.words,) = first
        if any(self.words[unsafe] not in ids for unsafe, ids in self.tokens.items()):
            raise UserError(
                f"{guard.name}: its tokenizer swallows the end of the prompt with the verdict"
            )

    def answer(self, kind: str, unsafe: bool, categories: Sequence[str]) -> list[int]:
        """What is written after a prompt: the word, known categories, EOS (after a bare "unsafe"
        only on demand).
        """
        codes = tuple(
            sorted({self.codes[name] for name in categories if name in self.codes})
            if unsafe
            else ()
        )
        key = (kind, unsafe, codes)
        if key not in self._answers:
            parts = self.guard.prompt_parts(KINDS[kind])
            words = self.guard.questions[0].words
            word = next(
                word for word, value in words.items() if bool(value) is unsafe and value is not None
            )
            blank = (
                ""
                if word[0].isspace() or "".join(part.text for part in parts)[-1:].isspace()
                else " "
            )
            text = blank + word + ("\n" + ",".join(codes) if codes else "")
            prompt, whole = self.guard.encode([parts, [*parts, Part(text, False)]])
            if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
                raise UserError(
                    f"{self.guard.name}: its tokenizer merges the end of the prompt with the verdict"
                )
            eos = self.tokenizer.eos_token_id
            ends = eos is not None and (not unsafe or bool(codes) or self.always_end)
            self._answers[key] = whole[len(prompt) :] + [eos] * ends
        return self._answers[key]

    def rows(
        self,
        conversations: Sequence[Messages],
        targets: Sequence[float],
        categories: Sequence[Sequence[str] | None] | None = None,
    ) -> tuple[list[Row], int]:
        """Rows with `input_ids`, `labels` (-100 before the verdict) and `target`, and how many
        contents were cut.

        Args:
            targets: probabilities of unsafe; the word of the likelier class is written.
            categories: of each row, None where unknown.
        """
        out, cut, prompts = [], 0, self.guard.prompt_ids(conversations)
        named = categories or [None] * len(prompts)
        for messages, prompt, target, names in zip(
            conversations, prompts, targets, named, strict=True
        ):
            kind = "response" if messages[-1]["role"] == "assistant" else "prompt"
            verdict = self.answer(kind, target >= 0.5, names or ())
            if len(prompt) + len(verdict) > self.max_length:
                prompt, cut = self._shortened(messages, self.max_length - len(verdict)), cut + 1
            labels = [-100] * len(prompt) + verdict
            out.append({"input_ids": prompt + verdict, "labels": labels, "target": float(target)})
        return out, cut

    def _shortened(self, messages: Messages, room: int) -> list[int]:
        """Prompt ids of at most `room` tokens: the longest content loses its end."""
        cut: list[Message] = [dict(message) for message in messages]
        while True:
            (ids,) = self.guard.prompt_ids([cut])
            if len(ids) <= room:
                return ids
            longest = max(cut, key=lambda message: len(message["content"]))
            spans = token_offsets(self.tokenizer, longest["content"])
            keep = len(spans) - max(1, len(ids) - room)
            if keep < 1:
                raise UserError(
                    f"training.max_length {self.max_length}: too short for the guard's prompt alone"
                )
            longest["content"] = longest["content"][: spans[keep - 1][1]]


def text_row(
    tokenizer: PreTrainedTokenizerBase,
    parts: Sequence[Part],
    answer: str,
    loss: str,
    max_length: int,
) -> Row:
    """A row of the original's training: cut at its right end, which may take the verdict with it,
    as the original does.

    Args:
        loss: all (every token; no EOS, as the original) or answer (what follows the prompt, and
        EOS).
    """
    prompt, whole = encode(tokenizer, [parts, [*parts, Part(answer, False)]])
    if loss == "all":
        labels = [-100, *whole[1:]]
    else:
        if whole[: len(prompt)] != prompt:
            raise UserError("the tokenizer merges the end of the prompt with the verdict")
        whole = [*whole, tokenizer.eos_token_id]
        labels = [-100] * len(prompt) + whole[len(prompt) :]
    return {"input_ids": whole[:max_length], "labels": labels[:max_length], "target": NOTHING}


# --- batches ----------------------------------------------------------------------------------------------------------


def collator_for(model: PreTrainedModel) -> Callable[[Sequence[Row]], Batch]:
    """`tree_batch` where attention takes a mask of any shape, else `padded_batch`."""
    config = model.config.get_text_config()
    free = config._attn_implementation == "sdpa" and not getattr(config, "sliding_window", None)
    return tree_batch if free else padded_batch


def tree_batch(rows: Sequence[Row]) -> Batch:
    """Rows with what they begin with once (`common.prefix`), and their further columns."""
    return shared_prefix_collator(rows) | _columns(rows)


def padded_batch(rows: Sequence[Row]) -> Batch:
    """The same for any attention: input_ids and attention_mask of shape (rows, longest), padded at
    the right.

    labels are of the same shape, -100 where there is none; owner (k) is the index of each label's
    row.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    missing = [max(lengths) - length for length in lengths]
    labels = torch.tensor(
        [row["labels"] + [-100] * n for row, n in zip(rows, missing, strict=True)]
    )
    return {
        "input_ids": torch.tensor(
            [row["input_ids"] + [0] * n for row, n in zip(rows, missing, strict=True)]
        ),
        "attention_mask": (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long(),
        "labels": labels,
        "owner": (labels != -100).nonzero()[:, 0],
    } | _columns(rows)


def _columns(rows: Sequence[Row]) -> Batch:
    return {
        name: torch.tensor([row[name] for row in rows])
        for name in rows[0]
        if name not in ("input_ids", "labels")
    }


def read(model: torch.nn.Module, batch: Batch) -> Answers:
    """What the model says at the labels of a batch, whose further columns it does not know."""
    start = "inputs_embeds" if "inputs_embeds" in batch else "input_ids"
    names = (start, "position_ids", "attention_mask", "labels", "keep", "owner")
    return read_answers(model, {name: batch[name] for name in names if name in batch})


def logits_at_labels(answers: Answers) -> torch.Tensor:
    """Logits, float32, at the k labels of a batch: shape (k, vocabulary)."""
    return answers.outputs.logits[answers.labels != -100].float()


def log_odds(logits: torch.Tensor, tokens: dict[bool, list[int]]) -> torch.Tensor:
    """log P(unsafe) - log P(safe), over all first tokens of the words, of shape logits.shape[:-1]."""
    return logits[..., tokens[True]].logsumexp(-1) - logits[..., tokens[False]].logsumexp(-1)


def verdict_loss(
    answers: Answers,
    batch: Mapping[str, torch.Tensor],
    words: tuple[int, int],
    tokens: Mapping[bool, list[int]],
    kl_weight: float,
) -> torch.Tensor:
    """Mean loss of rows with one verdict each.

    Args:
        answers: what the model says at the k labels of the batch.
        batch: owner (k), target and, with a weight, g0 (rows): P(unsafe) before, or NOTHING.
    """
    logits, target = logits_at_labels(answers), batch["target"]
    there = answers.labels != -100
    # the verdict is read at the first of a row
    first, labels = answers.starts[there], answers.labels[there]
    logprobs = logits.log_softmax(-1)
    safe, unsafe = (logprobs[first][:, word] for word in words)
    loss = -(target * unsafe + (1 - target) * safe)
    rest, owner = -logprobs[~first].gather(1, labels[~first, None])[:, 0], batch["owner"][~first]
    lengths = torch.bincount(owner, minlength=len(target)).clamp(min=1)
    # the line goes on after the likelier word
    sure = torch.where(target >= 0.5, target, 1 - target)
    loss = loss + torch.zeros_like(loss).index_add(0, owner, rest) / lengths * sure
    if kl_weight:
        odds, before = log_odds(logits[first], tokens), batch["g0"].clamp(0, 1)
        entropy = -before.xlogy(before) - (1 - before).xlogy(1 - before)
        crossed = -before * logsigmoid(odds) - (1 - before) * logsigmoid(-odds)
        loss = loss + kl_weight * (batch["g0"] >= 0) * (crossed - entropy)
    return loss.mean()


@torch.no_grad()
def verdict_probabilities(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    tokens: dict[bool, list[int]],
    batch_size: int = 32,
) -> list[float]:
    """P(unsafe) after each prompt, as `GenerativeGuard.judge` gives it."""
    return [
        p
        for logits in _after(model, prompts, batch_size)
        for p in log_odds(logits, tokens).sigmoid().tolist()
    ]


@torch.no_grad()
def verdict_states(
    model: PreTrainedModel, prompts: Sequence[list[int]], batch_size: int = 32
) -> torch.Tensor:
    """What the output layer reads verdicts from: the last hidden state after each prompt, (prompts,
    hidden), on CPU.
    """
    seen: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    states = []
    try:
        for _ in _after(
            model, prompts, batch_size, lambda there: states.append(seen.pop()[there].float().cpu())
        ):
            pass
    finally:
        hook.remove()
    return torch.cat(states)


def _after(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    batch_size: int,
    then: Callable[[torch.Tensor], None] = lambda there: None,
) -> Iterator[torch.Tensor]:
    """Logits after the prompts, batch by batch, in their order, without dropout.

    Args:
        then: is called after each forward pass, with where in its columns the prompts end.
    """
    collate, training = collator_for(model), model.training
    model.eval()
    for start in range(0, len(prompts), batch_size):
        # a label after the last token has the logits read there
        some = prompts[start : start + batch_size]
        rows = [{"input_ids": [*ids, 0], "labels": [-100] * len(ids) + [0]} for ids in some]
        batch = {name: tensor.to(model.device) for name, tensor in collate(rows).items()}
        answers = read(model, batch)
        then(answers.labels != -100)
        yield logits_at_labels(answers)
    model.train(training)
