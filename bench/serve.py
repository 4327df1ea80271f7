"""Speed of the moderation server: requests judged together, against one request at a time.

    cd bench && python serve.py --model ../output/quickstart

    # beside the same guard as ONNX, of `python -m guards.export ../output/quickstart --onnx --int8`
    python serve.py --model ../output/quickstart --onnx ../output/quickstart-onnx-int8

The same guard is served twice: as ever, and with a budget of one token, so that each request is a
batch of its own. 1, 8 and 32 clients, each of which sends its next request when it has an answer,
ask both servers the same pairs in turns. Answers are compared; the exit code is 1 if a score differs
by more than 1e-4. The exported guard is served as the first one is; by how much its scores differ
is told, and fails nothing. Then 5,000 requests go to the first server, and its memory is read
before and after.
"""

import argparse
import asyncio
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
from prometheus_client.parser import text_string_to_metric_families
from side_by_side import (
    ROOT,
    TOLERANCE,
    bench_parser,
    medians,
    real_length_pairs,
    take_turns,
    write_results,
)

from common import report
from common.conversation import Messages, UserError
from common.data import load_conversations
from common.run import expand_home, run_cli
from guards.exported import is_exported

CLIENTS = (1, 8, 32)
TARGETS = {"ratio at 32 clients": 3.0, "memory growth": 0.05}
BATCHED = "batched"
ONE = "one at a time"
ONNX = "ONNX, batched"
MEMORY = "process_resident_memory_bytes"


@dataclass
class Load:
    """What clients saw: seconds of each request, and the unsafe score of each, in order."""

    latencies: list[float]
    scores: list[float]


def main() -> None:
    args = parse()
    rows = load_conversations("beavertails-sample:train")
    talks = real_length_pairs(rows, args.requests)["log-normal lengths"]
    results: dict[str, Any] = {"clients": {}, "targets": TARGETS}
    equal = True
    with contextlib.ExitStack() as stack:
        urls = {}
        for name, served in ways(args).items():
            urls[name] = stack.enter_context(serving(*served))
            ask(urls[name], talks[:8], 1)  # a process's first passes take memory and start threads
        for clients in CLIENTS:
            found = compare(urls, talks, clients, args.rounds)
            equal = equal and found["equal"]
            results["clients"][clients] = found
        results["memory"] = memory_over(urls[BATCHED], talks, args.memory_requests)
    show(results, args.requests)
    write_results(args, results | {"equal": equal})
    sys.exit(not equal)


def parse() -> argparse.Namespace:
    parser = bench_parser(__doc__, "serve", rounds=3)
    parser.set_defaults(model=str(ROOT / "output/quickstart"))
    parser.add_argument(
        "--requests",
        type=int,
        default=256,
        help="of each way in each round",
    )
    parser.add_argument("--memory_requests", type=int, default=5000)
    parser.add_argument("--onnx", type=expand_home, help="the same guard as ONNX, a folder")
    args = parser.parse_args()
    args.model = os.path.abspath(args.model)
    if not Path(args.model).is_dir():
        raise UserError(f"--model {args.model}: no guard there; `make quickstart` trains one")
    if args.onnx is not None:
        args.onnx = os.path.abspath(args.onnx)
        if not is_exported(args.onnx):
            hint = f"`python -m guards.export {args.model} --onnx` makes one"
            raise UserError(f"--onnx {args.onnx}: no exported guard there; {hint}")
    return args


def ways(args: argparse.Namespace) -> dict[str, list[str]]:
    """What is served, each a guard with its flags."""
    found = {BATCHED: [args.model], ONE: [args.model, "--batch_tokens", "1"]}
    if args.onnx is not None:
        found[ONNX] = [args.onnx]
    return found


