"""Recorded motions without images: a file of arrays that `record_libero.render_motions` renders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from spatialvla_jax.errors import InputError
from spatialvla_jax.utils.atomic import disk_errors, replacing


@dataclass(frozen=True)
class Motion:
    """One accepted episode without its images, which `render_motion` adds: actions and simulator states."""

    suite: str
    task_id: int
    split: str
    seed: int  # of the scene
    init_state: int
    language: str
    qpos: Float[np.ndarray, "T Q"]  # simulator state before each action
    state: Float[np.ndarray, "T 8"]
    action: Float[np.ndarray, "T 7"]
    policy_steps: int = 0  # of a policy, not recorded, after which the expert took over
    failed: int = 0  # attempts before this one that the benchmark rejected
    solved: int = 0  # attempts before this one that the policy finished itself


TEXTS, ARRAYS = ("suite", "split", "language"), ("qpos", "state", "action")
COUNTS = ("policy_steps", "failed", "solved")  # 0 in files of earlier versions, which lack them
NUMBERS = ("task_id", "seed", "init_state", *COUNTS)


def save_motions(out: Path, motions: Sequence[Motion]) -> None:
    """Write motions as NumPy's .npz, by rename: concatenated arrays, and each episode's lengths and other fields.

    Raises InputError if the file cannot be written."""
    columns: dict[str, Any] = {key: np.array([getattr(m, key) for m in motions]) for key in (*TEXTS, *NUMBERS)}
    columns["length"], columns["width"] = np.array([m.qpos.shape for m in motions]).reshape(-1, 2).T
    columns |= {key: np.concatenate([getattr(m, key).ravel() for m in motions]) for key in ARRAYS}
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as temporary:
            np.savez_compressed(temporary, **columns)


def load_motions(path: Path) -> list[Motion]:
    """Read the motions of a file. Raises InputError if `save_motions` did not write it."""
    try:
        with np.load(path, allow_pickle=False) as file:
            columns = {
                key: file[key]
                for key in (*TEXTS, *ARRAYS, *NUMBERS, "length", "width")
                if key in file or key not in COUNTS
            }
        return _motions(columns)
    except Exception as error:  # NumPy and zipfile raise many kinds for damaged files
        raise InputError(f"{path} is not a file of motions written by `record libero --out FILE.npz`") from error


def _motions(columns: dict[str, Any]) -> list[Motion]:
    columns |= {key: np.zeros(len(columns["length"]), int) for key in COUNTS if key not in columns}
    motions, place = [], dict.fromkeys(ARRAYS, 0)
    for i, (length, width) in enumerate(zip(columns["length"].tolist(), columns["width"].tolist(), strict=True)):
        fields: dict[str, Any] = {key: str(columns[key][i]) for key in TEXTS}
        fields |= {key: int(columns[key][i]) for key in NUMBERS}
        for key, size in zip(ARRAYS, (width, 8, 7), strict=True):
            fields[key] = columns[key][place[key] : place[key] + length * size].reshape(length, size)
            place[key] += length * size
        motions.append(Motion(**fields))
    return motions
