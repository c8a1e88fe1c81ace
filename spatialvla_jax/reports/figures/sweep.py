"""A sweep: every trial by its factors, differences from a reference, learning curves, errors by dimension, features.

Factors are never averaged over: the one along an axis is in the ticks or the colours, the others are in colours,
markers or separate rows. Open points are trials that have not reached their plateau. Also written as PDF.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from spatialvla_jax.actions import DIMENSIONS
from spatialvla_jax.reports.comparisons import Difference, Facet, summary, words
from spatialvla_jax.reports.figures.style import DARK, GREY, SERIES, Pathlike, drawing, fitted
from spatialvla_jax.reports.trials import (
    L1,
    QUANTISATION,
    SUCCESS,
    TEACHER_FORCED,
    TRAINING_LOSS,
    Quantity,
    Trial,
    of_dimension,
)

MARKERS = "osD^vP*"
FORMS = ("svg", "pdf")
PLAIN = {"text.parse_math": False}  # a name may have dollar signs
ACROSS: dict[str, dict[str, Any]] = {
    "mean action": {"color": DARK, "linewidth": 1.1, "linestyle": "--"},
    "last action held": {"color": DARK, "linewidth": 1.1, "linestyle": ":"},
    QUANTISATION.name: {"color": GREY, "linewidth": 2},
}
LONG = 100  # points drawn per curve


def effects(
    path: Pathlike,
    facets: Sequence[Facet],
    quantities: Sequence[Quantity],
) -> None:
    """A row for every axis and a column for every quantity. Each trial is a point, the mean over seeds a dash, and the
    interval of success a line. Lines across the open-loop L1 are each trial's baselines and the quantisation error."""
    rows = list(dict.fromkeys(facet.axis for facet in facets))
    lines = max(fitted(value).count("\n") for facet in facets for value in facet.groups)
    with drawing(path, 5.6 * len(quantities) + 2.4, (3.1 + lines) * len(rows), forms=FORMS, style=PLAIN) as figure:
        for axis, panels in zip(rows, figure.subplots(len(rows), len(quantities), squeeze=False), strict=True):
            mine = [facet for facet in facets if facet.axis == axis]
            values = list(dict.fromkeys(value for facet in mine for value in facet.groups))
            for axes, quantity in zip(panels, quantities, strict=True):
                for number, facet in enumerate(mine):
                    _points(axes, quantity, facet, values, number, len(mine))
                axes.set(xlabel=fitted(axis), ylabel=quantity.label, xlim=(-0.6, len(values) - 0.4))
                counts = [sorted({len(facet.groups[v]) for facet in mine if v in facet.groups}) for v in values]
                ticks = [f"{fitted(v)}\nn = {' or '.join(map(str, n))}" for v, n in zip(values, counts, strict=True)]
                slanted = max(map(len, values)) > 46 / len(values)
                axes.set_xticks(
                    range(len(values)), ticks, rotation=25 if slanted else 0, ha="right" if slanted else "center"
                )
                axes.set_ylim(bottom=0, top=105 if quantity.unit == "%" else None)
                axes.grid(axis="y")
            handles, labels = panels[0].get_legend_handles_labels()
            if any(trial.plateau is False for facet in mine for trials in facet.groups.values() for trial in trials):
                handles.append(Line2D([], [], marker="o", color=GREY, markerfacecolor="white", linestyle=""))
                labels.append("plateau not reached")
            panels[-1].legend(handles, labels, loc="center left", bbox_to_anchor=(1, 0.5))


