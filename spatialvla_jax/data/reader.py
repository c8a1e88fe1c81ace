"""From frame numbers to pixels: byte ranges of TFRecords, read, decoded and resized ahead of the batches.

What makes the memory of loaders grow, and what this one does instead:

- Readers that are open for every shard of every dataset, each with a prefetched episode or more: here some hundred file
  descriptors at most, and ranges of single frames or blocks of frames.
- Shuffle buffers of decoded images: here the shuffle is arithmetic on frame numbers. Blocks of frames (`read_block`)
  are kept compressed, up to a fixed number of bytes.
- Buffers whose depth tf.data tunes while it runs: here autotuning is off and depths follow from `memory_gb`.
- The C library's own: freed images that fragment the heaps of many threads (`images.tensorflow` sees to that).
- Pages of memory-mapped indexes that stay resident once touched: here they are given back every so many frames.
"""

import contextlib
import dataclasses
import functools
import mmap
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import google_crc32c
import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt8

from spatialvla_jax.data.config import DataConfig
from spatialvla_jax.data.images import decode_batches, decoder, tensorflow
from spatialvla_jax.data.index import CHECKSUM_BYTES, Index, find_source, make_index
from spatialvla_jax.data.resolve_datasets import Entry
from spatialvla_jax.errors import Fault, InputError
from spatialvla_jax.utils.camera import FARTHEST_ON_AVERAGE, depth_problem
from spatialvla_jax.utils.distributed import Processes

# i64[B]: the frames of a step; the second argument counts how often some of them had to be drawn again.
Samples = Callable[..., np.ndarray]
_ATTEMPTS = 100
_MOST_READY = 4  # more batches ahead than these help nobody
# Bytes: TensorFlow's own, its threads' and the pages of the indexes; and of one image while it is decoded and resized.
_RUNTIME, _WORKSPACE = 900 * 2**20, 32 * 2**20


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of every dataset, with each dataset's prompts: ids i32[instructions, P] and mask."""

    indexes: tuple[Index, ...]
    prompts: tuple[tuple[np.ndarray, np.ndarray], ...]
    starts: np.ndarray  # i64[D + 1]: sample_id of every dataset's first frame, and the end
    current: tuple[np.ndarray, ...]  # bool[E] of every dataset: whose record is known to be the one that was indexed
    broken: dict[int, str] = dataclasses.field(default_factory=dict)  # why these frames cannot be read, as far as known
    replaced: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)  # draws of them, by dataset and why

    def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Dataset and frame within it of the samples `ids`."""
        dataset = np.searchsorted(self.starts, ids, side="right") - 1
        return dataset, ids - self.starts[dataset]

    def describe(self, sample_id: int) -> str:
        """Names a frame in an error."""
        (dataset,), (frame,) = self.locate(np.asarray([sample_id]))
        return self.indexes[dataset].describe(int(frame))


class Pixels(NamedTuple):
    """What a batch takes from the stored images."""

    sample_id: Int64[np.ndarray, " B"]  # the frames that were read
    image: UInt8[np.ndarray, "B S S 3"]
    stored_size: Int32[np.ndarray, "B 2"]  # height and width that the index's intrinsics are pixels of
    depth: Float32[np.ndarray, "B S S"] | None = None  # metres


@runtime_checkable
class Source(Protocol):
    """Where the loader's frames lie: in RLDS files (`Rlds`) or in one packed file (`pack.Packed`)."""

    def index(self, split: str) -> tuple[Index, ...]:
        """The index of every dataset of the mixture."""
        ...

    def pixels(
        self, split: Split, samples: Samples, steps: range, batch_size: int, windows: tuple[int, ...] = ()
    ) -> Iterator[Pixels]:
        """Those of the frames `samples(step)` i64[B] for every step, with depth if asked for.

        In the place of frames that turn out unreadable stand others, drawn by `samples(step, 1)` and so on. `windows`:
        frames of each dataset that are shuffled together, if read in blocks.
        """
        ...


