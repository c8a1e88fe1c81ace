import functools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from spatialvla_jax.data.sketch import ActionSummary, Moments, Quantiles
from spatialvla_jax.data.statistics import action_statistics

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
columns = arrays(np.float32, st.integers(1, 60), elements=floats)
Q = (0.0, 0.01, 0.3, 0.5, 0.99, 1.0)


def same(a: Quantiles, b: Quantiles) -> bool:
    return a.shift == b.shift and np.array_equal(a.keys, b.keys) and np.array_equal(a.counts, b.counts)


def order_statistics(sketch: Quantiles, count: int) -> np.ndarray:
    """Every rank's number: at whole ranks nothing is interpolated."""
    return sketch.quantiles(np.arange(count) / max(count - 1, 1))


def adversarial(kind: str, count: int = 5000) -> np.ndarray:
    rng = np.random.default_rng(0)
    values = {
        "every exponent": lambda: rng.choice([-1, 1], count) * np.exp2(rng.uniform(-149, 127.9, count)),
        "bit patterns": lambda: rng.integers(0, 2**31, count, np.int32).view(np.float32),
        "neighbours": lambda: (np.float32(1).view(np.int32) + rng.permutation(count).astype(np.int32)).view(np.float32),
        "subnormal": lambda: rng.integers(-(2**20), 2**20, count) * 2.0**-149,
        "heavy tail": lambda: rng.standard_cauchy(count) ** 5,
        "two far clusters": lambda: np.where(rng.random(count) < 0.01, 3e38, rng.normal(size=count) * 1e-30),
        "around zero": lambda: rng.normal(size=count) * 1e-3,
    }[kind]()
    values = values.astype(np.float32)
    return np.where(np.isfinite(values), values, np.float32(0))


KINDS = ("every exponent", "bit patterns", "neighbours", "subnormal", "heavy tail", "two far clusters", "around zero")


@given(columns)
def test_quantiles_equal_numpy_while_exact(values):
    sketch = Quantiles.of(values)
    assert sketch.relative_error == 0
    with np.errstate(over="ignore", invalid="ignore"):  # both subtract in float32
        np.testing.assert_array_equal(sketch.quantiles(Q), np.quantile(values, Q))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [512, 1000])
def test_error_bound(kind, limit):
    values = adversarial(kind)
    sketch = Quantiles.of(values, limit)
    exact = np.sort(values.astype(np.float64))
    assert len(sketch.keys) <= limit < len(np.unique(values)) and sketch.counts.sum() == len(values)
    error = np.abs(order_statistics(sketch, len(values)) - exact)
    assert 0 < sketch.relative_error <= 2.0**-1
    assert (error <= sketch.relative_error * np.maximum(np.abs(exact), 2.0**-126)).all()
    # No coarser than it must be.
    finer = (np.unique(values + np.float32(0)).view(np.int32)) >> (sketch.shift - 1)
    assert len(np.unique(finer)) > limit


def test_error_bound_is_reached():
    """Two neighbouring keys' worth of floats at the bottom of their exponent: the first is off by just the bound."""
    values = (np.float32(1).view(np.int32) + np.arange(1024, dtype=np.int32)).view(np.float32)
    sketch = Quantiles.of(values, 512)
    assert sketch.shift == 1 and sketch.quantiles([0])[0] - 1 == sketch.relative_error == 2.0**-23


def test_full_size_bound():
    """Over a million distinct numbers: what the published bound, 2^-12, is made of."""
    values = np.random.default_rng(0).integers(-(2**31), 2**31, 3 * 2**20, np.int64).astype(np.int32).view(np.float32)
    values = values[np.isfinite(values)]
    sketch = Quantiles.merge([Quantiles.of(part) for part in np.array_split(values, 3)])
    exact = np.quantile(values.astype(np.float64), [0.01, 0.25, 0.75, 0.99])
    assert len(sketch.keys) <= 2**20 and 0 < sketch.relative_error <= 2.0**-12
    assert (np.abs(sketch.quantiles([0.01, 0.25, 0.75, 0.99]) / exact - 1) <= sketch.relative_error).all()


@given(
    st.sampled_from(KINDS),
    st.lists(st.integers(1, 1500), min_size=1, max_size=6),
    st.integers(0, 99),
)
@settings(max_examples=60)
def test_any_merge_order_gives_the_same_bits(kind, sizes, seed):
    values = adversarial(kind)[: sum(sizes)]
    parts = [Quantiles.of(part, 512) for part in np.split(values, np.cumsum(sizes)[:-1])]
    shuffled = random.Random(seed).sample(parts, len(parts))
    left = functools.reduce(lambda a, b: Quantiles.merge([a, b], 512), shuffled)
    right = functools.reduce(lambda a, b: Quantiles.merge([b, a], 512), reversed(shuffled))
    whole = Quantiles.of(np.random.default_rng(seed).permutation(values), 512)
    assert same(left, whole) and same(right, whole) and same(Quantiles.merge(shuffled, 512), whole)


def test_zeros_of_both_signs_are_one_number():
    sketch = Quantiles.of(np.asarray([-0.0, 0.0, -0.0], np.float32))
    assert sketch.keys.tolist() == [0] and sketch.counts.tolist() == [3]


@given(arrays(np.float32, st.tuples(st.integers(1, 40), st.just(2)), elements=floats), st.integers(0, 40))
def test_moments_are_exact(values, cut):
    from fractions import Fraction

    moments = Moments.merge([Moments.of(values[cut:]), Moments.of(values[:cut])])
    assert moments == Moments.of(values[::-1])
    for column, total, square in zip(values.T, moments.sums, moments.squares, strict=True):
        assert Fraction(total, 2**172) == sum(map(Fraction, column.tolist()))
        assert Fraction(square, 2**344) == sum(Fraction(x) ** 2 for x in column.tolist())


def test_moments_against_numpy_where_numpy_is_hard_pressed():
    """A million values far from zero with little spread."""
    values = np.random.default_rng(0).normal(1000, 1e-3, (1_000_000, 1)).astype(np.float32)
    mean, std = Moments.of(values).mean_std()
    np.testing.assert_allclose(mean, values.mean(0, dtype=np.float64), rtol=1e-14)
    np.testing.assert_allclose(std, values.std(0, dtype=np.float64), rtol=1e-10)


@given(st.integers(0, 1000), st.integers(1, 400), st.integers(1, 5))
@settings(max_examples=40)
def test_statistics_equal_those_in_memory(seed, count, pieces):
    rng = np.random.default_rng(seed)
    actions = (rng.normal(size=(count, 7)) * [1, 1e-3, 50, 1, 0, 1, 1] + [0, 1, 0, 0, 0.25, 0, 0]).astype(np.float32)
    actions[:, 6] = rng.integers(0, 2, count)
    parts = [ActionSummary.of(part, number) for number, part in enumerate(np.array_split(actions, pieces))]
    summary = ActionSummary.merge(parts)
    got, expected = summary.statistics(), action_statistics(actions, sum(range(pieces)))
    assert summary.quantile_error == 0
    for row in ("q01", "q99", "min", "max", "mask"):
        assert got["action"].pop(row) == expected["action"].pop(row)
    for row in ("mean", "std"):
        np.testing.assert_allclose(got["action"].pop(row), expected["action"].pop(row), rtol=1e-12, atol=1e-14)
    assert got == expected
