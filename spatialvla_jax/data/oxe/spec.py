"""What one dataset's entry says."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from spatialvla_jax.data.images import DEFAULT_INTRINSICS, DEFAULT_INTRINSICS_SIZE
from spatialvla_jax.data.oxe.operations import OPERATIONS
from spatialvla_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """Where an RLDS dataset keeps what we need, and how its action becomes the canonical one.

    Keys are paths within a step, such as "observation/image". The canonical action is f32[7]: dx, dy, dz, droll,
    dpitch, dyaw and the gripper, 0 closed .. 1 open.
    """

    image: str = "observation/image"
    language: str = "language_instruction"
    action: tuple[str, ...] = ("action",)  # joined along the last axis
    operations: tuple[tuple[Any, ...], ...] = ()  # (name, *arguments) of oxe/operations.py, in order
    arrays: tuple[str, ...] = ()  # further numeric keys that the operations read
    depth: str | None = None  # 16-bit PNG
    depth_unit: float = 0.001  # metres per count
    intrinsics: str | None = None  # f32[3, 3], pixels of the stored image
    default_intrinsics: tuple[tuple[float, ...], ...] = DEFAULT_INTRINSICS  # where the data has none
    default_intrinsics_size: tuple[int, int] = DEFAULT_INTRINSICS_SIZE  # height, width that these are pixels of
    skip_unlabeled: bool = False  # leave out (and count) episodes without language instead of failing


def make_spec(value: Any, catalogue: Mapping[str, DatasetSpec], name: str) -> DatasetSpec:
    """The spec that a config names: a catalogue entry by name, or the fields of one. Raises InputError."""
    if isinstance(value, DatasetSpec):
        return value
    if isinstance(value, str):
        if value not in catalogue:
            known = ", ".join(sorted(catalogue))
            raise InputError(f"Dataset {name!r} has the unknown spec {value!r}: known are {known}")
        return catalogue[value]
    fields = {key: _frozen(field) for key, field in dict(value).items()}
    known = [field.name for field in dataclasses.fields(DatasetSpec)]
    if unknown := sorted(set(fields) - set(known)):
        raise InputError(
            f"The spec of dataset {name!r} has the unknown field {unknown[0]!r}: known are {', '.join(known)}"
        )
    spec = DatasetSpec(**fields)
    for operation, *_ in spec.operations:
        if operation not in OPERATIONS:
            raise InputError(
                f"The spec of dataset {name!r} has the unknown operation {operation!r}: known are "
                f"{', '.join(sorted(OPERATIONS))}"
            )
    return spec


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value
