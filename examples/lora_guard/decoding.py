"""One batch of replies with a guard reading along: the key/value caches, the decode loop, the
sampling.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import DynamicCache, TemperatureLogitsWarper, TopPLogitsWarper

if TYPE_CHECKING:
    from riding import GuardedChat

ADAPTER, BASE = "guard", "__base__"  # PEFT's names of a row's kind in a mixed-adapter batch


@dataclass
class GuardedReply:
    """A reply and what the guard said of it, token by token. What was not trained, or had nothing
    to judge, is None.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)  # what was shown; without EOS
    prompt_unsafe: float | None = None  # before anything was written
    # (tokens seen, unsafe probability)
    trace: list[tuple[int, float]] = field(default_factory=list)
    response_unsafe: float | None = None  # of the pair, at the last token
    categories: dict[str, float] = field(default_factory=dict)  # of the last judgement
    # tokens shown before the guard stopped the reply; 0: the prompt was refused
    stopped_after: int | None = None
    finish_reason: str = ""  # eos | length | stopped


@dataclass
class Row:
    """A reply while it is written."""

    index: int
    prompt: str  # what the guard sees: the last user turn
    chat_ids: list[int]
    start: list[int]  # the guard's ids before the first token
    seam: list[int] = field(default_factory=list)  # the guard's ids up to the first token
    seen: int = 0  # tokens judged
    reply: GuardedReply = field(default_factory=GuardedReply)

    def guard_ids(self) -> list[int]:
        return self.seam + self.reply.token_ids[1:] if self.reply.token_ids else self.start


class Lanes:
    """A KV cache whose rows grow by chunks of unlike length, can be set back, and are dropped when
    no longer named.

    Chunks are padded on the left, so that every row's newest token is the last one. Pads and tokens
    that were taken back stay in the cache, masked; position ids count what is not masked.
    """

    def __init__(self, config: Any, device: torch.device):
        self.cache, self.device = DynamicCache(config=config), device
        self.fed: dict[int, list[int]] = {}
        self.mask = torch.zeros(0, 0, dtype=torch.bool, device=device)

    def inputs(self, targets: dict[int, list[int]]) -> dict[str, Any]:
        """Model inputs that bring each row from what the cache holds to its target ids, at least
        one token each.

        Args:
            targets: the whole ids of each row by its key. Rows that are not named are dropped for
            good.
        """
        if not self.fed:
            self.fed = {key: [] for key in targets}
            self.mask = self.mask.new_zeros(len(targets), 0)
        elif list(targets) != list(self.fed):
            order = {key: i for i, key in enumerate(self.fed)}
            rows = torch.tensor([order[key] for key in targets], device=self.device)
            self.cache.batch_select_indices(rows)
            self.mask, self.fed = self.mask[rows], {key: self.fed[key] for key in targets}
        kept = [min(_common(self.fed[key], ids), len(ids) - 1) for key, ids in targets.items()]
        if any(n < len(ids) for n, ids in zip(kept, self.fed.values(), strict=True)):
            self.mask &= self.mask.cumsum(1) <= torch.tensor(kept, device=self.device)[:, None]
        self.fed = {key: list(ids) for key, ids in targets.items()}
        chunks = [ids[n:] for n, ids in zip(kept, targets.values(), strict=True)]
        width = max(map(len, chunks))
        ids = torch.tensor(
            [[0] * (width - len(chunk)) + chunk for chunk in chunks], device=self.device
        )
        new = torch.tensor(
            [[i >= width - len(chunk) for i in range(width)] for chunk in chunks],
            device=self.device,
        )
        self.mask = torch.cat([self.mask, new], 1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
        mask = self.mask.long()
        cache = {"past_key_values": self.cache, "use_cache": True}
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **cache}


