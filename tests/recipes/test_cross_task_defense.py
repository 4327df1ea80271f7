"""examples/cross_task_defense: training and generation, run as its README says."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import completions
import pytest
import scripts
import torch
from completions import completion
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from scripts import EXAMPLES, TORCHRUN, module
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTTrainer

from common.conversation import UserError
from common.training import EpochLengthGroupedSampler

ROOT = EXAMPLES.parent
RECIPE = EXAMPLES / "cross_task_defense"
SAMPLE = ROOT / "data/sample/cross_task_defense"
prompts, train, answers = (
    module("cross_task_defense", name) for name in ("prompts", "train", "generate_answers")
)
slow, serve = pytest.mark.slow, completions.serve


launch = partial(scripts.launch, "cross_task_defense")


def read(path: Path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------- training


def rows_of(count: int, task: str = "summarize") -> list[dict]:
    documents = [
        json.loads(line)
        for line in (SAMPLE / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    harmful = [d for d in documents if d["kind"] == "malicious" and d["split"] == "train"][:count]
    return [
        {"instruction": prompts.task_instruction(task, d["text"]), "output": d["refusals"][0]}
        for d in harmful
    ]


@pytest.mark.parametrize("template", ["alpaca", "llama2"])
def test_the_document_is_shortened_and_nothing_else(tiny_base, template):
    tokenizer, template = AutoTokenizer.from_pretrained(tiny_base), prompts.load_template(template)
    rows = rows_of(4)
    whole, facts = train.encode_rows(rows, template, tokenizer, 10_000, False, True)
    assert facts["documents_shortened"] == facts["answers_cut"] == 0
    longest = max(map(len, whole["input_ids"]))
    short, facts = train.encode_rows(rows, template, tokenizer, longest - 100, False, True)
    assert facts["documents_shortened"] >= 1 and facts["answers_cut"] == 0
    for row, ids, labels in zip(rows, short["input_ids"], short["labels"], strict=True):
        text = tokenizer.decode([i for i, label in zip(ids, labels, strict=True) if label == -100])
        answer = tokenizer.decode([label for label in labels if label != -100])
        assert len(ids) <= longest - 100 and answer == row["output"] + tokenizer.eos_token
        assert prompts.TASKS["summarize"] in text and row["instruction"][:20] in text
    given = [{"instruction": "Summarize.", "input": rows[0]["instruction"], "output": "No."}]
    (ids,) = train.encode_rows(given, template, tokenizer, 200, False, True)[0]["input_ids"]
    assert len(ids) <= 200 and "Summarize." in tokenizer.decode(ids)
    plain = [{"instruction": "Say it.", "output": "word " * 200}]
    encoded, facts = train.encode_rows(plain, template, tokenizer, 150, False, True)
    assert facts["answers_cut"] == 1 and len(encoded["input_ids"][0]) == 150
    with pytest.raises(UserError, match="row 1 has an instruction of"):
        train.encode_rows(
            [{"instruction": "word " * 200, "output": "x"}], template, tokenizer, 150, False, True
        )


def test_loss_on_the_answer_or_on_everything(tiny_base):
    tokenizer, template = AutoTokenizer.from_pretrained(tiny_base), prompts.load_template("alpaca")
    (ids,) = prompts.encode_prompts(template, tokenizer, [("Say yes.", None)])
    row = [{"instruction": "Say yes.", "output": "Yes."}]
    answer, everything = (
        train.encode_rows(row, template, tokenizer, 512, flag, True)[0][0] for flag in (False, True)
    )
    assert answer["input_ids"] == everything["input_ids"] == everything["labels"]
    assert answer["labels"][: len(ids)] == [-100] * len(ids)
    assert answer["labels"][len(ids) :] == answer["input_ids"][len(ids) :]


def command(model: Path, output: Path, *more) -> list:
    """The paper's command with local values: 32 rows, two epochs of 4 steps."""
    return [
        "train.py", "--base_model", model, "--data_path", SAMPLE / "safety.json", "--output_dir", output,
        "--num_epochs", 2, "--batch_size", 30, "--micro_batch_size", 15, "--learning_rate", 3e-3, "--cutoff_len", 256,
        "--val_set_size", 0, "--lora_r", 4, "--lora_alpha", 8, "--lora_dropout", 0, "--warmup_steps", 0,
        "--lora_target_modules", "[q_proj,v_proj]", "--prompt_template_name", "alpaca", "--save_steps", 2, *more,
    ]  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_close(one: Path, other: Path, tolerance: float) -> None:
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(other)[name], rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def trained(tiny_base, shared_folder) -> Path:
    made = shared_folder(
        "cross-task-defense", lambda folder: launch(*command(tiny_base, folder / "adapter"))
    )
    return made / "adapter"


