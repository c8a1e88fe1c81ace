"""Which cameras and depth maps are plausible: examples of each kind, and every plausible one passes."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spatialvla_jax.utils.camera import depth_problem, in_metres, intrinsics_problem, unit_problem

SIZE = (48, 64)  # height, width
CAMERA = np.array([[50, 0, 31], [0, 48, 25], [0, 0, 1]], np.float32)
RELATIVE = CAMERA / np.array([[64], [48], [1]], np.float32)
DEPTH = np.linspace(0.4, 3, 48 * 64, dtype=np.float32).reshape(SIZE)


def changed(array, *changes):
    array = np.array(array)
    for place, value in changes:
        array[place] = value
    return array


CAMERAS = {
    "nothing": (None, r"must have the shape \[3, 3\], got nothing"),
    "four numbers": ([50, 48, 31, 25], r"shape \[3, 3\], got int64\[4\]"),
    "3×4": (np.eye(3, 4), r"got float64\[3, 4\]"),
    "4×4": (np.eye(4), r"got float64\[4, 4\]"),
    "a batch": (CAMERA[None], r"got float32\[1, 3, 3\]"),
    "flat": (CAMERA.ravel(), r"got float32\[9\]"),
    "ragged lists": ([[50, 0, 31], [0, 48], [0]], r"got object\[0\]"),
    "words": ([["50", "0", "31"]] * 3, "must hold numbers"),
    "booleans": (np.ones((3, 3), bool), r"must hold numbers, got bool\[3, 3\]"),
    "complex": (CAMERA.astype(complex), "must hold numbers"),
    "huge integers": ([[10**30] * 3] * 3, "must hold numbers"),
    "NaN": (changed(CAMERA, ((0, 0), np.nan)), "must be finite: 1 of its 9 numbers is NaN or infinite"),
    "infinity": (changed(CAMERA, ((0, 2), np.inf)), "must be finite"),
    "zeros": (np.zeros((3, 3)), r"must have the last row \(0, 0, 1\), got \(0, 0, 0\)"),
    "scaled": (CAMERA * 2, r"last row \(0, 0, 1\), got \(0, 0, 2\)"),
    "transposed": (CAMERA.T, "looks transposed"),
    "no focal length": (changed(CAMERA, ((1, 1), 0)), "focal lengths above 0, got fx 50 and fy 0"),
    "y upwards": (changed(CAMERA, ((1, 1), -48)), "focal lengths above 0, got fx 50 and fy -48"),
    "sheared": (changed(CAMERA, ((0, 1), 0.6)), "without shear, got 0.6 beside fx 50"),
    "sheared the other way": (changed(CAMERA, ((1, 0), 0.1)), "without shear, got 0 .* and 0.1 before fy 48"),
    "relative": (
        RELATIVE,
        r"relative to the image .*: multiply the first row by the width \(64\) and the second .* \(48\)",
    ),
    "half relative": (changed(CAMERA, (0, RELATIVE[0])), r"multiply the first row by the width \(64\)$"),
    "identity": (np.eye(3), r"a focal length of 1 sees 176° of a width of 64 px"),
    "millimetres": (changed(CAMERA, ((0, 0), 1.9), ((1, 1), 1.9)), "a focal length of 1.9 sees 173° of a width"),
    "metres": (changed(CAMERA, ((0, 0), 0.0019), ((1, 1), 0.0019)), "a focal length of 0.0019 sees 180°"),
    "a telescope": (changed(CAMERA, ((0, 0), 1e5), ((1, 1), 1e5)), "sees 0.0367°"),
    "absurd": (changed(np.float64(CAMERA), ((0, 0), 1e300), ((1, 1), 1e300)), r"sees \S+e-297°"),
    "of a larger image": (CAMERA * [[10], [10], [1]], r"inside the image of 64×48 px .* got \(310, 250\)"),
    "centred at the corner": (
        changed(CAMERA, (slice(2), [[50, 0, 0], [0, 48, 0]])),
        r"principal point inside .*\(0, 0\)",
    ),
    "negative": (changed(CAMERA, ((1, 2), -3)), r"got \(31, -3\)"),
    "inverse": (np.linalg.inv(CAMERA), "a focal length of 0.02 sees 180°"),
}


NOT_RELATIVE = {
    "pixels": (CAMERA, r"in pixels .*\(31, 25\).*: divide the first row by the image's width and the second by its"),
    "of an image's corner": (changed(RELATIVE, ((0, 2), 0)), r"inside the image, from 0 to 1, got \(0, 0.52"),
    "millimetres": (changed(RELATIVE, ((0, 0), 0.003)), "a focal length of 0.003 sees 179° of a width of 1$"),
    "stretched": (changed(RELATIVE, ((0, 0), 20)), "within 5 times of each other, got fx 20"),
    "zeros": (np.zeros((3, 3)), "must have the last row"),
    "NaN": (RELATIVE * np.nan, "must be finite"),
    "transposed": (RELATIVE.T, "looks transposed"),
}

COUNTS = np.rint(DEPTH * 1000).astype(np.uint16)
DEPTHS = {
    "nothing": (None, None, r"must be metres of shape \[48, 64\], got nothing"),
    "of another size": (DEPTH[1:], None, r"shape \[48, 64\], got float32\[47, 64\]: depth has the size of its image"),
    "transposed": (DEPTH.T, None, r"got float32\[64, 48\]"),
    "with a channel": (DEPTH[..., None], None, r"got float32\[48, 64, 1\]"),
    "booleans": (DEPTH > 1, None, "must hold numbers, got bool"),
    "complex": (DEPTH * 1j, None, "must hold numbers"),
    "words": (DEPTH.astype(str), None, "must hold numbers"),
    "millimetres": (COUNTS, None, "floating-point numbers, got uint16: 'depth_unit' .* 0.001 for millimetres"),
    "millimetres up close": (np.full(SIZE, 60, np.int32), None, "got int32: 'depth_unit'"),
    "8 bits": (np.full(SIZE, 90, np.uint8), None, "got uint8"),
    "millimetres as float": (
        COUNTS.astype(float),
        None,
        "cannot be metres: .* 1700 m on average and up to 3000 m; 'dep",
    ),
    "few of them": (
        COUNTS.astype(np.float32) * (np.arange(64) % 8 == 0) / 4,
        None,
        "cannot be metres: .* 4[0-9.]+ m on",
    ),
    "one absurd pixel": (changed(DEPTH, ((0, 0), 1e30)), None, r"up to 1e\+30 m"),
    "kilometres": (DEPTH / 1000, None, "its farthest reading is 0.003 m"),
    "metres with a unit": (DEPTH, 0.001, "its farthest reading is 0.003 m"),
    "millimetres as centimetres": (COUNTS * np.uint16(20), 0.01, "cannot be metres"),
    "a missing reading as NaN": (
        changed(DEPTH, ((3, 4), np.nan)),
        None,
        "1 of its 3072 pixels is NaN or infinite; 0 means no reading",
    ),
    "infinitely far": (changed(DEPTH, ((3, 4), np.inf)), None, "must be finite"),
    "negative": (changed(DEPTH, ((3, 4), -0.25)), None, "must not be negative, got -0.25 m"),
    "a missing reading as -1": (changed(COUNTS.astype(np.int32), ((3, 4), -1)), 0.001, "negative, got -0.001 m"),
    "no reading": (np.zeros(SIZE, np.float32), None, "holds no reading"),
    "no counts": (np.zeros(SIZE, np.uint16), 0.001, "holds no reading"),
}


@pytest.mark.parametrize(
    ("problem", "message"),
    [pytest.param(intrinsics_problem(x, SIZE), message, id=f"camera: {kind}") for kind, (x, message) in CAMERAS.items()]
    + [
        pytest.param(intrinsics_problem(x, None), text, id=f"relative: {kind}")
        for kind, (x, text) in NOT_RELATIVE.items()
    ]
    + [
        pytest.param(depth_problem(x, SIZE, unit), text, id=f"depth: {kind}")
        for kind, (x, unit, text) in DEPTHS.items()
    ],
)
def test_what_makes_no_sense_is_refused_by_name(problem: str, message: str) -> None:
    assert re.search(message, problem) and len(problem) < 220, problem


@pytest.mark.parametrize("unit", [0, -0.001, 2, math.nan, math.inf, True, "0.001", [0.001], None])
def test_a_unit_is_metres_per_count(unit) -> None:
    assert "must be metres per count, above 0 and at most 1" in unit_problem(unit)


middle = st.floats(0.1, 0.9)  # of a side


@given(st.integers(32, 4000), st.floats(0.4, 2.5), st.floats(4, 140), middle, middle, st.floats(-0.009, 0.009))
def test_any_camera_makes_sense_in_pixels_and_relative_to_its_image(width, ratio, view, x, y, skew) -> None:
    """For any field of view and principal point, as crops produce; pixels and relative units are told apart."""
    height = round(width * ratio)
    focal = max(height, width) / 2 / math.tan(math.radians(view / 2))
    pixels = np.array([[focal, skew * focal, x * width], [0, focal, y * height], [0, 0, 1]])
    relative = pixels / [[width], [height], [1]]
    for camera, other, size in ((pixels, relative, (height, width)), (relative, pixels, None)):
        assert intrinsics_problem(camera.astype(np.float32), size) == intrinsics_problem(camera.tolist(), size) == ""
        assert re.search(
            "multiply the first row .* second|divide the first row .* second", intrinsics_problem(other, size)
        )


def test_sensible_depth_passes_and_becomes_metres() -> None:
    far = np.where(np.arange(64) < 60, DEPTH, 400).astype(np.float32)  # a simulator's sky
    missing = np.where(np.arange(64) % 4, 0, DEPTH)  # most of a stereo camera's readings
    for depth in (DEPTH, far, missing, DEPTH.astype(np.float16), DEPTH.astype(float), np.full(SIZE, 0.02)):
        assert depth_problem(depth, SIZE) == "" and depth_problem(depth.tolist(), SIZE) == ""
    assert in_metres(DEPTH) is DEPTH
    for counts, unit in ((COUNTS, 0.001), (COUNTS.astype(np.int64), np.float64(0.001)), (COUNTS // 10, np.array(0.01))):
        assert depth_problem(counts, SIZE, unit) == unit_problem(unit) == ""
        metres = in_metres(counts, unit)
        assert metres.dtype == np.float32
        np.testing.assert_allclose(metres, DEPTH, atol=float(unit))
    np.testing.assert_array_equal(in_metres(DEPTH, 1), DEPTH)
