"""examples/lora_guard/train.py, run as its README says: as commands, in its folder, with real
launchers.
"""

import csv
import json
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scripts
import torch
from safetensors.torch import load_file
from scripts import BIN, TORCHRUN, module
from sklearn.metrics import average_precision_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.conversation import UserError, pair
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


def history(folder: Path, key: str) -> list[float]:
    return [
        entry[key] for entry in json.loads((folder / "run.json").read_text())["log"] if key in entry
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def trained(tiny_base, shared_folder) -> Path:
    def train(folder: Path) -> None:
        launch(*arguments(tiny_base, folder / "run", "--test-data", "beavertails-sample:test"))

    return shared_folder("lora-guard", train) / "run"


@slow
def test_every_epoch_is_kept_and_the_best_is_marked(trained):
    config, rows = (
        json.loads((trained / "config.json").read_text()),
        list(csv.DictReader((trained / "metrics.csv").open())),
    )
    assert (config["hf_model_id"], config["lora_r"], config["effective_batch_size"]) == (
        config["hf_model_id"],
        4,
        8,
    )
    scores = [float(row["val/binarized_auprc"]) for row in rows]
    assert [row["epoch"] for row in rows] == ["0", "1"] and config["best_epoch"] == int(
        np.argmax(scores)
    )
    assert {f"val/f1_{name}" for name in CATEGORIES} | {"val/binarized_fpr"} <= set(rows[0])
    tested = [bool(row["test/binarized_auprc"]) for row in rows]
    # the test rows are judged once
    assert tested == [epoch == config["best_epoch"] for epoch in (0, 1)]
    best = trained / f"epoch-{config['best_epoch']}"
    for name in ("guard.json", "adapter_model.safetensors", "adapter_config.json"):
        assert (trained / "best" / name).read_bytes() == (best / name).read_bytes()
    test = load_conversations("beavertails-sample:test")
    scores = [v.score() for v in load_guard(str(trained / "best")).judge(test["messages"])]
    auprc = average_precision_score(test["response_unsafe"], scores)
    assert float(rows[config["best_epoch"]]["test/binarized_auprc"]) == pytest.approx(
        auprc, abs=1e-4
    )
    assert "test/threshold" not in rows[0]
    assert len(list(csv.DictReader((trained / "train_losses.csv").open()))) == 16
    counts = json.loads((trained / "parameter_counts.json").read_text())
    # layers, q and v, A and B; head
    assert counts["n_trainable_parameters"] == 2 * 2 * 2 * 4 * 32 + 15 * 32 + 15
    assert "validation" in (trained / "best/README.md").read_text()


@slow
def test_folder_loads_in_stock_peft_and_as_a_guard(trained):
    from peft import AutoPeftModelForSequenceClassification

    model = AutoPeftModelForSequenceClassification.from_pretrained(
        trained / "best", num_labels=15
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained / "best")
    card = json.loads((trained / "best/guard.json").read_text())
    rows = load_conversations("beavertails-sample:test", max_rows=6)["messages"]
    for messages, verdict in zip(rows, load_guard(str(trained / "best")).judge(rows), strict=True):
        text = f"user: {messages[0]['content']}\n\nagent: {messages[1]['content']}"
        with torch.inference_mode():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0] + torch.tensor(
                card["head_bias"]
            )
        expected = dict(zip(card["labels"], logits.sigmoid().tolist(), strict=True))
        assert verdict.response_unsafe == pytest.approx(expected.pop("unsafe"), abs=1e-5)
        assert verdict.categories == pytest.approx(expected, abs=1e-5)
    assert (
        load_guard(str(trained / "best"))
        .judge([pair("only a question")])[0]
        .error.startswith("not trained on a prompt")
    )


@slow
def test_adapters_off_is_the_chat_model_bit_for_bit(trained, tiny_base):
    from peft import PeftModel

    ids = torch.arange(40, 70).view(2, 15)
    chat = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    with torch.inference_mode():
        expected = chat(ids).logits.clone()
        guarded = PeftModel.from_pretrained(chat, trained / "best").eval()
        assert not torch.equal(guarded(ids).logits, expected)  # it did learn something
        with guarded.disable_adapter():
            assert torch.equal(guarded(ids).logits, expected)


# as launch/multi_gpu.sh starts it
ACCELERATE = [
    BIN / "accelerate",
    "launch",
    "--multi-gpu",
    "--mixed-precision=bf16",
    "--num-processes=2",
]


