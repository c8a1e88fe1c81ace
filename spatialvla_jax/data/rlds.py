"""RLDS datasets as TFDS writes them: which files hold a split, and their episodes in canonical form, images unread."""

import itertools
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from spatialvla_jax.actions import DIMENSIONS
from spatialvla_jax.data.images import tensorflow
from spatialvla_jax.data.oxe.operations import apply_operations, width_before
from spatialvla_jax.data.oxe.spec import DatasetSpec, action_keys, action_width, join_action
from spatialvla_jax.data.tfrecord import masked_crc, read_example, read_records
from spatialvla_jax.errors import Fault, InputError
from spatialvla_jax.utils.progress import warn

UNLABELED = "unlabeled"  # why an episode is left out that its spec says to leave out; no fault
_VERSION = re.compile(r"\d+(\.\d+)*(-[0-9A-Za-z-]+(\.[0-9A-Za-z-]+)*)?")


def open_rlds(path: str | os.PathLike[str]) -> Any:
    """The TFDS builder of a dataset's version directory, such as ".../bridge/1.0.0".

    Raises InputError that says what is there instead when it is not such a directory.
    """
    path = Path(path)
    if not (path / "dataset_info.json").is_file():
        if path.is_dir():
            versions = find_versions(path)
            hint = f"it holds the versions {', '.join(versions)}" if versions else f"it holds {_listing(path)}"
            raise InputError(f"{path} is not a dataset's version directory (no dataset_info.json): {hint}")
        if versions := find_versions(path.parent):
            raise InputError(f"{path} does not exist: the versions there are {', '.join(versions)}")
        nearest = next(parent for parent in path.absolute().parents if parent.is_dir())
        raise InputError(f"{path} does not exist: {nearest} holds {_listing(nearest)}")
    tensorflow()
    import tensorflow_datasets as tfds

    builder: Any
    try:
        builder = tfds.builder_from_directory(path)
    except Exception as error:  # TFDS raises whatever its parsers raise
        raise InputError(f"{path} is not a readable TFDS dataset: {error}") from error
    if builder.info.file_format.value != "tfrecord":
        raise InputError(f"{path} is stored as {builder.info.file_format.value}; only tfrecord is read")
    return builder


class Shard(NamedTuple):
    """A file's part of a split."""

    file: Path
    numbers: range  # of the part's episodes within the file
    listed: int  # episodes of the whole file, as dataset_info.json says
    size: int  # bytes
    modified: int  # nanoseconds since 1970


def list_files(folder: Path) -> dict[str, tuple[int, int]]:
    """The files in a folder, {name: (bytes, time of the last change in nanoseconds)}. Raises InputError."""
    try:
        with os.scandir(folder) as entries:
            stats = {entry.name: entry.stat() for entry in entries if entry.is_file()}
    except OSError as error:
        raise InputError(f"{folder} cannot be listed: {error.strerror or error}") from error
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def slice_shards(builder: Any, split: str) -> list[Shard]:
    """The shards that hold a split or a part of one, in order, as one listing of the folder shows them.

    `split` is written as TFDS does: "train", "train[:95%]", "train[100:200]", "train+val". Parts are ranges of
    episodes, whichever shards those lie in. Raises InputError naming the splits that exist, or a shard that does not.
    """
    try:
        pieces = builder.info.splits[split].file_instructions
    except ValueError as error:
        known = ", ".join(sorted(name for name in builder.info.splits if name != "all")) or "none"
        raise InputError(
            f"{builder.data_dir} has no split {split!r}: it has {known}, whole or as in 'train[:95%]'"
        ) from (error)
    if not pieces:
        raise InputError(f"The split {split!r} of {builder.data_dir} holds no episodes")
    files = list_files(Path(builder.data_dir))
    shards = (zip(info.filenames, info.shard_lengths, strict=True) for info in builder.info.splits.values())
    known = {name for own in shards for name, count in own if count}
    stems = tuple({piece.basename().partition(".tfrecord")[0] + ".tfrecord" for piece in pieces})
    if extra := sorted(n for n, (size, _) in files.items() if n.startswith(stems) and size and n not in known):
        warn(f"{builder.data_dir}/dataset_info.json lists no episodes in {enumerate_some(extra)}, which is not read")
    for piece in pieces:
        if piece.basename() not in files:
            raise InputError(f"{piece.filename} is missing, a shard of the split {split!r}")
    return [
        Shard(
            Path(piece.filename),
            range(piece.skip, piece.skip + piece.take),
            piece.examples_in_shard,
            *files[piece.basename()],
        )
        for piece in pieces
    ]


