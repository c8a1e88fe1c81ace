"""A scripted pick-and-place expert that reads the simulator's state. It grasps one object from above and releases it at
its goal, such as a bowl on a plate or a bottle in a basket.

Plain NumPy and pure functions: `act` maps (plan, progress, scene) to an action and the next progress. All of its
behaviour can thus be tested on hand-made states.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

# One unit of an OSC_POSE action is 5 cm or 0.5 rad of goal offset (robosuite's default controller limits).
METRES_PER_UNIT, RADIANS_PER_UNIT = 0.05, 0.5
GAIN = 1.5  # above 1 the command overshoots the target, which shortens the tail from the controller's damping
PLACED = 0.012  # metres above the release height at which the object is released
LOST = 0.06  # metres between hand and grip point beyond which the object counts as lost
OPEN, CLOSE = -1.0, 1.0


class Scene(NamedTuple):
    """The expert's view: metres and rotation matrices in the world frame."""

    eef_pos: Float[np.ndarray, "3"]
    eef_mat: Float[np.ndarray, "3 3"]
    object_pos: Float[np.ndarray, "3"]  # of the object to move
    object_mat: Float[np.ndarray, "3 3"]
    place_pos: Float[np.ndarray, "3"]  # of its goal


class Plan(NamedTuple):
    """How to solve one episode: the axis along which the fingers close (radians, world frame, 0 along +x), and lengths
    in metres. Defaults are for a bowl that is held just below its rim and put on a plate."""

    angle: float
    spread: float = 0.15  # radians by which an episode's angle may differ from `angle`, either way
    radius: float = 0.050  # of the grip point from the object's vertical axis, towards `angle`
    height: float = 0.028  # of the grip point above the object's origin
    hover: float = 0.08  # above the grip point while the gripper is not yet over it
    lift: float = 0.06  # straight up after closing, before moving sideways
    carry: float = 0.06  # above the release height while the object is not yet over its goal
    release: float = 0.0  # height of the object's origin above the goal's on release
    open_steps: int = 5  # first half: stand still until the fingers are off the object; second half: rise
    axis: int = 2  # of the object's frame, which points up when it stands: y for some of LIBERO's objects, z for others
    lean: float = 0.0  # radians by which the fingers lean forward (+x) from straight down, for distant objects


class Progress(NamedTuple):
    """Phase, its age in steps and its anchor (metres): the grip point in "close", where to go in "clear", else the
    hand's initial position. Episodes begin with "reach"; "clear" comes before it only after `take_over`."""

    phase: str = "reach"
    age: int = 0
    anchor: tuple[float, float, float] = (0.0, 0.0, 0.0)


PHASES = ("clear", "reach", "close", "lift", "carry", "open", "done")
CLOSE_STEPS = 9  # the fingers need about nine control steps from fully open
CLEAR_STEPS = 20  # after which the hand moves on even if something blocks its first target


def take_over(plan: Plan, scene: Scene, held: bool) -> tuple[Plan, Progress]:
    """Plan and progress for an episode that something else has brought to this scene.

    If the fingers hold the object (`held`), it is lifted and carried as it is. Otherwise the hand first opens and
    rises, so that it neither drags an object along nor pushes one over. An object that is held by its vertical axis is
    gripped across that axis if it has fallen over.
    """
    up, hand = scene.object_mat[:, plan.axis], scene.eef_pos
    if held:
        axis, offset = scene.eef_mat[:, 1], hand - scene.object_pos
        grip = {"angle": float(np.arctan2(axis[1], axis[0])), "radius": float(offset @ axis)}
        return plan._replace(**grip, height=float(offset @ up)), Progress("lift", 0, tuple(hand.tolist()))
    if plan.radius == 0 and abs(up[2]) < 0.5:
        across = float(np.arctan2(up[1], up[0]) + np.pi / 2)
        # Released from higher up, so that the hand stays above a basket's rim.
        plan = plan._replace(angle=across, height=0.0, release=plan.release + plan.height)
    return plan, Progress("clear", 0, (*hand[:2].tolist(), float(grip_pose(plan, scene)[0][2] + plan.hover)))


