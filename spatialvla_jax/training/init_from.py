"""Where a run starts: random parameters, or a checkpoint with its tokenizer and grid, adapted as configured."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from spatialvla_jax.actions import ActionTokenizer
from spatialvla_jax.checkpoints import Checkpoint, read_checkpoint, start_from_paligemma
from spatialvla_jax.checkpoints.hub import find_checkpoint, is_hub_id, parse_id, pinned
from spatialvla_jax.checkpoints.mapping import check_arrays, param_shapes
from spatialvla_jax.checkpoints.orbax import open_head, parse_metadata, read_metadata
from spatialvla_jax.checkpoints.paligemma import is_paligemma
from spatialvla_jax.checkpoints.peft import refer
from spatialvla_jax.checkpoints.processor import Processor
from spatialvla_jax.checkpoints.regrid import adapt_checkpoint
from spatialvla_jax.checkpoints.types import LazyArray, read_json, recorded
from spatialvla_jax.config import check_resumable, completed, default_config
from spatialvla_jax.data import Loader
from spatialvla_jax.data.statistics import difference
from spatialvla_jax.errors import InputError
from spatialvla_jax.models import PRESETS, Params
from spatialvla_jax.models.lora import ADAPTERS, init_adapters
from spatialvla_jax.models.spatialvla import SpatialVLAConfig
from spatialvla_jax.training.grid_fit import make_grid, mixture_gaussians
from spatialvla_jax.training.losses import new_head
from spatialvla_jax.training.setup import TrainSetup
from spatialvla_jax.utils.renames import MODEL_FIELDS, renamed
from spatialvla_jax.utils.storage import AnyPath


def open_start(config: ConfigDict, step: AnyPath | None) -> tuple[Checkpoint | None, Processor | None]:
    """→ (the SpatialVLA checkpoint in `config.init`, the processor to use); each is None if missing or not needed.

    A resumed run, from the directory `step`, uses its own processor. It needs `init` only as the base of its adapters.
    """
    if not config.init:
        return None, None
    checkpoint = None
    if (step is None or config.lora.rank) and not is_paligemma(find_checkpoint(config.init, "config key init")):
        checkpoint = read_checkpoint(config.init)
    if step is not None:
        return checkpoint, parse_metadata(step, read_metadata(step))[1]
    return checkpoint, checkpoint and checkpoint.processor


def pin_init(config: ConfigDict, begun: dict[str, Any]) -> ConfigDict:
    """The config with the Hub's branch in `init` replaced by its commit, so that the run always starts from the same
    weights. A resumed run (`begun` not empty) keeps its commit."""
    config = config.copy_and_resolve_references()
    for key in ("init", "init_zoedepth") if config.model.depth_source == "zoedepth" else ("init",):
        if config[key] and is_hub_id(config[key]):
            id, revision = parse_id(config[key])
            before = begun.get(key) or ""
            keeps = before.startswith(f"{id}@") and not re.fullmatch("[0-9a-f]{40}", revision or "")
            config[key] = before if keeps else pinned(config[key])
    return config


def with_model_of(config: ConfigDict, start: Checkpoint | None, begun: dict[str, Any]) -> ConfigDict:
    """The config with the preset, image size, depth source and mask of the model in `init`. A resumed run (`begun` not
    empty) takes them from the config it started with.

    Raises InputError if the config explicitly sets another of these, except the mask.
    """
    if begun:
        model = default_config().model.to_dict() | begun["model"]  # keys newer than the run have their defaults
    elif start is not None:
        model = {"preset": preset_of(config.init, start.config), "image_size": start.config.img.image_size}
        model |= {key: getattr(start.config, key) for key in ("depth_source", "mask")}
    else:
        return config
    config, default = config.copy_and_resolve_references(), default_config().model
    for key in ("preset", "image_size", "depth_source", "mask"):
        value, stored = config.model[key], model[key]
        if value == stored:
            continue
        if value == default[key]:
            config.model[key] = stored
        elif key != "mask":
            raise InputError(f"config key model.{key} is {value!r}, and the model in {config.init} has {stored!r}")
    return config


def check_begun(begun: dict[str, Any], config: ConfigDict, workdir: AnyPath, source: str = "this config") -> None:
    """`check_resumable` for a config whose `init` is spelled as the user gave it."""
    if config.init:
        config = with_model_of(pin_init(config, begun), None, begun)
    check_resumable(begun, config, workdir, source)


def check_planned(folder: Path, plan: dict[str, Any], source: str) -> None:
    """Raises InputError if a sweep's trial was trained with another config than its plan in the file `source` says.
    Plans of earlier versions do not say it."""
    if "config_of_all" in plan:
        try:
            keys = {**plan["config_of_all"], **plan["config_of_each"][folder.name]}
        except (KeyError, TypeError):
            raise InputError(f"{source} has no config of {folder.name}: it is not the plan of a sweep") from None
        check_begun(read_json(folder / "config.json"), completed(keys, {}, source), folder, source)


def preset_of(path: str, config: SpatialVLAConfig) -> str:
    """The preset name for a checkpoint's sizes, the image's aside. Raises InputError if no preset has them."""
    vocabulary, image_size = config.llm.vocab_size, config.img.image_size
    for name, sizes in sorted(PRESETS.items(), key=lambda item: item[1].img.image_size != image_size):
        sizes = replace(sizes, img=replace(sizes.img, image_size=image_size))
        same = (sizes.img, replace(sizes.llm, vocab_size=vocabulary)) == (config.img, config.llm)
        if same and (config.depth_source != "zoedepth" or sizes.zoe == config.zoe):
            return name
    raise InputError(f"the model in {path} matches no preset; there are {', '.join(PRESETS)}")


def make_processor(config: ConfigDict, loader: Loader, start: Processor | None = None) -> Processor:
    """A grid fitted to the training split, or the grid of `start`, with the loader's tokenizer and statistics."""
    grid = make_grid(config.grid.to_dict(), lambda: mixture_gaussians(config.to_dict(), loader), start and start.grid)
    return Processor(
        tokenizer=loader.tokenizer,
        grid=jax.tree.map(np.asarray, grid),
        statistics=loader.statistics,
        intrinsics=loader.intrinsics,
        prompt_template=config.data.prompt.template,
        versions=loader.versions,
    )


