"""One attempt at an episode of LIBERO-Spatial or LIBERO-Object: its start, and what the scripted expert does."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from spatialvla_jax.data.importers.rlds_writer import SPLITS
from spatialvla_jax.sim import scripted_expert as expert
from spatialvla_jax.sim.libero import observe, simulate, start, step
from spatialvla_jax.sim.motions import Motion

TRAIN_STATES, VAL_STATES = range(0, 40), range(40, 50)  # of the benchmark's 50 initial states per task
MAX_STEPS = 180
NOISE_STEPS = 4  # duration of a disturbance of the motion
SNAPS, SNAP_STEPS = 0.04, 10  # probability per disturbance that the fingers close too early, and for how many steps
MAX_ATTEMPTS = 100

# Objects are held along their vertical axis; boxes lie with their narrow side along y. They are carried over the
# basket's rim, 14.6 cm above its origin, and released inside, the tallest 1 cm above its floor. The hand stays above.
IN_BASKET = expert.Plan(np.deg2rad(90), radius=0.0, lift=0.08, carry=0.13, release=0.105, open_steps=16)

PLANS = {
    # Where the rim is gripped in each task (degrees around the bowl, 0 along +x, 90 along +y). The open fingers and the
    # arm must avoid the ramekin, drawer walls, cabinet and cookie box. Near ±90 degrees the fingers close across the
    # camera's view, so a policy sees whether they are open, and an error of depth only moves the grip along the rim.
    # Far from the base the gripper leans forward, because the arm is almost fully extended there and the controller
    # becomes inaccurate.
    "libero_spatial": (
        expert.Plan(np.deg2rad(-45)),  # between the plate and the ramekin
        expert.Plan(np.deg2rad(-45)),  # next to the ramekin
        expert.Plan(np.deg2rad(115)),  # table center
        expert.Plan(np.deg2rad(110), lean=0.2),  # on the cookie box
        expert.Plan(np.deg2rad(122), spread=0.03, radius=0.04, lift=0.09, lean=0.2),  # in the top drawer
        expert.Plan(np.deg2rad(-20)),  # on the ramekin; the bowl has tipped over there, and this side of its rim is up
        expert.Plan(np.deg2rad(90), lean=0.4),  # next to the cookie box
        expert.Plan(np.deg2rad(90)),  # on the stove
        expert.Plan(np.deg2rad(-120)),  # next to the plate
        expert.Plan(np.deg2rad(90), lean=0.3),  # on the wooden cabinet
    ),
    # The hand is 20 cm long and 4 cm above the grip point, so tall objects are held near the top. The grip is turned
    # where the hand would hit a neighbouring object. It is also turned at cartons, whose roofs are hollow and open
    # along y: a finger got caught there.
    "libero_object": (
        IN_BASKET._replace(axis=1, height=0.015),  # alphabet soup, a can
        IN_BASKET._replace(height=0.005, angle=np.deg2rad(70)),  # cream cheese, flat, beside a can
        IN_BASKET._replace(axis=1, height=0.045),  # salad dressing, a bottle
        IN_BASKET._replace(height=0.030),  # bbq sauce, a bottle
        IN_BASKET._replace(axis=1, height=0.045),  # ketchup, a bottle
        IN_BASKET._replace(axis=1, height=0.015, angle=np.deg2rad(60)),  # tomato sauce, a can, beside a carton
        IN_BASKET._replace(height=0.005),  # butter, flat
        IN_BASKET._replace(axis=1, height=0.030, angle=np.deg2rad(10)),  # milk, a carton
        IN_BASKET._replace(height=0.005),  # chocolate pudding, a flat box
        IN_BASKET._replace(axis=1, height=0.030, angle=np.deg2rad(10)),  # orange juice, a carton
    ),
}


@dataclass(frozen=True)
class Job:
    """One episode to record. The result depends only on these fields."""

    suite: str
    task_id: int
    split: str
    number: int  # within its split and task
    seed: int
    image_size: int
    drawn: bool = False  # draw a new initial state from the task's regions instead of using the benchmark's
    noise: float = 0.0  # see `record_libero`
    spread: float = 1.0
    jitter: float = 0.0


class Recorded(NamedTuple):
    """One accepted episode, as in `rlds_writer.features` or as its motion, and its number of steps. Also counts the
    attempts before it that the benchmark rejected (`failed`), or that a policy finished before the expert took over
    (`solved`)."""

    episode: Any
    language: str
    steps: int
    failed: int
    solved: int = 0


class Start(NamedTuple):
    """The scene of an attempt with the hand at a random start, and the expert's plan."""

    env: Any
    task: Any  # the benchmark's record
    seed: int
    init_state: int
    rng: np.random.Generator
    plan: expert.Plan
    scene: expert.Scene
    state: Float[np.ndarray, "8"]


def begin(job: Job, attempt: int, render: bool) -> Start:
    """The start of an attempt at an episode."""
    key = (job.seed, SPLITS.index(job.split), job.task_id, job.number, attempt)
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    rng = np.random.default_rng(seed)
    env, task, states = simulate(job.suite, job.task_id, seed, render=render)
    numbers = TRAIN_STATES if job.split == "train" else VAL_STATES
    init_state = -1 if job.drawn else numbers[(job.number + attempt) % len(numbers)]
    scene, state = start(env, env.get_sim_state() if job.drawn else states[init_state], rng)
    plan = PLANS[job.suite][job.task_id]
    plan = plan._replace(angle=plan.angle + job.spread * plan.spread * rng.uniform(-1, 1))
    return Start(env, task, seed, init_state, rng, plan, scene, state)


def perform(
    start: Start, job: Job, progress: expert.Progress, look: Callable[[], Any] = lambda: None
) -> tuple[Motion, list[Any]] | None:
    """The expert's actions from `start`, and what `look` returned before each step; None if the expert fails."""
    env, plan, rng, scene, state = start.env, start.plan, start.rng, start.scene, start.state
    rows, looks, disturbance, snapped = [], [], np.zeros(7, np.float32), 0
    while progress.phase != "done" and len(rows) < MAX_STEPS:
        action, progress = expert.act(plan, progress, scene)
        looks.append(look())
        rows.append((np.array(env.sim.data.qpos, np.float32), state, action))
        if job.noise and (len(rows) - 1) % NOISE_STEPS == 0:
            disturbance = np.append(job.noise * rng.standard_normal(6), 0).astype(np.float32)
            if rng.uniform() < SNAPS:
                snapped = len(rows) + SNAP_STEPS
        if job.noise and progress.phase in ("reach", "carry"):  # not while the fingers close or release
            action = np.clip(action + disturbance, -1, 1)
            if progress.phase == "reach" and len(rows) < snapped:
                action[6] = expert.CLOSE
        scene, state = observe(env, step(env, action))
    if progress.phase != "done" or not env.check_success():
        return None
    qpos, states, actions = map(np.stack, zip(*rows, strict=True))
    what = job.suite, job.task_id, job.split, start.seed, start.init_state, start.task.language
    return Motion(*what, qpos, states, actions), looks
