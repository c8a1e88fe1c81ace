import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatialvla_jax.data.oxe import CATALOGUE, make_spec
from spatialvla_jax.data.oxe.operations import apply_operations
from spatialvla_jax.data.oxe.spec import split_column
from spatialvla_jax.errors import Fault, InputError

S = np.sqrt(0.5)


def grippers(*values):
    action = np.zeros((len(values), 7), np.float32)
    action[:, 6] = values
    return {"action": action, "step": np.arange(len(values))}


@pytest.mark.parametrize(
    ("operations", "before", "after"),
    [
        ((("clip_gripper", -0.5, 0.5),), (-1, 0, 0.25, 2), (-0.5, 0, 0.25, 0.5)),
        ((("invert_gripper",),), (0, 1, 0.25, -1), (1, 0, 0.75, 2)),
        ((("gripper_range", -1, 1),), (-1, 1, 0), (0, 1, 0.5)),
        ((("gripper_range", 0.08, 0),), (0.08, 0, 0.02), (0, 1, 0.75)),
        # LIBERO: -1 open, +1 close
        (CATALOGUE["libero"].operations, (-1, 1, -0.5, 0.25), (1, 0, 1, 0.75)),
        # a value in between becomes the state reached next
        ((("binarize_gripper",),), (1, 0.5, 0.2, 0, 0.6, 0.96), (1, 0, 0, 0, 1, 1)),
        # … and at the end, where no state follows, the last value
        ((("binarize_gripper",),), (0, 0.5, 0.3), (0, 0.3, 0.3)),
        ((("binarize_gripper",),), (0.5, 0.3), (0.3, 0.3)),
        ((("binarize_gripper",),), (0.05, 0.95, 0.049, 0.951), (0, 0, 0, 1)),
        # relative: +1 closes, -1 opens
        ((("absolute_gripper",),), (0, 1, 0, 0, -1, 0), (1, 0, 0, 0, 1, 1)),
        ((("absolute_gripper",),), (0, 0, -1, 0), (0, 0, 1, 1)),
        ((("absolute_gripper",),), (0, 0.05, 0), (1, 1, 1)),
    ],
)
def test_grippers(operations, before, after):
    result = apply_operations(grippers(*before), operations)["action"]
    np.testing.assert_allclose(result[:, 6], after, atol=1e-7)
    assert result.dtype == np.float32 and not result[:, :6].any()


@pytest.mark.parametrize("operation", ["binarize_gripper", "absolute_gripper"])
@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([-1, -0.3, 0, 0.02, 0.05, 0.2, 0.5, 0.95, 0.97, 1]), max_size=12))
def test_grippers_step_by_step(operation, values):
    """The vectorised rules equal their definition, applied step by step."""
    if operation == "binarize_gripper":
        expected, state = [], np.float32(values[-1]) if values else 0
        for value in np.asarray(values[::-1], np.float32):
            state = 1.0 if value > 0.95 else 0.0 if value < 0.05 else state
            expected.insert(0, state)
    else:
        commands = [1 if value < -0.1 else 0 if value > 0.1 else None for value in values]
        first = next((command for command in commands if command is not None), 0)
        expected, state = [], 1 - first
        for command in commands:
            state = state if command is None else command
            expected.append(state)
    result = apply_operations(grippers(*values), ((operation,),))["action"][:, 6]
    np.testing.assert_array_equal(result, np.asarray(expected, np.float32))


# 0.4 about x first, then a quarter turn about z: roll 0.4, yaw pi / 2 (R = Rz Rx).
C, D = np.cos(0.2), np.sin(0.2)
TURN = [[0, -np.cos(0.4), np.sin(0.4)], [1, 0, 0], [0, np.sin(0.4), np.cos(0.4)]]


@pytest.mark.parametrize(
    ("rotation", "values", "euler"),
    [
        ("euler", (0.1, -0.2, 0.3), (0.1, -0.2, 0.3)),
        ("axis_angle", (0, 0.7, 0), (0, 0.7, 0)),
        ("axis_angle", (0, 0, 0), (0, 0, 0)),
        ("quaternion", (0, 0, S, S), (0, 0, np.pi / 2)),
        ("quaternion", (S * D, S * D, S * C, S * C), (0.4, 0, np.pi / 2)),
        ("quaternion", (0, 0, -2, -2), (0, 0, np.pi / 2)),  # neither sign nor norm matters
        ("quaternion_wxyz", (S * C, S * D, S * D, S * C), (0.4, 0, np.pi / 2)),
        ("matrix", np.ravel(TURN), (0.4, 0, np.pi / 2)),
        ("r6", np.ravel(TURN[:2]), (0.4, 0, np.pi / 2)),
        ("r6", np.ravel([TURN[0], np.add(TURN[1], np.multiply(3, TURN[0]))]), (0.4, 0, np.pi / 2)),
    ],
)
def test_rotations(rotation, values, euler):
    """Each representation of a hand-made rotation gives roll, pitch, yaw; motion and gripper are unchanged."""
    action = np.asarray([[1, 2, 3, *values, 0.5]] * 2, np.float32)
    result = apply_operations({"action": action}, (("to_euler", rotation),))["action"]
    np.testing.assert_allclose(result, [[1, 2, 3, *euler, 0.5]] * 2, atol=1e-6)
    assert result.dtype == np.float32


