"""examples/cross_task_defense/sweep.sh: every step of the recipe on a tiny model, stopped and gone
on with.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checks import read_json
from PIL import Image
from scripts import EXAMPLES, launch, run

RECIPE = EXAMPLES / "cross_task_defense"
SAMPLE = EXAMPLES.parent / "data/sample/cross_task_defense"


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


def test_a_sweep_over_files_with_the_papers_names(bases, tmp_path, monkeypatch):
    """The paper misspells one task. A file of the right spelling is preferred."""
    data = tmp_path / "data"
    for folder in ("training", "evaluation"):
        (data / folder).mkdir(parents=True)
    rows = json.dumps(read_json(SAMPLE / "safety.json")[:8])
    for name in ("10_summrize", "100_summrize", "100_summarize"):
        (data / f"training/saferpaca_Instructions_20000_{name}.json").write_text(rows)
    questions = read_json(SAMPLE / "evaluation_stripped/test_summarize.json")
    few = {key: value[:2] for key, value in questions.items()}
    (data / "evaluation/test_summrize.json").write_text(json.dumps(few))
    given = {"DATA": data, "TASKS": "summarize", "NS": "10 100", "MAX_NEW_TOKENS": "4"}
    for name, value in given.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("BASE", str(bases["llama"]))
    done = sweep(tmp_path / "out", "--num_epochs", "0.1", "--batch_size", "4")
    assert done.returncode == 0, done.stderr[-3000:]
    models = read_json(tmp_path / "out/evaluation/results.json")["models"].values()
    trained = [(model["trained_on"], model["n_defence"]) for model in models if model["n_defence"]]
    stem = "saferpaca_Instructions_20000"
    assert trained == [(f"{stem}_10_summrize", 10), (f"{stem}_100_summarize", 100)]


LOCAL = {  # in place of what the README's commands name
    "yahma/alpaca-cleaned": SAMPLE / "instructions.json",
    "20000": "20",
    "safety_only_data_Instructions.json": SAMPLE / "safety.json",
    "documents.jsonl": SAMPLE / "documents.jsonl",
    "10,100,500,1000,2000": "10",
    "--num_epochs 3": "--num_epochs 0.1",
    " --load_8bit": "",
}


@pytest.mark.slow
def test_the_papers_commands_in_order(bases, tmp_path):
    """As the README prints them, in a copy of the recipe, with local files."""
    section = (RECIPE / "README.md").read_text().split("## The paper's run")[1]
    text = section.split("```")[1].replace("\\\n", " ")
    for name, local in LOCAL.items():
        assert name in text
        text = re.sub(rf"(?<=\s){re.escape(name.strip())}(?=\s)", str(local), text)
    folder = Path(shutil.copytree(RECIPE, tmp_path / "recipe", ignore=lambda *_: {"output"}))
    shutil.copytree(bases["llama"], folder / "meta-llama/Llama-2-7b-hf")
    commands = [line.split() for line in text.splitlines() if line.startswith("python ")]
    assert len(commands) == 5
    for _, *words in commands:
        done = run([sys.executable, *words], folder, os.environ | {"HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
    models = read_json(folder / "output/evaluation/results.json")["models"].values()
    assert [model["n_defence"] for model in models] == [None, 10]
