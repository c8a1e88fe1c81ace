"""RLDS datasets on disk -> batches of plain numpy arrays. TensorFlow is imported here alone, on first use."""

from spatialvla_jax.data.loader import Loader, load_data, open_data

__all__ = ["Loader", "load_data", "open_data"]
