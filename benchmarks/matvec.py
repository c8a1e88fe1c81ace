"""Products of a few rows with a matrix in a decode pass: XLA compared with the kernel of `inference/kernels.py`.

    python benchmarks/matvec.py [--preset spatialvla-4b-224] [--rows 1,3] [--tiles 24] [--repeats 20]

As in the layers of a model, successive products read different matrices, more than fit into the cache. A tile that does
not compile, or multiplies wrongly, is skipped. Prints the environment, then for each matrix a lower bound (its bytes at
the bandwidth of a copy), XLA's microseconds and those of the fastest tiles; ends with one line of JSON. On a CPU the
kernel is interpreted: `--preset nano --tiles 2` is a smoke test.
"""

import argparse
import json
import os
import platform
import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
from infer import bandwidth, timed

from spatialvla_jax.cli.arguments import positive, positives
from spatialvla_jax.inference import decoder, kernels
from spatialvla_jax.inference.kernels import ROWS, Tile
from spatialvla_jax.models import PRESETS, preset

CACHE = 150e6  # bytes read between two uses of a matrix
SHARED = 200e3  # bytes of a multiprocessor's shared memory for a program's stages
UNDERWAY = 3e6  # bytes in flight: 3 TB/s times a latency of 1 µs


def tiles(outputs: int, inputs: int, gated: bool, count: int) -> list[Tile]:
    """Random tiles that fit a multiprocessor and saturate memory."""
    found = []
    for choice in product((16, 32, 64, 128), (64, 128, 256, 512), (1, 2, 3, 4), (2, 4, 8), (3, 4, 5)):
        tile = Tile(*choice)
        held = tile.stages * tile.columns * (tile.rows * (1 + gated) + ROWS) * 2
        programs = outputs // (1 + gated) // tile.rows * tile.splits
        divides = inputs % (tile.columns * tile.splits) == 0 and not (gated and tile.splits > 1)
        if divides and held <= SHARED and programs * held >= UNDERWAY:
            found.append(tile)
    return random.Random(0).sample(found, min(count, len(found)))


def measure(name: str, shape: tuple[int, int], rows: int, args: argparse.Namespace) -> dict[str, Any]:
    gated, (outputs, inputs) = name == "gate_up", shape
    count = max(1, min(26, int(CACHE / (2 * outputs * inputs)) + 1))
    rounds = max(1, 16 // count)
    draw = jax.jit(lambda key: 0.02 * jax.random.normal(key, shape, jnp.bfloat16))
    matrices = [draw(jax.random.key(i)) for i in range(count)]
    x = jax.random.normal(jax.random.key(0), (1, rows, inputs), jnp.bfloat16)

    def chain(one: Any, x: Any, matrices: Any) -> Any:
        """Run the products one after the other."""
        made = []
        for _ in range(rounds):
            for matrix in matrices:
                x, y = jax.lax.optimization_barrier((x, one(x, matrix)))
                made.append(y)
        return made

    def kernel(tile: Tile, x: Any, matrix: Any) -> Any:
        return kernels.multiply(x, matrix, gated=gated, tile=tile)

    def plain(x: Any, matrix: Any) -> Any:
        with patch.object(kernels, "can_multiply", lambda *_: False):
            return (decoder.gated if gated else decoder.linear)(x, matrix)

    def compiled(one: Any) -> Any:
        try:
            return jax.jit(partial(chain, one)).lower(x, matrices).compile()
        except Exception as error:  # compilers raise many types of errors
            return str(error).splitlines()[0][:100]

    tried = tiles(outputs, inputs, gated, args.tiles)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = list(pool.map(compiled, [plain, *(partial(kernel, tile) for tile in tried)]))

    def microseconds(program: Any) -> float:
        """Per product, over ten calls in a row, which hides launch latency."""

        def run() -> None:
            for _ in range(10):
                out = program(x, matrices)
            jax.block_until_ready(out)

        return round(timed(run, args.repeats)["median_ms"] * 100 / (count * rounds), 2)

    if isinstance(programs[0], str):
        raise RuntimeError(programs[0])
    expected = programs[0](x, matrices)[0].astype(jnp.float32)
    times: list[tuple[float, Tile]] = []
    failed = [program for program in programs[1:] if isinstance(program, str)]
    for tile, program in zip(tried, programs[1:], strict=True):
        if not isinstance(program, str):
            error = jnp.abs(program(x, matrices)[0] - expected).max() / jnp.abs(expected).max()
            if error < 0.03:
                times.append((microseconds(program), tile))
            else:
                failed.append(f"{tuple(tile)} is wrong by {float(error):.2g} of the largest product")
    return {
        "bytes": 2 * outputs * inputs,
        "xla_us": microseconds(programs[0]),
        "best": [[us, *tile] for us, tile in sorted(times)[:5]],
        "tried": len(tried),
        "failed": f"{len(failed)}: {failed[0]}" if failed else "",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="spatialvla-4b-224")
    parser.add_argument("--rows", type=positives, default=[1, 3])
    parser.add_argument("--tiles", type=positive, default=24, help="how many to try for each matrix")
    parser.add_argument("--repeats", type=positive, default=20)
    args = parser.parse_args()
    if max(args.rows) > ROWS:
        parser.error(f"--rows has {max(args.rows)}, and the kernel takes {ROWS} at most")
    device, llm = jax.devices()[0], preset(args.preset).llm
    print(f"Python {platform.python_version()}, JAX {jax.__version__}, {device.device_kind}")
    rate = bandwidth()
    D, heads = llm.width, llm.num_heads * llm.head_dim
    shapes = {
        "qkv": (heads + 2 * llm.num_kv_heads * llm.head_dim, D),
        "out": (D, heads),
        "gate_up": (2 * llm.mlp_dim, D),
        "down": (D, llm.mlp_dim),
    }
    results: dict[str, Any] = {}
    for (name, shape), rows in product(shapes.items(), args.rows):
        result = results[f"{name} {rows}"] = measure(name, shape, rows, args)
        best = "; ".join(f"{us} us {tuple(tile)}" for us, *tile in result["best"])
        floor = round(1e6 * result["bytes"] / rate, 2)
        line = f"{name} {shape}, {rows} rows: floor {floor} us, XLA {result['xla_us']}, {best} {result['failed']}"
        print(line, flush=True)
    print(json.dumps({"benchmark": "matvec", "device": device.device_kind, "tb_s": rate / 1e12, **results}))


if __name__ == "__main__":
    main()
