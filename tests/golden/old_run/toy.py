from spatialvla_jax.config import default_config


def get_config():
    config = default_config()
    config.model.update(preset="nano", depth="dataset", dtype="float32", remat="none")
    config.data.datasets = [{"name": "toy", "spec": "libero", "path": "RLDS", "weight": 1.0}]
    config.data.update(cache_dir="CACHE", workers=1)
    config.data.prompt.length = 32
    config.grid.num_bins = (4, 4, 2, 4, 4, 4)
    config.optimizer.learning_rate = 1e-3
    config.train.update(steps=40, batch_size=8, log_every=1, eval_every=0)
    config.checkpoint.update(every=5, keep_last=2)
    return config
