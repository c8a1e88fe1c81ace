"""Convert actions between robot units and [-1, 1], by the quantiles of their dataset's statistics."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from spatialvla_jax.actions.tokenizer import DIMENSIONS


def normalized_dimensions(width: int) -> tuple[bool, ...]:
    """True for all but the last of `width` dimensions: the gripper (0 closed, 1 open) is not normalised."""
    return (True,) * (width - 1) + (False,)


def dimension_name(number: int, width: int) -> str:
    """The name used in messages for dimension `number` of actions with `width` dimensions."""
    return DIMENSIONS[number] if width == len(DIMENSIONS) else "gripper" if number == width - 1 else f"number {number}"


def normalize(actions: Float[np.ndarray, "*B A"], statistics: Mapping[str, Any]) -> Float[np.ndarray, "*B A"]:
    """Canonical actions → [-1, 1], f32: q01 maps to -1 and q99 to 1, clipped. Constant dimensions become 0; dimensions
    outside the mask are unchanged. `statistics` is one dataset's "action" entry; its rows may be arrays [*B, A]."""
    low, high, mask = action_bounds(statistics)
    constant = np.equal(statistics["min"], statistics["max"])
    scaled = np.clip(2 * (actions - low) / (high - low + 1e-8) - 1, -1, 1)
    return np.where(mask, np.where(constant, 0.0, scaled), actions).astype(np.float32)


def mean_and_std(values: Float[np.ndarray, "N D"]) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, " D"]]:
    """Column means and standard deviations, f64[D] each, computed in blocks of rows to save memory. For D > 1 the bits
    equal NumPy's, which also sums row by row."""

    def total(parts: Iterator[np.ndarray]) -> np.ndarray:
        sums = next(parts).sum(0, keepdims=True)
        for part in parts:
            sums = np.concatenate([sums, part]).sum(0, keepdims=True)
        return sums[0]

    mean = total(part.astype(np.float64) for part in in_parts(values)) / len(values)
    return mean, np.sqrt(total(np.square(part - mean) for part in in_parts(values)) / len(values))


def in_parts(values: np.ndarray) -> Iterator[np.ndarray]:
    """Iterate over an array in blocks of rows, so that temporaries stay small."""
    rows = 2**18
    return (values[first : first + rows] for first in range(0, len(values), rows))


def unnormalize(actions: Float[np.ndarray, "*B A"], statistics: Mapping[str, Any]) -> Float[np.ndarray, "*B A"]:
    """Inverse of `normalize`, up to its clipping: f32 actions in robot units."""
    low, high, mask = action_bounds(statistics)
    return to_range(np.asarray(actions), low, high, mask).astype(np.float32)


def to_range(actions: Any, low: Any, high: Any, mask: Any) -> Any:
    """The formula of `unnormalize` on broadcastable NumPy or JAX arrays: [-1, 1] → [low, high] where `mask`."""
    where = jnp.where if isinstance(actions, jax.Array) else np.where
    return where(mask, (actions + 1) / 2 * (high - low) + low, actions)


def action_bounds(statistics: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, Bool[np.ndarray, "*B A"]]:
    """What `unnormalize` needs: (value of -1, value of 1, bool mask of normalised dimensions)."""
    low, high = (np.asarray(statistics[name], np.float64) for name in ("q01", "q99"))
    mask = statistics.get("mask", normalized_dimensions(low.shape[-1]))
    return low, high, np.asarray(mask, bool)
