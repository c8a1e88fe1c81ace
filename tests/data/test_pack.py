"""A packed file gives bit for bit the stream that it was made from, without TensorFlow."""

import json
import shutil
import subprocess
import sys
import zlib
from dataclasses import asdict, replace

import jax
import numpy as np
import pytest
from helpers.batches import assert_equal
from helpers.streams import take
from helpers.toy_rlds import data_config, make_episodes, make_rlds

from spatialvla_jax.cli import main
from spatialvla_jax.config import check_resumable, load_config
from spatialvla_jax.data import Loader, open_data
from spatialvla_jax.data.oxe import CATALOGUE
from spatialvla_jax.data.pack import ALIGNMENT, write_pack
from spatialvla_jax.errors import InputError

SIZE = 16
# Frames without a camera of their own, and depth in another unit.
OTHER = replace(
    CATALOGUE["libero"], intrinsics=None, depth_unit=0.0002, default_intrinsics=((51.3, 0, 30), (0, 49, 20))
)
OTHER = replace(OTHER, default_intrinsics=(*OTHER.default_intrinsics, (0, 0, 1)), default_intrinsics_size=(48, 64))

BLOCKED = """
import sys
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec
blocked = {"tensorflow", "tensorflow_datasets"}
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] in blocked else find_spec(name, *rest)
"""


@pytest.fixture(scope="module")
def data(rlds, tmp_path_factory):
    """The config of two datasets that differ in cameras, depth units and stored sizes."""
    folder = tmp_path_factory.mktemp("pack")
    other = make_rlds(
        folder,
        {"train": make_episodes(4, seed=5, size=(32, 40)), "val": make_episodes(2, seed=6, size=(20, 40))},
        name="other",
    )
    config = data_config(rlds, other, cache_dir=folder)
    config["datasets"][1] |= {"spec": asdict(OTHER), "weight": 2.5}
    return config


@pytest.fixture(scope="module")
def stream(data):
    return Loader(data, image_size=SIZE, depth=True)


@pytest.fixture(scope="module")
def file(data, stream, tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "toy.pack"
    seen = []
    result = write_pack(stream, path, ("train", "val"), lambda *done: seen.append(done))
    frames = {split: stream.num_frames(split) for split in ("train", "val")}
    assert result == {"path": str(path), "bytes": path.stat().st_size, "frames": frames}
    assert seen[-1] == (sum(frames.values()),) * 2
    return path


def open_pack(file, data=None, *, size=SIZE, depth=True, **changes):
    config = {"prompt": data["prompt"] if data else {"length": 24}, "packed": str(file)} | changes
    return Loader(config, image_size=size, depth=depth)


@pytest.fixture(scope="module")
def packed(file):
    return open_pack(file)


@pytest.mark.parametrize("options", [{}, {"seed": 3, "start_step": 7}, {"process_index": 1, "process_count": 2}])
def test_batches_are_the_streams(stream, packed, options):
    for one, two in zip(take(stream.batches(12, **options), 4), take(packed.batches(12, **options), 4), strict=True):
        assert_equal(one, two)


def test_epochs_and_episodes_are_the_streams(stream, packed):
    for split in ("train", "val"):
        for one, two in zip(stream.epoch(7, split), packed.epoch(7, split), strict=True):
            assert_equal(one, two)
        for one, two in zip(stream.episodes(split), packed.episodes(split), strict=True):
            assert_equal(one, two)
        assert stream.num_frames(split) == packed.num_frames(split)
        np.testing.assert_array_equal(stream.actions(split), packed.actions(split))


def test_everything_else_is_the_streams(stream, packed):
    assert packed.names == stream.names and packed.weights == stream.weights == (1.0, 2.5)
    assert packed.table() == stream.table() and packed.statistics == stream.statistics
    assert packed.intrinsics == stream.intrinsics
    assert packed.versions == stream.versions == dict.fromkeys(stream.names, "1.0.0")
    assert packed.tokenizer.to_bytes() == stream.tokenizer.to_bytes()


def test_one_config_serves_both(data, file, stream):
    """A config may still name the original datasets. Other balance, weights or depth are checked."""
    both = open_pack(file, data, datasets=data["datasets"], balance=False, depth=False)
    streamed = Loader(data | {"balance": False}, image_size=SIZE)
    assert_equal(next(both.batches(8)), next(streamed.batches(8)))
    changed = [data["datasets"][0], data["datasets"][1] | {"weight": 1.0}]
    with pytest.raises(InputError, match=r"data.datasets names other data than .*toy.pack holds"):
        open_pack(file, data, datasets=changed)
    moved = [entry | {"path": "/elsewhere"} for entry in data["datasets"]]
    assert open_pack(file, data, datasets=moved).weights == stream.weights
    with pytest.raises(InputError, match=r"data.precomputed_depth names other data than .*toy.pack holds"):
        open_pack(file, data, precomputed_depth=True)


def test_a_run_may_go_on_from_the_file(config_file, tmp_path):
    """Its batches equal the stream's, so the config counts as the same."""
    before = json.loads(json.dumps(load_config(config_file).to_dict()))
    check_resumable(before, load_config(config_file, {"data.packed": "toy.pack"}), tmp_path)


def test_the_arrays_are_aligned(file):
    content = file.read_bytes()
    length = int.from_bytes(content[12:16], "little")
    header = json.loads(content[48 : 48 + length])
    places = [place for split in header["splits"].values() for meta in split for place in meta["arrays"].values()]
    assert all(offset % ALIGNMENT == 0 for offset, *_ in places) and len(content) % ALIGNMENT == 0
    assert {place[1] for place in places} == {"|u1", "<u2", "<f4", "<i4", "<i8"}


def test_reads_without_tensorflow(file, stream, tmp_path):
    """Gives the same bits where TensorFlow cannot be imported."""
    program = f"""{BLOCKED}
import itertools
import jax
import numpy as np
from spatialvla_jax.data import Loader

loader = Loader({{"packed": {str(file)!r}, "prompt": {{"length": 24}}}}, image_size={SIZE}, depth=True)
batches = list(itertools.islice(loader.batches(8, seed=1), 3)) + list(loader.epoch(8, "val"))
np.savez("batches.npz", *jax.tree.leaves(batches))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = [*take(stream.batches(8, seed=1), 3), *stream.epoch(8, "val")]
    with np.load(tmp_path / "batches.npz") as read:
        assert_equal([read[name] for name in read], jax.tree.leaves(expected))


def test_trains_without_tensorflow(config_file, tmp_path, capsys):
    """`data pack`, then steps without TensorFlow on the stream's samples, with the program of the fixture `trained`."""
    file, workdir = tmp_path / "toy.pack", tmp_path / "run"
    assert main(["data", "pack", "--config", str(config_file), "--out", str(file), "--split", "train"]) == 0
    done = capsys.readouterr().out.splitlines()[-1]
    assert done.startswith(f"wrote {file}: {file.stat().st_size:,} bytes, ") and done.endswith(" frames of train")
    argv = ["train", "--config", str(config_file), "--workdir", str(workdir)]
    argv += ["--config.train.steps=10", "--config.mesh.fsdp=4", "--config.mesh.data=2", f"--config.data.packed={file}"]
    program = f"{BLOCKED}\nfrom spatialvla_jax.cli import main\n\nsys.exit(main({argv!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    config = load_config(config_file)
    batches = take(open_data(config).batches(config.train.batch_size, seed=config.seed), 10)
    assert [row["batch"] for row in rows] == [f"{zlib.crc32(batch.sample_id.tobytes()):08x}" for batch in batches]
    assert all(np.isfinite(row["loss"]) for row in rows)


def damaged(file, tmp_path, change):
    path = tmp_path / "damaged.pack"
    shutil.copy(file, path)
    with open(path, "r+b") as stream:
        change(stream)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.truncate(20), "is not a packed dataset"),
        (lambda f: f.write(b"\x89PNG\r\n\x1a\n"), "is not a packed dataset"),
        (lambda f: (f.seek(8), f.write(b"\x07")), "is a packed dataset of version 7; this program reads 1"),
        (lambda f: (f.seek(100), f.write(b"\0")), "is damaged: the checksum of its header is wrong"),
        (lambda f: f.truncate(200), "is damaged: the checksum of its header is wrong"),
        (lambda f: f.truncate(50_000), "is damaged: it has 50,000 bytes and should have"),
        (lambda f: (f.seek(0, 2), f.write(b"more")), "is damaged: it has"),
    ],
)
def test_damaged_file(file, tmp_path, change, message):
    path = damaged(file, tmp_path, change)
    with pytest.raises(InputError, match=message) as error:
        open_pack(path)
    assert str(path) in str(error.value)


