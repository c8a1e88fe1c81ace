"""Gemma 2 for generation: a list of layers, fused projections, and a key/value cache per layer.

Computes the same function as `models/gemma2.py`, which is used in training. `weights.to_decode_layout` converts its
parameters: every matrix is an array of its own, stored by rows, so that a step reads each weight once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from spatialvla_jax.inference import kernels
from spatialvla_jax.models.attention import Angles, attend, rotary, rotary_angles
from spatialvla_jax.models.gemma2 import Gemma2Config, rms_norm

LayerCache = tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]  # keys, values
Cache = tuple[LayerCache, ...]


class Quantized(NamedTuple):
    """An int8 matrix with one scale per row: row r represents values[r] · scale[r]."""

    values: Int[Array, "out in"]
    scale: Float[Array, " out"]


Matrix = Float[Array, "out in"] | Quantized
Scale = tuple[Float[Array, "_ D"], int]  # (stacked norm scales, row of this norm)


class Layer(NamedTuple):
    """The matrices of one layer, [outputs, inputs]. qkv stacks the heads of queries, keys and values; gate_up stacks
    both halves of the gated MLP."""

    qkv: Matrix
    out: Matrix
    gate_up: Matrix
    down: Matrix


class DecoderWeights(NamedTuple):
    """Gemma 2's layers; `norms` maps each of the four norms of a layer to its scales, stacked over layers."""

    layers: list[Layer]
    norms: dict[str, Float[Array, "L D"]]
    final_norm: Float[Array, " D"]


@jax.jit
def quantize(matrix: Float[Array, "out in"]) -> Quantized:
    """Symmetric int8, rounded to nearest; each row's largest magnitude maps to 127."""
    scale = jnp.maximum(jnp.max(jnp.abs(matrix.astype(jnp.float32)), axis=1), 1e-30) / 127
    return Quantized(jnp.round(matrix.astype(jnp.float32) / scale[:, None]).astype(jnp.int8), scale)


def linear(x: Float[Array, "*B in"], matrix: Matrix, dtype: DTypeLike | None = None) -> Float[Array, "*B out"]:
    """x · matrixᵀ in `dtype`, by default that of x."""
    values, scale = matrix if isinstance(matrix, Quantized) else (matrix, None)
    if kernels.can_multiply(x, values):
        return kernels.multiply(x, values, scale, dtype=dtype)
    y = jnp.einsum("...i,oi->...o", x, values.astype(x.dtype), preferred_element_type=dtype or x.dtype)
    return y if scale is None else y * scale.astype(y.dtype)


def gated(x: Float[Array, "*B in"], matrix: Matrix) -> Float[Array, "*B _"]:
    """GELU of the first half of x · matrixᵀ, times the second half."""
    values, scale = matrix if isinstance(matrix, Quantized) else (matrix, None)
    if kernels.can_multiply(x, values):
        return kernels.multiply(x, values, scale, gated=True)
    gate, up = jnp.split(linear(x, matrix), 2, axis=-1)
    return jax.nn.gelu(gate, approximate=True) * up


def linear_and_add(
    y: Float[Array, "*B in"], matrix: Matrix, x: Float[Array, "*B D"], post: Scale, pre: Scale
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
    """→ (r, norm of r) with r = x + norm of y · matrixᵀ: the end of one sub-block and the start of the next."""
    values, scale = matrix if isinstance(matrix, Quantized) else (matrix, None)
    if kernels.can_multiply(y, values):
        return kernels.multiply_and_add(y, values, scale, x, post, pre)
    x = x + rms_norm(linear(y, matrix), post[0][post[1]])
    return x, rms_norm(x, pre[0][pre[1]])


def attend_and_write(
    cfg: Gemma2Config,
    qkv: Float[Array, "B T heads H"],
    angles: Angles,
    mask: Bool[Array, "B T S"],
    cache: LayerCache | None,
    at: Int[Array, ""] | int,
) -> tuple[Float[Array, "B T N H"], LayerCache]:
    """→ (attention output, keys and values: only the T new ones, or the cache with them written at slot `at`)."""
    N, K = cfg.num_heads, cfg.num_kv_heads
    options = {"scale": cfg.query_pre_attn_scalar**-0.5, "softcap": cfg.attn_softcap}
    if cache is not None and kernels.can_attend(qkv, cache, cfg.attn_softcap):
        return kernels.attend_cached(qkv, angles, mask, cache, at, **options)
    q, k = (rotary(part, angles) for part in (qkv[:, :, :N], qkv[:, :, N : N + K]))
    v = qkv[:, :, N + K :]
    if cache is not None:
        k, v = (jax.lax.dynamic_update_slice(old, new, (0, at, 0, 0)) for old, new in zip(cache, (k, v), strict=True))
    return attend(q, k, v, mask, **options), (k, v)


def forward(
    cfg: Gemma2Config,
    weights: DecoderWeights,
    embeddings: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    mask: Bool[Array, "B T S"],
    local_mask: Bool[Array, "B T S"] | None = None,
    cache: Cache | None = None,
    at: Int[Array, ""] | int = 0,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Hidden states after the final norm, and keys and values. Without a `cache` these cover the T positions; with one,
    its S slots with the new ones written at `at`. `local_mask` is for layers 0, 2, …, which have a sliding window."""
    layers, norms, final_norm = weights
    x = embeddings * jnp.asarray(cfg.width**0.5, embeddings.dtype)
    angles = rotary_angles(positions, cfg.head_dim, cfg.rope_base)
    written: list[LayerCache] = []
    y = rms_norm(x, norms["pre_attention_norm"][0])
    for i, w in enumerate(layers):
        norm = {name: (scales, i) for name, scales in norms.items()}
        qkv = rearrange(linear(y, w.qkv), "B T (heads H) -> B T heads H", H=cfg.head_dim)
        visible = mask if local_mask is None or i % 2 else local_mask
        y, kv = attend_and_write(cfg, qkv, angles, visible, None if cache is None else cache[i], at)
        written.append(kv)
        y = rearrange(y, "B T N H -> B T (N H)")
        x, y = linear_and_add(y, w.out, x, norm["post_attention_norm"], norm["pre_ffw_norm"])
        following = (norms["pre_attention_norm"], i + 1) if i + 1 < len(layers) else (final_norm[None], 0)
        x, y = linear_and_add(gated(y, w.gate_up), w.down, x, norm["post_ffw_norm"], following)
    return y, tuple(written)
