"""Indexes, statistics and packed files are used only with the data, spec and program version that they were made
from."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.full_disk import no_room
from helpers.indexes import load_index
from helpers.streams import take
from helpers.toy_rlds import data_config, make_episodes, make_rlds

from spatialvla_jax.config import call_function
from spatialvla_jax.data import DataConfig, Loader
from spatialvla_jax.data.beam import compute_stats
from spatialvla_jax.data.index import Faults
from spatialvla_jax.data.oxe import CATALOGUE, OPERATIONS, operations
from spatialvla_jax.data.pack import write_pack
from spatialvla_jax.data.tfrecord import read_records
from spatialvla_jax.errors import InputError

SPEC = CATALOGUE["libero"]
SKIP = Faults("skip", 9)
SIZE = 16


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> tuple[Path, Path]:
    """25 episodes in 9 files, and a second copy with other actions but files of the same sizes."""
    one, two = (make_episodes(25, size=(8, 8), steps=(2, 4)) for _ in range(2))
    for step in (step for episode in two for step in episode):
        step["action"] = step["action"] * np.float32(-0.5)
    folder = tmp_path_factory.mktemp("originals")
    paths = [make_rlds(folder / str(n), {"train": episodes}) for n, episodes in enumerate((one, two))]
    assert [f.stat().st_size for f in shards(paths[0])] == [f.stat().st_size for f in shards(paths[1])]
    return paths[0], paths[1]


@pytest.fixture
def data(originals, tmp_path) -> Path:
    """A copy of the first dataset that keeps its file times."""
    return Path(shutil.copytree(originals[0], tmp_path / "data" / "toy" / "1.0.0"))


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("*.tfrecord*"))


def load(path, cache, faults=None, spec=SPEC, split="train"):
    return load_index("toy", path, spec, split, cache, faults=faults or Faults())


def keep_time(file: Path, content: bytes | bytearray) -> None:
    stat = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def change_info(path: Path, lengths: list[int]) -> None:
    file = path / "dataset_info.json"
    info = json.loads(file.read_text())
    info["splits"][0]["shardLengths"] = [str(length) for length in lengths]
    file.write_text(json.dumps(info))


def assert_same(one, two):
    assert (one.statistics, one.instructions) == (two.statistics, two.instructions)
    assert (one.skipped, one.num_read) == (two.skipped, two.num_read)
    assert one.arrays.keys() == two.arrays.keys()
    for key in one.arrays:
        np.testing.assert_array_equal(one.arrays[key], two.arrays[key])


# --- the data changes -------------------------------------------------------------------------------------------------


def rebuilt(path, other):
    shutil.rmtree(path)
    shutil.copytree(other, path, copy_function=shutil.copyfile)


def rebuilt_with_the_old_times(path, other):
    for old, new in zip(shards(path), shards(other), strict=True):
        keep_time(old, new.read_bytes())


def one_file_older(path, other):
    file = shards(path)[4]
    shutil.copyfile(shards(other)[4], file)
    os.utime(file, ns=(10**18, 10**18))


def one_file_replaced(path, other):
    new = path / "new"
    shutil.copyfile(shards(other)[4], new)
    os.replace(new, shards(path)[4])


def one_file_linked(path, other):
    shards(path)[4].unlink()
    shards(path)[3].with_name(shards(other)[4].name).symlink_to(shards(other)[4])


def one_file_more(path, other):
    last = shards(path)[-1]
    shutil.copyfile(last, last.with_name(last.name.replace("00008", "00009")))
    change_info(path, [3] * 8 + [1, 1])


def one_file_less(path, other):
    shards(path)[-1].unlink()
    change_info(path, [3] * 8)


@pytest.mark.parametrize(
    "change",
    [
        rebuilt,
        rebuilt_with_the_old_times,
        one_file_older,
        one_file_replaced,
        one_file_linked,
        one_file_more,
        one_file_less,
    ],
)
def test_changed_data_is_indexed_anew(originals, data, tmp_path, capsys, change):
    before = load(data, tmp_path / "cache")
    change(data, originals[1])
    index = load(data, tmp_path / "cache")
    assert "dataset 'toy' is indexed again: " in capsys.readouterr().err
    assert index.statistics != before.statistics
    assert_same(index, load(data, tmp_path / "fresh"))
    assert_same(index, load(data, tmp_path / "cache")) and not capsys.readouterr().err
    assert len(list((tmp_path / "cache").iterdir())) == 1  # it replaces the old one


def test_datasets_of_one_name_are_kept_apart(originals, tmp_path, capsys):
    """Holds for equal sizes and times, and for a link that leads to one dataset and then to the other."""
    paths = [tmp_path / "a" / "toy" / "1.0.0", tmp_path / "b" / "toy" / "1.0.0"]
    for path, original in zip(paths, originals, strict=True):
        shutil.copytree(original, path)
        for file in shards(path):
            os.utime(file, ns=(10**18, 10**18))
    link = tmp_path / "link"
    for path in paths:
        link.unlink(missing_ok=True)
        link.symlink_to(path)
        assert_same(load(link, tmp_path / "cache"), load(path, tmp_path / "fresh"))
    assert len(list((tmp_path / "cache").iterdir())) == 2 and "again" not in capsys.readouterr().err
    assert load(paths[0], tmp_path / "cache", split="train[:50%]").num_read == 12  # parts of a split are kept apart too
    assert load(paths[0], tmp_path / "cache").num_read == 25


def test_a_repaired_file_is_used_again(data, tmp_path):
    """The file was damaged, truncated or unreadable; its time does not show the last of these."""
    file = shards(data)[4]
    content, damaged = file.read_bytes(), bytearray(file.read_bytes())
    damaged[len(content) // 2] ^= 1
    for bad in (damaged, content[:-30], b""):
        file.write_bytes(bad)
        assert load(data, tmp_path / "cache", SKIP).skipped
        file.write_bytes(content)
        assert not load(data, tmp_path / "cache", SKIP).skipped and load(data, tmp_path / "cache").num_read == 25

    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    moved = file.with_name("away")
    (tmp_path / "cache").rename(tmp_path / "old")

    def away(*_):
        if file.exists():
            file.rename(moved)

    lost = load_index("toy", data, SPEC, "train", tmp_path / "cache", away, SKIP)
    assert lost.skipped == {"unreadable file": 3}
    moved.rename(file)
    assert not load(data, tmp_path / "cache", SKIP).skipped


@pytest.mark.parametrize("policy", ["fail", "skip"])
def test_a_record_that_only_its_checksum_shows(originals, data, tmp_path, policy):
    """A start does not compare this record. Reading one of its frames ends the stream; the next start indexes again."""
    config = data_config(data, cache_dir=tmp_path / "cache", faults={"policy": policy, "limit": 9})
    loader = Loader(config, image_size=SIZE)
    file, other = shards(data)[3], shards(originals[1])[3].read_bytes()
    content = bytearray(file.read_bytes())
    place, record, _ = list(read_records(file))[1]  # episode 10
    content[place : place + len(record) + 4] = other[place : place + len(record) + 4]
    keep_time(file, content)
    stale = Loader(config, image_size=SIZE)
    assert stale.statistics == loader.statistics
    with pytest.raises(InputError, match=rf"records of {file} are not those that dataset 'toy0' was indexed with"):
        take(stale.batches(8), 60)
    again = Loader(config, image_size=SIZE)
    assert again.statistics != loader.statistics and len(take(again.batches(8), 20)) == 20


def test_a_frame_that_only_its_checksum_shows(data, tmp_path):
    """After indexing, a byte flips in a picture, which still decodes."""
    config = data_config(data, cache_dir=tmp_path / "cache", faults={"policy": "skip", "limit": 9})
    loader = Loader(config, image_size=SIZE)
    (index,) = loader.indexes()
    offset, length, _ = index.spans("image", 5).tolist()
    file = Path(index.files[index.arrays["episode_file"][index.episode(5)]])
    content = bytearray(file.read_bytes())
    content[offset + length // 2] ^= 1
    keep_time(file, content)
    seen = [
        number for batch in loader.epoch(8, "train") for number in np.asarray(batch.sample_id)[batch.valid].tolist()
    ]
    assert seen == [number for number in range(index.num_frames) if number != 5]
    assert loader.replaced()["toy0", "checksum"] >= 1
    with pytest.raises(InputError, match=r"step \d: the image cannot be read any more: its bytes have changed"):
        list(Loader(config | {"faults": {}}, image_size=SIZE).epoch(8, "train"))


def test_files_that_are_gone_or_cut(data, tmp_path):
    load(data, tmp_path / "cache")
    shards(data)[4].write_bytes(b"")
    with pytest.raises(InputError, match=r"00004, episode 0: the file ends early: it should have 3 episodes"):
        load(data, tmp_path / "cache")
    shards(data)[4].unlink()
    with pytest.raises(InputError, match="00004 is missing, a shard of the split 'train'"):
        load(data, tmp_path / "cache")
    shards(data)[4].with_name(shards(data)[3].name.replace("00003", "00004")).symlink_to("nowhere")
    with pytest.raises(InputError, match="00004 is missing"):
        load(data, tmp_path / "cache")


# --- records that dataset_info.json does not list ---------------------------------------------------------------------


def test_records_beyond_shard_lengths(data, tmp_path, capsys):
    file = shards(data)[4]
    change_info(data, [3, 3, 3, 3, 1, 3, 3, 3, 1])
    with pytest.raises(InputError, match=f"file {file}, episode 1: dataset_info.json lists 1 episodes in the file"):
        load(data, tmp_path / "cache")
    index = load(data, tmp_path / "cache", SKIP)
    assert index.skipped == {"unlisted": 2} and (index.num_episodes, index.num_read) == (23, 25)
    assert load(data, tmp_path / "cache", split="train[:12]").num_read == 12  # a part that ends before those episodes
    change_info(data, [3] * 8 + [1])
    assert load(data, tmp_path / "cache").num_read == 25
    file.write_bytes(file.read_bytes() + b"\0" * 40)  # no records, but more bytes than there should be
    with pytest.raises(InputError, match=rf"file {file}, episode 3: .* this is one more"):
        load(data, tmp_path / "cache")
    assert load(data, tmp_path / "cache", SKIP).skipped == {"unlisted": 1}


def test_shard_lengths_beyond_the_records(data, tmp_path):
    change_info(data, [3, 3, 3, 3, 4, 3, 3, 3, 1])
    with pytest.raises(InputError, match=r"00004, episode 3: the file ends early: it should have 4 episodes"):
        load(data, tmp_path / "cache")
    assert load(data, tmp_path / "cache", SKIP).skipped == {"truncated": 1}


def test_files_that_are_not_listed(data, tmp_path, capsys):
    """TFDS does not read them either: one extra file, and one file that should be empty."""
    load(data, tmp_path / "cache")
    assert "lists no episodes" not in capsys.readouterr().err
    change_info(data, [3] * 7 + [0])
    assert load(data, tmp_path / "cache").num_read == 21
    names = "toy-train.tfrecord-00007, toy-train.tfrecord-00008"
    assert f"dataset_info.json lists no episodes in {names}, which is not read" in capsys.readouterr().err


# --- the program changes ----------------------------------------------------------------------------------------------


def halved(episode, *_):
    """A known name with another meaning."""
    return episode | {"action": episode["action"] * np.float32(0.5)}


def test_another_meaning_of_an_operation(data, tmp_path, monkeypatch, capsys):
    spec = dataclasses.replace(SPEC, operations=(*SPEC.operations, ("scale", *(1,) * 7)))
    before = load(data, tmp_path / "cache", spec=spec)
    monkeypatch.setitem(OPERATIONS, "scale", halved)
    index = load(data, tmp_path / "cache", spec=spec)
    assert "indexed again: the code of its operations changed" in capsys.readouterr().err
    np.testing.assert_array_equal(index.arrays["action"], before.arrays["action"] * np.float32(0.5))


def test_digest_of_operations(monkeypatch, tmp_path):
    """It depends on the functions and constants that an operation uses, not on its comments and docstrings."""
    axes = (("to_euler", "quaternion"),)
    digest = operations.code_digest(axes)
    assert digest == operations.code_digest(axes) != operations.code_digest((("invert_gripper",),))
    with monkeypatch.context() as patch:
        patch.setattr(operations, "ROTATIONS", operations.ROTATIONS | {"euler": 4})
        assert operations.code_digest(axes) != digest
    with monkeypatch.context() as patch:
        patch.setattr(operations, "_unit", halved)  # what read_rotation calls
        assert operations.code_digest(axes) != digest
    digests = []
    for number, body in enumerate(("return episode", '"""Words."""  # and more\n    return episode', "return {}")):
        file = tmp_path / f"{number}.py"
        file.write_text(f"def scale(episode, *_):\n    {body}\n\n\ndef get():\n    return scale\n")
        monkeypatch.setitem(OPERATIONS, "scale", call_function(file, "get"))
        digests.append(operations.code_digest((("scale",),)))
    assert digests[0] == digests[1] != digests[2]


# --- the cache is damaged, or of another version ----------------------------------------------------------------------


def test_a_damaged_index_is_made_anew(data, tmp_path, capsys):
    """A file of the index is truncated, zeroed, missing or a directory; meta.json may also have other valid content."""
    cache = tmp_path / "cache"
    expected = load(data, tmp_path / "fresh")
    load(data, cache)
    (folder,) = cache.iterdir()

    def check():
        capsys.readouterr()
        assert_same(load(data, cache), expected)
        assert "dataset 'toy' is indexed again: " in capsys.readouterr().err
        assert list(cache.iterdir()) == [folder]

    assert len(list(folder.iterdir())) == 14
    for name in ("meta.json", "action.bin", "episode_record.bin"):
        file = folder / name
        for content in (file.read_bytes()[:-1], b"", bytes(file.stat().st_size)):
            file.write_bytes(content)
            check()
        file.unlink()
        check()
        file.unlink()
        file.mkdir()
        check()
    meta = json.loads((folder / "meta.json").read_text())
    for text in (
        *("{", "[]", "{}", "null", "\0"),
        *(json.dumps({k: v for k, v in meta.items() if k != key}) for key in meta),
        json.dumps(meta | {"read": 7}),
    ):
        (folder / "meta.json").write_text(text)
        check()
    shutil.rmtree(folder)
    folder.write_text("a file in its place")
    check()


def test_an_index_of_another_version(data, tmp_path, capsys):
    load(data, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*/meta.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 2}))
    load(data, tmp_path / "cache")
    assert "indexed again: another version of this program made its index" in capsys.readouterr().err


# --- the cache cannot be written --------------------------------------------------------------------------------------


def test_a_cache_that_cannot_be_written(data, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "cache", Path("/proc/cache")):
        with pytest.raises(InputError, match=rf"'toy' cannot be kept in {folder} .*: set data.cache_dir to a folder"):
            load(data, folder)
    assert (tmp_path / "file").read_text() == ""


def test_a_full_disk(data, tmp_path):
    """No partial file is left, and a rerun succeeds once there is room."""
    message = rf"cannot be kept in {tmp_path}/cache .*and has room"
    with no_room(1000), pytest.raises(InputError, match=message):
        load(data, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    assert load(data, tmp_path / "cache").num_read == 25


def test_home_folders(data, tmp_path, monkeypatch):
    """~ is the user's home; without one, the message says what to set. A URL is not a folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    config = data_config(Path("~/data/toy/1.0.0"), cache_dir=Path("~/kept"))
    assert Loader(config, image_size=SIZE).num_frames() and (tmp_path / "kept").is_dir()
    assert Loader(config | {"cache_dir": ""}, image_size=SIZE).num_frames()
    assert (tmp_path / ".cache" / "spatialvla_jax").is_dir()
    monkeypatch.chdir(tmp_path)
    for change, sentence in {
        ("cache_dir", "~nobody-of-this-name/x"): r"data.cache_dir ~nobody-of-this-name/x cannot be expanded",
        ("cache_dir", "ftp://host/cache"): r"data.cache_dir ftp://host/cache is not a supported path",
        ("statistics", "ftp://host/stats.json"): r"data.statistics ftp://host/stats.json is not a supported path",
        ("packed", "ftp://host/toy.pack"): r"data.packed ftp://host/toy.pack is not a supported path",
        ("datasets", "ftp://host/toy"): r"dataset 'toy0' in data.datasets: path ftp://host/toy is not a supported path",
        ("prompt", "https://host/t.model"): r"data.prompt.model https://host/t.model is not a supported path",
    }.items():
        value = change[1]
        if change[0] == "datasets":
            value = [config["datasets"][0] | {"path": value}]
        if change[0] == "prompt":
            value = config["prompt"] | {"model": value}
        with pytest.raises(InputError, match=sentence):
            Loader(config | {change[0]: value}, image_size=SIZE)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".cache", "data", "kept"]
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # neither HOME nor an entry in /etc/passwd
    with pytest.raises(InputError, match=r"default of config key data\.cache_dir ~/.cache/spatialvla_jax cannot"):
        Loader(config | {"cache_dir": "", "datasets": [config["datasets"][0] | {"path": str(data)}]}, image_size=SIZE)


