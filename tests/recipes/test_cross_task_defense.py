"""examples/cross_task_defense: training and generation, run as its README says."""

import dataclasses
import json
import os
import re
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import completions
import pytest
import scripts
import torch
import yaml
from checks import (
    cases,
    difference,
    kill_when_written,
    logged,
    read_json,
    read_rows,
    user_error,
    weights,
)
from completions import completion
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from scripts import EXAMPLES, TORCHRUN, module
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTTrainer

from common.hub import PUSHED
from common.training import EpochLengthGroupedSampler

ROOT = EXAMPLES.parent
RECIPE = EXAMPLES / "cross_task_defense"
SAMPLE = ROOT / "data/sample/cross_task_defense"
prompts = module("cross_task_defense", "prompts")
records = module("cross_task_defense", "training_record")
train = module("cross_task_defense", "train")
answers = module("cross_task_defense", "generate_answers")
launch = partial(scripts.launch, "cross_task_defense")
slow = pytest.mark.slow
serve = completions.serve


def refused_rows(count: int) -> list[dict]:
    """Rows of the sample: a harmful document to summarize, and a refusal."""
    rows = []
    for document in read_rows(SAMPLE / "documents.jsonl"):
        if document["kind"] == "malicious" and document["split"] == "train":
            instruction = prompts.task_instruction("summarize", document["text"])
            rows.append({"instruction": instruction, "output": document["refusals"][0]})
    return rows[:count]


# --- training rows --------------------------------------------------------------------------------


@pytest.fixture
def encode(tiny_base):
    """`encode(rows, cutoff_len)`: the rows as ids and labels, and what was done to long ones."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)

    def run(rows, cutoff_len=10_000, template="alpaca", train_on_inputs=False):
        loaded = prompts.load_template(template)
        return train.encode_rows(rows, loaded, tokenizer, cutoff_len, train_on_inputs, True)

    run.tokenizer = tokenizer
    return run


@pytest.mark.parametrize("template", ["alpaca", "llama2"])
def test_the_document_is_shortened_and_nothing_else(encode, template):
    rows = refused_rows(4)
    whole, facts = encode(rows, template=template)
    assert facts["documents_shortened"] == facts["answers_cut"] == 0
    cutoff_len = max(map(len, whole["input_ids"])) - 100
    short, facts = encode(rows, cutoff_len, template)
    assert facts["documents_shortened"] >= 1
    assert facts["answers_cut"] == 0
    for row, encoded in zip(rows, short, strict=True):
        ids = encoded["input_ids"]
        answer = [label for label in encoded["labels"] if label != -100]
        assert len(ids) <= cutoff_len
        assert ids[-len(answer) :] == answer
        said = encode.tokenizer.decode(answer)
        assert said == row["output"] + encode.tokenizer.eos_token
        asked = encode.tokenizer.decode(ids[: -len(answer)])
        assert prompts.TASKS["summarize"] in asked
        assert row["instruction"][:20] in asked


def test_a_document_in_the_input_is_shortened(encode):
    document = refused_rows(1)[0]["instruction"]
    encoded, _ = encode([{"instruction": "Summarize.", "input": document, "output": "No."}], 200)
    ids = encoded["input_ids"][0]
    assert len(ids) <= 200
    assert "Summarize." in encode.tokenizer.decode(ids)


def test_the_answer_of_an_ordinary_row_is_cut(encode):
    row = {"instruction": "Say it.", "output": "word " * 200}
    encoded, facts = encode([row], 150)
    assert facts["answers_cut"] == 1
    assert len(encoded["input_ids"][0]) == 150


@cases(
    "row, message",
    {
        "no room for the answer": (
            {"instruction": "word " * 200, "output": "x"},
            "row 1 has an instruction of",
        ),
        "a refusal would be cut": (
            {"instruction": "Hello." + prompts.TASKS["case"], "output": "word " * 200},
            "row 1 has an answer of .* a refusal maybe",
        ),
    },
)
def test_a_row_that_cannot_be_cut_is_named(encode, row, message):
    with user_error(message):
        encode([row], 150)


def test_loss_on_the_answer_or_on_everything(encode):
    rows = [{"instruction": "Say yes.", "output": "Yes."}]
    (answer,) = encode(rows)[0]
    (everything,) = encode(rows, train_on_inputs=True)[0]
    ids = answer["input_ids"]
    assert ids == everything["input_ids"] == everything["labels"]
    learned = [label for label in answer["labels"] if label != -100]
    assert answer["labels"] == [-100] * (len(ids) - len(learned)) + learned
    assert encode.tokenizer.decode(learned) == f"Yes.{encode.tokenizer.eos_token}"


# --- training -------------------------------------------------------------------------------------

FLAGS = {
    "data_path": SAMPLE / "safety.json",
    "num_epochs": 2,
    "batch_size": 30,
    "micro_batch_size": 15,
    "learning_rate": 3e-3,
    "cutoff_len": 256,
    "val_set_size": 0,
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0,
    "warmup_steps": 0,
    "lora_target_modules": "[q_proj,v_proj]",
    "prompt_template_name": "alpaca",
    "save_steps": 2,
}


def command(model: Path, output: Path, *switches, **changes) -> list:
    """The paper's command with local values: 120 rows, two epochs of 4 steps."""
    flags = {"base_model": model, "output_dir": output, **FLAGS, **changes}
    words = ["train.py", *switches]
    for name, value in flags.items():
        words += [f"--{name}", value]
    return words