@slow
@pytest.mark.parametrize(
    ("launcher", "rows", "accumulation"),
    [([sys.executable], 1, 8), (ACCELERATE, 4, 1), (TORCHRUN, 4, 1)],
    ids=["8x1", "accelerate, 2 processes x 4", "torchrun, 2 processes x 4"],
)
def test_batches_of_one_step_give_one_gradient(
    trained, tiny_base, tmp_path, launcher, rows, accumulation
):
    """Losses, the norms of the gradients and the weights of 1 process x 8 rows."""
    batch = ["--per-device-batch-size", rows, "--gradient-accumulation-steps", accumulation]
    launch(*arguments(tiny_base, tmp_path / "run", *batch), launcher=launcher, threads=1)
    for key in ("loss", "grad_norm"):
        assert history(tmp_path / "run", key) == pytest.approx(
            history(trained, key), rel=2e-3, abs=1e-4
        ), key
    ours, other = weights(trained / "epoch-1"), weights(tmp_path / "run/epoch-1")
    assert ours.keys() == other.keys()
    assert all(torch.allclose(ours[key], other[key], atol=1e-4) for key in ours)


@slow
def test_killed_and_resumed_equals_uninterrupted(trained, tiny_base, tmp_path):
    """Also when the kill came between the checkpoint and its adapter folder."""
    command = arguments(tiny_base, tmp_path / "run", "--test-data", "beavertails-sample:test")
    process = scripts.start([sys.executable, *command], cwd=RECIPE)
    deadline = time.time() + 180
    while not (tmp_path / "run/checkpoint-8/trainer_state.json").is_file():
        assert time.time() < deadline and process.poll() is None, "no checkpoint appeared"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "run/best").exists()
    assert "--resume_from_checkpoint latest" in launch(*command, check=False).stderr
    shutil.rmtree(tmp_path / "run/epoch-0", ignore_errors=True)
    launch(*command, "--resume-from-checkpoint", "latest")
    assert (tmp_path / "run/epoch-0/guard.json").is_file()
    assert history(tmp_path / "run", "loss") == pytest.approx(history(trained, "loss"), abs=1e-6)
    first, second = (
        list(csv.DictReader((f / "metrics.csv").open())) for f in (tmp_path / "run", trained)
    )
    assert [row["val/binarized_auprc"] for row in first] == [
        row["val/binarized_auprc"] for row in second
    ]
    ours, other = weights(trained / "best"), weights(tmp_path / "run/best")
    assert all(torch.allclose(ours[key], other[key], atol=1e-6) for key in ours)


@slow
def test_head_only_without_bias_and_unsafe_head(tiny_base, tmp_path):
    launch(
        *arguments(
            tiny_base,
            tmp_path / "run",
            "--head-only",
            "--no-unsafe-head",
            "--no-clf-head-bias",
            "--epochs",
            1,
        )
    )
    found, card = (
        weights(tmp_path / "run/best"),
        json.loads((tmp_path / "run/best/guard.json").read_text()),
    )
    assert all(not tensor.any() for key, tensor in found.items() if "lora_B" in key)
    assert card["head_bias"] is None and card["labels"] == CATEGORIES
    counts = json.loads((tmp_path / "run/parameter_counts.json").read_text())
    assert counts["n_trainable_parameters"] == 14 * 32
    verdict = load_guard(str(tmp_path / "run/best")).judge([pair(*TEXT)])[0]
    assert verdict.response_unsafe == max(verdict.categories.values())


@slow
def test_inputs_are_served_as_they_were_trained(tiny_base, tmp_path):
    rows = [
        {
            "prompt": f"Question number {i}?",
            "response": f"Answer number {i}.",
            "prompt_label": i % 2,
            "response_label": i % 3 == 0,
        }
        for i in range(16)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        "--train-data",
        tmp_path / "rows.jsonl",
        "--eval-data",
        tmp_path / "rows.jsonl",
        "--guard-layers",
        1,
    ]
    launch(
        *arguments(
            tiny_base,
            tmp_path / "run",
            *flags,
            "--guard-inputs",
            "prompt",
            "response",
            "--epochs",
            1,
        )
    )
    guard = load_guard(str(tmp_path / "run/best"))
    prompt, response, both = guard.judge([pair(TEXT[0]), pair(None, TEXT[1]), pair(*TEXT)])
    assert prompt.response_unsafe is None and 0 < prompt.prompt_unsafe < 1
    assert response.prompt_unsafe is None and 0 < response.response_unsafe < 1
    assert both.error == "not trained on a pair, only on: prompt, response" and both.score() == 1.0


