"""Commands that train: `demo`, `train`, `sweep`; and `compile`, which plans for a TPU pod."""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spatialvla_jax.cli.arguments import (
    Commands,
    add_command,
    add_output,
    add_process_arguments,
    join_processes,
    local_path,
    positive,
)
from spatialvla_jax.errors import InputError, StorageError
from spatialvla_jax.utils.outputs import OutputFolder

if TYPE_CHECKING:
    from spatialvla_jax.reports.rollouts import ValidationRollouts

DEMO = OutputFolder("demo.json", "made_by", "spatialvla-jax demo")
RUN = OutputFolder(
    "config.json",
    "train",
    names=(
        "checkpoints",
        "compiled",
        "finished",
        "goodput",
        "metrics.jsonl",
        "profile",
        "statistics.json",
        "tensorboard",
        "times.jsonl",
    ),
)
SWEEP = OutputFolder(
    "sweep.json",
    "trials",
    names=("compiled", "figures", "report.html", "report.json", "table.csv", "table.md", "table.tex", "trials"),
)


def add_demo(commands: Commands) -> None:
    p = add_command(
        commands,
        "demo",
        run_demo,
        "train, kill, resume, evaluate, export and plot the tiny model in minutes",
        ("", "--workdir /tmp/demo --config.train.steps=200"),
    )
    p.add_argument("--config", default="demo", help="name or path of a file with get_config()")
    add_output(
        p,
        "--workdir",
        DEMO,
        type=local_path,
        default=Path("runs/demo"),
        help="new or empty folder, or an earlier demo's, whose results are replaced",
    )


def run_demo(args: argparse.Namespace) -> None:
    from spatialvla_jax.cli.demo import run

    run(args.config, args.workdir, args.overrides)


def add_train(commands: Commands) -> None:
    p = add_command(
        commands,
        "train",
        run_train,
        "train a model, or resume a run that was stopped",
        (
            "--config demo --workdir runs/mine",
            "--config finetune --workdir runs/tuned --config.init=export --config.train.steps=10000",
            "--config pretrain --workdir /shared/run --coordinator auto",
        ),
    )
    p.add_argument(
        "--config", required=True, help="name or path of a file with get_config(); --config.KEY=VALUE sets a key"
    )
    add_output(p, "--workdir", RUN, required=True, help="directory of the run, new or to be resumed")
    p.add_argument("--wandb", default="", metavar="PROJECT", help="log to Weights & Biases too; by default off")
    p.add_argument(
        "--profile", type=step_range, metavar="FIRST:LAST", help="trace steps to WORKDIR/profile; by default none"
    )
    p.add_argument(
        "--film",
        type=suites_and_tasks,
        metavar="SUITE:TASK,…",
        help="after each validation, log a video of the policy in these tasks of LIBERO (extra [sim]), such as "
        "libero_spatial:0,libero_goal:3; by default none",
    )
    p.add_argument(
        "--rehearse",
        type=positive,
        metavar="STEPS",
        help="only rehearse: take this many steps, save and restart in a scratch folder, and report go or no-go; "
        "by default train",
    )
    add_process_arguments(p)


def run_train(args: argparse.Namespace) -> None:
    from spatialvla_jax.config import load_config
    from spatialvla_jax.reports.validation import ValidationPictures
    from spatialvla_jax.training.loop import Run, train
    from spatialvla_jax.utils.distributed import is_writer
    from spatialvla_jax.utils.process import process_age

    config = load_config(args.config, args.overrides)
    join_processes(args)
    if args.rehearse:
        from spatialvla_jax.cli import rehearse

        return rehearse.run(config, args.workdir, args.rehearse, process_age())
    pictures, rollouts = ValidationPictures(), open_rollouts(args.film or (), config)

    def on_start(run: Run) -> None:
        pictures.start(run)
        if rollouts:
            rollouts.start(run)

    def on_validation(step: int, params: Any) -> dict[str, bytes]:
        return pictures.draw(step, params) | (rollouts.film(step, params) if rollouts else {})

    try:
        result = train(
            config,
            args.workdir,
            wandb=args.wandb,
            profile=args.profile,
            age=process_age(),
            keep_compiled=True,
            on_start=on_start,
            on_validation=on_validation,
        )
    except OSError as error:
        raise StorageError(f"{error.filename or args.workdir}: {error.strerror or error}") from error
    if is_writer():
        left = result["step"] < config.train.steps
        again = f" of {config.train.steps}: rerun the same command to resume" if left else ""
        print(
            f"trained {result['params']:,} parameters to step {result['step']}{again}; "
            f"checkpoints in {result['checkpoint']}"
        )


