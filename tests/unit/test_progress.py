"""What a trainer's progress bar says on the way."""

from types import SimpleNamespace

from common.training import BriefProgress


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
