"""Arguments, one-line errors, safe writes, the manifest, and the training arguments of the recipes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import scripts
import torch
from transformers.utils import is_flash_attn_2_available

from common import run as runtime
from common.conversation import UserError
from common.training import RecipeTrainingArguments, checkpoint_to_resume, start_over

ROOT = Path(__file__).resolve().parents[2]
on_cpu = pytest.mark.skipif(
    torch.accelerator.is_available(), reason="says what happens without an accelerator"
)


@dataclass
class Arguments:
    name: str = field(metadata={"help": "A required flag."})
    size: int = 3
    limit: int | None = 8
    rate: float = 0.5
    fast: bool = False
    words: list[str] = field(default_factory=lambda: ["a"])


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """Parse `flags` with a config file of that text (None: no such file is named), as a script in
    tmp_path would.
    """

    def run(flags: str = "", config: str | None = None, default: str | None = None) -> Arguments:
        monkeypatch.chdir(tmp_path)
        for name, text in (("config.yaml", config), ("default.yaml", default)):
            if text is not None:
                Path(name).write_text(text, encoding="utf-8")
        words = flags.split() + (["--config", "config.yaml"] if config is not None else [])
        monkeypatch.setattr(sys, "argv", [str(tmp_path / "train.py"), *words])
        (arguments,) = runtime.parse_args(
            [Arguments], None if default is None else tmp_path / "default.yaml"
        )
        return arguments

    return run


@pytest.mark.parametrize(
    ("flags", "config", "expected"),
    [
        ("--name a", None, Arguments("a")),
        ("", "name: a\nsize: 5\nrate: 1e-5\nfast: true", Arguments("a", 5, 8, 1e-5, True)),
        ("--size 7 --fast false", "name: a\nsize: 5\nfast: true", Arguments("a", 7)),
        ("--name b --words x y", "name: a\nrate: 1", Arguments("b", rate=1.0, words=["x", "y"])),
        (
            "--limit 4 --fast",
            "name: a\nwords: [b, c]",
            Arguments("a", limit=4, fast=True, words=["b", "c"]),
        ),
        ("", "name: a\nwords: b\nlimit: null", Arguments("a", limit=None, words=["b"])),
        ("--config=config.yaml --size=4", "name: a", None),
    ],
)
def test_flags_override_the_config(parse, flags, config, expected):
    if expected is None:  # the other way to write it: only the file must be there
        parse("--name x", config)
        assert parse(flags) == Arguments("a", 4)
    else:
        found = parse(flags, config)
        assert found == expected
        assert [type(v) for v in vars(found).values()] == [type(v) for v in vars(expected).values()]


@pytest.mark.parametrize(
    ("flags", "config", "words"),
    [
        ("--name a --nonsense 1", None, "unknown argument.*--nonsense"),
        ("--name a stray", None, "unknown argument.*stray"),
        ("--name a --siz 4", None, "unknown argument.*--siz"),
        ("--nam a", None, "required: --name"),
        ("", "name: a\nnonsense: 1", "unknown argument.*--nonsense"),
        ("--size 4", None, "required: --name"),
        ("", "size: 4", "required: --name"),
        ("", "name:\nsize: 4", "required: --name"),
        ("--name a --size ten", None, "--size.*ten"),
        ("--name a --size", None, "--size.*expected one argument"),
        ("", "name: a\nsize: ten", "--size.*ten"),
        ("", "name: a\nsize: 3.5", "--size.*3.5"),
        ("", "name: a\nsize: [1, 2]", r"--size.*\[1, 2\]"),
        ("", "name: a\nlimit: true", "--limit.*True"),
        ("", "name: a\nrate: high", "--rate.*high"),
        ("", "name: a\nfast: perhaps", "perhaps"),
        ("", "name: [a", r"--config .*\.yaml: not YAML.*line 1"),
        ("", "name: a\n\tsize: 1", r"--config .*\.yaml: not YAML.*line 2"),
        ("", "", "the file is empty"),
        ("", "- name", "must contain a YAML mapping"),
        ("--config missing.yaml", None, "missing.yaml"),
        ("--config .", None, "is a directory"),
        ("--name a --config", None, "--config: needs a YAML file"),
    ],
)
def test_a_mistake_is_one_line(parse, flags, config, words):
    with pytest.raises(UserError, match=words) as raised:
        parse(flags, config)
    assert "\n" not in str(raised.value)


def test_no_argument_at_all_takes_the_default_config(parse, caplog):
    caplog.set_level("INFO")
    assert parse(default="name: quick") == Arguments("quick")
    assert "running default.yaml" in caplog.text
    assert "--config configs/paper.yaml" in caplog.text
    caplog.clear()
    assert parse("--name a", default="name: quick\nsize: 9") == Arguments("a")
    assert not caplog.text


@pytest.mark.parametrize(
    ("rank", "local_rank", "line"),
    [
        (None, None, "error: row 3: no text\n"),
        ("0", "0", "error: row 3: no text\n"),
        ("1", "1", ""),
        ("8", "0", f"error: {socket.gethostname()}: row 3: no text\n"),
    ],
)
def test_a_user_error_is_one_line_a_node(monkeypatch, capsys, rank, local_rank, line):
    def main():
        raise UserError("row 3: no text")

    for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as left:
        runtime.run_cli(main)
    assert (left.value.code, *capsys.readouterr()) == (2, "", line)


@pytest.mark.parametrize(
    ("argv", "stop", "line"),
    [
        (
            ["train.py"],
            KeyboardInterrupt(),
            "stopped before the end; to run it again: python train.py",
        ),
        (
            ["train.py", "--name", "a b", "--hub_token=x"],
            runtime.Stopped("after checkpoint-4; to go on", ("--resume_from_checkpoint", "latest")),
            "stopped after checkpoint-4; to go on: "
            "python train.py --name 'a b' '--hub_token=…' --resume_from_checkpoint latest",
        ),
        (
            ["train.py", "--resume-from-checkpoint=latest"],
            runtime.Stopped("after checkpoint-4; to go on", ("--resume_from_checkpoint", "latest")),
            "stopped after checkpoint-4; to go on: python train.py --resume-from-checkpoint=latest",
        ),
    ],
)
def test_ctrl_c_is_one_line_with_the_command_that_goes_on(monkeypatch, capsys, argv, stop, line):
    def main():
        raise stop

    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(SystemExit) as left:
        runtime.run_cli(main)
    assert (left.value.code, *capsys.readouterr()) == (130, "", f"{line}\n")


def test_ctrl_c_names_the_launcher(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert runtime.stopped_line(KeyboardInterrupt()).endswith(
        ": torchrun --nproc_per_node=2 train.py"
    )


def test_the_default_config_is_named_in_the_command_that_goes_on(parse):
    parse(default="name: quick")
    stop = runtime.Stopped("after checkpoint-4; to go on", ("--resume_from_checkpoint", "latest"))
    assert runtime.stopped_line(stop).endswith(
        "train.py --config default.yaml --resume_from_checkpoint latest"
    )


def test_any_other_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        runtime.run_cli(lambda: 1 / 0)


@pytest.mark.slow
def test_script_with_a_mistake(tmp_path):
    script = """
        from dataclasses import dataclass
        from common.run import parse_args, run_cli
        @dataclass
        class Arguments:
            name: str
        run_cli(lambda: parse_args([Arguments]))
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    run = scripts.run([sys.executable, "script.py"], tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    assert (
        run.stderr
        == "error: the following arguments are required: --name; --help lists the flags\n"
    )


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", [None, "old"])
def test_a_failed_write_changes_nothing(tmp_path, error, old):
    path = tmp_path / "file.json"
    if old is not None:
        path.write_text(old)
    with pytest.raises(error), runtime.atomic_path(path) as temporary:
        temporary.write_text("half")
        assert (path.read_text() if path.exists() else None) == old
        raise error
    assert [p.read_text() for p in tmp_path.iterdir()] == ([] if old is None else [old])


def test_a_killed_write_is_never_half_a_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    child = os.fork()
    if child == 0:
        with runtime.atomic_path(path) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert path.read_text() == "old"


def test_a_good_write(tmp_path):
    runtime.write_json(tmp_path / "new" / "a.json", {"ü": None})
    assert (tmp_path / "new" / "a.json").read_text("utf-8") == '{\n  "ü": null\n}\n'
    assert (tmp_path / "new" / "a.json").stat().st_mode & 0o777 == 0o644  # mkstemp's own is 0o600
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.json"]
    with pytest.raises(ValueError, match="JSON"):
        runtime.write_json(tmp_path / "b.json", float("nan"))
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize(
    "path", ["file", "file/below", "/dev/null/out", "/proc/out", "nowhere", "nowhere/below"]
)
def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path, path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(
        UserError, match=r"cannot be written \(.*\); choose another output folder"
    ) as raised:
        runtime.check_output_folder(tmp_path / path)
    assert "\n" not in str(raised.value) and (tmp_path / "file").read_text() == "mine"


def test_looking_at_an_output_folder_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    for path in (tmp_path / "there", tmp_path / "new", "there/new/below", "new", "."):
        runtime.check_output_folder(path)
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


@pytest.fixture
def training(tmp_path):
    return lambda **arguments: RecipeTrainingArguments(
        output_dir=str(tmp_path / "output"), **arguments
    )


def test_manifest(monkeypatch, training):
    monkeypatch.setattr(sys, "argv", ["a/train.py", "--name", "x", "--learning_rate", "0.1"])
    found = json.loads(
        runtime.json_text(runtime.manifest([Arguments("x"), training(learning_rate=0.1)], rows=5))
    )
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    assert found["command"] == ["train.py", "--name", "x", "--learning_rate", "0.1"]
    assert (
        found["arguments"].items()
        >= {"name": "x", "words": ["a"], "limit": 8, "learning_rate": 0.1}.items()
    )
    assert found["arguments"]["include_num_input_tokens_seen"] is not None
    assert (
        found["versions"].items()
        >= {"torch": torch.__version__, "python": sys.version.split()[0]}.items()
    )
    assert (found["git"]["revision"], type(found["git"]["dirty"])) == (head, bool)
    assert (found["rows"], found["hardware"]["processes"]) == (5, 1)
    assert found["seconds"] > 0
    assert 0.1 < found["peak_memory_gib"]["host"] < 64


def test_manifest_tells_no_secret(monkeypatch, training):
    secrets = [f"hf_secret{i}" for i in range(6)]
    monkeypatch.setenv("HF_TOKEN", secrets[0])
    monkeypatch.setenv("SOME_VARIABLE", secrets[1])
    flags = [
        "--hub_token",
        secrets[2],
        f"--hub-token={secrets[3]}",
        "--api_key",
        secrets[4],
        "--seed",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    text = runtime.json_text(
        runtime.manifest([training(hub_token=secrets[2]), {"api_key": secrets[5], "seed": 1}])
    )
    assert not re.findall("hf_secret.", text)
    assert json.loads(text)["command"] == [
        "train.py",
        "--hub_token",
        "…",
        "--hub-token=…",
        "--api_key",
        "…",
        "--seed",
        "1",
    ]
    assert "hub_token" not in json.loads(text)["arguments"]


def test_manifest_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runtime.manifest([])["git"] == {"revision": None, "dirty": False}


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
    assert (args.eval_strategy, args.eval_steps, args.get_warmup_steps(1000)) == ("steps", 250, 30)
    assert not (args.bf16 or args.fp16 or args.tf32 or args.fsdp or args.fsdp_plugin_args)
    assert args.fsdp_transformer_layer_cls_to_wrap is None
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("common")]
    assert len(lines) == 4
    for words in (
        "--evaluation_strategy .*--eval_strategy steps",
        "--warmup_ratio .*0.03",
        "float32",
        "--fsdp is off",
    ):
        assert sum(bool(re.search(words, line)) for line in lines) == 1, words


def test_a_warm_up_is_never_left_out(training):
    """The schedule `constant` of transformers has none, whatever --warmup_steps says."""
    for steps in (5, 0.1):
        args = training(lr_scheduler_type="constant", warmup_steps=steps)
        assert args.lr_scheduler_type == "constant_with_warmup"
    assert training(lr_scheduler_type="constant").lr_scheduler_type == "constant"
    assert training(lr_scheduler_type="cosine", warmup_steps=5).lr_scheduler_type == "cosine"


def test_flash_attention_is_left_out_where_it_is_not(caplog):
    caplog.set_level("INFO")
    expected = "flash_attention_2" if is_flash_attn_2_available() else "sdpa"
    assert runtime.usable_attention("flash_attention_2") == expected
    assert ("using sdpa" in caplog.text) is (expected == "sdpa")
    assert [runtime.usable_attention(name) for name in (None, "eager", "sdpa")] == [
        None,
        "eager",
        "sdpa",
    ]


@on_cpu
def test_living_flags_are_not_mentioned(training, caplog):
    caplog.set_level("INFO", "common")
    args = training(eval_strategy="epoch", eval_steps=5, warmup_steps=7, bf16=False)
    assert (args.eval_strategy, args.get_warmup_steps(1000), args.report_to) == ("epoch", 7, [])
    assert args.train_sampling_strategy == "group_by_length"
    assert not [record for record in caplog.records if record.name.startswith("common")]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("full_shard auto_wrap", {"reshard_after_forward": True}),
        ("shard_grad_op auto_wrap offload", {"reshard_after_forward": False, "cpu_offload": True}),
        ("true", {"reshard_after_forward": True}),
    ],
)
def test_the_words_of_fsdp(training, monkeypatch, words, expected):
    """What an accelerator gets to see; whether it then shards is for a machine that has one."""
    monkeypatch.setattr("common.training.device", lambda: torch.device("cuda"))
    layer = "LlamaDecoderLayer"
    args = training(
        gradient_checkpointing=True, fsdp=words, fsdp_transformer_layer_cls_to_wrap=layer
    )
    expected |= {"fsdp_version": 2, "activation_checkpointing": True}
    expected["transformer_cls_names_to_wrap"] = layer
    assert args.fsdp_plugin_args.items() >= expected.items()
    assert args.fsdp is True and not args.gradient_checkpointing


