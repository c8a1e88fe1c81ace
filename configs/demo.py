"""The demo: the tiny preset on recorded LIBERO-Spatial episodes, minutes on two CPU cores."""

from spatialvla_jax.config import default_config
from spatialvla_jax.utils.shipped import shipped


def get_config():
    config = default_config()
    config.model.update(preset="tiny", depth_source="dataset", dtype="float32", remat="none")
    episodes = str(shipped("data/libero_spatial_demo/1.0.0"))
    config.data.datasets = [{"name": "libero_spatial", "spec": "libero", "path": episodes, "weight": 1.0}]
    config.data.prompt.length = 24
    config.grid.min_sigma = 0.0
    # Few episodes, few steps, one fixed camera: lighter augmentation and a higher rate than the published recipe's.
    config.augment.update(crop_area=0.95, brightness=0.02, contrast=0.02, saturation=0.02, hue=0.005)
    config.optimizer.update(learning_rate=7e-4, warmup=0.05)
    config.train.update(steps=800, batch_size=32, log_every=10, eval_every=200)
    config.checkpoint.update(every=40, keep_last=2, keep_every=80)
    return config
