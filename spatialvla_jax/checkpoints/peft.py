"""Runs that hold adapters alone: read as the whole model that they make of their base, or written for `peft`.

Such a run's checkpoint has in `params` what was trained ("lora/…" and the spatial table). Its metadata has under "lora"
rank and alpha, how the base was adapted to the run's grid, and where the base is, with a digest of it.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spatialvla_jax.actions import grid_to_dict
from spatialvla_jax.checkpoints import safetensors_io as safetensors
from spatialvla_jax.checkpoints.huggingface import CONFIG, config_to_published, write_code, write_processor
from spatialvla_jax.checkpoints.mapping import SPATIALVLA, Rule, axes_of_layout, check_arrays, param_shapes, slots
from spatialvla_jax.checkpoints.orbax import open_params, parse_metadata, read_metadata, step_directory
from spatialvla_jax.checkpoints.regrid import EMBEDDING, adapt_checkpoint
from spatialvla_jax.checkpoints.types import Checkpoint, LazyArray, check_finite
from spatialvla_jax.errors import InputError
from spatialvla_jax.models.lora import ADAPTERS, axes_of, is_linear, product
from spatialvla_jax.utils.atomic import new_directory, write_json

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SIGLIP, SIGLIP_5 = "vision_tower.vision_model.", "vision_tower."
PEFT_PREFIX = "base_model.model."  # of every name in PEFT_WEIGHTS


@dataclass(frozen=True)
class AdapterRun:
    """`base` as it was read, `adapted` on the run's grid; `trained` are the run's own arrays; `whole` is all of it."""

    base_path: Path
    base: Checkpoint
    adapted: Checkpoint
    trained: dict[str, LazyArray]
    rank: int
    alpha: float
    whole: Checkpoint


def digest(checkpoint: Checkpoint) -> str:
    """A hash of every array and of the grid; holds one array at a time."""
    grid = checkpoint.processor and grid_to_dict(checkpoint.processor.grid)
    total = hashlib.sha256(json.dumps(grid).encode())
    for path, array in sorted(checkpoint.arrays.items()):
        total.update(f"{path} {array.shape} {array.dtype}".encode())
        total.update(np.ascontiguousarray(array.read()).reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def refer(path: str | Path, checkpoint: Checkpoint) -> dict[str, str]:
    """What a run of adapters keeps of its base, which was read from `path`."""
    return {"path": str((step_directory(path) or Path(path)).absolute()), "digest": digest(checkpoint)}


def is_adapter_run(path: str | Path) -> bool:
    step = step_directory(path)
    return step is not None and "lora" in read_metadata(step)


def read_adapters(path: str | Path, read: Callable[[Path], Checkpoint]) -> AdapterRun:
    """A run of adapters (its newest step) or one step of it, with its base, which `read` opens.

    Raises InputError where the base is not there any more, or is another, and for damaged files.
    """
    step = step_directory(path)
    assert step is not None
    metadata = read_metadata(step)
    config, processor = parse_metadata(step, metadata)
    facts = metadata["lora"]
    base_path = Path(facts["base"]["path"])
    if not base_path.exists():
        raise InputError(f"{step} holds adapters of {base_path}, which does not exist: put it, or a link to it, there")
    base = read(base_path)
    if digest(base) != facts["base"]["digest"]:
        raise InputError(
            f"{step} holds adapters of {base_path}, which has changed since: they fit its old weights alone"
        )
    adapted = base if processor is None else adapt_checkpoint(base_path, base, processor.grid, **facts["adapt"])
    trained = open_params(step)
    check_finite(step, trained)
    scale = facts["alpha"] / facts["rank"]
    arrays = {path: _merged(path, array, trained, scale) for path, array in adapted.arrays.items()}
    check_arrays(step, arrays, param_shapes(config))
    whole = Checkpoint(config, arrays, processor)
    return AdapterRun(base_path, base, adapted, trained, facts["rank"], facts["alpha"], whole)


def _merged(path: str, array: LazyArray, trained: Mapping[str, LazyArray], scale: float) -> LazyArray:
    """The array as trained: replaced, with its adapters added (in its own dtype), or as it is."""
    if path in trained:
        return trained[path]
    if f"{ADAPTERS}/{path}/a" not in trained:
        return array

    def read() -> np.ndarray:
        w = array.read()
        a, b = (trained[f"{ADAPTERS}/{path}/{name}"].read() for name in "ab")
        merged = np.empty_like(w)
        layers = axes_of(path)[0].startswith("L")
        for part in [slice(i, i + 1) for i in range(len(w))] if layers else [slice(None)]:  # in float32, so one a time
            merged[part] = w[part].astype(np.float32) + scale * product(path, a[part], b[part])
        return merged

    return LazyArray(array.shape, array.dtype, read)


def write_peft(path: str | Path, run: AdapterRun, code: Mapping[str, str] | None = None) -> dict[str, LazyArray]:
    """Write `run` as a directory of adapters for the base's PyTorch export, with the run's own processor and the Python
    files `code`; it appears whole or not at all. Returns {name: array} of what was written.

        model = AutoModel.from_pretrained(export_of_the_base, trust_remote_code=True)
        model = PeftModel.from_pretrained(model, path)
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)

    Raises InputError where the base's vocabulary was adapted too, for which `peft` has no place.
    """
    changed = [k for k, array in run.adapted.arrays.items() if k != EMBEDDING and array is not run.base.arrays[k]]
    if changed:
        raise InputError(
            f"{run.base_path} was adapted to another grid in {changed[0]} too, which adapters can't carry: "
            "convert with --to pytorch --merge"
        )
    tensors = adapter_tensors(run.trained)
    modules = sorted({key.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0] for key in tensors})
    table = run.whole.arrays[EMBEDDING]
    full = [] if table is run.base.arrays[EMBEDDING] else ["spatial_embed_tokens"]
    tensors |= {f"{PEFT_PREFIX}{name}.weight": table for name in full}
    about = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(run.base_path),
        "r": run.rank,
        "lora_alpha": run.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
        "modules_to_save": full,
        "inference_mode": True,
    }
    tensors = dict(sorted(tensors.items()))
    with new_directory(Path(path)) as folder:
        write_json(folder / PEFT_CONFIG, about)
        write_json(folder / CONFIG, config_to_published(run.whole.config, {array.dtype for array in tensors.values()}))
        if run.whole.processor is not None:
            write_processor(folder, run.whole.processor, run.whole.config)
        write_code(folder, code)
        specs = {key: (array.shape, array.dtype) for key, array in tensors.items()}
        safetensors.write_file(folder / PEFT_WEIGHTS, specs, lambda key: tensors[key].read())
    return tensors


def adapter_tensors(trained: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """Our adapters under `peft`'s names: "….q_proj.lora_A.weight" f[rank, in] and "….lora_B.weight" f[out, rank].

    SigLIP's are there twice, under its name in transformers 4 and, one level less, in 5: `peft` takes the one that the
    model has and passes over the other.
    """
    arrays = {path: array for path, array in trained.items() if path.startswith(f"{ADAPTERS}/")}
    tensors = {}
    for slot in slots({path: array.shape for path, array in arrays.items()}, adapter_rules()):
        array = arrays[slot.path]
        read = lambda slot=slot, array=array: slot.to_published(array.read())  # noqa: E731
        for key in {slot.key, slot.key.replace(SIGLIP, SIGLIP_5)}:
            tensors[PEFT_PREFIX + key] = LazyArray(slot.shape, array.dtype, read)
    return tensors


def adapter_rules() -> list[Rule]:
    """The rules of the kernels that can have adapters, for their a and b: "(N H) D -> N D H" is "r D -> r D" for a and
    "(N H) r -> N H r" for b."""
    rules = []
    for rule in (rule for rule in SPATIALVLA if is_linear(rule.path)):
        (outputs, inputs), ours = axes_of_layout(rule.layout)
        for name, first, second, letter in (("a", ["r"], inputs, "A"), ("b", outputs, ["r"], "B")):
            # Ours keep the kernel's order: a is rank and then what is summed over, b what comes out and then rank.
            ordered = [x for x in ours if x in first + second]
            ordered = ["r", *ordered] if name == "a" else [*ordered, "r"]
            layout = f"({' '.join(first)}) ({' '.join(second)}) -> {' '.join(ordered)}"
            keys = tuple(key.removesuffix(".weight") + f".lora_{letter}.weight" for key in rule.keys)
            rules.append(Rule(f"{ADAPTERS}/{rule.path}/{name}", layout, keys))
    return rules


def same_bytes(file: Path, tensors: Mapping[str, LazyArray]) -> bool:
    """Whether a safetensors file holds exactly these."""
    stored = safetensors.open_file(file)
    return stored.keys() == tensors.keys() and all(
        stored[key].dtype == array.dtype and np.array_equal(stored[key].read(), array.read())
        for key, array in tensors.items()
    )
