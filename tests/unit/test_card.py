"""guard.json: what is wrong in it is refused by one line that names file and field."""

import json

import pytest
from checks import read_json, user_error

from common.data import taxonomy
from guards import load_guard
from guards.card import GenerativeCard, LoraCard, has_card, read_card, write_card

LABELS = ["unsafe", *taxonomy("beavertails")]
FITTED = {"value": 0.4, "how": "max F1", "on": "some/rows:validation"}
LORA = {
    "kind": "lora_guard",
    "template": "lora_guard",
    "labels": LABELS,
    "inputs": ["pair"],
    "max_length": 512,
    "num_hidden_layers": None,
    "thresholds": {"flagged": FITTED, "prompt_unsafe": FITTED, "response_refusal": FITTED},
    "base_model": "some/base",
    "head_bias": None,
}
CLASSIFIER = {
    "kind": "classifier",
    "template": "beavertails",
    "labels": LABELS[1:],
    "max_length": 512,
    "base_model": "some/base",
    "num_hidden_layers": 4,
    "data": {"train": "mine", "rows": 7},
}
GENERATIVE = {"kind": "generative", "guard": "expguard", "max_length": 512, "arm": "A4", "seed": 1}
CARDS = {"lora_guard": LORA, "classifier": CLASSIFIER, "generative": GENERATIVE}


def threshold(value) -> dict:
    return {"thresholds": {"flagged": {"value": value, "how": "max F1", "on": None}}}


def refusal(folder, content: str | dict) -> str:
    """What `read_card` says of a file."""
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "guard.json").write_bytes(text.encode("latin-1"))
    with user_error() as caught:
        read_card(folder)
    return str(caught.value)


@pytest.mark.parametrize("kind", CARDS)
def test_a_card_comes_back_as_it_was(tmp_path, kind):
    (tmp_path / "guard.json").write_text(json.dumps(CARDS[kind]))
    card = read_card(tmp_path)
    write_card(tmp_path / "copy", card)
    assert read_card(tmp_path / "copy") == card
    written = read_json(tmp_path / "copy/guard.json")
    assert CARDS[kind].items() <= written.items()


WRONG = [1, 7, -1, 1.0000001, float("nan"), float("inf"), True, "0.5", None]


@pytest.mark.parametrize("value", WRONG)
def test_a_threshold_is_a_probability_that_a_score_can_exceed(tmp_path, value):
    """One of 1, 7, NaN, -1 or `true` would block nothing, or everything, without a word."""
    said = refusal(tmp_path, GENERATIVE | threshold(value))
    assert said.startswith(f"{tmp_path}/guard.json, field thresholds.flagged.value: ")


def test_the_callers_threshold_is_checked_as_the_cards(tiny_classifier, tmp_path):
    folder = str(tiny_classifier(tmp_path))
    with user_error(r"^field thresholds\.flagged\.value: "):
        load_guard(folder, **threshold(7))
    with user_error(r"^field thresholds\.flaged"):
        load_guard(folder, thresholds={"flaged": {"value": 0.5, "how": "default"}})
    given = {"flagged": {"value": 0.0, "how": "default"}}
    assert load_guard(folder, thresholds=given).thresholds == given


MAY_BE_LEFT_OUT = ("kind", "thresholds", "base_model", "num_hidden_layers", "data", "arm", "seed")
REQUIRED = [("lora_guard", "base_model"), ("lora_guard", "num_hidden_layers")]
for kind, card in CARDS.items():
    REQUIRED += [(kind, name) for name in card if name not in MAY_BE_LEFT_OUT]


@pytest.mark.parametrize(("kind", "name"), REQUIRED)
def test_what_changes_a_score_cannot_be_left_out(tmp_path, kind, name):
    card = {key: value for key, value in CARDS[kind].items() if key != name}
    said = refusal(tmp_path, card)
    assert said.startswith(f"{tmp_path}/guard.json, field {name}: missing")


HALF_A_THRESHOLD = {"flagged": {"value": 0.5}}


