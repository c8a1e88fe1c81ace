"""How a bucket is read best: its latency and bandwidth by a few reads at the start, and what follows from them."""

import math
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

from spatialvla_jax.data.ranges import Range
from spatialvla_jax.errors import StorageError
from spatialvla_jax.utils.storage import read_ranges

_SMALL_READS = 5
_PARALLEL = 16  # requests that shall keep the line full together
_LARGEST = 64  # frames of a block that is chosen


class Speed(NamedTuple):
    latency: float  # seconds of a request for one byte
    bandwidth: float  # bytes a second of several requests together

    @property
    def in_flight(self) -> float:
        """Bytes that are on the way, at the full bandwidth, until the first of them arrives."""
        return self.latency * self.bandwidth


def measure(files: Sequence[tuple[str, int]]) -> Speed:
    """The speed of the bucket that has these files, (URL, bytes) each. Reads at most 20 MB. Raises StorageError."""
    some = [files[n * len(files) // _PARALLEL] for n in range(_PARALLEL)]
    _timed([(some[0][0], 0, 1)])  # this one also makes the connection
    latency = statistics.median(_timed([(url, 0, 1)])[0] for url, _ in some[:_SMALL_READS])
    seconds, size = _timed([(url, 0, min(size, 2**18)) for url, size in some])  # this also makes the connections
    if seconds < 1:
        seconds, size = _timed([(url, 0, min(size, 2**20)) for url, size in some])
    return Speed(latency, size / max(seconds - latency, 1e-4))


def _timed(ranges: Sequence[Range]) -> tuple[float, int]:
    """How long it takes to read all at once, and how many bytes there were; those that are missing say so later."""
    start = time.perf_counter()
    parts = read_ranges(ranges)
    seconds = time.perf_counter() - start
    for part in parts:
        if isinstance(part, StorageError):
            raise part
    return seconds, sum(len(part) for part in parts if isinstance(part, bytes))


def choose_block(speed: Speed, frame: float) -> int:
    """How many consecutive frames of `frame` bytes to read at once: a power of two, so many that `_PARALLEL` requests
    fill the line."""
    wanted = speed.in_flight / _PARALLEL / frame
    return min(_LARGEST, 2 ** max(0, round(math.log2(max(wanted, 1)))))


def choose_ahead(speed: Speed, memory: float) -> int:
    """Bytes to have under way: twice what hides the latency, within a sixteenth of the memory."""
    return int(min(max(2 * speed.in_flight, 2**22), memory / 16))
