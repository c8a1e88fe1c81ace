"""Summaries of float32 numbers that merge in any order to the same bits; pure numpy.

What `merge` returns is a function of the multiset of numbers alone, so a distributed run gives one result however its
runner splits the data into bundles and in whatever order those arrive.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int32, Int64

from spatialvla_jax.data.statistics import is_mostly_constant, make_statistics

LIMIT = 2**20  # distinct keys that a quantile sketch holds: at most 12 MB
_UNIT = 172  # every float32 is a whole multiple of 2^-172 when its 24 digits are written in full


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of squares of D columns: exact, as integers in units of 2^-172 and 2^-344."""

    count: int
    sums: tuple[int, ...]
    squares: tuple[int, ...]

    @classmethod
    def of(cls, values: Float[np.ndarray, "N D"]) -> "Moments":
        """Of at most 2^29 finite float32 rows."""
        sums, squares = zip(*(_exact_sums(column) for column in values.T), strict=True)
        return cls(len(values), sums, squares)

    @classmethod
    def merge(cls, parts: Sequence["Moments"]) -> "Moments":
        return cls(
            sum(part.count for part in parts),
            tuple(map(sum, zip(*(part.sums for part in parts), strict=True))),
            tuple(map(sum, zip(*(part.squares for part in parts), strict=True))),
        )

    def mean_std(self) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, " D"]]:
        """Mean and standard deviation (of the population), f64: the exact mean and variance, rounded once."""
        n = self.count
        mean = [s / (n << _UNIT) for s in self.sums]  # Python divides integers of any size correctly rounded
        variance = [(n * q - s * s) / (n * n << 2 * _UNIT) for s, q in zip(self.sums, self.squares, strict=True)]
        return np.asarray(mean), np.sqrt(variance)


def _exact_sums(column: Float[np.ndarray, " N"]) -> tuple[int, int]:
    """Sum and sum of squares: the 24-bit digits are added up apart for each exponent, where float64 is exact."""
    fraction, exponent = np.frexp(column.astype(np.float32))
    digits, place = np.ldexp(fraction.astype(np.float64), 24), exponent + (_UNIT - 24)
    high, low = np.divmod(digits**2, 2.0**24)
    total = square = 0
    for k, (d, h, lo) in enumerate(zip(*(np.bincount(place, x) for x in (digits, high, low)), strict=True)):
        total += int(d) << k
        square += ((int(h) << 24) + int(lo)) << 2 * k
    return total, square


@dataclass(frozen=True)
class Quantiles:
    """How often each number occurs: float32 as integers of the same order, less their `shift` lowest bits.

    Exact (shift 0) up to `LIMIT` distinct numbers. Beyond, shift is the smallest that leaves no more than `LIMIT` keys;
    a key then stands for 2^shift neighbouring floats, of one sign and exponent, by the middle one. The 2^32 floats
    there are never need more than shift 12.
    """

    shift: int
    keys: Int32[np.ndarray, " K"]  # increasing
    counts: Int64[np.ndarray, " K"]

    @classmethod
    def of(cls, values: Float[np.ndarray, " N"], limit: int = LIMIT) -> "Quantiles":
        """Of finite float32 numbers; -0 counts as 0. `limit` is at least 512, the float32 exponents of both signs."""
        bits = (values.astype(np.float32) + np.float32(0)).view(np.int32)
        return cls.merge([cls(0, _ordered(bits), np.ones(len(bits), np.int64))], limit)

    @classmethod
    def merge(cls, parts: Sequence["Quantiles"], limit: int = LIMIT) -> "Quantiles":
        # A part never needs more shift than the whole, so the whole's is the same however it was put together.
        shift = max(part.shift for part in parts)
        keys = np.concatenate([part.keys >> (shift - part.shift) for part in parts])
        order = np.argsort(keys, kind="stable")  # linear for runs that are sorted already
        keys, counts = _join(keys[order], np.concatenate([part.counts for part in parts])[order])
        while len(keys) > limit:
            shift += 1
            keys, counts = _join(keys >> 1, counts)
        return cls(shift, keys, counts)

    @property
    def relative_error(self) -> float:
        """Bound on |x' - x| / |x| of every order statistic x; 0 is exact. For numbers below 2^-126, where floats are
        evenly spaced, the bound is this times 2^-126."""
        return 2.0 ** (self.shift - 24) if self.shift else 0.0

    @property
    def values(self) -> Float[np.ndarray, " K"]:
        """The numbers that the keys stand for."""
        return _ordered((self.keys << self.shift) + (1 << self.shift >> 1)).view(np.float32)

    def quantiles(self, q: Sequence[float] | np.ndarray) -> Float[np.ndarray, " Q"]:
        """As np.quantile(values, q), f64: interpolated between the two nearest order statistics. The same bits while
        exact; otherwise each of the two is off by at most `relative_error` of itself."""
        ends = np.cumsum(self.counts)
        rank = (int(ends[-1]) - 1) * np.asarray(q, np.float64)
        nearest = np.minimum(np.floor(rank)[:, None] + (0, 1), ends[-1] - 1)
        values = self.values[np.searchsorted(ends, nearest, side="right")]
        return np.asarray([np.quantile(pair, [part])[0] for pair, part in zip(values, rank % 1, strict=True)])


def _ordered(bits: Int32[np.ndarray, "*N"]) -> Int32[np.ndarray, "*N"]:
    """float32 bit patterns to integers in the order of the floats, and back."""
    return bits ^ (bits >> 31 & 0x7FFFFFFF)


def _join(keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts of equal neighbours added up."""
    starts = np.flatnonzero(np.append(np.ones(len(keys[:1]), bool), keys[1:] != keys[:-1]))
    return keys[starts], np.add.reduceat(counts, starts)


@dataclass(frozen=True)
class ActionSummary:
    """What the statistics of one dataset's canonical actions are made from."""

    episodes: int
    moments: Moments
    quantiles: tuple[Quantiles, ...]  # of each dimension
    low: Float[np.ndarray, " A"]
    high: Float[np.ndarray, " A"]

    @classmethod
    def of(cls, actions: Float[np.ndarray, "N A"], episodes: int) -> "ActionSummary":
        low, high = actions.min(0, initial=np.inf), actions.max(0, initial=-np.inf)
        return cls(episodes, Moments.of(actions), tuple(map(Quantiles.of, actions.T)), low, high)

    @classmethod
    def merge(cls, parts: Sequence["ActionSummary"]) -> "ActionSummary":
        return cls(
            sum(part.episodes for part in parts),
            Moments.merge([part.moments for part in parts]),
            tuple(Quantiles.merge(column) for column in zip(*(part.quantiles for part in parts), strict=True)),
            np.min([part.low for part in parts], 0),
            np.max([part.high for part in parts], 0),
        )

    @property
    def quantile_error(self) -> float:
        """The largest `relative_error` of the dimensions."""
        return max(column.relative_error for column in self.quantiles)

    def statistics(self) -> dict[str, Any]:
        """As `action_statistics` gives them; there must be actions."""
        mean, std = self.moments.mean_std()
        rows = {"mean": mean, "std": std, "max": self.high, "min": self.low}
        q01, median, q99 = np.transpose([column.quantiles((0.01, 0.5, 0.99)) for column in self.quantiles])
        columns = zip(self.quantiles, median, strict=True)
        constant = [is_mostly_constant(column.values, column.counts, middle) for column, middle in columns]
        return make_statistics(rows, np.stack([q01, q99]), constant, self.moments.count, self.episodes)
