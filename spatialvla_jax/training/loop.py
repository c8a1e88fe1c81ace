"""The training run: data, state, steps, metrics, checkpoints; started again it goes on where it was."""

import json
import os
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from tqdm import tqdm

from spatialvla_jax.config import check_resumable
from spatialvla_jax.data import Loader, load_data
from spatialvla_jax.data.stats_pipeline import load_stats
from spatialvla_jax.errors import InputError
from spatialvla_jax.grid_tools import make_grid, mixture_gaussians
from spatialvla_jax.interop import read_checkpoint, start_from_paligemma
from spatialvla_jax.interop.mapping import check_leaves, param_shapes
from spatialvla_jax.interop.paligemma import is_paligemma
from spatialvla_jax.models import SpatialVLA, preset
from spatialvla_jax.processor import Processor, model_to_dict
from spatialvla_jax.training import checkpoint
from spatialvla_jax.training.metrics import MetricsLog
from spatialvla_jax.training.optimizer import make_optimizer
from spatialvla_jax.training.program import frozen_patterns, jit_train_step, make_model
from spatialvla_jax.training.sharding import BATCH, check_batch, make_mesh, on_mesh
from spatialvla_jax.training.state import TrainState, init_state
from spatialvla_jax.training.step import make_eval_step

IDENTITY_KEYS = ("sample_id", "dataset_id")  # in the loader's batch, not for the device


