"""Ego3D position encoding (SpatialVLA, section III-A): depth and intrinsics → 3-D points → an embedding per patch."""

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from spatialvla_jax.models.linear import Dense

SUB_GRID = 2  # points along each side of a patch
NUM_FREQUENCIES = 8


def back_project(depth: Float[Array, "B S S"], intrinsics: Float[Array, "B 3 3"], grid: int) -> Float[Array, "B P 12"]:
    """Camera-frame points (metres) of a 2×2 sub-grid in each of grid² patches; the 12 numbers are (row, column, xyz).

    Depth (metres) is averaged over each cell of the sub-grid (area resize); rays pass through the cells' centres.
    `intrinsics` are in pixels of the S×S image.
    """
    size = depth.shape[1]
    n = grid * SUB_GRID
    step = size // n
    if step * n != size:
        raise ValueError(f"depth of {size} px does not divide into {n}×{n} cells")
    cells = rearrange(depth.astype(jnp.float32), "B (y p) (x q) -> B y p x q", p=step, q=step).mean(axis=(2, 4))
    centre = jnp.arange(n, dtype=jnp.float32) * step + step / 2
    v, u = jnp.meshgrid(centre, centre, indexing="ij")
    # The inverse of [[fx, s, cx], [0, fy, cy], [0, 0, 1]] in closed form: exact, and without a linear solver.
    fx, skew, cx = (intrinsics[:, 0, i, None, None] for i in range(3))
    fy, cy = (intrinsics[:, 1, i, None, None] for i in (1, 2))
    y = (v - cy) / fy
    x = (u - cx - skew * y) / fx
    points = jnp.stack([x * cells, y * cells, cells], axis=-1)
    return rearrange(points, "B (h p) (w q) xyz -> B (h w) (p q xyz)", p=SUB_GRID, q=SUB_GRID)


def frequency_encoding(points: Float[Array, "B P 12"]) -> Float[Array, "B P 204"]:
    """(p − [0, 0, 2]) / 2; then for each number x: x, sin(2^k x) and cos(2^k x) for k = 0 … 7."""
    offset = jnp.tile(jnp.array([0.0, 0.0, 2.0]), SUB_GRID**2)
    x = ((points - offset) / 2)[..., None]
    angle = x * 2.0 ** jnp.arange(NUM_FREQUENCIES)
    encoded = jnp.concatenate([x, jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return rearrange(encoded, "B P numbers codes -> B P (numbers codes)")


class Ego3D(nn.Module):
    """Frequency encoding → Dense → LayerNorm → ReLU → Dense, both kernels Xavier with gain 0.01."""

    width: int
    grid: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, depth: Float[Array, "B S S"], intrinsics: Float[Array, "B 3 3"]) -> Float[Array, "B P D"]:
        # Points and sines stay in float32: bf16 cannot hold 2^7 times a coordinate.
        x = frequency_encoding(back_project(depth, intrinsics, self.grid)).astype(self.dtype)
        small_xavier = nn.initializers.variance_scaling(1e-4, "fan_avg", "uniform")
        D = self.width
        x = Dense("bpi,id->bpd", (x.shape[-1], D), self.dtype, small_xavier, name="dense_0")(x)
        x = nn.relu(nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(x))
        return Dense("bpi,id->bpd", (D, D), self.dtype, small_xavier, name="dense_1")(x)
