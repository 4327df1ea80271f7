"""tests/forkserver.py starts a script as Python does: what it sees, says and leaves is the same."""

import os
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


def test_what_takes_too_long_is_ended(tmp_path):
    pid = tmp_path / "pid"
    code = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    with pytest.raises(subprocess.TimeoutExpired):
        scripts.run([sys.executable, "-c", code], timeout=2)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


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
