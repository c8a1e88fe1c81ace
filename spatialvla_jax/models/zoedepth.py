"""ZoeDepth NK (Bhat et al. 2023): metric depth from one image, with an indoor (nyu) and an outdoor (kitti) head.

Follows the released weights as transformers' `ZoeDepthForDepthEstimation` runs them, with one difference: the nyu/kitti
vote is taken per example, not summed over the batch. Both agree at batch size 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from spatialvla_jax.errors import InputError
from spatialvla_jax.models.beit import Beit, BeitConfig, gelu
from spatialvla_jax.models.patches import multiply_patches
from spatialvla_jax.models.remat import scan_layers
from spatialvla_jax.models.resize import reflect_pad, resize_bicubic, resize_bilinear

DOMAINS = ("nyu", "kitti")

# Fixed by the released weights and code, although the published config differs (attractors 16, 8, 4, 1; alpha 1000).
NUM_ATTRACTORS = 16
ATTRACTOR_ALPHA = 300.0

DEPTH_PAD = 31  # pixels mirrored around the image, regardless of its size


@dataclass(frozen=True)
class ZoeDepthConfig:
    """Defaults: the published ZoeDepth NK, 345 M parameters."""

    backbone: BeitConfig = field(default_factory=BeitConfig)
    neck_widths: tuple[int, int, int, int] = (256, 512, 1024, 1024)
    fusion_width: int = 256
    relative_features: int = 32
    bottleneck_width: int = 256
    bin_embedding_dim: int = 128
    num_bins: int = 64
    min_temperature: float = 0.0212
    max_temperature: float = 50.0
    classifier_width: int = 128
    classifier_depth: int = 4
    classifier_heads: int = 4
    classifier_mlp_dim: int = 1024
    unroll: bool = False  # as in `gemma2.Gemma2`

    def __post_init__(self):
        size, patch = self.backbone.image_size, self.backbone.patch_size
        if size % (2 * patch):
            raise InputError(f"ZoeDepth's image_size {size} must be a multiple of twice its patch_size {patch}.")
        width, heads = self.classifier_width, self.classifier_heads
        if width % 2 or width % heads:
            raise InputError(f"ZoeDepth's classifier width {width} must be even and a multiple of its {heads} heads.")


def estimate_depth(
    zoedepth: Callable[[Float[Array, "B Z Z 3"]], Float[Array, "B Z Z"]],
    images: Float[Array, "B S S 3"],
    input_size: int = 384,
) -> Float[Array, "B S S"]:
    """Metric depth in metres of RGB images in [0, 1], following the depth path of the SpatialVLA release.

    Mirrors 31 px around the image, resizes it to Z = `input_size` and normalises it to [-1, 1]. Then runs `zoedepth` (a
    bound `ZoeDepth`), resizes back and crops the border. Raises InputError for images of at most 31 px.
    """
    S = images.shape[1]
    if S <= DEPTH_PAD:
        raise InputError(f"image_size is {S}, but ZoeDepth's border needs images of more than {DEPTH_PAD} px.")
    padded = S + 2 * DEPTH_PAD
    depth = zoedepth(zoedepth_input(images, input_size))
    depth = resize_bicubic(depth, (padded, padded))
    return depth[:, DEPTH_PAD:-DEPTH_PAD, DEPTH_PAD:-DEPTH_PAD]


def zoedepth_input(images: Float[Array, "B S S 3"], input_size: int = 384) -> Float[Array, "B Z Z 3"]:
    """RGB in [0, 1] → ZoeDepth's input in [-1, 1]: border mirrored, resized, normalised with mean and std 0.5."""
    images = resize_bicubic(reflect_pad(images.astype(jnp.float32), DEPTH_PAD), (input_size, input_size))
    return (images - 0.5) / 0.5


