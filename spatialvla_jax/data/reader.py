"""From frame numbers to pixels: reads, decodes and resizes byte ranges of TFRecords ahead of the batches.

Why loaders' memory often grows, and what this one does instead:

- Readers are open for every shard of every dataset, each with one or more prefetched episodes. Here there are at most
  a few hundred file descriptors, and ranges of single frames or blocks of frames.
- Shuffle buffers hold decoded images. Here frame numbers are shuffled arithmetically; blocks of frames
  (`read_block`) are kept compressed, within a fixed number of bytes.
- tf.data tunes the depth of its buffers at run time. Here autotuning is off, and depths follow from `memory_gb`.
- Freed images fragment the C library's heaps of many threads. `images.tensorflow` prevents this.
- Pages of memory-mapped indexes stay resident once touched. Here they are released periodically.
"""

import contextlib
import dataclasses
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, runtime_checkable

import google_crc32c
import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt8
from tqdm import tqdm

from spatialvla_jax.data.bucket_speed import choose_ahead, choose_block, measure
from spatialvla_jax.data.config import DataConfig
from spatialvla_jax.data.images import decode_batches, decoder, tensorflow
from spatialvla_jax.data.index import CHECKSUM_BYTES, Faults, Index
from spatialvla_jax.data.index_cache import find_source, load_indexes
from spatialvla_jax.data.ranges import Blocks, Files, Place, Take
from spatialvla_jax.data.resolve_datasets import Entry
from spatialvla_jax.errors import Fault, InputError
from spatialvla_jax.utils.camera import FARTHEST_ON_AVERAGE, depth_problem
from spatialvla_jax.utils.distributed import Processes
from spatialvla_jax.utils.storage import is_url

# Returns a step's frames i64[B]; the second argument counts how often some of them had to be redrawn.
Samples = Callable[..., np.ndarray]
_ATTEMPTS = 100
_FARTHEST = 64  # maximum number of steps whose frames are requested ahead
_MOST_READY = 4  # maximum number of decoded batches; more do not help
# Bytes used by TensorFlow, its threads and the indexes' pages; and by one image while it is decoded and resized.
_RUNTIME, _WORKSPACE = 900 * 2**20, 32 * 2**20
_SLACK = 1.2  # capacity for blocks, relative to the mean size of those shuffled together


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of every dataset, with each dataset's tokenized prompts: ids i32[instructions, P] and masks."""

    indexes: tuple[Index, ...]
    prompts: tuple[tuple[np.ndarray, np.ndarray], ...]
    starts: np.ndarray  # i64[D + 1]: sample_id of each dataset's first frame, and the total
    current: tuple[np.ndarray, ...]  # per dataset bool[E]: episodes whose record is unchanged since indexing
    broken: dict[int, str] = dataclasses.field(default_factory=dict)  # known unreadable frames, and why
    replaced: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)  # their draws by dataset, reason

    def locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Dataset and frame within it for the samples `ids`."""
        dataset = np.searchsorted(self.starts, ids, side="right") - 1
        return dataset, ids - self.starts[dataset]

    def describe(self, sample_id: int) -> str:
        """Describes a frame in an error message."""
        (dataset,), (frame,) = self.locate(np.asarray([sample_id]))
        return self.indexes[dataset].describe(int(frame))


class Pixels(NamedTuple):
    """The parts of a batch that come from stored images."""

    sample_id: Int64[np.ndarray, " B"]  # the frames actually read
    image: UInt8[np.ndarray, "B S S 3"]
    stored_size: Int32[np.ndarray, "B 2"]  # (height, width) to which the index's intrinsics refer
    depth: Float32[np.ndarray, "B S S"] | None = None  # metres


@runtime_checkable
class Source(Protocol):
    """Where the loader's frames are stored: in RLDS files (`Rlds`) or in one packed file (`pack.Packed`)."""

    def index(self, split: str) -> tuple[Index, ...]:
        """The index of each of the mixture's datasets."""
        ...

    def choose_block(self, indexes: tuple[Index, ...]) -> int:
        """The number of consecutive frames to read at once: `data.read_block`, or the best for the storage."""
        ...

    def pixels(
        self, split: Split, samples: Samples, steps: range, batch_size: int, windows: tuple[int, ...] = ()
    ) -> Iterator[Pixels]:
        """Pixels of the frames `samples(step)` i64[B] for every step, with depth if asked for.

        Unreadable frames are replaced by others, drawn by `samples(step, 1)` and so on. `windows`: number of frames of
        each dataset that are shuffled together, if read in blocks.
        """
        ...