@slow
def test_stock_peft_loads_what_was_trained(trained, tiny_base):
    model = AutoPeftModelForCausalLM.from_pretrained(trained).eval()
    untrained = AutoPeftModelForCausalLM.from_pretrained(trained / "checkpoint-0").eval()
    base = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    ids = torch.arange(40, 70)[None]
    with torch.inference_mode():
        learned, at_zero, plain = (m(ids).logits for m in (model, untrained, base))
    assert torch.allclose(at_zero, plain, atol=1e-5) and not torch.allclose(
        learned, plain, atol=1e-2
    )
    losses = [entry["loss"] for entry in read(trained / "run.json")["log"] if "loss" in entry]
    assert (
        read(trained / "run.json")["data"]["rows"] == 120 and (trained / "README.md").is_file()
    ), losses
    assert {p.dtype for p in weights(trained).values()} == {torch.float32}


@slow
def test_two_processes_and_other_accumulation_train_the_same(trained, tiny_base, tmp_path):
    launch(*command(tiny_base, tmp_path / "two"), launcher=TORCHRUN, threads=1)
    assert_close(trained, tmp_path / "two", 2e-5)
    launch(*command(tiny_base, tmp_path / "small", "--micro_batch_size", 5))
    assert_close(trained, tmp_path / "small", 2e-5)


@slow
def test_zero3_on_two_processes_trains_the_same(trained, tiny_base, tmp_path):
    """Its adapter is whole; DeepSpeed's own Adam rounds otherwise where a gradient is nearly
    nothing.
    """
    flags = ["--deepspeed", ROOT / "launch/zero3.json"]
    launch(*command(tiny_base, tmp_path / "zero3", *flags), launcher=TORCHRUN, threads=1)
    assert_close(trained, tmp_path / "zero3", 2e-3)


@slow
def test_killed_and_resumed_is_uninterrupted(trained, tiny_base, tmp_path):
    folder = tmp_path / "adapter"
    process = scripts.start([sys.executable, *command(tiny_base, folder)], cwd=RECIPE)
    while not list(folder.glob("checkpoint-2/trainer_state.json")):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    if (folder / "adapter_config.json").exists():
        pytest.fail("the run ended before it was killed")
    done = launch(*command(tiny_base, folder), check=False)
    assert done.returncode == 2 and "--resume_from_checkpoint latest" in done.stderr
    launch(*command(tiny_base, folder, "--resume_from_checkpoint", "latest"))
    assert_close(trained, folder, 1e-6)


@pytest.fixture
def trainer(tiny_base, tmp_path):
    """`trainer(weight=1, **flags)`: what train.py trains with, over four rows in one batch, one of
    which is long.
    """

    def make(weight: float = 1.0, **flags):
        folder = str(tmp_path / "trainer")
        values = train.TrainArguments(
            base_model=str(tiny_base), data_path="", output_dir=folder, **flags
        )
        model, tokenizer = train.load_model(values)
        rows = [*read(SAMPLE / "safety.json")[:3], *rows_of(1)]
        encoded, _ = train.encode_rows(
            rows, prompts.load_template("alpaca"), tokenizer, 10_000, False, True
        )
        options = {
            "args": train.training_arguments(values, 1),
            "train_dataset": encoded,
            "processing_class": tokenizer,
        }
        adapted = train.add_adapters(model, values).eval()
        return train.AnswerTrainer(model=adapted, first_token_weight=weight, **options)

    return make