class ZoeDepth(nn.Module):
    """Normalised image → metric depth. Runs in `dtype`; routing, bin centres, attractors and softmax in float32."""

    config: ZoeDepthConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, images: Float[Array, "B h w 3"]) -> Float[Array, "B _ _"]:
        """`images` are in [-1, 1]; h and w are multiples of twice the patch size. Returns f32 depth in metres, with 16
        pixels along each side of a patch: the image's own size at the released patch size."""
        cfg = self.config
        grid = (images.shape[1] // cfg.backbone.patch_size, images.shape[2] // cfg.backbone.patch_size)
        taps = Beit(cfg.backbone, self.dtype, cfg.unroll, name="backbone")(images)
        bottleneck, pyramid = Neck(cfg, self.dtype, name="neck")(taps, grid)
        features, _ = RelativeHead(cfg, self.dtype, name="relative_head")(pyramid[-1])
        return MetricHead(cfg, self.dtype, name="metric_head")(features, bottleneck, pyramid)


class Neck(nn.Module):
    """DPT's reassemble and fusion stages (Ranftl et al. 2021): tokens → feature maps, coarse to fine."""

    config: ZoeDepthConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, taps: Float[Array, "4 B T D"], grid: tuple[int, int]
    ) -> tuple[Float[Array, "B h w C"], list[Float[Array, "B _ _ C"]]]:
        """Returns (bottleneck at half the grid, maps at 1, 2, 4 and 8 times the grid)."""
        maps = []
        for i, tap in enumerate(taps):
            x = Reassemble(self.config, i, self.dtype, name=f"reassemble_{i}")(tap, grid)
            maps.append(_conv(self.config.fusion_width, 3, self.dtype, f"conv_{i}", use_bias=False)(x))
        pyramid, fused = [], None
        for i, x in enumerate(reversed(maps)):
            fused = Fusion(self.config.fusion_width, self.dtype, name=f"fusion_{i}")(x, fused)
            pyramid.append(fused)
        return maps[-1], pyramid


class Reassemble(nn.Module):
    """Tokens of tap `index` → feature map at 4, 2, 1 or 1/2 times the grid; every patch gets the class token too."""

    config: ZoeDepthConfig
    index: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, tokens: Float[Array, "B T D"], grid: tuple[int, int]) -> Float[Array, "B h w C"]:
        patches = tokens[:, 1:]
        readout = jnp.concatenate([patches, jnp.broadcast_to(tokens[:, :1], patches.shape)], axis=-1)
        x = gelu(nn.Dense(tokens.shape[-1], dtype=self.dtype, name="readout")(readout))
        width = self.config.neck_widths[self.index]
        x = _conv(width, 1, self.dtype, "projection")(rearrange(x, "B (h w) D -> B h w D", h=grid[0]))
        if self.index < 2:
            up = (4, 4) if self.index == 0 else (2, 2)
            return nn.ConvTranspose(
                width, up, strides=up, padding="VALID", transpose_kernel=True, dtype=self.dtype, name="resize"
            )(x)
        return x if self.index == 2 else _conv(width, 3, self.dtype, "resize", strides=2)(x)


class Fusion(nn.Module):
    """Adds a finer map to the fused map so far, refines it and doubles its resolution."""

    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"], fused: Float[Array, "B h2 w2 C"] | None) -> Float[Array, "B _ _ C"]:
        lateral = Residual(self.width, self.dtype, name="residual1")
        if fused is not None:
            x = fused + lateral(resize_bilinear(x, fused.shape[1:3], align_corners=False))
        elif self.is_initializing():
            lateral(x)  # creates weights that checkpoints hold but the coarsest level never uses
        x = Residual(self.width, self.dtype, name="residual2")(x)
        return _conv(self.width, 1, self.dtype, "projection")(_double(x))


class Residual(nn.Module):
    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        y = _conv(self.width, 3, self.dtype, "conv1")(nn.relu(x))
        return x + _conv(self.width, 3, self.dtype, "conv2")(nn.relu(y))


