"""Small LeRobot datasets, written from scratch."""

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from helpers.toy_rlds import encode_image

FPS = 10
SIZE = (48, 64)
LENGTHS = (5, 3, 8, 1)
TASKS = ("pick up the cup", "open the drawer – slowly")
FRONT, WRIST = "observation.images.front", "observation.images.wrist"


def frame(camera: str, episode: int, step: int) -> np.ndarray:
    """A smooth image u8[48, 64, 3], different for each camera, episode and step."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] / 64
    phase = 0.9 * step + 2.1 * episode + (0.5 if camera == WRIST else 0)
    waves = [np.sin(5 * x + phase), np.cos(4 * y - 2 * phase), np.sin(3 * (x + y) + 1.7 * phase)]
    return (127 + 100 * np.stack(waves, -1)).astype(np.uint8)


def actions_of(episode: int) -> np.ndarray:
    return np.random.default_rng(episode).uniform(-1, 1, (LENGTHS[episode], 7)).astype(np.float32)


def states_of(episode: int) -> np.ndarray:
    return np.random.default_rng(100 + episode).normal(size=(LENGTHS[episode], 8)).astype(np.float32)


def write_video(path: Path, frames: list[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "5", "g": "2"})
        stream.width, stream.height, stream.pix_fmt = SIZE[1], SIZE[0], "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def table_of(episode: int, first: int, video: bool, actions: np.ndarray) -> pa.Table:
    length = LENGTHS[episode]
    columns = {
        "action": pa.array(actions.tolist(), pa.list_(pa.float32(), 7)),
        "observation.state": pa.array(states_of(episode).tolist(), pa.list_(pa.float32(), 8)),
        "timestamp": pa.array(np.arange(length) / FPS, pa.float32()),
        "frame_index": pa.array(range(length), pa.int64()),
        "episode_index": pa.array([episode] * length, pa.int64()),
        "index": pa.array(range(first, first + length), pa.int64()),
        "task_index": pa.array([episode % 2] * length, pa.int64()),
    }
    if not video:
        for camera in (FRONT, WRIST):
            cells = [
                {"bytes": encode_image(frame(camera, episode, i), "PNG"), "path": f"frame_{i:06d}.png"}
                for i in range(length)
            ]
            columns[camera] = pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    return pa.table(columns)


def info_of(version: str, video: bool) -> dict:
    camera = {"dtype": "video" if video else "image", "shape": [*SIZE, 3], "names": ["height", "width", "channel"]}
    depth = camera | {"info": {"video.is_depth_map": True}}
    info = {
        "codebase_version": version,
        "total_episodes": len(LENGTHS),
        "total_frames": sum(LENGTHS),
        "total_tasks": len(TASKS),
        "chunks_size": 2,
        "fps": FPS,
        "splits": {"train": f"0:{len(LENGTHS) - 1}", "val": f"{len(LENGTHS) - 1}:{len(LENGTHS)}"},
        "features": {
            FRONT: camera,
            WRIST: camera,
            "observation.images.depth": depth,
            "observation.state": {"dtype": "float32", "shape": [8], "names": None},
            "action": {"dtype": "float32", "shape": [7], "names": {"motors": [*"xyzabc", "gripper"]}},
        },
    }
    if version.startswith("v2"):
        info["data_path"] = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
        info["video_path"] = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    else:
        info["data_path"] = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        info["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    return info


def write_table(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=4)  # so that episodes begin and end within groups


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def make_lerobot(root: Path, version: str, video: bool, actions: dict[int, np.ndarray] | None = None) -> Path:
    """Four episodes, two cameras; in v3 the episodes 0-1 and 2-3 share a parquet file, and 0-2 a video."""
    actions = {i: actions_of(i) for i in range(len(LENGTHS))} | (actions or {})
    starts = np.cumsum([0, *LENGTHS])
    (root / "meta").mkdir(parents=True)
    (root / "meta" / "info.json").write_text(json.dumps(info_of(version, video), indent=4))
    tables = [table_of(i, int(starts[i]), video, actions[i]) for i in range(len(LENGTHS))]
    frames = {
        camera: [[frame(camera, i, t) for t in range(length)] for i, length in enumerate(LENGTHS)]
        for camera in (FRONT, WRIST)
    }
    if version.startswith("v2"):
        write_jsonl(root / "meta" / "tasks.jsonl", [{"task_index": i, "task": text} for i, text in enumerate(TASKS)])
        rows = [{"episode_index": i, "tasks": [TASKS[i % 2]], "length": length} for i, length in enumerate(LENGTHS)]
        write_jsonl(root / "meta" / "episodes.jsonl", rows[::-1])  # in any order
        for i, table in enumerate(tables):
            write_table(root / f"data/chunk-{i // 2:03d}/episode_{i:06d}.parquet", table)
            for camera in (FRONT, WRIST) if video else ():
                write_video(root / f"videos/chunk-{i // 2:03d}/{camera}/episode_{i:06d}.mp4", frames[camera][i])
        return root
    texts = {"task_index": pa.array([1, 0]), "__index_level_0__": pa.array(TASKS[::-1])}  # as pandas writes an index
    write_table(root / "meta/tasks.parquet", pa.table(texts))
    rows = []
    for i, length in enumerate(LENGTHS):
        row = {"episode_index": i, "tasks": [TASKS[i % 2]], "length": length, "stats/action/min": [0.0] * 7}
        row |= {"data/chunk_index": 0, "data/file_index": i // 2}
        row |= {"dataset_from_index": int(starts[i]), "dataset_to_index": int(starts[i + 1])}
        for camera in (FRONT, WRIST) if video else ():
            start = starts[i] / FPS if i < 3 else 0.0
            own = {
                "chunk_index": 0,
                "file_index": i // 3,
                "from_timestamp": start,
                "to_timestamp": start + length / FPS,
            }
            row |= {f"videos/{camera}/{key}": value for key, value in own.items()}
        rows.append(row)
    write_table(root / "meta/episodes/chunk-000/file-000.parquet", pa.Table.from_pylist(rows))
    for number in (0, 1):
        pair = pa.concat_tables(tables[2 * number : 2 * number + 2])
        write_table(root / f"data/chunk-000/file-{number:03d}.parquet", pair)
    for camera in (FRONT, WRIST) if video else ():
        write_video(
            root / f"videos/{camera}/chunk-000/file-000.mp4",
            [pixels for episode in frames[camera][:3] for pixels in episode],
        )
        write_video(root / f"videos/{camera}/chunk-000/file-001.mp4", frames[camera][3])
    return root


def change_info(source: Path, **changes: object) -> None:
    info = json.loads((source / "meta/info.json").read_text())
    (source / "meta/info.json").write_text(json.dumps(info | changes))


def set_cells(source: Path, episode: int, key: str, cells: list, kind: Any = None) -> None:
    file = source / f"data/chunk-{episode // 2:03d}/episode_{episode:06d}.parquet"
    table = pq.read_table(file)
    write_table(file, table.set_column(table.schema.names.index(key), key, pa.array(cells, kind)))
