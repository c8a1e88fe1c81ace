"""PyTorch's resampling rules (`torch.nn.functional.interpolate`, `pad`) as pure functions on NHWC or NHW arrays.

Resampling is linear and separable: each function builds one weight matrix per axis at trace time and applies both. They
are applied as matrix products or, on a GPU, as sums of the few pixels with non-zero weight, which XLA fuses with their
consumers. `resize_observation` is the exception: it follows the data loader's rules, which are TensorFlow's.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Size = tuple[int, ...]  # (height, width)


def reflect_pad(x: Float[Array, "B h w *C"], pad: int) -> Float[Array, "B h+2*{pad} w+2*{pad} *C"]:
    """Mirror `pad` (< h, w) pixels around every side; the edge pixel itself is not repeated."""
    return jnp.pad(x, ((0, 0), (pad, pad), (pad, pad)) + ((0, 0),) * (x.ndim - 3), mode="reflect")


def resize_bicubic(x: Float[Array, "B h w *C"], size: Size) -> Float[Array, "B h2 w2 *C"]:
    """Bicubic (Keys' kernel, a = -0.75), corners aligned, no antialiasing, border pixels repeated."""
    return _separable(x, size, _bicubic)


def resize_bilinear(x: Float[Array, "B h w *C"], size: Size, align_corners: bool = True) -> Float[Array, "B h2 w2 *C"]:
    """Bilinear, no antialiasing."""
    return _separable(x, size, _bilinear if align_corners else _bilinear_half_pixel)


def _separable(x, size: Size, weights):
    if x.shape[1:3] == size:
        return x
    rows, columns = (weights(n, m) for n, m in zip(x.shape[1:3], size, strict=True))
    if jax.default_backend() == "gpu":
        return _by_taps(_by_taps(x, rows, 1), columns, 2)
    rows, columns = jnp.asarray(rows, x.dtype), jnp.asarray(columns, x.dtype)
    # Accelerators round float32 operands of products by default; pixels and metres need full precision.
    highest = jax.lax.Precision.HIGHEST
    x = jnp.einsum("yh,bhw...->byw...", rows, x, precision=highest)
    return jnp.einsum("xw,byw...->byx...", columns, x, precision=highest)


def _by_taps(x: Float[Array, "..."], matrix: np.ndarray, axis: int) -> Float[Array, "..."]:
    """Apply `matrix` [outputs, inputs] along `axis`, in float32: one gather for each non-zero tap of the widest row."""
    taps = (matrix != 0).sum(axis=1).max()
    order = np.argsort(matrix == 0, axis=1, kind="stable")[:, :taps]
    weights = np.take_along_axis(matrix, order, axis=1)
    shape = tuple(-1 if i == axis else 1 for i in range(x.ndim))
    parts = [
        jnp.take(x, order[:, k], axis=axis).astype(jnp.float32) * weights[:, k].reshape(shape) for k in range(taps)
    ]
    return sum(parts[1:], parts[0]).astype(x.dtype)


# The matrices below are [outputs, inputs]. Source positions are rounded to float32 as in PyTorch.


def _aligned_positions(n: int, m: int) -> np.ndarray:
    return np.arange(m, dtype=np.float32) * np.float32((n - 1) / max(m - 1, 1))


def _from_taps(n: int, first: np.ndarray, taps: list[np.ndarray]) -> np.ndarray:
    """The matrix in which output i weighs input first[i] + k by taps[k][i]; out-of-range inputs repeat the border's."""
    matrix = np.zeros((len(first), n), np.float32)
    for k, weight in enumerate(taps):
        np.add.at(matrix, (np.arange(len(first)), np.clip(first + k, 0, n - 1)), weight)
    return matrix


@cache
def _bicubic(n: int, m: int) -> np.ndarray:
    a = -0.75
    position = _aligned_positions(n, m)
    floor = np.floor(position)

    def near(d):  # |distance| <= 1
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d):  # 1 < |distance| < 2
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    t = (position - floor).astype(np.float64)
    return _from_taps(n, floor.astype(int) - 1, [far(t + 1), near(t), near(1 - t), far(2 - t)])


@cache
def _bilinear(n: int, m: int) -> np.ndarray:
    return _linear(n, _aligned_positions(n, m))


@cache
def _bilinear_half_pixel(n: int, m: int) -> np.ndarray:
    return _linear(n, np.maximum((np.arange(m, dtype=np.float32) + 0.5) * np.float32(n / m) - 0.5, 0))


def _linear(n: int, position: np.ndarray) -> np.ndarray:
    floor = np.floor(position)
    t = position - floor
    return _from_taps(n, floor.astype(int), [1 - t, t])


def resize_observation(image: Any, depth: Any, intrinsics: Any, *, size: int) -> dict[str, Any]:
    """Resize one observation or a batch as the data loader does: antialiased Lanczos for the image, nearest for depth,
    intrinsics scaled accordingly. `image` is u8[*B, h, w, 3], `depth` f32[*B, h, w] or None, `intrinsics` f32[*B, 3,
    3]."""
    *batch, h, w, _ = image.shape
    out = {"image": image}
    if (size, size) != (h, w):
        pixels = jax.image.resize(image.astype(jnp.float32), (*batch, size, size, 3), "lanczos3", antialias=True)
        out = {"image": jnp.clip(jnp.round(pixels), 0, 255).astype(jnp.uint8)}
    if depth is not None:
        out["depth"] = jax.image.resize(depth, (*batch, size, size), "nearest")
    return out | {"intrinsics": intrinsics * jnp.array([[size / w], [size / h], [1.0]])}
