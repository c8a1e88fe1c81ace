"""A small dataset as one memory-mapped file, which the loader reads without TensorFlow into bit-identical batches.

Layout: MAGIC, version u32, header length u32, header SHA-256, the header (JSON), then the arrays, each aligned to
ALIGNMENT bytes. Images are decoded and resized. Depth maps are the stored counts, resized. Intrinsics are in pixels of
the resized image. All numbers are little-endian.
"""

import base64
import dataclasses
import hashlib
import json
import mmap
import os
import shutil
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int, UInt8, UInt16

from spatialvla_jax.batch import WIDTHS, Batch
from spatialvla_jax.data.config import DataConfig
from spatialvla_jax.data.index import Index
from spatialvla_jax.data.oxe import make_spec
from spatialvla_jax.data.reader import Pixels, Samples, Split, checked
from spatialvla_jax.data.resolve_datasets import Entry, check_drop
from spatialvla_jax.data.rlds import enumerate_some
from spatialvla_jax.data.statistics import exceeding
from spatialvla_jax.errors import InputError
from spatialvla_jax.text import Tokenizer
from spatialvla_jax.utils.atomic import disk_errors, parents_of, replacing
from spatialvla_jax.utils.progress import warn
from spatialvla_jax.utils.storage import cached_copy, is_url, list_files, read_range, to_path

MAGIC, VERSION, ALIGNMENT = b"SVLAPACK", 2, 4096  # version 1 is the same, but has a frame for every action
_PREFIX = struct.Struct("<8sII32s")
_AHEAD = 2  # batches that are read before they are asked for
_BATCH = 64  # frames in memory while a file is written
RECORDED = {"extrinsics": (4, 4)} | {name: (width,) for name, width in WIDTHS.items()}  # only recordings have these
_NAMES = ("datasets", "mixture", "precomputed_depth")  # keys of the config's `data` part that a packed file replaces


class Pictures(NamedTuple):
    """The parts of a `Batch` that a packed file stores. Depth is f32 metres, or u16[B, S, S] counts as stored."""

    image: UInt8[np.ndarray, "B S S 3"]
    depth: Float32[np.ndarray, "B S S"] | UInt16[np.ndarray, "B S S"] | None
    intrinsics: Float32[np.ndarray, "B 3 3"]
    extra: dict[str, Float32[np.ndarray, "B ..."]]  # see `Frames`
    dataset_id: Int[np.ndarray, " B"]
    sample_id: Int[np.ndarray, " B"]
    valid: Bool[np.ndarray, " B"]


