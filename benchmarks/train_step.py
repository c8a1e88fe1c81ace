"""The jitted training step on random batches: throughput and memory.

    python benchmarks/train_step.py [--preset tiny] [--batch-size 32] [--devices 1,2] [--repeats 5] [--trace]

The step includes augmentation, encoding, forward, backward, clipping and AdamW. Compilation and the first steps are not
counted. Prints the environment, each repeat and the median; ends with a line of JSON for each number of devices.
Each number of devices has the same batch per device and shards the state over all devices (FSDP); efficiency is
samples/s per device, relative to the first number. `--gather layer,once` compares gathering weights in each layer with
gathering them once per step. Each `--xla NAME=VALUE,…` adds the programs of the last number of devices, compiled with
these options. All programs are compiled first, in parallel.

The floor of a step is the time of its model FLOPs (`training.flops.model_flops`: forward, and backward to the trained
parameters) at the devices' peak; MFU is floor / step time. Bytes of the state are printed as predicted from its
shardings and as held by the first device.

`--trace` breaks the step down by part of the model, with a lower bound of each part (`floors_of`) and the ratio. Every
kernel belongs to a part; parts and idle time add up to the step.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple
from unittest.mock import patch

import jax
import numpy as np
from jax.sharding import NamedSharding
from trace_table import PARTS, first_match, trace

from spatialvla_jax.actions import PRETRAIN_GAUSSIANS, ActionTokenizer, gaussian_grid
from spatialvla_jax.batch import Batch
from spatialvla_jax.cli.arguments import Parser, count, positive, positives, state_defaults
from spatialvla_jax.config import default_config
from spatialvla_jax.models import PRESETS, preset
from spatialvla_jax.models.remat import POLICIES
from spatialvla_jax.models.spatialvla import SpatialVLAConfig
from spatialvla_jax.planning.tpu_plan import held
from spatialvla_jax.training.flops import model_flops, products, traced_gradient
from spatialvla_jax.training.optimizer import Params, split_frozen
from spatialvla_jax.training.setup import TrainSetup, make_setup
from spatialvla_jax.training.sharding import BATCH, make_mesh
from spatialvla_jax.training.state import TrainState, abstract_params, abstract_state, init_state
from spatialvla_jax.training.step import jit_train_step
from spatialvla_jax.utils.chips import memory_bandwidth, peak


def random_batch(config: SpatialVLAConfig, size: int, action_dim: int) -> Batch:
    S, Q, T, rng = config.img.image_size, config.prompt_length, config.action_chunk, np.random.default_rng(0)
    return Batch(
        image=rng.integers(0, 256, (size, S, S, 3), dtype=np.uint8),
        depth=rng.uniform(0.3, 3, (size, S, S)).astype(np.float32) if config.depth_source == "dataset" else None,
        intrinsics=np.tile(np.array([[S, 0, S / 2], [0, S, S / 2], [0, 0, 1]], np.float32), (size, 1, 1)),
        prompt_ids=rng.integers(3, config.text_vocab, (size, Q)).astype(np.int32),
        prompt_mask=np.arange(Q) < rng.integers(8, Q + 1, (size, 1)),
        actions=rng.uniform(-1, 1, (size, T, action_dim)).astype(np.float32),
        action_mask=np.ones((size, T), bool),
        dataset_id=np.zeros(size, np.int32),
    )


def start_from(setup: TrainSetup) -> Params | None:
    """Random parameters of a LoRA run, in the dtypes of a published base; None without LoRA."""
    if setup.adapters is None:
        return None
    shapes = abstract_params(setup)
    draw = lambda s: 0.02 * jax.random.normal(jax.random.key(0), s.shape, s.dtype)  # noqa: E731
    return jax.jit(lambda: jax.tree.map(draw, shapes))()


def on_first_device(tree: Any) -> int:
    """Bytes of a tree's arrays on the first device."""
    device = jax.devices()[0]
    return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == device)


