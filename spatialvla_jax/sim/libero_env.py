"""LIBERO's four suites as `closed_loop` environments, with its initial states, success test and limits."""

import contextlib
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

from spatialvla_jax.errors import InputError
from spatialvla_jax.evaluation import closed_loop
from spatialvla_jax.evaluation.rollouts import Episode, Infer, Settings
from spatialvla_jax.sim import scripted_expert as expert
from spatialvla_jax.sim.attempt import PLANS
from spatialvla_jax.sim.libero import (
    camera,
    check_simulator,
    frame,
    observe,
    proprioception,
    set_up_worker,
    simulate,
    step,
)
from spatialvla_jax.training.log_folder import LogFolder
from spatialvla_jax.utils.dataset_keys import find_key
from spatialvla_jax.utils.progress import progress_bar
from spatialvla_jax.utils.storage import AnyPath

# Step limits from OpenVLA, based on each suite's longest demonstration; the published numbers use them. LIBERO's own
# training scripts allow 600 for every suite.
MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520}
NUM_TASKS = 10  # per suite
SETTLE_STEPS = 10  # uncounted steps without motion before the first observation, while objects settle
NO_MOTION = np.array([0, 0, 0, 0, 0, 0, -1], np.float32)


class Libero:
    """A simulated Franka arm (see `Environment`). Actions are as in the dataset "libero": controller units
    in [-1, 1], gripper 0 closed to 1 open.

    Observations have "image" u8[S, S, 3], "intrinsics" f32[3, 3] in its pixels, "state" f32[8] (see `proprioception`)
    and, with `depth`, "depth" f32[S, S] in metres. The *_no_noops datasets hold mirrored images: the simulator's
    upside-down ones rotated by 180 degrees. `mirrored` reproduces these.
    """

    def __init__(self, image_size: int, depth: bool = False, mirrored: bool = False) -> None:
        set_up_worker()
        self.image_size, self.depth, self.mirrored = image_size, depth, mirrored
        self.env: Any = None

    def reset(self, episode: Episode) -> tuple[str, dict[str, Any]]:
        instruction = self._begin(episode, render=True)
        self.intrinsics, _ = camera(self.env, self.image_size)
        return instruction, self._look()

    def step(self, action: Float[np.ndarray, " 7"], look: bool) -> tuple[dict[str, Any], bool]:
        self.state = step(self.env, np.append(action[:6], -1.0 if action[6] > 0.5 else 1.0))
        return self._look() if look else {}, bool(self.env.check_success())

    def _begin(self, episode: Episode, render: bool) -> str:
        """Build a new scene with fixtures placed by the seed, so that episodes are independent."""
        if self.env is not None:
            self.env.close()
        self.env, task, states = simulate(episode.suite, episode.task, episode_seed(episode), render=render)
        self.env.set_init_state(states[initial_state(episode, len(states))])
        for _ in range(SETTLE_STEPS):
            self.state = step(self.env, NO_MOTION)
        return task.language

    def _look(self) -> dict[str, Any]:
        image, millimetres = frame(self.env, self.image_size)
        if self.mirrored:  # the principal point is central, so the intrinsics are unchanged
            image, millimetres = np.ascontiguousarray(image[:, ::-1]), np.ascontiguousarray(millimetres[:, ::-1])
        observation = {"image": image, "intrinsics": self.intrinsics, "state": proprioception(self.state)}
        return observation | ({"depth": millimetres * np.float32(0.001)} if self.depth else {})


class LiberoExpert(Libero):
    """`Libero` without images: observations have "expert" f32[7], the scripted expert's action in this state."""

    def __init__(self) -> None:
        super().__init__(image_size=0)

    def reset(self, episode: Episode) -> tuple[str, dict[str, Any]]:
        instruction = self._begin(episode, render=False)
        plan = PLANS[episode.suite][episode.task]
        turn = plan.spread * np.random.default_rng(episode_seed(episode)).uniform(-1, 1)
        self.plan, self.progress = plan._replace(angle=plan.angle + turn), expert.Progress()
        return instruction, self._look()

    def _look(self) -> dict[str, Any]:
        action = NO_MOTION
        if self.progress.phase != "done":
            action, self.progress = expert.act(self.plan, self.progress, observe(self.env, self.state)[0])
        return {"expert": np.append(action[:6], (1 - action[6]) / 2).astype(np.float32)}


