"""Resampling compared with torch.nn.functional, which defines it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from spatialvla_jax.models.resize import reflect_pad, resize_bicubic, resize_bilinear

METHODS = {
    "bicubic": (resize_bicubic, {"mode": "bicubic", "align_corners": True}),
    "bilinear": (resize_bilinear, {"mode": "bilinear", "align_corners": True}),
    "bilinear_half_pixel": (
        lambda x, size: resize_bilinear(x, size, align_corners=False),
        {"mode": "bilinear", "align_corners": False},
    ),
}
SIDE = st.integers(1, 40)


def random_image(seed, *shape):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def torch_resize(x, size, **kwargs):
    return F.interpolate(torch.from_numpy(x).permute(0, 3, 1, 2), size, **kwargs).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=8)
@given(source=st.tuples(SIDE, SIDE), target=st.tuples(SIDE, SIDE), seed=st.integers(0, 2**32 - 1))
def test_matches_torch(method, source, target, seed):
    """As matrix products and as taps, the form for GPUs, on which no test runs."""
    resize, kwargs = METHODS[method]
    x = random_image(seed, 2, *source, 3)
    ours = jax.jit(lambda x: resize(x, target))(x)
    np.testing.assert_allclose(ours, torch_resize(x, target, **kwargs), atol=2e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        np.testing.assert_allclose(jax.jit(lambda x: resize(x, target))(x), ours, atol=2e-5)


@pytest.mark.parametrize(("method", "source", "target"), [("bicubic", 286, 384), ("bicubic", 384, 286)])
def test_sizes_of_the_depth_path(method, source, target):
    ours, kwargs = METHODS[method]
    x = random_image(0, 1, source, source, 1)
    expected = torch_resize(x, (target, target), **kwargs)
    np.testing.assert_allclose(ours(x, (target, target)), expected, atol=2e-5)
    np.testing.assert_allclose(ours(x[..., 0], (target, target)), expected[..., 0], atol=2e-5)  # NHW


@settings(deadline=None, max_examples=8)
@given(side=st.tuples(st.integers(4, 30), st.integers(4, 30)), pad=st.integers(0, 3))
def test_reflect_pad(side, pad):
    x = random_image(0, 2, *side, 3)
    expected = F.pad(torch.from_numpy(x).permute(0, 3, 1, 2), (pad,) * 4, mode="reflect").permute(0, 2, 3, 1)
    padded = jax.jit(lambda x: (reflect_pad(x, pad), reflect_pad(x[..., 0], pad)))(x)
    np.testing.assert_array_equal(padded[0], expected.numpy())
    np.testing.assert_array_equal(padded[1], expected[..., 0].numpy())


def test_keeps_the_dtype():
    assert resize_bilinear(jnp.ones((1, 4, 4, 2), jnp.bfloat16), (8, 8)).dtype == jnp.bfloat16
