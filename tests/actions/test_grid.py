"""Grids against the published implementation, and properties that hold for every grid."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spatialvla_jax.actions import (
    PRESET_BINS,
    PRETRAIN_GAUSSIANS,
    ActionGrid,
    LinearGrid,
    decode,
    encode,
    fit_gaussians,
    gaussian_grid,
    grid_from_dict,
    linear_grid,
    uniform_grid,
)
from spatialvla_jax.actions.grid import RANGES, VARIABLES, bin_centers, to_spherical
from spatialvla_jax.errors import InputError

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(path.name for path in GOLDEN.glob("grid_*.npz") if "linear" not in path.name)

# Compiled once per set of bin counts, so few of these and many edges.
BINS = [(16, 32, 8, 16, 16, 16), (3, 5, 2, 4, 1, 2), (1, 1, 1, 1, 1, 1)]
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
UNIT = st.floats(-1, 1, width=32)


def golden_grid(golden) -> ActionGrid:
    if "gaussian" not in golden:
        return uniform_grid(golden["num_bins"])
    return gaussian_grid(golden["gaussian"], golden["num_bins"], float(golden["min_sigma"]))


def bins_of(grid, ids) -> np.ndarray:
    """The six bin numbers of [n, 3] ids."""
    translation, rotation = np.asarray(ids[:, 0]), np.asarray(ids[:, 1]) - grid.token_ranges[1][0]
    return np.stack(
        [*np.unravel_index(translation, grid.num_bins[:3]), *np.unravel_index(rotation, grid.num_bins[3:])], -1
    )


def six_values(actions) -> np.ndarray:
    """theta, phi, r, roll, pitch, yaw in float64."""
    x, y, z, *angles = np.clip(np.asarray(actions, np.float64), -1, 1).T[:6]
    r = np.sqrt(x**2 + y**2 + z**2)
    return np.stack([np.arctan2(np.hypot(x, y), z), np.arctan2(y, x), r, *angles], -1)


def grids(num_bins=None):
    sigma = st.sampled_from([0.0, 1e-30, 1e-6, 1e-3]) | st.floats(0, 3)
    mu = st.floats(-4, 4) | st.sampled_from([-1e30, -1e3, 1e3, 1e30])
    stats = st.lists(st.tuples(mu, sigma), min_size=6, max_size=6)
    bins = st.sampled_from(BINS) if num_bins is None else st.just(num_bins)
    return st.builds(gaussian_grid, stats, bins, st.sampled_from([0.0, 0.5])) | st.builds(uniform_grid, bins)


@pytest.mark.parametrize("name", FILES)
def test_golden(name):
    golden = np.load(GOLDEN / name)
    grid = golden_grid(golden)
    assert grid.num_bins == tuple(golden["num_bins"])
    for variable, edges in zip(VARIABLES, grid.edges, strict=True):
        assert edges.dtype == jnp.float32
        np.testing.assert_allclose(edges, golden[f"edges_{variable}"], rtol=0, atol=1e-6)

    ids = np.asarray(encode(grid, golden["actions"]))
    values = six_values(golden["actions"])
    near_edge = np.zeros(len(ids), bool)
    for i, variable in enumerate(VARIABLES):
        near_edge |= (np.abs(values[:, i, None] - golden[f"edges_{variable}"][1:-1]) < 1e-6).any(-1)
    assert near_edge.mean() < 0.05  # the seam stays the only exception: the ends of the ranges need none
    np.testing.assert_array_equal(ids[~near_edge], golden["ids"][~near_edge])
    # On an edge the id is still that of a bin that touches it.
    here, there = bins_of(grid, ids)[near_edge], bins_of(grid, golden["ids"])[near_edge]
    gap = np.abs(here - there)
    gap[:, 1] = np.minimum(gap[:, 1], grid.num_bins[1] - gap[:, 1])
    assert (gap <= 1).all()
    np.testing.assert_array_equal(ids[:, 2], golden["ids"][:, 2])

    np.testing.assert_allclose(decode(grid, golden["ids"]), golden["decoded"], rtol=0, atol=1e-5)


def test_golden_special_cases():
    """Origin, poles, both sides of the seam and the cube's corners give equal ids, even at the end of a range."""
    golden = np.load(GOLDEN / "grid_spatialvla_plus_sigma0.5_8194.npz")
    ids = encode(golden_grid(golden), golden["actions"][512:526])
    np.testing.assert_array_equal(ids, golden["ids"][512:526])


