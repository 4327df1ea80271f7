"""`--report_to` in the recipes. (That tensorboard finds the losses: test_moderation.py.)"""

from importlib.util import find_spec

import pytest
import scripts
from checks import user_error


def lora_guard(folder, tracker):
    arguments = scripts.module("lora_guard", "arguments")
    given = {"hf_model_id": "model", "output_folder": str(folder), "report_to": tracker}
    return arguments.training_arguments(arguments.GuardArguments(**given))


def cross_task_defense(folder, tracker):
    arguments = scripts.module("cross_task_defense", "arguments")
    given = {"base_model": "model", "output_dir": str(folder), "report_to": tracker}
    return arguments.training_arguments(arguments.TrainArguments(**given), 1)


def expguard(folder, tracker):
    arguments = scripts.module("expguard", "arguments")
    return arguments.ExpGuardConfig(output_dir=str(folder), report_to=tracker)


def feedback_guard(folder, tracker):
    config = scripts.module("feedback_guard", "config").Config()
    training = config.training.model_copy(update={"report_to": tracker})
    train = scripts.module("feedback_guard", "train")
    arm = train.arm_named(training.arms[0])
    return train.arm_arguments(arm, 0, 1, config.model_copy(update={"training": training}))


RECIPES = (lora_guard, cross_task_defense, expguard, feedback_guard)


@pytest.mark.parametrize("arguments", RECIPES)
def test_each_recipe_hands_the_tracker_on(arguments, tmp_path):
    assert arguments(tmp_path / "out", "tensorboard").report_to == ["tensorboard"]
    assert arguments(tmp_path / "out", "none").report_to == []


@pytest.mark.parametrize("arguments", RECIPES)
@pytest.mark.parametrize("tracker", ["trackio", "wandb"])
def test_a_tracker_that_is_missing_names_its_extra(arguments, tracker, tmp_path):
    if find_spec(tracker) is not None:
        pytest.skip(f"{tracker} is installed")
    with user_error(rf"pip install {tracker} \(the extra \[{tracker}\]\)"):
        arguments(tmp_path / "out", tracker)
