"""examples/moderation, run as its README says: as commands, in its folder, with real launchers."""

import json
import re
import shlex
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scripts
import torch
from checks import read_json, read_rows, write_rows
from safetensors.torch import load_file
from scripts import TORCHRUN, error_line
from transformers import AutoModelForSequenceClassification

from common.conversation import log_odds
from common.data import load_conversations
from guards import load_guard

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "examples/moderation"
pytestmark = pytest.mark.slow


launch = partial(scripts.launch, "moderation")


def tiny_arguments(model: str, output: Path) -> list[str]:
    """A run of 8 steps of 8 rows, every flag a plain one."""
    return [
        "train.py", "--model_name_or_path", model, "--output_dir", str(output),
        "--train_data_name_or_path", "beavertails-sample:train", "--max_train_rows", "64",
        "--eval_data_name_or_path", "beavertails-sample:validation",
        "--num_train_epochs", "1", "--per_device_train_batch_size", "8", "--learning_rate", "1e-3",
        "--logging_steps", "1", "--eval_strategy", "no", "--save_strategy", "no",
    ]  # fmt: skip


def losses(folder: Path) -> list[float]:
    log = read_json(folder / "run.json")["log"]
    return [entry["loss"] for entry in log if "loss" in entry]


def logits(folder: Path | str) -> np.ndarray:
    """Logits of a fixed batch from the stock loader."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(input_ids=torch.arange(40, 70).view(2, 15)).logits.numpy()


def check_equal(one: Path, other: Path, loss: float = 2e-4, logit: float = 1e-4) -> None:
    """Two runs had the same losses, and left the same weights."""
    assert losses(one) == pytest.approx(losses(other), abs=loss)
    np.testing.assert_allclose(logits(one), logits(other), atol=logit)


@pytest.fixture(scope="module")
def trained(tiny_base, shared_folder) -> Path:
    """The folder of one uninterrupted run in one process."""
    made = shared_folder(
        "moderation", lambda folder: launch(*tiny_arguments(tiny_base, folder / "guard"))
    )
    return made / "guard"


def test_guard_folder_is_complete(trained):
    """And holds no pickle. (That stock libraries read it: test_invariant.py.)"""
    files = {path.name for path in trained.iterdir()}
    assert files >= {"config.json", "model.safetensors", "guard.json", "run.json", "README.md"}
    assert "tokenizer.json" in files
    assert not list(trained.rglob("*.bin"))
    assert not list(trained.rglob("*.pt"))


def test_model_card_and_manifest_say_what_was_run(trained):
    card = (trained / "README.md").read_text()
    for words in ("beavertails-sample:train", "AUPRC", "pipeline("):
        assert words in card
    run = read_json(trained / "run.json")
    assert run["arguments"]["learning_rate"] == 1e-3
    assert run["seed"] == 42
    assert run["data"]["train_rows"] == 64
    threshold = read_json(trained / "guard.json")["thresholds"]["flagged"]
    assert threshold["on"] == "beavertails-sample:validation"


def test_two_processes_equal_one(trained, tiny_base, tmp_path):
    """2 processes x 4 rows see the batches of 1 process x 8, and end with its weights."""
    flags = ["--per_device_train_batch_size", "4"]
    launch(*tiny_arguments(tiny_base, tmp_path / "two"), *flags, processes=2, threads=1)
    check_equal(tmp_path / "two", trained)


def test_accumulation_equals_one_batch(trained, tiny_base, tmp_path):
    """8 x 1 gives the gradients of 1 x 8, and so its weights."""
    flags = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "8"]
    launch(*tiny_arguments(tiny_base, tmp_path / "steps"), *flags)
    check_equal(tmp_path / "steps", trained)


def test_zero3_shards_trains_equally_and_saves_whole_weights(trained, tiny_base, tmp_path):
    flags = ["--per_device_train_batch_size", "4", "--deepspeed", str(ROOT / "launch/zero3.json")]
    launch(*tiny_arguments(tiny_base, tmp_path / "zero3"), *flags, launcher=TORCHRUN, threads=1)
    check_equal(tmp_path / "zero3", trained, loss=2e-3, logit=2e-3)
    ours, others = (load_file(f / "model.safetensors") for f in (tmp_path / "zero3", trained))
    assert ours.keys() == others.keys()
    for name, tensor in ours.items():
        assert tensor.shape == others[name].shape


SHARDED = """
import sys, torch
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForSequenceClassification
from common.saving import merged_model

