"""The trainer of the recipes: its checkpoints, what it resumes, and what it says of a run that
learned nothing.
"""

import json
import logging
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq
from trl import ModelConfig

from common.conversation import UserError
from common.run import Stopped
from common.training import (
    LengthGroupedTrainer,
    RecipeTrainingArguments,
    checkpoint_to_resume,
    checkpoints,
    start_over,
    with_adapters,
)

ROWS = 16


def rows(count: int = ROWS, shift: int = 0) -> Dataset:
    """Rows of different lengths; `shift` changes one token."""
    sequences = [list(range(20, 30 + i)) for i in range(count)]
    sequences[0][0] += shift
    return Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in sequences])


@pytest.fixture(scope="module")
def make_in(tiny_base):
    """`make_in(folder, rows, lora, settings, **arguments)`: a trainer of 4 steps of 4 rows; a
    checkpoint every 2.
    """

    def trainer(
        folder, dataset=None, lora=None, settings=None, kind=LengthGroupedTrainer, **arguments
    ):
        defaults = {
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "num_train_epochs": 1,
            "learning_rate": 1e-3,
            "save_steps": 2,
            "logging_steps": 1,
            "disable_tqdm": True,
        }
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(tiny_base)
        model = AutoModelForCausalLM.from_pretrained(tiny_base)
        if lora is not None:
            model = get_peft_model(
                model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **lora)
            )
        return kind(
            model=model,
            args=RecipeTrainingArguments(**(defaults | arguments)),
            train_dataset=rows() if dataset is None else dataset,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            processing_class=tokenizer,
            settings={"base model": "tiny"} | (settings or {}),
        )

    return trainer


@pytest.fixture
def make(make_in, tmp_path):
    """The same, with a folder of the test's own."""
    return partial(make_in, tmp_path / "out")


def run(trainer: LengthGroupedTrainer):
    """What a train.py does."""
    checkpoint = checkpoint_to_resume(trainer.args)
    if checkpoint is None:
        start_over(trainer.args)
    return trainer.train(resume_from_checkpoint=checkpoint)


