import jax
import numpy as np
import pytest
from test_step import GRID, inputs_of

from spatialvla_jax.inference.generate import generate
from spatialvla_jax.models import SpatialVLA, preset
from spatialvla_jax.training.state import init_params
from spatialvla_jax.training.step import constrained_argmax


@pytest.mark.parametrize("mask", ["prefix", "causal"])
@pytest.mark.parametrize("constrained", [True, False])
def test_cached_decoding_is_greedy_on_the_full_forward_pass(mask: str, constrained: bool) -> None:
    """Fed back to the training-time forward pass without a cache, every generated token is the best there."""
    model = SpatialVLA(preset("nano", spatial_tokens=GRID.vocab_size, mask=mask))
    params = init_params(model, 0)
    inputs = inputs_of(model, 3)
    ranges = GRID.token_ranges if constrained else None
    images, prompts = inputs["image"], (inputs["prompt_ids"], inputs["prompt_mask"])
    view = {"depth": inputs["depth"], "intrinsics": inputs["intrinsics"]}
    tokens = jax.jit(lambda p: generate(model, p, ranges, images, *prompts, **view))(params)
    assert tokens.shape == (3, 12)
    offset = model.config.action_offset
    if not constrained:
        # Random weights may emit text, which the training-time forward pass cannot be fed: compare up to there.
        count = int(np.argmin(np.append((np.asarray(tokens) >= offset).all(axis=0), False)))
        fed = np.maximum(np.asarray(tokens) - offset, 0)
        logits = np.asarray(jax.jit(lambda p: model.apply({"params": p}, images, *prompts, fed, **view))(params))
        np.testing.assert_array_equal(logits.argmax(-1)[:, : count + 1][:, :12], np.asarray(tokens)[:, : count + 1])
        return
    fed = np.asarray(tokens) - offset
    logits = jax.jit(lambda p: model.apply({"params": p}, images, *prompts, fed, **view))(params)
    np.testing.assert_array_equal(constrained_argmax(logits[:, :-1], GRID, offset), fed)
