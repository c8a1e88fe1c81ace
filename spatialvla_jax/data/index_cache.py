"""Where indexes come from: the cache, a copy of the one in a bucket, or the data itself, which several processes read.

Each start compares what an index was made from with what there is, and makes it again where anything differs, or where
a part of it is missing or damaged. Content that changes on a disk while size and time stay the same is caught by
checksums of records and frames: the index holds them, and the reader compares them.
"""

import dataclasses
import errno
import functools
import json
import mmap
import os
import secrets
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from tqdm import tqdm

from spatialvla_jax.actions import DIMENSIONS
from spatialvla_jax.data.index import CHECKSUM_BYTES, FAIL, META, Faults, Index, Source, digest
from spatialvla_jax.data.index_parts import Part, layout, merge_parts, read_part
from spatialvla_jax.data.oxe.spec import DatasetSpec, meaning
from spatialvla_jax.data.rlds import enumerate_some, open_rlds, slice_shards
from spatialvla_jax.errors import InputError, StorageError
from spatialvla_jax.utils.atomic import PREFIX, disk_errors, replacing
from spatialvla_jax.utils.distributed import ALONE, Processes
from spatialvla_jax.utils.progress import warn
from spatialvla_jax.utils.storage import (
    AnyPath,
    download,
    is_file,
    is_url,
    list_files,
    read_bytes,
    read_ranges,
    read_text,
    upload_folder,
)

LOCAL_CACHE = "~/.cache/spatialvla_jax"  # of indexes that are kept in a bucket, or without data.cache_dir
VERSION = 4  # of the files and of what is in them; another one makes a new index
_TOGETHER = 8  # indexes that are read or copied at the same time
# Bytes up to which an array is kept in memory; larger ones are mapped. Every draw needs its place in a file.
_HELD = {"action": 0, "image": 2**27, "depth": 2**27}
_HELD_OTHERS = 2**24
_PIECE = 2**20  # bytes that are read at a time for a checksum; the memory of larger ones is new each time
_END = 64  # bytes at the end of meta.json, which hold its digest
_SAMPLE = 16  # records of an index whose checksums are compared at each start

Kept = tuple[Index, dict[str, Any]]  # an index and its meta.json


class _Stale(Exception):
    """A cached index cannot be used; the message says why."""


def find_source(
    name: str, path: str | os.PathLike[str], spec: DatasetSpec, split: str, action_dim: int = len(DIMENSIONS)
) -> Source:
    """Raises InputError for a dataset, a split or a shard that does not exist."""
    builder = open_rlds(path)
    shards = slice_shards(builder, split)
    made_from = {
        "place": os.fspath(path) if is_url(path) else os.path.realpath(path),
        "split": split,
        "spec": meaning(spec),
        "features": builder.info.features.to_json(),
        "shards": [(s.file.name, s.size, s.version, s.numbers.start, s.numbers.stop, s.listed) for s in shards],
        "action_dim": action_dim,
    }
    return Source(name, spec, builder, shards, json.loads(json.dumps(made_from, sort_keys=True)))


def read_shard(source: Source, number: int) -> bytes:
    """The part of a shard, to be merged."""
    action_dim = source.made_from["action_dim"]
    return read_part(source.name, source.builder, number, source.shards[number], source.spec, action_dim).to_bytes()


def load_indexes(
    sources: Sequence[Source],
    cache_dir: AnyPath,
    progress: Callable[[str, int, int], None] | None = None,
    faults: Faults = FAIL,
    processes: Processes = ALONE,
    read: Callable[[Source, int], bytes] = read_shard,
) -> list[Index]:
    """The indexes of these splits, from the cache or made now. `progress(name, shards done, shards)` is called
    meanwhile. Of a cache in a bucket this host keeps a copy, in `LOCAL_CACHE`.

    Several `processes` call this together: where one of them has no index, each reads its part of the shards (`read`),
    or the first that has one gives it to the others; all end with the same index, each in its own cache or together in
    one.

    What is indexed has been read in full and checked, except that images are not decoded yet. Raises InputError for a
    cache that cannot be written and for anything wrong with the data; under the policy "skip" only when too much is.
    """
    return complete_indexes(sources, find_indexes(sources, cache_dir), cache_dir, progress, faults, processes, read)


