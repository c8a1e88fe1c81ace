"""Every entry of the catalogue, on episodes with its dataset's published features: what it reads equals values worked
out by hand.

Inputs encode their origin: column c of a step is c + step / 100. Everything that an entry should not read is random,
and texts and images contain their own keys.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest
from helpers.oxe_features import FEATURES, LIBERO_NO_NOOPS, TDROID, random_steps, tfds_features
from helpers.toy_rlds import make_rlds

from spatialvla_jax.config import KEYS
from spatialvla_jax.data.oxe import CATALOGUE, MIXTURES, DatasetSpec, make_spec
from spatialvla_jax.data.oxe.__main__ import table
from spatialvla_jax.data.oxe.published import PUBLISHED
from spatialvla_jax.data.rlds import UNLABELED, open_rlds, read_episodes
from spatialvla_jax.errors import Fault, InputError

NATURAL = "observation/natural_language_instruction"


def ramp(*columns, steps=4):
    return np.add.outer(np.arange(steps) / 100, columns)


def rows(*parts):
    """Columns side by side, [steps, n]: each part is [steps, n], [steps] or one value for all steps."""
    steps = next(len(part) for part in parts if np.ndim(part))
    columns = [np.reshape(part if np.ndim(part) else np.full(steps, part), (steps, -1)) for part in parts]
    return np.concatenate(columns, axis=1)


@dataclasses.dataclass(frozen=True)
class Case:
    """Values to write under some keys, and the results to expect."""

    inputs: dict[str, Any]
    action: Any
    image: str = "image"
    language: str = "language_instruction"
    kept: tuple[int, ...] | None = None  # steps; None: all
    depth: str | None = None
    intrinsics: str | None = None


MOVE = ramp(1, 2, 3, 4, 5, 6)
# Grippers before and after.
KEPT = (0, 1, 0.25, 0.5), (0, 1, 0.25, 0.5)
CLIPPED = (-1, 1, 0.25, 2), (0, 1, 0.25, 1)
INVERTED = (0, 1, 0.25, 0.5), (1, 0, 0.75, 0.5)
CLIPPED_INVERTED = (-1, 1, 0.25, 2), (1, 0, 0.75, 0)
RELATIVE = (0, 1, 0, -1), (1, 0, 0, 1)
BINARIZED = (1, 0.5, 0.02, 0.6), (1, 0, 0, 0.6)
FLAG = (1, 0, 1, 1), (1, 0, 1, 1)

# Rotations of 0.2 about x, -0.3 about y and 0.4 about z, and of 0.4 about x followed by a quarter turn about z.
S, C, D = np.sqrt(0.5), np.cos(0.2), np.sin(0.2)
QUATERNIONS = (
    (np.sin(0.1), 0, 0, np.cos(0.1)),
    (0, -np.sin(0.15), 0, np.cos(0.15)),
    (0, 0, D, C),
    (S * D, S * D, S * C, S * C),
)
EULERS = (0.2, 0, 0), (0, -0.3, 0), (0, 0, 0.4), (0.4, 0, np.pi / 2)
HALF = np.arccos(S * C)  # half the angle of the last rotation; its quaternion gives the axis
TURNS = *EULERS[:3], tuple(2 * HALF / np.sin(HALF) * np.asarray(QUATERNIONS[3][:3]))  # the same as axis-angles

SQUARES = np.asarray([0, 1, 4, 9])[:, None]  # poses whose differences are 1, 3, 5


def closedness(gripper, image="image"):
    """RT-X: world vector, rotation, gripper."""
    before, after = gripper
    inputs = {
        "action/world_vector": ramp(1, 2, 3),
        "action/rotation_delta": ramp(4, 5, 6),
        "action/gripper_closedness_action": before,
    }
    return Case(inputs, rows(MOVE, after), image, NATURAL)


def open_gripper():
    inputs = {
        "action/world_vector": ramp(1, 2, 3),
        "action/rotation_delta": ramp(4, 5, 6),
        "action/open_gripper": FLAG[0],
    }
    return Case(inputs, rows(MOVE, FLAG[1]), language=NATURAL)


def plain(gripper=KEPT, image="image", end=()):
    """An action of 7 numbers; some more follow."""
    before, after = gripper
    return Case({"action": rows(MOVE, before, *end)}, rows(MOVE, after), image)


def quaternion(gripper, image="image", end=()):
    before, after = gripper
    action = rows(ramp(1, 2, 3), QUATERNIONS, before, *end)
    return Case({"action": action}, rows(ramp(1, 2, 3), EULERS, after), image)


def bridge():
    inputs = {
        "action": rows(MOVE, (0.3, 0.97, 0.4, 0.01)),
        "observation/state": rows(SQUARES * (1, 2, 3, 4, 5, 6), 7),
    }
    return Case(inputs, [(3, 6, 9, 12, 15, 18, 1), (5, 10, 15, 20, 25, 30, 0)], "image_0", kept=(1, 2))


def droid(image, kept):
    moves = np.zeros((8, 6))
    moves[0], moves[6] = (1, 2, 3, 4, 5, 6), (0, 0, 0, 0, 0, -0.5)
    gripper = np.arange(8) / 8
    inputs = {"action_dict/cartesian_velocity": moves, "action_dict/gripper_position": gripper}
    return Case(inputs, rows(moves, 1 - gripper)[list(kept)], image, kept=kept)


def words(text):
    """512 byte values; those after the end are not part of the text."""
    values = [*text.encode(), 0, 33]
    return values + [0] * (512 - len(values))


LIBERO = plain(CLIPPED_INVERTED)
WHEELS = Case({"action": ramp(1, 2)}, rows(ramp(1, 2), 0, 0, 0, 0, 0))

CASES: dict[str, Case] = {
    "fractal20220817_data": closedness(RELATIVE),
    "kuka": closedness(RELATIVE),
    "bridge_orig": bridge(),
    "taco_play": Case(
        {"action/rel_actions_world": rows(MOVE, CLIPPED[0])}, rows(MOVE, CLIPPED[1]), "rgb_static", NATURAL
    ),
    "jaco_play": Case(
        {"action/world_vector": ramp(1, 2, 3), "action/gripper_closedness_action": RELATIVE[0]},
        rows(ramp(1, 2, 3), 0, 0, 0, RELATIVE[1]),
        language=NATURAL,
    ),
    "berkeley_cable_routing": Case(
        {"action/world_vector": ramp(1, 2, 3), "action/rotation_delta": ramp(4, 5, 6)}, rows(MOVE, 0), language=NATURAL
    ),
    "roboturk": closedness(CLIPPED_INVERTED, "front_rgb"),
    "viola": closedness(CLIPPED_INVERTED, "agentview_rgb"),
    "berkeley_autolab_ur5": closedness(RELATIVE),
    "toto": open_gripper(),
    "language_table": Case(
        {
            "action": ramp(1, 2),
            "observation/instruction": [words(f"move it, naïve {step}") for step in range(4)],
        },
        rows(ramp(1, 2), 0, 0, 0, 0, 1),
        "rgb",
        "move it, naïve",
    ),
    "stanford_hydra_dataset_converted_externally_to_rlds": plain(INVERTED),
    "austin_buds_dataset_converted_externally_to_rlds": plain(CLIPPED_INVERTED),
    "nyu_franka_play_dataset_converted_externally_to_rlds": Case(
        {"action": rows(ramp(11, 12, 13, 14, 15, 16, 17), MOVE, CLIPPED[0], 9)}, rows(MOVE, CLIPPED[1])
    ),
    "furniture_bench_dataset_converted_externally_to_rlds": quaternion(CLIPPED_INVERTED),
    "ucsd_kitchen_dataset_converted_externally_to_rlds": plain(end=(9,)),
    "austin_sailor_dataset_converted_externally_to_rlds": plain(CLIPPED_INVERTED),
    "austin_sirius_dataset_converted_externally_to_rlds": plain(CLIPPED_INVERTED),
    "dlr_edan_shared_control_converted_externally_to_rlds": plain(INVERTED),
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": quaternion(KEPT),
    "utaustin_mutex": plain(CLIPPED_INVERTED),
    "berkeley_fanuc_manipulation": Case(
        {"action": MOVE, "observation/state": rows(ramp(21, 22, 23, 24, 25, 26), INVERTED[0], ramp(*range(6)))},
        rows(MOVE, INVERTED[1]),
    ),
    "cmu_stretch": plain(end=(9,)),
    "bc_z": Case(
        {
            "action/future/xyz_residual": ramp(*range(1, 31)),
            "action/future/axis_angle_residual": ramp(*range(31, 61)),
            "action/future/target_close": rows((0, 1, 1, 0), *range(2, 11)),
        },
        rows(ramp(1, 2, 3, 31, 32, 33), (1, 0, 0, 1)),
        language=NATURAL,
    ),
    "fmb_dataset": plain(image="image_side_1"),
    "dobbe": plain(image="wrist_image"),
    "droid": droid("exterior_image_2_left", kept=(0, 3, 4, 5, 6, 7)),
    "rh20t_rlds": Case({"action/tcp_base": MOVE, "action/gripper": FLAG[0]}, rows(MOVE, FLAG[1])),
    "bridge_oxe": Case(
        {"action/open_gripper": (0, 1, 0, 0), "observation/state": rows(SQUARES * (1, 2, 3, 4, 5, 6), 7)},
        [(3, 6, 9, 12, 15, 18, 1), (5, 10, 15, 20, 25, 30, 0)],
        language=NATURAL,
        kept=(1, 2),
    ),
    "roboturk_tiny": closedness(CLIPPED_INVERTED, "front_rgb"),
    "nyu_door_opening_surprising_effectiveness": closedness(RELATIVE),
    "columbia_cairlab_pusht_real": closedness(RELATIVE),
    "stanford_kuka_multimodal_dataset_converted_externally_to_rlds": Case(
        {"action": rows(ramp(1, 2, 3), KEPT[0])}, rows(ramp(1, 2, 3), 0, 0, 0, KEPT[1])
    ),
    "nyu_rot_dataset_converted_externally_to_rlds": plain(),
    "maniskill_dataset_converted_externally_to_rlds": Case(
        {
            "action": rows(ramp(1, 2, 3), np.multiply(TURNS, 10), (-1, 1, 0, -1)),
            "observation/main_camera_intrinsic_cv": np.arange(36).reshape(4, 3, 3),
        },
        rows(ramp(1, 2, 3) / 10, EULERS, (0, 1, 0.5, 0)),
        depth="depth",
        intrinsics="observation/main_camera_intrinsic_cv",
    ),
    "cmu_franka_exploration_dataset_converted_externally_to_rlds": plain(image="highres_image", end=(9,)),
    "ucsd_pick_and_place_dataset_converted_externally_to_rlds": Case(
        {"action": rows(ramp(1, 2, 3), KEPT[0])}, rows(ramp(1, 2, 3), 0, 0, 0, KEPT[1])
    ),
    "utokyo_pr2_opening_fridge_converted_externally_to_rlds": plain(end=(9,)),
    "utokyo_pr2_tabletop_manipulation_converted_externally_to_rlds": plain(end=(9,)),
    "utokyo_xarm_pick_and_place_converted_externally_to_rlds": plain(),
    "utokyo_xarm_bimanual_converted_externally_to_rlds": Case(
        {"action": rows(ramp(*range(21, 28)), MOVE, KEPT[0])}, rows(MOVE, KEPT[1])
    ),
    "robo_net": Case({"action": rows(ramp(1, 2, 3, 6), KEPT[0])}, rows(ramp(1, 2, 3), 0, 0, ramp(6), KEPT[1])),
    "berkeley_mvp_converted_externally_to_rlds": Case(
        {
            "observation/pose": rows(SQUARES * (1, 2, 3), [(0, 0, 0, 1), (D, 0, 0, C), (0, 0, 0, 1), (0, 0, -D, C)]),
            "observation/gripper": (1, 0, 1, 1),
        },
        [(1, 2, 3, 0.4, 0, 0, 0), (3, 6, 9, -0.4, 0, 0, 1), (5, 10, 15, 0, 0, -0.4, 0)],
        "hand_image",
        kept=(0, 1, 2),
    ),
    "kaist_nonprehensile_converted_externally_to_rlds": Case(
        {"action": rows(ramp(1, 2, 3), TURNS, ramp(*range(14)))}, rows(ramp(1, 2, 3), EULERS, 0)
    ),
    "stanford_mask_vit_converted_externally_to_rlds": Case(
        {"action": rows(ramp(1, 2, 3, 6), (-1, 1, 0, 0.5))}, rows(ramp(1, 2, 3), 0, 0, ramp(6), (1, 0, 0.5, 0.25))
    ),
    "tokyo_u_lsmo_converted_externally_to_rlds": plain(),
    "dlr_sara_pour_converted_externally_to_rlds": plain(),
    "dlr_sara_grid_clamp_converted_externally_to_rlds": plain(),
    "asu_table_top_converted_externally_to_rlds": plain(),
    "stanford_robocook_converted_externally_to_rlds": plain(image="image_1"),
    "imperialcollege_sawyer_wrist_cam": plain(end=(9,)),
    "uiuc_d3field": Case({"action": ramp(1, 2, 3)}, rows(ramp(1, 2, 3), 0, 0, 0, 0), "image_1", depth="depth_1"),
    "cmu_playing_with_food": quaternion(KEPT),
    "cmu_play_fusion": quaternion(KEPT, end=(9,)),
    "berkeley_gnm_recon": WHEELS,
    "berkeley_gnm_cory_hall": WHEELS,
    "berkeley_gnm_sac_son": WHEELS,
    "libero": dataclasses.replace(LIBERO, depth="depth", intrinsics="observation/intrinsics"),
    "bridge_dataset": bridge(),
    "droid_wipe": droid("exterior_image_2_left", kept=tuple(range(8))),
    **dict.fromkeys(LIBERO_NO_NOOPS, LIBERO),
    **dict.fromkeys(TDROID, plain(BINARIZED, "static_image")),
}


def leaf(tree, path):
    """(the dict that holds the leaf at `path`, its key); keys may contain slashes."""
    head = next(key for key in tree if path == key or path.startswith(f"{key}/"))
    return (tree, head) if head == path else leaf(tree[head], path[len(head) + 1 :])


def split_steps(tree, step):
    return {key: split_steps(value, step) if isinstance(value, dict) else value[step] for key, value in tree.items()}


def make(name, inputs=(), count=1):
    """`count` episodes with the dataset's features and `inputs`, and each one's values."""
    for number in range(count):
        length = max((len(value) for value in dict(inputs).values()), default=4)
        steps = random_steps(FEATURES[name], length, np.random.default_rng(number))
        for key, value in dict(inputs).items():
            holder, last = leaf(steps, key)
            dtype = holder[last].dtype
            holder[last] = np.asarray(value, dtype).reshape(holder[last].shape)
        yield [split_steps(steps, step) for step in range(length)], steps


def read(folder, name, episodes, spec, *options):
    """What `spec` reads from a file of these episodes, and the file's bytes."""
    features, count = tfds_features(FEATURES[name]), len(episodes)
    path = make_rlds(folder, {"train": episodes}, step_features=features, episodes_per_shard=count)
    (file,) = path.glob("*.tfrecord*")
    return list(read_episodes(name, open_rlds(path), file, range(count), spec, *options)), file.read_bytes()


