"""Steps that are skipped, averaged parameters, dtypes of the state, norms."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.batches import GRID, assert_equal, random_batch

from spatialvla_jax.batch import Batch
from spatialvla_jax.config import default_config
from spatialvla_jax.errors import InputError
from spatialvla_jax.models import SpatialVLA, preset
from spatialvla_jax.training.optimizer import (
    learning_rate,
    make_optimizer,
    num_updates,
    split_frozen,
    swap_ema,
    update_norms,
)
from spatialvla_jax.training.state import TrainState, init_params, new_state
from spatialvla_jax.training.step import by_dataset, make_train_step

FROZEN = ("llm/embedder",)


@pytest.fixture(scope="module")
def run():
    """A function: batches → states and metrics after each step."""
    model = SpatialVLA(preset("nano", spatial_tokens=GRID.vocab_size))
    config = default_config().optimizer
    config.learning_rate, config.warmup, config.ema, config.weight_decay = 1e-3, 0.0, 0.9, 0.1
    optimizer = make_optimizer(config, 10)
    step = jax.jit(
        make_train_step(
            model,
            optimizer,
            schedule=learning_rate(config, 10),
            frozen=FROZEN,
            augmentation=None,
            grad_accum_steps=1,
            num_datasets=3,
        )
    )

    def run(batches: list[Batch]) -> list[tuple[TrainState, dict[str, Any]]]:
        state, results = new_state(init_params(model, 0), optimizer, FROZEN), []
        for batch in batches:
            state, metrics = step(state, batch, GRID, 0)
            results.append((state, metrics))
        return results

    return model, config, run


def test_a_step_that_is_not_finite_changes_nothing_but_the_count(run) -> None:
    model, _, run = run
    good = [replace(random_batch(model, 4, n), dataset_id=np.array([0, 2, 0, 0], np.int32)) for n in range(3)]
    bad = replace(good[0], depth=good[0].depth * np.float32(np.nan))
    plain, skipping = run(good), run([good[0], bad, good[1], bad, good[2]])
    assert [int(m["skipped"]) for _, m in skipping] == [0, 1, 1, 2, 2]
    assert [int(s.step) for s, _ in skipping] == [1, 2, 3, 4, 5]
    assert np.isnan(skipping[1][1]["loss"]) and np.isnan(skipping[1][1]["gradient_norm"])
    for n, (state, metrics) in zip((0, 2, 4), plain, strict=True):
        for mine in (skipping[n][0], skipping[min(n + 1, 4)][0]):
            assert_equal((mine.params, mine.opt_state), (state.params, state.opt_state))
        assert skipping[n][1]["learning_rate"] == metrics["learning_rate"]


def test_norms_are_those_of_the_gradient_and_of_the_update(run) -> None:
    """The update's is made again from the state alone; here it is the difference of the parameters."""
    model, config, run = run
    batch = replace(random_batch(model, 4, 0), dataset_id=np.array([0, 2, 0, 0], np.int32))
    (before, _), (state, metrics) = run([batch, batch])
    old, new = (split_frozen(s.params, FROZEN)[0] for s in (before, state))
    norms = update_norms(config, 10, new, state.opt_state)
    moved = jax.tree.map(lambda a, b: b - a, old, new)
    assert set(norms) == {"update_norm", *(f"update_norm/{part}" for part in old)}
    np.testing.assert_allclose(norms["update_norm"], optax.global_norm(moved), rtol=1e-3)
    for part in old:
        np.testing.assert_allclose(norms[f"update_norm/{part}"], optax.global_norm(moved[part]), rtol=1e-3)
    squares = sum(float(metrics[f"gradient_norm/{part}"]) ** 2 for part in old)
    np.testing.assert_allclose(squares, float(metrics["gradient_norm"]) ** 2, rtol=1e-5)
    counts, losses, _ = metrics["datasets"].T
    assert counts.tolist() == [3, 0, 1] and losses[1] == 0
    np.testing.assert_allclose(losses.sum() / 4, metrics["loss"], rtol=1e-6)


def test_by_dataset() -> None:
    metrics = {"loss": jnp.array([1.0, 2.0, jnp.nan, 5.0]), "accuracy": jnp.array([0.0, 1.0, 0.5, 1.0])}
    sums = by_dataset(metrics, jnp.array([1, 1, -1, 0]), 3)["datasets"]
    np.testing.assert_array_equal(sums, [[1, 5, 1], [2, 3, 1], [0, 0, 0]])


def test_averaged_parameters() -> None:
    config = default_config().optimizer
    config.ema, config.learning_rate, config.warmup = 0.75, 0.1, 0.0
    optimizer = make_optimizer(config, 100)
    params: Any = {"w": jnp.array([1.0, -2.0]), "frozen": jnp.ones(2)}
    trainable, _ = split_frozen(params, ("frozen",))
    state, average = optimizer.init(trainable), trainable["w"]
    for n in range(3):
        updates, state = optimizer.update({"w": jnp.array([n + 1.0, -1.0])}, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        average = 0.75 * average + 0.25 * trainable["w"]
    assert int(num_updates(state)) == 3 and not np.allclose(average, trainable["w"])
    params |= trainable
    for_use, held = swap_ema(params, state)
    np.testing.assert_allclose(for_use["w"], average, rtol=1e-6)
    np.testing.assert_array_equal(for_use["frozen"], params["frozen"])
    assert_equal(swap_ema(for_use, held), (params, state))


def test_first_moments_in_bfloat16() -> None:
    config = default_config().optimizer
    params: Any = {"w": jnp.ones(3)}
    moments = {}
    for dtype in ("float32", "bfloat16"):
        config.mu_dtype = dtype
        adam: Any = make_optimizer(config, 10).init(params)[1][0]
        moments[dtype] = (adam.mu["w"].dtype, adam.nu["w"].dtype)
    assert moments == {"float32": (jnp.float32, jnp.float32), "bfloat16": (jnp.bfloat16, jnp.float32)}
    config.mu_dtype = "float16"
    with pytest.raises(InputError, match="mu_dtype 'float16' must be"):
        make_optimizer(config, 10)
    config.update(mu_dtype="float32", ema=1.0)
    with pytest.raises(InputError, match=r"ema 1\.0 must be"):
        make_optimizer(config, 10)
