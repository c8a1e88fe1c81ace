"""A stream from a bucket equals one from a disk: order, pixels, resuming, several hosts, faults and their counts."""

import itertools
import shutil
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers.batches import assert_equal
from helpers.range_server import range_server
from helpers.serving import eventually
from helpers.streams import assert_resumes, assert_shared, take
from helpers.toy_rlds import data_config, make_episodes, make_rlds

from spatialvla_jax.data import Loader
from spatialvla_jax.data.bucket_speed import Speed, choose_ahead, choose_block
from spatialvla_jax.data.mixture import replacement_samples, sample_frames
from spatialvla_jax.errors import InputError, StorageError
from spatialvla_jax.utils import retries

pytestmark = pytest.mark.slow

SIZE = 16
SKIP = {"policy": "skip", "limit": 100}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two datasets of 24 frames; image number 10 of the first does not decode."""
    episodes = [make_episodes(6, seed=n, steps=(4, 4)) for n in range(2)]
    episodes[0][2][2]["observation"]["image"] = b"\0" * 100
    root = tmp_path_factory.mktemp("root")
    for number, own in enumerate(episodes):
        make_rlds(root / "data" / str(number), {"train": own})
    return root


@pytest.fixture(scope="module")
def running(root):
    """Serves `root`; its folder `data` is gs://data. Streams that earlier tests abandoned still read ahead, so the
    server stays up until the last test ends."""
    with range_server(root) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        patch.setattr(retries, "FIRST_WAIT", 0.001)
        yield server


@pytest.fixture
def server(running):
    """The server, with its faults cleared before and after."""
    yield running
    running.set(fault="")


@pytest.fixture
def configs(root, cache_dir, server):
    """{place: config} of the same data on the disk and in the bucket."""
    places = {"disk": f"{root}/data", "bucket": "gs://data"}
    return {
        place: data_config(*(f"{folder}/{n}/toy/1.0.0" for n in range(2)), cache_dir=cache_dir, faults=SKIP)
        for place, folder in places.items()
    }


def damage(root, change):
    """Undoes a change to the second dataset's second file, frames 36 … 47."""
    file = sorted((root / "data" / "1" / "toy" / "1.0.0").glob("*.tfrecord*"))[1]
    copy = file.with_name("copy")
    shutil.copy2(file, copy)
    change(file)
    return partial(shutil.move, copy, file)


