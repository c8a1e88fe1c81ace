"""Demonstrations of LIBERO-Spatial and LIBERO-Object, recorded with the scripted expert in parallel processes."""

# The simulator is an optional extra.
# pyright: reportMissingImports=false

import io
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from spatialvla_jax.data.importers.rlds_writer import SPLITS, check_out, write_episodes
from spatialvla_jax.data.pack_recording import check_file, write_packed
from spatialvla_jax.errors import InputError
from spatialvla_jax.sim import scripted_expert as expert
from spatialvla_jax.sim.jitter import check_jitter, jitter_scene
from spatialvla_jax.sim.libero import (
    CAMERA,
    camera,
    check_simulator,
    frame,
    observe,
    set_up_worker,
    simulate,
    start,
    target_position,
)
from spatialvla_jax.sim.motions import Motion, load_motions, save_motions

JPEG_QUALITY = 85
TRAIN_STATES, VAL_STATES = range(0, 40), range(40, 50)  # of the benchmark's 50 initial states per task
MAX_STEPS = 180
NOISE_STEPS = 4  # duration of a disturbance of the motion
SNAPS, SNAP_STEPS = 0.04, 10  # probability per disturbance that the fingers close too early, and for how many steps
MAX_ATTEMPTS = 100

# Objects are held along their vertical axis; boxes lie with their narrow side along y. They are carried over the
# basket's rim, 14.6 cm above its origin, and released inside, the tallest 1 cm above its floor. The hand stays above.
IN_BASKET = expert.Plan(np.deg2rad(90), radius=0.0, lift=0.08, carry=0.13, release=0.105, open_steps=16)

