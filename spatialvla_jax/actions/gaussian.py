"""Build action grids with bins of equal probability under fitted Gaussians (paper III-B), or of equal width."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.special import log_ndtr, ndtri_exp

from spatialvla_jax.actions.grid import RANGES, VARIABLES, ActionGrid, to_spherical
from spatialvla_jax.actions.normalization import in_parts, mean_and_std
from spatialvla_jax.errors import InputError

# (mu, sigma) of theta, phi, r, roll, pitch, yaw over the published pre-training mixture.
PRETRAIN_GAUSSIANS = (
    (1.8739714125737532, 0.779843323370511),
    (0.08796911369129973, 1.6921243756107702),
    (0.5480865478719801, 0.34749763559260854),
    (-0.016498618557435858, 0.3804899850542066),
    (0.028462961721089787, 0.29912182728829634),
    (-0.004913600039079129, 0.39022979006490277),
)

# Bins of theta, phi, r, roll, pitch, yaw by vocabulary size. The paper names 4610 and 6166 without their factors, so we
# chose them: about as many translations as rotations, phi twice as fine as theta, equal rotation axes.
PRESET_BINS = {
    1026: (8, 16, 4, 8, 8, 8),
    4610: (12, 24, 8, 12, 12, 16),
    6166: (15, 38, 6, 14, 14, 14),
    8194: (16, 32, 8, 16, 16, 16),
}

# Narrowest bin, as a fraction of its variable's range, so that float32 separates edges and centres.
_MIN_WIDTH = 1e-5


def gaussian_grid(
    stats: Sequence[Sequence[float]] | Float[np.ndarray, "6 2"],
    num_bins: Sequence[int] | np.ndarray = PRESET_BINS[8194],
    min_sigma: float = 0.5,
) -> ActionGrid:
    """The grid whose bins have equal probability under each variable's Gaussian, cut at the variable's range.

    Args:
        stats: [6, 2] (mu, sigma) of theta, phi, r, roll, pitch, yaw, as `fit_gaussians` returns them.
        num_bins: bins of the same six variables.
        min_sigma: floor of sigma; 0.5 in pre-training, 0 in fine-tuning (reference implementation).

    Any finite mu and any sigma >= 0 gives increasing edges: no bin is narrower than 1e-5 of its range.
    Raises InputError for statistics or bin counts that have another shape, are not finite, or are negative.
    """
    stats = np.asarray(stats, np.float64)
    if stats.shape != (6, 2) or not np.isfinite(stats).all() or (stats[:, 1] < 0).any():
        raise InputError(f"Grid statistics must be six finite (mu, sigma) pairs with sigma >= 0, not {stats.tolist()}.")
    _check_bins(num_bins)
    return _grid(
        [
            _quantiles(mu, max(sigma, min_sigma), *bounds, n)
            for (mu, sigma), bounds, n in zip(stats, RANGES, map(int, num_bins), strict=True)
        ]
    )


def uniform_grid(num_bins: Sequence[int] | np.ndarray = PRESET_BINS[8194]) -> ActionGrid:
    """The grid with bins of equal width in theta, phi, r, roll, pitch and yaw. Raises InputError for bad bin counts."""
    _check_bins(num_bins)
    return _grid([np.linspace(*bounds, n + 1) for bounds, n in zip(RANGES, num_bins, strict=True)])


def fit_gaussians(actions: Float[np.ndarray, "*B A"]) -> Float[np.ndarray, "6 2"]:
    """Normalised actions → f64[6, 2], the maximum-likelihood (mu, sigma) of theta, phi, r, roll, pitch, yaw.

    Raises InputError for no actions, another width, or non-finite values.
    """
    actions = np.asarray(actions, np.float32)
    if actions.ndim < 2 or actions.shape[-1] != 7 or not actions.size or not np.isfinite(actions).all():
        raise InputError(f"Gaussians are fitted to finite actions of shape [..., 7], not {actions.shape}.")
    values = np.concatenate([grid_variables(part) for part in in_parts(actions.reshape(-1, 7))])
    return np.stack(mean_and_std(values), -1)


def grid_variables(actions: Float[np.ndarray, "*B 7"]) -> Float[np.ndarray, "*B 6"]:
    """theta, phi, r, roll, pitch, yaw of normalised actions, f32, clipped to [-1, 1] first."""
    return np.concatenate([to_spherical(actions[..., :3]), actions[..., 3:6].clip(-1, 1)], -1)


def pool_gaussians(gaussians: Sequence[Float[np.ndarray, "6 2"]], counts: Sequence[int]) -> Float[np.ndarray, "6 2"]:
    """Merge results of `fit_gaussians`, given the `counts` of actions, into the fit of all actions: f64[6, 2]."""
    mu, sigma = np.moveaxis(np.asarray(gaussians, np.float64), -1, 0)
    mean = np.average(mu, axis=0, weights=counts)
    return np.stack([mean, np.sqrt(np.average(sigma**2 + (mu - mean) ** 2, axis=0, weights=counts))], -1)


def _quantiles(mu: float, sigma: float, low: float, high: float, n: int) -> Float[np.ndarray, " n"]:
    """n + 1 edges of equal probability under N(mu, sigma) on [low, high], in float64."""
    # Log probabilities of the lower tail keep their precision where probabilities round to 0 or 1, so mirror a Gaussian
    # whose mean lies left of the range's middle.
    if mu < (low + high) / 2:
        return -_quantiles(-mu, sigma, -high, -low, n)[::-1]
    sigma = max(sigma, _MIN_WIDTH * (high - low))
    log_low, log_high = log_ndtr((np.array([low, high]) - mu) / sigma)
    part = np.arange(1, n) / n
    inner = mu + sigma * ndtri_exp(np.logaddexp(log_low + np.log1p(-part), log_high + np.log(part)))
    edges = np.concatenate([[low], inner.clip(low, high), [high]])
    # Push coinciding edges apart: first upwards, then downwards.
    gaps = _MIN_WIDTH * (high - low) * np.arange(n + 1)
    edges = np.maximum.accumulate(edges - gaps)
    edges = np.minimum.accumulate(np.minimum(edges, high - gaps[-1])[::-1])[::-1]
    return edges + gaps


def _check_bins(num_bins: Sequence[int] | np.ndarray) -> None:
    if len(num_bins) != 6 or any(n != int(n) or not 1 <= n < 1 / _MIN_WIDTH for n in num_bins):
        raise InputError(f"num_bins must be six positive counts for {', '.join(VARIABLES)}, not {list(num_bins)}.")


def _grid(edges: list[Float[np.ndarray, " _"]]) -> ActionGrid:
    return ActionGrid(*(jnp.asarray(e, jnp.float32) for e in edges))
