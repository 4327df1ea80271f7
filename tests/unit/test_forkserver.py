"""tests/forkserver.py starts a script as Python does: what it sees, says and leaves is the same."""

import os
import signal
import subprocess
import sys

import pytest
import scripts

SEEN = """
import json, os, sys
def module():  # found in the main module, as pickle looks for it
    return "module"
print(json.dumps({
    "arguments": sys.argv, "name": __name__, "file": __file__, "folder": os.getcwd(), "path": sys.path,
    "environment": dict(os.environ), "input": sys.stdin.read(), "main": sys.modules["__main__"].module(),
    "ours": [name for name in ("common", "guards", "evaluate", "conftest", "scripts") if name in sys.modules],
}))
print("to errors", file=sys.stderr)
"""
BEFORE = """
import atexit, os, sys, threading, time
atexit.register(print, "exit")
threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
"""


@pytest.fixture
def both(tmp_path):
    """`both(text, *arguments)`: a script run by Python, and through the fork server."""

    def run(text: str, *arguments: str) -> list[subprocess.CompletedProcess]:
        (tmp_path / "scripts").mkdir()
        (tmp_path / "scripts/script.py").write_text(text)
        command = [sys.executable, "scripts/script.py", *arguments]
        options = {"cwd": tmp_path, "env": os.environ | {"SOME_NAME": "some value"}}
        streams = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
        return [subprocess.run(command, **options, **streams), scripts.run(command, **options)]

    return run


def test_a_script_sees_what_it_sees_under_python(both):
    python, forked = both(SEEN, "--flag", "two words")
    assert forked.stdout == python.stdout
    assert forked.stderr == python.stderr


ENDS = ["pass", "sys.exit(2)", "sys.exit('said')", "os._exit(5)", "os.kill(os.getpid(), 9)"]


@pytest.mark.parametrize("end", ENDS)
def test_a_script_ends_as_under_python(both, end):
    """Threads are waited for, and exit functions run."""
    python, forked = both(BEFORE + end)
    assert forked.returncode == python.returncode
    assert forked.stdout == python.stdout
    assert forked.stderr == python.stderr


def test_an_error_keeps_its_traceback(both):
    python, forked = both("def broken():\n    return 1 / 0\nbroken()\n")
    assert forked.returncode == 1
    assert forked.stderr.endswith(python.stderr.partition("\n")[2])


def test_the_server_has_imported_what_is_slow():
    code = "import sys; print({'torch', 'transformers', 'trl', 'peft'} - set(sys.modules))"
    assert scripts.run([sys.executable, "-c", code]).stdout == "set()\n"


def test_threads_are_those_that_are_asked_for():
    code = "import torch; print(torch.get_num_threads())"
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    assert scripts.run([sys.executable, "-c", code], env=environment).stdout == "2\n"


def test_a_variable_that_is_read_at_import_starts_python(tmp_path):
    code = "import sys, os; print('torch' in sys.modules, os.environ['HF_HOME'])"
    environment = os.environ | {"HF_HOME": str(tmp_path)}
    done = scripts.run([sys.executable, "-c", code], env=environment)
    assert done.stdout == f"False {tmp_path}\n"


def test_a_process_can_be_killed():
    process = scripts.start([sys.executable, "-c", "import time; time.sleep(600)"])
    assert process.poll() is None
    process.kill()
    assert process.wait(60) == -signal.SIGKILL


def test_what_takes_too_long_is_ended(tmp_path):
    pid = tmp_path / "pid"
    code = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    with pytest.raises(subprocess.TimeoutExpired):
        scripts.run([sys.executable, "-c", code], timeout=2)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


SHELL = """cd "$1"
python -c 'import os, sys; print("torch" in sys.modules, os.getcwd()); sys.exit(3)'
"""


def test_a_shells_python_is_forked_too(tmp_path):
    (tmp_path / "run.sh").write_text(SHELL)
    shell = [tmp_path / "run.sh", tmp_path]
    done = scripts.launch("moderation", *shell, launcher=("bash",), check=False)
    assert done.returncode == 3
    assert done.stdout == f"True {tmp_path}\n"


RANKS = r"""
import sys, torch
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
if len(sys.argv) > 1 and rank == 1:
    sys.exit(4)
numbers = torch.full((2,), rank + 1.0)
torch.distributed.all_reduce(numbers)
sys.stdout.write(f"{rank} {numbers.tolist()}\n")  # at once: both write into one pipe
torch.distributed.destroy_process_group()
"""


def test_two_processes_are_one_group(tmp_path):
    """Each is a process of its own; where one fails, the other does not wait for ever."""
    (tmp_path / "ranks.py").write_text(RANKS)
    done = scripts.launch("moderation", tmp_path / "ranks.py", processes=2)
    assert sorted(done.stdout.splitlines()) == ["0 [3.0, 3.0]", "1 [3.0, 3.0]"]
    failed = scripts.launch("moderation", tmp_path / "ranks.py", "fail", processes=2, check=False)
    assert failed.returncode
    assert not failed.stdout
