import dataclasses
import shutil
from functools import partial

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers.batches import assert_equal
from helpers.streams import assert_passes, assert_resumes, assert_shared, take
from helpers.toy_rlds import INTRINSICS, data_config, encode_image, make_episodes, make_rlds
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from spatialvla_jax.actions.normalization import normalize
from spatialvla_jax.data import Loader
from spatialvla_jax.data.chunks import chunk_actions
from spatialvla_jax.data.images import decode_image
from spatialvla_jax.data.oxe import CATALOGUE
from spatialvla_jax.errors import InputError

SIZE = 16


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    episodes = make_episodes(3, seed=5, size=(32, 32), intrinsics=INTRINSICS)
    return make_rlds(tmp_path_factory.mktemp("other"), {"train": episodes}, name="other")


@pytest.fixture(scope="module")
def loader(rlds, cache_dir):
    return Loader(data_config(rlds, cache_dir=cache_dir), image_size=SIZE, depth=True)


@pytest.fixture(scope="module")
def mixed(rlds, other, cache_dir):
    return Loader(data_config(rlds, other, cache_dir=cache_dir), image_size=SIZE)


def test_batch_is_the_contract(loader):
    batch = next(loader.batches(6))
    shapes = {
        "image": ((6, SIZE, SIZE, 3), np.uint8),
        "depth": ((6, SIZE, SIZE), np.float32),
        "intrinsics": ((6, 3, 3), np.float32),
        "prompt_ids": ((6, 24), np.int32),
        "prompt_mask": ((6, 24), bool),
        "actions": ((6, 4, 7), np.float32),
        "action_mask": ((6, 4), bool),
        "dataset_id": ((6,), np.int32),
        "sample_id": ((6,), np.int64),
    }
    assert {key: (value.shape, value.dtype) for key, value in vars(batch).items() if value is not None} == shapes


def test_frames_equal_what_tfds_reads(loader, rlds):
    """Compares image, depth, camera, prompt and actions of every frame with an independent reader."""
    builder = tfds.builder_from_directory(rlds)
    skip = {"steps": {"observation": {"image": tfds.decode.SkipDecoding()}}}
    episodes = builder.as_dataset("val", decoders=skip)
    frame = 0
    for episode, stored in zip(loader.episodes("val"), episodes, strict=True):
        steps = list(stored["steps"].as_numpy_iterator())
        raw = np.asarray([step["action"] for step in steps])
        raw[:, 6] = raw[:, 6] < 0
        actions = normalize(raw, loader.statistics["toy0"]["action"])
        assert episode.dataset == "toy0" and episode.instruction == steps[0]["language_instruction"].decode()
        assert len(episode.frames.image) == len(steps)
        for row, step in enumerate(steps):
            np.testing.assert_array_equal(
                episode.frames.image[row], decode_image(step["observation"]["image"], SIZE)[0]
            )
            depth = step["observation"]["depth"][..., 0]
            rows, columns = ((np.arange(SIZE) + 0.5) * side / SIZE for side in depth.shape)
            nearest = depth[np.ix_(rows.astype(int), columns.astype(int))] / 1000
            np.testing.assert_allclose(episode.frames.depth[row], nearest, rtol=1e-6)
            scale = np.asarray([[SIZE / 64], [SIZE / 48], [1]])
            np.testing.assert_allclose(episode.frames.intrinsics[row], INTRINSICS * scale, rtol=1e-6)
            text = loader.tokenizer.decode(episode.frames.prompt_ids[row][episode.frames.prompt_mask[row]])
            assert text == step["language_instruction"].decode().lower() + "\n"
            for later in range(4):
                inside = row + later < len(steps)
                neutral = np.append(np.zeros(6), actions[-1, 6])
                expected = actions[row + later] if inside else neutral
                np.testing.assert_array_equal(episode.frames.actions[row, later], expected)
                assert episode.frames.action_mask[row, later] == inside
            assert episode.frames.sample_id[row] == frame
            frame += 1