def loss_of(trainer, kind=train.AnswerTrainer) -> float:
    (batch,) = list(trainer.get_train_dataloader())
    return kind.compute_loss(trainer, trainer.model, dict(batch)).item()


def test_the_loss_is_trls(trainer):
    ours, packed = trainer(), trainer(packing=True, cutoff_len=4096)
    assert loss_of(ours) == pytest.approx(loss_of(ours, SFTTrainer), rel=1e-5)
    (batch,) = packed.get_train_dataloader()
    # laid end to end, yet none sees another
    assert "attention_mask" not in batch and batch["input_ids"].shape[0] == 1
    assert loss_of(packed) == pytest.approx(loss_of(ours), rel=1e-5)


def test_the_first_token_of_each_answer_weighs_more(trainer):
    plain = trainer()
    (batch,) = plain.get_train_dataloader()
    labels = batch["labels"]
    first = [int((row != -100).nonzero()[0]) for row in labels]
    with torch.inference_mode():
        logits = plain.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits.log_softmax(-1)
    extra = (
        -sum(logits[i, at - 1, labels[i, at]].item() for i, at in enumerate(first))
        / (labels != -100).sum().item()
    )
    for flags in ({}, {"packing": True, "cutoff_len": 4096}):
        assert loss_of(trainer(5.0, **flags)) == pytest.approx(loss_of(plain) + 4 * extra, rel=1e-4)


def test_shuffled_batches_are_the_same_batches():
    lengths = [5 + 7 * i % 101 for i in range(90)]
    grouped, shuffled = (
        EpochLengthGroupedSampler(4, lengths, 1, shuffle) for shuffle in (False, True)
    )
    batches = [
        [tuple(order[i : i + 4]) for i in range(0, 90, 4)]
        for order in (list(grouped), list(shuffled))
    ]
    assert (
        batches[0] != batches[1]
        and sorted(batches[0]) == sorted(batches[1])
        and batches[0][-1] == batches[1][-1]
    )
    assert list(shuffled) == list(EpochLengthGroupedSampler(4, lengths, 1, True))
    shuffled.set_epoch(1)
    assert list(shuffled) != [row for batch in batches[1] for row in batch]


@slow
def test_packed_rows_and_held_out_rows(tiny_base, tmp_path):
    launch(
        *command(
            tiny_base,
            tmp_path,
            "--packing",
            "--val_set_size",
            20,
            "--batch_size",
            2,
            "--micro_batch_size",
            1,
        )
    )
    run = read(tmp_path / "run.json")
    held_out = {entry["step"]: entry["eval_loss"] for entry in run["log"] if "eval_loss" in entry}
    assert len(held_out) > 2 and run["data"]["useful_token_share"] == 1
    assert run["best_checkpoint"] == f"checkpoint-{min(held_out, key=held_out.get)}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 31}, "--batch_size 31: no multiple"),
        ({"val_set_size": 500}, "--val_set_size 500"),
        ({"lora_target_modules": ["nothing"]}, "--lora_target_modules"),
        ({"prompt_template_name": "chat"}, "has no chat template"),
        ({"cutoff_len": 4096}, "--cutoff_len 4096: the model sees 2048 tokens"),
        ({"data_path": "no.json"}, "no.json"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "give one of them"),
        ({"first_token_weight": 5.0, "train_on_inputs": True}, "--first_token_weight"),
    ],
)
def test_a_mistake_in_training_is_named_before_any_work(tiny_base, tmp_path, change, message):
    options = {
        "base_model": str(tiny_base),
        "data_path": str(SAMPLE / "safety.json"),
        "batch_size": 30,
    }
    options |= {"micro_batch_size": 15, "output_dir": str(tmp_path / "out")} | change
    with pytest.raises(UserError, match=message):
        train.train(**options)
    assert not (tmp_path / "out").exists()


