"""SpatialVLA (arXiv 2501.15830): SigLIP + Ego3D → Gemma 2 → spatial action tokens.

The sequence has a fixed layout: P image tokens, the prompt right-padded to its length, then the action tokens. Image
and prompt attend to each other (prefix-LM); action tokens are causal. Token ids: text [0, text_vocab), `<image>` =
text_vocab, action tokens from `action_offset` = text_vocab + 1.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spatialvla_jax.errors import InputError
from spatialvla_jax.models.activation_sharding import constrain_batch
from spatialvla_jax.models.attention import position_ids, prefix_lm_mask
from spatialvla_jax.models.ego3d import SUB_GRID, Ego3D
from spatialvla_jax.models.fields import config_from_dict
from spatialvla_jax.models.gemma2 import Gemma2, Gemma2Config
from spatialvla_jax.models.siglip import Siglip, SiglipConfig
from spatialvla_jax.models.zoedepth import DEPTH_PAD, ZoeDepth, ZoeDepthConfig, estimate_depth
from spatialvla_jax.utils.renames import MODEL_FIELDS

TARGET_HEAD = "target_head"  # beside the model's parameters in runs with `loss.target`, for training alone
MAX_PATCHES = 128  # along each side, for models read from a file
Params = dict[str, Any]  # nested as in Flax; leaves are arrays or abstract stand-ins


@dataclass(frozen=True)
class SpatialVLAConfig:
    """Every size of the model. Defaults: `spatialvla-4b-224`.

    `depth_source` says where depth comes from: `zoedepth` (estimated inside the model), `dataset` (given with the
    image) or `none` (no Ego3D). `mask` is `prefix` or `causal` (the release's training scripts). `dtype` is that of
    computations. `remat` and `unroll` affect training, see `models.remat`; the frozen depth model has its own `unroll`.
    """

    img: SiglipConfig = SiglipConfig()
    llm: Gemma2Config = Gemma2Config(vocab_size=265_347)
    zoe: ZoeDepthConfig = ZoeDepthConfig()
    text_vocab: int = 257_152
    spatial_tokens: int = 8194
    prompt_length: int = 52
    action_chunk: int = 4
    tokens_per_action: int = 3
    depth_source: Literal["zoedepth", "dataset", "none"] = "zoedepth"
    mask: Literal["prefix", "causal"] = "prefix"
    dtype: str = "bfloat16"
    remat: str = "none"
    unroll: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Nested plain data for JSON; `from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any, where: str = "") -> "SpatialVLAConfig":
        """Raises InputError for an invalid config; `where` prefixes the field's name in the message."""
        if isinstance(data, Mapping):
            data = {MODEL_FIELDS.get(field, field): value for field, value in data.items()}
        config = config_from_dict(cls, data, where)
        config.check_sizes(lambda field: where + field)
        return config

    def check_sizes(self, name: Callable[[str], str]) -> None:
        """Raises InputError for a field that is inconsistent with other parts. `name` maps a path such as
        "img.patch_size" to the name used in the message."""
        img, beit, size = self.img, self.zoe.backbone, self.img.image_size
        vocabulary = self.action_offset + self.spatial_tokens
        counted = f"{self.text_vocab} text tokens, <image> and {self.spatial_tokens} action tokens"
        border = self.depth_source == "zoedepth" and size <= DEPTH_PAD
        halves = self.depth_source == "none" or img.patch_size % SUB_GRID == 0
        rules = (
            (img.patches_per_side > MAX_PATCHES, "img.patch_size", f"gives more than {MAX_PATCHES} patches a side"),
            (beit.patches_per_side > MAX_PATCHES, "zoe.backbone.patch_size", f"gives more than {MAX_PATCHES} a side"),
            (not halves, "img.patch_size", f"is not a multiple of {SUB_GRID}, the points of Ego3D along a patch"),
            (border, "img.image_size", f"is not above {DEPTH_PAD}, the border that ZoeDepth mirrors"),
            (self.llm.vocab_size != vocabulary, "llm.vocab_size", f"is not {vocabulary}: {counted}"),
        )
        for broken, field, wrong in rules:
            if broken:
                raise InputError(f"{name(field)}={attrgetter(field)(self)} {wrong}")

    @property
    def action_offset(self) -> int:
        return self.text_vocab + 1

    @property
    def num_action_tokens(self) -> int:
        """Action tokens of one chunk, without `<eos>`."""
        return self.action_chunk * self.tokens_per_action

    @property
    def prefix_length(self) -> int:
        return self.img.num_tokens + self.prompt_length


class SpatialVLA(nn.Module):
    """`__call__` returns training logits; `inference/generate.py` decodes with the same parameters."""

    config: SpatialVLAConfig

    def setup(self) -> None:
        cfg = self.config
        dtype = jnp.dtype(cfg.dtype)
        self.img = Siglip(cfg.img, cfg.llm.width, dtype, cfg.remat, cfg.unroll)
        self.llm = Gemma2(cfg.llm, dtype, cfg.remat, cfg.unroll)
        if cfg.depth_source != "none":
            self.ego3d = Ego3D(cfg.img.width, cfg.img.patches_per_side, dtype)
        if cfg.depth_source == "zoedepth":
            self.zoe = ZoeDepth(cfg.zoe, dtype)
        shape = (cfg.spatial_tokens, cfg.llm.width)
        self.spatial_embedding = self.param("spatial_embedding", nn.initializers.normal(cfg.llm.width**-0.5), shape)

    def embed_image(
        self,
        image: Float[Array, "B S S 3"],
        depth: Float[Array, "B S S"] | None,
        intrinsics: Float[Array, "B 3 3"] | None,
    ) -> Float[Array, "B P D"]:
        """Image in [0, 1], depth in metres, intrinsics in pixels of the image → tokens at the language model's width.

        `depth` is used only with `depth_source="dataset"`. The tokens are divided by sqrt(width) because the language
        model multiplies all its inputs by it.
        """
        if self.config.depth_source == "zoedepth":
            # No weight of ZoeDepth is split over the mesh axis `tensor`, so its devices share the batch instead.
            images = constrain_batch(image, "tensor")
            depth = jax.lax.stop_gradient(estimate_depth(self.zoe, images, self.config.zoe.backbone.image_size))
            depth = constrain_batch(depth)
        position = None
        if self.config.depth_source != "none":
            assert depth is not None and intrinsics is not None, "Ego3D needs depth and intrinsics"
            position = self.ego3d(depth, intrinsics)
        tokens, _ = self.img(image.astype(jnp.float32) * 2 - 1, position)
        return tokens / jnp.asarray(self.config.llm.width**0.5, tokens.dtype)

    def embed_prefix(self, image, prompt_ids, prompt_mask, depth, intrinsics):
        """→ (embeddings f[B, prefix_length, D], valid bool[B, prefix_length])."""
        tokens = self.embed_image(image, depth, intrinsics)
        embeddings = jnp.concatenate([tokens, self.llm.embed(prompt_ids).astype(tokens.dtype)], axis=1)
        valid = jnp.concatenate([jnp.ones(tokens.shape[:2], bool), prompt_mask], axis=1)
        return embeddings, valid

    def __call__(
        self,
        image: Float[Array, "B S S 3"],
        prompt_ids: Int[Array, "B Q"],
        prompt_mask: Bool[Array, "B Q"],
        action_ids: Int[Array, "B A"],
        *,
        depth: Float[Array, "B S S"] | None = None,
        intrinsics: Float[Array, "B 3 3"] | None = None,
    ) -> Float[Array, "B A+1 V"]:
        """Teacher-forced logits, f32, of the A action tokens and `<eos>`; `action_ids` start at 0."""
        prefix, prefix_valid = self.embed_prefix(image, prompt_ids, prompt_mask, depth, intrinsics)
        actions = jnp.take(self.spatial_embedding, action_ids, axis=0).astype(prefix.dtype)
        embeddings = jnp.concatenate([prefix, actions], axis=1)
        valid = jnp.concatenate([prefix_valid, jnp.ones(action_ids.shape, bool)], axis=1)
        bidirectional = self.config.prefix_length if self.config.mask == "prefix" else 0
        hidden = self.llm(embeddings, position_ids(valid), prefix_lm_mask(valid, bidirectional))
        first = last_of_prompt(hidden[:, : prefix.shape[1]], prefix_valid)
        self.sow("intermediates", "after_prompt", first[:, 0])  # for auxiliary losses; kept only if asked for
        return self.llm.logits(jnp.concatenate([first, hidden[:, prefix.shape[1] :]], axis=1))


def last_of_prompt(hidden: Float[Array, "B T D"], valid: Bool[Array, "B T"]) -> Float[Array, "B 1 D"]:
    """The hidden state at the last position that is not padding."""
    last = valid.shape[1] - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)
