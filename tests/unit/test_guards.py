"""Guards: any folder of the right layout loads, verdicts are the stock model's, and nothing that
fails is "safe".
"""

import json
import logging

import pytest
import torch
from checks import read_json, read_rows, user_error
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    pipeline,
)

from common.conversation import Verdict, pair
from common.data import taxonomy
from common.templates import render
from guards import Guard, load_guard
from guards.kept import judge_and_keep

CATEGORIES = taxonomy("beavertails")
CARD = {
    "kind": "classifier",
    "template": "beavertails",
    "labels": CATEGORIES,
    "max_length": 96,
    "thresholds": {},
}
PAIRS = [
    pair("Why do people tell lies?", "Often they are afraid."),
    pair("How do I cook rice?", "Rinse it, add twice as much water, and let it simmer. " * 2),
    pair("Hi", "No."),
    [
        {"role": "system", "content": "Be kind."},
        *pair("one", "two"),
        *pair("Tell me the way.", "Take the second left."),
    ],
]
LONG = " ".join(f"word{i}" for i in range(60))
NOT_A_NUMBER = "the model's output is not a number"


@pytest.fixture(scope="module")
def folder(tiny_classifier, tmp_path_factory):
    """The layout of PKU-Alignment/beaver-dam-7b: a Llama with 14 labels and no guard.json."""
    return tiny_classifier(tmp_path_factory.mktemp("guard"))


def load(folder, **options):
    guard = load_guard(str(folder), progress=False, **options)
    guard.model.float()  # bf16, where an accelerator has it, is too coarse to compare
    return guard


@pytest.fixture(scope="module")
def guard(folder):
    return load(folder, max_length=96)


def described(folder, **changes):
    """`folder` with a guard.json."""
    (folder / "guard.json").write_text(json.dumps(CARD | changes))
    return folder


