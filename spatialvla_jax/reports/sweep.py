"""A sweep's results as one HTML page without external files, and as report.json, table.csv, table.md and table.tex."""

import base64
import csv
import io
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from spatialvla_jax.actions import ActionGrid
from spatialvla_jax.reports.comparisons import (
    PAIRED,
    baselines,
    combinations,
    conclusions,
    cover,
    differences,
    facets,
    summary,
    words,
)
from spatialvla_jax.reports.figures import grids, sweep
from spatialvla_jax.reports.html import data_uri, svg_uri, write_html
from spatialvla_jax.reports.tables import Table, latex, markdown, plain
from spatialvla_jax.reports.trials import (
    L1,
    PER_DIMENSION,
    PLATEAU,
    SUCCESS,
    UNITS,
    Quantity,
    Results,
    Trial,
    read_sweep,
)
from spatialvla_jax.utils.atomic import write_json, write_text

GRIDS_A_FIGURE = 4
POINTS = 1200  # actions that the page draws into each grid
FEATURES = """Rows of the spatial embedding table over a slice of constant r through the median movement: three
principal components, common to all panels, as red, green and blue."""
SEEDS = "Mean ± standard error over n seeds."
OF_SUCCESS = " Success has a 95 % interval, from a bootstrap over seeds and their episodes."
LOSSES = " Losses of vocabularies of different sizes can't be compared."


def write_report(workdir: Path) -> str:
    """Write report.html, report.json, table.csv, table.md, table.tex and figures/ into a sweep's directory, each file
    by rename, from the finished trials. Returns a sentence that says what was written. Raises InputError if no trial is
    finished, or if one lacks files."""
    results = read_sweep(workdir)
    tables, said, made = tables_of(results), conclusions(results), provenance(results)
    (workdir / "figures").mkdir(exist_ok=True)
    drawn = draw(workdir / "figures", results)
    write_text(workdir / "table.csv", csv_text(results))
    write_text(workdir / "table.md", markdown_text(results, tables, said, made))
    write_text(workdir / "table.tex", latex_text(results, tables, made))
    write_json(workdir / "report.json", as_json(results, said, made))
    write_html(
        workdir / "report.html",
        "sweep.html",
        title=results.plan["name"],
        results=results,
        said=said,
        tables=tables,
        figures=[(title, caption, _picture(path)) for title, caption, path in drawn],
        grids=viewer_data(results),
        columns=[quantity for quantity in results.quantities if quantity.table == L1.table],
        provenance=made,
    )
    finished = f"{len(results.trials)} of {len(results.plan['trials'])} trials"
    return f"wrote {workdir}/report.html, report.json, table.csv, table.md and table.tex: {finished}"


def provenance(results: Results) -> dict[str, str]:
    """The origin of the trials, in words. If they come from several machines and versions, all are named."""
    plan, of_trials = results.plan, [trial.result for trial in results.trials]
    made = [result.get("provenance", {}) for result in of_trials]
    versions = [", ".join(f"{name} {version}" for name, version in m.get("versions", {}).items()) for m in made]
    dates = sorted(m["date"] for m in made if "date" in m)
    overrides = [f"--config.{key}={value}" for key, value in plan.get("overrides", {}).items()]
    command = ["spatialvla-jax", "sweep", "--config", plan.get("config", ""), "--workdir", "DIR", *overrides]

    def distinct(values: list[str]) -> str:
        counts = {value: values.count(value) for value in dict.fromkeys(values) if value}
        several = len(counts) > 1 or sum(counts.values()) < len(values)
        return "; ".join(f"{v} ({n} trials)" if several else v for v, n in counts.items()) or "not recorded"

    def data(result: dict[str, Any]) -> str:
        evaluation, names = result["evaluation"], ", ".join(map(str, result.get("data", [])))
        frames = f", {result['train_frames']:,} frames to train on" if "train_frames" in result else ""
        packed = f" (packed, SHA-256 {result['packed'][:16]}…)" if result.get("packed") else ""
        unseen = (
            f"{evaluation['frames']:,} frames of {evaluation['episodes']:,} episodes of split {evaluation['split']}"
        )
        return f"{names or 'data set not recorded'}{packed}{frames}, evaluated on {unseen}"

    return {
        "command": shlex.join(command) if plan.get("config") else "not recorded",
        "commit": distinct([m.get("commit", "") for m in made]),
        "versions": distinct(versions),
        "devices": distinct([str(result.get("device", "")) for result in of_trials]),
        "data": distinct([data(result) for result in of_trials]),
        "trained": (f"{dates[0]} to {dates[-1]}" if len(dates) > 1 else "".join(dates)) or "not recorded",
        "seeds": ", ".join(map(str, plan["seeds"])),
        "reference": words(plan["reference"]) or "none",
    }


