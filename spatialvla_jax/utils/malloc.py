"""Settings of the C library's memory allocator."""

import contextlib
import ctypes
import os


def limit_heaps() -> None:
    """Make glibc use one heap per core for images, and return batches to the system at once.

    By default it has eight heaps per core, which fragment. It also raises the size above which memory is returned, up
    to 32 MB, whenever a larger block is freed. The resident set of a stream grew by 22 % in 22,000 samples, and with
    this by 0.4 % in 12,800. Returning every image also keeps it flat, but page faults cost a quarter of the decoding
    time. A policy server's grew by 11 MB in its first 10,000 fuzzed messages, and by 2 MB with this.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-8, os.cpu_count() or 1)  # M_ARENA_MAX
        mallopt(-3, 2**22)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**26)  # M_TRIM_THRESHOLD: memory freed at the end of a heap is soon reused
