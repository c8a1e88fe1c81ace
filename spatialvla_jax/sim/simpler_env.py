"""A policy with the interface of SimplerEnv's runner, following the release's own evaluation there.

    model = SimplerPolicy(Policy.load(checkpoint).infer, "widowx_bridge")
    maniskill2_evaluator(model, args)                      # simpler_env.evaluation
    env.step(model.act(image, env.get_language_instruction()))   # or your own loop, such as for ManiSkill 3

The conventions are those of simpler_env/policies/spatialvla in github.com/DelinQu/SimplerEnv-OpenVLA, which produced
the published numbers. They differ from SimplerEnv's own in three ways: the ensemble's weights, the reference for
gripper changes, and a sticky gripper of ten steps, not 15.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from scipy.spatial.transform import Rotation

from spatialvla_jax.errors import InputError
from spatialvla_jax.inference.action_chunking import chunk_of, recent
from spatialvla_jax.utils.camera import as_array, kind_of

# The dataset whose units each robot uses, named as in the released checkpoints and our exports. Our runs omit the
# version; both names are accepted.
UNNORM_KEYS = {"widowx_bridge": "bridge_orig/1.0.0", "google_robot": "fractal20220817_data/0.1.0"}
STICKY_STEPS = 10


class SimplerPolicy:
    """`infer` is `Policy.infer` or `Client.infer`; `setup` is one of `UNNORM_KEYS`, SimplerEnv's robot names.

    Requests a chunk at every step and executes the mean of all chunks that cover the step, with more weight on newer
    ones. `action_scale` multiplies translation and rotation. The Google robot's gripper takes changes; each is repeated
    for `sticky_steps`.
    """

    def __init__(
        self,
        infer: Callable[[dict[str, Any]], dict[str, Any]],
        setup: str,
        *,
        unnorm_key: str | None = None,
        image_size: int = 224,
        action_scale: float = 1.0,
        sticky_steps: int = STICKY_STEPS,
    ) -> None:
        if setup not in UNNORM_KEYS:
            raise InputError(f"the robot setup {setup!r} is not known: choose {' or '.join(UNNORM_KEYS)}")
        self.infer, self.setup, self.unnorm_key = infer, setup, unnorm_key or UNNORM_KEYS[setup]
        self.image_size, self.action_scale, self.sticky_steps = image_size, action_scale, sticky_steps
        self.reset("")

    def reset(self, task_description: str | None) -> None:
        """Start an episode."""
        self.task_description = task_description
        self._chunks: list[np.ndarray] = []  # newest first
        self._reference: float | None = None  # the gripper value from which changes are measured
        self._sticky, self._left = 0.0, 0

    def step(
        self, image: UInt8[np.ndarray, "H W 3"], task_description: str | None = None, **_: Any
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Called by SimplerEnv's runner at every step: (raw action, action for the simulator).

        Raw: "world_vector", "rotation_delta" (roll, pitch, yaw), "open_gripper" (0 closed to 1 open). For the
        simulator: "world_vector" in metres, "rot_axangle" in radians, "gripper" and "terminate_episode" (always 0). A
        new task description starts an episode. Raises InputError if there is no task description, if the policy refuses
        the input, or if the reply is not a finite chunk f32[T, 7]. Then no action is executed.
        """
        if task_description is not None and task_description != self.task_description:
            self.reset(task_description)
        if not isinstance(self.task_description, str) or not self.task_description.strip():
            raise InputError("the policy needs a task description before its first step: call reset(task_description)")
        observation = {"image": area_resize(image, self.image_size), "prompt": self.task_description}
        chunk = chunk_of(self.infer(observation | {"unnorm_key": self.unnorm_key}), action_dim=7).astype(np.float64)
        self._chunks = [c for age, c in enumerate([chunk, *self._chunks]) if age < len(c)]
        predictions = np.stack([chunk[age] for age, chunk in enumerate(self._chunks)][::-1])  # oldest first
        weights = recent(predictions)
        move, turn, gripper = np.split(weights @ predictions / weights.sum(), [3, 6])
        raw = {"world_vector": move, "rotation_delta": turn, "open_gripper": gripper}
        action = {
            "world_vector": self.action_scale * move,
            "rot_axangle": self.action_scale * Rotation.from_euler("xyz", turn).as_rotvec(),
            "gripper": self._gripper(gripper),
            "terminate_episode": np.zeros(1),
        }
        return raw, action

    def act(self, image: UInt8[np.ndarray, "H W 3"], task_description: str | None = None) -> Float[np.ndarray, " 7"]:
        """`step` as the single vector that SimplerEnv's environments take: translation, axis-angle, gripper."""
        _, action = self.step(image, task_description)
        return np.concatenate([action["world_vector"], action["rot_axangle"], action["gripper"]]).astype(np.float32)

    def _gripper(self, opened: Float[np.ndarray, " 1"]) -> Float[np.ndarray, " 1"]:
        """WidowX: 1 open, -1 closed. Google robot: the change, 1 closes and -1 opens; above 0.5 it repeats."""
        if self.setup == "widowx_bridge":
            return np.where(opened > 0.5, 1.0, -1.0)
        if self._reference is None:
            self._reference = float(opened[0])
        change = self._reference - float(opened[0])
        if abs(change) > 0.5 and not self._left:
            self._sticky, self._left, self._reference = change, self.sticky_steps, float(opened[0])
        if self._left:
            change, self._left = self._sticky, self._left - 1
        return np.array([change])

    def visualize_epoch(self, raw_actions: Sequence[dict[str, Any]], images: Sequence[Any], save_path: str) -> None:
        """Called by the runner at an episode's end: plot the raw actions over time. Its video shows the images."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        rows = [np.concatenate([a["world_vector"], a["rotation_delta"], a["open_gripper"]]) for a in raw_actions]
        figure = Figure(figsize=(14, 2.4), layout="constrained")
        names = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
        for axes, name, values in zip(figure.subplots(1, 7), names, np.stack(rows).T, strict=True):
            axes.plot(values)
            axes.set(title=name, xlabel="step")
        FigureCanvasAgg(figure).print_figure(Path(save_path))


def area_resize(image: Any, size: int) -> UInt8[np.ndarray, "S S 3"]:
    """Area-averaging resize, like OpenCV's INTER_AREA when shrinking. Raises InputError for anything but u8[H, W,
    3]."""
    array = as_array(image)
    if array is None or array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3 or not array.size:
        raise InputError(f"the image must be uint8[H, W, 3], got {kind_of(array)}")

    def shares(length: int) -> np.ndarray:
        """[S, length]: the share of each old pixel in each new one."""
        edges = np.arange(size + 1)[:, None] * (length / size)
        covered = np.clip(edges - np.arange(length), 0, 1)
        return np.diff(covered, axis=0) * (size / length)

    H, W, _ = array.shape
    resized = np.einsum("ih,hwc,jw->ijc", shares(H), array.astype(np.float64), shares(W), optimize=True)
    return np.clip(np.rint(resized), 0, 255).astype(np.uint8)
