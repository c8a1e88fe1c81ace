import io

import jax
import numpy as np
import pytest
import tensorflow as tf
from helpers.toy_rlds import encode_image
from PIL import Image

from spatialvla_jax.data.images import decode_depth, decode_image, scale_intrinsics, stored_size

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (48, 64, 3)).astype(np.uint8)


@pytest.mark.parametrize("size", [20, 48, 96])
def test_resize_is_the_one_that_a_jitted_policy_does(size):
    """Training decodes with TensorFlow, and a policy resizes with JAX: both use the same antialiased Lanczos."""
    image, stored = decode_image(encode_image(PIXELS, "PNG"), size)
    resized = jax.image.resize(PIXELS.astype(np.float32), (size, size, 3), "lanczos3", antialias=True)
    expected = np.clip(np.round(np.asarray(resized)), 0, 255)
    assert image.shape == (size, size, 3) and image.dtype == tf.uint8 and stored.numpy().tolist() == [48, 64]
    assert np.abs(image.numpy() - expected).max() <= 1


def test_stored_size_is_kept_as_it_is():
    square = PIXELS[:, :48]
    np.testing.assert_array_equal(decode_image(encode_image(square, "PNG"), 48)[0].numpy(), square)
    grey = square[..., 0]
    np.testing.assert_array_equal(decode_image(encode_image(grey, "PNG"), 48)[0].numpy(), np.stack([grey] * 3, -1))


def test_the_size_is_read_from_the_header():
    for kind in ("PNG", "JPEG"):
        encoded = encode_image(PIXELS, kind)
        assert stored_size(encoded) == stored_size(encoded[: len(encoded) // 2]) == (48, 64)
    assert stored_size(b"") is stored_size(b"no image") is None


def test_depth_is_nearest_in_metres():
    millimetres = RNG.integers(0, 2**16, (4, 4)).astype(np.uint16)
    stream = io.BytesIO()
    Image.fromarray(millimetres).save(stream, "PNG")
    larger = decode_depth(stream.getvalue(), 0.001, 8).numpy()
    np.testing.assert_allclose(larger, np.repeat(np.repeat(millimetres / 1000, 2, 0), 2, 1), rtol=1e-6)
    smaller = decode_depth(stream.getvalue(), 0.001, 3).numpy()
    assert np.isin(np.round(smaller * 1000), millimetres).all()
    nearest = jax.image.resize(millimetres / np.float32(1000), (3, 3), "nearest")
    np.testing.assert_allclose(smaller, nearest, rtol=1e-6)


def test_intrinsics_keep_a_point_where_it_is():
    """A pixel's position relative to the image is unchanged."""
    intrinsics = np.asarray([[600.0, 0, 300], [0, 500, 250], [0, 0, 1]], np.float32)
    point = np.asarray([0.1, -0.2, 1.5])
    scaled = scale_intrinsics(intrinsics, (480, 640), (224, 224))
    before, after = intrinsics @ point / point[2], scaled @ point / point[2]
    np.testing.assert_allclose(after[:2] / (224, 224), before[:2] / (640, 480), rtol=1e-6)
    assert scaled[0, 0] == np.float32(600 * 224 / 640) and scaled[1, 2] == np.float32(250 * 224 / 480)
    several = scale_intrinsics(np.stack([intrinsics] * 2), np.asarray([(480, 640), (224, 224)]), (224, 224))
    np.testing.assert_allclose(several, [scaled, intrinsics], rtol=1e-6)
