"""Spatial embedding adaption: exact where it must be, periodic where it must be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatialvla_jax.actions import PRETRAIN_GAUSSIANS, adapt_embeddings, gaussian_grid, uniform_grid
from spatialvla_jax.actions.grid import bin_centers
from spatialvla_jax.errors import InputError

SMALL = (5, 7, 3, 4, 4, 6)
MOVED = gaussian_grid(np.array(PRETRAIN_GAUSSIANS) * [1, 0.7] + [0.15, 0], min_sigma=0)


def centers(grid) -> tuple[np.ndarray, np.ndarray]:
    """Centres of the translation [n, 3] and rotation [m, 3] ids, f64."""
    middles = [np.asarray(bin_centers(edges), np.float64) for edges in grid.edges]
    cells = (np.stack(np.meshgrid(*part, indexing="ij"), -1).reshape(-1, 3) for part in (middles[:3], middles[3:]))
    translation, rotation = cells
    return translation, rotation


def linear_table(grid, seed: int = 0, width: int = 5) -> np.ndarray:
    """A table linear in the centres, its gripper rows two constants."""
    rng = np.random.default_rng(seed)
    parts = [c @ rng.normal(size=(3, width)) + rng.normal(size=width) for c in centers(grid)]
    return np.concatenate([*parts, np.full((1, width), 7.0), np.full((1, width), -7.0)]).astype(np.float32)


def across_seam(old, new) -> np.ndarray:
    """bool[V_new]: translation ids whose phi lies beyond the old grid's outermost centres."""
    phi = np.asarray(bin_centers(old.phi))
    where = centers(new)[0][:, 1]
    outside = (where < phi[0]) | (where > phi[-1])
    return np.concatenate([outside, np.zeros(new.vocab_size - len(outside), bool)])


@st.composite
def small_grids(draw):
    bins = draw(st.sampled_from([SMALL, (2, 9, 4, 5, 2, 2)]))
    if draw(st.booleans()):
        return uniform_grid(bins)
    stats = draw(st.lists(st.tuples(st.floats(-1.5, 2.5), st.floats(0.2, 2.0)), min_size=6, max_size=6))
    return gaussian_grid(stats, bins, 0.0)


@settings(max_examples=30, deadline=None)
@given(small_grids(), small_grids())
def test_exact_on_linear_tables(old, new):
    """Covers the extrapolation beyond the outermost centres of every axis. The seam is the one exception."""
    adapted = np.asarray(adapt_embeddings(old, new, linear_table(old)))
    expected, seam = linear_table(new), across_seam(old, new)
    # float32 rows and weights: the error grows with the extrapolation, which is below one spacing of each axis
    np.testing.assert_allclose(adapted[~seam], expected[~seam], atol=3e-4)
    np.testing.assert_array_equal(adapted[-2:], expected[-2:])


def test_exact_at_full_size_between_published_grids():
    old = gaussian_grid(PRETRAIN_GAUSSIANS)
    for new in (MOVED, uniform_grid(), gaussian_grid(PRETRAIN_GAUSSIANS, SMALL)):
        seam = across_seam(old, new)
        np.testing.assert_allclose(
            np.asarray(adapt_embeddings(old, new, linear_table(old)))[~seam], linear_table(new)[~seam], atol=2e-5
        )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("grid", [MOVED, uniform_grid(SMALL), uniform_grid((1, 3, 1, 2, 1, 1))])
def test_identity(grid, dtype):
    table = jax.random.normal(jax.random.key(0), (grid.vocab_size, 3), dtype)
    adapted = adapt_embeddings(grid, grid, table)
    assert adapted.dtype == dtype
    np.testing.assert_array_equal(adapted.astype(jnp.float32), table.astype(jnp.float32))


def test_rows_between_centres_are_mixtures():
    """Trilinear by hand for one cell: halfway between two centres in each of theta, phi and r."""
    old, new = uniform_grid((4, 8, 4, 2, 2, 2)), uniform_grid((2, 4, 2, 1, 1, 1))
    table = np.random.default_rng(0).normal(size=(old.vocab_size, 6)).astype(np.float32)
    adapted = np.asarray(adapt_embeddings(old, new, table))
    cells = table[:128].reshape(4, 8, 4, 6)
    expected = cells.reshape(2, 2, 4, 2, 2, 2, 6).mean((1, 3, 5)).reshape(16, 6)
    np.testing.assert_allclose(adapted[:16], expected, atol=1e-6)
    np.testing.assert_allclose(adapted[16], table[128:136].mean(0), atol=1e-6)
    np.testing.assert_array_equal(adapted[17:], table[136:])


