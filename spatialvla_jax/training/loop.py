"""The training run: data, state, steps, metrics, checkpoints; started again it goes on where it was."""

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from tqdm import tqdm

from spatialvla_jax.batch import Batch
from spatialvla_jax.config import check_post_training, check_resumable
from spatialvla_jax.data import Loader, open_data
from spatialvla_jax.errors import InputError
from spatialvla_jax.models import preset
from spatialvla_jax.training.flops import model_flops
from spatialvla_jax.training.init_from import check_same, make_processor, open_start, starting_params
from spatialvla_jax.training.metrics import Clock, MetricsLog, check_wandb, rates, scalars
from spatialvla_jax.training.optimizer import make_optimizer, split_frozen, swap_ema, update_norms
from spatialvla_jax.training.saving import FOLDER, Checkpoints
from spatialvla_jax.training.setup import frozen_patterns, jit_train_step, lora_scale, make_model
from spatialvla_jax.training.sharding import BATCH, check_batch, make_mesh, on_mesh
from spatialvla_jax.training.state import TrainState, init_state
from spatialvla_jax.training.step import make_eval_step
from spatialvla_jax.utils.atomic import write_json
from spatialvla_jax.utils.chips import peak
from spatialvla_jax.utils.distributed import Preemption, is_writer

FINISHED = "finished"  # of a run's directory: the file that stands for its last step


