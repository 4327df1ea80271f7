"""The trainer of the recipes: checkpoints, what is resumed, and runs that learn nothing."""

import logging
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checks import user_error
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq
from trl import ModelConfig

from common.run import Stopped
from common.training import (
    BriefProgress,
    LengthGroupedTrainer,
    RecipeTrainingArguments,
    checkpoint_to_resume,
    checkpoints,
    start_over,
    with_adapters,
)


def rows(count: int = 16, shift: int = 0) -> Dataset:
    """Rows of different lengths; `shift` changes one token."""
    sequences = [list(range(20, 30 + i)) for i in range(count)]
    sequences[0][0] += shift
    return Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in sequences])


@pytest.fixture(scope="module")
def make_in(tiny_base):
    """`make_in(folder, …)`: a trainer of 4 steps of 4 rows, with a checkpoint every 2."""

    def make(folder, dataset=None, lora=None, base="tiny", kind=LengthGroupedTrainer, **arguments):
        defaults = {
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "num_train_epochs": 1,
            "learning_rate": 1e-3,
            "save_steps": 2,
            "disable_tqdm": True,
        }
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(tiny_base)
        model = AutoModelForCausalLM.from_pretrained(tiny_base)
        if lora is not None:
            config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **lora)
            model = get_peft_model(model, config)
        return kind(
            model=model,
            args=RecipeTrainingArguments(**(defaults | arguments)),
            train_dataset=rows() if dataset is None else dataset,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            processing_class=tokenizer,
            settings={"base model": base},
        )

    return make


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def make(make_in, out):
    """The same, with a folder of the test's own."""
    return partial(make_in, out)


