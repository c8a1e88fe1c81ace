"""A mixture as one self-contained HTML page for somebody who has never seen the data: no script, no external file."""

import base64
import html
import io
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from spatialvla_jax.actions import DIMENSIONS, ActionGrid, ActionTokenizer, LinearGrid
from spatialvla_jax.actions.gaussian import RANGES
from spatialvla_jax.actions.grid import to_spherical
from spatialvla_jax.actions.normalization import normalize
from spatialvla_jax.data.index import Index
from spatialvla_jax.data.loader import Loader
from spatialvla_jax.utils.atomic import write_text

IMAGE_SIZE = 192  # pixels a side: what the page's loader should decode to
EPISODES = 4  # shown of each dataset, three frames each
IMAGE_BYTES = 3_000_000  # of all JPEGs together
FRAMES = 200_000  # of each dataset at most, evenly spaced, go into its histograms
INSTRUCTIONS = 30  # listed of each dataset
BARS = 64

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
    path = Path(path)
    indexes, rows = loader.indexes(), loader.table()
    starts = np.cumsum([0, *(index.num_frames for index in indexes)])
    sections, total = [], 0.0
    for number, (index, row) in enumerate(zip(indexes, rows, strict=True)):
        if progress:
            progress(number, len(indexes))
        histograms = _histograms(_normalized(loader, index), grid)
        total = total + index.num_frames * histograms
        shown = _samples(index, np.random.default_rng([seed, number]))
        images = loader.frames(starts[number] + np.concatenate(shown)).image
        strips = np.split(images, np.cumsum([len(steps) for steps in shown])[:-1])
        limit = IMAGE_BYTES // (len(indexes) * EPISODES * 3)
        figures = "".join(_strip(index, *pair, limit) for pair in zip(shown, strips, strict=True))
        sections.append(_section(number, index, row, loader.statistics[index.name], figures, histograms, grid))
    if progress:
        progress(len(indexes), len(indexes))
    together = total / starts[-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, _page(title, loader, indexes, rows, together, grid, sections))


