"""Reading and writing safetensors directories (one file, or shards with an index), one tensor at a time.

The format: a little-endian u64 header length, a JSON header {key: {dtype, shape, data_offsets}}, then the bytes.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from spatialvla_jax.checkpoints.mapping import check_names
from spatialvla_jax.checkpoints.types import read_json
from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.atomic import write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        return np.fromfile(self.file, self.dtype, prod(self.shape), offset=self.offset).reshape(self.shape)


def open_directory(path: Path) -> dict[str, Stored]:
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


def open_file(file: Path) -> dict[str, Stored]:
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
    return {
        key: Stored(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for key, entry in header.items()
    }


def write_directory(
    path: Path,
    specs: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    read: Callable[[str], np.ndarray],
    max_bytes: int,
) -> None:
    """Write the tensors `specs` = {key: (shape, dtype)} in this order, taking one at a time from `read`.

    More than `max_bytes` are split into shards with an index.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for key, (shape, dtype) in specs.items():
        size = prod(shape) * dtype.itemsize
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for name, keys in zip(names, shards, strict=True):
        write_file(path / name, {key: specs[key] for key in keys}, read)
    if count > 1:
        total = sum(prod(shape) * dtype.itemsize for shape, dtype in specs.values())
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(path / INDEX, index)


def write_file(file: Path, specs: Mapping[str, tuple[tuple[int, ...], np.dtype]], read: Callable) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, (shape, dtype) in specs.items():
        end = offset + prod(shape) * dtype.itemsize
        header[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for key, (shape, dtype) in specs.items():
            tensor = read(key)
            assert tensor.shape == shape and tensor.dtype == dtype, (key, tensor.shape, tensor.dtype)
            f.write(np.ascontiguousarray(tensor).view(np.uint8).data)
            del tensor  # or it would keep its array while the next is read
