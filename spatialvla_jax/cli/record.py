"""The command `record`."""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from spatialvla_jax.cli.arguments import Commands, add_command, amount, count, local_path, path, positive, task_ids
from spatialvla_jax.cli.data import DATASET
from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.outputs import OutputFile
from spatialvla_jax.utils.storage import AnyPath


def add(commands: Commands) -> None:
    p = add_command(
        commands,
        "record",
        run_record,
        "record demonstrations in a simulator (extra [sim])",
        (
            "libero --episodes 100 --val-episodes 20 --out data/libero_spatial",
            "libero --episodes 1000 --out motions.npz",
            "libero --render motions.npz --image-size 224 --out libero.pack",
            "libero --policy runs/libero --episodes 500 --initial-states drawn --out corrections.npz",
        ),
    )
    p.add_argument("simulator", choices=("libero",))
    p.add_argument("--suite", default="libero_spatial", help="libero_spatial or libero_object")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--episodes", type=positive, help="train episodes; by default --render")
    what.add_argument(
        "--render", type=local_path, nargs="+", metavar="FILE.npz", help="motions to render; by default --episodes"
    )
    p.add_argument("--val-episodes", type=count, default=0, help="validation episodes, from other initial states")
    p.add_argument("--tasks", type=task_ids, help="task ids to cycle through, e.g. 0,5,7; by default all")
    p.add_argument(
        "--out",
        type=local_path,
        required=True,
        help="dataset directory, in which the version 1.0.0 is created; or FILE.pack, for models of this --image-size; "
        "or FILE.npz, only the motions, for --render",
    )
    p.add_argument("--image-size", type=positive, default=128, help="pixels per side")
    p.add_argument(
        "--initial-states",
        choices=("benchmark", "drawn"),
        default="benchmark",
        help="the benchmark's, or new ones from the same regions, so that evaluation sees only new states",
    )
    p.add_argument("--noise", type=amount, default=0.0, help="disturb the motion, e.g. by 0.2; the expert corrects it")
    p.add_argument("--spread", type=amount, default=1.0, help="scale of the random grip angle; 0: none")
    p.add_argument("--every", type=positive, default=1, metavar="N", help="FILE.pack: keep images of every Nth step")
    p.add_argument(
        "--jitter",
        type=amount,
        default=0.0,
        help="how much camera, light and colours vary between train episodes, from 0 to 1",
    )
    p.add_argument(
        "--policy",
        type=path,
        metavar="RUN",
        help="let this policy act first in each episode, then record the expert, which takes over; by default the "
        "expert acts alone",
    )
    p.add_argument("--unnorm-key", help="dataset whose action units --policy uses; by default its only one")
    p.add_argument("--workers", type=positive, help="number of processes; by default one per core")
    p.add_argument("--seed", type=count, default=0, help="determines the episodes, for any number of workers")
    recorded = ("suite", "val_episodes", "tasks", "initial_states", "noise", "spread", "policy", "unnorm_key", "seed")
    p.set_defaults(recorded={name: p.get_default(name) for name in recorded})
    p.set_defaults(default_image_size=p.get_default("image_size"))


def run_record(args: argparse.Namespace) -> None:
    from spatialvla_jax.sim.record_libero import record_libero, render_motions

    given = (name for name, default in args.recorded.items() if getattr(args, name) != default)
    if args.render and (name := next(given, None)):
        option = f"--{name.replace('_', '-')}"
        raise InputError(f"{option} needs --episodes: --render only renders recorded motions")
    if args.out.suffix == ".npz" and args.image_size != args.default_image_size:
        raise InputError(f"--image-size is for images, and {args.out} has none: set it when rendering")
    if args.policy is None and args.unnorm_key is not None:
        raise InputError("--unnorm-key needs --policy")
    (OutputFile() if args.out.suffix in (".npz", ".pack") else DATASET).check(args.out, "--out")
    if args.render:
        options = {"image_size": args.image_size, "every": args.every, "workers": args.workers}
        options["jitter"] = args.jitter
        made = render_motions(args.render, args.out, **options)
        return print(f"wrote {made}")
    began = time.monotonic()
    directory, reports = record_libero(
        args.suite,
        args.episodes,
        args.out,
        val_episodes=args.val_episodes,
        tasks=args.tasks,
        seed=args.seed,
        image_size=args.image_size,
        drawn=args.initial_states == "drawn",
        noise=args.noise,
        spread=args.spread,
        every=args.every,
        jitter=args.jitter,
        workers=args.workers,
        takeovers=None if args.policy is None else load_policy(args.policy, args.suite, args.unnorm_key),
    )
    for task, report in reports.items():
        print(
            f"task {task}: {report.kept} kept, {report.failed} rejected by the benchmark, "
            + (f"{report.solved} finished by the policy, " if args.policy is not None else "")
            + f"{report.mean_steps:.0f} steps a kept episode: {report.language}"
        )
    rate = 60 * sum(report.kept for report in reports.values()) / (time.monotonic() - began)
    print(f"{rate:.1f} episodes a minute")
    print(f"wrote {directory}")


def load_policy(checkpoint: AnyPath, suite: str, unnorm_key: str | None) -> Callable[..., Any]:
    """The argument `takeovers` of `record_libero` for a policy, which sees the same as in `evaluate --closed-loop`.
    Raises InputError."""
    from spatialvla_jax.evaluation.rollouts import padded
    from spatialvla_jax.inference.policy import Policy
    from spatialvla_jax.sim import takeover
    from spatialvla_jax.sim.libero_env import check_units, is_mirrored

    policy = Policy.load(checkpoint)
    statistics, model = policy.processor.statistics, policy.model.config
    policy.processor.find_statistics(unnorm_key)
    check_units(suite, list(statistics), unnorm_key)
    if model.action_chunk > takeover.POLICY_STEPS:
        raise InputError(
            f"--policy {checkpoint} predicts {model.action_chunk} actions at once, which are executed whole before the "
            f"expert takes over: expected {takeover.POLICY_STEPS} at most"
        )
    mirrored = is_mirrored(unnorm_key or next(iter(statistics)))
    looks = model.action_chunk, model.img.image_size, model.depth_source == "dataset", mirrored
    extra: dict[str, Any] = {} if unnorm_key is None else {"unnorm_key": unnorm_key}
    infer = padded(policy.infer_batch, **extra)

    def takeovers(jobs: Sequence[Any], workers: int, progress: bool) -> Iterator[Any]:
        environment = partial(takeover.Takeover, jobs, *looks)
        return takeover.record_takeovers(environment, infer, jobs, min(workers, len(jobs)), progress)

    return takeovers
