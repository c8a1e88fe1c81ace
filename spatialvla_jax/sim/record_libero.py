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
from spatialvla_jax.errors import FaultsError, InputError
from spatialvla_jax.sim import scripted_expert as expert
from spatialvla_jax.sim.attempt import MAX_ATTEMPTS, PLANS, Job, Recorded, begin, perform
from spatialvla_jax.sim.jitter import check_jitter, jitter_scene
from spatialvla_jax.sim.libero import (
    CAMERA,
    camera,
    check_simulator,
    frame,
    positions,
    set_up_worker,
    simulate,
)
from spatialvla_jax.sim.motions import Motion, load_motions, save_motions
from spatialvla_jax.utils.process import end_worker_with_parent
from spatialvla_jax.utils.progress import Bar, warn

JPEG_QUALITY = 85
MAX_CRASHES = 3  # of processes, one after another without an episode between them, after which recording stops


@dataclass(frozen=True)
class TaskReport:
    """Statistics of one task's recording: accepted episodes and their mean steps, and the attempts that were not kept,
    as in `Recorded`."""

    language: str
    kept: int
    mean_steps: float
    failed: int
    solved: int


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
    takeovers: Callable[[Sequence[Job], int, bool], Iterator[Recorded]] | None = None,
) -> tuple[Path, dict[int, TaskReport]]:
    """Record `episodes` train and `val_episodes` val episodes, cycling through `tasks` (all by default).

    The suffix of `out` chooses the format: none for RLDS, .pack for a packed file (needs no TensorFlow), .npz for
    motions only (needs no renderer). `render_motions` renders motions later.

    Only episodes that pass the benchmark's success test are kept; others are retried with other noise. Train and val
    start from different initial states of the benchmark. With `drawn` they start from new states in the same regions,
    so a policy trained on them has seen none of the benchmark's states.

    `noise` disturbs the motion towards the object and the goal; the expert's corrections are recorded (DART, Laskey et
    al. 2017). It is a standard deviation in action units. With noise the fingers sometimes close too early and reopen.
    Each episode has a random grip angle, which images before the grip do not show. `spread` scales its range; with 0
    the images determine the actions. A packed file may hold images of every `every`-th step only, with all actions.
    `jitter`, from 0 to 1, varies camera, light and colours of each train episode (see `sim/jitter.py`); motions and val
    episodes stay the same.
    `takeovers` records the jobs with a policy that acts first, see `sim/takeover.py`.

    The same arguments give the same episodes for any number of `workers` (processes; default one per core). Rendering
    follows MUJOCO_GL, by default osmesa (CPU); egl distributes over the GPUs in CUDA_VISIBLE_DEVICES.

    Returns the version directory for `tfds.builder_from_directory`, or the file, and a report per task id. Raises
    InputError for bad arguments, an existing `out` or a missing simulator.
    """
    for name, value in (("noise", noise), ("spread", spread)):
        if not value >= 0:
            raise InputError(f"{name} is {value}: expected at least 0")
    if jitter and out.suffix == ".npz":
        raise InputError(f"jitter is {jitter}, but {out} has no images: expected 0; set jitter when rendering")
    _check_out(out, every, jitter)
    tasks = _check(suite, episodes, val_episodes, tasks, image_size, workers)
    jobs = deal(suite, tasks, episodes, val_episodes, seed, image_size)
    jobs = [replace(job, drawn=drawn, noise=noise, spread=spread, jitter=jitter) for job in jobs]
    report: dict[int, list[Recorded]] = {task: [] for task in tasks}

    def results(look: bool) -> Iterator[tuple[str, Any]]:
        alone, count = partial(record, look=look), workers or os.cpu_count() or 1
        recorded = takeovers(jobs, count, progress) if takeovers else in_processes(alone, jobs, count, progress)
        for job, result in zip(jobs, recorded, strict=True):
            report[job.task_id].append(result._replace(episode=None))
            yield job.split, result.episode

    if takeovers or out.suffix in (".npz", ".pack"):
        motions = [motion for _, motion in results(look=False)]
        if out.suffix == ".npz":
            save_motions(out, motions)
        else:
            out = _write_motions(out, motions, image_size, every, jitter, workers, progress)
    else:
        description = f"Scripted-expert demonstrations of {suite}, recorded with seed {seed}."
        out = _write(out, results(look=True), image_size, episodes, description)
    return out, {task: _summary(rows) for task, rows in report.items() if rows}


