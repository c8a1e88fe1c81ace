"""The cost of quantisation alone: success of the scripted expert if its actions go through action grids.

    python benchmarks/quantisation.py [--episodes 50] [--seeds 0] [--only 1026,4x8x2x4x4x4,expert]

At every step the expert acts on the simulator's state; its action is normalised with the statistics of the config's
data, encoded, decoded, converted back to robot units and executed. There is no model and no camera. The grids, fitted
to that data, are compared with the linear tokenizer of 256 levels per dimension, normalisation alone (its clipping also
changes actions) and the expert itself. Rewrites a figure and results.json after each. Rerun the same command to resume
after an interruption, or with more grids or episodes. Ends with one line of JSON.
"""

import argparse
import json
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from spatialvla_jax.actions import decode, encode, fit_gaussians, gaussian_grid, linear_grid
from spatialvla_jax.actions.gaussian import PRESET_BINS
from spatialvla_jax.actions.normalization import normalize, unnormalize
from spatialvla_jax.cli import overrides_of
from spatialvla_jax.cli.arguments import local_path, positive, task_ids
from spatialvla_jax.config import load_config
from spatialvla_jax.data import open_data
from spatialvla_jax.errors import FaultsError, InputError
from spatialvla_jax.evaluation import closed_loop
from spatialvla_jax.evaluation.rollouts import Episode, Settings, padded
from spatialvla_jax.reports.figures.style import BLUE, DARK, GREEN, ORANGE, drawing
from spatialvla_jax.sim import libero_env as libero
from spatialvla_jax.sweep.provenance import provenance
from spatialvla_jax.training.log_folder import LogFolder
from spatialvla_jax.utils.atomic import write_json
from spatialvla_jax.utils.progress import progress_bar

BINS = {130: (4, 8, 2, 4, 4, 4), 386: (6, 12, 4, 4, 4, 6), **PRESET_BINS}  # two smaller ones than published
PROBE = np.random.default_rng(0).uniform(-1, 1, (256, 7)).astype(np.float32)  # distinguishes grids of other data
Through = Callable[[np.ndarray], np.ndarray]  # the expert's actions f32[B, 7] -> executed actions


def parse_bins(text: str) -> tuple[int, ...] | None:
    """`4x8x2x4x4x4` → the bins of a grid; None for anything else."""
    parts = text.split("x")
    return tuple(map(int, parts)) if len(parts) == 6 and all(part.isdecimal() for part in parts) else None


def tokenizers(config_file: str, overrides: dict[str, str], only: str | None) -> dict[str, Through]:
    """{name: function} for everything listed above, or for `only`: names from there, or bins such as 4x8x2x4x4x4."""
    config = load_config(config_file, overrides)
    loader = open_data(config)
    statistics = loader.statistics[loader.names[0]]["action"]
    gaussians = fit_gaussians(loader.actions())
    named = {str(size): bins for size, bins in BINS.items()}
    asked = only.split(",") if only else None
    named |= {name: bins for name in asked or () if (bins := parse_bins(name))}
    grids = {name: gaussian_grid(gaussians, bins, config.grid.min_sigma) for name, bins in named.items()}

    def through(grid) -> Through:
        quantise = jax.jit(lambda actions: decode(grid, encode(grid, actions)))
        return lambda actions: unnormalize(np.asarray(quantise(normalize(actions, statistics))), statistics)

    known = {
        **{name: through(grid) for name, grid in grids.items()},
        "linear 256": through(linear_grid()),
        "normalised": lambda actions: unnormalize(normalize(actions, statistics), statistics),
        "expert": lambda actions: actions,
    }
    for name in asked or known:
        if name not in known:
            raise InputError(f"--only {name!r} is none of {', '.join(known)}, nor six numbers of bins as 4x8x2x4x4x4")
    return {name: known[name] for name in asked or known}


def report(out: Path, results: dict[str, dict], arguments: dict[str, str]) -> None:
    """Write results.json and the figure."""
    write_json(out / "results.json", {"results": results, "arguments": arguments} | provenance())
    draw(out / "quantisation.svg", results)


def tokens(name: str) -> int:
    """The number of tokens of a grid, by its name; 0 for anything else."""
    bins = parse_bins(name)
    return int(np.prod(bins[:3]) + np.prod(bins[3:]) + 2) if bins else int(name) if name.isdigit() else 0


