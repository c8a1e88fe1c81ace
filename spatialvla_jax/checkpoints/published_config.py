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

DIFFERENCES = "release_differences"  # stands there too, and is not read back

# Fields of ours → published ones, read and written alike.
ENCODER = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
}
VISION = ENCODER | {"image_size": "image_size", "patch_size": "patch_size"}  # SigLIP's and BEiT's
GEMMA2 = {
    "vocab_size": "vocab_size",
    **ENCODER,
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "sliding_window": "sliding_window",
    "attn_softcap": "attn_logit_softcapping",
    "final_softcap": "final_logit_softcapping",
    "rope_base": "rope_theta",
}
ZOEDEPTH = {
    "neck_widths": "neck_hidden_sizes",
    "fusion_width": "fusion_hidden_size",
    "relative_features": "num_relative_features",
    "bottleneck_width": "bottleneck_features",
    "bin_embedding_dim": "bin_embedding_dim",
    "min_temperature": "min_temp",
    "max_temperature": "max_temp",
    "classifier_width": "patch_transformer_hidden_size",
    "classifier_depth": "num_patch_transformer_layers",
    "classifier_heads": "patch_transformer_num_attention_heads",
    "classifier_mlp_dim": "patch_transformer_intermediate_size",
}
# What the release's files leave out: the defaults of transformers' configs, which are the published sizes.
SIGLIP_DEFAULTS = {"image_size": 224, "patch_size": 16}
GEMMA2_DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "rope_theta": 10_000.0,
}


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
    extra = {name: value for name, value in data.get(EXTRA, {}).items() if name != DIFFERENCES}
    return replace(base, **renamed(extra, MODEL_FIELDS))


def siglip_from_published(data: dict[str, Any]) -> SiglipConfig:
    return SiglipConfig(**_ours(SIGLIP_DEFAULTS | data, VISION))


def gemma2_from_published(data: dict[str, Any]) -> Gemma2Config:
    fields = _ours(GEMMA2_DEFAULTS | (data.get("rope_parameters") or {}) | data, GEMMA2)
    fields |= {name: float(fields[name]) for name in ("query_pre_attn_scalar", "rope_base")}
    return Gemma2Config(**fields)


def zoedepth_from_published(data: dict[str, Any]) -> ZoeDepthConfig:
    beit, fields = data["backbone_config"], _ours(data, ZOEDEPTH)
    fields["neck_widths"] = tuple(fields["neck_widths"])
    return ZoeDepthConfig(
        backbone=BeitConfig(**_ours(beit, VISION), num_taps=len(beit["out_features"])),
        num_bins=max(domain["n_bins"] for domain in data["bin_configurations"]),
        **fields,
    )


def _ours(data: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {ours: data[published] for ours, published in names.items()}


def _published(config: Any, names: dict[str, str]) -> dict[str, Any]:
    return {published: getattr(config, ours) for ours, published in names.items()}


def _zoedepth_to_published(zoe: ZoeDepthConfig, weights: str) -> dict[str, Any]:
    beit = zoe.backbone
    taps = [beit.depth // beit.num_taps * (i + 1) for i in range(beit.num_taps)]
    return {
        "architectures": ["ZoeDepthForDepthEstimation"],
        "model_type": "zoedepth",
        **_published(zoe, ZOEDEPTH),
        # The released code reads these two only in part; its weights have 16 attractors everywhere.
        "attractor_alpha": 1000,
        "num_attractors": [16, 8, 4, 1],
        "attractor_gamma": 2,
        "attractor_kind": "mean",
        "backbone_config": {
            "model_type": "beit",
            **_published(beit, VISION),
            "out_features": [f"stage{i}" for i in taps],
            "out_indices": taps,
            "reshape_hidden_states": False,
            "use_relative_position_bias": True,
        },
        "backbone_hidden_size": beit.width,
        "bin_centers_type": "softplus",
        "bin_configurations": [
            {"name": name, "n_bins": zoe.num_bins, "min_depth": 0.001, "max_depth": depth}
            for name, depth in (("nyu", 10.0), ("kitti", 80.0))
        ],
        "neck_hidden_sizes": list(zoe.neck_widths),
        "readout_type": "project",
        "reassemble_factors": [4, 2, 1, 0.5],
        "torch_dtype": weights,
    }


def config_to_published(config: SpatialVLAConfig, dtypes: set[np.dtype]) -> dict[str, Any]:
    img, llm, scalar = config.img, config.llm, config.llm.query_pre_attn_scalar
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
            **_published(llm, GEMMA2),
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "num_image_tokens": img.num_tokens,
            "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
            "tie_word_embeddings": False,
            "torch_dtype": weights,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            **_published(img, VISION),
            "num_image_tokens": img.num_tokens,
            "num_positions": img.num_tokens,
            "projection_dim": llm.width,
            "torch_dtype": weights,
            "vision_use_head": False,
        },
        "vision_zoe_config": _zoedepth_to_published(config.zoe, weights),
        EXTRA: {name: getattr(config, name) for name in EXTRA_FIELDS},
    }
