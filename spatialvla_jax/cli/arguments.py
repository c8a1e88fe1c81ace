"""Shared parts of the commands' argument parsers."""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from spatialvla_jax.utils.outputs import OutputFile, OutputFolder
from spatialvla_jax.utils.storage import is_url

Commands = Any  # the parsers of a group of commands; argparse's own type is private
Run = Callable[[argparse.Namespace], None]

UNCONSTRAINED = "choose every token from the whole vocabulary, as the published code does"


class Parser(argparse.ArgumentParser):
    """Reports errors in one sentence; keeps the line breaks of the description and examples."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` says more\n")


def add_group(commands: Commands, name: str, help: str, examples: Sequence[str]) -> Commands:
    """Add a command with subcommands, such as `data` with `data show`."""
    parser = commands.add_parser(name, help=help, description=help)
    add_examples(parser, examples)
    return parser.add_subparsers(required=True)


def add_command(commands: Commands, name: str, run: Run, help: str, examples: Sequence[str]) -> argparse.ArgumentParser:
    """Add a command that calls `run` with its arguments. `examples` are arguments to show after its name."""
    parser = commands.add_parser(name, help=help, description=help)
    add_examples(parser, examples)
    parser.set_defaults(run=run, prog=parser.prog, outputs=())
    return parser


def add_examples(parser: argparse.ArgumentParser, examples: Sequence[str]) -> None:
    parser.epilog = "examples:\n" + "\n".join(f"  {parser.prog} {example}".rstrip() for example in examples)


def add_output(parser: argparse.ArgumentParser, flag: str, output: OutputFile | OutputFolder, **options: Any) -> None:
    """Add an argument that names an output, which is checked before the command starts."""
    options.setdefault("type", file_path if isinstance(output, OutputFile) else path)
    action = parser.add_argument(flag, **options)
    option = flag if flag.startswith("-") else flag.upper()
    parser.set_defaults(outputs=(*parser.get_default("outputs"), (action.dest, option, output)))


def check_outputs(args: argparse.Namespace) -> None:
    """Raises InputError if an output may not be written to its path."""
    for dest, option, output in args.outputs:
        if (path := getattr(args, dest)) is not None:
            output.check(path, option)


def state_defaults(parser: argparse.ArgumentParser) -> None:
    """Append the default to the help of every option of a command and its subcommands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                state_defaults(below)
        elif action.option_strings and action.default is not argparse.SUPPRESS:
            action.help = " ".join(filter(None, (action.help, default_of(action))))


def default_of(action: argparse.Action) -> str:
    """Such as "(default: 32)"; "" if the help already mentions the default."""
    if action.required:
        return "(required)"
    if "default" in (action.help or "") or action.default in (None, ""):
        return ""
    value = action.default
    if isinstance(value, bool):
        value = "on" if value else "off"
    elif isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    return f"(default: {str(value).replace('%', '%%')})"


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--coordinator",
        default=os.environ.get("JAX_COORDINATOR_ADDRESS"),
        metavar="HOST:PORT|auto",
        help="address of process 0, if several train together; auto on TPU pods, SLURM and MPI; by default "
        "JAX_COORDINATOR_ADDRESS, or a single process if that is unset",
    )
    parser.add_argument(
        "--num-processes",
        type=positive,
        default=os.environ.get("JAX_NUM_PROCESSES"),
        help="number of processes that train together; by default JAX_NUM_PROCESSES",
    )
    parser.add_argument(
        "--process-id",
        type=count,
        default=os.environ.get("JAX_PROCESS_ID"),
        help="number of this process, counted from 0; by default JAX_PROCESS_ID",
    )
    parser.add_argument(
        "--heartbeat", type=positive, default=100, help="seconds of silence before a process counts as dead"
    )


def join_processes(args: argparse.Namespace) -> None:
    """Join the run's other processes if --coordinator is given. Raises InputError."""
    from spatialvla_jax.utils.distributed import join

    if args.coordinator:
        join(args.coordinator, args.num_processes, args.process_id, args.heartbeat)


LARGEST = 2**31 - 1


def path(text: str) -> Path:
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a path")
    return Path(text)


def file_path(text: str) -> Path:
    """A path without a trailing slash, which `path` would drop."""
    if text.endswith("/"):
        raise argparse.ArgumentTypeError(f"{text} is a folder: expected the name of a file")
    return path(text)


def local_path(text: str) -> Path:
    if is_url(text):
        raise argparse.ArgumentTypeError(f"{text} is a URL: only a local path is accepted here")
    return path(text)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or not 1 <= int(text) <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not an integer from 1 to {LARGEST}")
    return int(text)


def count(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isdecimal() or int(text) > LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not an integer from 0 to {LARGEST}")
    return int(text)


def amount(text: str) -> float:
    """A finite number that is not negative."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a non-negative number")
    return value


def at_most(limit: float, number: Callable[[str], float] = positive) -> Callable[[str], float]:
    """`number` with an upper limit."""

    def bounded(text: str) -> float:
        if (value := number(text)) > limit:
            raise argparse.ArgumentTypeError(f"{text!r} is more than {limit}")
        return value

    return bounded


def port(text: str) -> int:
    """A TCP port; 0 lets the system choose one."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def positives(text: str) -> list[int]:
    """`1,32` → [1, 32]."""
    return [positive(part) for part in text.split(",")]


def task_ids(text: str) -> list[int]:
    """`0,5,7` → [0, 5, 7]."""
    return [count(part) for part in text.split(",")]
