"""Data in a bucket reads like the same data on a local disk."""

from pathlib import Path

import numpy as np
import pytest

from spatialvla_jax.config import load_config
from spatialvla_jax.data import open_data
from spatialvla_jax.data.beam import load_stats
from spatialvla_jax.data.oxe import CATALOGUE, make_spec
from spatialvla_jax.data.pack import packed_digest
from spatialvla_jax.data.resolve_datasets import newest_version
from spatialvla_jax.data.rlds import open_rlds, read_episodes, slice_shards
from spatialvla_jax.errors import Fault, InputError, StorageError
from spatialvla_jax.utils import retries, storage
from spatialvla_jax.utils.atomic import write_json

SPEC = make_spec("libero", CATALOGUE, "toy")


def read(path, split: str) -> list[dict[str, np.ndarray]]:
    """All episodes of a split."""
    builder = open_rlds(path)
    shards = slice_shards(builder, split)
    return [
        episode
        for shard in shards
        for episode in read_episodes("toy", builder, shard.file, shard.numbers, SPEC, listed=shard.listed)
    ]


def test_episodes_are_the_same(bucket, rlds: Path, monkeypatch):
    """Reads in small parts, with faults of every kind."""
    url = bucket.upload(rlds, "toy/1.0.0")
    monkeypatch.setattr(storage, "PART", 60_000)
    for fault in ({"status": 503, "every": 3}, {"status": 429, "every": 5}, {"cut": True, "every": 4}):
        bucket.proxy.add(**fault, pattern="GET")
    for split in ("train", "val", "train[3:]"):
        for local, remote in zip(read(rlds, split), read(url, split), strict=True):
            assert local.keys() == remote.keys()
            for key in local:
                np.testing.assert_array_equal(local[key], remote[key])


