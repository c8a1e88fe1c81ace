"""Datasets by mixture and by entry, parts of splits, and phases."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers.streams import assert_passes, assert_resumes, assert_shared, take
from helpers.toy_rlds import data_config, make_episodes, make_rlds

from spatialvla_jax.config import load_config
from spatialvla_jax.data import DataConfig, Loader
from spatialvla_jax.data.oxe.mixtures import MIXTURES
from spatialvla_jax.data.resolve_datasets import make_entries, newest_version
from spatialvla_jax.errors import InputError

SIZE = 16


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A directory with two catalogue datasets, one of them in two versions."""
    root = tmp_path_factory.mktemp("root")
    for name, version, count in (("libero", "1.0.0", 9), ("libero", "1.10.0", 20), ("libero_no_noops", "1.0.0", 10)):
        make_rlds(root, {"train": make_episodes(count, steps=(4, 4))}, name=name, version=version, episodes_per_shard=4)
    return root


@pytest.fixture
def mixtures(monkeypatch):
    monkeypatch.setitem(MIXTURES, "two", (("libero", 1.0), ("libero_no_noops", 0.5)))


def test_mixture_by_name(root, mixtures, cache_dir):
    """Each dataset in its newest version, with the catalogue's spec and the mixture's weight."""
    config = data_config(cache_dir=cache_dir, mixture="two", root=str(root))
    loader = Loader(config, image_size=SIZE)
    assert loader.names == ("libero", "libero_no_noops") and loader.weights == (1.0, 0.5)
    assert [row["episodes"] for row in loader.table()] == [20, 10]
    np.testing.assert_allclose([row["shares"][0] for row in loader.table()], [0.8, 0.2], atol=1e-4)
    text = loader.describe()
    assert "libero_no_noops" in text and "80.00%" in text and "20.00%" in text and text.count("\n") == 3


def test_version_is_the_newest_number(root):
    assert newest_version(root / "libero") == root / "libero" / "1.10.0"
    assert newest_version(root / "libero" / "1.0.0") == root / "libero" / "1.0.0"  # a name may pin its version
    assert newest_version(root) is None and newest_version(root / "nothing") is None


@pytest.mark.parametrize(
    ("names", "newest"),
    [
        (("1.10.0", "1.9.0", "2.0.0-old"), "1.10.0"),
        (("1.0.0", "1.0.0.incompleteAB12", ".2.0.0", "old", "backup-3.0.0"), "1.0.0"),
        (("2.0.0", "10.0.0", "9.0.0"), "10.0.0"),
        (("2.0.0-rc.2", "2.0.0-rc.10", "2.0.0-alpha"), "2.0.0-rc.10"),  # there is no release
        (("2.0.0-rc1", "2.0.0"), "2.0.0"),
        (("old", ".hidden", "1.0.0.incompleteAB12"), None),
    ],
)
def test_what_counts_as_a_version(tmp_path, names, newest):
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "dataset_info.json").touch()
    (tmp_path / "99.0.0").mkdir()  # without dataset_info.json
    assert newest_version(tmp_path) == (newest and tmp_path / newest)


def test_datasets_that_a_mixture_lacks(root, mixtures, monkeypatch):
    monkeypatch.setitem(MIXTURES, "four", (("libero", 1.0), ("bridge_orig", 1.0), ("fractal20220817_data", 1.0)))
    with pytest.raises(
        InputError, match=f"{root} lacks 2 of the 3 datasets of 'four': bridge_.*, fractal20220817_data"
    ):
        make_entries(DataConfig("four", str(root)))
    with pytest.raises(InputError, match=r"data\.mixture is 'tow': known are .*two"):
        make_entries(DataConfig("tow", str(root)))
    with pytest.raises(InputError, match=r"needs data\.root"):
        make_entries(DataConfig("two"))
    own = {"name": "libero", "path": "x", "spec": "libero"}
    with pytest.raises(InputError, match="have duplicate names: libero"):
        make_entries(DataConfig("two", str(root), (own,)))