@pytest.mark.parametrize("block", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_the_stream_is_that_of_a_disk(configs, server, block):
    """Holds for any fault of single requests; the counts of replaced frames agree too."""
    loaders = {
        place: Loader(config | {"read_block": block, "shuffle_frames": 16}, image_size=SIZE, depth=True)
        for place, config in configs.items()
    }
    whole = take(loaders["disk"].batches(8, seed=3), 7)
    stream = partial(loaders["bucket"].batches, 8, seed=3)
    before = retries.counts()
    server.set(fault="503", every=5, of="read")
    for one, other in zip(whole, stream(), strict=False):
        assert_equal(one, other)
    asked = {key: value - before[key] for key, value in retries.counts().items()}
    assert asked["requests"] > asked["retries"] >= 3 and asked["bytes"] > 10_000
    replaced = loaders["disk"].replaced()
    assert set(replaced) == {("toy0", "undecodable image")} == set(loaders["bucket"].replaced())
    server.set(fault="429")
    assert_resumes(stream, whole, (4,))
    server.set(fault="cut")
    assert_shared(stream, whole[:3], (2,))


def rewrite(file):
    file.write_bytes(bytes(file.stat().st_size))


def draws(loader, count, seed, unreadable):
    """→ (the first readable samples, how many samples are drawn for them)."""
    starts, used, drawn = np.cumsum([0, *(index.num_frames for index in loader.indexes())]), [], 0
    for number in range(count):
        for attempt in itertools.count():
            numbers = replacement_samples(np.array([number]), attempt)
            (dataset,), (frame,) = sample_frames(loader.mixture, seed, numbers, np.zeros(len(starts) - 1, np.int64))
            drawn += 1
            if (sample := int(starts[dataset] + frame)) not in unreadable:
                used.append(sample)
                break
    return used, drawn


CHANGES = {"deleted": Path.unlink, "cut": lambda file: file.write_bytes(b"short"), "rewritten": rewrite}
SAID = {
    "deleted": "no longer exists",
    "cut": "is shorter than it was",
    "rewritten": "have changed since they were indexed",
}
SLOW = [pytest.param(change, block, marks=pytest.mark.slow) for change in CHANGES for block in (1, 5)][1:]


@pytest.mark.parametrize(("change", "block"), [("deleted", 1), *SLOW])
def test_an_object_that_changes_under_a_run(configs, root, change, block):
    """Its frames are replaced and counted, as on a disk; without that policy the run ends with one sentence. On a disk,
    a changed file of the same size ends the run. In a bucket, the next start indexes a replaced object again."""
    fresh = {place: config | {"read_block": block, "shuffle_frames": 16} for place, config in configs.items()}
    loaders = {place: Loader(config, image_size=SIZE) for place, config in fresh.items()}
    strict = Loader(fresh["bucket"] | {"faults": {"policy": "fail"}}, image_size=SIZE)
    undo = damage(root, CHANGES[change])
    try:
        batches = take(loaders["bucket"].batches(8, seed=5), 8)
        read = {sample for batch in batches for sample in batch.sample_id.tolist()}
        assert not read & {10, *range(36, 48)} and all(len(batch.image) == 8 for batch in batches)
        replaced = loaders["bucket"].replaced()
        assert replaced["toy1", "checksum" if change == "rewritten" else "unreadable file"] > 0
        if block == 1 or change == "rewritten":  # a block that reaches into a missing file is replaced as a whole
            used, drawn = draws(loaders["bucket"], 64, 5, {10, *range(36, 48)})
            assert np.concatenate([batch.sample_id for batch in batches]).tolist() == used
            assert drawn == len(used) + sum(replaced.values())  # nothing is skipped without being counted
        if change != "rewritten":
            for one, other in zip(take(loaders["disk"].batches(8, seed=5), 8), batches, strict=True):
                assert_equal(one, other)
            assert loaders["disk"].replaced() == replaced  # samples drawn = samples used + replaced ones
        with pytest.raises(InputError, match=rf"gs://data/1/.*the image cannot be read any more: .*{SAID[change]}"):
            take(strict.batches(8, seed=7, start_step=1), 12)
    finally:
        undo()


def test_throttling_that_lasts_is_no_fault_of_the_data(configs, server, monkeypatch):
    """Skipping frames because of an outage would change the run."""
    loader = Loader(configs["bucket"], image_size=SIZE)
    monkeypatch.setattr(retries, "PATIENCE", 0.02)
    server.set(fault="429", every=1, of="read")
    with pytest.raises(StorageError, match=r"^gs://data/\S+ ?.*429"):
        take(loader.batches(8), 3)
    assert not loader.replaced()


@pytest.mark.slow
def test_what_is_read_ahead_is_bounded(configs, server, monkeypatch):
    """The limit is in bytes, but at least one step is read ahead."""
    monkeypatch.setattr("spatialvla_jax.data.reader.choose_ahead", lambda *_: 1)
    batches = Loader(configs["bucket"] | {"read_block": 1}, image_size=SIZE).batches(8)
    eventually(lambda: not any("(run)" in thread.name for thread in threading.enumerate()))  # reads of earlier tests
    before = server.counts()["read"]
    next(batches)
    assert 8 <= server.counts()["read"] - before <= 8 * 12  # its own queued requests, and one more step


@pytest.mark.parametrize(
    "milliseconds, megabytes, block, ahead", [(0.2, 2000, 1, 4), (50, 200, 16, 20), (50, 1000, 64, 100), (200, 9, 2, 4)]
)
def test_choices(milliseconds, megabytes, block, ahead):
    """For frames of 40 kB. Enough bytes are in flight to hide the latency; blocks keep requests few."""
    speed = Speed(1e-3 * milliseconds, 1e6 * megabytes)
    assert choose_block(speed, 40_000) == block
    assert choose_ahead(speed, 8 * 2**30) == pytest.approx(1e6 * ahead, rel=0.05)
    assert choose_ahead(speed, 16 * 2**20) <= 2**20


def test_blocks_are_chosen_and_said(configs, capfd, monkeypatch):
    """One sentence reports measurement and choice. A value in the config wins; several hosts read single frames."""
    monkeypatch.setattr("spatialvla_jax.data.reader.measure", lambda files: Speed(0.05, 2e6))
    assert Loader(configs["bucket"], image_size=SIZE).mixture.block > 1
    said = capfd.readouterr().err
    assert "gs://data/0/toy/1.0.0: 50 ms per request and 2 MB/s" in said and "is kept when the run is resumed" in said
    assert Loader(configs["bucket"] | {"read_block": 3}, image_size=SIZE).mixture.block == 3
    assert Loader(configs["bucket"] | {"memory_gb": 1.0}, image_size=SIZE).mixture.block == 1
    assert "data.memory_gb cannot hold" in capfd.readouterr().err
    assert Loader(configs["disk"], image_size=SIZE).mixture.block == 1
