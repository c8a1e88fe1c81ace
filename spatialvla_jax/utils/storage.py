"""Paths given by users, local or URLs of buckets, and access to files and objects.

A local path is a `pathlib.Path`. A URL (gs://, s3://) is an `etils.epath.Path`, the class that Orbax and TFDS use too.
Both go through fsspec, with gcsfs and s3fs; `storage_gcs` and `storage_s3` add the retry policy of `retries`.
"""

import concurrent.futures
import contextlib
import hashlib
import importlib.util
import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
from etils import epath
from etils.epath import gpath

from spatialvla_jax.errors import InputError, StorageError
from spatialvla_jax.utils.progress import progress_bar

# etils prefers TensorFlow's file system if TensorFlow is installed, but it supports neither emulators nor s3://. etils
# caches the check, which another library may already have triggered.
os.environ["EPATH_USE_TF"] = "0"
gpath._is_tf_installed.cache_clear()

AnyPath = Path | epath.Path

CONCURRENT = 64  # concurrent requests
PART = 16 * 2**20  # bytes per request in `download` and `read_parts`
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")
_LIBRARIES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # (library, our extra) for each scheme
_CREDENTIALS = {
    "gs": "`gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS with a key file",
    "s3": "`aws configure`, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}
_PERMISSIONS = {
    "gs": {"read": "storage.objects.get", "listed": "storage.objects.list", "written": "storage.objects.create"},
    "s3": {"read": "s3:GetObject", "listed": "s3:ListBucket", "written": "s3:PutObject"},
}

for _scheme, _class in {"gs": "gcs.GoogleStorage", "gcs": "gcs.GoogleStorage", "s3": "s3.S3Storage"}.items():
    fsspec.register_implementation(_scheme, f"{__package__}.storage_{_class}", clobber=True)  # imported when used


def as_path(path: str | os.PathLike[str], what: str) -> AnyPath:
    """The path given by a user: a local one with ~ expanded, or a bucket's URL.

    `what` names the argument or key in the InputError for an unsupported URL or a ~ of an unknown user."""
    text = os.fspath(path)
    if not (url := _URL.match(text)):
        try:
            return Path(text).expanduser()
        except RuntimeError as error:
            raise InputError(f"{what} {text} cannot be expanded: {error}") from error
    scheme, rest = url[1].lower(), text[url.end() :]  # pathlib makes gs:/bucket of gs://bucket
    if scheme not in _LIBRARIES:
        known = " or ".join(f"{name}://BUCKET/…" for name in _LIBRARIES)
        raise InputError(f"{what} {scheme}://{rest} is not a supported path: expected a local one, or {known}")
    if not rest.strip("/"):
        raise InputError(f"{what} {scheme}:// names no bucket: expected {scheme}://BUCKET/…")
    library, extra = _LIBRARIES[scheme]
    if importlib.util.find_spec(library) is None:
        raise InputError(f"{what} {scheme}://{rest} needs {library}: `pip install 'spatialvla-jax[{extra}]'`")
    return epath.Path(f"{scheme}://{rest}")


def is_url(path: str | os.PathLike[str]) -> bool:
    return bool(_URL.match(os.fspath(path)))


def to_path(path: str | os.PathLike[str]) -> AnyPath:
    """Convert text to a path, without the checks of `as_path`."""
    return epath.Path(path) if is_url(path) else Path(path)


def absolute(path: AnyPath) -> AnyPath:
    return path.absolute() if isinstance(path, Path) else path


def resolved(path: AnyPath) -> AnyPath:
    return path.resolve() if isinstance(path, Path) else path


def exists(path: AnyPath) -> bool:
    return _type_of(path) != ""


def is_dir(path: AnyPath) -> bool:
    return _type_of(path) == "directory"


def is_file(path: AnyPath) -> bool:
    """Whether it is a regular file: False for a pipe, where opening would block."""
    return os.path.isfile(path) if isinstance(path, Path) else _type_of(path) == "file"


def occupied(path: AnyPath) -> bool:
    """Whether anything exists at a path, even a broken link."""
    return exists(path) if is_url(path) else os.path.lexists(path)


def list_files(folder: AnyPath) -> dict[str, tuple[int, int | str]]:
    """The files in a folder, {name: (bytes, version)}. The version changes with the content: a modification time in
    nanoseconds, or an object's generation or ETag. Raises InputError if the folder does not exist."""
    if not is_url(folder):
        try:
            with os.scandir(folder) as entries:
                stats = {entry.name: entry.stat() for entry in entries if entry.is_file()}
        except OSError as error:
            raise InputError(f"{folder} cannot be listed: {error.strerror or error}") from error
        return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
    with storage_errors(folder, "listed"):
        found = filesystem(folder).ls(str(folder), detail=True)
    entries = [entry for entry in found if entry["type"] == "file"]
    return {_name(entry): (entry["size"], _version(entry)) for entry in entries if _name(entry)}


def list_names(folder: AnyPath) -> list[str]:
    """The sorted names of files and folders in a folder; empty if it does not exist."""
    if not is_url(folder):
        return sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    with storage_errors(folder, "listed"):
        try:  # one request: another process may remove the last file between two
            entries = filesystem(folder).ls(str(folder), detail=True)
        except FileNotFoundError:
            if missing := missing_bucket(folder):
                raise InputError(missing) from None
            return []
    own = str(folder).partition("://")[2].rstrip("/")  # of a file, the listing is the file
    return sorted({_name(entry) for entry in entries if entry["name"].rstrip("/") != own} - {""})


def list_tree(folder: AnyPath) -> dict[str, int]:
    """{name: bytes} of all files in a folder and its subfolders, such as "a/b.txt"; empty if it does not exist."""
    if not isinstance(folder, epath.Path):
        return {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    with storage_errors(folder, "listed"):
        found = filesystem(folder).find(str(folder), detail=True)
    start = len(str(folder).partition("://")[2]) + 1
    return {name[start:]: entry["size"] for name, entry in found.items() if not name.endswith("/")}


def size_and_version(path: AnyPath) -> tuple[int, int | str]:
    """Size and version of a file, as in `list_files`."""
    if not is_url(path):
        stat = os.stat(path)
        return stat.st_size, stat.st_mtime_ns
    with storage_errors(path):
        return filesystem(path).size_and_version(str(path))


def read_bytes(path: AnyPath) -> bytes:
    """Read a whole file. Raises OSError for a local one."""
    if not is_url(path):
        return Path(path).read_bytes()
    with storage_errors(path):
        return filesystem(path).cat_file(str(path))


def read_text(path: AnyPath) -> str:
    return read_bytes(path).decode("utf-8")


def read_ranges(ranges: Sequence[tuple[str | os.PathLike[str], int, int]]) -> list[bytes | Exception]:
    """The bytes of each (path, offset, length), or why they could not be read: OSError for a local file, InputError or
    StorageError with a one-sentence message for an object, EOFError if a file is too short."""
    found: list[Any] = [None] * len(ranges)
    groups: dict[str, list[int]] = {}
    for number, (path, _, _) in enumerate(ranges):
        url = _URL.match(os.fspath(path))
        groups.setdefault(url[1] if url else "", []).append(number)
    for scheme, numbers in groups.items():
        paths, offsets, lengths = zip(*(ranges[n] for n in numbers), strict=True)
        if not scheme:
            parts = [_pread(*ranges[n]) for n in numbers]
        else:
            ends = [offset + length for offset, length in zip(offsets, lengths, strict=True)]
            urls = [os.fspath(path) for path in paths]
            with storage_errors(urls[0]):
                fs = filesystem(urls[0])
            parts = fs.cat_ranges(urls, list(offsets), ends, batch_size=CONCURRENT, on_error="return")
        for number, part in zip(numbers, parts, strict=True):
            path, offset, length = ranges[number]
            ended = EOFError(f"{os.fspath(path)} ends before byte {offset + length}")
            if isinstance(part, Exception):
                part = ended if scheme and status_of(part, path)[0] == 416 else explain(part, path)
            found[number] = part if isinstance(part, Exception) or len(part) == length else ended
    return found


def read_range(path: str | os.PathLike[str], offset: int, length: int) -> bytes:
    """One range of `read_ranges`; raises what that returns as an error."""
    (found,) = read_ranges([(path, offset, length)])
    if isinstance(found, Exception):
        raise found
    return found


def _pread(path: str | os.PathLike[str], offset: int, length: int) -> bytes | OSError:
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)
    except OSError as error:
        return error


def read_parts(path: AnyPath, size: int) -> Iterator[bytes]:
    """Read a file of `size` bytes from start to end, in requests of `PART` bytes, two of them in flight."""
    ahead = 2
    with concurrent.futures.ThreadPoolExecutor(ahead) as pool:
        starts = range(0, size, PART)
        waiting = [pool.submit(read_range, path, start, min(PART, size - start)) for start in starts[:ahead]]
        for number in range(len(starts)):
            yield waiting.pop(0).result()
            if number + ahead < len(starts):
                start = starts[number + ahead]
                waiting.append(pool.submit(read_range, path, start, min(PART, size - start)))


class _Parts(io.RawIOBase):
    def __init__(self, parts: Iterator[bytes]):
        self._parts, self._left = parts, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._left = self._left or memoryview(next(self._parts, b""))
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count

    def close(self) -> None:
        self._parts.close()  # type: ignore  # a generator
        super().close()


def open_stream(path: AnyPath) -> tuple[io.BufferedReader, int]:
    """A file opened for reading from its start, and its size. Objects are not seekable. Raises OSError for a local
    file."""
    size, _ = size_and_version(path)
    return io.BufferedReader(_Parts(read_parts(path, size))) if is_url(path) else open(path, "rb"), size


def download(path: AnyPath, target: str | os.PathLike[str], progress: Callable[[int, int], None] | None = None) -> None:
    """Copy an object to the local file `target`, reading parts concurrently."""
    size, _ = size_and_version(path)
    batch = max(1, CONCURRENT // 8)
    with open(target, "wb") as file:
        for start in range(0, size, batch * PART):
            starts = range(start, min(start + batch * PART, size), PART)
            for part in read_ranges([(path, one, min(PART, size - one)) for one in starts]):
                if isinstance(part, Exception):
                    raise part
                file.write(part)
                if progress:
                    progress(file.tell(), size)


@contextlib.contextmanager
def local_copy(folder: AnyPath) -> Iterator[Path]:
    """A local folder: the folder itself, or a temporary copy of a URL's content while the caller needs it."""
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        for name in list_tree(folder):
            target = Path(temporary, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            download(folder / name, target)
        yield Path(temporary)


def cached_copy(path: AnyPath, folder: Path) -> Path:
    """A local file with an object's content, for memory-mapping. It is kept in `folder` and made again when the object
    changes. Prints its size before the download. Raises InputError if the disk has no room for it."""
    if isinstance(path, Path):
        return path
    size, version = size_and_version(path)
    prefix = f"{hashlib.sha256(str(path).encode()).hexdigest()[:16]}-"
    target = folder / f"{prefix}{re.sub('[^0-9A-Za-z]', '', str(version))}-{path.name}"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(folder).free) < size:
            raise InputError(f"{path} has {size:,} bytes, and the disk of {folder} has only {free:,} left")
        part = target.with_name(f".tmp-{os.getpid()}-{target.name}")
        try:
            with progress_bar(f"{path} ({size / 1e9:.2f} GB) to {folder}", "B") as progress:
                download(path, part, progress)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be copied to {folder}: {error.strerror or error}") from error
    for old in folder.glob(f"{prefix}*"):  # copies of earlier versions
        if old != target:
            old.unlink(missing_ok=True)
    return target


def put(path: AnyPath, data: bytes) -> None:
    """Write an object in one request, or fail and leave the old one."""
    with storage_errors(path, "written"):
        filesystem(path).pipe_file(str(path), data)


def upload(source: str | os.PathLike[str], path: AnyPath) -> None:
    """Write a local file as an object, which appears whole."""
    with storage_errors(path, "written"):
        filesystem(path).put_file(os.fspath(source), str(path))


def upload_folder(source: Path, path: AnyPath, marker: str) -> None:
    """Upload a local folder's files below `path`, its file `marker` last: readers ignore a folder without it. Replacing
    a folder removes its marker first, and files that the new one lacks before the new marker is written."""
    files = [file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file()]
    assert marker in files, f"{source} has no {marker}"
    old = []
    if exists(path / marker):
        remove(path / marker)
        with storage_errors(path, "listed"):
            old = [name.removeprefix(str(path).partition("://")[2] + "/") for name in filesystem(path).find(str(path))]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: upload(source / name, path / name), [name for name in files if name != marker]))
    for name in set(old) - set(files):
        remove(path / name)
    upload(source / marker, path / marker)


