"""A benchmark for tests: an episode shows one image, and succeeds where every action is the expected one."""

from typing import Any

import numpy as np
from vla_eval.benchmarks.base import StepBenchmark, StepResult
from vla_eval.specs import GRIPPER_CLOSE_POS, IMAGE_RGB, LANGUAGE, POSITION_DELTA, ROTATION_AA, DimSpec


class Frames(StepBenchmark):
    """`expected` is the file that integrations/make_export.py wrote; the gripper closes at +1 and opens at −1."""

    def __init__(self, expected: str) -> None:
        super().__init__()
        data = np.load(expected)
        self.images, self.prompts, self.actions = data["images"], data["prompts"].tolist(), data["actions"].copy()
        self.actions[..., 6] = 1 - 2 * self.actions[..., 6]

    def get_tasks(self) -> list[dict[str, Any]]:
        return [{"name": prompt, "number": number} for number, prompt in enumerate(self.prompts)]

    def reset(self, task: dict[str, Any]) -> int:
        self.steps, self.right = 0, True
        return task["number"]

    def step(self, action: dict[str, Any]) -> StepResult:
        number = self._task["number"]
        self.right &= np.allclose(action["actions"], self.actions[number, self.steps], rtol=0, atol=1e-6)
        self.steps += 1
        return StepResult(number, float(self.right), self.steps == self.actions.shape[1], {})

    def make_obs(self, raw_obs: int, task: dict[str, Any]) -> dict[str, Any]:
        images = {"wrist": np.zeros_like(self.images[raw_obs]), "agentview": self.images[raw_obs]}
        return {"images": images, "task_description": task["name"]}

    def get_step_result(self, step_result: StepResult) -> dict[str, Any]:
        return {"success": self.right}

    def get_metadata(self) -> dict[str, Any]:
        return {"max_steps": self.actions.shape[1]}

    def get_action_spec(self) -> dict[str, DimSpec]:
        return {"position": POSITION_DELTA, "rotation": ROTATION_AA, "gripper": GRIPPER_CLOSE_POS}

    def get_observation_spec(self) -> dict[str, DimSpec]:
        return {"agentview": IMAGE_RGB, "wrist": IMAGE_RGB, "language": LANGUAGE}
