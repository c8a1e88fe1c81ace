"""Our own runs: `<workdir>/checkpoints/<step>/{params, optimizer, metadata}`, written by training or conversion.

On disk a step appears by a rename. Buckets have no rename: there a step is complete once Orbax has recorded the commit
time in CONTENTS and then written MARKER, its last file. Arrays are stored in chunks, each with a CRC-32C that the array
store verifies on reading. A restore on a pod thus checks the chunks that each host reads, a conversion all of `params`.
The store's index has checksums too.
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
from spatialvla_jax.models.spatialvla import TARGET_HEAD, SpatialVLAConfig
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
CONTENTS = "_CHECKPOINT_METADATA"  # in a step: Orbax's list of its items
METADATA = "metadata/metadata"
MARKER = "commit_success.txt"  # in a step in a bucket
TRIES = {"max_retries": 8}  # per request to a bucket, over two minutes
CHUNK_BYTES = 64 * 2**20  # bytes written and read at once
CODECS = (
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "zstd", "configuration": {"level": 1}},
    {"name": "crc32c"},
)


class _ChecksummedArray(tensorstore_utils.ArrayWriteSpec):
    """Makes Orbax write zarr3 arrays with CODECS, for which it has no setting."""

    @property
    def json(self) -> dict[str, Any]:
        spec = super().json
        if spec["driver"] == "zarr3":
            spec["metadata"]["codecs"] = CODECS
        return spec


def _location(url: str) -> dict[str, Any]:
    """The array store's key-value store spec for a folder in a bucket."""
    scheme, _, place = url.partition("://")
    bucket, _, path = place.partition("/")
    if scheme == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": path, "gcs_request_retries": TRIES}
    spec = {"driver": "s3", "bucket": bucket, "path": path, "s3_request_retries": TRIES}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        spec |= {"endpoint": endpoint, "aws_region": os.environ.get("AWS_DEFAULT_REGION", "us-east-1")}
    if "AWS_ACCESS_KEY_ID" in os.environ:  # otherwise the array store prints which credential files it looks for
        spec |= {"aws_credentials": {"type": "environment"}}
    return spec


def _normalized(path: str) -> str:
    return path.rstrip("/") if is_url(path) else os.path.normpath(path)


tensorstore_utils.ArrayWriteSpec = _ChecksummedArray
# Orbax only recognises gs://, although its paths and its array store support s3:// too.
tensorstore_utils._use_gcs_driver, tensorstore_utils._normalize_path = is_url, _normalized
gcs_utils.get_kvstore_for_gcs = _location


def tree_handler(*, copy: bool = True) -> ocp.PyTreeCheckpointHandler:
    """Orbax's handler for a tree of arrays: reads any format, writes each chunk with a checksum. Without `copy`, NumPy
    arrays must not change until they are saved."""
    if jax.process_count() > 1:
        return ocp.PyTreeCheckpointHandler(use_zarr3=True)
    # By default, Orbax cuts each array into one slice per replica, so that several processes write at once. A single
    # process gains little, and cutting takes seconds: it compiles every shape and dispatches every slice.
    types = ocp.type_handlers
    registry = types.create_type_handler_registry(
        (np.ndarray, types.NumpyHandler(deepcopy_host_arrays=copy)),
        (jax.Array, types.ArrayHandler(use_replica_parallel=False)),
    )
    return ocp.PyTreeCheckpointHandler(use_zarr3=True, type_handler_registry=registry)


def step_directory(path: str | AnyPath) -> AnyPath | None:
    """The newest complete step of a workdir, or `path` itself if it is a step; otherwise None."""
    path = to_path(path)
    if is_dir(path / "params") and is_dir(path / "metadata") and not (is_url(path) and missing(path)):
        return path
    return next((step for step in step_directories(path) if not missing(step)), None)


def step_directories(workdir: AnyPath) -> list[AnyPath]:
    """The steps of a workdir, complete or not, newest first."""
    steps = [name for name in list_names(workdir / FOLDER) if name.isdigit()]
    return [workdir / FOLDER / name for name in sorted(steps, key=int, reverse=True)]


