"""A scripted pick-and-place expert that reads the simulator's state: one object is taken from above, and let go of
where it belongs, as a bowl on a plate or a bottle in a basket.

Plain numpy and pure functions: `act` maps (plan, progress, scene) to an action and the next progress, so that the whole
behaviour can be tested on hand-made states.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

# One unit of an OSC_POSE action is 5 cm or 0.5 rad of goal offset (robosuite's default controller limits).
METRES_PER_UNIT, RADIANS_PER_UNIT = 0.05, 0.5
GAIN = 1.5  # above 1 it commands past the target, which shortens the tail that the controller's damping gives
PLACED = 0.012  # metres above the height of release, where the object is let go of
LOST = 0.06  # metres between the hand and the grip point from which on the object is not in it
OPEN, CLOSE = -1.0, 1.0


class Scene(NamedTuple):
    """What the expert sees: metres and rotation matrices in the world frame."""

    eef_pos: Float[np.ndarray, "3"]
    eef_mat: Float[np.ndarray, "3 3"]
    object_pos: Float[np.ndarray, "3"]  # of what is taken
    object_mat: Float[np.ndarray, "3 3"]
    place_pos: Float[np.ndarray, "3"]  # of where it belongs


class Plan(NamedTuple):
    """How one episode is solved: along which line the fingers close (radians, world frame, 0 along +x), and lengths in
    metres. What is not given is for a bowl, held just below its rim, that is put on a plate."""

    angle: float
    spread: float = 0.15  # radians to either side of it that an episode may choose
    radius: float = 0.050  # of the grip point about the object's upright axis, towards `angle`
    height: float = 0.028  # of the grip point above the object's origin
    hover: float = 0.08  # above the grip point while the gripper is not yet over it
    lift: float = 0.06  # straight up after closing, before moving sideways
    carry: float = 0.06  # above the height of release while the object is not yet over its place
    release: float = 0.0  # height of the object's origin above the place's when it is let go
    open_steps: int = 5  # half of them still, until the fingers are off the object, half rising
    lean: float = 0.0  # radians that the fingers point forward (+x) instead of straight down, for what is far away


class Progress(NamedTuple):
    """Phase, its age in steps and its anchor: for "close" the grip point, for others the eef at its start."""

    phase: str = "reach"
    age: int = 0
    anchor: tuple[float, float, float] = (0.0, 0.0, 0.0)


PHASES = ("reach", "close", "lift", "carry", "open", "done")
CLOSE_STEPS = 9  # the fingers need about nine control steps from fully open


def grip_pose(plan: Plan, scene: Scene) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3 3"]]:
    """The end-effector pose that holds the object: pointing down, fingers along `plan.angle`."""
    up = upright(scene.object_mat)
    radial = np.array([np.cos(plan.angle), np.sin(plan.angle), 0.0])
    radial -= up * (up @ radial)  # the object may stand tilted
    position = scene.object_pos + plan.height * up + plan.radius * radial / np.linalg.norm(radial)
    return position, down_facing(gripper_yaw(plan.angle), plan.lean)


def upright(mat: Float[np.ndarray, "3 3"]) -> Float[np.ndarray, "3"]:
    """The axis of an object that points up, which in LIBERO is the y of some and the z of others."""
    axis = np.argmax(np.abs(mat[2]))
    return np.sign(mat[2, axis]) * mat[:, axis]


def gripper_yaw(angle: float) -> float:
    """The yaw in [-pi/2, pi/2) that puts the fingers along `angle`; at yaw 0 they open along the world's y."""
    return (angle % np.pi) - np.pi / 2


def down_facing(yaw: float, lean: float = 0.0) -> Float[np.ndarray, "3 3"]:
    """The rotation of a gripper that points down, turned by `yaw` about the world's z, leaning forward by `lean`."""
    c, s = np.cos(yaw), np.sin(yaw)
    turned = np.array([[c, s, 0.0], [s, -c, 0.0], [0.0, 0.0, -1.0]])
    c, s = np.cos(lean), np.sin(lean)
    return np.array([[c, 0.0, -s], [0.0, 1.0, 0.0], [s, 0.0, c]]) @ turned