@pytest.mark.parametrize("total", PRESET_BINS)
def test_presets(total):
    grid = gaussian_grid(PRETRAIN_GAUSSIANS, PRESET_BINS[total])
    assert grid.vocab_size == total
    assert grid.token_ranges[-1] == (total - 2, 2)
    assert uniform_grid(PRESET_BINS[total]).vocab_size == total


def test_pretrain_gaussians_are_the_published_ones():
    golden = np.load(GOLDEN / "grid_spatialvla_plus_sigma0.5_8194.npz")
    np.testing.assert_array_equal(PRETRAIN_GAUSSIANS, golden["gaussian"])


@settings(max_examples=60, deadline=None)
@given(grids())
def test_edges_increase_over_the_whole_range(grid):
    for edges, (low, high) in zip(grid.edges, RANGES, strict=True):
        edges = np.asarray(edges)
        assert edges[0] == np.float32(low) and edges[-1] == np.float32(high)
        assert (np.diff(edges) > 0).all()
        centers = np.asarray(bin_centers(edges))
        assert (edges[:-1] < centers).all() and (centers < edges[1:]).all()


@pytest.mark.parametrize("mu", [-50.0, -2.0, 0.3, 7.0])
def test_far_gaussians_keep_equal_mass(mu):
    """Here the cumulative probability itself rounds to 0 or 1, so compare with numerical integration."""
    edges = np.asarray(gaussian_grid([(mu, 1.0)] * 6, (4,) * 6, 0.0).yaw, np.float64)
    fine = [np.linspace(a, b, 20001) for a, b in itertools.pairwise(edges)]
    log_top = -((np.clip(mu, -1, 1) - mu) ** 2) / 2
    mass = [np.trapezoid(np.exp(-((x - mu) ** 2) / 2 - log_top), x) for x in fine]
    np.testing.assert_allclose(mass, np.mean(mass), rtol=2e-4)


@settings(max_examples=100, deadline=None)
@given(grids(), hnp.arrays(np.float32, (32, 7), elements=FINITE | UNIT))
def test_any_finite_action_has_valid_ids(grid, actions):
    ids = np.asarray(encode(grid, actions))
    assert ids.dtype == np.int32 and ids.shape == (32, 3)
    for i, (start, size) in enumerate(grid.token_ranges):
        assert (start <= ids[:, i]).all() and (ids[:, i] < start + size).all()
    decoded = np.asarray(decode(grid, ids))
    assert np.isfinite(decoded).all() and (np.abs(decoded) <= 1).all()


@settings(max_examples=100, deadline=None)
@given(grids(), hnp.arrays(np.float32, (32, 7), elements=UNIT))
def test_a_value_lies_in_its_bin(grid, actions):
    index, values = bins_of(grid, encode(grid, actions)), six_values(actions)
    r = values[:, 2]
    # float32 angles are exact to about 1e-7; angles at the origin and the poles are a convention.
    defined = [r > 1e-30, np.hypot(*actions[:, :2].astype(np.float64).T) > 1e-30, True, True, True, True]
    for i, edges in enumerate(grid.edges):
        edges = np.asarray(edges, np.float64)
        low, high = edges[index[:, i]] - 1e-6, edges[index[:, i] + 1] + 1e-6
        assert (((low <= values[:, i]) & (values[:, i] <= high)) | ~np.broadcast_to(defined[i], r.shape)).all()


@settings(max_examples=60, deadline=None)
@given(grids())
def test_ids_of_decoded_centres_are_a_fixed_point(grid):
    """Checks every id whose centre lies in the cube [-1, 1]^3; clipping moves the other centres."""
    sizes = [size for _, size in grid.token_ranges]
    ids = np.stack([start + np.arange(max(sizes)) % size for start, size in grid.token_ranges], -1)
    theta, phi, r = (
        np.asarray(bin_centers(e), np.float64)[i] for e, i in zip(grid.edges, bins_of(grid, ids).T[:3], strict=False)
    )
    inside = r * np.max(np.abs([np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)]), 0) <= 1
    again = np.asarray(encode(grid, decode(grid, ids)))
    np.testing.assert_array_equal(again[inside], ids[inside])
    np.testing.assert_array_equal(again[:, 1:], ids[:, 1:])


