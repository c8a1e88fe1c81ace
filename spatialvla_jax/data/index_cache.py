"""Gets indexes from the local cache, from a bucket, or from the data itself, which several processes read together.

Each start compares the data with what an index was made from. It makes the index again if anything differs, or if any
part of it is missing or damaged. Content may change on a disk without its size and time: the index therefore holds
checksums of records and frames, and the reader compares them.
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

LOCAL_CACHE = "~/.cache/spatialvla_jax"  # for indexes in a bucket, or without data.cache_dir
VERSION = 4  # of the files and their content; an index of another version is made again
_TOGETHER = 8  # indexes that are read or copied at a time
# Arrays up to these sizes in bytes are kept in memory, because every draw looks up places in them; larger are mapped.
_HELD = {"action": 0, "image": 2**27, "depth": 2**27}
_HELD_OTHERS = 2**24
_PIECE = 2**20  # bytes read at a time for a checksum; larger pieces get new memory each time, which is slower
_END = 64  # bytes at the end of meta.json that contain its digest
_SAMPLE = 16  # records of an index whose checksums are compared at each start

Kept = tuple[Index, dict[str, Any]]  # a cached index and its meta.json


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
    """Indexes one shard; returns its `Part` as bytes."""
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
    """The indexes of these splits, from the cache or made now. Making one calls `progress(name, shards done, shards)`.
    If the cache is in a bucket, this host keeps a copy in `LOCAL_CACHE`.

    All `processes` call this together. If none has an index, each reads its share of the shards (`read`); otherwise
    the first that has it sends it to the others. All end with the same index, in a shared cache or in one each.

    Indexed data has been read in full and checked, but its images have not been decoded. Raises InputError for a cache
    that cannot be written and for any fault in the data; under the policy "skip", only above `faults.limit`.
    """
    return complete_indexes(sources, find_indexes(sources, cache_dir), cache_dir, progress, faults, processes, read)


def find_indexes(sources: Sequence[Source], cache_dir: AnyPath) -> list[Kept | None]:
    """The cached indexes, copied to this host if they are in a bucket. None for an index that is missing or was made
    from different data."""
    local = _local(cache_dir)
    with ThreadPoolExecutor(_TOGETHER) as pool:  # checksums release the GIL
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
    """Makes the indexes that are None in `kept`, see `load_indexes`. The first process uploads what a bucket lacks."""
    local, indexes = _local(cache_dir), []
    for source, one in zip(sources, kept, strict=True):
        index, meta = _complete(source, one, local / source.folder, progress, faults, processes, read)
        # `made_from` omits the policy, which matters only for data with faults; the index records those.
        if meta["fault"] and faults.policy == "fail":
            raise InputError(meta["fault"])
        places = [directory / source.folder for directory in dict.fromkeys([local, cache_dir])]
        indexes.append(dataclasses.replace(index, directories=tuple(places)))
    if is_url(cache_dir) and processes.index == 0:
        held = [source for source, one in zip(sources, kept, strict=True) if one]
        same = {source.folder for source, yes in zip(held, _same_in_bucket(held, local, cache_dir), strict=True) if yes}
        for source, one in zip(sources, kept, strict=True):
            # A new index, or one that the bucket does not hold as it is here.
            if not one or not (source.folder in same or _read_meta(source, cache_dir / source.folder)):
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
    """The index that this process has `kept`, or a new one that all processes make together."""
    holders = [number for number, has in enumerate(processes.gather(b"kept" if kept else b"")) if has]
    if holders:
        parts = _share(kept if processes.index == holders[0] else None, processes)
    else:
        parts = _read_parts(source, processes, progress, read)
    if not kept:
        return _place(source, directory, lambda work: _write(work, source, faults, parts))
    if len(holders) < processes.count:
        for _ in parts:  # gathered together: the others need them
            pass
    return kept


def _read_parts(
    source: Source,
    processes: Processes,
    progress: Callable[[str, int, int], None] | None,
    read: Callable[[Source, int], bytes],
) -> Iterator[Part]:
    """The parts of all shards in order. This process reads every `processes.count`-th and gathers the others."""
    count = len(source.shards)
    for first in range(0, count, processes.count):
        number = first + processes.index
        for data in processes.gather(read(source, number) if number < count else b""):
            if data:
                yield Part.from_bytes(data)
        if progress:
            progress(source.name, min(first + processes.count, count), count)


def _share(kept: Kept | None, processes: Processes) -> Iterator[Part]:
    """Sends the index that one process has `kept` to all, as a single part."""
    data = b""
    if kept:
        index, meta = kept
        data = Part(index.arrays, index.instructions, index.skipped, meta["fault"]).to_bytes()
    yield from (Part.from_bytes(part) for part in processes.gather(data) if part)


def _find_kept(source: Source, directory: Path) -> Kept | None:
    """The index in a directory if it is intact and up to date; otherwise warns why not and returns None."""
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
    """The meta.json of an index in a bucket, or "" if it is missing or out of date."""
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
    """Whether the bucket holds the same indexes as this host. Compares the digests at the ends of the meta.json files,
    which takes one small request for each."""
    metas = [(local / source.folder / META).read_bytes() for source in sources]
    urls = [cache_dir / source.folder / META for source in sources]
    ranges = [(url, len(meta) - _END, _END) for url, meta in zip(urls, metas, strict=True)]
    ends = read_ranges(ranges)
    if failed := [end for end in ends if isinstance(end, StorageError)]:
        raise failed[0]
    return [end == meta[-_END:] for end, meta in zip(ends, metas, strict=True)]


def _announce(urls: Sequence[AnyPath], cache_dir: AnyPath, local: Path) -> None:
    """Print the size of the indexes to copy. Raises InputError if the disk has too little room."""
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
    """Copies an index from a bucket; None if it is damaged or being replaced."""

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
    """The index in a directory and its meta.json. Raises FileNotFoundError if there is none, and _Stale if it is
    damaged or was made from different data."""
    made_from = source.made_from
    folder = os.open(directory, os.O_RDONLY)  # still this one after another process replaces it
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
        index = Index(
            name=source.name,
            spec=source.spec,
            files=tuple(os.fspath(shard.file) for shard in source.shards),
            instructions=tuple(meta["instructions"]),
            statistics=meta["statistics"],
            num_read=meta["read"],
            skipped=meta["skipped"],
            arrays=arrays,
            maps=tuple(maps),
            descriptors=descriptors,
            made_from=made_from,
            gaussians=meta["gaussians"],
        )
        return index, meta
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _Stale(f"its index {directory} is damaged ({error})") from error
    finally:
        os.close(folder)


def _check_meta(source: Source, text: str) -> dict[str, Any]:
    """Parses meta.json. Raises _Stale for an index of different data, ValueError and the like for a damaged one."""
    meta = json.loads(text)
    if meta.get("version") != VERSION:
        raise _Stale("another version of this program made its index")
    if meta.pop("digest") != digest(meta):
        raise ValueError(f"the checksum of {META} is wrong")
    if meta["made_from"] != source.made_from:
        raise _Stale(_difference(meta["made_from"], source.made_from))
    return meta


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Describes the first difference between two `made_from`."""
    if before["spec"] != now["spec"]:
        return "the code of its operations changed"
    old, new = ({name: rest for name, *rest in source["shards"]} for source in (before, now))
    if changed := sorted(file for file in old.keys() | new.keys() if old.get(file) != new.get(file)):
        return f"{len(changed)} of its files changed since then ({enumerate_some(changed)})"
    return f"its {' and '.join(key for key in now if before.get(key) != now[key])} changed since then"


