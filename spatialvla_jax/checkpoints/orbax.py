"""Our own runs: `<workdir>/checkpoints/<step>/{params, optimizer, metadata}`, by training or by a conversion.

On a disk a step appears by a rename. A bucket knows none: there a step exists once Orbax has noted in CONTENTS when it
was committed, and has written MARKER, which it does last. The arrays lie in chunks, each with a CRC-32C that the array
store verifies whenever it reads one: a restore on a pod checks the chunks that each host reads, a conversion all of
`params`. The store's own index has checksums, too.
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
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from spatialvla_jax.checkpoints.mapping import check_arrays, flatten, param_shapes, unflatten
from spatialvla_jax.checkpoints.processor import Processor, parse_checkpoint
from spatialvla_jax.checkpoints.types import Checkpoint, LazyArray, finite, read_json
from spatialvla_jax.errors import InputError, StorageError
from spatialvla_jax.models.spatialvla import SpatialVLAConfig
from spatialvla_jax.utils.atomic import new_directory
from spatialvla_jax.utils.storage import (
    AnyPath,
    absolute,
    is_dir,
    is_file,
    is_url,
    list_names,
    list_tree,
    read_bytes,
    to_path,
)

FOLDER = "checkpoints"
CONTENTS = "_CHECKPOINT_METADATA"  # of a step: Orbax's list of what it consists of
METADATA = "metadata/metadata"
MARKER = "commit_success.txt"  # of a step in a bucket
TRIES = {"max_retries": 8}  # of a request to a bucket, over two minutes
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


def _location(url: str) -> dict[str, Any]:
    """Where the array store finds a folder in a bucket."""
    scheme, _, place = url.partition("://")
    bucket, _, path = place.partition("/")
    if scheme == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": path, "gcs_request_retries": TRIES}
    spec = {"driver": "s3", "bucket": bucket, "path": path, "s3_request_retries": TRIES}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        spec |= {"endpoint": endpoint, "aws_region": os.environ.get("AWS_DEFAULT_REGION", "us-east-1")}
    if "AWS_ACCESS_KEY_ID" in os.environ:  # else the array store would print which files it looks for
        spec |= {"aws_credentials": {"type": "environment"}}
    return spec


def _normalized(path: str) -> str:
    return path.rstrip("/") if is_url(path) else os.path.normpath(path)


tensorstore_utils.ArrayWriteSpec = _ChecksummedArray
# Orbax knows gs:// alone, though its paths and its array store know s3://, too.
tensorstore_utils._use_gcs_driver, tensorstore_utils._normalize_path = is_url, _normalized
gcs_utils.get_kvstore_for_gcs = _location


def tree_handler(**options: Any) -> ocp.PyTreeCheckpointHandler:
    """Orbax's handler for a tree of arrays: reads any, writes each chunk with a checksum."""
    return ocp.PyTreeCheckpointHandler(use_zarr3=True, **options)


def step_directory(path: str | AnyPath) -> AnyPath | None:
    """The newest complete step of a workdir, or `path` itself where it is a step; None where it is neither."""
    path = to_path(path)
    if is_dir(path / "params") and is_dir(path / "metadata") and not (is_url(path) and missing(path)):
        return path
    return next((step for step in step_directories(path) if not missing(step)), None)


def step_directories(workdir: AnyPath) -> list[AnyPath]:
    """The steps of a workdir, complete or not, newest first."""
    steps = [name for name in list_names(workdir / FOLDER) if name.isdigit()]
    return [workdir / FOLDER / name for name in sorted(steps, key=int, reverse=True)]


def missing(step: AnyPath) -> str:
    """The first file that a step's directory lacks, or has empty, cut off or garbled, as a copy that was interrupted
    does; "" of a complete one. It is MARKER where a save into a bucket was cut off. An array's file that ends early is
    found when it is read."""
    contents = _json(step / CONTENTS)
    if contents and is_url(step) and not contents.get("commit_timestamp_nsecs"):
        return MARKER
    if not contents or not _json(step / METADATA):
        return METADATA if contents else CONTENTS
    trees = (item for item in contents.get("item_handlers", {}) if item != "metadata")
    return next((f"{item}/{lost}" for item in trees if (lost := _missing_of_tree(step / item))), "")


def _missing_of_tree(tree: AnyPath) -> str:
    """The same for a tree of arrays."""
    sizes = list_tree(tree)
    for name in ("_METADATA", *(name for name in sizes if name.startswith("array_metadatas/"))):
        if not _json(tree / name):
            return name
    stored = ("manifest.ocdbt", *(name for name in sizes if "/d/" in f"/{name}"))
    return next((name for name in stored if not sizes.get(name)), "")


def _json(file: AnyPath) -> dict[str, Any]:
    """The JSON object that a file holds, empty where it holds none."""
    try:
        found = json.loads(read_bytes(file)) if is_file(file) else None
    except InputError:
        raise
    except (OSError, ValueError):
        found = None
    return found if isinstance(found, dict) else {}


