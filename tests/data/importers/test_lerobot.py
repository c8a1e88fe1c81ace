"""Small LeRobot datasets converted and read by the loader."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from helpers.toy_lerobot import (
    FPS,
    FRONT,
    LENGTHS,
    TASKS,
    WRIST,
    actions_of,
    change_info,
    frame,
    make_lerobot,
    set_cells,
    states_of,
    write_jsonl,
    write_table,
    write_video,
)
from PIL import Image

from spatialvla_jax.cli import main
from spatialvla_jax.data import Loader
from spatialvla_jax.data.importers import lerobot
from spatialvla_jax.data.importers.lerobot import convert_lerobot
from spatialvla_jax.errors import InputError


def load(path: Path, cache: Path) -> Loader:
    """The converted dataset, read with a spec in a user's config; actions are unchanged."""
    entry = {"name": "mine", "path": str(path), "spec": {"operations": [["clip_gripper", 0.0, 1.0]]}}
    prompt = {"length": 32, "vocab_size": 96}
    config = {"datasets": [entry], "cache_dir": str(cache), "workers": 1, "prompt": prompt}
    rows = {"q01": -1.0, "q99": 1.0, "min": -1.0, "max": 1.0, "mask": False}
    statistics = {"mine": {"action": {row: [value] * 7 for row, value in rows.items()}}}
    return Loader(config, image_size=48, action_chunk=4, statistics=statistics)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((a.astype(float) - b.astype(float)) ** 2), 1e-9)))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("version", "video"), [("v2.0", True), ("v2.1", False), ("v3.0", True), ("v3.0", False)])
def test_the_loader_reads_what_was_converted(tmp_path, version, video):
    source = make_lerobot(tmp_path / "source", version, video)
    path = convert_lerobot(source, tmp_path / "mine", camera=WRIST, frames_per_shard=6).directory
    loader = load(path, tmp_path / "cache")
    seen = 0
    for split, numbers in (("train", (0, 1, 2)), ("val", (3,))):
        raw = np.concatenate([actions_of(i) for i in numbers])
        expected = raw.copy()
        expected[:, 6] = raw[:, 6].clip(0, 1)
        np.testing.assert_array_equal(loader.actions(split), expected)
        for number, episode in zip(numbers, loader.episodes(split), strict=True):
            assert len(episode.frames.image) == LENGTHS[number]
            assert episode.instruction == TASKS[number % 2]
            for step, image in enumerate(episode.frames.image):
                wide = Image.fromarray(frame(WRIST, number, step)).resize((48, 48), Image.Resampling.LANCZOS)
                assert psnr(image, np.asarray(wide)) > 32  # another frame or camera scores below 20
                seen += 1
            # The chunk stops at the episode's end, so the boundaries are right.
            left = np.minimum(LENGTHS[number] - np.arange(LENGTHS[number]), 4)
            np.testing.assert_array_equal(episode.frames.action_mask.sum(1), left)
    assert seen == sum(LENGTHS)


def test_frames_differ_enough_for_the_test_above():
    pictures = [frame(WRIST, i, t) for i, length in enumerate(LENGTHS) for t in range(length)]
    pictures.append(frame(FRONT, 0, 0))
    assert max(psnr(a, b) for i, a in enumerate(pictures) for b in pictures[:i]) < 20


