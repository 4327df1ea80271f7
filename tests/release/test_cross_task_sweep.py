"""examples/cross_task_defense/sweep.sh: every step of the recipe on a tiny model, stopped and gone
on with.
"""

import json
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from scripts import launch


def sweep(out: Path, *flags) -> subprocess.CompletedProcess:
    return launch("cross_task_defense", "sweep.sh", out, *flags, launcher=("bash",), check=False)


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_stopped(bases, tmp_path, monkeypatch):
    for name, value in {"TASKS": "summarize cloze", "NS": "4", "MAX_NEW_TOKENS": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BASE", str(bases["llama"]))
    flags = [
        "--num_epochs",
        "0.1",
        "--cutoff_len",
        "1500",
        "--lora_target_modules",
        "q_proj,v_proj",
    ]
    stopped = sweep(tmp_path, *flags, "--learning_rate", "fast")
    assert stopped.returncode and "--learning_rate fast: expected float" in stopped.stderr
    done = sweep(tmp_path, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "All answers are there already" in done.stderr  # those of the untrained model
    results = json.loads((tmp_path / "evaluation/results.json").read_text())
    assert [(m["train_task"], m["n_defence"]) for m in results["models"].values()] == [
        (None, None),
        ("summarize", 4),
        ("cloze", 4),
    ]
    assert len(results["cells"]) == 3 * 5 * 3 and {cell["rows"] for cell in results["cells"]} == {
        24
    }
    for name in ("cross-task.png", "trade-off.png"):
        assert min(Image.open(tmp_path / "evaluation" / name).size) > 200
