"""The 28 datasets on which the published model was trained: those of `oxe_spatial_vla_plus`.

Image, action, gripper and frame filter follow the release (SpatialVLA/SpatialVLA: data/oxe/configs.py,
data/oxe/transforms.py, data/utils/droid_utils.py) even where a dataset's documentation differs. The release's
statistics and weights depend on them. Comments mark such places. Features and counts are from the TFDS catalogue
(tensorflow/datasets: docs/catalog/<name>.md) unless a comment says otherwise.
"""

from spatialvla_jax.data.oxe.spec import DatasetSpec

# The layout of datasets that were collected for RT-X.
NATURAL = "observation/natural_language_instruction"
CLOSEDNESS = ("action/world_vector", "action/rotation_delta", "action/gripper_closedness_action")

# Grippers with 1 for closed, some with -1 for open.
CLOSED_IS_ONE = (("clip_gripper", 0.0, 1.0), ("invert_gripper",))

PUBLISHED: dict[str, DatasetSpec] = {
    # Camera: simpler-env/SimplerEnv, the Google robot's overhead camera at 640x512; the release uses its default.
    "fractal20220817_data": DatasetSpec(
        language=NATURAL,
        action=CLOSEDNESS,
        operations=(("absolute_gripper",),),
        default_intrinsics=((425.0, 0.0, 320.0), (0.0, 425.0, 256.0), (0.0, 0.0, 1.0)),
        default_intrinsics_size=(512, 640),
        known_camera=True,
        robot="Google Robot",
        episodes=87_212,
    ),
    "kuka": DatasetSpec(
        language=NATURAL,
        action=CLOSEDNESS,
        operations=(("absolute_gripper",),),
        robot="Kuka iiwa",
        episodes=580_392,
    ),
    # BridgeData V2 from the project's own site (with the features of today's TFDS `bridge`). Its camera is the one that
    # the release ships (scripts/intrinsics.json). Episodes: both splits, from OpenVLA's published statistics.
    "bridge_orig": DatasetSpec(
        image="observation/image_0",
        arrays=("observation/state",),
        operations=(("drop_first",), ("binarize_gripper",), ("relabel_from_state", "observation/state")),
        known_camera=True,
        robot="WidowX",
        episodes=60_064,
    ),
    # The documentation's words swap open and closed. The release and CALVIN, whose format this is, agree: 1 is open.
    "taco_play": DatasetSpec(
        image="observation/rgb_static",
        language=NATURAL,
        action=("action/rel_actions_world",),
        operations=(("clip_gripper", 0.0, 1.0),),
        unread_depth="observation/depth_static",
        robot="Franka",
        episodes=3_242,
    ),
    "jaco_play": DatasetSpec(
        language=NATURAL,
        action=("action/world_vector", 0.0, 0.0, 0.0, "action/gripper_closedness_action"),
        operations=(("absolute_gripper",),),
        robot="Jaco 2",
        episodes=976,
    ),
    # No gripper: the hand stays closed around the cable.
    "berkeley_cable_routing": DatasetSpec(
        language=NATURAL,
        action=("action/world_vector", "action/rotation_delta", 0.0),
        robot="Franka",
        episodes=1_482,
    ),
    "roboturk": DatasetSpec(
        image="observation/front_rgb",
        language=NATURAL,
        action=CLOSEDNESS,
        operations=CLOSED_IS_ONE,
        robot="Sawyer",
        episodes=1_796,
    ),
    "viola": DatasetSpec(
        image="observation/agentview_rgb",
        language=NATURAL,
        action=CLOSEDNESS,
        operations=CLOSED_IS_ONE,
        robot="Franka",
        episodes=135,
    ),
    "berkeley_autolab_ur5": DatasetSpec(
        language=NATURAL,
        action=CLOSEDNESS,
        operations=(("absolute_gripper",),),
        unread_depth="observation/image_with_depth",
        robot="UR5",
        episodes=896,
    ),
    "toto": DatasetSpec(
        language=NATURAL,
        action=("action/world_vector", "action/rotation_delta", "action/open_gripper"),
        robot="Franka",
        episodes=902,
    ),
    # A stick moving in the plane; the hand counts as open. The instruction is 512 byte values, padded with zeros.
    "language_table": DatasetSpec(
        image="observation/rgb",
        language="observation/instruction",
        action=("action", 0.0, 0.0, 0.0, 0.0, 1.0),
        robot="xArm",
        episodes=442_226,
    ),
    "stanford_hydra_dataset_converted_externally_to_rlds": DatasetSpec(
        operations=(("invert_gripper",),), robot="Franka", episodes=570
    ),
    "austin_buds_dataset_converted_externally_to_rlds": DatasetSpec(
        operations=CLOSED_IS_ONE, robot="Franka", episodes=50
    ),
    # The action starts with 7 joint velocities and ends with the end of the episode.
    "nyu_franka_play_dataset_converted_externally_to_rlds": DatasetSpec(
        action=("action[7:14]",),
        operations=(("clip_gripper", 0.0, 1.0),),
        unread_depth="observation/depth",
        robot="Franka",
        episodes=365,
    ),
    "furniture_bench_dataset_converted_externally_to_rlds": DatasetSpec(
        operations=(("to_euler", "quaternion"), *CLOSED_IS_ONE), robot="Franka", episodes=5_100
    ),
    # Position and orientation are documented as absolute, here and in iamlab_cmu_pickup_insert, cmu_stretch and
    # dlr_edan_shared_control; the release uses them unchanged.
    "ucsd_kitchen_dataset_converted_externally_to_rlds": DatasetSpec(
        action=("action[:7]",), robot="xArm", episodes=150
    ),
    "austin_sailor_dataset_converted_externally_to_rlds": DatasetSpec(
        operations=CLOSED_IS_ONE, robot="Franka", episodes=240
    ),
    "austin_sirius_dataset_converted_externally_to_rlds": DatasetSpec(
        operations=CLOSED_IS_ONE, robot="Franka", episodes=559
    ),
    "dlr_edan_shared_control_converted_externally_to_rlds": DatasetSpec(
        operations=(("invert_gripper",),), robot="DLR EDAN", episodes=104
    ),
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": DatasetSpec(
        operations=(("to_euler", "quaternion"),), robot="Franka", episodes=631
    ),
    "utaustin_mutex": DatasetSpec(operations=CLOSED_IS_ONE, robot="Franka", episodes=1_500),
    # The action has no gripper, so its state is used; the release inverts it although it is called "open status".
    "berkeley_fanuc_manipulation": DatasetSpec(
        action=("action", "observation/state[6]"),
        operations=(("invert_gripper",),),
        robot="Fanuc Mate",
        episodes=415,
    ),
    "cmu_stretch": DatasetSpec(action=("action[:7]",), robot="Hello Stretch", episodes=135),
    # The next ten actions are stored, and the first is used. The rotation is an axis-angle that the release treats as
    # Euler angles: for such small rotations they are nearly equal.
    "bc_z": DatasetSpec(
        language=NATURAL,
        action=(
            "action/future/xyz_residual[:3]",
            "action/future/axis_angle_residual[:3]",
            "action/future/target_close[0]",
        ),
        operations=(("invert_gripper",),),
        tfds_name="bc_z/0.1.0",  # the release: later versions are broken
        robot="Google Robot",
        episodes=39_350,
    ),
    "fmb_dataset": DatasetSpec(
        image="observation/image_side_1",
        unread_depth="observation/image_side_1_depth",
        robot="Franka",
        episodes=8_611,
    ),
    # The only camera is on the hand-held stick.
    "dobbe": DatasetSpec(image="observation/wrist_image", robot="Hello Stretch", episodes=5_208),
    # The release uses one of the two external cameras, drawn for each pass over an episode. It drops frames whose next
    # four actions all keep the arm in place: 1e-5 after normalisation, about 7e-6 before. Features: the builder's
    # printed description. Episodes of version 1.0.0: OpenVLA's published statistics.
    "droid": DatasetSpec(
        image="observation/exterior_image_1_left",
        other_images=("observation/exterior_image_2_left",),
        action=("action_dict/cartesian_velocity", "action_dict/gripper_position"),
        operations=(("invert_gripper",), ("drop_idle", 4, 7e-6)),
        robot="Franka",
        episodes=92_233,
    ),
    # The release's own conversion is not public. Features: the RH20T authors' RLDS builder, whose tcp_base is the pose
    # that the arm reaches next; the release uses it unchanged.
    "rh20t_rlds": DatasetSpec(action=("action/tcp_base", "action/gripper"), robot="Franka, UR5, Flexiv, Kuka"),
}
