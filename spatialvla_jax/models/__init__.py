from spatialvla_jax.models.presets import PRESETS, preset
from spatialvla_jax.models.spatialvla import SpatialVLA, SpatialVLAConfig

__all__ = ["PRESETS", "SpatialVLA", "SpatialVLAConfig", "preset"]
