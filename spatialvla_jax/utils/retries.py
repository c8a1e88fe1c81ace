"""How often a bucket is asked again, in one place for all libraries that ask; and how often that was."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from spatialvla_jax.errors import StorageError
from spatialvla_jax.utils.progress import warn

T = TypeVar("T")

PATIENCE = 120.0  # seconds for which a request is tried again before the storage counts as out of order
FIRST_WAIT, LONGEST_WAIT = 0.1, 10.0  # seconds between two tries
_jitter = random.Random()  # of its own: the process's random numbers stay as they are
_counts: Counter[str] = Counter()


def counts() -> dict[str, int]:
    """What this process has asked of buckets: "requests", "retries" (those among them that had to be asked again) and
    "bytes" (read)."""
    return {key: _counts[key] for key in ("requests", "retries", "bytes")}


async def retrying(
    call: Callable[..., Awaitable[T]], transient: Callable[[Exception], str], what: str, *args: Any, **kwargs: Any
) -> T:
    """`await call(*args, **kwargs)`, again after throttling, a server's error, a reset or a time-out, with growing
    waits. `transient` says what an error is in a few words, "" for one that another try does not mend.

    Raises StorageError when `PATIENCE` is over. `what` names the object.
    """
    start, wait, told = time.monotonic(), FIRST_WAIT, False
    while True:
        try:
            return await call(*args, **kwargs)
        except Exception as error:
            if not (reason := transient(error)):
                raise
            _counts["retries"] += 1
            waited = time.monotonic() - start
            if waited > PATIENCE:
                raise StorageError(
                    f"{what}: the storage failed for {waited:.0f} s, the last time with {reason}"
                ) from error
            if waited > LONGEST_WAIT and not told:
                told = True
                warn(f"{what}: {reason}; it is tried again for {PATIENCE:.0f} s")
        await asyncio.sleep(wait * (0.5 + _jitter.random()))
        wait = min(2 * wait, LONGEST_WAIT)


def count(requests: int = 0, read: int = 0) -> None:
    _counts.update(requests=requests, bytes=read)
