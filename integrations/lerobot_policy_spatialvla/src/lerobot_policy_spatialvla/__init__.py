"""SpatialVLA as a policy of LeRobot. LeRobot imports this package by its name, which registers `--policy.type`."""

from lerobot_policy_spatialvla.configuration_spatialvla import SpatialVLAConfig

__all__ = ["SpatialVLAConfig"]