def test_states_and_stored_images_are_kept(tmp_path):
    import tensorflow_datasets as tfds

    source = make_lerobot(tmp_path / "source", "v3.0", video=False)
    path = convert_lerobot(source, tmp_path / "mine", camera=FRONT, name="other_name").directory
    assert {p.name for p in path.iterdir()} == {
        "conversion.json",
        "dataset_info.json",
        "features.json",
        "metadata.json",
        "other_name-train.tfrecord-00000-of-00001",
        "other_name-val.tfrecord-00000-of-00001",
    }
    builder: Any = tfds.builder_from_directory(str(path))
    assert builder.info.splits["train"].num_bytes > 1000
    for number, episode in enumerate(builder.as_dataset("train")):
        assert episode["episode_metadata"]["episode_index"].numpy() == number
        steps = list(episode["steps"].as_numpy_iterator())
        np.testing.assert_array_equal([s["observation"]["state"] for s in steps], states_of(number))
        np.testing.assert_array_equal(
            [s["observation"]["image"] for s in steps], [frame(FRONT, number, t) for t in range(LENGTHS[number])]
        )
        assert [s["is_last"] for s in steps] == [False] * (LENGTHS[number] - 1) + [True]
        assert [s["is_first"] for s in steps] == [True] + [False] * (LENGTHS[number] - 1)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_an_interrupted_conversion_goes_on(tmp_path, monkeypatch, version):
    source = make_lerobot(tmp_path / "source", version, video=True)
    whole = convert_lerobot(source, tmp_path / "whole", camera=FRONT, name="toy", frames_per_shard=3).directory
    read, got = lerobot.read_episode, []

    def dies(source, episode):
        if episode.number == 2:
            raise KeyboardInterrupt
        got.append(episode.number)
        return read(source, episode)

    monkeypatch.setattr(lerobot, "read_episode", dies)
    with pytest.raises(KeyboardInterrupt):
        convert_lerobot(source, tmp_path / "resumed", camera=FRONT, name="toy", frames_per_shard=3)
    assert got == [0, 1] and not (tmp_path / "resumed" / "1.0.0").exists()
    with pytest.raises(InputError, match="was started with camera"):
        convert_lerobot(source, tmp_path / "resumed", camera=WRIST, name="toy", frames_per_shard=3)

    got.clear()
    monkeypatch.setattr(
        lerobot, "read_episode", lambda source, episode: got.append(episode.number) or read(source, episode)
    )
    reported = []
    resumed = convert_lerobot(
        source,
        tmp_path / "resumed",
        camera=FRONT,
        name="toy",
        frames_per_shard=3,
        progress=lambda *counts: reported.append(counts),
    ).directory
    assert got == [2, 3]
    assert reported[0] == (1, 4) and reported[-1] == (4, 4)
    assert files_of(resumed) == files_of(whole)
    assert [p.name for p in (tmp_path / "resumed").iterdir()] == ["1.0.0"]
    with pytest.raises(InputError, match="already exists"):
        convert_lerobot(source, tmp_path / "resumed", camera=FRONT)


def test_one_episode_in_memory(tmp_path, monkeypatch):
    """Each episode is written before the next one is read."""
    source = make_lerobot(tmp_path / "source", "v2.1", video=False)
    read, write, events = lerobot.read_episode, tf.io.TFRecordWriter.write, []
    monkeypatch.setattr(lerobot, "read_episode", lambda s, e: events.append("read") or read(s, e))
    monkeypatch.setattr(tf.io.TFRecordWriter, "write", lambda w, r: events.append("write") or write(w, r))
    convert_lerobot(source, tmp_path / "mine", camera=FRONT)
    assert events == ["read", "write"] * len(LENGTHS)


def test_nan_is_left_to_the_loader(tmp_path):
    actions = actions_of(1)
    actions[2, 4] = np.nan
    source = make_lerobot(tmp_path / "source", "v2.1", video=False, actions={1: actions})
    path = convert_lerobot(source, tmp_path / "mine", camera=FRONT).directory
    with pytest.raises(InputError, match="nan"):
        load(path, tmp_path / "cache")


def another_length(source: Path) -> None:
    """Episode 2 is one row longer than its video and parquet file."""
    rows = [json.loads(line) for line in (source / "meta/episodes.jsonl").read_text().splitlines()]
    write_jsonl(source / "meta/episodes.jsonl", [r | {"length": r["length"] + (r["episode_index"] == 2)} for r in rows])


def later(source: Path) -> None:
    """The rows of episode 0 are 40 ms late."""
    file = source / "data/chunk-000/episode_000000.parquet"
    table = pq.read_table(file)
    times = pa.array(np.arange(LENGTHS[0]) / FPS + 0.04, pa.float32())
    write_table(file, table.set_column(table.schema.names.index("timestamp"), "timestamp", times))


