"""Named model sizes: `preset(name, **changes)` returns a config with fields changed by keyword."""

from dataclasses import replace

from spatialvla_jax.errors import InputError
from spatialvla_jax.models.gemma2 import Gemma2Config
from spatialvla_jax.models.remat import POLICIES
from spatialvla_jax.models.siglip import SiglipConfig
from spatialvla_jax.models.spatialvla import SpatialVLAConfig

CHOICES: dict[str, tuple[str, ...]] = {
    "depth_source": ("zoedepth", "dataset", "none"),
    "mask": ("prefix", "causal"),
    "dtype": ("float32", "bfloat16"),
    "remat": POLICIES,
}
GEMMA2_9B = Gemma2Config(
    vocab_size=265_347, width=3584, depth=42, mlp_dim=14_336, num_heads=16, num_kv_heads=8, head_dim=256
)

PRESETS: dict[str, SpatialVLAConfig] = {
    # Every part at its minimum size, for tests.
    "nano": SpatialVLAConfig(
        img=SiglipConfig(image_size=56, width=32, depth=2, num_heads=4, mlp_dim=48),
        llm=Gemma2Config(
            width=32, depth=2, mlp_dim=48, num_heads=4, num_kv_heads=2, head_dim=8, query_pre_attn_scalar=8.0
        ),
        text_vocab=256,
        prompt_length=32,
        depth_source="dataset",
        dtype="float32",
    ),
    # Trains on a laptop's CPU in minutes.
    "tiny": SpatialVLAConfig(
        img=SiglipConfig(image_size=112, width=128, depth=3, num_heads=4, mlp_dim=256),
        llm=Gemma2Config(
            width=128, depth=3, mlp_dim=384, num_heads=4, num_kv_heads=2, head_dim=32, query_pre_attn_scalar=32.0
        ),
        text_vocab=256,
        prompt_length=32,
        depth_source="dataset",
        dtype="float32",
    ),
    # About 25 M parameters: ablations in which many trials share an accelerator. The 81 patches, the prompt and four
    # actions fit into 128 positions.
    "mini": SpatialVLAConfig(
        img=SiglipConfig(image_size=126, width=384, depth=6, num_heads=6, mlp_dim=1024),
        llm=Gemma2Config(
            width=384, depth=6, mlp_dim=1024, num_heads=6, num_kv_heads=3, head_dim=64, query_pre_attn_scalar=64.0
        ),
        text_vocab=1024,
        prompt_length=32,
        depth_source="dataset",
    ),
    # About 100 M parameters: policies from scratch on one accelerator.
    "small": SpatialVLAConfig(
        img=SiglipConfig(width=512, depth=12, num_heads=8, mlp_dim=2048),
        llm=Gemma2Config(
            width=512, depth=12, mlp_dim=2048, num_heads=8, num_kv_heads=4, head_dim=64, query_pre_attn_scalar=64.0
        ),
        text_vocab=1024,
        prompt_length=32,
        depth_source="dataset",
    ),
    "spatialvla-4b-224": SpatialVLAConfig(),
    # The other sizes of PaliGemma 2 (Steiner et al. 2024): larger images, and Gemma 2 9B.
    "spatialvla-4b-448": SpatialVLAConfig(img=SiglipConfig(image_size=448)),
    "spatialvla-4b-896": SpatialVLAConfig(img=SiglipConfig(image_size=896)),
    "spatialvla-11b-224": SpatialVLAConfig(llm=GEMMA2_9B),
    "spatialvla-11b-448": SpatialVLAConfig(img=SiglipConfig(image_size=448), llm=GEMMA2_9B),
    "spatialvla-11b-896": SpatialVLAConfig(img=SiglipConfig(image_size=896), llm=GEMMA2_9B),
}


def preset(name: str, image_size: int = 0, **changes) -> SpatialVLAConfig:
    """The preset with images of `image_size` pixels a side (0: its own) and fields of `SpatialVLAConfig` changed;
    `llm.vocab_size` follows the text and action tokens.

    Raises InputError for an unknown name or field, an invalid choice or an image that patches do not cover.
    """
    if name not in PRESETS:
        raise InputError(f"model preset {name!r} does not exist; choose one of {', '.join(PRESETS)}")
    base = PRESETS[name]
    unknown = set(changes) - set(SpatialVLAConfig.__dataclass_fields__)
    if unknown:
        raise InputError(
            f"model has no field {sorted(unknown)[0]!r}; its fields are {', '.join(base.__dataclass_fields__)}"
        )
    for field, choices in CHOICES.items():
        if (value := changes.get(field, choices[0])) not in choices:
            raise InputError(f"model.{field} is {value!r}; choose {', '.join(choices[:-1])} or {choices[-1]}")
    config = replace(base, **changes)
    if image_size % (patch := config.img.patch_size):
        raise InputError(f"model.image_size={image_size} is not a multiple of {patch}, the pixels of a patch's side")
    if image_size:
        config = replace(config, img=replace(config.img, image_size=image_size))
    vocabulary = config.action_offset + config.spatial_tokens
    return replace(config, llm=replace(config.llm, vocab_size=vocabulary))
