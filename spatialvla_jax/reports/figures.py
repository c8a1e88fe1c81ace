"""Figures as PNG files: plain arrays in, a file out, written by rename. No pyplot, so no state is shared.

Those of a sweep's report are written as PDF, too, for papers.
"""

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from spatialvla_jax.actions import ActionGrid, LinearGrid, fit_gaussians
from spatialvla_jax.actions.gaussian import RANGES
from spatialvla_jax.actions.grid import to_spherical

# Okabe-Ito: told apart with any colour vision and in grey print.
BLUE, ORANGE, GREEN, RED, GREY, DARK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#9A9A9A", "#222222"

# As many as a sweep's axis may have values; more begin again.
SERIES = (BLUE, ORANGE, GREEN, RED, "#CC79A7", "#56B4E9", "#7A5C00", "#5E4FA2", GREY)

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.edgecolor": DARK,
    "mathtext.fontset": "dejavusans",
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "pdf.fonttype": 42,  # journals refuse the default, Type 3
}

Pathlike = str | os.PathLike[str]


def loss_curve(path: Pathlike, records: Sequence[Mapping[str, Any]]) -> None:
    """Loss and token accuracies over the steps.

    `records` are those of metrics.jsonl: "step" with "loss", "accuracy/translation", "accuracy/rotation" and
    "accuracy/gripper" for training, the same under "val/" for validation; every key but "step" may be absent.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)

        _curve(left, records, "loss", BLUE, "training")
        _curve(left, records, "val/loss", RED, "validation")
        left.set(title="Loss", xlabel="step", ylabel="cross-entropy per token (nats)")
        left.set_ylim(bottom=0)

        for name, colour in (("translation", BLUE), ("rotation", GREEN), ("gripper", ORANGE)):
            _curve(right, records, f"accuracy/{name}", colour, name)
            _curve(right, records, f"val/accuracy/{name}", colour, f"{name}, val.")
        right.set(title="Token accuracy", xlabel="step", ylabel="fraction correct", ylim=(0, 1.02))

        for axes, place in (
            (left, {"loc": "upper right"}),
            (right, {"loc": "center left", "bbox_to_anchor": (1, 0.5)}),
        ):
            axes.grid()
            axes.set_axisbelow(True)
            axes.set_xlim(left=0)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(**place)
        _save(figure, path)


def action_grid(path: Pathlike, grid: ActionGrid, actions: Float[np.ndarray, "N 7"], source: str = "data") -> None:
    """A grid over the data that it is for, as in the paper's Fig. 3.

    Left, in 3-D: the translations' directions with the (theta, phi) cells on the unit sphere, and the translations
    themselves with the cells cut by the planes z = 0 and y = 0. Right, per variable: the data, the Gaussian fitted to
    it and the bin edges. `actions` f32[N, 7] are normalised; `source` says in the legend what they are.
    """
    actions = np.asarray(actions, np.float32).reshape(-1, 7)
    spherical = np.asarray(to_spherical(actions[:, :3]))
    values = np.concatenate([spherical, actions[:, 3:6].clip(-1, 1)], 1)
    shown = np.random.default_rng(0).permutation(len(actions))[:3000]
    edges = [np.asarray(e, np.float64) for e in grid.edges]

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.6, 7), layout="constrained")
        places = figure.add_gridspec(2, 6, height_ratios=[2.1, 1])
        solids = [figure.add_subplot(places[0, 2 * i : 2 * i + 2], projection="3d") for i in range(3)]
        _sphere(solids[0], edges, spherical[shown])
        _ball(solids[1], edges, actions[shown, :3], spherical[shown])
        _box(solids[2], edges, values[shown, 3:6])
        stats = fit_gaussians(actions)
        for i, symbol in enumerate((r"$\theta$", r"$\phi$", "$r$", "roll", "pitch", "yaw")):
            axes = figure.add_subplot(places[1, i])
            _histogram(axes, values[:, i], edges[i], stats[i], RANGES[i], source)
            mu, sigma = stats[i].round(3) + 0.0  # no "-0"
            axes.set_title(f"$\\mu={mu:g}$, $\\sigma={sigma:g}$", fontsize=8.5)
            axes.set_xlabel(
                f"{symbol} (rad), {len(edges[i]) - 1} bins" if i < 2 else f"{symbol}, {len(edges[i]) - 1} bins"
            )
        handles, labels = figure.axes[-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        _save(figure, path)


def linear_grid(path: Pathlike, grid: LinearGrid, actions: Float[np.ndarray, "N 7"], source: str = "data") -> None:
    """The baseline's levels, which all dimensions share, as ticks under each dimension's normalised actions."""
    levels = np.asarray(grid.levels)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.6, 5), layout="constrained")
        names = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
        places = figure.add_gridspec(2, 4)
        for i, name in enumerate(names):
            axes = figure.add_subplot(places[divmod(i, 4)])
            axes.hist(actions[:, i], bins=80, range=(-1, 1), density=True, color="#BBD3E8", label=source)
            top = axes.get_ylim()[1]
            axes.vlines(levels, -0.12 * top, -0.02 * top, color=DARK, linewidth=0.4, label="levels")
            axes.set(xlabel=name, xlim=(-1.01, 1.01), ylim=(-0.13 * top, top), yticks=[])
            axes.spines["left"].set_visible(False)
        figure.suptitle(f"{len(levels)} levels a dimension, {grid.tokens_per_action} tokens an action", fontsize=10)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower right", ncols=2)
        _save(figure, path)


def trajectories(path: Pathlike, episodes: Sequence[Mapping[str, Any]]) -> None:
    """Predicted against expert end-effector paths of one to three episodes: the running sums of their actions.

    Each episode is {"expert": f32[L, 7], "predicted": f32[L, 7], "title": str (optional)}, actions in robot units with
    the gripper 0 closed ... 1 open. A thick line is a closed gripper; triangles show where it closes and opens.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(episodes), 5))
        figure.subplots_adjust(left=0, right=0.97, bottom=0.1, top=0.9, wspace=0.06)
        for i, episode in enumerate(episodes):
            axes = figure.add_subplot(1, len(episodes), i + 1, projection="3d")
            paths = {}
            for name, colour in (("expert", DARK), ("predicted", RED)):
                actions = np.asarray(episode[name], np.float64)
                paths[name] = np.concatenate([np.zeros((1, 3)), np.cumsum(actions[:, :3], 0)])
                _path(axes, paths[name], actions[:, 6] < 0.5, colour)
            _cube(axes, np.concatenate(list(paths.values())))
            axes.set_title(textwrap.fill(episode.get("title", ""), 44), pad=0)
        marks = [
            Line2D([], [], color=DARK, label="expert"),
            Line2D([], [], color=RED, label="predicted"),
            Line2D([], [], color=GREY, linewidth=4, label="gripper closed"),
            _mark("o", "start"),
            _mark("v", "closes"),
            _mark("^", "opens"),
            _mark("s", "end"),
        ]
        figure.legend(handles=marks, loc="lower center", ncols=len(marks) if len(episodes) > 1 else 4)
        _save(figure, path)