def read_episodes(
    name: str,
    builder: Any,
    file: Path,
    numbers: range | int,
    spec: DatasetSpec,
    skip: Callable[[str, str], None] | None = None,
    action_dim: int = len(DIMENSIONS),
    listed: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """The canonical episodes `numbers` of one shard (or so many from its first on), in order; L steps each:

    action f32[L, A] · language object[L] of str · step i64[L] (number in the stored episode) · image i64[L, 3] (offset
    and length of the encoded image in the file, and its CRC-32C) and, where the spec names them, depth i64[L, 3] alike,
    intrinsics f32[L, 3, 3] and its further arrays · record i64[3] (offset, length and `masked_crc` of the record).

    Checks the records' checksums, and that a file read to its end holds no more than the `listed` episodes. For what is
    wrong raises a Fault naming dataset, file, episode and step; or, with `skip`, calls it with (reason, that sentence)
    for every episode lost and goes on. A lost episode has no steps, and neither has one without language if the spec
    leaves those out (`UNLABELED`).
    """
    shapes = _shapes(name, builder, spec, action_dim)
    numbers = range(numbers) if isinstance(numbers, int) else numbers
    records = read_records(file, skip=numbers.start)
    lost: Fault | None = None  # the rest of the file
    for number in numbers:
        try:
            if lost:
                raise lost
            try:
                offset, record, intact = next(records)
            except StopIteration:
                lost = Fault("truncated", f"the file ends early, it should hold {numbers.stop} episodes")
                raise lost from None
            except Fault as fault:
                lost = fault
                raise
            if not intact:
                raise Fault("checksum", "the record's checksum is wrong")
            episode = _episode(record, offset, spec, shapes)
            episode["record"] = np.asarray([offset, len(record), masked_crc(record)])
            if skip and not len(episode["step"]):
                skip(UNLABELED, "")
        except InputError as error:
            reason = error.reason if isinstance(error, Fault) else "invalid"
            sentence = f"dataset {name!r}, file {file}, episode {number}: {error}"
            if not skip:
                raise Fault(reason, sentence) from error
            skip(reason, sentence)
            episode = {"step": np.empty(0, np.int64)}
        yield episode
    if listed != numbers.stop or lost:
        return
    for number in itertools.count(numbers.stop):
        try:
            if next(records, None) is None:
                return
        except Fault:  # bytes that are no record: nobody knows what follows
            records = iter(())
        more = f"dataset_info.json lists {listed} episodes in the file, and this is one more"
        sentence = f"dataset {name!r}, file {file}, episode {number}: {more}"
        if not skip:
            raise Fault("unlisted", sentence)
        skip("unlisted", sentence)


def _episode(
    record: bytes, offset: int, spec: DatasetSpec, shapes: dict[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    features = read_example(record, {f"steps/{key}" for key in shapes})
    steps: dict[str, np.ndarray] = {}
    length = len(features.get(f"steps/{spec.image}", ()))
    if not length:
        raise Fault("no steps", "the episode has no steps")
    for key, shape in shapes.items():
        value = features.get(f"steps/{key}", np.empty(0))
        if value.size != length * int(np.prod(shape)):
            raise Fault("shape", f"{key!r} has {value.size} values for {length} steps of shape {shape}")
        value = value.reshape(length, *shape)
        if (broken := np.argwhere(~np.isfinite(value))).size:
            step, *place = broken[0].tolist()
            raise Fault("not finite", f"step {step} has the {key} value {value[tuple(broken[0])]} in dimension {place}")
        steps[key] = value
    action = join_action(spec, steps, length)
    if spec.instruction is None:
        language = np.asarray([_text(record, words) for words in steps[spec.language]], object)
    else:
        language = np.full(length, spec.instruction, object)
    missing = np.flatnonzero([not text for text in language])
    skip = spec.skip_unlabeled and missing.size == length
    if missing.size and not skip:
        raise Fault("no language", f"step {missing[0]} has no language ({spec.language!r} is empty)")
    episode = {"action": action, "language": language, "step": np.arange(length)}
    cameras = (spec.image,) if spec.depth else (spec.image, *spec.other_images)
    episode["image"] = _spans(record, offset, steps[cameras[zlib.crc32(action.tobytes()) % len(cameras)]])
    if spec.depth:
        episode["depth"] = _spans(record, offset, steps[spec.depth])
    if spec.intrinsics:
        episode["intrinsics"] = steps[spec.intrinsics].astype(np.float32)
    episode |= {key: steps[key] for key in spec.arrays}
    episode = apply_operations(episode, spec.operations)
    if not len(episode["step"]):
        raise Fault("no steps", f"no steps are left of {length} after {[name for name, *_ in spec.operations]}")
    return {key: value[:0] for key, value in episode.items()} if skip else episode


def _spans(record: bytes, start: int, spans: np.ndarray) -> np.ndarray:
    """Offset and length of byte strings in a record i64[L, 2] → offset in the file, length and CRC-32C i64[L, 3]."""
    checksums = [google_crc32c.value(record[offset : offset + length]) for offset, length in spans.tolist()]
    return np.stack([spans[:, 0] + start, spans[:, 1], np.asarray(checksums, np.int64)], axis=1)


def _text(record: bytes, words: np.ndarray) -> str:
    """Words from their span (offset, length) in the record, or from their bytes as numbers, ended by a zero."""
    try:
        is_span = len(words) == 2
        text = record[words[0] : words[0] + words[1]] if is_span else bytes(words.tolist()).split(b"\0")[0]
        return text.decode().strip()
    except ValueError as error:
        raise Fault("not UTF-8", "the language instruction is not UTF-8") from error


def _shapes(name: str, builder: Any, spec: DatasetSpec, action_dim: int) -> dict[str, tuple[int, ...]]:
    """Shape of every key of a step that the spec reads; (2,) = (offset, length) where it is bytes. InputError when one
    is missing or the action is not `action_dim` wide."""
    if "steps" not in builder.info.features:
        raise InputError(f"{builder.data_dir} is not an RLDS dataset: its episodes have no 'steps'")
    images = (spec.image, *spec.other_images, spec.depth)
    keys = [spec.image, *spec.other_images, *action_keys(spec), *spec.arrays]
    keys += [key for key in (spec.depth, spec.intrinsics) if key] + [spec.language] * (spec.instruction is None)
    shapes = {}
    for key in keys:
        feature = _feature(builder.info.features["steps"].feature, key)
        if feature is None:
            raise InputError(f"Dataset {name!r} ({builder.data_dir}) has no key {key!r} in its steps")
        text = key == spec.language and not np.issubdtype(feature.np_dtype, np.integer)
        shapes[key] = (2,) if text or key in images else tuple(feature.shape)
        if key == spec.depth and feature.np_dtype != np.uint16:
            raise InputError(f"Dataset {name!r} has {key!r} as {feature.np_dtype}; a 16-bit PNG is expected")
    width, expected = action_width(spec, shapes), width_before(spec.operations, action_dim)
    if width != expected:
        found = " + ".join(f"{part} {shapes[part]}" if part in shapes else str(part) for part in spec.action)
        raise InputError(
            f"Dataset {name!r} ({builder.data_dir}) has an action {width} wide ({found}); {expected} is expected"
        )
    if spec.intrinsics and shapes[spec.intrinsics] != (3, 3):
        raise InputError(f"Dataset {name!r} has intrinsics of shape {shapes[spec.intrinsics]}; (3, 3) is expected")
    return shapes


def _feature(features: Any, key: str) -> Any:
    """The feature at the path `key`, or None. Names may hold slashes themselves ("future/xyz_residual")."""
    if not hasattr(features, "keys"):
        return None
    for name in features:
        if key == name:
            return features[name]
        if key.startswith(f"{name}/") and (feature := _feature(features[name], key[len(name) + 1 :])) is not None:
            return feature
    return None


def find_versions(path: Path) -> list[str]:
    """The version directories of a dataset, oldest first. Pre-releases ("2.0.0-rc1") come before every release. What
    TFDS has not finished ("1.0.0.incompleteX"), hidden directories and other names are no versions."""
    if not path.is_dir():
        return []
    names = [child.name for child in path.iterdir() if (child / "dataset_info.json").is_file()]
    return sorted(filter(_VERSION.fullmatch, names), key=_version_order)


def _version_order(name: str) -> tuple[bool, list[int], list[tuple[int, int, str]]]:
    numbers, _, pre = name.partition("-")
    parts = [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in pre.split(".")]
    return not pre, [int(part) for part in numbers.split(".")], parts


def _listing(path: Path) -> str:
    return enumerate_some(sorted(child.name for child in path.iterdir())) or "nothing"


def enumerate_some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
