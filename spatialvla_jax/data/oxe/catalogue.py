"""One entry per dataset; the name is what a config's `spec` says."""

from spatialvla_jax.data.oxe.spec import DatasetSpec

CATALOGUE: dict[str, DatasetSpec] = {
    # Our own recordings. Actions are LIBERO's: controller units in [-1, 1], gripper -1 open, +1 close.
    "libero": DatasetSpec(
        depth="observation/depth",
        intrinsics="observation/intrinsics",
        operations=(("clip_gripper", 0.0, 1.0), ("invert_gripper",)),
    ),
    # LIBERO as OpenVLA published it in RLDS ("no_noops"): the same actions, no depth and no camera.
    "libero_no_noops": DatasetSpec(operations=(("clip_gripper", 0.0, 1.0), ("invert_gripper",))),
    # BridgeData V2 from the project's own site.
    "bridge_orig": DatasetSpec(
        image="observation/image_0",
        arrays=("observation/state",),
        operations=(("drop_first",), ("binarize_gripper",), ("relabel_from_state", "observation/state")),
        skip_unlabeled=True,
    ),
    # RT-1's data, as in Open X-Embodiment.
    "fractal20220817_data": DatasetSpec(
        language="observation/natural_language_instruction",
        action=("action/world_vector", "action/rotation_delta", "action/gripper_closedness_action"),
        operations=(("absolute_gripper",),),
        skip_unlabeled=True,
    ),
}
