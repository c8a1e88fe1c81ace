"""What a config may add to the loss."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.batches import GRID

from spatialvla_jax.actions import ActionTokenizer, encode, linear_grid, uniform_grid
from spatialvla_jax.training.losses import soft_cross_entropy

OFFSET, TEXT = 5, 5


def cells_of(grid: ActionTokenizer) -> list[tuple[np.ndarray, np.ndarray]]:
    """(indices of each cell along the axes, numbers of cells, 0 for axes that do not close) of each token."""
    if len(grid.token_ranges) == 7:
        return [(np.arange(grid.vocab_size)[:, None], np.zeros(1))] * 6
    theta, phi, r, *rotation = grid.num_bins
    grids = [np.array(list(product(*map(range, bins)))) for bins in ((theta, phi, r), rotation)]
    return list(zip(grids, (np.array([0, phi, 0]), np.zeros(3)), strict=True))


def dense_targets(grid: ActionTokenizer, ids: np.ndarray, sigma: float) -> np.ndarray:
    """f64[B, A + 1, V], every weight written out."""
    flat, n = ids.reshape(len(ids), -1), len(grid.token_ranges)
    targets = np.zeros((len(ids), flat.shape[1] + 1, OFFSET + grid.vocab_size))
    targets[:, -1, 1] = 1
    for row, place in np.ndindex(flat.shape):
        start, size = grid.token_ranges[place % n]
        true = flat[row, place] - start
        if place % n == n - 1:
            weights = np.eye(size)[true]
        else:
            cells, rings = cells_of(grid)[place % n]
            distance = np.abs(cells - cells[true])
            distance = np.where(rings > 0, np.minimum(distance, rings - distance), distance)
            weights = np.exp(-(distance**2).sum(axis=1) / (2 * sigma**2))
        targets[row, place, OFFSET + start : OFFSET + start + size] = weights / weights.sum()
    return targets


@pytest.mark.parametrize(
    ("grid", "sigma"),
    [(GRID, 1.5), (uniform_grid((2, 5, 1, 3, 2, 4)), 0.4), (linear_grid(9), 1.0)],
    ids=["spatial", "uneven", "linear"],
)
def test_soft_targets_are_gaussians_over_neighbouring_cells(grid, sigma) -> None:
    """Loss and gradient against targets written out in float64."""
    rng = np.random.default_rng(0)
    ids = np.asarray(encode(grid, rng.uniform(-1, 1, (3, 2, 7)).astype(np.float32)))
    shape = (3, ids[0].size + 1, OFFSET + grid.vocab_size)
    logits = rng.normal(0, 3, shape).astype(np.float32)
    total = lambda x: soft_cross_entropy(x, jnp.asarray(ids), grid, OFFSET, sigma).sum()  # noqa: E731
    loss, gradient = jax.jit(jax.value_and_grad(total))(logits)
    z = logits.astype(np.float64)
    log_p = z - z.max(axis=-1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=-1, keepdims=True))
    targets = dense_targets(grid, ids, sigma)
    np.testing.assert_allclose(loss, -(targets * log_p).sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient, np.exp(log_p) - targets, atol=2e-6)
