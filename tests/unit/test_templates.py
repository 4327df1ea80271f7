"""Templates: reference ids where content is plain, no control token from content ever, cutting,
windows, padding.
"""

import copy
import json

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer

from common.conversation import UserError, pair
from common.fit import fit_classifier
from common.templates import (
    Part,
    control_ids,
    cut,
    encode,
    inline_template,
    render,
    render_chat,
    windows,
)

CONTROL = [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>",  # byte-level BPE
    "<s>", "</s>", "<unk>",  # Unigram
    "[CLS]", "[SEP]", "[PAD]", "[MASK]",  # WordPiece; [UNK] apart, because text may yield it
    "[inst]",  # matched after normalization
]  # fmt: skip
PLAIN = "How do I keep my bicycle? Buy two locks."


def wide(text: str) -> str:
    """`text` in full-width characters, which NFKC folds back."""
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


VARIANTS = [
    variant
    for text in CONTROL
    for variant in (
        text, text[:-2], text[:2], text[2:], text[-1], wide(text), wide(text[0]) + text[1:], text.upper(), text.lower(),
        "\u200b".join(text), f"{text[:2]}\u00ad{text[2:]}", f"\u200b\u200b{text}", text[:5] + text + text[5:],
        f" {text}", f"{text}  ", text + text,
    )
]  # fmt: skip
hostile = st.lists(
    st.sampled_from([*VARIANTS, "<|im_<|im_end|>end|>", "\n", "x"]) | st.text(max_size=3),
    max_size=6,
)
hostile = hostile.map("".join)
plain = st.text(max_size=60) | st.lists(
    st.sampled_from([*PLAIN.split(), "  ", "\n", "é", "中", "🙂", "▁"])
).map("".join)
FORGEABLE = [
    "bpe",
    "unigram",
    "wordpiece",
    "wordpiece-open",
    "wordpiece-normalized",
    "unigram-spaceless",
]


@pytest.fixture(scope="module", params=FORGEABLE)
def forgeable(request, make_tokenizer):
    """The three families, and tokenizers whose normalizer makes control tokens out of other text."""
    family, _, twist = request.param.partition("-")
    tokenizer = make_tokenizer(family)
    backend = tokenizer.backend_tokenizer
    if twist == "open":  # a whole word may be an entry of the vocabulary, such as [SEP]
        backend.normalizer = normalizers.BertNormalizer(lowercase=False)
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    elif twist == "normalized":  # looked for in lower-cased text without zero-width characters
        tokenizer.add_tokens(
            [AddedToken("[inst]", normalized=True, special=True, lstrip=True, rstrip=True)]
        )
    elif twist == "spaceless":
        backend.normalizer = normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Replace(" ", "")]
        )
    return tokenizer


def reference(tokenizer, question: str, answer: str) -> str:
    return (
        f"BEGINNING OF CONVERSATION: USER: {question} ASSISTANT:{answer}{tokenizer.eos_token or ''}"
    )


def encoded(tokenizer, question: str, answer: str, **options) -> list[int]:
    return encode(tokenizer, [render("beavertails", pair(question, answer), tokenizer)], **options)[
        0
    ]


def controls(tokenizer, ids: list[int]) -> list[int]:
    """The control ids in `ids`, by the names that these tests gave them."""
    vocabulary = tokenizer.get_vocab()
    known = {vocabulary[text] for text in [*CONTROL, "<pad>"] if text in vocabulary}
    return [i for i in ids if i in known]


def visible(tokenizer, text: str) -> str:
    """The characters that the model sees of `text`, without white space."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return "".join((normalizer.normalize_str(text) if normalizer else text).split())


def test_golden_parts(tokenizer):
    """The text of the paper's code: no separator after ASSISTANT:, the answer as it is, EOS."""
    parts = render("beavertails", pair("Why? ", " So."), tokenizer)
    assert "".join(part.text for part in parts) == reference(tokenizer, "Why? ", " So.")
    assert parts[:4] == [
        Part("BEGINNING OF CONVERSATION: USER: ", False), Part("Why? ", True), Part(" ASSISTANT:", False),
        Part(" So.", True),
    ]  # fmt: skip
    assert parts[4:] == ([Part(tokenizer.eos_token, False)] if tokenizer.eos_token else [])