def test_an_unknown_word_of_fsdp_is_refused(training, monkeypatch):
    monkeypatch.setattr("common.training.device", lambda: torch.device("cuda"))
    with pytest.raises(ValueError, match="hybrid_shrad"):  # one line by `parse_args`
        training(fsdp="full_shard hybrid_shrad")


@pytest.fixture
def checkpoints(tmp_path):
    # half of one: the run died while writing it
    (tmp_path / "output/checkpoint-20").mkdir(parents=True)
    for step in (5, 10):
        (tmp_path / "output" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / "output" / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    return tmp_path / "output"


def test_checkpoint_to_resume(checkpoints, training):
    assert checkpoint_to_resume(training(resume_from_checkpoint="latest")) == str(
        checkpoints / "checkpoint-10"
    )
    assert checkpoint_to_resume(training(resume_from_checkpoint="True")) == str(
        checkpoints / "checkpoint-10"
    )
    named = str(checkpoints / "checkpoint-5")
    assert checkpoint_to_resume(training(resume_from_checkpoint=named)) == named
    assert checkpoint_to_resume(training(overwrite_output_dir=True)) is None


def test_starting_over_removes_the_checkpoints(checkpoints, training):
    (checkpoints / "results.json").write_text("{}")
    start_over(training(overwrite_output_dir=True))
    assert [path.name for path in checkpoints.iterdir()] == ["results.json"]


def test_checkpoint_of_an_earlier_run_is_not_overwritten(checkpoints, training):
    for wish in (None, "false"):
        with pytest.raises(
            UserError,
            match=r"checkpoint-10 .*--resume_from_checkpoint latest or --overwrite_output_dir",
        ):
            checkpoint_to_resume(training(resume_from_checkpoint=wish))


def test_nothing_to_resume(tmp_path, training):
    assert checkpoint_to_resume(training()) is None
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint_to_resume(training(resume_from_checkpoint="latest"))
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoint_to_resume(training(resume_from_checkpoint=str(tmp_path)))