def test_the_fixed_point_ends_at_the_cube():
    """Some outer centres of the published grid do leave the cube, but none with r below 1."""
    grid = gaussian_grid(PRETRAIN_GAUSSIANS)
    ids = np.stack([np.arange(4096), np.full(4096, 4096), np.full(4096, 8192)], -1)
    moved = np.asarray(encode(grid, decode(grid, ids)))[:, 0] != ids[:, 0]
    assert 0 < moved.sum() < 512
    assert (np.asarray(bin_centers(grid.r))[ids[moved, 0] % 8] > 1).all()


def test_poles_and_origin():
    grid = gaussian_grid(PRETRAIN_GAUSSIANS)
    zero, negative = np.float32(0.0), np.float32(-0.0)
    origin = [[x, y, z, 0, 0, 0, 0] for x in (zero, negative) for y in (zero, negative) for z in (zero, negative)]
    assert len(np.unique(encode(grid, np.array(origin, np.float32)), axis=0)) == 1
    for z, theta in ((1, 0), (-1, 15)):
        poles = [[x, y, z, 0, 0, 0, 0] for x in (zero, negative) for y in (zero, negative)]
        index = bins_of(grid, encode(grid, np.array(poles, np.float32)))
        assert (index[:, 0] == theta).all() and len(np.unique(index[:, 1])) == 1


def test_seam():
    """The seam at phi = ±pi is the common edge of the last and the first bin."""
    grid = gaussian_grid(PRETRAIN_GAUSSIANS)
    actions = np.array([[-0.5, s, 0, 0, 0, 0, 0] for s in (0.0, 1e-3, 1e-30, -0.0, -1e-3, -1e-30)], np.float32)
    np.testing.assert_array_equal(bins_of(grid, encode(grid, actions))[:, 1], [31, 31, 31, 0, 0, 0])


def test_small_actions_keep_their_direction():
    tiny = 1e-25 * np.array([1, 1, np.sqrt(2)], np.float32)
    np.testing.assert_allclose(to_spherical(tiny), [np.pi / 4, np.pi / 4, 2e-25], rtol=1e-5)


def test_gripper_threshold():
    grid = uniform_grid((2,) * 6)
    actions = np.zeros((4, 7), np.float32)
    actions[:, 6] = [0, np.nextafter(np.float32(0.5), 0), 0.5, 1]
    np.testing.assert_array_equal(encode(grid, actions)[:, 2], [16, 16, 17, 17])
    np.testing.assert_array_equal(decode(grid, encode(grid, actions))[:, 6], [0, 0, 1, 1])


def test_stray_ids_decode_as_the_nearest_of_their_range():
    grid = uniform_grid((2, 3, 2, 2, 2, 2))
    np.testing.assert_array_equal(
        decode(grid, jnp.array([[21, 0, 0], [-5, 99, 99]])), decode(grid, jnp.array([[11, 12, 20], [0, 19, 21]]))
    )


@pytest.mark.parametrize("grid", [gaussian_grid(PRETRAIN_GAUSSIANS), linear_grid()], ids=["spherical", "linear"])
def test_transformations(grid):
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1.2, 1.2, (6, 4, 7)).astype(np.float32)
    actions[0, 0, :3] = 0
    actions[0, 1, :2] = 0
    ids = encode(grid, actions)
    assert ids.shape == (6, 4, grid.tokens_per_action)
    decoded = decode(grid, ids)
    with jax.disable_jit():
        np.testing.assert_array_equal(encode(grid, actions), ids)
        np.testing.assert_allclose(decode(grid, ids), decoded, atol=1e-6)
    np.testing.assert_array_equal(jax.vmap(jax.vmap(encode, (None, 0)), (None, 0))(grid, actions), ids)
    np.testing.assert_allclose(jax.vmap(decode, (None, 1), 1)(grid, ids), decoded, atol=1e-6)
    np.testing.assert_array_equal(encode(grid, actions[2, 1]), ids[2, 1])

    # Actions get no gradient; the grid gets a finite one.
    def error(grid, actions):
        return jnp.sum((decode(grid, encode(grid, actions)) - 0.3) ** 2)

    to_grid, to_actions = jax.grad(error, (0, 1))(grid, actions)
    np.testing.assert_array_equal(to_actions, 0)
    leaves = jax.tree.leaves(to_grid)
    assert all(np.isfinite(leaf).all() for leaf in leaves) and any((leaf != 0).any() for leaf in leaves)


