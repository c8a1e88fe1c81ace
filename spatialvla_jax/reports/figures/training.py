"""A run: its loss, and predicted trajectories beside the expert's."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from spatialvla_jax.actions import ActionGrid, ActionTokenizer
from spatialvla_jax.actions.grid import VARIABLES
from spatialvla_jax.reports.figures.style import BLUE, DARK, GREEN, GREY, ORANGE, RED, Pathlike, drawing


def loss_curve(path: Pathlike, records: Sequence[Mapping[str, Any]]) -> None:
    """Loss and token accuracies over the steps.

    `records` are those of metrics.jsonl: "step" with "loss", "accuracy/translation", "accuracy/rotation" and
    "accuracy/gripper" for training, the same under "val/" for validation; every key but "step" may be absent.
    """
    with drawing(path, 10.4, 3.6) as figure:
        left, right = figure.subplots(1, 2)

        _curve(left, records, "loss", BLUE, "training")
        _curve(left, records, "val/loss", RED, "validation")
        left.set(title="Loss", xlabel="step", ylabel="cross-entropy per token (nats)")
        left.set_ylim(bottom=0)

        for name, colour in (("translation", BLUE), ("rotation", GREEN), ("gripper", ORANGE)):
            _curve(right, records, f"accuracy/{name}", colour, name)
            _curve(right, records, f"val/accuracy/{name}", colour, f"{name}, val.")
        right.set(title="Token accuracy", xlabel="step", ylabel="fraction correct", ylim=(0, 1.02))

        places: list[dict[str, Any]] = [{"loc": "upper right"}, {"loc": "center left", "bbox_to_anchor": (1, 0.5)}]
        for axes, place in zip((left, right), places, strict=True):
            axes.grid()
            axes.set_xlim(left=0)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(**place)


def trajectories(path: Pathlike, episodes: Sequence[Mapping[str, Any]]) -> None:
    """Predicted against expert end-effector paths of one to three episodes: the running sums of their actions.

    Each episode is {"expert": f32[L, A], "predicted": f32[L, A], "title": str (optional)}, actions in robot units with
    the gripper 0 closed ... 1 open. A thick line is a closed gripper; triangles show where it closes and opens.
    """
    with drawing(path, 4.6 * len(episodes), 5, layout=None) as figure:
        figure.subplots_adjust(left=0, right=0.97, bottom=0.1, top=0.9, wspace=0.06)
        for i, episode in enumerate(episodes):
            axes = figure.add_subplot(1, len(episodes), i + 1, projection="3d")
            paths = {}
            for name, colour in (("expert", DARK), ("predicted", RED)):
                actions = np.asarray(episode[name], np.float64)
                paths[name] = np.concatenate([np.zeros((1, 3)), np.cumsum(actions[:, :3], 0)])
                _path(axes, paths[name], actions[:, -1] < 0.5, colour)
            _cube(axes, np.concatenate(list(paths.values())))
            axes.set_title(textwrap.fill(episode.get("title", ""), 44), pad=0)
        marks = [
            Line2D([], [], color=DARK, label="expert"),
            Line2D([], [], color=RED, label="predicted"),
            Line2D([], [], color=GREY, linewidth=4, label="gripper closed"),
            *(
                Line2D([], [], color=GREY, marker=marker, markersize=6, linestyle="", label=label)
                for marker, label in {"o": "start", "v": "closes", "^": "opens", "s": "end"}.items()
            ),
        ]
        figure.legend(handles=marks, loc="lower center", ncols=len(marks) if len(episodes) > 1 else 4)


def chunks(path: Pathlike, samples: Sequence[Mapping[str, Any]], dimensions: Sequence[str]) -> None:
    """Predicted and expert chunks under their image.

    Each sample is {"image": u8[H, W, 3], "expert": f32[T, A], "predicted": f32[T, A]}, normalised, with A `dimensions`,
    the last of them the gripper.
    """
    groups = {"translation": range(3), "rotation": range(3, len(dimensions) - 1), "gripper": [len(dimensions) - 1]}
    with drawing(path, 2.6 * max(len(samples), 2), 6.6) as figure:
        axes = figure.subplots(4, len(samples), squeeze=False, sharex="row", sharey="row")
        for column, sample in enumerate(samples):
            axes[0, column].imshow(sample["image"])
            axes[0, column].set_axis_off()
            steps = np.arange(1, len(sample["expert"]) + 1)
            for row, (name, indices) in enumerate(groups.items(), 1):
                for i, colour in zip(indices, (BLUE, ORANGE, GREEN, RED), strict=False):
                    axes[row, column].plot(steps, sample["expert"][:, i], color=colour, label=dimensions[i])
                    axes[row, column].plot(steps, sample["predicted"][:, i], "o:", color=colour, markersize=4)
                axes[row, column].set(ylim=(-1.08, 1.08), xticks=steps, ylabel="" if column else name)
                axes[row, column].grid()
        for row in (1, 2):
            axes[row, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
        marks = [Line2D([], [], color=GREY, label="expert"), Line2D([], [], color=GREY, ls=":", marker="o", ms=4)]
        marks[1].set_label("predicted, given the expert's tokens before it")
        figure.legend(handles=marks, loc="outside lower center", ncols=2)


def token_use(
    path: Pathlike,
    grid: ActionTokenizer,
    expert: Int[np.ndarray, "N T n"],
    predicted: Int[np.ndarray, "N T n"],
) -> None:
    """Which cells of the grid the expert's and the predicted tokens use: the share of each bin of each variable, and
    how many of each token's ids occur."""
    with drawing(path, 10.4, 4.6) as figure:
        all_axes = figure.subplots(2, 4).ravel()
        variables = _bins(grid, expert), _bins(grid, predicted)
        for axes, (name, (values, count)) in zip(all_axes, variables[0].items(), strict=False):
            guesses, _ = variables[1][name]
            place = np.arange(count)
            share = [np.bincount(x.ravel(), minlength=count) / x.size for x in (values, guesses)]
            axes.bar(place, share[0], width=1, color="#BBBBBB", label="expert")
            axes.stairs(share[1], np.arange(count + 1) - 0.5, color=RED, linewidth=1.2, label="predicted")
            axes.set(title=name, yticks=[], xlim=(-0.6, count - 0.4))
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        used = [[len(np.unique(x[..., i])) for x in (expert, predicted)] for i in range(expert.shape[-1])]
        rows = [
            f"{kind}: {theirs} of {size}, predicted {ours}"
            for kind, (theirs, ours), (_, size) in zip(grid.kinds, used, grid.token_ranges, strict=True)
        ]
        all_axes[-1].set_axis_off()
        text = f"ids in use, {expert.shape[0] * expert.shape[1]} actions\n" + "\n".join(rows)
        all_axes[-1].text(0, 1, text, va="top", fontsize=8)
        figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)