def read_orbax(path: str | AnyPath) -> Checkpoint:
    """A run of ours (its newest step) or one step of it, without the optimizer. Arrays are read when needed.

    Raises InputError when there is no finished step, its metadata are damaged or its parameters do not fit its config;
    reading an array raises it when its files are damaged or it is not finite.
    """
    step = step_directory(path)
    if step is None:
        steps = step_directories(to_path(path))
        why = f": {steps[0] / missing(steps[0])} is missing or cut off" if steps else ""
        raise InputError(f"{path} has no complete checkpoint{why}")
    config, processor = parse_metadata(step, read_metadata(step))
    arrays = open_params(step)
    check_arrays(step, arrays, param_shapes(config))
    return Checkpoint(config, arrays, processor)


def read_metadata(step: AnyPath) -> dict[str, Any]:
    """What a step's directory says of itself. Raises InputError where it can't be read."""
    return read_json(step / METADATA)


def parse_metadata(step: AnyPath, metadata: dict[str, Any]) -> tuple[SpatialVLAConfig, Processor | None]:
    """The model and processor in what `read_metadata` gave. Raises InputError where it describes none."""
    return parse_checkpoint(metadata, f"{step / METADATA}: ")


def open_params(step: AnyPath) -> dict[str, LazyArray]:
    """{path: array} of a step's parameters, read when needed. Raises InputError for damaged files."""
    params = absolute(step / "params")
    if lost := _missing_of_tree(params):
        raise InputError(f"{params / lost} is missing or cut off")
    # One cache of the store's index for all arrays: without, each is looked up anew.
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 2**27}})

    # Straight from the array store: restoring array by array through Orbax takes 35 times as long.
    def lazy(path: str, info: Any, spec: dict[str, Any]) -> LazyArray:
        def read() -> np.ndarray:
            try:
                store: Any = tensorstore.open(spec, read=True, context=context).result()
                array = np.empty(info.shape, info.dtype)
                for part in _parts(array.shape, store.chunk_layout.read_chunk.shape or ()):
                    array[part] = store[part].read().result()
                return array
            except Exception as error:  # the array store has an exception for each kind of damage
                raise unreadable(error, f"{params} cannot be read at {path}") from error

        return LazyArray(tuple(info.shape), np.dtype(info.dtype), read)

    return finite(step, {path: lazy(path, info, spec) for path, info, spec in _stored(params)})


def unreadable(error: BaseException, sentence: str) -> Exception:
    """What to raise for an error of Orbax or its array store: a StorageError where a bucket gave up, which may pass."""
    cause = first_cause(error)
    passing = isinstance(cause, StorageError) or "retry attempts failed" in str(cause)
    return (StorageError if passing else InputError)(f"{sentence}: {_first_line(cause)}")


def first_cause(error: BaseException) -> BaseException:
    """The first of the errors that led to this one, or the last that has a sentence for the user."""
    while (cause := error.__cause__ or error.__context__) and not isinstance(error, InputError | StorageError):
        error = cause
    return error


def _stored(params: AnyPath) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(path of the array, Orbax's facts about it, where tensorstore finds it) for every array."""
    try:
        tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(params))
        infos = flatten(tree.tree)
    except Exception as error:  # Orbax raises whatever its storage raises
        raise unreadable(error, f"{params} cannot be read") from error
    base = _location(f"{params}/") if is_url(params) else params.as_uri()
    for path, info in infos.items():
        spec = {"kvstore": {"driver": "ocdbt", "base": base, "path": f"{info.name}/"}}
        if tree.use_zarr3:
            yield path, info, spec | {"driver": "zarr3", "fill_missing_data_reads": False}
        else:  # an earlier version left chunks of zeros out
            yield path, info, spec | {"driver": "zarr"}


def write_orbax(path: str | AnyPath, checkpoint: Checkpoint) -> None:
    """Write a run with one step, 0, and no optimizer; it appears whole or not at all.

    Holds one array at a time. Raises InputError when `path` exists or the arrays do not fit the config.
    """
    path = to_path(path)
    check_arrays("checkpoint", checkpoint.arrays, param_shapes(checkpoint.config))
    metadata = {
        "step": 0,
        "model": checkpoint.config.to_dict(),
        "processor": checkpoint.processor.to_dict() if checkpoint.processor else None,
        "train_config": None,
    }
    marker = f"{FOLDER}/0/{MARKER}"
    with new_directory(path, marker) as folder:
        try:
            # A signal must not leave Orbax's own threads writing. What they print is in the error that they raise.
            with _no_messages(), ThreadPoolExecutor(1) as thread:
                thread.submit(_lay_out, (folder / FOLDER).absolute(), checkpoint.arrays, metadata).result()
            for name, _, spec in _stored((folder / FOLDER / "0" / "params").absolute()):
                _fill(spec, checkpoint.arrays[name])
            if is_url(path):
                (folder / marker).touch()
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


def _lay_out(folder: AnyPath, arrays: dict[str, LazyArray], metadata: dict[str, Any]) -> None:
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


def _first_line(error: BaseException) -> str:
    """Of what the error says, or the system's own words where tensorstore gives their number."""
    if system := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(system[1]))
    text = str(error).strip().split("\n")[0]
    if re.search("(gs|s3)://", text):  # a bucket's reason stands at the end
        text = text.rpartition(" in OCDBT database at ")[2]
    return text[:200] or type(error).__name__