class Rlds:
    """The frames of RLDS datasets, out of their TFRecords. See `Source`."""

    def __init__(
        self,
        config: DataConfig,
        entries: tuple[Entry, ...],
        image_size: int,
        depth: bool,
        action_dim: int,
        progress: Callable[[str, int, int], None] | None,
        processes: Processes,
    ):
        self._action_dim, self._processes = action_dim, processes
        self._entries, self._image_size, self._progress = entries, image_size, progress
        self._keys = ("image", "depth") if depth else ("image",)
        self._cache_dir = config.cache_folder
        self._workers = config.workers or os.cpu_count() or 1
        self._block, self._budget, self._faults = config.read_block, config.memory_gb, config.faults

    def index(self, split: str) -> tuple[Index, ...]:
        indexes = tuple(
            make_index(
                find_source(entry.name, entry.path, entry.spec, entry.split(split), self._action_dim),
                *(self._cache_dir, self._progress, self._faults, self._processes),
            )
            for entry in self._entries
        )
        self._faults.check(sum((Counter(i.skipped) for i in indexes), Counter()), f"episodes of the split {split!r}")
        return indexes

    def pixels(
        self, split: Split, samples: Samples, steps: range, batch_size: int, windows: tuple[int, ...] = ()
    ) -> Iterator[Pixels]:
        tf = tensorflow()
        encoded = np.asarray([sum(index.mean_size(key) for key in self._keys) for index in split.indexes])
        decoded = self._image_size**2 * (7 if "depth" in self._keys else 3)
        ready, cache = plan_memory(encoded, decoded, batch_size, windows, self._workers, self._budget)
        while steps:
            # Each round has its own: a thread of the one before may still be reading.
            taken: dict[int, np.ndarray] = {}
            failure: list[Exception] = []
            store = Blocks(self._block, cache) if windows else Files()
            read = functools.partial(self._read_step, split, samples, store, taken, failure)
            depth = "depth" in self._keys
            batches = decode_batches(read, steps, batch_size, self._image_size, depth, self._workers, ready)
            for step in steps:
                try:
                    batch = next(batches)
                except tf.errors.OpError:
                    if failure:
                        raise failure[0] from None
                    if not self._find_broken(split, taken[step]):
                        raise
                    steps = range(step, steps.stop)  # again from here, now that they are known
                    break
                ids = taken.pop(step)
                if split.broken:
                    self._count_replaced(split, samples, step, ids)
                yield Pixels(ids, **batch)
            else:
                return

    def _read_step(
        self,
        split: Split,
        samples: Samples,
        store: "Files",
        taken: dict[int, np.ndarray],
        failure: list[Exception],
        step: Any,
    ) -> tuple[np.ndarray, ...]:
        """What TensorFlow calls. It would make an exception of its own out of ours, so that goes to `failure`."""
        try:
            taken[int(step)], encoded = self._read(split, samples, int(step), store)
        except Exception as error:
            failure.append(error)
            raise
        return encoded

    def _read(
        self, split: Split, samples: Samples, step: int, store: "Files"
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """The frames i64[B] of a step and their encoded images (and depth maps with their units)."""
        ids = samples(step)
        encoded = {key: np.empty(len(ids), object) for key in self._keys}
        units = np.empty(len(ids), np.float32)
        rows = np.arange(len(ids))
        for attempt in range(_ATTEMPTS):
            if attempt:
                ids = np.array(ids)
                ids[rows] = samples(step, attempt)[rows]
            rows = self._fetch(split, ids, rows, store, encoded, units)
            if not rows.size:
                return ids, (*encoded.values(), units) if "depth" in self._keys else tuple(encoded.values())
        raise InputError(f"{_ATTEMPTS} draws in a row gave no readable frame (step {step})")

    def _fetch(
        self,
        split: Split,
        ids: np.ndarray,
        rows: np.ndarray,
        store: "Files",
        encoded: dict[str, np.ndarray],
        units: np.ndarray,
    ) -> np.ndarray:
        """Fills `rows` of `encoded` and `units`; gives those rows whose frames cannot be read."""
        failed = {row for row in rows.tolist() if ids[row] in split.broken} if split.broken else set()
        places: list[tuple[int, Index, str, int, int, int, int, int]] = []
        records: list[tuple[Index, int, np.ndarray]] = []
        dataset, frames = split.locate(ids[rows])
        for number in np.unique(dataset):
            index, own, frame = split.indexes[number], rows[dataset == number], frames[dataset == number]
            units[own] = index.spec.depth_unit
            episodes = index.episode(frame)
            current = split.current[number]
            records += [(index, one, current) for one in np.unique(episodes[~current[episodes]]).tolist()]
            files = index.arrays["episode_file"][episodes].tolist()
            for key in self._keys:
                spans = index.spans(key, frame).tolist()
                for row, one, file, span in zip(own.tolist(), frame.tolist(), files, spans, strict=True):
                    if row not in failed:
                        places.append((row, index, key, one, file, *span))
        store.expect((*index.record(episode)[:2], CHECKSUM_BYTES) for index, episode, _ in records)
        store.expect((index.files[file], offset, length) for _, index, _, _, file, offset, length, _ in places)
        self._check_records(records, store)
        for row, index, key, *place, checksum in places:
            try:
                encoded[key][row] = data = store.frame(index, key, *place)
                if google_crc32c.value(data) != checksum:
                    raise Fault("checksum", "its bytes are not those that were indexed")
            except Fault as fault:
                if row not in failed:
                    self._leave_out(split, int(ids[row]), fault.reason, f"the {key} cannot be read any more: {fault}")
                failed.add(row)
        return np.asarray(sorted(failed), np.int64)

    @staticmethod
    def _check_records(records: list[tuple[Index, int, np.ndarray]], store: "Files") -> None:
        """Compares the checksums of episodes' records with those in the index, and notes the episode. Raises InputError
        where a file was rewritten and nothing else shows it."""
        for index, episode, current in records:
            path, offset, checksum = index.record(episode)
            with contextlib.suppress(Fault):  # reading the frame says what is wrong
                if store.read(path, offset, CHECKSUM_BYTES) != checksum:
                    index.forget()
                    raise InputError(
                        f"the records of {path} are not those that dataset {index.name!r} was indexed with, though "
                        "the file has the same size and modification time: start again to index the dataset again"
                    )
                current[episode] = True

    def _find_broken(self, split: Split, ids: np.ndarray) -> bool:
        """Leaves out those frames among `ids` that cannot be read or decoded; whether there are any."""
        tf = tensorflow()
        before = len(split.broken)
        encoded = {key: np.empty(len(ids), object) for key in self._keys}
        units = np.empty(len(ids), np.float32)
        unread = self._fetch(split, ids, np.arange(len(ids)), Files(), encoded, units)
        for row in np.setdiff1d(np.arange(len(ids)), unread).tolist():
            frame = [encoded[key][row] for key in self._keys]
            try:
                decoder(self._image_size, "depth" in self._keys)(
                    *map(tf.constant, [*frame, *units[row : row + len(frame) - 1]])
                )
            except tf.errors.OpError:
                sizes = " and ".join(f"{len(data)} bytes of {key}" for key, data in zip(self._keys, frame, strict=True))
                self._leave_out(split, int(ids[row]), "undecodable image", f"the image does not decode ({sizes})")
        return len(split.broken) > before

    def _leave_out(self, split: Split, sample: int, reason: str, message: str) -> None:
        """Notes a frame as broken, or raises."""
        if self._faults.policy == "fail":
            raise Fault(reason, f"{split.describe(sample)}: {message}")
        split.broken[sample] = reason
        self._faults.check(Counter(list(split.broken.values())), "frames")  # a copy: others add to it

    def _count_replaced(self, split: Split, samples: Samples, step: int, taken: np.ndarray) -> None:
        """Counts the draws that came before those which were `taken`."""
        rows = np.arange(len(taken))
        for attempt in range(_ATTEMPTS):
            ids = samples(step, attempt)
            rows = rows[ids[rows] != taken[rows]]
            for sample, dataset in zip(ids[rows].tolist(), split.locate(ids[rows])[0].tolist(), strict=True):
                split.replaced[split.indexes[dataset].name, split.broken[sample]] += 1
            if not rows.size:
                return


def check_depth(split: Split, pixels: Pixels) -> None:
    """Raises InputError that names a frame whose depth is too far to be metres: its spec has another `depth_unit`."""
    if pixels.depth is None:
        return
    for row in np.flatnonzero(pixels.depth.max(axis=(1, 2)) > FARTHEST_ON_AVERAGE).tolist():
        if wrong := depth_problem(pixels.depth[row], pixels.depth.shape[1:]):
            raise InputError(f"{split.describe(int(pixels.sample_id[row]))}: the depth {wrong}")


def plan_memory(
    encoded: np.ndarray, decoded: int, batch_size: int, windows: tuple[int, ...], workers: int, memory_gb: float
) -> tuple[int, int]:
    """How many decoded batches may wait, and how many bytes of blocks are kept.

    `encoded`: the mean bytes f64[D] of a stored frame of each dataset; `decoded`: those of a decoded one. Raises
    InputError when the budget holds no batch at all.
    """
    cache = int(1.2 * np.sum(encoded * windows)) if windows else 0
    fixed = _RUNTIME + workers * _WORKSPACE + cache
    batch = batch_size * (decoded + int(encoded.max()))
    # Besides those that wait: one is read, one decoded, one being put together, one with the caller.
    ready = int((memory_gb * 2**30 - fixed) // batch) - 4
    if ready < 1:
        needed = (fixed + 5 * batch) / 2**30
        blocks = f", {cache / 2**30:.2f} of it for blocks (data.shuffle_frames)" if cache else ""
        raise InputError(
            f"data.memory_gb is {memory_gb}, but batches of {batch_size} need {needed:.2f} GB here{blocks}"
        )
    return min(ready, _MOST_READY), cache


class Files:
    """Byte ranges of files, with the most recently used ones kept open."""

    def __init__(self, limit: int = 256):
        self._limit = limit
        self._open: OrderedDict[str, int] = OrderedDict()

    def expect(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Tells the system what is read next: it fetches all of it at once while the first is waited for."""
        if hasattr(os, "posix_fadvise"):  # Linux
            for path, offset, length in ranges:
                with contextlib.suppress(OSError):  # reading it says what is wrong
                    os.posix_fadvise(self._descriptor(path), offset, length, os.POSIX_FADV_WILLNEED)

    def frame(self, index: Index, key: str, frame: int, file: int, offset: int, length: int) -> bytes:
        """The bytes of a frame's image or depth map, which lie there. Raises a Fault."""
        return self.read(index.files[file], offset, length)

    def read(self, path: str, offset: int, length: int) -> bytes:
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


class Blocks(Files):
    """The same, read in blocks of `block` consecutive frames. They lie in one ring of `capacity` bytes, a new one in
    the place of the oldest: all of it is taken at once and nothing is freed, so that the resident set stays flat."""

    def __init__(self, block: int, capacity: int):
        super().__init__()
        self._block, self._ring, self._end = block, _pages(capacity), 0
        # Of each block, oldest first, a (file, offset, place in the ring, length) for every episode it has frames of.
        self._kept: OrderedDict[tuple[str, str, int], list[tuple[int, int, int, int]]] = OrderedDict()

    def expect(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Nothing: most of it is here already, and a block is a read that is large enough."""

    def frame(self, index: Index, key: str, frame: int, file: int, offset: int, length: int) -> bytes:
        name = (index.name, key, frame // self._block)
        if name not in self._kept:
            self._kept[name] = self._load(list(self._parts(index, key, name[2])))
        for held, start, place, size in self._kept[name]:
            if held == file and start <= offset < start + size:
                return self._ring[place + offset - start : place + offset - start + length]
        raise AssertionError(f"frame {frame} is not in its block")

    def _load(self, parts: list[tuple[int, int, bytes]]) -> list[tuple[int, int, int, int]]:
        """Puts a block into the ring."""
        size = sum(len(data) for *_, data in parts)
        if size > len(self._ring):  # far above the mean: the ring grows
            self._kept.clear()
            self._ring, self._end = _pages(2 * size), 0
        if self._end + size > len(self._ring):
            self._forget(self._end, len(self._ring))
            self._end = 0
        self._forget(self._end, self._end + size)
        places = []
        for file, start, data in parts:
            self._ring[self._end : self._end + len(data)] = data
            places.append((file, start, self._end, len(data)))
            self._end += len(data)
        return places

    def _forget(self, first: int, stop: int) -> None:
        """Drops the blocks that lie in the ring between `first` and `stop`: they are the oldest."""
        while self._kept:
            oldest, parts = next(iter(self._kept.items()))
            if parts[0][2] >= stop or parts[-1][2] + parts[-1][3] <= first:
                return
            del self._kept[oldest]

    def _parts(self, index: Index, key: str, block: int) -> Iterator[tuple[int, int, bytes]]:
        frames = np.arange(block * self._block, min((block + 1) * self._block, index.num_frames))
        episodes, spans = index.episode(frames), index.spans(key, frames)
        for episode in np.unique(episodes).tolist():  # an episode's images lie one after the other
            own = spans[episodes == episode]
            file = int(index.arrays["episode_file"][episode])
            start, stop = int(own[0, 0]), int(own[-1, :2].sum())
            yield file, start, self.read(index.files[file], start, stop - start)


def _pages(size: int) -> mmap.mmap:
    """So many bytes of memory, taken now where the system can (Linux)."""
    return mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0))
