"""What is the third dimension worth (Table IV): Ego3D on the recorded depth, on ZoeDepth's, or none. Tiny model,
committed episodes.

ZoeDepth is too expensive to run in every step here, so its depth is computed once, before the sweep:

    spatialvla-jax data depth data/libero_spatial_demo/1.0.0 --spec libero --checkpoint ZOEDEPTH --out data/zoedepth

Without ZoeDepth, --only 'depth-[rn]*' runs the other two.
"""

from spatialvla_jax.config import load_config


def get_sweep():
    base = load_config("demo")
    base.train.update(steps=300, batch_size=16, eval_every=100)
    base.checkpoint.update(every=100, keep_last=1, keep_every=0)
    datasets = base.to_dict()["data"]["datasets"]
    estimated = [entry | {"path": "data/zoedepth/libero_spatial_demo/1.0.0"} for entry in datasets]
    sources = {
        "recorded": {"model.depth_source": "dataset"},
        "none": {"model.depth_source": "none"},
        "zoedepth": {"data.datasets": estimated, "data.precomputed_depth": True},
    }
    return {"base": base, "axes": {"depth": sources}, "seeds": [0, 1]}
