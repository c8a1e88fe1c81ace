"""Reads RLDS datasets written by TFDS: the files of a split, and episodes in canonical form with images undecoded."""

import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from spatialvla_jax.actions import DIMENSIONS
from spatialvla_jax.actions.normalization import dimension_name
from spatialvla_jax.data.features import StoredFeature, find_fields, read_language, read_numbers
from spatialvla_jax.data.images import stored_size, tensorflow
from spatialvla_jax.data.oxe.operations import apply_operations
from spatialvla_jax.data.oxe.spec import DatasetSpec, join_action, split_language
from spatialvla_jax.data.tfrecord import masked_crc, read_example, read_records
from spatialvla_jax.errors import Fault, InputError, StorageError
from spatialvla_jax.utils.camera import intrinsics_problem
from spatialvla_jax.utils.progress import warn
from spatialvla_jax.utils.storage import AnyPath, is_dir, is_file, is_url, list_files, list_names, read_bytes, to_path

UNLABELED = "unlabeled"  # reason for skipping an episode without language if the spec allows it; not a fault
_ROUNDING = 1e-4  # tolerance for grippers outside [0, 1]
_VERSION = re.compile(r"\d+(\.\d+)*(-[0-9A-Za-z-]+(\.[0-9A-Za-z-]+)*)?")


def open_rlds(path: str | os.PathLike[str]) -> Any:
    """The TFDS builder for a dataset's version directory, such as ".../bridge/1.0.0".

    Raises InputError that says what was found if the path is not such a directory.
    """
    path = to_path(path)
    if is_file(path):
        raise InputError(f"{path} is a file: name the dataset's version directory, such as {path.parent}")
    if not is_file(path / "dataset_info.json"):
        if is_dir(path):
            versions = find_versions(path)
            hint = f"it holds the versions {', '.join(versions)}" if versions else f"it holds {_listing(path)}"
            raise InputError(f"{path} is not a dataset's version directory (no dataset_info.json): {hint}")
        if versions := find_versions(path.parent):
            raise InputError(f"{path} does not exist: the versions there are {', '.join(versions)}")
        if is_url(path):
            raise InputError(f"{path} does not exist: {path.parent} holds {_listing(path.parent)}")
        nearest = next(parent for parent in path.absolute().parents if parent.is_dir())
        raise InputError(f"{path} does not exist: {nearest} holds {_listing(nearest)}")
    _check_info(path / "dataset_info.json")
    tensorflow()
    import tensorflow_datasets as tfds

    builder: Any
    try:
        builder = tfds.builder_from_directory(path)
    except StorageError:
        raise
    except Exception as error:  # TFDS raises whatever its parsers raise
        raise InputError(f"{path} is not a readable TFDS dataset: {' '.join(str(error).split())}") from error
    if builder.info.file_format.value != "tfrecord":
        raise InputError(f"{path} is stored as {builder.info.file_format.value}; only tfrecord is read")
    return builder


class Shard(NamedTuple):
    """A file's part of a split."""

    file: AnyPath
    numbers: range  # of the part's episodes within the file
    listed: int  # number of episodes in the whole file, from dataset_info.json
    size: int  # of the file in bytes
    version: int | str  # changes with the file's content; see `storage.list_files`


