"""Ahead-of-time compilation of the training step for a TPU pod, by libtpu on any CPU machine (extra [tpu]).

What is compiled is `training.step.jit_train_step`, the step that the training loop runs, with the shardings that it
runs with. The compiler itself says whether the step fits the chip; advice on what would fit has been compiled, too.
"""

import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from ml_collections import ConfigDict

from spatialvla_jax.actions import PRETRAIN_GAUSSIANS, ActionTokenizer
from spatialvla_jax.batch import Batch
from spatialvla_jax.data.oxe import MIXTURES
from spatialvla_jax.errors import InputError
from spatialvla_jax.planning.hlo_cost import GB, read_program
from spatialvla_jax.training.flops import model_flops
from spatialvla_jax.training.grid_fit import make_grid
from spatialvla_jax.training.setup import TrainSetup, make_setup
from spatialvla_jax.training.sharding import AXES, check_batch, make_mesh
from spatialvla_jax.training.state import abstract_state
from spatialvla_jax.training.step import jit_train_step
from spatialvla_jax.utils.atomic import replacing, write_json
from spatialvla_jax.utils.chips import CHIPS, Chip
from spatialvla_jax.utils.progress import timed_stage
from spatialvla_jax.utils.quiet import quiet_libtpu
from spatialvla_jax.utils.signals import keep_handlers

FLAT = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))  # the slices of v5e and v6e from one host up
MAX_ADVICE = 4  # suggestions compiled before giving up
BATCH_PARTS = (1, 2, 4)  # of the config's batch, which a search tries
REMAT = ("none", "dots", "full")  # from the most memory to the least
FORMAT = 4  # of a report: another one leaves the cached ones alone

Progress = Callable[[str], None]
Report = dict[str, Any]  # of a compiled plan, as in its JSON file: see `compile_plan`


@dataclass(frozen=True)
class Topology:
    """`slices` pods of `dims` chips of a generation; `str` gives "v5e:16x16" or "2 × v5e:16x16"."""

    generation: str
    dims: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def chips(self) -> int:
        return prod(self.dims) * self.slices

    @property
    def name(self) -> str:
        return f"{self.generation}:{'x'.join(map(str, self.dims))}"

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices} × {self.name}"

    def devices(self) -> list[Any]:
        """Devices to compile for, one a chip. Raises InputError where libtpu is not installed or refuses."""
        if importlib.util.find_spec("libtpu") is None:
            raise InputError(
                "compiling for TPUs needs libtpu, which is not installed: pip install 'spatialvla-jax[tpu]'"
            )
        quiet_libtpu()
        options: dict[str, Any] = {"num_slices": self.slices} if self.slices > 1 else {}
        if self.chip.cores == 2:
            options["chip_config_name"] = "megacore"  # both cores of a chip are one device
        try:
            return list(topologies.get_topology_desc(self.name, platform="tpu", **options).devices)
        except Exception as error:
            raise InputError(f"libtpu has no topology {self}: {str(error).splitlines()[0]}") from None
        finally:
            keep_handlers()


def parse_topology(text: str, slices: int = 1) -> Topology:
    """ "v5e:16x16" as it lies, or a product's name: "v5e-256" (256 chips), "v4-128" (128 TensorCores, 64 chips).

    Raises InputError for one that does not exist.
    """
    found = re.fullmatch(r"(\w+)(?::(\d+(?:x\d+)*)|-(\d+))", text)
    if not found or found[1] not in CHIPS:
        raise InputError(f"topology {text!r} does not exist; write one of {', '.join(CHIPS)} and a shape, as v5e:16x16")
    if slices < 1:
        raise InputError(f"--slices must be at least 1, not {slices}")
    generation, chip = found[1], CHIPS[found[1]]
    shapes = FLAT if chip.sides == 2 else cubes(chip.largest)
    dims = tuple(map(int, found[2].split("x"))) if found[2] else ()
    count = prod(dims) if dims else int(found[3]) / chip.cores
    # The one nearest to a cube or square is what a size alone gives.
    fitting = [s for s in sorted(shapes, key=lambda s: max(s) - min(s)) if (s == dims if dims else prod(s) == count)]
    if fitting:
        return Topology(generation, fitting[0], slices)
    near = min(shapes, key=lambda s: abs(np.log(prod(s) / max(1, count))))
    kind = (
        "2-D, from 2x2 to 16x16" if chip.sides == 2 else f"3-D, to {chip.largest} chips, its sides 2 or multiples of 4"
    )
    raise InputError(
        f"topology {text} does not exist: {generation} is {kind}; the nearest is {Topology(generation, near).name}"
    )


def cubes(largest: int) -> list[tuple[int, ...]]:
    """The slices of v4 and v5p: 2x2x1, then sides that are 2 or multiples of 4, shortest first."""
    sides = [2, *range(4, 33, 4)]
    shapes = [(a, b, c) for a in sides for b in sides for c in sides if a <= b <= c and a * b * c <= largest]
    return [(2, 2, 1), *shapes]


