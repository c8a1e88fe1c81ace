"""Maps sample number k to a frame of the mixture: a pure function of (seed, k), so resuming needs no state.

Samples come in blocks of `BLOCK` slots. Every block has the same number of slots per dataset (its share by largest
remainder), in an order drawn anew for each block. Counting a dataset's slots numbers its draws. A seeded permutation of
the dataset's frames, different in each pass, maps draws to frames, so each frame comes exactly once per pass. Nothing
is buffered, and nothing depends on the number of hosts.

Permuting single frames reads a local disk at random, which suits SSDs. Spinning disks and remote storage need larger
reads: there blocks of consecutive frames are permuted, and frames are permuted within windows of some blocks
(`permute_blocks`). This has three costs. The window's compressed frames are kept in memory. Frames farther apart than a
window in the order of blocks never mix within a pass. Every host reads each block in which it has a frame. Blocks thus
pay off with one or a few hosts; with many hosts single frames are better.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int, UInt64

from spatialvla_jax.errors import InputError

BLOCK = 2**16
_ROUNDS = 6
_STRIDE = 40503  # odd, far from any simple fraction of a block


@dataclass(frozen=True)
class Mixture:
    """Datasets by number of frames, and how many of every `BLOCK` samples each contributes."""

    sizes: tuple[int, ...]
    counts: tuple[int, ...]  # 0: the dataset is dropped
    block: int = 1  # consecutive frames read at once
    windows: tuple[int, ...] = ()  # number of blocks of each dataset that are shuffled together, if block > 1

    @property
    def shares(self) -> tuple[float, ...]:
        """The fraction of samples from each dataset."""
        return tuple(count / BLOCK for count in self.counts)

    @property
    def epoch_length(self) -> int:
        """Number of samples until every dataset in the mixture has been seen in full at least once."""
        return max(-(-size * BLOCK // count) for size, count in zip(self.sizes, self.counts, strict=True) if count)

    @property
    def window_frames(self) -> tuple[int, ...]:
        """Number of frames of each dataset that are shuffled together, if block > 1."""
        return tuple(min(size, window * self.block) for size, window in zip(self.sizes, self.windows, strict=True))

    def without(self, weights: tuple[float, ...], left_out: frozenset[int], *, balance: bool = True) -> "Mixture":
        """The same mixture with the datasets at these indices dropped."""
        kept = [number for number in range(len(self.sizes)) if number not in left_out]
        sizes, weights = tuple(self.sizes[n] for n in kept), tuple(weights[n] for n in kept)
        counts = dict(zip(kept, make_mixture(sizes, weights, balance=balance).counts, strict=True))
        return replace(self, counts=tuple(counts.get(number, 0) for number in range(len(self.sizes))))


def make_mixture(
    sizes: tuple[int, ...], weights: tuple[float, ...], *, balance: bool = True, block: int = 1, shuffle: int = 100_000
) -> Mixture:
    """Mixture of datasets with `sizes` frames; `balance` multiplies the weights by the sizes (as in Octo and OpenVLA).

    If frames are read in blocks of more than one, about `shuffle` of them are shuffled together, divided among the
    datasets by their shares.

    Raises InputError if there is no dataset or a weight is not a positive finite number.
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
    counts = tuple(int(count) + 1 for count in counts)  # + 1, so that no dataset is rounded to 0
    windows = tuple(max(1, round(shuffle * count / BLOCK / block)) for count in counts) if block > 1 else ()
    return Mixture(tuple(sizes), counts, block, windows)


def sample_frames(
    mixture: Mixture, seed: int, samples: Int[np.ndarray, " B"], drawn: Int[np.ndarray, " D"] | int = 0
) -> tuple[Int[np.ndarray, " B"], Int[np.ndarray, " B"]]:
    """Dataset i64[B] and frame within it i64[B] of the samples with global numbers `samples` i64[B].

    `drawn`: how many frames earlier mixtures of the same datasets have drawn from each, so that passes continue.
    """
    blocks, slots = np.divmod(samples, BLOCK)
    dataset, frame = np.empty_like(samples), np.empty_like(samples)
    before = tuple(np.broadcast_to(drawn, len(mixture.sizes)).tolist())
    for block in np.unique(blocks).tolist():
        rows = blocks == block
        dataset[rows], frame[rows] = (of_block[slots[rows]] for of_block in _draw_block(mixture, seed, block, before))
    return dataset, frame