torch.distributed.init_process_group("gloo")
first = torch.distributed.get_rank() == 0
base, folder, adapters = sys.argv[1:]
torch.manual_seed(0)
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=14, dtype=torch.float32)
model.config.pad_token_id = 0
layers = model.model.layers
if adapters == "lora":
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model, config).eval()
with torch.inference_mode():
    expected = model(input_ids=torch.arange(40, 70).view(2, 15)).logits
for layer in layers:
    fully_shard(layer)
fully_shard(model)
part = next(p for name, p in layers[0].named_parameters() if name.endswith("up_proj.weight") or "base_layer" in name)
assert part.to_local().shape[0] * 2 == part.shape[0], "not sharded"
options = StateDictOptions(full_state_dict=True, cpu_offload=True)
state_dict = get_model_state_dict(model, options=options)  # as accelerate does
if first:
    torch.save(expected, folder + "/expected")
    if adapters == "lora":
        model = merged_model(model, state_dict)
        state_dict = model.state_dict()
    model.save_pretrained(folder + "/after", state_dict=state_dict)
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("adapters", ["full", "lora"])
def test_fully_shard_saver(tiny_base, tmp_path, adapters):
    """Raw FSDP2 over 2 gloo processes really shards, and the saver still writes the whole model,
    adapters merged.
    """
    script = tmp_path / "shard.py"
    script.write_text(SHARDED)
    scripts.launch("moderation", script, tiny_base, tmp_path, adapters, processes=2, threads=1)
    expected = torch.load(tmp_path / "expected", weights_only=True)
    np.testing.assert_allclose(logits(tmp_path / "after"), expected, atol=1e-5)


def test_killed_and_resumed_equals_uninterrupted(trained, tiny_base, tmp_path):
    """kill -9 after the first checkpoint; the rest of the steps have the losses of the run that was
    left alone.
    """
    folder = tmp_path / "killed"
    command = tiny_arguments(tiny_base, folder)
    command += ["--save_strategy", "steps", "--save_steps", "3"]
    process = scripts.start([sys.executable, *command], cwd=RECIPE)
    scripts.wait_until_written(folder / "checkpoint-3/trainer_state.json", process)
    process.kill()
    process.wait()
    assert not (folder / "guard.json").exists()
    again = launch(*command, check=False)
    assert "--resume_from_checkpoint latest" in error_line(again)
    launch(*command, "--resume_from_checkpoint", "latest")
    check_equal(folder, trained, loss=1e-6, logit=1e-6)


with_ctrl_c = pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN, reason="this shell keeps Ctrl-C to itself"
)


def stopped_line(command: list, appears: Path, log: Path) -> str:
    """What a command says when Ctrl-C comes as soon as a file has appeared."""
    with log.open("wb") as said:
        process = scripts.start([sys.executable, *command], cwd=RECIPE, errors=said.fileno())
        scripts.wait_until_written(appears, process)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    text = log.read_text()
    assert "Traceback" not in text
    (line,) = re.findall("^stopped .*", text, re.M)
    return line


@with_ctrl_c
def test_ctrl_c_is_one_line_with_the_command_that_goes_on(tiny_base, tmp_path):
    folder = tmp_path / "stopped"
    command = [*tiny_arguments(tiny_base, folder), "--save_strategy", "steps", "--save_steps", "2"]
    command += ["--num_train_epochs", "50"]
    line = stopped_line(command, folder / "checkpoint-2/trainer_state.json", tmp_path / "log")
    whole = folder.glob("checkpoint-*/trainer_state.json")
    last = max(int(path.parent.name.removeprefix("checkpoint-")) for path in whole)
    again = shlex.join(["python", *map(str, command), "--resume_from_checkpoint", "latest"])
    assert line == f"stopped after checkpoint-{last}; to go on: {again}"
    assert not (folder / "guard.json").exists()