def _summary(rows: Sequence[Recorded]) -> TaskReport:
    counts = (sum(getattr(row, key) for row in rows) for key in ("failed", "solved"))
    return TaskReport(rows[0].language, len(rows), float(np.mean([row.steps for row in rows])), *counts)


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
    if out.suffix == ".npz":
        raise InputError(f"{out} would hold motions without their images: expected a directory or FILE.pack")
    _check_out(out, every, jitter)
    check_simulator()
    if len({file.resolve() for file in files}) < len(files):
        raise InputError(f"one file occurs twice in {', '.join(map(str, files))}: expected each once")
    found = [(file, motion) for file in files for motion in load_motions(file)]
    first: dict[Any, Path] = {}
    for file, motion in found:
        same = motion.suite, motion.task_id, motion.split, motion.seed, motion.action.tobytes()
        if (other := first.setdefault(same, file)) != file:
            raise InputError(f"{other} and {file} hold the same episodes: expected recordings with different --seed")
    episodes = sorted((motion for _, motion in found), key=lambda m: SPLITS.index(m.split))
    suites = sorted({motion.suite for motion in episodes})
    if len(suites) != 1:
        raise InputError(
            f"{', '.join(map(str, files))} hold episodes of {' and '.join(suites) or 'nothing'}: expected one suite"
        )
    return _write_motions(out, episodes, image_size, every, jitter, workers, progress)


def _check_out(out: Path, every: int, jitter: float) -> None:
    check_jitter(jitter)
    if every < 1 or (every > 1 and out.suffix != ".pack"):
        raise InputError(f"every is {every}: expected 1, or more with a FILE.pack")
    check_file(out) if out.suffix in (".pack", ".npz") else check_out(out)


def _write_motions(
    out: Path,
    motions: Sequence[Motion],
    image_size: int,
    every: int,
    jitter: float,
    workers: int | None,
    progress: bool,
) -> Path:
    """Render motions and write them, a packed file or RLDS."""
    packed = out.suffix == ".pack"
    pictured = motions
    if every > 1:
        keys = ("qpos", "state", "action")
        pictured = [replace(motion, **{key: getattr(motion, key)[::every] for key in keys}) for motion in motions]
    render = partial(render_motion, image_size=image_size, encoded=not packed, jitter=jitter)
    rendered = in_processes(render, pictured, workers or os.cpu_count() or 1, progress, "rendering")
    if packed:
        known = [(motion.split, motion.language, motion.action) for motion in motions]
        write_packed(out, known, rendered, name=motions[0].suite, image_size=image_size, every=every)
        return out
    pairs = ((motion.split, episode) for motion, episode in zip(motions, rendered, strict=True))
    trained = sum(motion.split == "train" for motion in motions)
    return _write(out, pairs, image_size, trained, f"Scripted-expert demonstrations of {motions[0].suite}.")


def _write(out: Path, episodes: Iterator[tuple[str, Any]], size: int, trained: int, description: str) -> Path:
    per_shard = max(3, -(-trained // 16))
    return write_episodes(out, episodes, image_size=size, episodes_per_shard=per_shard, description=description)


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

    When a process dies, for example because the renderer crashes, the jobs without a result are run again. Raises
    FaultsError when this happens `MAX_CRASHES` times without a result between them.
    """
    # Fresh processes, never a fork: OSMesa crashes in a process that has loaded TensorFlow, as the writer does.
    context, done, crashes = multiprocessing.get_context("spawn"), 0, 0
    with Bar(total=len(jobs), desc=doing, unit="episode", disable=not progress) as bar:
        while done < len(jobs):
            with ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker) as pool:
                try:
                    for result in pool.map(function, jobs[done:]):
                        done, crashes = done + 1, 0
                        bar.update()
                        yield result
                except BrokenProcessPool as error:
                    crashes += 1
                    if crashes == MAX_CRASHES:
                        hint = "a crash, or out of memory: try fewer workers"
                        raise FaultsError(f"a {doing} process died {crashes} times in a row ({hint})") from error
                    warn(f"a {doing} process died: the episodes that it and the others were working on are run again")
                except BaseException:  # stopped: do not wait for unfinished episodes
                    for process in multiprocessing.active_children():
                        process.kill()
                    raise


def start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends its workers
    end_worker_with_parent()  # it would wait for jobs forever
    set_up_worker()


def record(job: Job, look: bool) -> Recorded:
    """Retry until the benchmark accepts an episode. Without `look`, record only its motion."""
    for attempt in range(MAX_ATTEMPTS):
        if recorded := _attempt(job, attempt, look):
            motion, scene = recorded
            motion = replace(motion, failed=attempt)
            return Recorded(_episode(motion, *scene) if look else motion, motion.language, len(motion.action), attempt)
    raise FaultsError(f"{job.suite} task {job.task_id}: the expert failed {MAX_ATTEMPTS} times in a row ({job})")


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
    start = begin(job, attempt, render=look)
    with closing(start.env):
        if look:
            _jitter(start.env, job.split, start.seed, job.jitter)
        picture = partial(_picture, start.env, job.image_size, encoded=True) if look else lambda: None
        performed = perform(start, job, expert.Progress(), picture)
        return performed and (performed[0], (start.task.name, performed[1]))


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
    "extrinsics" and what `positions` returns."""
    image, depth = frame(env, size)
    intrinsics, extrinsics = camera(env, size)
    if not encoded:
        seen = {"extrinsics": extrinsics} | positions(env, extrinsics)
        return {"image": image, "depth": depth, "intrinsics": intrinsics} | seen, extrinsics
    encoded_depth = _encode(depth, "PNG", optimize=True)
    image = _encode(image, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return {"image": image, "depth": encoded_depth, "intrinsics": intrinsics}, extrinsics


def _encode(image: np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()