@dataclass(frozen=True)
class Plan:
    """What may change so that a step fits: the mesh (data, fsdp, tensor), the remat policy, the batch."""

    mesh: tuple[int, int, int]
    remat: str
    batch_size: int
    grad_accum_steps: int

    def __str__(self) -> str:
        mesh = " × ".join(f"{axis} {n}" for axis, n in zip(AXES, self.mesh, strict=True))
        return f"mesh {mesh}, remat {self.remat}, batch {self.batch_size} in {self.grad_accum_steps}"

    def settings(self) -> dict[str, int | str]:
        """The config's keys."""
        mesh = {f"mesh.{axis}": n for axis, n in zip(AXES, self.mesh, strict=True)}
        train = {f"train.{key}": getattr(self, key) for key in ("batch_size", "grad_accum_steps")}
        return {**mesh, "model.remat": self.remat, **train}

    def flags(self, other: "Plan") -> str:
        """The command line arguments that lead from `other` here."""
        before = other.settings()
        return " ".join(f"--config.{key}={value}" for key, value in self.settings().items() if value != before[key])

    def examples_at_once(self) -> float:
        """On one chip, or on the chips of the `tensor` axis that share them."""
        return self.batch_size / self.grad_accum_steps / self.mesh[0] / self.mesh[1]


