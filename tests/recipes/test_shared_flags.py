"""What all five train.py do the same way: commands, on inputs that do not exist, so that no work is
done.
"""

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


RESUMED = {  # flags, what is said
    "neither": (
        "",
        "checkpoint-4 of an earlier run; pass --resume_from_checkpoint latest or --overwrite_output_dir true",
    ),
    "no such one": (
        "--resume_from_checkpoint none",
        "--resume_from_checkpoint none: no such checkpoint",
    ),
    "another run's": (
        "--resume_from_checkpoint latest",
        "checkpoint-4 is of another run: seed -1 there and",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", COMMANDS)
@pytest.mark.parametrize(("flags", "message"), RESUMED.values(), ids=RESUMED)
def test_checkpoints_are_resumed_by_one_rule(recipe, flags, message, tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4/trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-4/recipe.json").write_text(json.dumps({"seed": -1}))
    words = [*COMMANDS[recipe].split(), tmp_path, *flags.split()]
    done = launch(recipe, "train.py", *words, check=False)
    assert message in error_line(done)
