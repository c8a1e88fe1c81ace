"""Encoding and decoding actions, and spatial embedding adaption: jitted functions compared with plain NumPy.

    python benchmarks/tokenizer.py [--actions 1000000] [--repeats 7]

Prints the environment, then the median and the fastest of the repeats; ends with one line of JSON. Both sides read and
write their own kind of arrays, in one process on all cores, without compilation. Also prints the time of a process's
first adaption, including compilation, and of adapting a NumPy table, as read from a checkpoint.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from spatialvla_jax.actions import PRETRAIN_GAUSSIANS, ActionGrid, adapt_embeddings, decode, encode, gaussian_grid
from spatialvla_jax.cli.arguments import Parser, positive, state_defaults


def numpy_encode(edges: list[np.ndarray], actions: np.ndarray) -> np.ndarray:
    x, y, z, *angles = actions[:, :6].clip(-1, 1).T
    radius = np.hypot(x, y)
    values = [np.arctan2(radius, z), np.arctan2(y, x), np.hypot(radius, z), *angles]
    bins = [np.searchsorted(e[1:-1], v, side="right") for e, v in zip(edges, values, strict=True)]
    shape = [len(e) - 1 for e in edges]
    translations, rotations = int(np.prod(shape[:3])), int(np.prod(shape[3:]))
    translation = np.ravel_multi_index(bins[:3], shape[:3])
    rotation = translations + np.ravel_multi_index(bins[3:], shape[3:])
    gripper = translations + rotations + (actions[:, 6] >= 0.5)
    return np.stack([translation, rotation, gripper], -1).astype(np.int32)


def numpy_decode(edges: list[np.ndarray], ids: np.ndarray) -> np.ndarray:
    shape = [len(e) - 1 for e in edges]
    translations, rotations = int(np.prod(shape[:3])), int(np.prod(shape[3:]))
    bins = [*np.unravel_index(ids[:, 0], shape[:3]), *np.unravel_index(ids[:, 1] - translations, shape[3:])]
    theta, phi, r, *angles = (((e[1:] + e[:-1]) / 2)[b] for e, b in zip(edges, bins, strict=True))
    xyz = np.stack([r * np.sin(theta) * np.cos(phi), r * np.sin(theta) * np.sin(phi), r * np.cos(theta)], -1)
    gripper = ids[:, 2] - translations - rotations
    return np.concatenate([xyz.clip(-1, 1), np.stack([*angles, gripper], -1)], -1).astype(np.float32)


def numpy_adapt(old: list[np.ndarray], new: list[np.ndarray], table: np.ndarray) -> np.ndarray:
    """Axis by axis, without extrapolation beyond the outermost centres."""
    middles = [[(e[1:] + e[:-1]) / 2 for e in edges] for edges in (old, new)]
    weights = [
        np.stack([np.interp(wanted, known, row) for row in np.eye(len(known))], 1)
        for known, wanted in zip(*middles, strict=True)
    ]
    shape, width = [len(e) - 1 for e in old], table.shape[1]
    n = int(np.prod(shape[:3]))
    parts = [
        np.einsum("ai,bj,ck,ijkd->abcd", *w, x.reshape(*s, width), optimize=True).reshape(-1, width)
        for w, s, x in ((weights[:3], shape[:3], table[:n]), (weights[3:], shape[3:], table[n:-2]))
    ]
    return np.concatenate([*parts, table[-2:]]).astype(table.dtype)


def measure(function: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each repeat, after a warm-up."""
    jax.block_until_ready(function())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = Parser(prog="spatialvla-jax bench tokenizer", description=__doc__)
    parser.add_argument("--actions", type=positive, default=1_000_000)
    parser.add_argument("--repeats", type=positive, default=7)
    state_defaults(parser)
    arguments = parser.parse_args()

    environment = {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
    }
    print("environment: " + ", ".join(f"{k} {v}" for k, v in environment.items()))

    grid: ActionGrid = gaussian_grid(PRETRAIN_GAUSSIANS)
    edges = [np.asarray(e) for e in grid.edges]
    actions = np.random.default_rng(0).normal(0, 0.4, (arguments.actions, 7)).astype(np.float32)
    ids = numpy_encode(edges, actions)
    on_device = jax.device_put(actions), jax.device_put(ids)

    mine, theirs = np.asarray(encode(grid, on_device[0])), ids
    moved = gaussian_grid(np.array(PRETRAIN_GAUSSIANS) * [1, 0.7] + [0.15, 0], min_sigma=0)
    table = np.random.default_rng(0).normal(size=(grid.vocab_size, 2304)).astype(np.float32)
    table_on_device = jax.device_put(table)
    moved_edges = [np.asarray(e) for e in moved.edges]

    # A process adapts once and pays for compilation, so this must come before other adaptions.
    start = time.perf_counter()
    jax.block_until_ready(adapt_embeddings(grid, moved, table))
    first = time.perf_counter() - start

    differing = float((mine != theirs).any(-1).mean())
    error = float(np.abs(np.asarray(decode(grid, on_device[1])) - numpy_decode(edges, ids)).max())
    print(f"agreement: {differing:.2e} of actions differ in an id (values on an edge), decoded within {error:.1e}")

    cases = {
        "encode": (lambda: encode(grid, on_device[0]), lambda: numpy_encode(edges, actions)),
        "decode": (lambda: decode(grid, on_device[1]), lambda: numpy_decode(edges, ids)),
        "adapt": (
            lambda: adapt_embeddings(grid, moved, table_on_device),
            lambda: numpy_adapt(edges, moved_edges, table),
        ),
    }
    figures: dict[str, Any] = {}
    print(f"{arguments.actions} actions, a table of 8194 ids × 2304, {arguments.repeats} repeats; milliseconds")
    print(f"{'':8}{'jax median':>12}{'fastest':>10}{'numpy median':>15}{'fastest':>10}{'ratio':>8}")
    for name, sides in cases.items():
        jitted, plain = (measure(side, arguments.repeats) for side in sides)
        a, b = statistics.median(jitted), statistics.median(plain)
        print(f"{name:8}{a * 1e3:12.1f}{min(jitted) * 1e3:10.1f}{b * 1e3:15.1f}{min(plain) * 1e3:10.1f}{b / a:8.1f}")
        figures[name] = {
            "jax_ms": round(1e3 * a, 2),
            "numpy_ms": round(1e3 * b, 2),
            "ratio": round(b / a, 2),
        }
    from_numpy = statistics.median(measure(lambda: adapt_embeddings(grid, moved, table), arguments.repeats))
    print(f"adapt of a NumPy table: {1e3 * first:.1f} the first time, compiling; then {1e3 * from_numpy:.1f} median")
    figures["adapt"] |= {"first_ms": round(1e3 * first, 2), "from_numpy_ms": round(1e3 * from_numpy, 2)}
    result = {"benchmark": "tokenizer", "actions": arguments.actions, "repeats": arguments.repeats, **environment}
    print(json.dumps({**result, "ids_differing": differing, "decode_max_error": error, **figures}))


if __name__ == "__main__":
    main()
