"""The report's numbers worked out by hand, conclusions drawn by rule, and a page without external files."""

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers.browser import browser

from spatialvla_jax.actions import fit_gaussians, gaussian_grid, linear_grid, uniform_grid
from spatialvla_jax.actions.io import save_grid
from spatialvla_jax.cli import main
from spatialvla_jax.errors import InputError
from spatialvla_jax.reports import comparisons, sweep
from spatialvla_jax.reports.figures import sweep as figures
from spatialvla_jax.reports.sweep import write_report
from spatialvla_jax.reports.tables import Table, escaped, latex, markdown
from spatialvla_jax.reports.trials import GAIN, L1, SUCCESS, Results, read_sweep
from spatialvla_jax.sweep.measure import save_arrays
from spatialvla_jax.training.metrics import last_gain, plateau

AXES = {"grid": ["fine", "coarse", "<linear>"], "ego3d": ["on", "off"]}
ACTIONS = np.random.default_rng(0).normal(0, 0.3, (300, 7)).clip(-1, 1).astype(np.float32)
STATS = fit_gaussians(ACTIONS)
GRIDS = {
    "fine": gaussian_grid(STATS, (4, 8, 2, 4, 4, 4), 0),
    "coarse": uniform_grid((2, 4, 2, 2, 2, 2)),
    "<linear>": linear_grid(),
}
PLAN = '{"name": "x", "axes": {"grid": ["a", "b"]}, "seeds": [0], "trials": {"a_0": {%s}}}'
SAMPLE = Path(__file__).parents[2] / "docs/guides/sample_sweep"


def error_of(grid: str, ego3d: str, seed: int) -> float:
    """The coarse grid is worse by 0.1 for every seed. The effect of Ego3D changes sign between seeds."""
    return 0.1 * (1 + AXES["grid"].index(grid)) + 0.01 * (ego3d == "off") * (seed - 1) + 0.02 * seed


def write_sweep(workdir: Path, trials: dict[str, dict], axes: dict[str, list[str]], **plan) -> None:
    workdir.mkdir(exist_ok=True)
    seeds = sorted({trial["seed"] for trial in trials.values()})
    plan = {"name": "my_sweep", "axes": axes, "seeds": seeds, "trials": trials} | plan
    (workdir / "sweep.json").write_text(json.dumps(plan))


