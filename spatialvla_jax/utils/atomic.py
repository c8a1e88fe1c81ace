"""Files and directories that appear whole or not at all."""

import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from spatialvla_jax.errors import InputError

PREFIX = ".tmp-"
_unfinished: set[Path] = set()  # what this process is writing


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new path beside `path`, on which the caller makes a file or a directory: at the end it takes the place of
    `path`, and after an error it is removed. It keeps the suffix, by which some writers choose a format."""
    path = Path(path)
    name = path.name if len(os.fsencode(path.name)) < 200 else path.suffix  # 255 bytes is the limit of most systems
    temporary = path.with_name(f"{PREFIX}{secrets.token_hex(4)}-{name}")
    _unfinished.add(temporary)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        _remove(temporary)
        _unfinished.discard(temporary)


@contextmanager
def kept_after(path: str | os.PathLike[str], *errors: type[Exception]) -> Iterator[None]:
    """What this process has just made at `path` stays where the caller ends, or fails by one of `errors`. After
    anything else that stops the caller, it is removed."""
    path = Path(path)
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
    """Removes what this process is writing, before it ends at once, or what a second signal kept from being removed."""
    for temporary in _unfinished:
        _remove(temporary)


def _remove(temporary: Path) -> None:
    if not temporary.is_dir():
        with suppress(OSError):  # none is there, or its name was refused
            temporary.unlink()
        return
    for _ in range(50):  # a thread of the writer may still add files
        shutil.rmtree(temporary, ignore_errors=True)
        if not temporary.exists():
            return
        time.sleep(0.05)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory beside `path` that becomes `path` at the end, or nothing at all.

    Raises InputError when `path` exists, and for whatever the disk refuses.
    """
    if os.path.lexists(path):
        raise InputError(f"{path} exists; choose a new destination")
    with disk_errors(path), parents_of(path), replacing(path) as temporary:
        temporary.mkdir()
        yield temporary


@contextmanager
def parents_of(path: Path) -> Iterator[None]:
    """Makes the directories that `path` lies in. After an error it removes those that it made and that are empty."""
    made = [parent for parent in path.absolute().parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with suppress(OSError):
            for parent in made:
                parent.rmdir()
        raise


@contextmanager
def disk_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raises InputError for whatever the disk refuses while `path` is written, or a file that it is made of is read."""
    try:
        yield
    except OSError as error:
        other = f"{error.filename}: " if error.filename and PREFIX not in str(error.filename) else ""
        raise InputError(f"{path} cannot be written: {other}{error.strerror or error}") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def remove_leftovers(directory: Path) -> None:
    """Removes what killed processes were writing in `directory`, where only this process writes now."""
    for file in directory.glob(f"{PREFIX}*"):
        file.unlink()
