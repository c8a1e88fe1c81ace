"""How indexing and a running stream treat damaged data, under both policies."""

import dataclasses
import itertools
import json
import os
import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers.indexes import load_index
from helpers.streams import assert_resumes, assert_shared, take
from helpers.toy_rlds import data_config, make_episodes, make_rlds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spatialvla_jax.data import Loader
from spatialvla_jax.data.index import Faults
from spatialvla_jax.data.oxe import CATALOGUE
from spatialvla_jax.data.tfrecord import read_records
from spatialvla_jax.errors import InputError

LIBERO = CATALOGUE["libero"]
STRICT = dataclasses.replace(LIBERO, skip_unlabeled=False)
SIZE = 16
SKIP = {"policy": "skip", "limit": 100}


# --- while indexing ---------------------------------------------------------------------------------------------------


def damage_language(text):
    def change(episodes):
        for step in episodes[1]:
            step["language_instruction"] = text

    return change


def damage_action(value):
    def change(episodes):
        episodes[1][1]["action"][4] = value

    return change


def damage_camera(step, camera):
    def change(episodes):
        episodes[1][step]["observation"]["intrinsics"] = np.asarray(camera, np.float32)

    return change


# (change to the episodes before they are written, reason, part of the message); always episode 1
DAMAGE = {
    "nan": (damage_action(np.nan), "not finite", "step 1 has the action value nan in dimension [4]"),
    "infinite": (damage_action(-np.inf), "not finite", "step 1 has the action value -inf in dimension [4]"),
    "no steps": (lambda episodes: episodes[1].clear(), "no steps", "the episode has no steps"),
    "no language": (damage_language(""), "no language", "step 0 has no language ('language_instruction' is empty)"),
    "blank": (damage_language("  \n"), "no language", "step 0 has no language"),
    "not text": (damage_language(b"\xff\xfe"), "not UTF-8", "not UTF-8"),
    "no camera": (
        damage_camera(0, np.zeros((3, 3))),
        "camera",
        "step 0 has invalid intrinsics: 'observation/",
    ),
    "relative camera": (
        damage_camera(2, [[0.8, 0, 0.5], [0, 1, 0.5], [0, 0, 1]]),
        "camera",
        "step 2 has invalid intrinsics: 'observation/intrinsics' looks relative to the image",
    ),
    "camera of larger images": (
        damage_camera(1, [[500, 0, 310], [0, 480, 250], [0, 0, 1]]),
        "camera",
        "'observation/intrinsics' must have its principal point inside the image of 64×48 px",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_episode(tmp_path, case):
    """`fail` names the fault and writes nothing; `skip` counts it, and the other episodes are unaffected."""
    change, reason, sentence = DAMAGE[case]
    episodes = make_episodes(5, steps=(3, 6))
    whole = [len(steps) for steps in episodes]
    change(episodes)
    path = make_rlds(tmp_path, {"train": episodes})
    with pytest.raises(InputError) as error:
        load_index("toy", path, STRICT, "train", tmp_path / "cache")
    file = sorted(path.glob("*.tfrecord*"))[0]
    assert f"dataset 'toy', file {file}, episode 1: " in str(error.value) and sentence in str(error.value)
    assert not list((tmp_path / "cache").iterdir())
    index = load_index("toy", path, STRICT, "train", tmp_path / "cache", faults=Faults("skip", 1))
    assert index.skipped == {reason: 1} and (index.num_read, index.num_episodes) == (5, 4)
    assert np.diff(index.arrays["episode_end"], prepend=0).tolist() == whole[:1] + whole[2:]
    assert index.arrays["episode_number"].tolist() == [0, 2, 0, 1]
    # The cached index now has a fault: `fail` reports it without reading the data again.
    with pytest.raises(InputError, match="episode 1"):
        load_index("toy", path, STRICT, "train", tmp_path / "cache")
    with pytest.raises(
        InputError, match=rf"1 episodes of the dataset 'toy' are faulty \(1 {reason}\), more than the 0"
    ):
        load_index("toy", path, STRICT, "train", tmp_path / "other", faults=Faults("skip", 0))


def records_of(file: Path) -> list[tuple[int, int]]:
    return [(offset, len(data)) for offset, data, _ in read_records(file)]


def flip(data: bytearray, place: int) -> bytearray:
    data[place] ^= 0x10
    return data


# (change to the first file's bytes, given its three records; reasons; episodes left in it)
FILES = {
    "payload": (lambda data, r: flip(data, r[1][0] + 30), {"checksum": 1}, [0, 2]),
    "payload checksum": (lambda data, r: flip(data, r[1][0] + r[1][1] + 1), {"checksum": 1}, [0, 2]),
    "length": (lambda data, r: flip(data, r[1][0] - 11), {"checksum": 2}, [0]),
    "length checksum": (lambda data, r: flip(data, r[1][0] - 3), {"checksum": 2}, [0]),
    "first length": (lambda data, r: flip(data, 1), {"checksum": 3}, []),
    "within data": (lambda data, r: data[: r[2][0] + 9], {"truncated": 1}, [0, 1]),
    "within header": (lambda data, r: data[: r[1][0] - 5], {"truncated": 2}, [0]),
    "between records": (lambda data, r: data[: r[2][0] - 12], {"truncated": 1}, [0, 1]),
    "empty": (lambda data, r: b"", {"truncated": 3}, []),
}


@pytest.mark.parametrize("case", FILES)
def test_damaged_file(tmp_path, case):
    damage, reasons, left = FILES[case]
    path = make_rlds(tmp_path, {"train": make_episodes(5)})
    file = sorted(path.glob("*.tfrecord*"))[0]
    file.write_bytes(damage(bytearray(file.read_bytes()), records_of(file)))
    lost = min(set(range(3)) - set(left))
    with pytest.raises(InputError, match=rf"file {file}, episode {lost}: "):
        load_index("toy", path, LIBERO, "train", tmp_path / "cache")
    index = load_index("toy", path, LIBERO, "train", tmp_path / "cache", faults=Faults("skip", 3))
    assert index.skipped == reasons and index.num_read == 5
    assert index.num_episodes + sum(index.skipped.values()) == index.num_read
    numbers = index.arrays["episode_number"][index.arrays["episode_file"] == 0]
    assert numbers.tolist() == left


@pytest.fixture(scope="module")
def one_file(tmp_path_factory):
    path = make_rlds(tmp_path_factory.mktemp("one"), {"train": make_episodes(5, size=(8, 8))}, episodes_per_shard=5)
    (file,) = path.glob("*.tfrecord*")
    return path, file, file.read_bytes()


@given(st.lists(st.floats(0, 1, exclude_max=True), max_size=3), st.none() | st.floats(0, 1), st.integers(1, 255))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_read_is_used_and_skipped_whatever_is_damaged(one_file, tmp_path_factory, places, cut, mask):
    """For any flipped bytes and any truncation, no episode is lost silently, and those that are used are intact."""
    path, file, original = one_file
    cache = tmp_path_factory.mktemp("cache")
    try:
        clean = load_index("toy", path, LIBERO, "train", cache)
        data = bytearray(original)
        for place in places:
            data[int(place * len(data))] ^= mask
        file.write_bytes(data[: None if cut is None else int(cut * len(data))])
        try:
            index = load_index("toy", path, LIBERO, "train", tmp_path_factory.mktemp("cache"), faults=Faults("skip", 5))
        except InputError as error:
            assert "no usable episode" in str(error)
            return
        assert index.num_episodes + sum(index.skipped.values()) == index.num_read == 5
        ends = dict(zip(clean.arrays["episode_number"].tolist(), clean.arrays["episode_end"].tolist(), strict=True))
        for row, number in enumerate(index.arrays["episode_number"].tolist()):
            length = index.arrays["episode_end"][row] - (index.arrays["episode_end"][row - 1] if row else 0)
            own = index.arrays["action"][index.arrays["episode_end"][row] - length : index.arrays["episode_end"][row]]
            np.testing.assert_array_equal(own, clean.arrays["action"][ends[number] - length : ends[number]])
    finally:
        file.write_bytes(original)


def test_file_that_vanishes_while_indexing(tmp_path):
    path = make_rlds(tmp_path, {"train": make_episodes(7)})
    files = sorted(path.glob("*.tfrecord*"))

    def progress(name, done, total):
        files[1].unlink(missing_ok=True)

    index = load_index("toy", path, LIBERO, "train", tmp_path / "cache", progress, Faults("skip", 3))
    assert index.skipped == {"unreadable file": 3} and (index.num_read, index.num_episodes) == (7, 4)


def test_limit_is_of_all_datasets(tmp_path):
    def dataset(seed):
        episodes = make_episodes(4, seed=seed)
        damage_action(np.nan)(episodes)
        return make_rlds(tmp_path / str(seed), {"train": episodes})

    paths = [dataset(seed) for seed in range(3)]
    config = data_config(*paths, cache_dir=tmp_path / "cache", faults={"policy": "skip", "limit": 2})
    with pytest.raises(
        InputError, match=r"3 episodes of the split 'train' are faulty \(3 not finite\), more than the 2"
    ):
        Loader(config, image_size=SIZE)
    loader = Loader(config | {"faults": SKIP}, image_size=SIZE)
    assert [row["skipped"] for row in loader.table()] == [{"not finite": 1}] * 3 and loader.num_skipped() == 3
    assert all(row["read"] == row["episodes"] + sum(row["skipped"].values()) == 4 for row in loader.table())
    assert "1 not finite" in loader.describe()


@pytest.mark.parametrize(
    "faults", [{"policy": "ignore"}, {"policy": "skip", "limit": -1}, {"policy": "skip", "limit": 0.5}]
)
def test_bad_policy(rlds, tmp_path, faults):
    with pytest.raises(InputError, match=r"data\.faults has policy"):
        Loader(data_config(rlds, cache_dir=tmp_path, faults=faults), image_size=SIZE)


def test_one_step_episodes_train(tmp_path):
    """They are valid: all of them are sampled, their chunks padded with neutral actions."""
    path = make_rlds(tmp_path, {"train": make_episodes(6, steps=(1, 1))})
    loader = Loader(data_config(path, cache_dir=tmp_path / "cache"), image_size=SIZE)
    batch = next(loader.batches(6))
    assert sorted(batch.sample_id) == list(range(6)) and loader.num_skipped() == 0
    assert batch.action_mask.tolist() == [[True, False, False, False]] * 6
    assert not batch.actions[:, 1:, :6].any()


# --- while streaming --------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path):
    """Two datasets in which some images do not decode, and the numbers of these frames."""
    episodes = [make_episodes(6, seed=n, steps=(4, 4)) for n in range(2)]
    broken = {3: "undecodable image", 10: "undecodable image", 31: "undecodable image"}
    for number in broken:
        episodes[number // 24][number % 24 // 4][number % 4]["observation"]["image"] = b"\0" * 100
    paths = [make_rlds(tmp_path / str(n), {"train": own}) for n, own in enumerate(episodes)]
    return data_config(*paths, cache_dir=tmp_path / "cache", faults=SKIP), broken


def vanish(config, broken):
    """Also remove one of the second dataset's files: frames 36 … 47."""
    sorted(Path(config["datasets"][1]["path"]).glob("*.tfrecord*"))[1].unlink()
    broken |= {number: "unreadable file" for number in range(36, 48)}


def load_and_take(config, count, **arguments):
    loader = Loader(config, image_size=SIZE)
    return loader, take(loader.batches(8, seed=5, **arguments), count)


def expected(loader, broken, steps, batch_size):
    """The ids, drawn one by one, and the replacements on the way."""
    from spatialvla_jax.data import mixture

    ids, replaced = np.empty((steps, batch_size), int), Counter()
    for sample in range(steps * batch_size):
        for attempt in itertools.count():
            number = mixture.replacement_samples(np.asarray([sample]), attempt)
            dataset, frame = mixture.sample_frames(loader.mixture, 5, number)
            number = int(24 * dataset[0] + frame[0])
            if number not in broken:
                break
            replaced[f"toy{dataset[0]}", broken[number]] += 1
        ids[divmod(sample, batch_size)] = number
    return ids, replaced


@pytest.mark.parametrize("block", [1, 4])
def test_replaced_frames(damaged, block):
    """Batches stay full. A sample on a broken frame is redrawn by a function of its number alone, so resumed and
    distributed streams agree. The counts are those of the draws."""
    config, broken = damaged
    config |= {"read_block": block, "shuffle_frames": 16}
    Loader(config, image_size=SIZE)  # index it before the file is removed
    whole_index = Loader(config, image_size=SIZE)
    stream = partial(whole_index.batches, 8, seed=5)
    begun = stream()
    vanish(config, broken)
    batches = take(begun, 12)
    ids, replaced = expected(whole_index, broken, 12, 8)
    np.testing.assert_array_equal([batch.sample_id for batch in batches], ids)
    assert whole_index.replaced() == replaced and sum(replaced.values()) > 10
    clean = {number for batch in batches for number in batch.sample_id.tolist()}
    assert not clean & set(broken) and all(len(batch.image) == 8 for batch in batches)

    assert_resumes(stream, batches, (3, 11))
    assert_shared(stream, batches, (2, 4))


def test_another_process_finds_the_same(damaged):
    """A fresh loader that knows no broken frames yet starts in the middle."""
    config, _ = damaged
    loader, batches = load_and_take(config, 9)
    later, resumed = load_and_take(config, 4, start_step=5)
    for one, two in zip(batches[5:], resumed, strict=True):
        np.testing.assert_array_equal(one.sample_id, two.sample_id)
        np.testing.assert_array_equal(one.image, two.image)
    assert sum(loader.replaced().values()) >= sum(later.replaced().values()) > 0


def test_limit_while_streaming(damaged):
    config, _ = damaged
    with pytest.raises(InputError, match=r"3 frames are faulty \(3 undecodable image\), more than the 2"):
        load_and_take(config | {"faults": {"policy": "skip", "limit": 2}}, 40)
    with pytest.raises(InputError, match=r"dataset 'toy[01]', file .*, episode \d, step \d: the image does not decode"):
        load_and_take(config | {"faults": {"policy": "fail"}}, 40)


def test_dataset_that_vanishes_altogether(tmp_path):
    paths = [make_rlds(tmp_path / str(n), {"train": make_episodes(6, seed=n, steps=(4, 4))}) for n in range(2)]
    config = data_config(*paths, cache_dir=tmp_path / "cache", faults=SKIP)
    loader = Loader(config, image_size=SIZE)
    stream = loader.batches(8, seed=5)
    next(stream)
    for file in paths[0].glob("*.tfrecord*"):
        os.truncate(file, 0)  # an open file would still be readable
    shutil.rmtree(paths[0])
    batches = take(stream, 20)
    assert all((batch.dataset_id == 1).all() for batch in batches[10:])  # everything read ahead has been used
    assert all(reason == "unreadable file" and name == "toy0" for name, reason in loader.replaced())
    shutil.rmtree(paths[1])
    with pytest.raises(InputError, match="no readable frame"):
        take(loader.batches(8, seed=6), 20)


def test_validation_without_broken_frames(damaged):
    config, broken = damaged
    loader = Loader(config, image_size=SIZE)
    batches = list(loader.epoch(5, "train"))
    valid = np.concatenate([batch.valid for batch in batches])
    ids = np.concatenate([batch.sample_id for batch in batches])
    np.testing.assert_array_equal(ids[valid], sorted(set(range(48)) - set(broken)))
    assert sum(loader.replaced().values()) >= 3
    episodes = list(loader.episodes("train"))
    assert len(episodes) == 12 - 3 and {len(episode.frames.image) for episode in episodes} == {4}
    fresh = Loader(config | {"faults": {"policy": "fail"}}, image_size=SIZE)
    with pytest.raises(InputError, match="episode 0, step 3: the image does not decode"):
        list(fresh.epoch(5, "train"))


def test_slow_disk(rlds, tmp_path, monkeypatch):
    """The stream waits and then continues in order. A run measures the wait in `next`."""
    config = data_config(rlds, cache_dir=tmp_path)
    fast = take(Loader(config, image_size=SIZE).batches(4), 5)
    pread, disk = os.pread, threading.Event()
    monkeypatch.setattr(os, "pread", lambda *arguments: disk.wait() and pread(*arguments))
    with ThreadPoolExecutor(1) as thread:
        slow = thread.submit(lambda: take(Loader(config, image_size=SIZE).batches(4), 5))
        with pytest.raises(TimeoutError):
            slow.result(timeout=0.2)
        disk.set()
        for one, two in zip(fast, slow.result(), strict=True):
            np.testing.assert_array_equal(one.image, two.image)


def test_a_run_logs_what_it_skipped(tmp_path, config_file):
    """The metrics count episodes skipped by indexing and replaced samples; TensorBoard shows the time spent waiting."""
    from spatialvla_jax.config import load_config
    from spatialvla_jax.training.loop import train

    episodes = make_episodes(8, steps=(4, 4))
    damage_action(np.nan)(episodes)
    episodes[2][1]["observation"]["image"] = b"\0" * 100
    path = make_rlds(tmp_path, {"train": episodes})
    # same program as the fixture `trained`
    config = load_config(config_file, {"train.steps": "10", "mesh.fsdp": "4", "mesh.data": "2"})
    config.data.datasets = [{"name": "toy", "spec": "libero", "path": str(path), "weight": 1.0}]
    config.data.update(cache_dir=str(tmp_path / "cache"), faults={"policy": "skip", "limit": 5})
    train(config, tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["data/skipped"] for record in records] == [1] * 10
    assert sum(record["data/replaced"] for record in records) >= 1
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert b"data/wait_seconds" in events.read_bytes() and b"data/replaced" in events.read_bytes()
