"""This process's age, its locks on files, and its end with the process that started it."""

import fcntl
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

from spatialvla_jax.errors import InputError

PARENT = "SPATIALVLA_JAX_PARENT"  # of the environment of a command that ends with the process of that number


def process_age() -> float:
    """Seconds since the process started; 0.0 on systems without /proc."""
    try:
        uptime, stat = Path("/proc/uptime").read_text(), Path("/proc/self/stat").read_text()
    except OSError:
        return 0.0
    began = int(stat.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")  # field 22, seconds since boot
    return max(0.0, float(uptime.split()[0]) - began)


def try_lock(file: IO[Any]) -> bool:
    """Lock an open file until it is closed or the process dies; False if another process has it. Raises InputError."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise InputError(f"{file.name} cannot be locked on this file system: {error.strerror}") from None
    return True


def end_with(parent: int, end: Callable[[], Any]) -> None:
    """Call `end` when the process `parent`, which started this one, has died. A killed process cannot end others."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        end()

    threading.Thread(target=watch, daemon=True).start()


def end_worker_with_parent() -> None:
    """In a process that `multiprocessing` started: exit when its parent has died."""
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    end_with(parent.pid, partial(os._exit, 1))


def tied_to_this(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that calls `end_if_tied`, so that it ends when this process has died."""
    return {**environment, PARENT: str(os.getpid())}


def end_if_tied() -> None:
    """End, as on SIGTERM, when the process that started this one with `tied_to_this` has died."""
    if parent := os.environ.pop(PARENT, ""):
        end_with(int(parent), partial(os.kill, os.getpid(), signal.SIGTERM))
