"""common/engines.py: an error a prompt, models as transformers loads them, adapters of their own
base.

The servers are real ones, on this machine. (vLLM: tests/release/test_generation_engines.py.)
"""

import copy
import logging
import threading
from pathlib import Path

import completions
import pytest
import torch
from completions import BROKEN_JSON, DROP, HTML, Held, completion, token
from conftest import bpe_tokenizer, tiny_config
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM

from common import engines
from common.conversation import UserError
from common.engines import Decoding, EngineStopped, ServerEngine, load_engine

serve = completions.serve
PROMPTS = [[i, 7] for i in range(6)]
SHORT = Decoding(max_new_tokens=8)


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch):
    """Retries wait a moment, instead of seconds."""
    openai = pytest.importorskip(
        "openai", reason="the openai client is not installed (extra [api])"
    )
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.05)


def engine_of(server, **options) -> ServerEngine:
    return ServerEngine("m", server_url=server.url, progress=False, **options)


def answer(body) -> tuple:
    """What a good server says: a text, or the tokens that were asked for."""
    if "logprobs" not in body:
        return completion(f"answer {body['prompt'][0]}")
    return token({5: -0.1, 6: -2.5, 7: -9.0})


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


@pytest.mark.parametrize("bad", BAD)
def test_one_bad_answer_is_an_error_of_its_prompt_alone(serve, monkeypatch, bad):
    monkeypatch.setattr(engines, "RETRIES", 1)
    server = serve(lambda body: BAD[bad] if body["prompt"] == [3, 7] else answer(body))
    engine = engine_of(server)
    for found in (engine.completions(PROMPTS, SHORT), engine.next_token(PROMPTS, [5, 6])):
        assert [one.error is None for one in found] == [i != 3 for i in range(6)]
    written = engine.completions(PROMPTS, SHORT)
    assert [one.text for one in written] == [f"answer {i}" if i != 3 else "" for i in range(6)]
    assert server.asked([4, 7]) == 3


def test_answers_come_as_they_are_ready(serve):
    server = serve(lambda body: Held() if body["prompt"] == [3, 7] else answer(body))
    seen = []
    for i, _ in engine_of(server, server_timeout=30).complete(PROMPTS, SHORT):
        seen.append(i)
        if len(seen) == 5:
            server.end()  # only now does the held one break
            break
    assert sorted(seen) == [0, 1, 2, 4, 5]


def test_a_held_connection_ends(serve, monkeypatch, caplog):
    monkeypatch.setattr(engines, "RETRIES", 1)
    caplog.set_level(logging.INFO)
    server = serve(lambda body: Held() if body["prompt"] == [3, 7] else answer(body))
    found = engine_of(server, server_timeout=1.0).completions(PROMPTS, SHORT)
    assert [one.error for one in found] == [None, None, None, "Request timed out.", None, None]
    assert "Retrying request" in caplog.text  # the client's own line
    assert server.asked([3, 7]) == 2


def test_a_server_that_fails_now_and_then_loses_nothing(serve, monkeypatch):
    monkeypatch.setenv("SERVER_API_KEY", "sk-secret")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-openai")  # for OpenAI alone
    troubles = [
        (429, {"error": {"message": "later"}}),
        (500, {"error": {"message": "later"}}),
        DROP,
    ]
    seen, lock = set(), threading.Lock()

    def rule(body):
        prompt = body["prompt"][0]
        with lock:
            first = prompt not in seen
            seen.add(prompt)
        return troubles[prompt % 3] if first else answer(body)

    server = serve(rule)
    prompts = [[i, 7] for i in range(12)]
    found = engine_of(server).completions(prompts, SHORT)
    assert [one.text for one in found] == [f"answer {i}" for i in range(12)]
    assert all(server.asked(prompt) == 2 for prompt in prompts)
    assert server.keys == {"Bearer sk-secret"}


REFUSALS = {
    401: "the server refused the key: Error code: 401.*no such key: …",
    403: "the server refused the key: Error code: 403.*no such key: …",
    404: "the server knows no such model or URL",
}


