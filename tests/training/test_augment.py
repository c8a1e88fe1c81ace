import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from spatialvla_jax.training.augment import (
    Augmentation,
    adjust_colours,
    colour_jitter,
    crop,
    hsv_to_rgb,
    rgb_to_hsv,
)
from spatialvla_jax.training.augment import augment as draw

augment = jax.jit(draw, static_argnums=4)
SIZE = 32
CAMERA = np.array([[40, 0, 15], [0, 42, 17], [0, 0, 1]], np.float32)


@given(st.tuples(*[st.floats(0, 1, width=32, allow_subnormal=False)] * 3))
def test_hsv_is_the_standard_librarys(rgb: tuple[float, float, float]) -> None:
    hsv = [float(x) for x in rgb_to_hsv(jnp.array(rgb))]
    expected = colorsys.rgb_to_hsv(*rgb)
    np.testing.assert_allclose(hsv[1:], expected[1:], atol=1e-5)
    if expected[1] * expected[2] > 1e-2:  # the hue of grey is undefined
        assert abs((hsv[0] - expected[0] + 0.5) % 1 - 0.5) < 1e-4
    np.testing.assert_allclose(hsv_to_rgb(*map(jnp.float32, hsv)), rgb, atol=1e-5)


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.95]))
def test_crop_moves_the_intrinsics_with_the_pixels(seed: int, largest: float) -> None:
    """An image that encodes its own ray directions still does so after the crop, by the moved intrinsics."""
    v, u = np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5, indexing="ij")
    rays = np.stack([(u - 15) / 40, (v - 17) / 42, np.ones_like(u)], -1)
    shown = (rays + 1) / 3  # into [0, 1]
    config = Augmentation(crop_area=0.5, crop_area_max=largest, brightness=0, contrast=0, saturation=0, hue=0)
    image, depth, intrinsics = augment(
        jax.random.key(seed),
        jnp.float32(shown)[None],
        jnp.float32(rays[..., 0] + 2)[None],
        jnp.asarray(CAMERA)[None],
        config,
    )
    K = np.asarray(intrinsics[0])
    expected = np.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1]], -1)
    inner = np.s_[1:-1, 1:-1]  # bilinear sampling repeats the edge
    np.testing.assert_allclose((np.asarray(image[0]) * 3 - 1)[inner][..., :2], expected[inner], atol=1e-3)
    np.testing.assert_allclose(np.asarray(depth[0])[inner], expected[inner][..., 0] + 2, atol=1e-3)
    assert K[0, 0] > 40 and K[1, 1] > 42


def test_an_area_is_drawn_for_every_example_between_the_two() -> None:
    """The focal length gives the scale: one for all as published, otherwise many."""
    camera, image = jnp.tile(CAMERA, (64, 1, 1)), jnp.zeros((64, SIZE, SIZE, 3))
    for largest, low in ((0.0, 0.5), (0.9, 0.9)):
        config = Augmentation(crop_area=0.5, crop_area_max=largest)
        focal = np.asarray(augment(jax.random.key(0), image, None, camera, config)[2][:, 0, 0])
        areas = (40 / focal) ** 2
        np.testing.assert_allclose((areas.min(), areas.max()), (0.5, low), atol=0.05 * (largest > 0) + 1e-5)


def test_intrinsics_stay_when_switched_off() -> None:
    image = jnp.zeros((2, SIZE, SIZE, 3))
    camera = jnp.tile(CAMERA, (2, 1, 1))
    _, depth, intrinsics = augment(jax.random.key(0), image, None, camera, Augmentation(move_intrinsics=False))
    assert depth is None
    np.testing.assert_array_equal(intrinsics, camera)


def test_whole_crop_is_the_image() -> None:
    image = jax.random.uniform(jax.random.key(0), (2, SIZE, SIZE, 3))
    np.testing.assert_allclose(crop(image, jnp.zeros((2, 2)), jnp.ones(2)), image, atol=1e-6)


def test_colour_jitter_stays_in_range_and_varies_by_example() -> None:
    image = jax.random.uniform(jax.random.key(0), (1, SIZE, SIZE, 3)).repeat(4, axis=0)
    out, _, _ = augment(jax.random.key(1), image, None, jnp.tile(CAMERA, (4, 1, 1)), Augmentation(crop_area=1))
    assert out.min() >= 0 and out.max() <= 1
    assert len({float(x.mean()) for x in out}) == 4


def test_no_jitter_is_the_identity() -> None:
    image = jax.random.uniform(jax.random.key(0), (SIZE, SIZE, 3))
    off = Augmentation(crop_area=1, brightness=0, contrast=0, saturation=0, hue=0)
    np.testing.assert_allclose(colour_jitter(jax.random.key(1), image, off), image, atol=1e-5)


@pytest.mark.parametrize("brightness", [-0.2, 0.0, 0.13, 0.2])
@pytest.mark.parametrize(("contrast", "saturation", "hue"), [(0.2, 0.2, 0.05), (-0.2, -0.2, -0.05), (0.2, -0.2, 0.03)])
def test_colours_are_clipped_after_each_operation_as_the_release_does(
    brightness: float, contrast: float, saturation: float, hue: float
) -> None:
    """Compared with TensorFlow's operations in the release's order, clipped after each. Half of the pixels are near
    black or white, where a single clip at the end would differ."""
    rng = np.random.default_rng(0)
    image = np.clip(rng.normal(0.5, 0.5, (SIZE, SIZE, 3)), 0, 1).astype(np.float32)
    expected = tf.clip_by_value(tf.image.adjust_brightness(image, brightness), 0, 1)
    expected = tf.clip_by_value(tf.image.adjust_contrast(expected, 1 + contrast), 0, 1)
    expected = tf.clip_by_value(tf.image.adjust_saturation(expected, 1 + saturation), 0, 1)
    expected = tf.clip_by_value(tf.image.adjust_hue(expected, hue), 0, 1)
    found = adjust_colours(jnp.asarray(image), *map(jnp.float32, (brightness, contrast, saturation, hue)))
    np.testing.assert_allclose(found, expected, atol=1e-5)