def episodes(suites: Sequence[str], per_task: int, seeds: Sequence[int], tasks: Sequence[int] | None) -> list[Episode]:
    """The episodes to run, cycling through tasks. Raises InputError for bad arguments or a missing simulator."""
    for suite in suites:
        if suite not in MAX_STEPS:
            raise InputError(f"unknown suite {suite!r}: choose from {', '.join(MAX_STEPS)}")
    tasks = range(NUM_TASKS) if tasks is None else tasks
    for task in tasks:
        if task not in range(NUM_TASKS):
            raise InputError(f"unknown task {task}: expected 0 to {NUM_TASKS - 1}")
    for name, values in (("suites", suites), ("seeds", seeds), ("tasks", tasks)):
        if len({*values}) < len(values):
            raise InputError(f"{name} are {','.join(map(str, values))}: expected each once")
    if per_task < 1 or not tasks or not seeds or not suites:
        raise InputError(f"{per_task} episodes of {len(tasks)} tasks with {len(seeds)} seeds: expected at least one")
    check_simulator()
    numbers = range(per_task)
    return [Episode(suite, task, n, seed) for suite in suites for seed in seeds for n in numbers for task in tasks]


def evaluate(
    infer: Infer,
    episodes: Sequence[Episode],
    settings: Settings,
    out: AnyPath,
    *,
    policy: str,
    image_size: int,
    depth: bool,
    keys: Sequence[str],
    unnorm_key: str | None = None,
    videos: int = 0,
) -> dict[str, Any]:
    """`closed_loop.evaluate` with a progress bar and images of `image_size` pixels a side. They are mirrored if those
    of the dataset `unnorm_key`, by default the first of the policy's `keys`, are."""
    mirrored = is_mirrored(unnorm_key or "".join(keys[:1]))
    with progress_bar("closed loop", "episode") as show, contextlib.closing(LogFolder(out)) as folder:
        return closed_loop.evaluate(
            partial(Libero, image_size, depth, mirrored),
            infer,
            episodes,
            settings,
            folder,
            policy=f"{policy}, {image_size} px" + (f", {unnorm_key}" if unnorm_key else ""),
            videos=videos,
            progress=lambda done, successes: show(done, len(episodes), note=f"{successes} successes"),
        )


def is_mirrored(dataset: str) -> bool:
    """Whether a dataset's images are mirrored, see `Libero`."""
    return dataset.partition("/")[0].endswith("no_noops")


def dataset_of(suite: str, datasets: Collection[str]) -> str:
    """The dataset whose action units a policy of these datasets has in `suite`. Raises InputError if it is not
    unique."""
    found = [name for name in datasets if len(datasets) == 1 or name.startswith(suite)]
    found = [suite] if suite in found else found
    if len(found) != 1:
        raise InputError(
            f"suite {suite!r}: expected one dataset whose name begins with it, to know the action's units; "
            f"the data has {', '.join(datasets)}"
        )
    return found[0]


def check_units(suite: str, datasets: Sequence[str], unnorm_key: str | None) -> None:
    """Raises InputError if a policy of these datasets would act in `suite` in the units of another, `unnorm_key`,
    although it knows the suite's own."""
    own = [name for name in datasets if name.startswith(suite)]
    if own and unnorm_key is not None and find_key(unnorm_key, own) is None:
        raise InputError(
            f"--unnorm-key {unnorm_key!r} has the action units of another suite than {suite}, whose own the policy "
            f"knows as {own[0]}: each suite needs a call of its own"
        )


def initial_state(episode: Episode, count: int) -> int:
    """Index of the episode's start among the benchmark's `count` initial states of the task. The seed gives the order;
    `count` episodes use each state once."""
    order = np.random.default_rng((episode.seed, episode.task)).permutation(count)
    return int(order[episode.number % count])


def episode_seed(episode: Episode) -> int:
    key = (episode.seed, list(MAX_STEPS).index(episode.suite), episode.task, episode.number)
    return int(np.random.SeedSequence(key).generate_state(1)[0])
