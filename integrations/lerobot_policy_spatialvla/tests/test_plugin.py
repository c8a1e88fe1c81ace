"""The plug-in in LeRobot's released package, on an export whose answers `spatialvla_jax.Policy` gave.

    SPATIALVLA_EXPORT=FOLDER pytest integrations/lerobot_policy_spatialvla/tests

where FOLDER was written by integrations/make_export.py, and both this plug-in and tests/lerobot_env_frames are
installed beside LeRobot. `make integrations` does all that.
"""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lerobot", reason="LeRobot is not installed")
if "SPATIALVLA_EXPORT" not in os.environ:
    pytest.skip("SPATIALVLA_EXPORT names no folder of integrations/make_export.py", allow_module_level=True)

import lerobot
import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies import get_policy_class, make_pre_post_processors
from lerobot.utils.import_utils import register_third_party_plugins
from lerobot_env_frames import Frames

FOLDER = Path(os.environ.get("SPATIALVLA_EXPORT", "."))
EXPORT, EXPECTED = FOLDER / "export", FOLDER / "expected.npz"
FRONT = "observation.images.front"

register_third_party_plugins()


def make(**options):
    config = PreTrainedConfig.get_choice_class("spatialvla")(export=str(EXPORT), device="cpu", **options)
    return get_policy_class("spatialvla")(config)


@pytest.fixture(scope="module")
def policy():
    return make()


@pytest.fixture(scope="module")
def expected():
    return dict(np.load(EXPECTED))


@pytest.fixture(scope="module")
def batch(expected):
    """As LeRobot passes it: floating point in [0, 1], channels first."""
    images = torch.from_numpy(expected["images"]).permute(0, 3, 1, 2).float() / 255
    return {FRONT: images, "task": expected["prompts"].tolist()}


def row(batch, i):
    return {FRONT: batch[FRONT][i : i + 1], "task": batch["task"][i : i + 1]}


def test_lerobot_finds_it_by_its_name():
    assert "spatialvla" in PreTrainedConfig.get_known_choices()
    assert get_policy_class("spatialvla").name == "spatialvla"


def test_its_tokens_and_actions_are_those_of_the_jax_policy(policy, batch, expected):
    count = len(expected["images"])
    tokens = policy.predict_tokens(batch).numpy().reshape(expected["action_ids"].shape)
    np.testing.assert_array_equal(tokens - policy.processor.action_offset, expected["action_ids"])
    np.testing.assert_allclose(policy.predict_action_chunk(batch), expected["actions"], rtol=0, atol=1e-6)
    for i in range(count):
        chunk = policy.predict_action_chunk(row(batch, i))
        assert chunk.dtype == torch.float32 and chunk.shape == (1, *expected["actions"].shape[1:])
        np.testing.assert_allclose(chunk[0], expected["actions"][i], rtol=0, atol=1e-6)


def test_a_chunk_is_executed_before_the_next_is_predicted(policy, batch, expected):
    policy.reset()
    chunk = expected["actions"].shape[1]
    actions = [policy.select_action(batch if i == 0 else {}) for i in range(chunk)]
    np.testing.assert_allclose(torch.stack(actions, 1), expected["actions"], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"policy\.camera"):
        policy.select_action({})
    policy.select_action(row(batch, 0))
    policy.reset()
    first = policy.select_action(row(batch, 1))
    np.testing.assert_allclose(first[0], expected["actions"][1, 0], rtol=0, atol=1e-6)


def test_fewer_actions_of_a_chunk(batch, expected):
    policy = make(n_action_steps=2)
    seen = [policy.select_action(row(batch, i))[0] for i in (0, 1, 2, 3)]
    right = [expected["actions"][0, 0], expected["actions"][0, 1], expected["actions"][2, 0], expected["actions"][2, 1]]
    np.testing.assert_allclose(torch.stack(seen), right, rtol=0, atol=1e-6)


def test_options_of_the_environment(batch, expected):
    policy = make(gripper=[1.0, -1.0], camera="front", mirror=True)
    mirrored = {"observation.images.wrist": batch[FRONT], FRONT: batch[FRONT].flip(-1), "task": batch["task"]}
    right = np.concatenate([expected["actions"][..., :6], 1 - 2 * expected["actions"][..., 6:]], -1)
    np.testing.assert_allclose(policy.predict_action_chunk(mirrored), right, rtol=0, atol=1e-6)


