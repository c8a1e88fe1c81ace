"""What a dataset stores of an episode beyond what training reads, for pages that show it."""

import io

import numpy as np
from jaxtyping import Float
from PIL import Image

from spatialvla_jax.data.index import Index
from spatialvla_jax.data.tfrecord import read_example
from spatialvla_jax.utils.storage import read_range

# Where datasets of the catalogue keep the robot's state, the usual names first.
STATES = tuple(
    f"observation/{name}"
    for name in (
        *("state", "robot_state", "proprio", "robot_obs", "end_effector_pose", "eef_pose", "cartesian_position"),
        *("tcp_base", "ee_states", "pose", "end_effector_cartesian_pos", "base_pose_tool_reached", "joint_pos"),
    )
)


def stored_depth(index: Index, frame: int) -> Float[np.ndarray, "H W"] | None:
    """A frame's depth in metres, 0 without a reading; None if the dataset stores none, or if it is not a grey picture.
    Raises InputError, StorageError or OSError if the file cannot be read."""
    if "depth" not in index.arrays:
        return None
    if index.arrays["depth"].ndim == 3:  # a packed file
        return index.arrays["depth"][frame] * np.float32(index.spec.depth_unit)
    offset, length, _ = index.spans("depth", frame).tolist()
    data = _read(index, int(index.episode(frame)), offset, length)
    try:
        counts = np.asarray(Image.open(io.BytesIO(data)))
    except OSError:
        return None
    return counts.astype(np.float32) * np.float32(index.spec.depth_unit) if counts.ndim == 2 else None


def stored_state(index: Index, episode: int) -> tuple[str, Float[np.ndarray, "L n"]] | None:
    """The name of an episode's state and its values at every stored step, in the dataset's own units. None if no key in
    `STATES` exists, as in packed files. Raises InputError, StorageError or OSError if the file cannot be read."""
    if "episode_record" not in index.arrays:
        return None
    offset, length, _ = index.arrays["episode_record"][episode].tolist()
    image = f"steps/{index.spec.image}"
    features = read_example(_read(index, episode, offset, length), {image, *(f"steps/{key}" for key in STATES)})
    steps = len(features.get(image, ()))
    for key in STATES:
        values = features.get(f"steps/{key}", np.empty(0))
        if values.ndim == 1 and len(values) and steps and len(values) % steps == 0:
            return key, values.reshape(steps, -1).astype(np.float32)
    return None


def _read(index: Index, episode: int, offset: int, length: int) -> bytes:
    return read_range(index.files[index.arrays["episode_file"][episode]], offset, length)
