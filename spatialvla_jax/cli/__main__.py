"""The command line: `spatialvla-jax COMMAND …`. Bad input ends with one sentence and exit code 2, storage that fails
with one and 1."""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from spatialvla_jax.errors import InputError, StorageError

BENCHMARKS = {
    "tokenizer": "tokenizer.py",
    "loader": "loader.py",
    "train": "train_step.py",
    "serve": "serve.py",
    "infer": "infer.py",
    "decoding": "decoding.py",
}


UNCONSTRAINED = "choose every token from the whole vocabulary, as the published code does"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="spatialvla-jax", description="Train, evaluate and convert SpatialVLA in JAX."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    groups: dict[str, Any] = {"": commands}

    def group(name: str, help: str) -> None:
        sub = commands.add_parser(name, help=help, description=help)
        groups[name] = sub.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")

    def command(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        """`name` is "train", or "data show" in the group "data"."""
        *prefix, last = name.split()
        sub = groups[" ".join(prefix)].add_parser(last, help=help, description=help)
        sub.set_defaults(run=run, command=name)
        return sub

    p = command("demo", run_demo, "train, kill, resume, evaluate, export and plot the tiny model in minutes")
    p.add_argument("--config", default="configs/demo.py")
    p.add_argument("--workdir", type=Path, default=Path("runs/demo"))

    p = command("train", run_train, "train a model; a run that was stopped goes on by itself")
    p.add_argument("--config", required=True, help="Python file with get_config(); --config.KEY=VALUE changes a key")
    p.add_argument("--workdir", type=Path, required=True)
    p.add_argument("--wandb", default="", metavar="PROJECT", help="send metrics to Weights & Biases as well")
    p.add_argument("--profile", type=step_range, metavar="FIRST:LAST", help="trace these steps to WORKDIR/profile")
    process_arguments(p)

    p = command("sweep", run_sweep, "train and evaluate every trial of a sweep, and compare; `sweep report DIR` again")
    p.add_argument("--config", help="Python file with get_sweep(); --config.KEY=VALUE changes a key of its base")
    p.add_argument("--workdir", type=Path)
    p.add_argument("--only", default="*", metavar="PATTERN", help="trials by name, such as '*_seed-0'")
    p.add_argument("--parallel", type=int, default=1, metavar="N", help="trials at once, on this machine")
    p.add_argument("--launcher", choices=("local", "slurm", "xpk"), default="local", help="or a job for every trial")
    p.add_argument("--launcher-args", default="", help="options of sbatch, or 'CLUSTER TPU_TYPE SLICES IMAGE' of xpk")
    p.add_argument("--dry-run", action="store_true", help="check the sweep and print its trials or jobs")
    p.add_argument("--report", action=argparse.BooleanOptionalAction, default=True, help="write it at the end")
    process_arguments(p)
    p = p.add_subparsers(metavar="report").add_parser("report", help="write a sweep's report from what is there")
    p.add_argument("dir", type=Path, help="the sweep's --workdir")
    p.set_defaults(run=run_sweep_report, command="sweep report")

    p = command("compile", run_compile, "compile the training step for a TPU pod, on any machine (extra [tpu])")
    p.add_argument("--config", required=True, help="as for train; its data is not read")
    p.add_argument("--topology", required=True, help="e.g. v5e:16x16, v4:4x4x4, or by name: v5p-128, v6e-256")
    p.add_argument("--slices", type=int, default=1, help="pods joined by the data-center network, along mesh.data")
    p.add_argument(
        "--search", action="store_true", help="rank meshes, remat policies, accumulation and smaller batches"
    )

    p = command("evaluate", run_evaluate, "open-loop errors on recorded episodes, or success rates in simulation")
    p.add_argument("--checkpoint", type=Path, help="run directory, one of its steps, or an export")
    p.add_argument("--config", help="names the data; by default the one that the run was trained with")
    p.add_argument("--split", default="val")
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--unconstrained", action="store_true", help=UNCONSTRAINED)
    p = p.add_argument_group("closed loop (extra [sim])")
    p.add_argument("--closed-loop", metavar="SUITE,…", help="libero_spatial, libero_object, libero_goal, libero_10")
    p.add_argument(
        "--episodes", type=int, default=50, help="of each task and seed; the benchmark has 50 initial states"
    )
    p.add_argument("--seeds", type=task_ids, default=[0], help="e.g. 0,1,2")
    p.add_argument("--tasks", type=task_ids, help="task ids, e.g. 0,5,7; by default all ten")
    p.add_argument("--execute", default="open_loop", help="open_loop, receding:K, adaptive or recent")
    p.add_argument("--server", metavar="ws://HOST:PORT", help="a policy served by openpi's protocol, not --checkpoint")
    p.add_argument("--unnorm-key", help="the dataset whose action units are meant, where the policy knows several")
    p.add_argument("--image-size", type=int, help="pixels a side; by default the model's, of other servers 128")
    p.add_argument(
        "--observation-keys",
        type=key_names,
        metavar="OURS=THEIRS,…",
        help="what another server calls image, intrinsics, depth and state (f32[8]: hand and fingers), e.g. "
        "image=observation/image,state=observation/state; these and the prompt are sent. There is no wrist camera; "
        "--unnorm-key ANY_no_noops mirrors the pictures, as most models of LIBERO saw them",
    )
    p.add_argument("--gripper-closes", action="store_true", help="the server's actions are LIBERO's own: -1 is open")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="environments at once, a process each")
    p.add_argument("--videos", type=int, default=0, help="of successes, and as many of failures, a task")
    p.add_argument("--out", type=Path, default=Path("runs/closed_loop"), help="the same one again goes on")

    p = command("serve", run_serve, "serve a policy to robots by websocket, in openpi's protocol (extra [serve])")
    p.add_argument("--checkpoint", type=Path, required=True, help="run directory, one of its steps, or an export")
    p.add_argument("--host", default="127.0.0.1", help="any other than this machine's own needs a token")
    p.add_argument("--port", type=int, default=8000)
    p.add_argument(
        "--token-file", type=Path, help="clients send 'Authorization: Api-Key TOKEN'; or set SPATIALVLA_TOKEN"
    )
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="", help="of the computation; the model's own")
    p.add_argument("--quantize", choices=("int8",), default="", help="the language model's matrices")
    p.add_argument("--unconstrained", action="store_true", help=UNCONSTRAINED)
    p.add_argument("--speculate", action="store_true", help="take each client's last chunk as a guess of the next")
    p.add_argument(
        "--execute", default="chunk", help="or one action a request: open_loop, receding:K, adaptive, recent"
    )
    p.add_argument(
        "--image-size",
        type=image_size,
        action="append",
        metavar="HEIGHTxWIDTH",
        help="of the clients' images, may be repeated; by default the model's own",
    )
    p.add_argument("--max-batch", type=int, default=32, help="observations of one call of the policy")
    p.add_argument("--max-wait-ms", type=float, default=4, help="for which a batch waits for further clients")
    p.add_argument("--max-clients", type=int, default=128)
    p.add_argument(
        "--compile-cache",
        type=Path,
        default=Path("~/.cache/spatialvla_jax/compiled"),
        help="where compiled programs are kept: the second start is quick",
    )

    p = command("convert", run_convert, "convert a checkpoint between formats")
    p.add_argument("src", type=Path)
    p.add_argument("dst", type=Path)
    p.add_argument("--to", choices=("orbax", "pytorch", "big_vision", "peft"), required=True)
    p.add_argument("--merge", action="store_true", help="write a run of LoRA adapters and its base as one checkpoint")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights written; by default as they are")
    p.add_argument("--zoedepth", type=Path, help="ZoeDepth's directory, where SRC is a PaliGemma 2 to start from")
    p.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="run the PyTorch export beside JAX; by default up to 500 M parameters",
    )

    group("data", "convert and look at datasets")
    p = command(
        "data show", run_show, "write an HTML page that shows a mixture: frames, instructions, actions, weights"
    )
    p.add_argument("--config", required=True, help="names the data")
    p.add_argument("--out", type=Path, required=True, help="the page, e.g. mixture.html")
    p.add_argument("--seed", type=int, default=0, help="another one shows other episodes")

    p = command("data lerobot", run_lerobot, "convert a LeRobot dataset (v2.0, v2.1, v3.0) to RLDS (extra [lerobot])")
    p.add_argument("src", type=Path, help="directory that holds meta/info.json")
    p.add_argument("dst", type=Path, help="dataset directory; its version, 1.0.0, is made inside")
    p.add_argument("--camera", help="which one, where there are several, e.g. observation.images.top")
    p.add_argument("--name", help="the dataset's; by default that of DST")

    p = command("data import", run_data_import, "store any tf.data.Dataset of trajectories as an RLDS dataset")
    p.add_argument(
        "--from",
        dest="function",
        required=True,
        metavar="MODULE:FUNCTION",
        help="returns a dataset (the split train), or {split: dataset}",
    )
    p.add_argument("--out", type=Path, required=True, help="dataset directory; its version, 1.0.0, is made inside")

    p = command("data depth", run_data_depth, "store ZoeDepth's depth of every frame in copies of RLDS datasets")
    p.add_argument("src", type=Path, nargs="?", help="a dataset's version directory; by default those of --config")
    p.add_argument("--spec", help="catalogue entry of SRC, which says where its image is")
    p.add_argument("--config", help="names the datasets and the model's image size")
    p.add_argument("--checkpoint", type=Path, required=True, help="any checkpoint with a ZoeDepth, or a ZoeDepth alone")
    p.add_argument("--out", type=Path, required=True, help="the copies are made in OUT/NAME/VERSION")
    p.add_argument("--split", action="append", help="may be repeated; by default every split")
    p.add_argument("--image-size", type=int, help="pixels a side; by default the config's or the checkpoint's")
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")

    p = command("data pack", run_data_pack, "one file that trains without TensorFlow, of a small data set")
    p.add_argument("--config", required=True, help="names the datasets, the model's image size and source of depth")
    p.add_argument("--out", type=Path, required=True, help="file to write, then the config's data.packed")
    p.add_argument("--split", action="append", help="may be repeated; by default those of training and validation")
    p.add_argument("--image-size", type=int, help="pixels a side; by default the config's")

    p = command("stats", run_stats, "action statistics and grid Gaussians of a mixture, by Apache Beam (extra [beam])")
    p.add_argument("--config", required=True, help="names the data")
    p.add_argument("--out", required=True, help="the file for data.statistics, e.g. stats.json")
    runners = ("DirectRunner", "FlinkRunner", "DataflowRunner", "SparkRunner")
    p.add_argument("--runner", choices=runners, default="DirectRunner")
    p.epilog = (
        "What follows -- goes to the runner, e.g. -- --flink_master=localhost:8081; or, to use all cores here, "
        "-- --direct_num_workers=0 --direct_running_mode=multi_processing"
    )

    group("grid", "fit, draw and compare action grids")
    p = command("grid fit", run_grid_fit, "make the grid that a run would: from its data, or from a file of stats")
    p.add_argument("--config", required=True, help="its grid part, and the data")
    p.add_argument("--stats", type=Path, help="a file of `stats`; its datasets less grid.exclude stand for the data")
    p.add_argument("--out", type=Path, required=True, help="e.g. grid.json")
    p = command("grid show", run_grid_show, "draw a grid in 3-D and variable by variable")
    p.add_argument("grid", type=Path, metavar="GRID|RUN", help="a file of `grid fit`, a run, or another checkpoint")
    p.add_argument("--out", type=Path, required=True, help="e.g. grid.png")
    grid_actions_arguments(p, "by default the grid's own: every bin equally often")
    p = command("grid compare", run_grid_compare, "bins, tokens and quantisation errors of grids on the same actions")
    p.add_argument("grids", nargs="+", metavar="GRID|RUN", help="as for `grid show`")
    grid_actions_arguments(p, "by default the Gaussians of the published pre-training mixture")

    p = command("bench", run_bench, "measure a part; bench NAME -h says how, and what can be set")
    p.add_argument("benchmark", choices=BENCHMARKS)
    p.add_argument("arguments", nargs=argparse.REMAINDER, help="of the benchmark")

    p = command("record", run_record, "record demonstrations in a simulator (extra [sim])")
    p.add_argument("simulator", choices=("libero",))
    p.add_argument("--suite", default="libero_spatial", help="libero_spatial or libero_object")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--episodes", type=int, help="train episodes in all, dealt over the tasks in turn")
    what.add_argument("--render", type=Path, nargs="+", metavar="FILE.npz", help="motions to make the pictures of")
    p.add_argument("--val-episodes", type=int, default=0, help="validation episodes, from other initial states")
    p.add_argument("--tasks", type=task_ids, help="task ids in dealing order, e.g. 0,5,7; by default all")
    p.add_argument(
        "--out",
        type=Path,
        required=True,
        help="dataset directory, in which its version, 1.0.0, is made; or FILE.pack, for models of this --image-size; "
        "or FILE.npz, the motions alone, for --render",
    )
    p.add_argument("--image-size", type=int, default=128, help="pixels a side")
    p.add_argument(
        "--initial-states",
        choices=("benchmark", "drawn"),
        default="benchmark",
        help="the benchmark's own, or others out of the same regions, so that all of its own are new in evaluation",
    )
    p.add_argument("--noise", type=float, default=0.0, help="disturbs the motion, which the expert corrects, e.g. 0.2")
    p.add_argument("--spread", type=float, default=1.0, help="factor on how much the grip varies unseen; 0: not at all")
    p.add_argument("--every", type=int, default=1, metavar="N", help="FILE.pack: pictures of each Nth step only")
    p.add_argument("--workers", type=int, help="processes; by default one a core")
    p.add_argument("--seed", type=int, default=0, help="same seed, same episodes, for any number of workers")

    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    args, rest = parser.parse_known_args(argv[:split])
    args.runner_options = argv[split + 1 :]
    try:
        refuse_buckets(args)
        if args.runner_options and args.command != "stats":
            raise InputError("only the command stats takes arguments after --")
        args.overrides = overrides_of(rest, allowed=hasattr(args, "config"))
        args.run(args)
    except InputError as error:
        print(f"spatialvla-jax {args.command}: {error}", file=sys.stderr)
        return 2
    except StorageError as error:
        print(f"spatialvla-jax {args.command}: {error}", file=sys.stderr, flush=True)
        if getattr(args, "coordinator", None):
            os._exit(1)  # the usual end waits for the run's other processes, which wait for this one
        return 1
    except Exception as error:
        if getattr(args, "coordinator", None) and runtime_error(error, *LOST):
            lost = (
                f"another process of the run died or cannot be reached ({str(error).splitlines()[0]}); see its output"
            )
            print(f"spatialvla-jax {args.command}: {lost}", file=sys.stderr, flush=True)
            os._exit(1)  # as above
        if not runtime_error(error, "RESOURCE_EXHAUSTED"):
            raise
        print(
            f"spatialvla-jax {args.command}: the device's memory is too small ({str(error).splitlines()[0]}): try more "
            "rematerialisation (model.remat=full), fewer examples at once (a smaller batch size, a larger "
            "train.grad_accum_steps) or parameters split over more devices (mesh.fsdp); `spatialvla-jax compile` "
            "says what fits a TPU pod",
            file=sys.stderr,
        )
        return 2
    return 0


