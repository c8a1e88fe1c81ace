"""A dataset's sidecar index: every frame's place in the unmodified TFRecords, and the small arrays of all episodes.

Made in one pass, kept in a cache directory, memory-mapped when used: host memory does not grow with the dataset.

An index is a directory of meta.json and one file for each array of `index_parts.layout`. meta.json says what the index
was made from: the dataset's place, the spec, and the size and modification time of every shard. Each start compares
these, and rebuilds the index where anything differs, or where a part of it is missing or damaged. Content that changes
while size and time stay the same is caught by checksums of records and frames: the index holds them, and the reader
compares them.
"""

import dataclasses
import errno
import functools
import hashlib
import json
import mmap
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from jaxtyping import Float32, Int64

from spatialvla_jax.actions import DIMENSIONS
from spatialvla_jax.data.index_parts import Part, layout, merge_parts, read_part
from spatialvla_jax.data.oxe.spec import DatasetSpec, meaning
from spatialvla_jax.data.rlds import UNLABELED, Shard, enumerate_some, open_rlds, slice_shards
from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.atomic import PREFIX, replacing
from spatialvla_jax.utils.distributed import ALONE, Processes
from spatialvla_jax.utils.progress import warn

VERSION = 4  # of the files and of what is in them; another one makes a new index
META = "meta.json"
CHECKSUM_BYTES = 4  # of a record, right behind it
_SAMPLE = 16  # records of an index whose checksums are compared at each start


@dataclasses.dataclass(frozen=True)
class Faults:
    """What to do about bad data: `policy` "fail", or "skip" it, count it and go on up to `limit` times."""

    policy: str = "fail"
    limit: float = 0  # whole, as is checked below

    def __post_init__(self) -> None:
        if self.policy not in ("fail", "skip") or not isinstance(self.limit, int) or self.limit < 0:
            raise InputError(
                f"data.faults has policy {self.policy!r} and limit {self.limit!r}: expected fail or skip, and a number"
            )

    def check(self, counts: Mapping[str, int], what: str) -> None:
        """Raises InputError when more was left out than the limit allows."""
        faults = {reason: count for reason, count in counts.items() if reason != UNLABELED}
        if (total := sum(faults.values())) > self.limit:
            listed = ", ".join(f"{count} {reason}" for reason, count in sorted(faults.items()))
            raise InputError(f"{total} {what} are faulty ({listed}), more than the {self.limit} of data.faults.limit")


