"""Tokenizers and models that do not agree are made to fit, or refused in one line before anything
is trained.
"""

import pytest
import torch
from bases import BASES, DECODERS, ENCODERS
from scripts import module
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from common import fit
from common.conversation import UserError
from common.engines import Decoding, TransformersEngine
from guards import load_guard
from guards.classifier import ClassifierGuard

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
    return AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, output_loading_info=True
    )


@pytest.mark.parametrize("family", LIMITS)
def test_positions_are_as_many_tokens_as_a_text_can_have(family, tmp_path):
    """A learned table is used up to its last row and not beyond; without one a longer text works as
    well.
    """
    more, limit = LIMITS[family]
    model, _ = classifier(BASES[family](tmp_path, **more))
    model.config.pad_token_id = model.config.pad_token_id or 0
    assert fit.positions(model) == limit
    with torch.inference_mode():
        model(input_ids=torch.full((1, 48), 7))
        if family in ("bert", "roberta", "gpt2"):
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.full((1, 49), 7))
        else:
            model(input_ids=torch.full((1, 49), 7))


def test_a_length_beyond_the_positions_is_one_line(tmp_path):
    model, _ = classifier(BASES["bert"](tmp_path, max_position_embeddings=128))
    fit.check_length(model, 128)
    with pytest.raises(
        UserError, match="--cutoff_len 129: the model sees 128 tokens; lower it to that"
    ):
        fit.check_length(model, 129, "--cutoff_len")


def test_recipes_of_classifiers_look_at_the_positions_first(tmp_path):
    """A BERT of 128 positions and the usual 512 tokens: refused before training, with what to pass
    instead.
    """
    moderation, lora_guard = module("moderation", "train"), module("lora_guard", "train")
    message = "512: the model sees 128 tokens; lower it to that"
    bert = str(BASES["bert"](tmp_path / "bert", max_position_embeddings=128))
    with pytest.raises(UserError, match=f"--max_length {message}"):
        moderation.load_model(moderation.ModelArguments(bert))
    assert moderation.load_model(moderation.ModelArguments(bert, max_length=128))
    gpt2 = str(BASES["gpt2"](tmp_path / "gpt2", n_positions=128))
    with pytest.raises(UserError, match=f"--max-length {message}"):
        lora_guard.load_model(lora_guard.GuardArguments(gpt2, "nowhere"))


def test_a_guard_sees_no_more_than_its_model(tmp_path):
    """Unless told otherwise a guard takes what its model has; told more, it is refused before it
    judges.
    """
    folder = tmp_path / "guard"
    model, _ = classifier(BASES["bert"](tmp_path / "base", max_position_embeddings=48))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tmp_path / "base").save_pretrained(folder)
    options = {"template": "beavertails", "progress": False}
    options |= {"problem_type": "multi_label_classification"}
    guard = load_guard(str(folder), **options)
    assert guard.max_length == 48
    long = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Use two locks. " * 40},
    ]
    assert guard.judge([long])[0].error is None
    with pytest.raises(UserError, match="--max_length 512: the model sees 48 tokens"):
        ClassifierGuard(str(folder), max_length=512, **options)


@pytest.mark.parametrize("family", DECODERS)
def test_a_pad_token_outside_the_embeddings_is_replaced_by_eos(family, tmp_path):
    """An added `<pad>` that the embeddings were never resized for: nothing is padded with it, and
    batches work.
    """
    folder = BASES[family](tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == model.get_input_embeddings().num_embeddings
    prompts = [[5, 6, 7], [5, 6, 7, 8, 9]]
    engine = TransformersEngine(str(folder), tokenizer, progress=False)
    answers = engine.completions(prompts, Decoding(4))
    assert all(one.error is None for one in answers)
    fit.fit_causal_lm(tokenizer, model)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert engine.completions(prompts, Decoding(4)) == answers


def test_tokens_that_the_model_lacks_get_rows(tmp_path):
    """A chat model's own tokens are added to a tokenizer; a model with rows to spare keeps them."""
    folder = BASES["llama"](tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    spare = model.get_input_embeddings().num_embeddings
    fit.grow_embeddings(tokenizer, model)
    assert model.get_input_embeddings().num_embeddings == spare >= len(tokenizer)
    while len(tokenizer) <= spare:
        tokenizer.add_tokens(f"<one more {len(tokenizer)}>")
    fit.grow_embeddings(tokenizer, model)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) > spare
    model(input_ids=torch.tensor([[len(tokenizer) - 1]]))


def test_a_token_outside_the_embeddings_is_named(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(BASES["qwen2"](tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    fit.check_ids([[1, 2], []], tokenizer, model)
    with pytest.raises(
        UserError, match=r"writes '<\|turn\|>' \(id \d+\), for which the model has no embedding"
    ):
        fit.check_ids([[1], tokenizer("<|turn|>")["input_ids"]], tokenizer, model)


def test_a_tokenizer_without_pad_and_eos_is_refused(make_tokenizer, make_classifier):
    tokenizer = make_tokenizer("bpe")
    model = make_classifier(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(UserError, match="no pad token and no EOS"):
        fit.padding_id(tokenizer, model)


@pytest.mark.parametrize("family", BASES)
def test_pooling_is_where_the_score_is_read(family, tmp_path):
    """Changing the last token alone changes a decoder's score; an encoder's `first token` is named
    as such.
    """
    model, _ = classifier(BASES[family](tmp_path))
    assert fit.pooling(model) == ("first token" if family in ENCODERS else "last attended token")


def test_pooling_by_the_mean_is_named(tmp_path):
    model, _ = classifier(BASES["modernbert"](tmp_path, classifier_pooling="mean"))
    assert fit.pooling(model) == "mean of the attended tokens"


FRESH = {
    "bert": ["bert.pooler.dense", "classifier"],
    "roberta": ["classifier.dense", "classifier.out_proj"],
    "deberta": ["pooler.dense", "classifier"],
    "modernbert": ["classifier"],
} | {family: ["score"] for family in DECODERS}


@pytest.mark.parametrize("family", BASES)
def test_fresh_modules_are_those_that_the_checkpoint_lacks(family, tmp_path):
    """They differ from one loading to the next, and nothing else does."""
    folder = BASES[family](tmp_path)
    (one, loading), (other, _) = classifier(folder), classifier(folder)
    fresh = fit.fresh_modules(one, loading["missing_keys"])
    assert fresh == FRESH[family]
    others = dict(other.named_parameters())
    drawn = {
        name for name, tensor in one.named_parameters() if not torch.equal(tensor, others[name])
    }
    assert {name.rpartition(".")[0] for name in drawn} == set(fresh)