@pytest.fixture(scope="module")
def trained(tiny_base, shared_folder) -> Path:
    def make(folder):
        launch(*command(tiny_base, folder / "adapter"))

    return shared_folder("cross-task-defense", make) / "adapter"


@slow
def test_what_a_run_leaves(trained, tiny_base):
    """Adapters in float32, and those of step 0. (That stock PEFT reads them: test_invariant.py.)"""
    ids = torch.arange(40, 70)[None]
    at_zero = AutoPeftModelForCausalLM.from_pretrained(trained / "checkpoint-0").eval()
    plain = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    with torch.inference_mode():
        torch.testing.assert_close(at_zero(ids).logits, plain(ids).logits, atol=1e-5, rtol=0)
    assert read_json(trained / "run.json")["data"]["rows"] == 120
    record = read_json(trained / "training.json")
    assert record["prompt_template_text"] == prompts.load_template("alpaca")
    assert record["trained_on"] == "safety"
    assert not {"seed", "output_dir"} & set(record["settings"])
    assert (trained / "README.md").is_file()
    assert {tensor.dtype for tensor in weights(trained).values()} == {torch.float32}


# DeepSpeed's own Adam rounds otherwise where a gradient is nearly nothing.
@slow
@cases(
    "changes, launcher, tolerance",
    {
        "two processes": ({}, TORCHRUN, 2e-5),
        "more accumulation": ({"micro_batch_size": 5}, (sys.executable,), 2e-5),
        "zero3 on two processes": ({"deepspeed": ROOT / "launch/zero3.json"}, TORCHRUN, 2e-3),
    },
)
def test_other_ways_train_the_same(trained, tiny_base, tmp_path, changes, launcher, tolerance):
    words = command(tiny_base, tmp_path / "other", **changes)
    launch(*words, launcher=launcher, threads=1)
    assert difference(weights(trained), weights(tmp_path / "other")) < tolerance


@slow
def test_killed_and_resumed_is_uninterrupted(trained, tiny_base, tmp_path):
    folder = tmp_path / "adapter"
    words = command(tiny_base, folder)
    kill_when_written(folder / "checkpoint-2/trainer_state.json", words, RECIPE)
    assert not (folder / "adapter_config.json").exists(), "it ended before it was killed"
    done = launch(*words, check=False)
    assert "--resume_from_checkpoint latest" in scripts.error_line(done)
    launch(*words, "--resume_from_checkpoint", "latest")
    assert difference(weights(trained), weights(folder)) < 1e-6


@pytest.fixture
def trainer(tiny_base, encode, tmp_path):
    """`trainer(weight, **flags)`: train.py's, with one batch of four rows, one of them long."""
    rows = [*read_json(SAMPLE / "safety.json")[:3], *refused_rows(1)]
    encoded, _ = encode(rows)

    def make(weight: float = 1.0, **flags):
        values = train.TrainArguments(
            base_model=str(tiny_base),
            data_path="",
            output_dir=str(tmp_path / "trainer"),
            **flags,
        )
        model, tokenizer = train.load_model(values)
        return train.AnswerTrainer(
            model=train.add_adapters(model, values).eval(),
            first_token_weight=weight,
            args=train.training_arguments(values, 1),
            train_dataset=encoded,
            processing_class=tokenizer,
        )

    return make


