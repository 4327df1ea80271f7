"""A frozen chat model with its guard riding along: adapters off it chats, adapters on it judges.

transformers' own `generate` writes the replies, a few tokens at a time, and every piece is judged
before it is shown. The guard has a key/value cache of its own, so that it reads each token once.
"""

import logging
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
    LogitsProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

from common.conversation import (
    Messages,
    UserError,
    check_messages,
    judged_label,
    last_turns,
    pair,
)
from common.engines import apply_adapter
from common.fit import fit_causal_lm, positions
from common.run import device as default_device
from common.run import inference_dtype, is_main_process
from common.templates import control_ids, encode, render, render_chat
from guards.base import check_tokenizer, number_format
from guards.card import NO_PROBE, LoraCard, card_path, check_scores, read_card
from guards.lora import find_base

logger = logging.getLogger(__name__)


@dataclass
class GuardedReply:
    """A reply and what the guard said of it. What it was not trained to judge is None."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)  # what was shown, without EOS
    prompt_unsafe: float | None = None  # before anything was written
    # (tokens seen, unsafe probability)
    trace: list[tuple[int, float]] = field(default_factory=list)
    response_unsafe: float | None = None  # of prompt and reply, at the last token
    categories: dict[str, float] = field(default_factory=dict)  # of the last judgement
    # tokens shown before the guard stopped the reply; 0: the prompt was refused
    stopped_after: int | None = None
    finish_reason: str = ""  # eos | length | stopped | error
    error: str | None = None  # why there is no reply


@dataclass
class ReplyRow:
    """A reply while it is written."""

    reply: GuardedReply
    prompt: str  # what the guard sees of the conversation: the last user turn
    generator: torch.Generator  # of its own, so that no other row changes what it draws
    chat_ids: list[int] = field(default_factory=list)
    piece: list[int] = field(default_factory=list)  # what was written since the last check

    def take(
        self,
        written: list[int],
        eos: set[int],
    ) -> None:
        """Add what was written. An EOS ends the reply, and is neither shown nor judged."""
        self.piece = []
        for token in written:
            if token in eos:
                self.reply.finish_reason = "eos"
                break
            self.piece.append(token)
        self.reply.token_ids += self.piece

    def note(
        self,
        verdict: tuple[float, dict[str, float]],
        stop_at: float | None,
    ) -> None:
        """Take down what the guard says, of the prompt before anything is written; end the reply
        where that is above the threshold.
        """
        reply = self.reply
        seen = len(self.reply.token_ids)
        unsafe, reply.categories = verdict
        if seen:
            reply.trace.append((seen, unsafe))
            reply.response_unsafe = unsafe
        else:
            reply.prompt_unsafe = unsafe
        if stop_at is not None and unsafe > stop_at:
            reply.stopped_after = seen
            reply.finish_reason = "stopped"


class BatchCache:
    """What one model has read of the texts of a batch: their tokens, and its key/value cache.

    Texts are padded on the left, so that the newest token of each is the last one.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        rows: int,
        device: torch.device,
    ):
        self.states = DynamicCache(config=config)
        self.ids = torch.zeros(
            rows,
            0,
            dtype=torch.long,
            device=device,
        )
        self.mask = self.ids.clone()  # 0 where a token is padding

    def append(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
    ) -> None:
        """Add the next tokens of every text, both [rows, tokens]; the cache fills as they are read."""
        self.ids = torch.cat([self.ids, ids], dim=1)
        self.mask = torch.cat([self.mask, mask], dim=1)

    def keep(self, rows: list[int]) -> None:
        """Forget all rows but these."""
        self.ids = self.ids[rows]
        self.mask = self.mask[rows]
        self.states.batch_select_indices(rows)


class DrawByRow(LogitsProcessor):
    """Draws the next token of each row from the row's own generator and leaves no other possible.

    `generate` has one generator for the whole batch: a reply would depend on its neighbours.
    """

    def __init__(self, temperature: float, generators: Sequence[torch.Generator]):
        self.temperature = temperature
        self.generators = generators

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: torch.Tensor,
    ) -> torch.Tensor:
        weights = (scores.float() / self.temperature).softmax(-1)
        only = torch.full_like(weights, -math.inf)
        for row, generator in enumerate(self.generators):
            drawn = torch.multinomial(weights[row], 1, generator=generator)
            only[row, drawn] = 0.0
        return only


