"""Reads LeRobot datasets (v2.0, v2.1 and v3.0 on disk): their tables, and the frames of their videos.

The formats are those of huggingface/lerobot (`lerobot_dataset.py`, `dataset_metadata.py` and
`convert_dataset_v21_to_v30.py`). v2 has one parquet file per episode, and one video per camera and episode. v3 packs
many episodes into each file, and stores in meta/episodes where each begins and ends in the video.
"""

import dataclasses
import importlib
import io
import json
import math
import os
import re
from collections.abc import Callable
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64
from PIL import Image

from spatialvla_jax.data.importers.frames import IMAGE, check_encoded, encode_png, is_depth, to_pixels
from spatialvla_jax.errors import Fault, InputError

CODEBASE_VERSIONS = ("v2.0", "v2.1", "v3.0")
JPEG_QUALITY = 95  # for video frames; images in parquet files are copied byte for byte
STATE = "observation.state"
# What Python raises for malformed tables. InputError is a ValueError too, but is not meant here.
_MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


@dataclasses.dataclass(frozen=True)
class Episode:
    """Where one episode is stored."""

    number: int
    length: int  # number of rows
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
    shapes: dict[str, tuple[int, ...]]  # of "action" and, if present, "observation.state"
    names: str  # names of the action's dimensions, as given by the dataset
    tasks: dict[int, str]
    splits: dict[str, tuple[Episode, ...]]
    unlisted: tuple[int, ...]  # numbers of episodes that info.json counts but no table lists


def open_lerobot(src: str | os.PathLike[str], camera: str | None = None) -> LeRobot:
    """The tables of a LeRobot dataset. Raises InputError if it is not one, has another version or lacks `camera`."""
    root = Path(src)
    try:
        return _open(root, camera)
    except InputError:
        raise
    except _MALFORMED as error:
        raise InputError(f"{root / 'meta'} does not belong to a LeRobot dataset: {error!r}") from error


