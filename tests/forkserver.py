"""Starts Python scripts as real processes without their imports, which cost several seconds each.

A server imports torch, transformers, trl and the like once, and nothing of this project. For each
request it forks a child, which becomes the script as `python script.py` would run it: with its own
folder, environment, output, arguments and `__main__`, and an exit code of its own.

A variable that a library reads when it is imported cannot be set afterwards: the server refuses a
request whose environment differs from its own in such a variable, and who asks starts Python.
tests/scripts.py asks for tests; for shell scripts, `shim` writes a `python` that asks.
"""

import argparse
import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

LIBRARIES = (
    "numpy",
    "torch",
    "torch.distributed",
    "torch.utils.data",
    "datasets",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.pipelines",
    "transformers.trainer",
    "accelerate",
    "peft",
    "trl",
    "trl.trainer.model_config",
    "trl.trainer.sft_trainer",
    "sklearn.feature_extraction.text",
    "sklearn.linear_model",
    "sklearn.metrics",
    "matplotlib.pyplot",
    "PIL.Image",
    "fire",
)
# How the names begin of variables that are read when Python starts or a library is imported.
READ_AT_IMPORT = (
    "ARROW_",
    "BNB_",
    "CUDA_",
    "DATASETS_",
    "GLIBC_",
    "HF_",
    "HOME",
    "HUGGINGFACE_",
    "LD_",
    "MKL_",
    "MPL",
    "NVIDIA_",
    "OPENBLAS_",
    "PYTHON",
    "PYTORCH_",
    "TORCH_",
    "TRANSFORMERS_",
    "TRL_",
    "XDG_",
)
# Of these, what may differ: the first is obeyed later, the others libraries set for themselves.
SET_LATER = {"PYTHONDONTWRITEBYTECODE", "LD_LIBRARY_PATH", "PYTORCH_NVML_BASED_CUDA_CHECK"}
# For the imports: no threads that a fork would lose, and a look for GPUs that leaves them usable.
AT_IMPORT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
SOCKET = "socket"  # these three are files in the server's folder
STARTED = "started"
LOG = "log"
START_SECONDS = 300  # until the socket is there, on a busy machine


# --- the server -------------------------------------------------------------------------------------------------------


def serve(folder: Path, owner: int) -> Sequence[str]:
    """Fork a child for each request until the process `owner` is gone.

    Returns in a child alone: the arguments of the script that it shall run.
    """
    atexit.register(last_exit)  # the first here is the last to be called
    given = dict(os.environ)
    os.environ.update(AT_IMPORT)
    listener = listen(folder / SOCKET)
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or a collection in a child would copy every page
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who handled a request
    while is_alive(owner):
        if not select.select([listener], [], [], 1.0)[0]:
            continue
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return handle(connection, given)
        connection.close()
    shutil.rmtree(folder, ignore_errors=True)
    sys.exit(0)


def listen(path: Path) -> socket.socket:
    """A socket that whoever finds its file can connect to."""
    listener = socket.socket(socket.AF_UNIX)
    unfinished = f"{path}.new"
    listener.bind(unfinished)
    listener.listen(64)
    os.rename(unfinished, path)
    return listener


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def handle(connection: socket.socket, given: Mapping[str, str]) -> Sequence[str]:
    """Fork the script's process, say its number, wait for it and say how it ended.

    Two messages of one line each: `{"pid": 7}` and `{"returncode": 0}`. Or one, where a variable
    cannot be set any more: `{"refused": ["HF_HOME"]}`. Returns in the script's process alone.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    text, descriptors = receive(connection)
    asked = json.loads(text)
    refused = set_at_import(asked["env"], given)
    if refused:
        say(connection, {"refused": refused})
        os._exit(0)
    child = os.fork()
    if child == 0:
        connection.close()
        become(asked, descriptors)
        return asked["argv"]
    for descriptor in descriptors:
        os.close(descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    say(connection, {"pid": child})
    _, status = os.waitpid(child, 0)
    say(connection, {"returncode": os.waitstatus_to_exitcode(status)})
    os._exit(0)


def set_at_import(env: Mapping[str, str], own: Mapping[str, str]) -> list[str]:
    """The variables that differ between two environments and are read at import."""
    names = {*env, *own} - SET_LATER
    different = [name for name in names if env.get(name) != own.get(name)]
    return sorted(name for name in different if name.startswith(READ_AT_IMPORT))


def receive(connection: socket.socket) -> tuple[str, list[int]]:
    """A line of text, and the descriptors of standard input, output and error that came with it."""
    text, descriptors, _, _ = socket.recv_fds(connection, 65536, 3)
    while not text.endswith(b"\n"):
        more = connection.recv(65536)
        if not more:
            os._exit(1)  # who asked is gone
        text += more
    return text.decode(), list(descriptors)


def say(connection: socket.socket, message: dict) -> None:
    with contextlib.suppress(BrokenPipeError):  # who asked may not wait any more
        connection.sendall(json.dumps(message).encode() + b"\n")


def become(asked: dict, descriptors: Sequence[int]) -> None:
    """Take over what a process is given when it starts."""
    import numpy
    import torch

    for standard, descriptor in enumerate(descriptors):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    threads = os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(int(threads) if threads else os.cpu_count())
    numpy.random.seed()  # every fresh process has another
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))


def run(argv: Sequence[str]) -> None:
    """Run `script.py …` or `-c code …` in this process as its main module."""
    main = ModuleType("__main__")
    if argv[0] == "-c":
        code = compile(argv[1], "<string>", "exec")
        sys.argv = ["-c", *argv[2:]]
        sys.path[0] = ""
    else:
        script = Path(argv[0]).absolute()
        code = compile(script.read_bytes(), str(script), "exec")
        sys.argv = list(argv)
        sys.path[0] = str(script.resolve().parent)
        main.__file__ = str(script)
    sys.modules["__main__"] = main
    try:
        exec(code, main.__dict__)
        last_exit.code = 0
    except SystemExit as stop:
        last_exit.code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        raise
    except Exception:
        last_exit.code = 1
        raise


class LastExit:
    """Ends a script's process when its exit functions have run, before Python frees each object.

    To free what the server imported takes longer than many a script, and nanobind would report the
    objects that `gc.freeze` keeps.
    """

    code: int | None = None

    def __call__(self) -> None:
        if self.code is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.code)


last_exit = LastExit()


# --- those who ask ----------------------------------------------------------------------------------------------------


class ForkedProcess:
    """A script that the server runs, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, connection: socket.socket, args: Sequence[str], pid: int) -> None:
        self.args = args
        self.pid = pid
        self.returncode: int | None = None
        self.connection = connection

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self.connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = read_message(self.connection)["returncode"]
            self.connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def start_server(folder: Path, owner: int, env: Mapping[str, str]) -> None:
    """Start the server of `folder`, unless another process has done so."""
    try:
        (folder / STARTED).touch(exist_ok=False)
    except FileExistsError:
        return
    command = [sys.executable, __file__, "--serve", str(folder), "--owner", str(owner)]
    output = (os.POSIX_SPAWN_OPEN, 1, str(folder / LOG), os.O_WRONLY | os.O_CREAT, 0o600)
    nothing = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)
    actions = [nothing, output, (os.POSIX_SPAWN_DUP2, 1, 2)]
    os.posix_spawn(sys.executable, command, env, file_actions=actions)


