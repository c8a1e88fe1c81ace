"""A mixture as one self-contained HTML page, for readers who have never seen the data."""

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from spatialvla_jax.actions import DIMENSIONS, ActionGrid, ActionTokenizer, LinearGrid
from spatialvla_jax.actions.grid import RANGES, to_spherical
from spatialvla_jax.actions.normalization import normalize
from spatialvla_jax.data.index import Index
from spatialvla_jax.data.loader import Loader
from spatialvla_jax.reports.html import write_html
from spatialvla_jax.reports.player import playable, shorten
from spatialvla_jax.utils.atomic import parents_of
from spatialvla_jax.utils.storage import to_path

IMAGE_SIZE = 192  # pixels a side; the page's loader should decode to this size
EPISODES = 4  # shown per dataset
PLAYED = (4, 32)  # fewest and most frames per episode; more datasets, fewer frames
PLAYED_BYTES = 7_000  # assumed size of a frame's picture and depth, to choose the number of frames
IMAGE_BYTES = 6_000_000  # most bytes of all pictures together
FRAMES = 200_000  # most frames per dataset in its histograms; larger ones are subsampled evenly
INSTRUCTIONS = 30  # listed per dataset
BARS = 64
WIDTH, HEIGHT = 224, 72  # of a histogram

UNIT = ("−1", "0", "1")  # left end, middle and right end of an axis
SPHERICAL = (
    ("θ", "tilt from the z axis", ("0", "π/2", "π")),
    ("φ", "heading around the z axis", ("−π", "0", "π")),
    ("r", "size of the movement", ("0", "√3/2", "√3")),
)
LINEAR = (("x", "movement", UNIT), ("y", "movement", UNIT), ("z", "movement", UNIT))
ANGLES = (("roll", "rotation", UNIT), ("pitch", "rotation", UNIT), ("yaw", "rotation", UNIT))
GRIPPER = ("gripper", "0 closed, 1 open", ("0", "½", "1"))


def write_page(
    path: str | os.PathLike[str],
    loader: Loader,
    grid: ActionTokenizer,
    *,
    title: str,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the page of the loader's training mixture, by rename. The same data, grid and seed give the same bytes.

    Frames are shown as `loader` decodes them (`IMAGE_SIZE` suits the page). With more datasets, episodes have fewer
    frames and stronger compression, so that the page stays below 10 MB for up to some hundred datasets.
    `progress(datasets done, datasets)` is called meanwhile.
    """
    indexes, rows = loader.indexes(), loader.table()
    starts = np.cumsum([0, *(index.num_frames for index in indexes)])
    sections, total = [], 0.0
    count = int(np.clip(IMAGE_BYTES // (len(indexes) * EPISODES * PLAYED_BYTES), *PLAYED))
    limit = IMAGE_BYTES // (len(indexes) * EPISODES * count * 2)  # a picture and its depth
    for number, (index, row) in enumerate(zip(indexes, rows, strict=True)):
        if progress:
            progress(number, len(indexes))
        frames = np.linspace(0, index.num_frames - 1, min(index.num_frames, FRAMES)).round().astype(np.int64)
        statistics = loader.statistics[index.name]["action"]
        histograms = _histograms(normalize(index.arrays["action"][index.action_rows(frames)[0]], statistics), grid)
        total = total + index.num_frames * histograms
        episodes = []
        for shown in _samples(index, np.random.default_rng([seed, number]), count):
            batch = loader.frames(starts[number] + shown)
            episodes.append(playable(index, shown, np.asarray(batch.image), np.asarray(batch.intrinsics), limit))
        plots = _plots(histograms, grid, index.num_frames)
        sections.append(_section(index, row, statistics) | {"played": episodes, "plots": plots})
    if progress:
        progress(len(indexes), len(indexes))
    with parents_of(to_path(path)):
        write_html(
            path,
            "mixture.html",
            title=f"{title}: training data",
            rows=sections,
            phases=len(rows[0]["shares"]),
            top_share=max(max(row["shares"]) for row in rows),
            epoch_length=loader.mixture.epoch_length,
            levels=None if isinstance(grid, ActionGrid) else grid.vocab_size,
            together=_plots(total / starts[-1], grid, int(starts[-1])),
            dimensions=DIMENSIONS,
        )


def _histograms(actions: Float[np.ndarray, "N A"], grid: ActionTokenizer) -> Float[np.ndarray, "A n"]:
    """For every panel: the share of actions in each of `BARS` equal parts of its range."""
    first = np.asarray(to_spherical(actions[:, :3])) if isinstance(grid, ActionGrid) else actions[:, :3]
    values = np.concatenate([first, actions[:, 3:]], axis=1)
    counts = [
        np.histogram(np.clip(values[:, i], *bounds), BARS, bounds)[0] for i, (*_, bounds) in enumerate(_panels(grid))
    ]
    return np.stack(counts) / len(actions)


def _panels(grid: ActionTokenizer) -> list[tuple[tuple[str, str, tuple[str, str, str]], np.ndarray, Any]]:
    """(labels, bin edges, range) of the seven panels."""
    if isinstance(grid, ActionGrid):
        names, edges, ranges = (*SPHERICAL, *ANGLES), [np.asarray(edges) for edges in grid.edges], RANGES
    else:
        assert isinstance(grid, LinearGrid)
        names, edges, ranges = (*LINEAR, *ANGLES), [np.asarray(grid.levels)] * 6, ((-1.0, 1.0),) * 6
    return [*zip(names, edges, ranges, strict=True), (GRIPPER, np.asarray([0, 0.5, 1]), (0.0, 1.0))]


def _samples(index: Index, rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Up to `count` frames of each of a few episodes, evenly spaced from first to last. The episodes have different
    instructions if possible."""
    ends = index.arrays["episode_end"]
    chosen = rng.permutation(len(ends))[:1000]
    firsts = np.where(chosen > 0, ends[chosen - 1], 0)
    _, new = np.unique(index.language(firsts), return_index=True)
    order = [*sorted(new), *sorted(set(range(len(chosen))) - set(new))][:EPISODES]
    spans = [(firsts[i], ends[chosen[i]] - 1) for i in order]
    return [np.unique(np.linspace(first, last, count).round().astype(np.int64)) for first, last in spans]


def _section(index: Index, row: dict[str, Any], statistics: Any) -> dict[str, Any]:
    """The page's text about a dataset: everything but its pictures and action histograms."""
    spec = index.spec
    counts = np.bincount(index.language(np.arange(index.num_frames)), minlength=len(index.instructions))
    listed = np.argsort(-counts, kind="stable")[:INSTRUCTIONS]
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(row["skipped"].items()))
    depth = "in the data" if spec.depth else "none stored" if not spec.unread_depth else "stored, not read"
    columns = (statistics[key] for key in ("q01", "mean", "q99"))
    return row | {
        "name": index.name,
        "robot": spec.robot,
        "camera": spec.camera,
        "skipped": sum(row["skipped"].values()),
        "facts": (
            f"robot: {spec.robot or 'not stated'}",
            f"camera: {spec.camera}",
            f"depth: {depth}",
            f"{row['episodes']:,} of {row['read']:,} episodes used" + (f" (left out: {skipped})" if skipped else ""),
            f"{row['shares'][0]:.1%} of the training samples",
        ),
        "num_instructions": len(counts),
        "instructions": [(shorten(index.instructions[i]), counts[i]) for i in listed],
        "lengths": _lengths(np.diff(index.arrays["episode_end"], prepend=0)),
        "units": [*zip(DIMENSIONS, statistics["mask"], zip(*columns, strict=True), strict=True)],
    }


