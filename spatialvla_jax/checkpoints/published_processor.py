"""Reads the processor's files in a published directory: processor.json, which is ours, or else the release's."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from spatialvla_jax.actions import ActionTokenizer, grid_from_dict, grid_to_dict
from spatialvla_jax.checkpoints.processor import (
    MATRIX,
    STATISTICS,
    Processor,
    check_agreement,
    checked_statistics,
    not_empty,
    read_tokenizer,
)
from spatialvla_jax.checkpoints.published_config import FOLLOWS, PART, check_fixed, check_present
from spatialvla_jax.checkpoints.published_fields import ACTIONS_FIXED, IMAGES_FIXED, PROCESSOR_FIXED, Fixed
from spatialvla_jax.checkpoints.release import IMAGES, RELEASE_PROCESSOR, VARIABLES
from spatialvla_jax.checkpoints.release_tokenizer import TOKENIZER
from spatialvla_jax.checkpoints.types import read_json
from spatialvla_jax.errors import InputError
from spatialvla_jax.models.fields import COUNT, field_of
from spatialvla_jax.models.spatialvla import SpatialVLAConfig
from spatialvla_jax.utils.camera import intrinsics_problem
from spatialvla_jax.utils.schema import Field, check_stored
from spatialvla_jax.utils.storage import AnyPath, is_file, read_bytes

PROCESSOR = "processor.json"

EDGES = Field([], "", items=Field(0.0, ""))
CAMERA = {"intrinsic": MATRIX, "width": COUNT, "height": COUNT}


def read_processor(
    path: AnyPath, config: SpatialVLAConfig, chunk: int | None
) -> tuple[SpatialVLAConfig, Processor | None]:
    """→ (`config` with the processor's chunk size, the processor, or None if the directory has neither file).

    `chunk` is the chunk size in config.json, or None. Raises InputError for files that contradict each other or the
    model.
    """
    processor = None
    if is_file(path / PROCESSOR):
        where = f"{path / PROCESSOR}: "
        processor = Processor.from_dict(read_json(path / PROCESSOR), where)
        check_agreement(config, processor, where)
    if is_file(path / RELEASE_PROCESSOR):
        where = f"{path / RELEASE_PROCESSOR}: "
        data = read_json(path / RELEASE_PROCESSOR)
        size = _chunk_size(data, chunk, where)
        config = replace(config, action_chunk=size)
        parts = _release_parts(data, where)
        if processor is None:
            processor = Processor(_release_tokenizer(path), **parts)
            check_agreement(config, processor, where)
        _check_same(processor, parts, where)
    if is_file(path / IMAGES):
        _check_images(read_json(path / IMAGES), config, f"{path / IMAGES}: ")
    return config, processor


def _chunk_size(data: dict[str, Any], stated: int | None, where: str) -> int:
    """The chunk size; the release's default is 1."""
    default = {"action_chunk_size": 1 if stated is None else stated}
    field = {"action_chunk_size": field_of(SpatialVLAConfig, "action_chunk")}
    size = check_stored(default | data, field, where)["action_chunk_size"]
    if stated not in (None, size):
        raise InputError(f"{where}action_chunk_size={size} is not the model's action_chunk, {stated}")
    return size


def _release_parts(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Grid, statistics and intrinsics from the release's file."""
    check_fixed(data, PROCESSOR_FIXED, where)
    check_present(data, {"min_sigma": Field(0.0, "", low=0), "action_config": PART}, where)
    cameras = Field({}, "", items=PART, problem=not_empty)
    values = check_stored(data, {"bin_policy": PART, "statistics": STATISTICS, "intrinsic_config": cameras}, where)
    groups = check_stored(values["bin_policy"], dict.fromkeys(VARIABLES, PART), f"{where}bin_policy.")
    edges: dict[str, Any] = {"kind": "spherical"}
    for group, names in VARIABLES.items():
        kinds = {f"{name}_bins": EDGES for name in names}
        lists = check_stored(groups[group], kinds, f"{where}bin_policy.{group}.")
        edges |= {name: lists[f"{name}_bins"] for name in names}
    grid = grid_from_dict(edges, f"{where}bin_policy.")
    _check_actions(data.get("action_config", {}), edges, grid, f"{where}action_config.")
    return {
        "grid": grid,
        "statistics": checked_statistics(values["statistics"], grid.action_dim, f"{where}statistics"),
        "intrinsics": {
            name: _relative(camera, f"{where}intrinsic_config[{name!r}].")
            for name, camera in values["intrinsic_config"].items()
        },
    }


def _check_actions(data: Mapping[str, Any], edges: Mapping[str, Any], grid: ActionTokenizer, where: str) -> None:
    """Raises InputError if `action_config` contradicts the grid."""
    check_fixed(data, ACTIONS_FIXED, where)
    bins = {group: ({f"{v}_bins": len(edges[v]) - 1 for v in names},) for group, names in VARIABLES.items()}
    counts: Fixed = {**bins, "gripper": (2,), "total": (grid.vocab_size,)}
    check_fixed(data.get("num_bins", {}), counts, f"{where}num_bins.", FOLLOWS)


def _relative(camera: Any, where: str) -> list[list[float]]:
    """The camera matrix relative to its image's size."""
    matrix, width, height = check_stored(camera, CAMERA, where).values()
    if wrong := intrinsics_problem(matrix, (height, width)):
        raise InputError(f"{where}intrinsic {wrong}")
    first, second, third = matrix
    return [[x / width for x in first], [x / height for x in second], third]


def _release_tokenizer(path: AnyPath) -> Any:
    file = path / TOKENIZER
    if not is_file(file):
        raise InputError(f"{path} has {RELEASE_PROCESSOR} but no {TOKENIZER}: copy PaliGemma's {TOKENIZER} beside it")
    try:
        return read_tokenizer(read_bytes(file), str(file))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error


def _check_same(ours: Processor, parts: Mapping[str, Any], where: str) -> None:
    """Raises InputError if the release's file contradicts our processor.json beside it."""
    if grid_to_dict(ours.grid) != grid_to_dict(parts["grid"]):
        raise InputError(f"{where}bin_policy differs from the grid in the {PROCESSOR} beside it")
    for name in ("statistics", "intrinsics"):
        for key, value in getattr(ours, name).items():
            if parts[name].get(key, value) != value:
                raise InputError(f"{where}{key!r} has other {name} than in the {PROCESSOR} beside it")


def _check_images(data: Any, config: SpatialVLAConfig, where: str) -> None:
    size = config.img.image_size
    given = {"size": ({"height": size, "width": size},), "image_seq_length": (config.img.num_tokens,)}
    check_fixed(data, IMAGES_FIXED | given, where)
    check_stored(data, {"do_normalize": Field(False, "")}, where)  # must be given: transformers' default is true