def tables_of(results: Results) -> list[Table]:
    """For every group of quantities, a row for each combination of factors with the baselines last; then the paired
    differences."""
    axes = ["factor", "value"] if results.one_axis else list(results.plan["axes"]) or ["trials"]
    tables = []
    for title in dict.fromkeys(quantity.table for quantity in results.quantities):
        shown = [quantity for quantity in results.quantities if quantity.table == title]
        header = [(axis, "") for axis in axes] + [("n", "seeds")]
        for quantity in shown:
            # The group's title says "open-loop L1", so the column is called "yaw", not "open-loop L1, yaw".
            name, unit = (quantity.name, quantity.unit) if title != PER_DIMENSION else (quantity.short, "")
            header += [(name, unit)] + ([("episodes", "")] if quantity == SUCCESS else [])
        lines = []
        for values, trials, planned in combinations(results):
            n = f"{len(trials)}" if len(trials) == planned else f"{len(trials)} of {planned}"
            if results.one_axis:
                differing = [pair for pair in values.items() if pair not in results.plan["reference"].items()]
                line = [*(differing[0] if differing else ("reference", "")), n]
            else:
                line = [*(values.values() or ["all"]), n]
            for quantity in shown:
                line += cell(quantity, trials)
            lines.append(line)
        for name, numbers in baselines(results):
            if any(quantity.key in numbers for quantity in shown):
                line = [name, *[""] * len(axes)]
                for quantity in shown:
                    line += [f"{numbers[quantity.key]:.{quantity.decimals}f}" if quantity.key in numbers else ""]
                    line += [""] if quantity == SUCCESS else []
                lines.append(line)
        unit = f" Unit: {UNITS}." if title == PER_DIMENSION else ""
        if results.one_axis:
            unit += f" The reference is {words(results.plan['reference'])}; a row differs from it in one factor."
        caption = SEEDS + unit + OF_SUCCESS * (SUCCESS in shown) + LOSSES * (title == "Training")
        tables.append(Table(title, caption, header, lines, len(axes)))
    return [*tables, *paired_table(results)]


def cell(quantity: Quantity, trials: list[Trial]) -> list[str]:
    """The table cells of a quantity for one combination's trials."""
    found, digits = summary(quantity, trials), quantity.decimals
    count = f" (n = {found['n']})" if found and found["n"] < len(trials) else ""
    if not found:
        return ["–", "–"] if quantity == SUCCESS else ["–"]
    if quantity == PLATEAU:
        return [f"{found['reached']} of {found['n']}"]
    mean = f"{found['mean']:,.{digits}f}"
    if quantity == SUCCESS:
        low, high = found["interval"]
        return [f"{mean} [{low:.{digits}f}, {high:.{digits}f}]{count}", f"{found['episodes']:,}"]
    # A value that is equal for every seed, such as the number of parameters, has no error worth showing.
    error = f"{found['standard_error'] or 0:,.{digits}f}"
    return [f"{mean} ± {error}{count}" if error.strip("0.") else f"{mean}{count}"]


def paired_table(results: Results) -> list[Table]:
    """The table of differences from the reference, in L1 and, if measured, in success. Empty if no trials compare."""
    rows: dict[tuple[str, str], dict[str, list[str]]] = {}
    for quantity in (L1, SUCCESS):
        for found in differences(results, quantity):
            digits = quantity.decimals
            interval = f"[{found.interval[0]:+.{digits}f}, {found.interval[1]:+.{digits}f}]" if found.interval else "–"
            cells = [str(len(found.pairs)), f"{found.mean:+.{digits}f}", interval, found.conclusion(quantity)]
            cells = [text.replace("-", "−") for text in cells]
            row = rows.setdefault((found.axis, found.place), {})
            row["names"], row[quantity.name] = [found.axis, found.against, words(found.others)], cells
    shown = [quantity for quantity in (L1, SUCCESS) if any(quantity.name in row for row in rows.values())]
    others = [] if all(not row["names"][2] for row in rows.values()) else [("other factors", "")]
    header = [("factor", ""), ("difference", ""), *others]
    for quantity in shown:
        unit = quantity.unit.replace("%", "points")
        header += [("n", "pairs"), (f"Δ {quantity.name}", unit), ("95 % interval", unit), ("conclusion", "")]
    names = len(header) - 4 * len(shown)
    lines = [row["names"][:names] + [c for q in shown for c in row.get(q.name, ["–"] * 4)] for row in rows.values()]
    return [Table("Paired differences", PAIRED, header, lines, names)] if rows else []


