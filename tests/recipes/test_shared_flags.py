"""What all five train.py do the same way, as commands that stop before any work."""

import json

import pytest
from scripts import error_line, launch

COMMANDS = {  # what comes before the output folder
    "moderation": "--model_name_or_path no/model --train_data_name_or_path no.jsonl --output_dir",
    "expguard": "--model_name_or_path no/model --dataset_name no.jsonl --output_dir",
    "cross_task_defense": "--base_model no/model --data_path no.json --output_dir",
    "lora_guard": "--hf_model_id no/model --train_data no.jsonl --output_folder",
}


@pytest.mark.parametrize("recipe", [*COMMANDS, "feedback_guard"])
def test_an_output_folder_that_cannot_be_written_is_found_first(recipe, tmp_path):
    if recipe == "feedback_guard":
        config = {"training": {"output_dir": "/dev/null/out"}}
        config["dataset"] = {"store_dir": str(tmp_path / "none")}
        (tmp_path / "config.json").write_text(json.dumps(config))
        words = ["--config", tmp_path / "config.json"]
    else:
        words = [*COMMANDS[recipe].split(), "/dev/null/out"]
    said = "/dev/null/out: cannot be written (/dev/null is no folder); choose another output folder"
    done = launch(recipe, "train.py", *words, check=False)
    assert error_line(done) == f"error: {said}"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", COMMANDS)
def test_checkpoints_of_another_run_are_not_resumed(recipe, tmp_path):
    """(The rest of that rule: unit/test_run.py.)"""
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4/trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-4/recipe.json").write_text(json.dumps({"seed": -1}))
    words = [*COMMANDS[recipe].split(), tmp_path, "--resume_from_checkpoint", "latest"]
    done = launch(recipe, "train.py", *words, check=False)
    assert "checkpoint-4 is of another run: seed -1 there and" in error_line(done)
