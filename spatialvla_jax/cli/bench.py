"""The command `bench`."""

import argparse
import os
import runpy
import subprocess
import sys
from pathlib import Path

from spatialvla_jax.cli.arguments import Commands, add_command
from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.process import end_if_tied, tied_to_this
from spatialvla_jax.utils.signals import Terminated

BENCHMARKS = {
    "tokenizer": "tokenizer.py",
    "loader": "loader.py",
    "train": "train_step.py",
    "serve": "serve.py",
    "infer": "infer.py",
    "decoding": "decoding.py",
    "release": "release.py",
}


def add(commands: Commands) -> None:
    p = add_command(
        commands,
        "bench",
        run_bench,
        "run a benchmark; `bench NAME -h` lists its options",
        ("tokenizer", "train --preset tiny --batch-size 32", "loader --help"),
    )
    p.add_argument("benchmark", nargs="?", choices=BENCHMARKS)
    p.add_argument("arguments", nargs=argparse.REMAINDER, help="options of the benchmark")


def run_bench(args: argparse.Namespace) -> None:
    if args.benchmark is None:
        raise InputError(f"name a benchmark: {', '.join(BENCHMARKS)}")
    script = Path(__file__).parents[2] / "benchmarks" / BENCHMARKS[args.benchmark]
    if not script.is_file():
        raise InputError(f"{script} does not exist: benchmarks run from a clone of the repository")
    code = "import sys; from spatialvla_jax.cli.bench import main; sys.exit(main())"
    # In a new process, so that its peak memory is the benchmark's.
    command = [sys.executable, "-c", code, str(script), args.benchmark, *args.arguments]
    process = subprocess.Popen(command, env=tied_to_this(os.environ))
    try:
        code = process.wait()
    except (KeyboardInterrupt, Terminated) as stopped:
        if isinstance(stopped, Terminated):
            process.terminate()
        code = process.wait()  # it prints that it was stopped
    if code:
        raise SystemExit(code if code > 0 else 128 - code)


def main() -> int:
    """Run a benchmark's script as Python would, with a command's handling of errors and signals."""
    from spatialvla_jax.cli import run

    end_if_tied()
    script, name, *arguments = sys.argv[1:]
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))

    def benchmark() -> None:
        runpy.run_path(script, run_name="__main__")

    return run(f"spatialvla-jax bench {name}", benchmark)
