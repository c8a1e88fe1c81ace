"""Time from a kill to the first new step, by phase, of a run that is killed by SIGKILL and restarted.

    python benchmarks/restart.py [--config demo] [--repeats 5] [--root runs/bench_restart] [--out restart.json]

A first process trains, fills the compilation cache and is killed after a checkpoint. Then the same command is restarted
and killed after its first new step, `--repeats` times. The phases are those that the run itself records
(`WORKDIR/goodput/`): imports (from the kill on: the process is restarted at once), index (opening the data), restore,
start (the rest before the first step), data (waiting for the first batch), compile (tracing, and loading the step from
the cache) and step. Each has a budget in seconds. Ends with one line of JSON.
"""

import itertools
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax

from spatialvla_jax.checkpoints.orbax import step_directory
from spatialvla_jax.cli.arguments import Parser, positive, state_defaults
from spatialvla_jax.training.goodput import Process, read_processes
from spatialvla_jax.utils.atomic import write_json
from spatialvla_jax.utils.process import tied_to_this

# Seconds, for the config `demo` on two idle cores.
BUDGET = {"imports": 3.0, "index": 4.0, "restore": 1.5, "start": 2.0, "data": 1.0, "compile": 4.0, "step": 1.5}
TOTAL = 14.0


def main() -> None:
    parser = Parser(prog="restart", description=__doc__)
    parser.add_argument("--config", default="demo", help="as for train")
    parser.add_argument("--repeats", type=positive, default=5, help="number of restarts")
    parser.add_argument(
        "--root", type=Path, default=Path("runs/bench_restart"), help="parent of the run, which is replaced"
    )
    parser.add_argument("--out", type=Path, help="JSON file; by default none is written")
    parser.add_argument("settings", nargs="*", help="KEY=VALUE in the config")
    state_defaults(parser)
    args = parser.parse_args()
    environment = {
        "benchmark": "restart",
        "config": args.config,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
    }
    print("environment: " + ", ".join(f"{k} {v}" for k, v in environment.items() if k != "benchmark"))
    workdir = args.root / "run"
    shutil.rmtree(workdir, ignore_errors=True)
    command = [sys.executable, "-m", "spatialvla_jax.cli", "train", "--config", args.config, "--workdir", str(workdir)]
    command += ["--config.checkpoint.every=5", *(f"--config.{setting}" for setting in args.settings)]
    first = phases(restart(command, workdir))
    print("first start  " + line(first))
    runs = []
    for number in range(args.repeats):
        runs.append(phases(restart(command, workdir)))
        print(f"restart {number + 1:2}   " + line(runs[-1]))
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    print("median       " + line(medians))
    limits = BUDGET | {"total": TOTAL}
    for name, limit in limits.items():
        verdict = "within" if medians[name] <= limit else "OVER"
        print(f"{name:8} {medians[name]:6.2f} s, {verdict} its budget of {limit:g} s")
    result = environment | {"first": first, "restarts": runs, "medians": medians, "budget": limits}
    if args.out:
        write_json(args.out, result)
    print(json.dumps(result))


def restart(command: list[str], workdir: Path) -> Process:
    """Start the run, kill it after its next checkpoint, and return its record."""
    before = step_directory(workdir)
    began, known = time.time(), {process["began"] for process in read_processes(workdir)}
    output = subprocess.DEVNULL
    process = subprocess.Popen(command, stderr=output, stdout=output, env=tied_to_this(os.environ))
    try:
        while step_directory(workdir) == before:
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended with exit code {process.returncode}")
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (record,) = (p for p in read_processes(workdir) if p["began"] not in known)
    record["spawned"] = max(0.0, record["began"] - began)
    return record


def phases(record: Process) -> dict[str, float]:
    """Seconds by phase, up to the first new step."""
    marks, spawned = record["marks"], record.get("spawned", 0.0)
    made = next(mark for before, mark in itertools.pairwise(marks) if before["step"] is not None)["seconds"]
    found: dict[str, Any] = {name: made.get(name, 0.0) for name in BUDGET}
    found["imports"] += spawned
    total = made["total"] + spawned
    found["step"] = total - sum(found.values())
    return found | {"total": total}


def line(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())


if __name__ == "__main__":
    main()