class Rlds:
    """Reads the frames of RLDS datasets from their TFRecords. See `Source`."""

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
        self._config, self._faults = config, config.faults
        self._block, self._ahead = 1, 0  # see `choose_block`

    def index(self, split: str) -> tuple[Index, ...]:
        tensorflow()  # import it before threads would do so concurrently
        with ThreadPoolExecutor(8) as pool:  # hides a bucket's latency
            sources = list(
                pool.map(lambda e: find_source(e.name, e.path, e.spec, e.split(split), self._action_dim), self._entries)
            )
        indexes = load_indexes(sources, self._cache_dir, self._progress, self._faults, self._processes)
        self._faults.check(sum((Counter(i.skipped) for i in indexes), Counter()), f"episodes of the split {split!r}")
        return tuple(indexes)

    def choose_block(self, indexes: tuple[Index, ...]) -> int:
        config = self._config
        sizes = [
            (path, size)
            for index in indexes
            for path, (_, size, *_) in zip(index.files, index.made_from["shards"], strict=True)
            if is_url(path)
        ]
        self._block = config.read_block or 1
        if not sizes:
            return self._block
        speed = measure(sizes)
        self._ahead = choose_ahead(speed, config.memory_gb * 2**30)
        why = "as the config says"
        if not config.read_block:
            frames = np.asarray([index.num_frames for index in indexes])
            image, stored = (
                np.average([sum(index.mean_size(key) for key in keys) for index in indexes], weights=frames)
                for keys in (("image",), self._keys)
            )
            window = _SLACK * stored * min(config.shuffle_frames, frames.sum())
            if self._processes.count > 1:
                why = "because each of several hosts would read every block in which it has a frame"
            elif _RUNTIME + self._workers * _WORKSPACE + window + 2 * self._ahead > 0.9 * config.memory_gb * 2**30:
                why = "because data.memory_gb cannot hold the blocks of data.shuffle_frames"
            else:
                self._block, why = choose_block(speed, image), "which is kept when the run is resumed"
        if self._processes.index:
            return self._block
        tqdm.write(
            f"{sizes[0][0].rpartition('/')[0]}: {1e3 * speed.latency:.0f} ms per request and "
            f"{speed.bandwidth / 1e6:.0f} MB/s, so up to {self._ahead / 1e6:.0f} MB are read ahead; "
            f"data.read_block is {self._block}, {why}",
            file=sys.stderr,
        )
        return self._block

    def pixels(
        self, split: Split, samples: Samples, steps: range, batch_size: int, windows: tuple[int, ...] = ()
    ) -> Iterator[Pixels]:
        tf = tensorflow()
        encoded = np.asarray([sum(index.mean_size(key) for key in self._keys) for index in split.indexes])
        decoded = self._image_size**2 * (7 if "depth" in self._keys else 3)
        budget = self._config.memory_gb
        ready, cache = plan_memory(encoded, decoded, batch_size, windows, self._workers, budget, self._ahead)
        while steps:
            # Each round has its own, because a thread of the previous round may still be reading.
            files = Files()
            store = Blocks(files, self._block, cache) if windows else files
            reader = StepReader(split, samples, steps.stop, self._keys, files, store, self._faults, self._ahead)
            depth = "depth" in self._keys
            batches = decode_batches(reader.read, steps, batch_size, self._image_size, depth, self._workers, ready)
            for step in steps:
                try:
                    batch = next(batches)
                except tf.errors.OpError:
                    if reader.failure:
                        raise reader.failure[0] from None
                    if not self._find_broken(reader, reader.taken[step]):
                        raise
                    steps = range(step, steps.stop)  # repeat from here, now that the broken frames are known
                    break
                ids = reader.taken.pop(step)
                if split.broken:
                    self._count_replaced(split, samples, step, ids)
                yield checked(split, Pixels(ids, **batch))
            else:
                return

    def _find_broken(self, reader: "StepReader", ids: np.ndarray) -> bool:
        """Exclude frames among `ids` that cannot be read or decoded; returns whether there are any."""
        tf = tensorflow()
        before, split = len(reader.split.broken), reader.split
        encoded = {key: np.empty(len(ids), object) for key in self._keys}
        units = np.empty(len(ids), np.float32)
        alone = StepReader(split, reader.samples, 0, self._keys, files := Files(), files, self._faults)
        unread = alone.fetch(alone.begin(ids), encoded, units)
        for row in np.setdiff1d(np.arange(len(ids)), unread).tolist():
            frame = [encoded[key][row] for key in self._keys]
            try:
                decoder(self._image_size, "depth" in self._keys)(
                    *map(tf.constant, [*frame, *units[row : row + len(frame) - 1]])
                )
            except tf.errors.OpError:
                sizes = " and ".join(f"{len(data)} bytes of {key}" for key, data in zip(self._keys, frame, strict=True))
                alone.leave_out(int(ids[row]), "undecodable image", f"the image does not decode ({sizes})")
        return len(split.broken) > before

    def _count_replaced(self, split: Split, samples: Samples, step: int, taken: np.ndarray) -> None:
        """Count the failed draws that preceded the frames `taken`."""
        rows = np.arange(len(taken))
        for attempt in range(_ATTEMPTS):
            ids = samples(step, attempt)
            rows = rows[ids[rows] != taken[rows]]
            for sample, dataset in zip(ids[rows].tolist(), split.locate(ids[rows])[0].tolist(), strict=True):
                split.replaced[split.indexes[dataset].name, split.broken[sample]] += 1
            if not rows.size:
                return


