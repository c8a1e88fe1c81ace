"""Action chunks, cut from an episode's actions."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from spatialvla_jax.actions.normalization import normalize


def chunk_actions(
    actions: np.ndarray, first: np.ndarray, ends: np.ndarray, chunk: int, statistics: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """The `chunk` normalised actions starting at each of the rows `first` i64[B], and a mask → f32[B,T,A], bool[B,T].
    The mask is False from the episode's end on, the row `ends` i64[B]. Actions past the end are neutral: no motion (0
    after normalisation), and the gripper (last dimension) keeps its last value."""
    positions = first[:, None] + np.arange(chunk)
    mask = positions < ends[:, None]
    chunks = normalize(actions[np.minimum(positions, ends[:, None] - 1)], statistics)
    chunks[..., :-1] *= mask[..., None]
    return chunks, mask
