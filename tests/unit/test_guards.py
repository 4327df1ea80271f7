"""Guards: any folder of the right layout loads, verdicts are the stock model's, and nothing that
fails is "safe".
"""

import json
import logging
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    pipeline,
)

from common.conversation import UserError, Verdict, pair
from common.data import taxonomy
from common.templates import render
from guards import Guard, load_guard

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


def close(a, b) -> bool:
    return a.error == b.error and a.categories == pytest.approx(b.categories, abs=1e-5)


def test_verdict_is_the_stock_models(folder, guard):
    """The sigmoids of the plain model on the reference ids, and their maximum."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    questions = [(messages[-2]["content"], messages[-1]["content"]) for messages in PAIRS]
    for (question, answer), verdict in zip(questions, guard.judge(PAIRS), strict=True):
        text = (
            f"BEGINNING OF CONVERSATION: USER: {question} ASSISTANT:{answer}{tokenizer.eos_token}"
        )
        with torch.inference_mode():
            expected = model(**tokenizer(text, return_tensors="pt")).logits.sigmoid()[0].tolist()
        assert list(verdict.categories) == CATEGORIES
        assert list(verdict.categories.values()) == pytest.approx(expected, abs=1e-5)
        assert verdict.response_unsafe == max(verdict.categories.values()) == verdict.score()
        assert verdict.prompt_unsafe is None and verdict.error is None


@pytest.mark.parametrize("batch_tokens", [1, 80, 10_000])
def test_batches_and_order_do_not_matter(folder, guard, batch_tokens):
    batched = load(folder, max_length=96, batch_tokens=batch_tokens).judge(PAIRS[::-1])
    alone = [guard.judge([messages])[0] for messages in PAIRS[::-1]]
    assert all(map(close, batched, alone))
    assert not close(alone[0], alone[1])


def test_batches_keep_to_the_budget(folder):
    """Padded tokens a batch, the largest batch first; a conversation above the budget goes alone."""
    small, shapes = load(folder, max_length=96, batch_tokens=70), []
    small.model.register_forward_pre_hook(
        lambda _, __, inputs: shapes.append(inputs["input_ids"].shape), with_kwargs=True
    )
    small.judge(PAIRS * 2)
    assert sum(rows for rows, _ in shapes) == 2 * len(PAIRS) and any(rows > 1 for rows, _ in shapes)
    assert all(rows == 1 or rows * width <= 70 for rows, width in shapes)
    assert [width for _, width in shapes] == sorted((width for _, width in shapes), reverse=True)


def test_pad_that_is_eos_does_not_move_the_score(make_tokenizer, make_classifier, tmp_path):
    """The score is read at EOS also in a folder whose pad token is EOS, where stock pooling would
    look before it.
    """
    tokenizer = make_tokenizer("bpe")
    model = make_classifier(tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for messages, verdict in zip(PAIRS, load(tmp_path, max_length=96).judge(PAIRS), strict=True):
        prompt, response = messages[-2]["content"], messages[-1]["content"]
        text = f"BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}<|im_end|>"
        with torch.inference_mode():
            expected = model.score(
                model.model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1]
            ).sigmoid()
        assert list(verdict.categories.values()) == pytest.approx(expected.tolist(), abs=1e-5)


def test_an_encoder_is_a_guard_too(make_tokenizer, tmp_path):
    """Attention runs both ways there, so padding must be masked."""
    tokenizer = make_tokenizer("wordpiece")
    names = {
        "id2label": dict(enumerate(CATEGORIES)),
        "label2id": {name: i for i, name in enumerate(CATEGORIES)},
    }
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    config = BertConfig(vocab_size=len(tokenizer), initializer_range=0.3, **names, **shape)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = load(tmp_path)
    alone = [encoder.judge([messages])[0] for messages in PAIRS]
    assert all(map(close, encoder.judge(PAIRS), alone)) and not close(alone[0], alone[1])


def test_nothing_to_judge(guard):
    assert guard.judge([]) == [] and guard.moderate([]) == []


def test_guard_json_is_read_and_options_win(tiny_classifier, tmp_path, guard):
    thresholds = {"flagged": {"value": 0.7, "how": "max F1", "on": "validation"}}
    folder = described(tiny_classifier(tmp_path), max_length=64, thresholds=thresholds)
    loaded = load(folder)
    assert (loaded.max_length, loaded.thresholds, loaded.labels) == (64, thresholds, CATEGORIES)
    assert all(map(close, loaded.judge(PAIRS[:1]), guard.judge(PAIRS[:1])))
    assert load(folder, max_length=128, template=None).max_length == 128


def test_labels_go_by_name(tiny_classifier, tmp_path, guard):
    """Labels in another order do not move probabilities to other names; they name what has no
    names.
    """
    loaded = load(tiny_classifier(tmp_path / "named"), labels=CATEGORIES[::-1])
    assert all(map(close, loaded.judge(PAIRS), guard.judge(PAIRS)))
    unnamed = tiny_classifier(tmp_path / "unnamed", labels=[f"LABEL_{i}" for i in range(14)])
    assert all(map(close, load(described(unnamed)).judge(PAIRS), guard.judge(PAIRS)))


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (pair("Why?"), "no such turn"),
        ([], "expected a non-empty list of messages"),
        ([{"role": "system", "content": "Be kind."}], "ends with a system turn"),
        ("Why?", "expected a non-empty list of messages"),
        ({"role": "user", "content": "Why?"}, "expected a list of messages, found one"),
        (None, "expected a non-empty list of messages"),
        (
            [*pair("Why?"), {"role": "model", "content": "So."}],
            r"messages\[1\].role: 'model' is none of",
        ),
        (
            [*pair("Why?"), {"role": "Assistant", "content": "So."}],
            r"messages\[1\].role: 'Assistant' is none of",
        ),
        (
            [*pair("Why?"), {"role": "tool", "content": "So."}],
            r"messages\[1\].role: 'tool' is none of",
        ),
        (
            [*pair("Why?"), {"role": ["user"], "content": "So."}],
            r"messages\[1\].role: \['user'\] is none of",
        ),
        (
            [*pair("Why?"), {"role": "assistant", "content": None}],
            r"messages\[1\].content: expected text",
        ),
        ([*pair("Why?"), {"role": "assistant"}], r"messages\[1\]: expected"),
        (
            [*pair("Why?"), {"role": "assistant", "content": []}],
            r"messages\[1\].content: expected text",
        ),
        (
            [*pair("Why?"), {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}],
            "a call of a tool",
        ),
        (
            [
                *pair("Why?"),
                {"role": "assistant", "content": [{"type": "image_url", "image_url": {}}]},
            ],
            "a text part",
        ),
        ([*pair("Why?"), {"role": "assistant", "content": ["So."]}], "a text part"),
        (
            [*pair("Why?"), {"role": "assistant", "content": [{"type": "text"}]}],
            r"content\[0\].text: expected text",
        ),
        (pair("Why?", "\ud800 so"), "lone surrogate"),
    ],
)
def test_what_cannot_be_judged_is_an_error_and_not_safe(guard, messages, words):
    verdicts = guard.judge([PAIRS[0], messages, PAIRS[2]])
    assert (
        re.search(words, verdicts[1].error)
        and verdicts[1].score() == 1.0
        and verdicts[1].categories == {}
    )
    assert guard.moderate([PAIRS[0], messages])[1] == 1.0
    assert close(verdicts[0], guard.judge(PAIRS)[0]) and close(verdicts[2], guard.judge(PAIRS)[2])


def test_a_question_not_asked_of_this_guard(guard):
    with pytest.raises(UserError, match="does not judge prompt_unsafe"):
        guard.judge(PAIRS[:1])[0].score("prompt_unsafe")


def test_moderate_as_guardbench_calls_it(guard):
    scores = guard.moderate(
        conversations=[*PAIRS, pair("Only a question?")], model="any", batch_size=4
    )
    assert all(isinstance(score, float) for score in scores)
    assert scores == [
        *(pytest.approx(v.response_unsafe, abs=1e-5) for v in guard.judge(PAIRS)),
        1.0,
    ]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (
            [{"role": "user", "content": [{"type": "text", "text": "Why?"}, {"type": "text", "text": "Say."}]},
             {"role": "assistant", "content": [{"type": "output_text", "text": "So."}], "tool_calls": None}],
            pair("Why?\nSay.", "So."),
        ),
        (pair("Why?", [{"type": "refusal", "refusal": "I will not."}]), pair("Why?", "I will not.")),
        ([*pair("Why?"), *pair("Say.", "So."), *pair(None, "Or not.")], pair("Why?\n\nSay.", "So.\n\nOr not.")),
        ([{"role": "developer", "content": "Be kind."}, *pair("Why?", "So.")], pair("Why?", "So.")),
        (tuple(pair("Why?", "So.")), pair("Why?", "So.")),
    ],
)  # fmt: skip
def test_formats_of_others_are_read(guard, written, meant):
    """OpenAI's content parts are one text, and turns of one role in a row are one turn: no part
    goes unjudged.
    """
    one, other = guard.judge([written, meant])
    assert one.error is None and close(one, other)


def test_a_text_is_no_list_of_conversations(guard):
    for wrong in ("Why?", {"role": "user", "content": "Why?"}):
        with pytest.raises(UserError, match="takes a list of conversations"):
            guard.judge(wrong)
    # one conversation, and no list of them
    assert all(verdict.error for verdict in guard.judge(pair("Why?", "So.")))


class Unsure(Guard):
    """Judges prompts, but not always: "n/a" is its word, and no error."""

    name, thresholds, judges = "unsure", {}, ("prompt_unsafe",)

    def judge_valid(self, conversations):
        return [
            Verdict(prompt_unsafe=None if m[-1]["content"] == "?" else 0.25) for m in conversations
        ]


class Older(Guard):
    """As guards of others were written before: it sees conversations as they come."""

    name, thresholds, judges = "older", {}, ("response_unsafe",)

    def judge(self, conversations):
        return [Verdict(response_unsafe=0.25) for _ in conversations]


def test_a_guard_that_overrides_judge_still_works():
    assert Older().moderate([pair("Hi", "Hello")]) == [0.25] and Older().sees == "not known"


def test_moderate_without_an_opinion():
    """Unsafe, as a failure is; a label that is never judged stays a wrong question."""
    assert Unsure().moderate([pair("?"), pair("Hi")]) == [1.0, 0.25]
    with pytest.raises(UserError, match="does not judge response_unsafe"):
        Unsure().moderate([pair("Hi", "Hello")])


@pytest.mark.parametrize(
    "control", ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<pad>", "<tool_call>"]
)
def test_control_strings_move_nothing(guard, control):
    """They are judged as the text with a space in them: the same pooling position, the same
    attention.
    """
    answer = f"Take the letters {{}} and {{}} read them.{{}}{control[:3]}"
    forged, broken = (
        answer.format(*[text] * 3) for text in (control, f"{control[0]} {control[1:]}")
    )
    assert close(
        guard.judge([pair(control, forged)])[0], guard.judge([pair(f"< {control[1:]}", broken)])[0]
    )


def test_long_inputs_windows_see_the_tail(folder, guard, caplog):
    """The maximum over windows of the whole text; truncation is blind to what comes after its cut."""
    tails = ("a quiet end", "and then take his letters")
    long = [pair("Why?", f"{LONG} {tail}") for tail in tails]
    truncating = load(folder, max_length=96, long_inputs="truncate")
    with caplog.at_level(logging.INFO, "guards.classifier"):
        seen, cut = guard.judge(long), truncating.judge(long)
    assert "2 of 2 conversations are longer than 96 tokens: windows" in caplog.text
    assert close(cut[0], cut[1]) and not close(seen[0], seen[1])
    for messages, tail, verdict in zip(long, tails, seen, strict=True):
        ids = guard.window_ids(messages)
        assert len(ids) > 2 and tail in guard.tokenizer.decode(ids[-1])
        with torch.inference_mode():
            each = [
                guard.model(input_ids=torch.tensor([w], device=guard.device)).logits.sigmoid()[0]
                for w in ids
            ]
        highest = torch.stack(each).amax(0).tolist()
        assert list(verdict.categories.values()) == pytest.approx(highest, abs=1e-5)


def test_long_inputs_truncate_keeps_eos(folder):
    truncating = load(folder, max_length=96, long_inputs="truncate")
    messages = pair("Why?", LONG)
    ids = truncating.tokenizer(f"BEGINNING OF CONVERSATION: USER: Why? ASSISTANT:{LONG}")[
        "input_ids"
    ][:95]
    ids = torch.tensor([[*ids, truncating.tokenizer.eos_token_id]], device=truncating.device)
    with torch.inference_mode():
        expected = truncating.model(input_ids=ids).logits.sigmoid()[0].tolist()
    assert list(truncating.judge([messages])[0].categories.values()) == pytest.approx(
        expected, abs=1e-5
    )


def test_long_inputs_error(folder, guard):
    verdicts = load(folder, max_length=96, long_inputs="error").judge(
        [pair("Why?", LONG), PAIRS[0]]
    )
    assert "more than --max_length 96" in verdicts[0].error and verdicts[0].score() == 1.0
    assert close(verdicts[1], guard.judge(PAIRS[:1])[0])


@pytest.mark.parametrize("question", ["Why?", LONG])
@pytest.mark.parametrize("answer", ["", LONG])
def test_a_window_too_small_is_an_error_verdict(folder, guard, question, answer):
    """One text that does not fit takes no other down with it; an answer without text is judged all
    the same.
    """
    tight, short = load(folder, max_length=34), pair("", "No.")
    verdicts = tight.judge([pair(question, answer), short])
    assert (verdicts[0].error is not None and verdicts[0].score() == 1.0) == (
        LONG in (question, answer)
    )
    assert close(verdicts[1], guard.judge([short])[0])
    assert guard.judge([pair(question, answer)])[0].error is None


def test_not_a_number_is_an_error(folder):
    broken = load(folder, max_length=96)
    broken.model.score.weight.data.fill_(float("nan"))
    for verdict in broken.judge(PAIRS):
        assert verdict.error == "the model's output is not a number"
        assert (
            verdict.response_unsafe is None and verdict.categories == {} and verdict.score() == 1.0
        )


@pytest.mark.parametrize("text", [f"@ {LONG}", f"{LONG} @"])
def test_not_a_number_in_one_window_is_an_error(folder, text):
    broken = load(folder, max_length=96)
    at = broken.tokenizer.convert_tokens_to_ids("@")
    broken.model.get_input_embeddings().weight.data[at] = float("nan")
    verdicts = broken.judge([pair("Why?", text), PAIRS[0]])
    assert verdicts[0].error == "the model's output is not a number" and verdicts[1].error is None


def halve_weights(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def drop_head(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def narrow_head(folder):
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] = weights["score.weight"][:2].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def write(text, name="guard.json"):
    return lambda folder: (folder / name).write_bytes(text.encode("latin-1"))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            {"labels": ["safe", "unsafe"]},
            "guard.json, field labels: names 2 outputs, the model has 14",
        ),
        ({"labels": CATEGORIES[::-1]}, "guard.json, field labels: output 0 is 'violence"),
        ({"template": "beavertale"}, "'beavertale': unknown; the templates are"),
        ({"template": ["x"]}, "guard.json, field template: input should be a valid string"),
        ({"labels": "beavertails"}, "guard.json, field labels: input should be a valid array"),
        ({"max_length": "long"}, "guard.json, field max_length: input should be a valid integer"),
        ({"thresholds": {"flagged": {}}}, "field thresholds.flagged.value: missing"),
        (
            {"kind": "oracle"},
            "field kind: 'oracle' is unknown; known kinds: classifier, lora_guard, generative",
        ),
        (write('{"kind": "classifier",\n]'), "guard.json: malformed JSON .*line 2"),
        (write("\xff"), "guard.json: malformed JSON"),
        (write("[]"), "guard.json: expected an object"),
        (write("{", "config.json"), "cannot be loaded as a classifier"),
        (write("{", "tokenizer.json"), "cannot be loaded as a classifier"),
        (halve_weights, "cannot be loaded as a classifier"),
        (narrow_head, "cannot be loaded as a classifier"),
        (drop_head, "not a trained classifier, it lacks score.weight"),
    ],
)
def test_bad_folder_is_one_line(tiny_classifier, tmp_path, spoil, words):
    folder = tiny_classifier(tmp_path)
    if isinstance(spoil, dict):  # changes of the card
        described(folder, **spoil)
    else:
        spoil(folder)
    with pytest.raises(UserError, match=words) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "options", "words"),
    [
        ("no/such/folder", {}, "no folder here, and no hub id that loads"),
        ("nobody/has-this-guard", {}, "no folder here, and no hub id that loads"),
        ("beaver-dam-7b", {}, "PKU-Alignment/beaver-dam-7b: no folder here"),
        ("BeaverDam", {}, "PKU-Alignment/beaver-dam-7b: no folder here"),
        ("wildgard", {}, r"no hub id that loads.*; did you mean wildguard\?"),
        ("llamaguard-3", {}, r"; did you mean LlamaGuard3\?"),
        (None, {"long_inputs": "ignore"}, "expected one of windows, error, truncate"),
        (None, {"template": "beavertale"}, "unknown; the templates are .*beavertails"),
    ],
)
def test_bad_spec_is_one_line(folder, spec, options, words):
    with pytest.raises(UserError, match=words) as caught:
        load_guard(spec or str(folder), **options)
    assert "\n" not in str(caught.value)


def test_two_labels_need_a_template(tiny_classifier, tmp_path):
    folder = tiny_classifier(tmp_path, labels=["safe", "unsafe"])
    with pytest.raises(UserError, match="name a prompt template"):
        load(folder)
    verdict = load(folder, template="beavertails").judge(PAIRS[:1])[0]
    assert verdict.error is None and list(verdict.categories) == ["safe", "unsafe"]


HEADS = [  # labels, problem_type, the labels that are unsafe: None where they are known
    (["toxic"], None, None),
    (["toxic"], "multi_label_classification", None),
    (["safe", "unsafe"], None, None),
    (["UNHARMFUL", "harmful"], "single_label_classification", None),
    (["LABEL_0", "LABEL_1"], None, ["LABEL_1"]),
    (["safe", "unsafe"], "multi_label_classification", None),
    (["benign", "hate", "threat"], None, None),
    (["hate", "threat", "insult"], "multi_label_classification", None),
    (CATEGORIES, "multi_label_classification", None),
]


@pytest.mark.parametrize(("labels", "problem_type", "unsafe"), HEADS)
def test_probabilities_are_those_of_the_pipeline(
    tiny_classifier, tmp_path, labels, problem_type, unsafe
):
    """Softmax or sigmoid as the head's config says; a text is as unsafe as its unsafe labels."""
    folder = tiny_classifier(tmp_path, labels=labels)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": problem_type}))
    stock = pipeline("text-classification", model=str(folder), device="cpu", top_k=None)
    loaded = load(folder, template="beavertails", unsafe_labels=unsafe)
    known = unsafe or [name for name in labels if name not in ("safe", "UNHARMFUL", "benign")]
    for messages, verdict in zip(PAIRS, loaded.judge(PAIRS), strict=True):
        parts = render("beavertails", messages, loaded.tokenizer)
        (said,) = stock(["".join(part.text for part in parts)])
        expected = {one["label"]: one["score"] for one in said}
        assert verdict.categories == pytest.approx(expected, abs=1e-5)
        values = [expected[name] for name in known]
        exclusive = len(labels) > 1 and problem_type != "multi_label_classification"
        total = sum(values) if exclusive else max(values)
        assert verdict.response_unsafe == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "problem_type", "options", "words"),
    [
        (["LABEL_0", "LABEL_1"], None, {}, r"say which .* \(unsafe_labels=…\); it has LABEL_0, LABEL_1"),
        (["hate", "threat"], None, {}, "say which of its labels"),
        (["safe"], None, {}, "say which of its labels"),
        (["safe", "hate"], None, {"unsafe_labels": ["hat"]}, "has no label 'hat'"),
        (["toxic"], "regression", {}, "problem_type regression: its outputs are no probabilities"),
    ],
)  # fmt: skip
def test_a_head_that_says_nothing_of_harm_is_refused(
    tiny_classifier, tmp_path, labels, problem_type, options, words
):
    folder = tiny_classifier(tmp_path, labels=labels)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": problem_type}))
    with pytest.raises(UserError, match=words):
        load(folder, template="beavertails", **options)


def test_a_base_model_is_no_guard(tiny_base):
    """transformers would give it a random head and warn."""
    with pytest.raises(UserError, match="not a trained classifier"):
        load(tiny_base, template="beavertails")
