"""Indexes in a bucket, and data in a bucket."""

from pathlib import Path

import pytest
from helpers.indexes import load_index
from helpers.toy_rlds import data_config

from spatialvla_jax.data import Loader
from spatialvla_jax.data.beam import make_indexes
from spatialvla_jax.data.config import DataConfig
from spatialvla_jax.data.index_cache import read_shard
from spatialvla_jax.data.oxe import CATALOGUE
from spatialvla_jax.errors import InputError
from spatialvla_jax.utils import storage
from spatialvla_jax.utils.storage import to_path

LIBERO = CATALOGUE["libero"]


def unread(source, number):
    raise AssertionError("the data is read again")


def on_a_host(name, tmp_path, monkeypatch, load):
    """The result of `load()` on a host with its own disk, and the index files on that disk."""
    monkeypatch.setenv("HOME", str(tmp_path / name))
    index = load()
    return index, {file.name: file.read_bytes() for file in Path(index.directories[0]).iterdir()}


def test_hosts_copy_the_index_of_a_bucket(bucket, rlds, tmp_path, monkeypatch, capsys):
    """The first host uploads the index. The next host copies it, reports its size, and has the same bits. A start that
    has a copy reads nothing. An index that is damaged or lacks meta.json does not count."""
    cache = to_path(f"{bucket.url}/index")

    def load(read=read_shard):
        return load_index("toy", rlds, LIBERO, "train", cache, read=read)

    _, made = on_a_host("one", tmp_path, monkeypatch, load)
    (folder,) = storage.list_names(cache)
    assert {*storage.list_names(cache / folder)} == {*made}
    capsys.readouterr()
    index, copied = on_a_host("two", tmp_path, monkeypatch, lambda: load(unread))
    assert copied == made and index.num_episodes == 7
    assert f"1 indexes, 0.0 MB, are copied from {cache} to {tmp_path}/two/.cache" in capsys.readouterr().err
    del bucket.proxy.requests[:]
    assert on_a_host("two", tmp_path, monkeypatch, lambda: load(unread))[1] == made
    assert not [request.line for request in bucket.proxy.requests if ".bin" in request.line]
    # a host that has an index uploads it if the bucket has none, or a different one
    for meta in (None, made["meta.json"].replace(b'"fault": ""', b'"fault": 0')):
        storage.remove(cache / folder / "meta.json") if meta is None else storage.put(
            cache / folder / "meta.json", meta
        )
        on_a_host("two", tmp_path, monkeypatch, lambda: load(unread))
        assert storage.read_bytes(cache / folder / "meta.json") == made["meta.json"]
    # a damaged or truncated index is made again from the data and replaced
    storage.put(cache / folder / "action.bin", b"\0" * len(made["action.bin"]))
    assert on_a_host("three", tmp_path, monkeypatch, load)[1] == made
    assert "the checksum of action.bin is wrong" in capsys.readouterr().err
    storage.remove(cache / folder / "image.bin")
    assert on_a_host("cut", tmp_path, monkeypatch, load)[1] == made
    storage.remove(cache / folder / "meta.json")
    assert on_a_host("four", tmp_path, monkeypatch, load)[1] == made
    assert on_a_host("five", tmp_path, monkeypatch, lambda: load(unread))[1] == made


def test_data_in_a_bucket(gcs, rlds, tmp_path):
    """The same index, except for the place and the shards' versions. Each object is read once, and a replaced one is
    noticed by its version."""
    url = to_path(gcs.upload(rlds, "toy/1.0.0"))
    local = load_index("toy", rlds, LIBERO, "train", tmp_path / "local")
    del gcs.proxy.requests[:]
    index = load_index("toy", url, LIBERO, "train", tmp_path / "cache")
    read = [request for request in gcs.proxy.requests if ".tfrecord" in request.line and request.size > 1500]
    assert len(read) == 3 == len(index.files) and all(file.startswith("gs://") for file in index.files)
    for key, array in local.arrays.items():
        assert array.tobytes() == index.arrays[key].tobytes()
    assert (index.statistics, index.gaussians) == (local.statistics, local.gaussians)
    again = load_index("toy", url, LIBERO, "train", tmp_path / "cache", read=unread)
    assert again.made_from == index.made_from
    storage.put(to_path(index.files[1]), Path(local.files[1]).read_bytes())
    with pytest.raises(AssertionError, match="the data is read again"):
        load_index("toy", url, LIBERO, "train", tmp_path / "cache", read=unread)
    storage.remove(to_path(index.files[1]))
    with pytest.raises(InputError, match=f"{index.files[1]} is missing, a shard of the split 'train'"):
        load_index("toy", url, LIBERO, "train", tmp_path / "cache")


def test_the_pipeline_writes_to_a_bucket(gcs, rlds, tmp_path, monkeypatch):
    """Beam writes parts and index. A run on another host finds the index, and no part is left."""
    monkeypatch.setenv("HOME", str(tmp_path / "one"))
    config = data_config(rlds, cache_dir=Path("unused")) | {"cache_dir": f"{gcs.url}/index"}
    (made,) = make_indexes(DataConfig.from_config(config), ["train"], to_path(f"{gcs.url}/index"))
    assert storage.list_names(to_path(f"{gcs.url}/index")) == [made.directories[0].name]
    monkeypatch.setenv("HOME", str(tmp_path / "two"))
    loader = Loader(config, image_size=16, progress=lambda *_: pytest.fail("the data is read again"))
    assert loader.indexes()[0].statistics == made.statistics
