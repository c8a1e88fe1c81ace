"""Pre-training with the published recipe: 28 datasets, batch 2048, linear decay from 2e-5, text embeddings and depth
model frozen; DROID leaves for the last third.

The datasets are in the directories DIR/<name>/<version>, as TFDS stores them: --config.data.root=DIR. The paper gives
ten days on 64 A100, not a number of steps: docs/guides/plan.md estimates 225,000.
"""

from spatialvla_jax.config import default_config


def get_config():
    config = default_config()
    config.data.update(mixture="oxe_spatial_vla_plus", root="data", drop={"droid": 2 / 3})
    config.data.split = "train[:95%]"  # few datasets have a validation split
    config.train.update(steps=120_000, batch_size=2048, eval_split="train[95%:]", eval_frames=20_480)
    return config
