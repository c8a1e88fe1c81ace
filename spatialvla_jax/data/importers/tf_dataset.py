"""Any `tf.data.Dataset` of trajectories, such as a dlimp pipeline makes, as an RLDS dataset on disk.

The pipeline runs once and its result is stored; then it is a dataset like any other, shuffled by arithmetic and resumed
at once at any step. Streaming from the pipeline itself could not do that: a `tf.data.Dataset` has no random access, so
a shuffle needs a buffer of frames in memory, and to go on where a run stopped it must be replayed from its start, or
its iterator's state saved, buffer included, with every checkpoint. Storing costs the disk what the images take.
"""

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spatialvla_jax.data.images import tensorflow
from spatialvla_jax.data.importers.rlds_writer import VERSION, check_out
from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.atomic import replacing

_EPISODES_PER_SHARD = 64


def write_rlds(
    splits: Mapping[str, Iterable[Any]],
    out: str | os.PathLike[str],
    *,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> tuple[Path, dict[str, str]]:
    """Writes {split: dataset} and returns the version directory `out`/1.0.0 and what each key has become.

    A dataset is a `tf.data.Dataset`, or any iterable, of trajectories: nested dicts of arrays [L, ...], one row a step.
    Encoded images (JPEG, PNG) are stored as they are, u8[L,H,W,3] and u16[L,H,W,1] as PNG, other byte strings as text,
    numbers as tensors. Keys are then named by their path ("observation/image") in a dataset's spec.

    `progress(split, trajectories done, all or None where the dataset cannot tell)` is called meanwhile. The directory
    appears by rename when all is written. Raises InputError.
    """
    tensorflow()
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity

    out = Path(out)
    check_out(out)
    features: dict[str, Any] = {}
    writer: Any = None
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / VERSION) as directory:
        for split, dataset in splits.items():
            total = _length(dataset)
            for number, trajectory in enumerate(_numpy(dataset)):
                where = f"trajectory {number} of {split!r}"
                columns = _columns(trajectory, where)
                if writer is None:
                    features = {key: _feature(key, column, where) for key, column in columns.items()}
                    identity = DatasetIdentity(
                        name=out.name, version=tfds.core.Version(VERSION), data_dir=str(directory), module_name=__name__
                    )
                    steps = tfds.features.Dataset(_nested(features))
                    info = tfds.core.DatasetInfo(
                        builder=identity, features=tfds.features.FeaturesDict({"steps": steps})
                    )
                    directory.mkdir()
                    writer = tfds.core.SequentialWriter(info, _EPISODES_PER_SHARD)
                    writer.initialize_splits(list(splits))
                if differing := columns.keys() ^ features.keys():
                    raise InputError(f"{where} has not the keys of the first one: they differ in {sorted(differing)}")
                rows = zip(*columns.values(), strict=True)
                episode = {"steps": [_nested(dict(zip(columns, row, strict=True))) for row in rows]}
                try:
                    writer.add_examples({split: [episode]})
                except Exception as error:  # TFDS raises whatever its encoders raise
                    raise InputError(f"{where} is not like the first one: {error}") from error
                if progress:
                    progress(split, number + 1, total)
        if writer is None:
            raise InputError(f"there are no trajectories in {', '.join(splits)}")
        writer.close_all()
    return out / VERSION, {key: _describe(feature) for key, feature in features.items()}


def trajectories_of(function: str) -> dict[str, Iterable[Any]]:
    """What the function "module:name" returns: {split: dataset}, or a dataset, which is then the split "train"."""
    module, _, name = function.partition(":")
    try:
        made = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{function!r} is not a function without arguments, written module:name: {error}") from error
    return dict(made) if isinstance(made, Mapping) else {"train": made}


def _numpy(dataset: Any) -> Iterator[Any]:
    return dataset.as_numpy_iterator() if hasattr(dataset, "as_numpy_iterator") else iter(dataset)


def _length(dataset: Any) -> int | None:
    if hasattr(dataset, "cardinality"):
        return int(dataset.cardinality()) if int(dataset.cardinality()) >= 0 else None
    return len(dataset) if hasattr(dataset, "__len__") else None


def _columns(trajectory: Any, where: str) -> dict[str, np.ndarray]:
    """A trajectory's arrays by path. Raises InputError unless they have one row a step."""
    if not isinstance(trajectory, Mapping):
        raise InputError(f"{where} is {type(trajectory).__name__}: expected a dict of arrays with one row a step")

    def walk(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, np.ndarray]]:
        for key, value in tree.items():
            if isinstance(value, Mapping):
                yield from walk(value, f"{prefix}{key}/")
            else:
                yield f"{prefix}{key}", np.asarray(value)

    columns = dict(walk(trajectory, ""))
    lengths = {key: column.shape[:1] for key, column in columns.items()}
    if len(set(lengths.values())) != 1 or () in lengths.values():
        listed = ", ".join(f"{key} {columns[key].shape}" for key in columns)
        raise InputError(f"{where} must have one row a step in every array, but their shapes are {listed}")
    return columns


def _feature(key: str, column: np.ndarray, where: str) -> Any:
    """How TFDS is to store a column."""
    import tensorflow_datasets as tfds

    if not len(column):
        raise InputError(f"{where} has no steps; the first one decides how each key is stored")
    if column.dtype.kind in "OSU":
        first = column[0] if isinstance(column[0], bytes) else str(column[0]).encode()
        if first.startswith(b"\xff\xd8"):
            return tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
        if first.startswith(b"\x89PNG"):
            deep = first[24:26] == b"\x10\x00"  # 16 bits, grey
            return _png(1, np.uint16) if deep else _png(3, np.uint8)
        return tfds.features.Text()
    if column.ndim == 4 and (column.dtype, column.shape[3]) in ((np.uint8, 3), (np.uint16, 1)):
        return _png(column.shape[3], column.dtype.type)
    return tfds.features.Tensor(shape=column.shape[1:], dtype=column.dtype.type)


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
