"""The common form of all formats: a config, lazily read arrays, and a processor."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import ArrayLike

from spatialvla_jax.checkpoints.mapping import check_names, flatten, unflatten
from spatialvla_jax.checkpoints.processor import Processor
from spatialvla_jax.errors import InputError
from spatialvla_jax.models.spatialvla import Params, SpatialVLAConfig
from spatialvla_jax.utils.storage import AnyPath, read_text


@dataclass(frozen=True)
class LazyArray:
    """An array that `read` loads into memory."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @classmethod
    def of(cls, x: ArrayLike) -> "LazyArray":
        """Wrap an array that is already in memory."""
        array = np.asarray(x)
        return cls(array.shape, array.dtype, lambda: array)

    def astype(self, dtype: np.dtype) -> "LazyArray":
        def read() -> np.ndarray:
            with np.errstate(over="ignore"):  # what is too large becomes infinite; `finite` reports it
                return self.read().astype(dtype)

        return replace(self, dtype=dtype, read=read)

    def inspected(self, inspect: Callable[[np.ndarray], object]) -> "LazyArray":
        """The same array, passed to `inspect` whenever it is read."""

        def read() -> np.ndarray:
            x = self.read()
            inspect(x)
            return x

        return replace(self, read=read)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """`arrays` maps parameter paths such as "img/embedding/kernel" to arrays."""

    config: SpatialVLAConfig
    arrays: dict[str, LazyArray]
    processor: Processor | None

    @classmethod
    def of(cls, config: SpatialVLAConfig, params: Mapping[str, Any], processor: Processor | None) -> "Checkpoint":
        """From a nested tree of arrays."""
        return cls(config, {path: LazyArray.of(x) for path, x in flatten(params).items()}, processor)

    def params(self) -> Params:
        """All arrays in memory, as the model's nested tree of parameters."""
        return unflatten({path: array.read() for path, array in self.arrays.items()})


def finite(what: object, arrays: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """The same arrays, but reading one with NaN or infinity raises InputError.

    The message names all arrays with such values. To find them, the others are then read too, one at a time.
    """

    def inspect(x: np.ndarray) -> None:
        if not all_finite(x):
            check_names(what, "not finite", [path for path, array in arrays.items() if not all_finite(array.read())])

    return {path: array.inspected(inspect) for path, array in arrays.items()}


def all_finite(x: np.ndarray) -> bool:
    flat, block = x.reshape(-1), 2**24  # in blocks, because the boolean mask takes memory too
    return all(bool(np.isfinite(flat[i : i + block]).all()) for i in range(0, flat.size, block))


def digest(x: np.ndarray) -> str:
    """A hash of shape, dtype and every byte."""
    total = hashlib.sha256(f"{x.shape} {x.dtype}".encode())
    total.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def crc32c(x: np.ndarray) -> str:
    """The CRC-32C of every byte, as eight hexadecimal digits."""
    # Typed as bytes, but any contiguous byte array works without a copy.
    content: Any = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    return f"{google_crc32c.value(content):08x}"


def recorded(arrays: Mapping[str, LazyArray]) -> tuple[dict[str, LazyArray], dict[str, str]]:
    """→ (the same arrays, {path: digest} of those read so far)."""
    digests: dict[str, str] = {}

    def record(path: str, x: np.ndarray) -> None:
        digests[path] = digest(x)

    return {path: array.inspected(partial(record, path)) for path, array in arrays.items()}, digests


def read_json(file: AnyPath) -> dict[str, Any]:
    """Raises InputError if the file is missing, does not hold a JSON object, or has duplicate keys."""
    try:
        data = json.loads(read_text(file), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{file} must hold a JSON object")
    return data


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object from its pairs, as `json`'s object_pairs_hook. Raises ValueError for duplicate keys."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise ValueError(f"{twice[:200]!r} occurs twice")
    return found
