"""What all five train.py do the same way: commands, on inputs that do not exist, so that no work is
done.
"""

import json

import pytest
from scripts import launch

NOWHERE = "no/such/model"
COMMANDS = {
    "moderation": [
        "--model_name_or_path",
        NOWHERE,
        "--train_data_name_or_path",
        "no.jsonl",
        "--output_dir",
    ],
    "expguard": ["--model_name_or_path", NOWHERE, "--dataset_name", "no.jsonl", "--output_dir"],
    "cross_task_defense": ["--base_model", NOWHERE, "--data_path", "no.json", "--output_dir"],
    "lora_guard": ["--hf_model_id", NOWHERE, "--train_data", "no.jsonl", "--output_folder"],
}


def errors(done) -> list[str]:
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    return [line for line in done.stderr.splitlines() if line.startswith("error:")]


@pytest.mark.parametrize("recipe", [*COMMANDS, "feedback_guard"])
def test_an_output_folder_that_cannot_be_written_is_found_first(recipe, tmp_path):
    if recipe == "feedback_guard":
        config = {
            "training": {"output_dir": "/dev/null/out"},
            "dataset": {"store_dir": str(tmp_path / "none")},
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        words = ["train.py", "--config", tmp_path / "config.json"]
    else:
        words = ["train.py", *COMMANDS[recipe], "/dev/null/out"]
    (line,) = errors(launch(recipe, *words, check=False))
    assert (
        line
        == "error: /dev/null/out: cannot be written (/dev/null is no folder); choose another output folder"
    )


@pytest.mark.slow
@pytest.mark.parametrize("recipe", COMMANDS)
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            [],
            "checkpoint-4 of an earlier run; pass --resume_from_checkpoint latest or --overwrite_output_dir true",
        ),
        (["--resume_from_checkpoint", "none"], "--resume_from_checkpoint none: no such checkpoint"),
        (
            ["--resume_from_checkpoint", "latest"],
            "checkpoint-4 is of another run: seed -1 there and",
        ),
    ],
    ids=["neither", "no such one", "another run's"],
)
def test_checkpoints_are_resumed_by_one_rule(recipe, flags, message, tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4/trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-4/recipe.json").write_text(json.dumps({"seed": -1}))
    (line,) = errors(launch(recipe, "train.py", *COMMANDS[recipe], tmp_path, *flags, check=False))
    assert message in line