def open_rollouts(tasks: Sequence[tuple[str, int]], config: Any) -> "ValidationRollouts | None":
    """The rollouts requested by --film, if any. Raises InputError before anything is written."""
    if not tasks:
        return None
    import jax

    from spatialvla_jax.reports.rollouts import ValidationRollouts
    from spatialvla_jax.sim.libero_env import episodes

    if not config.train.eval_every:
        raise InputError("--film logs its videos after validations, and train.eval_every=0 makes none")
    if jax.process_count() > 1:
        raise InputError(f"--film needs a run in one process, but this one has {jax.process_count()}")
    return ValidationRollouts([episode for suite, task in tasks for episode in episodes([suite], 1, [0], [task])])


def suites_and_tasks(text: str) -> list[tuple[str, int]]:
    """`libero_spatial:0,libero_goal:3` → [("libero_spatial", 0), ("libero_goal", 3)]."""
    pairs = [part.partition(":") for part in text.split(",")]
    if not all(suite and task.isdecimal() for suite, _, task in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not SUITE:TASK, such as libero_spatial:0,libero_goal:3")
    return [(suite, int(task)) for suite, _, task in pairs]


def step_range(text: str) -> tuple[int, int]:
    """`50:55` → (50, 55)."""
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and 0 < int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} is not FIRST:LAST, such as 50:55")
    return int(first), int(last)


def add_sweep(commands: Commands) -> None:
    p = add_command(
        commands,
        "sweep",
        run_sweep,
        "train, evaluate and compare every trial of a sweep; `sweep report DIR` repeats the comparison",
        (
            "--config sweeps/grid_resolution --workdir runs/grid_resolution --dry-run",
            "--config sweeps/grid_resolution --workdir runs/grid_resolution --parallel 2",
            "report runs/grid_resolution",
        ),
    )
    p.add_argument(
        "--config", help="name or path of a file with get_sweep(); --config.KEY=VALUE sets a key; no default"
    )
    add_output(p, "--workdir", SWEEP, type=local_path, help="directory of the sweep, new or to be resumed; no default")
    p.add_argument("--only", default="*", metavar="PATTERN", help="trials to run, such as '*_seed-0'")
    p.add_argument("--parallel", type=positive, default=1, metavar="N", help="trials to run at once on this machine")
    p.add_argument(
        "--workers",
        type=positive,
        help="simulators per closed-loop trial; by default the cores divided by --parallel, rounded up",
    )
    p.add_argument(
        "--closed-loop",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="evaluate trials in simulation if the sweep says so (extra [sim])",
    )
    p.add_argument("--launcher", choices=("local", "slurm", "xpk"), default="local", help="run here, or submit jobs")
    p.add_argument(
        "--launcher-args",
        default="",
        help="options for sbatch, or 'CLUSTER TPU_TYPE SLICES IMAGE' for xpk; by default none",
    )
    p.add_argument("--dry-run", action="store_true", help="check the sweep and print its trials or jobs")
    p.add_argument("--report", action=argparse.BooleanOptionalAction, default=True, help="write the report at the end")
    add_process_arguments(p)
    p.set_defaults(of_trials={action.dest: action.default for action in p._actions if action.dest != "help"})
    below = p.add_subparsers(metavar="report|collect")
    add_sweep_report(below)
    add_sweep_collect(below)


