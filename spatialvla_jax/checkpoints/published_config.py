"""Reads and writes config.json of published directories.

Fields that it does not know (prompt length, depth source, …) are stored under "spatialvla_jax" in the same file. A
field that affects what the model computes is honoured, or refused if our model supports only another value.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from spatialvla_jax.checkpoints.published_fields import (
    BEIT_FIXED,
    BEIT_LARGE,
    GEMMA2,
    GEMMA2_DEFAULTS,
    GEMMA2_FIXED,
    NAMES,
    ROPE_FIXED,
    SIGLIP_FIXED,
    SPATIALVLA_FIXED,
    VISION,
    VISION_DEFAULTS,
    ZOEDEPTH,
    ZOEDEPTH_DEFAULTS,
    ZOEDEPTH_FIXED,
    Fixed,
)
from spatialvla_jax.checkpoints.types import read_json
from spatialvla_jax.errors import InputError
from spatialvla_jax.models.beit import BeitConfig
from spatialvla_jax.models.fields import COUNT, build, field_of
from spatialvla_jax.models.gemma2 import Gemma2Config
from spatialvla_jax.models.siglip import SiglipConfig
from spatialvla_jax.models.spatialvla import SpatialVLAConfig
from spatialvla_jax.models.zoedepth import DOMAINS, ZoeDepthConfig
from spatialvla_jax.utils.renames import MODEL_FIELDS
from spatialvla_jax.utils.schema import Field, check_stored, nearest_name, shown
from spatialvla_jax.utils.storage import AnyPath

CONFIG = "config.json"
# Class → file, as in the release.
AUTO_MODEL = {
    "AutoConfig": "configuration_spatialvla.SpatialVLAConfig",
    "AutoModel": "modeling_spatialvla.SpatialVLAForConditionalGeneration",
}

# Fields with a published counterpart; all others are stored under EXTRA.
SIZES = ("text_vocab", "spatial_tokens")
PARTS = ("img", "llm", "zoe")
EXTRA = "spatialvla_jax"
EXTRA_FIELDS = tuple(f.name for f in dataclasses.fields(SpatialVLAConfig) if f.name not in (*SIZES, *PARTS))

DIFFERENCES = "release_differences"  # also under EXTRA; not read back

PART, NUM_TAPS = Field({}, ""), 4
FOLLOWS = "does not agree with the fields that make it"


def read_config(file: AnyPath) -> SpatialVLAConfig:
    """Raises InputError if the file is missing or does not describe a SpatialVLA that our model supports."""
    return config_from_published(read_json(file), f"{file}: ")


def config_from_published(data: Any, where: str = "") -> SpatialVLAConfig:
    """Raises InputError for unsupported values; `where` prefixes the field's name in the message."""
    check_fixed(data, SPATIALVLA_FIXED, where)
    sizes = {ours: NAMES[ours] for ours in SIZES}
    kinds = {"vision_config": PART, "text_config": PART, "use_vision_zoe": Field(True, "")}
    values = check_stored(data, kinds, where)
    fields = _ours(SpatialVLAConfig, sizes, data, where)
    fields["img"] = siglip_from_published(values["vision_config"], f"{where}vision_config.")
    check_fixed(values["text_config"], {"tie_word_embeddings": (False,)}, f"{where}text_config.")
    fields["llm"] = gemma2_from_published(values["text_config"], f"{where}text_config.")
    if values["use_vision_zoe"] or "vision_zoe_config" in data:
        zoe = check_stored(data, {"vision_zoe_config": PART}, where)["vision_zoe_config"]
        fields["zoe"] = zoedepth_from_published(zoe, f"{where}vision_zoe_config.")
    fields |= {"depth_source": "zoedepth" if values["use_vision_zoe"] else "none", "dtype": "float32"}
    for name in ("dtype", "torch_dtype"):
        if data.get(name) is not None:
            fields |= _ours(SpatialVLAConfig, {"dtype": name}, data, where)
    config = SpatialVLAConfig(**fields | _extra_fields(data.get(EXTRA, {}), f"{where}{EXTRA}."))
    config.check_sizes(lambda field: where + NAMES.get(field, field))
    _check_repeated(data, config, where)
    return config