def _open(root: Path, camera: str | None) -> LeRobot:
    file = root / "meta" / "info.json"
    info = read_json(file)

    def get(key: str, kind: type | tuple[type, ...], expected: str) -> Any:
        value = info.get(key) if isinstance(info, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            found = f"has {key} {value!r:.80}" if value is not None else f"has no {key!r}"
            raise InputError(f"{file} {found}: {expected} is expected")
        return value

    version = get("codebase_version", str, f"one of {', '.join(CODEBASE_VERSIONS)}")
    if version not in CODEBASE_VERSIONS:
        raise InputError(f"{file} has codebase_version {version!r}: {', '.join(CODEBASE_VERSIONS)} are read")
    fps = float(get("fps", (int, float), "a number of frames a second"))
    if not 0 < fps < math.inf:
        raise InputError(f"{file} has fps {fps:g}: a number above 0 is expected")
    features = get("features", dict, "a table of features")
    for key, feature in features.items():
        if not (isinstance(feature, dict) and isinstance(feature.get("dtype"), str)):
            raise InputError(f"{file} has the feature {key!r} as {feature!r:.80}: a table with its dtype is expected")
    pictures = [key for key, value in features.items() if value["dtype"] in ("video", "image") and not _depth(value)]
    cameras = pictures or [key for key, value in features.items() if len(value.get("shape") or ()) == 3]
    if camera is None and len(cameras) == 1:
        camera = cameras[0]
    if camera is None or camera not in cameras:
        what = f"no camera {camera!r}" if camera else "not just one camera"
        raise InputError(f"{root} has {what}: choose --camera from {', '.join(cameras) or 'none'}")
    if "action" not in features:
        raise InputError(f"{root} has no feature 'action': it has {', '.join(features)}")
    shapes = {}
    for key in ("action", STATE):
        shape = features[key].get("shape") if key in features else ()
        if not (isinstance(shape, list | tuple) and all(isinstance(n, int) and n >= 0 for n in shape)):
            raise InputError(f"{file} has the shape {shape!r} of {key}: a list of numbers is expected")
        if key in features:
            shapes[key] = tuple(shape)
    video = camera if features[camera]["dtype"] == "video" else None
    for key in ("data_path", "video_path") if video else ("data_path",):
        get(key, str, "a path with fields in braces")
    episodes = sorted((_episodes_v3 if version == "v3.0" else _episodes_v2)(root, info, video), key=lambda e: e.number)
    if not episodes:
        raise InputError(f"{root} has no episodes: {root / 'meta'} lists none")
    numbers = [episode.number for episode in episodes]
    if double := [number for number, after in pairwise(numbers) if number == after]:
        raise InputError(f"{root / 'meta'} lists episode {double[0]} twice")
    total = get("total_episodes", int, "a number of episodes") if "total_episodes" in info else 0
    return LeRobot(
        root=root,
        camera=camera,
        fps=fps,
        shapes=shapes,
        names=json.dumps(features["action"].get("names")),
        tasks=_tasks(root, version),
        splits=_splits(file, get("splits", dict, "a table of splits") if info.get("splits") else {}, episodes),
        unlisted=tuple(sorted(set(range(total)) - set(numbers))) if total > len(numbers) else (),
    )


def read_episode(source: LeRobot, episode: Episode) -> dict[str, Any]:
    """One episode in the form that the written dataset's features describe. Raises a Fault naming it and the file."""
    where = f"{source.root}, episode {episode.number}"
    try:
        return _read(source, episode)
    except Fault as fault:
        raise Fault(fault.reason, f"{where}: {fault}") from fault
    except InputError:
        raise
    except _MALFORMED as error:
        raise Fault("invalid", f"{where}: {episode.data} or {episode.video} is malformed: {error!r:.200}") from error


def _read(source: LeRobot, episode: Episode) -> dict[str, Any]:
    if not episode.length:
        raise Fault("no steps", "it has no rows")
    columns = ["frame_index", "task_index", *source.shapes, "timestamp" if episode.video else source.camera]
    rows = _rows(episode, columns, {source.camera: lambda cell: _image(source.root, cell)})
    length = len(rows["frame_index"])
    if rows["frame_index"] != list(range(length)):
        raise Fault("frame index", f"the frame_index of {episode.data} does not count its rows from 0")
    if unknown := [number for number in rows["task_index"] if number not in source.tasks]:
        raise Fault("task", f"task_index {unknown[0]} is not among the dataset's {len(source.tasks)} tasks")
    arrays = {}
    for key, shape in source.shapes.items():
        try:
            arrays[key] = np.asarray(rows[key], np.float32).reshape(length, *shape)
        except (TypeError, ValueError) as error:
            raise Fault("shape", f"{key} in {episode.data} is not {length} rows of shape {shape}") from error
    if episode.video:
        images = read_frames(episode, np.asarray(rows["timestamp"], np.float64), 0.25 / source.fps)
    else:
        images = rows[source.camera]
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


def read_frames(episode: Episode, times: Float64[np.ndarray, " L"], tolerance: float) -> list[bytes]:
    """The episode's frames as JPEGs. `times` are seconds from the episode's start. Raises a Fault unless the video has
    exactly one frame for each of them between start and stop, within `tolerance` seconds."""
    av = _extra("av")
    path, frames, stamps = episode.video, [], []
    if not (path and path.is_file()):
        raise Fault("no file", f"the video {path} does not exist")
    try:
        with av.open(os.fspath(path)) as container:
            stream = next(iter(container.streams.video), None)
            if stream is None:
                raise Fault("video", f"{path} holds no video")
            stream.thread_type = "AUTO"
            if episode.start:
                container.seek(int(episode.start / stream.time_base), stream=stream)  # to the key frame before
            for frame in container.decode(stream):
                if frame.time < episode.start - tolerance:
                    continue
                if frame.time >= episode.stop - tolerance:
                    break
                stamps.append(frame.time - episode.start)
                jpeg = io.BytesIO()
                Image.fromarray(frame.to_ndarray(format="rgb24")).save(jpeg, "JPEG", quality=JPEG_QUALITY)
                frames.append(jpeg.getvalue())
    except av.FFmpegError as error:
        raise Fault("video", f"the video {path} does not decode after {len(frames)} frames: {error}") from error
    if len(frames) != len(times):
        raise Fault("frame count", f"{len(times)} rows in {episode.data}, but {len(frames)} frames in {path}")
    late = np.abs(np.asarray(stamps) - times)
    if not (late <= tolerance).all():
        i = int(late.argmax())
        raise Fault(
            "timestamps",
            f"frame {i} of {path} is at {stamps[i]:.4f} s, its row says {times[i]:.4f} s; they may differ by at most "
            f"{tolerance:.4f} s, a quarter of the frame period",
        )
    return frames


def _rows(episode: Episode, columns: list[str], convert: dict[str, Callable[[Any], Any]]) -> dict[str, list[Any]]:
    """The episode's rows of its parquet file, by column, with some columns' cells converted. Keeps only a few of the
    file's rows in memory, even if all its images are in one row group."""
    pa, pq = _extra("pyarrow"), _extra("pyarrow.parquet")
    if not episode.data.is_file():
        raise Fault("no file", f"the file {episode.data} does not exist")
    rows: dict[str, list[Any]] = {key: [] for key in columns}
    try:
        with pq.ParquetFile(episode.data, buffer_size=2**20, pre_buffer=False) as file:
            if missing := [key for key in [*columns, "episode_index"] if key not in file.schema_arrow.names]:
                raise Fault("no column", f"{episode.data} has no column {missing[0]!r}")
            numbers = file.read(columns=["episode_index"]).column(0).to_numpy()
            matching = np.flatnonzero(numbers == episode.number)
            if len(matching) != episode.length:
                raise Fault("row count", f"{episode.data} has {len(matching)} of its rows, meta/ says {episode.length}")
            first, stop = int(matching[0]), int(matching[-1]) + 1
            if stop - first != episode.length:
                raise Fault("row order", f"its rows in {episode.data} are not contiguous")
            starts = np.cumsum([0, *(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))])
            groups = [i for i in range(file.num_row_groups) if starts[i] < stop and starts[i + 1] > first]
            at = int(starts[groups[0]])
            for batch in file.iter_batches(64, row_groups=groups, columns=columns, use_threads=False):
                low, high = max(first - at, 0), max(stop - at, 0)
                for key in columns:
                    cells = batch.column(key)[low:high]
                    rows[key] += [convert[key](cell.as_py()) for cell in cells] if key in convert else cells.to_pylist()
                at += batch.num_rows
                if at >= stop:
                    break
    except (pa.ArrowException, OSError) as error:
        raise Fault("unreadable", f"{episode.data} is not a readable parquet file: {error}") from error
    return rows


