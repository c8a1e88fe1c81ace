"""Operations that convert a dataset's own action to the canonical one: pure NumPy functions, each with one meaning.

An operation takes and returns an episode: a dict of arrays whose first axis is the steps. "action" is f32[L, n]: motion
(3), rotation (3, or as its representation requires until `to_euler`), gripper last. The other arrays (byte ranges of
frames, keys in `DatasetSpec.arrays`, …) drop the same steps. The rules are those of the release's
data/oxe/transforms.py and data/utils/{data_utils,droid_utils}.py, which derive from Octo and OpenVLA.
"""

import ast
import hashlib
import inspect
import json
import textwrap
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from spatialvla_jax.errors import Fault, InputError
from spatialvla_jax.utils.schema import Field, check

Episode = dict[str, np.ndarray]

# Numbers in each representation of a rotation. r6 is the first two rows of the matrix; matrix is in row-major order.
ROTATIONS = {"euler": 3, "axis_angle": 3, "quaternion": 4, "quaternion_wxyz": 4, "r6": 6, "matrix": 9}


def to_euler(episode: Episode, rotation: str) -> Episode:
    """Converts the action's rotation from one of `ROTATIONS` to roll, pitch, yaw (R = Rz Ry Rx)."""
    action = episode["action"]
    euler = read_rotation(action[:, 3:-1], rotation).as_euler("xyz")
    return episode | {"action": np.concatenate([action[:, :3], euler, action[:, -1:]], axis=1, dtype=np.float32)}


def scale(episode: Episode, *factors: float) -> Episode:
    """Multiplies the action by one factor per column."""
    if len(factors) != episode["action"].shape[1]:
        raise InputError(f"'scale' has {len(factors)} factors for an action {episode['action'].shape[1]} wide")
    return episode | {"action": episode["action"] * np.asarray(factors, np.float32)}


def clip_gripper(episode: Episode, low: float, high: float) -> Episode:
    """Clips the gripper to [low, high]."""
    return _with_gripper(episode, np.clip(episode["action"][:, -1], low, high))


def invert_gripper(episode: Episode) -> Episode:
    """Replaces the gripper by 1 - gripper."""
    return _with_gripper(episode, 1 - episode["action"][:, -1])


def gripper_range(episode: Episode, closed: float, opened: float) -> Episode:
    """Maps a gripper that goes from `closed` to `opened` to 0 … 1."""
    return _with_gripper(episode, (episode["action"][:, -1] - closed) / (opened - closed))


def binarize_gripper(episode: Episode) -> Episode:
    """Makes a continuous gripper 0 or 1: above 0.95 is open, below 0.05 closed. Values between become the next state
    that is reached or, if none is, the last action's own value."""
    gripper = episode["action"][:, -1]
    reached = np.flatnonzero((gripper > 0.95) | (gripper < 0.05))
    after = np.searchsorted(reached, np.arange(len(gripper)))
    states = np.append((gripper[reached] > 0.95).astype(np.float32), gripper[-1:])
    return _with_gripper(episode, states[after])


def absolute_gripper(episode: Episode) -> Episode:
    """Converts a relative gripper (+1 closes, -1 opens, 0 keeps the state) to 0 closed, 1 open. Before the first
    command it is the opposite of that command; without any command it is open."""
    relative = episode["action"][:, -1]
    command = np.where(relative < -0.1, 1.0, np.where(relative > 0.1, -1.0, 0.0))
    given = np.flatnonzero(command)
    latest = np.searchsorted(given, np.arange(len(command)), side="right")
    states = np.append(-command[given[0]] if len(given) else 1.0, command[given])
    return _with_gripper(episode, states[latest] / 2 + 0.5)


def relabel_from_state(episode: Episode, key: str, rotation: str = "euler") -> Episode:
    """Replaces the motion by the change from this step's reached pose to the next one's, and drops the last step. The
    pose is the first numbers of `key`: position, then rotation. Positions and Euler angles are subtracted (Bridge's
    rule). Other rotations become the relative rotation in the frame of the robot's base."""
    pose, action = episode[key], episode["action"]
    if pose.ndim != 2 or pose.shape[1] < 3 + ROTATIONS[rotation]:
        numbers = 3 + ROTATIONS[rotation]
        raise InputError(
            f"'relabel_from_state' needs {numbers} numbers in {key!r}, which has the shape {pose.shape[1:]}"
        )
    delta = np.diff(pose[:, :6], axis=0)
    if rotation != "euler":
        turned = read_rotation(pose[:, 3 : 3 + ROTATIONS[rotation]], rotation)
        delta = np.concatenate([delta[:, :3], (turned[1:] * turned[:-1].inv()).as_euler("xyz")], axis=1)
    episode = {name: value[:-1] for name, value in episode.items()}
    return episode | {"action": np.concatenate([delta, action[:-1, -1:]], axis=1, dtype=np.float32)}


def drop_first(episode: Episode) -> Episode:
    """Drops the first step (Bridge: its action is all zeros)."""
    return {key: value[1:] for key, value in episode.items()}


def drop_idle(episode: Episode, window: int, tolerance: float) -> Episode:
    """Drops steps after which `window` actions, its own included, all keep the arm in place (no part of the motion
    above `tolerance`). Of each pause the last `window - 1` steps remain, so the motion in the next `window` actions of
    the remaining steps is unchanged. The last steps of the episode, which have fewer actions after them, remain too."""
    length = len(episode["action"])
    moving = np.any(np.abs(episode["action"][:, :6]) > tolerance, axis=1)
    moves = np.append(0, np.cumsum(moving))  # before each step
    start, end = np.arange(length), np.arange(length) + window
    keep = (end > length) | (moves[np.minimum(end, length)] > moves[start])
    return {key: value[keep] for key, value in episode.items()}


