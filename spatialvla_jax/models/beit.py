"""BEiT vision transformer (Bao et al. 2022) as ZoeDepth uses it: a class token, layer scale, and relative position bias
in every layer instead of absolute positions. Returns the hidden states after each quarter of the layers.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from spatialvla_jax.errors import InputError
from spatialvla_jax.models.activation_sharding import constrain_batch
from spatialvla_jax.models.attention import encoder_attention
from spatialvla_jax.models.patches import multiply_patches
from spatialvla_jax.models.remat import scan_layers
from spatialvla_jax.models.resize import resize_bilinear

Grid = tuple[int, int]


@dataclass(frozen=True)
class BeitConfig:
    """Defaults: BEiT-L/16 at 384 px. `image_size` is that of pretraining, which sizes the relative position tables."""

    image_size: int = 384
    patch_size: int = 16
    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_dim: int = 4096
    num_taps: int = 4

    def __post_init__(self):
        if self.depth % self.num_taps:
            raise InputError(f"BEiT depth {self.depth} must be a multiple of its number of taps, {self.num_taps}.")
        if self.width % self.num_heads:
            raise InputError(f"BEiT width {self.width} must be a multiple of its number of heads, {self.num_heads}.")

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of the pretrained image."""
        return self.image_size // self.patch_size


