"""Gemma 2 laid out for generation: a list of layers, projections of one input in one product, a cache for each layer.

The mathematics are those of `models/gemma2.py`, which trains. Its layers are stacked for a scan, and a GPU copies a
slice of the stack at every step; here every matrix is an array of its own, rows first, so that a step reads each weight
once. `lay_out` makes this layout, `forward` runs it, on a GPU by `kernels.py`. Plain dicts throughout, so a layer is
deleted or added by hand.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

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


@jax.jit
def quantize(matrix: Float[Array, "out in"]) -> Quantized:
    """Symmetric int8, rounded to nearest: a row's largest magnitude is 127."""
    scale = jnp.maximum(jnp.max(jnp.abs(matrix.astype(jnp.float32)), axis=1), 1e-30) / 127
    return Quantized(jnp.round(matrix.astype(jnp.float32) / scale[:, None]).astype(jnp.int8), scale)


def lay_out(stacked: dict[str, Any], place: Callable[[Any], Array], finish: Callable[[Array], Matrix]) -> list[Any]:
    """The layers of `params["llm"]["layers"]` one by one. `place` moves an array to the device, `finish` takes each
    matrix that it becomes there (`quantize`, or nothing to do); no more than a layer is held twice."""
    depth = len(stacked["pre_attention_norm"]["scale"])
    return [_layer(jax.tree.map(lambda x, i=i: place(x[i]), stacked), finish) for i in range(depth)]


def _layer(w: dict[str, Any], finish: Callable[[Array], Matrix]) -> dict[str, Any]:
    q, kv, out = (w["attn"][name]["w"] for name in ("q_einsum", "kv_einsum", "attn_vec_einsum"))
    D = q.shape[1]
    return {
        "qkv": finish(jnp.concatenate([x.swapaxes(-1, -2).reshape(-1, D) for x in (q, kv)])),
        "out": finish(out.reshape(-1, D).T),
        "gate_up": finish(w["mlp"]["gating_einsum"].swapaxes(1, 2).reshape(-1, D)),
        "down": finish(w["mlp"]["linear"].T),
        **{name: w[name]["scale"] for name in w if name.endswith("_norm")},
    }


def linear(
    x: Float[Array, "*B in"], matrix: Matrix, dtype: Any = None, *, fused: bool = False
) -> Float[Array, "*B out"]:
    """x · matrixᵀ in `dtype`, by default that of x."""
    if fused and _is_small(matrix, x):
        return kernels.int8_linear(x, *matrix, dtype or x.dtype)
    values = matrix.values.astype(x.dtype) if isinstance(matrix, Quantized) else matrix
    y = jnp.einsum("...i,oi->...o", x, values, preferred_element_type=dtype or x.dtype)
    return y * matrix.scale.astype(y.dtype) if isinstance(matrix, Quantized) else y


def gated(x: Float[Array, "*B D"], matrix: Matrix, *, fused: bool = False) -> Float[Array, "*B F"]:
    """gelu(x · gateᵀ) · (x · upᵀ) of a matrix that holds the gate's rows and then the others."""
    if fused and _is_small(matrix, x):
        return kernels.int8_linear(x, *matrix, x.dtype, gated=True)
    gate, up = jnp.split(linear(x, matrix), 2, axis=-1)
    return jax.nn.gelu(gate, approximate=True) * up


def _is_small(matrix: Matrix, x: Array) -> TypeGuard[Quantized]:
    """Whether a product is bound by reading an int8 matrix, which `kernels.int8_linear` does best."""
    width = x.shape[-1]
    return isinstance(matrix, Quantized) and x.size <= width * kernels.MAX_TOKENS and width % 16 == 0


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"]) -> Float[Array, "*B D"]:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-6)
    return (y * (1 + scale.astype(jnp.float32))).astype(x.dtype)


def add_and_norm(
    x: Float[Array, "*B D"], y: Float[Array, "*B D"], inner: Float[Array, " D"], outer: Float[Array, " D"]
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
    """→ (sum = x + rms_norm(y, inner), rms_norm(sum, outer)): the end of one block and the beginning of the next."""
    x = x + rms_norm(y, inner)
    return x, rms_norm(x, outer)


def forward(
    cfg: Gemma2Config,
    layers: list[Any],
    final_norm: Float[Array, " D"],
    embeddings: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    mask: Bool[Array, "B T S"],
    local_mask: Bool[Array, "B T S"] | None = None,
    cache: Cache | None = None,
    at: Int[Array, ""] | int = 0,
    *,
    fused: bool = False,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Hidden states after the final norm, and keys and values: of the T positions alone, or with a `cache` its S slots
    with them written at `at`. `local_mask` is for the layers with a sliding window, every second from the first.

    `fused` takes the kernels of `kernels.py` where they apply: the same results up to rounding.
    """
    B, T, D = embeddings.shape
    N, K, H = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    x, written = embeddings * jnp.asarray(D**0.5, embeddings.dtype), []
    angles, scale = rotary_angles(positions, H, cfg.rope_base), cfg.query_pre_attn_scalar**-0.5
    join = kernels.norm_add_norm if fused else add_and_norm
    norms = [*(w["pre_attention_norm"] for w in layers), final_norm]
    normed = rms_norm(x, norms[0])
    for i, w in enumerate(layers):
        seen = mask if local_mask is None or i % 2 else local_mask
        qkv = linear(normed, w["qkv"], fused=fused).reshape(B, T, N + 2 * K, H)
        if fused and cache is not None and T <= kernels.MAX_TOKENS and mask.shape[-1] % kernels.BLOCK == 0:
            y, kv = kernels.attend_cached(qkv, angles, seen, cache[i], at, scale=scale, softcap=cfg.attn_softcap)
        else:
            q, k = (rotary(part, angles) for part in (qkv[:, :, :N], qkv[:, :, N : N + K]))
            kv = k, qkv[:, :, N + K :]
            if cache is not None:
                old, new = cache[i], kv
                kv = tuple(jax.lax.dynamic_update_slice(o, n, (0, at, 0, 0)) for o, n in zip(old, new, strict=True))
            y = attend(q, *kv, seen, scale=scale, softcap=cfg.attn_softcap)
        written.append(kv)
        y = linear(y.reshape(B, T, N * H), w["out"], fused=fused)
        x, normed = join(x, y, w["post_attention_norm"], w["pre_ffw_norm"])
        y = linear(gated(normed, w["gate_up"], fused=fused), w["down"], fused=fused)
        x, normed = join(x, y, w["post_ffw_norm"], norms[i + 1])
    return normed, tuple(written)


def narrow(
    cfg: Gemma2Config, mask: Bool[Array, "B T S"], positions: Int[Array, "B T"], keys: Int[Array, "B S"]
) -> Bool[Array, "B T S"] | None:
    """`mask` narrowed to the sliding window; None where the whole sequence fits into it."""
    if mask.shape[-1] <= cfg.sliding_window:
        return None
    return mask & (positions[:, :, None] - keys[:, None, :] < cfg.sliding_window)