def siglip_from_published(data: Any, where: str) -> SiglipConfig:
    check_fixed(data, SIGLIP_FIXED, where)
    return build(SiglipConfig, _ours(SiglipConfig, VISION, VISION_DEFAULTS | data, where), where)


def gemma2_from_published(data: Any, where: str) -> Gemma2Config:
    check_fixed(data, GEMMA2_FIXED, where)
    ropes = {name: data[name] for name in ("rope_parameters", "rope_scaling") if data.get(name) is not None}
    for name, rope in ropes.items():
        check_fixed(rope, ROPE_FIXED, f"{where}{name}.")
        if unknown := sorted(rope.keys() - ROPE_FIXED.keys() - {"rope_theta"}):
            raise InputError(f"{where}{name}.{unknown[0]} is not supported: positions are not scaled")
    bases = [part["rope_theta"] for part in (*ropes.values(), data) if "rope_theta" in part]
    if any(base != bases[0] for base in bases):
        raise InputError(f"{where}rope_theta={shown(bases[-1])} differs from {' or '.join(ropes)}: {shown(bases[0])}")
    given = data | ({"rope_theta": bases[0]} if bases else {})
    config = build(Gemma2Config, _ours(Gemma2Config, GEMMA2, GEMMA2_DEFAULTS | given, where), where)
    kinds = [("sliding_attention", "full_attention")[i % 2] for i in range(config.depth)]
    check_fixed(data, {"layer_types": (kinds, None)}, where)
    return config


def zoedepth_from_published(data: Any, where: str) -> ZoeDepthConfig:
    check_fixed(data, ZOEDEPTH_FIXED, where)
    check_present(data, {"num_attractors": Field([], "", size=NUM_TAPS, items=COUNT)}, where)
    beit = BEIT_LARGE if data.get("backbone_config") is None else data["backbone_config"]
    backbone = _beit_from_published(beit, f"{where}backbone_config.")
    check_fixed(data, {"backbone_hidden_size": (backbone.width, None)}, where)
    bins = check_stored(data, {"bin_configurations": Field([], "", size=len(DOMAINS), items=PART)}, where)
    first = check_stored(
        bins["bin_configurations"][0],
        {"n_bins": field_of(ZoeDepthConfig, "num_bins")},
        f"{where}bin_configurations[0].",
    )
    check_fixed(data, {"bin_configurations": (_bin_configurations(first["n_bins"]),)}, where)
    fields = _ours(ZoeDepthConfig, ZOEDEPTH, ZOEDEPTH_DEFAULTS | data, where)
    return build(ZoeDepthConfig, fields | {"backbone": backbone, "num_bins": first["n_bins"]}, where)


def _beit_from_published(data: Any, where: str) -> BeitConfig:
    check_fixed(data, BEIT_FIXED, where)
    check_present(data, {"layer_scale_init_value": Field(0.1, "", above=0)}, where)
    fields = _ours(BeitConfig, VISION, VISION_DEFAULTS | data, where)
    config = build(BeitConfig, fields | {"num_taps": NUM_TAPS}, where)
    taps = _taps(config)
    check_fixed(data, {"out_features": (taps["out_features"], None), "out_indices": (taps["out_indices"], None)}, where)
    if all(data.get(name) is None for name in taps):
        raise InputError(f"{where}out_features is missing; {shown(taps['out_features'])} is expected")
    return config


