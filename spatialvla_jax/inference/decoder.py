"""Gemma 2 laid out for generation: a list of layers, projections of one input in one product, a cache for each layer.

The mathematics are those of `models/gemma2.py`, which trains. Its layers are stacked for a scan, and a GPU copies a
slice of the stack at every step; here every matrix is an array of its own, rows first, so that a step reads each
weight once. The norms' scales stay stacked: their slices are free, and a call costs a microsecond or two for each array
that it is given. `to_decode_layout` makes this layout, `forward` runs it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spatialvla_jax.inference import kernels
from spatialvla_jax.models.attention import attend, rotary, rotary_angles
from spatialvla_jax.models.gemma2 import Gemma2Config

Cache = tuple[tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]], ...]


class Quantized(NamedTuple):
    """An int8 matrix with one scale a row: row r stands for values[r] · scale[r]."""

    values: Int[Array, "out in"]
    scale: Float[Array, " out"]


Matrix = Float[Array, "out in"] | Quantized
Scale = tuple[Float[Array, "L D"], int]  # a norm's, as a row of a stack


@jax.jit
def quantize(matrix: Float[Array, "out in"]) -> Quantized:
    """Symmetric int8, rounded to nearest: a row's largest magnitude is 127."""
    scale = jnp.maximum(jnp.max(jnp.abs(matrix.astype(jnp.float32)), axis=1), 1e-30) / 127
    return Quantized(jnp.round(matrix.astype(jnp.float32) / scale[:, None]).astype(jnp.int8), scale)


def to_decode_layout(
    stacked: dict[str, Any], place: Callable[[Any], Array], finish: Callable[[Array], Matrix]
) -> tuple[list[dict[str, Matrix]], dict[str, Float[Array, "L D"]]]:
    """→ (the matrices of `params["llm"]["layers"]` layer by layer, its norms' scales by name). `place` moves an array
    to the device, `finish` takes each matrix that it becomes there (`quantize`, or nothing to do); no more than a layer
    is held twice."""
    norms = {name: place(stacked[name]["scale"]) for name in stacked if name.endswith("_norm")}
    matrices = {name: stacked[name] for name in ("attn", "mlp")}
    depth = len(stacked["mlp"]["linear"])
    return [_layer(jax.tree.map(lambda x, i=i: place(x[i]), matrices), finish) for i in range(depth)], norms


def _layer(w: dict[str, Any], finish: Callable[[Array], Matrix]) -> dict[str, Matrix]:
    q, kv, out = (w["attn"][name]["w"] for name in ("q_einsum", "kv_einsum", "attn_vec_einsum"))
    D = q.shape[1]
    return {
        "qkv": finish(jnp.concatenate([x.swapaxes(-1, -2).reshape(-1, D) for x in (q, kv)])),
        "out": finish(out.reshape(-1, D).T),
        "gate_up": finish(w["mlp"]["gating_einsum"].swapaxes(1, 2).reshape(-1, D)),
        "down": finish(w["mlp"]["linear"].T),
    }


def linear(x: Float[Array, "*B in"], matrix: Matrix, dtype: Any = None) -> Float[Array, "*B out"]:
    """x · matrixᵀ in `dtype`, by default that of x."""
    values, scale = matrix if isinstance(matrix, Quantized) else (matrix, None)
    if kernels.can_multiply(x, values):
        return kernels.multiply(x, values, scale, dtype=dtype)
    y = jnp.einsum("...i,oi->...o", x, values.astype(x.dtype), preferred_element_type=dtype or x.dtype)
    return y if scale is None else y * scale.astype(y.dtype)


def gated(x: Float[Array, "*B in"], matrix: Matrix) -> Float[Array, "*B out/2"]:
    """GELU of the first half of x · matrixᵀ, times its second half."""
    values, scale = matrix if isinstance(matrix, Quantized) else (matrix, None)
    if kernels.can_multiply(x, values):
        return kernels.multiply(x, values, scale, gated=True)
    gate, up = jnp.split(linear(x, matrix), 2, axis=-1)
    return jax.nn.gelu(gate, approximate=True) * up


def linear_and_add(
    y: Float[Array, "*B in"], matrix: Matrix, x: Float[Array, "*B D"], post: Scale, pre: Scale
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
    """→ (x + the norm of y · matrixᵀ, that one's norm), as a block of a layer ends and the next begins."""
    values, scale = matrix if isinstance(matrix, Quantized) else (matrix, None)
    if kernels.can_multiply(y, values):
        return kernels.multiply_and_add(y, values, scale, x, post, pre)
    x = x + rms_norm(linear(y, matrix), post[0][post[1]])
    return x, rms_norm(x, pre[0][pre[1]])


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"]) -> Float[Array, "*B D"]:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-6)
    return (y * (1 + scale.astype(jnp.float32))).astype(x.dtype)


def attend_and_write(
    cfg: Gemma2Config,
    qkv: Float[Array, "B T N+2*K H"],
    angles: tuple[Float[Array, "B T 1 H/2"], Float[Array, "B T 1 H/2"]],
    mask: Bool[Array, "B T S"],
    cache: tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]] | None,
    at: Int[Array, ""] | int,
) -> tuple[Float[Array, "B T N H"], tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]]:
    """→ (attention's result, keys and values: the T new ones alone, or the cache with them written at `at`)."""
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
    layers: list[dict[str, Matrix]],
    norms: dict[str, Float[Array, "L D"]],
    final_norm: Float[Array, " D"],
    embeddings: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    mask: Bool[Array, "B T S"],
    local_mask: Bool[Array, "B T S"] | None = None,
    cache: Cache | None = None,
    at: Int[Array, ""] | int = 0,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Hidden states after the final norm, and keys and values: of the T positions alone, or with a `cache` its S slots
    with them written at `at`. `local_mask` is for the layers with a sliding window, every second from the first."""
    B, T, D = embeddings.shape
    H, depth = cfg.head_dim, len(layers)
    x, written = embeddings * jnp.asarray(D**0.5, embeddings.dtype), []
    angles = rotary_angles(positions, H, cfg.rope_base)
    y = rms_norm(x, norms["pre_attention_norm"][0])
    for i, w in enumerate(layers):
        norm = {name: (scales, i) for name, scales in norms.items()}
        qkv = linear(y, w["qkv"]).reshape(B, T, -1, H)
        seen = mask if local_mask is None or i % 2 else local_mask
        y, kv = attend_and_write(cfg, qkv, angles, seen, None if cache is None else cache[i], at)
        written.append(kv)
        y = y.reshape(B, T, -1)
        x, y = linear_and_add(y, w["out"], x, norm["post_attention_norm"], norm["pre_ffw_norm"])
        then = (norms["pre_attention_norm"], i + 1) if i + 1 < depth else (final_norm[None], 0)
        x, y = linear_and_add(gated(y, w["gate_up"]), w["down"], x, norm["post_ffw_norm"], then)
    return y, tuple(written)


def narrow(
    cfg: Gemma2Config, mask: Bool[Array, "B T S"], positions: Int[Array, "B T"], keys: Int[Array, "B S"]
) -> Bool[Array, "B T S"] | None:
    """`mask` narrowed to the sliding window; None where the whole sequence fits into it."""
    if mask.shape[-1] <= cfg.sliding_window:
        return None
    return mask & (positions[:, :, None] - keys[:, None, :] < cfg.sliding_window)
