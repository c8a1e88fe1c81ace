"""gs:// URLs: gcsfs with the retry policy of `retries`."""

import asyncio
import contextlib
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import google.auth.exceptions
from aiohttp import ClientTimeout
from fsspec.asyn import sync
from gcsfs.core import GCSFileSystem, initiate_upload
from gcsfs.retry import is_retriable

from spatialvla_jax.utils.retries import count, retrying

ONE_REQUEST = 5 * 2**20  # bytes; larger files are uploaded in parts


class GoogleStorage(GCSFileSystem):
    """Disables gcsfs's own retries, which give up after seconds and are not counted, and its cache of listings, which
    misses what other machines write."""

    def __init__(self, *args: Any, **kwargs: Any):
        timeout = ClientTimeout(total=None, sock_connect=10, sock_read=30)
        super().__init__(*args, **{"use_listings_cache": False, "requests_timeout": timeout} | kwargs)

    async def _request(self, method: str, path: str, *args: Any, **kwargs: Any) -> Any:
        async def once() -> Any:
            count(requests=1)
            found = await GCSFileSystem._request.__wrapped__(self, method, path, *args, **kwargs)  # type: ignore
            if found[0] == 308 and "Range" not in found[1]:  # gcsfs would take it for success
                raise ConnectionError("nothing of the upload has arrived")
            return found

        found = await retrying(once, transient, _url(self._format_path(path, args)))
        count(read=len(found[3]) if method == "GET" else 0)
        return found

    async def _pipe_file(self, path: str, data: Any, mode: str = "overwrite", **options: Any) -> None:
        """Send the data as the body of one request. gcsfs sends a multipart message. There, a server may mistake a
        trailing carriage return in the data for part of the separator. Empty data, which is no body, and other
        modes still use it."""
        if not data or mode != "overwrite":
            await super()._pipe_file(path, data, mode=mode, **options)
            return
        bucket, key, _generation = self.split_path(path)
        headers = {"Content-Type": "application/octet-stream"}
        upload = f"{self._location}/upload/storage/v1/b/{quote(bucket)}/o"
        await self._call("POST", upload, uploadType="media", name=key, headers=headers, data=data)

    async def _put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        if os.path.getsize(lpath) < ONE_REQUEST:
            await self._pipe_file(rpath, Path(lpath).read_bytes())
        else:
            await super()._put_file(lpath, rpath, **options)

    async def _delete_files(self, files: list[str], batchsize: int) -> list[Any]:
        """What no longer exists counts as removed: the response to a first request may have been lost."""
        found = await super()._delete_files(files, batchsize)
        return [None if isinstance(one, FileNotFoundError) or "No such object" in str(one) else one for one in found]

    def size_and_version(self, path: str) -> tuple[int, str]:
        bucket, key, _ = self.split_path(path)
        found: Any = self.call("GET", "b/{}/o/{}", bucket, key, json_out=True)
        return int(found["size"]), found["generation"]

    def probe(self, bucket: str) -> None:
        """Raises FileNotFoundError if the bucket does not exist."""
        self.call("GET", "b/{}/o", bucket, maxResults=1)

    def probe_write(self, path: str) -> None:
        bucket, key, _ = self.split_path(path)
        location = sync(self.loop, initiate_upload, self, bucket, key)
        with contextlib.suppress(Exception):  # an unfinished upload costs nothing and expires
            self.call("DELETE", location)

    @staticmethod
    def status_of(error: Exception) -> tuple[int, str]:
        """The HTTP status behind an error, 0 if there is none, and the server's message."""
        if code := getattr(error, "code", None):  # gcsfs's HttpError
            return int(code), str(error)
        if isinstance(error, google.auth.exceptions.GoogleAuthError):
            return 401, str(error)
        if str(error).startswith("Forbidden: "):
            return 403, str(error).partition("\n")[2]
        return 400 if str(error).startswith("Bad Request: ") else 0, str(error)


def _url(request: str) -> str:
    """The URL of the object, or at least the bucket, that a request concerns."""
    found = re.search(r"/b/([^/?]+)(?:/o/([^?]*))?", request)
    return unquote(f"gs://{found[1]}/{found[2] or ''}") if found else request


def transient(error: Exception) -> str:
    if isinstance(error, google.auth.exceptions.RefreshError) and not error.retryable:
        return ""
    if getattr(error, "code", None) == 501:  # not implemented
        return ""
    again = is_retriable(error) or "ateLimitExceeded" in str(error)
    again = again or isinstance(error, asyncio.TimeoutError | ConnectionError)
    return (str(error).lstrip(", ") or type(error).__name__) if again else ""
