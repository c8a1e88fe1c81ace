"""ZoeDepth once ahead: its depth of every frame of a dataset, stored in a copy of the dataset."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, UInt8

from spatialvla_jax.checkpoints import read_checkpoint
from spatialvla_jax.checkpoints import safetensors_io as safetensors
from spatialvla_jax.checkpoints.huggingface import (
    CONFIG,
    ZOE_PREFIX,
    parse_config,
    stacked_arrays,
    zoedepth_from_published,
)
from spatialvla_jax.checkpoints.mapping import param_shapes
from spatialvla_jax.checkpoints.types import LazyArray, read_json
from spatialvla_jax.data.importers.add_depth import Estimator, add_depth
from spatialvla_jax.data.oxe import DatasetSpec
from spatialvla_jax.errors import InputError
from spatialvla_jax.models.spatialvla import SpatialVLAConfig
from spatialvla_jax.models.zoedepth import ZoeDepth, ZoeDepthConfig, estimate_depth


def precompute_depth(
    datasets: Sequence[tuple[Path, DatasetSpec]],
    checkpoint: str | Path,
    out: str | Path,
    *,
    image_size: int | None = None,
    splits: tuple[str, ...] | None = None,
    batch_size: int = 16,
    dtype: str = "float32",
    workers: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Copies each dataset (version directory, spec) to `out`/NAME/VERSION with the depth of its images: what the
    training step of a model with depth "zoedepth" computes from the unaugmented image, see `data.rewrite.add_depth`. A
    config with `data.precomputed_depth` reads it.

    `checkpoint` is anything that `read_checkpoint` reads with a ZoeDepth in it, or a ZoeDepth's Hugging Face directory.
    `image_size` is by default the checkpoint's. The batch is split over all devices. Raises InputError.
    """
    config, leaves, native_size = read_zoedepth(checkpoint)
    size = image_size or native_size
    if size is None:
        raise InputError(f"{checkpoint} is a ZoeDepth alone: --config or --image-size must give the model's image size")
    if batch_size < 1 or batch_size % jax.device_count():
        raise InputError(f"the batch size {batch_size} does not divide among {jax.device_count()} devices")
    params = {path: leaf.read() for path, leaf in sorted(leaves.items())}
    digest = hashlib.sha256(b"".join(hashlib.sha256(x.tobytes()).digest() for x in params.values()))
    made_with = {"weights": digest.hexdigest(), "dtype": dtype}
    estimate = make_estimator(config, unflatten_dict(params, sep="/"), dtype)
    return [
        add_depth(
            path,
            out,
            estimate,
            image=spec.image,
            image_size=size,
            batch_size=batch_size,
            made_with=made_with,
            splits=splits,
            workers=workers,
            progress=progress,
        )
        for path, spec in datasets
    ]


def make_estimator(config: ZoeDepthConfig, params: dict[str, Any], dtype: str) -> Estimator:
    """u8[B,S,S,3] → f32[B,S,S] in metres, on all devices; B divides among them."""
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    params = jax.device_put(params, everywhere)

    @jax.jit
    def depth_of(params: dict[str, Any], images: UInt8[Array, "B S S 3"]) -> Float[Array, "B S S"]:
        zoedepth: Any = partial(ZoeDepth(config, jnp.dtype(dtype)).apply, {"params": params})
        return estimate_depth(zoedepth, images.astype(jnp.float32) / 255, config.backbone.image_size)

    return lambda images: depth_of(params, jax.device_put(images, rows))


def read_zoedepth(path: str | Path) -> tuple[ZoeDepthConfig, dict[str, LazyArray], int | None]:
    """ZoeDepth's sizes, its leaves ("backbone/…") and the image size of the model around it, None where there is none.

    Raises InputError for a checkpoint without a ZoeDepth.
    """
    path = Path(path)
    if (path / CONFIG).is_file() and read_json(path / CONFIG).get("model_type") == "zoedepth":
        config = SpatialVLAConfig(zoe=parse_config(path / CONFIG, zoedepth_from_published), depth_source="zoedepth")
        stored = {ZOE_PREFIX + key: tensor for key, tensor in safetensors.open_directory(path).items()}
        shapes = {name: shape for name, shape in param_shapes(config).items() if name.startswith("zoe/")}
        leaves, size = stacked_arrays(path, stored, shapes), None
    else:
        checkpoint = read_checkpoint(path)
        config, leaves, size = checkpoint.config, checkpoint.arrays, checkpoint.config.img.image_size
    zoe = {name.removeprefix("zoe/"): leaf for name, leaf in leaves.items() if name.startswith("zoe/")}
    if not zoe:
        raise InputError(f"{path} holds no ZoeDepth: its model takes depth from {config.depth_source!r}")
    return config.zoe, zoe, size
