"""In modeling_spatialvla.py."""

from .modeling_spatialvla import SpatialVLAProcessor  # noqa: F401