def move_folder(folder: AnyPath, new: AnyPath) -> None:
    """Move a bucket's objects from one folder to another. The bucket copies all of them itself before any is removed,
    and every request may be repeated."""
    with storage_errors(folder, "written"), concurrent.futures.ThreadPoolExecutor(8) as pool:
        fs, start = filesystem(folder), str(folder).partition("://")[2]
        names = [name.removeprefix(start) for name in fs.find(str(folder))]
        list(pool.map(lambda name: fs.cp_file(f"{folder}{name}", f"{new}{name}"), names))
        list(pool.map(lambda name: remove(to_path(f"{folder}{name}")), names))


def check_writable(path: AnyPath) -> None:
    """Raises InputError or StorageError if objects cannot be written at this URL. Starts and aborts an upload, which
    leaves nothing behind and needs no other permission."""
    with storage_errors(path, "written"):
        filesystem(path).probe_write(str(path))


def remove(path: AnyPath) -> None:
    """Remove a file or an object if it exists."""
    if isinstance(path, Path):
        path.unlink(missing_ok=True)
        return
    with storage_errors(path, "written"), contextlib.suppress(FileNotFoundError):
        filesystem(path).rm_file(str(path))


@contextlib.contextmanager
def storage_errors(path: str | os.PathLike[str], done: str = "read") -> Iterator[None]:
    """Convert errors concerning a URL in this block to InputError or StorageError with a one-sentence message. `done`
    is the attempted operation: read, listed or written. Errors of local paths pass unchanged."""
    try:
        yield
    except Exception as error:
        if (explained := explain(error, path, done)) is error:
            raise
        raise explained from error


