"""Converts LeRobot datasets (v2.0, v2.1 and v3.0 on disk) to RLDS, shard by shard."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Set
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
)
from spatialvla_jax.data.importers.rlds_writer import (
    FRAMING,
    VERSION,
    FaultPolicy,
    check_out,
    dataset_info,
    file_state,
    finished_shards,
    lost_of_finished,
    save_shards,
    shard_note,
    tolerate,
)
from spatialvla_jax.errors import Fault, InputError
from spatialvla_jax.utils.atomic import disk_errors, parents_of, remove_leftovers, replacing

FRAMES_PER_SHARD = 2048
MANIFEST = "conversion.json"


@dataclasses.dataclass(frozen=True)
class Converted:
    """The result of a conversion."""

    directory: Path
    source: LeRobot
    splits: dict[str, tuple[Episode, ...]]  # the written episodes
    skipped: list[Fault]  # one for each skipped episode
    changed: int  # shards made again because their source had changed since an interrupted conversion


def convert_lerobot(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    camera: str | None = None,
    name: str | None = None,
    faults: FaultPolicy = "fail",
    frames_per_shard: int = FRAMES_PER_SHARD,
    progress: Callable[[int, int], None] | None = None,
) -> Converted:
    """Write one camera of the LeRobot dataset `src` as the RLDS version directory `dst`/1.0.0.

    Steps have observation/image, observation/state (f32, if the source has it), action (f32), language_instruction (the
    row's task), is_first, is_last and is_terminal; episode_metadata/episode_index is the source's. Values are copied
    unchecked: NaN stays NaN. `camera` is required if there are several. `name` is the dataset's name, by default that
    of `dst`. `progress(episodes done, episodes)` is called meanwhile.

    One episode is in memory at a time. Shards are whole episodes of at least `frames_per_shard` frames, each written by
    rename. After an interruption the same call resumes at the unfinished shard, and gives the same files as an
    uninterrupted one. Shards whose source has changed since are made again.

    Raises InputError naming file and episode for missing or inconsistent data. With `faults` "skip", faulty episodes
    are skipped instead, and the dataset's metadata (metadata.json) counts and names them.
    """
    source, out = open_lerobot(src, camera), Path(dst)
    name = name or out.absolute().name
    if not re.fullmatch(r"\w+", name):
        raise InputError(f"the dataset's name {name!r} must be letters, digits and underscores; set it with --name")
    check_out(out)
    work = out / f".incomplete-{VERSION}"
    options = {
        "source": source.root.absolute().name,
        "camera": source.camera,
        "name": name,
        "jpeg_quality": JPEG_QUALITY,
        "frames_per_shard": frames_per_shard,
    }
    before = finished_shards(work / MANIFEST, options)
    skipped = [
        tolerate(
            Fault("not listed", f"{source.root}, episode {number}: info.json counts it, but no table lists it"), faults
        )
        for number in source.unlisted
    ]
    tf = tensorflow()
    try:
        with disk_errors(out), parents_of(work / MANIFEST):
            return _convert(source, work, before, options, faults, skipped, progress)
    except tf.errors.OpError as error:
        raise InputError(f"{out} cannot be written: {error.message}") from error


def _convert(
    source: LeRobot,
    work: Path,
    before: dict[str, Any],
    options: dict[str, Any],
    faults: FaultPolicy,
    skipped: list[Fault],
    progress: Callable[[int, int], None] | None,
) -> Converted:
    """`convert_lerobot` with checked arguments. `before` holds the shards that are already finished."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.splits import SplitDict

    remove_leftovers(work)
    features = _features(source)
    total, done, infos, shards, splits = sum(map(len, source.splits.values())), 0, [], {}, {}

    def report(done: int) -> None:
        if progress:
            progress(done, total)

    for split, all_episodes in source.splits.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=tfds.core.Path(work), dataset_name=options["name"], split=split, filetype_suffix="tfrecord"
        )
        num_bytes, lengths, plan, splits[split] = 0, [], _shards(all_episodes, options["frames_per_shard"]), ()
        for number, episodes in enumerate(plan):
            file = Path(template.sharded_filepath(shard_index=number, num_shards=len(plan)))
            state = _state(source, episodes)
            lost = lost_of_finished(file, before.get(file.name), state, faults)
            if lost is None:
                lost = _write_shard(
                    file, source, features, episodes, faults, lambda count, done=done: report(done + count)
                )
                shards[file.name] = shard_note(state, lost)
                save_shards(work / MANIFEST, options, before | shards)
            else:
                shards[file.name] = before[file.name]
            done += len(episodes)
            report(done)
            skipped += lost.values()
            lengths.append(len(episodes) - len(lost))
            splits[split] += tuple(episode for episode in episodes if episode.number not in lost)
            num_bytes += file.stat().st_size - lengths[-1] * FRAMING
        infos.append(
            tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=num_bytes, filename_template=template)
        )
    files = before.keys() | shards.keys() | {MANIFEST}
    if empty := [split for split, episodes in splits.items() if not episodes]:
        if len(empty) == len(splits):
            _remove(work, files)
        raise InputError(f"no episode of the split {empty[0]!r} is left; the first fault: {skipped[0]}")
    _remove(work, files - shards.keys())
    save_shards(work / MANIFEST, options, shards)
    kept = f"JPEG of quality {JPEG_QUALITY}" if _first(source).video else "images as stored there"
    description = f"LeRobot dataset {source.root.absolute().name}, camera {source.camera}: {kept}."
    info = dataset_info(options["name"], work, features, description, skipped)
    info.set_splits(SplitDict(infos))
    info.write_to_directory(work)
    os.replace(work, work.with_name(VERSION))
    changed = sum(shards.get(file, {}).get("source") != old["source"] for file, old in before.items())
    return Converted(work.with_name(VERSION), source, splits, skipped, changed)


