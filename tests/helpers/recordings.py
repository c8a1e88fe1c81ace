"""A packed recording of the toy dataset."""

from pathlib import Path

import numpy as np

from spatialvla_jax.data.pack_recording import write_packed


def write_recording(out: Path, episodes: int = 4, every: int = 1) -> Path:
    """Write a file like `record libero`: `episodes` train episodes and one val episode, of 12 steps at 56 px. Images
    are uniformly grey and show only the target's depth; the fingers close at step 8. `every` divides 12."""
    rng = np.random.default_rng(0)

    def episode(length: int) -> dict:
        targets = (rng.uniform(-0.2, 0.2, (length, 3)) + np.eye(3)[2]).astype(np.float32)
        seen = [
            {
                "image": np.full((56, 56, 3), 255 * (target[2] - 0.7) / 0.6, np.uint8),
                "depth": np.full((56, 56), 1000, np.uint16),
                "intrinsics": np.array([[60, 0, 28], [0, 60, 28], [0, 0, 1]], np.float32),
                "target": target,
                "hand": np.array([0.5, 0.5, 0.2, 0.08], np.float32),
                "extrinsics": np.eye(4, dtype=np.float32)[[2, 0, 1, 3]],
            }
            for target in targets
        ]
        return {"steps": [{"observation": observation} for observation in seen]}

    def actions() -> np.ndarray:
        gripper = np.where(np.arange(12) < 8, -1, 1)
        return np.concatenate([rng.uniform(-1, 1, (12, 6)), gripper[:, None]], axis=1).astype(np.float32)

    known = [(split, "reach", actions()) for split in ("train",) * episodes + ("val",)]
    write_packed(out, known, map(episode, [12 // every] * len(known)), name="toy", image_size=56, every=every)
    return out
