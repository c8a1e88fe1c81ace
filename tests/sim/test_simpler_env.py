"""SimplerEnv's conventions compared with cases worked out by hand, and one ManiSkill environment where it renders."""

import re

import numpy as np
import pytest

from spatialvla_jax.data.oxe import CATALOGUE
from spatialvla_jax.errors import InputError
from spatialvla_jax.sim.simpler_env import UNNORM_KEYS, SimplerPolicy, area_resize
from spatialvla_jax.utils.dataset_keys import find_key

IMAGE = np.zeros((48, 64, 3), np.uint8)


class Script:
    """Alternates between chunks of two steps with the same seven numbers; the second row has its own gripper value."""

    def __init__(self, chunks):
        self.chunks, self.seen = iter(chunks), []

    def infer(self, observation):
        self.seen.append(observation)
        return {"actions": np.array(next(self.chunks), np.float32)}


def grippers(setup: str, values, **options) -> list[float]:
    """The gripper commands for a policy that returns `values`, in chunks of one step, so nothing is averaged."""
    model = SimplerPolicy(Script([[[0, 0, 0, 0, 0, 0, v]] for v in values]).infer, setup, **options)
    model.reset("go")
    return [float(model.step(IMAGE)[1]["gripper"][0]) for _ in values]


def test_the_executed_action_is_the_mean_that_favours_the_newest_chunk():
    old, new = [[1, 0, 0, 0, 0, 0, 1], [2, 4, 0, 0, 0, 0, 1]], [[5, 0, 6, 0, 0, 0, 0], [9, 9, 9, 0, 0, 0, 0]]
    last = [[0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]]
    policy = Script([old, new, last])
    model = SimplerPolicy(policy.infer, "widowx_bridge", action_scale=0.5)
    model.reset("put the carrot on the plate")
    first, second, third = (model.step(IMAGE, eef_pos=None) for _ in range(3))
    np.testing.assert_allclose(first[0]["world_vector"], [1, 0, 0])
    np.testing.assert_allclose(first[1]["world_vector"], [0.5, 0, 0])
    older = np.exp(-0.8) / (1 + np.exp(-0.8))  # 0.31
    np.testing.assert_allclose(second[0]["world_vector"], [5 - 3 * older, 4 * older, 6 - 6 * older])
    np.testing.assert_allclose(second[0]["open_gripper"], [older])
    assert second[1]["gripper"] == [-1.0] and second[1]["terminate_episode"] == [0.0]
    np.testing.assert_allclose(third[0]["world_vector"], np.multiply(older, [9, 9, 9]), err_msg="the first is used up")
    seen = policy.seen[0]
    assert seen["prompt"] == "put the carrot on the plate" and seen["unnorm_key"] == "bridge_orig/1.0.0"
    assert seen["image"].shape == (224, 224, 3)


def test_another_task_begins_anew():
    chunks = [[[v, 0, 0, 0, 0, 0, 0]] * 2 for v in (1.0, 3.0)]
    model = SimplerPolicy(Script(chunks).infer, "google_robot", unnorm_key="fractal")
    model.step(IMAGE, "open the drawer")
    raw, _ = model.step(IMAGE, "close the drawer")
    np.testing.assert_allclose(raw["world_vector"], [3, 0, 0])


def test_euler_angles_become_axis_times_angle():
    """Roll by 90 degrees, then yaw by 90 degrees about the fixed axes: a third of a turn about (1, 1, 1)."""
    chunks = [[[0, 0, 0, *euler, 0]] for euler in ([0.3, 0, 0], [0, 0, -0.2], [np.pi / 2, 0, np.pi / 2])]
    model = SimplerPolicy(Script(chunks).infer, "widowx_bridge")
    turns = [model.step(IMAGE, "go")[1]["rot_axangle"] for _ in chunks]
    np.testing.assert_allclose(turns[0], [0.3, 0, 0], atol=1e-7)
    np.testing.assert_allclose(turns[1], [0, 0, -0.2], atol=1e-7)
    np.testing.assert_allclose(turns[2], 2 * np.pi / 3 / np.sqrt(3) * np.ones(3), atol=1e-6)


def test_widowx_opens_above_a_half():
    assert grippers("widowx_bridge", [0.0, 0.5, 0.51, 1.0]) == [-1, -1, 1, 1]


