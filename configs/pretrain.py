"""Pre-training with the published recipe: batch 2048, linear decay from 2e-5, text embeddings and depth model frozen.

The published run is given as ten days on 64 A100, not as a number of steps: set `train.steps` to what you have.
"""

from spatialvla_jax.config import default_config


def get_config():
    config = default_config()
    config.data.datasets = [
        {"name": "bridge_orig", "spec": "bridge_orig", "path": "data/bridge_orig/1.0.0", "weight": 1.0},
        {
            "name": "fractal20220817_data",
            "spec": "fractal20220817_data",
            "path": "data/fractal20220817_data/0.1.0",
            "weight": 1.0,
        },
    ]
    config.train.update(steps=120_000, batch_size=2048, eval_every=0)  # fractal has no validation split
    return config