def run(trainer: LengthGroupedTrainer) -> LengthGroupedTrainer:
    """What a train.py does."""
    checkpoint = checkpoint_to_resume(trainer.args)
    if checkpoint is None:
        start_over(trainer.args)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def kept(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


def assert_same_weights(one, other) -> None:
    for tensor, expected in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(tensor, expected, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def finished(make_in, tmp_path_factory) -> LengthGroupedTrainer:
    """A run of 4 steps; its folder is not to be changed."""
    return run(make_in(tmp_path_factory.mktemp("finished")))


@pytest.fixture
def interrupted(finished, out) -> Path:
    """The folder of a run of 4 steps that was killed after checkpoint-2."""
    shutil.copytree(f"{finished.args.output_dir}/checkpoint-2", out / "checkpoint-2")
    return out


# --- checkpoints of ours --------------------------------------------------------------------------

OF_USERS = [
    "checkpoint-2-merged/model.safetensors",
    "checkpoint-best/trainer_state.json",
    "checkpoint-merged/model.safetensors",
    "checkpoint-notes.txt",
]


@pytest.mark.parametrize(
    ("limit", "left"), [(None, ["checkpoint-2", "checkpoint-4"]), (1, ["checkpoint-4"])]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_users_put_beside_checkpoints_stays(make, out, limit, left, overwrite):
    """Where a run starts, where it drops old checkpoints, and where it resumes."""
    for name in OF_USERS:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    run(make(save_total_limit=limit, overwrite_output_dir=overwrite))
    run(make(save_total_limit=limit, resume_from_checkpoint="latest"))
    assert [(out / name).read_text() for name in OF_USERS] == ["mine"] * 4
    assert kept(out) == left


def test_a_link_is_removed_and_what_it_points_to_stays(make, out, finished):
    there = Path(finished.args.output_dir, "checkpoint-4")
    out.mkdir()
    (out / "checkpoint-4").symlink_to(there)
    with user_error("checkpoint-4"):
        run(make())
    run(make(overwrite_output_dir=True))
    assert not (out / "checkpoint-4").is_symlink()
    assert (there / "model.safetensors").exists()


def test_a_folder_in_the_way_of_a_checkpoint_goes_only_when_that_is_asked_for(make, out):
    """`checkpoint-4` without the trainer's state is somebody's model."""
    model = out / "checkpoint-4/model.safetensors"
    model.parent.mkdir(parents=True)
    model.write_text("mine")
    with user_error("checkpoint-4"):
        run(make())
    assert model.read_text() == "mine"
    run(make(overwrite_output_dir=True))
    assert kept(out) == ["checkpoint-2", "checkpoint-4"]


def test_a_file_in_the_way_of_a_checkpoint_is_never_removed(make, out):
    out.mkdir()
    (out / "checkpoint-4").write_text("mine")
    with user_error("checkpoint-4"):
        run(make(overwrite_output_dir=True))
    assert (out / "checkpoint-4").read_text() == "mine"


def test_half_a_checkpoint_is_not_resumed_but_completed(make, interrupted):
    half = interrupted / "checkpoint-4"
    shutil.copytree(interrupted / "checkpoint-2", half)
    (half / "trainer_state.json").write_text('{"best')
    assert run(make(resume_from_checkpoint="latest")).state.global_step == 4
    assert kept(interrupted) == ["checkpoint-2", "checkpoint-4"]


def test_half_a_checkpoint_of_ours_hinders_no_new_run(make, interrupted):
    (interrupted / "checkpoint-2/trainer_state.json").unlink()
    run(make())
    assert kept(interrupted) == ["checkpoint-2", "checkpoint-4"]


def test_the_newest_checkpoints_are_kept(make, out):
    """By number, not by name."""
    run(make(save_total_limit=2, num_train_epochs=3))
    assert kept(out) == ["checkpoint-10", "checkpoint-12"]


# --- what is resumed is compared ------------------------------------------------------------------

CHANGES = {  # what is named: the change
    "rows a step": {"per_device_train_batch_size": 8},
    "learning_rate": {"learning_rate": 2e-3},
    "num_train_epochs": {"num_train_epochs": 2},
    "max_steps": {"max_steps": 3},
    "lr_scheduler_type": {"lr_scheduler_type": "cosine"},
    "warmup_steps": {"warmup_steps": 1},
    "seed": {"seed": 1},
    "train_sampling_strategy": {"train_sampling_strategy": "random"},
    "rows": {"dataset": rows(15)},
    "content of the rows": {"dataset": rows(shift=1)},
    "LoRA": {"lora": {"r": 4}},
    "base model": {"base": "other"},
}


@pytest.mark.parametrize(("name", "change"), CHANGES.items(), ids=CHANGES)
def test_another_run_is_not_resumed(make, interrupted, name, change):
    """The difference is named, and what starts anew."""
    with user_error(name) as raised:
        run(make(resume_from_checkpoint="latest", **change))
    assert "--overwrite_output_dir true" in str(raised.value)
    assert kept(interrupted) == ["checkpoint-2"]


def test_another_lora_is_not_resumed(make, out):
    run(make(lora={"r": 4}, max_steps=2))
    with user_error("LoRA"):
        run(make(lora={"r": 8}, max_steps=2, resume_from_checkpoint="latest"))


@pytest.mark.parametrize(
    "change",
    [
        {"save_steps": 1, "save_total_limit": 1},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    ],
    ids=["other checkpoints", "smaller passes"],
)
def test_what_leaves_the_result_as_it_is_is_resumed(make, finished, interrupted, change):
    assert_same_weights(run(make(resume_from_checkpoint="latest", **change)), finished)


def test_a_checkpoint_of_an_older_version_is_resumed_and_said(make, interrupted, caplog):
    (interrupted / "checkpoint-2/recipe.json").unlink()
    with caplog.at_level(logging.INFO):
        run(make(resume_from_checkpoint="latest"))
    assert caplog.text.count("checkpoint-2 does not say what its run was") == 1


def test_a_finished_run_is_resumed_with_its_weights(make, finished, out):
    shutil.copytree(finished.args.output_dir, out)
    assert_same_weights(run(make(resume_from_checkpoint="latest")), finished)


# --- LoRA -----------------------------------------------------------------------------------------

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("asked", "adapted", "layers"),
    [
        (["q_proj", "up_proj"], {"q_proj", "up_proj"}, {"0", "1"}),
        ([r".*layers\.1\..*(q|v)_proj"], {"q_proj", "v_proj"}, {"1"}),
        (["all-linear"], LINEAR, {"0", "1"}),
        (None, {"q_proj", "v_proj"}, {"0", "1"}),
    ],
    ids=["names", "expression", "all-linear", "default"],
)
def test_the_modules_that_lora_adapts(tiny_base, asked, adapted, layers):
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    config = ModelConfig(use_peft=True, lora_r=4, lora_target_modules=asked)
    model = with_adapters(model, config, "--modules")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    places = [name.split(".lora_")[0].split(".") for name in trained]
    assert {place[-1] for place in places} == adapted
    assert {place[place.index("layers") + 1] for place in places} == layers
    assert {p.dtype for p in trained.values()} == {torch.float32}


def test_modules_that_are_not_there_are_one_line(tiny_base):
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    asked = ModelConfig(use_peft=True, lora_target_modules=["nothing"])
    with user_error(r"^--modules: .*nothing"):
        with_adapters(model, asked, "--modules")


# --- runs that learn nothing, or end early --------------------------------------------------------


@pytest.mark.parametrize(("rate", "said"), [(1e-3, 0), (0.0, 1)])
def test_adapters_that_are_still_zero_are_said(make, caplog, rate, said):
    run(make(lora={"r": 4}, save_strategy="no", learning_rate=rate))
    assert caplog.text.count("still zero after 4 steps") == said


def test_frozen_adapters_are_not_said(make, caplog):
    trainer = make(lora={"r": 4, "modules_to_save": ["lm_head"]}, save_strategy="no")
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(False)
    run(trainer)
    assert "still zero" not in caplog.text


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_a_diverged_run_is_one_line_and_leaves_no_checkpoint(make, out, strategy):
    with user_error("lower the learning rate"):
        run(make(learning_rate=1e30, save_strategy=strategy))
    assert not list(out.glob("checkpoint-*"))


class Interrupted(LengthGroupedTrainer):
    """Ctrl-C after so many steps."""

    after = 0

    def training_step(self, *args, **kwargs):
        if self.state.global_step == self.after:
            raise KeyboardInterrupt
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize(
    ("after", "where", "flags"),
    [
        (0, "before the first checkpoint", ()),
        (3, "after checkpoint-2", ("--resume_from_checkpoint", "latest")),
    ],
)
def test_ctrl_c_says_where_the_run_is(make, after, where, flags):
    trainer = make(kind=Interrupted)
    trainer.after = after
    with pytest.raises(Stopped, match=where) as stopped:
        run(trainer)
    assert stopped.value.flags == flags


def test_single_categories_are_left_out_of_the_progress_bar(capsys):
    bar = BriefProgress()
    state = SimpleNamespace(is_world_process_zero=True, max_steps=2)
    bar.on_train_begin(None, state, None)
    logs = {"loss": 0.5, "eval_flagged/auprc": 0.25, "eval_privacy_violation/auprc": 0.125}
    bar.on_log(None, state, None, logs)
    bar.on_train_end(None, state, None)
    said = "".join(capsys.readouterr())
    assert "eval_flagged/auprc" in said
    assert "privacy_violation" not in said
