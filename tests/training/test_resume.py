"""Killed with SIGKILL at any moment and started again, a run ends in the same bits and has seen the same batches."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from spatialvla_jax.checkpoints import load_pretrained
from spatialvla_jax.training.metrics import read_metrics


def start(config_file: Path, workdir: Path, cache: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "spatialvla_jax.cli", "train", "--config", config_file, "--workdir", workdir]
    command.append("--config.train.steps=120")
    env = os.environ | {"XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    return subprocess.Popen([*map(str, command)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def kill_when(process: subprocess.Popen, moment: Callable[[], bool]) -> bool:
    """SIGKILL at the moment; False if the run ended before."""
    while process.poll() is None:
        if moment():
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return True
        time.sleep(0.001)
    finish(process)
    return False


def logged(workdir: Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


def last_step(workdir: Path) -> int:
    return max((record["step"] for record in logged(workdir)), default=0)


def test_killed_runs_end_in_the_same_bits(config_file: Path, tmp_path: Path) -> None:
    undisturbed, disturbed, cache = tmp_path / "undisturbed", tmp_path / "disturbed", tmp_path / "compiled"
    finish(start(config_file, undisturbed, cache))

    steps = sorted(random.Random(time.time_ns()).sample(range(1, 100), 3))  # other steps every time
    kills = []
    for step in steps:
        process = start(config_file, disturbed, cache)
        kills += [kill_when(process, lambda step=step: last_step(disturbed) >= step)]
    # And once in the middle of a save.
    unfinished = lambda: any("tmp" in p.name for p in (disturbed / "checkpoints").glob("*"))  # noqa: E731
    kills += [kill_when(start(config_file, disturbed, cache), unfinished)]
    assert all(kills), f"of the kills at steps {steps} and during a save, these came before the end: {kills}"
    finish(start(config_file, disturbed, cache))

    assert logged(disturbed) == logged(undisturbed), f"killed at {steps}"  # losses, and the fingerprint of every batch
    a, b = (load_pretrained(run)[1] for run in (disturbed, undisturbed))
    same = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    assert all(jax.tree.leaves(same)), f"killed at {steps}"
