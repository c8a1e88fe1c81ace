import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatialvla_jax.actions import fit_gaussians, grid_variables
from spatialvla_jax.actions.normalization import normalize, unnormalize
from spatialvla_jax.data.oxe import DatasetSpec
from spatialvla_jax.data.statistics import action_statistics, find_oddities


def some_actions(count=500, seed=0):
    rng = np.random.default_rng(seed)
    actions = rng.normal(size=(count, 7)) * [1, 0.1, 5, 1, 1, 1, 1] + [0, 1, 0, 0, 0, 0, 0]
    actions[:, 4] = 0.25
    actions[:, 6] = rng.integers(0, 2, count)
    return actions.astype(np.float32)


def test_statistics_by_hand():
    actions = np.zeros((101, 7), np.float32)
    actions[:, 0] = np.arange(101)
    entry = action_statistics(actions, num_trajectories=3)
    rows = entry["action"]
    assert (rows["q01"][0], rows["q99"][0], rows["min"][0], rows["max"][0], rows["mean"][0]) == (1, 99, 0, 100, 50)
    assert rows["std"][0] == pytest.approx(np.sqrt((101**2 - 1) / 12))
    assert rows["mask"] == [True] * 6 + [False]
    assert (entry["num_transitions"], entry["num_trajectories"]) == (101, 3)
    assert set(rows) == {"mean", "std", "max", "min", "q01", "q99", "mask"}


def test_sums_in_parts_have_the_bits_of_numpy():
    """Statistics and Gaussians of more rows than one block holds."""
    actions = np.concatenate([some_actions(100_000, seed) for seed in range(3)])
    entry = action_statistics(actions, 1)
    rows = entry["action"]
    assert rows["mean"] == actions.mean(0, dtype=np.float64).tolist()
    assert rows["std"] == actions.std(0, dtype=np.float64).tolist()
    assert [rows["q01"][:6], rows["q99"][:6]] == np.quantile(actions, (0.01, 0.99), axis=0)[:, :6].tolist()
    normalized = normalize(actions, rows)
    values = grid_variables(normalized)
    expected = np.stack([values.mean(0, dtype=np.float64), values.std(0, dtype=np.float64)], -1)
    np.testing.assert_array_equal(fit_gaussians(normalized), expected)


def test_normalize_by_hand():
    rows = action_statistics(some_actions(), 1)["action"]
    rows |= {"q01": [-1.0, *rows["q01"][1:]], "q99": [3.0, *rows["q99"][1:]]}
    actions = np.zeros((4, 7), np.float32)
    actions[:, 0], actions[:, 6] = [-1, 1, 3, 99], [0, 1, 0.3, 7]
    normalized = normalize(actions, rows)
    np.testing.assert_allclose(normalized[:, 0], [-1, 0, 1, 1], atol=1e-6)
    np.testing.assert_array_equal(normalized[:, 6], actions[:, 6])  # the gripper is unchanged
    np.testing.assert_array_equal(normalized[:, 4], 0)  # a constant dimension
    assert normalized.dtype == np.float32


# (values of one dimension in 1,000 frames, its bounds if they are not the quantiles)
SPARSE = {
    "one side, 98.9 %": (np.append(np.zeros(989), np.linspace(0.1, 0.9, 11)), (0.0, 0.9)),
    "both sides, 98.5 %": (np.append(np.full(985, 0.25), [-0.5] * 7 + [0.75] * 8), (-0.5, 0.75)),
    "99.5 %": (np.append(np.zeros(995), [0.5] * 5), (0.0, 0.5)),
    "noise of rounding": (np.append(1e-9 * np.arange(995), [-0.5] * 5), (-0.5, 994e-9)),
    "constant": (np.full(1000, 0.25), None),
    "97.5 %": (np.append(np.zeros(975), np.linspace(-1, 1, 25)), None),
    "an outlier": (np.append(np.linspace(-1, 1, 999), 1e4), None),
}


@pytest.mark.parametrize("case", SPARSE)
def test_dimension_that_is_nearly_constant(case):
    """It is scaled by minimum and maximum and named in a warning: every value survives."""
    values, bounds = SPARSE[case]
    actions = np.zeros((1000, 7), np.float32)
    actions[:, 0], actions[:, 4], actions[:, 6] = (
        np.linspace(-1, 1, 1000),
        values,
        np.arange(1000) % 100 == 0,
    )  # gripper
    entry = action_statistics(actions, 3)
    rows = entry["action"]
    found = rows["q01"][4], rows["q99"][4]
    assert entry.get("full_range", []) == (["pitch"] if bounds else [])
    assert (rows["q01"][6], rows["q99"][6]) == tuple(np.quantile(actions[:, 6], (0.01, 0.99)))
    if bounds:
        np.testing.assert_allclose(found, bounds, rtol=1e-6)
        np.testing.assert_allclose(unnormalize(normalize(actions, rows), rows)[:, 4], values, atol=1e-6)
        (sentence,) = find_oddities("toy", entry, DatasetSpec())
        assert "'toy'" in sentence and "pitch" in sentence and "minimum and maximum" in sentence
    else:
        np.testing.assert_array_equal(found, np.quantile(actions[:, 4], (0.01, 0.99)))


@pytest.mark.parametrize(
    ("values", "last", "message"),
    [
        ((0, 1), "action", ""),
        ((0.2, 0.5), "action", ""),
        ((0.5, 1), "action", "never crosses 0.5 .*: it goes from 0.5 to 1"),
        ((0, 0), "action", "never crosses 0.5 .*: it goes from 0 to 0"),
        ((1, 1), 1.0, ""),  # the spec says so
    ],
)
def test_gripper_that_does_nothing(values, last, message):
    actions = some_actions()
    actions[:, 6] = np.resize(values, len(actions))
    found = find_oddities("toy", action_statistics(actions, 1), DatasetSpec(action=("action[:6]", last)))
    assert len(found) == bool(message) and re.search(message, "".join(found))


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_round_trip(seed):
    """unnormalize(normalize(x)) is x clipped to its quantiles."""
    actions = some_actions(seed=seed)
    rows = action_statistics(actions, 1)["action"]
    back = unnormalize(normalize(actions, rows), rows)
    low, high = np.asarray(rows["q01"]), np.asarray(rows["q99"])
    expected = np.where(rows["mask"], np.clip(actions, low, high), actions)
    np.testing.assert_allclose(back, expected, atol=1e-5)
    assert np.abs(normalize(actions, rows)[:, :6]).max() <= 1


def test_rows_may_differ_by_sample():
    actions = some_actions(2)
    rows = [action_statistics(some_actions(seed=s), 1)["action"] for s in (1, 2)]
    together = normalize(actions, {key: np.asarray([row[key] for row in rows]) for key in rows[0]})
    np.testing.assert_array_equal(together, [normalize(a, r) for a, r in zip(actions, rows, strict=True)])
