"""The command line's help, and how commands end when they are stopped."""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spatialvla_jax import cli
from spatialvla_jax.cli import main, make_parser
from spatialvla_jax.config import load_config
from spatialvla_jax.utils.atomic import replacing
from spatialvla_jax.utils.signals import Terminated, sigterm_raises


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers of all commands and groups of commands."""
    if parser.prog != "spatialvla-jax":
        yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from commands(below)


COMMANDS = {parser.prog.removeprefix("spatialvla-jax "): parser for parser in commands(make_parser())}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_argument_is_described_with_its_default(command: str) -> None:
    for action in COMMANDS[command]._actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
            continue
        assert action.help or action.choices, action
        if action.option_strings:
            assert "default" in action.help or action.required, action.option_strings
            assert "default: None" not in action.help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples_that_it_understands(command: str) -> None:
    _, _, examples = COMMANDS[command].format_help().partition("\nexamples:\n")
    lines = [line.strip() for line in examples.splitlines()]
    assert lines
    for line in lines:
        program, *argv = shlex.split(line)
        assert program == "spatialvla-jax" and line.startswith(f"spatialvla-jax {command}"), line
        args, rest = make_parser().parse_known_args(argv[: argv.index("--")] if "--" in argv else argv)
        overrides = cli.overrides_of(rest, allowed=hasattr(args, "config"))
        config = getattr(args, "config", None)
        if config and not config.startswith("sweeps/"):
            load_config(config, overrides)


def test_defaults_of_both_kinds() -> None:
    text = " ".join(COMMANDS["serve"].format_help().split())
    assert "observations per call of the policy, up to 32 (default: 32)" in text
    assert "(default: off)" in text and "(required)" in text
    assert "default: on" in COMMANDS["sweep"].format_help()


def test_alone_it_lists_the_commands_in_groups(capsys) -> None:
    assert main([]) == 0
    blocks = capsys.readouterr().out.split("\n\n")
    groups = {block.splitlines()[0]: block.split() for block in blocks}
    assert {"demo", "train", "sweep", "compile"} <= set(groups["train:"])
    assert {"data", "stats", "grid", "record"} <= set(groups["data:"])
    listed = {word for words in groups.values() for word in words}
    assert {command.split()[0] for command in COMMANDS} <= listed


@pytest.mark.parametrize(
    "argv", [[command] for command in ("train", "serve", "data", "data show", "grid", "convert", "record", "nonsense")]
)
def test_wrong_arguments_are_one_sentence(argv: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv[0].split())
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("spatialvla-jax")


def test_help_loads_no_library() -> None:
    code = (
        "import sys; from spatialvla_jax.cli import main; main([]); print('jax' in sys.modules, 'numpy' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.endswith("False False\n") and run.stderr == ""


@pytest.mark.parametrize(
    ("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")], ids=["SIGINT", "SIGTERM"]
)
def test_a_stopped_command_ends_with_one_line(number: int, word: str, tmp_path: Path, monkeypatch, capsys) -> None:
    def stopped(args: argparse.Namespace) -> None:
        with replacing(tmp_path / "out") as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), number)
            time.sleep(10)

    monkeypatch.setattr(cli.train, "run_train", stopped)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore SIGINT
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["train", "--config", "demo", "--workdir", str(tmp_path / "run")]) == 128 + number
    finally:
        signal.signal(signal.SIGINT, interrupt)
    assert capsys.readouterr().err == f"spatialvla-jax train: {word}\n"
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


BUSY = """
import os, signal, sys, threading
from pathlib import Path
from spatialvla_jax.utils import atomic, signals
signals.GRACE = 0.1
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore SIGINT
with signals.sigterm_raises("spatialvla-jax compile"), atomic.replacing(Path(sys.argv[1])) as temporary:
    temporary.mkdir()
    number = int(sys.argv[2])
    try:
        if number == signal.SIGTERM:
            os.kill(os.getpid(), number)
        else:  # all that happens while the main thread is in a library
            os.write(signal.set_wakeup_fd(-1), bytes([number]))
        threading.Event().wait(120)
    except signals.Terminated:
        threading.Event().wait(120)  # it does not end, as one that is compiling
"""


@pytest.mark.parametrize(("number", "word"), [(signal.SIGTERM, "terminated"), (signal.SIGINT, "interrupted")])
def test_a_busy_command_is_ended(number: int, word: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", BUSY, str(tmp_path / "out"), str(int(number))]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (128 + number, "", f"spatialvla-jax compile: {word}\n")
    assert not list(tmp_path.iterdir())


def test_a_run_that_has_its_own_handler_keeps_it() -> None:
    heard = []
    with sigterm_raises("train"):
        before = signal.signal(signal.SIGTERM, lambda *_: heard.append(True))
        os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGTERM, before)
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [True]
