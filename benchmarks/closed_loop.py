"""The whole way to success rates: record demonstrations, train on them, evaluate in the simulator.

    python benchmarks/closed_loop.py --workdir runs/libero_spatial [--minutes 9] [--config.train.steps=4000 …]

Motions that `record libero --out FILE.npz` recorded (no renderer needed) are rendered with --motions FILE.npz ….
What is done is not done again: after a stop, or after --minutes, the same command goes on. MUJOCO_GL=egl renders on a
GPU. The model comes in three variants, one thing changed at a time: `full`, `no_ego3d` (no depth encoding) and
`grid_1026` (a coarser action grid). Training starts from states drawn out of the tasks' regions, evaluation from the
benchmark's own. Ends with a table and one line of JSON.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

VARIANTS = {
    "full": [],
    "no_ego3d": ["--config.model.depth_source=none"],
    "grid_1026": ["--config.grid.num_bins=(8,16,4,8,8,8)"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--config", default="libero_spatial")
    parser.add_argument("--suite", default="libero_spatial")
    parser.add_argument("--tasks", help="ids, e.g. 0,5; by default all ten")
    parser.add_argument("--variants", default="full", help=f"of {','.join(VARIANTS)}")
    parser.add_argument("--record", type=int, default=3000, metavar="EPISODES", help="in all, for training")
    parser.add_argument("--every", type=int, default=3, help="of how many steps one has a picture")
    parser.add_argument("--noise", type=float, default=0.2, help="of the motion while recording")
    parser.add_argument("--spread", type=float, default=0.0, help="of the unseen choice of the grip, see `record`")
    parser.add_argument("--motions", type=Path, nargs="+", default=[], help="to render, instead of recording")
    parser.add_argument("--episodes", type=int, default=20, help="of evaluation, a task and seed")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--execute", default="open_loop")
    parser.add_argument("--image-size", type=int, default=224, help="the preset's")
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--videos", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e6, help="after which it stops, to be called again")
    args, overrides = parser.parse_known_args()
    end = time.monotonic() + 60 * args.minutes

    def call(*command: object) -> None:
        """A command of spatialvla-jax, ended when the time is up; what it has done until then is kept."""
        start = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", "spatialvla_jax.cli", *map(str, command)])
        try:
            code = process.wait(max(1.0, end - start))
        except subprocess.TimeoutExpired:
            process.terminate()  # training saves and ends
            process.wait()
            code = 1
        seconds[f"{command[0]} {command[-1]}"] = time.monotonic() - start
        if code or time.monotonic() > end:
            sys.exit(f"stopped in {command[0]} ({seconds}): the same command goes on" if code < 2 else code)

    seconds: dict[str, float] = {}
    pack = args.workdir / f"{args.suite}.pack"
    tasks = ["--tasks", args.tasks] if args.tasks else []
    size = ["--image-size", args.image_size, "--workers", args.workers]
    if not pack.exists():
        amount = ["--episodes", args.record, "--val-episodes", max(1, args.record // 25)]
        options = [
            *amount,
            "--suite",
            args.suite,
            "--initial-states",
            "drawn",
            "--noise",
            args.noise,
            "--spread",
            args.spread,
            *tasks,
        ]
        if args.motions:
            options = ["--render", *args.motions]
        call("record", "libero", *options, *size, "--every", args.every, "--out", pack)
    results = {}
    for name in args.variants.split(","):
        run = args.workdir / name
        options = ["--config", args.config, f"--config.data.packed={pack}", *VARIANTS[name], *overrides]
        call("train", *options, "--workdir", run)
        protocol = ["--episodes", args.episodes, "--seeds", args.seeds, "--execute", args.execute]
        out = run / f"closed_loop_{args.execute.replace(':', '_')}"
        which = ["--closed-loop", args.suite, "--checkpoint", run, "--videos", args.videos]
        call("evaluate", *which, *protocol, *size, *tasks, "--out", out)
        results[name] = json.loads((out / "result.json").read_text())
    for name, result in results.items():
        print(f"{name:12} {100 * result['success']:5.1f} ± {100 * result['standard_error']:.1f} %")
    print(json.dumps({"results": results, "seconds": seconds}))


if __name__ == "__main__":
    main()