def run_sweep(args: argparse.Namespace) -> None:
    import os
    from collections import Counter
    from dataclasses import replace

    from tqdm import tqdm

    from spatialvla_jax.reports.sweep import write_report
    from spatialvla_jax.sweep.measure import episodes_of
    from spatialvla_jax.sweep.plan import load_sweep
    from spatialvla_jax.sweep.run import FAILED, FINISHED, launch, prepare, run_here, run_parallel
    from spatialvla_jax.utils.distributed import is_writer

    if args.config is None or args.workdir is None:
        raise InputError("a sweep needs --config FILE and --workdir DIR; `sweep report DIR` only writes its report")
    if args.launcher == "local" and args.launcher_args:
        raise InputError("--launcher-args needs --launcher slurm or --launcher xpk")
    if args.launcher != "local" and args.parallel > 1:
        raise InputError(f"--parallel is for trials on this machine, and --launcher {args.launcher} makes jobs of them")
    join_processes(args)
    sweep = load_sweep(args.config, args.overrides, args.only)
    trials, flags = sweep.select(args.only), [f"--config.{k}={v}" for k, v in args.overrides.items()]
    if args.dry_run and args.launcher == "local":
        print("\n".join(trial.name for trial in trials))
        return
    if not args.closed_loop:
        trials = tuple(replace(trial, closed_loop={}) for trial in trials)
        flags.append("--no-closed-loop")
    elif args.launcher == "local":
        for trial in trials:
            if trial.closed_loop:
                episodes_of(trial)  # raises errors now, not after training
    workers = args.workers or -(-(os.cpu_count() or 1) // args.parallel)
    if args.workers or args.parallel > 1:
        flags += ["--workers", str(workers)]
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
        outcomes = run_here(sweep, args.workdir, trials, lambda s: tqdm.write(s, sys.stderr), workers)
    if is_writer() and args.report and FINISHED in outcomes.values():
        print(write_report(args.workdir))
    if is_writer():
        counts = Counter(outcomes.values())
        listed = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        again = "; rerun the same command to resume" if counts[FINISHED] < len(trials) else ""
        print(f"{len(trials)} trial{'s' * (len(trials) > 1)}: {listed}{again}")
        if counts[FAILED]:
            failed = [name for name, outcome in outcomes.items() if outcome == FAILED]
            print(f"spatialvla-jax sweep: {len(failed)} failed: {', '.join(failed)}", file=sys.stderr)
            raise SystemExit(1)


def refuse_options_of_trials(args: argparse.Namespace) -> None:
    """Raises InputError for options that the parser of `sweep` accepts but `report` and `collect` would ignore."""
    given = [
        f"--{name.replace('_', '-')}" for name, default in args.of_trials.items() if getattr(args, name) != default
    ]
    if given := ["--config.KEY=VALUE"] * bool(args.overrides) + given:
        raise InputError(f"{given[0]} applies only to a sweep that runs trials")


def add_sweep_report(commands: Commands) -> None:
    p = add_command(
        commands,
        "report",
        run_sweep_report,
        "write a report of existing results",
        ("runs/grid_resolution",),
    )
    p.add_argument("dir", type=local_path, help="the sweep's --workdir")


def run_sweep_report(args: argparse.Namespace) -> None:
    from spatialvla_jax.reports.sweep import write_report

    refuse_options_of_trials(args)
    print(write_report(args.dir))


def add_sweep_collect(commands: Commands) -> None:
    p = add_command(
        commands,
        "collect",
        run_sweep_collect,
        "copy the results of finished trials, without weights, so that the sweep can resume elsewhere",
        ("runs/ablations --out results/ablations", "machine1/ablations machine2/ablations --out runs/ablations"),
    )
    p.add_argument("dirs", type=local_path, nargs="+", metavar="DIR", help="workdirs or collected results of one sweep")
    add_output(p, "--out", SWEEP, type=local_path, required=True, help="new directory, or a workdir to add to")


def run_sweep_collect(args: argparse.Namespace) -> None:
    from spatialvla_jax.sweep.collect import collect

    refuse_options_of_trials(args)
    counts = collect(args.dirs, args.out)
    print(f"copied {counts['copied']} trials to {args.out}: {counts['finished']} of {counts['trials']} are finished")


def add_compile(commands: Commands) -> None:
    p = add_command(
        commands,
        "compile",
        run_compile,
        "compile the training step for a TPU pod, on any machine (extra [tpu])",
        ("--config pretrain --topology v5e:16x16", "--config pretrain --topology v5p-128 --search"),
    )
    p.add_argument("--config", required=True, help="as for train; the data is not read")
    p.add_argument("--topology", required=True, help="such as v5e:16x16 or v4:4x4x4, or by name: v5p-128, v6e-256")
    p.add_argument("--slices", type=positive, default=1, help="slices on the data-center network, along mesh.data")
    p.add_argument(
        "--search", action="store_true", help="rank meshes, remat policies, accumulation and smaller batches"
    )
    p.add_argument(
        "--machine-code",
        action="store_true",
        help="also generate machine code, which takes minutes; memory is then as the executable reports it",
    )


def run_compile(args: argparse.Namespace) -> None:
    import jax
    from tqdm import tqdm

    from spatialvla_jax.config import load_config
    from spatialvla_jax.data import DataConfig
    from spatialvla_jax.planning.topology import parse_topology
    from spatialvla_jax.planning.tpu_plan import compile_for, line, table
    from spatialvla_jax.utils.atomic import disk_errors

    jax.config.update("jax_platforms", "cpu")  # there may be no TPU, and none is used
    topology = parse_topology(args.topology, args.slices)
    config = load_config(args.config, args.overrides)
    cache = DataConfig.from_config(config.data).cache_folder / "compile"
    with disk_errors(cache):
        note = partial(tqdm.write, file=sys.stderr)
        options = {"searching": args.search, "machine_code": args.machine_code}
        results = compile_for(config, topology, cache, **options, progress=note)
    for plan, report in results:
        print(f"{plan}: {line(report)}")
    plan, best = results[0]
    print(f"{best['preset']} on {topology} ({topology.chips} chips), {plan}")
    print(table(best))
    print(f"wrote the reports to {cache}")
    print(json.dumps({k: v for k, v in best.items() if k != "collectives"}))


def add(commands: Commands) -> None:
    add_demo(commands)
    add_train(commands)
    add_sweep(commands)
    add_compile(commands)