# What JAX says in a process whose collectives another one left, on CPUs, GPUs and TPUs.
LOST = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "heartbeat")


def runtime_error(error: Exception, *words: str) -> bool:
    """Whether it is of JAX's runtime and has one of the words in it."""
    jax = sys.modules.get("jax")
    return bool(jax and isinstance(error, jax.errors.JaxRuntimeError) and any(word in str(error) for word in words))


def refuse_buckets(args: argparse.Namespace) -> None:
    """Raises InputError for a path such as gs://bucket/run, which would become a folder of the working directory."""
    for name, value in vars(args).items():
        if isinstance(value, Path) and ":/" in str(value):
            url = str(value).replace(":/", "://", 1)
            raise InputError(
                f"--{name.replace('_', '-')} {url} is no path of a file system: mount the bucket (gcsfuse) and name "
                "its folder"
            )


def overrides_of(rest: list[str], allowed: bool) -> dict[str, str]:
    """`--config.train.steps=100` → {"train.steps": "100"}; anything else is unknown."""
    overrides = {}
    for argument in rest:
        key, equals, value = argument.removeprefix("--config.").partition("=")
        if not (allowed and argument.startswith("--config.") and equals):
            raise InputError(f"argument {argument!r} is not known; config keys are set as --config.KEY=VALUE")
        overrides[key] = value
    return overrides