def _check_info(path: AnyPath) -> None:
    """Raises InputError if dataset_info.json lacks what the names of the dataset's files depend on."""
    try:
        info = json.loads(read_bytes(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON ({error}): copy or write the dataset again") from error
    splits = info.get("splits") if isinstance(info, dict) else None
    if not (splits and isinstance(splits, list) and all(isinstance(one, dict) and one.get("name") for one in splits)):
        raise InputError(f"{path} names no splits, which TFDS writes last: copy or write the dataset again")
    if not isinstance(info.get("name"), str) or not info["name"]:
        raise InputError(f"{path} has no 'name', which starts the names of the dataset's files")


def slice_shards(builder: Any, split: str) -> list[Shard]:
    """The shards that hold a split or a part of one, in order, based on a single listing of the folder.

    `split` uses TFDS's syntax: "train", "train[:95%]", "train[100:200]", "train+val". Parts are ranges of episodes
    across shards. Raises InputError that names the existing splits, or a missing shard.
    """
    try:
        pieces = builder.info.splits[split].file_instructions
    except Exception as error:  # TFDS raises whatever its parsers raise
        known = ", ".join(sorted(name for name in builder.info.splits if name != "all")) or "none"
        raise InputError(
            f"{builder.data_dir} has no split {split!r}: it has {known}, whole or as in 'train[:95%]' "
            f"({' '.join(str(error).split())})"
        ) from error
    if not pieces:
        raise InputError(
            f"The split {split!r} of {builder.data_dir} holds no episodes: dataset_info.json has no shardLengths for "
            "it, or the part is empty"
        )
    folder = to_path(builder.data_dir)
    files = list_files(folder)
    shards = (zip(info.filenames, info.shard_lengths, strict=True) for info in builder.info.splits.values())
    known = {name for listed in shards for name, count in listed if count}
    stems = tuple({piece.basename().partition(".tfrecord")[0] + ".tfrecord" for piece in pieces})
    if extra := sorted(n for n, (size, _) in files.items() if n.startswith(stems) and size and n not in known):
        warn(f"{builder.data_dir}/dataset_info.json lists no episodes in {enumerate_some(extra)}, which is not read")
    for piece in pieces:
        if piece.basename() not in files:
            raise InputError(f"{piece.filename} is missing, a shard of the split {split!r}")
    return [
        Shard(
            folder / piece.basename(),
            range(piece.skip, piece.skip + piece.take),
            piece.examples_in_shard,
            *files[piece.basename()],
        )
        for piece in pieces
    ]


def read_episodes(
    name: str,
    builder: Any,
    file: AnyPath,
    numbers: range,
    spec: DatasetSpec,
    skip: Callable[[str, str], None] | None = None,
    action_dim: int = len(DIMENSIONS),
    listed: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """The canonical episodes `numbers` of one shard, in order, with L steps each:

    action f32[L, A] · language object[L] of str · step i64[L] (number in the stored episode) · image i64[L, 3] (offset
    and length of the encoded image in the file, and its CRC-32C) · if the spec names them, depth i64[L, 3] in the same
    form, intrinsics f32[L, 3, 3] and further arrays · record i64[3] (offset, length and `masked_crc` of the record).

    Verifies the records' checksums, and that a file read to its end holds no more than the `listed` episodes. Raises a
    Fault naming dataset, file, episode and step for bad data. With `skip`, instead calls it with (reason, message) for
    each lost episode and continues. A lost episode has no steps; neither has one without language if the spec skips
    these (`UNLABELED`).
    """
    fields = find_fields(name, builder, spec, action_dim)
    records = read_records(file, skip=numbers.start)
    lost: Fault | None = None  # set if the rest of the file is lost
    for number in numbers:
        try:
            if lost:
                raise lost
            try:
                offset, record, intact = next(records)
            except StopIteration:
                lost = Fault("truncated", f"the file ends early: it should have {numbers.stop} episodes")
                raise lost from None
            except Fault as fault:
                lost = fault
                raise
            if not intact:
                raise Fault("checksum", "the record's checksum is wrong")
            if len(record) >= 2**31:
                raise Fault("too long", f"the record has {len(record):,} bytes; protocol buffers have less than 2 GiB")
            episode = _episode(record, offset, spec, fields, action_dim)
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
        except Fault:  # these bytes are not a record, so the next one cannot be found
            records = iter(())
        more = f"dataset_info.json lists {listed} episodes in the file, and this is one more"
        sentence = f"dataset {name!r}, file {file}, episode {number}: {more}"
        if not skip:
            raise Fault("unlisted", sentence)
        skip("unlisted", sentence)


def _episode(
    record: bytes, offset: int, spec: DatasetSpec, fields: dict[str, StoredFeature], action_dim: int
) -> dict[str, np.ndarray]:
    features = read_example(record, {f"steps/{key}{name}" for key, field in fields.items() for name in field.names})
    steps: dict[str, np.ndarray] = {}
    length = len(features.get(f"steps/{spec.image}", ()))
    if not length:
        raise Fault("no steps", "the episode has no steps")
    words, which = split_language(spec.language) if spec.instruction is None else ("", None)
    for key, field in fields.items():
        if key == words:
            continue
        value = steps[key] = read_numbers(features, key, field, length)
        if (broken := np.argwhere(~np.isfinite(value))).size:
            step, *place = broken[0].tolist()
            raise Fault("not finite", f"step {step} has the {key} value {value[tuple(broken[0])]} in dimension {place}")
    action = join_action(spec, steps, length)
    if words:
        language = read_language(record, features, words, which, fields[words], length)
    else:
        language = np.full(length, spec.instruction, object)
    missing = np.flatnonzero([not text for text in language])
    if spec.skip_unlabeled and missing.size == length:
        return {"step": np.empty(0, np.int64)}
    if missing.size:
        raise Fault("no language", f"step {missing[0]} has no language ({spec.language!r} is empty)")
    episode = {"action": action, "language": language, "step": np.arange(length)}
    cameras = (spec.image,) if spec.depth else (spec.image, *spec.other_images)
    images = steps[cameras[zlib.crc32(action.tobytes()) % len(cameras)]]
    episode["image"] = _spans(record, offset, images)
    if (empty := np.flatnonzero(episode["image"][:, 1] == 0)).size:
        raise Fault("no image", f"step {empty[0]} has an image of 0 bytes")
    if spec.depth:
        episode["depth"] = _spans(record, offset, steps[spec.depth])
    if spec.intrinsics:
        episode["intrinsics"] = steps[spec.intrinsics].astype(np.float32)
        _check_cameras(steps[spec.intrinsics], (record[first : first + size] for first, size in images.tolist()), spec)
    episode |= {key: steps[key] for key in spec.arrays}
    episode = apply_operations(episode, spec.operations)
    if not len(episode["step"]):
        raise Fault("no steps", f"no steps are left of {length} after {[name for name, *_ in spec.operations]}")
    _check_action(episode["action"], episode["step"], action_dim, spec)
    return episode


def _spans(record: bytes, start: int, spans: np.ndarray) -> np.ndarray:
    """Offset and length of byte strings in a record i64[L, 2] → offset in the file, length and CRC-32C i64[L, 3]."""
    checksums = [google_crc32c.value(record[offset : offset + length]) for offset, length in spans.tolist()]
    return np.stack([spans[:, 0] + start, spans[:, 1], np.asarray(checksums, np.int64)], axis=1)


def _check_cameras(cameras: np.ndarray, images: Iterator[bytes], spec: DatasetSpec) -> None:
    """Raises a Fault naming the first step of an episode whose intrinsics [L, 3, 3] do not fit its images.

    Assumes that all images have the size of the first readable one; undecodable ones are found when they are read.
    """
    size = next(filter(None, map(stored_size, images)), None)
    _, steps = np.unique(cameras.reshape(len(cameras), -1), axis=0, return_index=True)  # nearly always one
    for step in sorted(steps.tolist()) if size else ():
        if wrong := intrinsics_problem(cameras[step], size):
            raise Fault("camera", f"step {step} has invalid intrinsics: {spec.intrinsics!r} {wrong}")


def _check_action(action: np.ndarray, steps: np.ndarray, action_dim: int, spec: DatasetSpec) -> None:
    """Raises a Fault naming step, dimension and value if an episode's canonical action is invalid."""
    after = f" after {', '.join(name for name, *_ in spec.operations)}" if spec.operations else ""
    if action.shape[1] != action_dim:
        raise Fault("shape", f"the action is {action.shape[1]} wide{after}; {action_dim} is expected")
    if (broken := np.argwhere(~np.isfinite(action))).size:
        row, column = broken[0].tolist()
        value, dimension = action[row, column], dimension_name(column, action_dim)
        raise Fault("not finite", f"step {steps[row]} has {value} as the {dimension} of its action{after}")
    gripper = action[:, -1]
    if (outside := np.flatnonzero((gripper < -_ROUNDING) | (gripper > 1 + _ROUNDING))).size:
        raise Fault(
            "gripper",
            f"step {steps[outside[0]]} has {gripper[outside[0]]:g} as the gripper of its action{after}, and the "
            f"episode goes from {gripper.min():g} to {gripper.max():g}; 0 (closed) to 1 (open) is expected: the spec "
            'needs an operation, such as ("gripper_range", CLOSED, OPENED)',
        )


def version_of(path: str | os.PathLike[str]) -> str:
    """The version of a dataset's version directory; "" if its name is not a version."""
    name = os.fspath(path).rstrip("/").rpartition("/")[2]
    return name if _VERSION.fullmatch(name) else ""


def find_versions(path: AnyPath) -> list[str]:
    """The version directories of a dataset, oldest first. Pre-releases ("2.0.0-rc1") come before all releases.
    Unfinished ones ("1.0.0.incompleteX"), hidden directories and other names are ignored."""
    names = [name for name in list_names(path) if _VERSION.fullmatch(name)]
    return sorted((name for name in names if is_file(path / name / "dataset_info.json")), key=_version_order)


def _version_order(name: str) -> tuple[bool, list[int], list[tuple[int, int, str]]]:
    numbers, _, pre = name.partition("-")
    parts = [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in pre.split(".")]
    return not pre, [int(part) for part in numbers.split(".")], parts


def _listing(path: AnyPath) -> str:
    return enumerate_some(list_names(path)) or "nothing"


def enumerate_some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
