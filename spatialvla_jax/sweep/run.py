"""Run a sweep's trials. Each is trained, evaluated and summarised in one file, once, however many processes run it.

DIR/sweep.json                            the plan, for the report
DIR/compiled/                             JAX's compilation cache, which all trials share
DIR/trials/NAME/                          the run, as written by `train`
DIR/trials/NAME/closed_loop/              success in simulation, as written by `evaluate --closed-loop`
DIR/trials/NAME/result.json               exists when finished; on failure failed.json gives the reason
DIR/trials/NAME/running                   the trial is running, or its process died
DIR/trials/NAME/{grid.json,data.npz}      data for the report's figures
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from spatialvla_jax.checkpoints.hub import find_checkpoint
from spatialvla_jax.checkpoints.orbax import step_directory
from spatialvla_jax.checkpoints.types import read_json
from spatialvla_jax.config import flatten
from spatialvla_jax.data import DataConfig
from spatialvla_jax.errors import InputError
from spatialvla_jax.evaluation.closed_loop import read_summary
from spatialvla_jax.sim.libero_env import MAX_STEPS, NUM_TASKS
from spatialvla_jax.sweep.measure import data_digest, measure, simulate, weights_digest
from spatialvla_jax.sweep.plan import Sweep, Trial
from spatialvla_jax.training.init_from import check_begun
from spatialvla_jax.training.loop import CONFIG, begun_config, train
from spatialvla_jax.utils.atomic import write_json
from spatialvla_jax.utils.compilation_cache import share_compilations
from spatialvla_jax.utils.distributed import is_writer
from spatialvla_jax.utils.process import tied_to_this, try_lock
from spatialvla_jax.utils.progress import Bar, warn
from spatialvla_jax.utils.shipped import shipped
from spatialvla_jax.utils.storage import exists, to_path

FINISHED, FAILED, STOPPED, ELSEWHERE = "finished", "failed", "stopped", "being run by another process"


def folder_of(workdir: Path, trial: Trial) -> Path:
    return workdir / "trials" / trial.name


def finished(folder: Path, trial: Trial) -> bool:
    """Whether a trial has its result and, if the sweep requires it, all episodes of its closed loop."""
    path, wanted = folder / "closed_loop" / "result.json", trial.closed_loop
    if not (folder / "result.json").exists() or (wanted and not path.exists()):
        return False
    if not wanted:
        return True
    done = read_summary(path)
    tasks = {int(task) for suite in done["suites"].values() for task in suite["tasks"]}
    asked = set(wanted["tasks"] or range(NUM_TASKS))
    count = len(asked) * len(wanted["seeds"]) * wanted["episodes"]
    suite = wanted["suite"] or next(iter(read_json(folder / "result.json").get("data", ())), "")
    if suite in MAX_STEPS and [*done["suites"]] != [suite]:
        return False
    return (tasks, done["seeds"], done["episodes"]) == (asked, sorted(wanted["seeds"]), count)


def prepare(sweep: Sweep, workdir: Path) -> None:
    """Write the plan. Raises InputError for a trial that was started with another config or made from other data.

    Warns if finished trials started from other weights than `init` holds now: it may have been trained again.
    """
    weights, path = functools.cache(weights_digest), workdir / "sweep.json"
    before = read_json(path) if path.exists() else None
    if before and before.get("name") != sweep.name:
        raise InputError(f"{workdir} holds the sweep {before.get('name')}, not {sweep.name}: use another workdir")
    others = []
    for trial in sweep.trials:
        folder, packed = folder_of(workdir, trial), trial.config.data.packed
        result = read_json(folder / "result.json") if (folder / "result.json").exists() else {}
        # A finished trial may have no checkpoints left.
        if begun := begun_config(folder, step_directory(folder)) or (result and read_json(folder / CONFIG)):
            check_begun(begun, trial.config, folder)
        # The data of a trial that ran on another machine need not be here.
        files = DataConfig.from_config(trial.config.data).packed_files if "packed" in result else ()
        here = "packed" in result and all(exists(to_path(file)) for file in files)
        if here and result["packed"] != data_digest(trial.config):
            raise InputError(f"{folder} was made from other data than {packed or 'data.datasets'}: use another workdir")
        init = find_checkpoint(trial.config.init, "init") if result.get("init") else None
        if init and exists(init) and weights(init) != result["init"]:
            others.append(f"{trial.name}, from {trial.config.init}")
    if others:
        trials = f"{len(others)} finished trial{'s' * (len(others) > 1)}"
        warn(f"{trials} started from weights that init no longer holds: {others[0]}{'; …' * (len(others) > 1)}")
    workdir.mkdir(parents=True, exist_ok=True)
    configs = {trial.name: flatten(trial.config.to_dict()) for trial in sweep.trials}
    first = configs[sweep.trials[0].name]
    common = {key: value for key, value in first.items() if all(of[key] == value for of in configs.values())}
    trials = {trial.name: {"values": trial.values, "seed": trial.seed} for trial in sweep.trials}
    plan = {
        "name": sweep.name,
        "axes": sweep.axes,
        "reference": sweep.reference,
        "seeds": sweep.seeds,
        "trials": trials,
        "config": sweep.config,
        "overrides": sweep.overrides,
        "config_of_all": common,
        "config_of_each": {name: {k: v for k, v in of.items() if k not in common} for name, of in configs.items()},
    }
    if before != json.loads(json.dumps(plan)):
        write_json(path, plan)


def run_here(
    sweep: Sweep, workdir: Path, trials: Sequence[Trial], say: Callable[[str], None], workers: int = 1
) -> dict[str, str]:
    """Run trials one after another in this process → {name: outcome}. SIGTERM checkpoints the trial and stops.
    Closed loops have `workers` simulators at once.

    If a process died during a trial, the trial counts as failed so that later trials run. Like all failed trials it is
    retried the next time. A single trial blocks no others and is resumed at once. So are trials of multi-process runs,
    where the mark of a dead process cannot be told from that of the first process of this run.
    """
    share_compilations(workdir / "compiled")
    outcomes = {}
    for number, trial in enumerate(trials, 1):
        folder = folder_of(workdir, trial)
        folder.mkdir(parents=True, exist_ok=True)
        with claim(folder) as claimed:
            if finished(folder, trial):
                outcomes[trial.name] = FINISHED
                continue
            if not claimed:
                outcomes[trial.name] = ELSEWHERE
                continue
            died = (folder / "running").exists() and not (folder / "failed.json").exists()
            if died and len(trials) > 1 and jax.process_count() == 1:
                (folder / "running").unlink()
                write_failure(folder, trial, "its process died: killed, or out of memory?")
                outcome = FAILED
            else:
                say(f"trial {number} of {len(trials)}: {trial.name}")
                outcome = attempt(sweep, trial, folder, workers)
            outcomes[trial.name] = outcome
        if outcome == FAILED:
            say(f"{trial.name} failed: {json.loads((folder / 'failed.json').read_text())['reason']}")
        if outcome == STOPPED:
            break
    return outcomes


def run_parallel(command: Sequence[str], workdir: Path, trials: Sequence[Trial], processes: int) -> dict[str, str]:
    """Run `command --only NAME` for each trial, `processes` at once → {name: outcome}; output goes to log.txt.

    GPUs are divided among the processes. With fewer GPUs than processes, processes share a GPU's memory.
    """
    count = len(list(Path("/dev").glob("nvidia[0-9]*")))
    gpus = [g for g in os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",") if g]
    running: set[subprocess.Popen] = set()
    stopping = threading.Event()
    places = list(range(processes))  # one free slot per thread

    def run(trial: Trial) -> str:
        folder = folder_of(workdir, trial)
        if finished(folder, trial):
            return FINISHED
        if stopping.is_set():
            return STOPPED
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "failed.json").unlink(missing_ok=True)
        place = places.pop()
        environment = tied_to_this(os.environ)
        if gpus:
            assigned = gpus[place::processes] or [gpus[place % len(gpus)]]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(assigned)
        if 0 < len(gpus) < processes:
            share = 0.75 / -(-processes // len(gpus))  # leaves room for contexts and graphs
            environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{share:.3f}")
        with (folder / "log.txt").open("a") as log:
            process = subprocess.Popen([*command, "--only", trial.name], stdout=log, stderr=log, env=environment)
            running.add(process)
            code = process.wait()
            running.discard(process)
        places.append(place)
        if finished(folder, trial):
            return FINISHED
        if stopping.is_set():
            return STOPPED
        if code and not (folder / "failed.json").exists():  # killed or out of memory, so it wrote no reason
            write_failure(folder, trial, f"its process ended with exit code {code}, see log.txt")
        return FAILED if (folder / "failed.json").exists() else STOPPED

    def stop(*_: Any) -> None:
        stopping.set()
        for process in list(running):
            process.terminate()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with ThreadPoolExecutor(processes) as pool:
            try:
                outcomes = Bar(pool.map(run, trials), total=len(trials), desc="sweep", unit="trial")
                return dict(zip([trial.name for trial in trials], outcomes, strict=True))
            except KeyboardInterrupt:
                stop()
                raise
    finally:
        signal.signal(signal.SIGTERM, before)


def launch(
    launcher: str, arguments: str, config: str, workdir: Path, trials: Sequence[Trial], flags: Sequence[str], dry: bool
) -> None:
    """Start one job per unfinished trial; a dry run prints the jobs. Raises InputError if one fails."""
    for trial in trials:
        if finished(folder_of(workdir, trial), trial):
            continue
        command, environment = job_command(launcher, arguments, config, workdir, trial, flags, dry)
        if code := subprocess.run(command, env=os.environ | environment).returncode:
            raise InputError(f"`{shlex.join(command)}` ended with exit code {code}")


def job_command(
    launcher: str, arguments: str, config: str, workdir: Path, trial: Trial, flags: Sequence[str], dry_run: bool
) -> tuple[list[str], dict[str, str]]:
    """The command that runs one trial with a script of `launch/`, and its additional environment variables.

    `arguments` are sbatch's options, or CLUSTER TPU_TYPE SLICES IMAGE for xpk. Raises InputError for others.
    """
    places = [config, str(workdir), "--only", trial.name, *flags]
    dry = ["--dry-run"] if dry_run else []
    if launcher == "xpk":
        if len(shlex.split(arguments)) != 4:
            raise InputError(f"--launcher-args for xpk are CLUSTER TPU_TYPE SLICES IMAGE, got {arguments!r}")
        name = re.sub("[^a-z0-9]", "-", trial.name.lower()).strip("-")
        if len(name) > 38:  # the most that xpk takes; trials may differ in the first characters alone
            name = f"t{hashlib.sha256(trial.name.encode()).hexdigest()[:6]}-{name[-30:].strip('-')}"
        return ["bash", str(shipped("launch/gke_xpk.sh")), *dry, *shlex.split(arguments), *places], {
            "COMMAND": "sweep",
            "NAME": name,
        }
    submit = ["bash"] if dry_run else ["sbatch", "--nodes=1", f"--job-name={trial.name}", *shlex.split(arguments)]
    return [*submit, str(shipped("launch/slurm.sbatch")), *dry, *places], {"COMMAND": "sweep"}


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Lock the trial for the duration of the block; yields success. The OS releases it if the process dies."""
    if not is_writer():
        yield True
        return
    with (folder / "lock").open("w") as file:
        yield try_lock(file)