def test_the_google_robot_goes_on_with_a_change():
    # Open, closing at the third step: 1 for ten steps, then 0. The policy's values in between are ignored.
    told = grippers("google_robot", [1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    assert told == [0, 0, *[1] * 10, 0, 0]
    # Opens again as soon as the ten steps are over.
    assert grippers("google_robot", [1, 0, *[1] * 12], sticky_steps=3) == [0, 1, 1, 1, -1, -1, -1, *[0] * 7]
    # A slow change accumulates against the gripper at the last change; it is passed on unchanged until it exceeds a
    # half.
    np.testing.assert_allclose(
        grippers("google_robot", [1, 0.8, 0.6, 0.4, 0.4, 0.4], sticky_steps=2), [0, 0.2, 0.4, 0.6, 0.6, 0], atol=1e-6
    )


def test_a_vector_for_the_simulator():
    model = SimplerPolicy(Script([[[0.1, 0.2, 0.3, 0, 0, 0.4, 1]]]).infer, "widowx_bridge")
    vector = model.act(IMAGE, "go")
    assert vector.dtype == np.float32
    np.testing.assert_allclose(vector, [0.1, 0.2, 0.3, 0, 0, 0.4, 1], rtol=1e-6)


def test_shrinking_by_area():
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    expected = [
        [[image[2 * i : 2 * i + 2, 3 * j : 3 * j + 3, c].mean() for c in range(3)] for j in (0, 1)] for i in (0, 1)
    ]
    np.testing.assert_array_equal(area_resize(image, 2), np.rint(expected))
    # Five pixels to two: the middle one contributes to both.
    row = np.repeat(np.array([[10, 20, 30, 40, 50]], np.uint8)[..., None], 3, axis=2)
    resized = area_resize(np.repeat(row, 5, axis=0), 2)
    np.testing.assert_array_equal(resized[0, :, 0], [18, 42])  # (10 + 20 + 15) / 2.5, (15 + 40 + 50) / 2.5
    for unfit in (image.astype(np.float32), image[:0], image[..., :2], image[0], None, [[1], [2, 3]]):
        with pytest.raises(InputError, match=r"must be uint8\[H, W, 3\], got"):
            area_resize(unfit, 2)


@pytest.mark.parametrize("setup", UNNORM_KEYS)
def test_the_default_key_is_a_dataset_of_our_own_runs(setup):
    """Our runs use the catalogue's names, without the version."""
    assert find_key(UNNORM_KEYS[setup], CATALOGUE) == UNNORM_KEYS[setup].partition("/")[0]


def test_unknown_robots_are_named():
    assert set(UNNORM_KEYS) == {"widowx_bridge", "google_robot"}
    with pytest.raises(InputError, match="'panda' is not known"):
        SimplerPolicy(Script([]).infer, "panda")


@pytest.mark.parametrize(
    "reply",
    [None, {}, {"actions": None}, {"actions": np.ones(7)}, {"actions": np.ones((0, 7))}, {"actions": np.ones((4, 6))}]
    + [{"actions": np.full((4, 7), value)} for value in (np.nan, np.inf, 1e300, "x")],
)
def test_no_action_comes_of_a_reply_that_is_none(reply):
    replies = [{"actions": np.ones((4, 7))}, reply, {"actions": np.zeros((2, 7))}]
    model = SimplerPolicy(lambda _: replies.pop(0), "widowx_bridge")
    model.act(IMAGE, "go")
    with pytest.raises(InputError, match="a reply"):
        model.act(IMAGE)
    assert model.act(IMAGE).shape == (7,), "and it may go on"


def test_a_step_without_a_task_asks_for_one():
    model = SimplerPolicy(Script([]).infer, "widowx_bridge")
    for task in (None, "", " "):
        with pytest.raises(InputError, match="call reset"):
            model.step(IMAGE, task)
        model.reset(task)
        with pytest.raises(InputError, match="call reset"):
            model.step(IMAGE)


def test_the_runner_gets_its_picture(tmp_path):
    model = SimplerPolicy(Script([[[0, 0, 0, 0, 0, 0, 0]]] * 3).infer, "google_robot")
    raw = [model.step(IMAGE, "go")[0] for _ in range(3)]
    model.visualize_epoch(raw, [IMAGE] * 3, save_path=str(tmp_path / "actions.png"))
    assert (tmp_path / "actions.png").stat().st_size > 1000


@pytest.mark.sim
def test_it_drives_an_environment_of_maniskill():
    """PickCube needs no download. A policy that moves down moves the hand down, also in the camera's picture."""
    pytest.importorskip("mani_skill.envs", reason="needs ManiSkill: pip install 'spatialvla-jax[maniskill]'")
    gymnasium = pytest.importorskip("gymnasium")
    try:
        env = gymnasium.make("PickCube-v1", obs_mode="rgb", control_mode="pd_ee_delta_pose", sim_backend="physx_cpu")
    except RuntimeError as error:
        # SAPIEN needs a Vulkan driver with descriptor indexing, which few machines without a GPU have, and reports it
        # in one of these ways. Any other error is ours.
        if not re.search("rendering device|physical device|vk::", str(error)):
            raise
        pytest.skip(f"no Vulkan driver that SAPIEN can render with: {error}")
    observation, _ = env.reset(seed=0)
    policy = Script([[[0, 0, -0.5, 0, 0, 0, 1]] * 4] * 8)
    model = SimplerPolicy(policy.infer, "widowx_bridge")
    heights = []
    for _ in range(8):
        image = observation["sensor_data"]["base_camera"]["rgb"][0].numpy()
        observation, *_ = env.step(model.act(image, "pick up the cube"))
        heights.append(float(observation["extra"]["tcp_pose"][0, 2]))
    assert heights[0] - heights[-1] > 0.1 and np.all(np.diff(heights) < 0)
    first, last = policy.seen[0]["image"], policy.seen[-1]["image"]
    assert first.shape == (224, 224, 3) and np.abs(first.astype(int) - last).mean() > 1
    env.close()