@pytest.mark.parametrize("status", REFUSALS)
def test_a_server_that_refuses_the_key_is_not_asked_on(serve, monkeypatch, status):
    monkeypatch.setenv("SERVER_API_KEY", "sk-secret")
    server = serve(lambda _: (status, {"error": {"message": "no such key: sk-secret"}}))
    engine = engine_of(server, concurrency=2)
    prompts = [[i, 7] for i in range(50)]
    with pytest.raises(EngineStopped, match=REFUSALS[status]) as caught:
        list(engine.complete(prompts, SHORT))
    assert "sk-secret" not in str(caught.value)
    assert "of 50 prompts were not asked" in str(caught.value)
    found = [*engine.completions(prompts, SHORT), *engine.next_token(prompts, [5])]
    assert all(one.error and "sk-secret" not in one.error for one in found)
    assert len(server.bodies) <= 2  # not for another call either


@pytest.mark.parametrize("bad", ["html", "always 500", "always dropped"])
def test_a_server_that_fails_time_after_time_is_left_alone(serve, monkeypatch, bad):
    monkeypatch.setattr(engines, "RETRIES", 0)
    server = serve(lambda body: answer(body) if body["prompt"][0] < 3 else BAD[bad])
    found = {}
    with pytest.raises(EngineStopped, match="8 requests failed one after another, the last: "):
        for i, one in engine_of(server, concurrency=2).complete([[i, 7] for i in range(50)], SHORT):
            found[i] = one
    assert len(server.bodies) < 20
    assert [found[i].text for i in range(3)] == ["answer 0", "answer 1", "answer 2"]
    assert all(one.error for i, one in found.items() if i >= 3)


def test_prompts_that_are_refused_each_for_itself_stop_nothing(serve):
    server = serve(lambda body: BAD["refused"] if body["prompt"][0] < 40 else answer(body))
    found = engine_of(server, concurrency=2).completions([[i, 7] for i in range(50)], SHORT)
    assert [one.error is None for one in found] == [False] * 40 + [True] * 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"server_timeout": 0}, "server_timeout and concurrency must be above 0"),
        ({"concurrency": 0}, "server_timeout and concurrency must be above 0"),
        ({"server_url": "http://me:pass@127.0.0.1:1/v1"}, "--server_url: expected http"),
    ],
)
def test_options_of_a_server(options, message):
    with pytest.raises(UserError, match=message) as caught:
        ServerEngine("m", **{"server_url": "http://127.0.0.1:1/v1"} | options)
    assert "pass@" not in str(caught.value)


# --- what a server tells of the next token --------------------------------------------------------


def test_a_server_is_asked_for_the_very_candidates(serve):
    """vLLM tells these, however unlikely they are."""

    def rule(body):
        wanted = body["logprob_token_ids"]
        return token({9: -0.001} | {i: -30.0 - i for i in wanted})

    server = serve(rule)
    (found,) = engine_of(server).next_token([[1, 2]], [5, 6])
    assert found == engines.NextToken([-35.0, -36.0], 9)
    (body,) = server.bodies
    assert body["logprob_token_ids"] == [5, 6] and body["logprobs"] == 20
    assert body["return_tokens_as_token_ids"] and body["max_tokens"] == 1


def test_a_word_that_a_server_leaves_out_is_an_error(serve):
    """It may be unlikely, but nobody knows how unlikely."""
    server = serve(lambda _: token({5: -0.01, 8: -7.0, 9: -9.0}))
    (found,) = engine_of(server).next_token([[1]], [5, 6])
    assert found.error and "leaves out 1 of the 2 tokens that were asked for" in found.error
    assert "use one that takes logprob_token_ids" in found.error
    assert not found.logprobs and found.top is None


