"""Copies an RLDS dataset and adds a depth map to every step; existing data is preserved byte for byte."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8, UInt16

from spatialvla_jax.data.images import decode_image, tensorflow
from spatialvla_jax.data.importers.frames import IMAGE
from spatialvla_jax.data.importers.rlds_writer import (
    FRAMING,
    FaultPolicy,
    count_faults,
    file_state,
    finished_shards,
    lost_of_finished,
    save_shards,
    shard_note,
    tolerate,
)
from spatialvla_jax.data.oxe.spec import DEPTH, DEPTH_UNIT, depth_key
from spatialvla_jax.data.rlds import open_rlds
from spatialvla_jax.data.tfrecord import read_example, read_records
from spatialvla_jax.errors import Fault, InputError
from spatialvla_jax.utils.atomic import parents_of, remove_leftovers, replacing, write_json

MAX_DEPTH = 65.535  # metres; larger depths are clipped to this
MANIFEST = "depth.json"

# u8[B,S,S,3] → f32[B,S,S] in metres; may return an array that is still being computed.
Estimator = Callable[[UInt8[np.ndarray, "B S S 3"]], Any]


def add_depth(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    estimate: Estimator,
    *,
    image: str,
    image_size: int,
    batch_size: int,
    made_with: Mapping[str, Any],
    faults: FaultPolicy = "fail",
    splits: tuple[str, ...] | None = None,
    workers: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Copy the dataset `path` to `out`/NAME/VERSION, with the same names, adding `depth_key(image)` to every step.

    `estimate` gets every step's `image` as the model does, with `image_size` pixels per side. Splits (all by default),
    shards and all stored features are the source's. Shards appear one by one, by rename, and dataset_info.json last.
    Until then it is not a dataset, and the same call resumes after the last complete shard. `made_with` (JSON) is
    recorded and must be the same on resuming. Shards whose source has changed since are made again. `progress(name,
    episodes done, episodes)` is called meanwhile.

    Returns {"dataset", "directory", "depth", "frames" (of this call), "clipped" (their pixels beyond MAX_DEPTH),
    "skipped" (a fault for each skipped episode)}. Raises InputError. With `faults` "skip", damaged episodes are
    skipped, and the copy's metadata (metadata.json) counts and names them.
    """
    builder = open_rlds(path)
    source = Path(builder.data_dir)
    name, key = builder.info.name, depth_key(image)
    directory = Path(out) / source.parent.name / source.name
    if directory.resolve() == source.resolve():
        raise InputError(f"{directory} is the dataset itself; choose another --out")
    splits = tuple(sorted(set(splits or (split for split in builder.info.splits if split != "all"))))
    features = _features(builder, image, key, image_size)
    shards = {split: _shards(builder, split) for split in splits}
    made_with = {
        "image": image,
        "depth": key,
        "unit": DEPTH_UNIT,
        "image_size": image_size,
        **made_with,
        "splits": splits,
    }
    if directory.is_dir() and not (directory / MANIFEST).is_file() and any(directory.glob("[!.]*")):
        raise InputError(f"{directory} holds files that were not made here (no {MANIFEST}); choose another --out")
    finished = finished_shards(directory / MANIFEST, made_with)
    total = sum(count for listed in shards.values() for _, count in listed)
    done = frames = clipped = 0
    kept: dict[str, list[int]] = {split: [] for split in splits}
    skipped: list[Fault] = []
    tf = tensorflow()
    try:
        with parents_of(directory / MANIFEST), ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            remove_leftovers(directory)
            make_maps = partial(_Maps, estimate=estimate, size=image_size, batch_size=batch_size, pool=pool)
            for split, (file, count) in ((part, shard) for part in splits for shard in shards[part]):
                target, state = directory / file.name, [file_state(file), count]
                lost = lost_of_finished(target, finished.get(file.name), state, faults)
                if lost is None:
                    report = partial(_report, progress, name, done, total)
                    maps, lost = _write_shard(file, count, target, image, key, make_maps, faults, report)
                    frames, clipped = frames + maps.frames, clipped + maps.clipped
                    finished[file.name] = shard_note(state, lost)
                    save_shards(directory / MANIFEST, made_with, finished)
                done += count
                _report(progress, name, done, total, 0)
                kept[split].append(count - len(lost))
                skipped += lost.values()
        if empty := [split for split in splits if sum(n for _, n in shards[split]) and not sum(kept[split])]:
            raise InputError(f"no episode of the split {empty[0]!r} is left; the first fault: {skipped[0]}")
        _finish(directory, source, shards, kept, skipped, features)
    except (OSError, tf.errors.OpError) as error:
        raise InputError(f"{directory} cannot be written: {error}") from error
    return {
        "dataset": name,
        "directory": str(directory),
        "depth": key,
        "frames": frames,
        "clipped": clipped,
        "skipped": skipped,
    }


