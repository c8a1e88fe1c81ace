"""What is spatial embedding adaption worth in post-training (Table V)? About 25 M parameters, from LIBERO-Spatial to
LIBERO-Object and back.

Either the grid is fitted to the new data and the spatial table adapted to it, or both are unchanged. Trained are all
parameters but the text embeddings (as published), all parameters, or adapters of the published rank. Three seeds, 36
trials. Each is also evaluated in simulation, on initial states that are in no recording.

    for suite in spatial object; do
        spatialvla-jax record libero --suite libero_$suite --episodes 1500 --val-episodes 100 --initial-states drawn \\
            --noise 0.2 --spread 0 --image-size 126 --every 3 --out data/libero_${suite}_126.pack
        spatialvla-jax train --config libero_mini --workdir runs/mini_$suite \\
            --config.data.packed=data/libero_${suite}_126.pack
    done
    spatialvla-jax sweep --config sweeps/mini_adaption --workdir runs/mini_adaption --parallel 12
"""

from spatialvla_jax.config import load_config


def get_sweep():
    base = load_config("libero_mini")
    base.optimizer.ema = 0.0  # an average over a thousand steps would hide how soon a trial learns
    base.train.update(steps=2_000, eval_every=50)  # often: the report compares steps to the same validation error
    base.checkpoint.every = 1_000

    def direction(old: str, new: str) -> dict[str, str]:
        return {"init": f"runs/mini_{old}", "data.packed": f"data/libero_{new}_126.pack"}

    full = {"optimizer.learning_rate": 1e-4}
    return {
        "base": base,
        "axes": {
            "direction": {
                "Spatial to Object": direction("spatial", "object"),
                "Object to Spatial": direction("object", "spatial"),
            },
            "adaption": {"with": {"adapt.embedding": True}, "without": {"grid.kind": "checkpoint"}},
            "trained": {
                "all but text embeddings": full | {"optimizer.frozen": ("llm/embedder",)},
                "all": full,
                "LoRA": {"lora.rank": 32, "lora.alpha": 32.0, "optimizer.learning_rate": 5e-4},
            },
        },
        "seeds": [0, 1, 2],
        "closed_loop": {"episodes": 7},
        "keep_checkpoints": False,
    }
