"""Converts camera frames from other formats to RLDS's: 8 bits, grey or RGB, as JPEG or PNG."""

import io

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image

from spatialvla_jax.errors import Fault

IMAGE = "image"  # the reason under which bad frames are counted
_ALPHA = ("RGBA", "LA", "PA")


def is_encoded(cell: object) -> bool:
    """Whether the cell holds the bytes of a JPEG or PNG."""
    return isinstance(cell, bytes) and cell.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n"))


def is_depth(data: bytes) -> bool:
    """Whether a PNG is 16-bit grey, the format of stored depth."""
    return data[24:26] == b"\x10\x00"


def check_encoded(data: bytes) -> bytes:
    """A JPEG or PNG, unchanged except for a removed alpha channel. Raises Fault if it is neither, or damaged."""
    if not is_encoded(data):
        raise Fault(IMAGE, f"{len(data)} bytes of an image are neither JPEG nor PNG")
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode = image.mode
            image.verify()  # verifies a PNG's checksums; a JPEG has none
    except (OSError, SyntaxError, ValueError) as error:
        raise Fault(IMAGE, f"an image of {len(data)} bytes does not decode: {error}") from error
    if data[0] == 0xFF and b"\xff\xd9" not in data:  # the end marker, which cannot occur in the pixel data
        raise Fault(IMAGE, f"a JPEG of {len(data)} bytes is cut short")
    if mode in _ALPHA:
        with Image.open(io.BytesIO(data)) as image:
            return encode_png(to_pixels(np.asarray(image.convert("RGBA"))[None])[0])
    return data


def to_pixels(frames: Shaped[np.ndarray, " L *shape"]) -> UInt8[np.ndarray, "L H W C"]:
    """Frames with C = 1 (grey) or 3 channels, from any order that `channels_last` accepts.

    Values are integers in [0, 255], or floats in [0, 1], which are multiplied by 255 and rounded. A fourth channel must
    be 255 everywhere (opaque) and is dropped. Raises Fault for anything else.
    """
    shape, frames = list(frames.shape[1:]), channels_last(frames)
    if frames.dtype != np.uint8:
        top = 1 if frames.dtype.kind == "f" else 255
        if frames.dtype.kind not in "fiu" or not ((frames >= 0) & (frames <= top)).all():
            span = f" from {frames.min()} to {frames.max()}" if frames.dtype.kind in "fiu" and frames.size else ""
            raise Fault(
                IMAGE,
                f"frames are {frames.dtype}{shape}{span}: whole numbers in [0, 255] or floats in [0, 1] are expected",
            )
        frames = (np.rint(frames * 255.0) if top == 1 else frames).astype(np.uint8)
    if frames.shape[3] == 4:
        if (frames[..., 3] != 255).any():
            raise Fault(
                IMAGE, f"frames of shape {shape} have a fourth channel that is not 255 everywhere: RGB is expected"
            )
        frames = frames[..., :3]
    return frames


def channels_last(frames: Shaped[np.ndarray, " L *shape"]) -> Shaped[np.ndarray, "L H W C"]:
    """[L, H, W, C] from [L, H, W, C], [L, H, W] or [L, C, H, W]. Raises Fault unless C is 1, 3 or 4."""
    shape = list(frames.shape[1:])
    if frames.ndim == 3:
        return frames[..., None]
    if frames.ndim == 4 and shape[2] in (1, 3, 4):
        return frames
    if frames.ndim == 4 and shape[0] in (1, 3, 4):
        return np.moveaxis(frames, 1, 3)
    raise Fault(IMAGE, f"a frame has the shape {shape}: one of 1, 3 or 4 channels, last or first, is expected")


def encode_png(pixels: UInt8[np.ndarray, "H W C"]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(stream, "PNG")
    return stream.getvalue()
