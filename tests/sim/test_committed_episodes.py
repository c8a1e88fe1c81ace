"""The committed episodes are complete, plausible and geometrically right."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers.record_geometry import unproject

DIRECTORY = Path(__file__).parents[2] / "data/libero_spatial_demo/1.0.0"


@pytest.fixture(scope="module")
def episodes() -> dict[str, list[tuple[dict, list[dict]]]]:
    """split -> [(metadata, steps)] as numpy."""
    builder = tfds.builder_from_directory(str(DIRECTORY))
    return {
        split: [
            (
                {key: value.numpy() for key, value in episode["episode_metadata"].items()},
                list(episode["steps"].as_numpy_iterator()),
            )
            for episode in builder.as_dataset(split)
        ]
        for split in builder.info.splits
    }


def all_episodes(episodes):
    return [pair for split in episodes.values() for pair in split]


def test_size_on_disk():
    sizes = [path.stat().st_size for path in DIRECTORY.iterdir()]
    assert sum(sizes) <= 15_000_000
    assert max(sizes) < 2 * 2**20


def test_enough_episodes_over_several_tasks(episodes):
    assert set(episodes) == {"train", "val"}
    assert len(episodes["train"]) >= 20 and len(episodes["val"]) >= 4
    tasks = {split: {int(metadata["task_id"]) for metadata, _ in pairs} for split, pairs in episodes.items()}
    assert len(tasks["train"]) >= 4 and tasks["val"] <= tasks["train"]


def test_val_episodes_start_elsewhere(episodes):
    starts = {
        split: {(int(metadata["task_id"]), int(metadata["init_state"])) for metadata, _ in pairs}
        for split, pairs in episodes.items()
    }
    assert not starts["train"] & starts["val"]
    seeds = [int(metadata["seed"]) for metadata, _ in all_episodes(episodes)]
    assert len(set(seeds)) == len(seeds)


def test_every_step_is_whole(episodes):
    for metadata, steps in all_episodes(episodes):
        assert metadata["success"] and 40 <= len(steps) <= 130
        assert len({step["language_instruction"] for step in steps}) == 1
        assert steps[0]["language_instruction"].decode().replace(" ", "_") == metadata["task_name"].decode()
        assert [step["is_first"] for step in steps] == [True] + [False] * (len(steps) - 1)
        for flag in ("is_last", "is_terminal", "reward"):
            assert [bool(step[flag]) for step in steps] == [False] * (len(steps) - 1) + [True]
        for step in steps:
            seen = step["observation"]
            assert seen["image"].shape == (128, 128, 3) and seen["image"].dtype == np.uint8
            assert seen["depth"].shape == (128, 128, 1) and seen["depth"].dtype == np.uint16
            assert seen["intrinsics"].shape == (3, 3) and seen["state"].shape == (8,)
            assert seen["depth"].min() > 300 and seen["depth"].max() < 5000, "millimetres of a tabletop scene"
            assert 30 < seen["image"].mean() < 220 and seen["image"].std() > 20


def test_actions_move_every_dimension(episodes):
    actions = np.stack([step["action"] for _, steps in episodes["train"] for step in steps])
    assert actions.dtype == np.float32 and np.abs(actions).max() <= 1
    assert set(actions[:, 6]) == {-1.0, 1.0}
    assert (actions[:, :3].std(0) > 0.3).all()
    assert (actions[:, 3:6].std(0) > [0.02, 0.02, 0.1]).all(), "rotations carry information, yaw above all"
    still = np.abs(actions[:, :6]).max(1) < 0.02
    assert still.mean() < 0.1


def test_the_state_answers_the_action(episodes):
    """Commanded and measured motion of the end effector agree in sign and roughly in direction."""
    for _, steps in all_episodes(episodes):
        moved = np.diff([step["observation"]["state"][:3] for step in steps], axis=0)[2:]
        sent = np.stack([step["action"][:3] for step in steps])[1:-2]
        assert np.corrcoef(moved.ravel(), sent.ravel())[0, 1] > 0.7


def test_depth_intrinsics_and_extrinsics_fit_together(episodes):
    """Unprojected, most of the picture's lower half is the table top, 0.90 m high, and nothing lies below it."""
    for metadata, steps in all_episodes(episodes):
        height = unproject(steps[0], metadata["extrinsics"])[64:, :, 2]
        assert np.mean(np.abs(height - 0.90) < 0.006) > 0.5
        assert height.min() > 0.88


def test_the_picture_is_upright_and_not_mirrored(episodes):
    """The depth map shows the hand where the state says it is, and the arm on the plate's +y side."""
    for metadata, steps in all_episodes(episodes):
        clouds = [unproject(step, metadata["extrinsics"]) for step in steps]
        for step, points in zip(steps, clouds, strict=True):
            hand = np.add(step["observation"]["state"][:3], [0, 0, 0.1])  # from between the fingertips up into the hand
            assert (np.linalg.norm(points - hand, axis=-1) < 0.1).sum() > 10
        first, last = (steps[i]["observation"]["depth"][..., 0].astype(int) for i in (0, -1))
        assert np.median(clouds[-1][last < first - 50][:, 1]) > 0.05
