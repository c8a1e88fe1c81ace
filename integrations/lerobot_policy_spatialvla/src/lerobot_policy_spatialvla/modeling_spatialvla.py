"""A PyTorch export of spatialvla_jax behind LeRobot's policy interface.

Axis letters: B environments, T actions of a chunk, H and W of the camera's image.
"""

# LeRobot is installed where this runs.
# pyright: reportMissingImports=false

from collections import deque
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from lerobot_policy_spatialvla.configuration_spatialvla import NO_TRAINING, SpatialVLAConfig


class SpatialVLAPolicy(PreTrainedPolicy):
    """Loads `config.export`. Its actions are in robot units: there is nothing for LeRobot to normalise."""

    config_class = SpatialVLAConfig
    name = "spatialvla"

    def __init__(self, config: SpatialVLAConfig, **unused: Any) -> None:
        super().__init__(config)
        config.validate_features()
        self.processor = load_processor(config)
        chunk = self.processor.action_chunk_size
        self.n_action_steps = chunk if config.n_action_steps is None else config.n_action_steps
        if not 1 <= self.n_action_steps <= chunk:
            raise ValueError(f"policy.n_action_steps is {config.n_action_steps}: the export predicts {chunk} at once")
        source, options = split(config.export)
        self.model = AutoModel.from_pretrained(source, dtype=config.dtype, **options).to(config.device).eval()
        if self.model.config.depth_source == "dataset":
            raise ValueError(
                f"{config.export} needs a depth image, which LeRobot's environments do not give: use an export that "
                "estimates depth or does without"
            )
        self.reset()

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, config: PreTrainedConfig | None = None, **options: Any
    ) -> "SpatialVLAPolicy":
        """From a directory that `python -m lerobot_policy_spatialvla` wrote, whose config names the export."""
        policy = cls(config or PreTrainedConfig.from_pretrained(pretrained_name_or_path, **options))
        return policy.eval()

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        self.config._save_pretrained(save_directory)

    def reset(self) -> None:
        self._queue: deque[Tensor] = deque()

    @torch.no_grad()
    def predict_tokens(self, batch: dict[str, Any]) -> Tensor:
        """Token ids of a chunk i64[B, T × tokens of an action]; see `predict_action_chunk`."""
        images = batch[self.config.camera_key(batch)]
        if self.config.mirror:
            images = images.flip(-1)
        levels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        count = len(levels)
        if not isinstance(task := batch.get("task"), list) or len(task) != count:
            raise ValueError(f"the batch has {count} images and 'task' {task!r:.80}: expected an instruction for each")
        intrinsics = None if self.config.intrinsics is None else [self.config.intrinsics] * count
        inputs = self.processor(
            images=list(levels), text=task, unnorm_key=[self.config.unnorm_key] * count, intrinsics=intrinsics
        )
        return self.model.predict_action(inputs)

    def predict_action_chunk(self, batch: dict[str, Any], **unused: Any) -> Tensor:
        """Actions f32[B, T, 7] in robot units, of images f32[B, 3, H, W] in [0, 1] and "task", B sentences. Raises
        ValueError if there is no action."""
        tokens = self.predict_tokens(batch).cpu().numpy()
        actions = np.stack(
            [self.processor.decode_actions(row, unnorm_key=self.config.unnorm_key)["actions"] for row in tokens]
        )
        closed, opened = self.config.gripper
        actions[..., 6] = closed + (opened - closed) * actions[..., 6]
        return torch.from_numpy(actions.astype(np.float32)).to(self.config.device)

    def select_action(self, batch: dict[str, Any], **unused: Any) -> Tensor:
        """The next action f32[B, 7]; predicts a chunk where those of the one before are used up."""
        if not self._queue:
            self._queue.extend(self.predict_action_chunk(batch)[:, : self.n_action_steps].unbind(1))
        return self._queue.popleft()

    def forward(self, batch: dict[str, Tensor]) -> NoReturn:
        raise NotImplementedError(NO_TRAINING)

    def get_optim_params(self) -> NoReturn:
        raise NotImplementedError(NO_TRAINING)


def load_processor(config: SpatialVLAConfig) -> Any:
    """The export's processor. Raises ValueError for an `unnorm_key` that it does not know."""
    source, options = split(config.export)
    processor = AutoProcessor.from_pretrained(source, **options)
    any_tokens = np.full(processor.action_chunk_size * len(processor.token_ranges), processor.action_offset)
    processor.decode_actions(any_tokens, unnorm_key=config.unnorm_key)
    return processor


def split(export: str) -> tuple[str, dict[str, Any]]:
    """A directory, or org/name@revision → what transformers' `from_pretrained` takes."""
    name, _, revision = (export, "", "") if Path(export).exists() else export.partition("@")
    return name, {"trust_remote_code": True} | ({"revision": revision} if revision else {})