def batch_of(trainer) -> dict[str, torch.Tensor]:
    (batch,) = trainer.get_train_dataloader()
    return dict(batch)


def loss_of(trainer, kind=train.AnswerTrainer) -> float:
    return kind.compute_loss(trainer, trainer.model, batch_of(trainer)).item()


PACKED = {"packing": True, "cutoff_len": 4096}


def test_the_loss_is_trls(trainer):
    ours = trainer()
    assert loss_of(ours) == pytest.approx(loss_of(ours, SFTTrainer), rel=1e-5)


def test_packed_rows_do_not_see_each_other(trainer):
    packed = trainer(**PACKED)
    batch = batch_of(packed)
    assert "attention_mask" not in batch
    assert len(batch["input_ids"]) == 1
    assert loss_of(packed) == pytest.approx(loss_of(trainer()), rel=1e-5)


@pytest.mark.parametrize("flags", [{}, PACKED], ids=["padded", "packed"])
def test_the_first_token_of_each_answer_weighs_more(trainer, flags):
    plain = trainer()
    batch = batch_of(plain)
    labels = batch.pop("labels")
    with torch.inference_mode():
        logits = plain.model(**batch).logits.log_softmax(-1)
    of_first = 0.0
    for row, said in zip(labels, logits, strict=True):
        place = int((row != -100).nonzero()[0])
        of_first -= said[place - 1, row[place]].item()
    share = of_first / (labels != -100).sum().item()
    weighed = trainer(5.0, **flags)
    assert loss_of(weighed) == pytest.approx(loss_of(plain) + 4 * share, rel=1e-4)


def test_shuffled_batches_are_the_same_batches():
    lengths = [5 + 7 * i % 101 for i in range(90)]

    def batches(shuffle, epoch=0):
        sampler = EpochLengthGroupedSampler(4, lengths, 1, shuffle)
        sampler.set_epoch(epoch)
        order = list(sampler)
        return [tuple(order[i : i + 4]) for i in range(0, 90, 4)]

    grouped = batches(False)
    shuffled = batches(True)
    assert shuffled != grouped
    assert sorted(shuffled) == sorted(grouped)
    assert shuffled[-1] == grouped[-1]
    assert shuffled == batches(True)
    assert shuffled != batches(True, epoch=1)


@slow
def test_packed_rows_and_held_out_rows(tiny_base, tmp_path):
    changes = {"val_set_size": 20, "batch_size": 2, "micro_batch_size": 1}
    launch(*command(tiny_base, tmp_path, "--packing", **changes))
    run = read_json(tmp_path / "run.json")
    losses = logged(tmp_path, "eval_loss")
    best = min(losses, key=losses.get)
    assert len(losses) > 2
    assert run["data"]["useful_token_share"] == 1
    assert run["best_checkpoint"] == f"checkpoint-{best}"


@cases(
    "change, message",
    {
        "no multiple": ({"batch_size": 31}, "--batch_size 31: no multiple"),
        "more than there are": ({"val_set_size": 500}, "--val_set_size 500"),
        "no template": ({"prompt_template_name": "chat"}, "has no chat template"),
        "longer than the model sees": (
            {"cutoff_len": 4096},
            "--cutoff_len 4096: the model sees 2048 tokens",
        ),
        "no file": ({"data_path": "no.json"}, "no.json"),
        "two sizes of weights": ({"load_in_8bit": True, "load_in_4bit": True}, "give one of them"),
        "no first token": (
            {"first_token_weight": 5.0, "train_on_inputs": True},
            "--first_token_weight",
        ),
    },
)
def test_a_mistake_in_training_is_named_before_any_work(tiny_base, tmp_path, change, message):
    options = {
        "base_model": str(tiny_base),
        "data_path": str(SAMPLE / "safety.json"),
        "batch_size": 30,
        "micro_batch_size": 15,
        "output_dir": str(tmp_path / "out"),
    }
    with user_error(message):
        train.train(**options | change)
    assert not (tmp_path / "out").exists()


