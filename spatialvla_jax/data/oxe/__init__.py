"""The catalogue of datasets: one declarative entry each, written with a small vocabulary of operations."""

from spatialvla_jax.data.oxe.catalogue import CATALOGUE
from spatialvla_jax.data.oxe.mixtures import MIXTURES
from spatialvla_jax.data.oxe.operations import OPERATIONS
from spatialvla_jax.data.oxe.spec import DatasetSpec, make_spec

__all__ = ["CATALOGUE", "MIXTURES", "OPERATIONS", "DatasetSpec", "make_spec"]