def _image(root: Path, cell: Any) -> bytes:
    """A frame from a parquet file as JPEG or PNG: from its bytes, from the file it names, or from its pixels."""
    if isinstance(cell, dict):
        data, path = cell.get("bytes"), cell.get("path")
        if data is None and path and not (root / path).is_file():
            raise Fault("no file", f"the image {root / path} does not exist")
        cell = (root / path).read_bytes() if data is None and path else data
    if cell is None:
        raise Fault(IMAGE, "a row has neither the bytes nor the path of its image")
    if not isinstance(cell, bytes):
        return encode_png(to_pixels(np.asarray(cell)[None])[0])
    if is_depth(cell):
        raise Fault(IMAGE, "an image has 16 bits and one channel: that is depth, not a camera frame")
    return check_encoded(cell)


def _episodes_v2(root: Path, info: dict[str, Any], video_key: str | None) -> list[Episode]:
    file = root / "meta" / "episodes.jsonl"
    episodes = []
    for row in _table(file, ["episode_index", "length"]):
        number = _whole(row, "episode_index", file)
        fields = {
            "episode_index": number,
            "episode_chunk": number // _whole(info, "chunks_size", root / "meta" / "info.json", least=1),
            "total_episodes": info.get("total_episodes"),
            "video_key": video_key,
        }
        data = _path(root, info, "data_path", fields)
        video = _path(root, info, "video_path", fields) if video_key else None
        episodes.append(Episode(number, _whole(row, "length", file), data, video))
    return episodes


def _episodes_v3(root: Path, info: dict[str, Any], video_key: str | None) -> list[Episode]:
    place, span = ("chunk_index", "file_index"), ("from_timestamp", "to_timestamp")
    columns = ["episode_index", "length", *(f"data/{key}" for key in place)]
    if video_key:
        columns += [f"videos/{video_key}/{key}" for key in (*place, *span)]
    episodes = []
    for file in sorted((root / "meta" / "episodes").glob("*/*.parquet")):
        for row in _table(file, columns):
            data = _path(root, info, "data_path", {key: _whole(row, f"data/{key}", file) for key in place})
            video: tuple[Any, ...] = ()
            if video_key:
                fields = {key: _whole(row, f"videos/{video_key}/{key}", file) for key in place}
                path = _path(root, info, "video_path", fields | {"video_key": video_key})
                video = (path, *(float(row[f"videos/{video_key}/{key}"]) for key in span))
            episodes.append(Episode(_whole(row, "episode_index", file), _whole(row, "length", file), data, *video))
    return episodes