def compile_plan(
    setup: TrainSetup,
    grid: ActionTokenizer,
    plan: Plan,
    topology: Topology,
    cache: Path,
    progress: Progress = lambda _: None,
) -> Report:
    """Compile `setup` with the plan's changes → its report (see `table`), kept in `cache` under all that it depends on.
    "used" are the bytes of a chip's HBM that it takes or would take."""
    mesh = make_mesh(dict(zip(AXES, plan.mesh, strict=True)), topology.devices())
    check_batch(plan.batch_size, plan.grad_accum_steps, mesh)
    setup = replace(
        setup.with_remat(plan.remat), mesh=mesh, batch_size=plan.batch_size, grad_accum_steps=plan.grad_accum_steps
    )
    with timed_stage("trace", progress):
        state, shardings = abstract_state(setup)
        batch = Batch.abstract(setup.model.config, plan.batch_size, grid.action_dim)
        traced = jit_train_step(setup, shardings).trace(state, batch, grid, np.uint32(0))
    with timed_stage("lower", progress):
        lowered = traced.lower()
    versions = {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")}
    key = hashlib.sha256(f"{topology} {plan} {versions} {FORMAT} {lowered.as_text()}".encode()).hexdigest()[:24]
    kept = cache / f"{key}.json"
    if kept.exists():
        progress(f"  was compiled before: {kept}")
        return json.loads(kept.read_text())

    report: Report = {
        "topology": topology.name,
        "slices": topology.slices,
        "chips": topology.chips,
        **asdict(plan),
        "report": str(kept),
        "preset": setup.preset,
        "depth_source": setup.model.config.depth_source,
        **versions,
    }
    began = time.perf_counter()
    try:
        with timed_stage("compile", progress):
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        report |= {"fits": False} | out_of_memory(str(error)) | {"compile_seconds": time.perf_counter() - began}
    else:
        report["compile_seconds"] = time.perf_counter() - began
        with timed_stage("analyse", progress):
            hlo = compiled.as_text()
            with replacing(cache / f"{key}.hlo.gz") as file:
                file.write_bytes(gzip.compress(hlo.encode(), mtime=0))
            params = held(state.params, shardings.params)
            memory = memory_of(compiled.memory_analysis(), params, held(state.opt_state, shardings.opt_state))
            report |= {"fits": memory["total"] <= topology.chip.hbm, "memory": memory, "used": memory["total"]}
            report |= costs_of(hlo, model_flops(setup, grid), plan.batch_size, topology)
    write_json(kept, report)
    return report


def costs_of(hlo: str, flops_of_sample: float, batch_size: int, topology: Topology) -> Report:
    """What a step costs by the roofline, from the program's text."""
    chip, cost, flops = topology.chip, read_program(hlo, prod(topology.dims)), flops_of_sample * batch_size
    seconds = {
        # Small products that the compiler turns into vector operations are in the model's FLOPs alone.
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
    """Bytes that one chip holds of a tree."""
    sizes = jax.tree.map(lambda x, s: prod(s.shard_shape(x.shape)) * x.dtype.itemsize, shapes, shardings)
    return sum(jax.tree.leaves(sizes))


def memory_of(analysis: Any, params: int, optimizer: int) -> dict[str, int]:
    """Bytes of one chip by kind. The donated state's outputs lie where its inputs did and are not counted again."""
    memory = {
        "params": params,
        "optimizer": optimizer,
        "batch": max(0, analysis.argument_size_in_bytes - params - optimizer),
        "temporaries": analysis.temp_size_in_bytes,
        "outputs": max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes),
        "code": analysis.generated_code_size_in_bytes,
    }
    return memory | {"total": sum(memory.values())}


def out_of_memory(message: str) -> dict[str, float]:
    """{"used", "hbm"} in bytes from the compiler's refusal; raises what is another error."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", message)
    if not found:
        raise RuntimeError(f"the TPU compiler failed: {message[:2000]}")
    unit = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return {"used": float(found[1]) * unit[found[2]], "hbm": float(found[3]) * unit[found[4]]}


def smaller(plan: Plan, slices: int) -> Iterator[Plan]:
    """Plans that need less memory than `plan`, those first that cost the least time: the same work split further, more
    rematerialisation, both, at last a smaller batch."""
    data, fsdp, tensor = plan.mesh
    if data > slices:  # parameters and optimizer split over more chips: the same speed
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
    """→ (a smaller plan that was compiled and fits, plans that were tried and do not).

    Which ones to try is guessed from how much is missing, with temporaries that grow with the examples at once; the
    compiler decides.
    """
    tried: list[Plan] = []
    candidates = list(smaller(plan, slices))
    over = report["used"] / report["hbm"]
    while candidates and len(tried) < MAX_ADVICE:
        # The first that shrinks the examples at once enough, or remats more; else what shrinks the most.
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
    """By what factor the activations kept at once may be smaller; a remat policy is worth up to 4 (full), 2 (dots)."""
    examples, split = plan.examples_at_once() / other.examples_at_once(), other.mesh[1] / plan.mesh[1]
    return examples * split * 2.0 ** (REMAT.index(other.remat) - REMAT.index(plan.remat))


def search(
    plan: Plan, topology: Topology, compile_: Callable[[Plan], Report], progress: Progress
) -> list[tuple[Plan, Report]]:
    """Meshes, remat policies and accumulation for the plan's batch, its half and its quarter → those that fit, the most
    samples a second by the roofline first.

    For each mesh, batch and policy, accumulation grows until the step fits; a policy that keeps less is left out where
    one that keeps more fits in as few parts, as it would do the same products and more. So are smaller batches where a
    larger one fits whole without rematerialisation: each step gathers the same parameters for fewer samples.
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
                report = compile_(candidate)
                progress(f"{candidate}: {line(report)}")
                if report["fits"]:
                    fitting.append((candidate, report))
                    best = grad_accum_steps
                    if (remat, grad_accum_steps) == (REMAT[0], 1):
                        whole.add(mesh)
                    break
                # Were all of it activations, this many parts would still be too many examples.
                if report["used"] > 16 / grad_accum_steps * report["hbm"]:
                    break
            if best == 1:
                break
    return sorted(fitting, key=lambda f: (-f[1]["samples_per_second"], f[1]["used"]))


def meshes(topology: Topology, batch_size: int) -> list[tuple[int, int, int]]:
    """Those with `data` over whole slices and a batch that divides: the widest `fsdp` first, at most 3 of each
    `tensor` in 1, 2, 4."""
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
    """A report in a line."""
    memory = f"{report['used'] / 2**30:.1f} of {report['hbm'] / 2**30:.1f} GiB"
    if not report["fits"]:
        return f"does not fit, {memory}"
    return (
        f"{memory}, step ≥ {1e3 * report['step_seconds']:.0f} ms, {report['samples_per_second']:.0f} samples/s, "
        f"MFU ≤ {100 * report['mfu_bound']:.0f} %"
    )


def table(report: Report) -> str:
    """A fitting report for people: memory by kind, costs, collectives by kind and place in the network."""
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


def compile_for(
    config: ConfigDict, topology: Topology, cache: Path, *, searching: bool = False, progress: Progress = lambda _: None
) -> list[tuple[Plan, Report]]:
    """The config's plan compiled, or (`searching`) those that fit, fastest first.

    Raises InputError where the mesh or the batch does not divide, and where the step does not fit, naming settings that
    do: they were compiled.
    """
    cache.mkdir(parents=True, exist_ok=True)
    grid = make_grid(config.grid.to_dict(), lambda: np.asarray(PRETRAIN_GAUSSIANS))
    mesh = make_mesh(config.mesh.to_dict(), topology.devices())
    num_datasets = len(MIXTURES.get(config.data.mixture, ())) + len(config.data.datasets)
    setup = make_setup(config, grid, mesh, num_datasets=num_datasets)
    plan = Plan(
        tuple(mesh.shape[axis] for axis in AXES),  # pyright: ignore[reportArgumentType]
        setup.model.config.remat,
        setup.batch_size,
        setup.grad_accum_steps,
    )

    def compile_(plan: Plan) -> Report:
        progress(f"compiling {plan} for {topology}")
        return compile_plan(setup, grid, plan, topology, cache, progress)

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
        raise InputError(f"{too_much}; neither does it fit with {tried[-1] if tried else 'anything smaller'}")
    raise InputError(f"{too_much}; this fits (compiled): {better.flags(plan)}")