def with_grid_of_run(processor: Processor, before: Processor | None) -> Processor:
    """The processor with the grid of the run's checkpoint, `before`, if the grid fitted now equals it up to rounding.

    Another kind of CPU fits a grid that differs in its last bits, but a run keeps the one it started with."""
    if before is None or jax.tree.structure(before.grid) != jax.tree.structure(processor.grid):
        return processor
    own = jax.tree.map(np.asarray, before.grid)
    pairs = zip(jax.tree.leaves(own), jax.tree.leaves(processor.grid), strict=True)
    same = all(a.shape == b.shape and np.allclose(a, b, rtol=0, atol=1e-5) for a, b in pairs)
    return replace(processor, grid=own) if same else processor


def _starting_head(setup: TrainSetup) -> Params:
    """The head of the run `setup.init` if it has one for the same targets, else a new one."""
    head: dict[str, Any] = flatten_dict(new_head(setup.loss, setup.model.config), sep="/")
    before = open_head(setup.init) if head else {}
    if {path: x.shape for path, x in before.items()} == {path: x.shape for path, x in head.items()}:
        head = {path: array.read() for path, array in before.items()}
    return unflatten_dict({path: np.asarray(x) for path, x in head.items()}, sep="/")


def starting_params(
    setup: TrainSetup, step: AnyPath | None, checkpoint: Checkpoint | None, grid: ActionTokenizer
) -> tuple[Params | None, dict[str, Any]]:
    """→ (parameters, metadata about them) from `setup.init`, a PaliGemma or the SpatialVLA `checkpoint`, adapted to
    `grid`. The parameters are None if they will be random or restored from the run's own checkpoint in the directory
    `step`.

    They are float32, except that with adapters the frozen ones keep the dtype in which they are stored. Raises
    InputError naming parameters whose shapes differ from this model's.
    """
    lora, model = setup.adapters, setup.model
    if not setup.init or (step and lora is None):
        return None, {}
    shapes = param_shapes(model.config)
    digests: dict[str, str] = {}
    if checkpoint is not None and lora:
        arrays, digests = recorded(checkpoint.arrays)
        checkpoint = replace(checkpoint, arrays=arrays)
    start = (checkpoint and adapt_checkpoint(setup.init, checkpoint, grid, **setup.adapt)) or _paligemma(setup)
    check_arrays(setup.init, start.arrays, shapes)
    frozen = setup.frozen if lora else ()

    def read(path: str, leaf: LazyArray) -> np.ndarray:
        return leaf.read() if any(re.match(p, path) for p in frozen) else leaf.read().astype(np.float32)

    params = unflatten_dict({path: read(path, leaf) for path, leaf in start.arrays.items()}, sep="/")
    params |= _starting_head(setup)
    if checkpoint is None or lora is None:
        return params, {}
    adapters = init_adapters(shapes, lora.rank, lora.targets, jax.random.key(setup.seed))
    before = read_metadata(step).get("lora", {}).get("base") if step else None
    base = refer(setup.init, checkpoint, digests, before)
    about = {"rank": lora.rank, "alpha": lora.alpha, "adapt": dict(setup.adapt), "base": base}
    return params | {ADAPTERS: jax.tree.map(np.asarray, adapters)}, {"lora": about}


def check_same(saved: dict[str, Any], now: dict[str, Any], loader: Loader, workdir: AnyPath) -> None:
    """Raises InputError if a run's data, or the base of its adapters, changed since the run started."""
    now = json.loads(json.dumps(now))
    for index in () if loader.config.statistics else loader.indexes():  # those of a file may be of other data
        if what := difference(saved["processor"]["statistics"][index.name], index.statistics):
            raise InputError(f"the data of {workdir} changed since its run began: in dataset {index.name!r}, {what}")
    # Earlier versions did not store "versions".
    before, after = (about["processor"] | {"versions": {}} for about in (saved, now))
    if before != after or renamed(saved["model"], MODEL_FIELDS) != now["model"]:
        raise InputError(f"the data of {workdir} changed since its run began: grid, statistics or tokenizer differ")
    if saved.get("packed") != now.get("packed"):
        raise InputError(f"the data of {workdir} changed since its run began: the files of data.packed are others")
    if saved.get("lora") != now.get("lora"):
        raise InputError(f"{now['lora']['base']['path']} changed since the run in {workdir} began to adapt it")


def _paligemma(setup: TrainSetup) -> Checkpoint:
    init, model = setup.init, setup.model.config
    if setup.adapters:
        raise InputError(
            f"lora.rank={setup.adapters.rank} freezes the LM head, and that of the PaliGemma {init} has "
            "no action tokens: start from a SpatialVLA"
        )
    zoedepth = setup.init_zoedepth if model.depth_source == "zoedepth" else None
    if zoedepth == "":
        raise InputError(f"config key init is the PaliGemma {init}: init_zoedepth must name a ZoeDepth for it")
    sizes = {k: getattr(model, k) for k in ("spatial_tokens", "tokens_per_action", "depth_source")}
    return start_from_paligemma(init, zoedepth, seed=setup.seed, **sizes)