def losses(trainer: LengthGroupedTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


@pytest.fixture(scope="module")
def finished(make_in, tmp_path_factory) -> Path:
    """The folder of a run of 4 steps; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    run(make_in(folder))
    return folder


@pytest.fixture
def interrupted(finished, tmp_path) -> Path:
    """The folder of a run of 4 steps that was killed after checkpoint-2."""
    shutil.copytree(finished / "checkpoint-2", tmp_path / "out/checkpoint-2")
    return tmp_path / "out"


# --- Checkpoints of ours ----------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path) -> dict[str, str]:
    """What users put beside checkpoints, by name, and a file of each."""
    folder = tmp_path / "out"
    for name in ("checkpoint-merged", "checkpoint-best", "checkpoint-2-merged"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_text(name)
    (folder / "checkpoint-best/trainer_state.json").write_text("{}")
    (folder / "checkpoint-notes.txt").write_text("notes")
    return {
        "checkpoint-2-merged/model.safetensors": "checkpoint-2-merged",
        "checkpoint-best/model.safetensors": "checkpoint-best",
        "checkpoint-merged/model.safetensors": "checkpoint-merged",
        "checkpoint-notes.txt": "notes",
    }


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_users_put_beside_checkpoints_stays(make, foreign, tmp_path, limit, overwrite):
    """Where a run starts, where it drops old checkpoints, and where it resumes."""
    folder = tmp_path / "out"
    run(make(save_total_limit=limit, overwrite_output_dir=overwrite))
    run(make(save_total_limit=limit, resume_from_checkpoint="latest"))
    assert {name: (folder / name).read_text() for name in foreign} == foreign
    assert [path.name for path in checkpoints(folder)] == (
        ["checkpoint-2"] if limit is None else []
    ) + ["checkpoint-4"]


def test_a_link_is_removed_and_what_it_points_to_stays(make, tmp_path):
    run(make(output_dir=str(tmp_path / "elsewhere")))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/checkpoint-4").symlink_to(tmp_path / "elsewhere/checkpoint-4")
    before = (tmp_path / "elsewhere/checkpoint-4/model.safetensors").read_bytes()
    with pytest.raises(UserError, match="holds checkpoint-4 of an earlier run"):
        run(make())
    run(make(overwrite_output_dir=True, learning_rate=1e-2))
    assert not (tmp_path / "out/checkpoint-4").is_symlink()
    assert (tmp_path / "elsewhere/checkpoint-4/model.safetensors").read_bytes() == before


def test_a_folder_in_the_way_of_a_checkpoint_is_named(make, tmp_path):
    """`checkpoint-4` without the trainer's state is somebody's model: it goes only when that is
    asked for.
    """
    (tmp_path / "out/checkpoint-4").mkdir(parents=True)
    (tmp_path / "out/checkpoint-4/model.safetensors").write_text("mine")
    with pytest.raises(UserError, match="checkpoint-4: is no checkpoint of a training run"):
        run(make())
    assert (tmp_path / "out/checkpoint-4/model.safetensors").read_text() == "mine"
    run(make(overwrite_output_dir=True))
    assert names(tmp_path / "out") == ["checkpoint-2", "checkpoint-4"]


def test_a_file_in_the_way_of_a_checkpoint_is_never_removed(make, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/checkpoint-4").write_text("mine")
    with pytest.raises(UserError, match="checkpoint-4: is no checkpoint of a training run"):
        run(make(overwrite_output_dir=True))
    assert (tmp_path / "out/checkpoint-4").read_text() == "mine"


def test_half_a_checkpoint_is_not_resumed_and_completed(make, interrupted):
    half = interrupted / "checkpoint-4"
    shutil.copytree(interrupted / "checkpoint-2", half)
    state = (half / "trainer_state.json").read_text()
    (half / "trainer_state.json").write_text(state[: len(state) // 2])
    trainer = make(resume_from_checkpoint="latest")
    run(trainer)
    assert trainer.state.global_step == 4
    assert [path.name for path in checkpoints(interrupted)] == ["checkpoint-2", "checkpoint-4"]


def test_half_a_checkpoint_of_ours_hinders_no_new_run(make, interrupted):
    (interrupted / "checkpoint-2/trainer_state.json").unlink()
    run(make())
    assert len(checkpoints(interrupted)) == 2


@pytest.mark.parametrize(
    ("limit", "kept"), [(1, ["checkpoint-12"]), (2, ["checkpoint-10", "checkpoint-12"])]
)
def test_the_newest_checkpoints_are_kept(make, tmp_path, limit, kept):
    """By number, not by name."""
    run(make(save_total_limit=limit, num_train_epochs=3))
    assert sorted(names(tmp_path / "out")) == kept


# --- What is resumed is compared --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"per_device_train_batch_size": 8}, "rows a step .* 4 there and 8 here"),
        ({"gradient_accumulation_steps": 2}, "rows a step .* 4 there and 8 here"),
        ({"learning_rate": 2e-3}, "learning_rate 0.001 there and 0.002 here"),
        ({"num_train_epochs": 2}, "num_train_epochs 1.* there and 2.* here"),
        ({"max_steps": 3}, "max_steps -1 there and 3 here"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type linear there and cosine here"),
        ({"warmup_steps": 1}, "warmup_steps 0.* there and 1.* here"),
        ({"seed": 1}, "seed 42 there and 1 here"),
        (
            {"train_sampling_strategy": "random"},
            "train_sampling_strategy group_by_length there and random here",
        ),
        ({"dataset": rows(15)}, "rows 16 there and 15 here"),
        ({"dataset": rows(shift=1)}, "content of the rows"),
        ({"dataset": rows().select(range(ROWS - 1, -1, -1))}, "content of the rows"),
        ({"lora": {"r": 4}}, "LoRA None there and"),
        ({"settings": {"base model": "other"}}, "base model tiny there and other here"),
    ],
)
def test_another_run_is_not_resumed(make, interrupted, change, message):
    with pytest.raises(UserError, match=f"checkpoint-2 is of another run: .*{message}") as raised:
        run(make(resume_from_checkpoint="latest", **change))
    assert "\n" not in str(raised.value) and "--overwrite_output_dir true" in str(raised.value)
    assert names(interrupted) == ["checkpoint-2"]


def test_another_lora_is_not_resumed(make, tmp_path):
    run(make(lora={"r": 4}))
    shutil.rmtree(tmp_path / "out/checkpoint-4")
    with pytest.raises(UserError, match=r"LoRA \{'r': 4,.* there and \{'r': 8,.* here"):
        run(make(lora={"r": 8}, resume_from_checkpoint="latest"))


@pytest.mark.parametrize(
    "change",
    [
        {"save_steps": 1, "save_total_limit": 1},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    ],
)
def test_what_leaves_the_result_as_it_is_is_resumed(make, interrupted, tmp_path, change):
    whole, resumed = (
        make(output_dir=str(tmp_path / "whole")),
        make(resume_from_checkpoint="latest", **change),
    )
    run(whole)
    run(resumed)
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-4)
    pairs = zip(resumed.model.parameters(), whole.model.parameters(), strict=True)
    assert max((one - other).abs().max().item() for one, other in pairs) < 1e-4


def test_a_checkpoint_of_an_older_version_is_resumed_and_said(make, interrupted, caplog):
    (interrupted / "checkpoint-2/recipe.json").unlink()
    with caplog.at_level(logging.INFO):
        run(make(resume_from_checkpoint="latest"))
    assert caplog.text.count("checkpoint-2 does not say what its run was") == 1


def test_a_finished_run_is_resumed_with_its_weights(make, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    trainer = make(resume_from_checkpoint="latest")
    run(trainer)
    assert trainer.state.global_step == 4
    kept = load_file(finished / "checkpoint-4/model.safetensors")
    weights = trainer.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in kept.items())


# --- LoRA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "adapted"),
    [
        (["q_proj"], {"q_proj"}),
        (["q_proj", "up_proj"], {"q_proj", "up_proj"}),
        ([r".*layers\.1\..*(q|v)_proj"], {"q_proj", "v_proj"}),
        (
            ["all-linear"],
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        ),
        (None, {"q_proj", "v_proj"}),
    ],
)
def test_the_modules_that_lora_adapts(tiny_base, asked, adapted):
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    found = with_adapters(
        model, ModelConfig(use_peft=True, lora_r=4, lora_target_modules=asked), "--modules"
    )
    names = [name.split(".lora_A")[0] for name, _ in found.named_parameters() if "lora_A" in name]
    assert {name.rpartition(".")[2] for name in names} == adapted
    layers = {name.split("layers.")[1].split(".")[0] for name in names}
    assert layers == ({"1"} if asked and "*" in asked[0] else {"0", "1"})
    assert {p.dtype for p in found.parameters() if p.requires_grad} == {torch.float32}


def test_modules_that_are_not_there_are_one_line(tiny_base):
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    asked = ModelConfig(use_peft=True, lora_target_modules=["nothing"])
    with pytest.raises(UserError, match=r"^--modules: .*nothing") as raised:
        with_adapters(model, asked, "--modules")
    assert "\n" not in str(raised.value)


# --- Runs that learn nothing ------------------------------------------------------------------------------------------


def test_adapters_that_are_still_zero_are_said(make, caplog):
    run(make(lora={"r": 4}, save_strategy="no"))
    assert "still zero" not in caplog.text
    run(make(lora={"r": 4}, save_strategy="no", learning_rate=0.0))
    assert "The adapters are still zero after 4 steps" in caplog.text


def test_frozen_adapters_are_not_said(make, caplog):
    trainer = make(lora={"r": 4, "modules_to_save": ["lm_head"]}, save_strategy="no")
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(False)
    run(trainer)
    assert "still zero" not in caplog.text


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_a_diverged_run_is_one_line_and_leaves_no_checkpoint(make, tmp_path, strategy):
    with pytest.raises(
        UserError, match=r"diverged \(its weights are not numbers\).*lower the learning rate"
    ):
        run(make(learning_rate=1e30, save_strategy=strategy))
    assert not names(tmp_path / "out")


class Interrupted(LengthGroupedTrainer):
    """Ctrl-C after so many steps."""

    after = 0

    def training_step(self, *args, **kwargs):
        if self.state.global_step == self.after:
            raise KeyboardInterrupt
        return super().training_step(*args, **kwargs)


def test_ctrl_c_says_where_the_run_is(make):
    trainer = make(kind=Interrupted)
    with pytest.raises(Stopped, match="before the first checkpoint") as stopped:
        run(trainer)
    assert stopped.value.flags == ()
    trainer.after = 3
    with pytest.raises(Stopped, match="after checkpoint-2") as stopped:
        run(trainer)
    assert stopped.value.flags == ("--resume_from_checkpoint", "latest")


def test_a_checkpoint_says_what_its_run_was(make, interrupted):
    found = json.loads((interrupted / "checkpoint-2/recipe.json").read_text())
    expected = {
        "learning_rate": 1e-3,
        "seed": 42,
        "rows": ROWS,
        "LoRA": None,
        "num_train_epochs": 1,
    }
    assert {name: found[name] for name in expected} == expected
