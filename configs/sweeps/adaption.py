"""What spatial embedding adaption is worth in post-training (Table V): the grid fitted to the new data and the spatial
table adapted to it, or both as they were; all parameters trained, or adapters of the published rank and alpha. As in
the release, with adapters the spatial table is trained in full where it is adapted, and frozen where it is not.

Tiny model, committed episodes: half of them, the other half with a broader grid (min_sigma 0.5, as published) being
what it was pre-trained on:

    spatialvla-jax train --config demo --workdir runs/pretrained \\
        --config.data.split='train[:50%]' --config.grid.min_sigma=0.5 --config.train.steps=400
"""

from spatialvla_jax.config import load_config


def get_sweep():
    base = load_config("demo")
    base.init = "runs/pretrained"
    base.data.split = "train[50%:]"
    base.train.update(steps=100, eval_every=20)
    base.checkpoint.update(every=50, keep_last=1, keep_every=0)
    adapted, kept = {"adapt.embedding": True}, {"grid.kind": "checkpoint"}
    full = {"optimizer.learning_rate": 3e-4}
    lora = {"lora.rank": 32, "lora.alpha": 32.0, "optimizer.learning_rate": 2e-3}
    return {
        "base": base,
        # One axis, as what is frozen depends on both choices.
        "axes": {
            "post-training": {
                "with adaption, full": adapted | full,
                "without, full": kept | full,
                "with adaption, LoRA": adapted | lora,
                "without, LoRA": kept | lora | {"optimizer.frozen": ("zoe", "spatial_embedding")},
            }
        },
        "seeds": [0, 1],
    }