def effects(
    path: Pathlike, groups: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], baselines: Mapping[str, float]
) -> None:
    """One panel for every axis of a sweep, {axis: {value: errors}}: the trials as points, their mean with its standard
    error, and `baselines` as lines across. Errors are [combination with the other axes' values][seed]."""
    with matplotlib.rc_context(STYLE):
        widths = [max(2.4, 0.75 * len(values)) for values in groups.values()]
        figure = Figure(figsize=(max(4.6, sum(widths) + 1.6), 3.6), layout="constrained")
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
            axes.set_axisbelow(True)
        panels[0].set_ylabel("L1, unseen episodes")
        panels[0].set_ylim(bottom=0)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
        _save(figure, path, ("pdf",))


def learning_curves(path: Pathlike, groups: Mapping[str, Mapping[str, Sequence[Sequence[Any]]]]) -> None:
    """One row for every axis of a sweep, {axis: {value: [combination][seed] of records as of `loss_curve`}}: training
    loss (a running mean over a twentieth of the run) and validation L1, the mean in a band of one standard error."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 3.4 * len(groups)), layout="constrained")
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
                axes.set_axisbelow(True)
                axes.set_xlim(left=0)
            shown = left.get_legend_handles_labels()  # there may be no validation
            right.legend(*shown, title=axis, loc="center left", bbox_to_anchor=(1, 0.5))
        _save(figure, path, ("pdf",))


def dimension_errors(
    path: Pathlike, groups: Mapping[str, Sequence[Sequence[Any]]], baselines: Mapping[str, Sequence[float]]
) -> None:
    """Bars of L1 per dimension (x … gripper) for each value of an axis, {value: [combination][seed] of 7 errors}: the
    mean and its standard error; `baselines`, 7 errors each, as marks over the bars."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 3.4), layout="constrained")
        axes, width = figure.subplots(), 0.8 / len(groups)
        places = np.arange(7)
        for i, (colour, (value, errors)) in enumerate(zip(_colours(groups), groups.items(), strict=True)):
            mean, error = _mean_error(errors)
            where = places + (i - (len(groups) - 1) / 2) * width
            axes.bar(where, mean, 0.92 * width, color=colour, label=value)
            axes.errorbar(where, mean, error, fmt="none", ecolor=DARK, elinewidth=0.9)
        for (name, error), style in zip(baselines.items(), ("--", ":"), strict=True):
            axes.hlines(error, places - 0.44, places + 0.44, color=DARK, linewidth=1.1, linestyle=style, label=name)
        axes.set_xticks(places, ("x", "y", "z", "roll", "pitch", "yaw", "gripper"))
        axes.set_ylabel("L1, unseen episodes")
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        _save(figure, path, ("pdf",))


