"""The ablations of Table IV from scratch at about 100 M parameters, for one GPU: four resolutions of the Gaussian and
the uniform grid and the 256-bin baseline, which has but one, each with Ego3D and without; two seeds, 36 trials.

On LIBERO-Spatial from a packed file, which needs no TensorFlow where it is trained:

    spatialvla-jax record libero --episodes 400 --val-episodes 50 --out data/libero_spatial
    spatialvla-jax data pack --config configs/demo.py --image-size 224 --out data/libero_spatial.pack \\
        --config.data.datasets="[{'name': 'libero_spatial', 'spec': 'libero', 'path': 'data/libero_spatial/1.0.0'}]"
    spatialvla-jax sweep --config configs/sweeps/libero_small.py --workdir runs/libero_small

Another file: --config.data.packed=FILE. Shorter: --config.train.steps=2000. First one seed: --only '*_seed-0'.
"""

from spatialvla_jax.actions import PRESET_BINS
from spatialvla_jax.config import load_config


def get_sweep():
    base = load_config("configs/demo.py")
    base.model.update(preset="small", dtype="bfloat16")
    base.data.update(datasets=[], packed="data/libero_spatial.pack")
    base.optimizer.update(learning_rate=3e-4, warmup=0.05)
    base.train.update(steps=5000, batch_size=128, log_every=50, eval_every=500)
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
            "ego3d": {"on": {"model.depth": "dataset"}, "off": {"model.depth": "none"}},
        },
        "seeds": [0, 1],
        "keep_checkpoints": False,  # a gigabyte a trial
    }
