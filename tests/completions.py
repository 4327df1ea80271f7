"""A real HTTP server that speaks OpenAI's /v1/completions, and does what a rule says."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Rule = Callable[[dict[str, Any]], Any]
DROP = object()  # the line goes dead without an answer


class Held:
    """The connection stays open, and nothing comes, until the server ends."""


class Server(ThreadingHTTPServer):
    """`rule(body)` gives (status, content), DROP or Held(); content that is no dict is sent as
    text.
    """

    daemon_threads = True

    def __init__(self, rule: Rule):
        super().__init__(("127.0.0.1", 0), Handler)
        self.rule = rule
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def asked(self, prompt: list[int]) -> int:
        """How often a prompt was asked."""
        return sum(body["prompt"] == prompt for body in self.bodies)

    def end(self) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.keys.add(self.headers["Authorization"])
        reply = self.server.rule(body)
        if isinstance(reply, Held):
            self.server.over.wait()
            reply = DROP
        if reply is DROP:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        status, content, *kinds = reply
        kind = "application/json" if isinstance(content, dict) else "text/html"
        data = json.dumps(content) if isinstance(content, dict) else content
        self.send_response(status)
        self.send_header("Content-Type", *(kinds or [kind]))
        self.send_header("Content-Length", str(len(data.encode())))
        self.end_headers()
        self.wfile.write(data.encode())

    def log_message(self, *_):
        pass


HTML = (200, "<html>Please sign in</html>")
BROKEN_JSON = (200, '{"choices": [{"index": 0, "te', "application/json")


def completion(text: str) -> tuple[int, dict[str, Any]]:
    """What a server says that writes `text`."""
    return 200, {"choices": [{"index": 0, "text": text, "finish_reason": "stop"}]}


def token(logprobs: dict[int, float]) -> tuple[int, dict[str, Any]]:
    """What a server says that tells these tokens, of which the first is the one that it writes."""
    names = {f"token_id:{number}": value for number, value in logprobs.items()}
    told = {"tokens": [next(iter(names))], "top_logprobs": [names], "token_logprobs": [0.0]}
    choice = {"index": 0, "text": "x", "finish_reason": "length", "logprobs": told}
    return 200, {"id": "1", "object": "text_completion", "model": "m", "choices": [choice]}


@pytest.fixture
def serve() -> Iterator[Callable[[Rule], Server]]:
    """`serve(rule)` starts a server that ends with the test."""
    pytest.importorskip("openai", reason="the openai client is not installed (extra [api])")
    servers = []

    def start(rule: Rule) -> Server:
        servers.append(Server(rule))
        return servers[-1]

    yield start
    for server in servers:
        server.end()
