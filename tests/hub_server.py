"""A hub on this machine: what the real clients ask of the hub for models and data sets.

It speaks the part of the protocol that `huggingface_hub` and `datasets` use to look up, download and
upload: files at a revision, gated repositories, one commit a push. A client is pointed at it by
HF_ENDPOINT, which it reads when it is imported; so it runs in a process of its own.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

USER = "somebody"
ORGANISATION = "somebodys-lab"  # of that user
TOKEN = "hf_of_somebody"
API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/([\w-]+)(?:/([^/]+)(?:/(.*))?)?)?")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repository:
    """A model or a data set: its commits, newest last, each with all files; `names` of commits, and
    `titles`, of those that have one.
    """

    commits: list[dict[str, bytes]]
    private: bool = False
    gated: bool = False
    names: dict[str, int] = field(default_factory=dict)
    titles: dict[int, str] = field(default_factory=dict)

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit that a revision means, as its number in 40 digits and its files."""
        number = self.names.get(revision)
        if revision == "main":
            number = len(self.commits) - 1
        if number is None and revision.isdigit():
            number = int(revision)
        if number is None or number >= len(self.commits):
            return None
        return f"{number:040}", self.commits[number]


@dataclass
class Hub:
    """Repositories by kind and name, and what was asked: method and path.

    With a `fault` every answer is that status.
    """

    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    address: str = ""
    fault: int | None = None
    role: str = "write"  # of the token that is known here

    def add(self, kind: str, name: str, files: Mapping[str, bytes | str], **more) -> Repository:
        """A repository with one commit."""
        content = {}
        for path, text in files.items():
            content[path] = text.encode() if isinstance(text, str) else text
        repository = Repository([content], **more)
        self.repositories[kind, name] = repository
        return repository

    def python(self, folder: Path, *words, token: str | None = None):
        """Run Python with this hub for its hub, and a cache in `folder`."""
        environment = os.environ | {
            "HF_ENDPOINT": self.address,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
        }
        environment.pop("HF_TOKEN", None)
        if token is not None:
            environment["HF_TOKEN"] = token
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@contextmanager
def hub_server() -> Iterator[Hub]:
    """An empty hub that answers until the block ends."""
    hub = Hub()
    handler = type("OfThisHub", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class Refused(Exception):
    """An answer that is an error: its status, the hub's code for it, and what else it says."""

    def __init__(self, status: int, code: str, **more: str):
        super().__init__(code)
        self.status = status
        self.code = code
        self.more = more


class Handler(BaseHTTPRequestHandler):
    """The hub's answers."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer()

    def do_HEAD(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def log_message(self, *_):
        """Say nothing."""

    def answer(self):
        """Read the request, and answer it or say what the hub says of its error."""
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self.chunks()
        try:
            headers, content = self.found(path, body)
            self.send(200, headers, content)
        except Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.code}
            self.send(
                refused.status,
                headers,
                json.dumps({"error": refused.code, **refused.more}).encode(),
            )

    def chunks(self) -> bytes:
        """A body that is sent piece by piece."""
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def send(self, status: int, headers: Mapping[str, str], content: bytes):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def found(self, path: str, body: bytes) -> tuple[dict[str, str], bytes]:
        """Headers and content of an answer."""
        if self.hub.fault is not None:
            raise Refused(self.hub.fault, "Fault")
        if match := FILE.fullmatch(path):
            of_data, name, revision, file = match.groups()
            oid, files = self.commit("datasets" if of_data else "models", name, revision, True)
            if file not in files:
                raise Refused(404, "EntryNotFound")
            return {"ETag": f'"{digest(files[file])}"', "X-Repo-Commit": oid}, files[file]
        return {"Content-Type": "application/json"}, json.dumps(self.api(path, body)).encode()

    def api(self, path: str, body: bytes):
        """What an address under /api/ answers."""
        if path == "/api/whoami-v2":
            self.must_be_known()
            token = {"displayName": "a token", "role": self.hub.role}
            orgs = [{"name": ORGANISATION}]
            return {"name": USER, "type": "user", "orgs": orgs, "auth": {"accessToken": token}}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        match = API.fullmatch(path)
        if match is None:
            raise Refused(404, "EntryNotFound")
        kind, name, what, revision, rest = match.groups()
        if what == "preupload":
            files = json.loads(body)["files"]
            known = {"uploadMode": "regular", "shouldIgnore": False}
            return {"files": [{"path": one["path"], **known} for one in files]}
        if what == "commit":
            return self.add_commit(kind, name, body)
        oid, files = self.commit(kind, name, revision or "main", False)
        if what == "commits":
            return history(self.hub.repositories[kind, name], int(oid))
        if what == "tree":
            return entries(files, rest or "", "recursive" in self.path)
        if what == "paths-info":
            wanted = paths_of(body)
            return [one for one in entries(files, "", True) if one["path"] in wanted]
        repository = self.hub.repositories[kind, name]
        siblings = [{"rfilename": file} for file in sorted(files)]
        facts = {"private": repository.private, "gated": repository.gated and "auto"}
        return {"id": name, "sha": oid, "siblings": siblings, "tags": [], "downloads": 0, **facts}

    def must_be_known(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refused(401, "Unauthorized")

    def commit(self, kind: str, name: str, revision: str, content: bool):
        """A commit of a repository; the content of a gated one is for those who may see it."""
        repository = self.hub.repositories.get((kind, name))
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.private and not known):
            raise Refused(404, "RepoNotFound")
        if repository.gated and content and not known:
            has_token = "Authorization" in self.headers
            raise Refused(403 if has_token else 401, "GatedRepo")
        found = repository.at(revision)
        if found is None:
            raise Refused(404, "RevisionNotFound")
        return found

    def create(self, asked: Mapping):
        self.must_be_known()
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        key = f"{asked.get('type') or 'model'}s", name
        if key in self.hub.repositories:
            raise Refused(409, "Conflict", url=f"{self.hub.address}/{name}")
        private = asked.get("visibility") == "private"
        self.hub.repositories[key] = Repository([{}], private=private)
        return {"url": f"{self.hub.address}/{name}", "name": name}

    def add_commit(self, kind: str, name: str, body: bytes):
        self.must_be_known()
        repository = self.hub.repositories[kind, name]
        files = dict(repository.commits[-1])
        for line in body.splitlines():
            said = json.loads(line)
            value = said["value"]
            if said["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif said["key"] == "deletedFile":
                del files[value["path"]]
            elif said["key"] == "header":
                repository.titles[len(repository.commits)] = value["summary"]
        repository.commits.append(files)
        oid, _ = repository.at("main")
        address = f"{self.hub.address}/{name}/commit/{oid}"
        return {"success": True, "commitOid": oid, "commitUrl": address, "hookOutput": ""}


def history(repository: Repository, last: int) -> list[dict]:
    """The commits up to one, the newest first."""
    said = {"message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"}
    commits = []
    for number in range(last, -1, -1):
        title = repository.titles.get(number, "initial commit")
        commits.append({"id": f"{number:040}", "title": title, **said})
    return commits


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def paths_of(body: bytes) -> list[str]:
    """The paths that are asked for, of a form or of JSON."""
    text = body.decode()
    if text.startswith("{"):
        return json.loads(text)["paths"]
    return parse_qs(text)["paths"]


def entries(files: Mapping[str, bytes], folder: str, recursive: bool) -> list[dict]:
    """Files and folders as the hub lists them; those of a folder alone, or of all below it."""
    prefix = f"{folder}/" if folder else ""
    below = {path for path in files if path.startswith(prefix)}
    if folder and not below:
        raise Refused(404, "EntryNotFound")
    found = {}
    for path in below:
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) + 1 if recursive else 2):
            name = prefix + "/".join(parts[:depth])
            if name in files:
                size, oid = len(files[name]), digest(files[name])
                found[name] = {"type": "file", "path": name, "size": size, "oid": oid}
            else:
                oid = digest(name.encode())
                found[name] = {"type": "directory", "path": name, "size": 0, "oid": oid}
    return [found[name] for name in sorted(found)]
