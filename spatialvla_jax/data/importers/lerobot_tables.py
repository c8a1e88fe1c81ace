"""Reads LeRobot datasets (v2.0, v2.1 and v3.0 on disk): their tables, and the frames of their videos.

The formats are those that huggingface/lerobot writes (`lerobot_dataset.py`, `dataset_metadata.py` and
`convert_dataset_v21_to_v30.py` there): v2 has one parquet file and one video a camera for every episode; v3 packs many
episodes into each file and says in meta/episodes where in the video one begins and ends.
"""

import dataclasses
import importlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spatialvla_jax.errors import InputError

CODEBASE_VERSIONS = ("v2.0", "v2.1", "v3.0")
JPEG_QUALITY = 95  # of video frames; images inside the parquet files are kept byte for byte
STATE = "observation.state"


@dataclasses.dataclass(frozen=True)
class Episode:
    """Where one episode lies."""

    number: int
    length: int  # rows
    data: Path
    video: Path | None = None  # None: the images are in `data`
    start: float = 0.0  # seconds into the video
    stop: float = np.inf


@dataclasses.dataclass(frozen=True)
class LeRobot:
    """One camera of a LeRobot dataset."""

    root: Path
    camera: str
    fps: float
    shapes: dict[str, tuple[int, ...]]  # of "action" and, if there, "observation.state"
    names: str  # of the action's numbers, as the dataset gives them
    tasks: dict[int, str]
    splits: dict[str, tuple[Episode, ...]]


def open_lerobot(src: str | os.PathLike[str], camera: str | None = None) -> LeRobot:
    """The tables of a LeRobot dataset. Raises InputError when it is none, of another version or without `camera`."""
    root = Path(src)
    try:
        return _open(root, camera)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{root / 'meta'} is not that of a LeRobot dataset: {error!r}") from error


def _open(root: Path, camera: str | None) -> LeRobot:
    file = root / "meta" / "info.json"
    info = read_json(file)
    version = info.get("codebase_version")
    if version not in CODEBASE_VERSIONS:
        raise InputError(f"{file} has codebase_version {version!r}: {', '.join(CODEBASE_VERSIONS)} are read")
    features = info["features"]
    cameras = [
        key for key, feature in features.items() if feature["dtype"] in ("video", "image") and not _depth(feature)
    ]
    if camera is None and len(cameras) == 1:
        camera = cameras[0]
    if camera is None or camera not in cameras:
        what = f"no camera {camera!r}" if camera else "not just one camera"
        raise InputError(f"{root} has {what}: choose --camera from {', '.join(cameras) or 'none'}")
    if "action" not in features:
        raise InputError(f"{root} has no feature 'action': it has {', '.join(features)}")
    read = _episodes_v3 if version.startswith("v3") else _episodes_v2
    episodes = read(root, info, camera if features[camera]["dtype"] == "video" else None)
    if not episodes:
        raise InputError(f"{root} has no episodes")
    return LeRobot(
        root=root,
        camera=camera,
        fps=float(info["fps"]),
        shapes={key: tuple(features[key]["shape"]) for key in ("action", STATE) if key in features},
        names=json.dumps(features["action"].get("names")),
        tasks=_tasks(root, version),
        splits=_splits(root, info, episodes),
    )


def read_episode(source: LeRobot, episode: Episode) -> dict[str, Any]:
    """One episode in the form that the written dataset's features describe. Raises InputError."""
    where = f"{source.root}, episode {episode.number}"
    columns = ["frame_index", "task_index", *source.shapes, "timestamp" if episode.video else source.camera]
    rows = _rows(where, episode, columns)
    length = len(rows["frame_index"])
    if rows["frame_index"] != list(range(length)):
        raise InputError(f"{where}: the frame_index of {episode.data} does not count its rows from 0")
    if unknown := set(rows["task_index"]) - set(source.tasks):
        raise InputError(f"{where}: task_index {min(unknown)} is not among the dataset's {len(source.tasks)} tasks")
    arrays = {}
    for key, shape in source.shapes.items():
        try:
            arrays[key] = np.asarray(rows[key], np.float32).reshape(length, *shape)
        except (TypeError, ValueError) as error:
            raise InputError(f"{where}: {key} in {episode.data} is not {length} rows of shape {shape}") from error
    if episode.video:
        images = read_frames(where, episode, np.asarray(rows["timestamp"], np.float64), 0.25 / source.fps)
    else:
        images = [(cell or {}).get("bytes") for cell in rows[source.camera]]
        if None in images:
            raise InputError(f"{where}: row {images.index(None)} of {episode.data} has no bytes in {source.camera}")
    steps = [
        {
            "observation": {"image": images[i]} | ({"state": arrays[STATE][i]} if STATE in arrays else {}),
            "action": arrays["action"][i],
            "language_instruction": source.tasks[rows["task_index"][i]],
            "is_first": i == 0,
            "is_last": i == length - 1,
            "is_terminal": i == length - 1,
        }
        for i in range(length)
    ]
    return {"steps": steps, "episode_metadata": {"episode_index": episode.number}}


