"""The whole path to success rates, from only this repository and the simulator.

    MUJOCO_GL=egl python benchmarks/closed_loop.py --workdir runs/libero_spatial --setting reduced [--minutes 9]
    MUJOCO_GL=egl python benchmarks/closed_loop.py --workdir runs/libero_spatial --setting full \\
        [--variants full,rgb --gpus 0,1]

    record    motions of the scripted expert, in files of 300 episodes; no renderer is needed
    render    a packed file of each
    train     on all of them
    DAgger    `record --policy`: the expert's corrections where this policy went wrong; rendered, weighted by `--weight`
    train on  from the policy's weights, on all files together
    evaluate  on the benchmark's own initial states, which are in no recording

Rerun the same command to resume after a stop or after --minutes; unfinished files of motions or pictures start again.
Another machine can resume with only the workdir's folders motions/ and results/, whose files are a few MB each: it
renders and trains again. Arguments that change what is recorded or trained need another workdir.
--rounds 0 evaluates the policy before DAgger. The model comes in four variants: `full`, `no_ego3d` (no depth encoding),
`rgb` (no depth encoding and uncropped images: without intrinsics, a random crop hides distances) and `grid_1026` (a
coarser action grid). Variants share the first recording. With --gpus they run side by side, each with its own GPU
and its share of the --workers. Arguments such as --config.train.batch_size=128 go to every training. Writes
results.json: success, environment, and the seconds of each stage over all calls.
"""

import argparse
import json
import os
import queue
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
from spatialvla_jax.cli.arguments import amount, at_most, count, local_path, positive, task_ids
from spatialvla_jax.config import load_config
from spatialvla_jax.errors import InputError
from spatialvla_jax.evaluation.closed_loop import remove_if_of_other_weights
from spatialvla_jax.inference.action_chunking import executor
from spatialvla_jax.models.presets import preset
from spatialvla_jax.sweep.provenance import provenance
from spatialvla_jax.training.loop import FINISHED
from spatialvla_jax.utils.atomic import write_json
from spatialvla_jax.utils.process import tied_to_this, try_lock

VARIANTS = {
    "full": [],
    "no_ego3d": ["--config.model.depth_source=none"],
    "rgb": ["--config.model.depth_source=none", "--config.augment.crop_area=1.0", "--config.augment.crop_area_max=0.0"],
    "grid_1026": ["--config.grid.num_bins=(8,16,4,8,8,8)"],
}
# Episodes to record, at first and in each round of DAgger; steps of the first and of each further training; episodes of
# evaluation per task and seed.
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
        args.workdir.mkdir(parents=True, exist_ok=True)
        with (args.workdir / "lock").open("w") as lock:
            if not try_lock(lock):
                raise InputError(f"another process is at work in {args.workdir}: wait for it, or use another --workdir")
            Experiment(args, overrides).run()
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