BAD_ENTRIES = [
    ("libero", "an entry of data.datasets='libero' is a string, but a dict is expected"),
    ({"name": 3}, "name of a dataset in data.datasets=3 is a whole number, but a string is expected"),
    ({"name": "a/b"}, "='a/b' is not a name: it is empty or has a slash"),
    ({"path": 3}, r"data.datasets\['a'\].path=3 is a whole number, but a string is expected"),
    ({"weight": 0}, r"\['a'\].weight=0.0 is not above 0"),
    ({"weight": -1.5}, "weight=-1.5 is not above 0"),
    ({"weight": float("nan")}, "weight=nan is not a finite number; a valid value is 1.0"),
    ({"weight": "2"}, "weight='2' is a string, but a number is expected; the nearest valid value is 2.0"),
    ({"splits": "val"}, "splits='val' is a string, but a dict is expected"),
    ({"splits": {"val": 3}}, r"splits\['val'\]=3 is a whole number, but a string is expected"),
    ({"wieght": 1}, "has no key 'wieght'; did you mean weight?"),
    ({"spec": ["libero"]}, "spec=.* is a list, but a string or a dict is expected"),
    ({"spec": {"image": 3}}, "spec.image=3 is a whole number, but a string is expected"),
    ({"spec": {"depth_unit": 0}}, r"spec.depth_unit=0.0 is not above 0 .metres."),
    ({"spec": {"default_intrinsics_size": (0, 0)}}, r"intrinsics_size\[0\]=0 is below 1 .pixels.; the nearest .* 1"),
    ({"spec": {"default_intrinsics": ((600, 0, 320), (0, 600, 240))}}, "has 2 elements, but 3 are expected"),
    ({"spec": {"operations": (("drop_noops", "1e-3"),)}}, "threshold of 'drop_noops'='1e-3' is a string, but a number"),
    (
        {"spec": {"operations": (("drop_idle", 0, 0.1),)}},
        "window of 'drop_idle'=0 is below 1; the nearest valid value is 1",
    ),
    ({"spec": {"operations": (("scale", 1.0, float("inf")),)}}, "factors of 'scale'=inf is not a finite number"),
    ({"spec": {"operations": ("invert_gripper",)}}, r"operations\[0\]='invert_gripper' is a string, but a sequence is"),
    ({"spec": {"operations": ((),)}}, r"operations\[0\]=\(\) names no operation"),
    (
        {"spec": {"operations": (("relabel_from_state", "observation/state"),)}},
        r"'relabel_from_state' reads 'observation/state', which `arrays` must name: it names \[\]",
    ),
]


@pytest.mark.parametrize(("entry", "sentence"), BAD_ENTRIES)
def test_bad_entries_are_refused_before_anything_is_read(entry, sentence):
    if isinstance(entry, dict):
        entry = {"name": "a", "spec": {}, "path": "nowhere"} | entry
    with pytest.raises(InputError, match=sentence) as error:
        make_entries(DataConfig.from_config({"datasets": [entry]}))
    assert "\n" not in str(error.value)


USER_CONFIG = """
from spatialvla_jax.config import default_config


def get_config():
    config = default_config()
    config.data.update(mixture="two", root={root!r}, cache_dir={cache!r}, workers=1)
    config.data.datasets = [
        {{
            "name": "my_robot",
            "path": {path!r},
            "weight": 4.0,
            "spec": {{
                "image": "observation/image",
                "action": ["action"],
                "operations": [["clip_gripper", 0.0, 1.0], ["invert_gripper"]],
                "default_intrinsics": [[60.0, 0, 32], [0, 60.0, 24], [0, 0, 1]],
                "default_intrinsics_size": [48, 64],
            }},
        }}
    ]
    config.data.drop = {{"libero": 0.5}}
    return config
"""


