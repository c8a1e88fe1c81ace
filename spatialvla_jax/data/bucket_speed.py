"""Measures a bucket's latency and bandwidth with a few reads at the start, and derives how to read it."""

import math
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

from spatialvla_jax.data.ranges import Range
from spatialvla_jax.errors import StorageError
from spatialvla_jax.utils.storage import read_ranges

_SMALL_READS = 5
_PARALLEL = 16  # concurrent requests that should saturate the connection
_LARGEST = 64  # most frames in a block


class Speed(NamedTuple):
    latency: float  # seconds for a one-byte request
    bandwidth: float  # bytes per second over several concurrent requests

    @property
    def in_flight(self) -> float:
        """The bandwidth-delay product: bytes in flight at full bandwidth."""
        return self.latency * self.bandwidth


def measure(files: Sequence[tuple[str, int]]) -> Speed:
    """Measure a bucket by these files, (URL, bytes) each. Reads at most 20 MB. Raises StorageError."""
    some = [files[n * len(files) // _PARALLEL] for n in range(_PARALLEL)]
    _timed([(some[0][0], 0, 1)])  # opens the connection
    latency = statistics.median(_timed([(url, 0, 1)])[0] for url, _ in some[:_SMALL_READS])
    seconds, size = _timed([(url, 0, min(size, 2**18)) for url, size in some])  # opens the other connections
    if seconds < 1:
        seconds, size = _timed([(url, 0, min(size, 2**20)) for url, size in some])
    return Speed(latency, size / max(seconds - latency, 1e-4))


def _timed(ranges: Sequence[Range]) -> tuple[float, int]:
    """Seconds to read all ranges concurrently, and their total bytes. Errors of single files are reported later."""
    start = time.perf_counter()
    parts = read_ranges(ranges)
    seconds = time.perf_counter() - start
    for part in parts:
        if isinstance(part, StorageError):
            raise part
    return seconds, sum(len(part) for part in parts if isinstance(part, bytes))


def choose_block(speed: Speed, frame: float) -> int:
    """How many consecutive frames of `frame` bytes to read at once: the power of two with which `_PARALLEL` requests
    saturate the connection."""
    wanted = speed.in_flight / _PARALLEL / frame
    return min(_LARGEST, 2 ** max(0, round(math.log2(max(wanted, 1)))))


def choose_ahead(speed: Speed, memory: float) -> int:
    """Bytes to read ahead: twice the bandwidth-delay product, at least 4 MiB, at most a sixteenth of the memory."""
    return int(min(max(2 * speed.in_flight, 2**22), memory / 16))