def _taps(beit: BeitConfig) -> dict[str, list[Any]]:
    """The layers whose outputs ZoeDepth uses, in published terms."""
    layers = [beit.depth // beit.num_taps * (i + 1) for i in range(beit.num_taps)]
    return {"out_features": [f"stage{layer}" for layer in layers], "out_indices": layers}


def _bin_configurations(num_bins: int) -> list[dict[str, Any]]:
    """The published depth ranges of the domains. They have no effect, because bin centres are unbounded."""
    return [
        {"name": name, "n_bins": num_bins, "min_depth": 0.001, "max_depth": depth}
        for name, depth in zip(DOMAINS, (10.0, 80.0), strict=True)
    ]


def _extra_fields(data: Any, where: str) -> dict[str, Any]:
    """Our own fields; fields that an older file lacks have their defaults."""
    check_stored(data, {}, where)
    fields: dict[str, Any] = {MODEL_FIELDS.get(name) or name: x for name, x in data.items() if name != DIFFERENCES}
    for name in fields:
        if name not in EXTRA_FIELDS:
            raise InputError(f"{where}{name} is not a field of the model; {nearest_name(name, EXTRA_FIELDS)}")
    return check_stored(fields, {name: field_of(SpatialVLAConfig, name) for name in fields}, where)


def _check_repeated(data: Mapping[str, Any], config: SpatialVLAConfig, where: str) -> None:
    """Raises InputError for a redundant field that contradicts the fields from which it follows."""
    tokens, width, vocabulary = config.img.num_tokens, config.llm.width, config.llm.vocab_size
    top = {"action_token_begin_idx": config.action_offset, "_vocab_size": vocabulary, "vocab_size": vocabulary}
    top |= {"projection_dim": width, "num_hidden_layers": config.llm.depth}
    vision = {"num_image_tokens": tokens, "num_positions": tokens, "projection_dim": width}
    for part, repeated in (("", top), ("text_config", {"num_image_tokens": tokens}), ("vision_config", vision)):
        values: Fixed = {name: (value,) for name, value in repeated.items()}
        check_fixed(data[part] if part else data, values, f"{where}{part}{'.' * bool(part)}", FOLLOWS)
    check_present(data, {"hidden_size": COUNT}, where)  # unused: it is 2048 in the published file


def check_fixed(data: Any, supported: Fixed, where: str, must: str = "is not supported: it must be") -> None:
    """Raises InputError for a field of an object from a file with an unsupported value. Fields may be absent. `where`
    is as in `check_stored`."""
    check_stored(data, {}, where)
    for name, values in supported.items():
        if name in data and not any(_same(data[name], value) for value in values):
            raise InputError(f"{where}{name}={shown(data[name])} {must} {shown(values[0])}")


def _same(value: Any, other: Any) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def check_present(data: Mapping[str, Any], fields: Mapping[str, Field], where: str) -> None:
    """`check_stored` for the fields that are present."""
    check_stored(data, {name: field for name, field in fields.items() if name in data}, where)


def _ours(config: type, names: Mapping[str, str], data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of one of our config classes, read under their published names."""
    values = check_stored(data, {published: field_of(config, ours) for ours, published in names.items()}, where)
    return {ours: values[published] for ours, published in names.items()}


def _published(config: Any, names: dict[str, str]) -> dict[str, Any]:
    return {published: getattr(config, ours) for ours, published in names.items()}


def _zoedepth_to_published(zoe: ZoeDepthConfig, weights: str) -> dict[str, Any]:
    beit = zoe.backbone
    return {
        "architectures": ["ZoeDepthForDepthEstimation"],
        "model_type": "zoedepth",
        **_published(zoe, ZOEDEPTH),
        # The released code uses only part of these two; its weights have 16 attractors everywhere.
        "attractor_alpha": 1000,
        "num_attractors": [16, 8, 4, 1],
        "attractor_gamma": 2,
        "attractor_kind": "mean",
        "backbone_config": {
            "model_type": "beit",
            **_published(beit, VISION),
            **_taps(beit),
            "reshape_hidden_states": False,
            "use_relative_position_bias": True,
        },
        "backbone_hidden_size": beit.width,
        "bin_centers_type": "softplus",
        "bin_configurations": _bin_configurations(zoe.num_bins),
        "neck_hidden_sizes": list(zoe.neck_widths),
        "readout_type": "project",
        "reassemble_factors": [4, 2, 1, 0.5],
        "torch_dtype": weights,
    }


def config_to_published(config: SpatialVLAConfig, dtypes: set[np.dtype]) -> dict[str, Any]:
    img, llm, scalar = config.img, config.llm, config.llm.query_pre_attn_scalar
    # The release has one dtype for all weights; mixed dtypes load as float32.
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
