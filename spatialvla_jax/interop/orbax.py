"""Our own runs: `<workdir>/checkpoints/<step>/{params, optimizer, metadata}`, by training or by a conversion."""

from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from spatialvla_jax.errors import InputError
from spatialvla_jax.interop.checkpoint import Checkpoint, Leaf, check_finite, new_directory, read_json
from spatialvla_jax.interop.mapping import check_leaves, flatten, param_shapes
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
    leaves = _open_params((step / "params").absolute())
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


def _open_params(params: Path) -> dict[str, Leaf]:
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(params).item_metadata
        infos = flatten(tree.tree)
    except Exception as error:  # Orbax raises whatever its storage raises
        raise InputError(f"{params} cannot be read: {_first_line(error)}") from error
    driver = "zarr3" if tree.use_zarr3 else "zarr"

    def leaf(path: str, info: Any) -> Leaf:
        # Straight from the array store: restoring leaf by leaf through Orbax takes 35 times as long.
        store = {"driver": "ocdbt", "base": params.as_uri(), "path": f"{info.name}/"}

        def read() -> np.ndarray:
            try:
                return tensorstore.open({"driver": driver, "kvstore": store}, read=True).result().read().result()
            except (ValueError, OSError) as error:
                raise InputError(f"{params} cannot be read at {path}: {_first_line(error)}") from error

        return Leaf(tuple(info.shape), np.dtype(info.dtype), read)

    return {path: leaf(path, info) for path, info in infos.items()}


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