def test_own_dataset_beside_a_mixture(root, mixtures, tmp_path, cache_dir):
    """A dataset unknown to the package, defined only by its owner's config file."""
    path = make_rlds(tmp_path, {"train": make_episodes(5, seed=4)}, name="mine")
    file = tmp_path / "config.py"
    file.write_text(USER_CONFIG.format(root=str(root), cache=str(cache_dir), path=str(path)))
    config = load_config(file, {"data.prompt.vocab_size": "96"})
    loader = Loader(config.data, image_size=SIZE)
    assert loader.names == ("libero", "libero_no_noops", "my_robot") and loader.weights == (1.0, 0.5, 4.0)
    batch = loader.frames(np.asarray([loader.num_frames() - 1]))
    np.testing.assert_allclose(batch.intrinsics[0], [[15, 0, 8], [0, 20, 8], [0, 0, 1]])
    assert (loader.table()[0]["shares"][1], len(loader.table()[2]["shares"])) == (0, 2)


# --- parts of splits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "rest", "sizes"),
    [
        pytest.param("train[:95%]", "train[95%:]", (19, 1), marks=pytest.mark.slow),
        pytest.param("train[:7]", "train[7:]", (7, 13), marks=pytest.mark.slow),
        ("train[:-3]", "train[-3:]", (17, 3)),
    ],
)
def test_parts_of_a_split(root, cache_dir, train, rest, sizes):
    """Episodes in order across shards; together the parts make the whole."""
    config = data_config(root / "libero" / "1.10.0", cache_dir=cache_dir)
    whole = Loader(config, image_size=SIZE)
    loader = Loader(config | {"split": train}, image_size=SIZE)
    parts = [*loader.episodes(train), *loader.episodes(rest)]
    assert tuple(loader.indexes(split)[0].num_episodes for split in (train, rest)) == sizes
    for part, episode in zip(parts, whole.episodes("train"), strict=True):
        np.testing.assert_array_equal(part.frames.image, episode.frames.image)
    assert loader.num_frames() == 4 * sizes[0]
    (index,) = loader.indexes()
    actions = np.asarray(whole.indexes()[0].arrays["action"])[: 4 * sizes[0]]
    np.testing.assert_allclose(index.statistics["action"]["mean"], actions.mean(axis=0), atol=1e-6)
    last = loader.indexes(rest)[0]
    assert last.describe(0).endswith(f"episode {sizes[0] % 4}, step 0")


@pytest.mark.parametrize(
    ("train", "held_out", "shared"),
    [
        ("train", "train", 20),
        ("train[:95%]", "train[90%:]", 1),
        ("train[:95%]", "train[95%:]", 0),
        ("train[3:9]", "train[5:]", 4),
        ("train", "train[-3:]", 3),
    ],
)
def test_episodes_in_both_splits(root, cache_dir, train, held_out, shared):
    loader = Loader(data_config(root / "libero" / "1.10.0", cache_dir=cache_dir, split=train), image_size=SIZE)
    assert loader.shared_episodes(held_out) == ({"toy0": shared} if shared else {})


def test_episodes_in_both_splits_of_several_datasets(root, rlds, cache_dir):
    """Under any name, episodes from the same file count as the same."""
    config = data_config(root / "libero" / "1.10.0", rlds, cache_dir=cache_dir)
    config["datasets"].append(config["datasets"][0] | {"name": "again"})
    config["datasets"][0]["splits"] = {"train": "train[:10]", "val": "train[10:]"}
    config["datasets"][2]["splits"] = {"train": "train[:15]", "val": "train[15:]"}
    loader = Loader(config, image_size=SIZE)
    assert loader.shared_episodes("val") == {"toy0": 5}


