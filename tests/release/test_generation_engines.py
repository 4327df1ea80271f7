"""common/engines.py against real peers: vLLM in process and `vllm serve`. (Servers that fail:
unit/test_engines.py.)
"""

import json
from functools import partial
from pathlib import Path

import pytest
import scripts
import torch
from conftest import CHAT_TEMPLATE, bpe_tokenizer, tiny_config
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM
from vllm_server import needs_vllm, vllm_server

from common.engines import ServerEngine, TransformersEngine

slow = pytest.mark.slow
launch = partial(scripts.launch, "cross_task_defense")
QUESTIONS = [
    "Say it.",
    "Why do people tell lies? " * 6,
    "Paris!",
    "What is in the box? " * 3,
    "Use two locks.",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny model whose heads are as wide as vLLM's kernels want them."""
    folder, tokenizer = tmp_path_factory.mktemp("vllm-base"), bpe_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    shape = {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
    }
    LlamaForCausalLM(tiny_config(tokenizer, **shape, tie_word_embeddings=False)).save_pretrained(
        folder
    )
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
        argv = [
            "--base_model",
            base,
            "--input_path",
            folder / "questions.json",
            "--output_path",
            folder / name,
        ]
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
    assert (
        answers("vllm-adapter", "--engine", "vllm", "--lora_weights", adapter)
        == expected["adapter"]
    )


@slow
@needs_vllm
def test_vllm_serve_says_what_transformers_says(answers, expected, base, adapter, tmp_path):
    flags = ["--generation-config", "vllm", "--served-model-name", "base"]
    flags += ["--enable-lora", "--max-lora-rank", 8, "--lora-modules", f"defence={adapter}"]
    with vllm_server(base, tmp_path / "serve.log", *flags) as address:
        there = [
            "--engine",
            "server",
            "--server_url",
            f"{address}/v1",
            "--server_model",
        ]
        served = {"base": answers("served-base", *there, "base")}
        served["adapter"] = answers("served-adapter", *there, "defence", "--lora_weights", adapter)
        # the server leaves out what remains of a character at the end
        for name, texts in served.items():
            assert texts == [text.rstrip("\ufffd") for text in expected[name]]
        tokenizer, prompts = (
            AutoTokenizer.from_pretrained(base),
            [[5, 6, 7], [40, 50, 60, 70], [9] * 30],
        )
        local = TransformersEngine(str(base), tokenizer)
        remote = ServerEngine("base", server_url=there[3])
        every = range(5, 105)  # far more than the 20 likeliest, and they come all the same
        for mine, theirs in zip(
            *(engine.next_token(prompts, every) for engine in (local, remote)), strict=True
        ):
            assert theirs.error is None and theirs.top == mine.top
            assert theirs.logprobs == pytest.approx(mine.logprobs, abs=1e-3)
        with pytest.raises(AssertionError, match=r"error: .*absent"):
            answers("absent", *there, "absent")
