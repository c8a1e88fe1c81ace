"""Two processes with their workdir in a bucket: killed and resumed, rehearsed, and rewound by a loss spike."""

import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers.batches import assert_equal
from helpers.processes import LOGGED, Run, Server, free_port, records

from spatialvla_jax.checkpoints import load_pretrained
from spatialvla_jax.checkpoints.orbax import read_metadata, step_directory
from spatialvla_jax.utils import storage
from spatialvla_jax.utils.storage import AnyPath

pytestmark = pytest.mark.slow

MESH = ("--config.mesh.fsdp=2", "--config.mesh.data=2")


def start(
    server: Server, config: Path, workdir: AnyPath, errors: Path, processes: int, *arguments: str, pause: int = 0
) -> list[Run]:
    """A run on four devices. The first process stops itself before it logs step `pause`, if not 0."""
    if processes > 1:
        arguments += ("--coordinator", f"localhost:{free_port()}", "--num-processes", str(processes))
    return [
        server.train(
            config,
            workdir,
            *(*MESH, *arguments, *(("--process-id", str(n)) if processes > 1 else ())),
            devices=4 // processes,
            errors=errors.with_name(f"{errors.name}-{n}"),
            pause=(LOGGED, pause) if pause and n == 0 else None,
        )
        for n in range(processes)
    ]


def finish(runs: Sequence[Run]) -> str:
    """→ the first process's output."""
    assert [run.wait() for run in runs] == [0] * len(runs), "\n".join(run.errors.read_text() for run in runs)
    return runs[0].errors.read_text()


def test_killed_and_resumed(gcs, server: Server, packed_config: Path, tmp_path: Path) -> None:
    """SIGKILL of both after a checkpoint. Two processes resume; the bits equal those of a run of two on a disk."""
    arguments = ("--config.train.steps=12", "--config.checkpoint.every=3")
    finish(start(server, packed_config, tmp_path / "run", tmp_path / "undisturbed", 2, *arguments))
    workdir = storage.as_path(f"{gcs.url}/run", "--workdir")
    gcs.proxy.add(status=503, every=30)
    runs = start(server, packed_config, workdir, tmp_path / "killed", 2, *arguments, pause=7)
    assert runs[0].until(runs[0].paused) and step_directory(workdir) is not None, runs[0].errors.read_text()
    for run in runs:
        run.send(signal.SIGKILL)
        run.wait()
    assert not storage.is_file(workdir / "finished")
    finish(start(server, packed_config, workdir, tmp_path / "resumed", 2, *arguments))
    assert records(workdir) == records(tmp_path / "run")
    assert_equal(load_pretrained(workdir)[1], load_pretrained(tmp_path / "run")[1])


def test_a_rehearsal(gcs, server: Server, packed_config: Path, tmp_path: Path) -> None:
    """With one process and with two: nothing is left in the bucket."""
    for processes in (1, 2):
        arguments = ("--config.train.steps=10", "--rehearse", "4")
        runs = start(
            server,
            packed_config,
            storage.as_path(f"{gcs.url}/run", ""),
            tmp_path / str(processes),
            processes,
            *arguments,
        )
        codes = [run.wait() for run in runs]
        printed = [run.errors.read_text() for run in runs]
        assert len(set(codes)) == 1 and codes[0] in (0, 1), printed
        assert "the same bits" in printed[0] and printed[0].splitlines()[-1].startswith(
            "go" if codes[0] == 0 else "no-go"
        )
        assert not storage.list_tree(storage.to_path(gcs.url))


def test_a_loss_spike(server: Server, packed_config: Path, tmp_path: Path) -> None:
    """Both processes rewind to the same step and continue with the same batches, as one process does."""
    arguments = ("--config.train.steps=14", "--config.checkpoint.every=2", "--config.optimizer.learning_rate=0.02")
    arguments += tuple(f"--config.train.spikes.{key}" for key in ("factor=1.07", "window=2", "rewind=2"))
    for processes in (1, 2):
        finish(start(server, packed_config, tmp_path / f"{processes}", tmp_path / "errors", processes, *arguments))
    one, two = (tmp_path / str(processes) for processes in (1, 2))
    spikes = [read_metadata(step)["spikes"]["spikes"] for step in map(step_directory, (one, two)) if step]
    places = [[(spike["step"], spike["rewound_to"]) for spike in found] for found in spikes]
    assert places[0] == places[1] != []
    np.testing.assert_allclose(*([r["loss"] for r in records(run)] for run in (one, two)), atol=1e-5)
