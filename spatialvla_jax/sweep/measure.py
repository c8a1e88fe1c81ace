"""The result of a trial: open loop, closed loop, and the data for the report's figures."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from spatialvla_jax.actions import ActionGrid, adapt_embeddings, encode, grid_to_dict
from spatialvla_jax.actions.io import describe_grid, save_grid
from spatialvla_jax.checkpoints import fingerprint, read_checkpoint
from spatialvla_jax.checkpoints.types import digest
from spatialvla_jax.config import train_config_of
from spatialvla_jax.data import DataConfig, open_data
from spatialvla_jax.data.pack import packed_digest, packed_names
from spatialvla_jax.errors import InputError
from spatialvla_jax.evaluation.closed_loop import remove_if_of_other_weights
from spatialvla_jax.evaluation.open_loop import evaluate
from spatialvla_jax.evaluation.rollouts import Episode, Settings, padded
from spatialvla_jax.inference.policy import Policy
from spatialvla_jax.sim import libero_env
from spatialvla_jax.sweep.plan import Trial
from spatialvla_jax.sweep.provenance import provenance
from spatialvla_jax.training.metrics import curve_of, plateau, read_metrics
from spatialvla_jax.utils.atomic import replacing
from spatialvla_jax.utils.progress import Bar
from spatialvla_jax.utils.storage import AnyPath

SHOWN = 4000  # actions of the data that are kept for the report's figures


def measure(trial: Trial, folder: Path, trained: dict[str, Any], drawn: bool) -> dict[str, Any]:
    """Evaluate a finished training run: the content of result.json. Also writes the data for the report's figures; the
    spatial features, which are large, only if `drawn`. Raises InputError if nothing was learned."""
    began, config = time.monotonic(), train_config_of(folder)
    records, times = (read_metrics(folder / f"{name}.jsonl") for name in ("metrics", "times"))
    if not (losses := curve_of(records, "loss")):  # a step whose loss is not finite is skipped
        raise InputError("no logged step has a finite loss, so nothing was learned: lower optimizer.learning_rate")
    policy = Policy.load(folder)
    loader, grid = open_data(config, policy.processor.statistics, policy.processor.tokenizer), policy.processor.grid
    actions = loader.actions()
    with Bar(total=loader.num_frames(config.train.eval_split), unit="frame", desc="evaluate") as bar:
        evaluation = evaluate(policy, loader, config.train.eval_split, progress=bar.update)
    seconds = [record["step/seconds"] for record in times]
    curve = curve_of(records, "val/l1")
    shown = np.random.default_rng(0).permutation(len(actions))[:SHOWN]
    save_grid(folder / "grid.json", grid)
    features = features_of(config.init, folder, actions) if drawn else {}
    save_arrays(folder / "data.npz", actions=actions[shown], **features)
    return {
        "trial": trial.name,
        "values": trial.values,
        "seed": trial.seed,
        "config_digest": trial.digest,
        "packed": data_digest(config),
        "data": list(loader.names),
        "train_frames": loader.num_frames(),
        "init": weights_digest(config.init) if config.init else None,
        "weights": fingerprint(folder),
        "steps": trained["step"],
        "params": trained["params"],
        "trainable": trained["trainable"],
        "grid": describe_grid(grid),
        "tokens_used": len(np.unique(np.asarray(encode(grid, actions)))),
        "loss": losses[-1][1],
        "validation": curve,
        "plateau": plateau(curve, trained["step"]),
        "step_seconds_median": float(np.median(seconds[1:] or seconds)),  # the first record includes compilation
        "train_seconds": float(np.dot(seconds, np.diff([0, *(record["step"] for record in times)]))),
        "evaluation_seconds": time.monotonic() - began,
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        "evaluation": evaluation,
        "provenance": provenance(),
    }


def data_digest(config: ConfigDict) -> str | None:
    """Hash of the packed files of a config's data (`packed_digest`), or None if it names datasets."""
    packed = DataConfig.from_config(config.data).packed  # with ~ expanded
    return packed_digest(packed) if packed else None


def weights_digest(checkpoint: str | AnyPath) -> str:
    """Hash of a checkpoint's parameters (16 hex digits)."""
    parts = [(path, digest(array.read())) for path, array in sorted(read_checkpoint(checkpoint).arrays.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def episodes_of(trial: Trial) -> list[Episode]:
    """The episodes of a trial's closed loop. Raises InputError for an unknown suite, one that is of none of several
    datasets, or a missing simulator."""
    data, wanted = trial.config.data, trial.closed_loop
    names = packed_names(DataConfig.from_config(data)) or [entry["name"] for entry in data.datasets]
    suite = wanted["suite"] or (names or [data.mixture])[0]
    libero_env.dataset_of(suite, dict.fromkeys(names or [data.mixture]))
    return libero_env.episodes([suite], wanted["episodes"], wanted["seeds"], wanted["tasks"] or None)


def simulate(trial: Trial, folder: Path, workers: int) -> None:
    """Evaluate a trained trial in closed loop, `workers` simulators at once; resumes. Episodes of other weights, of a
    trial that was trained anew, are removed."""
    episodes, policy, name, out = episodes_of(trial), Policy.load(folder), fingerprint(folder), folder / "closed_loop"
    workers = min(workers, len(episodes))
    remove_if_of_other_weights(out, name)
    keys = list(policy.processor.statistics)
    key = libero_env.dataset_of(episodes[0].suite, keys) if len(keys) > 1 else None
    libero_env.evaluate(
        padded(policy.infer_batch, unnorm_key=key),
        episodes,
        Settings(libero_env.MAX_STEPS, workers=workers),
        out,
        policy=name,
        image_size=policy.model.config.img.image_size,
        depth=policy.model.config.depth_source == "dataset",
        keys=keys,
        unnorm_key=key,
    )


def features_of(init: str, run: Path, actions: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of the spatial embedding over directions, at the data's median r, for a run that started from a checkpoint.
    They are taken before and after training and, if the grid changed, after adaptation. Returns {"before_theta"
    (edges), "before_phi" (edges), "before_features" f32[n, m, D], "after_theta", …, "adapted_theta", …}."""
    median, arrays, tables = np.median(np.linalg.norm(actions[:, :3], axis=1)), {}, {}
    for when, path in {"before": init, "after": run}.items() if init else ():
        checkpoint = read_checkpoint(path)
        grid = checkpoint.processor.grid if checkpoint.processor else None
        if isinstance(grid, ActionGrid):
            tables[when] = grid, np.asarray(checkpoint.arrays["spatial_embedding"].read(), np.float32)
    if len(tables) == 2:
        (old, table), (new, _) = tables.values()
        if grid_to_dict(old) != grid_to_dict(new):
            tables["adapted"] = new, np.asarray(adapt_embeddings(old, new, table))
    for when, (grid, table) in tables.items():
        bins = grid.num_bins[:3]
        place = int(np.searchsorted(np.asarray(grid.r)[1:-1], median, side="right"))
        rows = table[: np.prod(bins)].reshape(*bins, -1)[:, :, place]
        values = {"theta": grid.theta, "phi": grid.phi, "features": rows}
        arrays |= {f"{when}_{key}": np.asarray(value) for key, value in values.items()}
    return arrays


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays as NumPy's .npz, by rename."""
    with replacing(path) as temporary:
        np.savez_compressed(temporary, **arrays)  # pyright: ignore[reportArgumentType]
