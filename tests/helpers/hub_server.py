"""A server on loopback with the downloads and uploads of the Hugging Face Hub's API, and with faults."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

LARGE = 1000  # bytes; larger weights are stored outside of git


@dataclass
class Repo:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # branches and tags
    gated: bool = False
    private: bool = False
    licence: str = "gemma"


@dataclass
class Fault:
    """A fault for the first `count` requests whose "METHOD path" matches `pattern`."""

    pattern: str
    count: int = 1
    status: int = 0  # of the response; 0: the usual one
    body: bytes = b"{}"
    cut: int | None = None  # bytes of the body after which the connection is closed


@dataclass
class Hub:
    repos: dict[str, Repo] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=lambda: {"hf_writes": "write", "hf_reads": "read"})
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)  # "METHOD path", followed by " bytes=…" for a range
    blobs: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def commit(self, id: str, files: Mapping[str, bytes] | Path, ref: str = "main", **about) -> str:
        """Commit these files to a branch or tag; returns the commit."""
        if isinstance(files, Path):
            files = {
                str(file.relative_to(files)): file.read_bytes() for file in sorted(files.rglob("*")) if file.is_file()
            }
        repo = self.repos.setdefault(id, Repo())
        for name, value in about.items():
            setattr(repo, name, value)
        content = repr((id, len(repo.commits), sorted(files.items()))).encode()
        repo.refs[ref] = commit = hashlib.sha1(content).hexdigest()
        repo.commits[commit] = dict(files)
        return commit


@pytest.fixture
def hub_server(monkeypatch, tmp_path):
    """An empty Hub, an empty cache, no token and an empty working directory."""
    from huggingface_hub import constants

    server = Hub()
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield server
    server.close()


def git_digest(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(name: str, content: bytes) -> bool:
    return name.endswith((".safetensors", ".bin")) and len(content) > LARGE


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise a body waits until its header is acknowledged

    def log_message(self, format: str, *args) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def do_GET(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        line = f"{self.command} {path}"
        span = self.headers.get("Range", "")
        self.hub.requests.append(f"{line} {span}".rstrip())
        fault = next((f for f in self.hub.faults if f.count > 0 and re.search(f.pattern, line)), None)
        if fault:
            fault.count -= 1
        try:
            if fault and fault.status:
                return self.answer(fault.body, status=fault.status)
            body, headers = self.route(path, content)
            status = headers.pop("status", 200)
            if span and status == 200:
                start = int(span.removeprefix("bytes=").rstrip("-"))
                body, status = body[start:], 206
            self.answer(body, headers, status, cut=fault and fault.cut)
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self.answer(json.dumps({"error": refused.message}).encode(), headers, refused.status)

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self, body: bytes, headers: Mapping = {}, status: int = 200, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        self.close_connection = cut is not None

    def role(self) -> str:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise _Refused(401, message="Invalid credentials in Authorization header")
        return self.hub.tokens.get(token, "")

    def repo(self, id: str, writing: bool = False) -> Repo:
        repo = self.hub.repos.get(id)
        if repo is None or (repo.private and not self.role()):
            raise _Refused(404 if self.role() else 401, "RepoNotFound", "Repository not found")
        if writing and self.role() != "write":
            raise _Refused(403, message="You have read access but not the required permissions for this operation")
        return repo

    def files(self, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]]:
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repo.commits[commit]

    def route(self, path: str, content: bytes) -> tuple[bytes, dict]:
        for pattern, answer in (
            (r"/api/whoami-v2", self.whoami),
            (r"/api/validate-yaml", self.validate),
            (r"/api/repos/create", self.create),
            (r"/api/models/([^/]+/[^/]+)/auth-check", self.auth_check),
            (r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self.info),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self.tree),
            (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self.preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/(.+)", self.commit),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
            (r"/blobs/(\w+)", self.blob),
        ):
            if match := re.fullmatch(pattern, path):
                answered = answer(*match.groups(), **({"content": content} if self.command in ("POST", "PUT") else {}))
                return answered if isinstance(answered, tuple) else (json.dumps(answered).encode(), {})
        raise _Refused(404, "EntryNotFound", f"no such page: {path}")

    def whoami(self):
        if not (role := self.role()):
            raise _Refused(401, message="Invalid username or password.")
        return {"name": "me", "type": "user", "orgs": [{"name": "org"}], "auth": {"accessToken": {"role": role}}}

    def validate(self, content: bytes):
        metadata = json.loads(content)["content"].split("---\n")[1]
        if not isinstance(yaml.safe_load(metadata), dict):
            raise _Refused(400, message="the card's metadata is no mapping")
        return {"errors": [], "warnings": []}

    def create(self, content: bytes):
        asked = json.loads(content)
        id = f"{asked['organization']}/{asked['name']}"
        if id not in self.hub.repos:
            private = asked.get("private") or asked.get("visibility") == "private"
            self.hub.commit(id, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=bool(private))
        self.repo(id, writing=True)
        return {"url": f"{self.hub.url}/{id}", "name": id}

    def auth_check(self, id: str):
        if self.repo(id).gated and not self.role():
            raise _Refused(401, "GatedRepo", f"Access to model {id} is restricted.")
        return {}

    def info(self, id: str, revision: str | None = None):
        repo = self.repo(id)
        commit, files = self.files(repo, revision or "main")
        kind = json.loads(files["config.json"]).get("model_type") if "config.json" in files else None
        siblings = [
            {"rfilename": name, "size": len(x), "blobId": git_digest(x)}
            | ({"lfs": {"size": len(x), "sha256": self.stored(x), "pointerSize": 130}} if is_large(name, x) else {})
            for name, x in files.items()
        ]
        about = {
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "tags": [f"license:{repo.licence}"],
        }
        return about | {"id": id, "sha": commit, "siblings": siblings, "config": {"model_type": kind} if kind else {}}

    def tree(self, id: str, revision: str):
        _, files = self.files(self.repo(id), revision)
        return [{"type": "file", "path": name, "size": len(x), "oid": git_digest(x)} for name, x in files.items()]

    def resolve(self, id: str, revision: str, name: str):
        repo = self.repo(id)
        self.auth_check(id)
        commit, files = self.files(repo, revision)
        if name not in files:
            raise _Refused(404, "EntryNotFound", f"{name} does not exist")
        content, headers = files[name], {"X-Repo-Commit": commit}
        if is_large(name, content):
            digest, other_host = self.stored(content), self.hub.url.replace("127.0.0.1", "localhost")
            headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content)), "status": 302}
            return b"", headers | {"ETag": f'"{digest}"', "Location": f"{other_host}/blobs/{digest}"}
        return content, headers | {"ETag": f'"{git_digest(content)}"'}

    def stored(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        self.hub.blobs[digest] = content
        return digest

    def blob(self, digest: str, content: bytes | None = None):
        if content is not None:
            self.hub.blobs[digest] = content
        return self.hub.blobs[digest], {}

    def preupload(self, id: str, revision: str, content: bytes):
        self.files(self.repo(id, writing=True), revision)
        files = json.loads(content)["files"]
        return {
            "files": [
                {"path": x["path"], "shouldIgnore": False, "uploadMode": "lfs" if large else "regular"}
                for x in files
                for large in [x["path"].endswith(".safetensors") and x["size"] > LARGE]
            ]
        }

    def batch(self, id: str, content: bytes):
        self.repo(id, writing=True)
        return {
            "transfer": "basic",
            "objects": [
                x | {"actions": {"upload": {"href": f"{self.hub.url}/blobs/{x['oid']}"}}}
                for x in json.loads(content)["objects"]
            ],
        }

    def commit(self, id: str, revision: str, content: bytes):
        repo, added = self.repo(id, writing=True), {}
        for line in map(json.loads, content.splitlines()):
            if line["key"] == "file":
                added[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                added[line["value"]["path"]] = self.hub.blobs[line["value"]["oid"]]
        commit = self.hub.commit(id, self.files(repo, revision)[1] | added, revision)
        return {"commitUrl": f"{self.hub.url}/{id}/commit/{commit}", "commitOid": commit, "success": True}
