"""Two factors and three seeds with the smallest model on the committed episodes: the sample report beside this file.

spatialvla-jax sweep --config docs/guides/sample_sweep/two_factors.py --workdir runs/sample_sweep
"""

from spatialvla_jax.actions import PRESET_BINS
from spatialvla_jax.config import load_config


def get_sweep():
    base = load_config("demo")
    base.model.preset = "nano"
    base.optimizer.update(learning_rate=2e-3)
    base.train.update(steps=400, batch_size=16, eval_every=25, log_every=20)
    base.checkpoint.update(every=400, keep_last=1, keep_every=0)
    return {
        "base": base,
        "axes": {
            "resolution": {str(tokens): {"grid.num_bins": PRESET_BINS[tokens]} for tokens in (8194, 4610, 1026)},
            "Ego3D": {"on": {"model.depth_source": "dataset"}, "off": {"model.depth_source": "none"}},
        },
        "seeds": [0, 1, 2],
        "keep_checkpoints": False,
    }
