"""What is spatial embedding adaption worth in post-training (Table V)? About 100 M parameters, for one GPU.

A run on LIBERO-Spatial continues on LIBERO-Object. Either the grid is fitted to the new data and the spatial table
adapted to it, or both are unchanged. Either all parameters are trained, or adapters of the published rank. Two seeds,
8 trials. To make the checkpoint and the data that they start from:

    python benchmarks/closed_loop.py --workdir runs/libero_spatial
    spatialvla-jax record libero --suite libero_object --episodes 500 --val-episodes 50 --initial-states drawn \\
        --image-size 224 --out runs/libero_object.pack
    spatialvla-jax sweep --config sweeps/libero_adaption --workdir runs/libero_adaption

For another run: --config.init=RUN. For another file: --config.data.packed=FILE. For one seed first: --only '*_seed-0'.
"""

from spatialvla_jax.config import load_config


def get_sweep():
    base = load_config("libero_spatial")
    base.init = "runs/libero_spatial/full"
    # The trials are short, so fast compilation matters more than the last percent of step time. Four fit on a GPU.
    base.model.update(unroll=False, remat="dots")
    base.data.packed = "runs/libero_object.pack"
    base.optimizer.ema = 0.0  # an average over a thousand steps would hide how soon a trial learns
    base.train.update(steps=1_000, eval_every=50)  # often: the report compares steps to the same validation loss
    base.checkpoint.update(every=500, keep_last=1, keep_every=0)
    return {
        "base": base,
        "axes": {
            "adaption": {
                "with": {"adapt.embedding": True},
                "without": {"grid.kind": "checkpoint"},
            },
            "method": {
                "full": {"optimizer.learning_rate": 1e-4},
                "lora": {"lora.rank": 32, "lora.alpha": 32.0, "optimizer.learning_rate": 5e-4},
            },
        },
        "seeds": [0, 1],
        "keep_checkpoints": False,  # a gigabyte a trial
    }