def test_split_of_one_dataset(root, rlds, cache_dir):
    """A dataset without a validation split holds out some training episodes."""
    config = data_config(root / "libero" / "1.10.0", rlds, cache_dir=cache_dir)
    config["datasets"][0]["splits"] = {"train": "train[:90%]", "val": "train[90%:]"}
    loader = Loader(config, image_size=SIZE)
    assert [index.num_episodes for index in loader.indexes()] == [18, 7]
    assert [index.num_episodes for index in loader.indexes("val")] == [2, 2]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("train[:0]", r"'train\[:0\]' of .* holds no episodes"),
        ("train[:5%", r"has no split 'train\[:5%'"),
        ("train[50:]", r"has no split 'train\[50:\]': it has train, whole or as in"),
        ("test[:5%]", r"has no split 'test\[:5%\]': it has train"),
    ],
)
def test_bad_splits(root, cache_dir, split, message):
    config = data_config(root / "libero" / "1.10.0", cache_dir=cache_dir, split=split)
    with pytest.raises(InputError, match=message):
        Loader(config, image_size=SIZE)


def test_some_frames_of_a_split(root, cache_dir):
    loader = Loader(data_config(root / "libero" / "1.10.0", cache_dir=cache_dir), image_size=SIZE)
    batches = list(loader.epoch(8, "train", frames=20))
    ids = np.concatenate([batch.sample_id[batch.valid] for batch in batches])
    assert len(batches) == 3 and ids.tolist() == list(range(0, 80, 4))
    assert sum(batch.valid.sum() for batch in loader.epoch(8, "train", frames=1000)) == 80


# --- phases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 3])
def test_phases(root, rlds, cache_dir, block):
    """A dataset leaves at its fraction of the steps. Otherwise the stream is as usual: exact resuming, any number of
    hosts, and passes that continue across the change."""
    paths = (root / "libero" / "1.10.0", root / "libero" / "1.0.0", rlds)
    config = data_config(*paths, cache_dir=cache_dir, read_block=block, shuffle_frames=30)
    loader = Loader(config | {"drop": {"toy0": 2 / 3, "toy2": 0.25}}, image_size=SIZE)
    stream = partial(loader.batches, 12, seed=3, total_steps=24)
    whole = take(stream(), 24)
    datasets = [set(batch.dataset_id.tolist()) for batch in whole]
    assert set.union(*datasets[:6]) == {0, 1, 2} and set.union(*datasets[6:16]) == {0, 1}
    assert set.union(*datasets[16:]) == {1}
    assert_resumes(stream, whole, (0, 5, 6, 7, 15, 16, 20))
    assert_shared(stream, whole, (2, 4))
    ids = np.concatenate([batch.sample_id[batch.dataset_id == 1] for batch in whole])
    assert_passes(ids - 80, 36)
    assert "from 25%" in loader.describe() and "from 67%" in loader.describe()
    plain = Loader(config, image_size=SIZE).batches(12, seed=3)
    for one, two in zip(whole[:6], plain, strict=False):
        np.testing.assert_array_equal(one.sample_id, two.sample_id)


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ({"droid": 0.5}, r"data\.drop names 'droid', which is not in the mixture: that has toy0"),
        ({"toy0": 1.5}, r"data\.drop\['toy0'\]=1\.5 is not below 1"),
        ({"toy0": 0.5}, "names every dataset"),
    ],
)
def test_bad_phases(rlds, cache_dir, drop, message):
    with pytest.raises(InputError, match=message):
        Loader(data_config(rlds, cache_dir=cache_dir, drop=drop), image_size=SIZE)


def test_phases_need_the_number_of_steps(root, rlds, cache_dir):
    config = data_config(rlds, root / "libero" / "1.0.0", cache_dir=cache_dir, drop={"toy1": 0.5})
    with pytest.raises(InputError, match="number of steps"):
        next(Loader(config, image_size=SIZE).batches(4))


def test_pretraining_names_the_published_mixture():
    """The recipe's config: 28 datasets, DROID in the first two thirds, validation on held-out episodes."""
    config = load_config(Path(__file__).parents[2] / "configs" / "pretrain.py")
    names = [name for name, _ in MIXTURES[config.data.mixture]]
    assert len(names) == 28 and set(config.data.drop) == {"droid"} <= set(names)
    later = [name for name, _ in MIXTURES["oxe_spatial_vla_plus_stage2"]]
    assert [name for name in names if name not in config.data.drop] == later
    assert (config.data.split, config.train.eval_split) == ("train[:95%]", "train[95%:]")
