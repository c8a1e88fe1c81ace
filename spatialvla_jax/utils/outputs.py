"""Checks a command's outputs before it starts: it may replace and remove only what it has made itself."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spatialvla_jax.errors import InputError, StorageError
from spatialvla_jax.utils import storage
from spatialvla_jax.utils.storage import AnyPath

SUFFIXES = {
    ".csv",
    ".html",
    ".json",
    ".jsonl",
    ".md",
    ".npz",
    ".pack",
    ".png",
    ".py",
    ".rrd",
}  # of files, never of folders


@dataclass(frozen=True)
class OutputFile:
    """A new file, or one that `made` recognises, by its content, as written by this command."""

    made: Callable[[bytes], bool] | None = None

    def check(self, path: AnyPath, option: str) -> None:
        """Raises InputError, or StorageError for a bucket that does not answer or has no room."""
        with _named(option):
            _check_name(path, option)
            if storage.is_dir(path):
                raise InputError(f"{option} {path} is a folder: expected the name of a file")
            _check_folder(path, path, option)
            if not storage.exists(path):
                return
            if self.made is None:
                raise InputError(f"{option} {path} already exists: expected the name of a new file")
            size, _ = storage.size_and_version(path)
            if not self.made(storage.read_range(path, 0, min(size, 2**26))):  # packed data may be larger than memory
                raise InputError(
                    f"{option} {path} exists and was not written by this command: choose another name, or remove it"
                )


@dataclass(frozen=True)
class OutputFolder:
    """A folder that is new or empty, or that the command made: then its JSON file `marker` has the key `key`, with
    `value` if given. If `names` are given, the command replaces only these, and other files may lie beside them."""

    marker: str = ""
    key: str = ""
    value: Any = None
    names: tuple[str, ...] | None = None

    def check(self, path: AnyPath, option: str) -> None:
        """Raises InputError, or StorageError for a bucket that does not answer or has no room."""
        with _named(option):
            _check_name(path, option)
            if path.suffix in SUFFIXES and not storage.is_dir(path):
                raise InputError(f"{option} {path} has the name of a {path.suffix} file: expected a folder")
            _check_folder(path / "inside", path, option, new=True)
            if storage.exists(path) and not self._made(path) and (kept := self._in_the_way(path)):
                raise InputError(
                    f"{option} {path} holds {kept[0]}, which this command did not make: choose a new or an empty folder"
                )

    def _made(self, path: AnyPath) -> bool:
        if not self.marker or not storage.is_file(path / self.marker):
            return False
        try:
            content = json.loads(storage.read_bytes(path / self.marker))
            return self.key in content and self.value in (None, content[self.key])
        except (OSError, TypeError):
            return False
        except ValueError:
            return self.value is None  # truncated: its reader will report it

    def _in_the_way(self, path: AnyPath) -> list[str]:
        if storage.is_url(path):
            names = storage.list_names(path)
        else:
            entries = (entry for entry in path.iterdir() if not entry.is_dir() or any(entry.iterdir()))
            names = sorted(entry.name for entry in entries)
        return names if self.names is None else [name for name in names if name in (self.marker, *self.names)]


def begins_with(magic: bytes) -> Callable[[bytes], bool]:
    return lambda content: content.startswith(magic)


def has_keys(*keys: str) -> Callable[[bytes], bool]:
    """A test whether content is a JSON object with all of `keys`."""

    def made(content: bytes) -> bool:
        try:
            return set(keys) <= json.loads(content).keys()
        except (ValueError, AttributeError):
            return False

    return made


def is_report(content: bytes) -> bool:
    """Whether content is one of our figures or pages. Both record who made them, see reports/figures."""
    marks = {b"\x89PNG": b"Software\0spatialvla_jax", b"%PDF": b"(spatialvla_jax)", b"<svg": b"spatialvla_jax"}
    marks[b"<!doctype html>"] = b'<meta name="generator" content="spatialvla_jax">'
    return any(
        content.lstrip()[: len(kind)].lower() == kind.lower() and mark in content for kind, mark in marks.items()
    )


@contextlib.contextmanager
def _named(option: str) -> Iterator[None]:
    """Prefix errors from a bucket with the option too."""
    try:
        yield
    except (InputError, StorageError) as error:
        if str(error).startswith(option):
            raise
        raise type(error)(f"{option} {error}") from error


def _check_name(path: AnyPath, option: str) -> None:
    if not isinstance(path, Path):
        return
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # it is new, or `_check_folder` reports what is wrong
    except OSError as error:
        raise InputError(f"{option} {path}: {error.strerror}") from None
    for part in (path, *path.parents):
        if part.is_symlink() and not part.exists():
            raise InputError(f"{option} {path}: {part} is a link to {part.readlink()}, which does not exist")


def _check_folder(file: AnyPath, path: AnyPath, option: str, new: bool = False) -> None:
    """Check that `file` can be created; with `new`, together with its parent folders."""
    if not isinstance(file, Path):
        storage.check_writable(file)
        return
    folder = file.absolute().parent
    if new:
        folder = next(above for above in (folder, *folder.parents) if above.exists())
    if not folder.exists():
        raise InputError(f"{option} {path}: the folder {folder} does not exist")
    if not folder.is_dir():
        raise InputError(f"{option} {path}: {folder} is a file, but a folder is expected")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{option} {path}: {folder} is not writable")
