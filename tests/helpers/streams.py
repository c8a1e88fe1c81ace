"""Checks for every stream of batches: it resumes exactly, and several processes share its batches."""

import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from helpers.batches import assert_equal, concatenate
from spatialvla_jax.batch import Batch


def assert_passes(frames: np.ndarray, size: int) -> None:
    """`frames` i64[…], in order, contain each frame of a dataset of `size` once per pass."""
    whole = frames[: len(frames) // size * size].reshape(-1, size)
    np.testing.assert_array_equal(np.sort(whole, axis=1), np.tile(np.arange(size), (len(whole), 1)))


def take(batches: Iterable[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))


def assert_resumes(stream: Callable[..., Iterator[Batch]], whole: list[Batch], starts: Iterable[int]) -> None:
    """`stream(start_step=…)` gives the rest of `whole`, the first batches of `stream()`."""
    for start in starts:
        for one, two in zip(whole[start:], take(stream(start_step=start), len(whole) - start), strict=True):
            assert_equal(one, two)


def assert_shared(stream: Callable[..., Iterator[Batch]], whole: list[Batch], counts: Iterable[int]) -> None:
    """The rows of all processes, concatenated, are the batches of a single process."""
    for count in counts:
        parts = [take(stream(process_index=i, process_count=count), len(whole)) for i in range(count)]
        for one, *rows in zip(whole, *parts, strict=True):
            assert_equal(one, concatenate(rows))
