"""The core runs where neither TensorFlow nor PyTorch nor a simulator is installed."""

import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import spatialvla_jax

CORE = [
    name
    for _, name, _ in pkgutil.walk_packages(spatialvla_jax.__path__, "spatialvla_jax.")
    if not name.startswith("spatialvla_jax.export.transformers.")
]
PROGRAM = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"tensorflow", "tensorflow_datasets", "torch", "libero", "robosuite", "mujoco"}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
for name in sys.argv[1:]:
    importlib.import_module(name)
from spatialvla_jax import Policy, convert, load_pretrained
"""


def test_core_imports_without_tensorflow_and_pytorch() -> None:
    assert {"spatialvla_jax.models.spatialvla", "spatialvla_jax.training.loop", "spatialvla_jax.cli"} <= set(CORE)
    done = subprocess.run([sys.executable, "-c", PROGRAM, *CORE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_is_cheap() -> None:
    program = "import sys, spatialvla_jax; assert not {'jax', 'numpy', 'orbax'} & sys.modules.keys()"
    program += "\nfrom spatialvla_jax import Policy, convert, load_pretrained; assert callable(convert)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_test_modules_do_not_import_each_other() -> None:
    modules = Path(__file__).parent.rglob("test_*.py")
    assert not [path for path in modules if re.search(r"^\s*(from|import) test_", path.read_text(), re.MULTILINE)]


def test_an_import_leaves_the_process_alone() -> None:
    """Loggers and hooks belong to the application; a training run silences them while it runs. PyTorch costs seconds
    and memory, and is often installed because checkpoints are converted."""
    program = """
import logging, sys
state = lambda: (sys.unraisablehook, *(logging.getLogger(n).level for n in ("absl", "asyncio")), "torch" in sys.modules)
import absl.logging
before = state()
import spatialvla_jax.training.loop
sys.exit(state() != before)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_the_import_contracts_hold() -> None:
    """Layers, and where TensorFlow, PyTorch and simulators may be imported: `[tool.importlinter]` in pyproject.toml."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