@pytest.mark.parametrize(
    ("rotation", "values"), [("quaternion", (0, 0, 0, 0)), ("matrix", (1, 0, 0, 0, 1, 0, 0, 0, -1)), ("r6", (0,) * 6)]
)
def test_rotations_that_are_none(rotation, values):
    action = np.asarray([[1, 2, 3, *values, 0.5]], np.float32)
    with pytest.raises(Fault, match=rf"a rotation is invalid \({rotation}\)"):
        apply_operations({"action": action}, (("to_euler", rotation),))


def test_scale():
    episode = grippers(0.5, 1)
    episode["action"][:, :6] = [1, 2, 3, 4, 5, 6]
    result = apply_operations(episode, (("scale", 2, 2, 2, 0.5, 0.5, -1, 1),))["action"]
    np.testing.assert_array_equal(result, [[2, 4, 6, 2, 2.5, -6, 0.5], [2, 4, 6, 2, 2.5, -6, 1]])
    with pytest.raises(InputError, match="'scale' has 2 factors for an action 7 wide"):
        apply_operations(episode, (("scale", 1, 2),))


def test_relabelled_by_differences():
    """Bridge: drop the first step, binarise the gripper, take motion from the reached states, drop the last step."""
    rng = np.random.default_rng(0)
    state = rng.normal(size=(5, 7)).astype(np.float32)
    action = rng.normal(size=(5, 7)).astype(np.float32)
    action[:, 6] = [1, 0.5, 1, 0.5, 0]
    episode = {"action": action, "observation/state": state, "step": np.arange(5)}
    result = apply_operations(episode, CATALOGUE["bridge_orig"].operations)
    np.testing.assert_array_equal(result["step"], [1, 2, 3])
    np.testing.assert_allclose(result["action"][:, :6], state[2:, :6] - state[1:4, :6], atol=1e-6)
    np.testing.assert_array_equal(result["action"][:, 6], [1, 1, 0])


def test_relabelled_by_turns():
    """Poses with quaternions: the rotation between two of them is in the base's frame, not the hand's."""
    lying, turned = (S, 0, 0, S), (S * C, S * D, S * D, S * C)  # a quarter about x; then 0.4 about the base's z
    pose = np.asarray([[0, 0, 0, *lying], [0.1, -0.2, 0.3, *turned], [0.1, -0.2, 0.4, *turned]])
    episode = grippers(0, 1, 0) | {"pose": pose}
    result = apply_operations(episode, (("relabel_from_state", "pose", "quaternion"),))
    expected = [[0.1, -0.2, 0.3, 0, 0, 0.4, 0], [0, 0, 0.1, 0, 0, 0, 1]]
    np.testing.assert_allclose(result["action"], expected, atol=1e-6)
    assert result["step"].tolist() == [0, 1] and len(result["pose"]) == 2


def moving(*steps):
    """An episode with these motions along y and with step numbers."""
    episode = grippers(*np.arange(len(steps)))
    episode["action"][:, 1] = steps
    return episode


@pytest.mark.parametrize(
    ("steps", "kept"),
    [
        ((1, 0, 0, 0, 0, 0, 0, 2, 0), (0, 4, 5, 6, 7, 8)),  # the pause keeps its last three steps
        ((0, 0, 0, 0, 0, 3), (2, 3, 4, 5)),
        ((1, 0, 0, 0, 2, -1), (0, 1, 2, 3, 4, 5)),
        ((1, 0, 0, 0, 0, 0, 0), (0, 4, 5, 6)),  # fewer than four actions follow the last three
        ((0, 0), (0, 1)),
        ((1e-6, 1e-4, 0, 0, 0, 0), (0, 1, 3, 4, 5)),
    ],
)
def test_drop_idle(steps, kept):
    result = apply_operations(moving(*steps), (("drop_idle", 4, 1e-5),))
    assert result["step"].tolist() == list(kept) == result["action"][:, 6].tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.0, 0.0, 1.0, -2.0]), min_size=1, max_size=20))
