"""The command `report`: a training run's progress and use of time."""

import argparse

from spatialvla_jax.cli.arguments import Commands, add_command, add_output, path
from spatialvla_jax.utils.outputs import OutputFile, has_keys


def add(commands: Commands) -> None:
    p = add_command(
        commands,
        "report",
        run_report,
        "show a run's progress and where its wall time went (goodput)",
        ("runs/mine", "runs/mine --out goodput.json"),
    )
    p.add_argument("workdir", type=path, help="the run's directory")
    made = OutputFile(has_keys("run", "goodput", "processes"))
    add_output(p, "--out", made, help="also write it as JSON; by default off")


def run_report(args: argparse.Namespace) -> None:
    from spatialvla_jax.reports.run import describe, run_report
    from spatialvla_jax.utils.atomic import write_json

    report = run_report(args.workdir)
    print(describe(report))
    if args.out:
        write_json(args.out, report)
        print(f"wrote {args.out}")
