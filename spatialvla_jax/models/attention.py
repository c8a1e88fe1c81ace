"""Attention and masks.

Axis letters, used in every shape of this package: B batch, T query position, S key position, N heads, K key/value
heads, H head dim, D width, F MLP width, L layers, V vocabulary, P image patches. Model inputs are S×S images; images of
any size and feature maps are h×w with C channels.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from spatialvla_jax.models.fused_attention import attend_fused, can_fuse

Angles = tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]  # sines and cosines of `rotary_angles`


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention with Gemma 2's tanh soft cap; the softmax is computed in float32.

    Fused where `fused_attention.can_fuse`. Rows without a visible key give 0 if fused, else the mean of `v`.
    """
    if softcap is not None and can_fuse(q, k, softcap):
        return attend_fused(q, k, v, mask, scale=scale, softcap=softcap)
    _, T, N, _ = q.shape
    if T > 1 and jax.default_backend() == "gpu":  # one product per head: 0.9 ms, not 1.2, on an H200; slower on a CPU
        k, v = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k, v))
    q = rearrange(q, "B T (K G) H -> B T K G H", K=k.shape[2])
    logits = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        logits = soft_cap(logits, softcap)
    logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return rearrange(jnp.einsum("bkgts,bskh->btkgh", weights, v), "B T K G H -> B T (K G) H")


def soft_cap(logits: Float[Array, "..."], cap: float) -> Float[Array, "..."]:
    """Gemma 2's cap: nearly the same where small, and within ± cap everywhere."""
    return cap * jnp.tanh(logits / cap)


def encoder_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    bias: Float[Array, "#B N T S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of the vision models: no mask, scale H^-0.5, softmax in float32.

    Uses cuDNN's fused kernel for bfloat16 and even lengths on a GPU (half the time of XLA's at SigLIP's and BEiT's
    sizes), else XLA's.
    """
    # JAX refuses the gradient of cuDNN's kernel for odd lengths.
    even = q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0
    fused = even and q.dtype == jnp.bfloat16 and jax.default_backend() == "gpu"
    if fused and bias is not None:
        bias = bias.astype(q.dtype)
    return jax.nn.dot_product_attention(q, k, v, bias=bias, implementation="cudnn" if fused else "xla")


def prefix_lm_mask(valid: Bool[Array, "B S"], prefix_length: int) -> Bool[Array, "B S S"]:
    """The first `prefix_length` positions attend to each other, the rest causally; padding is masked.

    `prefix_length` 0 gives a causal mask.
    """
    S = valid.shape[1]
    position = jnp.arange(S)
    visible = (position[None, :] <= position[:, None]) | (position[None, :] < prefix_length)
    return visible[None] & valid[:, None, :]


def sliding_window_mask(
    mask: Bool[Array, "B T S"], positions: Int[Array, "B T"], key_positions: Int[Array, "B S"], window: int
) -> Bool[Array, "B T S"] | None:
    """`mask` restricted to keys fewer than `window` positions back; None if all S keys fit into the window."""
    if mask.shape[-1] <= window:
        return None
    return mask & (positions[:, :, None] - key_positions[:, None, :] < window)


def position_ids(valid: Bool[Array, "B S"]) -> Int[Array, "B S"]:
    """Rotary positions that skip padding and start at 1, as PaliGemma counts them."""
    return jnp.cumsum(valid, axis=1)


def rotary_angles(positions: Int[Array, "B T"], head_dim: int, base: float = 10_000.0) -> Angles:
    """Sines and cosines f32[B, T, 1, head_dim / 2] for `rotary`, computed once for all layers."""
    half = head_dim // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None] * frequencies
    # The barrier stops the compiler from recomputing them in every kernel that reads them.
    return jax.lax.optimization_barrier((jnp.sin(angle), jnp.cos(angle)))


def rotary(x: Float[Array, "B T N H"], angles: Angles) -> Float[Array, "B T N H"]:
    """Rotary position embedding (Su et al. 2021) on split halves, computed in float32."""
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    sin, cos = angles
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)
