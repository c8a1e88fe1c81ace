"""RLDS datasets on disk -> batches of plain numpy arrays. TensorFlow is imported here alone, on first use."""

from spatialvla_jax.data.config import DataConfig
from spatialvla_jax.data.loader import Episode, Loader, load_data, open_data

__all__ = ["DataConfig", "Episode", "Loader", "load_data", "open_data"]
