"""What one step of each dataset in the catalogue holds, as published.

Sources: tensorflow/datasets (docs/catalog/<name>.md), an inventory of the features.json of all Open X-Embodiment
datasets (felixmin/high-level-robot-planner: docs/openx_local_dataset_inventory.md), and for those that are in neither
the RLDS builders or descriptions of bridge_orig, DROID, RH20T, Language-Table, T-DROID and LIBERO. Keys whose shape is
in none of them are left out; nothing reads them.

A leaf says type and shape: f32, f64, i32, i64, u8, bool, text, string, and jpeg, png, image (not said which of both),
png16 or jpeg8 (one channel of 16 or 8 bits) and float_image (one channel) with height and width.
"""

from typing import Any

import numpy as np

_FLAGS = {"is_first": "bool", "is_last": "bool", "is_terminal": "bool"}


def _rtx(action: dict[str, str], **observation: str) -> dict[str, Any]:
    """The layout of the datasets that were collected for RT-X."""
    language = {"natural_language_instruction": "string", "natural_language_embedding": "f32 512"}
    return _FLAGS | {"action": action, "observation": observation | language, "reward": "f32"}


def _rlds(action: Any, text: str = "text", extra: Any = (), **observation: str) -> dict[str, Any]:
    """The layout of those that were converted by their authors."""
    language = {"language_instruction": text, "language_embedding": "f32 512"}
    rest = {"action": action, "observation": observation, "reward": "f32", "discount": "f32"}
    return _FLAGS | language | rest | dict(extra)


_RT1 = {
    "base_displacement_vector": "f32 2",
    "base_displacement_vertical_rotation": "f32 1",
    "gripper_closedness_action": "f32 1",
    "rotation_delta": "f32 3",
    "terminate_episode": "i32 3",
    "world_vector": "f32 3",
}
_MOVE = {"rotation_delta": "f32 3", "terminate_episode": "f32", "world_vector": "f32 3"}
_AUSTIN = {
    "state": "f32 8",
    "state_ee": "f32 16",
    "state_gripper": "f32 1",
    "state_joint": "f32 7",
}
_BRIDGE = _rlds(
    "f32 7",
    "string",
    **{f"image_{camera}": "jpeg 256 256" for camera in range(4)},
    state="f32 7",
)
_DROID = _FLAGS | {
    "action": "f64 7",
    "action_dict": {
        "cartesian_position": "f64 6",
        "cartesian_velocity": "f64 6",
        "gripper_position": "f64 1",
        "gripper_velocity": "f64 1",
        "joint_position": "f64 7",
        "joint_velocity": "f64 7",
    },
    "discount": "f32",
    "language_instruction": "string",
    "language_instruction_2": "string",
    "language_instruction_3": "string",
    "observation": {
        "cartesian_position": "f64 6",
        "exterior_image_1_left": "jpeg 180 320",
        "exterior_image_2_left": "jpeg 180 320",
        "gripper_position": "f64 1",
        "joint_position": "f64 7",
        "wrist_image_left": "jpeg 180 320",
    },
    "reward": "f32",
}
_TDROID = _rlds(
    "f32 7",
    static_image="jpeg 270 360",
    static_depth_image="jpeg8 270 360",
    cartesian_position="f32 6",
    gripper_position="f32 1",
)
_LIBERO = _FLAGS | {
    "action": "f32 7",
    "discount": "f32",
    "language_instruction": "text",
    "observation": {
        "image": "jpeg 256 256",
        "wrist_image": "jpeg 256 256",
        "state": "f32 8",
        "joint_state": "f32 7",
    },
    "reward": "f32",
}
_ROBOTURK = _rtx(_MOVE | {"gripper_closedness_action": "f32 1"}, front_rgb="image 480 640")
_FMB_CAMERAS = ("side_1", "side_2", "wrist_1", "wrist_2")
_GNM = {"position": "f64 2", "state": "f64 3", "yaw": "f64 1"}
_ANGLE = {"action_angle": "f64 3"}

