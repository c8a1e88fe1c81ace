"""Gemma 2's attention in the training step, one layer: forward, and forward with backward; errors.

    python benchmarks/attention.py [--preset small] [--batch-size 128] [--repeats 30]

Compares XLA's attention, the Pallas kernels at several tiles, and cuDNN's, which has no soft cap: another formula, here
as a bound. Errors are the largest over the largest value, against the plain formula in float32. A setting that fails is
named and left out. Prints the environment, then a line for each; ends with one line of JSON. On a CPU the kernels are
interpreted: `--preset nano` shows that the program runs.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np

from spatialvla_jax.models import attention
from spatialvla_jax.models.fused_attention import Tile, Tiles, attend_fused, tiles_for

# Batch, length, query heads, key/value heads, head dim.
PRESETS = {"full": (32, 320, 8, 4, 256), "small": (128, 301, 8, 4, 64), "nano": (2, 70, 4, 2, 16)}
# Forward, dk and dv, dq: queries × keys, warps, stages. The module's own come first.
TILES = {
    "full": [
        Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
        Tiles(Tile(64, 32, 4, 3), Tile(32, 64, 8, 2), Tile(64, 32, 8, 2)),
        Tiles(Tile(128, 64, 8, 2), Tile(32, 64, 4, 2), Tile(64, 32, 4, 2)),
        Tiles(Tile(64, 64, 4, 1), Tile(64, 32, 8, 1), Tile(64, 64, 4, 1)),
    ],
    "small": [
        Tiles(Tile(128, 64, 8, 2), Tile(64, 128, 8, 2), Tile(128, 64, 8, 2)),
        Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
        Tiles(Tile(64, 32, 4, 3), Tile(32, 64, 4, 3), Tile(64, 32, 4, 3)),
        Tiles(Tile(128, 64, 4, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    ],
    "nano": [Tiles(Tile(32, 16, 4, 1), Tile(16, 32, 4, 1), Tile(32, 32, 4, 1))],
}
PARTS = ("out", "dq", "dk", "dv")


def xla(q: Any, k: Any, v: Any, mask: Any, **options: Any) -> jax.Array:
    with patch.object(attention, "can_fuse", lambda *_: False):
        return attention.attend(q, k, v, mask, **options)


def cudnn(q: Any, k: Any, v: Any, mask: Any, *, scale: float, softcap: float) -> jax.Array:
    del softcap
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale, implementation="cudnn")


def random_inputs(B: int, T: int, N: int, K: int, H: int) -> tuple[jax.Array, ...]:
    """Queries, keys, values, a prefix mask with padding, the output's gradient; logits up to about half the cap."""
    rng = np.random.default_rng(0)
    draw = lambda *shape, size=1.0: jnp.asarray(size * rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    valid = np.arange(T) >= rng.integers(0, T // 8, (B, 1))
    mask = attention.prefix_lm_mask(jnp.asarray(valid), T - T // 6) | jnp.eye(T, dtype=bool)
    return draw(B, T, N, H, size=3.0), draw(B, T, K, H, size=2.0), draw(B, T, K, H), mask, draw(B, T, N, H)


def both(function: Callable[..., jax.Array], q: Any, k: Any, v: Any, mask: Any, dout: Any) -> tuple[jax.Array, ...]:
    out, vjp = jax.vjp(lambda *x: function(*x, mask), q, k, v)
    return out, *vjp(dout.astype(out.dtype))


def median_ms(compiled: Callable[..., Any], inputs: tuple[jax.Array, ...], repeats: int) -> float:
    """Of `repeats` measurements, each of five calls in a row, so that starting them does not count."""
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


def spell(tiles: Tiles) -> str:
    return " ".join(f"{t.queries}x{t.keys}w{t.warps}s{t.stages}" for t in (tiles.forward, tiles.dkv, tiles.dq))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, action="append", help="may be repeated; by default full and small")
    parser.add_argument("--batch-size", type=int, help="by default the preset's")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()

    device = jax.devices()[0]
    print(f"Python {platform.python_version()}, JAX {jax.__version__}, {device.device_kind}")
    results: dict[str, dict[str, Any]] = {}
    for name in args.preset or ["full", "small"]:
        B, T, N, K, H = PRESETS[name]
        B = args.batch_size or B
        print(f"{name}: B {B}, T = S {T}, N {N}, K {K}, H {H}, bfloat16; tiles are forward, dk and dv, dq")
        inputs = random_inputs(B, T, N, K, H)
        options = {"scale": H**-0.5, "softcap": 50.0}
        with jax.default_matmul_precision("highest"):
            exact = jax.jit(partial(both, partial(xla, **options)))(
                *(x if x.dtype == bool else x.astype(jnp.float32) for x in inputs)
            )
        expected = tuple(np.asarray(x) for x in exact)
        del exact
        functions: dict[str, Callable[..., jax.Array]] = {"xla": xla}
        for tiles in [tiles_for(H), *TILES[name]]:
            functions[f"pallas {spell(tiles)}"] = partial(attend_fused, tiles=tiles)
        functions["cudnn without soft cap (another formula)"] = cudnn
        results[name] = {}
        for label, function in functions.items():
            try:
                result = measure(partial(function, **options), inputs, expected, args.repeats)
            except Exception as error:  # any: a compiler's refusal has no type of its own
                lines = str(error).strip().splitlines() or [type(error).__name__]
                result = {"failed": lines[0][:200]}
            results[name][label] = result
            print(f"  {label}: " + ", ".join(f"{k} {v}" for k, v in result.items()), flush=True)
    print(json.dumps({"device": device.device_kind, "jax": jax.__version__, "repeats": args.repeats} | results))


if __name__ == "__main__":
    main()
