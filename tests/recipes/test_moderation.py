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
from checks import cases, kill_when_written, logged, read_json, read_rows, write_rows
from scripts import TORCHRUN, error_line
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForSequenceClassification

from common.data import load_conversations

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


def logits(folder: Path | str) -> np.ndarray:
    """Logits of a fixed batch from the stock loader."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(input_ids=torch.arange(40, 70).view(2, 15)).logits.numpy()


def check_equal(one: Path, other: Path, loss: float = 2e-4, logit: float = 1e-4) -> None:
    """Two runs had the same losses, and left the same weights."""
    assert logged(one, "loss") == pytest.approx(logged(other, "loss"), abs=loss)
    np.testing.assert_allclose(logits(one), logits(other), atol=logit)


@pytest.fixture(scope="module")
def trained(tiny_base, shared_folder) -> Path:
    """The folder of one uninterrupted run in one process."""

    def make(folder: Path) -> None:
        launch(*tiny_arguments(tiny_base, folder / "guard"), "--report_to", "tensorboard")

    return shared_folder("moderation", make) / "guard"


def test_tensorboard_finds_the_losses(trained):
    (events,) = trained.rglob("events.out.tfevents.*")
    found = EventAccumulator(str(events.parent)).Reload().Scalars("train/loss")
    by_step = {loss.step: loss.value for loss in found}
    assert by_step == pytest.approx(logged(trained, "loss"), abs=1e-3)


def test_guard_folder_is_complete(trained):
    """And holds no pickle. (That stock libraries read it: test_invariant.py.)"""
    files = {path.name for path in trained.iterdir()}
    assert files >= {"config.json", "model.safetensors", "guard.json", "run.json", "README.md"}
    assert "tokenizer.json" in files
    assert not list(trained.rglob("*.bin"))
    assert not list(trained.rglob("*.pt"))
    card = (trained / "README.md").read_text()
    for words in ("beavertails-sample:train", "AUPRC", "pipeline("):
        assert words in card
    run = read_json(trained / "run.json")
    assert run["arguments"]["learning_rate"] == 1e-3
    assert run["seed"] == 42
    assert run["data"]["train_rows"] == 64
    threshold = read_json(trained / "guard.json")["thresholds"]["flagged"]
    assert threshold["on"] == "beavertails-sample:validation"


ZERO3 = ["--deepspeed", ROOT / "launch/zero3.json"]


@cases(
    "rows, flags, options, tolerance",
    {
        "two processes": (4, [], {"processes": 2}, 1e-4),
        "accumulation": (1, ["--gradient_accumulation_steps", 8], {}, 1e-4),
        "zero3 on two processes": (4, ZERO3, {"launcher": TORCHRUN}, 2e-3),
    },
)
def test_other_ways_equal_one_process(
    trained, tiny_base, tmp_path, rows, flags, options, tolerance
):
    """2 x 4 and 8 x 1 rows give the losses and whole weights of 1 x 8. (FSDP: test_fsdp2.py.)"""
    words = tiny_arguments(tiny_base, tmp_path / "other")
    batch = ["--per_device_train_batch_size", rows]
    launch(*words, *batch, *flags, threads=1, **options)
    check_equal(tmp_path / "other", trained, loss=2 * tolerance, logit=tolerance)


def test_killed_and_resumed_equals_uninterrupted(trained, tiny_base, tmp_path):
    """kill -9 after the first checkpoint; the rest of the steps have the same losses."""
    folder = tmp_path / "killed"
    command = tiny_arguments(tiny_base, folder)
    command += ["--save_strategy", "steps", "--save_steps", "3"]
    kill_when_written(folder / "checkpoint-3/trainer_state.json", command, RECIPE)
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
    answer = "One thing follows another. " * 20
    rows = []
    for number in range(400):
        rows.append({"prompt": f"{number}?", "response": answer, "response_label": number % 2})
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
    first, *_, last = logged(folder, "loss").values()
    assert last < first


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
    write_rows(file, [row | {"response_label": "safe", "categories": []} for row in rows])
    assert "uncertain.jsonl is there" in launch(*command, check=False).stderr
    words = tiny_arguments(tiny_base, tmp_path / "guard")
    words[words.index("beavertails-sample:train")] = base
    words.insert(words.index(base) + 1, str(file))
    launch(*words)
    mended = [[row["prompt"], row["response"]] for row in rows]
    kept = []
    for row in load_conversations(base):
        if [turn["content"] for turn in row["messages"]] not in mended:
            kept.append(row["response_unsafe"])
    data = read_json(tmp_path / "guard/run.json")["data"]
    assert data["train_rows"] == len(kept) + 6 == 64
    assert data["train_unsafe"] == sum(kept)
    card = read_json(tmp_path / "guard/guard.json")
    assert card["data"]["train_data"] == f"{base} + {file}"
    assert "uncertain.jsonl" in (tmp_path / "guard/README.md").read_text()


def test_evaluation_file_report(trained, tmp_path):
    """The paper's evaluation.json, with a judge that is missing on one model."""
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
