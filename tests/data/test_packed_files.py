"""Several packed files as one training set: `data.packed = {FILE: weight}`."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.batches import assert_equal
from helpers.streams import take

from spatialvla_jax.config import check_resumable, default_config, load_config
from spatialvla_jax.data import Loader, pack_recording
from spatialvla_jax.data.pack import packed_digest, write_pack
from spatialvla_jax.data.pack_recording import write_packed
from spatialvla_jax.errors import InputError

SIZE = 8


def write(out: Path, lengths: dict[str, tuple[int, ...]], seed: int, scale: float = 1.0, name: str = "toy") -> Path:
    """A packed recording; `scale` multiplies its motions, which are uniform in [-1, 1]."""
    rng = np.random.default_rng(seed)
    known, episodes = [], []
    for split, of_split in lengths.items():
        for number, length in enumerate(of_split):
            actions = np.append(scale * rng.uniform(-1, 1, (length, 6)), np.ones((length, 1)), axis=1)
            known.append((split, f"task {number % 2}", actions.astype(np.float32)))
            steps = [
                {
                    "image": rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8),
                    "depth": rng.integers(300, 5000, (SIZE, SIZE), dtype=np.uint16),
                    "intrinsics": np.array([[9, 0, 4], [0, 9, 4], [0, 0, 1]], np.float32),
                    "target": np.zeros(3, np.float32),
                    "hand": np.zeros(4, np.float32),
                    "extrinsics": np.eye(4, dtype=np.float32),
                }
                for _ in range(length)
            ]
            episodes.append({"steps": [{"observation": step} for step in steps]})
    write_packed(out, known, episodes, name=name, image_size=SIZE)
    return out


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Twenty frames with a validation split, and ten frames added later."""
    folder = tmp_path_factory.mktemp("packed")
    first = write(folder / "first.pack", {"train": (12, 8), "val": (4,)}, 0)
    return first, write(folder / "added.pack", {"train": (7, 3)}, 1)


def load(packed, size=SIZE, **changes):
    config = default_config().data.to_dict() | {"packed": packed} | changes
    return Loader(config, image_size=size, action_chunk=2, depth=True)


def test_frames_come_from_the_files_by_their_weights(files):
    first, added = files
    both = load({str(first): 1.0, str(added): 3.0})
    assert both.num_frames() == 30 and both.mixture.shares == pytest.approx([20 / 50, 30 / 50], abs=1e-4)
    for start, alone in ((0, load(str(first))), (20, load(str(added)))):
        ids = np.arange(alone.num_frames())
        mine, theirs = both.frames(start + ids), alone.frames(ids)
        for key in ("image", "depth", "intrinsics", "prompt_ids", "action_mask"):
            np.testing.assert_array_equal(getattr(mine, key), getattr(theirs, key))
    drawn = np.concatenate([batch.sample_id for batch in take(both.batches(10, seed=2), 100)])
    assert np.mean(drawn >= 20) == pytest.approx(0.6, abs=0.05)
    assert sorted(set(drawn)) == list(range(30))
    assert load({str(first): 1.0, str(added): 3.0}, balance=False).mixture.shares == pytest.approx([1 / 4, 3 / 4], 1e-3)


def test_the_order_is_the_same_after_a_resume_and_in_several_processes(files):
    both = load(dict.fromkeys(map(str, files), 1.0))
    whole = take(both.batches(6, seed=1), 5)
    assert_equal(next(both.batches(6, seed=1, start_step=4)), whole[4])
    parts = [next(both.batches(6, seed=1, start_step=2, process_index=i, process_count=2)) for i in (0, 1)]
    np.testing.assert_array_equal(np.concatenate([part.image for part in parts]), whole[2].image)


def test_the_first_file_says_what_actions_mean(files):
    """Both files hold one dataset, which has the first file's statistics, tokenizer and validation split."""
    both, first = load(dict.fromkeys(map(str, files), 1.0)), load(str(files[0]))
    assert both.names == ("toy",) and both.statistics == first.statistics and both.intrinsics == first.intrinsics
    assert both.tokenizer.to_bytes() == first.tokenizer.to_bytes()
    assert set(np.concatenate([batch.dataset_id for batch in take(both.batches(10), 5)])) == {0}
    for mine, theirs in zip(both.epoch(3, "val"), first.epoch(3, "val"), strict=True):
        assert_equal(mine, theirs)
    assert [row["episodes"] for row in both.table()] == [2, 2]


def test_one_file_with_a_weight_is_the_file(files):
    for one, other in zip(*(take(load(p).batches(4), 3) for p in (str(files[0]), {str(files[0]): 7.0})), strict=True):
        assert_equal(one, other)
    assert packed_digest({str(files[0]): 7.0}) != packed_digest(files[0])
    assert packed_digest({str(files[0]): 7.0}) == packed_digest({str(files[0]): 7})


def test_what_was_packed_from_several_is_several(files, tmp_path):
    both = load({str(files[0]): 1.0, str(files[1]): 3.0})
    write_pack(both, tmp_path / "both.pack", ("train",))
    again = load(str(tmp_path / "both.pack"))
    assert again.names == ("toy",) and again.statistics == both.statistics and again.weights == (1.0, 3.0)
    for one, other in zip(take(again.batches(8), 3), take(both.batches(8), 3), strict=True):
        assert_equal(one, other)


