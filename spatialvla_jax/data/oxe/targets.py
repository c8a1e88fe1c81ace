"""Datasets for fine-tuning: our own recordings, and those that the release and OpenVLA configure for this.

Sources as in published.py. Episodes of T-DROID: comments in the release's data/oxe/configs.py; of LIBERO: OpenVLA's
published statistics.
"""

import math
from typing import Any

from spatialvla_jax.data.oxe.published import CLOSED_IS_ONE, PUBLISHED
from spatialvla_jax.data.oxe.spec import DatasetSpec

# LIBERO's agentview camera has MuJoCo's default vertical field of view, 45 degrees; OpenVLA rendered 256x256.
_FOCAL = 128 / math.tan(math.radians(22.5))
_LIBERO: dict[str, Any] = {
    "operations": CLOSED_IS_ONE,  # controller units in [-1, 1], gripper -1 open, +1 close
    "default_intrinsics": ((_FOCAL, 0.0, 128.0), (0.0, _FOCAL, 128.0), (0.0, 0.0, 1.0)),
    "default_intrinsics_size": (256, 256),
    "known_camera": True,
    "robot": "Franka (simulated)",
}

TARGETS: dict[str, DatasetSpec] = {
    # Our own recordings.
    "libero": DatasetSpec(
        depth="observation/depth",
        intrinsics="observation/intrinsics",
        operations=CLOSED_IS_ONE,
        robot="Franka (simulated)",
    ),
    # LIBERO as published by OpenVLA in RLDS, replayed without idle steps; it has neither depth nor intrinsics.
    "libero_no_noops": DatasetSpec(**_LIBERO),
    "libero_spatial_no_noops": DatasetSpec(**_LIBERO, episodes=432),
    "libero_object_no_noops": DatasetSpec(**_LIBERO, episodes=454),
    "libero_goal_no_noops": DatasetSpec(**_LIBERO, episodes=428),
    "libero_10_no_noops": DatasetSpec(**_LIBERO, episodes=379),
    "bridge_dataset": PUBLISHED["bridge_orig"],  # under its first name
    # DROID's robot in another lab; uses the other external camera, and no frame filter.
    "droid_wipe": DatasetSpec(
        image="observation/exterior_image_2_left",
        action=("action_dict/cartesian_velocity", "action_dict/gripper_position"),
        operations=(("invert_gripper",),),
        robot="Franka",
    ),
} | {
    # OpenVLA's own tasks on such a robot. The depth is an 8-bit JPEG.
    f"tdroid_{task}": DatasetSpec(
        image="observation/static_image",
        operations=(("binarize_gripper",),),
        unread_depth="observation/static_depth_image",
        robot="Franka",
        episodes=episodes,
    )
    for task, episodes in {
        "carrot_in_bowl": 50,
        "pour_corn_in_pot": 50,
        "flip_pot_upright": 10,
        "move_object_onto_plate": 150,
        "knock_object_over": 70,
        "cover_object_with_towel": 45,
    }.items()
}
