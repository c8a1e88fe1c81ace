"""What a built distribution contains, and that it works without a clone."""

import os
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import spatialvla_jax
from spatialvla_jax.config import load_config
from spatialvla_jax.errors import InputError

ROOT = Path(__file__).parents[1]
BUILD_FILES = ("LICENSE", "README.md", "pyproject.toml", "requirements.txt", "setup.py")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a folder of links, because a build leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("configs", "data", "launch", "spatialvla_jax", *BUILD_FILES):
        (folder / name).symlink_to(ROOT / name)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, folder]
    subprocess.run(build, check=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_has_all_that_the_package_reads(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    patterns = ("configs/**/*.py", "launch/*", "data/libero_spatial_demo/**/*", "spatialvla_jax/**/*")
    files = [file.relative_to(ROOT) for pattern in patterns for file in ROOT.glob(pattern) if file.is_file()]
    inside = {file.as_posix().removeprefix("spatialvla_jax/") for file in files if "__pycache__" not in file.parts}
    assert len(inside) > 150 and {f"spatialvla_jax/{file}" for file in inside} <= names
    assert not any(name.startswith(("configs", "launch", "data", "tests")) for name in names)


def test_the_version_is_that_of_the_metadata() -> None:
    assert version("spatialvla-jax") == spatialvla_jax.__version__


def test_a_config_is_found_by_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = load_config("demo").to_dict()
    assert load_config("configs/demo.py").to_dict() == here
    monkeypatch.chdir(tmp_path)
    (path,) = [entry.pop("path") for entry in here["data"]["datasets"]]
    there = load_config("demo").to_dict()
    assert Path(there["data"]["datasets"][0].pop("path")).samefile(ROOT / path) and there == here
    with pytest.raises(InputError, match=r"file dmeo does not exist; the configs with a name are demo, .*sweeps/ego3d"):
        load_config("dmeo")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.py").write_text((ROOT / "configs/lora.py").read_text())
    assert load_config("mine").lora.rank == 32


@pytest.mark.slow
def test_an_installed_wheel_works_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel]
    subprocess.run(install, check=True)

    def run(*arguments: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=True).stdout

    command = ("-m", "spatialvla_jax")
    assert "demo" in run(*command, "--help")
    run(*command, "data", "show", "--config", "demo", "--config.data.cache_dir=cache", "--out", "page.html")
    assert "1 dataset with 20 episodes" in (empty / "page.html").read_text()
    sweep = ("sweep", "--config", "sweeps/grid_resolution", "--workdir", "out", "--dry-run")
    assert run(*command, *sweep).count("resolution-") == 8
    assert run(*command, *sweep, "--launcher", "slurm").count("srun") == 8
