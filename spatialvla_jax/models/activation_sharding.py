"""Where activations live on the mesh. Without these pins the compiler may split their features instead of the batch,
and then sums every layer's activations over all devices."""

from math import prod
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

BATCH_AXES = ("data", "fsdp")


def batch_splits(mesh: jax.sharding.AbstractMesh) -> int:
    """Into how many parts the mesh's batch axes split."""
    return prod(mesh.shape[axis] for axis in BATCH_AXES)


def constrain_batch(x: Any, *extra: str) -> Any:
    """Pin the first dimension of `x` to the mesh's batch axes, and to the `extra` ones if it divides; the rest whole.

    Does nothing where the trace runs on no mesh (`training.sharding.on_mesh`) or the batch does not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    for axes in ((*BATCH_AXES, *extra), BATCH_AXES):
        if x.shape[0] % prod(mesh.shape[axis] for axis in axes) == 0:
            return jax.lax.with_sharding_constraint(x, P(axes))
    return x
