"""A mixture as one self-contained HTML page for somebody who has never seen the data: no script, no external file."""

import io
import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from spatialvla_jax.actions import DIMENSIONS, ActionGrid, ActionTokenizer, LinearGrid
from spatialvla_jax.actions.grid import RANGES, to_spherical
from spatialvla_jax.actions.normalization import normalize
from spatialvla_jax.data.index import Index
from spatialvla_jax.data.loader import Loader
from spatialvla_jax.reports.html import data_uri, write_html
from spatialvla_jax.utils.atomic import parents_of
from spatialvla_jax.utils.storage import to_path

IMAGE_SIZE = 192  # pixels a side: what the page's loader should decode to
EPISODES = 4  # shown of each dataset, three frames each
IMAGE_BYTES = 3_000_000  # of all JPEGs together
FRAMES = 200_000  # of each dataset at most, evenly spaced, go into its histograms
INSTRUCTIONS = 30  # listed of each dataset
BARS = 64
WIDTH, HEIGHT = 224, 72  # of a histogram

SPHERICAL = (
    ("θ", "tilt from the z axis", "0", "π"),
    ("φ", "heading around the z axis", "−π", "π"),
    ("r", "size of the movement", "0", "√3"),
)
LINEAR = (("x", "movement", "−1", "1"), ("y", "movement", "−1", "1"), ("z", "movement", "−1", "1"))
ANGLES = (("roll", "rotation", "−1", "1"), ("pitch", "rotation", "−1", "1"), ("yaw", "rotation", "−1", "1"))
GRIPPER = ("gripper", "0 closed, 1 open", "0", "1")