def ask(
    folder: Path, argv: Sequence[str], cwd: str, env: Mapping[str, str], files: Sequence[int]
) -> ForkedProcess | None:
    """Start a script through the server of `folder`; None where its environment is refused.

    Args:
        folder: where `start_server` was called for.
        argv: `script.py …` or `-c code …`.
        cwd: the folder that the script runs in.
        env: its whole environment.
        files: descriptors of its standard input, output and error.
    """
    connection = connect(folder)
    text = json.dumps({"argv": list(argv), "cwd": str(cwd), "env": dict(env)}).encode() + b"\n"
    sent = socket.send_fds(connection, [text], files)
    connection.sendall(text[sent:])
    answer = read_message(connection)
    if "refused" in answer:
        warnings.warn(f"Python starts anew, because of {answer['refused']}", stacklevel=2)
        connection.close()
        return None
    return ForkedProcess(connection, argv, answer["pid"])


def connect(folder: Path) -> socket.socket:
    deadline = time.monotonic() + START_SECONDS
    path = folder / SOCKET
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError((folder / LOG).read_text())
        time.sleep(0.05)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    return connection


def read_message(connection: socket.socket) -> dict:
    """One line, byte by byte, because the next message may stand behind it."""
    text = b""
    while not text.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            raise ConnectionError("the fork server has ended; see the file log in its folder")
        text += byte
    return json.loads(text)


def is_script(argv: Sequence[str]) -> bool:
    """Whether what follows `python` is a script or `-c code`; all else is left to Python."""
    return bool(argv) and (argv[0] == "-c" or argv[0].endswith(".py"))


# --- for shell scripts ------------------------------------------------------------------------------------------------


def shim(folder: Path) -> Path:
    """A folder for the front of PATH, whose `python` starts scripts through the server."""
    bin_folder = folder / "bin"
    if not bin_folder.exists():
        unfinished = Path(f"{bin_folder}-{os.getpid()}")
        unfinished.mkdir()
        python = unfinished / "python"
        ask_for_it = f'exec "{sys.executable}" -S -E "{__file__}" --run "{folder}" "$@"'
        python.write_text(f"#!/bin/sh\n{ask_for_it}\n")
        python.chmod(0o755)
        try:
            unfinished.rename(bin_folder)
        except OSError:  # another process was faster
            shutil.rmtree(unfinished)
    return bin_folder


def run_for_shell(folder: Path, argv: Sequence[str]) -> None:
    """Run a script in the name of this process: its output, its signals and its exit code."""
    process = ask(folder, argv, os.getcwd(), os.environ, (0, 1, 2)) if is_script(argv) else None
    if process is None:
        os.execv(sys.executable, [sys.executable, *argv])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: process.send_signal(number))
    code = process.wait()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", type=Path, metavar="FOLDER")
    parser.add_argument("--owner", type=int, help="the server ends when this process has ended")
    parser.add_argument("--run", nargs=argparse.REMAINDER, metavar="FOLDER script.py …")
    options = parser.parse_args()
    if options.run:
        run_for_shell(Path(options.run[0]), options.run[1:])
    run(serve(options.serve, options.owner))