PLANS = {
    # Where the rim is gripped in each task (degrees around the bowl, 0 along +x, 90 along +y), so that the open fingers
    # and the arm avoid the ramekin, drawer walls, cabinet and cookie box. Far from the base the gripper leans forward,
    # because the arm is almost fully extended there and the controller becomes inaccurate.
    "libero_spatial": (
        expert.Plan(np.deg2rad(-45)),  # between the plate and the ramekin
        expert.Plan(np.deg2rad(-45)),  # next to the ramekin
        expert.Plan(np.deg2rad(115)),  # table center
        expert.Plan(np.deg2rad(110), lean=0.2),  # on the cookie box
        expert.Plan(np.deg2rad(122), spread=0.03, radius=0.04, lift=0.09, lean=0.2),  # in the top drawer
        expert.Plan(np.deg2rad(180)),  # on the ramekin
        expert.Plan(np.deg2rad(90), lean=0.4),  # next to the cookie box
        expert.Plan(np.deg2rad(60)),  # on the stove
        expert.Plan(np.deg2rad(180)),  # next to the plate
        expert.Plan(np.deg2rad(75), lean=0.3),  # on the wooden cabinet
    ),
    # The hand is 20 cm long and 4 cm above the grip point, so tall objects are held near the top. The grip is turned
    # where the hand would hit a neighbouring object. It is also turned at cartons, whose roofs are hollow and open
    # along y: a finger got caught there.
    "libero_object": (
        IN_BASKET._replace(height=0.015),  # alphabet soup, a can
        IN_BASKET._replace(height=0.005, angle=np.deg2rad(70)),  # cream cheese, flat, beside a can
        IN_BASKET._replace(height=0.045),  # salad dressing, a bottle
        IN_BASKET._replace(height=0.030),  # bbq sauce, a bottle
        IN_BASKET._replace(height=0.045),  # ketchup, a bottle
        IN_BASKET._replace(height=0.015, angle=np.deg2rad(60)),  # tomato sauce, a can, beside a carton
        IN_BASKET._replace(height=0.005),  # butter, flat
        IN_BASKET._replace(height=0.030, angle=np.deg2rad(10)),  # milk, a carton
        IN_BASKET._replace(height=0.005),  # chocolate pudding, a flat box
        IN_BASKET._replace(height=0.030, angle=np.deg2rad(10)),  # orange juice, a carton
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


@dataclass(frozen=True)
class TaskReport:
    """Statistics of one task's recording: attempts, accepted episodes, and mean steps of those accepted."""

    language: str
    tried: int
    kept: int
    mean_steps: float


def record_libero(
    suite: str,
    episodes: int,
    out: Path,
    *,
    val_episodes: int = 0,
    tasks: Sequence[int] | None = None,
    seed: int = 0,
    image_size: int = 128,
    drawn: bool = False,
    noise: float = 0.0,
    spread: float = 1.0,
    every: int = 1,
    jitter: float = 0.0,
    workers: int | None = None,
    progress: bool = True,
) -> tuple[Path, dict[int, TaskReport]]:
    """Record `episodes` train and `val_episodes` val episodes, cycling through `tasks` (all by default).

    The suffix of `out` chooses the format: none for RLDS, .pack for a packed file (without TensorFlow), .npz for
    motions only (without a renderer), which `render_motions` renders later.

    Only episodes that pass the benchmark's success test are kept; others are retried with other noise. Train and val
    start from different initial states of the benchmark. With `drawn` they start from new states in the same regions,
    so a policy trained on them has seen none of the benchmark's states.

    `noise` disturbs the motion towards the object and the goal; the expert's corrections are recorded (DART, Laskey et
    al. 2017). It is a standard deviation in action units. With noise the fingers sometimes close too early and reopen.
    Each episode has a random grip angle, which images before the grip do not show. `spread` scales its range; with 0
    the images determine the actions. A packed file may hold images of every `every`-th step only, with all actions.
    `jitter`, from 0 to 1, varies camera, light and colours of each train episode (see `sim/jitter.py`); motions and val
    episodes stay the same.

    The same arguments give the same episodes for any number of `workers` (processes; default one per core). Rendering
    follows MUJOCO_GL, by default osmesa (CPU); egl distributes over the GPUs in CUDA_VISIBLE_DEVICES.

    Returns the version directory for `tfds.builder_from_directory`, or the file, and a report per task id. Raises
    InputError for bad arguments, an existing `out` or a missing simulator.
    """
    for name, value in (("noise", noise), ("spread", spread)):
        if not value >= 0:
            raise InputError(f"{name} is {value}: expected at least 0")
    if jitter and out.suffix == ".npz":
        raise InputError(f"jitter is {jitter}, and {out} will hold no pictures: expected 0, and jitter when rendering")
    _check_out(out, every, jitter)
    tasks = _check(suite, episodes, val_episodes, tasks, image_size, workers)
    jobs = deal(suite, tasks, episodes, val_episodes, seed, image_size)
    jobs = [replace(job, drawn=drawn, noise=noise, spread=spread, jitter=jitter) for job in jobs]
    report: dict[int, list[tuple[str, int, int]]] = {task: [] for task in tasks}

    def results(look: bool) -> Iterator[tuple[str, Any]]:
        recorded = in_processes(partial(record, look=look), jobs, workers or os.cpu_count() or 1, progress)
        for job, (result, *row) in zip(jobs, recorded, strict=True):
            report[job.task_id].append(tuple(row))
            yield job.split, result

    if out.suffix in (".npz", ".pack"):
        motions = [motion for _, motion in results(look=False)]
        if out.suffix == ".npz":
            save_motions(out, motions)
        else:
            _pack(out, motions, image_size, every, jitter, workers, progress)
    else:
        description = f"Scripted-expert demonstrations of {suite}, recorded with seed {seed}."
        out = _write(out, results(look=True), image_size, episodes, description)
    return out, {
        task: TaskReport(rows[0][0], sum(r[1] for r in rows), len(rows), float(np.mean([r[2] for r in rows])))
        for task, rows in report.items()
        if rows
    }


def render_motions(
    files: Sequence[Path],
    out: Path,
    *,
    image_size: int = 128,
    every: int = 1,
    jitter: float = 0.0,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Render the motions that `record_libero` wrote and write the dataset it would otherwise have written. Several
    files, recorded with different seeds, become one dataset.

    Each frame shows the state of its step; direct recordings that of 2 ms (a physics step) earlier. For `jitter` see
    `record_libero`. Raises InputError.
    """
    _check_out(out, every, jitter)
    check_simulator()
    episodes = sorted((motion for file in files for motion in load_motions(file)), key=lambda m: SPLITS.index(m.split))
    suites = sorted({motion.suite for motion in episodes})
    if len(suites) != 1:
        raise InputError(
            f"{', '.join(map(str, files))} hold episodes of {' and '.join(suites) or 'nothing'}: expected one suite"
        )
    if out.suffix == ".pack":
        _pack(out, episodes, image_size, every, jitter, workers, progress)
        return out
    rendered = _render(episodes, image_size, jitter, workers, progress, encoded=True)
    pairs = ((motion.split, episode) for motion, episode in zip(episodes, rendered, strict=True))
    trained = sum(motion.split == "train" for motion in episodes)
    return _write(out, pairs, image_size, trained, f"Scripted-expert demonstrations of {suites[0]}.")


def _check_out(out: Path, every: int, jitter: float) -> None:
    check_jitter(jitter)
    if every < 1 or (every > 1 and out.suffix != ".pack"):
        raise InputError(f"every is {every}: expected 1 or, for pictures of some steps only, more and a FILE.pack")
    check_file(out) if out.suffix in (".pack", ".npz") else check_out(out)


def _write(out: Path, episodes: Iterator[tuple[str, Any]], size: int, trained: int, description: str) -> Path:
    per_shard = max(3, -(-trained // 16))
    return write_episodes(out, episodes, image_size=size, episodes_per_shard=per_shard, description=description)


def _render(
    motions: Sequence[Motion], image_size: int, jitter: float, workers: int | None, progress: bool, encoded: bool
) -> Iterator[dict]:
    render = partial(render_motion, image_size=image_size, encoded=encoded, jitter=jitter)
    return in_processes(render, motions, workers or os.cpu_count() or 1, progress, "rendering")


def _pack(
    out: Path,
    motions: Sequence[Motion],
    image_size: int,
    every: int,
    jitter: float,
    workers: int | None,
    progress: bool,
) -> None:
    known = [(motion.split, motion.language, motion.action) for motion in motions]
    pictured = [
        replace(motion, **{key: getattr(motion, key)[::every] for key in ("qpos", "state", "action")})
        for motion in motions
    ]
    rendered = _render(pictured, image_size, jitter, workers, progress, encoded=False)
    write_packed(out, known, rendered, name=motions[0].suite, image_size=image_size, every=every)


def deal(suite: str, tasks: Sequence[int], episodes: int, val_episodes: int, seed: int, image_size: int) -> list[Job]:
    """The episodes to record, cycling through tasks: first train, then val from the task where train stopped."""
    jobs = []
    counts: dict[tuple[str, int], int] = {}
    for i in range(episodes + val_episodes):
        split, task = SPLITS[i >= episodes], tasks[i % len(tasks)]
        number = counts.get((split, task), 0)
        counts[split, task] = number + 1
        jobs.append(Job(suite, task, split, number, seed, image_size))
    return jobs


def in_processes(
    function: Callable[[Any], Any], jobs: Sequence[Any], workers: int, progress: bool, doing: str = "recording"
) -> Iterator[Any]:
    """Results of `function` over `jobs`, in order, from `workers` fresh processes, with a progress bar.

    Raises RuntimeError when a process dies, for example because the renderer crashes or memory runs out.
    """
    from tqdm import tqdm

    # Fresh processes, never a fork: OSMesa crashes in a process that has loaded TensorFlow, as the writer does.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker) as pool:
        try:
            yield from tqdm(pool.map(function, jobs), doing, len(jobs), unit="episode", disable=not progress)
        except BrokenProcessPool as error:
            raise RuntimeError(f"a {doing} process died (a crash, or out of memory: try fewer workers)") from error
        except BaseException:  # stopped: do not wait for unfinished episodes
            for process in multiprocessing.active_children():
                process.kill()
            raise


def start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends its workers
    set_up_worker()


def record(job: Job, look: bool) -> tuple[dict | Motion, str, int, int]:
    """Retry until the benchmark accepts an episode. Returns (the episode as in `rlds_writer.features`, or its motion if
    not `look`; its instruction; the number of attempts; the number of steps)."""
    for attempt in range(MAX_ATTEMPTS):
        if recorded := _attempt(job, attempt, look):
            motion, scene = recorded
            result = _episode(motion, *scene) if look else motion
            return result, motion.language, attempt + 1, len(motion.action)
    raise RuntimeError(f"{job.suite} task {job.task_id}: the expert failed {MAX_ATTEMPTS} times in a row ({job})")


def _check(
    suite: str, episodes: int, val_episodes: int, tasks: Sequence[int] | None, image_size: int, workers: int | None
) -> list[int]:
    if suite not in PLANS:
        raise InputError(f"unknown suite {suite!r}: the scripted expert solves {', '.join(PLANS)}")
    tasks = list(range(len(PLANS[suite]))) if tasks is None else list(tasks)
    for task in tasks:
        if task not in range(len(PLANS[suite])):
            raise InputError(f"unknown task {task} of {suite}: expected 0 to {len(PLANS[suite]) - 1}")
    bounds = {
        "episodes": (episodes, 1),
        "val_episodes": (val_episodes, 0),
        "tasks": (len(tasks), 1),
        "image_size": (image_size, 1),
        "workers": (workers or 1, 1),
    }
    for name, (value, least) in bounds.items():
        if value < least:
            raise InputError(f"{name} is {value}: expected at least {least}")
    check_simulator()
    return tasks


def _attempt(job: Job, attempt: int, look: bool) -> tuple[Motion, tuple] | None:
    """One attempt at an episode: its motion and the other arguments of `_episode`, or None if the expert fails."""
    key = (job.seed, SPLITS.index(job.split), job.task_id, job.number, attempt)
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    rng = np.random.default_rng(seed)
    env, task, states = simulate(job.suite, job.task_id, seed, render=look)
    with closing(env):
        numbers = TRAIN_STATES if job.split == "train" else VAL_STATES
        init_state = -1 if job.drawn else numbers[(job.number + attempt) % len(numbers)]
        scene, state = start(env, env.get_sim_state() if job.drawn else states[init_state], rng)
        plan = PLANS[job.suite][job.task_id]
        plan = plan._replace(angle=plan.angle + job.spread * plan.spread * rng.uniform(-1, 1))
        if look:
            _jitter(env, job.split, seed, job.jitter)
        rows, frames, progress, disturbance, snapped = [], [], expert.Progress(), np.zeros(7, np.float32), 0
        while progress.phase != "done" and len(rows) < MAX_STEPS:
            action, progress = expert.act(plan, progress, scene)
            if look:
                frames.append(_picture(env, job.image_size, encoded=True))
            rows.append((np.array(env.sim.data.qpos, np.float32), state, action))
            if job.noise and (len(rows) - 1) % NOISE_STEPS == 0:
                disturbance = np.append(job.noise * rng.standard_normal(6), 0).astype(np.float32)
                if rng.uniform() < SNAPS:
                    snapped = len(rows) + SNAP_STEPS
            if job.noise and progress.phase in ("reach", "carry"):  # not while the fingers close or release
                action = np.clip(action + disturbance, -1, 1)
                if progress.phase == "reach" and len(rows) < snapped:
                    action[6] = expert.CLOSE
            scene, state = observe(env, env.step(action)[0])
        if progress.phase != "done" or not env.check_success():
            return None
    arrays = map(np.stack, zip(*rows, strict=True))
    motion = Motion(job.suite, job.task_id, job.split, seed, init_state, task.language, *arrays)
    return motion, (task.name, frames)


def render_motion(motion: Motion, image_size: int, encoded: bool, jitter: float = 0.0) -> dict:
    """Render the images of a motion: its episode, as `_episode` returns it."""
    env, task, _ = simulate(motion.suite, motion.task_id, motion.seed)
    with closing(env):
        frames = []
        _jitter(env, motion.split, motion.seed, jitter)
        for qpos in motion.qpos:
            env.sim.data.qpos[:] = qpos
            env.sim.forward()
            frames.append(_picture(env, image_size, encoded))
        return _episode(motion, task.name, frames)


def _jitter(env: Any, split: str, seed: int, amount: float) -> None:
    if amount and split == "train":
        jitter_scene(env, CAMERA, seed, amount)


def _episode(motion: Motion, name: str, frames: Sequence[tuple[dict, np.ndarray]]) -> dict:
    """An episode in the writers' format, see `rlds_writer.features` and `write_packed`."""
    steps, extrinsics = [], frames[0][1]
    for i, ((seen, _), state, action) in enumerate(zip(frames, motion.state, motion.action, strict=True)):
        last = i == len(frames) - 1
        observation = seen | {"state": state}
        step = {"observation": observation, "action": action, "language_instruction": motion.language}
        step |= {"reward": float(last), "discount": 1.0, "is_first": i == 0, "is_last": last, "is_terminal": last}
        steps.append(step)
    metadata = {"task_id": motion.task_id, "task_name": name, "seed": motion.seed, "init_state": motion.init_state}
    return {"steps": steps, "episode_metadata": metadata | {"success": True, "extrinsics": extrinsics}}


def _picture(env: Any, size: int, encoded: bool) -> tuple[dict[str, Any], Float[np.ndarray, "4 4"]]:
    """The camera's part of an observation, and its extrinsics. Unencoded, for a packed file, the observation also has
    "extrinsics" and "target", the place of the object to move."""
    image, depth = frame(env, size)
    intrinsics, extrinsics = camera(env, size)
    if not encoded:
        seen = {"extrinsics": extrinsics, "target": target_position(env, extrinsics)}
        return {"image": image, "depth": depth, "intrinsics": intrinsics} | seen, extrinsics
    encoded_depth = _encode(depth, "PNG", optimize=True)
    image = _encode(image, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return {"image": image, "depth": encoded_depth, "intrinsics": intrinsics}, extrinsics


def _encode(image: np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()
