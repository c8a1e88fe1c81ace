from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.batches import GRID, random_inputs
from helpers.setups import adamw, optimizer_of

from spatialvla_jax.actions import decode, encode, linear_grid
from spatialvla_jax.errors import InputError
from spatialvla_jax.models import SpatialVLA, preset
from spatialvla_jax.models.remat import POLICIES
from spatialvla_jax.training.optimizer import merge, split_frozen
from spatialvla_jax.training.state import init_params
from spatialvla_jax.training.step import constrained_argmax, loss_and_metrics

run = jax.jit(loss_and_metrics, static_argnums=0)


def nano(**changes) -> SpatialVLA:
    return SpatialVLA(preset("nano", spatial_tokens=GRID.vocab_size, **changes))


@pytest.fixture(scope="module")
def params() -> dict:
    return init_params(nano(), 0)


@pytest.mark.parametrize("grid", [GRID, linear_grid()], ids=["spatial", "linear256"])
def test_loss_is_the_plain_cross_entropy(grid) -> None:
    """Written out in NumPy from the model's own logits: 12 (or 28) action tokens and <eos>, with equal weights."""
    model = SpatialVLA(
        preset("nano", spatial_tokens=grid.vocab_size, tokens_per_action=grid.tokens_per_action, depth_source="none")
    )
    params = init_params(model, 0)
    inputs = random_inputs(model, 3)
    loss, metrics = run(model, params, inputs, grid)
    ids = np.asarray(encode(grid, inputs.actions))
    flat = ids.reshape(3, -1)
    seen = inputs.image, inputs.prompt_ids, inputs.prompt_mask
    logits = np.asarray(jax.jit(lambda p: model.apply({"params": p}, *seen, flat))(params), np.float64)
    targets = np.concatenate([flat + model.config.action_offset, np.full((3, 1), 1)], axis=1)
    assert logits.shape == (3, 4 * grid.tokens_per_action + 1, model.config.llm.vocab_size)
    log_z = np.log(np.exp(logits).sum(-1))
    picked = np.take_along_axis(logits, targets[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(loss, (log_z - picked).mean(axis=1), rtol=1e-5)
    best = np.asarray(constrained_argmax(jnp.asarray(logits[:, :-1]), grid, model.config.action_offset)).reshape(
        ids.shape
    )
    for i, (start, size) in enumerate(grid.token_ranges):
        assert ((best[..., i] >= start) & (best[..., i] < start + size)).all()
    np.testing.assert_allclose(metrics["accuracy"], (best == ids).mean(axis=(1, 2)), atol=1e-6)
    expected = np.abs(np.asarray(decode(grid, best)) - inputs.actions).mean(axis=(1, 2))
    np.testing.assert_allclose(metrics["l1"], expected, rtol=1e-5)


def test_padding_of_the_prompt_changes_nothing(params) -> None:
    """Nothing sees the tokens behind the prompt's mask, whatever and however many they are."""
    inputs = random_inputs(nano(), 4)
    losses = []
    for length, filler in ((32, 0), (32, 7), (40, 9)):
        mask = np.pad(inputs.prompt_mask, ((0, 0), (0, length - 32)))
        ids = np.where(mask, np.pad(inputs.prompt_ids, ((0, 0), (0, length - 32))), filler)
        padded = replace(inputs, prompt_ids=ids, prompt_mask=mask)
        losses.append(run(nano(prompt_length=length), params, padded, GRID)[0])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-5)


def test_causal_mask_differs_from_prefix(params) -> None:
    inputs = random_inputs(nano(), 2)
    a, b = (run(nano(mask=mask), params, inputs, GRID)[0] for mask in ("prefix", "causal"))
    assert not np.allclose(a, b)


def test_rematerialisation_changes_nothing(params) -> None:
    """Loss and gradients are the same for any remat policy."""
    inputs, results = random_inputs(nano(), 2), {}
    for remat in POLICIES:
        model = nano(remat=remat)
        loss = jax.jit(jax.value_and_grad(lambda p, model=model: loss_and_metrics(model, p, inputs, GRID)[0].mean()))
        results[remat] = loss(params)
    expected_loss, expected = results.pop("none")
    for loss, gradient in results.values():
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, expected)
    assert optax.global_norm(expected) > 0.1


def test_frozen_parameters_have_no_gradient_and_no_optimizer_state(params) -> None:
    trainable, frozen = split_frozen(params, ("llm/embedder", "img"))
    assert set(frozen) == {"llm", "img"} and set(frozen["llm"]) == {"embedder"} and "img" not in trainable
    assert jax.tree.structure(merge(trainable, frozen)) == jax.tree.structure(params)
    state = optimizer_of(10).init(trainable)
    moments = [x for x in jax.tree.leaves(state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in jax.tree.leaves(trainable))
    with pytest.raises(InputError, match="'vision' matches no parameter"):
        split_frozen(params, ("vision",))


def test_schedule_is_linear_up_and_down() -> None:
    rate = adamw(100, learning_rate=1.0, warmup=0.1).schedule
    np.testing.assert_allclose([rate(i) for i in (0, 5, 10, 55, 100)], [0, 0.5, 1, 0.5, 0], atol=1e-6)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (2, 0.5), (7, 1.0), (1000, 0.005), (1000, 0.0)])
def test_schedule_is_that_of_optax(steps: int, warmup: float) -> None:
    up = max(1, round(warmup * steps))
    pieces = [optax.linear_schedule(0.0, 2e-5, up), optax.linear_schedule(2e-5, 0.0, max(1, steps - up))]
    counts, schedule = jnp.arange(steps), adamw(steps, learning_rate=2e-5, warmup=warmup).schedule
    expected, rates = jax.vmap(optax.join_schedules(pieces, [up]))(counts), jax.vmap(schedule)(counts)
    np.testing.assert_allclose(rates, expected, atol=1e-11)


def test_optimizer_is_clipped_adamw() -> None:
    """By hand: two equal gradients, clipped to norm 1, so bias-corrected Adam moves by the rate in each direction."""
    optimizer = optimizer_of(1000, learning_rate=0.1)
    w, g = {"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([30.0, 40.0])}
    state = optimizer.init(w)
    _, state = optimizer.update(g, state, w)  # rate 0
    updates, _ = optimizer.update(g, state, w)
    clipped = np.array([0.6, 0.8])
    rate = float(adamw(1000, learning_rate=0.1).schedule(1))
    np.testing.assert_allclose(updates["w"], -rate * clipped / (np.abs(clipped) + 1e-8), rtol=1e-4)
    assert optax.global_norm(updates) > 0
