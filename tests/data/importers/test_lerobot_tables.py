"""The forms that LeRobot's tables and frames may have, and those that are refused."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.toy_lerobot import (
    FRONT,
    LENGTHS,
    SIZE,
    TASKS,
    change_info,
    frame,
    make_lerobot,
    set_cells,
    write_jsonl,
    write_table,
)
from helpers.toy_rlds import encode_image
from PIL import Image

from spatialvla_jax.data.importers.lerobot_tables import open_lerobot, read_episode
from spatialvla_jax.errors import Fault, InputError


def as_pandas(columns: dict[str, list], index: str | dict) -> pa.Table:
    """A table as pandas writes it, with an index."""
    return pa.table(columns).replace_schema_metadata({"pandas": json.dumps({"index_columns": [index], "columns": []})})


INDICES, OTHER = [1, 0], ["open_drawer", "pick_cup"]
RANGE = {"kind": "range", "name": None, "start": 0, "stop": 2, "step": 1}


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"task_index": INDICES, "name": OTHER, "__index_level_0__": TASKS[::-1]}),
        pa.table({"name": OTHER, "task": TASKS[::-1], "__index_level_0__": OTHER, "task_index": INDICES}),
        as_pandas({"name": OTHER, "task_index": INDICES, "instruction": TASKS[::-1]}, "instruction"),
        as_pandas({"name": OTHER, "task_index": INDICES, "task": TASKS[::-1]}, RANGE),
        as_pandas({"name": OTHER, "task_index": [1.0, 0.0], "task": TASKS[::-1]}, "name"),
    ],
)
def test_the_task_is_the_column_task_or_else_the_index(tmp_path, table):
    source = make_lerobot(tmp_path / "source", "v3.0", video=False)
    write_table(source / "meta/tasks.parquet", table)
    assert open_lerobot(source, FRONT).tasks == dict(enumerate(TASKS))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"task_index": [0, 1]}), "has no column 'task': it has task_index"),
        (as_pandas({"task_index": [0], "name": ["a"]}, RANGE), "has no column 'task': it has task_index, name"),
        (pa.table({"task_index": [0, 1], "task": [0, 1]}), "has 0 as the task of task_index 0: a string is expected"),
        (pa.table({"task_index": [0, 0], "task": ["a", "b"]}), "two tasks of task_index 0: 'a' and 'b'"),
        (pa.table({"task_index": [0.5], "task": ["a"]}), "has task_index 0.5: a whole number"),
    ],
)
def test_tables_of_tasks_that_say_nothing(tmp_path, table, message):
    source = make_lerobot(tmp_path / "source", "v3.0", video=False)
    write_table(source / "meta/tasks.parquet", table)
    with pytest.raises(InputError, match=message):
        open_lerobot(source, FRONT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": 0}, "has fps 0: a number above 0"),
        ({"fps": "10"}, "has fps '10': a number of frames a second is expected"),
        ({"fps": None}, "has no 'fps'"),
        ({"features": []}, r"has features \[\]: a table"),
        ({"features": {"action": 7}}, "has the feature 'action' as 7"),
        ({"data_path": "data/{episode}.parquet"}, "has data_path .*: a path with the fields episode_index"),
        ({"data_path": None}, "has no 'data_path'"),
        ({"chunks_size": 0}, "has chunks_size 0: a whole number of at least 1"),
        ({"total_episodes": "many"}, "has total_episodes 'many'"),
        ({"splits": {"train": "0:3", "val": "2:4"}}, "do not contain each of the 4 episodes exactly once"),
        ({"splits": {"all": "0:4"}}, "has the split 'all'"),
        ({"splits": ["train"]}, r"has splits \['train'\]: a table of splits"),
    ],
)
def test_info_that_cannot_be(tmp_path, changes, message):
    source = make_lerobot(tmp_path / "source", "v2.1", video=False)
    change_info(source, **changes)
    with pytest.raises(InputError, match=message):
        open_lerobot(source, FRONT)


@pytest.mark.parametrize(
    ("numbers", "splits", "expected"),
    [
        ((0, 1, 3), {"train": "0:3"}, {"train": (0, 1, 3)}),  # by position: 3 episodes
        ((0, 2, 3), {"train": "0:2", "val": "2:3"}, {"train": (0, 2), "val": (3,)}),
        ((0, 2, 3), {"train": "0:3", "val": "3:4"}, {"train": (0, 2), "val": (3,)}),  # by number
        ((0, 2, 3), None, {"train": (0, 2, 3)}),
        ((0, 1, 2, 3), {}, {"train": (0, 1, 2, 3)}),
        ((0, 1, 2, 3), {"train": "0:4", "val": "4:4"}, {"train": (0, 1, 2, 3)}),
    ],
)
def test_deleted_episodes_and_missing_splits(tmp_path, numbers, splits, expected):
    source = make_lerobot(tmp_path / "source", "v2.1", video=False)
    write_jsonl(source / "meta/episodes.jsonl", [{"episode_index": i, "length": LENGTHS[i]} for i in numbers])
    change_info(source, splits=splits, total_episodes=len(numbers))
    opened = open_lerobot(source, FRONT)
    assert {split: tuple(e.number for e in own) for split, own in opened.splits.items()} == expected
    assert opened.unlisted == ()


def test_pandas_floats_are_whole_numbers(tmp_path):
    """pandas turns an integer column into floats as soon as one row lacks a value."""
    source = make_lerobot(tmp_path / "source", "v3.0", video=False)
    file = source / "meta/episodes/chunk-000/file-000.parquet"
    before = open_lerobot(source, FRONT)
    table = pq.read_table(file)
    for key in ("data/file_index", "length", "episode_index"):
        place = table.schema.names.index(key)
        table = table.set_column(place, key, table.column(key).cast(pa.float64()))
    write_table(file, table)
    assert open_lerobot(source, FRONT).splits == before.splits


@pytest.mark.parametrize(
    "cell",
    [
        lambda pixels: encode_image(pixels, "PNG"),
        lambda pixels: pixels.tolist(),
        lambda pixels: pixels.transpose(2, 0, 1).tolist(),
        lambda pixels: (pixels / 255).tolist(),
        lambda pixels: {"bytes": None, "path": "images/0.png"},
        lambda pixels: {"bytes": encode_image(np.dstack([pixels, np.full(SIZE, 255, np.uint8)]), "PNG"), "path": None},
    ],
)
def test_frames_in_other_forms(tmp_path, cell):
    source = make_lerobot(tmp_path / "source", "v2.1", video=False)
    (source / "images").mkdir()
    (source / "images/0.png").write_bytes(encode_image(frame(FRONT, 3, 0), "PNG"))
    set_cells(source, 3, FRONT, [cell(frame(FRONT, 3, 0))])
    opened = open_lerobot(source, FRONT)
    (step,) = read_episode(opened, opened.splits["val"][0])["steps"]
    np.testing.assert_array_equal(Image.open(io.BytesIO(step["observation"]["image"])), frame(FRONT, 3, 0))


@pytest.mark.parametrize(
    ("key", "cell", "message"),
    [
        (FRONT, b"\xff\xd8\xff cut", "an image of 7 bytes does not decode"),
        (FRONT, frame(FRONT, 3, 0).tobytes(), "9216 bytes of an image are neither JPEG nor PNG"),
        (FRONT, encode_image(np.zeros(SIZE, np.uint16), "PNG"), "16 bits and one channel"),
        (FRONT, {"bytes": None, "path": "images/9.png"}, "the image .*images/9.png does not exist"),
        (FRONT, {"bytes": None, "path": None}, "neither the bytes nor the path"),
        ("action", ["a"] * 7, "action in .* is not 1 rows of shape"),
        ("action", [1.0] * 6, "action in .* is not 1 rows of shape"),
        ("task_index", 7, "task_index 7 is not among the dataset's 2 tasks"),
        ("task_index", [0], "is malformed: TypeError"),
        ("frame_index", 1, "does not count its rows from 0"),
    ],
)
def test_a_faulty_episode_is_named(tmp_path, key, cell, message):
    source = make_lerobot(tmp_path / "source", "v2.1", video=False)
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()}) if isinstance(cell, dict) else None
    set_cells(source, 3, key, [cell], struct)
    opened = open_lerobot(source, FRONT)
    with pytest.raises(Fault, match=f"source, episode 3: .*{message}"):
        read_episode(opened, opened.splits["val"][0])
