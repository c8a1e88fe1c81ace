"""The command line: `spatialvla-jax COMMAND …`. Bad input ends with one sentence and exit code 2, failing storage with
one sentence and exit code 1."""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import spatialvla_jax
from spatialvla_jax.cli import bench, checkpoints, config, data, evaluate, grid, record, report, serve, train, view
from spatialvla_jax.cli.arguments import Parser, check_outputs, state_defaults
from spatialvla_jax.errors import FaultsError, InputError, StorageError
from spatialvla_jax.utils.atomic import remove_unfinished
from spatialvla_jax.utils.quiet import quiet_libraries
from spatialvla_jax.utils.signals import WORDS, Terminated, sigterm_raises
from spatialvla_jax.utils.storage import as_path

# Codes of an OSError that the user can fix.
MISTAKES = {errno.ENOENT, errno.EEXIST, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EROFS}
MISTAKES |= {errno.ENAMETOOLONG, errno.ELOOP}

# Words in JAX's errors after another process of the run has died, on CPUs, GPUs and TPUs.
LOST = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "heartbeat")

GROUPS = {
    "train": (train, report, config),
    "evaluate and serve": (evaluate, serve, view),
    "checkpoints": (checkpoints,),
    "data": (data, grid, record),
    "measure": (bench,),
}


def make_parser() -> Parser:
    parser = Parser(prog="spatialvla-jax", usage="spatialvla-jax [-h] [--version] COMMAND …")
    parser.add_argument("--version", action="version", version=f"%(prog)s {spatialvla_jax.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", prog=parser.prog, help=argparse.SUPPRESS)
    lines, listed = ["Train, evaluate and convert SpatialVLA in JAX."], set()
    for title, modules in GROUPS.items():
        for module in modules:
            module.add(commands)
        lines += ["", f"{title}:"]
        lines += [f"  {name:10}{p.description}" for name, p in commands.choices.items() if name not in listed]
        listed |= commands.choices.keys()
    parser.description = "\n".join(lines)
    parser.epilog = "`spatialvla-jax COMMAND --help` shows a command's options, their defaults and examples."
    state_defaults(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    if not argv:
        parser.print_help()
        return 0
    split = argv.index("--") if "--" in argv else len(argv)
    args, rest = parser.parse_known_args(argv[:split])
    args.runner_options = argv[split + 1 :]

    def command() -> None:
        expand_paths(args)
        if args.runner_options and args.run not in (data.run_stats, data.run_index):
            raise InputError("only the commands stats and data index take arguments after --")
        args.overrides = overrides_of(rest, allowed=hasattr(args, "config"))
        check_outputs(args)
        args.run(args)

    return run(args.prog, command, joined=bool(getattr(args, "coordinator", None)))


def run(prog: str, command: Callable[[], None], joined: bool = False) -> int:
    """Run a command and return its exit code. A known error or a signal ends it with one line of output."""
    try:
        quiet_libraries()
        with sigterm_raises(prog):
            command()
    except (KeyboardInterrupt, Terminated) as stopped:
        number = signal.SIGTERM if isinstance(stopped, Terminated) else signal.SIGINT
        remove_unfinished()
        print(f"{prog}: {WORDS[number]}", file=sys.stderr, flush=True)
        return 128 + number
    except Exception as error:
        if (known := failure(error, joined)) is None:
            raise
        code, sentence = known
        print(f"{prog}: {sentence}", file=sys.stderr, flush=True)
        if code == 1 and joined:
            os._exit(1)  # a normal exit would wait for the run's other processes, which wait for this one
        return code
    return 0


def failure(error: Exception, joined: bool) -> tuple[int, str] | None:
    """The exit code and message for a known error. None for an unexpected one, so that its traceback is printed.
    `joined` says whether this process has joined a multi-process run."""
    if isinstance(error, InputError):
        return 2, str(error)
    if isinstance(error, StorageError | FaultsError):
        return 1, str(error)
    if isinstance(error, OSError) and error.filename:
        return 2 if error.errno in MISTAKES else 1, f"{error.filename}: {error.strerror}"
    reason = (str(error).splitlines() or [""])[0]
    if joined and runtime_error(error, *LOST):
        return 1, f"another process of the run died or cannot be reached ({reason}); see its output"
    if runtime_error(error, "RESOURCE_EXHAUSTED"):
        return 2, (
            f"the device's memory is too small ({reason}): try more rematerialisation (model.remat=full), fewer "
            "examples at once (a smaller batch size, a larger train.grad_accum_steps) or parameters split over more "
            "devices (mesh.fsdp); `spatialvla-jax compile` says what fits a TPU pod"
        )
    return None


def runtime_error(error: Exception, *words: str) -> bool:
    """Whether this is an error of JAX's runtime that contains one of the words."""
    jax = sys.modules.get("jax")
    return bool(jax and isinstance(error, jax.errors.JaxRuntimeError) and any(word in str(error) for word in words))


def expand_paths(args: argparse.Namespace) -> None:
    """Convert URLs among the arguments, and expand ~ where the shell did not, as in --out=~/grid.json. Raises
    InputError."""
    for name, value in vars(args).items():
        if isinstance(value, Path):
            setattr(args, name, as_path(value, f"--{name.replace('_', '-')}"))


def overrides_of(rest: list[str], allowed: bool) -> dict[str, str]:
    """`--config.train.steps=100` → {"train.steps": "100"}. Raises InputError for other arguments."""
    overrides = {}
    for argument in rest:
        key, equals, value = argument.removeprefix("--config.").partition("=")
        if not (allowed and argument.startswith("--config.") and equals):
            raise InputError(f"argument {argument!r} is not known; config keys are set as --config.KEY=VALUE")
        overrides[key] = value
    return overrides
