"""bench: each starts from its folder, and two run on a tiny model."""

import importlib
import sys
from pathlib import Path

import pytest
import scripts
import torch
from checks import read_json
from expguard_rows import prompt_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

BENCH = Path(__file__).resolve().parents[2] / "bench"
HELPERS = {"side_by_side.py", "arithmetic.py", "gpu_plan.py", "gpu_results.py"}
RUN_BELOW = {"verdicts.py", "expguard.py", "lora_guard.py", "moderation.py"}
NAMES = sorted({path.name for path in BENCH.glob("*.py")} - HELPERS - RUN_BELOW)
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)
pytestmark = pytest.mark.slow


def run_bench(*command) -> None:
    done = scripts.run([sys.executable, *command], BENCH)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny random chat model that has the words safe and unsafe."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = prompt_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=8192,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_bench_starts(name):
    run_bench(name, "--help")


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("verdicts.py", ["--prompts", 3, "--rounds", 1]),
        ("expguard.py", ["--rows", 2, "--micro_batch", 1, "--maximum", 64]),
    ],
)
def test_ways_agree(name, flags, model, tmp_path):
    run_bench(name, "--model", model, *flags, "--output", tmp_path / "results.json")
    results = read_json(tmp_path / "results.json")["results"]
    assert all(len(rounds) == 1 for rounds in results["seconds"].values())


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("lora_guard.py", ["--rows", 16, "--steps", 1, "--every", 1, 8]),
        ("moderation.py", ["--rows", 8, "--pairs", 4]),
    ],
)
def test_outputs_of_both_ways_are_equal(name, flags, model, tmp_path):
    """The exit code says so."""
    run_bench(name, "--model", model, "--rounds", 2, *flags, "--output", tmp_path / "results.json")
    results = read_json(tmp_path / "results.json")["results"]
    assert results and all(result["equal"] for result in results.values())


def test_the_home_folder_in_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.syspath_prepend(str(BENCH))
    parser = importlib.import_module("side_by_side").bench_parser("", "name", 1)
    args = parser.parse_args(["--output=~/results.json", "--model=~/model"])
    assert args.output == tmp_path / "results.json"
    assert args.model == str(tmp_path / "model")