def draw(path: Path, results: dict[str, dict]) -> None:
    """Plot success rates, and the steps of successful episodes. `results`: {name: {"success", "standard_error",
    "steps" (None without a success)}}; others ("expert", "linear 256", …) become horizontal lines."""
    with drawing(path, 9.4, 3.4, forms=[path.suffix[1:]]) as figure:
        left, right = figure.subplots(1, 2)
        grids = [results[name] for name in sorted(filter(tokens, results), key=tokens)]  # two may have as many tokens
        sizes = sorted(filter(None, map(tokens, results)))
        rates = [100 * grid["success"] for grid in grids]
        errors = [100 * grid["standard_error"] for grid in grids]
        left.errorbar(sizes, rates, errors, color=BLUE, marker="o", markersize=5, capsize=3, label="action grid")
        right.plot(sizes, [grid["steps"] or np.nan for grid in grids], color=BLUE, marker="o", markersize=5)
        others = [name for name in results if not tokens(name)]
        for name, colour, line in zip(others, (ORANGE, GREEN, DARK), ("--", "-.", ":"), strict=False):
            left.axhline(100 * results[name]["success"], color=colour, linestyle=line, linewidth=1.3, label=name)
            if results[name]["steps"] is not None:  # there was a success
                right.axhline(results[name]["steps"], color=colour, linestyle=line, linewidth=1.3)
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=40, ha="right")
            axes.minorticks_off()
            axes.set_xlabel("tokens")
            axes.grid()
        left.set(title="The expert's success through tokens", ylabel="success (%)", ylim=(0, 103))
        right.set(title="Steps that a success takes", ylabel="steps")
        left.legend(loc="lower right")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=local_path, default=Path("runs/quantisation"))
    parser.add_argument("--config", default="demo", help="names the data; --config.KEY=VALUE changes a key")
    parser.add_argument("--suite", default="libero_spatial", choices=libero.PLANS)
    parser.add_argument("--only", help="some of these, or grids by their bins, e.g. 1026,4x8x2x4x4x4,expert")
    parser.add_argument("--episodes", type=positive, default=50, help="per task and seed")
    parser.add_argument("--seeds", type=task_ids, default=[0])
    parser.add_argument("--workers", type=positive, default=os.cpu_count())
    args, rest = parser.parse_known_args()
    try:
        measure(args, overrides_of(rest, allowed=True))
    except InputError as error:
        parser.error(str(error))
    except FaultsError as error:
        sys.exit(str(error))


def measure(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    episodes = libero.episodes([args.suite], args.episodes, args.seeds, None)
    settings = Settings(libero.MAX_STEPS, workers=args.workers)
    arguments = {key: str(value) for key, value in vars(args).items() if key != "out"} | overrides
    results = {}
    for name, through in tokenizers(args.config, overrides, args.only).items():

        def infer(observations: list[dict], through: Through = through) -> list[dict]:
            return [{"actions": a[None]} for a in through(np.stack([o["expert"] for o in observations]))]

        out, became = args.out / name.replace(" ", "_"), through(PROBE).round(4)
        with progress_bar(name, "episode") as show:
            result = closed_loop.evaluate(
                libero.LiberoExpert,
                padded(infer, args.workers),
                episodes,
                settings,
                LogFolder(out),
                policy=f"expert through {name}, {args.config} {overrides} ({zlib.crc32(became.tobytes()):08x})",
                progress=lambda done, successes, show=show: show(done, len(episodes), note=f"{successes} successes"),
            )
        records = [json.loads(line) for line in (out / "episodes.jsonl").read_text().splitlines()]
        solved = {Episode(*(one[key] for key in Episode._fields)): one["steps"] for one in records if one["success"]}
        steps = [solved[episode] for episode in episodes if episode in solved]  # there may be others
        results[name] = {key: result[key] for key in ("success", "standard_error", "episodes", "faults")}
        results[name]["steps"] = float(np.mean(steps)) if steps else None
        results[name]["tasks"] = [task["success"] for task in result["suites"][args.suite]["tasks"].values()]
        print(f"{name}: {100 * results[name]['success']:.1f} % of {results[name]['episodes']}", flush=True)
        report(args.out, results, arguments)
    print(f"{'actions through':16}  success (%)   steps")
    for name, row in results.items():
        rate = f"{100 * row['success']:5.1f} ± {100 * row['standard_error']:.1f}"
        print(f"{name:16}  {rate:>12}  {row['steps'] or float('nan'):6.1f}")
    print(f"wrote {args.out / 'quantisation.svg'} and {args.out / 'results.json'}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
