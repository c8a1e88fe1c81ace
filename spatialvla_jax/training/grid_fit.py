"""The action grid of a config, fitted to the actions of its training split (paper III-B)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from spatialvla_jax.actions import (
    ActionTokenizer,
    fit_gaussians,
    gaussian_grid,
    linear_grid,
    pool_gaussians,
    uniform_grid,
)
from spatialvla_jax.actions.normalization import normalize
from spatialvla_jax.data import Loader
from spatialvla_jax.data.beam import load_stats, pooled
from spatialvla_jax.data.index import Index
from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.dataset_keys import find_key


def make_grid(
    config: Mapping[str, Any],
    gaussians: Callable[[], Float[np.ndarray, "6 2"]],
    kept: ActionTokenizer | None = None,
) -> ActionTokenizer:
    """The action grid for a config's `grid` part. `gaussians` is called only if needed; `kept` is the grid of the
    checkpoint to start from. Raises InputError."""
    if config["kind"] == "linear":
        return linear_grid()
    if config["kind"] == "uniform":
        return uniform_grid(config["num_bins"])
    if config["kind"] == "gaussian":
        return gaussian_grid(gaussians(), config["num_bins"], config["min_sigma"])
    if config["kind"] == "checkpoint":
        if kept is None:
            raise InputError("config key grid.kind is 'checkpoint', but no checkpoint with a grid is given")
        return kept
    raise InputError(f"config key grid.kind is {config['kind']!r}; choose gaussian, uniform, linear or checkpoint")


def fitted_datasets(names: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """The datasets that the grid is fitted to. Raises InputError if none is left."""
    if not (fitted := [name for name in names if find_key(name, exclude) is None]):
        raise InputError(
            f"grid.exclude names every dataset ({', '.join(names)}), so there is nothing to fit the grid to: "
            "set --config.grid.exclude=()"
        )
    return fitted


def fitted_actions(loader: Loader, exclude: Sequence[str]) -> Iterator[Float[np.ndarray, "N A"]]:
    """The normalised actions that the grid is fitted to, one array per dataset of the training split."""
    fitted = fitted_datasets(loader.names, exclude)
    for index in loader.indexes():
        if index.name in fitted:
            yield normalize(index.arrays["action"], loader.statistics[index.name]["action"])


def _gaussians(index: Index, statistics: Mapping[str, Any]) -> Float[np.ndarray, "6 2"]:
    """`fit_gaussians` on a dataset's normalised actions; cached in the index for the dataset's own statistics."""
    if index.gaussians is not None and statistics == index.statistics:
        return np.asarray(index.gaussians)
    return fit_gaussians(normalize(index.arrays["action"], statistics["action"]))


def mixture_gaussians(config: Mapping[str, Any], loader: Loader) -> Float[np.ndarray, "6 2"]:
    """f64[6, 2] (mu, sigma) of the six variables over a config's training split without `grid.exclude`. All frames
    count equally. Read from the file `data.statistics` if set, else computed from the data."""
    fitted = fitted_datasets(loader.names, config["grid"]["exclude"])
    if path := config["data"].get("statistics"):
        return pooled(load_stats(path), fitted)
    indexes = [index for index in loader.indexes() if index.name in fitted]
    gaussians = [_gaussians(index, loader.statistics[index.name]) for index in indexes]
    return pool_gaussians(gaussians, [len(index.arrays["action"]) for index in indexes])