def test_a_run_within_its_warm_up_says_so(tiny_base, tmp_path, caplog, monkeypatch):
    """Two rows, and the paper's warm-up of 10 steps: one step at rate 0."""
    # a checkpoint holds the arguments, pickled by that name
    monkeypatch.setitem(sys.modules, "arguments", module("cross_task_defense", "arguments"))
    row = {"instruction": "Name a colour.", "output": "Blue."}
    (tmp_path / "rows.json").write_text(json.dumps([row, row | {"output": " "}, row]))
    train.train(
        base_model=str(tiny_base),
        data_path=str(tmp_path / "rows.json"),
        output_dir=str(tmp_path / "out"),
        num_epochs=1,
        batch_size=2,
        micro_batch_size=2,
    )
    assert "The adapters are still zero after 1 steps" in caplog.text
    facts = read_json(tmp_path / "out/run.json")["data"]
    assert (facts["rows"], facts["rows_without_output"]) == (2, 1)


@slow
def test_a_diverged_run_saves_no_adapter(tiny_base, tmp_path):
    words = command(tiny_base, tmp_path / "out", learning_rate=1e30)
    done = launch(*words, check=False)
    assert "diverged" in scripts.error_line(done)
    assert not (tmp_path / "out/adapter_config.json").exists()


# --- generation -----------------------------------------------------------------------------------

WHY, WHAT = "Why do people tell lies? " * 6, "What is in the box? " * 3
INSTRUCTIONS = ["Say it.", WHY, "Paris!", "Say it.", WHAT]


def write_prompts(path: Path, instructions: list[str], inputs=()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"instructions": instructions, "inputs": list(inputs)}))
    return path


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """A folder of two files, one with inputs."""
    folder = tmp_path_factory.mktemp("questions")
    write_prompts(folder / "one.json", INSTRUCTIONS, [None, "a, b", "", None, "c"])
    write_prompts(folder / "two.json", INSTRUCTIONS[::-1])
    return folder


def asking(questions: Path, output: Path, *more) -> list:
    """A command that asks greedily for 12 tokens."""
    words = ["generate_answers.py", "--input_path", questions, "--output_path", output]
    return [*words, "--max_new_tokens", 12, *more]


