"""Inference of a policy, from uint8 image to robot actions: latency, throughput, memory and a breakdown of time.

    python benchmarks/infer.py [--preset tiny] [--variants plain,bfloat16,int8] [--batch-sizes 1,32] [--repeats 50]
        [--torch] [--first-action] [--trace]

Random weights, a 640×480 camera. Each variant is timed through `Policy.infer_batch`, including tokenizer and transfers;
`program_ms` is the jitted program alone, with inputs on the device. `plain` is `bfloat16` without the attention kernel
of `inference/kernels.py`; `depth` takes depth as an input instead of estimating it; `draft` is given the result as a
draft, the best case of speculation; `free` chooses from the whole vocabulary. A variant that fails is reported, and the
others continue. `--torch` also times the exported PyTorch model, as a loop and as a CUDA graph. `--first-action` times
a new process up to its first action, with an empty and a filled compilation cache. Prints the environment and lower
bounds; ends with one line of JSON.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from trace_table import trace

from spatialvla_jax.actions import PRETRAIN_GAUSSIANS, gaussian_grid
from spatialvla_jax.checkpoints.mapping import param_shapes, unflatten
from spatialvla_jax.checkpoints.processor import Processor
from spatialvla_jax.cli.arguments import Parser, positive, positives, state_defaults
from spatialvla_jax.inference import kernels
from spatialvla_jax.inference.policy import BATCH_SIZES, Policy
from spatialvla_jax.models import PRESETS, SpatialVLA, SpatialVLAConfig, preset
from spatialvla_jax.text import train_tokenizer

PROMPT = "pick up the black bowl between the plate and the ramekin and place it on the plate"
H, W = 480, 640
VARIANTS = ("plain", "bfloat16", "int8", "depth", "draft", "free")


class Random:
    """An array drawn only when used, so that the device never holds the float32 original."""

    def __init__(self, shape: tuple[int, ...], seed: int) -> None:
        self.shape, self.seed = shape, seed

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> "Random":
        if isinstance(index, slice):
            return Random((len(range(*index.indices(len(self)))), *self.shape[1:]), self.seed)
        return Random(self.shape[1:], self.seed + 1000 * (index + 1))

    def astype(self, dtype: Any) -> jax.Array:
        fan_in = self.shape[-2] if len(self.shape) > 1 else 1
        return draw(self.seed, 0.5 / fan_in**0.5, self.shape, jnp.dtype(dtype))


@partial(jax.jit, static_argnums=(2, 3))
def draw(seed: int, scale: float, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return scale * jax.random.normal(jax.random.key(seed), shape, dtype)


def make_policy(config: SpatialVLAConfig, **options: Any) -> Policy:
    shapes = param_shapes(config)
    params = unflatten({path: Random(shape, seed) for seed, (path, shape) in enumerate(shapes.items())})
    rows = {name: [value] * 7 for name, value in (("q01", -1.0), ("q99", 1.0), ("min", -1.0), ("max", 1.0))}
    processor = Processor(
        tokenizer=train_tokenizer([PROMPT], 256),
        grid=jax.tree.map(np.asarray, gaussian_grid(PRETRAIN_GAUSSIANS)),
        statistics={"random": {"action": rows | {"mask": [True] * 6 + [False]}}},
        intrinsics={"random": [[1.0, 0, 0.5], [0, 1.3, 0.5], [0, 0, 1]]},
    )
    return Policy(SpatialVLA(config), params, processor, **options)


def observations(count: int, depth: bool) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    seen: list[dict[str, Any]] = []
    for _ in range(count):
        seen.append({"image": rng.integers(0, 256, (H, W, 3), dtype=np.uint8), "prompt": PROMPT})
        if depth:
            seen[-1]["depth"] = rng.uniform(0.3, 3, (H, W)).astype(np.float32)
    return seen


def timed(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Milliseconds per call: median and the range of the middle 90 %, after three warm-up calls."""
    for _ in range(3):
        call()
    ms = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        ms.append(1e3 * (time.perf_counter() - began))
    ms.sort()
    low, high = ms[len(ms) // 20], ms[-1 - len(ms) // 20]
    return {"median_ms": round(statistics.median(ms), 2), "range_ms": [round(low, 2), round(high, 2)]}


def bandwidth() -> float:
    """Bytes/s that a copy on the device reads and writes, over ten copies in a row, which hides launch latency."""
    x = jnp.ones((2**31 if jax.default_backend() == "gpu" else 2**24,), jnp.bfloat16)
    copy = jax.jit(jnp.copy)

    def run() -> None:
        for _ in range(10):
            out = copy(x)
        out.block_until_ready()

    return 10 * 2 * x.nbytes / (1e-3 * timed(run, 10)["range_ms"][0])


def floors(config: SpatialVLAConfig, policy: Policy, rate: float) -> dict[str, float]:
    """Lower bounds for one chunk: reading all weights once per pass at `rate` bytes/s, and the prompt's FLOPs."""
    weights = sum(x.nbytes for x in jax.tree.leaves(policy.weights.llm.layers))
    head = sum(x.nbytes for x in jax.tree.leaves(policy.weights.head))
    llm = config.llm
    heads = (2 * llm.num_heads + 2 * llm.num_kv_heads) * llm.head_dim
    per_token = 2 * llm.depth * llm.width * (heads + 3 * llm.mlp_dim)
    # The gripper's two values are fed together where tokens are constrained to their kind; a right draft needs no pass.
    passes = 0 if policy.speculate else config.action_chunk * (config.tokens_per_action - policy.constrained)
    return {
        "layer_gb": round(weights / 1e9, 3),
        "pass_ms": round(1e3 * (weights + head) / rate, 3),
        "passes": passes,
        "prompt_tflop": round(per_token * config.prefix_length / 1e12, 3),
    }


def run(config: SpatialVLAConfig, name: str, args: argparse.Namespace) -> dict[str, Any]:
    options: dict[str, Any] = {"int8": name == "int8", "speculate": name == "draft", "constrained": name != "free"}
    if name == "depth":
        config = replace(config, depth_source="dataset")
    device = jax.devices()[0]
    policy = make_policy(config, **options)
    jax.block_until_ready(policy.weights)
    held = (device.memory_stats() or {}).get("bytes_in_use", 0)
    result: dict[str, Any] = {"weights_gb": round(held / 1e9, 2)}
    for size in args.batch_sizes:
        batch = observations(size, config.depth_source == "dataset")
        if name == "draft":
            for seen, out in zip(batch, policy.infer_batch(batch), strict=True):
                seen["draft"] = out["action_ids"]
        began = time.perf_counter()
        policy.infer_batch(batch)
        figures: dict[str, Any] = {"compile_s": round(time.perf_counter() - began, 1)}
        figures |= timed(lambda batch=batch: policy.infer_batch(batch), args.repeats)
        figures["chunks_per_second"] = round(1e3 * size / figures["median_ms"], 1)
        figures["peak_gb"] = round((device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9, 2)
        inputs = [policy.prepare(seen) for seen in batch]
        arrays = {k: np.stack([x[k] for x in inputs]) for k in inputs[0]}
        length = max(policy.shape(x)[2] for x in inputs)  # the same program as in `Policy`
        arrays = jax.device_put(arrays | {k: arrays[k][:, :length] for k in ("prompt_ids", "prompt_mask")})
        alone = timed(lambda policy=policy, arrays=arrays: jax.block_until_ready(policy.run(arrays)), args.repeats)
        figures["program_ms"] = alone["median_ms"]
        print(f"{name:10} batch {size:3}: " + ", ".join(f"{k} {v}" for k, v in figures.items()), flush=True)
        if args.trace:
            compiled = policy._act.lower(policy.weights, policy._grid, arrays).compile()
            text, parts = trace(
                lambda arrays=arrays, compiled=compiled: compiled(policy.weights, policy._grid, arrays),
                3,
                compiled.as_text(),
            )
            print(text)
            figures["trace_ms"] = {part: round(ms, 3) for part, ms in parts.items()}
        result[str(size)] = figures
    if name == args.variants[-1]:  # last, as it needs memory
        rate = bandwidth()
        result |= {"copy_tb_s": round(rate / 1e12, 2)} | floors(config, policy, rate)
        print(f"{'floors':10} " + ", ".join(f"{k} {v}" for k, v in result.items() if not isinstance(v, dict)))
    return result


def run_torch(config: SpatialVLAConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Time `predict_action` of the exported model in bfloat16, from prepared inputs to tokens."""
    import torch

    from spatialvla_jax.checkpoints.published_config import config_to_published
    from spatialvla_jax.export.transformers.configuration_spatialvla import SpatialVLAConfig as TorchConfig
    from spatialvla_jax.export.transformers.modeling_spatialvla import SpatialVLAForConditionalGeneration
    from spatialvla_jax.export.verify import torch_inputs

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = SpatialVLAForConditionalGeneration(TorchConfig(**config_to_published(config, {np.dtype("float32")})))
    torch.set_default_dtype(torch.float32)
    model = model.to(torch.bfloat16).eval()
    result: dict[str, Any] = {"torch": torch.__version__}
    grid = gaussian_grid(PRETRAIN_GAUSSIANS)
    ranges = torch.tensor([[config.action_offset + first, size] for first, size in grid.token_ranges])
    expected: Any = None  # the loop's tokens
    length, S, rng = 24, config.img.image_size, np.random.default_rng(0)
    for size in args.batch_sizes:
        arrays = {
            "image": rng.random((size, S, S, 3), np.float32),
            "intrinsics": np.tile(np.array([[S, 0, S / 2], [0, S, S / 2], [0, 0, 1]], np.float32), (size, 1, 1)),
            "prompt_ids": np.full((size, length), 5),
            "prompt_mask": np.ones((size, length), bool),
        }
        if config.depth_source == "dataset":
            arrays["depth"] = rng.uniform(0.3, 3, (size, S, S)).astype(np.float32)
        batch = {k: x.to(device) for k, x in torch_inputs(config, arrays).items()}

        batch["token_ranges"] = ranges
        for name in ("loop", "graph") if device == "cuda" else ("loop",):
            model._graphs = {"failed": True} if name == "loop" else {}

            def call(batch: dict[str, Any] = batch) -> Any:
                return model.predict_action(batch).cpu()

            began = time.perf_counter()
            tokens = call()
            expected = tokens if name == "loop" else expected
            figures: dict[str, Any] = {"first_s": round(time.perf_counter() - began, 1)}
            figures |= timed(call, args.repeats if name == "graph" else max(args.repeats // 5, 3))
            figures["chunks_per_second"] = round(1e3 * size / figures["median_ms"], 1)
            figures["tokens_as_loop"] = round(float((tokens == expected).float().mean()), 3)
            print(
                f"{'PyTorch':10} {name:5} batch {size:3}: " + ", ".join(f"{k} {v}" for k, v in figures.items()),
                flush=True,
            )
            result[f"{name} {size}"] = figures
    return result


def variants(text: str) -> list[str]:
    names = text.split(",") if text else []
    if unknown := [name for name in names if name not in VARIANTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(VARIANTS)}")
    return names


def first_action(args: argparse.Namespace) -> dict[str, float]:
    """Seconds from a process's start to its first action, with an empty and with a filled compilation cache."""
    seconds = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            began = time.perf_counter()
            command = [sys.executable, __file__, "--preset", args.preset, "--only-first"]
            environment = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
            subprocess.run(command, check=True, env=os.environ | environment)
            seconds[name] = round(time.perf_counter() - began, 1)
    print("first action: " + ", ".join(f"{k} {v} s" for k, v in seconds.items()))
    return seconds


def main() -> None:
    parser = Parser(prog="spatialvla-jax bench infer", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--variants", type=variants, default=["bfloat16"], help=f"some of {','.join(VARIANTS)}, or ''")
    parser.add_argument("--batch-sizes", type=positives, default=[1, 32])
    parser.add_argument("--repeats", type=positive, default=50)
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--first-action", action="store_true")
    parser.add_argument("--only-first", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--trace", action="store_true", help="also print where the time goes, from a profiler trace")
    state_defaults(parser)
    args = parser.parse_args()
    if others := [size for size in args.batch_sizes if size not in BATCH_SIZES]:  # `Policy` pads or splits them
        parser.error(f"--batch-sizes has {others[0]}: expected some of {','.join(map(str, BATCH_SIZES))}")
    if args.trace:  # kernels of a CUDA graph lose their names
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
    config = replace(preset(args.preset), dtype="bfloat16")
    if args.only_first:
        make_policy(config).infer(observations(1, config.depth_source == "dataset")[0])
        return
    device = jax.devices()[0]
    print(f"Python {platform.python_version()}, JAX {jax.__version__}, {device.device_kind}, {args.preset}")
    result: dict[str, Any] = {"benchmark": "infer", "device": device.device_kind, "preset": args.preset}
    if args.first_action:
        result["first_action_s"] = first_action(args)
    for name in args.variants:
        plain = patch.object(kernels, "can_attend", lambda *_: False)
        try:
            with plain if name == "plain" else nullcontext():
                result[name] = run(config, name, args)
        except Exception as error:  # the other variants may still work
            print(f"{name:10} FAILED: {type(error).__name__}: {str(error)[:1000]}", flush=True)
            result[name] = {"error": type(error).__name__}
    if args.torch:
        result["pytorch"] = run_torch(config, args)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