def video_of(source: Path, episode: int) -> Path:
    return source / f"videos/chunk-{episode // 2:03d}/{FRONT}/episode_{episode:06d}.mp4"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: video_of(s, 1).unlink(), "episode 1: the video .*episode_000001.mp4 does not exist"),
        (lambda s: video_of(s, 1).write_bytes(b"no video"), "episode 1: the video .* does not decode"),
        (lambda s: write_video(video_of(s, 0), [frame(FRONT, 0, 0)] * 4), "5 rows in .*, but 4 frames in"),
        (lambda s: write_video(video_of(s, 0), [frame(FRONT, 0, 0)] * 6), "5 rows in .*, but 6 frames in"),
        (later, "frame . of .* is at .* s, its row says .* s; they may differ by at most 0.0250 s"),
        (another_length, "episode 2: .* has 8 of its rows, meta/ says 9"),
        (lambda s: change_info(s, codebase_version="v1.6"), "codebase_version 'v1.6': v2.0, v2.1, v3.0 are read"),
        (lambda s: change_info(s, splits={"train": "0:3"}), "do not contain each of the 4 episodes exactly once"),
        (lambda s: change_info(s, splits={"train": "most"}), "FIRST:END is expected"),
        (lambda s: change_info(s, features={}), "no camera 'observation.images.front': choose --camera from none"),
        (lambda s: (s / "meta/info.json").unlink(), "info.json cannot be read"),
        (lambda s: (s / "meta/info.json").write_text("{"), "info.json is not JSON"),
        (
            lambda s: (s / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "x"}\n'),
            "task_index 1 is not among",
        ),
        (
            lambda s: (s / "meta/tasks.jsonl").write_text('{"index": 0}\n'),
            "tasks.jsonl has no 'task_index' in its line 1",
        ),
        (lambda s: (s / "data/chunk-001/episode_000002.parquet").unlink(), "episode_000002.parquet does not exist"),
        (lambda s: (s / "data/chunk-001/episode_000002.parquet").write_bytes(b"x" * 99), "not a readable parquet"),
    ],
)
def test_faults_are_one_sentence(tmp_path, spoil, message):
    source = make_lerobot(tmp_path / "source", "v2.1", video=True)
    spoil(source)
    with pytest.raises(InputError, match=message):
        convert_lerobot(source, tmp_path / "mine", camera=FRONT)
    assert not (tmp_path / "mine" / "1.0.0").exists()


def test_rows_of_one_episode_must_be_together(tmp_path):
    source = make_lerobot(tmp_path / "source", "v3.0", video=False)
    file = source / "data/chunk-000/file-000.parquet"
    write_table(file, pq.read_table(file).take([0, 1, 2, 5, 6, 7, 3, 4]))
    with pytest.raises(InputError, match=r"episode 0: its rows in .* are not contiguous"):
        convert_lerobot(source, tmp_path / "mine", camera=FRONT)


def test_a_truncated_v3_video(tmp_path):
    """The last episode of the file lacks frames; the message names that episode, not its neighbours."""
    source = make_lerobot(tmp_path / "source", "v3.0", video=True)
    frames = [frame(FRONT, i, t) for i in range(3) for t in range(LENGTHS[i])]
    write_video(source / f"videos/{FRONT}/chunk-000/file-000.mp4", frames[:-2])
    with pytest.raises(InputError, match=r"episode 2: 8 rows in .*, but 6 frames in"):
        convert_lerobot(source, tmp_path / "mine", camera=FRONT)


