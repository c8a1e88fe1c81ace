"""`data depth`: the copied dataset, resuming, and a model on stored depth compared with one that estimates it."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from helpers.checkpoints import golden_with_given_depth
from helpers.toy_rlds import data_config, make_episodes, make_rlds
from helpers.zoe_reference import TINY, random_hf_model

from spatialvla_jax.checkpoints import load_pretrained, read_checkpoint, write_huggingface
from spatialvla_jax.checkpoints.load import read_zoedepth
from spatialvla_jax.cli import main
from spatialvla_jax.data import Loader
from spatialvla_jax.data.importers.add_depth import add_depth, to_counts
from spatialvla_jax.data.oxe.spec import DEPTH_UNIT
from spatialvla_jax.data.tfrecord import read_records
from spatialvla_jax.errors import InputError
from spatialvla_jax.inference import depth as module
from spatialvla_jax.models import SpatialVLA
from spatialvla_jax.models.ego3d import back_project
from spatialvla_jax.models.zoedepth import estimate_depth

MODEL = Path(__file__).parents[2] / "golden" / "tiny_model"  # images of 56 px
SIZE = 56
KEY = "observation/depth_zoe"
OPTIONS = ("--spec", "libero", "--batch-size")


def brightness(images):
    """A stand-in for ZoeDepth: metres from the mean colour."""
    return images.astype(np.float32).mean(axis=-1) / 50 + 0.1


def copy(source, out, estimate=brightness, **changes):
    options = {"image": "observation/image", "image_size": SIZE, "batch_size": 4, "made_with": {"weights": "a"}}
    return add_depth(source, out, estimate, **(options | changes))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    splits = {"train": make_episodes(5, steps=(1, 4)), "val": make_episodes(2, seed=1, steps=(2, 3))}
    path = make_rlds(tmp_path_factory.mktemp("source"), splits, episodes_per_shard=2)
    (path / "steps-task.labels.txt").write_text("kept\n")
    return path


@pytest.fixture(scope="module")
def lively(tmp_path_factory):
    """The golden model with larger weights in ZoeDepth's heads. The original's depth varies by only 2 mm."""
    read = read_checkpoint(MODEL)

    def amplified(path, leaf):
        heads = path.startswith(("zoe/metric_head", "zoe/relative_head")) and "classifier" not in path
        return replace(leaf, read=lambda: 4 * leaf.read()) if heads and path.endswith("kernel") else leaf

    path = tmp_path_factory.mktemp("lively") / "model"
    leaves = {name: amplified(name, leaf) for name, leaf in read.arrays.items()}
    write_huggingface(path, replace(read, arrays=leaves))
    return path


@pytest.fixture(scope="module")
def copied(source, lively, tmp_path_factory):
    """The toy data with depth from a model."""
    out = tmp_path_factory.mktemp("copied")
    assert main(["data", "depth", str(source), *OPTIONS, "8", "--checkpoint", str(lively), "--out", str(out)]) == 0
    return out / "toy" / "1.0.0"


def test_everything_stored_stays(source, copied):
    """Every record begins with the source's bytes, and TFDS reads all features, including the new one."""
    before, after = (tfds.builder_from_directory(path) for path in (source, copied))
    assert after.info.full_name == before.info.full_name
    assert (copied / "steps-task.labels.txt").read_text() == "kept\n"
    for split in ("train", "val"):
        old, new = before.info.splits[split], after.info.splits[split]
        assert [Path(f).name for f in old.filepaths] == [Path(f).name for f in new.filepaths]
        assert old.shard_lengths == new.shard_lengths and len(new.shard_lengths) > (split == "train")
        added = 0
        for one, two in zip(old.filepaths, new.filepaths, strict=True):
            for (_, short, _), (_, long, intact) in zip(read_records(one), read_records(two), strict=True):
                assert long.startswith(short) and intact
                added += len(long) - len(short)
        assert new.num_bytes - old.num_bytes == added > 0
        for one, two in zip(before.as_dataset(split), after.as_dataset(split), strict=True):
            for x, y in zip(one["steps"], two["steps"], strict=True):
                depth = y["observation"].pop("depth_zoe")
                assert depth.shape == (SIZE, SIZE, 1) and depth.dtype == tf.uint16
                assert tf.reduce_min(depth) > 0
                tf.nest.map_structure(np.testing.assert_array_equal, x, y)


