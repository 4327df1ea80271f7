"""The probe in guard.json: a folder whose base, tokenizer, template, labels or adapter is another
one is refused.

Every fault here once loaded without a word, and gave other scores than those that were trained.
"""

import json
import logging
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import completions
import families
import pytest
import torch
from checks import change_card, read_json, user_error
from completions import token
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from scripts import module
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import engines
from common.conversation import pair
from common.data import taxonomy
from guards import add_probe, load_guard
from guards.card import (
    ClassifierCard,
    GenerativeCard,
    Probe,
    check_scores,
    local_sha256,
    read_card,
    write_card,
)

serve = completions.serve  # a fixture
CATEGORIES = taxonomy("beavertails")
TALK = [pair("How do I get into my neighbour's house?", "Ask him for a key.")]
KINDS = ["classifier", "lora", "generative", "arm"]


# --- guards of every kind, as a recipe leaves them --------------------------------------------------------------------


def save_classifier(folder: Path, tiny_classifier) -> None:
    tiny_classifier(folder, labels=[f"LABEL_{i}" for i in range(14)])
    add_probe(folder, ClassifierCard(template="beavertails", labels=CATEGORIES, max_length=512))


def save_generative(folder: Path) -> None:
    families.save(folder, "qwen2", ["safe", "unsafe"], seed=13)
    add_probe(folder, GenerativeCard(guard="expguard", max_length=700))


def save_arm(folder: Path, base: Path) -> None:
    """A LoRA adapter on a guard that writes its verdict."""
    families.save(base, "llama2", ["safe", "unsafe"], seed=3)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    add_probe(folder, GenerativeCard(guard="llama-guard", max_length=700, base_model=str(base)))


@pytest.fixture(scope="module")
def originals(tmp_path_factory, tiny_classifier, guard, bases) -> Path:
    root = tmp_path_factory.mktemp("originals")
    save_classifier(root / "classifier", tiny_classifier)
    shutil.copytree(guard, root / "lora")
    shutil.copytree(bases["llama"], root / "lora-base")
    save_generative(root / "generative")
    save_arm(root / "arm", root / "arm-base")
    return root


@pytest.fixture
def folders(originals, tmp_path) -> Path:
    """A copy of all of them, to spoil, whose adapters name the bases of the copy."""
    root = Path(shutil.copytree(originals, tmp_path / "guards"))
    for name in ("lora", "arm"):
        change_card(root / name, base_model=str(root / f"{name}-base"))
    return root


def load(folder: Path, **options):
    return load_guard(str(folder), progress=False, **options)


def refusal(folder: Path, **options) -> str:
    with user_error() as caught:
        load(folder, **options)
    return str(caught.value)


# --- what is as it was ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_guard_that_is_as_it_was_loads(folders, kind, caplog):
    card = read_card(folders / kind)
    guard = load(folders / kind)
    assert guard.sees == card.sees
    assert card.sees != "not known"
    assert card.probe.dtype == "float32"
    assert "no probe" not in caplog.text


def test_a_guard_without_room_for_the_probe_has_a_shorter_one(tmp_path, tiny_classifier):
    """Cut when it was saved and read in windows when it was loaded, it had two scores."""
    for name, length in (("wide", 512), ("narrow", 64)):
        folder = tmp_path / name
        tiny_classifier(folder, labels=[f"LABEL_{i}" for i in range(14)])
        card = ClassifierCard(template="beavertails", labels=CATEGORIES, max_length=length)
        add_probe(folder, card, long_inputs="truncate")
    load(tmp_path / "narrow")
    probes = [read_card(tmp_path / name).probe for name in ("wide", "narrow")]
    wide, narrow = ("".join(turn["content"] for turn in probe.messages) for probe in probes)
    assert len(narrow) < len(wide)


@pytest.mark.parametrize("kind", KINDS)
def test_an_older_card_without_probe_loads_and_says_so(folders, kind, caplog):
    change_card(folders / kind, without="probe")
    with caplog.at_level(logging.WARNING):
        assert load(folders / kind).judge(TALK)[0].error is None
    (line,) = [line for line in caplog.messages if "has no probe" in line]
    assert line.startswith(f"{folders / kind}/guard.json: ")


def test_what_is_asked_for_is_no_fault(folders, caplog):
    """Another template, or other words for the labels, is another guard by the user's own wish. The
    probe is judged with the room that the guard was trained with, whatever it is given now.
    """
    load(folders / "classifier", template="last_turn")
    load(folders / "classifier", labels=CATEGORIES[::-1])
    load(folders / "generative", chat_template="{{ messages[0]['content'] }}")
    assert load(folders / "lora", max_length=40).max_length == 40
    assert load(folders / "lora", max_length=16, long_inputs="error").long_inputs == "error"
    assert "no probe" not in caplog.text


# --- faults -----------------------------------------------------------------------------------------------------------


