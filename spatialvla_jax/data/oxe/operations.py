"""The operations that turn a dataset's own action into the canonical one: pure numpy functions, each with one meaning.

An operation takes and returns an episode: a dict of arrays that share their first axis, the steps. "action" is
f32[L, 7]; the others (the frames' byte ranges, the keys in `DatasetSpec.arrays`, …) follow when steps are dropped. The
rules for Bridge and Fractal are those of OpenVLA's standardisation transforms, which the release uses unchanged.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Episode = dict[str, np.ndarray]


def drop_first(episode: Episode) -> Episode:
    """Without the first step (Bridge: its action is all zero)."""
    return {key: value[1:] for key, value in episode.items()}


def clip_gripper(episode: Episode, low: float, high: float) -> Episode:
    """The gripper clipped to [low, high]."""
    return _with_gripper(episode, np.clip(episode["action"][:, 6], low, high))


def invert_gripper(episode: Episode) -> Episode:
    """1 - gripper."""
    return _with_gripper(episode, 1 - episode["action"][:, 6])


def binarize_gripper(episode: Episode) -> Episode:
    """A continuous gripper as 0 or 1: above 0.95 is open, below 0.05 closed, and a value between becomes what is
    reached after it; at the episode's end, where nothing is reached, the last action's own value."""
    gripper = episode["action"][:, 6].copy()
    state = gripper[-1] if len(gripper) else 0.0
    for step in reversed(range(len(gripper))):
        if gripper[step] > 0.95 or gripper[step] < 0.05:
            state = float(gripper[step] > 0.95)
        gripper[step] = state
    return _with_gripper(episode, gripper)


def absolute_gripper(episode: Episode) -> Episode:
    """A relative gripper (+1 closes, -1 opens, 0 leaves it) as 0 closed, 1 open. Before the first command it is the
    opposite of that command; without any command it is open."""
    relative = episode["action"][:, 6]
    command = np.where(relative < -0.1, 1.0, np.where(relative > 0.1, -1.0, 0.0))
    given = np.flatnonzero(command)
    latest = np.searchsorted(given, np.arange(len(command)), side="right") - 1
    start = -command[given[0]] if len(given) else 1.0
    state = np.where(latest >= 0, command[given[latest]] if len(given) else start, start)
    return _with_gripper(episode, state / 2 + 0.5)


def relabel_from_state(episode: Episode, key: str) -> Episode:
    """Movement = the next step's reached pose (the first 6 numbers of `key`) minus this one's; drops the last step."""
    pose = episode[key][:, :6]
    episode = {name: value[:-1] for name, value in episode.items()}
    return episode | {"action": np.concatenate([pose[1:] - pose[:-1], episode["action"][:, 6:]], axis=1)}


def _with_gripper(episode: Episode, gripper: np.ndarray) -> Episode:
    return episode | {"action": np.concatenate([episode["action"][:, :6], gripper[:, None]], axis=1, dtype=np.float32)}


OPERATIONS: dict[str, Callable[..., Episode]] = {
    function.__name__: function
    for function in (drop_first, clip_gripper, invert_gripper, binarize_gripper, absolute_gripper, relabel_from_state)
}


def apply_operations(episode: Episode, operations: tuple[tuple[Any, ...], ...]) -> Episode:
    """The episode after `operations`, each (name, *arguments)."""
    for name, *arguments in operations:
        episode = OPERATIONS[name](episode, *arguments)
    return episode
