import copy
import dataclasses
import functools
import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers.indexes import load_index
from helpers.toy_rlds import libero_features, make_episodes, make_rlds

from spatialvla_jax.data import index_cache
from spatialvla_jax.data.index_cache import read_shard
from spatialvla_jax.data.oxe import CATALOGUE, DatasetSpec
from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.distributed import Processes

LIBERO = CATALOGUE["libero"]


def read(index, key, frame):
    offset, size, _ = index.spans(key, frame)
    with open(index.files[index.arrays["episode_file"][index.episode(frame)]], "rb") as file:
        file.seek(offset)
        return file.read(size)


def test_equals_what_tfds_reads(rlds, tmp_path):
    """Checks every frame's bytes, action, camera, language and episode, in stored order."""
    index = load_index("toy", rlds, LIBERO, "train", tmp_path)
    builder = tfds.builder_from_directory(rlds)
    skip = {"steps": {"observation": {"image": tfds.decode.SkipDecoding(), "depth": tfds.decode.SkipDecoding()}}}
    dataset = builder.as_dataset("train", decoders=skip, read_config=tfds.ReadConfig(interleave_cycle_length=1))
    frame = 0
    for number, episode in enumerate(dataset):
        for step, values in enumerate(episode["steps"].as_numpy_iterator()):
            assert read(index, "image", frame) == values["observation"]["image"]
            assert read(index, "depth", frame) == values["observation"]["depth"]
            np.testing.assert_array_equal(index.intrinsics(frame), values["observation"]["intrinsics"])
            np.testing.assert_array_equal(index.arrays["action"][frame, :6], values["action"][:6])
            assert index.arrays["action"][frame, 6] == (values["action"][6] < 0)
            assert index.instructions[index.language(frame)] == values["language_instruction"].decode()
            assert index.episode(frame) == number and index.step(frame) == step
            frame += 1
        assert index.arrays["episode_end"][number] == frame
    assert frame == index.num_frames > 0 and index.num_episodes == 7 and len(index.files) == 3
    rows = index.statistics["action"]
    np.testing.assert_allclose(rows["q01"], np.quantile(index.arrays["action"], 0.01, axis=0), atol=1e-6)
    assert index.statistics["num_transitions"] == frame and index.statistics["num_trajectories"] == 7


def test_is_made_once(rlds, tmp_path):
    calls = []
    first = load_index("toy", rlds, LIBERO, "train", tmp_path, lambda *call: calls.append(call))
    assert calls == [("toy", 1, 3), ("toy", 2, 3), ("toy", 3, 3)]
    second = load_index("toy", rlds, LIBERO, "train", tmp_path, lambda *call: calls.append(call))
    assert len(calls) == 3 and len(list(tmp_path.iterdir())) == 1
    np.testing.assert_array_equal(first.arrays["image"], second.arrays["image"])
    load_index("toy", rlds, dataclasses.replace(LIBERO, robot="another", depth_unit=1.0), "train", tmp_path)
    assert len(calls) == 3
    load_index(
        "toy", rlds, DatasetSpec(operations=LIBERO.operations), "train", tmp_path
    )  # another spec gets another index
    assert len(list(tmp_path.iterdir())) == 2


def test_made_twice_at_once(rlds, tmp_path, monkeypatch):
    """Two processes may make the same index at once: one wins, and both read it."""
    from spatialvla_jax.data import index_cache as module

    original = os.replace

    def replace(source, target):
        monkeypatch.setattr(module.os, "replace", original)
        load_index("toy", rlds, LIBERO, "val", tmp_path)  # the other process is faster
        original(source, target)

    monkeypatch.setattr(module.os, "replace", replace)
    assert load_index("toy", rlds, LIBERO, "val", tmp_path).num_episodes == 2
    assert len(list(tmp_path.iterdir())) == 1


def test_bridge_format(tmp_path):
    """Frames follow when operations drop steps; episodes without language are left out and counted."""
    features = tfds.features
    steps = {
        "observation": {
            "image_0": features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "state": features.Tensor(shape=(7,), dtype=np.float32),
        },
        "action": features.Tensor(shape=(7,), dtype=np.float32),
        "language_instruction": features.Text(),
    }
    episodes = [
        [
            {
                "observation": {"image_0": f"image {step}".encode(), "state": np.full(7, step**2, np.float32)},
                "action": np.full(7, float(step % 2), np.float32),
                "language_instruction": text,
            }
            for step in range(5)
        ]
        for text in ("fold it", "", "turn it")
    ]
    path = make_rlds(tmp_path, {"train": episodes}, step_features=steps)
    index = load_index("bridge", path, CATALOGUE["bridge_orig"], "train", tmp_path / "cache")
    assert (index.num_frames, index.num_episodes, index.num_read) == (6, 2, 3) and index.skipped == {"unlabeled": 1}
    assert [read(index, "image", frame) for frame in range(6)] == [b"image 1", b"image 2", b"image 3"] * 2
    expected = [[3] * 6 + [1], [5] * 6 + [0], [7] * 6 + [1]] * 2
    np.testing.assert_array_equal(index.arrays["action"], expected)
    assert index.step(np.arange(6)).tolist() == [1, 2, 3] * 2 and index.arrays["episode_number"].tolist() == [0, 2]