@with_ctrl_c
def test_ctrl_c_keeps_what_is_judged(trained, tmp_path):
    """The same command goes on, and judges only what is missing."""
    rows = []
    for number in range(400):
        answer = f"Answer {number}. " + "One thing follows another. " * 20
        row = {"prompt": f"Question {number}?", "response": answer, "response_label": number % 2}
        rows.append(row)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out"
    command = ["evaluate.py", "--eval_dataset", data, "--model_path", trained, "--output_dir", out]
    kept = out / "runs/verdicts.jsonl"
    line = stopped_line(command, kept, tmp_path / "log")
    before = kept.read_bytes()
    count = before.count(b"\n")
    assert 0 < count < 400
    again = shlex.join(["python", *map(str, command)])
    assert line == f"stopped after {count} of 400 rows, kept in {kept}; to go on: {again}"
    assert not (out / "results.json").exists()
    done = launch(*command)
    assert kept.read_bytes().startswith(before)
    assert kept.read_bytes().count(b"\n") == 400
    assert len(read_rows(out / "predictions.jsonl")) == 400
    assert f"Results are in {out}; open results.html first." in done.stderr


def test_lora_learns(tiny_base, tmp_path):
    """That the folder is the model that was trained, test_invariant.py says."""
    folder = tmp_path / "lora"
    launch(*tiny_arguments(tiny_base, folder), "--use_peft", "--lora_r", "4")
    assert losses(folder)[-1] < losses(folder)[0]


def test_the_papers_command_runs_as_printed(tiny_base, tmp_path):
    """Apart from model, data, process count (and --max_train_rows, for the time it takes)."""
    done = launch(
        "train.py", "--model_name_or_path", tiny_base, "--train_data_name_or_path", "beavertails-sample:train",
        "--eval_data_name_or_path", "beavertails-sample:test", "--output_dir", str(tmp_path / "beavertails-7b"),
        "--num_train_epochs", "4", "--per_device_train_batch_size", "16", "--per_device_eval_batch_size", "16",
        "--gradient_accumulation_steps", "1", "--evaluation_strategy", "steps", "--eval_steps", "250",
        "--save_strategy", "epoch", "--save_total_limit", "1", "--learning_rate", "1e-5", "--weight_decay", "0.1",
        "--warmup_ratio", "0.03", "--lr_scheduler_type", "cosine", "--logging_steps", "1",
        "--fsdp", "full_shard auto_wrap", "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer",
        "--gradient_checkpointing", "--bf16", "True", "--tf32", "True", "--max_train_rows", "64",
        launcher=TORCHRUN, threads=1,
    )  # fmt: skip
    said = done.stderr + done.stdout
    once = ["--evaluation_strategy is gone", "--warmup_ratio is gone"]
    if not torch.cuda.is_available():
        once.append("does not shard")
    for words in once:
        assert said.count(words) == 1, words
    assert "no checkpoint is selected and no threshold fitted" in said
    folder = tmp_path / "beavertails-7b"
    assert read_json(folder / "guard.json")["thresholds"]["flagged"]["how"] == "default"
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-8"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rat", "1e-5"], "--learning_rat"),
        (["--model_name_or_path", "no/such-folder/here"], "--model_name_or_path"),
    ],
    ids=["flag", "model"],
)
def test_a_mistake_is_one_line_and_leaves_nothing(flags, message, tiny_base, tmp_path):
    done = launch(*tiny_arguments(tiny_base, tmp_path / "guard"), *flags, check=False)
    assert message in error_line(done)
    assert not (tmp_path / "guard").exists()


