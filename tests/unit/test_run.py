"""Arguments, one-line errors, safe writes, the manifest, and the training arguments of the recipes."""

import errno
import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from checks import cases, user_error
from huggingface_hub.errors import GatedRepoError
from transformers import AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available

from common import run as runtime
from common.conversation import UserError
from common.training import RecipeTrainingArguments, checkpoint_to_resume, refuse_unknown_layers

ROOT = Path(__file__).resolve().parents[2]
on_cpu = pytest.mark.skipif(
    torch.accelerator.is_available(), reason="says what happens without an accelerator"
)

# --- the command line -----------------------------------------------------------------------------


@dataclass
class Arguments:
    name: str
    size: int = 3
    limit: int | None = 8
    rate: float = 0.5
    fast: bool = False
    words: list[str] = field(default_factory=lambda: ["a"])


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """`parse(flags, config)` as a script in the folder of config.yaml would."""
    monkeypatch.chdir(tmp_path)

    def run(flags: str = "", config: str | None = None, default: Path | None = None) -> Arguments:
        if config is not None:
            Path("config.yaml").write_text(config)
            flags += " --config=config.yaml"
        monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
        (arguments,) = runtime.parse_args([Arguments], default)
        return arguments

    return run


READ = {  # what it shows: flags, config, what is read
    "a config alone": ("", "name: a\nrate: 1e-5\nfast: true", Arguments("a", rate=1e-5, fast=True)),
    "flags win": ("--size 7 --fast false", "name: a\nsize: 5\nfast: true", Arguments("a", 7)),
    "lists": ("--words x y", "name: a\nwords: [b]", Arguments("a", words=["x", "y"])),
    "null": (
        "--fast",
        "name: a\nwords: [b]\nlimit: null",
        Arguments("a", 3, None, fast=True, words=["b"]),
    ),
    "equals signs": ("--size=4", "name: a", Arguments("a", 4)),
}


@pytest.mark.parametrize(("flags", "config", "expected"), READ.values(), ids=READ)
def test_flags_override_the_config(parse, flags, config, expected):
    found = parse(flags, config)
    assert found == expected
    assert repr(found) == repr(expected)  # 1 is not 1.0


MISTAKES = {  # what is wrong: flags, config, what the line names
    "unknown flag": ("--name a --nonsense 1", None, "--nonsense"),
    "abbreviation": ("--name a --siz 4", None, "--siz"),
    "unknown key": ("", "name: a\nnonsense: 1", "--nonsense"),
    "missing flag": ("--size 4", None, "--name"),
    "empty key": ("", "name:\nsize: 4", "--name"),
    "no value": ("--name a --size", None, "--size"),
    "word for a number in the config": ("", "name: a\nsize: ten", "--size.*ten"),
    "true for a number": ("", "name: a\nlimit: true", "--limit.*True"),
    "word for true": ("", "name: a\nfast: perhaps", "perhaps"),
    "broken YAML": ("", "name: [a", r"--config .*\.yaml: .*line 1"),
    "tab in YAML": ("", "name: a\n\tsize: 1", r"--config .*\.yaml: .*line 2"),
    "repeated key": ("", "name: a\nsize: 1\nsize: 2", r"--config .*\.yaml: .*'size'"),
    "empty file": ("", "", "config.yaml"),
    "no mapping": ("", "- name", "config.yaml"),
    "missing file": ("--config missing.yaml", None, "missing.yaml"),
    "folder": ("--config .", None, "--config"),
    "no file": ("--name a --config", None, "--config"),
}