def one_by_one(base: Path, adapter: Path, path: Path, beams: int) -> list[str]:
    """The original's loop: one prompt at a time, the adapter not merged."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
    template = prompts.load_template("alpaca")
    content = read_json(path)
    rows = answers.rows(content["instructions"], content["inputs"])
    outputs = []
    for ids in prompts.encode_prompts(template, tokenizer, rows):
        given = torch.tensor([ids])
        with torch.inference_mode():
            made = model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=12,
                do_sample=False,
                pad_token_id=0,
                num_beams=beams,
            )
        text = tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)
        outputs.append(text.strip())
    return outputs


@slow
@pytest.mark.parametrize("beams", [1, 4])
def test_answers_equal_those_of_one_prompt_at_a_time(
    trained, tiny_base, questions, tmp_path, beams
):
    adapter = ["--lora_weights", trained, "--num_beams", beams]
    launch(*asking(questions, tmp_path, *adapter, "--batch_size", 3))
    for name in ("one", "two"):
        (path,) = tmp_path.rglob(f"{name}.json")
        content = read_json(path)
        expected = one_by_one(tiny_base, trained, questions / f"{name}.json", beams)
        assert content["outputs"] == expected
        assert content["instructions"] == read_json(questions / f"{name}.json")["instructions"]
        assert content["parameters"]["decoding"]["num_beams"] == beams
    assert not list(tmp_path.rglob("*.partial.jsonl"))


@slow
def test_killed_generation_goes_on_without_repeating_or_losing(trained, tmp_path):
    many = [f"{i}. Say it." for i in range(400)]
    path = write_prompts(tmp_path / "many/many.json", many)
    out = tmp_path / "out"
    words = asking(path, out, "--lora_weights", trained, "--num_beams", 1, "--batch_size", 4)
    process = scripts.start([sys.executable, *words], cwd=RECIPE)
    partial = []
    while not partial or partial[0].stat().st_size < 3000:
        assert process.poll() is None
        time.sleep(0.02)
        partial = list(out.rglob("*.partial.jsonl"))
    process.kill()
    process.wait()
    with partial[0].open("ab") as file:
        file.write(b'{"key": "half of a li')  # as a kill may leave it
    before = partial[0].read_bytes().count(b"\n")
    assert 0 < before < 400
    done = launch(*words)
    assert f"{before} of 400 answers are there already" in done.stderr
    (found,) = out.rglob("many.json")
    resumed = read_json(found)["outputs"]
    assert len(resumed) == 400
    assert not list(out.rglob("*.partial.jsonl"))
    shutil.rmtree(out)
    launch(*words)
    assert read_json(found)["outputs"] == resumed


# --- a server answers -----------------------------------------------------------------------------


def outputs_of(folder: Path) -> dict[str, list[str]]:
    return {path.stem: read_json(path)["outputs"] for path in sorted(folder.rglob("*.json"))}


@pytest.fixture
def ask(tiny_base, questions, tmp_path):
    """`ask(output, **options)`: generate_answers with a copy of the tiny base, in this process."""
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))

    def run(output: str = "out", **options) -> dict[str, list[str]]:
        given = {
            "base_model": str(base),
            "input_path": str(questions),
            "output_path": str(tmp_path / output),
            "num_beams": 1,
            "max_new_tokens": 8,
            "batch_size": 3,
        }
        answers.generate_answers(**given | options)
        return outputs_of(tmp_path / output)

    run.base = base
    return run


def through(server) -> dict[str, str]:
    """The options of a run whose answers a server writes."""
    return {"engine": "server", "server_url": server.url, "server_model": "m"}


@pytest.fixture
def failing(serve, tiny_base):
    """A server that refuses one prompt of INSTRUCTIONS, `failing.bad`."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    template = prompts.load_template("alpaca")
    (bad,) = prompts.encode_prompts(template, tokenizer, [(WHY, "a, b")])
    refusal = (400, {"error": {"message": "this one never"}})
    server = serve(lambda body: refusal if body["prompt"] == bad else completion(" Said. "))
    server.bad = bad
    return server


def test_a_prompt_that_fails_is_an_error_of_its_item(ask, failing, tmp_path, caplog):
    """The rest is written, and the exit code is 1; the next run asks again what failed alone."""
    with pytest.raises(SystemExit, match="error: 1 of 10 prompts have no answer; run it again"):
        ask(**through(failing))
    assert "one.json, item 2: Error code: 400" in caplog.text
    assert "this one never" in caplog.text
    (one,) = tmp_path.rglob("one.json")
    assert read_json(one)["outputs"] == ["Said.", None, "Said.", "Said.", "Said."]
    assert list(read_json(one)["errors"]) == ["2"]
    (two,) = tmp_path.rglob("two.json")
    assert "errors" not in read_json(two)

    failing.rule = lambda body: completion("Now.")
    failing.bodies.clear()
    ask(server_timeout=8.0, **through(failing))
    assert [body["prompt"] for body in failing.bodies] == [failing.bad]
    assert read_json(one)["outputs"] == ["Said.", "Now.", "Said.", "Said.", "Said."]
    assert "errors" not in read_json(one)
    assert not list(tmp_path.rglob("*.partial.jsonl"))


def test_a_refused_key_ends_the_asking(ask, tmp_path, serve, monkeypatch):
    monkeypatch.setenv("SERVER_API_KEY", "sk-secret")
    refusal = (401, {"error": {"message": "no such key: sk-secret"}})
    with user_error(r"refused the key: .*no such key: …") as caught:
        ask(**through(serve(lambda _: refusal)))
    assert "sk-secret" not in str(caught.value)
    assert not list((tmp_path / "out").rglob("*.json"))


def test_where_a_server_listens_is_no_part_of_an_answer(ask, serve, caplog):
    caplog.set_level("INFO")
    server = serve(lambda body: completion("Said."))
    ask(**through(server))
    asked = len(server.bodies)
    server.url = server.url.replace("127.0.0.1", "localhost")
    ask(**through(server))
    assert "All answers are there already" in caplog.text
    assert len(server.bodies) == asked


# --- what is kept ---------------------------------------------------------------------------------