class Ride:
    """The decode loop over one batch."""

    def __init__(
        self,
        chat: "GuardedChat",
        rows: Sequence[Row],
        every: int,
        stop_at: float | None,
    ):
        self.chat, self.rows, self.every, self.stop_at = chat, rows, every, stop_at
        self.rides = "pair" in chat.inputs
        self.mixed = self.rides and every == 1
        self.chat_lanes = Lanes(chat.model.config, chat.device)
        self.guard_lanes = self.chat_lanes if self.mixed else Lanes(chat.trunk.config, chat.device)

    @torch.inference_mode()
    def run(
        self, max_new_tokens: int, draw: Callable[[list[int], torch.Tensor], list[int]], bar: tqdm
    ) -> Iterator[None]:
        """Fill in the replies of all rows; ends as soon as every row has ended. Yields after every
        check.
        """
        judged = self.mixed or "prompt" in self.chat.inputs
        writing, logits = self.turn(list(self.rows), list(self.rows) if judged else [])
        yield
        waiting: list[Row] = []  # written to their end, which the next check judges
        for n in range(1, max_new_tokens + 1):
            if not writing:
                break
            for row, token in zip(
                writing, draw([row.index for row in writing], logits), strict=True
            ):
                if token in self.chat.eos:
                    row.reply.finish_reason = "eos"  # the guard never sees it
                    continue
                row.reply.token_ids.append(token)
                row.seam = row.seam or self.chat.seam(row.prompt, token)
                row.reply.finish_reason = "length" if n == max_new_tokens else ""
            bar.update()
            waiting += [
                row
                for row in writing
                if row.reply.finish_reason and len(row.reply.token_ids) > row.seen
            ]
            writing = [row for row in writing if not row.reply.finish_reason]
            check = n % self.every == 0 or not writing
            due = [*writing, *waiting] if self.rides and check else []
            waiting = [] if due else waiting
            writing, logits = self.turn(writing, due)
            if check:
                yield

    def turn(self, writing: list[Row], due: list[Row]) -> tuple[list[Row], torch.Tensor | None]:
        """The guard reads the rows that are due; the chat moves those on that still write.

        Returns:
            The rows that still write and their next-token logits [rows, vocabulary].
        """
        chat, logits = self.chat, None
        guarded = {~row.index: row.guard_ids() for row in due}  # the other keys of the same lanes
        written = {row.index: row.chat_ids + row.reply.token_ids for row in writing}
        if self.mixed and written:
            inputs = self.chat_lanes.inputs(written | guarded)
            logits, scores = chat.mixed_pass(
                inputs, [BASE] * len(written) + [ADAPTER] * len(guarded)
            )
            self.judge(due, scores[len(written) :])
            on = [i for i, row in enumerate(writing) if row.reply.stopped_after is None]
            return [writing[i] for i in on], logits[on]
        if due:
            self.judge(due, chat.guard_pass(self.guard_lanes.inputs(guarded)))
        writing = [row for row in writing if row.reply.stopped_after is None]
        if writing:
            logits = chat.chat_pass(
                self.chat_lanes.inputs({row.index: written[row.index] for row in writing})
            )
        return writing, logits

    def judge(self, rows: Sequence[Row], scores: torch.Tensor) -> None:
        """Take down what the guard says; stop what is above the threshold."""
        for row, probabilities in zip(rows, scores.tolist(), strict=True):
            reply, seen = row.reply, len(row.reply.token_ids)
            if not seen and "prompt" not in self.chat.inputs:
                continue  # the cache was filled, nothing was asked
            unsafe, reply.categories = self.chat.verdict(probabilities)
            row.seen = seen
            if seen:
                reply.trace.append((seen, unsafe))
                reply.response_unsafe = unsafe
            else:
                reply.prompt_unsafe = unsafe
            if self.stop_at is not None and unsafe > self.stop_at:
                reply.stopped_after, reply.finish_reason = seen, "stopped"


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    if b[: len(a)] == a:  # the usual case, at the speed of C
        return len(a)
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def greedy(_rows: list[int], logits: torch.Tensor) -> list[int]:
    return logits.argmax(-1).tolist()


def sampler(
    temperature: float, top_p: float, seed: int, rows: int, device: torch.device
) -> Callable[[list[int], torch.Tensor], list[int]]:
    """Draws tokens, each row from a generator of its own: what one row draws does not hang on when
    others end.
    """
    generators = [torch.Generator(device).manual_seed(seed + i) for i in range(rows)]
    warpers = (TemperatureLogitsWarper(float(temperature)), TopPLogitsWarper(float(top_p)))

    def draw(rows: list[int], logits: torch.Tensor) -> list[int]:
        logits = logits.float()
        for warper in warpers:
            logits = warper(None, logits)
        weights = logits.softmax(-1)
        return [
            int(torch.multinomial(w, 1, generator=generators[i]))
            for i, w in zip(rows, weights, strict=True)
        ]

    return draw