def _report(progress: Callable[[str, int, int], None] | None, name: str, done: int, total: int, more: int) -> None:
    if progress:
        progress(name, done + more, total)


def _write_shard(
    file: Path,
    count: int,
    target: Path,
    image: str,
    key: str,
    make_maps: Callable[..., "_Maps"],
    faults: FaultPolicy,
    report: Callable[[int], None],
) -> tuple["_Maps", dict[int, Fault]]:
    """Write the shard `file` with depth. Returns its maps and the skipped episodes."""
    lost: dict[int, Fault] = {}
    while True:
        episodes = _frames(file, count, image, lost, faults)
        maps = make_maps(file, episodes)
        try:
            with replacing(target) as temporary, tensorflow().io.TFRecordWriter(os.fspath(temporary)) as writer:
                records = islice(read_records(file), max(episodes, default=-1) + 1)
                for number, (_, record, _) in enumerate(records):
                    if number in episodes:
                        writer.write(record + _example(key, maps.take(number)))
                    report(number + 1)
            return maps, lost
        except _Undecodable as fault:  # write the shard again without that episode
            lost[fault.episode] = tolerate(fault, faults)


class _Undecodable(Fault):
    """An image of episode number `episode` in its file does not decode."""

    def __init__(self, episode: int, message: str):
        super().__init__(IMAGE, message)
        self.episode = episode


class _Maps:
    """The depth maps of one shard's frames as PNGs, in order. Decoding, `estimate` and encoding overlap."""

    def __init__(
        self,
        file: Path,
        episodes: dict[int, np.ndarray],
        estimate: Estimator,
        size: int,
        batch_size: int,
        pool: ThreadPoolExecutor,
    ):
        self.frames = self.clipped = 0
        self._file, self._episodes, self._estimate = file, episodes, estimate
        self._size, self._batch_size, self._pool = size, batch_size, pool
        self._pngs = self._stream()

    def take(self, episode: int) -> list[bytes]:
        """The maps of the next episode, which must have the number `episode`."""
        return [next(self._pngs) for _ in self._episodes[episode]]

    def _stream(self) -> Iterator[bytes]:
        frames = [(number, step) for number, spans in self._episodes.items() for step in range(len(spans))]
        batches = [frames[i : i + self._batch_size] for i in range(0, len(frames), self._batch_size)]
        computing: tuple[list[tuple[int, int]], Any] | None = None
        with open(self._file, "rb") as stream:

            def decode(frame: tuple[int, int]) -> np.ndarray:
                offset, length = self._episodes[frame[0]][frame[1]].tolist()
                return self._decode(frame, os.pread(stream.fileno(), length, offset))

            images = self._pool.map(decode, batches[0]) if batches else iter(())
            for number, batch in enumerate(batches):
                stacked = np.stack([*images])
                if number + 1 < len(batches):
                    images = self._pool.map(decode, batches[number + 1])  # starts decoding now
                padding = np.repeat(stacked[-1:], self._batch_size - len(stacked), axis=0)
                depth = self._estimate(np.concatenate([stacked, padding]))
                if computing is not None:
                    yield from self._encode(*computing)
                computing = batch, depth
            if computing is not None:
                yield from self._encode(*computing)

    def _decode(self, frame: tuple[int, int], encoded: bytes) -> np.ndarray:
        try:
            return decode_image(encoded, self._size)[0].numpy()
        except tensorflow().errors.InvalidArgumentError as error:
            raise _Undecodable(
                frame[0], f"{self._describe(frame)}: the image does not decode ({len(encoded)} bytes)"
            ) from error

    def _encode(self, batch: list[tuple[int, int]], depth: Any) -> Iterator[bytes]:
        metres = np.asarray(depth, np.float32)[: len(batch)]
        for frame, depth_map in zip(batch, metres, strict=True):
            if not np.isfinite(depth_map).all():
                raise InputError(f"{self._describe(frame)}: the depth model gives values that are not finite")
        counts = to_counts(metres)
        self.frames += len(batch)
        self.clipped += int((metres > MAX_DEPTH + DEPTH_UNIT / 2).sum())
        return iter(self._pool.map(lambda x: tensorflow().io.encode_png(x[..., None]).numpy(), counts))

    def _describe(self, frame: tuple[int, int]) -> str:
        return f"file {self._file}, episode {frame[0]}, step {frame[1]}"


def to_counts(metres: Float[np.ndarray, "*B"]) -> UInt16[np.ndarray, "*B"]:
    """Depth in metres → u16[*B] in units of DEPTH_UNIT; never 0, which means no reading."""
    return np.clip(np.rint(np.asarray(metres, np.float64) / DEPTH_UNIT), 1, 65535).astype(np.uint16)


