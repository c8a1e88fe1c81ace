"""The published directory layout: config.json, model.safetensors (or shards), and the processor's files.

Fields that the published config has no place for (prompt length, source of depth, …) stand under "spatialvla_jax" in
config.json, and processor.json holds our processor whole, so that what we write is read back unchanged. The release's
own files are written beside them, and read where processor.json is missing. `auto_map` names the release's code files:
`AutoModel` and `AutoProcessor` of transformers run whichever lie in the directory, the release's or those that
`export.convert.write_pytorch` puts there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

from spatialvla_jax.actions import ActionGrid, grid_from_dict
from spatialvla_jax.checkpoints import safetensors_io as safetensors
from spatialvla_jax.checkpoints.mapping import Slot, check_arrays, check_names, param_shapes, slots
from spatialvla_jax.checkpoints.processor import Processor
from spatialvla_jax.checkpoints.types import Checkpoint, LazyArray, all_finite, read_json
from spatialvla_jax.errors import InputError
from spatialvla_jax.models.beit import BeitConfig
from spatialvla_jax.models.gemma2 import Gemma2Config
from spatialvla_jax.models.siglip import SiglipConfig
from spatialvla_jax.models.spatialvla import SpatialVLAConfig
from spatialvla_jax.models.zoedepth import ZoeDepthConfig
from spatialvla_jax.text import Tokenizer
from spatialvla_jax.utils.atomic import new_directory, write_json
from spatialvla_jax.utils.renames import MODEL_FIELDS, renamed

T = TypeVar("T")

CONFIG, PROCESSOR = "config.json", "processor.json"
RELEASE_PROCESSOR, IMAGES, TOKENIZER = "processor_config.json", "preprocessor_config.json", "tokenizer.model"
MAX_SHARD_BYTES = 5 * 10**9
ZOE_PREFIX = "vision_zoe_model."

AUTO_MODEL = {
    "AutoConfig": "configuration_spatialvla.SpatialVLAConfig",
    "AutoModel": "modeling_spatialvla.SpatialVLAForConditionalGeneration",
}
AUTO_PROCESSOR = {"AutoProcessor": "processing_spatialvla.SpatialVLAProcessor"}

# Fields of ours without a published one, stored under EXTRA.
EXTRA = "spatialvla_jax"
EXTRA_FIELDS = ("prompt_length", "action_chunk", "tokens_per_action", "depth_source", "mask", "dtype", "remat")


def read_huggingface(path: str | Path, ignore: Sequence[str] = ()) -> Checkpoint:
    """A published directory, single or sharded. Weights are checked here and read when asked for, in their own dtype.

    `ignore` lists key prefixes to leave out (("vision_zoe_model.",) makes a model with depth from the data). Raises
    InputError for missing, unknown, misshapen, non-finite or non-floating tensors, and for a config they do not fit.
    """
    path = Path(path)
    config = read_config(path / CONFIG)
    stored = safetensors.open_directory(path)
    kept = {key: tensor for key, tensor in stored.items() if not key.startswith(tuple(ignore))}
    if ZOE_PREFIX in ignore and config.depth_source == "zoedepth":
        config = replace(config, depth_source="dataset")
    shapes = param_shapes(config)
    arrays = stacked_arrays(path, kept, shapes)
    return Checkpoint(config, arrays, read_processor(path), ignored=len(stored) - len(kept))


def open_zoedepth(path: Path) -> tuple[ZoeDepthConfig, dict[str, LazyArray]]:
    """A ZoeDepth's own Hugging Face directory: its sizes, and its arrays as our model names them ("zoe/…")."""
    config = parse_config(path / CONFIG, zoedepth_from_published)
    shapes = param_shapes(SpatialVLAConfig(zoe=config, depth_source="zoedepth"))
    stored = {ZOE_PREFIX + key: tensor for key, tensor in safetensors.open_directory(path).items()}
    return config, stacked_arrays(path, stored, {p: shape for p, shape in shapes.items() if p.startswith("zoe/")})


def stacked_arrays(
    path: Path, stored: Mapping[str, safetensors.Stored], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, LazyArray]:
    """Arrays of ours with these shapes out of published tensors, all of which must be used. Raises InputError."""
    table = slots(shapes)
    wanted = {slot.key: slot for slot in table}
    check_names(path, "missing", wanted.keys() - stored.keys())
    check_names(path, "unknown", stored.keys() - wanted.keys())
    wrong = [f"{k} {t.shape} instead of {wanted[k].shape}" for k, t in stored.items() if t.shape != wanted[k].shape]
    check_names(path, f"of another shape than {CONFIG} says", wrong)
    check_names(path, "not finite", [key for key, tensor in stored.items() if not all_finite(tensor.read())])
    by_path: dict[str, list[Slot]] = {}
    for slot in table:
        by_path.setdefault(slot.path, []).append(slot)
    mixed = [s.key for group in by_path.values() for s in group if stored[s.key].dtype != stored[group[0].key].dtype]
    check_names(path, "of another dtype than the same weight of the first layer", mixed)
    return {array: _stacked(shapes[array], group, stored) for array, group in by_path.items()}


def _stacked(shape: tuple[int, ...], group: list[Slot], stored: Mapping[str, safetensors.Stored]) -> LazyArray:
    dtype = stored[group[0].key].dtype

    def read() -> np.ndarray:
        array = np.empty(shape, dtype)
        for slot in group:
            slot.to_ours(stored[slot.key].read(), array)
        return array

    return LazyArray(shape, dtype, read)


