"""Checks that a camera matrix or depth map is plausible, shared by observations, datasets and processors.

Each function returns "" for a valid value, otherwise the end of a sentence that begins with the value's name: `if wrong
:= intrinsics_problem(matrix, size): raise InputError(f"observation 'intrinsics' {wrong}")`.

Pixel coordinates are continuous: an image spans [0, width] × [0, height].
"""

import math
from typing import Any

import numpy as np

# Degrees. Ego3D assumes a pinhole camera: 150° exceeds any lens without fisheye distortion, and less than 1° is a
# telescope. Matrices in the wrong units, such as a focal length in millimetres, fail here.
FIELD_OF_VIEW = (1.0, 150.0)
MAX_STRETCH = 5.0  # ratio of the focal lengths: pixels are square, unless an image was resized to another aspect ratio
MAX_SKEW = 0.01  # relative to the focal length; sensors have none
# Metres. Robots' sensors measure from millimetres to 65 m (16 bits of millimetres), ZoeDepth up to 80 m; a simulator's
# sky is farther away. Millimetres or counts mistaken for metres fail here.
NEAREST, FARTHEST_ON_AVERAGE, FARTHEST = 0.01, 100.0, 1000.0


def intrinsics_problem(matrix: Any, size: tuple[int, ...] | None) -> str:
    """What is wrong with a camera matrix [3, 3] in pixels of an image of `size` (height, width); "" if valid.

    With `size` None the matrix is relative to the image: its first row is divided by the width and its second by the
    height. The matrix is [[fx, skew, cx], [0, fy, cy], [0, 0, 1]].
    """
    array = as_array(matrix)
    if array is None or array.shape != (3, 3):
        return f"must have the shape [3, 3], got {kind_of(array)}"
    if array.dtype.kind not in "fiu":
        return f"must hold numbers, got {kind_of(array)}"
    if count := int((~np.isfinite(array)).sum()):
        return f"must be finite: {count} of its 9 numbers {'is' if count == 1 else 'are'} NaN or infinite"
    (fx, skew, cx), (zero, fy, cy), last = array.tolist()
    if not np.allclose(last, (0, 0, 1), rtol=0, atol=1e-6):
        if np.allclose(array[:, 2], (0, 0, 1), rtol=0, atol=1e-6):
            return "looks transposed: (0, 0, 1) is its last column and must be its last row"
        return f"must have the last row (0, 0, 1), got ({', '.join(f'{x:g}' for x in last)})"
    if not (fx > 0 and fy > 0):
        return f"must have focal lengths above 0, got fx {fx:g} and fy {fy:g}"
    if abs(skew) > MAX_SKEW * fx or abs(zero) > 1e-6 * fy:
        return f"must be without shear, got {skew:g} beside fx {fx:g} and {zero:g} before fy {fy:g}"
    height, width = size or (1, 1)
    axes = (("first", "width", width, fx, cx), ("second", "height", height, fy, cy))
    if size is None and max(cx, cy) > 1:
        return (
            f"looks as if it were in pixels (its principal point is ({cx:g}, {cy:g})), and must be relative to the "
            "image: divide the first row by the image's width and the second by its height"
        )
    if relative := [(row, side, pixels) for row, side, pixels, _, c in axes if 0 < c <= 1 and pixels > 2]:
        mend = " and ".join(f"the {row} row by the {side} ({pixels})" for row, side, pixels in relative)
        return f"looks relative to the image (its principal point is ({cx:g}, {cy:g})), not in pixels: multiply {mend}"
    for _, side, pixels, focal, _ in axes:
        view = 2 * math.degrees(math.atan2(pixels / 2, focal))
        if not FIELD_OF_VIEW[0] <= view <= FIELD_OF_VIEW[1]:
            unit = f"{pixels} px" if size else "1"
            return (
                f"must have a field of view of {FIELD_OF_VIEW[0]:g}° to {FIELD_OF_VIEW[1]:g}°: a focal length of "
                f"{focal:g} sees {view:.3g}° of a {side} of {unit}"
            )
    if max(fx, fy) > MAX_STRETCH * min(fx, fy):
        return f"must have focal lengths within {MAX_STRETCH:g} times of each other, got fx {fx:g} and fy {fy:g}"
    if not (0 < cx < width and 0 < cy < height):
        where = f"the image of {width}×{height} px that comes with it" if size else "the image, from 0 to 1"
        return f"must have its principal point inside {where}, got ({cx:g}, {cy:g})"
    return ""


def depth_problem(depth: Any, size: tuple[int, ...], unit: Any = None) -> str:
    """What is wrong with a depth map [H, W] of an image of `size` (height, width); "" if valid. 0 means no reading.

    Without a `unit` it must hold floating-point metres. With one (metres per count, see `unit_problem`) it holds counts
    of any numeric dtype.
    """
    array = as_array(depth)
    if array is None or array.shape != tuple(size):
        return f"must be metres of shape {list(size)}, got {kind_of(array)}: depth has the size of its image"
    if array.dtype.kind not in "fiu":
        return f"must hold numbers, got {kind_of(array)}"
    hint = "'depth_unit' says how many metres a count is, such as 0.001 for millimetres"
    if array.dtype.kind in "iu" and unit is None:
        return f"must be metres as floating-point numbers, got {array.dtype}: {hint}"
    scale = 1.0 if unit is None else float(unit)
    low, high = float(array.min()) * scale, float(array.max()) * scale  # NaN if any value is
    if not (math.isfinite(low) and math.isfinite(high)):
        count = int((~np.isfinite(array)).sum())
        are = "is" if count == 1 else "are"
        return f"must be finite: {count} of its {array.size} pixels {are} NaN or infinite; 0 means no reading"
    if low < 0:
        return f"must not be negative, got {low:g} m; 0 means no reading"
    if high == 0:
        return "holds no reading: every pixel is 0"
    if high < NEAREST:
        return f"cannot be metres: its farthest reading is {high:g} m; {hint}"
    if high > FARTHEST_ON_AVERAGE:  # rare, so the mean costs nothing
        mean = float(array.sum(dtype=np.float64)) / np.count_nonzero(array) * scale
        if high > FARTHEST or mean > FARTHEST_ON_AVERAGE:
            return f"cannot be metres: its readings are {mean:g} m on average and up to {high:g} m; {hint}"
    return ""


def unit_problem(unit: Any) -> str:
    """What is wrong with a depth map's unit in metres per count; "" if valid."""
    array = as_array(unit)
    if array is None or array.ndim or array.dtype.kind not in "fiu":
        got = kind_of(array)
    elif 0 < float(array) <= 1:
        return ""
    else:
        got = f"{float(array):g}"
    return f"must be metres per count, above 0 and at most 1, such as 0.001, got {got}"


def in_metres(depth: Any, unit: Any = None) -> np.ndarray:
    """A valid depth map as f32[H, W] in metres."""
    metres = np.asarray(depth).astype(np.float32, copy=False)
    return metres if unit is None else metres * np.float32(unit)


def as_array(value: Any) -> np.ndarray | None:
    """The value as an array; None stays None. Ragged lists give an empty object array."""
    try:
        return None if value is None else np.asarray(value)
    except (TypeError, ValueError):
        return np.empty(0, object)


def kind_of(array: np.ndarray | None) -> str:
    """Dtype and shape, for a message."""
    return "nothing" if array is None else f"{array.dtype}{list(array.shape)}"
