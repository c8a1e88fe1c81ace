"""ZoeDepth on its own: computes the same depth as training with `depth_source="zoedepth"`."""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, UInt8

from spatialvla_jax.checkpoints.types import LazyArray
from spatialvla_jax.models import Params
from spatialvla_jax.models.zoedepth import ZoeDepth, ZoeDepthConfig, estimate_depth


def depth_estimator(
    config: ZoeDepthConfig, arrays: Mapping[str, LazyArray], dtype: str
) -> tuple[Callable[[UInt8[np.ndarray, "B S S 3"]], Float[Array, "B S S"]], str]:
    """A function from images u8[B,S,S,3] to depth f32[B,S,S] in metres, and a hex digest of the weights.

    It runs on all devices, so B must divide by their number. `arrays` are named like `ZoeDepth`'s parameters
    ("backbone/…"); `dtype` is that of the computation.
    """
    params = {path: array.read() for path, array in sorted(arrays.items())}
    digest = hashlib.sha256(b"".join(hashlib.sha256(x.tobytes()).digest() for x in params.values())).hexdigest()
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    tree = jax.device_put(unflatten_dict(params, sep="/"), everywhere)

    @jax.jit
    def depth_of(params: Params, images: UInt8[Array, "B S S 3"]) -> Float[Array, "B S S"]:
        zoedepth: Any = partial(ZoeDepth(config, jnp.dtype(dtype)).apply, {"params": params})
        return estimate_depth(zoedepth, images.astype(jnp.float32) / 255, config.backbone.image_size)

    return lambda images: depth_of(tree, jax.device_put(images, rows)), digest
