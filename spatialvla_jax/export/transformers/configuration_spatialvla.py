"""SpatialVLA's configuration for transformers."""

from typing import Any, ClassVar

from transformers import Gemma2Config, SiglipVisionConfig, ZoeDepthConfig
from transformers.configuration_utils import PretrainedConfig

DEFAULTS = {"tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


class SpatialVLAConfig(PretrainedConfig):
    """The published fields; `spatialvla_jax` holds fields that the published config does not have."""

    model_type = "spatialvla"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    sub_configs: ClassVar[dict[str, Any]] = {
        "text_config": Gemma2Config,
        "vision_config": SiglipVisionConfig,
        "vision_zoe_config": ZoeDepthConfig,
    }

    def __init__(
        self,
        text_config: Any = None,
        vision_config: Any = None,
        vision_zoe_config: Any = None,
        image_token_index: int = 257_152,
        action_token_begin_idx: int = 257_153,
        spatial_token_num: int = 8194,
        use_vision_zoe: bool = True,
        spatialvla_jax: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        parts = {"text_config": text_config, "vision_config": vision_config, "vision_zoe_config": vision_zoe_config}
        for name, part in parts.items():
            made = part if isinstance(part, PretrainedConfig) else self.sub_configs[name](**(part or {}))
            setattr(self, name, made)
        self.image_token_index = image_token_index
        self.action_token_begin_idx = action_token_begin_idx
        self.spatial_token_num = spatial_token_num
        self.use_vision_zoe = use_vision_zoe
        self.spatialvla_jax = spatialvla_jax or {}
        super().__init__(**DEFAULTS | kwargs)

    @property
    def depth_source(self) -> str:
        """`zoedepth` (estimated in the model), `dataset` (the caller's) or `none` (no Ego3D)."""
        return self.spatialvla_jax.get("depth_source", "zoedepth" if self.use_vision_zoe else "none")

    @property
    def prefix_lm(self) -> bool:
        """Whether image and prompt attend to each other in both directions; otherwise attention is causal."""
        return self.spatialvla_jax.get("mask", "prefix") == "prefix"

    @property
    def num_action_tokens(self) -> int:
        return self.spatialvla_jax.get("action_chunk", 4) * self.spatialvla_jax.get("tokens_per_action", 3)
