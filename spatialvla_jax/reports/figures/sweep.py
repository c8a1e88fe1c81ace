"""A sweep: effects of its axes, learning curves, errors by dimension, feature maps. Also written as PDF."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spatialvla_jax.actions import DIMENSIONS
from spatialvla_jax.reports.figures.style import DARK, SERIES, Pathlike, drawing


def effects(
    path: Pathlike, groups: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], baselines: Mapping[str, float]
) -> None:
    """One panel for every axis of a sweep, {axis: {value: errors}}: the trials as points, their mean with its standard
    error, and `baselines` as lines across. Errors are [combination with the other axes' values][seed]."""
    widths = [max(2.4, 0.75 * len(values)) for values in groups.values()]
    with drawing(path, max(4.6, sum(widths) + 1.6), 3.6, pdf=True) as figure:
        panels = figure.subplots(1, len(widths), sharey=True, squeeze=False, width_ratios=widths)[0]
        for axes, (axis, values) in zip(panels, groups.items(), strict=True):
            for i, (colour, errors) in enumerate(zip(_colours(values), values.values(), strict=True)):
                trials = np.concatenate([np.asarray(e) for e in errors])
                spread = np.linspace(-0.16, 0.16, len(trials)) if len(trials) > 1 else np.zeros(1)
                axes.plot(i + spread, trials, "o", color=colour, markersize=3.5, alpha=0.45, markeredgewidth=0)
                mean, error = _mean_error(errors)
                axes.errorbar(i, mean, error, fmt="_", color=colour, markersize=17, markeredgewidth=2, capsize=4)
            for (name, error), style in zip(baselines.items(), ("--", ":"), strict=True):
                axes.axhline(error, color=DARK, linewidth=1, linestyle=style, label=name)
            axes.set(xlabel=axis, xlim=(-0.6, len(values) - 0.4))
            longest = max(map(len, values))
            axes.set_xticks(
                range(len(values)), values, rotation=30 if longest > 7 else 0, ha="right" if longest > 7 else "center"
            )
            axes.grid(axis="y")
        panels[0].set_ylabel("L1, unseen episodes")
        panels[0].set_ylim(bottom=0)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)


def learning_curves(path: Pathlike, groups: Mapping[str, Mapping[str, Sequence[Sequence[Any]]]]) -> None:
    """One row for every axis of a sweep, {axis: {value: [combination][seed] of records as of `loss_curve`}}: training
    loss (a running mean over a twentieth of the run) and validation L1, the mean in a band of one standard error."""
    with drawing(path, 10.4, 3.4 * len(groups), pdf=True) as figure:
        for (axis, values), (left, right) in zip(
            groups.items(), figure.subplots(len(groups), 2, squeeze=False), strict=True
        ):
            for colour, (value, trials) in zip(_colours(values), values.items(), strict=True):
                for axes, key in ((left, "loss"), (right, "val/l1")):
                    _band(axes, trials, key, colour, value)
            left.set(xlabel="step", ylabel="cross-entropy per token (nats)", title="Training loss")
            right.set(xlabel="step", ylabel="L1, normalised units", title="Validation L1, teacher-forced")
            for axes in (left, right):
                axes.grid()
                axes.set_xlim(left=0)
            shown = left.get_legend_handles_labels()  # there may be no validation
            right.legend(*shown, title=axis, loc="center left", bbox_to_anchor=(1, 0.5))


def dimension_errors(
    path: Pathlike, groups: Mapping[str, Sequence[Sequence[Any]]], baselines: Mapping[str, Sequence[float] | np.ndarray]
) -> None:
    """Bars of L1 per dimension (x … gripper) for each value of an axis, {value: [combination][seed] of an error each}:
    the mean and its standard error; `baselines`, likewise, as marks over the bars."""
    with drawing(path, 10.4, 3.4, pdf=True) as figure:
        axes, width = figure.subplots(), 0.8 / len(groups)
        places = np.arange(len(DIMENSIONS))
        for i, (colour, (value, errors)) in enumerate(zip(_colours(groups), groups.items(), strict=True)):
            mean, error = _mean_error(errors)
            where = places + (i - (len(groups) - 1) / 2) * width
            axes.bar(where, mean, 0.92 * width, color=colour, label=value)
            axes.errorbar(where, mean, error, fmt="none", ecolor=DARK, elinewidth=0.9)
        for (name, error), style in zip(baselines.items(), ("--", ":"), strict=True):
            axes.hlines(error, places - 0.44, places + 0.44, color=DARK, linewidth=1.1, linestyle=style, label=name)
        axes.set_xticks(places, DIMENSIONS)
        axes.set_ylabel("L1, unseen episodes")
        axes.grid(axis="y")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


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
    with drawing(path, 4.2 * columns, 2.7 * lines, pdf=True) as figure:
        for i, (title, (theta, phi, f)) in enumerate(panels.items()):
            axes = figure.add_subplot(lines, columns, i + 1)
            mine, colours = np.split(colours, [f.shape[0] * f.shape[1]])
            axes.pcolormesh(phi, theta, mine.reshape(*f.shape[:2], 3))
            axes.set_title(textwrap.fill(title, 40))
            axes.set_xticks((-np.pi, 0, np.pi), ("−π", "0", "π"))
            axes.set_yticks((0, np.pi / 2, np.pi), ("0", "π/2", "π"))
            axes.set(xlabel="φ", ylabel="θ")
            axes.invert_yaxis()  # the z axis points up


def _colours(values: Any) -> list[str]:
    return [SERIES[i % len(SERIES)] for i in range(len(values))]


def _mean_error(combinations: Sequence[Any]) -> tuple[np.ndarray | np.float64, np.ndarray | np.float64 | None]:
    """Mean over combinations of axes' values, each [seeds, ...], and its standard error by seeds alone: combinations
    are chosen, not drawn. None where one has a single seed."""
    parts = [np.asarray(values, np.float64) for values in combinations]
    mean = np.mean([values.mean(0) for values in parts], axis=0)
    if min(map(len, parts)) < 2:
        return mean, None
    return mean, np.sqrt(np.sum([values.var(0, ddof=1) / len(values) for values in parts], axis=0)) / len(parts)


def _band(axes: Any, combinations: Sequence[Sequence[Any]], key: str, colour: str, label: str) -> None:
    curves = [[{r["step"]: r[key] for r in records if key in r} for records in seeds] for seeds in combinations]
    steps = sorted(set.intersection(*(set(curve) for seeds in curves for curve in seeds)))
    if not steps:
        return
    width = 1 if key.startswith("val/") else max(1, len(steps) // 20)
    pad = (width // 2, (width - 1) // 2)

    def smooth(curve: Mapping[int, float]) -> np.ndarray:
        return np.convolve(np.pad([curve[step] for step in steps], pad, "edge"), np.full(width, 1 / width), "valid")

    mean, error = _mean_error([[smooth(curve) for curve in seeds] for seeds in curves])
    style = "-o" if key.startswith("val/") else "-"
    axes.plot(steps, mean, style, color=colour, markersize=3, linewidth=1.5, label=label)
    if error is not None:
        axes.fill_between(steps, mean - error, mean + error, color=colour, alpha=0.18, linewidth=0)
