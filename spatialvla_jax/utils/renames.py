"""Old names of config keys and model fields, so that old configs, runs and exports keep loading."""

from collections.abc import Mapping
from typing import Any

CONFIG_KEYS = {
    "model.depth": "model.depth_source",
    "optimizer.clip": "optimizer.grad_clip_norm",
    "optimizer.state_dtype": "optimizer.mu_dtype",
    "train.accumulate": "train.grad_accum_steps",
}
MODEL_FIELDS = {"depth": "depth_source"}


def renamed(tree: Mapping[str, Any], table: Mapping[str, str], prefix: str = "") -> dict[str, Any]:
    """`tree` with its old keys under their new names; `table` maps dotted old keys to new ones of the same parent."""
    return {
        table.get(f"{prefix}{key}", f"{prefix}{key}").rpartition(".")[2]: renamed(value, table, f"{prefix}{key}.")
        if isinstance(value, Mapping)
        else value
        for key, value in tree.items()
    }
