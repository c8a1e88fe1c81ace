"""Ahead-of-time compilation of the training step for a TPU pod, by libtpu on any CPU machine (extra [tpu]).

Compiles `training.step.jit_train_step`, the training loop's step, with its shardings. Whether it fits a chip follows
from the compiler's own buffers. Settings are suggested only after they were compiled and found to fit.
"""

import gzip
import hashlib
import importlib.metadata
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from spatialvla_jax.actions import PRETRAIN_GAUSSIANS, ActionTokenizer
from spatialvla_jax.batch import Batch
from spatialvla_jax.data.oxe import MIXTURES
from spatialvla_jax.errors import InputError
from spatialvla_jax.planning.hlo_cost import GB, read_program
from spatialvla_jax.planning.topology import Topology
from spatialvla_jax.planning.tpu_compiler import Progress, build, in_own_process, optimise, out_of_memory
from spatialvla_jax.training.flops import model_flops
from spatialvla_jax.training.grid_fit import make_grid
from spatialvla_jax.training.setup import TrainSetup, make_setup
from spatialvla_jax.training.sharding import AXES, check_batch, make_mesh
from spatialvla_jax.training.state import abstract_state
from spatialvla_jax.training.step import jit_train_step
from spatialvla_jax.utils.atomic import replacing, write_json
from spatialvla_jax.utils.progress import timed_stage

MAX_ADVICE = 4  # suggestions compiled before giving up
BATCH_PARTS = (1, 2, 4)  # divisors of the config's batch that a search tries
REMAT = ("none", "dots", "full")  # by decreasing memory
FORMAT = 5  # version of a report; cached reports of other versions are ignored

Report = dict[str, Any]  # of a compiled plan, as in its JSON file: see `compile_plan`


@dataclass(frozen=True)
class Plan:
    """The settings that may change so that a step fits: the mesh (data, fsdp, tensor), remat policy and batch."""

    mesh: tuple[int, int, int]
    remat: str
    batch_size: int
    grad_accum_steps: int

    def __str__(self) -> str:
        mesh = " × ".join(f"{axis} {n}" for axis, n in zip(AXES, self.mesh, strict=True))
        return f"mesh {mesh}, remat {self.remat}, batch {self.batch_size} in {self.grad_accum_steps}"

    def settings(self) -> dict[str, int | str]:
        """{config key: value}."""
        mesh = {f"mesh.{axis}": n for axis, n in zip(AXES, self.mesh, strict=True)}
        train = {f"train.{key}": getattr(self, key) for key in ("batch_size", "grad_accum_steps")}
        return {**mesh, "model.remat": self.remat, **train}

    def flags(self, other: "Plan") -> str:
        """The command line arguments that change `other` into this plan."""
        before = other.settings()
        return " ".join(f"--config.{key}={value}" for key, value in self.settings().items() if value != before[key])

    def examples_at_once(self) -> float:
        """Examples per pass on one chip, or on the chips of the `tensor` axis together."""
        return self.batch_size / self.grad_accum_steps / self.mesh[0] / self.mesh[1]