def _plots(histograms: Float[np.ndarray, "A n"], grid: ActionTokenizer, frames: int) -> list[dict[str, Any]]:
    """The seven histograms of `frames` actions, on a logarithmic axis that starts below the share of one action."""
    decades = max(1, math.ceil(math.log10(min(frames, FRAMES))))
    plots = []
    for share, ((symbol, words, ticks), edges, bounds) in zip(histograms, _panels(grid), strict=True):
        closed = share[: BARS // 2].sum()
        below = f"closed {closed:.0%}, open {1 - closed:.0%}" if symbol == "gripper" else f"{len(edges) - 1} bins"
        # 256 adjacent levels would merge into grey.
        lines = (edges[1:-1] - bounds[0]) / (bounds[1] - bounds[0]) if len(edges) < 100 else np.empty(0)
        heights = 1 + np.log10(np.maximum(share, 10.0**-decades)) / decades
        heights = np.where(share > 0, np.maximum(heights, 0.02), 0)  # even a single action is visible
        levels = [(1 - i / decades, f"{100 * 10.0**-i:g} %") for i in range(0, decades + 1, max(1, decades // 2))]
        bars = _bars(heights, lines, ticks, levels)
        plots.append(bars | {"symbol": symbol, "words": words, "below": below})
    return plots


def _bars(
    heights: Float[np.ndarray, " n"], lines: np.ndarray, ticks: tuple[str, ...], levels: list[tuple[float, str]]
) -> dict[str, Any]:
    """The paths of an SVG histogram. `heights` and the bin edges `lines` are in [0, 1]. The labels `ticks` are below,
    evenly spaced, and `levels`, pairs of height and label, on the left."""
    tops = HEIGHT * (1 - heights)
    outline = "".join(f"V{top:.1f}H{(i + 1) * WIDTH / len(heights):.4g}" for i, top in enumerate(tops))
    return {
        "outline": f"M0 {HEIGHT}{outline}V{HEIGHT}Z",
        "edges": "".join(f"M{x * WIDTH:.1f} 0V{HEIGHT}" for x in lines),
        "ticks": [(i * WIDTH / (len(ticks) - 1), text) for i, text in enumerate(ticks)],
        "levels": [(HEIGHT * (1 - height), text) for height, text in levels],
        "width": WIDTH,
        "height": HEIGHT,
    }


def _lengths(lengths: np.ndarray) -> dict[str, Any]:
    longest = int(lengths.max())
    counts, _ = np.histogram(lengths, min(BARS // 2, longest), (0.5, longest + 0.5))
    half, most = math.ceil(np.median(lengths)), int(counts.max())
    caption = f"shortest {lengths.min():,}, half of them up to {half:,}, longest {longest:,} steps"
    levels = [(0.0, "0"), (1.0, f"{most:,}")]
    return _bars(counts / most, np.empty(0), ("1", f"{longest:,} steps"), levels) | {"caption": caption}