def find_indexes(sources: Sequence[Source], cache_dir: AnyPath) -> list[Kept | None]:
    """The indexes in the cache, those in a bucket copied to this host; None for what is missing, or of other data than
    there is now."""
    local = _local(cache_dir)
    with ThreadPoolExecutor(_TOGETHER) as pool:  # checksums let go of Python's lock
        kept = list(pool.map(lambda source: _find_kept(source, local / source.folder), sources))
        if not is_url(cache_dir):
            return kept
        missing = [source for source, one in zip(sources, kept, strict=True) if one is None]
        stored = list(pool.map(lambda source: _read_meta(source, cache_dir / source.folder), missing))
        wanted = [source for source, text in zip(missing, stored, strict=True) if text]
        _announce([cache_dir / source.folder for source in wanted], cache_dir, local)
        copied = pool.map(lambda source: _copy(source, cache_dir / source.folder, local / source.folder), wanted)
        found = {source.folder: one for source, one in zip(wanted, copied, strict=True)}
    return [one or found.get(source.folder) for source, one in zip(sources, kept, strict=True)]


def complete_indexes(
    sources: Sequence[Source],
    kept: Sequence[Kept | None],
    cache_dir: AnyPath,
    progress: Callable[[str, int, int], None] | None = None,
    faults: Faults = FAIL,
    processes: Processes = ALONE,
    read: Callable[[Source, int], bytes] = read_shard,
) -> list[Index]:
    """The indexes of which some are `kept`, see `load_indexes`; the first process puts into a bucket what it lacks."""
    local, indexes = _local(cache_dir), []
    for source, one in zip(sources, kept, strict=True):
        index, meta = _complete(source, one, local / source.folder, progress, faults, processes, read)
        # The policy is not in the key: without faults it makes no difference, and with them the index says so.
        if meta["fault"] and faults.policy == "fail":
            raise InputError(meta["fault"])
        places = [directory / source.folder for directory in dict.fromkeys([local, cache_dir])]
        indexes.append(dataclasses.replace(index, directories=tuple(places)))
    if is_url(cache_dir) and processes.index == 0:
        same = _same_in_bucket(sources, local, cache_dir)
        for source, one, stored in zip(sources, kept, same, strict=True):
            if one is None or not (
                stored or _read_meta(source, cache_dir / source.folder)
            ):  # new, or the bucket's none
                upload_folder(local / source.folder, cache_dir / source.folder, META)
    return indexes


def _local(cache_dir: AnyPath) -> Path:
    return Path(LOCAL_CACHE).expanduser() if is_url(cache_dir) else Path(cache_dir)


def _complete(
    source: Source,
    kept: Kept | None,
    directory: Path,
    progress: Callable[[str, int, int], None] | None,
    faults: Faults,
    processes: Processes,
    read: Callable[[Source, int], bytes],
) -> Kept:
    """The index that this process has `kept`, or a new one, made by all of them."""
    having = [number for number, has in enumerate(processes.gather(b"kept" if kept else b"")) if has]
    if having:
        parts = _share(kept if processes.index == having[0] else None, processes)
    else:
        parts = _read_parts(source, processes, progress, read)
    if not kept:
        return _place(source, directory, lambda work: _write(work, source, faults, parts))
    if len(having) < processes.count:
        for _ in parts:  # the others need them
            pass
    return kept


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


def _find_kept(source: Source, directory: Path) -> Kept | None:
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


def _read_meta(source: Source, url: AnyPath) -> str:
    """The meta.json of an index in a bucket, "" without one of the source as it is now."""
    if not is_file(url / META):
        return ""
    text = read_text(url / META)
    try:
        _check_meta(source, text)
    except (_Stale, ValueError, LookupError, TypeError, AttributeError) as reason:
        warn(f"dataset {source.name!r} has another index in {url}: {reason}")
        return ""
    return text


def _same_in_bucket(sources: Sequence[Source], local: Path, cache_dir: AnyPath) -> list[bool]:
    """Whether the bucket has the index that is kept here: whether meta.json ends with the same digest at the same
    place, which takes one small request for each."""
    metas = [(local / source.folder / META).read_bytes() for source in sources]
    urls = [cache_dir / source.folder / META for source in sources]
    ranges = [(url, len(meta) - _END, _END) for url, meta in zip(urls, metas, strict=True)]
    ends = read_ranges(ranges)
    if failed := [end for end in ends if isinstance(end, StorageError)]:
        raise failed[0]
    return [end == meta[-_END:] for end, meta in zip(ends, metas, strict=True)]