@pytest.mark.slow
def test_batches_are_the_same(bucket, config_file: Path, rlds: Path, tmp_path):
    """A run's loader, while every kind of fault is retried: nothing is skipped or read twice."""
    url = bucket.upload(rlds, "toy/1.0.0")
    config = load_config(config_file)
    local = open_data(config)
    (entry,) = config.data.datasets
    config.data.update(datasets=[entry | {"path": url}], cache_dir=str(tmp_path))
    for fault in ({"status": 503, "every": 11}, {"status": 429, "every": 13}, {"cut": True, "every": 17}):
        bucket.proxy.add(**fault, pattern="GET")
    remote = open_data(config)
    assert remote.statistics == local.statistics
    for a, b in zip(local.epoch(8, "train"), remote.epoch(8, "train"), strict=True):
        for name in ("image", "intrinsics", "depth", "prompt_ids", "actions", "action_mask", "sample_id"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_throttling_is_no_fault_of_the_data(gcs, rlds: Path, monkeypatch):
    url = gcs.upload(rlds, "toy/1.0.0")
    monkeypatch.setattr(retries, "PATIENCE", 0.05)
    builder, (shard, *_) = open_rlds(url), slice_shards(open_rlds(url), "train")
    gcs.proxy.add(status=429)
    for read_again in (
        lambda: open_rlds(url),
        lambda: slice_shards(builder, "train"),
        lambda: list(read_episodes("toy", builder, shard.file, shard.numbers, SPEC, skip=print)),
        lambda: load_stats(f"{gcs.url}/stats.json"),
    ):
        with pytest.raises(StorageError, match=f"{gcs.url}.*: the storage failed for .* s, most recently with"):
            read_again()


def test_shards_have_their_versions(gcs, rlds: Path):
    url = gcs.upload(rlds, "toy/1.0.0")
    shards = slice_shards(open_rlds(url), "train")
    assert [shard.size for shard in shards] == [shard.size for shard in slice_shards(open_rlds(rlds), "train")]
    assert all(isinstance(shard.version, str) and str(shard.file).startswith(url) for shard in shards)
    storage.put(shards[0].file, shards[0].file.read_bytes())  # the same content, written again
    again = slice_shards(open_rlds(url), "train")
    assert again[0].version != shards[0].version and again[1:] == shards[1:]


def test_a_shard_is_read_in_few_requests(gcs, rlds: Path):
    url = gcs.upload(rlds, "toy/1.0.0")
    builder, (shard, *_) = open_rlds(url), slice_shards(open_rlds(url), "train")
    gcs.proxy.requests.clear()
    assert len(list(read_episodes("toy", builder, shard.file, shard.numbers, SPEC))) == len(shard.numbers)
    assert len(gcs.proxy.requests) == 2  # its size, and one part


def test_shards_that_are_damaged(gcs, rlds: Path):
    url = gcs.upload(rlds, "toy/1.0.0")
    builder, (shard, *_) = open_rlds(url), slice_shards(open_rlds(url), "train")
    whole = storage.read_bytes(shard.file)

    def reason() -> str:
        with pytest.raises(Fault) as fault:
            list(read_episodes("toy", builder, shard.file, shard.numbers, SPEC))
        assert str(shard.file) in str(fault.value)
        return fault.value.reason

    storage.put(shard.file, whole[:-100])
    assert reason() == "truncated"
    storage.put(shard.file, whole[:5000] + b"damage" + whole[5006:])
    assert reason() == "checksum"
    storage.remove(shard.file)
    assert reason() == "unreadable file"
    with pytest.raises(InputError, match=f"{shard.file} is missing, a shard of the split 'train'"):
        slice_shards(builder, "train")


def test_datasets_that_are_not_there(gcs, rlds: Path):
    url = gcs.upload(rlds, "toy/1.0.0")
    for path, sentence in (
        (
            f"{gcs.url}/toy",
            r"is not a dataset's version directory \(no dataset_info.json\): it holds the versions 1.0.0",
        ),
        (f"{gcs.url}/toy/2.0.0", "does not exist: the versions there are 1.0.0"),
        (f"{gcs.url}/other/1.0.0", "does not exist"),
        (f"{url}/dataset_info.json", "is a file: name the dataset's version directory, such as"),
        (f"{gcs.url}-wrong/toy/1.0.0", "there is no bucket"),
    ):
        with pytest.raises(InputError, match=f"{path}:? {sentence}"):
            open_rlds(path)
    assert str(newest_version(storage.to_path(f"{gcs.url}/toy"))) == url
    assert newest_version(storage.to_path(f"{gcs.url}/other")) is None


def test_statistics_and_packed_data(gcs, packed_config: Path, tmp_path, capsys):
    config = load_config(packed_config, {"data.workers": "1"})
    local = open_data(config)
    pack, statistics = (storage.to_path(f"{gcs.url}/{name}") for name in ("toy.pack", "stats.json"))
    storage.upload(config.data.packed, pack)
    assert packed_digest(pack) == packed_digest(config.data.packed)
    write_json(statistics, {"statistics": local.statistics, "gaussians": {}})
    config.data.update(packed=str(pack), statistics=str(statistics), cache_dir=str(tmp_path))
    for content in (storage.read_bytes(pack), storage.read_bytes(pack)):
        storage.put(pack, content)  # a new object replaces the old copy
        remote = open_data(config)
        assert "toy.pack" in capsys.readouterr().err
        gcs.proxy.requests.clear()
        again = open_data(config)
        assert len(gcs.proxy.requests) < 6 and "toy.pack" not in capsys.readouterr().err  # the copy is there
        copies = list((tmp_path / "packed").iterdir())
        assert len(copies) == 1 and copies[0].read_bytes() == content
    for loader in (remote, again):
        for a, b in zip(local.epoch(4, "train"), loader.epoch(4, "train"), strict=True):
            np.testing.assert_array_equal(a.image, b.image)
            np.testing.assert_array_equal(a.actions, b.actions)