def missing(step: AnyPath) -> str:
    """The first file of a step that is missing, empty, truncated or garbled, as after an interrupted copy; "" if the
    step is complete. It is MARKER if a save to a bucket was interrupted. Truncated array files are found on reading."""
    contents = _json(step / CONTENTS)
    if contents and is_url(step) and not contents.get("commit_timestamp_nsecs"):
        return MARKER
    if not contents or not _json(step / METADATA):
        return METADATA if contents else CONTENTS
    trees = (item for item in contents.get("item_handlers", {}) if item != "metadata")
    return next((f"{item}/{lost}" for item in trees if (lost := _missing_of_tree(step / item))), "")


def _missing_of_tree(tree: AnyPath) -> str:
    """`missing` for a tree of arrays."""
    sizes = list_tree(tree)
    for name in ("_METADATA", *(name for name in sizes if name.startswith("array_metadatas/"))):
        if not _json(tree / name):
            return name
    stored = ("manifest.ocdbt", *(name for name in sizes if "/d/" in f"/{name}"))
    return next((name for name in stored if not sizes.get(name)), "")


def _json(file: AnyPath) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none."""
    try:
        found = json.loads(read_bytes(file)) if is_file(file) else None
    except InputError:
        raise
    except (OSError, ValueError):
        found = None
    return found if isinstance(found, dict) else {}


def read_orbax(path: str | AnyPath) -> Checkpoint:
    """Read one of our runs (its newest step) or one of its steps, without the optimizer. Arrays are read lazily.

    Raises InputError if there is no complete step, its metadata is damaged or its parameters do not fit its config.
    Reading an array raises it if files are damaged or values not finite.
    """
    step = step_directory(path)
    if step is None:
        steps = step_directories(to_path(path))
        why = f": {steps[0] / missing(steps[0])} is missing or truncated" if steps else ""
        raise InputError(f"{path} has no complete checkpoint{why}")
    config, processor = parse_metadata(step, read_metadata(step))
    arrays = open_params(step)
    check_arrays(step, arrays, param_shapes(config))
    return Checkpoint(config, arrays, processor)


def read_metadata(step: AnyPath) -> dict[str, Any]:
    """The metadata in a step's directory. Raises InputError if it can't be read."""
    return read_json(step / METADATA)


def parse_metadata(step: AnyPath, metadata: dict[str, Any]) -> tuple[SpatialVLAConfig, Processor | None]:
    """The model config and processor in a result of `read_metadata`. Raises InputError if it is invalid."""
    return parse_checkpoint(metadata, f"{step / METADATA}: ")


def open_params(step: AnyPath) -> dict[str, LazyArray]:
    """{path: array} of a step's parameters, read lazily, without the head that only training needs. Raises InputError
    for damaged files."""
    return {path: array for path, array in _open(step).items() if not path.startswith(f"{TARGET_HEAD}/")}


def open_head(path: str | AnyPath) -> dict[str, LazyArray]:
    """{path: array} of the head in a run's newest step; empty if `path` is not a run with `loss.target`. Raises
    InputError for damaged files."""
    step = step_directory(path)
    return {path: array for path, array in (_open(step) if step else {}).items() if path.startswith(f"{TARGET_HEAD}/")}


def _open(step: AnyPath) -> dict[str, LazyArray]:
    params = absolute(step / "params")
    if lost := _missing_of_tree(params):
        raise InputError(f"{params / lost} is missing or truncated")
    # Share one cache of the store's index between all arrays; otherwise each array reads it again.
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 2**27}})

    # Read directly from the array store: restoring arrays one by one through Orbax takes 35 times as long.
    def lazy(path: str, info: Any, spec: dict[str, Any]) -> LazyArray:
        def read() -> np.ndarray:
            try:
                store: Any = tensorstore.open(spec, read=True, context=context).result()
                array = np.empty(info.shape, info.dtype)
                for part in _parts(array.shape, store.chunk_layout.read_chunk.shape or ()):
                    array[part] = store[part].read().result()
                return array
            except Exception as error:  # the array store's exception depends on the kind of damage
                raise unreadable(error, f"{params} cannot be read at {path}") from error

        return LazyArray(tuple(info.shape), np.dtype(info.dtype), read)

    return finite(step, {path: lazy(path, info, spec) for path, info, spec in _stored(params)})


def unreadable(error: Exception, sentence: str) -> Exception:
    """The exception for an error of Orbax or its array store: StorageError, which may pass, if a bucket gave up."""
    cause = first_cause(error)
    passing = isinstance(cause, StorageError) or "retry attempts failed" in str(cause)
    return (StorageError if passing else InputError)(f"{sentence}: {_first_line(cause)}")


def first_cause(error: Exception) -> Exception:
    """The first in the chain of errors that led to this one, or the last with a message for the user."""
    while not isinstance(error, InputError | StorageError):
        if not isinstance(cause := error.__cause__ or error.__context__, Exception):
            break
        error = cause
    return error


def _stored(params: AnyPath) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(path of the array, Orbax's metadata about it, its tensorstore spec) for every array."""
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
        else:  # written by an earlier version, which omitted chunks of zeros
            yield path, info, spec | {"driver": "zarr"}


