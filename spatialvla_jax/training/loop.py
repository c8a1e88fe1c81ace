"""The training run: data, state, steps, metrics, checkpoints. Rerun the same command to resume."""

import contextlib
import json
import sys
import zlib
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from tqdm import tqdm

from spatialvla_jax.actions import ActionTokenizer, uniform_grid
from spatialvla_jax.batch import Batch
from spatialvla_jax.checkpoints.orbax import FOLDER, parse_metadata, read_metadata, step_directory
from spatialvla_jax.checkpoints.processor import Processor
from spatialvla_jax.checkpoints.types import read_json
from spatialvla_jax.config import check_resumable, check_together, completed
from spatialvla_jax.data import Loader, open_data
from spatialvla_jax.data.pack import packed_digest
from spatialvla_jax.errors import InputError, StorageError
from spatialvla_jax.models import Params
from spatialvla_jax.training.changes import CHANGES, describe_changes
from spatialvla_jax.training.flops import model_flops
from spatialvla_jax.training.goodput import Clock, Goodput
from spatialvla_jax.training.init_from import (
    check_same,
    make_processor,
    open_start,
    pin_init,
    starting_params,
    with_grid_of_run,
    with_model_of,
)
from spatialvla_jax.training.log_folder import LogFolder
from spatialvla_jax.training.losses import Loss
from spatialvla_jax.training.metrics import MetricsLog, check_wandb, rates, scalars
from spatialvla_jax.training.optimizer import split_frozen, swap_ema
from spatialvla_jax.training.saving import Checkpoints, quiet_storage
from spatialvla_jax.training.setup import TrainSetup, check_patterns, make_setup
from spatialvla_jax.training.sharding import BATCH, make_mesh
from spatialvla_jax.training.spikes import Watch
from spatialvla_jax.training.state import TrainState, abstract_state, init_state
from spatialvla_jax.training.step import Jitted, jit_eval_step, jit_train_step, jit_update_norms
from spatialvla_jax.utils import retries
from spatialvla_jax.utils.atomic import write_json
from spatialvla_jax.utils.chips import peak
from spatialvla_jax.utils.compilation_cache import share_compilations
from spatialvla_jax.utils.distributed import Preemption, all_processes, is_writer
from spatialvla_jax.utils.progress import Bar, warn
from spatialvla_jax.utils.renames import CONFIG_KEYS, renamed
from spatialvla_jax.utils.storage import AnyPath, is_file, is_url, remove

CONFIG = "config.json"  # in a run's directory
COMPILED = "compiled"  # in a run's directory
FINISHED = "finished"  # in a run's directory: marks that the last step is done


OnValidation = Callable[[int, Params], Mapping[str, bytes] | None]


@dataclass(frozen=True)
class Run:
    """Everything the steps need, made from a config by `prepare`. `state` is the state after step `start`."""

    workdir: AnyPath
    setup: TrainSetup
    loader: Loader
    grid: ActionTokenizer  # on the devices
    checkpoints: Checkpoints
    state: TrainState
    shardings: TrainState
    start: int
    spikes: dict[str, Any]  # the checkpoint's record of loss spikes, see `Watch`


def train(
    config: ConfigDict,
    workdir: AnyPath,
    *,
    wandb: str = "",
    profile: tuple[int, int] | None = None,
    age: float = 0.0,
    keep_compiled: bool = False,
    on_start: Callable[[Run], Any] | None = None,
    on_validation: OnValidation | None = None,
) -> dict[str, Any]:
    """Train to `config.train.steps`, resuming from the last checkpoint in `workdir` if there is one. On SIGTERM, finish
    the step, save a checkpoint and stop.

    Metrics also go to the Weights & Biases project `wandb`. Steps `profile` (first, last) are traced to
    `workdir/profile`. `age` is the process's age in seconds, spent on imports. `keep_compiled` caches compiled programs
    in `workdir/compiled` for the next start, unless the workdir is in a bucket.

    `on_start(run)` is called before the first step, `on_validation(step, params)` after each validation, both in every
    process. `params` are those that were validated, split over the mesh, and are freed by the next step. The pictures
    that it returns, {name: PNG or GIF file}, go to TensorBoard and Weights & Biases.

    Returns {"step", "params" and "trainable" (counts), "checkpoint" (directory), "metrics" (last logged)}. The same
    config and seed give the same bits, however often the run was killed. `workdir/finished` exists once the last step
    is done, so launchers know not to restart the run.
    """
    if wandb:
        check_wandb()
    with Preemption() as preemption, quiet_storage(), contextlib.closing(LogFolder(workdir)) as folder:
        goodput = Goodput(folder, Clock(age))
        with goodput.clock("start"):
            run = prepare(config, workdir, goodput)
            log = MetricsLog(folder, run.start, wandb)
            if on_start is not None:
                on_start(run)
        if keep_compiled and folder.local:
            share_compilations(folder.path / COMPILED)
        try:
            step, state, metrics = take_steps(run, log, goodput, preemption, profile, on_validation=on_validation)
        finally:
            with goodput.clock("save"):
                run.checkpoints.close()
            log.close()
            goodput.close()
    if step == run.setup.steps and is_writer():
        write_json(workdir / FINISHED, {"step": step})
    trainable, _ = split_frozen(state.params, run.setup.frozen)
    params, trainable = (sum(x.size for x in jax.tree.leaves(p)) for p in (state.params, trainable))
    checkpoint = str(workdir / FOLDER)
    return {"step": step, "params": params, "trainable": trainable, "checkpoint": checkpoint, "metrics": metrics}