def action_grids(
    path: Pathlike,
    labels: Sequence[str],
    grids: Sequence[ActionGrid],
    actions: Sequence[Float[np.ndarray, "N 7"]],
) -> None:
    """Grids beside each other over normalised actions, as in the paper's Fig. 3: a column each, with the pictures of
    `action_grid` from top to bottom."""
    with matplotlib.rc_context({**STYLE, "axes.titlesize": 8.5, "font.size": 7.5}):
        figure = Figure(figsize=(max(2, len(grids)) * 3.1, 9.6))
        figure.subplots_adjust(left=0, right=0.98, bottom=0.01, top=0.92, wspace=0.04, hspace=0.1)
        solids = np.array(
            [
                [
                    figure.add_subplot(3, len(grids), row * len(grids) + i + 1, projection="3d")
                    for i in range(len(grids))
                ]
                for row in range(3)
            ]
        )
        for column, label, grid, values in zip(solids.T, labels, grids, actions, strict=True):
            edges = [np.asarray(e, np.float64) for e in grid.edges]
            shown = np.asarray(values, np.float32)[:2500]
            spherical = np.asarray(to_spherical(shown[:, :3]))
            _sphere(column[0], edges, spherical)
            _ball(column[1], edges, shown[:, :3], spherical)
            _box(column[2], edges, shown[:, 3:6].clip(-1, 1))
            bins = grid.num_bins
            column[0].set_title(f"{label}\n{grid.vocab_size:,} tokens\n$\\theta$, $\\phi$: {bins[0]} × {bins[1]}")
            column[1].set_title(f"$r$: {bins[2]}")
            column[2].set_title(f"roll, pitch, yaw: {' × '.join(map(str, bins[3:]))}")
        _save(figure, path, ("pdf",))


