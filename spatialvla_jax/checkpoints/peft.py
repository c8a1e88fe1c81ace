"""Adapter runs, which store only adapters: read as the whole model merged with its base, or written for `peft`.

Such a run's `params` hold only trained arrays ("lora/…" and the spatial table). Under "lora", its metadata stores the
rank and alpha, and how the base was adapted to the run's grid. It also stores the base's path, with digests of its grid
and arrays.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from spatialvla_jax.actions import grid_to_dict
from spatialvla_jax.checkpoints import safetensors_io as safetensors
from spatialvla_jax.checkpoints.hub import find_checkpoint, is_hub_id
from spatialvla_jax.checkpoints.huggingface import (
    unstacked_tensors,
    write_config,
    write_files,
    write_huggingface,
    write_processor,
)
from spatialvla_jax.checkpoints.mapping import SPATIALVLA, Rule, axes_of_layout, check_arrays, param_shapes
from spatialvla_jax.checkpoints.orbax import METADATA, open_params, parse_metadata, read_metadata, step_directory
from spatialvla_jax.checkpoints.processor import not_empty
from spatialvla_jax.checkpoints.published_config import CONFIG, EXTRA, PART
from spatialvla_jax.checkpoints.regrid import EMBEDDING, adapt_checkpoint
from spatialvla_jax.checkpoints.types import Checkpoint, LazyArray, digest, read_json, recorded
from spatialvla_jax.errors import InputError
from spatialvla_jax.models.fields import COUNT
from spatialvla_jax.models.lora import ADAPTERS, adapter_shapes, axes_of, is_linear, product
from spatialvla_jax.utils.atomic import new_directory, write_json
from spatialvla_jax.utils.schema import Field, check_stored
from spatialvla_jax.utils.storage import AnyPath, absolute, exists, is_file, resolved, to_path

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SIGLIP, SIGLIP_5 = "vision_tower.vision_model.", "vision_tower."
PEFT_PREFIX = "base_model.model."  # of every name in PEFT_WEIGHTS
BASE = "base"  # subfolder with the base's export, if transformers cannot load the base itself
SAMPLES = 64  # per tensor, in a base's fingerprint
NAME = Field("", "", problem=not_empty)
LORA = {"rank": COUNT, "alpha": Field(1.0, "", above=0, high=1e6), "base": PART, "adapt": PART}  # in a run's metadata


@dataclass(frozen=True)
class AdapterRun:
    """`base` as read, and `adapted` to the run's grid; `trained`: the run's own arrays; `whole`: the merged model."""

    base_path: AnyPath
    base: Checkpoint
    adapted: Checkpoint
    trained: dict[str, LazyArray]
    rank: int
    alpha: float
    whole: Checkpoint


def refer(
    path: str | AnyPath, base: Checkpoint, digests: Mapping[str, str], before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """An adapter run's metadata about its `base`, read from `path`, whose arrays have these digests.

    Runs started by an earlier version keep storing one digest of everything; `before` is their metadata.
    """
    local = str(absolute(step_directory(path) or to_path(path)))
    reference = {"path": str(path) if is_hub_id(path) else local}  # an id names the commit, on any machine
    if "digest" in (before or {}):
        return reference | {"digest": _digest_of_all(base)}
    return reference | {"grid": _digest_of_grid(base).hexdigest(), "digests": dict(digests)}


def _unchanged(what: str, base: Checkpoint, reference: Mapping[str, Any]) -> Checkpoint:
    """`base`, checked against `reference`. Reading a changed array raises InputError."""
    error = InputError(f"{what}, which has changed since: they only fit its old weights")

    def inspect(path: str, x: np.ndarray) -> None:
        if digest(x) != reference["digests"].get(path):
            raise error

    if "digest" in reference:
        if _digest_of_all(base) != reference["digest"]:
            raise error
        return base
    if _digest_of_grid(base).hexdigest() != reference["grid"]:
        raise error
    return replace(base, arrays={path: x.inspected(partial(inspect, path)) for path, x in base.arrays.items()})


def _digest_of_grid(checkpoint: Checkpoint) -> "hashlib._Hash":
    grid = checkpoint.processor and grid_to_dict(checkpoint.processor.grid)
    return hashlib.sha256(json.dumps(grid).encode())


def _digest_of_all(checkpoint: Checkpoint) -> str:
    """A hash of the grid and every array, read one at a time."""
    total = _digest_of_grid(checkpoint)
    for path, array in sorted(checkpoint.arrays.items()):
        total.update(f"{path} {array.shape} {array.dtype}".encode())
        total.update(np.ascontiguousarray(array.read()).reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def is_adapter_run(path: str | AnyPath) -> bool:
    step = step_directory(path)
    return step is not None and "lora" in read_metadata(step)


def read_adapters(path: str | AnyPath, read: Callable[[AnyPath], Checkpoint]) -> AdapterRun:
    """An adapter run (its newest step) or one of its steps, with its base, which `read` opens.

    Raises InputError if the base is missing, has another grid or does not fit, and for damaged files. Reading an array
    raises it if the base has changed.
    """
    step = step_directory(path)
    assert step is not None
    metadata = read_metadata(step)
    config, processor = parse_metadata(step, metadata)
    facts = _facts(metadata, f"{step / METADATA}: ")
    what = f"{step} holds adapters of {facts['base']['path']}"
    base_path = find_checkpoint(facts["base"]["path"], "base")
    if not exists(base_path):
        raise InputError(f"{what}, which does not exist: put it, or a link to it, there")
    if resolved(step_directory(base_path) or base_path) == resolved(step):
        raise InputError(f"{what}, which is the run itself")
    base = _unchanged(what, read(base_path), facts["base"])
    adapted = base if processor is None else adapt_checkpoint(base_path, base, processor.grid, **facts["adapt"])
    trained = open_params(step)
    check_arrays(step, trained, _trained_shapes(trained, param_shapes(config), facts["rank"]))
    scale = facts["alpha"] / facts["rank"]
    arrays = {path: _merged(path, array, trained, scale) for path, array in adapted.arrays.items()}
    check_arrays(step, arrays, param_shapes(config))
    whole = Checkpoint(config, arrays, processor)
    return AdapterRun(base_path, base, adapted, trained, facts["rank"], facts["alpha"], whole)


def _facts(metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The metadata about adapters. Raises InputError."""
    facts = check_stored(check_stored(metadata, {"lora": PART}, where)["lora"], LORA, f"{where}lora.")
    reference = {"digest": NAME} if "digest" in facts["base"] else {"grid": NAME, "digests": Field({}, "", items=NAME)}
    base = check_stored(facts["base"], {"path": NAME, **reference}, f"{where}lora.base.")
    adapt = check_stored(
        facts["adapt"], {"embedding": Field(False, ""), "head": Field(False, "")}, f"{where}lora.adapt."
    )
    return facts | {"base": base, "adapt": adapt}