def test_model_on_stored_depth_sees_the_points_of_the_step(copied, lively, tmp_path):
    """Compares the 3-D points of a model on stored depth with those of the same weights with ZoeDepth inside.

    The stored map has the model's image size, so nearest-neighbour reading moves nothing. The two differ only by
    rounding to millimetres: 0.5 mm a pixel, and no more for the mean over a cell of the area resize. In x and y the
    error scales with the ray.
    """
    config = data_config(copied, cache_dir=tmp_path, precomputed_depth=True)
    batch = next(Loader(config, image_size=SIZE, depth=True).batches(8))
    model, params, _ = load_pretrained(lively)
    image, intrinsics = jnp.asarray(batch.image, jnp.float32) / 255, batch.intrinsics

    def inside(m, image):
        depth = estimate_depth(m.zoe, image, m.config.zoe.backbone.image_size)
        points = back_project(depth, intrinsics, m.config.img.patches_per_side)
        return depth, points, m.embed_image(image, None, intrinsics)

    depth, points, tokens = jax.jit(lambda p: model.apply({"params": p}, image, method=inside))(params)
    assert float(depth.std()) > 100 * DEPTH_UNIT  # a constant depth would prove nothing
    half = DEPTH_UNIT / 2 + 1e-5  # the step compiles to another order of sums than the command
    np.testing.assert_allclose(batch.depth, depth, rtol=0, atol=half)
    points = np.asarray(points).reshape(-1, 3)
    stored = np.asarray(back_project(batch.depth, intrinsics, model.config.img.patches_per_side)).reshape(-1, 3)
    rays = np.abs(points / points[:, 2:])
    assert (np.abs(stored - points) <= half * rays + 1e-5).all()
    # Repeat it through the image encoder with depth_source="dataset". Ego3D's shortest wave turns by 2^7 / 2 rad a
    # metre, so a feature may differ by up to 0.032 rad.
    reader = SpatialVLA(replace(model.config, depth_source="dataset"))
    embed = jax.jit(lambda p: reader.apply({"params": p}, image, batch.depth, intrinsics, method="embed_image"))
    np.testing.assert_allclose(embed(params), tokens, rtol=0, atol=0.032 * float(jnp.abs(tokens).max()))


def test_counts():
    metres = np.asarray([[0.0, 0.0004, 0.0016, 1.2344, 65.535, 80.0]], np.float32)
    assert to_counts(metres).tolist() == [[1, 1, 2, 1234, 65535, 65535]] and to_counts(metres).dtype == np.uint16
    random = np.random.default_rng(0).uniform(0.001, 65.535, 10_000).astype(np.float32)
    assert np.abs(to_counts(random) * DEPTH_UNIT - random).max() <= DEPTH_UNIT / 2 + 1e-9


def test_batches_do_not_matter_and_the_far_is_counted(source, tmp_path):
    def far(images):
        return brightness(images) + 65.0

    one, two = copy(source, tmp_path / "a", far, batch_size=3), copy(source, tmp_path / "b", far, batch_size=64)
    assert one["frames"] == two["frames"] > 0 and one["clipped"] == two["clipped"] > 0
    for file in sorted(Path(one["directory"]).glob("*.tfrecord*")):
        assert file.read_bytes() == (Path(two["directory"]) / file.name).read_bytes()


