"""A real `python -m guards.serve` for a test: started, waited for, and killed."""

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import scripts

RUN = "import runpy; runpy.run_module('guards.serve', run_name='__main__')"
ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Running:
    """A server that is up: its address, its process, and the file that holds what it says."""

    url: str
    port: int
    process: Any
    log: Path

    def post(self, path: str, body: Any, **options: Any) -> httpx2.Response:
        return httpx2.post(f"{self.url}{path}", json=body, timeout=60, **options)

    def moderate(self, body: Any, **options: Any) -> httpx2.Response:
        return self.post("/v1/moderations", body, **options)

    def metrics(self) -> dict[str, float]:
        """Every line of /metrics: what is measured, and its number."""
        text = httpx2.get(f"{self.url}/metrics").text
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.process.pid, number)


@contextmanager
def moderation_server(
    guard: Path | str,
    log: Path,
    *flags: Any,
    port: int | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[Running]:
    """A server for `guard` on a port of its own."""
    port = port or free_port()
    command = [sys.executable, "-c", RUN, guard, "--port", port, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | dict(env or {})
    with log.open("ab") as file:
        process = scripts.start(command, ROOT, environment, file.fileno(), file.fileno())
    running = Running(f"http://127.0.0.1:{port}", port, process, log)
    try:
        wait_for(running)
        yield running
    finally:
        scripts.end(process)


def wait_for(running: Running, seconds: float = 120) -> None:
    """Until it answers; what it has said when it does not."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            httpx2.get(f"{running.url}/healthz", timeout=5).raise_for_status()
            return
        except httpx2.HTTPError:
            there = running.process.poll() is None and time.monotonic() < deadline
            assert there, running.log.read_text()[-3000:]
            time.sleep(0.1)
