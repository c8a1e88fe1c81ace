"""The demo's conclusion follows from its numbers."""

import pytest

from spatialvla_jax.cli.demo import conclusion


@pytest.mark.parametrize(
    "l1, says",
    [
        (0.4, "L1 is 0.400, no better than predicting the mean action (0.320)"),
        (0.16, "L1 is 0.160, 50% below predicting the mean action (0.320). Holding the last action is better (0.130)"),
        (0.104, "68% below predicting the mean action (0.320) and 20% below holding the last action (0.130)"),
    ],
)
def test_conclusion(l1: float, says: str):
    assert says in conclusion({"l1": l1, "l1_mean_baseline": 0.32, "l1_repeat_baseline": 0.13})