def feature_maps(path: Pathlike, panels: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
    """Spatial features over directions, as in the paper's Fig. 8: {title: (theta edges [n+1], phi edges [m+1], features
    [n, m, D])}. The first three principal components of all panels' features together are red, green and blue."""
    features = np.concatenate([f.reshape(-1, f.shape[-1]) for _, _, f in panels.values()]).astype(np.float64)
    centred = features - features.mean(0)
    components = centred @ np.linalg.svd(centred, full_matrices=False)[2][:3].T
    low, high = np.quantile(components, (0.01, 0.99), axis=0)
    colours = np.clip((components - low) / np.maximum(high - low, 1e-12), 0, 1)
    with matplotlib.rc_context(STYLE):
        columns = min(len(panels), 3)
        lines = -(-len(panels) // columns)
        figure = Figure(figsize=(4.2 * columns, 2.7 * lines), layout="constrained")
        for i, (title, (theta, phi, f)) in enumerate(panels.items()):
            axes = figure.add_subplot(lines, columns, i + 1)
            mine, colours = np.split(colours, [f.shape[0] * f.shape[1]])
            axes.pcolormesh(phi, theta, mine.reshape(*f.shape[:2], 3))
            axes.set_title(textwrap.fill(title, 40))
            axes.set_xticks((-np.pi, 0, np.pi), ("−π", "0", "π"))
            axes.set_yticks((0, np.pi / 2, np.pi), ("0", "π/2", "π"))
            axes.set(xlabel="φ", ylabel="θ")
            axes.invert_yaxis()  # the z axis points up
        _save(figure, path, ("pdf",))


def _colours(values: Any) -> list[str]:
    return [SERIES[i % len(SERIES)] for i in range(len(values))]


def _mean_error(combinations: Sequence[Any]) -> tuple[np.ndarray, np.ndarray | None]:
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


def quantisation(path: Pathlike, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Success of a policy whose actions go through grids, {name: {"success", "standard_error", "steps"}}, the names
    numbers of tokens, and of others ("expert", "linear 256", …) as lines across; beside it the steps of a success."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.4, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        grids = {int(name): row for name, row in results.items() if name.isdigit()}
        sizes = sorted(grids)
        rates = [100 * grids[size]["success"] for size in sizes]
        errors = [100 * grids[size]["standard_error"] for size in sizes]
        left.errorbar(sizes, rates, errors, color=BLUE, marker="o", markersize=5, capsize=3, label="action grid")
        right.plot(sizes, [grids[size]["steps"] for size in sizes], color=BLUE, marker="o", markersize=5)
        others = [name for name in results if not name.isdigit()]
        for name, colour, line in zip(others, (ORANGE, GREEN, DARK), ("--", "-.", ":"), strict=False):
            left.axhline(100 * results[name]["success"], color=colour, linestyle=line, linewidth=1.3, label=name)
            if results[name]["steps"] is not None:  # there was a success
                right.axhline(results[name]["steps"], color=colour, linestyle=line, linewidth=1.3)
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=40, ha="right")
            axes.minorticks_off()
            axes.set_xlabel("tokens")
            axes.grid()
            axes.set_axisbelow(True)
        left.set(title="The expert's success through tokens", ylabel="success (%)", ylim=(0, 103))
        right.set(title="Steps that a success takes", ylabel="steps")
        left.legend(loc="lower right")
        _save(figure, path)


def _curve(axes: Any, records: Sequence[Mapping[str, Any]], key: str, colour: str, label: str) -> None:
    points = np.array([(r["step"], r[key]) for r in records if key in r], float).reshape(-1, 2)
    if not len(points):
        return
    steps, values = points.T
    if key.startswith("val/"):
        axes.plot(steps, values, "--o", color=colour, markersize=3.5, linewidth=1.2, label=label)
        return
    # The raw values pale, and their running mean over a fiftieth of the run on top.
    width = max(1, len(values) // 50)
    mean = np.convolve(np.pad(values, (width // 2, (width - 1) // 2), "edge"), np.full(width, 1 / width), "valid")
    axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
    axes.plot(steps, mean, color=colour, linewidth=1.6, label=label)


def _histogram(
    axes: Any,
    values: Float[np.ndarray, " N"],
    edges: Float[np.ndarray, " n"],
    stats: Float[np.ndarray, " 2"],
    bounds: tuple[float, float],
    source: str,
) -> None:
    mu, sigma = stats
    axes.hist(values, bins=80, range=bounds, density=True, color="#BBD3E8", label=source)
    top = axes.get_ylim()[1]
    x = np.linspace(*bounds, 400)
    if sigma > 0:
        density = np.exp(-(((x - mu) / sigma) ** 2) / 2) / sigma
        density /= np.trapezoid(density, x)  # to its mass within the range, as the grid cuts it
        axes.plot(x, density, color=RED, linewidth=1.6, label=f"Gaussian fitted to the {source}")
        top = np.clip(1.05 * density.max(), top, 2 * top)  # a narrow one may leave the picture
    axes.vlines(edges, 0, top, color=GREY, linewidth=0.7, label="bin edges", zorder=1.5)
    axes.set_xlim(*bounds)
    axes.set_ylim(0, top)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def _sphere(axes: Any, edges: list[np.ndarray], spherical: np.ndarray) -> None:
    """Directions as points on the unit sphere under its (theta, phi) cells; the far side is paler."""
    _view(axes, (1, 1, 1), 1.28)
    _arrows(axes, 1)
    theta, phi, _ = edges[:3]
    lines = [_direction(np.full(181, t), np.linspace(-np.pi, np.pi, 181)) for t in theta[1:-1]]
    lines += [_direction(np.linspace(0, np.pi, 91), np.full(91, p)) for p in phi[:-1]]
    for line in lines:
        near = _near(axes, line)
        for side, colour, width in ((~near, "#E2E2E2", 0.5), (near, "#777777", 0.6)):
            axes.plot(*np.where(side[:, None], line, np.nan).T, color=colour, linewidth=width, zorder=1)
    points = _direction(spherical[:, 0], spherical[:, 1])
    near = _near(axes, points)
    axes.scatter(*points[~near].T, s=2, color=BLUE, alpha=0.08, linewidths=0, depthshade=False)
    axes.scatter(*points[near].T, s=4, color=BLUE, alpha=0.6, linewidths=0, depthshade=False)
    axes.set_title(f"translation, direction only: {len(theta) - 1} × {len(phi) - 1} cells of $\\theta$, $\\phi$")


def _ball(axes: Any, edges: list[np.ndarray], xyz: np.ndarray, spherical: np.ndarray) -> None:
    """Translations coloured by their r bin, with the cells that the planes z = 0 and y = 0 cut open."""
    theta, phi, r = edges[:3]
    reach = np.quantile(spherical[:, 2], 0.99)
    shells = r[1:-1][r[1:-1] <= max(reach, r[1])]
    outer = shells[-1] if len(shells) else max(reach, 1e-3)
    _view(axes, (outer,) * 3, 1.28)
    _arrows(axes, outer)
    circle = np.linspace(-np.pi, np.pi, 181)
    for radius in shells:
        axes.plot(*(radius * _direction(np.full(181, np.pi / 2), circle)).T, color="#777777", linewidth=0.7)
        axes.plot(
            *(radius * _direction(np.abs(circle), np.where(circle < 0, np.pi, 0))).T, color="#BBBBBB", linewidth=0.7
        )
    for p in phi[:-1]:
        axes.plot(*np.stack([np.zeros(3), outer * _direction(np.pi / 2, p)]).T, color="#777777", linewidth=0.5)
    for t in theta:
        for p in (0, np.pi):
            axes.plot(*np.stack([np.zeros(3), outer * _direction(t, p)]).T, color="#BBBBBB", linewidth=0.5)
    inside = spherical[:, 2] <= outer
    shell = np.searchsorted(r[1:-1], spherical[inside, 2], side="right")
    axes.scatter(
        *xyz[inside].T,
        c=shell,
        cmap="viridis",
        vmin=0,
        vmax=1.2 * max(shell.max(initial=0), 1),
        s=4,
        alpha=0.6,
        linewidths=0,
        depthshade=False,
    )
    axes.set_title(f"translation: {len(r) - 1} bins of $r$ (colour), cells cut at $z=0$, $y=0$")


def _box(axes: Any, edges: list[np.ndarray], angles: np.ndarray) -> None:
    """Rotations as points in front of three walls ruled with the cells; each axis to its own scale."""
    reach = np.maximum(np.quantile(np.abs(angles), 0.995, axis=0), 1e-3)
    _view(axes, reach, 0.95)
    for wall, side in enumerate((-1, 1, -1)):
        for across in {0, 1, 2} - {wall}:
            ruled = edges[3 + across][np.abs(edges[3 + across]) < reach[across]]
            for edge, colour in [*((e / reach[across], "#AAAAAA") for e in ruled), (-1, DARK), (1, DARK)]:
                line = np.tile([[-1.0], [1.0]], 3)
                line[:, wall], line[:, across] = side, edge
                axes.plot(*(line * reach).T, color=colour, linewidth=0.6)
    for i, (name, place) in enumerate((("roll", (0, -1.2, -1.1)), ("pitch", (1.2, 0, -1.1)), ("yaw", (1.15, 1.15, 0)))):
        axes.text(*(np.array(place) * reach), f"{name}\n±{reach[i]:.2g}", ha="center", va="center")
    inside = (np.abs(angles) <= reach).all(1)
    axes.scatter(*angles[inside].T, s=4, color=BLUE, alpha=0.5, linewidths=0, depthshade=False)
    axes.set_title(f"rotation: {' × '.join(str(len(e) - 1) for e in edges[3:])} cells of roll, pitch, yaw")


def _direction(theta: Any, phi: Any) -> np.ndarray:
    theta, phi = np.broadcast_arrays(theta, phi)
    return np.stack([np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)], -1)


def _near(axes: Any, points: np.ndarray) -> np.ndarray:
    """Which points of the unit sphere face the viewer."""
    return points @ _direction(np.deg2rad(90 - axes.elev), np.deg2rad(axes.azim)) > 0


def _view(axes: Any, reach: Sequence[float] | np.ndarray, zoom: float) -> None:
    """A bare box from -reach to reach of each axis."""
    axes.view_init(elev=22, azim=-58)
    axes.set_proj_type("ortho")
    axes.set(**{f"{k}lim": (-x, x) for k, x in zip("xyz", reach, strict=True)})
    axes.set_box_aspect((1, 1, 1), zoom=zoom)
    axes.set_axis_off()


def _arrows(axes: Any, radius: float) -> None:
    """The axes as they leave the sphere, named."""
    for name, tip in zip("xyz", np.eye(3) * radius, strict=True):
        axes.plot(*np.stack([tip, 1.16 * tip]).T, color=DARK, linewidth=1.4)
        axes.text(*(1.25 * tip), name, ha="center", va="center")


def _path(axes: Any, points: Float[np.ndarray, "L 3"], closed: np.ndarray, colour: str) -> None:
    """`points` has one more row than `closed`: where each action starts, and the end."""
    axes.plot(*points.T, color=colour, linewidth=1.3)
    thick = np.concatenate([closed, [False]]) | np.concatenate([[False], closed])
    gaps = np.where(thick[:, None], points, np.nan)
    axes.plot(*gaps.T, color=colour, linewidth=4, alpha=0.35, solid_capstyle="round")
    change = np.flatnonzero(np.diff(closed.astype(int))) + 1
    for i in change:
        axes.plot(*points[i : i + 1].T, "v" if closed[i] else "^", color=colour, markersize=7, markeredgecolor="white")
    axes.plot(*points[:1].T, "o", color=colour, markersize=6, markeredgecolor="white")
    axes.plot(*points[-1:].T, "s", color=colour, markersize=6, markeredgecolor="white")


def _cube(axes: Any, points: Float[np.ndarray, "N 3"]) -> None:
    """Equal scales: a cube around all points."""
    low, high = points.min(0), points.max(0)
    middle, half = (low + high) / 2, max((high - low).max() / 2, 1e-6) * 1.05
    axes.set(**{f"{k}lim": (m - half, m + half) for k, m in zip("xyz", middle, strict=True)})
    axes.set_proj_type("ortho")
    axes.view_init(elev=24, azim=-58)
    axes.set_box_aspect((1, 1, 1), zoom=0.95)
    for name, axis in zip("xyz", (axes.xaxis, axes.yaxis, axes.zaxis), strict=True):
        axis.set_pane_color((0.97, 0.97, 0.97, 1))
        axis.line.set_color("#BBBBBB")
        axis.set_major_locator(MaxNLocator(4))
        axis.set_label_text(rf"$\Sigma\,\Delta {name}$")
        axis.labelpad = 1
    axes.tick_params(labelsize=7.5, pad=1)


def _mark(marker: str, label: str) -> Line2D:
    return Line2D([], [], color=GREY, marker=marker, markersize=6, linestyle="", label=label)


def _save(figure: Figure, path: Pathlike, also: tuple[str, ...] = ()) -> None:
    path, canvas = Path(path), FigureCanvasAgg(figure)
    for form in ("png", *also):
        temporary = path.with_name(f".{path.name}.tmp")
        canvas.print_figure(temporary, format=form, dpi=150, facecolor="white")
        os.replace(temporary, path if form == "png" else path.with_suffix(f".{form}"))
