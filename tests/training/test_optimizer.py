"""Steps that are skipped, averaged parameters, dtypes of the state, norms."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.batches import GRID, assert_equal, random_batch
from helpers.setups import FROZEN, optimizer_of, setup_of

from spatialvla_jax.batch import Batch
from spatialvla_jax.config import load_config
from spatialvla_jax.errors import InputError
from spatialvla_jax.training.optimizer import (
    adam_state,
    num_updates,
    split_frozen,
    swap_ema,
    update_if_finite,
    update_norms,
)
from spatialvla_jax.training.state import TrainState, init_params, new_state
from spatialvla_jax.training.step import by_dataset, make_train_step


@pytest.fixture(scope="module")
def run():
    """A function: batches → states and metrics after each step."""
    setup = setup_of(train={"steps": 10}, learning_rate=1e-3, warmup=0.0, ema=0.9, weight_decay=0.1)
    step, start = jax.jit(make_train_step(setup)), new_state(setup, init_params(setup.model, 0))

    def run(batches: list[Batch]) -> list[tuple[TrainState, dict[str, Any]]]:
        state, results = start, []
        for batch in batches:
            state, metrics = step(state, batch, GRID, setup.scalars)
            results.append((state, metrics))
        return results

    return setup, run


def test_a_step_that_is_not_finite_changes_nothing_but_the_count(run) -> None:
    setup, run = run
    good = [replace(random_batch(setup.model, 4, n), dataset_id=np.array([0, 2, 0, 0], np.int32)) for n in range(3)]
    bad = replace(good[0], depth=good[0].depth * np.float32(np.nan))
    plain, skipping = run(good), run([good[0], bad, good[1], bad, good[2]])
    assert [int(m["skipped"]) for _, m in skipping] == [0, 1, 1, 2, 2]
    assert [int(s.step) for s, _ in skipping] == [1, 2, 3, 4, 5]
    assert np.isnan(skipping[1][1]["loss"]) and np.isnan(skipping[1][1]["gradient_norm"])
    for n, (state, metrics) in zip((0, 2, 4), plain, strict=True):
        for skipped in (skipping[n][0], skipping[min(n + 1, 4)][0]):
            assert_equal((skipped.params, skipped.opt_state), (state.params, state.opt_state))
        assert skipping[n][1]["learning_rate"] == metrics["learning_rate"]


def test_norms_are_those_of_the_gradient_and_of_the_update(run) -> None:
    """The update's norm is recomputed from the state alone; here it is the difference of the parameters."""
    setup, run = run
    batch = replace(random_batch(setup.model, 4, 0), dataset_id=np.array([0, 2, 0, 0], np.int32))
    (before, _), (state, metrics) = run([batch, batch])
    old, new = (split_frozen(s.params, FROZEN)[0] for s in (before, state))
    norms = jax.jit(partial(update_norms, setup.adamw, setup.adamw.schedule))(new, state.opt_state)
    moved, global_norm = jax.tree.map(lambda a, b: np.asarray(b) - a, old, new), jax.jit(optax.global_norm)
    assert set(norms) == {"update_norm", *(f"update_norm/{part}" for part in old)}
    np.testing.assert_allclose(norms["update_norm"], global_norm(moved), rtol=1e-3)
    for part in old:
        np.testing.assert_allclose(norms[f"update_norm/{part}"], global_norm(moved[part]), rtol=1e-3)
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
    optimizer = optimizer_of(100, ema=0.75, learning_rate=0.1, warmup=0.0)
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
    params: Any = {"w": jnp.ones(3)}
    for dtype in ("float32", "bfloat16"):
        adam = adam_state(optimizer_of(10, mu_dtype=dtype).init(params))
        assert (adam.mu["w"].dtype, adam.nu["w"].dtype) == (dtype, "float32")  # pyright: ignore
    for key, value in (("mu_dtype", "float16"), ("ema", "1.0")):
        with pytest.raises(InputError, match=rf"optimizer\.{key}='?{value}"):
            load_config("demo", {f"optimizer.{key}": value})


BAD = {
    "a loss that is not finite, with finite gradients": (np.nan, 1.0, 1),
    "a norm that overflows": (1.0, 1e30, 1),
    "more bad steps in a row than optax skips": (1.0, np.nan, 4),
}


@pytest.mark.parametrize(("loss", "gradient", "times"), BAD.values(), ids=BAD)
def test_what_optax_would_not_skip(loss: float, gradient: float, times: int) -> None:
    """Ours changes nothing; `optax.apply_if_finite` changes the parameters, which is why we do not use it."""
    optimizer = optimizer_of(100, learning_rate=0.1, warmup=0.0)
    theirs = optax.apply_if_finite(optimizer, max_consecutive_errors=3)
    start: Any = {"w": jnp.array([1.0, -2.0])}
    good, bad = {"w": jnp.array([0.5, 1.0])}, {"w": jnp.full(2, gradient, jnp.float32)}
    results = []
    for transformation, ours in ((optimizer, True), (theirs, False)):
        params, state = start, transformation.init(start)
        for grads in (good, good):  # the first step's rate is 0
            updates, state = transformation.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        before = params, state
        for _ in range(times):
            if ours:
                norm = optax.global_norm(bad)
                params, state = update_if_finite(
                    transformation, bad, state, params, loss=jnp.float32(loss), gradient_norm=norm
                )
            else:
                updates, state = transformation.update(bad, state, params)
                params = optax.apply_updates(params, updates)
        results.append((before, (params, state)))
    (ours_before, ours_after), (theirs_before, theirs_after) = results
    assert jax.tree.all(jax.tree.map(np.array_equal, ours_before, ours_after))
    assert not np.array_equal(theirs_before[0]["w"], theirs_after[0]["w"])
