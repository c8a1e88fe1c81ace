"""An environment for tests: an episode shows one image, and succeeds where every action is the expected one."""

from dataclasses import dataclass, field
from functools import partial

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs import EnvConfig


class Frames(gym.Env):
    """Episode `seed` shows image `seed` modulo their number, as long as the expected chunk is."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012 (gymnasium's own)
    render_mode = "rgb_array"

    def __init__(self, expected: str) -> None:
        data = np.load(expected)
        self.images, self.prompts, self.actions = data["images"], data["prompts"].tolist(), data["actions"]
        self._max_episode_steps = self.actions.shape[1]
        image = gym.spaces.Box(0, 255, self.images.shape[1:], np.uint8)
        self.observation_space = gym.spaces.Dict(pixels=gym.spaces.Dict(front=image, wrist=image))
        self.action_space = gym.spaces.Box(-1, 1, (7,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.number = self.number if seed is None else seed % len(self.images)
        self.task = self.task_description = self.prompts[self.number]
        self.steps, self.right = 0, True
        return self._look(), {"is_success": False}

    def step(self, action):
        self.right &= np.allclose(action, self.actions[self.number, self.steps], rtol=0, atol=1e-6)
        self.steps += 1
        done = self.steps == self._max_episode_steps
        return self._look(), float(self.right), done, False, {"is_success": done and self.right}

    def render(self):
        return self.images[self.number]

    def _look(self):
        return {"pixels": {"front": self.images[self.number], "wrist": np.zeros_like(self.images[self.number])}}


@EnvConfig.register_subclass("frames")
@dataclass
class FramesConfig(EnvConfig):
    expected: str = ""  # the file that integrations/make_export.py wrote
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {
            "action": PolicyFeature(FeatureType.ACTION, (7,)),
            "front": PolicyFeature(FeatureType.VISUAL, (256, 256, 3)),
            "wrist": PolicyFeature(FeatureType.VISUAL, (256, 256, 3)),
        }
    )
    features_map: dict[str, str] = field(
        default_factory=lambda: {
            "action": "action",
            "front": "observation.images.front",
            "wrist": "observation.images.wrist",
        }
    )

    @property
    def gym_kwargs(self) -> dict:
        return {}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict:
        make = [partial(Frames, self.expected)] * n_envs
        return {"frames": {0: SyncVectorEnv(make, autoreset_mode=AutoresetMode.SAME_STEP)}}
