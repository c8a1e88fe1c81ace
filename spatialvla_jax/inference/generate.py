"""Greedy decoding of one action chunk with a key/value cache."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spatialvla_jax.models import SpatialVLA


def generate(
    model: SpatialVLA,
    params: dict[str, Any],
    token_ranges: tuple[tuple[int, int], ...] | None,
    image: Float[Array, "B S S 3"],
    prompt_ids: Int[Array, "B Q"],
    prompt_mask: Bool[Array, "B Q"],
    *,
    depth: Float[Array, "B S S"] | None = None,
    intrinsics: Float[Array, "B 3 3"] | None = None,
) -> Int[Array, "B A"]:
    """The A action tokens of a chunk, as ids of the whole vocabulary.

    `token_ranges` (a grid's: first id and number of each token kind of one action) restricts every step to tokens of
    its kind, so that the result is always a valid action and only those rows of the LM head are read; None takes the
    best of the whole vocabulary, as the release does.
    """
    cfg = model.config
    variables = {"params": params}

    def call(method: str, *args: Any, **kwargs: Any) -> Any:
        return model.apply(variables, *args, method=method, **kwargs)

    hidden, cache, valid = call("prefill", image, prompt_ids, prompt_mask, depth=depth, intrinsics=intrinsics)
    ids: list[Int[Array, " B"]] = []
    for step in range(cfg.num_action_tokens):
        if step:
            hidden, cache = call("decode", ids[-1], step - 1, cache, valid)
        first, rows = 0, None
        if token_ranges is not None:
            start, size = token_ranges[step % len(token_ranges)]
            first, rows = cfg.action_offset + start, (cfg.action_offset + start, size)
        logits = call("logits", hidden, rows)
        ids.append(logits[:, 0].argmax(axis=-1).astype(jnp.int32) + first)
    return jnp.stack(ids, axis=1)