def test_grids_of_one_size_share_a_compilation():
    stacked = jax.tree.map(lambda *x: jnp.stack(x), uniform_grid(), gaussian_grid(PRETRAIN_GAUSSIANS))
    actions = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    both = jax.vmap(encode, (0, None))(stacked, actions)
    np.testing.assert_array_equal(both[1], encode(gaussian_grid(PRETRAIN_GAUSSIANS), actions))


def test_fit_recovers_known_moments():
    rng = np.random.default_rng(0)
    actions = rng.normal(0.1, [0.3, 0.2, 0.25, 0.1, 0.2, 0.3, 1], (20000, 7)).astype(np.float32)
    values = six_values(actions)
    stats = fit_gaussians(actions.reshape(200, 100, 7))
    assert stats.dtype == np.float64
    np.testing.assert_allclose(stats, np.stack([values.mean(0), values.std(0)], -1), atol=1e-6)


def test_fitted_bins_hold_about_equal_shares():
    rng = np.random.default_rng(1)
    actions = rng.normal(0, 0.3, (50000, 7)).astype(np.float32)
    grid = gaussian_grid(fit_gaussians(actions), min_sigma=0)
    shares = np.bincount(bins_of(grid, encode(grid, actions))[:, 3], minlength=16) / len(actions)
    np.testing.assert_allclose(shares, 1 / 16, atol=0.01)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: gaussian_grid([(0.0, 1.0)] * 5), "six finite"),
        (lambda: gaussian_grid([(0.0, np.nan)] * 6), "six finite"),
        (lambda: gaussian_grid([(0.0, -1.0)] * 6), "six finite"),
        (lambda: uniform_grid((1, 2, 3)), "num_bins"),
        (lambda: uniform_grid((1, 2, 3, 0, 1, 1)), "num_bins"),
        (lambda: uniform_grid(np.array([1, 2, 3, 1.5, 1, 1])), "num_bins"),
        (lambda: linear_grid(1), "at least 2"),
        (lambda: fit_gaussians(np.zeros((0, 7))), "finite actions"),
        (lambda: fit_gaussians(np.zeros((3, 6))), "finite actions"),
        (lambda: fit_gaussians(np.full((3, 7), np.nan)), "finite actions"),
        (lambda: grid_from_dict({"kind": "cubic"}), "kind"),
        (lambda: grid_from_dict({"kind": "linear", "levels": [1, 0]}), "levels"),
        (lambda: grid_from_dict({"kind": "spherical", "theta": [0, 1]}), "phi"),
    ],
)
def test_bad_input_is_refused_in_words(call, words):
    with pytest.raises(InputError, match=words):
        call()


class TestLinear:
    def test_golden(self):
        golden = np.load(GOLDEN / "grid_linear256.npz")
        grid = linear_grid()
        np.testing.assert_allclose(grid.levels, golden["bin_centers"], rtol=0, atol=1e-6)
        actions = golden["actions"]
        near_edge = (np.abs(np.clip(actions, -1, 1)[..., None] - golden["bin_centers"]) < 1e-6).any(-1)
        ids = np.asarray(encode(grid, actions))
        np.testing.assert_array_equal(ids[~near_edge], golden["ids"][~near_edge])
        assert np.abs(ids - golden["ids"]).max() <= 1
        np.testing.assert_allclose(decode(grid, golden["ids"]), golden["decoded"], rtol=0, atol=1e-5)

    def test_shape(self):
        grid = linear_grid(32)
        assert (grid.vocab_size, grid.tokens_per_action, grid.token_ranges) == (32, 7, ((0, 32),) * 7)

    @settings(max_examples=50, deadline=None)
    @given(hnp.arrays(np.float32, (16, 7), elements=FINITE | UNIT), st.sampled_from([2, 17, 256]))
    def test_properties(self, actions, bins):
        grid = linear_grid(bins)
        assert isinstance(grid, LinearGrid)
        ids = np.asarray(encode(grid, actions))
        assert (ids >= 0).all() and (ids < bins).all()
        decoded = np.asarray(decode(grid, ids))
        up = decoded - np.clip(actions, -1, 1)
        assert (up >= -1e-6).all() and (up <= 2 / (bins - 1) + 1e-6).all()
        np.testing.assert_array_equal(encode(grid, decoded), ids)
