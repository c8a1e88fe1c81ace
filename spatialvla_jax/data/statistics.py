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


def portable_source(source: Mapping[str, Any]) -> dict[str, Any]:
    """What of `index.source_of` stays the same wherever the data lies: its split and spec, and of each shard the number
    of episodes that belong to the split, and the bytes."""
    shards = [[stop - first, size] for _, size, _, first, stop, _ in source["shards"]]
    return {"split": source["split"], "spec": source["spec"], "shards": shards}


def check_spec(path: str, name: str, made_from: Mapping[str, Any], spec: Mapping[str, Any]) -> None:
    """Raises InputError where the statistics of a dataset in a file were `made_from` other actions than those that the
    `meaning` of its spec gives."""
    before = made_from["spec"]["fields"]
    for key in ("action", "operations"):
        if before.get(key) != (now := spec["fields"][key]):
            raise InputError(
                f"the statistics of dataset {name!r} in {path} were made with the {key} {before.get(key)}, and its "
                f"spec has {now} now: make them again with `spatialvla-jax stats`, or leave data.statistics empty"
            )


def source_changes(made_from: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two of `portable_source`, "" if nothing does."""
    if made_from["split"] != now["split"]:
        return f"of the split {made_from['split']!r}, and here it is {now['split']!r}"
    if made_from["shards"] != now["shards"]:
        counts = [
            f"{sum(n for n, _ in own):,} episodes in {sum(size for _, size in own):,} bytes"
            for own in (made_from["shards"], now["shards"])
        ]
        return f"of {counts[0]}, and here are {counts[1]}"
    return "of an earlier spec" if made_from["spec"] != now["spec"] else ""


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
