"""How fine should the action grid be? The paper's four vocabularies (Table IV), with the tiny model on the committed
episodes: minutes on two CPU cores. `make sweep` runs it.

Such short training shows how a sweep works, but little about grids: the policies hardly learn to use the images. On a
GPU, train longer: --config.train.steps=2000 --config.train.batch_size=64.
"""

from spatialvla_jax.actions import PRESET_BINS
from spatialvla_jax.config import load_config


def get_sweep():
    base = load_config("demo")
    base.train.update(steps=300, batch_size=16, eval_every=100)
    base.checkpoint.update(every=100, keep_last=1, keep_every=0)
    return {
        "base": base,
        "axes": {"resolution": {str(tokens): {"grid.num_bins": bins} for tokens, bins in PRESET_BINS.items()}},
        "seeds": [0, 1],
    }
