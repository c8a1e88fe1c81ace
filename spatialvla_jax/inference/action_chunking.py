"""From chunks of T actions to one action a step: open loop, receding horizon, ensembles of overlapping chunks.

    executor = ChunkExecutor(weigh=adaptive, every=1)   # one a client or environment
    while True:
        action = executor.step(policy.infer(observation)["actions"] if executor.due else None)

Many environments share one policy call: those that are due form the batch.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from spatialvla_jax.errors import InputError

# Predictions of one action, oldest first -> their weights, of any sum above 0.
Weigh = Callable[[Float[np.ndarray, "N A"]], Float[np.ndarray, " N"]]


def newest(predictions: Float[np.ndarray, "N A"]) -> Float[np.ndarray, " N"]:
    """The last prediction alone: no ensemble."""
    return np.eye(len(predictions))[-1]


def adaptive(predictions: Float[np.ndarray, "N A"], alpha: float = 0.1) -> Float[np.ndarray, " N"]:
    """exp(alpha · cosine similarity with the newest prediction): what points elsewhere counts less.

    CogACT (Li et al. 2024, section 3.4), but the similarity is that of the motions: a gripper of 0 or 1 beside
    motions of millimetres would decide it alone.
    """
    motion = predictions[:, :-1]
    norms = np.linalg.norm(motion, axis=1)
    return np.exp(alpha * (motion @ motion[-1]) / (norms * norms[-1] + 1e-12))


def recent(predictions: Float[np.ndarray, "N A"], rate: float = 0.8) -> Float[np.ndarray, " N"]:
    """exp(-rate · age): how the release's own SimplerEnv evaluation weighs (its `action_ensemble_temp` of -0.8)."""
    return np.exp(-rate * np.arange(len(predictions))[::-1])


def combine(
    predictions: Float[np.ndarray, "N A"] | Sequence[Float[np.ndarray, " A"]], weigh: Weigh
) -> Float[np.ndarray, " A"]:
    """Predictions of one action, oldest first → the weighted mean of the motions and the gripper of the majority.

    A mean would half open the gripper; the weighted median is a gripper that was predicted, closed on a tie, as in the
    release, which opens above a mean of one half.
    """
    stacked = np.asarray(predictions, np.float64)
    weights = weigh(stacked)
    weights = weights / weights.sum()
    action = stacked[-1] + weights @ (stacked - stacked[-1])  # so that equal predictions stay what they are, exactly
    order = np.argsort(stacked[:, -1], kind="stable")
    action[-1] = stacked[order[np.searchsorted(np.cumsum(weights[order]), 0.5 - 1e-9)], -1]
    return action.astype(np.float32)


def chunk_of(reply: Any, action_dim: int | None = None) -> Float[np.ndarray, "T A"]:
    """The actions f32[T, A] in a reply of `Policy.infer`, or of any policy server.

    Raises InputError where `reply` is no dict with "actions", or they are not numbers of two axes, each of at least one
    and the second of `action_dim` where given, or hold NaN or infinity as float32.
    """
    if not isinstance(reply, dict) or "actions" not in reply:
        got = (
            f"a map with {', '.join(map(str, reply)) or 'nothing'}" if isinstance(reply, dict) else type(reply).__name__
        )
        raise InputError(f"a reply must be a map with 'actions', got {got:.200}")
    expected = f"numbers of shape [steps, {action_dim or 'dimensions'}]"
    try:
        actions = np.asarray(reply["actions"])
    except ValueError:
        raise InputError(f"a reply's 'actions' must be {expected}, got rows of different lengths") from None
    shaped = actions.ndim == 2 and actions.size and action_dim in (None, actions.shape[1])
    if not shaped or actions.dtype.kind not in "fiu":
        raise InputError(f"a reply's 'actions' must be {expected}, got {actions.dtype}{list(actions.shape)}")
    with np.errstate(over="ignore"):
        chunk = actions.astype(np.float32)
    if not np.isfinite(chunk).all():
        raise InputError(
            f"a reply's 'actions' hold {int((~np.isfinite(chunk)).sum())} numbers that are NaN or infinite"
        )
    return chunk


def shift(chunk: Int[np.ndarray, "T n"], steps: int) -> Int[np.ndarray, "T n"]:
    """The draft of the chunk that is planned `steps` later: what is left of this one, its last action held."""
    steps = min(steps, len(chunk))
    return np.concatenate([chunk[steps:], np.repeat(chunk[-1:], steps, axis=0)])


class ChunkExecutor:
    """Executes one client's chunks; `due` says whether the next step needs a new one.

    A new chunk is due every `every` steps, by default when the last one is used up. `weigh` combines all chunks that
    reach the step: ChunkExecutor() is the open loop, ChunkExecutor(every=k) the receding horizon,
    ChunkExecutor(adaptive, 1) the adaptive ensemble.
    """

    def __init__(self, weigh: Weigh = newest, every: int = sys.maxsize) -> None:
        if every < 1:
            raise InputError(f"a new chunk every {every} steps is not possible; choose 1 or more")
        self.weigh, self.every = weigh, every
        self.reset()

    def reset(self) -> None:
        """Forget the episode."""
        self._chunks: list[tuple[int, Float[np.ndarray, "T A"]]] = []  # (steps since, chunk), oldest first

    @property
    def due(self) -> bool:
        return not self._chunks or self._chunks[-1][0] >= self.every

    def step(self, chunk: Float[np.ndarray, "T A"] | None = None) -> Float[np.ndarray, " A"]:
        """The action of this step; `chunk` begins at it and is needed where `due`."""
        if chunk is not None:
            self._chunks.append((0, np.array(chunk)))
        if not self._chunks:
            raise InputError("the last chunk is used up: this step needs a new one")
        action = combine([chunk[age] for age, chunk in self._chunks], self.weigh)
        self._chunks = [(age + 1, chunk) for age, chunk in self._chunks if age + 1 < len(chunk)]
        return action


def executor(mode: str) -> ChunkExecutor:
    """By name: `open_loop`, `receding:K` (a chunk every K steps), `adaptive` or `recent` (an ensemble each step)."""
    kind, _, every = mode.partition(":")
    if mode == "open_loop":
        return ChunkExecutor()
    if kind == "receding" and every.isdecimal() and len(every) < 10 and int(every) > 0:
        return ChunkExecutor(every=int(every))
    if mode in ("adaptive", "recent"):
        return ChunkExecutor(adaptive if mode == "adaptive" else recent, every=1)
    raise InputError(f"execution {mode!r} is not known; choose open_loop, receding:K, adaptive or recent")
