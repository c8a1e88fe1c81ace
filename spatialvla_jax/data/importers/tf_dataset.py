"""Stores any `tf.data.Dataset` of trajectories, such as a dlimp pipeline's, as an RLDS dataset on disk.

The pipeline runs once and its result is stored. Afterwards it is a dataset like any other, shuffled arithmetically and
resumed instantly at any step. Streaming from the pipeline could not do this, as a `tf.data.Dataset` has no random
access. Shuffling would need a buffer of frames in memory. Resuming would need a replay from the start, or a saved
iterator, buffer included, in every checkpoint. The price of storing is disk space for the images.
"""

import importlib
import inspect
import os
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from spatialvla_jax.data.images import tensorflow
from spatialvla_jax.data.importers.frames import IMAGE, channels_last, check_encoded, is_depth, is_encoded, to_pixels
from spatialvla_jax.data.importers.rlds_writer import (
    VERSION,
    FaultPolicy,
    check_out,
    count_faults,
    dataset_info,
    tolerate,
)
from spatialvla_jax.errors import Fault, InputError
from spatialvla_jax.utils.atomic import new_directory

_EPISODES_PER_SHARD = 64
_SMALLEST_FRAME = 8  # pixels per side; smaller arrays other than uint8 are not frames but, say, joint positions


class PipelineError(InputError):
    """The user's own code raised `__cause__`."""


def write_rlds(
    splits: Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    faults: FaultPolicy = "fail",
    progress: Callable[[str, int, int | None], None] | None = None,
) -> tuple[Path, dict[str, str], list[Fault]]:
    """Write {split: dataset}. Returns the version directory `out`/1.0.0, what each key was stored as, and a fault for
    each skipped trajectory.

    A dataset is a `tf.data.Dataset`, or any iterable, of trajectories: nested dicts of arrays [L, ...], one row per
    step. Encoded images (JPEG, PNG) are stored unchanged. Numeric frames, as accepted by `to_pixels`, and depth,
    u16[L,H,W] or u16[L,H,W,1], become PNGs. Other byte strings become text, other numbers tensors. In a dataset's spec,
    keys are then named by their path ("observation/image").

    `progress(split, trajectories done, total or None if unknown)` is called meanwhile. The directory appears by rename
    when everything is written. Raises InputError, and PipelineError for errors of a dataset. With `faults` "skip",
    faulty trajectories are skipped instead, and the dataset's metadata (metadata.json) counts and names them.
    """
    tf = tensorflow()
    import tensorflow_datasets as tfds

    out = Path(out)
    check_out(out)
    _check_splits(splits)
    features: dict[str, Any] = {}
    skipped: list[Fault] = []
    info: Any = None
    writer: Any = None  # made for the first trajectory, which decides how each key is stored
    try:
        with new_directory(out / VERSION) as directory:
            for split, dataset in splits.items():
                total, lost = _length(dataset, split), len(skipped)
                number = -1
                for number, trajectory in enumerate(_trajectories(dataset, split)):
                    try:
                        columns, found = _stored(trajectory, features)
                        if not features:
                            features = found
                            steps = {"steps": tfds.features.Dataset(_nested(features))}
                            info = dataset_info(
                                out.absolute().name, directory, tfds.features.FeaturesDict(steps), skipped=[]
                            )
                            writer = tfds.core.SequentialWriter(info, _EPISODES_PER_SHARD)
                            writer.initialize_splits(list(splits))
                        rows = zip(*columns.values(), strict=True)
                        episode = {"steps": [_nested(dict(zip(columns, row, strict=True))) for row in rows]}
                        writer.add_examples({split: [episode]})
                    except Fault as fault:
                        fault = Fault(fault.reason, f"trajectory {number} of {split!r}: {fault}")
                        skipped.append(tolerate(fault, faults))
                    if progress:
                        progress(split, number + 1, total)
                if number + 1 == len(skipped) - lost:
                    first = f"; the first fault: {skipped[lost]}" if skipped[lost:] else ""
                    raise InputError(f"there are no trajectories in {split!r}{first}")
            info.metadata.update(count_faults(skipped))
            writer.close_all()
    except tf.errors.OpError as error:
        raise InputError(f"{out} cannot be written: {error.message}") from error
    return out / VERSION, {key: _describe(feature) for key, feature in features.items()}, skipped