def change_weights(path: Path) -> None:
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
def interrupted(ask, tmp_path, monkeypatch):
    """`interrupted(**options)`: a run that ends when all is generated and nothing is written."""

    def stop(*_):
        raise KeyboardInterrupt

    def run(**options) -> Path:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(answers, "write_answers", stop)
            ask(**options)
        (partial,) = (tmp_path / "out").rglob("*.partial.jsonl")
        return partial

    return run


ALL_KEPT = re.compile(r"(\d+) of \1 answers are there already")
DRAWN = {"temperature": 1.5, "top_k": 0, "top_p": 1.0}


def test_a_touched_base_is_the_same(ask, interrupted, caplog):
    caplog.set_level("INFO")
    interrupted()
    for path in ask.base.iterdir():
        path.touch()
    first = ask()
    assert ALL_KEPT.search(caplog.text)
    assert ask() == first
    assert "All answers are there already" in caplog.text


def test_answers_of_a_replaced_base_are_not_taken_for_its_own(ask, tmp_path):
    """What is written is only replaced when that is asked for."""
    first = ask()
    change_weights(ask.base / "model.safetensors")
    with user_error(r"model_sha256 differ\); pass --overwrite"):
        ask()
    assert outputs_of(tmp_path / "out") == first
    anew = ask(overwrite=True)
    assert anew != first
    assert anew == ask("fresh")


def test_what_an_interrupted_run_kept_counts_for_its_weights(ask, interrupted):
    interrupted()
    change_weights(ask.base / "model.safetensors")
    assert ask() == ask("fresh")


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_a_run_killed_at_any_byte_draws_what_one_draws_that_was_left_alone(ask, interrupted, share):
    """Each batch has a seed of its own and is drawn as a whole."""
    whole = ask("whole", **DRAWN)
    partial = interrupted(**DRAWN)
    content = partial.read_bytes()
    partial.write_bytes(content[: int(share * len(content))])
    assert ask(**DRAWN) == whole


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
    assert ALL_KEPT.search(caplog.text)
    assert not partial.exists()


def test_draws_of_one_prompt_are_drawn_one_by_one(ask, tmp_path):
    path = write_prompts(tmp_path / "four.json", ["Say it."] * 4)
    (drawn,) = ask("drawn", input_path=str(path), **DRAWN).values()
    (greedy,) = ask("greedy", input_path=str(path)).values()
    assert len(set(drawn)) == 4
    assert len(set(greedy)) == 1


def test_a_prompt_that_is_too_long_is_named_and_the_others_are_answered(ask, tmp_path, caplog):
    path = write_prompts(tmp_path / "long.json", ["Say it.", "Why? " * 3000, "Paris!"])
    with pytest.raises(SystemExit, match="error: 1 of 3 prompts have no answer"):
        ask(input_path=str(path))
    assert "long.json, item 2: the prompt has " in caplog.text
    (outputs,) = outputs_of(tmp_path / "out").values()
    assert [text is None for text in outputs] == [False, True, False]


# --- what is printed ---------------------------------------------------------------------------------


def printed(*texts: str) -> list[tuple[str, dict[str, str]]]:
    """The commands of texts, in order: the script, and its flags; those with "…" are left out."""
    found = []
    for line in "\n".join(texts).replace("\\\n", " ").splitlines():
        command = re.match(r"(?:torchrun|python) (?:-\S+ )*(\w+\.py)(.*)", line)
        if command and "…" not in line:
            flags = dict(re.findall(r"--(\w+) ([^-\s]\S*)", command[2]))
            found.append((command[1], flags))
    return found


