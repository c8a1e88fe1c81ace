"""Compare training batches from a bucket and from a local disk, per second of CPU time and of wall time.

    python benchmarks/bucket.py [--latency-ms 50] [--bandwidth-mb 200] [--out runs/bench_bucket.json]

The bucket is `tests/helpers/range_server.py` on loopback, with the given latency per request and total bandwidth. It
runs in its own process, whose CPU time is reported separately. The data is that of `benchmarks/loader.py`, 190 MB. Four
streams are read in turns in one process: single frames and blocks, local and from the bucket, with the default
`data.read_block` for buckets. All samples of the run form one window of blocks, so that requests and bytes cover all
stages of a window.

Writes a JSON file, with the number of cores that a host of each pod needs to decode what the pod can train on.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loader import PROMPT_LENGTH, environment, load, make_data, settle

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.range_server import RangeServer, range_server

from spatialvla_jax.cli.arguments import Parser, positive, state_defaults
from spatialvla_jax.utils import retries

# From docs/guides/plan.md, by `compile`: hosts of four chips, and the samples/s at their roofline.
PODS = {"v4-128": (16, 3_366), "v5p-128": (16, 5_619), "v5e-256": (64, 9_646), "v6e-256": (64, 35_677)}


def main() -> None:
    parser = Parser(prog="python benchmarks/bucket.py", description=__doc__)
    parser.add_argument(
        "--root", type=Path, default=Path("runs/bench_bucket"), help="folder of the data, created if missing"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench_bucket.json"))
    parser.add_argument("--latency-ms", type=float, default=50.0, help="latency of each request")
    parser.add_argument("--bandwidth-mb", type=float, default=200.0, help="MB/s of all requests together")
    parser.add_argument("--datasets", type=positive, default=8)
    parser.add_argument("--frames", type=positive, default=600, help="distinct frames per dataset")
    parser.add_argument("--copies", type=positive, default=8, help="factor by which hard links enlarge each dataset")
    parser.add_argument("--batch-size", type=positive, default=64)
    parser.add_argument("--workers", type=positive, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--steps", type=positive, default=24, help="steps per repeat")
    parser.add_argument("--warm-up", type=positive, default=12, help="steps before each repeat, to empty the queues")
    parser.add_argument("--memory-gb", type=float, default=8.0)
    state_defaults(parser)
    args = parser.parse_args()

    result: dict[str, Any] = {"benchmark": "bucket"} | environment(args)
    result |= {"latency_ms": args.latency_ms, "bandwidth_mb": args.bandwidth_mb}
    print("environment: " + ", ".join(f"{k} {v}" for k, v in result.items() if k != "benchmark"))
    datasets = make_data(args)
    data = {
        "cache_dir": str(args.root / "index"),
        "workers": args.workers,
        "memory_gb": args.memory_gb,
        "shuffle_frames": args.repeats * (args.warm_up + args.steps) * args.batch_size,
        "prompt": {"length": PROMPT_LENGTH, "vocab_size": 256},
    }
    with range_server(args.root, latency_ms=args.latency_ms, bandwidth_mb=args.bandwidth_mb) as server:
        os.environ |= server.environment
        in_bucket = [one | {"path": f"gs://{Path(one['path']).relative_to(args.root)}"} for one in datasets]
        block = load(data | {"datasets": in_bucket}, progress=True).mixture.block
        streams = {
            f"{place}, {'single frames' if size == 1 else f'blocks of {size}'}": iter(
                load(data | {"datasets": entries, "read_block": size}).batches(args.batch_size)
            )
            for size in sorted({1, block})
            for place, entries in (("local", datasets), ("bucket", in_bucket))
        }
        result |= {"read_block": block, "streams": measure(streams, server, args)}
    report(result, args.workers)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2))
    print(f"wrote {args.out}")


def measure(streams: dict[str, Iterator[Any]], server: RangeServer, args: argparse.Namespace) -> dict[str, Any]:
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in streams}
    asked = {name: dict.fromkeys(("requests", "bytes", "retries", "server_seconds"), 0.0) for name in streams}
    for repeat in range(args.repeats):
        for name, batches in streams.items():
            settle()
            before = totals(server)
            for _ in range(args.warm_up):
                next(batches)
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(args.steps):
                next(batches)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            samples = args.steps * args.batch_size
            rates[name].append((samples / wall, samples / cpu))
            settle()
            for key, value in totals(server).items():
                asked[name][key] += value - before[key]
        print(f"repeat {repeat + 1}: " + ", ".join(f"{name} {own[-1][1]:.0f}/s" for name, own in rates.items()))
    samples = args.repeats * (args.warm_up + args.steps) * args.batch_size
    results = {}
    for name, own in rates.items():
        wall, cpu = (statistics.median(column) for column in zip(*own, strict=True))
        # Ratios within a repeat, since other load on the machine slows both.
        local = rates[name.replace("bucket", "local")]
        of_wall, of_cpu = (
            statistics.median(one[n] / other[n] for one, other in zip(own, local, strict=True)) for n in (0, 1)
        )
        results[name] = {
            "samples_per_second": round(wall, 1),
            "of_local": round(of_wall, 4),
            "per_cpu_second": round(cpu, 1),
            "per_cpu_second_range": [round(pick(one for _, one in own), 1) for pick in (min, max)],
            "of_local_cpu": round(of_cpu, 4),
            "requests_per_million": round(1e6 * asked[name]["requests"] / samples),
            "gigabytes_per_million": round(1e-3 * asked[name]["bytes"] / samples, 2),
            "retries": round(asked[name]["retries"]),
            "server_cpu_seconds_per_million": round(1e6 * asked[name]["server_seconds"] / samples, 1),
        }
    return results


def totals(server: RangeServer) -> dict[str, float]:
    return {**retries.counts(), "server_seconds": server.counts()["cpu_seconds"]}


def report(result: dict[str, Any], workers: int) -> None:
    """Print the table, and add the number of cores that each pod's hosts need."""
    print(f"\n{'samples/s':28}{'wall':>6}{'local':>8}{'CPU second':>12}{'local':>8}", end="")
    print(f"{'requests':>12}{'GB':>8}{'server CPU s':>14}   (per million samples)")
    for name, own in result["streams"].items():
        print(f"{name:28}{own['samples_per_second']:6.0f}{own['of_local']:8.1%}{own['per_cpu_second']:12.0f}", end="")
        print(f"{own['of_local_cpu']:8.1%}{own['requests_per_million']:12,}{own['gigabytes_per_million']:8.1f}", end="")
        print(f"{own['server_cpu_seconds_per_million']:14.0f}")
    per_core = result["streams"]["bucket, single frames"]["per_cpu_second"]
    result["cores_per_host"] = {}
    for pod, (hosts, rate) in PODS.items():
        result["cores_per_host"][pod] = cores = round(rate / hosts / per_core, 2)
        print(f"{pod}: {hosts} hosts, {rate / hosts:.0f} samples/s each, {cores:.1f} cores such as these")


if __name__ == "__main__":
    main()
