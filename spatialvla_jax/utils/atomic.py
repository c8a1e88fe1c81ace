"""Write files and directories so that they appear whole or not at all."""

import io
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.storage import AnyPath, filesystem, is_url, list_names, put, to_path, upload, upload_folder

PREFIX = ".tmp-"
_unfinished: set[AnyPath] = set()  # paths that this process is writing


@contextmanager
def replacing(path: str | os.PathLike[str], marker: str = "") -> Iterator[Path]:
    """Yields a new path beside `path`, where the caller creates a file or directory. On success it replaces `path`;
    after an error it is removed. It keeps the suffix, from which some writers infer the format.

    For a URL, the new path is in the local folder for temporary files (TMPDIR) and is uploaded on success. A
    directory's file `marker` is uploaded last; readers treat a directory without it as missing.
    """
    if is_url(path):
        with _naming(tempfile.gettempdir()), _uploading(to_path(path), marker) as temporary:
            yield temporary
        return
    path = Path(path)
    name = path.name if len(os.fsencode(path.name)) < 200 else path.suffix  # most systems limit names to 255 bytes
    temporary = path.with_name(f"{PREFIX}{secrets.token_hex(4)}-{name}")
    _unfinished.add(temporary)
    try:
        with _naming(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        _remove(temporary)
        _unfinished.discard(temporary)


@contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name `path` in an OSError that names no file, as when the disk is full, or a temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno and PREFIX in str(error.filename2 or error.filename or PREFIX):
            error.filename, error.filename2 = os.fspath(path), None
        raise


class Appending(io.FileIO):
    """A file whose every `write` appends all of its data or, after an error of the disk, nothing. Unbuffered, so that
    closing it has nothing left to write that could fail."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "ab")

    def write(self, data: Any) -> int:
        before, left = os.fstat(self.fileno()).st_size, memoryview(data)
        try:
            with _naming(self.name):
                while left:
                    left = left[super().write(left) :]
        except OSError:
            os.ftruncate(self.fileno(), before)
            raise
        return len(data)


@contextmanager
def _uploading(path: AnyPath, marker: str) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    _unfinished.add(folder)
    try:
        yield (temporary := folder / path.name)
        if temporary.is_dir():
            upload_folder(temporary, path, marker)
        else:
            upload(temporary, path)
    finally:
        _remove(folder)
        _unfinished.discard(folder)


@contextmanager
def kept_after(path: str | os.PathLike[str], *errors: type[Exception]) -> Iterator[None]:
    """Keep what this process has just made at `path` if the block succeeds or fails with one of `errors`. Remove it if
    anything else stops the block."""
    path = to_path(path)
    _unfinished.add(path)
    try:
        yield
    except errors:
        raise
    except BaseException:
        _remove(path)
        raise
    finally:
        _unfinished.discard(path)


def remove_unfinished() -> None:
    """Remove what this process is writing: before an immediate exit, or if a second signal prevented the removal."""
    for temporary in _unfinished:
        _remove(temporary)


def _remove(temporary: AnyPath) -> None:
    if not isinstance(temporary, Path):
        with suppress(Exception):  # the user sees the original error
            filesystem(temporary).rm(str(temporary), recursive=True)
        return
    if not temporary.is_dir():
        with suppress(OSError):  # it does not exist, or its name was refused
            temporary.unlink()
        return
    for _ in range(50):  # one of the writer's threads may still add files
        shutil.rmtree(temporary, ignore_errors=True)
        if not temporary.exists():
            return
        time.sleep(0.05)


@contextmanager
def new_directory(path: AnyPath, marker: str = "") -> Iterator[Path]:
    """Yields a temporary directory that becomes `path` on success and is removed otherwise; see `replacing`.

    Raises InputError if `path` exists, and for errors of the disk.
    """
    if names := is_url(path) and list_names(path):
        cut = "" if marker in names else f" without {marker}, so its upload was cut short: remove it or"
        raise InputError(f"{path} exists{cut or ';'} choose a new destination")
    if os.path.lexists(path):
        raise InputError(f"{path} exists; choose a new destination")
    whole = kept_after(path) if is_url(path) else nullcontext()  # an upload may stop halfway
    with disk_errors(path), parents_of(path), whole, replacing(path, marker) as temporary:
        temporary.mkdir()
        yield temporary


@contextmanager
def parents_of(path: AnyPath) -> Iterator[None]:
    """Create the parent directories of `path`; a bucket needs none. After an error, remove those created here."""
    if is_url(path):
        yield
        return
    missing = [parent for parent in path.absolute().parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with suppress(OSError):
            for parent in missing:
                parent.rmdir()
        raise


@contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise InputError for errors of the disk while `path` is written, or while files that it is made from are read."""
    try:
        yield
    except OSError as error:
        known = error.filename in (None, os.fspath(path)) or PREFIX in str(error.filename)
        other = "" if known else f"{error.filename}: "
        raise InputError(f"{path} cannot be written: {other}{error.strerror or error}") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    if is_url(path):
        put(to_path(path), text.encode())
        return
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def remove_leftovers(directory: Path) -> None:
    """Remove what killed processes left in `directory`. Call it only where no other process is writing."""
    for file in directory.glob(f"{PREFIX}*"):
        file.unlink()
