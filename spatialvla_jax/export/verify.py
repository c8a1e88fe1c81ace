"""Verify that an export acts the same: run JAX and the exported PyTorch directory on fixed probes, compare every stage.

Both sides compute in float32 whatever the dtype of the weights. bfloat16 weights are exact in float32, so every export
must give equal tokens. PyTorch runs on the CPU.
"""

import contextlib
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from spatialvla_jax.actions import decode
from spatialvla_jax.actions.normalization import unnormalize
from spatialvla_jax.checkpoints.mapping import unflatten
from spatialvla_jax.checkpoints.types import Checkpoint
from spatialvla_jax.inference.generate import generate
from spatialvla_jax.inference.weights import prepare_weights
from spatialvla_jax.models import SpatialVLA
from spatialvla_jax.models.resize import resize_observation
from spatialvla_jax.models.spatialvla import SpatialVLAConfig
from spatialvla_jax.models.zoedepth import estimate_depth
from spatialvla_jax.utils.storage import AnyPath, local_copy, to_path

INSTRUCTIONS = ("open the drawer", "put the bowl on the plate", "pick up the red block", "turn on the stove")
# Far above float32 rounding errors, so a larger difference means a different computation. Resized pixels are whole
# levels of 1/255, which sums in different orders may round differently.
LIMITS = {"inputs": 1.5 / 255, "logits": 1e-2}
MISSING = "PyTorch is not installed, so the export was not compared with JAX: pip install 'spatialvla-jax[torch]'"


class Difference(TypedDict):
    max: float
    mean: float


class Verification(TypedDict):
    """`differences` are per stage, for stages that the model has: inputs, depth, image_features, logits (first action
    token), actions (robot units). Inputs are the pixels from each side's own processor; later stages get equal
    inputs."""

    examples: int
    dtype: str
    tokens: int
    tokens_equal: int
    differences: dict[str, Difference]


class VerificationError(Exception):
    """The export does not act like its source; `result` is what `verify` would have returned."""

    def __init__(self, message: str, result: Verification) -> None:
        super().__init__(message)
        self.result = result


def available() -> bool:
    """Whether PyTorch and transformers are installed."""
    return find_spec("torch") is not None and find_spec("transformers") is not None


def verify(checkpoint: Checkpoint, directory: str | AnyPath, adapters: str | AnyPath | None = None) -> Verification:
    """Compare `checkpoint` in JAX with the PyTorch export in `directory`, with the `adapters` in another directory
    loaded by `peft` if given. Needs the extra [torch].

    Raises VerificationError if a greedy token differs or a stage exceeds its limit.
    """
    probes = make_probes(checkpoint.config.img.image_size)
    inputs = _inputs(checkpoint, probes)
    ours = _run_jax(checkpoint, inputs)
    with contextlib.ExitStack() as copies:
        export = copies.enter_context(local_copy(to_path(directory)))
        peft = copies.enter_context(local_copy(to_path(adapters))) if adapters else None
        theirs = _run_torch(export, peft, checkpoint, inputs, probes)

    differences: dict[str, Difference] = {}
    for stage in ("inputs", "depth", "image_features", "logits", "actions"):
        if stage in ours:
            error = np.abs(ours[stage].astype(np.float64) - theirs[stage])
            differences[stage] = {"max": float(error.max()), "mean": float(error.mean())}
    result: Verification = {
        "examples": len(INSTRUCTIONS),
        "dtype": "float32",
        "tokens": int(ours["tokens"].size),
        "tokens_equal": int((ours["tokens"] == theirs["tokens"]).sum()),
        "differences": differences,
    }
    found = ", ".join(f"{stage} by up to {differences[stage]['max']:.1e}" for stage in LIMITS)
    wrong = [stage for stage, limit in LIMITS.items() if not differences[stage]["max"] <= limit]
    if result["tokens_equal"] < result["tokens"] or wrong:
        differing = f"{result['tokens'] - result['tokens_equal']} of {result['tokens']} greedy tokens"
        raise VerificationError(f"{directory} does not act like its source: {differing} differ, {found}", result)
    return result


