"""Eight simulated CPU devices for every test; a toy dataset and a config file on it for those that train."""

import gc
import os
import shutil
import tempfile
from collections.abc import Callable

# Most of the tests' time is compilation, so XLA does not optimise here. Its default schedule for CPUs does not order a
# loop's collectives and those outside the loop. Devices may reach them in different orders and wait for each other:
# with busy cores, about one run in twenty on four devices hung.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    " --xla_cpu_enable_concurrency_optimized_scheduler=false",
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A collective blocks its thread until every device joins, and a device may wait in several at once. By default, XLA has
# one thread per device on a machine of few cores, so the last device may find none left: a deadlock.
os.environ.setdefault("PJRT_NPROC", "32")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads would wait for each other: the models are tiny

from pathlib import Path

import pytest
from filelock import FileLock
from helpers import typecheck  # noqa: F401  (the hook finds it by name)
from helpers.toy_rlds import make_episodes, make_rlds
from hypothesis import settings
from jaxtyping import install_import_hook

gc.disable()  # while everything is imported, until `pytest_collection_finish`

# Checks annotations, shapes and dtypes included, wherever a test calls the package's functions.
install_import_hook("spatialvla_jax", "helpers.typecheck.check")

# The first example compiles, so a deadline per example would only measure that.
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
    """Share compiled programs between the tests and worker processes of this session only."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # otherwise a worker of the session that set it
        folder = tempfile.mkdtemp(prefix="compiled-")
        os.environ |= {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        jax.config.update("jax_compilation_cache_dir", folder)  # JAX read its environment when it was imported
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


# Start long files first, so that the last worker does not end with one of them.
LONGEST = ("training/test_distributed", "training/test_kills", "notebooks/", "planning/", "sweep/", "training/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        return next((n for n, name in enumerate(LONGEST) if name in item.nodeid), len(LONGEST))

    items.sort(key=rank)


def pytest_collection_finish() -> None:
    """Libraries and tests live until the end: exempt their millions of objects from garbage collection. Tracing makes
    as many short-lived objects, so collect less often than Python does by default."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """`shared(name, make)` → a path that lasts the whole session; the first worker to ask fills it with `make`."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def shared(name: str, make: Callable[[Path], None]) -> Path:
        path, made = root / "shared" / name, root / "shared" / f"{name}.made"
        made.parent.mkdir(exist_ok=True)
        with FileLock(root / "shared" / f"{name}.lock"):
            if not made.exists():
                make(path)
                made.touch()
        return path

    return shared


@pytest.fixture(scope="session")
def rlds(shared) -> Path:
    """One LIBERO-style dataset with 7 training and 2 validation episodes."""
    episodes = {"train": make_episodes(7), "val": make_episodes(2, seed=1)}
    return next(shared("rlds", lambda path: make_rlds(path, episodes)).glob("*/*"))


@pytest.fixture(scope="session")
def config_file(rlds: Path, shared) -> Path:
    """A config file that trains the smallest model on `rlds`."""

    def make(path: Path) -> None:
        path.write_text(CONFIG.format(path=str(rlds), cache=str(path.parent / "cache")))

    return shared("toy.py", make)


@pytest.fixture(scope="session")
def trained(config_file: Path, shared) -> Path:
    """A run of ten steps."""
    overrides = {"train.steps": "10", "mesh.fsdp": "4", "mesh.data": "2"}
    return shared("trained", lambda workdir: _train(config_file, overrides, workdir))


@pytest.fixture(scope="session")
def adapted(config_file: Path, trained: Path, shared) -> Path:
    """A six-step run of low-rank adapters on `trained`, whose spatial table was moved to a uniform grid."""
    overrides = {
        **{"init": str(trained), "grid.kind": "uniform", "adapt.embedding": "True", "lora.rank": "4"},
        **{"lora.alpha": "8", "optimizer.learning_rate": "5e-3", "optimizer.ema": "0.5", "mesh.fsdp": "4"},
        **{"mesh.data": "2", "train.steps": "6", "checkpoint.every": "3", "train.eval_every": "6"},
    }
    return shared("adapted", lambda workdir: _train(config_file, overrides, workdir))


def _train(config_file: Path, overrides: dict[str, str], workdir: Path) -> None:
    from spatialvla_jax.config import load_config
    from spatialvla_jax.training.loop import train

    train(load_config(config_file, overrides), workdir)


@pytest.fixture(scope="session")
def packed_config(config_file: Path, shared) -> Path:
    """The same on a packed file, which needs no TensorFlow."""
    from spatialvla_jax.config import load_config
    from spatialvla_jax.data import open_data
    from spatialvla_jax.data.pack import write_pack

    def make(path: Path) -> None:
        pack = path.with_name("toy.pack")
        write_pack(open_data(load_config(config_file)), pack, ("train", "val"))
        packed = f"    config.data.packed = {str(pack)!r}\n    return"
        path.write_text(config_file.read_text().replace("    return", packed))

    return shared("packed.py", make)


@pytest.fixture(scope="session")
def server(shared):
    """Starts training runs in separate processes."""
    from helpers.processes import Server

    server = Server(shared("compiled", Path.mkdir))
    yield server
    server.close()


@pytest.fixture(scope="session")
def _gcs_server():
    from helpers.buckets import start_gcs

    proxy, stop = start_gcs()
    yield proxy
    stop()


@pytest.fixture(scope="session")
def _s3_server():
    from helpers.buckets import start_s3

    proxy, stop = start_s3()
    yield proxy
    stop()


@pytest.fixture
def gcs(_gcs_server, monkeypatch: pytest.MonkeyPatch):
    """A fresh bucket on a Google Cloud Storage emulator. `gcs.url` is "gs://…"; set `gcs.proxy.faults` to inject
    faults. Retries do not wait."""
    from helpers.buckets import Bucket

    monkeypatch.setattr("spatialvla_jax.utils.retries.FIRST_WAIT", 0.001)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", _gcs_server.url)
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", _gcs_server.url)
    yield from Bucket.fresh("gs", _gcs_server)


@pytest.fixture
def s3(_s3_server, monkeypatch: pytest.MonkeyPatch):
    """Like `gcs`, on an S3 emulator."""
    from helpers.buckets import Bucket

    monkeypatch.setattr("spatialvla_jax.utils.retries.FIRST_WAIT", 0.001)
    monkeypatch.setenv("AWS_ENDPOINT_URL", _s3_server.url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield from Bucket.fresh("s3", _s3_server)


@pytest.fixture(params=["gs", "s3"])
def bucket(request: pytest.FixtureRequest):
    """Runs the test with `gcs`, then with `s3`."""
    return request.getfixturevalue({"gs": "gcs", "s3": "s3"}[request.param])
