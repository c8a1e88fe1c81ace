"""Reads and writes safetensors directories (one file, or shards with an index), one tensor at a time.

The format: a little-endian u64 header length, a JSON header {key: {dtype, shape, data_offsets}}, then the tensors'
bytes, in order and without gaps. Whatever the official library refuses is refused here too, and so are duplicate keys.
Our own files store a checksum per tensor in the header's "__metadata__", under "crc32c.<key>". It is verified on every
read.
"""

import json
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from spatialvla_jax.checkpoints.mapping import check_names, printable
from spatialvla_jax.checkpoints.types import LazyArray, crc32c, read_json, unique
from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.atomic import write_json
from spatialvla_jax.utils.storage import AnyPath, is_file, is_url, list_names, read_range, read_ranges, size_and_version

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
METADATA, CHECKSUM = "__metadata__", "crc32c."
MAX_HEADER = 100_000_000  # bytes, as in the official library
PART, CONCURRENT_PARTS = 16 * 2**20, 8  # bytes per request to a bucket, and requests at once
MAX_RANK, MAX_ELEMENTS = 32, 2**48  # NumPy before 2.0 supports 32 axes
DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "BOOL": np.dtype(np.bool_),
    **{f"{kind.upper()}{8 * size}": np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)},
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = ("F32", "BF16", "F16")  # dtypes of weights; buffers beside them may have any


def open_directory(path: AnyPath) -> dict[str, LazyArray]:
    """All tensors of `model.safetensors`, or of the shards in `model.safetensors.index.json`; reads headers only.

    Raises InputError if the directory has no weights, or weights that the index does not name. The index and its shards
    must agree in every key. Damaged files raise it too (`open_file`).
    """
    present = set(list_names(path))
    if not present & {SINGLE, INDEX}:
        raise InputError(f"{path} holds neither {SINGLE} nor {INDEX}")
    weight_map = _weight_map(path / INDEX) if INDEX in present else None
    shards = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    if stale := sorted(name for name in present - set(shards) if name == SINGLE or SHARD.fullmatch(name)):
        by = "there is no index" if weight_map is None else f"{INDEX} does not name it"
        raise InputError(f"{path} holds {stale[0]} too, but {by}: remove what is out of date")
    if weight_map is None:
        return open_file(path / SINGLE)
    lost = {shard for shard in shards if not is_file(path / shard)}
    absent = [f"{key} ({shard})" for key, shard in weight_map.items() if shard in lost]
    check_names(path / INDEX, "in a shard that does not exist", absent)
    found = [(key, shard, tensor) for shard in shards for key, tensor in open_file(path / shard).items()]
    tensors = {key: tensor for key, _, tensor in found}
    check_names(path / INDEX, "named but in no shard", weight_map.keys() - tensors.keys())
    check_names(path / INDEX, "in a shard but not named", tensors.keys() - weight_map.keys())
    # If two shards have the same key, one of them contradicts the index.
    wrong = [f"{key} ({shard} instead of {weight_map[key]})" for key, shard, _ in found if shard != weight_map[key]]
    check_names(path / INDEX, "in another shard than named", wrong)
    return tensors


