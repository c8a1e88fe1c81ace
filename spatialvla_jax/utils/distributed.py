"""Several processes, one run: joining them, who writes, and stopping together."""

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

_PIECE = 2**22  # bytes of each process in one exchange


def join(coordinator: str, num_processes: int | None, process_id: int | None, heartbeat: int) -> None:
    """Join the run's other processes, before anything else uses JAX. `coordinator` is HOST:PORT of process 0, or `auto`
    where JAX finds all by itself: TPU pods, SLURM, MPI. A process unheard for `heartbeat` seconds ends every other one.

    Raises InputError when the others cannot be found.
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
    """Processes that divide work: this one is number `index` of `count`. All of them call `gather` together, which
    gives each of them what every one has, in their order."""

    index: int = 0
    count: int = 1
    gather: Callable[[bytes], list[bytes]] = lambda data: [data]


ALONE = Processes()


def all_processes() -> Processes:
    """Those of the run."""
    count = jax.process_count()
    return Processes(jax.process_index(), count, _gather) if count > 1 else ALONE


def _gather(data: bytes) -> list[bytes]:
    """By the devices' network, in pieces of a few sizes: each size compiles a program."""
    sizes = multihost_utils.process_allgather(np.asarray(len(data), np.int32)).tolist()
    whole = [bytearray() for _ in sizes]
    for start in range(0, max(sizes), _PIECE):
        own = np.frombuffer(data[start : start + _PIECE], np.uint8)
        piece = np.zeros(min(_PIECE, 1 << (max(sizes) - start - 1).bit_length()), np.uint8)
        piece[: len(own)] = own
        for one, row in zip(whole, multihost_utils.process_allgather(piece), strict=True):
            one += row.tobytes()
    return [bytes(one[:size]) for one, size in zip(whole, sizes, strict=True)]


def is_writer() -> bool:
    """Whether this process writes logs and shows progress: the first does."""
    return jax.process_index() == 0


class Preemption:
    """From `with` on, SIGTERM asks for an end after the current step, or before the first where it comes early; over
    several processes, at the same step."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "Preemption":
        # Over several processes JAX's own service hears the signal and agrees on the step.
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
        """Whether the run ends after `step`; to be asked at every step."""
        return self.asked or (jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step))
