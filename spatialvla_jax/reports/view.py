"""Recordings for the Rerun viewer: an episode of a data set, a policy's predictions on it, a rollout.

Everything is on the timeline "step". The camera's frame (x right, y down, z forward, metres) has the image, the depth
and the point cloud. The robot's frame has the chunks as paths: sums of translations in robot units, because data has no
pose of the camera.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from spatialvla_jax.actions import DIMENSIONS, ActionGrid, ActionTokenizer
from spatialvla_jax.actions.normalization import unnormalize
from spatialvla_jax.data.loader import Episode
from spatialvla_jax.errors import InputError
from spatialvla_jax.evaluation.open_loop import predict
from spatialvla_jax.evaluation.rollouts import Infer
from spatialvla_jax.inference.policy import Policy
from spatialvla_jax.utils.atomic import replacing

POINTS = 12_000  # in a cloud; pixels are subsampled to about this many
COLOURS = {"expert": (60, 60, 60), "predicted": (213, 94, 0)}
BATCH_SIZE = 32  # frames of one call of the policy
ARC = 8  # points along each edge of a cell


def load_rerun() -> Any:
    """The module `rerun`. Raises InputError if it is not installed."""
    try:
        import rerun  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise InputError("rerun is not installed: pip install 'spatialvla-jax[view]'") from None
    return rerun


@contextlib.contextmanager
def recording(out: Path | None) -> Iterator[Any]:
    """A Rerun recording that is written to `out` by rename. If `out` is None, it opens the viewer. Raises InputError if
    Rerun is not installed or its viewer does not start."""
    rr = load_rerun()
    stream = rr.RecordingStream("spatialvla_jax")
    if out is None:
        try:
            stream.spawn()
        except RuntimeError as error:
            raise InputError(f"Rerun's viewer does not start ({error}): --out FILE.rrd writes a recording") from None
        stream.send_blueprint(_blueprint())
        yield stream
        stream.flush()
        return
    with replacing(out) as temporary:
        stream.save(temporary, default_blueprint=_blueprint())
        yield stream
        stream.disconnect()


def record_episode(stream: Any, episode: Episode, statistics: Mapping[str, Any], policy: Policy | None = None) -> None:
    """Record an episode as the loader gives it. With a `policy`, also records its prediction for each frame and the
    grid cells that it chose. `statistics` are the dataset's."""
    frames = episode.frames
    expert = unnormalize(np.asarray(frames.actions), statistics["action"])
    path = _path(np.zeros(3), episode.actions)
    predicted = ids = None
    if policy is not None:
        ids, actions = predict(policy, frames, BATCH_SIZE)
        predicted = unnormalize(actions, policy.processor.find_statistics(episode.dataset)["action"])
    _begin(stream, episode.instruction, *(COLOURS if policy is not None else ["expert"]))
    stream.log("robot/path", load_rerun().LineStrips3D([path], colors=[(180, 180, 180)]), static=True)
    for frame, step in enumerate(episode.steps):
        stream.set_time("step", sequence=step)
        depth = None if frames.depth is None else np.asarray(frames.depth[frame])
        _log_camera(stream, np.asarray(frames.image[frame]), np.asarray(frames.intrinsics[frame]), depth)
        _log_chunk(stream, "expert", path[step], expert[frame][np.asarray(frames.action_mask[frame])])
        if policy is not None and predicted is not None and ids is not None and np.isfinite(predicted[frame]).all():
            _log_chunk(stream, "predicted", path[step], predicted[frame])
            _log_cell(stream, policy.processor.grid, ids[frame, 0])


class RolloutRecorder:
    """Wraps the `infer` of `rollouts` and records what the policy saw and did, for one environment.

    It is called when a chunk is due, after `every` actions of the previous one (`ChunkExecutor.every`). The path of a
    chunk starts where those actions ended.
    """

    def __init__(self, stream: Any, infer: Infer, grid: ActionTokenizer, every: int) -> None:
        self.stream, self.infer, self.grid, self.every = stream, infer, grid, every
        self.step, self.begun, self.place = 0, False, np.zeros(3)

    def __call__(self, observations: list[dict[str, Any]], workers: list[int]) -> list[Any]:
        results = self.infer(observations, workers)
        (seen,), (result,) = observations, results
        if seen["reset"]:
            self.step, self.place = 0, np.zeros(3)
        if not self.begun:
            _begin(self.stream, seen["prompt"], "predicted")
            self.begun = True
        self.stream.set_time("step", sequence=self.step)
        _log_camera(self.stream, seen["image"], seen.get("intrinsics"), seen.get("depth"))
        if isinstance(result, Exception):
            self.stream.log("instruction", load_rerun().TextDocument(f"no action: {result}"))
            return results
        _log_chunk(self.stream, "predicted", self.place, result["actions"])
        _log_cell(self.stream, self.grid, result["action_ids"][0])
        executed = result["actions"][: self.every]
        self.place = _path(self.place, executed)[-1]
        self.step += len(executed)
        return results


def _begin(stream: Any, instruction: str, *names: str) -> None:
    rr = load_rerun()
    stream.log("instruction", rr.TextDocument(instruction), static=True)
    stream.log("camera", rr.ViewCoordinates.RDF, static=True)
    stream.log("robot", rr.ViewCoordinates.RIGHT_HAND_Z_UP, static=True)
    for name in names:
        lines = rr.SeriesLines(names=[f"{dimension} {name}" for dimension in DIMENSIONS[:-1]])
        stream.log(f"action/{name}", lines, static=True)


def _path(start: np.ndarray, actions: Float[np.ndarray, "L A"]) -> Float[np.ndarray, "L+1 3"]:
    return start + np.concatenate([np.zeros((1, 3)), np.cumsum(actions[:, :3], 0, dtype=np.float64)])


