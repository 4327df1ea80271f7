"""examples/moderation, run as its README says: as commands, in its folder, with real launchers."""

import json
import re
import shlex
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scripts
import torch
from safetensors.torch import load_file
from scripts import TORCHRUN
from transformers import AutoModelForSequenceClassification

from common.conversation import log_odds
from common.data import load_conversations, taxonomy
from guards import load_guard
from guards.card import read_card

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
    return [
        entry["loss"]
        for entry in json.loads((folder / "run.json").read_text())["log"]
        if "loss" in entry
    ]


def logits(folder: Path | str) -> np.ndarray:
    """Logits of a fixed batch from the stock loader."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(input_ids=torch.arange(40, 70).view(2, 15)).logits.numpy()


@pytest.fixture(scope="module")
def trained(tiny_base, shared_folder) -> Path:
    """The folder of one uninterrupted run in one process."""
    made = shared_folder(
        "moderation", lambda folder: launch(*tiny_arguments(tiny_base, folder / "guard"))
    )
    return made / "guard"


def test_guard_folder_is_complete_and_loads_in_stock_libraries(trained):
    """pipeline() and load_guard() give the same probabilities, under the names of the categories
    that the 64 rows have, in a fresh process.
    """
    assert {
        "config.json",
        "model.safetensors",
        "guard.json",
        "run.json",
        "README.md",
        "tokenizer.json",
    } <= {p.name for p in trained.iterdir()}
    assert not list(trained.rglob("*.bin")) and not list(trained.rglob("*.pt")), (
        "pickles in the guard folder"
    )
    rows = load_conversations("beavertails-sample:test", max_rows=6)["messages"]
    script = (
        "import json, sys; from transformers import pipeline;"
        "p = pipeline('text-classification', sys.argv[1], top_k=None, function_to_apply='sigmoid', dtype='float32');"
        "print(json.dumps(p(json.loads(sys.argv[2]))))"
    )
    eos = json.loads((trained / "tokenizer_config.json").read_text())["eos_token"]
    texts = [
        f"BEGINNING OF CONVERSATION: USER: {m[0]['content']} ASSISTANT:{m[1]['content']}{eos}"
        for m in rows
    ]
    done = scripts.run([sys.executable, "-c", script, trained, json.dumps(texts)])
    assert done.returncode == 0, done.stderr[-2000:]
    stock = [
        {entry["label"]: entry["score"] for entry in row}
        for row in json.loads(done.stdout.splitlines()[-1])
    ]
    train_rows = load_conversations("beavertails-sample:train", max_rows=64)
    named = {name for names in train_rows["categories"] for name in names}
    assert set(stock[0]) == named < set(taxonomy("beavertails"))
    for verdict, expected in zip(load_guard(str(trained)).judge(rows), stock, strict=True):
        assert verdict.categories == pytest.approx(expected, abs=1e-5)


def test_model_card_and_manifest_say_what_was_run(trained):
    card, run = (trained / "README.md").read_text(), json.loads((trained / "run.json").read_text())
    assert "beavertails-sample:train" in card and "AUPRC" in card and "pipeline(" in card
    assert (
        run["arguments"]["learning_rate"] == 1e-3
        and run["seed"] == 42
        and run["data"]["train_rows"] == 64
    )
    guard = json.loads((trained / "guard.json").read_text())
    assert guard["thresholds"]["flagged"]["on"] == "beavertails-sample:validation"


def test_two_processes_equal_one(trained, tiny_base, tmp_path):
    """2 processes x 4 rows see the batches of 1 process x 8, and end with its weights."""
    flags = ["--per_device_train_batch_size", "4"]
    launch(*tiny_arguments(tiny_base, tmp_path / "two"), *flags, processes=2, threads=1)
    assert losses(tmp_path / "two") == pytest.approx(losses(trained), abs=2e-4)
    np.testing.assert_allclose(logits(tmp_path / "two"), logits(trained), atol=1e-4)


def test_accumulation_equals_one_batch(trained, tiny_base, tmp_path):
    """8 x 1 gives the gradients of 1 x 8, and so its weights."""
    flags = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "8"]
    launch(*tiny_arguments(tiny_base, tmp_path / "steps"), *flags)
    assert losses(tmp_path / "steps") == pytest.approx(losses(trained), abs=2e-4)
    np.testing.assert_allclose(logits(tmp_path / "steps"), logits(trained), atol=1e-4)


def test_zero3_shards_trains_equally_and_saves_whole_weights(trained, tiny_base, tmp_path):
    flags = ["--per_device_train_batch_size", "4", "--deepspeed", str(ROOT / "launch/zero3.json")]
    launch(*tiny_arguments(tiny_base, tmp_path / "zero3"), *flags, launcher=TORCHRUN, threads=1)
    assert losses(tmp_path / "zero3") == pytest.approx(losses(trained), abs=2e-3)
    np.testing.assert_allclose(logits(tmp_path / "zero3"), logits(trained), atol=2e-3)
    shapes = lambda folder: {k: v.shape for k, v in load_file(folder / "model.safetensors").items()}  # noqa: E731
    assert shapes(tmp_path / "zero3") == shapes(trained)


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
    arguments = [
        *tiny_arguments(tiny_base, folder),
        "--save_strategy",
        "steps",
        "--save_steps",
        "3",
    ]
    process = scripts.start([sys.executable, *arguments], cwd=RECIPE)
    deadline = time.time() + 180
    while not (folder / "checkpoint-3/trainer_state.json").is_file():
        assert time.time() < deadline and process.poll() is None, "no checkpoint appeared"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (folder / "guard.json").exists()

    again = launch(*arguments, check=False)
    assert again.returncode != 0 and "--resume_from_checkpoint latest" in again.stderr, (
        "a half run was overwritten unasked"
    )
    launch(*arguments, "--resume_from_checkpoint", "latest")
    assert losses(folder) == pytest.approx(losses(trained), abs=1e-6)
    np.testing.assert_allclose(logits(folder), logits(trained), atol=1e-6)


@pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN, reason="this shell keeps Ctrl-C to itself"
)
def test_ctrl_c_is_one_line_with_the_command_that_goes_on(tiny_base, tmp_path):
    folder = tmp_path / "stopped"
    command = [*tiny_arguments(tiny_base, folder), "--save_strategy", "steps", "--save_steps", "2"]
    command += ["--num_train_epochs", "50"]
    with (tmp_path / "said").open("wb") as said:
        process = scripts.start([sys.executable, *command], cwd=RECIPE, errors=said.fileno())
        deadline = time.time() + 180
        while not (folder / "checkpoint-2/trainer_state.json").is_file():
            assert time.time() < deadline and process.poll() is None, "no checkpoint appeared"
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    lines = (tmp_path / "said").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("stopped ")]
    last = max(
        int(path.parent.name.split("-")[1])
        for path in folder.glob("checkpoint-*/trainer_state.json")
    )
    again = shlex.join(["python", *map(str, command), "--resume_from_checkpoint", "latest"])
    assert line == f"stopped after checkpoint-{last}; to go on: {again}"
    assert (
        not [line for line in lines if "Traceback" in line] and not (folder / "guard.json").exists()
    )


@pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN, reason="this shell keeps Ctrl-C to itself"
)
def test_ctrl_c_keeps_what_is_judged(trained, tmp_path):
    """The same command goes on, and judges only what is missing."""
    data = tmp_path / "rows.jsonl"
    lines = []
    for number in range(400):
        answer = f"Answer {number}. " + "One thing follows another. " * 20
        row = {"prompt": f"Question {number}?", "response": answer, "response_label": number % 2}
        lines.append(json.dumps(row) + "\n")
    data.write_text("".join(lines))
    out = tmp_path / "out"
    command = ["evaluate.py", "--eval_dataset", data, "--model_path", trained, "--output_dir", out]
    kept = out / "runs/verdicts.jsonl"
    with (tmp_path / "said").open("wb") as said:
        process = scripts.start([sys.executable, *command], cwd=RECIPE, errors=said.fileno())
        deadline = time.time() + 180
        while not (kept.is_file() and kept.stat().st_size):
            assert time.time() < deadline and process.poll() is None, "nothing was judged"
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    lines = re.split("[\r\n]+", (tmp_path / "said").read_text())
    (line,) = [line for line in lines if line.startswith("stopped ")]
    before = kept.read_bytes()
    count = before.count(b"\n")
    assert 0 < count < 400
    again = shlex.join(["python", *map(str, command)])
    assert line == f"stopped after {count} of 400 rows, kept in {kept}; to go on: {again}"
    assert not [line for line in lines if "Traceback" in line]
    assert not (out / "results.json").exists()
    done = launch(*command)
    assert kept.read_bytes().startswith(before)
    assert kept.read_bytes().count(b"\n") == 400
    assert len((out / "predictions.jsonl").read_text().splitlines()) == 400
    assert f"Results are in {out}; open results.html first." in done.stderr


def test_lora_keeps_its_head(tiny_base, tmp_path):
    """The merged folder and the adapter folder, loaded by stock libraries, are the model that was
    trained.
    """
    from peft import AutoPeftModelForSequenceClassification

    folder = tmp_path / "lora"
    launch(*tiny_arguments(tiny_base, folder), "--use_peft", "--lora_r", "4", "--flagged_loss", "1")
    adapter = AutoPeftModelForSequenceClassification.from_pretrained(
        folder / "adapter", num_labels=len(read_card(folder).labels), dtype=torch.float32
    ).eval()
    with torch.inference_mode():
        expected = adapter(input_ids=torch.arange(40, 70).view(2, 15)).logits.numpy()
    np.testing.assert_allclose(logits(folder), expected, atol=1e-5)
    assert np.abs(expected).max() > 1e-3
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
    assert (
        said.count("--evaluation_strategy is gone") == 1
        and said.count("--warmup_ratio is gone") == 1
    )
    if not torch.cuda.is_available():
        assert said.count("does not shard") == 1
    assert "no checkpoint is selected and no threshold fitted" in said
    assert (
        json.loads((tmp_path / "beavertails-7b/guard.json").read_text())["thresholds"]["flagged"][
            "how"
        ]
        == "default"
    )
    assert [p.name for p in (tmp_path / "beavertails-7b").glob("checkpoint-*")] == ["checkpoint-8"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rat", "1e-5"], "--learning_rat"),
        (["--train_data_name_or_path", "PKU-Alignment/BeaverTails:train"], "330k_train"),
        (["--model_name_or_path", "no/such-folder/here"], "--model_name_or_path"),
        (["--use_peft", "--lora_target_modules", "nothing"], "--lora_target_modules"),
        (["--eval_split_ratio", "1.5", "--config", "no.yaml"], "no.yaml"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(flags, message, tiny_base, tmp_path):
    """Exit code 2 without a traceback, and no output folder."""
    done = launch(*tiny_arguments(tiny_base, tmp_path / "guard"), *flags, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1 and message in errors[0], done.stderr[-2000:]
    assert "Traceback" not in done.stderr and not (tmp_path / "guard").exists()


def test_scores_without_near_copies_of_training_rows(trained, tmp_path):
    """Two of 26 rows are training rows, but for case and signs."""
    folder = ROOT / "data/sample/beavertails"
    rows = [json.loads(line) for line in (folder / "test.jsonl").open()][:24]
    for line in (folder / "train.jsonl").read_text().splitlines()[:2]:
        row = json.loads(line)
        rows.append(row | {"prompt": row["prompt"].upper(), "response": f"{row['response']} !!"})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--baselines", "beavertails-sample:train[:64]", "--output_dir", tmp_path / "out"]
    launch("evaluate.py", "--model_path", trained, "--eval_dataset", file, *flags)
    found = json.loads((tmp_path / "out/results.json").read_text())["near_copies"]
    assert {name: scores["support"] for name, scores in found.items()} == {
        "all rows": 26,
        "without 2 near-copies": 24,
    }
    assert "| without 2 near-copies |" in (tmp_path / "out/results.md").read_text()


def test_rows_that_were_labelled_again_go_back_into_training(trained, tiny_base, tmp_path):
    """Evaluate, export what is near the threshold, mend its labels, train on both files."""
    base = "beavertails-sample:train[:64]"
    flags = ["--eval_dataset", base, "--output_dir", tmp_path / "out", "--export_uncertain", "6"]
    command = ["evaluate.py", "--model_path", trained, *flags]
    launch(*command)
    file = tmp_path / "out/uncertain.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    threshold = load_guard(str(trained)).thresholds["flagged"]["value"]
    predictions = (tmp_path / "out/predictions.jsonl").read_text().splitlines()
    every = [json.loads(line)["guard"] for line in predictions]
    nearest = sorted(every, key=lambda score: abs(log_odds(score) - log_odds(threshold)))[:6]
    assert [row["scores"]["guard"] for row in rows] == pytest.approx(nearest, abs=1e-4)
    for row in rows:  # somebody says that all of them are safe
        row |= {"response_label": "safe", "categories": []}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = launch(*command, check=False)
    assert "uncertain.jsonl is there" in done.stderr
    words = tiny_arguments(tiny_base, tmp_path / "guard")
    words[words.index("beavertails-sample:train")] = base
    words.insert(words.index(base) + 1, str(file))
    launch(*words)
    run = json.loads((tmp_path / "guard/run.json").read_text())
    before = load_conversations(base)
    mended = {row["prompt"] + row["response"] for row in rows}
    kept = [
        row["response_unsafe"]
        for row in before
        if "".join(turn["content"] for turn in row["messages"]) not in mended
    ]
    assert run["data"]["train_rows"] == len(before) == len(kept) + 6
    assert run["data"]["train_unsafe"] == sum(kept)
    card = json.loads((tmp_path / "guard/guard.json").read_text())
    assert card["data"]["train_data"] == f"{base} + {file}"
    assert "uncertain.jsonl" in (tmp_path / "guard/README.md").read_text()


def test_evaluation_file_report(trained, tmp_path):
    """The paper's evaluation.json, with a judge that is missing on one model: every file, and
    figures that add up.
    """
    rows = json.loads((ROOT / "data/sample/beavertails/evaluation.json").read_text())
    for row in rows:
        if row["model"] == rows[0]["model"]:
            del row["flagged"]["gpt4"]
    (tmp_path / "evaluation.json").write_text(json.dumps(rows))
    arguments = [
        "--eval_dataset",
        tmp_path / "evaluation.json",
        "--model_path",
        trained,
        "--max_length",
        "512",
    ]
    done = launch("evaluate.py", *arguments, "--output_dir", tmp_path / "out", "--threshold", "0.3")
    judged = json.loads((tmp_path / "out/evaluation.json").read_text())
    results = json.loads((tmp_path / "out/results.json").read_text())["models"]
    assert [r["prompt"] for r in judged] == [r["prompt"] for r in rows]
    for name, summary in results.items():
        part = [r["flagged"] for r in judged if name in (r["model"], "all models")]
        for judge in ("moderation", "human", "gpt4"):
            known = [f[judge] for f in part if judge in f]
            expected = sum(known) / len(known) if known else None
            assert summary[f"flagged_proportion/{judge}"] == expected
        both = [(f["moderation"], f["human"]) for f in part]
        assert summary["agreement/moderation&human"]["agreement"] == pytest.approx(
            np.mean([a == b for a, b in both])
        )
    assert results[rows[0]["model"]]["agreement/moderation&gpt4"]["agreement"] is None
    predictions = json.loads((tmp_path / "out/predictions.json").read_text())
    assert all(p["flagged"] == (max(p["categories"].values()) > 0.3) for p in predictions)
    assert (tmp_path / "out/flagged-proportion.png").read_bytes().startswith(b"\x89PNG")
    assert "Cohen's kappa" in done.stdout
