"""examples/lora_guard/train.py, run as its README says: as commands, with real launchers."""

import csv
import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scripts
import torch
from checks import (
    cases,
    difference,
    kill_when_written,
    logged,
    read_json,
    read_rows,
    user_error,
    weights,
    write_rows,
)
from scripts import BIN, TORCHRUN, error_line, module
from sklearn.metrics import average_precision_score
from transformers import AutoModelForCausalLM, AutoTokenizer, EvalPrediction
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from common.conversation import pair
from common.data import load_conversations, taxonomy
from guards import load_guard

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "examples/lora_guard"
CATEGORIES = taxonomy("beavertails")
TEXT = ("How do I reset a router?", "Hold the button for ten seconds.")
slow = pytest.mark.slow


launch = partial(scripts.launch, "lora_guard")


def arguments(model: Path, output: Path, *more) -> list:
    """The paper's command with local values: 64 rows, two epochs of 8 steps."""
    return [
        "train.py", model, output, "--epochs", 2, "--per-device-batch-size", 8, "--learning-rate", 1e-3,
        "--eval-batch-size", 50, "--seed", 1, "--gradient-accumulation-steps", 1, "--lora-r", 4, "--lora-alpha", 8,
        "--lora-dropout", 0, "--train-data", "beavertails-sample:train[12:76]",
        "--eval-data", "beavertails-sample:validation", "--logging-steps", 1, "--max-grad-norm", 1000, *more,
    ]  # fmt: skip


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(tiny_base, shared_folder) -> Path:
    def train(folder: Path) -> None:
        launch(*arguments(tiny_base, folder / "run", "--test-data", "beavertails-sample:test"))

    return shared_folder("lora-guard", train) / "run"


PARAMETERS = 2 * 2 * 2 * 4 * 32  # of the adapters: layers, q and v, A and B, rank, width


