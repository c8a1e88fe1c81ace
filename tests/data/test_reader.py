"""Reading: single frames and blocks, open files, the memory budget, and how far the reader reads ahead."""

import os
from functools import partial

import numpy as np
import pytest
from helpers.batches import assert_equal
from helpers.streams import assert_resumes, assert_shared, take
from helpers.toy_rlds import data_config, make_episodes, make_rlds

from spatialvla_jax.data import Loader, ranges, reader
from spatialvla_jax.errors import Fault, InputError

SIZE = 16


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Two datasets; the second one's episodes are shorter than a block."""
    folder = tmp_path_factory.mktemp("data")
    long, short = make_episodes(6, steps=(20, 30)), make_episodes(20, seed=1, steps=(1, 5))
    return [make_rlds(folder, {"train": episodes}, name=name) for name, episodes in (("long", long), ("short", short))]


@pytest.fixture
def reads(monkeypatch):
    """(offset, length) of every read from a dataset's file."""
    calls = []
    pread = os.pread

    def record(descriptor, length, offset):
        calls.append((offset, length))
        return pread(descriptor, length, offset)

    monkeypatch.setattr(ranges.os, "pread", record)
    return calls


@pytest.mark.parametrize(
    "block", [2, 7, pytest.param(16, marks=pytest.mark.slow), pytest.param(1000, marks=pytest.mark.slow)]
)
def test_blocks_give_the_same_frames(paths, cache_dir, block):
    """For any block size, each sample is the frame with its number, every frame comes once per pass, a resumed stream
    continues exactly, and hosts see their own rows."""
    single = Loader(data_config(*paths, cache_dir=cache_dir), image_size=SIZE, depth=True)
    config = data_config(*paths, cache_dir=cache_dir, read_block=block, shuffle_frames=60)
    loader = Loader(config, image_size=SIZE, depth=True)
    stream = partial(loader.batches, 16, seed=2)
    whole = take(stream(), 20)
    for batch in whole[::6]:
        expected = single.frames(batch.sample_id)
        assert_equal(batch, expected)
    for number, index in enumerate(loader.indexes()):
        ids = np.concatenate([batch.sample_id[batch.dataset_id == number] for batch in whole])
        for one_pass in ids[: len(ids) // index.num_frames * index.num_frames].reshape(-1, index.num_frames):
            assert len(set(one_pass.tolist())) == index.num_frames
    assert_resumes(stream, whole, (1, 13, 19))
    assert_shared(stream, whole[:5], (2, 4))


def test_blocks_are_read_once(paths, cache_dir, reads):
    """A pass costs one read per block and episode in it, not per frame, and one per record for its checksum."""
    config = data_config(paths[0], cache_dir=cache_dir, read_block=16, shuffle_frames=64)
    loader = Loader(config, image_size=SIZE)
    total = loader.num_frames()
    del reads[:]
    for _ in zip(range(total // 8), loader.batches(8), strict=False):
        pass
    parts = -(-total // 16) + 6  # an episode's end splits a block
    checksums = [length for _, length in reads if length == 4]
    assert len(reads) - len(checksums) <= 1.5 * parts  # reading ahead starts the second pass
    assert len(checksums) == loader.indexes()[0].num_episodes
    del reads[:]
    for _ in zip(range(total // 8), Loader(config | {"read_block": 1}, image_size=SIZE).batches(8), strict=False):
        pass
    assert len(reads) >= total - 8


def test_start_up_does_not_depend_on_the_depth(paths, cache_dir, reads):
    """The first batch at step one billion reads as much as the first batch of a new run."""
    loader = Loader(data_config(*paths, cache_dir=cache_dir), image_size=SIZE)
    for start in (0, 10**9):
        del reads[:]
        next(loader.batches(8, start_step=start))
        assert len(reads) <= 8 * 12  # its own step and those read ahead, however long the stream


def test_open_files_stay_few(tmp_path):
    """There are more shards than files kept open."""
    files = ranges.Files(limit=3)
    for number in range(8):
        (tmp_path / str(number)).write_bytes(bytes([number] * 4))

    def opened() -> int:
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        return sum(os.path.realpath(link).startswith(f"{tmp_path}/") for link in links)

    for number in (*range(8), 2, 7):
        assert files.read(str(tmp_path / str(number)), 1, 2) == bytes([number] * 2)
        assert 1 <= opened() <= 3
    with pytest.raises(Fault, match="shorter than it was"):
        files.read(str(tmp_path / "1"), 2, 9)
    del files
    assert opened() == 0


def test_blocks_stay_within_their_bytes(paths, cache_dir, reads, monkeypatch):
    """Memory is allocated once. Blocks too large for it enlarge it, once."""
    taken, mmap = [], ranges.mmap.mmap
    monkeypatch.setattr(ranges.mmap, "mmap", lambda *args, **options: taken.append(args[1]) or mmap(*args, **options))
    loader = Loader(data_config(paths[0], cache_dir=cache_dir), image_size=SIZE)
    (index,) = loader.indexes()
    frames = np.random.default_rng(0).integers(0, index.num_frames, 300).tolist()
    files = [index.files[file] for file in index.arrays["episode_file"][index.episode(frames)]]
    capacity = 12 * int(index.spans("image", np.arange(index.num_frames))[:, 1].max())
    for size, count, most in ((capacity, 300, capacity), (10, 50, 4 * capacity)):
        del taken[:]
        blocks = ranges.Blocks(ranges.Files(), 4, size)
        for frame, file in zip(frames[:count], files, strict=False):
            place = ranges.Place(0, index, "image", frame, file, *index.spans("image", frame).tolist())
            (take,), _ = blocks.frames([place])
            assert take() == ranges.Files().read(file, place.offset, place.length)
            del reads[:]
            assert take() and not reads, "it is kept"
        assert taken[0] == size and max(taken) <= most and len(taken) == (1 if size == capacity else 2)


def test_budget(paths, cache_dir):
    """Queue lengths follow from the budget. A budget too small for one batch is refused, with the needed amount."""
    plan = partial(reader.plan_memory, np.asarray([2000.0, 3000.0]), 224**2 * 3, workers=1)
    assert plan(128, (), memory_gb=8.0) == (4, 0)
    assert [plan(1024, (), memory_gb=gigabytes)[0] for gigabytes in (1.7, 1.8, 1.95, 4)] == [1, 2, 3, 4]
    assert plan(128, (60, 40), memory_gb=8.0) == (4, 1.2 * (60 * 2000 + 40 * 3000))
    with pytest.raises(InputError, match=r"memory_gb is 1, but batches of 1024 need 1\.\d+ GB here$"):
        plan(1024, (), memory_gb=1)
    with pytest.raises(InputError, match=r"memory_gb is 8\.0, but batches of 8 need .* \(data\.shuffle_frames\)"):
        plan(8, (10**6, 10**7), memory_gb=8.0)
    config = data_config(*paths, cache_dir=cache_dir, memory_gb=0.5, shuffle_frames=100)
    for block, end in ((1, "GB here$"), (8, r"\(data\.shuffle_frames\)$")):
        with pytest.raises(InputError, match=rf"memory_gb is 0\.5, but batches of 4 need .*{end}"):
            next(Loader(config | {"read_block": block}, image_size=SIZE).batches(4))


def test_pages_of_the_index_are_given_back(paths, cache_dir):
    loader = Loader(data_config(*paths, cache_dir=cache_dir), image_size=SIZE)
    for index in loader.indexes():
        before = {key: value.copy() for key, value in index.arrays.items()}
        index.release()
        for key, value in index.arrays.items():
            np.testing.assert_array_equal(value, before[key])
    addresses = {f"{index.arrays['action'].ctypes.data:x}" for index in loader.indexes()}
    for index in loader.indexes():
        index.release()
    with open("/proc/self/smaps") as file:
        lines = file.read().splitlines()
    resident = [
        int(next(x for x in lines[n:] if x.startswith("Rss:")).split()[1])
        for n, line in enumerate(lines)
        if line.split("-")[0] in addresses
    ]
    assert resident == [0] * len(addresses)