@pytest.mark.parametrize("name", CATALOGUE)
def test_entry(name, tmp_path):
    case, spec = CASES[name], CATALOGUE[name]
    made, steps = zip(*make(name, case.inputs, 2), strict=True)
    episodes, stored = read(tmp_path, name, list(made), spec)
    kept = range(len(case.action)) if case.kept is None else case.kept
    for episode, values in zip(episodes, steps, strict=True):
        assert episode["step"].tolist() == list(kept)
        assert episode["action"].dtype == np.float32
        np.testing.assert_allclose(episode["action"], case.action, atol=2e-6)
        assert episode["language"].tolist() == [f"{case.language} {step}" for step in kept]
        for key, source in {"image": case.image, "depth": case.depth}.items():
            spans = episode[key].tolist() if source else []
            texts = [stored[offset : offset + length].decode() for offset, length, _ in spans]
            assert texts == [f"observation/{source} {step}" for step in kept if source]
            assert source or key not in episode
        if case.intrinsics:
            holder, last = leaf(values, case.intrinsics)
            np.testing.assert_array_equal(episode["intrinsics"], holder[last])
        else:
            assert "intrinsics" not in episode
    if spec.unread_depth:
        holder, last = leaf(FEATURES[name], spec.unread_depth)
        assert spec.depth is None and not holder[last].startswith("png16")