def table(result: Verification) -> str:
    """The result of `verify` as text."""
    rows = [
        f"{name.replace('_', ' '):15} {d['max']:9.1e} {d['mean']:9.1e}" for name, d in result["differences"].items()
    ]
    head = f"{'JAX ↔ PyTorch':15} {'max':>9} {'mean':>9}   ({result['examples']} examples, {result['dtype']})"
    return "\n".join([head, *rows, f"greedy tokens equal: {result['tokens_equal']} of {result['tokens']}"])


def make_probes(size: int) -> dict[str, np.ndarray]:
    """Fixed smooth images u8[N, H, W, 3] that are not square, depth f32[N, H, W] in metres, intrinsics f32[N, 3, 3]."""
    H, W, N = size * 5 // 4, size * 3 // 2, len(INSTRUCTIONS)
    rng = np.random.default_rng(0)
    waves = rng.normal(size=(N, 4, 6, 2)) * 4
    phase = rng.uniform(0, 2 * np.pi, (N, 4, 6))
    y, x = np.mgrid[:H, :W] / size
    # Four channels: colours and depth.
    angle = waves[..., 0, None, None] * y + waves[..., 1, None, None] * x + phase[..., None, None]
    channels = 0.5 + np.sin(angle).mean(axis=2) / 2
    noise = rng.normal(0, 8, (N, H, W, 3))
    camera = np.array([[0.9 * W, 0, 0.52 * W], [0, 0.95 * W, 0.47 * H], [0, 0, 1]])
    return {
        "image": (channels[:, :3].transpose(0, 2, 3, 1) * 255 + noise).clip(0, 255).astype(np.uint8),
        "depth": (0.4 + 2 * channels[:, 3]).astype(np.float32),
        "intrinsics": np.repeat(camera[None], N, 0).astype(np.float32),
    }


