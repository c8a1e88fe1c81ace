"""The command `view`: episodes, predictions and rollouts in the Rerun viewer."""

import argparse
from typing import Any

from spatialvla_jax.cli.arguments import (
    UNCONSTRAINED,
    Commands,
    add_command,
    add_group,
    add_output,
    count,
    local_path,
    path,
)
from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.outputs import OutputFile

RECORDING = OutputFile(lambda content: content[:3] == b"RRF" and b"spatialvla_jax" in content)


def add(commands: Commands) -> None:
    group = add_group(
        commands,
        "view",
        "show an episode, a policy's predictions or a rollout in the Rerun viewer (extra [view])",
        (
            "data --config demo --episode 1",
            "policy --checkpoint runs/demo/run --out predictions.rrd",
            "rollout --checkpoint runs/libero --suite libero_spatial --task 3 --out rollout.rrd",
        ),
    )
    p = add_command(group, "data", run_data, "show an episode", ("--config demo", "--config demo --out demo.rrd"))
    p.add_argument("--config", required=True, help="names the data; --config.KEY=VALUE changes a key")
    _add_episode(p)
    p = add_command(
        group,
        "policy",
        run_policy,
        "show an episode with a policy's predictions for every frame",
        ("--checkpoint runs/demo/run", "--checkpoint export --config demo --out predictions.rrd"),
    )
    p.add_argument("--checkpoint", type=path, required=True, help="run directory, one of its steps, or an export")
    p.add_argument("--config", help="names the data; by default the one that the run was trained with")
    p.add_argument("--unconstrained", action="store_true", help=UNCONSTRAINED)
    _add_episode(p)
    p = add_command(
        group,
        "rollout",
        run_rollout,
        "show a closed-loop rollout in LIBERO (extra [sim])",
        ("--checkpoint runs/libero --suite libero_spatial --task 3",),
    )
    p.add_argument("--checkpoint", type=path, required=True, help="run directory, one of its steps, or an export")
    p.add_argument("--suite", required=True, help="libero_spatial, libero_object, libero_goal or libero_10")
    p.add_argument("--task", type=count, default=0, help="task id in the suite")
    p.add_argument("--seed", type=count, default=0, help="seed of the scene")
    p.add_argument("--execute", default="open_loop", help="open_loop, receding:K, adaptive or recent")
    _add_out(p)


def _add_episode(p: argparse.ArgumentParser) -> None:
    p.add_argument("--dataset", help="name of a dataset; by default the first")
    p.add_argument("--split", default="val", help="split of the data")
    p.add_argument("--episode", type=count, default=0, help="number in the split, counted from 0")
    _add_out(p)


def _add_out(p: argparse.ArgumentParser) -> None:
    add_output(p, "--out", RECORDING, type=local_path, help="new .rrd file; by default the viewer opens")


def run_data(args: argparse.Namespace) -> None:
    from spatialvla_jax.config import load_config

    _run_episode(args, load_config(args.config, args.overrides), None)


def run_policy(args: argparse.Namespace) -> None:
    from spatialvla_jax.config import load_config, train_config_of
    from spatialvla_jax.inference.policy import Policy
    from spatialvla_jax.reports.view import load_rerun

    if args.config is None and args.overrides:
        raise InputError("--config.KEY=VALUE needs --config FILE")
    load_rerun()  # raises errors now, before loading the rest
    config = train_config_of(args.checkpoint) if args.config is None else load_config(args.config, args.overrides)
    _run_episode(args, config, Policy.load(args.checkpoint, constrained=not args.unconstrained))


def _run_episode(args: argparse.Namespace, config: Any, policy: Any) -> None:
    from spatialvla_jax.data import open_data
    from spatialvla_jax.reports.view import load_rerun, record_episode, recording

    load_rerun()
    known = (policy.processor.statistics, policy.processor.tokenizer) if policy else ()
    loader = open_data(config, *known)
    name = args.dataset or loader.names[0]
    if name not in loader.names:
        raise InputError(f"--dataset {name!r} is not in the data: choose one of {', '.join(loader.names)}")
    episode = next(loader.episodes(args.split, name, args.episode), None)
    if episode is None:
        found = sum(len(i.arrays["episode_end"]) for i in loader.indexes(args.split) if i.name == name)
        raise InputError(f"--episode {args.episode}: split {args.split!r} of {name!r} has {found}, counted from 0")
    with recording(args.out) as stream:
        record_episode(stream, episode, loader.statistics[name], policy)
    _say(args, f"{len(episode.frames.image)} frames of {name!r}, {episode.instruction!r}")


def run_rollout(args: argparse.Namespace) -> None:
    from functools import partial

    from spatialvla_jax.evaluation.rollouts import Settings, padded, rollouts
    from spatialvla_jax.inference.action_chunking import executor
    from spatialvla_jax.inference.policy import Policy
    from spatialvla_jax.reports.view import RolloutRecorder, load_rerun, recording
    from spatialvla_jax.sim import libero_env as libero

    load_rerun()
    every = executor(args.execute).every
    policy = Policy.load(args.checkpoint)
    (episode, *_) = libero.episodes([args.suite], 1, [args.seed], [args.task])
    settings = Settings(libero.MAX_STEPS, args.execute)
    key, config = next(iter(policy.processor.statistics)), policy.model.config
    depth, mirrored = config.depth_source == "dataset", libero.is_mirrored(key)
    environment = partial(libero.Libero, config.img.image_size, depth, mirrored)
    with recording(args.out) as stream:
        infer = RolloutRecorder(stream, padded(policy.infer_batch, 1), policy.processor.grid, every)
        (rollout,) = rollouts(environment, infer, [episode], settings)
    result = "success" if rollout.record["success"] else "failure"
    _say(args, f"{rollout.record['steps']} steps, {result}, {rollout.record['instruction']!r}")


def _say(args: argparse.Namespace, what: str) -> None:
    print(f"wrote {args.out}: {what}" if args.out else f"showed {what}")
