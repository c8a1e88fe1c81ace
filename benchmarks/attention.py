"""One layer of Gemma 2's attention in the training step: time of forward, and of forward and backward; errors.

    python benchmarks/attention.py [--preset small] [--batch-size 128] [--repeats 30]

First each Pallas kernel alone, with several tiles; then XLA's attention, the kernels with their default and with the
fastest tiles, and cuDNN's, which serves as a bound, since it has no soft cap. Errors are relative to the largest value,
against the plain formula in float32. `--preset decode` measures a decode pass instead: one and three new tokens and a
cache of 320, with the plain formula and `inference/kernels.py`. A setting that fails is reported and skipped. Prints
the environment and a line for each; ends with one line of JSON. On a CPU the kernels are interpreted: `--preset nano`
is a smoke test.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np

from spatialvla_jax.inference import kernels as decoding
from spatialvla_jax.inference.decoder import attend_and_write
from spatialvla_jax.models import attention
from spatialvla_jax.models import fused_attention as fused
from spatialvla_jax.models.fused_attention import Tile
from spatialvla_jax.models.gemma2 import Gemma2Config

# Batch, length, query heads, key/value heads, head dim.
PRESETS = {"full": (32, 320, 8, 4, 256), "small": (128, 301, 8, 4, 64), "nano": (2, 70, 4, 2, 16)}
# Tried for each kernel beside its default: queries, keys, warps, stages.
TILES = {
    "full": {
        "forward": [(64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 8, 2), (128, 32, 8, 2), (128, 64, 8, 2), (32, 64, 4, 2)],
        "dkv": [(32, 32, 4, 1), (32, 64, 8, 1), (32, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 1), (64, 32, 8, 2)],
        "dq": [(64, 32, 8, 2), (64, 32, 4, 1), (64, 32, 4, 2), (64, 64, 4, 1), (64, 64, 8, 2), (128, 32, 8, 1)],
    },
    "small": {
        "forward": [(64, 64, 4, 3), (64, 32, 4, 3), (128, 64, 8, 2), (128, 64, 4, 2), (64, 128, 4, 2)],
        "dkv": [(64, 64, 4, 3), (32, 64, 4, 3), (32, 128, 8, 2), (64, 128, 8, 2), (64, 64, 4, 1)],
        "dq": [(64, 64, 4, 3), (64, 32, 4, 3), (128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 4, 1)],
    },
    "nano": {"forward": [(32, 16, 4, 1)], "dkv": [(16, 32, 4, 1)], "dq": [(32, 32, 4, 1)]},
}
PARTS = ("out", "dq", "dk", "dv")
STEPS = 16  # decode steps per program, each on the cache of the previous one


def xla(q: Any, k: Any, v: Any, mask: Any, **options: Any) -> jax.Array:
    with patch.object(attention, "can_fuse", lambda *_: False):
        return attention.attend(q, k, v, mask, **options)


def cudnn(q: Any, k: Any, v: Any, mask: Any, *, scale: float, softcap: float) -> jax.Array:
    del softcap
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale, implementation="cudnn")


def random_inputs(B: int, T: int, N: int, K: int, H: int) -> tuple[jax.Array, ...]:
    """Queries, keys, values, a prefix mask with padding, and the output's gradient; logits reach half the cap."""
    rng = np.random.default_rng(0)
    draw = lambda *shape, size=1.0: jnp.asarray(size * rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    valid = np.arange(T) >= rng.integers(0, T // 8, (B, 1))
    mask = attention.prefix_lm_mask(jnp.asarray(valid), T - T // 6) | jnp.eye(T, dtype=bool)
    return draw(B, T, N, H, size=3.0), draw(B, T, K, H, size=2.0), draw(B, T, K, H), mask, draw(B, T, N, H)


def both(function: Callable[..., jax.Array], q: Any, k: Any, v: Any, mask: Any, dout: Any) -> tuple[jax.Array, ...]:
    out, vjp = jax.vjp(lambda *x: function(*x, mask), q, k, v)
    return out, *vjp(dout.astype(out.dtype))


def median_ms(compiled: Callable[..., Any], inputs: tuple[jax.Array, ...], repeats: int) -> float:
    """Median of `repeats` measurements, each over five calls in a row, which hides launch latency."""
    jax.block_until_ready(compiled(*inputs))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready([compiled(*inputs) for _ in range(5)])
        seconds.append((time.perf_counter() - began) / 5)
    return 1e3 * statistics.median(seconds)


def measure(
    function: Callable[..., jax.Array], inputs: tuple[jax.Array, ...], expected: tuple[Any, ...], repeats: int
) -> dict[str, Any]:
    forward = jax.jit(function).lower(*inputs[:-1]).compile()
    backward = jax.jit(partial(both, function)).lower(*inputs).compile()
    result: dict[str, Any] = {
        "forward_ms": round(median_ms(forward, inputs[:-1], repeats), 4),
        "both_ms": round(median_ms(backward, inputs, repeats), 4),
    }
    if (analysis := backward.memory_analysis()) is not None:
        result["temporary_mb"] = round(analysis.temp_size_in_bytes / 1e6, 1)
    for name, x, y in zip(PARTS, backward(*inputs), expected, strict=True):
        result[f"{name}_error"] = float(f"{np.abs(np.asarray(x, np.float32) - y).max() / np.abs(y).max():.2e}")
    return result


def kernels(inputs: tuple[jax.Array, ...], options: dict[str, Any], tried: dict[str, Any], repeats: int) -> Any:
    """Returns (ms of each kernel with each tile, the fastest tiles)."""
    q, k, v, mask, dout = inputs
    own = fused.tiles_for(q.shape[-1])
    call = lambda tiles: fused.Call(**options, tiles=tiles, interpret=jax.default_backend() != "gpu")  # noqa: E731
    mask = mask.astype(jnp.int8)
    z = jnp.full((q.shape[0], q.shape[2], q.shape[1]), 1e-3)
    arguments = {"forward": (q, k, v, mask), "dkv": (q, k, v, mask, z, z, dout), "dq": (q, k, v, mask, z, z, dout)}
    runs = {"forward": fused.run_forward, "dkv": fused.run_dkv, "dq": fused.run_dq}
    places = [(name, tile) for name in runs for tile in [getattr(own, name), *(Tile(*t) for t in tried[name])]]

    def build(place: tuple[str, Tile]) -> Any:
        name, tile = place
        run = partial(runs[name], call(replace(own, **{name: tile})))
        return or_failure(lambda: jax.jit(run).lower(*arguments[name]).compile())

    with ThreadPoolExecutor() as pool:
        programs = list(pool.map(build, places))
    times: dict[str, dict[str, Any]] = {name: {} for name in runs}
    best: dict[str, tuple[float, Tile]] = {}
    for (name, tile), program in zip(places, programs, strict=True):
        ms = program
        if not isinstance(program, dict):
            ms = or_failure(lambda p=program, n=name: round(median_ms(p, arguments[n], repeats), 4))
        times[name][spell(tile)] = ms
        if isinstance(ms, float):
            best[name] = min(best.get(name, (ms, tile)), (ms, tile), key=lambda x: x[0])
    for name, by_tile in times.items():
        print(f"  {name} alone, ms: " + ", ".join(f"{k} {v}" for k, v in by_tile.items()), flush=True)
    return times, replace(own, **{name: tile for name, (_, tile) in best.items()})


def decode(B: int, T: int, repeats: int) -> dict[str, Any]:
    """µs of one layer's attention over T new tokens at full size, from projected inputs to output and cache."""
    cfg, S, rng = Gemma2Config(), 320, np.random.default_rng(0)
    N, K, H, at = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, S - 20
    draw = lambda *shape: jnp.asarray(2 * rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    new, cache = [draw(B, T, N + 2 * K, H) for _ in range(STEPS)], (draw(B, S, K, H), draw(B, S, K, H))
    mask = jnp.broadcast_to(jnp.arange(S) < at + T, (B, T, S))
    inputs: Any = new, attention.rotary_angles(jnp.full((B, T), at), H), mask, cache, jnp.asarray(at)

    def plain(*args: Any) -> Any:
        with patch.object(decoding, "can_attend", lambda *_: False):
            return attend_and_write(cfg, *args)

    def chain(step: Callable[..., Any], new: Any, angles: Any, mask: Any, cache: Any, at: Any) -> Any:
        step, made = jax.jit(step), []
        for qkv in new:
            y, cache = step(qkv, angles, mask, cache, at)
            made.append(y)
        return made, cache

    def measure(step: Callable[..., Any]) -> dict[str, float]:
        run = jax.jit(partial(chain, step)).lower(*inputs).compile()
        error = np.abs(np.asarray(run(*inputs)[0][0], np.float32) - expected).max() / np.abs(expected).max()
        return {"us": round(1e3 * median_ms(run, inputs, repeats) / STEPS, 2), "error": float(f"{error:.2e}")}

    exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, (new[0], *inputs[1:]))
    with jax.default_matmul_precision("highest"):
        expected = np.asarray(jax.jit(plain)(*exact)[0])
    kernel = partial(decoding.attend_cached, scale=cfg.query_pre_attn_scalar**-0.5, softcap=cfg.attn_softcap)
    steps = {"plain": plain, "pallas": kernel, "pallas, cache whole": partial(kernel, splits=1)}
    result = {label: or_failure(partial(measure, step)) for label, step in steps.items()}
    for label, figures in result.items():
        print(f"decode, B {B}, T {T}, {label}: " + ", ".join(f"{k} {v}" for k, v in figures.items()), flush=True)
    return result


def or_failure(attempt: Callable[[], Any]) -> Any:
    """The result of `attempt`, or the first line of its error."""
    try:
        return attempt()
    except Exception as error:  # compilers raise many types of errors
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return {"failed": lines[0][:200]}


def spell(tile: Tile) -> str:
    return f"{tile.queries}x{tile.keys}/{tile.warps}/{tile.stages}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset", choices=[*PRESETS, "decode"], action="append", help="may be repeated; by default full and small"
    )
    parser.add_argument("--batch-size", type=int, help="by default the preset's")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()

    device = jax.devices()[0]
    print(f"Python {platform.python_version()}, JAX {jax.__version__}, {device.device_kind}")
    results: dict[str, dict[str, Any]] = {}
    for name in args.preset or ["full", "small"]:
        if name == "decode":
            sizes = [args.batch_size] if args.batch_size else [1, 32]
            results[name] = {f"{B}x{T}": decode(B, T, args.repeats) for B in sizes for T in (1, 3)}
            continue
        B, T, N, K, H = PRESETS[name]
        B = args.batch_size or B
        print(f"{name}: B {B}, T = S {T}, N {N}, K {K}, H {H}, bfloat16; tiles: queries x keys / warps / stages")
        inputs = random_inputs(B, T, N, K, H)
        options = {"scale": H**-0.5, "softcap": 50.0}
        with jax.default_matmul_precision("highest"):
            exact = jax.jit(partial(both, partial(xla, **options)))(
                *(x if x.dtype == bool else x.astype(jnp.float32) for x in inputs)
            )
        expected = tuple(np.asarray(x) for x in exact)
        del exact
        times, fastest = kernels(inputs, options, TILES[name], args.repeats)
        functions: dict[str, Callable[..., jax.Array]] = {
            "xla": xla,
            "pallas": fused.attend_fused,
            "pallas, fastest tiles": partial(fused.attend_fused, tiles=fastest),
            "cudnn without soft cap (another formula)": cudnn,
        }
        results[name] = {"kernels": times, "fastest": {k: spell(t) for k, t in vars(fastest).items()}}
        for label, function in functions.items():
            result = or_failure(partial(measure, partial(function, **options), inputs, expected, args.repeats))
            results[name][label] = result
            print(f"  {label}: " + ", ".join(f"{k} {v}" for k, v in result.items()), flush=True)
    print(json.dumps({"device": device.device_kind, "jax": jax.__version__, "repeats": args.repeats} | results))


if __name__ == "__main__":
    main()
