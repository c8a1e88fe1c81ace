"""The retry policy for buckets, shared by all libraries that access them, and counts of requests."""

import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from spatialvla_jax.errors import StorageError
from spatialvla_jax.utils.progress import warn

T = TypeVar("T")

PATIENCE = 120.0  # seconds for which a request is retried before the storage counts as failed
FIRST_WAIT, LONGEST_WAIT = 0.1, 10.0  # seconds between attempts
_jitter = random.Random()  # separate, so that the process's random numbers are unaffected
_counts: Counter[str] = Counter()


def counts() -> dict[str, int]:
    """This process's accesses to buckets: "requests", "retries" (requests that were repeated) and "bytes" (read)."""
    found = _counts + _tensorstore_counts()
    return {key: found[key] for key in ("requests", "retries", "bytes")}


def _tensorstore_counts() -> Counter[str]:
    """The same numbers for tensorstore, which reads and writes checkpoint arrays and has its own retries. It does not
    count the objects that it lists and removes."""
    found, tensorstore = Counter[str](), sys.modules.get("tensorstore")
    for scheme in ("gcs", "s3") if tensorstore else ():
        start = f"/tensorstore/kvstore/{scheme}/"
        metrics = tensorstore.experimental_collect_matching_metrics(start)  # type: ignore
        values = {metric["name"].removeprefix(start): metric["values"][0] for metric in metrics}
        done = sum(values.get(f"{kind}_latency_ms", {"count": 0})["count"] for kind in ("read", "write"))
        retries, read = (values.get(name, {"value": 0})["value"] for name in ("retries", "bytes_read"))
        found.update(requests=done + retries, retries=retries, bytes=read)
    return found


async def retrying(
    call: Callable[..., Awaitable[T]], transient: Callable[[Exception], str], what: str, *args: Any, **kwargs: Any
) -> T:
    """`await call(*args, **kwargs)`, retried with growing waits after throttling, server errors, resets and time-outs.
    `transient` describes such an error in a few words, or returns "" for one that a retry cannot fix.

    Raises StorageError after `PATIENCE` seconds. `what` names the object.
    """
    start, wait, warned = time.monotonic(), FIRST_WAIT, False
    while True:
        try:
            return await call(*args, **kwargs)
        except Exception as error:
            if not (reason := transient(error)):
                raise
            _counts["retries"] += 1
            waited = time.monotonic() - start
            if waited > PATIENCE:
                if getattr(error, "code", None) == 401:  # credentials that stay refused are not the storage's failure
                    raise
                raise StorageError(
                    f"{what}: the storage failed for {waited:.0f} s, most recently with {reason}"
                ) from error
            if waited > LONGEST_WAIT and not warned:
                warned = True
                warn(f"{what}: {reason}; retrying for {PATIENCE:.0f} s")
        await asyncio.sleep(wait * (0.5 + _jitter.random()))
        wait = min(2 * wait, LONGEST_WAIT)


def count(requests: int = 0, read: int = 0) -> None:
    _counts.update(requests=requests, bytes=read)
