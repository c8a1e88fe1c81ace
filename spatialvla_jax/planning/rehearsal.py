"""A rehearsal: a few steps of a run on its own machines, compared with the plan, then a verdict of go or no-go.

A rehearsal uses the run's own loop and program in a separate folder. It takes some steps, saves, and restarts from the
checkpoint; the restored state must have the same bits.
"""

import contextlib
import math
import resource
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt32
from ml_collections import ConfigDict

from spatialvla_jax.batch import Batch
from spatialvla_jax.checkpoints.orbax import step_directory
from spatialvla_jax.config import completed
from spatialvla_jax.planning.topology import Topology
from spatialvla_jax.planning.tpu_plan import costs_of
from spatialvla_jax.training.flops import model_flops
from spatialvla_jax.training.goodput import STARTING, Clock, Goodput
from spatialvla_jax.training.log_folder import LogFolder
from spatialvla_jax.training.loop import Run, prepare, take_steps
from spatialvla_jax.training.metrics import MetricsLog
from spatialvla_jax.training.saving import quiet_storage
from spatialvla_jax.training.state import TrainState, abstract_state
from spatialvla_jax.training.step import jit_train_step
from spatialvla_jax.utils.chips import CHIPS, generation_of, peak
from spatialvla_jax.utils.distributed import Preemption
from spatialvla_jax.utils.signals import Terminated
from spatialvla_jax.utils.storage import AnyPath, list_tree

# Limits beyond which the verdict is no-go; docs/cloud.md gives the reasons.
SLOWEST = 3.0  # step time relative to the planned bound
LONGEST_WAIT = 0.05  # fraction of a step spent waiting for data
FULLEST = 0.95  # fraction of a device's memory in use

Report = dict[str, Any]


def rehearse(config: ConfigDict, folder: AnyPath, steps: int, age: float = 0.0) -> Report:
    """Run `steps` steps in the new `folder`, save, and restart from there. `age` is the process's age in seconds.

    Returns the measurements (their maxima over all processes) and the plan, for `judge`. Raises as `train` does, and
    Terminated after SIGTERM.
    """
    config = completed(config, {"train.log_every": str(steps)})
    with Preemption() as preemption, quiet_storage(), contextlib.closing(LogFolder(folder)) as logs:
        goodput = Goodput(logs, Clock(age))
        with goodput.clock("start"):
            run = prepare(config, folder, goodput)
            log = MetricsLog(logs, run.start)
        try:
            step, state, metrics = take_steps(run, log, goodput, preemption, stop_after=steps)
        finally:
            run.checkpoints.close()
            log.close()
        if step < min(steps, run.setup.steps):
            raise Terminated
        saved = fingerprint(state)
        del state  # memory has no room for two states
        first, last = (defaultdict(float, goodput.marks[n]["seconds"]) for n in (1, -1))
        again = prepare(config, folder, Goodput(logs, clock := Clock()))
        restore_seconds = clock.totals()["total"]
        restored = fingerprint(again.state)
        again.checkpoints.close()
    spent = {name: last[name] - first[name] for name in last}
    apart = sum(spent.get(name, 0.0) for name in (*STARTING, "compile", "save", "eval"))
    seconds = (spent["total"] - apart) / (step - 1)
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    measured = {
        "step_seconds": seconds,
        "data_wait": spent["data"] / (step - 1) / seconds,
        "save_seconds": run.checkpoints.seconds,
        "restore_seconds": restore_seconds,
        "start_seconds": first["total"],
        "memory": max(map(memory_used, jax.local_devices())),
        "host_bytes": float(host),
    }
    every = np.asarray(multihost_utils.process_allgather(np.array([*measured.values()])))
    largest = dict(zip(measured, every.reshape(-1, len(measured)).max(axis=0).tolist(), strict=True))
    directory = step_directory(folder)
    assert directory is not None
    return {
        **largest,
        "steps": step,
        "all_steps": run.setup.steps,
        "devices": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
        "planned": planned(run),
        "loss": float(metrics["loss"]),
        "skipped": int(metrics["skipped"]),
        "checkpoint_bytes": sum(list_tree(directory).values()),
        "checkpoint_every": config.checkpoint.every,
        "keep_last": config.checkpoint.keep_last,
        "free_bytes": shutil.disk_usage(folder).free if isinstance(folder, Path) else math.inf,
        "same_bits": saved == restored,
    }


