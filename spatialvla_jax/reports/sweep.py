"""A sweep's results as one HTML page without external files, and as table.csv and table.md."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from spatialvla_jax.actions import DIMENSIONS, ActionGrid
from spatialvla_jax.checkpoints.load import load_grid
from spatialvla_jax.errors import InputError
from spatialvla_jax.reports.figures import grids, sweep
from spatialvla_jax.reports.html import data_uri, write_html
from spatialvla_jax.training.metrics import read_metrics
from spatialvla_jax.utils.atomic import write_text

GRIDS_A_FIGURE = 4
CURVES_A_PLOT = 8
BASELINES = {"mean action": "l1_mean_baseline", "last action held": "l1_repeat_baseline"}
NOT_COMPARABLE = """Cross-entropies of vocabularies of different sizes can't be compared; L1 (teacher-forced, unseen
episodes) can."""
GRIDS = """From the top: directions of the translations on the unit sphere; translations in the ball, cut open;
rotations in the cube."""
FEATURES = """Rows of the spatial embedding table over a slice of constant r through the median movement: three
principal components, common to all panels, as red, green and blue."""

# What a trial is measured by: name → (heading, decimals, value of result.json).
MEASURES: dict[str, tuple[str, int, Callable[[dict[str, Any]], float]]] = {
    "l1": ("L1", 4, lambda r: r["evaluation"]["l1"]),
    "token_accuracy": ("tokens right", 3, lambda r: r["evaluation"]["token_accuracy"]),
    "accuracy_translation": ("translation", 3, lambda r: r["evaluation"]["token_accuracy_translation"]),
    "accuracy_rotation": ("rotation", 3, lambda r: r["evaluation"]["token_accuracy_rotation"]),
    "accuracy_gripper": ("gripper", 3, lambda r: r["evaluation"]["token_accuracy_gripper"]),
    "tokens_used": ("tokens used", 0, lambda r: r["tokens_used"]),
    "tokens": ("of", 0, lambda r: r["grid"]["vocab_size"]),
    "step_ms": ("ms a step", 1, lambda r: 1000 * r["step_seconds_median"]),
    "params": ("parameters", 0, lambda r: r["params"]),
    "trainable": ("trained", 0, lambda r: r["trainable"]),
}
PER_DIMENSION = {
    f"l1_{name}": (name, 4, lambda r, i=i: r["evaluation"]["l1_per_dimension"][i]) for i, name in enumerate(DIMENSIONS)
}


def write_report(workdir: Path) -> str:
    """Writes report.html, table.csv, table.md and figures/ into a sweep's directory from the trials that are finished
    so far, each file by rename; returns what it wrote in words. Raises InputError where none is or one lacks files."""
    if not (workdir / "sweep.json").is_file():
        raise InputError(f"{workdir} holds no sweep: it has no sweep.json")
    plan = json.loads((workdir / "sweep.json").read_text())
    results, failures = [], []
    for name in plan["trials"]:
        folder = workdir / "trials" / name
        if (folder / "result.json").exists():
            results.append(json.loads((folder / "result.json").read_text()) | {"folder": folder})
            for file in ("metrics.jsonl", "grid.json", "data.npz"):
                if not (folder / file).exists():
                    raise InputError(f"{folder} is finished, but its {file} is not there, which the report draws")
        elif (folder / "failed.json").exists():
            failures.append(json.loads((folder / "failed.json").read_text()))
    if not results:
        why = f", and {len(failures)} failed: {failures[0]['reason']}" if failures else ""
        raise InputError(f"no trial in {workdir} is finished{why}")
    measures = MEASURES | speeds(results)
    rows = table_rows(plan, results, measures | PER_DIMENSION)
    (workdir / "figures").mkdir(exist_ok=True)
    drawn = draw(workdir / "figures", plan, results)
    write_text(workdir / "table.csv", csv_text(plan, rows, measures | PER_DIMENSION))
    tables = [cells(plan, rows, part) for part in (measures, PER_DIMENSION)]
    write_text(workdir / "table.md", "\n".join(markdown(*table) for table in tables))
    write_html(
        workdir / "report.html",
        "sweep.html",
        title=plan["name"],
        plan=plan,
        finished=len(results),
        steps=", ".join(f"{n:,}" for n in sorted({r["steps"] for r in results})),
        devices=", ".join(dict.fromkeys(r["device"] for r in results)),
        evaluation=results[0]["evaluation"],
        tables=tables,
        figures=[(title, caption, data_uri("png", path.read_bytes())) for title, caption, path in drawn],
        failures=failures,
    )
    return f"wrote {workdir}/report.html, table.csv and table.md: {len(results)} of {len(plan['trials'])} trials"


def speeds(results: list[dict[str, Any]]) -> dict[str, tuple[str, int, Callable[[dict[str, Any]], float]]]:
    """Measures: the first validation at which a trial was as good as all became: by L1; for as many tokens, by loss."""
    measures = {}
    for name in ("l1", "loss"):
        curves = [[(r["step"], r[f"val/{name}"]) for r in records(result) if f"val/{name}" in r] for result in results]
        if not all(curves) or (name == "loss" and len({r["grid"]["vocab_size"] for r in results}) > 1):
            continue
        target = max(min(value for _, value in curve) for curve in curves)
        steps = {r["folder"]: next(s for s, v in c if v <= target) for r, c in zip(results, curves, strict=True)}
        heading = f"steps to val. {name.replace('l1', 'L1')} {target:.3f}"
        measures[f"steps_to_{name}"] = (heading, 0, lambda r, steps=steps: steps[r["folder"]])
    return measures


def records(result: dict[str, Any]) -> list[dict[str, Any]]:
    return read_metrics(result["folder"] / "metrics.jsonl")


def table_rows(plan: dict[str, Any], results: list[dict[str, Any]], measures: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for every combination of values, in the plan's order: {"values", "seeds", measure: (mean, standard error
    or None)}. The baselines come last; they have errors only, and depend on the data alone."""
    rows = []
    for values in _distinct(trial["values"] for trial in plan["trials"].values()):
        group = [result for result in results if result["values"] == values]
        if group:
            numbers = {k: mean_error([get(r) for r in group]) for k, (_, _, get) in measures.items()}
            rows.append({"values": list(values.values()), "seeds": len(group), **numbers})
    for name, key in BASELINES.items():
        errors = np.mean([[r["evaluation"][key], *r["evaluation"][f"{key}_per_dimension"]] for r in results], axis=0)
        known = {k: (float(e), None) for k, e in zip(("l1", *PER_DIMENSION), errors, strict=True)}
        rows.append({"values": [name] + [""] * (len(plan["axes"]) - 1), "seeds": None, **known})
    return rows


