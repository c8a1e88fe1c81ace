"""From chunks of T actions to one action per step: open loop, receding horizon, ensembles of overlapping chunks.

    executor = ChunkExecutor(weigh=adaptive, every=1)   # one per client or environment
    while True:
        action = executor.step(policy.infer(observation)["actions"] if executor.due else None)

Many environments can share one policy call: batch those that are due.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from spatialvla_jax.errors import InputError

# Maps predictions of one action, oldest first, to their weights, which need not sum to 1 but must sum to more than 0.
Weigh = Callable[[Float[np.ndarray, "N A"]], Float[np.ndarray, " N"]]


def newest(predictions: Float[np.ndarray, "N A"]) -> Float[np.ndarray, " N"]:
    """Weights only the last prediction: no ensemble."""
    return np.eye(len(predictions))[-1]


def adaptive(predictions: Float[np.ndarray, "N A"]) -> Float[np.ndarray, " N"]:
    """exp(0.1 · cosine similarity with the newest prediction): predictions in other directions count less.

    From CogACT (Li et al. 2024, section 3.4), but compares motions only: a gripper of 0 or 1 would dominate motions of
    a few millimetres.
    """
    motion = predictions[:, :-1]
    norms = np.linalg.norm(motion, axis=1)
    return np.exp(0.1 * (motion @ motion[-1]) / (norms * norms[-1] + 1e-12))


def recent(predictions: Float[np.ndarray, "N A"]) -> Float[np.ndarray, " N"]:
    """exp(-0.8 · age), as in the release's SimplerEnv evaluation (its `action_ensemble_temp` of -0.8)."""
    return np.exp(-0.8 * np.arange(len(predictions))[::-1])


def combine(
    predictions: Float[np.ndarray, "N A"] | Sequence[Float[np.ndarray, " A"]], weigh: Weigh
) -> Float[np.ndarray, " A"]:
    """Predictions of one action, oldest first → f32[A]: the weighted mean of the motions and the majority's gripper.

    A mean would half-open the gripper. Its weighted median is one of the predicted values; ties close it, as in the
    release, which opens above a mean of one half.
    """
    stacked = np.asarray(predictions, np.float64)
    weights = weigh(stacked)
    weights = weights / weights.sum()
    action = stacked[-1] + weights @ (stacked - stacked[-1])  # exact if all predictions are equal
    order = np.argsort(stacked[:, -1], kind="stable")
    action[-1] = stacked[order[np.searchsorted(np.cumsum(weights[order]), 0.5 - 1e-9)], -1]
    return action.astype(np.float32)


def chunk_of(reply: Any, action_dim: int | None = None) -> Float[np.ndarray, "T A"]:
    """The actions f32[T, A] in a reply of `Policy.infer`, or of any policy server.

    Raises InputError unless `reply` is a dict whose "actions" are finite numbers of shape [T, A] with T, A ≥ 1. If
    `action_dim` is given, A must equal it.
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
    """A draft for the chunk planned `steps` later: the rest of this one, its last action repeated."""
    steps = min(steps, len(chunk))
    return np.concatenate([chunk[steps:], np.repeat(chunk[-1:], steps, axis=0)])


class ChunkExecutor:
    """Executes one client's chunks; `due` says whether the next step needs a new one.

    A new chunk is due every `every` steps, by default when the current one is used up. `weigh` combines all chunks that
    cover the step. ChunkExecutor() runs open loop, ChunkExecutor(every=k) a receding horizon, ChunkExecutor(adaptive,
    1) the adaptive ensemble. Raises InputError for `every` < 1 and for a step without a chunk when one is due.
    """

    def __init__(self, weigh: Weigh = newest, every: int = sys.maxsize) -> None:
        if every < 1:
            raise InputError(f"a new chunk every {every} steps is not possible; choose 1 or more")
        self.weigh, self.every = weigh, every
        self.reset()

    def reset(self) -> None:
        """Start a new episode: forget all chunks."""
        self._chunks: list[tuple[int, Float[np.ndarray, "T A"]]] = []  # (steps since, chunk), oldest first

    @property
    def due(self) -> bool:
        return not self._chunks or self._chunks[-1][0] >= self.every

    def step(self, chunk: Float[np.ndarray, "T A"] | None = None) -> Float[np.ndarray, " A"]:
        """The action f32[A] of this step; `chunk` starts at this step and is required when `due`."""
        if chunk is not None:
            self._chunks.append((0, np.array(chunk)))
        if not self._chunks:
            raise InputError("the last chunk is used up: this step needs a new one")
        action = combine([chunk[age] for age, chunk in self._chunks], self.weigh)
        self._chunks = [(age + 1, chunk) for age, chunk in self._chunks if age + 1 < len(chunk)]
        return action


def executor(mode: str) -> ChunkExecutor:
    """An executor by name: `open_loop`, `receding:K` (a chunk every K steps), `adaptive` or `recent` (an ensemble each
    step). Raises InputError for other names."""
    kind, _, every = mode.partition(":")
    if mode == "open_loop":
        return ChunkExecutor()
    if kind == "receding" and every.isdecimal() and len(every) < 10 and int(every) > 0:
        return ChunkExecutor(every=int(every))
    if mode in ("adaptive", "recent"):
        return ChunkExecutor(adaptive if mode == "adaptive" else recent, every=1)
    raise InputError(f"execution {mode!r} is not known; choose open_loop, receding:K, adaptive or recent")