def write_page(
    path: str | os.PathLike[str],
    loader: Loader,
    grid: ActionTokenizer,
    *,
    title: str,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the page of the loader's training mixture, by rename. Same data, grid and seed: same bytes.

    Frames are shown as `loader` decodes them (`IMAGE_SIZE` suits the page), compressed so that the page stays below
    5 MB up to some hundred datasets. `progress(datasets done, datasets)` is called meanwhile.
    """
    indexes, rows = loader.indexes(), loader.table()
    starts = np.cumsum([0, *(index.num_frames for index in indexes)])
    sections, total = [], 0.0
    for number, (index, row) in enumerate(zip(indexes, rows, strict=True)):
        if progress:
            progress(number, len(indexes))
        frames = np.linspace(0, index.num_frames - 1, min(index.num_frames, FRAMES)).round().astype(np.int64)
        statistics = loader.statistics[index.name]["action"]
        histograms = _histograms(normalize(index.arrays["action"][index.action_rows(frames)[0]], statistics), grid)
        total = total + index.num_frames * histograms
        shown = _samples(index, np.random.default_rng([seed, number]))
        images = loader.frames(starts[number] + np.concatenate(shown)).image
        strips = np.split(images, np.cumsum([len(steps) for steps in shown])[:-1])
        limit = IMAGE_BYTES // (len(indexes) * EPISODES * 3)
        strips = [_strip(index, *pair, limit) for pair in zip(shown, strips, strict=True)]
        sections.append(_section(index, row, statistics) | {"strips": strips, "plots": _plots(histograms, grid)})
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
            together=_plots(total / starts[-1], grid),
            image_size=IMAGE_SIZE,
        )


def _histograms(actions: Float[np.ndarray, "N A"], grid: ActionTokenizer) -> Float[np.ndarray, "A n"]:
    """For every panel: the share of actions in each of `BARS` equal parts of its range."""
    first = np.asarray(to_spherical(actions[:, :3])) if isinstance(grid, ActionGrid) else actions[:, :3]
    values = np.concatenate([first, actions[:, 3:]], axis=1)
    counts = [
        np.histogram(np.clip(values[:, i], *bounds), BARS, bounds)[0] for i, (*_, bounds) in enumerate(_panels(grid))
    ]
    return np.stack(counts) / len(actions)


def _panels(grid: ActionTokenizer) -> list[tuple[tuple[str, str, str, str], np.ndarray, Any]]:
    """(labels, bin edges, range) of the seven panels."""
    if isinstance(grid, ActionGrid):
        names, edges, ranges = (*SPHERICAL, *ANGLES), [np.asarray(edges) for edges in grid.edges], RANGES
    else:
        assert isinstance(grid, LinearGrid)
        names, edges, ranges = (*LINEAR, *ANGLES), [np.asarray(grid.levels)] * 6, ((-1.0, 1.0),) * 6
    return [*zip(names, edges, ranges, strict=True), (GRIPPER, np.asarray([0, 0.5, 1]), (0.0, 1.0))]


def _samples(index: Index, rng: np.random.Generator) -> list[np.ndarray]:
    """First, middle and last frame of a few episodes, of different instructions where there are."""
    ends = index.arrays["episode_end"]
    chosen = rng.permutation(len(ends))[:1000]
    firsts = np.where(chosen > 0, ends[chosen - 1], 0)
    _, new = np.unique(index.language(firsts), return_index=True)
    order = [*sorted(new), *sorted(set(range(len(chosen))) - set(new))][:EPISODES]
    spans = [(firsts[i], ends[chosen[i]] - 1) for i in order]
    return [np.unique([first, (first + last) // 2, last]) for first, last in spans]


def _strip(index: Index, frames: np.ndarray, images: UInt8[np.ndarray, "n S S 3"], limit: int) -> dict[str, Any]:
    episode = int(index.episode(frames[0]))
    return {
        "episode": episode,
        "length": int(index.arrays["episode_end"][episode] - frames[0]),
        "instruction": _words(index.instructions[index.language(frames[0])]),
        "images": [
            (frame - frames[0] + 1, data_uri("jpeg", _jpeg(image, limit)))
            for frame, image in zip(frames.tolist(), images, strict=True)
        ],
    }


def _jpeg(image: UInt8[np.ndarray, "H W 3"], limit: int) -> bytes:
    """At most `limit` bytes, at the best quality that allows; if none does, of half the size."""
    for quality in (85, 70, 55, 40, 25):
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "JPEG", quality=quality, optimize=True)
        if stream.tell() <= limit:
            break
    else:
        if len(image) > 16:
            return _jpeg(np.asarray(Image.fromarray(image).reduce(2)), limit)
    return stream.getvalue()


def _section(index: Index, row: dict[str, Any], statistics: Any) -> dict[str, Any]:
    """What the page says of a dataset, but for its pictures and histograms of actions."""
    spec = index.spec
    counts = np.bincount(index.language(np.arange(index.num_frames)), minlength=len(index.instructions))
    listed = np.argsort(-counts, kind="stable")[:INSTRUCTIONS]
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(row["skipped"].items()))
    depth = "in the data" if spec.depth else "none stored" if not spec.unread_depth else "stored, not read"
    columns = (statistics[key] for key in ("q01", "mean", "q99"))
    return row | {
        "name": index.name,
        "robot": spec.robot,
        "camera": _camera(index),
        "skipped": sum(row["skipped"].values()),
        "facts": (
            f"robot: {spec.robot or 'not stated'}",
            f"camera: {_camera(index)}",
            f"depth: {depth}",
            f"{row['episodes']:,} of {row['read']:,} episodes used" + (f" (left out: {skipped})" if skipped else ""),
            f"{row['shares'][0]:.1%} of the training samples",
        ),
        "num_instructions": len(counts),
        "instructions": [(_words(index.instructions[i]), counts[i]) for i in listed],
        "lengths": _lengths(np.diff(index.arrays["episode_end"], prepend=0)),
        "units": [*zip(DIMENSIONS, statistics["mask"], zip(*columns, strict=True), strict=True)],
    }


def _camera(index: Index) -> str:
    if index.spec.intrinsics:
        return "in the data"
    return "known" if index.spec.known_camera else "default"


def _words(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"


def _plots(histograms: Float[np.ndarray, "A n"], grid: ActionTokenizer) -> list[dict[str, Any]]:
    plots = []
    for share, ((symbol, words, low, high), edges, bounds) in zip(histograms, _panels(grid), strict=True):
        closed = share[: BARS // 2].sum()
        below = f"closed {closed:.0%}, open {1 - closed:.0%}" if symbol == "gripper" else f"{len(edges) - 1} bins"
        # 256 levels side by side are a grey sheet.
        lines = (edges[1:-1] - bounds[0]) / (bounds[1] - bounds[0]) if len(edges) < 100 else np.empty(0)
        plots.append(_bars(share, lines, low, high) | {"symbol": symbol, "words": words, "below": below})
    return plots


def _bars(share: Float[np.ndarray, " n"], lines: np.ndarray, low: str, high: str) -> dict[str, Any]:
    """The paths of an SVG histogram; heights are square roots. `lines` are positions in [0, 1]."""
    tops = HEIGHT - (HEIGHT - 4) * np.sqrt(share / max(share.max(), 1e-12))
    outline = "".join(f"V{top:.1f}H{(i + 1) * WIDTH / len(share):.4g}" for i, top in enumerate(tops))
    return {
        "outline": f"M0 {HEIGHT}{outline}V{HEIGHT}Z",
        "edges": "".join(f"M{x * WIDTH:.1f} 0V{HEIGHT}" for x in lines),
        **{"low": low, "high": high, "width": WIDTH, "height": HEIGHT},
    }


def _lengths(lengths: np.ndarray) -> dict[str, Any]:
    longest = int(lengths.max())
    counts, _ = np.histogram(lengths, min(BARS // 2, longest), (0.5, longest + 0.5))
    half = math.ceil(np.median(lengths))
    caption = f"shortest {lengths.min():,}, half of them up to {half:,}, longest {longest:,} steps"
    return _bars(counts / len(lengths), np.empty(0), "1", f"{longest:,} steps") | {"caption": caption}
