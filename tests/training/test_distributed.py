"""Several processes on one machine, each with its own CPU devices, over loopback."""

import shutil
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
from helpers.processes import Run, Server

from spatialvla_jax.errors import InputError
from spatialvla_jax.training.metrics import read_metrics
from spatialvla_jax.utils.distributed import join

ARGUMENTS = ("--config.train.steps=24", "--config.train.eval_every=24", "--config.checkpoint.every=1000")


def start(server: Server, config: Path, workdir: Path, processes: int, *arguments: str, limit: int = 0) -> list[Run]:
    """A run on eight devices, perhaps with a limit on the size of the files that the last process writes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    together = ("--coordinator", coordinator, "--num-processes", str(processes), "--process-id")
    return [
        server.train(
            config,
            workdir,
            *ARGUMENTS,
            *arguments,
            *((*together, str(n)) if processes > 1 else ()),
            devices=8 // processes,
            file_limit=limit if n == processes - 1 else 0,
        )
        for n in range(processes)
    ]


def losses(workdir: Path, key: str = "loss") -> list[float]:
    path = workdir / "metrics.jsonl"
    return [r[key] for r in read_metrics(path) if key in r] if path.exists() else []


def test_two_processes_give_the_losses_of_one(server: Server, packed_config: Path, tmp_path: Path) -> None:
    """One of two is asked to end: both save the same step. The run goes on in one process, on a mesh of another shape,
    and in four."""
    (alone,) = start(server, packed_config, tmp_path / "alone", 1)
    assert alone.wait() == 0, alone.errors.read_text()
    two = start(server, packed_config, tmp_path / "two", 2)
    assert two[0].until(lambda: len(losses(tmp_path / "two")) >= 5), two[0].errors.read_text()
    two[1].send(signal.SIGTERM)
    assert [run.wait() for run in two] == [0, 0], two[0].errors.read_text() + two[1].errors.read_text()
    reached = len(losses(tmp_path / "two"))
    assert 5 <= reached < 24
    assert [p.name for p in (tmp_path / "two" / "checkpoints").iterdir()] == [str(reached)]
    shutil.copytree(tmp_path / "two", tmp_path / "four")
    other = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    for name, processes, mesh in (("two", 1, other), ("four", 4, ())):
        runs = start(server, packed_config, tmp_path / name, processes, *mesh)
        assert [run.wait(240) for run in runs] == [0] * processes, runs[0].errors.read_text()
        np.testing.assert_allclose(losses(tmp_path / name), losses(tmp_path / "alone"), atol=1e-5)
        np.testing.assert_allclose(
            losses(tmp_path / name, "val/loss"), losses(tmp_path / "alone", "val/loss"), atol=1e-5
        )
    assert len(losses(tmp_path / "alone")) == 24
    assert "train:" not in two[1].errors.read_text()  # the second one shows nothing


def test_a_dead_process_ends_the_others(server: Server, packed_config: Path, tmp_path: Path) -> None:
    runs = start(server, packed_config, tmp_path / "run", 2, "--heartbeat", "10")
    assert runs[0].until(lambda: len(losses(tmp_path / "run")) >= 2), runs[0].errors.read_text()
    runs[1].kill()
    assert runs[0].wait(60) not in (0, 2)
    errors = runs[0].errors.read_text()  # the collective or the missing heartbeat, whichever is noticed first
    assert "another process of the run died" in errors or "another task died" in errors


def test_storage_that_fails_on_one_host_ends_the_run(server: Server, packed_config: Path, tmp_path: Path) -> None:
    """The second of two cannot write its part of a checkpoint: one sentence, no hang, and exit codes after which the
    scripts in `launch/` start again."""
    workdir = tmp_path / "run"
    runs = start(server, packed_config, workdir, 2, "--heartbeat", "10", "--config.checkpoint.every=3", limit=60_000)
    assert runs[1].wait(240) == 1, runs[1].errors.read_text()
    sentence = runs[1].errors.read_text().splitlines()[-1]
    assert sentence.startswith(f"spatialvla-jax train: no checkpoint could be written to {workdir / 'checkpoints'} at")
    assert sentence.endswith(": File too large")
    assert runs[0].wait(60) not in (0, 2)
    assert not [p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]


def test_a_coordinator_alone_does_not_say_who_one_is() -> None:
    with pytest.raises(InputError, match="needs --num-processes and --process-id"):
        join("localhost:1", None, None, 10)
