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