def test_last_turns_are_judged(tokenizer):
    messages = [*pair("one", "two"), *pair("three", "four")]
    assert render("beavertails", messages, tokenizer) == render(
        "beavertails", pair("three", "four"), tokenizer
    )


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        ("beavertails", pair("Why?"), "no such turn"),
        ("beavertails", [], "no such turn"),
        ("beavertale", pair("a", "b"), "unknown; the templates are"),
    ],
)
def test_render_refuses(make_tokenizer, template, messages, words):
    with pytest.raises(UserError, match=words):
        render(template, messages, make_tokenizer("bpe"))


@settings(max_examples=100, deadline=None)
@given(question=plain, answer=plain, special=st.booleans())
@example(question="two  spaces   three", answer="\ue000prompt\ue001 ends in a space ", special=True)
@example(question="", answer="", special=True)
def test_plain_text_gives_the_reference_ids(tokenizer, question, answer, special):
    expected = tokenizer(reference(tokenizer, question, answer), add_special_tokens=special)[
        "input_ids"
    ]
    own = tokenizer(reference(tokenizer, PLAIN, PLAIN), add_special_tokens=special)["input_ids"]
    assume(
        controls(tokenizer, expected) == controls(tokenizer, own)
        and tokenizer.unk_token not in question + answer
    )
    assert encoded(tokenizer, question, answer, add_special_tokens=special) == expected


@pytest.mark.parametrize("content", [PLAIN, ' He said "no".\n\tä \\', '"}, {"a": "', "<|im_end|>"])
def test_content_that_is_quoted_as_json(make_tokenizer, content):
    """It stays content, escaped as JSON has it, and cannot end itself."""
    tokenizer, quoting = make_tokenizer("bpe"), inline_template('{"text": {{ text | tojson }}}')
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    wrap = lambda m: [{"role": "user", "content": quoting.render(text=m[0]["content"])}]  # noqa: E731
    parts = render_chat(tokenizer, pair(content), wrap=wrap)
    assert json.loads("".join(part.text for part in parts)) == {"text": content}
    assert [part.is_content for part in parts] == [False, True, False]


def test_no_prompts(tokenizer):
    assert encode(tokenizer, []) == []


@settings(max_examples=200, deadline=None)
@given(question=hostile, answer=hostile)
@example(question="</s>", answer="<|im_<|im_end|>end|>")
@example(question="\u200b" * 40 + "[inst]", answer="[SEP]" * 40)
@example(question="a ＜/s＞", answer="[S\u200bEP] [SEP")
def test_content_never_becomes_control(forgeable, question, answer):
    """The control ids are those of a harmless pair, and of the content no character is lost."""
    ids = encoded(forgeable, question, answer)
    assert controls(forgeable, ids) == controls(forgeable, encoded(forgeable, PLAIN, PLAIN))
    assert forgeable.eos_token is None or ids[-1] == forgeable.eos_token_id
    # there nothing but removal helps
    spaceless = "Replace" in str(forgeable.backend_tokenizer.normalizer)
    if not spaceless and (forgeable.unk_token_id not in ids or forgeable.unk_token != "[UNK]"):
        seen = forgeable.decode([i for i in ids if i not in control_ids(forgeable)])
        sent = reference(forgeable, question, answer).removesuffix(forgeable.eos_token or "")
        assert "".join(seen.split()) == visible(forgeable, sent)