def _write_shard(
    file: Path,
    source: LeRobot,
    features: Any,
    episodes: list[Episode],
    faults: FaultPolicy,
    report: Callable[[int], None],
) -> dict[int, Fault]:
    """Write a shard, by rename. Returns the faults of the skipped episodes, by number; `report(episodes done)` is
    called before each episode."""
    lost: dict[int, Fault] = {}
    with replacing(file) as temporary, tensorflow().io.TFRecordWriter(os.fspath(temporary)) as writer:
        for count, episode in enumerate(episodes):
            report(count)
            try:
                writer.write(_serialize(features, read_episode(source, episode)))
            except Fault as fault:
                lost[episode.number] = tolerate(fault, faults)
    return lost


def _remove(directory: Path, names: Set[str]) -> None:
    for name in names:
        (directory / name).unlink(missing_ok=True)


def _shards(episodes: tuple[Episode, ...], frames_per_shard: int) -> list[list[Episode]]:
    """Consecutive episodes; a new shard starts as soon as one has enough frames."""
    shards: list[list[Episode]] = []
    frames = frames_per_shard
    for episode in episodes:
        if frames >= frames_per_shard:
            shards.append([])
            frames = 0
        shards[-1].append(episode)
        frames += episode.length
    return shards


def _state(source: LeRobot, episodes: list[Episode]) -> str:
    """A digest of a shard's source: the tables' rows about its episodes, and the state of their files."""
    tables = {key: value for key, value in vars(source).items() if key not in ("root", "splits", "unlisted")}

    def relative(value: Any) -> Any:
        return [os.path.relpath(value, source.root), file_state(value)] if isinstance(value, Path) else value

    state = [tables, [[relative(value) for value in vars(episode).values()] for episode in episodes]]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]


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


def _serialize(features: Any, episode: dict[str, Any]) -> bytes:
    """Serialise like TFDS, but with sorted map keys, so that the same episode gives the same bytes."""
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    example = ExampleSerializer(features.get_serialized_info()).get_tf_example(features.encode_example(episode))
    return example.SerializeToString(deterministic=True)


def _first(source: LeRobot) -> Episode:
    return next(iter(source.splits.values()))[0]
