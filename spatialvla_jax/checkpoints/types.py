"""What every format reads into and writes from: a config, arrays read when needed, and a processor."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from spatialvla_jax.checkpoints.mapping import check_names, flatten, unflatten
from spatialvla_jax.checkpoints.processor import Processor
from spatialvla_jax.errors import InputError
from spatialvla_jax.models.spatialvla import SpatialVLAConfig


@dataclass(frozen=True)
class LazyArray:
    """One array of our tree that `read` brings into memory."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @classmethod
    def of(cls, x: ArrayLike) -> "LazyArray":
        """An array that is in memory already."""
        array = np.asarray(x)
        return cls(array.shape, array.dtype, lambda: array)

    def astype(self, dtype: np.dtype) -> "LazyArray":
        return replace(self, dtype=dtype, read=lambda: self.read().astype(dtype))

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """`arrays` maps "img/embedding/kernel" and so on; `ignored` counts stored tensors left out on request."""

    config: SpatialVLAConfig
    arrays: dict[str, LazyArray]
    processor: Processor | None
    ignored: int = 0

    @classmethod
    def of(cls, config: SpatialVLAConfig, params: Mapping[str, Any], processor: Processor | None) -> "Checkpoint":
        """From a nested tree of arrays."""
        return cls(config, {path: LazyArray.of(x) for path, x in flatten(params).items()}, processor)

    def params(self) -> dict[str, Any]:
        """All arrays in memory, as the nested tree that the model takes."""
        return unflatten({path: array.read() for path, array in self.arrays.items()})


def check_finite(what: object, arrays: Mapping[str, LazyArray]) -> None:
    """Raises InputError that names the arrays with NaN or infinity; holds one array at a time."""
    check_names(what, "not finite", [path for path, array in arrays.items() if not all_finite(array.read())])


def all_finite(x: np.ndarray) -> bool:
    flat, block = x.reshape(-1), 2**24  # in blocks, as the answers take memory too
    return all(bool(np.isfinite(flat[i : i + block]).all()) for i in range(0, flat.size, block))


def read_json(file: Path) -> dict[str, Any]:
    """Raises InputError when the file is missing or does not hold a JSON object."""
    try:
        data = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{file} must hold a JSON object")
    return data