@pytest.mark.parametrize(("flags", "config", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(parse, flags, config, words):
    with user_error(words):
        parse(flags, config)


def test_no_argument_at_all_takes_the_default_config(parse, tmp_path, caplog):
    """That is said, and named in the command that goes on after Ctrl-C."""
    caplog.set_level("INFO")
    default = tmp_path / "default.yaml"
    default.write_text("name: quick\nsize: 9")
    assert parse("--name a", default=default) == Arguments("a")
    assert not caplog.text
    assert parse(default=default) == Arguments("quick", 9)
    assert "default.yaml" in caplog.text
    assert "train.py --config default.yaml" in runtime.stopped_line(KeyboardInterrupt())


# --- what a script says when it ends --------------------------------------------------------------

HOST = f"error: {socket.gethostname()}: row 3: no text\n"


@pytest.mark.parametrize(
    ("rank", "local_rank", "line"),
    [("0", "0", "error: row 3: no text\n"), ("1", "1", ""), ("8", "0", HOST)],
    ids=["main process", "its neighbour", "another node"],
)
def test_a_user_error_is_one_line_a_node(monkeypatch, capsys, rank, local_rank, line):
    def main():
        raise UserError("row 3: no text")

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(SystemExit) as left:
        runtime.run_cli(main)
    assert left.value.code == 2
    assert capsys.readouterr() == ("", line)


LATEST = ("--resume_from_checkpoint", "latest")
STOPS = {  # the command: the one that goes on
    "--name 'a b' --hub_token=x": "train.py --name 'a b' '--hub_token=…' "
    "--resume_from_checkpoint latest\n",
    "--resume-from-checkpoint=latest": "train.py --resume-from-checkpoint=latest\n",
}


@pytest.mark.parametrize(("flags", "goes_on"), STOPS.items())
def test_ctrl_c_is_one_line_with_the_command_that_goes_on(monkeypatch, capsys, flags, goes_on):
    def main():
        raise runtime.Stopped("after checkpoint-4; to go on", LATEST)

    monkeypatch.setattr(sys, "argv", ["train.py", *shlex.split(flags)])
    with pytest.raises(SystemExit) as left:
        runtime.run_cli(main)
    assert left.value.code == 130
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "after checkpoint-4" in said
    assert said.endswith(goes_on)


def test_ctrl_c_names_the_launcher(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    line = runtime.stopped_line(KeyboardInterrupt())
    assert line.endswith(": torchrun --nproc_per_node=2 train.py")


def test_any_other_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        runtime.run_cli(lambda: 1 / 0)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("old", [[], ["old"]], ids=["new file", "old file"])
def test_a_failed_write_changes_nothing(tmp_path, error, old):
    path = tmp_path / "file.json"
    for text in old:
        path.write_text(text)
    with pytest.raises(error), runtime.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert [file.read_text() for file in tmp_path.iterdir()] == old


def test_a_killed_write_is_never_half_a_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    child = os.fork()
    if child == 0:
        with runtime.atomic_path(path) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    "path", ["file", "file/below", "/dev/null/out", "/proc/out", "nowhere", "nowhere/below"]
)
def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path, path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with user_error("cannot be written"):
        runtime.check_output_folder(tmp_path / path)
    assert (tmp_path / "file").read_text() == "mine"


def test_looking_at_an_output_folder_leaves_nothing(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("there", "new", "there/new/below"):
        runtime.check_output_folder(tmp_path / name)
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


# --- the manifest ---------------------------------------------------------------------------------


@pytest.fixture
def training(tmp_path):
    """`training(**arguments)`: a recipe's training arguments with an output folder of the test's."""

    def arguments(**given) -> RecipeTrainingArguments:
        return RecipeTrainingArguments(output_dir=str(tmp_path / "output"), **given)

    return arguments


def test_manifest(monkeypatch, training):
    monkeypatch.setattr(sys, "argv", ["a/train.py", "--name", "x"])
    arguments = [Arguments("x"), training(learning_rate=0.1)]
    found = json.loads(runtime.json_text(runtime.manifest(arguments, rows=5)))
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True)
    assert found["command"] == ["train.py", "--name", "x"]
    assert found["arguments"]["name"] == "x"
    assert found["arguments"]["learning_rate"] == 0.1
    assert found["versions"]["torch"] == torch.__version__
    assert found["git"]["revision"] == head.strip()
    assert found["rows"] == 5
    assert found["hardware"]["processes"] == 1
    assert found["seconds"] > 0
    assert 0.1 < found["peak_memory_gib"]["host"] < 64


def test_manifest_tells_no_secret(monkeypatch, training):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    flags = ["--hub_token", "hf_secret", "--hub-token=hf_secret", "--api_key", "hf_secret"]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--seed", "1"])
    arguments = [training(hub_token="hf_secret"), {"api_key": "hf_secret", "seed": 1}]
    text = runtime.json_text(runtime.manifest(arguments))
    assert "hf_secret" not in text
    command = " ".join(json.loads(text)["command"])
    assert command == "train.py --hub_token … --hub-token=… --api_key … --seed 1"


def test_manifest_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runtime.manifest([])["git"] == {"revision": None, "dirty": False}


# --- training arguments ---------------------------------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch):
    """Training arguments as on a machine with a GPU."""
    monkeypatch.setattr("common.training.device", lambda: torch.device("cuda"))


def said(caplog) -> list[str]:
    records = [record for record in caplog.records if record.name.startswith("common")]
    return [record.getMessage() for record in records]


@on_cpu
def test_dead_flags_are_mapped_and_mentioned_once(training, caplog):
    caplog.set_level("INFO", "common")
    args = training(
        evaluation_strategy="steps",
        eval_steps=250,
        warmup_ratio=0.03,
        fsdp="full_shard auto_wrap",
        fsdp_transformer_layer_cls_to_wrap="LlamaDecoderLayer",
        bf16=True,
        tf32=True,
    )
    assert args.eval_strategy == "steps"
    assert args.get_warmup_steps(1000) == 30
    for name in ("bf16", "fp16", "tf32", "fsdp", "fsdp_plugin_args"):
        assert not getattr(args, name), name
    for flag in ("--evaluation_strategy", "--warmup_ratio", "float32", "--fsdp"):
        assert sum(flag in line for line in said(caplog)) == 1, flag


@on_cpu
def test_living_flags_are_not_mentioned(training, caplog):
    caplog.set_level("INFO", "common")
    args = training(eval_strategy="epoch", warmup_steps=7, bf16=False)
    assert args.get_warmup_steps(1000) == 7
    assert args.report_to == []
    assert args.train_sampling_strategy == "group_by_length"
    assert not said(caplog)


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        ("constant", 5, "constant_with_warmup"),
        ("constant", 0.1, "constant_with_warmup"),
        ("constant", 0, "constant"),
        ("cosine", 5, "cosine"),
    ],
)
def test_a_warm_up_is_never_left_out(training, schedule, steps, expected):
    """The schedule `constant` of transformers has none, whatever --warmup_steps says."""
    args = training(lr_scheduler_type=schedule, warmup_steps=steps)
    assert args.lr_scheduler_type == expected


