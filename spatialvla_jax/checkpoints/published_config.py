"""config.json of the published directories, read and written.

Fields that it has no place for (prompt length, depth source, …) stand under "spatialvla_jax" in the same file.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

from spatialvla_jax.checkpoints.types import read_json
from spatialvla_jax.errors import InputError
from spatialvla_jax.models.beit import BeitConfig
from spatialvla_jax.models.gemma2 import Gemma2Config
from spatialvla_jax.models.siglip import SiglipConfig
from spatialvla_jax.models.spatialvla import SpatialVLAConfig
from spatialvla_jax.models.zoedepth import ZoeDepthConfig
from spatialvla_jax.utils.renames import MODEL_FIELDS, renamed

T = TypeVar("T")

CONFIG = "config.json"
# Class → file, as in the release.
AUTO_MODEL = {
    "AutoConfig": "configuration_spatialvla.SpatialVLAConfig",
    "AutoModel": "modeling_spatialvla.SpatialVLAForConditionalGeneration",
}

# Fields of ours without a published one, stored under EXTRA.
EXTRA = "spatialvla_jax"
EXTRA_FIELDS = ("prompt_length", "action_chunk", "tokens_per_action", "depth_source", "mask", "dtype", "remat")


def read_config(file: Path) -> SpatialVLAConfig:
    """Raises InputError for a file that is missing or describes no SpatialVLA."""
    return parse_config(file, config_from_published)


def parse_config(file: Path, parse: Callable[[dict[str, Any]], T]) -> T:
    data = read_json(file)
    try:
        return parse(data)
    except KeyError as error:
        raise InputError(f"{file} has no field {error.args[0]!r}") from error
    except TypeError as error:
        raise InputError(f"{file} does not describe the model: {error}") from error


def config_from_published(data: dict[str, Any]) -> SpatialVLAConfig:
    base = SpatialVLAConfig(
        img=siglip_from_published(data["vision_config"]),
        llm=gemma2_from_published(data["text_config"]),
        zoe=zoedepth_from_published(data["vision_zoe_config"]),
        text_vocab=data["image_token_index"],
        spatial_tokens=data["spatial_token_num"],
        depth_source="zoedepth" if data["use_vision_zoe"] else "none",
        dtype=data.get("torch_dtype") or data.get("dtype") or "float32",
    )
    return replace(base, **renamed(data.get(EXTRA, {}), MODEL_FIELDS))


# What the release's files leave out has the defaults of transformers' configs, which are the published sizes.


def siglip_from_published(data: dict[str, Any]) -> SiglipConfig:
    return SiglipConfig(
        image_size=data.get("image_size", 224),
        patch_size=data.get("patch_size", 16),
        width=data["hidden_size"],
        depth=data["num_hidden_layers"],
        num_heads=data["num_attention_heads"],
        mlp_dim=data["intermediate_size"],
    )


def gemma2_from_published(data: dict[str, Any]) -> Gemma2Config:
    rope = data.get("rope_parameters") or {}
    return Gemma2Config(
        vocab_size=data["vocab_size"],
        width=data["hidden_size"],
        depth=data["num_hidden_layers"],
        mlp_dim=data["intermediate_size"],
        num_heads=data.get("num_attention_heads", 8),
        num_kv_heads=data.get("num_key_value_heads", 4),
        head_dim=data.get("head_dim", 256),
        query_pre_attn_scalar=float(data.get("query_pre_attn_scalar", 256)),
        sliding_window=data.get("sliding_window", 4096),
        attn_softcap=data.get("attn_logit_softcapping", 50.0),
        final_softcap=data.get("final_logit_softcapping", 30.0),
        rope_base=float(data.get("rope_theta", rope.get("rope_theta", 10_000.0))),
    )


def zoedepth_from_published(data: dict[str, Any]) -> ZoeDepthConfig:
    beit = data["backbone_config"]
    bins = {domain["n_bins"] for domain in data["bin_configurations"]}
    backbone = BeitConfig(
        image_size=beit["image_size"],
        patch_size=beit["patch_size"],
        width=beit["hidden_size"],
        depth=beit["num_hidden_layers"],
        num_heads=beit["num_attention_heads"],
        mlp_dim=beit["intermediate_size"],
        num_taps=len(beit["out_features"]),
    )
    return ZoeDepthConfig(
        backbone=backbone,
        neck_widths=tuple(data["neck_hidden_sizes"]),
        fusion_width=data["fusion_hidden_size"],
        relative_features=data["num_relative_features"],
        bottleneck_width=data["bottleneck_features"],
        bin_embedding_dim=data["bin_embedding_dim"],
        num_bins=max(bins),
        min_temperature=data["min_temp"],
        max_temperature=data["max_temp"],
        classifier_width=data["patch_transformer_hidden_size"],
        classifier_depth=data["num_patch_transformer_layers"],
        classifier_heads=data["patch_transformer_num_attention_heads"],
        classifier_mlp_dim=data["patch_transformer_intermediate_size"],
    )


def _zoedepth_to_published(zoe: ZoeDepthConfig, weights: str) -> dict[str, Any]:
    beit = zoe.backbone
    taps = [beit.depth // beit.num_taps * (i + 1) for i in range(beit.num_taps)]
    return {
        "architectures": ["ZoeDepthForDepthEstimation"],
        "model_type": "zoedepth",
        # The released code reads these two only in part; its weights have 16 attractors everywhere.
        "attractor_alpha": 1000,
        "num_attractors": [16, 8, 4, 1],
        "attractor_gamma": 2,
        "attractor_kind": "mean",
        "backbone_config": {
            "model_type": "beit",
            "hidden_size": beit.width,
            "image_size": beit.image_size,
            "intermediate_size": beit.mlp_dim,
            "num_attention_heads": beit.num_heads,
            "num_hidden_layers": beit.depth,
            "out_features": [f"stage{i}" for i in taps],
            "out_indices": taps,
            "patch_size": beit.patch_size,
            "reshape_hidden_states": False,
            "use_relative_position_bias": True,
        },
        "backbone_hidden_size": beit.width,
        "bin_centers_type": "softplus",
        "bin_configurations": [
            {"name": name, "n_bins": zoe.num_bins, "min_depth": 0.001, "max_depth": depth}
            for name, depth in (("nyu", 10.0), ("kitti", 80.0))
        ],
        "bin_embedding_dim": zoe.bin_embedding_dim,
        "bottleneck_features": zoe.bottleneck_width,
        "fusion_hidden_size": zoe.fusion_width,
        "max_temp": zoe.max_temperature,
        "min_temp": zoe.min_temperature,
        "neck_hidden_sizes": list(zoe.neck_widths),
        "num_patch_transformer_layers": zoe.classifier_depth,
        "num_relative_features": zoe.relative_features,
        "patch_transformer_hidden_size": zoe.classifier_width,
        "patch_transformer_intermediate_size": zoe.classifier_mlp_dim,
        "patch_transformer_num_attention_heads": zoe.classifier_heads,
        "readout_type": "project",
        "reassemble_factors": [4, 2, 1, 0.5],
        "torch_dtype": weights,
    }


def config_to_published(config: SpatialVLAConfig, dtypes: set[np.dtype]) -> dict[str, Any]:
    img, llm = config.img, config.llm
    # The release names one dtype for all weights; a mixture is loaded at the widest.
    weights = "bfloat16" if dtypes == {np.dtype(ml_dtypes.bfloat16)} else "float32"
    return {
        "architectures": ["SpatialVLAForConditionalGeneration"],
        "auto_map": AUTO_MODEL,
        "model_type": "spatialvla",
        "_vocab_size": llm.vocab_size,
        "action_token_begin_idx": config.action_offset,
        "bos_token_id": 2,
        "ego3d_patch_reso": 2,
        "eos_token_id": 1,
        "hidden_size": llm.width,
        "image_token_index": config.text_vocab,
        "n_freqs": 8,
        "num_hidden_layers": llm.depth,
        "pad_token_id": 0,
        "projection_dim": llm.width,
        "spatial_token_num": config.spatial_tokens,
        "torch_dtype": weights,
        "use_spatial_token": True,
        "use_vision_zoe": config.depth_source == "zoedepth",
        "text_config": {
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            "attn_logit_softcapping": llm.attn_softcap,
            "final_logit_softcapping": llm.final_softcap,
            "head_dim": llm.head_dim,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": llm.width,
            "intermediate_size": llm.mlp_dim,
            "num_attention_heads": llm.num_heads,
            "num_hidden_layers": llm.depth,
            "num_image_tokens": img.num_tokens,
            "num_key_value_heads": llm.num_kv_heads,
            "query_pre_attn_scalar": _int_if_whole(llm.query_pre_attn_scalar),
            "rope_theta": llm.rope_base,
            "sliding_window": llm.sliding_window,
            "tie_word_embeddings": False,
            "torch_dtype": weights,
            "vocab_size": llm.vocab_size,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": img.width,
            "image_size": img.image_size,
            "intermediate_size": img.mlp_dim,
            "num_attention_heads": img.num_heads,
            "num_hidden_layers": img.depth,
            "num_image_tokens": img.num_tokens,
            "num_positions": img.num_tokens,
            "patch_size": img.patch_size,
            "projection_dim": llm.width,
            "torch_dtype": weights,
            "vision_use_head": False,
        },
        "vision_zoe_config": _zoedepth_to_published(config.zoe, weights),
        EXTRA: {name: getattr(config, name) for name in EXTRA_FIELDS},
    }


def _int_if_whole(x: float) -> int | float:
    return int(x) if x == int(x) else x
