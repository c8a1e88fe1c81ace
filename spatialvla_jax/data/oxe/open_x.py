"""The other Open X-Embodiment datasets that the release configures but no published mixture contains.

Sources as in published.py. Here, however, the dataset's documentation (tensorflow/datasets: docs/catalog/<name>.md)
takes precedence over the release; comments mark such places.
"""

from spatialvla_jax.data.oxe.published import CLOSED_IS_ONE, CLOSEDNESS, NATURAL
from spatialvla_jax.data.oxe.spec import DatasetSpec

# A wheeled robot: it moves forward and sideways, and has neither arm nor hand.
_WHEELS = ("action", 0.0, 0.0, 0.0, 0.0, 0.0)

OPEN_X: dict[str, DatasetSpec] = {
    # The copy of BridgeData V2 in the first Open X-Embodiment release.
    "bridge_oxe": DatasetSpec(
        language=NATURAL,
        action=("action/world_vector", "action/rotation_delta", "action/open_gripper"),
        arrays=("observation/state",),
        operations=(("drop_first",), ("relabel_from_state", "observation/state")),
        known_camera=True,
        tfds_name="bridge",
        robot="WidowX",
        episodes=25_460,
    ),
    "roboturk_tiny": DatasetSpec(
        image="observation/front_rgb",
        language=NATURAL,
        action=CLOSEDNESS,
        operations=CLOSED_IS_ONE,
        robot="Sawyer",
    ),
    # Its only camera is on the hand. The release asks for an external one and gets black images.
    "nyu_door_opening_surprising_effectiveness": DatasetSpec(
        language=NATURAL,
        action=CLOSEDNESS,
        operations=(("absolute_gripper",),),
        robot="Hello Stretch",
        episodes=435,
    ),
    # Documented: +1 closes, -1 opens, 0 keeps the state. The release uses it unchanged.
    "columbia_cairlab_pusht_real": DatasetSpec(
        language=NATURAL,
        action=CLOSEDNESS,
        operations=(("absolute_gripper",),),
        robot="UR5",
        episodes=122,
    ),
    "stanford_kuka_multimodal_dataset_converted_externally_to_rlds": DatasetSpec(
        action=("action[:3]", 0.0, 0.0, 0.0, "action[3]"),
        unread_depth="observation/depth_image",
        robot="Kuka iiwa",
        episodes=3_000,
    ),
    "nyu_rot_dataset_converted_externally_to_rlds": DatasetSpec(robot="xArm", episodes=14),
    # Documented: 1 means 0.1 m or an axis-angle of 0.1 rad; the gripper goes from -1, closed, to 1; depth is in 1/1024
    # m. The release uses the action unchanged.
    "maniskill_dataset_converted_externally_to_rlds": DatasetSpec(
        operations=(
            ("scale", 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 1.0),
            ("to_euler", "axis_angle"),
            ("gripper_range", -1.0, 1.0),
        ),
        depth="observation/depth",
        depth_unit=1 / 1024,
        intrinsics="observation/main_camera_intrinsic_cv",
        robot="Franka (simulated)",
        episodes=30_213,
    ),
    "cmu_franka_exploration_dataset_converted_externally_to_rlds": DatasetSpec(
        image="observation/highres_image", action=("action[:7]",), robot="Franka", episodes=199
    ),
    "ucsd_pick_and_place_dataset_converted_externally_to_rlds": DatasetSpec(
        action=("action[:3]", 0.0, 0.0, 0.0, "action[3]"), robot="xArm", episodes=1_355
    ),
    "utokyo_pr2_opening_fridge_converted_externally_to_rlds": DatasetSpec(
        action=("action[:7]",), robot="PR2", episodes=64
    ),
    "utokyo_pr2_tabletop_manipulation_converted_externally_to_rlds": DatasetSpec(
        action=("action[:7]",), robot="PR2", episodes=192
    ),
    "utokyo_xarm_pick_and_place_converted_externally_to_rlds": DatasetSpec(robot="xArm", episodes=92),
    # Two arms; uses the right one.
    "utokyo_xarm_bimanual_converted_externally_to_rlds": DatasetSpec(
        action=("action[7:]",), robot="xArm, two", episodes=64
    ),
    # x, y, z, rotation about z, gripper. The release uses the rotation as the first of the three angles.
    "robo_net": DatasetSpec(
        action=("action[:3]", 0.0, 0.0, "action[3:]"), robot="Sawyer, Baxter, Franka and others", episodes=82_775
    ),
    # Actions are in joint space, so the motion is derived from the stored pose of the hand. The order of its quaternion
    # is undocumented; x, y, z, w is assumed. The only camera is on the hand.
    "berkeley_mvp_converted_externally_to_rlds": DatasetSpec(
        image="observation/hand_image",
        action=(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, "observation/gripper"),
        arrays=("observation/pose",),
        operations=(("relabel_from_state", "observation/pose", "quaternion"), ("invert_gripper",)),
        robot="xArm",
        episodes=480,
    ),
    # Residuals of the pose, with axis-angle, then joint gains. Nothing is grasped.
    "kaist_nonprehensile_converted_externally_to_rlds": DatasetSpec(
        action=("action[:6]", 0.0), operations=(("to_euler", "axis_angle"),), robot="Franka", episodes=201
    ),
    # x, y, z, rotation about z, gripper from 1, closed, to -1. The release uses the rotation as the first of the three
    # angles and leaves the gripper unchanged.
    "stanford_mask_vit_converted_externally_to_rlds": DatasetSpec(
        action=("action[:3]", 0.0, 0.0, "action[3:]"),
        operations=(("gripper_range", 1.0, -1.0),),
        robot="Sawyer",
        episodes=9_109,
    ),
    "tokyo_u_lsmo_converted_externally_to_rlds": DatasetSpec(robot="Cobotta", episodes=50),
    "dlr_sara_pour_converted_externally_to_rlds": DatasetSpec(robot="DLR SARA", episodes=100),
    "dlr_sara_grid_clamp_converted_externally_to_rlds": DatasetSpec(robot="DLR SARA", episodes=107),
    "asu_table_top_converted_externally_to_rlds": DatasetSpec(robot="UR5", episodes=110),
    "stanford_robocook_converted_externally_to_rlds": DatasetSpec(
        image="observation/image_1", unread_depth="observation/depth_1", robot="Franka", episodes=2_460
    ),
    "imperialcollege_sawyer_wrist_cam": DatasetSpec(action=("action[:7]",), robot="Sawyer", episodes=170),
    "uiuc_d3field": DatasetSpec(
        image="observation/image_1",
        action=("action", 0.0, 0.0, 0.0, 0.0),
        depth="observation/depth_1",
        robot="Kinova Gen3",
        episodes=192,
    ),
    "cmu_playing_with_food": DatasetSpec(operations=(("to_euler", "quaternion"),), robot="Franka", episodes=4_200),
    # Change of position and quaternion, gripper, end of the episode. The release uses the last four numbers as rotation
    # and gripper.
    "cmu_play_fusion": DatasetSpec(
        action=("action[:8]",), operations=(("to_euler", "quaternion"),), robot="Franka", episodes=576
    ),
    "berkeley_gnm_recon": DatasetSpec(action=_WHEELS, robot="Jackal", episodes=11_834),
    "berkeley_gnm_cory_hall": DatasetSpec(action=_WHEELS, robot="RC car", episodes=7_331),
    "berkeley_gnm_sac_son": DatasetSpec(action=_WHEELS, robot="TurtleBot 2", episodes=2_955),
}
