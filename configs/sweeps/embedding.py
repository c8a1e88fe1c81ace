"""Should the text embeddings be trained (Table IV)? As published they are frozen. Tiny model, committed episodes.

The text embeddings are random here, so freezing them preserves no knowledge, unlike in a pre-trained model.
"""

from spatialvla_jax.config import load_config


def get_sweep():
    base = load_config("demo")
    base.train.update(steps=300, batch_size=16, eval_every=100)
    base.checkpoint.update(every=100, keep_last=1, keep_every=0)
    return {
        "base": base,
        "axes": {
            "text": {
                "frozen": {"optimizer.frozen": ("llm/embedder", "zoe")},
                "trained": {"optimizer.frozen": ("zoe",)},
            }
        },
        "seeds": [0, 1],
    }
