"""What a start finds wrong before the first step, and where it resumes."""

import json
import os
import shutil
from pathlib import Path

import pytest
from helpers.toy_rlds import make_episodes, make_rlds
from ml_collections import ConfigDict

from spatialvla_jax.checkpoints import read_checkpoint
from spatialvla_jax.config import load_config, train_config_of
from spatialvla_jax.errors import InputError
from spatialvla_jax.training import loop
from spatialvla_jax.training.goodput import Clock, Goodput
from spatialvla_jax.training.log_folder import LogFolder
from spatialvla_jax.training.loop import train


def prepare(config: ConfigDict, workdir: Path) -> loop.Run:
    return loop.prepare(config, workdir, Goodput(LogFolder(workdir), Clock()))


def start_of(workdir: Path, **overrides: object) -> int:
    """The step from which the run in `workdir` would resume."""
    config = train_config_of(workdir)
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in overrides.items()})
    run = prepare(config, workdir)
    run.checkpoints.close()
    return run.start


@pytest.fixture
def run(adapted: Path, tmp_path: Path) -> Path:
    """A run with checkpoints of steps 3 and 6."""
    return Path(shutil.copytree(adapted, tmp_path / "run"))


def test_validation_is_checked_before_the_first_step(config_file: Path, tmp_path: Path) -> None:
    episodes = {"train": make_episodes(2), "val": make_episodes(1, seed=1)}
    for step in episodes["val"][0]:
        step["language_instruction"] = "pick up the cup " * 12
    data = make_rlds(tmp_path / "data", episodes)
    entry = {"name": "toy", "spec": "libero", "path": str(data), "weight": 1.0}
    overrides = {"data.datasets": repr([entry]), "train.eval_every": "3"}
    with pytest.raises(InputError, match=r"dataset 'toy', split 'val': The prompt .* needs .* more than the 32"):
        train(load_config(config_file, overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file, and a run needs a directory"):
        train(load_config(config_file), tmp_path / "file")


def test_another_config_may_begin_where_no_checkpoint_was_written(run: Path) -> None:
    with pytest.raises(InputError, match=r"holds a run with train.batch_size = 8, this config says 16"):
        start_of(run, train__batch_size=16)
    shutil.rmtree(run / "checkpoints" / "3")
    (run / "checkpoints" / "6" / "_CHECKPOINT_METADATA").unlink()
    with pytest.raises(InputError, match=r"no complete checkpoint: .*6/_CHECKPOINT_METADATA is missing or truncated"):
        read_checkpoint(run)
    assert start_of(run, train__batch_size=16) == 0
    assert json.loads((run / "config.json").read_text())["train"]["batch_size"] == 16


def test_a_run_goes_on_from_the_last_complete_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An interrupted copy lacks a directory or files of arrays, or truncates one; readers report it too. The last
    damage flips a bit of a number."""
    step = run / "checkpoints" / "6"
    shutil.copytree(step, run / "whole")
    shutil.rmtree(step / "params")
    assert {x.read().tobytes() for x in read_checkpoint(run).arrays.values()} == {
        x.read().tobytes() for x in read_checkpoint(run / "checkpoints" / "3").arrays.values()
    }
    assert f"{step} is incomplete, params/_METADATA is missing or truncated" in capsys.readouterr().err
    assert start_of(run) == 3 and not step.exists()
    assert f"moved to {run / 'incomplete_checkpoints' / '6'}" in capsys.readouterr().err
    shutil.copytree(run / "whole", step)
    for file, text in (("metadata/metadata", "{"), ("params/manifest.ocdbt", "")):
        kept = (step / file).read_bytes()
        (step / file).write_text(text)
        read_checkpoint(run)
        assert (
            f"{step} is incomplete, {file} is missing or truncated: reading {run / 'checkpoints' / '3'}"
            in capsys.readouterr().err
        )
        (step / file).write_bytes(kept)
    shutil.rmtree(step)

    def flip_a_bit(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    for damage in (Path.unlink, lambda file: os.truncate(file, file.stat().st_size // 2), flip_a_bit):
        shutil.copytree(run / "whole", step)
        for file in (step / "optimizer").rglob("d/*"):
            damage(file)
        assert start_of(run) == 3 and not step.exists()
        assert "its files are damaged" in capsys.readouterr().err
    assert sorted(path.name for path in (run / "incomplete_checkpoints").iterdir()) == ["6", "6-2", "6-3", "6-4"]


def test_a_config_that_cannot_be_read_is_taken_from_the_checkpoint(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = train_config_of(run)
    whole = (run / "config.json").read_text()
    (run / "config.json").write_text(whole[:40])
    prepared = prepare(config, run)
    prepared.checkpoints.close()
    assert prepared.start == 6 and (run / "config.json").read_text() == whole
    assert "config.json cannot be read" in capsys.readouterr().err


def test_the_model_is_that_of_init(config_file: Path, trained: Path, tmp_path: Path) -> None:
    """A config that leaves preset and depth at their defaults takes both from the checkpoint."""
    model = "config.model.update(preset="
    text = "".join(line for line in config_file.read_text().splitlines(True) if model not in line)
    assert "preset" not in text
    (tmp_path / "plain.py").write_text(text)
    overrides = {"init": str(trained), "grid.kind": "checkpoint", "lora.rank": "2"}
    config = load_config(tmp_path / "plain.py", overrides)
    assert config.model.preset == "spatialvla-4b-224"
    prepared = prepare(config, tmp_path / "run")
    prepared.checkpoints.close()
    assert prepared.setup.preset == "nano"
    assert prepared.setup.model.config.depth_source == read_checkpoint(trained).config.depth_source
    assert train_config_of_file(tmp_path / "run")["preset"] == "nano"
    for key, value, has in (
        ("preset", "tiny", "nano"),
        ("image_size", 84, 56),
        ("depth_source", "none", prepared.setup.model.config.depth_source),
    ):
        other = load_config(tmp_path / "plain.py", overrides | {f"model.{key}": str(value)})
        with pytest.raises(InputError, match=f"model.{key} is {value!r}, and the model in {trained} has {has!r}"):
            prepare(other, tmp_path / "other")


def train_config_of_file(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())["model"]


def test_moved_data_is_the_same_data(trained: Path, rlds: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    moved = shutil.copytree(rlds, tmp_path / "moved" / "1.0.0")
    (entry,) = train_config_of(run).data.datasets
    assert start_of(run, data__datasets=[dict(entry) | {"path": str(moved)}]) == 10
    with pytest.raises(InputError, match=r"holds a run with data.datasets = .*'weight': 1.0"):
        start_of(run, data__datasets=[dict(entry) | {"path": str(moved), "weight": 2.0}])
