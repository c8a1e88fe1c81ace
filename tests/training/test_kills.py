"""Killed at random moments, asked to end, or out of disk: nothing is lost, and the run ends in the same bits."""

import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.batches import assert_equal
from helpers.processes import LOGGED, Run, Server, records

from spatialvla_jax.checkpoints import load_pretrained
from spatialvla_jax.checkpoints.orbax import step_directory

STEPS = 30
LOOP = "spatialvla_jax.training.loop"
MESH = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2")  # all runs here, on four devices


@pytest.fixture(scope="module")
def undisturbed(server: Server, packed_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(server, packed_config, workdir)
    return workdir


def start(server: Server, config: Path, workdir: Path, *arguments: str, steps: int = STEPS, **options: Any) -> Run:
    arguments = (f"--config.train.steps={steps}", *MESH, *arguments)
    return server.train(config, workdir, *arguments, devices=4, **options)


def finish(server: Server, config: Path, workdir: Path, steps: int = STEPS) -> None:
    run = start(server, config, workdir, steps=steps)
    assert run.wait() == 0, run.errors.read_text()  # the first one compiles
    assert (workdir / "finished").exists()


def last_step(workdir: Path) -> int:
    return max((r["step"] for r in records(workdir)), default=0)


def assert_same(a: Path, b: Path) -> None:
    assert records(a) == records(b)
    assert_equal(load_pretrained(a)[1], load_pretrained(b)[1])


def saving(workdir: Path) -> bool:
    return any("tmp" in path.name for path in (workdir / "checkpoints").glob("*"))


def saved(workdir: Path) -> int:
    step = step_directory(workdir)
    return int(step.name) if step else 0


@pytest.mark.slow
def test_killed_in_every_phase(server: Server, packed_config: Path, undisturbed: Path, tmp_path: Path) -> None:
    """SIGKILL during start-up, before the first step, between two saves, during a save, after one, and at the end."""
    workdir = tmp_path / "run"
    moments = (
        (f"{LOOP}:init_state", 1, workdir.exists),
        (f"{LOOP}:jit_train_step", 1, (workdir / "config.json").exists),
        (LOGGED, 9, lambda: last_step(workdir) == 8),
        ("orbax.checkpoint._src.path.atomicity:AtomicRenameTemporaryPath.finalize", 1, lambda: saving(workdir)),
        (LOGGED, 12, lambda: saved(workdir) >= 5),
        (f"{LOOP}:write_json", 3, lambda: saved(workdir) == STEPS and not (workdir / "finished").exists()),
    )
    for name, number, reached in moments:
        run = start(server, packed_config, workdir, pause=(name, number))
        assert run.until(run.paused) and reached(), f"{name}: {run.errors.read_text()}"
        run.kill()
    finish(server, packed_config, workdir)
    assert_same(workdir, undisturbed)


@pytest.mark.slow
def test_killed_twenty_times(server: Server, packed_config: Path, tmp_path: Path) -> None:
    """SIGKILL during start-up and at random moments of later steps; one step in five is a save."""
    chance, workdir = random.Random(0), tmp_path / "run"
    for n in range(20):
        if (workdir / "finished").exists():  # on a fast machine, or on a slow one that killed it late
            shutil.rmtree(workdir)
        reached = last_step(workdir) if n % 2 else -1
        run = start(server, packed_config, workdir, steps=40)
        run.until(lambda reached=reached: last_step(workdir) > reached)
        time.sleep(chance.uniform(0, 0.5 if n % 2 else 4))
        if run.poll() is not None:  # it may have ended meanwhile, but without an error
            assert run.poll() == 0, run.errors.read_text()
        else:
            run.kill()
    for folder in (workdir, tmp_path / "undisturbed"):
        finish(server, packed_config, folder, 40)
    assert_same(workdir, tmp_path / "undisturbed")


@pytest.mark.slow
def test_sigterm_and_then_a_full_disk(server: Server, packed_config: Path, undisturbed: Path, tmp_path: Path) -> None:
    """SIGTERM saves the last step. Then no file can grow large enough for a checkpoint: four retries, one sentence, and
    the earlier checkpoints stay. The limit lies between the run's logs, 24 kB, and Orbax's description of the
    optimizer, 36 kB; how large its data files are depends on which writes it joins."""
    workdir = tmp_path / "run"
    run = start(server, packed_config, workdir, "--config.checkpoint.every=1000", pause=(LOGGED, 8))
    assert run.until(run.paused)
    run.send(signal.SIGTERM)
    run.send(signal.SIGCONT)
    assert run.wait() == 0
    step = saved(workdir)
    assert 8 <= step == last_step(workdir) < STEPS
    assert f"to step {step} of {STEPS}: rerun the same command to resume" in run.errors.read_text()
    assert not (workdir / "finished").exists()

    run = start(server, packed_config, workdir, file_limit=35_000)
    assert run.wait() == 1
    errors = run.errors.read_text()
    assert errors.count("; trying again") == 4
    (sentence,) = (line for line in errors.splitlines() if line.startswith("spatialvla-jax train: "))
    assert f"no checkpoint could be written to {workdir / 'checkpoints'} at step" in sentence
    assert "File too large" in sentence and sentence.endswith(f"the last good one is from step {step}")
    finish(server, packed_config, workdir)
    assert_same(workdir, undisturbed)


def test_sigterm_before_the_first_step(server: Server, packed_config: Path, tmp_path: Path) -> None:
    """While it opens its data and initialises its state there is nothing to save."""
    workdir = tmp_path / "run"
    run = start(server, packed_config, workdir, pause=(f"{LOOP}:init_state", 1))
    assert run.until(run.paused) and workdir.exists()
    run.send(signal.SIGTERM)
    run.send(signal.SIGCONT)
    assert run.wait() == 0
    assert f"to step 0 of {STEPS}: rerun the same command to resume" in run.errors.read_text()
    assert not records(workdir) and step_directory(workdir) is None and not (workdir / "finished").exists()
