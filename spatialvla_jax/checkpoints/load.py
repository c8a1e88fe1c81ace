"""Recognise and load checkpoints of any format."""

import hashlib
import itertools
from typing import Any

import jax
import numpy as np

from spatialvla_jax.actions import ActionGrid, LinearGrid, grid_from_dict
from spatialvla_jax.checkpoints.big_vision import read_big_vision
from spatialvla_jax.checkpoints.hub import find_checkpoint
from spatialvla_jax.checkpoints.huggingface import open_zoedepth, read_huggingface
from spatialvla_jax.checkpoints.orbax import missing, read_orbax, step_directories, step_directory
from spatialvla_jax.checkpoints.paligemma import is_paligemma, start_from_paligemma
from spatialvla_jax.checkpoints.peft import is_adapter_run, read_adapters
from spatialvla_jax.checkpoints.processor import Processor
from spatialvla_jax.checkpoints.published_config import CONFIG
from spatialvla_jax.checkpoints.types import Checkpoint, LazyArray, read_json
from spatialvla_jax.errors import InputError
from spatialvla_jax.models.spatialvla import SpatialVLA
from spatialvla_jax.models.zoedepth import ZoeDepthConfig
from spatialvla_jax.utils.progress import warn
from spatialvla_jax.utils.storage import (
    AnyPath,
    exists,
    is_dir,
    is_file,
    list_tree,
    read_ranges,
    resolved,
    size_and_version,
)

ENDS = 1 << 16  # bytes


def read_checkpoint(path: str | AnyPath, zoedepth: str | AnyPath | None = None) -> Checkpoint:
    """Recognise and open a checkpoint: one of our Orbax runs or its steps, a published directory, a .npz, or a
    PaliGemma 2 (`start_from_paligemma`). Only a PaliGemma 2 may take a `zoedepth`. An adapter run is merged with its
    base. Each may be an id of the Hugging Face Hub (`hub.find_checkpoint`). Raises InputError for anything else."""
    path, zoedepth = find_checkpoint(path), zoedepth and find_checkpoint(zoedepth, "ZoeDepth")
    if not exists(path):
        no_id = ", and is not an id of the Hugging Face Hub, ORG/NAME or ORG/NAME@REVISION"
        raise InputError(f"{path} does not exist{no_id if '/' in str(path) and not path.is_absolute() else ''}")
    if is_paligemma(path):
        return start_from_paligemma(path, zoedepth)
    if zoedepth is not None:
        raise InputError(
            f"{path} is not a PaliGemma 2, so it takes no ZoeDepth from {zoedepth}: it has its own depth source"
        )
    if (step := step_directory(path)) is not None:
        for newer in itertools.takewhile(lambda other: other != step, step_directories(path)):
            warn(f"{newer} is incomplete, {missing(newer)} is missing or truncated: reading {step} instead")
        return read_adapters(step, read_checkpoint).whole if is_adapter_run(step) else read_orbax(step)
    if step_directories(path):
        return read_orbax(path)  # for its error
    if is_file(path / CONFIG):
        return read_huggingface(path)
    if is_file(path):
        return read_big_vision(path)
    raise InputError(f"{path} is not a checkpoint: neither a run with a finished step nor a directory with {CONFIG}")


def fingerprint(path: str | AnyPath) -> str:
    """Identify a checkpoint's current state: the path of the file or step, and 8 hex digits that change when it is
    retrained. Fast, because it hashes only the names, sizes and both ends of the files."""
    path = find_checkpoint(path)
    path = step_directory(path) or path
    parts = ("params", "metadata") if is_dir(path / "params") else (".",)
    if is_file(path):
        sizes = {path: size_and_version(path)[0]}
    else:
        sizes = {path / part / name: size for part in parts for name, size in list_tree(path / part).items()}
    files = sorted(sizes)
    ends = [(file, start, min(ENDS, sizes[file])) for file in files for start in (0, max(0, sizes[file] - ENDS))]
    found = read_ranges(ends)
    digest = hashlib.sha256()
    for file, first, last in zip(files, found[::2], found[1::2], strict=True):
        for end in (first, last):
            if isinstance(end, Exception):
                raise end
        digest.update(repr((str(file.relative_to(path)), sizes[file], first, last)).encode())
    return f"{resolved(path)} ({digest.hexdigest()[:8]})"


def load_pretrained(
    path: str | AnyPath, zoedepth: str | AnyPath | None = None
) -> tuple[SpatialVLA, dict[str, Any], Processor | None]:
    """(model, params, processor) of any checkpoint that `read_checkpoint` reads. A PaliGemma 2 may take a `zoedepth`.

    Params are NumPy arrays on the host in their stored dtypes. The processor is None if the checkpoint has none.
    """
    checkpoint = read_checkpoint(path, zoedepth)
    return SpatialVLA(checkpoint.config), checkpoint.params(), checkpoint.processor


def read_zoedepth(path: str | AnyPath) -> tuple[ZoeDepthConfig, dict[str, LazyArray], int | None]:
    """ZoeDepth's config, its arrays ("backbone/…") and the image size of the surrounding model (None if there is none).

    `path` is a ZoeDepth's own Hugging Face directory, or anything that `read_checkpoint` reads. Raises InputError for a
    checkpoint without a ZoeDepth.
    """
    path = find_checkpoint(path)
    if is_file(path / CONFIG) and read_json(path / CONFIG).get("model_type") == "zoedepth":
        (config, arrays), size = open_zoedepth(path), None
    else:
        checkpoint = read_checkpoint(path)
        if checkpoint.config.depth_source != "zoedepth":
            source = checkpoint.config.depth_source
            raise InputError(f"{path} holds no ZoeDepth: its model takes depth from {source!r}")
        config, arrays, size = checkpoint.config.zoe, checkpoint.arrays, checkpoint.config.img.image_size
    return config, {p.removeprefix("zoe/"): array for p, array in arrays.items() if p.startswith("zoe/")}, size


def load_grid(path: str | AnyPath) -> ActionGrid | LinearGrid:
    """The grid in a file written by `save_grid` or in a checkpoint of any format. Raises InputError."""
    path = find_checkpoint(path)
    if path.suffix == ".json" and is_file(path):
        try:
            return grid_from_dict(read_json(path))
        except InputError as error:
            raise InputError(f"{path} holds no action grid: {error}") from error
    if (processor := read_checkpoint(path).processor) is None:
        raise InputError(f"{path} holds weights but no action grid")
    return jax.tree.map(np.asarray, processor.grid)