def trajectories_of(function: str) -> dict[str, Any]:
    """The result of the function "module:name": {split: dataset}, or a dataset, which becomes the split "train".

    Raises InputError if there is no such function, and PipelineError for errors of the module or the function.
    """
    expected = f"{function!r} is not a function without arguments, written module:name"
    module, _, name = function.partition(":")
    if not (module and name):
        raise InputError(expected)
    try:
        with _theirs(f"the module {module!r}"):
            make = getattr(importlib.import_module(module), name, None)
    except PipelineError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and f"{module}.".startswith(f"{cause.name}."):
            raise InputError(f"{expected}: {cause}") from None
        raise
    if not callable(make):
        raise InputError(f"{expected}: {module} has no function {name!r}")
    try:
        inspect.signature(make).bind()
    except (TypeError, ValueError) as error:
        raise InputError(f"{expected}: {error}") from error
    with _theirs(repr(function)):
        splits = make()
    return dict(splits) if isinstance(splits, Mapping) else {"train": splits}


def their_traceback(error: PipelineError) -> str:
    """The traceback of the user's error, without our frames and those of the import machinery."""
    cause, ours = error.__cause__ or error, Path(__file__).parents[2]
    frames = cause.__traceback__
    while frames and (Path(file := frames.tb_frame.f_code.co_filename).is_relative_to(ours) or "importlib" in file):
        frames = frames.tb_next
    return "".join(traceback.format_exception(cause.with_traceback(frames)))


@contextmanager
def _theirs(what: str) -> Iterator[None]:
    """Convert errors of the user's code, which runs inside, to PipelineError."""
    try:
        yield
    except Exception as error:
        raise PipelineError(f"{what} raised {type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """The first line of an error's message, without TensorFlow's own notes."""
    return (re.sub(r"{{.*?}}", "", str(error)).strip().splitlines() or ["no message"])[0][:300]


def _check_splits(splits: Mapping[str, Any]) -> None:
    if not splits:
        raise InputError("there are no splits: expected a dataset of trajectories, or {split: dataset}")
    for split, dataset in splits.items():
        if not (isinstance(split, str) and re.fullmatch(r"\w+", split)) or split == "all":
            raise InputError(f"a split is named {split!r}: letters, digits and underscores are expected")
        if not isinstance(dataset, Iterable) or isinstance(dataset, str | bytes):
            raise InputError(
                f"the split {split!r} is {type(dataset).__name__}: expected a tf.data.Dataset, or another iterable of "
                "trajectories"
            )


def _trajectories(dataset: Any, split: str) -> Iterator[Any]:
    what, end = f"the dataset of {split!r}", object()
    with _theirs(what):
        iterator = dataset.as_numpy_iterator() if hasattr(dataset, "as_numpy_iterator") else iter(dataset)
    while True:
        with _theirs(what):
            trajectory = next(iterator, end)
        if trajectory is end:
            return
        yield trajectory


def _length(dataset: Any, split: str) -> int | None:
    with _theirs(f"the dataset of {split!r}"):
        if hasattr(dataset, "cardinality"):
            return int(dataset.cardinality()) if int(dataset.cardinality()) >= 0 else None
        return len(dataset) if hasattr(dataset, "__len__") else None


def _stored(trajectory: Any, features: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A trajectory's arrays by path, as they are stored, and their TFDS features. Raises a Fault unless these equal
    `features`, which come from the first trajectory, or `features` is empty."""
    columns, found = _columns(trajectory), {}
    if features and (differing := columns.keys() ^ features.keys()):
        raise Fault("keys", f"its keys differ from those of the first one in {sorted(differing)}")
    for key, column in columns.items():
        try:
            columns[key], found[key] = _feature(column)
        except Fault as fault:
            raise Fault(fault.reason, f"{key}: {fault}") from fault
        if features and (kind := _describe(found[key])) != (first := _describe(features[key])):
            raise Fault("kind", f"it differs from the first one: {key} is {kind}, not {first}")
    return columns, found


def _columns(trajectory: Any) -> dict[str, np.ndarray]:
    """A trajectory's arrays by path. Raises a Fault unless each has one row per step."""
    if not isinstance(trajectory, Mapping):
        raise Fault("kind", f"it is {type(trajectory).__name__}: expected a dict of arrays with one row per step")

    def walk(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, np.ndarray]]:
        for key, value in tree.items():
            if isinstance(value, Mapping):
                yield from walk(value, f"{prefix}{key}/")
                continue
            try:
                yield f"{prefix}{key}", np.asarray(value)
            except (TypeError, ValueError) as error:
                raise Fault("shape", f"{prefix}{key} is not an array: {_first_line(error)}") from error

    columns = dict(walk(trajectory, ""))
    lengths = {key: column.shape[:1] for key, column in columns.items()}
    if len(set(lengths.values())) != 1 or () in lengths.values():
        listed = ", ".join(f"{key} {columns[key].shape}" for key in columns)
        raise Fault("shape", f"it must have one row per step in every array, but their shapes are {listed}")
    if (0,) in lengths.values():
        raise Fault("no steps", "it has no steps")
    if nested := [key for key in columns if any(other.startswith(f"{key}/") for other in columns)]:
        raise Fault("keys", f"{nested[0]!r} is an array, but there are keys within it")
    return columns