def _log_camera(
    stream: Any,
    image: UInt8[np.ndarray, "H W 3"],
    intrinsics: Float[np.ndarray, "3 3"] | None,
    depth: Float[np.ndarray, "H W"] | None,
) -> None:
    """Image, depth in metres and, with the intrinsics in pixels of the image, the point cloud."""
    rr, (H, W, _) = load_rerun(), image.shape
    if intrinsics is not None:
        pinhole = rr.Pinhole(image_from_camera=intrinsics, resolution=[W, H], camera_xyz=rr.ViewCoordinates.RDF)
        stream.log("camera/image", pinhole)
    stream.log("camera/image", rr.Image(image).compress(jpeg_quality=90))
    if depth is None:
        return
    stream.log("depth", rr.DepthImage(depth, meter=1.0))
    if intrinsics is None:
        return
    points, colours = point_cloud(image, depth, intrinsics)
    stream.log("camera/points", rr.Points3D(points, colors=colours, radii=rr.Radius.ui_points(2)))


def point_cloud(
    image: UInt8[np.ndarray, "H W 3"], depth: Float[np.ndarray, "H W"], intrinsics: Float[np.ndarray, "3 3"]
) -> tuple[Float[np.ndarray, "N 3"], UInt8[np.ndarray, "N 3"]]:
    """Points in metres in the camera's frame and their colours, at the centres of about `POINTS` pixels with a depth
    reading."""
    stride = max(1, round((depth.size / POINTS) ** 0.5))
    v, u = np.mgrid[: depth.shape[0] : stride, : depth.shape[1] : stride]
    z = depth[v, u]
    y = (v + 0.5 - intrinsics[1, 2]) / intrinsics[1, 1]
    x = (u + 0.5 - intrinsics[0, 2] - intrinsics[0, 1] * y) / intrinsics[0, 0]
    seen = z > 0
    return np.stack([x * z, y * z, z], axis=-1)[seen].astype(np.float32), image[v, u][seen]


def _log_chunk(stream: Any, name: str, start: np.ndarray, actions: Float[np.ndarray, "T A"]) -> None:
    """A chunk in robot units: its path from `start`, and its first action over time."""
    rr = load_rerun()
    path = rr.LineStrips3D([_path(start, actions)], colors=[COLOURS[name]])
    stream.log(f"robot/chunk/{name}", path)
    if len(actions):
        stream.log(f"action/{name}", rr.Scalars(actions[0, :-1]))
        stream.log(f"gripper/{name}", rr.Scalars(actions[0, -1]))


def _log_cell(stream: Any, grid: ActionTokenizer, ids: Int[np.ndarray, " n"]) -> None:
    """The ids of one action, and the cell of its translation in normalised units."""
    rr = load_rerun()
    for kind, number in {k: int(i) for k, i in zip(grid.kinds[::-1], ids[::-1], strict=True)}.items():
        stream.log(f"token/{kind}", rr.Scalars(number))
    if (ids >= 0).all():
        stream.log("grid/cell", rr.LineStrips3D(cell_edges(grid, ids), colors=[COLOURS["predicted"]]))


def cell_edges(grid: ActionTokenizer, ids: Int[np.ndarray, " n"]) -> list[Float[np.ndarray, "points 3"]]:
    """The twelve edges of the translation's cell that one action's ids name, in normalised units. The cell is part of a
    spherical shell, or a box of the linear grid."""
    if isinstance(grid, ActionGrid):
        start, size = grid.token_ranges[0]
        bins = np.unravel_index(np.clip(ids[0] - start, 0, size - 1), grid.num_bins[:3])
        sides = [np.asarray(edges)[[b, b + 1]] for edges, b in zip(grid.edges[:3], bins, strict=True)]
    else:  # a value is rounded up to its level
        levels = np.asarray(vars(grid)["levels"])
        sides = [levels[[max(i - 1, 0), i]] for i in np.clip(ids[:3], 0, len(levels) - 1)]
    edges = []
    for axis in range(3):
        for corner in np.ndindex(2, 2):
            ends = iter(corner)
            line = [_between(side) if i == axis else np.full(ARC, side[next(ends)]) for i, side in enumerate(sides)]
            edges.append(np.stack(line, axis=-1))
    if not isinstance(grid, ActionGrid):
        return edges
    return [
        np.stack([r * np.sin(t) * np.cos(p), r * np.sin(t) * np.sin(p), r * np.cos(t)], axis=-1)
        for t, p, r in (edge.T for edge in edges)
    ]


def _between(side: Float[np.ndarray, " 2"]) -> Float[np.ndarray, " points"]:
    return np.linspace(side[0], side[1], ARC)


def _blueprint() -> Any:
    import rerun.blueprint as rrb  # pyright: ignore[reportMissingImports]

    return rrb.Blueprint(
        rrb.Vertical(
            rrb.Horizontal(
                rrb.Spatial3DView(origin="camera", name="camera (metres)"),
                rrb.Spatial3DView(origin="robot", name="chunks (robot units)"),
                rrb.Spatial3DView(origin="grid", name="chosen cell (normalised)"),
            ),
            rrb.Horizontal(
                rrb.Spatial2DView(origin="camera/image", name="image"),
                rrb.Spatial2DView(origin="depth", name="depth"),
                rrb.TimeSeriesView(origin="action", name="action"),
                rrb.TimeSeriesView(origin="gripper", name="gripper"),
                rrb.Vertical(rrb.TextDocumentView(origin="instruction"), rrb.TimeSeriesView(origin="token")),
            ),
            row_shares=[3, 2],
        ),
        collapse_panels=True,
    )