def _weight_map(index: AnyPath) -> dict[str, str]:
    """{key: file name of its shard}. Raises InputError."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map {{key: file}}")
    wrong = [
        key for key, name in weight_map.items() if not (isinstance(name, str) and name and Path(name).name == name)
    ]
    check_names(index, "in a shard that is not a file beside the index", wrong)
    return weight_map


def open_file(file: AnyPath) -> dict[str, LazyArray]:
    """The tensors of one file, read lazily. Reading one raises InputError if its checksum does not match.

    Raises InputError unless the file is complete and consistent.
    """
    header, start, size = _read_header(file)
    metadata = header.pop(METADATA, None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise InputError(f"{file}: {METADATA} must map names to strings")
    checksums = {key.removeprefix(CHECKSUM): x for key, x in metadata.items() if key.startswith(CHECKSUM)}
    if checksums:
        check_names(file, "without a checksum", header.keys() - checksums.keys())
        check_names(file, "named by a checksum but missing", checksums.keys() - header.keys())
    entries = [(*_parse(file, key, entry), key) for key, entry in header.items()]
    tensors, offset = {}, 0
    for (begin, end), shape, dtype, key in sorted(entries, key=lambda entry: entry[0]):
        if begin != offset:
            raise InputError(f"{file}: {printable(key)} begins at byte {begin} of the data instead of {offset}")
        tensors[key] = _lazy(file, key, shape, dtype, start + begin, checksums.get(key))
        offset = end
    if size < start + offset:
        raise InputError(f"{file} is cut short: {size} bytes of {start + offset}")
    if size > start + offset:
        raise InputError(f"{file} has {size - start - offset} bytes after its last tensor")
    return tensors


def _read_header(file: AnyPath) -> tuple[dict[str, Any], int, int]:
    """→ (the header, offset of the data, size of the file)"""
    try:
        if not is_file(file):  # opening a pipe would block
            raise InputError(f"{file} is not a file")
        size, _ = size_and_version(file)
        length = int.from_bytes(read_range(file, 0, min(8, size)), "little")
        if not 0 < length <= min(size - 8, MAX_HEADER):
            raise InputError(f"{file} is not a safetensors file, or is cut short inside its header")
        text = read_range(file, 8, length)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    try:
        header = json.loads(text.decode(), object_pairs_hook=unique, parse_int=_natural, parse_constant=_natural)
        json.dumps(header, ensure_ascii=False).encode()  # fails for half a surrogate pair, which JSON can express
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not a safetensors file: in its header, {error}") from error
    if not isinstance(header, dict):
        raise InputError(f"{file} is not a safetensors file: its header is not a JSON object")
    return header, 8 + length, size


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{text} is not a size")
    return int(text)


def _parse(file: AnyPath, key: str, entry: Any) -> tuple[tuple[int, int], tuple[int, ...], np.dtype]:
    """→ (data_offsets, shape, dtype) of one header entry. Raises InputError if they are inconsistent."""
    what = f"{file}: the entry of {printable(key)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{what} must have the fields dtype, shape and data_offsets")
    name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(name, str) or name not in DTYPES:
        raise InputError(f"{what} has a dtype that is not one of {', '.join(DTYPES)}: {printable(str(name))}")
    for field, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int for n in numbers) or len(numbers) > MAX_RANK:
            raise InputError(f"{what} must have a list of whole numbers, {MAX_RANK} at most, as its {field}")
    if prod(n or 1 for n in shape) > MAX_ELEMENTS:  # NumPy refuses such a shape even for an empty array
        raise InputError(f"{what} has a shape of more than {MAX_ELEMENTS} elements")
    if len(offsets) != 2 or offsets[1] - offsets[0] != prod(shape) * DTYPES[name].itemsize:
        raise InputError(f"{what} has data_offsets {offsets}, which do not span the bytes of {name} {shape}")
    return (offsets[0], offsets[1]), tuple(shape), DTYPES[name]


def _lazy(
    file: AnyPath, key: str, shape: tuple[int, ...], dtype: np.dtype, offset: int, checksum: str | None
) -> LazyArray:
    def read() -> np.ndarray:
        try:
            x = _elements(file, dtype, prod(shape), offset)
        except OSError as error:
            raise InputError(f"{file} cannot be read at {printable(key)}: {error}") from error
        if x.size != prod(shape):
            raise InputError(f"{file} is cut short inside {printable(key)}")
        if checksum is not None and crc32c(x) != checksum:
            raise InputError(f"{file} is damaged: the bytes of {printable(key)} do not have the checksum in its header")
        return x.reshape(shape)

    return LazyArray(shape, dtype, read)


def _elements(file: AnyPath, dtype: np.dtype, count: int, offset: int) -> np.ndarray:
    """May return fewer than `count` if a local file is too short. An object's parts are read concurrently."""
    if not is_url(file):
        return np.fromfile(file, dtype, count, offset=offset)
    whole = np.empty(count, dtype)
    content, block = whole.view(np.uint8), PART * CONCURRENT_PARTS
    for begin in range(0, content.size, block):
        starts = range(begin, min(begin + block, content.size), PART)
        parts = [(file, offset + start, min(PART, content.size - start)) for start in starts]
        for start, found in zip(starts, read_ranges(parts), strict=True):
            if isinstance(found, Exception):
                raise found
            content[start : start + len(found)] = np.frombuffer(found, np.uint8)
    return whole


def write_directory(path: Path, tensors: Mapping[str, LazyArray], max_bytes: int) -> None:
    """Write the tensors in this order, reading one at a time; above `max_bytes` they are sharded, with an index."""
    shards: list[list[str]] = [[]]
    filled = 0
    for key, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += tensor.nbytes
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for name, keys in zip(names, shards, strict=True):
        write_file(path / name, {key: tensors[key] for key in keys})
    if count > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(path / INDEX, index)


def write_file(file: Path, tensors: Mapping[str, LazyArray]) -> None:
    """Write the tensors in this order, reading one at a time, with a checksum for each."""
    checksums = dict.fromkeys(tensors, "0" * 8)
    with file.open("wb") as f:
        f.write(_header(tensors, checksums))
        for key, tensor in tensors.items():
            x = tensor.read()
            assert x.shape == tensor.shape and x.dtype == tensor.dtype, (key, x.shape, x.dtype)
            x = np.ascontiguousarray(x)
            checksums[key] = crc32c(x)
            f.write(x.view(np.uint8).data)
            del x  # otherwise the array stays in memory while the next is read
        f.seek(0)  # overwrite the header, whose size is the same
        f.write(_header(tensors, checksums))


def _header(tensors: Mapping[str, LazyArray], checksums: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {METADATA: {"format": "pt"} | {CHECKSUM + key: x for key, x in checksums.items()}}
    offset = 0
    for key, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[key] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
