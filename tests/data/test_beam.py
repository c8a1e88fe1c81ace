import json

import numpy as np
import pytest
from helpers.toy_rlds import data_config, make_episodes, make_rlds

from spatialvla_jax.actions import fit_gaussians
from spatialvla_jax.actions.normalization import normalize
from spatialvla_jax.cli import main
from spatialvla_jax.config import load_config
from spatialvla_jax.data import DataConfig, load_data, open_data
from spatialvla_jax.data import beam as stats_pipeline
from spatialvla_jax.data.beam import compute_stats, load_stats, named_gaussians, pooled, table
from spatialvla_jax.errors import InputError
from spatialvla_jax.training.init_from import make_processor


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


def test_equal_to_the_indexes(data, stats):
    loader = load_data(data, image_size=32)
    for index in loader.indexes():
        got, expected = stats["statistics"][index.name], index.statistics
        for row in ("q01", "q99", "min", "max", "mask"):
            assert got["action"][row] == expected["action"][row]
        for row in ("mean", "std"):
            np.testing.assert_allclose(got["action"][row], expected["action"][row], rtol=1e-12, atol=1e-14)
        assert got["num_transitions"] == index.num_frames and got["num_trajectories"] == index.num_episodes
        fitted = fit_gaussians(normalize(index.arrays["action"], expected["action"]))
        np.testing.assert_allclose(pooled(stats, [index.name]), fitted, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(pooled(stats, ["toy0", "toy1"]), fit_gaussians(loader.actions()), rtol=1e-12, atol=1e-14)
    assert stats["quantile_error"] == {"toy0": 0, "toy1": 0} and stats["skipped"] == {"toy0": {}, "toy1": {}}
    assert stats["mixture"] == {"datasets": ["toy0"], "gaussians": named_gaussians(pooled(stats, ["toy0"]))}
    assert "toy1     11        0" in table(stats)


def test_one_pass_in_any_order(data, stats, tmp_path, monkeypatch):
    """The stored data is read once, and neither the shards' order nor the number of workers changes a bit."""
    shards, reads, seen = stats_pipeline.find_shards(DataConfig.from_config(data)), [], []

    def read(name, builder, file, *rest, **options):
        reads.append(file)
        return read_episodes(name, builder, file, *rest, **options)

    read_episodes = stats_pipeline.read_episodes
    monkeypatch.setattr(stats_pipeline, "read_episodes", read)
    monkeypatch.setattr(stats_pipeline, "find_shards", lambda _: shards[::-1])
    workers = ["--direct_num_workers=2", "--direct_running_mode=multi_threading"]
    again = compute_stats(
        DataConfig.from_config(data),
        ("toy1",),
        str(tmp_path / "s.json"),
        "DirectRunner",
        workers,
        lambda *x: seen.append(x),
    )
    assert again == stats
    assert sorted(reads) == sorted(shard.file for shard in shards)
    assert seen == [(n, len(shards)) for n in range(1, len(shards) + 1)]


def test_no_dataset_in_the_grid(data, tmp_path):
    one = data | {"datasets": data["datasets"][1:]}
    result = compute_stats(DataConfig.from_config(one), ("toy1",), str(tmp_path / "s.json"))
    assert result["mixture"] is None and "toy1" in table(result)


@pytest.fixture
def damaged(tmp_path):
    """One of four records has a flipped byte."""
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
    loader = load_data(data, image_size=32)
    (index,) = loader.indexes()
    assert result["skipped"] == {"toy0": dict(index.skipped)} == {"toy0": {"checksum": 1}}
    assert result["statistics"]["toy0"]["num_trajectories"] == 3
    assert result["statistics"]["toy0"]["action"]["q99"] == index.statistics["action"]["q99"]
    with pytest.raises(InputError, match=r"1 episodes are faulty \(1 checksum\), more than the 0"):
        compute_stats(
            DataConfig.from_config(data | {"faults": {"policy": "skip", "limit": 0}}), (), str(tmp_path / "t.json")
        )
    assert not (tmp_path / "t.json").exists()


def test_a_shard_that_vanishes(data, tmp_path, monkeypatch):
    first, *rest = stats_pipeline.find_shards(DataConfig.from_config(data))
    gone = first._replace(file=first.file.with_name("gone"))
    monkeypatch.setattr(stats_pipeline, "find_shards", lambda _: [gone, *rest])
    with pytest.raises(InputError, match=r"^dataset 'toy0', file .*gone, episode 0: the file cannot be read"):
        compute_stats(DataConfig.from_config(data), (), str(tmp_path / "s.json"))


def test_no_usable_episode(tmp_path):
    path = make_rlds(tmp_path / "d", {"train": make_episodes(1)})
    for file in path.glob("*.tfrecord*"):
        file.write_bytes(b"")
    data = data_config(path, cache_dir=tmp_path) | {"faults": {"policy": "skip", "limit": 9}}
    with pytest.raises(InputError, match=r"Dataset 'toy0' has no episode to use \(left out: {'truncated': 1}\)"):
        compute_stats(DataConfig.from_config(data), (), str(tmp_path / "s.json"))


def test_without_beam(data, tmp_path, monkeypatch):
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
    # More in the file than the run has is no matter, and what the file says counts.
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
    # The file lacks a dataset, or none is left for the grid: one sentence.
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
    names = "demo, finetune, libero_spatial, lora, pretrain, sweeps/adaption, sweeps/ego3d, sweeps/embedding, "
    names += "sweeps/grid_distribution, sweeps/grid_resolution, sweeps/libero_adaption, sweeps/libero_small"
    assert capsys.readouterr().err.splitlines() == [
        f"spatialvla-jax stats: config file {tmp_path / 'none.py'} does not exist; the configs with a name are {names}",
        "spatialvla-jax train: only the command stats takes arguments after --",
    ]