class Begun(NamedTuple):
    """Frames that are being read."""

    ids: np.ndarray  # i64[B]
    rows: np.ndarray  # rows of the wanted frames
    records: list[tuple[Index, int, np.ndarray, Take]]  # episodes whose records must be checked; see `Split.current`
    places: list[Place]
    takes: list[Take]  # return the bytes of each place
    size: int  # bytes requested from a bucket


@dataclasses.dataclass
class StepReader:
    """Reads the encoded images of steps, in order. From a bucket, requests later steps while fewer than `ahead` bytes
    are in flight."""

    split: Split
    samples: Samples
    stop: int  # first step that is not read
    keys: tuple[str, ...]  # image[, depth]
    files: Files
    store: Files | Blocks  # `files`, or blocks of them
    faults: Faults
    ahead: int = 0
    taken: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)  # frames i64[B] of the steps read so far
    failure: list[Exception] = dataclasses.field(default_factory=list)
    begun: dict[int, Begun] = dataclasses.field(default_factory=dict)

    def read(self, step: Any) -> tuple[np.ndarray, ...]:
        """Called by TensorFlow: the images of a step (and its depth maps with their units). Errors are also stored in
        `failure`, because TensorFlow converts exceptions to its own."""
        try:
            self.taken[int(step)], encoded = self._read(int(step))
        except Exception as error:
            self.failure.append(error)
            raise
        return encoded

    def _read(self, step: int) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """The frames i64[B] of a step and their encoded images (and depth maps with their units)."""
        begun = self.begun.pop(step, None) or self.begin(self.samples(step))
        for later in range(step + 1 + len(self.begun), min(step + 1 + _FARTHEST, self.stop)):
            if sum(one.size for one in self.begun.values()) >= self.ahead:
                break
            self.begun[later] = self.begin(self.samples(later))
        ids, rows = np.array(begun.ids), np.arange(len(begun.ids))
        encoded, units = {key: np.empty(len(ids), object) for key in self.keys}, np.empty(len(ids), np.float32)
        for attempt in range(_ATTEMPTS):
            if attempt:
                ids[rows] = self.samples(step, attempt)[rows]
                begun = self.begin(ids, rows)
            rows = self.fetch(begun, encoded, units)
            if not rows.size:
                return ids, (*encoded.values(), units) if "depth" in self.keys else tuple(encoded.values())
        raise InputError(f"{_ATTEMPTS} draws in a row gave no readable frame (step {step})")

    def begin(self, ids: np.ndarray, rows: np.ndarray | None = None) -> Begun:
        """Start reading `rows` (default: all) of the frames `ids`."""
        split, rows = self.split, np.arange(len(ids)) if rows is None else rows
        broken = {row for row in rows.tolist() if ids[row] in split.broken} if split.broken else set()
        records: list[tuple[Index, int, np.ndarray]] = []
        places: list[Place] = []
        dataset, frames = split.locate(ids[rows])
        for number in np.unique(dataset):
            index, own, frame = split.indexes[number], rows[dataset == number], frames[dataset == number]
            episodes, current = index.episode(frame), split.current[number]
            records += [(index, one, current) for one in np.unique(episodes[~current[episodes]]).tolist()]
            paths = [index.files[file] for file in index.arrays["episode_file"][episodes].tolist()]
            for key in self.keys:
                spans = index.spans(key, frame).tolist()
                for row, one, path, span in zip(own.tolist(), frame.tolist(), paths, spans, strict=True):
                    if row not in broken:
                        places.append(Place(row, index, key, one, path, *span))
        checks, _ = self.files.begin([(*index.record(one)[:2], CHECKSUM_BYTES) for index, one, _ in records])
        begun = [(*record, take) for record, take in zip(records, checks, strict=True)]
        return Begun(ids, rows, begun, places, *self.store.frames(places))

    def fetch(self, begun: Begun, encoded: dict[str, np.ndarray], units: np.ndarray) -> np.ndarray:
        """Fill rows of `encoded` and `units` with the frames in `begun`; returns the rows whose frames cannot be
        read."""
        split, ids = self.split, begun.ids
        failed = {row for row in begun.rows.tolist() if ids[row] in split.broken} if split.broken else set()
        self._check_records(begun)
        for place, take in zip(begun.places, begun.takes, strict=True):
            if place.row in failed:
                continue
            try:
                encoded[place.key][place.row] = data = take()
                units[place.row] = place.index.spec.depth_unit
                if google_crc32c.value(data) != place.checksum:
                    raise Fault("checksum", "its bytes have changed since they were indexed")
            except Fault as fault:
                message = f"the {place.key} cannot be read any more: {fault}"
                self.leave_out(int(ids[place.row]), fault.reason, message)
                failed.add(place.row)
        return np.asarray(sorted(failed), np.int64)

    @staticmethod
    def _check_records(begun: Begun) -> None:
        """Compare the checksums of episodes' records with the index, and mark the episodes as current. Raises
        InputError if a file was rewritten, which nothing else may reveal."""
        for index, episode, current, take in begun.records:
            path, _, checksum = index.record(episode)
            with contextlib.suppress(Fault):  # reading the frame will report the error
                if take() != checksum:
                    index.forget()
                    raise InputError(
                        f"the records of {path} are not those that dataset {index.name!r} was indexed with, though "
                        "the file has the same size and modification time: restart to index the dataset again"
                    )
                current[episode] = True

    def leave_out(self, sample: int, reason: str, message: str) -> None:
        """Mark a frame as broken. Raises a Fault or InputError if the config does not allow it."""
        if self.faults.policy == "fail":
            raise Fault(reason, f"{self.split.describe(sample)}: {message}")
        self.split.broken[sample] = reason
        self.faults.check(Counter(list(self.split.broken.values())), "frames")  # a copy: other threads may add to it


