"""Action statistics and normalisation, in the layout of the published release's dataset_statistics.json."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from spatialvla_jax.errors import InputError

# Translation and rotation are normalised; the gripper (0 closed .. 1 open) is left as it is.
MASK = (True,) * 6 + (False,)


def action_statistics(actions: Float[np.ndarray, "N 7"], num_trajectories: int) -> dict[str, Any]:
    """Statistics of one dataset's canonical actions:
    {"action": {"mean", "std", "max", "min", "q01", "q99", "mask"}, "num_transitions", "num_trajectories"}."""
    q01, q99 = np.quantile(actions, (0.01, 0.99), axis=0)
    rows = {
        "mean": actions.mean(axis=0, dtype=np.float64),
        "std": actions.std(axis=0, dtype=np.float64),
        "max": actions.max(axis=0),
        "min": actions.min(axis=0),
        "q01": q01,
        "q99": q99,
        "mask": np.asarray(MASK),
    }
    return {
        "action": {name: row.tolist() for name, row in rows.items()},
        "num_transitions": len(actions),
        "num_trajectories": num_trajectories,
    }


def normalize(actions: Float[np.ndarray, "*B 7"], statistics: Mapping[str, Any]) -> Float[np.ndarray, "*B 7"]:
    """Canonical actions -> [-1, 1]: q01 and q99 go to -1 and 1, clipped; constant dimensions become 0; dimensions
    outside the mask stay. `statistics` is the "action" part of one dataset; its rows may also be arrays [*B, 7]."""
    low, high, mask, constant = _bounds(statistics)
    scaled = np.clip(2 * (actions - low) / (high - low + 1e-8) - 1, -1, 1)
    return np.where(mask, np.where(constant, 0.0, scaled), actions).astype(np.float32)


def unnormalize(actions: Float[np.ndarray, "*B 7"], statistics: Mapping[str, Any]) -> Float[np.ndarray, "*B 7"]:
    """Inverse of `normalize`, up to its clipping: actions in robot units."""
    low, high, mask, _ = _bounds(statistics)
    return np.where(mask, (actions + 1) / 2 * (high - low) + low, actions).astype(np.float32)


def action_bounds(statistics: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, Bool[np.ndarray, "*B 7"]]:
    """What `unnormalize` needs: (value of -1, value of 1, which dimensions have them)."""
    low, high, mask, _ = _bounds(statistics)
    return low, high, mask


def _bounds(statistics: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, Bool[np.ndarray, "*B 7"], np.ndarray]:
    low, high, smallest, largest = (np.asarray(statistics[name], np.float64) for name in ("q01", "q99", "min", "max"))
    return low, high, np.asarray(statistics.get("mask", MASK), bool), smallest == largest


def save_statistics(path: str | os.PathLike[str], statistics: Mapping[str, Any]) -> None:
    """Writes {dataset name: statistics} as JSON, by rename."""
    temporary = Path(f"{os.fspath(path)}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(statistics, indent=2) + "\n")
    os.replace(temporary, path)


def load_statistics(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads {dataset name: statistics}; InputError names the file when it is missing or not of that layout."""
    try:
        statistics = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{os.fspath(path)} is not a readable JSON file of dataset statistics: {error}") from error
    for name, entry in statistics.items() if isinstance(statistics, dict) else [("", None)]:
        if not isinstance(entry, dict) or not {"q01", "q99", "min", "max"} <= set(entry.get("action", ())):
            raise InputError(f"{os.fspath(path)} holds no action statistics (q01, q99, min, max) for {name!r}")
    return statistics
