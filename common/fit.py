"""The one place where a tokenizer and a model are made to fit.

Models and tokenizers on the hub do not always agree: a `<pad>` was added and the embeddings never
resized, the tokenizer promises more tokens than the model has positions, or the checkpoint lacks
modules that are then drawn anew. Each of these is found here before anything is trained, and not by
an IndexError afterwards.
"""

from collections.abc import Iterable, Sequence

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from common.conversation import UserError
from common.templates import control_ids

# learned positions, as BERT, RoBERTa and GPT-2 name them
POSITION_TABLES = ("position_embeddings", "wpe")


# --- pad token and embeddings ---------------------------------------------------------------------


def fit_classifier(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
) -> None:
    """A pad token that never ends a text, and embeddings for all of the tokenizer's tokens.

    transformers reads a decoder's score at the rightmost id that is not `pad_token_id`. With pad =
    EOS it would skip the EOS that the template ends with. So: keep a pad token of its own; else
    take a special token that no text can hold and no text ends with; else add `<pad>`, as the
    paper's code does. (Encoders pool at their first token.)
    """
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        taken = {tokenizer.eos_token_id, tokenizer.bos_token_id}
        taken.update(tokenizer("")["input_ids"])  # what the tokenizer itself puts around a text
        pad = "<pad>"
        for token_id in sorted(control_ids(tokenizer) - taken, reverse=True):
            token = tokenizer.added_tokens_decoder[token_id]
            if token.special:
                pad = token.content
        tokenizer.add_special_tokens({"pad_token": pad})
    grow_embeddings(tokenizer, model)
    model.config.pad_token_id = tokenizer.pad_token_id


def fit_causal_lm(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
) -> None:
    """A pad token that the model has an embedding for.

    Pads are masked, and no label falls on them, so that any token serves: its own, or else EOS. An
    added `<pad>` that the embeddings were never resized for is left out, because an adapter does
    not hold embeddings.

    Raises:
        UserError: there is neither.
    """
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding_id(tokenizer, model))


def padding_id(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
) -> int:
    """The id to pad with where pads are masked: the pad token's, or EOS where the model has no
    embedding for that.

    Raises:
        UserError: the tokenizer has neither.
    """
    size = model.get_input_embeddings().num_embeddings
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None and token < size:
            return token
    what = "no pad token and no EOS token that the model knows"
    raise UserError(f"{tokenizer.name_or_path}: {what}")


def grow_embeddings(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
) -> None:
    """New rows for the tokens that the model lacks; a model that has more rows than tokens keeps
    them.
    """
    size = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > size:
        # a pad's row is never attended to
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def check_ids(
    sequences: Iterable[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
) -> None:
    """Refuse a text with a token that the model has no embedding for.

    Raises:
        UserError: there is such a token; the message names it.
    """
    size = model.get_input_embeddings().num_embeddings
    for ids in sequences:
        highest = max(ids, default=0)
        if highest >= size:
            token = tokenizer.convert_ids_to_tokens(highest)
            what = f"the tokenizer writes {token!r} (id {highest})"
            hint = "resize its embeddings and save it, or use the tokenizer that it was made with"
            raise UserError(f"{what}, for which the model has no embedding: it has {size}; {hint}")


# --- positions ------------------------------------------------------------------------------------


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens of a text the model can see; None where it knows no end (relative positions,
    ALiBi).

    RoBERTa counts from behind its pad token's id: of its 514 rows a text can use 512.
    """
    for name, module in model.named_modules():
        own_name = name.rpartition(".")[2]
        if own_name in POSITION_TABLES and isinstance(module, nn.Embedding):
            if module.padding_idx is None:
                return module.num_embeddings
            return module.num_embeddings - module.padding_idx - 1
    return config_positions(model.config)


def config_positions(config: PreTrainedConfig) -> int | None:
    """`positions` from the configuration alone, before the weights are loaded; for decoders."""
    config = config.get_text_config()
    # DeBERTa: distances in buckets, of which the last has no end
    if getattr(config, "relative_attention", False):
        return None
    return getattr(config, "max_position_embeddings", None)


def check_depth(config: PreTrainedConfig, layers: int | None, flag: str) -> None:
    """Refuse more layers than a base has: the rest would be drawn at random and trained from there.

    Raises:
        UserError: it is not between 1 and the base's number; None is that number.
    """
    there = config.get_text_config().num_hidden_layers
    if layers is not None and not 1 <= layers <= there:
        raise UserError(f"{flag} {layers}: the base has {there}")


def check_length(model: PreTrainedModel, max_length: int, flag: str = "--max_length") -> None:
    """Refuse texts that are longer than what the model sees.

    Raises:
        UserError: `max_length` is more than its positions; the message names `flag` and the number
            that fits.
    """
    room = positions(model)
    if room is not None and max_length > room:
        raise UserError(f"{flag} {max_length}: the model sees {room} tokens; lower it to that")


# --- what a classifier reads, and what its checkpoint lacked --------------------------------------


def pooling(model: PreTrainedModel) -> str:
    """Where a classifier reads its score: at the last attended token, at the first token, or as a
    mean of all.
    """
    score = getattr(model, "score", None)
    if isinstance(score, nn.Module):  # decoders, all of transformers' own
        return "last attended token"
    if getattr(model.config, "classifier_pooling", "cls") == "mean":  # ModernBERT
        return "mean of the attended tokens"
    return "first token"


def fresh_modules(model: PreTrainedModel, missing: Iterable[str]) -> list[str]:
    """The modules whose weights were drawn anew, because the checkpoint lacked them, by their full
    names.

    A classification head is always among them; an encoder's pooler often is.

    Args:
        missing: `missing_keys` of `from_pretrained(…, output_loading_info=True)`.
    """
    owners = {key.rpartition(".")[0] for key in missing}
    return [name for name, _ in model.named_modules() if name in owners]


def modules_to_save(fresh: Sequence[str]) -> list[str] | None:
    """The fresh modules that PEFT has to be told of; a head it trains and saves without being told.

    LoRA would leave the others as they were drawn, and an adapter without them is another model.
    """
    heads = ("classifier", "score")
    others = [name for name in fresh if not name.startswith(heads)]
    return others or None