@functools.lru_cache(maxsize=4)
def _draw_block(mixture: Mixture, seed: int, block: int, drawn: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Dataset and frame of all samples of a block, which take half the time of one batch after another."""
    dataset, nth = _block(mixture.counts, seed, block)
    nth = nth + (block * np.asarray(mixture.counts) + drawn)[dataset]
    sizes = np.asarray(mixture.sizes)[dataset]
    epoch, position = np.divmod(nth, sizes)
    key = _key(seed, 1, dataset, epoch)
    if mixture.block == 1:
        return dataset, permute(position, sizes, key)
    return dataset, permute_blocks(position, sizes, key, mixture.block, np.asarray(mixture.windows)[dataset])


def count_draws(mixture: Mixture, seed: int, samples: int) -> Int[np.ndarray, " D"]:
    """The number of the first `samples` samples that come from each dataset, i64[D]."""
    blocks, slots = divmod(samples, BLOCK)
    order, _ = _block(mixture.counts, seed, blocks)
    return blocks * np.asarray(mixture.counts) + np.bincount(order[:slots], minlength=len(mixture.counts))


def replacement_samples(samples: Int[np.ndarray, " B"], attempt: int) -> Int[np.ndarray, " B"]:
    """Substitutes for `samples` whose frames cannot be read, for the `attempt`-th time. They come from the same block,
    so that no other block has to be computed."""
    blocks, slots = np.divmod(samples, BLOCK)
    return blocks * BLOCK + (slots + attempt * _STRIDE) % BLOCK


@functools.lru_cache(maxsize=4)
def _block(counts: tuple[int, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """For one block: each slot's dataset, and how many earlier slots of the block have the same dataset."""
    order = np.repeat(np.arange(len(counts)), counts)[permute(np.arange(BLOCK), BLOCK, _key(seed, 0, block))]
    by_dataset = np.argsort(order, kind="stable")
    rank = np.empty_like(order)
    rank[by_dataset] = np.arange(BLOCK) - np.repeat(np.cumsum((0, *counts[:-1])), counts)
    return order, rank


def permute(
    positions: Int[np.ndarray, " B"], sizes: Int[np.ndarray, " B"] | int, keys: UInt64[np.ndarray, "#B"] | np.uint64
) -> Int[np.ndarray, " B"]:
    """The images of `positions` < `sizes` under the random permutation of range(size) that each key defines. It is a
    bijection for every size and key, computed pointwise without a table. `sizes` and `keys` broadcast.

    A Feistel network on the smallest even number of bits that covers the size. It is iterated until the result is in
    range (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    sizes, keys = (np.broadcast_to(value, positions.shape) for value in (sizes, keys))
    half = np.maximum(1, (np.frexp(sizes - 1)[1] + 1) // 2).astype(np.uint64)  # frexp's exponent is the bit length
    mask = (np.uint64(1) << half) - np.uint64(1)
    rounds = _mix(keys + np.arange(_ROUNDS, dtype=np.uint64).reshape(-1, *[1] * keys.ndim))

    def shuffle(value: np.ndarray, half: np.ndarray, mask: np.ndarray, rounds: np.ndarray) -> np.ndarray:
        left, right = value >> half, value & mask
        for key in rounds:
            left, right = right, left ^ (_mix(key ^ right) & mask)
        return (left << half) | right

    value = shuffle(positions.astype(np.uint64), half, mask, rounds)
    while (outside := np.flatnonzero(value >= sizes)).size:
        value[outside] = shuffle(value[outside], half[outside], mask[outside], rounds[:, outside])
    return value.astype(np.int64)


def permute_blocks(
    positions: Int[np.ndarray, " B"],
    sizes: Int[np.ndarray, " B"] | int,
    keys: UInt64[np.ndarray, "#B"] | np.uint64,
    block: int,
    windows: Int[np.ndarray, " B"] | int,
) -> Int[np.ndarray, " B"]:
    """Like `permute`, but keeps neighbours close: blocks of `block` consecutive positions are permuted, then frames
    within each window of `windows` successive blocks."""
    sizes, keys, windows = (np.broadcast_to(value, positions.shape) for value in (sizes, keys, windows))
    blocks = -(-sizes // block)

    def shuffle(value: np.ndarray, blocks: np.ndarray, keys: np.ndarray, windows: np.ndarray) -> np.ndarray:
        window, place = np.divmod(value, windows * block)
        first = window * windows
        place = permute(place, np.minimum(windows, blocks - first) * block, _key(keys, 1, window))
        return permute(first + place // block, blocks, _key(keys, 0)) * block + place % block

    value = shuffle(positions, blocks, keys, windows)
    while (outside := np.flatnonzero(value >= sizes)).size:  # the last block may not be full
        value[outside] = shuffle(value[outside], blocks[outside], keys[outside], windows[outside])
    return value


def _key(*parts: Any) -> UInt64[np.ndarray, " _"]:
    """Combine several numbers, some of which may be arrays, into one key."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = _mix((key ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15))
    return key


def _mix(value: np.ndarray) -> np.ndarray:
    """Finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit affects every output bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def process_rows(batch_size: int, process_index: int, process_count: int) -> np.ndarray:
    """The rows of a global batch that belong to a process. Raises InputError if it does not divide."""
    if batch_size % process_count:
        raise InputError(f"The batch size {batch_size} does not divide among {process_count} processes")
    return np.arange(batch_size).reshape(process_count, -1)[process_index]