def test_goes_on_where_it_stopped(source, tmp_path):
    """Killed during the second shard: the first is kept, and the result equals that of an uninterrupted run."""
    calls = 0

    def dies(images):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return brightness(images)

    with pytest.raises(KeyboardInterrupt):
        copy(source, tmp_path / "a", dies, batch_size=2)
    directory = tmp_path / "a" / "toy" / "1.0.0"
    whole = sorted(directory.glob("toy*.tfrecord*"))
    assert len(whole) == 1 and not (directory / "dataset_info.json").exists()
    stamp = whole[0].stat().st_mtime_ns
    with pytest.raises(InputError, match=r"started with weights 'a', not 'b'; delete it or choose another place"):
        copy(source, tmp_path / "a", batch_size=2, made_with={"weights": "b"})
    seen = []
    rest = copy(source, tmp_path / "a", batch_size=2, progress=lambda *done: seen.append(done))
    assert whole[0].stat().st_mtime_ns == stamp
    assert seen[0] == ("toy", 2, 7) and seen[-1] == ("toy", 7, 7)
    unbroken = copy(source, tmp_path / "b", batch_size=2)
    assert 0 < rest["frames"] < unbroken["frames"]
    names = {file.name for file in Path(unbroken["directory"]).iterdir()}
    assert names == {file.name for file in directory.iterdir()}  # and no temporary ones
    for name in names:
        assert (directory / name).read_bytes() == (Path(unbroken["directory"]) / name).read_bytes()
    again = copy(source, tmp_path / "a", batch_size=2)
    assert again["frames"] == 0


def test_only_changed_shards_are_made_again(tmp_path):
    episodes = make_episodes(4, steps=(2, 3))
    path = make_rlds(tmp_path / "source", {"train": episodes}, episodes_per_shard=2)
    copy(path, tmp_path / "a")
    last = sorted(path.glob("*.tfrecord*"))[-1]
    shutil.copyfile(last, last.with_name("again"))
    os.replace(last.with_name("again"), last)  # the same bytes, written later
    again = copy(path, tmp_path / "a")
    assert 0 < again["frames"] < sum(map(len, episodes))
    assert copy(path, tmp_path / "a")["frames"] == 0