@pytest.mark.parametrize(
    ("forgeable", "content"),
    [
        ("wordpiece-open", "a [S\u200bEP] b"),
        ("unigram", "a ＜/s> b"),
        ("wordpiece-normalized", "\u200b\u200b[INST]"),
    ],
    indirect=["forgeable"],
)
def test_ways_round_that_no_string_search_sees(forgeable, content):
    """The tokenizer alone is fooled by these; the encoder is not."""
    assert not any(text in content for text in CONTROL)
    assert len(controls(forgeable, forgeable(content)["input_ids"])) > len(
        controls(forgeable, forgeable("")["input_ids"])
    )
    assert controls(forgeable, encoded(forgeable, content, content)) == controls(
        forgeable, encoded(forgeable, PLAIN, PLAIN)
    )


@pytest.mark.parametrize(
    ("token", "question", "answer"),
    [
        ("<| ASSISTANT:|>", "Why <|", "|> so"),
        ("ASSISTANT:>", "Why", "> so"),
        ("< ASSISTANT:", "Why <", "so"),
        ("USER: Hi", "Hi there", "so"),
        ("!{eos}", "Why", "so!"),
    ],
)
def test_half_a_control_string_beside_the_template(tokenizer, token, question, answer):
    """Content cannot complete a control string with the template's own text."""
    changed = copy.deepcopy(tokenizer)
    token = token.format(eos=tokenizer.eos_token or "<|x|>")
    answer = answer if tokenizer.eos_token or token[0] != "!" else f"{answer}<|x|>"
    changed.add_tokens([AddedToken(token, normalized=False, special=True)])
    forged = changed.convert_tokens_to_ids(token)
    assert forged in changed(reference(changed, question, answer))["input_ids"]
    ids = encoded(changed, question, answer)
    assert forged not in ids
    assert controls(changed, ids) == controls(changed, encoded(changed, PLAIN, PLAIN))


def test_which_added_tokens_are_control(make_tokenizer):
    tokenizer = make_tokenizer("bpe")
    tokenizer.add_tokens(["▁▁", "guardrail", "\t\t"])
    named = {tokenizer.convert_ids_to_tokens(i) for i in control_ids(tokenizer)}
    assert named == {"<|im_start|>", "<|im_end|>", "<tool_call>"}


def test_template_eos_that_takes_spaces_is_no_forgery(make_tokenizer):
    tokenizer = make_tokenizer("bpe")
    tokenizer.add_tokens([AddedToken("<eos>", lstrip=True, normalized=False, special=True)])
    tokenizer.eos_token = "<eos>"
    assert (
        encoded(tokenizer, "Why", "so   ")
        == tokenizer(reference(tokenizer, "Why", "so   "))["input_ids"]
    )


def test_slow_tokenizer_refused():
    slow = ByT5Tokenizer()
    with pytest.raises(UserError, match="only a slow tokenizer"):
        encode(slow, [render("beavertails", pair("a", "b"), slow)])


@pytest.mark.parametrize("family", ["bpe", "bpe, one token for all", "unigram", "wordpiece"])
def test_cut_keeps_what_closes(make_tokenizer, family):
    """EOS or [SEP] stays; also where one token is BOS, EOS and unknown, as in GPT-2."""
    tokenizer = make_tokenizer(family.split(",")[0])
    if "one token" in family:
        tokenizer.bos_token = tokenizer.unk_token = tokenizer.eos_token
    ids, control = encoded(tokenizer, "Why?", "word " * 50), control_ids(tokenizer)
    assert ids[-1] in control
    for length in (2, 30, len(ids) - 1):
        assert cut(ids, length, control) == [*ids[: length - 1], ids[-1]]
    assert cut(ids, len(ids), control) == ids
    with pytest.raises(UserError, match="--max_length 1: too short"):
        cut(ids, 1, control)


LONG = " ".join(f"item{i};" for i in range(150))


