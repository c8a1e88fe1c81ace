"""Episodes that a page can play: pictures, depth, actions and state over time, as JSON inside the page."""

import io
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from spatialvla_jax.data.index import Index
from spatialvla_jax.data.stored import stored_depth, stored_state
from spatialvla_jax.reports.html import data_uri

STEPS = 200  # most steps of an episode in the plots over time; longer ones are subsampled evenly
STATES = 16  # most numbers of the state in the plots
DEPTH_SIZE = 64  # pixels a side of a depth map
LEVELS = 255  # grey levels between near and far; level 0 means no reading


def playable(
    index: Index,
    frames: np.ndarray,
    images: UInt8[np.ndarray, "n S S 3"],
    intrinsics: Float[np.ndarray, "n 3 3"],
    limit: int,
) -> dict[str, Any]:
    """An episode as JSON, with a picture of each of `frames`: ascending, beginning with the episode's first frame. Each
    picture has at most `limit` bytes; `intrinsics` are in its pixels.

    "episode", "length", "instruction"
    "shown"   steps of the pictures, from 1 on
    "images"  data URIs
    "depth"   {"near" and "far" in metres, "maps" as data URIs}, or None
    "camera"  fx, fy, cx, cy as parts of the image's side
    "steps"   n steps, from 1 on, at which these are given, in the dataset's units:
    "action"  [A][n]
    "state"   {"name", "values" [d][n], "size" of the whole state}, or None
    """
    first = int(frames[0])
    episode = int(index.episode(first))
    length = int(index.arrays["episode_end"][episode]) - first
    steps = np.linspace(0, length - 1, min(length, STEPS)).round().astype(np.int64)
    state = stored_state(index, episode)
    camera = intrinsics[0][[0, 1, 0, 1], [0, 1, 2, 2]] / images.shape[1]
    return {
        "episode": episode,
        "length": length,
        "instruction": shorten(index.instructions[index.language(first)]),
        "shown": (frames - first + 1).tolist(),
        "images": [data_uri("jpeg", jpeg(image, limit)) for image in images],
        "depth": depth_maps([stored_depth(index, frame) for frame in frames.tolist()], limit),
        "camera": rounded(camera),
        "steps": (steps + 1).tolist(),
        "action": rounded(index.arrays["action"][index.action_rows(first + steps)[0]].T),
        "state": state
        and {
            "name": state[0],
            "values": rounded(state[1][index.step(first + steps)].T[:STATES]),
            "size": state[1].shape[1],
        },
    }


def shorten(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"


def rounded(values: np.ndarray) -> Any:
    """The values as nested lists, to four digits; None for those that are not finite."""
    if values.ndim > 1:
        return [rounded(row) for row in values]
    return [float(f"{x:.4g}") if np.isfinite(x) else None for x in values.tolist()]


def depth_maps(maps: list[Float[np.ndarray, "H W"] | None], limit: int) -> dict[str, Any] | None:
    """Depth in metres as grey PNGs: level 1 is `near`, level 255 is `far`, and the outermost 1 % are clipped to them.
    None if no map has a reading."""
    readings = np.concatenate(
        [depth[(depth > 0) & (depth < np.inf)] for depth in maps if depth is not None] or [np.empty(0)]
    )
    if not len(readings):
        return None
    near, far = np.percentile(readings, (1, 99)).tolist()
    return {
        "near": float(f"{near:.4g}"),
        "far": float(f"{far:.4g}"),
        "maps": [_grey(np.zeros((1, 1), np.float32) if depth is None else depth, near, far, limit) for depth in maps],
    }


def _grey(depth: Float[np.ndarray, "H W"], near: float, far: float, limit: int) -> str:
    share = np.clip((depth - near) / max(far - near, 1e-6), 0, 1)
    levels = np.where(depth > 0, 1 + np.rint((LEVELS - 1) * share), 0).astype(np.uint8)
    size = DEPTH_SIZE
    while True:
        stream = io.BytesIO()
        # Do not interpolate: such points would float in the cloud.
        Image.fromarray(levels).resize((size, size), Image.Resampling.NEAREST).save(stream, "PNG", optimize=True)
        if stream.tell() <= limit or size <= 16:
            return data_uri("png", stream.getvalue())
        size //= 2


def jpeg(image: UInt8[np.ndarray, "H W 3"], limit: int) -> bytes:
    """A JPEG of at most `limit` bytes, at the best quality that fits. If none fits, the image is halved."""
    for quality in (85, 70, 55, 40, 25):
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "JPEG", quality=quality, optimize=True)
        if stream.tell() <= limit:
            break
    else:
        if len(image) > 16:
            return jpeg(np.asarray(Image.fromarray(image).reduce(2)), limit)
    return stream.getvalue()