def csv_text(results: Results) -> str:
    """Every quantity and its standard error, or interval, in full precision."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    axes = list(results.plan["axes"]) or ["trials"]
    header = [*axes, "n"]
    for quantity in results.quantities:
        ends = {PLATEAU: ("", "_n"), SUCCESS: ("", "_low", "_high", "_episodes")}.get(quantity, ("", "_se"))
        header += [f"{quantity.key}{end}" for end in ends]
    writer.writerow(header)
    for values, trials, _ in combinations(results):
        line: list[Any] = [*(values.values() or ["all"]), len(trials)]
        for quantity in results.quantities:
            found = summary(quantity, trials)
            if quantity == PLATEAU:
                line += [found.get("reached"), found.get("n")]
            elif quantity == SUCCESS:
                line += [found.get("mean"), *found.get("interval", (None, None)), found.get("episodes")]
            else:
                line += [found.get("mean"), found.get("standard_error")]
        writer.writerow(line)
    for name, numbers in baselines(results):
        writer.writerow([name, *[""] * (len(axes) - 1), *(numbers.get(key) for key in header[len(axes) :])])
    return out.getvalue()


def markdown_text(results: Results, tables: list[Table], said: list[str], made: dict[str, str]) -> str:
    parts = [f"# {plain(results.plan['name'])}", "\n".join(f"- {plain(sentence)}" for sentence in said)]
    parts += [f"## {table.title}\n\n{plain(table.caption)}\n\n{markdown(table)}" for table in tables]
    meanings = [f"- **{q.name}**{f' ({q.unit})' if q.unit else ''}: {q.meaning}" for q in results.quantities]
    parts += ["## Quantities\n\n" + "\n".join(meanings)]
    parts += ["## Provenance\n\n" + "\n".join(f"- {key}: `{value}`" for key, value in made.items())]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def latex_text(results: Results, tables: list[Table], made: dict[str, str]) -> str:
    name = results.plan["name"]
    head = [r"% \usepackage{booktabs,graphicx}"] + [
        f"% {key}: {' '.join(value.split())}" for key, value in made.items()
    ]
    label = "".join(c if c.isascii() and c.isalnum() else "-" for c in name)
    floats = [latex(t, f"{label}-{t.title.split()[0].lower()}-{i}") for i, t in enumerate(tables, 1)]
    return "\n".join(head) + "\n\n" + "\n".join(floats)


def as_json(results: Results, said: list[str], made: dict[str, str]) -> dict[str, Any]:
    """All numbers of the report in full precision, by `Quantity.key`."""
    return {
        "sweep": results.plan["name"],
        "provenance": made,
        "conclusions": said,
        "quantities": {q.key: {"name": q.name, "unit": q.unit, "meaning": q.meaning} for q in results.quantities},
        "combinations": [
            {"values": values, "n": len(trials), "planned": planned}
            | {quantity.key: summary(quantity, trials) for quantity in results.quantities}
            for values, trials, planned in combinations(results)
        ],
        "baselines": dict(baselines(results)),
        "differences": {
            quantity.key: [d._asdict() | {"conclusion": d.conclusion(quantity)} for d in differences(results, quantity)]
            for quantity in (L1, SUCCESS)
        },
        "trials": [
            {"name": trial.name, "values": trial.values, "seed": trial.seed, "episodes": trial.episodes}
            | trial.numbers
            | {"provenance": trial.result.get("provenance", {})}
            for trial in results.trials
        ],
        "failed": results.failed,
        "missing": results.missing,
    }


def draw(folder: Path, results: Results) -> list[tuple[str, str, Path]]:
    """Draw all figures; returns (title, caption, picture) of each."""
    compared, rows, drawn = facets(results), cover(results), []
    measured = [quantity for quantity in (L1, SUCCESS) if quantity in results.quantities]
    if compared:
        sweep.effects(path := folder / "effects.svg", compared, measured)
        caption = "Every trial is a point, the mean over seeds a dash; the other factors are colours and markers. "
        caption += "Dashed and dotted lines need no training; grey ones are what the grid alone leaves."
        drawn.append(("Results by factor", caption, path))
    if paired := {q: found for q in measured if (found := differences(results, q))}:
        sweep.forest(path := folder / "differences.svg", paired)
        drawn.append(("Paired differences", f"{PAIRED} Blue ones exclude 0.", path))
    sweep.learning_curves(path := folder / "curves.svg", rows)
    caption = "A thin line for every trial, a thick one for the mean over seeds; the training loss is a running mean."
    drawn.append(("Learning curves", caption + LOSSES, path))
    sweep.dimension_errors(path := folder / "dimensions.svg", rows)
    caption = "Open-loop L1: bars are means over seeds, points are trials, lines need no training."
    drawn.append(("Errors per dimension of the action", caption, path))
    drawn += draw_features(folder, results)
    kept = {path.stem for path in (*draw_grids(folder, results), *(path for *_, path in drawn))}
    for file in folder.iterdir():  # an earlier report's, of trials that are no longer in the sweep
        if re.fullmatch(r"effects|differences|features|grids-\d+", file.stem) and file.stem not in kept:
            file.unlink()
    return drawn


def distinct_grids(results: Results) -> list[tuple[str, ActionGrid, Trial]]:
    """(label, grid, first trial that has it) of every grid; labels name only the axes on which the grids differ."""
    first: dict[str, tuple[Trial, ActionGrid]] = {}
    for trial in results.trials:
        if isinstance(grid := trial.grid, ActionGrid):
            first.setdefault((trial.folder / "grid.json").read_text(), (trial, grid))
    found = list(first.values())
    axes = [a for a in results.plan["axes"] if len({trial.values[a] for trial, _ in found}) > 1 or len(found) == 1]
    return [(", ".join(trial.values[axis] for axis in axes), grid, trial) for trial, grid in found]


def draw_grids(folder: Path, results: Results) -> list[Path]:
    """Figures of every distinct grid, for print. The page instead draws grids that can be turned."""
    found, drawn = distinct_grids(results), list[Path]()
    for number, start in enumerate(range(0, len(found), GRIDS_A_FIGURE), 1):
        labels, shown, trials = zip(*found[start : start + GRIDS_A_FIGURE], strict=True)
        drawn.append(folder / f"grids-{number}.png")
        grids.action_grids(drawn[-1], labels, shown, [t.arrays["actions"] for t in trials])
    return drawn


def viewer_data(results: Results) -> dict[str, Any]:
    """What grids.js draws: the edges of every variable, and some actions as base64 of int16[N, 6], 1 being 32767."""
    points, found = list[str](), []
    for label, grid, trial in distinct_grids(results):
        some = np.round(32767 * trial.arrays["actions"][:POINTS, :6].clip(-1, 1)).astype("<i2")
        text = base64.b64encode(some.tobytes()).decode()
        points += [] if text in points else [text]
        edges = [np.asarray(edges, np.float64).round(5).tolist() for edges in grid.edges]
        label = f"{label}: {grid.vocab_size:,} tokens" if label else f"{grid.vocab_size:,} tokens"
        found.append({"label": label, "edges": edges, "points": points.index(text)})
    return {"points": points, "grids": found}


def draw_features(folder: Path, results: Results) -> list[tuple[str, str, Path]]:
    """The spatial tables of one seed's trials that started from a checkpoint: before, adapted, and after training."""
    panels: dict[str, Any] = {}
    for trial in results.trials:
        arrays, values = trial.arrays, ", ".join(map(" ".join, trial.values.items()))
        for when, label in {"before": "pre-trained", "adapted": "adapted, not trained", "after": values}.items():
            if f"{when}_features" in arrays and trial.seed == min(t.seed for t in results.trials):
                panel = [arrays[f"{when}_{k}"] for k in ("theta", "phi", "features")]
                other = when == "adapted" and label in panels and not np.array_equal(panels[label][2], panel[2])
                panels.setdefault(f"{label}: {values}" if other else label, panel)
    if not panels:
        return []
    sweep.feature_maps(folder / "features.png", panels)
    return [("Spatial features", FEATURES, folder / "features.png")]


def _picture(path: Path) -> str:
    return svg_uri(path.read_text()) if path.suffix == ".svg" else data_uri("png", path.read_bytes())
