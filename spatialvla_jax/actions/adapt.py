"""Spatial embedding adaption: interpolate one grid's embedding table at another grid's bin centres (paper III-B)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spatialvla_jax.actions.grid import VARIABLES, ActionGrid, bin_centers
from spatialvla_jax.errors import InputError


def adapt_embeddings(
    old_grid: ActionGrid, new_grid: ActionGrid, table: Float[Array | np.ndarray, "V_old D"]
) -> Float[Array, "V_new D"]:
    """Embeddings f[V_new, D] of the new grid's ids, interpolated trilinearly from the old grid's table (paper III-B).

    The axes are (theta, phi, r) for translation and (roll, pitch, yaw) for rotation. Gripper rows are copied, the dtype
    is kept, and bin counts may differ. Between two old centres the interpolation is linear. Beyond the outermost old
    centre it extrapolates from the last two, by less than one bin. A table linear in the centres is therefore
    reproduced exactly. The exception is the seam of phi, where the first and last bins are neighbours and such a table
    jumps. An axis of one bin is constant. Equal grids return the table exactly.

    Raises InputError when the table's row count differs from the old grid's vocabulary size.
    """
    if table.shape[0] != old_grid.vocab_size:
        raise InputError(f"The table to adapt has {table.shape[0]} rows, but its grid has {old_grid.vocab_size} ids.")
    return _adapt(old_grid, new_grid, jnp.asarray(table))


@jax.jit
def _adapt(old_grid: ActionGrid, new_grid: ActionGrid, table: Float[Array, "V_old D"]) -> Float[Array, "V_new D"]:
    axes = [
        _neighbours(bin_centers(old), bin_centers(new), 2 * np.pi if name == "phi" else None)
        for name, old, new in zip(VARIABLES, old_grid.edges, new_grid.edges, strict=True)
    ]
    parts = []
    for i, (start, _) in enumerate(old_grid.token_ranges[:2]):
        rows, weights = _corners(axes[3 * i : 3 * i + 3], old_grid.num_bins[3 * i : 3 * i + 3])
        # Eight gathers that XLA fuses into one pass: far less memory traffic than one product per axis.
        corners = [
            weight[:, None] * jnp.take(table, start + row, axis=0, mode="clip")
            for row, weight in zip(rows, weights, strict=True)
        ]
        parts.append(functools.reduce(jnp.add, corners).astype(table.dtype))
    return jnp.concatenate([*parts, table[-2:]])


def _neighbours(
    old: Float[Array, " old"], new: Float[Array, " new"], period: float | None
) -> tuple[Int[Array, "2 new"], Float[Array, "2 new"]]:
    """For each new centre, the indices of its two neighbouring old centres and their weights."""
    index = jnp.arange(len(old))
    if len(old) == 1:
        old, index = jnp.concatenate([old, old + 1]), jnp.zeros(2, int)
    elif period is not None:
        old = jnp.concatenate([old[-1:] - period, old, old[:1] + period])
        index = jnp.concatenate([index[-1:], index, index[:1]])
    low = jnp.clip(jnp.searchsorted(old, new, side="right") - 1, 0, len(old) - 2)
    part = (new - old[low]) / (old[low + 1] - old[low])
    return jnp.stack([index[low], index[low + 1]]), jnp.stack([1 - part, part])


def _corners(
    axes: list[tuple[Int[Array, "2 _"], Float[Array, "2 _"]]], num_bins: tuple[int, ...]
) -> tuple[Int[Array, "8 V_new"], Float[Array, "8 V_new"]]:
    """Row numbers and weights of the eight old cells around each new cell, in the order of the new ids."""
    rows, weights = jnp.zeros((1, 1), int), jnp.ones((1, 1))
    for (index, weight), bins in zip(axes, num_bins, strict=True):
        rows = (rows[:, None, :, None] * bins + index[:, None, :]).reshape(2 * len(rows), -1)
        weights = (weights[:, None, :, None] * weight[:, None, :]).reshape(2 * len(weights), -1)
    return rows, weights
