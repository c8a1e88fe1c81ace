"""Image and words in, robot actions out."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spatialvla_jax.actions import decode
from spatialvla_jax.data.statistics import unnormalize
from spatialvla_jax.errors import InputError
from spatialvla_jax.inference.generate import generate
from spatialvla_jax.models import SpatialVLA
from spatialvla_jax.processor import Processor


class Policy:
    """Greedy policy over a model, its parameters and its processor; `Policy.load(path)` makes one from a checkpoint."""

    def __init__(self, model: SpatialVLA, params: dict[str, Any], processor: Processor) -> None:
        self.model, self.processor = model, processor
        self.params = jax.device_put(params)
        self._act = jax.jit(lambda params, grid, inputs: act(model, params, grid, inputs))
        self._resize = jax.jit(resize, static_argnames="size")

    @classmethod
    def load(cls, path: str | Path) -> "Policy":
        """From anything `load_pretrained` reads that carries a processor. Raises InputError where it has none."""
        from spatialvla_jax.interop import load_pretrained

        model, params, processor = load_pretrained(path)
        if processor is None:
            raise InputError(f"{path} holds weights but no action grid and tokenizer, so it cannot act")
        return cls(model, params, processor)

    def infer(self, observation: dict[str, Any]) -> dict[str, np.ndarray]:
        """One observation → {"actions": f32[T, 7] in robot units, "action_ids": i32[T, tokens_per_action]}.

        `observation` has "image" u8[H, W, 3] and "prompt" str; "intrinsics" f32[3, 3] in pixels of that image and
        "unnorm_key" (a dataset's name) may be None or absent; "depth" f32[H, W] in metres is needed by a model that
        takes depth from its data. Raises InputError naming what is missing or misshapen.
        """
        image = np.asarray(observation["image"]) if "image" in observation else None
        if image is None or image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
            got = "nothing" if image is None else f"{image.dtype}{list(image.shape)}"
            raise InputError(f"observation 'image' must be uint8[H, W, 3], got {got}")
        if not isinstance(observation.get("prompt"), str):
            raise InputError(f"observation 'prompt' must be a string, got {type(observation.get('prompt')).__name__}")
        statistics = self.statistics(observation.get("unnorm_key"))
        cfg = self.model.config
        ids, mask = self.processor.tokenizer.encode_prompt(
            observation["prompt"], template=self.processor.prompt_template, length=cfg.prompt_length
        )
        depth = observation.get("depth")
        if cfg.depth == "dataset":
            if depth is None or np.shape(depth) != image.shape[:2]:
                raise InputError(
                    f"observation 'depth' must be metres of shape {list(image.shape[:2])}, got "
                    f"{'nothing' if depth is None else list(np.shape(depth))}: this model takes depth from its data"
                )
        else:
            depth = None
        inputs = self._resize(
            jnp.asarray(image),
            None if depth is None else jnp.asarray(depth, jnp.float32),
            jnp.asarray(self.intrinsics(observation, image.shape[:2]), jnp.float32),
            size=cfg.img.image_size,
        )
        ids_, actions = self.act(inputs | {"prompt_ids": ids, "prompt_mask": mask}, batched=False)
        return {"actions": unnormalize(actions, statistics["action"]), "action_ids": ids_}

    def act(self, inputs: dict[str, Any], *, batched: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Arrays as the loader gives them → (ids i32[B, T, tokens_per_action], normalised actions f32[B, T, 7])."""
        if not batched:
            inputs = {k: jnp.asarray(v)[None] for k, v in inputs.items()}
        keys = ("image", "depth", "intrinsics", "prompt_ids", "prompt_mask")
        ids, actions = self._act(self.params, self.processor.grid, {k: inputs[k] for k in keys if k in inputs})
        ids, actions = np.asarray(ids), np.asarray(actions)
        return (ids, actions) if batched else (ids[0], actions[0])

    def reset(self) -> None:
        """Forget the episode. Greedy chunks carry nothing from one call to the next, so there is nothing to forget."""

    def statistics(self, key: str | None) -> dict[str, Any]:
        known = self.processor.statistics
        if key is None and len(known) == 1:
            return next(iter(known.values()))
        if key not in known:
            raise InputError(f"unnorm_key {key!r} is not a dataset of this policy; choose one of {', '.join(known)}")
        return known[key]

    def intrinsics(self, observation: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
        """The observation's intrinsics, or those that the policy was trained with, in pixels of an image of `size`."""
        given = observation.get("intrinsics")
        if given is not None:
            if np.shape(given) != (3, 3):
                raise InputError(f"observation 'intrinsics' must be of shape [3, 3], got {list(np.shape(given))}")
            return np.asarray(given, np.float32)
        known = self.processor.intrinsics
        key = observation.get("unnorm_key") or next(iter(known))
        relative = np.asarray(known[key if key in known else next(iter(known))], np.float32)
        return relative * np.array([[size[1]], [size[0]], [1]], np.float32)


def act(model: SpatialVLA, params: Any, grid: Any, inputs: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """The jitted whole: uint8 images of the model's size → (ids [B, T, n], normalised actions [B, T, 7])."""
    cfg = model.config
    tokens = generate(
        model,
        params,
        grid.token_ranges,
        inputs["image"].astype(jnp.float32) / 255,
        inputs["prompt_ids"],
        inputs["prompt_mask"],
        depth=inputs.get("depth"),
        intrinsics=inputs["intrinsics"],
    )
    ids = (tokens - cfg.action_offset).reshape(-1, cfg.action_chunk, cfg.tokens_per_action)
    return ids, decode(grid, ids)


def resize(image: Any, depth: Any, intrinsics: Any, *, size: int) -> dict[str, Any]:
    """As the loader does: Lanczos with antialiasing for the image, nearest for depth, intrinsics scaled along."""
    H, W, _ = image.shape
    pixels = jax.image.resize(image.astype(jnp.float32), (size, size, 3), "lanczos3", antialias=True)
    out = {"image": jnp.clip(jnp.round(pixels), 0, 255).astype(jnp.uint8)}
    if depth is not None:
        out["depth"] = jax.image.resize(depth, (size, size), "nearest")
    return out | {"intrinsics": intrinsics * jnp.array([[size / W], [size / H], [1.0]])}