@cases(
    "texts",
    {
        "the README": [RECIPE / "README.md"],
        "the docstrings": [
            RECIPE / f"{name}.py"
            for name in ("build_data", "train", "generate_answers", "evaluate")
        ],
    },
)
def test_printed_commands_find_what_they_read(texts):
    made = set()
    read = []
    for script, flags in printed(*[path.read_text() for path in texts]):
        if script == "build_data.py":
            made.add(flags.get("output_dir", "data"))
        if script == "train.py":
            config = yaml.safe_load((RECIPE / "configs/quickstart.yaml").read_text())
            flags = flags or {"output_dir": config["output_dir"]}
            read += [flags[name] for name in ("data_path",) if name in flags]
            made |= {flags[name] for name in ("output_dir",) if name in flags}
        if script == "generate_answers.py":
            known = {"input_path", "output_path", "base_model", "lora_weights"} & set(flags)
            args = answers.AnswerArguments(**{name: flags[name] for name in known})
            made.add(str(answers.answers_folder(args)))
            read += [args.input_path, args.lora_weights or args.input_path]
        if script == "evaluate.py":
            read += flags["answers"].split(",")
        for path in read:
            parents = {path, *map(str, Path(path).parents)}
            assert parents & made or (RECIPE / path).exists(), f"{script} reads {path}"
    assert read


# --- adapters and prompts -------------------------------------------------------------------------


@pytest.fixture
def adapter(tiny_base, tmp_path) -> str:
    """An adapter that changes the tiny base, with train.py's record of its template."""
    folder = tmp_path / "adapter"
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(folder)
    given = {"prompt_template_name": "llama2", "data_path": "a/rows.json"}
    run = {"arguments": given, "prompt_template_text": prompts.load_template("llama2")}
    (folder / "run.json").write_text(json.dumps(run))
    return str(folder)


def test_an_adapter_is_asked_with_the_template_that_it_was_trained_with(ask, adapter, caplog):
    own = ask("own", lora_weights=adapter)
    assert own == ask("named", lora_weights=adapter, prompt_template_path="llama2")
    assert "was trained with" not in caplog.text
    other = ask("other", lora_weights=adapter, prompt_template_path="alpaca")
    assert other != own
    assert "was trained with the prompt template llama2; it is asked with alpaca" in caplog.text


@cases(
    "place, file, trained_on",
    {
        "the untrained one of a run": ("checkpoint-0", "run.json", None),
        "a checkpoint": ("checkpoint-7", "training.json", "rows"),
        "what is pushed": ("", "training.json", "rows"),
    },
)
def test_templates_of_checkpoints_and_of_what_is_pushed(
    ask, adapter, tmp_path, caplog, place, file, trained_on
):
    """A checkpoint has no record of its own, and run.json is not pushed."""
    assert "training.json" in PUSHED
    named = ask("named", lora_weights=adapter, prompt_template_path="llama2")
    run = Path(adapter, "run.json")
    record = dataclasses.asdict(records.record_of(read_json(run)))
    run.unlink()
    folder = Path(adapter, place)
    shutil.copytree(adapter, tmp_path / "copy")
    shutil.copytree(tmp_path / "copy", folder, dirs_exist_ok=True)
    of_run = {"arguments": {"prompt_template_name": "llama2", "data_path": "a/rows.json"}}
    content = record if file == "training.json" else of_run
    Path(adapter, file).write_text(json.dumps(content))
    assert ask("own", lora_weights=str(folder)) == named
    assert not caplog.text
    (one,) = (tmp_path / "own").rglob("one.json")
    assert read_json(one)["parameters"]["trained_on"] == trained_on


def test_rows_of_an_earlier_version_are_told_by_their_counts():
    """It wrote no hash of them."""
    counts = {"rows": 120, "tokens": 9000, "answer_tokens": 800}
    assert records.rows_of(counts) == records.rows_of({"useful_token_share": 0.9, **counts})
    assert records.rows_of(counts) != records.rows_of(counts | {"tokens": 9001})
    assert records.rows_of(counts | {"train_sha256": "hash"}) == "hash"
    assert records.rows_of({"rows": 120}) is None


def test_a_template_that_is_not_known_is_not_silent(ask, adapter, caplog):
    Path(adapter, "run.json").unlink()
    ask("named", lora_weights=adapter, prompt_template_path="alpaca")
    assert "is not known" not in caplog.text
    ask(lora_weights=adapter)
    assert "what it was trained with is not known" in caplog.text
    assert "it is asked with alpaca" in caplog.text


def test_another_adapter_config_is_another_adapter(ask, adapter):
    ask(lora_weights=adapter)
    path = Path(adapter, "adapter_config.json")
    path.write_text(json.dumps(read_json(path) | {"lora_alpha": 1}))
    with user_error("adapter_sha256 differ"):
        ask(lora_weights=adapter)


