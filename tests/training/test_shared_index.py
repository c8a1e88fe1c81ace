"""The processes of a run share the work of making one index, each from its own shards."""

import signal
from pathlib import Path

import numpy as np
import pytest
from helpers.indexes import load_index
from helpers.processes import Run, Server, free_port, records

from spatialvla_jax.data.oxe import CATALOGUE


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.glob("toy-train-*/*")}


@pytest.mark.slow
def test_two_processes_index_train_and_go_on_as_one(server: Server, config_file: Path, rlds: Path, tmp_path: Path):
    """2 × 4 devices with a disk for each process: both end with the index that a single process makes. After a kill,
    the run resumes as 1 × 8 from the second one's copy without indexing. Its losses equal those of a run that always
    had one process."""
    common = ("--config.train.steps=10", "--config.checkpoint.every=4", "--config.mesh.fsdp=4", "--config.mesh.data=2")

    def start(name: str, cache: str, devices: int, *arguments: str) -> Run:
        own = (*common, f"--config.data.cache_dir={tmp_path / cache}", *arguments)
        return server.train(config_file, tmp_path / name, *own, devices=devices, errors=tmp_path / f"{name}-{cache}")

    def losses(name: str) -> list[float]:
        return [record["loss"] for record in records(tmp_path / name) if "loss" in record]

    joined = ("--coordinator", f"localhost:{free_port()}", "--num-processes", "2", "--process-id")
    runs = [start("run", str(number), 4, *joined, str(number)) for number in range(2)]
    assert runs[0].until(lambda: len(losses("run")) >= 6), runs[0].errors.read_text()
    for run in runs:
        run.send(signal.SIGKILL)
        run.wait()
    load_index("toy", rlds, CATALOGUE["libero"], "train", tmp_path / "expected")
    assert files(tmp_path / "0") == files(tmp_path / "1") == files(tmp_path / "expected") != {}
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "1").glob("*/*")}
    for name, cache in (("run", "1"), ("alone", "alone")):
        run = start(name, cache, 8)
        assert run.wait() == 0, run.errors.read_text()
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "1").glob("*/*")}
    assert len(losses("alone")) == 10
    np.testing.assert_allclose(losses("run")[-10:], losses("alone"), atol=1e-5)
