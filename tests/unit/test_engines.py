"""The engines: an error is one prompt's alone, models are stock ones, adapters fit their base.

The servers are real ones, on this machine. (vLLM: tests/release/test_generation_engines.py.)
"""

import copy
import logging
import threading
from pathlib import Path

import completions
import pytest
import torch
from bases import gemma3, llama
from checks import user_error
from completions import BROKEN_JSON, DROP, HTML, Held, completion, token
from conftest import bpe_tokenizer, tiny_config
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from common import engines
from common.engines import (
    Decoding,
    EngineStopped,
    NextToken,
    ServerEngine,
    load_engine,
    quantization_config,
)

serve = completions.serve
PROMPTS = [[i, 7] for i in range(6)]
FIFTY = [[i, 7] for i in range(50)]
SHORT = Decoding(max_new_tokens=8)


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch):
    """Retries wait a moment, instead of seconds."""
    openai = pytest.importorskip("openai", reason="the extra [api] is not installed")
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.05)


def engine_of(server, **options) -> ServerEngine:
    return ServerEngine("m", server_url=server.url, **options)


def answer(body):
    """What a good server says: a text, or the tokens that were asked for."""
    if "logprobs" in body:
        return token({5: -0.1, 6: -2.5, 7: -9.0})
    return completion(f"answer {body['prompt'][0]}")


def failed(answers) -> list[int]:
    """Which prompts got an error."""
    return [i for i, one in enumerate(answers) if one.error]


def texts(answers) -> list[str]:
    return [one.text for one in answers]


# --- servers that fail ----------------------------------------------------------------------------


