"""The published directory layout: config.json, model.safetensors (or shards), and the processor's files.

Fields unknown to the published config (prompt length, depth source, …) are stored under "spatialvla_jax" in
config.json. processor.json holds our whole processor, so that checkpoints are read back unchanged. The release's own
files are written beside them, and read if processor.json is missing. `auto_map` names the release's code files.
`AutoModel` and `AutoProcessor` of transformers run the ones in the directory: the release's, or those that
`export.convert.write_pytorch` puts there.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from spatialvla_jax.checkpoints import safetensors_io as safetensors
from spatialvla_jax.checkpoints.mapping import (
    SPATIALVLA,
    Rule,
    Slot,
    check_arrays,
    check_names,
    is_buffer,
    param_shapes,
    published_name,
    slots,
)
from spatialvla_jax.checkpoints.processor import Processor
from spatialvla_jax.checkpoints.published_config import (
    CONFIG,
    DIFFERENCES,
    EXTRA,
    config_to_published,
    read_config,
    zoedepth_from_published,
)
from spatialvla_jax.checkpoints.published_fields import NAMES
from spatialvla_jax.checkpoints.published_processor import PROCESSOR, read_processor
from spatialvla_jax.checkpoints.release import release_differences, write_release_files
from spatialvla_jax.checkpoints.types import Checkpoint, LazyArray, finite, read_json
from spatialvla_jax.models.spatialvla import SpatialVLAConfig
from spatialvla_jax.models.zoedepth import ZoeDepthConfig
from spatialvla_jax.utils.atomic import new_directory, write_json
from spatialvla_jax.utils.storage import AnyPath, to_path

MAX_SHARD_BYTES = 5 * 10**9
ZOE_PREFIX = "vision_zoe_model."


def read_huggingface(path: str | AnyPath) -> Checkpoint:
    """Read a published directory, single or sharded. Arrays are read lazily, in their stored dtype.

    Raises InputError for missing, unknown, misshapen or non-floating tensors, and if they do not fit the config.
    Reading an array raises it for NaN or infinity.
    """
    path = to_path(path)
    config, processor = read_description(path)
    return Checkpoint(config, stacked_arrays(path, open_published(path), param_shapes(config)), processor)


def read_description(path: AnyPath) -> tuple[SpatialVLAConfig, Processor | None]:
    """The model config and processor of a published directory, without its weights. Raises InputError."""
    config = read_config(path / CONFIG)
    return read_processor(path, config, read_json(path / CONFIG).get(EXTRA, {}).get("action_chunk"))


def open_zoedepth(path: AnyPath) -> tuple[ZoeDepthConfig, dict[str, LazyArray]]:
    """The sizes and arrays ("zoe/…", as in our model) of a ZoeDepth's own Hugging Face directory. Raises InputError."""
    config = zoedepth_from_published(read_json(path / CONFIG), f"{path / CONFIG}: ")
    model = SpatialVLAConfig(zoe=config, depth_source="zoedepth")
    model.check_sizes(lambda field: f"{path / CONFIG}: " + NAMES[field].removeprefix("vision_zoe_config."))
    shapes = {path: shape for path, shape in param_shapes(model).items() if path.startswith("zoe/")}
    return config, stacked_arrays(path, open_published(path, ZOE_PREFIX), shapes)


def open_published(path: AnyPath, prefix: str = "") -> dict[str, LazyArray]:
    """The tensors of a directory under the names in `mapping`, each with `prefix`; alternative spellings are
    recognised, and buffers dropped. Raises InputError if one tensor occurs under two spellings."""
    stored = {key: x for key, x in safetensors.open_directory(path).items() if not is_buffer(key)}
    names = {key: prefix + published_name(key).removeprefix(prefix) for key in stored}
    repeated = {name for name, count in Counter(names.values()).items() if count > 1}
    check_names(path, "under two names", [key for key, name in names.items() if name in repeated])
    return {names[key]: x for key, x in stored.items()}


