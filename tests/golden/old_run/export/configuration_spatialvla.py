"""In modeling_spatialvla.py."""

from .modeling_spatialvla import SpatialVLAConfig  # noqa: F401