HIDDEN = -1e9  # attention bias of a masked key
TOKENS = 8  # the token count is padded to a multiple of this, which suits matrix units


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Exact GELU by erf; `jax.nn.gelu` uses erfc, which takes twice as long on an H200."""
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + jax.lax.erf(y * 2**-0.5))).astype(x.dtype)


def relative_position_bias(
    table: Float[Array, "R N"], pretrained: int, grid: Grid, padding: int = 0
) -> Float[Array, "N T T"]:
    """Attention bias [head, query, key] for class token, row-major patches of `grid` = (h, w), `padding` masked tokens.

    `table` holds a row for each offset (dy, dx) between two patches of a `pretrained` x `pretrained` grid. Three rows
    follow: class → patch, patch → class and class → class. For other grids the offsets are interpolated (MiDaS 3.1).
    """
    (h, w), N = grid, table.shape[-1]
    offsets = table[:-3].reshape(1, 2 * pretrained - 1, 2 * pretrained - 1, N)
    offsets = resize_bilinear(offsets, (2 * h - 1, 2 * w - 1), align_corners=False)[0]
    if jax.default_backend() == "gpu":
        rows = jnp.concatenate([offsets.reshape(-1, N), table[-3:], jnp.full((1, N), HIDDEN), jnp.zeros((1, N))])
        return jnp.take(rows.T, _bias_rows(grid, padding), axis=1)
    # TPUs are slow at gathers. Entry (query, key) is offsets[query - key], so take one slice per key.
    rows = jnp.stack([offsets[h - 1 - k : 2 * h - 1 - k] for k in range(h)], axis=1)
    patches = jnp.stack([rows[:, :, w - 1 - k : 2 * w - 1 - k] for k in range(w)], axis=3)
    patches = rearrange(patches, "hq hk wq wk N -> N (hq wq) (hk wk)")

    def fill(row: int, *shape: int):
        return jnp.broadcast_to(table[row, :, None, None], (N, *shape))

    bias = jnp.block([[fill(-1, 1, 1), fill(-3, 1, h * w)], [fill(-2, h * w, 1), patches]])
    bias = jnp.pad(bias, ((0, 0), (0, padding), (0, 0)))
    return jnp.pad(bias, ((0, 0), (0, 0), (0, padding)), constant_values=HIDDEN)


def _bias_rows(grid: Grid, padding: int) -> np.ndarray:
    """i32[T, T]: the row for each (query, key) among the offsets, the table's last three, HIDDEN and zero."""
    h, w = grid
    y, x = (places.ravel() for places in np.indices(grid))
    offsets = (2 * h - 1) * (2 * w - 1)
    index = np.empty((1 + h * w, 1 + h * w), np.int32)
    index[1:, 1:] = (y[:, None] - y + h - 1) * (2 * w - 1) + (x[:, None] - x + w - 1)
    index[0, 1:], index[1:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
    index = np.pad(index, ((0, padding), (0, 0)), constant_values=offsets + 4)
    return np.pad(index, ((0, 0), (0, padding)), constant_values=offsets + 3)


class BeitAttention(nn.Module):
    config: BeitConfig
    grid: Grid
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The softmax is computed in float32."""
        cfg = self.config
        heads = (cfg.num_heads, cfg.width // cfg.num_heads)
        q = nn.DenseGeneral(heads, dtype=self.dtype, name="query")(x)
        k = nn.DenseGeneral(heads, dtype=self.dtype, use_bias=False, name="key")(x)
        v = nn.DenseGeneral(heads, dtype=self.dtype, name="value")(x)
        if self.has_variable("params", "bias"):
            bias = self.get_variable("params", "bias")
        else:
            rows = (2 * cfg.patches_per_side - 1) ** 2 + 3
            table = self.param("relative_position_bias", nn.initializers.zeros, (rows, cfg.num_heads))
            padding = x.shape[1] - self.grid[0] * self.grid[1] - 1
            bias = relative_position_bias(table.astype(jnp.float32), cfg.patches_per_side, self.grid, padding)
        y = encoder_attention(q, k, v, bias[None])
        return nn.DenseGeneral(cfg.width, axis=(-2, -1), dtype=self.dtype, name="out")(y)


class BeitLayer(nn.Module):
    config: BeitConfig
    grid: Grid
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], _=None) -> tuple[Float[Array, "B T D"], None]:
        cfg = self.config
        scale1, scale2 = (
            self.param(name, nn.initializers.constant(0.1), (cfg.width,)).astype(self.dtype)
            for name in ("layer_scale1", "layer_scale2")
        )
        y = nn.LayerNorm(epsilon=1e-12, use_fast_variance=False, dtype=self.dtype, name="norm1")(x)
        x = constrain_batch(x + scale1 * BeitAttention(cfg, self.grid, self.dtype, name="attention")(y), "tensor")
        y = nn.LayerNorm(epsilon=1e-12, use_fast_variance=False, dtype=self.dtype, name="norm2")(x)
        y = gelu(nn.Dense(cfg.mlp_dim, dtype=self.dtype, name="mlp_in")(y))
        return constrain_batch(x + scale2 * nn.Dense(cfg.width, dtype=self.dtype, name="mlp_out")(y), "tensor"), None


class BeitStage(nn.Module):
    """The layers up to one tap. Returns its output twice: as the scan's carry and as its collected output."""

    config: BeitConfig
    grid: Grid
    dtype: DTypeLike
    unroll: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], _) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        layers = scan_layers(BeitLayer, self.config.depth // self.config.num_taps, self.unroll)
        x, _ = layers(self.config, self.grid, self.dtype, name="layers")(x, None)
        return x, x


class Beit(nn.Module):
    """Image → hidden states at the taps. Layer parameters are stacked [taps, layers per tap, …]; `unroll` is as in
    `gemma2.Gemma2`."""

    config: BeitConfig
    dtype: DTypeLike
    unroll: bool = False

    @nn.compact
    def __call__(self, images: Float[Array, "B h w 3"]) -> Float[Array, "taps B T D"]:
        """`images` are normalised, h and w multiples of the patch size; T: the class token, then row-major patches."""
        cfg = self.config
        patch = (cfg.patch_size, cfg.patch_size)
        embedding = nn.Conv(
            cfg.width,
            patch,
            patch,
            "VALID",
            dtype=self.dtype,
            conv_general_dilated=multiply_patches,
            name="patch_embedding",
        )
        x = embedding(images)
        B, h, w, D = x.shape
        cls = self.param("cls_token", nn.initializers.zeros, (1, 1, D)).astype(self.dtype)
        # Padding is masked in attention and cut off at the end.
        tokens = h * w + 1
        x = jnp.concatenate([jnp.broadcast_to(cls, (B, 1, D)), rearrange(x, "B h w D -> B (h w) D")], axis=1)
        x = jnp.pad(x, ((0, 0), (0, -tokens % TOKENS), (0, 0)))
        stages = scan_layers(BeitStage, cfg.num_taps, self.unroll)
        _, taps = stages(cfg, (h, w), self.dtype, self.unroll, name="stages")(x, None)
        return taps[:, :, :tokens]
