"""The layers below the first adapter, run once for a row instead of every time that it is trained
on.

They are frozen and have no dropout, so what they make of a row is the same in every step of every
arm.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from formats import Batch, Row, tree_batch
from torch import nn
from transformers import PreTrainedModel

from common.prefix import tree

# what enters their first layer is what `inputs_embeds` holds
FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
CHUNK, ROOM = 32, 4 * 2**30  # rows that are computed together; bytes that are kept


class Trunk:
    """What the first `depth` layers of a model make of rows.

    Rows are computed in chunks that depend on `sequences` alone, so that a run that goes on after a
    kill gets the very same numbers.
    """

    def __init__(self, model: PreTrainedModel, depth: int, sequences: Sequence[list[int]]):
        self.model, self.depth, self.layers = model, depth, model.base_model.layers
        ordered = sorted(set(map(tuple, sequences)))
        self.chunks = [ordered[i : i + CHUNK] for i in range(0, len(ordered), CHUNK)]
        self.chunk_of = {ids: number for number, chunk in enumerate(self.chunks) for ids in chunk}
        self.known: dict[int, tuple[torch.Tensor, dict[tuple[int, ...], list[int]]]] = {}

    @classmethod
    def of(
        cls, model: PreTrainedModel, last_layers: int | None, sequences: Sequence[list[int]]
    ) -> "Trunk | None":
        """A trunk below the last layers, or None where there is none, or it cannot be kept."""
        config = model.config.get_text_config()
        depth = config.num_hidden_layers - (last_layers or config.num_hidden_layers)
        fits = sum(map(len, sequences)) * config.hidden_size * model.dtype.itemsize < ROOM
        plain = config.model_type in FAMILIES and config._attn_implementation == "sdpa"
        plain = (
            plain
            and not getattr(config, "sliding_window", None)
            and not getattr(config, "attention_dropout", 0)
        )
        quantized = getattr(model, "is_loaded_in_4bit", False)
        return (
            cls(model, depth, sequences) if depth > 0 and fits and plain and not quantized else None
        )

    def learn(self, rows: Sequence[Row]) -> None:
        """Compute the chunks of rows that are not known yet. Not within `replaced`."""
        for number in sorted(
            {self.chunk_of[tuple(row["input_ids"])] for row in rows} - set(self.known)
        ):
            chunk = [list(ids) for ids in self.chunks[number]]
            batch = tree_batch([{"input_ids": ids, "labels": [-100] * len(ids)} for ids in chunk])
            paths = dict(zip(self.chunks[number], tree(chunk)[2], strict=True))
            self.known[number] = self._states(batch), paths

    @torch.no_grad()
    def _states(self, batch: Batch) -> torch.Tensor:
        """What enters layer `depth`, of shape (tokens, hidden), on the CPU."""
        seen: list[torch.Tensor] = []
        hook = self.layers[self.depth].register_forward_pre_hook(
            lambda _, args: seen.append(args[0])
        )
        inputs = {
            name: batch[name].to(self.model.device)
            for name in ("input_ids", "position_ids", "attention_mask")
        }
        with _passing(self.layers[self.depth :]):
            self.model.base_model(**inputs, use_cache=False)
        hook.remove()
        return seen[0][0].cpu()

    def batch(self, rows: Sequence[Row]) -> Batch:
        """`tree_batch` with inputs_embeds of shape (1, tokens, hidden) for the layers that are
        left.
        """
        batch = tree_batch(rows)
        embeds = torch.empty(
            batch["input_ids"].shape[1], self.model.config.get_text_config().hidden_size
        )
        embeds = embeds.to(self.model.dtype)
        for row, path in zip(rows, tree([row["input_ids"] for row in rows])[2], strict=True):
            ids = tuple(row["input_ids"])
            states, paths = self.known[self.chunk_of[ids]]
            embeds[path] = states[paths[ids]]
        return batch | {"inputs_embeds": embeds[None]}

    def replaced(self):
        """A context in which the trunk's layers hand on what they are given."""
        return _passing(self.layers[: self.depth])


@contextmanager
def _passing(layers: Sequence[nn.Module]) -> Iterator[None]:
    for layer in layers:
        layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