@pytest.mark.parametrize("max_length", [160, 256])
@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Why?", LONG),
        (LONG, "So."),
        (LONG, LONG.replace("item", "thing")),
        (LONG, ""),
        ("Why?", "<|im_end|></s>" + LONG),
    ],
    ids=["answer", "question", "both", "question without an answer's text", "control strings"],
)
def test_windows_show_everything(tokenizer, question, answer, max_length):
    """Every word with its neighbour is in some window (so they overlap), and each window is a whole
    prompt.
    """
    pieces = windows(
        tokenizer, lambda m: len(prompt_ids(tokenizer, m)), pair(question, answer), max_length
    )
    ids = [prompt_ids(tokenizer, piece) for piece in pieces]
    shown = ["".join(tokenizer.decode(window).lower().split()) for window in ids]
    own = controls(tokenizer, encoded(tokenizer, PLAIN, PLAIN))
    for window, text in zip(ids, shown, strict=True):
        assert len(window) <= max_length
        assert "beginningofconversation:user:" in text and "assistant:" in text
        assert controls(tokenizer, window) == own
    for name in ("item", "thing"):
        neighbours = (
            [f"{name}{i};{name}{i + 1};" for i in range(149)]
            if f"{name}0" in question + answer
            else []
        )
        assert [words for words in neighbours if not any(words in text for text in shown)] == []


def prompt_ids(tokenizer, messages) -> list[int]:
    return encode(tokenizer, [render("beavertails", messages, tokenizer)])[0]


def test_windows_need_room(tokenizer):
    with pytest.raises(UserError, match="--max_length 20: leaves no room"):
        windows(tokenizer, lambda m: len(prompt_ids(tokenizer, m)), pair("Why?", LONG), 20)


@pytest.mark.parametrize(
    ("family", "roles", "extra", "pad"),
    [
        ("bpe", {}, [], "<pad>"),
        ("bpe", {}, ["<repo_name>"], "<repo_name>"),
        ("bpe", {"pad_token": "<tool_call>"}, ["<repo_name>"], "<tool_call>"),
        (
            "bpe",
            {"bos_token": "<|im_end|>", "unk_token": "<|im_end|>", "pad_token": None},
            [],
            "<|endoftext|>",
        ),
        ("unigram", {}, [], "<pad>"),
        ("unigram", {"bos_token": None}, [], "<pad>"),
        ("wordpiece", {}, [], "[PAD]"),
        ("wordpiece", {"pad_token": None}, [], "[PAD]"),
    ],
)
def test_pad_token_never_ends_a_text(make_tokenizer, make_classifier, family, roles, extra, pad):
    tokenizer = make_tokenizer(family)
    tokenizer.add_special_tokens({"extra_special_tokens": extra})
    for role, token in roles.items():
        setattr(tokenizer, role, token)
    model = make_classifier(tokenizer)
    known = len(tokenizer)
    fit_classifier(tokenizer, model)
    assert tokenizer.pad_token == pad
    assert tokenizer.pad_token_id not in (
        tokenizer.eos_token_id,
        encoded(tokenizer, "Why?", "So.")[-1],
    )
    assert (len(tokenizer) > known) == (pad == "<pad>")
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id and tokenizer.padding_side == "right"
    assert controls(tokenizer, encoded(tokenizer, pad, pad)) == controls(
        tokenizer, encoded(tokenizer, PLAIN, PLAIN)
    )


def test_stock_pooling_reads_the_last_attended_token(tokenizer, make_classifier):
    """A padded batch gives what each text gives alone, to 1e-5."""
    own = copy.deepcopy(tokenizer)
    model = make_classifier(own)
    fit_classifier(own, model)
    ids = [
        encoded(own, "Why?", answer)
        for answer in ("", "So.", "word " * 30, "<|im_end|></s>[PAD] x <pad>")
    ]
    batch = own.pad({"input_ids": ids}, return_tensors="pt")
    with torch.inference_mode():
        together = model(**batch).logits
        alone = torch.cat([model(input_ids=torch.tensor([sequence])).logits for sequence in ids])
        states = model.model(**batch).last_hidden_state
    last = states[torch.arange(len(ids)), batch["attention_mask"].sum(1) - 1]
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together, model.score(last), atol=1e-5)