def _trained_shapes(
    trained: Iterable[str], shapes: Mapping[str, tuple[int, ...]], rank: int
) -> dict[str, tuple[int, ...]]:
    """Shapes of the trained arrays for a model with these shapes: adapters in pairs, other arrays as they are."""
    parts = (path.removeprefix(f"{ADAPTERS}/") for path in trained if path.startswith(f"{ADAPTERS}/"))
    kernels = sorted({f"{re.escape(part.rpartition('/')[0])}$" for part in parts})
    adapters = adapter_shapes(shapes, rank, kernels) if kernels else {}
    whole = {path: shapes[path] for path in trained if path in shapes}
    return {f"{ADAPTERS}/{path}": shape for path, shape in adapters.items()} | whole


def _merged(path: str, array: LazyArray, trained: Mapping[str, LazyArray], scale: float) -> LazyArray:
    """The array after training: replaced, merged with its adapters (in its own dtype), or unchanged."""
    if path in trained:
        return trained[path]
    if f"{ADAPTERS}/{path}/a" not in trained:
        return array

    def read() -> np.ndarray:
        w = array.read()
        a, b = (trained[f"{ADAPTERS}/{path}/{name}"].read() for name in "ab")
        merged = np.empty_like(w)
        layers = axes_of(path)[0].startswith("L")
        for part in [slice(i, i + 1) for i in range(len(w))] if layers else [slice(None)]:  # by layer: float32 is large
            merged[part] = w[part].astype(np.float32) + scale * product(path, a[part], b[part])
        return merged

    return LazyArray(array.shape, array.dtype, read)


def in_float32(run: AdapterRun) -> Checkpoint:
    """`run.whole` with adapters merged in float32, as `peft` computes on a float32 base."""
    scale = run.alpha / run.rank
    wide = {path: array.astype(np.dtype(np.float32)) for path, array in run.adapted.arrays.items()}
    return replace(run.whole, arrays={path: _merged(path, x, run.trained, scale) for path, x in wide.items()})


def base_export(path: str | AnyPath) -> str:
    """Why transformers cannot load `path` as the base of adapters; "" if it can, because it is one of our exports."""
    path = to_path(path)
    if not is_file(path / CONFIG) or not is_file(path / "modeling_spatialvla.py"):
        return f"{path} is not a directory written by convert --to pytorch"
    return "" if EXTRA in read_json(path / CONFIG) else f"{path} holds the release's code, not that of an export"


