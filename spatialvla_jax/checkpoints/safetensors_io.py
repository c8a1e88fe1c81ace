"""Reading and writing safetensors directories (one file, or shards with an index), one tensor at a time.

The format: a little-endian u64 header length, a JSON header {key: {dtype, shape, data_offsets}}, then the bytes.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from spatialvla_jax.checkpoints.mapping import check_names
from spatialvla_jax.checkpoints.types import LazyArray, read_json
from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.atomic import write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def open_directory(path: Path) -> dict[str, LazyArray]:
    """All tensors of `model.safetensors`, or of the shards in `model.safetensors.index.json`; reads headers only.

    Raises InputError for a directory without weights, an index that does not agree with its shards, a file that is cut
    short and tensors that are not floating point.
    """
    if not (path / INDEX).exists():
        if not (path / SINGLE).exists():
            raise InputError(f"{path} holds neither {SINGLE} nor {INDEX}")
        return open_file(path / SINGLE)
    weight_map: dict[str, str] = read_json(path / INDEX).get("weight_map", {})
    check_names(
        path / INDEX,
        "in a shard that does not exist",
        {f"{key} ({shard})" for key, shard in weight_map.items() if not (path / shard).is_file()},
    )
    tensors = {key: t for shard in sorted(set(weight_map.values())) for key, t in open_file(path / shard).items()}
    check_names(path / INDEX, "named but in no shard", weight_map.keys() - tensors.keys())
    check_names(path / INDEX, "in a shard but not named", tensors.keys() - weight_map.keys())
    return tensors


def open_file(file: Path) -> dict[str, LazyArray]:
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if not 0 < length <= size - 8:
            raise InputError(f"{file} is not a safetensors file, or is cut short inside its header")
        try:
            header: dict[str, Any] = json.loads(f.read(length))
        except ValueError as error:
            raise InputError(f"{file} is not a safetensors file: its header is not JSON") from error
    header.pop("__metadata__", None)
    check_names(
        file,
        f"of another dtype than {', '.join(DTYPES)}",
        {f"{key} ({entry['dtype']})" for key, entry in header.items() if entry["dtype"] not in DTYPES},
    )
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size < end:
        raise InputError(f"{file} is cut short: {size} bytes of {end}")
    return {key: _lazy(file, entry, 8 + length) for key, entry in header.items()}


def _lazy(file: Path, entry: dict[str, Any], start: int) -> LazyArray:
    shape, dtype, offset = tuple(entry["shape"]), DTYPES[entry["dtype"]], start + entry["data_offsets"][0]
    return LazyArray(shape, dtype, lambda: np.fromfile(file, dtype, prod(shape), offset=offset).reshape(shape))


def write_directory(path: Path, tensors: Mapping[str, LazyArray], max_bytes: int) -> None:
    """Write the tensors in this order, reading one at a time; more than `max_bytes` go to shards with an index."""
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
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[key] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for key, tensor in tensors.items():
            x = tensor.read()
            assert x.shape == tensor.shape and x.dtype == tensor.dtype, (key, x.shape, x.dtype)
            f.write(np.ascontiguousarray(x).view(np.uint8).data)
            del x  # or it would keep its array while the next is read
