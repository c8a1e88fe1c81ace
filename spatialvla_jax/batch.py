"""`Observation` (the model's inputs) and `Batch` (with training targets): the contract of data, model, step and policy.

Axis letters: B examples, H×W pixels (S×S from the loader), Q prompt tokens, T actions per chunk, A dimensions of an
action. Both are pytrees of NumPy arrays on the host or JAX arrays on a device. Trees of the same structure may also
hold shapes or shardings.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float32, Int32, Int64, UInt8

from spatialvla_jax.models.spatialvla import SpatialVLAConfig

# NumPy arrays on the host, JAX arrays on a device. Static checkers cannot know which, so they see Any.
if TYPE_CHECKING:
    Array = Any
else:
    Array = np.ndarray | jax.Array

WIDTHS = {"target": 3, "hand": 4}  # of the fields of `Batch` that only recordings in packed files have


class Observation(struct.PyTreeNode, kw_only=True):
    """The model's inputs for B examples. The fields are keyword arguments of `SpatialVLA.__call__`."""

    image: UInt8[Array, "B H W 3"] | Float32[Array, "B H W 3"]  # u8 as stored; the model takes f32 in [0, 1]
    depth: Float32[Array, "B H W"] | None = None  # metres; only for depth_source="dataset"
    intrinsics: Float32[Array, "B 3 3"]  # pixels of the image
    prompt_ids: Int32[Array, "B Q"]
    prompt_mask: Bool[Array, "B Q"]  # False: padding

    @classmethod
    def abstract(cls, config: SpatialVLAConfig, batch_size: int) -> "Observation":
        """Shapes and dtypes as the loader returns them."""
        B, S, Q = batch_size, config.img.image_size, config.prompt_length
        return Observation(
            image=_shape(jnp.uint8, B, S, S, 3),
            depth=_shape(jnp.float32, B, S, S) if config.depth_source == "dataset" else None,
            intrinsics=_shape(jnp.float32, B, 3, 3),
            prompt_ids=_shape(jnp.int32, B, Q),
            prompt_mask=_shape(jnp.bool_, B, Q),
        )

    def model_inputs(self) -> dict[str, Any]:
        """The keyword arguments that `SpatialVLA.__call__` and `generate` take from an observation."""
        return {field.name: getattr(self, field.name) for field in fields(Observation)}


class Batch(Observation, kw_only=True):
    """B training examples from a mixture, as the loader returns them.

    Past the episode's end the normalised motion is 0, the gripper keeps its last value (as in OpenVLA and the release),
    and `action_mask` is False.
    """

    actions: Float32[Array, "B T A"]  # normalised
    action_mask: Bool[Array, "B T"]
    target: Float32[Array, "B 3"] | None = None  # the task's object in the camera's frame, metres; see `loss.target`
    hand: Float32[Array, "B 4"] | None = None  # the point between the fingertips, likewise, and their distance, metres
    dataset_id: Int32[Array, " B"]  # index of the dataset in the mixture
    valid: Bool[Array, " B"] | None = None  # only in epochs: False for rows that pad the last batch
    sample_id: Int64[np.ndarray, " B"] | None = None  # index among all frames of the split; stays on the host

    @classmethod
    def abstract(
        cls, config: SpatialVLAConfig, batch_size: int, action_dim: int, recorded: Sequence[str] = ()
    ) -> "Batch":
        """Shapes and dtypes of a training batch on the device, with the fields in `recorded`."""
        B, T = batch_size, config.action_chunk
        return Batch(
            **Observation.abstract(config, B).model_inputs(),
            actions=_shape(jnp.float32, B, T, action_dim),
            action_mask=_shape(jnp.bool_, B, T),
            **{name: _shape(jnp.float32, B, WIDTHS[name]) for name in recorded},
            dataset_id=_shape(jnp.int32, B),
        )


def example_inputs(config: SpatialVLAConfig) -> dict[str, Any]:
    """Zeros in the model's input shapes for one example: keyword arguments of `SpatialVLA.__call__`."""
    observation = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), Observation.abstract(config, 1))
    observation = observation.replace(image=observation.image.astype(jnp.float32))
    return observation.model_inputs() | {"action_ids": jnp.zeros((1, config.num_action_tokens), jnp.int32)}


def _shape(dtype: Any, *shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)
