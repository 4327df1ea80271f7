"""The chat template of a classifier: stock consumers see the ids that it was trained on."""

import families
import pytest
from bases import gpt2_tokenizer, roberta_tokenizer
from conftest import TOKENIZERS
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from common.conversation import pair
from common.templates import control_ids, encode, render
from common.templates.chat import EXAMPLES, chat_template_of


def pieces_tokenizer():
    return families.pieces([], "<s>", "</s>")


def llama2_tokenizer():
    """Here a normalizer, and not the pre-tokenizer, writes the blank that begins a text."""
    tokenizer = pieces_tokenizer()
    backend = tokenizer.backend_tokenizer
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    return tokenizer


KINDS = {
    **TOKENIZERS,
    "pieces": pieces_tokenizer,
    "llama2": llama2_tokenizer,
    "roberta": roberta_tokenizer,
    "gpt2": gpt2_tokenizer,
}


@pytest.fixture(scope="module", params=KINDS)
def own(request):
    """Each kind of tokenizer with the chat template of a guard in the place of a chat model's."""
    tokenizer = KINDS[request.param]()
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
    tokenizer.chat_template = chat_template_of("beavertails", tokenizer)
    return tokenizer


def seen(tokenizer, messages) -> list[int]:
    """What a server gives the model."""
    return tokenizer.apply_chat_template(messages, return_dict=False)


def trained(tokenizer, messages) -> list[int]:
    (ids,) = encode(tokenizer, [render("beavertails", messages, tokenizer)])
    return ids


def test_messages_are_seen_as_they_were_trained(own):
    """Also by a server that writes the text first and tokenizes it then."""
    for messages in EXAMPLES:
        ids = trained(own, messages)
        assert seen(own, messages) == ids
        text = own.apply_chat_template(messages, tokenize=False)
        assert own(text, add_special_tokens=False)["input_ids"] == ids


@settings(max_examples=40, deadline=None)
@given(question=st.text(max_size=30), answer=st.text(max_size=30))
def test_any_text_is_seen_as_it_was_trained(own, question, answer):
    """But for text that spells control tokens, which `load_guard` alone keeps from becoming them."""
    assume(not any(0xD800 <= ord(character) < 0xE002 for character in question + answer))
    plain = own(question + " " + answer, add_special_tokens=False)["input_ids"]
    assume(not set(plain) & control_ids(own))
    messages = pair(question, answer)
    assert seen(own, messages) == trained(own, messages)


@pytest.mark.parametrize(
    "messages",
    [pair("Why?"), pair(None, "So."), [*pair("Why?", "So."), *pair("And?")]],
    ids=["no answer", "no question", "a question last"],
)
def test_what_the_guard_does_not_judge_is_refused(own, messages):
    with pytest.raises(TemplateError):
        seen(own, messages)


PARTS = {  # what is judged: conversations, and those that are refused
    "prompt": ([pair("Why?"), [*pair("Hi", "Ho"), *pair("Why?")]], [pair("Why?", "So.")]),
    "response": ([pair(None, "So."), pair("Why?", "So.")], [pair("Why?")]),
}


@pytest.mark.parametrize("judge", PARTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_or_a_response_alone_is_seen_as_it_was_trained(kind, judge):
    tokenizer = KINDS[kind]()
    template = f"beavertails_{judge}"
    tokenizer.chat_template = chat_template_of(template, tokenizer, judge)
    judged, refused = PARTS[judge]
    for messages in judged:
        (ids,) = encode(tokenizer, [render(template, messages, tokenizer)])
        assert seen(tokenizer, messages) == ids
    for messages in refused:
        with pytest.raises(TemplateError):
            seen(tokenizer, messages)


def test_a_tokenizer_that_no_text_serves_gets_none(make_tokenizer):
    """What it puts around a text is a plain word to it when it is written: nothing is claimed."""
    backend = make_tokenizer("wordpiece").backend_tokenizer
    frame = [("##s", backend.token_to_id("##s"))]
    backend.post_processor = processors.TemplateProcessing(single="##s $A", special_tokens=frame)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    assert chat_template_of("beavertails", tokenizer) is None