def _tasks(root: Path, version: str) -> dict[int, str]:
    """{task_index: text}. The text is the column "task", or else the table's pandas index."""
    file = root / "meta" / ("tasks.parquet" if version == "v3.0" else "tasks.jsonl")
    column = "task"
    if version == "v3.0":
        schema = _schema(file)
        index = [key for key in (schema.pandas_metadata or {}).get("index_columns", ()) if isinstance(key, str)]
        column = next((key for key in ("task", *index, "__index_level_0__") if key in schema.names), column)
    tasks: dict[int, str] = {}
    for row in _table(file, ["task_index", column]):
        number, text = _whole(row, "task_index", file), row[column]
        if not isinstance(text, str):
            raise InputError(f"{file} has {text!r} as the {column} of task_index {number}: a string is expected")
        if tasks.setdefault(number, text) != text:
            raise InputError(f"{file} has two tasks of task_index {number}: {tasks[number]!r} and {text!r}")
    return tasks


def _splits(file: Path, spans: dict[str, str], episodes: list[Episode]) -> dict[str, tuple[Episode, ...]]:
    """The episodes of each split. A split's span refers to episode numbers or, if episodes were deleted and it does not
    fit, to their positions when ordered by number. Without splits, all episodes are "train"."""
    bounds = {}
    for split, span in spans.items():
        match = re.fullmatch(r"(\d+):(\d+)", str(span))
        if not match or not re.fullmatch(r"\w+", split) or split == "all":
            raise InputError(f"{file} has the split {split!r} as {span!r}; FIRST:END is expected")
        bounds[split] = tuple(map(int, match.groups()))
    bounds = {split: (first, end) for split, (first, end) in bounds.items() if first < end}
    bounds = bounds or {"train": (0, episodes[-1].number + 1)}
    for numbers in ([episode.number for episode in episodes], range(len(episodes))):
        inside = {
            split: [number for number in numbers if first <= number < end] for split, (first, end) in bounds.items()
        }
        if all(inside.values()) and sorted(chain(*inside.values())) == list(numbers):
            by_number = dict(zip(numbers, episodes, strict=True))
            return {split: tuple(by_number[number] for number in chosen) for split, chosen in inside.items()}
    raise InputError(
        f"{file} has the splits {spans}, which do not contain each of the {len(episodes)} episodes exactly "
        "once; without 'splits' all are in train"
    )


def _depth(feature: dict[str, Any]) -> bool:
    infos = [info for key in ("info", "video_info") if isinstance(info := feature.get(key), dict)]
    return any(info.get("video.is_depth_map") or info.get("is_depth_map") for info in infos)


def _whole(row: dict[str, Any], key: str, file: Path, least: int = 0) -> int:
    """An integer from a table, which pandas may have converted to float. Raises InputError."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least or value != value // 1:
        raise InputError(f"{file} has {key} {value!r}: a whole number of at least {least} is expected")
    return int(value)


def _path(root: Path, info: dict[str, Any], key: str, fields: dict[str, Any]) -> Path:
    """The path from a template in info.json."""
    try:
        return root / info[key].format(**fields)
    except (LookupError, ValueError, AttributeError) as error:
        known = ", ".join(fields)
        raise InputError(
            f"{root / 'meta' / 'info.json'} has {key} {info[key]!r}: a path with the fields {known} is expected"
        ) from error


def read_json(path: Path, lines: bool = False) -> Any:
    """The JSON value in a file, or with `lines` the list of values on its lines. Raises InputError."""
    try:
        text = path.read_text("utf-8")
        return [json.loads(line) for line in text.split("\n") if line.strip()] if lines else json.loads(text)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): a LeRobot dataset has this file") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON{' lines' if lines else ''}: {error}") from error


def _table(path: Path, columns: list[str]) -> list[dict[str, Any]]:
    """Rows of a small table, .jsonl or .parquet, with at least these `columns`. Raises InputError."""
    if path.suffix == ".jsonl":
        rows = read_json(path, lines=True)
        for number, row in enumerate(rows, 1):
            if missing := [key for key in columns if not isinstance(row, dict) or key not in row]:
                raise InputError(f"{path} has no {missing[0]!r} in its line {number}")
        return rows
    names = _schema(path).names
    if missing := [key for key in columns if key not in names]:
        raise InputError(f"{path} has no column {missing[0]!r}: it has {', '.join(names)}")
    try:
        return _extra("pyarrow.parquet").read_table(path, columns=columns).to_pylist()
    except (_extra("pyarrow").ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as a parquet table: {error}") from error


def _schema(path: Path) -> Any:
    try:
        return _extra("pyarrow.parquet").read_schema(path)
    except (_extra("pyarrow").ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as a parquet table: {error}") from error


def _extra(module: str) -> Any:
    """Import a module that the extra [lerobot] installs. Raises InputError."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"LeRobot datasets need {module}: pip install 'spatialvla-jax[lerobot]'") from error