def not_finite(value):
    return lambda episodes: episodes[3][2]["action"].__setitem__(4, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            not_finite(np.nan),
            r"toy-train\.tfrecord-00001.*, episode 0: step 2 has the action value nan in dimension \[4\]",
        ),
        (
            not_finite(np.inf),
            r"toy-train\.tfrecord-00001.*, episode 0: step 2 has the action value inf in dimension \[4\]",
        ),
        (
            lambda episodes: [step.update(language_instruction="") for step in episodes[1]],
            r"episode 1: step 0 has no language \('language_instruction' is empty\)",
        ),
        (lambda episodes: episodes[0][1].update(language_instruction=b"\xff\xfe"), "episode 0: .*not UTF-8"),
    ],
)
def test_broken_episodes(tmp_path, change, message):
    episodes = make_episodes(4)
    change(episodes)
    path = make_rlds(tmp_path, {"train": episodes})
    with pytest.raises(InputError, match=rf"dataset 'toy', file .*{message}"):
        load_index("toy", path, dataclasses.replace(LIBERO, skip_unlabeled=False), "train", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())  # nothing half-written


def test_action_of_another_width(tmp_path):
    episodes = copy.deepcopy(make_episodes(1))
    for step in episodes[0]:
        step["action"] = step["action"][:6]
    path = make_rlds(tmp_path, {"train": episodes}, step_features=libero_features(action_width=6))
    with pytest.raises(InputError, match=r"'toy' .* has an action 6 wide \(action \(6,\)\); 7 is expected"):
        load_index("toy", path, LIBERO, "train", tmp_path / "cache")


def test_depth_of_another_type(tmp_path):
    steps = libero_features()
    steps["observation"]["depth"] = tfds.features.Image(shape=(None, None, 1), dtype=np.uint8, encoding_format="png")
    episodes = make_episodes(1)
    for step in episodes[0]:
        step["observation"]["depth"] = step["observation"]["depth"].astype(np.uint8)
    path = make_rlds(tmp_path, {"train": episodes}, step_features=steps)
    with pytest.raises(InputError, match=r"'observation/depth' as Image.*uint8.*; a 16-bit PNG .* is expected"):
        load_index("toy", path, LIBERO, "train", tmp_path / "cache")


def test_key_that_is_not_there(rlds, tmp_path):
    with pytest.raises(InputError, match=r"has no key 'observation/wrist' in its steps"):
        load_index("toy", rlds, DatasetSpec(image="observation/wrist"), "train", tmp_path)


def test_missing_directory_and_versions(rlds, tmp_path):
    def load(path):
        load_index("toy", path, LIBERO, "train", tmp_path)

    with pytest.raises(InputError, match=r"2\.0\.0 does not exist: the versions there are 1\.0\.0"):
        load(rlds.parent / "2.0.0")
    with pytest.raises(InputError, match=r"holds the versions 1\.0\.0"):
        load(rlds.parent)
    with pytest.raises(InputError, match=r"other/1\.0\.0 does not exist: .* holds toy"):
        load(rlds.parent.parent / "other" / "1.0.0")
    with pytest.raises(InputError, match="holds nothing"):
        load(tmp_path)
    with pytest.raises(InputError, match=rf"dataset_info\.json is a file: name .*, such as {rlds}$"):
        load(rlds / "dataset_info.json")


