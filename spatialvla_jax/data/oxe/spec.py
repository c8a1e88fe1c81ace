"""The specification of one dataset."""

import dataclasses
import json
import posixpath
import re
from collections.abc import Mapping
from types import NoneType
from typing import Any, get_args

import numpy as np
from jaxtyping import Float

from spatialvla_jax.data.images import DEFAULT_INTRINSICS, DEFAULT_INTRINSICS_SIZE
from spatialvla_jax.data.oxe.operations import check_operations, code_digest
from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.camera import intrinsics_problem
from spatialvla_jax.utils.schema import Field, check, check_all, shown

# For depth stored by `data depth`:
DEPTH = "depth_zoe"  # a sibling of the image's key: "observation/image" gets "observation/depth_zoe"
DEPTH_UNIT = 0.001  # metres per count of the 16-bit PNG: rounding errors are at most 0.5 mm


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """Where an RLDS dataset stores what we need, and how to convert its action to the canonical one.

    Keys are paths within a step, such as "observation/image". The canonical action is f32[A]: motion (dx, dy, dz,
    droll, dpitch, dyaw) and gripper, 0 closed to 1 open. It is the concatenation of `action`: keys, columns of keys
    ("state[6]", "action[:3]", "action[-1]") and constants (numbers), to which the `operations` are then applied.
    """

    image: str = "observation/image"
    # More external cameras: each episode uses one of all, chosen by a hash of its actions. With depth, which belongs to
    # `image`, only `image` is used.
    other_images: tuple[str, ...] = ()
    # Text, a class label, or the bytes of a zero-terminated text as numbers. For a list, the first item, or the one at
    # an index: "instructions[1]".
    language: str = "language_instruction"
    instruction: str | None = None  # a fixed instruction for every episode, instead of `language`
    action: tuple[str | float, ...] = ("action",)
    operations: tuple[tuple[Any, ...], ...] = ()  # (name, *arguments) of oxe/operations.py
    arrays: tuple[str, ...] = ()  # additional numeric keys that the operations read
    depth: str | None = None  # 16-bit PNG
    depth_unit: float = 0.001  # metres per count
    intrinsics: str | None = None  # f32[3, 3], pixels of the stored image
    default_intrinsics: tuple[tuple[float, ...], ...] = DEFAULT_INTRINSICS  # if the data has none
    default_intrinsics_size: tuple[int, int] = DEFAULT_INTRINSICS_SIZE  # (height, width) of the image they refer to
    # Skip and count episodes without language, as the release does in every dataset (data/dataset.py). Otherwise they
    # are faults.
    skip_unlabeled: bool = True
    # The fields below do not change what is read; `meaning` lists those above that don't either.
    tfds_name: str | None = None  # directory, if not named as in the catalogue; may pin a version: name/1.0.0
    robot: str = ""
    episodes: int | None = None  # in the training split
    known_camera: bool = False  # `default_intrinsics` belong to this dataset's own camera
    unread_depth: str | None = None  # a stored depth map in a form that `depth` does not support

    @property
    def camera(self) -> str:
        """Where the intrinsics come from, in words."""
        if self.intrinsics:
            return "in the data"
        return "known" if self.known_camera else "default"


def meaning(spec: DatasetSpec) -> dict[str, Any]:
    """The parts of a spec that decide what is read, as JSON: its "fields", and a digest of its "operations"' code."""
    unread = "tfds_name robot episodes known_camera unread_depth default_intrinsics default_intrinsics_size depth_unit"
    fields = {key: value for key, value in dataclasses.asdict(spec).items() if key not in unread.split()}
    return json.loads(json.dumps({"fields": fields, "operations": code_digest(spec.operations)}))


_RULES: dict[str, dict[str, Any]] = {
    "other_images": {"items": Field("", "")},
    "arrays": {"items": Field("", "")},
    "action": {"items": Field("", "", kinds=(str, float, int))},
    "operations": {"items": Field((), "", problem=lambda operation: "" if operation else "names no operation")},
    "depth_unit": {"above": 0, "high": 1, "unit": "metres"},
    "instruction": {"problem": lambda text: "is empty" if text is not None and not text.strip() else ""},
    "default_intrinsics": {"size": 3, "items": Field((), "", size=3, items=Field(0.0, "", kinds=(float, int)))},
    "default_intrinsics_size": {"size": 2, "items": Field(1, "", low=1, unit="pixels")},
    "episodes": {"low": 0},
}
FIELDS = {
    field.name: Field(
        field.default,
        "",
        kinds=tuple(kind for kind in get_args(field.type) if kind is not NoneType) if field.default is None else (),
        **_RULES.get(field.name, {}),
    )
    for field in dataclasses.fields(DatasetSpec)
}