def prepare(config: ConfigDict, workdir: AnyPath, goodput: Goodput) -> Run:
    """Data, grid, model and state of a new or resumed run. Raises InputError; errors in the config alone are found
    before the data is indexed."""
    if is_file(workdir):
        raise InputError(f"{workdir} is a file, and a run needs a directory")
    config = completed(config, {})
    check_together(config)
    mesh = make_mesh(config.mesh.to_dict())
    before = step_directory(workdir)
    begun = begun_config(workdir, before)
    config = pin_init(config, begun)
    checkpoint, processor = open_start(config, before)
    if config.init:
        config = with_model_of(config, checkpoint, begun)
    check_patterns(make_setup(config, uniform_grid((1,) * 6), mesh))  # any grid works: this is only for its errors
    if begun:
        if not config.data.read_block:  # the order of samples depends on the block chosen at the start
            config.data.read_block = begun["data"].get("read_block", 1)
        check_resumable(begun, config, workdir)
    if config.model.depth_source == "zoedepth" and not config.init and is_writer():
        warn("model.depth_source=zoedepth and init is empty: the depth model has random weights")
    with goodput.clock("index"):
        saved = read_metadata(before) if before else None
        loader = _open_loader(config, saved, processor)
    config.data.read_block = loader.mixture.block
    own = parse_metadata(before, saved)[1] if before and saved else None
    processor = with_grid_of_run(make_processor(config, loader, processor), own)
    setup = make_setup(
        config,
        processor.grid,
        mesh,
        num_datasets=len(loader.names),
        text_vocab=processor.tokenizer.vocab_size,
    )
    params, origin = starting_params(setup, before, checkpoint, processor.grid)
    metadata = origin | {
        "model": setup.model.config.to_dict(),
        "processor": processor.to_dict(),
        "train_config": json.loads(json.dumps(config.to_dict())),
        "changes": len(CHANGES),
    }
    if len(loader.config.packed_files) > 1:  # what neither `check_resumable` nor the statistics reveal
        metadata["packed"] = packed_digest(loader.config.packed_files)
    if not is_url(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    if begun:  # otherwise the directory does not belong to a run yet
        goodput.mark(None)
    checkpoints = Checkpoints(
        workdir,
        metadata,
        every=config.checkpoint.every,
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every or None,
        keep_regular=bool(setup.spikes.factor),
        left_out=setup.frozen if setup.adapters else (),
    )
    if checkpoints.latest():
        stored = checkpoints.restore_metadata()
        check_same(stored, metadata, loader, workdir)
        if (changes := describe_changes(stored.get("changes", 0))) and is_writer():
            warn(f"the run in {workdir} was started by an earlier version; from now on this differs: {changes}")
    start, state, shardings = _start_or_restore(checkpoints, setup, params, goodput)
    if is_writer():
        write_json(workdir / CONFIG, config.to_dict())
        write_json(workdir / "statistics.json", loader.statistics)
        if start < setup.steps:
            remove(workdir / FINISHED)
    grid = jax.device_put(processor.grid, NamedSharding(mesh, P()))
    spikes = checkpoints.restore_metadata().get("spikes", {}) if start else {}
    return Run(workdir, setup, loader, grid, checkpoints, state, shardings, start, spikes)


def _open_loader(config: ConfigDict, saved: dict[str, Any] | None, processor: Processor | None) -> Loader:
    """The run's data, with the statistics in a checkpoint's metadata `saved` and the tokenizer of `processor` if there
    are any. Says what it holds, and what the first validation would find wrong."""
    loader = open_data(
        config,
        statistics=saved["processor"]["statistics"] if saved else None,
        tokenizer=None if processor is None or config.data.prompt.model else processor.tokenizer,
        processes=all_processes(),
        recorded=Loss(**config.loss.to_dict()).recorded,
    )
    if config.train.eval_every:
        frames = loader.check_epoch(config.train.eval_split)
        for name, count in loader.shared_episodes(config.train.eval_split).items() if is_writer() else ():
            warn(
                f"{count} episodes of dataset {name!r} are in data.split {config.data.split!r} and in train.eval_split "
                f"{config.train.eval_split!r}: the validation ({frames} frames) sees training data"
            )
    if is_writer():
        tqdm.write(loader.describe(), file=sys.stderr)
    return loader


def _start_or_restore(
    checkpoints: Checkpoints, setup: TrainSetup, params: Params | None, goodput: Goodput
) -> tuple[int, TrainState, TrainState]:
    """The step and state of the newest readable checkpoint, or else 0 and a new state; and the state's shardings."""
    # Don't initialise a state that a checkpoint will replace: it costs a compilation and the memory of a second state.
    resumes = checkpoints.latest() is not None and params is None
    state, shardings = abstract_state(setup) if resumes else init_state(setup, params)
    with goodput.clock("restore"):
        start, state = checkpoints.restore(state, shardings)
    if resumes and not start:  # no checkpoint was readable
        state, shardings = init_state(setup, params)
    return start, state, shardings


def begun_config(workdir: AnyPath, step: AnyPath | None) -> dict[str, Any]:
    """The config of the run in `workdir`, read from `config.json` or else from its newest checkpoint, the directory
    `step`. Empty if no checkpoint was written: then a run with another config may start here."""
    if step is None:
        return {}
    try:
        return renamed(read_json(workdir / CONFIG), CONFIG_KEYS)
    except InputError as error:
        warn(f"{error}; using the config in {step}")
        return renamed(read_metadata(step)["train_config"], CONFIG_KEYS)


def take_steps(
    run: Run,
    log: MetricsLog,
    goodput: Goodput,
    preemption: Preemption,
    profile: tuple[int, int] | None = None,
    stop_after: int = 0,
    on_validation: OnValidation | None = None,
) -> tuple[int, TrainState, dict[str, Any]]:
    """→ (the last step, the state after it, the metrics logged last). Stops after step `stop_after` as if preempted, if
    that comes before the last step."""
    setup, state, step, steps, clock = run.setup, run.state, run.start, run.setup.steps, goodput.clock
    assert setup.mesh is not None
    batch_sharding, replicated = NamedSharding(setup.mesh, BATCH), NamedSharding(setup.mesh, P())
    scalars = jax.device_put(setup.scalars, replicated)
    train_step, eval_step = jit_train_step(setup, run.shardings), jit_eval_step(setup, run.shardings)
    last_update = jit_update_norms(setup, run.shardings)
    goodput.mark(step, keep=True)
    watch = Watch(setup.spikes, run.checkpoints.every, setup.max_skipped, **run.spikes)
    report = StepReport(run, log, goodput, watch)
    batches = batches_after(run, step + watch.skipped)
    first, tracing, preempted = True, False, False

    def save(last: bool) -> None:
        with clock("compute"):
            jax.block_until_ready(state)
        with clock("save"):
            run.checkpoints.save(state, step, log.folder.upload, last=last, spikes=watch.to_dict())
        goodput.mark(step, keep=True)

    with Bar(
        total=steps, initial=step, unit="step", desc="compile", dynamic_ncols=True, disable=not is_writer()
    ) as bar:
        stop = preemption.asked
        while step < steps and not stop:
            step += 1
            if profile and step == max(profile[0], run.start + 1) <= profile[1]:
                jax.profiler.start_trace(str(log.folder.path / "profile"))
                tracing = True
            with clock("data"):
                batch = next(batches)
            with clock("compile" if first else "compute"):
                state, metrics = train_step(state, to_device(batch, batch_sharding), run.grid, scalars)
            with clock("compute"):
                watch.waiting.append((step, metrics))
                target = watch.look(leave=0 if first else 1)
            if first:  # only after dispatching the next step, so that the device stays busy while this process waits
                goodput.mark(step, keep=True)
                first = False
                bar.set_description("train")
            bar.update()
            preempted |= target is None and step < steps and preemption.reached(step + watch.skipped)
            stop = step in (steps, stop_after) or preempted
            if step % setup.log_every == 0 or step in (1, steps):
                with clock("compute" if report.values else "compile"):
                    values = jax.device_get(metrics | last_update(state, scalars.schedule))
                bar.set_postfix(report.write(step, values, np.asarray(batch.sample_id)), refresh=False)
            if tracing and profile and (stop or step == profile[1]):
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
                tracing = False
            due, validated = run.checkpoints.due(step), step == steps
            validated |= bool(setup.eval_every) and step % setup.eval_every == 0
            if target is None and (due or stop or validated):  # never save a state after a spike
                target = watch.look()
            if target is not None:
                batches.close()
                with clock("restore"):
                    step, state = go_back(run, state, target, watch, log)
                goodput.mark(step, keep=True)
                report.go_back(step)
                batches, stop = batches_after(run, step + watch.skipped), False
                bar.update(step - bar.n)
                continue
            early = stop and step < steps
            if early:  # save first: validation may take longer than the time left
                save(last=True)
            if setup.eval_every and validated:
                with clock("eval"):
                    params, _ = swap_ema(state.params, state.opt_state)
                    values = validate(eval_step, params, run, batch_sharding)
                log.write(step, {f"val/{k}": v for k, v in values.items()})
                if on_validation is not None:
                    with clock("eval"):
                        log.write_pictures(step, on_validation(step, params))
                del params  # the next step takes their memory
            if step == steps or (due and not early):
                save(last=stop)
    return step, state, report.values


def batches_after(run: Run, number: int) -> Generator[Batch]:
    """This process's rows of the batches after the first `number`."""
    batches = run.loader.batches(
        run.setup.batch_size,
        start_step=number,
        seed=run.setup.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        total_steps=run.setup.steps,
    )
    yield from batches


def go_back(run: Run, state: TrainState, target: int, watch: Watch, log: MetricsLog) -> tuple[int, TrainState]:
    """Restore the newest checkpoint up to step `target` → (its step, its state). Of the later steps, only the record of
    the spike and of its skipped batches remains."""
    run.checkpoints.remove_after(target)
    if run.checkpoints.latest() is None:
        raise StorageError(f"{run.workdir / FOLDER} holds no checkpoint up to step {target}, before the loss spike")
    step, state = run.checkpoints.restore(state, run.shardings)
    watch.restored(step, run.checkpoints.restore_metadata().get("spikes", {}))
    log.go_back(step)
    if is_writer():
        warn(watch.describe())
    return step, state


class StepReport:
    """Writes the metrics of steps to the log, and how the time since the previous report was spent."""

    def __init__(self, run: Run, log: MetricsLog, goodput: Goodput, watch: Watch) -> None:
        self.run, self.log, self.goodput, self.watch = run, log, goodput, watch
        self.step, self.values = run.start, {}  # of the last report
        self.skipped_episodes, self.replaced_samples = run.loader.num_skipped(), 0
        self.asked = retries.counts()  # up to the last report
        model = run.setup.model.config
        self.tokens = model.prefix_length + model.num_action_tokens + 1
        self.flops = model_flops(run.setup, run.grid) if peak() else 0.0

    def write(self, step: int, metrics: dict[str, Any], sample_id: np.ndarray) -> dict[str, str]:
        """Write a record; returns the values for the progress bar."""
        loader, seconds_of_save = self.run.loader, self.run.checkpoints.seconds
        self.values = scalars(metrics, loader.names)
        times = self.goodput.clock.report(step - self.step)
        self.goodput.mark(step)
        replaced = sum(loader.replaced().values())
        # Fingerprint of the frames in the batch: two runs saw the same data if their fingerprints agree.
        fingerprint = f"{zlib.crc32(sample_id.tobytes()):08x}"
        counts = {"data/skipped": self.skipped_episodes, "data/replaced": replaced - self.replaced_samples}
        speed = rates(times["step/seconds"], self.run.setup.batch_size, self.tokens, self.flops)
        record = self.values | {"batch": fingerprint} | counts | self.watch.counts()
        asked = retries.counts()
        asked_now = {f"storage/{key}": n - self.asked[key] for key, n in asked.items()} if asked["requests"] else {}
        times |= speed | {"save/seconds": seconds_of_save} | asked_now
        self.log.write(step, record, times | self.goodput.shares())
        self.step, self.replaced_samples, self.asked = step, replaced, asked
        return {
            "loss": f"{self.values['loss']:.3f}",
            "l1": f"{self.values['l1']:.3f}",
            "data_wait": f"{times['data/wait_seconds'] / times['step/seconds']:.0%}",
        }

    def go_back(self, step: int) -> None:
        """Start the next report after `step`."""
        self.goodput.clock.report(1)
        self.step = step


def validate(eval_step: Jitted, params: Params, run: Run, sharding: NamedSharding) -> dict[str, float]:
    """Teacher-forced metrics averaged over the frames of the validation split."""
    setup = run.setup
    totals: dict[str, Any] = {}
    count = 0.0
    batches = run.loader.epoch(
        setup.batch_size // setup.grad_accum_steps,
        setup.eval_split,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        frames=setup.eval_frames or None,
    )
    for batch in batches:
        sums, n = jax.device_get(eval_step(params, to_device(batch, sharding), run.grid))
        count += float(n)
        totals = {k: totals.get(k, 0.0) + np.asarray(v, np.float64) for k, v in sums.items()}
    means = {k: v if k == "datasets" else v / count for k, v in totals.items()}
    return scalars(means, run.loader.names)


def to_device(batch: Batch, sharding: NamedSharding) -> Batch:
    """Convert this host's rows of the global batch to global arrays."""
    rows = batch.replace(sample_id=None)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), rows)
