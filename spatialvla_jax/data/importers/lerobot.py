"""LeRobot datasets (v2.0, v2.1 and v3.0 on disk) converted to RLDS, shard by shard.

The formats are those that huggingface/lerobot writes (`lerobot_dataset.py`, `dataset_metadata.py` and
`convert_dataset_v21_to_v30.py` there): v2 has one parquet file and one video a camera for every episode; v3 packs many
episodes into each file and says in meta/episodes where in the video one begins and ends.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spatialvla_jax.data.images import tensorflow
from spatialvla_jax.data.importers.rlds_writer import VERSION, check_out
from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.atomic import remove_leftovers, replacing, write_json

CODEBASE_VERSIONS = ("v2.0", "v2.1", "v3.0")
JPEG_QUALITY = 95  # of video frames; images inside the parquet files are kept byte for byte
FRAMES_PER_SHARD = 2048
STATE = "observation.state"
_FRAMING = 16  # bytes of length and checksums that a TFRecord adds to its record


@dataclasses.dataclass(frozen=True)
class Episode:
    """Where one episode lies."""

    number: int
    length: int  # rows
    data: Path
    video: Path | None  # None: the images are in `data`
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


def convert_lerobot(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    camera: str | None = None,
    name: str | None = None,
    frames_per_shard: int = FRAMES_PER_SHARD,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Path, LeRobot]:
    """Writes one camera of the LeRobot dataset `src` as the RLDS version directory `dst`/1.0.0.

    Steps get observation/image, observation/state (f32, where the source has it), action (f32), language_instruction
    (the row's task), is_first, is_last and is_terminal; episode_metadata/episode_index is the source's. Values are
    not changed or judged: NaN stays NaN. `camera` is needed where there are several; `name` is the dataset's, by
    default that of `dst`. `progress(episodes done, episodes)` is called meanwhile.

    One episode is in memory at a time. Shards are whole episodes of at least `frames_per_shard` frames, each written by
    rename: after an interruption the same call goes on with the shard where it stopped, and the files are those of an
    uninterrupted one. Raises InputError for what is missing or does not fit, naming file and episode.
    """
    source, out = open_lerobot(src, camera), Path(dst)
    name = name or out.absolute().name
    if not re.fullmatch(r"\w+", name):
        raise InputError(f"the dataset's name {name!r} must be letters, digits and underscores; set it with --name")
    check_out(out)
    work = out / f".incomplete-{VERSION}"
    _begin(work, source, name, frames_per_shard)
    remove_leftovers(work)
    features = _features(source)
    tf = tensorflow()
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.splits import SplitDict

    total, done, infos = sum(map(len, source.splits.values())), 0, []
    for split, all_episodes in source.splits.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=tfds.core.Path(work), dataset_name=name, split=split, filetype_suffix="tfrecord"
        )
        num_bytes, shards = 0, _shards(all_episodes, frames_per_shard)
        for number, episodes in enumerate(shards):
            file = Path(template.sharded_filepath(shard_index=number, num_shards=len(shards)))
            if not file.is_file():
                with replacing(file) as temporary, tf.io.TFRecordWriter(os.fspath(temporary)) as writer:
                    for count, episode in enumerate(episodes):
                        if progress:
                            progress(done + count, total)
                        writer.write(_serialize(features, read_episode(source, episode)))
            done += len(episodes)
            if progress:
                progress(done, total)
            num_bytes += file.stat().st_size - len(episodes) * _FRAMING
        lengths = [len(episodes) for episodes in shards]
        infos.append(
            tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=num_bytes, filename_template=template)
        )
    info = _info(work, source, name, features)
    info.set_splits(SplitDict(infos))
    info.write_to_directory(work)
    os.replace(work, out / VERSION)
    return out / VERSION, source


def open_lerobot(src: str | os.PathLike[str], camera: str | None = None) -> LeRobot:
    """The tables of a LeRobot dataset. Raises InputError when it is none, of another version or without `camera`."""
    root = Path(src)
    try:
        return _open(root, camera)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{root / 'meta'} is not that of a LeRobot dataset: {error!r}") from error


def _open(root: Path, camera: str | None) -> LeRobot:
    info = _json(root / "meta" / "info.json")
    version = info.get("codebase_version")
    if version not in CODEBASE_VERSIONS:
        raise InputError(
            f"{root / 'meta' / 'info.json'} has codebase_version {version!r}: {', '.join(CODEBASE_VERSIONS)} are read"
        )
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
        tasks=_tasks_v3(root) if version.startswith("v3") else _tasks_v2(root),
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
    av = _av()
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
                frames.append(_jpeg(frame.to_ndarray(format="rgb24")))
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
    for row in _jsonl(root / "meta" / "episodes.jsonl"):
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
    place = ("chunk_index", "file_index")
    columns = ["episode_index", "length", *(f"data/{key}" for key in place)]
    if video_key:
        columns += [f"videos/{video_key}/{key}" for key in (*place, "from_timestamp", "to_timestamp")]
    episodes = []
    for file in sorted((root / "meta" / "episodes").glob("*/*.parquet")):
        for row in _parquet(file, columns):
            data = root / info["data_path"].format(**{key: row[f"data/{key}"] for key in place})
            if not video_key:
                episodes.append(Episode(row["episode_index"], row["length"], data, None))
                continue
            own = {key: row[f"videos/{video_key}/{key}"] for key in (*place, "from_timestamp", "to_timestamp")}
            video = root / info["video_path"].format(video_key=video_key, **own)
            span = (own["from_timestamp"], own["to_timestamp"])
            episodes.append(Episode(row["episode_index"], row["length"], data, video, *span))
    return sorted(episodes, key=lambda episode: episode.number)


def _tasks_v2(root: Path) -> dict[int, str]:
    return {row["task_index"]: row["task"] for row in _jsonl(root / "meta" / "tasks.jsonl")}


def _tasks_v3(root: Path) -> dict[int, str]:
    """The instruction is the table's pandas index, so its column is named "task" or "__index_level_0__"."""
    rows = _parquet(root / "meta" / "tasks.parquet", ["task_index"], others=True)
    return {row.pop("task_index"): next(text for text in row.values() if isinstance(text, str)) for row in rows}


def _splits(root: Path, info: dict[str, Any], episodes: list[Episode]) -> dict[str, tuple[Episode, ...]]:
    splits = {}
    for split, span in info.get("splits", {"train": f"0:{len(episodes)}"}).items():
        match = re.fullmatch(r"(\d+):(\d+)", span)
        if not match:
            raise InputError(
                f"{root / 'meta' / 'info.json'} has the split {split!r} as {span!r}; FIRST:END is expected"
            )
        first, end = map(int, match.groups())
        splits[split] = tuple(episode for episode in episodes if first <= episode.number < end)
    covered = sorted(episode.number for part in splits.values() for episode in part)
    if covered != [episode.number for episode in episodes] or not all(splits.values()):
        raise InputError(
            f"{root / 'meta' / 'info.json'} has the splits {info['splits']}, which do not hold each of the "
            f"{len(episodes)} episodes once"
        )
    return splits


def _shards(episodes: tuple[Episode, ...], frames_per_shard: int) -> list[list[Episode]]:
    """Consecutive episodes, a new shard as soon as one has enough frames."""
    shards: list[list[Episode]] = []
    frames = frames_per_shard
    for episode in episodes:
        if frames >= frames_per_shard:
            shards.append([])
            frames = 0
        shards[-1].append(episode)
        frames += episode.length
    return shards


def _begin(work: Path, source: LeRobot, name: str, frames_per_shard: int) -> None:
    """Makes the working directory, or raises InputError when the one there is of another conversion."""
    plan = [(split, episode.number, episode.length) for split in source.splits for episode in source.splits[split]]
    key = {
        "source": source.root.absolute().name,
        "info_sha256": hashlib.sha256((source.root / "meta" / "info.json").read_bytes()).hexdigest(),
        "episodes_sha256": hashlib.sha256(json.dumps(plan).encode()).hexdigest(),
        "camera": source.camera,
        "name": name,
        "jpeg_quality": JPEG_QUALITY,
        "frames_per_shard": frames_per_shard,
    }
    file = work / "conversion.json"
    if not file.is_file():
        work.mkdir(parents=True, exist_ok=True)
        write_json(file, key)
    elif changed := [k for k, value in key.items() if _json(file).get(k) != value]:
        raise InputError(
            f"{work} holds a conversion that was interrupted and had another {changed[0]}: "
            f"{_json(file).get(changed[0])!r}, now {key[changed[0]]!r}; delete it or choose another place"
        )


def _features(source: LeRobot) -> Any:
    import tensorflow_datasets as tfds

    def tensor(key: str, doc: str | None) -> Any:
        return tfds.features.Tensor(shape=source.shapes[key], dtype=np.float32, doc=doc)

    encoding = "jpeg" if _first(source).video else None
    image = tfds.features.Image(shape=(None, None, 3), encoding_format=encoding, doc=source.camera)
    step = {
        "observation": {"image": image} | ({"state": tensor(STATE, STATE)} if STATE in source.shapes else {}),
        "action": tensor("action", source.names),
        "language_instruction": tfds.features.Text(),
        "is_first": np.bool_,
        "is_last": np.bool_,
        "is_terminal": np.bool_,
    }
    metadata = {"episode_index": np.int64}
    return tfds.features.FeaturesDict({"steps": tfds.features.Dataset(step), "episode_metadata": metadata})


def _info(work: Path, source: LeRobot, name: str, features: Any) -> Any:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity

    version = tfds.core.Version(VERSION)
    identity = DatasetIdentity(name=name, version=version, data_dir=os.fspath(work), module_name=__name__)
    kept = f"JPEG of quality {JPEG_QUALITY}" if _first(source).video else "images as stored there"
    description = f"LeRobot dataset {source.root.absolute().name}, camera {source.camera}: {kept}."
    return tfds.core.DatasetInfo(builder=identity, features=features, description=description)


def _serialize(features: Any, episode: dict[str, Any]) -> bytes:
    """As TFDS does, but with the map's keys in one order: the same episode gives the same bytes."""
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    example = ExampleSerializer(features.get_serialized_info()).get_tf_example(features.encode_example(episode))
    return example.SerializeToString(deterministic=True)


def _first(source: LeRobot) -> Episode:
    return next(iter(source.splits.values()))[0]


def _depth(feature: dict[str, Any]) -> bool:
    info = (feature.get("info") or {}) | (feature.get("video_info") or {})
    return bool(info.get("video.is_depth_map") or info.get("is_depth_map"))


def _jpeg(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): a LeRobot dataset has it") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error


def _jsonl(path: Path) -> list[Any]:
    try:
        return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): a LeRobot dataset has it") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON lines: {error}") from error


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


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise InputError("videos need PyAV: pip install 'spatialvla-jax[lerobot]'") from error
    return av
