"""Our own runs: `<workdir>/checkpoints/<step>/{params, optimizer, metadata}`, by training or by a conversion.

The arrays lie in chunks, each with a CRC-32C that the array store verifies whenever it reads one: a restore on a pod
checks the chunks that each host reads, a conversion all of `params`. The store's own index has checksums, too.
"""

import contextlib
import io
import json
import logging
import os
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from orbax.checkpoint._src.serialization import tensorstore_utils

from spatialvla_jax.checkpoints.mapping import check_arrays, flatten, param_shapes, unflatten
from spatialvla_jax.checkpoints.processor import Processor, parse_checkpoint
from spatialvla_jax.checkpoints.types import Checkpoint, LazyArray, finite, read_json
from spatialvla_jax.errors import InputError
from spatialvla_jax.models.spatialvla import SpatialVLAConfig
from spatialvla_jax.utils.atomic import new_directory

FOLDER = "checkpoints"
CONTENTS = "_CHECKPOINT_METADATA"  # of a step: Orbax's list of what it consists of
METADATA = "metadata/metadata"
CHUNK_BYTES = 64 * 2**20  # what is written, and read, at once
CODECS = (
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "zstd", "configuration": {"level": 1}},
    {"name": "crc32c"},
)


class _ChecksummedArray(tensorstore_utils.ArrayWriteSpec):
    """How Orbax writes an array, for which it has no setting: with CODECS where it is in zarr's third format."""

    @property
    def json(self) -> dict[str, Any]:
        spec = super().json
        if spec["driver"] == "zarr3":
            spec["metadata"]["codecs"] = CODECS
        return spec


tensorstore_utils.ArrayWriteSpec = _ChecksummedArray


def tree_handler(**options: Any) -> ocp.PyTreeCheckpointHandler:
    """Orbax's handler for a tree of arrays: reads any, writes each chunk with a checksum."""
    return ocp.PyTreeCheckpointHandler(use_zarr3=True, **options)


def step_directory(path: str | Path) -> Path | None:
    """The newest complete step of a workdir, or `path` itself where it is a step; None where it is neither."""
    path = Path(path)
    if (path / "params").is_dir() and (path / "metadata").is_dir():
        return path
    return next((step for step in step_directories(path) if not missing(step)), None)


def step_directories(workdir: Path) -> list[Path]:
    """The steps of a workdir, complete or not, newest first."""
    folder = workdir / FOLDER
    steps = [p for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
    return sorted(steps, key=lambda p: -int(p.name))


def missing(step: Path) -> str:
    """The first file that a step's directory lacks, or has empty, cut off or garbled, as a copy that was interrupted
    does; "" of a complete one. An array's file that ends early is found when it is read."""
    for file in (CONTENTS, METADATA):
        if not _holds_json(step / file):
            return file
    items = json.loads((step / CONTENTS).read_text()).get("item_handlers", {})
    lost = (_missing_of_tree(step / item) for item in items if item != "metadata")
    return next((str(file.relative_to(step)) for file in lost if file), "")


def _missing_of_tree(tree: Path) -> Path | None:
    """The same for a tree of arrays."""
    for file in (tree / "_METADATA", *tree.glob("array_metadatas/*")):
        if not _holds_json(file):
            return file
    stored = (tree / "manifest.ocdbt", *tree.rglob("d/*"))
    return next((file for file in stored if not file.is_file() or not file.stat().st_size), None)


def _holds_json(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_text("utf-8")), dict)
    except (OSError, ValueError):
        return False


def read_orbax(path: str | Path) -> Checkpoint:
    """A run of ours (its newest step) or one step of it, without the optimizer. Arrays are read when needed.

    Raises InputError when there is no finished step, its metadata are damaged or its parameters do not fit its config;
    reading an array raises it when its files are damaged or it is not finite.
    """
    step = step_directory(path)
    if step is None:
        steps = step_directories(Path(path))
        why = f": {steps[0] / missing(steps[0])} is missing or cut off" if steps else ""
        raise InputError(f"{path} has no complete checkpoint{why}")
    config, processor = parse_metadata(step, read_metadata(step))
    arrays = open_params(step)
    check_arrays(step, arrays, param_shapes(config))
    return Checkpoint(config, arrays, processor)


def read_metadata(step: Path) -> dict[str, Any]:
    """What a step's directory says of itself. Raises InputError where it can't be read."""
    return read_json(step / METADATA)


def parse_metadata(step: Path, metadata: dict[str, Any]) -> tuple[SpatialVLAConfig, Processor | None]:
    """The model and processor in what `read_metadata` gave. Raises InputError where it describes none."""
    return parse_checkpoint(metadata, f"{step / METADATA}: ")