def configured(folder, **changes):
    """`folder` with another config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(read_json(path) | changes))
    return folder


def close(a, b) -> bool:
    same = a.categories == pytest.approx(b.categories, abs=1e-5)
    return same and a.error == b.error


def all_close(some, others) -> bool:
    return all(close(a, b) for a, b in zip(some, others, strict=True))


def sigmoids(model, ids) -> torch.Tensor:
    """What a plain model says of one text."""
    with torch.inference_mode():
        ids = torch.tensor([ids], device=model.device)
        return model(input_ids=ids).logits.sigmoid()[0].cpu()


@pytest.mark.parametrize("batch_tokens", [1, 80, 10_000])
def test_batches_and_order_do_not_matter(folder, guard, batch_tokens):
    batched = load(folder, max_length=96, batch_tokens=batch_tokens).judge(PAIRS[::-1])
    alone = [guard.judge([messages])[0] for messages in PAIRS[::-1]]
    assert all_close(batched, alone)
    assert not close(alone[0], alone[1])


def test_batches_keep_to_the_budget(folder):
    """Padded tokens a batch; a conversation above the budget goes alone."""
    small = load(folder, max_length=96, batch_tokens=70)
    shapes = []

    def note(_, __, inputs):
        shapes.append(inputs["input_ids"].shape)

    small.model.register_forward_pre_hook(note, with_kwargs=True)
    small.judge(PAIRS * 2)
    assert any(rows > 1 for rows, _ in shapes)
    assert all(rows == 1 or rows * width <= 70 for rows, width in shapes)


def test_the_score_is_read_at_eos(make_tokenizer, make_classifier, tmp_path):
    """Of the reference prompt, and also in a folder whose pad token is EOS, where stock pooling
    would look before it.
    """
    tokenizer = make_tokenizer("bpe")
    model = make_classifier(tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for messages, verdict in zip(PAIRS, load(tmp_path, max_length=96).judge(PAIRS), strict=True):
        prompt, response = messages[-2]["content"], messages[-1]["content"]
        text = f"BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}<|im_end|>"
        with torch.inference_mode():
            hidden = model.model(**tokenizer(text, return_tensors="pt")).last_hidden_state
            expected = model.score(hidden[0, -1]).sigmoid().tolist()
        assert list(verdict.categories) == CATEGORIES
        assert list(verdict.categories.values()) == pytest.approx(expected, abs=1e-5)
        assert verdict.response_unsafe == max(verdict.categories.values())
        assert verdict.prompt_unsafe is None


def test_guard_json_is_read_and_options_win(tiny_classifier, tmp_path, guard):
    thresholds = {"flagged": {"value": 0.7, "how": "max F1", "on": "validation"}}
    folder = described(tiny_classifier(tmp_path), max_length=64, thresholds=thresholds)
    loaded = load(folder)
    assert loaded.max_length == 64
    assert loaded.thresholds == thresholds
    assert close(loaded.judge(PAIRS[:1])[0], guard.judge(PAIRS[:1])[0])
    assert load(folder, max_length=128).max_length == 128


def test_labels_go_by_name(tiny_classifier, tmp_path, guard):
    """Labels in another order do not move probabilities to other names; they name what has no
    names.
    """
    loaded = load(tiny_classifier(tmp_path / "named"), labels=CATEGORIES[::-1])
    assert all_close(loaded.judge(PAIRS), guard.judge(PAIRS))
    unnamed = tiny_classifier(tmp_path / "unnamed", labels=[f"LABEL_{i}" for i in range(14)])
    assert all_close(load(described(unnamed)).judge(PAIRS), guard.judge(PAIRS))


def answered(**turn):
    return [*pair("Why?"), {"role": "assistant", **turn}]


IMAGE = {"type": "image_url", "image_url": {}}
ODD = {  # what is wrong: messages, what is said
    "nothing": (None, "expected a non-empty list of messages"),
    "one message": ({"role": "user", "content": "Why?"}, "expected a list of messages"),
    "not judged by this guard": (pair("Why?"), "no such turn"),
    "system turn last": ([{"role": "system", "content": "Hi"}], "ends with a system turn"),
    "role": (answered(content="So.", role="tool"), "messages[1].role"),
    "no content": (answered(content=None), "messages[1].content"),
    "tool call": (answered(content="", tool_calls=[{"id": "1"}]), "a call of a tool"),
    "image": (answered(content=[IMAGE]), "a text part"),
    "part without text": (answered(content=[{"type": "text"}]), "content[0].text"),
    "lone surrogate": (pair("Why?", "\ud800 so"), "lone surrogate"),
}


@pytest.mark.parametrize(("messages", "place"), ODD.values(), ids=ODD)
def test_what_cannot_be_judged_is_an_error_and_not_safe(guard, messages, place):
    first, wrong, last = guard.judge([PAIRS[0], messages, PAIRS[2]])
    assert place in wrong.error
    assert wrong.score() == 1.0
    assert wrong.categories == {}
    assert guard.moderate([messages]) == [1.0]
    assert all_close([first, last], guard.judge([PAIRS[0], PAIRS[2]]))


def test_moderate_as_guardbench_calls_it(guard):
    scores = guard.moderate(conversations=PAIRS, model="any", batch_size=4)
    assert [type(score) for score in scores] == [float] * len(PAIRS)
    assert scores == pytest.approx([v.response_unsafe for v in guard.judge(PAIRS)], abs=1e-5)
    assert guard.moderate([]) == []


TWO_PARTS = [{"type": "text", "text": "Why?"}, {"type": "text", "text": "Say."}]
REFUSAL = [{"type": "refusal", "refusal": "I will not."}]
SYSTEM = {"role": "developer", "content": "Be kind."}


FORMATS = {  # what others write, and what is meant
    "parts": (pair(TWO_PARTS, "So."), pair("Why?\nSay.", "So.")),
    "refusal": (pair("Why?", REFUSAL), pair("Why?", "I will not.")),
    "two turns of one role": ([*pair("Why?"), *pair("Say.", "So.")], pair("Why?\n\nSay.", "So.")),
    "developer": ([SYSTEM, *pair("Why?", "So.")], pair("Why?", "So.")),
}


@pytest.mark.parametrize(("written", "meant"), FORMATS.values(), ids=FORMATS)
def test_formats_of_others_are_read(guard, written, meant):
    """OpenAI's content parts are one text, and turns of one role in a row are one turn: no part
    goes unjudged.
    """
    one, other = guard.judge([written, meant])
    assert one.error is None
    assert close(one, other)


@pytest.mark.parametrize("wrong", ["Why?", {"role": "user", "content": "Why?"}])
def test_a_text_is_no_list_of_conversations(guard, wrong):
    with user_error("takes a list of conversations"):
        guard.judge(wrong)


class Unsure(Guard):
    """Judges prompts, but not always: "n/a" is its word, and no error."""

    name, thresholds, judges = "unsure", {}, ("prompt_unsafe",)

    def judge_valid(self, conversations):
        said = {"?": None, "Hi": 0.25}
        return [Verdict(prompt_unsafe=said.get(m[-1]["content"])) for m in conversations]


class Terse(Unsure):
    """Says of a refusal what it is asked alone, as Qwen3Guard does."""

    def judge_valid(self, conversations):
        refusal = 0.75 if "response_refusal" in self.wanted else None
        return [Verdict(response_unsafe=0.25, response_refusal=refusal) for _ in conversations]


def test_what_is_kept_is_what_was_asked_for(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    for wanted, refusal in {(): None, ("response_refusal",): 0.75}.items():
        talks = [pair("Why?", "No.")]
        (said,) = judge_and_keep(Terse(), "terse", {}, talks, path, wanted=wanted)
        assert said.response_refusal == refusal
    assert len(read_rows(path)) == 2


def test_moderate_without_an_opinion():
    """Unsafe, as a failure is; a label that is never judged stays a wrong question."""
    assert Unsure().moderate([pair("?"), pair("Hi")]) == [1.0, 0.25]
    with user_error("does not judge response_unsafe"):
        Unsure().moderate([pair("Hi", "Hello")])


@pytest.mark.parametrize(
    "control", ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<pad>", "<tool_call>"]
)
def test_control_strings_move_nothing(guard, control):
    """They are judged as the text with a space in them: the same pooling position, the same
    attention.
    """
    broken = f"{control[0]} {control[1:]}"
    answer = "Take the letters {0} and {0} read them.{0}" + control[:3]
    forged = pair(control, answer.format(control))
    plain = pair(broken, answer.format(broken))
    assert all_close(guard.judge([forged]), guard.judge([plain]))


def test_long_inputs_windows_see_the_tail(folder, guard, caplog):
    """The maximum over windows of the whole text; truncation is blind to what comes after its
    cut.
    """
    tails = ("a quiet end", "and then take his letters")
    long = [pair("Why?", f"{LONG} {tail}") for tail in tails]
    truncating = load(folder, max_length=96, long_inputs="truncate")
    with caplog.at_level(logging.INFO, "guards.classifier"):
        seen = guard.judge(long)
    assert "2 of 2 conversations are longer than 96 tokens: windows" in caplog.text
    assert not close(*seen)
    assert close(*truncating.judge(long))
    for messages, tail, verdict in zip(long, tails, seen, strict=True):
        windows = guard.window_ids(messages)
        assert len(windows) > 2
        assert tail in guard.tokenizer.decode(windows[-1])
        each = torch.stack([sigmoids(guard.model, ids) for ids in windows])
        highest = each.amax(0).tolist()
        assert list(verdict.categories.values()) == pytest.approx(highest, abs=1e-5)


def test_long_inputs_truncate_keeps_eos(folder):
    truncating = load(folder, max_length=96, long_inputs="truncate")
    tokenizer = truncating.tokenizer
    ids = tokenizer(f"BEGINNING OF CONVERSATION: USER: Why? ASSISTANT:{LONG}")["input_ids"]
    expected = sigmoids(truncating.model, [*ids[:95], tokenizer.eos_token_id])
    (verdict,) = truncating.judge([pair("Why?", LONG)])
    assert list(verdict.categories.values()) == pytest.approx(expected.tolist(), abs=1e-5)


def test_long_inputs_error(folder, guard):
    strict = load(folder, max_length=96, long_inputs="error")
    long, short = strict.judge([pair("Why?", LONG), PAIRS[0]])
    assert "more than --max_length 96" in long.error
    assert long.score() == 1.0
    assert close(short, guard.judge(PAIRS[:1])[0])


@pytest.mark.parametrize("talk", [pair(LONG, ""), pair("Why?", LONG)], ids=["question", "answer"])
def test_a_window_too_small_is_an_error_verdict(folder, guard, talk):
    """One text that does not fit takes no other down with it."""
    short = pair("", "No.")
    long, other = load(folder, max_length=34).judge([talk, short])
    assert long.error is not None
    assert long.score() == 1.0
    assert close(other, guard.judge([short])[0])
    assert guard.judge([talk])[0].error is None


@pytest.mark.parametrize("text", ["@", f"@ {LONG}", f"{LONG} @"])
def test_not_a_number_in_one_window_is_an_error(folder, text):
    broken = load(folder, max_length=96)
    at = broken.tokenizer.convert_tokens_to_ids("@")
    broken.model.get_input_embeddings().weight.data[at] = float("nan")
    wrong, right = broken.judge([pair("Why?", text), PAIRS[0]])
    assert wrong.error == NOT_A_NUMBER
    assert wrong.score() == 1.0
    assert wrong.categories == {}
    assert right.error is None


def halve_weights(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def change_head(folder, change):
    """`change` gets all weights."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def drop_head(folder):
    change_head(folder, lambda weights: weights.pop("score.weight"))