def train(
    config: ConfigDict, workdir: Path, *, wandb: str = "", profile: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Train to `config.train.steps`, from the last checkpoint in `workdir` if there is one; after SIGTERM, to the end
    of the step and a checkpoint of it.

    Metrics also go to the Weights & Biases project `wandb`; steps `profile`, first and last, are traced to
    `workdir/profile`. Returns {"step", "params" and "trainable" (counts), "checkpoint" (directory), "metrics" (last
    logged)}. The same config and seed give the same bits, however often the run was killed in between. From the last
    step on `workdir/finished` exists, which tells those who start runs again that this one is done.
    """
    with Preemption() as preemption:
        return _train(config, workdir, preemption, wandb, profile)


def _train(
    config: ConfigDict, workdir: Path, preemption: Preemption, wandb: str, profile: tuple[int, int] | None
) -> dict[str, Any]:
    if wandb:
        check_wandb()
    workdir.mkdir(parents=True, exist_ok=True)
    check_post_training(config)
    fields = config.model.to_dict()
    preset(fields.pop("preset"), **fields)  # a wrong choice is an error now, not after the data was indexed
    saved = workdir / "config.json"
    if saved.exists():
        check_resumable(json.loads(saved.read_text()), config, workdir)
    if config.model.depth_source == "zoedepth" and not config.init and is_writer():
        tqdm.write(
            "warning: model.depth_source=zoedepth and init is empty: the depth model has random weights",
            file=sys.stderr,
        )
    mesh = make_mesh(config.mesh.to_dict())
    check_batch(config.train.batch_size, config.train.grad_accum_steps, mesh)
    source, before = open_start(config, workdir)
    loader = open_data(config, tokenizer=None if before is None or config.data.prompt.model else before.tokenizer)
    if config.train.eval_every:  # a split that is missing is an error now, not at the first validation
        loader.num_frames(config.train.eval_split)
    if is_writer():
        tqdm.write(loader.describe(), file=sys.stderr)

    processor = make_processor(config, loader, before)
    model = make_model(config, processor.grid, processor.tokenizer.vocab_size)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    frozen = frozen_patterns(config, model)
    start_from, origin = starting_params(config, workdir, model, source, processor.grid)
    metadata = origin | {
        "model": model.config.to_dict(),
        "processor": processor.to_dict(),
        "train_config": json.loads(json.dumps(config.to_dict())),
    }
    checkpoints = Checkpoints(
        workdir,
        metadata,
        every=config.checkpoint.every,
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every or None,
        left_out=frozen if config.lora.rank else (),
    )
    latest = checkpoints.latest()
    state, shardings = init_state(model, optimizer, frozen, config.seed, mesh, start_from)
    if latest is not None:
        check_same(checkpoints.restore_metadata(latest), metadata, workdir)
        state = checkpoints.restore(latest, state, shardings)
    start, steps = latest or 0, config.train.steps
    if is_writer():
        write_json(saved, config.to_dict())
        write_json(workdir / "statistics.json", loader.statistics)
        if start < steps:
            (workdir / FINISHED).unlink(missing_ok=True)

    batch_sharding, replicated = NamedSharding(mesh, BATCH), NamedSharding(mesh, P())
    grid, seed = jax.device_put((processor.grid, np.uint32(config.seed)), replicated)
    step_fn = jit_train_step(config, model, mesh, shardings, len(loader.names))
    eval_fn = jax.jit(
        on_mesh(make_eval_step(model, len(loader.names), lora_scale(config)), mesh),
        in_shardings=(shardings.params, batch_sharding, replicated),
        out_shardings=replicated,
    )

    def last_update(state: TrainState) -> dict[str, Any]:
        return update_norms(config.optimizer, steps, split_frozen(state.params, frozen)[0], state.opt_state)

    update_fn = jax.jit(last_update, in_shardings=(shardings,), out_shardings=replicated)
    tokens = model.config.prefix_length + model.config.num_action_tokens + 1
    flops = model_flops(config, processor.grid) if peak() else 0.0

    log = MetricsLog(workdir, start, wandb)
    batches = loader.batches(
        config.train.batch_size,
        start_step=start,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        total_steps=steps,
    )
    skipped, replaced, logged, clock = loader.num_skipped(), 0, start, Clock()
    step, running, last, tracing = start, None, {}, False
    bar = tqdm(total=steps, initial=start, unit="step", desc="train", dynamic_ncols=True, disable=not is_writer())

    def save(last: bool) -> None:
        with clock("compute"):
            jax.block_until_ready(state)
        with clock("save"):
            checkpoints.save(state, step, last=last)

    try:
        for step in range(start + 1, start + 1 if preemption.asked else steps + 1):
            if profile and step == max(profile[0], start + 1) <= profile[1]:
                jax.profiler.start_trace(str(workdir / "profile"))
                tracing = True
            with clock("data"):
                batch = next(batches)
            # A fingerprint of which frames the step saw: two runs saw the same data if these agree.
            digest = zlib.crc32(np.asarray(batch.sample_id).tobytes())
            with clock("compute"):
                state, metrics = step_fn(state, to_device(batch, batch_sharding), grid, seed)
                if running is not None:  # wait for the step before: the device has one to do meanwhile
                    check_skipped(running, step - 1, config.train.max_skipped)
                running = metrics
            bar.update()
            preempted = step < steps and preemption.reached(step)
            stop = step == steps or preempted
            if step % config.train.log_every == 0 or step in (1, steps):
                with clock("compute"):
                    last = scalars(jax.device_get(metrics | update_fn(state)), loader.names)
                times = clock.report(step - logged)
                shown = {"loss": f"{last['loss']:.3f}", "l1": f"{last['l1']:.3f}"}
                shown["data_wait"] = f"{times['data/wait_seconds'] / times['step/seconds']:.0%}"
                bar.set_postfix(shown, refresh=False)
                before, replaced = replaced, sum(loader.replaced().values())
                counts = {"data/skipped": skipped, "data/replaced": replaced - before}  # episodes; samples since
                times |= rates(times["step/seconds"], config.train.batch_size, tokens, flops)
                log.write(
                    step, last | {"batch": f"{digest:08x}"} | counts, times | {"save/seconds": checkpoints.seconds}
                )
                logged = step
            if tracing and (stop or step == profile[1]):  # pyright: ignore[reportOptionalSubscript]
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
                tracing = False
            due = checkpoints.due(step)
            if preempted:  # a validation may take longer than what is left
                save(last=True)
            if config.train.eval_every and (step % config.train.eval_every == 0 or step == steps):
                with clock("eval"):
                    values = validate(eval_fn, state, loader, config, batch_sharding, grid)
                log.write(step, {f"val/{k}": v for k, v in values.items()})
            if step == steps or (due and not preempted):
                save(last=stop)
            if stop:
                break
    finally:
        bar.close()
        checkpoints.close()
        log.close()
    if step == steps and is_writer():
        write_json(workdir / FINISHED, {"step": step})
    size, trainable = (
        sum(x.size for x in jax.tree.leaves(p)) for p in (state.params, split_frozen(state.params, frozen)[0])
    )
    return {
        "step": step,
        "params": size,
        "trainable": trainable,
        "checkpoint": str(workdir / FOLDER),
        "metrics": last,
    }


def check_skipped(metrics: dict[str, jax.Array], step: int, limit: int) -> None:
    """Waits for the step that gives `metrics`; raises InputError once too many were skipped."""
    skipped = int(metrics["skipped"])
    if skipped > limit:
        raise InputError(
            f"step {step}: loss or gradient are not finite, {skipped} times in this run: more than train.max_skipped "
            f"{limit}; lower the learning rate, or look at the data of the steps with `skipped` in metrics.jsonl"
        )


def validate(
    eval_fn: Any, state: TrainState, loader: Loader, config: ConfigDict, sharding: NamedSharding, grid: Any
) -> dict[str, float]:
    """Teacher-forced metrics averaged over the frames of the validation split."""
    params, _ = swap_ema(state.params, state.opt_state)
    totals: dict[str, Any] = {}
    count = 0.0
    batches = loader.epoch(
        config.train.batch_size // config.train.grad_accum_steps,
        config.train.eval_split,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        frames=config.train.eval_frames or None,
    )
    for batch in batches:
        sums, n = jax.device_get(eval_fn(params, to_device(batch, sharding), grid))
        count += float(n)
        totals = {k: totals.get(k, 0.0) + np.asarray(v, np.float64) for k, v in sums.items()}
    means = {k: v if k == "datasets" else v / count for k, v in totals.items()}
    return scalars(means, loader.names)


def to_device(batch: Batch, sharding: NamedSharding) -> Batch:
    """This host's rows of the global batch → global arrays."""
    rows = batch.replace(sample_id=None)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), rows)
