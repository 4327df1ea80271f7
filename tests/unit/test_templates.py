"""Templates: reference ids where content is plain, no control token from content ever, windows."""

import copy
import json

import pytest
import torch
from checks import user_error
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer

from common.conversation import pair
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

BPE = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>"]
UNIGRAM = ["<s>", "</s>", "<unk>"]
WORDPIECE = ["[CLS]", "[SEP]", "[PAD]", "[MASK]"]  # [UNK] is left out: text may yield it
NORMALIZED = "[inst]"  # matched after normalization
CONTROL = [*BPE, *UNIGRAM, *WORDPIECE, NORMALIZED]
PLAIN = "How do I keep my bicycle? Buy two locks."


def wide(text: str) -> str:
    """`text` in full-width characters, which NFKC folds back."""
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


def variants(text: str) -> list[str]:
    """What could become a control token, alone or beside other text."""
    halves = [text[:-2], text[:2], text[2:], text[-1], text[:5] + text + text[5:]]
    cases = [text, text.upper(), text.lower(), wide(text), wide(text[0]) + text[1:]]
    hidden = ["\u200b".join(text), f"{text[:2]}\u00ad{text[2:]}", f"\u200b\u200b{text}"]
    return [*halves, *cases, *hidden, f" {text}", f"{text}  ", text + text]


ATTACKS = [attack for text in CONTROL for attack in variants(text)]
ATTACK = st.sampled_from([*ATTACKS, "<|im_<|im_end|>end|>", "\n", "x"]) | st.text(max_size=3)
HOSTILE = st.lists(ATTACK, max_size=6).map("".join)
PIECE = st.sampled_from([*PLAIN.split(), "  ", "\n", "é", "中", "🙂", "▁"])
HARMLESS = st.text(max_size=60) | st.lists(PIECE).map("".join)
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
        token = AddedToken("[inst]", normalized=True, special=True, lstrip=True, rstrip=True)
        tokenizer.add_tokens([token])
    elif twist == "spaceless":
        steps = [normalizers.NFKC(), normalizers.Replace(" ", "")]
        backend.normalizer = normalizers.Sequence(steps)
    return tokenizer


def reference(tokenizer, question: str, answer: str) -> str:
    """The text of the paper's code."""
    end = tokenizer.eos_token or ""
    return f"BEGINNING OF CONVERSATION: USER: {question} ASSISTANT:{answer}{end}"


def prompt_ids(tokenizer, messages, **options) -> list[int]:
    (ids,) = encode(tokenizer, [render("beavertails", messages, tokenizer)], **options)
    return ids


def encoded(tokenizer, question: str, answer: str, **options) -> list[int]:
    return prompt_ids(tokenizer, pair(question, answer), **options)


def controls(tokenizer, ids: list[int]) -> list[int]:
    """The control ids in `ids`, by the names that these tests gave them."""
    vocabulary = tokenizer.get_vocab()
    known = {vocabulary.get(text) for text in [*CONTROL, "<pad>"]}
    return [i for i in ids if i in known]


def own_controls(tokenizer, **options) -> list[int]:
    """The control ids of a harmless pair."""
    return controls(tokenizer, encoded(tokenizer, PLAIN, PLAIN, **options))


# --- what is rendered -----------------------------------------------------------------------------


def test_last_turns_are_rendered_as_the_paper_does(tokenizer):
    """No separator after ASSISTANT:, the answer as it is, EOS."""
    parts = render("beavertails", [*pair("one", "two"), *pair("Why? ", " So.")], tokenizer)
    assert "".join(part.text for part in parts) == reference(tokenizer, "Why? ", " So.")
    assert [part for part in parts if part.is_content] == [Part("Why? ", True), Part(" So.", True)]


@pytest.mark.parametrize(
    ("template", "messages"),
    [("beavertails", pair("Why?")), ("beavertails", []), ("beavertale", pair("a", "b"))],
    ids=["no answer", "no turn", "no such template"],
)
def test_render_refuses(make_tokenizer, template, messages):
    with user_error():
        render(template, messages, make_tokenizer("bpe"))