def stacked_arrays(
    path: AnyPath, stored: Mapping[str, LazyArray], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, LazyArray]:
    """Our arrays with these shapes, built from published tensors, all of which must be used. Raises InputError."""
    table = slots(shapes)
    wanted = {slot.key: slot for slot in table}
    check_names(path, "missing", wanted.keys() - stored.keys())
    check_names(path, "unknown", stored.keys() - wanted.keys())
    dtypes = {key: safetensors.NAMES[tensor.dtype] for key, tensor in stored.items()}
    other = [f"{key} ({dtype})" for key, dtype in dtypes.items() if dtype not in safetensors.FLOATS]
    check_names(path, f"with a dtype other than {', '.join(safetensors.FLOATS)}", other)
    wrong = [f"{k} {t.shape} instead of {wanted[k].shape}" for k, t in stored.items() if t.shape != wanted[k].shape]
    check_names(path, f"with a shape other than {CONFIG} says", wrong)
    by_path: dict[str, list[Slot]] = {}
    for slot in table:
        by_path.setdefault(slot.path, []).append(slot)
    mixed = [s.key for group in by_path.values() for s in group if stored[s.key].dtype != stored[group[0].key].dtype]
    check_names(path, "with a dtype other than that of the first layer", mixed)
    tensors = finite(path, stored)
    return {name: _stacked(shapes[name], group, tensors) for name, group in by_path.items()}


def _stacked(shape: tuple[int, ...], group: Sequence[Slot], stored: Mapping[str, LazyArray]) -> LazyArray:
    dtype = stored[group[0].key].dtype

    def read() -> np.ndarray:
        array = np.empty(shape, dtype)
        for slot in group:
            slot.to_ours(stored[slot.key].read(), array)
        return array

    return LazyArray(shape, dtype, read)


def unstacked_tensors(arrays: Mapping[str, LazyArray], rules: Iterable[Rule] = SPATIALVLA) -> dict[str, LazyArray]:
    """Published tensors from our arrays. Reading them in this order reads each array once and holds one at a time."""
    held: dict[str, np.ndarray] = {}

    def read(slot: Slot) -> np.ndarray:
        if slot.path not in held:
            held.clear()
            held[slot.path] = arrays[slot.path].read()
        return slot.to_published(held[slot.path])

    table = slots({path: array.shape for path, array in arrays.items()}, rules)
    return {slot.key: LazyArray(slot.shape, arrays[slot.path].dtype, partial(read, slot)) for slot in table}


def write_huggingface(path: str | AnyPath, checkpoint: Checkpoint, *, files: Mapping[str, str] | None = None) -> None:
    """Write a directory in the published layout; it appears whole or not at all.

    `files` is {file name: text} of additional files: the model card, and the Python files that transformers needs to
    load the model. Reads each array once and holds one at a time. Raises InputError if `path` exists or the arrays do
    not fit the config.
    """
    check_arrays("checkpoint", checkpoint.arrays, param_shapes(checkpoint.config))
    tensors = unstacked_tensors(checkpoint.arrays)
    with new_directory(to_path(path), CONFIG) as folder:
        write_config(folder, checkpoint.config, checkpoint.processor, {x.dtype for x in tensors.values()})
        if checkpoint.processor is not None:
            write_processor(folder, checkpoint.processor, checkpoint.config)
        write_files(folder, files)
        safetensors.write_directory(folder, tensors, MAX_SHARD_BYTES)


def write_config(path: Path, config: SpatialVLAConfig, processor: Processor | None, dtypes: set[np.dtype]) -> None:
    """Write config.json, which also lists the reasons why the release's code may act differently from this model."""
    data = config_to_published(config, dtypes)
    data[EXTRA][DIFFERENCES] = release_differences(config, processor)
    write_json(path / CONFIG, data)


def write_files(path: Path, files: Mapping[str, str] | None) -> None:
    for name, text in (files or {}).items():
        (path / name).write_text(text)


def write_processor(path: Path, processor: Processor, config: SpatialVLAConfig) -> None:
    """Write processor.json and the files of the release's own processor."""
    write_json(path / PROCESSOR, processor.to_dict())
    write_release_files(path, processor, config)
