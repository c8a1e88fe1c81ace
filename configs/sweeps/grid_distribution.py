"""Which distribution should the action grid follow (Table IV)? Gaussians fitted to the data, none (equal bins), or no
grid at all but 256 bins per dimension and seven tokens per action. Tiny model, committed episodes."""

from spatialvla_jax.config import load_config


def get_sweep():
    base = load_config("demo")
    base.train.update(steps=300, batch_size=16, eval_every=100)
    base.checkpoint.update(every=100, keep_last=1, keep_every=0)
    return {"base": base, "axes": {"grid.kind": ["gaussian", "uniform", "linear"]}, "seeds": [0, 1]}
