"""What the commands' parsers share."""

import argparse
import os
from collections.abc import Callable
from typing import Any

Commands = Any  # the parsers of a group of commands; argparse's own type is private
Run = Callable[[argparse.Namespace], None]

UNCONSTRAINED = "choose every token from the whole vocabulary, as the published code does"


def add_group(commands: Commands, name: str, help: str) -> Commands:
    """A command that has commands of its own, as `data` has `data show`."""
    parser = commands.add_parser(name, help=help, description=help)
    return parser.add_subparsers(required=True, metavar="COMMAND")


def add_command(commands: Commands, name: str, run: Run, help: str) -> argparse.ArgumentParser:
    """A command whose arguments are handed to `run`."""
    parser = commands.add_parser(name, help=help, description=help)
    parser.set_defaults(run=run, prog=parser.prog)
    return parser


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--coordinator",
        default=os.environ.get("JAX_COORDINATOR_ADDRESS"),
        metavar="HOST:PORT|auto",
        help="process 0 of several that train together; auto on TPU pods, SLURM and MPI",
    )
    parser.add_argument("--num-processes", type=int, default=os.environ.get("JAX_NUM_PROCESSES"))
    parser.add_argument("--process-id", type=int, default=os.environ.get("JAX_PROCESS_ID"))
    parser.add_argument(
        "--heartbeat", type=int, default=100, help="seconds after which a silent process ends the others"
    )


def join_processes(args: argparse.Namespace) -> None:
    """Joins the run's other processes, where --coordinator names one. Raises InputError."""
    from spatialvla_jax.utils.distributed import join

    if args.coordinator:
        join(args.coordinator, args.num_processes, args.process_id, args.heartbeat)


def task_ids(text: str) -> list[int]:
    """`0,5,7` → [0, 5, 7]."""
    return [int(part) for part in text.split(",")]