def _announce(urls: Sequence[AnyPath], cache_dir: AnyPath, local: Path) -> None:
    """Says how large the indexes are that are about to be copied. Raises InputError where they have no room."""
    if not urls:
        return
    with ThreadPoolExecutor(_TOGETHER) as pool:
        size = sum(size for files in pool.map(list_files, urls) for size, _ in files.values())
    tqdm.write(f"{len(urls)} indexes, {size / 1e6:,.1f} MB, are copied from {cache_dir} to {local}", file=sys.stderr)
    with disk_errors(local):
        local.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(local).free) < size:
            raise InputError(f"{local} has {free:,} bytes left, and the indexes in {cache_dir} need {size:,}")


def _copy(source: Source, url: AnyPath, directory: Path) -> Kept | None:
    """Copies an index from a bucket; None for one that is damaged or is being replaced."""

    def write(work: Path) -> None:
        try:
            for key in layout(source.spec, source.made_from["action_dim"]):
                download(url / f"{key}.bin", work / f"{key}.bin")
            (work / META).write_bytes(read_bytes(url / META))
        except InputError as error:
            raise _Stale(str(error)) from error

    try:
        kept = _place(source, directory, write)
        _check_current(*kept)
        return kept
    except _Stale as reason:
        warn(f"dataset {source.name!r} has an index in {url} that cannot be used: {reason}")
        return None


def _open(source: Source, directory: Path) -> Kept:
    """The index in a directory and its meta.json. Raises FileNotFoundError when there is none, _Stale for one that is
    damaged or made from something else."""
    made_from = source.made_from
    folder = os.open(directory, os.O_RDONLY)  # stays this one when another process puts its own in its place
    try:
        opener = functools.partial(os.open, dir_fd=folder)
        with open(META, encoding="utf-8", opener=opener) as file:
            meta = _check_meta(source, file.read())
        arrays, maps, descriptors = {}, [], {}
        for key, (dtype, shape) in layout(source.spec, made_from["action_dim"]).items():
            with open(f"{key}.bin", "rb", buffering=0, opener=opener) as file:
                mapped = os.fstat(file.fileno()).st_size > _HELD.get(key, _HELD_OTHERS)
                data: bytes | mmap.mmap = b"" if mapped else file.readall()
                pieces = iter(functools.partial(file.read, _PIECE), b"") if mapped else [data]
                if functools.reduce(google_crc32c.extend, pieces, 0) != meta["checksums"][key]:
                    raise ValueError(f"the checksum of {file.name} is wrong")
                if mapped:
                    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                    descriptors[key] = os.dup(file.fileno())
                    weakref.finalize(data, os.close, descriptors[key])
                    maps.append(data)
            arrays[key] = np.frombuffer(data, dtype).reshape(-1, *shape)
        files, instructions = tuple(os.fspath(shard.file) for shard in source.shards), tuple(meta["instructions"])
        about = meta["statistics"], meta["read"], meta["skipped"]
        opened = arrays, tuple(maps), descriptors
        return Index(source.name, source.spec, files, instructions, *about, *opened, made_from, meta["gaussians"]), meta
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _Stale(f"its index {directory} is damaged ({error})") from error
    finally:
        os.close(folder)


def _check_meta(source: Source, text: str) -> dict[str, Any]:
    """The content of meta.json. Raises _Stale for an index of another source, ValueError and the like for damage."""
    meta = json.loads(text)
    if meta.get("version") != VERSION:
        raise _Stale("another version of this program made its index")
    if meta.pop("digest") != digest(meta):
        raise ValueError(f"the checksum of {META} is wrong")
    if meta["made_from"] != source.made_from:
        raise _Stale(_difference(meta["made_from"], source.made_from))
    return meta


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
    if any(map(is_url, index.files)):  # an object's version, which is compared already, says it all
        return
    for episode in np.unique(np.linspace(0, index.num_episodes - 1, _SAMPLE).astype(int)).tolist():
        path, offset, checksum = index.record(episode)
        with suppress(OSError), open(path, "rb", buffering=0) as file:  # one that cannot be read says so later
            if os.pread(file.fileno(), CHECKSUM_BYTES, offset) != checksum:
                raise _Stale(f"{path} has the size and the time that it had, but other records")


def _place(source: Source, directory: Path, write: Callable[[Path], None]) -> Kept:
    """Puts an index that `write` makes in the place of the one that may be there, and opens it. Raises InputError."""
    opened, before = None, _inode(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with replacing(directory) as work:
            work.mkdir()
            write(work)
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
    (work / META).write_text(json.dumps(meta | {"digest": digest(meta)}, indent=2), "utf-8")
