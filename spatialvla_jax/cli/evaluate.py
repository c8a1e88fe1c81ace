"""The command `evaluate`, on recorded episodes or in simulation."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from spatialvla_jax.cli.arguments import (
    UNCONSTRAINED,
    Commands,
    add_command,
    at_most,
    count,
    path,
    positive,
    task_ids,
)
from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.outputs import OutputFolder

RESULTS = OutputFolder("settings.json", "policy", names=("episodes.jsonl", "result.json", "videos"))


def add(commands: Commands) -> None:
    p = add_command(
        commands,
        "evaluate",
        run_evaluate,
        "open-loop errors on recorded episodes, or success rates in simulation",
        (
            "--checkpoint runs/demo/run",
            "--checkpoint export --config demo --split val",
            "--checkpoint runs/libero --closed-loop libero_spatial --episodes 10 --out runs/success",
            "--server ws://localhost:8000 --closed-loop libero_spatial --unnorm-key libero_spatial_no_noops",
        ),
    )
    p.add_argument(
        "--checkpoint",
        type=path,
        help="run directory, one of its steps, an export, or an id of the Hub; by default --server",
    )
    p.add_argument("--config", help="names the data; by default the run's own config")
    p.add_argument("--split", default="val", help="split of the data")
    p.add_argument("--batch-size", type=at_most(4096), default=32, help="frames per call of the policy")
    p.add_argument("--unconstrained", action="store_true", help=UNCONSTRAINED)
    group = p.add_argument_group("closed loop (extra [sim])")
    group.add_argument(
        "--closed-loop",
        metavar="SUITE,…",
        help="libero_spatial, libero_object, libero_goal, libero_10; by default the open loop is evaluated",
    )
    group.add_argument("--episodes", type=positive, default=50, help="per task and seed; LIBERO has 50 initial states")
    group.add_argument("--seeds", type=task_ids, default=[0], help="e.g. 0,1,2")
    group.add_argument("--tasks", type=task_ids, help="task ids, e.g. 0,5,7; by default all ten")
    group.add_argument("--execute", default="open_loop", help="open_loop, receding:K, adaptive or recent")
    group.add_argument(
        "--server",
        metavar="ws://HOST:PORT",
        help="a policy served with openpi's protocol; by default --checkpoint is evaluated",
    )
    group.add_argument("--unnorm-key", help="dataset whose action units to use; by default the policy's only one")
    group.add_argument(
        "--image-size", type=positive, help="pixels per side; by default the model's, 128 for other servers"
    )
    group.add_argument(
        "--observation-keys",
        type=key_names,
        metavar="OURS=THEIRS,…",
        help="another server's names for image, intrinsics, depth and state (f32[8]: hand and fingers), e.g. "
        "image=observation/image,state=observation/state. Only these and the prompt are sent; there is no wrist "
        "camera. --unnorm-key ANY_no_noops mirrors the images, as in most models' LIBERO data; by default our names",
    )
    group.add_argument("--gripper-closes", action="store_true", help="the server's gripper actions are -1 for open")
    group.add_argument(
        "--workers",
        type=positive,
        default=os.cpu_count(),
        help="environments at once, each in a process; by default one per core",
    )
    group.add_argument("--videos", type=count, default=0, help="videos of successes per task, and as many of failures")
    group.add_argument("--out", type=path, help="folder for results, new or to be resumed; by default runs/closed_loop")
    p.set_defaults(open_loop_options={name: p.get_default(name) for name in ("config", "split", "batch_size")})
    p.set_defaults(closed_loop_options={action.dest: action.default for action in group._group_actions})


def run_evaluate(args: argparse.Namespace) -> None:
    from spatialvla_jax.config import load_config, train_config_of
    from spatialvla_jax.data import open_data
    from spatialvla_jax.evaluation.open_loop import evaluate, table
    from spatialvla_jax.inference.policy import Policy
    from spatialvla_jax.utils.progress import Bar

    if args.closed_loop is not None:
        if given := [name for name, default in args.open_loop_options.items() if getattr(args, name) != default]:
            raise InputError(f"--{given[0].replace('_', '-')} is for the open loop, and --closed-loop was given")
        if args.overrides:
            raise InputError("--config.KEY=VALUE is for the open loop, and --closed-loop was given")
        run_closed_loop(args)
        return
    if given := [name for name, default in args.closed_loop_options.items() if getattr(args, name) != default]:
        raise InputError(f"--{given[0].replace('_', '-')} needs --closed-loop SUITE; the open loop prints its result")
    if args.checkpoint is None:
        raise InputError("--checkpoint must name what is to be evaluated")
    policy = Policy.load(args.checkpoint, constrained=not args.unconstrained)
    if args.config is None and args.overrides:
        raise InputError("--config.KEY=VALUE needs --config FILE")
    config = train_config_of(args.checkpoint) if args.config is None else load_config(args.config, args.overrides)
    loader = open_data(config, policy.processor.statistics, policy.processor.tokenizer)
    with Bar(total=loader.num_frames(args.split), unit="frame", desc="evaluate") as bar:
        result = evaluate(policy, loader, args.split, batch_size=args.batch_size, progress=bar.update)
    print(table(result))
    print(json.dumps(result))


def run_closed_loop(args: argparse.Namespace) -> None:
    from spatialvla_jax.checkpoints import fingerprint
    from spatialvla_jax.evaluation import closed_loop
    from spatialvla_jax.evaluation.rollouts import Settings, padded, served
    from spatialvla_jax.inference.action_chunking import executor
    from spatialvla_jax.inference.policy import Policy
    from spatialvla_jax.serving.access import read_token
    from spatialvla_jax.serving.client import Client
    from spatialvla_jax.sim import libero_env as libero
    from spatialvla_jax.utils.dataset_keys import find_key
    from spatialvla_jax.utils.storage import list_names

    if (args.checkpoint is None) == (args.server is None):
        raise InputError("closed loop evaluates either --checkpoint or --server")
    if args.checkpoint and (args.observation_keys or args.gripper_closes):
        raise InputError("--observation-keys and --gripper-closes are for a --server")
    if args.server and args.unconstrained:
        raise InputError("--unconstrained is for a --checkpoint; a server is started with it")
    args.out = args.out or Path("runs/closed_loop")
    RESULTS.check(args.out, "--out")
    executor(args.execute)  # raises now what it would raise after the first results
    episodes = libero.episodes(args.closed_loop.split(","), args.episodes, args.seeds, args.tasks)
    settings = Settings(libero.MAX_STEPS, args.execute, min(args.workers, len(episodes)))
    extra = {} if args.unnorm_key is None else {"unnorm_key": args.unnorm_key}
    if args.server:
        token = read_token()
        keys, depth, size, weights = parse_metadata(args.server, Client(args.server, token).metadata)
        name = f"{args.server} ({weights})" if weights else args.server
        depth, size = depth or "depth" in (args.observation_keys or ()), args.image_size or size
        how = {"keys": args.observation_keys, "gripper_closes": args.gripper_closes}
        name += "".join(f", {key} {value}" for key, value in how.items() if value)
        infer = served(args.server, token, **how, **extra)
    else:
        policy = Policy.load(args.checkpoint, constrained=not args.unconstrained)
        name = fingerprint(args.checkpoint) + (", unconstrained" if args.unconstrained else "")
        policy.processor.find_statistics(args.unnorm_key)  # raises now what it would raise at every step
        keys, depth = list(policy.processor.statistics), policy.model.config.depth_source == "dataset"
        size = args.image_size or policy.model.config.img.image_size
        infer = padded(policy.infer_batch, **extra)
    if args.unnorm_key is not None and keys and find_key(args.unnorm_key, keys) is None:
        raise InputError(
            f"--unnorm-key {args.unnorm_key!r} is not a dataset of {name}: choose one of {', '.join(keys)}"
        )
    for suite in dict.fromkeys(episode.suite for episode in episodes):
        libero.check_units(suite, keys, args.unnorm_key)
    result = libero.evaluate(
        infer,
        episodes,
        settings,
        args.out,
        policy=name,
        image_size=size,
        depth=depth,
        keys=keys,
        unnorm_key=args.unnorm_key,
        videos=args.videos,
    )
    print(closed_loop.table(result))
    print(f"wrote {args.out}: result.json, episodes.jsonl and {len(list_names(args.out / 'videos'))} videos")
    print(json.dumps(result))


def parse_metadata(server: str, metadata: dict[str, Any]) -> tuple[list[str], bool, int, str]:
    """A server's metadata → (unnorm keys, whether depth is needed, the first size of square images, fingerprint). Other
    servers of openpi's protocol have none of these. Raises InputError for invalid values."""
    keys, depth = metadata.get("unnorm_keys", []), metadata.get("needs_depth", False)
    sizes, policy = metadata.get("image_sizes", []), metadata.get("fingerprint", "")
    fits = isinstance(sizes, list) and all(
        isinstance(size, list) and len(size) == 2 and all(type(n) is int and 0 < n <= 4096 for n in size)
        for size in sizes
    )
    texts = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    for key, value, good in (
        ("unnorm_keys", keys, texts),
        ("needs_depth", depth, isinstance(depth, bool)),
        ("fingerprint", policy, isinstance(policy, str)),
        ("image_sizes", sizes, fits),
    ):
        if not good:
            raise InputError(f"{server} says {key!r} of its policy is {value!r:.200}, which is invalid")
    return keys, depth, next((height for height, width in sizes if height == width), 128), policy


def key_names(text: str) -> dict[str, str]:
    """`image=observation/image,state=state` → {"image": "observation/image", "state": "state"}."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(ours and theirs for ours, _, theirs in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not OURS=THEIRS, such as image=observation/image,state=state")
    return {ours: theirs for ours, _, theirs in pairs}
