"""Converts LeRobot datasets (v2.0, v2.1 and v3.0 on disk) to RLDS, shard by shard."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from spatialvla_jax.data.images import tensorflow
from spatialvla_jax.data.importers.lerobot_tables import (
    JPEG_QUALITY,
    STATE,
    Episode,
    LeRobot,
    open_lerobot,
    read_episode,
    read_json,
)
from spatialvla_jax.data.importers.rlds_writer import VERSION, check_out
from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.atomic import remove_leftovers, replacing, write_json

FRAMES_PER_SHARD = 2048
_FRAMING = 16  # bytes of length and checksums that a TFRecord adds to its record


def convert_lerobot(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    camera: str | None = None,
    name: str | None = None,
    frames_per_shard: int = FRAMES_PER_SHARD,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Path, LeRobot]:
    """Writes one camera of the LeRobot dataset `src` as the RLDS version directory `dst`/1.0.0.

    Steps get observation/image, observation/state (f32, where the source has it), action (f32), language_instruction
    (the row's task), is_first, is_last and is_terminal; episode_metadata/episode_index is the source's. Values are
    not changed or judged: NaN stays NaN. `camera` is needed where there are several; `name` is the dataset's, by
    default that of `dst`. `progress(episodes done, episodes)` is called meanwhile.

    One episode is in memory at a time. Shards are whole episodes of at least `frames_per_shard` frames, each written by
    rename: after an interruption the same call goes on with the shard where it stopped, and the files are those of an
    uninterrupted one. Raises InputError for what is missing or does not fit, naming file and episode.
    """
    source, out = open_lerobot(src, camera), Path(dst)
    name = name or out.absolute().name
    if not re.fullmatch(r"\w+", name):
        raise InputError(f"the dataset's name {name!r} must be letters, digits and underscores; set it with --name")
    check_out(out)
    work = out / f".incomplete-{VERSION}"
    _begin(work, source, name, frames_per_shard)
    remove_leftovers(work)
    features = _features(source)
    tf = tensorflow()
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.splits import SplitDict

    total, done, infos = sum(map(len, source.splits.values())), 0, []
    for split, all_episodes in source.splits.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=tfds.core.Path(work), dataset_name=name, split=split, filetype_suffix="tfrecord"
        )
        num_bytes, shards = 0, _shards(all_episodes, frames_per_shard)
        for number, episodes in enumerate(shards):
            file = Path(template.sharded_filepath(shard_index=number, num_shards=len(shards)))
            if not file.is_file():
                with replacing(file) as temporary, tf.io.TFRecordWriter(os.fspath(temporary)) as writer:
                    for count, episode in enumerate(episodes):
                        if progress:
                            progress(done + count, total)
                        writer.write(_serialize(features, read_episode(source, episode)))
            done += len(episodes)
            if progress:
                progress(done, total)
            num_bytes += file.stat().st_size - len(episodes) * _FRAMING
        lengths = [len(episodes) for episodes in shards]
        infos.append(
            tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=num_bytes, filename_template=template)
        )
    info = _info(work, source, name, features)
    info.set_splits(SplitDict(infos))
    info.write_to_directory(work)
    os.replace(work, out / VERSION)
    return out / VERSION, source


def _shards(episodes: tuple[Episode, ...], frames_per_shard: int) -> list[list[Episode]]:
    """Consecutive episodes, a new shard as soon as one has enough frames."""
    shards: list[list[Episode]] = []
    frames = frames_per_shard
    for episode in episodes:
        if frames >= frames_per_shard:
            shards.append([])
            frames = 0
        shards[-1].append(episode)
        frames += episode.length
    return shards


def _begin(work: Path, source: LeRobot, name: str, frames_per_shard: int) -> None:
    """Makes the working directory, or raises InputError when the one there is of another conversion."""
    plan = [(split, episode.number, episode.length) for split in source.splits for episode in source.splits[split]]
    key = {
        "source": source.root.absolute().name,
        "info_sha256": hashlib.sha256((source.root / "meta" / "info.json").read_bytes()).hexdigest(),
        "episodes_sha256": hashlib.sha256(json.dumps(plan).encode()).hexdigest(),
        "camera": source.camera,
        "name": name,
        "jpeg_quality": JPEG_QUALITY,
        "frames_per_shard": frames_per_shard,
    }
    file = work / "conversion.json"
    if not file.is_file():
        work.mkdir(parents=True, exist_ok=True)
        write_json(file, key)
        return
    before = read_json(file)
    if changed := next((k for k, value in key.items() if before.get(k) != value), None):
        raise InputError(
            f"{work} holds a conversion that was interrupted and had another {changed}: {before.get(changed)!r}, now "
            f"{key[changed]!r}; delete it or choose another place"
        )


def _features(source: LeRobot) -> Any:
    import tensorflow_datasets as tfds

    def tensor(key: str, doc: str | None) -> Any:
        return tfds.features.Tensor(shape=source.shapes[key], dtype=np.float32, doc=doc)

    encoding = "jpeg" if _first(source).video else None
    image = tfds.features.Image(shape=(None, None, 3), encoding_format=encoding, doc=source.camera)
    step = {
        "observation": {"image": image} | ({"state": tensor(STATE, STATE)} if STATE in source.shapes else {}),
        "action": tensor("action", source.names),
        "language_instruction": tfds.features.Text(),
        "is_first": np.bool_,
        "is_last": np.bool_,
        "is_terminal": np.bool_,
    }
    metadata = {"episode_index": np.int64}
    return tfds.features.FeaturesDict({"steps": tfds.features.Dataset(step), "episode_metadata": metadata})


def _info(work: Path, source: LeRobot, name: str, features: Any) -> Any:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity

    version = tfds.core.Version(VERSION)
    identity = DatasetIdentity(name=name, version=version, data_dir=os.fspath(work), module_name=__name__)
    kept = f"JPEG of quality {JPEG_QUALITY}" if _first(source).video else "images as stored there"
    description = f"LeRobot dataset {source.root.absolute().name}, camera {source.camera}: {kept}."
    return tfds.core.DatasetInfo(builder=identity, features=features, description=description)


def _serialize(features: Any, episode: dict[str, Any]) -> bytes:
    """As TFDS does, but with the map's keys in one order: the same episode gives the same bytes."""
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    example = ExampleSerializer(features.get_serialized_info()).get_tf_example(features.encode_example(episode))
    return example.SerializeToString(deterministic=True)


def _first(source: LeRobot) -> Episode:
    return next(iter(source.splits.values()))[0]