def explain(error: Exception, path: str | os.PathLike[str], done: str = "read") -> Exception:
    """An error of a bucket's library as an error for the user; StorageError if users cannot fix it."""
    if isinstance(error, InputError | StorageError) or not is_url(path):
        return error
    url = os.fspath(path)
    scheme = url.partition(":")[0]
    status, reason = status_of(error, url)
    reason = " ".join(reason.split())[:300]
    said = f" ({reason})" if reason else ""
    if isinstance(error, FileNotFoundError) or status == 404:
        return InputError(missing_bucket(url) or f"{url} does not exist")
    if status == 401:
        return InputError(f"{url} cannot be {done}: there are no valid credentials{said}; use {_CREDENTIALS[scheme]}")
    if status == 507 or re.search("quota|storage ?full|InsufficientStorage", reason, re.IGNORECASE):
        return StorageError(f"{url} cannot be {done}: the bucket is full or a quota is used up{said}")
    if status == 405 or re.search("read-?only|retention", reason, re.IGNORECASE):
        return InputError(f"{url} cannot be {done}: the bucket is read-only{said}")
    if status == 403:
        named = re.search(r"storage\.[a-z]+\.[a-z]+|s3:[A-Za-z]+", reason)  # removing needs another one
        permission = named[0] if named else _PERMISSIONS[scheme][done]
        return InputError(f"{url} cannot be {done}: the permission {permission} is missing{said}")
    kind = InputError if status == 400 else StorageError  # 400: an invalid name
    return kind(f"{url} cannot be {done}: {reason or type(error).__name__}")


