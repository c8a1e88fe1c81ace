"""A separate process that serves folders of a directory on loopback, as Google Cloud Storage serves buckets.

    with range_server(tmp_path, latency_ms=50, bandwidth_mb=200) as server:  # serves gs://NAME of tmp_path / NAME
        os.environ |= server.environment  # gcsfs and tensorstore find it by these
        server.set(fault="503", every=7, of="read")
        server.counts()["requests"]

It speaks the part of the JSON API that gcsfs and tensorstore use: metadata, lists, media with ranges (by sendfile),
uploads in one request or resumable, copies, deletes, and `ifGenerationMatch` on all of them. It simulates latency and
bandwidth, so throughput can be measured without a network. `cpu_seconds` among its counts is the server's own CPU time.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

_CHUNK = 2**18  # bytes between checks of the bandwidth
_BURST = 0.005  # seconds of bandwidth that an idle server may save up


@dataclasses.dataclass
class Options:
    latency_ms: float = 0.0  # from a request to the first byte of its response
    bandwidth_mb: float = 0.0  # MB/s for all responses together; 0: no limit
    fault: str = ""  # a status (429, 503 …), or "cut": half the body and the end of the connection; empty: none
    every: int = 1  # the fault hits every n-th request
    of: str = "any"  # "read" (of content), "write" (uploads, copies and deletes) or "any"


class RangeServer:
    """The client's side of a running server."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self._process, self.url = process, url
        self.environment = {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}

    def set(self, **options: Any) -> None:
        """Changes fields of `Options`."""
        request = urllib.request.Request(f"{self.url}/options", json.dumps(options).encode(), method="POST")
        urllib.request.urlopen(request).close()

    def counts(self) -> dict[str, float]:
        """Counts since the start: requests (all, and by kind: `read`, `write`, `look`), bytes_read, bytes_written,
        faults, most_at_once (requests) and cpu_seconds."""
        with urllib.request.urlopen(f"{self.url}/counts") as response:
            return json.load(response)