def test_one_process_with_several_gpus_is_refused(training):
    args = training()
    args._n_gpu = 2
    with user_error("one process would share its GPUs by DataParallel: launch with torchrun"):
        checkpoint_to_resume(args)


def test_each_launched_process_has_a_gpu_of_its_own(monkeypatch):
    """A base that is loaded before the trainer's arguments lay on the first GPU in all of them."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert runtime.device() == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert runtime.device() == torch.device("cuda:1")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)  # as slurm may show it
    assert runtime.device() == torch.device("cuda:0")


def test_the_rank_of_no_launcher_chooses_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for rank in ("", "-1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert runtime.device() == torch.device("cuda")


CAUSES = {  # of an OSError: what is said
    "no such name": (None, "user/guard: no folder here, and no hub id that loads: it says"),
    "a gated repository": (
        GatedRepoError.__new__(GatedRepoError),
        "user/guard: cannot be loaded: it says",
    ),
    "a cache of others": (PermissionError(13, "no"), "user/guard: cannot be loaded: it says"),
}


@cases(("cause", "said"), CAUSES)
def test_why_a_model_does_not_load(cause, said):
    with user_error(said), runtime.loading_model("user/guard"):
        raise OSError("it says") from cause


def test_a_full_disk_is_no_missing_model():
    with (
        user_error("user/guard: cannot be loaded: .*No space"),
        runtime.loading_model("user/guard"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_what_bitsandbytes_repeats_is_said_once(capsys, caplog):
    noisy = logging.getLogger("bitsandbytes.autograd._functions")

    def main():
        for _ in range(3):
            noisy.warning("MatMul8bitLt: inputs will be cast")

    runtime.run_cli(main)
    assert [one.name for one in caplog.records].count(noisy.name) == 1


def test_flash_attention_is_left_out_where_it_is_not(caplog):
    caplog.set_level("INFO")
    there = is_flash_attn_2_available()
    found = runtime.usable_attention("flash_attention_2")
    assert found == ("flash_attention_2" if there else "sdpa")
    assert ("using sdpa" in caplog.text) is not there
    assert runtime.usable_attention("eager") == "eager"
    if not torch.accelerator.is_available():  # kernels of the hub are for GPUs
        assert runtime.usable_attention("kernels-community/flash-attn2") == "sdpa"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("full_shard auto_wrap", {"reshard_after_forward": True}),
        ("shard_grad_op auto_wrap offload", {"reshard_after_forward": False, "cpu_offload": True}),
        ("true", {"reshard_after_forward": True}),
    ],
)
def test_the_words_of_fsdp(training, on_gpu, words, expected):
    """What an accelerator gets to see; whether it then shards is for a machine that has one."""
    layer = "LlamaDecoderLayer"
    args = training(
        gradient_checkpointing=True, fsdp=words, fsdp_transformer_layer_cls_to_wrap=layer
    )
    expected |= {"fsdp_version": 2, "activation_checkpointing": True}
    expected["transformer_cls_names_to_wrap"] = layer
    assert args.fsdp_plugin_args.items() >= expected.items()
    assert args.fsdp is True
    assert not args.gradient_checkpointing


def test_fsdp_adds_up_gradients_in_float32(training, on_gpu, monkeypatch):
    """accelerate's own policy for bf16 reduces them in bf16."""
    monkeypatch.setattr("common.training.inference_dtype", lambda: torch.bfloat16)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    policy = training(fsdp="full_shard", bf16=True).fsdp_plugin_args["mixed_precision_policy"]
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy=policy)
    plugin.set_mixed_precision("bf16")  # as accelerate's state does for --bf16
    assert plugin.mixed_precision_policy is policy
    assert "mixed_precision_policy" not in training(fsdp="full_shard").fsdp_plugin_args


