"""Recording with a policy (DAgger, Ross et al. 2011): it acts for the first part of an episode, then the scripted
expert takes over.

Only the expert's part is recorded, so every chunk of actions is the expert's. The policy executes a random number of
whole chunks. An episode that the policy finishes itself, or that the expert then fails, is not kept: another attempt
with another seed replaces it, and both are counted.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float

from spatialvla_jax.errors import FaultsError
from spatialvla_jax.evaluation.rollouts import Environment, Episode, Infer, Settings, rollouts
from spatialvla_jax.sim import scripted_expert as expert
from spatialvla_jax.sim.attempt import MAX_ATTEMPTS, Job, Recorded, begin, perform
from spatialvla_jax.sim.libero import camera, holds_object, observe
from spatialvla_jax.sim.libero_env import Libero
from spatialvla_jax.utils.progress import Bar

POLICY_STEPS = 120  # at most; the expert alone needs about 75


class Takeover(Libero):
    """Episodes that the expert finishes (see `Environment`). In an `Episode`, `number` is a job's and `seed` the
    attempt at it. The record gets "outcome" (kept, failed or solved) and, if kept, "motion"."""

    def __init__(self, jobs: Sequence[Job], chunk: int, image_size: int, depth: bool, mirrored: bool) -> None:
        super().__init__(image_size, depth, mirrored)
        self.jobs, self.chunk = jobs, chunk

    def reset(self, episode: Episode) -> tuple[str, dict[str, Any]]:
        if self.env is not None:
            self.env.close()
        self.job = self.jobs[episode.number]
        self.start = begin(self.job, episode.seed, render=self.image_size > 0)
        self.env, self.state = self.start.env, self.start.env.env._get_observations()
        self.steps = self.chunk * int(self.start.rng.integers(1, max(1, POLICY_STEPS // self.chunk) + 1))
        self.left = self.steps
        if self.image_size:
            self.intrinsics, _ = camera(self.env, self.image_size)
        return self.start.task.language, self._look()

    def step(self, action: Float[np.ndarray, " 7"], look: bool) -> tuple[dict[str, Any], bool]:
        self.left -= 1
        observation, solved = super().step(action, look and self.left > 0)
        if solved:
            return {"record": {"outcome": "solved"}}, True
        return (observation, False) if self.left else ({"record": self._finish()}, True)

    def _finish(self) -> dict[str, Any]:
        scene, state = observe(self.env, self.state)
        plan, progress = expert.take_over(self.start.plan, scene, holds_object(self.env))
        performed = perform(self.start._replace(plan=plan, scene=scene, state=state), self.job, progress)
        if performed is None:
            return {"outcome": "failed"}
        return {"outcome": "kept", "motion": replace(performed[0], policy_steps=self.steps)}


def record_takeovers(
    environment: Callable[[], Environment], infer: Infer, jobs: Sequence[Job], workers: int, progress: bool
) -> Iterator[Recorded]:
    """The recorded episode of every job, in order. `environment` makes a `Takeover` in each of the `workers`
    processes.

    The results do not depend on the number of workers if those of `infer` do not. Raises FaultsError if no attempt at
    an episode succeeds, and see `rollouts`.
    """
    waiting = deque(Episode(job.suite, job.task_id, number, 0) for number, job in enumerate(jobs))
    settings = Settings({job.suite: POLICY_STEPS + 1 for job in jobs}, workers=workers)
    counts, kept = [Counter[str]() for _ in jobs], {}
    with Bar(total=len(jobs), desc="recording", unit="episode", disable=not progress) as bar:
        for episode, record, _ in rollouts(environment, infer, waiting, settings):
            count, job = counts[episode.number], jobs[episode.number]
            if motion := record.get("motion"):
                kept[episode.number] = replace(motion, failed=count["failed"], solved=count["solved"])
                bar.update()
                continue
            # After three faults there is no outcome. Another attempt replaces it, and it is counted.
            count["solved" if record.get("outcome") == "solved" else "failed"] += 1
            if (attempt := episode.seed + 1) == MAX_ATTEMPTS:
                raise FaultsError(f"{job.suite} task {job.task_id}: {attempt} attempts failed in a row ({job})")
            waiting.append(episode._replace(seed=attempt))
    for number in range(len(jobs)):
        motion = kept[number]
        yield Recorded(motion, motion.language, len(motion.action), motion.failed, motion.solved)
