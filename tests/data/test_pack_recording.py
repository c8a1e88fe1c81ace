"""Recorded episodes in a packed file: the loader returns what was recorded."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.batches import assert_equal

from spatialvla_jax.actions.normalization import normalize
from spatialvla_jax.config import default_config
from spatialvla_jax.data import Loader, pack
from spatialvla_jax.data.pack import write_pack
from spatialvla_jax.data.pack_recording import check_file, write_packed
from spatialvla_jax.errors import InputError

SIZE, LENGTHS = 8, {"train": (5, 3, 4), "val": (2,)}


def episodes():
    rng = np.random.default_rng(0)
    for split, lengths in LENGTHS.items():
        for number, length in enumerate(lengths):
            steps = [
                {
                    "observation": {
                        "image": rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8),
                        "depth": rng.integers(300, 5000, (SIZE, SIZE), dtype=np.uint16),
                        "intrinsics": np.array([[9, 0, 4], [0, 9, 4], [0, 0, 1]], np.float32) + number,
                        "target": rng.uniform(-1, 1, 3).astype(np.float32),
                        "hand": rng.uniform(-1, 1, 4).astype(np.float32),
                        "extrinsics": np.eye(4, dtype=np.float32) + number,
                    },
                    "action": np.append(rng.uniform(-1, 1, 6), (-1, 1)[step % 2]).astype(np.float32),
                    "language_instruction": f"task {number % 2}",
                }
                for step in range(length)
            ]
            yield split, {"steps": steps}


def write(out: Path, every: int = 1):
    """The loader of a packed file with these episodes, and what writing it returned."""
    made = list(episodes())
    known = [
        (split, e["steps"][0]["language_instruction"], np.stack([step["action"] for step in e["steps"]]))
        for split, e in made
    ]
    pictured = ({"steps": episode["steps"][::every]} for _, episode in made)
    result = write_packed(out, known, pictured, name="toy", image_size=SIZE, every=every)
    config = default_config().data.to_dict() | {"packed": str(out)}
    return Loader(config, image_size=SIZE, action_chunk=2, depth=True), result


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "deep" / "set.pack"
    loader, result = write(out)
    assert result["frames"] == {"train": 12, "val": 2} and result["bytes"] == out.stat().st_size
    assert list(out.parent.iterdir()) == [out], "nothing else is left"
    return loader


def test_with_pictures_of_some_steps_chunks_hold_the_actions_of_all(loader, tmp_path: Path) -> None:
    some, result = write(tmp_path / "set.pack", every=2)
    assert result["frames"] == {"train": 3 + 2 + 2, "val": 1}
    pictured = np.array([0, 2, 4, 5, 7, 8, 10])  # of steps 0–4, 5–7 and 8–11 of the three episodes
    expected, got = loader.frames(pictured), some.frames(np.arange(7))
    assert_equal(got, replace(expected, sample_id=got.sample_id))
    np.testing.assert_array_equal(some.actions(), loader.actions())
    assert some.statistics == loader.statistics
    for got, expected in zip(some.episodes("train"), loader.episodes("train"), strict=True):
        assert len(got.frames.image) == -(-len(expected.frames.image) // 2)
        np.testing.assert_array_equal(expected.previous_action[1:], expected.frames.actions[:-1, 0])
        np.testing.assert_array_equal(got.previous_action, expected.previous_action[::2])
        np.testing.assert_array_equal(expected.steps, np.arange(len(expected.actions)))
        np.testing.assert_array_equal(got.steps, expected.steps[::2])
        np.testing.assert_array_equal(got.actions, expected.actions[: got.steps[-1] + 1])
    assert sorted(next(some.batches(7, seed=1)).sample_id) == list(range(7))


def test_frames_come_back_as_they_were(loader) -> None:
    recorded = [step for split, episode in episodes() if split == "train" for step in episode["steps"]]
    batch = loader.frames(np.arange(12))
    for key, dtype in (("image", np.uint8), ("intrinsics", np.float32)):
        expected = np.stack([step["observation"][key] for step in recorded])
        np.testing.assert_array_equal(getattr(batch, key), expected)
        assert getattr(batch, key).dtype == dtype
    for key in ("target", "hand", "extrinsics"):
        expected = np.stack([step["observation"][key] for step in recorded])
        np.testing.assert_array_equal(loader.indexes()[0].arrays[key], expected)
    metres = np.stack([step["observation"]["depth"] for step in recorded]) * np.float32(0.001)
    np.testing.assert_array_equal(batch.depth, metres)


def test_actions_are_canonical_and_end_with_their_episode(loader) -> None:
    raw = np.stack([step["action"] for split, e in episodes() if split == "train" for step in e["steps"]])
    canonical = np.concatenate([raw[:, :6], (1 - raw[:, 6:]) / 2], axis=1)
    batch = loader.frames(np.arange(12))
    np.testing.assert_allclose(batch.actions[:, 0], normalize(canonical, loader.statistics["toy"]["action"]), atol=1e-6)
    assert set(batch.actions[:, 0, 6]) == {0.0, 1.0}
    assert np.flatnonzero(~batch.action_mask[:, 1]).tolist() == [4, 7, 11]


def test_splits_instructions_and_prompts(loader) -> None:
    told = [episode.instruction for episode in loader.episodes("train")]
    assert told == ["task 0", "task 1", "task 0"]
    assert [episode.dataset for episode in loader.episodes("val")] == ["toy"]
    ids = loader.frames(np.array([0, 5, 8])).prompt_ids
    assert np.array_equal(ids[0], ids[2]) and not np.array_equal(ids[0], ids[1])
    assert "task 1" in loader.tokenizer.decode(ids[1][loader.frames(np.array([5])).prompt_mask[0]])


def test_target_and_hand_come_if_asked_for(loader, tmp_path: Path, monkeypatch) -> None:
    frames = np.array([7, 2, 11])
    assert loader.frames(frames).target is None
    asked = Loader(loader.config, image_size=SIZE, action_chunk=2, depth=True, recorded=("target", "hand"))
    recorded = [step for split, episode in episodes() if split == "train" for step in episode["steps"]]
    expected = np.stack([recorded[frame]["observation"]["target"] for frame in frames])
    np.testing.assert_array_equal(asked.frames(frames).target, expected, strict=True)
    expected = np.stack([recorded[frame]["observation"]["hand"] for frame in frames])
    np.testing.assert_array_equal(asked.frames(frames).hand, expected, strict=True)
    monkeypatch.setattr(pack, "RECORDED", {})
    write_pack(loader, tmp_path / "old.pack", ("train",))  # as in files of earlier versions
    old = {"packed": str(tmp_path / "old.pack")}
    Loader(old, image_size=SIZE, depth=True)
    with pytest.raises(InputError, match=r"^\S+old\.pack has no positions of the target and hand, which loss\.target"):
        Loader(old, image_size=SIZE, depth=True, recorded=("target", "hand"))


def test_what_is_packed_again_keeps_the_positions_and_the_camera(loader, tmp_path: Path) -> None:
    write_pack(loader, tmp_path / "again.pack", tuple(LENGTHS))
    again = Loader({"packed": str(tmp_path / "again.pack")}, image_size=SIZE, depth=True, recorded=("target", "hand"))
    for split in LENGTHS:
        recorded = [step["observation"] for of, episode in episodes() if of == split for step in episode["steps"]]
        (index,) = again.indexes(split)
        for key in ("target", "hand", "extrinsics"):
            np.testing.assert_array_equal(index.arrays[key], np.stack([seen[key] for seen in recorded]), strict=True)
        (batch,) = again.epoch(len(recorded), split)
        np.testing.assert_array_equal(batch.target, index.arrays["target"], strict=True)
        np.testing.assert_array_equal(batch.hand, index.arrays["hand"], strict=True)


def test_a_file_that_the_pictures_need_is_named(tmp_path: Path) -> None:
    def rendered():
        yield next(episodes())[1]
        (tmp_path / "robot.xml").read_text()

    known = [("train", "task", np.zeros((5, 7), np.float32))] * 2
    with pytest.raises(InputError, match=r"set\.pack cannot be written: /.*robot\.xml: No such file or directory$"):
        write_packed(tmp_path / "set.pack", known, rendered(), name="toy", image_size=SIZE)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_exists_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "set.pack").touch()
    with pytest.raises(InputError, match="already exists"):
        check_file(tmp_path / "set.pack")
