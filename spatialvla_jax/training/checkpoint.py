"""Checkpoints with Orbax: asynchronous, committed by rename, each one enough to run the policy.

Layout: `<workdir>/checkpoints/<step>/{params, optimizer, metadata}`; `metadata` is JSON with the step, the model's
sizes, the processor (grid, statistics, tokenizer) and the training config.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from spatialvla_jax.training.state import TrainState

FOLDER = "checkpoints"


def open_manager(workdir: Path, *, every: int, keep_last: int, keep_every: int | None) -> ocp.CheckpointManager:
    """Saves every `every` steps, keeps the last `keep_last` and each `keep_every`-th, removes unfinished saves."""
    options = ocp.CheckpointManagerOptions(
        save_interval_steps=every,
        max_to_keep=keep_last,
        keep_period=keep_every,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
    )
    return ocp.CheckpointManager((workdir / FOLDER).absolute(), options=options)


def save(manager: ocp.CheckpointManager, state: TrainState, metadata: dict[str, Any], *, force: bool = False) -> bool:
    """Start saving `state` as of its step, if that step is due (or forced); returns whether it was."""
    step = int(state.step)
    return manager.save(
        step,
        args=ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave(state.opt_state),
            metadata=ocp.args.JsonSave({"step": step, **metadata}),
        ),
        force=force,
    )


def restore_metadata(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    return manager.restore(step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))["metadata"]


def restore(manager: ocp.CheckpointManager, step: int, state: TrainState, shardings: TrainState) -> TrainState:
    """The state saved at `step`, in the shapes and shardings given (which may be another mesh's)."""

    def target(tree: Any, sharding: Any) -> Any:
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, sharding)

    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            params=ocp.args.StandardRestore(target(state.params, shardings.params)),
            optimizer=ocp.args.StandardRestore(target(state.opt_state, shardings.opt_state)),
        ),
    )
    at = jax.device_put(jax.numpy.int32(step), shardings.step)
    return TrainState(at, restored["params"], restored["optimizer"])
