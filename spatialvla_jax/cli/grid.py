"""Commands that fit, draw and compare action grids: `grid …`."""

import argparse
import json
from pathlib import Path
from typing import Any

from spatialvla_jax.cli.arguments import Commands, add_command, add_group, add_output, path
from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.outputs import OutputFile, has_keys, is_report


def is_grid(content: bytes) -> bool:
    return has_keys("kind", "theta", "phi", "r")(content) or has_keys("kind", "levels")(content)


def add_fit(commands: Commands) -> None:
    p = add_command(
        commands,
        "fit",
        run_fit,
        "make the grid that a run would use, from its data or from a file of stats",
        ("--config demo --out grid.json", "--config pretrain --stats stats.json --out grid.json"),
    )
    p.add_argument("--config", required=True, help="names the data; its grid part is used")
    p.add_argument(
        "--stats",
        type=path,
        help="file written by `stats`, used without the datasets in grid.exclude; by default the data is read",
    )
    add_output(p, "--out", OutputFile(is_grid), required=True, help="e.g. grid.json")


def run_fit(args: argparse.Namespace) -> None:
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


def add_show(commands: Commands) -> None:
    p = add_command(
        commands,
        "show",
        run_show,
        "draw a grid in 3-D and variable by variable",
        ("grid.json --out grid.png", "runs/demo/run --config demo --out grid.png"),
    )
    p.add_argument("grid", type=path, metavar="GRID|RUN", help="file of `grid fit`, or a run or other checkpoint")
    add_output(p, "--out", OutputFile(is_report), required=True, help="e.g. grid.png")
    add_actions_arguments(p, "by default samples in which every bin is equally frequent")


def run_show(args: argparse.Namespace) -> None:
    from spatialvla_jax.actions import ActionGrid
    from spatialvla_jax.actions.io import sample_actions
    from spatialvla_jax.checkpoints.load import load_grid
    from spatialvla_jax.reports.figures import grids

    grid = load_grid(args.grid)
    given = grid_actions(args)
    actions, source = given or (sample_actions(grid), "samples of the grid")
    if isinstance(grid, ActionGrid):
        grids.action_grid(args.out, grid, actions, source, fit=given is not None)
    else:
        grids.linear_grid(args.out, grid, actions, source)
    print(f"wrote {args.out}: {args.grid} over {len(actions):,} actions ({source})")


def add_compare(commands: Commands) -> None:
    p = add_command(
        commands,
        "compare",
        run_compare,
        "compare bins, tokens and quantisation errors of grids on the same actions",
        ("grid.json runs/demo/run", "grid.json other.json --config demo"),
    )
    p.add_argument("grids", nargs="+", metavar="GRID|RUN", help="as for `grid show`")
    add_actions_arguments(p, "by default samples of the published pre-training mixture's Gaussians")


def run_compare(args: argparse.Namespace) -> None:
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


def add_actions_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--config", help=f"use the actions of the data that it names; {default}")
    parser.add_argument("--stats", type=path, help=f"use samples of the mixture's Gaussians in it; {default}")


def grid_actions(args: argparse.Namespace) -> tuple[Any, str] | None:
    """The actions selected by --config or --stats and a description of them; None without either."""
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


def add(commands: Commands) -> None:
    group = add_group(
        commands,
        "grid",
        "action grids: fit, show, compare",
        ("fit --config demo --out grid.json", "show grid.json --out grid.png"),
    )
    add_fit(group)
    add_show(group)
    add_compare(group)