def _check_current(index: Index, meta: Mapping[str, Any]) -> None:
    """Raises _Stale if any of `_SAMPLE` records has changed, or if a file could not be read when indexed."""
    if "unreadable file" in meta["skipped"]:
        raise _Stale("some of its files could not be read the last time")
    if any(map(is_url, index.files)):  # `made_from` has each object's version, which suffices
        return
    for episode in np.unique(np.linspace(0, index.num_episodes - 1, _SAMPLE).astype(int)).tolist():
        path, offset, checksum = index.record(episode)
        with suppress(OSError), open(path, "rb", buffering=0) as file:  # the reader reports an unreadable file
            if os.pread(file.fileno(), CHECKSUM_BYTES, offset) != checksum:
                raise _Stale(f"{path} has the same size and time as before, but different records")


def _place(source: Source, directory: Path, write: Callable[[Path], None]) -> Kept:
    """Writes a new index with `write`, replaces any old one by it and opens it. Raises InputError if the disk fails."""
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
            return opened  # another process has just put one there
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
    """Removes an index in one step, so that other processes see all of it or nothing."""
    aside = directory.with_name(f"{PREFIX}{secrets.token_hex(4)}")
    with suppress(FileNotFoundError):
        directory.rename(aside)
        if aside.is_dir():
            shutil.rmtree(aside)
        else:
            aside.unlink()


def _write(work: Path, source: Source, faults: Faults, parts: Iterator[Part]) -> None:
    """Writes the files of an index to the directory `work`. Raises InputError for too many faults."""

    def check(part: Part, skipped: Mapping[str, int]) -> None:
        if part.fault and faults.policy == "fail":
            raise InputError(part.fault)
        faults.check(skipped, f"episodes of the dataset {source.name!r}")

    merged = merge_parts(parts, layout(source.spec, source.made_from["action_dim"]), work, check)
    skipped = merged["skipped"]
    if not merged["statistics"]:
        listed = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
        raise InputError(f"Dataset {source.name!r} ({source.builder.data_dir}) has no usable episode ({listed})")
    read = sum(len(shard.numbers) for shard in source.shards) + skipped.get("unlisted", 0)
    meta = {"version": VERSION, "made_from": source.made_from, "read": read} | merged
    (work / META).write_text(json.dumps(meta | {"digest": digest(meta)}, indent=2), "utf-8")