def write_trial(workdir: Path, name: str, trial: dict, error: float, grid: str = "coarse", **evaluation) -> Path:
    folder = workdir / "trials" / name
    folder.mkdir(parents=True)
    accuracies = {f"token_accuracy{kind}": error / 2 for kind in ("", "_translation", "_rotation", "_gripper")}
    evaluation = {"split": "val", "episodes": 2, "frames": 30, "l1_quantisation": 0.01, **accuracies, **evaluation}
    for key, value in {"l1": error, "l1_mean_baseline": 0.5, "l1_repeat_baseline": 0.25}.items():
        value = evaluation.setdefault(key, value)
        evaluation[f"{key}_per_dimension"] = [value + i / 100 for i in range(7)]
    result = {**trial, "steps": 4, "params": 1_234_567, "trainable": 1000, "tokens_used": 17, "evaluation": evaluation}
    result |= {"step_seconds_median": error, "grid": {"vocab_size": GRIDS[grid].vocab_size}, "device": "1 × toy"}
    (folder / "result.json").write_text(json.dumps(result))
    records = [{"step": step, "loss": 5 / step} for step in (1, 2, 3, 4)]
    records += [{"step": 2, "val/l1": error + 0.1, "val/loss": 2.0}, {"step": 4, "val/l1": error, "val/loss": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    save_grid(folder / "grid.json", GRIDS[grid])
    save_arrays(folder / "data.npz", actions=ACTIONS)
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of 3 × 2 × 3 trials: one failed, two are missing, one was also simulated."""
    workdir, trials = tmp_path_factory.mktemp("report"), {}
    for grid in AXES["grid"]:
        for ego3d in AXES["ego3d"]:
            for seed in (0, 1, 2):
                name = f"{grid.strip('<>')}_{ego3d}_{seed}"
                trials[name] = {"values": {"grid": grid, "ego3d": ego3d}, "seed": seed}
                if name == "linear_off_0":
                    (workdir / "trials" / name).mkdir()
                    failure = {"trial": name, "reason": "no <memory>"}
                    (workdir / "trials" / name / "failed.json").write_text(json.dumps(failure))
                elif not name.startswith("linear_off"):
                    write_trial(workdir, name, trials[name], error_of(grid, ego3d, seed), grid)
    folder = workdir / "trials" / "fine_on_0"
    slices = {"theta": np.linspace(0, np.pi, 5), "phi": np.linspace(-np.pi, np.pi, 9), "features": np.ones((4, 8, 6))}
    slices = {f"{when}_{key}": value for key, value in slices.items() for when in ("before", "adapted", "after")}
    save_arrays(folder / "data.npz", actions=ACTIONS, **slices)
    (folder / "closed_loop").mkdir()
    (folder / "closed_loop" / "result.json").write_text('{"success": 0.8, "standard_error": 0.1, "episodes": 50}')
    result = json.loads((folder / "result.json").read_text())
    made = {"commit": "abcdef", "versions": {"jax": "1.2"}, "date": "2026-01-02T03:04:05+00:00"}
    result |= {"data": ["toy"], "train_frames": 1000, "packed": "f" * 64, "provenance": made}
    (folder / "result.json").write_text(json.dumps(result))
    write_sweep(workdir, trials, AXES, config="sweeps/mine", overrides={"train.steps": "4"})
    return workdir


def test_tables_and_page(workdir: Path, capsys) -> None:
    assert main(["sweep", "report", str(workdir)]) == 0
    assert "15 of 18 trials" in capsys.readouterr().out
    with (workdir / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["grid"], row["ego3d"]) for row in rows] == [
        *(("fine", "on"), ("fine", "off"), ("coarse", "on"), ("coarse", "off"), ("<linear>", "on")),
        *(("mean action", ""), ("last action held", "")),
    ]
    errors, row = [error_of("coarse", "off", seed) for seed in (0, 1, 2)], rows[3]
    assert float(row["open_loop_l1"]) == pytest.approx(np.mean(errors)) and row["n"] == "3"
    assert float(row["open_loop_l1_se"]) == pytest.approx(np.std(errors, ddof=1) / np.sqrt(3))
    assert float(row["open_loop_l1_yaw"]) == pytest.approx(np.mean(errors) + 0.05)
    assert (float(row["tokens_used"]), float(row["vocabulary"]), float(row["parameters"])) == (17, 26, 1_234_567)
    assert float(row["step_time"]) == pytest.approx(1000 * np.mean(errors)) and float(rows[5]["open_loop_l1"]) == 0.5
    assert (row["plateau_reached"], row["plateau_reached_n"], row["success"]) == ("0", "3", "")
    assert (rows[0]["success"], rows[0]["success_episodes"]) == ("80.0", "50")

    # The worst trial reaches 0.34. One trial of the coarse grid reaches that after four steps, the others after two.
    assert [float(row["steps_to_teacher_forced_l1_0.340"]) for row in rows[:5]] == pytest.approx([2, 2, 2, 8 / 3, 4])

    lines = (workdir / "table.md").read_text().splitlines()
    assert "| coarse | off | 3 | 0.2200 ± 0.0173 | 0.0100 | 0.2200 ± 0.0173 | – | – | 0 of 3 |" in lines
    assert any(
        line.startswith("| fine | on | 3 | 0.1200 ± 0.0115 | 0.0100 ") and "(n = 1) | 50 |" in line for line in lines
    )
    assert "| mean action |  |  | 0.5000 |  |  |  |  |  |" in lines

    report = json.loads((workdir / "report.json").read_text())
    assert report["combinations"][3]["open_loop_l1"]["mean"] == pytest.approx(np.mean(errors))
    assert report["failed"] == {"linear_off_0": "no <memory>"} and report["missing"] == ["linear_off_1", "linear_off_2"]
    assert report["provenance"]["command"] == (
        "spatialvla-jax sweep --config sweeps/mine --workdir DIR --config.train.steps=4"
    )
    assert report["provenance"]["commit"] == "abcdef (1 trials)"
    assert report["quantities"].keys() >= {"open_loop_l1", "teacher_forced_l1", "validation_loss", "success"}
    header = set(rows[0])
    assert all(key in header for key in report["quantities"])  # one name everywhere
    names = [quantity["name"] for quantity in report["quantities"].values()]

    page = (workdir / "report.html").read_text()
    assert all(f"<dt>{name}" in page for name in names)
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    pictures = [source for source in sources if source.startswith("data:image/")]
    assert len(pictures) == 5 and set(sources) - set(pictures) == {
        f"trials/{trial['name']}/result.json" for trial in report["trials"]
    }
    assert "http" not in re.sub(r'src="[^"]*"', "", page).replace("http%3A//www.w3.org", "")
    assert "0.2200 ± 0.0173" in page and "no &lt;memory&gt;" in page and "<linear>" not in page
    files = {path.name for path in (workdir / "figures").iterdir()}
    vector = {
        f"{name}.{form}" for name in ("effects", "differences", "curves", "dimensions") for form in ("svg", "pdf")
    }
    assert files == vector | {f"{name}.{form}" for name in ("grids-1", "features") for form in ("png", "pdf")}


def test_differences_are_paired_and_never_averaged_over_the_other_factor(workdir: Path) -> None:
    found = {difference.label: difference for difference in comparisons.differences(read_sweep(workdir), L1)}
    assert [*found] == [
        *("coarse − fine (ego3d on, n = 3)", "<linear> − fine (ego3d on, n = 3)", "coarse − fine (ego3d off, n = 3)"),
        *("off − on (grid fine, n = 3)", "off − on (grid coarse, n = 3)"),
    ]
    coarse, ego3d = found["coarse − fine (ego3d off, n = 3)"], found["off − on (grid coarse, n = 3)"]
    assert coarse.pairs == pytest.approx([0.1] * 3) and coarse.interval == pytest.approx((0.1, 0.1))
    assert coarse.conclusion(L1) == "worse"
    assert ego3d.pairs == pytest.approx([-0.01, 0, 0.01]) and ego3d.mean == pytest.approx(0)
    assert ego3d.interval == pytest.approx((-0.01, 0.01)) and ego3d.conclusion(L1) == "includes 0"
    assert not comparisons.differences(read_sweep(workdir), SUCCESS)


def test_what_is_said_follows_by_rule(workdir: Path, tmp_path: Path) -> None:
    said = " ".join(comparisons.conclusions(read_sweep(workdir)))
    assert "11 of 15 trials are better than holding the last action by open-loop L1." in said
    assert "grid, open-loop L1: worse, and the intervals exclude 0: coarse − fine (ego3d on, n = 3);" in said
    assert (
        "ego3d, open-loop L1: the intervals of off − on (grid fine, n = 3); off − on (grid coarse, n = 3) include 0, "
        "so nothing can be concluded about them." in said
    )
    assert (
        "0 of 15 trials have reached their plateau." in said and "covers the true median in only 75 % of cases" in said
    )
    assert "1 of 18 trials failed: linear_off_0. 2 of 18 trials not finished: linear_off_1, linear_off_2." in said

    trials = {f"a_{seed}": {"values": {"grid": "a"}, "seed": seed} for seed in (0, 1)}
    trials |= {"b_0": {"values": {"grid": "b"}, "seed": 0}}
    for name, trial in trials.items():
        write_trial(tmp_path, name, trial, 0.4)
    write_sweep(tmp_path, trials, {"grid": ["a", "b"]})
    said = " ".join(comparisons.conclusions(read_sweep(tmp_path)))
    assert (
        "No trial is better than holding the last action: the lowest open-loop L1 is 0.400 (grid a, seed 0), " in said
    )
    assert "holding the last action has 0.250. Nothing can be concluded" in said
    assert "grid, open-loop L1: fewer than 3 pairs of trials prove nothing: b − a (n = 1)." in said


def test_one_axis_at_a_time_around_a_reference(tmp_path: Path, monkeypatch) -> None:
    """Rows and differences name the one factor that differs. Chunks of another length have their own baselines."""
    reference, trials = {"grid": "fine", "chunk": "4"}, {}
    axes = {"grid": ["fine", "coarse"], "chunk": ["1", "4"]}
    for seed in (0, 1, 2):
        for values, held in (
            (reference, 0.25),
            (reference | {"grid": "coarse"}, 0.25),
            (reference | {"chunk": "1"}, 0.1),
        ):
            name = "-".join(values.values()) + f"_{seed}"
            trials[name] = {"values": values, "seed": seed}
            error = 0.2 + 0.01 * seed + 0.05 * (values["grid"] == "coarse")
            folder = write_trial(tmp_path, name, trials[name], error, l1_repeat_baseline=held)
            (folder / "closed_loop").mkdir()
            success = {"success": 1.0 if values == reference else 0.0, "episodes": 40}
            (folder / "closed_loop" / "result.json").write_text(json.dumps(success))
    write_sweep(tmp_path, trials, axes, reference=reference)
    results = read_sweep(tmp_path)
    assert results.one_axis
    found = {(d.axis, d.label): d for d in comparisons.differences(results, L1)}
    assert {label: d.conclusion(L1) for (_, label), d in found.items()} == {
        "coarse − fine (n = 3)": "worse",
        "1 − 4 (n = 3)": "not comparable",
    }
    coarse, one = comparisons.differences(results, SUCCESS)
    # Success covers the same episodes for any chunk length, but not for other tasks.
    assert coarse.mean == one.mean == -100 and coarse.conclusion(SUCCESS) == one.conclusion(SUCCESS) == "worse"
    for name in trials:
        path = tmp_path / "trials" / name / "closed_loop" / "result.json"
        task = {"7" if trials[name]["values"]["chunk"] == "1" else "0": {}}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"suites": {"libero_spatial": {"tasks": task}}}))
    kept, one = comparisons.differences(read_sweep(tmp_path), SUCCESS)
    assert (kept.conclusion(SUCCESS), one.conclusion(SUCCESS)) == ("worse", "not comparable")
    low, high = coarse.interval
    assert -100 < low < high < -92  # 0 and 40 of 40 episodes: chance may still move these rates
    assert [name for name, _ in comparisons.baselines(results)] == [
        *("mean action (chunk 4)", "mean action (chunk 1)", "last action held (chunk 4)", "last action held (chunk 1)")
    ]
    monkeypatch.setattr(sweep, "draw", lambda *_: [])
    lines = _report(tmp_path)
    assert "| reference |  | 3 | 0.2100" in lines and "| grid | coarse | 3 | 0.2600" in lines
    assert "a row differs from it in one factor" in lines and "| other factors |" not in lines


def test_a_plateau_is_a_last_quarter_without_gains() -> None:
    falling = [(25, 0.9), (50, 0.5), (75, 0.4)]
    for last, gain, reached in ([(90, 0.41), (100, 0.393)], 1.75, True), ([(90, 0.391), (100, 0.41)], 2.25, False):
        assert last_gain([*falling, *last], 100) == pytest.approx(gain) and plateau([*falling, *last], 100) is reached
    assert plateau([*falling, (100, 0.7)], 100)  # it rises: there is nothing left to learn
    assert plateau([(25, 0.5), (75, 0.52), (100, 0.51)], 100) is False  # nothing was learned
    assert plateau(falling, 100) is None and plateau([(80, 0.4), (100, 0.4)], 100) is None and plateau([], 100) is None


def test_intervals_by_hand() -> None:
    """With two values, a quarter of all draws each give either value, so the interval is their range."""
    assert comparisons.bootstrap(np.array([1.0, 3.0])) == (1, 3)
    many = np.random.default_rng(1).normal(5, 1, 400)
    low, high = comparisons.bootstrap(many)
    assert low == pytest.approx(many.mean() - 1.96 * many.std() / 20, abs=0.01) and high - low == pytest.approx(
        2 * 1.96 * many.std() / 20, rel=0.05
    )
    assert comparisons.bootstrap(many) == (low, high)


def test_tables_in_latex_and_markdown() -> None:
    table = Table("T", "50 % of a_b & c", [("name", ""), ("L1", "normalised units")], [["[x] → {y}", "−1 ± 2"]], 1)
    text = latex(table, "x")
    assert r"{[}x{]} $\to$ \{y\} & $-$1 $\pm$ 2 \\" in text and r"\caption{T. 50 \% of a\_b \& c}" in text
    assert r"name & \shortstack{L1\\(normalised units)} \\" in text and escaped("字") == "U+5B57"
    assert escaped("é ř ß 5°") == r"é ř ß 5$^\circ$" and escaped("ą Ħ") == "U+0105 U+0126", "as OT1 has no ogonek"
    assert text.count(r"\begin{") == text.count(r"\end{") == 2
    assert r"\begin{table}" in text and r"\begin{table*}" in latex(table._replace(lines=[["a" * 60, ""]]), "x")
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")
    assert markdown(table).splitlines()[1:] == ["| --- | --: |", "| [x] → {y} | −1 ± 2 |"]
    assert "a\\|b" in markdown(table._replace(lines=[["a|b", ""]]))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("pdflatex"), reason="needs LaTeX")
def test_the_tables_compile_and_fit_the_column(workdir: Path, tmp_path: Path) -> None:
    write_report(workdir)
    for source in (workdir, SAMPLE):
        shutil.copy(source / "table.tex", tmp_path)
        (tmp_path / "paper.tex").write_text(
            r"\documentclass[twocolumn]{article}\usepackage{booktabs,graphicx}\begin{document}\input{table}\end{document}"
        )
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "Overfull \\hbox" not in done.stdout, done.stdout


def test_the_sample_report_is_whole() -> None:
    """It is small, and its files agree."""
    assert (SAMPLE / "report.html").stat().st_size <= 500_000
    report, page = json.loads((SAMPLE / "report.json").read_text()), (SAMPLE / "report.html").read_text()
    lines, tex = (SAMPLE / "table.md").read_text(), (SAMPLE / "table.tex").read_text()
    for row in report["combinations"]:
        cell = "{mean:.4f} ± {standard_error:.4f}".format(**row["open_loop_l1"])
        assert cell in lines and cell in page and cell.replace("±", r"$\pm$") in tex
    for trial in report["trials"]:
        result = json.loads((SAMPLE / "trials" / trial["name"] / "result.json").read_text())
        assert result["evaluation"]["l1"] == trial["open_loop_l1"] and f"trials/{trial['name']}/result.json" in page


@pytest.mark.slow
def test_the_page_in_a_browser() -> None:
    """Nothing is cut off at 1280 pixels, and the grids turn."""
    with browser(1280, 1000) as page:
        page.open((SAMPLE / "report.html").as_uri())
        page.wait_for("document.readyState == 'complete'")
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280
        picture = "document.querySelector('canvas').toDataURL()"
        before = page.evaluate(picture)
        key = "new KeyboardEvent('keydown', {key: 'ArrowLeft'})"
        page.evaluate(f"document.querySelector('canvas').dispatchEvent({key})")
        page.wait_for(f"{picture} != {json.dumps(before)}")
        page.evaluate("document.querySelector('select').selectedIndex = 1")
        page.evaluate("document.querySelector('select').dispatchEvent(new Event('change'))")
        assert page.evaluate("document.querySelectorAll('canvas').length") == 6 and not page.problems


def test_a_sweep_of_seeds_alone(tmp_path: Path) -> None:
    """It has no axis, but still a report."""
    trials = {"only": {"values": {}, "seed": 0}}
    write_sweep(tmp_path, trials, {})
    write_trial(tmp_path, "only", trials["only"], 0.1)
    assert "1 of 1 trials" in write_report(tmp_path)
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"curves", "dimensions", "grids-1"}
    assert "| all | 1 | 0.1000 |" in (tmp_path / "table.md").read_text()


def test_an_older_sweep_has_a_report(tmp_path: Path, monkeypatch) -> None:
    """Its results record neither what made them nor the quantisation error, and nothing was validated."""
    monkeypatch.setattr(sweep, "draw", lambda *_: [])
    trials = {name: {"values": {"grid": name}, "seed": 0} for name in ("a", "b")}
    write_sweep(tmp_path, trials, {"grid": ["a", "b"]})
    for name, trial in trials.items():
        folder = write_trial(tmp_path, name, trial, 0.1)
        result = json.loads((folder / "result.json").read_text())
        del result["evaluation"]["l1_quantisation"]
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    results = read_sweep(tmp_path)
    assert not {"quantisation L1", "teacher-forced L1", GAIN.name} & {quantity.name for quantity in results.quantities}
    assert isinstance(results, Results) and "commit: `not recorded`" in _report(tmp_path)


def _report(workdir: Path) -> str:
    write_report(workdir)
    return (workdir / "table.md").read_text()


def test_a_closed_loop_of_another_trials_weights_is_refused(tmp_path: Path) -> None:
    """By mistake, one trial's checkpoint was evaluated into another trial's folder."""
    trial = {"values": {"grid": "a"}, "seed": 0}
    write_sweep(tmp_path, {"a_0": trial}, {"grid": ["a"]})
    folder = write_trial(tmp_path, "a_0", trial | {"weights": "/there/a_0/checkpoints/4 (12345678)"}, 0.1)
    (folder / "closed_loop").mkdir()
    (folder / "closed_loop" / "result.json").write_text('{"success": 0.8, "episodes": 50}')
    settings = folder / "closed_loop" / "settings.json"
    settings.write_text('{"policy": "/here/a_0/checkpoints/4 (12345678), 224 px"}')
    assert read_sweep(tmp_path).trials[0].episodes == 50
    settings.write_text('{"policy": "/here/b_0/checkpoints/4 (87654321), 224 px"}')
    with pytest.raises(
        InputError, match=r"a_0/closed_loop is of /here/b_0/.*, other weights than the trial's, /there/a_"
    ):
        read_sweep(tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        ("result.json", "{", r"result\.json cannot be read as JSON"),
        (
            "result.json",
            "{}",
            r"result\.json is of .*None.*, but sweep\.json plans .*'grid': 'a'.* with seed 0: was it copied",
        ),
        (
            "result.json",
            '{"values": {"grid": "a"}, "seed": 0}',
            r"result\.json has no 'evaluation': it is not a trial's",
        ),
        (
            "closed_loop/result.json",
            '{"success": 2, "episodes": 10}',
            r"closed_loop/result\.json has success 2 of 10 episodes",
        ),
        ("closed_loop/result.json", "[]", r"closed_loop/result\.json must hold a JSON object"),
        ("metrics.jsonl", None, r"a_0 is finished, but its metrics\.jsonl is missing, which the report needs"),
        ("data.npz", "x", r"data\.npz .*"),
        ("grid.json", "{}", r"grid\.json"),
        (
            "../../sweep.json",
            PLAN % '"values": {"grid": "c"}, "seed": 0',
            "sweep.json: a_0 must have a seed and one of each",
        ),
        (
            "../../sweep.json",
            PLAN % '"values": {"grid": "a"}',
            "sweep.json: a_0 must have a seed and one of each axis's",
        ),
        ("metrics.jsonl", '{"step": 1, "loss": null}', r"metrics\.jsonl is damaged: line 1 has no number for loss"),
        ("metrics.jsonl", '{"loss": 1.0}', r"metrics\.jsonl is damaged: line 1 is not a JSON object with a step"),
        (
            "metrics.jsonl",
            '{"st\n{"step": 2, "loss": 1.0}\n',
            r"metrics\.jsonl is damaged: line 1 is not a JSON object",
        ),
        ("../../sweep.json", PLAN.replace('["a", "b"]', "[]") % '"seed": 0', r"sweep\.json has no good 'axes'"),
        ("../../sweep.json", '{"name": "x"}', r"sweep\.json has no good 'axes': it is not the plan of a sweep"),
    ],
)
def test_damaged_files_are_named(file: str, text: str | None, sentence: str, tmp_path: Path) -> None:
    trials = {"a_0": {"values": {"grid": "a"}, "seed": 0}}
    write_sweep(tmp_path, trials, {"grid": ["a", "b"]})
    folder = write_trial(tmp_path, "a_0", trials["a_0"], 0.1)
    (folder / "closed_loop").mkdir()
    (folder / file).unlink() if text is None else (folder / file).write_text(text)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=sentence):
        write_report(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"evaluation": {"l1_per_dimension": [float("nan")] * 7}}, "ValueError l1 has nan for open_loop_l1_x"),
        ({"evaluation": {"l1_mean_baseline": float("inf")}}, "ValueError l1_mean_baseline has inf for open_loop_l1"),
        ({"evaluation": {"frames": "x"}}, "TypeError frames is 'x'"),
        ({"provenance": None}, "TypeError provenance is None"),
        ({"provenance": {"versions": []}}, "TypeError versions is \\[\\]"),
    ],
)
def test_results_that_are_not_whole(change: dict, sentence: str, tmp_path: Path) -> None:
    trials = {"a_0": {"values": {"grid": "a"}, "seed": 0}}
    write_sweep(tmp_path, trials, {"grid": ["a", "b"]})
    path = write_trial(tmp_path, "a_0", trials["a_0"], 0.1) / "result.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result | change | {"evaluation": result["evaluation"] | change.get("evaluation", {})}))
    with pytest.raises(InputError, match=f"result.json is not a whole result of a trial: {sentence}"):
        read_sweep(tmp_path)


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    """Dollar signs are not mathematics, "_" drops no value from a legend, and nothing is parsed as markup."""
    axes = {r"$\frac": [r"$\foo$", "_b", "<i>*c*"]}
    trials = {f"t{i}": {"values": {r"$\frac": value}, "seed": 0} for i, value in enumerate(axes[r"$\frac"])}
    for name, trial in trials.items():
        write_trial(tmp_path, name, trial, 0.1)
    write_sweep(tmp_path, trials, axes)
    results, path = read_sweep(tmp_path), tmp_path / "drawn.svg"
    figures.learning_curves(path, comparisons.cover(results))
    shown = re.findall(r"<!-- (.*?) -->", path.read_text())
    assert {r"$\frac", r"$\foo$ (n = 1)", " _b (n = 1)"} <= set(shown)
    lines = sweep.markdown_text(results, sweep.tables_of(results), comparisons.conclusions(results), {}).splitlines()
    assert any(line.startswith(r"| \<i>\*c\* | 1 |") for line in lines)
    assert any(r"\<i>\*c\* − \$\\foo\$ (n = 1)" in line for line in lines if line.startswith("- "))


def test_baselines_that_no_axis_tells_apart_have_names(tmp_path: Path) -> None:
    trials = {f"a_{seed}": {"values": {"grid": "a"}, "seed": seed} for seed in (0, 1, 2)}
    for name, trial in trials.items():
        write_trial(tmp_path, name, trial, 0.1, l1_mean_baseline=0.5 + 0.1 * (trial["seed"] > 0))
    write_sweep(tmp_path, trials, {"grid": ["a"]})
    names = [name for name, _ in comparisons.baselines(read_sweep(tmp_path))]
    assert names[:2] == ["mean action (a_0)", "mean action (a_1, …)"]


def test_figures_of_trials_that_are_gone_are_removed(workdir: Path, tmp_path: Path) -> None:
    """A sweep of six trials in three grids becomes one of a single trial: there is nothing left to compare."""
    shutil.copytree(workdir, tmp_path / "sweep")
    write_report(tmp_path / "sweep")
    figures, kept = tmp_path / "sweep" / "figures", {"curves.svg", "dimensions.svg", "curves.pdf", "dimensions.pdf"}
    (figures / "mine.svg").write_text("x")
    assert {path.name for path in figures.iterdir()} > kept | {"effects.pdf", "differences.svg", "features.png"}
    name, values = "linear_on_1", {"grid": "<linear>", "ego3d": "on"}
    write_sweep(tmp_path / "sweep", {name: {"values": values, "seed": 1}}, AXES)
    write_report(tmp_path / "sweep")
    assert {path.name for path in figures.iterdir()} == kept | {"mine.svg"}, "a linear grid is not drawn either"


def test_what_can_not_be_reported(workdir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no sweep: it has no sweep\.json"):
        write_report(tmp_path)
    trials = {"linear_off_0": {"values": {"grid": "<linear>", "ego3d": "off"}, "seed": 0}}
    write_sweep(tmp_path, trials, AXES)
    with pytest.raises(InputError, match=r"no trial in .* is finished$"):
        write_report(tmp_path)
    shutil.copytree(workdir / "trials" / "linear_off_0", tmp_path / "trials" / "linear_off_0")
    with pytest.raises(InputError, match=r"no trial in .* is finished, and 1 failed: no <memory>"):
        write_report(tmp_path)
