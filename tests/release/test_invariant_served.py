"""What vLLM serves equals what was trained: a classifier over HTTP, a generative guard in process.

The rest of the invariant (memory, `load_guard`, pipeline, PEFT) is recipes/test_invariant.py.
"""

import json
import subprocess
import sys

import pytest
import scripts
import torch
from checks import read_json, write_rows
from conftest import tiny_config
from expguard_rows import authored, prompt_tokenizer
from moderation_server import moderation_server
from transformers import LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM
from vllm_server import needs_vllm, post, vllm_server

from common.data import load_conversations
from common.templates import render
from guards import load_guard

pytestmark = [pytest.mark.slow, needs_vllm]
# Heads as wide as vLLM's kernels want them.
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}
# vLLM 0.32 cannot load a Gemma 3 classifier: it looks for the layers without their prefix `model.`
FAMILIES = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM}


def save_base(folder, family="llama"):
    """A tiny random model with a tokenizer that knows the words of the guards."""
    tokenizer = prompt_tokenizer()
    config = tiny_config(tokenizer, **WIDE)
    if family != "llama":
        kind = FAMILIES[family].config_class
        shape = {key: value for key, value in config.to_dict().items() if key in WIDE}
        ids = {
            key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        }
        config = kind(
            vocab_size=config.vocab_size, num_hidden_layers=2, initializer_range=0.3, **shape, **ids
        )
    torch.manual_seed(0)
    FAMILIES[family](config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


WAYS = [(family, []) for family in FAMILIES]
WAYS.append(("llama", ["--use_peft", "true", "--lora_r", "4"]))


@pytest.mark.parametrize(("family", "lora"), WAYS, ids=[*FAMILIES, "llama merged"])
def test_a_classifier_is_served_as_it_was_trained(family, lora, tmp_path):
    """`/classify` with messages: vLLM renders the folder's own chat template."""
    flags = ["--max_train_rows", 16, "--max_steps", 2, "--per_device_train_batch_size", 8, *lora]
    flags += ["--learning_rate", 1e-2, "--save_strategy", "no", "--eval_strategy", "no"]
    folder = tmp_path / "guard"
    scripts.launch(
        "moderation", "train.py",
        "--model_name_or_path", save_base(tmp_path / "base", family), "--output_dir", folder,
        "--train_data_name_or_path", "beavertails-sample:train", *flags,
    )  # fmt: skip
    rows = load_conversations("beavertails-sample:validation", max_rows=6)["messages"]
    expected = load_guard(str(folder), progress=False).judge(rows)
    with vllm_server(folder, tmp_path / "serve.log", "--served-model-name", "guard") as address:
        for messages, verdict in zip(rows, expected, strict=True):
            asked = {"model": "guard", "messages": messages, "add_special_tokens": False}
            said = post(f"{address}/classify", asked)["data"][0]["probs"]
            # in the order of the head's outputs, which are the categories that the 16 rows have
            assert said == pytest.approx(list(verdict.categories.values()), abs=1e-4)


def test_lora_guard_rides_on_the_chat_model_in_vllm(tmp_path):
    """One server has the chat model, and the guard's adapters with their head beside it."""
    base = save_base(tmp_path / "base")
    scripts.launch(
        "lora_guard", "train.py", base, tmp_path / "out", "--train-data", "beavertails-sample:train",
        "--max-train-rows", 16, "--per-device-batch-size", 8, "--learning-rate", 1e-2,
        "--target-modules", "q_proj", "v_proj", "--no-clf-head-bias",
    )  # fmt: skip
    folder = tmp_path / "out/best"
    rows = load_conversations("beavertails-sample:validation", max_rows=6)["messages"]
    expected = load_guard(str(folder), progress=False).judge(rows)
    outputs = 1 + len(expected[0].categories)
    overrides = {"num_labels": outputs, "problem_type": "multi_label_classification"}
    flags = [
        "--runner",
        "pooling",
        "--convert",
        "classify",
        "--hf-overrides",
        json.dumps(overrides),
    ]
    flags += ["--enable-lora", "--lora-modules", f"guard={folder}"]
    with vllm_server(base, tmp_path / "serve.log", *flags) as address:
        for messages, verdict in zip(rows, expected, strict=True):
            text = "".join(part.text for part in render("lora_guard", messages))
            said = post(f"{address}/classify", {"model": "guard", "input": text})["data"][0]
            wanted = [verdict.response_unsafe]
            wanted += verdict.categories.values()
            assert said["probs"] == pytest.approx(wanted, abs=1e-3)


SCRIPT = """
import json, sys
from dataclasses import asdict
from guards import load_guard
if __name__ == "__main__":
    rows = json.load(open(sys.argv[2]))
    verdicts = load_guard(sys.argv[1], engine="vllm", progress=False).judge(rows)
    json.dump([asdict(verdict) for verdict in verdicts], open(sys.argv[3], "w"))
"""


@pytest.fixture(scope="module")
def expguard(tmp_path_factory):
    """ExpGuard's folder, of a tiny model that has learned the words."""
    scratch = tmp_path_factory.mktemp("expguard")
    folder, data = scratch / "guard", write_rows(scratch / "rows.jsonl", authored(24))
    scripts.launch(
        "expguard", "train.py",
        "--model_name_or_path", save_base(scratch / "base"), "--dataset_name", data,
        "--output_dir", folder, "--max_seq_len", 400, "--learning_rate", 3e-3, "--max_steps", 30,
        "--disable_checkpointing",
    )  # fmt: skip
    return folder


def test_a_moderation_server_stands_before_vllm(expguard, tmp_path):
    """`python -m guards.serve FOLDER --engine server`: vLLM computes, the answers are `judge`'s."""
    rows = load_conversations("beavertails-sample:validation", max_rows=6)["messages"]
    guard = load_guard(str(expguard), progress=False)
    with vllm_server(expguard, tmp_path / "vllm.log", "--served-model-name", "guard") as address:
        flags = ["--engine", "server", "--server_url", f"{address}/v1", "--server_model", "guard"]
        with moderation_server(expguard, tmp_path / "serve.log", *flags) as running:
            answers = [running.moderate({"messages": list(messages)}) for messages in rows]
    verdicts = guard.judge(rows)
    assert any(verdict.error is None for verdict in verdicts), "it has not learned the words"
    for answer, verdict in zip(answers, verdicts, strict=True):
        if verdict.error is not None:
            assert answer.status_code == 503
            continue
        (result,) = answer.json()["results"]
        score = pytest.approx(verdict.response_unsafe, abs=1e-4)
        assert result["category_scores"] == {"unsafe": score}


def test_a_generative_guard_is_judged_alike_by_vllm(expguard, tmp_path):
    """ExpGuard's folder: `load_guard(folder, engine="vllm")` gives the verdicts of transformers."""
    rows = load_conversations("beavertails-sample:validation", max_rows=6)["messages"]
    (tmp_path / "asked.json").write_text(json.dumps(list(rows)))
    (tmp_path / "run.py").write_text(SCRIPT)
    command = [sys.executable, "run.py", str(expguard), "asked.json", "found.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = read_json(tmp_path / "found.json")
    expected = load_guard(str(expguard), progress=False).judge(rows)
    assert any(verdict.error is None for verdict in expected), "it has not learned the words"
    for mine, theirs in zip(expected, found, strict=True):
        assert theirs["error"] == mine.error
        for label in ("prompt_unsafe", "response_unsafe"):
            score = getattr(mine, label)
            assert theirs[label] == (score if score is None else pytest.approx(score, abs=1e-4))
