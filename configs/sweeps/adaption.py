"""What spatial embedding adaption is worth in post-training (Table V): the grid fitted to the new data and the spatial
table adapted to it, or both as they were; all parameters trained, or adapters. Tiny model, committed episodes: half of
them, the other half with a broader grid (min_sigma 0.5, as published) being what it was pre-trained on:

    spatialvla-jax train --config configs/demo.py --workdir runs/pretrained \\
        --config.data.split='train[:50%]' --config.grid.min_sigma=0.5 --config.train.steps=400
"""

from spatialvla_jax.config import load_config


def get_sweep():
    base = load_config("configs/demo.py")
    base.init = "runs/pretrained"
    base.data.split = "train[50%:]"
    base.train.update(steps=100, eval_every=20)
    base.checkpoint.update(every=50, keep_last=1, keep_every=0)
    return {
        "base": base,
        "axes": {
            "adaption": {
                "with": {"adapt.embedding": True},
                "without": {"grid.kind": "checkpoint"},
            },
            "training": {
                "full": {"optimizer.learning_rate": 3e-4},
                "lora": {"lora.rank": 8, "lora.alpha": 8.0, "optimizer.learning_rate": 2e-3},
            },
        },
        "seeds": [0, 1],
    }