@pytest.mark.parametrize(
    ("kind", "change", "place"),
    [
        ("lora_guard", {"head_bias": [0.5]}, "head_bias: 1 numbers for 15 labels"),
        ("lora_guard", {"head_bias": [float("nan")] * 15}, "head_bias.0: "),
        ("lora_guard", {"inputs": "pair"}, "inputs: "),
        ("lora_guard", {"inputs": []}, "inputs: "),
        ("lora_guard", {"inputs": ["both"]}, "inputs.0: "),
        ("lora_guard", {"num_hidden_layers": 0}, "num_hidden_layers: "),
        ("lora_guard", {"template": "lora"}, "template: template 'lora': unknown"),
        ("lora_guard", {"base_model": ""}, "base_model: "),
        ("classifier", {"labels": ["a", "b", "a"]}, "labels: a name is there twice"),
        ("classifier", {"labels": "beavertails"}, "labels: "),
        ("classifier", {"max_length": "long"}, "max_length: "),
        ("classifier", {"max_length": True}, "max_length: "),
        ("classifier", {"max_length": 0}, "max_length: "),
        ("classifier", {"pooling": "mean"}, "pooling: "),
        ("classifier", {"input": "chat"}, "input: "),
        ("classifier", {"descriptions": {"litter": ""}}, "descriptions: 'litter' is none of"),
        ("classifier", {"head_bias": None}, "head_bias: unknown"),
        ("classifier", {"thresholds": {"flaged": None}}, "thresholds.flaged"),
        ("classifier", {"thresholds": HALF_A_THRESHOLD}, "thresholds.flagged.how: missing"),
        ("generative", {"guard": "nobody"}, "guard: 'nobody' is no generative guard"),
        ("generative", {"guard": "beaver-dam-7b"}, "guard: 'beaver-dam-7b' is no generative"),
        ("generative", {"kind": "oracle"}, "kind: 'oracle' is unknown; known kinds: "),
        ("generative", {"probe": {}}, "probe.messages: missing"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, kind, change, place):
    said = refusal(tmp_path, CARDS[kind] | change)
    assert said.startswith(f"{tmp_path}/guard.json, field {place}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"kind": "classifier",\n]', "at line 2"),
        ("\xff", "malformed JSON"),
        ("[]", "expected an object"),
        ("{}", "field kind: missing"),
    ],
    ids=["no JSON", "no UTF-8", "no object", "no kind"],
)
def test_what_is_no_card_is_named(tmp_path, content, said):
    assert said in refusal(tmp_path, content)


def test_a_card_is_of_the_kind_that_is_wanted(tmp_path):
    with user_error(r"guard\.json: no guard of a recipe lies there"):
        read_card(tmp_path)
    assert not has_card(tmp_path)
    write_card(tmp_path, GenerativeCard(guard="expguard", max_length=9))
    assert has_card(tmp_path)
    with user_error(r"guard\.json, field kind: expected 'lora_guard', found 'generative'"):
        read_card(tmp_path, LoraCard)


def test_a_wrong_card_is_not_written(tmp_path):
    """A changed copy is not checked by pydantic, so the writer checks."""
    card = GenerativeCard(guard="expguard", max_length=9).model_copy(update={"max_length": 0})
    with user_error("field max_length"):
        write_card(tmp_path, card)
    assert not has_card(tmp_path)


def test_a_threshold_of_a_category_is_of_a_label(tmp_path):
    thresholds = {"privacy": {"value": 0.3, "how": "max F1", "on": "some/rows"}}
    card = CARDS["classifier"] | {"labels": ["privacy", "drugs"], "category_thresholds": thresholds}
    (tmp_path / "guard.json").write_text(json.dumps(card))
    assert read_card(tmp_path).threshold_values()["privacy"]["value"] == 0.3
    said = refusal(tmp_path, card | {"labels": ["drugs"]})
    assert said.endswith("field category_thresholds: 'privacy' is none of the labels")