def status_of(error: Exception, path: str | os.PathLike[str]) -> tuple[int, str]:
    """The HTTP status behind an error, 0 if there is none, and the server's message."""
    if code := re.search(r"\[http_response_code='(\d+)'\]", str(error)):  # from tensorstore
        body = re.search(r"\[http_response_body='(.*?)'\]", str(error))
        return int(code[1]), ", ".join(filter(None, (body and body[1].replace("\\", ""), code[1])))
    return fsspec.get_filesystem_class(os.fspath(path).partition(":")[0]).status_of(error)


def missing_bucket(path: str | os.PathLike[str]) -> str:
    """An error message if the URL's bucket does not exist, else ""."""
    url = os.fspath(path)
    bucket = url.split("/")[2]
    try:
        filesystem(url).probe(bucket)
    except FileNotFoundError:
        return f"{url}: there is no bucket {bucket!r}"
    except Exception:  # it exists, or another error occurred, which the caller will report
        pass
    return ""


def filesystem(path: str | os.PathLike[str]) -> Any:
    """The fsspec file system for a URL."""
    return fsspec.filesystem(os.fspath(path).partition(":")[0])


def _type_of(path: AnyPath) -> str:
    """ "file", "directory", or "" if nothing exists. Raises InputError for a missing bucket."""
    if not is_url(path):
        return "directory" if os.path.isdir(path) else "file" if os.path.exists(path) else ""
    with storage_errors(path):
        try:
            return filesystem(path).info(str(path))["type"]
        except FileNotFoundError:
            if missing := missing_bucket(path):
                raise InputError(missing) from None
            return ""


def _name(entry: dict[str, Any]) -> str:
    """The entry's name; "" for the placeholder object that some tools create for a folder."""
    return (
        "" if entry["name"].endswith("/") and entry["type"] == "file" else entry["name"].rstrip("/").rpartition("/")[2]
    )


def _version(entry: dict[str, Any]) -> str:
    return str(entry.get("generation") or entry["ETag"]).strip('"')