def test_split_that_does_not_exist(rlds, tmp_path):
    with pytest.raises(InputError, match=r"has no split 'test': it has train, val"):
        load_index("toy", rlds, LIBERO, "test", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda info: info.pop("splits"), r"dataset_info\.json names no splits"),
        (lambda info: info.update(splits=[{}]), r"dataset_info\.json names no splits"),
        (lambda info: info.pop("name"), r"dataset_info\.json has no 'name'"),
        (lambda info: info["splits"][0].pop("shardLengths"), "'train' of .* holds no episodes: .* no shardLengths"),
        (lambda info: info["splits"][0].update(shardLengths="x"), "is not a readable TFDS dataset: .*shardLengths"),
        (lambda info: info.pop("version"), "is not a readable TFDS dataset: Invalid version"),
        (None, r"dataset_info\.json is not readable JSON"),
    ],
)
def test_broken_dataset_info(tmp_path, change, message):
    path = make_rlds(tmp_path, {"train": make_episodes(1, steps=(1, 1), size=(8, 8))})
    file = path / "dataset_info.json"
    if change:
        change(info := json.loads(file.read_text()))
    file.write_text(json.dumps(info) if change else file.read_text()[:50])
    with pytest.raises(InputError, match=message):
        load_index("toy", path, LIBERO, "train", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_missing_shard(tmp_path):
    path = make_rlds(tmp_path, {"train": make_episodes(4)})
    file = sorted(path.glob("*.tfrecord*"))[1]
    file.unlink()
    with pytest.raises(InputError, match=f"{file} is missing"):
        load_index("toy", path, LIBERO, "train", tmp_path / "cache")


def together(count, work):
    """Call `work(processes)` in this many threads, as processes of a run; returns their results."""
    barrier, given = threading.Barrier(count), [b""] * count

    def gather(index, data):
        given[index] = data
        barrier.wait()
        found = list(given)
        barrier.wait()
        return found

    def one(index):
        try:
            return work(Processes(index, count, functools.partial(gather, index)))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def files(folder):
    return {file.name: file.read_bytes() for file in next(folder.iterdir()).iterdir()}


@pytest.mark.parametrize("common", [False, True])
def test_processes_divide_the_shards(rlds, tmp_path, common):
    """Each of two processes reads only its shards. Both get the index that a single process makes, bit for bit, in
    shared or separate folders. A process with an empty disk gets it from the other, and nothing is read again."""
    read = []

    def counted(source, number):
        read.append(number)
        return read_shard(source, number)

    def load(processes):
        folder = tmp_path / ("common" if common else str(processes.index))
        return load_index("toy", rlds, LIBERO, "train", folder, processes=processes, read=counted), folder

    load_index("toy", rlds, LIBERO, "train", tmp_path / "alone")
    for _ in range(2):
        for index, folder in together(2, load):
            assert files(folder) == files(tmp_path / "alone") and index.num_episodes == 7
            assert index.directories[0].parent == folder and len(list(folder.iterdir())) == 1
        assert sorted(read) == [0, 1, 2]
        shutil.rmtree(tmp_path / "0", ignore_errors=True)


def test_a_fault_ends_every_process(tmp_path):
    episodes = make_episodes(7, size=(8, 8))
    episodes[5][0]["action"][2] = np.nan
    path = make_rlds(tmp_path / "data", {"train": episodes})

    def load(processes):
        with pytest.raises(InputError, match=r"00001, episode 2: step 0 has the action value nan"):
            load_index("toy", path, LIBERO, "train", tmp_path / str(processes.index), processes=processes)
        return not list((tmp_path / str(processes.index)).iterdir())

    assert together(2, load) == [True, True]


def test_bytes_a_frame(tmp_path):
    """At most 48 bytes with one image and 12 more with depth, for the shortest realistic episodes. Intrinsics that
    change only once add nothing."""
    episodes = make_episodes(3, size=(8, 8), steps=(40, 40))
    for step in episodes[1][20:]:
        step["observation"]["intrinsics"] = step["observation"]["intrinsics"] * np.asarray(
            [[1.5], [1], [1]], np.float32
        )
    path = make_rlds(tmp_path / "data", {"train": episodes})
    for spec, most in ((LIBERO, 60), (dataclasses.replace(LIBERO, depth=None), 48)):
        index = load_index("toy", path, spec, "train", tmp_path / "cache")
        assert sum(array.nbytes for array in index.arrays.values()) <= most * index.num_frames
        given = [step["observation"]["intrinsics"] for episode in episodes for step in episode]
        np.testing.assert_array_equal(index.intrinsics(np.arange(120)), given)
        assert len(index.arrays["intrinsics"]) == 3


def test_places_of_frames_from_the_file(rlds, tmp_path, monkeypatch):
    """Arrays too large to keep in memory give the same rows."""
    index = load_index("toy", rlds, LIBERO, "train", tmp_path)
    monkeypatch.setattr(index_cache, "_HELD", {})
    monkeypatch.setattr(index_cache, "_HELD_OTHERS", 0)
    mapped = load_index("toy", rlds, LIBERO, "train", tmp_path)
    assert "image" in mapped.descriptors and "image" not in index.descriptors
    for frames in (3, np.arange(index.num_frames), np.asarray([[5, 0], [2, 5]]), np.empty(0, int)):
        np.testing.assert_array_equal(mapped.spans("image", frames), index.spans("image", frames), strict=True)
