"""The demo: train the tiny model, kill and resume it, evaluate, export, read back, plot and summarise."""

import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spatialvla_jax.actions import ActionGrid, uniform_grid
from spatialvla_jax.actions.normalization import unnormalize
from spatialvla_jax.checkpoints import load_pretrained
from spatialvla_jax.checkpoints.mapping import param_shapes
from spatialvla_jax.config import load_config
from spatialvla_jax.data import Episode, open_data
from spatialvla_jax.errors import InputError
from spatialvla_jax.evaluation.open_loop import evaluate, predict, table
from spatialvla_jax.export.convert import convert
from spatialvla_jax.export.verify import table as verification_table
from spatialvla_jax.inference.policy import Policy
from spatialvla_jax.reports.figures import grids, training
from spatialvla_jax.training.metrics import read_metrics
from spatialvla_jax.training.setup import make_setup
from spatialvla_jax.training.sharding import make_mesh
from spatialvla_jax.utils.atomic import write_json
from spatialvla_jax.utils.process import tied_to_this

FIGURES = ("loss.png", "action_grid.png", "trajectories.png")
NEXT = """
What next:
  - Read docs/guides/data.md and train on your own episodes: one entry in a config names them.
  - Serve this policy: `spatialvla-jax serve --checkpoint {run}`. Its page shows what the policy sees and does.
  - Compare grid resolutions: `spatialvla-jax sweep --config sweeps/grid_resolution --workdir runs/resolution`."""
MADE = ("run", "undisturbed", "export", "compiled", "summary.json", *FIGURES)


def run(config_path: str, workdir: Path, overrides: dict[str, str]) -> dict[str, Any]:
    """Run the demo in `workdir`; returns the content of `summary.json`."""
    began = time.monotonic()
    config = load_config(config_path, overrides)
    flags = [f"--config.{k}={v}" for k, v in overrides.items()]
    run_dir, reference, export = workdir / "run", workdir / "undisturbed", workdir / "export"
    every = config.checkpoint.every
    if config.train.steps < 2 * every:
        raise InputError(f"the demo needs train.steps ≥ 2 × checkpoint.every = {2 * every}, got {config.train.steps}")
    make_setup(config, uniform_grid((1,) * 6), make_mesh(config.mesh.to_dict()))  # reports errors early
    open_data(config).check_epoch(config.train.eval_split)
    make_room(workdir)

    say(f"training {config.train.steps} steps; the process will be killed after step {every} and started again")
    train(config_path, run_dir, flags, kill_after=every)
    killed_at = last_step(run_dir)
    say(f"killed with SIGKILL after step {killed_at}; starting again with the same command")
    train(config_path, run_dir, flags)
    say(f"training an undisturbed run up to step {2 * every}, to compare with the resumed one bit by bit")
    train(config_path, reference, flags, kill_after=2 * every)
    exact = same_bits(run_dir, reference, 2 * every)
    say(f"resumed and undisturbed run at step {2 * every}: {'equal in every bit' if exact else 'DIFFERENT'}")

    say("evaluating on the validation episodes")
    policy = Policy.load(run_dir)
    loader = open_data(config, policy.processor.statistics, policy.processor.tokenizer)
    result = evaluate(policy, loader, config.train.eval_split)
    print(table(result), flush=True)

    say(f"exporting to PyTorch's layout in {export} and reading it back")
    verification = convert(run_dir, export, to="pytorch")["verification"]
    print(verification_table(verification) if isinstance(verification, dict) else f"not run in PyTorch: {verification}")
    roundtrip = roundtrip_exact(policy, export, loader, config.train.eval_split)

    say("drawing")
    records = read_metrics(run_dir / "metrics.jsonl")
    training.loss_curve(workdir / "loss.png", records)
    if isinstance(policy.processor.grid, ActionGrid):
        grids.action_grid(workdir / "action_grid.png", policy.processor.grid, loader.actions())
    training.trajectories(
        workdir / "trajectories.png", [trajectory(policy, next(loader.episodes(config.train.eval_split)))]
    )

    losses = [r["loss"] for r in records if "loss" in r]
    summary = {
        "steps": records[-1]["step"],
        "params": sum(math.prod(shape) for shape in param_shapes(policy.model.config).values()),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "val_token_accuracy": result["token_accuracy"],
        "val_l1": result["l1"],
        "val_l1_mean_baseline": result["l1_mean_baseline"],
        "val_l1_repeat_baseline": result["l1_repeat_baseline"],
        "resume_bit_exact": exact,
        "killed_at_step": killed_at,
        "export_roundtrip_bit_exact": roundtrip,
        "seconds": round(time.monotonic() - began, 1),
        "peak_memory_gb": round(peak_memory_gb(), 2),
        "evaluation": result,
    }
    write_json(workdir / "summary.json", summary)
    print()
    for key, value in summary.items():
        if key != "evaluation":
            print(f"{key:28} {value:.4f}" if isinstance(value, float) else f"{key:28} {value}")
    print(f"\n{conclusion(result)}")
    print(f"\nwrote {workdir}/summary.json, loss.png, action_grid.png, trajectories.png, run/ and export/")
    print(NEXT.format(run=run_dir))
    return summary


