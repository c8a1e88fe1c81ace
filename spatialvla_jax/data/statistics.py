"""Action statistics in the layout of the release's dataset_statistics.json."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from spatialvla_jax.actions.normalization import dimension_name, mean_and_std, normalized_dimensions
from spatialvla_jax.data.oxe.spec import DatasetSpec
from spatialvla_jax.errors import InputError

# A dimension with one value in at least this share of the frames, but not in all, is scaled by its minimum and maximum.
# Both quantiles might equal that value, and then all other values would become -1 or 1.
_MOSTLY_CONSTANT = 0.98
_SAME = 1e-6  # values count as equal if they differ by less than this fraction of the dimension's range


def action_statistics(actions: Float[np.ndarray, "N A"], num_trajectories: int) -> dict[str, Any]:
    """Statistics of one dataset's canonical actions:
    {"action": {"mean", "std", "max", "min", "q01", "q99", "mask"}, "num_transitions", "num_trajectories"}.

    "full_range" names dimensions, if any, that are scaled by their whole range; their q01 and q99 are its ends."""
    mean, std = mean_and_std(actions)
    rows = {
        "mean": mean,
        "std": std,
        "max": actions.max(axis=0),
        "min": actions.min(axis=0),
    }
    mask = np.asarray(normalized_dimensions(width := actions.shape[1]))
    full = mask & np.asarray([_is_mostly_constant(column) for column in actions.T])
    quantiles = np.stack([np.quantile(column, (0.01, 0.99)) for column in actions.T], axis=1)
    q01, q99 = np.where(full, np.stack([rows["min"], rows["max"]]), quantiles)
    entry: dict[str, Any] = {
        "action": {name: row.tolist() for name, row in {**rows, "q01": q01, "q99": q99, "mask": mask}.items()},
        "num_transitions": len(actions),
        "num_trajectories": num_trajectories,
    }
    names = [dimension_name(number, width) for number in np.flatnonzero(full).tolist()]
    return entry | ({"full_range": names} if names else {})


def _is_mostly_constant(values: Float[np.ndarray, " N"]) -> bool:
    """Whether a dimension has one value in nearly all, but not all, frames."""
    spread = float(values.max()) - float(values.min())
    same = np.abs(values - np.float64(np.median(values))) <= _SAME * spread
    return spread > 0 and int(same.sum()) >= _MOSTLY_CONSTANT * len(values)


def find_oddities(name: str, statistics: Mapping[str, Any], spec: DatasetSpec) -> list[str]:
    """One sentence for each property of a dataset's statistics that may be a mistake."""
    found = []
    if names := statistics.get("full_range"):
        found.append(
            f"dataset {name!r} has the same {' and '.join(names)} in nearly all actions: it is scaled by minimum "
            "and maximum, not by the quantiles of 1 and 99 %"
        )
    low, high = (statistics["action"][row][-1] for row in ("min", "max"))
    if isinstance(spec.action[-1], str) and not low < 0.5 <= high:
        found.append(
            f"dataset {name!r} has a gripper that never crosses 0.5 (closed below, open from there on): it goes from "
            f"{low:g} to {high:g}"
        )
    return found


def check_spec(path: str, name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises InputError if a dataset's statistics in the file `path` were computed from other actions. `before` is the
    `meaning` of the spec that they were computed with, `now` that of the dataset's current spec."""
    for key in ("action", "operations"):
        if (old := before["fields"].get(key)) != (new := now["fields"][key]):
            raise InputError(
                f"the statistics of dataset {name!r} in {path} were made with the {key} {old}, and its spec has {new}: "
                "make them again with `spatialvla-jax stats`, or leave data.statistics empty"
            )


def difference(statistics: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """How a dataset's `statistics` differ from those of its data, `own`; "" if they don't."""
    for key in ("num_trajectories", "num_transitions"):
        if (count := statistics.get(key)) != own[key]:
            return f"{key} is {count}, and here it is {own[key]}"
    for row in ("min", "max", "mean", "std"):
        value, own_value = statistics["action"].get(row, []), own["action"][row]
        if len(value) != len(own_value) or not np.allclose(value, own_value, 1e-6, 1e-9):
            return f"{row} is {value}, and here it is {own_value}"
    return ""


def exceeding(statistics: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The dimensions in which `other` actions reach beyond the range of q01 to q99 by more than half of it; "" if they
    don't."""
    low, high, mask, low_other, high_other = (
        np.asarray(values["action"][row])
        for values, row in [(statistics, row) for row in ("q01", "q99", "mask")] + [(other, "q01"), (other, "q99")]
    )
    margin = (high - low) / 2
    beyond = mask & ((low_other < low - margin) | (high_other > high + margin))
    return " and ".join(dimension_name(number, len(mask)) for number in np.flatnonzero(beyond).tolist())