def split_column(column: str) -> tuple[str, slice]:
    """The key and columns of an item of `DatasetSpec.action`. Raises InputError."""
    match = re.fullmatch(r"([^\[\]]+)(?:\[(-?\d+)\]|\[(-?\d*):(-?\d*)\])?", column)
    if not match:
        raise InputError(f"the action's column {column!r} does not have the form 'key', 'key[3]' or 'key[3:6]'")
    key, single, first, last = match.groups()
    if single:
        return key, slice(int(single), int(single) + 1 or None)
    return key, slice(int(first) if first else None, int(last) if last else None)


def split_language(language: str) -> tuple[str, int | None]:
    """The key in `DatasetSpec.language` and its index, if any. Raises InputError."""
    match = re.fullmatch(r"([^\[\]]+)(?:\[(-?\d+)\])?", language)
    if not match:
        raise InputError(f"the language {language!r} does not have the form 'key' or 'key[1]'")
    return match[1], None if match[2] is None else int(match[2])


def action_keys(spec: DatasetSpec) -> list[str]:
    """The keys from which the action is joined."""
    return [split_column(column)[0] for column in spec.action if isinstance(column, str)]


def action_width(spec: DatasetSpec, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The width of the result of `join_action`, from each key's shape in one step."""
    width = 0
    for column in spec.action:
        key, columns = split_column(column) if isinstance(column, str) else ("", slice(1))
        width += len(range(*columns.indices(int(np.prod(shapes[key])) if key else 1)))
    return width


def join_action(spec: DatasetSpec, steps: Mapping[str, np.ndarray], length: int) -> Float[np.ndarray, "L n"]:
    """The action before the operations."""
    parts = []
    for column in spec.action:
        if isinstance(column, str):
            key, columns = split_column(column)
            parts.append(steps[key].reshape(length, -1)[:, columns])
        else:
            parts.append(np.full((length, 1), column))
    return np.concatenate(parts, axis=1, dtype=np.float32, casting="unsafe")


def make_spec(value: Any, catalogue: Mapping[str, DatasetSpec], name: str) -> DatasetSpec:
    """The spec given in a config: a catalogue entry's name, or the fields of a spec. Raises InputError."""
    where = f"data.datasets[{name!r}].spec"
    if isinstance(value, DatasetSpec):
        _check_camera(value, where)
        return value
    if isinstance(value, str):
        if value not in catalogue:
            known = ", ".join(sorted(catalogue))
            raise InputError(f"Dataset {name!r} has the unknown spec {value!r}: known are {known}")
        return catalogue[value]
    value = check(value, Field("libero", "", kinds=(str, dict)), where)
    spec = DatasetSpec(**check_all({key: _frozen(field) for key, field in value.items()}, FIELDS, where))
    _check_camera(spec, where)
    try:
        action_keys(spec)
        split_language(spec.language)
        check_operations(spec.operations, spec.arrays)
    except InputError as error:
        raise InputError(f"The spec of dataset {name!r} is wrong: {error}") from error
    return spec


def _check_camera(spec: DatasetSpec, where: str) -> None:
    """Raises InputError if the default intrinsics do not fit images of their size."""
    if wrong := intrinsics_problem(spec.default_intrinsics, spec.default_intrinsics_size):
        raise InputError(
            f"{where}.default_intrinsics={shown(spec.default_intrinsics)} is not a matrix of intrinsics: it {wrong}; "
            "((fx, 0, cx), (0, fy, cy), (0, 0, 1)) with fx and fy above 0 is expected, in pixels of an image of "
            f"default_intrinsics_size={spec.default_intrinsics_size}"
        )


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value


def depth_key(image: str) -> str:
    """The key of the depth for the image with key `image`."""
    return posixpath.join(posixpath.dirname(image), DEPTH)


def with_precomputed_depth(spec: DatasetSpec) -> DatasetSpec:
    """The spec with the depth stored by `add_depth` instead of the dataset's own."""
    return dataclasses.replace(spec, depth=depth_key(spec.image), depth_unit=DEPTH_UNIT)