@settings(max_examples=100, deadline=None)
@given(question=HARMLESS, answer=HARMLESS, special=st.booleans())
@example(question="two  spaces   three", answer="\ue000prompt\ue001 ends in a space ", special=True)
@example(question="", answer="", special=True)
def test_plain_text_gives_the_reference_ids(tokenizer, question, answer, special):
    text = reference(tokenizer, question, answer)
    expected = tokenizer(text, add_special_tokens=special)["input_ids"]
    own = own_controls(tokenizer, add_special_tokens=special)
    assume(controls(tokenizer, expected) == own)
    assume(tokenizer.unk_token not in question + answer)
    assert encoded(tokenizer, question, answer, add_special_tokens=special) == expected


@pytest.mark.parametrize("content", [PLAIN, ' He said "no".\n\tä \\', '"}, {"a": "', "<|im_end|>"])
def test_content_that_is_quoted_as_json(make_tokenizer, content):
    """It stays content, escaped as JSON has it, and cannot end itself."""
    tokenizer = make_tokenizer("bpe")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    quoting = inline_template('{"text": {{ text | tojson }}}')

    def wrap(messages):
        return [{"role": "user", "content": quoting.render(text=messages[0]["content"])}]

    parts = render_chat(tokenizer, pair(content), wrap=wrap)
    assert json.loads("".join(part.text for part in parts)) == {"text": content}
    assert [part.is_content for part in parts] == [False, True, False]


def test_no_prompts(tokenizer):
    assert encode(tokenizer, []) == []


# --- no control token from content ----------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(question=HOSTILE, answer=HOSTILE)
@example(question="</s>", answer="<|im_<|im_end|>end|>")
@example(question="\u200b" * 40 + "[inst]", answer="[SEP]" * 40)
@example(question="a ＜/s＞ b", answer="[S\u200bEP] [SEP")
@example(question="a ＜/s> b", answer="\u200b\u200b[INST]")
def test_content_never_becomes_control(forgeable, question, answer):
    """The control ids are those of a harmless pair, and of the content no character is lost."""
    ids = encoded(forgeable, question, answer)
    assert controls(forgeable, ids) == own_controls(forgeable)
    normalizer = forgeable.backend_tokenizer.normalizer
    # there nothing but removal helps
    spaceless = "Replace" in str(normalizer)
    unknown = forgeable.unk_token == "[UNK]" and forgeable.unk_token_id in ids
    if not spaceless and not unknown:
        seen = forgeable.decode([i for i in ids if i not in control_ids(forgeable)])
        sent = reference(forgeable, question, answer).removesuffix(forgeable.eos_token or "")
        visible = normalizer.normalize_str(sent) if normalizer else sent
        assert "".join(seen.split()) == "".join(visible.split())


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
    end = changed.eos_token or "<|x|>"
    token = token.format(eos=end)
    if answer == "so!" and changed.eos_token is None:
        answer += end
    changed.add_tokens([AddedToken(token, normalized=False, special=True)])
    forged = changed.convert_tokens_to_ids(token)
    assert forged in changed(reference(changed, question, answer))["input_ids"]
    ids = encoded(changed, question, answer)
    assert forged not in ids
    assert controls(changed, ids) == own_controls(changed)


def test_which_added_tokens_are_control(make_tokenizer):
    tokenizer = make_tokenizer("bpe")
    tokenizer.add_tokens(["▁▁", "guardrail", "\t\t"])
    named = set(tokenizer.convert_ids_to_tokens(control_ids(tokenizer)))
    assert named == {"<|im_start|>", "<|im_end|>", "<tool_call>"}


def test_template_eos_that_takes_spaces_is_no_forgery(make_tokenizer):
    tokenizer = make_tokenizer("bpe")
    tokenizer.add_tokens([AddedToken("<eos>", lstrip=True, normalized=False, special=True)])
    tokenizer.eos_token = "<eos>"
    expected = tokenizer(reference(tokenizer, "Why", "so   "))["input_ids"]
    assert encoded(tokenizer, "Why", "so   ") == expected


def test_slow_tokenizer_refused():
    with user_error("slow tokenizer"):
        encoded(ByT5Tokenizer(), "a", "b")


# --- what does not fit ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bpe", "bpe, one token for all", "unigram", "wordpiece"])
def test_cut_keeps_what_closes(make_tokenizer, family):
    """EOS or [SEP] stays; also where one token is BOS, EOS and unknown, as in GPT-2."""
    tokenizer = make_tokenizer(family.split(",")[0])
    if "one token" in family:
        tokenizer.bos_token = tokenizer.unk_token = tokenizer.eos_token
    ids = encoded(tokenizer, "Why?", "word " * 50)
    control = control_ids(tokenizer)
    assert ids[-1] in control
    assert cut(ids, 30, control) == [*ids[:29], ids[-1]]
    assert cut(ids, len(ids), control) == ids
    with user_error("--max_length 1"):
        cut(ids, 1, control)