def test_all_are_tested():
    assert CASES.keys() == FEATURES.keys() == CATALOGUE.keys()
    # The release configures these, then rejects them: actions are joint positions, and no pose of the hand is stored.
    assert not {"berkeley_rpt_converted_externally_to_rlds", "roboset"} & CATALOGUE.keys()


@pytest.mark.parametrize("name", ["bridge_orig", "language_table", "kuka"])
def test_episodes_without_language_are_left_out(name, tmp_path):
    ((steps, _),) = make(name)
    for step in steps:
        holder, last = leaf(step, CATALOGUE[name].language)
        holder[last] = np.zeros_like(holder[last]) if name == "language_table" else b""
    lost = []
    (episode,), _ = read(tmp_path, name, [steps], CATALOGUE[name], lambda *args: lost.append(args))
    assert not len(episode["step"]) and [reason for reason, _ in lost] == [UNLABELED]


def test_one_of_two_cameras(tmp_path):
    """Every episode of DROID uses one of its two external cameras, about half of them the second."""
    made = [steps for steps, _ in make("droid", {"action_dict/gripper_position": np.full(4, 0.5)}, count=32)]

    def cameras(folder):
        episodes, stored = read(folder, "droid", made, CATALOGUE["droid"])
        for episode in episodes:
            texts = [stored[offset : offset + length].decode() for offset, length, _ in episode["image"].tolist()]
            (camera,) = {text.split()[0] for text in texts}
            yield camera

    seen = list(cameras(tmp_path / "once"))
    assert seen == list(cameras(tmp_path / "again"))
    assert set(seen) == {"observation/exterior_image_1_left", "observation/exterior_image_2_left"}
    assert 8 <= seen.count("observation/exterior_image_1_left") <= 24


