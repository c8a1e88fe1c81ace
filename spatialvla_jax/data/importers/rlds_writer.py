"""Episodes to RLDS on disk, through TFDS, as `tfds.builder_from_directory` reads them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.atomic import replacing

VERSION = "1.0.0"
SPLITS = ("train", "val")


def features(image_size: int) -> Any:
    """The `tfds.features.FeaturesDict` of one episode of `image_size` x `image_size` frames.

    Metres and radians in the world frame; depth is z-depth in millimetres, intrinsics are pixels of the stored image,
    extrinsics are camera to world (x right, y down, z forward).
    """
    import numpy as np
    import tensorflow_datasets as tfds

    def tensor(*shape: int, doc: str) -> Any:
        return tfds.features.Tensor(shape=shape, dtype=np.float32, doc=doc)

    observation = {
        "image": tfds.features.Image(shape=(image_size, image_size, 3), encoding_format="jpeg", doc="agentview"),
        "depth": tfds.features.Image(
            shape=(image_size, image_size, 1), dtype=np.uint16, encoding_format="png", doc="millimetres"
        ),
        "intrinsics": tensor(3, 3, doc="pixels of the stored image"),
        "state": tensor(8, doc="end effector: position (m), axis-angle (rad); gripper finger positions (m)"),
    }
    step = {
        "observation": observation,
        "action": tensor(7, doc="controller units in [-1, 1]: x, y, z, rotation x, y, z, gripper (-1 open, 1 close)"),
        "language_instruction": tfds.features.Text(),
        "is_first": np.bool_,
        "is_last": np.bool_,
        "is_terminal": np.bool_,
        "reward": np.float32,
        "discount": np.float32,
    }
    metadata = {
        "task_id": np.int32,
        "task_name": tfds.features.Text(),
        "seed": np.int64,
        "init_state": np.int32,
        "success": np.bool_,
        "extrinsics": tensor(4, 4, doc="camera to world"),
    }
    return tfds.features.FeaturesDict({"steps": tfds.features.Dataset(step), "episode_metadata": metadata})


def check_out(out: Path) -> None:
    """Raises `InputError` when the version directory under `out` exists already."""
    if (out / VERSION).exists():
        raise InputError(f"{out / VERSION} exists already: expected a directory that holds no dataset yet")


def write_episodes(
    out: Path, episodes: Iterable[tuple[str, dict]], *, image_size: int, episodes_per_shard: int, description: str
) -> Path:
    """Writes (split, episode) pairs in their order and returns the version directory `out`/1.0.0.

    An episode is what `features` describes; its images may be encoded bytes, which are stored as they are. The
    directory appears by rename when all is written: an error in `episodes` leaves no part of it behind. The dataset is
    named after `out`.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity

    check_out(out)
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / VERSION) as directory:
        identity = DatasetIdentity(
            name=out.name, version=tfds.core.Version(VERSION), data_dir=str(directory), module_name=__name__
        )
        info = tfds.core.DatasetInfo(builder=identity, features=features(image_size), description=description)
        writer = tfds.core.SequentialWriter(info, max_examples_per_shard=episodes_per_shard)
        directory.mkdir()
        writer.initialize_splits(list(SPLITS))
        for split, episode in episodes:
            writer.add_examples({split: [episode]})
        writer.close_all()
    return out / VERSION