class GuardedChat:
    """A chat model whose guard lives in LoRA adapters, which are off outside of the guard's passes.

    `model` is the chat model: used by itself it computes bit for bit what the base model does.
    """

    def __init__(
        self,
        adapter: str | Path,
        *,
        base_model: str | None = None,
        device: torch.device | str | None = None,
        trust_remote_code: bool = False,
    ):
        """Load the base model once and put the adapters into it.

        Args:
            adapter: a folder with adapter_config.json, adapter_model.safetensors and guard.json.
            base_model: instead of the one that guard.json names.
            device: None takes the accelerator, if there is one.
            trust_remote_code: run code that comes with the base model.

        Raises:
            UserError: a file is missing or does not fit the others.
        """
        self.folder = Path(adapter)
        self.card: LoraCard = read_card(self.folder, LoraCard)
        if self.card.template != "lora_guard":
            path = card_path(self.folder)
            said = "expected lora_guard; this guard cannot ride along"
            raise UserError(f"{path}, field template: {said}")
        self.labels = self.card.labels
        self.inputs = self.card.inputs
        self.device = default_device() if device is None else torch.device(device)
        # a CPU would emulate bf16
        dtype = torch.float32 if self.device.type == "cpu" else inference_dtype()
        self.lock = threading.RLock()
        code = {"trust_remote_code": trust_remote_code}
        base = find_base(self.folder, self.card, base_model, trust_remote_code)
        try:
            model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **code)
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder, **code)
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            said = f"cannot be loaded as a chat model: {f'{error}'.strip():.200}"
            raise UserError(f"{base}: {said}") from None
        self.model: PreTrainedModel = model.to(self.device).eval()
        check_tokenizer(self.tokenizer, str(self.folder))
        fit_causal_lm(self.tokenizer, self.model)
        self.control = control_ids(self.tokenizer)
        self.room = positions(self.model) or math.inf  # in tokens
        ends = self.model.generation_config.eos_token_id
        if ends is None:
            ends = self.tokenizer.eos_token_id
        if not isinstance(ends, list):
            ends = [ends]
        self.eos = set(ends)
        self._add_guard(base, code)
        self._check_probe()

    def _add_guard(
        self,
        base: str,
        code: dict[str, bool],
    ) -> None:
        """Put the adapters into the layers of the chat model, and the head beside it in float32."""
        chat_weights = list(self.model.parameters())
        classifier = classifier_over(self.model, base, self.card, code)
        self.trunk = classifier.base_model  # the layers that the guard reads, without lm_head
        self.peft = apply_adapter(
            classifier,
            str(self.folder),
            base,
        ).eval()
        self.head: nn.Linear = classifier.score.modules_to_save["default"].float()
        if self.card.head_bias is not None:  # a stock head has none: the card holds it
            bias = torch.tensor(self.card.head_bias, device=self.device)
            self.head.bias = nn.Parameter(bias)
        with self.adapters():
            pass  # PEFT has them on; from here on they are off
        # PEFT freezes the base, and torch chooses CPU kernels by that even where no gradient is
        # taken: the last bit of the logits would differ from those of the model as it is loaded.
        for parameter in chat_weights:
            parameter.requires_grad_(True)

    def _check_probe(self) -> None:
        """Judge the probe of guard.json as everything is judged here."""
        probe = self.card.probe
        if probe is None:
            logger.warning(NO_PROBE, card_path(self.folder))
            return
        ((unsafe, said),) = self.judge_texts([probe.messages])
        check_scores(
            said | {judged_label(probe.messages): unsafe},
            number_format(self.model),
            probe,
            self.folder,
        )

    @contextmanager
    def adapters(self) -> Iterator[None]:
        """Adapters on within the block, where other threads wait; off after it, however it ends."""
        with self.lock:
            self.peft.base_model.enable_adapter_layers()
            try:
                yield
            finally:
                self.peft.base_model.disable_adapter_layers()

    # --- judging ----------------------------------------------------------------------------------

    @torch.no_grad()
    def read(
        self,
        cache: BatchCache,
        ids: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """The guard reads the next tokens of each text, [rows, tokens].

        Returns:
            Probabilities [rows, labels] at the last token. A row with a logit that is no number is
            unsafe in everything: guards fail closed.
        """
        cache.append(ids, mask)
        count = ids.shape[1]
        places = (cache.mask.cumsum(1) - 1).clamp(min=0)
        with self.adapters():
            read = self.trunk(
                input_ids=ids,
                attention_mask=cache.mask,
                position_ids=places[:, -count:],
                past_key_values=cache.states,
                use_cache=True,
            )
            logits = self.head(read.last_hidden_state[:, -1].float())
        numbers = logits.isfinite().all(1, keepdim=True)
        return torch.where(numbers, logits.sigmoid(), 1.0)

    def verdict(self, probabilities: Sequence[float]) -> tuple[float, dict[str, float]]:
        """Unsafe probability and categories of one row of guard probabilities.

        Without an unsafe head the unsafe probability is the highest category (the paper's v1).
        """
        named = dict(zip(self.labels, probabilities, strict=True))
        highest = max(named.values())
        return named.pop("unsafe", highest), named

    def guard_scores(self, sequences: Sequence[list[int]]) -> torch.Tensor:
        """Probabilities [sequences, labels] of whole token ids, in one pass."""
        if not sequences:
            return torch.empty(0, len(self.labels))
        cache = BatchCache(self.trunk.config, len(sequences), self.device)
        return self.read(cache, *self._padded(sequences)).cpu()

    def judge_texts(self, messages: Sequence[Messages]) -> list[tuple[float, dict[str, float]]]:
        """`verdict` of prompts, pairs, or responses alone, as the guard reads them.

        What is no such conversation is unsafe with probability 1, without categories: guards fail
        closed.
        """
        verdicts: list[tuple[float, dict[str, float]]] = [(1.0, {}) for _ in messages]
        parts = {}  # by the place of the conversation
        for place, conversation in enumerate(messages):
            try:
                checked = check_messages(conversation, f"conversation {place}", allow_empty=True)
                parts[place] = render("lora_guard", checked, self.tokenizer)
            except UserError as error:
                logger.warning("Not judged, so unsafe: %s", error)
        scores = self.guard_scores(encode(self.tokenizer, list(parts.values())))
        for place, probabilities in zip(parts, scores.tolist(), strict=True):
            verdicts[place] = self.verdict(probabilities)
        return verdicts

    # --- token ids --------------------------------------------------------------------------------

    def chat_ids(self, messages: Messages) -> list[int]:
        """Token ids of the chat template with its generation prompt; BOS once, content never a
        control token.
        """
        if not messages or messages[-1]["role"] != "user":
            raise UserError("a conversation to reply to must end with a user turn")
        parts = render_chat(self.tokenizer, messages)
        return encode(self.tokenizer, [parts], add_special_tokens=False)[0]

    def seam(self, prompt: str, first: int) -> list[int]:
        """The guard's ids up to the first token of a reply, whose text is tokenized anew where it
        now stands.

        A chat model begins with "Hello", while "agent: Hello" holds " Hello". What has no text of
        its own (a part of a character, a control token) follows "agent: " as it is; a SentencePiece
        blank is the space behind the colon.
        """
        text = self.tokenizer.decode([first], clean_up_tokenization_spaces=False)
        raw = first in self.control or "\ufffd" in text
        parts = render(
            "lora_guard",
            pair(prompt, "" if raw else text),
            self.tokenizer,
        )
        ids = encode(self.tokenizer, [parts])[0]
        return [*ids, first] if raw else ids

    def _padded(self, sequences: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask, [rows, tokens], padded on the left."""
        texts = {"input_ids": list(sequences)}
        batch = self.tokenizer.pad(texts, padding_side="left", return_tensors="pt")
        batch = batch.to(self.device)
        return batch["input_ids"], batch["attention_mask"]

    # --- chatting ---------------------------------------------------------------------------------

    def reply(
        self,
        conversations: Sequence[Messages],
        **options: Any,
    ) -> list[GuardedReply]:
        """The finished replies of `stream`, which has the options."""
        *_, replies = self.stream(conversations, **options)
        return replies

    def stream(
        self,
        conversations: Sequence[Messages],
        *,
        max_new_tokens: int,
        guard_every: int = 16,
        stop_at: float | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
        progress: bool = True,
    ) -> Iterator[list[GuardedReply]]:
        """Reply to conversations, one batch, the guard reading along.

        Yields the same replies after every check, so that what is shown of them has been judged
        (where the guard was trained on pairs); the last check has them all finished. A conversation
        that the chat model has no room for gets an `error`, and the others their replies.

        Args:
            guard_every: judge at every so many tokens, and at the last one.
            stop_at: a reply ends at the first judged token with an unsafe probability above it.
                Where the guard was trained on prompts, a prompt above it gets no reply.
            temperature: 0 is greedy.
            seed: row i draws with seed + i, whatever the other rows do.

        Raises:
            UserError: an option is out of range, or something is no conversation at all.
        """
        self._check_options(max_new_tokens, guard_every, stop_at, temperature)
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        rows = self._rows(conversations, max_new_tokens, seed)
        replies = [row.reply for row in rows]
        self._judge_prompts(rows, stop_at)
        yield replies
        rows = [row for row in rows if not row.reply.finish_reason]
        chat_cache = BatchCache(self.model.config, len(rows), self.device)
        guard_cache = BatchCache(self.trunk.config, len(rows), self.device)
        if rows:
            chat_cache.append(*self._padded([row.chat_ids for row in rows]))
        quiet = not (progress and is_main_process())
        with tqdm(total=max_new_tokens, unit="token", disable=quiet) as bar:
            left = max_new_tokens
            while rows:
                count = min(guard_every, left)
                left -= count
                self._write(chat_cache, rows, count, temperature)
                for row in rows:
                    if left == 0 and not row.reply.finish_reason:
                        row.reply.finish_reason = "length"
                if "pair" in self.inputs:
                    self._judge(guard_cache, rows, stop_at)
                bar.update(count)
                yield replies
                still = unfinished(rows)
                rows = [rows[i] for i in still]
                chat_cache.keep(still)

    def _check_options(
        self, max_new_tokens: int, guard_every: int, stop_at: float | None, temperature: float
    ) -> None:
        if min(max_new_tokens, guard_every) < 1:
            raise UserError("--max-new-tokens and --guard-every must be 1 or more")
        if temperature < 0 or not 0 <= (stop_at or 0) <= 1:
            raise UserError("expected --temperature of 0 or more, --stop-at from 0 to 1")
        if max_new_tokens >= self.room:
            raise UserError(f"--max-new-tokens {max_new_tokens}: the model has {self.room} tokens")
        if stop_at is not None and "pair" not in self.inputs:
            trained = ", ".join(self.inputs)
            raise UserError(f"--stop-at: this guard was trained on {trained}, not on pairs")
        if not self.tokenizer.chat_template:
            raise UserError(f"{self.folder}: its tokenizer has no chat template")

    def _rows(
        self, conversations: Sequence[Messages], max_new_tokens: int, seed: int
    ) -> list[ReplyRow]:
        """One row a conversation; what cannot be replied to is finished with its error."""
        rows = []
        for i, conversation in enumerate(conversations):
            messages = check_messages(conversation, f"conversation {i}")
            generator = torch.Generator(self.device).manual_seed(seed + i)
            row = ReplyRow(
                GuardedReply(),
                last_turns(messages)[0] or "",
                generator,
            )
            rows.append(row)
            try:
                row.chat_ids = self.chat_ids(messages)
                needed = len(row.chat_ids) + max_new_tokens
                if needed > self.room:
                    said = f"need {needed} tokens, the model has {self.room}"
                    raise UserError(f"prompt and --max-new-tokens {said}")
            except UserError as error:
                row.reply.error = str(error)
                row.reply.finish_reason = "error"
        return rows

    def _judge_prompts(
        self,
        rows: Sequence[ReplyRow],
        stop_at: float | None,
    ) -> None:
        """Where the guard was trained on prompts it judges them before anything is written."""
        if "prompt" not in self.inputs:
            return
        rows = [row for row in rows if row.reply.error is None]
        verdicts = self.judge_texts([pair(row.prompt) for row in rows])
        for row, verdict in zip(rows, verdicts, strict=True):
            row.note(verdict, stop_at)

    def _write(
        self, cache: BatchCache, rows: Sequence[ReplyRow], count: int, temperature: float
    ) -> None:
        """Add the next `count` tokens to each reply, by stock `generate`; pads follow an EOS."""
        drawn = []
        if temperature > 0:
            drawn.append(DrawByRow(temperature, [row.generator for row in rows]))
        with self.lock:
            ids = self.model.generate(
                cache.ids,
                attention_mask=cache.mask,
                past_key_values=cache.states,
                max_new_tokens=count,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_k=None,
                top_p=None,
                logits_processor=drawn,
                eos_token_id=sorted(self.eos) or None,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        new = ids[:, cache.ids.shape[1] :]
        cache.append(new, torch.ones_like(new))
        for row, written in zip(rows, new.tolist(), strict=True):
            row.take(written, self.eos)
            reply = row.reply
            reply.text = self.tokenizer.decode(reply.token_ids, skip_special_tokens=True)

    def _judge(
        self,
        cache: BatchCache,
        rows: Sequence[ReplyRow],
        stop_at: float | None,
    ) -> None:
        """The guard reads what was written, and stops what is above the threshold."""
        new = [i for i, row in enumerate(rows) if row.piece]  # others ended before they wrote more
        cache.keep(new)
        if not new:
            return
        rows = [rows[i] for i in new]
        chunks = []
        for row in rows:
            chunk = row.piece
            if len(row.reply.token_ids) == len(chunk):  # the first one
                chunk = self.seam(row.prompt, chunk[0]) + chunk[1:]
            chunks.append(chunk)
        scores = self.read(cache, *self._padded(chunks))
        for row, probabilities in zip(rows, scores.tolist(), strict=True):
            row.note(self.verdict(probabilities), stop_at)
        longest = int(cache.mask.sum(1).max())
        if longest > self.card.max_length:
            said = "The guard judges texts longer than the %d tokens that it was trained on."
            logger.warning(said, self.card.max_length)
        cache.keep(unfinished(rows))


def unfinished(rows: Sequence[ReplyRow]) -> list[int]:
    """The places of the replies that go on."""
    return [i for i, row in enumerate(rows) if not row.reply.finish_reason]


def classifier_over(
    chat: PreTrainedModel, base: str, card: LoraCard, code: dict[str, bool]
) -> PreTrainedModel:
    """A stock classifier whose layers are those of a chat model: as many of them as the card says.

    Raises:
        UserError: the chat model has fewer layers, or is not built of what its classifier is.
    """
    layers = chat.config.get_text_config().num_hidden_layers
    depth = card.num_hidden_layers
    path = card_path(base)
    if depth is not None and depth > layers:
        raise UserError(f"{path}, field num_hidden_layers: {depth}; {base} has {layers} layers")
    shallow = {} if depth is None else {"num_hidden_layers": depth}
    config = AutoConfig.from_pretrained(
        base,
        num_labels=len(card.labels),
        **shallow,
        **code,
    )
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config, **code)
    trunk = classifier.base_model
    for name, module in chat.base_model.named_children():
        if isinstance(module, nn.ModuleList):
            module = module[: len(getattr(trunk, name))]
        setattr(trunk, name, module)
    if any(parameter.is_meta for parameter in trunk.parameters()):
        raise UserError(f"{base}: {type(chat).__name__} shares no layers with its classifier")
    classifier.score.to_empty(device=chat.device)
    return classifier
