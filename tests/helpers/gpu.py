"""An abstract GPU to lower for on machines without one."""

import jax
from jax.sharding import AbstractMesh


def h100() -> AbstractMesh:
    """From JAX 0.11 on, kernels are lowered for a named GPU only; before that, for an H100 by default."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    return AbstractMesh((1,), ("data",), abstract_device=device)