def parse() -> argparse.Namespace:
    parser = Parser(prog="spatialvla-jax bench train", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--batch-size", type=positive, default=32, help="per device")
    parser.add_argument("--devices", type=positives, help="numbers of devices to compare, such as 1,2,4 (default: all)")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--steps", type=positive, default=20, help="steps per repeat")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="by default the preset's")
    parser.add_argument("--remat", choices=POLICIES, default="none")
    parser.add_argument("--depth-source", choices=("zoedepth", "dataset", "none"), help="by default the preset's")
    parser.add_argument(
        "--gather",
        type=gathers,
        default=["layer"],
        metavar="layer,once",
        help="when weights are cast and, if sharded, gathered; `once` is train.gather_once",
    )
    parser.add_argument(
        "--xla",
        type=xla_options,
        action="append",
        default=[{}],
        metavar="NAME=VALUE,…",
        help="also compile with these options of XLA's compiler; can be repeated",
    )
    parser.add_argument("--unroll", action="store_true", help="unroll the loop over layers")
    parser.add_argument("--prompt-length", type=count, default=0, help="tokens; by default the config's")
    parser.add_argument("--mu-dtype", choices=("float32", "bfloat16"), default="float32", help="AdamW's first moment")
    parser.add_argument("--lora", type=count, default=0, metavar="RANK", help="train LoRA adapters")
    parser.add_argument("--trace", action="store_true", help="also print where the time goes, from a profiler trace")
    state_defaults(parser)
    args = parser.parse_args()
    if args.trace:  # kernels of a CUDA graph lose their names; without graphs a step takes 1 % longer
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
    if max(args.devices or [1]) > jax.device_count():
        parser.error(f"--devices has {max(args.devices)}, and there are {jax.device_count()} here")
    return args


def gathers(text: str) -> list[str]:
    """`layer,once` → ["layer", "once"]."""
    if not {*text.split(",")} <= {"layer", "once"}:
        raise argparse.ArgumentTypeError(f"{text!r} is not layer, once or layer,once")
    return text.split(",")


def xla_options(text: str) -> dict[str, Any]:
    """XLA compiler options; Booleans and numbers are parsed as JSON."""
    options: dict[str, Any] = {name: value for name, _, value in (part.partition("=") for part in text.split(","))}
    for name, value in options.items():
        with suppress(json.JSONDecodeError):
            options[name] = json.loads(value)
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from None
    return options


def floors_of(setup: TrainSetup, grid: ActionTokenizer, shapes: TrainState, shardings: TrainState) -> dict[str, float]:
    """{part of the model: lower bound in milliseconds per step} on this device: matrix products, including attention's,
    at its peak FLOP/s; for the optimizer, reading and writing its state and reading the gradient at its bandwidth."""
    rate, bandwidth = peak(), memory_bandwidth()
    if not rate or not bandwidth:
        return {}
    with patch.object(jax, "default_backend", lambda: "cpu"):  # where attention is plain matrix products
        jaxpr = traced_gradient(setup, grid)
    assert setup.mesh is not None
    samples = setup.batch_size / setup.mesh.size
    floors: dict[str, float] = defaultdict(float)
    for path, flops in products(jaxpr):
        floors[first_match(PARTS, path, "other")] += 1e3 * flops * samples / rate
    (trainable, _), (lie, _) = split_frozen(shapes.params, setup.frozen), split_frozen(shardings.params, setup.frozen)
    moved = 3 * held(trainable, lie) + 2 * held(shapes.opt_state, shardings.opt_state)
    return dict(floors) | {"optimizer": 1e3 * moved / bandwidth}


def setup_on(devices: int, args: argparse.Namespace, gather_once: bool = False) -> TrainSetup:
    config = default_config()
    default = preset(args.preset)
    config.model.update(
        preset=args.preset,
        dtype=args.dtype or default.dtype,
        depth_source=args.depth_source or default.depth_source,
        remat=args.remat,
        unroll=args.unroll,
    )
    config.train.batch_size, config.lora.rank = args.batch_size * devices, args.lora
    config.train.gather_once = gather_once
    config.data.prompt.length = args.prompt_length or config.data.prompt.length
    config.optimizer.mu_dtype = args.mu_dtype
    mesh = make_mesh({"fsdp": -1}, jax.devices()[:devices])
    return make_setup(config, gaussian_grid(PRETRAIN_GAUSSIANS), mesh)


class Program(NamedTuple):
    """A step to measure."""

    devices: int
    gather_once: bool
    options: dict[str, Any]  # of XLA's compiler

    def __str__(self) -> str:
        how = ", weights gathered once a step" if self.gather_once else ""
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        return f"{self.devices} device{'s' * (self.devices > 1)}{how}{options}"


def lower(program: Program, args: argparse.Namespace) -> tuple[TrainSetup, Batch, Any]:
    """→ setup, batch on its devices, lowered step."""
    grid, setup = gaussian_grid(PRETRAIN_GAUSSIANS), setup_on(program.devices, args, program.gather_once)
    assert setup.mesh is not None
    batch = random_batch(setup.model.config, setup.batch_size, grid.action_dim)
    batch = jax.device_put(batch, NamedSharding(setup.mesh, BATCH))
    shapes, shardings = abstract_state(setup, jax.eval_shape(lambda: start_from(setup)))
    return setup, batch, jit_train_step(setup, shardings).lower(shapes, batch, grid, setup.scalars)


def compile_step(program: Program, lowered: Any) -> tuple[Any, float]:
    """→ compiled step, seconds."""
    began = time.perf_counter()
    return lowered.compile(compiler_options=program.options), time.perf_counter() - began


def measure(
    program: Program, args: argparse.Namespace, setup: TrainSetup, batch: Batch, compiled: Any, compile_seconds: float
) -> dict[str, Any]:
    """Time the step; returns the record to print."""
    devices, gather_once, options = program
    grid, model, batch_size = gaussian_grid(PRETRAIN_GAUSSIANS), setup.model, setup.batch_size
    print(f"\n{program}, batch {batch_size}")
    state, shardings = init_state(setup, start_from(setup))
    params = sum(x.size for x in jax.tree.leaves(state.params))
    shapes, _ = abstract_state(setup)
    predicted = {
        "params": held(shapes.params, shardings.params),
        "optimizer": held(shapes.opt_state, shardings.opt_state),
    }
    holds = {"params": on_first_device(state.params), "optimizer": on_first_device(state.opt_state)}
    for name, size in holds.items():
        print(f"{name}: {size / 1e9:.3f} GB on a device, {predicted[name] / 1e9:.3f} GB predicted")

    for _ in range(3):
        state, metrics = compiled(state, batch, grid, setup.scalars)
    jax.block_until_ready(metrics)
    seconds = []
    for repeat in range(args.repeats):
        began = time.perf_counter()
        for _ in range(args.steps):
            state, metrics = compiled(state, batch, grid, setup.scalars)
        jax.block_until_ready(metrics)
        seconds.append((time.perf_counter() - began) / args.steps)
        print(f"repeat {repeat + 1}: {1e3 * seconds[-1]:.2f} ms a step, {batch_size / seconds[-1]:.1f} samples/s")
    median = statistics.median(seconds)
    flops = model_flops(setup, grid)
    achieved: dict[str, Any] = {"model_flops_per_sample": flops}
    print(f"{flops:.4g} model FLOPs a sample")
    if rate := peak():  # unknown for CPUs
        floor = flops * batch_size / (devices * rate)
        achieved |= {"mfu": round(floor / median, 4), "floor_ms": round(1e3 * floor, 3)}
        print(f"floor of a step {1e3 * floor:.2f} ms at {rate / 1e12:.0f} TFLOP/s a device, MFU {floor / median:.1%}")
    if args.trace:

        def run() -> Any:
            nonlocal state
            state, metrics = compiled(state, batch, grid, setup.scalars)
            return metrics

        floors = floors_of(setup, grid, shapes, shardings)
        text, parts = trace(run, 3, compiled.as_text(), floors)
        for name, table in (("trace_ms", parts), ("floors_ms", floors)):
            achieved[name] = {part: round(ms, 2) for part, ms in table.items()}
        print(text)
    memory = compiled.memory_analysis()
    held_at_once = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return {
        "device": jax.devices()[0].device_kind,
        "devices": devices,
        "preset": args.preset,
        "dtype": model.config.dtype,
        "params": params,
        "lora": args.lora,
        "batch_size": batch_size,
        "step_ms": round(1e3 * median, 3),
        "step_ms_range": [round(1e3 * min(seconds), 3), round(1e3 * max(seconds), 3)],
        "samples_per_second": round(batch_size / median, 1),
        "compile_seconds": round(compile_seconds, 1),
        "memory_gb": round(held_at_once / 1e9, 2),  # per device, by the compiler's analysis
        "state_bytes_per_device": {"predicted": predicted, "held": holds},
        "loss": round(float(metrics["loss"]), 4),
        "remat": args.remat,
        "gather_once": gather_once,
        "xla": options,
        "unroll": args.unroll,
        "prompt_length": model.config.prompt_length,
        "mu_dtype": args.mu_dtype,
        "depth_source": model.config.depth_source,
    } | achieved


def main() -> None:
    args = parse()
    kind = jax.devices()[0].device_kind
    print(f"Python {platform.python_version()}, JAX {jax.__version__}, {jax.device_count()} × {kind}")
    counts = args.devices or [jax.device_count()]
    programs = [
        Program(n, how == "once", options)
        for options in args.xla
        for n in (counts[-1:] if options else counts)
        for how in args.gather
    ]
    lowered = [lower(program, args) for program in programs]
    with ThreadPoolExecutor(len(programs)) as pool:
        compiled = list(pool.map(compile_step, programs, [step for *_, step in lowered]))
    records = [
        measure(program, args, setup, batch, *step)
        for program, (setup, batch, _), step in zip(programs, lowered, compiled, strict=True)
    ]
    if len(records) > 1:
        print("\n  ms a step  samples/s  efficiency  compile s  memory GB")
        per_device = records[0]["samples_per_second"] / counts[0]
        for program, record in zip(programs, records, strict=True):
            record["efficiency"] = round(record["samples_per_second"] / record["devices"] / per_device, 4)
            print(
                f"{record['step_ms']:11.1f} {record['samples_per_second']:10.1f} {record['efficiency']:11.1%} "
                f"{record['compile_seconds']:10.1f} {record['memory_gb']:10.1f}  {program}"
            )
    for record in records:
        print(json.dumps(record))


if __name__ == "__main__":
    main()