def test_a_gpu_before_ampere(training, on_gpu, monkeypatch, caplog):
    """It would emulate bf16, and transformers refuses tf32."""
    caplog.set_level("INFO", "common")
    monkeypatch.setattr("common.training.inference_dtype", lambda: torch.float32)
    monkeypatch.setattr("common.training.is_torch_tf32_available", lambda: False)
    args = training(bf16=True, tf32=True)
    assert (args.bf16, args.tf32) == (False, None)
    assert len(said(caplog)) == 2


def test_bf16_of_the_launcher_on_a_gpu_before_ampere(training, on_gpu, monkeypatch):
    """`accelerate launch --mixed-precision=bf16` would emulate it as well."""
    monkeypatch.setattr("common.training.inference_dtype", lambda: torch.float32)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    args = training()
    assert (args.bf16, os.environ["ACCELERATE_MIXED_PRECISION"]) == (False, "no")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    training()
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "fp16"


def test_fsdp_without_a_launcher_is_refused(training, on_gpu, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with user_error("torchrun --nproc_per_node=1, or pass --fsdp"):
        checkpoint_to_resume(training(fsdp="full_shard"))


def test_layers_that_a_model_does_not_have_are_refused(training, on_gpu, tiny_base):
    """paper.yaml names those of LLaMA; with another base accelerate failed after the rows were
    tokenized.
    """
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    fits = training(fsdp="full_shard", fsdp_transformer_layer_cls_to_wrap="LlamaDecoderLayer")
    refuse_unknown_layers(fits, model)
    refuse_unknown_layers(training(fsdp="full_shard"), model)
    other = training(fsdp="full_shard", fsdp_transformer_layer_cls_to_wrap="Qwen2DecoderLayer")
    with user_error(r"Qwen2DecoderLayer: .* it has LlamaDecoderLayer"):
        refuse_unknown_layers(other, model)


def test_an_unknown_word_of_fsdp_is_refused(training, on_gpu):
    with pytest.raises(ValueError, match="hybrid_shrad"):  # one line by `parse_args`
        training(fsdp="full_shard hybrid_shrad")


def test_which_checkpoint_is_resumed(tmp_path, training):
    """The newest whole one, or the one that is named."""
    for step in (5, 10, 20):
        (tmp_path / f"output/checkpoint-{step}").mkdir(parents=True)
    for step in (5, 10):  # the run died while it wrote 20
        (tmp_path / f"output/checkpoint-{step}/trainer_state.json").write_text("{}")
    newest = str(tmp_path / "output/checkpoint-10")
    named = str(tmp_path / "output/checkpoint-5")
    for wish, expected in {"latest": newest, "True": newest, named: named}.items():
        assert checkpoint_to_resume(training(resume_from_checkpoint=wish)) == expected
    for wish in (None, "false"):
        with user_error(r"checkpoint-10 .*--overwrite_output_dir"):
            checkpoint_to_resume(training(resume_from_checkpoint=wish))


@pytest.mark.parametrize("wish", ["latest", "/no/such/folder"])
def test_nothing_to_resume(training, wish):
    assert checkpoint_to_resume(training()) is None
    with user_error("--resume_from_checkpoint"):
        checkpoint_to_resume(training(resume_from_checkpoint=wish))