def narrow_head(folder):
    def narrow(weights):
        weights["score.weight"] = weights["score.weight"][:2].clone()

    change_head(folder, narrow)


def second_head(folder):
    configured(folder, architectures=["GuardWithTwoHeads"])
    change_head(folder, lambda weights: weights.update({"other.weight": torch.zeros(2, 2)}))


class Mine(LlamaConfig):
    model_type = "mine-registered"


class MineModel(LlamaModel):
    config_class = Mine


class MineForSequenceClassification(LlamaForSequenceClassification):
    config_class = Mine


@pytest.fixture
def registered():
    """A type of model and a class for it, which a user has made known to transformers."""
    AutoConfig.register(Mine.model_type, Mine, exist_ok=True)
    AutoModel.register(Mine, MineModel, exist_ok=True)
    AutoModelForSequenceClassification.register(Mine, MineForSequenceClassification, exist_ok=True)


@pytest.mark.parametrize("own", [None, "TFLlamaForSequenceClassification", "FlaxLlamaModel"])
def test_surplus_weights_of_a_known_class_are_no_fault(tiny_classifier, tmp_path, own):
    folder = tiny_classifier(tmp_path)
    second_head(folder)
    configured(folder, architectures=own and [own])
    assert load(folder).judge(PAIRS)[0].error is None


