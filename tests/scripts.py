"""Starts the scripts of recipes as a person does, and loads their files in tests."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

import forkserver
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2  # of torch, in what a test launches
TIMEOUT = 1200.0  # seconds: a quickstart takes minutes, and three times as many on a busy machine
SERVER = "GUARDRAIL_TESTS_FORKSERVER"  # names the folder of the server that all workers share
DATA = "GUARDRAIL_RECIPES_DATA"  # names the folder of real data
OWNER = "owner"  # the file in that folder that holds the number of the process it ends with
ENVIRONMENT = dict(os.environ)  # the fork server's, which no test has changed
BIN = Path(sys.executable).parent
# the real launcher, two processes
TORCHRUN = (BIN / "torchrun", "--standalone", "--nproc_per_node=2")
_LOADED: dict[str, dict[str, ModuleType]] = {}


def module(recipe: str, name: str) -> ModuleType:
    """A file of a recipe as the recipe's own scripts import it; other tests do not find its names
    afterwards.
    """
    folder, own = EXAMPLES / recipe, _LOADED.setdefault(recipe, {})
    for key, loaded in list(sys.modules.items()):  # another recipe's file of the same name
        if (getattr(loaded, "__file__", None) or "").startswith(f"{EXAMPLES}/"):
            del sys.modules[key]
    sys.path.insert(0, str(folder))
    sys.modules.update(own)
    try:
        if name == "evaluate":  # a script; the name by itself is the library's
            spec = importlib.util.spec_from_file_location(
                f"{recipe}_evaluate", folder / "evaluate.py"
            )
            loaded = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded)
            return loaded
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
        for key, loaded in list(sys.modules.items()):
            if (getattr(loaded, "__file__", None) or "").startswith(f"{folder}/"):
                own[key] = sys.modules.pop(key)


def real_data(*parts: str) -> Path:
    """A file or folder of real data, such as `real_data("xstest")`; the test is skipped without it."""
    folder = os.environ.get(DATA)
    if not folder:
        pytest.skip(
            f"{DATA} is not set: it names the folder of real data, with {'/'.join(parts)} in it"
        )
    path = Path(folder, *parts)
    if not path.exists():
        pytest.skip(f"{path} is not there: {DATA} names another folder")
    return path


# --- processes --------------------------------------------------------------------------------------------------------


def share_server() -> None:
    """Choose the fork server of this process and of those that it starts; nothing runs yet."""
    os.environ[SERVER] = str(new_server())


def leave_server() -> None:
    """Remove the folder; a server that runs ends by itself."""
    shutil.rmtree(os.environ.pop(SERVER))


def new_server() -> Path:
    """A folder for a fork server that ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="forkserver-"))
    (folder / OWNER).write_text(str(os.getpid()))
    return folder


@cache
def server() -> Path:
    """The folder of the fork server; the first who asks starts it."""
    folder = Path(os.environ[SERVER]) if SERVER in os.environ else new_server()
    owner = int((folder / OWNER).read_text())
    forkserver.start_server(folder, owner, ENVIRONMENT)
    return folder


def start(
    command: Sequence,
    cwd: Path | str | None = None,
    env: Mapping[str, str] | None = None,
    output: int = subprocess.DEVNULL,
    errors: int = subprocess.DEVNULL,
    typed: int = subprocess.DEVNULL,
) -> subprocess.Popen | forkserver.ForkedProcess:
    """A process of its own: a Python script through the fork server, all else as ever.

    Args:
        command: `[sys.executable, "train.py", …]`, `[sys.executable, "-c", code, …]` or any other.
        cwd: the folder to run in; by default that of this process.
        env: the whole environment; by default that of this process.
        output, errors, typed: descriptors of open files, or `subprocess.DEVNULL`; `typed` is
            what it reads from standard input.
    """
    words = [str(word) for word in command]
    folder = str(cwd or os.getcwd())
    environment = os.environ if env is None else env
    if words[0] == sys.executable and forkserver.is_script(words[1:]):
        with open(os.devnull, "r+b") as nothing:
            null = nothing.fileno()
            files = [null if f == subprocess.DEVNULL else f for f in (typed, output, errors)]
            forked = forkserver.ask(server(), words[1:], folder, environment, files)
        if forked is not None:
            return forked
    files = {"stdin": typed, "stdout": output, "stderr": errors}
    return subprocess.Popen(words, cwd=folder, env=environment, **files)