@pytest.mark.parametrize("logprobs", [None, {"tokens": ["safe"], "top_logprobs": [{"safe": -0.1}]}])
def test_a_server_that_names_no_tokens(serve, logprobs):
    choice = {"index": 0, "text": "safe", "logprobs": logprobs}
    server = serve(lambda _: (200, {"choices": [choice]}))
    (found,) = engine_of(server).next_token([[1]], [5, 6])
    assert found.error == "the server names no tokens by id"


# --- models are as transformers loads them --------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return bpe_tokenizer()


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("base"), tokenizer)


def save(folder: Path, tokenizer, **shape) -> Path:
    torch.manual_seed(3)
    shape = {"max_position_embeddings": 512, "eos_token_id": None} | shape
    LlamaForCausalLM(tiny_config(tokenizer, **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_loaded_model_is_a_stock_one(base):
    """It is copied, cast and moved as any other."""
    model = engines.load_causal_lm(str(base))
    stock = AutoModelForCausalLM.from_pretrained(base)
    kinds = [type(module) for module in stock.modules()]
    assert [type(module) for module in model.modules()] == kinds
    assert model.config._attn_implementation == stock.config._attn_implementation == "sdpa"
    ids = torch.arange(40, 60)[None]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        expected = model.generate(ids.repeat(3, 1), **options)
        assert torch.equal(copy.deepcopy(model).generate(ids.repeat(3, 1), **options), expected)
        logits = copy.deepcopy(model).to(torch.bfloat16)(ids).logits
        assert torch.allclose(logits, stock.to(torch.bfloat16)(ids).logits)


QUESTIONS = ["Say it.", "Why do people tell lies? " * 6, "Paris!", "What is in the box? " * 3]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", [LlamaForCausalLM, Gemma2ForCausalLM])
def test_batches_write_what_one_prompt_at_a_time_writes(tokenizer, tmp_path, family, beams):
    """Left-padded rows, groups of query heads, a sliding window in every second layer of Gemma."""
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    config = tiny_config(tokenizer, **shape, eos_token_id=None)
    if family is Gemma2ForCausalLM:
        names = ("vocab_size", "hidden_size", "intermediate_size", *list(shape)[:2])
        same = {name: getattr(config, name) for name in names}
        config = Gemma2Config(**same, head_dim=8, sliding_window=24, num_hidden_layers=2)
    torch.manual_seed(3)
    family(config).save_pretrained(tmp_path)
    policy = "Take the letters from his box, and read them! " * 3
    prompts = [tokenizer(policy + text)["input_ids"] for text in QUESTIONS]
    engine = load_engine("transformers", str(tmp_path), tokenizer, batch_size=3, progress=False)
    decoding = Decoding(max_new_tokens=40, num_beams=beams)
    found = engine.completions(prompts, decoding, skip_special_tokens=False)
    stock = family.from_pretrained(tmp_path).eval()
    options = {"max_new_tokens": 40, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    for ids, one in zip(prompts, found, strict=True):
        out = stock.generate(torch.tensor([ids]), **options)
        assert one.text == tokenizer.decode(out[0, len(ids) :])


def test_a_prompt_that_does_not_fit_is_an_error_of_its_own(base, tokenizer):
    engine = load_engine("transformers", str(base), tokenizer, progress=False)
    prompts = [[5, 6], [9] * 600, [7] * 504, [8] * 505]
    found = engine.completions(prompts, SHORT)
    assert [one.error is None for one in found] == [True, False, True, False]
    assert found[1].error == "the prompt has 600 tokens; the model has room for 504"
    read = engine.next_token(prompts, [5])
    assert [one.error is None for one in read] == [True, False, True, True]
    with pytest.raises(UserError, match="--max_new_tokens 512: the model has room for 512 tokens"):
        engine.complete(prompts, Decoding(max_new_tokens=512))


def test_a_token_that_the_model_does_not_know_is_an_error_of_its_prompt(base, tokenizer):
    """Not an index error of the whole batch."""
    engine = load_engine("transformers", str(base), tokenizer, progress=False)
    prompts = [[5, 6], [5, len(tokenizer)], [7]]
    for found in (engine.completions(prompts, SHORT), engine.next_token(prompts, [5])):
        assert [one.error is None for one in found] == [True, False, True]
        assert "for which the model has no embedding" in found[1].error


def test_drawing_has_a_seed_and_greedy_decoding_leaves_torchs_own_alone(base, tokenizer):
    engine = load_engine("transformers", str(base), tokenizer, progress=False)
    prompts = [[5, 6, 7], [40, 50]]
    drawn = [Decoding(max_new_tokens=8, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    texts = [[one.text for one in engine.completions(prompts, how)] for how in drawn]
    assert texts[0] == texts[1] != texts[2]
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    engine.completions(prompts, SHORT)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("engine", ["vllm", "server"])
def test_beams_are_for_transformers(engine, monkeypatch):
    made = object.__new__(engines.ENGINES[engine])
    with pytest.raises(UserError, match="--num_beams: beam search needs --engine transformers"):
        made.complete([[1]], Decoding(num_beams=4))


def test_a_quantized_base_is_configured_in_one_place():
    assert engines.quantization_config(False, False) is None
    assert engines.quantization_config(True, False).load_in_8bit
    four = engines.quantization_config(False, True)
    assert four.load_in_4bit and four.bnb_4bit_quant_type == "nf4"
    assert four.bnb_4bit_use_double_quant and four.bnb_4bit_compute_dtype == torch.float32
    assert not engines.quantization_config(False, True, double=False).bnb_4bit_use_double_quant
    with pytest.raises(UserError, match="not in both"):
        engines.quantization_config(True, True)


# --- adapters of another base ---------------------------------------------------------------------


def save_adapter(folder: Path, base: Path, **config) -> Path:
    """An adapter of `base` that changes what it says."""
    torch.manual_seed(1)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], **config)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


OTHERS = {  # than a base of 2 layers, 32 wide
    "deeper": ({"num_hidden_layers": 4}, "8 weights that the base has no place for"),
    "shallower": ({"num_hidden_layers": 1}, "4 places of the base without weights"),
    "wider": ({"hidden_size": 64}, "size mismatch"),
    "other heads": ({"num_key_value_heads": 2}, "size mismatch"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_an_adapter_of_another_base_is_refused(base, tokenizer, tmp_path, other):
    shape, message = OTHERS[other]
    adapter = save_adapter(tmp_path / "adapter", save(tmp_path / "other", tokenizer, **shape))
    with pytest.raises(UserError, match=message) as caught:
        engines.load_causal_lm(str(base), str(adapter))
    assert str(base) in str(caught.value) and str(adapter) in str(caught.value)
    with pytest.raises(UserError, match=message):  # as for vLLM, before any weight is loaded
        engines.check_adapter(str(base), str(adapter))


def test_a_refused_adapter_leaves_the_model_as_it_was(base, tokenizer, tmp_path):
    deep = save(tmp_path / "other", tokenizer, num_hidden_layers=4)
    adapter = save_adapter(tmp_path / "adapter", deep)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    names = list(model.state_dict())
    with pytest.raises(UserError, match="is no adapter of tiny"):
        engines.apply_adapter(model, str(adapter), "tiny")
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("config", [{}, {"layers_to_transform": [1]}, {"use_dora": True}])
def test_an_adapter_of_the_base_is_merged(base, tmp_path, config):
    adapter = save_adapter(tmp_path / "adapter", base, **config)
    engines.check_adapter(str(base), str(adapter))
    merged = engines.load_causal_lm(str(base), str(adapter))
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    ids = torch.arange(40, 60)[None]
    with torch.inference_mode():
        before = plain(ids).logits
        expected = engines.apply_adapter(plain, str(adapter), "base")(ids).logits
        found = merged(ids).logits
    assert torch.allclose(found, expected, atol=1e-4) and not torch.allclose(
        found, before, atol=1e-2
    )


def test_an_adapter_that_is_not_there(base, tmp_path):
    with pytest.raises(UserError, match="nowhere: cannot be applied to"):
        engines.load_causal_lm(str(base), str(tmp_path / "nowhere"))
