"""A limit on the size of files, which stands in for a disk without room."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def no_room(limit: int) -> Iterator[None]:
    """Files of this process end at `limit` bytes. A write across that is cut there, and the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