def fingerprint(tensors: Mapping[str, LazyArray]) -> str:
    """A hash of evenly spaced values of each published tensor except ZoeDepth's. The exported model compares it with
    its own parameters when adapters are loaded (`base_fingerprint` in export/transformers/modeling_spatialvla.py)."""
    total, found = hashlib.sha256(), {key.replace(SIGLIP, SIGLIP_5): x for key, x in tensors.items()}
    for name in sorted(name for name in found if not name.startswith("vision_zoe_model.")):
        values = found[name].read().reshape(-1)
        samples = values[:: max(1, values.size // SAMPLES)][:SAMPLES]
        total.update(name.encode() + samples.astype("<f4").tobytes())
    return total.hexdigest()


def write_peft(
    path: str | AnyPath,
    run: AdapterRun,
    files: Mapping[str, str] | None = None,
    base: str | AnyPath | None = None,
    base_files: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Write `run` as a directory of adapters for `base`, the PyTorch export of the run's base. The directory also gets
    the run's processor and `files` ({name: text}: the Python code and the card); a base that is written gets
    `base_files`. It appears whole or not at all. Returns {name: digest} of the tensors.

        model = AutoModel.from_pretrained(base, trust_remote_code=True)
        model = PeftModel.from_pretrained(model, path)
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)

    If `base` is None, uses the run's base itself if transformers can load it, or else writes an export of it to
    `path`/base. Raises InputError if the base has changed or `base` does not match it. Also raises it if the vocabulary
    was adapted too, which `peft` cannot store.
    """
    changed = [k for k, array in run.adapted.arrays.items() if k != EMBEDDING and array is not run.base.arrays[k]]
    if changed:
        raise InputError(
            f"{run.base_path} was adapted to another grid in {changed[0]} too, which adapters can't carry: "
            "convert with --to pytorch --merge"
        )
    adapters = adapter_tensors(run.trained)
    table = run.whole.arrays[EMBEDDING]
    full = [] if table is run.base.arrays[EMBEDDING] else ["spatial_embed_tokens"]
    if base is None and not base_export(run.base_path):
        base = run.base_path
    if base is not None and (problem := base_export(base)):
        raise InputError(problem)
    about = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(absolute(to_path(base or to_path(path) / BASE))),
        "r": run.rank,
        "lora_alpha": run.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({key.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0] for key in adapters}),
        "modules_to_save": full,
        "inference_mode": True,
    }
    tensors, digests = recorded(adapters | {f"{PEFT_PREFIX}{name}.weight": table for name in full})
    with new_directory(to_path(path), PEFT_CONFIG) as folder:
        if base is None:
            write_huggingface(folder / BASE, run.base, files=base_files)
        of_base = safetensors.open_directory(to_path(base or folder / BASE))
        if base is not None:
            of_base = _same_tensors(to_path(base), of_base, run)
        # `auto_mapping` says how to load the base. It is the file's only field that may hold the fingerprint.
        loading = {"base_model_class": "AutoModel", "parent_library": "transformers"}
        about["auto_mapping"] = loading | {"base_fingerprint": fingerprint(of_base)}
        write_json(folder / PEFT_CONFIG, about)
        write_config(folder, run.whole.config, run.whole.processor, {x.dtype for x in tensors.values()})
        if run.whole.processor is not None:
            write_processor(folder, run.whole.processor, run.whole.config)
        write_files(folder, files)
        safetensors.write_file(folder / PEFT_WEIGHTS, tensors)
    return digests


def _same_tensors(path: AnyPath, tensors: Mapping[str, LazyArray], run: AdapterRun) -> dict[str, LazyArray]:
    """The tensors of the run's base. Reading one raises InputError unless the export at `path` has the same values."""
    expected = unstacked_tensors(run.base.arrays)

    def compare(key: str, x: np.ndarray) -> None:
        if key not in tensors or digest(tensors[key].read()) != digest(x):
            raise InputError(
                f"{path} is not an export of {run.base_path}, on which the adapters were trained: {key} differs"
            )

    return {key: x.inspected(partial(compare, key)) for key, x in expected.items()}


def adapter_tensors(trained: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """Our adapters under `peft`'s names: "….q_proj.lora_A.weight" f[rank, in] and "….lora_B.weight" f[out, rank].

    SigLIP's are stored twice: under its name in transformers 4 and, with one level less, in 5. `peft` uses the one that
    the model has and ignores the other.
    """
    adapters = {path: array for path, array in trained.items() if path.startswith(f"{ADAPTERS}/")}
    tensors = unstacked_tensors(adapters, adapter_rules())
    return {PEFT_PREFIX + name: x for key, x in tensors.items() for name in (key, key.replace(SIGLIP, SIGLIP_5))}


def adapter_rules() -> list[Rule]:
    """Rules for the a and b of kernels that can have adapters: "(N H) D -> N D H" becomes "r D -> r D" for a and "(N H)
    r -> N H r" for b."""
    rules = []
    for rule in (rule for rule in SPATIALVLA if is_linear(rule.path)):
        (outputs, inputs), ours = axes_of_layout(rule.layout)
        for name, first, second, letter in (("a", ["r"], inputs, "A"), ("b", outputs, ["r"], "B")):
            # Keep the kernel's axis order: a has rank, then the summed axes; b has the output axes, then rank.
            ordered = [x for x in ours if x in first + second]
            ordered = ["r", *ordered] if name == "a" else [*ordered, "r"]
            layout = f"({' '.join(first)}) ({' '.join(second)}) -> {' '.join(ordered)}"
            keys = tuple(key.removesuffix(".weight") + f".lora_{letter}.weight" for key in rule.keys)
            rules.append(Rule(f"{ADAPTERS}/{rule.path}/{name}", layout, keys))
    return rules