def write_orbax(path: str | AnyPath, checkpoint: Checkpoint) -> None:
    """Write a run with one step, 0, and no optimizer; it appears whole or not at all.

    Holds one array at a time. Raises InputError if `path` exists or the arrays do not fit the config.
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
            # A signal must not leave Orbax's own threads writing. Their messages repeat the error that they raise.
            with _no_messages(), ThreadPoolExecutor(1) as thread:
                thread.submit(_lay_out, (folder / FOLDER).absolute(), checkpoint.arrays, metadata).result()
            for name, _, spec in _stored((folder / FOLDER / "0" / "params").absolute()):
                _fill(spec, checkpoint.arrays[name])
            if is_url(path):
                (folder / marker).touch()
        except InputError:
            raise  # an array cannot be read
        except ValueError as error:  # Orbax and tensorstore raise it for a full disk
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
    """Let Orbax save zeros, which need no space in memory or on disk: it writes everything but the values."""
    zeros = unflatten({name: np.broadcast_to(np.zeros((), array.dtype), array.shape) for name, array in arrays.items()})
    items = ocp.args.Composite(params=ocp.args.PyTreeSave(zeros), metadata=ocp.args.JsonSave(metadata))
    handlers = {"params": tree_handler(copy=False), "metadata": ocp.JsonCheckpointHandler()}
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    try:
        with ocp.CheckpointManager(folder, options=options, item_handlers=handlers) as manager:
            manager.save(0, args=items)
    finally:
        for thread in threading.enumerate():  # if one has failed, the others keep writing
            if type(thread).__module__.startswith("orbax"):
                thread.join()


def _fill(spec: dict[str, Any], array: LazyArray) -> None:
    """Write an array chunk by chunk. Orbax would make one chunk of it and hold two more, encoded copies."""
    written = tensorstore.open(spec, read=True).result().spec().to_json()
    chunk = _chunk_shape(array.shape, array.dtype.itemsize)
    written["metadata"]["chunk_grid"]["configuration"]["chunk_shape"] = chunk
    written["store_data_equal_to_fill_value"] = True
    store = tensorstore.open(written, create=True, delete_existing=True).result()
    x = array.read()
    for part in _parts(x.shape, chunk):
        store[part].write(x[part]).result()


def _parts(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """The chunks of an array, one by one: tensorstore holds all that is requested at once in encoded form."""
    for index in np.ndindex(*(-(-n // m) for n, m in zip(shape, chunk, strict=True))):
        yield tuple(slice(i * m, min((i + 1) * m, n)) for i, m, n in zip(index, chunk, shape, strict=True))


def _chunk_shape(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """Contiguous blocks of at most CHUNK_BYTES: whole layers, or rows of a table."""
    chunk = list(shape)
    for axis in range(len(shape)):
        if prod(chunk) * itemsize <= CHUNK_BYTES:
            break
        chunk[axis] = max(1, CHUNK_BYTES // (prod(chunk[axis + 1 :]) * itemsize))
    return chunk


def _first_line(error: BaseException) -> str:
    """The first line of an error's message, or the operating system's message if tensorstore gives its number."""
    if system := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(system[1]))
    text = str(error).strip().split("\n")[0]
    if re.search("(gs|s3)://", text):  # a bucket's reason comes last
        text = text.rpartition(" in OCDBT database at ")[2]
    return text[:200] or type(error).__name__