def test_a_class_that_the_user_has_registered(registered, tiny_classifier, tmp_path):
    folder = tiny_classifier(tmp_path)
    second_head(folder)
    own = MineForSequenceClassification.__name__
    configured(folder, model_type=Mine.model_type, architectures=[own])
    assert load(folder).judge(PAIRS)[0].error is None


UNREADABLE = "cannot be loaded as a classifier"
TO_DO = "pass --trust_remote_code where its folder brings the code, else compare it by its pred"
SPOILT = {  # what is wrong: how it is done, what is said
    "labels": (lambda f: described(f, labels=["safe", "unsafe"]), "guard.json, field labels"),
    "config": (lambda f: (f / "config.json").write_text("{"), UNREADABLE),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), UNREADABLE),
    "half the weights": (halve_weights, UNREADABLE),
    "a narrow head": (narrow_head, UNREADABLE),
    "a type of its own": (
        lambda f: configured(f, model_type="mine"),
        f"transformers has no class for model_type mine here; {TO_DO}",
    ),
    "a class of its own": (
        second_head,
        f"GuardWithTwoHeads is none of transformers, which has no place for other.weight; {TO_DO}",
    ),
    "no head": (drop_head, "not a trained classifier, it lacks score.weight"),
}


@pytest.mark.parametrize(("spoil", "place"), SPOILT.values(), ids=SPOILT)
def test_bad_folder_is_one_line(tiny_classifier, tmp_path, spoil, place):
    folder = tiny_classifier(tmp_path)
    spoil(folder)
    with user_error(place):
        load(folder)


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("no/such/folder", "no folder here, and no hub id that loads"),
        ("beaver-dam-7b", "PKU-Alignment/beaver-dam-7b: no folder here"),
        ("BeaverDam", "PKU-Alignment/beaver-dam-7b: no folder here"),
        ("wildgard", "did you mean wildguard"),
        ("llamaguard-3", "did you mean LlamaGuard3"),
    ],
)
def test_bad_spec_is_one_line(spec, hint):
    with user_error(hint):
        load_guard(spec)


