"""The demo: the tiny preset on recorded LIBERO-Spatial episodes, minutes on two CPU cores."""

from spatialvla_jax.config import default_config


def get_config():
    config = default_config()
    config.model.update(preset="tiny", depth="dataset", dtype="float32", remat="none")
    config.data.datasets = [
        {"name": "libero_spatial", "spec": "libero", "path": "data/libero_spatial_demo/1.0.0", "weight": 1.0}
    ]
    config.data.prompt.length = 32
    config.grid.min_sigma = 0.0
    config.optimizer.update(learning_rate=1e-3, warmup=0.05)
    config.train.update(steps=400, batch_size=32, log_every=10, eval_every=100)
    config.checkpoint.update(every=50, keep_last=2, keep_every=100)
    return config
