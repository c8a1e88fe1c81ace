"""Explains a policy's choice of a chunk to people. It costs one more forward pass."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Int

from spatialvla_jax.actions import ActionTokenizer, decode
from spatialvla_jax.actions.normalization import to_range
from spatialvla_jax.inference.generate import token_probabilities
from spatialvla_jax.inference.policy import Policy
from spatialvla_jax.inference.weights import Weights, image_depth
from spatialvla_jax.models import SpatialVLA
from spatialvla_jax.models.resize import resize_observation

TOP = 8  # candidates of each token


def explain(
    policy: Policy, prepared: dict[str, np.ndarray], action_ids: Int[np.ndarray, "T n"]
) -> dict[str, np.ndarray]:
    """Explain the `action_ids` that the policy chose for one observation, `prepared` by `Policy.prepare`:

    - "candidates" i32[T, n, k], the likeliest ids of each token, as "action_ids" count them (negative: a text token,
      which an unconstrained policy can choose), and "probabilities" f32[T, n, k], highest first; the tokens before it
      are the chosen ones.
    - "candidate_actions" f32[T, n, k, A] in robot units: the action with that one token exchanged.
    - "depth" f32[S, S] in metres, as the model takes it or estimates it, unless it takes none; "intrinsics" f32[3, 3]
      in pixels of the same.

    The numbers come from one pass over all tokens. They can differ from those of greedy decoding in the last bits.
    """
    length = policy.shape(prepared)[2]
    inputs = {key: x[None] for key, x in prepared.items() if key != "draft"}
    inputs |= {key: inputs[key][:, :length] for key in ("prompt_ids", "prompt_mask")}
    explained = _explain(
        policy.model, policy.constrained, policy.weights, policy.processor.grid, inputs, action_ids[None]
    )
    return {key: x[0] for key, x in jax.device_get(explained).items()}


@partial(jax.jit, static_argnums=(0, 1))
def _explain(
    model: SpatialVLA,
    constrained: bool,
    weights: Weights,
    grid: ActionTokenizer,
    inputs: dict[str, jax.Array],
    action_ids: Int[jax.Array, "B T n"],
) -> dict[str, jax.Array]:
    cfg = model.config
    seen = resize_observation(inputs["image"], inputs.get("depth"), inputs["intrinsics"], size=cfg.img.image_size)
    image, depth = seen["image"].astype(jnp.float32) / 255, seen.get("depth")
    candidates, probabilities = token_probabilities(
        model,
        weights,
        grid.token_ranges if constrained else None,
        image,
        inputs["prompt_ids"],
        inputs["prompt_mask"],
        rearrange(action_ids, "B T n -> B (T n)") + cfg.action_offset,
        depth=depth,
        intrinsics=seen["intrinsics"],
        top=min(TOP, cfg.spatial_tokens),
    )
    split = partial(rearrange, pattern="B (T n) k -> B T n k", n=cfg.tokens_per_action)
    candidates = split(candidates) - cfg.action_offset
    chosen = jnp.eye(cfg.tokens_per_action, dtype=bool)[:, None]  # which token of the action is exchanged
    exchanged = jnp.where(chosen, candidates[..., None], action_ids[:, :, None, None])
    low, high, mask = rearrange(inputs["bounds"], "B three A -> three B 1 1 1 A")
    actions = to_range(decode(grid, jnp.maximum(exchanged, 0)), low, high, mask > 0)
    if cfg.depth_source == "zoedepth":
        depth = image_depth(cfg, weights, image)
    out: dict[str, Any] = {"candidates": candidates, "probabilities": split(probabilities)}
    out |= {"candidate_actions": actions, "intrinsics": seen["intrinsics"]}
    return out if depth is None else out | {"depth": depth}
