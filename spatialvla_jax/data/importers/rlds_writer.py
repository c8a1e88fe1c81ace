"""Writes episodes as RLDS with TFDS, readable by `tfds.builder_from_directory`; also code shared by all importers."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from spatialvla_jax.data.images import tensorflow
from spatialvla_jax.errors import Fault, InputError
from spatialvla_jax.utils.atomic import new_directory, write_json

VERSION = "1.0.0"
FaultPolicy = Literal["fail", "skip"]  # for faulty episodes, as in the config's data.faults
FRAMING = 16  # bytes that TFRecord adds to each record for length and checksums
SPLITS = ("train", "val")


def features(image_size: int) -> Any:
    """The `tfds.features.FeaturesDict` of an episode with `image_size` x `image_size` frames.

    Metres and radians in the world frame. Depth is z-depth in millimetres, intrinsics are in pixels of the stored
    image, extrinsics are camera to world (x right, y down, z forward).
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
    """Raises InputError if the version directory under `out` already exists."""
    if (out / VERSION).exists():
        raise InputError(f"{out / VERSION} already exists: expected a directory without a dataset")


def write_episodes(
    out: Path, episodes: Iterable[tuple[str, dict]], *, image_size: int, episodes_per_shard: int, description: str
) -> Path:
    """Write (split, episode) pairs in order and return the version directory `out`/1.0.0.

    Episodes are as in `features`; images may be encoded bytes, which are stored unchanged. The directory appears by
    rename when everything is written; an error in `episodes` leaves nothing behind. The dataset is named after `out`.
    """
    import tensorflow_datasets as tfds

    check_out(out)
    tf = tensorflow()
    try:
        with new_directory(out / VERSION) as directory:
            info = dataset_info(out.absolute().name, directory, features(image_size), description)
            writer = tfds.core.SequentialWriter(info, max_examples_per_shard=episodes_per_shard)
            writer.initialize_splits(list(SPLITS))
            for split, episode in episodes:
                writer.add_examples({split: [episode]})
            writer.close_all()
    except tf.errors.OpError as error:
        raise InputError(f"{out / VERSION} cannot be written: {error.message}") from error
    return out / VERSION


def dataset_info(
    name: str, directory: Path, features: Any, description: str = "", skipped: Sequence[Fault] | None = None
) -> Any:
    """The `tfds.core.DatasetInfo` of a dataset in `directory`, with `count_faults(skipped)` as metadata."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity

    version = tfds.core.Version(VERSION)
    metadata = None if skipped is None else tfds.core.MetadataDict(count_faults(skipped))
    identity = DatasetIdentity(name=name, version=version, data_dir=os.fspath(directory), module_name=__name__)
    return tfds.core.DatasetInfo(builder=identity, features=features, description=description, metadata=metadata)


def tolerate(fault: Fault, policy: FaultPolicy) -> Fault:
    """The fault of a skipped episode. Raises it unless the policy is "skip"."""
    if policy == "fail":
        raise Fault(fault.reason, f"{fault} (--faults skip omits it)")
    return fault


def count_faults(skipped: Sequence[Fault]) -> dict[str, Any]:
    """Metadata of a dataset: {"skipped": {reason: number of episodes}, "faults": [one sentence each]}."""
    reasons = Counter(fault.reason for fault in skipped)
    return {"skipped": dict(sorted(reasons.items())), "faults": [str(fault) for fault in skipped]}


def finished_shards(file: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The finished shards that an interrupted conversion recorded in `file` with `save_shards`. Raises InputError if it
    had other `options`."""
    if not file.is_file():
        return {}
    try:
        before = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}") from error
    for key, value in json.loads(json.dumps(options)).items():
        if before.get(key) != value:
            raise InputError(
                f"{file.parent} was started with {key} {before.get(key)!r}, not {value!r}; delete it or choose "
                "another place"
            )
    return before.get("shards", {})


def save_shards(file: Path, options: Mapping[str, Any], shards: Mapping[str, Any]) -> None:
    """Record a conversion's progress: the `shard_note` of each finished shard, by name."""
    write_json(file, {**options, "shards": shards})


def shard_note(source: Any, lost: Mapping[int, Fault]) -> dict[str, Any]:
    """What a shard was made of (JSON), and the episodes skipped in it."""
    return {"source": source, "skipped": {str(number): [fault.reason, str(fault)] for number, fault in lost.items()}}


def lost_of_finished(file: Path, note: Any, source: Any, policy: FaultPolicy) -> dict[int, Fault] | None:
    """The episodes skipped in a finished shard; None if it must be made, or made again, from `source`."""
    if note is None or note["source"] != source or not file.is_file() or (note["skipped"] and policy == "fail"):
        return None
    return {int(number): Fault(*fault) for number, fault in note["skipped"].items()}


def file_state(file: Path) -> list[int] | None:
    """Size in bytes and modification time in nanoseconds, to detect changes; None if there is no file."""
    return [file.stat().st_size, file.stat().st_mtime_ns] if file.is_file() else None
