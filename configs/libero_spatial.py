"""From scratch on recorded LIBERO-Spatial demonstrations, for closed-loop evaluation; see benchmarks/closed_loop.py.

spatialvla-jax record libero --episodes 3000 --val-episodes 100 --initial-states drawn --noise 0.2 --spread 0 \
    --image-size 224 --every 3 --out DIR/set.pack
spatialvla-jax train --config libero_spatial --workdir DIR/run --config.data.packed=DIR/set.pack
spatialvla-jax evaluate --closed-loop libero_spatial --checkpoint DIR/run --image-size 224
"""

from spatialvla_jax.config import default_config


def get_config():
    config = default_config()
    config.model.update(preset="small", depth_source="dataset", remat="none", unroll=True)
    config.data.prompt.length = 32
    config.grid.min_sigma = 0.0
    # Crops of all sizes up to the whole image, which the policy gets later. The light never changes in simulation.
    config.augment.update(crop_area=0.8, crop_area_max=1.0, brightness=0.05, contrast=0.05, saturation=0.05, hue=0.01)
    # Random weights: text embeddings learn too, at a rate for training from scratch.
    config.optimizer.update(learning_rate=4e-4, warmup=0.03, weight_decay=0.05, frozen=(), ema=0.999)
    config.loss.update(target="metres", target_weight=3.0, soft_sigma=1.0)
    config.train.update(steps=17_000, batch_size=64, log_every=100, eval_every=1_000, eval_frames=512)
    config.checkpoint.update(every=4_000, keep_last=1)
    return config