def rotation_matrix(vector: Float[np.ndarray, "3"]) -> Float[np.ndarray, "3 3"]:
    """The rotation about `vector` by its length (radians): Rodrigues' formula."""
    angle = np.linalg.norm(vector)
    if angle < 1e-9:
        return np.eye(3)
    x, y, z = vector / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def rotation_vector(rotation: Float[np.ndarray, "3 3"]) -> Float[np.ndarray, "3"]:
    """Axis times angle (radians, angle < pi) of a rotation matrix."""
    axis = 0.5 * np.array(
        [rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]]
    )
    sine = np.linalg.norm(axis)
    return axis if sine < 1e-9 else axis / sine * np.arctan2(sine, (np.trace(rotation) - 1) / 2)


def move(scene: Scene, offset: Float[np.ndarray, "3"], mat: Float[np.ndarray, "3 3"], grip: float) -> np.ndarray:
    """The action f32[7] in [-1, 1] that drives the eef by `offset` metres and to the rotation `mat`."""
    turn = rotation_vector(mat @ scene.eef_mat.T)
    action = GAIN * np.concatenate([offset / METRES_PER_UNIT, turn / RADIANS_PER_UNIT])
    return np.append(np.clip(action, -1, 1), grip).astype(np.float32)


def act(plan: Plan, progress: Progress, scene: Scene) -> tuple[Float[np.ndarray, "7"], Progress]:
    """One step of the expert: the action to send now and the progress to pass in with the next scene.

    An object that slipped out of the fingers, or that they missed, is reached for again.
    """
    position, mat = grip_pose(plan, scene)
    phase, age, anchor = progress
    if phase in ("lift", "carry") and np.linalg.norm(position - scene.eef_pos) > LOST:
        phase, age = "reach", 0
    next_anchor = scene.eef_pos
    if phase == "reach":
        offset, finished = _reach(plan, scene, position, mat)
        action = move(scene, offset, mat, OPEN)
        next_anchor = position  # fixed from here on: the closing fingers push the object, which must not be followed
    elif phase == "close":
        action, finished = move(scene, np.array(anchor) - scene.eef_pos, mat, CLOSE), age + 1 >= CLOSE_STEPS
    elif phase == "lift":
        rise = anchor[2] + plan.lift - scene.eef_pos[2]
        # From 2 cm below the top on, the sideways motion may begin.
        action, finished = move(scene, np.array([0, 0, rise + 0.02]), mat, CLOSE), rise < 0.02
    elif phase == "carry":
        offset, finished = _carry(plan, anchor[2], scene)
        action = move(scene, offset, mat, CLOSE)
    else:
        up = 0.0 if age < plan.open_steps // 2 else 0.03
        action, finished = move(scene, np.array([0, 0, up]), scene.eef_mat, OPEN), age + 1 >= plan.open_steps
    if finished:
        return action, Progress(PHASES[PHASES.index(phase) + 1], 0, tuple(next_anchor.tolist()))
    return action, Progress(phase, age + 1, anchor)


def _reach(plan: Plan, scene: Scene, position: np.ndarray, mat: np.ndarray) -> tuple[np.ndarray, bool]:
    """Down a funnel: the height above the grip point shrinks with the sideways and rotational error."""
    offset = position - scene.eef_pos
    error = np.linalg.norm(offset[:2]) + 0.05 * np.linalg.norm(rotation_vector(mat @ scene.eef_mat.T))
    finished = bool(error < 0.015 and abs(offset[2]) < 0.02)  # the last centimetres happen while the fingers close
    offset[2] += np.clip(3 * (error - 0.015), 0, plan.hover)
    return offset, finished


def _carry(plan: Plan, start_z: float, scene: Scene) -> tuple[np.ndarray, bool]:
    """The same funnel for the object over its place: what moves the object moves the gripper that holds it.

    From a cabinet or a drawer it leaves at the height that it was lifted to.
    """
    offset = scene.place_pos - scene.object_pos
    offset[2] += plan.release
    error = np.linalg.norm(offset[:2])
    finished = bool(error < 0.02 and -offset[2] < PLACED)
    start_height = start_z - scene.eef_pos[2] - offset[2]
    offset[2] += np.clip(plan.carry / 0.04 * (error - 0.015), 0, max(plan.carry, start_height))
    return offset, finished