@runtime_checkable
class Frames(Protocol):
    """The parts of `Loader` that `write_pack` needs; see there."""

    config: DataConfig
    image_size: int
    depth: bool
    weights: tuple[float, ...]
    tokenizer: Tokenizer

    @property
    def extra(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of further f32 arrays with a row per frame, which `Pictures.extra` holds."""
        ...

    def indexes(self, split: str) -> tuple[Index, ...]: ...

    def epoch(self, batch_size: int, split: str) -> Iterator[Batch] | Iterator[Pictures]: ...


def write_pack(
    loader: Frames,
    out: str | os.PathLike[str],
    splits: Sequence[str],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write these splits of the loader's data, by rename; `progress(frames done, frames)` is called meanwhile.

    Returns {"path", "bytes", "frames": {split: number}}. Raises InputError, also if the disk is too full.
    """
    out = to_path(out)
    indexes = {split: loader.indexes(split) for split in splits}
    header = _header(loader, indexes)
    text = json.dumps(header).encode()
    start = _data_start(len(text))
    size = start + header["bytes"]
    with disk_errors(out), parents_of(out), replacing(out) as temporary:
        if (free := shutil.disk_usage(temporary.parent).free) < size:
            disk = f"the disk of {temporary.parent}" if is_url(out) else "its disk"
            raise InputError(f"{out} needs {size:,} bytes, but {disk} has only {free:,} left")
        with open(temporary, "wb") as file:
            file.truncate(size)
            file.write(_PREFIX.pack(MAGIC, VERSION, len(text), hashlib.sha256(text).digest()) + text)
            file.flush()
            total = sum(index.num_frames for group in indexes.values() for index in group)
            done = 0
            for split, group in indexes.items():
                places = [meta["arrays"] for meta in header["splits"][split]]
                _write_small(file.fileno(), start, group, places)
                for number in _write_pixels(file.fileno(), start, loader, split, group, places):
                    done += number
                    if progress:
                        progress(done, total)
    frames = {split: sum(index.num_frames for index in group) for split, group in indexes.items()}
    return {"path": str(out), "bytes": size, "frames": frames}


def _header(loader: Frames, indexes: Mapping[str, Sequence[Index]]) -> dict[str, Any]:
    """The header of a packed file of {split: index of each dataset}, which gives each array its place in the file."""
    place = 0

    def layout(index: Index) -> dict[str, Any]:
        nonlocal place
        places = {}
        for key, (dtype, shape) in _arrays(index, loader).items():
            places[key] = [place, np.dtype(dtype).newbyteorder("<").str, list(shape)]
            place += -(-np.dtype(dtype).itemsize * prod(shape) // ALIGNMENT) * ALIGNMENT
        return {
            "files": list(index.files),
            "instructions": list(index.instructions),
            "statistics": index.statistics,
            "num_read": index.num_read,
            "skipped": dict(index.skipped),
            "made_from": dict(index.made_from),
            "arrays": places,
        }

    return {
        "image_size": loader.image_size,
        "depth": loader.depth,
        "datasets": [
            {"name": index.name, "weight": weight, "spec": dataclasses.asdict(index.spec)}
            for index, weight in zip(next(iter(indexes.values())), loader.weights, strict=True)
        ],
        "config": _named(loader.config),
        "tokenizer": base64.b64encode(loader.tokenizer.to_bytes()).decode(),
        "splits": {split: [layout(index) for index in group] for split, group in indexes.items()},
        "bytes": place,  # total size of the arrays
    }


def _arrays(index: Index, loader: Frames) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Dtypes and shapes of a packed file's arrays."""
    small: dict[str, tuple[Any, tuple[int, ...]]] = {key: (x.dtype, x.shape) for key, x in _small(index).items()}
    frame = (index.num_frames, loader.image_size, loader.image_size)
    first = {key: small[key] for key in ("action", "language", "step")}
    first["image"] = (np.uint8, (*frame, 3))
    if index.spec.intrinsics:
        first["intrinsics"] = (np.float32, (index.num_frames, 3, 3))
    first |= {key: (np.float32, (index.num_frames, *shape)) for key, shape in loader.extra.items()}
    return first | small | ({"depth": (np.uint16, frame)} if loader.depth else {})


def _small(index: Index) -> dict[str, np.ndarray]:
    """Arrays that a packed file copies from the index: one row per frame, step or episode."""
    kept = ("action", "episode_end", "episode_file", "episode_number", "action_row", "action_end")
    frames = np.arange(index.num_frames)
    arrays = {key: index.arrays[key] for key in (*kept, *RECORDED) if key in index.arrays}
    return arrays | {"language": index.language(frames), "step": index.step(frames).astype(np.int32)}


def _write_small(file: int, start: int, indexes: Sequence[Index], places: Sequence[Mapping[str, Any]]) -> None:
    for index, place in zip(indexes, places, strict=True):
        for key, value in _small(index).items():
            offset, dtype, _ = place[key]
            _write(file, np.ascontiguousarray(value, dtype), start + offset)


def _write_pixels(
    file: int,
    start: int,
    loader: Frames,
    split: str,
    indexes: Sequence[Index],
    places: Sequence[Mapping[str, Any]],
) -> Iterator[int]:
    """Write image, depth and intrinsics of every frame of a split; yields the number of frames written per batch."""
    starts = np.cumsum([0, *(index.num_frames for index in indexes)])
    written = 0
    batch: Any
    for batch in loader.epoch(_BATCH, split):
        owner = np.searchsorted(starts, batch.sample_id, side="right") - 1
        for number in np.unique(owner[batch.valid]).tolist():
            mask = batch.valid & (owner == number)
            part: Any = jax.tree.map(lambda x, mask=mask: x[mask], batch)
            frames, index, place = part.sample_id - starts[number], indexes[number], places[number]
            rows: dict[str, np.ndarray] = {"image": part.image}
            if loader.depth:
                rows["depth"] = _counts(part.depth, index)
            if index.spec.intrinsics:
                rows["intrinsics"] = part.intrinsics
            if loader.extra:
                rows |= part.extra
            for key, value in rows.items():
                _write_rows(file, start, place[key], frames, value)
        count = int(batch.valid.sum())
        written += count
        yield count
    if written != starts[-1]:
        raise InputError(f"{starts[-1] - written} frames of the split {split!r} cannot be read, so it cannot be packed")


def _write_rows(file: int, start: int, place: Sequence[Any], frames: np.ndarray, value: np.ndarray) -> None:
    """Write rows of an array, those of consecutive frames together. `frames` are their numbers, at least one."""
    offset, dtype, shape = place
    stride = np.dtype(dtype).itemsize * prod(shape[1:])
    value = np.ascontiguousarray(value, dtype)
    for run in np.split(np.arange(len(frames)), np.flatnonzero(np.diff(frames) != 1) + 1):
        _write(file, value[run[0] : run[-1] + 1], start + offset + int(frames[run[0]]) * stride)


def _counts(depth: np.ndarray, index: Index) -> np.ndarray:
    """Depth in metres → u16 counts that convert back to exactly these metres; u16 input already is counts."""
    if depth.dtype == np.uint16:
        return depth
    counts = np.rint(depth.astype(np.float64) / index.spec.depth_unit).astype(np.uint16)
    if not np.array_equal(_metres(counts, index), depth):
        raise InputError(f"the depth of dataset {index.name!r} is not a multiple of {index.spec.depth_unit} m")
    return counts


def _metres(counts: np.ndarray, index: Index, out: np.ndarray | None = None) -> np.ndarray:
    return np.multiply(counts, np.float32(index.spec.depth_unit), out=out, dtype=np.float32)


def _write(file: int, array: np.ndarray, offset: int) -> None:
    data = array.reshape(-1).view(np.uint8).data  # no copy
    while data:
        count = os.pwrite(file, data, offset)
        data, offset = data[count:], offset + count


def _data_start(header: int) -> int:
    return -(-(_PREFIX.size + header) // ALIGNMENT) * ALIGNMENT


def _named(data: DataConfig) -> dict[str, Any]:
    """The parts of the config that identify the data, as plain JSON; paths do not matter."""
    named = {key: value for key in _NAMES if (value := getattr(data, key))}
    if "datasets" in named:
        entries = [{key: value for key, value in entry.items() if key != "path"} for entry in named["datasets"]]
        named["datasets"] = [entry | {"weight": entry.get("weight", 1.0)} for entry in entries]
    return json.loads(json.dumps(named, default=dataclasses.asdict))


class Packed:
    """The frames of the files in `data.packed`. See `reader.Source`. Raises InputError for files that `write_pack` did
    not write, and for files that do not fit together.

    A dataset's weight in the mixture is its own times its file's. A dataset that is in several files has the statistics
    of the first of them, and the tokenizer is the first file's. Adding a file therefore does not change what a model's
    actions mean.
    """

    def __init__(self, config: DataConfig, image_size: int, depth: bool):
        self._image_size, self._depth, self._read_block = image_size, depth, config.read_block or 1
        self._files = [_File(path, weight, config, image_size, depth) for path, weight in config.packed_files.items()]
        self._train_split, self.tokenizer = config.split, self._files[0].tokenizer
        self.entries = tuple(entry for file in self._files for entry in file.entries)
        first: dict[str, Entry] = {}
        check_drop(config.drop, list(dict.fromkeys(entry.name for entry in self.entries)))
        for entry in self.entries:
            if (before := first.setdefault(entry.name, entry)).spec != entry.spec:
                specs = dataclasses.asdict(before.spec), dataclasses.asdict(entry.spec)
                key = next(key for key, value in specs[0].items() if value != specs[1][key])
                raise InputError(
                    f"{before.path} and {entry.path} both hold the dataset {entry.name!r}, with {key} "
                    f"{specs[0][key]!r} and {specs[1][key]!r}: the specs must be equal"
                )

    def index(self, split: str) -> tuple[Index, ...]:
        """A file may lack a split of another file, except the training split."""
        lacking = [file.describe_lack(split) for file in self._files if split not in file.splits]
        if lacking and (split == self._train_split or len(lacking) == len(self._files)):
            raise InputError("; ".join(lacking))
        indexes, first = [index for file in self._files for index in file.index(split)], {}
        for entry, index in zip(self.entries, indexes, strict=True):
            before, statistics = first.setdefault(index.name, (entry, index.statistics))
            if split == self._train_split and (beyond := exceeding(statistics, index.statistics)):
                warn(
                    f"dataset {index.name!r} has the statistics of {before.path}; the {beyond} of its actions in "
                    f"{entry.path} exceed that range by more than half of it, and will be clipped"
                )
        return tuple(dataclasses.replace(index, statistics=first[index.name][1]) for index in indexes)

    def choose_block(self, indexes: tuple[Index, ...]) -> int:
        return self._read_block

    def pixels(
        self, split: Split, samples: Samples, steps: range, batch_size: int, windows: tuple[int, ...] = ()
    ) -> Iterator[Pixels]:
        size = self._image_size

        def read(ids: np.ndarray) -> Pixels:
            image = np.empty((batch_size, size, size, 3), np.uint8)
            depth = np.empty((batch_size, size, size), np.float32) if self._depth else None
            for row, (dataset, frame) in enumerate(zip(*split.locate(ids), strict=True)):
                index = split.indexes[dataset]
                image[row] = index.arrays["image"][frame]  # one copy; indexing with an array would make another
                if depth is not None:
                    _metres(index.arrays["depth"][frame], index, out=depth[row])
            return checked(split, Pixels(ids, image, np.full((batch_size, 2), size, np.int32), depth))

        # Copying releases the GIL, so batches are read while the caller trains on earlier ones.
        reading: deque[Future[Pixels]] = deque()
        with ThreadPoolExecutor(_AHEAD) as pool:
            for step in steps:
                reading.append(pool.submit(read, samples(step)))
                if len(reading) > _AHEAD:
                    yield reading.popleft().result()
            while reading:
                yield reading.popleft().result()


class _File:
    """One packed file, whose datasets' weights are multiplied by `weight`."""

    def __init__(self, name: str, weight: float, config: DataConfig, image_size: int, depth: bool):
        self._path = path = to_path(name)
        self._memory, self._start, header = _open(cached_copy(path, config.local_cache / "packed"))
        if header["image_size"] != image_size:
            raise InputError(f"{path} holds images of {header['image_size']} px, but the model's are {image_size} px")
        if depth and not header["depth"]:
            raise InputError(f"{path} holds no depth, which the config requires")
        for key, value in _named(config).items():
            if value != header["config"].get(key):
                raise InputError(
                    f"config key data.{key} names other data than {path} holds: leave it empty or pack again"
                )
        self.splits = header["splits"]
        self.tokenizer = Tokenizer.from_bytes(base64.b64decode(header["tokenizer"]))
        self.entries = tuple(
            Entry(entry["name"], make_spec(entry["spec"], {}, entry["name"]), str(path), weight * entry["weight"])
            for entry in header["datasets"]
        )

    def describe_lack(self, split: str) -> str:
        return f"{self._path} has no split {split!r}: it has {', '.join(self.splits)}"

    def index(self, split: str) -> Iterator[Index]:
        """The index of each dataset, without frames if the file lacks the split."""
        rows = slice(None if split in self.splits else 0)
        for entry, meta in zip(self.entries, self.splits.get(split) or next(iter(self.splits.values())), strict=True):
            if split in self.splits:
                self._warn_of_changes(entry.name, meta.get("made_from") or {})
            yield Index(
                name=entry.name,
                spec=entry.spec,
                files=tuple(meta["files"]),
                instructions=tuple(meta["instructions"]),
                statistics=meta["statistics"],
                num_read=meta["num_read"] if split in self.splits else 0,
                skipped=meta["skipped"] if split in self.splits else {},
                arrays={key: self._array(*place)[rows] for key, place in meta["arrays"].items()},
                maps=(self._memory,),
                made_from=meta.get("made_from", {}),
            )

    def _warn_of_changes(self, name: str, made_from: Mapping[str, Any]) -> None:
        """Warn if the packed data still exists at its original place on this machine and has changed. Data in a bucket
        is not looked for: a packed file also serves where that bucket cannot be reached."""
        if made_from and not is_url(made_from["place"]) and os.path.isdir(made_from["place"]):
            files = list_files(to_path(made_from["place"]))
            shards = made_from["shards"]
            if changed := [file for file, *stat, _, _, _ in shards if files.get(file) != tuple(stat)]:
                warn(f"dataset {name!r} changed since it was packed in {self._path} ({enumerate_some(changed)})")

    def _array(self, offset: int, dtype: str, shape: list[int]) -> np.ndarray:
        return np.frombuffer(self._memory, dtype, prod(shape), self._start + offset).reshape(shape)


def packed_digest(packed: str | os.PathLike[str] | Mapping[str, float]) -> str:
    """SHA-256 of a packed file's header, which covers everything except the pixels; of several files with weights, as
    in `data.packed`, that of their digests and weights. Raises InputError."""
    if isinstance(packed, Mapping):
        parts = [[packed_digest(path), float(weight)] for path, weight in packed.items()]  # 1 and 1.0 are one weight
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    path = to_path(packed)
    if isinstance(path, Path):
        _open(path)
    return _PREFIX.unpack(read_range(path, 0, _PREFIX.size))[3].hex()


def packed_names(config: DataConfig) -> list[str]:
    """The names of the datasets in the packed files of `config`. Raises InputError or StorageError."""
    files = (cached_copy(to_path(path), config.local_cache / "packed") for path in config.packed_files)
    return [entry["name"] for file in files for entry in _open(file)[2]["datasets"]]


def _open(path: Path) -> tuple[mmap.mmap, int, dict[str, Any]]:
    """(the mapped file, offset of its arrays, its header)."""
    try:
        with open(path, "rb") as file:
            prefix = file.read(_PREFIX.size)
            if len(prefix) < _PREFIX.size or not prefix.startswith(MAGIC):
                raise InputError(f"{path} is not a packed dataset")
            _, version, length, digest = _PREFIX.unpack(prefix)
            if not 1 <= version <= VERSION:
                raise InputError(f"{path} is a packed dataset of version {version}; this program reads 1 to {VERSION}")
            text = file.read(length)
            if hashlib.sha256(text).digest() != digest:
                raise InputError(f"{path} is damaged: the checksum of its header is wrong")
            header = json.loads(text)
            start = _data_start(length)
            if (size := os.fstat(file.fileno()).st_size) != start + header["bytes"]:
                raise InputError(
                    f"{path} is damaged: it has {size:,} bytes and should have {start + header['bytes']:,}"
                )
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), start, header
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
