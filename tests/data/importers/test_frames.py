import numpy as np
import pytest
from helpers.toy_rlds import encode_image

from spatialvla_jax.data.images import decode_image
from spatialvla_jax.data.importers.frames import check_encoded, encode_png, to_pixels
from spatialvla_jax.errors import Fault

FRAMES = np.random.default_rng(0).integers(0, 256, (2, 12, 16, 3)).astype(np.uint8)
OPAQUE = np.full((2, 12, 16, 1), 255, np.uint8)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (FRAMES, FRAMES),
        (FRAMES.transpose(0, 3, 1, 2), FRAMES),
        (FRAMES.astype(np.int64), FRAMES),
        ((FRAMES / 255).astype(np.float32), FRAMES),
        ((FRAMES / 255).transpose(0, 3, 1, 2), FRAMES),
        (np.concatenate([FRAMES, OPAQUE], -1), FRAMES),
        (np.concatenate([FRAMES, OPAQUE], -1).transpose(0, 3, 1, 2), FRAMES),
        (FRAMES[..., 0], FRAMES[..., :1]),
        (FRAMES[..., :1], FRAMES[..., :1]),
        (FRAMES[..., :1].transpose(0, 3, 1, 2), FRAMES[..., :1]),
    ],
)
def test_pixels(given, expected):
    pixels = to_pixels(given)
    np.testing.assert_array_equal(pixels, expected)
    grey_or_rgb = np.broadcast_to(expected, FRAMES.shape)
    np.testing.assert_array_equal(
        decode_image(encode_png(pixels[0]), 16)[0], decode_image(encode_png(grey_or_rgb[0]), 16)[0]
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (FRAMES[..., :2], r"has the shape \[12, 16, 2\]: one of 1, 3 or 4 channels"),
        (FRAMES[:, None], r"has the shape \[1, 12, 16, 3\]"),
        (FRAMES.astype(np.float32), r"float32\[12, 16, 3\] from 0.0 to 255.0: whole numbers in \[0, 255\] or floats"),
        (FRAMES.astype(np.int32) - 300, "from -300 to"),
        (np.full(FRAMES.shape, np.nan), "from nan to nan"),
        (FRAMES.astype(object), "frames are object"),
        (np.concatenate([FRAMES, OPAQUE - 1], -1), "a fourth channel that is not 255 everywhere"),
    ],
)
def test_other_arrays_are_no_frames(given, message):
    with pytest.raises(Fault, match=message):
        to_pixels(given)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_encoded_images(kind):
    """Valid images are kept byte for byte; truncated or damaged ones are faults."""
    data = encode_image(FRAMES[0], kind)
    assert check_encoded(data) is data
    for broken in (data[:-20], b"", FRAMES.tobytes(), encode_image(FRAMES[0], "BMP")):
        with pytest.raises(Fault):
            check_encoded(broken)


def test_alpha_is_left_out_where_it_says_nothing():
    rgba = np.concatenate([FRAMES, OPAQUE], -1)[0]
    rgb = decode_image(check_encoded(encode_image(rgba, "PNG")), 16)[0]
    np.testing.assert_array_equal(rgb, decode_image(encode_png(FRAMES[0]), 16)[0])
    rgba[3, 4, 3] = 7
    with pytest.raises(Fault, match="fourth channel"):
        check_encoded(encode_image(rgba, "PNG"))
