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


def renamed(tree: Mapping[Any, Any], table: Mapping[str, str], prefix: str = "") -> dict[Any, Any]:
    """`tree` with old keys renamed; `table` maps dotted old keys to new ones with the same parent.

    If both exist, the old key's value wins: the new key only holds the default that the old config file started from.
    """
    values = {k: renamed(v, table, f"{prefix}{k}.") if isinstance(v, Mapping) else v for k, v in tree.items()}
    old = {k: table[f"{prefix}{k}"].rpartition(".")[2] for k in values if f"{prefix}{k}" in table}
    return {k: v for k, v in values.items() if k not in old} | {new: values[k] for k, new in old.items()}