def _bins(grid: ActionTokenizer, ids: Int[np.ndarray, "N T n"]) -> dict[str, tuple[np.ndarray, int]]:
    """{variable: (bins i[N, T], number of bins)}, in the order of the tokens."""
    found, parts = {}, [ids[..., i] - start for i, (start, _) in enumerate(grid.token_ranges)]
    if not isinstance(grid, ActionGrid):
        return {name: (x, n) for name, x, (_, n) in zip(grid.dimensions, parts, grid.token_ranges, strict=True)}
    for part, first in zip(parts, (0, 3), strict=False):
        sizes = grid.num_bins[first : first + 3]
        bins = np.unravel_index(part, sizes)
        found |= dict(zip(VARIABLES[first : first + 3], zip(bins, sizes, strict=True), strict=True))
    return found | {"gripper": (parts[2], 2)}


def _curve(axes: Any, records: Sequence[Mapping[str, Any]], key: str, colour: str, label: str) -> None:
    points = np.array([(r["step"], r[key]) for r in records if key in r], float).reshape(-1, 2)
    if not len(points):
        return
    steps, values = points.T
    if key.startswith("val/"):
        axes.plot(steps, values, "--o", color=colour, markersize=3.5, linewidth=1.2, label=label)
        return
    # Pale raw values, and on top their running mean over a fiftieth of the run.
    width = max(1, len(values) // 50)
    mean = np.convolve(np.pad(values, (width // 2, (width - 1) // 2), "edge"), np.full(width, 1 / width), "valid")
    axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
    axes.plot(steps, mean, color=colour, linewidth=1.6, label=label)


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
