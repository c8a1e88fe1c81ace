"""Figures are complete PNG files and show the data they were given."""

import runpy
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from spatialvla_jax.actions import fit_gaussians, gaussian_grid, uniform_grid
from spatialvla_jax.reports.figures import grids, style, training


def read(path) -> np.ndarray:
    """The picture as int[height, width, 3]; fails if the file is not a complete PNG."""
    with Image.open(path, formats=["PNG"]) as image:
        return np.asarray(image.convert("RGB"), int)


def pixels(path, colour: str) -> int:
    """How many pixels of the picture have exactly this colour."""
    return int((np.abs(read(path) - np.round(np.array(to_rgb(colour)) * 255)).max(-1) <= 3).sum())


def actions_of(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    actions = rng.normal(0, 0.3, (n, 7)).clip(-1, 1).astype(np.float32)
    actions[:, 6] = np.arange(n) % 20 < 10
    return actions


def records(*keys: str) -> list[dict]:
    return [{"step": s, **{k: 1 / (1 + s) for k in keys if s % 5 == 0 or not k.startswith("val/")}} for s in range(50)]


def test_loss_curve_draws_each_series_it_is_given(tmp_path):
    path = tmp_path / "loss.png"
    training.loss_curve(path, records("loss", "accuracy/rotation"))
    assert pixels(path, style.BLUE) > 100 and pixels(path, style.GREEN) > 100
    assert pixels(path, style.RED) == pixels(path, style.ORANGE) == 0
    training.loss_curve(path, records("loss", "val/loss", "accuracy/gripper"))
    assert pixels(path, style.RED) > 100 and pixels(path, style.ORANGE) > 100
    assert pixels(path, style.GREEN) == 0
    assert min(read(path).shape[:2]) > 500
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]


@pytest.mark.parametrize("these", [[], [{"step": 1, "loss": 2.0}], [{"step": 1, "seconds": 2.0}]])
def test_loss_curve_of_hardly_any_records(tmp_path, these):
    training.loss_curve(tmp_path / "loss.png", these)
    assert (read(tmp_path / "loss.png") < 128).any()


def test_action_grid(tmp_path):
    actions = actions_of(2000)
    grids.action_grid(tmp_path / "fit.png", gaussian_grid(fit_gaussians(actions), (8, 16, 4, 8, 8, 8), 0), actions)
    grids.action_grid(tmp_path / "uniform.png", uniform_grid((8, 16, 4, 8, 8, 8)), actions)
    for name in ("fit.png", "uniform.png"):
        assert min(read(tmp_path / name).shape[:2]) > 900
        assert pixels(tmp_path / name, style.RED) > 500  # the fitted Gaussians
    grids.action_grid(tmp_path / "grid.png", uniform_grid((8, 16, 4, 8, 8, 8)), actions, "samples of it", fit=False)
    assert pixels(tmp_path / "grid.png", style.RED) < pixels(tmp_path / "fit.png", style.RED) / 4
    # The picture shows the grid: another grid over the same data gives another picture.
    assert (tmp_path / "fit.png").read_bytes() != (tmp_path / "uniform.png").read_bytes()


def test_action_grid_of_degenerate_data(tmp_path):
    """No motion at all, and one bin per variable."""
    still = np.zeros((10, 7), np.float32)
    grids.action_grid(tmp_path / "still.png", gaussian_grid(fit_gaussians(still), min_sigma=0), still)
    grids.action_grid(tmp_path / "one.png", uniform_grid((1,) * 6), still)
    for name in ("still.png", "one.png"):
        assert pixels(tmp_path / name, style.GREY) > 100  # the bin edges


@pytest.mark.parametrize("count", [1, 3])
def test_trajectories(tmp_path, count):
    episodes = [
        {"expert": actions_of(60, i), "predicted": actions_of(60, i + 9), "title": "pick up the bowl " * 3}
        for i in range(count)
    ]
    path = tmp_path / "paths.png"
    training.trajectories(path, episodes)
    assert read(path).shape == (750, 690 * count, 3)
    assert pixels(path, style.RED) > 500 * count and pixels(path, style.DARK) > 500 * count
    # No title, and a gripper that never moves.
    still = {"expert": np.zeros((5, 7)), "predicted": np.ones((7, 7))}
    training.trajectories(path, [still])
    assert pixels(path, style.RED) > 500


def test_quantisation_where_nothing_succeeds(tmp_path):
    """Then there are no steps per success to plot, neither for a grid nor as a horizontal line."""
    none = {"success": 0.0, "standard_error": 0.0, "steps": None}
    some = {"success": 0.5, "standard_error": 0.1, "steps": 80.0}
    draw = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks/quantisation.py"))["draw"]
    draw(tmp_path / "q.png", {"130": none, "386": some, "linear 256": none, "expert": some})
    assert pixels(tmp_path / "q.png", style.BLUE) > 50 and pixels(tmp_path / "q.png", style.GREEN) > 50


def test_a_failure_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "loss.png"
    training.loss_curve(path, records("loss"))
    before = path.read_bytes()
    with pytest.raises(ValueError):
        training.loss_curve(path, [{"step": 1, "loss": "not a number"}])
    assert path.read_bytes() == before


def test_no_global_state(tmp_path):
    before = dict(matplotlib.rcParams)
    training.loss_curve(tmp_path / "loss.png", records("loss"))
    assert dict(matplotlib.rcParams) == before
    script = "import sys, spatialvla_jax.reports.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