def process_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--coordinator",
        default=os.environ.get("JAX_COORDINATOR_ADDRESS"),
        metavar="HOST:PORT|auto",
        help="process 0 of several that train together; auto on TPU pods, SLURM and MPI",
    )
    parser.add_argument("--num-processes", type=int, default=os.environ.get("JAX_NUM_PROCESSES"))
    parser.add_argument("--process-id", type=int, default=os.environ.get("JAX_PROCESS_ID"))
    parser.add_argument(
        "--heartbeat", type=int, default=100, help="seconds after which a silent process ends the others"
    )


def step_range(text: str) -> tuple[int, int]:
    """`50:55` → (50, 55)."""
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and 0 < int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} is not FIRST:LAST, such as 50:55")
    return int(first), int(last)


def image_size(text: str) -> tuple[int, int]:
    """`480x640` → (480, 640)."""
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit() and 0 < int(height) <= 4096 and 0 < int(width) <= 4096):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 480x640")
    return int(height), int(width)


def key_names(text: str) -> dict[str, str]:
    """`image=observation/image,state=state` → {"image": "observation/image", "state": "state"}."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(ours and theirs for ours, _, theirs in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not OURS=THEIRS, such as image=observation/image,state=state")
    return {ours: theirs for ours, _, theirs in pairs}


def grid_actions_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--config", help="use the actions of the data that it names")
    parser.add_argument("--stats", type=Path, help=f"use samples of the mixture's Gaussians in it; {default}")


def run_train(args: argparse.Namespace) -> None:
    from spatialvla_jax.config import load_config
    from spatialvla_jax.training.loop import train
    from spatialvla_jax.utils.distributed import is_writer, join

    config = load_config(args.config, args.overrides)
    if args.coordinator:
        join(args.coordinator, args.num_processes, args.process_id, args.heartbeat)
    try:
        result = train(config, args.workdir, wandb=args.wandb, profile=args.profile)
    except OSError as error:
        raise StorageError(f"{error.filename or args.workdir}: {error.strerror or error}") from error
    if is_writer():
        again = "" if result["step"] == config.train.steps else f" of {config.train.steps}, the same command goes on"
        print(
            f"trained {result['params']:,} parameters to step {result['step']}{again}; "
            f"checkpoints in {result['checkpoint']}"
        )


def run_sweep(args: argparse.Namespace) -> None:
    from collections import Counter

    from tqdm import tqdm

    from spatialvla_jax.reports.sweep import write_report
    from spatialvla_jax.sweep.plan import load_sweep
    from spatialvla_jax.sweep.run import FAILED, FINISHED, launch, prepare, run_here, run_parallel
    from spatialvla_jax.utils.distributed import is_writer, join

    if args.config is None or args.workdir is None:
        raise InputError("a sweep needs --config FILE and --workdir DIR; `sweep report DIR` only writes its report")
    if args.coordinator:
        join(args.coordinator, args.num_processes, args.process_id, args.heartbeat)
    sweep = load_sweep(args.config, args.overrides, args.only)
    trials, flags = sweep.select(args.only), [f"--config.{k}={v}" for k, v in args.overrides.items()]
    if args.dry_run and args.launcher == "local":
        print("\n".join(trial.name for trial in trials))
        return
    if not args.dry_run:
        prepare(sweep, args.workdir)
    if args.launcher != "local":
        launch(args.launcher, args.launcher_args, args.config, args.workdir, trials, flags, args.dry_run)
        return
    if args.parallel > 1:
        command = [sys.executable, "-m", "spatialvla_jax.cli", "sweep", "--config", args.config, *flags]
        command += ["--workdir", str(args.workdir), "--no-report"]
        outcomes = run_parallel(command, args.workdir, trials, args.parallel)
    else:
        outcomes = run_here(sweep, args.workdir, trials, lambda s: tqdm.write(s, sys.stderr))
    if is_writer() and args.report and FINISHED in outcomes.values():
        print(write_report(args.workdir))
    if is_writer():
        counts = Counter(outcomes.values())
        told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        left = len(trials) - counts[FINISHED]
        print(f"{len(trials)} trial{'s' * (len(trials) > 1)}: {told}{'; the same command goes on' if left else ''}")
        if counts[FAILED]:
            failed = [name for name, outcome in outcomes.items() if outcome == FAILED]
            print(f"spatialvla-jax sweep: {len(failed)} failed: {', '.join(failed)}", file=sys.stderr)
            raise SystemExit(1)


def run_sweep_report(args: argparse.Namespace) -> None:
    from spatialvla_jax.reports.sweep import write_report

    print(write_report(args.dir))


def run_compile(args: argparse.Namespace) -> None:
    import jax
    from tqdm import tqdm

    from spatialvla_jax.config import load_config
    from spatialvla_jax.planning.tpu_plan import compile_for, line, parse_topology, table

    jax.config.update("jax_platforms", "cpu")  # there may be no TPU, and none is used
    topology = parse_topology(args.topology, args.slices)
    config = load_config(args.config, args.overrides)
    cache = Path(config.data.cache_dir or "~/.cache/spatialvla_jax").expanduser() / "compile"
    results = compile_for(config, topology, cache, searching=args.search, progress=lambda s: tqdm.write(s, sys.stderr))
    for plan, report in results:
        print(f"{plan}: {line(report)}")
    plan, best = results[0]
    print(f"{best['preset']} on {topology} ({topology.chips} chips), {plan}")
    print(table(best))
    print(f"wrote the reports to {cache}")
    print(json.dumps({k: v for k, v in best.items() if k != "collectives"}))


def run_evaluate(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from spatialvla_jax.config import load_config, train_config_of
    from spatialvla_jax.data import open_data
    from spatialvla_jax.evaluation.open_loop import evaluate, table
    from spatialvla_jax.inference.policy import Policy

    if args.closed_loop:
        run_closed_loop(args)
        return
    if args.checkpoint is None:
        raise InputError("--checkpoint must name what is to be evaluated")
    policy = Policy.load(args.checkpoint, constrained=not args.unconstrained)
    if args.config is None and args.overrides:
        raise InputError("--config.KEY=VALUE needs --config FILE")
    config = train_config_of(args.checkpoint) if args.config is None else load_config(args.config, args.overrides)
    loader = open_data(config, policy.processor.statistics, policy.processor.tokenizer)
    with tqdm(total=loader.num_frames(args.split), unit="frame", desc="evaluate") as bar:
        result = evaluate(policy, loader, args.split, batch_size=args.batch_size, progress=bar.update)
    print(table(result))
    print(json.dumps(result))


def run_serve(args: argparse.Namespace) -> None:
    import asyncio
    import logging

    from spatialvla_jax.inference.policy import Policy
    from spatialvla_jax.utils.compilation_cache import share_compilations
    from spatialvla_jax.utils.malloc import limit_heaps

    try:
        from spatialvla_jax.serving.server import Limits, Server, run
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: pip install 'spatialvla-jax[serve]'") from None

    if args.max_batch < 1:
        raise InputError(f"a batch of {args.max_batch} is none: --max-batch is 1 or more")
    if args.token_file and not args.token_file.is_file():
        raise InputError(f"token file {args.token_file} does not exist")
    token = args.token_file.read_text() if args.token_file else os.environ.get("SPATIALVLA_TOKEN", "")
    limits = Limits(
        image_sizes=tuple(args.image_size or ()),
        clients=args.max_clients,
        batch=args.max_batch,
        wait=args.max_wait_ms / 1000,
    )
    logging.getLogger("websockets.server").setLevel(logging.CRITICAL)  # a stranger's broken handshake is no event
    limit_heaps()
    share_compilations(args.compile_cache.expanduser())
    options = {"dtype": args.dtype, "quantize": args.quantize, "speculate": args.speculate}
    policy = Policy.load(args.checkpoint, constrained=not args.unconstrained, **options)
    server = Server(policy, args.host, args.port, token=token.strip(), execute=args.execute, limits=limits)
    print(f"compiling for batches of 1 to {args.max_batch}", flush=True)
    asyncio.run(run(server, lambda: print(f"serving {args.checkpoint} on ws://{args.host}:{server.port}", flush=True)))
    print("every reply is sent; stopped")


def run_closed_loop(args: argparse.Namespace) -> None:
    from functools import partial

    from tqdm import tqdm

    from spatialvla_jax.checkpoints import fingerprint
    from spatialvla_jax.evaluation import closed_loop
    from spatialvla_jax.inference.policy import Policy
    from spatialvla_jax.serving.client import Client
    from spatialvla_jax.sim import libero_env as libero

    if (args.checkpoint is None) == (args.server is None):
        raise InputError("closed loop evaluates either --checkpoint or --server")
    if args.checkpoint and (args.observation_keys or args.gripper_closes):
        raise InputError("--observation-keys and --gripper-closes are for a --server")
    if args.server and args.unconstrained:
        raise InputError("--unconstrained is for a --checkpoint; a server is started with it")
    episodes = libero.episodes(args.closed_loop.split(","), args.episodes, args.seeds, args.tasks)
    settings = closed_loop.Settings(libero.MAX_STEPS, args.execute, min(args.workers, len(episodes)))
    extra = {"unnorm_key": args.unnorm_key} if args.unnorm_key else {}
    if args.server:
        token = os.environ.get("SPATIALVLA_TOKEN", "")
        metadata = Client(args.server, token).metadata
        name, keys, depth = args.server, metadata.get("unnorm_keys", []), metadata.get("needs_depth", False)
        depth = depth or "depth" in (args.observation_keys or ())
        sizes = [height for height, width in metadata.get("image_sizes", []) if height == width]
        size = args.image_size or (sizes or [128])[0]
        how = {"keys": args.observation_keys, "gripper_closes": args.gripper_closes}
        name += "".join(f", {key} {value}" for key, value in how.items() if value)
        infer = closed_loop.served(args.server, token, **how, **extra)
    else:
        policy = Policy.load(args.checkpoint, constrained=not args.unconstrained)
        name = fingerprint(args.checkpoint) + (", unconstrained" if args.unconstrained else "")
        keys, depth = list(policy.processor.statistics), policy.model.config.depth_source == "dataset"
        size = args.image_size or policy.model.config.img.image_size
        infer = closed_loop.padded(policy.infer_batch, settings.workers, **extra)
    mirrored = (args.unnorm_key or "".join(keys[:1])).endswith("no_noops")
    with tqdm(total=len(episodes), unit="episode", desc="closed loop") as bar:

        def progress(done: int, successes: int) -> None:
            bar.set_postfix_str(f"{successes} successes", refresh=False)
            bar.update(done - bar.n)

        result = closed_loop.evaluate(
            partial(libero.Libero, size, depth, mirrored),
            infer,
            episodes,
            settings,
            args.out,
            policy=f"{name}, {size} px" + (f", {args.unnorm_key}" if args.unnorm_key else ""),
            videos=args.videos,
            progress=progress,
        )
    print(closed_loop.table(result))
    print(f"wrote {args.out}: result.json, episodes.jsonl and {len(list((args.out / 'videos').iterdir()))} videos")
    print(json.dumps(result))


def run_convert(args: argparse.Namespace) -> None:
    from spatialvla_jax.export.convert import convert
    from spatialvla_jax.export.verify import VerificationError, table

    try:
        options = {"dtype": args.dtype, "verify": args.verify, "zoedepth": args.zoedepth, "merge": args.merge}
        result = convert(args.src, args.dst, to=args.to, **options)
    except VerificationError as error:
        print(table(error.result))
        print(json.dumps(error.result))
        print(f"spatialvla-jax convert: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    verification = result["verification"]
    print(table(verification) if isinstance(verification, dict) else f"not verified: {verification}")
    print(f"wrote {args.dst}")
    print(json.dumps(result))
    if not result["bit_exact"]:
        print(f"spatialvla-jax convert: {args.dst} reads back with other bytes than {args.src}", file=sys.stderr)
        raise SystemExit(1)


def run_stats(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from spatialvla_jax.config import load_config
    from spatialvla_jax.data.beam import compute_stats, table

    config = load_config(args.config, args.overrides).to_dict()
    with tqdm(unit="shard", desc="stats") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        data, exclude = config["data"], config["grid"]["exclude"]
        stats = compute_stats(data, exclude, args.out, args.runner, args.runner_options, progress)
    print(table(stats))
    print(f"wrote {args.out}: set data.statistics to it")


def run_grid_fit(args: argparse.Namespace) -> None:
    from spatialvla_jax.actions.io import describe_grid, save_grid
    from spatialvla_jax.config import load_config
    from spatialvla_jax.data import open_data
    from spatialvla_jax.data.beam import load_stats, pooled
    from spatialvla_jax.training.grid_fit import fitted_datasets, make_grid, mixture_gaussians

    config = load_config(args.config, args.overrides)
    values = config.to_dict()
    if args.stats:
        stats = load_stats(args.stats)
        gaussians = pooled(stats, fitted_datasets(list(stats["gaussians"]), values["grid"]["exclude"]))
        grid = make_grid(values["grid"], lambda: gaussians)
    else:
        grid = make_grid(values["grid"], lambda: mixture_gaussians(values, open_data(config)))
    save_grid(args.out, grid)
    about = describe_grid(grid)
    print(f"wrote {args.out}: {about['kind']}, {'×'.join(map(str, about['bins']))} bins, {grid.vocab_size} tokens")


def grid_actions(args: argparse.Namespace) -> tuple[Any, str] | None:
    """The actions that --config or --stats asks for, and what they are in words."""
    import numpy as np

    from spatialvla_jax.actions.io import sample_gaussians
    from spatialvla_jax.config import load_config
    from spatialvla_jax.data import open_data
    from spatialvla_jax.data.beam import load_stats, pooled
    from spatialvla_jax.training.grid_fit import fitted_actions, fitted_datasets

    if args.config:
        config = load_config(args.config, args.overrides)
        actions = np.concatenate(list(fitted_actions(open_data(config), config.to_dict()["grid"]["exclude"])))
        return actions, f"data of {Path(args.config).name}"
    if args.overrides:
        raise InputError("--config.KEY=VALUE needs --config FILE")
    if args.stats:
        stats = load_stats(args.stats)
        names = stats["mixture"]["datasets"] if stats.get("mixture") else fitted_datasets(list(stats["gaussians"]), ())
        return sample_gaussians(pooled(stats, names)), f"samples of {args.stats.name}"
    return None


def run_grid_show(args: argparse.Namespace) -> None:
    from spatialvla_jax.actions import ActionGrid
    from spatialvla_jax.actions.io import sample_actions
    from spatialvla_jax.checkpoints.load import load_grid
    from spatialvla_jax.reports.figures import grids

    grid = load_grid(args.grid)
    actions, source = grid_actions(args) or (sample_actions(grid), "samples of the grid")
    if isinstance(grid, ActionGrid):
        grids.action_grid(args.out, grid, actions, source)
    else:
        grids.linear_grid(args.out, grid, actions, source)
    print(f"wrote {args.out}: {args.grid} over {len(actions):,} actions ({source})")


def run_grid_compare(args: argparse.Namespace) -> None:
    from spatialvla_jax.actions import PRETRAIN_GAUSSIANS
    from spatialvla_jax.actions.io import compare_grids, sample_gaussians, table
    from spatialvla_jax.checkpoints.load import load_grid

    grids = {name: load_grid(name) for name in args.grids}
    published = "samples of the published pre-training Gaussians"
    actions, source = grid_actions(args) or (sample_gaussians(PRETRAIN_GAUSSIANS), published)
    rows = compare_grids(grids, actions)
    print(f"errors in normalised units on {len(actions):,} actions ({source})")
    print(table(rows))
    print(json.dumps({"actions": {"source": source, "count": len(actions)}, "grids": rows}))


def run_bench(args: argparse.Namespace) -> None:
    import subprocess

    script = Path(__file__).parents[2] / "benchmarks" / BENCHMARKS[args.benchmark]
    if not script.is_file():
        raise InputError(f"{script} does not exist: benchmarks run from a clone of the repository")
    if code := subprocess.call([sys.executable, str(script), *args.arguments]):  # a fresh process, for its memory
        raise SystemExit(code)


def task_ids(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def run_record(args: argparse.Namespace) -> None:
    from spatialvla_jax.sim.record_libero import record_libero, render_motions

    if args.render:
        options = {"image_size": args.image_size, "every": args.every, "workers": args.workers}
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
        workers=args.workers,
    )
    for task, report in reports.items():
        print(
            f"task {task}: {report.kept} kept, {report.tried - report.kept} rejected by the benchmark, "
            f"{report.mean_steps:.0f} steps a kept episode: {report.language}"
        )
    rate = 60 * sum(report.kept for report in reports.values()) / (time.monotonic() - began)
    print(f"{rate:.1f} episodes a minute")
    print(f"wrote {directory}")


def run_show(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from spatialvla_jax.config import load_config
    from spatialvla_jax.data import load_data
    from spatialvla_jax.models.presets import preset
    from spatialvla_jax.reports.mixture import IMAGE_SIZE, write_page
    from spatialvla_jax.training.loop import make_processor
    from spatialvla_jax.utils.progress import shard_progress

    config: Any = load_config(args.config, args.overrides)
    size = preset(config.model.preset).img.image_size if config.data.get("packed") else IMAGE_SIZE
    loader = load_data(config.data, image_size=size, progress=shard_progress())
    grid = make_processor(config, loader).grid
    with tqdm(total=len(loader.names), unit="dataset", desc="show") as bar:

        def progress(done: int, total: int) -> None:
            bar.update(done - bar.n)

        write_page(args.out, loader, grid, title=Path(args.config).stem, seed=args.seed, progress=progress)
    print(f"wrote {args.out} ({args.out.stat().st_size / 1e6:.1f} MB): open it in a browser")


def run_lerobot(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from spatialvla_jax.data.importers.lerobot import JPEG_QUALITY, convert_lerobot

    with tqdm(unit="episode", desc="convert") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        directory, source = convert_lerobot(args.src, args.dst, camera=args.camera, name=args.name, progress=progress)
    width = "x".join(map(str, source.shapes["action"]))
    print(f"actions are {width} wide, {source.names}: the spec in your config says what they mean")
    print(f"frames of {source.camera}; those of videos are stored as JPEG of quality {JPEG_QUALITY}")
    for split, episodes in source.splits.items():
        print(f"{split}: {len(episodes):,} episodes, {sum(episode.length for episode in episodes):,} frames")
    print(f"wrote {directory}")


def run_data_import(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from spatialvla_jax.data.importers.tf_dataset import trajectories_of, write_rlds

    sys.path.insert(0, "")  # so that a module of the working directory is found
    with tqdm(unit="trajectory", desc="import") as bar:

        def progress(split: str, done: int, total: int | None) -> None:
            bar.set_description(f"import {split}", refresh=False)
            bar.total = total
            bar.update(done - bar.n)

        directory, stored = write_rlds(trajectories_of(args.function), args.out, progress=progress)
    for key, kind in stored.items():
        print(f"{key}: {kind}")
    print(f"wrote {directory}")


def run_data_depth(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from spatialvla_jax.config import load_config
    from spatialvla_jax.data.importers.add_depth import MAX_DEPTH
    from spatialvla_jax.data.oxe import CATALOGUE, make_spec
    from spatialvla_jax.data.resolve_datasets import make_entries
    from spatialvla_jax.models.presets import preset
    from spatialvla_jax.precompute_depth import precompute_depth

    if (args.src is None) == (args.config is None) or (args.src is None) != (args.spec is None):
        raise InputError("name the data either as SRC --spec NAME or by --config FILE")
    size = args.image_size
    if args.config is None:
        datasets = [(args.src, make_spec(args.spec, CATALOGUE, str(args.src)))]
    else:
        config = load_config(args.config, args.overrides).to_dict()
        datasets = [(Path(entry.path), entry.spec) for entry in make_entries(config["data"])]
        size = size or preset(config["model"]["preset"]).img.image_size
    with tqdm(unit="episode") as bar:

        def progress(name: str, done: int, total: int) -> None:
            bar.set_description(f"depth of {name}", refresh=False)
            bar.total = total
            bar.update(done - bar.n)

        results = precompute_depth(
            datasets,
            args.checkpoint,
            args.out,
            image_size=size,
            splits=args.split and tuple(args.split),
            batch_size=args.batch_size,
            dtype=args.dtype,
            progress=progress,
        )
    for result in results:
        if result["clipped"]:
            print(f"{result['clipped']} pixels were farther than {MAX_DEPTH} m and are stored as that")
        print(f"wrote {result['directory']}: {result['depth']} of {result['frames']} frames")
    print(f"to train on it: datasets in {args.out}, data.precomputed_depth=True, model.depth_source=dataset")


def run_data_pack(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from spatialvla_jax.config import load_config
    from spatialvla_jax.data import load_data
    from spatialvla_jax.data.pack import write_pack
    from spatialvla_jax.models.presets import preset
    from spatialvla_jax.utils.progress import shard_progress

    config = load_config(args.config, args.overrides).to_dict()
    data, model, training = config["data"], config["model"], config["train"]
    loader = load_data(
        data,
        image_size=args.image_size or preset(model["preset"]).img.image_size,
        action_chunk=model["action_chunk"],
        depth=model["depth_source"] == "dataset",
        progress=shard_progress(),
    )
    splits = args.split or [data["split"], *([training["eval_split"]] if training["eval_every"] else [])]
    with tqdm(unit="frame", desc="pack") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = write_pack(loader, args.out, data, splits, progress)
    frames = ", ".join(f"{count:,} frames of {split}" for split, count in result["frames"].items())
    print(f"wrote {result['path']}: {result['bytes']:,} bytes, {frames}")


def run_demo(args: argparse.Namespace) -> None:
    from spatialvla_jax.cli.demo import run

    run(args.config, args.workdir, args.overrides)


if __name__ == "__main__":
    sys.exit(main())
