import json

import numpy as np
import pytest
from PIL import Image

from spatialvla_jax.actions import (
    PRETRAIN_GAUSSIANS,
    fit_gaussians,
    gaussian_grid,
    grid_variables,
    linear_grid,
    pool_gaussians,
    uniform_grid,
)
from spatialvla_jax.actions.io import (
    compare_grids,
    describe_grid,
    quantisation_error,
    sample_actions,
    sample_gaussians,
    save_grid,
    table,
)
from spatialvla_jax.checkpoints.load import load_grid
from spatialvla_jax.cli import main
from spatialvla_jax.errors import InputError
from spatialvla_jax.training.grid_fit import fitted_datasets, make_grid

SMALL = (4, 4, 2, 4, 4, 4)


def same(a, b) -> bool:
    pairs = [(np.asarray(vars(a)[name]), np.asarray(vars(b)[name])) for name in vars(a)]
    return type(a) is type(b) and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


def test_make_grid():
    config = {"kind": "gaussian", "num_bins": SMALL, "min_sigma": 0.5}
    assert same(make_grid(config, lambda: PRETRAIN_GAUSSIANS), gaussian_grid(PRETRAIN_GAUSSIANS, SMALL, 0.5))
    never = lambda: pytest.fail("needs no Gaussians")  # noqa: E731
    assert same(make_grid(config | {"kind": "uniform"}, never), uniform_grid(SMALL))
    assert same(make_grid(config | {"kind": "linear"}, never), linear_grid())
    with pytest.raises(InputError, match=r"grid.kind is 'cubic'; choose gaussian, uniform, linear or checkpoint"):
        make_grid(config | {"kind": "cubic"}, never)


def test_fitted_datasets():
    assert fitted_datasets(["a", "jaco_play", "b"], ("jaco_play", "other")) == ["a", "b"]
    with pytest.raises(InputError, match=r"grid.exclude names every dataset \(a\).*--config.grid.exclude=\(\)"):
        fitted_datasets(["a"], ("a",))


def test_pooled_gaussians_are_those_of_all_actions():
    rng = np.random.default_rng(0)
    parts = [rng.uniform(-1, high, (count, 7)).astype(np.float32) for high, count in ((1, 500), (0, 30), (0.5, 1))]
    pooled = pool_gaussians([fit_gaussians(part) for part in parts], [len(part) for part in parts])
    np.testing.assert_allclose(pooled, fit_gaussians(np.concatenate(parts)), rtol=1e-12, atol=1e-14)


def test_samples_fill_bins_equally():
    """Compares rotations, which are never clipped; translations outside the cube are clipped to its faces."""
    grid = gaussian_grid(PRETRAIN_GAUSSIANS, SMALL, 0.5)
    actions = sample_actions(grid)
    values = grid_variables(actions)
    inside = (np.abs(actions[:, :3]) < 1).all(1)
    for i in (3, 4, 5):
        counts = np.histogram(values[:, i], np.asarray(grid.edges[i], np.float64))[0]
        np.testing.assert_allclose(counts / len(actions), 1 / SMALL[i], atol=0.01)
    assert 0.7 < inside.mean() < 1 and np.abs(actions[:, :3]).max() == 1
    assert set(actions[:, 6]) == {0, 1} and actions.dtype == np.float32
    levels = sample_actions(linear_grid())
    assert np.abs(levels[:, :6]).max() <= 1 and levels[:, :6].std() == pytest.approx(3**-0.5, abs=0.02)


def test_samples_of_gaussians():
    """Narrow Gaussians, which the ranges do not truncate."""
    narrow = np.asarray([(1.5, 0.2), (0.5, 0.3), (0.5, 0.1), (0.1, 0.1), (-0.2, 0.2), (0.0, 0.05)])
    np.testing.assert_allclose(fit_gaussians(sample_gaussians(narrow)), narrow, atol=0.005)
    still = narrow * [1, 0]
    np.testing.assert_allclose(fit_gaussians(sample_gaussians(still)), still, atol=1e-4)