def _feature(column: np.ndarray) -> tuple[np.ndarray, Any]:
    """A column as it is stored, and its TFDS feature. Raises a Fault if it cannot be stored or read again."""
    import tensorflow_datasets as tfds

    if column.dtype == object and not all(isinstance(cell, bytes | str) for cell in column.flat):
        try:
            column = np.asarray(column.tolist())
        except ValueError as error:
            raise Fault("shape", f"rows have different shapes: {_first_line(error)}") from error
        if column.dtype.kind in "OSU":
            raise Fault("dtype", "rows are Python objects: expected numbers, texts or encoded images")
    if column.dtype.kind in "OSU":
        return _feature_of_strings(column)
    if column.dtype.kind not in "biuf":
        raise Fault("dtype", f"{column.dtype} cannot be stored: expected numbers, texts or encoded images")
    if column.dtype == np.uint16 and column.ndim in (3, 4) and (depth := channels_last(column)).shape[3] == 1:
        return depth, _png(1, np.uint16)
    if _are_frames(column):
        column = to_pixels(column)
        return column, _png(column.shape[3], np.uint8)
    return column, tfds.features.Tensor(shape=column.shape[1:], dtype=column.dtype.type)


def _feature_of_strings(column: np.ndarray) -> tuple[np.ndarray, Any]:
    """`_feature` for encoded images and texts."""
    import tensorflow_datasets as tfds

    if column.size != len(column):
        raise Fault("shape", f"a step has strings of the shape {list(column.shape[1:])}: one is expected")
    cells = [cell if isinstance(cell, bytes) else str(cell).encode() for cell in column.ravel()]
    if any(map(is_encoded, cells)):
        if len(deep := {is_depth(cell) for cell in cells}) > 1:
            raise Fault(IMAGE, "some images are 16-bit depth, others are not")
        images = np.asarray([check_encoded(cell) for cell in cells], object)
        if deep == {True}:
            return images, _png(1, np.uint16)
        jpeg = tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
        return images, jpeg if cells[0].startswith(b"\xff\xd8") else _png(3, np.uint8)
    try:
        texts = [cell.decode() for cell in cells]
    except UnicodeDecodeError as error:
        raise Fault("text", "a byte string is neither a JPEG, a PNG nor UTF-8 text") from error
    return np.asarray(texts, object), tfds.features.Text()


def _are_frames(column: np.ndarray) -> bool:
    """Whether numbers are pixels: uint8 with at least two dimensions per step, or others shaped like frames."""
    if column.dtype == np.uint8 or column.dtype.kind not in "iuf" or column.ndim != 4:
        return column.dtype == np.uint8 and column.ndim > 2
    first, height, last = column.shape[1:]
    return (last in (3, 4) and min(first, height) >= _SMALLEST_FRAME) or (
        first in (3, 4) and min(height, last) >= _SMALLEST_FRAME
    )


def _png(channels: int, dtype: Any) -> Any:
    import tensorflow_datasets as tfds

    return tfds.features.Image(shape=(None, None, channels), dtype=dtype, encoding_format="png")


def _describe(feature: Any) -> str:
    kind = type(feature).__name__.lower()
    return (
        kind
        if kind == "text"
        else f"{kind} {np.dtype(feature.np_dtype).name}{list(feature.shape)}".replace("None", "?")
    )


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree
