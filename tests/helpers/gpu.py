"""A GPU to lower for, where there is none."""

import jax
from jax.sharding import AbstractMesh


def h100() -> AbstractMesh:
    """From JAX 0.11 kernels lower for a named GPU alone; before, for an H100."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    return AbstractMesh((1,), ("data",), abstract_device=device)