def test_different_datasets_keep_their_own_statistics(files, tmp_path):
    other = write(tmp_path / "other.pack", {"train": (5,), "val": (2,)}, 3, name="other")
    both = load({str(files[0]): 1.0, str(other): 1.0})
    assert both.names == ("toy", "other") and both.statistics["other"] == load(str(other)).statistics["other"]
    with pytest.raises(InputError, match=r"data.drop names 'libero', which is not in the mixture: that has toy, other"):
        load({str(files[0]): 1.0, str(other): 1.0}, drop={"libero": 0.5})
    gone = load(dict.fromkeys((*map(str, files), str(other)), 1.0), drop={"toy": 0.5})
    assert {*next(gone.batches(6, start_step=9, total_steps=10)).dataset_id} == {1}


def test_files_that_do_not_go_together(files, tmp_path, monkeypatch, capsys):
    first, added = map(str, files)
    with pytest.raises(InputError, match=r"added.pack has no split 'val': it has train$"):
        load({first: 1.0, added: 1.0}, split="val")
    with pytest.raises(InputError, match=r"added.pack has no split 'test': it has train$"):
        load({first: 1.0, added: 1.0}).num_frames("test")
    with pytest.raises(InputError, match=r"first.pack holds images of 8 px, but the model's are 16 px"):
        load({first: 1.0, added: 1.0}, size=16)
    load({first: 1.0, str(write(tmp_path / "fast.pack", {"train": (9,)}, 2, scale=4.0)): 1.0})
    warning = " ".join(capsys.readouterr().err.split())
    assert "the x and y and z and roll and pitch and yaw of its actions in" in warning
    spec = pack_recording.CATALOGUE["libero"]
    monkeypatch.setitem(pack_recording.CATALOGUE, "libero", replace(spec, depth_unit=0.0002))
    other = str(write(tmp_path / "other.pack", {"train": (4,)}, 3))
    with pytest.raises(InputError, match=r"first\.pack and .*other.pack both hold .*depth_unit 0.001 and 0.0002"):
        load({first: 1.0, other: 1.0})


def test_a_file_is_not_named_twice(files, tmp_path):
    link, first = tmp_path / "link.pack", str(files[0])
    link.symlink_to(first)
    for other in (str(link), f"{files[0].parent}/./first.pack", os.path.relpath(first)):
        with pytest.raises(InputError, match=r"data.packed names one file twice, as .*first.pack and "):
            load({first: 1.0, other: 2.0})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", r"data.packed=\{\} names no file"),
        ("{'': 1}", "has a key that names no file"),
        ("{1: 2}", "has a key that names no file"),
        ("{'a.pack': 0}", "gives a.pack the weight 0, which must be a number above 0"),
        ("{'a.pack': True}", "gives a.pack the weight True"),
        ("{'a.pack': 'many'}", "gives a.pack the weight 'many'"),
        ("{'a.pack': 1e999}", "gives a.pack the weight inf"),
        ("{'a.pack': 1e308}", "gives a.pack the weight 1e\\+308, which must be a number above 0, at most 3.4e\\+38"),
        ("{'a.pack': {}}", r"gives a.pack the weight \{\}"),
        ("{'a.pack', 'b.pack'}", "is of type set, but a string or a dict is expected"),
        ("{'a.pack'", "cannot be read as a dict"),
    ],
)
def test_bad_values_are_one_sentence(text, message):
    with pytest.raises(InputError, match=message):
        load_config("demo", {"data.packed": text})


def test_weights_belong_to_a_run_and_paths_do_not(tmp_path):
    def config(packed: str):
        return load_config("demo", {"data.packed": packed})

    before = json.loads(json.dumps(config("{'a.pack': 1, 'b.pack': 2}").to_dict()))
    check_resumable(before, config("{'c.pack': 1, 'd.pack': 2}"), tmp_path)
    for other in ("{'a.pack': 1, 'b.pack': 3}", "a.pack"):
        with pytest.raises(InputError, match=r"holds a run with data\.packed"):
            check_resumable(before, config(other), tmp_path)
    assert config("12").data.packed == "12"


def test_a_file_that_was_made_from_a_bucket_needs_no_bucket(files, tmp_path, monkeypatch):
    """It may be read without a network, without credentials, or after the bucket is gone."""
    loader = load(str(files[0]))
    own, place = loader.indexes, {"place": "gs://gone/toy/1.0.0", "shards": [["a", 1, 2, 0, 0, 0]]}
    made = {split: tuple(replace(index, made_from=place) for index in own(split)) for split in ("train", "val")}
    monkeypatch.setattr(loader, "indexes", lambda split="train": made[split])
    write_pack(loader, tmp_path / "made.pack", ("train", "val"))
    monkeypatch.setattr("spatialvla_jax.utils.storage.filesystem", lambda path: pytest.fail(f"{path} is looked for"))
    again = load(str(tmp_path / "made.pack"))
    assert again.num_frames("val") == 4 and again.versions == {"toy": "1.0.0"}