def test_command(tmp_path, capsys):
    source = make_lerobot(tmp_path / "source", "v3.0", video=True)
    assert main(["data", "lerobot", str(source), str(tmp_path / "mine")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("spatialvla-jax data lerobot: ") and f"choose --camera from {FRONT}, {WRIST}" in error
    assert main(["data", "lerobot", str(source), str(tmp_path / "mine"), "--camera", FRONT]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == f"wrote {tmp_path / 'mine' / '1.0.0'}" and "train: 3 episodes, 16 frames" in out
    assert "gripper" in out[0] and "quality 95" in out[1]


def test_a_shard_whose_source_has_changed_is_made_again(tmp_path):
    """The conversion stops at a bad episode. Before the rerun, an already converted episode gets other actions."""
    source = make_lerobot(tmp_path / "source", "v2.1", video=False)
    bad = source / "data/chunk-001/episode_000002.parquet"
    whole = bad.read_bytes()
    bad.write_bytes(b"x" * 99)
    options = {"camera": FRONT, "frames_per_shard": 3}
    with pytest.raises(InputError, match="episode 2"):
        convert_lerobot(source, tmp_path / "mine", **options)
    bad.write_bytes(whole)
    set_cells(source, 1, "action", (-actions_of(1)).tolist())
    made = convert_lerobot(source, tmp_path / "mine", **options)
    assert made.changed == 1
    stored = load(made.directory, tmp_path / "cache").actions("train")
    expected = np.concatenate([actions_of(0), -actions_of(1), actions_of(2)])
    np.testing.assert_array_equal(stored[:, :6], expected[:, :6])


def test_a_conversion_that_made_nothing_leaves_nothing(tmp_path):
    """The corrected call may therefore use other options."""
    source = make_lerobot(tmp_path / "source", "v2.1", video=False)
    set_cells(source, 0, FRONT, [b""] * LENGTHS[0])
    with pytest.raises(InputError, match="episode 0"):
        convert_lerobot(source, tmp_path / "a" / "mine", camera=FRONT)
    assert not (tmp_path / "a").exists()
    assert convert_lerobot(source, tmp_path / "a" / "mine", camera=WRIST).directory.is_dir()


def test_faulty_episodes_are_left_out_and_counted(tmp_path, capsys):
    """One episode is damaged, one is not listed. A resumed conversion also counts what it skipped before."""
    import tensorflow_datasets as tfds

    source = make_lerobot(tmp_path / "source", "v2.1", video=False)
    set_cells(source, 1, "action", [[1.0]] * LENGTHS[1])
    change_info(source, total_episodes=5)
    argv = ["data", "lerobot", str(source), str(tmp_path / "mine"), "--camera", FRONT]
    assert main(argv) == 2
    assert "episode 4: info.json counts it, but no table lists it (--faults skip" in capsys.readouterr().err
    assert main([*argv, "--faults", "skip"]) == 0
    out = capsys.readouterr().out
    assert "episodes left out: 2 (1 not listed, 1 shape)" in out and "train: 2 episodes, 13 frames" in out
    builder: Any = tfds.builder_from_directory(str(tmp_path / "mine" / "1.0.0"))
    assert builder.info.metadata["skipped"] == {"not listed": 1, "shape": 1}
    unlisted, damaged = builder.info.metadata["faults"]
    assert "episode 4: " in unlisted and "episode 1: " in damaged
    loader = load(tmp_path / "mine" / "1.0.0", tmp_path / "cache")
    np.testing.assert_array_equal(loader.actions("train")[:5, :6], actions_of(0)[:, :6])
    assert len(loader.actions("train")) == LENGTHS[0] + LENGTHS[2]


def test_a_conversion_that_goes_on_remembers_what_it_left_out(tmp_path, monkeypatch):
    """The shard of the one faulty episode is empty. A resumed call keeps it, or fails if it must not skip."""
    source = make_lerobot(tmp_path / "source", "v2.1", video=False)
    set_cells(source, 1, "action", [[1.0]] * LENGTHS[1])
    read, options = lerobot.read_episode, {"camera": FRONT, "frames_per_shard": 3}

    def dies(source, episode):
        if episode.number == 2:
            raise KeyboardInterrupt
        return read(source, episode)

    with monkeypatch.context() as patch:
        patch.setattr(lerobot, "read_episode", dies)
        with pytest.raises(KeyboardInterrupt):
            convert_lerobot(source, tmp_path / "mine", faults="skip", **options)
    with pytest.raises(InputError, match="episode 1: action"):
        convert_lerobot(source, tmp_path / "mine", **options)
    made = convert_lerobot(source, tmp_path / "mine", faults="skip", **options)
    assert [fault.reason for fault in made.skipped] == ["shape"] and made.changed == 0
    assert [episode.number for episode in made.splits["train"]] == [0, 2]
    loader = load(made.directory, tmp_path / "cache")
    assert [len(episode.frames.image) for episode in loader.episodes("train")] == [LENGTHS[0], LENGTHS[2]]


def test_no_episode_is_left(tmp_path):
    source = make_lerobot(tmp_path / "source", "v2.1", video=False)
    set_cells(source, 3, "action", [[1.0]])
    with pytest.raises(InputError, match=r"no episode of the split 'val' is left; the first fault: .*episode 3"):
        convert_lerobot(source, tmp_path / "mine", camera=FRONT, faults="skip")
