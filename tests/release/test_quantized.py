"""examples/cross_task_defense over 8- and 4-bit bases, by bitsandbytes."""

import json
from functools import partial

import pytest
import scripts
import torch
from checks import read_json
from safetensors.torch import load_file
from scripts import EXAMPLES

launch = partial(scripts.launch, "cross_task_defense")
DATA = EXAMPLES.parent / "data/sample/cross_task_defense/safety.json"


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.json"
    path.write_text(json.dumps({"instructions": ["Say it.", "Paris!", "Why?"], "inputs": []}))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_a_quantized_base_trains_and_answers(bits, tiny_base, questions, tmp_path):
    pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes is not installed (extra [quantization])"
    )
    flags = ["--base_model", tiny_base, "--data_path", DATA, "--output_dir", tmp_path / "adapter"]
    flags += [
        "--num_epochs",
        1,
        "--batch_size",
        30,
        "--micro_batch_size",
        15,
        "--learning_rate",
        3e-3,
    ]
    flags += ["--lora_r", 4, "--lora_alpha", 8, "--lora_target_modules", "[q_proj,v_proj]"]
    flags += ["--cutoff_len", 256, "--val_set_size", 0, "--warmup_steps", 0, "--save_steps", 2]
    launch("train.py", *flags, "--prompt_template_name", "alpaca", f"--{bits}")
    folders = (tmp_path / "adapter/checkpoint-0", tmp_path / "adapter")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert any(not torch.equal(before[name], after[name]) for name in after)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    if bits == "load_in_8bit":
        files = ["--input_path", questions, "--output_path", tmp_path / "out"]
        options = ["--lora_weights", tmp_path / "adapter", "--load_8bit", "--num_beams", 1]
        launch("generate_answers.py", *files, *options, "--max_new_tokens", 12)
        answers = [read_json(path)["outputs"] for path in (tmp_path / "out").rglob("*.json")]
        assert [len(texts) for texts in answers] == [3]