def attempt(sweep: Sweep, trial: Trial, folder: Path, workers: int) -> str:
    """Run a trial → its outcome. Errors are written to failed.json."""
    if is_writer():
        (folder / "running").touch()
    (folder / "failed.json").unlink(missing_ok=True)

    def begin(run: Any) -> None:
        """Called before the first step."""
        if is_writer() and not run.start:  # trained anew: a result beside the new metrics would be of other weights
            (folder / "result.json").unlink(missing_ok=True)
        run.loader.check_epoch(trial.config.train.eval_split)  # now, as the training itself may have no validation

    try:
        trained = train(trial.config, folder, on_start=begin)
        if trained["step"] < trial.config.train.steps:
            return STOPPED
        if is_writer():
            if trial.closed_loop:
                simulate(trial, folder, workers)
            write_json(folder / "result.json", measure(trial, folder, trained, trial.seed == min(sweep.seeds)))
    except Exception as error:
        write_failure(folder, trial, str(error), type(error).__name__, traceback.format_exc())
        return FAILED
    finally:
        (folder / "running").unlink(missing_ok=True)
    if is_writer() and not sweep.keep_checkpoints:
        try:
            shutil.rmtree(folder / "checkpoints")
        except OSError as error:
            warn(f"{folder / 'checkpoints'} cannot be removed: {error.strerror}")
    return FINISHED


def write_failure(folder: Path, trial: Trial, reason: str, kind: str = "ProcessError", trace: str = "") -> None:
    failure = {"trial": trial.name, "error": kind, "reason": " ".join(reason.split()), "traceback": trace}
    write_json(folder / "failed.json", failure)
