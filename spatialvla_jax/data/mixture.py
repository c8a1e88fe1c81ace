"""Which frame is sample k of a mixture: a pure function of (seed, k), so resuming costs nothing and needs no state.

Samples come in blocks of `BLOCK` slots. In every block each dataset has the same number of slots (its share by largest
remainder), in an order drawn anew for every block. Counting a dataset's slots gives its n-th draw, and a seeded
permutation of the dataset's frames, another one each pass, gives the draw's frame: every frame comes exactly once a
pass. Nothing is buffered and nothing depends on how many hosts read.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int, UInt64

from spatialvla_jax.errors import InputError

BLOCK = 2**16
_ROUNDS = 6


@dataclass(frozen=True)
class Mixture:
    """Datasets by number of frames, and how many of every `BLOCK` samples each one gives."""

    sizes: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def shares(self) -> tuple[float, ...]:
        """Effective fraction of the samples that each dataset gives."""
        return tuple(count / BLOCK for count in self.counts)

    @property
    def epoch_length(self) -> int:
        """Samples until every dataset of the mixture has been seen at least once in full."""
        return max(-(-size * BLOCK // count) for size, count in zip(self.sizes, self.counts, strict=True))


def make_mixture(sizes: tuple[int, ...], weights: tuple[float, ...], *, balance: bool = True) -> Mixture:
    """Mixture of datasets with `sizes` frames; `balance` multiplies the weights by the sizes (as Octo and OpenVLA do).

    Raises InputError when there is no dataset or a weight is not a positive finite number.
    """
    if not sizes:
        raise InputError("The mixture is empty: data.datasets must name at least one dataset")
    if not all(np.isfinite(weight) and weight > 0 for weight in weights):
        raise InputError(f"The mixture's weights are {list(weights)}: each must be a positive number")
    scaled = np.asarray(weights, np.float64) * (np.asarray(sizes) if balance else 1)
    quota = scaled / scaled.sum() * (BLOCK - len(sizes))
    counts = np.floor(quota).astype(np.int64)
    left_over = BLOCK - len(sizes) - counts.sum()
    counts[np.argsort(counts - quota, kind="stable")[:left_over]] += 1
    return Mixture(tuple(sizes), tuple(int(count) + 1 for count in counts))  # + 1: no dataset is rounded away


def draw(
    mixture: Mixture, seed: int, samples: Int[np.ndarray, " B"]
) -> tuple[Int[np.ndarray, " B"], Int[np.ndarray, " B"]]:
    """Dataset i64[B] and frame within it i64[B] of the samples with global numbers `samples` i64[B]."""
    blocks, slots = np.divmod(samples, BLOCK)
    dataset, nth = np.empty_like(samples), np.empty_like(samples)
    for block in np.unique(blocks):
        rows = blocks == block
        order, rank = _block(mixture.counts, seed, int(block))
        dataset[rows] = order[slots[rows]]
        nth[rows] = rank[slots[rows]] + block * np.asarray(mixture.counts)[dataset[rows]]
    sizes = np.asarray(mixture.sizes)[dataset]
    epoch, position = np.divmod(nth, sizes)
    return dataset, permute(position, sizes, _key(seed, 1, dataset, epoch))


@functools.lru_cache(maxsize=4)
def _block(counts: tuple[int, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Of one block: the dataset of every slot, and how many slots before it in the block have the same dataset."""
    order = np.repeat(np.arange(len(counts)), counts)[permute(np.arange(BLOCK), BLOCK, _key(seed, 0, block))]
    by_dataset = np.argsort(order, kind="stable")
    rank = np.empty_like(order)
    rank[by_dataset] = np.arange(BLOCK) - np.repeat(np.cumsum((0, *counts[:-1])), counts)
    return order, rank


def permute(
    positions: Int[np.ndarray, " B"], sizes: Int[np.ndarray, " B"] | int, keys: UInt64[np.ndarray, " B"] | np.uint64
) -> Int[np.ndarray, " B"]:
    """Where `positions` < `sizes` go in the random order of range(size) that each key stands for: a bijection for every
    size and key, computed point by point without a table. `sizes` and `keys` broadcast against `positions`.

    A Feistel network over the smallest even number of bits that holds the size, walked until it lands inside (Black and
    Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    sizes, keys = (np.broadcast_to(value, positions.shape) for value in (sizes, keys))
    half = np.maximum(1, (np.frexp(sizes - 1)[1] + 1) // 2).astype(np.uint64)  # frexp's exponent is the bit length

    def shuffle(value: np.ndarray, half: np.ndarray, keys: np.ndarray) -> np.ndarray:
        mask = (np.uint64(1) << half) - np.uint64(1)
        left, right = value >> half, value & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (_mix(_mix(keys + np.uint64(number)) ^ right) & mask)
        return (left << half) | right

    value = shuffle(positions.astype(np.uint64), half, keys)
    while (outside := np.flatnonzero(value >= sizes)).size:
        value[outside] = shuffle(value[outside], half[outside], keys[outside])
    return value.astype(np.int64)


def _key(*parts: Any) -> UInt64[np.ndarray, " B"]:
    """One number out of several, of which some may be arrays."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = _mix((key ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15))
    return key


def _mix(value: np.ndarray) -> np.ndarray:
    """Finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