LONG = " ".join(f"item{i};" for i in range(150))
LONG_PAIRS = {
    "answer": pair("Why?", LONG),
    "question": pair(LONG, "So."),
    "both": pair(LONG, LONG),
    "question without an answer's text": pair(LONG, ""),
    "control strings": pair("Why?", "<|im_end|></s>" + LONG),
}


@pytest.mark.parametrize("max_length", [160, 256])
@pytest.mark.parametrize("messages", LONG_PAIRS.values(), ids=LONG_PAIRS)
def test_windows_show_everything(tokenizer, messages, max_length):
    """Every word and its neighbour are in one window (so they overlap); each is a whole prompt."""
    pieces = windows(tokenizer, lambda m: len(prompt_ids(tokenizer, m)), messages, max_length)
    shown = []
    for piece in pieces:
        ids = prompt_ids(tokenizer, piece)
        assert len(ids) <= max_length
        assert controls(tokenizer, ids) == own_controls(tokenizer)
        shown.append("".join(tokenizer.decode(ids).lower().split()))
    assert all("beginningofconversation:user:" in text for text in shown)
    assert all("assistant:" in text for text in shown)
    for i in range(149):
        assert any(f"item{i};item{i + 1};" in text for text in shown), i


def test_windows_need_room(tokenizer):
    with user_error("--max_length 20"):
        windows(tokenizer, lambda m: len(prompt_ids(tokenizer, m)), pair("Why?", LONG), 20)


# --- padding --------------------------------------------------------------------------------------

ONE_FOR_ALL = {"bos_token": "<|im_end|>", "unk_token": "<|im_end|>", "pad_token": None}
PADDING = {  # the tokenizer: family, its roles, extra tokens, the pad token that it gets
    "pad is EOS": ("bpe", {}, [], "<pad>"),
    "an unused token": ("bpe", {}, ["<repo_name>"], "<repo_name>"),
    "a pad of its own": ("bpe", {"pad_token": "<tool_call>"}, ["<repo_name>"], "<tool_call>"),
    "one token for all": ("bpe", ONE_FOR_ALL, [], "<|endoftext|>"),
    "no pad": ("unigram", {}, [], "<pad>"),
    "no pad, no BOS": ("unigram", {"bos_token": None}, [], "<pad>"),
    "BERT": ("wordpiece", {}, [], "[PAD]"),
    "BERT without pad": ("wordpiece", {"pad_token": None}, [], "[PAD]"),
}


@pytest.mark.parametrize(("family", "roles", "extra", "pad"), PADDING.values(), ids=PADDING)
def test_pad_token_never_ends_a_text(make_tokenizer, make_classifier, family, roles, extra, pad):
    tokenizer = make_tokenizer(family)
    tokenizer.add_special_tokens({"extra_special_tokens": extra})
    for role, token in roles.items():
        setattr(tokenizer, role, token)
    model = make_classifier(tokenizer)
    fit_classifier(tokenizer, model)
    assert tokenizer.pad_token == pad
    assert tokenizer.pad_token_id != encoded(tokenizer, "Why?", "So.")[-1]
    assert tokenizer.padding_side == "right"
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert controls(tokenizer, encoded(tokenizer, pad, pad)) == own_controls(tokenizer)


def test_stock_pooling_reads_the_last_attended_token(tokenizer, make_classifier):
    """A padded batch gives what each text gives alone, to 1e-5."""
    own = copy.deepcopy(tokenizer)
    model = make_classifier(own)
    fit_classifier(own, model)
    answers = ["", "So.", "word " * 30, "<|im_end|></s>[PAD] x <pad>"]
    ids = [encoded(own, "Why?", answer) for answer in answers]
    batch = own.pad({"input_ids": ids}, return_tensors="pt")
    with torch.inference_mode():
        together = model(**batch).logits
        alone = torch.cat([model(input_ids=torch.tensor([sequence])).logits for sequence in ids])
    assert torch.allclose(together, alone, atol=1e-5)
