"""What the commands' parsers share."""

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
    """Its errors are one sentence, its description and examples keep their lines."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` says more\n")


def add_group(commands: Commands, name: str, help: str, examples: Sequence[str]) -> Commands:
    """A command that has commands of its own, as `data` has `data show`."""
    parser = commands.add_parser(name, help=help, description=help)
    add_examples(parser, examples)
    return parser.add_subparsers(required=True)


def add_command(commands: Commands, name: str, run: Run, help: str, examples: Sequence[str]) -> argparse.ArgumentParser:
    """A command whose arguments are handed to `run`; `examples` are what stands behind its name."""
    parser = commands.add_parser(name, help=help, description=help)
    add_examples(parser, examples)
    parser.set_defaults(run=run, prog=parser.prog, outputs=())
    return parser


def add_examples(parser: argparse.ArgumentParser, examples: Sequence[str]) -> None:
    parser.epilog = "examples:\n" + "\n".join(f"  {parser.prog} {example}".rstrip() for example in examples)


def add_output(parser: argparse.ArgumentParser, flag: str, output: OutputFile | OutputFolder, **options: Any) -> None:
    """An argument that names what the command writes: it is checked before the command begins."""
    options.setdefault("type", file_path if isinstance(output, OutputFile) else path)
    action = parser.add_argument(flag, **options)
    option = flag if flag.startswith("-") else flag.upper()
    parser.set_defaults(outputs=(*parser.get_default("outputs"), (action.dest, option, output)))


def check_outputs(args: argparse.Namespace) -> None:
    """Raises InputError where an output's place is not free."""
    for dest, option, output in args.outputs:
        if (path := getattr(args, dest)) is not None:
            output.check(path, option)


def state_defaults(parser: argparse.ArgumentParser) -> None:
    """Ends the help of every option of a command, and of the commands below it, with its default."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                state_defaults(below)
        elif action.option_strings and action.default is not argparse.SUPPRESS:
            action.help = " ".join(filter(None, (action.help, default_of(action))))


def default_of(action: argparse.Action) -> str:
    """`(default: 32)`; nothing where the help says it in its own words."""
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
        help="process 0 of several that train together; auto on TPU pods, SLURM and MPI; by default "
        "JAX_COORDINATOR_ADDRESS, or without it one process alone",
    )
    parser.add_argument(
        "--num-processes",
        type=positive,
        default=os.environ.get("JAX_NUM_PROCESSES"),
        help="how many train together; by default JAX_NUM_PROCESSES",
    )
    parser.add_argument(
        "--process-id",
        type=count,
        default=os.environ.get("JAX_PROCESS_ID"),
        help="this one's number, from 0 on; by default JAX_PROCESS_ID",
    )
    parser.add_argument(
        "--heartbeat", type=positive, default=100, help="seconds after which a silent process ends the others"
    )


def join_processes(args: argparse.Namespace) -> None:
    """Joins the run's other processes, where --coordinator names one. Raises InputError."""
    from spatialvla_jax.utils.distributed import join

    if args.coordinator:
        join(args.coordinator, args.num_processes, args.process_id, args.heartbeat)


LARGEST = 2**31 - 1


def path(text: str) -> Path:
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a path")
    return Path(text)


def file_path(text: str) -> Path:
    """Not `DIR/`, of which `path` would make DIR."""
    if text.endswith("/"):
        raise argparse.ArgumentTypeError(f"{text} is a folder: expected the name of a file")
    return path(text)


def local_path(text: str) -> Path:
    if is_url(text):
        raise argparse.ArgumentTypeError(f"{text} is a URL, and only a path of this machine's disk can be taken here")
    return path(text)


def positive(text: str) -> int:
    """A number that counts something: 1 or more."""
    if not text.isdecimal() or not 1 <= int(text) <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a whole number from 1 on")
    return int(text)


def count(text: str) -> int:
    """A number that counts something, or 0."""
    if not text.isdecimal() or int(text) > LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a whole number from 0 on")
    return int(text)


def amount(text: str) -> float:
    """A finite number that is not negative."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return value


def at_most(limit: float, number: Callable[[str], float] = positive) -> Callable[[str], float]:
    """`number`, and no larger than `limit`."""

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