def grip_pose(plan: Plan, scene: Scene) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3 3"]]:
    """The end-effector pose that grips the object: pointing down, fingers along `plan.angle`."""
    up = scene.object_mat[:, plan.axis]
    radial = np.array([np.cos(plan.angle), np.sin(plan.angle), 0.0])
    radial -= up * (up @ radial)  # the object may stand tilted
    position = scene.object_pos + plan.height * up + plan.radius * radial / max(1e-9, np.linalg.norm(radial))
    return position, down_facing(gripper_yaw(plan.angle), plan.lean)


def gripper_yaw(angle: float) -> float:
    """The yaw in [-pi/2, pi/2) that aligns the fingers with `angle`; at yaw 0 they open along the world's y."""
    return (angle % np.pi) - np.pi / 2


def down_facing(yaw: float, lean: float = 0.0) -> Float[np.ndarray, "3 3"]:
    """The rotation of a gripper that points down, turned by `yaw` about the world's z and leaning forward by `lean`."""
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
    """The action f32[7] in [-1, 1] that moves the end effector by `offset` metres and to the rotation `mat`."""
    turn = rotation_vector(mat @ scene.eef_mat.T)
    action = GAIN * np.concatenate([offset / METRES_PER_UNIT, turn / RADIANS_PER_UNIT])
    return np.append(np.clip(action, -1, 1), grip).astype(np.float32)


def act(plan: Plan, progress: Progress, scene: Scene) -> tuple[Float[np.ndarray, "7"], Progress]:
    """One step of the expert: the action to send now and the progress to pass in with the next scene.

    The expert reaches again for an object that slipped out of the fingers or was missed.
    """
    position, mat = grip_pose(plan, scene)
    phase, age, anchor = progress
    if phase in ("lift", "carry") and np.linalg.norm(position - scene.eef_pos) > LOST:
        phase, age = "reach", 0
    next_anchor = scene.eef_pos
    if phase == "clear":
        offset = np.maximum(np.array(anchor) - scene.eef_pos, [-1, -1, 0])
        action = move(scene, offset, scene.eef_mat, OPEN)
        finished = bool(np.linalg.norm(offset) < 0.03) or age + 1 >= CLEAR_STEPS
    elif phase == "reach":
        offset, finished = _reach(plan, scene, position, mat)
        action = move(scene, offset, mat, OPEN)
        next_anchor = position  # fixed: closing fingers push the object, and the hand must not follow it
    elif phase == "close":
        action, finished = move(scene, np.array(anchor) - scene.eef_pos, mat, CLOSE), age + 1 >= CLOSE_STEPS
    elif phase == "lift":
        rise = anchor[2] + plan.lift - scene.eef_pos[2]
        # Sideways motion may begin 2 cm below the top.
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
    """Approach through a funnel: the height above the grip point shrinks with the sideways and rotational error."""
    offset = position - scene.eef_pos
    error = np.linalg.norm(offset[:2]) + 0.05 * np.linalg.norm(rotation_vector(mat @ scene.eef_mat.T))
    finished = bool(error < 0.015 and abs(offset[2]) < 0.02)  # the fingers close during the last centimetres
    offset[2] += np.clip(3 * (error - 0.015), 0, plan.hover)
    return offset, finished


def _carry(plan: Plan, start_z: float, scene: Scene) -> tuple[np.ndarray, bool]:
    """The same funnel for the object above its goal: moving the gripper moves the object it holds.

    The object leaves a cabinet or drawer at the height to which it was lifted.
    """
    offset = scene.place_pos - scene.object_pos
    offset[2] += plan.release
    error = np.linalg.norm(offset[:2])
    finished = bool(error < 0.02 and -offset[2] < PLACED)
    start_height = start_z - scene.eef_pos[2] - offset[2]
    offset[2] += np.clip(plan.carry / 0.04 * (error - 0.015), 0, max(plan.carry, start_height))
    return offset, finished
