"""Compile the published pre-training for TPU pods, without any: memory, roofline, chip-hours and compile time.

    python benchmarks/pods.py [--pods v4-128 v5e-256 …] [--search v5e-256] [--machine-code] [--out pods.json]

Runs `spatialvla-jax compile --config pretrain` for each pod, in a new process with an empty cache. `--search` ranks the
plans of one pod instead. `--machine-code` also compiles each to machine code and compares the results. Writes a JSON
file.
"""

import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from spatialvla_jax.cli.arguments import Parser, state_defaults

# Name, and slices, mesh.data, mesh.fsdp
PODS = {
    "v4-128": (1, 1, 64),
    "v5p-128": (1, 1, 64),
    "v5e-256": (1, 2, 128),
    "v6e-256": (1, 2, 128),
    "2 × v5e-256": (2, 2, 256),
    "2 × v6e-256": (2, 2, 256),
}
COMPARED = ("hardware_flops", "hbm_bytes", "seconds", "step_seconds", "mfu_bound", "memory")


def main() -> None:
    parser = Parser(prog="python benchmarks/pods.py", description=__doc__)
    parser.add_argument("--pods", nargs="+", choices=PODS, default=list(PODS), help="pods to compile for")
    parser.add_argument("--search", choices=PODS, help="only rank the plans of this pod")
    parser.add_argument("--machine-code", action="store_true", help="also compile to machine code, and compare")
    parser.add_argument("--steps", type=int, default=225_000, help="steps of the run, for its chip-hours")
    parser.add_argument("--out", type=Path, default=Path("runs/pods.json"))
    state_defaults(parser)
    args = parser.parse_args()

    result: dict[str, Any] = {"benchmark": "pods", "steps": args.steps} | environment()
    if args.search:
        run = compile_pod(args.search, "--search")
        result |= {"search": args.search} | run
    else:
        result["pods"] = {}
        for pod in args.pods:
            run = compile_pod(pod)
            seconds = run["report"]["step_seconds"] * args.steps
            run |= {"hours": seconds / 3600, "chip_hours": seconds / 3600 * run["report"]["chips"]}
            if args.machine_code:
                full = compile_pod(pod, "--machine-code")
                run["with_machine_code"] = full
                run["equal"] = {key: run["report"][key] == full["report"][key] for key in COMPARED}
            result["pods"][pod] = run
            print(f"{pod}: {run['cpu_seconds']:.0f} CPU s, {run['wall_seconds']:.0f} s; {run['line']}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.out}")


def environment() -> dict[str, Any]:
    import jax

    return {"cpus": len(os.sched_getaffinity(0)), "machine": platform.processor() or platform.machine()} | {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "load": os.getloadavg()[0],
    }


def compile_pod(pod: str, *options: str) -> dict[str, Any]:
    """Returns the best plan's report, the times of the command and its stages, and a line per plan that fits."""
    slices, data, fsdp = PODS[pod]
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "spatialvla_jax", "compile", "--config", "pretrain"]
        command += ["--topology", pod.rpartition(" ")[2], "--slices", str(slices), *options]
        command += [f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}", f"--config.data.cache_dir={cache}"]
        began, cpu = time.perf_counter(), cpu_seconds()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    plans = [line for line in lines if line.startswith("mesh data")]
    stages: dict[str, float] = {}
    for name, seconds in re.findall(r"^  (\w+): ([\d.]+) s$", done.stderr, re.MULTILINE):
        stages[name] = stages.get(name, 0) + float(seconds)
    report = json.loads(lines[-1])
    del report["report"]  # a path of the empty cache
    return {
        "wall_seconds": time.perf_counter() - began,
        "cpu_seconds": cpu_seconds() - cpu,
        "stages": stages,
        "compiled": done.stderr.count("compiling mesh"),
        "line": plans[0],
        "fitting": plans,
        "report": report,
    }


def cpu_seconds() -> float:
    """CPU time of all ended child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
