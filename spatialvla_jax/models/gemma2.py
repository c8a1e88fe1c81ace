"""Gemma 2 (Gemma Team 2024), read top to bottom: configuration, norm, attention, gated MLP, block, model.

Parameter names and layouts are big_vision's (`models/ppp/gemma.py`), plus `lm_head`, which SpatialVLA unties from the
embedding table.
"""

from dataclasses import dataclass
from math import prod

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from spatialvla_jax.errors import InputError
from spatialvla_jax.models.activation_sharding import constrain_batch
from spatialvla_jax.models.attention import Angles, attend, rotary, rotary_angles, sliding_window_mask, soft_cap
from spatialvla_jax.models.linear import adapter_of, linear
from spatialvla_jax.models.remat import rematerialise, scan_layers


@dataclass(frozen=True)
class Gemma2Config:
    """Defaults: Gemma 2 2B."""

    vocab_size: int = 257_152
    width: int = 2304
    depth: int = 26
    mlp_dim: int = 9216
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 256
    query_pre_attn_scalar: float = 256.0
    sliding_window: int = 4096
    attn_softcap: float = 50.0
    final_softcap: float = 30.0
    rope_base: float = 10_000.0

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"Gemma 2's {self.num_heads} heads must be a multiple of its {self.num_kv_heads} key/value heads."
            )
        if self.head_dim % 2:
            raise InputError(f"Gemma 2's head_dim {self.head_dim} must be even: rotary positions rotate pairs.")


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"]) -> Float[Array, "*B D"]:
    """x / rms(x) · (1 + scale), in float32; the result has the dtype of x."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-6)
    return (y * (1 + scale.astype(jnp.float32))).astype(x.dtype)


class RMSNorm(nn.Module):
    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return rms_norm(x, self.param("scale", nn.initializers.zeros_init(), (x.shape[-1],)))


class Einsum(nn.Module):
    """A weight named `w` and an einsum with it."""

    shape: tuple[int, ...]
    fan_in_axes: tuple[int, ...]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        w = self.param("w", fan_in_init(self.fan_in_axes), self.shape)
        return linear(equation, x, w.astype(self.dtype), adapter_of(self, "w"))


class Attention(nn.Module):
    config: Gemma2Config
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: Angles,
        mask: Bool[Array, "B T T"],
    ) -> Float[Array, "B T D"]:
        cfg = self.config
        N, K, D, H = cfg.num_heads, cfg.num_kv_heads, cfg.width, cfg.head_dim
        q = Einsum((N, D, H), (1,), self.dtype, name="q_einsum")("btd,ndh->btnh", x)
        k, v = Einsum((2, K, D, H), (2,), self.dtype, name="kv_einsum")("btd,ckdh->cbtkh", x)
        q, k = rotary(q, angles), rotary(k, angles)
        out = attend(q, k, v, mask, scale=cfg.query_pre_attn_scalar**-0.5, softcap=cfg.attn_softcap)
        return Einsum((N, H, D), (0, 1), self.dtype, name="attn_vec_einsum")("btnh,nhd->btd", out)


class FeedForward(nn.Module):
    config: Gemma2Config
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        D, F = self.config.width, self.config.mlp_dim
        gating = self.param("gating_einsum", fan_in_init((1,)), (2, D, F)).astype(self.dtype)
        down = self.param("linear", fan_in_init((0,)), (F, D)).astype(self.dtype)
        adapters = adapter_of(self, "gating_einsum")
        gate, up = (
            linear("btd,df->btf", x, gating[i], adapters and {name: part[i] for name, part in adapters.items()})
            for i in (0, 1)
        )
        return linear("btf,fd->btd", nn.gelu(gate, approximate=True) * up, down, adapter_of(self, "linear"))


class Block(nn.Module):
    config: Gemma2Config
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x, is_local, angles, masks):
        mask = masks[0] if masks[1] is None else jnp.where(is_local, masks[1], masks[0])
        norm = lambda name, y: RMSNorm(name=name)(y)  # noqa: E731
        attention = Attention(self.config, self.dtype, name="attn")
        y = attention(norm("pre_attention_norm", x), angles, mask)
        x = constrain_batch(x + norm("post_attention_norm", y))
        y = FeedForward(self.config, self.dtype, name="mlp")(norm("pre_ffw_norm", x))
        return constrain_batch(x + norm("post_ffw_norm", y)), None


class Embedder(nn.Module):
    config: Gemma2Config
    dtype: DTypeLike

    @nn.compact
    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        shape = (self.config.vocab_size, self.config.width)
        table = self.param("input_embedding", nn.initializers.normal(self.config.width**-0.5), shape)
        return jnp.take(table, ids, axis=0).astype(self.dtype)


class Gemma2(nn.Module):
    """Embeddings in, hidden states out; `embed` and `logits` convert from ids and to vocabulary logits.

    `remat` is one of `models.remat.POLICIES`; `unroll` compiles each layer separately instead of a loop over them.
    """

    config: Gemma2Config
    dtype: DTypeLike
    remat: str = "none"
    unroll: bool = False

    def setup(self) -> None:
        cfg = self.config
        self.embedder = Embedder(cfg, self.dtype)
        block = rematerialise(Block, self.remat, self.unroll)
        in_axes = (0, nn.broadcast, nn.broadcast)
        self.layers = scan_layers(block, cfg.depth, self.unroll, in_axes)(cfg, self.dtype)
        self.final_norm = RMSNorm()
        self.lm_head = self.param("lm_head", nn.initializers.normal(cfg.width**-0.5), (cfg.vocab_size, cfg.width))

    def embed(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Rows of the embedding table, not yet multiplied by sqrt(width): `__call__` scales every input."""
        return self.embedder(ids)

    def __call__(
        self,
        embeddings: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T T"],
    ) -> Float[Array, "B T D"]:
        """Run all layers. Inputs are scaled by sqrt(width) here; returned hidden states are normalised.

        Every second layer, from the first, attends to the last `sliding_window` positions only.
        """
        cfg = self.config
        x = constrain_batch(embeddings.astype(self.dtype) * jnp.asarray(cfg.width**0.5, self.dtype))
        local = sliding_window_mask(mask, positions, positions, cfg.sliding_window)
        angles = rotary_angles(positions, cfg.head_dim, cfg.rope_base)
        x, _ = self.layers(x, jnp.arange(cfg.depth) % 2 == 0, angles, (mask, local))
        return self.final_norm(x)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Soft-capped logits f32[B, T, V]."""
        out = unembed(hidden, self.lm_head.astype(self.dtype))
        return soft_cap(out, self.config.final_softcap)


@jax.custom_vjp
def unembed(hidden: Float[Array, "B T D"], head: Float[Array, "V D"]) -> Float[Array, "B T V"]:
    """hidden headᵀ, in float32. Gradients are computed in the operands' dtype, as usual in mixed precision. Float32
    gradients of a quarter of a million rows would double the memory and the traffic between devices."""
    return jnp.einsum("btd,vd->btv", hidden, head, preferred_element_type=jnp.float32)


def _unembed_forward(hidden: Array, head: Array) -> tuple[Array, tuple[Array, Array]]:
    return unembed(hidden, head), (hidden, head)


def _unembed_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    hidden, head = saved
    gradient = gradient.astype(hidden.dtype)
    return jnp.einsum("btv,vd->btd", gradient, head), jnp.einsum("btv,btd->vd", gradient, hidden)


unembed.defvjp(_unembed_forward, _unembed_backward)


def fan_in_init(in_axes: tuple[int, ...]) -> nn.initializers.Initializer:
    """Truncated normal with variance 1 / fan-in; the fan-in is the product of the sizes of `in_axes`."""

    def init(key, shape, dtype=jnp.float32):
        fan_in = prod(shape[axis] for axis in in_axes)
        return nn.initializers.truncated_normal(fan_in**-0.5)(key, shape, dtype)

    return init
