"""The command `bench`."""

import argparse
import subprocess
import sys
from pathlib import Path

from spatialvla_jax.cli.arguments import Commands, add_command
from spatialvla_jax.errors import InputError

BENCHMARKS = {
    "tokenizer": "tokenizer.py",
    "loader": "loader.py",
    "train": "train_step.py",
    "serve": "serve.py",
    "infer": "infer.py",
    "decoding": "decoding.py",
}


def add(commands: Commands) -> None:
    p = add_command(
        commands,
        "bench",
        run_bench,
        "measure a part; bench NAME -h says how, and what can be set",
        ("tokenizer", "train --preset tiny --batch-size 32", "loader --help"),
    )
    p.add_argument("benchmark", choices=BENCHMARKS)
    p.add_argument("arguments", nargs=argparse.REMAINDER, help="of the benchmark")


def run_bench(args: argparse.Namespace) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / BENCHMARKS[args.benchmark]
    if not script.is_file():
        raise InputError(f"{script} does not exist: benchmarks run from a clone of the repository")
    if code := subprocess.call([sys.executable, str(script), *args.arguments]):  # a fresh process, for its memory
        raise SystemExit(code)
