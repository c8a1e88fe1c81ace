"""The policy's options, each of which is a `--policy.NAME` on LeRobot's command lines."""

# LeRobot is installed where this runs.
# pyright: reportMissingImports=false

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NoReturn

from lerobot.configs import PreTrainedConfig
from lerobot.utils.constants import OBS_IMAGE, OBS_IMAGES

ACTION_DIM = 7
NO_TRAINING = (
    "SpatialVLA is not trained through LeRobot: train with `spatialvla-jax train`, and export the run with "
    "`spatialvla-jax convert RUN EXPORT --to pytorch`"
)


@PreTrainedConfig.register_subclass("spatialvla")
@dataclass
class SpatialVLAConfig(PreTrainedConfig):
    """`export` is required; everything else has a default.

    Args:
        export: The export, a directory or an id on the Hub as org/name or org/name@revision. Its own Python files run.
        unnorm_key: The dataset whose statistics turn the model's actions into robot units; not needed where the export
            has one dataset only.
        camera: The image that the model sees, as "observation.images.front" or "front"; not needed with one camera.
        intrinsics: That camera's matrix [3, 3] in pixels of its image; by default that of the dataset.
        mirror: Swap left and right of the image. LeRobot's LIBERO shows mirrored pictures, as the *_no_noops datasets
            have them; a policy trained on pictures that are not mirrored needs this.
        gripper: What the environment calls closed and open; the model's own values are 0 and 1. LIBERO's are 1 and −1.
        n_action_steps: How many actions of a chunk are executed before the next is predicted; by default all.
        dtype: Of the weights: "auto" (as exported), "float32" or "bfloat16".
    """

    export: str = ""
    unnorm_key: str | None = None
    camera: str | None = None
    intrinsics: list[list[float]] | None = None
    mirror: bool = False
    gripper: list[float] = field(default_factory=lambda: [0.0, 1.0])
    n_action_steps: int | None = None
    dtype: str = "auto"

    def camera_key(self, names: Iterable[str]) -> str:
        """Which of an observation's names is the image that the model sees. Raises ValueError."""
        images = [name for name in names if name == OBS_IMAGE or name.startswith(f"{OBS_IMAGES}.")]
        wanted = images if self.camera is None else [self.camera, f"{OBS_IMAGES}.{self.camera}"]
        found = [name for name in images if name in wanted]
        if len(found) != 1:
            raise ValueError(f"policy.camera is {self.camera!r}: choose one of {', '.join(images) or 'no images'}")
        return found[0]

    def validate_features(self) -> None:
        """Raises ValueError if the model cannot see or act in this environment."""
        if not self.export:
            raise ValueError(
                "policy.export is missing: expected the directory of a PyTorch export, or its id on the Hub"
            )
        if len(self.gripper) != 2:
            raise ValueError(f"policy.gripper is {self.gripper}: expected two numbers, what closed and open are")
        if self.image_features:
            self.camera_key(self.image_features)
        if self.action_feature is not None and tuple(self.action_feature.shape) != (ACTION_DIM,):
            raise ValueError(
                f"SpatialVLA's actions have {ACTION_DIM} numbers, those of this robot "
                f"{list(self.action_feature.shape)}: expected an end effector's movement, rotation and gripper"
            )

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> None:
        return None

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> NoReturn:
        raise NotImplementedError(NO_TRAINING)

    def get_scheduler_preset(self) -> NoReturn:
        raise NotImplementedError(NO_TRAINING)
