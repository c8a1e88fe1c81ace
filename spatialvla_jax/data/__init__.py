"""RLDS datasets on disk → batches of plain NumPy arrays. TensorFlow is imported only in this package, on first use."""

from spatialvla_jax.data.config import DataConfig
from spatialvla_jax.data.loader import Episode, Loader, open_data

__all__ = ["DataConfig", "Episode", "Loader", "open_data"]