LIBERO_NO_NOOPS = [f"libero{suite}_no_noops" for suite in ("", "_spatial", "_object", "_goal", "_10")]
_TASKS = (
    "carrot_in_bowl pour_corn_in_pot flip_pot_upright move_object_onto_plate knock_object_over cover_object_with_towel"
)
TDROID = [f"tdroid_{task}" for task in _TASKS.split()]

FEATURES: dict[str, dict[str, Any]] = {
    "fractal20220817_data": _rtx(
        _RT1,
        base_pose_tool_reached="f32 7",
        gripper_closed="f32 1",
        gripper_closedness_commanded="f32 1",
        height_to_bottom="f32 1",
        image="jpeg 256 320",
        orientation_box="f32 2 3",
        orientation_start="f32 4",
        robot_orientation_positions_box="f32 3 3",
        rotation_delta_to_go="f32 3",
        src_rotation="f32 4",
        vector_to_go="f32 3",
        workspace_bounds="f32 3 3",
    ),
    "kuka": _rtx(
        _RT1,
        **{
            "clip_function_input/base_pose_tool_reached": "f32 7",
            "clip_function_input/workspace_bounds": "f32 3 3",
            "gripper_closed": "f32 1",
            "height_to_bottom": "f32 1",
            "image": "jpeg 512 640",
            "task_id": "f32 1",
        },
    ),
    "bridge_orig": _BRIDGE,
    "taco_play": _rtx(
        {
            "actions": "f32 7",
            "rel_actions_gripper": "f32 7",
            "rel_actions_world": "f32 7",
            "terminate_episode": "f32",
        },
        depth_gripper="f32 84 84",
        depth_static="f32 150 200",
        rgb_gripper="image 84 84",
        rgb_static="image 150 200",
        robot_obs="f32 15",
        structured_language_instruction="string",
    ),
    "jaco_play": _rtx(
        {"gripper_closedness_action": "f32 1", "terminate_episode": "i32 3", "world_vector": "f32 3"},
        end_effector_cartesian_pos="f32 7",
        end_effector_cartesian_velocity="f32 6",
        image="image 224 224",
        image_wrist="image 224 224",
        joint_pos="f32 8",
    ),
    "berkeley_cable_routing": _rtx(
        _MOVE,
        image="image 128 128",
        robot_state="f32 7",
        top_image="image 128 128",
        wrist225_image="image 128 128",
        wrist45_image="image 128 128",
    ),
    "roboturk": _ROBOTURK,
    "viola": _rtx(
        _MOVE | {"gripper_closedness_action": "f32"},
        agentview_rgb="image 224 224",
        ee_states="f32 16",
        eye_in_hand_rgb="image 224 224",
        gripper_states="f32 1",
        joint_states="f32 7",
    ),
    "berkeley_autolab_ur5": _rtx(
        _MOVE | {"gripper_closedness_action": "f32"},
        hand_image="image 480 640",
        image="image 480 640",
        image_with_depth="float_image 480 640",
        robot_state="f32 15",
    ),
    "toto": _rtx(_MOVE | {"open_gripper": "bool"}, image="image 480 640", state="f32 7"),
    "language_table": _FLAGS
    | {
        "action": "f32 2",
        "observation": {
            "effector_target_translation": "f32 2",
            "effector_translation": "f32 2",
            "instruction": "i32 512",
            "rgb": "jpeg 360 640",
        },
        "reward": "f32",
    },
    "stanford_hydra_dataset_converted_externally_to_rlds": _rlds(
        "f32 7", extra={"is_dense": "bool"}, image="png 240 320", state="f32 27", wrist_image="png 240 320"
    ),
    "austin_buds_dataset_converted_externally_to_rlds": _rlds(
        "f32 7", image="png 128 128", state="f32 24", wrist_image="png 128 128"
    ),
    "nyu_franka_play_dataset_converted_externally_to_rlds": _rlds(
        "f32 15",
        depth="i32 128 128 1",
        depth_additional_view="i32 128 128 1",
        image="png 128 128",
        image_additional_view="png 128 128",
        state="f32 13",
    ),
    "furniture_bench_dataset_converted_externally_to_rlds": _rlds(
        "f32 8", extra={"skill_completion": "f32"}, image="jpeg 224 224", state="f32 35", wrist_image="jpeg 224 224"
    ),
    "ucsd_kitchen_dataset_converted_externally_to_rlds": _rlds("f32 8", image="png 480 640", state="f32 21"),
    "austin_sailor_dataset_converted_externally_to_rlds": _rlds(
        "f32 7", image="png 128 128", wrist_image="png 128 128", **_AUSTIN
    ),
    "austin_sirius_dataset_converted_externally_to_rlds": _rlds(
        "f32 7",
        extra={"action_mode": "f32 1", "intv_label": "f32 1"},
        image="png 84 84",
        wrist_image="png 84 84",
        **_AUSTIN,
    ),
    "dlr_edan_shared_control_converted_externally_to_rlds": _rlds("f32 7", image="png 360 640", state="f32 7"),
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": _rlds(
        "f32 8", image="png 360 640", state="f32 20", wrist_image="png 240 320"
    ),
    "utaustin_mutex": _rlds("f32 7", image="png 128 128", state="f32 24", wrist_image="png 128 128"),
    "berkeley_fanuc_manipulation": _rlds(
        "f32 6", end_effector_state="f32 7", image="png 224 224", state="f32 13", wrist_image="png 224 224"
    ),
    "cmu_stretch": _rlds("f32 8", image="png 128 128", state="f32 4"),
    "bc_z": _rtx(
        {
            "future/axis_angle_residual": "f32 30",
            "future/target_close": "i64 10",
            "future/xyz_residual": "f32 30",
        },
        **{
            "episode_success": "f32",
            "image": "jpeg 171 213",
            "present/autonomous": "i64",
            "present/axis_angle": "f32 3",
            "present/intervention": "i64",
            "present/sensed_close": "f32 1",
            "present/xyz": "f32 3",
            "sequence_length": "i64",
        },
    ),
    "fmb_dataset": _rlds(
        "f32 7",
        "string",
        color_id="u8",
        eef_force="f32 3",
        eef_pose="f32 7",
        eef_torque="f32 3",
        eef_vel="f32 6",
        **{f"image_{camera}": "jpeg 256 256" for camera in _FMB_CAMERAS},
        **{f"image_{camera}_depth": "f32 256 256" for camera in _FMB_CAMERAS},
        joint_pos="f32 7",
        joint_vel="f32 7",
        length="string",
        object_id="u8",
        primitive="string",
        shape_id="u8",
        size="string",
        state_gripper_pose="f32",
    ),
    "dobbe": _rlds(
        "f32 7",
        "string",
        gripper="f32 1",
        quat="f32 4",
        rot="f32 3",
        state="f32 7",
        wrist_image="jpeg 256 256",
        xyz="f32 3",
    ),
    "droid": _DROID,
    "rh20t_rlds": _rlds(
        {"tcp": "f32 6", "tcp_base": "f32 6", "gripper": "i64"},
        image="jpeg 720 1280",
        depth="png16 720 1280",
        tcp="f32 6",
        tcp_base="f32 6",
        joint="f32 7",
        joint_vel="f32 7",
        ft_robot="f32 6",
        ft_raw="f32 6",
        ft_zeroed="f32 6",
        ft_robot_base="f32 6",
        ft_raw_base="f32 6",
        ft_zeroed_base="f32 6",
        gripper_width="f32",
        tactile="i64 96",
        timestamp="i64",
    ),
    "bridge_oxe": _rtx(_MOVE | {"open_gripper": "bool"}, image="image 480 640", state="f32 7"),
    "roboturk_tiny": _ROBOTURK,
    "nyu_door_opening_surprising_effectiveness": _rtx(
        _MOVE | {"gripper_closedness_action": "f32 1"}, image="image 720 960"
    ),
    "columbia_cairlab_pusht_real": _rtx(
        _MOVE | {"gripper_closedness_action": "f32"},
        image="image 240 320",
        robot_state="f32 2",
        wrist_image="image 240 320",
    ),
    "stanford_kuka_multimodal_dataset_converted_externally_to_rlds": _rlds(
        "f32 4",
        contact="f32 50",
        depth_image="f32 128 128 1",
        ee_forces_continuous="f32 50 6",
        ee_orientation="f32 4",
        ee_orientation_vel="f32 3",
        ee_position="f32 3",
        ee_vel="f32 3",
        ee_yaw="f32 4",
        ee_yaw_delta="f32 4",
        image="png 128 128",
        joint_pos="f32 7",
        joint_vel="f32 7",
        optical_flow="f32 128 128 2",
        state="f32 8",
    ),
    "nyu_rot_dataset_converted_externally_to_rlds": _rlds("f32 7", image="png 84 84", state="f32 7"),
    "maniskill_dataset_converted_externally_to_rlds": _rlds(
        "f32 7",
        base_pose="f32 7",
        depth="png16 256 256",
        image="png 256 256",
        state="f32 18",
        target_object_or_part_final_pose="f32 7",
        target_object_or_part_final_pose_valid="u8 7",
        target_object_or_part_initial_pose="f32 7",
        target_object_or_part_initial_pose_valid="u8 7",
        tcp_pose="f32 7",
        **{
            f"{camera}_camera_{key}": "f32 4 4"
            for camera in ("main", "wrist")
            for key in ("cam2world_gl", "extrinsic_cv")
        },
        **{f"{camera}_camera_intrinsic_cv": "f32 3 3" for camera in ("main", "wrist")},
        wrist_depth="png16 256 256",
        wrist_image="png 256 256",
    ),
    "cmu_franka_exploration_dataset_converted_externally_to_rlds": _rlds(
        "f32 8", extra={"structured_action": "f32 8"}, highres_image="png 480 640", image="png 64 64"
    ),
    "ucsd_pick_and_place_dataset_converted_externally_to_rlds": _rlds("f32 4", image="png 224 224", state="f32 7"),
    "utokyo_pr2_opening_fridge_converted_externally_to_rlds": _rlds("f32 8", image="png 128 128", state="f32 7"),
    "utokyo_pr2_tabletop_manipulation_converted_externally_to_rlds": _rlds("f32 8", image="png 128 128", state="f32 7"),
    "utokyo_xarm_pick_and_place_converted_externally_to_rlds": _rlds(
        "f32 7", end_effector_pose="f32 6", hand_image="png 224 224", image="png 224 224", image2="png 224 224"
    ),
    "utokyo_xarm_bimanual_converted_externally_to_rlds": _rlds(
        "f32 14", action_l="f32 7", action_r="f32 7", image="png 256 256", pose_l="f32 6", pose_r="f32 6"
    ),
    "robo_net": _rlds("f32 5", image="jpeg 240 320", image1="jpeg 240 320", image2="jpeg 240 320", state="f32 5"),
    "berkeley_mvp_converted_externally_to_rlds": _rlds(
        "f32 8", gripper="bool", hand_image="png 480 640", joint_pos="f32 7", pose="f32 7"
    ),
    "kaist_nonprehensile_converted_externally_to_rlds": _rlds(
        "f32 20", image="png 480 640", partial_pointcloud="f32 512 3", state="f32 21"
    ),
    "stanford_mask_vit_converted_externally_to_rlds": _rlds(
        "f32 5",
        end_effector_pose="f32 5",
        finger_sensors="f32 1",
        high_bound="f32 5",
        image="png 480 480",
        low_bound="f32 5",
        state="f32 15",
    ),
    "tokyo_u_lsmo_converted_externally_to_rlds": _rlds("f32 7", image="png 120 120"),
    "dlr_sara_pour_converted_externally_to_rlds": _rlds("f32 7", image="png 480 640"),
    "dlr_sara_grid_clamp_converted_externally_to_rlds": _rlds("f32 7", image="png 480 640"),
    "asu_table_top_converted_externally_to_rlds": _rlds(
        "f32 7",
        extra={
            "action_delta": "f32 7",
            "action_inst": "text",
            "goal_object": "text",
            "ground_truth_states": {key: "f32 6" for key in ("EE", "bottle", "bread", "coke", "cube", "milk", "pepsi")},
        },
        image="png 224 224",
        state="f32 7",
        state_vel="f32 7",
    ),
    "stanford_robocook_converted_externally_to_rlds": _rlds(
        "f32 7",
        **{f"depth_{camera}": "f32 256 256" for camera in (1, 2, 3, 4)},
        **{f"image_{camera}": "jpeg 256 256" for camera in (1, 2, 3, 4)},
        state="f32 7",
    ),
    "imperialcollege_sawyer_wrist_cam": _rlds("f32 8", image="png 64 64", wrist_image="png 64 64"),
    "uiuc_d3field": _rlds(
        "f32 3",
        **{f"depth_{camera}": "png16 360 640" for camera in (1, 2, 3, 4)},
        **{f"image_{camera}": "png 360 640" for camera in (1, 2, 3, 4)},
        state="f32 4 4",
    ),
    "cmu_playing_with_food": _rlds(
        "f32 8", finger_vision_1="png 480 640", finger_vision_2="png 480 640", image="png 480 640"
    ),
    "cmu_play_fusion": _rlds("f32 9", image="png 128 128", state="f32 8"),
    "berkeley_gnm_recon": _rlds("f64 2", extra=_ANGLE, image="png 120 160", **_GNM),
    "berkeley_gnm_cory_hall": _rlds("f64 2", extra=_ANGLE, image="png 64 85", **_GNM),
    "berkeley_gnm_sac_son": _rlds("f64 2", extra=_ANGLE, image="png 120 160", **_GNM),
    # What sim/record_libero writes, without the keys that only a replay needs.
    "libero": _FLAGS
    | {
        "action": "f32 7",
        "language_instruction": "text",
        "observation": {"image": "jpeg 256 256", "depth": "png16 256 256", "intrinsics": "f32 3 3", "state": "f32 8"},
    },
    "bridge_dataset": _BRIDGE,
    "droid_wipe": _DROID,
    **dict.fromkeys(LIBERO_NO_NOOPS, _LIBERO),
    **dict.fromkeys(TDROID, _TDROID),
}