def mean_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; None for a single value."""
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return float(np.mean(values)), error


def cells(
    plan: dict[str, Any], rows: list[dict[str, Any]], measures: dict[str, Any]
) -> tuple[list[str], list[list[str]]]:
    """(header, rows) for a reader: mean ± standard error."""
    header = [*plan["axes"], "seeds", *(heading for heading, _, _ in measures.values())]
    lines = []
    for row in rows:
        line = [*row["values"], "" if row["seeds"] is None else str(row["seeds"])]
        for key, (_, decimals, _) in measures.items():
            mean, error = row.get(key, (None, None))
            text = "" if mean is None else f"{mean:,.{decimals}f}"
            # What is the same for every seed, such as the number of parameters, has no error worth showing.
            line.append(f"{text} ± {error:,.{decimals}f}" if error else text)
        lines.append(line)
    return header, lines


def csv_text(plan: dict[str, Any], rows: list[dict[str, Any]], keys: Mapping[str, Any]) -> str:
    """Every measure and its standard error, in full digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*plan["axes"], "seeds", *(column for key in keys for column in (key, f"{key}_se"))])
    for row in rows:
        writer.writerow([*row["values"], row["seeds"], *(n for key in keys for n in row.get(key, (None, None)))])
    return out.getvalue()


def markdown(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def draw(folder: Path, plan: dict[str, Any], results: list[dict[str, Any]]) -> list[tuple[str, str, Path]]:
    """→ (title, caption, picture) of every figure."""
    axes = comparable(plan, results)

    def get(groups: dict[str, list[list[Any]]], value: Callable[[dict[str, Any]], Any]) -> dict[str, list[list[Any]]]:
        return {name: [[value(r) for r in seeds] for seeds in parts] for name, parts in groups.items()}

    def over(*names: str) -> str:
        """What the means of these axes' values are over."""
        if len(plan["axes"]) == 1:
            return "over seeds."
        shares = []
        for axis in names:
            planned = prod(len(values) for other, values in plan["axes"].items() if other != axis)
            shared = len(next(iter(axes[axis].values()))) if axis in axes else 0
            shares.append(f"{shared} of {planned} for {axis}")
        return (
            f"over seeds and those combinations of the other axes that all values have ({', '.join(shares)}); the "
            "error is that by seeds."
        )

    drawn = []
    if axes:
        path = folder / "effects.png"
        base = {name: np.mean([r["evaluation"][key] for r in results]).item() for name, key in BASELINES.items()}
        sweep.effects(path, {axis: get(g, lambda r: r["evaluation"]["l1"]) for axis, g in axes.items()}, base)
        caption = "L1 of greedy chunks on unseen episodes, normalised units: trials, mean and standard error"
        drawn.append(("Error", f"{caption} {over(*plan['axes'])} The lines across need no training.", path))
    if prod(map(len, plan["axes"].values())) <= CURVES_A_PLOT:
        whole = {
            ", ".join(v.values()): [[r for r in results if r["values"] == v]]
            for v in _distinct(r["values"] for r in results)
        }
        curves, means = {", ".join(plan["axes"]): whole}, "over seeds."
    else:
        curves, means = axes, over(*plan["axes"])
    if curves:
        path = folder / "curves.png"
        sweep.learning_curves(path, {axis: get(groups, records) for axis, groups in curves.items()})
        drawn.append(("Learning curves", f"Mean and, as a band, standard error {means} {NOT_COMPARABLE}", path))
    base = {k: np.mean([r["evaluation"][f"{v}_per_dimension"] for r in results], 0) for k, v in BASELINES.items()}
    for axis, groups in axes.items():
        path = folder / f"dimensions-{axis}.png"
        sweep.dimension_errors(path, get(groups, lambda r: r["evaluation"]["l1_per_dimension"]), base)
        drawn.append((f"Errors per dimension by {axis}", f"L1, mean and standard error {over(axis)}", path))
    return drawn + draw_grids(folder, plan, results) + draw_features(folder, results)


def comparable(plan: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, dict[str, list[list[Any]]]]:
    """{axis: {value: [combination of the other axes' values][seed] of results}}. Values that have results share their
    combinations: what only some of them have, because a trial failed or is to come, would tell in their means as if it
    were due to the value. An axis whose values share none is left out."""
    axes = {}
    for axis, names in plan["axes"].items():
        found: dict[str, dict[tuple[str, ...], list[Any]]] = {name: {} for name in names}
        for result in results:
            others = tuple(value for other, value in result["values"].items() if other != axis)
            found[result["values"][axis]].setdefault(others, []).append(result)
        found = {name: parts for name, parts in found.items() if parts}
        shared = [others for others in next(iter(found.values())) if all(others in parts for parts in found.values())]
        if shared:
            axes[axis] = {name: [parts[others] for others in shared] for name, parts in found.items()}
    return axes


def draw_grids(folder: Path, plan: dict[str, Any], results: list[dict[str, Any]]) -> list[tuple[str, str, Path]]:
    """Every grid once, under the values of the first trial that has it, of those axes on which the grids differ."""
    first: dict[str, tuple[dict[str, Any], ActionGrid]] = {}
    for result in results:
        grid = load_grid(result["folder"] / "grid.json")
        if isinstance(grid, ActionGrid):
            first.setdefault((result["folder"] / "grid.json").read_text(), (result, grid))
    shown = list(first.values())
    differing = [axis for axis in plan["axes"] if len({r["values"][axis] for r, _ in shown}) > 1 or len(shown) == 1]
    drawn = []
    for start in range(0, len(shown), GRIDS_A_FIGURE):
        some, path = shown[start : start + GRIDS_A_FIGURE], folder / f"grids-{start // GRIDS_A_FIGURE + 1}.png"
        labels = [", ".join(r["values"][axis] for axis in differing) for r, _ in some]
        grids.action_grids(path, labels, [g for _, g in some], [_arrays(r)["actions"] for r, _ in some])
        drawn.append(("Action grids", GRIDS, path))
    return drawn


def draw_features(folder: Path, results: list[dict[str, Any]]) -> list[tuple[str, str, Path]]:
    """The spatial tables of trials that started from a checkpoint, of one seed: before, on the new grid, after."""
    panels: dict[str, Any] = {}
    for result in results:
        arrays, values = _arrays(result), ", ".join(map(" ".join, result["values"].items()))
        for when, label in {"before": "pre-trained", "adapted": "adapted, not trained", "after": values}.items():
            if f"{when}_features" in arrays and result["seed"] == min(r["seed"] for r in results):
                panel = [arrays[f"{when}_{k}"] for k in ("theta", "phi", "features")]
                other = when == "adapted" and label in panels and not np.array_equal(panels[label][2], panel[2])
                panels.setdefault(f"{label}: {values}" if other else label, panel)
    if not panels:
        return []
    sweep.feature_maps(folder / "features.png", panels)
    return [("Spatial features", FEATURES, folder / "features.png")]


def _arrays(result: dict[str, Any]) -> dict[str, np.ndarray]:
    with np.load(result["folder"] / "data.npz", allow_pickle=False) as file:
        return dict(file)


def _distinct(values: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    return [dict(items) for items in dict.fromkeys(tuple(v.items()) for v in values)]