# --- statistics and packed files of other data ------------------------------------------------------------------------


@pytest.fixture
def stats(data, tmp_path) -> Path:
    config = DataConfig.from_config(data_config(data, cache_dir=tmp_path / "other"))
    compute_stats(config, (), str(tmp_path / "stats.json"))
    return tmp_path / "stats.json"


def test_statistics_of_other_data(originals, data, stats, tmp_path, capsys):
    config = data_config(data, cache_dir=tmp_path / "cache", statistics=str(stats))
    assert Loader(config, image_size=SIZE).statistics == json.loads(stats.read_text())["statistics"]
    assert "of other data" not in capsys.readouterr().err
    part = Loader(config | {"split": "train[:12]"}, image_size=SIZE)
    assert "toy0' in" in (told := capsys.readouterr().err) and "num_trajectories is 25, and here it is 12" in told
    assert part.statistics == json.loads(stats.read_text())["statistics"]
    rebuilt(data, originals[1])
    Loader(config, image_size=SIZE)
    assert f"statistics of dataset 'toy0' in {stats} are of other data: min is [" in capsys.readouterr().err


def test_statistics_of_another_spec(data, stats, tmp_path, capsys):
    """Raises before anything is indexed. Changes that do not affect actions pass, and an old file only warns."""
    cache = tmp_path / "cache"
    config = data_config(data, cache_dir=cache, statistics=str(stats))
    (entry,) = config["datasets"]

    def load_with(**changes):
        spec = dataclasses.asdict(SPEC) | changes
        return Loader(config | {"datasets": [entry | {"spec": spec}]}, image_size=SIZE)

    scaled = (*SPEC.operations, ("scale", *(1000,) * 3, *(1,) * 4))
    for changes in ({"operations": scaled}, {"action": ("action[:6]", 1.0)}):
        with pytest.raises(InputError, match=rf"'toy0' in {stats} were made with the {next(iter(changes))} \["):
            load_with(**changes)
    assert not cache.exists()
    load_with(robot="another", depth=None, depth_unit=1.0)
    assert "of other data" not in capsys.readouterr().err
    old = {key: value for key, value in json.loads(stats.read_text()).items() if key != "specs"}
    stats.write_text(json.dumps(old))
    assert load_with(operations=scaled).statistics == old["statistics"]
    assert "of other data: min is [" in capsys.readouterr().err


def test_a_pack_whose_source_changed(originals, data, tmp_path, capsys):
    config = data_config(data, cache_dir=tmp_path / "cache")
    out = tmp_path / "toy.pack"
    write_pack(Loader(config, image_size=SIZE), out, ["train"])
    packed = {"packed": str(out)}
    frames = Loader(packed, image_size=SIZE).num_frames()
    assert "changed" not in capsys.readouterr().err
    rebuilt(data, originals[1])
    Loader(packed, image_size=SIZE)
    told = f"dataset 'toy0' changed since it was packed in {out} (toy-train.tfrecord-00000, "
    assert told in capsys.readouterr().err
    shutil.rmtree(data)
    assert Loader(packed, image_size=SIZE).num_frames() == frames and not capsys.readouterr().err