def test_file_that_does_not_fit(file, data, tmp_path):
    with pytest.raises(InputError, match="holds images of 16 px, but the model's are 32 px"):
        open_pack(file, size=32)
    with pytest.raises(InputError, match="has no split 'test': it has train, val"):
        open_pack(file).num_frames("test")
    with pytest.raises(InputError, match=r"nothing.pack cannot be read: No such file"):
        open_pack(tmp_path / "nothing.pack")
    flat = Loader(data, image_size=SIZE)
    write_pack(flat, tmp_path / "flat.pack", ("train",))
    assert_equal(next(open_pack(tmp_path / "flat.pack", depth=False).batches(4)), next(flat.batches(4)))
    with pytest.raises(InputError, match=r"flat.pack holds no depth, which the config requires"):
        open_pack(tmp_path / "flat.pack")


def test_disk_that_is_too_small(data, stream, file, tmp_path, monkeypatch):
    """Nothing is written, and the old file stays."""
    out = tmp_path / "toy.pack"
    out.write_text("old")
    free = file.stat().st_size - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free))
    with pytest.raises(InputError, match=rf"toy.pack needs {free + 1:,} bytes, but its disk has only {free:,} left"):
        write_pack(stream, out, ("train", "val"))
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]


def test_frame_that_cannot_be_read(tmp_path):
    """Refused even if the stream would skip the frame: a file without it would be another dataset."""
    episodes = make_episodes(3)
    episodes[1][1]["observation"]["image"] = b"\xff\xd8 not a picture"
    config = data_config(make_rlds(tmp_path, {"train": episodes}), cache_dir=tmp_path / "cache")
    for faults, message in (({}, "does not decode"), ({"policy": "skip", "limit": 9}, "1 frames of the split 'train'")):
        loader = Loader(config | {"faults": faults}, image_size=SIZE)
        with pytest.raises(InputError, match=message):
            write_pack(loader, tmp_path / "out" / "toy.pack", ("train",))
        assert not (tmp_path / "out").exists()