def test_the_model_is_given_the_camera_s_intrinsics(policy, batch, monkeypatch):
    """In pixels of the resized image; by default those of the dataset, which are for an image of one pixel."""
    given = make(intrinsics=[[300.0, 0, 100], [0, 310.0, 120], [0, 0, 1]])
    for one, right in ((given, [[300, 0, 100], [0, 310, 120]]), (policy, [[307.2, 0, 128], [0, 307.2, 128]])):
        seen = {}
        monkeypatch.setattr(one.model, "predict_action", seen.update)
        one.predict_tokens(batch)
        scaled = np.array(right) * one.processor.image_size / batch[FRONT].shape[-1]
        np.testing.assert_allclose(seen["intrinsic"][:, :2], [scaled] * len(batch["task"]), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"unnorm_key": "bridge"}, "unnorm_key 'bridge' is not one of libero"),
        (
            {"camera": "left", "input_features": {FRONT: PolicyFeature(FeatureType.VISUAL, (3, 8, 8))}},
            f"one of {FRONT}",
        ),
        ({"n_action_steps": 9}, "n_action_steps is 9: the export predicts 4"),
        ({"gripper": [1.0]}, "policy.gripper"),
        (
            {"output_features": {"action": PolicyFeature(FeatureType.ACTION, (6,))}},
            r"7 numbers, those of this robot \[6",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(**options)


def test_several_cameras_need_a_choice(policy, batch):
    with pytest.raises(ValueError, match=f"choose one of {FRONT}, "):
        policy.predict_action_chunk({**batch, "observation.images.wrist": batch[FRONT]})


def test_it_is_not_trained_here(policy, batch):
    config = policy.config
    for call in (config.get_optimizer_preset, config.get_scheduler_preset, policy.get_optim_params):
        with pytest.raises(NotImplementedError, match="spatialvla-jax train"):
            call()
    with pytest.raises(NotImplementedError, match="spatialvla-jax train"):
        policy.forward(batch)


def test_asynchronous_inference_takes_no_plugin():
    """When this fails, LeRobot takes them: say so in README.md."""
    constants = runpy.run_path(str(Path(lerobot.__file__).parent / "async_inference" / "constants.py"))
    supported = constants["SUPPORTED_POLICIES"]
    assert "act" in supported and "spatialvla" not in supported


def test_the_command_writes_what_a_path_needs(tmp_path, batch, expected):
    folder, command = tmp_path / "policy", [sys.executable, "-m", "lerobot_policy_spatialvla"]
    run = [*command, os.path.relpath(EXPORT), str(folder), "--camera=front", "--device=cpu"]
    subprocess.run(run, check=True)
    assert {file.suffix for file in folder.iterdir()} == {".json"}
    config = PreTrainedConfig.from_pretrained(folder)
    assert config.type == "spatialvla" and config.export == str(EXPORT.resolve())
    policy = get_policy_class(config.type).from_pretrained(folder, config=config)
    before, after = make_pre_post_processors(config, pretrained_path=str(folder))
    actions = after(policy.predict_action_chunk(before(row(batch, 2))))
    np.testing.assert_allclose(actions[0], expected["actions"][2], rtol=0, atol=1e-6)
    again = subprocess.run(run, capture_output=True, text=True)
    assert again.returncode == 1 and "exists: choose a new directory" in again.stderr.splitlines()[-1]
    wrong = subprocess.run([*command, str(tmp_path), str(tmp_path / "b")], capture_output=True, text=True)
    assert wrong.returncode == 1 and "no policy can be made of" in wrong.stderr and not (tmp_path / "b").exists()


def test_the_environment_tells_wrong_actions_from_right_ones(expected):
    env = Frames(str(EXPECTED))
    for change, success in ((0.0, True), (0.01, False)):
        env.reset(seed=5)
        actions = expected["actions"][5 % len(expected["actions"])].copy()
        actions[-2] += change
        assert env.step(actions[0])[4]["is_success"] is False
        assert [env.step(action)[4]["is_success"] for action in actions[1:]][-1] is success


def test_lerobot_eval(tmp_path, expected):
    """Every episode succeeds: each action that reaches the environment is the JAX policy's."""
    command = [
        str(Path(sys.executable).with_name("lerobot-eval")),
        "--policy.type=spatialvla",
        "--policy.camera=front",
        f"--policy.export={EXPORT}",
        "--policy.device=cpu",
        "--env.type=frames",
        f"--env.expected={EXPECTED}",
        "--eval.n_episodes=4",
        "--eval.batch_size=2",
        f"--output_dir={tmp_path}",
    ]
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    overall = json.loads((tmp_path / "eval_info.json").read_text())["overall"]
    assert overall["pc_success"] == 100 and overall["n_episodes"] == 4
    assert overall["avg_sum_reward"] == expected["actions"].shape[1]
