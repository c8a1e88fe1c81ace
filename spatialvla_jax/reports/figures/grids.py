"""Action grids: histograms of the actions with their bins, and the cells in space."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from spatialvla_jax.actions import DIMENSIONS, ActionGrid, LinearGrid, fit_gaussians, grid_variables
from spatialvla_jax.actions.grid import RANGES
from spatialvla_jax.reports.figures.style import BLUE, DARK, GREY, RED, Pathlike, drawing, fitted


def action_grid(
    path: Pathlike, grid: ActionGrid, actions: Float[np.ndarray, "N A"], source: str = "data", fit: bool = True
) -> None:
    """A grid over its data, as in the paper's Fig. 3.

    The upper row is in 3-D. First come the directions of translations, with the (theta, phi) cells on the unit sphere.
    Next are translations, with the cells cut by the planes z = 0 and y = 0, and then rotations. Below, each variable
    has its data, the Gaussian fitted to it, and the bin edges.

    `actions` f32[N, A] are normalised; `source` describes them in the legend. Without `fit` no Gaussian is drawn: for
    samples of the grid itself, it would differ from the grid's own.
    """
    actions = np.asarray(actions, np.float32).reshape(-1, grid.action_dim)
    values = grid_variables(actions)
    spherical = values[:, :3]
    shown = np.random.default_rng(0).permutation(len(actions))[:3000]
    edges = [np.asarray(e, np.float64) for e in grid.edges]

    with drawing(path, 12.6, 7) as figure:
        places = figure.add_gridspec(2, 6, height_ratios=[2.1, 1])
        solids = [figure.add_subplot(places[0, 2 * i : 2 * i + 2], projection="3d") for i in range(3)]
        _sphere(solids[0], edges, spherical[shown])
        _ball(solids[1], edges, actions[shown, :3], spherical[shown])
        _box(solids[2], edges, values[shown, 3:6])
        stats = fit_gaussians(actions) if fit else None
        for i, symbol in enumerate((r"$\theta$", r"$\phi$", "$r$", "roll", "pitch", "yaw")):
            axes = figure.add_subplot(places[1, i])
            _histogram(axes, values[:, i], edges[i], None if stats is None else stats[i], RANGES[i], source)
            if stats is not None:
                mu, sigma = stats[i].round(3) + 0.0  # no "-0"
                axes.set_title(f"$\\mu={mu:g}$, $\\sigma={sigma:g}$", fontsize=8.5)
            axes.set_xlabel(
                f"{symbol} (rad), {len(edges[i]) - 1} bins" if i < 2 else f"{symbol}, {len(edges[i]) - 1} bins"
            )
        handles, labels = figure.axes[-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)


def linear_grid(path: Pathlike, grid: LinearGrid, actions: Float[np.ndarray, "N A"], source: str = "data") -> None:
    """The baseline's levels, common to all dimensions, as ticks under each dimension's normalised actions."""
    levels = np.asarray(grid.levels)
    with drawing(path, 12.6, 5) as figure:
        places = figure.add_gridspec(2, 4)
        for i, name in enumerate(DIMENSIONS):
            axes = figure.add_subplot(places[divmod(i, 4)])
            axes.hist(actions[:, i], bins=80, range=(-1, 1), density=True, color="#BBD3E8", label=source)
            top = axes.get_ylim()[1]
            axes.vlines(levels, -0.12 * top, -0.02 * top, color=DARK, linewidth=0.4, label="levels")
            axes.set(xlabel=name, xlim=(-1.01, 1.01), ylim=(-0.13 * top, top), yticks=[])
            axes.spines["left"].set_visible(False)
        figure.suptitle(f"{len(levels)} levels a dimension, {grid.tokens_per_action} tokens an action", fontsize=10)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower right", ncols=2)


def action_grids(
    path: Pathlike,
    labels: Sequence[str],
    grids: Sequence[ActionGrid],
    actions: Sequence[Float[np.ndarray, "N A"]],
) -> None:
    """Grids side by side over normalised actions, as in the paper's Fig. 3: a column for each, with the pictures of
    `action_grid` from top to bottom."""
    width, style = max(2, len(grids)) * 3.1, {"axes.titlesize": 8.5, "font.size": 7.5}
    with drawing(path, width, 9.6, forms=("png", "pdf"), layout=None, style=style) as figure:
        figure.subplots_adjust(left=0, right=0.98, bottom=0.01, top=0.92, wspace=0.04, hspace=0.1)
        solids = figure.subplots(3, len(grids), squeeze=False, subplot_kw={"projection": "3d"})
        for column, label, grid, values in zip(solids.T, labels, grids, actions, strict=True):
            edges = [np.asarray(e, np.float64) for e in grid.edges]
            shown = np.asarray(values, np.float32)[:2500]
            variables = grid_variables(shown)
            _sphere(column[0], edges, variables)
            _ball(column[1], edges, shown[:, :3], variables)
            _box(column[2], edges, variables[:, 3:])
            bins, label = grid.num_bins, fitted(label).replace("$", r"\$")  # not mathematics
            column[0].set_title(f"{label}\n{grid.vocab_size:,} tokens\n$\\theta$, $\\phi$: {bins[0]} × {bins[1]}")
            column[1].set_title(f"$r$: {bins[2]}")
            column[2].set_title(f"roll, pitch, yaw: {' × '.join(map(str, bins[3:]))}")


def _histogram(
    axes: Any,
    values: Float[np.ndarray, " N"],
    edges: Float[np.ndarray, " n"],
    stats: Float[np.ndarray, " 2"] | None,
    bounds: tuple[float, float],
    source: str,
) -> None:
    mu, sigma = (0, 0) if stats is None else stats
    axes.hist(values, bins=80, range=bounds, density=True, color="#BBD3E8", label=source)
    top = axes.get_ylim()[1]
    x = np.linspace(*bounds, 400)
    if sigma > 0:
        density = np.exp(-(((x - mu) / sigma) ** 2) / 2) / sigma
        density /= np.trapezoid(density, x)  # normalised to the range, at which the grid truncates it
        axes.plot(x, density, color=RED, linewidth=1.6, label=f"Gaussian fitted to the {source}")
        top = np.clip(1.05 * density.max(), top, 2 * top)  # a narrow one may exceed the picture
    axes.vlines(edges, 0, top, color=GREY, linewidth=0.7, label="bin edges", zorder=1.5)
    axes.set_xlim(*bounds)
    axes.set_ylim(0, top)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def _sphere(axes: Any, edges: list[np.ndarray], spherical: np.ndarray) -> None:
    """Directions as points on the unit sphere with its (theta, phi) cells; the far side is paler."""
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
    """Translations coloured by r bin, with the cells that the planes z = 0 and y = 0 cut open."""
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
    """Rotations as points in front of three walls with the cells' edges; each axis has its own scale."""
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
    """The axes outside the sphere, with their names."""
    for name, tip in zip("xyz", np.eye(3) * radius, strict=True):
        axes.plot(*np.stack([tip, 1.16 * tip]).T, color=DARK, linewidth=1.4)
        axes.text(*(1.25 * tip), name, ha="center", va="center")
