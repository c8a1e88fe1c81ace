"""Action statistics, in the layout of the published release's dataset_statistics.json."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from spatialvla_jax.actions.normalization import normalized_dimensions
from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.atomic import write_json


def action_statistics(actions: Float[np.ndarray, "N A"], num_trajectories: int) -> dict[str, Any]:
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
        "mask": np.asarray(normalized_dimensions(actions.shape[1])),
    }
    return {
        "action": {name: row.tolist() for name, row in rows.items()},
        "num_transitions": len(actions),
        "num_trajectories": num_trajectories,
    }


def check_spec(path: str, name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises InputError where the statistics of a dataset in the file `path` are of other actions than those of its
    spec: the `meaning` of the spec `before` was another one."""
    for key in ("action", "operations"):
        if (old := before["fields"].get(key)) != (new := now["fields"][key]):
            raise InputError(
                f"the statistics of dataset {name!r} in {path} were made with the {key} {old}, and its spec has {new}: "
                "make them again with `spatialvla-jax stats`, or leave data.statistics empty"
            )


def difference(statistics: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """How the statistics of a dataset differ from its data's `own`, "" if not."""
    for key in ("num_trajectories", "num_transitions"):
        if (count := statistics.get(key)) != own[key]:
            return f"{key} is {count}, and here it is {own[key]}"
    for row in ("min", "max", "mean", "std"):  # q01 and q99 of large datasets are approximate
        value, own_value = statistics["action"].get(row, []), own["action"][row]
        if len(value) != len(own_value) or not np.allclose(value, own_value, 1e-6, 1e-9):
            return f"{row} is {value}, and here it is {own_value}"
    return ""


def save_statistics(path: str | os.PathLike[str], statistics: Mapping[str, Any]) -> None:
    """Writes {dataset name: statistics} as JSON, by rename."""
    write_json(path, statistics)


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