BAD = {
    "html": HTML,
    "broken JSON": BROKEN_JSON,
    "another shape": (200, {"choices": "none today"}),
    "a list": (200, "[1, 2]", "application/json"),
    "no text": (200, {"choices": [{"index": 0, "text": None}]}),
    "refused": (400, {"error": {"message": "this prompt is not allowed"}}),
    "always 500": (500, {"error": {"message": "it crashes"}}),
    "always dropped": DROP,
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_one_bad_answer_is_an_error_of_its_prompt_alone(serve, monkeypatch, bad):
    monkeypatch.setattr(engines, "RETRIES", 1)
    engine = engine_of(serve(lambda body: bad if body["prompt"] == [3, 7] else answer(body)))
    written = engine.completions(PROMPTS, SHORT)
    assert failed(written) == [3]
    assert texts(written[:3]) == ["answer 0", "answer 1", "answer 2"]
    assert failed(engine.next_token(PROMPTS, [5, 6])) == [3]


def test_answers_come_as_they_are_ready(serve):
    server = serve(lambda body: Held() if body["prompt"] == [3, 7] else answer(body))
    answers = engine_of(server, server_timeout=30).complete(PROMPTS, SHORT)
    assert sorted(next(answers)[0] for _ in range(5)) == [0, 1, 2, 4, 5]
    server.end()  # only now does the held one break


def test_a_held_connection_ends(serve, monkeypatch, caplog):
    monkeypatch.setattr(engines, "RETRIES", 1)
    caplog.set_level(logging.INFO)
    server = serve(lambda body: Held() if body["prompt"] == [3, 7] else answer(body))
    assert failed(engine_of(server, server_timeout=1.0).completions(PROMPTS, SHORT)) == [3]
    assert "Retrying request" in caplog.text
    assert server.asked([3, 7]) == 2


def test_a_server_that_fails_now_and_then_loses_nothing(serve, monkeypatch):
    """Each prompt fails once; the key that is sent is the server's, and not OpenAI's."""
    monkeypatch.setenv("SERVER_API_KEY", "sk-secret")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-openai")
    later = {"error": {"message": "later"}}
    troubles = [(429, later), (500, later), DROP]
    seen = set()
    lock = threading.Lock()

    def rule(body):
        prompt = body["prompt"][0]
        with lock:
            again = prompt in seen
            seen.add(prompt)
        return answer(body) if again else troubles[prompt % 3]

    server = serve(rule)
    found = engine_of(server).completions(PROMPTS, SHORT)
    assert texts(found) == [f"answer {i}" for i in range(6)]
    assert server.keys == {"Bearer sk-secret"}


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_refuses_the_key_is_not_asked_on(serve, monkeypatch, status):
    monkeypatch.setenv("SERVER_API_KEY", "sk-secret")
    server = serve(lambda _: (status, {"error": {"message": "no such key: sk-secret"}}))
    engine = engine_of(server, concurrency=2)
    with pytest.raises(EngineStopped, match="of 50 prompts were not asked") as caught:
        list(engine.complete(FIFTY, SHORT))
    assert "sk-secret" not in str(caught.value)
    found = engine.next_token(FIFTY, [5])
    assert failed(found) == list(range(50))
    assert not any("sk-secret" in one.error for one in found)
    assert len(server.bodies) <= 2  # not for another call either


@pytest.mark.parametrize("bad", ["html", "always 500", "always dropped"])
def test_a_server_that_fails_time_after_time_is_left_alone(serve, monkeypatch, bad):
    monkeypatch.setattr(engines, "RETRIES", 0)
    server = serve(lambda body: answer(body) if body["prompt"][0] < 3 else BAD[bad])
    found = {}
    with pytest.raises(EngineStopped):
        for i, one in engine_of(server, concurrency=2).complete(FIFTY, SHORT):
            found[i] = one
    assert len(server.bodies) < 20
    assert {i for i, one in found.items() if not one.error} == {0, 1, 2}


def test_prompts_that_are_refused_each_for_itself_stop_nothing(serve):
    server = serve(lambda body: BAD["refused"] if body["prompt"][0] < 40 else answer(body))
    found = engine_of(server, concurrency=2).completions(FIFTY, SHORT)
    assert failed(found) == list(range(40))


@pytest.mark.parametrize(
    ("option", "value"),
    [("server_url", "http://me:pass@127.0.0.1:1/v1"), ("server_timeout", 0), ("concurrency", 0)],
)
def test_wrong_options_of_a_server(option, value):
    """A password is not repeated."""
    options = {"server_url": "http://127.0.0.1:1/v1"} | {option: value}
    with user_error(option) as caught:
        ServerEngine("m", **options)
    assert "pass@" not in str(caught.value)


def test_beams_are_for_transformers(serve):
    with user_error("--num_beams"):
        engine_of(serve(answer)).complete([[1]], Decoding(num_beams=4))


# --- what a server tells of the next token --------------------------------------------------------


def test_a_server_is_asked_for_the_very_candidates(serve):
    """vLLM tells these, however unlikely they are."""

    def rule(body):
        wanted = {i: -30.0 - i for i in body["logprob_token_ids"]}
        return token({9: -0.001} | wanted)

    (found,) = engine_of(serve(rule)).next_token([[1, 2]], [5, 6])
    assert found == NextToken([-35.0, -36.0], 9)


NO_CANDIDATES = {
    "one is left out": token({5: -0.01, 8: -7.0, 9: -9.0}),
    "no logprobs": (200, {"choices": [{"index": 0, "text": "safe", "logprobs": None}]}),
    "tokens without ids": (
        200,
        {"choices": [{"logprobs": {"tokens": ["safe"], "top_logprobs": [{"safe": -0.1}]}}]},
    ),
}


@pytest.mark.parametrize("reply", NO_CANDIDATES.values(), ids=NO_CANDIDATES)
def test_a_candidate_that_a_server_does_not_tell_is_an_error(serve, reply):
    """It may be unlikely, but nobody knows how unlikely."""
    (found,) = engine_of(serve(lambda _: reply)).next_token([[1]], [5, 6])
    assert found.error
    assert not found.logprobs
    assert found.top is None


# --- models are as transformers loads them --------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return bpe_tokenizer()


def save(folder: Path, tokenizer, **shape) -> Path:
    torch.manual_seed(3)
    shape = {"max_position_embeddings": 512, "eos_token_id": None} | shape
    LlamaForCausalLM(tiny_config(tokenizer, **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("base"), tokenizer)


@pytest.fixture
def engine(base, tokenizer):
    return load_engine("transformers", str(base), tokenizer)


def test_a_loaded_model_is_copied_and_cast_as_any_other(base):
    model = engines.load_causal_lm(str(base))
    stock = AutoModelForCausalLM.from_pretrained(base).to(torch.bfloat16)
    assert model.config._attn_implementation == "sdpa"
    ids = torch.arange(40, 60)[None]
    logits = copy.deepcopy(model).to(torch.bfloat16)(ids).logits
    assert torch.allclose(logits, stock(ids).logits)


QUESTIONS = ["Say it.", "Why do people tell lies? " * 6, "Paris!", "What is in the box? " * 3]
POLICY = "Take the letters from his box, and read them! " * 3


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    ("family", "shape"),
    [(llama, {}), (gemma3, {"sliding_window": 24})],
    ids=["full attention", "sliding window"],
)
def test_batches_write_what_one_prompt_at_a_time_writes(tmp_path, family, shape, beams):
    """Rows of different lengths, left-padded, whose common beginning is run once."""
    name = str(family(tmp_path, eos_token_id=None, **shape))
    tokenizer = AutoTokenizer.from_pretrained(name)
    prompts = [tokenizer(POLICY + text)["input_ids"] for text in QUESTIONS]
    engine = load_engine("transformers", name, tokenizer, batch_size=3)
    decoding = Decoding(max_new_tokens=40, num_beams=beams)
    found = engine.completions(prompts, decoding, skip_special_tokens=False)
    stock = AutoModelForCausalLM.from_pretrained(name)
    options = {"max_new_tokens": 40, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    for ids, one in zip(prompts, found, strict=True):
        out = stock.generate(torch.tensor([ids]), **options)
        assert one.text == tokenizer.decode(out[0, len(ids) :])


def test_a_prompt_that_cannot_be_asked_is_an_error_of_its_own(engine, tokenizer):
    """It does not fit, or the model does not know its token: no index error of the whole batch."""
    unknown = [5, len(tokenizer)]
    prompts = [[5, 6], [9] * 600, [7] * 504, [8] * 505, unknown, [7]]
    assert failed(engine.completions(prompts, SHORT)) == [1, 3, 4]
    assert failed(engine.next_token(prompts, [5])) == [1, 4]
    with user_error("--max_new_tokens 512"):
        engine.complete(prompts, Decoding(max_new_tokens=512))


def test_drawing_has_a_seed(engine):
    one, same, other = (
        texts(engine.completions([[5, 6, 7]], Decoding(8, temperature=1.0, seed=seed)))
        for seed in (0, 0, 1)
    )
    assert one == same
    assert one != other


# --- adapters of another base ---------------------------------------------------------------------


def save_adapter(folder: Path, base: Path, **config) -> Path:
    """An adapter of `base` that changes what it says."""
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj"],
        init_lora_weights=False,
        **config,
    )
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    model.save_pretrained(folder)
    return folder


OTHERS = {  # than a base of 2 layers, 32 wide
    "deeper": {"num_hidden_layers": 4},
    "shallower": {"num_hidden_layers": 1},
    "wider": {"hidden_size": 64},
    "other heads": {"num_key_value_heads": 2},
}


@pytest.mark.parametrize("shape", OTHERS.values(), ids=OTHERS)
def test_an_adapter_of_another_base_is_refused(base, tokenizer, tmp_path, shape):
    """Also before vLLM loads any weight."""
    adapter = save_adapter(tmp_path / "adapter", save(tmp_path / "other", tokenizer, **shape))
    for refuse in (engines.load_causal_lm, engines.check_adapter):
        with user_error(str(base)) as caught:
            refuse(str(base), str(adapter))
        assert str(adapter) in str(caught.value)


@pytest.mark.parametrize("config", [{}, {"layers_to_transform": [1]}, {"use_dora": True}], ids=str)
def test_an_adapter_of_the_base_is_merged(base, tmp_path, config):
    adapter = str(save_adapter(tmp_path / "adapter", base, **config))
    engines.check_adapter(str(base), adapter)
    merged = engines.load_causal_lm(str(base), adapter)
    plain = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(40, 60)[None]
    with torch.inference_mode():
        before = plain(ids).logits
        expected = engines.apply_adapter(plain, adapter, "base")(ids).logits
        found = merged(ids).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, before, atol=1e-2)


def test_an_adapter_that_is_not_there(base, tmp_path):
    with user_error("nowhere"):
        engines.load_causal_lm(str(base), str(tmp_path / "nowhere"))


def test_a_quantized_base_is_configured_in_one_place():
    assert quantization_config(False, False) is None
    assert quantization_config(True, False).load_in_8bit
    four = quantization_config(False, True)
    assert four.load_in_4bit
    assert four.bnb_4bit_quant_type == "nf4"
    assert four.bnb_4bit_use_double_quant
    assert four.bnb_4bit_compute_dtype == torch.float32
    with user_error("not in both"):
        quantization_config(True, True)