def checked(split: Split, pixels: Pixels) -> Pixels:
    """The same pixels. Raises InputError naming a frame whose depth is implausible in metres: its spec's `depth_unit`
    is wrong."""
    if pixels.depth is None:
        return pixels
    for row in np.flatnonzero(pixels.depth.max(axis=(1, 2)) > FARTHEST_ON_AVERAGE).tolist():
        if wrong := depth_problem(pixels.depth[row], pixels.depth.shape[1:]):
            raise InputError(f"{split.describe(int(pixels.sample_id[row]))}: the depth {wrong}")
    return pixels


def plan_memory(
    encoded: np.ndarray,
    decoded: int,
    batch_size: int,
    windows: tuple[int, ...],
    workers: int,
    memory_gb: float,
    ahead: int = 0,
) -> tuple[int, int]:
    """The number of decoded batches in the queue, and the number of bytes for blocks.

    `encoded`: mean bytes f64[D] of a stored frame of each dataset; `decoded`: bytes of a decoded frame; `ahead`: bytes
    in flight from a bucket, whose blocks must not overwrite blocks still in use. Raises InputError if no batch fits.
    """
    cache = int(_SLACK * np.sum(encoded * windows)) + ahead if windows else 0
    fixed = _RUNTIME + workers * _WORKSPACE + cache + ahead
    batch = batch_size * (decoded + int(encoded.max()))
    # Besides the queue: one batch is being read, one decoded, one assembled, one used by the caller.
    ready = int((memory_gb * 2**30 - fixed) // batch) - 4
    if ready < 1:
        needed = (fixed + 5 * batch) / 2**30
        blocks = f", {cache / 2**30:.2f} of it for blocks (data.shuffle_frames)" if cache else ""
        raise InputError(
            f"data.memory_gb is {memory_gb}, but batches of {batch_size} need {needed:.2f} GB here{blocks}"
        )
    return min(ready, _MOST_READY), cache
