"""The whole way to success rates, from nothing but this repository and the simulator.

    MUJOCO_GL=egl python benchmarks/closed_loop.py --workdir runs/libero_spatial --setting reduced [--minutes 9]
    MUJOCO_GL=egl python benchmarks/closed_loop.py --workdir runs/libero_spatial --setting full \\
        [--variants full,rgb --gpus 0,1]

    record    motions of the scripted expert, in files of 300 episodes; no renderer is needed
    render    a packed file of each
    train     on all of them
    DAgger    `record --policy`: what the expert does from where this policy led; rendered and added, `--weight` times
    train on  from the policy's weights, on all files together
    evaluate  on the benchmark's own initial states, of which the recordings have none

Rerun the same command to resume after a stop or after --minutes; a file of motions or pictures is begun anew. Another
machine can resume with only the folders motions/ and results/ of the workdir, whose files are a few MB each: pictures
are then drawn and weights trained anew. Arguments that change what is recorded or trained need a workdir of their own.
--rounds 0 evaluates the policy before DAgger. The model comes in four variants: `full`, `no_ego3d` (no depth encoding),
`rgb` (no depth encoding and uncropped images: without intrinsics, a random crop hides distances) and `grid_1026` (a
coarser action grid). Variants share the first recording. With --gpus they run side by side; each has a GPU of its own
and its share of the --workers. Arguments such as --config.train.batch_size=128 go to every training. Writes
results.json: success, environment, and the seconds of each stage over all calls.
"""

import argparse
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from spatialvla_jax.checkpoints import fingerprint
from spatialvla_jax.checkpoints.types import read_json
from spatialvla_jax.cli import overrides_of
from spatialvla_jax.cli.arguments import amount, count, positive, task_ids
from spatialvla_jax.config import load_config
from spatialvla_jax.errors import InputError
from spatialvla_jax.inference.action_chunking import executor
from spatialvla_jax.models.presets import preset
from spatialvla_jax.sweep.provenance import provenance
from spatialvla_jax.training.loop import FINISHED
from spatialvla_jax.utils.atomic import write_json
from spatialvla_jax.utils.process import tied_to_this

VARIANTS = {
    "full": [],
    "no_ego3d": ["--config.model.depth_source=none"],
    "rgb": ["--config.model.depth_source=none", "--config.augment.crop_area=1.0", "--config.augment.crop_area_max=0.0"],
    "grid_1026": ["--config.grid.num_bins=(8,16,4,8,8,8)"],
}
# Episodes to record, also in each round of DAgger; steps of the first training and of each that goes on; episodes of
# evaluation, a task and seed.
SETTINGS = {
    "full": {"record": 3000, "added": 1000, "steps": 17_000, "more_steps": 8_000, "episodes": 50, "seeds": [0, 1, 2]},
    "reduced": {"record": 600, "added": 200, "steps": 4_000, "more_steps": 2_000, "episodes": 10, "seeds": [0]},
}
# Arguments that may differ between two calls: which policies to evaluate, how, and where it runs.
WHICH, WHERE = ("variants", "rounds", "execute", "episodes", "seeds"), ("workdir", "workers", "gpus", "minutes")
FREE = (*WHICH, *WHERE, "setting", "videos")
PART = 300  # episodes of a file of motions: about two minutes on 16 cores, 3 MB


class Share(NamedTuple):
    """What a stage may use of the machine: numbers of GPUs (None: all of them) and processes."""

    gpus: str | None
    workers: int


