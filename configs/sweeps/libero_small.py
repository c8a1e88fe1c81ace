"""The ablations of Table IV, from scratch at about 100 M parameters, for one GPU: four resolutions of the Gaussian and
the uniform grid, and the 256-bin baseline, each with and without Ego3D; two seeds, 36 trials.

On LIBERO-Spatial, from a packed file, so training needs no TensorFlow:

    spatialvla-jax record libero --episodes 400 --val-episodes 50 --initial-states drawn --noise 0.2 --spread 0 \\
        --image-size 224 --every 3 --out data/libero_spatial.pack
    spatialvla-jax sweep --config sweeps/libero_small --workdir runs/libero_small

For another file: --config.data.packed=FILE. For shorter training: --config.train.steps=600. For one seed first: --only
'*_seed-0'. A trial leaves much of a GPU idle while it compiles and evaluates, so use --parallel 4.
"""

from spatialvla_jax.actions import PRESET_BINS
from spatialvla_jax.config import load_config


def get_sweep():
    base = load_config("libero_spatial")
    # Ten programs: fast compilation matters more than the last percent of step time. Four trials fit on a GPU.
    base.model.update(unroll=False, remat="dots")
    base.data.packed = "data/libero_spatial.pack"
    base.optimizer.ema = 0.0  # an average would hide how soon a trial learns
    base.train.update(steps=5000, eval_every=500, eval_frames=0)
    base.checkpoint.update(every=1000, keep_last=1, keep_every=0)
    grids = {
        f"{kind} {tokens}": {"grid.kind": kind, "grid.num_bins": bins}
        for kind in ("gaussian", "uniform")
        for tokens, bins in PRESET_BINS.items()
    }
    return {
        "base": base,
        "axes": {
            "grid": grids | {"linear 256": {"grid.kind": "linear"}},
            "ego3d": {"on": {"model.depth_source": "dataset"}, "off": {"model.depth_source": "none"}},
        },
        "seeds": [0, 1],
        "keep_checkpoints": False,  # a gigabyte a trial
    }
