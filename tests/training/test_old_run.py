"""A run from before the present names of config keys and model fields resumes and loads; its export does too."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.batches import observation

from spatialvla_jax.checkpoints.orbax import parse_metadata, read_metadata
from spatialvla_jax.config import load_config, train_config_of
from spatialvla_jax.inference.policy import Policy
from spatialvla_jax.training.changes import CHANGES, describe_changes
from spatialvla_jax.training.init_from import with_grid_of_run
from spatialvla_jax.training.loop import train
from spatialvla_jax.training.metrics import read_metrics

GOLDEN = Path(__file__).parents[1] / "golden" / "old_run"
# The keys under their old names, and a mesh of these tests' eight devices.
FLAGS = {
    **{"train.steps": "6", "train.accumulate": "2", "optimizer.state_dtype": "bfloat16", "optimizer.clip": "0.7"},
    **{"optimizer.ema": "0.5", "checkpoint.every": "3", "checkpoint.keep_last": "1", "train.batch_size": "8"},
    **{"mesh.data": "4", "mesh.fsdp": "1", "mesh.tensor": "2"},
}


@pytest.fixture
def old(rlds: Path, tmp_path: Path) -> Path:
    """A copy with its placeholders replaced by paths of these tests: {run, export, toy.py, continuation.jsonl}."""
    folder = shutil.copytree(GOLDEN, tmp_path / "old")
    for path in (folder / "toy.py", folder / "run" / "config.json", *folder.rglob("metadata/metadata")):
        path.write_text(path.read_text().replace("RLDS", str(rlds)).replace("CACHE", str(tmp_path / "cache")))
    return folder


def test_it_goes_on_as_it_would_have(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The config file and flags use the old names. Steps 4 to 6 equal those of the old code, except where the run says
    that they differ."""
    train(load_config(old / "toy.py", FLAGS), old / "run")
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "earlier version" in line]
    assert str(old / "run") in warning and all(change in warning for change in CHANGES)
    assert read_metadata(old / "run" / "checkpoints" / "6")["changes"] == len(CHANGES)
    assert describe_changes(len(CHANGES)) == "" and CHANGES[0] not in describe_changes(1)
    expected = read_metrics(old / "continuation.jsonl")
    records = read_metrics(old / "run" / "metrics.jsonl")[3:]
    assert [r["batch"] for r in records] == [r["batch"] for r in expected]
    assert [r["step"] for r in records] == [4, 5, 6]
    for record, then in zip(records, expected, strict=True):
        for key in ("loss", "gradient_norm", "update_norm", "learning_rate"):
            np.testing.assert_allclose(record[key], then[key], rtol=1e-4, err_msg=key)


@pytest.mark.parametrize(("moved", "kept"), [(1e-7, True), (1e-3, False)])
def test_a_run_keeps_its_grid_where_another_cpu_fits_other_last_bits(old: Path, moved: float, kept: bool) -> None:
    step = old / "run" / "checkpoints" / "3"
    _, processor = parse_metadata(step, read_metadata(step))
    assert processor is not None
    fitted = replace(processor, grid=jax.tree.map(lambda edges: edges + np.float32(moved), processor.grid))
    grid = with_grid_of_run(fitted, processor).grid
    for now, own in zip(jax.tree.leaves(grid), jax.tree.leaves(processor.grid), strict=True):
        assert np.array_equal(now, own) == kept
    assert with_grid_of_run(fitted, None) is fitted


def test_run_and_export_act_alike(old: Path) -> None:
    run, export = (Policy.load(old / name).infer(observation()) for name in ("run", "export"))
    assert run["actions"].shape == (4, 7)
    np.testing.assert_array_equal(run["action_ids"], export["action_ids"])
    np.testing.assert_array_equal(run["actions"], export["actions"])


def test_its_config_has_the_present_names(old: Path) -> None:
    saved = json.loads((old / "run" / "config.json").read_text())
    assert saved["train"]["accumulate"] == 2 and saved["model"]["depth"] == "dataset"
    config = train_config_of(old / "run")
    assert (config.train.grad_accum_steps, config.optimizer.mu_dtype) == (2, "bfloat16")
    assert (config.optimizer.grad_clip_norm, config.model.depth_source) == (0.7, "dataset")
    assert "accumulate" not in config.train and "depth" not in config.model