def test_a_pad_token_outside_the_embeddings_is_left_out(tiny_base, tmp_path):
    """The tokenizer has a `<pad>` for which the checkpoint was never resized: EOS pads in its
    place.
    """
    shutil.copytree(tiny_base, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    values = train.TrainArguments(base_model=base, data_path="", cutoff_len=256)
    model, own = train.load_model(values)
    assert (
        own.pad_token == own.eos_token
        and own.pad_token_id < model.get_input_embeddings().num_embeddings
    )


def test_a_run_within_its_warm_up_says_so(tiny_base, tmp_path, caplog, monkeypatch):
    """Two rows, and the paper's warm-up of 10 steps: one step at rate 0."""
    # a checkpoint holds the arguments, pickled by that name
    monkeypatch.setitem(sys.modules, "arguments", module("cross_task_defense", "arguments"))
    rows = [
        {"instruction": "Name a colour.", "output": "Blue."},
        {"instruction": "Say hello.", "output": "Hello!"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    options = {
        "base_model": str(tiny_base),
        "data_path": str(tmp_path / "rows.json"),
        "num_epochs": 1,
    }
    train.train(**options, output_dir=str(tmp_path / "out"), batch_size=2, micro_batch_size=2)
    assert "The adapters are still zero after 1 steps: nothing was learned" in caplog.text
    assert "lower --warmup_steps" in caplog.text


@slow
def test_a_diverged_run_saves_no_adapter(tiny_base, tmp_path):
    done = launch(*command(tiny_base, tmp_path / "out", "--learning_rate", 1e30), check=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1 and "diverged" in errors[0], done.stderr[
        -2000:
    ]
    assert not (tmp_path / "out/adapter_config.json").exists()


# ---------------------------------------------------------------------------------------------- generation


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    instructions = [
        "Say it.",
        "Why do people tell lies? " * 6,
        "Paris!",
        "Say it.",
        "What is in the box? " * 3,
    ]
    inputs = [None, "a, b", "", None, "c"]
    (folder / "one.json").write_text(json.dumps({"instructions": instructions, "inputs": inputs}))
    (folder / "two.json").write_text(json.dumps({"instructions": instructions[::-1], "inputs": []}))
    return folder


def generate(
    questions: Path, output: Path, *more, check: bool = True
) -> subprocess.CompletedProcess:
    argv = [
        "generate_answers.py",
        "--input_path",
        questions,
        "--output_path",
        output,
        "--max_new_tokens",
        12,
        *more,
    ]
    return launch(*argv, check=check)


def one_by_one(base: Path, adapter: Path, questions: Path, name: str, **options) -> list[str]:
    """The original's loop: one prompt at a time, the adapter not merged."""
    tokenizer, model = (
        AutoTokenizer.from_pretrained(base),
        AutoPeftModelForCausalLM.from_pretrained(adapter).eval(),
    )
    content, out = read(questions / f"{name}.json"), []
    for row in answers.rows(content["instructions"], content["inputs"]):
        (ids,) = prompts.encode_prompts(prompts.load_template("alpaca"), tokenizer, [row])
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0} | options
        with torch.inference_mode():
            made = model.generate(
                input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **options
            )
        out.append(tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True).strip())
    return out


@slow
@pytest.mark.parametrize("beams", [1, 4])
def test_answers_equal_those_of_one_prompt_at_a_time(
    trained, tiny_base, questions, tmp_path, beams
):
    generate(
        questions, tmp_path, "--lora_weights", trained, "--num_beams", beams, "--batch_size", 3
    )
    (folder,) = {path.parent for path in tmp_path.rglob("one.json")}
    for name in ("one", "two"):
        content = read(folder / f"{name}.json")
        assert content["outputs"] == one_by_one(
            tiny_base, trained, questions, name, num_beams=beams
        )
        assert content["instructions"] == read(questions / f"{name}.json")["instructions"]
    assert (
        content["inputs"] == [None] * 5 and content["parameters"]["decoding"]["num_beams"] == beams
    )
    assert not list(folder.glob("*.partial.jsonl"))
    assert (
        "already"
        in generate(questions, tmp_path, "--lora_weights", trained, "--num_beams", beams).stderr
    )
    other = generate(questions, tmp_path, "--lora_weights", trained, "--num_beams", 2, check=False)
    assert other.returncode == 2 and "--overwrite" in other.stderr


@slow
def test_killed_generation_goes_on_without_repeating_or_losing(trained, tmp_path):
    many = {"instructions": [f"{i}. Say it." for i in range(400)], "inputs": []}
    (tmp_path / "many").mkdir()
    (tmp_path / "many/many.json").write_text(json.dumps(many))
    argv = [
        "generate_answers.py",
        "--input_path",
        tmp_path / "many",
        "--output_path",
        tmp_path / "out",
    ]
    argv += ["--lora_weights", trained, "--num_beams", 1, "--max_new_tokens", 12, "--batch_size", 4]
    process = scripts.start([sys.executable, *argv], cwd=RECIPE)
    while (
        not (partial := list((tmp_path / "out").rglob("*.partial.jsonl")))
        or len(partial[0].read_bytes()) < 3000
    ):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    with partial[0].open("ab") as file:
        file.write(b'{"key": "half of a li')  # as a kill may leave it
    before = partial[0].read_bytes().count(b"\n")
    assert 0 < before < 400
    done = launch(*argv)
    assert f"{before} of 400 answers are there already" in done.stderr
    (found,) = (tmp_path / "out").rglob("many.json")
    resumed = read(found)["outputs"]
    assert len(resumed) == 400 and not list((tmp_path / "out").rglob("*.partial.jsonl"))
    shutil.rmtree(tmp_path / "out")
    launch(*argv)
    assert read(found)["outputs"] == resumed


def served(questions: Path, server, output: Path, base: Path, **options) -> None:
    """generate_answers.py with answers of a server."""
    given = {"base_model": str(base), "input_path": str(questions), "output_path": str(output)}
    given |= {"engine": "server", "server_url": server.url, "server_model": "m"}
    given |= {"num_beams": 1, "max_new_tokens": 12, "server_timeout": 9.0}
    answers.generate_answers(**given | options)


def test_a_prompt_that_fails_is_an_error_of_its_item(questions, tiny_base, tmp_path, serve, caplog):
    """The rest is written, the exit code is 1, and the next run asks for what failed alone."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    row = (read(questions / "one.json")["instructions"][1], "a, b")
    (bad,) = prompts.encode_prompts(prompts.load_template("alpaca"), tokenizer, [row])
    refusal = (400, {"error": {"message": "this one never"}})
    server = serve(lambda body: refusal if body["prompt"] == bad else completion(" Said. "))
    with pytest.raises(SystemExit, match="error: 1 of 10 prompts have no answer; run it again"):
        served(questions, server, tmp_path, tiny_base)
    assert "one.json, item 2: Error code: 400" in caplog.text and "this one never" in caplog.text
    (one,), (two,) = tmp_path.rglob("one.json"), tmp_path.rglob("two.json")
    assert read(one)["outputs"] == ["Said.", None, "Said.", "Said.", "Said."]
    assert list(read(one)["errors"]) == ["2"] and "errors" not in read(two)
    before = two.read_bytes()
    for name in ("summarize", "cloze"):
        (one.parent / f"test_{name}.json").write_bytes(one.read_bytes())
    with pytest.raises(
        UserError, match=r"1 items have no output \(item 2, …\); run generate_answers"
    ):
        module("cross_task_defense", "evaluate").read_answers(one.parent)

    server.rule = lambda body: completion("Now.")
    server.bodies.clear()
    served(questions, server, tmp_path, tiny_base, server_timeout=8.0)
    assert [body["prompt"] for body in server.bodies] == [bad]
    assert read(one)["outputs"] == ["Said.", "Now.", "Said.", "Said.", "Said."]
    assert "errors" not in read(one) and two.read_bytes() == before
    assert not list(tmp_path.rglob("*.partial.jsonl"))


def test_a_prompt_that_is_too_long_is_named_and_the_others_are_answered(
    tiny_base, tmp_path, caplog
):
    asked = {"instructions": ["Say it.", "Why? " * 3000, "Paris!"], "inputs": []}
    (tmp_path / "long.json").write_text(json.dumps(asked))
    options = {"base_model": str(tiny_base), "input_path": str(tmp_path / "long.json")}
    options |= {"output_path": str(tmp_path / "out"), "num_beams": 1, "max_new_tokens": 4}
    with pytest.raises(SystemExit, match="error: 1 of 3 prompts have no answer"):
        answers.generate_answers(**options)
    assert "long.json, item 2: the prompt has " in caplog.text
    (path,) = (tmp_path / "out").rglob("long.json")
    assert [text is None for text in read(path)["outputs"]] == [False, True, False]


def test_a_refused_key_ends_the_asking(questions, tiny_base, tmp_path, serve, monkeypatch):
    monkeypatch.setenv("SERVER_API_KEY", "sk-secret")
    server = serve(lambda _: (401, {"error": {"message": "no such key: sk-secret"}}))
    with pytest.raises(UserError, match=r"refused the key: .*no such key: …") as caught:
        served(questions, server, tmp_path, tiny_base)
    assert "sk-secret" not in str(caught.value)
    assert not list(tmp_path.rglob("*.json"))


# --- what is kept ---------------------------------------------------------------------------------


def outputs_of(folder: Path) -> dict[str, list[str]]:
    return {path.stem: read(path)["outputs"] for path in sorted(folder.rglob("*.json"))}


def without_weights(path: Path) -> None:
    """Zero the tensors in the middle of a safetensors file; size, names and date stay."""
    tensors = load_file(path)
    names = sorted(tensors)
    for name in names[len(names) // 4 : len(names) // 2]:
        tensors[name] = torch.zeros_like(tensors[name])
    before = path.stat()
    save_file(tensors, path, metadata={"format": "pt"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


@pytest.fixture
def ask(tiny_base, questions, tmp_path):
    """`ask(output, **options)`: generate_answers with a copy of the tiny base, in this process."""
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))

    def run(output: str = "out", **options) -> dict[str, list[str]]:
        given = {"base_model": str(base), "input_path": str(questions), "num_beams": 1}
        given |= {"output_path": str(tmp_path / output), "max_new_tokens": 8, "batch_size": 3}
        answers.generate_answers(**(given | options))
        return outputs_of(tmp_path / output)

    run.base = base
    return run


@pytest.fixture
def interrupted(ask, tmp_path, monkeypatch):
    """`interrupted(**options)`: a run that ends when all is generated and nothing is written yet."""

    def run(**options) -> Path:
        def stop(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(answers, "write_answers", stop)
            ask(**options)
        (partial,) = (tmp_path / "out").rglob("*.partial.jsonl")
        return partial

    return run


def test_answers_of_a_replaced_base_are_not_taken_for_its_own(ask, interrupted, tmp_path, caplog):
    """A touched one is the same; what is written is only replaced when that is asked for."""
    caplog.set_level("INFO")
    interrupted()
    for path in ask.base.iterdir():
        path.touch()
    first = ask()
    assert re.search(r"(\d+) of \1 answers are there already", caplog.text)
    assert ask() == first and "All answers are there already" in caplog.text

    without_weights(ask.base / "model.safetensors")
    with pytest.raises(UserError, match=r"model_sha256 differ\); pass --overwrite"):
        ask()
    assert outputs_of(tmp_path / "out") == first
    anew = ask(overwrite=True)
    assert anew != first and anew == ask("fresh")


def test_what_an_interrupted_run_kept_counts_for_its_weights(ask, interrupted):
    interrupted()
    without_weights(ask.base / "model.safetensors")
    assert ask() == ask("fresh")


def test_another_adapter_config_is_another_adapter(trained, ask, tmp_path):
    adapter = Path(shutil.copytree(trained, tmp_path / "adapter"))
    options = {"lora_weights": str(adapter)}
    ask(**options)
    config = read(adapter / "adapter_config.json")
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))
    with pytest.raises(UserError, match="adapter_sha256 differ"):
        ask(**options)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_run_killed_at_any_byte_gives_what_one_gives_that_was_left_alone(
    ask, interrupted, share, temperature
):
    """Drawn answers, too: each batch has a seed of its own and is drawn as a whole."""
    options = {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    whole = ask("whole", **options)
    partial = interrupted(**options)
    content = partial.read_bytes()
    partial.write_bytes(content[: int(share * len(content))])
    assert ask(**options) == whole


def test_batches_of_another_size_are_not_mixed(ask, interrupted, caplog):
    caplog.set_level("INFO")
    interrupted()
    ask(batch_size=2)
    assert "are there already" not in caplog.text


def test_fewer_inputs_next_time_lose_nothing(ask, interrupted, questions, caplog):
    caplog.set_level("INFO")
    partial = interrupted()
    ask(input_path=str(questions / "one.json"))
    assert partial.is_file()
    caplog.clear()
    assert len(ask()) == 2
    assert re.search(r"(\d+) of \1 answers are there already", caplog.text)
    assert not partial.exists()


def test_where_a_server_listens_is_no_part_of_an_answer(
    questions, tiny_base, tmp_path, serve, caplog
):
    caplog.set_level("INFO")
    server = serve(lambda body: completion("Said."))
    served(questions, server, tmp_path, tiny_base)
    asked = len(server.bodies)
    other = server.url.replace("127.0.0.1", "localhost")
    served(questions, server, tmp_path, tiny_base, server_url=other)
    assert "All answers are there already" in caplog.text and len(server.bodies) == asked


def test_draws_of_one_prompt_are_drawn_one_by_one(ask, tmp_path):
    four = {"instructions": ["Say it."] * 4, "inputs": []}
    (tmp_path / "four.json").write_text(json.dumps(four))
    options = {"input_path": str(tmp_path / "four.json"), "top_k": 0, "top_p": 1.0}
    (drawn,) = ask("drawn", temperature=1.0, **options).values()
    (greedy,) = ask("greedy", **options).values()
    assert len(set(drawn)) == 4 and len(set(greedy)) == 1


@pytest.fixture
def adapter(tiny_base, tmp_path) -> Path:
    """An adapter that changes the tiny base, with train.py's record of its template."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    template = prompts.load_template("llama2")
    run = {"arguments": {"prompt_template_name": "llama2", "data_path": "a/rows.json"}}
    run["prompt_template_text"] = template
    (tmp_path / "adapter/run.json").write_text(json.dumps(run))
    return tmp_path / "adapter"


def test_an_adapter_is_asked_with_the_template_that_it_was_trained_with(ask, adapter, caplog):
    own = ask("own", lora_weights=str(adapter))
    assert own == ask("named", lora_weights=str(adapter), prompt_template_path="llama2")
    assert "was trained with" not in caplog.text
    other = ask("other", lora_weights=str(adapter), prompt_template_path="alpaca")
    assert other != own
    assert "was trained with the prompt template llama2; it is asked with alpaca" in caplog.text


def test_an_adapter_in_a_bin_file_is_read(ask, adapter):
    as_safetensors = ask("one", lora_weights=str(adapter))
    path = adapter / "adapter_model.safetensors"
    torch.save(load_file(path), adapter / "adapter_model.bin")
    path.unlink()
    assert ask("other", lora_weights=str(adapter)) == as_safetensors != ask("plain")


def test_long_documents_are_shortened_as_in_training(tiny_base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    template = prompts.load_template("alpaca")
    texts = [row["instruction"] for row in rows_of(2)]
    args = answers.AnswerArguments(input_path="", output_path="", cutoff_len=320, max_new_tokens=20)
    file = answers.Questions(tmp_path / "long.json", texts, [])
    for ids, text in zip(answers.prompt_ids(file, template, tokenizer, args), texts, strict=True):
        assert len(ids) <= 300
        said = tokenizer.decode(ids)
        assert prompts.TASKS["summarize"] in said and text[:20] in said


def test_the_hubs_key_is_handed_on_and_written_nowhere(ask, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    ask(auth_token="hf_secret")
    assert os.environ["HF_TOKEN"] == "hf_secret"
    assert not [
        path for path in (tmp_path / "out").rglob("*.json") if "hf_secret" in path.read_text()
    ]


@slow
def test_eight_bits_on_a_cpu_say_so_once(tiny_base, questions, tmp_path):
    base = ["--base_model", tiny_base, "--num_beams", 1]
    done = generate(questions, tmp_path, *base, "--load_8bit")
    assert done.stderr.count("MatMul8bitLt") == 1


@slow
def test_every_flag_is_used(trained, questions, tmp_path):
    """The original drops five of them."""
    base = ["--lora_weights", trained, "--num_beams", 1]
    hot = ["--temperature", 2]
    runs = {
        "greedy": [],
        "sampled": hot,
        "seeded": [*hot, "--seed", 7],
        "one": [*hot, "--top_k", 1],
    }
    runs["narrow"] = [*hot, "--top_p", 0.1]
    runs |= {"short": ["--max_new_tokens", 3], "llama2": ["--prompt_template_path", "llama2"]}
    found = {}
    for name, more in runs.items():
        generate(questions / "one.json", tmp_path / name, *base, *more)
        (path,) = (tmp_path / name).rglob("one.json")
        found[name] = read(path)["outputs"]
    assert found["one"] == found["greedy"]  # the best token alone is left to draw from
    assert len({json.dumps(outputs) for outputs in found.values()}) == len(found) - 1
    assert all(
        long.startswith(short) for long, short in zip(found["greedy"], found["short"], strict=True)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "tpu"}, "--engine tpu"),
        ({"num_beams": 0}, "--num_beams"),
        ({"lora_weights": "no/adapter"}, "no/adapter"),
        (
            {"engine": "server", "lora_weights": "no/adapter", "num_beams": 1},
            "--server_model must say",
        ),
        ({"base_model": "no/model"}, "no/model"),
        ({"base_model": None}, "--base_model: is needed"),
        ({"max_new_tokens": 100_000}, "the model has room for"),
        ({"engine": "server", "num_beams": 4}, "beam search needs"),
        ({"input_path": "no.json"}, "--input_path no.json"),
        ({"temperature": -1.0, "base_model": "no/model"}, "--temperature"),
        ({"cutoff_len": 20}, r"--cutoff_len 20: .*one\.json, item 1 has"),
    ],
)
def test_a_mistake_in_generation_is_named(tiny_base, questions, tmp_path, change, message):
    options = {
        "base_model": str(tiny_base),
        "input_path": str(questions),
        "output_path": str(tmp_path / "out"),
    }
    with pytest.raises(UserError, match=message):
        answers.generate_answers(**options | change)
    assert not list((tmp_path / "out").rglob("*.json"))