def test_scores_without_near_copies_of_training_rows(trained, tmp_path):
    """Two of 26 rows are training rows, but for case and signs."""
    folder = ROOT / "data/sample/beavertails"
    rows = read_rows(folder / "test.jsonl")[:24]
    for row in read_rows(folder / "train.jsonl")[:2]:
        rows.append(row | {"prompt": row["prompt"].upper(), "response": f"{row['response']} !!"})
    file = write_rows(tmp_path / "rows.jsonl", rows)
    flags = ["--baselines", "beavertails-sample:train[:64]", "--output_dir", tmp_path / "out"]
    launch("evaluate.py", "--model_path", trained, "--eval_dataset", file, *flags)
    found = read_json(tmp_path / "out/results.json")["near_copies"]
    supports = {name: scores["support"] for name, scores in found.items()}
    assert supports == {"all rows": 26, "without 2 near-copies": 24}
    assert "| without 2 near-copies |" in (tmp_path / "out/results.md").read_text()


def test_rows_that_were_labelled_again_go_back_into_training(trained, tiny_base, tmp_path):
    """Evaluate, export what is near the threshold, mend its labels, train on both files."""
    base = "beavertails-sample:train[:64]"
    flags = ["--eval_dataset", base, "--output_dir", tmp_path / "out", "--export_uncertain", "6"]
    command = ["evaluate.py", "--model_path", trained, *flags]
    launch(*command)
    file = tmp_path / "out/uncertain.jsonl"
    rows = read_rows(file)
    threshold = load_guard(str(trained)).thresholds["flagged"]["value"]
    every = [row["guard"] for row in read_rows(tmp_path / "out/predictions.jsonl")]
    nearest = sorted(every, key=lambda score: abs(log_odds(score) - log_odds(threshold)))[:6]
    assert [row["scores"]["guard"] for row in rows] == pytest.approx(nearest, abs=1e-4)
    mended = [row | {"response_label": "safe", "categories": []} for row in rows]
    write_rows(file, mended)
    assert "uncertain.jsonl is there" in launch(*command, check=False).stderr
    words = tiny_arguments(tiny_base, tmp_path / "guard")
    words[words.index("beavertails-sample:train")] = base
    words.insert(words.index(base) + 1, str(file))
    launch(*words)
    of_mended = [[row["prompt"], row["response"]] for row in rows]
    kept = []
    for row in load_conversations(base):
        if [turn["content"] for turn in row["messages"]] not in of_mended:
            kept.append(row["response_unsafe"])
    data = read_json(tmp_path / "guard/run.json")["data"]
    assert data["train_rows"] == len(kept) + 6 == 64
    assert data["train_unsafe"] == sum(kept)
    card = read_json(tmp_path / "guard/guard.json")
    assert card["data"]["train_data"] == f"{base} + {file}"
    assert "uncertain.jsonl" in (tmp_path / "guard/README.md").read_text()


def test_evaluation_file_report(trained, tmp_path):
    """The paper's evaluation.json, with a judge that is missing on one model: every file, and
    figures that add up.
    """
    rows = read_json(ROOT / "data/sample/beavertails/evaluation.json")
    without = rows[0]["model"]
    for row in rows:
        if row["model"] == without:
            del row["flagged"]["gpt4"]
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps(rows))
    out = tmp_path / "out"
    flags = ["--max_length", "512", "--output_dir", out, "--threshold", "0.3"]
    done = launch("evaluate.py", "--eval_dataset", file, "--model_path", trained, *flags)
    judged = read_json(out / "evaluation.json")
    results = read_json(out / "results.json")["models"]
    assert [row["prompt"] for row in judged] == [row["prompt"] for row in rows]
    for name, summary in results.items():
        part = [row["flagged"] for row in judged if name in (row["model"], "all models")]
        for judge in ("moderation", "human", "gpt4"):
            known = [flagged[judge] for flagged in part if judge in flagged]
            expected = np.mean(known) if known else None
            assert summary[f"flagged_proportion/{judge}"] == pytest.approx(expected)
        same = np.mean([flagged["moderation"] == flagged["human"] for flagged in part])
        assert summary["agreement/moderation&human"]["agreement"] == pytest.approx(same)
    assert results[without]["agreement/moderation&gpt4"]["agreement"] is None
    for row in read_json(out / "predictions.json"):
        assert row["flagged"] == (max(row["categories"].values()) > 0.3)
    assert (out / "flagged-proportion.png").read_bytes().startswith(b"\x89PNG")
    assert "Cohen's kappa" in done.stdout