def test_phi_is_a_circle():
    """Shifting every phi edge of a uniform circle by half a bin makes the first centre the middle of last and first."""
    old = uniform_grid((1, 8, 1, 1, 1, 1))
    # Halves of the old bins: the new first and last centres lie beyond the old outermost ones.
    new = uniform_grid((1, 16, 1, 1, 1, 1))
    table = np.random.default_rng(0).normal(size=(old.vocab_size, 4)).astype(np.float32)
    adapted = np.asarray(adapt_embeddings(old, new, table))[:16]
    rows = table[:8]
    np.testing.assert_allclose(adapted[0], 0.75 * rows[0] + 0.25 * rows[7], atol=1e-5)
    np.testing.assert_allclose(adapted[15], 0.75 * rows[7] + 0.25 * rows[0], atol=1e-5)
    np.testing.assert_allclose(adapted[1], 0.75 * rows[0] + 0.25 * rows[1], atol=1e-5)

    # Rotating the table by one bin rotates the result by two: no angle is special.
    turned = np.concatenate([np.roll(rows, 1, 0), table[8:]])
    np.testing.assert_allclose(np.asarray(adapt_embeddings(old, new, turned))[:16], np.roll(adapted, 2, 0), atol=1e-5)


def test_poles_borders_and_seam_of_a_smooth_field():
    """A smooth table of Cartesian centres: the error is of second order, also in the outermost cells."""

    def cartesian(grid):
        theta, phi, r = centers(grid)[0].T
        return np.stack([r * np.sin(theta) * np.cos(phi), r * np.sin(theta) * np.sin(phi), r * np.cos(theta)], -1)

    def worst(factor):
        old = uniform_grid((8 * factor, 16 * factor, 4 * factor, 1, 1, 1))
        new = uniform_grid((12 * factor, 20 * factor, 6 * factor, 1, 1, 1))
        table = np.concatenate([cartesian(old), np.zeros((3, 3))]).astype(np.float32)
        error = np.asarray(adapt_embeddings(old, new, table))[:-3] - cartesian(new)
        cells = np.abs(error).reshape(*new.num_bins[:3], 3)
        return np.array([cells.max(), cells[0].max(), cells[-1].max(), cells[:, [0, -1]].max(), cells[:, :, -1].max()])

    coarse, fine = worst(1), worst(2)
    assert (coarse < 0.06).all()
    assert (fine < coarse / 3).all()


def test_independence_of_phi_survives_at_the_poles():
    old, new = gaussian_grid(PRETRAIN_GAUSSIANS), MOVED
    theta, _, r = centers(old)[0].T
    table = np.zeros((old.vocab_size, 2), np.float32)
    table[:4096] = np.stack([np.cos(theta), r], -1)
    adapted = np.asarray(adapt_embeddings(old, new, table))[:4096].reshape(16, 32, 8, 2)
    np.testing.assert_allclose(adapted, np.broadcast_to(adapted[:, :1], adapted.shape), atol=1e-5)


def test_bins_of_one_are_constant():
    old, new = uniform_grid((1, 1, 1, 1, 1, 1)), uniform_grid((3, 4, 2, 2, 2, 2))
    table = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    adapted = np.asarray(adapt_embeddings(old, new, table))
    np.testing.assert_allclose(adapted, table[[0] * 24 + [1] * 8 + [2, 3]], atol=1e-5)
    shrunk = np.asarray(adapt_embeddings(new, old, linear_table(new)))
    np.testing.assert_allclose(shrunk, linear_table(old), atol=1e-5)


def test_the_work_is_proportional_to_the_table():
    """Eight products and seven sums a number; a product with a weight matrix would cost thousands."""
    table = jax.ShapeDtypeStruct((8194, 2304), jnp.float32)
    adapt = jax.jit(lambda table: adapt_embeddings(gaussian_grid(PRETRAIN_GAUSSIANS), MOVED, table))
    cost = adapt.lower(table).compile().cost_analysis()
    assert 8 < cost["flops"] / (8194 * 2304) < 20


def test_another_table_is_refused():
    grid = uniform_grid(SMALL)
    with pytest.raises(InputError, match="has 10 rows"):
        adapt_embeddings(grid, grid, jnp.ones((10, 3)))
