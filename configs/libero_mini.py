"""About 25 M parameters and images of 126 px on recorded LIBERO demonstrations: runs short enough for a sweep.

spatialvla-jax record libero --episodes 1500 --val-episodes 100 --initial-states drawn --noise 0.2 --spread 0 \
    --image-size 126 --every 3 --out data/libero_spatial_126.pack
spatialvla-jax train --config libero_mini --workdir runs/mini
"""

from spatialvla_jax.config import load_config


def get_config():
    config = load_config("libero_spatial")
    config.model.update(preset="mini", remat="none", unroll=False)  # a loop over the layers compiles sooner
    config.loss.update(target="none", soft_sigma=0.0)  # the paper's loss: a sweep compares with its ablations
    config.data.packed = "data/libero_spatial_126.pack"
    config.train.update(steps=6_000, eval_every=250)  # four validations or more in each quarter
    config.checkpoint.update(every=2_000, keep_last=1)
    return config