def run(
    command: Sequence,
    cwd: Path | str | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = TIMEOUT,
    typed: str = "",
) -> subprocess.CompletedProcess:
    """Start a command, wait for it and capture what it says; `typed` is its standard input."""
    return run_together(command, [os.environ if env is None else env], cwd, timeout, typed)


def run_together(
    command: Sequence,
    environments: Sequence[Mapping[str, str]],
    cwd: Path | str | None = None,
    timeout: float = TIMEOUT,
    typed: str = "",
) -> subprocess.CompletedProcess:
    """Run a command in several processes at once, one for each environment.

    Returns:
        Their outputs mixed, and the exit code of the first that failed; the others are then ended.

    Raises:
        subprocess.TimeoutExpired: after `timeout` seconds, when all of them are ended.
    """
    temporary = tempfile.TemporaryFile
    with temporary() as output, temporary() as errors, temporary() as keyboard:
        keyboard.write(typed.encode())
        keyboard.seek(0)
        files = [file.fileno() for file in (output, errors, keyboard)]
        processes = [start(command, cwd, environment, *files) for environment in environments]
        try:
            code = wait_for_all(processes, timeout)
        finally:
            for process in processes:
                end(process)
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(list(map(str, command)), code, *texts)


def wait_for_all(processes: Sequence, timeout: float) -> int:
    """The exit code of the first that fails, or 0 when all have ended well."""
    deadline = time.monotonic() + timeout
    running = list(processes)
    while running:
        for process in list(running):
            if process.poll() is None:
                continue
            if process.returncode:
                return process.returncode
            running.remove(process)
        if time.monotonic() > deadline:
            raise subprocess.TimeoutExpired(processes[0].args, timeout)
        time.sleep(0.01)
    return 0


def end(process) -> None:
    """End a process; a launcher gets the time to end its own."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_written(path: Path, process, seconds: float = 300) -> None:
    """Until a running process has written something to a file."""
    deadline = time.monotonic() + seconds
    while not (path.is_file() and path.stat().st_size):
        assert process.poll() is None, f"it ended without {path}"
        assert time.monotonic() < deadline, f"no {path} appeared"
        time.sleep(0.01)


def error_line(done: subprocess.CompletedProcess) -> str:
    """The one line with which a command stops at a mistake of the user: exit code 2, no traceback."""
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    return line


def ranks(processes: int) -> list[dict[str, str]]:
    """The environment that torchrun gives to each of several processes on one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def launch(
    recipe: str,
    *argv,
    launcher: Sequence = (sys.executable,),
    threads: int = THREADS,
    processes: int = 1,
    typed: str = "",
    check: bool = True,
) -> subprocess.CompletedProcess:
    """A script of a recipe as a command, in its folder.

    Args:
        recipe: the name of a folder in examples/.
        argv: the script and its arguments.
        launcher: what stands before them; with a shell, its `python` starts scripts as tests do.
        threads: of torch, in each process.
        processes: more than one run as torchrun would run them, over gloo on this machine.
        typed: its standard input.
        check: a failed command fails the test.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    if Path(launcher[0]).name == "bash":
        environment["PATH"] = f"{forkserver.shim(server())}:{BIN}:{environment['PATH']}"
    own = ranks(processes) if processes > 1 else [{}]
    environments = [environment | variables for variables in own]
    done = run_together([*launcher, *argv], environments, EXAMPLES / recipe, typed=typed)
    if check:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done