def test_drop_idle_keeps_chunks(steps):
    """A step stays if and only if its chunk moves or runs past the end. Dropping others keeps its chunk's motion."""
    chunk = {step: steps[step : step + 4] for step in range(len(steps))}
    kept = [step for step, part in chunk.items() if any(part) or len(part) < 4]
    result = apply_operations(moving(*steps), (("drop_idle", 4, 1e-5),))
    assert result["step"].tolist() == kept
    movement = result["action"][:, 1].tolist()
    assert [movement[place : place + 4] for place in range(len(kept))] == [chunk[step] for step in kept]


def test_drop_noops():
    """OpenVLA's rule for LIBERO drops steps without motion or a gripper change, and those before the first motion."""
    episode = moving(0, 0, 1, 0, 0, 0, 1e-5, 2)
    episode["action"][:, 6] = [-1, 1, 1, 1, -1, -1, -1, -1]
    result = apply_operations(episode, (("drop_noops", 1e-4),))
    assert result["step"].tolist() == [2, 4, 7]


@pytest.mark.parametrize(
    ("column", "picked"),
    [("a/b", [0, 1, 2, 3]), ("a/b[2]", [2]), ("a/b[-1]", [3]), ("a/b[:2]", [0, 1]), ("a/b[-3:-1]", [1, 2])],
)
def test_columns(column, picked):
    key, columns = split_column(column)
    assert key == "a/b" and list(range(4))[columns] == picked


def test_specs_from_fields():
    spec = make_spec({"image": "observation/front", "operations": [["clip_gripper", 0, 1]]}, CATALOGUE, "mine")
    assert spec.operations == (("clip_gripper", 0, 1),) and spec.image == "observation/front"
    assert make_spec("libero", CATALOGUE, "mine") is CATALOGUE["libero"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("libro", "unknown spec 'libro': known are .*libero"),
        ({"images": "x"}, "has no key 'images'; did you mean image?"),
        ({"operations": [["flip"]]}, "operation 'flip' is unknown: known are .*to_euler"),
        ({"operations": [["clip_gripper", 1]]}, "'clip_gripper' takes .*missing a required argument: 'high'"),
        ({"operations": [["to_euler", "quat"]]}, "rotation 'quat' of 'to_euler' is unknown: known are .*r6"),
        ({"action": ["action[0", 0]}, r"column 'action\[0' does not have the form"),
        ({"action": ["action[:6]", float("nan")]}, r"action\[1\]=nan is not a finite number"),
        ({"language": "words[:2]"}, r"language 'words\[:2\]' does not have the form"),
        ({"operations": [["gripper_range", 0.0, 0]]}, "'gripper_range' goes from 0.0 to 0: they must differ"),
        ({"operations": [["clip_gripper", 1, 0]]}, "'clip_gripper' goes from 1 to 0: the first must be smaller"),
        ({"operations": [["scale", 1, float("inf")]]}, "factors of 'scale'=inf is not a finite number"),
        (
            {"operations": [["drop_noops", "1e-3"]]},
            "threshold of 'drop_noops'='1e-3' is a string, but a number is expected",
        ),
        ({"operations": ["invert_gripper"]}, r"'invert_gripper' is a string, but a sequence is expected"),
        ({"default_intrinsics": ((0, 0, 0),) * 3}, r"\(fx, 0, cx\).* with fx and fy above 0 is expected"),
        ({"default_intrinsics": ((9, 0, 4), (0, 9, 4), (0, 0, 2))}, r"is not a matrix of intrinsics"),
        (
            {"default_intrinsics": ((1, 0, 0.5), (0, 1, 0.5), (0, 0, 1))},
            r"relative to the image .* by the width \(640\)",
        ),
        (
            {"default_intrinsics": ((600, 0, 320), (0, 600, 240), (0, 0, 1)), "default_intrinsics_size": (128, 128)},
            "its principal point inside the image of 128×128 px .* is expected, in pixels of an image of default_intr",
        ),
        (
            dataclasses.replace(CATALOGUE["libero"], default_intrinsics_size=(64, 64)),
            "principal point inside .* 64×64 px",
        ),
        ({"instruction": "  "}, r"instruction=' +' is empty$"),
        ({"operations": [["relabel_from_state", "s"]]}, r"'relabel_from_state' reads 's', which `arrays` must name"),
    ],
)
def test_bad_specs(value, message):
    with pytest.raises(InputError, match=f"'mine'.*{message}"):
        make_spec(value, CATALOGUE, "mine")