def read_frames(where: str, episode: Episode, times: np.ndarray, tolerance: float) -> list[bytes]:
    """The episode's frames as JPEG. Raises InputError unless the video has, between the episode's start and stop, one
    frame for every time f64[L] (seconds since the start), at that time up to `tolerance` seconds."""
    try:
        av: Any = importlib.import_module("av")
    except ImportError as error:
        raise InputError("videos need PyAV: pip install 'spatialvla-jax[lerobot]'") from error
    path, frames, seen = episode.video, [], []
    if not (path and path.is_file()):
        raise InputError(f"{where}: the video {path} does not exist")
    try:
        with av.open(os.fspath(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            if episode.start:
                container.seek(int(episode.start / stream.time_base), stream=stream)  # the key frame before
            for frame in container.decode(stream):
                if frame.time < episode.start - tolerance:
                    continue
                if frame.time >= episode.stop - tolerance:
                    break
                seen.append(frame.time - episode.start)
                jpeg = io.BytesIO()
                Image.fromarray(frame.to_ndarray(format="rgb24")).save(jpeg, "JPEG", quality=JPEG_QUALITY)
                frames.append(jpeg.getvalue())
    except (av.FFmpegError, IndexError) as error:
        raise InputError(f"{where}: the video {path} does not decode after {len(frames)} frames: {error}") from error
    if len(frames) != len(times):
        raise InputError(f"{where}: {len(times)} rows in {episode.data}, but {len(frames)} frames in {path}")
    late = np.abs(np.asarray(seen) - times)
    if not (late <= tolerance).all():
        i = int(late.argmax())
        raise InputError(
            f"{where}: frame {i} of {path} is at {seen[i]:.4f} s, its row says {times[i]:.4f} s; at most "
            f"{tolerance:.4f} s, a quarter of the frame period, may lie between"
        )
    return frames


def _rows(where: str, episode: Episode, columns: list[str]) -> dict[str, list[Any]]:
    """The episode's rows of its parquet file, column by column. A few rows of the file are in memory at a time, even
    where all its images are one row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not episode.data.is_file():
        raise InputError(f"{where}: the file {episode.data} does not exist")
    rows: dict[str, list[Any]] = {key: [] for key in columns}
    try:
        with pq.ParquetFile(episode.data, buffer_size=2**20, pre_buffer=False) as file:
            if missing := [key for key in [*columns, "episode_index"] if key not in file.schema_arrow.names]:
                raise InputError(f"{where}: {episode.data} has no column {missing[0]!r}")
            numbers = file.read(columns=["episode_index"]).column(0).to_numpy()
            mine = np.flatnonzero(numbers == episode.number)
            if len(mine) != episode.length:
                raise InputError(f"{where}: {episode.data} has {len(mine)} rows of it, meta/ says {episode.length}")
            first, stop = (int(mine[0]), int(mine[-1]) + 1) if len(mine) else (0, 0)
            if stop - first != episode.length:
                raise InputError(f"{where}: its rows in {episode.data} are not together")
            starts = np.cumsum([0, *(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))])
            groups = [i for i in range(file.num_row_groups) if starts[i] < stop and starts[i + 1] > first]
            at = int(starts[groups[0]]) if groups else stop
            for batch in file.iter_batches(64, row_groups=groups, columns=columns, use_threads=False):
                low, high = max(first - at, 0), max(stop - at, 0)
                for key in columns:
                    rows[key] += batch.column(key)[low:high].to_pylist()
                at += batch.num_rows
                if at >= stop:
                    break
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{where}: {episode.data} is not a readable parquet file: {error}") from error
    return rows


def _episodes_v2(root: Path, info: dict[str, Any], video_key: str | None) -> list[Episode]:
    episodes = []
    for row in read_json(root / "meta" / "episodes.jsonl", lines=True):
        number = row["episode_index"]
        fields = {
            "episode_index": number,
            "episode_chunk": number // info["chunks_size"],
            "total_episodes": info["total_episodes"],
            "video_key": video_key,
        }
        data = root / info["data_path"].format(**fields)
        video = root / info["video_path"].format(**fields) if video_key else None
        episodes.append(Episode(number, row["length"], data, video))
    return sorted(episodes, key=lambda episode: episode.number)


def _episodes_v3(root: Path, info: dict[str, Any], video_key: str | None) -> list[Episode]:
    place, span = ("chunk_index", "file_index"), ("from_timestamp", "to_timestamp")
    columns = ["episode_index", "length", *(f"data/{key}" for key in place)]
    if video_key:
        columns += [f"videos/{video_key}/{key}" for key in (*place, *span)]
    episodes = []
    for file in sorted((root / "meta" / "episodes").glob("*/*.parquet")):
        for row in _parquet(file, columns):
            data, video = root / info["data_path"].format(**{key: row[f"data/{key}"] for key in place}), ()
            if video_key:
                own = {key: row[f"videos/{video_key}/{key}"] for key in (*place, *span)}
                path = root / info["video_path"].format(video_key=video_key, **own)
                video = (path, *(own[key] for key in span))
            episodes.append(Episode(row["episode_index"], row["length"], data, *video))
    return sorted(episodes, key=lambda episode: episode.number)


def _tasks(root: Path, version: str) -> dict[int, str]:
    if version.startswith("v2"):
        return {row["task_index"]: row["task"] for row in read_json(root / "meta" / "tasks.jsonl", lines=True)}
    # The instruction is the table's pandas index, so its column is named "task" or "__index_level_0__".
    rows = _parquet(root / "meta" / "tasks.parquet", ["task_index"], others=True)
    return {row.pop("task_index"): next(text for text in row.values() if isinstance(text, str)) for row in rows}


def _splits(root: Path, info: dict[str, Any], episodes: list[Episode]) -> dict[str, tuple[Episode, ...]]:
    file, splits = root / "meta" / "info.json", {}
    for split, span in info.get("splits", {"train": f"0:{len(episodes)}"}).items():
        match = re.fullmatch(r"(\d+):(\d+)", span)
        if not match:
            raise InputError(f"{file} has the split {split!r} as {span!r}; FIRST:END is expected")
        first, end = map(int, match.groups())
        splits[split] = tuple(episode for episode in episodes if first <= episode.number < end)
    covered = sorted(episode.number for part in splits.values() for episode in part)
    if covered != [episode.number for episode in episodes] or not all(splits.values()):
        raise InputError(
            f"{file} has the splits {info['splits']}, which do not hold each of the {len(episodes)} episodes once"
        )
    return splits


def _depth(feature: dict[str, Any]) -> bool:
    info = (feature.get("info") or {}) | (feature.get("video_info") or {})
    return bool(info.get("video.is_depth_map") or info.get("is_depth_map"))


def read_json(path: Path, lines: bool = False) -> Any:
    """A file of one JSON value, or the list of those on its lines. Raises InputError."""
    try:
        text = path.read_text("utf-8")
        return [json.loads(line) for line in text.split("\n") if line.strip()] if lines else json.loads(text)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): a LeRobot dataset has it") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON{' lines' if lines else ''}: {error}") from error


def _parquet(path: Path, columns: list[str], others: bool = False) -> list[dict[str, Any]]:
    """Rows of a small table: `columns`, or with `others` all of them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(path).names
        if missing := [key for key in columns if key not in names]:
            raise InputError(f"{path} has no column {missing[0]!r}")
        return pq.read_table(path, columns=None if others else columns).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as a parquet table: {error}") from error