def _shards(builder: Any, split: str) -> list[tuple[Path, int]]:
    """(file, number of episodes) for all shards of a split."""
    known = sorted(name for name in builder.info.splits if name != "all")
    if split not in known:
        raise InputError(f"{builder.data_dir} has no split {split!r}: it has {', '.join(known) or 'none'}")
    info = builder.info.splits[split]
    shards = [(Path(file), count) for file, count in zip(info.filepaths, info.shard_lengths, strict=True)]
    for file, _ in shards:
        if not file.is_file():
            raise InputError(f"{file} is missing, a shard of the split {split!r}")
    return shards


def _frames(file: Path, count: int, image: str, lost: dict[int, Fault], faults: FaultPolicy) -> dict[int, np.ndarray]:
    """Offset and length of the encoded images in the file, i64[L, 2], for every episode not in `lost`. Damaged episodes
    are added to `lost`."""
    key, none, episodes = f"steps/{image}", np.empty((0, 2), np.int64), {}
    records = read_records(file)
    for number in range(count):
        try:
            if (found := next(records, None)) is None:
                raise Fault("truncated", f"the file ends early: it should have {count} episodes")
            offset, record, intact = found
            if not intact:
                raise Fault("checksum", "the record's checksum is wrong")
            if number not in lost:
                episodes[number] = read_example(record, {key}).get(key, none) + np.asarray([offset, 0])
        except Fault as fault:
            if number not in lost:
                lost[number] = tolerate(Fault(fault.reason, f"{file}, episode {number}: {fault}"), faults)
    if count - 1 in episodes and next(records, None):
        raise InputError(f"{file} has more than the {count} episodes in its dataset_info.json")
    return episodes


def _example(key: str, values: list[bytes]) -> bytes:
    """A serialised tf.train.Example with one feature. Appended to another's bytes, it is merged on reading."""
    train = tensorflow().train
    feature = train.Feature(bytes_list=train.BytesList(value=values))
    return train.Example(features=train.Features(feature={f"steps/{key}": feature})).SerializeToString()


def _features(builder: Any, image: str, key: str, size: int) -> dict[str, Any]:
    """The content of features.json with the depth map added."""
    import tensorflow_datasets as tfds
    from google.protobuf import json_format

    if "steps" not in builder.info.features:
        raise InputError(f"{builder.data_dir} is not an RLDS dataset: its episodes have no 'steps'")
    proto = builder.info.features.to_proto()
    node = proto.features_dict.features["steps"].sequence.feature
    *parents, last = image.split("/")
    for part in [*parents, last]:
        if part not in node.features_dict.features:
            raise InputError(f"{builder.data_dir} has no key {image!r} in its steps")
        parent, node = node, node.features_dict.features[part]
    siblings = parent.features_dict.features
    if DEPTH in siblings:
        raise InputError(f"{builder.data_dir} already has {key!r}")
    doc = f"z-depth of {image} in millimetres, estimated by ZoeDepth; at most {MAX_DEPTH} m"
    depth = tfds.features.Image(shape=(size, size, 1), dtype=np.uint16, encoding_format="png", doc=doc)
    siblings[DEPTH].CopyFrom(depth.to_proto())
    return json_format.MessageToDict(proto)


def _finish(
    directory: Path,
    source: Path,
    shards: Mapping[str, list[tuple[Path, int]]],
    kept: Mapping[str, list[int]],
    skipped: list[Fault],
    features: dict[str, Any],
) -> None:
    """Write everything except the shards, which hold `kept` episodes. dataset_info.json, which makes it a dataset,
    comes last."""
    info = json.loads((source / "dataset_info.json").read_text())
    info["splits"] = [split for split in info["splits"] if split["name"] in shards]
    for split in info["splits"]:
        sizes = [(directory / file.name).stat().st_size for file, _ in shards[split["name"]]]
        split["numBytes"] = str(sum(sizes) - FRAMING * sum(kept[split["name"]]))
        split["shardLengths"] = [str(count) for count in kept[split["name"]]]
    for file in source.iterdir():
        if file.is_file() and ".tfrecord" not in file.name and file.name not in ("dataset_info.json", "features.json"):
            with replacing(directory / file.name) as temporary:
                shutil.copyfile(file, temporary)
    metadata, new = source / "metadata.json", count_faults(skipped)
    before = json.loads(metadata.read_text()) if metadata.is_file() else {}
    if skipped:
        new["skipped"] = Counter(before.get("skipped", {})) + Counter(new["skipped"])
        write_json(directory / metadata.name, before | new | {"faults": [*before.get("faults", []), *new["faults"]]})
    elif not before:  # an earlier call may have skipped some
        (directory / metadata.name).unlink(missing_ok=True)
    write_json(directory / "features.json", features)
    write_json(directory / "dataset_info.json", info)
