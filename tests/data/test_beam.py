import json
import re

import numpy as np
import pytest
from helpers.toy_rlds import data_config, make_episodes, make_rlds

from spatialvla_jax.actions import fit_gaussians
from spatialvla_jax.actions.normalization import normalize
from spatialvla_jax.cli import main
from spatialvla_jax.config import load_config
from spatialvla_jax.data import DataConfig, Loader, beam, open_data
from spatialvla_jax.data.beam import compute_stats, load_stats, make_indexes, named_gaussians, pooled, table
from spatialvla_jax.data.index_cache import find_source, read_shard
from spatialvla_jax.data.oxe import CATALOGUE
from spatialvla_jax.errors import InputError
from spatialvla_jax.training.grid_fit import mixture_gaussians
from spatialvla_jax.training.init_from import make_processor
from spatialvla_jax.utils import storage
from spatialvla_jax.utils.atomic import PREFIX


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two datasets of 41 episodes in 14 shards."""
    root = tmp_path_factory.mktemp("stats")
    paths = [make_rlds(root / str(n), {"train": make_episodes(count, seed=n)}) for n, count in enumerate((30, 11))]
    return data_config(*paths, cache_dir=root / "cache")


@pytest.fixture(scope="module")
def stats(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "stats.json"
    result = compute_stats(DataConfig.from_config(data), ("toy1",), str(out))
    assert load_stats(out) == result and list(out.parent.iterdir()) == [out]
    return result


def test_equal_to_the_run(data, stats):
    """Statistics and Gaussians equal, bit for bit, those of a run that indexes the data itself."""
    loader = Loader(data | {"cache_dir": data["cache_dir"] + "/own"}, image_size=32)
    assert stats["statistics"] == loader.statistics
    for index in loader.indexes():
        fitted = fit_gaussians(normalize(index.arrays["action"], index.statistics["action"]))
        assert stats["gaussians"][index.name] == named_gaussians(fitted)
    both = mixture_gaussians({"grid": {"exclude": ()}, "data": {}}, loader)
    np.testing.assert_array_equal(pooled(stats, ["toy0", "toy1"]), both)
    np.testing.assert_allclose(both, fit_gaussians(loader.actions()), rtol=1e-12, atol=1e-14)
    assert stats["skipped"] == {"toy0": {}, "toy1": {}}
    assert stats["mixture"] == {"datasets": ["toy0"], "gaussians": named_gaussians(pooled(stats, ["toy0"]))}
    assert "toy1     11        0" in table(stats)


def test_one_pass_in_any_order(data, stats, tmp_path, monkeypatch):
    """Every record is read once. Neither the order of shards nor the number of workers changes an index."""
    config = DataConfig.from_config(data)
    reads, seen = [], []

    def read(source, number):
        reads.append((source.name, number))
        return read_shard(source, number)

    def backwards(shards, *rest):
        run(shards[::-1], *rest)

    run = beam._run
    monkeypatch.setattr(beam, "read_shard", read)
    monkeypatch.setattr(beam, "_run", backwards)
    workers = ["--direct_num_workers=2", "--direct_running_mode=multi_threading"]
    folder = tmp_path / "cache"
    indexes = make_indexes(config, ["train"], folder, "DirectRunner", workers, lambda *x: seen.append(x))
    assert sorted(reads) == [("toy0", number) for number in range(10)] + [("toy1", number) for number in range(4)]
    assert seen == [(n, 14) for n in range(1, 15)]
    own = config.cache_folder
    assert contents(folder) == contents(own) and len(contents(folder)) == 2 * 14
    loader = Loader(data | {"cache_dir": str(folder)}, image_size=32, progress=lambda *_: pytest.fail("read again"))
    assert [index.directories for index in loader.indexes()] == [index.directories for index in indexes]
    assert make_indexes(config, ["train"], folder)[0].statistics == stats["statistics"]["toy0"] and len(reads) == 14


def test_indexes_are_made_although_their_parts_cannot_be_removed(gcs, data, stats, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("spatialvla_jax.data.index_cache.LOCAL_CACHE", str(tmp_path))
    folder = storage.as_path(f"{gcs.url}/cache", "--config.data.cache_dir")
    gcs.proxy.add(status=403, body="no storage.objects.delete access", pattern="^DELETE")
    assert make_indexes(DataConfig.from_config(data), ["train"], folder)[0].statistics == stats["statistics"]["toy0"]
    (parts,) = (name for name in storage.list_names(folder) if name.startswith(PREFIX))
    assert re.search(f"storage.objects.delete is missing.*; {folder / parts} is no longer", capsys.readouterr().err)


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.glob("toy*/*")}


def test_no_dataset_in_the_grid(data, tmp_path):
    one = data | {"datasets": data["datasets"][1:]}
    result = compute_stats(DataConfig.from_config(one), ("toy1",), str(tmp_path / "s.json"))
    assert result["mixture"] is None and "toy1" in table(result)


@pytest.fixture
def damaged(tmp_path):
    """A copy in which one of four records has a flipped byte."""
    path = make_rlds(tmp_path / "d", {"train": make_episodes(4)}, episodes_per_shard=2)
    (file, *_) = sorted(path.glob("*.tfrecord*"))
    content = bytearray(file.read_bytes())
    content[200] ^= 1
    file.write_bytes(content)
    return data_config(path, cache_dir=tmp_path / "cache"), file


def test_damaged_data_fails_with_its_sentence(damaged, tmp_path):
    data, file = damaged
    out = tmp_path / "s.json"
    out.write_text("old")
    with pytest.raises(InputError) as error:
        compute_stats(DataConfig.from_config(data), (), str(out))
    assert str(error.value) == f"dataset 'toy0', file {file}, episode 0: the record's checksum is wrong"
    assert out.read_text() == "old" and not list(tmp_path.glob("*.tmp"))


def test_damaged_data_left_out_and_counted(damaged, tmp_path):
    data = damaged[0] | {"faults": {"policy": "skip", "limit": 1}}
    result = compute_stats(DataConfig.from_config(data), (), str(tmp_path / "s.json"))
    loader = Loader(data, image_size=32)
    (index,) = loader.indexes()
    assert result["skipped"] == {"toy0": dict(index.skipped)} == {"toy0": {"checksum": 1}}
    assert result["statistics"]["toy0"]["num_trajectories"] == 3
    assert result["statistics"]["toy0"]["action"]["q99"] == index.statistics["action"]["q99"]
    with pytest.raises(InputError, match=r"1 episodes of .* are faulty \(1 checksum\), more than the 0"):
        compute_stats(
            DataConfig.from_config(data | {"faults": {"policy": "skip", "limit": 0}}), (), str(tmp_path / "t.json")
        )
    assert not (tmp_path / "t.json").exists()


def test_a_shard_that_vanishes(data, tmp_path, monkeypatch):
    def without(shards, *rest):
        source = find_source(*shards[0][:4])
        source.shards[0].file.rename(gone)
        run(shards, *rest)

    run, gone = beam._run, tmp_path / "gone"
    monkeypatch.setattr(beam, "_run", without)
    config = DataConfig.from_config(data | {"cache_dir": str(tmp_path / "cache")})
    file = find_source("toy0", config.datasets[0]["path"], CATALOGUE["libero"], "train").shards[0].file
    try:
        with pytest.raises(InputError, match=rf"^dataset 'toy0', file {file}, episode 0: the file cannot be read"):
            compute_stats(config, (), str(tmp_path / "s.json"))
    finally:
        gone.rename(file)
    assert not [*tmp_path.glob("s.json*"), *(tmp_path / "cache").iterdir()]


def test_no_usable_episode(tmp_path):
    path = make_rlds(tmp_path / "d", {"train": make_episodes(1)})
    for file in path.glob("*.tfrecord*"):
        file.write_bytes(b"")
    data = data_config(path, cache_dir=tmp_path) | {"faults": {"policy": "skip", "limit": 9}}
    with pytest.raises(InputError, match=r"Dataset 'toy0' .* has no usable episode \(1 truncated\)"):
        compute_stats(DataConfig.from_config(data), (), str(tmp_path / "s.json"))


def test_without_beam(data, tmp_path, monkeypatch):
    data = data | {"cache_dir": str(tmp_path / "cache")}
    monkeypatch.setitem(__import__("sys").modules, "apache_beam", None)
    with pytest.raises(InputError, match=r"needs Apache Beam: pip install 'spatialvla-jax\[beam\]'"):
        compute_stats(DataConfig.from_config(data), (), str(tmp_path / "s.json"))


@pytest.mark.parametrize("text", [None, "not json", "[]", '{"toy": {"action": {}}}'])
def test_bad_files(tmp_path, text):
    if text is not None:
        (tmp_path / "s.json").write_text(text)
    with pytest.raises(InputError, match=r"s\.json is not a"):
        load_stats(tmp_path / "s.json")


def test_a_run_takes_what_the_command_wrote(config_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    out = str(tmp_path / "stats.json")
    command = ["stats", "--config", str(config_file), "--out", "~/stats.json"]
    assert main([*command, "--runner", "DirectRunner", "--", "--direct_num_workers=2"]) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    config = load_config(config_file)
    own = make_processor(config, open_data(config))
    # The statistics file may hold further datasets, and its values take precedence.
    stats = json.loads((tmp_path / "stats.json").read_text())
    for part in ("statistics", "gaussians"):
        stats[part]["another"] = stats[part]["toy"]
    stats["statistics"]["toy"]["action"]["q99"][0] += 0.5
    stats["gaussians"]["toy"]["roll"] = [0.5, 0.1]
    (tmp_path / "stats.json").write_text(json.dumps(stats))
    config.data.statistics = out
    given = make_processor(config, open_data(config))
    assert given.statistics == {"toy": stats["statistics"]["toy"]} != own.statistics
    np.testing.assert_allclose(given.grid.theta, own.grid.theta, rtol=1e-6)
    assert not np.allclose(given.grid.roll, own.grid.roll)
    # The file lacks a dataset, or no dataset is left for the grid: one sentence.
    del stats["statistics"]["toy"]
    (tmp_path / "stats.json").write_text(json.dumps(stats))
    with pytest.raises(InputError, match="The statistics know another, but not the dataset 'toy'"):
        open_data(config)
    config.data.statistics, config.grid.exclude = "", ("toy",)
    with pytest.raises(InputError, match="so there is nothing to fit the grid to"):
        make_processor(config, open_data(config))


def test_bad_command(config_file, tmp_path, capsys):
    assert main(["stats", "--config", str(tmp_path / "none.py"), "--out", "s.json"]) == 2
    assert main(["train", "--config", str(config_file), "--workdir", str(tmp_path), "--", "--flink_master=x"]) == 2
    names = "demo, finetune, libero_mini, libero_spatial, lora, pretrain, sweeps/adaption, sweeps/ego3d, "
    names += "sweeps/embedding, sweeps/grid_distribution, sweeps/grid_resolution, sweeps/libero_adaption, "
    names += "sweeps/libero_small, sweeps/mini_ablations, sweeps/mini_adaption"
    assert capsys.readouterr().err.splitlines() == [
        f"spatialvla-jax stats: config file {tmp_path / 'none.py'} does not exist; the configs with a name are {names}",
        "spatialvla-jax train: only the commands stats and data index take arguments after --",
    ]
