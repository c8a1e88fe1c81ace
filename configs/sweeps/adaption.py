"""What is spatial embedding adaption worth in post-training (Table V)?

Either the grid is fitted to the new data and the spatial table adapted to it, or both are unchanged. Either all
parameters are trained, or adapters of the published rank and alpha. As in the release, runs with adapters train the
spatial table in full if it is adapted, and freeze it otherwise.

Tiny model on half of the committed episodes, pre-trained on the other half with a broader grid (min_sigma 0.5, as
published):

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
        # One axis, because both choices together decide what is frozen.
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
