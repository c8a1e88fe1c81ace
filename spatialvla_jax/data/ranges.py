"""Reads byte ranges of stored frames from a disk or a bucket. On a disk the operating system reads ahead; in a bucket,
ranges for coming steps are requested concurrently to hide latency."""

import contextlib
import functools
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np

from spatialvla_jax.data.index import Index
from spatialvla_jax.errors import Fault, InputError, StorageError
from spatialvla_jax.utils.storage import exists, is_url, read_ranges, to_path

Range = tuple[str, int, int]  # path or URL, offset, length
Take = Callable[[], bytes]  # waits for a range's bytes; raises a Fault if they cannot be read


class Place(NamedTuple):
    """Where one image or depth map of a batch is stored."""

    row: int  # in the batch
    index: Index
    key: str  # "image" or "depth"
    frame: int
    path: str
    offset: int
    length: int
    checksum: int


class Files:
    """Reads ranges of files. Keeps the most recently used local files open."""

    def __init__(self, limit: int = 256):
        self._limit = limit
        self._open: OrderedDict[str, int] = OrderedDict()

    def begin(self, ranges: Sequence[Range]) -> tuple[list[Take], int]:
        """Start reading all ranges; also returns the number of bytes requested from a bucket.

        Local ranges are announced to the operating system, which then fetches all of them concurrently."""
        if any(is_url(path) for path, *_ in ranges):
            read = in_background(read_ranges, ranges)
            takes = [functools.partial(_of_many, read, number, path) for number, (path, *_) in enumerate(ranges)]
            return takes, sum(length for *_, length in ranges)
        if hasattr(os, "posix_fadvise"):  # not on macOS
            for path, offset, length in ranges:
                with contextlib.suppress(OSError):  # reading it will report the error
                    os.posix_fadvise(self._descriptor(path), offset, length, os.POSIX_FADV_WILLNEED)
        return [functools.partial(self.read, *one) for one in ranges], 0

    def frames(self, places: Sequence[Place]) -> tuple[list[Take], int]:
        """Start reading the frames at these places."""
        return self.begin([(place.path, place.offset, place.length) for place in places])

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Read a range of a local file."""
        try:
            data = os.pread(self._descriptor(path), length, offset)
        except OSError as error:
            raise Fault("unreadable file", str(error.strerror)) from error
        if len(data) < length:
            raise Fault("unreadable file", "the file is shorter than it was")
        return data

    def _descriptor(self, path: str) -> int:
        if path not in self._open:
            self._open[path] = os.open(path, os.O_RDONLY)
            if len(self._open) > self._limit:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(path)
        return self._open[path]

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


def _of_many(read: "Future[list[bytes | Exception]]", number: int, path: str) -> bytes:
    """Wait for one of several ranges read together. Errors that a retry may fix are raised as StorageError, not as
    faults of the data: skipping frames for them would make the run irreproducible."""
    found = read.result()[number]
    if isinstance(found, bytes):
        return found
    if isinstance(found, OSError):
        raise Fault("unreadable file", str(found.strerror)) from found
    if isinstance(found, EOFError):
        raise Fault("unreadable file", "the file is shorter than it was") from found
    if isinstance(found, InputError) and not isinstance(found, StorageError) and not exists(to_path(path)):
        raise Fault("unreadable file", "the object no longer exists") from found
    raise found


def in_background(call: Callable[..., Any], *arguments: Any) -> "Future[Any]":
    """Run a function in a daemon thread, which does not keep the process alive."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call(*arguments))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


class Blocks:
    """Reads frames of `files` in blocks of `block` consecutive ones, stored in a ring buffer of `capacity` bytes. New
    blocks overwrite the oldest. Memory is allocated once and never freed, so the resident set stays constant."""

    def __init__(self, files: Files, block: int, capacity: int):
        self._files, self._block, self._ring, self._end = files, block, _pages(capacity), 0
        # For each block, oldest first: (path, offset, position in the ring, length) for every episode that it overlaps.
        self._kept: OrderedDict[tuple[str, str, int], list[tuple[str, int, int, int]]] = OrderedDict()
        self._coming: dict[tuple[str, str, int], list[tuple[Range, Take]]] = {}

    def frames(self, places: Sequence[Place]) -> tuple[list[Take], int]:
        """Start reading the frames' blocks that are not in the buffer yet."""
        size = self._begin({self._name(place): place.index for place in places})
        return [functools.partial(self._take, place) for place in places], size

    def _name(self, place: Place) -> tuple[str, str, int]:
        return place.index.name, place.key, place.frame // self._block

    def _begin(self, blocks: dict[tuple[str, str, int], Index]) -> int:
        missing = [name for name in blocks if name not in self._kept and name not in self._coming]
        parts = {name: list(self._parts(blocks[name], *name[1:])) for name in missing}
        takes, size = self._files.begin([one for ranges in parts.values() for one in ranges])
        ordered = iter(takes)
        for name, ranges in parts.items():
            self._coming[name] = [(one, next(ordered)) for one in ranges]
        return size

    def _take(self, place: Place) -> bytes:
        name = self._name(place)
        if name not in self._kept:
            if name not in self._coming:  # it was overwritten after it had been requested
                self._begin({name: place.index})
            self._kept[name] = self._load([(one, take()) for one, take in self._coming.pop(name)])
        for held, start, at, size in self._kept[name]:
            if held == place.path and start <= place.offset < start + size:
                first = at + place.offset - start
                return self._ring[first : first + place.length]
        raise AssertionError(f"frame {place.frame} is not in its block")

    def _load(self, parts: list[tuple[Range, bytes]]) -> list[tuple[str, int, int, int]]:
        """Copy a block into the ring."""
        size = sum(len(data) for _, data in parts)
        if size > len(self._ring):  # much larger than average: enlarge the ring
            self._kept.clear()
            self._ring, self._end = _pages(2 * size), 0
        if self._end + size > len(self._ring):
            self._forget(self._end, len(self._ring))
            self._end = 0
        self._forget(self._end, self._end + size)
        places = []
        for (path, start, _), data in parts:
            self._ring[self._end : self._end + len(data)] = data
            places.append((path, start, self._end, len(data)))
            self._end += len(data)
        return places

    def _forget(self, first: int, stop: int) -> None:
        """Drop the blocks between `first` and `stop` in the ring, which are the oldest."""
        while self._kept:
            oldest, parts = next(iter(self._kept.items()))
            if parts[0][2] >= stop or parts[-1][2] + parts[-1][3] <= first:
                return
            del self._kept[oldest]

    def _parts(self, index: Index, key: str, block: int) -> Iterator[Range]:
        frames = np.arange(block * self._block, min((block + 1) * self._block, index.num_frames))
        episodes, spans = index.episode(frames), index.spans(key, frames)
        for episode in np.unique(episodes).tolist():  # an episode's images are contiguous
            part = spans[episodes == episode]
            start, stop = int(part[0, 0]), int(part[-1, :2].sum())
            yield index.files[int(index.arrays["episode_file"][episode])], start, stop - start


def _pages(size: int) -> mmap.mmap:
    """`size` bytes of memory, allocated immediately where the system supports it (Linux)."""
    return mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0))
