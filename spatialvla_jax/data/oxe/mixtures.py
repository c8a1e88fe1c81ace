"""Named mixtures: (dataset, weight) pairs; weights are multiplied by the datasets' sizes when a run starts.

Names and weights are those of the release (SpatialVLA/SpatialVLA: data/oxe/mixtures.py).
"""

Mixture = tuple[tuple[str, float], ...]

_SHARED: dict[str, float] = {
    "fractal20220817_data": 0.54087122203,
    "kuka": 0.8341046294,
    "bridge_orig": 1.0,
    "taco_play": 2.0,
    "jaco_play": 1.0,
    "berkeley_cable_routing": 1.0,
    "roboturk": 2.0,
    "viola": 2.0,
    "berkeley_autolab_ur5": 2.0,
    "toto": 1.0,
    "language_table": 0.1,
    "stanford_hydra_dataset_converted_externally_to_rlds": 2.0,
    "austin_buds_dataset_converted_externally_to_rlds": 1.0,
    "nyu_franka_play_dataset_converted_externally_to_rlds": 3.0,
    "furniture_bench_dataset_converted_externally_to_rlds": 0.1,
    "ucsd_kitchen_dataset_converted_externally_to_rlds": 2.0,
    "austin_sailor_dataset_converted_externally_to_rlds": 1.0,
    "austin_sirius_dataset_converted_externally_to_rlds": 1.0,
    "dlr_edan_shared_control_converted_externally_to_rlds": 1.0,
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": 1.0,
    "utaustin_mutex": 1.0,
    "berkeley_fanuc_manipulation": 2.0,
    "cmu_stretch": 1.0,
    "bc_z": 0.2,
    "fmb_dataset": 1.0,
    "dobbe": 0.2,
    "droid": 0.06,
}
# Lower weights for data without instructions or of low quality; adds RH20T.
_SPATIAL = _SHARED | {
    "kuka": 0.4,
    "toto": 0.5,
    "berkeley_fanuc_manipulation": 0.5,
    "fmb_dataset": 0.2,
    "rh20t_rlds": 0.015,
}
_LIBERO_SUITES = ("spatial", "object", "goal", "10")

MIXTURES: dict[str, Mixture] = {
    "oxe_magic_soup_plus": tuple(_SHARED.items()),
    "oxe_spatial_vla_plus": tuple(_SPATIAL.items()),
    # For the last third of the published run: without DROID.
    "oxe_spatial_vla_plus_stage2": tuple(item for item in _SPATIAL.items() if item[0] != "droid"),
    "bridge": (("bridge_orig", 1.0),),
    "fractal": (("fractal20220817_data", 1.0),),
    "bridge_rt_1": (("bridge_orig", 1.0), ("fractal20220817_data", 1.0)),
    **{f"libero_{suite}": ((f"libero_{suite}_no_noops", 1.0),) for suite in _LIBERO_SUITES},
    "libero_all": tuple((f"libero_{suite}_no_noops", 1.0) for suite in _LIBERO_SUITES),
}