def test_depth_belongs_to_the_first_camera(tmp_path):
    name = "maniskill_dataset_converted_externally_to_rlds"
    ((steps, _),) = make(name, CASES[name].inputs)
    wrists = ("observation/wrist_image",) * 9  # ten random choices would hardly all be the first
    spec = dataclasses.replace(CATALOGUE[name], other_images=wrists)
    (episode,), stored = read(tmp_path, name, [steps], spec)
    offset, length, _ = episode["image"][0].tolist()
    assert stored[offset : offset + length] == b"observation/image 0"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"action": ["action/world_vector", 0, "action/open_gripper"]}, r"an action 5 wide .* 0 .*; 7 is expected"),
        ({"action": ["action/world_vector[:9]", "action/rotation_delta[3]", 0]}, "an action 4 wide"),
        ({"action": ["observation/state"], "operations": [["to_euler", "quaternion"]]}, "7 wide .*; 8 is expected"),
        ({"action": ["action/future/x"]}, "has no key 'action/future/x'"),
        (
            {"action": ["observation/state"], "other_images": ["observation/image_2"]},
            "has no key 'observation/image_2'",
        ),
    ],
)
def test_specs_that_do_not_fit(spec, message, tmp_path):
    ((steps, _),) = make("toto")
    made = make_spec({"language": NATURAL} | spec, CATALOGUE, "mine")
    with pytest.raises(InputError, match=f"'toto'.*{message}"):
        read(tmp_path, "toto", [steps], made)