@contextlib.contextmanager
def serving(model: str, *flags: str) -> Iterator[str]:
    """The address of a server for a guard, which ends with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "guards.serve", model]
    command += ["--port", str(port), *flags]
    server = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while not is_up(url):
            if server.poll() is not None:
                raise UserError(f"the server ended: {' '.join(command)}")
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait()


def is_up(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/healthz", timeout=5).is_success
    except httpx2.HTTPError:
        return False


def ask(
    url: str,
    talks: Sequence[Messages],
    clients: int,
) -> Load:
    """All requests, by so many clients at once."""
    return asyncio.run(ask_all(url, talks, clients))


async def ask_all(
    url: str,
    talks: Sequence[Messages],
    clients: int,
) -> Load:
    latencies = [0.0] * len(talks)
    scores = [0.0] * len(talks)
    left = iter(range(len(talks)))

    async def client(connection: httpx2.AsyncClient) -> None:
        for place in left:  # whoever is free takes the next
            body = {"messages": list(talks[place])}
            start = time.perf_counter()
            answer = await connection.post(f"{url}/v1/moderations", json=body)
            latencies[place] = time.perf_counter() - start
            answer.raise_for_status()
            (result,) = answer.json()["results"]
            scores[place] = result["category_scores"]["unsafe"]

    limits = httpx2.Limits(max_connections=clients)
    async with httpx2.AsyncClient(timeout=600, limits=limits) as connection:
        running = [client(connection) for _ in range(clients)]
        await asyncio.gather(*running)
    return Load(latencies, scores)


def compare(
    urls: dict[str, str],
    talks: Sequence[Messages],
    clients: int,
    rounds: int,
) -> dict[str, Any]:
    """All ways in turns under the same load."""
    asked = {}
    for name, url in urls.items():
        asked[name] = partial(ask, url, talks, clients)
    seconds, loads = take_turns(asked, rounds, f"{clients} clients, ")
    median = medians(seconds)
    found: dict[str, Any] = {"seconds": seconds}
    for name, load in loads.items():
        twentieths = statistics.quantiles(load.latencies, n=20)
        found[name] = {
            "requests_per_s": len(talks) / median[name],
            "p50_ms": statistics.median(load.latencies) * 1000,
            "p95_ms": twentieths[-1] * 1000,
        }
        found[name]["ratio"] = median[ONE] / median[name]
        found[name]["difference"] = largest_difference(loads[ONE], load)
    found["equal"] = found[BATCHED]["difference"] <= TOLERANCE
    return found


def largest_difference(one: Load, other: Load) -> float:
    """By how much a score of the same text differs at most."""
    pairs = zip(one.scores, other.scores, strict=True)
    return max(abs(a - b) for a, b in pairs)


def memory_over(
    url: str,
    talks: Sequence[Messages],
    requests: int,
) -> dict[str, float]:
    """Memory of a server that has been warmed up, before and after so many requests, in MiB."""
    ask(url, talks, 32)
    before = memory(url)
    asked = 0
    while asked < requests:
        some = talks[: requests - asked]
        ask(url, some, 32)
        asked += len(some)
    after = memory(url)
    return {
        "before": before,
        "after": after,
        "growth": after / before - 1,
        "requests": asked,
    }


def memory(url: str) -> float:
    text = httpx2.get(f"{url}/metrics").text
    for family in text_string_to_metric_families(text):
        if family.name == MEMORY:
            return family.samples[0].value / 2**20
    raise UserError(f"{url}/metrics: tells no memory; it does on Linux")


def show(results: dict[str, Any], requests: int) -> None:
    rows = []
    for clients, found in results["clients"].items():
        for name in (BATCHED, ONE, ONNX):
            if name in found:
                one = found[name]
                speed = [one["requests_per_s"], one["p50_ms"], one["p95_ms"], one["ratio"]]
                difference = f"{one['difference']:.1e}"
                rows.append([f"{clients} clients, {name}", *speed, difference])
    header = ["", "requests/s", "p50 ms", "p95 ms", "x one at a time", "largest difference"]
    print(report.table(rows, header))
    grown = results["memory"]
    print(
        f"{requests} requests each; memory "
        f"{grown['before']:.0f} MiB, after {grown['requests']} more {grown['after']:.0f} "
        f"({grown['growth']:+.1%})"
    )


if __name__ == "__main__":
    run_cli(main)