class Experiment:
    """The stages, as commands of spatialvla-jax. Variants run in threads of their own."""

    def __init__(self, args: argparse.Namespace, overrides: list[str]) -> None:
        self.args, self.overrides = args, overrides
        self.end = time.monotonic() + 60 * args.minutes
        self.motions, self.pictures, self.results = (args.workdir / x for x in ("motions", "pictures", "results"))
        for folder in (self.motions, self.pictures, self.results):
            folder.mkdir(parents=True, exist_ok=True)
        check_same(self.results / "arguments.json", args, overrides)
        file = args.workdir / "seconds.json"
        self.seconds = read_json(file) if file.exists() else {}
        self.size = ["--image-size", args.image_size]
        self.tasks = ["--tasks", args.tasks] if args.tasks else []
        self.lock = threading.Lock()  # of `seconds`
        self.running: list[subprocess.Popen[bytes]] = []
        self.ended: list[str] = []  # stages of this call
        self.stopped: list[str | int] = []  # why this call ends, as `sys.exit` takes it
        self.free: queue.SimpleQueue[Share] = queue.SimpleQueue()

    def run(self) -> None:
        """Run what is missing, and write and print the results."""
        args = self.args
        variants, gpus = args.variants.split(","), args.gpus.split(",") if args.gpus else [None]
        signal.signal(signal.SIGTERM, self.stop)
        signal.signal(signal.SIGINT, self.stop)
        for gpu in gpus:
            self.free.put(Share(gpu, max(1, args.workers // len(gpus))))
        if missing := [variant for variant in variants if not self.is_done(variant)]:
            whole = Share(args.gpus, args.workers)
            first = self.render("first", whole, self.record("first", whole, args.record, 0))
            packs = {str(pack): 1.0 for pack in first}
            with ThreadPoolExecutor(len(gpus)) as pool:
                list(pool.map(self.from_recording, missing, [packs] * len(missing)))
        found = {variant: read_json(self.out(variant)) for variant in variants}
        arguments = {key: str(value) for key, value in vars(args).items()} | {"overrides": self.overrides}
        result = {"results": found, "seconds": self.seconds, "arguments": arguments} | provenance()
        write_json(args.workdir / "results.json", result)
        for name, of_variant in found.items():
            print(f"{name:12} {100 * of_variant['success']:5.1f} ± {100 * of_variant['standard_error']:.1f} %")
        print(json.dumps(result))

    def from_recording(self, variant: str, packs: dict[str, float]) -> None:
        """All stages after the first recording."""
        args, share = self.args, self.free.get()
        try:
            run = args.workdir / f"{variant}-0"
            self.train(run, share, packs, args.steps, *VARIANTS[variant])
            for number in range(1, args.rounds + 1):
                stage = f"{variant}-{number}"
                files = self.record(stage, share, args.added, 1000 * number, "--policy", run)
                packs = packs | {str(pack): args.weight for pack in self.render(stage, share, files)}
                start = [f"--config.init={run}", "--config.grid.kind=checkpoint"]
                start.append(f"--config.optimizer.learning_rate={args.more_learning_rate}")
                run = args.workdir / stage
                self.train(run, share, packs, args.more_steps, *VARIANTS[variant], *start)
            self.evaluate(run, share, self.out(variant).parent)
        finally:
            self.free.put(share)

    def record(self, stage: str, share: Share, episodes: int, seed: int, *options: object) -> list[Path]:
        """Files of motions. The first has validation episodes too, unless a policy acts."""
        args = self.args
        files = [self.motions / f"{stage}-{number:02}.npz" for number in range(-(-episodes // PART))]
        for number, file in enumerate(files):
            size, val = min(PART, episodes - number * PART), 0 if number or options else max(1, episodes // 25)
            which = ["--suite", args.suite, "--episodes", size, "--val-episodes", val, "--seed", seed + number]
            if not file.exists():
                how = ["--initial-states", "drawn", "--noise", args.noise, "--spread", args.spread, *self.tasks]
                how += ["--workers", share.workers, *options]
                self.call(f"record {stage}", share, "record", "libero", *which, *how, "--out", file)
        return files

    def render(self, stage: str, share: Share, files: list[Path]) -> list[Path]:
        """A packed file of each file of motions."""
        args = self.args
        packs = [self.pictures / f"{file.stem}.pack" for file in files]
        for file, pack in zip(files, packs, strict=True):
            if not pack.exists():
                how = ["--every", args.every, "--jitter", args.jitter, *self.size, "--workers", share.workers]
                self.call(f"render {stage}", share, "record", "libero", "--render", file, *how, "--out", pack)
        return packs

    def train(self, run: Path, share: Share, packs: dict[str, float], steps: int, *options: object) -> None:
        """`packs` are {packed file: weight of its frames}."""
        if not (run / FINISHED).exists():
            data = [f"--config.data.packed={packs}", f"--config.train.steps={steps}"]
            command = ["train", "--config", self.args.config, "--workdir", run, *data, *options, *self.overrides]
            self.call(f"train {run.name}", share, *command)

    def evaluate(self, run: Path, share: Share, out: Path) -> None:
        args = self.args
        remove_if_of_other_weights(out, fingerprint(run))
        seeds = ",".join(map(str, args.seeds))
        protocol = ["--episodes", args.episodes, "--seeds", seeds, "--execute", args.execute, *self.tasks]
        which = ["--closed-loop", args.suite, "--checkpoint", run, "--videos", args.videos]
        command = ["evaluate", *which, *protocol, *self.size, "--workers", share.workers, "--out", out]
        self.call(f"evaluate {run.name}", share, *command)

    def call(self, stage: str, share: Share, *command: object) -> None:
        """Run a command. When the time is up, end it; its finished work is kept."""
        if self.stopped:  # in another variant
            sys.exit(self.stopped[0])
        start = time.monotonic()
        # `record --policy` and `evaluate` run the same program, so they share one compilation.
        compiled = {"JAX_COMPILATION_CACHE_DIR": str((self.args.workdir / "compiled").absolute())}
        gpus = {"CUDA_VISIBLE_DEVICES": share.gpus} if share.gpus else {}
        environment = tied_to_this(compiled | os.environ | gpus)
        process = subprocess.Popen([sys.executable, "-m", "spatialvla_jax.cli", *map(str, command)], env=environment)
        self.running.append(process)
        if self.stopped:  # since the check above
            process.terminate()
        try:
            code = process.wait(max(1.0, self.end - start))
        except subprocess.TimeoutExpired:
            process.terminate()  # training saves and ends
            process.wait()
            code = 1
            if command[0] == "record" and not self.ended:  # the next call would start, and stop, at the same place
                whole = f"{stage} has not finished one file in --minutes {self.args.minutes:g}"
                print(f"{whole}, and a rerun would start it again: allow more", file=sys.stderr)
                code = 2
        self.running.remove(process)
        self.ended.append(stage)
        with self.lock:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - start
            write_json(self.args.workdir / "seconds.json", self.seconds)
        if not self.stopped and (code or time.monotonic() > self.end):
            why = f"stopped in {stage} ({self.seconds}): rerun the same command to resume"
            self.stopped.append(why if code < 2 else code)
        if self.stopped:
            sys.exit(self.stopped[0])

    def stop(self, number: int, _: object) -> None:
        """End the running commands. Otherwise they would continue, and a rerun would start them a second time."""
        self.stopped.append(f"stopped by {signal.Signals(number).name}: rerun the same command to resume")
        for process in list(self.running):
            process.terminate()

    def out(self, variant: str) -> Path:
        """The file of a variant's results."""
        return self.results / f"{variant}-{self.args.rounds}-{self.args.execute.replace(':', '_')}" / "result.json"

    def is_done(self, variant: str) -> bool:
        args, file = self.args, self.out(variant)
        episodes = (len(args.tasks.split(",")) if args.tasks else 10) * args.episodes * len(args.seeds)
        done = read_json(file) if file.exists() else {}
        return (done.get("episodes"), done.get("seeds")) == (episodes, sorted(args.seeds))


def check_same(file: Path, args: argparse.Namespace, overrides: list[str]) -> None:
    """Raises InputError if an earlier call had other arguments: its motions and weights would count as these."""
    now = {f"--{k.replace('_', '-')}": str(v) for k, v in vars(args).items() if k not in FREE}
    now["overrides"] = " ".join(overrides)
    before = read_json(file) if file.exists() else now
    if changed := [key for key in now if now[key] != before.get(key)]:
        key = changed[0]
        found = f"{file.parents[1]} was started with {key} {before.get(key)!r}"
        raise InputError(f"{found}, not {now[key]!r}: use another --workdir")
    write_json(file, now)


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The arguments, with the setting's in place of those that are not given, and the config's overrides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=local_path, required=True)
    parser.add_argument(
        "--setting", choices=tuple(SETTINGS), default="full", help="; ".join(map(str, SETTINGS.items()))
    )
    parser.add_argument(
        "--record",
        type=positive,
        metavar="EPISODES",
        help="training episodes to record in all; by default the setting's",
    )
    parser.add_argument(
        "--added",
        type=positive,
        metavar="EPISODES",
        help="episodes to record in a round of DAgger; by default the setting's",
    )
    parser.add_argument("--steps", type=positive, help="steps of the first training; by default the setting's")
    parser.add_argument("--more-steps", type=positive, help="steps of each further training; by default the setting's")
    parser.add_argument("--episodes", type=positive, help="episodes per task and seed; by default the setting's")
    parser.add_argument("--seeds", type=task_ids, help="seeds of the evaluation, e.g. 0,1,2; by default the setting's")
    parser.add_argument("--rounds", type=count, default=1, help="rounds of DAgger")
    parser.add_argument("--weight", type=amount, default=2.0, help="weight of frames added by DAgger")
    parser.add_argument("--more-learning-rate", type=amount, default=2e-4, help="of each further training")
    parser.add_argument("--config", default="libero_spatial")
    parser.add_argument("--suite", default="libero_spatial")
    parser.add_argument("--tasks", help="ids, e.g. 0,5; by default all ten")
    parser.add_argument("--variants", default="full", help=f"of {','.join(VARIANTS)}")
    parser.add_argument("--every", type=positive, default=3, help="keep a picture of every Nth step")
    parser.add_argument("--noise", type=amount, default=0.2, help="disturbs the recorded motion, see `record`")
    parser.add_argument("--spread", type=amount, default=0.0, help="scale of the random grip angle, see `record`")
    parser.add_argument(
        "--jitter", type=at_most(1, amount), default=0.0, help="varies camera, light and colours, see `record`"
    )
    parser.add_argument("--execute", default="open_loop")
    parser.add_argument("--image-size", type=positive, default=224, help="the preset's")
    parser.add_argument("--workers", type=positive, default=16)
    parser.add_argument("--gpus", help="their numbers, e.g. 0,1: this many variants run side by side; by default one")
    parser.add_argument("--videos", type=count, default=0)
    parser.add_argument("--minutes", type=amount, default=1e6, help="stop after this many minutes, to be resumed")
    args, overrides = parser.parse_known_args()
    for key, value in SETTINGS[args.setting].items():
        setattr(args, key, value if getattr(args, key) is None else getattr(args, key))
    try:  # raises now, not after hours of recording
        executor(args.execute)
        if not args.weight:
            raise InputError("--weight is 0: expected more; --rounds 0 leaves DAgger out")
        tasks = task_ids(args.tasks) if args.tasks else []
        for name, values in (("--tasks", tasks), ("--seeds", args.seeds)):
            if len({*values}) < len(values):
                raise InputError(f"{name} is {','.join(map(str, values))}: expected each once")
        variants = args.variants.split(",")
        for variant in variants:
            if variant not in VARIANTS or variants.count(variant) > 1:
                raise InputError(f"--variants has {variant!r}: expected some of {','.join(VARIANTS)}, each once")
            model = load_config(args.config, overrides_of([*VARIANTS[variant], *overrides], allowed=True)).model
            size = preset(model.preset, model.image_size).img.image_size
            if size != args.image_size:
                raise InputError(f"--image-size is {args.image_size}, but {args.config} needs pictures of {size}")
    except (InputError, argparse.ArgumentTypeError) as error:
        parser.error(str(error))
    return args, overrides


if __name__ == "__main__":
    main()