def _inputs(checkpoint: Checkpoint, probes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The JAX model's inputs. Prompts are random tokens if there is no tokenizer."""
    config, N = checkpoint.config, len(INSTRUCTIONS)
    depths = probes["depth"] if config.depth_source == "dataset" else [None] * N
    examples = [
        resize_observation(jnp.asarray(image), depth, jnp.asarray(intrinsics), size=config.img.image_size)
        for image, depth, intrinsics in zip(probes["image"], depths, probes["intrinsics"], strict=True)
    ]
    inputs = {name: np.stack([x[name] for x in examples]) for name in examples[0]}
    inputs["image"] = inputs["image"].astype(np.float32) / 255
    if checkpoint.processor is None:
        length = np.linspace(config.prompt_length // 2, config.prompt_length, N, dtype=int)
        mask = np.arange(config.prompt_length) < length[:, None]
        ids = np.random.default_rng(1).integers(2, min(config.text_vocab, 50_000), mask.shape) * mask
    else:
        encode, template = checkpoint.processor.tokenizer.encode_prompt, checkpoint.processor.prompt_template
        # Not limited by the model's prompt_length: the weights do not depend on it.
        encoded = [encode(text, template=template, length=1024) for text in INSTRUCTIONS]
        ids, mask = (np.stack(x) for x in zip(*encoded, strict=True))
        longest = mask.sum(1).max()
        ids, mask = ids[:, :longest], mask[:, :longest]
    return inputs | {"prompt_ids": ids.astype(np.int32), "prompt_mask": mask}


def _run_jax(checkpoint: Checkpoint, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    config = replace(checkpoint.config, dtype="float32", prompt_length=inputs["prompt_ids"].shape[1])
    model, processor = SpatialVLA(config), checkpoint.processor
    params = unflatten({path: array.read().astype(np.float32) for path, array in checkpoint.arrays.items()})
    ranges = None if processor is None else processor.grid.token_ranges

    # Estimate depth separately: later stages take it as given, so the large ZoeDepth is compiled once.
    @jax.jit
    def estimate(params: Any, image: Any) -> Any:
        size = config.zoe.backbone.image_size
        return model.apply({"params": params}, image, method=lambda m, x: estimate_depth(m.zoe, x, size))

    @jax.jit
    def run(params: Any, inputs: Any) -> dict[str, Any]:
        apply: Any = partial(vla.apply, {"params": params})
        nothing = jnp.zeros((len(inputs["image"]), config.num_action_tokens), int)  # not seen by the first logits
        return {
            "image_features": apply(inputs["image"], inputs.get("depth"), inputs["intrinsics"], method="embed_image"),
            "logits": apply(**inputs, action_ids=nothing)[:, 0],
            "tokens": generate(vla, prepare_weights(vla, params), ranges, **inputs)[0],
        }

    out = {"inputs": inputs["image"]}
    vla = model
    with jax.default_matmul_precision("highest"):
        if config.depth_source == "zoedepth":
            vla = SpatialVLA(replace(config, depth_source="dataset"))
            out["depth"] = np.asarray(estimate(params, inputs["image"]))
            params = {name: part for name, part in params.items() if name != "zoe"}
            inputs = inputs | {"depth": out["depth"]}
        out |= {name: np.asarray(x) for name, x in run(params, inputs).items()}
    if processor is not None:
        ids = out["tokens"].reshape(len(INSTRUCTIONS), config.action_chunk, -1) - config.action_offset
        statistics = next(iter(processor.statistics.values()))["action"]
        out["actions"] = unnormalize(np.asarray(decode(processor.grid, ids)), statistics)
    return out


def _run_torch(
    directory: Path,
    adapters: Path | None,
    checkpoint: Checkpoint,
    inputs: dict[str, np.ndarray],
    probes: dict[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Run the directory as a user would: with its own code and, if there is one, its own processor."""
    import torch
    from transformers import AutoModel, AutoProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = AutoModel.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32)
    if adapters:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapters).get_base_model()
    processor = None
    if checkpoint.processor is None:
        batch = torch_inputs(checkpoint.config, inputs)
    else:
        processor = AutoProcessor.from_pretrained(adapters or directory, trust_remote_code=True)
        processor.prompt_length = 1024  # prompts of any length, as in `_inputs`
        depth = probes["depth"] if "depth" in inputs else None
        batch = processor(
            images=list(probes["image"]), text=list(INSTRUCTIONS), intrinsics=probes["intrinsics"], depth=depth
        )
    own_pixels, pixels = batch["pixel_values"], torch.from_numpy(inputs["image"]).permute(0, 3, 1, 2)
    batch["pixel_values"] = pixels
    out = {"inputs": own_pixels.permute(0, 2, 3, 1)}
    with torch.no_grad():
        if checkpoint.config.depth_source == "zoedepth":
            out["depth"] = depth = model.estimate_depth(pixels)
            model.estimate_depth = lambda _: depth  # estimate once: it takes most of the time
        out["tokens"] = tokens = model.predict_action(batch)
        out |= {
            "image_features": model.get_image_features(pixels, batch["intrinsic"], batch.get("depth")),
            "logits": model(**batch, logits_to_keep=1).logits[:, -1],
        }
    arrays = {name: x.numpy() for name, x in out.items()}
    if processor is not None:
        key = next(iter(processor.statistics))
        arrays["actions"] = np.stack([processor.decode_actions(ids, key)["actions"] for ids in tokens])
    return arrays


def torch_inputs(config: SpatialVLAConfig, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    """The PyTorch model's inputs from those of the JAX model: image tokens first, padding on the left."""
    import torch

    padding = (~inputs["prompt_mask"]).sum(1)
    prompts = np.stack([np.roll(ids, n) for ids, n in zip(inputs["prompt_ids"], padding, strict=True)])
    valid = np.stack([np.roll(mask, n) for mask, n in zip(inputs["prompt_mask"], padding, strict=True)])
    images = np.full((len(prompts), config.img.num_tokens), config.text_vocab)
    arrays = {
        "input_ids": np.concatenate([images, prompts], 1).astype(np.int64),
        "attention_mask": np.concatenate([np.ones_like(images), valid], 1).astype(np.int64),
        "pixel_values": inputs["image"].transpose(0, 3, 1, 2),
        "intrinsic": inputs["intrinsics"],
    } | {name: inputs[name] for name in ("depth",) if name in inputs}
    return {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in arrays.items()}
