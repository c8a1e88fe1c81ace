"""Actions to tokens and back: pure functions on a grid, which is a pytree of arrays."""

from spatialvla_jax.actions.adapt import adapt_embeddings
from spatialvla_jax.actions.gaussian import (
    PRESET_BINS,
    PRETRAIN_GAUSSIANS,
    fit_gaussians,
    gaussian_grid,
    grid_variables,
    pool_gaussians,
    uniform_grid,
)
from spatialvla_jax.actions.grid import ActionGrid, grid_from_dict, grid_to_dict
from spatialvla_jax.actions.linear import LinearGrid, linear_grid
from spatialvla_jax.actions.tokenizer import DIMENSIONS, ActionTokenizer, decode, encode

__all__ = [
    "DIMENSIONS",
    "PRESET_BINS",
    "PRETRAIN_GAUSSIANS",
    "ActionGrid",
    "ActionTokenizer",
    "LinearGrid",
    "adapt_embeddings",
    "decode",
    "encode",
    "fit_gaussians",
    "gaussian_grid",
    "grid_from_dict",
    "grid_to_dict",
    "grid_variables",
    "linear_grid",
    "pool_gaussians",
    "uniform_grid",
]
