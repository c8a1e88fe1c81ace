from spatialvla_jax.models.presets import PRESETS, preset
from spatialvla_jax.models.spatialvla import Params, SpatialVLA, SpatialVLAConfig

__all__ = ["PRESETS", "Params", "SpatialVLA", "SpatialVLAConfig", "preset"]
