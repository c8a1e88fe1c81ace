"""Sharding constraints on activations. Without them the compiler may shard features instead of the batch, and then
all-reduce every layer's activations over all devices."""

from math import prod
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

BATCH_AXES = ("data", "fsdp")


def batch_splits(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """The number of shards along the mesh's batch axes."""
    return prod(mesh.shape[axis] for axis in BATCH_AXES)


def constrain_batch(x: Any, *extra: str) -> Any:
    """Shard the first dimension of `x` over the mesh's batch axes, and over `extra` if divisible; no other dimension.

    Does nothing outside a mesh (`training.sharding.on_mesh`) or if the batch does not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    for axes in ((*BATCH_AXES, *extra), BATCH_AXES):
        if x.shape[0] % prod(mesh.shape[axis] for axis in axes) == 0:
            return jax.lax.with_sharding_constraint(x, P(axes))
    return x