@pytest.mark.parametrize("damage", ["image", "record", "end"])
def test_damaged_episodes_are_left_out_and_counted(tmp_path, damage):
    """The other episodes of the shard keep their bytes, and each has its own frames' depth."""
    episodes = make_episodes(3, steps=(2, 3))
    bad = 2 if damage == "end" else 1
    if damage == "image":
        episodes[bad][1]["observation"]["image"] = b"\xff\xd8 not a picture"
    path = make_rlds(tmp_path / "source", {"train": episodes})
    (shard,) = path.glob("*.tfrecord*")
    if damage == "record":
        offset = [offset for offset, _, _ in read_records(shard)][bad]
        data = bytearray(shard.read_bytes())
        data[offset + 40] ^= 1
        shard.write_bytes(data)
    elif damage == "end":
        os.truncate(shard, shard.stat().st_size - 9)
    with pytest.raises(InputError, match=rf"episode {bad}.*--faults skip omits it"):
        copy(path, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    result = copy(path, tmp_path / "a", faults="skip")
    builder = tfds.builder_from_directory(result["directory"])
    (fault,) = result["skipped"]
    assert builder.info.metadata == {"skipped": {fault.reason: 1}, "faults": [str(fault)]}
    good = [episode for number, episode in enumerate(episodes) if number != bad]
    assert builder.info.splits["train"].num_examples == 2 and result["frames"] == sum(map(len, good))
    whole = make_rlds(tmp_path / "whole", {"train": good})
    expected = copy(whole, tmp_path / "b")
    (one,), (two,) = (Path(made["directory"]).glob("*.tfrecord*") for made in (result, expected))
    assert [record for _, record, _ in read_records(one)] == [record for _, record, _ in read_records(two)]
    assert copy(path, tmp_path / "a", faults="skip")["skipped"][0].args == fault.args  # remembered
    assert tfds.builder_from_directory(result["directory"]).info.metadata == builder.info.metadata  # and counted once
    (whole / shard.name).rename(shard)
    (whole / "dataset_info.json").rename(path / "dataset_info.json")
    assert not copy(path, tmp_path / "a", faults="skip")["skipped"]
    assert not tfds.builder_from_directory(result["directory"]).info.metadata


def test_a_directory_of_others_is_left_alone(source, tmp_path):
    shutil.copytree(source, tmp_path / "toy" / "1.0.0")
    with pytest.raises(InputError, match="holds files that were not made here"):
        copy(source, tmp_path)


def test_one_split(source, tmp_path):
    directory = copy(source, tmp_path, splits=("val",))["directory"]
    assert list(tfds.builder_from_directory(directory).info.splits) == ["val"]
    with pytest.raises(InputError, match=r"started with splits .*, not "):
        copy(source, tmp_path, splits=("train",))
    with pytest.raises(InputError, match="has no split 'test': it has train, val"):
        copy(source, tmp_path / "b", splits=("test",))


def test_bad_data(source, tmp_path):
    with pytest.raises(InputError, match="no key 'observation/wrist' in its steps"):
        copy(source, tmp_path / "a", image="observation/wrist")
    done = copy(source, tmp_path / "b")["directory"]
    with pytest.raises(InputError, match=f"already has '{KEY}'"):
        copy(done, tmp_path / "c")
    with pytest.raises(InputError, match="is the dataset itself"):
        copy(source, source.parents[1])
    with pytest.raises(InputError, match=r"episode 0, step 0: the depth model gives values that are not finite"):
        copy(source, tmp_path / "d", lambda images: brightness(images) * np.nan)
    episodes = make_episodes(2)
    episodes[1][2]["observation"]["image"] = b"\xff\xd8 not a picture"
    broken = make_rlds(tmp_path / "e", {"train": episodes})
    with pytest.raises(InputError, match=r"episode 1, step 2: the image does not decode"):
        copy(broken, tmp_path / "f")
    shard = next(broken.glob("*.tfrecord*"))
    os.truncate(shard, shard.stat().st_size - 9)
    with pytest.raises(InputError, match=rf"{shard.name}, episode 1: the record is truncated"):
        copy(broken, tmp_path / "g")


def test_zoedepth_alone_gives_the_same_weights(source, tmp_path, capsys):
    """A ZoeDepth's own Hugging Face directory, which has no image size, so one must be given."""
    random_hf_model(TINY, 0).save_pretrained(tmp_path / "zoe")
    config, leaves, size = read_zoedepth(tmp_path / "zoe")
    assert config == TINY and size is None and leaves.keys() == read_zoedepth(MODEL)[1].keys()
    argv = ["data", "depth", str(source), *OPTIONS]
    assert main([*argv, "8", "--checkpoint", str(tmp_path / "zoe"), "--out", str(tmp_path)]) == 2
    assert "--image-size must give" in capsys.readouterr().err
    assert main([*argv, "9", "--checkpoint", str(MODEL), "--out", str(tmp_path)]) == 2
    assert "the batch size 9 does not divide among 8 devices" in capsys.readouterr().err


def test_command(config_file, rlds, tmp_path, capsys, monkeypatch):
    """With a config and with a directory; the manifest records what made the depth."""
    monkeypatch.setattr(module, "depth_estimator", lambda config, arrays, dtype: (brightness, "a"))
    argv = ["data", "depth", "--checkpoint", str(MODEL), "--out"]
    assert main([*argv, str(tmp_path / "a"), "--config", str(config_file), "--split", "val"]) == 0
    directory = tmp_path / "a" / rlds.parent.name / rlds.name
    assert f"wrote {directory}: {KEY} of" in capsys.readouterr().out
    assert main([*argv, str(tmp_path / "b"), str(rlds), "--spec", "libero", "--split", "val"]) == 0
    manifests = [json.loads((tmp_path / x / "toy" / "1.0.0" / "depth.json").read_text()) for x in "ab"]
    assert manifests[0] == manifests[1]
    assert manifests[0]["image_size"] == SIZE and manifests[0]["dtype"] == "float32"
    capsys.readouterr()
    assert main([*argv, str(tmp_path / "c"), str(rlds)]) == 2
    assert "name the data either as SRC --spec NAME or by --config FILE" in capsys.readouterr().err
    write_huggingface(tmp_path / "without", golden_with_given_depth())
    argv = ["data", "depth", "--checkpoint", str(tmp_path / "without"), "--out", str(tmp_path)]
    assert main([*argv, "--config", str(config_file)]) == 2
    assert "without holds no ZoeDepth: its model takes depth from 'dataset'" in capsys.readouterr().err
