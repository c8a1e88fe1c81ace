"""Compiled programs are kept on disk: the second process compiles nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from pathlib import Path

import pytest
import numpy as np
from spatialvla_jax import Policy
from spatialvla_jax.utils.compilation_cache import share_compilations

share_compilations(Path(sys.argv[2]))
image, depth = np.full((48, 64, 3), 90, np.uint8), np.ones((48, 64), np.float32)
print(Policy.load(sys.argv[1]).infer({"image": image, "depth": depth, "prompt": "pick up object 1"})["action_ids"])
"""


@pytest.mark.slow
def test_a_second_process_compiles_nothing(trained: Path, tmp_path: Path) -> None:
    env = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}

    def start() -> tuple[str, dict[str, int]]:
        """The process's output, and the programs afterwards: {name: time of writing}."""
        command = [sys.executable, "-c", PROGRAM, str(trained), str(tmp_path / "cache")]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout, {
            f.name: f.stat().st_mtime_ns for f in (tmp_path / "cache").iterdir() if "atime" not in f.name
        }

    answer, programs = start()
    assert any(name.startswith("jit_act") for name in programs), "the policy's own is among them"
    assert start() == (answer, programs)