@pytest.mark.parametrize("version", [1, 2])
def test_the_papers_own_adaptor_file(tiny_base, tmp_path, version):
    """Probabilities equal a merge by hand of a file made as the reference code names its tensors."""
    torch.manual_seed(3)
    chat = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    tensors, outputs = {}, 13 + version
    for i, layer in enumerate(chat.model.layers):
        for name in ("q_proj", "v_proj"):
            a, b = torch.randn(4, 32) / 5, torch.randn(32, 4) / 5
            key = f"lm_features.base_model.model.layers.{i}.self_attn.{name}.lora_"
            tensors |= {
                f"{key}A.default.weight": a.bfloat16(),
                f"{key}B.default.weight": b.bfloat16(),
            }
            linear = getattr(layer.self_attn, name)
            linear.weight.data += 2 * b.bfloat16().float() @ a.bfloat16().float()  # alpha / r = 2
    tensors |= {
        "clf_head.weight": torch.randn(outputs, 32).bfloat16(),
        "clf_head.bias": torch.randn(outputs).bfloat16(),
    }
    torch.save(tensors, tmp_path / "adaptor.pt")
    config = {
        "hf_model_id": str(tiny_base),
        "lora_r": 4,
        "lora_alpha": 8,
        "no_unsafe_head": version == 1,
    }
    convert = module("lora_guard", "convert")
    convert.convert_reference(tmp_path / "adaptor.pt", config, tmp_path / "guard")
    verdict = load_guard(str(tmp_path / "guard")).judge([pair(*TEXT)])[0]
    ids = AutoTokenizer.from_pretrained(tiny_base)(
        f"user: {TEXT[0]}\n\nagent: {TEXT[1]}", return_tensors="pt"
    )
    with torch.inference_mode():
        features = chat.model(**ids).last_hidden_state[0, -1]
        logits = features @ tensors["clf_head.weight"].float().T + tensors["clf_head.bias"].float()
    expected = logits.sigmoid().tolist()
    assert verdict.response_unsafe == pytest.approx(
        max(expected) if version == 1 else expected[0], abs=1e-5
    )
    assert list(verdict.categories.values()) == pytest.approx(expected[-14:], abs=1e-5)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"not a file of tensors", "adaptor.pt"),
        ({"clf_head.weight": torch.zeros(15, 8)}, "expected LoRA weights"),
        (
            {"clf_head.weight": torch.zeros(3, 8), "x.lora_A.default.weight": torch.zeros(2, 8)},
            "found 3 outputs",
        ),
        ({"model": os.system}, "refused, it is not made of tensors alone"),
    ],
    ids=["text", "no adapters", "outputs", "code"],
)
def test_a_bad_adaptor_file_is_one_line(tmp_path, content, words):
    if isinstance(content, bytes):
        (tmp_path / "adaptor.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "adaptor.pt")
    with pytest.raises(UserError, match=words):
        module("lora_guard", "convert").convert_reference(
            tmp_path / "adaptor.pt", {"hf_model_id": "x"}, tmp_path / "guard"
        )
    assert not (tmp_path / "guard").exists()


def test_the_loss_is_the_papers():
    """Against its formula written out: 0.5 unsafe + 0.5 / 14 of each category, positives weighted
    by n_neg / n_pos.
    """
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(20, 15, generator=generator) < 0.3).double()
    labels[:, 3] = 0  # an empty class: the reference's loss would be NaN
    loss = module("lora_guard", "train").guard_loss(labels.numpy(), unsafe_head=True)
    logits = torch.randn(20, 15, generator=generator)
    weight = (labels == 0).sum(0) / labels.sum(0)
    weight[3] = 1
    p = logits.double().sigmoid()
    each = -(weight * labels * p.log() + (1 - labels) * (1 - p).log())
    expected = (0.5 * each[:, 0] + 0.5 * each[:, 1:].mean(1)).mean()
    outputs = type("Outputs", (), {"logits": logits})
    assert loss(outputs, labels).item() == pytest.approx(expected.item(), rel=1e-5)
    half = [
        loss(type("O", (), {"logits": logits[i : i + 10]}), labels[i : i + 10], labels.numel())
        for i in (0, 10)
    ]
    assert sum(half).item() == pytest.approx(expected.item(), rel=1e-5)
    unknown = labels.clone()
    unknown[:, 1:] = float("nan")  # a prompt whose categories nobody labelled
    assert loss(outputs, unknown).item() == pytest.approx(
        (0.5 * each[:, 0]).mean().item(), rel=1e-5
    )


@slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning-rat", "1e-5"], "--learning-rat"),
        (["--guard-inputs", "pair", "answer"], "--guard-inputs pair answer"),
        (["--guard-inputs", "prompt"], "no prompt that is labelled unsafe"),
        (["--target-modules", "nothing"], "--target-modules"),
        (["--guard-layers", 5], "--guard-layers 5: the base has 2"),
        (["--lr-scheduler-type", "foo"], "foo"),
        (["--eval-split-ratio", 0.1], "give one of them"),
        (["--train-data", "PKU-Alignment/BeaverTails:train"], "330k_train"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(flags, message, tiny_base, tmp_path):
    done = launch(*arguments(tiny_base, tmp_path / "run"), *flags, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1 and message in errors[0], done.stderr[-2000:]
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


@slow
def test_evaluation_of_several_guards(trained, tmp_path):
    """Figures can be computed again from predictions.jsonl, and reading all of a reply is reading
    the pair.
    """
    guards = [trained / "epoch-0", trained / "epoch-1"]
    flags = [
        "--eval_data",
        "beavertails-sample:validation",
        "--output_dir",
        tmp_path,
        "--prefix_tokens",
        4,
        16,
        "--export_uncertain",
        5,
    ]
    launch("evaluate.py", "--guards", *guards, *flags)
    results = json.loads((tmp_path / "results.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert list(results["flagged"]) == ["epoch-0", "epoch-1"] and len(rows) == 158
    for name, scores in results["flagged"].items():
        truth = [row["true_response_unsafe"] for row in rows]
        assert average_precision_score(
            truth, [row[name]["score"] for row in rows]
        ) == pytest.approx(scores["auprc"])
        assert scores["threshold"] == load_guard(str(trained / name)).thresholds["flagged"]["value"]
    near = load_conversations(str(tmp_path / "uncertain.jsonl"))
    assert 5 <= len(near) <= 10
    assert set(near["id"]) <= {row["id"] for row in rows}
    few, some, everything = results["prefixes"]
    assert (few["tokens"], some["tokens"], everything["tokens"]) == (4, 16, None)
    for metric in ("recall", "fpr", "auprc"):
        assert everything[metric] == pytest.approx(results["flagged"]["epoch-0"][metric], abs=1e-6)
    assert few["auprc"] != everything["auprc"]
    assert results["overhead"]["epoch-0"]["added_parameters"] == 2 * 2 * 2 * 4 * 32 + 15 * 32 + 15
    assert (
        set(results["categories"]) == set(CATEGORIES)
        and (tmp_path / "precision-recall.png").is_file()
    )


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
    command = [
        "evaluate.py",
        "--guards",
        trained / "best",
        "--eval_data",
        "beavertails-sample:test",
    ]
    done = launch(*command, "--output_dir", tmp_path / "out", *flags, check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1 and message in errors[0], done.stderr[-2000:]
    assert not (tmp_path / "out").exists()


@slow
@pytest.mark.parametrize(
    "spec", [None, "test.jsonl"], ids=["no validation", "a test split as validation"]
)
def test_nothing_is_chosen_without_validation(tiny_base, tmp_path, spec):
    """The last epoch is kept, no threshold is fitted, and a finished run is not overwritten
    unasked.
    """
    shutil.copy(ROOT / "data/sample/beavertails/test.jsonl", tmp_path / "test.jsonl")
    command = arguments(tiny_base, tmp_path / "run", "--test-data", tmp_path / "test.jsonl")
    at = command.index("--eval-data")
    command[at : at + 2] = [] if spec is None else ["--eval-data", tmp_path / spec]
    launch(*command)
    assert json.loads((tmp_path / "run/config.json").read_text())["best_epoch"] == 1
    assert (
        json.loads((tmp_path / "run/best/guard.json").read_text())["thresholds"]["flagged"]["how"]
        == "default"
    )
    assert (tmp_path / "run/best/adapter_model.safetensors").read_bytes() == (
        tmp_path / "run/epoch-1/adapter_model.safetensors"
    ).read_bytes()
    shutil.rmtree(tmp_path / "run/checkpoint-16")
    again = launch(*command, check=False)
    assert again.returncode == 2 and "--overwrite-output-dir" in again.stderr


def test_only_the_epochs_of_a_run_are_removed(tmp_path):
    """What a new run removes, and not what a user named likewise."""
    for name in ("epoch-0", "epoch-12", "epoch-best", "epoch-1-merged"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "guard.json").write_text("{}")
    (tmp_path / "epoch-7").mkdir()
    (tmp_path / "epoch-8").write_text("notes")
    found = module("lora_guard", "adapter").epoch_folders(tmp_path)
    assert sorted(path.name for path in found) == ["epoch-0", "epoch-12"]


@slow
def test_a_diverged_run_saves_no_guard(tiny_base, tmp_path):
    done = launch(*arguments(tiny_base, tmp_path / "run", "--learning-rate", 1e30), check=False)
    assert done.returncode == 2 and "diverged" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run/best").exists()