@slow
def test_every_epoch_is_kept_and_the_best_is_marked(trained):
    config = read_json(trained / "config.json")
    assert config["lora_r"] == 4
    assert config["effective_batch_size"] == 8
    rows = table(trained / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["0", "1"]
    scores = [float(row["val/binarized_auprc"]) for row in rows]
    best = int(np.argmax(scores))
    assert config["best_epoch"] == best
    columns = {f"val/f1_{name}" for name in CATEGORIES} | {"val/binarized_fpr"}
    assert columns <= set(rows[0])
    assert "test/threshold" not in rows[0]
    tested = [bool(row["test/binarized_auprc"]) for row in rows]
    assert tested == [epoch == best for epoch in (0, 1)]  # the test rows are judged once
    for name in ("guard.json", "adapter_model.safetensors", "adapter_config.json"):
        marked = (trained / "best" / name).read_bytes()
        assert marked == (trained / f"epoch-{best}" / name).read_bytes()
    test = load_conversations("beavertails-sample:test")
    verdicts = load_guard(str(trained / "best")).judge(test["messages"])
    scores = [verdict.score() for verdict in verdicts]
    auprc = average_precision_score(test["response_unsafe"], scores)
    assert float(rows[best]["test/binarized_auprc"]) == pytest.approx(auprc, abs=1e-4)
    assert len(table(trained / "train_losses.csv")) == 16
    counts = read_json(trained / "parameter_counts.json")
    assert counts["n_trainable_parameters"] == PARAMETERS + 15 * 32 + 15
    assert "validation" in (trained / "best/README.md").read_text()


# as launch/multi_gpu.sh starts it
ACCELERATE = [BIN / "accelerate", "launch", "--multi-gpu", "--mixed-precision=bf16"]
ACCELERATE.append("--num-processes=2")


@slow
@cases(
    "launcher, rows, accumulation",
    {
        "8x1": ([sys.executable], 1, 8),
        "accelerate, 2 processes x 4": (ACCELERATE, 4, 1),
        "torchrun, 2 processes x 4": (TORCHRUN, 4, 1),
    },
)
def test_batches_of_one_step_give_one_gradient(
    trained, tiny_base, tmp_path, launcher, rows, accumulation
):
    """Losses, the norms of the gradients and the weights of 1 process x 8 rows."""
    batch = ["--per-device-batch-size", rows, "--gradient-accumulation-steps", accumulation]
    launch(*arguments(tiny_base, tmp_path / "run", *batch), launcher=launcher, threads=1)
    run = tmp_path / "run"
    for key in ("loss", "grad_norm"):
        assert logged(run, key) == pytest.approx(logged(trained, key), rel=2e-3, abs=1e-4), key
    assert difference(weights(trained / "epoch-1"), weights(run / "epoch-1")) < 1e-4


@slow
def test_killed_and_resumed_equals_uninterrupted(trained, tiny_base, tmp_path):
    """Also when the kill came between the checkpoint and its adapter folder."""
    folder = tmp_path / "run"
    command = arguments(tiny_base, folder, "--test-data", "beavertails-sample:test")
    kill_when_written(folder / "checkpoint-8/trainer_state.json", command, RECIPE)
    assert not (folder / "best").exists()
    assert "--resume_from_checkpoint latest" in launch(*command, check=False).stderr
    shutil.rmtree(folder / "epoch-0", ignore_errors=True)
    launch(*command, "--resume-from-checkpoint", "latest")
    assert (folder / "epoch-0/guard.json").is_file()
    assert logged(folder, "loss") == pytest.approx(logged(trained, "loss"), abs=1e-6)
    ours, others = table(folder / "metrics.csv"), table(trained / "metrics.csv")
    for row, other in zip(ours, others, strict=True):
        assert row["val/binarized_auprc"] == other["val/binarized_auprc"]
    assert difference(weights(trained / "best"), weights(folder / "best")) < 1e-6


@slow
def test_head_only_without_bias_and_unsafe_head(tiny_base, tmp_path):
    flags = ["--head-only", "--no-unsafe-head", "--no-clf-head-bias", "--epochs", 1]
    launch(*arguments(tiny_base, tmp_path / "run", *flags))
    best = tmp_path / "run/best"
    for key, tensor in weights(best).items():
        assert "lora_B" not in key or not tensor.any()
    card = read_json(best / "guard.json")
    assert card["head_bias"] is None
    assert card["labels"] == CATEGORIES
    counts = read_json(tmp_path / "run/parameter_counts.json")
    assert counts["n_trainable_parameters"] == 14 * 32
    (verdict,) = load_guard(str(best)).judge([pair(*TEXT)])
    assert verdict.response_unsafe == max(verdict.categories.values())


@slow
def test_inputs_are_served_as_they_were_trained(tiny_base, tmp_path):
    rows = []
    for i in range(16):
        labels = {"prompt_label": i % 2, "response_label": i % 3 == 0}
        rows.append({"prompt": f"Question {i}?", "response": f"Answer {i}."} | labels)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    flags = ["--train-data", data, "--eval-data", data, "--guard-layers", 1, "--epochs", 1]
    flags += ["--guard-inputs", "prompt", "response"]
    launch(*arguments(tiny_base, tmp_path / "run", *flags))
    guard = load_guard(str(tmp_path / "run/best"))
    asked = [pair(TEXT[0]), pair(None, TEXT[1]), pair(*TEXT)]
    prompt, response, both = guard.judge(asked)
    assert prompt.response_unsafe is None
    assert 0 < prompt.prompt_unsafe < 1
    assert response.prompt_unsafe is None
    assert 0 < response.response_unsafe < 1
    assert both.error == "not trained on a pair, only on: prompt, response"
    assert both.score() == 1.0


def reference_adaptor(chat, outputs: int) -> dict[str, torch.Tensor]:
    """Tensors under the names of the reference code; the adapters are merged into `chat` by hand."""
    tensors = {
        "clf_head.weight": torch.randn(outputs, 32).bfloat16(),
        "clf_head.bias": torch.randn(outputs).bfloat16(),
    }
    for i, layer in enumerate(chat.model.layers):
        for name in ("q_proj", "v_proj"):
            a = (torch.randn(4, 32) / 5).bfloat16()
            b = (torch.randn(32, 4) / 5).bfloat16()
            key = f"lm_features.base_model.model.layers.{i}.self_attn.{name}.lora_"
            tensors[f"{key}A.default.weight"] = a
            tensors[f"{key}B.default.weight"] = b
            linear = getattr(layer.self_attn, name)
            linear.weight.data += 2 * b.float() @ a.float()  # alpha / r = 2
    return tensors


@slow
@pytest.mark.parametrize("version", [1, 2])
def test_the_papers_own_adaptor_file(tiny_base, tmp_path, version):
    """Probabilities equal a merge by hand of a file made as the reference code names its tensors."""
    torch.manual_seed(3)
    chat = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    tensors = reference_adaptor(chat, outputs=13 + version)
    torch.save(tensors, tmp_path / "adaptor.pt")
    config = {"hf_model_id": str(tiny_base), "lora_r": 4, "lora_alpha": 8}
    config["no_unsafe_head"] = version == 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    files = [tmp_path / name for name in ("config.json", "adaptor.pt", "guard")]
    launch("convert.py", *files, threads=1)
    (verdict,) = load_guard(str(tmp_path / "guard")).judge([pair(*TEXT)])
    text = f"user: {TEXT[0]}\n\nagent: {TEXT[1]}"
    ids = AutoTokenizer.from_pretrained(tiny_base)(text, return_tensors="pt")
    with torch.inference_mode():
        features = chat.model(**ids).last_hidden_state[0, -1]
    logits = tensors["clf_head.weight"].float() @ features + tensors["clf_head.bias"].float()
    expected = logits.sigmoid().tolist()
    unsafe = max(expected) if version == 1 else expected[0]
    assert verdict.response_unsafe == pytest.approx(unsafe, abs=1e-5)
    assert list(verdict.categories.values()) == pytest.approx(expected[-14:], abs=1e-5)


LORA_A = {"x.lora_A.default.weight": torch.zeros(2, 8)}


@cases(
    "content, words",
    {
        "text": (b"not a file of tensors", "adaptor.pt"),
        "no adapters": ({"clf_head.weight": torch.zeros(15, 8)}, "expected LoRA weights"),
        "outputs": ({"clf_head.weight": torch.zeros(3, 8), **LORA_A}, "found 3 outputs"),
        "code": ({"model": os.system}, "refused, it is not made of tensors alone"),
    },
)
def test_a_bad_adaptor_file_is_one_line(tmp_path, content, words):
    if isinstance(content, bytes):
        (tmp_path / "adaptor.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "adaptor.pt")
    with user_error(words):
        convert = module("lora_guard", "convert").convert_reference
        convert(tmp_path / "adaptor.pt", {"hf_model_id": "x"}, tmp_path / "guard")
    assert not (tmp_path / "guard").exists()


def test_the_loss_is_the_papers():
    """0.5 unsafe + 0.5 / 14 of each category, positives weighted by n_neg / n_pos."""
    torch.manual_seed(0)
    labels = (torch.rand(20, 15) < 0.3).double()
    labels[:, 3] = 0  # an empty class: the reference's loss would be NaN
    loss = module("lora_guard", "train").guard_loss(labels.numpy(), unsafe_head=True)
    logits = torch.randn(20, 15)
    weight = (labels == 0).sum(0) / labels.sum(0)
    weight[3] = 1
    p = logits.double().sigmoid()
    each = -(weight * labels * p.log() + (1 - labels) * (1 - p).log())
    expected = (0.5 * each[:, 0] + 0.5 * each[:, 1:].mean(1)).mean()

    def of(rows: slice, *count: int, labels=labels) -> float:
        outputs = SequenceClassifierOutputWithPast(logits=logits[rows])
        return loss(outputs, labels[rows], *count).item()

    every = slice(None)
    assert of(every) == pytest.approx(expected.item(), rel=1e-5)
    halves = [of(rows, labels.numel()) for rows in (slice(10), slice(10, None))]
    assert sum(halves) == pytest.approx(expected.item(), rel=1e-5)
    unknown = labels.clone()
    unknown[:, 1:] = float("nan")  # a prompt whose categories nobody labelled
    unsafe_alone = (0.5 * each[:, 0]).mean().item()
    assert of(every, labels=unknown) == pytest.approx(unsafe_alone, rel=1e-5)


def test_validation_scores_that_are_no_numbers_end_the_training():
    scores = np.array([[0.5], [np.nan]])
    truth = np.array([[1.0], [0.0]])
    prediction = EvalPrediction(predictions=scores, label_ids=truth)
    with user_error("its scores are not numbers"):
        module("lora_guard", "adapter").paper_metrics(prediction, ["unsafe"], None)


@slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--learning-rat 1e-5", "--learning-rat"),
        ("--guard-inputs pair answer", "--guard-inputs pair answer"),
        ("--guard-inputs prompt", "no prompt that is labelled unsafe"),
        ("--guard-layers 5", "--guard-layers 5: the base has 2"),
        ("--guard-layers 0", "--guard-layers 0: the base has 2"),
        ("--lr-scheduler-type foo", "foo"),
        ("--eval-split-ratio 0.1", "give one of them"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(flags, message, tiny_base, tmp_path):
    done = launch(*arguments(tiny_base, tmp_path / "run"), *flags.split(), check=False)
    assert message in error_line(done)
    assert not (tmp_path / "run").exists()


@slow
def test_evaluation_of_several_guards(trained, tmp_path):
    """predictions.jsonl gives the figures again; all of a reply read is the pair read."""
    guards = [trained / "epoch-0", trained / "epoch-1"]
    flags = ["--eval_data", "beavertails-sample:validation", "--output_dir", tmp_path]
    flags += ["--prefix_tokens", 4, 16, "--export_uncertain", 5]
    launch("evaluate.py", "--guards", *guards, *flags)
    results = read_json(tmp_path / "results.json")
    rows = read_rows(tmp_path / "predictions.jsonl")
    assert len(rows) == 158
    assert list(results["flagged"]) == ["epoch-0", "epoch-1"]
    truth = [row["true_response_unsafe"] for row in rows]
    for name, scores in results["flagged"].items():
        auprc = average_precision_score(truth, [row[name]["score"] for row in rows])
        assert auprc == pytest.approx(scores["auprc"])
        assert scores["threshold"] == load_guard(str(trained / name)).thresholds["flagged"]["value"]
    near = load_conversations(str(tmp_path / "uncertain.jsonl"))
    assert 5 <= len(near) <= 10
    assert set(near["id"]) <= {row["id"] for row in rows}
    few, some, everything = results["prefixes"]
    assert [part["tokens"] for part in (few, some, everything)] == [4, 16, None]
    for metric in ("recall", "fpr", "auprc"):
        assert everything[metric] == pytest.approx(results["flagged"]["epoch-0"][metric], abs=1e-6)
    assert few["auprc"] != everything["auprc"]
    assert results["overhead"]["epoch-0"]["added_parameters"] == PARAMETERS + 15 * 32 + 15
    assert set(results["categories"]) == set(CATEGORIES)
    assert (tmp_path / "precision-recall.png").is_file()


@slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--guards", "no/such/guard"], "no/such/guard"),
        (["--judge", "reply"], "--judge reply"),
        (["--judge", "prompt"], "field prompt_unsafe"),
    ],
)
def test_a_mistake_in_an_evaluation_is_one_line(trained, tmp_path, flags, message):
    command = ["evaluate.py", "--guards", trained / "best"]
    command += ["--eval_data", "beavertails-sample:test", "--output_dir", tmp_path / "out"]
    done = launch(*command, *flags, check=False)
    assert message in error_line(done)
    assert not (tmp_path / "out").exists()


@slow
@pytest.mark.parametrize(
    "spec", [None, "test.jsonl"], ids=["no validation", "a test split as validation"]
)
def test_nothing_is_chosen_without_validation(tiny_base, tmp_path, spec):
    """The last epoch is kept, without a fitted threshold; a finished run is not overwritten."""
    shutil.copy(ROOT / "data/sample/beavertails/test.jsonl", tmp_path / "test.jsonl")
    command = arguments(tiny_base, tmp_path / "run", "--test-data", tmp_path / "test.jsonl")
    at = command.index("--eval-data")
    command[at : at + 2] = [] if spec is None else ["--eval-data", tmp_path / spec]
    launch(*command)
    folder = tmp_path / "run"
    assert read_json(folder / "config.json")["best_epoch"] == 1
    assert read_json(folder / "best/guard.json")["thresholds"]["flagged"]["how"] == "default"
    assert difference(weights(folder / "best"), weights(folder / "epoch-1")) == 0
    shutil.rmtree(folder / "checkpoint-16")
    again = launch(*command, check=False)
    assert "--overwrite-output-dir" in error_line(again)


def test_only_the_epochs_of_a_run_are_removed(tmp_path):
    """What a new run removes, and not what a user named likewise."""
    for name in ("epoch-0", "epoch-12", "epoch-best", "epoch-1-merged"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "guard.json").write_text("{}")
    (tmp_path / "epoch-7").mkdir()
    (tmp_path / "epoch-8").write_text("notes")
    found = module("lora_guard", "adapter").epoch_folders(tmp_path)
    assert sorted(path.name for path in found) == ["epoch-0", "epoch-12"]
