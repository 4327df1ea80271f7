"""What a training step must compute and keep, counted from a model's configuration alone."""

from collections.abc import Sequence

from transformers import PreTrainedConfig


def layer_weights(config: PreTrainedConfig) -> int:
    """The weights of one layer's matrices: attention with grouped heads, and a gated MLP."""
    hidden = config.hidden_size
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or hidden // heads
    query = hidden * heads * width
    key_and_value = 2 * hidden * config.num_key_value_heads * width
    mlp = 3 * hidden * config.intermediate_size
    return 2 * query + key_and_value + mlp


def parameters(config: PreTrainedConfig) -> int:
    """The parameters of a classifier: embeddings and layers, and no language-model head."""
    embeddings = config.vocab_size * config.hidden_size
    return embeddings + config.num_hidden_layers * layer_weights(config)


def training_flops(
    config: PreTrainedConfig,
    lengths: Sequence[int],
    trains_all: bool,
) -> float:
    """Model FLOPs of forward and backward over rows of these lengths.

    6 N + 12 L H Q T a token, with N weights (embeddings apart), L layers of H heads of size Q, and
    T tokens a row: appendix B of PaLM (arXiv 2204.02311). What checkpointing computes again does
    not count. Frozen weights take no gradient of their own: 4 N.
    """
    layers = config.num_hidden_layers
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    tokens = sum(lengths)
    squares = sum(length * length for length in lengths)
    a_weight = 6 if trains_all else 4
    matrices = a_weight * layers * layer_weights(config) * tokens
    attention = 12 * layers * heads * width * squares
    return matrices + attention


def memory_gb(
    config: PreTrainedConfig,
    tokens: int,
    bytes_a_parameter: float,
    bytes_a_value: float,
    bytes_outside: float | None = None,
    has_head: bool = False,
) -> float:
    """What docs/scaling.md counts, in 10⁹ bytes: weights with what belongs to them, and hidden
    states.

    Args:
        tokens: of a pass, with padding.
        bytes_a_parameter: the line "full fine-tune" or "LoRA" of its table.
        bytes_a_value: of each layer's hidden state: 4 or 2 with checkpointing, 42 to 119 without.
        bytes_outside: of embeddings and output layer, where they are kept otherwise.
        has_head: whether there is an output layer of the vocabulary's size.
    """
    embeddings = config.vocab_size * config.hidden_size
    layers = parameters(config) - embeddings
    matrices = embeddings
    if has_head and not config.tie_word_embeddings:
        matrices *= 2
    if bytes_outside is None:
        bytes_outside = bytes_a_parameter
    kept = layers * bytes_a_parameter + matrices * bytes_outside
    values = tokens * config.hidden_size * config.num_hidden_layers
    return (kept + values * bytes_a_value) / 1e9