def _points(axes: Any, quantity: Quantity, facet: Facet, values: Sequence[str], number: int, count: int) -> None:
    """The trials of a facet at their values' positions, and their means, joined by a line."""
    colour, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
    offset, means = (number - (count - 1) / 2) * 0.8 / count, dict[float, float]()
    for value, trials in facet.groups.items():
        place = values.index(value) + offset
        numbers = [(trial.numbers[quantity.key], trial.plateau) for trial in trials if quantity.key in trial.numbers]
        for i, (y, plateau) in enumerate(numbers):
            x = place + (i - (len(numbers) - 1) / 2) * min(0.09, 0.5 / count / len(numbers))
            face = "white" if plateau is False else colour
            axes.plot(x, y, marker, color=colour, markerfacecolor=face, markersize=4.5, markeredgewidth=1)
        if numbers:
            means[place] = float(np.mean([y for y, _ in numbers]))
        if quantity == SUCCESS and numbers:
            axes.plot((place, place), summary(SUCCESS, trials)["interval"], color=colour, linewidth=1.2)
        if quantity == L1:
            known = {name: numbers[L1.key] for name, numbers in trials[0].baselines.items()}
            floor = trials[0].numbers.get(QUANTISATION.key)
            known |= {} if floor is None else {QUANTISATION.name: floor}
            for name, y in known.items():
                label = name if number == 0 and value == next(iter(facet.groups)) else None
                axes.hlines(y, place - 0.4 / count, place + 0.4 / count, label=label, **ACROSS[name])
    axes.plot(*zip(*sorted(means.items()), strict=True), color=colour, linewidth=0.7, alpha=0.6)
    axes.plot([*means], [*means.values()], "_", color=colour, markersize=13, markeredgewidth=2)
    if facet.others:
        axes.plot([], [], marker, color=colour, markersize=4.5, label=fitted(words(facet.others)))


def forest(path: Pathlike, columns: Mapping[Quantity, Sequence[Difference]]) -> None:
    """Differences from the reference, one line each: every pair of trials as a point, their mean and its interval."""
    rows = list(dict.fromkeys(d.axis for found in columns.values() for d in found))
    labels = {
        axis: dict.fromkeys(d.place for found in columns.values() for d in found if d.axis == axis) for axis in rows
    }
    heights = [sum(fitted(label).count("\n") + 1 for label in labels[axis]) + 1 for axis in rows]
    with drawing(
        path, 3 + 4.6 * len(columns), 0.27 * sum(heights) + 0.7 * len(rows), forms=FORMS, style=PLAIN
    ) as figure:
        panels = figure.subplots(len(rows), len(columns), squeeze=False, height_ratios=heights)
        for axis, line in zip(rows, panels, strict=True):
            places = {label: i for i, label in enumerate(labels[axis])}
            for axes, (quantity, found) in zip(line, columns.items(), strict=True):
                for difference in (d for d in found if d.axis == axis):
                    y, known = places[difference.place], difference.interval
                    colour = GREY if difference.conclusion(quantity) not in ("better", "worse") else SERIES[0]
                    axes.plot(difference.pairs, np.full(len(difference.pairs), y), "o", color=GREY, markersize=3)
                    if known:
                        axes.plot(known, (y, y), color=colour, linewidth=1.6)
                    axes.plot(difference.mean, y, "D", color=colour, markersize=5)
                    count = f"n = {len(difference.pairs)}"
                    axes.annotate(count, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=7)
                axes.axvline(0, color=DARK, linewidth=0.8)
                axes.set_yticks([*places.values()], [*map(fitted, places)] if axes is line[0] else [])
                axes.set_ylim(len(places) - 0.5, -0.5)
                better = "smaller" if quantity == L1 else "larger"
                axes.set_title(fitted(f"{axis}, {better} is better"), loc="left", fontsize=9)
                axes.set_xlabel(f"difference of {quantity.name} ({quantity.unit.replace('%', 'points')})")
                axes.grid(axis="x")


def learning_curves(path: Pathlike, facets: Sequence[Facet]) -> None:
    """A row for every facet: training loss (a running mean over a twentieth of the run) and teacher-forced L1. Each
    trial is a thin line, the mean over seeds a thick one."""
    with drawing(path, 10.4, 2.9 * len(facets), forms=FORMS, style=PLAIN) as figure:
        for facet, (left, right) in zip(facets, figure.subplots(len(facets), 2, squeeze=False), strict=True):
            for i, (value, trials) in enumerate(facet.groups.items()):
                for axes, key in ((left, "loss"), (right, "val/l1")):
                    _curves(axes, [trial.curve(key) for trial in trials], SERIES[i % len(SERIES)], key)
                left.plot([], [], color=SERIES[i % len(SERIES)], label=fitted(f"{value} (n = {len(trials)})"))
            left.set(xlabel="training step", ylabel=TRAINING_LOSS.label)
            right.set(xlabel="training step", ylabel=TEACHER_FORCED.label)
            for axes in (left, right):
                axes.grid()
                axes.set_xlim(left=0)
            title = "\n".join(map(fitted, (facet.axis, *([f"at {words(facet.others)}"] if facet.others else []))))
            right.legend(*left.get_legend_handles_labels(), title=title, loc="center left", bbox_to_anchor=(1, 0.5))


