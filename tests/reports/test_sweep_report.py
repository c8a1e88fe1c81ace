"""The report's numbers by hand, and a page that needs nothing else."""

import csv
import json
import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from spatialvla_jax.actions import fit_gaussians, gaussian_grid, linear_grid, uniform_grid
from spatialvla_jax.actions.io import save_grid
from spatialvla_jax.cli import main
from spatialvla_jax.errors import InputError
from spatialvla_jax.reports.figures import grids, sweep
from spatialvla_jax.reports.sweep import draw, write_report
from spatialvla_jax.sweep.measure import save_arrays

AXES = {"grid": ["fine", "coarse", "<linear>"], "ego3d": ["on", "off"]}
ACTIONS = np.random.default_rng(0).normal(0, 0.3, (300, 7)).clip(-1, 1).astype(np.float32)
STATS = fit_gaussians(ACTIONS)
GRIDS = {
    "fine": gaussian_grid(STATS, (4, 8, 2, 4, 4, 4), 0),
    "coarse": uniform_grid((2, 4, 2, 2, 2, 2)),
    "<linear>": linear_grid(),
}


def error_of(grid: str, ego3d: str, seed: int) -> float:
    return 0.1 * (1 + AXES["grid"].index(grid)) + 0.01 * (ego3d == "off") + 0.02 * seed


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of 3 × 2 × 2 trials, one of which failed and one is not there yet."""
    workdir = tmp_path_factory.mktemp("report")
    trials = {}
    for grid in AXES["grid"]:
        for ego3d in AXES["ego3d"]:
            for seed in (0, 1):
                name = f"{grid.strip('<>')}_{ego3d}_{seed}"
                trials[name] = {"values": {"grid": grid, "ego3d": ego3d}, "seed": seed}
                folder = workdir / "trials" / name
                folder.mkdir(parents=True)
                if name == "linear_off_0":
                    (folder / "failed.json").write_text(json.dumps({"trial": name, "reason": "no <memory>"}))
                elif name != "linear_off_1":
                    write_trial(folder, GRIDS[grid], error_of(grid, ego3d, seed), trials[name])
    plan = {"name": "mine", "axes": AXES, "seeds": [0, 1], "trials": trials}
    (workdir / "sweep.json").write_text(json.dumps(plan))
    return workdir


def write_trial(folder: Path, grid, error: float, trial: dict) -> None:
    accuracies = {f"token_accuracy{kind}": error / 2 for kind in ("", "_translation", "_rotation", "_gripper")}
    evaluation = {"split": "val", "episodes": 2, "frames": 30, **accuracies}
    for key, value in {"l1": error, "l1_mean_baseline": 0.5, "l1_repeat_baseline": 0.25}.items():
        evaluation |= {key: value, f"{key}_per_dimension": [value + i / 100 for i in range(7)]}
    result = {**trial, "steps": 4, "params": 1_234_567, "trainable": 1000, "tokens_used": 17, "evaluation": evaluation}
    result |= {"step_seconds_median": error, "grid": {"vocab_size": grid.vocab_size}, "device": "1 × toy"}
    (folder / "result.json").write_text(json.dumps(result))
    records = [{"step": step, "loss": 5 / step} for step in (1, 2, 3, 4)]
    records += [{"step": 2, "val/l1": error + 0.1, "val/loss": 2.0}, {"step": 4, "val/l1": error, "val/loss": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    save_grid(folder / "grid.json", grid)
    features = {}
    if trial["values"] == {"grid": "fine", "ego3d": "on"}:
        edges = {"theta": np.linspace(0, np.pi, 5), "phi": np.linspace(-np.pi, np.pi, 9)}
        slices = edges | {"features": np.random.default_rng(0).normal(size=(4, 8, 6))}
        features = {f"{w}_{key}": value for w in ("before", "adapted", "after") for key, value in slices.items()}
    save_arrays(folder / "data.npz", actions=ACTIONS, **features)


def test_tables_and_page(workdir: Path, capsys) -> None:
    assert main(["sweep", "report", str(workdir)]) == 0
    assert "10 of 12 trials" in capsys.readouterr().out
    with (workdir / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["grid"], row["ego3d"]) for row in rows] == [
        *(("fine", "on"), ("fine", "off"), ("coarse", "on"), ("coarse", "off"), ("<linear>", "on")),
        *(("mean action", ""), ("last action held", "")),
    ]
    errors = [error_of("coarse", "off", seed) for seed in (0, 1)]
    row = rows[3]
    assert float(row["l1"]) == pytest.approx(np.mean(errors)) and row["seeds"] == "2"
    assert float(row["l1_se"]) == pytest.approx(np.std(errors, ddof=1) / np.sqrt(2))
    assert float(row["l1_yaw"]) == pytest.approx(np.mean(errors) + 0.05)
    assert (float(row["tokens_used"]), float(row["tokens"]), float(row["params"])) == (17, 26, 1_234_567)
    assert float(row["step_ms"]) == pytest.approx(1000 * np.mean(errors)) and float(rows[5]["l1"]) == 0.5

    # The worst trial becomes as good as 0.32, which one of the coarse grid is after two steps and one after four.
    assert [float(row["steps_to_l1"]) for row in rows[:5]] == [2, 2, 2, 3, 4] and "steps_to_loss" not in rows[0]

    table = (workdir / "table.md").read_text().splitlines()
    assert table[5].startswith("| coarse | off | 2 | 0.2200 ± 0.0100 | 0.110 ± 0.005 |") and "1,234,567" in table[5]
    assert table[7].startswith("| mean action |  |  | 0.5000 |  |")

    page = (workdir / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in re.sub(r'src="[^"]*"', "", page)
    assert "0.2200 ± 0.0100" in page and "no &lt;memory&gt;" in page and "<linear>" not in page
    names = {"effects", "curves", "dimensions-grid", "dimensions-ego3d", "grids-1", "features"}
    assert len(sources) == len(names)
    files = [path.name for path in (workdir / "figures").iterdir()]
    assert sorted(files) == sorted(f"{name}.{form}" for name in names for form in ("png", "pdf"))
    assert "all values have (1 of 2 for grid, 2 of 3 for ego3d); the error" in page
    assert "all values have (2 of 3 for ego3d); the error" in page


def drawn(workdir: Path, monkeypatch, tmp_path: Path, plan: dict) -> dict[str, dict]:
    """{name of a figure: what it is given to draw}."""
    given = {}
    for name in ("effects", "learning_curves", "dimension_errors", "action_grids", "feature_maps"):
        module = grids if name == "action_grids" else sweep
        monkeypatch.setattr(module, name, lambda path, data, *rest, name=name: given.setdefault(name, data))
    folders = {name: workdir / "trials" / name for name in plan["trials"]}
    results = [
        json.loads((folder / "result.json").read_text()) | {"folder": folder}
        for name, folder in folders.items()
        if (folder / "result.json").exists()
    ]
    captions = {path.stem: caption for _, caption, path in draw(tmp_path, plan, results)}
    return given | {"captions": captions}


def test_values_are_compared_over_the_combinations_that_all_have(workdir: Path, monkeypatch, tmp_path: Path) -> None:
    """Both trials of the linear grid without Ego3D are missing, so grids are compared with it and the effect of Ego3D
    on the two others: 0.01, where means over whatever there is would have the worst grid weigh on one side."""
    plan = json.loads((workdir / "sweep.json").read_text())
    given = drawn(workdir, monkeypatch, tmp_path, plan)
    grids = {g: [[pytest.approx(error_of(g, "on", seed)) for seed in (0, 1)]] for g in AXES["grid"]}
    ego3d = {
        e: [[pytest.approx(error_of(g, e, seed)) for seed in (0, 1)] for g in ("fine", "coarse")] for e in AXES["ego3d"]
    }
    assert given["effects"] == {"grid": grids, "ego3d": ego3d}
    means = {value: np.mean(errors) for value, errors in given["effects"]["ego3d"].items()}
    assert means["off"] - means["on"] == pytest.approx(0.01)

    # Two grids, each with another value of Ego3D, have nothing to be compared on, and curves are drawn all the same.
    plan["trials"] = {name: plan["trials"][name] for name in ("fine_on_0", "coarse_off_0")}
    given = drawn(workdir, monkeypatch, tmp_path, plan)
    assert given.keys() == {"learning_curves", "action_grids", "feature_maps", "captions"}
    assert list(given["learning_curves"]["grid, ego3d"]) == ["fine, on", "coarse, off"]


def test_a_few_combinations_have_a_learning_curve_each(workdir: Path, monkeypatch, tmp_path: Path) -> None:
    plan = json.loads((workdir / "sweep.json").read_text())
    given = drawn(workdir, monkeypatch, tmp_path, plan)
    (curves,) = given["learning_curves"].values()
    assert list(curves) == ["fine, on", "fine, off", "coarse, on", "coarse, off", "<linear>, on"]
    assert [r["val/l1"] for r in curves["coarse, off"][0][1] if "val/l1" in r][-1] == error_of("coarse", "off", 1)
    assert given["captions"]["curves"].startswith("Mean and, as a band, standard error over seeds. Cross")
    plan["axes"]["ego3d"] = ["on", "off", "a third"]  # that makes nine
    given = drawn(workdir, monkeypatch, tmp_path, plan)
    assert {axis: list(values) for axis, values in given["learning_curves"].items()} == AXES
    assert "1 of 3 for grid" in given["captions"]["curves"]


def test_a_sweep_of_seeds_alone(workdir: Path, tmp_path: Path) -> None:
    """It has no axis, and a report."""
    plan = {"name": "mine", "axes": {}, "seeds": [0], "trials": {"only": {"values": {}, "seed": 0}}}
    (tmp_path / "sweep.json").write_text(json.dumps(plan))
    (tmp_path / "trials" / "only").mkdir(parents=True)
    write_trial(tmp_path / "trials" / "only", GRIDS["coarse"], 0.1, plan["trials"]["only"])
    assert "1 of 1 trials" in write_report(tmp_path)
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"curves", "grids-1"}


def test_the_error_of_a_mean_over_combinations_is_that_by_seeds(monkeypatch, tmp_path: Path) -> None:
    """Of two combinations far from each other, each of three seeds; none is drawn where one has a single seed."""
    figure = Figure()
    monkeypatch.setattr(sweep, "drawing", lambda *_, **__: nullcontext(figure))
    errors = {"a": [[1.0, 2.0, 3.0], [11.0, 12.0, 13.0]], "b": [[1.0], [2.0, 3.0]]}
    sweep.effects(tmp_path, {"axis": errors}, {"mean action": 5.0, "last action held": 6.0})
    three, single = figure.axes[0].containers
    (bar,) = three.lines[2][0].get_segments()
    np.testing.assert_allclose(bar[:, 1], 7 + np.array([-1, 1]) * np.sqrt(2 * (1 / 3)) / 2)
    assert three.lines[0].get_ydata() == 7 and three.has_yerr and not single.has_yerr


def test_what_can_not_be_reported(workdir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no sweep: it has no sweep\.json"):
        write_report(tmp_path)
    plan = json.loads((workdir / "sweep.json").read_text())
    plan["trials"] = {"linear_off_0": plan["trials"]["linear_off_0"]}
    (tmp_path / "sweep.json").write_text(json.dumps(plan))
    with pytest.raises(InputError, match=r"no trial in .* is finished$"):
        write_report(tmp_path)
    (tmp_path / "trials" / "linear_off_0").mkdir(parents=True)
    (tmp_path / "trials" / "linear_off_0" / "failed.json").write_text('{"reason": "no memory"}')
    with pytest.raises(InputError, match=r"no trial in .* is finished, and 1 failed: no memory"):
        write_report(tmp_path)
    (tmp_path / "trials" / "linear_off_0" / "result.json").write_text("{}")
    with pytest.raises(InputError, match=r"linear_off_0 is finished, but its metrics\.jsonl is not there, which the"):
        write_report(tmp_path)