@dataclasses.dataclass(frozen=True)
class Index:
    """One split of one dataset: N frames of E episodes. Arrays are memory-mapped.

    A frame is a step with a picture, and every step is one but in a recording with pictures of some steps only
    (`record libero --every`). `action` has a row for every step; there, `action_row` i64[N] is that of each frame and
    `action_end` i64[E] the end of each episode's.
    """

    name: str
    spec: DatasetSpec
    files: tuple[str, ...]
    instructions: tuple[str, ...]
    statistics: dict[str, Any]  # of this split, in the release's layout
    num_read: int  # episodes that the split holds: those used and those skipped
    skipped: Mapping[str, int]  # episodes left out, by reason
    arrays: Mapping[str, np.ndarray]
    maps: tuple[mmap.mmap, ...] = ()  # what the arrays look into
    made_from: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # see `Source`
    gaussians: Any = None  # f64[6, 2] as `fit_gaussians` on the actions normalised by `statistics`, where it is known
    directory: Path | None = None  # where it is kept

    @property
    def num_frames(self) -> int:
        return int(self.arrays["episode_end"][-1])

    @property
    def num_episodes(self) -> int:
        return len(self.arrays["episode_end"])

    def episode(self, frames: Any) -> np.ndarray | np.int64:
        """The episode i64[...] of each frame."""
        return np.searchsorted(self.arrays["episode_end"], frames, side="right")

    def spans(self, key: str, frames: Any) -> Int64[np.ndarray, "*B 3"]:
        """Where each frame's image or depth map ("image", "depth") is stored: offset in its episode's file, length, and
        CRC-32C of these bytes."""
        spans = self.arrays[key][frames].astype(np.int64)
        spans[..., 0] += self.arrays["episode_record"][self.episode(frames), 0]
        return spans

    def mean_size(self, key: str) -> float:
        """Mean bytes of a stored image or depth map, from about a thousand of them."""
        return float(self.arrays[key][:: max(1, self.num_frames // 1000), 1].mean())

    def language(self, frames: Any) -> np.ndarray | np.int32:
        """Which of `instructions` each frame has, i32[...]."""
        return self._in_runs("language", frames)

    def intrinsics(self, frames: Any) -> Float32[np.ndarray, "*B 3 3"]:
        """Each frame's, in pixels of its stored image; of a dataset that has them."""
        return self._in_runs("intrinsics", frames)

    def step(self, frames: Any) -> np.ndarray | np.int64:
        """Each frame's number in its stored episode, i64[...]."""
        steps = self._in_runs("step", frames)
        return steps + frames if "step_end" in self.arrays else steps

    def _in_runs(self, key: str, frames: Any) -> Any:
        """The values of an array that has a row for every run of frames or, in packed files, for every frame."""
        if (ends := self.arrays.get(f"{key}_end")) is not None:
            frames = np.searchsorted(ends, frames, side="right")
        return self.arrays[key][frames]

    def action_rows(self, frames: Any) -> tuple[np.ndarray, np.ndarray]:
        """Where in `action` each frame's is, and where its episode's end, i64[...] both."""
        episode = self.episode(frames)
        if "action_row" in self.arrays:
            return self.arrays["action_row"][frames], self.arrays["action_end"][episode]
        return np.asarray(frames), self.arrays["episode_end"][episode]

    def release(self) -> None:
        """Gives the touched pages back: they stay in the system's cache, not in this process's resident set."""
        for memory in self.maps:
            memory.madvise(mmap.MADV_DONTNEED)

    def describe(self, frame: int) -> str:
        """Names a frame in an error: dataset, file, episode within the file, step."""
        episode = self.episode(frame)
        return (
            f"dataset {self.name!r}, file {self.files[self.arrays['episode_file'][episode]]}, "
            f"episode {self.arrays['episode_number'][episode]}, step {self.step(frame)}"
        )

    def record(self, episode: int) -> tuple[str, int, bytes]:
        """File and offset of the checksum of an episode's record, and what it was when it was indexed."""
        offset, length, checksum = self.arrays["episode_record"][episode].tolist()
        file = self.files[self.arrays["episode_file"][episode]]
        return file, offset + length, checksum.to_bytes(CHECKSUM_BYTES, "little")

    def forget(self) -> None:
        """Makes the next start index the data again."""
        if self.directory:
            with suppress(OSError):
                (self.directory / META).unlink()


Kept = tuple[Index, dict[str, Any]]  # an index and its meta.json


class _Stale(Exception):
    """A cached index cannot be used; the message says why."""


class Source(NamedTuple):
    """A split of a dataset, of which an index is made."""

    name: str
    spec: DatasetSpec
    builder: Any  # of TFDS
    shards: Sequence[Shard]
    # What decides what is read, as JSON: "place", the dataset's full path; "split"; "spec", its `meaning`; "features",
    # its types; "shards", each (name, bytes, modification time, first and end of its episodes that belong to the split,
    # episodes); "action_dim".
    made_from: dict[str, Any]

    @property
    def folder(self) -> str:
        """The name of its index's directory."""
        made_from = self.made_from
        words = [re.sub("[^0-9A-Za-z]+", "_", word)[:80] for word in (self.name, made_from["split"])]
        identity = [self.name, made_from["place"], made_from["split"], made_from["spec"]["fields"]]
        return "-".join([*words, _digest(identity)])


def find_source(
    name: str, path: str | os.PathLike[str], spec: DatasetSpec, split: str, action_dim: int = len(DIMENSIONS)
) -> Source:
    """Raises InputError for a dataset, a split or a shard that does not exist."""
    builder = open_rlds(path)
    shards = slice_shards(builder, split)
    made_from = {
        "place": os.path.realpath(path),
        "split": split,
        "spec": meaning(spec),
        "features": builder.info.features.to_json(),
        "shards": [(s.file.name, s.size, s.version, s.numbers.start, s.numbers.stop, s.listed) for s in shards],
        "action_dim": action_dim,
    }
    return Source(name, spec, builder, shards, json.loads(json.dumps(made_from)))


def read_shard(source: Source, number: int) -> bytes:
    """The part of a shard, to be merged."""
    action_dim = source.made_from["action_dim"]
    return read_part(source.name, source.builder, number, source.shards[number], source.spec, action_dim).to_bytes()


def make_index(
    source: Source,
    cache_dir: str | os.PathLike[str],
    progress: Callable[[str, int, int], None] | None = None,
    faults: Faults = Faults(),
    processes: Processes = ALONE,
    read: Callable[[Source, int], bytes] = read_shard,
) -> Index:
    """The index of a split, from the cache or made now. `progress(name, shards done, shards)` is called meanwhile.

    Several `processes` call this together: where one of them has no index, each reads its part of the shards (`read`),
    or the first that has one gives it to the others; all end with the same index, each in its own `cache_dir` or
    together in one.

    What is indexed has been read in full and checked, except that images are not decoded yet. Raises InputError for a
    cache that cannot be written and for anything wrong with the data; under the policy "skip" only when too much is.
    """
    directory = Path(cache_dir) / source.folder
    kept = find_kept(source, directory)
    having = [number for number, has in enumerate(processes.gather(b"kept" if kept else b"")) if has]
    if len(having) < processes.count:
        if having:
            parts = _share(kept if processes.index == having[0] else None, processes)
        else:
            parts = _read_parts(source, processes, progress, read)
        if kept:
            for _ in parts:  # the others need them
                pass
        else:
            kept = _build(directory, source, faults, parts)
    assert kept
    index, meta = kept
    # The policy is not in the key: without faults it makes no difference, and with them the index says so.
    if meta["fault"] and faults.policy == "fail":
        raise InputError(meta["fault"])
    return dataclasses.replace(index, directory=directory)


def _read_parts(
    source: Source,
    processes: Processes,
    progress: Callable[[str, int, int], None] | None,
    read: Callable[[Source, int], bytes],
) -> Iterator[Part]:
    """The parts of all shards in order, of which this process reads every `processes.count`-th."""
    count = len(source.shards)
    for first in range(0, count, processes.count):
        number = first + processes.index
        for data in processes.gather(read(source, number) if number < count else b""):
            if data:
                yield Part.from_bytes(data)
        if progress:
            progress(source.name, min(first + processes.count, count), count)


def _share(kept: Kept | None, processes: Processes) -> Iterator[Part]:
    """The index that one process has `kept`, as a part."""
    data = b""
    if kept:
        index, meta = kept
        data = Part(index.arrays, index.instructions, index.skipped, meta["fault"]).to_bytes()
    yield from (Part.from_bytes(part) for part in processes.gather(data) if part)


def find_kept(source: Source, directory: Path) -> Kept | None:
    """The index in a directory, if it is whole and that of the source as it is now; otherwise says why not."""
    try:
        kept = _open(source, directory)
        _check_current(*kept)
        return kept
    except (FileNotFoundError, NotADirectoryError):
        return None  # there is none yet
    except (OSError, _Stale) as reason:
        warn(f"dataset {source.name!r} is indexed again: {reason}")
        return None


def _open(source: Source, directory: Path) -> Kept:
    """The index in a directory and its meta.json. Raises FileNotFoundError when there is none, _Stale for one that is
    damaged or made from something else."""
    made_from = source.made_from
    folder = os.open(directory, os.O_RDONLY)  # stays this one when another process puts its own in its place
    try:
        opener = functools.partial(os.open, dir_fd=folder)
        with open(META, encoding="utf-8", opener=opener) as file:
            meta = json.load(file)
        if meta.get("version") != VERSION:
            raise _Stale("another version of this program made its index")
        if meta.pop("digest") != _digest(meta):
            raise ValueError(f"the checksum of {META} is wrong")
        if meta["made_from"] != made_from:
            raise _Stale(_difference(meta["made_from"], made_from))
        arrays, maps = {}, []
        for key, (dtype, shape) in layout(source.spec, made_from["action_dim"]).items():
            with open(f"{key}.bin", "rb", opener=opener) as file:
                if _checksum(iter(functools.partial(file.read, 1 << 22), b"")) != meta["checksums"][key]:
                    raise ValueError(f"the checksum of {file.name} is wrong")
                maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            arrays[key] = np.frombuffer(maps[-1], dtype).reshape(-1, *shape)
        files, instructions = tuple(os.fspath(shard.file) for shard in source.shards), tuple(meta["instructions"])
        about = meta["statistics"], meta["read"], meta["skipped"]
        gaussians = meta["gaussians"]
        kept = Index(source.name, source.spec, files, instructions, *about, arrays, tuple(maps), made_from, gaussians)
        return kept, meta
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _Stale(f"its index {directory} is damaged ({error})") from error
    finally:
        os.close(folder)


def _checksum(parts: Iterable[bytes]) -> int:
    return functools.reduce(google_crc32c.extend, parts, 0)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Why an index that was made from one thing is not that of the other."""
    if before["spec"] != now["spec"]:
        return "the code of its operations changed"
    old, new = ({name: rest for name, *rest in source["shards"]} for source in (before, now))
    if changed := sorted(file for file in old.keys() | new.keys() if old.get(file) != new.get(file)):
        return f"{len(changed)} of its files changed since then ({enumerate_some(changed)})"
    return f"its {' and '.join(key for key in now if before.get(key) != now[key])} changed since then"


def _check_current(index: Index, meta: Mapping[str, Any]) -> None:
    """Raises _Stale when some of the indexed records are others now, or some files could not be read."""
    if "unreadable file" in meta["skipped"]:
        raise _Stale("some of its files could not be read the last time")
    for episode in np.unique(np.linspace(0, index.num_episodes - 1, _SAMPLE).astype(int)).tolist():
        path, offset, checksum = index.record(episode)
        with suppress(OSError), open(path, "rb", buffering=0) as file:  # one that cannot be read says so later
            if os.pread(file.fileno(), CHECKSUM_BYTES, offset) != checksum:
                raise _Stale(f"{path} has the size and the time that it had, but other records")


def _build(directory: Path, source: Source, faults: Faults, parts: Iterator[Part]) -> Kept:
    """Writes an index in the place of the one that may be there, and opens it. Raises InputError."""
    opened, before = None, _inode(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with replacing(directory) as work:
            work.mkdir()
            _write(work, source, faults, parts)
            opened = _open(source, work)
            if before is not None and _inode(directory) == before:
                _remove(directory)
    except OSError as error:
        if opened and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return opened  # another process has put one there meanwhile
        raise InputError(
            f"the index of dataset {source.name!r} cannot be kept in {directory.parent} ({error.strerror or error}): "
            "set data.cache_dir to a folder that can be written and has room"
        ) from error
    return opened


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


def _remove(directory: Path) -> None:
    """Takes an index away in one step, so that others see all of it or nothing."""
    aside = directory.with_name(f"{PREFIX}{secrets.token_hex(4)}")
    with suppress(FileNotFoundError):
        directory.rename(aside)
        if aside.is_dir():
            shutil.rmtree(aside)
        else:
            aside.unlink()


def _write(work: Path, source: Source, faults: Faults, parts: Iterator[Part]) -> None:
    """Writes the files of an index to the directory `work`."""

    def check(part: Part, skipped: Mapping[str, int]) -> None:
        if part.fault and faults.policy == "fail":
            raise InputError(part.fault)
        faults.check(skipped, f"episodes of the dataset {source.name!r}")

    merged = merge_parts(parts, layout(source.spec, source.made_from["action_dim"]), work, check)
    skipped = merged["skipped"]
    if not merged["statistics"]:
        listed = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
        raise InputError(f"Dataset {source.name!r} ({source.builder.data_dir}) has no episode to use ({listed})")
    read = sum(len(shard.numbers) for shard in source.shards) + skipped.get("unlisted", 0)
    meta = {"version": VERSION, "made_from": source.made_from, "read": read} | merged
    (work / META).write_text(json.dumps(meta | {"digest": _digest(meta)}, indent=2), "utf-8")