def conclusion(result: dict[str, Any]) -> str:
    """What the errors on the validation episodes show, in words."""
    l1, mean, repeat = (result[key] for key in ("l1", "l1_mean_baseline", "l1_repeat_baseline"))
    text = f"On unseen episodes the policy's L1 is {l1:.3f}"
    if l1 >= mean:
        return f"{text}, no better than predicting the mean action ({mean:.3f})."
    text = f"{text}, {1 - l1 / mean:.0%} below predicting the mean action ({mean:.3f})"
    if l1 < repeat:
        return f"{text} and {1 - l1 / repeat:.0%} below holding the last action ({repeat:.3f})."
    return (
        f"{text}. Holding the last action is better ({repeat:.3f}): it knows the expert's last action, and the "
        "expert moves smoothly. The policy sees one image, no history, and has trained for minutes."
    )


def make_room(workdir: Path) -> None:
    """Mark `workdir` as a demo's, and remove the results of an earlier demo."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "demo.json", {"made_by": "spatialvla-jax demo"})
    for name in MADE:
        if (workdir / name).is_dir():
            shutil.rmtree(workdir / name)
        else:
            (workdir / name).unlink(missing_ok=True)


def train(config_path: str, workdir: Path, flags: list[str], kill_after: int | None = None) -> None:
    """The train command as a process of its own; with `kill_after`, SIGKILL soon after that checkpoint is whole."""
    command = [sys.executable, "-m", "spatialvla_jax.cli", "train", "--config", config_path, "--workdir", str(workdir)]
    # The three processes compile the same step: the first stores it for the others.
    compiled = {"JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled")}
    process = subprocess.Popen([*command, *flags], env=tied_to_this(os.environ | compiled))
    try:
        if kill_after is not None:
            checkpoint = workdir / "checkpoints" / str(kill_after)
            while process.poll() is None and not (checkpoint.is_dir() and last_step(workdir) > kill_after):
                time.sleep(0.05)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
                print(flush=True)
                return
        if process.wait() != 0:
            raise InputError(f"training ended with exit code {process.returncode}")
    finally:
        process.kill()  # in case the demo itself is stopped


def last_step(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    records = read_metrics(path) if path.exists() else []
    return records[-1]["step"] if records else 0


def same_bits(a: Path, b: Path, step: int) -> bool:
    """Whether two runs' parameters and logged metrics agree in every bit at `step`."""
    trees = [load_pretrained(run / "checkpoints" / str(step))[1] for run in (a, b)]
    logs = [[r for r in read_metrics(run / "metrics.jsonl") if r["step"] <= step] for run in (a, b)]
    return logs[0] == logs[1] and tree_equal(*trees)


def tree_equal(a: Any, b: Any) -> bool:
    same = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    return all(jax.tree.leaves(same))


def roundtrip_exact(policy: Policy, export: Path, loader: Any, split: str) -> bool:
    """Whether the export, read back, has the same parameter bits and gives the same tokens for a validation batch."""
    again = Policy.load(export)
    batch = next(loader.epoch(16, split))
    tokens = np.array_equal(policy.predict(batch)[0], again.predict(batch)[0])
    return tokens and tree_equal(policy.weights, again.weights)


def trajectory(policy: Policy, episode: Episode) -> dict[str, Any]:
    """Expert and predicted actions of an episode in robot units; the policy runs whole chunks on recorded images."""
    statistics = policy.processor.find_statistics(episode.dataset)["action"]
    _, predicted = predict(policy, episode.frames, batch_size=32)
    frames, chunk, width = predicted.shape
    executed = predicted[::chunk].reshape(-1, width)[:frames]
    return {
        "title": episode.instruction,
        "expert": unnormalize(episode.frames.actions[:, 0], statistics),
        "predicted": unnormalize(executed, statistics),
    }


def peak_memory_gb() -> float:
    """The largest resident set among this process and its children."""
    kib = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return kib / 2**20 if os.uname().sysname == "Linux" else kib / 2**30


def say(text: str) -> None:
    print(f"\n» {text}", flush=True)
