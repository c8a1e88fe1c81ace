"""SigLIP vision transformer (Zhai et al. 2023) as PaliGemma uses it: no pooling, a linear head to the LLM's width.

Parameter names and layouts are big_vision's (`models/vit.py` with `scan=True`), so its checkpoints load unchanged.
"""

from dataclasses import dataclass

import flax.linen as nn
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from spatialvla_jax.errors import InputError
from spatialvla_jax.models.activation_sharding import constrain_batch
from spatialvla_jax.models.attention import encoder_attention
from spatialvla_jax.models.linear import Dense
from spatialvla_jax.models.patches import multiply_patches
from spatialvla_jax.models.remat import rematerialise, scan_layers


@dataclass(frozen=True)
class SiglipConfig:
    """Defaults: So400m/14 at 224 px."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1152
    depth: int = 27
    num_heads: int = 16
    mlp_dim: int = 4304

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise InputError(
                f"SigLIP's image_size {self.image_size} must be a multiple of its patch_size {self.patch_size}."
            )
        if self.width % self.num_heads:
            raise InputError(
                f"SigLIP's width {self.width} must be a multiple of its number of heads, {self.num_heads}."
            )

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        return self.patches_per_side**2


class MlpBlock(nn.Module):
    mlp_dim: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        D, F = x.shape[-1], self.mlp_dim
        x = Dense("bpd,df->bpf", (D, F), self.dtype)(x)
        return Dense("bpf,fd->bpd", (F, D), self.dtype)(nn.gelu(x, approximate=True))


class MultiHeadDotProductAttention(nn.Module):
    num_heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        D, N = x.shape[-1], self.num_heads
        project = lambda name: Dense("bpd,dnh->bpnh", (D, N, D // N), self.dtype, name=name)(x)  # noqa: E731
        y = encoder_attention(project("query"), project("key"), project("value"))
        return Dense("bpnh,nhd->bpd", (N, D // N, D), self.dtype, name="out")(y)


class EncoderBlock(nn.Module):
    config: SiglipConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B P D"], _) -> tuple[Float[Array, "B P D"], None]:
        y = nn.LayerNorm(dtype=self.dtype)(x)
        x = constrain_batch(x + MultiHeadDotProductAttention(self.config.num_heads, self.dtype)(y))
        y = nn.LayerNorm(dtype=self.dtype)(x)
        return constrain_batch(x + MlpBlock(self.config.mlp_dim, self.dtype)(y)), None


class Encoder(nn.Module):
    config: SiglipConfig
    dtype: DTypeLike
    remat: str
    unroll: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        block = rematerialise(EncoderBlock, self.remat, self.unroll)
        layers = scan_layers(block, self.config.depth, self.unroll)
        x, _ = layers(self.config, self.dtype, name="encoderblock")(x, None)
        return nn.LayerNorm(dtype=self.dtype, name="encoder_norm")(x)


class Siglip(nn.Module):
    """Image → patch tokens → (+ optional position embedding) → language-model width.

    `head_width` is the language model's width; `remat` and `unroll` are as in `gemma2.Gemma2`.
    """

    config: SiglipConfig
    head_width: int
    dtype: DTypeLike
    remat: str = "none"
    unroll: bool = False

    @nn.compact
    def __call__(
        self, image: Float[Array, "B S S 3"], extra: Float[Array, "B P W"] | None = None
    ) -> tuple[Float[Array, "B P D"], Float[Array, "B P W"]]:
        """`image` is in [-1, 1]; `extra` (Ego3D) is added to the encoder's tokens before the head.

        Returns (projected tokens, encoder tokens).
        """
        cfg = self.config
        patch = (cfg.patch_size, cfg.patch_size)
        embedding = nn.Conv(
            cfg.width, patch, patch, "VALID", dtype=self.dtype, conv_general_dilated=multiply_patches, name="embedding"
        )
        x = rearrange(embedding(image), "B h w D -> B (h w) D")
        table = self.param("pos_embedding", nn.initializers.normal(cfg.width**-0.5), (1, cfg.num_tokens, cfg.width))
        x = constrain_batch(x + table.astype(self.dtype))
        tokens = Encoder(cfg, self.dtype, self.remat, self.unroll, name="Transformer")(x)
        fused = tokens if extra is None else tokens + extra.astype(tokens.dtype)
        head = Dense("bpd,dw->bpw", (cfg.width, self.head_width), self.dtype, name="head")
        return head(fused), tokens
