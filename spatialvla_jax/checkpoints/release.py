"""The published model's own code, "the release" (PyTorch, transformers 4.47): its processor's files, and the models
that it cannot run exactly."""

from pathlib import Path
from typing import Any

import numpy as np

from spatialvla_jax.actions import ActionGrid
from spatialvla_jax.checkpoints.processor import Processor
from spatialvla_jax.checkpoints.release_tokenizer import SentencePieceModel, write_tokenizer
from spatialvla_jax.models.spatialvla import SpatialVLAConfig
from spatialvla_jax.utils.atomic import write_json

RELEASE_PROCESSOR, IMAGES = "processor_config.json", "preprocessor_config.json"
AUTO_PROCESSOR = {"AutoProcessor": "processing_spatialvla.SpatialVLAProcessor"}
VARIABLES = {"translation": ("theta", "phi", "r"), "rotation": ("roll", "pitch", "yaw")}  # of each token
MAX_NEW_TOKENS = 256  # of the release's `predict_action`


def release_differences(config: SpatialVLAConfig, processor: Processor | None) -> list[str]:
    """Reasons why the release's code acts differently from this model, one sentence each. Empty if it acts the same,
    given one image of the model's size and a prompt rendered by `text.render`."""
    differences = []
    if config.depth_source == "dataset":
        differences.append("Depth comes with the image: the release's model has no input for it and omits Ego3D.")
    if config.mask == "causal":
        differences.append(
            "Attention is causal: in the release's model image and prompt see each other both ways, unless it runs "
            "with flash attention."
        )
    if config.num_action_tokens > MAX_NEW_TOKENS:
        differences.append(
            f"A chunk has {config.num_action_tokens} tokens: the release's model stops after {MAX_NEW_TOKENS}."
        )
    if processor is not None and not isinstance(processor.grid, ActionGrid):
        differences.append("The action grid is linear: the release's processor decodes only spherical ones.")
    if processor is not None and (problem := SentencePieceModel.parse(processor.tokenizer.to_bytes()).problem):
        differences.append(f"The tokenizer {problem}: the release's processor may split a prompt into other tokens.")
    return differences


def write_release_files(path: Path, processor: Processor, config: SpatialVLAConfig) -> None:
    """Write the files of the release's processor, processor_config.json only for spherical grids."""
    write_tokenizer(path, processor.tokenizer.to_bytes(), config.text_vocab, config.spatial_tokens)
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
        "size": {"height": config.img.image_size, "width": config.img.image_size},
    }
    write_json(path / IMAGES, images)
    if isinstance(processor.grid, ActionGrid):
        write_json(path / RELEASE_PROCESSOR, _processor_config(processor, processor.grid, config))


def _processor_config(processor: Processor, grid: ActionGrid, config: SpatialVLAConfig) -> dict[str, Any]:
    edges = {name: np.asarray(getattr(grid, name), np.float64).tolist() for name in ActionGrid.__dataclass_fields__}
    bins = {group: {f"{name}_bins": len(edges[name]) - 1 for name in names} for group, names in VARIABLES.items()}
    # Relative intrinsics are those of a 1 × 1 image.
    cameras = {name: {"height": 1, "width": 1, "intrinsic": k} for name, k in processor.intrinsics.items()}
    return {
        "action_chunk_size": config.action_chunk,
        "action_config": {
            "distribution": "gaussian",
            "num_bins": {**bins, "gripper": 2, "total": grid.vocab_size},
            "use_spherical": True,
        },
        "auto_map": AUTO_PROCESSOR,
        "bin_policy": {group: {f"{name}_bins": edges[name] for name in names} for group, names in VARIABLES.items()},
        "intrinsic_config": {"default": next(iter(cameras.values())), **cameras},
        "min_sigma": 0.0,
        "num_obs_steps": 1,
        "obs_delta": 1,
        "processor_class": "SpatialVLAProcessor",
        "statistics": processor.statistics,
    }
