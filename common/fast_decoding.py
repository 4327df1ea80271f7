"""What makes decoding of many prompts fast, whatever the model: nothing is copied, and what they share is run once."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface


def grouped_attention(module, query, key, value, attention_mask, **options):
    """sdpa that never copies grouped keys and values: with a mask, the stock one repeats the whole cache every token.

    Query heads of one group stand where query positions stand, which a single new token leaves free.
    """
    groups, (batch, heads, length, size) = getattr(module, "num_key_value_groups", 1), query.shape
    plain = all(options.get(name) is None for name in ("position_bias", "cache", "s_aux"))
    if length > 1 or groups == 1 or not plain or attention_mask is None or attention_mask.shape[1] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    query = query.reshape(batch, heads // groups, groups, size)
    mask = attention_mask.expand(-1, -1, groups, -1)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=options.get("scaling"))
    return out.reshape(batch, 1, heads, size), None


def grouped_mask(*args, dtype: torch.dtype = torch.float32, **options) -> torch.Tensor | None:
    """sdpa's mask; that of a new token as numbers, into which sdpa would turn it anew in every layer."""
    mask = sdpa_mask(*args, dtype=dtype, **options)
    return mask if mask is None or mask.shape[2] > 1 else torch.where(mask, 0.0, -torch.inf).to(dtype)


class RoomyLayer(DynamicLayer):
    """A cache layer with room ahead, so that a new token is written in place; the stock one copies all before it."""

    room = (torch.empty(0),) * 2

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        start = self.get_seq_length()
        if not self._in_room() or start + key_states.shape[2] > self.room[0].shape[2]:
            self.keys, self.values = super().update(key_states, value_states, *args, **kwargs)
            ahead = max(32, self.keys.shape[2] // 4)
            self.room = tuple(torch.nn.functional.pad(states, (0, 0, 0, ahead)) for states in (self.keys, self.values))
        else:
            for room, states in zip(self.room, (key_states, value_states), strict=True):
                room[:, :, start : start + states.shape[2]] = states
        return self._show(start + key_states.shape[2])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if not self._in_room():
            return super().reorder_cache(beam_idx)
        self.room = tuple(room.index_select(0, beam_idx.to(room.device)) for room in self.room)
        self._show(self.get_seq_length())

    def _in_room(self) -> bool:
        """Whether keys are still a view of the room: other methods replace them."""
        return self.get_seq_length() > 0 and self.keys.data_ptr() == self.room[0].data_ptr()

    def _show(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values = (room[:, :, :length] for room in self.room)
        return self.keys, self.values


def cache_for(model: PreTrainedModel) -> DynamicCache | None:
    """An empty cache with room ahead in layers that see all tokens; None for a model with a cache of its own kind."""
    if not model._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def prefilled(model: PreTrainedModel, prompts: Sequence[list[int]]) -> tuple[DynamicCache | None, int]:
    """A cache of what all prompts begin with, a policy for example, run once; and how many tokens that are."""
    cache, shared = cache_for(model), shared_prefix(prompts, 64)
    # Behind a sliding window padding would count as distance.
    if not shared or cache is None or any(type(layer) is not RoomyLayer for layer in cache.layers):
        return cache, 0
    model(input_ids=torch.tensor([prompts[0][:shared]], device=model.device), past_key_values=cache, logits_to_keep=1)
    cache.batch_repeat_interleave(len(prompts))
    return cache, shared


class PackedLinear(torch.nn.Linear):
    """A float32 layer on a CPU that keeps its weights in MKL's own order, too, for the one token that each row adds.

    MKL otherwise reorders them anew for every token, two thirds of the time with a few dozen rows. Results are those
    of `Linear`. For weights that no longer change.
    """

    packed: tuple[torch.Size, int, torch.Tensor] | None = None  # for inputs of this shape; rows; weights

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return super().forward(input)
        if self.packed is None or self.packed[0] != input.shape:
            rows = input.numel() // self.in_features
            if input.dim() < 3 or input.shape[-2] > 1 or not 1 < rows <= 128:
                return super().forward(input)
            self.packed = (input.shape, rows, torch.ops.mkl._mkl_reorder_linear_weight(self.weight, rows))
        _, rows, packed = self.packed
        return torch.ops.mkl._mkl_linear.default(input, packed, self.weight, self.bias, rows)


def pack_linear(model: PreTrainedModel) -> None:
    """Turns the linear layers of a float32 model on a CPU into `PackedLinear`, where memory holds them twice."""
    layers = [module for module in model.modules() if type(module) is torch.nn.Linear]
    size = sum(layer.weight.nbytes for layer in layers)
    fits = psutil.virtual_memory().available > 2 * size
    if (
        fits
        and torch.backends.mkl.is_available()
        and {(m.weight.dtype, m.weight.device.type) for m in layers} == {(torch.float32, "cpu")}
    ):
        for layer in layers:
            layer.__class__ = PackedLinear


@contextmanager
def without_collector() -> Iterator[None]:
    """No garbage collection: a tenth of the time of small steps goes into looking through a whole program's objects."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def shared_prefix(prompts: Sequence[list[int]], worth: int = 16) -> int:
    """How many tokens all prompts begin with, leaving at least one of each; 0 where it is not worth a pass."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # the two that differ first
    limit = min(len(first), len(last), *map(len, prompts)) - 1
    length = next((i for i in range(limit) if first[i] != last[i]), max(limit, 0))
    return length if length >= worth else 0


AttentionInterface.register("sdpa_grouped", grouped_attention)
AttentionMaskInterface.register("sdpa_grouped", grouped_mask)
