"""big_vision's .npz checkpoints: one array per parameter, named "params/img/embedding/kernel" and so on.

Our names and layouts are big_vision's, so nothing is renamed. The format has no place for our config and processor:
these are stored as JSON in the member "spatialvla_jax". Reading verifies the CRC-32 of each member.
"""

import json
import zipfile

import ml_dtypes
import numpy as np

from spatialvla_jax.checkpoints.mapping import check_arrays, check_names, param_shapes
from spatialvla_jax.checkpoints.processor import parse_checkpoint
from spatialvla_jax.checkpoints.types import Checkpoint, LazyArray, finite
from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.atomic import disk_errors, parents_of, replacing
from spatialvla_jax.utils.storage import AnyPath, occupied, to_path

PREFIX, FACTS = "params/", "spatialvla_jax"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)


def open_npz(path: AnyPath) -> dict[str, LazyArray]:
    """The arrays of a file, without the prefix "params/", read lazily. Raises InputError if the file is not a .npz."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            arrays = dict(_open_member(path, archive, name) for name in archive.namelist() if name != f"{FACTS}.npy")
    except Exception as error:  # zipfile and numpy raise many kinds for a damaged file
        raise InputError(f"{path} is not a complete .npz file: {error}") from error
    wrong = [f"{name} ({array.dtype})" for name, array in arrays.items() if array.dtype not in FLOATS]
    check_names(path, "with a dtype other than float32, float16, bfloat16", wrong)
    return finite(path, arrays)


def _open_member(path: AnyPath, archive: zipfile.ZipFile, name: str) -> tuple[str, LazyArray]:
    with archive.open(name) as member:
        version = np.lib.format.read_magic(member)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(member)
    dtype = BFLOAT16 if dtype == np.dtype("V2") else dtype  # NumPy files cannot name bfloat16
    key = name.removesuffix(".npy")

    def read() -> np.ndarray:
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return arrays[key].view(dtype)
        except Exception as error:
            raise InputError(f"{path} cannot be read at {key}: {error}") from error

    return key.removeprefix(PREFIX), LazyArray(shape, dtype, read)


def read_big_vision(path: str | AnyPath) -> Checkpoint:
    """Read a SpatialVLA written by `write_big_vision`. Raises InputError."""
    path = to_path(path)
    arrays = open_npz(path)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as members:
            text = str(members[FACTS]) if FACTS in members else None
        facts = None if text is None else json.loads(text)
    except Exception as error:
        raise InputError(f"{path} cannot be read at {FACTS}: {error}") from error
    if text is None:
        raise InputError(f"{path} is not a SpatialVLA checkpoint: it has no member {FACTS!r}")
    config, processor = parse_checkpoint(facts, f"{path}: {FACTS}.")
    check_arrays(path, arrays, param_shapes(config))
    return Checkpoint(config, arrays, processor)


def write_big_vision(path: str | AnyPath, checkpoint: Checkpoint) -> None:
    """Write a .npz file by rename, one array at a time. Raises InputError if it exists or cannot be written."""
    path = to_path(path)
    check_arrays("checkpoint", checkpoint.arrays, param_shapes(checkpoint.config))
    if occupied(path):
        raise InputError(f"{path} exists; choose a new destination")
    processor = checkpoint.processor.to_dict() if checkpoint.processor else None
    facts = json.dumps({"model": checkpoint.config.to_dict(), "processor": processor})
    with disk_errors(path), parents_of(path), replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, array in checkpoint.arrays.items():
            x = array.read()
            _write_member(archive, PREFIX + name, x.view("V2") if x.dtype == BFLOAT16 else x)
        _write_member(archive, FACTS, np.array(facts))


def _write_member(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    # A fixed date makes equal checkpoints equal files.
    with archive.open(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), "w", force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)
