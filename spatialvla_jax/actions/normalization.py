"""Actions between robot units and [-1, 1], by the quantiles of their dataset's statistics."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from spatialvla_jax.actions.tokenizer import DIMENSIONS


def normalized_dimensions(width: int) -> tuple[bool, ...]:
    """All but the last of `width` dimensions: the gripper (0 closed .. 1 open) is left as it is."""
    return (True,) * (width - 1) + (False,)


def dimension_name(number: int, width: int) -> str:
    """What a message calls a dimension of actions that are `width` wide."""
    return DIMENSIONS[number] if width == len(DIMENSIONS) else "gripper" if number == width - 1 else f"number {number}"


def normalize(actions: Float[np.ndarray, "*B A"], statistics: Mapping[str, Any]) -> Float[np.ndarray, "*B A"]:
    """Canonical actions -> [-1, 1]: q01 and q99 go to -1 and 1, clipped; constant dimensions become 0; dimensions
    outside the mask stay. `statistics` is the "action" part of one dataset; its rows may also be arrays [*B, A]."""
    low, high, mask, constant = _bounds(statistics)
    scaled = np.clip(2 * (actions - low) / (high - low + 1e-8) - 1, -1, 1)
    return np.where(mask, np.where(constant, 0.0, scaled), actions).astype(np.float32)


def mean_and_std(values: Float[np.ndarray, "N D"]) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, " D"]]:
    """Of each column, f64: `values.mean(0)` and `values.std(0)` in float64, in the memory of a part of the rows. For
    D > 1 NumPy adds up row by row, too, so that the bits are the same."""

    def total(parts: Iterator[np.ndarray]) -> np.ndarray:
        sums = next(parts).sum(0, keepdims=True)
        for part in parts:
            sums = np.concatenate([sums, part]).sum(0, keepdims=True)
        return sums[0]

    mean = total(part.astype(np.float64) for part in in_parts(values)) / len(values)
    return mean, np.sqrt(total(np.square(part - mean) for part in in_parts(values)) / len(values))


def in_parts(values: np.ndarray, rows: int = 2**18) -> Iterator[np.ndarray]:
    """An array's rows, so many at a time: what is computed of each row then takes little memory."""
    return (values[first : first + rows] for first in range(0, len(values), rows))


def unnormalize(actions: Float[np.ndarray, "*B A"], statistics: Mapping[str, Any]) -> Float[np.ndarray, "*B A"]:
    """Inverse of `normalize`, up to its clipping: actions in robot units."""
    low, high, mask, _ = _bounds(statistics)
    return to_range(np.asarray(actions), low, high, mask).astype(np.float32)


def to_range(actions: Any, low: Any, high: Any, mask: Any) -> Any:
    """The formula of `unnormalize` on arrays of NumPy or JAX that broadcast: [-1, 1] → [low, high] where `mask`."""
    where = jnp.where if isinstance(actions, jax.Array) else np.where
    return where(mask, (actions + 1) / 2 * (high - low) + low, actions)


def action_bounds(statistics: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, Bool[np.ndarray, "*B A"]]:
    """What `unnormalize` needs: (value of -1, value of 1, which dimensions have them)."""
    low, high, mask, _ = _bounds(statistics)
    return low, high, mask


def _bounds(statistics: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, Bool[np.ndarray, "*B A"], np.ndarray]:
    low, high, smallest, largest = (np.asarray(statistics[name], np.float64) for name in ("q01", "q99", "min", "max"))
    mask = statistics.get("mask", normalized_dimensions(low.shape[-1]))
    return low, high, np.asarray(mask, bool), smallest == largest