def main() -> None:
    args, overrides = parse()
    try:
        run_stages(args, overrides)
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def run_stages(args: argparse.Namespace, overrides: list[str]) -> None:
    workdir, motions, results = args.workdir, args.workdir / "motions", args.workdir / "results"
    end = time.monotonic() + 60 * args.minutes
    for folder in (motions, results, workdir / "pictures"):
        folder.mkdir(parents=True, exist_ok=True)
    check_same(results / "arguments.json", args, overrides)

    def call(stage: str, share: Share, *command: object) -> None:
        """A command of spatialvla-jax, ended when the time is up; what it has done until then is kept."""
        if stopped:  # in another variant
            sys.exit(stopped[0])
        start = time.monotonic()
        environment = tied_to_this(os.environ | ({"CUDA_VISIBLE_DEVICES": share.gpus} if share.gpus else {}))
        process = subprocess.Popen([sys.executable, "-m", "spatialvla_jax.cli", *map(str, command)], env=environment)
        running.append(process)
        if stopped:  # since it was looked at above
            process.terminate()
        try:
            code = process.wait(max(1.0, end - start))
        except subprocess.TimeoutExpired:
            process.terminate()  # training saves and ends
            process.wait()
            code = 1
            if command[0] == "record" and not ended:  # the next call would start, and stop, at the same place
                whole = f"{stage} has not finished one file in all of --minutes {args.minutes:g}"
                print(f"{whole}, and a rerun would begin it anew: allow more", file=sys.stderr)
                code = 2
        running.remove(process)
        ended.append(stage)
        with lock:
            seconds[stage] = seconds.get(stage, 0.0) + time.monotonic() - start
            write_json(workdir / "seconds.json", seconds)
        if not stopped and (code or time.monotonic() > end):
            stopped.append(f"stopped in {stage} ({seconds}): rerun the same command to resume" if code < 2 else code)
        if stopped:
            sys.exit(stopped[0])

    def stop(number: int, _: object) -> None:
        """End the running commands: they would go on, and a rerun would start them a second time."""
        stopped.append(f"stopped by {signal.Signals(number).name}: rerun the same command to resume")
        for process in list(running):
            process.terminate()

    def record(stage: str, share: Share, episodes: int, seed: int, *options: object) -> list[Path]:
        """Files of motions. The first has validation episodes too, unless a policy acts."""
        files = [motions / f"{stage}-{number:02}.npz" for number in range(-(-episodes // PART))]
        for number, file in enumerate(files):
            size, val = min(PART, episodes - number * PART), 0 if number or options else max(1, episodes // 25)
            amount = ["--episodes", size, "--val-episodes", val, "--seed", seed + number]
            if not file.exists():
                how = ["--initial-states", "drawn", "--noise", args.noise, "--spread", args.spread, *tasks]
                how += ["--workers", share.workers, *options]
                call(f"record {stage}", share, "record", "libero", *suite, *amount, *how, "--out", file)
        return files

    def render(stage: str, share: Share, files: list[Path]) -> list[Path]:
        packs = [workdir / "pictures" / f"{file.stem}.pack" for file in files]
        for file, pack in zip(files, packs, strict=True):
            if not pack.exists():
                how = ["--every", args.every, "--jitter", args.jitter, *size, "--workers", share.workers]
                call(f"render {stage}", share, "record", "libero", "--render", file, *how, "--out", pack)
        return packs

    def train(run: Path, share: Share, packs: dict[str, float], steps: int, *options: object) -> None:
        if not (run / FINISHED).exists():
            data = [f"--config.data.packed={packs}", f"--config.train.steps={steps}"]
            command = ["train", "--config", args.config, "--workdir", run, *data, *options, *overrides]
            call(f"train {run.name}", share, *command)

    def from_recording(variant: str, packs: dict[str, float]) -> None:
        """All stages after the first recording."""
        share = free.get()
        try:
            run = workdir / f"{variant}-0"
            train(run, share, packs, args.steps, *VARIANTS[variant])
            for number in range(1, args.rounds + 1):
                stage = f"{variant}-{number}"
                files = record(stage, share, args.added, 1000 * number, "--policy", run)
                packs = packs | {str(pack): args.weight for pack in render(stage, share, files)}
                start = [f"--config.init={run}", "--config.grid.kind=checkpoint"]
                start.append(f"--config.optimizer.learning_rate={args.more_learning_rate}")
                run = workdir / stage
                train(run, share, packs, args.more_steps, *VARIANTS[variant], *start)
            began = out(variant).with_name("settings.json")
            if began.exists() and not str(read_json(began).get("policy")).startswith(f"{fingerprint(run)}, "):
                print(f"{began.parent} holds results of other weights than {run}: evaluating again", file=sys.stderr)
                shutil.rmtree(began.parent)
            seeds = ",".join(map(str, args.seeds))
            protocol = ["--episodes", args.episodes, "--seeds", seeds, "--execute", args.execute, *tasks]
            which = ["--closed-loop", args.suite, "--checkpoint", run, "--videos", args.videos]
            command = ["evaluate", *which, *protocol, *size, "--workers", share.workers, "--out", out(variant).parent]
            call(f"evaluate {run.name}", share, *command)
        finally:
            free.put(share)

    def out(variant: str) -> Path:
        return results / f"{variant}-{args.rounds}-{args.execute.replace(':', '_')}" / "result.json"

    def is_done(variant: str) -> bool:
        episodes = (len(args.tasks.split(",")) if args.tasks else 10) * args.episodes * len(args.seeds)
        done = read_json(out(variant)) if out(variant).exists() else {}
        return (done.get("episodes"), done.get("seeds")) == (episodes, sorted(args.seeds))

    seconds = read_json(file) if (file := workdir / "seconds.json").exists() else {}
    suite, size = ["--suite", args.suite], ["--image-size", args.image_size]
    tasks = ["--tasks", args.tasks] if args.tasks else []
    variants, gpus = args.variants.split(","), args.gpus.split(",") if args.gpus else [None]
    lock, whole, stopped, running, ended = threading.Lock(), Share(args.gpus, args.workers), [], [], []
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    free: queue.SimpleQueue[Share] = queue.SimpleQueue()
    for gpu in gpus:
        free.put(Share(gpu, max(1, args.workers // len(gpus))))
    if missing := [variant for variant in variants if not is_done(variant)]:
        packs = {str(pack): 1.0 for pack in render("first", whole, record("first", whole, args.record, 0))}
        with ThreadPoolExecutor(len(gpus)) as pool:
            list(pool.map(from_recording, missing, [packs] * len(missing)))
    found = {variant: read_json(out(variant)) for variant in variants}
    arguments = {key: str(value) for key, value in vars(args).items()} | {"overrides": overrides}
    result = {"results": found, "seconds": seconds, "arguments": arguments} | provenance()
    write_json(workdir / "results.json", result)
    for name, of_variant in found.items():
        print(f"{name:12} {100 * of_variant['success']:5.1f} ± {100 * of_variant['standard_error']:.1f} %")
    print(json.dumps(result))


def check_same(file: Path, args: argparse.Namespace, overrides: list[str]) -> None:
    """Raises InputError where a call began with other arguments, whose motions and weights would pass for these."""
    now = {f"--{k.replace('_', '-')}": str(v) for k, v in vars(args).items() if k not in FREE}
    now["overrides"] = " ".join(overrides)
    before = read_json(file) if file.exists() else now
    if changed := [key for key in now if now[key] != before.get(key)]:
        key = changed[0]
        found = f"{file.parents[1]} was begun with {key} {before.get(key)!r}"
        raise InputError(f"{found}, not {now[key]!r}: use another --workdir")
    write_json(file, now)


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The arguments, with the setting's in place of those that are not given, and the config's overrides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument(
        "--setting", choices=tuple(SETTINGS), default="full", help="; ".join(map(str, SETTINGS.items()))
    )
    parser.add_argument(
        "--record", type=positive, metavar="EPISODES", help="in all, for training; by default the setting's"
    )
    parser.add_argument(
        "--added", type=positive, metavar="EPISODES", help="of a round of DAgger; by default the setting's"
    )
    parser.add_argument("--steps", type=positive, help="of the first training; by default the setting's")
    parser.add_argument("--more-steps", type=positive, help="of each training that goes on; by default the setting's")
    parser.add_argument("--episodes", type=positive, help="of evaluation, a task and seed; by default the setting's")
    parser.add_argument("--seeds", type=task_ids, help="of evaluation, e.g. 0,1,2; by default the setting's")
    parser.add_argument("--rounds", type=count, default=1, help="of DAgger")
    parser.add_argument("--weight", type=amount, default=2.0, help="of frames added by DAgger")
    parser.add_argument("--more-learning-rate", type=amount, default=2e-4, help="of each training that goes on")
    parser.add_argument("--config", default="libero_spatial")
    parser.add_argument("--suite", default="libero_spatial")
    parser.add_argument("--tasks", help="ids, e.g. 0,5; by default all ten")
    parser.add_argument("--variants", default="full", help=f"of {','.join(VARIANTS)}")
    parser.add_argument("--every", type=positive, default=3, help="of how many steps one has a picture")
    parser.add_argument("--noise", type=amount, default=0.2, help="of the motion while recording")
    parser.add_argument("--spread", type=amount, default=0.0, help="of the unseen choice of the grip, see `record`")
    parser.add_argument("--jitter", type=amount, default=0.0, help="of camera, light and colours, see `record`")
    parser.add_argument("--execute", default="open_loop")
    parser.add_argument("--image-size", type=positive, default=224, help="the preset's")
    parser.add_argument("--workers", type=positive, default=16)
    parser.add_argument("--gpus", help="numbers, e.g. 0,1: as many variants run side by side; by default one at a time")
    parser.add_argument("--videos", type=count, default=0)
    parser.add_argument("--minutes", type=amount, default=1e6, help="after which it stops, to be called again")
    args, overrides = parser.parse_known_args()
    for key, value in SETTINGS[args.setting].items():
        setattr(args, key, value if getattr(args, key) is None else getattr(args, key))
    try:  # now, not after hours of recording
        executor(args.execute)
        variants = args.variants.split(",")
        for variant in variants:
            if variant not in VARIANTS or variants.count(variant) > 1:
                raise InputError(f"--variants has {variant!r}: expected some of {','.join(VARIANTS)}, each once")
            model = load_config(args.config, overrides_of([*VARIANTS[variant], *overrides], allowed=True)).model
            size = preset(model.preset, model.image_size).img.image_size
            if size != args.image_size:
                raise InputError(f"--image-size is {args.image_size}, and {args.config} needs pictures of {size}")
    except InputError as error:
        parser.error(str(error))
    return args, overrides


if __name__ == "__main__":
    main()