def test_chunks_by_hand():
    """Two episodes of 2 and 3 frames: chunks stop at the episode's end and continue with neutral actions."""
    actions = np.zeros((5, 7), np.float32)
    actions[:, 0], actions[:, 6] = [1, 2, 3, 4, 5], [0, 1, 1, 0, 0.5]
    statistics = {"q01": [0] * 7, "q99": [10] + [1] * 6, "min": [0] * 7, "max": [10] + [1] * 6}
    chunks, mask = chunk_actions(actions, np.arange(5), np.asarray([2, 2, 5, 5, 5]), 3, statistics)
    x = [[-0.8, -0.6, 0], [-0.6, 0, 0], [-0.4, -0.2, 0], [-0.2, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(chunks[..., 0], x, atol=1e-6)
    gripper = [[0, 1, 1], [1, 1, 1], [1, 0, 0.5], [0, 0.5, 0.5], [0.5, 0.5, 0.5]]
    np.testing.assert_array_equal(chunks[..., 6], gripper)
    assert mask.sum(axis=1).tolist() == [2, 1, 3, 2, 1]
    np.testing.assert_array_equal(chunks[0, 2, 1:6], 0)


@given(st.integers(0, 40), st.integers(1, 9), st.integers(0, 5))
@settings(max_examples=6, deadline=None)
def test_resume_is_exact(mixed, start, batch_size, seed):
    """The batches from step s on equal the end of the batches from step 0 on."""
    stream = partial(mixed.batches, batch_size, seed=seed)
    assert_resumes(stream, take(stream(), start + 2), [start])


def test_order_does_not_depend_on_processes_or_threads(mixed, rlds, other, cache_dir):
    stream = partial(mixed.batches, 12, seed=1)
    whole = take(stream(), 3)
    threads = Loader(data_config(rlds, other, cache_dir=cache_dir, workers=3), image_size=SIZE)
    for one, two in zip(whole, threads.batches(12, seed=1), strict=False):
        assert_equal(one, two)
    assert_shared(stream, whole, (2, 3))


def test_every_frame_once_a_pass(loader):
    total = loader.num_frames()
    ids = np.concatenate([batch.sample_id for batch in take(loader.batches(7, seed=2), 2 * total // 7)])
    assert_passes(ids, total)
    assert not np.array_equal(ids[:total], np.arange(total))
    assert not np.array_equal(ids, np.concatenate([b.sample_id for b in take(loader.batches(7), len(ids) // 7)]))


def test_epoch_pads_and_marks(loader):
    total = loader.num_frames("val")
    batches = list(loader.epoch(5, "val"))
    valid = np.concatenate([batch.valid for batch in batches])
    ids = np.concatenate([batch.sample_id for batch in batches])
    assert valid.sum() == total and len(valid) == -(-total // 5) * 5
    np.testing.assert_array_equal(ids[valid], np.arange(total))
    parts = [list(loader.epoch(4, "val", process_index=i, process_count=2)) for i in range(2)]
    halves = [np.concatenate([a.sample_id, b.sample_id]) for a, b in zip(*parts, strict=True)]
    np.testing.assert_array_equal(np.concatenate(halves)[:total], np.arange(total))


def test_mixture(mixed, loader):
    """Samples of both datasets have their own camera and statistics, in the expected shares."""
    table = mixed.table()
    sizes = [row["frames"] for row in table]
    assert [row["dataset"] for row in table] == ["toy0", "toy1"] and sum(sizes) == mixed.num_frames()
    np.testing.assert_allclose([row["shares"][0] for row in table], np.asarray(sizes) / sum(sizes), atol=1e-4)
    seen = {}
    for batch in take(mixed.batches(16), 8):
        for row in range(16):
            seen[int(batch.sample_id[row])] = jax.tree.map(lambda x, row=row: x[row], batch)
    actions = mixed.actions()
    for number, sample in seen.items():
        assert sample.dataset_id == (number >= sizes[0])
        np.testing.assert_allclose(sample.actions[0], actions[number], atol=1e-7)
        old = (64, 48) if number < sizes[0] else (32, 32)
        scale = np.asarray([[SIZE / old[0]], [SIZE / old[1]], [1]])
        np.testing.assert_allclose(sample.intrinsics, INTRINSICS * scale, rtol=1e-6)
    assert mixed.statistics["toy0"] == loader.statistics["toy0"] != mixed.statistics["toy1"]
    relative = INTRINSICS / [[64], [48], [1]]
    np.testing.assert_allclose(mixed.intrinsics["toy0"], relative, rtol=1e-6)


def test_weights_and_balance(rlds, other, cache_dir):
    config = data_config(rlds, other, cache_dir=cache_dir, balance=False)
    config["datasets"][0]["weight"] = 3.0
    shares = [row["shares"][0] for row in Loader(config, image_size=SIZE).table()]
    np.testing.assert_allclose(shares, [0.75, 0.25], atol=1e-4)


def test_default_camera(rlds, cache_dir):
    """A dataset without intrinsics gets the release's camera, scaled from 640x480 whatever the stored size."""
    config = data_config(rlds, cache_dir=cache_dir)
    config["datasets"][0]["spec"] = {"operations": [["clip_gripper", 0, 1]]}
    intrinsics = next(Loader(config, image_size=224).batches(2)).intrinsics
    expected = [[623.588 * 0.35, 0, 319.501 * 0.35], [0, 623.588 * 224 / 480, 239.545 * 224 / 480], [0, 0, 1]]
    np.testing.assert_allclose(intrinsics, [expected, expected], rtol=1e-6)


def test_statistics_and_tokenizer_of_a_checkpoint(loader, rlds, cache_dir):
    statistics = {"toy0": {"action": loader.statistics["toy0"]["action"] | {"q01": [-2.0] * 7, "q99": [2.0] * 7}}}
    config = data_config(rlds, cache_dir=cache_dir)
    again = Loader(config, image_size=SIZE, statistics=statistics, tokenizer=loader.tokenizer)
    assert again.tokenizer is loader.tokenizer
    assert np.abs(again.actions("val")[:, :6]).max() <= 0.5
    published = Loader(config, image_size=SIZE, statistics={"toy0/1.0.0": statistics["toy0"]})
    assert published.statistics == again.statistics and published.versions == {"toy0": "1.0.0"}
    with pytest.raises(InputError, match="statistics know x, but not the dataset 'toy0'"):
        Loader(config, image_size=SIZE, statistics={"x": {}})


def test_config_dict_and_tokenizer_file(loader, rlds, cache_dir, tmp_path):
    (tmp_path / "small.model").write_bytes(loader.tokenizer.to_bytes())
    config = ConfigDict(data_config(rlds, cache_dir=cache_dir))
    config["prompt"]["model"] = str(tmp_path / "small.model")
    again = Loader(config, image_size=SIZE, depth=True)
    assert_equal(next(again.batches(4)), next(loader.batches(4)))
    config["prompt"]["model"] = str(tmp_path / "other.model")
    with pytest.raises(InputError, match=r"data\.prompt\.model .*other\.model"):
        Loader(config, image_size=SIZE)


@pytest.mark.parametrize("key", ["image", "depth"])
@pytest.mark.parametrize("kind", ["garbage", "truncated"])
def test_image_that_does_not_decode(tmp_path, key, kind):
    """The message names the frame, and only its batch fails."""
    episodes = make_episodes(4, steps=(4, 4))
    seen = episodes[3][1]["observation"]  # the first episode of the second file
    data = seen[key] if key == "image" else encode_image(seen[key][..., 0], "PNG")
    seen[key] = b"\0" * len(data) if kind == "garbage" else data[: len(data) // 2]
    path = make_rlds(tmp_path, {"train": episodes})
    loader = Loader(data_config(path, cache_dir=tmp_path / "cache"), image_size=SIZE, depth=True)
    batches = loader.epoch(4, "train")
    take(batches, 3)
    where = r"dataset 'toy0', file .*00001.*, episode 0, step 1"
    with pytest.raises(InputError, match=f"{where}: the image does not decode"):
        next(batches)


def test_dataset_that_vanishes(tmp_path):
    path = make_rlds(tmp_path, {"train": make_episodes(4)})
    loader = Loader(data_config(path, cache_dir=tmp_path / "cache"), image_size=SIZE)
    shutil.rmtree(path)
    with pytest.raises(InputError, match=r"tfrecord.* cannot be read any more"):
        next(loader.batches(4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(datasets=[]), "mixture is empty"),
        (lambda config: config.update(balence=True), "config key data.balence does not exist; there are mixture, "),
        (lambda config: config["prompt"].update(len=4), "config key data.prompt.len does not exist; there are length"),
        (lambda config: config["datasets"][0].update(weight=0), r"toy0'\].weight=0.0 is not above 0"),
        (
            lambda config: config["datasets"][0].update(wait=1),
            r"toy0'\] has no key 'wait'; did you mean weight",
        ),
        (lambda config: config["datasets"][0].pop("path"), "has no 'path'"),
        (lambda config: config["datasets"].append(config["datasets"][0]), "have duplicate names: toy0"),
        (lambda config: config.update(split="test"), "has no split 'test': it has train, val"),
        (lambda config: config["datasets"][0].update(spec={}), "'toy0' has no depth"),
        (lambda config: config["prompt"].update(length=4), "needs .* tokens, more than the 4"),
    ],
)
def test_bad_configs(rlds, cache_dir, change, message):
    config = data_config(rlds, cache_dir=cache_dir)
    change(config)
    with pytest.raises(InputError, match=message):
        Loader(config, image_size=SIZE, depth=True)


def test_batch_that_does_not_divide(loader):
    with pytest.raises(InputError, match="batch size 7 does not divide among 2 processes"):
        next(loader.batches(7, process_count=2))


def test_depth_in_another_unit_is_refused(rlds, cache_dir):
    """Centimetres read as millimetres: the first batch names a frame."""
    spec = dataclasses.asdict(dataclasses.replace(CATALOGUE["libero"], depth_unit=0.1))
    config = data_config(rlds, cache_dir=cache_dir)
    config["datasets"][0]["spec"] = spec
    loader = Loader(config, image_size=SIZE, depth=True)
    sentence = (
        r"dataset 'toy0', file .*, episode \d, step \d: the depth cannot be metres: .* 'depth_unit' says how many"
    )
    with pytest.raises(InputError, match=sentence):
        next(loader.batches(4))