def other_weights(folder: Path, name: str = "model.safetensors") -> None:
    """The same shapes with other numbers: half of each, but for the norms."""
    path = folder / name
    tensors = {key: value * 0.5 for key, value in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


def other_tokenizer(folder: Path) -> None:
    """The same ids for other pieces: a vocabulary in another order."""
    path = folder / "tokenizer.json"
    content = read_json(path)
    model = content["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        names = reversed(list(vocabulary))
        model["vocab"] = dict(zip(names, vocabulary.values(), strict=True))
        model["merges"] = []
    else:
        model["vocab"][259:] = vocabulary[:258:-1]
    path.write_text(json.dumps(content))


def other_chat_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("Task:", "Task, to be done:"))


def card_of(folder: str, **changes) -> Callable[[Path], None]:
    return lambda root: change_card(root / folder, **changes)


def weights_of(folder: str, file: str = "model.safetensors") -> Callable[[Path], None]:
    return lambda root: other_weights(root / folder, file)


ADAPTER = "adapter_model.safetensors"
FAULTS = {  # the guard, and what is another one: how to spoil the copies of all guards
    "classifier: weights": weights_of("classifier"),
    "classifier: labels": card_of("classifier", labels=CATEGORIES[::-1]),
    "classifier: template": card_of("classifier", template="lora_guard"),
    "lora: base": weights_of("lora-base"),
    "lora: adapter": weights_of("lora", ADAPTER),
    "lora: labels": card_of("lora", labels=["unsafe", *CATEGORIES[::-1]]),
    "lora: unsafe label": card_of("lora", labels=[*CATEGORIES, "unsafe"]),
    "lora: fewer labels": card_of("lora", labels=CATEGORIES, head_bias=None),
    "lora: more layers": card_of("lora", num_hidden_layers=4),
    "lora: template": card_of("lora", template="beavertails"),
    "lora: bias": card_of("lora", head_bias=[0.0] * 15),
    "generative: weights": weights_of("generative"),
    "generative: guard": card_of("generative", guard="polyguard-qwen"),
    "arm: base": weights_of("arm-base"),
    "arm: adapter": weights_of("arm", ADAPTER),
    "arm: chat template": lambda root: other_chat_template(root / "arm"),
}


FIELDS = {  # the fault: what of guard.json does not hold then, if it is not the probe
    "lora: fewer labels": "labels: names 14 outputs",
    "lora: more layers": "num_hidden_layers: 4",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_another_guard_than_was_trained_is_refused(folders, fault):
    FAULTS[fault](folders)
    guard = folders / fault.partition(":")[0]
    assert refusal(guard).startswith(f"{guard}/guard.json, field {FIELDS.get(fault, '')}")


@pytest.mark.parametrize("kind", KINDS)
def test_another_tokenizer_is_refused(folders, kind):
    """By the probe, or because it cannot write the verdict words."""
    other_tokenizer(folders / kind)
    said = refusal(folders / kind)
    place = f"{folders / kind}/guard.json, field "
    assert said.startswith(place) or "no token that tells" in said


@pytest.mark.parametrize("fault", ["lora: base", "lora: adapter"])
def test_a_guard_that_rides_along_is_refused_too(folders, fault):
    FAULTS[fault](folders)
    riding = module("lora_guard", "riding")
    with user_error(r"lora/guard\.json, field probe: "):
        riding.GuardedChat(folders / "lora", device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_without_its_tokenizer_is_refused(folders, kind):
    """transformers makes a tokenizer without words, with which every text is the same."""
    (folders / kind / "tokenizer.json").unlink()
    assert refusal(folders / kind).startswith(f"{folders / kind}/tokenizer.json: is missing")


def test_a_model_of_the_hub_without_its_tokenizer_is_refused(tmp_path):
    families.save(tmp_path, "qwen2", ["safe", "unsafe"], seed=3)
    (tmp_path / "tokenizer.json").unlink()
    with user_error("its tokenizer knows no words"):
        load_guard("expguard", model=str(tmp_path), progress=False)


def test_labels_in_another_order_than_the_models_own(tmp_path, tiny_classifier):
    """Where the model names its outputs, the card is compared with it."""
    folder = tiny_classifier(tmp_path)
    names = [CATEGORIES[1], CATEGORIES[0], *CATEGORIES[2:]]
    write_card(folder, ClassifierCard(template="beavertails", labels=names, max_length=512))
    assert f"{folder}/guard.json, field labels: output 0 is {names[0]!r}" in refusal(folder)


# --- a base that moved ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "arm"])
def test_a_base_that_moved_is_found_where_the_user_says(folders, kind):
    (before,) = load(folders / kind).judge(TALK)
    (folders / f"{kind}-base").rename(folders / "moved")
    said = refusal(folders / kind)
    assert said.startswith(f"{folders / kind}/guard.json, field base_model: ")
    assert "base_model=…" in said
    (after,) = load(folders / kind, base_model=str(folders / "moved")).judge(TALK)
    assert after.response_unsafe == pytest.approx(before.response_unsafe, abs=1e-6)
    assert refusal(folders / kind, base_model="nowhere/x").startswith("base_model: nowhere/x: ")


def test_the_base_that_peft_has_noted(folders):
    """Where the card names none; what PEFT noted is the folder of the first save."""
    change_card(folders / "arm", without="base_model")
    path = folders / "arm/adapter_config.json"
    config = read_json(path) | {"base_model_name_or_path": "nowhere/x"}
    path.write_text(json.dumps(config))
    place = f"{path}, field base_model_name_or_path: nowhere/x: "
    assert refusal(folders / "arm").startswith(place)


@pytest.mark.parametrize("kind", ["classifier", "generative"])
def test_whole_weights_have_no_base(folders, kind):
    assert "base_model" in refusal(folders / kind, base_model=str(folders / "lora-base"))


@pytest.mark.parametrize("kind", ["lora", "arm"])
def test_another_base_is_told_by_its_fingerprint(folders, kind):
    """Even where no probe tells it."""
    base = folders / f"{kind}-base"
    change_card(folders / kind, base_sha256=local_sha256(str(base)), probe=None)
    load(folders / kind)
    right = shutil.copytree(base, folders / "right")
    other_weights(base)
    said = refusal(folders / kind)
    assert said.startswith(f"{folders / kind}/guard.json, field base_sha256: ")
    assert str(base) in said
    load(folders / kind, base_model=str(right))


def test_an_adapter_that_is_put_on_its_base(folders, caplog):
    """As evaluations of arms load it: the base by name, the adapter as an option."""
    base, arm = folders / "arm-base", folders / "arm"
    change_card(arm, base_sha256=local_sha256(str(base)))
    add_probe(base, GenerativeCard(guard="llama-guard", max_length=700))  # changes no weight
    ours = load(base, adapter=str(arm), chat_template=(arm / "chat_template.jinja").read_text())
    assert ours.judge(TALK) == load(arm).judge(TALK)
    assert "probe" not in caplog.text
    other_weights(arm, "adapter_model.safetensors")
    assert f"{arm}/guard.json, field probe: " in refusal(base, adapter=str(arm))
    other_weights(base)
    assert f"{arm}/guard.json, field base_sha256: " in refusal(base, adapter=str(arm))


# --- number formats ---------------------------------------------------------------------------------------------------


FITS = {  # scores when saved and now, in a number format: is it the same guard?
    "nearly the same": (0.7, 0.7001, "float32", True),
    "coarse": (0.7, 0.72, "bfloat16", True),
    "nearly none": (1e-9, 1e-7, "float32", True),
    "a server that does not tell small ones": (1e-4, 0.0, "server", True),
    "far": (0.706, 0.468, "float32", False),
    "far, coarse": (0.706, 0.468, "bfloat16", False),
    "near, but not coarse": (0.7, 0.72, "float32", False),
    "small, but ten times": (1e-3, 1e-2, "bfloat16", False),
    "a server that tells another": (0.0, 0.5, "server", False),
    "not a number": (0.7, float("nan"), "float32", False),
}


@pytest.mark.parametrize(("saved", "now", "dtype", "fits"), FITS.values(), ids=FITS)
def test_a_score_within_the_number_formats_tolerance(tmp_path, saved, now, dtype, fits):
    probe = Probe(messages=TALK[0], scores={"unsafe": saved}, dtype="float32")
    differs = r"guard\.json, field probe: unsafe of its text is"
    with nullcontext() if fits else user_error(differs):
        check_scores({"unsafe": now}, dtype, probe, tmp_path)


# --- a server ---------------------------------------------------------------------------------------------------------


def served(guard) -> Callable[[dict], tuple[int, dict]]:
    """What a server says that serves the model of a guard."""

    def rule(body: dict) -> tuple[int, dict]:
        (said,) = guard.model.next_token([body["prompt"]], range(len(guard.tokenizer)))
        likely = sorted(enumerate(said.logprobs), key=lambda one: -one[1])
        return token(dict(likely))

    return rule


def test_a_server_is_asked_the_probe_before_its_first_verdict(folders, serve):
    """It may not be up when the guard is made, and it may serve another model than the folder's."""
    folder = folders / "generative"
    options = {"engine": "server", "server_model": "m"}
    right = load(folder)
    remote = load(folder, server_url=serve(served(right)).url, **options)
    assert remote.moderate(TALK) == pytest.approx(right.moderate(TALK), abs=1e-3)
    families.save(folders / "other", "qwen2", ["safe", "unsafe"], seed=5)
    other = load_guard("expguard", model=str(folders / "other"), progress=False)
    wrong = load(folder, server_url=serve(served(other)).url, **options)
    for _ in range(2):  # what was refused once is not believed the next time
        with user_error(r"generative/guard\.json, field probe: "):
            wrong.judge(TALK)


def test_a_server_that_is_not_up_gives_error_verdicts(folders, monkeypatch):
    monkeypatch.setattr(engines, "RETRIES", 0)
    options = {"engine": "server", "server_url": "http://127.0.0.1:9/v1", "server_model": "m"}
    guard = load(folders / "generative", **options)
    for _ in range(2):  # and it is asked its probe again
        (verdict,) = guard.judge(TALK)
        assert verdict.error is not None