def open_params(step: Path) -> dict[str, LazyArray]:
    """{path: array} of a step's parameters, read when needed. Raises InputError for damaged files."""
    params = (step / "params").absolute()
    if lost := _missing_of_tree(params):
        raise InputError(f"{lost} is missing or cut off")

    # Straight from the array store: restoring array by array through Orbax takes 35 times as long.
    def lazy(path: str, info: Any, spec: dict[str, Any]) -> LazyArray:
        def read() -> np.ndarray:
            try:
                store: Any = tensorstore.open(spec, read=True).result()
                array = np.empty(info.shape, info.dtype)
                for part in _parts(array.shape, store.chunk_layout.read_chunk.shape or ()):
                    array[part] = store[part].read().result()
                return array
            except Exception as error:  # the array store has an exception for each kind of damage
                raise InputError(f"{params} cannot be read at {path}: {_first_line(error)}") from error

        return LazyArray(tuple(info.shape), np.dtype(info.dtype), read)

    return finite(step, {path: lazy(path, info, spec) for path, info, spec in _stored(params)})


def _stored(params: Path) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(path of the array, Orbax's facts about it, where tensorstore finds it) for every array."""
    try:
        tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(params))
        infos = flatten(tree.tree)
    except Exception as error:  # Orbax raises whatever its storage raises
        raise InputError(f"{params} cannot be read: {_first_line(error)}") from error
    for path, info in infos.items():
        spec = {"kvstore": {"driver": "ocdbt", "base": params.as_uri(), "path": f"{info.name}/"}}
        if tree.use_zarr3:
            yield path, info, spec | {"driver": "zarr3", "fill_missing_data_reads": False}
        else:  # an earlier version left chunks of zeros out
            yield path, info, spec | {"driver": "zarr"}


def write_orbax(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write a run with one step, 0, and no optimizer; it appears whole or not at all.

    Holds one array at a time. Raises InputError when `path` exists or the arrays do not fit the config.
    """
    path = Path(path)
    check_arrays("checkpoint", checkpoint.arrays, param_shapes(checkpoint.config))
    metadata = {
        "step": 0,
        "model": checkpoint.config.to_dict(),
        "processor": checkpoint.processor.to_dict() if checkpoint.processor else None,
        "train_config": None,
    }
    with new_directory(path) as folder:
        try:
            # A signal must not leave Orbax's own threads writing. What they print is in the error that they raise.
            with _no_messages(), ThreadPoolExecutor(1) as thread:
                thread.submit(_lay_out, (folder / FOLDER).absolute(), checkpoint.arrays, metadata).result()
            for name, _, spec in _stored((folder / FOLDER / "0" / "params").absolute()):
                _fill(spec, checkpoint.arrays[name])
        except InputError:
            raise  # of an array that can't be read
        except ValueError as error:  # what Orbax and tensorstore make of a full disk
            raise InputError(f"{path} cannot be written: {_first_line(error)}") from error


@contextlib.contextmanager
def _no_messages() -> Iterator[None]:
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(level)


def _lay_out(folder: Path, arrays: dict[str, LazyArray], metadata: dict[str, Any]) -> None:
    """Orbax saves zeros, which take no room in memory or on disk: everything but the numbers."""
    zeros = unflatten({name: np.broadcast_to(np.zeros((), array.dtype), array.shape) for name, array in arrays.items()})
    items = ocp.args.Composite(params=ocp.args.PyTreeSave(zeros), metadata=ocp.args.JsonSave(metadata))
    types = ocp.type_handlers
    uncopied = types.create_type_handler_registry(
        (np.ndarray, types.NumpyHandler(deepcopy_host_arrays=False)), (jax.Array, types.ArrayHandler())
    )
    handlers = {
        "params": tree_handler(type_handler_registry=uncopied),
        "metadata": ocp.JsonCheckpointHandler(),
    }
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    try:
        with ocp.CheckpointManager(folder, options=options, item_handlers=handlers) as manager:
            manager.save(0, args=items)
    finally:
        for thread in threading.enumerate():  # where one has failed, the others go on writing
            if type(thread).__module__.startswith("orbax"):
                thread.join()


def _fill(spec: dict[str, Any], array: LazyArray) -> None:
    """Write an array chunk by chunk: as the one chunk that Orbax makes of it, it would be held twice more, encoded."""
    laid_out = tensorstore.open(spec, read=True).result().spec().to_json()
    chunk = _chunk_shape(array.shape, array.dtype.itemsize)
    laid_out["metadata"]["chunk_grid"]["configuration"]["chunk_shape"] = chunk
    laid_out["store_data_equal_to_fill_value"] = True
    store = tensorstore.open(laid_out, create=True, delete_existing=True).result()
    x = array.read()
    for part in _parts(x.shape, chunk):
        store[part].write(x[part]).result()


def _parts(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """The chunks of an array, one by one: tensorstore holds encoded whatever it is asked for at once."""
    for index in np.ndindex(*(-(-n // m) for n, m in zip(shape, chunk, strict=True))):
        yield tuple(slice(i * m, min((i + 1) * m, n)) for i, m, n in zip(index, chunk, shape, strict=True))


def _chunk_shape(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """Whole rows that lie behind each other, of CHUNK_BYTES at most: layers, or rows of a table."""
    chunk = list(shape)
    for axis in range(len(shape)):
        if prod(chunk) * itemsize <= CHUNK_BYTES:
            break
        chunk[axis] = max(1, CHUNK_BYTES // (prod(chunk[axis + 1 :]) * itemsize))
    return chunk


def _first_line(error: Exception) -> str:
    """Of what the error says, or the system's own words where tensorstore gives their number."""
    if system := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(system[1]))
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