def drop_noops(episode: Episode, threshold: float) -> Episode:
    """Drops steps that neither move (norm of the motion below `threshold`) nor change the gripper. Also drops all steps
    before the first motion. This is OpenVLA's rule for LIBERO."""
    moving = np.linalg.norm(episode["action"][:, :6], axis=1) >= threshold
    gripper = episode["action"][:, -1]
    keep = moving | ((np.diff(gripper, prepend=gripper[:1]) != 0) & (np.cumsum(moving) > 0))
    return {key: value[keep] for key, value in episode.items()}


def read_rotation(values: np.ndarray, rotation: str) -> Rotation:
    """Rotations from [L, n] values in one of `ROTATIONS`. Raises a Fault for invalid values."""
    try:
        match rotation:
            case "euler":
                return Rotation.from_euler("xyz", values)
            case "axis_angle":
                return Rotation.from_rotvec(values)
            case "quaternion":
                return Rotation.from_quat(values)
            case "quaternion_wxyz":
                return Rotation.from_quat(np.roll(values, -1, axis=-1))
            case "matrix":
                return Rotation.from_matrix(values.reshape(-1, 3, 3))
            case "r6":  # Gram-Schmidt; the third row is the cross product of the other two
                first = _unit(values[:, :3])
                second = _unit(values[:, 3:] - np.sum(first * values[:, 3:], axis=1, keepdims=True) * first)
                return Rotation.from_matrix(np.stack([first, second, np.cross(first, second)], axis=1))
    except ValueError as error:  # a quaternion of norm 0, a matrix that turns left into right
        raise Fault("rotation", f"a rotation is invalid ({rotation}): {error}") from error
    raise InputError(f"the rotation {rotation!r} is unknown: known are {', '.join(ROTATIONS)}")


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1, or 0 for zero vectors."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > 0, length, 1)


def _with_gripper(episode: Episode, gripper: np.ndarray) -> Episode:
    return episode | {"action": np.concatenate([episode["action"][:, :-1], gripper[:, None]], axis=1, dtype=np.float32)}


OPERATIONS: dict[str, Callable[..., Episode]] = {
    function.__name__: function
    for function in (
        to_euler,
        scale,
        clip_gripper,
        invert_gripper,
        gripper_range,
        binarize_gripper,
        absolute_gripper,
        relabel_from_state,
        drop_first,
        drop_idle,
        drop_noops,
    )
}


LEAST = {"window": 1, "tolerance": 0, "threshold": 0}  # minima of the operations' arguments


def apply_operations(episode: Episode, operations: tuple[tuple[Any, ...], ...]) -> Episode:
    """Apply `operations`, each (name, *arguments), to the episode. Numbers may become infinite or NaN."""
    with np.errstate(all="ignore"):
        for name, *arguments in operations:
            episode = OPERATIONS[name](episode, *arguments)
    return episode


def code_digest(operations: tuple[tuple[Any, ...], ...]) -> str:
    """A digest of the code of `operations` and of the module's functions and constants that it uses. Comments,
    docstrings and layout do not affect it."""
    parts: dict[str, str] = {}
    todo: dict[str, Any] = {name: OPERATIONS[name] for name, *_ in operations}
    while todo:
        name, value = todo.popitem()
        if not inspect.isfunction(value):
            parts[name] = repr(value)
            continue
        value = inspect.unwrap(value)  # tests wrap functions to check their types
        tree = ast.parse(textwrap.dedent(inspect.getsource(value)))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
                node.body = node.body[1:]
        parts[name] = ast.unparse(tree)
        used = {node.id: value.__globals__.get(node.id) for node in ast.walk(tree) if isinstance(node, ast.Name)}
        constants = (int, float, str, tuple, list, dict)
        todo |= {
            k: v for k, v in used.items() if k not in parts and (inspect.isfunction(v) or isinstance(v, constants))
        }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def check_operations(operations: tuple[tuple[Any, ...], ...], arrays: Collection[str]) -> None:
    """Raises InputError for an unknown operation, invalid arguments, or one that reads a key not in `arrays`."""
    for name, *arguments in operations:
        if name not in OPERATIONS:
            raise InputError(f"the operation {name!r} is unknown: known are {', '.join(sorted(OPERATIONS))}")
        signature = inspect.signature(OPERATIONS[name])
        try:
            bound = signature.bind({}, *arguments).arguments
        except TypeError as error:
            raise InputError(f"the operation {name!r} takes {signature}: {error}") from error
        for parameter, value in [*bound.items()][1:]:
            kind = signature.parameters[parameter].annotation
            for one in value if isinstance(value, tuple) else (value,):
                check(one, Field(kind(), "", low=LEAST.get(parameter)), f"{parameter} of {name!r}")
        if (rotation := bound.get("rotation", "euler")) not in ROTATIONS:
            raise InputError(f"the rotation {rotation!r} of {name!r} is unknown: known are {', '.join(ROTATIONS)}")
        if (key := bound.get("key")) is not None and key not in arrays:
            raise InputError(f"the operation {name!r} reads {key!r}, which `arrays` must name: it names {list(arrays)}")
        if name == "gripper_range" and bound["closed"] == bound["opened"]:
            raise InputError(f"'gripper_range' goes from {bound['closed']} to {bound['opened']}: they must differ")
        if name == "clip_gripper" and bound["low"] >= bound["high"]:
            raise InputError(f"'clip_gripper' goes from {bound['low']} to {bound['high']}: the first must be smaller")


def width_before(operations: tuple[tuple[Any, ...], ...], width: int) -> int:
    """The width that an action must have for `operations` to make it `width` wide."""
    return width + sum(ROTATIONS[arguments[0]] - 3 for name, *arguments in operations if name == "to_euler")
