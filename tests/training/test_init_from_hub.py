"""Runs that start from a Hugging Face Hub id resume from the same commit, even if the branch has moved."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")
from helpers.hub_server import hub_server  # noqa: F401
from huggingface_hub import constants

from spatialvla_jax.checkpoints import hub, read_checkpoint, write_huggingface
from spatialvla_jax.checkpoints.orbax import read_metadata, step_directory
from spatialvla_jax.cli import main
from spatialvla_jax.config import load_config
from spatialvla_jax.errors import InputError
from spatialvla_jax.training.init_from import pin_init


@pytest.fixture
def server(hub_server, monkeypatch):  # noqa: F811
    monkeypatch.setattr(hub, "_known_complete", set())
    return hub_server


@pytest.fixture
def commit(server, trained: Path, tmp_path: Path) -> str:
    write_huggingface(tmp_path / "published", read_checkpoint(trained))
    return server.commit("org/name", tmp_path / "published")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_goes_on_from_the_commit_that_it_began_with(
    server, commit: str, config_file: Path, tmp_path: Path, rank: int
) -> None:
    """Adapters find their base again on a machine with an empty cache too."""
    command = ["train", "--config", str(config_file), "--workdir", str(tmp_path / "run"), "--config.init=org/name"]
    command += [f"--config.lora.rank={rank}", "--config.checkpoint.every=1", "--config.train.eval_every=0"]
    command += ["--config.train.steps=2"]
    assert main(command) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["init"] == f"org/name@{commit}"
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")  # as if it had been killed after its first step
    (tmp_path / "run" / "finished").unlink()
    shutil.rmtree(constants.HF_HUB_CACHE)
    hub._known_complete.clear()
    server.commit("org/name", {"config.json": b"{}", "model.safetensors": b""})
    assert main(command) == 0
    step = step_directory(tmp_path / "run")
    assert step is not None and step.name == "2"
    if rank:
        assert read_metadata(step)["lora"]["base"]["path"] == f"org/name@{commit}"
        assert read_checkpoint(step).processor is not None


def test_what_a_run_that_goes_on_asks_for(server, commit: str, config_file: Path) -> None:
    """The branch means the commit that the run started from; naming another commit is still a difference."""
    began = {"init": "org/name@" + "0" * 40}
    named = {
        text: load_config(config_file, {"init": text}) for text in ("org/name", "org/name@main", f"org/name@{commit}")
    }
    assert [pin_init(config, {}).init for config in named.values()] == [f"org/name@{commit}"] * 3
    asked = len(server.requests)
    assert pin_init(named["org/name"], began).init == pin_init(named["org/name@main"], began).init == began["init"]
    assert len(server.requests) == asked
    assert pin_init(named[f"org/name@{commit}"], began).init == f"org/name@{commit}"
    with pytest.raises(InputError, match=r"^org/gone does not exist locally"):
        pin_init(load_config(config_file, {"init": "org/gone"}), {})
