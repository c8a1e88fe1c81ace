"""Decodes and resizes stored images (TensorFlow, CPU), and adjusts intrinsics accordingly (NumPy).

Pixel coordinates are continuous: the image spans [0, W] x [0, H] and pixel i is centred at i + 0.5. Resizing therefore
multiplies fx, cx by the width ratio and fy, cy by the height ratio, without an offset.
"""

import functools
import io
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from spatialvla_jax.utils.malloc import limit_heaps

# The only camera that the release publishes, used for datasets with unknown cameras; pixels of a 640x480 image.
DEFAULT_INTRINSICS = ((623.588, 0.0, 319.501), (0.0, 623.588, 239.545), (0.0, 0.0, 1.0))
DEFAULT_INTRINSICS_SIZE = (480, 640)


@functools.cache
def tensorflow() -> Any:
    """The TensorFlow module, imported on first use and kept off the accelerators, which belong to JAX."""
    limit_heaps()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # silences its banner; we multiply no matrices in TensorFlow
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    return tf


def scale_intrinsics(
    intrinsics: Float[np.ndarray, "*B 3 3"], old_size: Any, new_size: tuple[int, int]
) -> Float[np.ndarray, "*B 3 3"]:
    """Intrinsics f32[*B, 3, 3] after resizing the image from `old_size` to `new_size`, both (height, width). `old_size`
    may be an array [*B, 2] with one size per image."""
    ratio = np.asarray(new_size, np.float64) / np.asarray(old_size, np.float64)
    scale = np.stack([ratio[..., 1], ratio[..., 0], np.ones_like(ratio[..., 0])], axis=-1)
    return (np.asarray(intrinsics) * scale[..., None]).astype(np.float32)


def stored_size(encoded: bytes) -> tuple[int, int] | None:
    """Height and width of an encoded image from its header; None if unreadable."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return image.height, image.width
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


def decode_image(encoded: Any, size: int) -> tuple[Any, Any]:
    """JPEG or PNG bytes (scalar string tensor) → image u8[size,size,3] and stored (height, width) i32[2].

    Resizes with antialiased Lanczos3, ignoring the aspect ratio, as in the release's data pipeline.
    """
    tf = tensorflow()
    image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
    resized = tf.image.resize(image, (size, size), method="lanczos3", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8), tf.shape(image)[:2]


def decode_depth(encoded: Any, unit: Any, size: int) -> Any:
    """16-bit PNG bytes → depth f32[size,size] in metres. `unit` is metres per count; 0 means no reading.

    Uses nearest neighbour: averaging across edges or missing readings invents surfaces.
    """
    tf = tensorflow()
    depth = tf.io.decode_png(encoded, channels=1, dtype=tf.uint16)
    resized = tf.image.resize(tf.cast(depth, tf.float32), (size, size), method="nearest")
    return resized[..., 0] * unit


@functools.cache
def decoder(size: int, depth: bool) -> Callable[..., dict[str, Any]]:
    """The stream's map function: (image bytes[, depth bytes, unit]) → dict of tensors."""
    tf = tensorflow()

    def decode(image: Any, depth_map: Any = None, unit: Any = None) -> dict[str, Any]:
        pixels, stored_size = decode_image(image, size)
        decoded = {"image": pixels, "stored_size": stored_size}
        return decoded | {"depth": decode_depth(depth_map, unit, size)} if depth else decoded

    signature = (tf.TensorSpec([], tf.string),)
    if depth:
        signature += (tf.TensorSpec([], tf.string), tf.TensorSpec([], tf.float32))
    return tf.function(decode, input_signature=signature, autograph=False)  # no control flow; rewriting takes seconds


def decode_batches(
    read: Callable[[int], tuple[np.ndarray, ...]],
    steps: range,
    batch_size: int,
    size: int,
    depth: bool,
    workers: int,
    ready: int = 2,
) -> Iterator[dict[str, np.ndarray]]:
    """Decoded images of the batches `steps`, in order.

    `read(step)` returns the encoded batch: image bytes object[B][, depth bytes object[B], metres per count f32[B]]. At
    most `workers` images are decoded at once, and one encoded batch and `ready` decoded ones are queued. Nothing is
    tuned automatically, so memory use stays constant.
    """
    tf = tensorflow()
    dtypes = (tf.string, tf.string, tf.float32) if depth else (tf.string,)
    options = tf.data.Options()
    options.autotune.enabled = False
    options.deterministic = True
    options.threading.private_threadpool_size = workers
    options.threading.max_intra_op_parallelism = 1

    @tf.autograph.experimental.do_not_convert
    def encoded(step: Any) -> Any:
        return tuple(tf.ensure_shape(x, [batch_size]) for x in tf.numpy_function(read, [step], dtypes))

    dataset = tf.data.Dataset.range(steps.start, steps.stop).map(encoded).prefetch(1).unbatch()
    dataset = dataset.map(decoder(size, depth), num_parallel_calls=workers, deterministic=True)
    dataset = dataset.batch(batch_size, drop_remainder=True).prefetch(ready).with_options(options)
    return dataset.as_numpy_iterator()
