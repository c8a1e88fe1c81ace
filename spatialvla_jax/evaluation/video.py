"""Videos of rollouts."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spatialvla_jax.utils.atomic import replacing

FRAMES_PER_SECOND = 20


def write_video(path: Path, frames: Sequence[np.ndarray]) -> Path:
    """Write frames u8[H, W, 3] as `path`.mp4 (H.264), or `path`.webp if PyAV is not installed; by rename."""
    if importlib.util.find_spec("av") is None:
        from PIL import Image

        target = path.with_name(f"{path.name}.webp")
        first, *rest = map(Image.fromarray, frames)
        with replacing(target) as temporary:
            first.save(temporary, save_all=True, append_images=rest, duration=1000 // FRAMES_PER_SECOND, loop=0)
    else:
        import av

        target = path.with_name(f"{path.name}.mp4")
        H, W = (side // 2 * 2 for side in frames[0].shape[:2])  # the format requires even sides
        with replacing(target) as temporary, av.open(str(temporary), "w") as container:
            stream: Any = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options={"crf": "20"})
            stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
            for image in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image[:H, :W]))))
            container.mux(stream.encode())
    return target