def test_an_adapter_in_a_bin_file_is_read(ask, adapter):
    as_safetensors = ask("one", lora_weights=adapter)
    path = Path(adapter, "adapter_model.safetensors")
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    assert ask("other", lora_weights=adapter) == as_safetensors != ask("plain")


class Code:
    """Is unpickled by making a folder."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_code_in_a_bin_file_is_not_run(ask, adapter, tmp_path):
    path = Path(adapter, "adapter_model.safetensors")
    torch.save(load_file(path) | {"code": Code(tmp_path / "ran")}, path.with_suffix(".bin"))
    path.unlink()
    with user_error("cannot be applied"):
        ask(lora_weights=adapter)
    assert not (tmp_path / "ran").exists()


def test_room_is_looked_at_before_a_model_is_loaded(ask):
    (ask.base / "model.safetensors").unlink()
    with user_error(r"--cutoff_len 20: .*one\.json, item 1 has"):
        ask(cutoff_len=20)


def test_long_documents_are_shortened_as_in_training(tiny_base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    template = prompts.load_template("alpaca")
    texts = [row["instruction"] for row in refused_rows(2)]
    file = answers.Questions(tmp_path / "long.json", texts, [])
    own = {"cutoff_len": 320, "max_new_tokens": 20}
    args = answers.AnswerArguments(input_path="", output_path="", **own)
    asked = answers.prompt_ids(file, template, tokenizer, args)
    for ids, text in zip(asked, texts, strict=True):
        said = tokenizer.decode(ids)
        assert len(ids) <= 300
        assert prompts.TASKS["summarize"] in said
        assert text[:20] in said


def test_the_hubs_key_is_handed_on_and_written_nowhere(ask, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    ask(auth_token="hf_secret")
    assert os.environ["HF_TOKEN"] == "hf_secret"
    for path in (tmp_path / "out").rglob("*.json"):
        assert "hf_secret" not in path.read_text()


@slow
def test_eight_bits_on_a_cpu_say_so_once(tiny_base, questions, tmp_path):
    flags = ["--base_model", tiny_base, "--num_beams", 1, "--load_8bit"]
    done = launch(*asking(questions, tmp_path, *flags))
    assert done.stderr.count("MatMul8bitLt") == 1


def test_every_flag_is_used(ask, adapter):
    """The original drops five of them."""
    hot = {"temperature": 2.0}
    runs = {
        "greedy": {},
        "sampled": hot,
        "seeded": hot | {"seed": 7},
        "one": hot | {"top_k": 1},
        "narrow": hot | {"top_p": 0.1},
        "short": {"max_new_tokens": 3},
        "alpaca": {"prompt_template_path": "alpaca"},
    }
    found = {}
    for name, options in runs.items():
        found[name] = ask(name, lora_weights=adapter, **options)["one"]
    assert found["one"] == found["greedy"]  # the best token alone is left to draw from
    assert len(set(map(str, found.values()))) == len(found) - 1
    for long, short in zip(found["greedy"], found["short"], strict=True):
        assert long.startswith(short)


@cases(
    "change, message",
    {
        "unknown engine": ({"engine": "tpu"}, "--engine tpu"),
        "no beams": ({"num_beams": 0}, "--num_beams"),
        "no such adapter": ({"lora_weights": "no/adapter"}, "no/adapter"),
        "a server loads no adapter": (
            {"engine": "server", "lora_weights": "no/adapter"},
            "--server_model must say",
        ),
        "no such model": ({"base_model": "no/model"}, "no/model"),
        "no model": ({"base_model": None}, "--base_model: is needed"),
        "more than the model writes": ({"max_new_tokens": 100_000}, "the model has room for"),
        "beams of a server": ({"engine": "server", "num_beams": 4}, "beam search needs"),
        "no input": ({"input_path": "no.json"}, "--input_path no.json"),
        "below zero": ({"temperature": -1.0}, "--temperature"),
        "nothing to shorten": ({"cutoff_len": 20}, r"--cutoff_len 20: .*one\.json, item 1 has"),
    },
)
def test_a_mistake_in_generation_is_named(ask, tmp_path, change, message):
    with user_error(message):
        ask(**change)
    assert not list((tmp_path / "out").rglob("*.json"))
