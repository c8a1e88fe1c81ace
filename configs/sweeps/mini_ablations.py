"""The ablations of Table IV with about 25 M parameters: one axis at a time around 8194 Gaussian tokens, Ego3D, random
crops and chunks of four; three seeds, 39 trials. Each is also evaluated in simulation: 210 episodes over the
seeds, with initial states that are not in the recording.

    spatialvla-jax record libero --episodes 1500 --val-episodes 100 --initial-states drawn --noise 0.2 --spread 0 \\
        --image-size 126 --every 3 --out data/libero_spatial_126.pack
    spatialvla-jax sweep --config sweeps/mini_ablations --workdir runs/mini_ablations --parallel 12

A random crop moves the camera, and only Ego3D's intrinsics tell the model so. The crop is therefore an axis too: the
fixed one is the whole image, for which moved and unmoved intrinsics are equal.

Measured with six trials at once on an H200 with 16 cores, 2026-12-01: rendering takes 129 s, and a trial's step 10.6 ms
of GPU time, so 39 trials of 6,000 steps take 41 minutes. A trial needs 3.3 GB. The six trials reached their plateau
but solved only 4 of 217 episodes, see docs/results/ablations.md.
"""

from spatialvla_jax.actions import PRESET_BINS


def get_sweep():
    bins = {130: (4, 8, 2, 4, 4, 4), 386: (6, 12, 4, 4, 4, 6), **PRESET_BINS}
    whole = {"augment.crop_area": 1.0, "augment.crop_area_max": 0.0}
    flat = {"model.depth_source": "none"}
    return {
        "base": "libero_mini",
        "axes": {
            "resolution": {str(tokens): {"grid.num_bins": bins[tokens]} for tokens in (130, 386, 1026, 4610, 8194)},
            "grid": {"Gaussian": {}, "uniform": {"grid.kind": "uniform"}, "256 bins": {"grid.kind": "linear"}},
            "Ego3D": {
                "moved intrinsics, random crop": {},
                "unmoved intrinsics, random crop": {"augment.move_intrinsics": False},
                "none, random crop": flat,
                "intrinsics, fixed crop": whole,
                "none, fixed crop": flat | whole,
            },
            "chunk": {str(actions): {"model.action_chunk": actions} for actions in (1, 4, 8)},
        },
        "reference": {
            "resolution": "8194",
            "grid": "Gaussian",
            "Ego3D": "moved intrinsics, random crop",
            "chunk": "4",
        },
        "seeds": [0, 1, 2],
        "closed_loop": {"episodes": 7},  # of each of ten tasks
        "keep_checkpoints": False,
    }
