"""Several processes on one machine, each with its own CPU devices, over loopback."""

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from helpers.processes import LOGGED, Run, Server, free_port, records

from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.distributed import join

STEPS = 16
ARGUMENTS = (f"--config.train.steps={STEPS}", f"--config.train.eval_every={STEPS}", "--config.checkpoint.every=1000")
OTHER_MESH = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2")


def start(
    server: Server, config: Path, workdir: Path, processes: int, *arguments: str, limit: int = 0, pause: int = 0
) -> list[Run]:
    """A run on four devices, optionally with a limit on the size of files that the last process writes. The first
    process stops itself before it logs step `pause`, if not 0."""
    common = (*ARGUMENTS, *arguments)
    if processes == 1:
        return [server.train(config, workdir, *common, devices=4, file_limit=limit)]
    common += ("--coordinator", f"localhost:{free_port()}", "--num-processes", str(processes), "--process-id")
    limits, devices = [0] * (processes - 1) + [limit], 4 // processes
    pauses = [(LOGGED, pause) if pause else None] + [None] * (processes - 1)
    return [
        server.train(config, workdir, *common, str(n), devices=devices, file_limit=limits[n], pause=pauses[n])
        for n in range(processes)
    ]


def losses(workdir: Path, key: str = "loss") -> list[float]:
    return [r[key] for r in records(workdir) if key in r]


@pytest.fixture(scope="module")
def alone(server: Server, packed_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run in one process, on another mesh than the multi-process runs."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    (run,) = start(server, packed_config, workdir, 1, *OTHER_MESH)
    assert run.wait() == 0, run.errors.read_text()
    assert len(losses(workdir)) == STEPS
    return workdir


@pytest.fixture(scope="module")
def stopped(server: Server, packed_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In a run of two processes, one was asked to end: both saved the same step."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    runs = start(server, packed_config, workdir, 2, pause=5)
    assert runs[0].until(runs[0].paused), runs[0].errors.read_text()
    runs[1].send(signal.SIGTERM)
    # JAX checks for signals once a second.
    assert runs[1].until(lambda: "SIGTERM caught" in runs[1].errors.read_text()), runs[1].errors.read_text()
    runs[0].send(signal.SIGCONT)
    assert [run.wait() for run in runs] == [0, 0], runs[0].errors.read_text() + runs[1].errors.read_text()
    assert 5 <= len(losses(workdir)) < STEPS
    assert [p.name for p in (workdir / "checkpoints").iterdir()] == [str(len(losses(workdir)))]
    assert "train:" not in runs[1].errors.read_text()  # only the first process shows its progress
    return workdir


@pytest.mark.parametrize("processes, mesh", [(1, OTHER_MESH), pytest.param(4, (), marks=pytest.mark.slow)])
def test_two_processes_give_the_losses_of_one(
    processes: int, mesh: tuple[str, ...], server, packed_config: Path, alone: Path, stopped: Path, tmp_path: Path
) -> None:
    """A run of two processes resumes in one, on a mesh of another shape, and in four."""
    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    runs = start(server, packed_config, workdir, processes, *mesh)
    assert [run.wait() for run in runs] == [0] * processes, runs[0].errors.read_text()
    for key in ("loss", "val/loss"):
        np.testing.assert_allclose(losses(workdir, key), losses(alone, key), atol=1e-5)


@pytest.mark.slow
def test_a_dead_process_ends_the_others(server: Server, packed_config: Path, tmp_path: Path) -> None:
    runs = start(server, packed_config, tmp_path / "run", 2, "--heartbeat", "10", pause=3)
    assert runs[0].until(runs[0].paused), runs[0].errors.read_text()
    runs[1].kill()
    runs[0].send(signal.SIGCONT)
    assert runs[0].wait(60) not in (0, 2)
    errors = runs[0].errors.read_text()  # the collective or the missing heartbeat, whichever is noticed first
    assert "another process of the run died" in errors or "another task died" in errors


@pytest.mark.slow
def test_storage_that_fails_on_one_host_ends_the_run(server: Server, packed_config: Path, tmp_path: Path) -> None:
    """The second of two processes cannot write its part of a checkpoint. There is one sentence, no hang, and exit codes
    after which the scripts in `launch/` restart the run."""
    workdir = tmp_path / "run"
    runs = start(server, packed_config, workdir, 2, "--heartbeat", "10", "--config.checkpoint.every=3", limit=15_000)
    assert runs[1].wait(240) == 1, runs[1].errors.read_text()
    sentence = runs[1].errors.read_text().splitlines()[-1]
    assert sentence.startswith(f"spatialvla-jax train: no checkpoint could be written to {workdir / 'checkpoints'} at")
    assert sentence.endswith(": File too large")
    assert runs[0].wait(60) not in (0, 2)
    assert not [p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]


def test_a_coordinator_alone_does_not_say_who_one_is() -> None:
    with pytest.raises(InputError, match="needs --num-processes and --process-id"):
        join("localhost:1", None, None, 10)