def _normalized(loader: Loader, index: Index) -> Float[np.ndarray, "N A"]:
    frames = np.linspace(0, index.num_frames - 1, min(index.num_frames, FRAMES)).round().astype(np.int64)
    return normalize(index.arrays["action"][index.action_rows(frames)[0]], loader.statistics[index.name]["action"])


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
    _, new = np.unique(index.arrays["language"][firsts], return_index=True)
    order = [*sorted(new), *sorted(set(range(len(chosen))) - set(new))][:EPISODES]
    spans = [(firsts[i], ends[chosen[i]] - 1) for i in order]
    return [np.unique([first, (first + last) // 2, last]) for first, last in spans]


def _strip(index: Index, frames: np.ndarray, images: UInt8[np.ndarray, "n S S 3"], limit: int) -> str:
    episode = int(index.episode(frames[0]))
    length = int(index.arrays["episode_end"][episode] - frames[0])
    which = "first, middle and last" if length > 2 else "all"
    pictures = "".join(
        f'<img src="data:image/jpeg;base64,{base64.b64encode(_jpeg(image, limit)).decode()}" '
        f'width="{IMAGE_SIZE}" height="{IMAGE_SIZE}" alt="step {frame - frames[0] + 1} of {length}">'
        for frame, image in zip(frames.tolist(), images, strict=True)
    )
    words = _words(index.instructions[index.arrays["language"][frames[0]]])
    return (
        f'<figure><div class="strip">{pictures}</div><figcaption>“{words}”'
        f"<small>episode {episode}: {which} of {length} frames</small></figcaption></figure>"
    )


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


def _section(
    number: int, index: Index, row: dict[str, Any], statistics: Any, figures: str, histograms: np.ndarray, grid: Any
) -> str:
    spec = index.spec
    lengths = np.diff(index.arrays["episode_end"], prepend=0)
    counts = np.bincount(index.arrays["language"], minlength=len(index.instructions))
    listed = np.argsort(-counts, kind="stable")[:INSTRUCTIONS]
    left = len(counts) - len(listed)
    instructions = "".join(
        f"<li>{_words(index.instructions[i])} <small>{counts[i]:,} frames</small></li>" for i in listed
    )
    skipped = ", ".join(f"{count:,} {html.escape(reason)}" for reason, count in sorted(row["skipped"].items()))
    facts = [
        f"robot: {html.escape(spec.robot or 'not stated')}",
        f"camera: {_camera(index)}",
        f"depth: {'in the data' if spec.depth else 'none stored' if not spec.unread_depth else 'stored, not read'}",
        f"{row['episodes']:,} of {row['read']:,} episodes used" + (f" (left out: {skipped})" if skipped else ""),
        f"{row['shares'][0]:.1%} of the training samples",
    ]
    return f"""
<section id="dataset-{number}">
<h2>{html.escape(index.name)}</h2>
<p class="facts">{" · ".join(facts)}</p>
<div class="strips">{figures}</div>
<details><summary>{len(counts):,} different instruction{"s" * (len(counts) != 1)}</summary>
<ul>{instructions}</ul>{f"<p>and {left:,} more</p>" if left else ""}</details>
<h3>Actions</h3>
<div class="panels">{_plots(histograms, grid)}</div>
<div class="pair">
<div><h3>Episode lengths</h3>{_lengths(lengths)}</div>
<div><h3>What −1 and 1 stand for</h3>{_units(statistics["action"])}</div>
</div>
</section>"""


def _camera(index: Index) -> str:
    if index.spec.intrinsics:
        return "in the data"
    return "known" if index.spec.known_camera else "default"


def _words(text: str) -> str:
    return html.escape(text if len(text) <= 200 else f"{text[:200]}…")


def _plots(histograms: Float[np.ndarray, "A n"], grid: ActionTokenizer) -> str:
    plots = []
    for share, ((symbol, words, low, high), edges, bounds) in zip(histograms, _panels(grid), strict=True):
        closed = share[: BARS // 2].sum()
        below = f"closed {closed:.0%}, open {1 - closed:.0%}" if symbol == "gripper" else f"{len(edges) - 1} bins"
        # 256 levels side by side are a grey sheet.
        lines = (edges[1:-1] - bounds[0]) / (bounds[1] - bounds[0]) if len(edges) < 100 else np.empty(0)
        plots.append(f"<figure>{_bars(share, lines, low, high)}<figcaption><b>{symbol}</b> {words}")
        plots.append(f"<small>{below}</small></figcaption></figure>")
    return "".join(plots)


def _bars(share: Float[np.ndarray, " n"], lines: np.ndarray, low: str, high: str) -> str:
    """An SVG histogram; heights are square roots. `lines` are positions in [0, 1]."""
    width, height = 224, 72
    tops = height - (height - 4) * np.sqrt(share / max(share.max(), 1e-12))
    step = width / len(share)
    outline = "".join(f"V{top:.1f}H{(i + 1) * step:.4g}" for i, top in enumerate(tops))
    edges = "".join(f"M{x * width:.1f} 0V{height}" for x in lines)
    return (
        f'<svg viewBox="-2 0 {width + 4} {height + 15}" role="img">'
        f'<path class="bar" d="M0 {height}{outline}V{height}Z"/><path class="edge" d="{edges}"/>'
        f'<path class="axis" d="M0 {height}H{width}"/>'
        f'<text x="0" y="{height + 12}">{low}</text>'
        f'<text x="{width}" y="{height + 12}" text-anchor="end">{high}</text></svg>'
    )


def _lengths(lengths: np.ndarray) -> str:
    longest = int(lengths.max())
    counts, _ = np.histogram(lengths, min(BARS // 2, longest), (0.5, longest + 0.5))
    return (
        f'<figure class="lengths">{_bars(counts / len(lengths), np.empty(0), "1", f"{longest:,} steps")}'
        f"<figcaption>shortest {lengths.min():,}, half of them up to {math.ceil(np.median(lengths)):,}, "
        f"longest {longest:,} steps</figcaption></figure>"
    )


def _units(statistics: Any) -> str:
    note = "in the robot’s own units, a step: 1 % of the values lie below −1 and 1 % above 1"
    cells = zip(DIMENSIONS, statistics["mask"], *(statistics[row] for row in ("q01", "mean", "q99")), strict=True)
    body = "".join(
        f"<tr><th>{name}</th>"
        + (
            f"<td>{low:.3g}</td><td>{mean:.3g}</td><td>{high:.3g}</td></tr>"
            if mask
            else '<td colspan="3">as it is</td></tr>'
        )
        for name, mask, low, mean, high in cells
    )
    return f"<table><tr><th></th><th>−1</th><th>mean</th><th>1</th></tr>{body}</table><small>{note}</small>"


def _page(
    title: str,
    loader: Loader,
    indexes: tuple[Index, ...],
    rows: list[dict[str, Any]],
    together: np.ndarray,
    grid: ActionTokenizer,
    sections: list[str],
) -> str:
    phases = len(rows[0]["shares"])
    top = max(max(row["shares"]) for row in rows)
    body = []
    for number, (index, row) in enumerate(zip(indexes, rows, strict=True)):
        shares = "".join(
            f'<td class="share"><span style="width:{60 * share / top:.1f}%"></span>{share:.2%}</td>'
            for share in row["shares"]
        )
        body.append(
            f'<tr><th><a href="#dataset-{number}">{html.escape(index.name)}</a></th>'
            f"<td>{html.escape(index.spec.robot) or '–'}</td><td>{_camera(index)}</td><td>{row['episodes']:,}</td>"
            f"<td>{sum(row['skipped'].values()):,}</td><td>{row['frames']:,}</td><td>{row['weight']:g}</td>"
            f"{shares}<td>{row['passes']:.2f}</td></tr>"
        )
    every = f'<h3>All datasets together, every frame once</h3><div class="panels">{_plots(together, grid)}</div>'
    heads = "".join(f"<th>share{f' in phase {i + 1}' if phases > 1 else ''}</th>" for i in range(phases))
    episodes, frames = (sum(row[key] for row in rows) for key in ("episodes", "frames"))
    name = html.escape(title)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: training data</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{name}: training data</h1>
<p>Recordings of robots, {len(rows):,} dataset{"s" * (len(rows) != 1)} with {episodes:,} episodes and {frames:,} frames
in all. In an episode a robot does what an instruction in words says. For every frame the model sees the camera image
and the instruction, and learns which action the robot takes next. Images are shown as the model gets them, squeezed
into a square.</p>

<h2>The mixture</h2>
<p>Training draws its samples from all datasets at once. The <b>share</b> is how much of the training each one makes up;
it follows from its weight and its size{", and changes in the course of the training" if phases > 1 else ""}.
<b>Passes</b> says how often each of its frames is seen in one epoch of {loader.mixture.epoch_length:,} samples, the
time after which every dataset has been seen in full. <b>Skipped</b> episodes are left out, for lack of an instruction
or because they are damaged. The <b>camera</b>'s focal length and centre are needed to place what it sees in space: they
are stored in the data, known from elsewhere, or a common default where nobody wrote them down.</p>
<div class="scroll"><table class="mixture">
<tr><th>dataset</th><th>robot</th><th>camera</th><th>episodes</th><th>skipped</th><th>frames</th><th>weight</th>
{heads}<th>passes</th></tr>
{"".join(body)}
</table></div>

<h2>The actions</h2>
<p>{_explanation(grid)}</p>
{every if len(rows) > 1 else ""}
{"".join(sections)}
</body>
</html>
"""


def _explanation(grid: ActionTokenizer) -> str:
    movement = (
        "The movement is a direction and a size: θ is its angle to the z axis, φ its heading around that axis, r its "
        "length; no movement has 0 in all three."
        if isinstance(grid, ActionGrid)
        else "The movement is along x, y and z."
    )
    bins = (
        "The thin lines are the edges of the bins that the model's action tokens stand for: where many actions lie, "
        "the bins should be narrow."
        if isinstance(grid, ActionGrid)
        else f"The model's action tokens stand for {grid.vocab_size} even levels of each."
    )
    return f"""An action moves the robot's hand from one frame to the next, turns it and opens or closes the gripper.
{movement} Roll, pitch and yaw turn the hand about x, y and z. Each dataset has its own units, so movement and rotation
are scaled such that all but the rarest 2 % of the values lie between −1 and 1; the rest is cut off there, which may
show as a bar at either end. A bar is as high as the square root of how many actions lie there, so that rare ones stay
visible. {bins}"""


STYLE = """
:root { color-scheme: light dark; --text: #1c2024; --soft: #60666d; --line: #d9dde1; --back: #fff; --bar: #0072b2;
  --edge: #d55e00; --share: #cfe3f1; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7ea; --soft: #9aa2aa; --line: #3a4046; --back: #16191c;
  --bar: #56b4e9; --edge: #e69f00; --share: #1f4259; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1240px; margin: 2em auto; padding: 0 1.5em; color: var(--text);
  background: var(--back); }
p { max-width: 54em; } a { color: inherit; } small { color: var(--soft); }
h1 { font-size: 1.8em; } h2 { margin-top: 2em; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
h3 { font-size: 1em; margin: 1.6em 0 .4em; }
.facts { color: var(--soft); max-width: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .25em .7em; text-align: right; border-bottom: 1px solid var(--line); font-weight: normal; }
tr:first-child th { color: var(--soft); }
.mixture th:first-child, .mixture th:nth-child(-n+3), .mixture td:nth-child(-n+3) { text-align: left; }
.share { position: relative; min-width: 11em; }
.share span { position: absolute; left: 0; top: 15%; bottom: 15%; background: var(--share); z-index: -1; }
figure { margin: 0; } figcaption small { display: block; }
.strips { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 560px), 1fr)); gap: 1.4em; }
.strip { display: flex; gap: 4px; } .strip img { flex: 0 1 192px; min-width: 0; height: auto; border-radius: 3px; }
.strips figcaption { overflow-wrap: anywhere; max-width: 580px; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(44%, 240px), 1fr)); gap: 1em 1.6em; }
.pair { display: flex; flex-wrap: wrap; gap: 0 4em; } .lengths { width: 300px; }
details { margin-top: 1em; } summary { cursor: pointer; }
svg { width: 100%; display: block; }
svg text { font-size: 10px; fill: var(--soft); }
.bar { fill: var(--bar); } .edge { stroke: var(--edge); stroke-width: .6; fill: none; }
.axis { stroke: var(--soft); fill: none; stroke-width: .8; }
"""
