"""Writing, sampling and comparing action grids."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from spatialvla_jax.actions import (
    ActionGrid,
    ActionTokenizer,
    LinearGrid,
    decode,
    encode,
    grid_to_dict,
)
from spatialvla_jax.actions.grid import RANGES
from spatialvla_jax.utils.atomic import disk_errors, write_json
from spatialvla_jax.utils.tables import text_table

_BLOCK = 2**16  # actions per call of encode and decode
_SAMPLES = 100_000

PARTS = {"translation": slice(0, 3), "rotation": slice(3, 6), "gripper": slice(6, 7)}


def sample_actions(grid: ActionGrid | LinearGrid) -> Float[np.ndarray, "N 7"]:
    """100,000 random actions f32[N, 7] that fall into every bin of each variable equally often, uniformly within it.
    This is the distribution a fitted grid assumes. Clipped to [-1, 1]; the gripper is 0 or 1."""
    rng = np.random.default_rng(0)

    def draw(edges: Any) -> np.ndarray:
        bins = rng.integers(0, len(edges) - 1, _SAMPLES)
        low, high = np.asarray(edges, np.float64)[[bins, bins + 1]]
        return low + (high - low) * rng.random(_SAMPLES)

    if isinstance(grid, LinearGrid):
        return _actions([draw(grid.levels) for _ in range(6)], rng)
    return _actions(_cartesian(*map(draw, grid.edges)), rng)


def sample_gaussians(gaussians: Any) -> Float[np.ndarray, "N 7"]:
    """Like `sample_actions`, from six independent Gaussians [6, 2] (mu, sigma) truncated to the variables' ranges."""
    from scipy.stats import truncnorm  # slow to import, and every run imports this module

    rng = np.random.default_rng(0)
    variables = []
    for (mu, sigma), bounds in zip(gaussians, RANGES, strict=True):
        sigma = max(sigma, 1e-6)
        low, high = (np.asarray(bounds) - mu) / sigma
        variables.append(truncnorm.rvs(low, high, mu, sigma, size=_SAMPLES, random_state=rng))
    return _actions(_cartesian(*variables), rng)


def _cartesian(theta: Any, phi: Any, r: Any, *angles: Any) -> list[np.ndarray]:
    return [r * np.sin(theta) * np.cos(phi), r * np.sin(theta) * np.sin(phi), r * np.cos(theta), *angles]


def _actions(moves: list[np.ndarray], rng: np.random.Generator) -> Float[np.ndarray, "N 7"]:
    return np.stack([*np.clip(moves, -1, 1), rng.integers(0, 2, len(moves[0]))], -1).astype(np.float32)


def quantisation_error(grid: ActionTokenizer, actions: Float[np.ndarray, "N 7"]) -> dict[str, dict[str, float]]:
    """Distance between the actions and their round trip through tokens: {"translation", "rotation", "gripper"} →
    {"mean", "max"}, in normalised units. Euclidean over (x, y, z) and over (roll, pitch, yaw)."""
    distances: dict[str, list[np.ndarray]] = {part: [] for part in PARTS}
    for start in range(0, len(actions), _BLOCK):
        block = actions[start : start + _BLOCK]
        difference = np.asarray(decode(grid, encode(grid, block)), np.float64) - block
        for part, columns in PARTS.items():
            distances[part].append(np.linalg.norm(difference[:, columns], axis=1))
    joined = {part: np.concatenate(blocks) for part, blocks in distances.items()}
    return {part: {"mean": float(d.mean()), "max": float(d.max())} for part, d in joined.items()}


def describe_grid(grid: ActionTokenizer) -> dict[str, Any]:
    """{"kind", "bins" (of every variable), "vocab_size", "tokens_per_action"}."""
    bins = grid.num_bins if isinstance(grid, ActionGrid) else (grid.vocab_size,)
    kind = grid_to_dict(grid)["kind"]
    return {"kind": kind, "bins": bins, "vocab_size": grid.vocab_size, "tokens_per_action": grid.tokens_per_action}


def compare_grids(grids: Mapping[str, ActionTokenizer], actions: Float[np.ndarray, "N 7"]) -> list[dict[str, Any]]:
    """One row per grid: its name, `describe_grid` and `quantisation_error` on the same actions."""
    return [
        {"grid": name} | describe_grid(grid) | {"error": quantisation_error(grid, actions)}
        for name, grid in grids.items()
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `compare_grids` as a text table."""
    header = ["grid", "kind", "bins", "tokens", "per action", *(f"{part} mean / max" for part in PARTS)]
    return text_table(
        [header]
        + [
            [
                row["grid"],
                row["kind"],
                "×".join(map(str, row["bins"])),
                str(row["vocab_size"]),
                str(row["tokens_per_action"]),
                *("{mean:.4f} / {max:.4f}".format(**row["error"][part]) for part in PARTS),
            ]
            for row in rows
        ]
    )


def save_grid(path: str | Path, grid: ActionTokenizer) -> None:
    """Write the grid as JSON, by rename. Raises StorageError if the path cannot be written."""
    with disk_errors(path):
        write_json(path, grid_to_dict(grid))