def train(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Train to `config.train.steps`, from the last checkpoint in `workdir` if there is one.

    Returns {"step", "params" (count), "checkpoint" (directory), "metrics" (last logged)}. The same config and seed give
    the same bits, however often the run was killed in between.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    saved = workdir / "config.json"
    if saved.exists():
        check_resumable(json.loads(saved.read_text()), config, workdir)
    mesh = make_mesh(config.mesh.to_dict())
    check_batch(config.train.batch_size, config.train.accumulate, mesh)
    loader = open_data(config)
    if config.train.eval_every:  # a split that is missing is an error now, not at the first validation
        loader.num_frames(config.train.eval_split)
    if jax.process_index() == 0:
        tqdm.write(loader.describe(), file=sys.stderr)
    write_json(saved, config.to_dict())
    write_json(workdir / "statistics.json", loader.statistics)

    processor = make_processor(config, loader)
    model = make_model(config, processor.grid, processor.tokenizer.vocab_size)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    frozen = frozen_patterns(config, model)
    metadata = {
        "model": model_to_dict(model.config),
        "processor": processor.to_dict(),
        "train_config": json.loads(json.dumps(config.to_dict())),
    }
    manager = checkpoint.open_manager(
        workdir,
        every=config.checkpoint.every,
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every or None,
    )
    latest = manager.latest_step()
    start_from = starting_params(config, model) if config.init and latest is None else None
    state, shardings = init_state(model, optimizer, frozen, config.seed, mesh, start_from)
    if latest is not None:
        before = checkpoint.restore_metadata(manager, latest)
        if before["processor"] != metadata["processor"] or before["model"] != json.loads(json.dumps(metadata["model"])):
            raise InputError(f"the data of {workdir} changed since its run began: grid, statistics or tokenizer differ")
        state = checkpoint.restore(manager, latest, state, shardings)
    start = int(state.step)

    batch_sharding, replicated = NamedSharding(mesh, BATCH), NamedSharding(mesh, P())
    grid = jax.device_put(processor.grid, replicated)
    step_fn = jit_train_step(config, model, mesh, shardings)
    eval_fn = jax.jit(
        on_mesh(make_eval_step(model), mesh),
        in_shardings=(shardings.params, batch_sharding, replicated, batch_sharding),
    )

    log = MetricsLog(workdir, start)
    batches = loader.batches(
        config.train.batch_size,
        start_step=start,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        total_steps=config.train.steps,
    )
    skipped, replaced, waited, logged = loader.num_skipped(), 0, 0.0, start
    last: dict[str, float] = {}
    bar = tqdm(total=config.train.steps, initial=start, unit="step", desc="train", dynamic_ncols=True)
    try:
        for step in range(start + 1, config.train.steps + 1):
            waiting = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - waiting
            # A fingerprint of which frames the step saw: two runs saw the same data if these agree.
            digest = zlib.crc32(np.ascontiguousarray(batch["sample_id"]).tobytes())
            state, metrics = step_fn(state, to_device(batch, batch_sharding), grid)
            bar.update()
            if step % config.train.log_every == 0 or step in (1, config.train.steps):
                last = {k: float(v) for k, v in jax.device_get(metrics).items()}
                # Waiting for data is in the step's time unless the device was still busy with the steps before.
                wait = waited / (step - logged)
                shown = {"loss": f"{last['loss']:.3f}", "l1": f"{last['l1']:.3f}", "data_wait": f"{1000 * wait:.0f}ms"}
                bar.set_postfix(shown, refresh=False)
                before, replaced = replaced, sum(loader.replaced().values())
                counts = {"data/skipped": skipped, "data/replaced": replaced - before}  # episodes; samples since last
                log.write(step, last | {"batch": f"{digest:08x}"} | counts, {"data/wait_seconds": wait})
                waited, logged = 0.0, step
            if config.train.eval_every and (step % config.train.eval_every == 0 or step == config.train.steps):
                values = validate(eval_fn, state, loader, config, batch_sharding, grid)
                log.write(step, {f"val/{k}": v for k, v in values.items()})
            checkpoint.save(manager, state, metadata, force=step == config.train.steps)
    finally:
        bar.close()
        log.close()
        manager.wait_until_finished()
        manager.close()
    size = sum(x.size for x in jax.tree.leaves(state.params))
    return {"step": int(state.step), "params": size, "checkpoint": str(workdir / checkpoint.FOLDER), "metrics": last}


def validate(
    eval_fn: Any, state: TrainState, loader: Loader, config: ConfigDict, sharding: NamedSharding, grid: Any
) -> dict[str, float]:
    """Teacher-forced metrics averaged over the frames of the validation split."""
    totals: dict[str, float] = {}
    count = 0.0
    batches = loader.epoch(
        config.train.batch_size // config.train.accumulate,
        config.train.eval_split,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        frames=config.train.eval_frames or None,
    )
    for batch in batches:
        arrays = to_device(batch, sharding)
        valid = arrays.pop("valid")
        sums, n = jax.device_get(eval_fn(state.params, arrays, grid, valid))
        count += float(n)
        totals = {k: totals.get(k, 0.0) + float(v) for k, v in sums.items()}
    return {k: v / count for k, v in totals.items()}


def to_device(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """This host's rows of the global batch → global arrays."""
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items() if k not in IDENTITY_KEYS}


def open_data(config: ConfigDict, processor: Processor | None = None) -> Loader:
    """The loader; with a `processor` its statistics and tokenizer take the place of the data's own, without one those
    of `data.statistics` if it is set."""
    path = config.data.to_dict().get("statistics")
    given = load_stats(path)["statistics"] if path and not processor else None
    return load_data(
        config.data,
        image_size=preset(config.model.preset).img.image_size,
        action_chunk=config.model.action_chunk,
        depth=config.model.depth == "dataset",
        statistics=processor.statistics if processor else given,
        tokenizer=processor and processor.tokenizer,
        progress=shard_progress(),
    )


def shard_progress() -> Callable[[str, int, int], None]:
    """A progress bar for each dataset that is indexed: (name, shards done, shards)."""
    bars: dict[str, tqdm] = {}

    def show(name: str, done: int, total: int) -> None:
        if name not in bars:
            bars[name] = tqdm(total=total, desc=f"indexing {name}", unit="shard", leave=False)
        bars[name].update(done - bars[name].n)
        if done == total:
            bars.pop(name).close()

    return show


def make_processor(config: ConfigDict, loader: Loader) -> Processor:
    """The grid fitted to the training split, with the loader's tokenizer and statistics."""
    grid = make_grid(config.grid.to_dict(), lambda: mixture_gaussians(config.to_dict(), loader))
    return Processor(
        tokenizer=loader.tokenizer,
        grid=jax.tree.map(np.asarray, grid),
        statistics=loader.statistics,
        intrinsics=loader.intrinsics,
        prompt_template=config.data.prompt.template,
    )


def starting_params(config: ConfigDict, model: SpatialVLA) -> dict[str, Any]:
    """`config.init`'s parameters in float32; raises InputError naming those that this model has otherwise."""
    if is_paligemma(Path(config.init)):
        sizes = {k: getattr(model.config, k) for k in ("spatial_tokens", "tokens_per_action", "depth")}
        if model.config.depth == "zoedepth" and not config.init_zoedepth:
            raise InputError(
                f"config key init is the PaliGemma {config.init}: init_zoedepth must name a ZoeDepth for it"
            )
        zoedepth = config.init_zoedepth if model.config.depth == "zoedepth" else None
        checkpoint = start_from_paligemma(config.init, zoedepth, seed=config.seed, **sizes)
    else:
        checkpoint = read_checkpoint(config.init)
    check_leaves(config.init, checkpoint.leaves, param_shapes(model.config))
    return unflatten_dict({k: v.read().astype(np.float32) for k, v in checkpoint.leaves.items()}, sep="/")


def write_json(path: Path, value: Any) -> None:
    """By rename, so that a crash leaves the old file whole."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)
