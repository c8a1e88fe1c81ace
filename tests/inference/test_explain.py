from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.batches import observation

from spatialvla_jax import Policy, load_pretrained
from spatialvla_jax.inference.explain import TOP, explain
from spatialvla_jax.models.resize import resize_observation


@pytest.mark.parametrize("constrained", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_probabilities_are_those_of_the_training_time_forward_pass(trained: Path, constrained: bool) -> None:
    policy = Policy.load(trained, constrained=constrained)
    prepared = policy.prepare(observation(3))
    (result,) = policy.act([prepared])
    seen = explain(policy, prepared, result["action_ids"])
    ids, grid, cfg = result["action_ids"], policy.processor.grid, policy.model.config
    np.testing.assert_array_equal(seen["candidates"][..., 0], ids)
    assert seen["candidates"].shape == seen["probabilities"].shape == (4, 3, TOP)
    np.testing.assert_array_equal(seen["candidate_actions"][:, :, 0], np.repeat(result["actions"][:, None], 3, axis=1))
    np.testing.assert_array_equal(np.unique(seen["depth"]), np.unique(seen["depth"].clip(0.5, 2)))

    if not constrained:
        assert (ids < 0).any(), "this policy would write text"
        assert (np.diff(seen["probabilities"]) <= 0).all() and (seen["probabilities"].sum(-1) <= 1 + 1e-5).all()
        return
    _, params, _ = load_pretrained(trained)
    inputs = resize_observation(*(prepared[k][None] for k in ("image", "depth", "intrinsics")), size=cfg.img.image_size)
    inputs["image"] = inputs["image"] / np.float32(255)
    text = {k: prepared[k][None] for k in ("prompt_ids", "prompt_mask")}
    inputs |= text | {"action_ids": ids.reshape(1, -1)}
    logits = jax.jit(lambda params, inputs: policy.model.apply({"params": params}, **inputs))(params, inputs)
    logits = np.asarray(logits)[0, :-1, cfg.action_offset :].reshape(4, 3, -1)
    for k, (start, size) in enumerate(grid.token_ranges):
        p = np.exp(logits[:, k, start : start + size].astype(np.float64))
        p /= p.sum(-1, keepdims=True)
        best = -np.sort(-p)[:, :TOP]
        np.testing.assert_allclose(seen["probabilities"][:, k, : best.shape[1]], best, atol=1e-5)
        assert (seen["probabilities"][:, k, best.shape[1] :] == 0).all()
