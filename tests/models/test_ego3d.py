"""Ego3D compared with the formulas, one point at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatialvla_jax.models.ego3d import Ego3D, back_project, frequency_encoding


@settings(deadline=None, max_examples=10)
@given(grid=st.integers(1, 4), step=st.integers(1, 4), batch=st.integers(1, 2), seed=st.integers(0, 999))
def test_points_one_by_one(grid, step, batch, seed):
    """Mean depth of each cell along the ray through the cell's centre, K^-1 [u, v, 1]; skew included."""
    rng = np.random.default_rng(seed)
    size = grid * 2 * step
    depth = rng.uniform(0.1, 5, (batch, size, size)).astype(np.float32)
    intrinsics = np.zeros((batch, 3, 3), np.float32)
    intrinsics[:, 0, 0], intrinsics[:, 1, 1] = rng.uniform(0.5, 2, (2, batch)) * size
    intrinsics[:, 0, 1] = rng.uniform(-0.1, 0.1, batch)
    intrinsics[:, :2, 2] = rng.uniform(0, size, (batch, 2))
    intrinsics[:, 2, 2] = 1
    points = np.asarray(jax.jit(back_project, static_argnums=2)(depth, intrinsics, grid))
    assert points.shape == (batch, grid**2, 12)
    for b in range(batch):
        for patch in range(grid**2):
            for k in range(4):
                row, column = 2 * (patch // grid) + k // 2, 2 * (patch % grid) + k % 2
                cell = depth[b, row * step : (row + 1) * step, column * step : (column + 1) * step].mean(
                    dtype=np.float64
                )
                pixel = [(column + 0.5) * step, (row + 0.5) * step, 1]
                expected = cell * np.linalg.solve(intrinsics[b].astype(np.float64), pixel)
                np.testing.assert_allclose(points[b, patch, 3 * k : 3 * k + 3], expected, rtol=1e-4, atol=1e-4)


def test_depth_that_does_not_divide():
    with pytest.raises(ValueError, match="30 px does not divide into 8×8"):
        back_project(jnp.ones((1, 30, 30)), jnp.eye(3)[None], 4)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(-10, 10, width=32), min_size=12, max_size=12))
def test_frequencies_one_by_one(values):
    points = np.array(values, np.float32).reshape(1, 1, 12)
    expected = []
    for i, value in enumerate(values):
        x = (value - (2.0 if i % 3 == 2 else 0.0)) / 2
        angles = [x * 2**k for k in range(8)]
        expected += [x, *np.sin(angles), *np.cos(angles)]
    encoded = np.asarray(frequency_encoding(points))
    assert encoded.shape == (1, 1, 204)
    np.testing.assert_allclose(encoded[0, 0], expected, atol=1e-3)


def test_starts_small_and_keeps_sines_exact():
    """Kernels are within Xavier's bound at gain 0.01. Sines are computed before anything is cast to bf16."""
    depth, intrinsics = jnp.full((1, 8, 8), 3.7), jnp.array([[[9.0, 0, 4], [0, 9, 4], [0, 0, 1]]])
    narrow, wide = (Ego3D(width=16, grid=2, dtype=jnp.dtype(d)) for d in ("bfloat16", "float32"))
    variables = jax.jit(wide.init)(jax.random.key(0), depth, intrinsics)
    for name, inputs in (("dense_0", 204), ("dense_1", 16)):
        kernel = variables["params"][name]["kernel"]
        bound = 0.01 * (6 / (inputs + 16)) ** 0.5
        assert 0.8 * bound < jnp.abs(kernel).max() <= bound
    large = jax.tree.map(lambda x: 100 * x, variables)
    a, b = (jax.jit(model.apply)(large, depth, intrinsics) for model in (narrow, wide))
    assert a.dtype == jnp.bfloat16
    np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0.05, atol=0.02 * float(jnp.abs(b).max()))