def _curves(axes: Any, curves: Sequence[Sequence[tuple[int, float]]], colour: str, key: str) -> None:
    steps = sorted(set.intersection(*(set(step for step, _ in curve) for curve in curves)))
    if not steps:
        return
    width = 1 if key.startswith("val/") else max(1, len(steps) // 20)
    pad, shown = (width // 2, (width - 1) // 2), slice(None, None, -(-len(steps) // LONG))
    drawn = []
    for curve in curves:
        values = [dict(curve)[step] for step in steps]
        drawn.append(np.convolve(np.pad(values, pad, "edge"), np.full(width, 1 / width), "valid")[shown])
        if len(curves) > 1:
            axes.plot(steps[shown], drawn[-1], color=colour, linewidth=0.6, alpha=0.5)
    style = "-o" if key.startswith("val/") else "-"
    axes.plot(steps[shown], np.mean(drawn, axis=0), style, color=colour, markersize=2.5, linewidth=1.6)


def dimension_errors(path: Pathlike, facets: Sequence[Facet]) -> None:
    """A row for every facet: bars of the mean open-loop L1 of each action dimension, each trial as a point, and the
    baselines as marks over the bars."""
    with drawing(path, 10.4, 2.7 * len(facets), forms=FORMS, style=PLAIN) as figure:
        for facet, (axes,) in zip(facets, figure.subplots(len(facets), 1, squeeze=False), strict=True):
            first: Trial = next(iter(facet.groups.values()))[0]
            names = first.result["evaluation"].get("dimensions", DIMENSIONS)
            keys, places = [of_dimension(name).key for name in names], np.arange(len(names))
            width = 0.8 / len(facet.groups)
            for i, (value, trials) in enumerate(facet.groups.items()):
                errors = np.array([[trial.numbers[key] for key in keys] for trial in trials])
                where, colour = places + (i - (len(facet.groups) - 1) / 2) * width, SERIES[i % len(SERIES)]
                axes.bar(where, errors.mean(0), 0.9 * width, color=colour, label=fitted(f"{value} (n = {len(trials)})"))
                if len(trials) > 1:
                    axes.plot(np.tile(where, len(trials)), errors.ravel(), "o", color=DARK, markersize=1.8)
                for name, numbers in trials[0].baselines.items():
                    errors, label = [numbers[key] for key in keys], None if i else name
                    axes.hlines(errors, where - width / 2, where + width / 2, label=label, **ACROSS[name])
            axes.set_xticks(places, names)
            axes.set(xlabel="dimension of the action", ylabel=L1.label.replace(" (", "\n("))
            axes.grid(axis="y")
            title = "\n".join(map(fitted, (facet.axis, *([f"at {words(facet.others)}"] if facet.others else []))))
            axes.legend(title=title, loc="center left", bbox_to_anchor=(1, 0.5))


def feature_maps(path: Pathlike, panels: Mapping[str, Sequence[np.ndarray]]) -> None:
    """Spatial features over directions, as in the paper's Fig. 8: {title: (theta edges [n+1], phi edges [m+1], features
    [n, m, D])}. The first three principal components of all panels' features together are red, green and blue."""
    features = np.concatenate([f.reshape(-1, f.shape[-1]) for _, _, f in panels.values()]).astype(np.float64)
    centred = features - features.mean(0)
    components = centred @ np.linalg.svd(centred, full_matrices=False)[2][:3].T
    low, high = np.quantile(components, (0.01, 0.99), axis=0)
    colours = np.clip((components - low) / np.maximum(high - low, 1e-12), 0, 1)
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    with drawing(path, 4.2 * columns, 2.7 * lines, forms=("png", "pdf"), style=PLAIN) as figure:
        for i, (title, (theta, phi, f)) in enumerate(panels.items()):
            axes = figure.add_subplot(lines, columns, i + 1)
            mine, colours = np.split(colours, [f.shape[0] * f.shape[1]])
            axes.pcolormesh(phi, theta, mine.reshape(*f.shape[:2], 3))
            axes.set_title(textwrap.fill(title, 40))
            axes.set_xticks((-np.pi, 0, np.pi), ("−π", "0", "π"))
            axes.set_yticks((0, np.pi / 2, np.pi), ("0", "π/2", "π"))
            axes.set(xlabel="φ", ylabel="θ")
            axes.invert_yaxis()  # the z axis points up