@pytest.mark.parametrize("option", ["long_inputs", "template"])
def test_bad_option_is_named(folder, option):
    with user_error("nothing"):
        load(folder, **{option: "nothing"})


MANY = "multi_label_classification"
ONE = "single_label_classification"
HEADS = {  # labels, problem_type, the labels that are unsafe: None where they are known
    "one": (["toxic"], None, None),
    "two": (["safe", "unsafe"], None, None),
    "two, written otherwise": (["UNHARMFUL", "harmful"], ONE, None),
    "two without names": (["LABEL_0", "LABEL_1"], None, ["LABEL_1"]),
    "two that are independent": (["safe", "unsafe"], MANY, None),
    "three that exclude one another": (["benign", "hate", "threat"], None, None),
    "three that are independent": (["hate", "threat", "insult"], MANY, None),
    "fourteen": (CATEGORIES, MANY, None),
}


@pytest.mark.parametrize("head", HEADS)
def test_probabilities_are_those_of_the_pipeline(tiny_classifier, tmp_path, head):
    """Softmax or sigmoid as the head's config says; a text is as unsafe as its unsafe labels."""
    labels, problem_type, unsafe = HEADS[head]
    folder = configured(tiny_classifier(tmp_path, labels=labels), problem_type=problem_type)
    stock = pipeline("text-classification", model=str(folder), device="cpu", top_k=None)
    loaded = load(folder, template="beavertails", unsafe_labels=unsafe)
    known = unsafe or [name for name in labels if name not in ("safe", "UNHARMFUL", "benign")]
    exclusive = len(labels) > 1 and problem_type != MANY
    for messages, verdict in zip(PAIRS, loaded.judge(PAIRS), strict=True):
        parts = render("beavertails", messages, loaded.tokenizer)
        (said,) = stock(["".join(part.text for part in parts)])
        expected = {one["label"]: one["score"] for one in said}
        assert verdict.categories == pytest.approx(expected, abs=1e-5)
        values = [expected[name] for name in known]
        total = sum(values) if exclusive else max(values)
        assert verdict.response_unsafe == pytest.approx(total, abs=1e-5)


UNCLEAR = {  # what is not clear of a head: its labels, options, what is said
    "no names": (["LABEL_0", "LABEL_1"], {}, "unsafe_labels=…"),
    "no safe one": (["hate", "threat"], {}, "say which of its labels"),
    "no unsafe one": (["safe"], {}, "say which of its labels"),
    "no such label": (["safe", "hate"], {"unsafe_labels": ["hat"]}, "has no label 'hat'"),
    "no template": (["safe", "unsafe"], {"template": None}, "name a prompt template"),
    "no probabilities": (["toxic"], {"problem_type": "regression"}, "problem_type regression"),
}


@pytest.mark.parametrize(("labels", "options", "hint"), UNCLEAR.values(), ids=UNCLEAR)
def test_a_head_that_says_nothing_of_harm_is_refused(
    tiny_classifier, tmp_path, labels, options, hint
):
    folder = tiny_classifier(tmp_path, labels=labels)
    configured(folder, problem_type=None)
    with user_error(hint):
        load(folder, **({"template": "beavertails"} | options))
