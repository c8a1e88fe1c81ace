"""Loss spikes: the run returns to a checkpoint before the spike and continues with the batches after it.

Nothing here is random, and checkpoints hold all that decisions depend on. A run that is killed at any moment, even
while going back, therefore meets the same spikes again and ends with the same bits.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import jax

from spatialvla_jax.errors import InputError

Metrics = dict[str, jax.Array]


@dataclass(frozen=True)
class SpikePolicy:
    """`config.train.spikes`, see `config.KEYS`."""

    factor: float
    window: int
    rewind: int
    limit: int


@dataclass
class Watch:
    """Checks the steps' metrics one step late, so that the device always has work.

    `skipped` batches were skipped so far: step s uses batch s + skipped.
    """

    policy: SpikePolicy
    every: int  # steps between two checkpoints
    max_skipped: int
    skipped: int = 0
    spikes: list[dict[str, Any]] = field(default_factory=list)  # {"step", "loss", "median", "rewound_to"}
    losses: list[float] = field(default_factory=list)  # of the most recent steps
    waiting: deque[tuple[int, Metrics]] = field(default_factory=deque)

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint stores, as fields for the resumed run's `Watch`; {} for a run that never had a policy."""
        kept = {"skipped": self.skipped, "spikes": self.spikes, "losses": self.losses}
        return kept if self.policy.factor or self.spikes else {}

    def counts(self) -> dict[str, int]:
        """The counts for the metrics log."""
        return {"spikes": len(self.spikes), "spikes/skipped_batches": self.skipped} if self.to_dict() else {}

    def look(self, *, leave: int = 0) -> int | None:
        """Wait for the completed steps except the last `leave` and check their losses. Returns the step to go back to
        if one was a spike, else None. Raises InputError after too many skipped steps or spikes."""
        while len(self.waiting) > leave:
            step, metrics = self.waiting.popleft()
            check_skipped(metrics, step, self.max_skipped)
            if self.policy.factor and (target := self._spike(step, float(metrics["loss"]))):
                self.waiting.clear()
                return target
        return None

    def restored(self, step: int, stored: dict[str, Any]) -> None:
        """The run is back at `step`, whose checkpoint holds `stored`. `step` is earlier if the target's is gone."""
        self.losses = stored.get("losses", [])
        last = self.spikes[-1]
        self.skipped += last["rewound_to"] - step
        self.spikes = [*self.spikes[:-1], last | {"rewound_to": step}]

    def describe(self) -> str:
        """A sentence about the last spike."""
        spike = self.spikes[-1]
        return (
            f"step {spike['step']}: the loss is {spike['loss']:.4g}, the median of {self.policy.window} steps before "
            f"{spike['median']:.4g}: back to step {spike['rewound_to']}, and on without the batches of the "
            f"{spike['step'] - spike['rewound_to']} steps between (spike {len(self.spikes)} of at most "
            f"{self.policy.limit})"
        )

    def _spike(self, step: int, loss: float) -> int | None:
        policy, usual = self.policy, median(self.losses) if len(self.losses) == self.policy.window else math.inf
        target = (step - max(policy.rewind, 1)) // self.every * self.every
        if not math.isfinite(loss):  # the step was skipped and changed nothing
            return None
        if loss <= policy.factor * usual or target < self.every:
            self.losses = [*self.losses, loss][-policy.window :]
            return None
        if len(self.spikes) == policy.limit:
            raise InputError(
                f"step {step}: the loss is {loss:.4g}, the median of {policy.window} steps before it {usual:.4g}, "
                f"after {policy.limit} such spikes, the most that train.spikes.limit allows; lower the learning rate, "
                "or look at the data"
            )
        self.spikes = [*self.spikes, {"step": step, "loss": loss, "median": usual, "rewound_to": target}]
        self.skipped += step - target
        return target


def check_skipped(metrics: Metrics, step: int, limit: int) -> None:
    """Wait for the step that computes `metrics`; raises InputError if more than `limit` steps were skipped."""
    skipped = int(metrics["skipped"])
    if skipped > limit:
        raise InputError(
            f"step {step}: loss or gradient are not finite, {skipped} times in this run: more than train.max_skipped "
            f"{limit}; lower the learning rate, or look at the data of the steps with `skipped` in metrics.jsonl"
        )
