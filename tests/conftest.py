"""Eight simulated CPU devices for every test; a toy dataset and a config file on it for those that train."""

import os
import shutil
import tempfile

# Most of the tests' time is compilation, so XLA does not optimise here.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from pathlib import Path

import pytest
from helpers.toy_rlds import make_episodes, make_rlds
from hypothesis import settings

# The first example compiles: a time limit for each would only measure that.
settings.register_profile("compiling", deadline=None)
settings.load_profile("compiling")

CONFIG = """
from spatialvla_jax.config import default_config


def get_config():
    config = default_config()
    config.model.update(preset="nano", depth_source="dataset", dtype="float32", remat="none")
    config.data.datasets = [{{"name": "toy", "spec": "libero", "path": {path!r}, "weight": 1.0}}]
    config.data.update(cache_dir={cache!r}, workers=1)
    config.data.prompt.length = 32
    config.grid.num_bins = (4, 4, 2, 4, 4, 4)
    config.optimizer.learning_rate = 1e-3
    config.train.update(steps=40, batch_size=8, log_every=1, eval_every=0)
    config.checkpoint.update(every=5, keep_last=2)
    return config
"""


def pytest_configure(config: pytest.Config) -> None:
    """What one test has compiled the others find, those in other processes too: of this session alone."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # else a worker process of the session that set it
        folder = tempfile.mkdtemp(prefix="compiled-")
        os.environ |= {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture(scope="session")
def rlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One LIBERO-style dataset: 7 training and 2 validation episodes."""
    return make_rlds(tmp_path_factory.mktemp("rlds"), {"train": make_episodes(7), "val": make_episodes(2, seed=1)})


@pytest.fixture(scope="session")
def config_file(rlds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config file that trains the smallest model on `rlds`."""
    folder = tmp_path_factory.mktemp("config")
    path = folder / "toy.py"
    path.write_text(CONFIG.format(path=str(rlds), cache=str(folder / "cache")))
    return path


@pytest.fixture(scope="session")
def trained(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps."""
    from spatialvla_jax.config import load_config
    from spatialvla_jax.training.loop import train

    workdir = tmp_path_factory.mktemp("trained")
    train(load_config(config_file, {"train.steps": "10", "mesh.fsdp": "4", "mesh.data": "2"}), workdir)
    return workdir


@pytest.fixture(scope="session")
def adapted(config_file: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps of low-rank adapters on `trained`, whose spatial table moved to a uniform grid."""
    from spatialvla_jax.config import load_config
    from spatialvla_jax.training.loop import train

    workdir = tmp_path_factory.mktemp("adapted")
    overrides = {
        **{"init": str(trained), "grid.kind": "uniform", "adapt.embedding": "True", "lora.rank": "4"},
        **{"lora.alpha": "8", "optimizer.learning_rate": "5e-3", "optimizer.ema": "0.5", "mesh.fsdp": "4"},
        **{"mesh.data": "2", "train.steps": "6", "checkpoint.every": "3", "train.eval_every": "6"},
    }
    train(load_config(config_file, overrides), workdir)
    return workdir


@pytest.fixture(scope="session")
def packed_config(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on a packed file, which needs no TensorFlow."""
    from spatialvla_jax.config import load_config
    from spatialvla_jax.data import open_data
    from spatialvla_jax.data.pack import write_pack

    folder, config = tmp_path_factory.mktemp("packed"), load_config(config_file)
    write_pack(open_data(config), folder / "toy.pack", config.data.to_dict(), ("train", "val"))
    text = config_file.read_text().replace(
        "    return", f"    config.data.packed = {str(folder / 'toy.pack')!r}\n    return"
    )
    (folder / "packed.py").write_text(text)
    return folder / "packed.py"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory):
    """Starts training runs in processes of their own."""
    from helpers.processes import Server

    server = Server(tmp_path_factory.mktemp("compiled"))
    yield server
    server.close()