@contextlib.contextmanager
def range_server(root: str | os.PathLike[str], **options: Any) -> Iterator[RangeServer]:
    """Serve the folders of `root` as buckets until the block ends. `options` are the fields of `Options`."""
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    process = subprocess.Popen([sys.executable, __file__, root, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        url = process.stdout.readline().strip()
        assert url, "the server has not started"
        yield RangeServer(process, url)
    finally:
        process.terminate()
        process.wait()
        process.stdout and process.stdout.close()


class _Error(Exception):
    def __init__(self, status: int, message: str = "", **headers: str) -> None:
        super().__init__(status)
        self.reply = {"error": {"code": status, "message": message or f"status {status}"}}
        self.status, self.headers = status, headers


class _Bucket:
    """The API's requests on a directory. Nothing here waits, so each request is atomic."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._uploads: dict[str, tuple[str, str, dict[str, str], bytearray]] = {}

    def path(self, bucket: str, name: str = "") -> Path:
        folder = self.root / bucket
        if not folder.is_dir():
            raise _Error(404, "The specified bucket does not exist.")
        return folder / name

    def look(self, bucket: str, name: str, query: dict[str, str]) -> tuple[Path, dict[str, Any]]:
        """An object's file and its metadata. Raises _Error if it is missing or a precondition fails."""
        path = self.path(bucket, name)
        generation = path.stat().st_mtime_ns if path.is_file() else 0
        if (wanted := query.get("ifGenerationMatch")) is not None and int(wanted) != generation:
            raise _Error(412, "At least one of the pre-conditions you specified did not hold.")
        if not generation or query.get("generation", str(generation)) != str(generation):
            raise _Error(404, f"No such object: {bucket}/{name}")
        if query.get("ifGenerationNotMatch") == str(generation):
            raise _Error(304)
        return path, self._metadata(bucket, name, path)

    def list(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        folder, prefix, delimiter = self.path(bucket), query.get("prefix", ""), query.get("delimiter", "")
        items, prefixes = [], set()
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if not path.is_file() or not name.startswith(prefix) or path.name.startswith(".upload-"):
                continue
            head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            if found:
                prefixes.add(f"{prefix}{head}{delimiter}")
            elif query.get("startOffset", "") <= name:
                items.append(self._metadata(bucket, name, path))
        first = int(query.get("pageToken", 0))
        end = first + int(query.get("maxResults", 1000))
        page = {"kind": "storage#objects", "items": items[first:end], "prefixes": sorted(prefixes)}
        return page | ({"nextPageToken": str(end)} if end < len(items) else {})

    def write(self, bucket: str, name: str, content: bytes, query: dict[str, str]) -> dict[str, Any]:
        path = self.path(bucket, name)
        before = path.stat().st_mtime_ns if path.is_file() else 0
        if (wanted := query.get("ifGenerationMatch")) is not None and int(wanted) != before:
            raise _Error(412, "At least one of the pre-conditions you specified did not hold.")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".upload-{secrets.token_hex(4)}")
        part.write_bytes(content)
        now = max(time.time_ns(), before + 1)
        os.utime(part, ns=(now, now))
        part.replace(path)
        return self._metadata(bucket, name, path)

    def upload(self, bucket: str, query: dict[str, str], headers: dict[str, str], body: bytes) -> dict[str, Any]:
        """Handle all kinds of uploads; the start of a resumable one returns {"Location": …}."""
        if "upload_id" in query:
            return self._resume(query["upload_id"], headers, body)
        kind = query.get("uploadType", "media")
        if kind == "multipart":
            boundary = b"--" + headers["content-type"].partition("boundary=")[2].strip('"').encode()
            _, about, content = body.split(boundary, 2)
            about = about.replace(b"\r\n", b"\n").partition(b"\n\n")[2]
            for separator in (b"\r\n\r\n", b"\n\n"):
                if separator in content[:512]:
                    content = content.partition(separator)[2]
                    break
            end = content.rindex(boundary + b"--")
            content = content[:end].removesuffix(b"\n").removesuffix(b"\r")
            return self.write(bucket, json.loads(about)["name"], content, query)
        if kind == "resumable":
            name = query.get("name") or json.loads(body)["name"]
            token = secrets.token_hex(8)
            self._uploads[token] = (bucket, name, query, bytearray())
            target = f"upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={token}"
            return {"Location": f"http://{headers['host']}/{target}"}
        return self.write(bucket, query["name"], body, query)

    def _resume(self, token: str, headers: dict[str, str], body: bytes) -> dict[str, Any]:
        if token not in self._uploads:
            raise _Error(404, "No such upload")
        bucket, name, query, content = self._uploads[token]
        content += body
        if headers.get("content-range", f"/{len(content)}").rpartition("/")[2] != str(len(content)):
            raise _Error(308, Range=f"bytes=0-{len(content) - 1}")  # more is to come
        del self._uploads[token]
        return self.write(bucket, name, bytes(content), query)

    @staticmethod
    def _metadata(bucket: str, name: str, path: Path) -> dict[str, Any]:
        status = path.stat()
        when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(status.st_mtime))
        return {
            **{"kind": "storage#object", "id": f"{bucket}/{name}/{status.st_mtime_ns}", "name": name},
            **{"bucket": bucket, "size": str(status.st_size), "generation": str(status.st_mtime_ns)},
            **{"metageneration": "1", "timeCreated": when, "updated": when, "storageClass": "STANDARD"},
        }


class _Server:
    def __init__(self, root: Path, options: Options) -> None:
        self.bucket, self.options = _Bucket(root), options
        self.counts: Counter[str] = Counter()
        self._running, self._free, self._faults = 0, 0.0, 0

    async def serve(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        listener.setblocking(False)
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        loop, tasks = asyncio.get_running_loop(), set()
        while True:
            connection, _ = await loop.sock_accept(listener)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            tasks.add(task := loop.create_task(self._connection(connection)))
            task.add_done_callback(tasks.discard)

    async def _connection(self, connection: socket.socket) -> None:
        loop, received = asyncio.get_running_loop(), b""
        with connection, contextlib.suppress(ConnectionError):
            while True:
                while b"\r\n\r\n" not in received:
                    if not (more := await loop.sock_recv(connection, 2**16)):
                        return
                    received += more
                head, _, received = received.partition(b"\r\n\r\n")
                request, *lines = head.decode().split("\r\n")
                method, target, _ = request.split(" ")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
                body = bytearray(received)
                if "expect" in headers:
                    await loop.sock_sendall(connection, b"HTTP/1.1 100 Continue\r\n\r\n")
                while len(body) < (length := int(headers.get("content-length", 0))):
                    if not (more := await loop.sock_recv(connection, 2**20)):
                        return
                    body += more
                received = bytes(body[length:])
                self._running += 1
                self.counts["most_at_once"] = max(self.counts["most_at_once"], self._running)
                try:
                    if not await self._answer(connection, method, target, headers, bytes(body[:length])):
                        return
                finally:
                    self._running -= 1

    async def _answer(
        self, connection: socket.socket, method: str, target: str, headers: dict[str, str], body: bytes
    ) -> bool:
        """Whether the connection stays open."""
        parts = urlsplit(target)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        if parts.path in ("/counts", "/options"):
            self.options = dataclasses.replace(self.options, **json.loads(body or b"{}"))
            return await self._send(connection, 200, self.counts | {"cpu_seconds": time.process_time()})
        reading = method == "GET" and query.get("alt") == "media"
        kind = "read" if reading else "look" if method == "GET" else "write"
        self.counts.update(("requests", kind))
        self.counts["bytes_written"] += len(body)
        fault = self._next_fault(kind)
        if self.options.latency_ms:
            await asyncio.sleep(self.options.latency_ms / 1e3)
        try:
            if fault.isdigit():
                raise _Error(int(fault), "an injected fault")
            names = [unquote(name) for name in parts.path.split("/")]
            if reading:
                path, about = self.bucket.look(names[names.index("b") + 1], names[-1], query)
                return await self._send_file(connection, path, about["generation"], headers.get("range", ""), fault)
            status, reply = self._do(method, names[names.index("b") :], query, headers, body)
        except (_Error, FileNotFoundError) as error:
            error = error if isinstance(error, _Error) else _Error(404)
            return await self._send(connection, error.status, error.reply, **error.headers)
        headers = {"Location": reply["Location"]} if "Location" in reply else {}
        return await self._send(connection, status, reply, cut=fault == "cut", **headers)

    def _next_fault(self, kind: str) -> str:
        options = self.options
        if not options.fault or options.of not in ("any", kind):
            return ""
        self._faults += 1
        if self._faults % options.every:
            return ""
        self.counts["faults"] += 1
        return options.fault

    def _do(
        self, method: str, names: list[str], query: dict[str, str], headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, Any]]:
        """Status and body for a request that does not transfer content. `names`: b, bucket[, o[, object …]]."""
        match method, names:
            case "GET", ["b", bucket]:
                return 200, {"kind": "storage#bucket", "name": bucket, "id": self.bucket.path(bucket).name}
            case "GET", ["b", bucket, "o"]:
                return 200, self.bucket.list(bucket, query)
            case "GET", ["b", bucket, "o", name]:
                return 200, self.bucket.look(bucket, name, query)[1]
            case (("POST" | "PUT"), ["b", bucket, "o"]):
                return 200, self.bucket.upload(bucket, query, headers, body)
            case "POST", ["b", bucket, "o", name, "rewriteTo", "b", to, "o", copy]:
                content = self.bucket.look(bucket, name, {})[0].read_bytes()
                return 200, {"done": True, "resource": self.bucket.write(to, copy, content, query)}
            case "POST", ["b", bucket, "o", name, "moveTo", "o", new]:
                path, _ = self.bucket.look(bucket, name, {})
                moved = self.bucket.write(bucket, new, path.read_bytes(), query)
                path.unlink()
                return 200, moved
            case "DELETE", ["b", bucket, "o", name]:
                self.bucket.look(bucket, name, query)[0].unlink()
                return 204, {}
        raise _Error(501, f"{method} {'/'.join(names)} is not served")

    async def _send(
        self, connection: socket.socket, status: int, reply: dict[str, Any], cut: bool = False, **headers: str
    ) -> bool:
        body = b"" if status in (204, 304, 308) else json.dumps(reply).encode()
        head = _head(status, len(body), "application/json", **headers)
        await asyncio.get_running_loop().sock_sendall(connection, head + body[: len(body) // 2 if cut else len(body)])
        return not cut

    async def _send_file(self, connection: socket.socket, path: Path, generation: str, wanted: str, fault: str) -> bool:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            first, end = _range(wanted, size)
            place = {"Content-Range": f"bytes {first}-{end - 1}/{size}"} if wanted else {}
            head = _head(206 if wanted else 200, end - first, "application/octet-stream", **place)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(connection, head[:-2] + f"x-goog-generation: {generation}\r\n\r\n".encode())
            stop = (first + end) // 2 if fault == "cut" else end
            while first < stop:
                count = min(_CHUNK, stop - first)
                if self.options.bandwidth_mb:
                    now = time.monotonic()
                    self._free = max(self._free, now - _BURST) + count / (1e6 * self.options.bandwidth_mb)
                    if self._free > now:
                        await asyncio.sleep(self._free - now)
                first += await loop.sock_sendfile(connection, file, first, count)
                self.counts["bytes_read"] += count
        return fault != "cut"


def _head(status: int, length: int, content_type: str, **more: str) -> bytes:
    headers = {"Content-Length": length, "Content-Type": content_type} | more
    lines = [f"HTTP/1.1 {status} {status}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode()


def _range(text: str, size: int) -> tuple[int, int]:
    """First byte and end of `bytes=1-5`, `bytes=1-` or `bytes=-5`; of everything where that is empty."""
    if not text:
        return 0, size
    first, _, last = text.removeprefix("bytes=").partition("-")
    if not first:
        return max(0, size - int(last)), size
    if int(first) >= size:
        raise _Error(416, "The requested range cannot be satisfied.")
    return int(first), min(size, int(last) + 1) if last else size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="of the buckets, each a folder")
    for field in dataclasses.fields(Options):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    values = vars(parser.parse_args())
    asyncio.run(_Server(values.pop("root"), Options(**values)).serve())


if __name__ == "__main__":
    main()