class RelativeHead(nn.Module):
    """MiDaS's relative depth head; the metric head only reads its last features."""

    config: ZoeDepthConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> tuple[Float[Array, "B 2*h 2*w R"], Float[Array, "B 2*h 2*w"]]:
        x = _double(_conv(self.config.fusion_width // 2, 3, self.dtype, "conv1")(x))
        features = nn.relu(_conv(self.config.relative_features, 3, self.dtype, "conv2")(x))
        return features, nn.relu(_conv(1, 1, self.dtype, "conv3")(features))[..., 0]


class MetricHead(nn.Module):
    """Metric bins: the domain's head predicts bin centres and a log-binomial distribution over them for every pixel.

    Both domains' heads run, as they are narrow 1x1 convolutions. Their outputs are selected per example before the
    shared full-resolution part, which has no weights and does most of the work.
    """

    config: ZoeDepthConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        features: Float[Array, "B h2 w2 R"],
        bottleneck: Float[Array, "B h w C"],
        pyramid: Sequence[Float[Array, "B _ _ C"]],
    ) -> Float[Array, "B h2 w2"]:
        cfg = self.config
        bottleneck = _conv(cfg.bottleneck_width, 1, self.dtype, "bottleneck")(bottleneck)
        logits = DomainClassifier(cfg, name="classifier")(bottleneck)

        def projector(name: str) -> PixelMlp:
            return PixelMlp(cfg.bin_embedding_dim // 2, cfg.bin_embedding_dim, self.dtype, name=name)

        embedding = projector("seed_projector")(bottleneck)
        levels = []
        for i, x in enumerate(pyramid):
            coarser, embedding = embedding, projector(f"projector_{i}")(x)
            levels.append(embedding + resize_bilinear(coarser, embedding.shape[1:3]))
        size = features.shape[1:3]
        pixels = jnp.concatenate([features, resize_bilinear(embedding, size)], axis=-1)

        nyu, kitti = (DomainHead(cfg, self.dtype, name=domain)(bottleneck, levels, pixels) for domain in DOMAINS)
        is_kitti = (logits[:, 1] > logits[:, 0])[:, None, None, None]
        centers, shape = jax.tree.map(lambda n, k: jnp.where(is_kitti, k, n), nyu, kitti)
        probability = log_binomial(shape, cfg.num_bins, cfg.min_temperature, cfg.max_temperature)
        return jnp.sum(probability * resize_bilinear(centers, size), axis=-1)


class DomainHead(nn.Module):
    """One domain's weights: coarse bin centres, moved towards attractors at every level."""

    config: ZoeDepthConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        bottleneck: Float[Array, "B h w C"],
        levels: Sequence[Float[Array, "B _ _ E"]],
        pixels: Float[Array, "B h2 w2 _"],
    ) -> tuple[Float[Array, "B h8 w8 bins"], Float[Array, "B h2 w2 4"]]:
        """Returns f32 (bin centres in metres at the finest level, raw distribution parameters for every pixel)."""
        cfg = self.config
        seed = PixelMlp(cfg.bin_embedding_dim // 2, cfg.num_bins, self.dtype, name="seed_bins")(bottleneck)
        centers = nn.softplus(seed.astype(jnp.float32))
        for i, x in enumerate(levels):
            points = PixelMlp(cfg.bin_embedding_dim, NUM_ATTRACTORS, self.dtype, name=f"attractor_{i}")(x)
            points = nn.softplus(points.astype(jnp.float32))
            centers = attract(resize_bilinear(centers, x.shape[1:3]), points)
        shape = PixelMlp(pixels.shape[-1] // 4, 4, self.dtype, gelu, name="log_binomial")(pixels)
        return centers, shape.astype(jnp.float32)


def attract(centers: Float[Array, "B h w bins"], points: Float[Array, "B h w A"]) -> Float[Array, "B h w bins"]:
    """Moves each bin centre by the mean pull of the attractor points, d / (1 + alpha d²) (ZoeDepth, equation 2)."""
    d = points[..., :, None] - centers[..., None, :]
    return centers + jnp.mean(d / (1 + ATTRACTOR_ALPHA * d**2), axis=-2)


def log_binomial(
    shape: Float[Array, "B h w 4"], num_bins: int, min_temperature: float, max_temperature: float
) -> Float[Array, "B h w bins"]:
    """Softmax over log-binomial scores (ZoeDepth, equation 3); two raw channels give the mode, two the temperature."""
    mode, temperature = (
        pair[..., :1] / jnp.sum(pair, -1, keepdims=True) for pair in jnp.split(nn.softplus(shape) + 1e-4, 2, axis=-1)
    )
    temperature = min_temperature + (max_temperature - min_temperature) * temperature
    # log of the binomial coefficient by Stirling's formula, with the release's eps
    k, eps = np.arange(num_bins, dtype=np.float32), np.float32(1e-7)
    n = np.float32(num_bins - 1)
    coefficient = (n + eps) * np.log(n + eps) - (k + eps) * np.log(k + eps)
    coefficient -= (n - k) * np.log(n - k + eps)
    score = coefficient + k * jnp.log(jnp.clip(mode, 1e-4, 1)) + (n - k) * jnp.log(jnp.clip(1 - mode, 1e-4, 1))
    return jax.nn.softmax(score / temperature, axis=-1)


class DomainClassifier(nn.Module):
    """Scores nyu and kitti from the bottleneck. Always in float32: it is tiny, and its vote selects the whole head."""

    config: ZoeDepthConfig

    @nn.compact
    def __call__(self, bottleneck: Float[Array, "B h w C"]) -> Float[Array, "B 2"]:
        cfg = self.config
        x = _conv(cfg.classifier_width, 1, jnp.float32, "embedding")(bottleneck)
        x = jnp.pad(rearrange(x, "B h w C -> B (h w) C"), ((0, 0), (1, 0), (0, 0)))  # a zero class token
        x = x + _sinusoids(x.shape[1], cfg.classifier_width)
        layers = scan_layers(ClassifierLayer, cfg.classifier_depth)
        x, _ = layers(cfg.classifier_heads, cfg.classifier_mlp_dim, name="layers")(x, None)
        x = nn.relu(nn.Dense(cfg.classifier_width, name="hidden")(x[:, 0]))
        return nn.Dense(len(DOMAINS), name="logits")(x)


class ClassifierLayer(nn.Module):
    """Post-norm transformer layer."""

    num_heads: int
    mlp_dim: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], _) -> tuple[Float[Array, "B T D"], None]:
        attention = nn.MultiHeadDotProductAttention(self.num_heads, deterministic=True, name="attention")
        x = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name="norm1")(x + attention(x))
        y = nn.relu(nn.Dense(self.mlp_dim, name="mlp_in")(x))
        y = nn.Dense(x.shape[-1], name="mlp_out")(y)
        return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name="norm2")(x + y), None


class PixelMlp(nn.Module):
    """Two 1x1 convolutions."""

    hidden: int
    out: int
    dtype: DTypeLike
    activation: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w O"]:
        x = self.activation(_conv(self.hidden, 1, self.dtype, "conv1")(x))
        return _conv(self.out, 1, self.dtype, "conv2")(x)


def _conv(features: int, kernel: int, dtype: DTypeLike, name: str, strides: int = 1, use_bias: bool = True) -> nn.Conv:
    options: dict[str, Any] = {"conv_general_dilated": multiply_patches} if kernel == 1 else {"padding": kernel // 2}
    return nn.Conv(features, (kernel, kernel), strides, use_bias=use_bias, dtype=dtype, name=name, **options)


def _double(x: Float[Array, "B h w C"]) -> Float[Array, "B 2*h 2*w C"]:
    return resize_bilinear(x, (2 * x.shape[1], 2 * x.shape[2]))


def _sinusoids(length: int, width: int) -> np.ndarray:
    """f32[length, width] position encoding: sines, then cosines."""
    angle = np.arange(length)[:, None] * 10_000.0 ** (-np.arange(0, width, 2) / width)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)
