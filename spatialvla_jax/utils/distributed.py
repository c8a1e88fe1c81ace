"""Multi-process runs: joining them, choosing the writer, and stopping together."""

import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

from spatialvla_jax.errors import InputError

_PIECE = 2**22  # bytes per process in one exchange


def join(coordinator: str, num_processes: int | None, process_id: int | None, heartbeat: int) -> None:
    """Join the run's other processes; call before using JAX. `coordinator` is HOST:PORT of process 0, or `auto` where
    JAX detects everything: TPU pods, SLURM, MPI. If a process is silent for `heartbeat` seconds, all others end.

    Raises InputError if the others cannot be found.
    """
    if coordinator != "auto" and (num_processes is None or process_id is None):
        raise InputError(
            "--coordinator HOST:PORT needs --num-processes and --process-id; only `auto` finds them itself"
        )
    try:
        jax.distributed.initialize(
            None if coordinator == "auto" else coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=heartbeat,
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(f"--coordinator {coordinator}: {' '.join(str(error).split())}") from error


@dataclass(frozen=True)
class Processes:
    """Processes that share work: this one has number `index` of `count`. `gather` must be called by all of them and
    returns every process's data, ordered by index."""

    index: int = 0
    count: int = 1
    gather: Callable[[bytes], list[bytes]] = lambda data: [data]


ALONE = Processes()


def all_processes() -> Processes:
    """All processes of the run."""
    count = jax.process_count()
    return Processes(jax.process_index(), count, _gather) if count > 1 else ALONE


def _gather(data: bytes) -> list[bytes]:
    """Gather over the devices' network, in pieces of few different sizes, because each size compiles a program."""
    sizes = multihost_utils.process_allgather(np.asarray(len(data), np.int32)).tolist()
    whole = [bytearray() for _ in sizes]
    for start in range(0, max(sizes), _PIECE):
        part = np.frombuffer(data[start : start + _PIECE], np.uint8)
        piece = np.zeros(min(_PIECE, 1 << (max(sizes) - start - 1).bit_length()), np.uint8)
        piece[: len(part)] = part
        for one, row in zip(whole, multihost_utils.process_allgather(piece), strict=True):
            one += row.tobytes()
    return [bytes(one[:size]) for one, size in zip(whole, sizes, strict=True)]


def is_writer() -> bool:
    """Whether this process writes logs and shows progress: only process 0 does."""
    return jax.process_index() == 0


class Preemption:
    """While entered, SIGTERM asks the run to end after the current step, or before the first if it comes earlier. All
    processes of a run end at the same step."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "Preemption":
        # In multi-process runs, JAX's own service receives the signal and agrees on the step.
        self.alone = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        if self.alone:
            self.before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self.alone:
            signal.signal(signal.SIGTERM, self.before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        print("SIGTERM: the run ends after this step", file=sys.stderr)

    def reached(self, step: int) -> bool:
        """Whether the run ends after `step`. Must be called at every step."""
        return self.asked or (jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step))