def write_huggingface(
    path: str | Path,
    checkpoint: Checkpoint,
    *,
    code: Mapping[str, str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a directory in the published layout; it appears whole or not at all.

    `code` is {file name: text} of the Python files to put in it: transformers loads no directory without. Holds one
    array at a time. Raises InputError when `path` exists or the arrays do not fit the config.
    """
    path = Path(path)
    check_arrays("checkpoint", checkpoint.arrays, param_shapes(checkpoint.config))
    table = {slot.key: slot for slot in slots({name: array.shape for name, array in checkpoint.arrays.items()})}
    specs = {key: (slot.shape, checkpoint.arrays[slot.path].dtype) for key, slot in table.items()}
    held: dict[str, np.ndarray] = {}

    def read(key: str) -> np.ndarray:
        slot = table[key]
        if slot.path not in held:
            held.clear()
            held[slot.path] = checkpoint.arrays[slot.path].read()
        return slot.to_published(held[slot.path])

    dtypes = {dtype for _, dtype in specs.values()}
    with new_directory(path) as folder:
        write_json(folder / CONFIG, config_to_published(checkpoint.config, dtypes))
        if checkpoint.processor is not None:
            write_processor(folder, checkpoint.processor, checkpoint.config)
        write_code(folder, code)
        safetensors.write_directory(folder, specs, read, max_shard_bytes)


def write_code(path: Path, code: Mapping[str, str] | None) -> None:
    for name, text in (code or {}).items():
        (path / name).write_text(text)


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


def read_processor(path: Path) -> Processor | None:
    """From processor.json, else from the release's files; None where the directory has neither."""
    if (path / PROCESSOR).exists():
        data = read_json(path / PROCESSOR)
        try:
            return Processor.from_dict(data)
        except KeyError as error:
            raise InputError(f"{path / PROCESSOR} has no field {error.args[0]!r}") from error
    if not (path / RELEASE_PROCESSOR).exists():
        return None
    if not (path / TOKENIZER).exists():
        raise InputError(f"{path} has {RELEASE_PROCESSOR} but no {TOKENIZER}: copy PaliGemma's {TOKENIZER} beside it")
    data = read_json(path / RELEASE_PROCESSOR)
    try:
        bins = data["bin_policy"]["translation"] | data["bin_policy"]["rotation"]
        edges = {name: bins[f"{name}_bins"] for name in ActionGrid.__dataclass_fields__}
        return Processor(
            tokenizer=Tokenizer.from_bytes((path / TOKENIZER).read_bytes()),
            grid=grid_from_dict({"kind": "spherical", **edges}),
            statistics=data["statistics"],
            intrinsics={name: _relative(camera) for name, camera in data["intrinsic_config"].items()},
        )
    except KeyError as error:
        raise InputError(f"{path / RELEASE_PROCESSOR} has no field {error.args[0]!r}") from error


def _relative(camera: dict[str, Any]) -> list[list[float]]:
    first, second, third = camera["intrinsic"]
    return [[x / camera["width"] for x in first], [x / camera["height"] for x in second], list(third)]


def write_processor(path: Path, processor: Processor, config: SpatialVLAConfig) -> None:
    """processor.json, the SentencePiece model, and the release's own files where its format can hold the grid."""
    write_json(path / PROCESSOR, processor.to_dict())
    (path / TOKENIZER).write_bytes(processor.tokenizer.to_bytes())
    size = {"height": config.img.image_size, "width": config.img.image_size}
    images = {
        "auto_map": AUTO_PROCESSOR,
        "do_convert_rgb": True,
        "do_normalize": False,
        "do_rescale": True,
        "do_resize": True,
        "image_processor_type": "SiglipImageProcessor",
        "image_seq_length": config.img.num_tokens,
        "processor_class": "SpatialVLAProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": size,
    }
    write_json(path / IMAGES, images)
    if isinstance(processor.grid, ActionGrid):
        write_json(path / RELEASE_PROCESSOR, _release_processor(processor, processor.grid, config))


def _release_processor(processor: Processor, grid: ActionGrid, config: SpatialVLAConfig) -> dict[str, Any]:
    edges = {name: np.asarray(getattr(grid, name), np.float64).tolist() for name in ActionGrid.__dataclass_fields__}
    groups = {"translation": ("theta", "phi", "r"), "rotation": ("roll", "pitch", "yaw")}
    bins = {group: {f"{name}_bins": len(edges[name]) - 1 for name in names} for group, names in groups.items()}
    # Intrinsics relative to the image are those of an image of 1 x 1.
    cameras = {name: {"height": 1, "width": 1, "intrinsic": k} for name, k in processor.intrinsics.items()}
    return {
        "action_chunk_size": config.action_chunk,
        "action_config": {
            "distribution": "gaussian",
            "num_bins": {**bins, "gripper": 2, "total": grid.vocab_size},
            "use_spherical": True,
        },
        "auto_map": AUTO_PROCESSOR,
        "bin_policy": {group: {f"{name}_bins": edges[name] for name in names} for group, names in groups.items()},
        "intrinsic_config": {"default": next(iter(cameras.values())), **cameras},
        "min_sigma": 0.0,
        "num_obs_steps": 1,
        "obs_delta": 1,
        "processor_class": "SpatialVLAProcessor",
        "statistics": processor.statistics,
    }