def test_one_instruction_for_all(tmp_path):
    """A dataset without any words."""
    ((steps, _),) = make("toto")
    spec = DatasetSpec(
        instruction="pour it", language="none", action=("observation/state",), operations=(("clip_gripper", 0, 1),)
    )
    (episode,), _ = read(tmp_path, "toto", [steps], spec)
    assert episode["language"].tolist() == ["pour it"] * 4


def test_words_that_are_no_bytes(tmp_path):
    inputs = {"observation/instruction": np.full((4, 512), 300)}
    ((steps, _),) = make("language_table", inputs)
    with pytest.raises(Fault, match="episode 0: the language instruction is not UTF-8"):
        read(tmp_path, "language_table", [steps], CATALOGUE["language_table"])


def test_mixtures():
    """Weights as in the release's data/oxe/mixtures.py, in its order."""
    shared = (1, 2, 1, 1, 2, 2, 2)
    plus = [weight for _, weight in MIXTURES["oxe_spatial_vla_plus"]]
    assert plus[:12] == [0.54087122203, 0.4, *shared, 0.5, 0.1, 2]
    assert plus[12:] == [1, 3, 0.1, 2, 1, 1, 1, 1, 1, 0.5, 1, 0.2, 0.2, 0.2, 0.06, 0.015]
    soup = [weight for _, weight in MIXTURES["oxe_magic_soup_plus"]]
    assert soup[:12] == [0.54087122203, 0.8341046294, *shared, 1, 0.1, 2]
    assert soup[12:] == [1, 3, 0.1, 2, 1, 1, 1, 1, 1, 2, 1, 0.2, 1, 0.2, 0.06]
    names = [name for name, _ in MIXTURES["oxe_spatial_vla_plus"]]
    assert names == list(PUBLISHED)
    assert set(MIXTURES["oxe_spatial_vla_plus"]) - set(MIXTURES["oxe_spatial_vla_plus_stage2"]) == {("droid", 0.06)}
    for mixture in MIXTURES.values():
        assert {name for name, _ in mixture} <= CATALOGUE.keys()
    assert set(KEYS["grid.exclude"].default) <= set(names)
    assert [name for name, _ in MIXTURES["bridge_rt_1"]] == ["bridge_orig", "fractal20220817_data"]
    assert len(MIXTURES["libero_all"]) == 4


def test_table():
    lines = table().splitlines()
    assert len(lines) == 2 + len(CATALOGUE)
    assert lines[2] == "| `fractal20220817_data` | Google Robot | 87,212 | 0.5409 | known | no |"
    assert "| `taco_play` | Franka | 3,242 | 2 | default | stored, not read |" in lines
    assert (
        "| `maniskill_dataset_converted_externally_to_rlds` | Franka (simulated) | 30,213 | – | in the data | yes |"
        in lines
    )
