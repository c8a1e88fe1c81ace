"""Our own runs: `<workdir>/checkpoints/<step>/{params, optimizer, metadata}`, by training or by a conversion."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from spatialvla_jax.errors import InputError
from spatialvla_jax.interop.checkpoint import Checkpoint, Leaf, check_finite, new_directory, read_json
from spatialvla_jax.interop.mapping import check_leaves, flatten, param_shapes, unflatten
from spatialvla_jax.models.spatialvla import SpatialVLAConfig
from spatialvla_jax.processor import Processor, model_from_dict, model_to_dict

FOLDER = "checkpoints"


def step_directory(path: str | Path) -> Path | None:
    """The newest finished step of a workdir, or `path` itself where it is a step; None where it is neither."""
    path = Path(path)
    if (path / "params").is_dir() and (path / "metadata").is_dir():
        return path
    if not (path / FOLDER).is_dir():
        return None
    steps = [p for p in (path / FOLDER).iterdir() if p.name.isdigit() and (p / "params").is_dir()]
    return max(steps, key=lambda p: int(p.name), default=None)


def read_orbax(path: str | Path) -> Checkpoint:
    """A run of ours (its newest step) or one step of it; the optimizer is left alone. Leaves are read when asked for.

    Raises InputError when there is no finished step, its files are damaged, its parameters do not fit its config or are
    not finite.
    """
    step = step_directory(path)
    if step is None:
        raise InputError(f"{path} holds no finished checkpoint")
    config, processor = _read_metadata(step / "metadata" / "metadata")
    params = (step / "params").absolute()
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(params).item_metadata.tree
    except Exception as error:  # Orbax raises whatever its storage raises
        raise InputError(f"{params} cannot be read: {_first_line(error)}") from error
    leaves = {
        leaf: Leaf(tuple(info.shape), np.dtype(info.dtype), lambda leaf=leaf, info=info: _read_leaf(params, leaf, info))
        for leaf, info in flatten(tree).items()
    }
    check_leaves(step, leaves, param_shapes(config))
    check_finite(step, leaves)
    return Checkpoint(config, leaves, processor)


def _read_metadata(file: Path) -> tuple[SpatialVLAConfig, Processor | None]:
    metadata = read_json(file)
    try:
        config, processor = model_from_dict(metadata["model"]), metadata["processor"]
        return config, None if processor is None else Processor.from_dict(processor)
    except (KeyError, TypeError) as error:
        raise InputError(f"{file} does not describe a model and processor of this version: {error}") from error


def _read_leaf(params: Path, leaf: str, info: Any) -> np.ndarray:
    item = unflatten({leaf: jax.ShapeDtypeStruct(info.shape, info.dtype)})
    arguments = unflatten({leaf: ocp.RestoreArgs(restore_type=np.ndarray)})
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            restored = checkpointer.restore(
                params, ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True)
            )
    except Exception as error:
        raise InputError(f"{params} cannot be read at {leaf}: {_first_line(error)}") from error
    return flatten(restored)[leaf]


def write_orbax(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write a run with one step, 0, and no optimizer; it appears whole or not at all."""
    path = Path(path)
    check_leaves("checkpoint", checkpoint.leaves, param_shapes(checkpoint.config))
    metadata = {
        "step": 0,
        "model": model_to_dict(checkpoint.config),
        "processor": checkpoint.processor.to_dict() if checkpoint.processor else None,
        "train_config": None,
    }
    items = ocp.args.Composite(params=ocp.args.StandardSave(checkpoint.params()), metadata=ocp.args.JsonSave(metadata))
    with new_directory(path) as folder:
        try:
            with ocp.CheckpointManager((folder / FOLDER).absolute()) as manager:
                manager.save(0, args=items)
        except ValueError as error:  # what Orbax makes of a full disk
            raise InputError(f"{path} cannot be written: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