def test_quantisation_error_by_hand():
    actions = np.zeros((70_000, 7), np.float32)  # more than one block
    actions[:, 3:6], actions[:, 6] = [0.5, -0.5, 0.25], 0.25
    grid = uniform_grid((1, 1, 1, 2, 2, 2))  # decodes to ±0.5, ±0.5, ±0.5 and a closed gripper
    error = quantisation_error(grid, actions)
    assert error["rotation"] == {"mean": pytest.approx(0.25), "max": pytest.approx(0.25)}
    assert error["gripper"] == {"mean": 0.25, "max": 0.25}
    # The one translation bin's centre: r = sqrt(3) / 2 along theta = pi / 2, phi = 0.
    assert error["translation"]["max"] == pytest.approx(3**0.5 / 2)
    actions[0, 3] = 1.0
    error = quantisation_error(grid, actions)["rotation"]
    assert error["max"] == pytest.approx(np.hypot(0.5, 0.25)) and error["mean"] < 0.2501


def test_compare():
    grids = {"fine": uniform_grid((16, 32, 8, 16, 16, 16)), "coarse": uniform_grid(SMALL), "linear": linear_grid()}
    rows = compare_grids(grids, sample_gaussians(PRETRAIN_GAUSSIANS))
    assert [row["vocab_size"] for row in rows] == [8194, 98, 256]
    assert [row["tokens_per_action"] for row in rows] == [3, 3, 7]
    means = [row["error"]["translation"]["mean"] for row in rows]
    assert means[1] > means[0] > means[2] > 0
    lines = table(rows).splitlines()
    assert len(lines) == 4 and "4×4×2×4×4×4" in lines[2] and f"{means[1]:.4f} / " in lines[2]
    assert describe_grid(linear_grid())["bins"] == (256,)


@pytest.mark.parametrize("grid", [gaussian_grid(PRETRAIN_GAUSSIANS, SMALL), linear_grid(7)])
def test_file_round_trip(tmp_path, grid):
    save_grid(tmp_path / "grid.json", grid)
    assert same(load_grid(tmp_path / "grid.json"), grid)
    assert [file.name for file in tmp_path.iterdir()] == ["grid.json"]


def test_bad_files(tmp_path):
    path = tmp_path / "grid.json"
    for text in ("no json", "[]", '{"kind": "spherical"}'):
        path.write_text(text)
        with pytest.raises(InputError, match=r"grid\.json holds no action grid"):
            load_grid(path)
    with pytest.raises(InputError, match=r"none\.json does not exist"):
        load_grid(tmp_path / "none.json")
    with pytest.raises(InputError, match=r"cannot be written"):
        save_grid(tmp_path / "none" / "grid.json", linear_grid())


def test_commands(config_file, trained, tmp_path, capsys):
    """`fit` gives the run's grid; `show` draws files, runs and baselines; `compare` ends with a line of JSON."""
    fitted, linear, stats = tmp_path / "fitted.json", tmp_path / "linear.json", tmp_path / "stats.json"
    config = ["--config", str(config_file)]
    assert main(["grid", "fit", *config, "--out", str(fitted)]) == 0
    assert f"wrote {fitted}: spherical, 4×4×2×4×4×4 bins, 98 tokens" in capsys.readouterr().out
    assert same(load_grid(fitted), load_grid(trained))
    assert main(["grid", "fit", *config, "--config.grid.kind=linear", "--out", str(linear)]) == 0

    gaussians = {name: [0.1, 0.2] for name in ("theta", "phi", "r", "roll", "pitch", "yaw")}
    part = {"num_transitions": 5}
    stats.write_text(json.dumps({"statistics": {"a": part}, "gaussians": {"a": gaussians}}))
    assert main(["grid", "fit", *config, "--stats", str(stats), "--out", str(tmp_path / "s.json")]) == 0
    assert same(load_grid(tmp_path / "s.json"), gaussian_grid([(0.1, 0.2)] * 6, SMALL, 0.5))

    for number, arguments in enumerate(([fitted], [trained, *config], [linear, "--stats", stats])):
        assert main(["grid", "show", *map(str, arguments), "--out", str(tmp_path / f"{number}.png")]) == 0
        with Image.open(tmp_path / f"{number}.png") as picture:
            assert picture.width > 1800 and len(set(picture.convert("L").tobytes())) > 50

    capsys.readouterr()
    assert main(["grid", "compare", str(fitted), str(linear), *config]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["actions"]["source"] == f"data of {config_file.name}" and len(lines) == 4
    assert [row["grid"] for row in result["grids"]] == [str(fitted), str(linear)]
    assert main(["grid", "compare", str(fitted)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["actions"]["count"] == 100_000
    assert main(["grid", "compare", str(fitted), "--config.seed=1"]) == 2
