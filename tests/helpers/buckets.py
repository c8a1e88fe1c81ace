"""Servers of the protocols of gs:// and s3:// on loopback, behind a proxy that injects faults."""

import http.client
import itertools
import json
import logging
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from etils import epath

_numbers = itertools.count()
# Length of the queue for new connections. Python's servers queue five; a sixth client retries after 1, 2, then 4 s.
MANY = 1024


@dataclass
class Fault:
    """A fault for every `every`-th request whose "METHOD /path?query" matches `pattern`, at most `count` times."""

    status: int = 0  # of the response that replaces the server's; 0: none
    body: str = ""
    lost: bool = False  # let the server do it first, as if its response were lost; needs `status`
    cut: bool = False  # drop the second half of the response
    delay: float = 0.0  # seconds before the response
    pattern: str = ""
    count: int | None = None
    every: int = 1
    seen: int = 0

    def applies(self, request: str) -> bool:
        if not re.search(self.pattern, request):
            return False
        self.seen += 1
        return self.seen % self.every == 0 and (self.count is None or self.seen <= self.count * self.every)


@dataclass
class Request:
    line: str  # "METHOD /path?query"
    status: int
    size: int  # bytes of the response's body


@dataclass
class Proxy:
    """Forwards to a server at `port`. `faults` may change at any time; `requests` lists the answered requests."""

    port: int
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    conditional: bool = False  # add what the server lacks: ifGenerationMatch, and x-goog-generation on reads
    lock: threading.Lock = field(default_factory=threading.Lock)
    writes: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        handler = type("Handler", (_Handler,), {"proxy": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.socket.listen(MANY)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def add(self, **fault) -> Fault:
        self.faults.append(Fault(**fault))
        return self.faults[-1]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise a body waits until its header is acknowledged

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def log_message(self, format: str, *args) -> None:
        pass

    def do_GET(self) -> None:
        proxy, line = self.proxy, f"{self.command} {self.path}"
        body = self._body()
        with proxy.lock:
            faults = [fault for fault in proxy.faults if fault.applies(line)]
        for fault in faults:
            time.sleep(fault.delay)
        refused = next((fault for fault in faults if fault.status), None)
        if refused and not refused.lost:
            status, headers, body = refused.status, [], refused.body.encode()
        elif proxy.conditional and (expected := re.search(r"ifGenerationMatch=(\d+)", self.path)):
            with proxy.writes:
                fits = expected[1] == self._generation(body)
                status, headers, body = self._forward(body) if fits else (412, [], b"{}")
        else:
            generation = self._generation(body) if proxy.conditional and "alt=media" in self.path else ""
            status, headers, body = self._forward(body)
            headers += [("x-goog-generation", generation)] * bool(generation)
        if refused and refused.lost:
            status, headers, body = refused.status, [], refused.body.encode()
        proxy.requests.append(Request(line, status, len(body)))
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                self.send_header(name, value)
        length = next((value for name, value in headers if name.lower() == "content-length"), None)
        self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(body)))
        self.end_headers()
        if any(fault.cut for fault in faults):
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(body)

    do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = do_GET

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.port)
        try:
            headers = {
                k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "content-length")
            }
            connection.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _generation(self, body: bytes) -> str:
        """The generation of the object that the request reads, writes or removes; "0" if it does not exist."""
        url = urlsplit(self.path)
        bucket, _, name = url.path.split("/b/")[1].partition("/o")
        name = name.removeprefix("/") or parse_qs(url.query).get("name", [None])[0]
        if name is None:  # a multipart upload begins with the object's description
            name = json.loads(re.search(rb"\{.*?\}", body, re.DOTALL)[0])["name"]
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.port)
        try:
            connection.request("GET", f"/storage/v1/b/{bucket}/o/{urllib.request.quote(unquote(name), safe='')}")
            answer = connection.getresponse()
            return json.loads(answer.read())["generation"] if answer.status == 200 else "0"
        finally:
            connection.close()


@dataclass
class Bucket:
    url: str  # gs://NAME or s3://NAME
    proxy: Proxy

    @classmethod
    def fresh(cls, scheme: str, proxy: Proxy) -> "Iterator[Bucket]":
        """A new bucket; faults are cleared before and after."""
        import fsspec
        from etils.epath import backend

        from spatialvla_jax.utils import storage

        proxy.faults.clear()
        for name in ("gs", "s3"):  # they may hold another server's address or credentials
            fsspec.get_filesystem_class(name).clear_instance_cache()
        backend.fsspec_backend._get_filesystem.cache_clear()
        name = f"bucket-{next(_numbers)}"
        storage.filesystem(f"{scheme}://{name}").mkdir(name)
        proxy.requests.clear()
        yield cls(f"{scheme}://{name}", proxy)
        proxy.faults.clear()

    def upload(self, folder: Path, name: str) -> str:
        """Copy a local folder's files; returns the folder's URL."""
        from spatialvla_jax.utils import storage

        for file in sorted(folder.rglob("*")):
            if file.is_file():
                storage.put(epath.Path(f"{self.url}/{name}/{file.relative_to(folder)}"), file.read_bytes())
        return f"{self.url}/{name}"


def start_gcs() -> tuple[Proxy, Callable[[], None]]:
    """Start an emulator of Google Cloud Storage; returns its proxy and a function that stops both."""
    from gcp_storage_emulator.server import create_server

    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)  # it logs every missing object
    server = create_server("127.0.0.1", 0, in_memory=True)
    server.start()
    while server._api._httpd is None:
        time.sleep(0.001)
    server._api._httpd.socket.listen(MANY)
    proxy = Proxy(server._api._httpd.server_address[1], conditional=True)

    def stop() -> None:
        proxy.close()
        server.stop()

    return proxy, stop


def start_s3() -> tuple[Proxy, Callable[[], None]]:
    """Start moto's S3 server; returns its proxy and a function that stops both."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    proxy = Proxy(server.get_host_and_port()[1])

    def stop() -> None:
        proxy.close()
        server.stop()

    return proxy, stop
