"""A guard as a moderation server, with OpenAI's and Perspective's addresses and a page to try it.

    python -m guards.serve output/quickstart --port 8000
    curl http://127.0.0.1:8000/v1/moderations -H "Content-Type: application/json" \\
        -d '{"input": "How do I read the letters of my neighbour?"}'

    # only who has the key may ask; the whole network may try
    GUARD_API_KEY=… python -m guards.serve output/quickstart --host 0.0.0.0

    # a guard that generates, in front of `vllm serve`
    python -m guards.serve output/expguard --engine server --server_url http://127.0.0.1:8001/v1

docs/serving.md has the rest: LiteLLM, what users of Perspective change, a systemd unit.
"""

import argparse
import logging
import os
from typing import Any

from common.conversation import UserError, check_url
from common.run import (
    device,
    expand_home,
    run_cli,
)
from guards import (
    LONG_INPUTS,
    Guard,
    load_guard,
)
from guards.classifier import ClassifierGuard
from guards.serve.answers import (
    TEXT_IS,
    Reader,
    read_attributes,
)

logger = logging.getLogger("guards.serve")
KEY = "GUARD_API_KEY"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
# Tokens that are judged together; what runs elsewhere makes batches of its own.
BUDGET = {"cpu": 2048, "elsewhere": 65536}
# A few requests are of very different lengths: a CPU loses more to padding than it gains by width.
PADDED_ON_CPU = 512


def parse() -> argparse.Namespace:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m guards.serve",
        description=__doc__,
        formatter_class=kind,
    )
    add_guard_flags(parser)
    add_server_flags(parser)
    args = parser.parse_args()
    if not 0 < args.port < 65536:
        raise UserError(f"--port {args.port}: expected 1 to 65535")
    for name in ("batch_tokens", "max_waiting", "max_body_bytes"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    return args


def add_guard_flags(parser: argparse.ArgumentParser) -> None:
    """Which guard, and how it is loaded."""
    add = parser.add_argument
    add(
        "guard",
        type=expand_home,
        help="a folder, a name of guards/zoo.yaml, or a hub id",
    )
    add(
        "--long_inputs",
        choices=LONG_INPUTS,
        help="default: windows",
    )
    add(
        "--engine",
        choices=("transformers", "vllm", "server"),
        help="of a guard that generates",
    )
    add("--server_url", help="of --engine server; its key: SERVER_API_KEY")
    add("--server_model", help="the guard's name on that server")
    add(
        "--server_timeout",
        type=float,
        help="seconds of its silence that end a request; it is tried again five times",
    )
    add(
        "--trust_remote_code",
        action="store_true",
        help="run code that comes with a model",
    )


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Where it listens, how it reads a request, and how much it takes."""
    add = parser.add_argument
    add(
        "--host",
        default="127.0.0.1",
        help="0.0.0.0 opens it to the whole network",
    )
    add(
        "--port",
        type=int,
        default=8000,
    )
    add(
        "--text_is",
        choices=TEXT_IS,
        help="what a text alone is judged as; default: as it can",
    )
    add(
        "--attributes",
        type=expand_home,
        help="YAML file: Perspective's attribute: category",
    )
    add(
        "--batch_tokens",
        type=int,
        help="tokens that are judged together",
    )
    add(
        "--max_waiting",
        type=int,
        default=256,
        help="texts that may wait; more get 429",
    )
    add(
        "--max_body_bytes",
        type=int,
        default=131072,
        help="of a request; more get 413",
    )
    add(
        "--log_texts",
        action="store_true",
        help="write every text with its answer to the log",
    )


def guard_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of `load_guard`, which leaves out None: not every kind of guard takes all."""
    if args.server_url is not None:
        check_url(args.server_url, "--server_url")
    return {
        "progress": False,
        "long_inputs": args.long_inputs,
        "engine": args.engine,
        "server_url": args.server_url,
        "server_model": args.server_model,
        "server_timeout": args.server_timeout,
        "keeps_asking": args.engine == "server" or None,
        "trust_remote_code": args.trust_remote_code or None,
    }


def read_key() -> str | None:
    """What clients must carry; None lets everybody ask."""
    key = os.environ.get(KEY)
    if key is not None and not key.strip():
        raise UserError(f"{KEY} is empty: set it to a long random text, or unset it")
    return key and key.strip()  # a mounted secret often ends with a line break


def token_budget(args: argparse.Namespace, guard: Guard) -> int:
    """Tokens that are judged together. On a CPU the guard then pads in smaller batches."""
    is_cpu = device().type == "cpu" and args.engine != "server"
    if is_cpu and isinstance(guard, ClassifierGuard):
        guard.batch_tokens = PADDED_ON_CPU
    return args.batch_tokens or BUDGET["cpu" if is_cpu else "elsewhere"]


def main() -> None:
    args = parse()
    try:
        import uvicorn

        from guards.serve.app import make_app
        from guards.serve.front import Limits
    except ImportError as error:
        what = f"{error.name} is missing"
        raise UserError(f"{what}: pip install -e '.[serve]' in the repository's root") from None
    limits = Limits(args.max_body_bytes, read_key())
    if limits.key is None and args.host not in LOOPBACK:
        logger.warning("--host %s without %s: whoever reaches it may ask.", args.host, KEY)
    guard = load_guard(args.guard, **guard_options(args))
    attributes = read_attributes(args.attributes, guard) if args.attributes else {}
    reader = Reader(guard, args.text_is, attributes)
    budget = token_budget(args, guard)
    app = make_app(reader, limits, budget, args.max_waiting, args.log_texts)
    uvicorn.run(
        app,
        host=args.host,
        port=args.port,
        access_log=False,  # an address can hold a key
        log_config=None,
        server_header=False,
    )


if __name__ == "__main__":
    run_cli(main)