_NUMBERS = {
    "f32": np.float32,
    "f64": np.float64,
    "i32": np.int32,
    "i64": np.int64,
    "u8": np.uint8,
    "bool": np.bool_,
}


def tfds_features(tree: Any) -> Any:
    """The TFDS features of such a tree."""
    import tensorflow_datasets as tfds

    features = tfds.features
    if isinstance(tree, dict):
        return features.FeaturesDict({key: tfds_features(value) for key, value in tree.items()})
    kind, *sizes = tree.split()
    shape = tuple(map(int, sizes))
    match kind:
        case "text":
            return features.Text()
        case "string":
            return features.Tensor(shape=(), dtype=np.str_)
        case "jpeg" | "png" | "image":
            return features.Image(shape=(*shape, 3), encoding_format=None if kind == "image" else kind)
        case "jpeg8":
            return features.Image(shape=(*shape, 1), encoding_format="jpeg")
        case "png16":
            return features.Image(shape=(*shape, 1), dtype=np.uint16, encoding_format="png")
        case "float_image":
            return features.Image(shape=(*shape, 1), dtype=np.float32)
        case _:
            return features.Tensor(shape=shape, dtype=_NUMBERS[kind])


def random_steps(tree: Any, length: int, rng: np.random.Generator, path: str = "") -> Any:
    """Values for `length` steps of such a tree, each leaf an array or list with that many. Every text and every encoded
    image says where it is from."""
    if isinstance(tree, dict):
        return {key: random_steps(value, length, rng, f"{path}/{key}" if path else key) for key, value in tree.items()}
    kind, *sizes = tree.split()
    shape = (length, *map(int, sizes))
    if kind == "float_image":  # the one kind of image that TFDS does not take encoded
        return np.zeros((*shape, 1), np.float32)
    if kind not in _NUMBERS:
        return [f"{path} {step}".encode() for step in range(length)]
    if kind.startswith("f"):
        return rng.normal(size=shape).astype(_NUMBERS[kind])
    return rng.integers(0, 2 if kind == "bool" else 100, shape).astype(_NUMBERS[kind])