def fingerprint(state: TrainState) -> list[int]:
    """A checksum of every array of the state that depends on all bits and their positions, computed on the devices."""

    def sum_of(x: Array) -> UInt32[Array, ""]:
        if not jnp.issubdtype(x.dtype, jnp.integer):
            x = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
        place = jnp.zeros(x.shape, jnp.uint32)
        for axis in range(x.ndim):
            place = place * jnp.uint32(0x9E3779B1) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        return (x.astype(jnp.uint32) * (2 * place + 1)).sum(dtype=jnp.uint32)

    sums = jax.jit(lambda state: jnp.stack([sum_of(x) for x in jax.tree.leaves(state)]))(state)
    return np.asarray(multihost_utils.process_allgather(sums, tiled=True)).ravel().tolist()


def memory_used(device: Any) -> float:
    """Peak use of a device's memory as a fraction; NaN if the device does not report it."""
    memory = device.memory_stats() or {}
    return memory["peak_bytes_in_use"] / memory["bytes_limit"] if memory.get("bytes_limit") else math.nan


def planned(run: Run) -> dict[str, float]:
    """A lower bound on a step's seconds: {"roofline": from the compiled program} on a TPU, {"flops": the model's
    products at peak rate} on other devices, {} if the peak is unknown."""
    if not (rate := peak()):
        return {}
    setup, flops = run.setup, model_flops(run.setup, run.grid)
    if (topology := topology_of(jax.devices())) is None:
        return {"flops": flops * setup.batch_size / (jax.device_count() * rate)}
    state, shardings = abstract_state(setup)
    batch = Batch.abstract(setup.model.config, setup.batch_size, run.grid.action_dim, setup.loss.recorded)
    program = jit_train_step(setup, shardings).lower(state, batch, run.grid, setup.scalars).compile()
    return {"roofline": costs_of(program.as_text(), flops, setup.batch_size, topology)["step_seconds"]}


def topology_of(devices: list[Any]) -> Topology | None:
    """The topology of a run's TPU chips; None for other devices."""
    if (name := generation_of(devices[0].device_kind)) is None:
        return None
    sides = [len(set(side)) for side in zip(*(device.coords for device in devices), strict=True)]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    return Topology(name, tuple(sides[: CHIPS[name].sides]), slices)


def judge(report: Report) -> list[tuple[str, str, bool | None]]:
    """(aspect, finding in words, whether it is acceptable, None if unknown) for each criterion."""
    step, save = report["step_seconds"], report["save_seconds"]
    due = report["checkpoint_every"] * step
    rows: list[tuple[str, str, bool | None]] = []
    if report["planned"]:
        ((kind, least),) = report["planned"].items()
        words = f"{step:.3f} s, {step / least:.1f} × the {kind} bound of {least:.3f} s (at most {SLOWEST:g} ×)"
        rows.append(("a step", words, step <= SLOWEST * least))
    else:
        rows.append(("a step", f"{step:.3f} s; the peak of a {report['device_kind']} device is unknown", None))
    wait = report["data_wait"]
    rows.append(("data", f"{wait:.1%} of a step waits for it (at most {LONGEST_WAIT:.0%})", wait <= LONGEST_WAIT))
    known = not math.isnan(report["memory"])
    words = f"{report['memory']:.1%} of a device's (at most {FULLEST:.0%})" if known else "unknown of a device's"
    words += f", {report['host_bytes'] / 1e9:.1f} GB of the host's"
    rows.append(("memory", words, report["memory"] <= FULLEST if known else None))
    loss, skipped = report["loss"], report["skipped"]
    rows.append(("loss", f"{loss:.4g}, {skipped} steps were not finite", math.isfinite(loss) and not skipped))
    size, room = report["checkpoint_bytes"], report["free_bytes"]
    rows.append(("a save", f"{save:.1f} s, {size / 1e9:.3f} GB; the next is due after {due:.1f} s", save <= due))
    if room < math.inf:
        count = report["keep_last"] + 1
        words = f"{count} checkpoints take {size * count / 1e9:.2f} GB, and {room / 1e9:.1f} GB are free"
        rows.append(("room", words, size * count <= room))
    bits = "the same bits" if report["same_bits"] else "other bits than were saved"
    rows.append(("a restart", f"{report['restore_seconds']:.1f} s, {bits}", report["same_bits"]))
    return rows