def compile_plan(
    setup: TrainSetup,
    grid: ActionTokenizer,
    plan: Plan,
    topology: Topology,
    cache: Path,
    folder: Path,
    progress: Progress = lambda _: None,
    *,
    machine_code: bool = False,
) -> tuple[Report, str]:
    """Compile `setup` with the plan's changes → (report, see `table`; optimised HLO, or "" if it does not fit or its
    report was cached).

    The report's "used" is the HBM in bytes that the step needs per chip. Reports are looked up in `cache` by a hash of
    all that they depend on. `folder` is an empty folder for the compiler. With `machine_code`, memory is as the
    executable reports it, which takes ten times as long.
    """
    mesh = make_mesh(dict(zip(AXES, plan.mesh, strict=True)), topology.devices())
    check_batch(plan.batch_size, plan.grad_accum_steps, mesh)
    setup = replace(
        setup.with_remat(plan.remat), mesh=mesh, batch_size=plan.batch_size, grad_accum_steps=plan.grad_accum_steps
    )
    with timed_stage("trace", progress):
        state, shardings = abstract_state(setup)
        batch = Batch.abstract(setup.model.config, plan.batch_size, grid.action_dim, setup.loss.recorded)
        traced = jit_train_step(setup, shardings).trace(state, batch, grid, setup.scalars)
    with timed_stage("lower", progress):
        lowered = traced.lower()
    versions = {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")}
    key = hashlib.sha256(
        f"{topology} {plan} {versions} {FORMAT} {machine_code} {lowered.as_text()}".encode()
    ).hexdigest()[:24]
    kept = cache / f"{key}.json"
    if kept.exists():
        progress(f"  was compiled before: {kept}")
        return json.loads(kept.read_text()), ""

    report: Report = {
        "topology": topology.name,
        "slices": topology.slices,
        "chips": topology.chips,
        **asdict(plan),
        "report": str(kept),
        "preset": setup.preset,
        "depth_source": setup.model.config.depth_source,
        "machine_code": machine_code,
        **versions,
    }
    began = time.perf_counter()
    try:
        with timed_stage("compile", progress):
            hlo, buffers = build(lowered) if machine_code else optimise(lowered, folder)
    except jax.errors.JaxRuntimeError as error:
        report |= {"fits": False} | out_of_memory(str(error)) | {"compile_seconds": time.perf_counter() - began}
        return report, ""
    report["compile_seconds"] = time.perf_counter() - began
    with timed_stage("analyse", progress):
        memory = memory_of(buffers, held(state.params, shardings.params), held(state.opt_state, shardings.opt_state))
        report |= {"fits": memory["total"] <= topology.chip.hbm, "memory": memory, "used": memory["total"]}
        report |= costs_of(hlo, model_flops(setup, grid), plan.batch_size, topology)
    return report, hlo


def costs_of(hlo: str, flops_of_sample: float, batch_size: int, topology: Topology) -> Report:
    """The roofline cost of a step, from the program's HLO text."""
    chip, cost, flops = topology.chip, read_program(hlo, prod(topology.dims)), flops_of_sample * batch_size
    seconds = {
        # The program's FLOPs lack small products that the compiler turns into vector operations.
        "compute": max(cost.flops, flops / topology.chips) / chip.peak,
        "hbm": cost.hbm_bytes / chip.hbm_bandwidth,
        "ici": cost.received(across_slices=False) / chip.ici,
        "dcn": cost.received(across_slices=True) / chip.dcn,
    }
    bound = max(seconds.values())
    return {
        "hbm": chip.hbm,
        "model_flops": flops,
        "hardware_flops": cost.flops * topology.chips,
        "hbm_bytes": cost.hbm_bytes,
        "seconds": seconds,
        "step_seconds": bound,
        "samples_per_second": batch_size / bound,
        "mfu_bound": flops / (topology.chips * chip.peak * bound),
        "collectives": [asdict(c) for c in cost.collectives],
    }


def held(shapes: Any, shardings: Any) -> int:
    """Bytes of a tree that one chip holds."""
    sizes = jax.tree.map(lambda x, s: prod(s.shard_shape(x.shape)) * x.dtype.itemsize, shapes, shardings)
    return sum(jax.tree.leaves(sizes))


def memory_of(buffers: dict[str, int], params: int, optimizer: int) -> dict[str, int]:
    """Bytes of one chip by kind and in "total", given the bytes of the program's buffers."""
    others = dict(buffers)
    batch = max(0, others.pop("arguments") - params - optimizer)
    memory = {"params": params, "optimizer": optimizer, "batch": batch} | others
    return memory | {"total": sum(memory.values())}


def smaller(plan: Plan, slices: int) -> Iterator[Plan]:
    """Plans that need less memory than `plan`, fastest first: work split further, more rematerialisation, both, and
    finally smaller batches."""
    data, fsdp, tensor = plan.mesh
    if data > slices:  # split parameters and optimizer state over more chips, which costs no time
        yield replace(plan, mesh=(slices, fsdp * data // slices, tensor))
    rows = plan.batch_size // (data * fsdp)
    for remat in REMAT[REMAT.index(plan.remat) :]:
        for n in (1, 2, 4, 8):
            grad_accum_steps = plan.grad_accum_steps * n
            if rows % grad_accum_steps == 0 and (remat, n) != (plan.remat, 1):
                yield replace(plan, remat=remat, grad_accum_steps=grad_accum_steps)
    for n in (2, 4, 8, 16):
        if rows % n == 0 and rows // n:
            yield replace(plan, remat=REMAT[-1], batch_size=plan.batch_size // n, grad_accum_steps=1)


def advise(
    plan: Plan, report: Report, slices: int, compile_: Callable[[Plan], Report]
) -> tuple[Plan | None, list[Plan]]:
    """→ (a smaller plan that compiles and fits, or None; plans that were tried and do not fit).

    The plans to try are guessed from the excess, assuming that temporaries grow with the examples per pass.
    """
    tried: list[Plan] = []
    candidates = list(smaller(plan, slices))
    over = report["used"] / report["hbm"]
    while candidates and len(tried) < MAX_ADVICE:
        # The first that shrinks memory enough, else the one that shrinks it most.
        enough = [c for c in candidates if shrinks(plan, c) >= over]
        candidate = enough[0] if enough else candidates[-1]
        candidates = candidates[candidates.index(candidate) + 1 :]
        result = compile_(candidate)
        if result["fits"]:
            return candidate, tried
        tried.append(candidate)
        over = max(over, shrinks(plan, candidate) * result["used"] / result["hbm"])
    return None, tried


def shrinks(plan: Plan, other: Plan) -> float:
    """The factor by which `other` may shrink activations; remat is worth up to 2 (dots) or 4 (full)."""
    examples, split = plan.examples_at_once() / other.examples_at_once(), other.mesh[1] / plan.mesh[1]
    return examples * split * 2.0 ** (REMAT.index(other.remat) - REMAT.index(plan.remat))


def search(
    plan: Plan, topology: Topology, compile_: Callable[[Plan], Report], progress: Progress
) -> list[tuple[Plan, Report]]:
    """Try meshes, remat policies and accumulation for the plan's batch, its half and its quarter. Returns the plans
    that fit, fastest by the roofline first.

    For each mesh, batch and policy, accumulation grows until the step fits. Policies that keep less are skipped if one
    that keeps more fits with as few accumulation steps: they would only add products. Smaller batches are skipped if a
    larger one fits without accumulation and rematerialisation: each step gathers the same parameters for fewer samples.
    """
    fitting: list[tuple[Plan, Report]] = []
    whole: set[tuple[int, int, int]] = set()
    batches = [plan.batch_size // n for n in BATCH_PARTS if plan.batch_size % n == 0]
    for batch_size, mesh in ((b, m) for b in batches for m in meshes(topology, b)):
        if mesh in whole:
            continue
        rows, best = batch_size // (mesh[0] * mesh[1]), 0
        for remat in REMAT:
            for grad_accum_steps in (1, 2, 4, 8, 16):
                if rows % grad_accum_steps or (best and grad_accum_steps >= best):
                    break
                candidate = Plan(mesh, remat, batch_size, grad_accum_steps)
                try:
                    report = compile_(candidate)
                except InputError as error:
                    progress(f"{candidate}: {error}")
                    break
                progress(f"{candidate}: {line(report)}")
                if report["fits"]:
                    fitting.append((candidate, report))
                    best = grad_accum_steps
                    if (remat, grad_accum_steps) == (REMAT[0], 1):
                        whole.add(mesh)
                    break
                # Even if all of it were activations, 16 accumulation steps would not be enough.
                if report["used"] > 16 / grad_accum_steps * report["hbm"]:
                    break
            if best == 1:
                break
    return sorted(fitting, key=lambda f: (-f[1]["samples_per_second"], f[1]["used"]))


def meshes(topology: Topology, batch_size: int) -> list[tuple[int, int, int]]:
    """Meshes (data, fsdp, tensor) whose `data` covers whole slices and that divide the batch, widest `fsdp` first: at
    most three for each `tensor` of 1, 2 and 4."""
    found = []
    for tensor in (1, 2, 4):
        inner = topology.chips // topology.slices
        if inner % tensor:
            continue
        halves = [h for h in (1, 2, 4, 8) if (inner // tensor) % h == 0][:3]
        shapes = [(topology.slices * h, inner // tensor // h, tensor) for h in halves]
        found += [m for m in shapes if batch_size % (m[0] * m[1]) == 0]
    return found


def line(report: Report) -> str:
    """A report in one line."""
    memory = f"{report['used'] / 2**30:.1f} of {report['hbm'] / 2**30:.1f} GiB"
    if not report["fits"]:
        return f"does not fit, {memory}"
    return (
        f"{memory}, step ≥ {1e3 * report['step_seconds']:.0f} ms, {report['samples_per_second']:.0f} samples/s, "
        f"MFU ≤ {100 * report['mfu_bound']:.0f} %"
    )


def table(report: Report) -> str:
    """A report of a plan that fits, as text: memory by kind, costs, collectives by kind and part of the model."""
    gib = lambda n: f"{n / 2**30:8.2f} GiB"  # noqa: E731
    memory, seconds = report["memory"], report["seconds"]
    lines = ["memory of a chip"]
    lines += [f"  {kind:12s}{gib(n)}" for kind, n in memory.items() if kind != "total"]
    lines += [f"  {'total':12s}{gib(memory['total'])} of {report['hbm'] / 2**30:.0f} GiB HBM", "a step"]
    lines += [
        f"  model FLOPs     {report['model_flops']:.3e}, {report['model_flops'] / report['batch_size']:.3e} a sample",
        f"  hardware FLOPs  {report['hardware_flops']:.3e}, with what is computed again",
        f"  HBM traffic     {report['hbm_bytes'] / GB:.1f} GB a chip",
        "  at peak rates   " + ", ".join(f"{k} {1e3 * s:.1f} ms" for k, s in seconds.items()),
        f"  roofline        step ≥ {1e3 * report['step_seconds']:.1f} ms, "
        f"{report['samples_per_second']:.0f} samples/s, MFU ≤ {100 * report['mfu_bound']:.1f} %",
        "collectives of a step, alone (sync) or beside other work (async): runs, GB received by a chip, largest array",
    ]
    groups: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for c in report["collectives"]:
        network = "DCN" if c["across_slices"] else "ICI"
        groups.setdefault((c["kind"], network, "async" if c["asynchronous"] else "sync", c["where"]), []).append(c)
    traffic = lambda cs: sum(c["bytes"] * c["count"] for c in cs)  # noqa: E731
    for (kind, network, way, where), cs in sorted(groups.items(), key=lambda g: -traffic(g[1])):
        largest = max(cs, key=lambda c: c["bytes"])
        lines.append(
            f"  {kind:18s} {network} {way:5s} {where:16s} {sum(c['count'] for c in cs):6d} {traffic(cs) / GB:9.3f} GB  "
            f"{largest['dtype']}[{largest['shape'].replace('x', ',')}] over {largest['group']}"
        )
    return "\n".join(lines)


def resolve(config: ConfigDict, topology: Topology) -> tuple[TrainSetup, ActionTokenizer]:
    """Resolve a config for a pod. Raises InputError."""
    grid = make_grid(config.grid.to_dict(), lambda: np.asarray(PRETRAIN_GAUSSIANS))
    mesh = make_mesh(config.mesh.to_dict(), topology.devices())
    num_datasets = len(MIXTURES.get(config.data.mixture, ())) + len(config.data.datasets)
    return make_setup(config, grid, mesh, num_datasets=num_datasets), grid


def compile_config(
    config: ConfigDict,
    plan: Plan,
    topology: Topology,
    cache: Path,
    folder: Path,
    machine_code: bool,
    progress: Progress,
) -> tuple[Report, str]:
    setup, grid = resolve(config, topology)
    return compile_plan(setup, grid, plan, topology, cache, folder, progress, machine_code=machine_code)


def compile_for(
    config: ConfigDict,
    topology: Topology,
    cache: Path,
    *,
    searching: bool = False,
    machine_code: bool = False,
    progress: Progress = lambda _: None,
) -> list[tuple[Plan, Report]]:
    """Compile the config's plan, or with `searching` all candidates → those that fit, fastest first.

    Raises InputError if mesh or batch do not divide, and if the step does not fit, naming compiled settings that do.
    """
    cache.mkdir(parents=True, exist_ok=True)
    setup, _ = resolve(config, topology)
    assert setup.mesh is not None
    plan = Plan(
        tuple(setup.mesh.shape[axis] for axis in AXES),  # pyright: ignore[reportArgumentType]
        setup.model.config.remat,
        setup.batch_size,
        setup.grad_accum_steps,
    )

    def compile_(plan: Plan) -> Report:
        progress(f"compiling {plan} for {topology}")
        with tempfile.TemporaryDirectory() as folder:
            arguments = (config, plan, topology, cache, Path(folder), machine_code)
            report, hlo = in_own_process(compile_config, *arguments, progress=progress)
        kept = Path(report["report"])
        if not kept.exists():
            if hlo:
                with replacing(kept.with_suffix(".hlo.gz")) as file:
                    file.write_bytes(gzip.compress(hlo.encode(), mtime=0))
            write_json(kept, report)
        return report

    if searching:
        fitting = search(plan, topology, compile_, progress)
        if not fitting:
            raise InputError(
                f"no mesh, remat policy or accumulation of batch {plan.batch_size}, nor of its half or quarter, fits "
                f"{topology}"
            )
        return fitting
    report = compile_(plan)
    if report["fits"]:
        return [(plan, report)]
    too_much = f"{plan} takes {report['used'] / 2**30:.1f} GiB a chip, {topology} has {report['hbm'] / 2**30:.1f}"
    progress(f"{too_much}; looking for settings that fit")
    better, tried = advise(plan, report, topology.slices, compile_)
    if better is None:
        raise InputError(f"{too_much}; nor does it fit with {tried[-1] if tried else 'anything smaller'}")
    raise InputError(f"{too_much}; this fits (compiled): {better.flags(plan)}")
