"""Tokenizers and models that do not agree are made to fit, or refused in one line."""

import pytest
import torch
from bases import BASES, DECODERS, ENCODERS
from checks import user_error
from scripts import module
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from common import fit
from common.conversation import pair
from common.engines import Decoding, TransformersEngine
from guards import load_guard

LIMITS = {  # a model's own number, and how many tokens a text can have then
    "bert": ({"max_position_embeddings": 48}, 48),
    # its table begins behind the pad token's id, 1
    "roberta": ({"max_position_embeddings": 50}, 48),
    "gpt2": ({"n_positions": 48}, 48),
    "modernbert": ({"max_position_embeddings": 48}, 48),
    "llama": ({"max_position_embeddings": 48}, 48),
    "deberta": ({"max_position_embeddings": 48}, None),  # distances in buckets
}


def classifier(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)


@pytest.mark.parametrize("family", LIMITS)
def test_positions_are_as_many_tokens_as_a_text_can_have(family, tmp_path):
    """A learned table is used up to its last row and not beyond."""
    numbers, limit = LIMITS[family]
    model = classifier(BASES[family](tmp_path, **numbers))
    assert fit.positions(model) == limit
    model(input_ids=torch.full((1, 48), 7))
    if family in ("bert", "roberta", "gpt2"):
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, 49), 7))


def test_moderation_refuses_more_tokens_than_the_model_has_positions(tmp_path):
    """The usual 512 tokens: refused before training, with what to pass."""
    train = module("moderation", "train")
    base = str(BASES["bert"](tmp_path, max_position_embeddings=128))
    with user_error("--max_length 512: the model sees 128 tokens"):
        train.load_model(train.ModelArguments(model_name_or_path=base), ["unsafe"])
    fitting = train.ModelArguments(model_name_or_path=base, max_length=128)
    assert train.load_model(fitting, ["unsafe"])


@pytest.mark.parametrize("layers", [0, 3])
def test_moderation_refuses_layers_that_the_base_does_not_have(layers, tmp_path):
    """They would be drawn at random, and trained from there without a word."""
    train = module("moderation", "train")
    base = str(BASES["bert"](tmp_path))
    args = train.ModelArguments(model_name_or_path=base, num_hidden_layers=layers)
    with user_error(f"--num_hidden_layers {layers}: the base has 2"):
        train.load_model(args, ["unsafe"])


def test_lora_guard_refuses_more_tokens_than_the_model_has_positions(tmp_path):
    train = module("lora_guard", "train")
    base = str(BASES["gpt2"](tmp_path, n_positions=128))
    with user_error("--max-length 512: the model sees 128 tokens"):
        args = train.GuardArguments(hf_model_id=base, output_folder="nowhere")
        train.load_model(args, ["unsafe"])


def test_a_guard_sees_no_more_than_its_model(tmp_path):
    """Unless told otherwise a guard takes what its model has; told more, it is refused."""
    base = BASES["bert"](tmp_path / "base", max_position_embeddings=48)
    folder = str(tmp_path / "guard")
    classifier(base).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    options = {"template": "beavertails", "problem_type": "multi_label_classification"}
    guard = load_guard(folder, progress=False, **options)
    assert guard.max_length == 48
    assert guard.judge([pair("Why?", "Use two locks. " * 40)])[0].error is None
    with user_error("--max_length 512: the model sees 48 tokens"):
        load_guard(folder, max_length=512, **options)


@pytest.mark.parametrize("family", DECODERS)
def test_a_pad_token_outside_the_embeddings_is_replaced_by_eos(family, tmp_path):
    """An added `<pad>` that the embeddings were never resized for: batches work all the same."""
    folder = BASES[family](tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    engine = TransformersEngine(str(folder), tokenizer)
    answers = engine.completions([[5, 6, 7], [5, 6, 7, 8, 9]], Decoding(4))
    assert [one.error for one in answers] == [None, None]
    fit.fit_causal_lm(tokenizer, AutoModelForCausalLM.from_pretrained(folder))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_tokens_that_the_model_lacks_get_rows(tmp_path):
    """A model with rows to spare keeps them."""
    folder = BASES["llama"](tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    spare = model.get_input_embeddings().num_embeddings
    fit.grow_embeddings(tokenizer, model)
    assert model.get_input_embeddings().num_embeddings == spare
    tokenizer.add_tokens([f"<one more {i}>" for i in range(spare)])
    fit.grow_embeddings(tokenizer, model)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)


def test_a_token_outside_the_embeddings_is_named(tmp_path):
    folder = BASES["qwen2"](tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer.add_tokens(["<|turn|>"], special_tokens=True)
    fit.check_ids([[1, 2], []], tokenizer, model)
    with user_error(r"'<\|turn\|>'"):
        fit.check_ids([[1], tokenizer("<|turn|>")["input_ids"]], tokenizer, model)


def test_a_tokenizer_without_pad_and_eos_is_refused(make_tokenizer, make_classifier):
    tokenizer = make_tokenizer("bpe")
    model = make_classifier(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token = None
    with user_error("no pad token and no EOS"):
        fit.padding_id(tokenizer, model)


@pytest.mark.parametrize("family", BASES)
def test_pooling_is_where_the_score_is_read(family, tmp_path):
    expected = "first token" if family in ENCODERS else "last attended token"
    assert fit.pooling(classifier(BASES[family](tmp_path))) == expected


def test_pooling_by_the_mean_is_named(tmp_path):
    model = classifier(BASES["modernbert"](tmp_path, classifier_pooling="mean"))
    assert fit.pooling(model) == "mean of the attended tokens"


FRESH = {family: ["score"] for family in DECODERS} | {
    "bert": ["bert.pooler.dense", "classifier"],
    "roberta": ["classifier.dense", "classifier.out_proj"],
    "deberta": ["pooler.dense", "classifier"],
    "modernbert": ["classifier"],
}


@pytest.mark.parametrize("family", BASES)
def test_fresh_modules_are_those_that_the_checkpoint_lacks(family, tmp_path):
    """They differ from one loading to the next."""
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        BASES[family](tmp_path), num_labels=3, output_loading_info=True
    )
    assert fit.fresh_modules(model, loading["missing_keys"]) == FRESH[family]
